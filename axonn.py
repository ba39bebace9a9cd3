"""AxoNN: train one model on a 4D grid of processes exactly as one process would, and predict which grid is fastest.

Paper    Singh et al., "Democratizing AI: Open-source Scalable LLM Training on GPU-based Supercomputers", SC'24,
         arXiv:2502.08145; the model of communication from "A 4D Hybrid Algorithm to Scale Parallel Training to
         Thousands of GPUs", arXiv:2305.13525.
Idea     Arrange the ranks as Gx x Gy x Gz x Gdata. The first three axes split the three loops of every matrix product,
         the fourth is data parallelism; every second layer swaps X and Y, so that activations never move.
         Megatron's tensor parallelism, ZeRO-3 and hybrid sharding are corners of the grid. Communication hides behind
         products, and a model of ring collectives ranks the grids, so that only the first few need trying.
Here     The claims we check: every grid of 8 ranks gives one process's losses and gradient norms to 1e-12; the wire
         volume is the formula's, integer for integer; overlap changes no bit; the ranking correlates with measured
         steps; a wide model recites what it saw 16 times, a narrow one does not, and the goldfish loss stops it.
         Left out: dropout, pipeline parallelism, the paper's speeds (GPU: not yet measured).
Differs  Weights are gathered again in backward (the paper keeps them; --cache-weights). Norm statistics are of the
         whole width, biases get exact gradients, blocks that Gz does not divide are padded. Only the native layout, no
         re-layout around each layer. q, k, v are one product whose X blocks hold whole heads; key/value heads are never
         replicated. Parameters are the fp32 masters; products cast them. The data-parallel all-reduce overlaps too.
         The laptop's planner uses measured rates and counts every call; `plan` uses the paper's table. The memorisation
         study is a toy on random documents, for Llama models of up to 405B on Wikipedia.

    python axonn.py                                                 # laptop: starts 8 ranks, all claims, the picture
    torchrun --nproc-per-node 2 axonn.py                            # the same on the ranks it is given
    python axonn.py plan --model 20B --world 64 --sequences 2048 --machine perlmutter --top 10
    torchrun --nproc-per-node 4 axonn.py train --grid 2 1 2 1 --device cpu      # --resume goes on, on any grid
    torchrun --nproc-per-node 3 axonn.py train --model smollm2 --grid 3 1 1 1 --batch 2 --steps 3 --lr 1e-5
    python axonn.py bench --ranks 4                                 # waiting per grid, overlap on and off; NN/NT/TN
    python axonn.py bench --model 5B --checkpoint --dtype bfloat16 --batch 16 --accum 4     # one GPU (not yet run)
    torchrun --nnodes $N --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 axonn.py train \\
        --model 20B --grid 8 1 4 2 --tokens-per-step 4194304 --dtype bfloat16 --checkpoint        # (not yet run)

Expect   "all 20 grids of 8 ranks equal one process within 1e-12: yes; volumes exact: yes; overlap bit-equal: yes"
Writes   results/axonn/: metrics.jsonl, claim.json, axonn.png; checkpoint/ (train), bench.json (bench).
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.utils.checkpoint import checkpoint

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.text import Tokenizer, corpus
from common.weights import open_weights, rope_frequencies, rotate


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "plan", "bench"), positional=True)
    ranks: int = opt(8, "demo and bench without torchrun: local processes to start")
    # the model and the grid
    model: str = opt("tiny", "tiny, 1.3B, 5B .. 640B, or real weights: smollm2, a Hugging Face folder, a GGUF file")
    block: int = opt(0, "tokens per row that are predicted; 0 is the model's own, 128 for real weights")
    grid: tuple = opt((1, 1, 1, 0), "Gx Gy Gz Gdata; one of them may be 0: whatever ranks are left")
    dtype: str = opt("float32", "of the products", choices=("float64", "float32", "bfloat16", "float16"))
    checkpoint: bool = opt(False, "recompute each block in backward")
    cache_weights: bool = opt(False, "keep gathered weights from forward to backward")
    overlap: bool = opt(True, "hide communication behind computation")
    compile: bool = opt(False, "torch.compile what lies between the collectives")
    tune: bool = opt(False, "time the ways to multiply and keep the fastest")
    check_data: bool = opt(False, "check that X and Y ranks read the same tokens")
    # training
    data: tuple = opt(("docs",), "text files, or docs or sources: Python's own")
    vocab: int = opt(512, "token ids of --model tiny: 256 bytes and the most frequent pieces")
    steps: int = opt(100, "optimizer steps")
    batch: int = opt(16, "rows per step, over all ranks and micro-batches")
    tokens_per_step: int = opt(0, "sets --batch to so many tokens; 0 is off")
    accum: int = opt(1, "micro-batches per step")
    lr: float = opt(1e-3, "peak learning rate of AdamW; cosine to a tenth")
    warmup: int = opt(10, "steps of linear warm-up")
    weight_decay: float = opt(0.1, "of matrices")
    clip: float = opt(1.0, "largest gradient norm")
    seed: int = opt(0, "seed of the weights and the data order")
    device: str = opt("auto", "where to run; the demo's auto is the CPU", choices=("auto", "cpu", "cuda"))
    out: str = opt("results/axonn", "folder of what the run writes, and of the run to resume")
    resume: bool = opt(False, "train: go on from the checkpoint in --out, on this grid or another")
    save_every: int = opt(50, "steps between checkpoints; 0 writes only the last")
    log_every: int = opt(1, "steps between lines in metrics.jsonl")
    # plan
    world: int = opt(64, "plan: ranks")
    sequences: int = opt(2048, "plan: rows per step")
    machine: str = opt("perlmutter", "plan: perlmutter, frontier, or other with the three flags below")
    gpus_per_node: int = opt(8, "plan: of machine other")
    inter_bw: float = opt(0.0, "plan: GB/s of a node's network, of machine other")
    intra_bw: float = opt(0.0, "plan: GB/s of a ring inside a node, where the table has none")
    alpha: float = opt(0.0, "plan: seconds of latency per collective and member")
    min_tp: int = opt(0, "plan: least Gx Gy Gz, so that the model fits in memory; 0: enough for 40 GB")
    top: int = opt(10, "plan: grids to print")

    def __post_init__(self):
        for name in ("ranks", "steps", "batch", "accum", "world", "sequences", "top", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if len(self.grid) != 4 or min(self.grid) < 0 or sum(g == 0 for g in self.grid) > 1:
            raise ValueError(f"--grid takes four sizes Gx Gy Gz Gdata, at most one of them 0, got {self.grid}")
        if self.mode == "plan" and self.machine == "other" and not (self.inter_bw > 0 and self.intra_bw > 0):
            raise ValueError("--machine other needs --gpus-per-node, --inter-bw and --intra-bw (GB/s)")


# ---- the method: a grid of ranks
#
# x y z d       a rank's place; Gx Gy Gz Gd the grid          I (m, k)   a layer's input, m tokens
# W (n, k)      a weight, stored as PyTorch does              O (m, n)   its output, O = I W^T
#
# Z splits m, Y splits k, X splits n; the data axis d repeats it all on other tokens. A transposed layer exchanges X and
# Y, so that the output of one layer lies as the input of the next one must.

# torch 2.13 renames the two flat collectives
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@functools.cache  # making a group is slow, and grids share them
def _group(world, ranks: tuple, spare: bool, backend: str | None):
    """The process group of these global ranks; `spare` asks for a second one of them. Collective."""
    return dist.new_group(ranks, backend=backend)


class _Work:
    """A collective under way. Holds its tensors until wait(), which must run before anyone reads the result."""

    def __init__(self, work=None, *kept: Tensor):
        self.work, self.kept = work, kept

    def wait(self) -> None:
        """Until the result is there; the second call does nothing."""
        if self.work is not None:
            start = time.perf_counter()
            self.work.wait()
            for log in _LOGS:
                log.seconds += time.perf_counter() - start
        self.work = self.kept = None


class Grid:
    """Gx x Gy x Gz x Gdata ranks, rank = x + Gx (y + Gy (z + Gz d)): X is the most local axis.

    dims, size       the grid and its number of ranks
    x y z d          this rank's place; data_shard of num_data_shards says which rows of the batch are its own
    ranks            global ranks of the grid, default all. All ranks of the job must make the grid; outside of it
                     `member` is False. Making it is collective.

    ValueError: a size that is no positive integer, or sizes that do not multiply to the number of ranks.
    """

    def __init__(self, gx: int = 1, gy: int = 1, gz: int = 1, gdata: int = 1, *, backend=None, ranks=None):
        self.dims = (gx, gy, gz, gdata)
        for axis, g in zip(("gx", "gy", "gz", "gdata"), self.dims, strict=True):
            if type(g) is not int or g < 1:
                raise ValueError(f"{axis} must be an integer of at least 1, got {g!r} in grid {self}")
        self.size = math.prod(self.dims)
        start = f"torchrun --nproc-per-node {self.size} axonn.py ..."
        if not dist.is_initialized():
            if self.size > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise BadInput(f"grid {self} needs {self.size} ranks and there is no process group. Start: {start}")
            dist.init_process_group(backend or "gloo", rank=0, world_size=1, store=dist.HashStore())
        ranks = tuple(range(dist.get_world_size()) if ranks is None else ranks)
        if self.size != len(ranks):
            needs = f"grid {self} needs {self.size} ranks, but world size is {len(ranks)}"
            raise BadInput(f"{needs}. Change --grid or start {self.size}: {start}")
        on_gpu = dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        place = torch.arange(self.size).reshape(gdata, gz, gy, gx)
        self.n = axis_sizes(self.dims)
        self.groups, me = {}, dist.get_rank()
        for name in ("x", "y", "z", "d", "t", "z2"):  # z2: prefetched gathers must not queue behind reduce-scatters
            axis = "dzyx".find(name[0])
            rows = (place if name == "t" else place.movedim(axis, 3)).reshape(-1, self.n[name[0]])
            for row in rows.tolist():
                row = tuple(ranks[i] for i in row)
                group = _group(dist.group.WORLD, row, name == "z2", backend) if len(row) > 1 else None
                if me in row:
                    self.groups[name] = group
        self.member = me in ranks
        if self.member:
            self.d, self.z, self.y, self.x = (place == ranks.index(me)).nonzero()[0].tolist()
            self.data_shard, self.num_data_shards = self.d * gz + self.z, gz * gdata

    def __str__(self):
        return show(self.dims)

    def _start(self, kind: str, axis: str, x: Tensor, call: Callable, *args, group: str = "") -> _Work:
        """Count a collective whose input is x, and start it; a single rank needs none."""
        if self.n[axis] == 1:
            return _Work()
        for log in _LOGS:
            log.add(kind, axis, self.n[axis], x)
        return _Work(call(*args, group=self.groups[group or axis], async_op=True), *args)

    def all_reduce(self, x: Tensor, axis: str, op=dist.ReduceOp.SUM, wait: bool = True) -> _Work:
        """Reduce contiguous x in place over the ranks along `axis`, one of x y z d t."""
        work = self._start("all_reduce", axis, x, dist.all_reduce, x, op)
        if wait:
            work.wait()
        return work

    def all_gather(self, shard: Tensor, prefetch: bool = False) -> tuple[Tensor, _Work]:
        """The flat chunks (c,) of all z joined, (Gz c,)."""
        whole = shard.new_empty(shard.numel() * self.n["z"]) if self.n["z"] > 1 else shard
        group = "z2" if prefetch else "z"
        return whole, self._start("all_gather", "z", shard, _all_gather, whole, shard, group=group)

    def reduce_scatter(self, whole: Tensor) -> tuple[Tensor, _Work]:
        """Sum of whole (Gz c,) over z, of which this rank gets chunk z, (c,)."""
        chunk = whole.new_empty(whole.numel() // self.n["z"]) if self.n["z"] > 1 else whole
        return chunk, self._start("reduce_scatter", "z", whole, _reduce_scatter, chunk, whole)

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over the shards of the batch (Z and data), as a new tensor. X and Y hold the same already."""
        x = x.detach().clone()
        for axis in "zd":
            self.all_reduce(x, axis)
        return x


def axis_sizes(dims: tuple) -> dict[str, int]:
    """Ranks along x y z d, and t: the ranks of one model replica."""
    return dict(zip("xyzdt", (*dims, math.prod(dims[:3])), strict=True))


show = lambda dims: "x".join(map(str, dims))


def grids(size: int) -> list[tuple[int, int, int, int]]:
    """All (Gx, Gy, Gz, Gdata) of `size` ranks."""
    parts = [n for n in range(1, size + 1) if size % n == 0]
    return [g for g in itertools.product(parts, repeat=4) if math.prod(g) == size]


# ---- the method: 3D layers


def _accumulate(p: nn.Parameter, g: Tensor) -> None:
    p.grad = g.detach().to(p.dtype) if p.grad is None else p.grad.add_(g)


class _Linear(torch.autograd.Function):
    """Forward and backward of Linear3D, with their collectives."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        """x (m, k/Gy) -> (m, n/Gx); weight is an argument only so that autograd knows of it."""
        W = layer.gathered(x.dtype)  # all-gather over Z: (n/Gx, k/Gy)
        y = layer.matmul["O"](x, W.T)  # (m, n/Gx), partial over Y
        layer.grid.all_reduce(y, layer.axis_in)
        ctx.layer = layer
        ctx.save_for_backward(x, W if layer.cache_weights else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        """dO (m, n/Gx) -> dI (m, k/Gy); dW goes to weight.grad by reduce-scatter."""
        layer, (x, W), dy = ctx.layer, ctx.saved_tensors, dy.contiguous()
        grid, flight, dx, work = layer.grid, layer.flight, None, _Work()
        need_x, need_w = ctx.needs_input_grad[0], layer.weight.requires_grad
        dW = lambda: layer.scatter(layer.matmul["dW"](dy.T, x))  # dO^T I: (n/Gx, k/Gy)
        first = need_w and flight is not None and flight.ors and grid.n[layer.axis_out] == 1
        if first:
            dW()  # no all-reduce to hide, so the reduce-scatter hides behind dO W
        if need_x:
            W = layer.gathered(dy.dtype) if W is None else W
            dx = layer.matmul["dI"](dy, W)  # dO W: (m, k/Gy), partial over X
            work = grid.all_reduce(dx, layer.axis_out, wait=flight is None or not flight.oar)
        if need_w and not first:
            dW()
        work.wait()
        return dx, None, None


class Linear3D(nn.Module):
    """O = I W^T + b on the grid. I (..., k/Gy), split over Z by rows -> O (..., n/Gx); transposed: X and Y exchanged.

    in_features, out_features  of the whole layer; `parts` {name: width} fuses several matrices of one input, each split
                               by itself so that every rank holds whole parts of all (q, k, v; gate, up)
    weight   flat (size,): chunk z of this rank's row-major [out, in] block. bias: (n/Gx,) like O, equal along its rest
    tied     another layer whose weight this one shares. pad: extra output rows, zero, up to a multiple of the axis

    backward() adds the weight's gradient, summed over Z, to weight.grad itself; sync_gradients does the rest.
    ValueError: a width that its axis does not divide; an input of another width or without tokens.
    """

    flight: "_Flight | None" = None  # set inside overlap()
    cache_weights = False  # keep the gathered block from forward to backward instead of gathering it again
    bucket = ""  # layers of one bucket share a data-parallel all-reduce

    def __init__(
        self, grid: Grid, in_features: int, out_features: int, *, bias: bool = True, transposed: bool = False,
        name: str = "", init_std: float = 0.02, dtype=None, device=None, parts: dict | None = None, seed: int = 0,
        pad: bool = False, tied: "Linear3D | None" = None,
    ):  # fmt: skip
        super().__init__()
        self.grid, self.name = grid, name
        self.axis_in, self.axis_out = ("x", "y") if transposed else ("y", "x")
        here_in, here_out = getattr(grid, self.axis_in), getattr(grid, self.axis_out)
        k, pieces = _part(name, "input features", in_features, grid, self.axis_in), []
        for part, n in (parts or {name: out_features}).items():
            padded = -(-n // grid.n[self.axis_out]) * grid.n[self.axis_out] if pad else n
            rows = _part(part, "output features", padded, grid, self.axis_out)
            pieces.append((f"{part}.weight", (n, in_features), here_out * rows, rows))
        self.in_local, self.out_local, self.bias = k, sum(p[3] for p in pieces), None
        self.weight = tied.weight if tied else _matrix(grid, pieces, here_in * k, k, init_std, seed, dtype, device)
        if bias:
            pieces = [(name.removesuffix("weight") + "bias", s[:1], *rows) for name, s, *rows in pieces]
            self.bias = _vector(grid, pieces, self.axis_out, 0.0, dtype, device)
        self.matmul = dict.fromkeys(("O", "dI", "dW"), torch.matmul)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k/Gy) -> (..., n/Gx)."""
        if x.shape[-1] != self.in_local or x.numel() == 0:
            raise ValueError(f"layer {self.name or '(unnamed)'} on grid {self.grid} takes (..., {self.in_local}) with "
                             f"at least one token, got {tuple(x.shape)}")  # fmt: skip
        y = _Linear.apply(x.reshape(-1, self.in_local), self.weight, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)  # after the all-reduce: every rank along it adds the same bias once
        return y.reshape(*x.shape[:-1], self.out_local)

    def gathered(self, dtype: torch.dtype) -> Tensor:
        """The block of W, (rows, cols), in `dtype`."""
        if self.flight is not None and self.grid.n["z"] > 1:
            whole = self.flight.gather(self, dtype)
        else:
            whole, work = self.grid.all_gather(self.weight.detach().to(dtype))
            work.wait()
        layout = self.weight.where
        return whole[: layout.rows * layout.cols].view(layout.rows, layout.cols)

    def scatter(self, dW: Tensor) -> None:
        """Sum dW (rows, cols) over Z and add this rank's chunk to weight.grad, now or at the end of overlap()."""
        layout = self.weight.where
        flat = F.pad(dW.reshape(-1), (0, layout.size * layout.gz - dW.numel()))
        chunk, work = self.grid.reduce_scatter(flat)
        if self.flight is not None:
            self.flight.scattered(self, chunk, work)
        else:
            work.wait()
            _accumulate(self.weight, chunk)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, layer, dtype):
        """ids (...) -> (..., h/Gy)."""
        W = layer.gathered(dtype)  # (V/Gx, h/Gy)
        local = ids - layer.first
        mine = (local >= 0) & (local < W.shape[0])
        local = torch.where(mine, local, 0)
        y = torch.where(mine[..., None], W[local], 0)  # (..., h/Gy), zero where another rank has the row
        layer.grid.all_reduce(y, "x")
        ctx.layer, ctx.shape = layer, W.shape
        ctx.save_for_backward(local, mine)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        local, mine = ctx.saved_tensors
        dW = dy.new_zeros(ctx.shape)  # (V/Gx, h/Gy)
        dW.index_add_(0, local[mine], dy[mine])
        ctx.layer.scatter(dW)
        return None, None, None, None


class Embedding3D(Linear3D):
    """ids (...) -> (..., h/Gy): the matrix of an output layer, V over X and h over Y, of which rows are looked up.

    IndexError: an id outside [0, vocab).
    """

    def __init__(self, grid: Grid, vocab: int, dim: int, *, name: str = "embedding", out_dtype=None, **options):
        super().__init__(grid, dim, vocab, bias=False, name=name, pad=True, **options)
        self.vocab, self.first, self.out_dtype = vocab, grid.x * self.out_local, out_dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> (..., h/Gy)."""
        _check_ids((ids < 0) | (ids >= self.vocab), ids, f"token id outside [0, {self.vocab})")
        return _Embedding.apply(self.weight, ids, self, self.out_dtype or self.weight.dtype)


def _check_ids(bad: Tensor, ids: Tensor, what: str) -> None:
    if bad.is_cuda:  # without a host synchronisation
        torch._assert_async(~bad.any(), what)
    elif bad.any():
        raise IndexError(f"{what}: {ids[bad][0].item()}")


class _Statistic(torch.autograd.Function):
    """Sum over Y of a number a token, (..., 1), that all ranks along Y use: its gradient is a sum over Y again."""

    @staticmethod
    def forward(ctx, x, grid):
        ctx.grid, x = grid, x.clone()
        grid.all_reduce(x, "y")
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        g = g.clone(memory_format=torch.contiguous_format)
        ctx.grid.all_reduce(g, "y")
        return g, None


class LayerNorm3D(nn.Module):
    """x (..., h/Gy) -> the same: mean and variance of all h features, so any Gy gives what one process gives."""

    centre = True

    def __init__(self, grid: Grid, dim: int, eps: float = 1e-5, *, name: str = "norm", dtype=None, device=None):
        super().__init__()
        self.grid, self.dim, self.eps, k = grid, dim, eps, _part(name, "features", dim, grid, "y")
        make = lambda what, v: _vector(grid, [(f"{name}.{what}", (dim,), grid.y * k, k)], "y", v, dtype, device)
        self.weight, self.bias = make("weight", 1.0), make("bias", 0.0) if self.centre else None

    def forward(self, x: Tensor) -> Tensor:
        """Statistics in fp32 at least, result in the dtype of x."""
        weight, bias, h = self.weight, self.bias, self.dim
        if self.grid.n["y"] == 1:  # one kernel where one rank has all
            if bias is None:
                return F.rms_norm(x, (h,), weight.to(x.dtype), self.eps)
            return F.layer_norm(x, (h,), weight.to(x.dtype), bias.to(x.dtype), self.eps)
        c = x.to(torch.promote_types(x.dtype, torch.float32))
        if bias is not None:
            c = c - _Statistic.apply(c.sum(dim=-1, keepdim=True), self.grid) / h
        var = _Statistic.apply(c.square().sum(dim=-1, keepdim=True), self.grid) / h  # E[x^2] - E[x]^2 loses digits
        y = c * (var + self.eps).rsqrt() * weight
        return (y if bias is None else y + bias).to(x.dtype)


class RMSNorm3D(LayerNorm3D):
    """As LayerNorm3D, without the mean and the bias."""

    centre = False


class _CrossEntropy(torch.autograd.Function):
    """Per-token losses; logits are read in fp32 (fp64 for fp64) some rows at a time, so no wide copy of them exists."""

    @staticmethod
    def forward(ctx, logits, targets, grid, ignore_index):
        """logits (m, V/Gx), targets (m,) -> (m,)."""
        v, wide = logits.shape[1], torch.promote_types(logits.dtype, torch.float32)
        keep, local = targets != ignore_index, targets - grid.x * v
        mine = keep & (local >= 0) & (local < v)
        local = torch.where(mine, local, 0)
        m = logits.amax(dim=1).to(wide)  # (m,)
        grid.all_reduce(m, "x", dist.ReduceOp.MAX)
        st = m.new_zeros(2, len(m))  # sum of exp(l - m), and the target's l - m
        ctx.step = max(1, 2**24 // v)
        for i in range(0, len(m), ctx.step):
            rows = slice(i, i + ctx.step)
            st[0, rows] = (logits[rows].to(wide) - m[rows, None]).exp().sum(dim=1)
        st[1] = torch.where(mine, logits.gather(1, local[:, None])[:, 0].to(wide) - m, 0)
        grid.all_reduce(st, "x")
        bad = keep & ((targets < 0) | (targets >= v * grid.n["x"]) | st[1].isneginf())  # padded logits are -inf
        _check_ids(bad, targets, "target outside the vocabulary and not ignore_index")
        ctx.save_for_backward(logits, st[0].log() + m, keep, mine, local)
        return torch.where(keep, st[0].log() - st[1], 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        logits, lse, keep, mine, local = ctx.saved_tensors
        g, dlogits = torch.where(keep, dloss, 0), torch.empty_like(logits)
        for i in range(0, len(lse), ctx.step):
            rows = slice(i, i + ctx.step)
            p = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_() * g[rows, None]  # softmax, (rows, V/Gx)
            dlogits[rows] = p.scatter_add_(1, local[rows, None], -(g * mine)[rows, None])  # - onehot
        return dlogits, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, grid: Grid, *, ignore_index: int = -100, reduction: str = "sum"
) -> Tensor:
    """Cross-entropy of logits (..., V/Gx) split over X and targets (...), the same on all X -> token sum, or (...).

    "sum" is this rank's sum over its tokens, "none" the losses. Divide by global_count, not by a local count: ranks may
    mask differently. IndexError: a target that is no token and not ignore_index. ValueError: another reduction, shapes.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; choose sum or none; for the mean divide by global_count")
    if logits.shape[:-1] != targets.shape or not targets.numel():
        shapes = f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes} do not fit, or have no token")
    loss = _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), grid, ignore_index)  # (m,)
    return loss.sum() if reduction == "sum" else loss.reshape(targets.shape)


def global_count(targets: Tensor, grid: Grid, ignore_index: int = -100) -> Tensor:
    """Unmasked targets of all data shards, at least 1: with it, gradients need only sums and masks may differ."""
    return grid.total((targets != ignore_index).sum()).clamp(min=1)


def check_same_tokens(ids: Tensor, grid: Grid) -> None:
    """RuntimeError: ranks along X or Y were given other tokens than this one. One small all-reduce per axis."""
    h = torch.tensor(zlib.crc32(ids.cpu().contiguous().numpy().tobytes()), device=grid.device)
    for axis in "xy":
        ends = torch.stack([h, -h])  # the least and, negated, the largest
        grid.all_reduce(ends, axis, dist.ReduceOp.MIN)
        if ends[0] != -ends[1]:
            raise RuntimeError(f"ranks along {axis.upper()} of grid {grid} were given different tokens. All X and Y "
                               f"ranks of a data shard must read the same rows: those of grid.data_shard.")  # fmt: skip


# ---- the method: where a rank's part of a tensor lies


@dataclass(frozen=True)
class Layout:
    """A rank's part of one parameter: columns col .. col+cols of some rows of each piece, then flat chunk z of Gz.

    pieces: (name, shape of the whole tensor, first row here, rows here) - a fused matrix has several, and rows past the
    end of the whole tensor are padding. A vector is a matrix with one column. The chunks are of the row-major
    (rows, cols) block, padded with zeros to Gz equal ones.
    """

    pieces: tuple
    col: int
    cols: int
    z: int = 0
    gz: int = 1

    @property
    def rows(self) -> int:
        return sum(p[3] for p in self.pieces)

    @property
    def size(self) -> int:
        """Elements that this rank stores."""
        return -(-self.rows * self.cols // self.gz)

    def boxes(self) -> Iterator[tuple]:
        """(name, shape, first element here, row, column, rows, columns) of each box of a whole tensor stored here."""
        start = -self.z * self.size  # of the piece, in this rank's chunk
        for name, shape, row, rows in self.pieces:
            a = max(0, -start)
            b = min(self.size - start, self.cols * min(rows, max(0, shape[0] - row)))
            while a < b:
                r, c = divmod(a, self.cols)
                n = min(self.cols - c, b - a) if c or b - a < self.cols else (b - a) // self.cols * self.cols
                yield name, shape, start + a, row + r, self.col + c, max(1, n // self.cols), min(n, self.cols)
                a += n
            start += rows * self.cols

    @torch.no_grad()
    def fill(self, flat: Tensor, get: Callable) -> Tensor:
        """flat (size,) from get(name, rows, cols), slices of the whole tensor. Padding becomes zero."""
        flat.zero_()
        for name, shape, at, r, c, nr, nc in self.boxes():
            cols = (slice(c, c + nc),) if len(shape) == 2 else ()
            flat[at : at + nr * nc] = get(name, slice(r, r + nr), *cols).reshape(-1).to(flat)
        return flat


def normal(name: str, shape: tuple, rows: slice, cols: slice, std: float, seed: int) -> Tensor:
    """Rows and columns of the matrix that `name` starts from, the same on every grid, drawn 256 rows at a time."""
    if std == 0:  # to be filled from a file
        return torch.zeros(rows.stop - rows.start, cols.stop - cols.start)
    step, drawn = 256, []
    for first in range(rows.start // step * step, rows.stop, step):
        g = cluster.generator(seed, zlib.crc32(name.encode()), first)
        block = torch.randn(step, shape[1], generator=g)  # (256, k), more rows than the whole has at its end
        drawn.append(block[max(0, rows.start - first) : rows.stop - first, cols])
    return torch.cat(drawn) * std


def _parameter(grid: Grid, layout: Layout, kind: str, split: str, get: Callable, dtype, device) -> nn.Parameter:
    """A flat parameter. kind: matrix (weight decay) or vector. split: axes of xyz along which parts differ."""
    flat = torch.empty(layout.size, dtype=dtype or torch.get_default_dtype(), device=device or grid.device)
    p = nn.Parameter(layout.fill(flat, get))
    p.where, p.kind, p.split = layout, kind, split
    return p


def _matrix(grid, pieces: list, col: int, cols: int, std: float, seed: int, dtype, device, split="xyz") -> nn.Parameter:
    """A normal start, the same on every grid; chunks over Z where `split` has it."""
    chunk = (grid.z, grid.n["z"]) if "z" in split else (0, 1)
    shapes = {name: shape for name, shape, *_ in pieces}
    get = lambda name, rows, cols: normal(name, shapes[name], rows, cols, std, seed)
    return _parameter(grid, Layout(tuple(pieces), col, cols, *chunk), "matrix", split, get, dtype, device)


def _vector(grid, pieces: list, axis: str, value: float, dtype, device) -> nn.Parameter:
    """One value everywhere to begin with; parts along `axis`, equal on all other ranks."""
    get = lambda name, rows: torch.full((rows.stop - rows.start,), value)
    return _parameter(grid, Layout(tuple(pieces), 0, 1), "vector", axis, get, dtype, device)


def _part(name: str, what: str, n: int, grid: Grid, axis: str) -> int:
    if n % grid.n[axis]:
        raise ValueError(f"layer {name or '(unnamed)'}: {n} {what} cannot be split over G{axis} = {grid.n[axis]} of "
                         f"grid {grid}. Choose a G{axis} that divides {n}.")  # fmt: skip
    return n // grid.n[axis]


# ---- the method: communication hidden behind computation


def _layers(model: nn.Module) -> list[Linear3D]:
    return [m for m in model.modules() if isinstance(m, Linear3D)]


def _grid_of(model: nn.Module) -> Grid:
    return next(m.grid for m in model.modules() if hasattr(m, "grid"))


class _Reduction:
    """Sum of some gradients over data (and Z before it), flattened into one buffer. Final gradients carry a mark."""

    def __init__(self, grid: Grid, params: list[nn.Parameter], axes: str):
        trained = [p for p in dict.fromkeys(params) if p.grad is not None]  # a tied weight once
        self.params = [p for p in trained if getattr(p.grad, "final", None) != p.grad._version]
        if any(hasattr(p.grad, "final") for p in self.params):
            raise RuntimeError("gradients were synchronised and then added to. Call zero_grad() after each step.")
        axes = [a for a in axes if grid.n[a] > 1 and self.params]
        self.flat = torch.cat([p.grad for p in self.params]) if axes else None
        self.works = [grid.all_reduce(self.flat, a, wait=a != axes[-1]) for a in axes]

    def finish(self) -> None:
        """Put the sums in place of the gradients."""
        for work in self.works:
            work.wait()
        if self.works:
            for p, g in zip(self.params, self.flat.split([p.numel() for p in self.params]), strict=True):
                p.grad.copy_(g)
        for p in self.params:
            p.grad.final = p.grad._version


def _buckets(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained weights, once for each layer that uses them, by the data-parallel all-reduce that they share."""
    buckets = defaultdict(list)
    for layer in _layers(model):
        if layer.weight.requires_grad:
            buckets[layer.bucket].append(layer.weight)
    return buckets


def _reduce_vectors(model: nn.Module) -> _Reduction:
    """Biases, norms, positions: backward leaves them summed over local tokens only."""
    own = {id(layer.weight) for layer in _layers(model)}
    return _Reduction(_grid_of(model), [p for p in model.parameters() if p.requires_grad and id(p) not in own], "zd")


def sync_gradients(model: nn.Module) -> None:
    """Complete the gradients after the last micro-batch: weights over data, vectors over Z and data. Collective.

    Again without a new backward does nothing. RuntimeError: gradients were added to after it, or overlap() is open.
    """
    _check_landed(model)
    under_way = [_Reduction(_grid_of(model), weights, "d") for weights in _buckets(model).values()]
    for r in [*under_way, _reduce_vectors(model)]:
        r.finish()


class _Flight:
    """What overlap() has in the air: prefetched gathers, reduce-scatters, data-parallel all-reduces."""

    def __init__(self, model: nn.Module, oar: bool, ors: bool, oag: bool, micro_batches: int):
        self.model, self.oar, self.ors, self.oag, self.micro_batches = model, oar, ors, oag, micro_batches
        self.grid, self.buckets = _grid_of(model), _buckets(model)
        self.order = model.__dict__.setdefault("_gather_order", [])  # who gathered when in the context before
        self.at, self.ahead = 0, (None, None, _Work())  # place in `order`; the prefetch: (layer, dtype), whole, work
        self.scatters, self.seen, self.ready, self.reductions = [], defaultdict(int), [], {}

    def gather(self, layer: Linear3D, dtype: torch.dtype) -> Tensor:
        """The whole flat block of `layer`; then start the gather that followed this one last time."""
        key, whole, work = self.ahead
        self.ahead = (None, None, _Work())
        if key != (layer, dtype):
            work.wait()
            whole, work = self.grid.all_gather(layer.weight.detach().to(dtype))
        if self.order[self.at : self.at + 1] != [(layer, dtype)]:  # first time, or another order than before
            self.order[self.at :] = [(layer, dtype)]
        self.at += 1
        if self.oag and self.at < len(self.order):
            then, dtype = self.order[self.at]
            self.ahead = ((then, dtype), *self.grid.all_gather(then.weight.detach().to(dtype), prefetch=True))
        work.wait()
        return whole

    def scattered(self, layer: Linear3D, chunk: Tensor, work: _Work) -> None:
        """A reduce-scatter was started; land it now without ors. Start the data all-reduce of buckets that are full."""
        name = layer.bucket
        self.scatters.append((layer, chunk, work))
        if not self.ors:
            self.land()
        self.seen[name] += 1
        uses = self.micro_batches * len(self.buckets[name])
        if self.micro_batches and self.seen[name] > uses:
            raise RuntimeError(f"more backward passes than overlap(micro_batches={self.micro_batches}) announced")
        if self.micro_batches and self.seen[name] == uses:
            for full in self.ready:  # not the newest: its reduce-scatters have only begun
                self.reduce(full)
            self.ready = [name]

    def land(self, bucket: str | None = None) -> None:
        """Wait for the reduce-scatters of one bucket, or all, and add them to the gradients, in their order."""
        for layer, chunk, work in self.scatters:
            if bucket in (None, layer.bucket):
                work.wait()
                _accumulate(layer.weight, chunk)
        self.scatters = [s for s in self.scatters if bucket not in (None, s[0].bucket)]

    def reduce(self, bucket: str) -> None:
        self.land(bucket)
        self.reductions[bucket] = _Reduction(self.grid, self.buckets[bucket], "d")

    def finish(self) -> None:
        """Wait for everything; the gradients are final."""
        self.ahead[2].wait()
        del self.order[self.at :]
        self.land()
        for name in self.buckets:
            if name not in self.reductions:
                self.reduce(name)
        for r in [*self.reductions.values(), _reduce_vectors(self.model)]:
            r.finish()


@contextlib.contextmanager
def overlap(
    model: nn.Module, *, oar: bool = True, ors: bool = True, oag: bool = True, micro_batches: int = 0
) -> Iterator[None]:
    """Around all forward and backward passes of a step: hide communication. On exit the gradients are final.

    oar  all-reduce dI while dW is computed.  ors  reduce-scatter dW behind the rest of backward.
    oag  gather the next layer's W behind this layer's product (in the order of the step before).
    micro_batches  backward passes inside; if told, the data all-reduce of a layer starts in the last of them.

    Only the time of the collectives changes: gloo gives the same bits as without, followed by sync_gradients.
    Inside, clip_grad_norm_ and the optimizer raise RuntimeError.
    """
    _check_landed(model)
    flight = _Flight(model, oar, ors, oag, micro_batches)
    try:
        for layer in _layers(model):
            layer.flight = flight
        yield
        flight.finish()
    finally:
        for layer in _layers(model):
            layer.flight = None


def _check_landed(model: nn.Module) -> None:
    if any(layer.flight is not None for layer in _layers(model)):
        raise RuntimeError("gradients are still in flight: leave overlap() before clipping, synchronising or stepping")


def clip_grad_norm_(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients so that their global norm is at most max_norm; returns the norm before. Collective.

    A NaN or Inf on any rank makes it non-finite on all, and then nothing is scaled. RuntimeError: inside overlap(), or
    gradients not synchronised.
    """
    _check_landed(model)
    grid, total = _grid_of(model), 0.0
    params = [p for p in model.parameters() if p.grad is not None]
    for p in params:
        if getattr(p.grad, "final", None) != p.grad._version:
            raise RuntimeError("gradients are not synchronised. Call sync_gradients(model) after backward().")
        copies = math.prod(grid.n[a] for a in "xyz" if a not in p.split)  # ranks of T that hold the same values
        total = total + p.grad.square().sum(dtype=torch.promote_types(p.dtype, torch.float32)) / copies
    total = torch.as_tensor(total, device=grid.device).reshape(1)
    grid.all_reduce(total, "t")
    norm = math.sqrt(total.item()) if total.isfinite() else float(total)
    if math.isfinite(norm):
        for p in params:
            p.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
            p.grad.final = p.grad._version
    return norm


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1, **options) -> torch.optim.AdamW:
    """AdamW on this rank's flat shards; weight decay for matrices only, which a flat shard itself no longer tells.

    Padding has zero gradient and stays zero. Optimizers that treat a matrix as a matrix (Muon, Shampoo) cannot work on
    flat shards. Its step raises RuntimeError inside overlap().
    """
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.kind == kind], "weight_decay": decay}
        for kind, decay in (("matrix", weight_decay), ("vector", 0.0))
    ]
    fused = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=fused, **options)
    optimizer.register_step_pre_hook(lambda *_: _check_landed(model))
    return optimizer


# ---- the method: which grid is fastest

_LOGS: list["CommLog"] = []  # the active ones
WIRE = {  # what a ring of n ranks sends per rank for each element that a rank puts in
    "all_reduce": lambda n: Fraction(2 * (n - 1), n),
    "reduce_scatter": lambda n: Fraction(n - 1, n),
    "all_gather": lambda n: Fraction(n - 1),
}


class CommLog:
    """Context that counts the collectives of this rank: calls, wire elements and bytes by (collective, axis).

    `seconds` is the time this process stood waiting: all of it without overlap, none with NCCL, where the device waits.
    """

    def __init__(self):
        self.calls, self.elements, self.bytes = defaultdict(int), defaultdict(Fraction), defaultdict(Fraction)
        self.seconds = 0.0

    def __enter__(self) -> "CommLog":
        _LOGS.append(self)
        return self

    def __exit__(self, *_):
        _LOGS.remove(self)

    def add(self, kind: str, axis: str, n: int, x: Tensor) -> None:
        count = WIRE[kind](n) * x.numel()
        self.calls[kind, axis] += 1
        self.elements[kind, axis] += count
        self.bytes[kind, axis] += count * x.element_size()


@dataclass(frozen=True)
class Machine:
    """What the model of communication knows of a machine: bandwidths in GB/s (1e9 bytes), latency in seconds.

    intra_table  {(P, G): GB/s} of a ring of G ranks inside a node, each P ranks apart, all sibling rings running
    intra_bw     instead of keys that the table lacks; 0 makes a missing key an error
    alpha        seconds per collective and member. rates: {(collective, ranks): (seconds a call, bytes/s)} if measured
    """

    gpus_per_node: int
    inter_bw: float
    intra_table: dict = field(default_factory=dict)
    alpha: float = 0.0
    intra_bw: float = 0.0
    rates: dict = field(default_factory=dict)

    def bandwidth(self, axis: int, dims: tuple) -> float:
        """Bytes per second of a ring along an axis (0..3 for x y z data). ValueError: the table lacks it."""
        before, g = math.prod(dims[:axis]), dims[axis]
        if before * g > self.gpus_per_node:  # crosses nodes: the node's rings share its network
            return 1e9 * self.inter_bw / min(self.gpus_per_node, before)
        found = self.intra_table.get((before, g), self.intra_bw)
        if not found:
            known = ", ".join(map(str, sorted(self.intra_table))) or "none"
            raise BadInput(f"no bandwidth for rings of {g} ranks, {before} apart, inside a node (key ({before}, {g})). "
                           f"Known: {known}. Give --intra-bw GB/s to use for all others.")  # fmt: skip
        return 1e9 * found


MACHINES = {
    "perlmutter": Machine(4, 80, {(1, 2): 76, (1, 4): 225, (2, 2): 76}),
    "frontier": Machine(8, 40, {(1, 2): 129, (1, 4): 52, (1, 8): 135, (2, 2): 50, (2, 4): 72, (4, 2): 36}),
}


def machine(name: str) -> Machine:
    """A machine of the table. ValueError lists the known ones."""
    if name not in MACHINES:
        other = "--machine other with --gpus-per-node, --inter-bw and --intra-bw"
        raise BadInput(f"unknown machine {name!r}; known: {', '.join(MACHINES)}. Another one: {other}.")
    return MACHINES[name]


def ring_terms(cfg: "GPTConfig", dims: tuple, m: float) -> Iterator[tuple]:
    """The paper's five terms of each product of a block, for m tokens a rank: (term, collective, axis, elements in)."""
    n = axis_sizes(dims)
    for k, o, transposed in cfg.products():
        over_k, over_o = "xy" if transposed else "yx"
        k, o = k // n[over_k], o // n[over_o]
        chunk = -(-k * o // n["z"])
        yield "ag_z", "all_gather", "z", chunk
        yield "rs_z", "reduce_scatter", "z", chunk * n["z"]
        yield "ar_fwd", "all_reduce", over_k, m * o
        yield "ar_bwd", "all_reduce", over_o, m * k
        yield "ar_data", "all_reduce", "d", chunk


def predict_comm_time(
    cfg: "GPTConfig", tokens: int, dims: tuple, machine: Machine, *, c_ag: int = 2, c_fwd: int = 1, b: int = 2,
    b_g: int = 2,
) -> dict:  # fmt: skip
    """Seconds of communication of a step by the paper's ring model: ag_z, rs_z, ar_fwd, ar_bwd, ar_data, total.

    c_ag 2: weights gathered again in backward; c_fwd 2: recomputation repeats the forward all-reduce. b bytes per
    weight and activation, b_g per gradient over data. Left out: embedding, head, norms, overlap, latency if alpha is 0.
    """
    t = dict.fromkeys(("ag_z", "rs_z", "ar_fwd", "ar_bwd", "ar_data"), 0.0)
    times, width = {"ag_z": c_ag, "ar_fwd": c_fwd}, {"ar_data": b_g}
    for term, kind, axis, numel in ring_terms(cfg, dims, tokens / (dims[2] * dims[3])):
        i = "xyzd".index(axis)
        if (g := dims[i]) > 1:
            seconds = float(WIRE[kind](g)) * numel * width.get(term, b) / machine.bandwidth(i, dims) + machine.alpha * g
            t[term] += cfg.n_layer * times.get(term, 1) * seconds
    return {**t, "total": sum(t.values())}


def rank_configs(
    cfg: "GPTConfig", world: int, sequences: int, machine: Machine, *, min_tp: int = 1, top_k: int = 10, **opts
) -> list:
    """[(dims, seconds, parts)] of the grids of `world` ranks that fit, best first, ties by dims. Try the first few.

    min_tp: least Gx Gy Gz, so that the model fits in memory. opts: of predict_comm_time. ValueError: no grid fits.
    """
    fit = [
        d for d in grids(world)
        if d[0] * d[1] * d[2] >= min_tp and sequences % (d[2] * d[3]) == 0 and not cfg.misfit(d[0], d[1])
    ]  # fmt: skip
    if not fit:
        heads = f"{cfg.n_head} heads, {cfg.kv_head} key/value heads, width {cfg.d_model}"
        raise BadInput(f"no grid of {world} ranks fits: {sequences} sequences, Gx Gy Gz >= {min_tp}, {heads}. "
                       f"Change --world or --sequences.")  # fmt: skip
    timed = [(d, predict_comm_time(cfg, sequences * cfg.seq, d, machine, **opts)) for d in fit]
    return sorted(((d, t["total"], t) for d, t in timed), key=lambda row: row[:2][::-1])[:top_k]


def volume(cfg: "GPTConfig", rows: int, dims: tuple) -> dict:
    """{(collective, axis): (calls, wire elements)} per rank of one training step here: everything CommLog counts.

    rows of cfg.seq tokens over all ranks, one micro-batch, all weights trained, the loss summed for the log once.
    """
    n = axis_sizes(dims)
    m, h, V = rows * cfg.seq // (n["z"] * n["d"]), cfg.d_model // n["y"], -(-cfg.vocab // n["x"])
    out = defaultdict(lambda: (0, Fraction(0)))

    def add(kind: str, axis: str, numel: int, calls: int = 1) -> None:
        if n[axis] > 1:
            before = out[kind, axis]
            out[kind, axis] = (before[0] + calls, before[1] + calls * numel * WIRE[kind](n[axis]))

    L, stats, chunk = cfg.n_layer, 2 if cfg.norm == "layernorm" else 1, -(-h * V // n["z"])
    again = 2 if cfg.checkpoint else 1  # forward passes of a block
    calls = {"ag_z": 2 if cfg.checkpoint or not cfg.cache_weights else 1, "ar_fwd": again}
    terms = list(ring_terms(cfg, dims, m))
    for term, kind, axis, numel in terms:
        if term != "ar_data":
            add(kind, axis, numel, L * calls.get(term, 1))
    add("all_reduce", "d", sum(numel for term, *_, numel in terms if term == "ar_data"), L)  # a call a block
    add("all_reduce", "d", chunk, 1 if cfg.tied else 2)  # embedding and head
    add("all_gather", "z", chunk, 3)  # the embedding's forward, the head's forward and backward
    add("reduce_scatter", "z", n["z"] * chunk, 2)
    add("all_reduce", "x", m * h, 2)  # the embedding forward, the head backward
    add("all_reduce", "y", m * V)  # the head forward
    add("all_reduce", "y", m, stats * (2 * L * (again + 1) + 2))  # norms forward and backward, a call a statistic
    add("all_reduce", "x", m)  # cross-entropy: the largest logit, then both sums
    add("all_reduce", "x", 2 * m)
    biases = sum(o // n["y" if transposed else "x"] for _, o, transposed in cfg.products()) if cfg.bias else 0
    vectors = L * biases + stats * h * (2 * L + 1) + (cfg.seq * h if cfg.pos == "learned" else 0)
    for axis in "zd":
        add("all_reduce", axis, vectors)
        add("all_reduce", axis, 1, 2)  # the count of targets and the loss
    add("all_reduce", "t", 1)  # the gradient norm
    return dict(out)


def calibrate(grid: Grid, small: int = 256, large: int = 2**18, repeats: int = 9) -> Machine:
    """This machine's latency and bandwidth per collective and number of ranks, all sibling groups running. Collective.

    small, large: elements (fp32) of the two message sizes between which the line is laid. A matrix product runs before
    every call, as in a step, so that ranks arrive unevenly; its own time is taken off.
    """
    rates, a = {}, torch.randn(256, 256).to(grid.device)
    for n in (n for n in range(2, grid.size + 1) if grid.size % n == 0):
        g = Grid(1, 1, n, grid.size // n, ranks=range(grid.size))
        if not g.member:
            continue
        calls = {
            "all_reduce": lambda x, g=g: g.all_reduce(x, "z", dist.ReduceOp.MAX),
            "all_gather": lambda x, g=g, n=n: g.all_gather(x[: len(x) // n])[1].wait(),
            "reduce_scatter": lambda x, g=g: g.reduce_scatter(x)[1].wait(),
        }
        x = {size: torch.ones(size // n * n, device=g.device) for size in (small, large)}
        cases = {(kind, size): lambda fn=fn, x=x[size]: (a @ a, fn(x)) for kind, fn in calls.items() for size in x}
        took = report.timed({"product": lambda: a @ a, **cases}, g.device, repeats)
        took = {case: t - took["product"][0] for case, (t, _) in took.items()}
        for kind in calls:
            wire = 4 * (2 if kind == "all_reduce" else 1) * (n - 1) / n  # bytes per element
            beta = wire * (large - small) / max(1e-6, took[kind, large] - took[kind, small])
            rates[kind, n] = (max(0.0, took[kind, small] - wire * small / beta), beta)
    return Machine(grid.size, 1.0, intra_bw=1.0, rates=rates)


def predict_measured(cfg: "GPTConfig", rows: int, dims: tuple, machine: Machine, b: int = 4) -> float:
    """Seconds of communication of a step from calibrate's rates: every call's latency and every byte of volume()."""
    total, n = 0.0, axis_sizes(dims)
    for (kind, axis), (calls, elements) in volume(cfg, rows, dims).items():
        latency, beta = machine.rates[kind, n[axis]]
        total += calls * latency + b * float(elements) / beta
    return total


# ---- the method: which way to multiply is fastest

_TUNED: dict[tuple, str] = {}
VARIANTS = {  # of C = A B; copies are part of the cost
    "default": lambda a, b: a @ b,
    "NN": lambda a, b: a.contiguous() @ b.contiguous(),
    "NT": lambda a, b: a.T.contiguous().T @ b.contiguous(),
    "TN": lambda a, b: a.contiguous() @ b.T.contiguous().T,
}
VARIANTS |= {f"{name} of C^T": lambda a, b, fn=fn: fn(b.T, a.T).T for name, fn in list(VARIANTS.items())}


def time_matmul(a: Tensor, b: Tensor, repeats: int = 20) -> dict[str, float]:
    """Median seconds of each variant of a (m, k) @ b (k, n)."""
    cases = {name: functools.partial(fn, a, b) for name, fn in VARIANTS.items()}
    return {name: t for name, (t, _) in report.timed(cases, a.device, repeats, warmup=5).items()}


def tune_matmul(a: Tensor, b: Tensor, repeats: int = 20) -> Callable:
    """The fastest way on this device to multiply matrices laid out like a and b; rank 0 decides for all. Collective."""
    key = (a.shape, b.shape, a.stride(), b.stride(), a.dtype, a.device.type)
    if key not in _TUNED:
        took = time_matmul(a, b, repeats)
        best = [min(took, key=took.get)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(best, src=0)
        _TUNED[key] = best[0]
    return VARIANTS[_TUNED[key]]


def layer_products(m: int, k: int, n: int, dtype: torch.dtype, device) -> dict[str, tuple[Tensor, Tensor]]:
    """Operands of a layer's three products for m tokens, laid out as in training: O, dI, dW."""
    x, W, dy = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (n, k), (m, n)))
    return {"O": (x, W.T), "dI": (dy, W), "dW": (dy.T, x)}


def tune(model: "GPT3D", rows: int) -> dict[str, int]:
    """Choose the products O, dI, dW of every layer for `rows` local rows; returns how often each variant won."""
    won = defaultdict(int)
    for layer in (layer for layer in _layers(model) if type(layer) is Linear3D):
        shape = (rows * model.cfg.seq, layer.in_local, layer.out_local)
        for kind, (a, b) in layer_products(*shape, model.dtype, model.grid.device).items():
            layer.matmul[kind] = tune_matmul(a, b)
            won[next(name for name, fn in VARIANTS.items() if fn is layer.matmul[kind])] += 1
    return dict(won)


# ---- the model


@dataclass
class GPTConfig:
    """Sizes and family of a model. The defaults are GPT's; from_hf gives Llama's."""

    n_layer: int
    d_model: int
    n_head: int
    vocab: int = 51200
    seq: int = 2048
    kv_head: int = 0  # key/value heads; 0: as many as query heads
    d_ff: int = 0  # 0: 4 d_model
    head_dim: int = 0  # 0: d_model / n_head
    norm: str = "layernorm"  # or rmsnorm
    pos: str = "learned"  # or rope
    mlp: str = "gelu"  # or swiglu
    bias: bool = True
    tied: bool = False
    eps: float = 1e-5
    rope_theta: float = 1e4
    rope_scaling: dict | None = None
    init_std: float = 0.02
    seed: int = 0
    dtype: str = "float32"  # of the products; parameters are float32 (float64 for float64)
    checkpoint: bool = False  # recompute each block in backward
    cache_weights: bool = False
    compile: bool = False  # torch.compile what lies between the collectives

    def __post_init__(self):
        self.kv_head, self.d_ff = self.kv_head or self.n_head, self.d_ff or 4 * self.d_model
        if not self.head_dim and self.d_model % self.n_head:
            sizes = f"d_model {self.d_model} is not a multiple of n_head {self.n_head}"
            raise ValueError(f"{sizes}. Give head_dim, or change one.")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        families = {"norm": ("layernorm", "rmsnorm"), "pos": ("learned", "rope"), "mlp": ("gelu", "swiglu")}
        for name, known in families.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        if self.n_head % self.kv_head:
            raise ValueError(f"{self.n_head} query heads do not share {self.kv_head} key/value heads evenly")

    @classmethod
    def from_hf(cls, c: dict, **changes) -> "GPTConfig":
        """From the keys of a Llama-family config.json."""
        if c.get("attention_bias") or c.get("mlp_bias"):
            raise BadInput("attention_bias and mlp_bias of this config.json are not supported, only Llama without them")
        same = {"n_layer": "num_hidden_layers", "d_model": "hidden_size", "n_head": "num_attention_heads",
                "vocab": "vocab_size", "d_ff": "intermediate_size"}  # fmt: skip
        return cls(**{
            **{ours: c[theirs] for ours, theirs in same.items()}, "norm": "rmsnorm", "pos": "rope", "mlp": "swiglu",
            "bias": False, "seq": c.get("max_position_embeddings", 2048), "kv_head": c.get("num_key_value_heads") or 0,
            "head_dim": c.get("head_dim") or 0, "tied": bool(c.get("tie_word_embeddings")),
            "eps": c.get("rms_norm_eps", 1e-5), "rope_theta": c.get("rope_theta", 1e4),
            "rope_scaling": c.get("rope_scaling"), **changes,
        })  # fmt: skip

    def products(self) -> list[tuple[int, int, bool]]:
        """(k, n, transposed) of a block's four products; q, k, v are one, gate and up are one."""
        h, a, kv = self.d_model, self.n_head * self.head_dim, self.kv_head * self.head_dim
        wide = self.d_ff * (2 if self.mlp == "swiglu" else 1)
        return [(h, a + 2 * kv, False), (a, h, True), (h, wide, False), (self.d_ff, h, True)]

    def misfit(self, gx: int, gy: int) -> str:
        """Why Gx or Gy does not divide this model; empty if they do."""
        by_x = {"query heads": self.n_head, "key/value heads": self.kv_head, "MLP columns": self.d_ff}
        cuts = [(n, what, "Gx", gx) for what, n in by_x.items()]
        cuts += [(self.d_model, "hidden features", axis, g) for axis, g in (("Gx", gx), ("Gy", gy))]
        return next((f"{n} {what} cannot be split over {axis} = {g}" for n, what, axis, g in cuts if n % g), "")


SIZES = {  # layers, width, heads, and the least Gx Gy Gz on 40 GB in the released benchmark scripts
    "5B": (24, 4096, 32, 4), "10B": (32, 5120, 40, 8), "20B": (32, 7168, 56, 16), "40B": (38, 9216, 72, 32),
    "60B": (56, 9216, 72, 64), "80B": (42, 12288, 96, 64), "160B": (84, 12288, 96, 128),
    "320B": (96, 16384, 128, 256), "640B": (192, 16384, 128, 512),
}  # fmt: skip
PRESETS = {"tiny": GPTConfig(2, 64, 8, vocab=512, seq=64), "1.3B": GPTConfig(24, 2048, 16)}
PRESETS |= {name: GPTConfig(*sizes[:3], init_std=0.006, tied=True) for name, sizes in SIZES.items()}


def preset(cfg: Config) -> GPTConfig:
    """The model of --model with the settings of the command line. BadInput: no preset of that name."""
    if cfg.model not in PRESETS:
        raise BadInput(f"--model {cfg.model}: {cfg.mode} knows {', '.join(PRESETS)}")
    c = PRESETS[cfg.model]
    changes = {n: getattr(cfg, n) for n in ("dtype", "checkpoint", "cache_weights", "compile", "seed")}
    return replace(c, seq=cfg.block or c.seq, vocab=cfg.vocab if cfg.model == "tiny" else c.vocab, **changes)


def flops_per_iteration(cfg: GPTConfig, tokens: int, recompute: bool = True) -> float:
    """FLOP of a step over `tokens`. GPT: 96 T l h^2 (1 + s/6h + V/16lh), arXiv:2104.04473, which counts full attention.

    Other families: 2 per weight and token forward, causal attention exactly. Without recomputation three passes of
    four remain ("model" FLOP instead of "hardware" FLOP).
    """
    l, h, s, V = cfg.n_layer, cfg.d_model, cfg.seq, cfg.vocab
    passes = 4 if recompute else 3
    if cfg.products() == [(h, 3 * h, False), (h, h, True), (h, 4 * h, False), (4 * h, h, True)]:
        return 24 * passes * tokens * l * h**2 * (1 + s / (6 * h)) + 6 * tokens * V * h
    block = sum(2 * k * n for k, n, _ in cfg.products()) + 2 * s * cfg.n_head * cfg.head_dim
    return tokens * (passes * l * block + 6 * V * h)


def parameters(cfg: GPTConfig) -> int:
    """Number of parameters."""
    h, vectors = cfg.d_model, 2 if cfg.norm == "layernorm" else 1
    block = sum(k * n + (n if cfg.bias else 0) for k, n, _ in cfg.products()) + 2 * vectors * h
    ends = cfg.vocab * h * (1 if cfg.tied else 2) + (cfg.seq * h if cfg.pos == "learned" else 0)
    return cfg.n_layer * block + ends + vectors * h


def memory_bytes(cfg: GPTConfig, tokens: int, dims: tuple) -> float:
    """Estimate per rank: 16 bytes a stored parameter, two gathered blocks, saved activations, fp32 logits; b = 2."""
    gx, gy, gz, gd = dims
    m, h = tokens / (gz * gd), cfg.d_model
    held = 16 * parameters(cfg) / (gx * gy * gz) + 2 * 2 * max(k * n for k, n, _ in cfg.products()) / (gx * gy)
    wide = 2 * m * (4 * h / gy + (4 * cfg.n_head * cfg.head_dim + 2 * cfg.d_ff) / gx)
    blocks = cfg.n_layer * 2 * m * h / gy + wide if cfg.checkpoint else cfg.n_layer * wide
    return held + blocks + 6 * m * cfg.vocab / gx


def _attention(qkv: Tensor, angle: Tensor | None, H: int, Hk: int, D: int) -> Tensor:
    """Causal attention of this rank's heads. qkv (B, T, (H + 2 Hk) D) -> (B, T, H D); no communication."""
    q, k, v = qkv.split([H * D, Hk * D, Hk * D], dim=-1)
    q, k, v = (rearrange(t, "b t (h d) -> b h t d", d=D) for t in (q, k, v))  # (B, H or Hk, T, D)
    if angle is not None:
        q, k = rotate(q, angle), rotate(k, angle)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != Hk)  # (B, H, T, D)
    return rearrange(y, "b h t d -> b t (h d)")


def _swiglu(x: Tensor) -> Tensor:
    """(..., 2 M) gate and up -> (..., M)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Block(nn.Module):
    """Attention and MLP on the residual stream (B, T, h/Gy), four products, two of them transposed."""

    def __init__(self, c: GPTConfig, grid: Grid, i: int, dtype: torch.dtype):
        super().__init__()
        p, norm = f"model.layers.{i}.", LayerNorm3D if c.norm == "layernorm" else RMSNorm3D
        last = c.init_std / math.sqrt(2 * c.n_layer)  # they add to the residual stream
        linear = functools.partial(Linear3D, grid, bias=c.bias, dtype=dtype, seed=c.seed)
        (h, qkv, _), (a, *_), (_, wide, _), _ = c.products()
        kv = c.kv_head * c.head_dim
        names = {f"{p}self_attn.q_proj": a, f"{p}self_attn.k_proj": kv, f"{p}self_attn.v_proj": kv}
        up = {f"{p}mlp.{n}_proj": c.d_ff for n in (("gate", "up") if c.mlp == "swiglu" else ("up",))}
        self.norm1 = norm(grid, h, c.eps, name=f"{p}input_layernorm", dtype=dtype)
        self.qkv = linear(h, qkv, name=f"{p}self_attn.qkv", init_std=c.init_std, parts=names)
        self.out = linear(a, h, name=f"{p}self_attn.o_proj", transposed=True, init_std=last)
        self.norm2 = norm(grid, h, c.eps, name=f"{p}post_attention_layernorm", dtype=dtype)
        self.up = linear(h, wide, name=f"{p}mlp.up", init_std=c.init_std, parts=up)
        self.down = linear(c.d_ff, h, name=f"{p}mlp.down_proj", transposed=True, init_std=last)
        for layer in _layers(self):
            layer.bucket = p
            layer.cache_weights = c.cache_weights or c.checkpoint  # from the recomputed forward to its backward only
        self.heads = (c.n_head // grid.n["x"], c.kv_head // grid.n["x"], c.head_dim)
        fast = torch.compile if c.compile else lambda fn: fn
        self.attention, self.act = fast(_attention), fast(_swiglu if c.mlp == "swiglu" else F.gelu)

    def forward(self, x: Tensor, angle: Tensor | None) -> Tensor:
        """x (B, T, h/Gy) -> the same."""
        x = x + self.out(self.attention(self.qkv(self.norm1(x)), angle, *self.heads))
        return x + self.down(self.act(self.up(self.norm2(x))))


class GPT3D(nn.Module):
    """A GPT or Llama on the grid: ids (B, T), this data shard's rows -> logits (B, T, V/Gx), -inf where V is padded.

    Every grid starts from the same weights, which depend on cfg.seed and each tensor's name. State dicts carry Hugging
    Face's Llama names. ValueError: heads or widths that the grid cannot split, with the grids of this size that fit.
    """

    def __init__(self, cfg: GPTConfig, grid: Grid):
        super().__init__()
        if why := cfg.misfit(grid.n["x"], grid.n["y"]):
            fit = ", ".join(show(g) for g in grids(grid.size) if not cfg.misfit(*g[:2]))
            heads = f"{cfg.n_head} query and {cfg.kv_head} key/value heads"
            raise BadInput(f"grid {grid} does not fit a model with {heads} and width {cfg.d_model}: {why}. "
                           f"Grids of {grid.size} ranks that fit: {fit}")  # fmt: skip
        self.cfg, self.grid, self.dtype, h = cfg, grid, getattr(torch, cfg.dtype), cfg.d_model
        self.wide = torch.promote_types(self.dtype, torch.float32)  # of parameters and rotary angles
        make = {"dtype": self.wide, "init_std": cfg.init_std, "seed": cfg.seed}
        self.embed = Embedding3D(grid, cfg.vocab, h, name="model.embed_tokens", out_dtype=self.dtype, **make)
        self.positions, k = None, h // grid.n["y"]
        if cfg.pos == "learned":
            piece = ("model.embed_positions.weight", (cfg.seq, h), 0, cfg.seq)
            self.positions = _matrix(grid, [piece], grid.y * k, k, cfg.init_std, cfg.seed, self.wide, None, "y")
        self.blocks = nn.ModuleList(Block(cfg, grid, i, self.wide) for i in range(cfg.n_layer))
        norm = LayerNorm3D if cfg.norm == "layernorm" else RMSNorm3D
        self.norm = norm(grid, h, cfg.eps, name="model.norm", dtype=self.wide)
        tied = self.embed if cfg.tied else None
        self.head = Linear3D(grid, h, cfg.vocab, bias=False, name="lm_head", pad=True, tied=tied, **make)
        self.embed.bucket, self.head.bucket = "ends", "ends" if cfg.tied else "head"
        rope = {"head_dim": cfg.head_dim, "rope_theta": cfg.rope_theta, "rope_scaling": cfg.rope_scaling}
        self.register_buffer("freq", rope_frequencies(rope).to(grid.device, self.wide), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, V/Gx). ValueError: T exceeds the learned positions."""
        T = ids.shape[1]
        x, angle = self.embed(ids), None  # (B, T, h/Gy)
        if self.positions is not None:
            if T > self.cfg.seq:
                raise ValueError(f"{T} tokens, but the model has positions for {self.cfg.seq}. Give shorter rows.")
            x = x + rearrange(self.positions, "(s c) -> s c", s=self.cfg.seq)[:T].to(x.dtype)
        else:
            angle = torch.outer(torch.arange(T, device=ids.device, dtype=self.wide), self.freq)  # (T, D/2)
        for block in self.blocks:
            if self.cfg.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, angle, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
            else:
                x = block(x, angle)
        logits = self.head(self.norm(x))  # (B, T, V/Gx)
        real = self.cfg.vocab - self.embed.first  # columns that are tokens
        if real < logits.shape[-1]:
            logits = logits.masked_fill(torch.arange(logits.shape[-1], device=ids.device) >= real, -math.inf)
        return logits


# ---- the model: state that any grid can load


class Boxes(Tensor):
    """What a rank stores of one tensor, as torch.distributed.checkpoint sees it: the whole shape, without memory.

    parts  {place of the first element: view}, boxes of any grid, written from and read into in place
    """

    @staticmethod
    def of(flat: Tensor, shape: tuple, boxes: list) -> "Boxes":
        """boxes: (first element in flat, row, column, rows, columns)."""
        out = torch.empty((), dtype=flat.dtype, device=flat.device).expand(shape).as_subclass(Boxes)
        cut = (lambda *n: n) if len(shape) == 2 else (lambda *n: n[:1])
        out.parts = {torch.Size(cut(r, c)): flat[at : at + nr * nc].view(cut(nr, nc)) for at, r, c, nr, nc in boxes}
        return out

    def __create_chunk_list__(self) -> list:
        return [ChunkStorageMetadata(offsets=at, sizes=part.shape) for at, part in self.parts.items()]

    def __create_write_items__(self, fqn: str, _) -> list:
        chunks, look = self.__create_chunk_list__(), TensorProperties(dtype=self.dtype)
        data = [TensorWriteData(chunk=c, properties=look, size=self.size()) for c in chunks]
        return [WriteItem(MetadataIndex(fqn, d.chunk.offsets), WriteItemType.SHARD, tensor_data=d) for d in data]

    def __get_tensor_shard__(self, index) -> Tensor:
        return self.parts[index.offset]


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **numbers: int) -> dict:
    """For cluster.save_sharded and load_sharded: the same names and shapes on every grid, so any grid can load it.

    With the moments of AdamW if an optimizer is given; `numbers` are stored as tensors.
    """
    state = {name: torch.tensor(n) for name, n in numbers.items()}
    for p in model.parameters():
        held = {"": p.data}
        if optimizer is not None and p.requires_grad:
            s = optimizer.state[p]
            if not s:  # before the first step
                s.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            held |= {"m.": s["exp_avg"], "v.": s["exp_avg_sq"]}
        boxes = list(p.where.boxes())
        for name, shape, *_ in p.where.pieces:
            mine = [b[2:] for b in boxes if b[0] == name]
            state |= {prefix + name: Boxes.of(flat, shape, mine) for prefix, flat in held.items() if mine}
    return state


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors by name, on the CPU of the grid's rank 0; {} elsewhere. One tensor at a time. Collective."""
    grid, state, mine = _grid_of(model), {}, sharded_state(model)
    for p in model.parameters():
        owner = grid.d == 0 and all(getattr(grid, a) == 0 for a in "xyz" if a not in p.split)  # others hold the same
        for name, shape, *_ in p.where.pieces:
            whole = torch.zeros(shape, dtype=p.dtype, device=p.device)
            for at, part in mine[name].parts.items() if owner and name in mine else ():
                whole[tuple(slice(i, i + n) for i, n in zip(at, part.shape, strict=True))] = part
            grid.all_reduce(whole, "t")  # every element is zero on all ranks but one
            if (grid.x, grid.y, grid.z, grid.d) == (0, 0, 0, 0):
                state[name] = whole.cpu()
    return state


def load_tensors(model: nn.Module, get: Callable) -> None:
    """Fill the model from get(name, rows[, cols]): every rank asks for the blocks it stores and no others."""
    for p in model.parameters():
        p.where.fill(p.data, get)


def load_full_state_dict(model: nn.Module, sd: dict[str, Tensor] | None) -> None:
    """Fill the model on any grid from whole tensors that rank 0 holds. Collective over all ranks of the job.

    ValueError: missing or unexpected names, wrong shapes; all are listed.
    """
    grid, want = _grid_of(model), {name: shape for p in model.parameters() for name, shape, *_ in p.where.pieces}
    shared, have = dist.get_world_size() > 1 and grid.size > 1, [{n: tuple(t.shape) for n, t in (sd or {}).items()}]
    if shared:
        dist.broadcast_object_list(have, src=0)
    have = have[0]
    wrong = [f"{n} is {have[n]} instead of {want[n]}" for n in want if n in have and have[n] != want[n]]
    wrong += [f"missing {n}" for n in want if n not in have] + [f"unexpected {n}" for n in have if n not in want]
    if wrong:
        raise ValueError("the state dict does not fit the model: " + "; ".join(wrong))
    for p in model.parameters():
        whole = {name: torch.empty(shape, dtype=p.dtype, device=grid.device) for name, shape, *_ in p.where.pieces}
        for name, t in whole.items():
            if sd:
                t.copy_(sd[name])
            if shared:
                dist.broadcast(t, src=0)
        p.where.fill(p.data, lambda name, *at, whole=whole: whole[name][at])


def open_model(name: str, grid: Grid, **changes) -> tuple[GPT3D, object]:
    """A pretrained Llama on the grid and its tokenizer: smollm2, a Hugging Face folder, or a GGUF file."""
    weights = open_weights(name)
    model = GPT3D(GPTConfig.from_hf(weights.config, init_std=0.0, **changes), grid)
    load_tensors(model, weights.get)
    return model, weights.tokenizer()


# ---- the experiment: one step, a short run, memorisation

SMALL = GPTConfig(2, 32, 8, vocab=64, seq=16, dtype="float64", init_std=0.1)
BUCKETS = (0, 1, 4, 16)  # epochs of each; the first is the control
DOCS, PREFIX, SUFFIX = 16, 32, 16  # documents in a bucket, tokens given, tokens to recite
WIDTHS = (64, 256)


def backward(model: GPT3D, micro: list[Tensor], hide: bool, targets: Callable = lambda rows: rows[:, 1:]) -> Tensor:
    """Forward and backward over micro-batches of rows (b, T + 1), this data shard's; the gradients are final.

    Returns the loss, 0-d: the mean over all unmasked tokens of all ranks. Collective.
    """
    grid, total, wanted = model.grid, 0.0, [targets(rows) for rows in micro]
    count = global_count(torch.cat(wanted), grid)
    with overlap(model, micro_batches=len(micro)) if hide else contextlib.nullcontext():
        for rows, want in zip(micro, wanted, strict=True):
            loss = vocab_parallel_cross_entropy(model(rows[:, :-1]), want, grid) / count
            loss.backward()
            total = total + loss.detach()
    if not hide:
        sync_gradients(model)
    return grid.total(total)


def update(model: GPT3D, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clip and step; all ranks skip the step together if the norm is not finite. Returns the norm before."""
    norm = clip_grad_norm_(model, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def curve(c: GPTConfig, grid: Grid, seed: int, steps: int = 4, rows: int = 16) -> dict:
    """Train a few steps: losses, norms; do wire counts equal volume(), and overlapped gradients the others bit for bit?

    After each of the last two updates the gradients are computed both ways, the second time with prefetches.
    """
    model, found = GPT3D(c, grid), {"loss": [], "norm": [], "bits": True, "volume": True}
    optimizer, want = adamw(model, 1e-2), volume(c, rows, grid.dims)
    for step in range(steps):
        ids = torch.randint(c.vocab, (rows, c.seq + 1), generator=cluster.generator(seed, 7, step))
        micro = [ids.chunk(grid.num_data_shards)[grid.data_shard].to(grid.device)]
        with CommLog() as log:
            found["loss"].append(backward(model, micro, hide=False).item())
            found["norm"].append(update(model, optimizer, 1e-2, 0.5))
        found["volume"] &= {key: (n, log.elements[key]) for key, n in log.calls.items()} == want
        if step >= steps - 2:
            both = []
            for hide in (False, True):
                backward(model, micro, hide)
                both.append([p.grad for p in model.parameters()])
                optimizer.zero_grad()
            found["bits"] &= all(map(torch.equal, *both))
    return found | {"elements": {f"{kind} {axis}": float(n) for (kind, axis), n in log.elements.items()}}


def goldfish_mask(targets: Tensor, k: int = 2, h: int = 13) -> Tensor:
    """True where the goldfish loss drops a target (B, L) -> bool. arXiv:2406.10209; goldfish.py says it all."""
    table = torch.rand(1_000_003, generator=torch.Generator().manual_seed(2971215073)).to(targets.device)
    value = targets.unfold(1, h, 1).prod(dim=2)  # (B, L - h + 1), wrapped int64 products of h tokens
    drop = (table[value % len(table)] * 2**24).long() * k < 2**24
    return F.pad(drop, (h - 1, 0))


@torch.no_grad()
def memorization_eval(model: GPT3D, docs: Tensor, prefix: int, continuation: int) -> float:
    """Share of docs (N, >= prefix + continuation) whose continuation the model recites exactly after their prefix.

    Greedy decoding recites exactly when every next token is the likeliest after the true ones before it, so one forward
    pass decides. Collective; every rank is given all docs. ValueError: docs too short, or no prefix.
    """
    width, grid = prefix + continuation, model.grid
    if docs.shape[1] < width or prefix < 1 or continuation < 1:
        raise ValueError(f"documents {tuple(docs.shape)} are too short for {prefix} + {continuation} tokens")
    n = grid.num_data_shards if len(docs) >= grid.num_data_shards else 1
    mine = docs[grid.data_shard % n :: n, :width]
    best, token = model(mine[:, :-1])[:, prefix - 1 :].max(dim=-1)  # (N/n, continuation), of this rank's vocabulary
    top = best.clone()
    grid.all_reduce(top, "x", dist.ReduceOp.MAX)
    token = torch.where(best == top, token + model.embed.first, model.cfg.vocab)
    grid.all_reduce(token, "x", dist.ReduceOp.MIN)  # ties to the lowest id
    hits = (token == mine[:, prefix:]).all(dim=1).sum()
    return int(grid.total(hits)) / (len(docs) * (grid.num_data_shards // n))


def memorise(width: int, goldfish: bool, seed: int, lr: float = 3e-3, batch: int = 4) -> list[float]:
    """Train one model on random documents, each bucket as often as BUCKETS says; exact match of each bucket."""
    grid, g = Grid(ranks=(dist.get_rank(),)), cluster.generator(seed, 11)
    docs = torch.randint(1, 64, (len(BUCKETS), DOCS, PREFIX + SUFFIX), generator=g)
    shown = torch.cat([docs[i] for i, n in enumerate(BUCKETS) for _ in range(n)])  # each epoch of each bucket
    shown = shown[torch.randperm(len(shown), generator=g)].to(grid.device)
    model = GPT3D(GPTConfig(2, width, 4, vocab=64, seq=PREFIX + SUFFIX, seed=seed), grid)
    optimizer, steps = adamw(model, lr, betas=(0.9, 0.95)), len(shown) // batch
    targets = lambda rows: rows[:, 1:].masked_fill(goldfish_mask(rows[:, 1:]), -100) if goldfish else rows[:, 1:]
    for step, rows in enumerate(shown.split(batch)):
        backward(model, [rows], False, targets)
        update(model, optimizer, lr * min(1, (step + 1) / 10) * (1 - step / steps), 1.0)
    return [memorization_eval(model, d.to(grid.device), PREFIX, SUFFIX) for d in docs]


# ---- the experiment: training on a grid

# settings that change the numbers of a run; a checkpoint goes on only under the same ones (on any grid)
FIXED = ("model", "block", "vocab", "data", "batch", "tokens_per_step", "lr", "warmup", "weight_decay", "clip", "seed",
         "dtype", "steps")  # fmt: skip


def make_grid(cfg: Config, w: cluster.World) -> Grid:
    """The grid of --grid, its 0 replaced by what is left of the ranks."""
    given = math.prod(g or 1 for g in cfg.grid)
    return Grid(*(g or max(1, w.size // given) for g in cfg.grid))


class Trainer:
    """A model on a grid, its text, AdamW, and a step whose loss is the mean over all unmasked tokens of all ranks."""

    def __init__(self, cfg: Config, w: cluster.World):
        self.cfg, self.grid, self.step, text = cfg, make_grid(cfg, w), 0, corpus(cfg.data)
        if cfg.model in PRESETS:
            c = preset(cfg)
            self.model, self.ids = GPT3D(c, self.grid), Tokenizer(text, c.vocab).encode(text)
        else:
            changes = {n: getattr(cfg, n) for n in ("dtype", "checkpoint", "cache_weights", "compile", "seed")}
            self.model, tokenizer = open_model(cfg.model, self.grid, seq=cfg.block or 128, **changes)
            self.ids = torch.tensor(tokenizer.encode(text).ids)
        T, shards = self.model.cfg.seq, self.grid.num_data_shards * cfg.accum
        if cfg.tokens_per_step % T:
            raise BadInput(f"--tokens-per-step {cfg.tokens_per_step} is no multiple of the {T} tokens of a row")
        self.batch = cfg.tokens_per_step // T or cfg.batch
        if self.batch % shards:
            near = max(shards, self.batch // shards * shards)
            raise BadInput(f"{self.batch} rows per step do not divide over Gz x Gdata x --accum = {shards}. Multiples "
                           f"of {shards} work: --batch {near} or {near + shards}")  # fmt: skip
        if len(self.ids) < T + 2:
            raise BadInput(f"the text has {len(self.ids)} tokens; rows of --block {T} need more. Give a longer --data.")
        self.optimizer = adamw(self.model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))
        if cfg.tune:
            w.print(f"products: {tune(self.model, self.batch // shards)}")

    def rows(self, step: int) -> Tensor:
        """This rank's rows of a step, (batch / shards, seq + 1): all rows are a function of seed and step alone."""
        g, T = self.grid, self.model.cfg.seq
        generator = cluster.generator(self.cfg.seed, 1, step)
        first = torch.randint(len(self.ids) - T, (self.batch, 1), generator=generator)
        mine = self.ids[first + torch.arange(T + 1)].chunk(g.num_data_shards)[g.data_shard].to(g.device)
        if self.cfg.check_data:
            check_same_tokens(mine, g)
        return mine

    def advance(self) -> dict:
        """One optimizer step; skipped by all ranks together if the gradient norm is not finite."""
        cfg, step = self.cfg, self.step
        loss = backward(self.model, list(self.rows(step).chunk(cfg.accum)), cfg.overlap)
        lr = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup)) * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))
        norm = update(self.model, self.optimizer, lr, cfg.clip)
        self.step += 1
        return {"loss": loss, "grad_norm": norm, "lr": lr, "skipped": not math.isfinite(norm)}

    def load(self, path: str) -> None:
        """Go on from a checkpoint of any grid. BadInput: it is of another model."""
        state = sharded_state(self.model, self.optimizer, step=0)
        try:
            cluster.load_sharded(path, state)
        except (ValueError, RuntimeError) as e:
            raise BadInput(f"the checkpoint {path} is of another model: {e}") from e
        self.step = int(state["step"])
        for s in self.optimizer.state.values():
            s["step"].fill_(self.step)


def check_resume(cfg: Config, w: cluster.World) -> None:
    """BadInput: the run in --out, by the head of its metrics.jsonl, had other settings. Prints its grid."""
    path = Path(cfg.out) / "metrics.jsonl"
    if not path.exists():
        raise BadInput(f"--resume: {path} is missing, so the settings of the run are unknown. Train without --resume.")
    head = json.loads(path.read_text().splitlines()[0])
    was, ranks = head["config"], head["world"]
    for name in FIXED:
        values = [v if name == "data" else [v] for v in (was[name], getattr(cfg, name))]
        then, now = (f"--{name.replace('_', '-')} {' '.join(map(str, v))}" for v in values)
        if then != now:
            raise BadInput(f"the checkpoint was trained with {then}, this run asks for {now}. "
                           f"Pass {then} to resume, or another --out to start anew.")  # fmt: skip
    given = math.prod(g or 1 for g in was["grid"])
    w.print(f"resuming a run of grid {show(g or ranks // given for g in was['grid'])}")


def train(cfg: Config, w: cluster.World) -> None:
    """Train on text, with checkpoints that any grid can load; SIGTERM writes one, a lost peer or launcher ends all."""
    path, parent = f"{cfg.out}/checkpoint", os.getppid()
    if cfg.resume:
        check_resume(cfg, w)
    trainer = Trainer(cfg, w)
    if cfg.resume:
        trainer.load(path)
    elif w.main:
        for old in (f"{path}.old", f"{path}.previous.old"):
            shutil.rmtree(old, ignore_errors=True)
        cluster.set_aside(path)
    g, c, first = trainer.grid, trainer.model.cfg, trainer.step
    run, tokens = report.Run(cfg.out, cfg, w, first), trainer.batch * c.seq
    size = f"{parameters(c) / 1e6:.1f} M parameters, {tokens} tokens per step"
    w.print(f"grid {g}, {size}, {cfg.dtype} on {g.device.type}")
    try:
        with cluster.stop_signal() as stopping, report.progress(None, "train", w, cfg.steps, first) as bar:
            while trainer.step < cfg.steps:
                if "RANK" in os.environ and os.getppid() != parent:
                    raise RuntimeError(f"connection to the launcher of rank {w.rank} lost")
                start = time.perf_counter()
                with CommLog() as log:
                    line = trainer.advance()
                if trainer.step % cfg.log_every == 0 or trainer.step == cfg.steps:
                    run.log(run="train", step=trainer.step, **line)
                    report.synchronize(g.device)
                    took = time.perf_counter() - start
                    flop = {"model": False, "hardware": c.checkpoint}
                    flop = {kind: flops_per_iteration(c, tokens, again) / g.size for kind, again in flop.items()}
                    speed = {"seconds": took, "waited": log.seconds, "tokens_per_s": tokens / took}
                    speed |= {f"tflops_{kind}": n / took / 1e12 for kind, n in flop.items()}
                    for (_, axis), sent in log.bytes.items():
                        speed[f"bytes_{axis}"] = speed.get(f"bytes_{axis}", 0.0) + float(sent)
                    run.log(after=trainer.step, **speed)
                    bar.set_postfix_str(f"loss {float(line['loss']):.3f}")
                bar.update()
                stop = stopping()
                if stop or trainer.step == cfg.steps or (cfg.save_every and trainer.step % cfg.save_every == 0):
                    cluster.save_sharded(path, sharded_state(trainer.model, trainer.optimizer, step=trainer.step))
                if stop:
                    w.print(f"stopped by SIGTERM after step {trainer.step}; go on with --resume")
                    raise SystemExit(0)
    except RuntimeError as e:
        if w.size == 1 or not any(word in str(e).lower() for word in ("gloo", "nccl", "connection", "timed out")):
            raise
        what = f"a peer or launcher is gone after step {trainer.step} ({str(e).splitlines()[0][:120]})"
        again = f"Start all again with --resume to go on from {path}."
        print(f"rank {w.rank}: {what}. {again}", file=sys.stderr, flush=True)
        os._exit(1)
    if trainer.step > first:
        w.print(f"step {trainer.step} loss {float(line['loss']):.4f}")


# ---- the experiment: the demo, four parts and a toy

TIMED = GPTConfig(2, 256, 8, vocab=512, seq=64)


def same_curves(cfg: Config, w: cluster.World, run: report.Run) -> dict:
    """Parts A, B, D: every grid of this many ranks against one process: loss, norm, wire counts, overlapped bits."""
    alone = curve(SMALL, Grid(ranks=(w.rank,)), cfg.seed)
    found = {"alone": alone["loss"], "loss": 0.0, "norm": 0.0, "volume": True, "bits": True, "curves": {}}
    fit = [d for d in grids(w.size) if not SMALL.misfit(*d[:2]) and 16 % (d[2] * d[3]) == 0]
    for dims in report.progress(fit, "A, B, D", w):
        here = curve(SMALL, Grid(*dims), cfg.seed)
        for name in ("loss", "norm"):
            here[f"{name}_error"] = max(abs(a - b) for a, b in zip(here[name], alone[name], strict=True))
            found[name] = max(found[name], here[f"{name}_error"])
        for name in ("volume", "bits"):  # on every rank
            found[name] &= bool(cluster.total(torch.tensor(int(here[name]), device=w.device)) == w.size)
        found["curves"][show(dims)] = here["loss"]
        run.log(grid=show(dims), **{k: here[k] for k in ("loss_error", "norm_error", "volume", "bits", "elements")})
    return found | {"grids": len(fit)}


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of the ranks of a and b."""
    ra, rb = (torch.tensor(x).double().argsort().argsort().double() for x in (a, b))
    return torch.corrcoef(torch.stack([ra, rb]))[0, 1].item()


def step_times(c: GPTConfig, fit: list, rows: int, accum: int, w: cluster.World, ranks: range, ways=(False,)) -> dict:
    """Median seconds of a training step and of waiting in it, {(dims, hide): (step, waiting)}; grids interleaved."""
    models = {d: GPT3D(c, g) for d in fit if (g := Grid(*d, ranks=ranks)).member}
    optimizers = {d: adamw(model, 1e-4) for d, model in models.items()}
    took = {(d, hide): [] for d in models for hide in ways}
    for i in report.progress(range(6), "timing", w) if models else ():
        for (d, hide), seconds in took.items():
            model, grid = models[d], models[d].grid
            ids = torch.randint(c.vocab, (rows, c.seq + 1), generator=cluster.generator(i))
            micro = ids.chunk(grid.num_data_shards)[grid.data_shard].to(grid.device).chunk(accum)
            grid.total(torch.zeros(1, device=grid.device))
            report.synchronize(grid.device)
            start = time.perf_counter()
            with CommLog() as log:
                backward(model, micro, hide)
                update(model, optimizers[d], 1e-4, 1.0)
            report.synchronize(grid.device)
            seconds.append((time.perf_counter() - start, log.seconds))
    dist.barrier()
    median = lambda rows: tuple(statistics.median(column) for column in zip(*rows, strict=True))
    return {key: median(rows[1:]) for key, rows in took.items()}  # the first round warms up


def planner(cfg: Config, w: cluster.World, run: report.Run) -> dict:
    """Part C: predicted communication against measured steps on all grids of four ranks (two where there are two)."""
    ranks, rows = range(min(4, w.size)), 16
    measured = calibrate(Grid(gdata=len(ranks), ranks=ranks))
    took = step_times(TIMED, grids(len(ranks)), rows, 1, w, ranks)
    if not w.main:
        return {}
    points = {d: (predict_measured(TIMED, rows, d, measured), seconds) for (d, _), (seconds, _) in took.items()}
    for d, (predicted, seconds) in points.items():
        run.log(grid=show(d), predicted=predicted, step_seconds=seconds)
    order = sorted(points, key=lambda d: points[d][0])
    best = min(points, key=lambda d: points[d][1])
    return {"points": points, "spearman": spearman(*zip(*points.values(), strict=True)), "best": order.index(best) + 1}


def memorisation(cfg: Config, w: cluster.World, run: report.Run) -> dict:
    """Part E: exact match by width, loss and epochs; the four runs are dealt out to the ranks."""
    runs, mine, all_ranks = [(width, goldfish) for goldfish in (False, True) for width in WIDTHS], {}, [None] * w.size
    for i in report.progress(range(w.rank, len(runs), w.size), "E", w):
        mine[runs[i]] = memorise(*runs[i], cfg.seed)
    dist.all_gather_object(all_ranks, mine)
    found = {key: exact for part in all_ranks for key, exact in part.items()}
    for (width, goldfish), exact in found.items():
        run.log(width=width, goldfish=goldfish, **{f"epochs_{n}": e for n, e in zip(BUCKETS, exact, strict=True)})
    return {key: found[key] for key in runs}


def demo(cfg: Config, w: cluster.World) -> None:
    """All parts, their tables, the picture and the claim."""
    run, yes = report.Run(cfg.out, cfg, w), lambda ok: "yes" if ok else "NO"
    same = same_curves(cfg, w, run)
    w.print(
        f"A  {same['grids']} grids of {w.size} ranks against one process, float64: "
        f"loss off by {same['loss']:.1e}, norm by {same['norm']:.1e}\n"
        f"B  calls and wire elements per collective and axis equal the formula: {yes(same['volume'])}\n"
        f"D  gradients with overlapped communication are the same bits: {yes(same['bits'])}"
    )
    timed, judged = planner(cfg, w, run) if w.size > 1 else {}, w.size >= 4  # four grids of two ranks rank nothing
    if timed:
        rows = [[show(d), f"{1e3 * p:.0f}", f"{1e3 * t:.0f}"] for d, (p, t) in timed["points"].items()]
        w.print("\n" + report.table(["C  grid", "predicted communication ms", "measured step ms"], rows))
        best = f"the fastest grid is number {timed['best']} predicted"
        w.print(f"C  Spearman correlation {timed['spearman']:.2f}; {best}\n")
    exact = memorisation(cfg, w, run)
    if not w.main:
        return
    rows = [[f"E  width {width}, {'goldfish' if g else 'ordinary'}", *e] for (width, g), e in exact.items()]
    print(report.table(["exact match after epochs", *map(str, BUCKETS)], rows) + "\n")
    if timed:
        figure = functools.partial(draw, same, timed, exact)
        print(report.picture(f"{cfg.out}/axonn.png", figure, ncols=3, figsize=(16, 4.5)))
    (narrow, wide), (_, guarded) = ([exact[width, g] for width in WIDTHS] for g in (False, True))
    toy = wide[-1] > narrow[-1] and wide[-1] > wide[0] and wide == sorted(wide) and max(guarded) <= wide[0] + 0.05
    rank, equal = timed.get("spearman", 0.0), max(same["loss"], same["norm"]) <= 1e-12
    run.claim(
        "one algorithm trains on any 4D grid as one process would, hides its communication, and predicts its best grid",
        "620.1 Pflop/s on 4096 A100, 1.381 Eflop/s on 32768 MI250X dies; overlap and planning checked there by speed",
        f"all {same['grids']} grids of {w.size} ranks equal one process within 1e-12: {yes(equal)}; "
        f"volumes exact: {yes(same['volume'])}; overlap bit-equal: {yes(same['bits'])}; "
        f"Spearman {rank:.2f}{'' if judged else ' (4 grids: not judged)'}; "
        f"recited after 16 epochs {narrow[-1]:.2f} (narrow), {wide[-1]:.2f} (wide), {guarded[-1]:.2f} (wide, goldfish)",
        equal and same["volume"] and same["bits"] and (rank >= 0.5 or not judged) and toy,
        f"{w.size} {dist.get_backend()} ranks on one machine, {SMALL.n_layer} layers, width {SMALL.d_model}, "
        f"seed {cfg.seed}",
    )


def draw(same: dict, timed: dict, exact: dict, figure, axes) -> None:
    """Left: all curves on one. Middle: predicted against measured. Right: exact match by epochs."""
    left, middle, right = axes
    steps = range(1, len(same["alone"]) + 1)
    for i, (grid, losses) in enumerate(same["curves"].items()):
        look = {"s": 500 - 22 * i, "facecolors": "none", "edgecolors": f"C{i % 10}", "linewidths": 0.8}
        left.scatter(steps, losses, label=grid if len(same["curves"]) < 6 else None, **look)
    left.plot(steps, same["alone"], "k.-", label="one process")
    left.set(xlabel="step", ylabel="loss", xticks=list(steps))
    left.set_title(f"One curve: {same['grids']} grids, one ring each\nlargest difference {same['loss']:.0e}")
    left.legend(frameon=False)
    for d, (predicted, seconds) in timed["points"].items():
        at = 1e3 * predicted, 1e3 * seconds
        middle.plot(*at, "o", color="C0")
        middle.annotate(show(d), at, xytext=(4, 4), textcoords="offset points")
    middle.margins(0.15)
    middle.set(xlabel="predicted communication, ms", ylabel="measured step, ms")
    middle.set_title(f"Which grid is fast: Spearman {timed['spearman']:.2f}")
    for i, ((width, goldfish), e) in enumerate(exact.items()):
        label = f"width {width}, {'goldfish' if goldfish else 'ordinary'}"
        right.bar([j + (i - 1.5) / 5 for j in range(len(BUCKETS))], [max(x, 0.004) for x in e], 0.19, label=label)
    right.set(xlabel="epochs on a document", ylabel="recited exactly", ylim=(0, 1.05))
    right.set_xticks(range(len(BUCKETS)), [str(n) for n in BUCKETS])
    right.set_title("What is memorised")
    right.legend(frameon=False)


# ---- bench, plan, main


def bench(cfg: Config, w: cluster.World) -> None:
    """Step time, FLOP rate and share of waiting per grid, overlap on and off; then the ways to multiply."""
    c, dtype, cuda = preset(cfg), getattr(torch, cfg.dtype), w.device.type == "cuda"
    fit = [d for d in grids(w.size) if not c.misfit(*d[:2])]
    fit = fit if cfg.grid == Config.grid else [make_grid(cfg, w).dims]
    fit = [d for d in fit if cfg.batch % (d[2] * d[3] * cfg.accum) == 0]
    if not fit:
        raise BadInput(f"no grid of {w.size} ranks splits --model {cfg.model} and --batch {cfg.batch} over --accum "
                       f"{cfg.accum}. Make --batch a multiple of {w.size * cfg.accum}.")  # fmt: skip
    copied, ceiling = report.ceilings(w.device, dtype)
    tokens, how = cfg.batch * c.seq, "with" if c.checkpoint else "without"
    model_flop, hardware_flop = (flops_per_iteration(c, tokens, again) / w.size for again in (False, c.checkpoint))
    w.print(f"{report.device_name(w.device)}, {w.size} ranks, {cfg.model}, {cfg.dtype}, {tokens} tokens a step, "
            f"{how} recomputation; matrix products alone reach {ceiling / 1e12:.3f} TFLOP/s a rank\n"
            f"FLOP per rank and step: model {model_flop:.4g}, hardware {hardware_flop:.4g}")  # fmt: skip
    times, rows = step_times(c, fit, cfg.batch, cfg.accum, w, range(w.size), (False, True)), []
    for (d, hide), (t, waited) in times.items():
        rate = [f / t for f in (model_flop, hardware_flop)]
        cells = [*(f"{r / 1e12:.3f}" for r in rate), *(f"{r / ceiling:.0%}" for r in rate)]
        rows.append([show(d), "on" if hide else "off", f"{1e3 * t:.1f}", f"{waited / t:.0%}", *cells])
    kinds = [f"{kind} {unit}" for unit in ("TFLOP/s", "of ceiling") for kind in ("model", "hardware")]
    head = ["grid", "overlap", "step ms", "waiting", *kinds]
    w.print(report.table(head, rows))
    products, m, shrink = [], *((2048, 1) if cuda else (32, 64))
    for name in ("5B", "320B"):
        for k, n, _ in report.progress(PRESETS[name].products(), name, w):
            k, n = k // shrink, n // shrink
            for kind, (a, b) in layer_products(m, k, n, dtype, w.device).items():
                t = time_matmul(a, b)
                best = min(t, key=t.get)
                cells = [f"{1e3 * t[v]:.3f}" for v in ("default", "NN", "NT", "TN")]
                products.append([f"{name} {kind} {m}x{k}x{n}", *cells, best, t["default"] / t[best]])
    columns = ["product m x k x n", "default ms", "NN", "NT", "TN", "best", "default/best"]
    w.print("\n" + report.table(columns, products))
    if not cuda:
        w.print("on a CPU all widths are divided by 64; on NVIDIA GPUs expect 0 to 5 %, the paper's gain is AMD's")
    if w.main:
        found = {"ceiling": ceiling, "copied": copied, "model_flop": model_flop, "hardware_flop": hardware_flop}
        found |= {"grids": [dict(zip(head, r, strict=True)) for r in rows], "products": products}
        report.write_json(f"{cfg.out}/bench.json", found)


def plan(cfg: Config) -> None:
    """Print the grids that the model of communication puts first: time per axis, memory per rank."""
    c = replace(preset(cfg), checkpoint=True)
    m = Machine(cfg.gpus_per_node, cfg.inter_bw) if cfg.machine == "other" else machine(cfg.machine)
    m = replace(m, intra_bw=cfg.intra_bw, alpha=cfg.alpha)
    least = cfg.min_tp or SIZES.get(cfg.model, (1,))[-1]
    best = rank_configs(c, cfg.world, cfg.sequences, m, min_tp=least, top_k=cfg.top, c_fwd=2)
    tokens, names = cfg.sequences * c.seq, ("ag_z", "rs_z", "ar_fwd", "ar_bwd", "ar_data")
    rows = [[" ".join(map(str, d)), *(t[n] for n in names), total, memory_bytes(c, tokens, d) / 2**30]
            for d, total, t in best]  # fmt: skip
    print(f"{cfg.model}: {parameters(c) / 1e9:.2f} G parameters, {tokens} tokens and "
          f"{flops_per_iteration(c, tokens):.3g} FLOP per step, {cfg.world} ranks of {cfg.machine}, bf16, "
          f"recomputation")  # fmt: skip
    print(report.table(["Gx Gy Gz Gd", *(f"{n} s" for n in names), "sum s", "GiB/rank"], rows))
    print("communication alone, none of it hidden; try the first few: --grid takes the first column")


def local_ranks(n: int) -> None:
    """This command on n local processes, as torchrun would start it. They end with this one, also when interrupted."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(n)}
    argv = [sys.executable, __file__, *sys.argv[1:]]
    env, ranks = {"OMP_NUM_THREADS": "1", **os.environ, **meet}, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for r in range(n):
            ranks.append(subprocess.Popen(argv, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}))
        while None in (codes := [p.poll() for p in ranks]) and not any(codes):
            time.sleep(0.05)
    finally:
        for p in ranks:
            if p.poll() is None:
                p.terminate()
        for p in ranks:
            try:
                p.wait(5)
            except subprocess.TimeoutExpired:
                p.kill()
    sys.exit(next((code for code in codes if code), 0))


def main(cfg: Config) -> None:
    """Run one mode; demo and bench without torchrun first start their own ranks."""
    if cfg.mode == "plan":
        return plan(cfg)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # kernels start in issue order, which overlap() needs
    if cfg.mode == "demo" and cfg.device == "auto":
        cfg.device = "cpu"  # the demo's claims are about gloo ranks; NCCL promises no equal bits
    gpu = cfg.device != "cpu" and torch.cuda.is_available()
    if "RANK" not in os.environ and cfg.ranks > 1 and (cfg.mode == "demo" or (cfg.mode == "bench" and not gpu)):
        return local_ranks(cfg.ranks)
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config)
