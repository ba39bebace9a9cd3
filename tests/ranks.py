"""Start ranks in tests: as functions that assert, or as processes of a script, whose ids are kept."""

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parent.parent
multiprocessing.set_forkserver_preload(["torch.distributed.checkpoint", "common.cluster"])  # once, not per rank


def _entry(rank, fn, size, store, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    fn(rank, size, *args)
    gc.collect()  # a DDP module in a reference cycle would outlive its group and abort the process at exit
    dist.destroy_process_group()


def run_ranks(fn, size, tmp_path, *args):
    """Call fn(rank, size, *args) on `size` gloo processes. No port; a failed assert fails the test."""
    mp.start_processes(_entry, (fn, size, tmp_path / "store", args), nprocs=size, start_method="forkserver")


def start_ranks(size: int, script: str, *argv: str) -> list[subprocess.Popen]:
    """`script` on `size` processes with torchrun's environment, without its agent: a test can signal each by its id."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, script, *argv],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for r in range(size)
    ]


def finish(ranks: list[subprocess.Popen], timeout: float = 120) -> list[str]:
    """Wait for all; their outputs. On a time-out every one of them is killed and the test fails."""
    try:
        return [p.communicate(timeout=timeout)[0] for p in ranks]
    finally:
        kill(ranks)


def kill(ranks: list[subprocess.Popen], how: int = signal.SIGKILL) -> None:
    """Signal the processes of this list that still run, and no others."""
    for p in ranks:
        if p.poll() is None:
            p.send_signal(how)
    for p in ranks:
        p.wait()


def run_script(script: str, *argv: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """`script` in one process; its output is captured."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, script, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
