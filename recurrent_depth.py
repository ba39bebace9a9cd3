"""wip"""

import contextlib
import functools
import importlib
import json
import math
import sys
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

from common import cli, report
from common import dist as cluster
from common.cli import BadInput, opt
from common.text import Tokenizer, corpus
from common.weights import _package, open_weights, rope_frequencies

# ---- the method: how deep
#
# e    the embedded tokens, after the prelude      P, R, C  prelude, core, coda: l_P, l_R, l_C layers
# s_i  the state after i iterations; s_0 is noise  r        iterations;  r_bar  their mean in training
# k    last iterations that carry gradient         n        iterations before them, without
#
#     e = P(x),    s_i = R(e, s_{i-1}) for i = 1..r,    p = C(s_r)                                   (Sec. 3.1)


def sample_steps(step: int, mean: float, k: int, sigma: float = 0.5) -> tuple[int, int]:
    """(n, k) of micro-step `step`: iterations without and with gradient; log-normal Poisson, mean + 1 on average.

    The seed holds the step and no rank: all ranks and rows share one depth, and a resumed run draws it again.
    ValueError: mean < 1 or k < 1. Source: Sec. 3.3; seed and order of the draws from the released code.
    """
    if not mean >= 1 or k < 1:
        raise ValueError(f"the mean recurrence must be >= 1 and k >= 1, got mean {mean} and k {k}")
    g = torch.Generator().manual_seed((514229 + step) % (2**31 - 1))
    rate = torch.zeros(1).log_normal_(math.log(mean) - sigma**2 / 2, sigma, generator=g)  # e^tau, mean r_bar
    p = int(torch.poisson(rate, generator=g)) + 1
    return max(p - k, 0), min(k, p)


def mean_schedule(step: int, total: int, r_max: int, frac: float, shape: str = "linear") -> int:
    """r_bar at `step`: from 1 to r_max over the first `frac` of `total` steps (arXiv:2511.07384)."""
    if shape not in ("linear", "1-sqrt"):
        raise ValueError(f"unknown shape {shape!r}; choose linear or 1-sqrt")
    progress = min(1.0, step / max(1.0, frac * total))
    return max(1, math.ceil(r_max * (progress if shape == "linear" else 1 - math.sqrt(1 - progress))))


# ---- the model


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
        H = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or H
        if self.injection_type != "linear":
            raise ValueError(f"injection_type {self.injection_type!r} is unsupported, only 'linear' (concat adapter)")
        if self.block_class_name not in ("SandwichBlock", "LlamaBlock"):
            raise ValueError(
                f"block_class_name {self.block_class_name!r} is unsupported, only 'SandwichBlock' and 'LlamaBlock'"
            )
        if not self.head_dim and self.n_embd % H:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of num_attention_heads {H}")
        self.head_dim = self.head_dim or self.n_embd // H
        if self.head_dim % 2:
            raise ValueError(f"the head size {self.head_dim} is odd; rotary pairs need an even one")
        if H % self.num_key_value_heads or (self.sandwich and H != self.num_key_value_heads):
            raise ValueError(f"{H} query heads cannot share {self.num_key_value_heads} key/value heads here")
        if self.mean_recurrence < 1 or self.mean_backprop_depth < 1:
            raise ValueError(
                f"mean_recurrence {self.mean_recurrence} and mean_backprop_depth {self.mean_backprop_depth} must be >= 1"
            )
        if self.n_out and self.tie_embeddings:
            raise ValueError(f"n_out {self.n_out} needs tie_embeddings=False")

    @property
    def sandwich(self) -> bool:
        """Huginn's blocks; False for pre-norm blocks taken from a Llama."""
        return self.block_class_name == "SandwichBlock"

    @property
    def depth(self) -> float:
        """L, the unrolled layers at the mean recurrence."""
        return (
            self.n_layers_in_prelude + self.n_layers_in_coda + self.n_layers_in_recurrent_block * self.mean_recurrence
        )

    @classmethod
    def from_dict(cls, given: dict) -> "RecurrentConfig":
        """From the keys of a config.json; keys that we do not know are left out."""
        known = {f.name for f in fields(cls)}
        given = given | {"num_attention_heads": given.get("num_attention_heads", given.get("n_heads", 1))}
        return cls(**{k: v for k, v in given.items() if k in known})

    @classmethod
    def from_json(cls, path: str | Path) -> "RecurrentConfig":
        """From a config.json. FileNotFoundError: there is none; BadInput: it is not JSON."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except json.JSONDecodeError as e:
            raise BadInput(f"{path} is not JSON: {e}") from e

    @classmethod
    def preset(cls, name: str, **changes) -> "RecurrentConfig":
        """tiny (bytes on a laptop), small (the paper's 150 M research shape), huginn-3.5b (the released model)."""
        if name not in SHAPES:
            raise ValueError(f"unknown preset {name!r}; choose {', '.join(SHAPES)}")
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


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (x0, x1), (x2, x3)...: x (B, T, H, D), cos and sin (T, 1, D/2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, D/2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)  # (B, T, H, D)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for Llama's layout, where pair j is (x_j, x_{j + D/2})."""
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)  # (B, T, H, D)


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
        wide = qk if qk.dtype == torch.float64 else qk.float()
        turn = rotate_pairs if self.qk_bias is not None else rotate_halves
        qk = turn(wide, at.cos, at.sin).to(v.dtype)
        q, k = qk.transpose(1, 2).split([self.H, self.Hk], dim=1)  # (B, H, T, D), (B, Hk, T, D)
        v, T = v.transpose(1, 2), x.shape[1]  # (B, Hk, T, D)
        if at.cache is not None:
            k, v = at.cache.write(slot, k, v)  # (B, Hk, S, D)
        y = F.scaled_dot_product_attention(
            q, k, v, at.mask, is_causal=at.mask is None and T > 1, enable_gqa=self.H != self.Hk
        )
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


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor  # (B, T, V), at least float32
    loss: Tensor | None  # 0-d, with labels
    state: Tensor  # s_r (B, T, C), before the final norm
    steps: int | Tensor  # iterations run; with an exit rule (B,), on the CPU
    before: Tensor  # s_{r-1}


class RecurrentDepthLM(nn.Module):
    """A language model whose depth l_P + r l_R + l_C is chosen at each call. Parameter names are the release's."""

    def __init__(self, cfg: RecurrentConfig, seed: int = 0):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        blocks = lambda n: nn.ModuleList(Block(cfg) for _ in range(n))
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(cfg.vocab_size, cfg.n_embd),
            "prelude": blocks(cfg.n_layers_in_prelude),
            "adapter": nn.Linear(2 * cfg.n_embd, cfg.n_embd, bias=False),
            "core_block": blocks(cfg.n_layers_in_recurrent_block),
            "coda": blocks(cfg.n_layers_in_coda),
            "ln_f": RMSNorm(cfg.n_embd, cfg.norm_eps),
        })  # fmt: skip
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.n_embd, cfg.n_out or cfg.vocab_size, bias=False)
        self.register_buffer("freq", self.frequencies(cfg), persistent=False)  # (D/2,) float32
        if not self.transformer.wte.weight.is_meta:
            self._initialise(cluster.generator(seed, 0))

    @staticmethod
    def frequencies(cfg: RecurrentConfig) -> Tensor:
        """Angle per position of each rotary pair, (D/2,) float32."""
        rope = {"head_dim": cfg.head_dim, "rope_theta": cfg.rope_base, "rope_scaling": cfg.rope_scaling or None}
        return rope_frequencies(rope)

    def _initialise(self, g: torch.Generator) -> None:
        """ "takase": truncated normal of std sqrt(2 / 5C), what adds to the residual smaller by sqrt(2L)."""
        std = math.sqrt(2 / (5 * self.cfg.n_embd))
        for name, p in self.named_parameters():
            if p.ndim == 2:
                s = std / math.sqrt(2 * self.cfg.depth) if name.endswith("proj.weight") else std
                nn.init.trunc_normal_(p, std=s, a=-3 * s, b=3 * s, generator=g)

    # the three parts; a caller may run them one by one

    def embed(self, ids: Tensor, at: Place | None = None) -> Tensor:
        """e of ids (B, T): prelude of the scaled embedding, (B, T, C)."""
        at = at or self.place(ids.shape[1])
        e = self.transformer.wte(ids)  # (B, T, C)
        e = e * math.sqrt(self.cfg.n_embd) if self.cfg.sandwich else e
        for j, block in enumerate(self.transformer.prelude):
            e = block(e, at, j)
        return e

    def iterate(self, s: Tensor, e: Tensor, at: Place | None = None, i: int = 0) -> Tensor:
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

    def decode(self, s: Tensor, at: Place | None = None) -> Tensor:
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

    def place(self, T: int, cache: "RecurrentCache | None" = None, positions: Tensor | None = None) -> Place:
        """Tables for T tokens that follow those of the cache, or stand at `positions` (T,)."""
        past = cache.length if cache else 0
        t = torch.arange(past, past + T, device=self.freq.device) if positions is None else positions
        dtype = torch.float64 if self.transformer.wte.weight.dtype == torch.float64 else torch.float32
        angle = torch.outer(t.float(), self.freq)[:, None]  # (T, 1, D/2)
        mask = torch.ones(T, past + T, dtype=torch.bool, device=angle.device).tril(past) if past and T > 1 else None
        return Place(angle.cos().to(dtype), angle.sin().to(dtype), mask, cache)

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
        n, k = self._steps(num_steps, labels)
        self._check(ids, s0, labels, cache, positions)
        B, T = ids.shape
        if cache is not None:
            cache.reserve(self, B, T, n + k)
        at = self.place(T, cache, positions)
        e = self.embed(ids, at)
        s = self.init_state(e) if s0 is None else s0.to(e)
        s, before, steps, logits = self.refine(s, e, n, k, at, exit)
        if logits is None:
            logits = self.decode(s, at)
        if cache is not None:
            cache.seal(steps, T)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return Output(logits, loss, s, steps, before)

    def refine(self, s: Tensor, e: Tensor, n: int, k: int, at: Place, exit: "ExitRule | None" = None):
        """n iterations without and k with gradient -> (s_r, s_{r-1}, iterations, logits if the exit rule made them)."""
        B, grad, before, logits = len(e), torch.is_grad_enabled(), s, None
        if exit is not None:
            exit.start(s)
            active, steps = torch.ones(B, dtype=torch.bool), torch.full((B,), n + k)
        for i in range(n + k):
            before = s
            with torch.set_grad_enabled(grad and i >= n):
                if self.checkpointing and grad and i >= n:  # one checkpoint per iteration: memory does not grow with r
                    s = checkpoint(self.iterate, s, e, at, i, use_reentrant=False)
                else:
                    s = self.iterate(s, e, at, i)
            if exit is None:
                continue
            if not active.all():
                s = torch.where(active.to(s.device)[:, None, None], s, before)  # rows that left keep their state
            logits = None
            if exit.due(i + 1):
                logits = self.decode(s, at) if exit.reads_logits else None
                left = exit.fires(i + 1, s, logits).cpu() & active
                steps[left] = i + 1
                active &= ~left
                if not active.any():
                    break
                if at.cache is not None:
                    at.cache.rows = active.to(s.device) if not active.all() else None
        if at.cache is not None:
            at.cache.rows = None
        return s, before, n + k if exit is None else steps, logits

    def _steps(self, num_steps, labels) -> tuple[int, int]:
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
        if num_steps is None:
            r = self.cfg.mean_recurrence
            return max(r - self.cfg.mean_backprop_depth, 0), min(r, self.cfg.mean_backprop_depth)
        if whole(num_steps):
            return 0, num_steps
        if not isinstance(num_steps, (tuple, list)) or len(num_steps) != 2 or not all(map(whole, num_steps)):
            raise ValueError(f"num_steps must be an int >= 0 or a pair (no_grad, grad), got {num_steps!r}")
        if num_steps[1] == 0 and labels is not None and torch.is_grad_enabled():
            raise ValueError(
                f"at least one iteration must carry gradient, got num_steps={tuple(num_steps)} with labels"
            )
        return tuple(num_steps)

    def _check(self, ids, s0, labels, cache, positions) -> None:
        c, past = self.cfg, cache.length if cache else 0
        if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2:
            raise ValueError(f"ids must be int64 (B, T), got {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() == 0:
            raise ValueError(f"ids are empty: {tuple(ids.shape)}. Give at least one token, such as a start token.")
        if ids.is_cuda:  # without a host synchronisation
            torch._assert_async(((ids >= 0) & (ids < c.vocab_size)).all(), f"an id is outside [0, {c.vocab_size})")
        elif ids.min() < 0 or ids.max() >= c.vocab_size:
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ValueError(f"id {bad} is outside the vocabulary [0, {c.vocab_size})")
        if past + ids.shape[1] > c.block_size:
            raise ValueError(f"{past} cached + {ids.shape[1]} new tokens exceed block_size {c.block_size}")
        want = (*ids.shape, c.n_embd)
        if s0 is not None and (tuple(s0.shape) != want or not s0.is_floating_point()):
            raise ValueError(f"s0 must be floating point of shape {want}, got {s0.dtype} {tuple(s0.shape)}")
        if labels is not None and labels.shape != ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} do not match ids {tuple(ids.shape)}")
        if positions is not None and tuple(positions.shape) != (ids.shape[1],):
            raise ValueError(f"positions must have shape ({ids.shape[1]},), got {tuple(positions.shape)}")


# ---- the method at inference: one cache for all iterations


class RecurrentCache:
    """Keys and values of every (layer, iteration) in one tensor (2, slots, B, Hk, S, D), S grown by doubling.

    Slots: prelude, coda, then the core layers of iteration 0, 1, ...; every token owns its entry in each of them.
    budget  None keeps all iterations; b keeps the last b: iteration i uses entry i mod b (Sec. 8.2 of the paper's
            appendix). Also by the released name "compress-s<n>", n layers. A prompt's logits do not change, those of
            later tokens do, since they see only the last b iterations of the earlier ones.
    lookup  exact: all tokens must have run as deep as the one that reads. latest: of a token that left early the
            deepest entry is read; when it leaves it is copied to the deeper ones, so reading needs no gather.
    ValueError: budget < 1 or not whole iterations, another batch size or model than before, exact tokens too shallow.
    """

    def __init__(self, budget: int | str | None = None, lookup: str = "exact", capacity: int = 0):
        if lookup not in ("exact", "latest"):
            raise ValueError(f"unknown lookup {lookup!r}; choose exact or latest")
        named = isinstance(budget, str) and budget.startswith("compress-s") and budget[10:].isdigit()
        if budget is not None and not named and (isinstance(budget, (bool, str, float)) or budget < 1):
            raise ValueError(f"budget counts whole iterations, at least 1, got {budget!r}")
        self.budget, self.lookup, self.capacity = budget, lookup, capacity
        self.length, self.model, self.store, self.rows = 0, None, None, None

    def reserve(self, model: RecurrentDepthLM, B: int, T: int, steps: int) -> None:
        """Room for T more tokens of B rows that run `steps` iterations."""
        c = model.cfg
        if self.model is None:
            if isinstance(self.budget, str):
                layers = int(self.budget[10:])
                if layers < 1 or layers % c.n_layers_in_recurrent_block:
                    raise ValueError(
                        f"budget counts whole iterations: {self.budget} is not a multiple of "
                        f"{c.n_layers_in_recurrent_block} core layers"
                    )
                self.budget = layers // c.n_layers_in_recurrent_block
            self.model, self.l_R = model, c.n_layers_in_recurrent_block
            self.first, self.held = c.n_layers_in_prelude + c.n_layers_in_coda, 0
            w = model.transformer.wte.weight
            self.store = w.new_empty(2, self.first, B, c.num_key_value_heads, 0, c.head_dim)
            self.depth = torch.zeros(B, 0, dtype=torch.long)  # iterations that each token has run
        if self.model is not model:
            raise ValueError("this cache belongs to a different model. Start a new RecurrentCache.")
        if self.store.shape[2] != B:
            raise ValueError(
                f"this cache holds {self.store.shape[2]} rows, the call has {B}. Start a new RecurrentCache."
            )
        held = max(self.held, steps if self.budget is None else min(steps, self.budget))
        shallow = int(self.depth[:, : self.length].min()) if self.length else steps
        if steps and shallow < (min(steps, self.budget or steps) if self.lookup == "exact" else 1):
            raise ValueError(
                f"a cached token has run {shallow} iterations and this call runs {steps}: lookup='exact' finds no keys. "
                f"Use RecurrentCache(lookup='latest'), and at least 1 iteration."
            )
        S = self.store.shape[4]
        if self.length + T > S:
            S = min(max(2 * S, self.length + T, self.capacity), c.block_size)
        if S > self.store.shape[4] or held > self.held:
            old, n = self.store, self.length
            self.store = old.new_empty(2, self.first + held * self.l_R, B, *old.shape[3:4], S, old.shape[5])
            self.store[:, : old.shape[1], :, :, :n] = old[..., :n, :]
            self.depth = F.pad(self.depth[:, :n], (0, S - n))
            if self.held and held > self.held and n:  # what the tokens before have of deeper iterations: their last
                last = old[:, -self.l_R :, ..., :n, :].repeat(1, held - self.held, 1, 1, 1, 1)
                self.store[:, old.shape[1] :, :, :, :n] = last
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
        if self.lookup == "latest":
            core = self.store[:, self.first :].unflatten(1, (-1, self.l_R)) if self.held else None
            for m in set(steps.tolist()) - {0}:
                if m < self.held:
                    rows = (steps == m).nonzero().flatten().to(core.device)
                    for i in range(m, self.held):
                        core[:, i, :, rows, :, new] = core[:, m - 1, :, rows, :, new]
        self.length += T

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot truncate to {n} tokens, the cache holds {self.length}")
        self.length = n

    def bytes(self) -> int:
        """Memory that the cache holds."""
        return 0 if self.store is None else self.store.numel() * self.store.element_size()


# ---- the method at inference: when to stop


def _entropy(logits: Tensor) -> Tensor:
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

    default, reads_logits, reduce = 0.0, True, "last"

    def __init__(
        self, threshold: float = 0.0, min_steps: int = 1, every: int = 1, max_entropy=math.inf, over: str = ""
    ):
        name, self.threshold = type(self).__name__, threshold or self.default
        if not self.threshold > 0 or threshold != threshold:
            raise ValueError(f"{name}: the threshold must be positive, got {threshold}. Its default is {self.default}.")
        if min_steps < 1 or every < 1 or not max_entropy > 0:
            raise ValueError(
                f"{name}: min_steps {min_steps}, every {every} and max_entropy {max_entropy} must be positive"
            )
        if over not in ("", "last", "mean", "max"):
            raise ValueError(f"{name}: over {over!r} is not last, mean or max")
        self.min_steps, self.every, self.max_entropy = min_steps, every, max_entropy
        self.over, self.reads_logits = over or self.reduce, self.reads_logits or max_entropy < math.inf
        self.start()

    def start(self, s: Tensor | None = None) -> None:
        """Forget the iterates seen so far; s is s_0."""
        self.seen = None

    def due(self, i: int) -> bool:
        """Is iteration i (1, 2, ...) one to look at?"""
        return i % self.every == 0 and i > self.min_steps - 2 * self.every

    def values(self, s: Tensor, logits: Tensor | None) -> Tensor:
        """The rule's value at each position, (B, T), against the iterate that was passed before."""
        raise NotImplementedError

    def stops(self, value: Tensor) -> Tensor:
        """Does a value mean stop?"""
        return value < self.threshold

    def fires(self, i: int, s: Tensor, logits: Tensor | None) -> Tensor:
        """Rows (B,) that stop at iteration i with state s (B, T, C) and logits (B, T, V)."""
        value = self.values(s, logits)  # (B, T)
        sure = torch.ones_like(value, dtype=torch.bool)
        if self.max_entropy < math.inf:
            sure = _entropy(logits) < self.max_entropy
        if self.over == "last":
            stop = self.stops(value[:, -1]) & sure[:, -1]
        elif self.over == "mean":
            stop = self.stops(value.float().mean(dim=1)) & sure.all(dim=1)
        else:
            stop = (self.stops(value) & sure).all(dim=1)
        return stop & (i >= self.min_steps)


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

    default, reads_logits, reduce = 0.03, False, "mean"

    def start(self, s=None):
        """s_0 is the first to compare with."""
        self.seen = s

    def values(self, s, logits):
        """(B, T), relative."""
        before, self.seen = torch.zeros_like(s) if self.seen is None else self.seen, s
        return (s - before).norm(dim=-1) / s.norm(dim=-1)


class EntropyDiffExit(ExitRule):
    """|H(p_i) - H(p_{i-1})| below 1e-3; H_0 = 100."""

    default = 1e-3

    def values(self, s, logits):
        """(B, T), in nats."""
        H = _entropy(logits)
        before, self.seen = torch.full_like(H, 100.0) if self.seen is None else self.seen, H
        return (H - before).abs()


class ArgmaxStableExit(ExitRule):
    """The likeliest token unchanged for 5 checks in a row."""

    default = 5

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


EXITS = {"kl": KLExit, "latent-diff": LatentDiffExit, "entropy-diff": EntropyDiffExit, "argmax": ArgmaxStableExit}


# ---- the method at inference: generation


def _noise(model: RecurrentDepthLM, base: int, first: int, e: Tensor, scale: float) -> Tensor:
    """s_0 for e (B, T, C), the first at position `first`: a function of `base` and position, equal for all rows."""
    draw = lambda t: model.init_state(e[:1, :1], scale, cluster.generator(base, first + t))
    return torch.cat([draw(t) for t in range(e.shape[1])], dim=1).expand(len(e), -1, -1)


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Next token (B,) of logits (B, V): the likeliest (ties to the lowest id), or a draw."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.double() / temperature).softmax(-1).cpu()
    return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)


@torch.no_grad()
def generate(
    model: RecurrentDepthLM, ids: Tensor, max_new_tokens: int, num_steps: int, exit: ExitRule | None = None,
    cache: RecurrentCache | None = None, warm_start: bool = False, draft_steps: int | None = None, lookahead: int = 4,
    temperature: float = 0, generator: torch.Generator | None = None, init_scale: float = 1.0,
    exit_prompt: bool = False, stream=None,
) -> tuple[Tensor, dict]:  # fmt: skip
    """Continue ids (B, T) by max_new_tokens -> (ids (B, T + new), stats).

    num_steps    iterations of a token, or with an exit rule at most; the prompt runs all of them unless exit_prompt.
    cache        a RecurrentCache, by default one with all iterations, lookup "latest" if there is an exit rule. One that
                 holds the first tokens of ids already is continued.
    warm_start   s_0 of a new token is what the coda received for the token before, instead of noise (Sec. 6.3).
    draft_steps  self-speculation: `lookahead` tokens are drafted with so few iterations and checked by one pass with
                 num_steps; what that pass would have said is kept, so the output is that of plain greedy decoding.
    temperature  0 is greedy. generator: of the draws and of s_0, which depends on it and the position alone, so that
                 equal calls agree. init_scale: factor on s_0, 0 is the zero state. stream: called with each new (B,).
    stats: iterations (a list, one int per new token, the first from the prompt; a list per row when B > 1), accepted
    (drafts kept per check), cache_bytes. ValueError: settings that would change what is promised, see the message.
    """
    B, T = ids.shape
    if max_new_tokens < 0 or T + max_new_tokens > model.cfg.block_size:
        raise ValueError(f"{T} tokens and {max_new_tokens} new ones exceed block_size {model.cfg.block_size}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if draft_steps is not None:
        if exit or warm_start or temperature or B > 1 or lookahead < 1 or draft_steps < 1:
            raise ValueError(
                "draft_steps >= 1 needs greedy decoding of one row with fixed iterations and lookahead >= 1: "
                "no exit rule, warm_start, temperature or batch"
            )
        if cache is not None and (cache.budget is not None or cache.lookup != "exact"):
            raise ValueError("draft_steps needs a cache with all iterations: a shared one would change the output")
    cache = cache or RecurrentCache(lookup="latest" if exit else "exact")
    if cache.length >= T:
        raise ValueError(f"the cache holds {cache.length} tokens, ids has {T}: at least the last must be new")
    cache.capacity = max(cache.capacity, T + max_new_tokens)
    base = int(torch.randint(2**62, (), generator=generator)) if generator else 0
    out, ran, accepted = ids, [], []

    def run(new: Tensor, steps: int, s0: Tensor | None = None, rule: ExitRule | None = None) -> Output:
        e = model.transformer.wte(new)  # for its shape
        s0 = _noise(model, base, cache.length, e, init_scale) if s0 is None else s0
        return model(new, steps, s0=s0, cache=cache, exit=rule)

    def emit(token: Tensor, steps) -> None:
        nonlocal out
        out = torch.cat([out, token[:, None]], dim=1)  # (B, T + 1)
        ran.append(steps if isinstance(steps, int) else steps.tolist())
        if stream:
            stream(token)

    if max_new_tokens:
        y = run(ids[:, cache.length :], num_steps, rule=exit if exit_prompt else None)
        emit(_pick(y.logits[:, -1], temperature, generator), y.steps)
    while out.shape[1] < T + max_new_tokens:
        last, left = out[:, -1:], T + max_new_tokens - out.shape[1]
        if draft_steps is None:
            y = run(last, num_steps, model.between(y.state[:, -1:]) if warm_start else None, exit)
            emit(_pick(y.logits[:, -1], temperature, generator), y.steps)
            continue
        n, drafts = cache.length, [last]
        for _ in range(min(lookahead, left - 1)):
            drafts.append(run(drafts[-1], draft_steps).logits[:, -1].argmax(-1)[:, None])
        cache.truncate(n)  # shallow keys are not kept
        drafts = torch.cat(drafts, dim=1)  # (1, 1 + drafts)
        said = run(drafts, num_steps).logits.argmax(-1)  # (1, 1 + drafts): what each token should be followed by
        good = int((said[:, :-1] == drafts[:, 1:]).int().cumprod(dim=1).sum())
        cache.truncate(n + 1 + good)
        accepted.append(good)
        for j in range(good + 1):
            emit(said[:, j], num_steps)
    rows = [[r] * B if isinstance(r, int) else r for r in ran]  # new tokens x B
    ran = [r[0] for r in rows] if B == 1 else [list(row) for row in zip(*rows, strict=True)]
    return out, {"iterations": ran, "accepted": accepted, "cache_bytes": cache.bytes()}


@torch.no_grad()
def diffusion_forcing(
    model: RecurrentDepthLM, ids: Tensor, max_new_tokens: int, inner: int = 4, threshold: float = 0.03,
    noise: float = 0.5, momentum: float = 0.1, wave: int = 128, max_calls: int = 10_000, init_scale: float = 1.0,
) -> tuple[Tensor, dict]:  # fmt: skip
    """Refine a wave of positions together instead of one after the other: ids (1, T) -> (ids (1, T + new), stats).

    Each call runs `inner` iterations on all positions that are not frozen yet, rewrites the draft tokens after them
    and appends one more. States are mixed with noise / (1 + age) of fresh noise, e with `momentum` of the old e. A
    position freezes, with all before it, when its state changes by less than `threshold` relative to the call before.
    Frozen positions stay in the cache with the keys of their last `inner` iterations. stats: calls, iterations, wave
    (the mean number of positions refined), unfrozen (given up at max_calls). ValueError: as generate; B > 1.
    Source: arXiv:2510.14961.
    """
    B, T = ids.shape
    if B != 1 or T + max_new_tokens > model.cfg.block_size or min(inner, wave, max_calls) < 1:
        raise ValueError(f"one row and at most {model.cfg.block_size} tokens, got {B} rows, {T} + {max_new_tokens}")
    cache, goal, calls, widths = RecurrentCache(inner, capacity=T + max_new_tokens), T + max_new_tokens, 0, []
    out, done = ids, 0  # done: frozen positions
    s = e_old = None  # states and embeddings of the wave, (1, w, C)
    age = torch.zeros(0)
    while out.shape[1] < goal + 1 and calls < max_calls and done < goal - 1:
        new = out[:, done : min(goal - 1, done + max(wave, T - done))]  # (1, w): the prompt, then the wave
        w = new.shape[1]
        cache.truncate(done)
        cache.reserve(model, 1, w, inner)
        at = model.place(w, cache)
        e = model.embed(new, at)  # (1, w, C)
        fresh = _noise(model, calls, done, e, init_scale)
        if s is None:
            s, e_old = fresh[:, :0], e[:, :0]
        known = s.shape[1]
        share = (noise / (1 + age))[:, None].to(e)  # (known, 1)
        e[:, :known] = (1 - momentum) * e[:, :known] + momentum * e_old
        start = torch.cat([(1 - share) * s + share * fresh[:, :known], fresh[:, known:]], dim=1)  # (1, w, C)
        s_new, _, _, _ = model.refine(start, e, 0, inner, at)
        said = model.decode(s_new, at).argmax(-1)  # (1, w): the token after each position
        cache.seal(inner, w)
        change = torch.full((w,), math.inf)
        change[:known] = ((s_new[:, :known] - s).norm(dim=-1) / s_new[:, :known].norm(dim=-1))[0].cpu()
        frozen = int((change < threshold).int().cumprod(0).sum())
        keep = max(T - done - 1, 0)  # the prompt's own tokens are not rewritten
        out = torch.cat([out[:, : done + keep + 1], said[:, keep:]], dim=1)[:, :goal]
        s, e_old, age = s_new[:, frozen:], e[:, frozen:], torch.cat([age + 1, torch.ones(w - known)])[frozen:]
        done, calls = done + frozen, calls + 1
        widths.append(w)
    mean = sum(widths) / max(1, len(widths))
    return out, {"calls": calls, "iterations": calls * inner, "wave": mean, "unfrozen": goal - 1 - done}


# ---- weights: the released layout, and a Llama made recurrent


def _safetensors():
    _package("safetensors")
    return importlib.import_module("safetensors.torch")


def load_weights(path: str | Path) -> RecurrentDepthLM:
    """A model from a folder with config.json and model.safetensors or its index, or from one file in such a folder.

    lm_head.weight (a copy of the embedding when tied) and freqs_cis (recomputed) may be there or not. FileNotFoundError:
    no such files. BadInput: damaged; ValueError: tensors missing, extra or of another shape, all of them named.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json. Give the folder that `train` or save_weights wrote.")
    if path.is_dir() and not index.exists() and not single.exists():
        raise FileNotFoundError(f"{folder} has no model.safetensors and no model.safetensors.index.json.")
    files = [single if path.is_dir() else path]
    if path.name == index.name or (path.is_dir() and index.exists()):
        files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    cfg, found, st = RecurrentConfig.from_json(folder / "config.json"), {}, _safetensors()
    for file in files:
        try:
            found |= st.load_file(file)
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{file} is missing, though the index names it.") from e
        except Exception as e:  # safetensors has its own
            raise BadInput(f"{file} is incomplete or damaged ({e}). Copy or download it again.") from e
    found.pop("freqs_cis", None)
    if cfg.tie_embeddings:
        found.pop("lm_head.weight", None)
    with torch.device("meta"):
        model = RecurrentDepthLM(cfg)
    want = model.state_dict()
    wrong = [f"missing {n} {tuple(want[n].shape)}" for n in want if n not in found]
    wrong += [f"extra {n} {tuple(found[n].shape)}" for n in found if n not in want]
    wrong += [
        f"{n} is {tuple(found[n].shape)}, needs {tuple(want[n].shape)}"
        for n in want
        if n in found and found[n].shape != want[n].shape
    ]
    if wrong:
        raise ValueError(f"{folder} does not fit its config.json: " + "; ".join(wrong))
    model.load_state_dict(found, assign=True)
    model.freq = RecurrentDepthLM.frequencies(cfg)
    return model.requires_grad_().eval()


def save_weights(model: RecurrentDepthLM, folder: str | Path) -> None:
    """Write config.json and model.safetensors under the released names, each to a temporary name that is then renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().contiguous().cpu() for n, p in model.state_dict().items()}
    _safetensors().save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").replace(folder / "model.safetensors")
    huginn = {"model_type": "huginn_raven", "state_init": "like-init", "qk_bias": model.cfg.sandwich, "bias": False}
    report.write_json(folder / "config.json", huginn | asdict(model.cfg))


def retrofit(state_dict: dict[str, Tensor], llama_config: dict, split=(4, 8, 4), seed: int = 0) -> RecurrentDepthLM:
    """Make a pretrained Llama recurrent: Hugging Face names and config -> a model with LlamaBlocks (arXiv:2511.07384).

    split (p, R, c): the first p layers become the prelude, the last c the coda, the R before those the core; layers
    between prelude and core are dropped. Only the adapter is new. ValueError: the split exceeds the layers, a tensor
    is missing or has another shape.
    """
    p, R, c = split
    n, heads = llama_config["num_hidden_layers"], llama_config["num_attention_heads"]
    if min(split) < 1 or sum(split) > n:
        raise ValueError(f"split {tuple(split)} needs {sum(split)} layers, each part at least 1; the model has {n}")
    cfg = RecurrentConfig(
        n_embd=llama_config["hidden_size"], num_attention_heads=heads,
        num_key_value_heads=llama_config.get("num_key_value_heads", heads),
        head_dim=llama_config.get("head_dim") or 0, intermediate_size=llama_config["intermediate_size"],
        n_layers_in_prelude=p, n_layers_in_recurrent_block=R, n_layers_in_coda=c, mean_recurrence=4,
        mean_backprop_depth=8, vocab_size=llama_config["vocab_size"],
        block_size=llama_config.get("max_position_embeddings", 2048), norm_eps=llama_config["rms_norm_eps"],
        rope_base=llama_config.get("rope_theta", 1e4), rope_scaling=llama_config.get("rope_scaling") or {},
        tie_embeddings=False, block_class_name="LlamaBlock",
    )  # fmt: skip
    embedding = state_dict["model.embed_tokens.weight"]
    new = {
        "transformer.wte.weight": embedding.clone(),
        "transformer.ln_f.weight": state_dict["model.norm.weight"].clone(),
        "lm_head.weight": state_dict.get("lm_head.weight", embedding).clone(),  # untied from here on
    }
    places = [("prelude", j, j) for j in range(p)] + [("core_block", j, n - c - R + j) for j in range(R)]
    for part, j, i in places + [("coda", j, n - c + j) for j in range(c)]:
        old = lambda name, i=i: state_dict[f"model.layers.{i}.{name}.weight"]
        for ours, parts in {
            "norm_1": ["input_layernorm"], "norm_2": ["post_attention_layernorm"], "mlp.proj": ["mlp.down_proj"],
            "attn.Wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.proj": ["self_attn.o_proj"], "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"],
        }.items():  # fmt: skip
            new[f"transformer.{part}.{j}.{ours}.weight"] = torch.cat([old(name) for name in parts])  # along rows
    g, bound = cluster.generator(seed, 1), 1 / math.sqrt(2 * cfg.n_embd)
    new["transformer.adapter.weight"] = torch.empty(cfg.n_embd, 2 * cfg.n_embd).uniform_(-bound, bound, generator=g)
    with torch.device("meta"):
        model = RecurrentDepthLM(cfg)
    model.load_state_dict(new, assign=True)
    model.freq = RecurrentDepthLM.frequencies(cfg)
    return model.requires_grad_()


# ---- the optimizer


class AtanAdam(torch.optim.Optimizer):
    """The paper's Adam: moments that start at the first gradient, update clipping, atan2 in place of epsilon (App. B).

    m, v start as g, g^2, then follow the usual moving averages with the usual bias correction. Per tensor,
    rho = sqrt(mean(g^2 / max(v, 1e-12))) and
        p <- p (1 - lr / lr_0 wd) - lr / max(1, rho) / (1 - b1^t) atan2(m, sqrt(v / (1 - b2^t)))
    with lr_0 the rate given here, so that decay follows a schedule but not its size. The released code floors v in
    place, and so an epsilon of 1e-6 sneaks back in; we floor a copy. ValueError: a rate or decay below 0, a beta not in
    [0, 1).
    """

    def __init__(self, params: Iterable, lr: float = 4e-5, betas=(0.9, 0.95), weight_decay: float = 4e-5):
        if lr < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"lr {lr} and weight_decay {weight_decay} must be >= 0, betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "base_lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
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
