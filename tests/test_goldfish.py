"""goldfish.py: masks against the released code's vectors, losses, kernels, ranks, resume, audit, bad input."""

import hashlib
import json
import math
import re
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import finish, kill, run_ranks, run_script, start_ranks

import goldfish as G
from common import cli
from common import dist as cluster
from common.cli import BadInput
from common.kernels import use_kernels

DATA = Path(__file__).parent / "data"
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
needs_triton = pytest.mark.skipif(not use_kernels("cpu"), reason="Triton's interpreter is off")


def draw(*shape, high=32000, low=1, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# ---- masks


def test_table_is_the_released_one():
    want, table = json.loads((DATA / "goldfish_table.json").read_text()), G.hash_table()
    assert len(table) == G.TABLE_SIZE == want["size"] and G.TABLE_SEED == want["seed"]
    assert hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest() == want["sha256_float32_le"]
    assert (table[want["index"]] * 2**24).long().tolist() == want["value_times_2pow24"]
    for k, count in want["drop_count"].items():
        assert int(((table * 2**24).long() * int(k) < 2**24).sum()) == int((table < 1 / int(k)).sum()) == count


def test_table_is_drawn_on_the_cpu_whatever_the_default_device(monkeypatch):
    want = G.hash_table()
    monkeypatch.setattr(G, "_TABLES", {})
    torch.set_default_device("meta")
    try:
        assert torch.equal(G.hash_table("cpu"), want)
    finally:
        torch.set_default_device(None)


CASES = json.loads((DATA / "goldfish_masks.json").read_text())
EDGES = json.loads((DATA / "goldfish_edge.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['strategy']}-{c['vocab']}-k{c['k']}-h{c['h']}")
def test_masks_equal_the_released_code(case):
    targets, masked, k, h = torch.tensor(case["targets"]), torch.tensor(case["masked"]), case["k"], case["h"]
    strategy = {"static": "static", "hash-table": "hash", "hash-avalanche": "avalanche"}[case["strategy"]]
    kw = {"start": case["start"], "ignore_index": case["ignore_index"]}
    fit = [d for d in INTEGERS if torch.iinfo(d).min <= targets.min() and targets.max() <= torch.iinfo(d).max]
    assert torch.int64 in fit
    for dtype in fit:
        given = targets.to(dtype)
        out = G.goldfish_targets(given, k, h, strategy, **kw)
        assert out.dtype == torch.int64 and torch.equal(out, masked)
        assert torch.equal(given, targets.to(dtype))  # input untouched
        assert torch.equal(G.goldfish_targets(given[0], k, h, strategy, **kw), masked[0])  # 1-D


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("strategy", ["hash", "mix", "avalanche"])
def test_every_integer_dtype_gives_the_same_mask(dtype, strategy):
    small = draw(2, 200, high=128)
    want = G.goldfish_mask(small, 3, 4, strategy)
    assert want.any() and torch.equal(G.goldfish_mask(small.to(dtype), 3, 4, strategy), want)


@pytest.mark.parametrize("case", EDGES["edge"], ids=lambda c: f"{c['name']}-k{c['k']}")
def test_edges_equal_the_released_code(case):
    targets = torch.tensor(case["targets"])
    value, _ = G._window(targets, case["h"], "hash", None)
    tail = value[0, case["h"] - 1 :]
    assert tail.tolist() == [int(p) for p in case["products"]]
    assert (tail % G.TABLE_SIZE).tolist() == case["keys"]
    out = G.goldfish_targets(targets, case["k"], case["h"], ignore_index=case["ignore_index"])
    assert out.tolist() == case["masked"]


def test_mix_vectors():
    for tokens, h, want in (
        ([5, 9, 0, 4, 11, 13, 17, 19, 23, 29, 31, 37], 4,
         [3504998, 8520663, 12634412, 9435024, 15327372, 11717113, 2968657, 10156209, 15935380]),
        (list(range(1, 17)), 13, [7551995, 1429049, 9989129, 9158388]),
    ):  # fmt: skip
        for k in (2, 3, 4, 50):
            drop = G.goldfish_mask(torch.tensor(tokens), k, h, "mix")
            assert drop.tolist() == [False] * (h - 1) + [u * k < 2**24 for u in want]


def _brute(row, k, h, strategy, *, window="target", docs=None, short=False, prev=(), table=None):
    """The rule of goldfish_mask, one position at a time in Python integers."""
    out, line = [], [*prev, *row]
    ids = [docs[0]] * len(prev) + list(docs) if docs else [0] * len(line)
    for p in range(len(prev), len(line)):
        end = p + 1 if window == "target" else p  # one past the window
        where = [i for i in range(end - h, end) if i >= 0 and ids[i] == ids[p]]
        if not where or (len(where) < h and not short):
            out.append(False)
            continue
        if strategy == "hash":
            prod = 1
            for i in where:
                prod *= line[i]
            prod = (prod + 2**63) % 2**64 - 2**63
            u = int(table[prod % G.TABLE_SIZE] * 2**24)
        else:
            A, M = 0x9E3779B97F4A7C15, 2**64
            z = sum((line[i] + 1) * pow(A, end - i, M) for i in where) % M
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % M
            z = (z ^ z >> 27) * 0x94D049BB133111EB % M
            u = (z ^ z >> 31) >> 40
        out.append(u * k < 2**24)
    return out


@pytest.mark.parametrize("strategy", ["hash", "mix"])
@pytest.mark.parametrize("window", G.WINDOWS)
@pytest.mark.parametrize("short", [False, True])
def test_options_against_brute_force(strategy, window, short):
    targets, table = draw(3, 40), G.hash_table().tolist()
    docs = torch.tensor([[0] * 40, [0] * 3 + [1] * 20 + [2] * 17, [5] * 39 + [6]])
    prev = draw(3, 4, seed=9)
    for h in (1, 2, 5):
        kw = {"window": window, "short_windows": short}
        base = {"window": window, "short": short, "table": table}
        for got, extra in (
            (G.goldfish_mask(targets, 3, h, strategy, **kw), lambda b: {}),
            (G.goldfish_mask(targets, 3, h, strategy, doc_ids=docs, **kw), lambda b: {"docs": docs[b].tolist()}),
            (G.goldfish_mask(targets, 3, h, strategy, prev=prev, **kw), lambda b: {"prev": prev[b].tolist()}),
        ):
            want = [_brute(targets[b].tolist(), 3, h, strategy, **base, **extra(b)) for b in range(3)]
            assert got.tolist() == want


def test_shift_invariance_and_nesting():
    passage, h = draw(60), 13
    alone = G.goldfish_mask(passage, 4, h)[h - 1 :]
    for offset in (1, 7, 30):
        row = torch.cat([draw(offset, seed=offset), passage])
        assert torch.equal(G.goldfish_mask(row, 4, h)[offset + h - 1 :], alone)
    text = draw(4, 4000)
    for strategy in ("hash", "mix", "avalanche"):
        k8, k4, k3 = (G.goldfish_mask(text, k, h, strategy) for k in (8, 4, 3))
        assert not (k8 & ~k4).any() and not (k4 & ~k3).any() and k8.any()
        assert not k3[:, : h - 1].any()


@pytest.mark.parametrize("strategy", ["hash", "mix", "avalanche", "random"])
@pytest.mark.parametrize("k", [2, 4, 50])
def test_drop_rate(strategy, k):
    n = 200_000
    drop = G.goldfish_mask(draw(n), k, 4, strategy, generator=torch.Generator().manual_seed(1))
    assert abs(float(drop.float().mean()) - 1 / k) < 5 * math.sqrt((1 - 1 / k) / k / n) + 0.003 / k  # table bias


def test_order_matters_to_mix_alone():
    row = draw(13)
    turned = [row[torch.randperm(13, generator=torch.Generator().manual_seed(s))] for s in range(40)]
    last = {s: {bool(G.goldfish_mask(t, 2, 13, s)[-1]) for t in turned} for s in ("hash", "mix")}
    assert len(last["hash"]) == 1 and len(last["mix"]) == 2


def test_union_over_epochs():
    text, g = draw(2000), torch.Generator().manual_seed(0)
    random = torch.stack([~G.goldfish_mask(text, 4, strategy="random", generator=g) for _ in range(40)]).any(dim=0)
    same = torch.stack([~G.goldfish_mask(text, 4) for _ in range(40)]).any(dim=0)
    assert random.all() and torch.equal(same, ~G.goldfish_mask(text, 4)) and 0.7 < same.float().mean() < 0.8


def test_exempt_rows_and_map():
    text = draw(2, 500, high=50)
    plain = G.goldfish_mask(text, 2, 4)
    spare = G.goldfish_mask(text, 2, 4, exempt=[7, 9])
    assert torch.equal(spare, plain & (text != 7) & (text != 9)) and not torch.equal(spare, plain)
    as_bool = torch.zeros(50, dtype=torch.bool)
    as_bool[[7, 9]] = True
    assert torch.equal(G.goldfish_mask(text, 2, 4, exempt=as_bool), spare)
    one = G.goldfish_mask(text, 2, 4, goldfish_rows=torch.tensor([False, True]))
    assert not one[0].any() and torch.equal(one[1], plain[1])
    canon = torch.arange(50)
    canon[8] = 3  # 8 is a variant of 3
    variant = torch.where(text == 3, 8, text)
    assert not torch.equal(G.goldfish_mask(variant, 2, 4), plain)
    assert torch.equal(G.goldfish_mask(variant, 2, 4, hash_map=canon), G.goldfish_mask(text, 2, 4, hash_map=canon))
    hole = text.clone()
    hole[:, 10] = -100  # the raw ignore value is hashed whatever the map, and never dropped
    assert not G.goldfish_mask(hole, 2, 4, hash_map=canon)[:, 10].any()
    holes = G.goldfish_mask(hole, 2, 4)
    assert torch.equal(holes[:, 14:], plain[:, 14:])


def test_normalizing_map():
    pieces = ["a", "A", "\u00adA", " b", "\u00a0B", "ﬁ", "fi", "x", b"\xff", b"a"]
    assert G.normalizing_map(pieces).tolist() == [0, 0, 0, 3, 3, 5, 5, 7, 8, 0]


# ---- losses


def test_loss_vector():
    v = EDGES["loss"]
    logits = torch.tensor(v["logits"], dtype=torch.float64)
    loss, stats = G.goldfish_loss(logits, torch.tensor(v["targets"]), v["k"], v["h"], return_stats=True)
    torch.testing.assert_close(loss.item(), v["loss"], rtol=1e-12, atol=0)
    assert stats["supervised"] == v["supervised"] and sum(stats.values()) == 10 and stats["ignored"] == 1


def test_k_none_is_cross_entropy_and_dropped_rows_get_no_gradient():
    logits, targets = torch.randn(2, 30, 11, dtype=torch.float64, requires_grad=True), draw(2, 30, high=11)
    targets[0, 3] = -100
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(G.goldfish_loss(logits, targets, k=None), want)
    masked = G.goldfish_targets(targets, 3, 4)
    loss = G.goldfish_loss(logits, targets, 3, 4)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), masked.flatten()))
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[masked == -100] == 0).all() and (grad[masked != -100].abs().sum(-1) > 0).all()
    n = (masked != -100).sum()
    onehot = F.one_hot(masked.clamp(min=0), 11)
    torch.testing.assert_close(grad, (masked != -100)[..., None] * (logits.softmax(-1) - onehot).detach() / n)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
def test_nan_in_dropped_rows_is_harmless_and_in_kept_rows_shows(impl):
    logits, targets = torch.randn(1, 40, 9), draw(1, 40, high=9)
    drop = G.goldfish_mask(targets, 3, 4)
    clean = G.goldfish_loss(logits.clone(), targets, 3, 4, impl=impl)
    bad = logits.clone()
    bad[drop] = math.nan
    bad.requires_grad_()
    loss = G.goldfish_loss(bad * 1, targets, 3, 4, impl=impl)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    assert (bad.grad[drop] == 0).all() and bad.grad.isfinite().all()
    logits[~drop] = math.nan
    assert G.goldfish_loss(logits, targets, 3, 4, impl=impl).isnan()


def test_nothing_supervised_is_zero():
    targets = torch.full((2, 5), -100)
    for normalizer in (None, "batch", 3):
        logits = torch.randn(2, 5, 7, requires_grad=True)
        loss, stats = G.goldfish_loss(logits, targets, 4, 4, normalizer=normalizer, return_stats=True)
        loss.backward()
        assert loss == 0 and (logits.grad == 0).all() and stats["supervised"] == 0 and stats["ignored"] == 10
    hidden, weight = torch.randn(2, 5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    loss = G.goldfish_linear_loss(hidden, weight, targets, 4, 4)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_micro_batches_add_up():
    """Very different counts: two micro-batches under the global count give the gradient of one large batch."""
    logits, targets = torch.randn(4, 30, 11, dtype=torch.float64, requires_grad=True), draw(4, 30, high=11)
    targets[0, 2:] = -100
    whole, stats = G.goldfish_loss(logits, targets, 3, 4, return_stats=True)
    (want,) = torch.autograd.grad(whole, logits)
    halves = [G.goldfish_loss(logits[i], targets[i], 3, 4, normalizer=stats["supervised"]) for i in ([0], [1, 2, 3])]
    torch.testing.assert_close(sum(halves), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(halves), logits)[0], want)
    torch.testing.assert_close(G.goldfish_loss(logits, targets, 3, 4, reduction="sum"), whole * stats["supervised"])


def test_an_unsigned_156_is_not_ignore_index():
    targets = torch.full((1, 4), 156, dtype=torch.uint8)
    with pytest.raises(ValueError, match="target 156"):
        G.goldfish_loss(torch.zeros(1, 4, 100), targets, 4, 2)
    _, stats = G.goldfish_loss(torch.zeros(1, 4, 200), targets, k=None, return_stats=True)
    assert stats["supervised"] == 4


def test_fp32_reduction_and_dtypes():
    logits, targets = torch.randn(2, 50, 300), draw(2, 50, high=300)
    want = G.goldfish_loss(logits.double(), targets, 4)
    assert want.dtype == torch.float64
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)):  # rounding of the inputs
        loss = G.goldfish_loss(logits.to(dtype), targets, 4)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=0)
    strided = torch.randn(300, 50, 2).permute(2, 1, 0)
    torch.testing.assert_close(
        G.goldfish_loss(strided, targets, 4), G.goldfish_loss(strided.contiguous(), targets.int().T.contiguous().T, 4)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_linear_loss_equals_loss(bias, chunk):
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
    hidden, weight, b = make(2, 20, 6), make(13, 6), make(13) if bias else None
    targets = draw(2, 20, high=13)
    targets[1, :5] = -100
    leaves = [t for t in (hidden, weight, b) if t is not None]
    want = G.goldfish_loss(F.linear(hidden, weight, b), targets, 3, 4)
    got = G.goldfish_linear_loss(hidden, weight, targets, 3, 4, chunk=chunk, bias=b)
    torch.testing.assert_close(got, want)
    for a, c in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, c)


def test_gradcheck():
    targets = draw(1, 12, high=5)
    logits = torch.randn(1, 12, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: G.goldfish_loss(x, targets, 3, 4), logits)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 12, 4), (5, 4), (5,)))
    f = lambda h, w, b: 3 * G.goldfish_linear_loss(h, w, targets, 3, 4, chunk=5, bias=b)
    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


def test_linear_loss_low_precision_and_frozen_head():
    hidden, weight = torch.randn(2, 40, 16, requires_grad=True), torch.randn(50, 16)
    targets = draw(2, 40, high=50)
    want = G.goldfish_linear_loss(hidden, weight, targets, 4)
    want.backward()
    low = hidden.detach().bfloat16().requires_grad_()
    got = G.goldfish_linear_loss(low, weight.bfloat16(), targets, 4)
    got.backward()
    assert got.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0)  # bf16 logits
    torch.testing.assert_close(low.grad.float(), hidden.grad, rtol=0.1, atol=2e-3)


def test_linear_loss_follows_autocast_as_linear_does():
    hidden, weight = torch.randn(2, 40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = draw(2, 40, high=50)
    with torch.autocast("cpu", torch.bfloat16):
        got = G.goldfish_linear_loss(hidden, weight, targets, 4)
    want = G.goldfish_linear_loss(hidden.bfloat16(), weight.bfloat16(), targets, 4)
    assert got == want and got.dtype == torch.float32
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_torch_path_traces():
    logits, targets = torch.randn(2, 40, 9), draw(2, 40, high=9)
    compiled = torch.compile(lambda x, y: G.goldfish_loss(x, y, 3, 4, impl="torch"), backend="aot_eager")
    torch.testing.assert_close(compiled(logits, targets), G.goldfish_loss(logits, targets, 3, 4))


# ---- ranks


def _uneven(rank, size):
    """Rank 0 has 1 supervised target, rank 1 dozens: DDP's parameters are those of one process, after several steps."""
    from torch.nn.parallel import DistributedDataParallel

    config = G.small_config(G.Config(vocab=300, d_model=16, n_head=2, n_layer=1))
    rows = draw(4, 33, high=300, seed=3)
    targets = rows[:, 1:].clone()
    targets[:2, 1:] = -100
    alone, ours = (G.GPT(config, seed=1).double() for _ in range(2))
    ddp = DistributedDataParallel(ours)
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    for linear in (False, True):
        opts = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (alone, ours)]
        for _ in range(3):
            G.goldfish_loss(alone(rows[:, :-1]), targets, 3, 4).backward()
            if linear:
                out = ddp(rows[mine, :-1], hidden=True)
                loss = G.goldfish_linear_loss(out, ours.head, targets[mine], 3, 4, normalizer="global", chunk=5)
            else:
                loss = G.goldfish_loss(ddp(rows[mine, :-1]), targets[mine], 3, 4, normalizer="global")
            loss.backward()
            for a, b in zip(alone.parameters(), ours.parameters(), strict=True):
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12)
            for o in opts:
                o.step()
                o.zero_grad()
    for a, b in zip(alone.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
    nothing = G.goldfish_loss(ddp(rows[mine, :-1]), torch.full((2, 32), -100) if rank == 0 else targets[mine],
                              3, 4, normalizer="global")  # fmt: skip
    nothing.backward()  # a rank without targets still takes part
    assert (nothing == 0) == (rank == 0)


def test_two_ranks_with_uneven_counts_match_one(tmp_path):
    run_ranks(_uneven, 2, tmp_path)


def _trainer_steps(rank, size, accum, out):
    cfg = G.Config(mode="train", steps=4, accum=accum, d_model=32, n_layer=1, vocab=300, warmup=1)
    text = G.Text(cfg)
    trainer = G.Trainer(cfg, text, cluster.World(rank, size, torch.device("cpu")))
    lines = [trainer.advance(log=True) for _ in range(4)]
    if rank == 0:
        torch.save([lines, trainer.model.state_dict()], out)


def test_trainer_splits_change_nothing(tmp_path):
    """1 process x 1, 1 x 4 micro-steps, 2 processes x 2: the same losses and parameters."""
    results = []
    for i, (size, accum) in enumerate(((1, 1), (1, 4), (2, 2))):
        (tmp_path / str(i)).mkdir()
        out = tmp_path / str(i) / "out.pt"
        run_ranks(_trainer_steps, size, tmp_path / str(i), accum, out)
        results.append(torch.load(out, weights_only=True))
    for lines, weights in results[1:]:
        for a, b in zip(results[0][0], lines, strict=True):
            assert a["supervised"] == b["supervised"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        for name, p in results[0][1].items():
            torch.testing.assert_close(weights[name], p, rtol=0, atol=2e-5)  # Adam amplifies rounding of tiny gradients


SMALL = ["--d-model", "32", "--n-layer", "1", "--vocab", "300", "--log-every", "1", "--device", "cpu"]


def _metrics(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines[1:] if "step" in x]


@pytest.mark.drill
def test_kill_all_ranks_and_resume(tmp_path):
    """kill -9 in mid-run, then --resume: the metrics of a run that was never stopped, exactly."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["train", "--steps", "150", "--save-every", "7", *SMALL]
    finish(start_ranks(2, "goldfish.py", *argv, "--out", str(whole)))
    ranks = start_ranks(2, "goldfish.py", *argv, "--out", str(killed))
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(ranks, signal.SIGKILL)
    assert cluster.load(killed / "checkpoint.pt")["step"] < 150, "the run ended before it was killed"
    out = finish(start_ranks(2, "goldfish.py", *argv, "--resume", "--out", str(killed)))
    assert "val_loss" in out[0]
    assert _metrics(killed) == _metrics(whole) and len(_metrics(whole)) == 150

    for flag, value, was in (("--k", "3", 4), ("--h", "5", 13), ("--strategy", "mix", "hash"), ("--seed", "9", 0)):
        done = run_script("goldfish.py", *argv, "--resume", "--out", str(killed), flag, value)
        assert done.returncode == 2 and f"{flag} {was}" in done.stderr and f"{flag} {value}" in done.stderr
        assert "Traceback" not in done.stderr

    path = killed / "checkpoint.pt"  # a half-written checkpoint: the one before it is used, and says so
    path.write_bytes(path.read_bytes()[:5000])
    done = run_script("goldfish.py", *argv, "--resume", "--out", str(killed))
    assert done.returncode == 0 and "damaged" in done.stdout


@pytest.mark.drill
def test_sigterm_writes_a_checkpoint_and_exits_0(tmp_path):
    argv = ["train", "--steps", "100000", "--save-every", "0", *SMALL, "--out", str(tmp_path)]
    ranks = start_ranks(2, "goldfish.py", *argv)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)  # any one rank: all stop at the same step
    out = finish(ranks)
    assert [p.returncode for p in ranks] == [0, 0] and "go on with --resume" in out[0]
    assert cluster.load(tmp_path / "checkpoint.pt")["step"] == _metrics(tmp_path)[-1]["step"]


# ---- the audit


def _successor(vocab=8):
    """A model that always continues i with i + 1."""
    return lambda ids: 10.0 * F.one_hot((ids + 1) % vocab, vocab).float()


def test_greedy_extraction_and_metrics():
    rows = torch.stack([torch.arange(6) % 8, torch.tensor([0, 1, 2, 7, 0, 1])])
    gen = G.extract(_successor(), rows, 2, 4)
    assert gen.tolist() == [[2, 3, 4, 5], [2, 3, 4, 5]]
    ref = rows[:, 2:]
    assert G.exact_match(gen, ref) == 0.5 and G.token_accuracy(gen, ref) == 5 / 8
    assert G.first_divergence(gen, ref).tolist() == [4, 1]
    tie = lambda ids: torch.zeros(*ids.shape, 5)
    assert G.extract(tie, rows, 2, 3).tolist() == [[0, 0, 0]] * 2  # the lowest of equals
    assert G.extract(tie, rows, 2, 1, beams=5).flatten(1).sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2
    with pytest.raises(ValueError, match="cannot give 9 tokens"):
        G.extract(_successor(), rows, 9, 4)
    with pytest.raises(ValueError, match="does not cover"):
        G.extract(_successor(), rows, 2, 4, mask=torch.zeros(2, 3, dtype=torch.bool))


def _markov(seed=0, V=6):
    """Random logits of the last two tokens."""
    table = torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed))

    def model(ids):
        before = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
        return table[before, ids]

    return model


def test_beam_search_against_all_sequences():
    model, rows, n = _markov(), draw(3, 4, high=6), 4
    every = torch.cartesian_prod(*[torch.arange(6)] * n)  # 1296 suffixes
    for b, beams in enumerate(G.extract(model, rows, 3, n, beams=1296)):
        full = torch.cat([rows[b, :3].expand(len(every), 3), every], dim=1)
        log_p = model(full)[:, 2:-1].log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(1)
        assert beams[:5].tolist() == every[log_p.argsort(descending=True)[:5]].tolist()
    assert torch.equal(
        G.extract(model, rows, 3, n, beams=1), G.extract(model, rows, 3, n, beams=1, mask=torch.ones(3, 9) > 0)
    )
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, 4] = True  # generated tokens 0, 1, 3 are greedy, token 2 branches
    found = G.extract(model, rows, 3, n, beams=30, mask=mask)
    greedy = G.extract(model, rows, 3, n)
    assert (found[:, :, :2] == greedy[:, None, :2]).all() and torch.equal(found[0, :, 2].unique(), torch.arange(6))
    assert (found == greedy[:, None]).all(-1).any(-1).all()


def test_cached_decoding_equals_rereading():
    cfg = G.Config(vocab=300, d_model=32, n_layer=2)
    model = G.GPT(G.small_config(cfg) | {"num_key_value_heads": 2}).double()
    torch.nn.init.normal_(model.model.embed_tokens.weight, generator=torch.Generator().manual_seed(0))
    rows, plain = draw(3, 20, high=300), lambda ids: model(ids)
    for beams in (1, 4):
        assert torch.equal(G.extract(model, rows, 6, 9, beams), G.extract(plain, rows, 6, 9, beams))


def _lcs(a, b):
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def test_rouge_l_and_longest_run():
    a, b = draw(20, 12, high=5), draw(20, 9, high=5, seed=1)
    want = [2 * _lcs(x, y) / 21 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(G.rouge_l(a, b), torch.tensor(want))
    assert G.rouge_l([1, 2, 3], [1, 2, 3]) == 1.0 and G.rouge_l([1, 2], [3, 4]) == 0.0
    assert G.rouge_l([1, 2, 3, 4], [1, 9, 3, 4]) == 0.75  # a subsequence, not a run
    assert G.longest_run(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 9, 3, 4]])).tolist() == [0.5]
    with pytest.raises(ValueError, match="cannot compare"):
        G.rouge_l([[1]], [1])


def test_auc_and_tpr():
    assert G.auc([3.0, 4.0], [1.0, 2.0]) == 1.0 and G.auc([1.0, 1.0], [1.0, 1.0]) == 0.5
    assert G.auc([2.0, 0.0], [1.0]) == 0.5
    pos, neg = torch.arange(100.0) + 50, torch.arange(100.0)
    assert G.tpr_at_fpr(pos, neg, 0.1) == pytest.approx((pos > 89).double().mean().item())
    assert G.tpr_at_fpr(pos, neg, 0.001) == 0.5  # below one negative: none may pass


def test_mia_scores():
    import zlib

    model, rows = _markov(), draw(4, 11, high=6)
    log_p = model(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    s = G.mia_scores(model, rows, texts=["aaaa", "b", "c", "d"])
    torch.testing.assert_close(s["loss"], log_p.mean(1))
    torch.testing.assert_close(s["min_k"], log_p.sort(1).values[:, :2].mean(1))
    torch.testing.assert_close(s["zlib"][0], log_p[0].sum() / len(zlib.compress(b"aaaa")))
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, ::2] = True
    aware = G.mia_scores(model, rows, mask=mask)
    torch.testing.assert_close(aware["loss"], log_p[:, 1::2].mean(1))
    torch.testing.assert_close(aware["min_k"], log_p[:, 1::2].amin(1))


def test_scores_never_need_the_logits_of_all_rows():
    """2000 canaries of 2048 tokens over 32000 ids, the paper's, would be 524 GB of logits."""
    model, rows, sizes = _markov(), draw(40, 11, high=6), []

    def watched(ids):
        sizes.append(len(ids))
        return model(ids)

    got = G.mia_scores(watched, rows)
    one_by_one = torch.cat([G.mia_scores(model, r)["loss"] for r in rows.split(1)])
    assert max(sizes) <= 16 and sum(sizes) == 40
    torch.testing.assert_close(got["loss"], one_by_one)


@pytest.mark.weights
def test_real_model_values_and_audit(tmp_path):
    from common.weights import open_weights

    weights = open_weights("smollm2")
    model = G.GPT(weights.config)
    model.load_state_dict(weights.state_dict())
    with torch.no_grad():
        ids = torch.tensor([[1604, 803, 24, 81, 28, 278, 727, 472, 1003, 253, 1232, 278, 198]])
        loss = G.goldfish_loss(model(ids[:, :-1]), ids[:, 1:], k=None)
        assert loss.item() == pytest.approx(1.26725, abs=2e-5)
        top = model(torch.tensor([[504, 3575, 282, 4649, 314]]))[0, -1].topk(5)
    assert top.indices.tolist() == [7042, 260, 4528, 2250, 1315]
    torch.testing.assert_close(top.values, torch.tensor([17.371, 14.889, 13.245, 13.010, 12.952]), rtol=0, atol=2e-3)
    done = run_script("goldfish.py", "audit", "--model", "smollm2", "--data", "LICENSE", "--nonmembers", "goldfish.py",
                      "--rows", "2", "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "audit.json").read_text())
    assert [r["file"] for r in found["rows"]] == ["LICENSE", "goldfish.py"] and found["auc"]["loss"] == 1.0


# ---- the command


@pytest.mark.drill
def test_demo_shortened(tmp_path):
    """The header's command and its Expect line, on fewer rows of the table; the claim's file and the picture."""
    done = run_script("goldfish.py", "--runs", "ordinary", "k=4", "k=3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    expect = re.search(r'^Expect\s+"(.+?)"', G.__doc__, re.M)[1]
    assert expect in done.stdout.splitlines()[-1]
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert claim["holds"] is True and expect in claim["here"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    audits = {x["audit"]: x for x in lines if "audit" in x}
    assert audits["k=3"]["supervised"] < audits["k=4"]["supervised"] < audits["ordinary"]["supervised"] == 300 * 16 * 64
    assert audits["k=4"]["at_dropped"] == audits["k=3"]["at_dropped"] == 1.0
    assert (tmp_path / "goldfish.png").exists() or "pip install" in done.stdout


def test_rows_of_the_demo_differ_in_what_they_say():
    cfg = G.Config()
    text = G.Text(cfg)
    plain, noisy, control, moved = (
        text.batch(G.row_config(cfg, s), 3) for s in ("k=4", "near-duplicates", "control", "k=4,rechunk=1")
    )
    canaries = {tuple(r) for r in text.canary.tolist()}
    shown = lambda rows: sum(tuple(r) in canaries for r in rows.tolist())
    assert shown(plain) == 8 and shown(control) == 0 and shown(noisy) < 4 and shown(moved) < 8
    changed = (torch.cat([text.batch(G.row_config(cfg, "near-duplicates"), s) for s in range(8)])
               != torch.cat([text.batch(cfg, s) for s in range(8)]))  # fmt: skip
    assert 0.015 < changed.float().mean() < 0.035  # 5 % of half of the rows
    assert torch.equal(text.batch(cfg, 5), text.batch(cfg, 5)) and not torch.equal(plain, text.batch(cfg, 4))
    order = [tuple(r) for s in range(4) for r in text.batch(cfg, s).tolist() if tuple(r) in canaries]
    assert len(order) == 32 and all(order.count(c) == 2 for c in canaries)  # every canary once an epoch
    again = [G.mask_of(G.row_config(cfg, "random"), plain, s) for s in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_supervised_tokens_stop_the_run():
    cfg = G.Config(mode="train", supervised_tokens=5000, d_model=32, n_layer=1, vocab=300)
    with cluster.world("cpu") as w:
        trainer = G.Trainer(cfg, G.Text(cfg), w)
        while trainer.done() < 1:
            last = int(trainer.supervised)
            trainer.advance(log=False)
    assert last < 5000 <= int(trainer.supervised)


# ---- bad input


T = torch.arange(1, 21).reshape(1, 20)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: G.goldfish_mask(T, 1), ValueError, "k must be an integer >= 2 or None"),
        (lambda: G.goldfish_mask(T, 0), ValueError, "k must be an integer >= 2 or None"),
        (lambda: G.goldfish_mask(T, -4), ValueError, "k must be an integer >= 2 or None"),
        (lambda: G.goldfish_mask(T, 4.0), ValueError, "k must be an integer >= 2 or None"),
        (lambda: G.goldfish_mask(T, True), ValueError, "k must be an integer >= 2 or None"),
        (lambda: G.Config(k=None), ValueError, "k=None and strategy=hash"),
        (lambda: G.Config(strategy=None), ValueError, "k=4 and strategy=None"),
        (lambda: G.Config(k=1), ValueError, "k must be an integer >= 2"),
        (lambda: G.goldfish_mask(T, 4, 0), ValueError, "h must be an integer of at least 1"),
        (lambda: G.goldfish_mask(T[:, :5], 4, 13, strict=True), ValueError, "width 13 exceeds sequence length 5"),
        (lambda: G.goldfish_mask(T, 4, strategy="hsah"), ValueError, "hash, mix, avalanche, static, random"),
        (lambda: G.goldfish_mask(T, 4, window="both"), ValueError, "target, context"),
        (lambda: G.goldfish_mask(T.float(), 4), TypeError, "targets.long()"),
        (lambda: G.goldfish_mask(T > 3, 4), TypeError, "torch.bool"),
        (lambda: G.goldfish_mask(T, 4, strategy="static", start=-1), ValueError, "start must not be negative"),
        (lambda: G.goldfish_mask(T, 4, strategy="random"), ValueError, "does not prevent memorisation"),
        (lambda: G.goldfish_loss(torch.zeros(1, 19, 30), T), ValueError, r"\(1, 20\) .*\(1, 19\)"),
        (lambda: G.goldfish_loss(torch.zeros(1, 20, 20), T), ValueError, r"20 at \(0, 19\) is outside \[0, 20\)"),
        (lambda: G.goldfish_loss(torch.zeros(1, 20, 30), T - 3), ValueError, r"target -2 at \(0, 0\)"),
        (lambda: G.goldfish_loss(torch.zeros(1, 20, 30), T, normalizer="mean"), ValueError, "batch, global"),
        (lambda: G.goldfish_loss(torch.zeros(1, 20, 30), T, reduction="none"), ValueError, "mean or sum"),
        (lambda: G.goldfish_loss(torch.zeros(1, 20, 30), T, impl="cuda"), ValueError, "auto, torch or triton"),
        (lambda: G.goldfish_loss(torch.empty(1, 20, 2**31, device="meta"), T.to("meta")), ValueError, "linear_loss"),
        (lambda: G.goldfish_loss(torch.zeros(1, 20, 30, device="meta"), T), ValueError, "on cpu, .* on meta"),
        (lambda: G.goldfish_linear_loss(torch.zeros(1, 20, 4), torch.zeros(30, 5), T), ValueError, "differ"),
        (lambda: G.goldfish_linear_loss(torch.zeros(1, 20, 4), torch.zeros(30, 4), T, chunk=0), ValueError, "least 1"),
        (lambda: G.Config(d_model=30), ValueError, "not a multiple"),
        (lambda: G.Config(d_model=12), BadInput, "not a multiple"),
        (lambda: G.Config(suffix=60), ValueError, "exceed a row"),
        (lambda: G.Config(canaries=0), BadInput, "--canaries must be at least 1"),
        (lambda: G.Config("train", canaries=-1), BadInput, "--canaries must be at least 0"),
        (lambda: G.Config(n_layer=0), BadInput, "--n-layer must be at least 1"),
        (lambda: G.Config(supervised_tokens=-1.0), BadInput, "--supervised-tokens must be at least 0"),
        (lambda: G.Config(beams=(8, 0)), BadInput, "--beams must be at least 1"),
        (lambda: G.Text(G.Config(canaries=5000)), BadInput, r"--canaries 5000, but the text has only \d+ rows"),
        (lambda: G.Text(G.Config(canaries=1800)), BadInput, r"too small: it has \d+ tokens.*need \d+"),
        (lambda: G.row_config(G.Config(), "k=1"), BadInput, "k must be"),
        (lambda: G.row_config(G.Config(), "kk=4"), BadInput, "kk.*such as k=4,h=7"),
        (lambda: G.row_config(G.Config(), "k=4,lr=x"), BadInput, "such as k=4,h=7"),
        (lambda: G.row_config(G.Config(), "hash"), BadInput, "such as k=4,h=7"),
        (lambda: G.row_config(G.Config(), "k=4,strategy=hsah"), BadInput, "strategy is one of hash, mix"),
        (lambda: G.row_config(G.Config(), "k=4,vocab=300"), BadInput, "'vocab=300' is not"),
        (lambda: G.row_config(G.Config(), "k=4,data=docs"), BadInput, "'data=docs' is not"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_row_fields():
    c = G.row_config(G.Config(), "k=8,lr=1e-3,canary-share=0.25,rechunk=1,strategy=mix")
    assert (c.k, c.lr, c.canary_share, c.rechunk, c.strategy) == (8, 1e-3, 0.25, True, "mix")
    assert G.row_config(G.Config(h=7), "ordinary") == G.Config(h=7, k=0)


def test_warnings_and_what_is_allowed():
    with pytest.warns(UserWarning, match="context width 13 exceeds sequence length 5"):
        assert not G.goldfish_mask(T[:, :5], 4, 13).any()
    with pytest.warns(UserWarning, match="use strategy 'mix'"):
        G.goldfish_mask(draw(1, 60), 4, 30)
    with pytest.warns(UserWarning, match="over bytes"):
        G.Config(vocab=256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        G.goldfish_mask(draw(1, 60), 4, 30, "mix")
        assert not G.goldfish_mask(T, 4, strategy="static", start=20).any()
        assert G.goldfish_mask(T[:, :5], 2, 13, prev=T[:, 5:18], strict=True).any()  # all windows are full
        loss, stats = G.goldfish_loss(torch.zeros(1, 20, 30), T, ignore_index=5, return_stats=True)  # a pad id
        assert stats["ignored"] == 1
        assert G.Config(k=None, strategy=None).k == 0


def test_an_audit_that_cannot_be_is_one_line(tmp_path):
    """The run's rows are too short for what is asked, or it had no canaries."""
    cfg = G.Config("train", d_model=32, n_layer=1, vocab=300, steps=1, out=str(tmp_path))
    with cluster.world("cpu") as w:
        for canaries, asked, message in ((4, {"suffix": 60}, "exceed a row, --block 64"), (0, {}, "--canaries 0")):
            G.train(replace(cfg, canaries=canaries), w)
            with pytest.raises(BadInput, match=message):
                G.audit_run(replace(G.Config("audit", model=str(tmp_path)), **asked), w)


def test_bad_data_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("hello " * 50)
    data = lambda name: ["--data", str(tmp_path / name)]
    for argv, message in (
        (data("none.txt"), "no such file"),
        (data("empty.txt"), "is empty"),
        (data("short.txt"), "the text"),
        (["--resume"], "Train without --resume first"),
    ):
        monkeypatch.setattr("sys.argv", ["goldfish.py", "train", *argv, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stopped:
            cli.run(G.main, G.Config, G.PRESETS)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and said.startswith("goldfish.py: error: ") and message in said


@pytest.mark.gpu
def test_gpu_equals_cpu():
    targets = draw(4, 700, high=128000)
    for strategy in ("hash", "mix"):
        for window in G.WINDOWS:
            want = G.goldfish_mask(targets, 4, 13, strategy, window=window)
            assert torch.equal(G.goldfish_mask(targets.cuda(), 4, 13, strategy, window=window).cpu(), want)
    logits = torch.randn(4, 700, 1000, generator=torch.Generator().manual_seed(0))
    targets = draw(4, 700, high=1000)
    exact = logits.double().requires_grad_()
    want = G.goldfish_loss(exact, targets, 4)
    want.backward()
    for dtype in (torch.float32, torch.bfloat16):
        mine = logits.to("cuda", dtype).requires_grad_()
        got = G.goldfish_loss(mine * 1, targets.cuda(), 4)
        got.backward()
        tol = 1e-5 if dtype == torch.float32 else 5e-3
        torch.testing.assert_close(got.double().cpu(), want, rtol=tol, atol=0)
        torch.testing.assert_close(mine.grad.double().cpu(), exact.grad, rtol=2e-2, atol=1e-7)
        hidden, weight = logits.to("cuda", dtype)[..., :64], logits.to("cuda", dtype)[0, :, :64].contiguous()
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = targets.cuda() % 700
        fused, plain = (
            G.goldfish_linear_loss(leaves[0], leaves[1], y, 4),
            G.goldfish_loss(F.linear(*leaves), y, 4, impl="torch"),
        )
        torch.testing.assert_close(fused, plain, rtol=1e-2, atol=0)
        for a, b in zip(torch.autograd.grad(fused, leaves), torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=1e-4)
