"""What every script must survive, the same drill for all seven: kill -9, a damaged checkpoint, a scheduler's SIGTERM,
Ctrl-C, a folder that cannot be written, a full disk. Each drill starts real processes and signals those alone."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT, finish, kill, run_script, start_ranks
from test_house import SCRIPTS

# A small `train` of each script: long enough to be killed in its middle, with several checkpoints on the way.
TRAIN = {
    "abacus": "--d-model 64 --ff 32 --n-layer 1 --digits 2 --max-offset 3 --batch 16 --lengths 2 --steps 300 "
    "--save-every 20 --log-every 1",
    "axonn": "--vocab 300 --block 16 --batch 4 --steps 60 --save-every 7",
    "goldfish": "--d-model 32 --n-layer 1 --vocab 300 --log-every 1 --steps 150 --save-every 10",
    "recurrent_depth": "--block 8 --batch 8 --r-bar 3 --log-every 1 --steps 150 --save-every 10",
    "slimadam": "--chars 200000 --d-model 16 --n-head 2 --block 16 --steps 300 --save-every 20 --log-every 1",
    "speedy_splat": "--size 16 --views 8 --points 100 --views-per-step 2 --max-gaussians 160 --steps 90 "
    "--save-every 10 --log-every 1",
    "topk_attention": "--samples 1 --ks 8 --context 512",  # it has no training of its own: eval is what may be long
}
TRAINED = [name for name in SCRIPTS if name != "topk_attention"]
# Demos that start processes of their own, shortened: Ctrl-C must end those too.
DEMO = {
    "axonn": "--quick",
    "slimadam": "--chars 200000 --steps 5000",
}
FOLDER = {}  # where train writes below --out
FAR = {"topk_attention": ""}  # a run that only a signal ends; its eval reads for long enough


def start(name: str, *argv: str) -> subprocess.Popen:
    """The script in a process group of its own, which hears Ctrl-C also where the test's shell ignores it."""
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, f"{name}.py", *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=heard)  # fmt: skip


def until(done, process: subprocess.Popen, what: str, seconds: float = 120) -> None:
    """Wait for done(); fail if the process ends before."""
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, f"the run ended before {what}: {process.communicate()[0][-2000:]}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that belong to a step, without clock times."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    rows = [json.loads(x) for x in lines if x.endswith("}\n")]
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in rows if "step" in r]


def last_step(folder: Path) -> int:
    return max((r["step"] for r in metrics(folder)), default=0)


def train(name: str, out: Path, *more: str) -> list[str]:
    mode = "train" if name in TRAINED else "eval"
    return [mode, *TRAIN[name].split(), "--device", "cpu", "--out", str(out), *more]


def damage(path: Path) -> None:
    """Half a checkpoint: a file cut short, or a sharded folder without its index."""
    if path.is_dir():
        (path / ".metadata").unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """The run was refused with one clear line that says all of `words`."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    said = [x for x in done.stderr.strip().splitlines() if ": error: " in x]
    assert len(said) == 1 and all(word in said[0] for word in words), done.stderr


@pytest.mark.drill
@pytest.mark.parametrize("name", TRAINED)
def test_kill_at_a_random_step_and_resume(name, tmp_path):
    """kill -9, the newest checkpoint damaged, --resume: the metrics of a run that was never stopped, exactly."""
    sub = FOLDER.get(name, "")
    whole, killed = tmp_path / "whole" / sub, tmp_path / "killed" / sub
    done = run_script(f"{name}.py", *train(name, tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    steps = last_step(whole)
    point = random.randrange(steps // 5, steps // 2)
    print(f"to be killed after step {point} of {steps}")
    run = start(name, *train(name, tmp_path / "killed"))
    try:
        saved = lambda: [p for p in killed.glob("checkpoint*") if p.suffix == ".previous"]
        until(lambda: saved() and last_step(killed) >= point, run, f"step {point} and a second checkpoint")
    finally:
        kill([run])
    assert last_step(killed) < steps, "the run ended before it was killed"
    damage(saved()[0].with_suffix(""))
    done = run_script(f"{name}.py", *train(name, tmp_path / "killed", "--resume"))
    assert done.returncode == 0, done.stderr
    assert re.search("damaged|incomplete", done.stdout), done.stdout
    assert metrics(killed) == metrics(whole)


@pytest.mark.drill
@pytest.mark.parametrize("name", TRAINED)
def test_sigterm_writes_a_checkpoint_and_exits_0(name, tmp_path):
    folder, long = tmp_path / FOLDER.get(name, ""), FAR.get(name, "--steps 100000").split()
    run = start(name, *train(name, tmp_path, *long))
    try:
        until(lambda: last_step(folder) > 0, run, "the first logged step")
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=60)[0]
    finally:
        kill([run])
    assert run.returncode == 0 and "--resume" in said, said
    assert list(folder.glob("checkpoint*"))


@pytest.mark.drill
@pytest.mark.parametrize("name", SCRIPTS)
def test_interrupt_leaves_no_process(name, tmp_path):
    """Ctrl-C reaches the script alone; afterwards its process group is empty."""
    if name in DEMO:
        argv = ["demo", *DEMO[name].split(), "--device", "cpu", "--out", str(tmp_path)]
    else:
        argv = train(name, tmp_path, *FAR.get(name, "--steps 100000").split())
    run = start(name, *argv)
    try:
        until(lambda: list(tmp_path.rglob("metrics.jsonl")), run, "metrics.jsonl")
        time.sleep(4 if name in DEMO else 0.5)  # its own processes start and import torch
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
        assert run.returncode != 0
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                os.killpg(run.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        pytest.fail("a process of the run's group is left")
    finally:
        try:
            os.killpg(run.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        run.wait()


@pytest.mark.drill
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_written(name, tmp_path):
    """--out below a file, and (unless the tests run as root) in a read-only folder: one line before any work."""
    (tmp_path / "file").write_text("")
    one_line(run_script(f"{name}.py", *train(name, tmp_path / "file" / "out")), "file")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o555)
        one_line(run_script(f"{name}.py", *train(name, tmp_path / "locked" / "out")), "locked")


@pytest.mark.drill
@pytest.mark.parametrize("name", TRAINED)
def test_a_full_disk(name, tmp_path):
    """No file may grow past 8 kB, as on a disk that is nearly full: the metrics fit, the checkpoint does not."""
    code = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); import sys; "
        f"sys.argv = {[f'{name}.py', *train(name, tmp_path)]!r}; runpy.run_path('{name}.py', run_name='__main__')"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    one_line(done, "cannot write", "checkpoint")
    folder = tmp_path / FOLDER.get(name, "")
    assert metrics(folder) and not list(folder.glob("checkpoint*"))


def agents(name: str, per_node: int, out: Path, *more: str) -> list[subprocess.Popen]:
    """Two torchrun agents that meet on loopback, each with `per_node` ranks of the script's small run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{s.getsockname()[1]}"
    how = ["--nnodes", "2", "--nproc-per-node", str(per_node), "--rdzv-backend", "c10d", "--rdzv-endpoint", meet]
    argv = [sys.executable, "-m", "torch.distributed.run", *how, f"{name}.py", *train(name, out, *more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(argv, cwd=ROOT, env=env, start_new_session=True, **quiet) for _ in range(2)]


@pytest.mark.drill
@pytest.mark.parametrize("name", TRAINED)
def test_a_lost_node_ends_the_job_with_one_line_and_it_resumes(name, tmp_path):
    """One of two agents and its rank are killed: the other rank says one line, and one process takes the run up."""
    long = "--steps", "100000"
    both = agents(name, 1, tmp_path, *long)
    try:
        until(lambda: list(tmp_path.glob("checkpoint*.previous")), both[0], "a second checkpoint")
        ranks = Path(f"/proc/{both[1].pid}/task/{both[1].pid}/children").read_text().split()
        for lost in (both[1].pid, *map(int, ranks)):
            os.kill(lost, signal.SIGKILL)
        said = both[0].communicate(timeout=90)[0]
    finally:
        kill(both)
    ours = [x for x in said.splitlines() if x.startswith(f"{name}.py: error: ")]
    assert len(ours) == 1 and "lost contact with another rank" in ours[0] and "--resume" in ours[0], said
    assert f'{name}.py", line' not in said, "a traceback of the script"
    at = last_step(tmp_path)
    again = start(name, *train(name, tmp_path, *long, "--resume"))
    try:
        until(lambda: last_step(tmp_path) > at, again, "steps after the resumption")
        again.send_signal(signal.SIGTERM)
        said = again.communicate(timeout=60)[0]
    finally:
        kill([again])
    assert again.returncode == 0 and "going on after step" in said, said


@pytest.mark.drill
@pytest.mark.parametrize("name", ["speedy_splat"])
def test_a_killed_rank_and_the_resumed_pair(name, tmp_path):
    """kill -9 for one of two ranks at a random step; both start again and end as if nothing had happened."""
    whole, killed, begin = tmp_path / "whole", tmp_path / "killed", lambda out, *more: start_ranks(
        2, f"{name}.py", *train(name, out, *more))  # fmt: skip
    finish(begin(whole))
    steps = last_step(whole)
    point, lost = random.randrange(steps // 5, steps // 2), random.randrange(2)
    print(f"rank {lost} to be killed after step {point} of {steps}")
    ranks = begin(killed)
    until(lambda: list(killed.glob("checkpoint*")) and last_step(killed) >= point, ranks[0], f"step {point}")
    ranks[lost].kill()
    said = finish(ranks)[1 - lost]
    assert "lost contact with another rank" in said and last_step(killed) < steps, said
    assert "going on after step" in finish(begin(killed, "--resume"))[0]
    assert metrics(killed) == metrics(whole)


@pytest.mark.drill
def test_two_agents_meet_stop_and_resume(tmp_path):
    """docs/cluster.md in small: two torchrun agents on loopback equal one process; a scheduler's SIGTERM to both leaves
    a checkpoint, and the job that is queued again goes on from it."""

    steps = ("--steps", "30", "--exposures", "20")
    assert run_script("goldfish.py", *train("goldfish", tmp_path / "one", *steps)).returncode == 0
    said = finish(agents("goldfish", 2, tmp_path / "four", *steps), 240)
    head = json.loads((tmp_path / "four" / "metrics.jsonl").read_text().splitlines()[0])
    assert head["world"] == 4, said
    pairs = zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-3

    out, long = tmp_path / "stopped", ("--steps", "100000", "--save-every", "0")
    both = agents("goldfish", 2, out, *long)
    try:
        until(lambda: last_step(out) > 3, both[0], "the first steps")
        for agent in both:
            agent.send_signal(signal.SIGTERM)
        finish(both, 90)
    finally:
        kill(both)
    at = last_step(out)
    assert (out / "checkpoint.pt").exists()
    again = agents("goldfish", 2, out, *long, "--resume")
    try:
        until(lambda: last_step(out) > at + 3, again[0], "steps after the resumption")
        for agent in again:
            agent.send_signal(signal.SIGTERM)
        finish(again, 90)
    finally:
        kill(again)
    assert [r["step"] for r in metrics(out)] == list(range(1, last_step(out) + 1))
