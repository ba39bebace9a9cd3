"""Triton: an Adam step over many tensors in a few launches, with second moments shared by rows, columns or everything.

A tensor is a matrix (rows, cols) in one of four modes. ROW keeps one second moment per row, COL one per column, SCALAR
one, FULL one per entry. Column sums go through fixed row splits and a second reduction, so results are deterministic;
there are no atomics. Learning rate, step counts, clip factor and the skip flag stay on the device: no synchronisation.
The plain torch twin is SlimAdamW's own path in slimadam.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel
    triton = None

ROW, COL, FULL, SCALAR = range(4)
SPLIT = 256  # rows that one program adds up for a column sum
SHAPE = {ROW: (4, 1024), COL: (8, 512), FULL: (1, 2048), SCALAR: (1, 2048)}  # tile (rows, cols) of the update
SUM = (16, 128)  # tile of the sums; a program walks SPLIT rows with it
LINE = 256  # sums that one program of the small kernels handles


if triton is not None:
    KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

    @triton.jit
    def _at(table_ptr, entry, KIND: tl.constexpr, ALIGNED: tl.constexpr):
        """Entry `entry` of a table of addresses as a pointer."""
        address = tl.load(table_ptr + entry)
        if ALIGNED:
            address = tl.multiple_of(address, 16)
        return address.to(tl.pointer_type(KIND))

    @triton.jit
    def _mix(z):
        """splitmix64: an int64 whose bits all depend on all bits of z."""
        z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
        z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
        return z ^ ((z >> 31) & 0x1FFFFFFFF)

    @triton.jit
    def _stochastic(x, noise):
        """fp32 to bf16: 16 random bits added below the mantissa kept, then cut. Inf and NaN pass through."""
        bits = x.to(tl.int32, bitcast=True)
        up = (bits + (noise & 0xFFFF).to(tl.int32)) & -65536
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, up.to(tl.float32, bitcast=True), x).to(tl.bfloat16)

    @triton.jit
    def _sum_kernel(
        g_ptr, tile_ptr, size_ptr, partial_ptr, norm_ptr, bad_ptr,
        G: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr, ALIGNED: tl.constexpr,
        SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """Sums of g * g over SPLIT rows of BN columns: per column (MODE 1), together (3), or only for the norm."""
        pid = tl.program_id(0)
        entry = tl.load(tile_ptr + 4 * pid)
        first, left = tl.load(tile_ptr + 4 * pid + 1), tl.load(tile_ptr + 4 * pid + 2)
        slot = tl.load(tile_ptr + 4 * pid + 3)
        rows, cols = tl.load(size_ptr + 2 * entry), tl.load(size_ptr + 2 * entry + 1)
        if ALIGNED:
            cols = tl.multiple_of(cols, 16)
        g_at = _at(g_ptr, entry, G, ALIGNED)
        j = left + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        bad = tl.zeros([BM, BN], tl.float32)
        for start in range(0, SPLIT, BM):
            i = first + start + tl.arange(0, BM)
            inside = (i < rows)[:, None] & (j < cols)[None, :]
            g = tl.load(g_at + i[:, None] * cols + j[None, :], mask=inside, other=0.0).to(tl.float32)
            acc += g * g
            if NORM:
                bad += tl.where((g - g) == 0.0, 0.0, 1.0)  # Inf and NaN
        column = tl.sum(acc, axis=0)
        if MODE == 1:
            tl.store(partial_ptr + slot + j, column, mask=j < cols)
        if MODE == 3:
            tl.store(partial_ptr + slot, tl.sum(column, axis=0))
        if NORM:
            tl.store(norm_ptr + pid, tl.sum(column, axis=0))
            tl.store(bad_ptr + pid, tl.sum(tl.sum(bad, axis=0), axis=0))

    @triton.jit
    def _reduce_kernel(partial_ptr, line_ptr, sum_ptr, BLOCK: tl.constexpr):
        """Add up the row splits of BLOCK sums in a fixed order."""
        line = line_ptr + 6 * tl.program_id(0)
        j = tl.load(line + 1) + tl.arange(0, BLOCK)
        width, splits, base, out = tl.load(line + 2), tl.load(line + 3), tl.load(line + 4), tl.load(line + 5)
        total = tl.zeros([BLOCK], tl.float32)
        for s in range(splits):
            total += tl.load(partial_ptr + base + s * width + j, mask=j < width, other=0.0)
        tl.store(sum_ptr + out + j, total, mask=j < width)

    @triton.jit
    def _advance_kernel(step_ptr, hyper_ptr, skip_ptr, coef_ptr, n, BLOCK: tl.constexpr):
        """Advance the step counts t; coef[e] = (lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), t), computed in float64."""
        e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        at = tl.load(step_ptr + e, mask=e < n, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(at, mask=e < n, other=1.0) + tl.where(tl.load(skip_ptr) != 0.0, 0.0, 1.0)
        tl.store(at, t, mask=e < n)
        lr, b1, b2 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
        t = t.to(tl.float64)
        c1, c2 = 1.0 - tl.exp(t * tl.log(b1)), 1.0 - tl.exp(t * tl.log(b2))
        tl.store(coef_ptr + 3 * e, (lr / c1).to(tl.float32), mask=e < n)
        tl.store(coef_ptr + 3 * e + 1, (1.0 / tl.sqrt(c2)).to(tl.float32), mask=e < n)
        tl.store(coef_ptr + 3 * e + 2, t.to(tl.float32), mask=e < n)

    @triton.jit
    def _finish_kernel(
        v_ptr, line_ptr, sum_ptr, count_ptr, hyper_ptr, skip_ptr, clip_ptr, coef_ptr, inv_ptr, BLOCK: tl.constexpr
    ):
        """Move the second moments of BLOCK sums; inv takes what multiplies m: lr / bc1 / (sqrt(v / bc2) + eps)."""
        if tl.load(skip_ptr) != 0.0:
            return
        line = line_ptr + 6 * tl.program_id(0)
        entry, j = tl.load(line), tl.load(line + 1) + tl.arange(0, BLOCK)
        width, out = tl.load(line + 2), tl.load(line + 5)
        b2, eps = tl.load(hyper_ptr + 2).to(tl.float32), tl.load(hyper_ptr + 3).to(tl.float32)
        one_b2, clip = (1.0 - tl.load(hyper_ptr + 2)).to(tl.float32), tl.load(clip_ptr)
        v_at = _at(v_ptr, entry, tl.float32, False) + j
        q = tl.load(sum_ptr + out + j, mask=j < width, other=0.0) * clip * clip / tl.load(count_ptr + entry)
        v = b2 * tl.load(v_at, mask=j < width, other=0.0) + one_b2 * q
        tl.store(v_at, v, mask=j < width)
        step, root = tl.load(coef_ptr + 3 * entry), tl.load(coef_ptr + 3 * entry + 1)
        tl.store(inv_ptr + out + j, step / (tl.sqrt(v) * root + eps), mask=j < width)

    @triton.jit
    def _move(
        p_at, m_at, g, inv, inside, b1, one_b1, decay, key, where,
        P: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
    ):  # fmt: skip
        """m and p of one tile. inv multiplies m; where: the global positions of the entries, for the random bits."""
        m = b1 * tl.load(m_at, mask=inside, other=0.0).to(tl.float32) + one_b1 * g
        tl.store(m_at, m.to(M), mask=inside)
        p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32) * decay - m * inv
        if ROUND:
            tl.store(p_at, _stochastic(p, _mix(where * -7046029254386353131 + key)), mask=inside)
        else:
            tl.store(p_at, p.to(P), mask=inside)

    @triton.jit
    def _update_kernel(
        p_ptr, m_ptr, v_ptr, g_ptr, tile_ptr, size_ptr, count_ptr, decay_ptr, base_ptr, key_ptr,
        hyper_ptr, skip_ptr, clip_ptr, coef_ptr, inv_ptr,
        P: tl.constexpr, M: tl.constexpr, G: tl.constexpr, MODE: tl.constexpr, ROUND: tl.constexpr,
        ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """One tile of the update: ROW 0, COL 1, FULL 2, SCALAR 3. A ROW tile walks its rows twice, then from cache."""
        if tl.load(skip_ptr) != 0.0:
            return
        pid = tl.program_id(0)
        entry = tl.load(tile_ptr + 4 * pid)
        i = tl.load(tile_ptr + 4 * pid + 1) + tl.arange(0, BM)
        left, slot = tl.load(tile_ptr + 4 * pid + 2), tl.load(tile_ptr + 4 * pid + 3)
        rows, cols = tl.load(size_ptr + 2 * entry), tl.load(size_ptr + 2 * entry + 1)
        if ALIGNED:
            cols = tl.multiple_of(cols, 16)
        lr, wd, clip = tl.load(hyper_ptr), tl.load(hyper_ptr + 4), tl.load(clip_ptr)
        b1, one_b1 = tl.load(hyper_ptr + 1).to(tl.float32), (1.0 - tl.load(hyper_ptr + 1)).to(tl.float32)
        b2, one_b2 = tl.load(hyper_ptr + 2).to(tl.float32), (1.0 - tl.load(hyper_ptr + 2)).to(tl.float32)
        eps, sign = tl.load(hyper_ptr + 3).to(tl.float32), tl.load(hyper_ptr + 5).to(tl.float32)
        decay = (1.0 - lr * wd * tl.load(decay_ptr + entry)).to(tl.float32)
        step, root = tl.load(coef_ptr + 3 * entry), tl.load(coef_ptr + 3 * entry + 1)
        base, t = tl.load(base_ptr + entry), tl.load(coef_ptr + 3 * entry + 2).to(tl.int64)
        key = _mix(tl.load(key_ptr + entry) + t * -3335678366873096957)  # 0xD1B54A32D192ED03
        p_at, m_at = _at(p_ptr, entry, P, ALIGNED), _at(m_ptr, entry, M, ALIGNED)
        g_at, v_at = _at(g_ptr, entry, G, ALIGNED), _at(v_ptr, entry, tl.float32, False)
        if MODE == 0:
            q = tl.zeros([BM, BN], tl.float32)
            for start in range(0, cols, BN):
                j = start + tl.arange(0, BN)
                inside = (i < rows)[:, None] & (j < cols)[None, :]
                g = tl.load(g_at + i[:, None] * cols + j[None, :], mask=inside, other=0.0).to(tl.float32)
                q += g * g
            mean = tl.sum(q, axis=1) * clip * clip / tl.load(count_ptr + entry)  # (BM,)
            v = b2 * tl.load(v_at + i, mask=i < rows, other=0.0) + one_b2 * mean
            tl.store(v_at + i, v, mask=i < rows)
            inv = (step / (tl.sqrt(v) * root + eps))[:, None]  # (BM, 1)
            for start in range(0, cols, BN):
                j = start + tl.arange(0, BN)
                inside = (i < rows)[:, None] & (j < cols)[None, :]
                at = i[:, None] * cols + j[None, :]
                g = tl.load(g_at + at, mask=inside, other=0.0).to(tl.float32) * clip * sign
                _move(p_at + at, m_at + at, g, inv, inside, b1, one_b1, decay, key, base + at, P, M, ROUND)
        else:
            j = left + tl.arange(0, BN)
            inside = (i < rows)[:, None] & (j < cols)[None, :]
            at = i[:, None] * cols + j[None, :]
            g = tl.load(g_at + at, mask=inside, other=0.0).to(tl.float32) * clip * sign
            if MODE == 1:
                inv = tl.load(inv_ptr + slot + j, mask=j < cols, other=0.0)[None, :]  # (1, BN)
            elif MODE == 3:
                inv = tl.load(inv_ptr + slot)
            else:
                v = b2 * tl.load(v_at + at, mask=inside, other=0.0) + one_b2 * g * g
                tl.store(v_at + at, v, mask=inside)
                inv = step / (tl.sqrt(v) * root + eps)
            _move(p_at + at, m_at + at, g, inv, inside, b1, one_b1, decay, key, base + at, P, M, ROUND)


@dataclass
class Entry:
    """One matrix: p, m (rows x cols elements, contiguous) and v on one device, with step a 0-d float32 beside them."""

    p: Tensor
    m: Tensor
    v: Tensor  # float32: rows, cols, rows * cols or 1 numbers, by mode
    step: Tensor
    rows: int
    cols: int
    mode: int
    count: float  # numbers averaged in one second moment, over all ranks
    decay: bool
    base: int = 0  # position of its first element in the whole tensor, for the random bits
    advances: bool = True  # False for the further blocks of a tensor: its step count moves once


def _table(rows: list, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A table on the device, sent without waiting for it."""
    table = torch.tensor(rows, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


class MultiTensor:
    """The step over `entries`, which share dtypes, device and hyperparameters.

    sums(grads, norm) gives float32 sums of squares for the COL and SCALAR entries, for the caller to add over ranks;
    with norm also the squared norm and the number of non-finite gradients. apply(...) moves everything.
    ValueError: an entry is not contiguous, not float32/bfloat16/float16, or entries differ in dtype.
    """

    def __init__(self, entries: list[Entry], g_dtype: torch.dtype):
        first = entries[0]
        self.entries, self.device, self.addresses = entries, first.p.device, []
        kinds = {(e.p.dtype, e.m.dtype, e.v.dtype) for e in entries}
        whole = all(t.is_contiguous() for e in entries for t in (e.p, e.m, e.v))
        if len(kinds) > 1 or not whole or not {first.p.dtype, first.m.dtype, g_dtype} <= set(KINDS):
            raise ValueError(
                f"the Triton step needs contiguous tensors of one dtype among float32, bfloat16, float16; got "
                f"{kinds}, contiguous {whole}. Pass fused=False."
            )
        if first.v.dtype != torch.float32:
            raise ValueError(f"the Triton step keeps second moments in float32, got {first.v.dtype}. Pass fused=False.")
        self.kinds = {"P": KINDS[first.p.dtype], "M": KINDS[first.m.dtype]}
        self.G = KINDS[g_dtype]
        self._lay_out()

    def _lay_out(self) -> None:
        entries, dev = self.entries, self.device
        sizes = [(1, e.rows * e.cols) if e.mode in (FULL, SCALAR) else (e.rows, e.cols) for e in entries]
        self.aligned = all(t.data_ptr() % 16 == 0 for e in entries for t in (e.p, e.m)) and all(
            c % 16 == 0 for _, c in sizes
        )
        address = lambda get: _table([get(e).data_ptr() for e in entries], dev)
        self.p, self.m, self.v = (address(get) for get in (lambda e: e.p, lambda e: e.m, lambda e: e.v))
        self.step = _table([e.step.data_ptr() for e in entries if e.advances], dev)
        owner, n = [], -1  # which step count an entry follows
        for e in entries:
            n += e.advances
            owner.append(n)
        self.owner = _table(owner, dev)
        self.size = _table(sizes, dev)
        self.count = _table([float(e.count) for e in entries], dev, torch.float32)
        self.decay = _table([float(e.decay) for e in entries], dev, torch.float64)
        self.base = _table([e.base for e in entries], dev)
        lines, update, sums, slot, self.partials = [], {}, {}, 0, 0
        for k, (e, (rows, cols)) in enumerate(zip(entries, sizes, strict=True)):
            bm, bn = SHAPE[e.mode]
            walk = [(k, i, 0, 0) for i in range(0, rows, bm)] if e.mode == ROW else [
                (k, i, j, slot) for i in range(0, rows, bm) for j in range(0, cols, bn)
            ]  # fmt: skip
            update.setdefault(e.mode, []).extend(walk)
            tops, lefts = range(0, rows, SPLIT), range(0, cols, SUM[1])
            width, splits = (cols, len(tops)) if e.mode == COL else (1, len(tops) * len(lefts))
            by_row, by_col = (width, 0) if e.mode == COL else (len(lefts), 1)  # places of the partial sums
            sums.setdefault(e.mode, []).extend(
                (k, i, j, self.partials + s * by_row + c * by_col)
                for s, i in enumerate(tops)
                for c, j in enumerate(lefts)
            )
            if e.mode in (COL, SCALAR):
                lines += [(k, j, width, splits, self.partials, slot) for j in range(0, width, LINE)]
                self.partials += width * splits
                slot += width
        self.slots, self.lines = slot, _table(lines, dev) if lines else None
        self.update = {mode: _table(t, dev) for mode, t in update.items() if t}
        self.tiles = {mode: _table(t, dev) for mode, t in sums.items() if t}
        new = lambda n: torch.empty(max(1, n), device=dev, dtype=torch.float32)
        self.partial, self.sum, self.inv = new(self.partials), new(self.slots), new(self.slots)
        self.coef = new(3 * len(self.step))

    def _gradients(self, grads: list[Tensor]) -> tuple[Tensor, bool]:
        """The table of gradient addresses, sent again only when one has changed."""
        addresses = [g.data_ptr() for g in grads]
        if addresses != self.addresses:
            self.addresses, self.g = addresses, _table(addresses, self.device)
        return self.g, self.aligned and all(a % 16 == 0 for a in addresses)

    def sums(self, grads: list[Tensor], norm: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(sums (slots,), squared norm, number of Inf and NaN); the last two None without `norm`."""
        g, aligned = self._gradients(grads)
        norms, bads = [torch.zeros(1, device=self.device)], [torch.zeros(1, device=self.device)]
        for mode, tiles in self.tiles.items():
            if not norm and mode in (ROW, FULL):
                continue
            n = len(tiles)
            norms.append(torch.empty(n, device=self.device))
            bads.append(torch.empty(n, device=self.device))
            _sum_kernel[(n,)](
                g, tiles, self.size, self.partial, norms[-1], bads[-1],
                G=self.G, MODE=mode, NORM=norm, ALIGNED=aligned, SPLIT=SPLIT, BM=SUM[0], BN=SUM[1],
            )  # fmt: skip
        if self.lines is not None:
            _reduce_kernel[(len(self.lines),)](self.partial, self.lines, self.sum, BLOCK=LINE)
        return self.sum[: self.slots], *((torch.cat(x).sum() if norm else None) for x in (norms, bads))

    def apply(self, grads: list[Tensor], sums: Tensor, hyper: Tensor, skip: Tensor, clip: Tensor, keys: Tensor | None):
        """hyper: float64 (lr, beta1, beta2, eps, weight decay, sign); skip, clip: float32 scalars on the device.

        keys: int64 per entry for stochastic rounding, or None to round to nearest.
        """
        g, aligned = self._gradients(grads)
        n = len(self.step)
        _advance_kernel[(triton.cdiv(n, LINE),)](self.step, hyper, skip, self.coef, n, BLOCK=LINE)
        coef = self.coef.view(-1, 3)[self.owner].contiguous()  # (entries, 3)
        if self.lines is not None:
            _finish_kernel[(len(self.lines),)](
                self.v, self.lines, sums.contiguous(), self.count, hyper, skip, clip, coef, self.inv, BLOCK=LINE
            )
        for mode, tiles in self.update.items():
            bm, bn = SHAPE[mode]
            _update_kernel[(len(tiles),)](
                self.p, self.m, self.v, g, tiles, self.size, self.count, self.decay, self.base,
                self.base if keys is None else keys, hyper, skip, clip, coef, self.inv,
                **self.kinds, G=self.G, MODE=mode, ROUND=keys is not None, ALIGNED=aligned, BM=bm, BN=bn, num_warps=8,
            )  # fmt: skip
