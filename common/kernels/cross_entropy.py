"""Triton: cross-entropy of the rows that are kept. The logits of a dropped row are never read.

One launch forward and one backward, each of which reads a kept row once, without waiting for the host. Row offsets are
int64, because rows x vocabulary passes 2^31. The torch twin is F.cross_entropy(logits[keep], targets[keep]).
"""

import torch
from torch import Tensor

from common.kernels import need, use_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel
    triton = None


if triton is not None:
    LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a running maximum to start from: exp(-inf - LOWEST) is 0

    @triton.jit
    def _loss_kernel(logits_ptr, stride, target_ptr, keep_ptr, loss_ptr, lse_ptr, V, BLOCK: tl.constexpr):
        """One program per row: loss and log-sum-exp in fp32; NaN in both for a target outside the vocabulary."""
        row = tl.program_id(0).to(tl.int64)
        if tl.load(keep_ptr + row) == 0:
            tl.store(loss_ptr + row, 0.0)
            return
        logits_ptr += row * stride
        m = tl.full([], LOWEST, tl.float32)  # running maximum
        s = 0.0  # running sum of exp(x - m)
        for start in range(0, V, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + j, mask=j < V, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, axis=0))
            s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), axis=0)
            m = m_new
        y = tl.load(target_ptr + row)
        inside = (y >= 0) & (y < V)
        x_y = tl.load(logits_ptr + y, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(loss_ptr + row, tl.log(s) - (x_y - m))
        tl.store(lse_ptr + row, tl.where(inside, tl.log(s) + m, float("nan")))

    @triton.jit
    def _grad_kernel(logits_ptr, stride, target_ptr, keep_ptr, lse_ptr, scale_ptr, grad_ptr, V, BLOCK: tl.constexpr):
        """One program per row: grad = (softmax - onehot) scale, zero where the row is dropped."""
        row = tl.program_id(0).to(tl.int64)
        grad_ptr += row * V
        if tl.load(keep_ptr + row) == 0:
            for start in range(0, V, BLOCK):
                j = start + tl.arange(0, BLOCK)
                tl.store(grad_ptr + j, tl.zeros([BLOCK], tl.float32), mask=j < V)
            return
        y, lse, scale = tl.load(target_ptr + row), tl.load(lse_ptr + row), tl.load(scale_ptr)
        logits_ptr += row * stride
        for start in range(0, V, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + j, mask=j < V, other=float("-inf")).to(tl.float32)
            g = (tl.exp(x - lse) - tl.where(j == y, 1.0, 0.0)) * scale  # in fp32: 1 - p cancels in bf16
            tl.store(grad_ptr + j, g, mask=j < V)


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, keep):
        N, V = logits.shape
        loss = torch.empty(N, device=logits.device, dtype=torch.float32)
        lse = torch.empty_like(loss)
        ctx.how = {"BLOCK": min(triton.next_power_of_2(V), 8192), "num_warps": 8}
        _loss_kernel[(N,)](logits, logits.stride(0), targets, keep, loss, lse, V, **ctx.how)
        ctx.save_for_backward(logits, targets, keep, lse)
        return loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        logits, targets, keep, lse = ctx.saved_tensors
        grad = torch.empty(logits.shape, device=logits.device, dtype=logits.dtype)
        _grad_kernel[(len(grad),)](logits, logits.stride(0), targets, keep, lse, scale, grad, grad.shape[1], **ctx.how)
        return grad, None, None


def masked_cross_entropy(logits: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """Summed cross-entropy of the kept rows: logits (N, V), targets (N,) int64, keep (N,) bool -> 0-d fp32.

    The gradient is a new tensor of the logits' dtype, zero in dropped rows. A target outside [0, V) in a kept row makes
    the loss and that row's gradient NaN. BadInput: float64, columns that are not adjacent, shapes, V >= 2^31, no GPU.
    """
    need(
        use_kernels(logits.device), f"the kernel needs a GPU and the package triton; the logits are on {logits.device}"
    )
    need(
        logits.dtype in (torch.float32, torch.bfloat16, torch.float16), f"logits are {logits.dtype}, not below float64"
    )
    need(logits.ndim == 2 and 1 <= logits.shape[1] < 2**31, f"logits must be (N, V), V < 2^31: {tuple(logits.shape)}")
    need(logits.stride(1) == 1, f"logits have stride {logits.stride(1)} in their last dimension, the kernel needs 1")
    for name, x, dtype in (("targets", targets, torch.int64), ("keep", keep, torch.bool)):
        fits = x.shape == logits.shape[:1] and x.dtype == dtype and x.device == logits.device
        need(
            fits,
            f"{name} must be ({len(logits)},) {dtype} on {logits.device}, got {tuple(x.shape)} {x.dtype} on {x.device}",
        )
    return _MaskedCrossEntropy.apply(logits, targets.contiguous(), keep.contiguous())
