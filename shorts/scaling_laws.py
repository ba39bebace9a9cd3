"""Scaling laws: the same runs, other models left out, another prescription.

Paper    McLeish et al., "Gemstones: A Model Suite for Multi-Faceted Scaling Laws", NeurIPS 2025, arXiv:2502.06857.
Idea     A law L(N, D) for the loss after D tokens with N parameters also says how to spend a budget of C FLOPs. There
         are two ways to such advice: fit the law to all checkpoints, or keep only those on the lower convex hull of
         loss over compute and draw a line through their sizes. The hull drops badly shaped models by itself.
Here     The claim we check: over random sets of 8 models, the law's advice on tokens per parameter, at 20 times the
         largest fitted run's compute, spreads widely, and the hull's is steadier. It must hold on two grids of 18 tiny
         networks. Nobody knows the true optimum. The printed tables show the limit: drop early or late checkpoints, or
         wide or deep models, and the hull moves as much as the law or more.
Differs  - 3 k to 0.3 M parameters on windows of 8 bytes, without attention. C = 6 N D with all parameters in N.
         - Huber's delta is 1e-3 and two starts, for 1e-4 and 4500. Laws in width and depth are left out.

    python shorts/scaling_laws.py                                       # laptop, one minute: fits two tables of runs
    python shorts/scaling_laws.py --quick                               # one table and fewer sets, no verdict
    python shorts/scaling_laws.py train                                 # trains the grid, four minutes of one core

Expect   "law 1.64, hull 0.79" for the first grid on CPU with seed 0.
Writes   results/scaling_laws/: metrics.jsonl, claim.json, scaling_laws.png; train: runs.csv for --data
"""

import csv
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.text import corpus

# %% the method: a law through every run (Approach 3 of Hoffmann et al., arXiv:2203.15556)


class Law(namedtuple("Law", "logA logB logE alpha beta")):
    """L(N, D) = E + A / N^alpha + B / D^beta: loss in nats per token, N parameters, D tokens."""

    def loss(self, N: Tensor, D: Tensor) -> Tensor:
        return math.exp(self.logE) + math.exp(self.logA) / N**self.alpha + math.exp(self.logB) / D**self.beta

    def optimum(self, C: float) -> tuple[float, float]:
        """The (N, D) of least loss with 6 N D = C: N = G (C/6)^a with a = beta / (alpha + beta)."""
        logG = math.log(self.alpha / self.beta) + self.logA - self.logB  # times alpha + beta
        N = math.exp((logG + self.beta * math.log(C / 6)) / (self.alpha + self.beta))
        return N, C / 6 / N


def objective(theta: Tensor, n: Tensor, d: Tensor, logL: Tensor, delta: float) -> Tensor:
    """The sum of Huber losses of log L, for theta = (log A, log B, log E, alpha, beta), n = log N, d = log D."""
    logA, logB, logE, alpha, beta = theta
    terms = torch.stack([logA - alpha * n, logB - beta * d, logE.expand_as(n)])  # (3, runs)
    return F.huber_loss(terms.logsumexp(dim=0), logL, delta=delta, reduction="sum")


def fit(N: Tensor, D: Tensor, L: Tensor, delta: float = 1e-3) -> Law:
    """The law that minimises `objective` over runs N, D, L (runs,), by L-BFGS from two starts."""
    n, d, logL = N.log(), D.log(), L.log()
    n0, d0 = n.mean(), d.mean()  # centred logs uncouple log A from alpha and log B from beta
    rest, logE = math.log(0.1 * L.mean()), math.log(0.8 * L.mean())  # a first guess: the floor is most of the loss
    ends = []
    for alpha, beta in ((0.2, 0.3), (0.6, 0.9)):
        theta = torch.tensor([rest, rest, logE, alpha, beta], dtype=N.dtype, requires_grad=True)
        search = torch.optim.LBFGS([theta], max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

        def closure(search=search, theta=theta):
            search.zero_grad()
            value = objective(theta, n - n0, d - d0, logL, delta) / delta**2  # else far below the tolerances
            value.backward()
            return value

        search.step(closure)
        ends.append((closure().item(), *theta.tolist()))
    _, logA, logB, logE, alpha, beta = min(ends)  # and back to logs that are not centred
    return Law(logA + alpha * n0.item(), logB + beta * d0.item(), logE, alpha, beta)


# %% the method: a line through the runs on the frontier (Approach 1)


def hull(C: Tensor, L: Tensor) -> list[int]:
    """Indices of the lower convex hull of log L over log C, from left to right while the loss falls."""
    x, y, kept = C.log().tolist(), L.log().tolist(), []
    slope = lambda i, j: (y[j] - y[i]) / max(x[j] - x[i], 1e-300)
    for i in sorted(range(len(x)), key=lambda i: (x[i], y[i])):
        while len(kept) > 1 and slope(kept[-1], i) <= slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(i)
    return [i for j, i in enumerate(kept) if j == 0 or y[i] < y[kept[j - 1]]]


# %% settings


@dataclass
class Config:
    mode: str = opt("demo", "fit tables of runs, or train a grid and write its table", ("demo", "train"), True)
    data: str = opt("", "your own table: width,depth,params, then losses, a column a token count", modes=("demo",))
    compute: float = opt(1e13, "the budget, in FLOPs, that advice is asked for", modes=("demo",))
    sets: int = opt(16, "random sets of models", modes=("demo",))
    models: int = opt(8, "models in a random set", modes=("demo",))
    quick: bool = opt(False, "fixed small sizes (one table, two random sets), no verdict", modes=("demo",))
    seed: int = opt(0, "draws the random sets; train: weights and batches")
    out: str = opt("results/scaling_laws", "folder of what the run writes")


# %% the grid of models

GRID = ((16, 1), (16, 3), (16, 8), (24, 2), (24, 6), (32, 1), (32, 3), (32, 8), (48, 1), (48, 2), (48, 5), (64, 1),
        (64, 3), (64, 6), (96, 1), (96, 2), (128, 1), (128, 4))  # fmt: skip  # (width, depth), the last is held out
WINDOW, VOCAB, BATCH, TOKENS = 8, 128, 512, 768_000


class Model(nn.Module):
    """The next byte from the eight before it: their embeddings, side by side, are the residual stream."""

    def __init__(self, W: int, depth: int, g: torch.Generator):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, W // WINDOW), nn.Linear(W, VOCAB, bias=False)
        self.up = nn.ModuleList(nn.Linear(W, 2 * W, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * W, W, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(depth + 1))
        for layer in (self.head, *self.up, *self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=g)
        nn.init.normal_(self.embed.weight, generator=g)

    def forward(self, ids: Tensor) -> Tensor:
        """Bytes (B, WINDOW) -> logits (B, VOCAB)."""
        x = self.embed(ids).flatten(1)  # (B, W)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.relu(up(norm(x)))) / len(self.up) ** 0.5
        return self.head(self.norms[-1](x))


def train(cfg: Config, w: cluster.World) -> None:
    """Write runs.csv: a row for each model of the grid, with its losses on held-out text after eight token counts."""
    text = torch.tensor(list(corpus("sources").encode()), dtype=torch.uint8).clamp(max=VOCAB - 1)
    edge = len(text) * 19 // 20
    rows = lambda at: text[at[:, None] + torch.arange(WINDOW + 1)].long()  # (B, WINDOW + 1)
    held = rows(torch.linspace(edge, len(text) - WINDOW - 1, 8192).long())
    marks = [round(TOKENS / BATCH / 1.6**j) for j in reversed(range(8))]  # steps
    with open(Path(cfg.out) / "runs.csv", "w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["width", "depth", "params", *[mark * BATCH for mark in marks]])
        for i, (W, depth) in enumerate(report.progress(GRID, "models", w)):
            model, losses = Model(W, depth, cluster.generator(cfg.seed, 1, i)), []
            optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
            for step in range(1, marks[-1] + 1):
                optimizer.param_groups[0]["lr"] = 0.016 * (32 / W) ** 0.5 * min(1, step / 50)
                batch = rows(torch.randint(edge - WINDOW, (BATCH,), generator=cluster.generator(cfg.seed, 0, step - 1)))
                optimizer.zero_grad()
                F.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
                optimizer.step()
                if step in marks:
                    with torch.no_grad():
                        losses.append(round(F.cross_entropy(model(held[:, :-1]), held[:, -1]).item(), 5))
            table.writerow([W, depth, sum(p.numel() for p in model.parameters()), *losses])


def read(path: str | Path) -> Tensor:
    """(5, runs): width, depth, N, D, L, from a CSV with a row a model and a column of losses for each D."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    if not rows or list(rows[0])[:3] != ["width", "depth", "params"]:
        raise BadInput(f"{path}: its first line must be width,depth,params, then the token counts of the losses below")
    try:
        runs = [[*map(float, list(row.values())[:3]), float(D), float(L)]
                for row in rows for D, L in list(row.items())[3:] if L]  # fmt: skip
    except (TypeError, ValueError) as e:
        raise BadInput(f"{path}: all but the words width,depth,params must be numbers ({e})") from None
    return torch.tensor(runs, dtype=torch.float64).view(-1, 5).T


# %% the experiment


def advice(runs: Tensor, held: Tensor, C: float) -> dict:
    """Law and hull fitted to runs (5, n): tokens per parameter that each advises, the law's error on held (5, m)."""
    N, D, L = runs[2:]
    law, keep = fit(N, D, L), hull(6 * N * D, L)
    a, b = np.polyfit((6 * N * D)[keep].log(), N[keep].log(), deg=1)  # the line log N = a log C + b
    error = (law.loss(held[2], held[3]) / held[4] - 1).abs().mean().item()
    by_law, by_hull = (C / 6 / N**2 for N in (law.optimum(C)[0], math.exp(a * math.log(C) + b)))
    return {"alpha": law.alpha, "beta": law.beta, "E": math.exp(law.logE), "tokens/N by law": by_law,
            "by hull": by_hull, "error of law": error}  # fmt: skip


def choices(cfg: Config, runs: Tensor) -> dict[str, Tensor]:
    """The runs of a table as other designs of the experiment would have them, then random sets of models."""
    models, ratio, early = runs[2].unique(), runs[0] / runs[1], runs[3] <= runs[3].max() / 4
    if cfg.sets < 2 or not 3 <= cfg.models <= len(models):
        raise BadInput(f"--sets must be 2 or more, --models 3 to {len(models)}; the largest model is held out")
    found = {"all": runs, "first quarter of training": runs[:, early], "the rest": runs[:, ~early],
             "deep, width/depth < 12": runs[:, ratio < 12], "wide, from 40": runs[:, ratio >= 40]}  # fmt: skip
    found = {name: x for name, x in found.items() if len(x[2].unique()) > 2 and (name == "all" or not cfg.quick)}
    for i in range(cfg.sets):
        lot = torch.randperm(len(models), generator=cluster.generator(cfg.seed, i))[: cfg.models]
        found[f"set {i}"] = runs[:, torch.isin(runs[2], models[lot])]
    return found


def judge(points: dict[str, Tensor]) -> tuple[bool, str]:
    """(the claim holds, its numbers), from the advice of law and hull (sets, 2) for each table. Bars fixed before."""
    spreads = [p.log().std(dim=0).tolist() for p in points.values()]
    holds = all(law >= 1.5 * hull and law >= math.log(1.5) for law, hull in spreads)
    return holds, "spread of log(tokens/N): " + "; ".join(f"law {law:.2f}, hull {hull:.2f}" for law, hull in spreads)


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        ours = [Path(__file__).parent / "data" / name for name in ("scaling_laws.csv", "scaling_laws_1.csv")]
        if cfg.quick:
            cfg, ours = replace(cfg, sets=2), ours[:1]
        run, points = report.Run(cfg.out, cfg, w), {}  # table -> (sets, 2)
        if cfg.mode == "train":
            return train(cfg, w)
        for path in [cfg.data] if cfg.data else ours:
            runs = read(path)
            found, held = {}, runs[2] == runs[2].max()  # the largest model is predicted, never fitted
            for name, chosen in report.progress(choices(cfg, runs[:, ~held]).items(), "fits", w):
                found[name] = advice(chosen, runs[:, held], cfg.compute)
                run.log(table=Path(path).name, choice=name, **found[name])
            rows = [[name, *row.values()] for name, row in list(found.items())[: -cfg.sets]]
            w.print(report.table([f"{Path(path).name}, fitted to", *found["all"]], rows) + "\n")
            sets = list(found.values())[-cfg.sets :]
            points[Path(path).name] = torch.tensor([[x["tokens/N by law"], x["by hull"]] for x in sets])

        def draw(figure, axis):
            names = [f"{how}, {name}" for name in points for how in ("law", "hull")]
            for name, values in zip(names, torch.cat([*points.values()], dim=1).T.tolist(), strict=True):
                axis.plot(values, [name] * len(values), "o", alpha=0.6)
            axis.set(xscale="log", xlabel="tokens per parameter advised, one dot a random set of models")

        w.print(report.picture(f"{cfg.out}/scaling_laws.png", draw, figsize=(8, 3)))
        if cfg.quick:
            return w.print("quick: no verdict")
        holds, here = judge(points)
        run.claim("a fitted law's advice hangs on the models fitted; the hull's advice is steadier",
                  "prescriptions are highly sensitive to the design and the checkpoints; the hull is far more robust",
                  here, holds, f"{len(points)} tables, {cfg.sets} sets of {cfg.models}, seed {cfg.seed}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config)
