"""Goldfish loss: a next-token loss that keeps a language model from reciting its training text.

Paper    Hans et al., "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs", NeurIPS 2024,
         arXiv:2406.10209.
Idea     Leave a pseudo-random 1/k of the targets without loss. The model reads every token, but is never taught the
         dropped ones. So when it recites, it must guess at each of them, and one wrong guess leads it off the text.
         A hash of the last h tokens decides, so a passage that comes again drops the same targets again.
Here     The claim we check: text seen 150 times is recited after ordinary training, and not with k = 4 or 3. Recitation
         breaks at dropped targets, which k = 4 guesses as an untaught model does within 0.05 (not on seeds 3 and 4).
Differs  - 0.5 M parameters, for LLaMA-2-7B and TinyLlama-1.1B. Rows of 65 tokens, for 2048: their first 12 targets have
           no whole window and are kept, so k = 4 drops 21 % and k = 3 27 %.
         - The hash window ends at the target, as in the released code; --window context is the paper's text.
         - The loss is divided by the supervised targets of the whole step. Preset 1b has no end-of-text tokens.

    python goldfish.py                                              # laptop: table, claim, picture; 3 minutes
    python goldfish.py --quick                                      # half a minute, no verdict
    torchrun --nproc-per-node 2 goldfish.py --device cpu            # the same numbers on two processes
    python goldfish.py train --k 4                                  # one run, with checkpoints; see --resume
    python goldfish.py audit                                        # what can be extracted from that run
    python goldfish.py audit --model smollm2 --data README.md       # the same attack on a real model and your text
    python goldfish.py bench                                        # the loss against what PyTorch offers

Expect   "ordinary recites 1.00 of the texts, k=4 0.00, k=3 0.00" on CPU with seed 0, Python 3.11, 1 or 2 processes.
Writes   results/goldfish/: metrics.jsonl, claim.json, goldfish.png; checkpoint.pt (train), audit.json, bench.json.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import cli, cluster, loop, report
from common.cli import BadInput, opt
from common.kernels import cross_entropy as kernels, use_kernels
from common.text import Tokenizer, checksum, corpus
from common.weights import open_weights, rope_frequencies, rotate

# %% the method: which targets have a loss
#
# x_i  target i, which logits i predict      G_i  1 if target i has a loss, 0 if it is dropped
# k    one target in k is dropped, on average: 4    h    tokens whose product is hashed: 13
# L_G = -(1 / |G|) sum_i G_i log P(x_i | x_<i),   |G| = sum_i G_i                                    (Section 3)


@functools.cache
def hash_table() -> Tensor:
    """The released code's 1 000 003 uniforms, drawn on the CPU: every device and rank drops the same targets."""
    uniforms = torch.rand(1_000_003, generator=torch.Generator().manual_seed(2971215073), device="cpu")
    return torch.from_numpy(uniforms.numpy())  # .numpy() refuses torch's fake tensors: none gets into the cache


@torch.no_grad()
def goldfish_mask(
    targets: Tensor, k: int = 4, h: int = 13, strategy: str = "hash", window: str = "target",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """True where a target gets no loss: integer token ids (B, L) -> bool (B, L). Section 3.1.

    hash: drop where the product of h tokens, looked up in a table of uniforms, falls below 1/k. The h tokens end at the
    target (released code) or just before it (window "context", the paper's text). static: every k-th column.
    random: each target afresh, from `generator`. ValueError: k < 2, or no rows of ids, or rows without a full window.
    """
    if targets.ndim != 2 or targets.is_floating_point():
        raise ValueError(f"targets must be rows of token ids (B, L), not {targets.dtype} {tuple(targets.shape)}")
    L, ahead = targets.shape[1], int(window == "context")
    if k < 2 or h < 1 or (strategy == "hash" and L < h + ahead):
        raise ValueError(f"k = {k}, h = {h} drop all or nothing of rows of {L}: need k >= 2 and 1 <= h <= {L - ahead}")
    if strategy == "static":
        return ((torch.arange(L, device=targets.device) + 1) % k == 0).expand_as(targets)
    if strategy == "random":
        return torch.rand(targets.shape, generator=generator).to(targets.device) < 1 / k
    product = targets.long().unfold(1, h, 1).prod(dim=2)  # (B, L - h + 1), wraps at 2^64
    drop = hash_table().to(targets.device)[product % len(hash_table())] < 1 / k
    return F.pad(drop, (h - 1 + ahead, 0))[:, :L]  # shifted right: the first h - 1 have no window, they are kept


def goldfish_loss(logits: Tensor, targets: Tensor, k: int = 4, h: int = 13) -> Tensor:
    """L_G of logits (B, L, V) and targets (B, L), -100 for padding -> 0-d, fp32. 0 when nothing is supervised."""
    keep = ~goldfish_mask(targets, k, h) & (targets != -100)
    return kept_loss(logits, targets, keep) / keep.sum().clamp(min=1)


def kept_loss(logits: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """Summed cross-entropy where keep (B, L) is True; what is dropped, NaN or not, never enters."""
    if logits.is_cuda and use_kernels(logits.device):  # one pass over the kept rows, no copy of them
        return kernels.masked_cross_entropy(logits.flatten(0, 1), targets.flatten().long(), keep.flatten())
    return F.cross_entropy(logits[keep].float(), targets[keep].long(), reduction="sum")


# %% what makes it scale: a dropped target costs no matrix product, and logits of all rows never exist


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, keep: Tensor, chunk: int = 2048) -> Tensor:
    """kept_loss of the logits hidden (B, L, C) @ head (V, C)^T, for 6 (1 - 1/k) B L C V FLOP instead of 6 B L C V.

    Every rank makes the mask of the whole batch, so it knows |G| of the step without asking the others."""
    kind = hidden.device.type  # torch 2.13's function does not follow autocast by itself
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    x, y, W = hidden[keep].to(dtype), targets[keep].long(), head.to(dtype)  # (n, C), (n,), (V, C)
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13, whose own choice of chunks is several times slower on a CPU
        how = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        return F.linear_cross_entropy(x, W, y, reduction="none", options=how).float().sum()  # a bf16 sum would round
    part = lambda a, b: F.cross_entropy(F.linear(a, W).float(), b, reduction="sum")  # makes its logits twice
    return sum(checkpoint(part, a, b, use_reentrant=False) for a, b in zip(x.split(chunk), y.split(chunk), strict=True))


# %% what is measured


@torch.no_grad()
def extract(model, rows: Tensor, n_prefix: int, n_suffix: int, beams: int = 1) -> Tensor:
    """Continue the first n_prefix tokens of rows (B, >= n_prefix) greedily -> (B, n_suffix), or by beam search ->
    (B, beams + 1, n_suffix), likeliest first, and last the greedy continuation, which a beam may lose.

    model: ids (B, T) -> logits (B, T, V); a GPT is given a cache. The paper's attacker has 30 beams."""
    prefix, score = rows[:, :n_prefix], torch.zeros(len(rows), 1, device=rows.device)  # (B, W) live sequences
    ids, new, cache = prefix, prefix, {}
    for _ in range(n_suffix):
        logits = model(new, cache) if isinstance(model, GPT) else model(ids)
        best, token = logits[:, -1].float().log_softmax(dim=-1).topk(min(beams, logits.shape[-1]))  # (B W, K)
        K, W = best.shape[1], score.shape[1]
        total = rearrange(score.flatten()[:, None] + best, "(b w) k -> b (w k)", b=len(rows))
        score, pick = total.topk(min(beams, W * K))  # (B, W'), pick = K beam + choice
        parent = (pick // K + W * torch.arange(len(rows), device=ids.device)[:, None]).flatten()
        new = token.reshape(len(rows), -1).gather(1, pick).reshape(-1, 1)  # (B W', 1)
        ids = torch.cat([ids[parent], new], dim=1)
        cache = {i: (k[parent], v[parent]) for i, (k, v) in cache.items()}
    found = rearrange(ids[:, n_prefix:], "(b w) n -> b w n", b=len(rows))
    return found[:, 0] if beams == 1 else torch.cat([found, extract(model, rows, n_prefix, n_suffix)[:, None]], dim=1)


def rouge_l(a: Tensor, b: Tensor) -> Tensor:
    """RougeL F, 2 LCS / (n + m), of token ids (B, n) and (B, m) -> (B,)."""
    lcs = torch.zeros(len(b), b.shape[1] + 1, dtype=torch.long, device=b.device)  # column j: with the first j of b
    for i in range(a.shape[1]):
        match = lcs[:, :-1] + (b == a[:, i : i + 1])
        lcs[:, 1:] = torch.maximum(lcs[:, 1:], match).cummax(dim=1).values
    return 2 * lcs[:, -1] / (a.shape[1] + b.shape[1])


def first_divergence(generated: Tensor, true: Tensor) -> Tensor:
    """Index of the first wrong token, n when there is none: (B, n) -> (B,)."""
    return (generated == true).int().cumprod(dim=1).sum(dim=1)


@torch.no_grad()
def mia_scores(model, rows: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """Membership scores (B,), higher = more likely trained on. loss: mean log-probability of rows (B, L + 1).
    zlib: total log-probability over the bytes of the compressed text."""
    of = lambda r: model(r[:, :-1]).float().log_softmax(dim=-1).gather(-1, r[:, 1:, None])[..., 0].sum(dim=1)
    total = torch.cat([of(r) for r in rows.split(16)])  # without the logits of all rows at once
    size = torch.tensor([len(zlib.compress(t.encode())) for t in texts], device=rows.device)
    return {"loss": total / (rows.shape[1] - 1), "zlib": total / size}


def auc(members: Tensor, others: Tensor) -> float:
    """Chance that a member scores above a non-member, ties counted half."""
    return ((members[:, None] > others).double() + (members[:, None] == others).double() / 2).mean().item()


def tpr_at_fpr(members: Tensor, others: Tensor, fpr: float) -> float:
    """Share of members above the threshold that at most `fpr` of the non-members pass."""
    return (members > others.sort(descending=True).values[int(fpr * len(others))]).double().mean().item()


# %% the model


class Layer(nn.Module):
    """Causal attention with rotary positions, H query heads over Hk key/value heads, then a SwiGLU MLP."""

    def __init__(self, c: dict):
        super().__init__()
        C, M, self.H = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        self.Hk = c.get("num_key_value_heads") or self.H
        q, kv = (n * (c.get("head_dim") or C // self.H) for n in (self.H, self.Hk))
        matrices = lambda **sizes: nn.ModuleDict({name: nn.Linear(*s, bias=False) for name, s in sizes.items()})
        self.self_attn = matrices(q_proj=(C, q), k_proj=(C, kv), v_proj=(C, kv), o_proj=(q, C))
        self.mlp = matrices(gate_proj=(C, M), up_proj=(C, M), down_proj=(M, C))
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

    def __init__(self, config: dict, seed: int = 0):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("freq", rope_frequencies(config), persistent=False)
        g = cluster.generator(seed, 0)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))  # they add to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.model.layers)) if last else 0.02, generator=g)

    def forward(self, ids: Tensor, cache: dict | None = None, hidden: bool = False) -> Tensor:
        """Logits (B, T, V) of ids (B, T), or with `hidden` the final states (B, T, C).

        cache: a dict that starts as {}, takes a prompt, then one token a call; positions go on from it."""
        past = cache[0][0].shape[2] if cache else 0
        where = torch.arange(past, past + ids.shape[1], device=ids.device)
        angle = torch.outer(where.float(), self.freq)  # (T, D/2)
        x = self.model.embed_tokens(ids)  # (B, T, C)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, angle, cache, i)
        x = self.model.norm(x)
        return x if hidden else self.lm_head(x)


TINYLLAMA = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip


def start_model(cfg: Config) -> GPT:
    """The model that training starts from: random weights of a small shape or of TinyLlama's, or real weights."""
    if cfg.model == "tinyllama":
        return GPT(TINYLLAMA, cfg.seed)
    if cfg.model:
        weights = open_weights(cfg.model)
        model, tensors = GPT(weights.config), weights.state_dict()
        model.load_state_dict({"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors})  # or its own head
        return model
    return GPT({
        "vocab_size": cfg.vocab, "hidden_size": cfg.d_model, "intermediate_size": 8 * round(cfg.d_model / 3),
        "num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.d_model // 32, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    }, cfg.seed)  # fmt: skip


# %% settings

TRAINED, READS, PRESET_NAMES = ("demo", "train"), ("demo", "train", "audit"), ("demo", "small", "finetune", "1b")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "audit", "bench"), positional=True)
    preset: str = opt("demo", "settings: for your text, real weights, the paper's", PRESET_NAMES, modes=("train",))
    model: str = opt("", "smollm2, a folder, a .gguf; train: tinyllama; empty: a small one", modes=("train", "audit"))
    k: int = opt(4, "drop one target in k; 0 is ordinary training", modes=("train", "bench"))
    h: int = opt(13, "tokens whose product is hashed", modes=TRAINED)
    strategy: str = opt("hash", "how targets are chosen", ("hash", "static", "random"), modes=("train",))
    window: str = opt("target", "the h tokens end at the target, or before it", ("target", "context"), modes=TRAINED)
    data: tuple = opt(("docs",), "text files, or one .npy of token ids, or Python's own docs or sources", modes=READS)
    nonmembers: tuple = opt(("none",), "text files surely not trained on, for a comparison", modes=("audit",))
    vocab: int = opt(1024, "token ids: 256 bytes and the most frequent words", modes=TRAINED)
    block: int = opt(64, "predicted tokens of a row: half is the prompt, half must be recited", modes=READS)
    canaries: int = opt(16, "rows shown again and again; audit: rows taken from each file", modes=READS)
    exposures: int = opt(150, "times that each canary is shown", modes=TRAINED)
    d_model: int = opt(128, "width of the small model, in heads of 32", modes=TRAINED)
    n_layer: int = opt(2, "its blocks", modes=TRAINED)
    steps: int = opt(300, "optimizer steps", modes=TRAINED)
    batch: int = opt(16, "rows per step, over all processes and micro-steps", modes=TRAINED)
    accum: int = opt(1, "micro-steps per step", modes=("train",))
    lr: float = opt(2e-3, "peak learning rate of AdamW, after a tenth of the steps; cosine to a tenth", modes=TRAINED)
    beams: tuple = opt((1, 8, 30), "beam widths of the attacker", modes=("audit",))
    quick: bool = opt(False, "fewer rows of the table, no verdict", modes=("demo",))
    seed: int = opt(0, "seed of the split, the weights and the data order", modes=("demo", "train", "bench"))
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "of the matrix products", choices=("float32", "bfloat16"), modes=TRAINED)
    out: str = opt("results/goldfish", "folder of what the run writes, of the run to resume or to audit")
    resume: bool = opt(False, "go on from the checkpoint in --out, if there is one", modes=("train",))
    save_every: int = opt(100, "steps between checkpoints; 0 writes only the last", modes=("train",))
    log_every: int = opt(10, "steps between lines in metrics.jsonl", modes=TRAINED)

    def __post_init__(self):
        sizes = (self.h, self.block - 1, self.batch, self.accum, self.steps, self.log_every, self.d_model, self.n_layer)
        shown, trains = self.canaries * self.exposures, self.mode in TRAINED
        need = self.k if self.strategy == "static" and self.k else self.h + int(self.window == "context")
        for wrong, message in (
            (min(*sizes, self.canaries, *self.beams, self.exposures + 1, self.save_every + 1) < 1,
             "sizes, --steps, --canaries, --beams must be at least 1, --block 2, --exposures and --save-every 0"),
            (self.k == 1 or self.k < 2 * (self.mode == "bench"), f"--k {self.k}: give 2 or more; train: 0 is ordinary"),
            (not 0 < self.lr < math.inf, f"--lr {self.lr}: give a number above 0"),
            (self.d_model % 32 or self.vocab < 256, "--d-model is a multiple of 32, --vocab at least 256"),
            (trains and (need > self.block or self.h > 24), f"--h {self.h} or static --k {self.k}: rows of {self.block}"
             f" have no room, or products of over 24 ids are mostly 0. Give --block {need} or more, --h 24 or less"),
            (self.model and (self.d_model, self.n_layer) != (128, 2), "--model: leave --d-model and --n-layer out"),
            (trains and shown > self.steps * (self.batch - (self.mode == "demo")), f"--canaries {self.canaries} x "
             f"--exposures {self.exposures} = {shown} exceed the rows of --steps x --batch; the demo needs others too"),
            (self.mode == "train" and self.preset == "demo" and (self.data != ("docs",) or self.model),
             "your text or weights need --preset small (the demo's numbers), finetune (real weights) or 1b (paper)"),
        ):  # fmt: skip
            if wrong:
                raise BadInput(message)


PRESETS = {
    "demo": {}, "small": {},
    "finetune": {"model": "smollm2", "block": 128, "steps": 100, "exposures": 100, "canaries": 8, "lr": 1e-4},
    "1b": {  # the paper's TinyLlama, 1,100,048,384 parameters; not run here
        "model": "tinyllama", "vocab": 32000, "block": 2048, "batch": 1024, "steps": 9536, "lr": 4e-4,
        "canaries": 2000, "exposures": 50, "dtype": "bfloat16",
    },
}  # fmt: skip


# %% the text: canaries among other rows

VALIDATION, GRAM = 64, 13  # rows; tokens that a canary may share with no other row
shuffled = functools.lru_cache(4)(lambda n, *seed: torch.randperm(n, generator=cluster.generator(*seed)))  # of rows


def repeated(table: np.ndarray) -> Tensor:
    """Share of a row's runs of GRAM tokens that stand in the table a second time: rows (n, L) -> (n,)."""
    size, value = min(GRAM, table.shape[1]), 0
    for i in range(size):  # a polynomial of the tokens, wrapping at 2^64
        value = value * 6364136223846793005 + table[:, i : table.shape[1] - size + 1 + i].astype(np.uint64) + 1
    _, which, count = np.unique(value, return_inverse=True, return_counts=True)
    return torch.from_numpy((count[which].reshape(value.shape) > 1).mean(axis=1))


def encoded(cfg: Config, text: str) -> tuple[np.ndarray, object]:
    """(ids (n,), decode) by the tokenizer of the real model, or by a list of the text's most frequent words."""
    if cfg.model in ("", "tinyllama"):
        tokenizer = Tokenizer(text, cfg.vocab)
        return tokenizer.encode(text).numpy(), tokenizer.decode
    tokenizer = open_weights(cfg.model).tokenizer()
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids), tokenizer.decode


class Text:
    """The corpus as rows of block + 1 tokens, split by the seed: canaries, non-members, validation, background."""

    def __init__(self, cfg: Config):
        text, self.seed, width = corpus(cfg.data), cfg.seed, cfg.block + 1
        ids, self.decode = (text, str) if isinstance(text, np.ndarray) else encoded(cfg, text)
        self.vocab = cfg.vocab if cfg.model in ("", "tinyllama") else open_weights(cfg.model).config["vocab_size"]
        n, held = len(ids) // width, 2 * cfg.canaries + VALIDATION
        self.table = ids[: n * width].reshape(n, width)
        self.crc = checksum(ids)
        order, need = shuffled(n, cfg.seed, 1), held + (cfg.canaries * cfg.exposures < cfg.steps * cfg.batch)
        if n < need:
            what = f"{need} rows of {width} tokens are needed, it has {len(ids)} tokens"
            raise BadInput(f"the text is too small: {what}. Add text or lower --canaries.")
        if isinstance(text, str) or len(ids) <= 2**24:  # the least repeated rows become canaries and held-out ones
            alone = repeated(self.table)[order].argsort(stable=True)[: 2 * cfg.canaries]
            rest = torch.ones(n, dtype=torch.bool).index_fill(0, alone, False)
            order = torch.cat([order[alone], order[rest]])
        self.parts = order.split([cfg.canaries, cfg.canaries, VALIDATION, n - held])
        self.canary, self.nonmember, self.validation = map(self.rows, self.parts[:3])  # (rows, block + 1) each

    def rows(self, index: Tensor) -> Tensor:
        """Token ids of these rows, (len(index), block + 1), int64."""
        found = torch.from_numpy(self.table[index.numpy()].astype(np.int64))
        if len(found) and not 0 <= found.min() <= found.max() < self.vocab:
            raise BadInput(f"the text has token ids {found.min()} to {found.max()}, the model 0 to {self.vocab - 1}.")
        return found

    def _stream(self, part: Tensor, first: int, last: int) -> Tensor:
        """Items first .. last - 1 of endlessly reshuffled epochs over these rows, (last - first, block + 1)."""
        n = len(part)
        where = [shuffled(n, self.seed, 2, n, i // n)[i % n] for i in range(first, last)]
        return self.rows(part[torch.tensor(where, dtype=torch.long)])

    def batch(self, cfg: Config, step: int, noise: float = 0.0, control: bool = False) -> Tensor:
        """The rows of a step, (batch, block + 1): the same on every rank, a function of seed and step alone.

        noise: part of a canary's tokens replaced each time. control: the canaries' places stay empty."""
        first, last = (s * cfg.canaries * cfg.exposures // cfg.steps for s in (step, step + 1))
        fresh = self._stream(self.parts[3], step * cfg.batch - first, (step + 1) * cfg.batch - last)
        if control or first == last:
            return fresh
        shown, g = self._stream(self.parts[0], first, last), cluster.generator(self.seed, 3, step)
        if noise:
            hit, other = torch.rand(shown.shape, generator=g) < noise, fresh.flatten()
            shown = torch.where(hit, other[torch.randint(len(other), shown.shape, generator=g)], shown)
        return torch.cat([shown, fresh])[torch.randperm(cfg.batch, generator=g)]


# %% training


def keep_mask(cfg: Config, rows: Tensor, step: int = 0) -> Tensor:
    """G of rows (B, block + 1), drawn for the whole batch at once, so that it does not depend on ranks: (B, block)."""
    if not cfg.k:
        return torch.ones_like(rows[:, 1:], dtype=torch.bool)
    g = cluster.generator(cfg.seed, 4, step) if cfg.strategy == "random" else None
    return ~goldfish_mask(rows[:, 1:], cfg.k, cfg.h, cfg.strategy, cfg.window, g)


def train_model(cfg: Config, text: Text, w: cluster.World, run: report.Run, what: str, path: str = "", **shown) -> GPT:
    """One run -> the model. The loss is divided by |G| of the whole step, over ranks and micro-steps."""
    shards = w.size * cfg.accum
    if cfg.batch % shards:
        raise BadInput(f"--batch {cfg.batch} does not divide over {w.size} processes x --accum {cfg.accum}")
    model = start_model(cfg).to(w.device)
    ddp, warmup = nn.parallel.DistributedDataParallel(model), max(1, cfg.steps // 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.1)
    parts = {"model": model, "optimizer": optimizer}  # a resumed run may have another --accum: it changes no number
    for step in loop.steps(replace(cfg, accum=1), w, run, parts, cfg.steps, what, path, {"text": text.crc}):
        rows = text.batch(cfg, step, **shown)  # (batch, block + 1), the same on every rank
        keep, loss = keep_mask(cfg, rows, step), 0.0
        count = keep.sum().clamp(min=1).item()  # |G|
        for i in range(cfg.accum):
            mine = slice(w.rank + i * w.size, None, shards)  # every shards-th row
            x, g = rows[mine].to(w.device), keep[mine].to(w.device)
            ddp.require_backward_grad_sync = i == cfg.accum - 1
            with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                part = head_loss(ddp(x[:, :-1], hidden=True), model.lm_head.weight, x[:, 1:], g) / count
            (part * w.size).backward()  # DDP averages over the ranks, and we want the sum
            loss = loss + part.detach()
        done = (step - warmup) / max(1, cfg.steps - warmup)
        lr = cfg.lr * ((step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.line = {"loss": loss, "supervised": count, "lr": lr}
    return model


@torch.no_grad()
def measure(cfg: Config, text: Text, model: GPT) -> dict:
    """What a run has memorised, as means over the canaries: one row of the demo's table.

    right kept, right dropped: shares of targets guessed right when the true text is given. A run without a mask of its
    own is asked about the mask of k = 4."""
    device, P = next(model.parameters()).device, cfg.block // 2
    canary, other, held = (r.to(device) for r in (text.canary, text.nonmember, text.validation))
    own = cfg.k and cfg.strategy != "random"
    asked = cfg if own else replace(cfg, k=4, strategy="hash")
    drop, true = ~keep_mask(asked, canary), canary[:, P : cfg.block]  # (canaries, block), (canaries, block - P)
    generated = torch.cat([extract(model, r, P, cfg.block - P) for r in canary.split(16)])  # never all logits at once
    right = torch.cat([model(r[:, :-1]).argmax(dim=-1) == r[:, 1:] for r in canary.split(16)])  # (canaries, block)
    broke = first_divergence(generated, true)
    wrong = (broke < cfg.block - P).nonzero().flatten()
    mean = lambda hits: hits.float().mean().item() if len(hits) else None
    share = lambda mask: mean(mask[wrong, P + broke[wrong] - 1])  # target i is token i + 1
    hashes = range(max(1, cfg.h - 8), cfg.h) if asked.strategy == "hash" else ()  # other ones than the run's
    placebo = [share(~keep_mask(replace(asked, h=h), canary)) for h in hashes]
    score = [mia_scores(model, r, [text.decode(i) for i in r.tolist()])["loss"] for r in (canary, other)]
    loss = sum(kept_loss(model(r[:, :-1]), r[:, 1:], r[:, 1:] >= 0).item() for r in held.split(16))  # of all targets
    return {
        "recited": (broke == cfg.block - P).float().mean().item(), "RougeL": rouge_l(generated, true).mean().item(),
        "first break": broke.float().mean().item(), "at dropped": share(drop) if own else None,
        "at placebo": sum(placebo) / len(placebo) if own and len(wrong) and placebo else None,
        "right kept": mean(right[~drop]), "right dropped": mean(right[drop]),
        "val loss": loss / held[:, 1:].numel(), f"AUC, n={len(canary)}": auc(*score),
        "survival": [(broke >= n).float().mean().item() for n in range(cfg.block - P + 1)],
    }  # fmt: skip


# %% demo: the claim

RUNS = {  # row of the table -> settings, what the batches show
    "ordinary": ({"k": 0}, {}), "k=4": ({"k": 4}, {}), "k=3": ({"k": 3}, {}), "control": ({"k": 4}, {"control": True}),
    "random": ({"k": 4, "strategy": "random"}, {}), "near-duplicates": ({"k": 4}, {"noise": 0.05}),
    "k=4, 4/3 steps": ({"k": 4, "steps": 4 / 3}, {}),
}  # fmt: skip


def judge(found: dict[str, dict]) -> tuple[bool, str]:
    """(the claim holds, its numbers): bars fixed before the runs. The control was exchanged once, see the page."""
    plain, k4, k3, control = (found[name] for name in ("ordinary", "k=4", "k=3", "control"))
    gap = max(abs(f["val loss"] - plain["val loss"]) for f in (k4, k3))
    recited = plain["recited"] >= 0.9 and max(k4["recited"], k3["recited"]) <= 0.05
    placebo = [f["at placebo"] for f in (k4, k3)]
    breaks = k4["at dropped"] == k3["at dropped"] == 1 and None not in placebo and max(placebo) <= 0.4
    unseen = abs(k4["right dropped"] - control["right dropped"]) <= 0.05
    percent = lambda share: "-" if share is None else f"{share:.0%}"
    return recited and breaks and unseen and gap <= 0.1, (
        f"ordinary recites {plain['recited']:.2f} of the texts, k=4 {k4['recited']:.2f}, k=3 {k3['recited']:.2f}; "
        f"breaks at a dropped target {percent(k4['at dropped'])} and {percent(k3['at dropped'])}, at a placebo mask "
        f"{percent(placebo[0])} and {percent(placebo[1])}; dropped targets right "
        f"{k4['right dropped']:.2f}, control {control['right dropped']:.2f}; validation loss within {gap:.3f}"
    )


def demo(cfg: Config, w: cluster.World) -> None:
    """Train a model per row of RUNS, measure each, print the table, the picture and the claim."""
    cfg = replace(cfg, accum=max(1, 2 // w.size))  # two half batches on one process or two: the same sums
    text, run, found = Text(cfg), report.Run(cfg.out, cfg, w), {}
    for name in ("ordinary", "k=4", "control") if cfg.quick else RUNS:
        changes, batches = RUNS[name]
        factor = changes.get("steps", 1) * (0.5 if cfg.quick else 1)
        c = replace(cfg, **changes | {"steps": round(cfg.steps * factor), "exposures": round(cfg.exposures * factor)})
        found[name] = measure(c, text, train_model(c, text, w, run, name, **batches))
        run.log(measured=name, **found[name])
        w.print(f"{name}: recites {found[name]['recited']:.2f} of the texts")
    head = [key for key in found["k=4"] if key != "survival"]
    cells = [[name, *("-" if f[key] is None else f"{f[key]:.2f}" for key in head)] for name, f in found.items()]
    w.print("\n" + report.table(["run", *head], cells) + "\n")
    if w.main:
        w.print(report.picture(f"{cfg.out}/goldfish.png", lambda _, axis: draw(found, axis), figsize=(8, 4)))
    if cfg.quick:
        return w.print("quick: no verdict")
    holds, here = judge(found)
    run.claim("text is recited after ordinary training, not after that with the goldfish loss; recitation breaks at "
              "dropped targets, not at a placebo mask's, and these are guessed as if the text had never been seen; the "
              "validation loss stays", "84 of 100 articles recited, 0 of 100 with k = 4 (LLaMA-2-7B)", here, holds,
              f"{cfg.canaries} texts, {cfg.exposures} times, seed {cfg.seed}, {w.device.type}")  # fmt: skip


def draw(found: dict, axis) -> None:
    """Survival curves: how long the canaries are recited."""
    for i, (name, f) in enumerate(found.items()):
        axis.plot(f["survival"], label=name, lw=5 if i == 0 else 2, alpha=0.8, ls="-" if i < 4 else "--")
    axis.set(xlabel="tokens generated", ylabel="share of texts still verbatim", ylim=(-0.03, 1.03))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


# %% train, audit, bench


def train(cfg: Config, w: cluster.World) -> None:
    """One run on text, with checkpoints, measured at its end."""
    text, run, path = Text(cfg), report.Run(cfg.out, cfg, w), f"{cfg.out}/checkpoint.pt"
    found = measure(cfg, text, train_model(cfg, text, w, run, "train", path))
    run.log(measured="train", **found)
    w.print(f"recites {found['recited']:.2f} of the texts, validation loss {found['val loss']:.3f}")


def windows(cfg: Config, name: str) -> Tensor:
    """The first rows of a file as a real model reads them, each behind its start-of-text token: (rows, T)."""
    if isinstance(text := corpus(name), np.ndarray):
        raise BadInput(f"{name}: give text, the tokenizer of --model makes its own ids.")
    ids, start = encoded(cfg, text)[0], open_weights(cfg.model).tokenizer().encode("").ids
    if (n := min(cfg.canaries, len(ids) // cfg.block)) == 0:
        raise BadInput(f"{name} has {len(ids)} tokens and --block {cfg.block} needs as many. Ask fewer.")
    return torch.cat([torch.tensor([start] * n).long(), torch.from_numpy(ids)[: n * cfg.block].view(n, -1)], dim=1)


def attack(cfg: Config, w: cluster.World, model: GPT, rows: Tensor, decode) -> tuple[dict, dict]:
    """(what is recited of the last half block of rows (n, T), their membership scores). Rows are split over ranks."""
    if len(rows) < w.size:
        raise BadInput(f"{len(rows)} rows for {w.size} processes. Start fewer, or raise --canaries.")
    n, rows, found = cfg.block - cfg.block // 2, rows.to(w.device), {"rows": len(rows)}
    mine, P = rows[w.rank :: w.size], rows.shape[1] - n
    hit = torch.zeros(len(mine), dtype=torch.bool, device=w.device)
    mean = lambda value: (cluster.total(value.double().sum()) / len(rows)).item()
    for width in sorted(cfg.beams):  # a text counts as soon as any width finds it
        tries = [extract(model, part, P, n, width).reshape(len(part), -1, n) for part in mine.split(16)]
        tries = torch.cat(tries)  # (rows, beams + 1, n), greedy last
        hit |= (tries == mine[:, None, P:]).all(dim=2).any(dim=1)
        found[f"recited, {width} beams"] = mean(hit)
    found["RougeL"], found["first break"] = (mean(f(tries[:, -1], mine[:, P:])) for f in (rouge_l, first_divergence))
    mia = mia_scores(model, rows, [decode(r) for r in rows.tolist()])
    return found | {key: value.mean().item() for key, value in mia.items()}, mia


def audit(cfg: Config, w: cluster.World) -> None:
    """The same attack on any model: what it recites by beam search, and who looks like a member."""
    if cfg.model:
        model, decode = start_model(cfg), open_weights(cfg.model).tokenizer().decode
        groups = [(n, windows(cfg, n), n in cfg.data) for n in (*cfg.data, *(m for m in cfg.nonmembers if m != "none"))]
    else:
        if any(getattr(cfg, n) != getattr(Config, n) for n in ("data", "nonmembers", "block", "canaries")):
            raise BadInput("--data, --nonmembers, --block, --canaries go with --model; a run has canaries of its own")
        cfg, state = loop.opened(f"{cfg.out}/checkpoint.pt", cfg, "beams", "nonmembers")
        text, model = Text(cfg), start_model(cfg)
        if text.crc != state["facts"]["same"]["text"]:
            raise BadInput(f"the text of the run in {cfg.out} has changed since: its canaries are lost. Train again.")
        model.load_state_dict(state["model"])
        groups = [("canaries", text.canary[:, :-1], True), ("held out", text.nonmember[:, :-1], False)]
        decode = text.decode
    model, found, scores = model.to(w.device), {}, {True: [], False: []}
    for name, rows, member in report.progress(groups, "audit", w):
        found[name], mia = attack(cfg, w, model, rows, decode)
        scores[member].append(mia)
    w.print(report.table(["text", *found[name]], [[n[-40:], *f.values()] for n, f in found.items()]))
    for key in mia if all(scores.values()) else ():  # alone, scores mean little: give --nonmembers FILE
        a, b = (torch.cat([s[key] for s in scores[member]]) for member in (True, False))
        found[key] = {"auc": auc(a, b), "tpr at fpr 0.1": tpr_at_fpr(a, b, 0.1), "members": len(a), "others": len(b)}
        w.print(f"membership by {key}: {found[key]}")
    if w.main:
        report.write_json(f"{cfg.out}/audit.json", found)


def bench(cfg: Config, w: cluster.World) -> None:
    """The loss, forward and backward, against PyTorch's own: time, memory on a GPU, and the floor beside them."""
    cuda, k, g = w.device.type == "cuda", cfg.k, cluster.generator(cfg.seed)
    B, L, C, V, dtype = (16, 1024, 2048, 128256, torch.bfloat16) if cuda else (1, 1024, 256, 16384, torch.float32)
    hidden = torch.randn(B, L, C, generator=g).to(w.device, dtype).requires_grad_()
    head = (torch.randn(V, C, generator=g) / math.sqrt(C)).to(w.device, dtype).requires_grad_()
    y = torch.randint(1, V, (B, L), generator=g).to(w.device)
    keep = ~goldfish_mask(y, k)
    masked, logits = y.masked_fill(~keep, -100), F.linear(hidden, head).detach().requires_grad_()
    entropy = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")
    library = lambda: F.linear_cross_entropy(hidden.flatten(0, 1), head, masked.flatten(), reduction="sum",
                                             ignore_index=-100, options=nn.LinearCrossEntropyOptions())  # fmt: skip
    copied, flops = report.ceilings(w.device, dtype)  # per second
    product, size = 6 * B * L * C * V / flops, logits.numel() * logits.element_size() / copied
    cases = {  # name: the loss, its floor in seconds
        "hidden: F.cross_entropy, all targets": (lambda: entropy(F.linear(hidden, head), y), product),
        "hidden: F.cross_entropy, masked": (lambda: entropy(F.linear(hidden, head), masked), product),
        "hidden: F.linear_cross_entropy, masked": (library, product),
        f"hidden: head_loss, k={k}": (lambda: head_loss(hidden, head, y, keep), product * (1 - 1 / k)),
        "logits: F.cross_entropy, all targets": (lambda: entropy(logits, y), 3 * size),
        "logits: F.cross_entropy, masked": (lambda: entropy(logits, masked), 3 * size),
        f"logits: kept_loss, k={k}": (lambda: kept_loss(logits, y, keep), (3 - 2 / k) * size),
    }
    if not hasattr(F, "linear_cross_entropy"):  # before torch 2.13
        del cases["hidden: F.linear_cross_entropy, masked"]

    def step(name: str) -> None:
        hidden.grad = head.grad = logits.grad = None
        cases[name][0]().backward()

    calls = {name: functools.partial(step, name) for name in cases}
    seconds = report.timed(calls, w.device, repeats=20 if cuda else 5)
    rows = [[name, *(1e3 * t for t in (*seconds[name], cases[name][1])),
             report.peak_bytes(calls[name], w.device) / 2**20 if cuda else "-"] for name in cases]  # fmt: skip
    title, names = f"{report.device_name(w.device)}, {dtype}, B={B} L={L} C={C} V={V} k={k}", "case ms +- floor_ms MiB"
    w.print(title + "\n" + report.table(names.split(), rows))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"title": title, "head": names.split(), "rows": rows})


def main(cfg: Config) -> None:
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "audit": audit, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
