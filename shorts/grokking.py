"""Grokking on a clock: a net finds the right rule at time log(alpha / alpha_c) / lambda, long after it fits the data.

Paper    Lyu, Jin, Li, Du, Lee and Hu, "Dichotomy of Early and Late Phase Implicit Biases Can Provably Induce Grokking",
         ICLR 2024, arXiv:2311.18817.
Idea     Start a net with large weights, of scale alpha, and train it with a small weight decay lambda. At first the
         weights hardly turn: the net is a kernel machine and fits the data by a wrong rule, which uses all inputs. All
         the while decay shrinks the weights like alpha exp(-lambda t). At time log(alpha / alpha_c) / lambda, with a
         constant alpha_c, they are small, and the net turns to the rule of smallest norm, which uses few inputs.
Here     The claim we check: the time t* when test accuracy rises is log(alpha / alpha_c) / lambda, with one constant
         alpha_c for nine runs. Controls: no weight decay, a kernel machine, a small start. On data that suit the wrong
         rule, the same net forgets what it knew (misgrokking).
Differs  - 2000 inputs and Euler steps of any length, for 100 000 and one learning rate. Time is the sum of the steps.
         - A run fits when every training row has margin 1. The constant alpha_c is fitted.
         - Matrix completion and modular addition are left out.

    python shorts/grokking.py                                           # laptop, 15 s
    python shorts/grokking.py --quick                                   # two runs of the nine, no verdict

Expect   "t* within 5% of log(alpha / 3.0) / lambda" on CPU with seed 0.
Writes   results/grokking/: metrics.jsonl, claim.json, grokking.png
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common import cli, cluster, report
from common.cli import BadInput, opt

# %% the method: C runs train side by side, each on n rows of d inputs, with weights u and v, (C, d) each


def start(alpha: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """u = v, of norm alpha (C,) together. The net is zero there, but its kernel is not."""
    u = (alpha / math.sqrt(2 * d))[:, None].expand(-1, d)  # (C, d)
    return u.clone(), u.clone()


def predictor(u: Tensor, v: Tensor) -> Tensor:
    """The two-layer diagonal net f(x) = sum_k (u_k^2 - v_k^2) x_k, as the weights of the linear function it is."""
    return u**2 - v**2


def pull(w: Tensor, zx: Tensor) -> Tensor:
    """Minus the gradient of the loss, mean log(1 + exp(-y f(x))), in the linear weights w (C, d). zx (n, d) is y x."""
    return torch.sigmoid(-w @ zx.T) @ zx / len(zx)


def velocity(u: Tensor, v: Tensor, g: Tensor, lam: Tensor, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient flow du/dt, dv/dt of the loss + lambda/2 (|u|^2 + |v|^2). g = pull(w, zx), lam (C,), at = (u, v).

    So u v = alpha^2 / 2d exp(-2 lambda t) exactly, whatever the data are. This is the clock."""
    return 2 * at[0] * g - lam[:, None] * u, -2 * at[1] * g - lam[:, None] * v


# %% the control: a kernel machine, which is the net linearised at its start


def model(u: Tensor, v: Tensor, u0: Tensor, v0: Tensor, kernel: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(linear weights w, the point `at` where gradients are taken): of the kernel machine where kernel (C,) is true."""
    k = kernel[:, None]
    w = torch.where(k, 2 * u0 * u - 2 * v0 * v, predictor(u, v))  # (C, d)
    return w, (torch.where(k, u0, u), torch.where(k, v0, v))


# %% settings


@dataclass
class Config:
    alpha: tuple = opt((32.0, 128.0, 512.0), "scales of the start")
    lam: tuple = opt((0.01, 0.003, 0.001), "weight decays")
    d: int = opt(2000, "inputs")
    n: int = opt(100, "training rows; 1000 more are for testing")
    gamma: float = opt(4.5, "distance between the classes of the misgrokking data")
    quick: bool = opt(False, "fixed small sizes (two scales, one decay, half the inputs), no verdict")
    seed: int = opt(0, "seed of the data")
    out: str = opt("results/grokking", "folder of what the run writes")

    def __post_init__(self):
        if len(self.alpha) < 2 or min(*self.alpha, *self.lam) <= 0:
            raise BadInput("--alpha needs two scales or more, and they and --lam must be positive")


# %% data


def sparse_data(rows: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signs x (rows, d), and y = the majority of the first 3 of them. Few inputs matter, which suits the late rule."""
    x = torch.randint(0, 2, (rows, d), generator=g).double() * 2 - 1
    return x, x[:, :3].sum(dim=1).sign()


def dense_data(rows: int, d: int, gamma: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian x, moved apart by gamma along a random direction. All inputs matter, which suits the early rule."""
    direction = F.normalize(torch.randn(d, generator=g).double(), dim=0)
    x = torch.randn(rows, d, generator=g).double()
    y = (x @ direction).sign()
    return x + gamma / 2 * y[:, None] * direction, y


# %% training


def stable_step(w: Tensor, zx: Tensor, top: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """A step (C,) that is stable: one over the smaller of two bounds of the loss's Gauss-Newton curvature, its trace
    and a product of largest eigenvalues. top is the largest eigenvalue of zx^T zx / n."""
    p = torch.sigmoid(w @ zx.T)  # (C, n)
    second, size = p * (1 - p), at[0] ** 2 + at[1] ** 2  # (C, n), (C, d)
    trace = (size @ (zx**2).T * second).mean(dim=1)
    return 0.25 / torch.minimum(trace, size.amax(dim=1) * second.amax(dim=1) * top)


def flow(alpha: Tensor, lam: Tensor, kernel: Tensor, horizon: Tensor, train: tuple, test: tuple, bar) -> list[Tensor]:
    """Train C runs until the clock of each, the sum of its steps, reaches its horizon (C,). Returns three tensors
    (records, C): times, the share of training rows with margin 1 or more, the test accuracy."""
    zx, z_test = (y[:, None] * x for x, y in (train, test))
    top = torch.linalg.matrix_norm(zx, 2) ** 2 / len(zx)
    u, v = u0, v0 = start(alpha, zx.shape[1])
    t, records = torch.zeros_like(alpha), []
    for k in range(100_000):
        w, at = model(u, v, u0, v0, kernel)
        if k % 5 == 0:
            fits, right = (w @ zx.T >= 1).double(), (w @ z_test.T).sign() / 2 + 0.5  # a tie counts half
            records.append((t, fits.mean(dim=1), right.mean(dim=1)))
            if (t >= horizon).all():
                break
        g = pull(w, zx)
        accurate = 0.01 / (lam + 2 * g.abs().amax(dim=1))  # no weight changes by more than 1 %
        eta = torch.minimum(stable_step(w, zx, top, at), accurate).minimum(horizon - t)  # (C,)
        du, dv = velocity(u, v, g, lam, at)
        u, v, t = u + eta[:, None] * du, v + eta[:, None] * dv, t + eta
        bar.update(int(100 * (t / horizon).min()) - bar.n)
    return [torch.stack(record) for record in zip(*records, strict=True)]


# %% the experiment


def first(times: Tensor, ok: Tensor) -> float:
    """The first recorded time at which ok holds; infinity if there is none."""
    return times[ok][0].item() if ok.any() else math.inf


def experiment(cfg: Config, w: cluster.World) -> list[dict]:
    """All runs: the grid, its controls at the middle alpha and the smallest lambda, and two on the misgrokking data."""
    middle, least = sorted(cfg.alpha)[len(cfg.alpha) // 2], min(cfg.lam)
    sparse = [("no decay", middle, 0.0, False), ("kernel", middle, least, True), ("small start", 0.1, least, False)]
    sparse = [("net", alpha, lam, False) for alpha in cfg.alpha for lam in cfg.lam] + sparse
    dense = [("misgrok", middle, least, False), ("misgrok kernel", middle, least, True)]
    found = []
    for runs in (sparse, dense):
        g, rows = cluster.generator(cfg.seed, len(found)), cfg.n + 1000
        x, y = dense_data(rows, cfg.d, cfg.gamma, g) if runs is dense else sparse_data(rows, cfg.d, g)
        alpha, lam = (torch.tensor([r[i] for r in runs], dtype=torch.float64) for i in (1, 2))
        horizon = (alpha.clamp(min=1).log() + 1) / torch.where(lam > 0, lam, least)
        kernel = torch.tensor([r[3] for r in runs])
        train, test = (x[: cfg.n], y[: cfg.n]), (x[cfg.n :], y[cfg.n :])
        with report.progress(None, "train", w, total=100) as bar:
            times, fits, accuracy = flow(alpha, lam, kernel, horizon, train, test, bar)
        for i, (name, *_) in enumerate(runs):
            t, right = times[:, i], accuracy[:, i]
            fit, star = first(t, fits[:, i] == 1), first(t, right >= 0.95)
            halfway, end = right[t <= star / 2][-1].item(), right[-1].item()
            found.append({"run": name, "alpha": alpha[i].item(), "lambda": lam[i].item(), "fits at": fit, "t*": star,
                          "accuracy at t*/2": halfway, "at the end": end, "highest": right.max().item(),
                          "times": t.tolist(), "accuracy": right.tolist()})  # fmt: skip
    return found


def fit_scale(alpha: Tensor, lam: Tensor, t: Tensor) -> tuple[float, Tensor, Tensor]:
    """alpha (A,), lam (L,), times t (A, L) -> the constant alpha_c of t = log(alpha / alpha_c) / lambda that fits best,
    t over that law (A, L), and the slope of lambda t in log(alpha) for each lambda (L,), which is 1 in theory."""
    x, clock = alpha.log(), lam * t
    shift = (x[:, None] - clock).mean()  # log alpha_c; minus infinity if a run never gets there
    slope = ((x - x.mean())[:, None] * clock).sum(dim=0) / ((x - x.mean()) ** 2).sum()
    return shift.exp().item(), clock / (x - shift)[:, None], slope


def judge(cfg: Config, found: list[dict]) -> tuple[list[list], float]:
    """(what is checked, number, bar, met) as rows, and alpha_c. The bars were fixed before the runs."""
    net, other = [r for r in found if r["run"] == "net"], {r["run"]: r for r in found}
    kernel, small, mis, mis_kernel = (other[k] for k in ("kernel", "small start", "misgrok", "misgrok kernel"))
    alpha, lam, t = (torch.tensor(x, dtype=torch.float64) for x in (cfg.alpha, cfg.lam, [r["t*"] for r in net]))
    scale, ratio, slope = fit_scale(alpha, lam, t.view(len(alpha), -1))
    away = [abs(r["accuracy at t*/2"] - kernel["accuracy at t*/2"]) for r in net if r["alpha"] == max(cfg.alpha)]
    rows = [
        ["t* off the law, worst run", (ratio - 1).abs().max().item(), "<=", 0.1],
        ["slope off 1, worst lambda", (slope - 1).abs().max().item(), "<=", 0.05],
        ["t* / fitting time, least", min(r["t*"] / r["fits at"] for r in net), ">=", 100],
        ["the same after a small start", small["t*"] / small["fits at"], "<=", 2],
        ["largest alpha at t*/2, off the kernel machine", max(away), "<=", 0.05],
        ["best accuracy without decay", other["no decay"]["highest"], "<=", 0.7],
        ["best accuracy of the kernel machine", kernel["highest"], "<=", 0.7],
        ["misgrokking, accuracy lost", mis["highest"] - mis["at the end"], ">=", 0.1],
        ["the same, kernel machine", mis_kernel["highest"] - mis_kernel["at the end"], "<=", 0.02],
    ]
    return [[*row, row[1] <= row[3] if row[2] == "<=" else row[1] >= row[3]] for row in rows], scale


def draw(found: list[dict], scale: float, axis) -> None:
    """Test accuracy on the clock lambda t: a colour for each alpha, a line style for each lambda, controls in grey."""
    alphas, lams = (sorted({r[k] for r in found if r["run"] == "net"}) for k in ("alpha", "lambda"))
    for r in found:
        clock, name = [t * (r["lambda"] or lams[0]) for t in r["times"]], r["run"]
        if name == "net":
            i, j = alphas.index(r["alpha"]), lams.index(r["lambda"])
            label = f"alpha {r['alpha']:g}" if j == 0 else None
            axis.plot(clock, r["accuracy"], ("-", "--", ":")[j % 3], color=f"C{i}", label=label)
            axis.axvline(math.log(r["alpha"] / scale) if scale else 0, color=f"C{i}", lw=0.5)
        elif name in (style := {"no decay": "-", "kernel": ":", "misgrok": "-."}):
            axis.plot(clock, r["accuracy"], style[name], color="0.5", label=name)
    axis.set(xlabel="lambda t (vertical lines: log(alpha / alpha_c))", ylabel="test accuracy", ylim=(0.4, 1.02))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        if cfg.quick:
            cfg = replace(cfg, alpha=(32.0, 128.0), lam=(0.01,), d=1000)
        run = report.Run(cfg.out, cfg, w)
        found = experiment(cfg, w)
        for r in found:
            run.log(**{key: None if value == math.inf else value for key, value in r.items()})
        columns = list(found[0])[1:7]
        cells = [[r["run"], *("-" if r[c] == math.inf else f"{r[c]:.4g}" for c in columns)] for r in found]
        w.print(report.table(["run", *columns], cells) + "\n")
        rows, scale = judge(cfg, found)
        w.print(report.picture(f"{cfg.out}/grokking.png", lambda _, axis: draw(found, scale, axis), figsize=(9, 4)))
        if cfg.quick:
            return w.print("quick: no verdict")
        w.print("\n" + report.table(["check", "number", "", "bar", "met"], rows) + "\n")
        run.claim(
            "large start, small decay: test accuracy rises at log(alpha / alpha_c) / lambda, one alpha_c for all runs",
            "training is trapped at the kernel's rule for long, then turns sharply to the rule of smallest norm",
            f"t* within {rows[0][1]:.0%} of log(alpha / {scale:.1f}) / lambda, slope within {rows[1][1]:.0%} of 1; "
            f"{sum(row[-1] for row in rows)} of {len(rows)} checks met",
            all(row[-1] for row in rows),
            f"d {cfg.d}, n {cfg.n}, alpha {cfg.alpha}, lambda {cfg.lam}, seed {cfg.seed}",
        )


if __name__ == "__main__":
    cli.run(main, Config)
