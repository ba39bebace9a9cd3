"""Polyak averaging: the mean of SGD's iterates lies nearer to the solution than the last of them.

Paper    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, doi:10.1137/0330046.
Idea     SGD at a constant learning rate comes near the solution and then jumps around it, because every sample pulls in
         another direction. The mean of many iterates cancels the jumps. Training itself never sees the mean.
Here     The claim we check: on noisy least squares, the mean over the second half of a run has at most a fifth of the
         last iterate's excess loss. Control: without noise the mean must be the worse one.
Differs  The learning rate is constant, and the mean starts at half of the run.

    python shorts/TEMPLATE.py                                           # laptop, 5 s
    python shorts/TEMPLATE.py --quick                                   # a tenth of the steps, no verdict
    torchrun --nproc-per-node 2 shorts/TEMPLATE.py                      # each process trains half of the runs

Expect   "excess loss 0.025 for the mean" on CPU with seed 0, for 1 or 2 processes.
Writes   results/TEMPLATE/: metrics.jsonl, claim.json, TEMPLATE.png
"""

from dataclasses import dataclass

import torch

from common import cli, cluster, report

# %% the method


def running_mean(mean: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    """The mean of n iterates, from the mean of the first n - 1 of them and the newest, x. All have one shape."""
    return mean + (x - mean) / n


# %% settings


@dataclass
class Config:
    steps: int = cli.opt(2000, "SGD steps, one sample each")
    lr: float = cli.opt(0.02, "learning rate")
    quick: bool = cli.opt(False, "a tenth of the steps, no verdict")
    seed: int = cli.opt(0, "seed of the solutions and the samples")
    out: str = cli.opt("results/TEMPLATE", "folder of what the run writes")

    def __post_init__(self):
        if self.steps < 10:
            raise cli.BadInput("--steps must be 10 or more")


# %% the experiment


def train(cfg: Config, w: cluster.World, noise: float) -> torch.Tensor:
    """Excess loss of the last iterate and of the mean after every step, averaged over 64 runs: (steps, 2)."""
    steps = cfg.steps // 10 if cfg.quick else cfg.steps
    solution = torch.randn(64, 20, generator=cluster.generator(cfg.seed)).double()[w.rank :: w.size]  # (R, 20): R runs
    x = mean = torch.zeros_like(solution)
    losses = []
    for step in report.progress(range(steps), f"noise {noise:g}", w):
        drawn = torch.randn(64, 21, generator=cluster.generator(cfg.seed, step + 1)).double()[w.rank :: w.size]
        a, y = drawn[:, :20], (drawn[:, :20] * solution).sum(dim=1) + noise * drawn[:, 20]  # (R, 20), (R,)
        x = x - cfg.lr * ((a * x).sum(dim=1) - y)[:, None] * a
        mean = running_mean(mean, x, max(1, step + 1 - steps // 2))  # before half of the run it is x itself
        losses.append(torch.stack([(z - solution).square().sum() for z in (x, mean)]))
    return cluster.total(torch.stack(losses)) / 64


def judge(last: float, mean: float, last_clean: float, mean_clean: float) -> bool:
    """The claim, from the end losses of the last iterate and of the mean, with noise and without it."""
    return mean <= last / 5 and mean_clean > last_clean


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:  # more processes give the same numbers
        run = report.Run(cfg.out, cfg, w)
        noisy, clean = (train(cfg, w, noise) for noise in (1.0, 0.0))  # (steps, 2) each
        last, mean, last_clean, mean_clean = ends = torch.cat([noisy[-1], clean[-1]]).tolist()
        here = f"excess loss {mean:.3f} for the mean, {last:.3f} for the last iterate"
        w.print(f"{here}; without noise {mean_clean:.1e} and {last_clean:.1e}")
        run.log(last=last, mean=mean, last_clean=last_clean, mean_clean=mean_clean)

        def draw(figure, axis):
            axis.legend(axis.plot(noisy), ("last iterate", "mean since half of the run"), frameon=False)
            axis.set(xlabel="step", ylabel="excess loss, with noise", yscale="log")

        if w.main:
            w.print(report.picture(f"{cfg.out}/TEMPLATE.png", draw, figsize=(7, 4)))
        if cfg.quick:
            return w.print("quick: no verdict")
        run.claim("the mean of SGD's iterates has a fifth of the last iterate's loss, where there is noise",
                  "averaging achieves the highest possible rate of convergence", here, judge(*ends),
                  f"64 runs, {cfg.steps} steps, seed {cfg.seed}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config)
