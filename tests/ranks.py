"""Start ranks in tests: as functions that assert, or as processes of a script, whose ids are kept."""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
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


def _run_as_main(script, argv, env, out):
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(fd, stream)
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


class Forked:
    """`script` as a process of its own that need not import torch again, with what tests use of subprocess.Popen."""

    def __init__(self, script: str, argv: tuple, env: dict):
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name, "out")
        fork = multiprocessing.get_context("forkserver")
        self.process = fork.Process(target=_run_as_main, args=(script, argv, env, self.out), daemon=True)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout)
        return self.process.exitcode

    def send_signal(self, how: int) -> None:
        os.kill(self.pid, how)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.out.read_text() if self.out.exists() else "", None


def start_ranks(size: int, script: str, *argv: str, forked: bool = True) -> list:
    """`script` on `size` processes with torchrun's environment, without its agent: a test can signal each by its id.

    forked=False: as a user starts them, for a test of how a process starts or exits.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environments = [{**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(size)]
    if forked:
        return [Forked(script, argv, env) for env in environments]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return [subprocess.Popen([sys.executable, script, *argv], cwd=ROOT, env=env, **how) for env in environments]


def finish(ranks: list, timeout: float = 120) -> list[str]:
    """Wait for all; their outputs. On a time-out every one of them is killed and the test fails."""
    try:
        return [p.communicate(timeout=timeout)[0] for p in ranks]
    finally:
        kill(ranks)


def kill(ranks: list, how: int = signal.SIGKILL) -> None:
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
