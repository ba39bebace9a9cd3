"""Recurrent depth: a language model that runs its middle layers as often as asked, so depth is chosen at test time.

Paper    Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning: A Recurrent Depth Approach", NeurIPS 2025,
         arXiv:2502.05171 (Huginn-0125). Retrofitting: McLeish et al., arXiv:2511.07384. Sampler: arXiv:2510.14961.
Idea     Prelude, core, coda: only the core is repeated, always with the same weights, from a random state and with the
         embedded tokens put in again at each iteration. In training the number of iterations is random and heavy-tailed
         and only the last k carry gradient, so the core becomes a map that refines, converges, and forgets its start.
         Then depth is a dial at test time, and early exit, shared caches, warm starts and drafts come for free.
Here     The claim we check: on running parity, accuracy rises with the iterations r and stays up to r = 64, while the
         same parameters trained at r = 1 stay flat; rows exit later the longer they are, at no loss of accuracy.
         Beside it: rows longer than in training, path independence, six ways to generate that agree. Architecture, file
         format and outputs are those of the released 3.5B model (vectors in tests/data/recurrent_depth).
Differs  0.2 M parameters, (1, 2, 0) layers on running parity and an untied head of two classes, for 3.5 B, (2, 4, 2)
         layers and 800 B tokens. AdamW (--optimizer atan is the paper's), r_bar 6, rope base 30. Three things without
         which most seeds collapse (docs/results/recurrent_depth.md): no coda layer; heads begin by looking at the token
         before (qk_bias, --recency; the paper begins at 0); the rate falls once the loss has (--settle).
         Left out: the released integer-division cache, minp and cosine exits, Muon for retrofitting, sharded training
         (DDP only). Rows of a batch exit one by one; the released code takes one row. The 1-D parameters do not decay
         (the released code lets ln_f decay). AtanAdam floors a copy of v.

    python recurrent_depth.py                                        # laptop: the claim, the tables, the picture
    torchrun --nproc-per-node 2 recurrent_depth.py                   # the same on two processes
    python recurrent_depth.py train --preset bytes                   # a byte-level language model of Python's sources
    python recurrent_depth.py generate --prompt "def f(" --exit kl   # what it says, and iterations per token
    python recurrent_depth.py eval --num-steps 0 1 2 4 8             # its held-out loss by depth
    python recurrent_depth.py inspect                                # collapse alarms, residuals, path independence
    python recurrent_depth.py generate --model smollm2 --num-steps 4 # a real Llama made recurrent, not healed
    python recurrent_depth.py retrofit --preset heal --data FILE     # made recurrent, then trained on text
    python recurrent_depth.py bench                                  # caches and exits; on a GPU Huginn's shape
    torchrun --nnodes N --nproc-per-node 8 recurrent_depth.py train --preset huginn-3.5b --data FILE  # not yet run

Expect   "1 of 1 seeds pass" on CPU with seed 0: at least 0.98 at r = 12 and to r = 64, the control flat within 0.03.
         Seeds 0 to 5 pass (docs/results/recurrent_depth.md).
Writes   results/recurrent_depth/: metrics.jsonl, claim.json, recurrent_depth.png; model/ (the weights);
         checkpoint.pt (train, retrofit), bench.json (bench).
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.text import Tokenizer, corpus
from common.weights import open_weights, package, rope_frequencies

MODES = "demo", "train", "eval", "generate", "retrofit", "inspect", "bench"
EXIT_NAMES = "kl", "latent-diff", "entropy-diff", "argmax"


def refuse(wrong, message: str) -> None:
    """BadInput(message), which is a ValueError, if something is wrong."""
    if wrong:
        raise BadInput(message)


@dataclass
class Config:
    mode: str = opt("demo", "what to do", MODES, positional=True)
    preset: str = opt("laptop", "defaults for a setting; flags win", ("laptop", "bytes", "heal", "gpu", "huginn-3.5b"))
    # the task
    task: str = opt("parity", "running parity of random bits, or next-token prediction of text", ("parity", "text"))
    block: int = opt(32, "bits or tokens per row that are predicted")
    data: tuple = opt(("docs",), "text files, or docs or sources: Python's own")
    # the model
    d_model: int = opt(64, "width")
    n_head: int = opt(2, "attention heads")
    ff: int = opt(192, "width of the MLP")
    layers: tuple = opt((1, 2, 0), "layers of prelude, core, coda")
    rope_base: float = opt(30.0, "base of the rotary angles")
    recency: float = opt(1.0, "how much heads prefer the token before at the start; the paper has 0")
    # its training
    r_bar: int = opt(6, "mean recurrence")
    k: int = opt(6, "iterations that carry gradient, at most")
    fixed_r: int = opt(0, "train at this depth always; 0 draws it")
    ramp: float = opt(0.0, "share of the run over which r_bar rises from 1")
    steps: int = opt(400, "optimizer steps")
    batch: int = opt(32, "rows per step, over all processes and micro-steps")
    accum: int = opt(1, "micro-steps per step, each with its own depth")
    optimizer: str = opt("adamw", "update rule; atan is the paper's", ("adamw", "atan"))
    lr: float = opt(1.5e-3, "peak learning rate")
    warmup: int = opt(50, "steps of linear warm-up")
    flat: float = opt(0.5, "share of the run at the peak, before a linear fall to 2 %")
    settle: float = opt(0.54, "loss at which the rate falls by --settle-lr and on to 2 %; 0 is off")
    settle_lr: float = opt(0.5, "the factor of this fall")
    beta2: float = opt(0.95, "decay of the second moment; the first has 0.9")
    weight_decay: float = opt(0.0, "of matrices")
    clip: float = opt(0.5, "largest gradient norm")
    checkpointing: bool = opt(False, "recompute each iteration in the backward pass")
    seed: int = opt(0, "of data, weights and initial states")
    device: str = opt("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "of the matrix products", ("float32", "bfloat16"))
    # files
    out: str = opt("results/recurrent_depth", "folder of what the run writes, and of the run to resume")
    resume: bool = opt(False, "train, retrofit: go on from the checkpoint in --out")
    save_every: int = opt(100, "steps between checkpoints; 0 writes only the last")
    log_every: int = opt(20, "steps between lines in metrics.jsonl")
    # demo, eval, inspect
    seeds: tuple = opt((0,), "demo: the runs, all of them shown, in place of --seed")
    rows: int = opt(256, "fresh rows per measurement")
    num_steps: tuple = opt((1, 2, 3, 4, 6, 8, 12, 16, 32, 64), "depths measured; generate: the last one")
    # generate, retrofit
    model: str = opt("results/recurrent_depth/model", "a folder written by train; or smollm2, or a Llama's folder")
    split: tuple = opt((6, 12, 6), "retrofit: layers of prelude, core, coda")
    prompt: str = opt("The capital of France is", "generate: the text to continue")
    new: int = opt(40, "generate: tokens")
    exit: str = opt("none", "generate: when to stop iterating", ("none", *EXIT_NAMES))
    max_entropy: float = opt(math.inf, "generate: never exit where the prediction's entropy is above this, in nats")
    draft: int = opt(0, "generate: iterations of self-speculative drafts; 0 is off")
    budget: int = opt(0, "generate: iterations kept in the cache; 0 keeps all")
    warm_start: bool = opt(False, "generate: start a token from the state of the one before")
    temperature: float = opt(0.0, "generate: 0 is greedy")

    def __post_init__(self):
        for name in ("block", "d_model", "n_head", "steps", "batch", "accum", "log_every", "rows", "k", "r_bar"):
            value = getattr(self, name)
            refuse(value < 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        three = len(self.layers) == len(self.split) == 3
        refuse(not three, f"--layers and --split take three numbers, got {self.layers} and {self.split}")
        refuse(min((*self.num_steps, self.new)) < 0, f"--num-steps {self.num_steps} and --new {self.new} must be >= 0")


TEXT = {"task": "text", "recency": 0.0, "settle": 0.0}
PRESETS = {
    "laptop": {},
    "bytes": TEXT | {
        "data": ("sources",), "block": 128, "d_model": 96, "n_head": 3, "ff": 256, "layers": (1, 2, 1),
        "rope_base": 1000.0, "r_bar": 4, "k": 3, "steps": 240, "batch": 16, "lr": 2e-3,
        "num_steps": (1, 2, 4, 8, 16, 32),
    },
    "heal": TEXT | {  # for mode retrofit
        "block": 128, "r_bar": 4, "k": 4, "ramp": 0.25, "steps": 20, "batch": 4, "lr": 3e-4, "warmup": 2, "flat": 0.2,
        "log_every": 1, "num_steps": (1, 2, 4, 8),
    },
    "gpu": TEXT | {
        "data": ("sources",), "block": 512, "d_model": 768, "n_head": 12, "ff": 2048, "layers": (2, 4, 2),
        "rope_base": 10000.0, "r_bar": 8, "k": 4, "steps": 2000, "batch": 64, "lr": 4e-4, "warmup": 200,
        "dtype": "bfloat16", "num_steps": (1, 2, 4, 8, 16, 32),
    },
    "huginn-3.5b": TEXT | {  # the paper's sizes and optimizer; bring your own text
        "block": 4096, "d_model": 5280, "n_head": 55, "ff": 17920, "layers": (2, 4, 2), "rope_base": 50000.0,
        "r_bar": 32, "k": 8, "steps": 47000, "batch": 4096, "optimizer": "atan", "lr": 4e-5, "warmup": 4096,
        "flat": 1.0, "weight_decay": 4e-5, "clip": 1.0, "dtype": "bfloat16", "checkpointing": True,
        "num_steps": (1, 4, 8, 16, 32, 64),
    },
}  # fmt: skip


# ---- the method: depth is a dial
#
# e    the embedded tokens, after the prelude      P, R, C  prelude, core, coda: l_P, l_R, l_C layers
# s_i  the state after i iterations; s_0 is noise  r        iterations;  r_bar  their mean in training
# k    last iterations that carry gradient         n        iterations before them, without
#
#     e = P(x),    s_i = R(e, s_{i-1}) for i = 1..r,    p = C(s_r)


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor  # (B, T, V), at least float32
    loss: Tensor | None  # 0-d, with labels
    state: Tensor  # s_r (B, T, C), before the final norm
    steps: int | Tensor  # iterations run; with an exit rule (B,), on the CPU
    before: Tensor  # s_{r-1}


class RecurrentDepthLM(nn.Module):
    """A language model whose depth l_P + r l_R + l_C is chosen at each call. Parameter names are the release's."""

    def __init__(self, cfg: "RecurrentConfig", seed: int = 0):
        super().__init__()
        self.cfg, self.checkpointing, C = cfg, False, cfg.n_embd
        blocks = lambda n: nn.ModuleList(Block(cfg) for _ in range(n))
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(cfg.vocab_size, C),
            "prelude": blocks(cfg.n_layers_in_prelude),
            "adapter": nn.Linear(2 * C, C, bias=False),
            "core_block": blocks(cfg.n_layers_in_recurrent_block),
            "coda": blocks(cfg.n_layers_in_coda),
            "ln_f": RMSNorm(C, cfg.norm_eps),
        })  # fmt: skip
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(C, cfg.n_out or cfg.vocab_size, bias=False)
        self.register_buffer("freq", cfg.frequencies(), persistent=False)  # (D/2,) float32
        # "takase": truncated normal, what adds to the residual smaller by sqrt(2L)
        g, std = cluster.generator(seed, 0), math.sqrt(2 / (5 * C))
        for name, p in self.named_parameters():
            if p.ndim == 2 and not p.is_meta:
                s = std / math.sqrt(2 * cfg.depth) if name.endswith("proj.weight") else std
                nn.init.trunc_normal_(p, std=s, a=-3 * s, b=3 * s, generator=g)

    def embed(self, ids: Tensor, at: "Place | None" = None) -> Tensor:
        """e of ids (B, T): prelude of the scaled embedding, (B, T, C)."""
        at = at or self.place(ids.shape[1])
        e = self.transformer.wte(ids)  # (B, T, C)
        e = e * math.sqrt(self.cfg.n_embd) if self.cfg.sandwich else e
        for j, block in enumerate(self.transformer.prelude):
            e = block(e, at, j)
        return e

    def iterate(self, s: Tensor, e: Tensor, at: "Place | None" = None, i: int = 0) -> Tensor:
        """s_{i+1} = R(e, s_i), (B, T, C). The iteration's number only chooses the cache entry: weights are shared."""
        at = at or self.place(e.shape[1])
        slot = at.cache.slot(i) if at.cache else 0
        x = self.transformer.adapter(torch.cat([s, e], dim=-1))  # (B, T, 2C) -> (B, T, C)
        for j, block in enumerate(self.transformer.core_block):
            x = block(x, at, slot + j)
        return x

    def between(self, s: Tensor) -> Tensor:
        """What the coda receives, and a warm start carries on: ln_f(s); s itself in a retrofitted model."""
        return self.transformer.ln_f(s) if self.cfg.sandwich else s

    def decode(self, s: Tensor, at: "Place | None" = None) -> Tensor:
        """Logits of the state s (B, T, C): coda, final norm, head -> (B, T, V)."""
        at, x = at or self.place(s.shape[1]), self.between(s)
        for j, block in enumerate(self.transformer.coda):
            x = block(x, at, self.cfg.n_layers_in_prelude + j)
        head = self.transformer.wte if self.cfg.tie_embeddings else self.lm_head
        logits = F.linear(self.transformer.ln_f(x), head.weight)  # ln_f again
        return logits if logits.dtype == torch.float64 else logits.float()

    def init_state(self, e: Tensor, scale: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """s_0, shape of e: truncated normal at 3 std, std sqrt(2/5) (without the factor sqrt(C) when retrofitted).

        `scale` 0 is the zero state. Drawn on the CPU, so that equal generators give equal states everywhere.
        """
        std = math.sqrt(0.4 / (1 if self.cfg.sandwich else self.cfg.n_embd))
        s = torch.empty(e.shape, dtype=torch.float32)
        nn.init.trunc_normal_(s, std=std, a=-3 * std, b=3 * std, generator=generator)
        return s.mul_(scale * self.cfg.init_scale).to(e)

    def forward(
        self, ids: Tensor, num_steps=None, s0: Tensor | None = None, labels: Tensor | None = None,
        cache: "RecurrentCache | None" = None, positions: Tensor | None = None, exit: "ExitRule | None" = None,
    ) -> Output:  # fmt: skip
        """Logits of ids (B, T) after `num_steps` iterations from s0 (B, T, C), or from fresh noise.

        num_steps  r, all of them with gradient; or (n, k), the first n without; None: the mean recurrence, its last
                   mean_backprop_depth with gradient. 0 decodes the initial state.
        labels     (B, T), aligned with the logits (the caller shifts); -100 is ignored.
        cache      holds the tokens before these; ids, s0 and positions (T,) are then of the new tokens only.
        exit       stops each row's iterations when the rule says so.
        ValueError: ids, num_steps, s0, labels or the cache do not fit (the message says how).
        """
        if cache is not None and torch.is_grad_enabled():
            refuse(labels is not None, "a cached pass has no gradient: leave out labels or cache, or use no_grad()")
            with torch.no_grad():
                return self.forward(ids, num_steps, s0, None, cache, positions, exit)
        n, k = self._steps(num_steps, labels)
        self.check(ids, s0, labels, cache, positions)
        if cache is not None:
            cache.reserve(self, *ids.shape, n + k)
        at = self.place(ids.shape[1], cache, positions)
        e = self.embed(ids, at)
        s, before, steps, logits = self.refine(self.init_state(e) if s0 is None else s0.to(e), e, n, k, at, exit)
        logits = self.decode(s, at) if logits is None else logits
        if cache is not None:
            cache.seal(steps, ids.shape[1])
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return Output(logits, loss, s, steps, before)

    def refine(self, s: Tensor, e: Tensor, n: int, k: int, at: "Place", exit: "ExitRule | None" = None):
        """n iterations without and k with gradient -> (s_r, s_{r-1}, iterations, logits if the exit rule made them)."""
        before, steps, logits, grad = s, n + k, None, torch.is_grad_enabled()
        if exit is not None:
            exit.start(s)
            active, steps = torch.ones(len(s), dtype=torch.bool, device=s.device), torch.full((len(s),), n + k)
        for i in range(n + k):
            before, logits = s, None
            with torch.set_grad_enabled(grad and i >= n):
                if self.checkpointing and grad and i >= n:  # one checkpoint per iteration: memory does not grow with r
                    s = checkpoint(self.iterate, s, e, at, i, use_reentrant=False)
                else:
                    s = self.iterate(s, e, at, i)
            if exit is None:
                continue
            s = torch.where(active[:, None, None], s, before)  # rows that left keep their state
            if exit.due(i + 1):
                logits = self.decode(s, at) if exit.reads_logits else None
                left = exit.fires(i + 1, s, logits) & active
                steps[left.cpu()] = i + 1
                active = active & ~left
                if not active.any():
                    break
                if at.cache is not None and not active.all():
                    at.cache.rows = active
        if at.cache is not None:
            at.cache.rows = None
        return s, before, steps, logits

    def place(self, T: int, cache: "RecurrentCache | None" = None, positions: Tensor | None = None) -> "Place":
        """Tables for T tokens that follow those of the cache, or stand at `positions` (T,)."""
        past, device = cache.length if cache else 0, self.freq.device
        t = torch.arange(past, past + T, device=device) if positions is None else positions
        dtype = torch.float64 if self.transformer.wte.weight.dtype == torch.float64 else torch.float32
        angle = torch.outer(t.float(), self.freq)[:, None]  # (T, 1, D/2)
        mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past) if past and T > 1 else None
        return Place(angle.cos().to(dtype), angle.sin().to(dtype), mask, cache)

    def _steps(self, num_steps, labels) -> tuple[int, int]:
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
        if num_steps is None:
            r, k = self.cfg.mean_recurrence, self.cfg.mean_backprop_depth
            return max(r - k, 0), min(r, k)
        if whole(num_steps):
            return 0, num_steps
        pair = isinstance(num_steps, (tuple, list)) and len(num_steps) == 2 and all(map(whole, num_steps))
        refuse(not pair, f"num_steps must be an int >= 0 or a pair (no_grad, grad), got {num_steps!r}")
        learns = labels is not None and torch.is_grad_enabled()
        refuse(learns and num_steps[1] == 0, f"at least one iteration must carry gradient, got num_steps {num_steps}")
        return tuple(num_steps)

    def check(self, ids, s0=None, labels=None, cache=None, positions=None) -> None:
        """ValueError: one of the arguments of forward does not fit."""
        c, shape, past = self.cfg, tuple(ids.shape), cache.length if cache else 0
        whole = ids.dtype in (torch.int64, torch.int32)
        refuse(not whole or len(shape) != 2, f"ids must be int64 (B, T), got {ids.dtype} {shape}")
        refuse(ids.numel() == 0, f"ids are empty: {shape}. Give at least one token, such as a start token.")
        low, high = ids.min(), ids.max()
        if ids.is_cuda:  # without a host synchronisation
            torch._assert_async((low >= 0) & (high < c.vocab_size), f"an id is outside [0, {c.vocab_size})")
        elif low < 0 or high >= c.vocab_size:
            raise BadInput(f"id {int(low if low < 0 else high)} is outside the vocabulary [0, {c.vocab_size})")
        T, room = shape[1], c.block_size
        refuse(past + T > room, f"{past} cached + {T} new tokens exceed block_size {room}")
        if s0 is not None and (s0.shape != (*shape, c.n_embd) or not s0.is_floating_point()):
            raise BadInput(f"s0 must be floating point of shape {(*shape, c.n_embd)}, got {s0.dtype} {tuple(s0.shape)}")
        if labels is not None and labels.shape != shape:
            raise BadInput(f"labels {tuple(labels.shape)} do not match ids {shape}")
        if positions is not None and positions.shape != shape[1:]:
            raise BadInput(f"positions must have shape {shape[1:]}, got {tuple(positions.shape)}")


def sample_steps(step: int, mean: float, k: int, sigma: float = 0.5) -> tuple[int, int]:
    """(n, k) of micro-step `step`: iterations without and with gradient; log-normal Poisson, mean + 1 on average.

    The seed holds the step and no rank: all ranks and rows share one depth, and a resumed run draws it again.
    ValueError: mean < 1 or k < 1. Seed and order of the draws: the released code.
    """
    refuse(not mean >= 1 or k < 1, f"the mean recurrence must be >= 1 and k >= 1, got mean {mean} and k {k}")
    g = torch.Generator().manual_seed((514229 + step) % (2**31 - 1))
    rate = torch.zeros(1).log_normal_(math.log(mean) - sigma**2 / 2, sigma, generator=g)  # e^tau, mean r_bar
    p = int(torch.poisson(rate, generator=g)) + 1
    return max(p - k, 0), min(k, p)


def mean_schedule(step: int, total: int, r_max: int, frac: float, shape: str = "linear") -> int:
    """r_bar at `step`: from 1 to r_max over the first `frac` of `total` steps (arXiv:2511.07384)."""
    refuse(shape not in ("linear", "1-sqrt"), f"unknown shape {shape!r}; choose linear or 1-sqrt")
    progress = min(1.0, step / max(1.0, frac * total))
    return max(1, math.ceil(r_max * (progress if shape == "linear" else 1 - math.sqrt(1 - progress))))


# ---- the model: sizes and blocks


@dataclass
class RecurrentConfig:
    """Fields are the keys of the released config.json; the last five are ours. ValueError: sizes that do not fit."""

    n_embd: int = 96
    num_attention_heads: int = 3
    num_key_value_heads: int = 0  # 0: as many as query heads
    intermediate_size: int = 256
    n_layers_in_prelude: int = 1
    n_layers_in_recurrent_block: int = 2
    n_layers_in_coda: int = 1
    mean_recurrence: int = 4
    mean_backprop_depth: int = 3
    vocab_size: int = 256
    block_size: int = 256
    norm_eps: float = 1e-6
    rope_base: float = 50000
    tie_embeddings: bool = True
    injection_type: str = "linear"
    block_class_name: str = "SandwichBlock"  # LlamaBlock: what retrofit() makes
    init_scale: float = 1.0  # factor on the std of s_0
    head_dim: int = 0  # 0: n_embd / heads
    n_out: int = 0  # outputs of an untied head; 0: vocab_size
    rope_scaling: dict = field(default_factory=dict)

    def __post_init__(self):
        C, H, kind, injection = self.n_embd, self.num_attention_heads, self.block_class_name, self.injection_type
        refuse(injection != "linear", f"injection_type {injection!r} is unsupported, only 'linear' (concat adapter)")
        known = kind in ("SandwichBlock", "LlamaBlock")
        refuse(not known, f"block_class_name {kind!r} is unsupported, only 'SandwichBlock' and 'LlamaBlock'")
        refuse(not self.head_dim and C % H, f"n_embd {C} is not a multiple of num_attention_heads {H}")
        self.head_dim = self.head_dim or C // H
        refuse(self.head_dim % 2, f"the head size {self.head_dim} is odd; rotary pairs need an even one")
        Hk = self.num_key_value_heads = self.num_key_value_heads or H
        refuse(H % Hk or (self.sandwich and H != Hk), f"{H} query heads cannot share {Hk} key/value heads here")
        core, r_bar, k = self.n_layers_in_recurrent_block, self.mean_recurrence, self.mean_backprop_depth
        refuse(core < 1, f"the core has {core} layers, it needs at least 1")
        refuse(min(r_bar, k) < 1, f"mean_recurrence and mean_backprop_depth must be >= 1: {r_bar}, {k}")
        refuse(self.n_out and self.tie_embeddings, f"n_out {self.n_out} needs tie_embeddings=False")

    @property
    def sandwich(self) -> bool:
        """Huginn's blocks; False for pre-norm blocks taken from a Llama."""
        return self.block_class_name == "SandwichBlock"

    @property
    def depth(self) -> float:
        """L, the unrolled layers at the mean recurrence."""
        core = self.n_layers_in_recurrent_block * self.mean_recurrence
        return self.n_layers_in_prelude + core + self.n_layers_in_coda

    def frequencies(self) -> Tensor:
        """Angle per position of each rotary pair, (D/2,) float32."""
        rope = {"head_dim": self.head_dim, "rope_theta": self.rope_base, "rope_scaling": self.rope_scaling}
        return rope_frequencies(rope)

    @classmethod
    def from_json(cls, path: str | Path) -> "RecurrentConfig":
        """From a config.json; keys that we do not know are left out. FileNotFoundError: there is none; BadInput."""
        try:
            given = json.loads(Path(path).read_text())
        except json.JSONDecodeError as e:
            raise BadInput(f"{path} is not JSON: {e}") from e
        given.setdefault("num_attention_heads", given.get("n_heads", 1))
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})

    @classmethod
    def preset(cls, name: str, **changes) -> "RecurrentConfig":
        """tiny (bytes on a laptop), small (the paper's 150 M research shape), huginn-3.5b (the released model)."""
        refuse(name not in SHAPES, f"unknown preset {name!r}; choose {', '.join(SHAPES)}")
        return cls(**SHAPES[name] | changes)


SHAPES = {
    "tiny": {"rope_base": 1000},
    "small": {
        "n_embd": 1024, "num_attention_heads": 32, "intermediate_size": 3520, "n_layers_in_recurrent_block": 4,
        "mean_recurrence": 20, "mean_backprop_depth": 4, "vocab_size": 65536, "block_size": 4096,
    },
    "huginn-3.5b": {
        "n_embd": 5280, "num_attention_heads": 55, "intermediate_size": 17920, "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2, "mean_recurrence": 32, "mean_backprop_depth": 8,
        "vocab_size": 65536, "block_size": 4096,
    },
}  # fmt: skip


class Place(NamedTuple):
    """Where the tokens of a call stand: rotary tables, the mask over earlier tokens, the cache. None: not needed."""

    cos: Tensor  # (T, 1, D/2)
    sin: Tensor
    mask: Tensor | None = None  # (T, S), True = visible
    cache: "RecurrentCache | None" = None


class RMSNorm(nn.Module):
    """x / rms(x) in float32 whatever the input's type, then times a learned weight."""

    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def rotate(x: Tensor, at: Place, pairs: bool) -> Tensor:
    """Rotary embedding of x (B, T, H, D): of pairs (x0, x1), (x2, x3)..., or of Llama's, (x_j, x_{j + D/2})."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if pairs else x.chunk(2, dim=-1)  # (B, T, H, D/2)
    turned = a * at.cos - b * at.sin, b * at.cos + a * at.sin
    return torch.stack(turned, dim=-1).flatten(-2) if pairs else torch.cat(turned, dim=-1)  # (B, T, H, D)


class Attention(nn.Module):
    """Causal attention with one fused projection: its rows are all queries, then all keys, then all values."""

    def __init__(self, c: RecurrentConfig):
        super().__init__()
        self.H, self.Hk, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.Wqkv = nn.Linear(c.n_embd, (self.H + 2 * self.Hk) * D, bias=False)
        self.proj = nn.Linear(self.H * D, c.n_embd, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.H, D)) if c.sandwich else None

    def forward(self, x: Tensor, at: Place, slot: int) -> Tensor:
        """x (B, T, C) -> (B, T, C); with a cache, keys and values go to its `slot` and earlier ones come from there."""
        y = rearrange(self.Wqkv(x), "b t (h d) -> b t h d", h=self.H + 2 * self.Hk)
        qk, v = y.split([self.H + self.Hk, self.Hk], dim=2)  # (B, T, H + Hk, D), (B, T, Hk, D)
        if self.qk_bias is not None:
            qk = qk + rearrange(self.qk_bias, "two 1 h d -> (two h) d")  # before the rotation
        qk = rotate(qk.to(at.cos.dtype), at, pairs=self.qk_bias is not None).to(v.dtype)
        q, k = qk.transpose(1, 2).split([self.H, self.Hk], dim=1)  # (B, H, T, D), (B, Hk, T, D)
        v, causal = v.transpose(1, 2), at.mask is None and x.shape[1] > 1  # (B, Hk, T, D)
        if at.cache is not None:
            k, v = at.cache.write(slot, k, v)  # (B, Hk, S, D)
        y = F.scaled_dot_product_attention(q, k, v, at.mask, is_causal=causal, enable_gqa=self.H != self.Hk)
        return self.proj(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """SwiGLU; the rows of fc are the gate, then what is gated."""

    def __init__(self, c: RecurrentConfig):
        super().__init__()
        self.fc = nn.Linear(c.n_embd, 2 * c.intermediate_size, bias=False)
        self.proj = nn.Linear(c.intermediate_size, c.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Block(nn.Module):
    """Huginn's sandwich: norms 2 and 4 act on the residual sum. A retrofitted model keeps Llama's two norms."""

    def __init__(self, c: RecurrentConfig):
        super().__init__()
        self.sandwich, self.attn, self.mlp = c.sandwich, Attention(c), MLP(c)
        for i in range(4 if c.sandwich else 2):
            self.add_module(f"norm_{i + 1}", RMSNorm(c.n_embd, c.norm_eps))

    def forward(self, x: Tensor, at: Place, slot: int = 0) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if not self.sandwich:
            x = x + self.attn(self.norm_1(x), at, slot)
            return x + self.mlp(self.norm_2(x))
        x = self.norm_2(x + self.attn(self.norm_1(x), at, slot))
        return self.norm_4(x + self.mlp(self.norm_3(x)))


# ---- the method at inference: one cache for all iterations


class RecurrentCache:
    """Keys and values of every (layer, iteration) in one tensor (2, slots, B, Hk, S, D), S grown by doubling.

    Slots: prelude, coda, then the core layers of iteration 0, 1, ...; every token owns its entry in each of them.
    budget  None keeps all iterations; b keeps the last b: iteration i uses entry i mod b. Also by the
            released name "compress-s<n>", n layers. A prompt's logits do not change, those of
            later tokens do, since they see only the last b iterations of the earlier ones.
    lookup  exact: all tokens must have run as deep as the one that reads. latest: of a token that left early the
            deepest entry is read; when it leaves it is copied to the deeper ones, so reading needs no gather.
    ValueError: budget < 1 or not whole iterations, another batch size or model than before, exact tokens too shallow.
    """

    def __init__(self, budget: int | str | None = None, lookup: str = "exact", capacity: int = 0):
        refuse(lookup not in ("exact", "latest"), f"unknown lookup {lookup!r}; choose exact or latest")
        named = isinstance(budget, str) and budget.startswith("compress-s") and budget[10:].isdigit()
        whole = budget is None or (type(budget) is int and budget >= 1)
        refuse(not named and not whole, f"budget counts whole iterations, at least 1, got {budget!r}")
        self.budget, self.lookup, self.capacity = budget, lookup, capacity
        self.length, self.model, self.store, self.rows = 0, None, None, None

    def reserve(self, model: RecurrentDepthLM, B: int, T: int, steps: int) -> None:
        """Room for T more tokens of B rows that run `steps` iterations."""
        c, w, n = model.cfg, model.transformer.wte.weight, self.length
        if self.model is None:
            self.first, l_R, self.held = c.n_layers_in_prelude + c.n_layers_in_coda, c.n_layers_in_recurrent_block, 0
            if isinstance(self.budget, str):
                layers, name = int(self.budget[10:]), self.budget
                bad = layers < 1 or layers % l_R
                refuse(bad, f"budget counts whole iterations: {name} is not a multiple of {l_R} core layers")
                self.budget = layers // l_R
            self.model, self.l_R = model, l_R
            self.store = w.new_empty(2, self.first, B, c.num_key_value_heads, 0, c.head_dim)
            self.depth = torch.zeros(B, 0, dtype=torch.long)  # iterations that each token has run
        refuse(self.model is not model, "this cache belongs to a different model. Start a new RecurrentCache.")
        _, slots, rows, Hk, S, D = self.store.shape
        refuse(rows != B, f"this cache holds {rows} rows, the call has {B}. Start a new RecurrentCache.")
        used = min(steps, self.budget or steps)
        shallow = int(self.depth[:, :n].min()) if n else steps
        if steps and shallow < (used if self.lookup == "exact" else 1):
            ran = f"a cached token has run {shallow} iterations and this call runs {steps}"
            raise BadInput(f"{ran}: no keys for lookup='exact'. Use lookup='latest', and at least 1 iteration.")
        held, old = max(self.held, used), self.store
        if n + T > S or held > self.held:
            S = S if n + T <= S else min(max(2 * S, n + T, self.capacity), c.block_size)
            self.store = old.new_empty(2, self.first + held * self.l_R, B, Hk, S, D)
            self.store[:, :slots, :, :, :n] = old[..., :n, :]
            self.depth = F.pad(self.depth[:, :n], (0, S - n))
            if self.held and n:  # what the tokens before have of deeper iterations: their last
                last = old[:, -self.l_R :, ..., :n, :].repeat(1, held - self.held, 1, 1, 1, 1)
                self.store[:, slots:, ..., :n, :] = last
            self.held = held

    def slot(self, i: int) -> int:
        """First slot of iteration i."""
        return self.first + (i if self.budget is None else i % self.budget) * self.l_R

    def write(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new tokens' k, v (B, Hk, T, D) into a slot; all tokens' keys and values of it, (B, Hk, S, D) each."""
        new, both = slice(self.length, self.length + k.shape[2]), self.store[:, slot]  # (2, B, Hk, S, D)
        for held, x in zip(both, (k, v), strict=True):
            if self.rows is None:
                held[:, :, new] = x
            else:  # rows that have left keep what they wrote last
                held[self.rows, :, new] = x[self.rows]
        return both[0, :, :, : new.stop], both[1, :, :, : new.stop]

    def seal(self, steps: int | Tensor, T: int) -> None:
        """The new tokens are complete: their rows ran `steps` iterations, an int or (B,)."""
        new = slice(self.length, self.length + T)
        steps = torch.as_tensor(steps).expand(self.store.shape[2])  # (B,)
        self.depth[:, new] = steps[:, None]
        if self.lookup == "latest" and self.held:
            core = self.store[:, self.first :].unflatten(1, (-1, self.l_R))  # (2, held, l_R, B, Hk, S, D)
            for m in set(steps.tolist()) - {0}:
                rows = (steps == m).nonzero().flatten().to(core.device)
                for i in range(m, self.held):
                    core[:, i, :, rows, :, new] = core[:, m - 1, :, rows, :, new]
        self.length += T

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens."""
        refuse(not 0 <= n <= self.length, f"cannot truncate to {n} tokens, the cache holds {self.length}")
        self.length = n

    def bytes(self) -> int:
        """Memory that the cache holds."""
        return 0 if self.store is None else self.store.numel() * self.store.element_size()


# ---- the method at inference: when to stop


def change(s: Tensor, before: Tensor) -> Tensor:
    """|s - before| / |s| at each position: two (B, T, C) -> (B, T)."""
    return (s - before).norm(dim=-1) / s.norm(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits), in nats: (..., V) -> (...)."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class ExitRule:
    """Stop iterating when a value that compares an iterate with the one checked before it falls below a threshold.

    min_steps    never stop before so many iterations
    every        check at each `every`-th iteration only
    max_entropy  stop only where the prediction's entropy is below this, in nats. A position that no information has
                 reached yet sits still as well; at "50/50" it only looks converged.
    over         which positions of the call must agree: the last one, their mean, or all of them (max)
    ValueError: threshold <= 0 or NaN, min_steps or every < 1, an unknown `over`.
    """

    default, reads_logits, over, back = 0.0, True, "last", 1  # back: checks that a value looks back on

    def __init__(self, threshold: float | None = None, min_steps=1, every=1, max_entropy=math.inf, over: str = ""):
        name, self.threshold = type(self).__name__, self.default if threshold is None else threshold
        bad = not self.threshold > 0  # NaN is not either
        refuse(bad, f"{name}: the threshold must be positive, got {threshold}. Its default is {self.default}.")
        numbers = f"min_steps {min_steps}, every {every}, max_entropy {max_entropy}"
        refuse(min_steps < 1 or every < 1 or not max_entropy > 0, f"{name}: {numbers} must be positive")
        refuse(over not in ("", "last", "mean", "max"), f"{name}: over {over!r} is not last, mean or max")
        self.min_steps, self.every, self.max_entropy, self.over = min_steps, every, max_entropy, over or self.over
        self.reads_logits = self.reads_logits or max_entropy < math.inf
        self.start()

    def start(self, s: Tensor | None = None) -> None:
        """Forget the iterates seen so far; s is s_0."""
        self.seen = None

    def due(self, i: int) -> bool:
        """Is iteration i (1, 2, ...) one to look at? Those before min_steps only as far as the rule looks back."""
        return i % self.every == 0 and i > self.min_steps - (self.back + 1) * self.every

    def values(self, s: Tensor, logits: Tensor | None) -> Tensor:
        """The rule's value at each position, (B, T), against the iterate that was passed before."""
        raise NotImplementedError

    def stops(self, value: Tensor) -> Tensor:
        """Does a value mean stop?"""
        return value < self.threshold

    def positions(self, s: Tensor, logits: Tensor | None) -> Tensor:
        """Positions (B, T) that may stop with state s (B, T, C) and logits (B, T, V)."""
        value = self.values(s, logits)  # (B, T)
        value = value.float().mean(dim=1, keepdim=True).expand_as(value) if self.over == "mean" else value
        return self.stops(value) & (entropy(logits) < self.max_entropy if self.max_entropy < math.inf else True)

    def fires(self, i: int, s: Tensor, logits: Tensor | None) -> Tensor:
        """Rows (B,) that stop at iteration i."""
        at = self.positions(s, logits)
        return (at[:, -1] if self.over == "last" else at.all(dim=1)) & (i >= self.min_steps)


class KLExit(ExitRule):
    """KL(p_{i-1} || p_i) below 5e-4; p_0 is uniform."""

    default = 5e-4

    def values(self, s, logits):
        """(B, T), in nats."""
        log_p = logits.float().log_softmax(-1)
        before, self.seen = torch.zeros_like(log_p).log_softmax(-1) if self.seen is None else self.seen, log_p
        return (before.exp() * (before - log_p)).sum(-1)


class LatentDiffExit(ExitRule):
    """|s_i - s_{i-1}| / |s_i| below 0.03, mean over the positions fed in. Needs no coda."""

    default, reads_logits, over = 0.03, False, "mean"

    def start(self, s=None):
        """s_0 is the first to compare with."""
        self.seen = s

    def values(self, s, logits):
        """(B, T), relative."""
        before, self.seen = self.seen, s
        return change(s, before)


class EntropyDiffExit(ExitRule):
    """|H(p_i) - H(p_{i-1})| below 1e-3; H_0 = 100."""

    default = 1e-3

    def values(self, s, logits):
        """(B, T), in nats."""
        H = entropy(logits)
        before, self.seen = 100.0 if self.seen is None else self.seen, H
        return (H - before).abs()


class ArgmaxStableExit(ExitRule):
    """The likeliest token unchanged for 5 checks in a row."""

    default = 5
    back = property(lambda rule: rule.threshold)

    def values(self, s, logits):
        """(B, T), a count."""
        best = logits.argmax(-1)
        last, count = (best - 1, torch.zeros_like(best)) if self.seen is None else self.seen
        count = torch.where(best == last, count + 1, 0)
        self.seen = best, count
        return count

    def stops(self, value):
        """At or above the threshold."""
        return value >= self.threshold


EXITS = dict(zip(EXIT_NAMES, (KLExit, LatentDiffExit, EntropyDiffExit, ArgmaxStableExit), strict=True))


# ---- the method at inference: generation


def seeded_state(model: RecurrentDepthLM, base: int, first: int, ids: Tensor, scale: float) -> Tensor:
    """s_0 (B, T, C) for ids (B, T), the first at position `first`: a function of `base` and position alone."""
    one = model.transformer.wte.weight.new_empty(1, 1, model.cfg.n_embd)
    draw = [model.init_state(one, scale, cluster.generator(base, first + t)) for t in range(ids.shape[1])]
    return torch.cat(draw, dim=1).expand(len(ids), -1, -1)


@torch.no_grad()
def generate(
    model: RecurrentDepthLM, ids: Tensor, max_new_tokens: int, num_steps: int, exit: ExitRule | None = None,
    cache: RecurrentCache | None = None, warm_start: bool = False, draft_steps: int | None = None, lookahead: int = 4,
    temperature: float = 0, generator: torch.Generator | None = None, init_scale: float = 1.0,
    exit_prompt: bool = False, stream=None,
) -> tuple[Tensor, dict]:  # fmt: skip
    """Continue ids (B, T) by max_new_tokens -> (ids (B, T + new), stats).

    num_steps    iterations of a token, or with an exit rule at most; the prompt runs all of them unless exit_prompt.
    cache        by default one with all iterations, lookup "latest" if there is an exit rule. One that holds the first
                 tokens of ids already is continued.
    warm_start   s_0 of a new token is what the coda received for the token before, instead of noise.
    draft_steps  self-speculation: `lookahead` tokens are drafted with so few iterations and checked by one pass with
                 num_steps; what that pass would have said is kept, so the output is that of plain greedy decoding.
    temperature  0 is greedy. generator: of the draws and of s_0, which depends on it and the position alone, so that
                 equal calls agree. init_scale: factor on s_0, 0 is the zero state. stream: called with each new (B,).
    stats: iterations (a list, one int per new token, the first from the prompt; a list per row when B > 1), accepted
    (drafts kept per check), cache_bytes, serial (iterations one after the other, those of drafts and checks included).
    ValueError: settings that would change what is promised; the message says which.
    """
    model.check(ids)
    (B, T), room = ids.shape, model.cfg.block_size
    fits = 0 <= max_new_tokens <= room - T
    refuse(not fits, f"{T} tokens and {max_new_tokens} new ones exceed block_size {room}")
    refuse(not temperature >= 0, f"temperature must be >= 0, got {temperature}")
    if draft_steps is not None:
        refuse(exit or warm_start or temperature or B > 1 or lookahead < 1 or draft_steps < 1,
               "draft_steps >= 1 needs greedy decoding of one row with fixed iterations and lookahead >= 1: "
               "no exit rule, warm_start, temperature or batch")  # fmt: skip
        shared = cache is not None and (cache.budget is not None or cache.lookup != "exact")
        refuse(shared, "draft_steps needs a cache with all iterations: a shared one would change the output")
    cache = cache or RecurrentCache(lookup="latest" if exit else "exact")
    refuse(cache.length >= T, f"the cache holds {cache.length} tokens, ids has {T}: at least the last must be new")
    cache.capacity = max(cache.capacity, T + max_new_tokens)
    base = int(torch.randint(2**62, (), generator=generator)) if generator else 0
    out, y, ran, accepted, serial = ids, None, [], [], 0

    def run(new: Tensor, steps: int, s0: Tensor | None = None, rule: ExitRule | None = None) -> Output:
        nonlocal serial
        s0 = seeded_state(model, base, cache.length, new, init_scale) if s0 is None else s0
        y = model(new, steps, s0=s0, cache=cache, exit=rule)
        serial += int(torch.as_tensor(y.steps).max())
        return y

    def emit(token: Tensor, steps: int | Tensor) -> None:
        nonlocal out
        out = torch.cat([out, token[:, None]], dim=1)  # (B, T + 1)
        ran.append(torch.as_tensor(steps).expand(B).tolist())
        if stream:
            stream(token)

    while out.shape[1] < T + max_new_tokens:
        if draft_steps is None or y is None:
            carried = model.between(y.state[:, -1:]) if warm_start and y else None
            y = run(out[:, cache.length :], num_steps, carried, exit if y or exit_prompt else None)
            logits = y.logits[:, -1]  # (B, V)
            if temperature:
                p = (logits.double() / temperature).softmax(-1).cpu()
                token = torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)
            else:
                token = logits.argmax(-1)  # ties go to the lowest id
            emit(token, y.steps)
            continue
        n, drafts = cache.length, [out[:, -1:]]
        for _ in range(min(lookahead, T + max_new_tokens - out.shape[1] - 1)):
            drafts.append(run(drafts[-1], draft_steps).logits[:, -1].argmax(-1)[:, None])
        cache.truncate(n)  # shallow keys are not kept
        drafts = torch.cat(drafts, dim=1)  # (1, 1 + drafts)
        said = run(drafts, num_steps).logits.argmax(-1)  # (1, 1 + drafts): what each token should be followed by
        good = int((said[:, :-1] == drafts[:, 1:]).int().cumprod(dim=1).sum())
        cache.truncate(n + 1 + good)
        accepted.append(good)
        for j in range(good + 1):
            emit(said[:, j], y.steps)
    iterations = [r[0] for r in ran] if B == 1 else [list(row) for row in zip(*ran, strict=True)]
    return out, {"iterations": iterations, "accepted": accepted, "cache_bytes": cache.bytes(), "serial": serial}


@torch.no_grad()
def diffusion_forcing(
    model: RecurrentDepthLM, ids: Tensor, max_new_tokens: int, inner: int = 4, threshold: float = 0.03,
    noise: float = 0.5, momentum: float = 0.1, wave: int = 128, max_calls: int = 10_000, init_scale: float = 1.0,
) -> tuple[Tensor, dict]:  # fmt: skip
    """Refine a wave of positions together instead of one after the other: ids (1, T) -> (ids (1, T + new), stats).

    Each call runs `inner` iterations on all positions that are not frozen yet, rewrites the draft tokens after them
    and appends one more. States are mixed with noise / (1 + age) of fresh noise, e with `momentum` of the old e. A
    position freezes, with all before it, when its state changes by less than `threshold` relative to the call before.
    Frozen positions stay in the cache with the keys of their last `inner` iterations. stats: calls, serial, unfrozen
    (positions given up at max_calls, where the tokens may be fewer). ValueError: as generate; B > 1.
    Source: arXiv:2510.14961.
    """
    model.check(ids)
    (B, T), goal = ids.shape, ids.shape[1] + max_new_tokens
    refuse(B != 1 or goal > model.cfg.block_size or min(inner, wave, max_calls) < 1,
           f"one row, at most {model.cfg.block_size} tokens, inner, wave and max_calls >= 1: got {B} rows, {T} + "
           f"{max_new_tokens} tokens, {inner}, {wave}, {max_calls}")  # fmt: skip
    cache, out, done, calls = RecurrentCache(inner, capacity=goal), ids, 0, 0  # done: frozen positions
    # of the wave (1, w, C): states, embeddings, and for how many calls each position has been in it
    s = e_old = model.transformer.wte.weight.new_empty(1, 0, model.cfg.n_embd)
    age = torch.zeros(0)
    while calls < max_calls and done < goal - 1:
        new, known = out[:, done : min(goal - 1, done + max(wave, T - done))], s.shape[1]  # (1, w): prompt, then wave
        w = new.shape[1]
        cache.truncate(done)
        cache.reserve(model, 1, w, inner)
        at = model.place(w, cache)
        e, s0 = model.embed(new, at), seeded_state(model, calls, done, new, init_scale)  # (1, w, C)
        e[:, :known] = (1 - momentum) * e[:, :known] + momentum * e_old
        share = (noise / (1 + age))[:, None].to(e)  # (known, 1)
        s0 = torch.cat([(1 - share) * s + share * s0[:, :known], s0[:, known:]], dim=1)  # (1, w, C)
        s_new, _, _, _ = model.refine(s0, e, 0, inner, at)
        said = model.decode(s_new, at).argmax(-1)  # (1, w): the token after each position
        cache.seal(inner, w)
        frozen = int((change(s_new[:, :known], s) < threshold).int().cumprod(dim=1).sum())
        keep = max(T - done - 1, 0)  # the prompt's own tokens are not rewritten
        out = torch.cat([out[:, : done + keep + 1], said[:, keep:]], dim=1)[:, :goal]
        s, e_old, age = s_new[:, frozen:], e[:, frozen:], torch.cat([age + 1, torch.ones(w - known)])[frozen:]
        done, calls = done + frozen, calls + 1
    return out, {"calls": calls, "serial": calls * inner, "unfrozen": goal - 1 - done}


# ---- weights: the released layout, and a Llama made recurrent


def assemble(cfg: RecurrentConfig, tensors: dict[str, Tensor], source: str) -> RecurrentDepthLM:
    """A model that holds these very tensors. ValueError: names all of them missing, extra or misshapen."""
    with torch.device("meta"):
        model = RecurrentDepthLM(cfg)
    want = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    have = {n: tuple(p.shape) for n, p in tensors.items()}
    wrong = [f"missing {n} {want[n]}" for n in want if n not in have]
    wrong += [f"extra {n} {have[n]}" for n in have if n not in want]
    wrong += [f"{n} is {have[n]}, needs {want[n]}" for n in want if n in have and have[n] != want[n]]
    refuse(wrong, f"{source} does not fit its config: " + "; ".join(wrong))
    model.load_state_dict(tensors, assign=True)
    model.freq = cfg.frequencies()
    return model.requires_grad_()


def load_weights(path: str | Path) -> RecurrentDepthLM:
    """A model from a folder with config.json and model.safetensors or its index, or from one file in such a folder.

    lm_head.weight (a copy of the embedding when tied) and freqs_cis (recomputed) may be there or not.
    FileNotFoundError: no such files. BadInput: damaged. ValueError: names all tensors missing, extra or misshapen.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not (folder / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json. Give the folder that `train` or save_weights wrote.")
    cfg, tensors, st = RecurrentConfig.from_json(folder / "config.json"), {}, package("safetensors.torch")
    if path == folder:
        index = folder / "model.safetensors.index.json"
        path = index if index.exists() else folder / "model.safetensors"
    files = [path]
    if path.name.endswith(".index.json"):
        files = [folder / name for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
    for file in files:
        try:
            tensors |= st.load_file(file)
        except FileNotFoundError as e:
            why = "though the index names it" if file != path else "and there is no index"
            raise FileNotFoundError(f"{file} is missing, {why}.") from e
        except Exception as e:  # safetensors has its own
            raise BadInput(f"{file} is incomplete or damaged ({e}). Copy or download it again.") from e
    tensors.pop("freqs_cis", None)
    if cfg.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    return assemble(cfg, tensors, str(folder)).eval()


def save_weights(model: RecurrentDepthLM, folder: str | Path) -> None:
    """Write config.json and model.safetensors under the released names, each to a temporary name, then renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().contiguous().cpu() for n, p in model.state_dict().items()}
    package("safetensors.torch").save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").replace(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of another model: it would be read first
    huginn = {"model_type": "huginn_raven", "state_init": "like-init", "qk_bias": model.cfg.sandwich, "bias": False}
    report.write_json(folder / "config.json", huginn | asdict(model.cfg))


LLAMA = {
    "norm_1": ["input_layernorm"], "norm_2": ["post_attention_layernorm"], "attn.proj": ["self_attn.o_proj"],
    "attn.Wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.proj": ["mlp.down_proj"],
}  # fmt: skip


def retrofit(state_dict: dict[str, Tensor], llama_config: dict, split=(4, 8, 4), seed: int = 0) -> RecurrentDepthLM:
    """Make a pretrained Llama recurrent: Hugging Face names and config -> a model with LlamaBlocks (arXiv:2511.07384).

    split (p, R, c): the first p layers become the prelude, the last c the coda, the R before those the core; layers
    between prelude and core are dropped. Only the adapter is new. ValueError: the split exceeds the layers, a tensor
    is missing or misshapen, or one of a kept layer has no place here, such as a bias.
    """
    (p, R, c), n, given = split, llama_config["num_hidden_layers"], llama_config.get
    refuse(min(split) < 1 or sum(split) > n,
           f"split {tuple(split)} needs {sum(split)} layers, each part at least 1; the model has {n}")  # fmt: skip
    C, heads = llama_config["hidden_size"], llama_config["num_attention_heads"]
    cfg = RecurrentConfig(
        n_embd=C, num_attention_heads=heads, num_key_value_heads=given("num_key_value_heads", heads),
        head_dim=given("head_dim") or 0, intermediate_size=llama_config["intermediate_size"],
        n_layers_in_prelude=p, n_layers_in_recurrent_block=R, n_layers_in_coda=c, mean_recurrence=4,
        mean_backprop_depth=8, vocab_size=llama_config["vocab_size"], block_size=given("max_position_embeddings", 2048),
        norm_eps=llama_config["rms_norm_eps"], rope_base=given("rope_theta", 1e4),
        rope_scaling=given("rope_scaling") or {}, tie_embeddings=False, block_class_name="LlamaBlock",
    )  # fmt: skip
    kept = [*range(p), *range(n - c - R, n)]
    places = [f"{part}.{j}" for part, count in (("prelude", p), ("core_block", R), ("coda", c)) for j in range(count)]
    sources = {"wte": ["model.embed_tokens"], "ln_f": ["model.norm"]}
    for place, i in zip(places, kept, strict=True):
        sources |= {f"{place}.{ours}": [f"model.layers.{i}.{old}" for old in parts] for ours, parts in LLAMA.items()}
    used = {f"{name}.weight" for parts in sources.values() for name in parts}
    missing = sorted(used - set(state_dict))
    refuse(missing, f"the state dict has no {', '.join(missing)}. It needs Hugging Face's Llama names.")
    mine = tuple(f"model.layers.{i}." for i in kept)
    strange = sorted(x for x in set(state_dict) - used if x.startswith(mine) and not x.endswith("inv_freq"))
    refuse(strange, f"a Llama's layers have no {', '.join(strange)}: this model cannot be retrofitted.")
    new = {f"transformer.{ours}.weight": torch.cat([state_dict[f"{name}.weight"] for name in parts])  # along rows
           for ours, parts in sources.items()}  # fmt: skip
    wte, bound = new["transformer.wte.weight"], 1 / math.sqrt(2 * C)
    adapter = torch.empty(C, 2 * C).uniform_(-bound, bound, generator=cluster.generator(seed, 1))
    new["transformer.adapter.weight"] = adapter.to(wte.dtype)
    new["lm_head.weight"] = state_dict.get("lm_head.weight", wte).clone()  # untied from here on
    return assemble(cfg, new, "the state dict")


# ---- the optimizer


class AtanAdam(torch.optim.Optimizer):
    """The paper's Adam: moments that start at the first gradient, update clipping, atan2 in place of epsilon.

    m, v start as g, g^2, then follow the usual moving averages with the usual bias correction. Per tensor,
    rho = sqrt(mean(g^2 / max(v, 1e-12))) and
        p <- p (1 - lr / lr_0 wd) - lr / max(1, rho) / (1 - b1^t) atan2(m, sqrt(v / (1 - b2^t)))
    with lr_0 the rate given here, so that decay follows a schedule but not its size. The released code floors v in
    place, and so an epsilon of 1e-6 sneaks back in; we floor a copy. ValueError: a rate or decay below 0, a beta not in
    [0, 1).
    """

    def __init__(self, params: Iterable, lr: float = 4e-5, betas=(0.9, 0.95), weight_decay: float = 4e-5):
        good = lr >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)
        refuse(not good, f"lr {lr} and weight_decay {weight_decay} must be >= 0, betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "base_lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                g, state = p.grad.to(torch.promote_types(p.dtype, torch.float32)), self.state[p]
                if not state:
                    state.update(step=0, m=g.clone(), v=g * g)
                state["step"] += 1
                m, v, t = state["m"], state["v"], state["step"]
                m.lerp_(g, 1 - b1)
                v.lerp_(g * g, 1 - b2)
                rho = (g * g / v.clamp(min=1e-12)).mean().sqrt()
                p.mul_(1 - lr / (group["base_lr"] or 1) * group["weight_decay"])
                update = torch.atan2(m, (v / (1 - b2**t)).sqrt()) * (lr / rho.clamp(min=1) / (1 - b1**t))
                p.sub_(update.to(p.dtype))
        return loss


# ---- the experiment: data


class Parity:
    """Running parity: after a start token 2, random bits; the label at each bit is the parity of all bits up to it.

    Position t is its own level of difficulty: what an iteration adds is "combine with what an earlier position holds".
    """

    vocab, n_out, tokenizer = 3, 2, None

    def __init__(self, cfg: Config):
        self.seed = cfg.seed

    def draw(self, rows: int, length: int, micro: int = -1) -> tuple[Tensor, Tensor]:
        """ids and labels (rows, 1 + length) of a micro-step, or fresh ones, in training by a chance of 2^-length."""
        g = cluster.generator(self.seed, *((9, length) if micro < 0 else (3, micro)))
        return self.label(torch.randint(2, (rows, length), generator=g))

    @staticmethod
    def label(bits: Tensor) -> tuple[Tensor, Tensor]:
        """bits (B, T) -> ids and labels (B, 1 + T). -100: no loss."""
        start = torch.full((len(bits), 1), 2)
        return torch.cat([start, bits], dim=1), torch.cat([start - 102, bits.cumsum(dim=1) % 2], dim=1)


class Text:
    """Text as rows of ids, bytes unless a tokenizer is given; the last 5 % are held out."""

    n_out = 0

    def __init__(self, cfg: Config, tokenizer=None):
        text = corpus(cfg.data)
        ids = Tokenizer().encode(text) if tokenizer is None else torch.tensor(tokenizer.encode(text).ids)
        self.seed, self.tokenizer, self.vocab = cfg.seed, tokenizer, tokenizer.get_vocab_size() if tokenizer else 256
        self.train, self.held = ids.tensor_split([int(0.95 * len(ids))])
        short = len(self.held) <= cfg.block
        refuse(short, f"the text has {len(ids)} tokens, --block {cfg.block} needs {21 * cfg.block}. Add text.")

    def draw(self, rows: int, length: int, micro: int = -1) -> tuple[Tensor, Tensor]:
        """ids and labels (rows, length) at random places of the training text, or of the held-out text."""
        g = cluster.generator(self.seed, *((9, length) if micro < 0 else (3, micro)))
        ids = self.held if micro < 0 else self.train
        first = torch.randint(len(ids) - length, (rows, 1), generator=g)
        cut = ids[first + torch.arange(length + 1)]  # (rows, length + 1)
        return cut[:, :-1], cut[:, 1:]


# ---- the experiment: training

# settings that change the numbers of a run; a checkpoint goes on only under the same ones
FIXED = (
    "task", "block", "data", "d_model", "n_head", "ff", "layers", "rope_base", "recency", "r_bar", "k", "fixed_r",
    "ramp", "steps", "batch", "accum", "optimizer", "lr", "warmup", "flat", "settle", "settle_lr", "beta2",
    "weight_decay", "clip", "seed", "dtype", "split",
)  # fmt: skip


def shape_of(cfg: Config, data) -> RecurrentConfig:
    """The model that the flags describe, for the vocabulary of `data`."""
    p, R, c = cfg.layers
    return RecurrentConfig(
        n_embd=cfg.d_model, num_attention_heads=cfg.n_head, intermediate_size=cfg.ff, n_layers_in_prelude=p,
        n_layers_in_recurrent_block=R, n_layers_in_coda=c, mean_recurrence=cfg.r_bar, mean_backprop_depth=cfg.k,
        vocab_size=data.vocab, n_out=data.n_out, block_size=max(1024, cfg.block), rope_base=cfg.rope_base,
        tie_embeddings=not data.n_out,
    )  # fmt: skip


@torch.no_grad()
def look_back(model: RecurrentDepthLM, strength: float) -> None:
    """Start each head with a preference for the token before: strength^2 / sqrt(D) sum_j cos((t - 1 - s) theta_j).

    The paper starts qk_bias at 0, which looks everywhere alike. Then most seeds learn the parity of short rows by
    counting and never come to use the recurrence (docs/results/recurrent_depth.md).
    """
    theta = model.freq
    for name, p in model.named_parameters():
        if name.endswith("qk_bias"):  # (2, 1, H, D): queries and keys; pairs (x0, x1), (x2, x3)...
            p[1, ..., 0::2] = strength
            p[0, ..., 0::2], p[0, ..., 1::2] = strength * theta.cos(), -strength * theta.sin()  # turned back by one


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def correlation(s: Tensor) -> Tensor:
    """Mean cosine between the states of two positions of a row, s (B, T, C) -> 0-d; 1 is hidden-state collapse."""
    T = s.shape[1]
    u = F.normalize(s.detach().float(), dim=-1).sum(dim=1)  # (B, C)
    return ((u.square().sum(-1) - T) / max(1, T * (T - 1))).mean()


class Trainer:
    """Model, optimizer and a step whose rows, initial states and depth do not depend on the number of ranks.

    data and model None: those that cfg describes. state: of a checkpoint. BadInput: cfg does not fit it or the ranks.
    """

    def __init__(self, cfg: Config, data, w: cluster.World, state: dict | None = None, model=None):
        self.cfg, self.w = cfg, w
        self.data = data = data or (Parity(cfg) if cfg.task == "parity" else Text(cfg))
        uneven = cfg.batch % (w.size * cfg.accum)
        refuse(uneven, f"--batch {cfg.batch} does not divide over {w.size} processes x --accum {cfg.accum}")
        if model is None:
            model = RecurrentDepthLM(shape_of(cfg, data), cfg.seed)
            look_back(model, cfg.recency)
        self.model = model.to(w.device).train()
        self.model.checkpointing = cfg.checkpointing
        decay, rest = ([p for p in self.model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        kind = torch.optim.AdamW if cfg.optimizer == "adamw" else AtanAdam  # norms and biases (1-D) do not decay
        self.optimizer = kind(groups, lr=cfg.lr, betas=(0.9, cfg.beta2))
        self.step = self.skipped = self.in_a_row = 0
        self.smooth, self.settled = 1.0, 0  # the loss of late, the step at which it fell below --settle
        if state:
            for name, was in state["setting"].items():
                flag, now = "--" + name.replace("_", "-"), getattr(cfg, name)
                clash = f"the checkpoint was trained with {flag} {was}, this run asks for {flag} {now}"
                refuse(was != now, f"{clash}. Pass the same value to resume, or another --out to start anew.")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.skipped, self.in_a_row, self.smooth, self.settled = state["counts"]
        self._same_depths()
        self.ddp = DistributedDataParallel(self.model)

    def _same_depths(self) -> None:
        """RuntimeError: the ranks would run different depths and wait for each other, or for ever."""
        mine = torch.tensor(self.depth(0), device=self.w.device)
        every = [torch.empty_like(mine) for _ in range(self.w.size)]
        dist.all_gather(every, mine)
        if any(not torch.equal(mine, other) for other in every):
            raise RuntimeError(f"ranks draw different depths {[tuple(x.tolist()) for x in every]}: is torch the same?")

    def depth(self, micro: int) -> tuple[int, int]:
        """(n, k) of a micro-step."""
        cfg = self.cfg
        if cfg.fixed_r:
            return max(cfg.fixed_r - cfg.k, 0), min(cfg.fixed_r, cfg.k)
        if not cfg.ramp:
            return sample_steps(micro + 1, cfg.r_bar, cfg.k)
        mean = mean_schedule(micro, cfg.steps * cfg.accum, cfg.r_bar, cfg.ramp)
        return sample_steps(micro + 1, mean, min(cfg.k, mean))

    def rate(self) -> float:
        """Part of --lr at this step: warm-up, peak, linear fall; once the loss falls below --settle a lower peak."""
        cfg, first = self.cfg, self.settled or self.cfg.flat * self.cfg.steps
        fall = 1 - 0.98 * max(0, self.step - first) / max(1, cfg.steps - first)
        return min(1, (self.step + 1) / max(1, cfg.warmup)) * fall * (cfg.settle_lr if self.settled else 1)

    def state(self) -> dict:
        """What a checkpoint holds."""
        setting = {name: getattr(self.cfg, name) for name in FIXED}
        counts = [self.step, self.skipped, self.in_a_row, self.smooth, self.settled]
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "setting": setting, "counts": counts}

    def micro_loss(self, micro: int) -> Output:
        """Forward pass of this rank's rows of a micro-step."""
        cfg, w = self.cfg, self.w
        rows = cfg.batch // cfg.accum
        ids, labels = self.data.draw(rows, cfg.block, micro)  # (rows, T)
        e = torch.empty(1, ids.shape[1], self.model.cfg.n_embd)
        noise = lambda row: self.model.init_state(e, generator=cluster.generator(cfg.seed, 4, micro, row))
        s0 = torch.cat([noise(row) for row in range(w.rank, rows, w.size)])  # (rows / ranks, T, C)
        ids, labels = (x[w.rank :: w.size].to(w.device) for x in (ids, labels))
        with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            return self.ddp(ids, self.depth(micro), s0.to(w.device), labels)

    def advance(self, log: bool) -> dict:
        """One optimizer step; with `log`, what it measured."""
        cfg, losses = self.cfg, []
        for j in range(cfg.accum):
            self.ddp.require_backward_grad_sync = j == cfg.accum - 1
            out = self.micro_loss(self.step * cfg.accum + j)
            (out.loss / cfg.accum).backward()
            losses.append(out.loss.detach())
        loss = (cluster.total(torch.stack(losses).mean()) / self.w.size).item()
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * self.rate()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip).item()
        self.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.in_a_row, self.smooth = 0, 0.9 * self.smooth + 0.1 * loss
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            endless = f"the loss was not finite in 20 steps in a row, up to step {self.step}. Lower --lr."
            refuse(self.in_a_row == 20, endless)
        self.optimizer.zero_grad(set_to_none=True)
        if self.smooth < cfg.settle and not self.settled:
            self.settled = self.step
        if not log:
            return {}
        n, k = self.depth(self.step * cfg.accum - 1)
        alarms = {"correlation": correlation(out.state).item(), "residual": change(out.state, out.before).mean().item()}
        skipped = {"skipped": self.skipped} if self.skipped else {}
        return {"loss": loss, "grad_norm": norm, "n": n, "k": k, **alarms, **skipped}

    def run(self, log: report.Run, what: str, path: str = "") -> "Trainer":
        """Train to the end; checkpoints go to `path` if given, also when SIGTERM asks to stop."""
        cfg = self.cfg
        bar = report.progress(None, what, self.w, cfg.steps, self.step)
        listen = cluster.stop_signal() if path else contextlib.nullcontext(bool)  # bool() is False
        with listen as stopping, bar:
            while self.step < cfg.steps:
                if line := self.advance((self.step + 1) % cfg.log_every == 0 or self.step + 1 == cfg.steps):
                    log.log(run=what, step=self.step, **line)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}")
                bar.update()
                stop = stopping()
                due = stop or self.step == cfg.steps or (cfg.save_every and self.step % cfg.save_every == 0)
                if path and due and self.w.main:
                    cluster.save(path, self.state())
                if stop:
                    self.w.print(f"stopped by SIGTERM after step {self.step}; go on with --resume")
                    raise SystemExit(0)
        return self


# ---- the experiment: what depth does


@torch.no_grad()
def unroll(model: RecurrentDepthLM, ids: Tensor, r_max: int, s0: Tensor | None = None, seed: int = 0):
    """Yield (r, s_r) for r = 0..r_max, from s0 or from noise of `seed`."""
    e, at = model.embed(ids), model.place(ids.shape[1])
    s = model.init_state(e, generator=cluster.generator(seed, 5)) if s0 is None else s0
    for r in range(r_max + 1):
        s = model.iterate(s, e, at) if r else s
        yield r, s


@torch.no_grad()
def by_depth(model: RecurrentDepthLM, ids: Tensor, labels: Tensor, depths, seed: int = 0) -> tuple[dict, dict]:
    """At each depth the accuracy by position, (T,), and the mean loss: {r: tensor}, {r: float}."""
    right, loss = {}, {}
    for r, s in unroll(model, ids, max(depths), seed=seed):
        if r in depths:
            logits = model.decode(s)
            right[r] = (logits.argmax(-1) == labels).float().mean(dim=0)[(labels >= 0).all(dim=0)].cpu()
            loss[r] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    return right, loss


@torch.no_grad()
def exits(model: RecurrentDepthLM, ids: Tensor, labels: Tensor, rules: dict, r_max: int = 32) -> dict:
    """For each rule the mean iterations, the accuracy with them, and the iterations by position (T,)."""
    steps, answers, seen = {}, {}, (labels >= 0).all(dim=0)
    for r, s in unroll(model, ids, r_max):
        logits = model.decode(s)
        best = logits.argmax(-1)  # (B, T)
        for name, rule in rules.items():
            if r == 0:
                rule.start(s)
                steps[name], answers[name] = torch.zeros_like(best), best
                continue
            go = rule.positions(s, logits)  # (B, T)
            go = go.all(dim=1, keepdim=True).expand_as(go) if rule.over == "max" else go
            now = (steps[name] == 0) & (go | (r == r_max))
            steps[name], answers[name] = torch.where(now, r, steps[name]), torch.where(now, best, answers[name])
    at = {name: step[:, seen].float().mean(dim=0).cpu() for name, step in steps.items()}
    right = {name: (answer == labels)[:, seen].float().mean().item() for name, answer in answers.items()}
    return {name: (at[name].mean().item(), right[name], at[name]) for name in rules}


def exit_table(w: cluster.World, model: RecurrentDepthLM, rows: dict, rules: dict[str, ExitRule]) -> dict:
    """Print and return what exits() finds in rows {T: (ids, labels)}: {T: {name of the rule: its three values}}."""
    found = {T: exits(model, *ids_and_labels, rules) for T, ids_and_labels in rows.items()}
    lines = [[rule, *(f"{f[rule][0]:.1f} ({f[rule][1]:.3f})" for f in found.values())] for rule in rules]
    head = ["rule", *(f"T = {T}" for T in found)]
    w.print("\nexit, at most 32 iterations: mean iterations (accuracy)\n" + report.table(head, lines))
    return found


@torch.no_grad()
def path_independence(model: RecurrentDepthLM, ids: Tensor, depths) -> dict[int, float]:
    """Largest difference of logits between a start at noise and one at zero, by depth."""
    noise = unroll(model, ids, max(depths))
    zero = unroll(model, ids, max(depths), torch.zeros(*ids.shape, model.cfg.n_embd, device=ids.device))
    return {r: (model.decode(a) - model.decode(b)).abs().max().item()
            for (r, a), (_, b) in zip(noise, zero, strict=True) if r in depths}  # fmt: skip


def passes(acc: dict[int, float]) -> bool:
    """Accuracy rises with depth and stays: the claim for one run."""
    return acc[12] >= 0.98 and acc[4] - acc[1] >= 0.12 and acc[64] >= acc[12] - 0.01


def demo(cfg: Config, w: cluster.World) -> None:
    """Train a model per seed and one at fixed depth, then show what more iterations do to each."""
    T, depths, data, tried = cfg.block, sorted({*cfg.num_steps}), Parity(cfg), []
    refuse(cfg.task != "parity", "the demo is about parity. For text: python recurrent_depth.py train --preset bytes")
    refuse(T < 4, f"the demo looks at quarters of its rows, --block {T} must be at least 4")
    need = sorted({1, 4, 12, 64} - set(depths))
    refuse(need, f"the demo needs the depths 1 4 12 64 among --num-steps, {need} are missing")
    run = report.Run(cfg.out, cfg, w)
    rows = lambda L: [x.to(w.device) for x in data.draw(cfg.rows, L)]
    mean = lambda right: {r: a.mean().item() for r, a in right.items()}
    quarter = lambda right, i: {r: a.tensor_split(4)[i] for r, a in right.items()}
    rules = {  # rows leave when all their positions agree, or positions leave one by one
        "KL, whole row": KLExit(over="max"), "state, whole row": LatentDiffExit(over="max"), "KL, per token": KLExit(),
        "KL and entropy < 0.1, per token": KLExit(max_entropy=0.1),
    }  # fmt: skip
    for seed in cfg.seeds:
        model = Trainer(replace(cfg, seed=seed), None, w).run(run, f"seed {seed}").model
        right = by_depth(model, *rows(T), depths)[0]
        acc = mean(right)
        tried.append((not passes(acc), len(tried), seed, model, right))
        run.log(seed=seed, passed=passes(acc), **{f"acc_{r}": a for r, a in acc.items()})
        said = ", ".join(f"{acc[r]:.3f} at r = {r}" for r in (1, 4, 12, 64))
        w.print(f"seed {seed} {'passes' if passes(acc) else 'FAILS'}: accuracy {said}")
    fixed = replace(cfg, seed=cfg.seeds[0], fixed_r=1)
    control = by_depth(Trainer(fixed, None, w).run(run, "control").model, *rows(T), depths)[0]
    _, _, seed, model, right = min(tried)  # the first that passes is measured further
    acc, passed = mean(right), sum(not x[0] for x in tried)
    longer = {L: by_depth(model, *rows(L), depths)[0] for L in (3 * T // 2, 2 * T)}
    table = {f"{T} bits, as in training": right, **{f"quarter {i + 1}": quarter(right, i) for i in range(4)}}
    table |= {"control: r = 1 in training": control, **{f"rows longer: {L} bits": a for L, a in longer.items()}}
    gap = path_independence(model, rows(T)[0], depths)
    lines = [[name, *mean(a).values()] for name, a in table.items()]
    lines += [["path independence: |logits, s_0 noise - zero|", *gap.values()]]
    w.print(f"\nseed {seed}: accuracy on {cfg.rows} fresh rows\n" + report.table(["r =", *map(str, depths)], lines))
    left = exit_table(w, model, {L: rows(L) for L in (T // 4, T // 2, 3 * T // 4, T)}, rules)
    use(w, model, rows(T)[0])
    steps, sure, _ = zip(*(found["KL, whole row"] for found in left.values()), strict=True)
    grows = [*steps] == sorted({*steps}) and min(sure) >= 0.98
    flat = mean(control).values()
    longer, at = {L: mean(a) for L, a in longer.items()}, dict(zip(left, steps, strict=True))
    run.log(control=mean(control), longer=longer, exits=at, paths=gap)
    keep(cfg, w, model, data)
    if w.main:
        drawing = functools.partial(draw, right, control, left)
        w.print("\n" + report.picture(f"{cfg.out}/recurrent_depth.png", drawing, ncols=3, figsize=(15, 4)))
    run.claim(
        "one set of weights gets more right with more iterations at test time, and stays there",
        "ARC-C 24.1 at r = 1, 38.2 at 32 (Huginn-3.5B)",
        f"parity of {T} bits, accuracy {acc[1]:.3f} at r = 1, {acc[4]:.3f} at 4, {acc[12]:.3f} at 12, {acc[64]:.3f} at "
        f"64; {passed} of {len(tried)} seeds pass; control {min(flat):.3f} to {max(flat):.3f}; rows exit after "
        f"{steps[0]:.1f} iterations ({T // 4} bits) to {steps[-1]:.1f} ({T} bits) at accuracy {min(sure):.3f}",
        2 * passed > len(tried) and max(flat) - min(flat) <= 0.03 and grows,
        f"{count(model)} parameters, {cfg.steps} steps, seeds {cfg.seeds}, {w.device.type}",
    )


@torch.no_grad()
def use(w: cluster.World, model: RecurrentDepthLM, ids: Tensor, new: int = 16, r: int = 24) -> None:
    """Continue rows by every way of generation; how often each says what greedy decoding without a cache says."""
    prompts, lines, want = ids[:8, : ids.shape[1] // 2].split(1), [], None  # 8 x (1, T)
    T, sure = prompts[0].shape[1], KLExit(max_entropy=0.1)

    def plain(out: Tensor) -> tuple[Tensor, dict]:
        for _ in range(new):
            s0 = torch.zeros(*out.shape, model.cfg.n_embd, device=out.device)
            out = torch.cat([out, model(out, r, s0).logits[:, -1:].argmax(-1)], dim=1)
        return out, {"serial": r * new}

    go = functools.partial(generate, model, max_new_tokens=new, num_steps=r, init_scale=0)
    ways = {
        "no cache": plain, "cache": go, "cache of 4 iterations": lambda p: go(p, cache=RecurrentCache(4)),
        "exit by KL, entropy < 0.1": lambda p: go(p, exit=sure),
        "the same, warm start": lambda p: go(p, exit=sure, warm_start=True),
        "speculative, drafts of 4": lambda p: go(p, draft_steps=4),
        "diffusion forcing": lambda p: diffusion_forcing(model, p, new, init_scale=0),
    }  # fmt: skip
    for name, way in ways.items():
        start = time.process_time()
        made = [way(p) for p in prompts]
        ms, tokens = (time.process_time() - start) * 1e3, new * len(prompts)
        out, serial = torch.cat([x[:, T:] for x, _ in made]), sum(stats["serial"] for _, stats in made)
        want = out if want is None else want
        lines.append([name, (out == want).float().mean().item(), f"{serial / tokens:.1f}", f"{ms / tokens:.1f}"])
    w.print(f"\n{len(prompts)} prompts of {T - 1} bits, {new} tokens each, at most {r} iterations")
    head = ["way", "tokens as without cache", "iterations in a row per token", "CPU ms per token"]
    w.print(report.table(head, lines))


def draw(right: dict, control: dict, left: dict, figure, axes) -> None:
    """Accuracy over position and depth, its mean beside the control's, and when each position leaves."""
    heat, mean, out = axes
    depths = list(right)
    image = heat.imshow(torch.stack([right[r] for r in depths]), aspect="auto", origin="lower", vmin=0.5, vmax=1)
    heat.set_yticks(range(len(depths)), depths)
    heat.set(xlabel="position", ylabel="iterations r", title="Accuracy")
    figure.colorbar(image, ax=heat)
    for name, acc in {"drawn r in training": right, "r = 1 in training": control}.items():
        mean.plot(depths, [acc[r].mean() for r in depths], marker="o", label=name)
    mean.set_xscale("log", base=2)
    mean.set(xlabel="iterations r at test time", ylabel="accuracy, all positions", title="Depth is a dial")
    mean.legend(frameon=False)
    for L, found in left.items():
        out.plot(range(1, L + 1), found["KL and entropy < 0.1, per token"][2], label=f"{L} bits, per token")
        out.axhline(found["KL, whole row"][0], color=out.lines[-1].get_color(), ls=":", lw=1)
    title = "Exit: harder positions leave later (dotted: rows)"
    out.set(xlabel="position", ylabel="iterations before exit", title=title)
    out.legend(frameon=False)


# ---- train, eval, generate, retrofit, inspect, bench


def train(cfg: Config, w: cluster.World, data=None, model: RecurrentDepthLM | None = None) -> None:
    """One run with checkpoints; ends with accuracy and loss by depth, and the weights in OUT/model."""
    path = f"{cfg.out}/checkpoint.pt"
    trainer = Trainer(cfg, data, w, cluster.load(path) if cfg.resume else None, model)
    if w.main and not cfg.resume:
        cluster.set_aside(path)
    run = report.Run(cfg.out, cfg, w, trainer.step)
    trainer.run(run, "train", path)
    measure(cfg, w, trainer.model, trainer.data, run)
    keep(cfg, w, trainer.model, trainer.data)


def keep(cfg: Config, w: cluster.World, model: RecurrentDepthLM, data) -> None:
    """Write the weights to OUT/model, with the tokenizer that belongs to them if there is one."""
    if not w.main:
        return
    try:
        save_weights(model, f"{cfg.out}/model")
    except ModuleNotFoundError as e:
        return w.print(f"weights not written: {e}")
    tokenizer = Path(cfg.out, "model", "tokenizer.json")
    tokenizer.unlink(missing_ok=True)  # of an earlier model
    if data.tokenizer is not None:
        data.tokenizer.save(str(tokenizer))
    w.print(f"weights: {cfg.out}/model")


def open_model(cfg: Config, w: cluster.World):
    """The model of --model with its tokenizer or None: our folder, or a Llama made recurrent on the spot."""
    folder = Path(cfg.model)
    config, tok = folder / "config.json", folder / "tokenizer.json"
    if config.exists() and "huginn_raven" in config.read_text():
        tokenizer = package("tokenizers").Tokenizer.from_file(str(tok)) if tok.exists() else None
        return load_weights(folder).to(w.device), tokenizer
    absent = f"there is no model in {cfg.model}. Run recurrent_depth.py train first, or pass --model smollm2."
    refuse(cfg.model == Config.model, absent)
    weights = open_weights(cfg.model)
    w.print(f"{cfg.model} split {cfg.split} of {weights.config['num_hidden_layers']}, not healed: expect no sense")
    return retrofit(weights.state_dict(), weights.config, cfg.split).eval().to(w.device), weights.tokenizer()


def open_both(cfg: Config, w: cluster.World):
    """The model of --model and rows that fit it: parity for a head of two classes, else text."""
    model, tokenizer = open_model(cfg, w)
    return model, Parity(cfg) if model.cfg.n_out else Text(cfg, tokenizer)


def measure(cfg: Config, w: cluster.World, model: RecurrentDepthLM | None = None, data=None, run=None) -> None:
    """Loss and accuracy of a model, by default --model, on held-out rows by depth; alarm if depth changes nothing."""
    model, data = (model, data) if model else open_both(cfg, w)
    rows = cfg.rows if data.n_out else min(cfg.rows, 64)
    ids, labels = (x.to(w.device) for x in data.draw(rows, cfg.block))
    right, loss = by_depth(model, ids, labels, sorted({*cfg.num_steps, model.cfg.mean_recurrence}))
    accuracy = {r: a.mean().item() for r, a in right.items()}
    lines = [["accuracy", *accuracy.values()], ["loss in nats", *loss.values()]]
    w.print(report.table(["at r =", *map(str, loss)], lines))
    deep = [v for r, v in loss.items() if r]
    if len(deep) > 1 and max(deep) - min(deep) < 0.01 * min(deep):
        w.print("alarm: the loss does not depend on r; the core may ignore its state (recurrence collapse)")
    if run:
        run.log(loss_by_r=loss, accuracy_by_r=accuracy)


def generate_text(cfg: Config, w: cluster.World) -> None:
    """Continue --prompt, printing as it comes, with the iterations of each token and tokens per second."""
    model, tokenizer = open_model(cfg, w)
    if model.cfg.n_out:
        bits = [int(c) for c in cfg.prompt if c in "01"]
        refuse(not bits, 'this model knows bits: give --prompt "0110"')
        ids, decode = [2, *bits], lambda i: " ".join(map(str, i))
    elif tokenizer is None:
        ids, decode = Tokenizer().encode(cfg.prompt).tolist(), Tokenizer().decode
    else:
        ids, decode = tokenizer.encode(cfg.prompt).ids, tokenizer.decode
    refuse(not ids, "--prompt is empty. Give at least one word.")
    rule = None if cfg.exit == "none" else EXITS[cfg.exit](max_entropy=cfg.max_entropy)
    cache = RecurrentCache(cfg.budget or None, "latest" if rule else "exact")
    said, shown, start = [], "", time.perf_counter()

    def stream(token: Tensor) -> None:
        nonlocal shown
        said.append(int(token[0]))
        text = decode(said)
        if w.main and not text.endswith("�"):  # half a character waits for the other half
            print(text[len(shown) :], end="", flush=True)
            shown = text

    w.print(cfg.prompt, "->")
    _, stats = generate(
        model, torch.tensor([ids], device=w.device), cfg.new, cfg.num_steps[-1], exit=rule, cache=cache,
        warm_start=cfg.warm_start, draft_steps=cfg.draft or None, temperature=cfg.temperature,
        generator=cluster.generator(cfg.seed, 6), stream=stream,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    w.print(f"\niterations per token: {' '.join(map(str, stats['iterations']))}")
    if stats["accepted"]:
        w.print(f"drafts kept per check: {' '.join(map(str, stats['accepted']))}")
    w.print(f"{cfg.new / seconds:.1f} tokens/s with the prompt, cache {stats['cache_bytes'] / 2**20:.1f} MiB")


def heal(cfg: Config, w: cluster.World) -> None:
    """Make the Llama of --model recurrent and train it on --data with a rising depth."""
    preset = "retrofit trains a language model on text. Pass --preset heal, and what differs from it after."
    refuse(cfg.task != "text", preset)
    name = "smollm2" if cfg.model == Config.model else cfg.model
    weights = open_weights(name)
    model, data = retrofit(weights.state_dict(), weights.config, cfg.split), Text(cfg, weights.tokenizer())
    model.cfg.mean_recurrence, model.cfg.mean_backprop_depth = cfg.r_bar, cfg.k
    V, layers = model.cfg.vocab_size, weights.config["num_hidden_layers"]
    refuse(data.vocab > V, f"the tokenizer of {name} has {data.vocab} ids, the model {V}")
    w.print(f"{name}: {cfg.split} of {layers} layers, {count(model) / 1e6:.1f} M parameters")
    train(cfg, w, data, model)


@torch.no_grad()
def inspect(cfg: Config, w: cluster.World) -> None:
    """By iteration: how alike positions are, how much states move, how far s_128 is, how far another start."""
    model, data = open_both(cfg, w)
    ids = data.draw(8, cfg.block)[0].to(w.device)
    *_, (_, end) = unroll(model, ids, 128)
    gap, before, lines = path_independence(model, ids, cfg.num_steps), None, []
    for r, s in unroll(model, ids, max(cfg.num_steps)):
        if r and r in cfg.num_steps:
            far = change(s, end)
            values = correlation(s), change(s, before).mean(), far.mean(), far.max()
            lines.append([str(r), *(x.item() for x in values), gap[r]])
        before = s
    head = ["r", "token correlation", "residual", "|s_r - s_128|, mean", "worst token", "logits, noise - zero"]
    w.print(report.table(head, lines))


class StackingCache(RecurrentCache):
    """What the bench compares with: a list of per-token tensors for each slot, stacked at every call."""

    def __init__(self):
        super().__init__()
        self.tokens = {}  # slot -> keys, values

    def reserve(self, model, B, T, steps):
        """The lengths, and no room for the core."""
        super().reserve(model, B, T, 0)

    def write(self, slot, k, v):
        """All tokens' keys and values of the slot, (B, Hk, S, D) each."""
        held = self.tokens.setdefault(slot, ([], []))
        for tokens, x in zip(held, (k, v), strict=True):
            del tokens[self.length :]
            tokens += x.unbind(dim=2)
        return tuple(torch.stack(tokens, dim=2) for tokens in held)


@torch.no_grad()
def bench(cfg: Config, w: cluster.World) -> None:
    """Decoding one token after T - 1 others: our cache, a stacking one, none; on a GPU Huginn's shape and its floor."""
    device = w.device
    if device.type == "cuda":
        return bench_huginn(cfg, w)
    T, r, wide = 512, 8, {"n_embd": 256, "num_attention_heads": 8, "intermediate_size": 704, "block_size": 1024}
    model = RecurrentDepthLM(RecurrentConfig.preset("tiny", **wide), cfg.seed).eval()
    ids = torch.randint(256, (1, T), generator=cluster.generator(cfg.seed))
    caches = {"one preallocated tensor": RecurrentCache(capacity=T), "tensors stacked at each call": StackingCache()}
    for cache in caches.values():
        model(ids[:, :-1], r, cache=cache)
    decode = lambda cache: (model(ids[:, -1:], r, cache=cache), cache.truncate(T - 1))
    cases = {name: functools.partial(decode, cache) for name, cache in caches.items()}
    seconds = report.timed(cases | {"no cache, prefix recomputed": lambda: model(ids, r)}, device, repeats=15)
    base = seconds["one preallocated tensor"][0]
    w.print(f"{report.device_name(device)}, float32, {count(model)} parameters, T={T}, r={r}, batch 1")
    lines = [[n, f"{t * 1e3:.2f} ± {spread * 1e3:.2f}", f"{t / base:.1f}"] for n, (t, spread) in seconds.items()]
    w.print(report.table(["next token", "ms", "x time"], lines))
    found = {"decode": {n: {"seconds": t, "spread": spread} for n, (t, spread) in seconds.items()}}
    if (Path(cfg.model) / "config.json").exists():
        model, data = open_both(cfg, w)
        rows = data.draw(64, cfg.block)
        rules = {n: make(over="last") for n, make in EXITS.items()}
        rules |= {f"{n}, entropy < 0.1": make(over="last", max_entropy=0.1) for n, make in EXITS.items()}
        deep = by_depth(model, *rows, (32,))[0][32].mean().item()
        w.print(f"\n{cfg.model}: positions leave one by one; all 32 iterations give accuracy {deep:.3f}")
        left = exit_table(w, model, {cfg.block: rows}, rules)[cfg.block]
        found |= {"exits": [[n, *f[:2]] for n, f in left.items()], "accuracy_at_32": deep}
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", found)


def bench_huginn(cfg: Config, w: cluster.World) -> None:
    """Huginn's shape in bf16 with random weights, batch 1, r = 32: one token, replayed as a CUDA graph."""
    device, T, r = w.device, 512, 32
    with torch.device("meta"):
        model = RecurrentDepthLM(RecurrentConfig.preset("huginn-3.5b")).to(torch.bfloat16).eval()
    c, model = model.cfg, model.to_empty(device=device)
    model.freq = c.frequencies().to(device)
    for p in model.parameters():
        p.normal_(std=0.01)
    ids = torch.randint(c.vocab_size, (1, T), generator=cluster.generator(cfg.seed)).to(device)
    s0 = torch.zeros(1, 1, c.n_embd, device=device, dtype=torch.bfloat16)
    core = count(model.transformer.core_block) + count(model.transformer.adapter)
    read = 2 * (count(model) - core + r * core)  # bytes per token; the head reads wte
    bandwidth, lines = report.ceilings(device, torch.bfloat16)[0], []
    for budget in (32, 4, 1):
        cache = RecurrentCache(budget, capacity=T)
        model(ids[:, :-1], r, cache=cache)
        decode = lambda cache: (model(ids[:, -1:], r, s0=s0, cache=cache), cache.truncate(T - 1))
        decode(cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode(cache)
        t, spread = report.timed({"graph": graph.replay}, device, repeats=20)["graph"]
        size, share = cache.bytes() / 2**20, read / bandwidth / t
        lines.append([str(budget), f"{t * 1e3:.1f} ± {spread * 1e3:.1f}", 1 / t, size, share])
    w.print(f"{report.device_name(device)}, bfloat16, T={T}, r={r}, batch 1; copies run at {bandwidth / 1e12:.2f} TB/s")
    w.print(report.table(["KV budget", "ms per token", "tokens/s", "cache MiB", "of the floor"], lines))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"rows": lines, "bandwidth": bandwidth, "bytes_per_token": read})


def main(cfg: Config) -> None:
    modes = dict(zip(MODES, (demo, train, measure, generate_text, heal, inspect, bench), strict=True))
    with cluster.world(cfg.device) as w:
        modes[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
