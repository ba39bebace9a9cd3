"""goldfish.py: masks of the released code, losses, the attack, the text, training, audit, verdict, bad input."""

import hashlib
import json
import math
import re
import shutil
import signal
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import finish, kill, run_ranks, run_script, start_ranks

import goldfish as G
from common import cli, cluster, report
from common.text import Tokenizer, corpus

t, DATA = torch.tensor, Path(__file__).parent / "data"
TABLE, MASKS, EDGES = (json.loads((DATA / f"goldfish_{n}.json").read_text()) for n in ("table", "masks", "edge"))
MASKS = [case for case in MASKS if case["strategy"] != "hash-avalanche"]
SMALL = {"d_model": 32, "n_layer": 1, "vocab": 300, "block": 16, "h": 4, "canaries": 4, "exposures": 10, "steps": 12,
         "batch": 8, "log_every": 1, "save_every": 5, "device": "cpu"}  # fmt: skip
FLAGS = [word for name, value in SMALL.items() for word in cli.spell(name, value).split()]


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the kernel has its own tests; interpreted, it would make these slow


def draw(*shape, high=32000, low=1, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()[1:]]


def test_table_is_the_released_one_on_any_default_device():
    G.hash_table.cache_clear()
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError):  # and leaves no fake table behind
        G.goldfish_mask(torch.ones(2, 40, dtype=torch.long), 4, 4)
    with torch.device("meta"):
        table = G.hash_table()
    assert hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest() == TABLE["sha256_float32_le"]
    assert not G.goldfish_mask((table == 1 / 16).nonzero(), 16, 1).any()  # below 1/k, not at it


@pytest.mark.parametrize("case", MASKS + EDGES["edge"], ids=lambda c: f"{c.get('strategy', c.get('name'))}-k{c['k']}")
def test_masks_equal_the_released_code(case):
    targets, strategy = torch.tensor(case["targets"]), "static" if case.get("strategy") == "static" else "hash"
    for ids in (targets, targets.int()):
        drop = G.goldfish_mask(ids, case["k"], case["h"], strategy)
        assert targets.masked_fill(drop, -100).tolist() == case["masked"]


@pytest.mark.parametrize("window", ["target", "context"])
@pytest.mark.parametrize("h", [1, 2, 5, 13])
def test_windows_against_brute_force(window, h):
    targets, table = draw(3, 40), G.hash_table().tolist()
    for row, drop in zip(targets.tolist(), G.goldfish_mask(targets, 3, h, window=window).tolist(), strict=True):
        for i, end in enumerate(range(1, 41) if window == "target" else range(40)):  # end: one past the window
            product = (math.prod(row[end - h : end]) + 2**63) % 2**64 - 2**63
            assert drop[i] == (end >= h and table[product % TABLE["size"]] < 1 / 3), (i, window)
    for bad in (targets[:, : h - (window == "target")], targets[0]):  # no room, no rows
        pytest.raises(ValueError, G.goldfish_mask, bad, 3, h, window=window)


def test_shift_invariance_nesting_and_edges_of_k():
    passage, h = draw(1, 60), 13
    alone = G.goldfish_mask(passage, 4, h)[:, h - 1 :]
    for offset in (1, 7, 30):
        row = torch.cat([draw(1, offset, seed=offset), passage], dim=1)
        assert torch.equal(G.goldfish_mask(row, 4, h)[:, offset + h - 1 :], alone)
    text = draw(4, 4000)
    huge, k8, k4, k3 = (G.goldfish_mask(text, k, h) for k in (10**12, 8, 4, 3))
    assert not (huge & ~k8).any() and not (k8 & ~k4).any() and not (k4 & ~k3).any()
    assert huge.float().mean() < 1e-3 and k8.any() and not k3[:, : h - 1].any()
    random = G.goldfish_mask(text, 4, strategy="random", generator=torch.Generator().manual_seed(1))
    assert abs(k4.float().mean() - 0.25) < 0.02 and abs(random.float().mean() - 0.25) < 0.02


def test_loss_is_the_released_one_and_dropped_targets_never_enter():
    case = EDGES["loss"]
    logits, targets = torch.tensor(case["logits"]), torch.tensor(case["targets"])
    assert G.goldfish_loss(logits, targets, case["k"], case["h"]).item() == pytest.approx(case["loss"], rel=1e-6)
    logits, targets = torch.randn(2, 30, 11, requires_grad=True), draw(2, 30, high=11)
    targets[0, 25:] = -100
    keep = ~G.goldfish_mask(targets, 3, 4) & (targets != -100)
    clean = G.goldfish_loss(logits, targets, 3, 4)
    (grad,) = torch.autograd.grad(clean, logits)
    probability = logits.softmax(-1) - F.one_hot(targets.clamp(min=0), 11)
    torch.testing.assert_close(grad, (keep[..., None] * probability / keep.sum()).detach())
    bad = logits.detach().masked_fill(~keep[..., None], math.nan).requires_grad_()
    loss = G.goldfish_loss(bad, targets, 3, 4)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    assert bad.grad.isfinite().all() and G.goldfish_loss(logits * math.nan, targets, 3, 4).isnan()
    assert G.goldfish_loss(logits, torch.full((2, 30), -100), 4, 4) == 0  # nothing is supervised


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("kind", ["float32", "frozen head", "autocast", "bfloat16", "empty"])
def test_head_loss_is_kept_loss_of_the_logits(library, kind, monkeypatch):
    if not library:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    g, low = torch.Generator().manual_seed(0), kind in ("autocast", "bfloat16")
    hidden, head = torch.randn(2, 300, 16, generator=g), torch.randn(50, 16, generator=g)
    targets = draw(2, 300, high=50)
    keep = ~G.goldfish_mask(targets, 3, 4) if kind != "empty" else torch.zeros(2, 300, dtype=torch.bool)
    exact = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    want = F.cross_entropy(F.linear(*exact)[keep], targets[keep], reduction="sum")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    ours = [hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(kind != "frozen head")]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = G.head_loss(*ours, targets, keep, chunk=70)
    loss.backward()
    want.backward()
    assert (kind == "frozen head") == (ours[1].grad is None)
    for sum_ in (loss, G.kept_loss(F.linear(*ours), targets, keep)):
        assert sum_.dtype == torch.float32 and (sum_ == 0 or sum_ != sum_.bfloat16())  # never a bf16 sum
        torch.testing.assert_close(sum_.double(), want, rtol=1e-3 if low else 1e-6, atol=0)
    for a, b in zip(ours, exact, strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=0.1 if low else 1e-4, atol=0.1 if low else 1e-5)


def markov(seed=0, V=6):
    table = 2 * torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1), ids]


def test_beam_search_against_all_sequences():
    model, rows, n = markov(), draw(3, 4, high=6), 4
    every = torch.cartesian_prod(*[torch.arange(6)] * n)  # 1296 suffixes
    for b, beams in enumerate(G.extract(model, rows, 3, n, beams=1296)):
        full = torch.cat([rows[b, :3].expand(len(every), 3), every], dim=1)
        log_p = model(full)[:, 2:-1].log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1)
        assert beams[:5].tolist() == every[log_p.argsort(descending=True)[:5]].tolist()


def test_wider_never_finds_less_and_cached_decoding_equals_rereading():
    cfg = G.Config("audit", block=20, beams=(30, 1, 8), device="cpu")
    with cluster.world("cpu") as w:
        for seed in range(3):  # texts that greedy decoding says; a plain search of 8 beams loses most of them
            model, prefix = markov(seed), draw(4, 10, high=6, seed=seed)
            rows = torch.cat([prefix, G.extract(model, prefix, 10, 10)], dim=1)
            found, _ = G.attack(cfg, w, model, rows, str)
            assert all(found[f"recited, {width} beams"] == 1 for width in cfg.beams) and found["RougeL"] == 1

    model = G.start_model(G.Config(vocab=300, d_model=64)).double()
    for i, weight in enumerate(p for p in model.parameters() if p.ndim == 2):  # large: what was read must matter
        torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(i))
    for beams in (1, 4):
        rows, plain = draw(3, 20, high=300), lambda ids: model(ids)
        assert torch.equal(G.extract(model, rows, 6, 9, beams), G.extract(plain, rows, 6, 9, beams))


def test_measures():
    a, b = t([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 1, 2]]), t([[1, 9, 3, 4], [4, 3, 2, 1], [2, 1, 2, 9]])
    assert G.rouge_l(a, b).tolist() == [0.75, 0.25, 0.75] and G.rouge_l(a, b[:, :2])[1] == pytest.approx(1 / 3)
    assert G.first_divergence(t([[1, 2, 3], [1, 9, 3]]), t([[1, 2, 3]] * 2)).tolist() == [3, 1]
    assert G.auc(t([3.0, 4.0]), t([1.0, 2.0])) == 1 and G.auc(t([2.0, 1.0, 0.0]), t([1.0])) == 0.5
    others = torch.arange(100.0)
    assert G.tpr_at_fpr(others + 50, others, 0.1) == 0.6 and G.tpr_at_fpr(others + 50, others, 0.001) == 0.5
    model, rows, seen, texts = markov(), draw(40, 11, high=6), [], ["aaaa", "b" * 50] * 20
    log_p = model(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    score = G.mia_scores(lambda ids: seen.append(len(ids)) or model(ids), rows, texts)
    torch.testing.assert_close(score["loss"], log_p.mean(1))
    torch.testing.assert_close(score["zlib"], log_p.sum(1) / t([len(zlib.compress(s.encode())) for s in texts]))
    assert max(seen) <= 16  # the logits of the paper's 2000 canaries would be 524 GB


def test_canaries_are_unique_and_shown_exactly_as_asked_and_ids_equal_text(tmp_path):
    cfg = G.Config(**SMALL)
    text, again = G.Text(cfg), G.Text(cfg)
    grams = lambda rows: {tuple(r[i : i + 13]) for r in rows.tolist() for i in range(len(r) - 12)}
    alone, index = torch.cat([text.canary, text.nonmember]), torch.cat(text.parts)
    assert not grams(alone) & grams(text.rows(index[8:])) and len(grams(alone)) == 8 * (17 - 12)
    assert sorted(index.tolist()) == list(range(len(text.table)))
    plain, control, noisy = [], [], []
    for step in range(cfg.steps):
        assert torch.equal(text.batch(cfg, step), again.batch(cfg, step))
        for seen, how in ((plain, {}), (control, {"control": True}), (noisy, {"noise": 0.3})):
            seen += map(tuple, text.batch(cfg, step, **how).tolist())
    canaries, hidden = ([tuple(r) for r in rows.tolist()] for rows in (text.canary, text.nonmember))
    assert [plain.count(r) for r in canaries] == [cfg.exposures] * cfg.canaries and not set(hidden) & set(plain)
    assert len(plain) == len(noisy) == cfg.steps * cfg.batch and sum(r in canaries for r in noisy) < 10
    assert sorted(control) == sorted(r for r in plain if r not in canaries)
    whole = corpus("docs")
    np.save(tmp_path / "ids.npy", Tokenizer(whole, 300).encode(whole).numpy().astype(np.uint16))
    ids = G.Text(replace(cfg, data=(f"{tmp_path}/ids.npy",)))
    assert isinstance(ids.table, np.memmap) and ids.batch(cfg, 3).shape == (8, 17)
    assert torch.equal(ids.rows(index), text.rows(index)) and ids.rows(index).dtype == torch.int64
    assert torch.equal(ids.canary, text.canary)


def train_both(rank, size, accum, out):
    w, text = cluster.World(rank, size, torch.device("cpu")), G.Text(G.Config(**SMALL))
    for strategy in ("hash", "random"):
        cfg = G.Config("train", strategy=strategy, accum=accum, out=f"{out}/{strategy}-{size}-{accum}", **SMALL)
        G.train_model(cfg, text, w, report.Run(cfg.out, cfg, w), "train")


def test_micro_steps_and_ranks_change_nothing(tmp_path):
    with cluster.world("cpu"):
        for accum in (1, 2, 4):
            train_both(0, 1, accum, tmp_path)
    run_ranks(train_both, 2, tmp_path, 2, tmp_path)
    for strategy in ("hash", "random"):
        one, *others = (metrics(tmp_path / f"{strategy}-{n}") for n in ("1-1", "1-2", "1-4", "2-2"))
        assert [x["step"] for x in one] == list(range(1, 13)) and one[-1]["loss"] < one[0]["loss"] - 0.5
        assert len({x["supervised"] for x in one}) > 3  # counts differ, so means of means would show
        for other in others:
            assert [x["supervised"] for x in one] == [x["supervised"] for x in other]
            assert [x["loss"] for x in one] == pytest.approx([x["loss"] for x in other], abs=2e-5)


def test_resume_equals_the_unbroken_run(tmp_path, monkeypatch):
    cfg = G.Config("train", out=f"{tmp_path}/a", **SMALL)
    stop = lambda self, cfg, step, real=G.Text.batch: real(self, cfg, step) if step < 11 else 1 / 0
    with cluster.world("cpu") as w:
        G.train(cfg, w)
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(G.Text, "batch", stop)
            G.train(replace(cfg, out=f"{tmp_path}/b"), w)
        newest = tmp_path / "b/checkpoint.pt"  # after step 10; damaged, so that of step 5 is taken
        newest.write_bytes(newest.read_bytes()[:5000])
        G.train(replace(cfg, out=f"{tmp_path}/b", resume=True), w)
        assert metrics(tmp_path / "b") == metrics(tmp_path / "a") and len(metrics(tmp_path / "a")) == 13
        for name, other in (("k", 3), ("h", 5), ("strategy", "static"), ("window", "context"), ("steps", 20)):
            with pytest.raises(cli.BadInput) as refused:
                G.train(replace(cfg, out=f"{tmp_path}/b", resume=True, **{name: other}), w)
            advice = re.search(r"Pass (--.+), or another --out", str(refused.value))[1]
            assert getattr(cli.parse(G.Config, ["train", *FLAGS, *advice.split()]), name) == getattr(cfg, name)
        G.audit(G.Config("audit", out=f"{tmp_path}/b", beams=(4, 1), device="cpu"), w)
    found = json.loads((tmp_path / "b/audit.json").read_text())["canaries"]
    assert found["RougeL"] == pytest.approx(metrics(tmp_path / "a")[-1]["RougeL"])


def test_audit_of_real_weights_reads_each_row_behind_its_start_token(tmp_path):
    tokenizers, folder, letters = pytest.importorskip("tokenizers"), tmp_path / "llama", draw(3000, high=27)
    shutil.copytree(DATA / "topk_attention/tiny_llama", folder)
    words = {"[BOS]": 0, **{chr(96 + i): i for i in range(1, 27)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing("[BOS] $A", special_tokens=[("[BOS]", 0)])
    made.save(f"{folder}/tokenizer.json")
    (a, b), text = (f"{folder}/a.txt", f"{folder}/b.txt"), " ".join(chr(96 + i) for i in letters.tolist())
    Path(a).write_text(text)
    Path(b).write_text(text[::-1])
    cfg = G.Config("audit", model=str(folder), data=(a,), nonmembers=(b,), canaries=40, block=12, beams=(1, 3),
                   out=f"{tmp_path}/out", device="cpu")  # fmt: skip
    rows, model = G.windows(cfg, a), G.start_model(cfg)
    assert torch.equal(rows, torch.cat([torch.zeros(40, 1, dtype=torch.long), letters[:480].view(40, 12)], dim=1))
    with cluster.world("cpu") as w:
        G.audit(cfg, w)
        G.train(replace(cfg, mode="train", preset="finetune", steps=1, batch=2, canaries=1, exposures=1, k=0, h=4), w)
    found, log_p = json.loads((tmp_path / "out/audit.json").read_text()), G.mia_scores(model, rows, ["x"] * 40)["loss"]
    assert found[a]["loss"] == pytest.approx(log_p.mean().item()) and found[a]["rows"] == 40
    assert found["loss"]["members"] == found["loss"]["others"] == 40 and 0.3 < found["loss"]["auc"] < 0.7
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(-log_p.mean().item(), rel=0.05)  # training starts here


@pytest.mark.weights
def test_smollm2_values():
    model = G.start_model(G.Config("audit", model="smollm2"))
    ids = torch.tensor([[1604, 803, 24, 81, 28, 278, 727, 472, 1003, 253, 1232, 278, 198]])
    assert -G.mia_scores(model, ids, ["x"])["loss"].item() == pytest.approx(1.26725, abs=2e-5)
    assert G.extract(model, torch.tensor([[504, 3575, 282, 4649, 314]]), 5, 1).item() == 7042  # Paris


def test_demo_in_small_judges_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(G, "RUNS", {name: G.RUNS[name] for name in ("ordinary", "k=4", "k=3", "control")})
    long = {"d_model": 64, "steps": 50, "exposures": 87, "lr": 1e-2, "data": (f"{DATA}/../../LICENSE",)}
    with cluster.world("cpu") as w:
        G.demo(G.Config(**SMALL | long, out=str(tmp_path)), w)
    plain, _, kept, control = (found := {x["measured"]: x for x in metrics(tmp_path) if "measured" in x}).values()
    assert G.judge(found)[1] in (tmp_path / "claim.json").read_text() and plain["at dropped"] is None
    assert kept["at dropped"] == 1 > kept["at placebo"] and plain["recited"] >= 0.75 > 0.5 > kept["recited"]
    assert min(plain["right dropped"], kept["right kept"]) > 0.8 > 2 * kept["right dropped"] > 0 == control["recited"]


row = lambda *v: dict(zip(("recited", "at dropped", "at placebo", "right dropped", "val loss"), v, strict=True))
FOUND = {  # of the demo with seed 0
    "ordinary": row(1.0, None, None, 1.0, 2.823), "k=4": row(0.0, 1.0, 0.242, 0.225, 2.867),
    "k=3": row(0.0, 1.0, 0.313, 0.169, 2.886), "control": row(0.0, None, None, 0.230, 2.799),
    "random": row(1.0, None, None, 1.0, 2.877)}  # fmt: skip


def test_verdict():
    assert G.judge(FOUND)[0]
    for name, change in (
        ("k=4", FOUND["random"]), ("k=3", FOUND["random"]), ("k=4", FOUND["ordinary"]), ("ordinary", FOUND["control"]),
        ("k=4", {"recited": 0.125}), ("k=3", {"at dropped": 0.9}), ("k=3", {"at placebo": 0.5}),
        ("k=4", {"at placebo": None}), ("k=4", {"right dropped": 0.4}), ("k=3", {"val loss": 3.0}),
    ):  # fmt: skip
        assert not G.judge(FOUND | {name: FOUND[name] | change})[0], (name, change)


@pytest.mark.parametrize("argv, message", [
    ("train --data short.txt --preset small", "too small"),
    ("train --data large.npy --preset small", "token ids 300 to 300, the model 0 to 299"),
    ("train --k 1", "give 2 or more; train: 0 is ordinary"),
    ("train --h 16 --window context", "Give --block 17 or more"), ("train --h 25 --block 30", "over 24 ids"),
    ("train --accum 3", "does not divide over 1 processes x --accum 3"),
    ("audit --canaries 5", "go with --model"), ("audit", "Train first"),
])  # fmt: skip
def test_bad_input(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("hello " * 50)
    np.save("large.npy", np.full(9**4, 300))
    mode, *given = argv.split()
    monkeypatch.setattr("sys.argv", ["goldfish.py", mode, *FLAGS * (mode == "train"), *given, "--out", "out"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(G.main, G.Config, G.PRESETS)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith("goldfish.py: error: ") and message in said


@pytest.mark.drill
def test_kill_and_resume_on_another_number_of_ranks(tmp_path):
    argv = ["goldfish.py", "train", *FLAGS, "--steps", "80", "--resume", "--out"]
    finish(start_ranks(2, *argv, f"{tmp_path}/whole"))
    ranks, checkpoint, deadline = start_ranks(2, *argv, f"{tmp_path}/cut"), tmp_path / "cut/checkpoint.pt", time.time()
    while not checkpoint.exists() and time.time() < deadline + 120:
        time.sleep(0.02)
    kill(ranks, signal.SIGKILL)
    step = cluster.load(checkpoint)["facts"]["step"]
    done = run_script(*argv, f"{tmp_path}/cut")
    assert step < 80 and done.returncode == 0 and f"going on after step {step}" in done.stdout
    a, b = ([x for x in metrics(tmp_path / name) if "step" in x] for name in ("whole", "cut"))
    assert [x["step"] for x in a] == [x["step"] for x in b] == list(range(1, 81))
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], abs=5e-3)  # Adam amplifies rounding


@pytest.mark.drill
def test_header(tmp_path):
    done = run_script("goldfish.py", "--device", "cpu", "--out", str(tmp_path), timeout=900)
    expect = re.search(r'^Expect\s+"(.+?)"', G.__doc__, re.M)[1]
    assert done.returncode == 0 and expect in done.stdout.splitlines()[-1] and done.stdout.endswith("| holds\n")
