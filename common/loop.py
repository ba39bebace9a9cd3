"""The plumbing around a training step, as one generator: progress, metrics, checkpoints, resume, SIGTERM."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from common import cluster, report
from common.cli import BadInput, spell

FREE = {"mode", "out", "device", "resume", "save_every", "log_every"}  # settings that cannot change a run's numbers


def facts_of(cfg, same: dict | None = None) -> dict:
    """What a checkpoint may be continued under: its script, all settings but FREE, and `same`."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(cfg).items() if k not in FREE}
    return {"script": Path(sys.modules[type(cfg).__module__].__file__).name, "settings": settings, "same": same or {}}


def check(path: str | Path, was: dict, now: dict) -> None:
    """BadInput, naming each difference: the checkpoint is of another script, of other settings or of other data."""
    if was.get("script") != now["script"]:
        made_by = was.get("script", "another program")
        raise BadInput(f"{path} was written by {made_by}. Pass the --out of a run of {now['script']}.")
    old, new = was["settings"], now["settings"]
    if names := [n for n in {**old, **new} if old.get(n) != new.get(n)]:
        before, asked = (" ".join(spell(n, s.get(n, "(unknown)")) for n in names) for s in (old, new))
        raise BadInput(f"{path} was trained with {before}, this run asks for {asked}. Pass {before}, or another --out.")
    if other := [n for n, value in now["same"].items() if was["same"].get(n) != value]:
        raise BadInput(f"{path} was trained on another {other[0]}. Pass the same one, or another --out.")


def opened(path: str | Path, cfg, *mine: str) -> tuple:
    """(settings, state) of a run to look at: all settings are the run's but FREE and `mine`. BadInput: not ours."""
    state, now = cluster.load(path), facts_of(cfg)
    was, new = state.get("facts", {}), now["settings"]
    theirs = {k: v for k, v in was.get("settings", {}).items() if k not in mine}
    now["settings"] = {k: theirs.get(k, new[k]) for k in new if k not in mine}
    check(path, was | {"settings": theirs}, now)
    return replace(cfg, **{k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items()}), state


def steps(
    cfg, w: cluster.World, run: report.Run, parts: dict, total: int, what: str = "train", checkpoint: str = "",
    same: dict | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield the steps of a training loop, 0 .. total - 1, or from where the checkpoint left off. Collective.

    parts: name -> what a checkpoint holds: anything with state_dict and load_state_dict, or a tensor.
    checkpoint: "" for none, FOLDER/checkpoint.pt that rank 0 writes, or a folder in which every rank writes its part.
    same: what else a resumed run must share, such as a checksum of the text. cfg has resume, save_every, log_every.
    The body may set run.line = {"loss": loss}: every log_every steps it is logged, tensors summed over the ranks.
    After SIGTERM the loop writes a checkpoint and exits with status 0. BadInput: --resume under other settings.
    """
    path, now, first = Path(checkpoint), facts_of(cfg, same), 0
    found = bool(checkpoint) and (path.exists() or Path(f"{path}.previous").exists())
    states = lambda: {name: part if isinstance(part, Tensor) else part.state_dict() for name, part in parts.items()}
    if found and cfg.resume:
        if path.suffix:
            state = cluster.load(path)
            check(path, state.get("facts", {}), now)
        else:
            state = cluster.load_sharded(path, states(), lambda whole, was: check(whole, was, now))
        for name, part in parts.items():
            part.copy_(state[name]) if isinstance(part, Tensor) else part.load_state_dict(state[name])
        first = state["facts"]["step"]
        run.go_on(first)
        w.print(f"going on after step {first} of {total}, from {path}")
    elif checkpoint and cfg.resume:
        w.print(f"no checkpoint at {path}: starting anew")
    elif found and w.main:
        cluster.set_aside(path)
    with cluster.stop_signal() if checkpoint else nullcontext(bool) as stopping:  # bool() is False
        bar = report.progress(range(first, total), what, w, total=total, first=first)
        for step in bar:
            run.line, done = {}, step + 1
            yield step
            if done == total or done % cfg.log_every == 0:
                line = {k: cluster.total(v.detach()) if isinstance(v, Tensor) else v for k, v in run.line.items()}
                run.log(run=what, step=done, **line)
                bar.set_postfix_str(f"loss {float(line['loss']):.3f}" if "loss" in line else "")
            stop = stopping()
            if checkpoint and (stop or done == total or (cfg.save_every and done % cfg.save_every == 0)):
                if not path.suffix:
                    cluster.save_sharded(path, {**states(), "facts": now | {"step": done}})
                elif w.main:
                    cluster.save(path, {**states(), "facts": now | {"step": done}})
            if stop:
                w.print(f"stopped by SIGTERM after step {done}; go on with --resume")
                raise SystemExit(0)
