"""Process group, device, seeds and checkpoint files, on one process or many, under torchrun or plain python."""

import errno
import gc
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common.cli import BadInput


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
    """Join torchrun's group, or make a group of one; device is auto, cpu or cuda. BadInput: too few GPUs here."""
    set_by = os.environ if "RANK" in os.environ else {}  # torchrun sets all three
    rank, size, local = (int(set_by.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not set_by and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        print("warning: srun started several lone runs of this script; start it by torchrun", file=sys.stderr)
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    gpus = torch.cuda.device_count()
    if cuda and local >= gpus:
        raise BadInput(f"local rank {local} has no GPU: here are {gpus}. Lower --nproc-per-node or pass --device cpu.")
    dev = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(dev)
    meet = {} if set_by else {"store": dist.HashStore()}  # alone: in memory, no port to clash on
    where = {"device_id": dev} if cuda else {}
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size, **where, **meet)
    done = False
    try:
        yield World(rank, size, dev)
        done = True
    except SystemExit:  # all ranks stop together: one that left without a word could make its peer abort
        done = True
        raise
    finally:
        if done or size == 1:  # a failed rank exits at once, so torchrun can stop its peers
            gc.collect()  # a DDP module in a reference cycle would outlive its group and abort the process at exit
            dist.destroy_process_group()


def alone(w: World) -> None:
    """BadInput on several ranks, for an experiment that one process runs as a whole."""
    if w.size > 1:
        raise BadInput("this experiment runs on one process: start it by python, without torchrun")


def two_processes(cfg) -> None:
    """A lone demo on a CPU of two cores or more starts itself again as two ranks, and this call does not return."""
    gpu = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    script = type(cfg).__module__ == "__main__" and cfg.mode == "demo" and "RANK" not in os.environ
    if script and not gpu and (os.cpu_count() or 1) > 1:
        start_again(2)


def start_again(size: int) -> None:
    """Run this script again by torchrun as `size` ranks, and end as the first of them that fails, or with 0."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what is wrong
    try:
        torchrun.main(["--standalone", "--nproc-per-node", str(size), *sys.argv])
    except ChildFailedError as e:
        sys.exit(e.get_first_failure()[1].exitcode)
    except (KeyboardInterrupt, SignalException):
        sys.exit(130)
    sys.exit(0)


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
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield stopping() -> bool: True on all ranks, at the same step, once SIGTERM has reached any of them. Collective.

    The ranks agree through a number in host memory, so a GPU never waits.
    """
    asked, lone = [], dist.get_world_size() == 1
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    host = None if lone or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    try:
        yield lambda: bool(asked) if lone else bool(total(torch.tensor(len(asked)), host))
    finally:
        signal.signal(signal.SIGTERM, before)


# %% checkpoints: PATH is the newest, PATH.previous the one before


def _rotate(new: Path, path: Path) -> None:
    """Make the finished `new` the current `path`; what stood there becomes path.previous."""
    if path.exists():
        shutil.rmtree(f"{path}.previous", ignore_errors=True)  # a folder must go first; a file is replaced
        os.replace(path, f"{path}.previous")
    os.replace(new, path)


def set_aside(path: str | Path) -> None:
    """Before a fresh run: an earlier run's checkpoints get .old at their end."""
    for p in filter(Path.exists, (Path(path), Path(f"{path}.previous"))):
        shutil.rmtree(f"{p}.old", ignore_errors=True)
        os.replace(p, f"{p}.old")


def _newest(path: str | Path, read: Callable):
    """read(PATH), or read(PATH.previous) with a warning where PATH is damaged.

    FileNotFoundError: there is none. BadInput: there are only damaged ones.
    """
    faults = []
    for p in filter(Path.exists, (Path(path), Path(f"{path}.previous"))):
        try:
            state = read(p)
        except Exception as e:  # a damaged file can make torch raise nearly anything
            full = isinstance(e, MemoryError) or "allocate memory" in str(e)
            if full or getattr(e, "errno", None) not in (None, errno.ENOENT, errno.EINVAL):
                raise  # no memory, no right to read, a bad disk: not damage
            faults.append(f"{p} is damaged ({(str(e) or repr(e)).splitlines()[0]})")
            continue
        if faults and (not dist.is_initialized() or dist.get_rank() == 0):
            print(f"warning: {faults[0]}. Using {p} instead.", flush=True)
        return state
    if not faults:
        raise FileNotFoundError(f"no checkpoint at {path}. Train first, or pass the right --out.")
    raise BadInput("; ".join(faults) + ". Restore a copy, or move it away and start again without --resume.")


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
        why = e if isinstance(e, OSError) else f"is the disk full? {e}"
        raise OSError(f"cannot write {path}: {why}. Free space or pass --out.") from e


def load(path: str | Path) -> dict:
    """The state written by save(), on the CPU, mapped from the file. Errors and fallback as _newest()."""

    def read(path: Path) -> dict:
        with zipfile.ZipFile(path) as z:  # torch.load does not verify every byte; the archive's checksums do
            if bad := z.testzip():
                raise ValueError(f"record {bad} has another checksum")
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except (TypeError, pickle.UnpicklingError) as e:
            raise ValueError("it holds something else than a checkpoint of these scripts") from e

    return _newest(path, read)


# %% sharded checkpoints: a folder of torch.distributed.checkpoint, our facts.json and checksums.json


def _checksums(files: Iterable[Path]) -> dict[str, int]:
    """CRC-32 of the files that each rank gives, by name, on every rank; missing ones are left out. Collective."""
    mine = {p.name: zlib.crc32(np.memmap(p, mode="r")) for p in files if p.exists() and p.stat().st_size}
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: crc for part in parts for name, crc in part.items()}


def save_sharded(folder: str | Path, state: dict) -> None:
    """Write a state dict whose tensors may be DTensors, atomically; its "facts" are JSON. Collective. OSError."""
    folder, tmp, main = Path(folder), Path(f"{folder}.tmp"), dist.get_rank() == 0
    if main:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        (tmp / "facts.json").write_text(json.dumps(state.get("facts", {})))
    dist.barrier()
    try:
        dcp.save({k: v for k, v in state.items() if k != "facts"}, checkpoint_id=tmp)
    except dcp.api.CheckpointException as e:  # on every rank; it tells what happened on which
        why = "; ".join(f"rank {r}: {error}" for r, (error, _) in e.failures.items())
        if main:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"cannot write {folder}: {why}. Free space or pass --out.") from e
    found = _checksums([*tmp.glob(f"__{dist.get_rank()}_*"), *(tmp / n for n in ("facts.json", ".metadata") if main)])
    if main:
        (tmp / "checksums.json").write_text(json.dumps(found))
        _rotate(tmp, folder)
    dist.barrier()


def load_sharded(folder: str | Path, state: dict, check: Callable = lambda path, facts: None) -> dict:
    """Fill `state` in place, resharding as needed; check(path, facts) may refuse first. Collective. See _newest().

    torch.distributed.checkpoint unpickles what it reads: open sharded checkpoints only from people you trust.
    """

    def whole(path: Path) -> tuple[Path, dict]:
        want = json.loads((path / "checksums.json").read_text())  # written last
        found = _checksums(path / name for name in sorted(want)[dist.get_rank() :: dist.get_world_size()])
        if bad := [name for name in want if found.get(name) != want[name]]:
            raise ValueError(f"{bad[0]} is missing, cut or changed")
        return path, json.loads((path / "facts.json").read_text())

    path, facts = _newest(folder, whole)
    check(path, facts)
    dcp.load(state, checkpoint_id=path)
    return state | {"facts": facts}
