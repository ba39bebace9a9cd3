"""A tiny training script on common.loop: a vector follows the mean of rows that the ranks share. For the tests."""

import time
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from common import cli, cluster, loop, report
from common.cli import opt


@dataclass
class Config:
    mode: str = opt("train", "what to do", choices=("train", "look"), positional=True)
    steps: int = opt(60, "steps")
    lr: float = opt(0.1, "rate", modes=("train",))
    sharded: bool = opt(False, "every rank writes its part", modes=("train",))
    pause: float = opt(0.0, "seconds a step sleeps")
    device: str = opt("cpu", "where to run", choices=("cpu", "cuda", "auto"))
    out: str = opt("results/tiny", "folder")
    resume: bool = opt(False, "go on")
    save_every: int = opt(7, "steps between checkpoints")
    log_every: int = opt(1, "steps between lines")


def main(cfg: Config) -> None:
    with cluster.world(cfg.device) as w:
        if cfg.mode == "look":
            seen, state = loop.opened(f"{cfg.out}/checkpoint.pt", cfg)
            return w.print(f"lr {seen.lr} after {state['facts']['step']} steps, x[0] {state['x'][0]:.6f}")
        run, x = report.Run(cfg.out, cfg, w), torch.zeros(8, dtype=torch.float64)
        if cfg.sharded:
            mesh = init_device_mesh("cpu", (w.size,))
            place = lambda t: distribute_tensor(t, mesh, [Shard(0)])
        else:
            place = lambda t: t
        x = place(x)
        path = f"{cfg.out}/checkpoint" + ("" if cfg.sharded else ".pt")
        for step in loop.steps(cfg, w, run, {"x": x}, cfg.steps, checkpoint=path, same={"text": 1}):
            rows = torch.randn(12, 8, generator=cluster.generator(0, step), dtype=torch.float64)
            mean = cluster.total(rows[w.rank :: w.size].sum(dim=0)) / 12
            x.mul_(1 - cfg.lr).add_(place(mean), alpha=cfg.lr)
            whole = x.full_tensor() if cfg.sharded else x
            run.line = {"loss": whole.square().sum() / w.size, "step_twice": 2 * step}
            time.sleep(cfg.pause)


if __name__ == "__main__":
    cli.run(main, Config)
