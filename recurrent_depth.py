"""Recurrent depth: a language model that runs its middle layers as often as asked, so depth is chosen at test time.

Paper    Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", arXiv:2502.05171, and McLeish et al.,
         "Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence", arXiv:2511.07384.
Idea     Prelude, core, coda: only the core is repeated, always with the same weights. It starts from a random state and
         reads the embedded tokens again in each iteration. Training draws the number of iterations, so the core learns
         to improve whatever state it gets, and depth becomes a dial. A pretrained model can be cut into these parts.
Here     Two claims on running parity. (1) One set of weights gets more right with more iterations, below and beyond the
         depth of training. (2) A model that learned one step, made recurrent and trained on chains, solves them, ahead
         of itself continued and of random weights.
Differs  - 0.2 M parameters, layers (1, 2, 0), parity in two classes; the papers have 1 to 3.5 B and text.
         - On parity, heads begin by looking at the token before, and the rate falls once the loss is below 0.54.
         - Muon on parity, as in the second paper, AdamW on text, without decay; --optimizer atan is the first's.
         - Claim 2's base is a model of the same shape that was trained at one iteration, not a plain transformer.

    python recurrent_depth.py                                            # laptop: both claims, tables, picture
    python recurrent_depth.py --quick                                    # three short runs, no verdict
    torchrun --nproc-per-node 2 recurrent_depth.py --device cpu          # what the first line starts
    python recurrent_depth.py train --preset bytes                       # a byte-level model of Python's sources
    python recurrent_depth.py eval --r 1 2 4 8 --prompt "def f("         # that model by depth, and what it writes
    python recurrent_depth.py train --preset heal --log-every 1          # smollm2 made recurrent, then trained on text
    python recurrent_depth.py bench                                      # the cache; on a GPU at the paper's sizes
    torchrun --nproc-per-node 8 recurrent_depth.py train --preset huginn-3.5b --data corpus.npy  # never run

Expect   "parity 0.615 at 1 iteration, 1.000 at 12, made recurrent 0.996 ... DOES NOT HOLD" on CPU, seed 0; see the page
Writes   results/recurrent_depth/: metrics.jsonl, claim.json, recurrent_depth.png; checkpoint.pt, model/, bench.json
"""

import copy
import functools
import importlib.util
import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import cli, cluster, loop, report
from common.cli import BadInput, opt
from common.text import Tokenizer, checksum, corpus
from common.weights import open_weights, package, read_json, rope_frequencies, safetensors

# %% the method
# e    the embedded tokens after the prelude       P, R, C  prelude, core, coda (in shapes, C is the width)
# s_i  the state after i iterations, s_0 is noise  n, k     iterations without and with gradient, r = n + k
#
#     e = P(x),    s_i = R(e, s_{i-1}) for i = 1..r,    p = C(s_r)    x ids, p logits    arXiv:2502.05171, Section 3


def think(prelude, core, coda, ids: Tensor, s: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) of ids (B, T) after n + k iterations from the state s (B, T, C), and the last state.
    Gradients flow through the last k iterations only, and through e, which each of them reads."""
    e = prelude(ids)  # (B, T, C)
    with torch.no_grad():
        for _ in range(n):
            s = core(e, s)
    for _ in range(k):
        s = core(e, s)
    return coda(s), s


def initial_state(B: int, T: int, shape: "Shape", generator=None) -> Tensor:
    """s_0 (B, T, C): noise, so that the core cannot rely on where it starts. A retrofitted model's noise is smaller."""
    std = math.sqrt(0.4 / (1 if shape.qk_bias else shape.n_embd))  # qk_bias: trained from scratch, as Huginn was
    return nn.init.trunc_normal_(torch.empty(B, T, shape.n_embd), std=std, a=-3 * std, b=3 * std, generator=generator)


def sample_depth(step: int, mean: float, k: int, sigma: float = 0.5) -> tuple[int, int]:
    """(n, k) of a step: r is 1 plus a Poisson draw whose rate is log-normal with this mean, and k is at most r.
    The step alone is the seed, so ranks and rows share one depth. Seed and order of draws are the release's."""
    g = torch.Generator().manual_seed((514229 + step) % (2**31 - 1))
    rate = torch.zeros(1).log_normal_(math.log(mean) - sigma**2 / 2, sigma, generator=g)  # its mean is `mean`
    r = int(torch.poisson(rate, generator=g)) + 1
    return max(r - k, 0), min(k, r)


def ramped_mean(step: int, total: int, mean: int, ramp: str) -> int:
    """The mean depth at `step`: linear from 1 over the first quarter, or 1 - sqrt(1 - t) over three quarters.
    A model that was not recurrent starts shallow, which costs less (arXiv:2511.07384)."""
    if ramp == "none":
        return mean
    t = min(1.0, step / (total * {"linear": 0.25, "1-sqrt": 0.75}[ramp]))
    return max(1, math.ceil(mean * (t if ramp == "linear" else 1 - math.sqrt(1 - t))))


# %% the model


@dataclass
class Shape:
    """Sizes of a model, under the keys of the released config.json. It raises BadInput if they do not fit."""

    n_embd: int
    num_attention_heads: int
    intermediate_size: int
    n_layers_in_prelude: int
    n_layers_in_recurrent_block: int
    n_layers_in_coda: int
    mean_recurrence: int
    mean_backprop_depth: int
    vocab_size: int
    block_size: int
    norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: n_embd / heads
    qk_bias: bool = True  # Huginn's sandwich blocks; False: the blocks of a Llama
    n_out: int = 0  # outputs of an untied head; 0: vocab_size
    rope_scaling: dict = field(default_factory=dict)

    def __post_init__(self):
        C, H = self.n_embd, self.num_attention_heads
        self.num_key_value_heads, self.head_dim = self.num_key_value_heads or H, self.head_dim or C // max(1, H)
        D, Hk, l_R = self.head_dim, self.num_key_value_heads, self.n_layers_in_recurrent_block
        if min(H, l_R, self.mean_recurrence) < 1 or D % 2 or H % Hk or (self.qk_bias and (D * H != C or Hk != H)):
            raise BadInput(f"no such model: width {C}, {H} heads of {D}, {Hk} key heads, {l_R} core layers")

    @classmethod
    def from_json(cls, path: Path) -> "Shape":
        """From a config.json of either paper's release. BadInput: damaged, or of another architecture."""
        given = {"injection_type": "linear", "block_class_name": "SandwichBlock", **read_json(path)}
        kind, names = (given["injection_type"], given["block_class_name"]), [f.name for f in fields(cls)]
        given = {"num_attention_heads": given.get("n_heads"), "rope_theta": given.get("rope_base"),
                 "qk_bias": kind[1] == "SandwichBlock", **given}  # fmt: skip
        lost = [name for name in names[:13] if given.get(name) is None]
        if lost or kind[0] != "linear" or kind[1] not in ("SandwichBlock", "LlamaBlock"):
            raise BadInput(f"{path}: {kind}, without {lost}, is none of these papers' models.")
        return cls(**{name: given[name] for name in names if name in given})


SHAPES = {  # width, heads, MLP; layers of prelude, core, coda; mean depth, k; vocabulary, longest row, eps, rotary base
    "laptop": Shape(64, 2, 192, 1, 2, 0, 6, 6, 3, 1024, 1e-6, 30.0, tie_embeddings=False, n_out=2),
    "bytes": Shape(96, 3, 256, 1, 2, 1, 4, 3, 256, 1024, 1e-6, 1000.0, tie_embeddings=True),
    "huginn-3.5b": Shape(5280, 55, 17920, 2, 4, 2, 32, 8, 65536, 4096, 1e-6, 50000.0, tie_embeddings=True),
}


def rotate(x: Tensor, at, pairs: bool) -> Tensor:
    """Rotary embedding of x (B, T, H, D): of pairs (x0, x1), (x2, x3)..., or of Llama's, (x_j, x_{j + D/2})."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if pairs else x.chunk(2, dim=-1)  # (B, T, H, D/2)
    turned = a * at.cos - b * at.sin, b * at.cos + a * at.sin
    return torch.stack(turned, dim=-1).flatten(-2) if pairs else torch.cat(turned, dim=-1)  # (B, T, H, D)


class Attention(nn.Module):
    """Causal attention with one fused projection: its rows are all queries, then all keys, then all values."""

    def __init__(self, c: Shape):
        super().__init__()
        self.H, self.Hk, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.Wqkv = nn.Linear(c.n_embd, (self.H + 2 * self.Hk) * D, bias=False)
        self.proj = nn.Linear(self.H * D, c.n_embd, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.H, D)) if c.qk_bias else None

    def forward(self, x: Tensor, at, slot: int) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache, keys and values go to its `slot` and earlier ones come from there."""
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


class Block(nn.Module):
    """Huginn's sandwich: norms 2 and 4 act on the residual sum. A retrofitted model keeps Llama's two norms."""

    def __init__(self, c: Shape):
        super().__init__()
        (C, ff), self.sandwich, self.attn = (c.n_embd, c.intermediate_size), c.qk_bias, Attention(c)
        self.mlp = nn.ModuleDict({"fc": nn.Linear(C, 2 * ff, bias=False), "proj": nn.Linear(ff, C, bias=False)})
        for i in range(4 if c.qk_bias else 2):
            self.add_module(f"norm_{i + 1}", nn.RMSNorm(C, c.norm_eps))

    def swiglu(self, x: Tensor) -> Tensor:
        gate, up = self.mlp["fc"](x).chunk(2, dim=-1)
        return self.mlp["proj"](F.silu(gate) * up)

    def forward(self, x: Tensor, at, slot: int = 0) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if not self.sandwich:
            x = x + self.attn(self.norm_1(x), at, slot)
            return x + self.swiglu(self.norm_2(x))
        x = self.norm_2(x + self.attn(self.norm_1(x), at, slot))
        return self.norm_4(x + self.swiglu(self.norm_3(x)))


class RecurrentDepthLM(nn.Module):
    """A language model whose depth is chosen at each call. Names of parameters are the release's."""

    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__()
        self.shape, self.checkpointing, C = shape, False, shape.n_embd
        l_P, l_R, l_C = shape.n_layers_in_prelude, shape.n_layers_in_recurrent_block, shape.n_layers_in_coda
        blocks = lambda n: nn.ModuleList(Block(shape) for _ in range(n))
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(shape.vocab_size, C), "prelude": blocks(l_P), "core_block": blocks(l_R),
            "coda": blocks(l_C), "adapter": nn.Linear(2 * C, C, bias=False), "ln_f": nn.RMSNorm(C, shape.norm_eps),
        })  # fmt: skip
        if not shape.tie_embeddings:
            self.lm_head = nn.Linear(C, shape.n_out or shape.vocab_size, bias=False)
        self.freq = rope_frequencies(asdict(shape))  # (D/2,), no buffer, which .to(torch.bfloat16) would round
        # truncated normal, what adds to the residual smaller by sqrt(2L), L the layers at the mean depth
        g, std, L = cluster.generator(seed, 0), math.sqrt(2 / (5 * C)), l_P + l_R * shape.mean_recurrence + l_C
        for name, p in self.named_parameters():
            if p.ndim == 2 and not p.is_meta:
                s = std / math.sqrt(2 * L) if name.endswith("proj.weight") else std
                nn.init.trunc_normal_(p, std=s, a=-3 * s, b=3 * s, generator=g)

    def embed(self, ids: Tensor, at) -> Tensor:
        """e = P(ids): (B, T) -> (B, T, C)."""
        e = self.transformer.wte(ids)
        e = e * math.sqrt(self.shape.n_embd) if self.shape.qk_bias else e
        for j, block in enumerate(self.transformer.prelude):
            e = block(e, at, j)
        return e

    def iterate(self, e: Tensor, s: Tensor, at, i: int = 0) -> Tensor:
        """s_{i+1} = R(e, s_i), (B, T, C). The iteration's number only chooses the cache entry: weights are shared."""
        slot = at.cache.first + i % at.cache.budget * at.cache.l_R if at.cache else 0
        of_s, of_e = self.transformer.adapter.weight.chunk(2, dim=1)  # adapter([s, e]) without the copy of [s, e]
        x = (F.linear(s, of_s) + F.linear(e, of_e)).to(e.dtype)  # (B, T, C), float32 under autocast as in the release
        for j, block in enumerate(self.transformer.core_block):
            x = block(x, at, slot + j)
        return x

    def between(self, s: Tensor) -> Tensor:
        """What the coda receives, and a warm start carries on: ln_f(s), or s itself in a retrofitted model."""
        return self.transformer.ln_f(s) if self.shape.qk_bias else s

    def decode(self, s: Tensor, at) -> Tensor:
        """p = C(s): coda, final norm again, head; (B, T, C) -> logits (B, T, V), at least float32."""
        x = self.between(s)
        for j, block in enumerate(self.transformer.coda):
            x = block(x, at, self.shape.n_layers_in_prelude + j)
        head = self.transformer.wte if self.shape.tie_embeddings else self.lm_head
        logits = F.linear(self.transformer.ln_f(x), head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, ids: Tensor, n: int, k: int, s0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """think() with this model's parts: ids (B, T) -> logits (B, T, V), s_r (B, T, C)."""
        at, s0 = self.place(ids.shape[1]), initial_state(*ids.shape, self.shape) if s0 is None else s0
        core = functools.partial(checkpoint, self.iterate, use_reentrant=False) if self.checkpointing else self.iterate
        prelude, coda = functools.partial(self.embed, at=at), functools.partial(self.decode, at=at)
        return think(prelude, functools.partial(core, at=at), coda, ids, s0.to(self.transformer.wte.weight), n, k)

    def place(self, T: int, cache: "Cache | None" = None) -> SimpleNamespace:
        """Where T tokens stand that follow those of the cache: rotary tables (T, 1, D/2), mask (T, S) if needed."""
        past, device = cache.length if cache else 0, self.transformer.wte.weight.device
        dtype = torch.promote_types(self.transformer.wte.weight.dtype, torch.float32)
        angle = torch.outer(torch.arange(past, past + T).float(), self.freq)[:, None].to(device)  # (T, 1, D/2)
        mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past) if past and T > 1 else None
        return SimpleNamespace(cos=angle.cos().to(dtype), sin=angle.sin().to(dtype), mask=mask, cache=cache)


# %% at inference: one cache for all iterations, exits, warm starts, drafts


class Cache:
    """Keys and values of every (layer, iteration) of one row, made once: prelude, coda, then the core's iterations.
    With a budget b, iteration i uses entry i mod b, so later tokens see the last b iterations of earlier ones. Where a
    token stopped before it filled all b entries, its deepest entry is copied into the rest."""

    def __init__(self, model: RecurrentDepthLM, room: int, steps: int, budget: int = 0):
        c = model.shape
        if room > c.block_size or budget < 0:
            raise BadInput(f"a cache for {room} tokens: the model reads at most {c.block_size}; a budget is at least 0")
        self.length, self.budget, self.l_R = 0, min(budget or steps, steps), c.n_layers_in_recurrent_block
        self.first = c.n_layers_in_prelude + c.n_layers_in_coda
        slots, weight = self.first + self.budget * self.l_R, model.transformer.wte.weight
        self.kv = weight.new_empty(2, slots, 1, c.num_key_value_heads, room, c.head_dim)  # (2, slots, 1, Hk, S, D)

    def write(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new tokens' k, v (1, Hk, T, D) into a slot -> all tokens' keys and values there, (1, Hk, S, D)."""
        end = self.length + k.shape[2]
        self.kv[0, slot, :, :, self.length : end], self.kv[1, slot, :, :, self.length : end] = k, v
        return self.kv[0, slot, :, :, :end], self.kv[1, slot, :, :, :end]


@torch.no_grad()
def feed(model, cache: Cache, ids: Tensor, steps: int, s=None, exit_kl=0.0, max_entropy=math.inf) -> tuple:
    """Run ids (1, T) behind the cached tokens -> logits (1, T, V), state (1, T, C), iterations, at most `steps`.
    exit_kl: stop once KL(p_{i-1} || p_i) is below it at all T positions, in nats, and the last prediction's entropy is
    below max_entropy: a position that no information has reached sits still as well. s: s_0, by default 0."""
    if steps < 1:
        raise BadInput(f"{steps} iterations: at least 1 is needed")
    at = model.place(ids.shape[1], cache)
    e = model.embed(ids, at)
    s, before = torch.zeros_like(e) if s is None else s.to(e), None
    for i in range(steps):
        s = model.iterate(e, s, at, i)
        if exit_kl:
            log_p = model.decode(s, at).log_softmax(-1)  # (1, T, V)
            before = torch.zeros_like(log_p).log_softmax(-1) if before is None else before  # p_0 is uniform
            kl = (before.exp() * (before - log_p)).sum(-1)  # (1, T)
            entropy = -(log_p[:, -1].exp() * log_p[:, -1]).sum()
            before = log_p
            if kl.max() < exit_kl and entropy < max_entropy:
                break
    logits, end = model.decode(s, at), cache.length + ids.shape[1]
    new = cache.kv[:, cache.first :, ..., cache.length : end, :].unflatten(1, (-1, cache.l_R))
    new[:, i + 1 :] = new[:, i : i + 1]  # the deepest entry, into those that these tokens have not filled
    cache.length = end
    return logits, s, i + 1


def generate(model, ids: Tensor, new: int, steps, exit_kl=0.0, stop=(), budget=0, max_entropy=math.inf, warm=False):
    """Yield (token, its iterations) of the greedy continuation of one row, ids (1, T), until `new` tokens or a `stop`.
    The prompt runs all `steps`. warm: a token starts from the last state of the one before, not from zero."""
    if ids.shape[0] != 1:
        raise BadInput(f"generate continues one row, got {ids.shape[0]}: padding would be read as text")
    cache, s, rule = Cache(model, ids.shape[1] + new, steps, budget), None, {}
    for _ in range(new):
        logits, s, ran = feed(model, cache, ids, steps, model.between(s[:, -1:]) if warm and rule else None, **rule)
        rule = {"exit_kl": exit_kl, "max_entropy": max_entropy}  # from the first new token on
        ids = logits[:, -1:].argmax(-1)  # ties go to the lowest id
        yield int(ids), ran
        if int(ids) in stop:
            return


def speculate(model: RecurrentDepthLM, ids: Tensor, new: int, steps: int, draft: int, ahead: int = 4) -> Tensor:
    """The tokens of generate() behind ids (1, T): drafted with few iterations, checked in one pass with all of them."""
    T, cache = ids.shape[1], Cache(model, ids.shape[1] + new + ahead, steps)
    next_token = lambda ids, r: feed(model, cache, ids, r)[0][:, -1:].argmax(-1)  # (1, 1)
    ids = torch.cat([ids, next_token(ids, steps)], dim=1)
    while ids.shape[1] < T + new:
        n, drafts = cache.length, ids[:, -1:]
        for _ in range(ahead):
            drafts = torch.cat([drafts, next_token(drafts[:, -1:], draft)], dim=1)
        cache.length = n  # the drafts' shallow keys go
        said = feed(model, cache, drafts, steps)[0].argmax(-1)  # (1, 1 + ahead): what should follow each
        good = int((said[:, :-1] == drafts[:, 1:]).int().cumprod(dim=1).sum())
        cache.length = n + 1 + good
        ids = torch.cat([ids, said[:, : good + 1]], dim=1)
    return ids[:, : T + new]


# %% real weights: released folders, and a Llama made recurrent


def assemble(shape: Shape, tensors: dict[str, Tensor], source: str) -> RecurrentDepthLM:
    """A model that holds these very tensors. BadInput: names all that are missing, extra or misshapen."""
    with torch.device("meta"):
        model = RecurrentDepthLM(shape)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as e:  # it lists what is missing, extra or misshapen
        raise BadInput(f"{source} does not fit its config: {' '.join(str(e).split())}") from e
    model.freq = rope_frequencies(asdict(shape))
    return model.requires_grad_()


def load_weights(path: str | Path) -> RecurrentDepthLM:
    """A model from a folder of either paper's release, or of save_weights. FileNotFoundError, BadInput: damaged."""
    shape, (names, read) = Shape.from_json(Path(path, "config.json")), safetensors(Path(path))
    skip = {"freqs_cis"} | ({"lm_head.weight"} if shape.tie_embeddings else set())
    return assemble(shape, {name: read(name) for name in names if name not in skip}, str(path)).eval()


def save_weights(model: RecurrentDepthLM, path: str | Path) -> None:
    """Write config.json and model.safetensors under the released names; an index of another model's files goes."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().contiguous().cpu() for n, p in model.state_dict().items()}
    package("safetensors.torch").save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.tmp", folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    report.write_json(folder / "config.json", {"model_type": "huginn_raven", **asdict(model.shape)})


LLAMA = {  # our names -> Hugging Face's
    "norm_1": ["input_layernorm"], "norm_2": ["post_attention_layernorm"], "attn.proj": ["self_attn.o_proj"],
    "attn.Wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.proj": ["mlp.down_proj"],
}  # fmt: skip


def retrofit(state_dict: dict[str, Tensor], config: dict, split=(4, 8, 4), seed: int = 0) -> RecurrentDepthLM:
    """Make a pretrained Llama recurrent, from Hugging Face's names and config (arXiv:2511.07384). split (p, R, c): the
    first p layers become the prelude, the last c the coda, the R before those the core; others are dropped, and only
    the adapter is new. BadInput: the split or the tensors do not fit."""
    needs = "num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size max_position_embeddings"
    if lost := [name for name in (*needs.split(), "rms_norm_eps") if not isinstance(config.get(name), (int, float))]:
        raise BadInput(f"the config of a Llama has numbers for {', '.join(lost)}; this one has not")
    (p, R, c), n = split, config["num_hidden_layers"]
    if min(split) < 1 or sum(split) > n:
        raise BadInput(f"--split {p} {R} {c} needs {sum(split)} layers, each part at least 1; the model has {n}")
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})  # transformers 5 has the latter
    if (base := rope.pop("rope_theta", config.get("rope_theta"))) is None:
        raise BadInput("the config has no rope_theta, neither on top nor in rope_parameters")
    shape = Shape(config["hidden_size"], config["num_attention_heads"], config["intermediate_size"], p, R, c, 4, 8,
                  config["vocab_size"], config["max_position_embeddings"], config["rms_norm_eps"], base, False,
                  config.get("num_key_value_heads"), config.get("head_dim"), False, rope_scaling=rope)  # fmt: skip
    kept = [*range(p), *range(n - c - R, n)]
    places = [f"{part}.{j}" for part, count in (("prelude", p), ("core_block", R), ("coda", c)) for j in range(count)]
    sources = {"wte": ["model.embed_tokens"], "ln_f": ["model.norm"]} | {
        f"{place}.{ours}": [f"model.layers.{i}.{old}" for old in parts]
        for place, i in zip(places, kept, strict=True) for ours, parts in LLAMA.items()
    }  # fmt: skip
    used = {f"{name}.weight" for parts in sources.values() for name in parts}
    mine = tuple(f"model.layers.{i}." for i in kept)
    strange = {x for x in state_dict if x.startswith(mine) and not x.endswith("inv_freq")} - used
    if wrong := sorted((used - set(state_dict)) | strange):
        raise BadInput(f"no plain Llama: {', '.join(wrong)} missing or without a place here")
    new = {f"transformer.{ours}.weight": torch.cat([state_dict[f"{name}.weight"] for name in parts])  # along rows
           for ours, parts in sources.items()}  # fmt: skip
    new["transformer.adapter.weight"] = new["transformer.wte.weight"].new_empty(shape.n_embd, 2 * shape.n_embd)
    new["lm_head.weight"] = state_dict.get("lm_head.weight", new["transformer.wte.weight"]).clone()  # untied from here
    return new_adapter(assemble(shape, new, "the state dict"), seed)


def new_adapter(model: RecurrentDepthLM, seed: int) -> RecurrentDepthLM:
    """Draw the adapter anew, uniform within 1 / sqrt(2C): a model without recurrence had no use for it."""
    weight, bound = model.transformer.adapter.weight, 1 / math.sqrt(2 * model.shape.n_embd)
    weight.data.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=cluster.generator(seed, 1)))
    return model


class AtanAdam(torch.optim.Optimizer):
    """The first paper's Adam: moments that start at the first gradient, update clipping, atan2 in place of epsilon.
    Per tensor, rho = sqrt(mean(g^2 / max(v, 1e-12))) and, with lr_0 the rate given here,
        p <- p (1 - lr / lr_0 wd) - lr / max(1, rho) / (1 - b1^t) atan2(m, sqrt(v / (1 - b2^t)))"""

    def __init__(self, params, lr: float = 4e-5, betas=(0.9, 0.95), weight_decay: float = 4e-5):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "base_lr": lr})

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient."""
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
                p.mul_(1 - lr / group["base_lr"] * group["weight_decay"])
                update = torch.atan2(m, (v / (1 - b2**t)).sqrt()) * (lr / rho.clamp(min=1) / (1 - b1**t))
                p.sub_(update.to(p.dtype))


# %% settings

LEARNS, LOOKS, OPTIMIZERS = ("demo", "train"), ("train", "eval"), ("muon", "adamw", "atan")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", ("demo", "train", "eval", "bench"), positional=True)
    preset: str = opt("laptop", "what to train", ("laptop", "bytes", "heal", "huginn-3.5b"), modes=("train",))
    quick: bool = opt(False, "three short runs, no verdict", modes=("demo",))
    model: str = opt("", "folder of a recurrent model, or of a Llama that is made recurrent, or smollm2", modes=LOOKS)
    split: tuple = opt((6, 12, 6), "how many of a Llama's layers become prelude, core and coda", modes=LOOKS)
    tokenizer: str = opt("", "a tokenizer.json for the text; empty: the model's own, or bytes", modes=("train",))
    data: tuple = opt(("docs",), "text files, one .npy of ids, docs or sources: Python's own", modes=("train", "eval"))
    block: int = opt(32, "bits or tokens per row that are predicted", modes=LOOKS)
    r_bar: int = opt(6, "mean recurrence in training; the draws have this mean plus 1", modes=LEARNS)
    ramp: str = opt("none", "how the mean rises from 1", ("none", "linear", "1-sqrt"), modes=("train",))
    steps: int = opt(200, "optimizer steps", modes=LEARNS)
    batch: int = opt(32, "rows per step, over all processes and micro-steps", modes=LEARNS)
    accum: int = opt(1, "micro-steps per step, each with its own depth", modes=("train",))
    optimizer: str = opt("muon", "atan is the first paper's, muon the second's", OPTIMIZERS, modes=("train",))
    lr: float = opt(0.02, "peak learning rate; beside Muon, AdamW has 1.5e-3", modes=LEARNS)
    r: tuple = opt((1, 2, 4, 8, 16, 32), "depths to measure", modes=LOOKS)
    prompt: str = opt("", "text to continue", modes=("eval",))
    seed: int = opt(0, "seed of the data, the weights and the initial states", modes=(*LEARNS, "eval", "bench"))
    device: str = opt("auto", "where to run", ("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "type of the matrix products", ("float32", "bfloat16"), modes=("train", "eval"))
    out: str = opt("results/recurrent_depth", "folder that the run writes to, goes on from or looks at")
    resume: bool = opt(False, "go on from the checkpoint in --out, if there is one", modes=("train",))
    save_every: int = opt(100, "steps between checkpoints; 0 writes only the last", modes=("train",))
    log_every: int = opt(20, "steps between lines in metrics.jsonl", modes=("train",))

    def __post_init__(self):
        sizes = self.block, self.r_bar, self.steps, self.batch, self.accum, self.log_every
        if min(*sizes, *(n + 1 for n in (*self.r, self.save_every))) < 1:
            raise BadInput("sizes, --steps and --log-every are at least 1, --r and --save-every at least 0")
        if not 0 < self.lr < math.inf:
            raise BadInput(f"--lr {self.lr}: give a number above 0")
        if len(self.split) != 3:
            raise BadInput(f"--split takes three numbers, got {self.split}")
        if self.tokenizer and not Path(self.tokenizer).is_file():
            raise BadInput(f"--tokenizer {self.tokenizer}: no such file")
        own = self.data != ("docs",) or self.model or self.tokenizer
        if self.mode == "train" and self.preset == "laptop" and own:
            raise BadInput("your text or weights need --preset bytes, heal (real weights) or huginn-3.5b")


TEXT = {"block": 128, "r_bar": 4, "optimizer": "adamw"}
PRESETS = {  # laptop has the defaults
    "bytes": {**TEXT, "data": ("sources",), "steps": 240, "batch": 16, "lr": 2e-3},
    "heal": {**TEXT, "model": "smollm2", "ramp": "linear", "steps": 20, "batch": 4, "lr": 3e-4},
    "huginn-3.5b": {"block": 4096, "r_bar": 32, "steps": 47000, "batch": 4096, "accum": 512, "optimizer": "atan",
                    "lr": 4e-5, "dtype": "bfloat16", "r": (1, 4, 8, 16, 32, 64)},
}  # fmt: skip


class Parity:
    """After a start token 2 come random bits; a label is the parity of all bits up to it, or, with one_step, the xor of
    its bit and the one before: the step of which the chain is made."""

    def __init__(self, seed: int, one_step: bool = False):
        self.seed, self.one_step, self.crc = seed, one_step, 0

    def draw(self, rows: int, length: int, *key: int) -> tuple[Tensor, Tensor]:
        """ids and labels (rows, 1 + length), a function of the seed and the key; -100 has no loss."""
        bits = torch.randint(2, (rows, length), generator=cluster.generator(self.seed, *key))
        start = torch.full((rows, 1), 2)
        chain = (bits + F.pad(bits, (1, -1))) % 2 if self.one_step else bits.cumsum(dim=1) % 2
        return torch.cat([start, bits], dim=1), torch.cat([start - 102, chain], dim=1)


class Text:
    """Text as rows of ids, of bytes unless there is a tokenizer; the last 5 % are held out, key (9, ...)."""

    def __init__(self, cfg: Config, vocab: int, tokenizer=None):
        text, self.seed, self.vocab = corpus(cfg.data), cfg.seed, vocab
        if isinstance(text, str):
            text = Tokenizer().encode(text).numpy() if tokenizer is None else np.array(tokenizer.encode(text).ids)
        self.train, self.held = np.split(text, [int(0.95 * len(text))])
        self.crc = checksum(text)
        if len(self.held) <= cfg.block or text[: 2**24].max() >= vocab:
            raise BadInput(f"--data has {len(text)} tokens; it needs {21 * cfg.block}, with ids below {vocab}")

    def draw(self, rows: int, length: int, *key: int) -> tuple[Tensor, Tensor]:
        """ids and labels (rows, length) at random places, a function of the seed and the key."""
        ids = self.held if key[0] == 9 else self.train
        first = torch.randint(len(ids) - length, (rows, 1), generator=cluster.generator(self.seed, *key))
        cut = torch.from_numpy(ids[(first + torch.arange(length + 1)).numpy()].astype(np.int64))  # (rows, length + 1)
        if not 0 <= cut.min() <= cut.max() < self.vocab:
            raise BadInput(f"--data holds ids from {cut.min()} to {cut.max()}; the model knows 0 to {self.vocab - 1}")
        return cut[:, :-1], cut[:, 1:]


def start(cfg: Config) -> tuple[RecurrentDepthLM, object, object]:
    """(model, data, tokenizer or None) that a run starts from: a folder, a Llama made recurrent, or random weights."""
    read = lambda file: package("tokenizers").Tokenizer.from_file(str(file)) if Path(file).is_file() else None
    config, tokenizer = Path(cfg.model, "config.json"), read(cfg.tokenizer)
    if cfg.model and config.exists() and "huginn_raven" in config.read_text():
        model, tokenizer = load_weights(cfg.model), tokenizer or read(config.with_name("tokenizer.json"))
    elif cfg.model:
        weights = open_weights(cfg.model)
        model = retrofit(weights.state_dict(), weights.config, cfg.split, cfg.seed)
        tokenizer = tokenizer or weights.tokenizer()
    else:
        model = RecurrentDepthLM(SHAPES[cfg.preset], cfg.seed)
        if cfg.preset == "laptop":
            look_back(model)
    if cfg.block + (model.shape.n_out > 0) > model.shape.block_size:  # a row of parity has a start token
        raise BadInput(f"--block {cfg.block}: the model reads at most {model.shape.block_size} tokens")
    data = Parity(cfg.seed) if model.shape.n_out else Text(cfg, model.shape.vocab_size, tokenizer)
    return model, data, tokenizer


@torch.no_grad()
def look_back(model: RecurrentDepthLM) -> None:
    """Start each head with a preference for the token before, sum_j cos((t - 1 - s) theta_j) / sqrt(D). The paper
    starts at 0. Then some seeds learn the parity of short rows by counting and ignore the loop."""
    for name, p in model.named_parameters():
        if name.endswith("qk_bias"):  # (2, 1, H, D): queries and keys; pairs (x0, x1), (x2, x3)...
            p[1, ..., 0::2] = 1.0
            p[0, ..., 0::2], p[0, ..., 1::2] = model.freq.cos(), -model.freq.sin()


# %% training


def depth_of(cfg: Config, kind: str, k: int, total: int, micro: int) -> tuple[int, int]:
    """(n, k) of a micro-step: drawn around a mean that a ramp may raise (none, linear, 1-sqrt), fixed, or once."""
    if kind in ("once", "fixed"):
        return (0, 1) if kind == "once" else (max(0, cfg.r_bar + 1 - k), min(k, cfg.r_bar + 1))
    mean = ramped_mean(micro, total, cfg.r_bar, kind)
    return sample_depth(micro + 1, mean, k if kind == "none" else min(k, mean))


def alarms(before: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(residual, correlation) of states (B, T, C): |s - before| / |s|, 0 where the core ignores its state, and the mean
    cosine between the states of two positions of a row, 1 where all states are alike."""
    T, u = s.shape[1], F.normalize(s.double(), dim=-1).sum(dim=1)  # (B, C)
    return ((s - before).norm(dim=-1) / s.norm(dim=-1)).mean(), ((u.square().sum(-1) - T) / max(1, T * (T - 1))).mean()


def optimizers_of(model: RecurrentDepthLM, cfg: Config) -> dict[str, torch.optim.Optimizer]:
    """AdamW or AtanAdam at --lr; or Muon at --lr for the layers' matrices, whose updates it makes nearly orthogonal,
    and AdamW for the rest, as in arXiv:2511.07384."""
    muon, paper, vectors, others, layers = cfg.optimizer == "muon", cfg.optimizer == "atan", [], [], []
    for name, p in model.named_parameters():
        inner = muon and p.ndim == 2 and not name.endswith(("wte.weight", "head.weight"))
        (layers if inner else others if p.ndim == 2 else vectors).append(p)  # qk_bias is 4-D: no decay, like norms
    groups, lr = [{"params": vectors, "weight_decay": 0.0}, {"params": others}], 1.5e-3 if muon else cfg.lr
    rest = (AtanAdam if paper else torch.optim.AdamW)(groups, lr, (0.9, 0.95), weight_decay=4e-5 if paper else 0.0)
    return {"optimizer": rest} | ({"muon": torch.optim.Muon(layers, cfg.lr, weight_decay=0.0)} if muon else {})


def train_model(cfg: Config, w: cluster.World, run, model, data, what="train", path="", kind="", alone=False):
    """One run. Rows, initial states and depths depend on (seed, micro-step, row), never on the number of ranks.
    kind: see depth_of, by default cfg.ramp. alone: this rank trains a model of its own."""
    (rank, size), rows = (0, 1) if alone else (w.rank, w.size), cfg.batch // cfg.accum
    if cfg.batch % cfg.accum or rows % size:
        raise BadInput(f"--batch {cfg.batch} must be a multiple of {size} processes times --accum {cfg.accum}")
    model, paper = model.to(w.device).train(), cfg.optimizer == "atan"
    model.checkpointing = paper
    ddp = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    depth = functools.partial(depth_of, cfg, kind or cfg.ramp, model.shape.mean_backprop_depth, cfg.steps * cfg.accum)
    warm = {"laptop": 10, "bytes": 50, "heal": 2}.get(cfg.preset, 4096)  # steps until the peak rate
    late = torch.tensor([1.0, 0.0])  # on parity: the loss of late, and the step at which it fell below 0.54
    optimizers = optimizers_of(model, cfg)
    parts, T = {"model": model, "late": late, **optimizers}, cfg.block + isinstance(data, Parity)
    for step in loop.steps(cfg, w, run, parts, cfg.steps, what, path, {"text": data.crc}):
        loss, done, end = 0.0, step + 1, (step + 1) * cfg.accum
        for micro in range(step * cfg.accum, end):
            ddp.require_backward_grad_sync = micro + 1 == end  # read by DDP alone
            ids, labels = (x[rank::size].to(w.device) for x in data.draw(rows, cfg.block, 3, micro))
            draws = (cluster.generator(cfg.seed, 4, micro, row) for row in range(rank, rows, size))
            s0 = torch.cat([initial_state(1, T, model.shape, g) for g in draws]).to(w.device)  # (rows / ranks, T, C)
            with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                logits, s = ddp(ids, *depth(micro), s0)
                part = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100) / cfg.accum
            part.backward()
            loss = loss + part.detach() / size
        if isinstance(data, Parity):
            late[0].lerp_((loss if size == 1 else cluster.total(loss)).to(late), 0.1)
            late[1] = step if late[0] < 0.54 and not late[1] else late[1]
        first = int(late[1]) or cfg.steps // 2  # from here the rate falls to 2 %
        fall = 1 - 0.98 * max(0, step - first) / max(1, cfg.steps - first)
        fall *= min(0.5, 0.005 / cfg.lr) if late[1] else 1
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0 if paper else 0.5)
        if 0 in (done % cfg.log_every, done % (cfg.save_every or cfg.steps), cfg.steps - done):
            if not norm.isfinite():  # this waits for the device, so not in every step
                raise BadInput(f"no finite gradient at step {done}: start anew with a lower --lr and another --out")
            with torch.no_grad(), torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                at = model.place(T)
                found = loss, *(x / size for x in alarms(s, model.iterate(model.embed(ids, at), s, at)))
            found = [x.item() if alone else x for x in found]  # tensors are summed over the ranks
            run.line = dict(zip(("loss", "residual", "correlation", "n", "k"), (*found, *depth(micro)), strict=True))
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * min(1.0, (step + 1) / warm) * (1 if paper else fall)
            optimizer.step()
        model.zero_grad(set_to_none=True)
    return model.eval()


# %% demo: what depth does


@torch.no_grad()
def by_depth(model: RecurrentDepthLM, ids: Tensor, labels: Tensor, depths, seed: int = 0) -> dict[str, dict]:
    """Accuracy, loss and the alarms after r iterations from noise: name -> {r: number}, for r in depths."""
    at, rows = model.place(ids.shape[1]), {}
    e = model.embed(ids, at)
    s = before = initial_state(*ids.shape, model.shape, cluster.generator(seed, 5)).to(e)
    for r in range(max(depths) + 1):
        before, s = s, model.iterate(e, s, at) if r else s
        if r in depths:
            logits = model.decode(s, at).transpose(1, 2)  # (B, V, T)
            right = (logits.argmax(dim=1) == labels)[labels >= 0].float().mean()
            rows[r] = [right, F.cross_entropy(logits, labels, ignore_index=-100), *alarms(before, s)]
    names = "accuracy", "loss", "residual", "correlation"
    return {name: {r: row[i].item() for r, row in rows.items()} for i, name in enumerate(names)}


DEPTHS, LENGTH, POST = (1, 2, 4, 8, 12, 16, 32, 64), 32, 0.575  # POST: share of --steps in claim 2, after the base
RUNS = {  # row of the tables -> initial weights, depth in training, the rank that trains it, modulo their number
    "drawn depth": ("random", "none", 0), "fixed depth": ("random", "fixed", 0), "r = 1": ("random", "once", 1),
    "made recurrent": ("base", "linear", 1), "itself continued": ("base", "once", 1),
    "made recurrent, no ramp": ("base", "none", 1), "random weights": ("random", "linear", 0),
}  # fmt: skip
FIRST, SECOND = list(RUNS)[:3], list(RUNS)[3:]  # the rows of either claim


def trained(cfg: Config, w: cluster.World, run, name: str, base) -> tuple[RecurrentDepthLM, int]:
    """(model, layer passes, backward counted twice) of a row of RUNS. Runs at r = 1 get as many passes as others."""
    weights, kind, _ = RUNS[name]
    c = cfg if name in FIRST else replace(cfg, steps=round(cfg.steps * POST), lr=cfg.lr / 2, seed=cfg.seed + 100)
    same = RUNS[FIRST[0] if name in FIRST else SECOND[0]][1] if kind == "once" else kind
    passes = sum(3 + 2 * (n + 3 * k) for n, k in (depth_of(c, same, 6, c.steps, i) for i in range(c.steps)))
    c = replace(c, steps=round(passes / 9), lr=cfg.lr / 4) if kind == "once" else c  # 3 + 2 * 3 layers at r = 1
    model = copy.deepcopy(base()) if weights == "base" else start(c)[0]
    if weights == "base" and kind != "once":  # the adapter is new, as in retrofit()
        new_adapter(model, c.seed)
    return train_model(c, w, run, model, Parity(c.seed), name, "", kind, alone=True), passes


def measure(model: RecurrentDepthLM, cfg: Config, more: bool) -> dict:
    """by_depth on fresh rows. more: also on rows twice as long, and (iterations, accuracy) of rows that stop alone."""
    n, data, device = 32 if cfg.quick else 128, Parity(cfg.seed), model.lm_head.weight.device
    ids, labels = (x.to(device) for x in data.draw(n, LENGTH, 9, LENGTH))
    found = by_depth(model, ids, labels, DEPTHS, cfg.seed)
    if more:
        left = [feed(model, Cache(model, LENGTH + 1, 32), row, 32, None, 5e-4, 0.1) for row in ids[:32].split(1)]
        right = torch.cat([logits.argmax(-1) for logits, _, _ in left]) == labels[:32]  # (32, 1 + LENGTH)
        found["exits"] = sum(steps for *_, steps in left) / 32, right[:, 1:].float().mean().item()
        longer = (x.to(device) for x in data.draw(n, 2 * LENGTH, 9, 2 * LENGTH))
        found["longer"] = by_depth(model, *longer, DEPTHS, cfg.seed)["accuracy"]
    return found


def judge(found: dict[str, dict]) -> tuple[bool, str]:
    """(both claims hold, their numbers): bars fixed before the runs."""
    ours, fixed, once, new, same, even, random = (found[name]["accuracy"] for name in RUNS)
    far, losses = found[FIRST[0]]["longer"][32], [found[name]["loss"] for name in FIRST[:2]]
    shallow = all(losses[0][r] < losses[1][r] for r in (1, 2, 4))
    rising = ours[1] + 0.1 <= ours[4] and ours[4] + 0.1 <= ours[12]  # added after the runs, see the page
    first = rising and ours[12] >= 0.98 and shallow and ours[12] >= max(once.values()) + 0.1 and far >= 0.9
    second = new[12] >= 0.98 and new[12] >= max(same[12] + 0.1, random[12] + 0.02, even[12] - 0.01)
    return first and second, (
        f"parity {ours[1]:.3f} at 1 iteration, {ours[12]:.3f} at 12, made recurrent {new[12]:.3f}, random weights "
        f"{random[12]:.3f}; (1) at r = 4 {ours[4]:.3f}, {2 * LENGTH} bits at 32 {far:.3f}; trained at r = 1 for equal "
        f"passes {max(once.values()):.3f}; loss at r = 1, 2, 4 {'below' if shallow else 'NOT below'} fixed depth's; "
        f"(2) itself continued {same[12]:.3f}, no ramp {even[12]:.3f}"
    )


def demo(cfg: Config, w: cluster.World) -> None:
    """Train a model per row of RUNS, the rows shared by the ranks; print the tables, the picture and the claim."""
    torch.set_num_threads(1)  # sums are rounded alike on any number of ranks
    names, run, mine, every = list(RUNS), report.Run(cfg.out, cfg, w), {}, [None] * w.size
    if cfg.quick:
        names, cfg = ["drawn depth", "r = 1", "made recurrent"], replace(cfg, steps=max(1, cfg.steps // 6))
    owner, silent = {name: RUNS[name][2] % w.size for name in names}, SimpleNamespace(line={}, log=lambda **_: None)
    base = functools.cache(lambda: train_model(replace(cfg, lr=cfg.lr / 4), w, silent, start(cfg)[0], Parity(
                           cfg.seed, one_step=True), "base: one step", "", "once", alone=True))  # fmt: skip
    for name in (name for name in names if owner[name] == w.rank):
        model, passes = trained(cfg, w, silent, name, base)
        mine[name] = measure(model, cfg, name == FIRST[0]) | {"passes": passes}
    dist.all_gather_object(every, mine)
    found = {name: every[owner[name]][name] for name in names}
    for name in names:
        run.log(measured=name, **found[name])
    ours, head = found[FIRST[0]], ["r at test time", *map(str, DEPTHS), "layer passes"]
    row = lambda name, what="accuracy": [*found[name][what].values(), found[name]["passes"]]
    first, second = ([[name, *row(name)] for name in names if name in part] for part in (FIRST, SECOND))
    longer = [f"drawn depth, {2 * LENGTH} bits", *ours["longer"].values(), ""]
    first += [longer, *(["loss: " + name, *row(name, "loss")] for name in names if name in FIRST)]
    w.print(f"\nclaim 1: accuracy on {LENGTH} bits\n" + report.table(head, first))
    w.print("\nclaim 2: accuracy, after one step was learned\n" + report.table(head, second))
    w.print("\nrows stop by themselves after {:.1f} of 32 iterations, accuracy {:.3f}\n".format(*ours["exits"]))
    if w.main:
        drawing = functools.partial(draw, found)
        w.print(report.picture(f"{cfg.out}/recurrent_depth.png", drawing, ncols=2, figsize=(11, 4)))
    if cfg.quick:
        return w.print("quick: no verdict")
    holds, here = judge(found)
    run.claim("one set of weights gets more right with more iterations, below and beyond the depth of training; a "
              "model that learned one step, made recurrent and trained on chains, solves them, ahead of itself "
              "continued and of random weights", "ARC-C 24.1 at r = 1, 38.2 at 32 (Huginn-3.5B); GSM8K 45.0 for 26.6 "
              "(TinyLlama)", here, holds,
              f"{cfg.steps} steps of {cfg.batch}, {POST} of them in (2), seed {cfg.seed}, {w.device.type}")  # fmt: skip


def draw(found: dict[str, dict], figure, axes) -> None:
    """Accuracy over depth at test time, for the rows of either claim."""
    axes[0].plot(DEPTHS, found[FIRST[0]]["longer"].values(), "kx:", label=f"drawn depth, {2 * LENGTH} bits")
    for axis, title, names in ((axes[0], "one set of weights", FIRST), (axes[1], "after one step was learned", SECOND)):
        for i, name in enumerate(name for name in names if name in found):
            axis.plot(DEPTHS, found[name]["accuracy"].values(), "os^D"[i] + "-", label=name)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="iterations r at test time", ylabel="accuracy", title=title, ylim=(0.48, 1.02))
        axis.legend(frameon=False)


# %% train, eval, generate, bench


def train(cfg: Config, w: cluster.World) -> None:
    """Train one model, with checkpoints. Its weights go to OUT/model if safetensors is installed."""
    (model, data, tokenizer), run = start(cfg), report.Run(cfg.out, cfg, w)
    train_model(cfg, w, run, model, data, "train", f"{cfg.out}/checkpoint.pt")
    if w.main and importlib.util.find_spec("safetensors"):
        save_weights(model, f"{cfg.out}/model")
        kept = Path(f"{cfg.out}/model/tokenizer.json")
        tokenizer.save(str(kept)) if tokenizer else kept.unlink(missing_ok=True)  # an earlier run's
    evaluate(cfg, w, model, data)


def evaluate(cfg: Config, w: cluster.World, model=None, data=None, tokenizer=None) -> None:
    """Loss, accuracy, alarms by depth on held-out rows, and what it writes: the model given, --model, or --out's."""
    if model is None:
        mine = "r", "prompt", "dtype", *(n for n in ("data", "block", "seed") if getattr(cfg, n) != getattr(Config, n))
        cfg, state = (cfg, {}) if cfg.model else loop.opened(f"{cfg.out}/checkpoint.pt", cfg, *mine)
        model, data, tokenizer = start(cfg)
        model.load_state_dict(state.get("model", model.state_dict()))
        model = model.to(w.device).eval()
    if cfg.prompt and (model.shape.n_out or (tokenizer is None and model.shape.vocab_size != 256)):
        raise BadInput("--prompt needs a model of bytes, or a model of text that has a tokenizer.json")
    rows = max(1, min(32, 2**28 // (cfg.block * model.shape.vocab_size)))  # at most 1 GB of logits
    ids, labels = (x.to(w.device) for x in data.draw(rows, cfg.block, 9, cfg.block))
    text = "parity" if model.shape.n_out else " ".join(cfg.data)
    w.print(f"{rows} held-out rows of {text}, --block {cfg.block} --seed {cfg.seed}")
    with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        found = by_depth(model, ids, labels, sorted({*cfg.r}), cfg.seed)
    w.print(report.table(["r", *map(str, found["loss"])], [[name, *at.values()] for name, at in found.items()]))
    if cfg.prompt:
        plain = tokenizer or Tokenizer()
        ids = plain.encode(cfg.prompt).ids if tokenizer else plain.encode(cfg.prompt).tolist()
        stop = tuple(tokenizer.get_added_tokens_decoder()) if tokenizer else ()  # special tokens, such as <|im_end|>
        made = generate(model, torch.tensor([ids], device=w.device), 40, max(cfg.r), 5e-4, stop)
        said, ran = zip(*report.progress(made, "generate", w, 40), strict=True)
        w.print(f"{cfg.prompt} -> {plain.decode(said)}\niterations of each token:", *ran)


@torch.no_grad()
def bench(cfg: Config, w: cluster.World) -> None:
    """One token behind 511 others: cached, with smaller budgets, recomputed; on a GPU at Huginn's sizes and r = 32."""
    cuda, T, g, cases = w.device.type == "cuda", 512, cluster.generator(cfg.seed), {}
    shape = SHAPES["huginn-3.5b"] if cuda else Shape(256, 8, 704, 1, 2, 1, 4, 3, 256, 1024, 1e-6, 1e3, True)
    model = RecurrentDepthLM(shape).to(w.device, dtype := torch.bfloat16 if cuda else torch.float32)
    ids, r = torch.randint(256, (1, T), generator=g).to(w.device), 32 if cuda else 8
    for budget in (r, 4, 1):
        cache = Cache(model, T, r, budget)
        feed(model, cache, ids[:, :-1], r)
        again = lambda cache=cache: (setattr(cache, "length", T - 1), feed(model, cache, ids[:, -1:], r))
        cases[f"cache of {budget} iterations, {cache.kv.nbytes / 2**20:.1f} MiB"] = again
    cases["no cache, all recomputed"] = lambda: model(ids, r, 0, torch.zeros(1, T, shape.n_embd))
    seconds = report.timed(cases, w.device, repeats=11)
    rows = [[name, 1e3 * median, 1e3 * spread] for name, (median, spread) in seconds.items()]
    title = f"{report.device_name(w.device)}, {dtype}, C={shape.n_embd} T={T} r={r}, batch 1"
    w.print(title + "\n" + report.table(["next token", "ms", "+-"], rows))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"title": title, "rows": rows})


def main(cfg: Config) -> None:
    cluster.two_processes(cfg)
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "eval": evaluate, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
