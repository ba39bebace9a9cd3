"""Process group, device, seeds and checkpoints, on one process or many, under torchrun or plain python."""

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from common.cli import BadInput


class BadLaunch(BadInput, RuntimeError):
    """More ranks than GPUs on this node."""


@dataclass(frozen=True)
class World:
    rank: int  # 0..size-1 over all nodes
    size: int  # processes in the job
    device: torch.device  # this process's device

    @property
    def main(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0

    def print(self, *words) -> None:
        """print() on rank 0 only."""
        if self.main:
            print(*words, flush=True)


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join torchrun's group, or make a group of one; device is auto, cpu or cuda. RuntimeError: too few GPUs here."""
    rank, size, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    gpus = torch.cuda.device_count()
    if cuda and local >= gpus:
        raise BadLaunch(f"local rank {local} has no GPU of {gpus} here. Lower --nproc-per-node or pass --device cpu.")
    dev = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(dev)
    meet = {} if "RANK" in os.environ else {"store": dist.HashStore()}  # alone: in memory, no port to clash on
    dist.init_process_group(
        "nccl" if cuda else "gloo", rank=rank, world_size=size, device_id=dev if cuda else None, **meet
    )
    done = False
    try:
        yield World(rank, size, dev)
        done = True
    finally:
        if done or size == 1:  # a failed rank exits at once, so torchrun can stop its peers
            gc.collect()  # a DDP module in a reference cycle would outlive its group and abort the process at exit
            dist.destroy_process_group()


@contextmanager
def workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of n fresh processes, for runs that share nothing. Ctrl-C, SIGTERM or an error here ends them at once."""
    heed = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # a terminal's Ctrl-C reaches them too; we decide
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), *heed) as pool:
            try:
                yield pool
            except BaseException:  # else the pool would first finish what it was given
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- seeds and replicas


def generator(*seed: int) -> torch.Generator:
    """A CPU generator for these numbers, e.g. (cfg.seed, step). Equal numbers give equal draws on every device."""
    mixed = 0x9E3779B97F4A7C15
    for s in seed:  # splitmix64, so that (0, 1) and (1, 0) are unrelated streams
        mixed = ((mixed ^ (s & (2**64 - 1))) * 0xBF58476D1CE4E5B9) % 2**64
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed % 2**63)


def total(x: Tensor, group=None) -> Tensor:
    """Sum of x over the ranks of `group` (default: all), as a new tensor."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


@contextmanager
def stop_signal(device: torch.device) -> Iterator:
    """Yield stopping() -> bool: True on all ranks once SIGTERM has reached any of them.

    A scheduler's SIGTERM then ends the loop at one step on every rank, in time to write a checkpoint. Collective.
    """
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))

    def stopping() -> bool:
        return bool(asked) if dist.get_world_size() == 1 else bool(total(torch.tensor(len(asked), device=device)))

    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- checkpoints of whole state dicts

_FULL = "cannot write {}: {}. Free space or pass --out DIR; earlier checkpoints remain."


def _rotate(new: Path, path: Path) -> None:
    """Make the finished `new` the current `path`; what stood there becomes path.previous."""
    if path.exists():
        shutil.rmtree(f"{path}.previous", ignore_errors=True)  # a folder must go first; a file is replaced
        os.replace(path, f"{path}.previous")
    os.replace(new, path)


def save(path: str | Path, state: dict) -> None:
    """Write `state` atomically, on one rank; the checkpoint before stays as PATH.previous. OSError: cannot write."""
    path, tmp = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        _rotate(tmp, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
        with suppress(OSError):
            tmp.unlink()
        raise OSError(_FULL.format(path, e)) from e


def set_aside(path: str | Path) -> None:
    """Before a fresh run: an earlier run's checkpoints get .old at their end."""
    for p in (str(path), f"{path}.previous"):
        if Path(p).exists():
            shutil.rmtree(p + ".old", ignore_errors=True)  # a folder must go first; a file is replaced
            os.replace(p, p + ".old")


def _read(path: Path) -> dict:
    if not zipfile.is_zipfile(path):
        raise ValueError("not a complete file (its index, written last, is missing)")
    with zipfile.ZipFile(path) as z:  # torch.load does not verify every byte; the archive's checksums do
        bad = z.testzip()
    if bad:
        raise ValueError(f"damaged record {bad}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: str | Path) -> dict:
    """The state written by save(), on the CPU. Falls back to PATH.previous, with a warning, if PATH is damaged.

    FileNotFoundError: there is none. BadInput: there are only damaged ones.
    """
    found = [p for p in (Path(path), Path(f"{path}.previous")) if p.exists()]
    if not found:
        raise FileNotFoundError(f"no checkpoint at {path}. Train without --resume first, or pass the right --out.")
    damage = []
    for p in found:
        try:
            state = _read(p)
        except Exception as e:  # zipfile, pickle and torch each have their own
            damage.append(f"{p} is damaged: {e}")
            continue
        if damage and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f"warning: {damage[0]}. Using {p} instead.", flush=True)
        return state
    raise BadInput("; ".join(damage) + ". Delete it and start again without --resume.")


# ---- checkpoints of sharded state (torch.distributed.checkpoint): every rank writes its part


def save_sharded(folder: str | Path, state: dict) -> None:
    """Write a state dict whose tensors may be DTensors, atomically. Collective. OSError: cannot write."""
    folder, tmp = Path(folder), Path(f"{folder}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(state, checkpoint_id=tmp)  # ends with a barrier
    except dcp.api.CheckpointException as e:  # on every rank; it tells what happened on which
        why = "; ".join(f"rank {r}: {error}" for r, (error, _) in e.failures.items())
        if dist.get_rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(_FULL.format(folder, why)) from e
    if dist.get_rank() == 0:
        _rotate(tmp, folder)
    dist.barrier()


def load_sharded(folder: str | Path, state: dict) -> dict:
    """Fill `state` in place from FOLDER, or FOLDER.previous, resharding as needed. Collective. FileNotFoundError."""
    found = [p for p in (Path(folder), Path(f"{folder}.previous")) if (p / ".metadata").exists()]  # written last
    if not found:
        raise FileNotFoundError(f"no complete sharded checkpoint at {folder}. Train without --resume first.")
    if found[0] != Path(folder) and dist.get_rank() == 0:
        print(f"warning: {folder} is incomplete. Using {found[0]} instead.", flush=True)
    dcp.load(state, checkpoint_id=found[0])
    return state
