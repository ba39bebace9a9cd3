"""abacus.py: positions and data against vectors and Python's integers, the model, ranks, resume, the verdict, bad input."""

import json
import operator
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import kill, run_ranks, run_script, start_ranks

import abacus as A
from common import cluster
from common.cli import BadInput, parse

DATA = Path(__file__).parent / "data"


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(**settings) -> A.Config:
    small = {"mode": "train", "d_model": 64, "n_layer": 1, "device": "cpu", "batch": 24, "curriculum": 0}
    return A.Config(**{**small, **settings})


def read(name: str):
    return json.loads((DATA / f"abacus_{name}.json").read_text())


def trained(cfg: A.Config, log=lambda **line: None):
    """The model of one run on this process."""
    return A.train_model(cfg, cluster.World(0, 1, torch.device("cpu")), SimpleNamespace(line={}, log=log), "", "", True)


# %% positions


@pytest.mark.parametrize("case", read("positions"), ids=lambda c: c["name"])
def test_positions_equal_the_published(case):
    got = A.digit_positions(torch.tensor(case["ids"]), case["digit_tokens"], 1 + (case["k"] or 0))
    assert got.dtype == torch.int64 and got.tolist() == case["positions"]


def test_positions_by_hand():
    ids = A.encode("12+345=")[None]
    assert A.digit_positions(ids, A.DIGITS).tolist() == [[1, 2, 0, 1, 2, 3, 0]]
    assert A.digit_positions(ids, A.DIGITS, 38).tolist() == [[38, 39, 0, 38, 39, 40, 0]]
    both = A.digit_positions(ids.repeat(2, 1), A.DIGITS, torch.tensor([[1], [5]]))
    assert both.tolist() == [[1, 2, 0, 1, 2, 3, 0], [5, 6, 0, 5, 6, 7, 0]]
    assert A.digit_positions(torch.tensor([[5, 0, 6, 7]]), A.DIGITS).tolist() == [[1, 0, 1, 2]]  # PAD ends a number
    assert A.digit_positions(torch.tensor([[14, 0, 17]]), A.DIGITS, 9).tolist() == [[0, 0, 0]]  # no digits
    for shape in ((0, 5), (3, 0), (0, 0)):
        assert A.digit_positions(torch.zeros(shape, dtype=torch.long), A.DIGITS).shape == shape
        assert A.AbacusEmbedding(A.DIGITS, 8)(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 8)


def test_positions_depend_on_the_prefix_alone():
    ids = torch.randint(0, 18, (50, 40), generator=g())
    whole, row = A.digit_positions(ids, A.DIGITS, 7), torch.zeros(50, dtype=torch.long)
    for t in range(40):  # the rule of decoding token by token
        digit = (ids[:, t] >= 4) & (ids[:, t] <= 13)
        row = torch.where(digit, torch.where(row == 0, 7, row + 1), 0)
        assert torch.equal(row, whole[:, t])
        assert torch.equal(A.digit_positions(ids[:, : t + 1], A.DIGITS, 7), whole[:, : t + 1])


def test_embedding_draws_offsets_in_training_alone():
    ids = A.encode("12+9=")[None].repeat(600, 1)
    m = A.AbacusEmbedding(A.DIGITS, 4, 64, 30)
    rows = lambda out: (out[:, :, None] == m.table.weight).all(dim=3).int().argmax(dim=2)  # (B, T)
    drawn = rows(m(ids, generator=g(1)))
    assert torch.equal(drawn, rows(m(ids, generator=g(1)))) and not torch.equal(drawn, rows(m(ids, generator=g(2))))
    assert set(drawn[:, 0].tolist()) == set(range(1, 31))
    assert torch.equal(drawn[:, 0], drawn[:, 3]) and torch.equal(drawn[:, 0] + 1, drawn[:, 1])  # one shift an example
    assert not drawn[:, [2, 4]].any()
    assert rows(m.eval()(ids)).unique(dim=0).tolist() == [[1, 2, 0, 1, 0]]


def test_fire_equals_the_published():
    want = read("fire")
    p = want["params"]
    fire = A.FIRE(2, 8, p["c"], p["init_L"], want["eps"])
    fire.load_state_dict({n: torch.tensor(v) for n, v in p.items()})
    seen = torch.ones(want["T"], want["T"], dtype=torch.bool).tril()
    got = fire(want["T"])[0]
    torch.testing.assert_close(got[:, seen], torch.tensor(want["bias"])[:, seen], rtol=0, atol=1e-5)


# %% text and data


def test_formats_equal_the_published():
    want = read("formats")
    for c in want["addition"] + want["multiplication"]:
        batch = A.pack([c["text"]])
        assert batch.ids[0].tolist() == c["ids"] and A.decode(batch.ids[0]) == c["text"]
        if "loss_targets" in c:
            assert batch.targets[0].tolist() == c["loss_targets"]
    assert all(A.TOKENS[c] == i for c, i in want["vocab"].items() if c in A.TOKENS)
    assert A.written("add", 97, 8) == "79+8=501" and A.written("sub", 7, 488) == "7-884=184-"


def test_problems_against_python():
    r, ops = random.Random(0), {"add": ("+", operator.add), "sub": ("-", operator.sub), "mul": ("x", operator.mul)}
    for n in range(900):
        task, i, j = "add sub mul".split()[n % 3], r.randint(1, 33), r.randint(1, 33)
        question, answer = A.problem(task, i, j, r).split("=")
        a, b = question.split(ops[task][0])
        assert (len(a), len(b)) == (i, j)
        assert int(answer[::-1]) == ops[task][1](int(a[::-1]), int(b[::-1]))
        assert max(map(len, (a, b, answer.strip("-")))) <= A.span(task, max(i, j))
        x, y, z = A.problem("or", i, j, r).replace("=", "+").split("+")
        assert (len(x), len(y), len(z)) == (i, j, max(i, j)) and (x + y).count("1") == 1
        assert "1" in (x if i < j else y if j < i else x + y)
        assert z == "".join(
            str(int(p) | int(q)) for p, q in zip(x.ljust(len(z), "0"), y.ljust(len(z), "0"), strict=True)
        )
        question, answer = A.problem("sort", i, 1 + j % 3, r).split("=")
        items = [(e[0], int(e[2:][::-1])) for e in question.split(",")]
        assert len({label for label, _ in items}) == i and max(v for _, v in items) < 10 ** (1 + j % 3)
        assert answer == ",".join(label for label, _ in sorted(items, key=lambda e: e[1]))
        assert A.encode(question).max() < A.vocabulary("sort") == 72
    first = [A.problem("add", 1, 2, r)[0] for _ in range(500)]
    assert set(first) == set("123456789")  # no leading zeros


def test_hard_sums():
    kinds = A.hard_sums(3)
    assert {"999+1=0001", "1+999=0001"} <= set(kinds["99..9+d"]) and "001+009=0001" in kinds["d0..0+e0..0"]
    assert "555+444=999" in kinds["dd..d+ee..e"] and [len(k) for k in kinds.values()] == [18, 81, 81]
    for text in sum(kinds.values(), []):
        a, b, c = (int(n[::-1]) for n in text.replace("=", "+").split("+"))
        assert a + b == c


def test_batches_of_a_step():
    cfg = tiny(batch=96, buckets=3, max_offset=5)
    one, two = A.batches(cfg, 7), [A.batches(cfg, 7, rank, 2) for rank in (0, 1)]
    texts = lambda parts: sorted((A.decode(r), int(o)) for p in parts for r, o in zip(p.ids, p.offset, strict=True))
    assert texts(one) == texts(two[0] + two[1]) == texts(A.batches(cfg, 7))  # ranks share what one process has
    assert texts(one) != texts(A.batches(cfg, 8)) and texts(one) != texts(A.batches(replace(cfg, seed=1), 7))
    assert len(one) == 3 and one[0].ids.shape[1] < one[2].ids.shape[1] and set(texts(one)[0][0]) <= set(A.TOKENS)
    count = torch.zeros(8, 8)
    for step in range(60):
        for text, _ in texts(A.batches(cfg, step)):
            i, j = map(len, text.split("=")[0].split("+"))
            count[i - 1, j - 1] += 1
    assert ((count - 90).abs() < 6 * 90**0.5).all()  # all pairs of lengths are equally likely


def test_curriculum():
    cfg = tiny(batch=240, curriculum=70)
    for step, digits, offset in ((0, 1, 1), (30, 4, 13), (70, 8, 30), (500, 8, 30)):
        parts = A.batches(cfg, step)
        operands = [a for p in parts for r in p.ids for a in A.decode(r).split("=")[0].split("+")]
        assert max(map(len, operands)) == digits
        assert offset - 3 <= max(int(p.offset.max()) for p in parts) <= offset


# %% the model


def test_parameter_counts_of_the_paper():
    paper = A.Config("train", **A.PRESETS["paper"])
    count = lambda **kw: sum(p.numel() for p in A.ArithmeticTransformer(replace(paper, **kw)).parameters())
    with torch.device("meta"):
        for layers, want in ((16, 122_267_648), (8, 63_514_624), (4, 34_138_112), (2, 19_449_856), (1, 12_105_728)):
            assert count(n_layer=layers) == want and count(n_layer=layers, pos="nope") == want - 524_288
            assert count(n_layer=layers, pos="abacus+fire") == want + 595 * layers


@pytest.mark.parametrize("injection", A.INJECTIONS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_loop_and_injection(injection, norm):
    model = A.ArithmeticTransformer(tiny(n_layer=2, recurrences=3, injection=injection, norm=norm, pos="abacus+fire"))
    ids = A.encode("12+345=753")[None]
    e = model.norm_in(model.token(ids) + model.abacus(ids, 1))
    x = e if injection == "none" else torch.zeros_like(e)  # the definition, written out
    for _ in range(3):
        for i, layer in enumerate(model.layers):
            if injection == "layer" or (injection == "recurrence" and i == 0):
                x = x + e
            x = layer(x)
    x = model.map(model.norm_out(model.head(x))) if norm == "post" else model.norm_out(x)
    torch.testing.assert_close(model(ids, offset=1), model.decoder(x))
    torch.testing.assert_close(model(ids, 2, 1, 1), model(ids, 3, 0, 1))
    assert not torch.allclose(model(ids, 1, 0, 1), model(ids, 3, 0, 1))
    model(ids, 1, 2, 1).sum().backward()  # only the last round has gradients
    some = model.layers[1].qkv.weight.grad.clone()
    model.zero_grad()
    model(ids, 3, 0, 1).sum().backward()
    assert not torch.allclose(some, model.layers[1].qkv.weight.grad)


@pytest.mark.parametrize("pos", ["abacus", "nope", "rope", "fire", "abacus+fire", "abacus+rope"])
def test_causal_and_padding_is_harmless(pos):
    model = A.ArithmeticTransformer(tiny(pos=pos)).eval()
    ids = A.pack(A.trials("add", 5, 4, 6)).ids
    whole = model(ids)
    torch.testing.assert_close(model(ids[:, :9]), whole[:, :9])
    torch.testing.assert_close(model(torch.nn.functional.pad(ids, (0, 7)))[:, : ids.shape[1]], whole)
    assert torch.allclose(model(ids, offset=3), whole) == ("abacus" not in pos)
    swapped = model(ids[:, [1, 0, *range(2, ids.shape[1])]])[:, -1]
    assert torch.allclose(swapped, whole[:, -1], atol=1e-6) == (pos == "nope")  # one layer sees no order by itself


def test_models_that_differ_in_positions_start_alike():
    models = {p: A.ArithmeticTransformer(tiny(pos=p)).state_dict() for p in ("abacus", "nope", "abacus+fire")}
    assert all(torch.equal(p, m[n]) for m in models.values() for n, p in models["nope"].items())
    assert set(models["abacus"]) - set(models["nope"]) == {"abacus.table.weight"}


def test_progressive_loss():
    R, seen = 8, {A.depths(8, g(s)) for s in range(400)}
    assert {n for n, _ in seen} == set(range(R)) and {k for _, k in seen} == set(range(1, 5))
    assert all(1 <= k <= min(R - n, 4) for n, k in seen)
    model, batch = A.ArithmeticTransformer(tiny(recurrences=4)), A.pack(A.trials("add", 4, 3, 8))
    loss = lambda before, R: torch.nn.functional.cross_entropy(
        model(batch.ids[:, :-1], R, before, 1).flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )
    n, k = A.depths(4, g(5))
    torch.testing.assert_close(A.progressive_loss(model, batch, 4, g(5)), loss(n, k))
    torch.testing.assert_close(A.progressive_loss(model, batch, 4, g(5), 0.25), 0.25 * loss(n, k) + 0.75 * loss(2, 2))


# %% exact match


@pytest.fixture(scope="module")
def half_trained():
    """A model that solves some 1- and 2-digit problems and fails others, and its losses."""
    lines = []
    model = trained(tiny(n_layer=2, digits=2, steps=200, curriculum=60, max_offset=2, lr=5e-3, batch=64, buckets=1),
                    lambda **line: lines.append(line["loss"]))  # fmt: skip
    return model.eval(), lines


def test_one_pass_equals_decoding(half_trained):
    model, losses = half_trained
    assert losses[-1] < 0.6 * losses[0]
    mixed = 0
    for cell in ((1, 1), (1, 2), (2, 2), (2, 1), (3, 2)):
        texts = A.trials("add", *cell, 100)
        prompts = torch.stack([A.encode(t[: t.index("=") + 1]) for t in texts])
        said = A.generate(model, prompts, 6)
        by_token = [A.decode(r) == t.split("=")[1] and A.EOS in r for r, t in zip(said, texts, strict=True)]
        assert A.correct(model, texts).tolist() == by_token
        assert A.exact_match(model, *cell, 100) == sum(by_token) / 100 == A.exact_match(model.train(), *cell, 100)
        mixed += 5 < sum(by_token) < 95
    assert mixed >= 2  # else the test above says little


def test_a_missing_end_is_wrong():
    class Says(torch.nn.Module):  # answers 21 to everything: right for 4+8
        def __init__(self, end):
            super().__init__()
            self.end, self.p = end, torch.nn.Parameter(torch.zeros(()))

        def forward(self, ids, offset):
            at = (ids == A.EQUALS).cumsum(1).cumsum(1)  # 1 at "=", 2 at the next token
            say = torch.where(at == 1, A.TOKENS["2"], torch.where(at == 2, A.TOKENS["1"], self.end))
            return torch.nn.functional.one_hot(say, 19).float()

    assert A.correct(Says(A.EOS), ["4+8=21", "4+9=31"]).tolist() == [True, False]
    assert not A.correct(Says(A.TOKENS["1"]), ["4+8=21"]).any()


@pytest.mark.parametrize("task", ["sub", "mul", "or", "sort"])
def test_other_tasks_learn(task):
    lines = []
    cfg = tiny(task=task, digits=2, steps=40, max_offset=3, lr=5e-3, log_every=1, buckets=1, lengths=(2,))
    model = trained(cfg, lambda **line: lines.append(line["loss"]))
    assert sum(lines[-3:]) < 0.8 * sum(lines[:3])
    assert A.examine(model, cfg, 2).keys() >= {"trained", "exact"}


# %% ranks, resume


CASES = {
    "plain": {},
    "fire": {"pos": "abacus+fire"},
    "progressive": {"loss": "progressive", "injection": "recurrence", "norm": "post"},
    "none": {"loss": "progressive", "injection": "none"},
}


def _steps(rank, size, out):
    torch.set_default_dtype(torch.float64)
    w = cluster.World(rank, size, torch.device("cpu"))
    for name, over in CASES.items():
        lines = []
        run = SimpleNamespace(line={}, log=lambda lines=lines, **line: lines.append(float(line["loss"])))
        model = A.train_model(tiny(buckets=3, recurrences=4, clip=0.1, steps=3, log_every=1, **over), w, run, name)
        if rank == 0:
            torch.save({"model": model.state_dict(), "lines": lines}, f"{out}/{name}{size}.pt")


def test_ranks_equal_one_process(tmp_path):
    for size in (1, 2, 4):
        run_ranks(_steps, size, tmp_path, str(tmp_path))
        (tmp_path / "store").unlink(missing_ok=True)
    for name in CASES:
        one, *others = (torch.load(tmp_path / f"{name}{size}.pt") for size in (1, 2, 4))
        for other in others:
            assert one["lines"] == pytest.approx(other["lines"], rel=1e-9) and len(one["lines"]) == 3
            for n, p in one["model"].items():
                torch.testing.assert_close(p, other["model"][n], rtol=1e-6, atol=1e-8)  # Adam divides by tiny roots


def _metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]


SMALL = "--d-model 64 --n-layer 1 --digits 2 --max-offset 3 --batch 16 --steps 60 --curriculum 20 --device cpu".split()
SMALL += "--save-every 5 --log-every 3 --loss progressive --injection recurrence --lengths 2 3".split()


def test_kill_and_resume_then_eval(tmp_path, capsys):
    run = lambda mode, out, *more: A.main(parse(A.Config, [mode, *more, "--out", str(tmp_path / out)], A.PRESETS))
    run("train", "whole", *SMALL)
    assert "exact match" in capsys.readouterr().out
    ranks = start_ranks(1, "abacus.py", "train", *SMALL, "--out", str(tmp_path / "cut"))
    path, until = tmp_path / "cut" / "checkpoint.pt", time.monotonic() + 100
    while not Path(f"{path}.previous").exists() and time.monotonic() < until and ranks[0].poll() is None:
        time.sleep(0.02)
    kill(ranks, signal.SIGKILL)
    assert 10 <= cluster.load(path)["facts"]["step"] < 60
    run("train", "cut", *SMALL, "--resume")
    assert _metrics(tmp_path / "cut") == _metrics(tmp_path / "whole")
    a, b = (cluster.load(tmp_path / d / "checkpoint.pt")["model"] for d in ("whole", "cut"))
    assert all(torch.equal(p, b[n]) for n, p in a.items())
    with pytest.raises(BadInput, match="trained with --lr 0.003, this run asks for --lr 0.5"):
        run("train", "cut", *SMALL, "--resume", "--lr", "0.5")
    capsys.readouterr()
    run("eval", "cut", "--problem", "97+8", "--lengths", "1", "2", "--device", "cpu")
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("79+8=") and said[-1].endswith("least significant digits first") and "1+1" in said[0]
    with pytest.raises(BadInput, match="task is add"):
        run("eval", "cut", "--problem", "97x8", "--device", "cpu")
    cluster.save(tmp_path / "cut" / "checkpoint.pt", {"model": {}})
    with pytest.raises(BadInput, match="was written by another program"):
        run("eval", "cut", "--device", "cpu")


# %% the demo and its verdict

GOOD = {
    "Abacus, 8 digits": {"exact": {8: 1.0, 10: 0.8, 12: 0.1, 16: 0.0}},
    **{name: {"trained": 0.95, "exact": {4: share, 5: 0.0}} for name, share in
       (("NoPE", 0.3), ("FIRE", 0.0), ("Abacus", 0.45), ("Abacus + FIRE", 0.9))},
}  # fmt: skip


def test_the_verdict_falls_with_each_bar():
    assert A.judge(GOOD)[0] and "10+10 0.80" in A.judge(GOOD)[1]
    for name, worse in {
        "Abacus, 8 digits": {"exact": {10: 0.79, 12: 1.0}}, "NoPE": {"exact": {4: 0.31}}, "FIRE": {"trained": 0.94},
        "Abacus": {"exact": {4: 0.44}}, "Abacus + FIRE": {"trained": 0.9},
    }.items():  # fmt: skip
        assert not A.judge(GOOD | {name: GOOD[name] | worse})[0], name
    for name in ("Abacus", "Abacus + FIRE"):  # the method replaced by its rival
        assert not A.judge(GOOD | {name: GOOD["NoPE"]})[0]


def test_demo_writes_the_same_on_any_number_of_ranks(tmp_path):
    argv = "--d-model 64 --n-layer 1 --batch 8 --steps 4 --log-every 1 --device cpu".split()
    found = []
    for size in (1, 2):
        ranks = start_ranks(size, "abacus.py", *argv, "--out", str(tmp_path / str(size)))
        said = [p.communicate(timeout=200)[0] for p in ranks]
        assert said[0].splitlines()[-1].endswith("DOES NOT HOLD") and not any(said[1:])
        found.append(_metrics(tmp_path / str(size)))
        for line in found[-1]:
            line.pop("CPU s", None)
    assert found[0] == found[1] and {line.get("measured") for line in found[0]} >= set(A.RUNS)
    claim = json.loads((tmp_path / "2" / "claim.json").read_text())
    assert claim["holds"] is False and "10+10 0.00" in claim["here"]


# %% bad input

ids = torch.zeros(2, 5, dtype=torch.long)
table = A.AbacusEmbedding(A.DIGITS, 4, 32, 100)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: A.digit_positions(ids[0], A.DIGITS), r"\(batch, time\), got torch.int64 \(5,\)"),
        (lambda: A.digit_positions(ids.float(), A.DIGITS), "integer token ids.*float32"),
        (lambda: A.digit_positions(ids > 0, A.DIGITS), "integer token ids.*bool"),
        (lambda: A.digit_positions(ids, A.DIGITS, 1.5), "whole number >= 1"),
        (lambda: A.digit_positions(ids, A.DIGITS, 0), "whole number >= 1"),
        (lambda: table(ids, offset=ids + 1), r"one for each row \(batch, 1\)"),
        (lambda: table(ids, offset=ids[:, 0] + 1), r"one for each row \(batch, 1\)"),
        (lambda: table(torch.full((1, 40), 7), offset=16), "place 55 needs more than the table's 32 rows"),
        (lambda: table(torch.full((1, 32), 7), offset=1), "place 32 needs more"),
        (lambda: A.encode("12+ 3="), "character ' ' at position 3"),
        (lambda: A.answer_targets(torch.stack([A.encode("1+1=2"), A.encode("1+1+2")])), "row 1 has 0 '='"),
        (lambda: A.answer_targets(A.encode("1=1=2")[None]), "row 0 has 2 '=' tokens, expected 1"),
        (lambda: A.ArithmeticTransformer(tiny())(ids, 0), "R must be at least 1"),
        (lambda: tiny(recurrences=0), "must be at least 1"),
        (lambda: tiny(d_model=96), "no multiple of 64"),
        (lambda: tiny(pos="abakus"), "abakus: choose from abacus, nope, fire, rope"),
        (lambda: tiny(pos="nope+abacus"), "absence of all others"),
        (lambda: tiny(lr=-1.0), "--lr -1.0 must be above 0"),
        (lambda: tiny(digits=490), "need place 520, the table ends at 511"),
        (lambda: tiny(lengths=(8, 600)), "need place 601"),
        (lambda: tiny(task="mul", digits=256), "the table ends at 511"),
        (lambda: tiny(task="sort", digits=60), "sort has labels for 51 elements"),
        (lambda: A.Config(task="mul"), "belong to train"),
        (lambda: tiny(batch=10, buckets=4), "--batch 10 does not divide over --buckets 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_limits_of_the_table():
    assert table(torch.full((1, 31), 7), offset=1).shape == (1, 31, 4)  # row 31 is the last
    assert table(torch.full((1, 60), 14), offset=100).shape == (1, 60, 4)  # no digits: nothing outgrows it
    assert tiny(digits=480, lengths=(510,)) and tiny(pos="nope", lengths=(900,))  # only Abacus has a table


@pytest.mark.parametrize("words", ["--pos rope", "--lengths 2 4", "--task mul", "train --quick", "eval --task mul",
                                   "train --lr -1", "train --pos alibi", "train --lengths 600"])  # fmt: skip
def test_flags_that_a_mode_does_not_read(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(A.Config, words.split(), A.PRESETS)
    flag = next(word for word in words.split() if word.startswith("--"))
    assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_clip_zero_is_no_limit():
    free, loose, tight = (trained(tiny(steps=2, clip=clip)).state_dict() for clip in (0.0, 1e9, 1e-3))
    assert all(torch.equal(p, loose[n]) for n, p in free.items())
    assert not torch.equal(free["decoder.weight"], tight["decoder.weight"])


def test_missing_model_is_one_line(tmp_path):
    done = run_script("abacus.py", "eval", "--out", str(tmp_path / "none"), "--device", "cpu")
    assert done.returncode == 2 and "no checkpoint at" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.drill
def test_the_bare_command_starts_two_processes(tmp_path):
    argv = "--quick --d-model 64 --n-layer 1 --batch 8 --steps 8 --device cpu --out".split()
    done = run_script("abacus.py", *argv, str(tmp_path))
    assert done.returncode == 0 and "quick: no verdict" in done.stdout, done.stderr
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["world"] == 2
    assert (tmp_path / "abacus.png").exists()


@pytest.mark.gpu
def test_gpu_equals_cpu():
    batch = A.pack(A.trials("add", 20, 20, 100))
    for pos in ("abacus", "abacus+fire", "rope"):
        model = A.ArithmeticTransformer(tiny(pos=pos)).eval()
        want = model(batch.ids)
        torch.testing.assert_close(model.cuda()(batch.ids.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
