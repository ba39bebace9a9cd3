"""The marginal value of momentum: at a small learning rate SGD with momentum is SGD with a larger one.

Paper    Wang, Malladi, Wang, Lyu and Li, "The Marginal Value of Momentum for Small Learning Rate SGD", ICLR 2024,
         arXiv:2307.15196.
Idea     SGD with momentum beta and learning rate gamma moves like plain SGD at eta = gamma / (1 - beta). The buffer
         hands each gradient out over some 1 / (1 - beta) steps, and in so few small steps the loss hardly changes. So
         momentum averages no noise away. It pays only where curvature, and not noise, bounds the learning rate.
Here     The claim we check has two halves. With equal minibatches the two optimizers part by an amount of order eta,
         while two SGD runs on different minibatches part by order sqrt(eta). And with both tuned over one grid of eta,
         momentum changes nothing at a small batch and gains at a large one. Control: momentum at gamma = eta.
Differs  - A two-layer net learns a teacher from noisy samples, for ResNet-50 on ImageNet, CIFAR-10 and RoBERTa-large.
         - We measure distances with shared minibatches, where the theorem has expectations of test functions.
         - The largest batch is 512. The long horizon and SVAG are left out.

    python shorts/momentum.py                                           # laptop, half a minute
    python shorts/momentum.py --quick                                   # shorter runs, no verdict

Expect   "tuned error, SGDM over SGD: 1.005 at batch 4, 0.870 at 512" on CPU with seed 0.
Writes   results/momentum/: metrics.jsonl, claim.json, momentum.png
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common import cli, cluster, report
from common.cli import BadInput, opt

# %% the method


def sgdm_step(x: Tensor, m: Tensor, g: Tensor, eta, beta) -> tuple[Tensor, Tensor]:
    """Equation 1, m' = beta m + g and x' = x - gamma m', at gamma = (1 - beta) eta. beta = 0 is SGD at eta.

    x parameters, m momentum buffer, g gradient of a minibatch at x. Why it is SGD: let the buffer hand out all it holds
    at once. That point, z = x - eta beta m, moves by z' = z - eta g. So momentum only changes where the gradient is
    taken, at x in place of z, and x - z vanishes with eta.
    """
    m = beta * m + g
    return x - (1 - beta) * eta * m, m


# %% settings


@dataclass
class Config:
    beta: float = opt(0.9, "momentum")
    batches: tuple = opt((4, 512), "the small and the large batch")
    steps: tuple = opt((2000, 500), "training steps of the tuned runs at these two batches")
    replicates: int = opt(2, "starts and streams of minibatches of the tuned runs")
    pairs: int = opt(8, "starts and streams of minibatches of the trajectories")
    horizon: float = opt(4.0, "length of the trajectories, steps times eta")
    noise: float = opt(0.7, "standard deviation of the noise on the labels")
    quick: bool = opt(False, "fixed small sizes (shorter runs and fewer of them), no verdict")
    seed: int = opt(0, "seed of teacher, starts and data")
    out: str = opt("results/momentum", "folder of what the run writes")

    def __post_init__(self):
        if not 0 < self.beta < 1 or len(self.batches) != 2 or len(self.steps) != 2:
            raise BadInput("--beta must lie between 0 and 1; --batches and --steps are two numbers each")


# %% model and data: S replicates of C runs train side by side, R = S C; d = 32 inputs, h = 64 hidden units


def net(p: list[Tensor], x: Tensor) -> Tensor:
    """f(x) = a' tanh(W' x) of R nets. p = [W (R, d, h), a (R, h, 1)], x (R, B, d) -> (R, B)."""
    return (torch.tanh(x @ p[0]) @ p[1])[..., 0]


def start(runs: int, h: int, g: torch.Generator) -> list[Tensor]:
    """Random weights of `runs` nets with h hidden units."""
    return [torch.randn(runs, 32, h, generator=g), torch.randn(runs, h, 1, generator=g) / math.sqrt(h)]


class Teacher:
    """A net of 8 hidden units with noisy labels. Input k has variance proportional to 1 / k, for many curvatures."""

    def __init__(self, cfg: Config):
        self.p, self.noise = start(1, 8, cluster.generator(cfg.seed, 0)), cfg.noise
        scale = torch.arange(1, 33).rsqrt()
        self.scale = scale / scale.norm()
        self.test = torch.randn(1, 2000, 32, generator=cluster.generator(cfg.seed, 1)) * self.scale

    def batch(self, S: int, B: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh samples: x (S, B, d) and noisy y (S, B)."""
        x = torch.randn(S, B, 32, generator=g) * self.scale
        clean = net([q.expand(S, -1, -1) for q in self.p], x)
        return x, clean + self.noise * torch.randn(S, B, generator=g)

    def error(self, p: list[Tensor]) -> Tensor:
        """Mean squared distance from the clean teacher on 2000 held-out inputs, (R,); 1e9 after divergence."""
        off = net(p, self.test.expand(len(p[0]), -1, -1)) - net(self.p, self.test)
        return off.square().mean(dim=1).nan_to_num(1e9, 1e9)


# %% training


def train(
    teacher: Teacher, eta: Tensor, beta: Tensor, S: int, B: int, steps: int, decay: bool, seeds: tuple, w: cluster.World
) -> list[Tensor]:
    """Train S replicates of C runs, with eta and beta (C,). The C runs of a replicate share its start, drawn from
    seeds[0], and its minibatches, drawn from seeds[1]. decay: eta falls linearly to 0. Returns p, each (S C, ...)."""
    C = len(eta)
    p = [q.repeat_interleave(C, dim=0) for q in start(S, 64, cluster.generator(*seeds[0]))]
    m, g = [torch.zeros_like(q) for q in p], cluster.generator(*seeds[1])
    eta, beta = (r.repeat(S)[:, None, None] for r in (eta, beta))  # (R, 1, 1)
    for k in report.progress(range(steps), f"batch {B}", w):
        x, y = (r.repeat_interleave(C, dim=0) for r in teacher.batch(S, B, g))  # (R, B, d), (R, B)
        p = [q.requires_grad_() for q in p]
        loss = (net(p, x) - y).square().mean(dim=1).sum()  # a sum over R runs, which share no weights
        now = eta * (1 - k / steps) if decay else eta
        for i, grad in enumerate(torch.autograd.grad(loss, p)):
            p[i], m[i] = sgdm_step(p[i].detach(), m[i], grad, now, beta)
    return p


# %% the experiment


def distance(p: list[Tensor], q: list[Tensor]) -> float:
    """Root mean square over runs of the Euclidean distance between their parameters."""
    squares = sum((a - b).square().flatten(1).sum(dim=1) for a, b in zip(p, q, strict=True))  # (runs,)
    return squares.mean().sqrt().nan_to_num(1e9, 1e9).item()


def order(eta: list, y: list) -> float:
    """The least-squares slope of log y against log eta."""
    x, y = (torch.tensor(r, dtype=torch.float64).log() for r in (eta, y))
    return (((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum()).item()


def trajectories(cfg: Config, teacher: Teacher, w: cluster.World) -> list[dict]:
    """The distance from SGD after horizon / eta steps at the small batch, for eta = 2^-5 ... 2^-9."""
    rows, B = [], cfg.batches[0]
    beta, starts, data, others = (
        torch.tensor([0.0, cfg.beta, cfg.beta]),
        *((cfg.seed, *x) for x in ((2,), (3, 0), (3, 1))),
    )
    for eta in (2.0**-i for i in range(5, 7 if cfg.quick else 10)):
        steps, etas = round(cfg.horizon / eta), torch.tensor([eta, eta, eta / (1 - cfg.beta)])
        runs = train(teacher, etas, beta, cfg.pairs, B, steps, False, (starts, data), w)
        other = train(teacher, etas[:1], beta[:1], cfg.pairs, B, steps, False, (starts, others), w)
        sgd, sgdm, larger = ([q[i::3] for q in runs] for i in range(3))
        ways = {"momentum": sgdm, "other minibatches": other, "gamma = eta": larger}
        rows.append({"eta": eta, "steps": steps} | {name: distance(sgd, p) for name, p in ways.items()})
    return rows


def tuned(cfg: Config, teacher: Teacher, w: cluster.World) -> list[dict]:
    """The best error of both optimizers over one grid of eta, half powers of two from 2^-7 to 2^2, at both batches."""
    grid, rows = [2 ** (i / 2) for i in range(-14, 5)], []
    eta, beta = torch.tensor(grid * 2), torch.tensor([0.0, cfg.beta]).repeat_interleave(len(grid))
    for B, steps in zip(cfg.batches, cfg.steps, strict=True):
        p = train(teacher, eta, beta, cfg.replicates, B, steps, True, ((cfg.seed, 2), (cfg.seed, 3, 2)), w)
        sgd, sgdm = teacher.error(p).view(cfg.replicates, 2, -1).mean(dim=0).tolist()  # (2, len(grid))
        i, j = sgd.index(min(sgd)), sgdm.index(min(sgdm))
        rows.append({"batch": B, "SGD": sgd[i], "SGDM": sgdm[j], "ratio": sgdm[j] / sgd[i], "at eta, SGD": grid[i],
                     "at eta, SGDM": grid[j], "SGDM at SGD's eta": sgdm[i], "SGD at SGDM's eta": sgd[j],
                     "grid": grid, "errors": [sgd, sgdm]})  # fmt: skip
    return rows


def judge(paths: list[dict], rows: list[dict]) -> list[list]:
    """Rows of (what is checked, number, least, most, met). The bars were fixed before the runs."""
    eta, last, (small, large) = [r["eta"] for r in paths], paths[-1], rows
    checks = [
        ["order in eta, momentum", order(eta, [r["momentum"] for r in paths]), 0.8, 1.2],
        ["order in eta, other minibatches", order(eta, [r["other minibatches"] for r in paths]), 0.35, 0.65],
        ["smallest eta: momentum / other minibatches", last["momentum"] / last["other minibatches"], 0, 0.2],
        ["smallest eta: gamma = eta / momentum", last["gamma = eta"] / last["momentum"], 5, math.inf],
        ["tuned error, SGDM / SGD, small batch", small["ratio"], 0.97, 1.03],
        ["tuned error, SGDM / SGD, large batch", large["ratio"], 0, 0.95],
        ["large batch: SGDM's best eta / SGD's", large["at eta, SGDM"] / large["at eta, SGD"], 2, math.inf],
        ["there: SGD's error / its best", large["SGD at SGDM's eta"] / large["SGD"], 10, math.inf],
    ]
    return [[*row, row[2] <= row[1] <= row[3]] for row in checks]


def draw(paths: list[dict], rows: list[dict], axes) -> None:
    """Left: distances from SGD against eta. Right: error against eta, SGD solid, SGDM dashed."""
    left, right = axes
    eta = [r["eta"] for r in paths]
    for name, look in (("momentum", "o-"), ("other minibatches", "s-"), ("gamma = eta", "x--")):
        left.plot(eta, [r[name] for r in paths], look, label=name)
    left.set(xscale="log", yscale="log", xlabel="eta", ylabel="distance from SGD, in parameters", ylim=(1e-3, 10))
    left.minorticks_off()
    left.set_xticks(eta, [f"1/{round(1 / e)}" for e in eta])
    left.legend(frameon=False)
    for i, r in enumerate(rows):
        for name, errors, look in zip(("SGD", "SGDM"), r["errors"], ("-", "--"), strict=True):
            right.plot(r["grid"], errors, look, color=f"C{i}", label=f"batch {r['batch']}, {name}")
    low, top = 0.8 * min(r["SGDM"] for r in rows), 2 * max(r["errors"][0][0] for r in rows)
    right.set(xscale="log", yscale="log", xlabel="eta, peak of a linear decay", ylabel="error", ylim=(low, top))
    right.legend(frameon=False, fontsize=8)


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        if cfg.quick:
            cfg = replace(cfg, steps=(100, 25), replicates=1)
        run, teacher = report.Run(cfg.out, cfg, w), Teacher(cfg)
        paths, rows = trajectories(cfg, teacher, w), tuned(cfg, teacher, w)
        for r in paths + rows:
            run.log(**r)
        for table in (paths, rows):
            shown = [[f"{value:.4g}" for value in list(r.values())[:8]] for r in table]
            w.print(report.table(list(table[0])[:8], shown) + "\n")
        look = {"ncols": 2, "figsize": (12, 4), "gridspec_kw": {"wspace": 0.3}}
        w.print(report.picture(f"{cfg.out}/momentum.png", lambda _, axes: draw(paths, rows, axes), **look))
        if cfg.quick:
            return w.print("quick: no verdict")
        checks, small, large = judge(paths, rows), rows[0]["ratio"], rows[1]["ratio"]
        shown = [[row[0], f"{row[1]:.3g}", *row[2:]] for row in checks]
        w.print("\n" + report.table(["check", "number", "least", "most", "met"], shown) + "\n")
        gain = "holds" if small >= 0.97 and large <= 0.95 else "does not hold"
        w.print(f"one-sided form, no gain at the small batch and at least 5% at the large one: {gain}")
        run.claim(
            "momentum is a larger learning rate: the paths part by order eta; no change at a small batch, "
            "a gain at a large one",
            "SGD and SGDM behave alike over short and long horizons when eta is small and noise dominates",
            f"tuned error, SGDM over SGD: {small:.3f} at batch {cfg.batches[0]}, {large:.3f} at {cfg.batches[1]}; "
            f"order {checks[0][1]:.2f} in eta, other minibatches {checks[1][1]:.2f}",
            all(row[-1] for row in checks),
            f"batches {cfg.batches}, steps {cfg.steps}, beta {cfg.beta}, seed {cfg.seed}, CPU",
        )


if __name__ == "__main__":
    cli.run(main, Config)
