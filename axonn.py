"""AxoNN: train one model on a 4D grid of processes exactly as one process would, and predict which grid is fastest.

Paper    Singh et al., "Democratizing AI: Open-source Scalable LLM Training on GPU-based Supercomputers", SC'24,
         arXiv:2502.08145; the model of communication from "A 4D Hybrid Algorithm ...", arXiv:2305.13525.
Idea     Three axes of ranks, X, Y and Z, split the three loops of every matrix product, the fourth is data parallelism.
         Every second layer swaps X and Y, so activations never move. Megatron, ZeRO-3 and DDP are corners of the grid.
         Communication hides behind products, and a formula ranks the grids, so that only the first few need trying.
Here     The claim we check: one process's numbers on every grid, the formula's bytes, communication behind products,
         the best grid among the first three, and that the goldfish loss, not less training, stops recitation.
Differs  - Weights are gathered again in backward (the paper keeps them). Norms are of the whole width. Z splits rows.
         - q, k, v are one product of whole heads. What the grid does not divide is refused, not padded.
         - Parameters are fp32, products cast them. The demo's ranking assumes 0.5 ms a call and 0.3 GB/s.
         - Recitation is a toy on random documents, for Llama models of up to 405B. Product layouts are not tuned.

    python axonn.py                                                 # laptop: starts 8 ranks, tables, picture, claim
    python axonn.py --quick                                         # 4 ranks, shorter, no verdict
    torchrun --nproc-per-node 4 axonn.py train --grid 2 1 2 1 --device cpu    # --resume goes on, on any grid
    torchrun --nproc-per-node 3 axonn.py train --model smollm2 --grid 3 1 1 1 --batch 2 --steps 3 --lr 1e-5
    python axonn.py plan --model 20B --world 64 --sequences 2048 --machine perlmutter
    torchrun --nproc-per-node 2 axonn.py bench --device cpu         # all grids, FSDP2 and DDP on the same block
    python axonn.py bench --model 5B --checkpoint --dtype bfloat16 --batch 16 --accum 4       # one GPU; never run
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
import sys
import zlib
from collections import Counter
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from common import cli, cluster, loop, report
from common.cli import BadInput, opt
from common.text import Tokenizer, corpus
from common.weights import open_weights, rope_frequencies, rotate

# %% the method: O = I W^T on a grid of ranks, in three operators
#
# I (m, k)  a layer's input, m tokens     W (n, k)  its weight, as PyTorch stores it     O (m, n)  its output
# Gx Gy Gz Gd  the grid's sizes           Z splits m, Y splits k, X splits n             m/Gz, k/Gy ...  a rank's part
# A transposed layer exchanges X and Y, so that its input lies as the output of the layer before it does.


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
    """I (m/Gz, k/Gy), w: this rank's rows of its block of W, (n/Gx/Gz, k/Gy) -> O (m/Gz, n/Gx)."""
    W = Gather.apply(w, grid)  # (n/Gx, k/Gy)
    return Sum.apply(Copy.apply(I, grid, across) @ W.T, grid, down)


# %% the grid: which rank is where, and its collectives

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renames them
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
NEW_GROUP = functools.cache(lambda world, ranks, spare: dist.new_group(ranks) if len(ranks) > 1 else None)
LOGS: list[CommLog] = []  # the active ones


class Work:
    """A collective under way, and its tensors: nobody may read the result before wait()."""

    def __init__(self, work=None, key: tuple = (), *tensors: Tensor):
        self.work, self.key, self.tensors = work, key, tensors
        self.logs = [(log, log.products) for log in LOGS]

    def wait(self) -> None:
        if self.work:
            self.work.wait()
            for log, before in self.logs:
                log.hidden[self.key] += log.products > before
        self.work = self.tensors = None


class Grid:
    """Rank = x + Gx (y + Gy (z + Gz d)). n, at: {axis: size}, {axis: this rank's place}. A smaller grid than the job is
    laid out again and again, as independent copies. Making one is collective."""

    def __init__(self, gx: int = 1, gy: int = 1, gz: int = 1, gdata: int = 1):
        self.dims = (gx, gy, gz, gdata)
        if any(type(g) is not int or g < 1 for g in self.dims):
            raise BadInput(f"grid {self}: give four integers Gx Gy Gz Gdata of at least 1")
        self.size, world = math.prod(self.dims), dist.get_world_size() if dist.is_initialized() else 1
        if world % self.size:
            raise BadInput(f"grid {self} needs {self.size} ranks, but world size is {world}. Change --grid, or type "
                           f"torchrun --nproc-per-node {self.size} axonn.py ...")  # fmt: skip
        if not dist.is_initialized():
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        on_gpu, me = dist.get_backend() == "nccl", dist.get_rank()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        ranks, self.groups = torch.arange(world, device="cpu").view(-1, gdata, gz, gy, gx), {}
        for name, i in (("d", 1), ("z", 2), ("y", 3), ("x", 4), ("z2", 2)):  # z2: a prefetch must not queue in z
            rows = ranks.movedim(i, 4).reshape(-1, ranks.shape[i]).tolist()
            groups = [NEW_GROUP(dist.group.WORLD, tuple(row), name == "z2") for row in rows]  # all ranks make all
            self.groups[name] = next(group for group, row in zip(groups, rows, strict=True) if me in row)
        copy, *place = (ranks == me).nonzero()[0].tolist()
        self.d, self.z, self.y, self.x = place
        self.n, self.at = dict(zip("xyzd", self.dims, strict=True)), dict(zip("dzyx", place, strict=True))
        self.data_shard, self.num_data_shards = self.d * gz + self.z, gz * gdata
        self.ranks = ranks[copy].permute(0, 3, 2, 1)  # (d, x, y, z)
        self.hide, self.pending, self.order, self.step, self.ahead = frozenset(), [], [], 0, (None, None, Work())

    def __str__(self):
        return show(self.dims)

    def __deepcopy__(self, memo):
        return self  # a copied model lives on the same ranks

    def start(self, kind: str, x: Tensor, axis: str, op=dist.ReduceOp.SUM, spare: bool = False) -> tuple[Tensor, Work]:
        """Begin a collective on contiguous x along an axis -> (its result, the work). all_reduce works in place."""
        n, to = self.n[axis], {"group": self.groups["z2" if spare else axis], "async_op": True}
        if n == 1:
            return x, Work()
        for log in LOGS:
            log.add(kind, axis, n, x)
        if kind == "all_reduce":
            return x, Work(dist.all_reduce(x, op, **to), (kind, axis), x)
        rows, call = (n * len(x), ALL_GATHER) if kind == "all_gather" else (len(x) // n, REDUCE_SCATTER)
        out = x.new_empty(rows, *x.shape[1:])
        return out, Work(call(out, x, **to), (kind, axis), x, out)

    def all_reduce(self, x: Tensor, axis: str, op=dist.ReduceOp.SUM) -> Tensor:
        self.start("all_reduce", x, axis, op)[1].wait()
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over the shards of the batch (Z and data), as a new tensor."""
        return self.all_reduce(self.all_reduce(x.detach().clone(), "z"), "d")

    def fetch(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """w's block in `dtype`, gathered over Z. In overlap() begin to gather what followed the last time (OAG)."""
        if self.n["z"] == 1:
            return w.detach().to(dtype)
        same = lambda key: key is not None and key[0] is w and key[1] == dtype
        (key, W, work), self.ahead = self.ahead, (None, None, Work())
        if not same(key):
            work.wait()
            W, work = self.start("all_gather", w.detach().to(dtype), "z")
        if "oag" in self.hide:
            if not any(map(same, self.order[self.step : self.step + 1])):  # the first time, or another order
                self.order[self.step :] = [(w, dtype)]
            self.step += 1
            for after in self.order[self.step : self.step + 1]:
                self.ahead = after, *self.start("all_gather", after[0].detach().to(after[1]), "z", spare=True)
        work.wait()
        return W

    def scatter(self, w: Tensor, dW: Tensor) -> Tensor | None:
        """This rank's rows of dW summed over Z: w's gradient. In overlap() it is added when backward ends (ORS)."""
        dw, work = self.start("reduce_scatter", dW, "z")
        if "ors" in self.hide and self.n["z"] > 1:
            if not self.pending:
                torch.autograd.Variable._execution_engine.queue_callback(self.land)
            return self.pending.append((w, dw, work))
        work.wait()
        return dw.to(w.dtype)

    def land(self) -> None:
        """Wait for the reduce-scatters of one backward pass, and add them up in autograd's order."""
        sums, landed, self.pending = {}, self.pending, []
        for w, dw, work in landed:
            work.wait()
            sums[w] = sums[w] + dw.to(w.dtype) if w in sums else dw.to(w.dtype)
        for w, g in sums.items():
            w.grad = g if w.grad is None else w.grad.add_(g)


def grids(size: int) -> list[tuple[int, int, int, int]]:
    """All (Gx, Gy, Gz, Gdata) of `size` ranks."""
    parts = [n for n in range(1, size + 1) if size % n == 0]
    return [g for g in itertools.product(parts, repeat=4) if math.prod(g) == size]


show = lambda dims: "x".join(map(str, dims))

# %% which rows and columns of a tensor a rank stores


class Part(NamedTuple):
    """A rank's part of the tensor `name`: the slices `box`; axes: which axes split its rows and its columns."""

    name: str
    shape: tuple  # of the whole tensor
    box: tuple
    axes: tuple


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
            self.parts[name].append(Part(tensor, shape, box, axes))
            blocks.append(torch.full([b.stop - b.start for b in box], value))
            if std:
                blocks[-1] = self.normal(tensor, shape[1], *box, seed) * std
        made = torch.cat(blocks).to(self.grid.device, dtype or torch.get_default_dtype())
        setattr(self, name, nn.Parameter(made))

    def cut(self, name: str, n: int, axes: str) -> slice:
        """This rank's slice of n rows or columns that some axes split, the first one outermost."""
        size, place = 1, 0
        for axis in axes:
            size, place = size * self.grid.n[axis], place * self.grid.n[axis] + self.grid.at[axis]
        if n % size:
            raise BadInput(f"{name}: {n} is not divisible by G{' G'.join(axes)} = {size} of grid {self.grid}")
        return slice(place * n // size, (place + 1) * n // size)

    @staticmethod
    def normal(name: str, width: int, rows: slice, cols: slice, seed: int) -> Tensor:
        """A block of the matrix that `name` starts from, the same on every grid, drawn 256 rows at a time."""
        step, drawn = 256, []
        for first in range(rows.start // step * step, rows.stop, step):
            block = torch.randn(step, width, generator=cluster.generator(seed, zlib.crc32(name.encode()), first))
            drawn.append(block[max(0, rows.start - first) : rows.stop - first, cols])
        return torch.cat(drawn)


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
        need_I, need_w, _ = ctx.needs_input_grad
        dI, dw, work, first = None, None, Work(), need_w and grid.n[across] == 1
        if first:  # dI needs no all-reduce, so the reduce-scatter hides behind its product
            dw = grid.scatter(w, dO.T @ I)
        if need_I:
            dI, work = grid.start("all_reduce", dO @ grid.fetch(w, dO.dtype), across)  # (m/Gz, k/Gy), partial over X
            if "oar" not in grid.hide:
                work.wait()
        if need_w and not first:  # the all-reduce hides behind this product (OAR), its own scatter behind others (ORS)
            dw = grid.scatter(w, dO.T @ I)
        work.wait()
        return dI, dw, None


class Linear3D(Stored):
    """O = I W^T + b: I (..., k/Gy) -> O (..., n/Gx), tokens split over Z; transposed: X and Y exchanged.
    parts, {name: width}, fuses matrices of one input: a rank has its share of each. tied: whose weight it shares."""

    def __init__(self, grid: Grid, in_features: int, out_features: int, *, bias=True, transposed=False, name="linear",
                 init_std=0.02, seed=0, dtype=None, parts=None, tied=None):  # fmt: skip
        super().__init__(grid)
        self.down, self.across = ("x", "y") if transposed else ("y", "x")
        widths, self.name, self.bias = parts or {name: out_features}, name, None
        if tied is None:
            shapes = {f"{part}.weight": (n, in_features) for part, n in widths.items()}
            self.store("weight", shapes, self.across + "z", self.down, std=init_std, seed=seed, dtype=dtype)
        else:
            self.weight = tied.weight
        if bias:
            self.store("bias", {f"{part}.bias": (n,) for part, n in widths.items()}, self.across, dtype=dtype)
        self.rows, self.k = [n // grid.n[self.across] // grid.n["z"] for n in widths.values()], self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.k or x.numel() == 0:
            raise ValueError(f"{self.name} on grid {self.grid} takes (1 or more, {self.k}), got {tuple(x.shape)}")
        y, gz = FastLinear.apply(x.reshape(-1, self.k), self.weight, self), self.grid.n["z"]  # (m/Gz, n/Gx)
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
        for *_, work in [*grid.pending, grid.ahead]:
            work.wait()
        grid.hide, grid.pending, grid.step, grid.ahead = frozenset(), [], 0, (None, None, Work())
    finish(model)


def finish(model: nn.Module) -> None:
    """Complete the gradients after the last backward: sum weights over data, and what Z does not split over Z too.
    Collective; again without a new backward it does nothing. RuntimeError: inside overlap(), or added to after it."""
    grid, todo = model.grid, incomplete(model)
    if grid.hide or any(hasattr(g, "complete") for g in todo):
        raise RuntimeError("gradients are in flight, or were changed after finish(). Leave overlap(), or zero_grad().")
    works = [grid.start("all_reduce", g, "d")[1] for g, over_z in todo.items() if over_z]
    shared = [g for g, over_z in todo.items() if not over_z]
    if shared and grid.num_data_shards > 1:
        flat = grid.total(torch.cat([g.flatten() for g in shared]))
        for g, new in zip(shared, flat.split([g.numel() for g in shared]), strict=True):
            g.copy_(new.view_as(g))
    for work in works:
        work.wait()
    for g in todo:
        g.complete = g._version


def incomplete(model: nn.Module) -> dict:
    """{gradient that finish() has not seen or that was changed since: True if Z splits it}."""
    held = {p.grad: "z" in parts[0].axes[0] for p, parts in stored(model).items() if p.grad is not None}
    return {g: over_z for g, over_z in held.items() if getattr(g, "complete", None) != g._version}


def check_complete(model: nn.Module) -> None:
    """RuntimeError: a gradient is not complete, so that replicas would drift apart."""
    if model.grid.hide or incomplete(model):
        raise RuntimeError("gradients are not complete: call finish(model) after backward(), then our clip_grad_norm_")


# %% embedding, norm and loss, made of the three operators


class Embedding3D(Linear3D):
    """ids (...) -> (..., h/Gy): rows of an output layer's matrix (V over X, h over Y). IndexError: no such id."""

    def __init__(self, grid: Grid, vocab: int, dim: int, *, name: str = "embedding", out_dtype=None, **options):
        super().__init__(grid, dim, vocab, bias=False, name=name, **options)
        self.vocab, self.out_dtype = vocab, out_dtype or self.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        _check_ids((ids < 0) | (ids >= self.vocab), ids, f"token id outside [0, {self.vocab})")
        W = Gather.apply(self.weight, self.grid)  # (V/Gx, h/Gy), wide: 16-bit sums of equal ids would stall
        local = ids - self.grid.x * len(W)
        mine = (local >= 0) & (local < len(W))  # one rank along X has the row, the others add zero
        rows = F.embedding(torch.where(mine, local, 0), W).to(self.out_dtype)
        return Sum.apply(torch.where(mine[..., None], rows, 0), self.grid, "x")


def _check_ids(bad: Tensor, ids: Tensor, what: str) -> None:
    if not bad.is_cuda and bad.any():  # asking a GPU would make the host wait
        raise IndexError(f"{what}: {ids[bad][0].item()}")


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
    keep, local = targets != ignore_index, targets - grid.x * v
    _check_ids(keep & ((targets < 0) | (targets >= v * grid.n["x"])), targets, "target that is no token nor ignored")
    mine = keep & (local >= 0) & (local < v)
    top = grid.all_reduce(logits.detach().amax(dim=-1), "x", dist.ReduceOp.MAX)  # (...)
    logits = logits - top[..., None]
    own = logits.gather(-1, torch.where(mine, local, 0)[..., None])[..., 0]
    s, t = Sum.apply(torch.stack([logits.exp().sum(dim=-1), torch.where(mine, own, 0)]), grid, "x")
    return torch.where(keep, s.log() - t, 0).sum()


# %% one step


def backward(model: GPT3D, micro: list[Tensor], hide: bool, targets: Callable = lambda rows: rows[:, 1:]) -> Tensor:
    """Forward and backward over micro-batches of this data shard's rows (b, T + 1) -> its share of the mean loss."""
    share, wanted = 0.0, [targets(rows) for rows in micro]
    count = model.grid.total((torch.cat(wanted) != -100).sum()).clamp(min=1)  # ranks may mask differently
    with overlap(model, oar=hide, ors=hide, oag=hide):
        for rows, want in zip(micro, wanted, strict=True):
            loss = vocab_parallel_cross_entropy(model(rows[:, :-1]), want, model.grid) / count
            loss.backward()
            share = share + loss.detach()
    return share


def clip_grad_norm_(model: nn.Module, max_norm: float) -> float:
    """Scale gradients to a global norm of at most max_norm (0: no limit) -> the norm before. Collective."""
    check_complete(model)
    grid, total, held = model.grid, 0.0, {p: parts[0] for p, parts in stored(model).items() if p.grad is not None}
    for p, part in held.items():
        copies = math.prod(grid.n[axis] for axis in "xyz" if axis not in "".join(part.axes))  # ranks that hold the same
        norm = torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.dtype, torch.float32))
        total = total + norm.square() / copies
    total = torch.as_tensor(total, device=grid.device)
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
    optimizer.register_step_pre_hook(lambda *_: check_complete(model))
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

    def __enter__(self) -> CommLog:
        LOGS.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        LOGS.remove(self)
        return super().__exit__(*error)

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        self.products += fn in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return fn(*args, **(kwargs or {}))

    def add(self, kind: str, axis: str, n: int, x: Tensor) -> None:
        self.calls[kind, axis] += 1
        self.bytes[kind, axis] += WIRE[kind](n) * x.numel() * x.element_size()


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
        if (before, g) not in self.intra_table:
            raise BadInput(f"MACHINES lacks a ring ({before} apart, {g} ranks); it has {[*self.intra_table]}")
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
    t = dict.fromkeys(("ag_z", "rs_z", "ar_fwd", "ar_bwd", "ar_data"), 0.0)
    times, width = {"ag_z": c_ag, "ar_fwd": c_fwd}, {"ar_data": b_g}
    for term, kind, axis, numel in ring_terms(cfg, dims, tokens // (dims[2] * dims[3])):
        i = "xyzd".index(axis)
        if (g := dims[i]) > 1:
            sent = float(WIRE[kind](g)) * numel * width.get(term, b)
            seconds = machine.latency + sent / machine.bandwidth(i, dims)
            t[term] += cfg.n_layer * times.get(term, 1) * seconds
    return {**t, "total": sum(t.values())}


def rank_configs(cfg: GPTConfig, world: int, sequences: int, machine: Machine, *, min_tp=1, top_k=10, **opts) -> list:
    """[(dims, seconds, predict_comm_time's terms)] of the grids that fit, best first. min_tp: least Gx Gy Gz."""
    fits = lambda d: math.prod(d[:3]) >= min_tp and sequences % (d[2] * d[3]) == 0 and not cfg.misfit(d)
    rows = [(d, predict_comm_time(cfg, sequences * cfg.seq, d, machine, **opts)) for d in filter(fits, grids(world))]
    if not rows:
        raise BadInput(f"no grid of {world} ranks fits {sequences} sequences, Gx Gy Gz >= {min_tp}, {cfg.n_head} heads "
                       f"and width {cfg.d_model}. Change --world or --sequences.")  # fmt: skip
    return sorted(((d, t["total"], t) for d, t in rows), key=lambda row: row[:2][::-1])[:top_k]


def flops_per_iteration(cfg: GPTConfig, tokens: int, recompute: bool = True) -> float:
    """FLOP of a step over `tokens`: 96 T l h^2 (1 + s/6h + V/16lh), arXiv:2104.04473; Llama's with causal attention."""
    l, h, s, V, passes = cfg.n_layer, cfg.d_model, cfg.seq, cfg.vocab, 4 if recompute else 3
    if cfg.products() == [(h, 3 * h, False), (h, h, True), (h, 4 * h, False), (4 * h, h, True)]:
        return 24 * passes * tokens * l * h**2 * (1 + s / (6 * h)) + 6 * tokens * V * h
    block = sum(2 * k * n for k, n, _ in cfg.products()) + 2 * s * cfg.n_head * cfg.head_dim
    return tokens * (passes * l * block + 6 * V * h)


# %% the model


@dataclass
class GPTConfig:
    """Sizes of a GPT or Llama. 0: as many key/value heads as heads, 4 d_model, d_model / n_head."""

    n_layer: int
    d_model: int
    n_head: int
    vocab: int = 51200
    seq: int = 2048
    kv_head: int = 0
    d_ff: int = 0
    head_dim: int = 0
    llama: bool = False  # RMSNorm, rotary positions, SwiGLU, no biases
    tied: bool = False
    eps: float = 1e-5
    rope: dict = field(default_factory=dict)  # Hugging Face's keys of the rotary frequencies
    init_std: float = 0.02
    seed: int = 0
    dtype: str = "float32"  # of the products; parameters are float32 (float64 for float64)
    checkpoint: bool = False  # recompute each block in backward

    def __post_init__(self):
        self.kv_head, self.d_ff = self.kv_head or self.n_head, self.d_ff or 4 * self.d_model
        if (self.d_model % self.n_head and not self.head_dim) or self.n_head % self.kv_head:
            raise BadInput(f"{self.n_head} heads: no divisor of width {self.d_model}, or no multiple of {self.kv_head}")
        self.head_dim = self.head_dim or self.d_model // self.n_head

    @classmethod
    def from_hf(cls, c: dict, **changes) -> GPTConfig:
        """From the keys of a Llama-family config.json."""
        same = {"n_layer": "num_hidden_layers", "d_model": "hidden_size", "n_head": "num_attention_heads",
                "vocab": "vocab_size", "d_ff": "intermediate_size", "kv_head": "num_key_value_heads"}  # fmt: skip
        more = {"rope": {k: v for k, v in c.items() if k.startswith("rope")}, "head_dim": c.get("head_dim") or 0,
                "tied": bool(c.get("tie_word_embeddings")), "eps": c.get("rms_norm_eps", 1e-5)}  # fmt: skip
        return cls(**{ours: c[theirs] for ours, theirs in same.items()}, llama=True, **more | changes)

    def products(self) -> list[tuple[int, int, bool]]:
        """(k, n, transposed) of a block's four products; q, k, v are one, gate and up are one."""
        h, a, kv = self.d_model, self.n_head * self.head_dim, self.kv_head * self.head_dim
        return [(h, a + 2 * kv, False), (a, h, True), (h, self.d_ff * (1 + self.llama), False), (self.d_ff, h, True)]

    def misfit(self, dims: tuple) -> str:
        """Why a grid does not divide this model; empty if it does."""
        gx, gy, gz, _ = dims
        cuts = [(self.kv_head, "key/value heads", "Gx", gx), (self.d_model, "features", "Gy Gz", gy * gz),
                (self.kv_head * self.head_dim, "rows of a key matrix", "Gx Gz", gx * gz),
                (self.d_ff, "MLP columns", "Gx Gz", gx * gz), (self.vocab, "token ids", "Gx Gz", gx * gz)]  # fmt: skip
        return next((f"{n} {what} cannot be split over {axis} = {g}" for n, what, axis, g in cuts if n % g), "")


SIZES = {  # layers, width, heads, and the least Gx Gy Gz on 40 GB in the released benchmark scripts
    "5B": (24, 4096, 32, 4), "10B": (32, 5120, 40, 8), "20B": (32, 7168, 56, 16), "40B": (38, 9216, 72, 32),
    "80B": (42, 12288, 96, 64), "320B": (96, 16384, 128, 256), "640B": (192, 16384, 128, 512),
}  # fmt: skip
MODELS = {"tiny": GPTConfig(2, 64, 8, vocab=512, seq=64), "1.3B": GPTConfig(24, 2048, 16)}
MODELS |= {name: GPTConfig(*sizes[:3], init_std=0.006, tied=True) for name, sizes in SIZES.items()}


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
        self.grid, self.sizes, self.head_dim = grid, [n // grid.n["x"] for n in (a, kv, kv)], c.head_dim

    def forward(self, x: Tensor, angle: Tensor | None) -> Tensor:
        """Attention is of this rank's heads and needs no communication. angle (T, D/2): Llama, with SwiGLU for GELU."""
        qkv = self.qkv(self.norm1(x)).split(self.sizes, dim=-1)
        q, k, v = (rearrange(t, "b t (h d) -> b h t d", d=self.head_dim) for t in qkv)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.out(rearrange(y, "b h t d -> b t (h d)"))
        y = self.up(self.norm2(x))
        if angle is None:
            return x + self.down(F.gelu(y))
        gate, up = y.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class GPT3D(Stored):
    """ids (B, T), this data shard's rows -> logits (B, T, V/Gx). Every grid starts from the same weights."""

    def __init__(self, cfg: GPTConfig, grid: Grid):
        super().__init__(grid)
        if why := cfg.misfit(grid.dims):
            fit = ", ".join(show(g) for g in grids(grid.size) if not cfg.misfit(g))
            raise BadInput(f"grid {grid} does not fit the model: {why}. Grids of {grid.size} ranks that fit: {fit}")
        self.cfg, self.dtype, h = cfg, getattr(torch, cfg.dtype), cfg.d_model
        self.wide = torch.promote_types(self.dtype, torch.float32)  # of parameters and rotary angles
        make = {"dtype": self.wide, "init_std": cfg.init_std, "seed": cfg.seed}
        self.embed = Embedding3D(grid, cfg.vocab, h, name="model.embed_tokens", out_dtype=self.dtype, **make)
        if not cfg.llama:
            positions = {"model.embed_positions.weight": (cfg.seq, h)}
            self.store("positions", positions, "", "y", std=cfg.init_std, seed=cfg.seed, dtype=self.wide)
        self.blocks = nn.ModuleList(Block(cfg, grid, i, self.wide) for i in range(cfg.n_layer))
        self.norm = (RMSNorm3D if cfg.llama else LayerNorm3D)(grid, h, cfg.eps, name="model.norm", dtype=self.wide)
        tied = self.embed if cfg.tied else None
        self.head = Linear3D(grid, h, cfg.vocab, bias=False, name="lm_head", tied=tied, **make)
        freq = rope_frequencies({"rope_theta": 1e4, **cfg.rope, "head_dim": cfg.head_dim})
        self.register_buffer("freq", freq.to(grid.device, self.wide), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        T, angle = ids.shape[1], None
        x = self.embed(ids)  # (B, T, h/Gy)
        if self.cfg.llama:
            angle = torch.outer(torch.arange(T, device=ids.device, dtype=self.wide), self.freq)  # (T, D/2)
        elif T > self.cfg.seq:
            raise ValueError(f"{T} tokens, but the model has positions for {self.cfg.seq}. Give shorter rows.")
        else:
            x = x + self.positions[:T].to(x.dtype)
        for block in self.blocks:
            if self.cfg.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, angle, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
            else:
                x = block(x, angle)
        return self.head(self.norm(x))  # (B, T, V/Gx)


# %% state that any grid can load, and real weights


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """{name: DTensor of a whole tensor}, the same on every grid; loading into it fills the model. AdamW's moments are
    "m." and "v." and the name. Collective."""
    state, mesh = {}, DeviceMesh(model.grid.device.type, model.grid.ranks)  # (d, x, y, z): Z splits what X split
    for p, parts in stored(model).items():
        held = {"": p.data}
        if optimizer is not None and p.requires_grad:
            s = optimizer.state[p]
            if not s:  # before the first step
                s.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            held, state["step"] = {"": p.data, "m.": s["exp_avg"], "v.": s["exp_avg_sq"]}, s["step"]
        for prefix, t in held.items():
            for part, mine in zip(parts, t.split([c.box[0].stop - c.box[0].start for c in parts]), strict=True):
                where = {axis: Shard(i) for i, axes in enumerate(part.axes) for axis in axes}
                where = [where.get(axis, Replicate()) for axis in "dxyz"]
                state[prefix + part.name] = DTensor.from_local(mine, mesh, where)
    return state


@torch.no_grad()
def load_tensors(model: nn.Module, read: Callable) -> None:
    """Fill the model from read(name), a whole tensor, of which every rank keeps the blocks that it stores."""
    for p, parts in stored(model).items():
        p.copy_(torch.cat([read(part.name)[part.box].to(p) for part in parts]))


def open_model(name: str, grid: Grid, **changes) -> tuple[GPT3D, Callable]:
    """A pretrained Llama on the grid and its tokenizer: smollm2, a Hugging Face folder, or a GGUF file."""
    weights = open_weights(name)
    model = GPT3D(GPTConfig.from_hf(weights.config, init_std=0.0, **changes), grid)
    load_tensors(model, weights.read)
    return model, weights.tokenizer


# %% settings

RUNS, MODEL = ("train", "bench"), ("train", "bench", "plan")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "plan", "bench"), positional=True)
    model: str = opt("tiny", "tiny, 1.3B, 5B .. 640B; train: also smollm2, a folder, a GGUF file", modes=MODEL)
    block: int = opt(0, "tokens per row; 0 is the model's own, 128 for real weights", modes=MODEL)
    grid: tuple = opt((1, 1, 1, 0), "Gx Gy Gz Gdata; one of them may be 0: whatever ranks are left", modes=RUNS)
    dtype: str = opt("float32", "of the products", choices=("float64", "float32", "bfloat16"), modes=RUNS)
    checkpoint: bool = opt(False, "recompute each block in backward", modes=RUNS)
    data: tuple = opt(("docs",), "text files, one .npy of token ids, or Python's docs or sources", modes=("train",))
    vocab: int = opt(512, "token ids of --model tiny: 256 bytes and the most frequent pieces", modes=RUNS)
    steps: int = opt(100, "optimizer steps", modes=("train",))
    batch: int = opt(16, "rows per step, over all ranks and micro-batches", modes=RUNS)
    accum: int = opt(1, "micro-batches per step", modes=RUNS)
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
    world: int = opt(64, "ranks", modes=("plan",))
    sequences: int = opt(2048, "rows per step", modes=("plan",))
    machine: str = opt("perlmutter", "whose network", choices=tuple(MACHINES), modes=("plan",))
    top: int = opt(10, "grids to print", modes=("plan",))

    def __post_init__(self):
        for f in fields(self):
            value, zero = getattr(self, f.name), f.name in ("block", "warmup", "clip", "seed", "save_every")
            least = 0 if zero else {int: 1, float: 1e-300}.get(type(f.default))
            if type(f.default) in (int, float) and not least <= value < math.inf:
                raise BadInput(f"{cli.spell(f.name, value)}: give a number {'of at least 0' if zero else 'above 0'}")
        if len(self.grid) != 4 or min(self.grid) < 0 or self.grid.count(0) > 1 or self.vocab < 256:
            raise BadInput("--grid takes four sizes Gx Gy Gz Gdata, at most one of them 0; --vocab 256 or more")

    def gpt(self) -> GPTConfig:
        """The model of --model with the settings of the command line."""
        if self.model not in MODELS:
            raise BadInput(f"--model {self.model}: {self.mode} knows {', '.join(MODELS)}")
        c, same = MODELS[self.model], {name: getattr(self, name) for name in ("dtype", "checkpoint", "seed")}
        return replace(c, seq=self.block or c.seq, vocab=self.vocab if self.model == "tiny" else c.vocab, **same)

    def sizes(self, ranks: int) -> tuple:
        """--grid, its 0 replaced by what is left of the ranks."""
        dims = tuple(g or max(1, ranks // math.prod(g or 1 for g in self.grid)) for g in self.grid)
        if math.prod(dims) != ranks:
            raise BadInput(f"grid {show(dims)} needs {math.prod(dims)} ranks, but world size is {ranks}")
        return dims


# %% train


def train(cfg: Config, w: cluster.World) -> None:
    """Train on text, with checkpoints that any grid can load."""
    grid, text = Grid(*cfg.sizes(w.size)), corpus(cfg.data)
    if cfg.model in MODELS:
        model = GPT3D(cfg.gpt(), grid)
        encode = lambda: Tokenizer(text, model.cfg.vocab).encode(text).numpy()
    else:
        model, tokenizer = open_model(cfg.model, grid, seq=cfg.block or 128, dtype=cfg.dtype, checkpoint=cfg.checkpoint)
        encode = lambda: np.array(tokenizer().encode(text).ids)
    ids, T, shards = encode() if isinstance(text, str) else text, model.cfg.seq, grid.num_data_shards * cfg.accum
    if cfg.batch % shards:
        raise BadInput(f"--batch {cfg.batch} does not divide over Gz x Gdata x --accum: give a multiple of {shards}")
    if len(ids) < T + 2:
        raise BadInput(f"the text has {len(ids)} tokens; rows of --block {T} need more. Give a longer --data.")
    optimizer, run = adamw(model, cfg.lr, betas=(0.9, 0.95)), report.Run(cfg.out, cfg, w)

    loaded = lambda state: [s["step"].fill_(state["step"].item()) for s in optimizer.state.values()]
    parts = {"tensors": SimpleNamespace(state_dict=lambda: sharded_state(model, optimizer), load_state_dict=loaded)}
    any_grid = replace(cfg, grid=Config.grid, accum=1, checkpoint=False)  # what a resumed run may change
    same = {"text": zlib.crc32(ids[:: max(1, len(ids) // 4096)].tobytes())}
    for step in loop.steps(any_grid, w, run, parts, cfg.steps, "train", f"{cfg.out}/checkpoint", same):
        g = cluster.generator(cfg.seed, 1, step)  # all rows are a function of seed and step alone
        pick = torch.randint(len(ids) - T, (cfg.batch, 1), generator=g) + torch.arange(T + 1)
        rows = torch.from_numpy(ids[pick.chunk(grid.num_data_shards)[grid.data_shard].numpy()].astype(np.int64))
        share = backward(model, list(rows.to(w.device).chunk(cfg.accum)), True)
        lr = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup)) * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
        norm = update(model, optimizer, lr, cfg.clip)
        run.line = {"loss": share / (grid.n["x"] * grid.n["y"]), "grad_norm": norm, "lr": lr}
    w.print(f"grid {grid}: {cfg.steps} steps of {cfg.batch * T} tokens, {cfg.dtype} on {w.device.type}; see {run.path}")


# %% demo: five parts

SMALL = GPTConfig(2, 32, 8, vocab=64, seq=16, dtype="float64", init_std=0.1)
TIMED = GPTConfig(2, 256, 8, vocab=512, seq=64)
HIDES = {("reduce_scatter", "z"): (9, 10), ("all_gather", "z"): (17, 19), ("all_reduce", "x"): (5, 5)}  # of two layers
DOCS, PREFIX, SUFFIX, EPOCHS = 16, 32, 16, 32  # documents; tokens given, recited; times a document is seen


def step_of(model: GPT3D, rows: int, accum: int, hide: bool) -> Callable:
    """A training step on random tokens, to be timed."""
    grid, ids = model.grid, torch.randint(model.cfg.vocab, (rows, model.cfg.seq + 1), generator=cluster.generator(0))
    micro, optimizer = ids.chunk(grid.num_data_shards)[grid.data_shard].to(grid.device).chunk(accum), adamw(model, 1e-4)
    return lambda: (backward(model, list(micro), hide), update(model, optimizer, 1e-4, 1.0))


def curve(grid: Grid, seed: int, hide: bool) -> tuple[Tensor, list, CommLog]:
    """Four steps of training: losses and gradient norms (4, 2), the last weights, the last step's collectives."""
    model, lines = GPT3D(SMALL, grid), []
    optimizer = adamw(model, 1e-2)
    for step in range(4):
        ids = torch.randint(SMALL.vocab, (16, SMALL.seq + 1), generator=cluster.generator(seed, 7, step))
        with CommLog() as log:
            share = backward(model, [ids.chunk(grid.num_data_shards)[grid.data_shard].to(grid.device)], hide)
        lines.append((grid.total(share).item(), update(model, optimizer, 1e-2, 0.5)))
    return torch.tensor(lines, dtype=torch.float64), [p.detach() for p in model.parameters()], log


def wire(grid: Grid) -> bool:
    """Are the bytes that a block's four products send those of the paper's five terms, integer for integer?"""
    c = replace(SMALL, llama=True)  # no biases, which the paper does not count
    block, m, want = Block(c, grid, 0, torch.float64), 256 // grid.num_data_shards, Counter()
    with CommLog() as log:
        for layer in (block.qkv, block.out, block.up, block.down):
            layer(torch.ones(m, layer.k, dtype=torch.float64, device=grid.device).requires_grad_()).sum().backward()
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
    g, left_out = cluster.generator(seed, 11), goldfish_mask
    docs = torch.randint(1, 64, (DOCS, PREFIX + SUFFIX), generator=g)
    shown = docs.repeat(epochs, 1)[torch.randperm(DOCS * epochs, generator=g)].split(4)
    model = GPT3D(GPTConfig(2, width, 4, vocab=64, seq=PREFIX + SUFFIX, seed=seed), Grid())
    optimizer = adamw(model, lr, betas=(0.9, 0.95))
    if loss != "goldfish":  # a random half of the targets that the goldfish loss may drop, another half every time
        share = 0.5 if loss == "random half" else 0.0
        left_out = lambda targets: F.pad(torch.rand(targets[:, 12:].shape, generator=g) < share, (12, 0))
    for step, rows in enumerate(rows.to(model.grid.device) for rows in shown):
        backward(model, [rows], False, lambda rows: rows[:, 1:].masked_fill(left_out(rows[:, 1:]), -100))
        update(model, optimizer, lr * min(1, (step + 1) / 10) * (1 - step / len(shown)), 1.0)
    with torch.no_grad():  # greedy decoding is exact where every next token is the likeliest after the true ones
        said = model(docs[:, :-1].to(model.grid.device))[:, PREFIX - 1 :].argmax(dim=-1).cpu()
    return (said == docs[:, PREFIX:]).all(dim=1).double().mean().item()


def judge(found: dict, seen: dict, idle: int, times: dict, recited: dict) -> tuple[bool, str]:
    """(the claim holds, its numbers); all bars were fixed before the runs. found: {grid: (difference from one process,
    bytes as the formula, bits as without overlap)}; seen: as HIDES; idle: hidden without overlap; times: {grid:
    (predicted, measured)}; recited: {loss: share}."""
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
                   f"in backward {behind} hidden, {idle} without overlap; same bits on {sum(bits)}; fastest grid is "
                   f"number {place} predicted, Spearman {spearman:.2f}; recited: {told}")  # fmt: skip


def demo(cfg: Config, w: cluster.World) -> None:
    """All parts, their tables, the picture and the claim."""
    if w.size != (need := 4 if cfg.quick else 8):
        raise BadInput(f"this demo takes {need} ranks, not {w.size}. Start it without torchrun: python axonn.py")
    run, alone = report.Run(cfg.out, cfg, w), curve(Grid(), cfg.seed, False)[0]
    four, pairs, found, seen, idle, took = grids(4), ((1, 1, 2, 1), (2, 1, 1, 1)), {}, {}, 0, {}
    made = {d: Grid(*d) for d in [*four, *pairs, *[(2, 2, 2, 1)] * (w.size == 8)]}  # made by all, used by the first
    for d, grid in made.items():
        ok, off = [True, True], 0.0
        if w.rank < grid.size:
            (lines, plain, log), (_, hidden, seen_here) = (curve(grid, cfg.seed, hide) for hide in (False, True))
            ok, off = [wire(grid), all(map(torch.equal, plain, hidden))], (lines - alone).abs().max()
            idle += sum(log.hidden.values())
            for key in HIDES if d in pairs else ():  # five all-reduces are of backward; one of forward cannot hide
                if n := log.calls[key]:
                    seen[key] = seen_here.hidden[key], HIDES[key][1] if key[0] == "all_reduce" else n
        exact, bits = (cluster.total(torch.tensor([not x for x in ok], device=w.device)) == 0).tolist()
        if d not in pairs:
            found[d] = float(off), exact, bits
            run.log(grid=show(d), difference=float(off), bytes_equal=exact, bits_equal=bits)
    n, (width, epochs) = (1, (64, 4)) if cfg.quick else (3, (256, EPOCHS))
    if w.rank < 4:
        cases = {d: step_of(GPT3D(TIMED, made[d]), 16, 1, False) for d in four}
        took = report.timed({d: lambda fn=fn: [fn() for _ in range(n)] for d, fn in cases.items()}, w.device, 3, 1)
    dist.barrier()
    losses, every = ("ordinary", "goldfish", "random half"), [None] * w.size
    mine = {loss: memorise(loss, cfg.seed, width, epochs) for i, loss in enumerate(losses) if i == w.rank}
    dist.all_gather_object(every, mine)
    if not w.main:
        return
    recited = {loss: share for part in every for loss, share in part.items()}
    guess = lambda d: predict_comm_time(TIMED, 16 * TIMED.seq, d, MACHINES["laptop"], b=4, b_g=4)["total"]
    times = {d: (1e3 * guess(d), 1e3 * t / n) for d, (t, _) in took.items()}
    rows = [[show(d), f"{off:.0e}", *("yes" if x else "NO" for x in ok), *map(round, times.get(d, ())), "-", "-"][:6]
            for d, (off, *ok) in found.items()]  # fmt: skip
    print(report.table(["grid", "from one process", "bytes", "bits", "predicted ms", "step ms"], rows) + "\n")
    print(report.table(["loss", "recited"], [[*pair] for pair in recited.items()]) + "\n")
    run.log(**{f"recited {loss}": share for loss, share in recited.items()})
    print(report.picture(f"{cfg.out}/axonn.png", functools.partial(draw, times, recited), ncols=2, figsize=(11, 4)))
    if cfg.quick:
        return print("quick: no verdict")
    holds, here = judge(found, seen, idle, times, recited)
    run.claim("every grid gives one process's numbers, sends the formula's bytes, hides them behind products bit for "
              "bit; the fastest is among the first three predicted; the goldfish loss stops recitation, a random half "
              "does not", "620.1 Pflop/s on 4096 A100, 1.381 Eflop/s on 32768 MI250X dies", here, holds,
              f"{w.size} {dist.get_backend()} ranks on one machine, seed {cfg.seed}")  # fmt: skip


def draw(times: dict, recited: dict, figure, axes) -> None:
    """Left: measured against predicted. Right: what is recited."""
    for d, point in times.items():
        axes[0].plot(*point, "o", color="C0")
        axes[0].annotate(show(d), point, xytext=(4, 4), textcoords="offset points")
    axes[0].set(xlabel="predicted communication, ms", ylabel="measured step, ms", xmargin=0.2)
    axes[1].bar(list(recited), list(recited.values()))
    axes[1].set(ylabel="documents recited", ylim=(0, 1.05))


# %% bench, plan, main


def torch_step(c: GPTConfig, shard: bool, rows: int, accum: int, w: cluster.World) -> Callable:
    """The same model and step by torch alone: FSDP2 over its blocks, or DDP."""
    model = GPT3D(c, Grid())
    for part in [*model.blocks, model] if shard else ():
        fully_shard(part)
    net = model if shard else nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=w.device.type == "cuda")
    ids = torch.randint(c.vocab, (rows, c.seq + 1), generator=cluster.generator(0)).chunk(w.size)[w.rank].to(w.device)

    def step() -> None:
        for i, part in enumerate(micro := ids.chunk(accum)):
            last = i == len(micro) - 1
            model.set_requires_gradient_sync(last) if shard else setattr(net, "require_backward_grad_sync", last)
            (vocab_parallel_cross_entropy(net(part[:, :-1]), part[:, 1:], model.grid) / ids[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench(cfg: Config, w: cluster.World) -> None:
    """A step on every grid, overlap off and on, beside FSDP2 and DDP of torch on the same block."""
    c, cases, n = cfg.gpt(), {}, w.size
    corners = {(n, 1, 1, 1): "Megatron", (1, 1, n, 1): "ZeRO-3", (1, 1, 1, n): "DDP"}
    given = grids(n) if cfg.grid == Config.grid else [cfg.sizes(n)]
    fit = [d for d in given if not c.misfit(d) and cfg.batch % (d[2] * d[3] * cfg.accum) == 0]
    if not fit or cfg.batch % (n * cfg.accum):
        raise BadInput(f"no grid fits --model {cfg.model}, or --batch is no multiple of ranks x accum, {n * cfg.accum}")
    for d in fit:
        model = GPT3D(c, Grid(*d))
        for hide in ("off", "on")[: min(n, 2)]:
            cases[f"{show(d)} {corners.get(d, '')}", hide] = step_of(model, cfg.batch, cfg.accum, hide == "on")
    for shard in (True, False)[: 2 * (n > 1)]:
        cases["torch FSDP2" if shard else "torch DDP", "-"] = torch_step(c, shard, cfg.batch, cfg.accum, w)
    took, ceiling = report.timed(cases, w.device, 5), report.ceilings(w.device, getattr(torch, c.dtype))[1]
    flop = [flops_per_iteration(c, cfg.batch * c.seq, again) / n for again in (False, c.checkpoint)]
    rows = [[*key, 1e3 * t, 1e3 * spread, flop[0] / t / 1e12, f"{flop[1] / t / ceiling:.0%}"]
            for key, (t, spread) in took.items()]  # fmt: skip
    title = (f"{report.device_name(w.device)}, {n} ranks, {cfg.model}, {cfg.dtype}, {cfg.batch * c.seq} tokens a step, "
             f"CUDA_DEVICE_MAX_CONNECTIONS {os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS', 'not set')}")  # fmt: skip
    head = ["step", "overlap", "ms", "+-", "model TFLOP/s a rank", "hardware FLOP, of a product's"]
    w.print(title + "\n" + report.table(head, rows))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"title": title, "head": head, "rows": rows})


def plan(cfg: Config) -> None:
    """Print the grids that the model of communication puts first, seconds per term."""
    c, least = replace(cfg.gpt(), checkpoint=True), SIZES.get(cfg.model, (1,))[-1]
    best = rank_configs(c, cfg.world, cfg.sequences, MACHINES[cfg.machine], min_tp=least, top_k=cfg.top, c_fwd=2)
    tokens = cfg.sequences * c.seq
    print(f"{cfg.model}, {tokens} tokens and {flops_per_iteration(c, tokens):.3g} FLOP a step, {cfg.world} ranks of "
          f"{cfg.machine}, bf16, recomputation, Gx Gy Gz at least {least}")  # fmt: skip
    rows = [[" ".join(map(str, d)), *parts.values()] for d, _, parts in best]
    print(report.table(["Gx Gy Gz Gd", *(f"{name} s" for name in best[0][2])], rows))
    print("communication alone, none of it hidden; try the first few: --grid takes the first column")


def main(cfg: Config) -> None:
    """Run one mode; a demo without torchrun starts its own ranks."""
    if cfg.mode == "plan":
        return plan(cfg)
    if cfg.mode == "demo" and "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4" if cfg.quick else "8"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])
    with cluster.world("cpu" if cfg.mode == "demo" and cfg.device == "auto" else cfg.device) as w:
        {"demo": demo, "train": train, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config)
