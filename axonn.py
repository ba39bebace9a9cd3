"""AxoNN: train one model on a 4D grid of processes exactly as one process would, and predict which grid is fastest.

Paper    Singh et al., "Democratizing AI: Open-source Scalable LLM Training on GPU-based Supercomputers", SC'24,
         arXiv:2502.08145; the model of communication from "A 4D Hybrid Algorithm ...", arXiv:2305.13525.
Idea     Three axes of ranks, X, Y and Z, split the three loops of every matrix product, the fourth is data parallelism.
         Every second layer swaps X and Y, so its input lies as it is needed. Megatron, ZeRO-3 and DDP are corners.
         Communication hides behind products, and a formula ranks the grids, so that only the first few need trying.
Here     The claim we check: one process's losses and norms on every grid, the formula's bytes, communication behind
         products, the fastest grid among the first three; the goldfish loss, not less training, stops recitation.
Differs  - Weights are gathered again in backward (the paper keeps them). Norms are of the whole width. Z splits rows.
         - q, k, v are one product of whole heads. Positions are rotary. What the grid does not divide is refused.
         - Parameters are fp32, products cast them and are not tuned. Recitation is a toy on random documents.

    python axonn.py                                                 # laptop: starts 8 ranks, table, picture, claim
    python axonn.py --quick                                         # 4 ranks, shorter, no verdict
    torchrun --nproc-per-node 4 axonn.py train --grid 2 1 2 1 --device cpu    # --resume goes on, on any grid
    torchrun --nproc-per-node 3 axonn.py train --model smollm2 --grid 3 1 1 1 --batch 2 --steps 3 --lr 1e-5
    python -c "from axonn import *; print(rank_configs(MODELS['20B'], 64, 2048, MACHINES['frontier'], min_tp=16))"
    torchrun --nproc-per-node 2 axonn.py bench --device cpu         # all grids, FSDP2 and DDP on the same block
    python -m torch.distributed.checkpoint.format_utils dcp_to_torch results/axonn/checkpoint whole.pt    # one file

Expect   "11 of 11 grids equal one process within 1e-12" on CPU with seed 0.
Writes   results/axonn/: metrics.jsonl, claim.json, axonn.png; checkpoint/ (train), bench.json (bench).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import zlib
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from common import cli, cluster, loop, report
from common.cli import BadInput, opt
from common.text import Tokenizer, checksum, corpus
from common.weights import open_weights, rope_frequencies, rotate

# %% the method: O = I W^T on a grid of ranks, in three operators
#
# I (m, k)  a layer's input, m tokens     W (n, k)  its weight, as PyTorch stores it     O (m, n)  its output
# Gx Gy Gz Gd  the grid's sizes           Z splits m, Y splits k, X splits n             m/Gz, k/Gy ...  a rank's part
# Z splits a block's rows of W as well. The fourth axis, d, gives copies of all this other tokens; finish() sums over d.
# Every second layer exchanges X and Y (down "x", across "y"), so that it takes I as the layer before it left O.


class Gather(torch.autograd.Function):
    """A weight's rows from all ranks along Z. In backward the gradients are summed, and each rank keeps its rows."""

    @staticmethod
    def forward(ctx, w, grid):
        ctx.w, ctx.grid = w, grid
        return grid.fetch(w, w.dtype)  # all-gather

    @staticmethod
    def backward(ctx, dW):
        return ctx.grid.scatter(ctx.w, dW.contiguous()), None  # reduce-scatter


class Sum(torch.autograd.Function):
    """The sum over the ranks along an axis. All of them go on alike, so its gradient is the same on all."""

    @staticmethod
    def forward(ctx, x, grid, axis):
        return grid.all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


class Copy(torch.autograd.Function):
    """x, which all ranks along an axis hold alike and use each in its own way. So their gradients are summed."""

    @staticmethod
    def forward(ctx, x, grid, axis):
        ctx.grid, ctx.axis = grid, axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.grid.all_reduce(g.clone(memory_format=torch.contiguous_format), ctx.axis), None, None


def linear3d(I: Tensor, w: Tensor, grid: Grid, down: str = "y", across: str = "x") -> Tensor:
    """I (m/Gz, k/Gy), w: this rank's rows of its block of W, (n/Gx/Gz, k/Gy) -> O (m/Gz, n/Gx).
    down: the axis that splits k, over which O is summed. across: the axis whose ranks hold I alike."""
    W = Gather.apply(w, grid)  # (n/Gx, k/Gy)
    return Sum.apply(Copy.apply(I, grid, across) @ W.T, grid, down)


# %% the grid: which rank is where, and its collectives

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renames them
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
DONE = lambda: None  # nothing to wait for
counting = lambda: [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, CommLog)]
NEW_GROUP = functools.cache(lambda world, ranks, spare: dist.new_group(ranks) if len(ranks) > 1 else None)


class Grid:
    """Rank = x + Gx (y + Gy (z + Gz d)). n, at: {axis: size}, {axis: this rank's place}. gdata 0: all ranks. A smaller
    grid than the job is laid out again and again, as independent copies. Making one is collective."""

    def __init__(self, gx: int = 1, gy: int = 1, gz: int = 1, gdata: int = 1):
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.dims = (gx, gy, gz, gdata or max(1, world // (gx * gy * gz)))
        self.size = math.prod(self.dims)
        if world % self.size:
            raise BadInput(f"grid {show(self.dims)} needs {self.size} ranks, but world size is {world}. "
                           f"Change --grid, or type torchrun --nproc-per-node {self.size} axonn.py ...")  # fmt: skip
        if not dist.is_initialized():
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        on_gpu, me = dist.get_backend() == "nccl", dist.get_rank()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        ranks, self.groups = torch.arange(world, device="cpu").view(-1, *self.dims[::-1]), {}
        for name, i in (("d", 1), ("z", 2), ("y", 3), ("x", 4), ("z2", 2)):  # z2: a prefetch must not queue in z
            rows = ranks.movedim(i, 4).reshape(-1, ranks.shape[i]).tolist()
            groups = [NEW_GROUP(dist.group.WORLD, tuple(row), name == "z2") for row in rows]  # all ranks make all
            self.groups[name] = next(group for group, row in zip(groups, rows, strict=True) if me in row)
        copy, *place = (ranks == me).nonzero()[0].tolist()
        self.n, self.at = dict(zip("xyzd", self.dims, strict=True)), dict(zip("dzyx", place, strict=True))
        self.data_shard, self.num_data_shards = place[0] * gz + place[1], gz * self.dims[3]
        self.ranks, self.mesh = ranks[copy].permute(0, 3, 2, 1), None  # (d, x, y, z)
        self.hide, self.pending, self.order, self.step, self.ahead = frozenset(), [], [], 0, {}

    def __deepcopy__(self, memo):
        return self  # a copied model lives on the same ranks

    def start(self, kind: str, x: Tensor, axis: str, op=dist.ReduceOp.SUM, spare: bool = False) -> tuple:
        """Begin a collective on contiguous x along an axis -> (its result, wait: to be called once before it is read).
        all_reduce works in place."""
        n, to = self.n[axis], {"group": self.groups["z2" if spare else axis], "async_op": True}
        if n == 1:
            return x, DONE
        logs = [(log, log.add(kind, axis, n, x)) for log in counting()]
        if kind == "all_reduce":
            out, work = x, dist.all_reduce(x, op, **to)
        else:
            rows, call = (n * len(x), ALL_GATHER) if kind == "all_gather" else (len(x) // n, REDUCE_SCATTER)
            out = x.new_empty(rows, *x.shape[1:])
            work = call(out, x, **to)

        def wait() -> None:
            work.wait()
            for log, before in logs:
                log.hidden[kind, axis] += log.products > before

        return out, wait

    def all_reduce(self, x: Tensor, axis: str, op=dist.ReduceOp.SUM) -> Tensor:
        self.start("all_reduce", x, axis, op)[1]()
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over the shards of the batch (Z and data), as a new tensor."""
        return self.all_reduce(self.all_reduce(x.detach().clone(), "z"), "d")

    def mine(self, rows: Tensor) -> Tensor:
        """This data shard's rows of a whole batch."""
        return rows.chunk(self.num_data_shards)[self.data_shard].to(self.device)

    def fetch(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """w's block in `dtype`, gathered over Z. In overlap() begin to gather what followed the last time (OAG)."""
        if self.n["z"] == 1:
            return w.detach().to(dtype)
        gather = lambda key, spare: self.start("all_gather", key[0].detach().to(key[1]), "z", spare=spare)
        W, wait = self.ahead.pop((w, dtype), None) or gather((w, dtype), False)
        if "oag" in self.hide:
            self.order[self.step : self.step + 1] = [(w, dtype)]
            self.step += 1
            for after in self.order[self.step : self.step + 1]:
                self.ahead[after] = self.ahead.get(after) or gather(after, True)
        wait()
        return W

    def scatter(self, w: Tensor, dW: Tensor) -> Tensor | None:
        """This rank's rows of dW summed over Z: w's gradient. In overlap() it is added when backward ends (ORS)."""
        dw, wait = self.start("reduce_scatter", dW, "z")
        if "ors" in self.hide and self.n["z"] > 1:
            if not self.pending:
                torch.autograd.Variable._execution_engine.queue_callback(self.land)
            return self.pending.append((w, dw, wait))
        wait()
        return dw.to(w.dtype)

    def land(self) -> None:
        """Wait for the reduce-scatters of one backward pass, and add them to the gradients."""
        for w, dw, wait in self.pending:
            wait()
            w.grad = dw.to(w.dtype) if w.grad is None else w.grad.add_(dw.to(w.dtype))
        self.pending = []


def grids(size: int) -> list[tuple[int, int, int, int]]:
    """All (Gx, Gy, Gz, Gdata) of `size` ranks."""
    parts = [n for n in range(1, size + 1) if size % n == 0]
    return [g for g in itertools.product(parts, repeat=4) if math.prod(g) == size]


show = lambda dims: "x".join(map(str, dims))

# %% which rows and columns of a tensor a rank stores

Part = namedtuple("Part", "name box axes")  # slices `box` of the tensor `name`; axes: what splits rows, columns


class Stored(nn.Module):
    """A module whose parameters hold parts of whole tensors: self.parts, {parameter: [Part, ...] one below another}."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid, self.parts = grid, {}

    def store(self, name: str, shapes: dict, *axes: str, value=0.0, std=0.0, seed=0, dtype=None) -> None:
        """Make a parameter of tensors {name: shape}, split over these axes, that starts at a value or (std) normal."""
        self.parts[name], blocks = [], []
        for tensor, shape in shapes.items():
            box = tuple(self.cut(tensor, n, split) for n, split in zip(shape, axes, strict=True))
            self.parts[name].append(Part(tensor, box, axes))
            draw = cluster.generator(seed, zlib.crc32(tensor.encode()))  # whole, so that every grid starts alike
            blocks.append((torch.randn(shape, generator=draw) * std if std else torch.full(shape, value))[box])
        made = torch.cat(blocks).to(self.grid.device, dtype or torch.get_default_dtype())
        setattr(self, name, nn.Parameter(made))

    def cut(self, name: str, n: int, axes: str) -> slice:
        """This rank's slice of n rows or columns that some axes split, the first one outermost."""
        size, place = 1, 0
        for axis in axes:
            size, place = size * self.grid.n[axis], place * self.grid.n[axis] + self.grid.at[axis]
        if n % size:
            raise BadInput(f"{name}: grid {show(self.grid.dims)} does not divide {n} by G{' G'.join(axes)} = {size}")
        return slice(place * n // size, (place + 1) * n // size)


def stored(model: nn.Module) -> dict[nn.Parameter, list[Part]]:
    """{parameter: its parts}; a tied one once."""
    held = [m for m in model.modules() if isinstance(m, Stored)]
    return {getattr(m, name): parts for m in held for name, parts in m.parts.items()}


# %% what makes it fast: the first section's product, with its collectives behind products


class FastLinear(torch.autograd.Function):
    """linear3d, except that W is gathered again in backward, and that overlap() hides what backward communicates."""

    @staticmethod
    def forward(ctx, I, w, layer):
        ctx.save_for_backward(I)
        ctx.w, ctx.layer = w, layer
        O = I @ layer.grid.fetch(w, I.dtype).T  # (m/Gz, n/Gx), partial over Y
        return layer.grid.all_reduce(O, layer.down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dO):
        (I,), w, grid, across, dO = ctx.saved_tensors, ctx.w, ctx.layer.grid, ctx.layer.across, dO.contiguous()
        product = lambda: grid.scatter(w, dO.T @ I) if ctx.needs_input_grad[1] else None
        dw = product() if grid.n[across] == 1 else None  # its reduce-scatter hides behind the next product
        dI, wait = grid.start("all_reduce", dO @ grid.fetch(w, dO.dtype), across)  # (m/Gz, k/Gy), partial over X
        if "oar" not in grid.hide:
            wait()
            wait = DONE
        if grid.n[across] > 1:  # the all-reduce hides behind this product (OAR), the reduce-scatter behind others (ORS)
            dw = product()
        wait()
        return dI, dw, None


class Linear3D(Stored):
    """O = I W^T + b: I (..., k/Gy) -> O (..., n/Gx), tokens split over Z; transposed: X and Y exchanged.
    parts, {name: width}, fuses matrices of one input: a rank has its share of each."""

    def __init__(self, grid: Grid, in_features: int, out_features: int, *, bias=True, transposed=False, name="linear",
                 init_std=0.02, seed=0, dtype=None, parts=None):  # fmt: skip
        super().__init__(grid)
        self.down, self.across = ("x", "y") if transposed else ("y", "x")
        widths, self.bias = parts or {name: out_features}, None
        shapes = {f"{part}.weight": (n, in_features) for part, n in widths.items()}
        self.store("weight", shapes, self.across + "z", self.down, std=init_std, seed=seed, dtype=dtype)
        if bias:
            self.store("bias", {f"{part}.bias": (n,) for part, n in widths.items()}, self.across, dtype=dtype)
        self.rows = [part.box[0].stop - part.box[0].start for part in self.parts["weight"]]

    def forward(self, x: Tensor) -> Tensor:
        y, gz = FastLinear.apply(x.reshape(-1, x.shape[-1]), self.weight, self), self.grid.n["z"]  # (m/Gz, n/Gx)
        if len(self.rows) > 1 and gz > 1:  # every z brought rows of all parts; put each part's together
            y = torch.cat([t.flatten(1) for t in y.unflatten(1, (gz, -1)).split(self.rows, dim=2)], dim=1)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)  # after the sum: every rank along it adds the same bias once
        return y.reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def overlap(model: nn.Module, *, oar: bool = True, ors: bool = True, oag: bool = True) -> Iterator[None]:
    """Around a step: all-reduce dI behind dW's product (oar), reduce-scatter dW behind the rest of backward (ors), and
    gather the next weight behind this product (oag). On exit the gradients are complete."""
    grid = model.grid
    grid.hide = frozenset(name for name, on in (("oar", oar), ("ors", ors), ("oag", oag)) if on)
    try:
        yield
        del grid.order[grid.step :]
    finally:
        for *_, wait in [*grid.pending, *grid.ahead.values()]:
            wait()
        grid.hide, grid.pending, grid.step, grid.ahead = frozenset(), [], 0, {}
    finish(model)


def finish(model: nn.Module) -> None:
    """Complete the gradients after the last backward: sum weights over data, and what Z does not split over Z too.
    Collective; again without a new backward it does nothing. RuntimeError: inside overlap(), or added to after it."""
    grid, todo = model.grid, incomplete(model)
    if grid.hide or any(hasattr(g, "complete") for g in todo):
        raise RuntimeError("gradients are in flight, or were changed after finish(). Leave overlap(), or zero_grad().")
    waits = [grid.start("all_reduce", g, "d")[1] for g, over_z in todo.items() if over_z]
    shared = [g for g, over_z in todo.items() if not over_z]
    if shared and grid.num_data_shards > 1:
        nn.utils.vector_to_parameters(grid.total(nn.utils.parameters_to_vector(shared)), shared)
    for wait in waits:
        wait()
    for g in todo:
        g.complete = g._version


def incomplete(model: nn.Module, refuse: bool = False) -> dict:
    """{gradient that finish() has not seen or that was changed since: True if Z splits it}. refuse: RuntimeError."""
    held = {p.grad: "z" in parts[0].axes[0] for p, parts in stored(model).items() if p.grad is not None}
    found = {g: over_z for g, over_z in held.items() if getattr(g, "complete", None) != g._version}
    if refuse and (found or model.grid.hide):
        raise RuntimeError("gradients are not complete: call finish(model) after backward(), then our clip_grad_norm_")
    return found


# %% embedding, norm and loss, made of the three operators; one step


class Embedding3D(Linear3D):
    """ids (...) -> (..., h/Gy): rows of an output layer's matrix (V over X, h over Y). IndexError: no such id."""

    def __init__(self, grid: Grid, vocab: int, dim: int, *, name: str = "embedding", out_dtype=None, **options):
        super().__init__(grid, dim, vocab, bias=False, name=name, **options)
        self.vocab, self.out_dtype = vocab, out_dtype or self.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        if not ids.is_cuda and ((ids < 0) | (ids >= self.vocab)).any():  # asking a GPU would make the host wait
            raise IndexError(f"token ids {ids.min()} to {ids.max()}; the embedding has 0 to {self.vocab - 1}")
        W = Gather.apply(self.weight, self.grid)  # (V/Gx, h/Gy), wide: 16-bit sums of equal ids would stall
        local = ids - self.grid.at["x"] * len(W)
        mine = (local >= 0) & (local < len(W))  # one rank along X has the row, the others add zero
        rows = F.embedding(torch.where(mine, local, 0), W).to(self.out_dtype)
        return Sum.apply(torch.where(mine[..., None], rows, 0), self.grid, "x")


class LayerNorm3D(Stored):
    """x (..., h/Gy) -> the same: mean and variance of all h features, in fp32 at least, also what backward sums."""

    centre = True

    def __init__(self, grid: Grid, dim: int, eps: float = 1e-5, *, name: str = "norm", dtype=None):
        super().__init__(grid)
        self.dim, self.eps, self.bias = dim, eps, None
        self.store("weight", {f"{name}.weight": (dim,)}, "y", value=1.0, dtype=dtype)
        if self.centre:
            self.store("bias", {f"{name}.bias": (dim,)}, "y", dtype=dtype)

    def mean(self, x: Tensor) -> Tensor:
        """Over all h features, for all ranks along Y: a sum over Y in forward, and another of its gradients."""
        return Copy.apply(Sum.apply(x.sum(dim=-1, keepdim=True), self.grid, "y"), self.grid, "y") / self.dim

    def forward(self, x: Tensor) -> Tensor:
        c = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centre:
            c = c - self.mean(c)
        y = c * (self.mean(c * c) + self.eps).rsqrt() * self.weight  # E[x^2] - E[x]^2 would lose digits
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class RMSNorm3D(LayerNorm3D):
    """As LayerNorm3D, without the mean and the bias."""

    centre = False


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, grid: Grid, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of logits (..., V/Gx) and targets (...), the same on all X, summed over this rank's tokens."""
    logits, v = logits.to(torch.promote_types(logits.dtype, torch.float32)), logits.shape[-1]
    keep, local, V = targets != ignore_index, targets - grid.at["x"] * v, v * grid.n["x"]
    if not targets.is_cuda and (keep & ((targets < 0) | (targets >= V))).any():
        raise IndexError(f"targets {targets.min()} to {targets.max()}; give 0 to {V - 1}, or {ignore_index}")
    mine = keep & (local >= 0) & (local < v)
    top = grid.all_reduce(logits.detach().amax(dim=-1), "x", dist.ReduceOp.MAX)  # (...)
    logits = logits - top[..., None]
    own = logits.gather(-1, torch.where(mine, local, 0)[..., None])[..., 0]
    s, t = Sum.apply(torch.stack([logits.exp().sum(dim=-1), torch.where(mine, own, 0)]), grid, "x")
    return torch.where(keep, s.log() - t, 0).sum()


def backward(model: GPT3D, rows: Tensor, hide: bool, want: Tensor | None = None) -> Tensor:
    """Forward and backward of this data shard's rows (b, T + 1) -> its share of the mean loss. want: other targets."""
    want = rows[:, 1:] if want is None else want
    count = model.grid.total((want != -100).sum()).clamp(min=1)  # ranks may mask differently
    with overlap(model, oar=hide, ors=hide, oag=hide):
        loss = vocab_parallel_cross_entropy(model(rows[:, :-1]), want, model.grid) / count
        loss.backward()
    return loss.detach()


def clip_grad_norm_(model: nn.Module, max_norm: float) -> float:
    """Scale gradients to a global norm of at most max_norm (0: no limit) -> the norm before. Collective."""
    incomplete(model, refuse=True)  # replicas would drift apart
    grid, held = model.grid, {p: parts[0] for p, parts in stored(model).items() if p.grad is not None}
    total = torch.zeros((), device=grid.device)
    for p, part in held.items():
        copies = math.prod(grid.n[axis] for axis in "xyz" if axis not in "".join(part.axes))  # ranks that hold the same
        norm = torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.dtype, torch.float32))
        total = total + norm.square() / copies
    for axis in "xyz":
        grid.all_reduce(total, axis)
    norm = total.sqrt().item()
    for p in held if math.isfinite(norm) and 0 < max_norm < norm + 1e-6 else ():
        p.grad.mul_(max_norm / (norm + 1e-6))
        p.grad.complete = p.grad._version
    return norm


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1, **options) -> torch.optim.AdamW:
    """AdamW on this rank's parts; weight decay for matrices only. Its step refuses gradients that are not complete."""
    trained, decay = [p for p in model.parameters() if p.requires_grad], {1: 0.0, 2: weight_decay}
    groups = [{"params": [p for p in trained if p.ndim == n], "weight_decay": decay[n]} for n in decay]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=trained[0].is_cuda, **options)
    optimizer.register_step_pre_hook(lambda *_: incomplete(model, refuse=True) or None)
    return optimizer


def update(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clip and step -> the norm before. All ranks skip the step together if it is not finite."""
    norm = clip_grad_norm_(model, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# %% which grid is fastest: counting, and the paper's five terms

WIRE = {  # what a ring of n ranks sends per rank for each element that a rank puts in
    "all_reduce": lambda n: Fraction(2 * (n - 1), n),
    "reduce_scatter": lambda n: Fraction(n - 1, n),
    "all_gather": lambda n: Fraction(n - 1),
}


class CommLog(TorchDispatchMode):
    """Counts this rank's collectives by (collective, axis): calls, bytes on the wire, and, without a clock, the hidden
    ones: those with a matrix product between their launch and their wait."""

    def __init__(self):
        super().__init__()
        self.calls, self.hidden, self.bytes, self.products = Counter(), Counter(), Counter(), 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        self.products += fn in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return fn(*args, **(kwargs or {}))

    def add(self, kind: str, axis: str, n: int, x: Tensor) -> int:
        """Count a collective of n ranks that begins -> the products before it."""
        self.calls[kind, axis] += 1
        self.bytes[kind, axis] += WIRE[kind](n) * x.numel() * x.element_size()
        return self.products


class Machine(NamedTuple):
    """What the model of communication knows of a machine."""

    gpus_per_node: int
    inter_bw: float  # GB/s (1e9 bytes) of a node's network
    intra_table: dict  # {(P, G): GB/s} of a ring of G ranks inside a node, each P apart, all sibling rings running
    latency: float = 0.0  # seconds a call

    def bandwidth(self, axis: int, dims: tuple) -> float:
        """Bytes per second of a ring along an axis, 0..3 for x y z data."""
        before, g = math.prod(dims[:axis]), dims[axis]
        if before * g > self.gpus_per_node:  # crosses nodes: the node's rings share its network
            return 1e9 * self.inter_bw / min(self.gpus_per_node, before)
        return 1e9 * self.intra_table[before, g]


MACHINES = {
    "perlmutter": Machine(4, 80, {(1, 2): 76, (1, 4): 225, (2, 2): 76}),
    "frontier": Machine(8, 40, {(1, 2): 129, (1, 4): 52, (1, 8): 135, (2, 2): 50, (2, 4): 72, (4, 2): 36}),
    "laptop": Machine(1, 0.3, {}, 5e-4),  # gloo on two cores, in round numbers
}


def ring_terms(cfg: GPTConfig, dims: tuple, m: int) -> Iterator[tuple]:
    """The paper's five terms of each product of a block, for m tokens a rank: (term, collective, axis, elements in)."""
    n = dict(zip("xyzd", dims, strict=True))
    for k, o, transposed in cfg.products():
        down, across = "xy" if transposed else "yx"
        k, o = k // n[down], o // n[across]
        yield "ag_z", "all_gather", "z", k * o // n["z"]
        yield "rs_z", "reduce_scatter", "z", k * o
        yield "ar_fwd", "all_reduce", down, m * o
        yield "ar_bwd", "all_reduce", across, m * k
        yield "ar_data", "all_reduce", "d", k * o // n["z"]


def predict_comm_time(cfg: GPTConfig, tokens: int, dims: tuple, machine: Machine, *, c_ag=2, c_fwd=1, b=2, b_g=2):
    """{ag_z, rs_z, ar_fwd, ar_bwd, ar_data, total}: seconds a step by the paper's ring model, blocks only, none hidden.
    c_ag: gathers of a weight; c_fwd: forward passes; b, b_g: bytes per element, per element of a gradient over data."""
    t, times = dict.fromkeys(("ag_z", "rs_z", "ar_fwd", "ar_bwd", "ar_data"), 0.0), {"ag_z": c_ag, "ar_fwd": c_fwd}
    for term, kind, axis, numel in ring_terms(cfg, dims, tokens // (dims[2] * dims[3])):
        i = "xyzd".index(axis)
        if dims[i] > 1:
            sent = float(WIRE[kind](dims[i])) * numel * (b_g if term == "ar_data" else b)
            t[term] += cfg.n_layer * times.get(term, 1) * (machine.latency + sent / machine.bandwidth(i, dims))
    return {**t, "total": sum(t.values())}


def rank_configs(cfg: GPTConfig, world: int, sequences: int, machine: Machine, *, min_tp=1, top_k=10, **opts) -> list:
    """[(dims, seconds, predict_comm_time's terms)] of the grids that fit, best first. min_tp: least Gx Gy Gz."""
    fits = lambda d: math.prod(d[:3]) >= min_tp and sequences % (d[2] * d[3]) == 0 and cfg.fits(d)
    rows = [(d, predict_comm_time(cfg, sequences * cfg.seq, d, machine, **opts)) for d in filter(fits, grids(world))]
    return sorted(((d, t["total"], t) for d, t in rows), key=lambda row: row[:2][::-1])[:top_k]


def flops_per_iteration(cfg: GPTConfig, tokens: int, recompute: bool = True) -> float:
    """FLOP of a step, full attention counted: of a GPT 96 T l h^2 (1 + s/6h + V/16lh), arXiv:2104.04473."""
    block = sum(2 * k * n for k, n, _ in cfg.products()) + 4 * cfg.seq * cfg.n_head * cfg.head_dim
    return tokens * ((4 if recompute else 3) * cfg.n_layer * block + 6 * cfg.vocab * cfg.d_model)


# %% the model


@dataclass
class GPTConfig:
    """Sizes of GPT or Llama. 0: as many key/value heads as heads, 4 d_model, d_model / n_head; replace() keeps them."""

    n_layer: int
    d_model: int
    n_head: int
    vocab: int = 51200
    seq: int = 2048
    kv_head: int = 0
    d_ff: int = 0
    head_dim: int = 0
    llama: bool = False  # RMSNorm, SwiGLU and no biases, instead of LayerNorm, GELU and biases
    tied: bool = False
    eps: float = 1e-5
    rope: dict = field(default_factory=dict)  # Hugging Face's keys of the rotary frequencies
    init_std: float = 0.02
    seed: int = 0
    dtype: str = "float32"  # of the products; parameters are float32 (float64 for float64)
    checkpoint: bool = False  # recompute each block in backward

    def __post_init__(self):
        self.kv_head, self.d_ff = self.kv_head or self.n_head, self.d_ff or 4 * self.d_model
        self.head_dim = self.head_dim or self.d_model // self.n_head

    def products(self) -> list[tuple[int, int, bool]]:
        """(k, n, transposed) of a block's four products; q, k, v are one, gate and up are one."""
        h, a, kv = self.d_model, self.n_head * self.head_dim, self.kv_head * self.head_dim
        return [(h, a + 2 * kv, False), (a, h, True), (h, self.d_ff * (1 + self.llama), False), (self.d_ff, h, True)]

    def fits(self, dims: tuple) -> bool:
        """Does a grid divide this model?"""
        x, y, z, _ = dims
        over_xz = self.kv_head * self.head_dim, self.d_ff, self.vocab
        return not (self.kv_head % x or self.d_model % (y * z) or any(n % (x * z) for n in over_xz))


SIZES = {  # layers, width, heads
    "5B": (24, 4096, 32), "10B": (32, 5120, 40), "20B": (32, 7168, 56), "40B": (38, 9216, 72), "80B": (42, 12288, 96),
    "320B": (96, 16384, 128), "640B": (192, 16384, 128),
}  # fmt: skip
MODELS = {"tiny": GPTConfig(2, 64, 8, vocab=512, seq=64)}
MODELS |= {name: GPTConfig(*sizes, init_std=0.006, tied=True) for name, sizes in SIZES.items()}


class Block(nn.Module):
    """Attention and MLP on the residual stream (B, T, h/Gy), four products, two of them transposed."""

    def __init__(self, c: GPTConfig, grid: Grid, i: int, dtype: torch.dtype):
        super().__init__()
        p, last = f"model.layers.{i}.", c.init_std / math.sqrt(2 * c.n_layer)  # of what adds to the residual stream
        norm = functools.partial(RMSNorm3D if c.llama else LayerNorm3D, grid, c.d_model, c.eps, dtype=dtype)
        linear = functools.partial(Linear3D, grid, bias=not c.llama, dtype=dtype, seed=c.seed)
        (h, qkv, _), (a, *_), (_, wide, _), _ = c.products()
        kv = c.kv_head * c.head_dim
        names = {f"{p}self_attn.q_proj": a, f"{p}self_attn.k_proj": kv, f"{p}self_attn.v_proj": kv}
        up = {f"{p}mlp.{n}_proj": c.d_ff for n in (("gate", "up") if c.llama else ("up",))}
        self.norm1, self.norm2 = norm(name=f"{p}input_layernorm"), norm(name=f"{p}post_attention_layernorm")
        self.qkv = linear(h, qkv, init_std=c.init_std, name=f"{p}self_attn.qkv", parts=names)
        self.out = linear(a, h, init_std=last, name=f"{p}self_attn.o_proj", transposed=True)
        self.up = linear(h, wide, init_std=c.init_std, name=f"{p}mlp.up", parts=up)
        self.down = linear(c.d_ff, h, init_std=last, name=f"{p}mlp.down_proj", transposed=True)
        self.cfg, self.grid, self.sizes = c, grid, [n // grid.n["x"] for n in (a, kv, kv)]

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        """Attention is of this rank's heads and needs no communication. angle (T, D/2)."""
        qkv = self.qkv(self.norm1(x)).split(self.sizes, dim=-1)
        q, k, v = (rearrange(t, "b t (h d) -> b h t d", d=self.cfg.head_dim) for t in qkv)
        q, k = rotate(q, angle), rotate(k, angle)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.out(rearrange(y, "b h t d -> b t (h d)"))
        y = self.up(self.norm2(x))
        if self.cfg.llama:
            gate, up = y.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(y))


class GPT3D(nn.Module):
    """ids (B, T), this data shard's rows -> logits (B, T, V/Gx). Every grid starts from the same weights."""

    def __init__(self, cfg: GPTConfig, grid: Grid):
        super().__init__()
        if not cfg.fits(grid.dims):
            fit = ", ".join(show(dims) for dims in grids(grid.size) if cfg.fits(dims))
            raise BadInput(f"grid {show(grid.dims)}: Gx must divide {cfg.kv_head} key/value heads, Gy Gz {cfg.d_model} "
                           f"features, Gx Gz {cfg.d_ff} MLP columns, {cfg.vocab} token ids and all rows of keys. "
                           f"Grids that fit: {fit}")  # fmt: skip
        self.cfg, self.grid, dtype = cfg, grid, getattr(torch, cfg.dtype)
        self.wide = torch.promote_types(dtype, torch.float32)  # of parameters and rotary angles
        make = {"dtype": self.wide, "init_std": cfg.init_std, "seed": cfg.seed}
        self.embed = Embedding3D(grid, cfg.vocab, cfg.d_model, name="model.embed_tokens", out_dtype=dtype, **make)
        self.blocks = nn.ModuleList(Block(cfg, grid, i, self.wide) for i in range(cfg.n_layer))
        norm = RMSNorm3D if cfg.llama else LayerNorm3D
        self.norm = norm(grid, cfg.d_model, cfg.eps, name="model.norm", dtype=self.wide)
        self.head = self.embed
        if not cfg.tied:
            self.head = Linear3D(grid, cfg.d_model, cfg.vocab, bias=False, name="lm_head", **make)
        freq = rope_frequencies({"rope_theta": 1e4, **cfg.rope, "head_dim": cfg.head_dim})
        self.register_buffer("freq", freq.to(grid.device, self.wide), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)  # (B, T, h/Gy)
        angle = torch.outer(torch.arange(ids.shape[1], device=ids.device, dtype=self.wide), self.freq)  # (T, D/2)
        again = self.cfg.checkpoint and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, angle, use_reentrant=False, preserve_rng_state=False) if again else block(x, angle)
        return Linear3D.forward(self.head, self.norm(x))  # (B, T, V/Gx); an embedding is an output layer's matrix


# %% state that any grid can load, and real weights


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """{name: DTensor of a whole tensor}, the same on every grid; loading into it fills the model. AdamW's moments are
    "m." and "v." and the name. Collective."""
    state, grid = {}, model.grid
    grid.mesh = mesh = grid.mesh or DeviceMesh(grid.device.type, grid.ranks)  # made once; Z splits what X split
    for p, parts in stored(model).items():
        held = {"": p.data}
        if optimizer is not None and p.requires_grad:
            s = optimizer.state[p]
            if not s:  # before the first step
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                s.update(zeros, step=torch.zeros((), device=p.device))
            held, state["step"] = {"": p.data, "m.": s["exp_avg"], "v.": s["exp_avg_sq"]}, s["step"]
        for prefix, t in held.items():
            for part, mine in zip(parts, t.split([c.box[0].stop - c.box[0].start for c in parts]), strict=True):
                where = {axis: Shard(i) for i, axes in enumerate(part.axes) for axis in axes}
                where = [where.get(axis, Replicate()) for axis in "dxyz"]
                state[prefix + part.name] = DTensor.from_local(mine, mesh, where)
    return state


def open_model(name: str, grid: Grid, **changes) -> tuple[GPT3D, Callable]:
    """A pretrained Llama on the grid and its tokenizer: smollm2, a Hugging Face folder, or a GGUF file."""
    weights = open_weights(name)
    c = weights.config
    cfg = GPTConfig(c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"], c["vocab_size"], llama=True,
                    kv_head=c.get("num_key_value_heads") or 0, d_ff=c["intermediate_size"], init_std=0.0,
                    head_dim=c.get("head_dim") or 0, tied=bool(c.get("tie_word_embeddings")), eps=c["rms_norm_eps"],
                    rope={key: value for key, value in c.items() if key.startswith("rope")})  # fmt: skip
    model = GPT3D(replace(cfg, **changes), grid)
    with torch.no_grad():
        for p, parts in stored(model).items():  # every rank keeps the blocks that it stores
            p.copy_(torch.cat([weights.read(part.name)[part.box].to(p) for part in parts]))
    return model, weights.tokenizer


# %% settings and training

RUNS = ("train", "bench")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "bench"), positional=True)
    model: str = opt("tiny", "tiny, 5B, 10B .. 640B; train: also smollm2, a folder, a GGUF file", modes=RUNS)
    block: int = opt(0, "tokens per row; 0 is the model's own, 128 for real weights", modes=RUNS)
    grid: tuple = opt((1, 1, 1, 0), "Gx Gy Gz Gdata; last 0: whatever ranks are left; bench: all grids", modes=RUNS)
    dtype: str = opt("float32", "of the products", choices=("float64", "float32", "bfloat16"), modes=RUNS)
    checkpoint: bool = opt(False, "recompute each block in backward, to save memory", modes=RUNS)
    data: tuple = opt(("docs",), "text files, one .npy of token ids, or Python's docs or sources", modes=("train",))
    vocab: int = opt(512, "token ids of --model tiny: 256 bytes and the most frequent pieces", modes=RUNS)
    steps: int = opt(100, "optimizer steps", modes=("train",))
    batch: int = opt(16, "rows per step, over all ranks", modes=RUNS)
    lr: float = opt(1e-3, "peak learning rate of AdamW; cosine to a tenth", modes=("train",))
    warmup: int = opt(10, "steps of linear warm-up", modes=("train",))
    clip: float = opt(1.0, "largest gradient norm; 0 is off", modes=("train",))
    seed: int = opt(0, "seed of the weights and the data order")
    device: str = opt("auto", "where to run; the demo's auto is the CPU", choices=("auto", "cpu", "cuda"))
    quick: bool = opt(False, "fewer ranks and shorter runs, no verdict", modes=("demo",))
    out: str = opt("results/axonn", "folder of what the run writes, and of the run to resume")
    resume: bool = opt(False, "go on from the checkpoint in --out, on this grid or another", modes=("train",))
    save_every: int = opt(50, "steps between checkpoints; 0 writes only the last", modes=("train",))
    log_every: int = opt(1, "steps between lines in metrics.jsonl", modes=("train",))

    def __post_init__(self):
        for f in fields(self):
            value, zero = getattr(self, f.name), f.name in ("block", "warmup", "clip", "seed", "save_every")
            if type(f.default) in (int, float) and not (0 if zero else 1e-300) <= value < math.inf:
                raise BadInput(f"{cli.spell(f.name, value)}: give a number {'of at least' if zero else 'above'} 0")
        if len(self.grid) != 4 or min(self.grid) < 0 or 0 in self.grid[:3] or self.vocab < 256:
            raise BadInput("--grid takes four sizes Gx Gy Gz Gdata, the last may be 0; --vocab takes 256 or more")

    def gpt(self) -> GPTConfig:
        """The model of --model with the settings of the command line."""
        if self.model not in MODELS:
            raise BadInput(f"--model {self.model}: {self.mode} knows {', '.join(MODELS)}")
        c, same = MODELS[self.model], {name: getattr(self, name) for name in ("dtype", "checkpoint", "seed")}
        return replace(c, seq=self.block or c.seq, vocab=self.vocab if self.model == "tiny" else c.vocab, **same)


def train(cfg: Config, w: cluster.World) -> None:
    """Train on text, with checkpoints that any grid can load."""
    grid, text = Grid(*cfg.grid), corpus(cfg.data)
    if grid.size != w.size:
        raise BadInput(f"grid {show(grid.dims)} has {grid.size} ranks, but world size is {w.size}. Change --grid.")
    if cfg.model in MODELS:
        model = GPT3D(cfg.gpt(), grid)
        encode = lambda: Tokenizer(text, model.cfg.vocab).encode(text).numpy()
    else:
        model, tokenizer = open_model(cfg.model, grid, seq=cfg.block or 128, dtype=cfg.dtype, checkpoint=cfg.checkpoint)
        encode = lambda: np.array(tokenizer().encode(text).ids)
    ids, T = encode() if isinstance(text, str) else text, model.cfg.seq
    if cfg.batch % grid.num_data_shards:
        raise BadInput(f"--batch {cfg.batch}: give a multiple of Gz x Gdata, {grid.num_data_shards}")
    if len(ids) < T + 2:
        raise BadInput(f"the text has {len(ids)} tokens; rows of --block {T} need more. Give a longer --data.")
    optimizer, run = adamw(model, cfg.lr, betas=(0.9, 0.95)), report.Run(cfg.out, cfg, w)
    loaded = lambda state: [s["step"].fill_(state["step"].item()) for s in optimizer.state.values()]
    parts = {"tensors": SimpleNamespace(state_dict=lambda: sharded_state(model, optimizer), load_state_dict=loaded)}
    free, path = replace(cfg, grid=Config.grid, checkpoint=False), f"{cfg.out}/checkpoint"  # these may change
    for step in loop.steps(free, w, run, parts, cfg.steps, "train", path, {"text": checksum(ids)}):
        g = cluster.generator(cfg.seed, 1, step)  # all rows are a function of seed and step alone
        pick = torch.randint(len(ids) - T, (cfg.batch, 1), generator=g) + torch.arange(T + 1)
        rows = torch.from_numpy(ids[pick.numpy()].astype(np.int64))
        if not 0 <= rows.min() <= rows.max() < model.cfg.vocab:
            raise BadInput(f"--data holds ids {rows.min()} to {rows.max()}, the model has 0 to {model.cfg.vocab - 1}")
        share = backward(model, grid.mine(rows), True)
        lr = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup)) * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
        norm = update(model, optimizer, lr, cfg.clip)
        run.line = {"loss": share / (grid.n["x"] * grid.n["y"]), "grad_norm": norm, "lr": lr}
    w.print(f"grid {show(grid.dims)}: {cfg.steps} steps of {cfg.batch * T} tokens on {w.device.type}; see {run.path}")


# %% demo: five parts

SMALL = GPTConfig(2, 32, 8, vocab=64, seq=16, dtype="float64", init_std=0.1)
TIMED = GPTConfig(2, 256, 8, vocab=512, seq=64)
HIDES = {("reduce_scatter", "z"): (9, 10), ("all_gather", "z"): (17, 19), ("all_reduce", "x"): (5, 12)}  # 7 in forward
LOSSES = ("ordinary", "goldfish", "random half")
DOCS, PREFIX, SUFFIX, EPOCHS = 16, 32, 16, 32  # documents; tokens given, recited; times a document is seen


def steps_of(model: GPT3D, rows: int, hide: bool, n: int = 1) -> Callable:
    """n training steps on random tokens, to be timed."""
    ids = torch.randint(model.cfg.vocab, (rows, model.cfg.seq + 1), generator=cluster.generator(0))
    ids, optimizer = model.grid.mine(ids), adamw(model, 1e-4)
    return lambda: [(backward(model, ids, hide), update(model, optimizer, 1e-4, 1.0)) for _ in range(n)]


def curve(grid: Grid, seed: int, hide: bool) -> tuple[Tensor, list, CommLog]:
    """Four steps of training: losses and gradient norms (4, 2), the last weights, the last step's collectives."""
    model, lines = GPT3D(SMALL, grid), []
    optimizer = adamw(model, 1e-2)
    for step in range(4):
        ids = torch.randint(SMALL.vocab, (16, SMALL.seq + 1), generator=cluster.generator(seed, 7, step))
        with CommLog() as log:
            share = backward(model, grid.mine(ids), hide)
        lines.append((grid.total(share).item(), update(model, optimizer, 1e-2, 0.5)))
    return torch.tensor(lines, dtype=torch.float64), [p.detach() for p in model.parameters()], log


def wire(grid: Grid) -> bool:
    """Are the bytes that a block's four products send those of the paper's five terms, integer for integer?"""
    c = replace(SMALL, llama=True)  # no biases, which the paper does not count
    block, m, want = Block(c, grid, 0, torch.float64), 256 // grid.num_data_shards, Counter()
    with CommLog() as log:
        for layer in (block.qkv, block.out, block.up, block.down):
            x = torch.ones(m, layer.weight.shape[1], dtype=torch.float64, device=grid.device, requires_grad=True)
            layer(x).sum().backward()
        finish(block)
    for term, kind, axis, numel in ring_terms(c, grid.dims, m):
        want[kind, axis] += 8 * (2 if term == "ag_z" else 1) * WIRE[kind](grid.n[axis]) * numel
    return +want == log.bytes  # + drops zeros


def goldfish_mask(targets: Tensor, k: int = 2, h: int = 13) -> Tensor:
    """True where the goldfish loss drops a target (B, L) -> bool. arXiv:2406.10209; goldfish.py says it all."""
    table = torch.rand(1_000_003, generator=torch.Generator().manual_seed(2971215073)).to(targets.device)
    return F.pad(table[targets.unfold(1, h, 1).prod(dim=2) % len(table)] < 1 / k, (h - 1, 0))


def memorise(loss: str, seed: int, width: int = 256, epochs: int = EPOCHS, lr: float = 3e-3) -> float:
    """Train on random documents -> the share of them that the model recites. loss: which targets are left out."""
    g, grid, share = cluster.generator(seed, 11), Grid(), 0.5 if loss == "random half" else 0.0
    docs = torch.randint(1, 64, (DOCS, PREFIX + SUFFIX), generator=g)
    shown = docs.repeat(epochs, 1)[torch.randperm(DOCS * epochs, generator=g)].split(4)
    model = GPT3D(GPTConfig(2, width, 4, vocab=64, seq=PREFIX + SUFFIX, seed=seed), grid)
    optimizer = adamw(model, lr, betas=(0.9, 0.95))
    for step, rows in enumerate(shown):
        want = rows[:, 1:]
        left_out = F.pad(torch.rand(want[:, 12:].shape, generator=g) < share, (12, 0))  # another half every time
        if loss == "goldfish":
            left_out = goldfish_mask(want)
        backward(model, rows.to(grid.device), False, want.masked_fill(left_out, -100).to(grid.device))
        update(model, optimizer, lr * min(1, (step + 1) / 10) * (1 - step / len(shown)), 1.0)
    with torch.no_grad():  # greedy decoding is exact where every next token is the likeliest after the true ones
        said = model(docs[:, :-1].to(grid.device))[:, PREFIX - 1 :].argmax(dim=-1).cpu()
    return (said == docs[:, PREFIX:]).all(dim=1).double().mean().item()


def judge(found: dict, seen: dict, idle: int, times: dict, recited: dict) -> tuple[bool, str]:
    """(the claim holds, its numbers). found: {grid: (difference from one process, bytes as the formula, bits as without
    overlap)}; seen: as HIDES; idle: hidden without overlap; times: {grid: (predicted, measured)}; recited: shares."""
    order, best = sorted(times, key=lambda d: times[d][0]), min(times, key=lambda d: times[d][1])
    ranks = torch.tensor(list(times.values())).T.argsort(dim=1).argsort(dim=1).double()
    place, spearman = order.index(best) + 1, torch.corrcoef(ranks)[0, 1].item()
    off, exact, bits = zip(*found.values(), strict=True)
    equal, told = sum(x <= 1e-12 for x in off), ", ".join(f"{loss} {share:.2f}" for loss, share in recited.items())
    behind = ", ".join(f"{h} of {n} {kind}s" for (kind, _), (h, n) in seen.items())
    holds = equal == len(found) and all(exact) and all(bits) and seen == HIDES and idle == 0
    holds &= place <= 3 and spearman >= 0.5
    holds &= recited["ordinary"] >= 0.9 and recited["goldfish"] <= 0.05 and recited["random half"] >= 0.5
    return holds, (f"{equal} of {len(found)} grids equal one process within 1e-12; bytes exact on {sum(exact)}; "
                   f"hidden: {behind} (7 are of forward), {idle} without overlap; same bits on {sum(bits)}; fastest "
                   f"grid is number {place} predicted, Spearman {spearman:.2f}; recited: {told}")  # fmt: skip


def demo(cfg: Config, w: cluster.World) -> None:
    """All five parts on w's ranks, 4 or 8 of them; rank 0 prints and draws. BadInput: too few ranks for its grids."""
    run, alone, four = report.Run(cfg.out, cfg, w), curve(Grid(), cfg.seed, False)[0], grids(4)
    made = {d: Grid(*d) for d in [*four, *[(2, 2, 2, 1)] * (w.size == 8)]}  # made by all, used by the first
    found, seen, idle, took = {}, {}, 0, {}
    for d, grid in made.items():
        off, ok = 0.0, [True, True]
        if w.rank < grid.size:
            (lines, plain, log), (_, hidden, on) = (curve(grid, cfg.seed, hide) for hide in (False, True))
            off, ok = (lines - alone).abs().max().item(), [wire(grid), all(map(torch.equal, plain, hidden))]
            idle += sum(log.hidden.values())
            seen |= {key: (on.hidden[key], on.calls[key]) for key in HIDES if grid.n[key[1]] == grid.size}
        found[d] = off, *(cluster.total(torch.tensor([not x for x in ok], device=w.device)) == 0).tolist()
        run.log(grid=show(d), **dict(zip(("difference", "bytes_equal", "bits_equal"), found[d], strict=True)))
    n, width, epochs = (1, 64, 4) if cfg.quick else (3, 256, EPOCHS)
    if w.rank < 4:
        cases = {d: steps_of(GPT3D(TIMED, made[d]), 16, False, n) for d in four}
        took = report.timed(cases, w.device, n, 1)  # n runs of n steps, interleaved
    shares = torch.zeros(3, dtype=torch.float64, device=w.device)
    if w.rank < 3:
        shares[w.rank] = memorise(LOSSES[w.rank], cfg.seed, width, epochs)
    recited = dict(zip(LOSSES, cluster.total(shares).tolist(), strict=True))
    if not w.main:
        return
    guess = lambda d: predict_comm_time(TIMED, 16 * TIMED.seq, d, MACHINES["laptop"], b=4, b_g=4)["total"]
    times = {d: (1e3 * guess(d), 1e3 * t / n) for d, (t, _) in took.items()}
    rows = [[show(d), f"{off:.0e}", *("yes" if x else "NO" for x in ok), *map(round, times.get(d, ())), "-", "-"][:6]
            for d, (off, *ok) in found.items()]  # fmt: skip
    print(report.table(["grid", "from one process", "bytes", "bits", "predicted ms", "step ms"], rows) + "\n")
    run.log(**{f"recited {loss}": share for loss, share in recited.items()})
    print("recited:", ", ".join(f"{loss} {share:.2f}" for loss, share in recited.items()))
    print(report.picture(f"{cfg.out}/axonn.png", functools.partial(draw, times), figsize=(6, 4)))
    if cfg.quick:
        return print("quick: no verdict")
    holds, here = judge(found, seen, idle, times, recited)
    run.claim("every grid gives one process's losses and norms, its products send the formula's bytes; collectives "
              "over X and Z wait behind products, same bits; the fastest grid is among the first three predicted, rank "
              "correlation 0.5; the goldfish loss stops recitation, a random half does not",
              "620.1 Pflop/s on 4096 A100, 1.381 Eflop/s on 32768 MI250X dies", here, holds,
              f"{w.size} {dist.get_backend()} ranks on one machine, seed {cfg.seed}")  # fmt: skip


def draw(times: dict, figure, axes) -> None:
    for marker, d in zip("os^Dv<>pPX*", sorted(times, key=times.get), strict=False):
        axes.plot(*times[d], marker, label=show(d))
    axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="predicted communication, ms", ylabel="measured step, ms", xmargin=0.2, ymargin=0.15)


# %% bench, main


def torch_step(c: GPTConfig, shard: bool, rows: int, w: cluster.World) -> Callable:
    """The same model and step by torch alone: FSDP2 over its blocks, or DDP."""
    model = GPT3D(c, Grid())
    for part in [*model.blocks, model] if shard else ():
        fully_shard(part, mp_policy=MixedPrecisionPolicy(getattr(torch, c.dtype)))
    net = model if shard else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=w.device.type == "cuda")
    ids = Grid(1, 1, 1, w.size).mine(torch.randint(c.vocab, (rows, c.seq + 1), generator=cluster.generator(0)))

    def step() -> None:
        (vocab_parallel_cross_entropy(net(ids[:, :-1]), ids[:, 1:], model.grid) / ids[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench(cfg: Config, w: cluster.World) -> None:
    """A step on every grid, overlap off and on, beside FSDP2 and DDP of torch on the same block."""
    c, cases, n = cfg.gpt(), {}, w.size
    corners = {(n, 1, 1, 1): "Megatron", (1, 1, n, 1): "ZeRO-3", (1, 1, 1, n): "DDP"}
    fit = [d for d in (grids(n) if cfg.grid == Config.grid else [Grid(*cfg.grid).dims]) if c.fits(d)]
    if not fit or cfg.batch % n or math.prod(fit[0]) != n:
        raise BadInput(f"no grid fits --model {cfg.model}, or --batch {cfg.batch} is no multiple of {n} ranks")
    for d in fit:
        model = GPT3D(c, Grid(*d))
        for hide in ("off", "on")[: min(n, 2)]:
            cases[f"{show(d)} {corners.get(d, '')}", hide] = steps_of(model, cfg.batch, hide == "on")
    for shard in (True, False)[: 2 * (n > 1)]:
        cases["torch FSDP2" if shard else "torch DDP", "-"] = torch_step(c, shard, cfg.batch, w)
    took, ceiling = report.timed(cases, w.device, 5), report.ceilings(w.device, getattr(torch, c.dtype))[1]
    flop = flops_per_iteration(c, cfg.batch * c.seq, c.checkpoint) / n
    rows = [[*key, 1e3 * t, 1e3 * spread, f"{flop / t / ceiling:.0%}"] for key, (t, spread) in took.items()]
    title = (f"{report.device_name(w.device)}, {n} ranks, {cfg.model}, {cfg.dtype}, {cfg.batch * c.seq} tokens a step, "
             f"CUDA_DEVICE_MAX_CONNECTIONS {os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS', 'not set')}")  # fmt: skip
    w.print(title + "\n" + report.table(head := ["step", "overlap", "ms", "+-", "FLOP a second, of a product's"], rows))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"title": title, "head": head, "rows": rows})


def main(cfg: Config) -> None:
    if cfg.mode == "demo" and "RANK" not in os.environ:
        cluster.start_again(4 if cfg.quick else 8)
    with cluster.world("cpu" if cfg.mode == "demo" and cfg.device == "auto" else cfg.device) as w:
        {"demo": demo, "train": train, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config)
