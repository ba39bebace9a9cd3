"""Triton: one step of top-k decoding. Scores of all keys, then attention to the rows that were chosen by them.

The queries of one key/value head are R rows: q (Hk, R, D), keys and values (Hk, n, D), scores (Hk, R, n). The choice
between the two, torch.topk, and attention to further rows stay in torch. No launch waits for the host. Row offsets are
int64, because n x D passes 2^31. The torch twins are key_scores and softmax_part in topk_attention.py.
"""

import torch
from torch import Tensor

from common.kernels import need, use_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel
    triton = None

DTYPES = torch.float32, torch.bfloat16, torch.float16
PROGRAMS = 2048  # that share a launch
ROWS = 16  # queries that one program scores: the smallest matrix of a tensor core


if triton is not None:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
    LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a running maximum to start from: exp(-inf - LOWEST) is 0

    @triton.jit
    def _product(a, b, acc):
        """acc + a b^T in fp32. The interpreter has no product of bf16; in fp32 it is the same number."""
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, tl.trans(b), acc, input_precision="ieee")

    @triton.jit
    def _parts(x):
        """fp32 -> three bf16 whose sum it is, so that tensor cores can multiply it."""
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)

    @triton.jit(do_not_specialize=["per"])
    def _score_kernel(
        q_ptr, k_ptr, s_ptr, R, n, D, k_head, k_row, per, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
    ):  # fmt: skip
        """Program (head, row tile, part): scores of BR queries and `per` blocks of BN keys, each key read once."""
        h, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
        r, d = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BD)
        rows, columns = (r < R)[:, None], (d < D)[None, :]
        q = tl.load(q_ptr + (h * R + r[:, None]) * D + d[None, :], mask=rows & columns, other=0.0)
        if q.dtype == tl.float32:
            q, q_middle, q_low = _parts(q)
        for block in range(part * per, tl.minimum((part + 1) * per, tl.cdiv(n, BN))):
            j = (block * BN + tl.arange(0, BN)).to(tl.int64)
            inside = (j < n)[:, None] & columns
            k = tl.load(k_ptr + h * k_head + j[:, None] * k_row + d[None, :], mask=inside, other=0.0)
            s = tl.zeros([BR, BN], tl.float32)
            if k.dtype == tl.float32:  # the products left out are below 2^-24 of the whole
                k, k_middle, k_low = _parts(k)
                s = _product(q_middle, k_middle, s)
                s = _product(q, k_low, s)
                s = _product(q, k_middle, s)
            if q_ptr.dtype.element_ty == tl.float32:
                s = _product(q_low, k, s)
                s = _product(q_middle, k, s)
            s = _product(q, k, s)
            tl.store(s_ptr + (h * R + r[:, None]) * n + j[None, :], s, mask=rows & (j < n)[None, :])

    @triton.jit(do_not_specialize=["per"])
    def _attend_kernel(
        s_ptr, index_ptr, v_ptr, o_ptr, l_ptr, R, k, D, scale, v_head, v_row, per,
        BK: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        """Program (query row, part): softmax attention to `per` blocks of the row's chosen values -> one part of it.

        Without an index the chosen values are the first k.
        """
        row, part, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
        v_ptr += row // R * v_head
        m, total = tl.full([], LOWEST, tl.float32), 0.0  # running maximum, sum of exp(s - m)
        o = tl.zeros([BD], tl.float32)  # sum of exp(s - m) v
        for block in range(part * per, tl.minimum((part + 1) * per, tl.cdiv(k, BK))):
            i = block * BK + tl.arange(0, BK)
            s = tl.load(s_ptr + row * k + i, mask=i < k, other=float("-inf")) * scale
            j = i.to(tl.int64)
            if index_ptr is not None:
                j = tl.load(index_ptr + row * k + i, mask=i < k, other=0)
            inside = (i < k)[:, None] & (d < D)[None, :]
            v = tl.load(v_ptr + j[:, None] * v_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
            m_new = tl.maximum(m, tl.max(s, axis=0))
            p, shrink = tl.exp(s - m_new), tl.exp(m - m_new)
            total = total * shrink + tl.sum(p, axis=0)
            o = o * shrink + tl.sum(p[:, None] * v, axis=0)
            m = m_new
        out = row * tl.num_programs(1) + part
        tl.store(l_ptr + out, m + tl.log(total))
        tl.store(o_ptr + out * D + d, o / tl.maximum(total, 1.0), mask=d < D)  # total >= 1, or 0 without a finite score


def _check(name: str, x: Tensor) -> None:
    """Keys or values (Hk, n, D)."""
    need(use_kernels(x.device), f"the kernels need a GPU and the package triton; {name} is on {x.device}")
    need(x.dtype in DTYPES, f"the kernels take float32, bfloat16 and float16; {name} is {x.dtype}")
    need(x.stride(2) == 1, f"{name} has stride {x.stride(2)} in its last dimension, the kernels need 1")
    most = 512 // x.element_size()  # more spills registers
    need(x.shape[2] <= most, f"the kernels take head widths up to {most} in {x.dtype}; {name} has {x.shape[2]}")


def _share(blocks: int, programs: int) -> tuple[int, int]:
    """Blocks per part, and parts, so that about PROGRAMS programs share the work."""
    per = max(1, triton.cdiv(blocks * programs, PROGRAMS))
    return per, triton.cdiv(blocks, per)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Raw scores q . k in the precision of fp32: q (Hk, R, D), k (Hk, n, D) -> (Hk, R, n) fp32.

    BadInput: shapes, float64, a last stride of k other than 1, D > 256 (128 for fp32 keys), no GPU.
    """
    (Hk, R, D), n = q.shape, k.shape[1]
    _check("k", k)
    need(k.shape == (Hk, n, D), f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}")
    need(q.dtype in DTYPES, f"the kernels take float32, bfloat16 and float16; q is {q.dtype}")
    need(k.dtype != torch.float16 or q.dtype == k.dtype, f"float16 keys need a float16 query, got {q.dtype}")
    q = (q if q.dtype == k.dtype else q.float()).contiguous()
    BD = max(16, triton.next_power_of_2(D))
    BN = min(128, 16384 // (BD * k.element_size()))  # 16 KB of keys at a time
    per, parts = _share(triton.cdiv(n, BN), Hk * triton.cdiv(R, ROWS))
    s = torch.empty(Hk, R, n, dtype=torch.float32, device=q.device)
    _score_kernel[Hk, triton.cdiv(R, ROWS), parts](
        q, k, s, R, n, D, k.stride(0), k.stride(1), per, BR=ROWS, BN=BN, BD=BD
    )
    return s


def attend(s: Tensor, index: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale s) v over chosen rows: s fp32, index int64 (Hk, R, k), v (Hk, n, D) -> o (Hk, R, D), l (Hk, R).

    Both fp32. l is the log-sum-exp of scale s, by which further rows can join; without rows o = 0 and l = -inf.
    BadInput: as in scores.
    """
    (Hk, R, k), D = s.shape, v.shape[2]
    _check("v", v)
    need(s.dtype == torch.float32 and index.dtype == torch.int64, "s must be float32 and index int64")
    shapes = ", ".join(str(tuple(x.shape)) for x in (s, index, v))
    need(index.shape == s.shape and len(v) == Hk, f"s, index and v do not fit: {shapes}")
    BD = max(16, triton.next_power_of_2(D))
    BK = 4096 // BD
    per, parts = _share(triton.cdiv(k, BK), Hk * R)
    part_o, part_l = s.new_empty(Hk, R, parts, D), s.new_empty(Hk, R, parts)
    o, l = s.new_empty(Hk, R, D), s.new_empty(Hk, R)
    _attend_kernel[Hk * R, parts](
        s.contiguous(), index.contiguous(), v, part_o, part_l, R, k, D, scale, v.stride(0), v.stride(1), per,
        BK=BK, BD=BD,
    )  # fmt: skip
    _attend_kernel[Hk * R, 1](  # the parts join by the same rule: values o, scores l
        part_l, None, part_o, o, l, 1, parts, D, 1.0, parts * D, D, triton.cdiv(parts, BK), BK=BK, BD=BD
    )
    return o, l
