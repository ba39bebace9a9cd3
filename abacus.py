"""Abacus embeddings: positions by place in the number let a transformer add numbers longer than it was trained on.

Paper    McLeish et al., "Transformers Can Do Arithmetic with the Right Embeddings", NeurIPS 2024, arXiv:2405.17399.
Idea     Write numbers least significant digit first, and add a learned vector for a digit's place in its number to the
         digit's embedding. Units then carry the same vector in both operands and in the answer. Training shifts all
         places by a random offset, so places beyond the longest training number are trained too; testing does not.
         The layers are applied several times (looped), and the embedded input enters again before each of them.
Here     The claim we check: from up to 3 digits, which all models learn to 95 %, Abacus adds 4 in 45 % of cases, NoPE
         and FIRE in 30 % or less. From up to 8 digits it adds 10 in 80 %, at 1/100000 of the paper's compute. It holds
         on the mean of seeds 0 to 4; alone, seeds 2 and 4 miss a bar.
Differs  - A model of 0.3 M parameters with LayerNorm before each part; --norm post is the released shape.
         - A curriculum: digits and offsets grow from 1 over the first steps, so short sums come first.
         - One offset per example, 1 in a quarter of them or more; up to 10 for 3 digits, 30 for 8 (paper: 100 for 20).
         - The loop starts at zero, not at noise. All its rounds have gradients; --loss progressive is the paper's.
         - Muon on the matrices of the layers, not AdamW. Fresh problems in every step, whose schedule is in steps.

    python abacus.py                                            # laptop: tables, claim, picture
    python abacus.py --quick                                    # two models, no verdict
    torchrun --nproc-per-node 2 abacus.py --device cpu          # what the first line starts: rows shared by two
    python abacus.py train                                      # Abacus on 8 digits, with checkpoints, see --resume
    python abacus.py eval --problem 97+8                        # that model: lengths, hard sums, a sum of your own
    python abacus.py train --task sort --digits 4 --out sorted  # or sub, mul, or
    python abacus.py bench                                      # speed of a step, of decoding, of making problems
    torchrun --nproc-per-node 8 abacus.py train --preset paper  # the paper's sizes; never run

Expect   "10+10 0.99, 12+12 0.94; ... 4+4 Abacus 0.86, Abacus + FIRE 0.88, NoPE 0.03, FIRE 0.04" on CPU with seed 0.
Writes   results/abacus/: metrics.jsonl, claim.json, abacus.png; checkpoint.pt (train), bench.json.
"""

from __future__ import annotations

import functools
import itertools
import operator
import random
import string
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common import cli, cluster, loop as plumbing, report
from common.cli import BadInput, opt
from common.weights import rotate

# %% the method: a digit's position is its place in its number
#
# Numbers are written least significant digit first, one token a character, so 97 + 8 = 105 becomes
#
#     text                  7   9   +   8   =   5   0   1
#     place, offset = 1     1   2   0   1   0   1   2   3        in testing
#     place, offset = 30    30  31  0   30  0   30  31  32       in training: random, the same for the whole example


def digit_positions(ids: Tensor, digit_ids, offset: int | Tensor = 1) -> Tensor:
    """Place of each digit in its number, counted from `offset`, and 0 for all other tokens: (B, T) -> (B, T) int64.

    digit_ids: the tokens that are digits. offset: a whole number of at least 1, or such numbers (B, 1).
    A place depends on the tokens before it alone. Numbers side by side are one. ValueError: other ids or offsets."""
    offset = torch.as_tensor(offset)
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integer token ids (batch, time), got {ids.dtype} {tuple(ids.shape)}")
    if offset.is_floating_point() or offset.shape not in ((), (len(ids), 1)) or (offset < 1).any():
        raise ValueError(f"offset must be a whole number >= 1, or one for each row (batch, 1), got {offset}")
    digit = torch.isin(ids, torch.as_tensor(digit_ids, device=ids.device))  # (B, T)
    t = torch.arange(ids.shape[1], device=ids.device)
    before = torch.where(digit, -1, t).cummax(dim=1).values  # where the last token that is no digit stood, or -1
    return torch.where(digit, t - before - 1 + offset.to(ids.device), 0)


class AbacusEmbedding(nn.Module):
    """A learned vector for each place, to be added to the token embedding: ids (B, T) -> (B, T, dim).

    Training draws an offset in 1..max_offset for each example, so that rows of the table far beyond the longest
    training number are trained. In eval mode it is 1. All other tokens share row 0, which is learned like the rest."""

    def __init__(self, digit_ids, dim: int, rows: int = 512, max_offset: int = 100):
        super().__init__()
        self.register_buffer("digit_ids", torch.as_tensor(digit_ids), persistent=False)
        self.table, self.max_offset = nn.Embedding(rows, dim), max_offset

    def forward(self, ids: Tensor, offset=None, generator: torch.Generator | None = None) -> Tensor:
        """offset: as in digit_positions, or None to draw it in training. ValueError: a place outgrows the table."""
        if offset is None and self.training:
            offset = torch.randint(1, self.max_offset + 1, (len(ids), 1), generator=generator)
        offset = torch.as_tensor(1 if offset is None else offset)
        row, rows = digit_positions(ids, self.digit_ids, offset), len(self.table.weight)  # (B, T)
        if ids.numel() and ids.shape[1] + offset.max() > rows and row.max() >= rows:  # a GPU waits only if it may be so
            raise BadInput(f"place {int(row.max())} needs more than the table's {rows} rows")
        return self.table(row)


def loop(layers, e: Tensor, R: int, x: Tensor | None = None, injection: str = "layer") -> Tensor:
    """Apply the layers R times to x (None: zero). The embedded input e enters again on the way: all (B, T, C).

    injection: "layer" adds e before every layer, "recurrence" before every round (the paper's looped model), and
    "none" only at the start."""
    for _ in range(R):
        for i, layer in enumerate(layers):
            if x is None:
                x = e
            elif injection == "layer" or (injection == "recurrence" and i == 0):
                x = x + e
            x = layer(x)  # (B, T, C)
    return x


# %% what makes it scale: training at a random depth


def token_loss(model, batch: Batch, before: int, R: int) -> Tensor:
    """Cross-entropy summed over the answers' tokens, after `before` rounds without gradient and R with it: 0-d."""
    logits = model(batch.ids[:, :-1], R, before, batch.offset)  # (B, T - 1, V)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")


def progressive_loss(model, batch: Batch, R: int, generator: torch.Generator | None = None, alpha: float = 1.0):
    """(1 - alpha) L_max + alpha L_prog, each summed over the answers' tokens: 0-d. (Bansal et al., arXiv:2202.05826)

    L_prog stops at a random depth n + k, L_max at the full depth R. Only the last rounds of each have gradients."""
    K = max(R // 2, 1)
    n = int(torch.randint(R, (), generator=generator))  # rounds without gradient
    k = int(torch.randint(1, min(R - n, K) + 1, (), generator=generator))  # rounds with gradient
    loss = alpha * token_loss(model, batch, n, k)
    return loss + (1 - alpha) * token_loss(model, batch, R - K, K) if alpha < 1 else loss


# %% the model, and the positions that Abacus is compared with


class FIRE(nn.Module):
    """Attention bias (arXiv:2310.04418): an MLP of log(|c (q - k)| + 1), divided by the same of the query's place."""

    def __init__(self, heads: int, width: int = 32, c: float = 0.1, L: float = 512.0, eps: float = 1e-6):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, heads))
        self.c, self.L_multiplier = nn.Parameter(torch.tensor(c)), nn.Parameter(torch.tensor(1.0))
        self.init_L, self.eps = nn.Parameter(torch.tensor(L), requires_grad=False), eps

    def forward(self, T: int, device=None) -> Tensor:
        """Bias (1, H, T queries, T keys) to add to the scaled scores. It is meant for keys up to the query."""
        t = torch.arange(T, device=device, dtype=self.c.dtype)
        near = (self.c * (t[:, None] - t)).abs()  # (T, T)
        far = (self.c * torch.maximum(t, (self.L_multiplier * self.init_L).abs())).abs()[:, None]  # (T, 1)
        x = (near + 1).log() / ((far + 1).log() + self.eps)
        return rearrange(self.mlp(x[..., None]), "q k h -> 1 h q k")


class GLU(nn.Module):
    """down(value * gelu(gate)): (..., C) -> (..., C)."""

    def __init__(self, C: int, ff: int):
        super().__init__()
        self.up, self.down = nn.Linear(C, 2 * ff, bias=False), nn.Linear(ff, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)  # (..., ff) each
        return self.down(value * F.gelu(gate))


class Layer(nn.Module):
    """Causal attention in heads of 64, then a GLU: (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, self.H, self.pre = cfg.d_model, cfg.d_model // 64, cfg.norm == "pre"
        self.qkv, self.out, self.glu = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False), GLU(C, cfg.ff)
        self.norms = nn.ModuleList(nn.LayerNorm(C, EPS) for _ in range(2))
        self.rope = "rope" in cfg.pos.split("+")
        self.fire = FIRE(self.H) if "fire" in cfg.pos.split("+") else None

    def attend(self, x: Tensor) -> Tensor:
        """Causal attention: (B, T, C) -> (B, T, C)."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.H)  # 3 x (B, H, T, D)
        T, D, mask = x.shape[1], q.shape[-1], None
        if self.rope:
            frequency = 10000 ** (-torch.arange(0, D, 2, device=x.device) / D)
            angle = torch.outer(torch.arange(T, device=x.device), frequency)  # (T, D/2)
            q, k = rotate(q, angle), rotate(k, angle)
        if self.fire is not None:
            later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            mask = self.fire(T, x.device).masked_fill(later, -torch.inf).to(q.dtype)  # (1, H, T, T)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norms
        if self.pre:
            x = x + self.attend(first(x))
            return x + self.glu(second(x))
        x = first(x + self.attend(x))
        return second(x + self.glu(x))


class ArithmeticTransformer(nn.Module):
    """Token and Abacus embeddings, a looped block of layers, and logits for the next token."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, self.R, self.injection = cfg.d_model, cfg.recurrences, cfg.injection
        V = len(TOKENS) + 6 if cfg.task == "sort" else 19  # 19 ids are published; sort adds labels and separators
        self.token = nn.Embedding(V, C)
        self.abacus = AbacusEmbedding(DIGITS, C, ROWS, cfg.max_offset) if "abacus" in cfg.pos.split("+") else None
        self.norm_in = nn.LayerNorm(C, EPS)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        self.out, self.decoder = nn.LayerNorm(C, EPS), nn.Linear(C, V, bias=False)
        if cfg.norm == "post":  # the released model's way out
            self.out = nn.Sequential(GLU(C, cfg.ff), nn.LayerNorm(C, EPS), nn.Linear(C, C, bias=False))
        # weights from the seed, those of positions last: models that differ in them share all others
        gain = (8 * cfg.n_layer * cfg.recurrences) ** -0.25 if cfg.norm == "post" else 1.0
        g, last = cluster.generator(cfg.seed, 0), lambda item: "abacus" in item[0] or "fire" in item[0]
        for name, p in sorted(self.named_parameters(), key=last):
            if "mlp" in name:  # FIRE's: PyTorch's own bounds
                bound = 1.0 if "mlp.0" in name else 32**-0.5
                nn.init.uniform_(p, -bound, bound, generator=g)
            elif name.startswith(("token", "abacus")):
                nn.init.normal_(p, std=cfg.d_model**-0.5, generator=g)
            elif p.ndim > 1:
                for part, by in zip(p.chunk(3), (1, 1, gain), strict=True) if "qkv" in name else ((p, gain),):
                    nn.init.xavier_normal_(part, by, generator=g)

    def forward(self, ids: Tensor, R: int | None = None, before: int = 0, offset=None) -> Tensor:
        """Logits (B, T, V) of ids (B, T), after `before` rounds without gradient and R rounds with it.

        offset: see AbacusEmbedding. ValueError: R < 1."""
        R = self.R if R is None else R
        if R < 1 or before < 0:
            raise ValueError(f"R must be at least 1 and `before` at least 0, got {R} and {before}")
        e = self.token(ids) if self.abacus is None else self.token(ids) + self.abacus(ids, offset)  # (B, T, C)
        e = self.norm_in(e)
        with torch.no_grad():
            x = loop(self.layers, e, before, None, self.injection)
        return self.decoder(self.out(loop(self.layers, e, R, x, self.injection)))


# %% settings

ENCODINGS, INJECTIONS = ("abacus", "nope", "fire", "rope"), ("layer", "recurrence", "none")
ROWS, EPS = 512, 1e-12  # of the Abacus table and of every LayerNorm, as in the released training code
MADE, READ = ("demo", "train"), ("demo", "train", "bench")  # modes


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "eval", "bench"), positional=True)
    preset: str = opt("laptop", "settings: the demo's, or the paper's sizes", ("laptop", "paper"), modes=("train",))
    task: str = opt("add", "what to compute", ("add", "sub", "mul", "or", "sort"), modes=("train",))
    digits: int = opt(8, "most digits of an operand in training; for sort also most elements", modes=("train", "bench"))
    pos: str = opt("abacus", f"positions: {', '.join(ENCODINGS)}, or several joined by +", modes=("train",))
    max_offset: int = opt(30, "largest random start of the places in training", modes=("train", "bench"))
    curriculum: int = opt(150, "steps over which digits and offsets grow from 1; 0: at once", modes=("train",))
    d_model: int = opt(128, "width, in heads of 64", modes=READ)
    ff: int = opt(128, "width of the feed-forward layer after gating", modes=READ)
    n_layer: int = opt(2, "layers in the block", modes=READ)
    recurrences: int = opt(2, "rounds: how often the block is applied", modes=READ)
    norm: str = opt("pre", "norms before each part, or the paper's after it", ("pre", "post"), modes=("train",))
    injection: str = opt("layer", "before what the embedded input enters again", INJECTIONS, modes=("train",))
    loss: str = opt("full", "at full depth, or the paper's at a random one", ("full", "progressive"), modes=("train",))
    steps: int = opt(650, "optimizer steps; the demo's shorter rows take a share of it", modes=MADE)
    batch: int = opt(96, "examples per step, over all processes", modes=READ)
    optimizer: str = opt("muon", "of the layers' matrices; all else has AdamW", ("muon", "adamw"), modes=("train",))
    lr: float = opt(0.015, "peak learning rate; beside Muon, AdamW has a fifth; AdamW alone: try 0.003", modes=MADE)
    lengths: tuple = opt((8, 10, 12, 16), "lengths n of the n+n problems tried", modes=("train", "eval"))
    problem: str = opt("", "a problem of your own, such as 97+8", modes=("eval",))
    quick: bool = opt(False, "fewer and shorter rows, no verdict", modes=("demo",))
    seed: int = opt(0, "seed of the weights and the data")
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "of the matrix products in training", ("float32", "bfloat16"), modes=MADE)
    out: str = opt("results/abacus", "folder of what the run writes, of the run to resume or to evaluate")
    resume: bool = opt(False, "go on from the checkpoint in --out, if there is one", modes=("train",))
    save_every: int = opt(200, "steps between checkpoints; 0 writes only the last", modes=("train",))
    log_every: int = opt(10, "steps between lines in metrics.jsonl", modes=MADE)

    def __post_init__(self):
        sizes = (self.digits, self.max_offset, self.d_model, self.ff, self.n_layer, self.recurrences, self.steps,
                 self.batch, self.log_every, *self.lengths)  # fmt: skip
        self.parts = 4 if self.digits > 4 else 1  # of a batch, by length: short problems are nearly equally long
        kinds, longest = self.pos.split("+"), max(self.digits, *self.lengths)
        need = max(self.max_offset - 1 + span(self.task, self.digits), span(self.task, longest))
        for wrong, message in (
            (min(*sizes, self.curriculum + 1, self.save_every + 1) < 1,
             "sizes, --steps and --lengths must be at least 1, --curriculum and --save-every at least 0"),
            (not 0 < self.lr < float("inf"), f"--lr {self.lr} must be above 0"),
            (set(kinds) - set(ENCODINGS), f"--pos {self.pos}: choose from {', '.join(ENCODINGS)}, joined by +"),
            (self.batch % self.parts, f"--batch {self.batch} does not divide into {self.parts} parts by length"),
            (self.d_model % 64, f"--d-model {self.d_model} is no multiple of 64, the width of a head"),
            (self.mode == "demo" and (self.task, self.pos) != ("add", "abacus"),
             "the demo adds, with positions of its own; --task and --pos belong to train"),
            ("abacus" in kinds and need >= ROWS,
             f"--digits {self.digits}, --max-offset {self.max_offset} and --lengths up to {longest} need place {need}, "
             f"the table ends at {ROWS - 1}"),
            (self.task == "sort" and longest > len(LABELS),
             f"--digits or --lengths {longest}: sort has labels for {len(LABELS)} elements"),
        ):  # fmt: skip
            if wrong:
                raise BadInput(message)


PRESETS = {
    "laptop": {},
    "paper": {  # 8 layers x 2 of width 1024: 63,514,624 parameters; sizes from the paper, steps ours; never run
        "digits": 20, "max_offset": 100, "curriculum": 0, "d_model": 1024, "ff": 1024, "n_layer": 8, "norm": "post",
        "injection": "recurrence", "loss": "progressive", "steps": 4500, "batch": 8192, "lr": 1e-4,
        "optimizer": "adamw", "dtype": "bfloat16", "lengths": (20, 40, 60, 80, 100),
    },
}  # fmt: skip


# %% the data: problems as text

PAD, EOS, EQUALS, DIGITS = 0, 3, 17, tuple(range(4, 14))
LABELS = string.ascii_letters.replace("x", "")  # of the numbers to sort; x is the sign of multiplication
TOKENS = {c: i for i, c in enumerate("0123456789+-x=", start=4)}
TOKENS |= {c: i for i, c in enumerate(LABELS + ",:", start=19)}
TEXT = {i: c for c, i in TOKENS.items()}
OPERATORS = {"add": ("+", operator.add), "sub": ("-", operator.sub), "mul": ("x", operator.mul)}


def span(task: str, n: int) -> int:
    """Most digits of a number in a problem of n digits, its answer included."""
    return {"add": n + 1, "mul": 2 * n}.get(task, n)


def encode(text: str) -> Tensor:
    """Token ids (T,) of a problem. ValueError: a character without a token, such as a space."""
    if bad := [c for c in text if c not in TOKENS]:
        raise ValueError(f"character {bad[0]!r} of {text!r} has no token; there are 0-9 + - x = and labels")
    return torch.tensor([TOKENS[c] for c in text], dtype=torch.long)


def decode(ids) -> str:
    """The text of a sequence of ids up to EOS, without PAD."""
    known = itertools.takewhile(lambda i: i != EOS, map(int, ids))
    return "".join(TEXT.get(i, "?") for i in known if i != PAD)


def written(task: str, a: int, b: int) -> str:
    """A sum, difference or product with its answer, each number least significant digit first: "79+8=501"."""
    sign, compute = OPERATORS[task]
    return f"{str(a)[::-1]}{sign}{str(b)[::-1]}={str(compute(a, b))[::-1]}"


def problem(task: str, i: int, j: int, r: random.Random) -> str:
    """A random problem of i and j digits with its answer. sort: i labelled numbers of up to j digits, then their
    labels by value. or: the shorter word holds a single 1."""
    number = lambda n: r.randrange(10 ** (n - 1), 10**n)
    if task in OPERATORS:
        return written(task, number(i), number(j))
    if task == "or":
        at, first = r.randrange(min(i, j)), i < j or (i == j and r.random() < 0.5)
        word = lambda n, hot: "".join("1" if hot and k == at else "0" for k in range(n))
        return f"{word(i, first)}+{word(j, not first)}={word(max(i, j), True)}"
    first = r.randrange(len(LABELS))
    items = [(LABELS[(first + n) % len(LABELS)], number(r.randint(1, j))) for n in range(i)]
    by_value = sorted(items, key=lambda item: item[1])  # equal values stay in the order of the question
    return ",".join(f"{label}:{str(n)[::-1]}" for label, n in items) + "=" + ",".join(label for label, _ in by_value)


def hard_sums(n: int) -> dict[str, list[str]]:
    """Sums of n digits that random problems hardly ever show: long carries, round numbers, repeated digits."""
    nines, pairs = 10**n - 1, list(itertools.product(range(1, 10), repeat=2))
    return {
        "99..9+d": [written("add", nines, d) for d in range(1, 10)],
        "d0..0+e0..0": [written("add", d * 10 ** (n - 1), e * 10 ** (n - 1)) for d, e in pairs],
        "dd..d+ee..e": [written("add", d * nines // 9, e * nines // 9) for d, e in pairs],
    }


class Batch(NamedTuple):
    ids: Tensor  # (B, T), padded on the right
    targets: Tensor  # (B, T - 1): the next token where it belongs to the answer, else -100
    offset: Tensor  # (B, 1): where the places start


def answer_targets(ids: Tensor) -> Tensor:
    """Next-token targets after "=", EOS included: ids (B, T) -> (B, T - 1). ValueError: not one "=" in a row."""
    equals = ids == EQUALS
    for row in (equals.sum(dim=1) != 1).nonzero().flatten().tolist():
        raise ValueError(f"row {row} has {int(equals[row].sum())} '=' tokens, expected 1")
    asked = equals.cumsum(dim=1)[:, :-1] > 0  # (B, T - 1)
    return ids[:, 1:].long().masked_fill(~asked | (ids[:, 1:] == PAD), -100)


def pack(texts, offsets=None, device=None) -> Batch:
    """Problems as one batch, with EOS at their ends."""
    rows = [F.pad(encode(text), (0, 1), value=EOS) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)  # (B, T)
    offset = torch.tensor(offsets or [1] * len(rows))[:, None]  # stays on the CPU, where it is checked
    return Batch(ids.to(device), answer_targets(ids).to(device), offset)


def batches(cfg: Config, step: int, rank: int = 0, size: int = 1, device=None) -> list[Batch]:
    """One rank's share of a step's fresh problems, in parts by length, so that little is padding.

    Each problem is a function of (seed, step, index). The curriculum lets digits and offsets grow from 1. The offset
    is 1, as in testing, in a quarter of the examples or more, and else uniform."""
    done = min(1.0, step / cfg.curriculum) if cfg.curriculum else 1.0
    digits, largest, made = *(1 + int(done * (most - 1)) for most in (cfg.digits, cfg.max_offset)), []
    for index in range(rank, cfg.batch, size):
        r = random.Random(f"{cfg.seed} {step} {index}")
        text = problem(cfg.task, r.randint(1, digits), r.randint(1, digits), r)
        made.append((text, max(1, r.randint(-largest // 4, largest))))
    made.sort(key=lambda item: len(item[0]))
    n = len(made) // cfg.parts
    return [pack(*map(list, zip(*made[k : k + n], strict=True)), device) for k in range(0, len(made), n)]


# %% what is measured


@torch.no_grad()
def correct(model, texts: list[str]) -> Tensor:
    """True where a model answers a problem exactly, EOS included, in one pass over the right answers: (len(texts),).

    Greedy decoding writes the right answer exactly if each token is the likeliest given the right ones before it."""
    ids, targets, _ = pack(texts, None, next(model.parameters()).device)
    right = model(ids[:, :-1], offset=1).argmax(dim=-1) == targets  # (B, T - 1)
    return (right | (targets == -100)).all(dim=1).cpu()


@torch.no_grad()
def generate(model, prompt_ids: Tensor, max_new: int) -> Tensor:
    """Greedy decoding, the oracle of `correct`: prompts (B, T) of one length -> the new (B, max_new), PAD after EOS."""
    ids, done = prompt_ids, torch.zeros(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    for _ in range(max_new):
        new = model(ids, offset=1)[:, -1].argmax(dim=-1).masked_fill(done, PAD)  # (B,)
        ids, done = torch.cat([ids, new[:, None]], dim=1), done | (new == EOS)
    return ids[:, prompt_ids.shape[1] :]


def trials(task: str, i: int, j: int, n: int, seed: int = 0) -> list[str]:
    """n problems of i and j digits to test with, from other random streams than training."""
    return [problem(task, i, j, random.Random(f"test {seed} {task} {i} {j} {index}")) for index in range(n)]


def exact_match(model, i: int, j: int, n: int = 200, task: str = "add", seed: int = 0) -> float:
    """Share of n fresh problems of i and j digits whose whole answer is right."""
    return correct(model, trials(task, i, j, n, seed)).double().mean().item()


def examine(model, cfg: Config, most: int) -> dict:
    """Columns of a table: exact match on all lengths trained, on cfg.lengths, on hard sums of the longest length
    trained. "grid": exact match of i + j digits for i, j in 1..most."""
    n, sizes = max(10, 900 // cfg.digits**2), range(1, most + 1)
    grid = [[exact_match(model, i, j, n, cfg.task, cfg.seed) for j in sizes] for i in sizes]
    inside = [share for row in grid[: cfg.digits] for share in row[: cfg.digits]]
    found = {f"1..{cfg.digits}": sum(inside) / len(inside)}
    found |= {f"{m}+{m}": exact_match(model, m, m, 200, cfg.task, cfg.seed) for m in cfg.lengths}
    for kind, texts in hard_sums(cfg.digits).items() if cfg.task == "add" else ():
        found[kind] = correct(model, texts).double().mean().item()
    return found | {"grid": grid}


def table(found: dict[str, dict]) -> str:
    """What examine() found for several models, as text."""
    columns = [key for key in next(iter(found.values())) if key != "grid"]
    return report.table(["model", *columns], [[name, *(f[key] for key in columns)] for name, f in found.items()])


# %% training


def gradients(cfg: Config, model, parts: list[Batch], step: int, size: int = 1) -> Tensor:
    """Backward pass of a step, part by part -> this rank's share of the loss: the mean over the answers' tokens of all
    parts and ranks. Gradients of one process equal those of `size` ranks."""
    device = parts[0].ids.device
    count = sum((part.targets != -100).sum() for part in parts)
    count, loss = cluster.total(count) if size > 1 else count, 0.0
    for i, part in enumerate(parts):
        model.require_backward_grad_sync = i == len(parts) - 1  # read by DDP alone
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            if cfg.loss == "full":
                total = token_loss(model, part, 0, cfg.recurrences)
            else:  # the same depth on every rank and in every part
                total = progressive_loss(model, part, cfg.recurrences, cluster.generator(cfg.seed, 1, step))
        (total / count * size).backward()  # DDP averages over the ranks
        loss = loss + total.detach() / count
    return loss


def optimizers_of(model: ArithmeticTransformer, cfg: Config) -> dict[str, torch.optim.Optimizer]:
    """AdamW at --lr; or Muon at --lr for the layers' matrices, whose updates it makes nearly orthogonal, and AdamW at a
    fifth of --lr for the rest (Jordan et al., kellerjordan.github.io/posts/muon)."""
    muon, inner, rest = cfg.optimizer == "muon", [], []
    for name, p in model.named_parameters():
        (inner if muon and name.startswith("layers") and p.ndim == 2 and "fire" not in name else rest).append(p)
    adamw = torch.optim.AdamW(rest, cfg.lr / 5 if muon else cfg.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    return {"optimizer": adamw} | ({"muon": torch.optim.Muon(inner, cfg.lr, 0.0, 0.9, ns_steps=4)} if muon else {})


def train_model(cfg: Config, w: cluster.World, run, what: str, path: str = "", alone: bool = False):
    """One run -> the trained model. alone: this rank trains a model of its own, else all ranks share each batch."""
    rank, size = (0, 1) if alone else (w.rank, w.size)
    if cfg.batch % (cfg.parts * size):
        raise BadInput(f"--batch {cfg.batch} does not divide over {size} processes x {cfg.parts} parts by length")
    model = ArithmeticTransformer(cfg).to(w.device)
    unused = cfg.loss == "progressive" and cfg.injection == "none"  # then the embeddings may get no gradient
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused) if size > 1 else model
    optimizers = optimizers_of(model, cfg)
    for step in plumbing.steps(cfg, w, run, {"model": model, **optimizers}, cfg.steps, what, path):
        loss = gradients(cfg, ddp, batches(cfg, step, rank, size, w.device), step, size)
        warm, fall = (step + 1) / (0.05 * cfg.steps), (cfg.steps - step) / (0.4 * cfg.steps)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * min(1.0, warm, fall)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        run.line = {"loss": loss.item() if alone else loss, "lr": group["lr"]}  # no tensor alone: nothing to sum
    return model


# %% demo: the claim

FAR, RIVALS, OURS = "Abacus, 8 digits", ("NoPE", "FIRE"), ("Abacus", "Abacus + FIRE")
SHORT = {"digits": 3, "lengths": (4, 5, 6), "max_offset": 10, "curriculum": 60}
RUNS = {  # row of the table -> its settings, its share of --steps, the rank that trains it, modulo their number
    FAR: ({"digits": 8, "lengths": (8, 10, 12, 16)}, 1.0, 0),
    "NoPE": (SHORT | {"pos": "nope"}, 0.9, 1),
    "FIRE": (SHORT | {"pos": "fire"}, 0.9, 3),
    "Abacus": (SHORT, 0.7, 4),
    "Abacus + FIRE": (SHORT | {"pos": "abacus+fire"}, 0.7, 5),
    "Abacus, no injection": (SHORT | {"injection": "none"}, 0.7, 2),
}


def judge(found: dict[str, dict]) -> tuple[bool, str]:
    """(the claim holds, its numbers): bars fixed before the runs."""
    far, one_more = found[FAR], {name: found[name]["4+4"] for name in OURS + RIVALS}
    learned = min(found[name]["1..3"] for name in one_more)
    reach = far["10+10"] >= 0.8 and min(one_more[name] for name in OURS) >= 0.45
    return learned >= 0.95 and reach and max(one_more[name] for name in RIVALS) <= 0.3, (
        f"from 8 digits 10+10 {far['10+10']:.2f}, 12+12 {far['12+12']:.2f}; from 3 digits, known to {learned:.2f} or "
        "better, 4+4 " + ", ".join(f"{name} {share:.2f}" for name, share in one_more.items())
    )


def demo(cfg: Config, w: cluster.World) -> None:
    """Train a model per row of RUNS, the rows shared by the ranks; print the tables, the picture and the claim."""
    torch.set_num_threads(1)  # sums are rounded alike on any number of ranks
    names, run, mine, every = list(RUNS), report.Run(cfg.out, cfg, w), {}, [None] * w.size
    if cfg.quick:
        names, cfg = ["FIRE", "Abacus"], replace(cfg, steps=cfg.steps // 3)
    owner = {name: RUNS[name][2] % w.size for name in names}
    for name in (name for name in names if owner[name] == w.rank):
        changes, share, _ = RUNS[name]
        c, start, lines = replace(cfg, mode="train", **changes, steps=round(cfg.steps * share)), time.process_time(), []
        keep = SimpleNamespace(line={}, log=lambda lines=lines, **values: lines.append(values))  # for rank 0 to write
        found = examine(train_model(c, w, keep, name, alone=True), c, 2 * c.digits)
        mine[name] = found | {"steps": c.steps, "CPU s": round(time.process_time() - start)}, lines
    dist.all_gather_object(every, mine)
    found = {name: every[owner[name]][name][0] for name in names}
    for name in names:
        for line in (*every[owner[name]][name][1], {"measured": name, **found[name]}):
            run.log(**line)
    w.print("\n" + table({name: f for name, f in found.items() if name != FAR}) + "\n")
    if w.main:
        w.print(report.picture(f"{cfg.out}/abacus.png", functools.partial(draw, found), ncols=2, figsize=(11, 4)))
    if cfg.quick:
        return w.print("quick: no verdict")
    w.print("\n" + table({FAR: found[FAR]}) + "\n")
    holds, here = judge(found)
    run.claim(
        "at 1/100000 of the paper's compute Abacus adds numbers of 1.25 times the training length (10 digits from 8: "
        "80 %); from 3 digits, known to 95 %, it adds 4 in 45 %, NoPE and FIRE in at most 30 %",
        "up to 99 % exact match at 100 digits after training on up to 20", here, holds,
        f"{cfg.steps} steps of {cfg.batch}, seed {cfg.seed}, {w.device.type}",
    )  # fmt: skip


def draw(found: dict, figure, axes) -> None:
    """Left: exact match by length. Right: over both operands' lengths; the lengths of training are outlined."""
    for i, (name, f) in enumerate(found.items()):
        both = [share[n] for n, share in enumerate(f["grid"])]  # n + n digits
        axes[0].plot(range(1, len(both) + 1), both, "os^Dvx"[i] + "-", label=name)
    axes[0].set(xlabel="digits of both numbers", ylabel="exact match", ylim=(-0.03, 1.03))
    axes[0].legend(frameon=False, fontsize=8)
    grid = max((f["grid"] for f in found.values()), key=len)
    most, edge = len(grid) + 0.5, len(grid) / 2 + 0.5
    columns = list(zip(*grid, strict=True))  # rows of the picture are b, columns are a
    image = axes[1].imshow(columns, origin="lower", extent=(0.5, most, 0.5, most), vmin=0, vmax=1)
    axes[1].plot([0.5, edge, edge], [edge, edge, 0.5], color="red", lw=2)
    axes[1].set(xlabel="digits of a", ylabel="digits of b", title="red: lengths of training")
    axes[1].set(xticks=range(2, len(grid) + 1, 2), yticks=range(2, len(grid) + 1, 2))
    figure.colorbar(image, ax=axes[1], label="exact match")


# %% train, eval, bench


def train(cfg: Config, w: cluster.World) -> None:
    """One run with checkpoints, all ranks sharing each batch, and what it learned."""
    run = report.Run(cfg.out, cfg, w)
    model = train_model(cfg, w, run, "train", f"{cfg.out}/checkpoint.pt")
    found = examine(model, cfg, cfg.digits)
    run.log(measured="train", **found)
    w.print(table({f"task {cfg.task}, {cfg.pos}": found}))


def evaluate(cfg: Config, w: cluster.World) -> None:
    """The run in --out on --lengths and on hard sums, and one problem as the model writes it."""
    cfg, state = plumbing.opened(f"{cfg.out}/checkpoint.pt", cfg, "lengths", "problem", "seed")
    model = ArithmeticTransformer(cfg).to(w.device)
    model.load_state_dict(state["model"])
    text = trials(cfg.task, cfg.lengths[0], cfg.lengths[0], 1, cfg.seed)[0]
    if cfg.problem:
        a, _, b = cfg.problem.replace(" ", "").partition(OPERATORS.get(cfg.task, "?")[0])
        if not (cfg.task in OPERATORS and a.isdecimal() and b.isdecimal()):
            raise BadInput(f"--problem {cfg.problem}: the model's task is {cfg.task}. add: 97+8, sub: 97-8, mul: 97x8")
        text = written(cfg.task, int(a), int(b))
    w.print(table({f"task {cfg.task}, {cfg.pos}": examine(model, cfg, cfg.digits)}))
    question, answer = text.split("=")
    said = decode(generate(model, encode(question + "=")[None].to(w.device), len(answer) + 2)[0])
    w.print(f"{question}={said} ({'right' if said == answer else 'wrong: ' + answer}), least significant digits first")


def bench(cfg: Config, w: cluster.World) -> None:
    """Time of a step with each kind of positions, of one pass against token by token, and of making problems."""
    models = {pos: ArithmeticTransformer(replace(cfg, pos=pos)).to(w.device) for pos in (*ENCODINGS, "abacus+fire")}
    parts, texts = batches(replace(cfg, curriculum=0), 0, 0, 1, w.device), trials("add", 16, 16, 200)
    prompts = torch.stack([encode(text[: text.index("=") + 1]) for text in texts]).to(w.device)
    cases = {f"step, {pos}": functools.partial(gradients, cfg, m, parts, 0) for pos, m in models.items()} | {
        "200 sums of 16 digits, one pass": lambda: correct(models["abacus"], texts),
        "200 sums of 16 digits, token by token": lambda: generate(models["abacus"], prompts, 18),
        "1000 additions made and written": lambda: trials("add", cfg.digits, cfg.digits, 1000),
    }
    seconds = report.timed(cases, w.device, repeats=7)
    rows = [[name, 1e3 * median, 1e3 * spread] for name, (median, spread) in seconds.items()]
    title = f"{report.device_name(w.device)}, float32, batch {cfg.batch}, width {cfg.d_model}, <= {cfg.digits} digits"
    w.print(title + "\n" + report.table(["case", "ms", "+-"], rows))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"title": title, "rows": rows})


def main(cfg: Config) -> None:
    cluster.two_processes(cfg)
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "eval": evaluate, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
