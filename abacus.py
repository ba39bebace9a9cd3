"""Abacus embeddings: digit positions that let a transformer add numbers far longer than it was trained on.

Paper    McLeish et al., "Transformers Can Do Arithmetic with the Right Embeddings", NeurIPS 2024, arXiv:2405.17399.
Idea     Write numbers least significant digit first, and add to each digit's embedding a learned vector for its place
         in its number: units get the same vector in both operands and in the answer. In training all places are
         shifted by one random offset, so that vectors far beyond the training lengths are trained; in testing not.
         A looped block of layers, which the input enters again before each layer, extrapolates better still.
Here     The claim we check: after training on up to 8 digits, sums of 10 and 12 digits are exact (and of 20, mostly),
         where learned, rotary and no positions fail. Where those do not even learn 8 digits that says little, so a
         second table trains all on up to 3 digits, which each can learn. Five tasks: addition, subtraction,
         multiplication, bitwise OR, sorting; claims for addition alone.
Differs  Pre-norm RMSNorm instead of LayerNorm after each part, without the head of the released model (--norm post
         builds its exact shape); the loop's state starts at 0, in testing always, not at noise; one offset per sample,
         not per batch, in 1..k, not 1..k+1; queries scaled by the logarithm of their place; no weight decay; bf16, not
         fp16; a schedule in steps, not in seconds; a constant batch of fresh problems, not 20 M stored ones; 51 labels
         in sorting, none a separator. Most of all, a curriculum: over --short steps operands grow to full length, over
         --grow steps offsets to --max-offset. Without it (and with the published initial gains; ours are 1) most runs
         tried never found the first digit of the answer, as "=" carries no count. And from step --foreign on an example
         sees digits of others too, whose rows lie apart from its own: over five seeds 20+20 digits are then right in
         0.85 to 0.97 of the problems, without in 0.01 to 0.62 (--foreign -1; docs/results/abacus.md).
         Presets paper and h200 have not been run; paper follows the published recipe and has no curriculum.

    python abacus.py                                             # laptop: tables, claim, picture
    torchrun --nproc-per-node 2 abacus.py                        # the same; the processes share the models
    python abacus.py --quick                                     # Abacus alone
    python abacus.py train --seeds 5                             # five seeds: mean, minimum, best
    python abacus.py train --task sort --digits 4                # or sub, mul, or
    python abacus.py eval --model results/abacus/seed0/best.pt   # lengths, heat map, a sum spelled out
    python abacus.py bench                                       # data, training and evaluation speed
    torchrun --nproc-per-node 8 abacus.py train --preset paper   # published shape, 8 layers x 2 of width 1024
    Half an hour of one GPU, in pieces (not yet run): three seeds, the best one to its end, the full grid:
    python abacus.py train --preset h200 --seeds 3 --minutes 2.5
    python abacus.py train --preset h200 --seed 1 --resume --minutes 9
    python abacus.py train --preset h200 --seed 1 --resume --steps 6000    # a nearer end, while the rate is still flat
    python abacus.py eval --preset h200 --model results/abacus/seed1/best.pt

Expect   "Abacus 8+8 0.96, 10+10 0.97, 12+12 0.98" on CPU with seed 0, for any number of workers; another CPU rounds
         otherwise and ends elsewhere. Over seeds 0 to 4 8+8 is at least 0.96, 10+10 at least 0.90, 12+12 at least 0.92
         (docs/results/abacus.md). A test keeps the promise of a shorter run.
Writes   results/abacus/: metrics.jsonl, claim.json, abacus.png; seedN/ (train): metrics.jsonl, checkpoint.pt to go on
         from, best.pt (fp16 weights, best at the --probe lengths); eval/; bench.json.
"""

import contextlib
import functools
import math
import multiprocessing
import signal
import string
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import product, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.weights import rotate

TASKS = ("add", "sub", "mul", "or", "sort")
ENCODINGS = ("abacus", "learned", "nope", "rope", "fire")
INJECTIONS = ("none", "first", "recurrence", "layer")


@contextmanager
def workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of n fresh processes, for runs that share nothing. Ctrl-C, SIGTERM or an error here ends them at once."""
    heed = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # a terminal's Ctrl-C reaches them too; we decide
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), *heed) as pool:
            try:
                yield pool
            except BaseException:  # else the pool would first finish what it was given
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "eval", "bench"), positional=True)
    preset: str = opt("laptop", "defaults for a setting; flags win over it", choices=("laptop", "h200", "paper"))
    # the task
    task: str = opt("add", "what to compute", choices=TASKS)
    digits: int = opt(8, "most digits of an operand in training; for sort also the most elements")
    short: int = opt(200, "steps over which the most digits grow from 1 to --digits; 0 is at once (published)")
    # positions
    pos: str = opt("abacus", "abacus, learned, nope, rope, fire, or several joined by +")
    max_offset: int = opt(30, "k, the largest random start of the digit counts in training")
    offset_per: str = opt("sample", "one start for each batch (published) or each sample", choices=("batch", "sample"))
    grow: int = opt(300, "steps over which the largest start grows from 1 to --max-offset; 0 is at once (published)")
    foreign: int = opt(300, "step from which an example also sees the digits of one whose rows lie apart; -1: never")
    max_positions: int = opt(128, "rows of the tables of abacus and learned positions")
    # the model
    d_model: int = opt(128, "width")
    n_layer: int = opt(2, "layers in the block")
    recurrences: int = opt(2, "times the block is applied")
    n_head: int = opt(2, "attention heads")
    ff: int = opt(256, "width of the feed-forward layer after gating")
    norm: str = opt("pre", "RMSNorm before each part, or the published LayerNorm after it", choices=("pre", "post"))
    injection: str = opt("layer", "where the embedded input enters again", choices=INJECTIONS)
    logit_scale: str = opt("log", "of attention: none, or the logarithm of the context", choices=("none", "log"))
    state_init: str = opt("zero", "first state of training loops; noise is published", choices=("zero", "noise"))
    # training
    steps: int = opt(850, "optimizer steps")
    batch: int = opt(96, "examples per step, over all processes and buckets")
    buckets: int = opt(4, "parts of a batch sorted by length, each padded to its own longest example")
    lr: float = opt(3e-3, "peak learning rate of AdamW")
    warmup: int = opt(30, "steps of linear warm-up")
    cooldown: float = opt(0.4, "last part of the run, over which the rate falls to 0")
    beta2: float = opt(0.95, "AdamW's second decay rate")
    weight_decay: float = opt(0.0, "of matrices")
    clip: float = opt(1.0, "largest norm of the gradient")
    loss: str = opt("full", "gradients through all depth, or the published random one", choices=("full", "prog"))
    alpha: float = opt(1.0, "with --loss prog, the share of the random depth in the loss")
    seed: int = opt(0, "seed of the weights and the data")
    dtype: str = opt("float32", "of the matrix products in training", choices=("float32", "bfloat16"))
    # the run
    seeds: int = opt(1, "train so many seeds, from --seed on")
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    compile: bool = opt(False, "compile the layers")
    out: str = opt("results/abacus", "folder of what the run writes; train writes into its seedN/")
    resume: bool = opt(False, "train: go on from the checkpoint in --out")
    save_every: int = opt(200, "steps between checkpoints; 0 writes only the last")
    log_every: int = opt(10, "steps between lines in metrics.jsonl")
    minutes: float = opt(0.0, "train: save and stop after so long, to go on with --resume; 0 is no limit")
    # measuring
    lengths: tuple = opt((8, 10, 12, 14, 16, 20), "lengths n of the n+n problems in tables")
    probe: tuple = opt((8, 10), "lengths n of the n+n problems tried during training; best.pt is best at these")
    probe_every: int = opt(100, "steps between those")
    per_length: int = opt(200, "problems per length in tables")
    grid: int = opt(20, "most digits in heat maps")
    per_cell: int = opt(10, "problems per cell of a heat map")
    quick: bool = opt(False, "demo: Abacus alone")
    rivals: tuple = opt(("nope", "rope", "learned"), "demo: positions that Abacus is compared with")
    workers: int = opt(2, "demo without torchrun: processes that share the models, one thread each")
    few: int = opt(3, "demo: most digits in training of the second table")
    few_steps: tuple = opt((800, 800, 1000, 800), "demo: its steps, of Abacus and each rival (the last for others)")
    model: str = opt("results/abacus/seed0/best.pt", "eval: the weights to try")

    def __post_init__(self):
        kinds = self.pos.split("+")
        if bad := [p for p in kinds if p not in ENCODINGS]:
            raise ValueError(f"unknown position {bad[0]!r} in --pos {self.pos}; choose from {', '.join(ENCODINGS)}")
        if "nope" in kinds and len(kinds) > 1:
            raise ValueError(f"--pos {self.pos}: nope is the absence of all others and joins none")
        counts = "digits max_offset max_positions d_model n_layer n_head ff recurrences steps batch buckets seeds few "
        counts += "few_steps lengths probe log_every probe_every per_length grid per_cell"
        for name in [*counts.split(), "short", "grow"]:
            least, given = 0 if name in ("short", "grow") else 1, getattr(self, name)
            if min(given if isinstance(given, tuple) else (given,)) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {given}")
        if self.d_model % self.n_head:
            fit = ", ".join([str(h) for h in range(1, self.d_model + 1) if self.d_model % h == 0][:8])
            raise ValueError(f"--n-head {self.n_head} does not divide --d-model {self.d_model}; {fit} do")
        if "rope" in kinds and self.d_model // self.n_head % 2:
            raise ValueError(f"--pos rope turns pairs: --d-model / --n-head is {self.d_model // self.n_head}, not even")
        for f in fields(self):
            if f.metadata["choices"] and getattr(self, f.name) not in f.metadata["choices"]:
                allowed = ", ".join(f.metadata["choices"])
                raise ValueError(f"unknown {f.name} {getattr(self, f.name)!r}; choose from {allowed}")
        if not 0 <= self.cooldown <= 1 or not 0 <= self.alpha <= 1:
            raise ValueError("--cooldown and --alpha are parts of a whole, between 0 and 1")


# what shapes the numbers of a run, all from task to dtype: a checkpoint goes on only under the same
_names = [f.name for f in fields(Config)]
FIXED = _names[_names.index("task") : _names.index("dtype") + 1]

GPU = {  # 100 + 100 digits after training on 20
    "digits": 20, "max_offset": 100, "max_positions": 512, "ff": 1024, "buckets": 4, "beta2": 0.98, "dtype": "bfloat16",
    "compile": True, "save_every": 500, "log_every": 50, "probe": (20, 30, 40, 60, 100), "probe_every": 250,
    "lengths": (20, 40, 60, 80, 100, 110, 120), "per_length": 1000, "grid": 100, "per_cell": 100,
}  # fmt: skip
PRESETS = {
    "laptop": {},
    "h200": GPU | {  # within half an hour of one GPU
        "short": 500, "grow": 500, "foreign": 500, "d_model": 512, "n_layer": 4, "n_head": 8, "steps": 9000,
        "batch": 4096, "lr": 6e-4, "warmup": 270, "cooldown": 0.3,
    },
    "paper": GPU | {  # the published shape and recipe, 8 layers x 2; the budget in steps is ours
        "short": 0, "grow": 0, "foreign": -1, "offset_per": "batch", "d_model": 1024, "n_layer": 8, "n_head": 16,
        "norm": "post", "injection": "recurrence", "logit_scale": "none", "state_init": "noise", "loss": "prog",
        "steps": 4500, "batch": 8192, "lr": 1e-4, "warmup": 450, "cooldown": 0.1, "weight_decay": 0.01, "clip": 0.5,
    },
}  # fmt: skip


# ---- the method: a digit's position is its place in its number


def digit_positions(ids: Tensor, digit_ids, offset: int | Tensor = 1) -> Tensor:
    """Row of the Abacus table for each token: ids (B, T) -> (B, T) int64. Digits count offset, offset + 1, ... from the
    first of their run; all other tokens are 0.

    digit_ids: ten distinct token ids. offset: at least 1, a number or (B, 1); 1 is no shift. Two numbers without a
    token between them are one run. A position depends on the tokens before it alone. ValueError, TypeError.
    """
    _check_ids(ids)
    return _positions(ids, _digits(digit_ids).to(ids.device), _check_offset(offset, len(ids)).to(ids.device))


def _positions(ids: Tensor, digit_ids: Tensor, offset: Tensor) -> Tensor:
    digit = (ids[..., None] == digit_ids).any(dim=-1)  # (B, T)
    i = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(digit, -1, i).cummax(dim=1).values  # newest token that is no digit; -1: none so far
    return torch.where(digit, i - last + offset - 1, 0)


def _check_ids(ids: Tensor) -> None:
    if ids.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"ids must be integer token ids, got {ids.dtype}. Convert them: ids.long()")
    if ids.ndim != 2:
        raise ValueError(f"ids must have shape (batch, time), got {tuple(ids.shape)}")


def _digits(digit_ids) -> Tensor:
    distinct = set(digit_ids.tolist() if isinstance(digit_ids, Tensor) else digit_ids)
    if len(digit_ids) != 10 or len(distinct) != 10:
        raise ValueError(f"digit_ids must be ten distinct token ids, got {len(distinct)}")
    return torch.as_tensor(digit_ids)


def _check_offset(offset, batch: int, largest: float = math.inf) -> Tensor:
    """offset as a tensor () or (B, 1). ValueError: another shape, or outside 1..largest."""
    offset = torch.as_tensor(offset)
    if offset.ndim and offset.shape != (batch, 1):
        raise ValueError(f"offset must be a scalar or (batch, 1), got {tuple(offset.shape)} for {batch} rows")
    if (bad := offset[(offset < 1) | (offset > largest)]).numel():
        allowed = "at least 1" if largest == math.inf else f"in 1..{largest}"
        raise ValueError(f"offset must be {allowed}, got {int(bad[0])}")
    return offset


def _check_rows(span: int, offset: int, rows: int) -> None:
    if (need := span + offset - 1) >= rows:
        span = f"digit span of {span} tokens with offset {offset}"
        raise BadInput(f"{span} needs row {need} but the table has {rows} rows")


class AbacusEmbedding(nn.Module):
    """E[row], to be added to the token embedding; one offset shifts all numbers of an example alike.

    In training the offset is drawn from 1..max_offset, so that rows beyond the training lengths are trained; in eval
    mode it is 1. Row 0, which all other tokens share, is learned like the rest.
    """

    def __init__(self, digit_ids, dim: int, max_positions: int = 1024, max_offset: int = 100, offset_per="batch"):
        super().__init__()
        if offset_per not in ("batch", "sample"):
            raise ValueError(f"offset_per must be batch or sample, got {offset_per!r}")
        self.register_buffer("digit_ids", _digits(digit_ids), persistent=False)
        self.max_offset, self.offset_per = max_offset, offset_per
        self.table = nn.Embedding(max_positions, dim)

    def draw(self, batch: int, generator: torch.Generator | None = None, largest: int = 0) -> Tensor:
        """Random offsets in 1..(largest or max_offset), (batch, 1), all equal with offset_per batch; on the CPU."""
        rows = batch if self.offset_per == "sample" else 1
        return torch.randint(1, (largest or self.max_offset) + 1, (rows, 1), generator=generator).expand(batch, 1)

    def forward(self, ids: Tensor, offset=None, generator: torch.Generator | None = None) -> Tensor:
        """ids (B, T) -> (B, T, dim). ValueError: a count outgrows the table, or a bad offset."""
        _check_ids(ids)
        if offset is None:
            offset = self.draw(len(ids), generator) if self.training else 1
        offset = _check_offset(offset, len(ids), self.max_offset)
        largest = int(offset.max()) if offset.numel() else 1  # offsets are on the CPU: no wait for the GPU
        row = _positions(ids, self.digit_ids, offset.to(ids.device, non_blocking=True))  # (B, T)
        if ids.shape[1] + largest - 1 >= self.table.num_embeddings and row.numel():  # only then look at the rows
            worst = int(row.max(dim=1).values.argmax())
            own = int(offset.expand(len(ids), 1)[worst])
            _check_rows(int(row[worst].max()) - own + 1, own, self.table.num_embeddings)
        return self.table(row)


def foreign_digits(row: Tensor) -> tuple[Tensor, Tensor]:
    """What an example of a batch sees in training: row (B, T), rows of the Abacus table -> the example beside each,
    (B,), and True where query t may see key s, (B, T, 2 T), s from T on being a key of the example beside.

    Two rows meet in attention only within one example. Of rows further apart than any number in training nothing says
    that they must ignore each other, chance decides, and a number that has ended goes on with some digit from afar. So
    here the digits of an example also see those of the one beside it, if all rows of these lie apart from its own:
    nothing there fits, and ignoring it is learned for all distances up to the largest offset. Its other tokens, "="
    above all, which has to find the first digit of each number without a row, see those that are no number's first.
    """
    i, T = torch.arange(len(row), device=row.device), row.shape[1]
    beside = (i ^ 1).clamp(max=max(0, len(row) - 1))  # pairs; a last one without a partner is its own
    digit = row > 0
    low, high = row.masked_fill(~digit, 2**30).amin(dim=1), row.amax(dim=1)
    apart = (high + 1 < low[beside]) | (high[beside] + 1 < low)  # (B,)
    later = row > low[:, None]  # (B, T)
    foreign = apart[:, None, None] & torch.where(digit[:, :, None], digit[beside][:, None], later[beside][:, None])
    own = torch.ones(T, T, dtype=torch.bool, device=row.device).tril().expand_as(foreign)  # (B, T, T) both
    return beside, torch.cat([own, foreign], dim=2)


# ---- the model


class FIRE(nn.Module):
    """Attention bias (arXiv:2310.04418): an MLP of log(|c (q - k)| + 1), normalised by the query's place."""

    def __init__(self, heads: int, width: int = 32, c: float = 0.1, L: float = 512.0, eps: float = 1e-6):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, heads))
        self.c, self.L_multiplier = nn.Parameter(torch.tensor(c)), nn.Parameter(torch.tensor(1.0))
        self.init_L = nn.Parameter(torch.tensor(L), requires_grad=False)
        self.eps = eps

    def forward(self, T: int, device=None) -> Tensor:
        """Bias (1, heads, T queries, T keys) to add to the scaled scores; meant for keys up to the query."""
        i = torch.arange(T, device=device, dtype=torch.float32)
        near = (self.c * (i[:, None] - i)).abs()  # (T, T)
        far = (self.c * torch.maximum(i, (self.L_multiplier * self.init_L).abs())).abs()[:, None]  # (T, 1)
        x = (near + 1).log() / ((far + 1).log() + self.eps)  # (T, T)
        return rearrange(self.mlp(x[..., None].to(self.c.dtype)), "q k h -> 1 h q k")


class GLU(nn.Module):
    """down(value * gelu(gate)): (..., C) -> (..., C)."""

    def __init__(self, C: int, F_: int):
        super().__init__()
        self.up, self.down = nn.Linear(C, 2 * F_, bias=False), nn.Linear(F_, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)  # (..., F) each
        return self.down(value * F.gelu(gate))


def _norm(cfg: "Config") -> nn.Module:
    return nn.RMSNorm(cfg.d_model, eps=1e-6) if cfg.norm == "pre" else nn.LayerNorm(cfg.d_model, eps=1e-12)


class Layer(nn.Module):
    """Causal attention, then a GLU; the norms before each part or after it: (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.H, self.pre, kinds = cfg.n_head, cfg.norm == "pre", cfg.pos.split("+")
        C = cfg.d_model
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.glu = GLU(C, cfg.ff)
        self.norms = nn.ModuleList([_norm(cfg), _norm(cfg)])
        self.rope, self.log = "rope" in kinds, cfg.logit_scale == "log"
        if "fire" in kinds:
            self.fire = FIRE(cfg.n_head)

    def attend(self, x: Tensor, foreign: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Causal attention: x (B, T, C) -> (B, T, C). foreign: what foreign_digits gives, or own keys alone."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.H)  # 3 x (B, H, T, D)
        T, D, dev = x.shape[1], q.shape[-1], x.device
        t = torch.arange(T, device=dev, dtype=torch.float32)
        if self.rope:
            angle = torch.outer(t, 10000 ** (-torch.arange(0, D, 2, device=dev) / D))  # (T, D/2)
            q, k = rotate(q, angle), rotate(k, angle)
        if self.log:  # attention spreads thinner as the context grows; sharpen it in step
            q = q * ((t + 2).log() / math.log(16)).to(q.dtype)[:, None]
        mask = None
        if foreign is not None:
            beside, seen = foreign
            k, v = (torch.cat([y, y[beside]], dim=2) for y in (k, v))  # (B, H, 2T, D)
            mask = seen[:, None]  # (B, 1, T, 2T)
        if hasattr(self, "fire"):
            own = torch.ones(T, T, dtype=torch.bool, device=dev).tril() if mask is None else mask
            bias = F.pad(self.fire(T, dev), (0, own.shape[-1] - T))  # (1, H, T, T or 2T)
            mask = bias.masked_fill(~own, -math.inf).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))

    def forward(self, x: Tensor, foreign: tuple[Tensor, Tensor] | None = None) -> Tensor:
        first, second = self.norms
        if self.pre:
            x = x + self.attend(first(x), foreign)
            return x + self.glu(second(x))
        x = first(x + self.attend(x, foreign))
        return second(x + self.glu(x))


class ArithmeticTransformer(nn.Module):
    """A block of layers applied several times, the embedded input entering again on the way (looped, injected).

    forward(ids (B, T)) -> logits (B, T, vocab). ValueError at construction: the table is too small for training.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, kinds, C = cfg, cfg.pos.split("+"), cfg.d_model
        self.token = nn.Embedding(vocab_size(cfg.task), C)
        if "abacus" in kinds:
            longest = {"add": cfg.digits + 1, "mul": 2 * cfg.digits}.get(cfg.task, cfg.digits)
            _check_rows(longest, cfg.max_offset, cfg.max_positions)
            self.abacus = AbacusEmbedding(DIGITS, C, cfg.max_positions, cfg.max_offset, cfg.offset_per)
        if "learned" in kinds:
            self.learned = nn.Embedding(cfg.max_positions, C)
        self.norm_in = _norm(cfg)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        if cfg.norm == "post":
            self.head, self.map = GLU(C, cfg.ff), nn.Linear(C, C, bias=False)
        self.norm_out = _norm(cfg)
        self.decoder = nn.Linear(C, vocab_size(cfg.task), bias=False)
        self.init(cfg)

    def init(self, cfg: Config) -> None:
        """Weights from (seed, name): two models that differ in positions alone start with the rest equal."""
        gain = (8 * cfg.n_layer * cfg.recurrences) ** -0.25 if cfg.norm == "post" else 1.0  # pre-norm needs no less
        for name, p in self.named_parameters():
            g = cluster.generator(cfg.seed, 0, zlib.crc32(name.encode()))
            if p.device.type == "meta" or (p.ndim < 2 and "mlp" not in name):
                continue
            if "fire" in name:
                bound = 1.0 if "mlp.0" in name else 32**-0.5  # PyTorch's own for linear layers
                nn.init.uniform_(p, -bound, bound, generator=g)
            elif name.startswith(("token", "abacus", "learned")):
                nn.init.normal_(p, std=cfg.d_model**-0.5, generator=g)
            elif "qkv" in name:
                for part, by in zip(p.chunk(3), (1, 1, gain), strict=True):
                    nn.init.xavier_normal_(part, by, generator=g)
            else:
                nn.init.xavier_normal_(p, gain, generator=g)

    def embed(self, ids: Tensor, offset=None) -> Tensor:
        """e, the normalised sum of token and position embeddings: ids (B, T) -> (B, T, C)."""
        e = self.token(ids) + self.abacus(ids, offset) if hasattr(self, "abacus") else self.token(ids)
        if hasattr(self, "learned"):
            if ids.shape[1] > self.cfg.max_positions:
                raise BadInput(f"{ids.shape[1]} tokens exceed the {self.cfg.max_positions} learned positions")
            e = e + self.learned.weight[: ids.shape[1]]
        return self.norm_in(e)

    def forward(
        self, ids: Tensor, recurrences: int | None = None, no_grad_recurrences: int = 0, offset=None, foreign=False
    ) -> Tensor:
        """Logits (B, T, vocab) after no_grad_recurrences without gradients and then `recurrences` with them.

        offset: of the digit counts; None draws it in training and is 1 in eval mode. foreign: see foreign_digits; needs
        an offset. ValueError: recurrences < 1.
        """
        R, how = self.cfg.recurrences if recurrences is None else recurrences, self.cfg.injection
        if R < 1 or no_grad_recurrences < 0:
            raise ValueError(f"recurrences must be at least 1, got {R}, and no_grad_recurrences at least 0")
        _check_ids(ids)
        e = self.embed(ids, offset)  # (B, T, C)
        seen = foreign_digits(_positions(ids, self.abacus.digit_ids, offset.to(ids.device))) if foreign else None
        noisy = self.training and self.cfg.state_init == "noise"  # in eval mode decoding stays deterministic
        x = torch.randn_like(e) * 0.02 if noisy else torch.zeros_like(e)
        x = e if how == "none" else x + e if how == "first" else x
        for r in range(no_grad_recurrences + R):
            with torch.set_grad_enabled(torch.is_grad_enabled() and r >= no_grad_recurrences):
                for i, layer in enumerate(self.layers):
                    if how == "layer" or (how == "recurrence" and i == 0):
                        x = x + e
                    x = layer(x, seen)
        x = self.map(self.norm_out(self.head(x))) if self.cfg.norm == "post" else self.norm_out(x)
        return self.decoder(x)


def _depths(R: int, alpha: float, generator) -> list[tuple[int, int, float]]:
    """(recurrences without gradient, with gradient, weight) of the terms of the progressive loss."""
    K = max(R // 2, 1)
    n = int(torch.randint(R, (), generator=generator))
    k = int(torch.randint(1, min(R - n, K) + 1, (), generator=generator))
    return [d for d in ((R - K, K, 1 - alpha), (n, k, alpha)) if d[2]]


class Objective(nn.Module):
    """Cross entropy summed over the targets that are not -100, in fp32, and over the depths by weight. A module, so
    that DDP sees one forward pass per bucket whatever the depths."""

    def __init__(self, model: ArithmeticTransformer):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, offset, depths, foreign: bool = False) -> Tensor:
        terms = []
        for before, R, weight in depths:
            logits = self.model(ids[:, :-1], R, before, offset, foreign)  # (B, T - 1, V)
            logits = logits.float() if logits.dtype == torch.bfloat16 else logits
            terms.append(weight * F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        return torch.stack(terms).sum()


def progressive_loss(model, batch: "Batch", alpha: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """(1 - alpha) L_max + alpha L_prog, means over the targets. L_prog runs a random depth, the last steps of it with
    gradients; L_max the full depth, its last half with gradients (Bansal et al., arXiv:2202.05826)."""
    shifted = model.training and hasattr(model, "abacus")
    offset = model.abacus.draw(len(batch.ids), generator) if shifted else None
    depths = _depths(model.cfg.recurrences, alpha, generator)
    return Objective(model)(batch.ids, batch.targets, offset, depths) / (batch.targets != -100).sum().clamp(min=1)


# ---- the experiment: numbers least significant digit first, made on the device

PAD, EOS, PLUS, MINUS, TIMES, EQUALS = 0, 3, 14, 15, 16, 17
DIGITS = tuple(range(4, 14))
LABELS = string.ascii_uppercase + string.ascii_lowercase.replace("x", "")  # x is the sign of multiplication
CHARS = {c: i for i, c in enumerate("0123456789+-x=", start=4)}
CHARS |= {c: i for i, c in enumerate(LABELS + ",:", start=19)}  # 18, the space, is never used
LABEL, COMMA, COLON = 19, 19 + len(LABELS), 20 + len(LABELS)
TEXT = {i: c for c, i in CHARS.items()}


def vocab_size(task: str) -> int:
    """Token ids of a task: the published 19, and those of labels and separators for sort."""
    return 21 + len(LABELS) if task == "sort" else 19


def encode(text: str) -> Tensor:
    """Token ids (T,) of a problem as text; adds no EOS. ValueError: a space, or a character without a token."""
    for at, c in enumerate(text):
        if c == " ":
            raise ValueError(f"space at position {at}: numbers must be written without spaces")
        if c not in CHARS:
            raise ValueError(f"character {c!r} at position {at} has no token; there are 0-9 + - x = and labels")
    return torch.tensor([CHARS[c] for c in text], dtype=torch.long)


def decode(ids) -> str:
    """The text of a sequence of ids up to EOS, without PAD."""
    before_eos = takewhile(lambda i: i != EOS, map(int, ids))
    return "".join(TEXT.get(i, "?") for i in before_eos if i != PAD)


def format_example(op: str, a: int | str, b: int | str) -> str:
    """A problem and its answer, each number reversed, without EOS: ("+", 97, 8) -> "79+8=501". ValueError: the operator
    is not + - x, or an operand is negative, no number, or has leading zeros."""
    fn = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
    if op not in fn:
        raise ValueError(f"operator {op!r} is not one of + - x")
    for s in (str(a), str(b)):
        if not (s.isascii() and s.isdigit()) or (s[0] == "0" and len(s) > 1):
            raise ValueError(f"operand {s!r} must be a number >= 0 in digits without leading zeros")
    return f"{str(a)[::-1]}{op}{str(b)[::-1]}={str(fn[op](int(a), int(b)))[::-1]}"


class Batch(NamedTuple):
    ids: Tensor  # (B, T) int64, right-padded
    targets: Tensor  # (B, T - 1): the next token where it belongs to the answer, else -100
    lengths: Tensor  # (B, 2): digits of a and b; elements and most digits for sort


def answer_targets(ids: Tensor, check: bool = True) -> Tensor:
    """Next-token targets after "=", EOS included: ids (B, T) -> (B, T - 1). ValueError: not one "=" in a row, which
    takes a wait for the GPU to check."""
    _check_ids(ids)
    equals = ids == EQUALS
    for row in (equals.sum(dim=1) != 1).nonzero().flatten().tolist() if check else ():
        raise ValueError(f"row {row} has {int(equals[row].sum())} '=' tokens, expected 1")
    after = equals.cumsum(dim=1)[:, :-1] > 0  # (B, T - 1)
    return ids[:, 1:].long().masked_fill(~after | (ids[:, 1:] == PAD), -100)


def _pack(pieces: list[tuple[Tensor | int, Tensor | int]], batch: int, width: int, device) -> Tensor:
    """Rows of pieces set end to end, (B, width) or as wide as needed. A piece: tokens (B, w) or one id, and how many of
    them count, (B,) or a number."""
    wide = lambda x: torch.as_tensor(x, device=device).reshape(-1, 1).expand(batch, 1)
    tokens = [wide(t) if isinstance(t, int) else t for t, _ in pieces]  # (B, w) each
    kept = [torch.arange(t.shape[1], device=device) < wide(n) for t, (_, n) in zip(tokens, pieces, strict=True)]
    tokens, kept = torch.cat(tokens, dim=1), torch.cat(kept, dim=1)  # (B, all)
    place = kept.cumsum(dim=1) - 1
    width = width or (int(place.max()) + 1 if batch else 0)
    rows = torch.full((batch, width + 1), PAD, dtype=torch.long, device=device)  # last column: what is left out
    return rows.scatter_(1, torch.where(kept, place, width), tokens)[:, :-1]


def _number(length: Tensor, width: int, generator, device) -> Tensor:
    """Digits of uniform numbers of exactly these lengths, least significant first, 0 beyond: (B,) -> (B, width)."""
    low = torch.randint(10, (len(length), width), generator=generator, device=_home(generator)).to(device)
    top = torch.randint(1, 10, (len(length), 1), generator=generator, device=_home(generator)).to(device)
    c = torch.arange(width, device=device)
    return torch.where(c == length[:, None] - 1, top, low) * (c < length[:, None])


def _home(generator) -> torch.device:
    return generator.device if generator else torch.device("cpu")


def _length(digits: Tensor) -> Tensor:
    """Digits of each number without leading zeros, at least 1: (B, W) -> (B,)."""
    c = torch.arange(digits.shape[1], device=digits.device)
    return torch.where(digits != 0, c, 0).max(dim=1).values + 1


def _carry(decides: Tensor, yes: Tensor) -> Tensor:
    """1 where a column receives a carry: the newest lower column that decides says yes. All (B, W)."""
    c = torch.arange(decides.shape[1], device=decides.device)
    at = F.pad(torch.where(decides, c, -1).cummax(dim=1).values, (1, 0), value=-1)[:, :-1]  # the newest lower, or -1
    return ((at >= 0) & yes.gather(1, at.clamp(min=0))).long()


def add_digits(a: Tensor, b: Tensor) -> Tensor:
    """Digits of a + b, least significant first, modulo 10^W: all (B, W). No loop over columns: the carry into a column
    is decided by the newest lower column whose sum is not 9."""
    s = a + b
    return (s + _carry(s != 9, s >= 10)) % 10


def sub_digits(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Digits of |a - b|, (B, W), and whether a < b, (B,)."""
    s = a - b
    negative = s.gather(1, (_length(s) - 1)[:, None]) < 0  # (B, 1): the highest column that differs
    s = torch.where(negative, -s, s)
    return (s - _carry(s != 0, s < 0)) % 10, negative[:, 0]


def mul_digits(a: Tensor, b: Tensor) -> Tensor:
    """Digits of a b: (B, W) each -> (B, 2 W). A convolution of the digits, then carries from column to column."""
    W = a.shape[1]
    s = torch.stack([F.pad(a[:, c : c + 1] * b, (c, W - c)) for c in range(W)]).sum(dim=0)  # (B, 2 W)
    digits, carry = [], torch.zeros_like(s[:, 0])
    for column in s.unbind(dim=1):
        carry = column + carry
        digits.append(carry % 10)
        carry = carry // 10
    return torch.stack(digits, dim=1)


def _arithmetic(task: str, cells: Tensor, generator, device) -> list:
    """The pieces of a + b, a - b or a x b and the answer."""
    i, j = cells.to(device).unbind(dim=1)
    W = int(cells.max()) + (task == "add") if len(cells) else 1
    a, b = _number(i, W, generator, device), _number(j, W, generator, device)  # (B, W)
    question = [(a + 4, i), ({"add": PLUS, "sub": MINUS, "mul": TIMES}[task], 1), (b + 4, j), (EQUALS, 1)]
    if task == "sub":
        c, negative = sub_digits(a, b)
        return [*question, (c + 4, _length(c)), (MINUS, negative.long())]  # reversed, a sign comes last
    c = add_digits(a, b) if task == "add" else mul_digits(a, b)
    return [*question, (c + 4, _length(c))]


def _or(cells: Tensor, generator, device) -> list:
    """Bitwise OR, not reversed: a single 1, in the shorter operand; of equal ones a coin decides."""
    u = torch.rand(2, len(cells), generator=generator, device=_home(generator)).to(device)
    i, j = cells.to(device).unbind(dim=1)
    short, long = torch.minimum(i, j), torch.maximum(i, j)
    W = torch.arange(int(cells.max()) if len(cells) else 1, device=device)
    hot = (W == (u[0] * short).long()[:, None]).long()  # (B, W): one 1, in the shorter operand
    first = torch.where(i == j, u[1] < 0.5, i < j).long()[:, None]  # (B, 1): a is the hot one
    return [(hot * first + 4, i), (PLUS, 1), (hot * (1 - first) + 4, j), (EQUALS, 1), (hot + 4, long)]


def _sort(cells: Tensor, generator, device) -> list:
    """Labelled numbers, then their labels in order of value, ties as they came: i elements of up to j digits."""
    m, n = cells.max(dim=0).values.tolist() if len(cells) else (1, 1)
    if m > len(LABELS):
        raise BadInput(f"{m} elements need as many labels, there are {len(LABELS)}")
    i, j = cells.to(device).unbind(dim=1)
    u = torch.rand(len(i), m + 1, generator=generator, device=_home(generator)).to(device)
    size = (u[:, 1:] * j[:, None]).long() + 1  # (B, m): digits of each element
    value = _number(size.flatten(), n, generator, device).unflatten(0, (len(i), m))  # (B, m, n)
    label = ((u[:, :1] * len(LABELS)).long() + torch.arange(m, device=device)) % len(LABELS) + LABEL  # (B, m)
    order = torch.arange(m, device=device).expand(len(i), m)
    absent = (order >= i[:, None]).long()  # elements beyond the row's own go last
    for key in (*value.unbind(dim=2), absent):  # radix sort: stable, from the least significant digit
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    answer, question, end = label.gather(1, order), [], []
    for e in range(m):
        there = (e < i).long()
        comma = (COMMA, there * (e > 0))
        question += [comma, (label[:, [e]], there), (COLON, there), (value[:, e] + 4, size[:, e] * there)]
        end += [comma, (answer[:, [e]], there)]
    return [*question, (EQUALS, 1), *end]


def example_width(task: str, i, j):
    """Most tokens of an example of this cell, EOS included; i, j numbers or tensors."""
    if task == "sort":
        return 2 * i + i * (j + 1) + 2 * i
    longest = (i + j + abs(i - j)) // 2
    return i + j + 3 + {"add": longest + 1, "sub": longest + 1, "mul": i + j, "or": longest}[task]


def _cells(batch: int, lengths, generator) -> Tensor:
    """(B, 2) lengths, uniform over the cells that `lengths` names; on the CPU."""
    cells = (1, lengths) if isinstance(lengths, int) else lengths
    if len(cells) == 2 and isinstance(cells[0], int):
        cells = product(range(cells[0], cells[1] + 1), repeat=2)
    cells = torch.tensor([tuple(c) for c in cells])  # (cells, 2)
    if not len(cells) or cells.min() < 1:
        raise ValueError(f"lengths must be N >= 1, (least, most) or a list of (i, j), got {lengths}")
    return cells[torch.randint(len(cells), (batch,), generator=generator, device=_home(generator)).cpu()]


def make_batch(task: str, batch: int, lengths=20, device="cpu", generator: torch.Generator | None = None) -> Batch:
    """Fresh problems with their answers and EOS. lengths: most digits, (least, most), or a list of cells (i, j) to
    draw from. Equal generators give equal problems. ValueError: an unknown task or bad lengths."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    return _fill(task, _cells(batch, lengths, generator), generator, device)


def _fill(task: str, cells: Tensor, generator, device, width: int = 0) -> Batch:
    make = {"or": _or, "sort": _sort}.get(task, functools.partial(_arithmetic, task))
    ids = _pack([*make(cells, generator, device), (EOS, 1)], len(cells), width, device)
    return Batch(ids, answer_targets(ids, check=False), cells)


# ---- the experiment: exact match in one pass


@contextlib.contextmanager
def _evaluating(model):
    was = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was)


def score(model, ids: Tensor, targets: Tensor) -> Tensor:
    """(B, 3) bool: all answer tokens right; the first; all others. One pass over the reference answers.

    Greedy decoding equals the reference exactly if each token is the argmax given the reference before it.
    """
    right = (model(ids[:, :-1]).argmax(dim=-1) == targets) | (targets == -100)  # (B, T - 1)
    asked = (targets != -100).cumsum(dim=1)
    return torch.stack([right.all(1), (right | (asked != 1)).all(1), (right | (asked == 1)).all(1)], dim=1)


def generate(model, prompt_ids: Tensor, max_new: int, eos: int = EOS) -> Tensor:
    """Greedy continuation, token by token: prompt_ids (B, T) or (T,) -> the new tokens alone, (B, up to max_new), PAD
    after eos. The prompts of a batch must have one length."""
    ids = prompt_ids[None] if prompt_ids.ndim == 1 else prompt_ids
    T, done = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    with _evaluating(model):
        for _ in range(max_new):
            new = model(ids)[:, -1].argmax(dim=-1).masked_fill(done, PAD)  # (B,)
            ids, done = torch.cat([ids, new[:, None]], dim=1), done | (new == eos)
            if done.all():
                break
    return ids[0, T:] if prompt_ids.ndim == 1 else ids[:, T:]


def problems(task: str, i: int, j: int, n: int, seed: int = 0) -> Batch:
    """The n problems of a cell: a function of these numbers alone, apart from all training data."""
    cells = torch.tensor([[i, j]]).expand(n, 2)
    return _fill(task, cells, cluster.generator(seed, 2, TASKS.index(task), i, j), "cpu")


def exact_match(model, i: int, j: int, n: int = 200, task: str = "add", seed: int = 0) -> float:
    """Share of n fresh problems of i and j digits whose whole answer and EOS are right."""
    return evaluate_cells(model, [(i, j)], n, task, seed)[0, 0].item()


def evaluate_cells(model, cells, n: int, task: str = "add", seed: int = 0, what: str = "", group=None) -> Tensor:
    """Accuracy of n problems of each cell (i, j): (cells, 3) float64, columns as in score. Collective: the ranks of
    `group` share the work, in pieces that do not depend on their number. what: names a progress bar."""
    device = next(model.parameters()).device
    together = dist.is_initialized()
    w = cluster.World(dist.get_rank(), dist.get_world_size(group), device) if together else cluster.World(0, 1, device)
    room, parts = 2**20 if device.type == "cuda" else 2**11, []  # tokens in a piece: it should fit into a cache
    for c in sorted(range(len(cells)), key=lambda c: example_width(task, *cells[c])):  # like widths together
        if not parts or (len(parts[-1]) + 1) * n * example_width(task, *cells[c]) > room:
            parts.append([])
        parts[-1].append(c)
    parts = parts[w.rank % w.size :: w.size]
    found = torch.zeros(len(cells), 3, dtype=torch.float64)
    with _evaluating(model):
        for part in report.progress(parts, what, w) if what else parts:
            made = [problems(task, *cells[c], n, seed).ids for c in part]
            wide = max(x.shape[1] for x in made)
            ids = torch.cat([F.pad(x, (0, wide - x.shape[1]), value=PAD) for x in made]).to(device)
            pieces = ids.split(max(1, room // wide))
            right = torch.cat([score(model, x, answer_targets(x, check=False)) for x in pieces])  # (part * n, 3)
            found[part] = right.double().unflatten(0, (len(part), n)).mean(dim=1).cpu()
    return cluster.total(found.to(device), group).cpu() if together else found


def evaluate_grid(model, sizes_a, sizes_b, n=100, task="add", seed=0, what="", group=None) -> Tensor:
    """Exact match over operand lengths: (len(sizes_a), len(sizes_b)) float64. Collective."""
    cells = list(product(sizes_a, sizes_b))
    return evaluate_cells(model, cells, n, task, seed, what, group)[:, 0].reshape(len(sizes_a), len(sizes_b))


def examine(model, cfg: Config, seed: int, what: str = "", group=None) -> dict:
    """Exact match, first digit and the rest at cfg.lengths, and exact match on a grid of lengths. Collective."""
    cells, sizes = [(n, n) for n in cfg.lengths], range(1, cfg.grid + 1)
    columns = evaluate_cells(model, cells, cfg.per_length, cfg.task, seed, "", group).T.tolist()
    exact, first, rest = (dict(zip(cfg.lengths, column, strict=True)) for column in columns)
    grid = evaluate_grid(model, sizes, sizes, cfg.per_cell, cfg.task, seed, f"{what}grid", group)
    f = {"pos": cfg.pos, "digits": cfg.digits, "seed": cfg.seed, "exact": exact, "first": first, "rest": rest}
    return f | {"trained": grid[: cfg.digits, : cfg.digits].mean().item(), "steps": cfg.steps, "grid": grid.tolist()}


# ---- the experiment: training


class Trainer:
    """One run: model, AdamW, and a step over buckets whose loss is normalised over all of them and all ranks.

    group: the ranks that share the batch (default: all), w.size of them.
    """

    def __init__(self, cfg: Config, w: cluster.World, state: dict | None = None, group=None):
        self.cfg, self.w, self.step, self.best, self.group = cfg, w, 0, -1.0, group
        pairs = cfg.foreign >= 0 and w.size > 1  # of examples beside each other, which stay on one rank
        if cfg.batch % (w.size * cfg.buckets * (1 + pairs)):
            parts = f"{w.size} processes x --buckets {cfg.buckets}" + pairs * " in pairs (--foreign)"
            raise BadInput(f"--batch {cfg.batch} does not divide over {parts}")
        self.model = ArithmeticTransformer(cfg).to(w.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        split = ([p for p in trained if p.ndim > 1], cfg.weight_decay), ([p for p in trained if p.ndim < 2], 0.0)
        groups = [{"params": params, "weight_decay": decay} for params, decay in split]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), eps=1e-8, fused=True)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best = state["step"], state["best"]
        if cfg.compile:
            for layer in self.model.layers:
                layer.compile()
        self.objective = Objective(self.model)
        if w.size > 1:  # on one process it would only cost a tenth of a step
            unused = cfg.loss == "prog" and cfg.injection in ("none", "first")  # then e may get no gradient
            self.objective = DistributedDataParallel(self.objective, process_group=group, find_unused_parameters=unused)

    def state(self, whole: bool = True) -> dict:
        """What checkpoint.pt holds; not whole, what best.pt holds: weights in half precision, small to carry away."""
        weights, setting = self.model.state_dict(), {name: getattr(self.cfg, name) for name in FIXED}
        more = {"optimizer": self.optimizer.state_dict(), "best": self.best} if whole else {}
        weights = weights if whole else {name: p.half() for name, p in weights.items()}
        return {"model": weights, "step": self.step, "setting": setting, **more}

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The step's buckets, each (ids, targets, offsets), shortest first: a function of seed and step alone.

        All lengths of the batch are drawn first and then sorted, so every cell (i, j) stays equally likely.
        """
        cfg, g = self.cfg, cluster.generator(self.cfg.seed, 3, self.step)
        grown = lambda over, most: 1 + int(min(1, self.step / over) * (most - 1)) if over else most
        cells = _cells(cfg.batch, grown(cfg.short, cfg.digits), g)
        width = example_width(cfg.task, cells[:, 0], cells[:, 1])
        order, unit = width.argsort(stable=True), 8 if self.w.device.type == "cuda" else 1
        offset = torch.ones(cfg.batch, 1, dtype=torch.long)
        if hasattr(self.model, "abacus"):
            offset = self.model.abacus.draw(cfg.batch, g, grown(cfg.grow, cfg.max_offset))
        parts = []
        for part, shift in zip(order.chunk(cfg.buckets), offset.chunk(cfg.buckets), strict=True):
            wide = -(-int(width[part].max()) // unit) * unit
            parts.append((*_fill(cfg.task, cells[part], g, self.w.device, wide)[:2], shift))
        return parts

    def advance(self, log: bool) -> dict:
        """One optimizer step; with `log` its loss (a collective more)."""
        cfg, w = self.cfg, self.w
        parts = self.batches()
        count = sum((targets != -100).sum() for _, targets, _ in parts)  # over all ranks: each made the whole batch
        if cfg.state_init == "noise":  # drawn from torch's own generator: let it too depend on seed and step alone
            torch.manual_seed(cluster.generator(cfg.seed, 5, self.step).initial_seed())
        random = _depths(cfg.recurrences, cfg.alpha, cluster.generator(cfg.seed, 4, self.step))
        depths = random if cfg.loss == "prog" else [(0, cfg.recurrences, 1.0)]
        total, n = torch.zeros((), device=w.device), cfg.batch // (cfg.buckets * w.size)
        mine = slice(w.rank % w.size * n, (w.rank % w.size + 1) * n)
        foreign = 0 <= cfg.foreign <= self.step and hasattr(self.model, "abacus")
        for k, (ids, targets, offset) in enumerate(parts):
            self.objective.require_backward_grad_sync = k == len(parts) - 1
            with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                loss = self.objective(ids[mine], targets[mine], offset[mine], depths, foreign)
            (loss * w.size / count).backward()  # DDP averages over the ranks
            total += loss.detach()
        falling = (cfg.steps - self.step) / max(1, cfg.cooldown * cfg.steps)
        lr = cfg.lr * min(1, (self.step + 1) / max(1, cfg.warmup), falling)
        for params in self.optimizer.param_groups:
            params["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if not log:
            return {}
        return {"loss": float(cluster.total(total, self.group) / count), "lr": lr, "grad_norm": float(norm)}

    def probe(self, lengths: tuple, n: int = 64) -> dict:
        """Exact match, first digit and all other digits at n+n digits (sort: n elements of n digits). Collective."""
        cells, names = [(m, m) for m in lengths], ("exact", "first", "rest")
        found = evaluate_cells(self.model, cells, n, self.cfg.task, self.cfg.seed, "", self.group).T.tolist()
        columns = zip(names, found, strict=True)
        return {f"{name}_{m}": x for name, column in columns for m, x in zip(lengths, column, strict=True)}

    def run(self, log, what: str, folder: str = "") -> "Trainer":
        """Train to the end, calling log(run=what, ...); `folder` gets best.pt and, also on SIGTERM, checkpoint.pt."""
        cfg, w, start, shown, asked = self.cfg, self.w, time.monotonic(), "", False
        listen = cluster.stop_signal() if folder else contextlib.nullcontext(bool)  # bool() is False
        with listen as stopping, report.progress(None, what, w, cfg.steps, self.step) as bar:
            while self.step < cfg.steps:
                last = self.step + 1 == cfg.steps
                line = self.advance((self.step + 1) % cfg.log_every == 0 or last)
                if self.step % cfg.probe_every == 0 or last:
                    line |= self.probe(cfg.probe)
                    exact = [line[f"exact_{n}"] for n in cfg.probe]
                    shown = " ".join(f"{n}+{n} {x:.2f}" for n, x in zip(cfg.probe, exact, strict=True))
                    better, self.best = sum(exact) >= self.best, max(sum(exact), self.best)
                    if folder and better and w.main:
                        cluster.save(f"{folder}/best.pt", self.state(whole=False))
                if line:
                    log(run=what, step=self.step, **line)
                    bar.set_postfix_str(f"{shown} loss {line.get('loss', math.nan):.3f}")
                bar.update()
                late, asked = False, stopping()
                if cfg.minutes:  # the ranks' clocks differ: one late, all late
                    over = int(time.monotonic() - start > 60 * cfg.minutes)
                    late = bool(cluster.total(torch.tensor(over, device=w.device)))
                due = asked or late or last or (cfg.save_every and self.step % cfg.save_every == 0)
                if folder and due and w.main:
                    cluster.save(f"{folder}/checkpoint.pt", self.state())
                if (asked or late) and not last:
                    w.print(f"stopped after step {self.step} of {cfg.steps}; go on with --resume")
                    break
        if asked:  # SIGTERM: no further seeds either
            raise SystemExit(0)
        return self


def check_resume(state: dict, cfg: Config) -> None:
    """BadInput: the checkpoint was trained with other settings. --steps may change while the rate is still flat."""
    was = dict(state["setting"])
    if state["step"] <= (1 - cfg.cooldown) * min(was["steps"], cfg.steps):
        was["steps"] = cfg.steps
    old = lambda n: was.get(n, "unknown")
    differ = [f"--{n.replace('_', '-')} {old(n)} (now {getattr(cfg, n)})" for n in FIXED if old(n) != getattr(cfg, n)]
    if differ:
        raise BadInput(f"the checkpoint was trained with {', '.join(differ)}. Pass the same, or another --out.")


def train(cfg: Config, resume: str | None = None) -> list[dict]:
    """Train cfg.seeds seeds, each in its own folder of cfg.out; returns the last probe of each. resume: a checkpoint to
    go on from; cfg.resume: go on from each seed's own. BadInput: the checkpoint has other settings."""
    found = []
    with cluster.world(cfg.device) as w:
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            c, folder = replace(cfg, seed=seed), f"{cfg.out}/seed{seed}"
            path = resume or f"{folder}/checkpoint.pt"
            state = None
            if resume or (cfg.resume and (seed == cfg.seed or Path(path).exists())):
                state = cluster.load(path)
                check_resume(state, c)
            elif w.main:
                cluster.set_aside(path)
                cluster.set_aside(f"{folder}/best.pt")
            run = report.Run(folder, c, w, state["step"] if state else 0)
            trainer = Trainer(c, w, state).run(run.log, f"seed {seed}", folder)
            found.append({"seed": seed, "step": trainer.step, **trainer.probe(cfg.probe, cfg.per_length)})
            if trainer.step == c.steps:
                run.log(final=seed, **found[-1])
        last = cfg.probe[-1]
        keys = [*(f"exact_{n}" for n in cfg.probe), f"first_{last}", f"rest_{last}"]
        rows = [[f"seed {f['seed']}", f["step"], *(f[k] for k in keys)] for f in found]
        if len(found) > 1:
            columns = list(zip(*rows, strict=True))[2:]
            for name, fn in (("mean", lambda c: sum(c) / len(c)), ("minimum", min), ("best", max)):
                rows.append([name, "", *map(fn, columns)])
        head = ["run", "step", *(f"{n}+{n}" for n in cfg.probe), f"first digit at {last}", f"others at {last}"]
        w.print(f"\nexact match, task {cfg.task}, trained on up to {cfg.digits} digits\n" + report.table(head, rows))
    return found


# ---- demo: the claim


def measure(cfg: Config, w: cluster.World, group=None) -> tuple[dict, list[dict]]:
    """Train one model and examine it: what was found, and the lines to log."""
    start, lines, what = time.process_time(), [], f"{cfg.pos}, <= {cfg.digits} digits, seed {cfg.seed}"
    log = lambda **values: lines.append(values)
    model = Trainer(cfg, w, group=group).run(log, what).model
    f = examine(model, cfg, cfg.seed, f"{what}: ", group) | {"cpu_seconds": time.process_time() - start}
    log(measured=what, **f)
    w.print(f"{what}: done in {f['cpu_seconds']:.0f} CPU seconds")
    return f, lines


def measure_in_worker(cfg: Config) -> tuple[dict, list[dict]]:
    """measure() in a process of its own, silent and on one thread."""
    torch.set_num_threads(1)
    with cluster.world("cpu") as w:
        return measure(cfg, cluster.World(1, 1, w.device))


def compare(jobs: list[Config], w: cluster.World, run: report.Run) -> list[dict]:
    """What measure() finds for each job. The ranks, or the workers of a lone one, share the models, not the batches, so
    the numbers are those of one process."""
    if w.size == 1 and w.device.type == "cpu" and jobs[0].workers > 1 and len(jobs) > 1:
        with workers(jobs[0].workers) as pool:
            mine = list(report.progress(pool.map(measure_in_worker, jobs), "models", w, len(jobs)))
    else:
        alone = [dist.new_group([r]) for r in range(w.size)][w.rank]
        mine = [measure(c, cluster.World(w.rank, 1, w.device), alone) for c in jobs[w.rank :: w.size]]
    every = [None] * w.size
    dist.all_gather_object(every, mine)
    done = [every[i % w.size][i // w.size] for i in range(len(jobs))]
    for line in [line for _, lines in done for line in lines]:
        run.log(**line)
    return [f for f, _ in done]


def table(found: list[dict]) -> str:
    """What compare() found for models of equal digits, as text."""
    digits, lengths, rows = found[0]["digits"], list(found[0]["exact"]), []
    n = lengths[0]
    head = ["positions", "steps", f"1..{digits} grid", *(f"{m}+{m}" for m in lengths), f"first digit {n}+{n}"]
    for f in found:
        seen = [f["trained"], *f["exact"].values(), f["first"][n], f["rest"][n], f"{f['cpu_seconds']:.0f}"]
        rows.append([f"{f['pos']}, seed {f['seed']}", f["steps"], *seen])
    return f"\nexact match after training on <= {digits} digits\n{report.table([*head, 'others', 'CPU s'], rows)}\n"


def demo(cfg: Config, w: cluster.World) -> None:
    """Abacus against other positions at equal budget, and where all learn to add; table, picture, claim."""
    run, rivals = report.Run(cfg.out, cfg, w), () if cfg.quick else cfg.rivals
    jobs = [replace(cfg, pos="abacus", seed=cfg.seed + s) for s in range(cfg.seeds)]
    jobs += [replace(cfg, pos=pos) for pos in rivals]
    near = tuple(range(cfg.few, cfg.few + 3))
    small = replace(cfg, digits=cfg.few, short=min(100, cfg.short), grow=min(100, cfg.grow), grid=near[-1])
    few = [replace(small, pos=pos, lengths=near, probe=near) for pos in (("abacus", *rivals) if rivals else ())]
    few = [replace(c, steps=cfg.few_steps[min(i, len(cfg.few_steps) - 1)]) for i, c in enumerate(few)]
    every = compare(jobs + few[::-1], w, run)  # so that two processes have as much to do
    found, extra = every[: len(jobs)], every[len(jobs) :][::-1]
    if all(f["first"][cfg.lengths[0]] < 0.9 for f in found if f["pos"] == "abacus"):
        w.print("no seed of abacus found the first digit of the answer (see --help); one more, and all are reported")
        found += compare([replace(cfg, pos="abacus", seed=cfg.seed + cfg.seeds)], w, run)
    w.print(table(found))
    if extra:
        w.print("where the others learn to add as well: is it extrapolation?" + table(extra))
    if w.main:
        layout = {"ncols": len(found), "figsize": (3.6 * len(found) + 1, 4), "squeeze": False}
        w.print(report.picture(f"{cfg.out}/abacus.png", functools.partial(draw, found), **layout))
    ours = max((f["exact"] for f in found if f["pos"] == "abacus"), key=lambda e: sum(e.values()))
    far = cfg.lengths[min(1, len(cfg.lengths) - 1)]
    theirs = {f["pos"]: f["exact"][far] for f in found if f["pos"] != "abacus"}
    here = "Abacus " + ", ".join(f"{m}+{m} {x:.2f}" for m, x in ours.items())
    if rivals:
        here += f"; at {far}+{far} " + ", ".join(f"{pos} {x:.2f}" for pos, x in theirs.items())
        here += f"; trained on <= {cfg.few} digits, at {near[-1]}+{near[-1]} "
        here += ", ".join(f"{f['pos']} {f['exact'][near[-1]]:.2f}" for f in extra)
    bars = [x >= bar for x, bar in zip(ours.values(), (0.95, 0.85, 0.5), strict=False)]
    claim = f"Abacus positions add numbers longer than the {cfg.digits} digits of training"
    paper = "up to 99 % exact match at 100 digits after training on <= 20"
    shape = f"{cfg.n_layer} layers x {cfg.recurrences} of {cfg.d_model}"
    shape += f", foreign digits (ours) from step {cfg.foreign}" if cfg.foreign >= 0 else ""
    holds = all(bars) and all(x <= 0.05 for x in theirs.values())
    run.claim(claim, paper, here, holds, f"{cfg.steps} steps of {cfg.batch}, {shape}, {w.device.type}")


def draw(found: list[dict], figure, axes) -> None:
    """A heat map of exact match per model over both operands' lengths; the lengths of training are outlined."""
    for ax, f in zip(axes[0], found, strict=True):
        grid, edge = list(zip(*f["grid"], strict=True)), f["digits"] + 0.5  # rows are b, columns a
        extent = (0.5, len(grid[0]) + 0.5, 0.5, len(grid) + 0.5)
        image = ax.imshow(grid, origin="lower", extent=extent, vmin=0, vmax=1, cmap="viridis")
        ax.plot([0.5, edge, edge], [edge, edge, 0.5], color="red", lw=1.5)
        ticks, title = range(4, len(grid) + 1, 4), f"{f['pos']}, seed {f['seed']}"
        ax.set(xlabel="digits of a", title=title, xlim=extent[:2], ylim=extent[2:], xticks=ticks, yticks=ticks)
    axes[0][0].set_ylabel("digits of b")
    figure.colorbar(image, ax=axes[0].tolist(), label="exact match (red: lengths of training)", shrink=0.8, pad=0.02)


# ---- eval and bench


def evaluate(cfg: Config, w: cluster.World) -> None:
    """Try the weights of --model: a table over --lengths, the grid and its picture, and one problem token by token."""
    state = cluster.load(cfg.model)  # best.pt or a checkpoint.pt
    c, run, start = replace(cfg, **state["setting"]), report.Run(f"{cfg.out}/eval", cfg, w), time.perf_counter()
    model = ArithmeticTransformer(c).to(w.device).eval()
    model.load_state_dict(state["model"])
    f = examine(model, c, cfg.seed)
    rows = [[f"{n}+{n}", f["exact"][n], f["first"][n], f["rest"][n]] for n in c.lengths]
    w.print(report.table(["digits", "exact match", "first digit", "all others"], rows))
    beyond = [x for a, row in enumerate(f["grid"], 1) for b, x in enumerate(row, 1) if max(a, b) > c.digits]
    shares = f"lengths trained {f['trained']:.3f}" + (f", others {sum(beyond) / len(beyond):.3f}" if beyond else "")
    w.print(f"grid 1..{c.grid}, {c.per_cell} problems a cell: {shares}; {time.perf_counter() - start:.1f} s")
    run.log(**f)
    if w.main:
        paint = functools.partial(draw, [f])
        w.print(report.picture(f"{cfg.out}/eval/grid.png", paint, figsize=(6, 5), squeeze=False))
    ids = problems(c.task, cfg.lengths[-1], cfg.lengths[-1], 1, cfg.seed).ids
    prompt, right = ids[:, : int((ids == EQUALS).nonzero()[0, 1]) + 1], decode(ids[0]).split("=")[1]
    said = decode(generate(model, prompt.to(w.device), len(right) + 2)[0])
    w.print(f"{decode(prompt[0])} {said} ({'right' if said == right else 'wrong: ' + right})")


def bench(cfg: Config, w: cluster.World) -> None:
    """Problems made per second, training steps, and one pass against token by token, beside what limits them."""
    copy, flops = report.ceilings(w.device, getattr(torch, cfg.dtype))
    trainer, found = Trainer(cfg, w), {"device": report.device_name(w.device), "config": asdict(cfg)}
    rates = f"copy {copy / 1e9:.1f} GB/s, {cfg.dtype} matrix product {flops / 1e12:.3f} TFLOP/s"
    w.print(f"{found['device']}; measured: {rates}\n")
    ms = lambda seconds, spread: f"{seconds * 1e3:.2f} ± {spread * 1e3:.2f} ms"

    many = lambda task: make_batch(task, 4096, cfg.digits, w.device, cluster.generator(cfg.seed))
    made, rows = report.timed({t: functools.partial(many, t) for t in TASKS}, w.device), []
    for t, (s, spread) in made.items():
        floor = sum(2 * x.numel() * x.element_size() for x in many(t)[:2]) / copy  # written once, as a copy counts
        rows.append([t, f"{4096 / s:.3g}", ms(s, spread), f"{floor * 1e3:.2f} ms"])
    w.print(report.table([f"<= {cfg.digits} digits", "problems/s", "4096 of them", "floor"], rows))
    found["problems per second"] = {t: 4096 / s for t, (s, _) in made.items()}

    trainer.step = max(cfg.short, cfg.grow, cfg.foreign)  # lengths as after the curriculum
    tokens = sum(targets.numel() for _, targets, _ in trainer.batches()) / w.size
    advance = lambda: (trainer.advance(log=False), setattr(trainer, "step", trainer.step - 1))
    s, spread = report.timed({"step": advance}, w.device, repeats=5)["step"]
    floor = 6 * cfg.recurrences * sum(p.numel() for p in trainer.model.layers.parameters()) * tokens / flops
    found |= {"step seconds": s, "step floor": floor, "examples per second": cfg.batch / s}
    limit = f"floor, its matrix products at the measured rate: {floor * 1e3:.0f} ms ({floor / s:.0%})"
    w.print(f"\ntraining: {cfg.batch / s:.0f} examples/s, {ms(s, spread)} a step; {limit}")

    model, b = trainer.model, problems(cfg.task, cfg.grid, cfg.grid, cfg.per_length)
    ids, targets = b.ids.to(w.device), b.targets.to(w.device)
    prompt, new = ids[:, : int((ids[0] == EQUALS).nonzero()[0]) + 1], int((targets != -100).sum(dim=1).max())
    one = lambda: evaluate_cells(model, [(cfg.grid, cfg.grid)], cfg.per_length, cfg.task)
    cases = {"one pass": one, "token by token": lambda: generate(model, prompt, new, eos=-1)}
    whole, single = report.timed(cases, w.device, repeats=5).values()
    ratio = found["one pass against token by token"] = single[0] / whole[0]
    w.print(f"\n{cfg.per_length} problems of {cfg.grid}+{cfg.grid}: one pass, with making them, {ms(*whole)};")
    w.print(f"token by token, {new} passes, {ms(*single)}: {ratio:.1f} x")
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", found)


def main(cfg: Config) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # of a GPU alone: on a CPU with bf16 units it would double the time
    if cfg.mode == "train":
        train(cfg)
        return
    with cluster.world(cfg.device) as w:
        {"demo": demo, "eval": evaluate, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
