"""Triton: drop targets by a hash of the tokens before them, and cross-entropy that never reads a dropped row's logits.

The mask and the loss are two launches with no host synchronisation between them. Row offsets are int64, because
rows x vocabulary passes 2^31. The torch twins are goldfish_mask and goldfish_loss in goldfish.py.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel
    triton = None

TABLE = 1_000_003  # entries of the table of uniforms


if triton is not None:

    @triton.jit
    def _shift(z, s: tl.constexpr):
        """Logical right shift of an int64."""
        return (z >> s) & ((1 << (64 - s)) - 1)

    @triton.jit
    def _mask_kernel(
        target_ptr, table_ptr, drop_ptr, n, L, k, ignore, seed,
        H: tl.constexpr, MIX: tl.constexpr, CONTEXT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program decides BLOCK consecutive targets of the flattened (B, L); a window never leaves its row."""
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        p = i % L
        acc = tl.full([BLOCK], 0 if MIX else 1, tl.int64)
        power = tl.full([BLOCK], 1, tl.int64)
        for back in tl.static_range(H):
            here = inside & (p >= back + CONTEXT)
            token = tl.load(target_ptr + i - back - CONTEXT, mask=here, other=0).to(tl.int64)
            if MIX:
                power *= -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
                acc += (token + 1) * power
            else:
                acc *= token
        if MIX:
            z = acc ^ seed
            z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
            z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
            z = z ^ _shift(z, 31)
            u = _shift(z, 40)
        else:
            key = acc % SIZE
            key = tl.where(key < 0, key + SIZE, key)  # Triton's % has the sign of the dividend
            u = (tl.load(table_ptr + key, mask=inside, other=0.0) * 16777216.0).to(tl.int64)  # exact
        y = tl.load(target_ptr + i, mask=inside, other=0).to(tl.int64)
        drop = (u * k < 16777216) & (p >= H - 1 + CONTEXT) & (y != ignore)  # u counts in units of 2^-24
        tl.store(drop_ptr + i, drop.to(tl.int8), mask=inside)

    @triton.jit
    def _loss_kernel(logits_ptr, stride, target_ptr, drop_ptr, loss_ptr, lse_ptr, V, ignore, BLOCK: tl.constexpr):
        """One program per row: log-sum-exp and loss in fp32, one read of the row; a dropped row is not read at all."""
        row = tl.program_id(0).to(tl.int64)
        y = tl.load(target_ptr + row)
        if (tl.load(drop_ptr + row) != 0) | (y == ignore):
            tl.store(loss_ptr + row, 0.0)
            return
        m = float("-inf")  # running maximum
        s = 0.0  # running sum of exp(x - m)
        for start in range(0, V, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * stride + j, mask=j < V, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, axis=0))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no exp(-inf + inf) before the first finite logit
            s = s * tl.exp(m - base) + tl.sum(tl.exp(x - base), axis=0)
            m = m_new
        lse = tl.log(s) + tl.where(m == float("-inf"), 0.0, m)
        inside = (y >= 0) & (y < V)
        x_y = tl.load(logits_ptr + row * stride + y, mask=inside, other=0.0).to(tl.float32)
        tl.store(loss_ptr + row, tl.where(inside, lse - x_y, float("nan")))  # a bad target shows as NaN
        tl.store(lse_ptr + row, lse)

    @triton.jit
    def _grad_kernel(logits_ptr, stride, target_ptr, drop_ptr, lse_ptr, scale_ptr, V, ignore, BLOCK: tl.constexpr):
        """One program per row: the logits become (softmax - onehot) * scale, zero where there is no loss."""
        row = tl.program_id(0).to(tl.int64)
        y = tl.load(target_ptr + row)
        out_ptr = logits_ptr + row * stride
        if (tl.load(drop_ptr + row) != 0) | (y == ignore):
            for start in range(0, V, BLOCK):
                j = start + tl.arange(0, BLOCK)
                tl.store(out_ptr + j, tl.zeros([BLOCK], tl.float32), mask=j < V)
            return
        lse, scale = tl.load(lse_ptr + row), tl.load(scale_ptr)
        for start in range(0, V, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = tl.load(out_ptr + j, mask=j < V, other=float("-inf")).to(tl.float32)
            g = (tl.exp(x - lse) - tl.where(j == y, 1.0, 0.0)) * scale  # in fp32: 1 - p cancels in bf16
            tl.store(out_ptr + j, g, mask=j < V)


def available() -> bool:
    """True when Triton is installed."""
    return triton is not None


def window_mask_triton(
    targets: Tensor, table: Tensor, k: int, h: int, strategy: str, context: bool, ignore_index: int, seed: int = 0
) -> Tensor:
    """Drop decisions of targets (B, L), int64, contiguous -> bool (B, L). table: float32 multiples of 2^-24.

    ValueError: another dtype or layout, or a strategy other than hash and mix.
    """
    if targets.dtype != torch.int64 or not targets.is_contiguous() or strategy not in ("hash", "mix"):
        raise ValueError(
            f"window_mask_triton needs contiguous int64 targets and strategy hash or mix, got {targets.dtype}, "
            f"contiguous {targets.is_contiguous()}, {strategy!r}. Use goldfish_mask."
        )
    drop = torch.empty(targets.shape, dtype=torch.int8, device=targets.device)
    n = targets.numel()
    seed = (seed + 2**63) % 2**64 - 2**63  # as int64
    _mask_kernel[(triton.cdiv(n, 512),)](
        targets, table, drop, n, targets.shape[-1], k, ignore_index, seed,
        H=h, MIX=strategy == "mix", CONTEXT=int(context), SIZE=TABLE, BLOCK=512,
    )  # fmt: skip
    return drop.bool()


def _block(V: int) -> int:
    return min(triton.next_power_of_2(V), 8192)


def rows_nll_triton(logits: Tensor, targets: Tensor, drop: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Per-row loss (N,) and log-sum-exp (N,), fp32, of logits (N, V) with unit column stride. Dropped rows: loss 0."""
    loss = torch.empty(logits.shape[0], device=logits.device, dtype=torch.float32)
    lse = torch.zeros_like(loss)
    _loss_kernel[(logits.shape[0],)](
        logits, logits.stride(0), targets, drop, loss, lse, logits.shape[1], ignore_index,
        BLOCK=_block(logits.shape[1]), num_warps=8,
    )  # fmt: skip
    return loss, lse


def rows_grad_triton_(
    logits: Tensor, targets: Tensor, drop: Tensor, lse: Tensor, scale: Tensor, ignore_index: int
) -> Tensor:
    """Overwrite logits (N, V) with their gradient, scale being the 0-d fp32 factor of every kept row."""
    _grad_kernel[(logits.shape[0],)](
        logits, logits.stride(0), targets, drop, lse, scale, logits.shape[1], ignore_index,
        BLOCK=_block(logits.shape[1]), num_warps=8,
    )  # fmt: skip
    torch.autograd.graph.increment_version(logits)  # so autograd notices if another backward still needs the logits
    return logits


class MaskedCrossEntropy(torch.autograd.Function):
    """Sum of the losses of the kept rows. Backward overwrites the logits with their gradient: no second (N, V) tensor.

    Going back twice through the same graph raises RuntimeError: autograd sees that the logits changed.
    """

    @staticmethod
    def forward(ctx, logits, targets, drop, ignore_index):
        loss, lse = rows_nll_triton(logits, targets, drop, ignore_index)
        ctx.save_for_backward(logits, targets, drop, lse)
        ctx.ignore_index = ignore_index
        return loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, targets, drop, lse = ctx.saved_tensors
        return rows_grad_triton_(logits, targets, drop, lse, grad.float(), ctx.ignore_index), None, None, None


def nll_grad_triton_(logits: Tensor, targets: Tensor) -> Tensor:
    """The chunk step of the linear loss: returns the summed loss of all rows; logits become softmax - onehot."""
    drop = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    loss, lse = rows_nll_triton(logits, targets, drop, -(2**62))
    rows_grad_triton_(logits, targets, drop, lse, torch.ones((), device=logits.device), -(2**62))
    return loss.sum()
