"""Top-k attention: decode over a long context by attending only to the best keys of a cache in host memory.

Paper    Synk et al., "Exploiting Sparsity for Long Context Inference: Million Token Contexts on Commodity GPUs",
         arXiv:2502.06766. Facts about its released code are marked so.
Idea     Attention is concentrated: of N keys few matter to a query. Keep all keys and values where memory is cheap,
         find for each new query the k keys with the largest inner product, and attend to these and, densely, to the
         tokens generated so far, under one softmax. Nothing is evicted: every query chooses anew.
Here     The claim we check: 2 % of the keys keep 95 % of dense accuracy, on a model trained here to retrieve, and on a
         real pretrained one. Exact search is exact; for the approximate indexes recall is measured. Beside it: a
         cache that is saved and opened by memory map, a sequence cut over processes, RULER-style tasks.
Differs  Scores stay in fp32 and the joint maximum is subtracted (released code: bf16, no maximum: it overflows).
         Exact search by block maxima or radix select, or by an 8-bit scan that proves its choice; a 4-bit scan,
         re-ranked exactly, for a library of float32 indexes; k-means lists as there, HNSW left out. Batches of unequal
         lengths. The last layer of the prefill is not computed. Ours alone: share="group", sinks, recent windows,
         flushing, sharding, row reuse.
         Models: a 0.1 M parameter Llama without MLP trained on needles, and SmolLM2-135M, for Llama-3 8B; at most 8192
         tokens here, for a million. The tasks follow RULER in our own words.

    python topk_attention.py                                            # laptop: the tables, the claim, the picture
    torchrun --nproc-per-node 2 topk_attention.py --device cpu          # the same on two processes
    python topk_attention.py eval --model smollm2 --tasks niah_single --context 2048 --samples 10   # a real model
    python topk_attention.py generate --model smollm2 --prompt-file FILE --prompt "QUESTION" --save-context DIR
    python topk_attention.py generate --model smollm2 --load-context DIR --prompt "ANOTHER QUESTION" --k 0.01
    torchrun --nproc-per-node 8 topk_attention.py generate --model DIR --prompt-file FILE    # sequence cut over ranks
    python topk_attention.py analyze --model smollm2                    # entropy and mass, layer by layer
    python topk_attention.py bench                                      # against dense SDPA and a search per head
    python topk_attention.py bench --preset h200 --kv cuda              # a million tokens on one GPU (not yet run)

Expect   "k = 2 %" within 95 % of dense at 512, 2048 and 8192 tokens, the control at most 0.12; on CPU with seed 0.
Writes   results/topk_attention/: metrics.jsonl, claim.json, topk_attention.png; checkpoint.pt (train), bench.json.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import operator
import os
import random
import re
import shutil
import sys
import time
import uuid
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from common import cli, report
from common import dist as cluster
from common.cli import BadInput, opt
from common.kernels import decode_attention as kernels
from common.text import corpus
from common.weights import INSTALL, INSTALL_SMOLLM2, find_weights, open_weights, rotate

SHARES = ("head", "group")
BACKENDS = ("auto", "torch", "triton")
INDEXES = ("exact", "q8", "q4", "sign", "ivf")


EVAL_FIXED = ("model", "context", "seed", "share", "sink", "recent", "index", "candidates", "kv_dtype", "dtype")


@dataclass
class Config:
    mode: str = opt(
        "demo", "what to do", choices=("demo", "train", "eval", "generate", "analyze", "bench"), positional=True
    )
    preset: str = opt("laptop", "defaults for a setting; flags win over it", choices=("laptop", "h200", "h200-8b"))
    model: str = opt("toy", "toy (trained here), smollm2, a Hugging Face folder, or a GGUF file")
    # the method
    k: str = opt("0.02", "keys per query: a count, a fraction with a point in it, dense, or one per layer with commas")
    share: str = opt("head", "each query head chooses its keys, or a group's heads together", choices=SHARES)
    sink: int = opt(0, "generate, eval: first rows of the prefix that are always attended, beside the k")
    recent: int = opt(0, "generate, eval: last rows of the prefix that are always attended, beside the k")
    slope: float = opt(0.0, "generate: let k grow linearly over the layers, by up to this part of its mean")
    index: str = opt("exact", "what finds the keys", choices=INDEXES)
    candidates: int = opt(2, "times k rows that an approximate index names, to be scored exactly")
    max_suffix: int = opt(0, "generate: rows after which new tokens move to the store; 0 keeps them dense (the paper)")
    # the cache
    kv: str = opt("cpu", "where keys and values live", choices=("cpu", "cuda"))
    kv_dtype: str = opt("bf16", "what they are stored in", choices=("fp32", "bf16", "fp8"))
    max_gpu_gb: float = opt(0.0, "refuse a context that needs more GPU memory; 0 is no limit")
    chunk: int = opt(8192, "prefill: tokens at a time")
    mlp_splits: int = opt(0, "prefill: pieces of the unrolled MLP; 0 is one")
    allow_extrapolation: bool = opt(False, "go past the model's range of positions")
    # generate
    prompt: str = opt("", "generate: the text to answer, or the name of its file; the question, if there is a document")
    prompt_file: str = opt("", "generate, analyze: a text file as prompt, or as document for --prompt")
    new_tokens: int = opt(64, "generate: tokens at most; bench: tokens timed on a GPU")
    save_context: str = opt("", "generate: folder to save the document's keys and values in")
    load_context: str = opt("", "generate: folder of a saved document; --prompt is asked about it")
    # demo, eval, analyze, bench
    ks: tuple = opt(("1", "8", "0.005", "0.01", "0.02"), "demo, eval: budgets compared with dense")
    contexts: tuple = opt((512, 2048, 8192), "demo: context lengths")
    real: bool = opt(True, "demo: also the real model, where it is installed")
    tasks: tuple = opt(("niah_single",), "eval: tasks; the toy's are single, multivalue, counting")
    context: int = opt(2048, "eval, analyze: tokens of a prompt; bench: keys")
    samples: int = opt(10, "eval: prompts per task")
    shape: str = opt("laptop", "bench: heads and widths", choices=("laptop", "llama-3.2-1b", "llama-3.1-8b"))
    # training and files
    steps: tuple = opt((600, 120), "steps of the toy on rows of 64 tokens, then of 1024")
    seed: int = opt(0, "seed of the weights, the rows and the prompts")
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "of a real model", choices=("float32", "bfloat16", "float64"))
    out: str = opt("results/topk_attention", "folder of what the run writes")
    resume: bool = opt(False, "train, eval: go on after a stop")

    def __post_init__(self):
        for word in (self.k, *self.ks):
            parse_k(word)
        for name in ("candidates", "chunk", "new_tokens", "context", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if min(self.sink, self.recent) < 0:
            raise ValueError(f"--sink and --recent must not be negative, got {self.sink} and {self.recent}")
        if not 0 <= self.slope < 1:
            raise ValueError(f"--slope must be in [0, 1), got {self.slope}")
        if len(self.steps) != 2 or min(self.steps) < 0 or sum(self.steps) < 1:
            raise ValueError(f"--steps are two counts, such as 600 120, got {self.steps}")
        if min(self.contexts) < 64:
            raise ValueError(f"--contexts must be at least 64 tokens, got {self.contexts}")
        if self.mode == "bench" and self.context == 2048:
            self.context, self.k = 65536, "0.01" if self.k == "0.02" else self.k


PRESETS = {
    "laptop": {},
    "h200": {"mode": "bench", "shape": "llama-3.2-1b", "context": 2**20, "k": "0.01", "new_tokens": 32},
    "h200-8b": {"mode": "bench", "shape": "llama-3.1-8b", "context": 2**19, "k": "0.01", "new_tokens": 32},
}  # fmt: skip


# ---- the method: choose k rows per query, attend to them and to the suffix under one denominator
#
# N prefix rows, retrieved from          M suffix rows, always attended        T queries, the last T rows of the suffix
# Hq query heads, Hk key/value heads     G = Hq / Hk query heads share one     D head width
#
# o_h = softmax([q_h K_I^T, q_h K_suffix^T] / sqrt(D)) [V_I; V_suffix],   I = the k rows with the largest q_h K^T
#
# Inside, the queries of one key/value head are R = G T rows: q (Hk, R, D), scores (Hk, R, N).


def resolve_k(k, n: int) -> int:
    """Rows that k means over n: an int is a count, a float in (0, 1] a fraction. ValueError: anything else."""
    whole = hasattr(k, "__index__") and not isinstance(k, bool) and operator.index(k) >= 1
    if not whole and not (isinstance(k, float) and 0 < k <= 1):
        raise ValueError(f"k must be an int >= 1 or a fraction in (0, 1], got {k!r}")
    if whole and k > n > 0:
        _warn_once(f"k = {k} exceeds the {n} rows there are: this is dense attention")
    return min(n, operator.index(k) if whole else max(1, math.ceil(k * n - 1e-9)))


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def exact_topk(scores: Tensor, k: int, method: str = "blocks") -> tuple[Tensor, Tensor]:
    """The k largest of the last dimension, in any order: scores (..., N) -> values, indices int64, both (..., k).

    blocks: a row of the k largest lies in one of the k blocks with the largest maxima, so two short selections do for
    one long one. radix: what the GPU kernels do, float32 only; the lowest index wins a tie, indices ascend.
    ValueError: k is not in 1..N, or another method.
    """
    n = scores.shape[-1]
    if isinstance(k, bool) or not 0 <= k <= n:
        raise ValueError(f"k must be between 0 and the {n} scores, got {k!r}")
    if method == "radix":
        return radix_topk(scores, k)
    if method != "blocks":
        raise ValueError(f"unknown method {method!r}; choose blocks or radix")
    size = 1 << max(0, round(math.log2(max(1, n / max(1, k))) / 2))  # rows per block, about sqrt(N / k)
    count = n // size
    if size < 4 or n < 4096 or k == 0:
        return scores.topk(k, dim=-1, sorted=False)
    blocks = scores[..., : count * size].unflatten(-1, (size, count))  # block c holds rows c, c + count, ...
    if scores.ndim > 1 and scores.stride(-2) == 1:  # reduce along memory
        highest = blocks.movedim(-3, -1).amax(dim=-3).mT.contiguous()
    else:
        highest = blocks.amax(dim=-2)
    best = highest.topk(k, dim=-1, sorted=False).indices  # (..., k) of count >= k blocks
    rows = best[..., None, :] + count * torch.arange(size, device=scores.device)[:, None]  # (..., size, k)
    rest = torch.arange(count * size, n, device=scores.device).expand(*scores.shape[:-1], -1)
    rows = torch.cat([rows.flatten(-2), rest], dim=-1)  # (..., size k + n % size)
    values, at = scores.gather(-1, rows).topk(k, dim=-1, sorted=False)
    return values, rows.gather(-1, at)


def ordered_key(scores: Tensor) -> Tensor:
    """float32 -> int64 in 0..2^32 - 1 with the same order; -0 and +0 are equal, NaN lies above +inf."""
    bits = (scores + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 2**31, 0xFFFFFFFF - bits, bits + 2**31)


def radix_threshold(key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of key (..., N): the k-th largest (..., 1), and how many rows equal to it belong to the k largest (..., 1).

    Three passes, each a histogram of the next bits among the rows that share the bits found so far.
    """
    need = torch.full_like(key[..., :1], k)
    prefix = torch.zeros_like(need)
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        alive = (key >> (shift + width)) == prefix
        bins = (key >> shift) & ((1 << width) - 1)
        count = torch.zeros(*key.shape[:-1], 1 << width, dtype=torch.long, device=key.device)
        count = count.scatter_add(-1, bins, alive.long())
        above = count.flip(-1).cumsum(-1).flip(-1) - count  # rows in higher bins
        pivot = ((above < need) & (need <= above + count)).int().argmax(dim=-1, keepdim=True)  # (..., 1)
        need, prefix = need - above.gather(-1, pivot), (prefix << width) | pivot
    return prefix, need


def radix_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """exact_topk by radix select. scores (..., N) float32. ValueError: another dtype."""
    if scores.dtype != torch.float32:
        raise ValueError(f"radix select reads the bits of float32, got {scores.dtype}. Use method='blocks'.")
    key = ordered_key(scores)
    threshold, need = radix_threshold(key, k)
    tie = key == threshold
    chosen = (key > threshold) | (tie & (tie.cumsum(-1) <= need))
    index = torch.arange(key.shape[-1], device=key.device).expand_as(key)[chosen].reshape(*key.shape[:-1], k)
    return scores.gather(-1, index), index


def _precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _scores(q: Tensor, k: Tensor, check: str = "") -> Tensor:
    """q (Hk, R, D) . k (Hk, n, D) -> raw scores (Hk, R, n), a transposed view, in fp32 (fp64 for fp64).

    Each key is read once for all rows of its head. Keys below fp32 are widened a block at a time, never as a whole.
    `check`: words for what is being read; ValueError if q or k holds NaN or infinity. Left out on a GPU, where looking
    would stall the stream.
    """
    acc, n = _precision(q, k), k.shape[1]
    q = q.to(acc)
    if k.dtype == acc:
        s = torch.bmm(k, q.transpose(1, 2))  # (Hk, n, R)
    else:
        s = torch.empty(len(k), n, q.shape[1], dtype=acc, device=k.device)
        step = 4096 if k.device.type == "cpu" else 65536
        for a in range(0, n, step):
            torch.bmm(k[:, a : a + step].to(acc), q.transpose(1, 2), out=s[:, a : a + step])
    if check:
        _check_finite(s, q, k, check)
    return s.transpose(1, 2)


def _check_finite(s: Tensor, q: Tensor, k: Tensor, where: str) -> None:
    """ValueError: q or k, of which s are scores, holds NaN or infinity; a finite sum clears both."""
    if not s.is_cuda and not math.isfinite(s.sum()):
        for name, x in (("q", q), ("K", k)):
            if not all(torch.isfinite(part.float()).all() for part in x.split(65536, dim=1)):
                raise ValueError(f"{name} of {where} holds NaN or infinity. Look for what wrote it there.")


def _part(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over one set of rows: scaled s (Hk, R, n), v (Hk, n, D) or per row (Hk, R, n, D).

    Returns the output (Hk, R, D) and the log-sum-exp (Hk, R); 0 and -inf where there are no rows.
    """
    if s.shape[-1] == 0:
        return s.new_zeros(*s.shape[:2], v.shape[-1]), s.new_full(s.shape[:2], -math.inf)
    l = s.logsumexp(dim=-1)
    p = (s - l.clamp(min=torch.finfo(s.dtype).min)[..., None]).exp()
    if v.ndim == 3:
        return torch.bmm(p, v.to(s.dtype)), l
    return torch.matmul(p[:, :, None], v.to(s.dtype))[:, :, 0], l


def merge_lse(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint key sets: outputs (..., D), log-sum-exps (...). An empty set has l = -inf."""
    l = torch.logaddexp(l1, l2)
    base = torch.where(l == -math.inf, torch.zeros_like(l), l)
    return (l1 - base).exp()[..., None] * o1 + (l2 - base).exp()[..., None] * o2, l


def _suffix_part(q: Tensor, k: Tensor, v: Tensor, scale: float, T: int, check: str = "") -> tuple[Tensor, Tensor]:
    """Causal attention of the last T of M rows to all M: q (Hk, G T, D), k, v (Hk, M, D) -> o (Hk, R, D), l (Hk, R)."""
    s, M = _scores(q, k, check) * scale, k.shape[1]  # (Hk, R, M)
    if T > 1 and M:
        hidden = torch.ones(T, M, dtype=torch.bool, device=q.device).triu(M - T + 1)  # query i sees rows 0..M-T+i
        s = s.unflatten(1, (-1, T)).masked_fill(hidden, -math.inf).flatten(1, 2)
    return _part(s, v)


def _group_mass(s: Tensor, scale: float, T: int) -> Tensor:
    """Softmax probability over all rows, summed over a group's heads: s (Hk, G T, n) -> (Hk, T, n)."""
    return (s * scale).softmax(dim=-1).unflatten(1, (-1, T)).sum(dim=1)


def _choose(s: Tensor, top: int, scale: float, T: int, share: str, sink: int, recent: int) -> tuple[Tensor, Tensor]:
    """From raw scores (Hk, R, N) the scores and indices, (Hk, R, n), of `top` rows and the forced ones."""
    R, N, lo, hi = s.shape[1], s.shape[2], sink, s.shape[2] - recent
    if lo + top >= hi:  # everything
        return s, torch.arange(N, device=s.device).expand_as(s)
    if share == "group":
        index = exact_topk(_group_mass(s, scale, T)[..., lo:hi], top)[1]  # (Hk, T, top)
        index = index.repeat(1, R // T, 1)  # row g T + t reads the choice of t
        value = s[..., lo:hi].gather(-1, index)
    else:
        value, index = exact_topk(s[..., lo:hi], top)
    if sink or recent:
        ends = torch.cat([torch.arange(lo, device=s.device), torch.arange(hi, N, device=s.device)])
        value = torch.cat([value, s[..., ends]], dim=-1)
        index = torch.cat([index + lo, ends.expand(*s.shape[:2], -1)], dim=-1)
    return value, index


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (Hk, N, D) at index (Hk, R, n) -> (Hk, R, n, D), one pass per head; no other row is touched."""
    raw = x.view(torch.uint8) if x.element_size() == 1 else x  # fp8 has no index_select
    out = torch.empty(*index.shape, x.shape[-1], dtype=raw.dtype, device=x.device)
    for h in range(len(x)):
        torch.index_select(raw[h], 0, index[h].flatten(), out=out[h].view(-1, x.shape[-1]))
    return out.view(x.dtype)


SCRATCH = 2**28  # bytes that scores and gathered rows of one round of queries may take


def _attend_one(q, k, v, top, ks, vs, scale, sink, recent, share, check, want_index):
    """topk_attention of one sequence: q (Hq, T, D), k, v (Hk, N, D), suffix (Hk, M, D) -> o, l, index or None."""
    (Hq, T, D), (Hk, N), out = q.shape, k.shape[:2], []
    M, n = ks.shape[1], min(N, top + sink + recent)
    per_query = Hq * 4 * (N + (n * D if n < N else 0))
    step = max(1, SCRATCH // max(1, per_query))
    for a in range(0, T, step):
        e = min(T, a + step)
        rows = q[:, a:e].reshape(Hk, -1, D)  # (Hk, R, D)
        s = _scores(rows, k, check)
        if n == N:
            o, l = _part(s * scale, v)
            index = torch.arange(N, device=q.device).expand_as(s)
        else:
            value, index = _choose(s, top, scale, e - a, share, sink, recent)
            o, l = _part(value * scale, _rows(v, index))
        seen = M - T + e  # suffix rows that the last of these queries sees
        part = _suffix_part(rows, ks[:, :seen], vs[:, :seen], scale, e - a, check and check + ", suffix")
        o, l = merge_lse(o, l, *part)
        back = lambda x, e=e, a=a: x.reshape(Hq, e - a, *x.shape[2:])
        out.append((back(o), back(l), back(index) if want_index else None))
    o, l, index = zip(*out, strict=True)
    return torch.cat(o, 1), torch.cat(l, 1), torch.cat(index, 1) if want_index else None


def _check_heads(q: Tensor, k: Tensor, v: Tensor, k_suffix, v_suffix) -> None:
    """ValueError: what topk_attention cannot join, with both shapes."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q (B, Hq, T, D), k and v (B, Hk, N, D) needed, got {tuple(q.shape)}, {tuple(k.shape)}, "
                         f"{tuple(v.shape)}")  # fmt: skip
    if (k_suffix is None) != (v_suffix is None):
        raise ValueError("k_suffix and v_suffix: give both, or neither")
    for name, x in {"k": k, "v": v, "k_suffix": k_suffix, "v_suffix": v_suffix}.items():
        if x is None:
            continue
        if x.ndim != 4 or x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3] or x.shape[1] != k.shape[1]:
            raise ValueError(f"{name} {tuple(x.shape)} does not fit q {tuple(q.shape)} and k {tuple(k.shape)}")
        if q.shape[1] % x.shape[1]:
            raise ValueError(f"{q.shape[1]} query heads do not divide over {x.shape[1]} key/value heads: "
                             f"q {tuple(q.shape)}, {name} {tuple(x.shape)}")  # fmt: skip
        if x.device != q.device or x.dtype != q.dtype:
            raise ValueError(f"{name} {tuple(x.shape)} is {x.dtype} on {x.device}, q {tuple(q.shape)} is {q.dtype} "
                             f"on {q.device}. Convert one of them.")  # fmt: skip
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(f"{name} {tuple(x.shape)} has stride {x.stride(-1)} in its last dimension; 1 is needed, "
                             f"as a copy of the cache would not be cheap. Lay it out as (..., N, D).")  # fmt: skip
    if k_suffix is not None and (k_suffix.shape != v_suffix.shape or 0 < k_suffix.shape[2] < q.shape[2]):
        raise ValueError(f"the suffix holds the queries' own rows: k_suffix {tuple(k_suffix.shape)}, "
                         f"v_suffix {tuple(v_suffix.shape)}, q {tuple(q.shape)}")  # fmt: skip


@torch.no_grad()
def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk, *, k_suffix: Tensor | None = None, v_suffix: Tensor | None = None,
    scale: float | None = None, sink: int = 0, recent: int = 0, share: str = "head", lengths: Tensor | None = None,
    check_finite: bool = True, return_lse: bool = False, return_indices: bool = False, backend: str = "auto",
):  # fmt: skip
    """Attend to the topk best prefix rows and to the suffix: q (B, Hq, T, D), k, v (B, Hk, N, D) -> (B, Hq, T, D).

    topk            a count, or a fraction of the prefix rows in use (rounded up).
    k_suffix, ...   (B, Hk, M, D): query i sees rows 0..M-T+i, densely.
    sink, recent    first and last prefix rows that are always attended; they do not count towards topk.
    share           "head": each query head chooses its own rows (the paper). "group": the heads of a key/value head
                    choose together, by their summed softmax probability over the prefix.
    lengths         (B,): prefix rows in use; what lies behind is never read.
    check_finite    ValueError for NaN or infinity in q or K. Looked for on a CPU only.
    backend         auto, torch, or triton (share "head", no sinks, T such that q fits one tile).
    returns         out in q's dtype [, lse (B, Hq, T)] [, indices (B, Hq, T, n) in any order, -1 where lengths differ].

    Head h reads key/value head h // G. Arithmetic in fp32, in fp64 for fp64. No gradients.
    ValueError: shapes, devices or dtypes that do not fit, a bad topk, an unknown share or backend.
    """
    _check_heads(q, k, v, k_suffix, v_suffix)
    B, Hk, N, D = k.shape
    if share not in SHARES:
        raise ValueError(f"unknown share {share!r}; choose from {', '.join(SHARES)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if min(sink, recent) < 0:
        raise ValueError(f"sink and recent must not be negative, got {sink} and {recent}")
    used = [N] * B if lengths is None else torch.as_tensor(lengths).tolist()
    if len(used) != B or not all(0 <= n <= N for n in used):
        raise ValueError(f"lengths must be {B} numbers in 0..{N}, got {used}")
    scale = D**-0.5 if scale is None else scale
    ks, vs = (k.new_zeros(B, Hk, 0, D),) * 2 if k_suffix is None else (k_suffix, v_suffix)
    tops = [resolve_k(topk, n) for n in used]  # also the check for N = 0
    plain = share == "head" and not sink and not recent and not return_indices
    if backend == "triton" or (backend == "auto" and q.is_cuda and kernels.available() and plain and N > 0):
        if not plain or q.dtype == torch.float64:
            raise ValueError("backend 'triton' does share='head' without sink, recent or return_indices, below float64")
        o, l = kernels.topk_attention_triton(q, k, v, tops, used, ks, vs, scale)
        return (o.to(q.dtype), l) if return_lse else o.to(q.dtype)
    found = []
    for b, (n, top) in enumerate(zip(used, tops, strict=True)):
        edge = min(sink, n), min(recent, n - min(sink, n))
        where = f"sequence {b}" if check_finite else ""
        found.append(_attend_one(q[b], k[b, :, :n], v[b, :, :n], min(top, n - sum(edge)), ks[b], vs[b], scale, *edge,
                                 share, where, return_indices))  # fmt: skip
    o, l, index = zip(*found, strict=True)
    result = [torch.stack(o).to(q.dtype)]
    if return_lse:
        result.append(torch.stack(l))
    if return_indices:
        width = max(i.shape[-1] for i in index)
        result.append(torch.stack([F.pad(i, (0, width - i.shape[-1]), value=-1) for i in index]))
    return result[0] if len(result) == 1 else tuple(result)


@torch.no_grad()
def attention_stats(q: Tensor, k: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the dense weights of q (B, Hq, T, D) over k (B, Hk, N, D): entropy in nats, and the fewest keys that hold
    75 % and 95 % of the mass; three (B, Hq, T)."""
    p = dense_weights(q, k, scale)
    mass = p.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    fewest = lambda share: (mass < share).sum(dim=-1).clamp(max=k.shape[2] - 1) + 1
    return -torch.xlogy(p, p).sum(dim=-1), fewest(0.75), fewest(0.95)


def dense_weights(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale): q (B, Hq, T, D), k (B, Hk, N, D) -> (B, Hq, T, N) in fp32 (fp64 for fp64)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = [_scores(x.reshape(len(y), -1, q.shape[-1]), y) for x, y in zip(q, k, strict=True)]
    return (torch.stack(rows) * scale).softmax(dim=-1).reshape(*q.shape[:3], -1)


def layer_budgets(k, n_layers: int, slope: float = 0.0, n_ctx: int | None = None) -> list[int]:
    """k per layer, growing linearly by `slope` in [0, 1) around the same mean; sum = k n_layers.

    A fraction k needs n_ctx. Each lies in 1..n_ctx. ValueError: k, slope or n_ctx is out of range.
    """
    if not 0 <= slope < 1:
        raise ValueError(f"slope must be in [0, 1), got {slope}")
    if isinstance(k, float) and n_ctx is None:
        raise ValueError(f"a fraction k = {k} needs n_ctx, the number of rows it is a fraction of")
    top = resolve_k(k, n_ctx if n_ctx is not None else sys.maxsize)
    most = sys.maxsize if n_ctx is None else max(1, n_ctx)
    tilt = [0.0] if n_layers == 1 else [2 * i / (n_layers - 1) - 1 for i in range(n_layers)]
    out = [min(most, max(1, round(top * (1 + slope * t)))) for t in tilt]
    while (lack := top * n_layers - sum(out)) != 0 and top:  # rounding and clipping, spread over what has room
        step = 1 if lack > 0 else -1
        room = [i for i in reversed(range(n_layers)) if 1 <= out[i] + step <= most]
        each = max(1, abs(lack) // len(room))
        for i in room[: abs(lack)]:
            out[i] = min(most, max(1, out[i] + step * each))
    return out


# ---- the method over processes: each holds a slice of the sequence


def _sharded_one(q, k, v, topk, ks, vs, scale, group, want_index):
    """sharded_topk_attention of one sequence: q (Hq, T, D), this rank's k, v (Hk, n, D) -> o, l, index or None.

    Two collectives: the ranks' best scores are gathered, and what survives among them is summed.
    """
    (Hq, T, D), Hk, rank, size = q.shape, len(k), dist.get_rank(group), dist.get_world_size(group)
    n = torch.zeros(size, dtype=torch.long, device=q.device)
    n[rank] = k.shape[1]
    dist.all_reduce(n, group=group)
    top = resolve_k(topk, int(n.sum()))
    rows = q.reshape(Hk, -1, D)  # (Hk, R, D)
    own = min(top, k.shape[1])
    value, index = exact_topk(_scores(rows, k, f"rank {rank}"), own)
    value, order = value.sort(dim=-1, descending=True)
    index = index.gather(-1, order)  # (Hk, R, own)

    def gathered(x: Tensor, fill) -> Tensor:  # (Hk, R, own) of each rank -> (Hk, R, size top)
        parts = [torch.empty(*x.shape[:2], top, dtype=x.dtype, device=x.device) for _ in range(size)]
        dist.all_gather(parts, F.pad(x, (0, top - own), value=fill).contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    union = gathered(value, -math.inf)
    best = union.sort(dim=-1, descending=True, stable=True).indices[..., :top]  # the same on every rank, ties and all
    mine = ((best >= rank * top) & (best < (rank + 1) * top)).sum(dim=-1, keepdim=True)  # so many of my first ones
    most = int(mine.max()) if mine.numel() else 0
    base = (union.amax(dim=-1, keepdim=True) if top else union.new_zeros(*union.shape[:2], 1)) * scale
    p = (value[..., :most] * scale - base).exp() * (torch.arange(most, device=q.device) < mine)
    o = torch.matmul(p[:, :, None], _rows(v, index[..., :most]).to(p.dtype))[:, :, 0]  # (Hk, R, D), not yet divided
    total = torch.cat([o, p.sum(dim=-1, keepdim=True)], dim=-1)
    dist.all_reduce(total, group=group)
    weight = total[..., D:]
    o, l = total[..., :D] / weight.clamp(min=torch.finfo(p.dtype).tiny), (weight.log() + base)[..., 0]
    o, l = merge_lse(o, l, *_suffix_part(rows, ks, vs, scale, T))  # every rank holds the suffix: it counts once
    if want_index:
        index = gathered(index + n[:rank].sum(), -1).gather(-1, best).reshape(Hq, T, top)
    return o.reshape(Hq, T, D), l.reshape(Hq, T), index if want_index else None


@torch.no_grad()
def sharded_topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk, *, k_suffix: Tensor | None = None, v_suffix: Tensor | None = None,
    scale: float | None = None, group=None, return_lse: bool = False, return_indices: bool = False,
):  # fmt: skip
    """topk_attention whose prefix is cut over the ranks of `group`: k, v (B, Hk, n, D) are this rank's slice, slices in
    rank order, lengths free; q and the suffix are equal on all ranks. Every rank returns the whole result, indices as
    rows of the whole prefix. topk counts over all ranks. Collective. Errors as topk_attention.
    """
    _check_heads(q, k, v, k_suffix, v_suffix)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ks, vs = (k.new_zeros(*k.shape[:2], 0, k.shape[3]),) * 2 if k_suffix is None else (k_suffix, v_suffix)
    found = [_sharded_one(q[b], k[b], v[b], topk, ks[b], vs[b], scale, group, return_indices) for b in range(len(q))]
    o, l, index = zip(*found, strict=True)
    result = [torch.stack(o).to(q.dtype)] + ([torch.stack(l)] if return_lse else [])
    result += [torch.stack(index)] if return_indices else []
    return result[0] if len(result) == 1 else tuple(result)


# ---- approximate first passes: what is scanned instead of the keys

GROUP = 64  # rows that share a scale and an offset


class Quantised:
    """A small copy of keys (Hk, n, D) for the scan: q4 (scale and offset per 64 rows and channel), or sign.

    q4: (x - low) / scale in 4 bits, channels d and d + D/2 in one byte. sign: 1 bit per channel and the row's norm.
    Rows that do not fill a group of 64 stay out; the store searches them exactly.
    """

    def __init__(self, kind: str, Hk: int, D: int, device):
        if D % (8 if kind == "sign" else 2):
            raise ValueError(f"index {kind!r} packs several channels into a byte: head width {D} does not divide")
        self.kind, self.D, self.n = kind, D, 0
        empty = functools.partial(torch.empty, device=device)
        width = {"q4": D // 2, "sign": D // 8}[kind]
        self.parts = [empty(Hk, 0, width, dtype=torch.uint8)]
        self.parts += [empty(Hk, 0, 1 if kind == "sign" else D, dtype=torch.float16)] * (1 if kind == "sign" else 2)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parts)

    def add(self, k: Tensor) -> None:
        """Take in the whole groups of k (Hk, all rows so far, D) past row self.n, a block at a time."""
        new, end = [], k.shape[1] // GROUP * GROUP
        for a in range(self.n, end, 1024 * GROUP):
            x = k[:, a : min(end, a + 1024 * GROUP)].to(self.parts[0].device).float()
            new.append(self._sign(x) if self.kind == "sign" else self._levels(x))
        if new:
            columns = [list(column) for column in zip(*new, strict=True)]  # of each part, its blocks
            self.parts = [torch.cat([old, *more], dim=1) for old, more in zip(self.parts, columns, strict=True)]
            self.n = end

    def _sign(self, x: Tensor) -> tuple[Tensor, ...]:
        bits = (x > 0).unflatten(-1, (-1, 8)).to(torch.uint8)
        weight = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
        return (bits * weight).sum(dim=-1, dtype=torch.uint8), (x.norm(dim=-1, keepdim=True) / self.D**0.5).half()

    def _levels(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.unflatten(1, (-1, GROUP))  # (Hk, g, 64, D)
        low = x.amin(dim=2).half()  # (Hk, g, D)
        scale = ((x.amax(dim=2) - low.float()) / 15).clamp(min=1e-7).half()
        step = scale.float().clamp(min=1e-7)[:, :, None]
        code = ((x - low.float()[:, :, None]) / step).round_().clamp_(0, 15).to(torch.uint8).flatten(1, 2)
        return code[..., : self.D // 2] | (code[..., self.D // 2 :] << 4), scale, low

    def widen(self, a: int, e: int) -> Tensor:
        """Rows a..e - 1 as fp32, (Hk, e - a, D). a and e are multiples of 64."""
        code = self.parts[0][:, a:e]
        if self.kind == "sign":
            bits = (code[..., None] >> torch.arange(8, dtype=torch.uint8, device=code.device)) & 1
            return (bits.flatten(-2).float() * 2 - 1) * self.parts[1][:, a:e].float()
        code = torch.cat([code & 15, code >> 4], dim=-1)
        scale, low = (p[:, a // GROUP : e // GROUP, None].float() for p in self.parts[1:])  # (Hk, g, 1, D)
        return (code.unflatten(1, (-1, GROUP)) * scale + low).flatten(1, 2)

    def candidates(self, q: Tensor, count: int, top: int) -> tuple[Tensor, None]:
        """Indices of the `count` best by the copy: q (Hk, R, D) -> (Hk, R, count)."""
        if q.is_cuda and self.kind == "q4" and kernels.available():
            return kernels.topk_triton(kernels.q4_scores_triton(q, *self.parts), count)[1], None
        s = torch.empty(len(q), q.shape[1], self.n, device=q.device)
        for a in range(0, self.n, 4096):
            e = min(self.n, a + 4096)
            torch.bmm(q, self.widen(a, e).transpose(1, 2), out=s[..., a:e])
        return exact_topk(s, count)[1], None


class Int8:
    """Keys (Hk, n, D) in 8 bits, scaled per head and channel, that prove what they find.

    With k = scale * code + e, |e_d| <= error_d, the integer score is off by no more than sum_d |q_d| error_d. So the
    rows left out of the candidates are worse than the best `top` of them as soon as the two integer scores differ by
    twice that, and the exact scores of the candidates then give the exact choice.
    """

    kind = "q8"

    def __init__(self, Hk: int, D: int, device):
        if D % 8 or D > 512:
            raise ValueError(
                f"index 'q8' multiplies integers 8 channels at a time, 512 at most: head width {D} does not fit"
            )
        self.n = 0
        self.parts = [torch.empty(Hk, 0, D, dtype=torch.int8, device=device), *torch.zeros(2, Hk, 1, D, device=device)]

    nbytes = Quantised.nbytes

    def add(self, k: Tensor) -> None:
        """Take in the rows of k (Hk, all rows so far, D) past row self.n; all anew if they exceed the scale."""
        code, scale, error = self.parts
        blocks = lambda: (x.to(code.device).float() for x in k[:, self.n :].split(65536, dim=1))
        peak = functools.reduce(torch.maximum, (x.abs().amax(dim=1, keepdim=True) for x in blocks()), 0 * scale)
        if not (peak <= 127 * scale).all():  # also where K holds NaN
            scale = (torch.maximum(peak, 127 * scale * (self.n > 0)) / 127).clamp(min=1e-30)
            self.n, code, error = 0, code[:, :0], 0 * error
        new = [code]
        for x in blocks():
            new.append((x / scale).round().to(torch.int8))
            error = torch.maximum(error, (x - new[-1] * scale).abs().amax(dim=1, keepdim=True))
        self.parts, self.n = [torch.cat(new, dim=1), scale, error], k.shape[1]

    def candidates(self, q: Tensor, count: int, top: int) -> tuple[Tensor, Tensor]:
        """Indices of the `count` best by integer score, and whether the best `top` rows are proven to be among them:
        q (Hk, R, D) -> (Hk, R, count), (Hk, R)."""
        (code, scale, error), R = self.parts, q.shape[1]
        p = q * scale  # q . k = p . code
        unit = p.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
        high = (p / unit).round()
        low = ((p / unit - high) * 254).round()  # q in 16 bits: p = unit (high + low / 254)
        columns = F.pad(torch.cat([high, low], dim=1), (0, 0, 0, -2 * R % 8)).to(torch.int8)  # (Hk, 2 R, D), padded
        s = torch.empty(len(q), self.n, R, dtype=torch.int32, device=q.device)
        for h in range(len(q)):
            both = torch._int_mm(code[h], columns[h].T)  # (n, 2 R)
            torch.add(both[:, R : 2 * R], both[:, :R], alpha=254, out=s[h])
        score, index = exact_topk(s.transpose(1, 2), count)  # (Hk, R, count)
        off = (q.abs() * error).sum(-1) + 127 * (p - unit * (high + low / 254)).abs().sum(-1)  # (Hk, R)
        gap = (score.topk(top, dim=-1).values[..., -1] - score.amin(dim=-1)) * unit[..., 0] / 254
        return index, gap > 2.001 * off


class Clusters:
    """An inverted-file index: keys (Hk, n, D) in lists around spherical k-means centres; a query reads a few lists.

    ceil(n / 1000) lists, ceil(sqrt n) above 900 000 rows, 8 read, centres from the first 100 000 rows: the settings of
    the paper's released code. Rows added later stay out until they are a quarter of the rest.
    """

    kind, probes = "ivf", 8

    def __init__(self, Hk: int, D: int, device):
        self.n, self.parts = 0, [torch.empty(Hk, 0, D, device=device), torch.empty(Hk, 0, dtype=torch.long),
                                 torch.zeros(Hk, 1, dtype=torch.long)]  # fmt: skip

    nbytes = Quantised.nbytes

    def add(self, k: Tensor) -> None:
        """Cluster the rows of k (Hk, all rows so far, D) anew, if they are a quarter more than those already in."""
        n = k.shape[1]
        if n < max(1, 1.25 * self.n):
            return
        lists = math.ceil(n / 1000) if n <= 900_000 else math.ceil(n**0.5)
        g, centres, members, start = cluster.generator(n), [], [], []
        for keys in k.split(1):  # a head
            unit = lambda a, e, keys=keys: F.normalize(keys[0, a:e].float(), dim=-1)
            train = unit(0, 100_000)
            c = train[torch.randperm(len(train), generator=g)[:lists].to(train.device)]
            for _ in range(8):
                home = (train @ c.T).argmax(dim=1)
                c = F.normalize(torch.zeros_like(c).index_add_(0, home, train) + 1e-6 * c, dim=-1)
            home = torch.cat([(unit(a, a + 65536) @ c.T).argmax(dim=1) for a in range(0, n, 65536)]).cpu()
            centres.append(c)
            members.append(home.argsort(stable=True))
            start.append(F.pad(home.bincount(minlength=lists).cumsum(0), (1, 0)))
        self.parts, self.n = [torch.stack(centres), torch.stack(members), torch.stack(start)], n

    def candidates(self, q: Tensor, count: int, top: int) -> tuple[Tensor, None]:
        """The members of the lists nearest to each query, all of them, padded with -1: q (Hk, R, D) -> (Hk, R, any)."""
        centres, members, start = self.parts
        near = torch.bmm(q, centres.transpose(1, 2)).topk(min(self.probes, centres.shape[1]), dim=-1).indices.cpu()
        found = [[torch.cat([members[h, start[h, c] : start[h, c + 1]] for c in row]) for row in near[h]]
                 for h in range(len(q))]  # fmt: skip
        most = max(len(x) for rows in found for x in rows)
        pad = lambda x: F.pad(x, (0, most - len(x)), value=-1)
        return torch.stack([torch.stack([pad(x) for x in rows]) for rows in found]).to(q.device), None


def make_index(kind: str, Hk: int, D: int, device):
    """The index of one layer, None for "exact"."""
    make = {"q8": Int8, "ivf": Clusters, "exact": lambda *_: None}.get(kind, functools.partial(Quantised, kind))
    return make(Hk, D, device)


# ---- the cache: keys and values of one sequence, in host memory or on a GPU


def available_bytes() -> int:
    """Host memory that can still be had: MemAvailable, or what the control group has left if that is less."""
    free, group = sys.maxsize, Path("/sys/fs/cgroup")
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        pass  # not Linux: no check
    for most, now in ((group / "memory.max", group / "memory.current"),
                      (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes")):  # fmt: skip
        try:
            free = min(free, int(most.read_text()) - int(now.read_text()))
        except (OSError, ValueError):
            pass  # no such group, or "max"
    return free


def cache_bytes(config: dict, n: int, index: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of keys and values, and of the index, of n rows in all layers."""
    L, Hk, D = config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]
    bits = {"exact": 0, "q8": 8, "q4": 4 + 32 / GROUP, "sign": 1 + 16 / D, "ivf": 64 / D}[index]
    return 2 * n * L * Hk * D * dtype.itemsize, int(n * L * Hk * D * bits / 8)


def check_memory(config: dict, n: int, store: "KVStore", weights: int = 0, max_suffix: int = 1024) -> None:
    """MemoryError: n rows do not fit into host memory, or the store's max_gpu_gb, with the parts of the sum."""
    kv, index = cache_bytes(config, math.ceil(n / store.parts), store.kind, store.dtype)
    host = (kv if store.device.type == "cpu" else 0) + (index if store.index_device.type == "cpu" else 0)
    if host > (free := available_bytes()):
        raise MemoryError(f"KV cache needs {host / 1e9:.1f} GB, {free / 1e9:.1f} GB available; use kv_dtype=fp8, a "
                          f"smaller context, index='exact', or shard the sequence over more machines")  # fmt: skip
    if store.max_gpu_gb:
        Hq, row = config["num_attention_heads"], 2 * config["num_key_value_heads"] * config["head_dim"]
        parts = {
            "weights": weights, "cache": kv if store.device.type == "cuda" else 0,
            "index": index if store.index_device.type == "cuda" else 0, "scores": 4 * Hq * n,
            "suffix": config["num_hidden_layers"] * row * store.dtype.itemsize * max_suffix,
            "logits": 4 * config["vocab_size"],
        }  # fmt: skip
        if sum(parts.values()) > store.max_gpu_gb * 1e9:
            each = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
            raise MemoryError(f"{sum(parts.values()) / 1e9:.2f} GB of GPU memory needed, max_gpu_gb is "
                              f"{store.max_gpu_gb}: {each} GB. Keep the cache on the CPU or use a smaller "
                              f"index.")  # fmt: skip


class KVStore:
    """Keys and values of one sequence, per layer (Hk, N, D), and what finds the best keys. Append-only: rows keep their
    place. device: where they live. index: exact, or a first pass by q8, q4, sign or ivf, whose candidates are scored
    exactly; index_device: where its copy lives (by default the GPU, for a pinned store). dtype: of the rows; fp8 counts
    as storage only. pin: page-locked host memory, if there is a GPU. max_gpu_gb: refuse to grow past it; 0 is no limit.
    """

    parts = 1  # processes that share the rows

    def __init__(self, device="cpu", index: str = "exact", dtype: torch.dtype = torch.bfloat16, pin: bool = False, *,
                 index_device=None, max_gpu_gb: float = 0.0):  # fmt: skip
        if index not in INDEXES:
            raise ValueError(f"unknown index {index!r}; choose from {', '.join(INDEXES)}")
        self.device, self.kind, self.dtype = torch.device(device), index, dtype
        self.pin, self.max_gpu_gb = pin and torch.cuda.is_available() and self.device.type == "cpu", max_gpu_gb
        self.index_device = torch.device(index_device or ("cuda" if self.pin else self.device))
        self.layers: dict[int, list] = {}  # layer -> [k buffer (Hk, capacity, D), v buffer, rows in use, index]
        self.meta: dict = {}  # fingerprints, see note()
        self.recall = None  # the share of the exact choice that each approximate search found, if a list

    @property
    def n(self) -> int:
        """Rows per layer."""
        return self.layers[0][2] if 0 in self.layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and index."""
        rows = sum(2 * k[:, :n].numel() * k.element_size() for k, _, n, _ in self.layers.values())
        return rows + sum(i.nbytes for *_, i in self.layers.values() if i)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (Hk, N, D), as views."""
        k, v, n, _ = self.layers[layer]
        return k[:, :n], v[:, :n]

    def _buffer(self, *shape: int) -> Tensor:
        if self.pin:
            try:
                return torch.empty(shape, dtype=self.dtype, pin_memory=True)
            except RuntimeError:
                self.pin = False
                _warn_once("page-locked memory is refused (too large a share of RAM?): going on with pageable memory")
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values (Hk, N, D), in place of what it held. Copies. ValueError: shapes differ."""
        self.layers.pop(layer, None)
        self.append(layer, k, v)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add rows (Hk, m, D) behind those of the layer. ValueError: they do not fit."""
        if k.shape != v.shape or k.ndim != 3:
            raise ValueError(f"layer {layer}: k and v (Hk, N, D) needed, got {tuple(k.shape)} and {tuple(v.shape)}")
        Hk, m, D = k.shape
        kb, vb, n, index = self.layers.get(layer) or (self._buffer(Hk, 0, D), self._buffer(Hk, 0, D), 0, None)
        if (kb.shape[0], kb.shape[2]) != (Hk, D):
            raise ValueError(f"layer {layer} holds rows {kb.shape[0], kb.shape[2]} (Hk, D), got {Hk, D}")
        if n + m > kb.shape[1]:
            room = n + m if not n else n + m + max(1024, n // 8)
            grown = [self._buffer(Hk, room, D) for _ in range(2)]
            for new, old in zip(grown, (kb, vb), strict=True):
                new[:, :n].copy_(old[:, :n])
            kb, vb = grown
        kb[:, n : n + m].copy_(k)
        vb[:, n : n + m].copy_(v)
        index = index or make_index(self.kind, Hk, D, self.index_device)
        if index:
            index.add(kb[:, : n + m])
        self.layers[layer] = [kb, vb, n + m, index]

    @torch.no_grad()
    def search(self, layer: int, q: Tensor, topk, candidates: int = 2, share: str = "head", sink: int = 0,
               recent: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The best rows of each query: q (Hq, T, D) -> raw scores q . k in fp32 and rows int64, both (Hq, T, k).

        An approximate index names candidates * k rows, which are scored exactly. Where ivf finds too few, index -1 with
        score -inf. q8 on a CPU is exact: without its proof all rows are scored. The first `sink` and last `recent` rows
        come on top of k. ValueError: a bad topk, or NaN or infinity in q or K.
        """
        Hq, T, _ = q.shape
        k, n = self.layers[layer][0], self.layers[layer][2]
        sink = min(sink, n)
        recent = min(recent, n - sink)
        top = min(resolve_k(topk, n), n - sink - recent)
        step = max(1, SCRATCH // max(1, 4 * Hq * n))
        found = [
            self._search(layer, q[:, a : a + step], top, candidates, share, sink, recent) for a in range(0, T, step)
        ]
        score, index = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
        if self.recall is not None and self.kind != "exact":
            exact = _choose(_scores(q.reshape(len(k), -1, q.shape[2]).to(k.device), k[:, :n]), top, q.shape[-1] ** -0.5,
                            T, share, sink, recent)[1].reshape(Hq, T, -1)  # fmt: skip
            hit = torch.isin(index + n * torch.arange(Hq * T, device=index.device).view(Hq, T, 1),
                             exact + n * torch.arange(Hq * T, device=exact.device).view(Hq, T, 1))  # fmt: skip
            self.recall.append(hit.float().mean().item())
        return score, index

    def _search(self, layer: int, q: Tensor, top: int, candidates: int, share: str, sink: int,
                recent: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        (k, _, n, index), (Hq, T, D) = self.layers[layer], q.shape
        rows, k, scale, back = q.reshape(len(k), -1, D), k[:, :n], D**-0.5, lambda x: x.reshape(Hq, T, -1)
        few = top + sink + recent < n and index is not None and candidates * top + sink + recent < index.n
        if few:
            near = rows.to(index.parts[0].device).float()
            at, sure = index.candidates(near, candidates * top + sink + recent, top + sink + recent)  # (Hk, R, c)
            few = sure is None or sure.is_cuda or bool(sure.all())
        if not few:
            if k.is_cuda and share == "head" and not sink and not recent and kernels.available():
                value, at = kernels.topk_triton(kernels.scores_triton(rows, k), top)
            else:
                value, at = _choose(_scores(rows.to(k.device), k, f"layer {layer}"), top, scale, T, share, sink, recent)
            return back(value), back(at)
        rows, at = rows.to(k.device).float(), at.to(k.device)
        exact = lambda at: torch.matmul(_rows(k, at.clamp(min=0)).float(), rows[..., None])[..., 0]  # (Hk, R, c)
        rest = torch.arange(index.n, n, device=k.device).expand(*at.shape[:2], -1)
        at = torch.cat([at, rest], dim=-1)
        at = F.pad(at, (0, max(0, top - at.shape[-1])), value=-1)
        at = at.masked_fill((at < sink) | (at >= n - recent), -1)
        value = exact(at)
        _check_finite(value, rows, k, f"layer {layer}")  # NaN sorts above every number: it was found
        value = value.masked_fill(at < 0, -math.inf)
        if share == "group":  # each head's probability among its own candidates stands in for that over the prefix
            mass = torch.zeros(len(k), T, n + 1, device=k.device)
            mine = (value * scale).softmax(dim=-1).unflatten(1, (-1, T))  # (Hk, G, T, c)
            for g, where in enumerate(at.unflatten(1, (-1, T)).unbind(1)):
                mass.scatter_add_(-1, where.clamp(min=0), mine[:, g])
            at = exact_topk(mass[..., sink : n - recent], top)[1].repeat(1, Hq // len(k), 1) + sink
            value = exact(at)
        else:
            value, best = exact_topk(value, top)
            at = at.gather(-1, best)
        if sink or recent:
            ends = torch.cat([torch.arange(sink, device=k.device), torch.arange(n - recent, n, device=k.device)])
            ends = ends.expand(*at.shape[:2], -1)
            at, value = torch.cat([at, ends], dim=-1), torch.cat([value, exact(ends)], dim=-1)
        return back(value), back(at)

    def gather(self, layer: int, idx: Tensor) -> Tensor:
        """Value rows at idx (Hq, T, k), head h from key/value head h // G -> (Hq, T, k, D); row 0 for index -1."""
        v = self.rows(layer)[1]
        return _rows(v, idx.clamp(min=0).reshape(len(v), -1, idx.shape[-1])).reshape(*idx.shape, -1)

    def attend(self, layer: int, q: Tensor, topk, ks: Tensor, vs: Tensor, *, share: str = "head", candidates: int = 2,
               sink: int = 0, recent: int = 0, cache: "RowCache | None" = None) -> Tensor:  # fmt: skip
        """topk_attention of q (Hq, T, D) over the stored rows and the suffix (Hk, M, D), on q's device.

        On a GPU with rows in host memory the suffix part runs while the host searches.
        """
        (Hq, T, D), scale, k = q.shape, q.shape[2] ** -0.5, self.layers[layer][0]
        o, l = _suffix_part(q.reshape(len(k), -1, D), ks, vs, scale, T, "" if q.is_cuda else f"the suffix, {layer}")
        if self.n:
            if resolve_k(topk, self.n) + sink + recent >= self.n:  # dense: nothing to look for
                none, where = k.new_zeros(len(k), 0, D, dtype=torch.float32), f"layer {layer}"
                part = _attend_one(
                    q.to(k.device), *self.rows(layer), self.n, none, none, scale, 0, 0, "head", where, False
                )
                part = [x.reshape(*l.shape, *x.shape[2:]).to(q.device) for x in part[:2]]
            else:
                score, at = self.search(layer, q.to(k.device), topk, candidates, share, sink, recent)
                rows = cache.fetch(layer, at) if cache else self.gather(layer, at)
                fold = lambda x: x.to(q.device, non_blocking=True).reshape(*l.shape, *x.shape[2:])
                part = _part(fold(score) * scale, fold(rows))
            o, l = merge_lse(o, l, *part)
        return o.reshape(Hq, T, D).to(q.dtype)

    def note(self, model: "Llama", ids: Tensor, extrapolated: bool = False) -> None:
        """Remember which model and tokens these rows come from."""
        self.meta = {**model.fingerprints(), "tokens": _sha(ids), "extrapolated": extrapolated}

    def check(self, model: "Llama") -> None:
        """ValueError: the rows come from another model, or its layers are not all here."""
        if len(self.layers) != len(model.layers):
            raise ValueError(f"the store holds {len(self.layers)} layers, the model has {len(model.layers)}")
        for what, want in model.fingerprints().items():
            if self.meta.get(what, want) != want:
                raise ValueError(f"the stored context has {what} {self.meta[what]}, this model {want}. Open the model "
                                 f"that it was made with, or prefill again.")  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write one safetensors file per layer, and meta.json, under a temporary name that is then renamed."""
        folder, tmp = Path(folder), Path(f"{folder}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        for layer, (k, v, n, index) in self.layers.items():
            parts = {f"index.{i}": p for i, p in enumerate(index.parts)} if index else {}
            write_tensors(tmp / f"layer_{layer:03d}.safetensors", {"k": k[:, :n], "v": v[:, :n], **parts})
        index_rows = [i.n if i else 0 for *_, i in self.layers.values()]
        meta = {"n": self.n, "dtype": str(self.dtype)[6:], "index": self.kind, "index_rows": index_rows, **self.meta}
        report.write_json(tmp / "meta.json", meta)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)

    @classmethod
    def load(cls, folder: str | Path, model: "Llama | None" = None, **how) -> "KVStore":
        """Open a saved context by memory map, whatever its length; `how` goes to the constructor, except dtype.

        FileNotFoundError: none is there. ValueError: it is damaged, or was made with another model.
        """
        if not (Path(folder) / "meta.json").exists():
            raise FileNotFoundError(
                f"no saved context in {folder}: meta.json is missing. Save one with --save-context."
            )
        meta = json.loads((Path(folder) / "meta.json").read_text())
        facts = {name: meta.pop(name) for name in ("n", "dtype", "index", "index_rows")}
        store = cls(**{"index": facts["index"], **how, "dtype": getattr(torch, facts["dtype"])})
        store.meta = meta
        for layer, index_rows in enumerate(facts["index_rows"]):
            parts = read_tensors(Path(folder) / f"layer_{layer:03d}.safetensors")
            k, v = parts["k"], parts["v"]
            if k.shape[1] != facts["n"] or v.shape != k.shape:
                raise ValueError(f"{folder}: layer {layer} holds {tuple(k.shape)}, meta.json says {facts['n']} rows")
            if store.device.type == "cpu" and not store.pin and store.kind == facts["index"]:
                index = make_index(store.kind, len(k), k.shape[2], store.index_device)
                if index:
                    index.n = index_rows
                    index.parts = [parts[f"index.{i}"].to(store.index_device) for i in range(len(index.parts))]
                store.layers[layer] = [k, v, facts["n"], index]
            else:
                store.put(layer, k, v)
        if model is not None:
            store.check(model)
        return store


class ShardedStore(KVStore):
    """A KVStore of which every process of the group holds one contiguous slice. Always exact. Collective."""

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        rank, size, n = dist.get_rank(), dist.get_world_size(), k.shape[1]
        own = slice(rank * n // size, (rank + 1) * n // size)
        super().put(layer, k[:, own], v[:, own])
        self.total = n

    @property
    def parts(self) -> int:
        return dist.get_world_size()

    @property
    def n(self) -> int:
        return self.total if self.layers else 0

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v, n, _ = self.layers[layer]
        return k[:, :n], v[:, :n]

    def attend(self, layer: int, q: Tensor, topk, ks: Tensor, vs: Tensor, *, share: str = "head", sink: int = 0,
               recent: int = 0, **_) -> Tensor:  # fmt: skip
        if share != "head" or sink or recent:
            raise ValueError(f"over several processes each query head chooses alone, without sinks or a recent window: "
                             f"got share={share!r}, sink={sink}, recent={recent}. Run one process.")  # fmt: skip
        k, v = self.rows(layer)
        o = _sharded_one(q.to(k.device), k, v, topk, ks.to(k.device), vs.to(k.device), q.shape[2] ** -0.5, None, False)
        return o[0].to(q.device, q.dtype)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer in self.layers:
            raise NotImplementedError("a sharded store does not grow: its slices would no longer be in order")
        super().append(layer, k, v)


class RowCache:
    """Value rows of the last step kept on the GPU: neighbouring steps choose mostly the same rows, so only the new ones
    travel. Exact: a row is reused when its index is chosen again. hits and asked count rows.
    """

    def __init__(self, store: KVStore, device: torch.device):
        self.store, self.device, self.last, self.hits, self.asked = store, device, {}, 0, 0
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, layer: int, idx: Tensor) -> Tensor:
        """store.gather(layer, idx) on the cache's device: idx (Hq, 1, k) -> (Hq, 1, k, D)."""
        if idx.shape[1] != 1:
            return self.store.gather(layer, idx).to(self.device)
        v = self.store.rows(layer)[1]
        Hk, idx, k = len(v), idx.clamp(min=0), idx.shape[-1]
        flat = (idx[:, 0] * len(idx) + torch.arange(len(idx), device=idx.device)[:, None]).flatten()  # row and head
        rows = torch.empty(len(flat), v.shape[2], dtype=v.dtype, device=self.device)
        old, kept = self.last.get(layer, (flat[:0], rows[:0]))
        place = torch.searchsorted(old, flat).clamp(max=max(0, len(old) - 1))
        hit = old[place] == flat if len(old) else torch.zeros_like(flat, dtype=torch.bool)
        new, again = (~hit).nonzero()[:, 0], hit.nonzero()[:, 0]
        head = (new // k) // (len(idx) // Hk)
        fresh = torch.empty(len(new), v.shape[2], dtype=v.dtype, pin_memory=self.copies is not None)
        for h in range(Hk):
            mine = head == h
            fresh[mine] = v[h].index_select(0, idx.flatten()[new[mine]])
        with torch.cuda.stream(self.copies) if self.copies else contextlib.nullcontext():
            moved, where = fresh.to(self.device, non_blocking=True), new.to(self.device, non_blocking=True)
        if len(old):
            rows[again.to(self.device)] = kept[place[again].to(self.device)]
        if self.copies:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
            moved.record_stream(torch.cuda.current_stream(self.device))
            where.record_stream(torch.cuda.current_stream(self.device))
        rows[where] = moved
        order = flat.argsort()
        self.last[layer] = (flat[order], rows[order.to(self.device)])
        self.hits, self.asked = self.hits + len(again), self.asked + len(flat)
        return rows.reshape(len(idx), 1, k, -1)


def _sha(x) -> str:
    raw = x.detach().cpu().contiguous().numpy().tobytes() if isinstance(x, Tensor) else json.dumps(x).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


_SAFE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
         "U8": "uint8", "I8": "int8", "I64": "int64", "I32": "int32"}  # fmt: skip


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, a tensor at a time, its data aligned for a memory map."""
    head, at, names = {}, 0, {v: k for k, v in _SAFE.items()}
    for name, x in tensors.items():
        size = x.numel() * x.element_size()
        kind = names[str(x.dtype)[6:]]
        head[name], at = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, at + size]}, at + size
    text = json.dumps(head).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(x.cpu().contiguous().view(torch.uint8).numpy().data if x.numel() else b"")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of a private memory map. ValueError: it is cut off or damaged."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        head = json.loads(f.read(start - 8)) if start <= size else {}
    head.pop("__metadata__", None)
    if not head or start + max(x["data_offsets"][1] for x in head.values()) > size:
        raise ValueError(f"{path} is cut off or damaged: {size} bytes. Save the context again.")
    raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    part = lambda a, e: raw[start + a : start + e]
    return {name: _typed(part(*x["data_offsets"]), getattr(torch, _SAFE[x["dtype"]])).view(x["shape"])
            for name, x in head.items()}  # fmt: skip


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        raw if raw.data_ptr() % dtype.itemsize == 0 and raw.storage_offset() % dtype.itemsize == 0 else raw.clone()
    ).view(dtype)


# ---- the model: a Llama whose cache can live elsewhere


def llama_config(given: dict) -> dict:
    """Hugging Face's keys with the defaults filled in; old and new spellings of rope settings become one. BadInput: not
    a Llama, or a rope type other than default, linear and llama3."""
    c = dict(given)
    if c.get("model_type", "llama") not in ("llama", "mistral") or c.get("sliding_window"):
        what = "sliding-window attention" if c.get("sliding_window") else f"model_type {c['model_type']!r}"
        raise BadInput(f"{what} is not supported, only Llama-style models with full attention")
    if rope := c.pop("rope_parameters", None):
        c |= {"rope_scaling": rope, "rope_theta": rope.get("rope_theta", c.get("rope_theta", 1e4))}
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    c.setdefault("rms_norm_eps", 1e-6)
    c.setdefault("tie_word_embeddings", False)
    c.setdefault("max_position_embeddings", 2048)
    return c


def rope(config: dict) -> Tensor:
    """Angle per position of each rotary pair, (D/2,) float32, to the last bit as Hugging Face computes it: a difference
    there grows with the position. BadInput: a type other than default, linear and llama3."""
    freq = 1 / config.get("rope_theta", 1e4) ** (torch.arange(0, config["head_dim"], 2).float() / config["head_dim"])
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return freq / scaling["factor"]
    if kind == "llama3":
        low, high, wave = scaling["low_freq_factor"], scaling["high_freq_factor"], 2 * math.pi / freq
        smooth = (scaling["original_max_position_embeddings"] / wave - low) / (high - low)
        middle = (1 - smooth) * freq / scaling["factor"] + smooth * freq
        return torch.where(smooth > 1, freq, torch.where(smooth < 0, freq / scaling["factor"], middle))
    if kind != "default":
        raise BadInput(f"rope type {kind!r} is not supported, only 'default', 'linear' and 'llama3'.")
    return freq


class Layer(nn.Module):
    """Attention with rotary positions, Hq query heads over Hk key/value heads, then a SwiGLU MLP (if any)."""

    def __init__(self, c: dict):
        super().__init__()
        C, M, self.Hq, self.Hk = (c[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                 "num_key_value_heads"))  # fmt: skip
        D, self.eps, bias = c["head_dim"], c["rms_norm_eps"], c.get("attention_bias", False)
        linear = functools.partial(nn.Linear, bias=bias)
        self.self_attn = nn.ModuleDict({
            "q_proj": linear(C, self.Hq * D), "k_proj": linear(C, self.Hk * D), "v_proj": linear(C, self.Hk * D),
            "o_proj": linear(self.Hq * D, C),
        })  # fmt: skip
        linear = functools.partial(nn.Linear, bias=c.get("mlp_bias", False))
        names = ("gate_proj", "up_proj", "down_proj") if M else ()
        self.mlp = nn.ModuleDict({n: linear(*((M, C) if n == "down_proj" else (C, M))) for n in names})
        self.input_layernorm = Norm(C, c["rms_norm_eps"])
        self.post_attention_layernorm = Norm(C, c["rms_norm_eps"]) if M else None

    def qkv(self, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values of the normed x (B, T, C): (B, Hq or Hk, T, D)."""
        attn, y = self.self_attn, self.input_layernorm(x)
        q = rotate(rearrange(attn.q_proj(y), "b t (h d) -> b h t d", h=self.Hq), angle)
        k = rotate(rearrange(attn.k_proj(y), "b t (h d) -> b h t d", h=self.Hk), angle)
        return q, k, rearrange(attn.v_proj(y), "b t (h d) -> b h t d", h=self.Hk)

    def finish(self, x: Tensor, y: Tensor, mlp_splits: int = 0) -> Tensor:
        """What follows attention: x (B, T, C), heads' outputs y (B, Hq, T, D) -> (B, T, C)."""
        x = x + self.self_attn.o_proj(rearrange(y, "b h t d -> b t (h d)"))
        if not self.mlp:
            return x
        m, y, T = self.mlp, self.post_attention_layernorm(x), x.shape[1]
        pieces = y.split(T // mlp_splits, dim=1) if 0 < mlp_splits < T else [y]  # the unrolled MLP
        return x + torch.cat([m.down_proj(F.silu(m.gate_proj(p)) * m.up_proj(p)) for p in pieces], dim=1)


class Norm(nn.Module):
    """RMSNorm, statistics in fp32 (fp64 for fp64), cast back before the weight."""

    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(_precision(x))
        return (y * (y.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class Llama(nn.Module):
    """A Llama under Hugging Face's config keys and names. forward(ids (B, T)) -> dense logits (B, T, V)."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = c = llama_config(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        if not c["tie_word_embeddings"]:
            self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        with torch.device("cpu"):
            self.inv_freq = rope(c)  # (D/2,)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> "Llama":
        """A Hugging Face folder, a GGUF file, or 'smollm2'. BadInput: another architecture or rope type, or tensors
        that do not fit. FileNotFoundError, ModuleNotFoundError: see open_weights."""
        weights = open_weights(str(path))
        with torch.device("meta"):
            model = cls(weights.config)
        try:
            model.load_state_dict({n: weights.get(n).to(device, dtype) for n in weights.names}, assign=True)
        except RuntimeError as e:
            raise BadInput(f"{path}: its tensors do not fit its config. {e}") from e
        model.weights = weights
        return model.requires_grad_(False).eval()

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def angle(self, position: Tensor) -> Tensor:
        """Rotary angles in fp32 (fp64 for an fp64 model), never in the model's bf16: (..., T) -> (..., T, D/2)."""
        acc = _precision(self.model.norm.weight)
        return position.to(self.device, acc)[..., None] * self.inv_freq.to(self.device, acc)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) after the last layer -> (..., V)."""
        head = self.model.embed_tokens if self.config["tie_word_embeddings"] else self.lm_head
        return F.linear(self.model.norm(x), head.weight)

    def forward(self, ids: Tensor, position: Tensor | None = None) -> Tensor:
        """position (B, T), default 0..T - 1: gaps may be left between tokens."""
        where = (
            torch.arange(ids.shape[1], device=ids.device) if position is None else position[:, None]
        )  # one head axis
        angle, x = self.angle(where), self.model.embed_tokens(ids)  # (B, T, C)
        for layer in self.layers:
            q, k, v = layer.qkv(x, angle)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            x = layer.finish(x, y)
        return self.logits(x)

    def fingerprints(self) -> dict:
        """What tells one model from another: rotary angles, config, weights of the last norm."""
        config = {n: v for n, v in sorted(self.config.items()) if isinstance(v, int | float | str | bool | dict)}
        return {"rope": _sha(self.inv_freq), "config": _sha(config), "weights": _sha(self.model.norm.weight.float())}


def _check_range(model: Llama, n: int, allow: bool) -> None:
    most = model.config["max_position_embeddings"]
    if n > most and not allow:
        raise BadInput(f"context {n} exceeds max_position_embeddings {most}; pass allow_extrapolation=True")


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last T of S rows, row i to keys 0..S-T+i: q (1, Hq, T, D), k, v (1, Hk, S, D)."""
    T, S, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if q.is_cuda:  # the flash kernel knows this alignment; is_causal would align to the upper left
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), enable_gqa=gqa)
    rows = max(1, 2**26 // S)  # queries whose mask is 64 MB
    parts = []
    for a in range(0, T, rows):
        e = min(T, a + rows)
        seen = torch.ones(e - a, S - T + e, dtype=torch.bool, device=q.device).tril(S - T + a)
        kv = (k[:, :, : S - T + e], v[:, :, : S - T + e])
        parts.append(F.scaled_dot_product_attention(q[:, :, a:e], *kv, attn_mask=seen, enable_gqa=gqa))
    return torch.cat(parts, dim=2)


@torch.no_grad()
def prefill(model: Llama, ids: Tensor, store: KVStore, chunk: int = 8192, mlp_splits: int = 0,
            allow_extrapolation: bool = False, bar=iter) -> KVStore:  # fmt: skip
    """Read ids (N,) with dense attention and store exactly these N rows in every layer; returns the store.

    Layer by layer, `chunk` tokens at a time: the device holds one layer's keys and values and one chunk's activations,
    so a long context fits on a small card. The last layer's attention and MLP are left out: nobody reads them.
    ValueError: N exceeds the model's range. MemoryError: the cache does not fit.
    """
    n, c, dev = len(ids), model.config, model.device
    _check_range(model, n, allow_extrapolation)
    check_memory(c, n, store, sum(p.numel() * p.element_size() for p in model.parameters()))
    if chunk < 1 or mlp_splits < 0:
        raise ValueError(f"chunk must be at least 1 and mlp_splits at least 0, got {chunk} and {mlp_splits}")
    big = dev.type == "cuda" and n * c["hidden_size"] * model.dtype.itemsize > 2**32
    h = torch.empty(n, c["hidden_size"], dtype=model.dtype, device="cpu" if big else dev, pin_memory=big)
    for a in range(0, n, chunk):
        h[a : a + chunk] = model.model.embed_tokens(ids[a : a + chunk].to(dev))
    k = torch.empty(1, c["num_key_value_heads"], n, c["head_dim"], dtype=model.dtype, device=dev)
    v = torch.empty_like(k)
    for i, layer in enumerate(bar(model.layers)):
        for a in range(0, n, chunk):
            e = min(n, a + chunk)
            x = h[None, a:e].to(dev, non_blocking=True)  # (1, e - a, C)
            q, k[:, :, a:e], v[:, :, a:e] = layer.qkv(x, model.angle(torch.arange(a, e)))
            if i < len(model.layers) - 1:
                y = _causal(q, k[:, :, :e], v[:, :, :e])
                h[a:e].copy_(layer.finish(x, y, mlp_splits)[0])
        store.put(i, k[0], v[0])
    store.note(model, ids, allow_extrapolation)
    return store


class Suffix:
    """Keys and values of the tokens after the prefix, (L, Hk, capacity, D), in use up to n."""

    def __init__(self, model: Llama, capacity: int):
        c = model.config
        shape = (2, c["num_hidden_layers"], c["num_key_value_heads"], capacity, c["head_dim"])
        self.n, (self.k, self.v) = 0, torch.empty(shape, dtype=model.dtype, device=model.device)

    def flush(self, store: KVStore) -> None:
        """Move all rows to the store."""
        for i in range(len(self.k)):
            store.append(i, self.k[i, :, : self.n], self.v[i, :, : self.n])
        self.n = 0


def _budgets(model: Llama, k) -> list:
    if not isinstance(k, list | tuple):
        return [k] * len(model.layers)
    if len(k) != len(model.layers):
        raise ValueError(f"k has {len(k)} entries for {len(model.layers)} layers: give {len(model.layers)}, or one k")
    return list(k)


@torch.no_grad()
def _advance(model: Llama, ids: Tensor, store: KVStore, budgets: list, suffix: Suffix, **attend) -> Tensor:
    """Run ids (T,) after prefix and suffix, and add them to the suffix -> states after the last layer (T, C)."""
    T, a = len(ids), suffix.n
    angle = model.angle(torch.arange(store.n + a, store.n + a + T))
    x = model.model.embed_tokens(ids.to(model.device))[None]  # (1, T, C)
    for i, layer in enumerate(model.layers):
        q, suffix.k[i, :, a : a + T], suffix.v[i, :, a : a + T] = (y[0] for y in layer.qkv(x, angle))
        y = store.attend(i, q, budgets[i], suffix.k[i, :, : a + T], suffix.v[i, :, : a + T], **attend)
        x = layer.finish(x, y[None])
    suffix.n += T
    return x[0]


def _check_start(model: Llama, ids: Tensor, store: KVStore, k, more: int, allow: bool) -> list:
    """Checks shared by decode and generate; returns k per layer."""
    budgets = _budgets(model, k)
    for b in budgets:
        resolve_k(b, 0)
    if len(ids) < 1:
        raise ValueError("ids is empty: at least the token that follows the stored prefix is needed")
    store.check(model)
    _check_range(model, store.n + len(ids) + more, allow or store.meta.get("extrapolated", False))
    return budgets


@torch.no_grad()
def decode(model: Llama, ids: Tensor, store: KVStore, k, *, allow_extrapolation: bool = False, **attend) -> Tensor:
    """Logits (T, V) of ids (T,) that follow the stored prefix, each query choosing its rows; the store is unchanged.

    k: as topk_attention's topk, or a list with one per layer. `attend`: share, candidates, sink, recent. ValueError: a
    bad k, a store of another model, a position past the model's range.
    """
    budgets = _check_start(model, ids, store, k, 0, allow_extrapolation)
    return model.logits(_advance(model, ids, store, budgets, Suffix(model, len(ids)), **attend))


@torch.no_grad()
def generate(model: Llama, ids: Tensor, k, max_new_tokens: int, *, store: KVStore | None = None, stop=(), hear=None,
             max_suffix: int = 0, allow_extrapolation: bool = False, **attend) -> Tensor:  # fmt: skip
    """Greedy continuation, (<= max_new_tokens,) int64 on the CPU.

    Without a store, ids[:-1] is read densely into one and decoding starts from the last token. With a store, ids follow
    its prefix. stop: ids that end the text. hear: called with each new id. max_suffix: when the suffix holds so many
    rows they move to the store, for good; 0 keeps them in the suffix, as the paper does. ValueError: as decode.
    """
    if len(ids) < 1:
        raise ValueError("ids is empty: a prompt of at least one token is needed")
    _check_range(model, (store.n if store else 0) + len(ids) + max_new_tokens, allow_extrapolation
                 or bool(store and store.meta.get("extrapolated")))  # fmt: skip
    if store is None:
        _budgets(model, k)
        store, ids = prefill(model, ids[:-1], KVStore(model.device, dtype=model.dtype),
                             allow_extrapolation=allow_extrapolation), ids[-1:]  # fmt: skip
    budgets = _check_start(model, ids, store, k, max_new_tokens, allow_extrapolation)
    if model.device.type == "cuda" and store.device.type == "cpu" and not isinstance(store, ShardedStore):
        attend.setdefault("cache", RowCache(store, model.device))
    suffix = Suffix(model, len(ids) + (min(max_suffix, max_new_tokens) if max_suffix else max_new_tokens))
    new, given = [], ids
    for _ in range(max_new_tokens):
        if max_suffix and suffix.n and suffix.n + len(ids) > max_suffix:
            suffix.flush(store)
        x = _advance(model, ids, store, budgets, suffix, **attend)[-1]
        ids = model.logits(x).argmax(dim=-1, keepdim=True).cpu()
        new.append(int(ids))
        if hear:
            hear(new[-1])
        if new[-1] in stop:
            break
    if max_suffix and store.meta:
        store.meta["tokens"] = f"{store.meta['tokens']}+{_sha(given)}"
    return torch.tensor(new, dtype=torch.long)


# ---- the experiment: a small model that truly retrieves
#
# Vocabulary: 32 keys x 16 variants (id = 16 key + variant), 32 query tokens, 64 filler tokens. A row is random filler
# with 8 keys planted, one random variant each; then 8 times a query token and its answer. The key alone gives 1/16.

KEYS, VARIANTS, NEEDLES, FILLER = 32, 16, 8, 64
QUERY, NOISE = KEYS * VARIANTS, KEYS * VARIANTS + KEYS  # first query id, first filler id
TAIL = 2 * NEEDLES
TOY = {
    "model_type": "llama", "vocab_size": NOISE + FILLER, "hidden_size": 64, "intermediate_size": 0,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 1e12, "max_position_embeddings": 2**24, "tie_word_embeddings": False,
}  # fmt: skip
TOY_TASKS = ("single", "multivalue", "counting")


def toy_rows(task: str, n: int, count: int, g: torch.Generator, control: bool = False) -> tuple[Tensor, Tensor]:
    """count rows of n context tokens and the tail, (count, n + 16), and the right variants (count, 8, 16) bool.

    single: each key has one variant. multivalue: four, all are right. counting: 12 copies, of which one variant has 6
    and three have 2 each; the frequent one is right. control: the answers stay, but filler stands where needles were.
    """
    copies = {"single": 1, "multivalue": 4, "counting": 12}[task]
    keys = torch.rand(count, KEYS, generator=g).argsort(dim=1)[:, :NEEDLES]  # (count, 8)
    shuffled = torch.rand(count, NEEDLES, VARIANTS, generator=g).argsort(dim=2)  # (count, 8, 16)
    which = torch.tensor([0] * 6 + [1, 1, 2, 2, 3, 3]) if task == "counting" else torch.arange(copies)
    planted = keys[..., None] * VARIANTS + shuffled[..., which]  # (count, 8, copies)
    rows = NOISE + torch.randint(FILLER, (count, n), generator=g)
    place = torch.rand(count, n, generator=g).argsort(dim=1)[:, : NEEDLES * copies]
    if not control:
        rows.scatter_(1, place, planted.flatten(1))
    right = torch.zeros(count, NEEDLES, VARIANTS, dtype=torch.bool)
    right.scatter_(2, shuffled[..., : 4 if task == "multivalue" else 1], True)
    tail = torch.stack([QUERY + keys, planted[..., 0]], dim=2).flatten(1)  # (count, 16)
    return torch.cat([rows, tail], dim=1), right


def toy_positions(count: int, n: int, g: torch.Generator) -> Tensor:
    """Positions (count, n) with up to 4 jumps, 32768 u^3 in all: short rows then show rotations far apart."""
    span = 32768 * torch.rand(count, 1, generator=g) ** 3
    share = torch.rand(count, 4, generator=g) * (torch.rand(count, 4, generator=g) < 0.7)
    jump = (span * share / share.sum(dim=1, keepdim=True).clamp(min=1e-6)).long()
    where = torch.randint(1, n, (count, 4), generator=g)
    return torch.arange(n) + torch.zeros(count, n, dtype=torch.long).scatter_add_(1, where, jump).cumsum(dim=1)


STAGES = ((48, 32), (1008, 4))  # context tokens and rows per step of the two stages


class Trainer:
    """Trains the toy: rows of 64 tokens, then of 1024, loss on the queries alone. The ranks share each batch."""

    def __init__(self, seed: int, steps: tuple[int, int], w: cluster.World, state: dict | None = None):
        self.seed, self.stages, self.w, self.step = seed, steps, w, 0
        self.model, g = Llama(TOY), cluster.generator(seed, 0)
        for name, p in self.model.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.5 if "embed" in name else (3 * p.shape[1]) ** -0.5, generator=g)
        self.model.to(w.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                "seed": self.seed, "stages": list(self.stages)}  # fmt: skip

    @torch.enable_grad()
    def advance(self) -> Tensor:
        """One step; returns the mean loss over all ranks, 0-d."""
        w, (n, batch) = self.w, STAGES[self.step >= self.stages[0]]
        g = cluster.generator(self.seed, 1, self.step)
        ids, _ = toy_rows("single", n, batch, g)
        ids, where = (x[w.rank :: w.size].to(w.device) for x in (ids, toy_positions(*ids.shape, g)))
        total, lr = sum(self.stages), 5e-3 * min(1, (self.step + 1) / 20)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * (0.525 + 0.475 * math.cos(math.pi * self.step / total))
        logits = self.model(ids, where)[:, n : n + TAIL : 2]  # (B, 8, V) at the query tokens
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, n + 1 :: 2].flatten(), reduction="sum") / (batch * NEEDLES)
        self.optimizer.zero_grad()
        loss.backward()
        if w.size > 1:
            flat = torch.cat([p.grad.flatten() for p in self.model.parameters()] + [loss.detach()[None]])
            dist.all_reduce(flat)
            *grads, loss = flat.split([p.numel() for p in self.model.parameters()] + [1])
            for p, grad in zip(self.model.parameters(), grads, strict=True):
                p.grad.copy_(grad.view_as(p))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach().sum()

    def run(self, log=None, save=None) -> Llama:
        """To the end; log(step, loss) every 20 steps, save(state) every 100 and when SIGTERM asks to stop."""
        bar = report.progress(None, "train", self.w, sum(self.stages), self.step)
        listen = cluster.stop_signal(self.w.device) if save else contextlib.nullcontext(bool)  # bool() is False
        with listen as stopping, bar:
            while self.step < sum(self.stages):
                loss = self.advance()
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix_str(f"loss {loss:.3f}")
                    if log:
                        log(self.step, float(loss))
                stop = self.step % 10 == 0 and stopping()
                if save and (stop or self.step % 100 == 0 or self.step == sum(self.stages)):
                    save(self.state())
                if stop:
                    self.w.print(f"stopped by SIGTERM after step {self.step}; go on with --resume")
                    raise SystemExit(0)
        return self.model.requires_grad_(False).eval()


def train_tiny(seed: int = 0, steps: tuple[int, int] = (600, 120)) -> Llama:
    """The toy, trained on the CPU: `steps` of the two stages. Equal seeds give equal models."""
    return Trainer(seed, steps, cluster.World(0, 1, torch.device("cpu"))).run()


@torch.no_grad()
def toy_accuracy(model: Llama, task: str, n: int, queries: int, ks: list, seed: int = 0, control: bool = False,
                 w: cluster.World | None = None, bar=iter, **how) -> list[float]:  # fmt: skip
    """Accuracy per k, the first n tokens prefilled densely and the tail decoded with top-k: the ranks share the rows.

    A query is right if the answer has the largest logit; with several right answers, the share of them on top.
    """
    rows, size, rank = queries // NEEDLES, w.size if w else 1, w.rank if w else 0
    ids, right = toy_rows(task, n, rows, cluster.generator(seed, 2, n), control)
    hits = torch.zeros(len(ks), dtype=torch.float64, device=model.device)
    for i in bar(range(rank, rows, size)):
        store = prefill(model, ids[i, :n], KVStore(model.device, dtype=torch.float32))
        keys = ids[i, n::2] - QUERY  # (8,)
        answers = (keys[:, None] * VARIANTS + torch.arange(VARIANTS))[right[i]].view(NEEDLES, -1).to(model.device)
        for j, k in enumerate(ks):
            logits = decode(model, ids[i, n:], store, k, **how)[::2]  # (8, V)
            top = logits.topk(answers.shape[1], dim=-1).indices
            hits[j] += (answers[:, :, None] == top[:, None]).any(dim=-1).double().mean(dim=-1).sum()
    if size > 1:
        dist.all_reduce(hits)
    return (hits / (rows * NEEDLES)).tolist()


# ---- the experiment: long-context tasks in text, after RULER (arXiv:2404.06654), in our own words

NOUNS = """anchor apple apron arrow badge bagel barrel basin basket beacon beaver bench berry blanket bonnet
 bottle bridge brush bucket button cabin cable camel candle canoe carpet carrot castle cello chain chair cherry
 chimney circle cliff clock cloud clover coat comet compass copper coral cotton cradle crane crayon cricket crown
 curtain daisy desk diamond dragon drum eagle engine falcon feather fence fiddle flute forest fossil fountain
 garden garlic ginger glove goose grape guitar hammer harbor hazel helmet hinge honey island jacket jungle kettle
 ladder lantern lemon lizard lobster locket magnet maple marble meadow mirror mitten monkey needle nickel onion
 orchard otter oyster paddle panda parrot pebble pencil pepper pigeon pillow pirate planet pocket""".split()
ADJECTIVES = """able amber ancient autumn basic bitter blunt bold brave brief bright broad broken calm careful
 cheap clean clear clever cold common cosy crisp curly damp daring dark dear deep dense distant dizzy dry dull
 dusty eager early easy elder empty equal even exact faded faint fair famous fancy fast fierce final fine firm
 flat fluffy fond formal frail free fresh frosty full funny gentle giant glad golden grand grave green grim happy
 hardy harsh hasty heavy hidden hollow honest humble icy idle jolly keen kind large late lazy lean light likely
 little lively local lonely loud loyal lucky mild misty modern narrow neat nimble noble odd pale plain polite
 proud quick quiet rapid rare""".split()
STOCK = ("A cart rolls past the mill.", "Two gulls sit on the wall.", "The baker opens her shop.",
         "Rain is likely before noon.", "Nobody answers the bell.")  # fmt: skip
BUDGET = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}  # tokens left for the answer
TASKS = ("niah_single", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
         "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")  # fmt: skip


@functools.cache
def _essay() -> list[str]:
    """Sentences of the standard library's documentation."""
    text = re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"\s+", " ", corpus("docs")))
    return [s for s in re.split(r"(?<=[.!?]) ", text) if 30 <= len(s) <= 400]


def _niah(kind: str, units: int, rng: random.Random) -> tuple[str, tuple[str, str], list[str]]:
    """A haystack of `units` sentences with needles -> (body, (question, start of the answer), answers)."""
    digits = 5 if kind == "single" else 7
    number = lambda: str(rng.randrange(10 ** (digits - 1), 10**digits))
    long = lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    word = lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    new_key = long if kind == "multikey_3" else word
    new_value = long if kind in ("single_3", "multikey_3") else number
    n_keys, n_values = {"multikey_1": (4, 1), "multivalue": (1, 4), "multiquery": (4, 1)}.get(kind, (1, 1))
    keys = []
    while len(keys) < n_keys:
        keys += [k] if (k := new_key()) not in keys else []
    values = {k: [new_value() for _ in range(n_values)] for k in keys}
    thing = "identifier" if new_value is long else "number"
    needle = lambda k, v: f"Please note that the secret {thing} of {k} is {v}."
    needles = [needle(k, v) for k in keys for v in values[k]]
    if kind in ("multikey_2", "multikey_3"):  # nothing but needles
        hay = []
        while len(hay) < units:
            hay += [needle(k, new_value())] if (k := new_key()) not in keys else []
    elif kind in ("single_1", "single_3"):
        hay = [STOCK[i % len(STOCK)] for i in range(units)]
    else:
        start = rng.randrange(len(_essay()))
        hay = [_essay()[(start + i) % len(_essay())] for i in range(units)]
    depths = [round(d / 39 * len(hay)) for d in sorted(rng.sample(range(40), len(needles)))]
    rng.shuffle(needles)
    for d, text in sorted(zip(depths, needles, strict=True), reverse=True):
        hay.insert(d, text)
    asked = keys if kind == "multiquery" else keys[:1]
    names = ", ".join(asked[:-1]) + f" and {asked[-1]}" if len(asked) > 1 else asked[0]
    answers = [v for k in asked for v in values[k]]
    many = len(answers) > 1
    what = f"secret {thing}s of {names}" if many else f"secret {thing} of {names}"
    question = f"What {'are all the' if many else 'is the'} {what} in the text above?"
    start = f" According to the text, the {what} {'are' if many else 'is'}"
    head = f"Read this text. It hides a secret {thing} that you will be asked for.\n"
    return head + " ".join(hay) + "\n", (question, start), answers


def _vt(units: int, rng: random.Random) -> tuple[str, tuple[str, str], list[str]]:
    def chain(length: int, letters: int) -> tuple[list[str], str, list[str]]:
        """Names, the number they stand for, and the statements that pass it from name to name."""
        names = ["".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters)) for _ in range(length)]
        value = str(rng.randrange(10000, 100000))
        return (
            names,
            value,
            [f"VAR {names[0]} = {value}."]
            + [f"VAR {b} = VAR {a}." for a, b in zip(names[:-1], names[1:], strict=True)],
        )

    def ask(value: str, names: list[str]) -> tuple[str, str]:
        return (f"Which {len(names)} variables hold the value {value} in the text above?",
                f" The variables that hold {value} are")  # fmt: skip

    def noise(count: int, lines: list[str]) -> str:
        hay = [" ".join(STOCK)] * count
        places = sorted(rng.choices(range(count + 1), k=len(lines)))
        for place, line in reversed(list(zip(places, lines, strict=True))):
            hay.insert(place, line)
        return "\n".join(hay)

    head = "This text sets variables, each to a value or to another variable. Follow them.\n\n"
    names, value, lines = chain(5, 3)
    solved = head + noise(3, lines) + "\n" + "".join(ask(value, names)) + " " + ", ".join(names) + "\n\n"
    names, value, lines = chain(5, 5)
    return solved + head + noise(units, lines) + "\n", ask(value, names), names


def _cwe(units: int, small: bool, rng: random.Random) -> tuple[str, tuple[str, str], list[str]]:
    often, seldom = (6, 1) if small else (30, 3)
    pool = list(dict.fromkeys(ADJECTIVES + NOUNS + [f"{a}{n}" for a in ADJECTIVES for n in NOUNS]))
    words = rng.sample(pool, min(len(pool), 10 + units))
    listed = words[:10] * often + words[10:] * seldom
    rng.shuffle(listed)
    body = "\n".join(f"{i + 1}. {word}" for i, word in enumerate(listed))
    head = "Here is a numbered list of words. Ten of them come more often than the rest.\n"
    question = ("Which ten words come most often in the list above?", " The ten most frequent words of the list are")
    return head + body + "\n", question, words[:10]


def _fwe(units: int, n_tokens: int, rng: random.Random) -> tuple[str, tuple[str, str], list[str]]:
    size = max(4, n_tokens // 50)
    words = ["..."]
    while len(words) < size:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6))
        words += [word] if word not in words else []
    zeta = sum(r**-2 for r in range(1, 2000))
    listed = [w for r, w in enumerate(words, 1) for _ in range(max(5 - r, round(units * r**-2 / zeta)))]
    rng.shuffle(listed)
    head = "This is a text in a code. Count how often each code word comes.\n"
    question = "Leaving out '...', which three code words come most often in the text above?"
    return head + " ".join(listed) + "\n", (question, " The three most frequent code words are"), words[1:4]


def ruler(task: str, n_tokens: int, seed: int, tokenizer=None, parts: bool = False):
    """A prompt of at most n_tokens with its answer's budget, and the strings that a right answer holds.

    The prompt ends with the start of the answer, so that a base model goes on with it. Lengths are bytes unless a
    tokenizer is given. parts: (document, question, start of the answer) instead of one string, for a chat template.
    ValueError: an unknown task, or too little room for any haystack.
    """
    name = task if task in TASKS else f"niah_{task}"
    if name not in TASKS:
        raise BadInput(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    family = name.split("_")[0]

    def build(units: int):
        rng = random.Random(f"{name} {seed}")
        if family == "niah":
            return _niah(name[5:], units, rng)
        return {"vt": lambda: _vt(units, rng), "cwe": lambda: _cwe(units, n_tokens < 4096, rng),
                "fwe": lambda: _fwe(units, n_tokens, rng)}[family]()  # fmt: skip

    def size(units: int) -> int:
        body, (question, start), _ = build(units)
        return _length(body + question + start, tokenizer) + (20 if name == "niah_single" else BUDGET[family])

    low, high = 0, 1  # so many units fit, and so many do not
    while size(high) <= n_tokens and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= n_tokens else (low, middle)
    while low and size(low) > n_tokens:  # a size that is not monotone
        low -= 1
    if low == 0:
        raise BadInput(
            f"{n_tokens} tokens are too few for task {name}: with one unit of text it has {size(1)}. Ask more."
        )
    body, question, answers = build(low)
    return ((body, *question), answers) if parts else (body + "".join(question), answers)


def _length(text: str, tokenizer) -> int:
    if tokenizer is None:
        return len(text.encode())
    ids = tokenizer.encode(text)
    return len(getattr(ids, "ids", ids))


def ruler_score(outputs: list[str], answers: list[list[str]], mode: str = "all") -> float:
    """100 x the mean over samples of the share of answers found in the output ("all"), or of whether any is ("part").

    Substrings, upper and lower case alike. ValueError: another mode, or lists of different lengths.
    """
    if mode not in ("all", "part") or len(outputs) != len(answers):
        raise ValueError(f"mode all or part needed, got {mode!r}, with {len(outputs)} outputs, {len(answers)} answers")
    found = [[a.lower() in out.lower() for a in want] for out, want in zip(outputs, answers, strict=True)]
    score = [sum(f) / len(f) if mode == "all" else float(any(f)) for f in found]
    return 100 * sum(score) / max(1, len(score))


class Chat:
    """A real model with its tokenizer and chat template (ChatML, Llama 3, or none)."""

    def __init__(self, cfg: "Config", device: torch.device):
        self.model = Llama.from_pretrained(cfg.model, getattr(torch, cfg.dtype), device)
        self.tokenizer = self.model.weights.tokenizer()
        known = lambda token: self.tokenizer.token_to_id(token) is not None
        self.head, self.tail, ends = "", "", []
        if known("<|im_start|>"):
            self.head, self.tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
            ends = ["<|im_end|>", "<|endoftext|>"]
        elif known("<|start_header_id|>"):
            role = "<|start_header_id|>{}<|end_header_id|>\n\n"
            self.head, ends = "<|begin_of_text|>" + role.format("user"), ["<|eot_id|>", "<|end_of_text|>"]
            self.tail = "<|eot_id|>" + role.format("assistant")
        eos = self.model.config.get("eos_token_id")
        self.stop = {self.tokenizer.token_to_id(t) for t in ends if known(t)} | set(
            eos if isinstance(eos, list) else [eos]
        )

    def encode(self, text: str) -> Tensor:
        """Ids as they stand: no token is added in front."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids])


# ---- demo: the claim


def parse_k(word: str):
    """--k: 'dense', a count such as 64, a fraction such as 0.01, or one of these per layer, joined by commas."""
    if "," in word:
        return [parse_k(part) for part in word.split(",")]
    if word == "dense":
        return 1.0
    try:
        k = float(word) if "." in word else int(word)
    except ValueError:
        raise BadInput(f"--k {word}: 'dense', a count, or a fraction with a point in it is needed") from None
    resolve_k(k, 0)
    return k


def _name(word: str) -> str:
    return word if "." not in word else f"{100 * float(word):g} %"


def real_model_here() -> bool:
    """True when smollm2 and what reads it are installed."""
    try:
        find_weights("smollm2")
    except ModuleNotFoundError:
        return False
    return all(importlib.util.find_spec(name) for name in ("gguf", "tokenizers"))


def toy_model(cfg: Config, w: cluster.World, run: report.Run) -> Llama:
    """Train the toy under the run's settings."""
    log = lambda step, loss: run.log(step=step, loss=loss)
    return Trainer(cfg.seed, cfg.steps, w).run(log)


def demo(cfg: Config, w: cluster.World) -> None:
    """Train the toy, print accuracy over k at each context, the control, the lessons, the real model, the claim."""
    run, start = report.Run(cfg.out, cfg, w), time.perf_counter()
    model = toy_model(cfg, w, run)
    w.print(f"trained a model of {sum(p.numel() for p in model.parameters()) / 1e3:.0f}k parameters in "
            f"{time.perf_counter() - start:.0f} s on rows of at most 1024 tokens")  # fmt: skip
    words, found = ("dense", *cfg.ks), {}
    ks = [parse_k(word) for word in words]

    def measure(label: str, task: str, n: int, control: bool = False) -> list:
        """Accuracy of one row of the table, dense and at each k, over n tokens; logged, and kept in `found`."""
        queries = {2048: 256}.get(n, 512 if n < 2048 else 128)
        bar = functools.partial(report.progress, what=label, w=w)
        found[label] = acc = toy_accuracy(model, task, n, queries, ks, cfg.seed, control, w, bar, share=cfg.share)
        for word, k, a in zip(words, ks, acc, strict=True):
            share = 0.0 if word == "dense" else k if isinstance(k, float) else k / n
            cell = {"context": n, "k": share, "rows": resolve_k(k, n), "queries": queries}
            run.log(
                **cell, **({"accuracy": a, "control": control} if task == "single" else {"lesson": task, "right": a})
            )
        return [label, *acc]

    rows = [measure(f"{n} tokens", "single", n) for n in cfg.contexts]
    aside = min(2048, max(cfg.contexts))
    control, several, frequent = (
        f"{aside}, {what}" for what in ("no needles", "4 answers per key", "most frequent of 12")
    )
    rows.append(measure(control, "single", aside, control=True))
    rows += [measure(several, "multivalue", aside), measure(frequent, "counting", aside)]
    head = ["accuracy", "dense", *(f"k = {_name(k)}" for k in cfg.ks)]
    w.print("\n" + report.table(head, rows) + "\n")
    for n in cfg.contexts:
        if max(found[f"{n} tokens"][1:]) > found[f"{n} tokens"][0] + 0.05:
            w.print(f"lesson: at {n} tokens, past its training length, the model is better with top-k than dense: the "
                    "far tail no longer dilutes what counts")  # fmt: skip
    best = {x.split(", ")[1]: max(found[x][1:]) / max(1e-9, found[x][0]) for x in (several, frequent)}
    w.print("lesson: what is collected or counted over many places needs more keys than what is found in one; here "
            + ", ".join(f"{label} reaches {r:.2f} of dense" for label, r in best.items()))  # fmt: skip
    if w.main:
        mass, entropy = toy_mass(model, cfg.seed)
        run.log(entropy=entropy, mass={str(k): m for k, m in mass.items()})
        draw_all = functools.partial(draw, cfg, model, words, found, mass)
        w.print(
            report.picture(f"{cfg.out}/topk_attention.png", draw_all, ncols=3, figsize=(16, 4.6), layout="constrained")
        )
    if cfg.real and real_model_here():
        w.print("\na real model (SmolLM2-135M-Instruct, needle in documentation text, 2048 tokens):")
        small = replace(cfg, model="smollm2", tasks=("niah_single",), context=2048, samples=4, ks=("0.01", "0.02"))
        score_tasks(small, w, run, {})
    elif cfg.real:
        w.print(f"the real model's needle test is left out: {INSTALL_SMOLLM2} && {INSTALL}")
    few = [i for i, k in enumerate(ks) if i and isinstance(k, float) and k <= 0.02]
    if not few:
        return w.print("no claim: --ks has no fraction up to 0.02")
    ratios = {n: [found[f"{n} tokens"][i] / max(1e-9, found[f"{n} tokens"][0]) for i in few] for n in cfg.contexts}
    at_2 = {n: r[-1] for n, r in ratios.items()}
    worst = min(r for n, r in at_2.items() if n <= 2048) if min(at_2) <= 2048 else min(at_2.values())
    dense = {n: found[f"{n} tokens"][0] for n in cfg.contexts}
    able = all(a >= 0.9 for n, a in dense.items() if n <= 2048)  # a share of nothing would prove nothing
    run.claim(
        "top-k over 2 % of the keys keeps 95 % of dense accuracy at every length",
        "0.95", f"{worst:.3f}", min(at_2.values()) >= 0.95 and able and max(found[control]) <= 0.12,
        f"dense {min(dense.values()):.2f} to {max(dense.values()):.2f}; "
        f"lowest top-k / dense at {100 * ks[few[-1]]:g} % up to 2048 tokens; beyond: "
        + ", ".join(f"{r:.2f} at {n}" for n, r in at_2.items() if n > 2048)
        + f"; toy of {cfg.steps} steps, seed {cfg.seed}, {w.device.type}",
    )  # fmt: skip


@torch.no_grad()
def toy_mass(model: Llama, seed: int, n: int = 2048) -> tuple[dict, float]:
    """Attention mass of the query tokens on their k best of n keys, mean over heads, last layer; and the entropy."""
    grid, mass, entropy = [2**i for i in range(12)], torch.zeros(12), []
    ids, _ = toy_rows("single", n, 8, cluster.generator(seed, 3))
    for row in ids:
        watch = Watch(prefill(model, row[:n], KVStore(model.device, dtype=torch.float32)))
        _advance(model, row[n:], watch, [1.0] * len(model.layers), Suffix(model, TAIL))
        q, k = watch.queries[len(model.layers) - 1][:, ::2], watch.store.rows(len(model.layers) - 1)[0]
        best = dense_weights(q[None], k[None])[0].sort(dim=-1, descending=True).values.cumsum(dim=-1)  # (Hq, 8, N)
        mass += torch.stack([best[..., k - 1].mean() for k in grid]).cpu() / len(ids)
        entropy.append(attention_stats(q[None], k[None])[0].mean())
    return dict(zip(grid, mass.tolist(), strict=True)), float(torch.stack(entropy).mean())


def draw(cfg: Config, model: Llama, words, found: dict, mass: dict, figure, axes) -> None:
    """Accuracy and captured mass over k; GPU memory and bytes per token over context, computed for an 8B model."""
    left, middle, right = axes
    for n, color in zip(cfg.contexts, ("tab:blue", "tab:orange", "tab:green", "tab:purple"), strict=False):
        acc = found[f"{n} tokens"]
        share = sorted((resolve_k(parse_k(k), n) / n * 100, a) for k, a in zip(words[1:], acc[1:], strict=True))
        left.plot(*zip(*share, strict=True), "o-", color=color, label=f"{n} tokens, top-k")
        left.axhline(acc[0], color=color, ls=":", label=f"{n} tokens, dense")
    left.plot([100 * k / 2048 for k in mass], list(mass.values()), color="0.6", lw=1.5, label="attention mass (2048)")
    left.set(
        xscale="log", xlabel="keys attended, % of the context", ylabel="accuracy, or share of the mass", ylim=(0, 1.04)
    )
    left.set_title("Accuracy and captured mass over k")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    n = [2**i for i in range(12, 21)]
    L, Hq, Hk, D, _ = SHAPES["llama-3.1-8b"]
    row, gib, k = 2 * 2 * Hk * D * L, 2**30, 0.01  # bf16 bytes of keys and values per token
    weights = 16.06e9 / gib
    middle.plot(n, [weights + x * row / gib for x in n], label="dense, cache on the GPU")
    small = [weights + (2 * Hq * x * k * D * 2 + 4 * Hq * x) / gib for x in n]
    middle.plot(n, small, label="top-k 1 %, cache in host memory")
    middle.axhline(weights, color="0.6", ls=":", label="weights alone")
    middle.set_title("GPU memory, 8B model in bf16 (computed)")
    middle.set(ylabel="GiB", ylim=(0, 150))
    right.plot(n, [x * row for x in n], label="dense: whole cache read")
    right.plot(n, [x * row / 2 + L * Hq * x * k * D * 2 for x in n], label="top-k 1 %: keys and chosen values")
    right.plot(n, [L * Hq * x * k * D * 2 for x in n], label="of which to the GPU (per head)")
    right.plot(n, [L * Hk * x * k * D * 2 for x in n], label="of which to the GPU (per group)")
    right.set_title("Bytes per generated token (computed)")
    right.set(ylabel="bytes", yscale="log")
    for ax in (middle, right):
        ax.set_xscale("log", base=2)
        ax.set(xlabel="context, tokens")
        ax.legend(frameon=False, fontsize=8)


# ---- train, eval, generate, analyze


def train(cfg: Config, w: cluster.World) -> None:
    """Train the toy with checkpoints; `eval` uses what this leaves."""
    path = f"{cfg.out}/checkpoint.pt"
    state = cluster.load(path) if cfg.resume else None
    if state and (state["seed"], tuple(state["stages"])) != (cfg.seed, tuple(cfg.steps)):
        raise BadInput(f"the checkpoint was trained with --seed {state['seed']} --steps {state['stages']}. Pass "
                       f"the same, or another --out.")  # fmt: skip
    if not state and w.main:
        cluster.set_aside(path)
    run = report.Run(cfg.out, cfg, w, state["step"] if state else 0)
    save = lambda s: cluster.save(path, s) if w.main else None  # noqa: E731
    model = Trainer(cfg.seed, cfg.steps, w, state).run(lambda step, loss: run.log(step=step, loss=loss), save)
    acc = toy_accuracy(model, "single", 512, 128, [1.0, parse_k(cfg.k)], cfg.seed, w=w)
    run.log(accuracy_dense=acc[0], accuracy_topk=acc[1])
    w.print(f"step {sum(cfg.steps)}: accuracy at 512 tokens {acc[0]:.3f} dense, {acc[1]:.3f} with k = {_name(cfg.k)}")


def evaluate(cfg: Config, w: cluster.World) -> None:
    """Tasks x k: the toy's three tasks, or the RULER-style tasks on a real model. --resume goes on after a stop."""
    if cfg.model == "toy":
        run = report.Run(cfg.out, cfg, w)
        saved = Path(cfg.out, "checkpoint.pt")
        model = toy_model(cfg, w, run) if not saved.exists() else Trainer(0, (0, 0), w, cluster.load(saved)).run()
        words = ("dense", *cfg.ks)
        ks, rows = [parse_k(word) for word in words], []
        for task in TOY_TASKS if cfg.tasks == Config.tasks else cfg.tasks:
            if task not in TOY_TASKS:
                raise BadInput(f"--tasks {task}: the toy has {', '.join(TOY_TASKS)}; {task} needs --model")
            acc = toy_accuracy(model, task, cfg.context, 8 * cfg.samples, ks, cfg.seed, w=w, share=cfg.share,
                               sink=cfg.sink, recent=cfg.recent)  # fmt: skip
            run.log(task=task, context=cfg.context, **dict(zip(words, acc, strict=True)))
            rows.append([task, *acc])
        return w.print(report.table([f"{cfg.context} tokens", "dense", *map(_name, cfg.ks)], rows))
    done, path = {}, Path(cfg.out, "metrics.jsonl")
    if cfg.resume and path.exists():
        lines = [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")]
        same = lambda head: all(
            head[f] == (list(v) if isinstance(v := getattr(cfg, f), tuple) else v) for f in EVAL_FIXED
        )
        if lines and lines[0]["config"]["mode"] == "eval":  # a demo's answers are not taken over
            if not same(lines[0]["config"]):
                raise BadInput(f"{path} is of an evaluation with other settings. Pass the same, or another --out.")
            done = {(x["task"], x["sample"], x["k"]): x for x in lines[1:] if "sample" in x}
    score_tasks(cfg, w, report.Run(cfg.out, cfg, w, max((x["step"] for x in done.values()), default=0)), done)


def score_tasks(cfg: Config, w: cluster.World, run: report.Run, done: dict) -> None:
    """Prompts of each task, prefilled once and answered with every k; one line in metrics.jsonl per answer."""
    chat, words = Chat(cfg, w.device), ("dense", *cfg.ks)
    table, step = [], max((x["step"] for x in done.values()), default=0)
    for task in cfg.tasks:
        todo = [s for s in range(cfg.samples) if any((task, s, k) not in done for k in words)]
        rounds = [todo[i : i + w.size] for i in range(0, len(todo), w.size)]
        for group in report.progress(rounds, task, w):
            mine = group[w.rank] if w.rank < len(group) else None
            answers = [] if mine is None else answer_all(cfg, chat, task, mine, words)
            parts = [None] * w.size
            dist.all_gather_object(parts, answers)
            for x in (x for part in parts for x in part):
                step += 1
                done[x["task"], x["sample"], x["k"]] = x
                run.log(step=step, **x)
        score = []
        for word in words:
            rows = [done[task, s, word] for s in range(cfg.samples)]
            score.append(ruler_score([x["output"] for x in rows], [x["answers"] for x in rows]))
        table.append(
            [task, *(f"{s:.1f}" for s in score), *(f"{s / score[0]:.2f}" if score[0] else "-" for s in score[1:])]
        )
        run.log(step=step, task=task, context=cfg.context, **dict(zip(words, score, strict=True)))
    w.print(report.table([f"score at {cfg.context} tokens", "dense", *map(_name, cfg.ks),
                          *(f"{_name(k)} / dense" for k in cfg.ks)], table))  # fmt: skip
    few = [k for k in cfg.ks if "." in k and float(k) <= 0.02]
    if cfg.mode == "eval" and few:
        total = lambda k: sum(float(row[1 + words.index(k)]) for row in table)
        ratio = total(few[-1]) / max(1e-9, total("dense"))
        run.claim(f"top-k over {_name(few[-1])} of the keys keeps 95 % of the dense score", "0.95", f"{ratio:.3f}",
                  ratio >= 0.95, f"{cfg.model}, {', '.join(cfg.tasks)}, {cfg.context} tokens, {cfg.samples} prompts "
                  "each")  # fmt: skip


def answer_all(cfg: Config, chat: Chat, task: str, sample: int, words: tuple) -> list[dict]:
    """One prompt answered with each k from one prefill."""
    room = cfg.context - len(chat.encode(chat.head + chat.tail)) - 2
    (body, question, start), answers = ruler(task, room, cfg.seed * 1000 + sample, chat.tokenizer, parts=True)
    ids = chat.encode(chat.head + body + question + chat.tail + start.strip())
    store = prefill(chat.model, ids[:-1], make_store(cfg), cfg.chunk, cfg.mlp_splits, cfg.allow_extrapolation)
    new, out = 20 if task == "niah_single" else BUDGET[task.split("_")[0]], []
    for word in words:
        got = generate(chat.model, ids[-1:], parse_k(word), new, store=store, stop=chat.stop, share=cfg.share,
                       sink=cfg.sink, recent=cfg.recent, candidates=cfg.candidates)  # fmt: skip
        out.append({"task": task, "sample": sample, "k": word, "output": chat.decode(got), "answers": answers,
                    "tokens": len(ids)})  # fmt: skip
    return out


def make_store(cfg: Config, w: cluster.World | None = None) -> KVStore:
    """The store that the flags describe; over several processes, one that shares the sequence."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[cfg.kv_dtype]
    if w and w.size > 1:
        return ShardedStore(w.device, "exact", dtype, max_gpu_gb=cfg.max_gpu_gb)  # where collectives can reach it
    return KVStore(cfg.kv, cfg.index, dtype, cfg.kv == "cpu", max_gpu_gb=cfg.max_gpu_gb)


def _text(word: str) -> str:
    return Path(word).read_text(encoding="utf-8") if len(word) < 4096 and Path(word).is_file() else word


def generate_text(cfg: Config, w: cluster.World) -> None:
    """Answer a prompt as a stream: the document is --prompt-file or --load-context, the question --prompt."""
    if cfg.model == "toy":
        raise BadInput("the toy knows no language. Pass --model smollm2, or a Hugging Face folder.")
    if cfg.prompt_file and not Path(cfg.prompt_file).is_file():
        raise FileNotFoundError(f"--prompt-file {cfg.prompt_file}: no such file")
    if cfg.save_context and w.size > 1:
        raise BadInput("--save-context writes the cache of one process. Leave torchrun out.")
    chat = Chat(cfg, w.device)
    document, question = _text(cfg.prompt_file) if cfg.prompt_file else "", _text(cfg.prompt)
    if not (document or question):
        raise BadInput("nothing to answer: pass --prompt TEXT or --prompt-file FILE")
    start = time.perf_counter()
    bar = functools.partial(report.progress, what="prefill", w=w)
    if cfg.load_context:
        store = KVStore.load(cfg.load_context, chat.model, device=cfg.kv, index=cfg.index, pin=cfg.kv == "cpu")
        ids = chat.encode("\n" + question + chat.tail)
        w.print(f"opened a context of {store.n} tokens in {time.perf_counter() - start:.2f} s")
    else:
        head = chat.encode(chat.head + document)
        tail = chat.encode((("\n" if document and question else "") + question) + chat.tail)
        if not document:
            head, tail = torch.cat([head, tail])[:-1], tail[-1:]
        _check_range(chat.model, len(head) + len(tail) + cfg.new_tokens, cfg.allow_extrapolation)
        store, ids = make_store(cfg, w), tail
        prefill(chat.model, head, store, cfg.chunk, cfg.mlp_splits, cfg.allow_extrapolation, bar)
        seconds = time.perf_counter() - start
        w.print(f"read {len(head)} tokens in {seconds:.1f} s ({len(head) / seconds:.0f} tokens/s), "
                f"cache {store.nbytes / 1e6:.1f} MB")  # fmt: skip
    if cfg.save_context and w.main:
        store.save(cfg.save_context)
        w.print(f"saved the context to {cfg.save_context}")
    said, times = [], []

    def hear(i: int) -> None:
        times.append(time.perf_counter())
        before = chat.decode(said)
        said.append(i)
        text = chat.decode(said)
        if w.main and i not in chat.stop and not text.endswith("\ufffd"):
            print(text[len(before.rstrip("\ufffd")) :], end="", flush=True)

    k = parse_k(cfg.k)
    if cfg.slope and not isinstance(k, list):
        k = layer_budgets(k, len(chat.model.layers), cfg.slope, store.n)
    generate(chat.model, ids, k, cfg.new_tokens, store=store, stop=chat.stop, hear=hear, share=cfg.share,
             max_suffix=cfg.max_suffix, candidates=cfg.candidates, sink=cfg.sink, recent=cfg.recent,
             allow_extrapolation=cfg.allow_extrapolation)  # fmt: skip
    rate = f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else "one token"
    w.print(f"\n{len(times)} tokens, {rate} after the first, k = {_name(cfg.k)} of {store.n} keys, "
            f"{report.device_name(w.device)}")  # fmt: skip


class Watch:
    """A store that also remembers the queries that were asked."""

    def __init__(self, store: KVStore):
        self.store, self.n, self.queries = store, store.n, {}

    def attend(self, layer: int, q: Tensor, *args, **how) -> Tensor:
        self.queries[layer] = q
        return self.store.attend(layer, q, *args, **how)


@torch.no_grad()
def analyze(cfg: Config, w: cluster.World) -> None:
    """Where attention goes: entropy, keys for 75 and 95 % of the mass, mass of the best k, per layer; and whether
    entropy tells how many keys a head needs for 95 % of its output."""
    run, shares = report.Run(cfg.out, cfg, w), (0.001, 0.005, 0.01, 0.02, 0.1)
    if cfg.model == "toy":
        model = toy_model(cfg, w, run)
        ids = toy_rows("single", cfg.context, 1, cluster.generator(cfg.seed, 4))[0][0]
        last = TAIL
    else:
        chat = Chat(cfg, w.device)
        text = _text(cfg.prompt_file or cfg.prompt) or "".join(
            ruler(cfg.tasks[0], cfg.context, cfg.seed, chat.tokenizer)[0]
        )
        model, ids, last = chat.model, chat.encode(chat.head + text + chat.tail)[: cfg.context], 8
    store = prefill(model, ids[:-last], KVStore(model.device, dtype=torch.float32), cfg.chunk,
                    allow_extrapolation=cfg.allow_extrapolation)  # fmt: skip
    watch, table, entropies, needs = Watch(store), [], [], []
    _advance(model, ids[-last:], watch, [1.0] * len(model.layers), Suffix(model, last))
    for i, q in watch.queries.items():
        k, v = store.rows(i)
        entropy, n75, n95 = attention_stats(q[None], k[None])
        p, order = dense_weights(q[None], k[None])[0].sort(dim=-1, descending=True)  # (Hq, T, N)
        mass = [p[..., : resolve_k(s, store.n)].sum(dim=-1).mean().item() for s in shares]
        need = torch.stack([_rows_needed(p[:, t], order[:, t], v) for t in range(last)], dim=1)  # (Hq, T)
        entropies.append(entropy.flatten())
        needs.append(need.flatten())
        run.log(layer=i, entropy=entropy.mean(), n75=n75.float().mean(), n95=n95.float().mean(),
                need=need.float().mean(), **{f"mass_{s}": m for s, m in zip(shares, mass, strict=True)})  # fmt: skip
        table.append([str(i), *(f"{x.float().mean():.2f}" for x in (entropy, n75, n95, need)), *mass])
    head = ["layer", "entropy", "keys for 75 %", "keys for 95 %", "keys for 95 % of output"]
    w.print(f"{store.n} keys, entropy in nats (at most {math.log(max(1, store.n)):.2f}), means over {last} queries")
    w.print(report.table([*head, *(f"mass of {100 * s:g} %" for s in shares)], table))
    rank = lambda x: torch.cat(x).argsort().argsort().float()
    corr = torch.corrcoef(torch.stack([rank(entropies), rank(needs)]))[0, 1].item()
    first, rest = entropies[0].mean().item(), torch.cat(entropies[1:]).mean().item()
    run.log(rank_correlation=corr)
    w.print(f"entropy of layer 0: {first:.2f}, of the others: {rest:.2f}. Rank correlation of entropy and the keys "
            f"a head needs for 95 % of its output: {corr:.3f} ({len(torch.cat(needs))} heads and queries)")  # fmt: skip


def _rows_needed(p: Tensor, order: Tensor, v: Tensor) -> Tensor:
    """Fewest best keys whose renormalised output lies within 5 % of the whole: p, order (Hq, N) sorted -> (Hq,)."""
    values = v.repeat_interleave(len(p) // len(v), dim=0).float().gather(1, order[..., None].expand(-1, -1, v.shape[2]))
    part = (p[..., None] * values).cumsum(dim=1)  # (Hq, N, D)
    whole = part[:, -1:]
    off = (part / p.cumsum(dim=1)[..., None] - whole).norm(dim=-1) > 0.05 * whole.norm(dim=-1)
    last_off = off.int() * torch.arange(1, p.shape[1] + 1, device=p.device)
    return last_off.amax(dim=1) + 1


# ---- bench

SHAPES = {  # layers, query heads, key/value heads, head width, bytes of the weights in bf16
    "laptop": (1, 8, 2, 64, 0), "llama-3.2-1b": (16, 32, 8, 64, 2.47e9), "llama-3.1-8b": (32, 32, 8, 128, 16.06e9),
}  # fmt: skip


def synthetic(Hk: int, n: int, D: int, device, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Keys, unit Gaussian with 4 channels 8 times as large, and values, (1, Hk, n, D)."""
    g = torch.Generator(device).manual_seed(seed)
    k, v = (torch.randn(1, Hk, n, D, generator=g, device=device).to(dtype) for _ in range(2))
    k[..., :4] *= 8
    return k, v


def flat_search(q: Tensor, k: Tensor, v: Tensor, top: int) -> Tensor:
    """The reference's path in torch: for each query head one exact search of its own, then the gather."""
    out, G = [], q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        s, i = torch.mv(k[0, h // G], q[0, h, 0]).topk(top)
        out.append((s * q.shape[-1] ** -0.5).softmax(dim=0) @ v[0, h // G, i])
    return torch.stack(out)[None, :, None]


@torch.no_grad()
def bench(cfg: Config, w: cluster.World) -> None:
    """One layer's decode step against dense attention, then whole stores, all in one process and interleaved."""
    cuda, dev = w.device.type == "cuda", w.device
    L, Hq, Hk, D, weights = SHAPES[cfg.shape]
    n, k, dtype = cfg.context, parse_k(cfg.k), torch.bfloat16 if cuda else torch.float32
    top, G = resolve_k(k, n), Hq // Hk
    keys, values = synthetic(Hk, n, D, dev, dtype, cfg.seed)
    q = torch.randn(1, Hq, 1, D, generator=cluster.generator(cfg.seed)).to(dev, dtype)
    wide = [x.repeat_interleave(G, dim=1) for x in (keys, values)]
    sdpa, size = F.scaled_dot_product_attention, dtype.itemsize
    rate, _ = report.ceilings(dev, dtype)
    whole, picked = 2 * Hk * n * D * size, Hk * n * D * size + Hq * top * D * size
    cases = {
        "SDPA, enable_gqa": (lambda: sdpa(q, keys, values, enable_gqa=True), whole),
        "SDPA, expanded heads": (lambda: sdpa(q, *wide), whole * G),
        "one exact search per query head": (lambda: flat_search(q, keys, values, top), picked),
        "topk_attention": (lambda: topk_attention(q, keys, values, k), picked),
        "topk_attention, group-shared": (lambda: topk_attention(q, keys, values, k, share="group"), picked),
    }  # fmt: skip
    if not cuda:
        store = KVStore(index="q8", dtype=dtype)
        store.put(0, keys[0], values[0])
        none = q.new_zeros(Hk, 0, D)
        proven = Hk * n * D + Hq * top * D * size * (cfg.candidates + 1)  # codes, candidates and values
        cases["KVStore search, q8 proven exact"] = (
            lambda: store.attend(0, q[0], top, none, none, candidates=cfg.candidates)[None], proven)  # fmt: skip
    if cuda and kernels.available():
        cases["dense split kernel"] = (lambda: kernels.dense_decode_triton(q, keys, values, D**-0.5), whole)
    else:
        half = [x.to(torch.bfloat16) for x in (q, keys, values)]
        cases["topk_attention, bf16 cache"] = (lambda: topk_attention(*half, k), picked // 2)
    w.print(f"{report.device_name(dev)}, {dtype}, N={n} Hq={Hq} Hk={Hk} D={D}, k={top}, one layer; copies at "
            f"{rate / 1e9:.0f} GB/s")  # fmt: skip
    oracle = flat_search(q.float(), keys.float(), values.float(), top)
    seconds = report.timed({name: fn for name, (fn, _) in cases.items()}, dev, 20)
    dense = min(t for name, (t, _) in seconds.items() if "SDPA" in name or "dense" in name)
    flat, rows = seconds["one exact search per query head"][0], []
    for name, (t, spread) in seconds.items():
        off = f"{(cases[name][0]().float() - oracle).abs().max():.1e}" if "search" in name or "topk" in name else "-"
        floor = cases[name][1] / rate
        rows.append([name, f"{t * 1e3:.2f} ± {spread * 1e3:.2f}", f"{dense / t:.2f}", f"{flat / t:.2f}",
                     f"{report.peak_bytes(cases[name][0], dev) / 2**20:.1f}", f"{floor / t:.0%}", off])  # fmt: skip
    w.print(
        report.table(
            ["decode step", "ms", "x fastest dense", "x search per head", "peak MiB", "of floor", "max |diff|"], rows
        )
    )
    wide.clear()
    found = {"device": report.device_name(dev), "shape": cfg.shape, "context": n, "k": top, "bytes_per_second": rate,
             "layer": {name: {"seconds": t, "spread": s} for name, (t, s) in seconds.items()}}  # fmt: skip
    found["stores"] = bench_stores(cfg, w, L, weights, q, top)
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", found)


def bench_stores(cfg: Config, w: cluster.World, L: int, weights: float, q: Tensor, top: int) -> dict:
    """A token's attention over all L layers from stores of each kind: time, recall, memory."""
    dev, (Hk, D), n = w.device, (SHAPES[cfg.shape][2], SHAPES[cfg.shape][3]), cfg.context
    cuda, rows, found = dev.type == "cuda", [], {}
    kinds = ([("cuda", "exact", "head"), ("cuda", "q4", "head"), ("cpu", "q4", "head"), ("cpu", "q4", "group"),
              ("cpu", "exact", "head")] if cuda else [("cpu", i, "head") for i in INDEXES])  # fmt: skip
    for home, index, share in kinds:
        label = f"{'HBM' if home == 'cuda' else 'host'}, {index}" + (", group-shared" if share == "group" else "")
        kv, copy = cache_bytes(
            {"num_hidden_layers": L, "num_key_value_heads": Hk, "head_dim": D}, n, index, torch.bfloat16
        )
        if home == "cpu" and kv + (0 if cuda else copy) > 0.9 * available_bytes():
            rows.append([label, f"needs {kv / 1e9:.1f} GB of host memory", *["-"] * 5])
            continue
        if cuda:
            torch.cuda.reset_peak_memory_stats(dev)
        base = torch.cuda.memory_allocated(dev) if cuda else 0
        store = KVStore(home, index, torch.bfloat16, pin=cuda and home == "cpu")
        for layer in range(L):
            store.put(layer, *(x[0] for x in synthetic(Hk, n, D, dev, torch.bfloat16, cfg.seed + layer)))
        rows_kept = RowCache(store, dev) if cuda and home == "cpu" else None
        ks = q.new_zeros(Hk, 1, D)
        g, step = torch.Generator(dev).manual_seed(1), [q[0]]

        def token(store=store, cache=rows_kept, share=share, step=step, g=g, ks=ks) -> None:
            step[0] = 0.99 * step[0] + 0.14 * torch.randn(q[0].shape, generator=g, device=dev, dtype=q.dtype)
            for layer in range(L):  # a query near the last one, as in text
                store.attend(layer, step[0], top, ks, ks, share=share, candidates=cfg.candidates, cache=cache)

        if cuda:
            torch.cuda.reset_peak_memory_stats(dev)  # without the synthetic keys as they were made
        seconds, spread = report.timed({label: token}, dev, cfg.new_tokens if cuda else 5)[label]
        peak = (torch.cuda.max_memory_allocated(dev) - base + weights) / 2**30 if cuda else store.nbytes / 2**30
        store.recall = []
        store.search(0, step[0].to(home), top, cfg.candidates)
        recall = store.recall[0] if store.recall else 1.0
        hits = f"{cache.hits / max(1, cache.asked):.0%}" if (cache := rows_kept) else "-"
        rows.append([label, f"{seconds * 1e3:.2f} ± {spread * 1e3:.2f}", f"{1 / seconds:.1f}", f"{recall:.4f}",
                     f"{store.nbytes / 2**20:.0f}", f"{peak:.2f}", hits])  # fmt: skip
        found[label] = {"seconds": seconds, "spread": spread, "recall": recall, "bytes": store.nbytes, "peak_gib": peak}
        del store, rows_kept, cache, token
    last = "peak GPU GiB with weights" if cuda else "GiB held"
    w.print(
        "\n"
        + report.table([f"store, {L} layers", "ms per token", "tokens/s", "recall", "MiB", last, "rows reused"], rows)
    )
    return found


def main(cfg: Config) -> None:
    """Run cfg.mode. BadInput: what the user can mend, memory that does not suffice included."""
    modes = {
        "demo": demo,
        "train": train,
        "eval": evaluate,
        "generate": generate_text,
        "analyze": analyze,
        "bench": bench,
    }
    with cluster.world(cfg.device) as w:
        try:
            modes[cfg.mode](cfg, w)
        except MemoryError as e:
            raise BadInput(str(e)) from e


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
