"""Triton: exact top-k decoding on a GPU. Scores, radix select, attention to the chosen rows, and a dense baseline.

A decode step is a chain of launches without a host synchronisation: counts and thresholds stay on the device. Queries
of one key/value head are R rows: q (Hk, R, D), scores (Hk, R, N). Row offsets are int64, as N x Hk x D passes 2^31. The
torch twins are _scores, radix_topk, topk_attention and Quantised in topk_attention.py. Not yet run on a GPU.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel
    triton = None

SPLIT = 16  # blocks that one program of a scan takes


if triton is not None:

    @triton.jit
    def _key(s):
        """float32 -> int32 with the same order; -0 and +0 are equal."""
        b = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
        return tl.where(b < 0, b ^ 0x7FFFFFFF, b)

    @triton.jit
    def _score_kernel(
        q_ptr, k_ptr, s_ptr, R, n, D, k_head, k_row,
        BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PER: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """Program (head, row tile, split): scores of BR queries and PER blocks of BN keys, each key read once."""
        h, r0, split = tl.program_id(0).to(tl.int64), tl.program_id(1) * BR, tl.program_id(2)
        r, d = r0 + tl.arange(0, BR), tl.arange(0, BD)
        inside = (r < R)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + (h * R + r[:, None]) * D + d[None, :], mask=inside, other=0.0)
        if WIDE:  # the interpreter has no product of bf16; in fp32 it is the same number
            q = q.to(tl.float32)
        for block in range(PER):
            j = (split * PER + block).to(tl.int64) * BN + tl.arange(0, BN)
            where = k_ptr + h * k_head + j[:, None] * k_row + d[None, :]
            k = tl.load(where, mask=(j < n)[:, None] & (d < D)[None, :], other=0.0).to(q.dtype)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BR, BN), fp32
            tl.store(s_ptr + (h * R + r[:, None]) * n + j[None, :], s, mask=(r < R)[:, None] & (j < n)[None, :])

    @triton.jit
    def _q4_kernel(
        q_ptr, code_ptr, scale_ptr, low_ptr, s_ptr, R, n, D,
        BR: tl.constexpr, BH: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, FAST: tl.constexpr,
    ):  # fmt: skip
        """Scores from a 4-bit copy: channel d and d + D/2 share a byte, each group of 64 rows a scale and an offset."""
        h, split, half = tl.program_id(0).to(tl.int64), tl.program_id(2), D // 2
        r, d = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BH)
        rows, inside = (r < R)[:, None], (r < R)[:, None] & (d < half)[None, :]
        at = q_ptr + (h * R + r[:, None]) * D + d[None, :]
        q_low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        q_high = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        for block in range(PER):
            g = (split * PER + block).to(tl.int64)
            j = g * GROUP + tl.arange(0, GROUP)
            meta, live = (h * (n // GROUP) + g) * D + d, (d < half) & (g * GROUP + 0 * d < n)
            scale_low = tl.load(scale_ptr + meta, mask=live, other=0.0).to(tl.float32)
            scale_high = tl.load(scale_ptr + meta + half, mask=live, other=0.0).to(tl.float32)
            low_low = tl.load(low_ptr + meta, mask=live, other=0.0).to(tl.float32)
            low_high = tl.load(low_ptr + meta + half, mask=live, other=0.0).to(tl.float32)
            code = tl.load(
                code_ptr + (h * n + j[:, None]) * half + d[None, :],
                mask=(j < n)[:, None] & (d < half)[None, :],
                other=0,
            )  # (GROUP, BH)
            a, b = (code & 15).to(tl.float32), (code >> 4).to(tl.float32)
            x, y = q_low * scale_low[None, :], q_high * scale_high[None, :]  # the scale moves to the query's side
            if FAST:  # codes are exact in bf16
                s = tl.dot(x.to(tl.bfloat16), tl.trans(a.to(tl.bfloat16)))
                s += tl.dot(y.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16)))
            else:
                s = tl.dot(x, tl.trans(a), input_precision="ieee") + tl.dot(y, tl.trans(b), input_precision="ieee")
            s += tl.sum(q_low * low_low[None, :] + q_high * low_high[None, :], axis=1)[:, None]
            tl.store(s_ptr + (h * R + r[:, None]) * n + j[None, :], s, mask=rows & (j < n)[None, :])

    @triton.jit
    def _histogram_kernel(
        s_ptr, top_ptr, state_ptr, hist_ptr, n, blocks,
        SHIFT: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr,
    ):  # fmt: skip
        """Program (row, split): histogram of the next bits of the scores that share the bits found so far.

        The first pass also keeps each block's largest key; later passes skip blocks that cannot hold the threshold.
        """
        row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        prefix = tl.load(state_ptr + 2 * row)
        count = tl.zeros([BINS], tl.int32)
        for b in range(PER):
            block = split * PER + b
            if block < blocks:
                seen = True
                if not FIRST:
                    seen = (tl.load(top_ptr + row * blocks + block) >> (SHIFT + (10 if BINS == 1024 else 11))) >= prefix
                if seen:
                    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                    key = _key(tl.load(s_ptr + row * n + j, mask=j < n, other=float("-inf")))
                    if FIRST:
                        tl.store(top_ptr + row * blocks + block, tl.max(key, axis=0))
                        alive, bins = j < n, (key >> SHIFT) + 1024
                    else:
                        above = key >> (SHIFT + (10 if BINS == 1024 else 11))
                        alive, bins = (j < n) & (above == prefix), (key >> SHIFT) & (BINS - 1)
                    count += tl.histogram(tl.where(alive, bins, 0), BINS)  # the others are counted as bin 0
                    dead = tl.sum((~alive).to(tl.int32), axis=0)
                    count -= tl.where(tl.arange(0, BINS) == 0, dead, 0)
        i = tl.arange(0, BINS)
        tl.atomic_add(hist_ptr + row * 2048 + i, count, mask=count > 0)

    @triton.jit
    def _threshold_kernel(state_ptr, hist_ptr, BINS: tl.constexpr, FIRST: tl.constexpr):
        """One program per row: the bin that holds the k-th largest; state becomes (bits so far, how many it needs)."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BINS)
        prefix, need = tl.load(state_ptr + 2 * row), tl.load(state_ptr + 2 * row + 1)
        count = tl.load(hist_ptr + row * 2048 + i)
        above = tl.sum(count, axis=0) - tl.cumsum(count, axis=0)  # in higher bins
        pivot = (above < need) & (need <= above + count)
        bin = tl.sum(tl.where(pivot, i, 0), axis=0)
        tl.store(state_ptr + 2 * row, bin - 1024 if FIRST else prefix * BINS + bin)
        tl.store(state_ptr + 2 * row + 1, need - tl.sum(tl.where(pivot, above, 0), axis=0))
        tl.store(hist_ptr + row * 2048 + i, tl.zeros([BINS], tl.int32))

    @triton.jit
    def _count_kernel(
        s_ptr, top_ptr, state_ptr, count_ptr, n, blocks, splits, BLOCK: tl.constexpr, PER: tl.constexpr
    ):  # fmt: skip
        """Program (row, split): how many scores lie above the threshold, and on it."""
        row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        threshold = tl.load(state_ptr + 2 * row)
        above, equal = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        for b in range(PER):
            block = split * PER + b
            if block < blocks:
                if tl.load(top_ptr + row * blocks + block) >= threshold:
                    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                    key = _key(tl.load(s_ptr + row * n + j, mask=j < n, other=float("-inf")))
                    above += ((key > threshold) & (j < n)).to(tl.int32)
                    equal += ((key == threshold) & (j < n)).to(tl.int32)
        tl.store(count_ptr + (row * splits + split) * 2, tl.sum(above, axis=0))
        tl.store(count_ptr + (row * splits + split) * 2 + 1, tl.sum(equal, axis=0))

    @triton.jit
    def _compact_kernel(
        s_ptr, top_ptr, state_ptr, before_ptr, value_ptr, index_ptr, n, blocks, splits, k,
        BLOCK: tl.constexpr, PER: tl.constexpr,
    ):  # fmt: skip
        """Program (row, split): write its chosen scores and rows behind those of earlier splits; lowest ties first."""
        row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        threshold, need = tl.load(state_ptr + 2 * row), tl.load(state_ptr + 2 * row + 1)
        above_before = tl.load(before_ptr + (row * splits + split) * 2)
        ties = tl.load(before_ptr + (row * splits + split) * 2 + 1)
        at = above_before + tl.minimum(ties, need)
        for b in range(PER):
            block = split * PER + b
            if block < blocks:
                if tl.load(top_ptr + row * blocks + block) >= threshold:
                    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                    s = tl.load(s_ptr + row * n + j, mask=j < n, other=float("-inf"))
                    key = _key(s)
                    tie = ((key == threshold) & (j < n)).to(tl.int32)
                    taken_tie = (tie == 1) & (ties + tl.cumsum(tie, axis=0) <= need)
                    taken = (((key > threshold) & (j < n)) | taken_tie).to(tl.int32)
                    place = row * k + at + tl.cumsum(taken, axis=0) - 1
                    tl.store(value_ptr + place, s, mask=taken == 1)
                    tl.store(index_ptr + place, j, mask=taken == 1)
                    at += tl.sum(taken, axis=0)
                    ties += tl.sum(tie, axis=0)

    @triton.jit
    def _attend_kernel(
        s_ptr, index_ptr, v_ptr, o_ptr, l_ptr, R, k, D, scale, v_head, v_row, parts, first,
        BK: tl.constexpr, BD: tl.constexpr, PER: tl.constexpr,
    ):  # fmt: skip
        """Program (query row, split): softmax attention over PER blocks of its chosen rows -> part `first + split`."""
        row, split, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
        h = row // R
        m, total, o = float("-inf"), 0.0, tl.zeros([BD], tl.float32)
        for b in range(PER):
            i = (split * PER + b) * BK + tl.arange(0, BK)
            s = tl.load(s_ptr + row * k + i, mask=i < k, other=float("-inf")) * scale
            j = tl.load(index_ptr + row * k + i, mask=i < k, other=0)
            mask = (i < k)[:, None] & (d < D)[None, :]
            v = tl.load(v_ptr + h * v_head + j[:, None] * v_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
            m_new = tl.maximum(m, tl.max(s, axis=0))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p, shrink = tl.exp(s - base), tl.exp(m - base)
            total = total * shrink + tl.sum(p, axis=0)
            o = o * shrink + tl.sum(p[:, None] * v, axis=0)
            m = m_new
        out = row * parts + first + split
        tl.store(l_ptr + out, tl.where(total > 0, m + tl.log(total), float("-inf")))
        tl.store(o_ptr + out * D + d, o / tl.where(total > 0, total, 1.0), mask=d < D)

    @triton.jit
    def _dense_kernel(
        q_ptr, k_ptr, v_ptr, o_ptr, l_ptr, R, T, n, D, scale, k_head, k_row, v_head, v_row, parts, first,
        CAUSAL: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PER: tl.constexpr,
        WIDE: tl.constexpr,
    ):  # fmt: skip
        """Program (head, row tile, split): dense attention over PER blocks of keys -> part `first + split` of each row.

        CAUSAL: row g T + t sees keys 0..n - T + t.
        """
        h, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
        r, d = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BD)
        rows, cols = (r < R)[:, None], (d < D)[None, :]
        q = tl.load(q_ptr + (h * R + r[:, None]) * D + d[None, :], mask=rows & cols, other=0.0)
        if WIDE:
            q = q.to(tl.float32)
        m, total = tl.full([BR], float("-inf"), tl.float32), tl.zeros([BR], tl.float32)
        o = tl.zeros([BR, BD], tl.float32)
        limit = n - T + (r % T) + 1 if CAUSAL else n + 0 * r
        for b in range(PER):
            j = (split * PER + b).to(tl.int64) * BN + tl.arange(0, BN)
            inside = (j < n)[:, None] & cols
            k = tl.load(k_ptr + h * k_head + j[:, None] * k_row + d[None, :], mask=inside, other=0.0).to(q.dtype)
            v = tl.load(v_ptr + h * v_head + j[:, None] * v_row + d[None, :], mask=inside, other=0.0).to(q.dtype)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(j[None, :] < limit[:, None], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p, shrink = tl.exp(s - base[:, None]), tl.exp(m - base)
            total = total * shrink + tl.sum(p, axis=1)
            o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = m_new
        out = (h * R + r) * parts + first + split
        tl.store(
            l_ptr + out, tl.where(total > 0, m + tl.log(tl.where(total > 0, total, 1.0)), float("-inf")), mask=r < R
        )
        o = o / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(o_ptr + out[:, None] * D + d[None, :], o, mask=rows & cols)

    @triton.jit
    def _merge_kernel(part_o_ptr, part_l_ptr, o_ptr, l_ptr, parts, D, BD: tl.constexpr):
        """One program per query row: join its parts by their log-sum-exp."""
        row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
        m, total, o = float("-inf"), 0.0, tl.zeros([BD], tl.float32)
        for i in range(parts):
            l = tl.load(part_l_ptr + row * parts + i)
            x = tl.load(part_o_ptr + (row * parts + i) * D + d, mask=d < D, other=0.0)
            m_new = tl.maximum(m, l)
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight, shrink = tl.exp(l - base), tl.exp(m - base)
            total = total * shrink + weight
            o = o * shrink + weight * x
            m = m_new
        tl.store(l_ptr + row, tl.where(total > 0, m + tl.log(tl.where(total > 0, total, 1.0)), float("-inf")))
        tl.store(o_ptr + row * D + d, o / tl.where(total > 0, total, 1.0), mask=d < D)


def available() -> bool:
    """True when Triton is installed."""
    return triton is not None


def _need(x: Tensor) -> None:
    """RuntimeError: Triton is missing, or x is on the CPU and the interpreter is off."""
    if triton is None:
        raise RuntimeError("Triton is not installed. Use backend='torch'.")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("backend='triton' on CPU tensors runs only under TRITON_INTERPRET=1. Use backend='torch'.")


def _pow2(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _per(blocks: int, programs: int) -> int:
    """Blocks per program, so that a few thousand programs share the work."""
    return max(1, min(SPLIT, triton.cdiv(blocks * programs, 2048)))


def _common(q: Tensor, k: Tensor) -> Tensor:
    """q contiguous, in the dtype that the products are made in: its own unless the keys are wider."""
    return q.to(torch.float32 if torch.float32 in (q.dtype, k.dtype) else q.dtype).contiguous()


def scores_triton(q: Tensor, k: Tensor) -> Tensor:
    """Raw scores q . k: q (Hk, R, D), k (Hk, n, D), last stride 1 -> (Hk, R, n) fp32."""
    _need(q)
    (Hk, R, D), n, q = q.shape, k.shape[1], _common(q, k)
    s = torch.empty(Hk, R, n, dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(n, 128)
    per = _per(blocks, Hk)
    grid = (Hk, triton.cdiv(R, 16), triton.cdiv(blocks, per))
    _score_kernel[grid](q, k, s, R, n, D, k.stride(0), k.stride(1), BR=16, BN=128, BD=_pow2(D), PER=per,
                        WIDE=not q.is_cuda)  # fmt: skip
    return s


def q4_scores_triton(q: Tensor, code: Tensor, scale: Tensor, low: Tensor, fast: bool | None = None) -> Tensor:
    """Scores from the 4-bit copy: q (Hk, R, D), code (Hk, n, D/2), scale and low (Hk, n/64, D) -> (Hk, R, n) fp32.

    fast: products in bf16, the default on a GPU.
    """
    _need(q)
    (Hk, R, D), n, q = q.shape, code.shape[1], q.contiguous()
    s = torch.empty(Hk, R, n, dtype=torch.float32, device=q.device)
    per = _per(n // 64, Hk)
    grid = (Hk, triton.cdiv(R, 16), triton.cdiv(n // 64, per))
    _q4_kernel[grid](
        q, code, scale, low, s, R, n, D,
        BR=16, BH=_pow2(D // 2), PER=per, GROUP=64, FAST=q.is_cuda if fast is None else fast,
    )  # fmt: skip
    return s


def topk_triton(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of s (Hk, R, n) fp32 contiguous, by radix select -> values and rows, (Hk, R, k).

    Rows ascend, the lowest index wins a tie. k is known on the host, all counts stay on the device.
    """
    _need(s)
    (Hk, R, n), dev = s.shape, s.device
    if s.dtype != torch.float32 or not s.is_contiguous() or not 0 <= k <= n:
        raise ValueError(f"topk_triton needs contiguous float32 scores and k in 0..{n}, got {s.dtype}, k = {k}")
    value = torch.empty(Hk, R, k, dtype=torch.float32, device=dev)
    index = torch.empty(Hk, R, k, dtype=torch.long, device=dev)
    if k == 0:
        return value, index
    rows, block = Hk * R, min(1024, _pow2(n))
    blocks = triton.cdiv(n, block)
    per = _per(blocks, rows)
    splits = triton.cdiv(blocks, per)
    top = torch.empty(rows, blocks, dtype=torch.int32, device=dev)
    state = torch.zeros(rows, 2, dtype=torch.int32, device=dev)  # bits found so far, how many are needed
    state[:, 1] = k
    hist = torch.zeros(rows, 2048, dtype=torch.int32, device=dev)
    for shift, bins in ((21, 2048), (10, 2048), (0, 1024)):
        how = {"BINS": bins, "FIRST": shift == 21}
        _histogram_kernel[(rows, splits)](
            s, top, state, hist, n, blocks, SHIFT=shift, BLOCK=block, PER=per, **how
        )  # fmt: skip
        _threshold_kernel[(rows,)](state, hist, **how)
    count = torch.empty(rows, splits, 2, dtype=torch.int32, device=dev)
    _count_kernel[(rows, splits)](s, top, state, count, n, blocks, splits, BLOCK=block, PER=per)
    before = (count.cumsum(dim=1) - count).to(torch.int32)
    _compact_kernel[(rows, splits)](
        s, top, state, before, value, index, n, blocks, splits, k, BLOCK=block, PER=per
    )  # fmt: skip
    return value, index


def _dense_parts(q: Tensor, k: Tensor, v: Tensor, T: int, scale: float, causal: bool, spare: int = 0) -> tuple:
    """Parts of attention of q (Hk, R, D) over k, v (Hk, n, D), with room for `spare` more parts in front."""
    (Hk, R, D), n, q = q.shape, k.shape[1], _common(q, k)
    blocks = triton.cdiv(n, 64)
    per = _per(blocks, Hk) if n else 1
    splits = triton.cdiv(blocks, per)
    o = torch.empty(Hk, R, spare + splits, D, dtype=torch.float32, device=q.device)
    l = torch.empty(Hk, R, spare + splits, dtype=torch.float32, device=q.device)
    if n:
        _dense_kernel[(Hk, triton.cdiv(R, 16), splits)](
            q, k, v, o, l, R, T, n, D, scale, k.stride(0), k.stride(1), v.stride(0), v.stride(1), spare + splits, spare,
            CAUSAL=causal, BR=16, BN=64, BD=_pow2(D), PER=per, WIDE=not q.is_cuda,
        )  # fmt: skip
    return o, l


def _merge(o: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """Join parts (Hk, R, P, D), (Hk, R, P) -> (Hk, R, D), (Hk, R)."""
    Hk, R, P, D = o.shape
    out, lse = o.new_empty(Hk, R, D), l.new_empty(Hk, R)
    _merge_kernel[(Hk * R,)](o, l, out, lse, P, D, BD=_pow2(D))
    return out, lse


def dense_decode_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Dense attention of a few queries over a long cache, split over the keys: q (B, Hq, T, D), k, v (B, Hk, N, D),
    last stride 1 -> (B, Hq, T, D) in q's dtype. Without a mask."""
    _need(q)
    rows = [_merge(*_dense_parts(x.reshape(y.shape[0], -1, q.shape[-1]), y, z, 1, scale, causal=False))[0]
            for x, y, z in zip(q, k, v, strict=True)]  # fmt: skip
    return torch.stack(rows).reshape(q.shape).to(q.dtype)


def topk_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, tops: list[int], used: list[int], ks: Tensor, vs: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """topk_attention per head: sequence b attends tops[b] of its first used[b] prefix rows and, causally, the suffix.

    q (B, Hq, T, D), k, v (B, Hk, N, D), ks, vs (B, Hk, M, D), last strides 1 -> out, lse (B, Hq, T), fp32.
    """
    _need(q)
    (B, Hq, T, D), Hk, found = q.shape, k.shape[1], []
    for b in range(B):
        rows = q[b].reshape(Hk, -1, D)
        value, index = topk_triton(scores_triton(rows, k[b, :, : used[b]]), tops[b])
        blocks = triton.cdiv(tops[b], 64)
        per = _per(blocks, Hq * T) if blocks else 1
        splits = triton.cdiv(blocks, per)
        o, l = _dense_parts(rows, ks[b], vs[b], T, scale, True, spare=splits)
        if splits:
            _attend_kernel[(Hq * T, splits)](
                value, index, v[b], o, l, rows.shape[1], tops[b], D, scale, v.stride(1), v.stride(2), o.shape[2], 0,
                BK=64, BD=_pow2(D), PER=per,
            )  # fmt: skip
        found.append(_merge(o, l))
    o, l = zip(*found, strict=True)
    return torch.stack(o).reshape(q.shape), torch.stack(l).reshape(B, Hq, T)
