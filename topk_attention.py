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
         Exact search by block maxima, or by an 8-bit scan that proves its choice; a 4-bit scan,
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
    python topk_attention.py bench --preset h200                        # a million tokens on one GPU (not yet run)

Expect   "k = 2 %" within 95 % of dense at 512, 2048 and 8192 tokens, the control at most 0.12; on CPU with seed 0.
Writes   results/topk_attention/: metrics.jsonl, claim.json, topk_attention.png; checkpoint.pt (train), bench.json.
"""

import contextlib
import functools
import hashlib
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

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.kernels import decode_attention as kernels, use_kernels
from common.text import corpus
from common.weights import open_weights, package, rope_frequencies, rotate

SHARES = ("head", "group")
INDEXES = ("exact", "q8", "q4", "sign", "ivf")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", ("demo", "train", "eval", "generate", "analyze", "bench"), positional=True)
    preset: str = opt("laptop", "defaults for a setting; flags win over it", choices=("laptop", "h200", "h200-8b"))
    model: str = opt("toy", "toy (trained here), smollm2, a Hugging Face folder, or a GGUF file")
    # the method
    k: str = opt("0.01", "keys per query: a count, a fraction with a point in it, dense, or one per layer with commas")
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
    context: int = opt(0, "eval, analyze: tokens of a prompt; bench: keys; 0 is 2048, for bench 65536")
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
        self.context = self.context or (65536 if self.mode == "bench" else 2048)
        for word in (self.k, *self.ks):
            parse_k(word)
        for name in ("candidates", "chunk", "new_tokens", "context", "samples", "sink", "recent"):
            if getattr(self, name) < (least := 0 if name in ("sink", "recent") else 1):
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.slope < 1:
            raise ValueError(f"--slope must be in [0, 1), got {self.slope}")
        if len(self.steps) != 2 or min(self.steps) < 0 or sum(self.steps) < 1:
            raise ValueError(f"--steps are two counts, such as 600 120, got {self.steps}")
        if min(self.contexts) < 64:
            raise ValueError(f"--contexts must be at least 64 tokens, got {self.contexts}")


PRESETS = {
    "laptop": {},
    "h200": {"mode": "bench", "shape": "llama-3.2-1b", "context": 2**20, "new_tokens": 32},
    "h200-8b": {"mode": "bench", "shape": "llama-3.1-8b", "context": 2**19, "new_tokens": 32},
}  # fmt: skip


# ---- the method: choose k rows per query, attend to them and to the suffix under one denominator
#
# N prefix rows, retrieved from          M suffix rows, always attended        T queries, the last T rows of the suffix
# Hq query heads, Hk key/value heads     G = Hq / Hk query heads share one     D head width
#
# o_h = softmax([q_h K_I^T, q_h K_suffix^T] / sqrt(D)) [V_I; V_suffix],   I = the k rows with the largest q_h K^T
#
# Inside, the queries of one key/value head are R = G T rows: q (Hk, R, D), scores (Hk, R, N).


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
    ks, vs = _check_heads(q, k, v, k_suffix, v_suffix)
    B, N = k.shape[0], k.shape[2]
    for what, got, known in (("share", share, SHARES), ("backend", backend, ("auto", "torch", "triton"))):
        if got not in known:
            raise ValueError(f"unknown {what} {got!r}; choose from {', '.join(known)}")
    if min(sink, recent) < 0:
        raise ValueError(f"sink and recent must not be negative, got {sink} and {recent}")
    used = [N] * B if lengths is None else torch.as_tensor(lengths).tolist()
    if len(used) != B or not all(0 <= n <= N for n in used):
        raise ValueError(f"lengths must be {B} numbers in 0..{N}, got {used}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tops = [resolve_k(topk, n) for n in used]  # also the check for N = 0
    able = share == "head" and not (sink or recent or return_indices) and q.dtype != torch.float64
    if backend == "triton" or (backend == "auto" and q.is_cuda and _kernels_take(q, k) and able and N > 0):
        if not able:
            raise ValueError("backend 'triton' does share='head' without sink, recent or return_indices, below float64")
        o, l = _by_kernels(q, k, v, tops, used, ks, vs, scale)
        return (o.to(q.dtype), l) if return_lse else o.to(q.dtype)
    found = []
    for b, (n, top) in enumerate(zip(used, tops, strict=True)):
        where, ends = f"sequence {b}" if check_finite else "", (min(sink, n), min(recent, n - min(sink, n)))
        find = functools.partial(_find, k[b, :, :n], v[b, :, :n], min(top, n - sum(ends)), scale, share, *ends, where)
        attended = min(n, top + sum(ends))
        also = where and where + ", suffix"
        found.append(_attend(q[b], q[b], find, n, attended, ks[b], vs[b], scale, also, return_indices))
    return _packed(found, q.dtype, return_lse, return_indices)


def _kernels_take(q: Tensor, k: Tensor) -> bool:
    """Whether scores of q and k are the Triton kernels' to make."""
    known = q.dtype in kernels.DTYPES and k.dtype in (q.dtype, torch.float32, torch.bfloat16)
    return use_kernels(q.device) and known and k.shape[-1] * k.element_size() <= 512


def _by_kernels(q, k, v, tops: list, used: list, ks, vs, scale: float) -> tuple[Tensor, Tensor]:
    """Per sequence: scores, torch.topk, attention to the chosen rows and, in torch, to the suffix -> o, l in fp32."""
    found, T = [], q.shape[2]
    for b, (top, n) in enumerate(zip(tops, used, strict=True)):
        rows = q[b].reshape(k.shape[1], -1, q.shape[3])  # (Hk, R, D)
        score, index = kernels.scores(rows, k[b, :, :n]).topk(top, sorted=False)
        chosen = kernels.attend(score, index, v[b, :, :n], scale)
        found.append(merge_lse(*chosen, *_suffix_part(rows, ks[b], vs[b], scale, T)))
    o, l = (torch.stack(x) for x in zip(*found, strict=True))
    return o.reshape(q.shape), l.reshape(q.shape[:3])


def _find(k, v, top, scale, share, sink, recent, where, q, T) -> tuple[Tensor, Tensor, Tensor]:
    """What q (Hk, G T, D) attends of k, v (Hk, N, D): scores, indices (Hk, R, n), values (Hk, R, n, D) or v whole."""
    value, index = _choose(_scores(q, k, where), top, scale, T, share, sink, recent)
    return value, index, v if index.shape[-1] == k.shape[1] else _rows(v, index)


def _choose(s: Tensor, top: int, scale: float, T: int, share: str, sink: int, recent: int) -> tuple[Tensor, Tensor]:
    """From raw scores s (Hk, G T, N) the scores and indices, (Hk, R, n), of the `top` best rows, the first `sink` and
    the last `recent`. share "group": a group's heads take the rows with the largest sum of their probabilities."""
    N = s.shape[2]
    if top + sink + recent >= N:  # everything
        return s, torch.arange(N, device=s.device).expand_as(s)
    middle = s[..., sink : N - recent]
    if share == "group":
        mass = (s * scale).softmax(dim=-1).unflatten(1, (-1, T)).sum(dim=1)  # (Hk, T, N)
        index = exact_topk(mass[..., sink : N - recent], top)[1].repeat(1, s.shape[1] // T, 1)  # row g T + t reads t's
        value = middle.gather(-1, index)
    else:
        value, index = exact_topk(middle, top)
    if sink or recent:
        ends = _ends(N, sink, recent, s.device)
        value = torch.cat([value, s[..., ends]], dim=-1)
        index = torch.cat([index + sink, ends.expand(*s.shape[:2], -1)], dim=-1)
    return value, index


def _ends(N: int, sink: int, recent: int, device) -> Tensor:
    return torch.cat([torch.arange(sink, device=device), torch.arange(N - recent, N, device=device)])


SCRATCH = 2**28  # bytes that scores and gathered rows of one round of queries may take


def _attend(q, asked, find, N: int, n: int, ks, vs, scale: float, where: str = "", want_index=False) -> list[Tensor]:
    """Attention of q (Hq, T, D) to what `find` names, n of N rows per query, and to the suffix ks, vs (Hk, M, D), under
    one denominator -> o (Hq, T, D), l (Hq, T) [, index (Hq, T, n)].

    asked: q where the prefix lives. find(asked as (Hk, R, D), queries) gets as many queries as fit into SCRATCH. Where
    the prefix is in host memory, the GPU attends to the suffix while the host searches.
    """
    (Hq, T, D), (Hk, M, _), out = q.shape, ks.shape, []
    step = max(1, SCRATCH // max(1, Hq * 4 * (N + (n * D if n < N else 0))))
    for a in range(0, T, step):
        e = min(T, a + step)
        seen = M - T + e  # suffix rows that the last of these queries sees
        last = _suffix_part(q[:, a:e].reshape(Hk, -1, D), ks[:, :seen], vs[:, :seen], scale, e - a, where)
        score, index, values = find(asked[:, a:e].reshape(Hk, -1, D), e - a)
        first = _part(score.to(q.device, non_blocking=True) * scale, values.to(q.device, non_blocking=True))
        found = (*merge_lse(*first, *last), index)[: 3 if want_index else 2]
        out.append([x.reshape(Hq, e - a, *x.shape[2:]) for x in found])
    return [torch.cat(x, dim=1) for x in zip(*out, strict=True)]


def merge_lse(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint key sets: outputs (..., D), log-sum-exps (...). An empty set has l = -inf."""
    l = torch.logaddexp(l1, l2)
    base = torch.where(l == -math.inf, torch.zeros_like(l), l)
    return (l1 - base).exp()[..., None] * o1 + (l2 - base).exp()[..., None] * o2, l


def _part(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over one set of rows: scaled s (Hk, R, n), v (Hk, n, D) or per row (Hk, R, n, D).

    Returns the output (Hk, R, D) and the log-sum-exp (Hk, R); 0 and -inf where there are no rows.
    """
    if s.shape[-1] == 0:
        return s.new_zeros(*s.shape[:2], v.shape[-1]), s.new_full(s.shape[:2], -math.inf)
    l = s.logsumexp(dim=-1)
    p = (s - l.clamp(min=torch.finfo(s.dtype).min)[..., None]).exp()
    return torch.bmm(p, v.to(s.dtype)) if v.ndim == 3 else torch.matmul(p[:, :, None], v.to(s.dtype))[:, :, 0], l


def _suffix_part(q: Tensor, k: Tensor, v: Tensor, scale: float, T: int, check: str = "") -> tuple[Tensor, Tensor]:
    """Causal attention of the last T of M rows to all M: q (Hk, G T, D), k, v (Hk, M, D) -> o (Hk, R, D), l (Hk, R)."""
    s, M = _scores(q, k, check) * scale, k.shape[1]  # (Hk, R, M)
    if T > 1 and M:
        hidden = torch.ones(T, M, dtype=torch.bool, device=q.device).triu(M - T + 1)  # query i sees rows 0..M-T+i
        s = s.unflatten(1, (-1, T)).masked_fill(hidden, -math.inf).flatten(1, 2)
    return _part(s, v)


def _precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _scores(q: Tensor, k: Tensor, check: str = "") -> Tensor:
    """q (Hk, R, D) . k (Hk, n, D) -> raw scores (Hk, R, n), a transposed view, in fp32 (fp64 for fp64).

    Each key is read once for all rows of its head. Keys below fp32 are widened a block at a time, never as a whole.
    `check`: words for what is being read, see _check_finite.
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
    """ValueError: q or k, of which s are scores, holds NaN or infinity. A finite sum clears both; otherwise they
    are looked through. Left out on a GPU, where looking would stall the stream."""
    if not s.is_cuda and not math.isfinite(s.sum()):
        for name, x in (("q", q), ("K", k)):
            if not all(torch.isfinite(part.float()).all() for part in x.split(65536, dim=1)):
                raise ValueError(f"{name} of {where} holds NaN or infinity. Look for what wrote it there.")


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (Hk, N, D) at index (Hk, R, n) -> (Hk, R, n, D), one pass per head; no other row is touched."""
    raw = x.view(torch.uint8) if x.element_size() == 1 else x  # fp8 has no index_select
    out = torch.empty(*index.shape, x.shape[-1], dtype=raw.dtype, device=x.device)
    for h in range(len(x)):
        torch.index_select(raw[h], 0, index[h].flatten(), out=out[h].view(-1, x.shape[-1]))
    return out.view(x.dtype)


def _packed(found: list, dtype: torch.dtype, return_lse: bool, return_indices: bool):
    """Sequences' (o, l, index) as what topk_attention returns; indices of different lengths are padded with -1."""
    o, l, *index = zip(*found, strict=True)
    result = [torch.stack(o).to(dtype)] + ([torch.stack(l)] if return_lse else [])
    if return_indices:
        width = max(i.shape[-1] for i in index[0])
        result.append(torch.stack([F.pad(i, (0, width - i.shape[-1]), value=-1) for i in index[0]]))
    return result[0] if len(result) == 1 else tuple(result)


def _check_heads(q: Tensor, k: Tensor, v: Tensor, k_suffix, v_suffix) -> tuple[Tensor, Tensor]:
    """The suffix, an empty one if None is given. ValueError: what topk_attention cannot join, with both shapes."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q (B, Hq, T, D), k and v (B, Hk, N, D) needed, got {shapes}")
    if (k_suffix is None) != (v_suffix is None):
        raise ValueError("k_suffix and v_suffix: give both, or neither")
    ks, vs = (k[:, :, :0], v[:, :, :0]) if k_suffix is None else (k_suffix, v_suffix)
    B, Hk, _, D = k.shape
    if q.shape[1] % Hk:
        raise ValueError(f"{q.shape[1]} query heads do not divide over {Hk} key/value heads: q {tuple(q.shape)}, "
                         f"k {tuple(k.shape)}")  # fmt: skip
    for name, x in {"k": k, "v": v, "k_suffix": ks, "v_suffix": vs}.items():
        what = f"{name} {tuple(x.shape)}"
        if x.ndim != 4 or q.shape[0] != B or q.shape[3] != D or (*x.shape[:2], x.shape[3]) != (B, Hk, D):
            raise ValueError(f"{what} does not fit q {tuple(q.shape)} and k {tuple(k.shape)}")
        if x.device != q.device or x.dtype != q.dtype:
            raise ValueError(f"{what} is {x.dtype} on {x.device}, q {tuple(q.shape)} is {q.dtype} on {q.device}. "
                             "Convert one of them.")  # fmt: skip
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(f"{what} has stride {x.stride(-1)} in its last dimension; 1 is needed, as a copy of the "
                             "cache would not be cheap. Lay it out as (..., N, D).")  # fmt: skip
    if ks.shape != vs.shape or (k_suffix is not None and 0 < ks.shape[2] < q.shape[2]):
        raise ValueError(f"the suffix holds the queries' own rows: k_suffix {tuple(ks.shape)}, "
                         f"v_suffix {tuple(vs.shape)}, q {tuple(q.shape)}")  # fmt: skip
    return ks, vs


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def resolve_k(k, n: int) -> int:
    """Rows that k means over n: an int is a count, a float in (0, 1] a fraction. ValueError: anything else."""
    whole = hasattr(k, "__index__") and not isinstance(k, bool) and operator.index(k) >= 1
    if not whole and not (isinstance(k, float) and 0 < k <= 1):
        raise BadInput(f"k must be an int >= 1 or a fraction in (0, 1], got {k!r}")
    if whole and k > n > 0:
        _warn_once(f"k = {k} exceeds the {n} rows there are: this is dense attention")
    return min(n, operator.index(k) if whole else max(1, math.ceil(k * n - 1e-9)))


def layer_budgets(k, n_layers: int, slope: float = 0.0, n_ctx: int | None = None) -> list[int]:
    """k per layer, growing linearly by `slope` in [0, 1) around the same mean; sum = k n_layers.

    A fraction k needs n_ctx. Each lies in 1..n_ctx. ValueError: k, slope or n_ctx is out of range.
    """
    if not 0 <= slope < 1:
        raise ValueError(f"slope must be in [0, 1), got {slope}")
    if isinstance(k, float) and n_ctx is None:
        raise ValueError(f"a fraction k = {k} needs n_ctx, the number of rows it is a fraction of")
    most = sys.maxsize if n_ctx is None else max(1, n_ctx)
    top = resolve_k(k, most)
    tilt = [2 * i / (n_layers - 1) - 1 for i in range(n_layers)] if n_layers > 1 else [0.0]
    out = [min(most, max(1, round(top * (1 + slope * t)))) for t in tilt]
    while lack := top * n_layers - sum(out):  # rounding and clipping, spread over the last layers that have room
        step = 1 if lack > 0 else -1
        room = [i for i in reversed(range(n_layers)) if 1 <= out[i] + step <= most]
        for i in room[: abs(lack)]:
            out[i] += step * max(1, abs(lack) // len(room))
            out[i] = min(most, max(1, out[i]))
    return out


def exact_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last dimension, in any order: scores (..., N) -> values, indices int64, both (..., k).

    A row of the k largest lies in one of the k blocks with the largest maxima, so two short selections do for one long
    one. ValueError: k is not in 0..N.
    """
    n = scores.shape[-1]
    if isinstance(k, bool) or not 0 <= k <= n:
        raise ValueError(f"k must be between 0 and the {n} scores, got {k!r}")
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


def dense_weights(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale): q (B, Hq, T, D), k (B, Hk, N, D) -> (B, Hq, T, N) in fp32 (fp64 for fp64)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = [_scores(x.reshape(len(y), -1, q.shape[-1]), y) for x, y in zip(q, k, strict=True)]
    return (torch.stack(rows) * scale).softmax(dim=-1).reshape(*q.shape[:3], -1)


@torch.no_grad()
def attention_stats(q: Tensor, k: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the dense weights of q (B, Hq, T, D) over k (B, Hk, N, D): entropy in nats, and the fewest keys that hold
    75 % and 95 % of the mass; three (B, Hq, T)."""
    p = dense_weights(q, k, scale)
    mass = p.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    fewest = lambda share: (mass < share).sum(dim=-1).clamp(max=k.shape[2] - 1) + 1
    return -torch.xlogy(p, p).sum(dim=-1), fewest(0.75), fewest(0.95)


# ---- the method over processes: each holds a slice of the sequence


@torch.no_grad()
def sharded_topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk, *, k_suffix: Tensor | None = None, v_suffix: Tensor | None = None,
    scale: float | None = None, group=None, return_lse: bool = False, return_indices: bool = False,
):  # fmt: skip
    """topk_attention whose prefix is cut over the ranks of `group`: k, v (B, Hk, n, D) are this rank's slice, slices in
    rank order, lengths free; q and the suffix are equal on all ranks. Every rank returns the whole result, indices as
    rows of the whole prefix. topk counts over all ranks. Collective. Errors as topk_attention.
    """
    ks, vs = _check_heads(q, k, v, k_suffix, v_suffix)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = [_sharded_one(q[b], k[b], v[b], topk, ks[b], vs[b], scale, group, return_indices) for b in range(len(q))]
    return _packed(found, q.dtype, return_lse, return_indices)


def _sharded_one(q, k, v, topk, ks, vs, scale, group=None, want_index: bool = False) -> tuple:
    """sharded_topk_attention of one sequence: q (Hq, T, D), this rank's k, v (Hk, n, D) -> o, l, index or None.

    The ranks' best scores are gathered, and the attention of each to what survives of its own.
    """
    (Hq, T, D), Hk, rank, size = q.shape, len(k), dist.get_rank(group), dist.get_world_size(group)
    n = torch.zeros(size, dtype=torch.long, device=q.device)
    n[rank] = k.shape[1]
    dist.all_reduce(n, group=group)
    top, rows = resolve_k(topk, int(n.sum())), q.reshape(Hk, -1, D)  # (Hk, R, D)
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
    s = value[..., :most].masked_fill(torch.arange(most, device=q.device) >= mine, -math.inf)
    o, l = _part(s * scale, _rows(v, index[..., :most]))
    parts = [torch.empty_like(F.pad(o, (0, 1))) for _ in range(size)]
    dist.all_gather(parts, torch.cat([o, l[..., None]], dim=-1), group=group)
    o, l = _suffix_part(rows, ks, vs, scale, T)  # every rank holds the suffix: it counts once
    for part in parts:
        o, l = merge_lse(o, l, part[..., :D], part[..., D])
    if want_index:
        index = gathered(index + n[:rank].sum(), -1).gather(-1, best).reshape(Hq, T, top)
    return o.reshape(Hq, T, D), l.reshape(Hq, T), index if want_index else None


# ---- approximate first passes: what is scanned instead of the keys
#
# An index takes in the keys of a layer by add(k), k (Hk, all rows so far, D); n of them are in it. candidates(q, count,
# top, select): q (Hk, R, D) -> rows (Hk, R, count), and whether the best `top` are proven to be among them (Hk, R), or
# None. select(scores (..., n), count) -> values, indices names the largest of a row.

GROUP = 64  # rows that share a scale and an offset


class Quantised:
    """A small copy of the keys: q4 (x - low) / scale in 4 bits, scale and offset per 64 rows and channel, channels d
    and d + D/2 in one byte; or sign, 1 bit per channel and the row's norm. Rows that do not fill a group of 64 stay
    out; the store searches them exactly.
    """

    def __init__(self, kind: str, Hk: int, D: int, device):
        if D % (8 if kind == "sign" else 2):
            raise ValueError(f"index {kind!r} packs several channels into a byte: head width {D} does not divide")
        self.kind, self.D, self.device, self.n, self.parts = kind, D, device, 0, []

    def add(self, k: Tensor) -> None:
        new, end, pack = [], k.shape[1] // GROUP * GROUP, self._signs if self.kind == "sign" else self._levels
        for a in range(self.n, end, 1024 * GROUP):  # a block at a time
            new.append(pack(k[:, a : min(end, a + 1024 * GROUP)].to(self.device).float()))
        if new:
            blocks = [self.parts, *new] if self.n else new
            self.parts, self.n = [torch.cat(part, dim=1) for part in zip(*blocks, strict=True)], end

    def _signs(self, x: Tensor) -> tuple[Tensor, ...]:
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

    def candidates(self, q: Tensor, count: int, top: int, select=torch.topk) -> tuple[Tensor, None]:
        s = torch.empty(len(q), q.shape[1], self.n, device=q.device)
        for a in range(0, self.n, 4096):
            e = min(self.n, a + 4096)
            torch.bmm(q, self.widen(a, e).transpose(1, 2), out=s[..., a:e])
        return select(s, count)[1], None


class Int8:
    """Keys in 8 bits, scaled per head and channel, that prove what they find.

    With k = scale * code + e, |e_d| <= error_d, the integer score is off by no more than sum_d |q_d| error_d. So the
    rows left out of the candidates are worse than the best `top` of them as soon as the two integer scores differ by
    twice that, and the exact scores of the candidates then give the exact choice.
    """

    def __init__(self, Hk: int, D: int, device):
        if D % 8 or D > 512:
            raise ValueError(f"index 'q8' takes 8 channels at a time, 512 at most: head width {D} does not fit")
        self.n = 0
        self.parts = [torch.empty(Hk, 0, D, dtype=torch.int8, device=device), *torch.zeros(2, Hk, 1, D, device=device)]

    def add(self, k: Tensor) -> None:
        """Codes of the new rows; of all rows anew if the new ones exceed the scale."""
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

    def candidates(self, q: Tensor, count: int, top: int, select=torch.topk) -> tuple[Tensor, Tensor]:
        """Rows (Hk, R, count) by integer scores, and where the bound proves that the best `top` are among them."""
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
        score, index = select(s.transpose(1, 2), count)  # (Hk, R, count)
        off = (q.abs() * error).sum(-1) + 127 * (p - unit * (high + low / 254)).abs().sum(-1)  # (Hk, R)
        gap = (score.topk(top, dim=-1).values[..., -1] - score.amin(dim=-1)) * unit[..., 0] / 254
        return index, gap > 2.001 * off


class Clusters:
    """An inverted-file index: rows in lists around spherical k-means centres; a query reads the lists nearest to it.

    ceil(n / 1000) lists, ceil(sqrt n) above 900 000 rows, 8 read, centres from the first 100 000 rows: the settings of
    the paper's released code. Rows added later stay out until they are a quarter of the rest.
    """

    probes = 8

    def __init__(self, Hk: int, D: int, device):
        self.n, self.device, self.parts = 0, device, []  # parts: centres, rows list by list, where each list starts

    def add(self, k: Tensor) -> None:
        """Cluster k (Hk, n, D) anew once it has grown by a quarter."""
        n = k.shape[1]
        if n < max(1, 1.25 * self.n):
            return
        lists = math.ceil(n / 1000) if n <= 900_000 else math.ceil(n**0.5)
        g, found = cluster.generator(n), []
        for keys in k:  # a head
            unit = lambda a, e, keys=keys: F.normalize(keys[a:e].to(self.device).float(), dim=-1)
            train = unit(0, 100_000)
            c = train[torch.randperm(len(train), generator=g)[:lists].to(train.device)]
            for _ in range(8):
                home = (train @ c.T).argmax(dim=1)
                c = F.normalize(torch.zeros_like(c).index_add_(0, home, train) + 1e-6 * c, dim=-1)
            home = torch.cat([(unit(a, a + 65536) @ c.T).argmax(dim=1) for a in range(0, n, 65536)]).cpu()
            found.append((c, home.argsort(stable=True), F.pad(home.bincount(minlength=lists).cumsum(0), (1, 0))))
        self.parts, self.n = [torch.stack(part) for part in zip(*found, strict=True)], n

    def candidates(self, q: Tensor, count: int, top: int, select=torch.topk) -> tuple[Tensor, None]:
        """All members of the lists that are read, padded with -1, whatever `count`."""
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


class RowCache:
    """Value rows of the last step kept on the GPU: neighbouring steps choose mostly the same rows, so only the new ones
    travel, on a stream of their own. Exact: a row is reused when its index is chosen again. hits and asked count rows.

    store.rows(layer) gives keys and values (Hk, N, D), store.gather(layer, idx) value rows. Rows must keep their place.
    """

    def __init__(self, store, device: torch.device):
        self.store, self.device, self.last, self.hits, self.asked = store, device, {}, 0, 0
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, layer: int, idx: Tensor) -> Tensor:
        """store.gather(layer, idx) on the cache's device: idx (Hq, 1, k) -> (Hq, 1, k, D)."""
        if idx.shape[1] != 1:
            return self.store.gather(layer, idx).to(self.device)
        values, idx, (Hq, _, k) = self.store.rows(layer)[1], idx.clamp(min=0), idx.shape
        v = values.view(torch.uint8) if values.element_size() == 1 else values  # fp8 has no index_select
        flat = (idx[:, 0] * Hq + torch.arange(Hq, device=idx.device)[:, None]).flatten()  # row and head
        rows = torch.empty(len(flat), v.shape[2], dtype=v.dtype, device=self.device)
        old, kept = self.last.get(layer, (flat[:0], rows[:0]))
        place = torch.searchsorted(old, flat).clamp(max=max(0, len(old) - 1))
        hit = old[place] == flat if len(old) else torch.zeros_like(flat, dtype=torch.bool)
        new, again = (~hit).nonzero()[:, 0], hit.nonzero()[:, 0]
        head = (new // k) // (Hq // len(v))
        fresh = torch.empty(len(new), v.shape[2], dtype=v.dtype, pin_memory=self.copies is not None)
        for h in range(len(v)):
            mine = head == h
            fresh[mine] = v[h].index_select(0, idx.flatten()[new[mine]])
        with torch.cuda.stream(self.copies) if self.copies else contextlib.nullcontext():
            moved, where = fresh.to(self.device, non_blocking=True), new.to(self.device, non_blocking=True)
        if len(old):
            rows[again.to(self.device)] = kept[place[again].to(self.device)]
        if self.copies:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
            for x in (moved, where):
                x.record_stream(torch.cuda.current_stream(self.device))
        rows[where] = moved
        order = flat.argsort()
        self.last[layer] = (flat[order], rows[order.to(self.device)])
        self.hits, self.asked = self.hits + len(again), self.asked + len(flat)
        return rows.view(values.dtype).reshape(Hq, 1, k, -1)


# ---- the cache: keys and values of one sequence, in host memory or on a GPU


class KVStore:
    """Keys and values of one sequence, per layer (Hk, N, D), and what finds the best keys. Append-only: rows keep their
    place. device: where they live. index: exact, or a first pass by q8, q4, sign or ivf, whose candidates are scored
    exactly; index_device: where its copy lives (by default the GPU, for a pinned store). dtype: of the rows; fp8 counts
    as storage only. pin: page-locked host memory, if there is a GPU. max_gpu_gb: refuse to grow past it; 0 is no limit.
    """

    ranks = 1  # processes that share the rows

    def __init__(self, device="cpu", index: str = "exact", dtype: torch.dtype = torch.bfloat16, pin: bool = False, *,
                 index_device=None, max_gpu_gb: float = 0.0):  # fmt: skip
        if index not in INDEXES:
            raise ValueError(f"unknown index {index!r}; choose from {', '.join(INDEXES)}")
        self.device, self.kind, self.dtype, self.max_gpu_gb = torch.device(device), index, dtype, max_gpu_gb
        self.pin = pin and torch.cuda.is_available() and self.device.type == "cpu"
        self.index_device = torch.device(index_device or ("cuda" if self.pin else self.device))
        self.layers: dict[int, list] = {}  # layer -> [k buffer (Hk, capacity, D), v buffer, rows in use, index]
        self.meta: dict = {}  # which model and tokens the rows come from, see prefill

    @property
    def n(self) -> int:
        """Rows per layer."""
        return self.layers[0][2] if 0 in self.layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and index."""
        indexes = [part for *_, index in self.layers.values() if index for part in index.parts]
        return sum(x.nbytes for x in (*indexes, *(x for layer in self.layers for x in self.rows(layer))))

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (Hk, N, D), as views."""
        k, v, n, _ = self.layers[layer]
        return k[:, :n], v[:, :n]

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values (Hk, N, D), in place of what it held. Copies. ValueError: shapes differ."""
        self.layers.pop(layer, None)
        self.append(layer, k, v)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add rows (Hk, m, D) behind those of the layer. ValueError: they do not fit."""
        if k.shape != v.shape or k.ndim != 3:
            raise ValueError(f"layer {layer}: k and v (Hk, N, D) needed, got {tuple(k.shape)} and {tuple(v.shape)}")
        Hk, m, D = k.shape
        if layer not in self.layers:
            index = make_index(self.kind, Hk, D, self.index_device)
            self.layers[layer] = [self._buffer(Hk, m, D), self._buffer(Hk, m, D), 0, index]
        kb, vb, n, index = self.layers[layer]
        if (kb.shape[0], kb.shape[2]) != (Hk, D):
            raise ValueError(f"layer {layer} holds rows {kb.shape[0], kb.shape[2]} (Hk, D), got {Hk, D}")
        if n + m > kb.shape[1]:
            old, (kb, vb) = (kb, vb), (self._buffer(Hk, n + m + max(1024, n // 8), D) for _ in range(2))
            kb[:, :n], vb[:, :n] = old[0][:, :n], old[1][:, :n]
        kb[:, n : n + m], vb[:, n : n + m] = k, v
        if index:
            index.add(kb[:, : n + m])
        self.layers[layer] = [kb, vb, n + m, index]

    def _buffer(self, *shape: int) -> Tensor:
        if self.pin:
            try:
                return torch.empty(shape, dtype=self.dtype, pin_memory=True)
            except RuntimeError:
                self.pin = False
                _warn_once("page-locked memory is refused (too large a share of RAM?): going on with pageable memory")
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def search(self, layer: int, q: Tensor, topk, candidates: int = 2, share: str = "head", sink: int = 0,
               recent: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The best rows of each query: q (Hq, T, D) -> raw scores q . k in fp32 and rows int64, both (Hq, T, k).

        An approximate index names candidates * k rows, which are scored exactly. Where ivf finds too few, index -1 with
        score -inf. q8 on a CPU is exact: without its proof all rows are scored. The first `sink` and last `recent` rows
        come on top of k. ValueError: a bad topk, or NaN or infinity in q or K.
        """
        (k, _), index, (Hq, T, D) = self.rows(layer), self.layers[layer][3], q.shape
        n, scale, where = k.shape[1], D**-0.5, f"layer {layer}"
        rows, sink = q.reshape(len(k), -1, D).to(k.device), min(sink, n)
        recent = min(recent, n - sink)
        top = min(resolve_k(topk, n), n - sink - recent)
        every, count = top + sink + recent, candidates * top + sink + recent
        back = lambda *out: tuple(x.reshape(Hq, T, -1) for x in out)
        few = index is not None and every < n and count < index.n
        if few:
            at, sure = index.candidates(rows.to(self.index_device).float(), count, every, exact_topk)  # (Hk, R, c)
            few = sure is None or sure.is_cuda or bool(sure.all())
        if not few:
            if k.is_cuda and share == "head" and not sink and not recent and _kernels_take(rows, k):
                return back(*kernels.scores(rows, k).topk(top, sorted=False))
            return back(*_choose(_scores(rows, k, where), top, scale, T, share, sink, recent))
        rest = torch.arange(index.n, n, device=k.device).expand(*at.shape[:2], -1)  # rows that are not in the index
        at = torch.cat([at.to(k.device), rest], dim=-1)
        at = F.pad(at, (0, max(0, top - at.shape[-1])), value=-1)
        at = at.masked_fill((at < sink) | (at >= n - recent), -1)
        rows = rows.float()
        exact = lambda at: torch.matmul(_rows(k, at.clamp(min=0)).float(), rows[..., None])[..., 0]  # (Hk, R, c)
        value = exact(at)
        _check_finite(value, rows, k, where)  # NaN sorts above every number: it was found
        value = value.masked_fill(at < 0, -math.inf)
        if share == "group":  # each head's probability among its own candidates stands in for that over the prefix
            mass = torch.zeros(len(k), T, n, device=k.device)
            mine = (value * scale).softmax(dim=-1).unflatten(1, (-1, T))  # (Hk, G, T, c)
            for g, named in enumerate(at.unflatten(1, (-1, T)).unbind(1)):
                mass.scatter_add_(-1, named.clamp(min=0), mine[:, g])
            at = exact_topk(mass[..., sink : n - recent], top)[1].repeat(1, Hq // len(k), 1) + sink
            value = exact(at)
        else:
            value, best = exact_topk(value, top)
            at = at.gather(-1, best)
        ends = _ends(n, sink, recent, k.device).expand(*at.shape[:2], -1)
        return back(torch.cat([value, exact(ends)], dim=-1), torch.cat([at, ends], dim=-1))

    def gather(self, layer: int, idx: Tensor) -> Tensor:
        """Value rows at idx (Hq, T, k), head h from key/value head h // G -> (Hq, T, k, D); row 0 for index -1."""
        v = self.rows(layer)[1]
        return _rows(v, idx.clamp(min=0).reshape(len(v), -1, idx.shape[-1])).reshape(*idx.shape, -1)

    def attend(self, layer: int, q: Tensor, topk, ks: Tensor, vs: Tensor, *, share: str = "head", candidates: int = 2,
               sink: int = 0, recent: int = 0, cache: "RowCache | None" = None) -> Tensor:  # fmt: skip
        """topk_attention of q (Hq, T, D) over the stored rows and the suffix ks, vs (Hk, M, D), on q's device. cache:
        what keeps the rows of the last step on the GPU."""
        (k, v), (Hq, _, D) = self.rows(layer), q.shape
        N, top = k.shape[1], resolve_k(topk, k.shape[1]) + sink + recent

        def find(rows: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
            if top >= N:  # dense: nothing to look for
                return _find(k, v, N, D**-0.5, "head", 0, 0, f"layer {layer}", rows, T)
            found = self.search(layer, rows.reshape(Hq, T, D), topk, candidates, share, sink, recent)
            value, at = (x.reshape(*rows.shape[:2], -1) for x in found)
            values = cache.fetch(layer, found[1]) if cache else self.gather(layer, found[1])
            return value, at, values.reshape(*at.shape, D)

        where = "" if q.is_cuda else f"the suffix, layer {layer}"
        o, _ = _attend(q, q.to(k.device), find, N, min(N, top), ks, vs, D**-0.5, where)
        return o.to(q.dtype)

    def check(self, model: "Llama") -> None:
        """BadInput: the rows come from another model, or its layers are not all here."""
        if len(self.layers) != len(model.layers):
            raise BadInput(f"the store holds {len(self.layers)} layers, the model has {len(model.layers)}")
        for what, want in model.fingerprints().items():
            if self.meta.get(what, want) != want:
                raise BadInput(f"the stored context has {what} {self.meta[what]}, this model {want}. Open the model "
                               "that it was made with, or prefill again.")  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write one safetensors file per layer, and meta.json, under a temporary name that is then renamed."""
        folder, tmp, write = Path(folder), Path(f"{folder}.tmp"), package("safetensors.torch").save_file
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        for layer, (*_, index) in self.layers.items():
            parts = {f"index.{i}": part for i, part in enumerate(index.parts)} if index else {}
            parts |= dict(zip("kv", self.rows(layer), strict=True))
            write({name: x.contiguous() for name, x in parts.items()}, tmp / f"layer_{layer:03d}.safetensors")
        index_rows = [index.n if index else 0 for *_, index in self.layers.values()]
        meta = {"n": self.n, "dtype": str(self.dtype)[6:], "index": self.kind, "index_rows": index_rows, **self.meta}
        report.write_json(tmp / "meta.json", meta)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)

    @classmethod
    def load(cls, folder: str | Path, model: "Llama | None" = None, **how) -> "KVStore":
        """Open a saved context by memory map, whatever its length; `how` goes to the constructor, except dtype.

        FileNotFoundError: none is there. BadInput: it is damaged, or was made with another model.
        """
        folder, lib = Path(folder), package("safetensors")
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(f"no saved context in {folder}: no meta.json. Save one with --save-context.")
        meta = json.loads((folder / "meta.json").read_text())
        n, dtype, kind, index_rows = (meta.pop(name) for name in ("n", "dtype", "index", "index_rows"))
        store = cls(**{"index": kind, **how, "dtype": getattr(torch, dtype)})
        store.meta = meta
        for layer, known in enumerate(index_rows):
            path = folder / f"layer_{layer:03d}.safetensors"
            try:
                with lib.safe_open(path, framework="pt") as file:
                    parts = {name: file.get_tensor(name) for name in sorted(file.keys())}
            except lib.SafetensorError as e:
                raise BadInput(f"{path} is cut off or damaged: {e}. Save the context again.") from e
            k, v = parts.pop("k"), parts.pop("v")
            if k.shape[1] != n or v.shape != k.shape:
                raise BadInput(f"{folder}: layer {layer} holds {tuple(k.shape)}, meta.json says {n} rows")
            if store.device.type != "cpu" or store.pin:
                store.put(layer, k, v)
                continue
            index = make_index(store.kind, len(k), k.shape[2], store.index_device)
            if index and store.kind == kind:
                index.n, index.parts = known, [x.to(store.index_device) for x in parts.values()]
            elif index:
                index.add(k)
            store.layers[layer] = [k, v, n, index]
        if model is not None:
            store.check(model)
        return store


class ShardedStore(KVStore):
    """A KVStore of which every process of the group holds one contiguous slice. Always exact. Collective."""

    total = 0  # rows of all slices

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    @property
    def n(self) -> int:
        return self.total

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        rank, self.total = dist.get_rank(), k.shape[1]
        own = slice(rank * self.total // self.ranks, (rank + 1) * self.total // self.ranks)
        self.layers.pop(layer, None)
        super().append(layer, k[:, own], v[:, own])

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        raise BadInput("a sharded store does not grow: its slices would no longer be in order. Run one process.")

    def attend(self, layer: int, q: Tensor, topk, ks: Tensor, vs: Tensor, *, share: str = "head", sink: int = 0,
               recent: int = 0, **_) -> Tensor:  # fmt: skip
        if share != "head" or sink or recent:
            raise BadInput(f"over several processes each query head chooses alone, without sinks or a recent window: "
                           f"got share={share!r}, sink={sink}, recent={recent}. Run one process.")  # fmt: skip
        k, v = self.rows(layer)
        o = _sharded_one(q.to(k.device), k, v, topk, ks.to(k.device), vs.to(k.device), q.shape[2] ** -0.5)[0]
        return o.to(q.device, q.dtype)


def _sha(x) -> str:
    raw = x.detach().cpu().contiguous().numpy().tobytes() if isinstance(x, Tensor) else json.dumps(x).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def available_bytes() -> int:
    """Host memory that can still be had: MemAvailable, or what the control group has left if that is less."""

    def number(path: str, pattern: str = r"(\d+)") -> int:
        """The number in a file; -1 without one: not Linux, no such group, or "max"."""
        try:
            return int(re.search(pattern, Path(path).read_text())[1])
        except (OSError, TypeError):
            return -1

    free, group = number("/proc/meminfo", r"MemAvailable:\s+(\d+)"), "/sys/fs/cgroup/memory"
    found = [1024 * free] if free >= 0 else []
    for limit, usage in ((".max", ".current"), ("/memory.limit_in_bytes", "/memory.usage_in_bytes")):
        if (most := number(group + limit)) >= 0:
            found.append(most - max(0, number(group + usage)))
    return min(found, default=sys.maxsize)


def cache_bytes(config: dict, n: int, index: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of keys and values, and of the index, of n rows in all layers."""
    L, Hk, D = config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]
    bits = {"exact": 0, "q8": 8, "q4": 4 + 32 / GROUP, "sign": 1 + 16 / D, "ivf": 64 / D}[index]
    return 2 * n * L * Hk * D * dtype.itemsize, int(n * L * Hk * D * bits / 8)


def check_memory(config: dict, n: int, store: KVStore, weights: int = 0, max_suffix: int = 1024) -> None:
    """MemoryError: n rows do not fit into host memory, or the store's max_gpu_gb, with the parts of the sum."""
    kv, index = cache_bytes(config, math.ceil(n / store.ranks), store.kind, store.dtype)
    on = lambda device, kind, size: size if device.type == kind else 0
    host = on(store.device, "cpu", kv) + on(store.index_device, "cpu", index)
    if host > (free := available_bytes()):
        raise MemoryError(f"KV cache needs {host / 1e9:.1f} GB, {free / 1e9:.1f} GB available; use kv_dtype=fp8, a "
                          "smaller context, index='exact', or shard the sequence over more machines")  # fmt: skip
    parts = {
        "weights": weights, "cache": on(store.device, "cuda", kv), "index": on(store.index_device, "cuda", index),
        "scores": 4 * config["num_attention_heads"] * n,
        "suffix": cache_bytes(config, max_suffix, "exact", store.dtype)[0], "logits": 4 * config["vocab_size"],
    }  # fmt: skip
    if store.max_gpu_gb and sum(parts.values()) > store.max_gpu_gb * 1e9:
        each = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        raise MemoryError(f"{sum(parts.values()) / 1e9:.2f} GB of GPU memory needed, max_gpu_gb is {store.max_gpu_gb}: "
                          f"{each} GB. Keep the cache on the CPU or use a smaller index.")  # fmt: skip


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
    c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    usual = {"num_key_value_heads": c["num_attention_heads"], "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
             "max_position_embeddings": 2048}  # fmt: skip
    return {**usual, **c}


def rope(config: dict) -> Tensor:
    """Angle per position of each rotary pair, (D/2,) float32. BadInput: a type but default, linear and llama3."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return rope_frequencies({**config, "rope_scaling": None}) / scaling["factor"]
    return rope_frequencies(config)


class Norm(nn.Module):
    """RMSNorm, statistics in fp32 (fp64 for fp64), cast back before the weight."""

    def __init__(self, C: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(_precision(x))
        return (y * (y.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class Layer(nn.Module):
    """Attention with rotary positions, Hq query heads over Hk key/value heads, then a SwiGLU MLP (if any)."""

    def __init__(self, c: dict):
        super().__init__()
        C, M, D, eps = (c[n] for n in ("hidden_size", "intermediate_size", "head_dim", "rms_norm_eps"))
        self.Hq, self.Hk = c["num_attention_heads"], c["num_key_value_heads"]
        shapes = {"q_proj": (C, self.Hq * D), "k_proj": (C, self.Hk * D), "v_proj": (C, self.Hk * D),
                  "o_proj": (self.Hq * D, C)}  # fmt: skip
        mlp = {"gate_proj": (C, M), "up_proj": (C, M), "down_proj": (M, C)} if M else {}
        biased = lambda key: functools.partial(nn.Linear, bias=c.get(key, False))
        self.self_attn = nn.ModuleDict({name: biased("attention_bias")(*io) for name, io in shapes.items()})
        self.mlp = nn.ModuleDict({name: biased("mlp_bias")(*io) for name, io in mlp.items()})
        self.input_layernorm, self.post_attention_layernorm = Norm(C, eps), Norm(C, eps) if M else None

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
        where = torch.arange(ids.shape[1]) if position is None else position[:, None]  # an axis for the heads
        angle, x = self.angle(where), self.model.embed_tokens(ids)  # (B, T, C)
        for layer in self.layers:
            q, k, v = layer.qkv(x, angle)
            x = layer.finish(x, _causal(q, k, v))
        return self.logits(x)

    def fingerprints(self) -> dict:
        """What tells one model from another: rotary angles, config, weights of the last norm."""
        config = {n: v for n, v in sorted(self.config.items()) if isinstance(v, int | float | str | bool | dict)}
        return {"rope": _sha(self.inv_freq), "config": _sha(config), "weights": _sha(self.model.norm.weight.float())}


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last T of S rows, row i to keys 0..S-T+i: q (B, Hq, T, D), k, v (B, Hk, S, D)."""
    T, S = q.shape[2], k.shape[2]
    sdpa = functools.partial(F.scaled_dot_product_attention, enable_gqa=q.shape[1] != k.shape[1])
    if T == S:
        return sdpa(q, k, v, is_causal=True)
    parts, rows = [], T if q.is_cuda else max(1, 2**26 // S)  # a CPU makes the mask: 64 MB of it at a time
    for a in range(0, T, rows):
        e, seen = min(T, a + rows), S - T + min(T, a + rows)
        mask = causal_lower_right(e - a, seen)  # is_causal would align to the upper left
        parts.append(sdpa(q[:, :, a:e], k[:, :, :seen], v[:, :, :seen], attn_mask=mask))
    return torch.cat(parts, dim=2)


def _check_range(model: Llama, n: int, allow: bool) -> None:
    most = model.config["max_position_embeddings"]
    if n > most and not allow:
        raise BadInput(f"context {n} exceeds max_position_embeddings {most}; pass allow_extrapolation=True")


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
    store.meta = {**model.fingerprints(), "tokens": _sha(ids), "extrapolated": allow_extrapolation}
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


def _check_start(model: Llama, ids: Tensor, store: KVStore | None, k, more: int, allow: bool) -> list:
    """Checks of decode and generate, before any work; returns k per layer."""
    budgets = list(k) if isinstance(k, list | tuple) else [k] * len(model.layers)
    if len(budgets) != len(model.layers):
        L = len(model.layers)
        raise BadInput(f"k has {len(budgets)} entries for {L} layers: give {L}, or one k")
    for b in budgets:
        resolve_k(b, 0)
    if len(ids) < 1:
        raise ValueError("ids is empty: at least one token is needed, the one that follows the stored prefix")
    if store is not None:
        store.check(model)
        allow = allow or store.meta.get("extrapolated", False)
    _check_range(model, (store.n if store is not None else 0) + len(ids) + more, allow)
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
    budgets = _check_start(model, ids, store, k, max_new_tokens, allow_extrapolation)
    if store is None:
        store = KVStore(model.device, dtype=model.dtype)
        prefill(model, ids[:-1], store, allow_extrapolation=allow_extrapolation)
        ids = ids[-1:]
    if model.device.type == "cuda" and store.device.type == "cpu" and store.ranks == 1:
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
    if task not in TOY_TASKS:
        raise BadInput(f"--tasks {task}: the toy has {', '.join(TOY_TASKS)}; {task} needs --model")
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

    def run(self, run: report.Run | None = None, save=None) -> Llama:
        """To the end; the loss goes to run.log every 20 steps, save(state) every 100 and when SIGTERM asks to stop."""
        bar = report.progress(None, "train", self.w, sum(self.stages), self.step)
        listen = cluster.stop_signal() if save else contextlib.nullcontext(bool)  # bool() is False
        with listen as stopping, bar:
            while self.step < sum(self.stages):
                loss = self.advance()
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix_str(f"loss {loss:.3f}")
                    if run:
                        run.log(step=self.step, loss=float(loss))
                stop = self.step % 10 == 0 and stopping()
                if save and (stop or self.step % 100 == 0 or self.step == sum(self.stages)):
                    save(self.state())
                if stop:
                    self.w.print(f"stopped by SIGTERM after step {self.step}; go on with --resume")
                    raise SystemExit(0)
        return self.model.requires_grad_(False).eval()


ALONE = cluster.World(0, 1, torch.device("cpu"))


def train_tiny(seed: int = 0, steps: tuple[int, int] = (600, 120)) -> Llama:
    """The toy, trained on the CPU: `steps` of the two stages. Equal seeds give equal models."""
    return Trainer(seed, steps, ALONE).run()


@torch.no_grad()
def toy_accuracy(model: Llama, task: str, n: int, queries: int, ks: list, seed: int = 0, control: bool = False,
                 w: cluster.World = ALONE, bar=iter, **how) -> list[float]:  # fmt: skip
    """Accuracy per k, the first n tokens prefilled densely and the tail decoded with top-k: the ranks share the rows.

    A query is right if the answer has the largest logit; with several right answers, the share of them on top.
    """
    rows = queries // NEEDLES
    ids, right = toy_rows(task, n, rows, cluster.generator(seed, 2, n), control)
    hits = torch.zeros(len(ks), dtype=torch.float64, device=model.device)
    for i in bar(range(w.rank, rows, w.size)):
        store = prefill(model, ids[i, :n], KVStore(model.device, dtype=torch.float32))
        keys = ids[i, n::2] - QUERY  # (8,)
        answers = (keys[:, None] * VARIANTS + torch.arange(VARIANTS))[right[i]].view(NEEDLES, -1).to(model.device)
        for j, k in enumerate(ks):
            logits = decode(model, ids[i, n:], store, k, **how)[::2]  # (8, V)
            top = logits.topk(answers.shape[1], dim=-1).indices
            hits[j] += (answers[:, :, None] == top[:, None]).any(dim=-1).double().mean(dim=-1).sum()
    if w.size > 1:
        dist.all_reduce(hits)
    return (hits / (rows * NEEDLES)).tolist()


# ---- the experiment: long-context tasks in text, after RULER (arXiv:2404.06654), in our own words

NOUNS = """anchor apple apron arrow badge bagel barrel basin basket beacon beaver bench berry blanket bonnet bottle
 bridge brush bucket button cabin cable camel candle canoe carpet carrot castle cello chain chair cherry
 chimney circle cliff clock cloud clover coat comet compass copper coral cotton cradle crane crayon
 cricket crown curtain daisy desk diamond dragon drum eagle engine falcon feather fence fiddle flute
 forest fossil fountain garden garlic ginger glove goose grape guitar hammer harbor hazel helmet hinge
 honey island jacket jungle kettle ladder lantern lemon lizard lobster locket magnet maple marble meadow
 mirror mitten monkey needle nickel onion orchard otter oyster paddle panda parrot pebble pencil pepper
 pigeon pillow pirate planet pocket""".split()
ADJECTIVES = """able amber ancient autumn basic bitter blunt bold brave brief bright broad broken calm careful cheap
 clean clear clever cold common cosy crisp curly damp daring dark dear deep dense distant dizzy dry dull
 dusty eager early easy elder empty equal even exact faded faint fair famous fancy fast fierce final fine
 firm flat fluffy fond formal frail free fresh frosty full funny gentle giant glad golden grand grave
 green grim happy hardy harsh hasty heavy hidden hollow honest humble icy idle jolly keen kind large late
 lazy lean light likely little lively local lonely loud loyal lucky mild misty modern narrow neat nimble
 noble odd pale plain polite proud quick quiet rapid rare""".split()
STOCK = ("A cart rolls past the mill.", "Two gulls sit on the wall.", "The baker opens her shop.",
         "Rain is likely before noon.", "Nobody answers the bell.")  # fmt: skip
TASKS = ("niah_single", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
         "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")  # fmt: skip


def answer_tokens(task: str) -> int:
    """Room that a task leaves for the answer."""
    return 20 if task in ("niah_single", "single") else {"vt": 30, "cwe": 120, "fwe": 50}.get(task, 128)


@functools.cache
def _essay() -> list[str]:
    """Sentences of the standard library's documentation."""
    text = re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"\s+", " ", corpus("docs")))
    return [s for s in re.split(r"(?<=[.!?]) ", text) if 30 <= len(s) <= 400]


def _distinct(draw, count: int, taken=()) -> list:
    """`count` draws that differ from each other and from `taken`."""
    found = []
    while len(found) < count:
        if (x := draw()) not in found and x not in taken:
            found.append(x)
    return found


# A task's builder gives (body, question, start of the answer, answers) of a text of `units` sentences, lines or words.


def _niah(kind: str, units: int, rng: random.Random) -> tuple[str, str, str, list[str]]:
    """A haystack of `units` sentences with needles in it."""
    digits = 5 if kind == "single" else 7
    number = lambda: str(rng.randrange(10 ** (digits - 1), 10**digits))
    long = lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    word = lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    new_key = long if kind == "multikey_3" else word
    new_value = long if kind in ("single_3", "multikey_3") else number
    n_keys, n_values = {"multikey_1": (4, 1), "multivalue": (1, 4), "multiquery": (4, 1)}.get(kind, (1, 1))
    keys = _distinct(new_key, n_keys)
    values = {k: [new_value() for _ in range(n_values)] for k in keys}
    thing = "identifier" if new_value is long else "number"
    needle = lambda k, v: f"Please note that the secret {thing} of {k} is {v}."
    needles = [needle(k, v) for k in keys for v in values[k]]
    if kind in ("multikey_2", "multikey_3"):  # nothing but needles
        hay = [needle(_distinct(new_key, 1, keys)[0], new_value()) for _ in range(units)]
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
    answers = [v for k in asked for v in values[k]]
    plural, are, which = ("s", "are", "are all the") if len(answers) > 1 else ("", "is", "is the")
    what = f"secret {thing}{plural} of {', '.join(asked[:-1])}{' and ' * (len(asked) > 1)}{asked[-1]}"
    body = f"Read this text. It hides a secret {thing} that you will be asked for.\n" + " ".join(hay) + "\n"
    return body, f"What {which} {what} in the text above?", f" According to the text, the {what} {are}", answers


def _vt(units: int, rng: random.Random) -> tuple[str, str, str, list[str]]:
    """A number passed from variable to variable, after a solved example with shorter names."""

    def chain(letters: int, noise: int) -> tuple[str, str, str, list[str]]:
        """One haystack with a chain of five names: body, question, start of the answer, answers."""
        names = ["".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters)) for _ in range(5)]
        value, hay = str(rng.randrange(10000, 100000)), [" ".join(STOCK)] * noise
        lines = [f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False))]
        for place, line in reversed(list(zip(sorted(rng.choices(range(noise + 1), k=5)), lines, strict=True))):
            hay.insert(place, line)
        head = "This text sets variables, each to a value or to another variable. Follow them.\n\n"
        question = f"Which 5 variables hold the value {value} in the text above?"
        return head + "\n".join(hay) + "\n", question, f" The variables that hold {value} are", names

    *solved, names = chain(3, 3)
    body, question, start, answers = chain(5, units)
    return "".join(solved) + " " + ", ".join(names) + "\n\n" + body, question, start, answers


def _cwe(units: int, small: bool, rng: random.Random) -> tuple[str, str, str, list[str]]:
    """A numbered list in which ten words come more often than the rest."""
    often, seldom = (6, 1) if small else (30, 3)
    pool = list(dict.fromkeys(ADJECTIVES + NOUNS + [f"{a}{n}" for a in ADJECTIVES for n in NOUNS]))
    words = rng.sample(pool, min(len(pool), 10 + units))
    listed = words[:10] * often + words[10:] * seldom
    rng.shuffle(listed)
    body = "Here is a numbered list of words. Ten of them come more often than the rest.\n"
    body += "\n".join(f"{i + 1}. {word}" for i, word in enumerate(listed)) + "\n"
    start = " The ten most frequent words of the list are"
    return body, "Which ten words come most often in the list above?", start, words[:10]


def _fwe(units: int, n_tokens: int, rng: random.Random) -> tuple[str, str, str, list[str]]:
    """Code words, the one of rank r about units r^-2 / zeta(2) times; the first stands for noise."""
    draw = lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6))
    words = ["...", *_distinct(draw, max(4, n_tokens // 50) - 1)]
    zeta = sum(r**-2 for r in range(1, 2000))
    listed = [w for r, w in enumerate(words, 1) for _ in range(max(5 - r, round(units * r**-2 / zeta)))]
    rng.shuffle(listed)
    body = "This is a text in a code. Count how often each code word comes.\n" + " ".join(listed) + "\n"
    question = "Leaving out '...', which three code words come most often in the text above?"
    return body, question, " The three most frequent code words are", words[1:4]


def ruler(task: str, n_tokens: int, seed: int, tokenizer=None, parts: bool = False):
    """A prompt of at most n_tokens with its answer's budget, and the strings that a right answer holds.

    The prompt ends with the start of the answer, so that a base model goes on with it. Lengths are bytes unless a
    tokenizer is given. parts: (document, question, start of the answer) instead of one string, for a chat template.
    BadInput: an unknown task, or too little room for any haystack.
    """
    name = task if task in TASKS else f"niah_{task}"
    if name not in TASKS:
        raise BadInput(f"unknown task {task!r}; choose from {', '.join(TASKS)}")

    def build(units: int) -> tuple[str, str, str, list[str]]:
        rng = random.Random(f"{name} {seed}")
        if name in ("cwe", "fwe"):
            return _cwe(units, n_tokens < 4096, rng) if name == "cwe" else _fwe(units, n_tokens, rng)
        return _vt(units, rng) if name == "vt" else _niah(name[5:], units, rng)

    def size(units: int) -> int:
        text = "".join(build(units)[:3])
        ids = text.encode() if tokenizer is None else tokenizer.encode(text)
        return len(getattr(ids, "ids", ids)) + answer_tokens(name)

    low, high = 0, 1  # so many units fit, and so many do not
    while size(high) <= n_tokens and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= n_tokens else (low, middle)
    while low and size(low) > n_tokens:  # a size that is not monotone
        low -= 1
    if low == 0:
        raise BadInput(f"{n_tokens} tokens are too few for task {name}: the shortest has {size(1)}. Ask for more.")
    *prompt, answers = build(low)
    return tuple(prompt) if parts else "".join(prompt), answers


def ruler_score(outputs: list[str], answers: list[list[str]], mode: str = "all") -> float:
    """100 x the mean over samples of the share of answers found in the output ("all"), or of whether any is ("part").

    Substrings, upper and lower case alike. ValueError: another mode, or lists of different lengths.
    """
    if mode not in ("all", "part") or len(outputs) != len(answers):
        raise ValueError(f"mode all or part needed, got {mode!r}, with {len(outputs)} outputs, {len(answers)} answers")
    found = [[a.lower() in out.lower() for a in want] for out, want in zip(outputs, answers, strict=True)]
    score = [sum(f) / len(f) if mode == "all" else float(any(f)) for f in found]
    return 100 * sum(score) / max(1, len(score))


TEMPLATES = (  # ChatML and Llama 3: before the user's text, after it, tokens that end an answer
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>")),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", ("<|eot_id|>", "<|end_of_text|>")),
)  # fmt: skip


class Chat:
    """A real model with its tokenizer and chat template (one of TEMPLATES, or none)."""

    def __init__(self, cfg: Config, device: torch.device):
        self.model = Llama.from_pretrained(cfg.model, getattr(torch, cfg.dtype), device)
        self.tokenizer = self.model.weights.tokenizer()
        number, eos = self.tokenizer.token_to_id, self.model.config.get("eos_token_id")
        fits = (t for t in TEMPLATES if number(t[2][0]) is not None)
        self.head, self.tail, ends = next(fits, ("", "", ()))
        self.stop = {*map(number, ends), *(eos if isinstance(eos, list) else [eos])}

    def encode(self, text: str) -> Tensor:
        """Ids as they stand: no token is added in front."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids])


# ---- the experiment: the claim, and where attention goes


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
    return word if "." not in word or "," in word else f"{100 * float(word):g} %"


def demo(cfg: Config, w: cluster.World) -> None:
    """Train the toy, print accuracy over k at each context, the control, the lessons, the real model, the claim."""
    run, start = report.Run(cfg.out, cfg, w), time.perf_counter()
    model = Trainer(cfg.seed, cfg.steps, w).run(run)
    w.print(f"trained a model of {sum(p.numel() for p in model.parameters()) / 1e3:.0f}k parameters in "
            f"{time.perf_counter() - start:.0f} s on rows of at most 1024 tokens")  # fmt: skip
    words, aside, found = ("dense", *cfg.ks), min(2048, max(cfg.contexts)), {}
    ks = [parse_k(word) for word in words]
    beside = {"no needles": "single", "4 answers per key": "multivalue", "most frequent of 12": "counting"}
    cells = {f"{n} tokens": ("single", n) for n in cfg.contexts}
    cells |= {f"{aside}, {what}": (task, aside) for what, task in beside.items()}
    control, several, frequent = [*cells][-3:]
    for label, (task, n) in cells.items():
        queries = {2048: 256}.get(n, 512 if n < 2048 else 128)
        bar = functools.partial(report.progress, what=label, w=w)
        acc = toy_accuracy(model, task, n, queries, ks, cfg.seed, label == control, w, bar, share=cfg.share)
        for word, k, a in zip(words, ks, acc, strict=True):
            share = 0.0 if word == "dense" else k if isinstance(k, float) else k / n
            kind = {"accuracy": a, "control": label == control} if task == "single" else {"lesson": task, "right": a}
            run.log(context=n, k=share, rows=resolve_k(k, n), queries=queries, **kind)
        found[label] = acc
    head = ["accuracy", "dense", *(f"k = {_name(k)}" for k in cfg.ks)]
    w.print("\n" + report.table(head, [[label, *acc] for label, acc in found.items()]) + "\n")
    single = {n: found[f"{n} tokens"] for n in cfg.contexts}
    for n, (dense, *others) in single.items():
        if n > STAGES[1][0] + TAIL and max(others) > dense + 0.05:
            w.print(f"lesson: at {n} tokens, past its training length, the model is better with top-k than dense: the "
                    "far tail no longer dilutes what counts")  # fmt: skip
    best = [f"{x.split(', ')[1]} reaches {max(found[x][1:]) / max(1e-9, found[x][0]):.2f}" for x in (several, frequent)]
    w.print("lesson: what is collected or counted over many places needs more keys than what is found in one; of dense "
            + ", ".join(best))  # fmt: skip
    if w.main:
        mass, entropy = toy_mass(model, cfg.seed)
        run.log(entropy=entropy, mass={str(k): m for k, m in mass.items()})
        art = functools.partial(draw, single, words, mass)
        w.print(report.picture(f"{cfg.out}/topk_attention.png", art, ncols=3, figsize=(16, 4.6), layout="constrained"))
    if cfg.real:
        small = replace(cfg, model="smollm2", tasks=("niah_single",), context=2048, samples=4, ks=("0.01", "0.02"))
        try:
            chat = Chat(small, w.device)
            w.print("\na real model (SmolLM2-135M-Instruct, needle in documentation text, 2048 tokens):")
            score_tasks(small, w, run, chat, {})
        except ModuleNotFoundError as e:
            w.print(f"the real model's needle test is left out: {e}")
    few = [i for i, k in enumerate(ks) if isinstance(k, float) and k <= 0.02]
    if not few:
        return w.print("no claim: --ks has no fraction up to 0.02")
    at_2 = {n: acc[few[-1]] / max(1e-9, acc[0]) for n, acc in single.items()}
    short = [n for n in single if n <= 2048]  # up to twice the training length, where dense itself must be able
    able = all(single[n][0] >= 0.9 for n in short)  # a share of nothing would prove nothing
    dense = [acc[0] for acc in single.values()]
    run.claim(
        "top-k over 2 % of the keys keeps 95 % of dense accuracy at every length",
        "0.95", f"{min(at_2[n] for n in short or single):.3f}",
        min(at_2.values()) >= 0.95 and able and max(found[control]) <= 0.12,
        f"dense {min(dense):.2f} to {max(dense):.2f}; lowest top-k / dense at {100 * ks[few[-1]]:g} % up to 2048 "
        "tokens; beyond: " + ", ".join(f"{r:.2f} at {n}" for n, r in at_2.items() if n > 2048)
        + f"; toy of {cfg.steps} steps, seed {cfg.seed}, {w.device.type}",
    )  # fmt: skip


def watched(model: Llama, ids: Tensor, last: int, **how) -> tuple[KVStore, dict[int, Tensor]]:
    """Prefill ids[:-last], decode the rest densely -> the store, and per layer the queries that were asked of it."""
    store, asked = prefill(model, ids[:-last], KVStore(model.device, dtype=torch.float32), **how), {}
    attend = store.attend

    def listen(layer: int, q: Tensor, *args, **more) -> Tensor:
        asked[layer] = q
        return attend(layer, q, *args, **more)

    store.attend = listen
    _advance(model, ids[-last:], store, [1.0] * len(model.layers), Suffix(model, last))
    return store, asked


def toy_mass(model: Llama, seed: int, n: int = 2048) -> tuple[dict[int, float], float]:
    """Attention mass of the query tokens on their k best of n keys, mean over heads, last layer; and the entropy."""
    grid, mass, entropy = [2**i for i in range(12)], torch.zeros(12), 0.0
    ids, _ = toy_rows("single", n, 8, cluster.generator(seed, 3))
    for row in ids:
        store, asked = watched(model, row, TAIL)
        q, k = asked[len(asked) - 1][None, :, ::2], store.rows(len(asked) - 1)[0][None]
        best = dense_weights(q, k)[0].sort(dim=-1, descending=True).values.cumsum(dim=-1)  # (Hq, 8, N)
        mass += torch.stack([best[..., i - 1].mean() for i in grid]).cpu() / len(ids)
        entropy += attention_stats(q, k)[0].mean().item() / len(ids)
    return dict(zip(grid, mass.tolist(), strict=True)), entropy


def draw(single: dict, words: tuple, mass: dict, figure, axes) -> None:
    """Accuracy and captured mass over k; GPU memory and bytes per token over context, computed for an 8B model."""
    left, middle, right = axes
    for (n, acc), color in zip(single.items(), ("tab:blue", "tab:orange", "tab:green", "tab:purple"), strict=False):
        share = sorted((resolve_k(parse_k(k), n) / n * 100, a) for k, a in zip(words[1:], acc[1:], strict=True))
        left.plot(*zip(*share, strict=True), "o-", color=color, label=f"{n} tokens, top-k")
        left.axhline(acc[0], color=color, ls=":", label=f"{n} tokens, dense")
    left.plot([100 * k / 2048 for k in mass], list(mass.values()), color="0.6", lw=1.5, label="attention mass (2048)")
    left.set(xscale="log", xlabel="keys attended, % of the context", ylabel="accuracy, or share of the mass",
             ylim=(0, 1.04), title="Accuracy and captured mass over k")  # fmt: skip
    (L, Hq, Hk, D, weights), n, gib = SHAPES["llama-3.1-8b"], [2**i for i in range(12, 21)], 2**30
    row, value, k = 4 * Hk * D * L, 2 * D, 0.01  # bf16 bytes of a token's keys and values, and of one head's value row
    middle.plot(n, [(weights + x * row) / gib for x in n], label="dense, cache on the GPU")
    small = [(weights + 2 * Hq * x * k * value + 4 * Hq * x) / gib for x in n]  # two layers' rows, and the scores
    middle.plot(n, small, label="top-k 1 %, cache in host memory")
    middle.axhline(weights / gib, color="0.6", ls=":", label="weights alone")
    middle.set(title="GPU memory, 8B model in bf16 (computed)", ylabel="GiB", ylim=(0, 150))
    right.plot(n, [x * row for x in n], label="dense: whole cache read")
    right.plot(n, [x * row / 2 + L * Hq * x * k * value for x in n], label="top-k 1 %: keys and chosen values")
    right.plot(n, [L * Hq * x * k * value for x in n], label="of which to the GPU (per head)")
    right.plot(n, [L * Hk * x * k * value for x in n], label="of which to the GPU (per group)")
    right.set(title="Bytes per generated token (computed)", ylabel="bytes", yscale="log")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8, loc="lower right" if ax is left else "best")
    for ax in (middle, right):
        ax.set_xscale("log", base=2)
        ax.set(xlabel="context, tokens")


@torch.no_grad()
def analyze(cfg: Config, w: cluster.World) -> None:
    """Where attention goes: entropy, keys for 75 and 95 % of the mass, mass of the best k, per layer; and whether
    entropy tells how many keys a head needs for 95 % of its output."""
    run, shares = report.Run(cfg.out, cfg, w), (0.001, 0.005, 0.01, 0.02, 0.1)
    if cfg.model == "toy":
        model, last = Trainer(cfg.seed, cfg.steps, w).run(run), TAIL
        ids = toy_rows("single", cfg.context, 1, cluster.generator(cfg.seed, 4))[0][0]
    else:
        chat, last = Chat(cfg, w.device), 8
        text = _text(cfg.prompt_file or cfg.prompt) or ruler(cfg.tasks[0], cfg.context, cfg.seed, chat.tokenizer)[0]
        model, ids = chat.model, chat.encode(chat.head + text + chat.tail)[: cfg.context]
    store, asked = watched(model, ids, last, chunk=cfg.chunk, allow_extrapolation=cfg.allow_extrapolation)
    table, entropies, needs = [], [], []
    for i, q in asked.items():
        k, v = store.rows(i)
        entropy, n75, n95 = attention_stats(q[None], k[None])
        p, order = dense_weights(q[None], k[None])[0].sort(dim=-1, descending=True)  # (Hq, T, N)
        need = torch.stack([_rows_needed(p[:, t], order[:, t], v) for t in range(last)], dim=1)  # (Hq, T)
        means = [x.float().mean().item() for x in (entropy, n75, n95, need)]
        mass = [p[..., : resolve_k(s, store.n)].sum(dim=-1).mean().item() for s in shares]
        names = ("entropy", "n75", "n95", "need", *(f"mass_{s}" for s in shares))
        run.log(layer=i, **dict(zip(names, (*means, *mass), strict=True)))
        table.append([str(i), *(f"{x:.2f}" for x in means), *mass])
        entropies.append(entropy.flatten())
        needs.append(need.flatten())
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


# ---- train, eval, generate


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
    model = Trainer(cfg.seed, cfg.steps, w, state).run(run, lambda s: cluster.save(path, s) if w.main else None)
    acc = toy_accuracy(model, "single", 512, 128, [1.0, parse_k(cfg.k)], cfg.seed, w=w)
    run.log(accuracy_dense=acc[0], accuracy_topk=acc[1])
    w.print(f"step {sum(cfg.steps)}: accuracy at 512 tokens {acc[0]:.3f} dense, {acc[1]:.3f} with k = {_name(cfg.k)}")


def evaluate(cfg: Config, w: cluster.World) -> None:
    """Tasks x k: the toy's three tasks, or the RULER-style tasks on a real model. --resume goes on after a stop."""
    if cfg.model != "toy":
        done = answered(cfg)
        run = report.Run(cfg.out, cfg, w, max((x["step"] for x in done.values()), default=0))
        return score_tasks(cfg, w, run, Chat(cfg, w.device), done)
    run, saved, words = report.Run(cfg.out, cfg, w), Path(cfg.out, "checkpoint.pt"), ("dense", *cfg.ks)
    trainer = Trainer(0, (0, 0), w, cluster.load(saved)) if saved.exists() else Trainer(cfg.seed, cfg.steps, w)
    model, ks, rows = trainer.run(run), [parse_k(word) for word in words], []
    for task in TOY_TASKS if cfg.tasks == Config.tasks else cfg.tasks:
        acc = toy_accuracy(model, task, cfg.context, 8 * cfg.samples, ks, cfg.seed, w=w, share=cfg.share, sink=cfg.sink,
                           recent=cfg.recent)  # fmt: skip
        run.log(task=task, context=cfg.context, **dict(zip(words, acc, strict=True)))
        rows.append([task, *acc])
    w.print(report.table([f"{cfg.context} tokens", "dense", *map(_name, cfg.ks)], rows))


def answered(cfg: Config) -> dict[tuple, dict]:
    """--resume: answers of an evaluation that was stopped, by task, sample and k. BadInput: it had other settings."""
    path, done = Path(cfg.out, "metrics.jsonl"), {}
    if cfg.resume and path.exists():
        head, *lines = [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] or [{}]
        if (past := head.get("config", {})).get("mode") == "eval":  # a demo's answers are not taken over
            fixed = "model context seed share sink recent index candidates kv_dtype dtype".split()
            if any(past.get(name) != getattr(cfg, name) for name in fixed):
                raise BadInput(f"{path} is of an evaluation with other settings. Pass the same, or another --out.")
            done = {(x["task"], x["sample"], x["k"]): x for x in lines if "sample" in x}
    return done


def score_tasks(cfg: Config, w: cluster.World, run: report.Run, chat: Chat, done: dict) -> None:
    """Prompts of each task, prefilled once and answered with every k; one line in metrics.jsonl per answer."""
    words, table, step = ("dense", *cfg.ks), [], max((x["step"] for x in done.values()), default=0)
    for task in cfg.tasks:
        todo = [s for s in range(cfg.samples) if any((task, s, k) not in done for k in words)]
        rounds = [todo[i : i + w.size] for i in range(0, len(todo), w.size)]
        for group in report.progress(rounds, task, w):
            parts = [None] * w.size
            mine = answer_all(cfg, chat, task, group[w.rank], words) if w.rank < len(group) else []
            dist.all_gather_object(parts, mine)
            for x in (x for part in parts for x in part):
                step += 1
                done[x["task"], x["sample"], x["k"]] = x
                run.log(step=step, **x)
        rows = [[done[task, s, word] for s in range(cfg.samples)] for word in words]
        score = [ruler_score([x["output"] for x in row], [x["answers"] for x in row]) for row in rows]
        shares = [f"{x / score[0]:.2f}" if score[0] else "-" for x in score[1:]]
        table.append([task, *(f"{x:.1f}" for x in score), *shares])
        run.log(step=step, task=task, context=cfg.context, **dict(zip(words, score, strict=True)))
    w.print(report.table([f"score at {cfg.context} tokens", "dense", *map(_name, cfg.ks),
                          *(f"{_name(k)} / dense" for k in cfg.ks)], table))  # fmt: skip
    few = [i for i, k in enumerate(map(parse_k, words)) if isinstance(k, float) and k <= 0.02]
    if cfg.mode == "eval" and few:
        total = lambda i: sum(float(row[1 + i]) for row in table)
        name, ratio = _name(words[few[-1]]), total(few[-1]) / max(1e-9, total(0))
        setting = f"{cfg.model}, {', '.join(cfg.tasks)}, {cfg.context} tokens, {cfg.samples} prompts each"
        run.claim(f"top-k over {name} of the keys keeps 95 % of the dense score", "0.95", f"{ratio:.3f}", ratio >= 0.95,
                  setting)  # fmt: skip


def answer_all(cfg: Config, chat: Chat, task: str, sample: int, words: tuple) -> list[dict]:
    """One prompt answered with each k from one prefill."""
    room = cfg.context - len(chat.encode(chat.head + chat.tail)) - 2
    (body, question, start), answers = ruler(task, room, cfg.seed * 1000 + sample, chat.tokenizer, parts=True)
    ids, out = chat.encode(chat.head + body + question + chat.tail + start.strip()), []
    store = prefill(chat.model, ids[:-1], make_store(cfg), cfg.chunk, cfg.mlp_splits, cfg.allow_extrapolation)
    for word in words:
        got = generate(chat.model, ids[-1:], parse_k(word), answer_tokens(task), store=store, stop=chat.stop,
                       share=cfg.share, sink=cfg.sink, recent=cfg.recent, candidates=cfg.candidates)  # fmt: skip
        out.append({"task": task, "sample": sample, "k": word, "output": chat.decode(got), "answers": answers,
                    "tokens": len(ids)})  # fmt: skip
    return out


def make_store(cfg: Config, w: cluster.World = ALONE) -> KVStore:
    """The store that the flags describe; over several processes, one that shares the sequence."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[cfg.kv_dtype]
    if w.size > 1:
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
    for name in ("index", "share", "sink", "recent", "max_suffix", "save_context", "load_context"):
        if w.size > 1 and getattr(cfg, name) != getattr(Config, name):
            raise BadInput(f"--{name.replace('_', '-')} is for one process: over several the sequence is cut, and each "
                           "query head searches exactly. Leave it out, or torchrun.")  # fmt: skip
    document, question = _text(cfg.prompt_file) if cfg.prompt_file else "", _text(cfg.prompt)
    if not (document or question):
        raise BadInput("nothing to answer: pass --prompt TEXT or --prompt-file FILE")
    chat, start = Chat(cfg, w.device), time.perf_counter()
    if cfg.load_context:
        store = KVStore.load(cfg.load_context, chat.model, device=cfg.kv, index=cfg.index, pin=cfg.kv == "cpu")
        ids = chat.encode("\n" + question + chat.tail)
        w.print(f"opened a context of {store.n} tokens in {time.perf_counter() - start:.2f} s")
    else:
        head = chat.encode(chat.head + document)
        ids = chat.encode("\n" * bool(document and question) + question + chat.tail)
        if not document:
            head, ids = torch.cat([head, ids])[:-1], ids[-1:]
        _check_range(chat.model, len(head) + len(ids) + cfg.new_tokens, cfg.allow_extrapolation)
        bar = functools.partial(report.progress, what="prefill", w=w)
        store = prefill(chat.model, head, make_store(cfg, w), cfg.chunk, cfg.mlp_splits, cfg.allow_extrapolation, bar)
        seconds = time.perf_counter() - start
        w.print(f"read {len(head)} tokens in {seconds:.1f} s ({len(head) / seconds:.0f} tokens/s), "
                f"cache {store.nbytes / 1e6:.1f} MB")  # fmt: skip
    if cfg.save_context:
        store.save(cfg.save_context)
        w.print(f"saved the context to {cfg.save_context}")
    said, times = [], []

    def hear(i: int) -> None:
        times.append(time.perf_counter())
        before = chat.decode(said)
        said.append(i)
        text = chat.decode(said)
        if w.main and i not in chat.stop and not text.endswith("\ufffd"):  # half a character waits for its rest
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


def recall(store: KVStore, layer: int, q: Tensor, topk, candidates: int = 2) -> float:
    """The share of the exact choice of q (Hq, T, D) that the store's index finds."""
    (k, _), (Hq, T, D) = store.rows(layer), q.shape
    at = store.search(layer, q, topk, candidates)[1].flatten(0, 1)  # (Hq T, k)
    exact = exact_topk(_scores(q.reshape(len(k), -1, D), k), resolve_k(topk, k.shape[1]))[1].reshape(Hq * T, -1)
    return (at[:, :, None] == exact[:, None]).any(dim=1).float().mean().item()


@torch.no_grad()
def bench(cfg: Config, w: cluster.World) -> None:
    """One layer's decode step against dense attention, then whole stores, all in one process and interleaved."""
    dev, cuda, (_, Hq, Hk, D, _), n = w.device, w.device.type == "cuda", SHAPES[cfg.shape], cfg.context
    k, dtype, sdpa = parse_k(cfg.k), torch.bfloat16 if cuda else torch.float32, F.scaled_dot_product_attention
    top, (keys, values) = resolve_k(k, n), synthetic(Hk, n, D, dev, dtype, cfg.seed)
    q = torch.randn(1, Hq, 1, D, generator=cluster.generator(cfg.seed)).to(dev, dtype)
    wide = [x.repeat_interleave(Hq // Hk, dim=1) for x in (keys, values)]
    cases = {
        "SDPA, enable_gqa": lambda: sdpa(q, keys, values, enable_gqa=True),
        "SDPA, expanded heads": lambda: sdpa(q, *wide),
        "one exact search per query head": lambda: flat_search(q, keys, values, top),
        "topk_attention": lambda: topk_attention(q, keys, values, k),
        "topk_attention, group-shared": lambda: topk_attention(q, keys, values, k, share="group"),
    }
    if not cuda:
        store, none = KVStore(index="q8", dtype=dtype), q.new_zeros(Hk, 0, D)
        store.put(0, keys[0], values[0])
        attend = functools.partial(store.attend, 0, q[0], top, none, none, candidates=cfg.candidates)
        cases["KVStore search, q8 proven exact"] = lambda: attend()[None]
    w.print(f"{report.device_name(dev)}, {dtype}, N={n} Hq={Hq} Hk={Hk} D={D}, k={top}, one layer")
    oracle = flat_search(q.float(), keys.float(), values.float(), top)
    seconds, rows = report.timed(cases, dev, 20), []
    dense = min(t for name, (t, _) in seconds.items() if "SDPA" in name or "dense" in name)
    for name, (t, spread) in seconds.items():
        off = f"{(cases[name]().float() - oracle).abs().max():.1e}" if "search" in name or "topk" in name else "-"
        flat = seconds["one exact search per query head"][0]
        rows.append([name, f"{t * 1e3:.2f} ± {spread * 1e3:.2f}", f"{dense / t:.2f}", f"{flat / t:.2f}",
                     f"{report.peak_bytes(cases[name], dev) / 2**20:.1f}", off])  # fmt: skip
    head = ["decode step", "ms", "x fastest dense", "x search per head", "peak MiB", "max |diff|"]
    w.print(report.table(head, rows))
    wide.clear()
    found = {"device": report.device_name(dev), "shape": cfg.shape, "context": n, "k": top,
             "layer": {name: {"seconds": t, "spread": s} for name, (t, s) in seconds.items()},
             "stores": bench_stores(cfg, w, q[0], top)}  # fmt: skip
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", found)


def bench_stores(cfg: Config, w: cluster.World, q: Tensor, top: int) -> dict:
    """A token's attention over all layers from stores of each kind: time, recall, memory. q (Hq, 1, D)."""
    dev, n, cuda, rows, found = w.device, cfg.context, w.device.type == "cuda", [], {}
    L, Hq, Hk, D, weights = SHAPES[cfg.shape]
    config = dict(num_hidden_layers=L, num_key_value_heads=Hk, head_dim=D, num_attention_heads=Hq, vocab_size=0)
    kinds = [("cuda", "exact", "head"), ("cuda", "q4", "head"), ("cpu", "q4", "head"), ("cpu", "q4", "group"),
             ("cpu", "exact", "head")] if cuda else [("cpu", index, "head") for index in INDEXES]  # fmt: skip
    for home, index, share in kinds:
        label = f"{'HBM' if home == 'cuda' else 'host'}, {index}" + (", group-shared" if share == "group" else "")
        base = torch.cuda.memory_allocated(dev) if cuda else 0
        store = KVStore(home, index, torch.bfloat16, pin=cuda and home == "cpu")
        try:
            check_memory(config, n, store)
        except MemoryError as e:
            rows.append([label, str(e).split(";")[0], *["-"] * 5])
            continue
        for layer in range(L):
            store.put(layer, *(x[0] for x in synthetic(Hk, n, D, dev, torch.bfloat16, cfg.seed + layer)))
        cache = RowCache(store, dev) if cuda and home == "cpu" else None
        ks, g, step = q.new_zeros(Hk, 1, D), torch.Generator(dev).manual_seed(1), [q]

        def token(store=store, cache=cache, share=share, step=step, g=g, ks=ks) -> None:
            step[0] = 0.99 * step[0] + 0.14 * torch.randn(q.shape, generator=g, device=dev, dtype=q.dtype)
            for layer in range(L):  # a query near the last one, as in text
                store.attend(layer, step[0], top, ks, ks, share=share, candidates=cfg.candidates, cache=cache)

        if cuda:
            torch.cuda.reset_peak_memory_stats(dev)  # without the synthetic keys as they were made
        seconds, spread = report.timed({label: token}, dev, cfg.new_tokens if cuda else 5)[label]
        peak = (torch.cuda.max_memory_allocated(dev) - base + weights) / 2**30 if cuda else store.nbytes / 2**30
        share_found = recall(store, 0, step[0].to(home), top, cfg.candidates)
        hits = f"{cache.hits / max(1, cache.asked):.0%}" if cache else "-"
        rows.append([label, f"{seconds * 1e3:.2f} ± {spread * 1e3:.2f}", f"{1 / seconds:.1f}", f"{share_found:.4f}",
                     f"{store.nbytes / 2**20:.0f}", f"{peak:.2f}", hits])  # fmt: skip
        facts = {"recall": share_found, "bytes": store.nbytes, "peak_gib": peak}
        found[label] = {"seconds": seconds, "spread": spread, **facts}
        del store, cache, token  # before the next one is made
    last = "peak GPU GiB with weights" if cuda else "GiB held"
    head = [f"store, {L} layers", "ms per token", "tokens/s", "recall", "MiB", last, "rows reused"]
    w.print("\n" + report.table(head, rows))
    return found


def main(cfg: Config) -> None:
    """Run cfg.mode."""
    modes = dict(demo=demo, train=train, eval=evaluate, generate=generate_text, analyze=analyze, bench=bench)
    with cluster.world(cfg.device) as w:
        modes[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
