"""Top-k attention: decode over a long context by attending only to the best keys of a cache in host memory.

Paper    Synk et al., "Exploiting Sparsity for Long Context Inference: Million Token Contexts on Commodity GPUs",
         arXiv:2502.06766.
Idea     Attention is concentrated: of N keys few matter to a query. Keep all keys and values where memory is cheap.
         For each new query find the k keys with the largest inner product. Attend to these and, densely, to the tokens
         generated so far, under one softmax. Nothing is evicted: every query chooses anew.
Here     The claim we check: on two retrieval tasks of a model trained here 2 % of the rows keep 95 % of dense accuracy,
         first and most recent ones or random ones less than half. SmolLM2, if installed, must keep 95 % on one task.
Differs  - A 0.1 M parameter Llama without MLP, and SmolLM2-135M, for Llama-3 8B; 8192 tokens for a million.
         - Scores stay in fp32 and the largest is subtracted; the released code rounds to bf16 and can overflow.
         - Search is exact. The released k-means index is in `bench` alone, the graph index is left out.
         - Tasks follow RULER in our own words. Counting is shown, not judged. Rows over several processes are ours.

    python topk_attention.py                                        # laptop: table, claim, picture; 2 minutes
    python topk_attention.py --quick                                # half a minute, no verdict
    torchrun --nproc-per-node 2 topk_attention.py --device cpu      # the same table
    python topk_attention.py eval --model smollm2 --samples 10      # a real model; see --tasks, --ks, --resume
    python topk_attention.py generate --model smollm2 --document README.md --prompt "What is it?" --save-context c.pt
    python topk_attention.py generate --model smollm2 --load-context c.pt --prompt "Who is it for?"
    python topk_attention.py bench                                  # against dense attention and the released way

Expect   "2 % of the rows keep" at least 0.95 of dense, on CPU with seed 0, for any number of processes.
Writes   results/topk_attention/: metrics.jsonl, claim.json, topk_attention.png, bench.json
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from common import cli, cluster, loop, report
from common.cli import BadInput, opt
from common.kernels import decode_attention as kernels, use_kernels
from common.text import corpus
from common.weights import open_weights, read_json, rope_frequencies, rotate

# %% the method: every query chooses its rows, and attends to them and to the suffix under one denominator
#
# N prefix rows, of which a query reads the best `top`  M suffix rows, always read; if any, the T queries are the last
# Hq query heads, Hk key/value heads                    G = Hq / Hk query heads share one         D head width
# o = softmax([q K_I^T, q K_suffix^T] / sqrt(D)) [V_I; V_suffix],   I = the `top` rows with the largest q K^T


def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, top: int, k_suffix: Tensor | None = None, v_suffix: Tensor | None = None
) -> Tensor:
    """q (Hq, T, D); prefix k, v (Hk, N, D); suffix (Hk, M, D), of which query i sees rows 0..M-T+i -> (Hq, T, D).
    A batch may stand in front. ValueError: top is not a count of rows."""
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be a count of rows, at least 1, got {top!r}; for a fraction x give round(x * N)")
    if k_suffix is None:
        k_suffix, v_suffix = k[..., :0, :], v[..., :0, :]
    T, D, M = q.shape[-2], q.shape[-1], k_suffix.shape[-2]
    q = q.unflatten(-3, (k.shape[-3], -1))  # (Hk, G, T, D): query head h reads key/value head h // G
    scores = torch.einsum("...hgtd,...hnd->...hgtn", q, k)  # every key is scored ...
    scores, rows = scores.topk(min(top, k.shape[-2]), dim=-1)  # ... the best are kept, for each query its own
    values = torch.take_along_dim(v[..., None, None, :, :], rows[..., None], dim=-2)  # only these rows move
    near = torch.einsum("...hgtd,...hmd->...hgtm", q, k_suffix)
    future = torch.ones(T, M, dtype=torch.bool, device=q.device).triu(M - T + 1)
    scores = torch.cat([scores, near.masked_fill(future, -math.inf)], dim=-1)
    far, near = (scores / math.sqrt(D)).softmax(dim=-1).split([rows.shape[-1], M], dim=-1)  # ONE denominator
    o = torch.einsum("...hgtn,...hgtnd->...hgtd", far, values) + torch.einsum("...hgtm,...hmd->...hgtd", near, v_suffix)
    return o.flatten(-4, -3)


# %% what makes it fast: keys are read once, selection is by block maxima, the two parts are merged
# From here on the queries of one key/value head are R = G T rows: q (Hk, R, D), scores (Hk, R, N), in fp32 (or fp64).


def exact_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis, in any order: scores (..., N) -> values, indices (..., k).
    On a CPU by block maxima: the k largest lie in the k blocks with the largest maxima, so two short choices do."""
    N, size = scores.shape[-1], math.isqrt(scores.shape[-1] // max(1, k))  # rows of a block: both choices see sqrt(N k)
    if scores.is_cuda or k == 0 or size < 2 or N < 4096:
        return scores.topk(k, dim=-1, sorted=False)
    largest = lambda x: torch.from_numpy(np.argpartition(x.detach().numpy(), x.shape[-1] - k)[..., x.shape[-1] - k :])
    scores, count = scores if scores.dtype == torch.float64 else scores.float(), N // size
    maxima = scores[..., : count * size].unflatten(-1, (size, count)).amax(dim=-2)  # block c: rows c, c + count, ...
    rows = largest(maxima)[..., None, :] + count * torch.arange(size)[:, None]
    rest = torch.arange(count * size, N).expand(*scores.shape[:-1], -1)
    rows = torch.cat([rows.flatten(-2), rest], dim=-1)
    candidates = scores.gather(-1, rows)
    best = largest(candidates)
    return candidates.gather(-1, best), rows.gather(-1, best)


def key_scores(q: Tensor, k: Tensor) -> Tensor:
    """q (Hk, R, D) . k (Hk, n, D) -> (Hk, R, n), each key read once; keys below fp32 are widened a block at a time."""
    if k.is_cuda and use_kernels(k.device) and {q.dtype, k.dtype} <= set(kernels.DTYPES):
        return kernels.scores(q, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = [torch.bmm(q.to(wide), part.to(wide).mT) for part in k.split(2**16, dim=1)]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


search = lambda q, k, top: exact_topk(key_scores(q, k), top)  # the exact choice: scores and rows, both (Hk, R, top)


def gather_rows(v: Tensor, rows: Tensor) -> Tensor:
    """The chosen values: v (Hk, N, D), rows (Hk, R, n) -> (Hk, R, n, D)."""
    first = v.shape[1] * torch.arange(len(v), device=v.device)[:, None, None]  # row of each head, heads end to end
    return v.flatten(0, 1).index_select(0, (rows + first).flatten()).view(*rows.shape, v.shape[-1])


def softmax_part(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over one set of rows: scaled scores (Hk, R, n), values (Hk, n, D) or each query's own (Hk, R, n, D) ->
    the output (Hk, R, D) and the log-sum-exp (Hk, R). Without a row, or with scores of -inf alone: 0 and -inf."""
    lse = scores.logsumexp(dim=-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    p = (scores - lse.clamp(min=torch.finfo(scores.dtype).min)[..., None]).exp()
    if values.ndim == 3:
        return torch.bmm(p, values.to(p.dtype)), lse
    return torch.matmul(p[:, :, None], values.to(p.dtype))[:, :, 0], lse


def suffix_part(q: Tensor, k: Tensor, v: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Causal attention of T queries, the last of M rows, to all M: q (Hk, G T, D), k, v (Hk, M, D) -> output, lse."""
    scores = key_scores(q, k).unflatten(1, (-1, T)) / math.sqrt(q.shape[-1])  # (Hk, G, T, M)
    future = torch.ones(T, k.shape[1], dtype=torch.bool, device=q.device).triu(k.shape[1] - T + 1)
    return softmax_part(scores.masked_fill(future, -math.inf).flatten(1, 2), v)


def merge_lse(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of rows: outputs (..., D), log-sum-exps (...). An empty set has -inf."""
    lse = torch.logaddexp(l1, l2)
    base = lse.masked_fill(lse == -math.inf, 0)
    return (l1 - base).exp()[..., None] * o1 + (l2 - base).exp()[..., None] * o2, lse


def released_lists(k: Tensor):
    """The released code's index as a choose() for KVStore: k-means lists of 1000 keys or more, trained on the first
    100 000. A query reads the 8 lists whose centres score highest, and never sees the others: this is approximate."""
    N, heads = k.shape[1], []
    count = math.ceil(N / 1000) if N <= 900_000 else math.ceil(math.sqrt(N))
    for keys in k.float():
        sample = keys[:100_000]
        centre = sample[torch.randperm(len(sample), generator=cluster.generator(N))[:count].to(k.device)]
        for _ in range(10):
            nearest = (sample @ centre.T).argmax(dim=1)
            centre = F.normalize(torch.zeros_like(centre).index_add_(0, nearest, sample), dim=1)
        member = (keys @ centre.T).argmax(dim=1)
        heads.append((centre, member.argsort().split(member.bincount(minlength=count).tolist())))

    def choose(q: Tensor, k: Tensor, top: int) -> tuple[Tensor, Tensor]:
        scores = torch.full((*q.shape[:2], top), -math.inf, device=k.device)  # where too few are found
        rows = torch.zeros(scores.shape, dtype=torch.long, device=k.device)
        for h, (centre, lists) in enumerate(heads):
            for r, query in enumerate(q[h].float()):
                read = torch.cat([lists[i] for i in (centre @ query).topk(min(8, count)).indices])
                best, at = (k[h, read].float() @ query).topk(min(top, len(read)))
                scores[h, r, : len(at)], rows[h, r, : len(at)] = best, read[at]
        return scores, rows

    return choose


# %% over processes: each holds a slice of the sequence; only scores and partial outputs travel


def sharded_topk_attention(q, k, v, top: int, k_suffix=None, v_suffix=None, group=None, choose=search) -> Tensor:
    """topk_attention whose prefix is cut over the ranks of `group`: k, v (Hk, n, D) are this rank's rows, in order;
    q and the suffix are equal on all, and so is the result. Collective. The ranks' best scores are gathered; each then
    attends to what survives of its own, and the parts are merged."""

    def everyones(x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return parts

    queries = q.reshape(len(k), -1, q.shape[-1])  # (Hk, R, D)
    scores, rows = choose(queries, k, min(top, k.shape[1]))
    scores, order = scores.sort(dim=-1, descending=True)
    union = torch.cat(everyones(F.pad(scores, (0, top - scores.shape[-1]), value=-math.inf)), dim=-1)
    owner = union.sort(dim=-1, descending=True, stable=True).indices[..., :top] // top  # ties: the lowest rank
    mine = (owner == dist.get_rank(group)).sum(dim=-1, keepdim=True)  # that many of my best are in
    scores = scores.masked_fill(torch.arange(scores.shape[-1], device=k.device) >= mine, -math.inf)
    o, lse = softmax_part(scores / math.sqrt(q.shape[-1]), gather_rows(v, rows.gather(-1, order)))
    parts = [(x[..., :-1], x[..., -1]) for x in everyones(torch.cat([o, lse[..., None]], dim=-1))]
    o, lse = reduce(lambda a, b: merge_lse(*a, *b), parts)
    if k_suffix is not None:
        o, _ = merge_lse(o, lse, *suffix_part(queries, k_suffix, v_suffix, q.shape[1]))
    return o.reshape(q.shape).to(q.dtype)


# %% the store: all keys and values in host memory, of which a step is handed the chosen rows


class KVStore:
    """Keys and values of one sequence, a pair (Hk, N, D) per layer; choose(q, k, top) -> scores, rows finds the rows.
    group: processes that hold a slice each. meta: what the rows were made from, see prefill."""

    def __init__(self, device="cpu", dtype: torch.dtype = torch.float32, choose=search, group=None):
        self.device, self.dtype, self.choose, self.group = torch.device(device), dtype, choose, group
        self.layers, self.meta, self.n = [], {}, 0

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep a copy of k, v (Hk, N, D) as layer `layer`, the next one or one that is there, in the store's dtype."""
        self.n, group = k.shape[1], self.group
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        own = slice(rank * self.n // size, (rank + 1) * self.n // size)
        rows = lambda x: x[:, own].to(self.device, self.dtype, copy=True, memory_format=torch.contiguous_format)
        self.layers[layer : layer + 1] = [(rows(k), rows(v))]

    def rows(self, layer: int, q: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """All that a step is handed for q (Hk, R, D): scores (Hk, R, n), values (Hk, R, n, D), or (Hk, N, D) if all."""
        k, v = self.layers[layer]
        if top >= k.shape[1]:
            return key_scores(q, k), v
        scores, rows = self.choose(q, k, top)
        return scores, gather_rows(v, rows)

    def attend(self, layer: int, q: Tensor, top: int, k_suffix: Tensor, v_suffix: Tensor) -> Tensor:
        """topk_attention of q (Hq, T, D) over the stored rows and the suffix (Hk, M, D), on q's device."""
        (k, v), scale = self.layers[layer], 1 / math.sqrt(q.shape[-1])
        if self.group is not None:
            here, *suffix = (x.to(self.device) for x in (q, k_suffix, v_suffix))
            return sharded_topk_attention(here, k, v, top, *suffix, self.group, self.choose).to(q.device)
        queries = q.reshape(len(k), -1, q.shape[-1])  # (Hk, R, D)
        if k.is_cuda and use_kernels(k.device) and {q.dtype, k.dtype} <= set(kernels.DTYPES):
            scores, rows = self.choose(queries, k, min(top, self.n))
            part = kernels.attend(scores, rows, v, scale)
        else:
            scores, values = self.rows(layer, queries.to(self.device), top)
            part = softmax_part(scores.to(q.device) * scale, values.to(q.device))
        o, _ = merge_lse(*part, *suffix_part(queries, k_suffix, v_suffix, q.shape[1]))
        return o.reshape(q.shape).to(q.dtype)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in layer)

    def check(self, model: Llama) -> None:
        """BadInput: the rows come from another model, or its layers are not all here."""
        own = model.fingerprint()
        if len(self.layers) != len(model.layers) or self.meta.get("model", own) != own:
            raise BadInput("the stored context is of a model with other weights, settings or --dtype. Read it again.")

    def save(self, path: str | Path) -> None:
        """Write one new file, complete or not at all. BadInput: something is there already. OSError: cannot write."""
        new = Path(f"{path}.{os.getpid()}.tmp")
        if Path(path).exists() or new.exists():
            raise BadInput(f"{path} is there, and nothing of yours is overwritten. Name a new file.")
        try:
            torch.save({"meta": self.meta, "layers": self.layers}, new)
            os.replace(new, path)
        except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
            new.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {e}. Free space, or name another file.") from e

    @classmethod
    def load(cls, path: str | Path) -> KVStore:
        """Open a saved context by memory map. BadInput: damaged. OSError: it is missing."""
        open(path, "rb").close()
        try:
            found, store = torch.load(path, mmap=True, weights_only=True, map_location="cpu"), cls()
            store.layers, store.meta, k = found["layers"], dict(found["meta"]), found["layers"][0][0]
            store.dtype, store.n = k.dtype, k.shape[1]
            if any(x.shape != k.shape for layer in store.layers for x in layer):
                raise ValueError("its layers do not have one shape")
        except Exception as e:  # whatever a damaged file makes torch raise, or too little memory
            raise BadInput(f"{path} cannot be opened as a saved context ({e}). Free memory, or save it again.") from e
        return store


# %% the model: a Llama whose cache lives elsewhere


class Layer(nn.Module):
    """Attention with rotary positions, Hq query heads over Hk key/value heads, then a SwiGLU MLP, if there is one."""

    def __init__(self, c: dict):
        super().__init__()
        C, M, D = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        q, kv = c["num_attention_heads"] * D, c["num_key_value_heads"] * D
        matrices = lambda **sizes: nn.ModuleDict({name: nn.Linear(*s, bias=False) for name, s in sizes.items()})
        self.self_attn = matrices(q_proj=(C, q), k_proj=(C, kv), v_proj=(C, kv), o_proj=(q, C))
        self.mlp = matrices(gate_proj=(C, M), up_proj=(C, M), down_proj=(M, C)) if M else None
        self.input_layernorm = nn.RMSNorm(C, c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(C, c["rms_norm_eps"]) if M else None

    def qkv(self, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: x (B, T, C) -> (B, Hq, T, D) and twice (B, Hk, T, D)."""
        y, D = self.input_layernorm(x), 2 * angle.shape[-1]
        heads = lambda name: self.self_attn[name](y).unflatten(-1, (-1, D)).transpose(1, 2)
        return rotate(heads("q_proj"), angle), rotate(heads("k_proj"), angle), heads("v_proj")

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows attention: x (B, T, C), the heads' outputs y (B, Hq, T, D) -> (B, T, C)."""
        x = x + self.self_attn.o_proj(y.transpose(1, 2).flatten(2))
        if self.mlp is None:
            return x
        y, m = self.post_attention_layernorm(x), self.mlp
        return x + m.down_proj(F.silu(m.gate_proj(y)) * m.up_proj(y))


class Llama(nn.Module):
    """A Llama under Hugging Face's config keys and names (less "model."): ids (B, T) -> dense logits (B, T, V)."""

    def __init__(self, config: dict):
        super().__init__()
        heads = config["num_attention_heads"]
        self.config = c = {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048} | config
        c["head_dim"] = c.get("head_dim") or c["hidden_size"] // heads
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        if not c.get("tie_word_embeddings"):
            self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        with torch.device("cpu"):
            self.inv_freq = rope_frequencies(c)  # (D/2,)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Llama:
        """A Hugging Face folder, a GGUF file, or smollm2. BadInput and others: see open_weights."""
        weights = open_weights(str(path))
        with torch.device("meta"):
            model = cls(weights.config)
        tensors = {n.removeprefix("model."): weights.read(n).to(device, dtype) for n in weights.names}
        model.load_state_dict(tensors, assign=True)
        model.tokenizer = weights.tokenizer
        return model.requires_grad_(False).eval()

    def angle(self, position: Tensor) -> Tensor:
        """Rotary angles in fp32 (fp64 in an fp64 model), whatever the model's dtype: (..., T) -> (..., T, D/2)."""
        weight = self.norm.weight
        freq = self.inv_freq.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return position.to(freq)[..., None] * freq

    def check_range(self, n: int) -> None:
        """BadInput: n tokens are more than the model has positions."""
        if n > (most := self.config["max_position_embeddings"]):
            raise BadInput(f"{n} tokens exceed the model's max_position_embeddings {most}. Give it less to read.")

    def logits(self, x: Tensor) -> Tensor:  # (..., C) -> (..., V)
        head = self.embed_tokens if self.config.get("tie_word_embeddings") else self.lm_head
        return F.linear(self.norm(x), head.weight)

    def forward(self, ids: Tensor, position: Tensor | None = None) -> Tensor:
        """position (B, T), default 0..T-1: gaps may be left between tokens."""
        position = torch.arange(ids.shape[1]) if position is None else position[:, None]  # an axis for the heads
        angle, x = self.angle(position), self.embed_tokens(ids)
        for layer in self.layers:
            x = layer.finish(x, causal(*layer.qkv(x, angle)))
        return self.logits(x)

    def fingerprint(self) -> str:
        """A hash of the config, the rotary angles and a slice of every weight, those of keys and values among them."""
        numbers = {n: x for n, x in sorted(self.config.items()) if isinstance(x, (int, float))}
        parts = [self.inv_freq, *(p.flatten()[:: p.numel() // 256 + 1].cpu() for p in self.state_dict().values())]
        return hashlib.sha256(json.dumps(numbers).encode() + torch.cat(parts).float().numpy().tobytes()).hexdigest()


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last T of S rows, row i to keys 0..S-T+i: q (B, Hq, T, D), k, v (B, Hk, S, D)."""
    mask, T, S = {"is_causal": True}, q.shape[2], k.shape[2]
    if T < S:  # is_causal would align the rows with the first T keys
        from torch.nn.attention.bias import causal_lower_right  # takes 2 s, so it waits until it is needed

        mask = {"attn_mask": causal_lower_right(T, S)}
    return sdpa(q, k, v, **mask, enable_gqa=q.shape[1] != k.shape[1])


@torch.no_grad()
def prefill(model: Llama, ids: Tensor, store: KVStore, chunk=2048, text: str = "") -> KVStore:
    """Read ids (N,) with dense attention; store N rows of every layer, and a hash of text. Returns the store. Layer by
    layer, `chunk` tokens at a time; the last layer stops at keys and values. Each rank reads the whole text."""
    n, c, weight = len(ids), model.config, model.norm.weight
    model.check_range(n)
    states = model.embed_tokens(ids.to(weight.device))  # (N, C)
    k, v = (weight.new_empty(1, c["num_key_value_heads"], n, c["head_dim"]) for _ in "kv")
    for i, layer in enumerate(model.layers):
        for a in range(0, n, chunk):
            e = min(n, a + chunk)
            x = states[None, a:e]  # (1, e - a, C)
            q, k[:, :, a:e], v[:, :, a:e] = layer.qkv(x, model.angle(torch.arange(a, e)))
            if i < len(model.layers) - 1:
                states[a:e] = layer.finish(x, causal(q, k[:, :, :e], v[:, :, :e]))[0]
        store.put(i, k[0], v[0])
    store.meta = {"model": model.fingerprint(), "text": hashlib.sha256(text.encode()).hexdigest()}
    return store


def resolve_k(k: int | float | str, n: int) -> int:
    """Rows of n that k means, a number or a word: a count such as 64, a fraction such as 0.02 (rounded up), dense."""
    if isinstance(k, str):
        k = 1.0 if k == "dense" else int(k) if k.isdecimal() else float(k) if re.fullmatch(r"\d*\.\d+", k) else k
    if not (type(k) is int and k >= 1 or type(k) is float and 0 < k <= 1):
        raise BadInput(f"k must be an int >= 1, a fraction in (0, 1] with a point in it, or dense, got {k!r}")
    return min(n, k if type(k) is int else max(1, math.ceil(k * n - 1e-9)))


@torch.no_grad()
def decode(model: Llama, ids: Tensor, store: KVStore, k, suffix: dict | None = None) -> Tensor:
    """Logits (T, V) of ids (T,) that follow the stored prefix and the suffix; each query chooses its own rows.
    k: as resolve_k, or a list with one for each layer. suffix: layer -> keys and values (Hk, M, D) of what came after
    the prefix; ids join it, the store is unchanged. BadInput: a bad k, another model's store, too many tokens."""
    suffix, logits, L = {} if suffix is None else suffix, [], len(model.layers)
    each = k if isinstance(k, list) else [k] * L
    if len(each) != L or len(ids) < 1:
        raise BadInput(f"there are {len(each)} budgets for {L} layers" if len(ids) else "there is no token to read")
    if not suffix:
        store.check(model)
    top = [resolve_k(x, max(1, store.n)) for x in each]
    for piece in ids.to(model.norm.weight.device).split(64):  # the scores of a long question take room
        start = store.n + (suffix[0][0].shape[1] if suffix else 0)
        model.check_range(start + len(piece))
        angle, x = model.angle(torch.arange(start, start + len(piece))), model.embed_tokens(piece)[None]
        for i, layer in enumerate(model.layers):
            q, *new = (y[0] for y in layer.qkv(x, angle))
            suffix[i] = [torch.cat(pair, dim=1) for pair in zip(suffix[i], new, strict=True)] if i in suffix else new
            x = layer.finish(x, store.attend(i, q, top[i], *suffix[i])[None])
        logits.append(model.logits(x[0]))
    return torch.cat(logits)


def generate(model: Llama, ids: Tensor, k, max_new_tokens: int, store: KVStore, stop=()) -> Tensor:
    """Greedy continuation of ids after the store's prefix, (<= max_new_tokens,), to an id of `stop`. BadInput: NaN."""
    suffix, new = {}, []
    while len(new) < max_new_tokens and (not new or new[-1] not in stop):
        logits = decode(model, ids, store, k, suffix)[-1]
        if logits.isnan().any():
            raise BadInput("the model's logits are NaN: its weights or the stored keys hold NaN or infinity.")
        ids = logits.argmax(dim=-1, keepdim=True)
        new.append(int(ids))
    return torch.tensor(new, dtype=torch.long)


# %% settings


@dataclass
class Config:
    mode: str = opt("demo", "what to do", ("demo", "eval", "generate", "bench"), positional=True)
    quick: bool = opt(False, "a first look in half a minute, without a verdict", modes=("demo",))
    model: str = opt("smollm2", "smollm2, a Hugging Face folder, or a GGUF file", modes=("eval", "generate"))
    k: str = opt("64", "rows that a query reads: a count, a fraction such as 0.02, or dense", modes=("generate",))
    ks: tuple = opt(("1", "8", "0.01", "0.02"), "budgets to compare with dense", modes=("eval",))
    tasks: tuple = opt(("single",), "which tasks: single, multikey, multivalue, vt, cwe", modes=("eval",))
    samples: int = opt(8, "prompts for each task", modes=("eval",))
    context: int = opt(2048, "tokens of a prompt", modes=("eval",))
    document: str = opt("", "text file to read before the question", modes=("generate",))
    prompt: str = opt("", "the question", modes=("generate",))
    new_tokens: int = opt(64, "tokens of an answer at most", modes=("generate",))
    save_context: str = opt("", "new file for the document's keys and values", modes=("generate",))
    load_context: str = opt("", "file that --save-context wrote", modes=("generate",))
    dtype: str = opt("float32", "precision; bfloat16 on a GPU", ("float32", "bfloat16"), modes=("eval", "generate"))
    keys: int = opt(65536, "keys to search; 1048576 on a GPU is the paper's scale, not yet run", modes=("bench",))
    steps: tuple = opt((440, 160), "steps of training, on short and on long rows", modes=("demo",))
    seed: int = opt(0, "seed of the weights, the rows and the prompts", modes=("demo", "eval", "bench"))
    device: str = opt("auto", "where to compute", ("auto", "cpu", "cuda"))
    out: str = opt("results/topk_attention", "folder of what the run writes", modes=("demo", "eval", "bench"))
    resume: bool = opt(False, "go on with an evaluation that was stopped", modes=("eval",))

    def __post_init__(self):
        for word in (self.k, *self.ks):
            resolve_k(word, 1)  # refuses what is no budget
        taken = self.save_context and (Path(self.save_context).exists() or not self.document + self.load_context)
        taken = taken or not Path(self.save_context).parent.is_dir()
        for wrong, message in (
            (min(self.new_tokens, self.samples) < 1, "--new-tokens and --samples are at least 1"),
            (min(self.context, self.keys) < 64, "--context and --keys are at least 64"),
            (len(self.steps) != 2 or min(self.steps) < 1, f"--steps are two counts, such as 440 160, got {self.steps}"),
            (set(self.tasks) - set(ROOM), f"--tasks {' '.join(self.tasks)}: there are {', '.join(ROOM)}"),
            (self.mode == "generate" and not self.prompt, "there is nothing to answer: pass --prompt TEXT"),
            (self.document and not Path(self.document).is_file(), f"--document {self.document}: no such file"),
            (taken, f"--save-context {self.save_context}: name a new file in a folder that is there, and a --document"),
        ):
            if wrong:
                raise ValueError(message)


# %% experiment 1: a small model that truly retrieves
# Vocabulary: 32 keys x 16 variants (id = 16 key + variant), 32 query tokens, 64 filler tokens. A row is random filler
# with variants of 8 keys planted in it, then 8 times a query token and its answer. From the key alone 1/16 is right.

KEYS, VARIANTS, NEEDLES, FILLER = 32, 16, 8, 64
QUERY, NOISE = KEYS * VARIANTS, KEYS * VARIANTS + KEYS  # first query id, first filler id
TOY = {
    "vocab_size": NOISE + FILLER, "hidden_size": 64, "intermediate_size": 0, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e12,
    "max_position_embeddings": 2**24,
}  # fmt: skip
TOY_TASKS = ("single", "multivalue", "counting")


def toy_rows(task: str, n: int, count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`count` rows of n context tokens, then 8 queries and answers (count, n + 16). And for each query the ids of all
    variants of its key, and which of them are right, both (count, 8, 16). single: a key has one variant. multivalue:
    four, all are right. counting: one variant comes 6 times and three come twice; the frequent one is right."""
    copies = {"single": [0], "multivalue": [0, 1, 2, 3], "counting": [0] * 6 + [1, 1, 2, 2, 3, 3]}[task]
    keys = torch.rand(count, KEYS, generator=g).argsort(dim=1)[:, :NEEDLES]  # (count, 8)
    variant = torch.rand(count, NEEDLES, VARIANTS, generator=g).argsort(dim=2)  # (count, 8, 16), shuffled
    names = keys[..., None] * VARIANTS + variant
    rows = NOISE + torch.randint(FILLER, (count, n), generator=g)
    place = torch.rand(count, n, generator=g).argsort(dim=1)[:, : NEEDLES * len(copies)]
    rows.scatter_(1, place, names[..., copies].flatten(1))
    right = (torch.arange(VARIANTS) < (4 if task == "multivalue" else 1)).expand(names.shape)
    return torch.cat([rows, torch.stack([QUERY + keys, names[..., 0]], dim=2).flatten(1)], dim=1), names, right


def train_toy(cfg: Config, w: cluster.World, run: report.Run) -> Llama:
    """Train the toy on single and multivalue rows, short ones and then long ones. Every rank trains the same model."""

    def positions(count: int, n: int, g: torch.Generator) -> Tensor:  # (count, n), with up to 4 jumps in each row
        span = 32768 * torch.rand(count, 1, generator=g) ** 3  # in all, so that short rows know far positions
        share = torch.rand(count, 4, generator=g) * (torch.rand(count, 4, generator=g) < 0.7)
        jump = (span * share / share.sum(dim=1, keepdim=True).clamp(min=1e-6)).long()
        where = torch.randint(1, n, (count, 4), generator=g)
        return torch.arange(n) + torch.zeros(count, n, dtype=torch.long).scatter_add_(1, where, jump).cumsum(dim=1)

    model, g, (short, long) = Llama(TOY), cluster.generator(cfg.seed, 0), cfg.steps
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 if "embed" in name else (3 * p.shape[1]) ** -0.5, generator=g)
    optimizer = torch.optim.AdamW(model.to(w.device).parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in report.progress(range(short + long), "train", w):
        g = cluster.generator(cfg.seed, 1, step)
        if step < short:
            parts = [toy_rows("multivalue" if step % 4 == 3 else "single", 48, 32, g)]
        else:
            parts = [toy_rows(task, 1008, 2, g) for task in ("single", "multivalue")]
        ids, names, right = (torch.cat(x).to(w.device) for x in zip(*parts, strict=True))
        log_p = model(ids, positions(*ids.shape, g).to(w.device))[:, -2 * NEEDLES :: 2].log_softmax(dim=-1)
        loss = -(log_p.gather(-1, names) * right).sum(dim=-1).div(right.sum(dim=-1)).mean()  # over the right variants
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / (short + long)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            run.log(run="train", step=step + 1, loss=loss.detach())
    return model.requires_grad_(False).eval()


def first_and_recent(q: Tensor, k: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """A baseline's choose(), which does not look at the keys: the first 4 rows, and for the rest the most recent."""
    rows = torch.arange(k.shape[1], device=k.device).roll(top - min(4, top // 2))[:top].expand(*q.shape[:2], -1)
    return key_scores(q, k).gather(-1, rows), rows


def random_rows(q: Tensor, k: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Another baseline's choose(): rows drawn for each query and head, the same ones in every layer and prompt."""
    rows = torch.rand(*q.shape[:2], k.shape[1], generator=cluster.generator(k.shape[1], top)).topk(top).indices
    return key_scores(q, k).gather(-1, rows := rows.to(k.device)), rows


def toy_accuracy(model, cfg: Config, task: str, n: int, count: int, columns: dict, w: cluster.World) -> list[float]:
    """Accuracy of each column (k, choose): n tokens are read densely, then the queries are decoded. `count` rows of 8
    queries, shared by the ranks. A query scores the share of its right variants among as many of the largest logits."""
    ids, names, right = toy_rows(task, n, count, cluster.generator(cfg.seed, 2, n, TOY_TASKS.index(task)))
    hits = torch.zeros(len(columns), dtype=torch.float64, device=w.device)
    for i in range(w.rank, count, w.size):
        store = prefill(model, ids[i, :n], KVStore())
        answers = names[i][right[i]].view(NEEDLES, -1).to(w.device)  # (8, right ones)
        for j, (k, choose) in enumerate(columns.values()):
            store.choose = choose
            best = decode(model, ids[i, n:], store, k)[::2].topk(answers.shape[1]).indices
            hits[j] += (answers[:, :, None] == best[:, None]).any(dim=-1).double().mean(dim=-1).sum()
    return (cluster.total(hits) / (count * NEEDLES)).tolist()


# %% experiment 2: tasks in text on a real model, after RULER (arXiv:2404.06654), in our own words

ROOM = {"single": 12, "multikey": 20, "multivalue": 60, "vt": 30, "cwe": 120}  # tokens left for the answer
TEMPLATES = {  # a token that tells a chat template -> before the user's text, after it, tokens that end an answer
    "<|im_start|>": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>")),
    "<|start_header_id|>": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
                            "<|start_header_id|>assistant<|end_header_id|>\n\n", ("<|eot_id|>", "<|end_of_text|>")),
}  # fmt: skip


def ruler(task: str, n_tokens: int, seed: int, tokenizer=None) -> tuple[str, list[str]]:
    """The longest prompt that leaves room for the answer in n_tokens, and the strings that a right answer holds. Its
    last line is the start of the answer. Bytes are counted without a tokenizer. BadInput: there is no room."""
    text = re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"\s+", " ", corpus("docs")))
    hay = [s for s in re.split(r"(?<=[.!?]) ", text) if 30 <= len(s) <= 400]
    words = sorted(set(re.findall(r"\b[a-z]{5,7}\b", " ".join(hay))))

    def make(units: int) -> tuple[str, list[str]]:  # of so many sentences, or words
        rng = random.Random(f"{task} {seed}")
        names = ["-".join(rng.sample(words, 2)) for _ in range(4 if task == "multikey" else 1)]
        values = [str(rng.randrange(10000, 100000)) for _ in range(4)]
        answers = values if task == "multivalue" else values[:1]
        pairs = zip(names * 4, values[: max(len(names), len(answers))], strict=False)
        needles = [f"Please note that the secret number of {name} is {value}." for name, value in pairs]
        s, are = ("s", "are") if len(answers) > 1 else ("", "is")
        question = f"What {are} the secret number{s} of {names[0]} in the text above?"
        start = f"According to the text, the secret number{s} of {names[0]} {are}"
        rng.shuffle(needles)
        if task == "vt":  # a number passed from variable to variable
            answers = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
            given = [values[0], *(f"VAR {x}" for x in answers[:-1])]
            needles = [f"VAR {a} = {b}." for a, b in zip(answers, given, strict=True)]
            question = f"Which 5 variables hold the value {values[0]} in the text above?"
            start = f"The variables that hold {values[0]} are"
        first = rng.randrange(len(hay))
        text = [hay[(first + i) % len(hay)] for i in range(units)]
        for place, needle in zip(sorted(rng.sample(range(40), len(needles)), reverse=True), needles[::-1], strict=True):
            text.insert(round(place / 39 * units), needle)  # at one of 40 depths
        if task == "cwe":  # ten words come more often than the rest
            answers, others = (mixed := rng.sample(words, len(words)))[:10], mixed[10:]
            often = 1 + units // len(others)  # no other word comes more often than that
            text = answers * 6 * often + (others * often)[:units]
            rng.shuffle(text)
            question = "Which ten words come most often in the list above?"
            start = "The ten most frequent words of the list are"
        return f"Read this. You will be asked about it.\n{' '.join(text)}\n{question}\n{start}", answers

    size = lambda text: len(tokenizer.encode(text).ids if tokenizer else text.encode()) + ROOM[task]
    low, high = 0, max(2, n_tokens)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(make(middle)[0]) <= n_tokens else (low, middle)
    if low == 0:
        raise BadInput(f"task {task} needs {size(make(1)[0])} tokens, and {n_tokens} are left for it. Raise --context.")
    return make(low)


class Chat:
    """A real model with its tokenizer, fed in the form of its chat template, one user turn, and with its BOS."""

    def __init__(self, cfg: Config, device: torch.device):
        self.model = Llama.from_pretrained(cfg.model, getattr(torch, cfg.dtype), device)
        self.tokenizer, config = self.model.tokenizer(), Path(cfg.model) / "tokenizer_config.json"
        template = read_json(config).get("chat_template") if config.exists() else ""
        if (file := config.with_name("chat_template.jinja")).exists():  # where newer folders keep it
            template = file.read_text()
        template = "<|im_start|>" if cfg.model.endswith(("smollm2", ".gguf")) else str(template or "")
        self.head, self.tail, ends = next((x for token, x in TEMPLATES.items() if token in template), ("", "", ()))
        if template and not self.tail:
            raise BadInput(f"the chat template of {cfg.model} is unknown here: it has none of {', '.join(TEMPLATES)}.")
        eos = self.model.config.get("eos_token_id")
        self.stop = {*map(self.tokenizer.token_to_id, ends), *(eos if isinstance(eos, list) else [eos])}

    def encode(self, text: str, first: bool = True) -> Tensor:
        """Ids. The first piece of a prompt starts with BOS if the tokenizer puts one there, and never with two."""
        plain, whole = self.tokenizer.encode(text, add_special_tokens=False).ids, self.tokenizer.encode(text).ids
        return torch.tensor((whole[:1] if first and whole[:1] != plain[:1] else []) + plain, dtype=torch.long)


def score_tasks(cfg: Config, w: cluster.World, run: report.Run, done: dict) -> dict[str, list[float]]:
    """Mean score of each task, dense and with every budget of --ks: the share of the right strings in an answer. The
    ranks share the prompts, and an answer is a line of metrics.jsonl. done: what a stopped run has answered."""
    chat, words, table = Chat(cfg, w.device), ("dense", *cfg.ks), {}
    mark = chat.model.fingerprint()

    def answers(task: str, sample: int) -> list[dict]:
        room = cfg.context - len(chat.encode(chat.head + chat.tail)) - 2
        prompt, right = ruler(task, room, 1000 * cfg.seed + sample, chat.tokenizer)
        asked, start = prompt.rsplit("\n", 1)
        ids, found = chat.encode(chat.head + asked + (chat.tail or "\n") + start), []
        store = prefill(chat.model, ids[:-1], KVStore(dtype=getattr(torch, cfg.dtype)))
        for word in words:
            k = resolve_k(word, store.n)
            output = chat.tokenizer.decode(generate(chat.model, ids[-1:], k, ROOM[task], store, chat.stop).tolist())
            score = sum(x.lower() in output.lower() for x in right) / len(right)
            found.append({"task": task, "sample": sample, "k": word, "score": score, "output": output, "model": mark})
        return found

    for task in cfg.tasks:
        todo = [s for s in range(cfg.samples) if done.get((task, s, words[-1]), {}).get("model") != mark]
        for i in report.progress(range(0, len(todo), w.size), task, w):
            parts = [[]] * w.size
            dist.all_gather_object(parts, [x for s in todo[i + w.rank : i + w.rank + 1] for x in answers(task, s)])
            for x in (x for part in parts for x in part):
                done[x["task"], x["sample"], x["k"]] = x
                run.log(step=len(done), **x)
        table[task] = [sum(done[task, s, word]["score"] for s in range(cfg.samples)) / cfg.samples for word in words]
    title = f"{cfg.model}, {cfg.samples} prompts of {cfg.context} tokens"
    w.print("\n" + report.table([title, *words], [[task, *scores] for task, scores in table.items()]))
    return table


# %% demo: the claim, and what a step touches

EXACT = {"dense": (1.0, search), "k = 1": (1, search), "k = 8": (8, search), "2 %": (0.02, search)}
BASELINES = {"first+recent 2 %": (0.02, first_and_recent), "random 2 %": (0.02, random_rows)}


def judge(found: dict[tuple, list[float]], real: list[float]) -> tuple[str, bool]:
    """The claim's numbers, and whether it holds. found: (task, tokens) -> accuracies as in EXACT and BASELINES. real:
    SmolLM2's, dense first and 2 % last, or nothing. A dense model that retrieves nothing proves nothing."""
    kept = []  # shares of dense for each length: at 2 %, first and recent rows, random rows
    for n in {n for _, n in found}:
        dense, *_, two, ends, blind = map(sum, zip(found["single", n], found["multivalue", n], strict=True))
        kept.append((two / dense, ends / dense, blind / dense) if dense / 2 >= 0.3 else (0.0, math.nan, math.nan))
    two, ends, blind = min(x[0] for x in kept), max(x[1] for x in kept), max(x[2] for x in kept)
    small = [real[-1] / real[0] if real[0] else 0.0] if real else []
    here = f"2 % of the rows keep {two:.2f} of dense, first+recent {ends:.2f}, random {blind:.2f}"
    return here + "".join(f"; SmolLM2 {x:.2f}" for x in small), min([two, *small]) >= 0.95 and max(ends, blind) < 0.5


def memory(n: int) -> dict:
    """Measured on a CPU, on n random keys for 8 query heads over 2, k = 1 %: bytes that dense attention reads, bytes
    that one step is handed, and the most that torch holds at once for it."""
    store, q, none = KVStore(), torch.randn(2, 4, 64, generator=cluster.generator(n)), torch.zeros(2, 0, 64)
    store.put(0, *torch.randn(2, 2, n, 64, generator=cluster.generator(n, 1)))
    handed = sum(x.nbytes for x in store.rows(0, q, n // 100))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without the profiler's own lines
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        store.attend(0, q.view(8, 1, 64), n // 100, none, none)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return {"keys": n, "dense": store.nbytes, "handed": handed, "peak": int(live.max())}


def demo(cfg: Config, w: cluster.World) -> None:
    """Train the toy; print accuracy by budget beside the baselines, the real model, memory, and the claim."""
    cfg = replace(cfg, steps=(264, 96)) if cfg.quick and cfg.steps == Config.steps else cfg
    run, columns, found, real = report.Run(cfg.out, cfg, w), EXACT | BASELINES, {}, []
    model = train_toy(cfg, w, run)
    for n, count in ((2048, 32), (8192, 16))[: 1 if cfg.quick else 2]:
        for task in TOY_TASKS:
            found[task, n] = toy_accuracy(model, cfg, task, n, count, columns, w)
            run.log(task=task, context=n, **dict(zip(columns, found[task, n], strict=True)))
    w.print("\n" + report.table(["accuracy", *columns], [[f"{t}, {n} tokens", *x] for (t, n), x in found.items()]))

    def draw(_, axis) -> None:
        for (task, n), accuracy in found.items():
            style = {"color": f"C{TOY_TASKS.index(task)}", "ls": "-" if n == 2048 else "--"}
            axis.plot([*columns], accuracy, marker="o", label=f"{task}, {n} tokens", **style)
        axis.set(ylabel="accuracy", xlabel="rows that a query reads", ylim=(-0.03, 1.03))
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

    if not cfg.quick:
        try:
            real = score_tasks(Config("eval", samples=3, seed=cfg.seed, out=cfg.out), w, run, {})["single"]
        except ModuleNotFoundError as e:
            w.print(f"the real model is left out: {e}")
    if w.main:
        size = memory(2**18)
        run.log(**size)
        dense, handed, peak = (f"{size[name] / 1e6:.1f} MB" for name in ("dense", "handed", "peak"))
        w.print(f"\nof {2**18} keys and values, {dense}, a step with 1 % is handed {handed} and holds {peak} at once")
        w.print(report.picture(f"{cfg.out}/topk_attention.png", draw, figsize=(9, 4)))
    if cfg.quick:
        return w.print("quick: no verdict")
    run.claim("2 % of the rows keep 95 % of dense accuracy on two retrieval tasks, and other 2 % keep less than half",
              "under 2 % of the keys keep over 95 % of the dense score (Llama-3 8B)", *judge(found, real),
              f"single and multivalue, the worse of 2048 and 8192 tokens, seed {cfg.seed}, {w.device}")  # fmt: skip


# %% eval, generate, bench


def evaluate(cfg: Config, w: cluster.World) -> None:
    """Tasks by budgets, of a real model. --resume goes on with what metrics.jsonl holds. BadInput: other settings."""
    files, done = [Path(cfg.out, "metrics.jsonl"), Path(cfg.out, "metrics.eval.jsonl")], {}
    for path in files if cfg.resume else []:
        head, *lines = report.lines(path) or [{}]
        if lines and (was := head.get("config", {})).get("mode") == "eval":  # a demo's answers are not taken over
            now = loop.facts_of(replace(cfg, samples=was["samples"]))
            loop.check(path, now | {"settings": {name: was.get(name) for name in now["settings"]}}, now)
            whole = {(x["task"], x["sample"]) for x in lines if x.get("k") == cfg.ks[-1]}  # the last budget is answered
            done = {(x["task"], x["sample"], x["k"]): x for x in lines if (x.get("task"), x.get("sample")) in whole}
            break
    dist.barrier()  # all have read the file before rank 0 begins a new one
    run = report.Run(cfg.out, cfg, w)
    run.go_on(len(done))
    score_tasks(cfg, w, run, done)


def generate_text(cfg: Config, w: cluster.World) -> None:
    """Answer --prompt, after a document that is read, or opened from a saved context."""
    if w.size > 1 and (cfg.save_context or cfg.load_context):
        raise BadInput("--save-context and --load-context are for one process: over several each holds a slice.")
    try:
        document = Path(cfg.document).read_text(encoding="utf-8") if cfg.document else ""
    except UnicodeDecodeError as e:
        raise BadInput(f"--document {cfg.document} is not UTF-8 text ({e.reason}). Convert it.") from e
    loaded = KVStore.load(cfg.load_context) if cfg.load_context else None
    if loaded and document and loaded.meta.get("text") != hashlib.sha256(document.encode()).hexdigest():
        raise BadInput(f"{cfg.load_context} is of another text than {cfg.document}. Leave --document out.")
    chat = Chat(cfg, w.device)
    ids = chat.encode(chat.head + document)
    question = chat.encode(("\n" if document or loaded else "") + cfg.prompt + chat.tail, first=False)
    if not (document or loaded):
        ids, question = torch.cat([ids, question]).tensor_split((-1,))  # all but the last token are the prefix
    chat.model.check_range((loaded.n if loaded else len(ids)) + len(question) + cfg.new_tokens)
    group = dist.new_group(backend="gloo") if w.size > 1 else None  # a GPU's own group does not reach host memory
    store = loaded or prefill(chat.model, ids, KVStore("cpu", getattr(torch, cfg.dtype), group=group), text=document)
    if cfg.save_context:
        store.save(cfg.save_context)
    new = generate(chat.model, question, cfg.k, cfg.new_tokens, store, chat.stop)
    w.print(chat.tokenizer.decode(new.tolist()))
    w.print(f"{len(new)} tokens, each from {resolve_k(cfg.k, max(1, store.n))} of {store.n} rows ({store.nbytes} B)")


@torch.no_grad()
def bench(cfg: Config, w: cluster.World) -> None:
    """One decode step of one layer of a 1B Llama's shape, interleaved: dense attention, the released way, and ours."""
    cluster.alone(w)
    device, n, top, g, scale = w.device, cfg.keys, cfg.keys // 50, cluster.generator(cfg.seed, 5), 1 / math.sqrt(64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    k, v = torch.randn(2, 8, n, 64, generator=g)
    k[..., :4] *= 8  # keys of real models have a few large channels
    q, none = torch.randn(8, 4, 64, generator=g).to(device, dtype), torch.zeros(8, 0, 64, device=device, dtype=dtype)
    stores = {f"top-k, keys on the {where}": KVStore(where, dtype) for where in dict.fromkeys(("cpu", device.type))}
    stores["top-k, k-means lists as released"] = KVStore(device, dtype, released_lists(k.to(device, dtype)))
    for store in stores.values():
        store.put(0, k, v)
    k, v = store.layers[0]  # on the device

    def search_per_head() -> None:
        for h in range(32):
            scores, rows = torch.mv(k[h // 4], q[h // 4, h % 4]).topk(top)
            (scores * scale).softmax(dim=0) @ v[h // 4, rows]

    cases = {
        "dense, SDPA with enable_gqa": lambda: sdpa(q.view(1, 32, 1, 64), k[None], v[None], enable_gqa=True),
        "dense, plain product": lambda: torch.bmm((torch.bmm(q, k.mT) * scale).softmax(dim=-1), v),
        "top-k, a search per head as released": search_per_head,
    } | {name: lambda s=s: s.attend(0, q.view(32, 1, 64), top, none, none) for name, s in stores.items()}
    seconds, rows = report.timed(cases, device, 9), []
    exact = torch.bmm(q.float(), k.float().mT).topk(top).indices.flatten(0, 1)
    for name, (median, spread) in seconds.items():
        recall, own = 1.0, stores.get(name, store)
        handed = sum(x.nbytes for x in own.rows(0, q.to(own.device), top)) if "top-k" in name else k.nbytes + v.nbytes
        if name in stores:
            found = own.choose(q.to(own.device), own.layers[0][0], top)[1].to(device).flatten(0, 1)
            recall = sum(torch.isin(a, b).float().mean().item() for a, b in zip(exact, found, strict=True)) / 32
        rows.append([name, 1e3 * median, 1e3 * spread, recall, handed / 1e6])
    title = f"{report.device_name(device)}, {dtype}, {n} keys, 32 query heads over 8 of 64, k = {top}, one layer"
    w.print(title + "\n" + report.table(head := ["one step", "ms", "+-", "recall", "MB handed"], rows))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"title": title, "head": head, "rows": rows})


def main(cfg: Config) -> None:
    with cluster.world(cfg.device) as w:
        {"demo": demo, "eval": evaluate, "generate": generate_text, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config)
