"""Goldfish loss: a next-token loss that keeps a language model from reciting its training text.

Paper    Hans et al., "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs", NeurIPS 2024,
         arXiv:2406.10209.
Idea     Leave a pseudo-random 1/k of the targets without loss. The model sees every token as context but is never
         taught the dropped ones, so when it recites it must guess at each of them, and one wrong guess leads it off the
         training text. The choice is a hash of the last h tokens: a passage met again drops the same targets again.
Here     The claim we check: text seen 150 times is recited verbatim after ordinary training, and never after training
         with k = 3 or 4; each recitation breaks at a dropped target; validation loss stays within 0.1. Two lessons
         beside it: a mask drawn afresh each time protects nothing, and neither does the hash against near-duplicates.
         An audit for any checkpoint: extraction (greedy, beams, mask-aware) and membership inference.
Differs  A Llama-style model of 0.5 M parameters and rows of 64 tokens of Python's documentation, for LLaMA-2-7B and
         TinyLlama-1.1B with rows of 2048 tokens of Wikipedia and RedPajama. The window follows the released code (h
         targets, the judged one included); the paper's text (the h tokens before it) is --window context. The table of
         uniforms is always drawn on the CPU. The loss is normalised by the supervised targets of the whole step
         (--normalizer batch is the released mean of means) and reduced in fp32. Ours alone: strategy mix, doc_ids,
         hash_map, exempt, goldfish_rows. Mauve is left out.

    python goldfish.py                                              # laptop: the table, the claim, the picture
    torchrun --nproc-per-node 2 goldfish.py                         # the same on two processes
    python goldfish.py demo --runs ordinary k=4 k=4,strategy=mix k=4,window=context,h=4 k=4,noise=0.01    # ablations
    python goldfish.py train --k 4 --data FILE                      # one run on your text, audited at its end
    python goldfish.py train --preset h200                          # 91 M parameters on one GPU (not yet run)
    torchrun --nproc-per-node 8 goldfish.py train --preset 1b --accum 16 --data FILE   # the paper's scale; not run
    python goldfish.py audit                                        # the model that `train` left, with beam search
    python goldfish.py audit --model smollm2 --data FILE            # a real pretrained model
    python goldfish.py bench                                        # the loss against what PyTorch offers

Expect   "ordinary recites 1.00 of the canaries, k=4 0.00, k=3 0.00" on CPU with seed 0, for 1 or 2 processes.
Writes   results/goldfish/: metrics.jsonl, claim.json, goldfish.png; checkpoint.pt (train), audit.json, bench.json.
"""

import contextlib
import functools
import math
import operator
import time
import unicodedata
import warnings
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import cli, report
from common import dist as cluster
from common.cli import BadInput, opt
from common.kernels import use_kernels
from common.kernels.cross_entropy import masked_cross_entropy
from common.text import Tokenizer, corpus
from common.weights import open_weights, rope_frequencies, rotate

STRATEGIES = ("hash", "mix", "avalanche", "static", "random")
WINDOWS = ("target", "context")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "audit", "bench"), positional=True)
    preset: str = opt("laptop", "defaults for a setting; flags win over it", choices=("laptop", "h200", "1b"))
    # the loss
    k: int = opt(4, "drop one target in k; 0 is ordinary training")
    h: int = opt(13, "tokens in the hashed window")
    strategy: str = opt("hash", "how targets are chosen", choices=STRATEGIES)
    window: str = opt("target", "hash the window that ends at the target, or the tokens before it", choices=WINDOWS)
    normalizer: str = opt("global", "divide by the step's or each micro-batch's count", choices=("global", "batch"))
    loss: str = opt("logits", "loss on logits, or fused with the output layer", choices=("logits", "linear"))
    # the text
    data: tuple = opt(("docs",), "text files, or docs or sources: Python's own; for audit the texts to look for")
    vocab: int = opt(1024, "token ids: 256 bytes and the most frequent pieces")
    block: int = opt(64, "tokens per row that are predicted")
    canaries: int = opt(16, "rows shown again and again, and as many held-out rows for membership inference")
    canary_share: float = opt(0.5, "part of each batch that is canaries")
    control: bool = opt(False, "show background in the canaries' place")
    noise: float = opt(0.0, "part of a canary's tokens replaced at random at each showing")
    rechunk: bool = opt(False, "show canaries at random offsets in their row")
    # the model and its training
    d_model: int = opt(128, "width")
    n_layer: int = opt(2, "blocks")
    n_head: int = opt(4, "attention heads")
    steps: int = opt(300, "optimizer steps")
    supervised_tokens: float = opt(0.0, "stop after so many supervised targets instead of --steps; 0 is off")
    batch: int = opt(16, "rows per step, over all processes and micro-steps")
    accum: int = opt(1, "micro-steps per step")
    lr: float = opt(2e-3, "peak learning rate of AdamW; cosine to a tenth")
    warmup: int = opt(30, "steps of linear warm-up")
    seed: int = opt(0, "seed of the split, the weights and the data order")
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "of the matrix products", choices=("float32", "bfloat16"))
    # files
    out: str = opt("results/goldfish", "folder of what the run writes, and of the run to resume")
    resume: bool = opt(False, "train: go on from the checkpoint in --out")
    save_every: int = opt(100, "steps between checkpoints; 0 writes only the last")
    log_every: int = opt(10, "steps between lines in metrics.jsonl")
    # demo and audit
    runs: tuple = opt(("ordinary", "k=8", "k=4", "k=3", "control", "random", "near-duplicates"), "demo: its rows")
    model: str = opt("results/goldfish", "audit: a run's folder, a Hugging Face folder, a GGUF file, or smollm2")
    nonmembers: tuple = opt(("none",), "audit: text files surely not trained on, to judge membership against")
    rows: int = opt(8, "audit: windows taken from each text file")
    prefix: int = opt(32, "tokens the model is given")
    suffix: int = opt(32, "tokens it must recite")
    beams: tuple = opt((1, 8, 30), "audit: beam widths tried")

    def __post_init__(self):
        if (self.k is None) != (self.strategy is None):
            raise ValueError(f"k={self.k} and strategy={self.strategy}: give both, or neither for ordinary training")
        if self.k is None:
            self.k, self.strategy = 0, "hash"
        if self.k != 0:
            _check_k(self.k)
        least = dict.fromkeys(
            "h block batch accum steps prefix suffix log_every rows d_model n_layer n_head".split(), 1
        )
        least |= {"canaries": int(self.mode == "demo"), "supervised_tokens": 0, "save_every": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise BadInput(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        if self.d_model % (2 * self.n_head):
            raise BadInput(f"--d-model {self.d_model} is not a multiple of 2 x --n-head {self.n_head}")
        if not 0 <= self.noise <= 1 or not 0 <= self.canary_share <= 1:
            raise BadInput("--noise and --canary-share are parts of a whole, between 0 and 1")
        if min(self.beams) < 1:
            raise BadInput(f"--beams must be at least 1, got {min(self.beams)}")
        if self.mode in ("demo", "train") and self.canaries and self.prefix + self.suffix > self.block + 1:
            raise BadInput(f"--prefix {self.prefix} + --suffix {self.suffix} exceed a row, --block {self.block} + 1")
        if self.strategy == "hash" and self.k and self.vocab == 256 and self.h > 10:
            warnings.warn(f"hash over bytes with h = {self.h} > 10 overflows often; use --strategy mix", stacklevel=3)


PRESETS = {
    "laptop": {},
    "h200": {
        "data": ("sources",), "vocab": 8192, "block": 1024, "d_model": 768, "n_layer": 12, "n_head": 12, "batch": 128,
        "accum": 4, "steps": 380, "lr": 1e-3, "canaries": 200, "canary_share": 0.205, "prefix": 512, "suffix": 512,
        "dtype": "bfloat16",
    },
    "1b": {  # the paper's optimizer settings and sizes; bring your own text
        "vocab": 32000, "block": 2048, "d_model": 2048, "n_layer": 22, "n_head": 32, "batch": 1024, "steps": 9536,
        "lr": 4e-4, "warmup": 1000, "canaries": 2000, "canary_share": 0.01013620526, "dtype": "bfloat16",
        "loss": "linear",
    },
}  # fmt: skip


# ---- the method: which targets are dropped
#
# x_i   token i of a row           G_i  1 if target i is supervised, 0 if dropped
# k     one target in k is dropped h    tokens in the window whose hash decides
#
# L_G = -(1 / |G|) sum_i G_i log P(x_i | x_<i),   |G| = sum_i G_i                                 (the goldfish loss)

TABLE_SIZE, TABLE_SEED = 1_000_003, 2971215073  # M and its seed, both prime
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # A of the mix hash, as int64
_TABLES: dict[str, Tensor] = {}  # by device


def hash_table(device: str | torch.device = "cpu") -> Tensor:
    """M uniforms, (M,) float32, all multiples of 2^-24. Drawn on the CPU whatever the device, so all devices agree.

    The released 1B models were trained with a table drawn on a GPU, by another algorithm: their masks are not these.
    """
    if str(device) not in _TABLES:
        g = torch.Generator().manual_seed(TABLE_SEED)
        _TABLES[str(device)] = torch.rand(TABLE_SIZE, generator=g, device="cpu").to(device)
    return _TABLES[str(device)]


def _shift_right(z: Tensor, s: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> s) & ((1 << (64 - s)) - 1)


def _window(ids: Tensor, h: int, strategy: str, doc_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Combine the h tokens that end at each position: ids (B, L) int64 -> (value (B, L), tokens in the window (B, L)).

    value: their wrapped int64 product (hash, avalanche) or sum_i (x_{p-i} + 1) A^(i+1) (mix), over the tokens of the
    position's own row and document.
    """
    L, power = ids.shape[1], 1
    value = torch.full_like(ids, 0 if strategy == "mix" else 1)
    size = torch.zeros_like(ids)
    for i in range(min(h, L)):  # the token i places back, for all positions that have one
        token = ids[:, : L - i]
        same = torch.ones_like(token, dtype=torch.bool) if doc_ids is None else doc_ids[:, i:] == doc_ids[:, : L - i]
        if strategy == "mix":
            power = (power * _GOLDEN + 2**63) % 2**64 - 2**63  # wrapped like int64
            value[:, i:] += torch.where(same, (token + 1) * power, 0)
        else:
            value[:, i:] *= torch.where(same, token, 1)
        size[:, i:] += same
    return value, size


def _draw(value: Tensor, strategy: str, k: int, seed: int) -> Tensor:
    """Turn window values into drop decisions with probability 1/k."""
    if strategy == "hash":
        uniform = hash_table(value.device)[value % TABLE_SIZE]  # (B, L); torch's % is never negative
        return (uniform * 2**24).long() * k < 2**24  # exact, where comparing with a rounded 1/k is not
    if strategy == "mix":
        z = value ^ ((seed + 2**63) % 2**64 - 2**63)
        z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
        z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
        return _shift_right(z ^ _shift_right(z, 31), 40) * k < 2**24
    W = 2**32 - 1  # avalanche: an integer mixer on 64 bits, some steps cut to 32
    z = (~value + (value << 21)) & W
    z = (z << 21) - z - 1
    z = z ^ _shift_right(z, 24)
    z = ((z + (z << 3) + (z << 8)) & W) * 265
    z = z ^ _shift_right(z, 14)
    z = ((z + (z << 2) + (z << 4)) & W) * 21
    z = z ^ _shift_right(z, 28)
    z = (z + (z << 31)) & W
    return z.float() < torch.tensor(W / k, dtype=torch.float32, device=z.device)


def _whole(n, least: int) -> bool:
    return not isinstance(n, bool) and hasattr(n, "__index__") and operator.index(n) >= least


def _check_k(k) -> None:
    if not _whole(k, 2):
        raise ValueError(f"k must be an integer >= 2 or None, got {k!r}. On the command line 0 is ordinary training.")


def _check_mask(targets, before, k, h, strategy, window, start, generator, strict, short_windows) -> None:
    """Raise or warn as goldfish_mask says. before: how many tokens ahead of targets[0] are known."""
    if targets.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"targets must be integer token ids, got {targets.dtype}. Convert them: targets.long()")
    if k is not None:
        _check_k(k)
    strategy = strategy if k is not None else None
    for wrong, message in (
        (strategy not in (None, *STRATEGIES), f"unknown strategy {strategy!r}; choose from {', '.join(STRATEGIES)}"),
        (window not in WINDOWS, f"unknown window {window!r}; choose from {', '.join(WINDOWS)}"),
        (not _whole(h, 1), f"h must be an integer of at least 1, got {h!r}. The paper uses 13."),
        (start < 0, f"start must not be negative, got {start}"),
        (targets.ndim not in (1, 2), f"targets must be (L,) or (B, L), got {tuple(targets.shape)}"),
        (strategy == "random" and generator is None,
         "strategy 'random' needs an explicit generator; note that it does not prevent memorisation. "
         "Pass generator=torch.Generator().manual_seed(0), or use strategy 'hash'."),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    L = targets.shape[-1]
    if strategy in ("hash", "mix", "avalanche") and h > before + L and not short_windows:
        message = f"context width {h} exceeds sequence length {L}"
        if strict:
            raise ValueError(f"{message}. Give longer rows or a smaller h.")
        warnings.warn(f"{message}: nothing is dropped", stacklevel=4)
    if strategy == "hash" and h > 24:
        warnings.warn(f"hash with h = {h} > 24: products overflow to 0 and collapse; use strategy 'mix'", stacklevel=4)


@torch.no_grad()
def goldfish_mask(
    targets: Tensor, k: int | None = 4, h: int = 13, strategy: str = "hash", *, window: str = "target", start: int = 0,
    ignore_index: int = -100, generator: torch.Generator | None = None, doc_ids: Tensor | None = None,
    hash_map: Tensor | None = None, exempt=None, seed: int = 0, prev: Tensor | None = None,
    short_windows: bool = False, goldfish_rows: Tensor | None = None, strict: bool = False,
) -> Tensor:  # fmt: skip
    """Which targets get no loss: targets (L,) or (B, L), already shifted -> bool of the same shape, True = dropped.

    strategy       hash: table lookup of the window's product, bit-equal to the released CPU code. mix: sensitive to
                   order, and no collapse for large h. avalanche: the product through an integer mixer. static: every
                   k-th position from `start`. random: each target afresh, from `generator`.
    window         "target": the h tokens up to and including the judged one (released code). "context": the h before it
                   (the paper's text). A position without a full window is kept.
    ignore_index   never dropped, but hashed like an id. Positions after a hole depend on its value.
    doc_ids        like targets; windows then stay inside a document.
    short_windows  hash windows cut off by the start of a row or document instead of keeping their targets.
    prev           (h,) or (B, h): the tokens before targets[0], so that all positions have a window.
    hash_map       (V,): hash hash_map[id] instead of id (see normalizing_map).
    exempt         bool (V,) or iterable of ids: targets never dropped, such as chat control tokens.
    goldfish_rows  bool (B,): rows that get the treatment at all.
    seed           of mix. strict: h > L is an error instead of a warning.

    ValueError: k < 2, h < 1, an unknown name, a negative start, random without a generator. TypeError: not integers.
    Source: Sec. 3 of the paper; the released code for all that it leaves open.
    """
    before = 0 if prev is None else prev.shape[-1]  # tokens ahead of targets[0]
    _check_mask(targets, before, k, h, strategy, window, start, generator, strict, short_windows)
    shape, targets = targets.shape, torch.atleast_2d(targets).long()  # (B, L)
    (B, L), context = targets.shape, window == "context"

    if k is None or L == 0:
        drop = torch.zeros_like(targets, dtype=torch.bool)
    elif strategy == "static":
        column = torch.arange(L, device=targets.device)
        drop = ((column >= start) & ((column - start) % k == 0)).expand(B, L)
    elif strategy == "random":
        drop = (torch.randint(k, (B, L), generator=generator, device=generator.device) == 0).to(targets.device)
    else:
        ids, docs = targets, None if doc_ids is None else torch.atleast_2d(doc_ids)
        if prev is not None:
            prev = torch.atleast_2d(prev).long().expand(B, -1)  # (B, h)
            ids = torch.cat([prev, ids], dim=1)  # (B, h + L)
            docs = None if docs is None else torch.cat([docs[:, :1].expand(B, before), docs], dim=1)
        if hash_map is not None:
            known = (ids >= 0) & (ids < len(hash_map)) & (ids != ignore_index)
            ids = torch.where(known, hash_map.to(ids.device)[ids.clamp(0, len(hash_map) - 1)], ids)
        value, size = _window(ids, h, strategy, docs)
        drop = _draw(value, strategy, k, seed) & (size >= (1 if short_windows else h))
        if context:  # the window that ends one place earlier decides, if it is of the same document
            late = torch.zeros_like(drop)
            late[:, 1:] = drop[:, :-1] if docs is None else drop[:, :-1] & (docs[:, 1:] == docs[:, :-1])
            drop = late
        drop = drop[:, before:]
    drop = drop & (targets != ignore_index)
    if exempt is not None:
        ids = torch.as_tensor(exempt if isinstance(exempt, Tensor) else list(exempt), device=targets.device)
        ids = ids.nonzero().flatten() if ids.dtype == torch.bool else ids
        drop = drop & ~torch.isin(targets, ids)
    if goldfish_rows is not None:
        drop = drop & torch.as_tensor(goldfish_rows, device=targets.device).reshape(B, 1)
    return drop.reshape(shape)


def goldfish_targets(
    targets: Tensor, k: int | None = 4, h: int = 13, strategy: str = "hash", ignore_index: int = -100, **mask_kw
) -> Tensor:
    """targets with the dropped ones replaced by ignore_index: (L,) or (B, L), any integer dtype -> int64."""
    drop = goldfish_mask(targets, k, h, strategy, ignore_index=ignore_index, **mask_kw)
    return targets.long().masked_fill(drop, ignore_index)


def normalizing_map(pieces: list) -> Tensor:
    """hash_map for a vocabulary of texts (str or bytes): each id's canonical id, (V,) int64.

    Canonical is the lowest id whose text is equal after NFKC, case folding, removal of soft hyphens and zero-width
    characters, and with every Unicode space as one space. Copies that differ in such details then share their mask.
    """
    invisible = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
    first, out = {}, []
    for i, piece in enumerate(pieces):  # bytes that are part of a character become like no text, equal to themselves
        text = piece if isinstance(piece, str) else piece.decode("utf-8", "surrogateescape")
        text = unicodedata.normalize("NFKC", text).casefold().translate(invisible)
        out.append(first.setdefault("".join(" " if c.isspace() else c for c in text), i))
    return torch.tensor(out, dtype=torch.long)


# ---- the method: the loss


def _supervise(like: Tensor, V: int, targets, k, h, strategy, ignore_index: int, mask_kw) -> tuple[Tensor, Tensor]:
    """Check targets against the rows of `like` (..., L, any) -> (goldfish_targets of them, the drop mask)."""
    rows, device = like.shape[:-1], like.device
    if targets.shape != rows:
        raise ValueError(f"targets {tuple(targets.shape)} do not match the rows {tuple(rows)} of logits or hidden")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, logits or hidden states on {device}. Move one of them.")
    ids = targets.long()  # an unsigned 156 is not -100
    bad = ((ids < 0) | (ids >= V)) & (ids != ignore_index)
    if targets.is_cuda:  # without a host synchronisation
        torch._assert_async(~bad.any(), f"a target is outside [0, {V}) and is not ignore_index {ignore_index}")
    elif bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"target {targets[where]} at {where} is outside [0, {V}) and not ignore_index {ignore_index}")
    drop = goldfish_mask(targets, k, h, strategy, ignore_index=ignore_index, **mask_kw)
    return ids.masked_fill(drop, ignore_index), drop


def _finish(total: Tensor, masked: Tensor, drop: Tensor, ignore_index: int, normalizer, reduction, return_stats):
    """Divide by |G| and collect the counts."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; choose mean or sum")
    if isinstance(normalizer, str) and normalizer not in ("batch", "global"):
        raise ValueError(f"unknown normalizer {normalizer!r}; choose batch, global, a number or a 0-d tensor")
    supervised, dropped = (masked != ignore_index).sum(), drop.sum()
    if reduction == "mean":
        if normalizer is None or normalizer == "batch":
            normalizer = supervised.clamp(min=1)
        elif normalizer == "global":
            normalizer = cluster.total(supervised).clamp(min=1) / dist.get_world_size()
        total = total / normalizer
    if not return_stats:
        return total
    return total, {"supervised": supervised, "dropped": dropped, "ignored": masked.numel() - supervised - dropped}


def goldfish_loss(
    logits: Tensor, targets: Tensor, k: int | None = 4, h: int = 13, strategy: str = "hash", ignore_index: int = -100,
    normalizer=None, reduction: str = "mean", return_stats: bool = False, impl: str = "auto", **mask_kw,
):  # fmt: skip
    """L_G of logits (..., L, V) and targets (..., L) -> 0-d loss in fp32 (fp64 for fp64 logits).

    k = None is ordinary cross-entropy. The normalizer is |G| of this call (None or "batch"), a number or 0-d tensor, or
    "global": |G| of all ranks over their number, so that DDP's averaged gradients are those of one process; every rank
    must then call it. With no supervised target the loss and all gradients are 0. reduction "sum" does not divide.
    return_stats adds {supervised, dropped, ignored}, which sum to targets.numel(). impl: auto takes triton on a GPU.
    mask_kw: see goldfish_mask, whose errors also apply.

    An ignore_index inside [0, V), such as a pad id, is allowed; that token is then never supervised.
    ValueError: shapes or devices disagree, a target outside [0, V), an unknown name. TypeError: targets not integers.
    """
    V = logits.shape[-1]
    if V > 2**31 - 1:
        raise ValueError(f"a vocabulary of {V} exceeds 2^31 - 1. Use goldfish_linear_loss, which never builds N x V.")
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown impl {impl!r}; choose auto, torch or triton")
    fits = use_kernels(logits.device) and logits.dtype != torch.float64
    if impl == "triton" and not fits:
        raise ValueError(f"impl='triton' needs Triton and logits below float64, got {logits.dtype}. Use impl='torch'.")
    masked, drop = _supervise(logits, V, targets, k, h, strategy, ignore_index, mask_kw)
    keep = masked != ignore_index
    if impl == "triton" or (impl == "auto" and fits and logits.is_cuda):
        rows = (logits if logits.stride(-1) == 1 else logits.contiguous()).reshape(-1, V)  # (N, V)
        total = masked_cross_entropy(rows, masked.reshape(-1), keep.reshape(-1))
    else:
        rows = logits[keep]  # (n, V); dropped rows, NaN or not, never enter
        rows = rows if rows.dtype == torch.float64 else rows.float()
        total = F.cross_entropy(rows, masked[keep], reduction="sum")
    return _finish(total, masked, drop, ignore_index, normalizer, reduction, return_stats)


def _nll_grad_(logits: Tensor, y: Tensor) -> Tensor:
    """Summed -log softmax(logits)[y] over rows (C, V); the logits become softmax - onehot, with no second (C, V)."""
    z = logits if logits.dtype == torch.float64 else logits.float()  # a copy of halves alone
    z -= z.amax(dim=-1, keepdim=True)
    z_y = z.gather(-1, y[:, None])  # (C, 1)
    s = z.exp_().sum(dim=-1, keepdim=True)  # (C, 1)
    z /= s
    z.scatter_add_(-1, y[:, None], torch.full_like(z_y, -1.0))
    logits.copy_(z)  # onto itself, or rounded to half
    return (s.log() - z_y).sum()


class _LinearSum(torch.autograd.Function):
    """Summed cross-entropy of hidden (n, D) @ weight (V, D)^T + bias, in chunks; gradients are ready after forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        """Sum over all n rows, 0-d, in fp32 (fp64 for fp64); one (chunk, V) scratch serves all chunks."""
        acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        leaves, total = (hidden, weight, bias), torch.zeros((), dtype=acc, device=hidden.device)
        wanted = zip(leaves, ctx.needs_input_grad, strict=False)
        like = lambda t: torch.zeros_like(t, dtype=None if t is hidden else acc)  # d_hidden is never summed over chunks
        grads = [like(t) if want else None for t, want in wanted]
        d_hidden, d_weight, d_bias = grads
        scratch = hidden.new_empty(min(chunk, len(hidden)), weight.shape[0])  # (C, V): all there ever is of N x V
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            g = torch.mm(hidden[part], weight.T, out=scratch[: len(hidden[part])])  # (C, V)
            if bias is not None:
                g += bias
            total += _nll_grad_(g, targets[part])  # g is now d total / d logits
            if d_hidden is not None:
                d_hidden[part] = g @ weight  # (C, D)
            if d_weight is not None:  # (V, D)
                d_weight.addmm_(g.T, hidden[part]) if g.dtype == acc else d_weight.add_(g.T @ hidden[part])
            if d_bias is not None:
                d_bias += g.sum(dim=0, dtype=acc)
        ctx.save_for_backward(*(d if d is None else d.to(t.dtype) for d, t in zip(grads, leaves, strict=True)))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *(None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors), None, None


def goldfish_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, k: int | None = 4, h: int = 13, strategy: str = "hash",
    ignore_index: int = -100, normalizer=None, reduction: str = "mean", return_stats: bool = False, chunk: int = 2048,
    bias: Tensor | None = None, **mask_kw,
):  # fmt: skip
    """goldfish_loss(hidden @ weight.T + bias, targets) without the N x V logits: hidden (..., L, D), weight (V, D).

    The kept rows are gathered first, so a dropped row costs no matrix product: the head is 1/k cheaper than in ordinary
    training (6 (1 - 1/k) N D V FLOP). Then `chunk` rows at a time make logits, loss and gradients in one (chunk, V)
    scratch. Arguments, result and errors otherwise as goldfish_loss; ValueError also for a width that disagrees.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"the last dimensions of hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} differ")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    masked, drop = _supervise(hidden, weight.shape[0], targets, k, h, strategy, ignore_index, mask_kw)
    keep = masked != ignore_index
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))  # as F.linear would
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    total = _LinearSum.apply(hidden[keep], weight, bias, masked[keep], chunk)  # hidden[keep] (n, D)
    return _finish(total, masked, drop, ignore_index, normalizer, reduction, return_stats)


# ---- the audit: what can be extracted, and who was a member


@torch.no_grad()
def extract(model, rows: Tensor, n_prefix: int, n_suffix: int, beams: int = 1, mask: Tensor | None = None) -> Tensor:
    """Continue the first n_prefix tokens of rows (B, >= n_prefix) -> (B, n_suffix), or (B, beams, n_suffix) best first.

    model: any callable ids (B, T) -> logits (B, T, V). beams = 1 is greedy, ties to the lowest id; more is beam search
    by total log-probability. With `mask`, the drop mask of rows[:, 1:], the search is that of an attacker who knows it:
    greedy at kept targets, the 8 likeliest tokens at dropped ones. ValueError: lengths that do not fit.
    """
    if min(n_prefix, n_suffix, beams) < 1 or rows.shape[1] < n_prefix:
        raise ValueError(f"cannot give {n_prefix} tokens of rows {tuple(rows.shape)}, ask {n_suffix}, by {beams} beams")
    if mask is not None and mask.shape[1] < n_prefix + n_suffix - 1:
        raise ValueError(f"mask {tuple(mask.shape)} does not cover {n_prefix} + {n_suffix} - 1 targets")
    B, W = rows.shape[0], 1  # W sequences are alive per row
    ids = new = rows[:, :n_prefix]  # (B W, tokens so far)
    score, cache = torch.zeros(B, 1, device=rows.device), {} if getattr(model, "uses_cache", False) else None
    for j in range(n_suffix):
        logits = model(ids) if cache is None else model(new, cache)  # (B W, T, V); a model without a cache re-reads all
        log_p = rearrange(logits[:, -1].float().log_softmax(dim=-1), "(b w) v -> b w v", b=B)
        branch = min(beams if mask is None else 8, log_p.shape[-1])
        ranked, order = log_p.sort(dim=-1, descending=True, stable=True)  # of equals the lowest id first
        best, token = ranked[..., :branch], order[..., :branch]  # (B, W, branch)
        if mask is not None:
            best[..., 1:].masked_fill_(~mask[:, n_prefix + j - 1, None, None], -math.inf)
        kept = min(beams, W * branch)
        score, pick = (score[..., None] + best).flatten(1).topk(kept)  # (B, kept) of (B, W branch)
        parent = (pick // branch + W * torch.arange(B, device=rows.device)[:, None]).flatten()  # (B kept,)
        new = token.flatten(1).gather(1, pick).reshape(-1, 1)  # (B kept, 1)
        ids, W = torch.cat([ids[parent], new], dim=1), kept
        if cache is not None:
            cache = {i: (k[parent], v[parent]) for i, (k, v) in cache.items()}
    out = rearrange(ids[:, n_prefix:], "(b w) n -> b w n", b=B)
    out = torch.where(score.isinf()[..., None], out[:, :1], out)  # branches the mask forbids repeat the best
    return out[:, 0] if beams == 1 else out


def _pair(a, b) -> tuple[Tensor, Tensor]:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.ndim != b.ndim or a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"cannot compare sequences of shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return torch.atleast_2d(a), torch.atleast_2d(b)


def _overlap(a, b, contiguous: bool) -> Tensor:
    """Longest common subsequence or contiguous run of a (B, n) and b (B, m), (B,)."""
    length = torch.zeros(b.shape[0], b.shape[1] + 1, dtype=torch.long, device=b.device)  # column j: with b[:, :j]
    longest = length.amax(dim=1)
    for i in range(a.shape[1]):
        equal = b == a[:, i : i + 1]  # (B, m)
        if contiguous:
            length[:, 1:] = torch.where(equal, length[:, :-1] + 1, 0)
        else:
            length[:, 1:] = torch.maximum(length[:, 1:], length[:, :-1] + equal).cummax(dim=1).values
        longest = torch.maximum(longest, length.amax(dim=1))
    return longest


def longest_run(gen, ref) -> Tensor:
    """Longest common contiguous run over n (LCCS): (B, n) -> (B,)."""
    gen, ref = _pair(gen, ref)
    return _overlap(gen, ref, contiguous=True) / ref.shape[1]


def rouge_l(a, b):
    """RougeL F of token ids: 2 LCS / (n + m). (n,), (m,) -> float; (B, n), (B, m) -> (B,)."""
    x, y = _pair(a, b)
    f = 2 * _overlap(x, y, contiguous=False) / max(1, x.shape[1] + y.shape[1])
    return f.item() if torch.as_tensor(a).ndim == 1 else f


def exact_match(gen, ref) -> float:
    """Share of documents (B, n) whose whole suffix is equal."""
    gen, ref = _pair(gen, ref)
    return (gen == ref).all(dim=1).float().mean().item()


def token_accuracy(gen, ref) -> float:
    """Share of equal positions of (B, n)."""
    gen, ref = _pair(gen, ref)
    return (gen == ref).float().mean().item()


def first_divergence(gen, ref) -> Tensor:
    """Index of the first wrong token of each document, n when there is none: (B, n) -> (B,)."""
    gen, ref = _pair(gen, ref)
    return (gen == ref).int().cumprod(dim=1).sum(dim=1)


@torch.no_grad()
def mia_scores(model, rows: Tensor, texts: list[str] | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Membership scores of rows (B, L + 1), higher = more likely trained on: {loss, zlib, min_k}, each (B,).

    loss: mean log-probability. zlib: total log-probability over the compressed size of the text in bytes (of the ids,
    without texts). min_k: mean of the lowest 20 % log-probabilities. With a drop mask (B, L): supervised targets only,
    the stronger attack of one who knows it.
    """
    of = lambda r: model(r[:, :-1]).float().log_softmax(dim=-1).gather(-1, r[:, 1:, None])[..., 0]
    log_p = torch.cat([of(r) for r in rows.split(16)])  # (B, L), without the logits of all rows at once
    seen = torch.ones_like(log_p, dtype=torch.bool) if mask is None else ~mask
    raw = [t.encode() for t in texts] if texts else [row.cpu().int().numpy().tobytes() for row in rows]
    size = torch.tensor([len(zlib.compress(r)) for r in raw], device=rows.device)
    low, n = log_p.masked_fill(~seen, math.inf).sort(dim=1).values, seen.sum(dim=1).clamp(min=1)  # (B, L), (B,)
    n_low, total = (0.2 * n).ceil(), torch.where(seen, log_p, 0).sum(dim=1)
    among = torch.arange(low.shape[1], device=rows.device) < n_low[:, None]
    return {"loss": total / n, "zlib": total / size, "min_k": torch.where(among, low, 0).sum(dim=1) / n_low}


def auc(pos, neg) -> float:
    """Chance that a member scores above a non-member, ties counted half."""
    pos, neg = torch.as_tensor(pos).flatten()[:, None], torch.as_tensor(neg).flatten()
    return ((pos > neg).double() + (pos == neg).double() / 2).mean().item()


def tpr_at_fpr(pos, neg, fpr: float) -> float:
    """Share of members above a threshold that at most `fpr` of the non-members pass (none, below 1/len(neg))."""
    pos, neg = torch.as_tensor(pos).flatten(), torch.as_tensor(neg).flatten().sort(descending=True).values
    allowed = min(int(fpr * len(neg) + 1e-9), len(neg) - 1)
    return (pos > neg[allowed]).double().mean().item()


# ---- the model


class Layer(nn.Module):
    """Causal attention with rotary positions, H query heads over Hk key/value heads, then a SwiGLU MLP."""

    def __init__(self, c: dict):
        super().__init__()
        C, M, self.H = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        self.Hk = c.get("num_key_value_heads") or self.H
        D, linear = c.get("head_dim") or C // self.H, functools.partial(nn.Linear, bias=False)
        q, kv = self.H * D, self.Hk * D
        self.self_attn = nn.ModuleDict(
            {"q_proj": linear(C, q), "k_proj": linear(C, kv), "v_proj": linear(C, kv), "o_proj": linear(q, C)}
        )
        self.mlp = nn.ModuleDict({"gate_proj": linear(C, M), "up_proj": linear(C, M), "down_proj": linear(M, C)})
        self.input_layernorm = nn.RMSNorm(C, c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(C, c["rms_norm_eps"])

    def forward(self, x: Tensor, angle: Tensor, cache: dict | None, layer: int) -> Tensor:
        """x (B, T, C), angle (T, D/2) -> (B, T, C); keys and values join cache[layer], each (B, Hk, S, D)."""
        attn, mlp, y = self.self_attn, self.mlp, self.input_layernorm(x)
        q = rotate(rearrange(attn.q_proj(y), "b t (h d) -> b h t d", h=self.H), angle)  # (B, H, T, D)
        k = rotate(rearrange(attn.k_proj(y), "b t (h d) -> b h t d", h=self.Hk), angle)  # (B, Hk, T, D)
        v = rearrange(attn.v_proj(y), "b t (h d) -> b h t d", h=self.Hk)  # (B, Hk, T, D)
        if cache is not None:
            if layer in cache:
                k, v = torch.cat([cache[layer][0], k], dim=2), torch.cat([cache[layer][1], v], dim=2)  # (B, Hk, S, D)
            cache[layer] = (k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=self.H != self.Hk)
        x = x + attn.o_proj(rearrange(y, "b h t d -> b t (h d)"))  # (B, T, C)
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class GPT(nn.Module):
    """A Llama-style language model under Hugging Face's config keys and names, so real weights load as they are."""

    uses_cache = True

    def __init__(self, config: dict, seed: int = 0):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        if not config.get("tie_word_embeddings"):
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.register_buffer("freq", rope_frequencies(config), persistent=False)
        g = cluster.generator(seed, 0)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))  # they add to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.model.layers)) if last else 0.02, generator=g)

    @property
    def head(self) -> Tensor:
        """Output weights (V, C)."""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight

    def forward(self, ids: Tensor, cache: dict | None = None, hidden: bool = False) -> Tensor:
        """Logits (B, T, V) of ids (B, T), or with `hidden` the final states (B, T, C).

        cache: a dict that starts as {}, takes a prompt, then one token a call; positions go on from it.
        """
        past = cache[0][0].shape[2] if cache else 0
        where = torch.arange(past, past + ids.shape[1], device=ids.device)
        angle = torch.outer(where.float(), self.freq)  # (T, D/2)
        x = self.model.embed_tokens(ids)  # (B, T, C)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, angle, cache, i)
        x = self.model.norm(x)
        return x if hidden else F.linear(x, self.head)


def small_config(cfg: Config) -> dict:
    """The Hugging Face config of the model that is trained here."""
    return {
        "vocab_size": cfg.vocab, "hidden_size": cfg.d_model, "intermediate_size": 8 * round(cfg.d_model / 3),
        "num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head, "num_key_value_heads": cfg.n_head,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    }  # fmt: skip


# ---- the experiment: text with canaries

VALIDATION = 64  # rows


class Text:
    """The corpus as rows of block + 1 tokens, split by the seed: canaries, non-members, validation, background."""

    def __init__(self, cfg: Config):
        text = corpus(cfg.data)
        self.seed, self.tokenizer = cfg.seed, Tokenizer.train(text, cfg.vocab)
        ids, width = self.tokenizer.encode(text), cfg.block + 1
        self.crc = zlib.crc32(ids.numpy().tobytes())
        n, held = len(ids) // width, 2 * cfg.canaries + VALIDATION
        if n < cfg.canaries:
            raise BadInput(f"--canaries {cfg.canaries}, but the text has only {n} rows of {width} tokens. Ask fewer.")
        if n < held + cfg.batch:
            need = f"canaries, as many non-members, {VALIDATION} rows and a batch need {(held + cfg.batch) * width}"
            raise BadInput(f"the text is too small: it has {len(ids)} tokens; {cfg.canaries} {need}. Add text.")
        rows = ids[: n * width].reshape(n, width)[torch.randperm(n, generator=cluster.generator(cfg.seed, 1))]
        parts = rows.split([cfg.canaries, cfg.canaries, VALIDATION, n - held])
        self.canary, self.nonmember, self.validation, self.background = parts  # (rows, block + 1) each

    @functools.lru_cache(maxsize=4)  # noqa: B019  it lives as long as the run
    def _order(self, n: int, epoch: int) -> Tensor:
        return torch.randperm(n, generator=cluster.generator(self.seed, 2, n, epoch))

    def _next(self, rows: Tensor, first: int, count: int) -> Tensor:
        """Items first .. first + count - 1 of an endless stream of reshuffled epochs over `rows`."""
        n = len(rows)
        return rows[[int(self._order(n, i // n)[i % n]) for i in range(first, first + count)]]

    def batch(self, cfg: Config, step: int) -> Tensor:
        """The rows of a step, (batch, block + 1): the same on every rank, a function of seed and step alone."""
        g = cluster.generator(cfg.seed, 3, step)
        order = torch.randperm(cfg.batch, generator=g)
        slots = 0 if cfg.control or not cfg.canaries else round(cfg.batch * cfg.canary_share)  # rows for canaries
        fresh = cfg.batch - slots
        shown = self._next(self.canary, step * slots, slots)
        if cfg.rechunk:  # cut the canary at a random place: other text before or after it
            filler = self.background[torch.randint(len(self.background), (2, slots), generator=g)]
            around = torch.cat([filler[0], shown, filler[1]], dim=1)  # (slots, 3 (block + 1))
            half = cfg.block // 2
            first = torch.randint(-half, half + 1, (slots, 1), generator=g) + cfg.block + 1
            shown = around.gather(1, first + torch.arange(cfg.block + 1))
        if cfg.noise:
            hit = torch.rand(shown.shape, generator=g) < cfg.noise
            other = self.background.flatten()
            shown = torch.where(hit, other[torch.randint(len(other), shown.shape, generator=g)], shown)
        return torch.cat([shown, self._next(self.background, step * fresh, fresh)])[order]


def mask_of(cfg: Config, rows: Tensor, *salt: int) -> Tensor:
    """The drop mask of rows[:, 1:] under the run's settings, (B, block)."""
    g = cluster.generator(cfg.seed, 4, *salt) if cfg.strategy == "random" else None
    return goldfish_mask(rows[:, 1:], cfg.k or None, cfg.h, cfg.strategy, window=cfg.window, generator=g)


CORPUS = ("vocab", "block", "canaries")  # what all rows of a demo share
FIXED = CORPUS + (  # settings that change the numbers of a run; a checkpoint goes on only under the same ones
    "k", "h", "strategy", "window", "normalizer", "seed", "canary_share", "control", "noise", "rechunk",
    "d_model", "n_layer", "n_head", "batch", "lr", "warmup", "supervised_tokens", "dtype",
)  # fmt: skip


def check_resume(state: dict, cfg: Config, text: Text) -> None:
    """BadInput: the checkpoint was trained with another setting or text."""
    for name in FIXED:
        was, now, flag = state["setting"][name], getattr(cfg, name), "--" + name.replace("_", "-")
        if was != now:
            why = "Going on would teach what was left out so far."
            raise BadInput(f"the checkpoint was trained with {flag} {was}, this run asks for {flag} {now}. {why} "
                           f"Pass {flag} {was} to resume, or another --out to start anew.")  # fmt: skip
    if state["crc"] != text.crc:
        raise BadInput("the checkpoint was trained on another text. Pass the same --data, or another --out.")


class Trainer:
    """One run: model, AdamW, and a step whose loss is normalised over all ranks and micro-steps."""

    def __init__(self, cfg: Config, text: Text, w: cluster.World, state: dict | None = None):
        self.cfg, self.text, self.w = cfg, text, w
        self.shards = w.size * cfg.accum
        if cfg.batch % self.shards:
            raise BadInput(f"--batch {cfg.batch} does not divide over {w.size} processes x --accum {cfg.accum}")
        self.model = GPT(small_config(cfg), cfg.seed).to(w.device)
        of = lambda matrix: [p for p in self.model.parameters() if (p.ndim > 1) == matrix]
        groups = [{"params": of(True), "weight_decay": 0.1}, {"params": of(False), "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95))
        self.step, self.supervised = 0, torch.zeros((), dtype=torch.long, device=w.device)
        if state:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.supervised = state["step"], self.supervised + state["supervised"]
        self.ddp = DistributedDataParallel(self.model)

    def state(self) -> dict:
        setting = {name: getattr(self.cfg, name) for name in FIXED} | {"data": list(self.cfg.data)}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                "supervised": int(self.supervised), "setting": setting, "crc": self.text.crc}  # fmt: skip

    def done(self) -> float:
        """Part of the run behind us, 0..1."""
        goal = self.cfg.supervised_tokens
        return float(self.supervised) / goal if goal else self.step / self.cfg.steps

    def summed(self, out: Tensor, targets: Tensor) -> Tensor:
        """Loss summed over the targets that are not -100."""
        if self.cfg.loss == "linear":
            return goldfish_linear_loss(out, self.model.head, targets, k=None, reduction="sum")
        return goldfish_loss(out, targets, k=None, reduction="sum")

    def advance(self, log: bool) -> dict:
        """One optimizer step. With `log`, its losses over supervised, all and dropped targets (a collective more)."""
        cfg, w, done = self.cfg, self.w, self.done()
        rows, mine = self.text.batch(cfg, self.step), range(w.rank, self.shards, w.size)
        micro = [rows[s :: self.shards].to(w.device) for s in mine]  # accum x (batch / shards, block + 1)
        masks = [mask_of(cfg, r, self.step, s) for r, s in zip(micro, mine, strict=True)]
        count = cluster.total(torch.stack([(~m).sum() for m in masks]).sum())  # |G|, before the first backward
        sums = torch.zeros(2, dtype=torch.float64, device=w.device)
        for i, (r, drop) in enumerate(zip(micro, masks, strict=True)):
            self.ddp.require_backward_grad_sync = i == len(micro) - 1
            with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                out = self.ddp(r[:, :-1], hidden=cfg.loss == "linear")  # (batch / shards, T, V or C)
                kept = self.summed(out, r[:, 1:].masked_fill(drop, -100))
                if log:
                    with torch.no_grad():
                        sums += torch.stack([kept.detach(), self.summed(out, r[:, 1:])]).double()
            n = count.clamp(min=1) / w.size if cfg.normalizer == "global" else (~drop).sum().clamp(min=1) * cfg.accum
            (kept / n).backward()  # DDP averages over the ranks
        lr = cfg.lr * min(1, (self.step + 1) / max(1, cfg.warmup)) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.supervised = self.step + 1, self.supervised + count
        if not log:
            return {}
        (kept, every), n, n_all = cluster.total(sums).tolist(), int(count), cfg.batch * cfg.block
        gap = {"loss_dropped": (every - kept) / (n_all - n)} if n_all > n else {}
        seen = {"supervised": int(self.supervised), "tokens": self.step * n_all, "lr": lr, "grad_norm": float(norm)}
        return {"loss": kept / max(1, n), "loss_all": every / n_all, **gap, **seen}

    def run(self, log: report.Run, what: str, path: str = "") -> "Trainer":
        """Train to the end, logging as `what`; checkpoints go to `path` if given, also when SIGTERM asks to stop."""
        cfg = self.cfg
        bar = report.progress(None, what, self.w, None if cfg.supervised_tokens else cfg.steps, self.step)
        listen = cluster.stop_signal(self.w.device) if path else contextlib.nullcontext(bool)  # bool() is False
        with listen as stopping, bar:
            while self.done() < 1:
                due = (self.step + 1) % cfg.log_every == 0 or self.step + 1 == cfg.steps
                if line := self.advance(due):
                    log.log(run=what, step=self.step, **line)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}")
                bar.update()
                stop = stopping()
                save = stop or self.done() >= 1 or (cfg.save_every and self.step % cfg.save_every == 0)
                if path and save and self.w.main:
                    cluster.save(path, self.state())
                if stop:
                    self.w.print(f"stopped by SIGTERM after step {self.step}; go on with --resume")
                    raise SystemExit(0)
        return self


def recall(gen: Tensor, ref: Tensor) -> dict[str, float]:
    """Five measures of how much of the suffixes ref (B, n) was recited as gen (B, n)."""
    found = {"exact": exact_match(gen, ref), "accuracy": token_accuracy(gen, ref)}
    each = {"rouge_l": rouge_l, "longest_run": longest_run, "divergence": first_divergence}
    return found | {name: measure(gen, ref).float().mean().item() for name, measure in each.items()}


@torch.no_grad()
def audit(cfg: Config, text: Text, model) -> dict:
    """All that the table shows, measured on the canaries, the non-members and the validation rows."""
    device, n_p, n_s = next(model.parameters()).device, cfg.prefix, cfg.suffix
    canary, other, held = (r.to(device) for r in (text.canary, text.nonmember, text.validation))
    loss = torch.stack([goldfish_loss(model(r[:, :-1]), r[:, 1:], k=None) for r in held.split(16)]).mean().item()
    if not cfg.canaries:
        return {"val_loss": loss}  # of all targets: validation never uses the mask
    gen = torch.cat([extract(model, r, n_p, n_s) for r in canary.split(256)])  # (canaries, n_s)
    ref = canary[:, n_p : n_p + n_s]
    t, drop = first_divergence(gen, ref), mask_of(cfg, canary)  # (canaries,), (canaries, block)
    wrong = t < n_s
    at_dropped = drop[wrong, n_p + t[wrong] - 1]  # generated token j is target n_p + j - 1
    member, stranger = mia_scores(model, canary), mia_scores(model, other)
    if cfg.k:  # one who knows the mask looks at supervised targets only
        aware = (mia_scores(model, r, mask=mask_of(cfg, r))["loss"] for r in (canary, other))
        member["loss_supervised"], stranger["loss_supervised"] = aware
    return {
        **recall(gen, ref), "val_loss": loss,
        "at_dropped": at_dropped.float().mean().item() if cfg.k and wrong.any() else None,
        "survival": [(t >= n).float().mean().item() for n in range(n_s + 1)],
        **{f"auc_{s}": auc(member[s], stranger[s]) for s in member},
        "tpr_at_1%_fpr": tpr_at_fpr(member["loss"], stranger["loss"], 0.01), "generated": gen.tolist(),
    }  # fmt: skip


# ---- demo: the claim

ALIASES = {
    "ordinary": "k=0", "control": "k=0,control=1", "random": "k=4,strategy=random", "near-duplicates": "k=4,noise=0.05",
}  # fmt: skip
LESSONS = {
    "random": "a mask drawn afresh at each showing protects nothing ({:.2f} recited)",
    "near-duplicates": "nor does the hash, against copies with 5 % noise ({:.2f})",
}


def row_config(cfg: Config, spec: str) -> Config:
    """The settings of one demo row: an alias, or FIELD=VALUE,... over the command line's. BadInput: no such field."""
    free = {f.name: f for f in fields(Config) if f.name in (*FIXED, "steps", "loss") and f.name not in CORPUS}
    changed = {}
    try:
        for item in ALIASES.get(spec, spec).split(","):
            name, _, value = item.partition("=")
            name = name.replace("-", "_")
            if name not in free or not value:
                raise ValueError(f"{item!r} is not FIELD=VALUE with a setting of the loss, the batches or the model")
            kind, choices = type(free[name].default), free[name].metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}")
            changed[name] = bool(int(value)) if kind is bool else kind(value)
        return replace(cfg, **changed)
    except ValueError as e:
        raise BadInput(f"--runs {spec}: {e}. A row is one of {', '.join(ALIASES)}, or such as k=4,h=7.") from e


def demo(cfg: Config, w: cluster.World) -> None:
    """Train a model per row of --runs, audit each, print the table, the lessons, the picture and the claim."""
    cfg = replace(cfg, accum=max(cfg.accum, 2 // w.size))  # two half batches on one process or two: the same sums
    configs = {spec: row_config(cfg, spec) for spec in cfg.runs}
    run, text, found, shown = report.Run(cfg.out, cfg, w), Text(cfg), {}, []
    for spec, c in configs.items():
        start = time.perf_counter()
        trained = Trainer(c, text, w).run(run, spec)
        f = found[spec] = audit(c, text, trained.model) | {"supervised": int(trained.supervised)}
        f["seconds"] = time.perf_counter() - start
        run.log(audit=spec, **f)
        at_dropped = "-" if f["at_dropped"] is None else f"{f['at_dropped']:.0%}"
        scores = [f[n] for n in ("exact", "accuracy", "rouge_l")]
        ends = [f"{f['divergence']:.1f}", at_dropped, f["val_loss"], f["auc_loss"], f"{f['seconds']:.1f}"]
        shown.append([spec, f"{f['supervised'] / 1e3:.0f}k", *scores, *ends])
        w.print(f"{spec}: recites {f['exact']:.2f} of the canaries ({f['seconds']:.0f} s)")
    head = ["run", "supervised", "exact match", "token acc.", "RougeL", "first divergence", "at dropped", "val loss"]
    w.print("\n" + report.table([*head, "MIA AUC", "seconds"], shown) + "\n")
    for spec, lesson in LESSONS.items():
        if spec in found:
            w.print("lesson: " + lesson.format(found[spec]["exact"]))
    if w.main and {"ordinary", "k=4"} <= set(found):
        layout = {"ncols": 2, "figsize": (15, 5), "gridspec_kw": {"width_ratios": [1, 2]}}
        w.print(report.picture(f"{cfg.out}/goldfish.png", functools.partial(draw, cfg, text, found), **layout))
    if not {"ordinary", "k=4", "k=3"} <= set(found):
        return w.print("no claim: it needs the rows ordinary, k=4 and k=3")
    plain, k4, k3 = (found[s] for s in ("ordinary", "k=4", "k=3"))
    gap = max(abs(f["val_loss"] - plain["val_loss"]) for f in (k4, k3))
    at_dropped = [found[s]["at_dropped"] for s in ("k=8", "k=4", "k=3") if s in found]
    off = min(1.0 if share is None else share for share in at_dropped)
    order = [found[s]["exact"] for s in ("ordinary", "k=8", "k=4", "k=3") if s in found]
    falls = plain["exact"] >= 0.9 and order == sorted(order, reverse=True) and max(k4["exact"], k3["exact"]) <= 0.05
    run.claim(
        "goldfish loss stops verbatim recall and keeps validation loss",
        "84 of 100 articles recited after ordinary training, 0 of 100 with k=4 (LLaMA-2-7B)",
        f"ordinary recites {plain['exact']:.2f} of the canaries, k=4 {k4['exact']:.2f}, k=3 {k3['exact']:.2f}; "
        f"{off:.0%} of divergences at a dropped target; validation loss within {gap:.3f}",
        falls and off == 1 and gap <= 0.1,
        f"{cfg.canaries} canaries of {cfg.block + 1} tokens, {cfg.steps} steps, seed {cfg.seed}, {w.device.type}",
    )


def draw(cfg: Config, text: Text, found: dict, figure, axes) -> None:
    """Left: survival curves. Right: a canary as both models continue it, dropped targets marked."""
    left, right = axes
    for spec, f in found.items():
        look = {"lw": 5, "alpha": 0.4} if spec == "ordinary" else {"lw": 2, "ls": "--" if spec in ALIASES else "-"}
        left.plot(f["survival"], label=spec, **look)
    left.set(xlabel="tokens generated", ylabel="share of canaries still verbatim", ylim=(-0.03, 1.03))
    left.set_title("How long training text is recited")
    left.legend(frameon=False)
    decode = lambda i: text.tokenizer.piece(i).decode("utf-8", "replace").replace("\n", "¶")
    letters = [sum(c.isalpha() for i in row for c in decode(i)) for row in text.canary.tolist()]
    ahead = first_divergence(found["k=4"]["generated"], text.canary[:, cfg.prefix : cfg.prefix + cfg.suffix]).tolist()
    which = max(range(len(letters)), key=lambda i: letters[i] + 60 * min(ahead[i], 3))  # prose, and not lost at once
    row, ours = text.canary[which], found["k=4"]["generated"][which]
    prompt, true = row[: cfg.prefix].tolist(), row[cfg.prefix : cfg.prefix + cfg.suffix].tolist()
    dropped, y, width = mask_of(row_config(cfg, "k=4"), row[None])[0].tolist(), 0.0, 98
    right.set(xlim=(0, width), ylim=(-21, 1))
    right.axis("off")
    parts = {"The prompt": prompt, "The training text after it": true,
             "Ordinary training": found["ordinary"]["generated"][which], "Goldfish loss, k = 4": ours}  # fmt: skip
    for title, ids in parts.items():
        right.text(0, y, title, weight="bold")
        x, y, verbatim = 0, y - 1.5, ids is not prompt
        for j, i in enumerate(ids):
            word, marked = decode(i), ids is true or (ids is ours and ids[:j] == true[:j])
            verbatim = verbatim and i == true[j]
            if x + len(word) > width:
                x, y = 0, y - 1.5
            color = "0.45" if ids is prompt else "green" if verbatim else "crimson"
            box = "#ffe08a" if marked and dropped[cfg.prefix + j - 1] else "none"
            look = {"facecolor": box, "edgecolor": "none", "pad": 1}
            right.text(x, y, word, family="monospace", fontsize=9, color=color, bbox=look)
            x += len(word)
        y -= 2.3
    right.text(0, y, "yellow: dropped by the k = 4 mask    green: verbatim    red: from the first wrong token on")


# ---- train, audit, bench


def train(cfg: Config, w: cluster.World) -> None:
    """One run on text, with checkpoints, audited at its end."""
    path, text = f"{cfg.out}/checkpoint.pt", Text(cfg)
    state = cluster.load(path) if cfg.resume else None
    if state:
        check_resume(state, cfg, text)
    elif w.main:
        cluster.set_aside(path)
    run = report.Run(cfg.out, cfg, w, state["step"] if state else 0)
    found = audit(cfg, text, Trainer(cfg, text, w, state).run(run, "train", path).model)
    run.log(audit="train", **found)
    print_audit(cfg, w, found)


def print_audit(cfg: Config, w: cluster.World, found: dict) -> None:
    hidden = ("survival", "generated")
    w.print(report.table(["measure", "value"], [[n, f] for n, f in found.items() if n not in hidden and f is not None]))


def audit_run(cfg: Config, w: cluster.World) -> None:
    """Audit the model that `train` left in --model: greedy, beam search, and the attacker who knows the mask."""
    state = cluster.load(f"{cfg.model}/checkpoint.pt")
    c = replace(cfg, mode="train", **state["setting"] | {"data": tuple(state["setting"]["data"])})
    if not c.canaries:
        raise BadInput(f"{cfg.model} was trained with --canaries 0: it has nothing to extract")
    text = Text(c)
    check_resume(state, c, text)
    model = GPT(small_config(c)).to(w.device)
    model.load_state_dict(state["model"])
    found, shown = audit(c, text, model), []
    print_audit(c, w, found)
    rows = text.canary.to(w.device)
    ref, drop = rows[:, None, c.prefix : c.prefix + c.suffix], mask_of(c, rows)  # (canaries, 1, n_s), (canaries, block)
    for width in report.progress(c.beams, "beam search", w):
        shown.append([str(width)])
        for knows in (False, True):
            found_by = [extract(model, r, c.prefix, c.suffix, width, d if knows else None).reshape(len(r), -1, c.suffix)
                        for r, d in zip(rows.split(16), drop.split(16), strict=True)]  # fmt: skip
            shown[-1].append((torch.cat(found_by) == ref).all(dim=2).any(dim=1).float().mean().item())
    w.print(report.table(["beams", "exact match", "by one who knows the mask"], shown))
    if w.main:
        report.write_json(f"{c.out}/audit.json", found | {"beams": shown, "setting": state["setting"]})


def audit_real(cfg: Config, w: cluster.World) -> None:
    """Does a real model recite these files, and do they look trained on? Scores per file."""
    weights, shown, scores = open_weights(cfg.model), [], {True: [], False: []}
    tokenizer, width = weights.tokenizer(), cfg.prefix + cfg.suffix
    model = GPT(weights.config).to(w.device)
    model.load_state_dict(weights.state_dict())
    files = [(n, True) for n in cfg.data] + [(n, False) for n in cfg.nonmembers if n != "none"]
    for name, member in report.progress(files, "audit", w):
        ids = torch.tensor(tokenizer.encode(corpus(name)).ids)
        n = min(cfg.rows, len(ids) // width)
        if n == 0:
            raise BadInput(f"{name} has {len(ids)} tokens; --prefix {cfg.prefix} + --suffix {cfg.suffix} need {width}.")
        rows = ids[: n * width].reshape(n, width).to(w.device)
        gen, ref = extract(model, rows, cfg.prefix, cfg.suffix), rows[:, cfg.prefix :]
        mia = mia_scores(model, rows, [tokenizer.decode(r) for r in rows.tolist()])
        scores[member].append(mia)
        measured = [*recall(gen, ref).values(), *(v.mean().item() for v in mia.values())]
        shown.append([name[-40:], "yes?" if member else "no", str(n), *measured])
    head = ["file", "member", "rows", "exact match", "token acc.", "RougeL", "longest run", "first divergence"]
    head += [f"MIA {s}" for s in mia]
    w.print(report.table(head, shown))
    found = {"model": cfg.model, "rows": [dict(zip(head, r, strict=True)) for r in shown]}
    if scores[False]:
        pool = lambda member, s: torch.cat([m[s] for m in scores[member]])
        found["auc"] = {s: auc(pool(True, s), pool(False, s)) for s in mia}
        w.print("AUC, yes? against no: " + ", ".join(f"{s} {a:.3f}" for s, a in found["auc"].items()))
    else:
        w.print("membership scores mean little alone: give --nonmembers FILE for an AUC")
    if w.main:
        report.write_json(f"{cfg.out}/audit.json", found)


def bench(cfg: Config, w: cluster.World) -> None:
    """The head, forward and backward, against PyTorch's own: time, memory, and the floor beside them."""
    cuda = w.device.type == "cuda"
    N, D, V, dtype = (16384, 2048, 128256, torch.bfloat16) if cuda else (4096, 256, 32768, torch.float32)
    k, g, T = cfg.k or 4, cluster.generator(cfg.seed), 1024
    hidden = torch.randn(N // T, T, D, generator=g).to(w.device, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=g) / math.sqrt(D)).to(w.device, dtype).requires_grad_()
    targets = torch.randint(1, V, (N // T, T), generator=g).to(w.device)
    kept = (~goldfish_mask(targets, k)).float().mean().item()
    per_byte, per_flop = (1 / rate for rate in report.ceilings(w.device, dtype))
    found = {"N": N, "D": D, "V": V, "k": k, "dtype": str(dtype), "device": report.device_name(w.device), "cases": {}}
    w.print(f"{found['device']}, {dtype}, N={N} D={D} V={V} k={k} ({kept:.3f} kept)")
    w.print(f"measured ceilings: {1e-9 / per_byte:.0f} GB/s copied, {1e-12 / per_flop:.2f} TFLOP/s in matrix products")

    def entropy(logits, masked=True):
        # doc_ids, one document here, keep the baseline's mask in torch operations on a GPU too
        y = goldfish_targets(targets, k, doc_ids=torch.zeros_like(targets)) if masked else targets
        return F.cross_entropy(logits.view(N, V), y.view(N))

    def compare(title: str, cases: dict) -> None:
        """One table; cases: name -> (function that gives a loss, its floor in seconds). The first is the base."""

        def step(fn):
            hidden.grad = weight.grad = None
            fn().backward()

        calls, rows = {name: functools.partial(step, fn) for name, (fn, _) in cases.items()}, []
        seconds = report.timed(calls, w.device, repeats=20 if cuda else 5)
        peaks = [report.peak_bytes(fn, w.device) / 2**20 for fn in calls.values()]
        base = next(iter(seconds.values()))[0]
        for (name, (t, spread)), (_, floor), peak in zip(seconds.items(), cases.values(), peaks, strict=True):
            time_of = [f"{t * 1e3:.1f} ± {spread * 1e3:.1f}", t / base]
            rows.append([name, *time_of, f"{peak:.0f}", peak / peaks[0], f"{floor * 1e3:.1f}", f"{floor / t:.0%}"])
            found["cases"][name] = {"seconds": t, "spread": spread, "peak_mib": peak, "floor_seconds": floor}
        head = [title, "ms", "x time", "peak MiB", "x memory", "floor ms", "of floor"]
        w.print("\n" + report.table(head, rows))

    head, linear = 6 * N * D * V * per_flop, goldfish_linear_loss
    compare("hidden states to gradients", {
        "F.linear + F.cross_entropy, all rows": (lambda: entropy(F.linear(hidden, weight), masked=False), head),
        "F.linear + F.cross_entropy, masked": (lambda: entropy(F.linear(hidden, weight)), head),
        "goldfish_linear_loss, k=None": (lambda: linear(hidden, weight, targets, None), head),
        f"goldfish_linear_loss, k={k}": (lambda: linear(hidden, weight, targets, k), kept * head),
    })  # fmt: skip
    logits = F.linear(hidden, weight).detach()
    fresh, size = lambda: logits.detach().requires_grad_(), logits.numel() * logits.element_size() * per_byte
    floor = (2 * kept + (1 - kept)) * size  # a kept row is read and written, a dropped one written
    compare("logits to gradients", {
        "mask + F.cross_entropy": (lambda: entropy(fresh()), floor),
        "mask + F.cross_entropy in fp32": (lambda: entropy(fresh().float()), floor),
        f"goldfish_loss, k={k}": (lambda: goldfish_loss(fresh(), targets, k), floor),
    })  # fmt: skip
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", found)


def main(cfg: Config) -> None:
    ours = Path(cfg.model, "checkpoint.pt").exists() or cfg.model == Config.model
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "bench": bench, "audit": audit_run if ours else audit_real}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
