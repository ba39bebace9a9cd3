"""abacus.py: positions and data against vectors and Python's integers, the model, ranks, resume, tasks, bad input."""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import finish, kill, run_ranks, run_script, start_ranks

import abacus as A
from common import cluster
from common.cli import BadInput

DATA = Path(__file__).parent / "data"
TINY = {"d_model": 32, "n_head": 2, "ff": 32, "n_layer": 1, "device": "cpu"}


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(**kw) -> A.Config:
    return A.Config(**{**TINY, **kw})


def read(name: str):
    return json.loads((DATA / f"abacus_{name}.json").read_text())


# ---- positions


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
    assert A.digit_positions(torch.tensor([[4]]), A.DIGITS).tolist() == [[1]]
    assert A.digit_positions(torch.tensor([[14, 0, 17]]), A.DIGITS, 9).tolist() == [[0, 0, 0]]  # no digits
    assert A.digit_positions(torch.tensor([[5, 0, 6, 7]]), A.DIGITS).tolist() == [[1, 0, 1, 2]]  # PAD ends a run
    for shape in ((0, 5), (3, 0), (0, 0)):
        assert A.digit_positions(torch.zeros(shape, dtype=torch.long), A.DIGITS).shape == shape
        assert A.AbacusEmbedding(A.DIGITS, 8)(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 8)


def test_positions_depend_on_the_prefix_alone():
    ids = torch.randint(0, 18, (50, 40), generator=g())
    whole = A.digit_positions(ids, A.DIGITS, 7)
    row = torch.zeros(50, dtype=torch.long)
    for t in range(40):  # the rule of incremental decoding
        digit = (ids[:, t] >= 4) & (ids[:, t] <= 13)
        row = torch.where(digit, torch.where(row == 0, 7, row + 1), 0)
        assert torch.equal(row, whole[:, t])
        assert torch.equal(A.digit_positions(ids[:, : t + 1], A.DIGITS, 7), whole[:, : t + 1])


def test_embedding_offsets():
    ids = A.encode("12+9=")[None].repeat(6, 1)
    for per in ("batch", "sample"):
        m = A.AbacusEmbedding(A.DIGITS, 4, 64, 30, per)
        rows = lambda out, m=m: [[(m.table.weight == v).all(1).nonzero().item() for v in row] for row in out]
        drawn = rows(m(ids, generator=g(1)))
        assert drawn == rows(m(ids, generator=g(1))) and drawn != rows(m(ids, generator=g(2)))
        for row in drawn:
            assert row[2] == row[4] == 0 and row[0] == row[3] == row[1] - 1 and 1 <= row[0] <= 30
        assert (len({row[0] for row in drawn}) == 1) == (per == "batch")
        assert rows(m.eval()(ids)) == [[1, 2, 0, 1, 0]] * 6  # no shift at test time
    assert set(m.draw(4000, g()).flatten().tolist()) == set(range(1, 31))
    assert m.draw(500, g(), largest=3).max() == 3


def test_fire_equals_the_published():
    want = read("fire")
    p = want["params"]
    fire = A.FIRE(2, 8, p["c"], p["init_L"], want["eps"])
    fire.load_state_dict({n: torch.tensor(v) for n, v in p.items()})
    got = fire(want["T"])[0]
    seen = torch.ones(want["T"], want["T"], dtype=torch.bool).tril()
    torch.testing.assert_close(got[:, seen], torch.tensor(want["bias"])[:, seen], rtol=0, atol=1e-5)
    assert sum(p.numel() for p in A.FIRE(16).parameters()) == 595


# ---- text and data


def test_formats_equal_the_published():
    want = read("formats")
    for c in want["addition"] + want["multiplication"]:
        ids = torch.cat([A.encode(c["text"]), torch.tensor([A.EOS])])
        assert ids.tolist() == c["ids"] and A.decode(ids) == c["text"]
        if "loss_targets" in c:
            assert A.answer_targets(ids[None]).tolist() == [c["loss_targets"]]
    assert all(A.CHARS[c] == i for c, i in want["vocab"].items() if len(c) == 1)
    assert A.format_example("+", 97, 8) == "79+8=501" and A.format_example("-", "488", "877") == "884-778=983-"
    assert A.format_example("-", 7, 488) == "7-884=184-" and A.format_example("x", 0, 12) == "0x21=0"


def digits_of(numbers: list[int], width: int) -> torch.Tensor:
    return torch.tensor([[int(c) for c in str(n)[::-1].ljust(width, "0")] for n in numbers])


def numbers_of(digits: torch.Tensor) -> list[int]:
    return [int("".join(map(str, row[::-1]))) for row in digits.tolist()]


def test_arithmetic_against_python():
    W = 22
    a = torch.randint(0, 10, (100_000, W), generator=g(1))
    b = torch.randint(0, 10, (100_000, W), generator=g(2))
    b[:50_000] = torch.where(torch.rand(50_000, W, generator=g(3)) < 0.9, 9 - a[:50_000], b[:50_000])  # long carries
    a[:, -1] = b[:, -1] = 0
    x, y = numbers_of(a), numbers_of(b)
    nines = [10**n - 1 for n in range(1, W)]
    x, y = x + nines + [1] * len(nines), y + [1] * len(nines) + nines
    a, b = digits_of(x, W), digits_of(y, W)
    assert numbers_of(A.add_digits(a, b)) == [p + q for p, q in zip(x, y, strict=True)]
    some = slice(49_000, 52_000)
    c, negative = A.sub_digits(a[some], b[some])
    assert numbers_of(c) == [abs(p - q) for p, q in zip(x[some], y[some], strict=True)]
    assert negative.tolist() == [p < q for p, q in zip(x[some], y[some], strict=True)]
    assert numbers_of(A.mul_digits(a[some], b[some])) == [p * q for p, q in zip(x[some], y[some], strict=True)]
    assert not A.sub_digits(a, a)[0].any() and not A.sub_digits(a, a)[1].any()


@pytest.mark.parametrize("task, op", [("add", "+"), ("sub", "-"), ("mul", "x")])
def test_batches_of_arithmetic(task, op):
    b = A.make_batch(task, 3000, 12, generator=g())
    assert torch.equal(b.targets, A.answer_targets(b.ids))
    for ids, (i, j) in zip(b.ids.tolist(), b.lengths.tolist(), strict=True):
        text = A.decode(ids)
        x, y = text.split("=")[0].split(op)
        assert (len(x), len(y)) == (i, j) and ids[len(text)] == A.EOS and not any(ids[len(text) + 1 :])
        assert text == A.format_example(op, x[::-1], y[::-1])
        assert len(text) + 1 <= A.example_width(task, i, j)


def test_batches_of_or_and_sort():
    b = A.make_batch("or", 3000, 6, generator=g())
    seen = set()
    for ids, (i, j) in zip(b.ids.tolist(), b.lengths.tolist(), strict=True):
        (x, y), z = (text := A.decode(ids)).split("=")[0].split("+"), text.split("=")[1]
        assert (len(x), len(y), len(z)) == (i, j, max(i, j)) and (x + y).count("1") == 1
        assert "1" in (x if i < j else y if j < i else x + y)
        bits = zip(x.ljust(len(z), "0"), y.ljust(len(z), "0"), z, strict=True)
        assert all(r == str(int(p) | int(q)) for p, q, r in bits)
        seen.add((text, i, j))
    assert len(seen) == 91 + 21  # all there are: sum of min(i, j), and again for i = j
    b = A.make_batch("sort", 2000, 10, generator=g())
    ties = 0
    for ids, (m, n) in zip(b.ids.tolist(), b.lengths.tolist(), strict=True):
        question, answer = (text := A.decode(ids)).split("=")
        items = [(e[0], int(e[2:][::-1])) for e in question.split(",")]
        assert len(items) == m and all(
            len(str(v)) == len(e) - 2 for (_, v), e in zip(items, question.split(","), strict=True)
        )
        assert answer == ",".join(label for label, _ in sorted(items, key=lambda e: e[1]))  # Python's sort is stable
        assert max(len(str(v)) for _, v in items) <= n and len(text) + 1 <= A.example_width("sort", m, n)
        assert [A.LABELS.index(label) for label, _ in items] == [
            (A.LABELS.index(items[0][0]) + e) % 51 for e in range(m)
        ]
        ties += len({v for _, v in items}) < m
    assert ties > 100
    assert A.encode("A:23,B:5=B,A").max() < A.vocab_size("sort") == 72


def test_lengths_are_uniform_and_buckets_keep_them():
    b = A.make_batch("add", 64_000, 8, generator=g())
    count = torch.bincount((b.lengths[:, 0] - 1) * 8 + b.lengths[:, 1] - 1, minlength=64)
    assert ((count - 1000).abs() < 6 * 1000**0.5).all()
    assert set(map(tuple, A.make_batch("add", 200, (3, 4), generator=g()).lengths.tolist())) == {
        (3, 3),
        (3, 4),
        (4, 3),
        (4, 4),
    }
    assert set(map(tuple, A.make_batch("mul", 200, [(2, 7)], generator=g()).lengths.tolist())) == {(2, 7)}
    b = A.make_batch("add", 20_000, [(1, 2)], generator=g())
    x = torch.tensor([int(A.decode(r).split("+")[0]) for r in b.ids])
    assert set(x.tolist()) == set(range(1, 10))
    first = torch.bincount(b.ids[:, 3] - 4, minlength=10)  # top digit of b
    assert first[0] == 0 and ((first[1:] - 20_000 / 9).abs() < 6 * (20_000 / 9) ** 0.5).all()
    with cluster.world("cpu") as w:
        t = A.Trainer(tiny(batch=96, buckets=3, max_offset=5, short=0, grow=0), w)
        parts = t.batches()
        again = t.batches()
        widths = [(ids != A.PAD).sum(dim=1) for ids, _, _ in parts]
        assert all(torch.equal(a, b) for p, q in zip(parts, again, strict=True) for a, b in zip(p, q, strict=True))
        ends = [A._cells(96, 8, cluster.generator(0, 3, 0)).tolist()]
        made = [[len(s) for s in A.decode(r).split("=")[0].split("+")] for ids, _, _ in parts for r in ids]
        assert sorted(made) == sorted(ends[0]) and widths[0].max() < widths[2].max()
        t.step = 1
        assert not torch.equal(t.batches()[0][0][:, :4], parts[0][0][:, :4])


def test_curriculum():
    with cluster.world("cpu") as w:
        t = A.Trainer(tiny(short=70, grow=29, batch=48), w)
        for step, digits, offset in ((0, 1, 1), (30, 4, 30), (70, 8, 30), (500, 8, 30)):
            t.step, most, largest = step, 0, 0
            for ids, _, offsets in t.batches():
                most = max(most, *(len(s) for r in ids for s in A.decode(r).split("=")[0].split("+")))
                largest = max(largest, int(offsets.max()))
            assert most == digits and offset - 6 <= largest <= offset


# ---- the model


def test_parameter_counts_of_the_paper():
    paper = {**A.PRESETS["paper"], "compile": False}
    for layers, want in ((16, 122_267_648), (8, 63_514_624), (4, 34_138_112), (2, 19_449_856), (1, 12_105_728)):
        c = A.Config(**{**paper, "n_layer": layers, "recurrences": 16 // layers})
        with torch.device("meta"):
            model = A.ArithmeticTransformer(c)
            nope = A.ArithmeticTransformer(replace(c, pos="nope"))
            fire = A.ArithmeticTransformer(replace(c, pos="abacus+fire"))
        count = lambda m: sum(p.numel() for p in m.parameters())
        assert count(model) == want and count(model) - count(nope) == 524_288 and count(fire) - want == 595 * layers
    with torch.device("meta"):
        h200 = A.ArithmeticTransformer(A.Config(**A.PRESETS["h200"]))
    assert 10.3e6 < sum(p.numel() for p in h200.parameters()) < 11.0e6
    assert h200(torch.zeros(2, 304, dtype=torch.long, device="meta"), offset=1).shape == (2, 304, 19)


@pytest.mark.parametrize("injection", A.INJECTIONS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_loop_and_injection(injection, norm):
    c = tiny(n_layer=2, recurrences=3, injection=injection, norm=norm, pos="abacus+fire")
    model, ids = A.ArithmeticTransformer(c).eval(), A.encode("12+345=753")[None]
    e = model.embed(ids, 1)
    x = e if injection in ("none", "first") else torch.zeros_like(e)
    for _ in range(3):
        for i, layer in enumerate(model.layers):
            if injection == "layer" or (injection == "recurrence" and i == 0):
                x = x + e
            x = layer(x)
    x = model.norm_out(model.head(x)) if norm == "post" else model.norm_out(x)
    torch.testing.assert_close(model(ids), model.decoder(model.map(x) if norm == "post" else x))
    torch.testing.assert_close(model(ids, 2, 1), model(ids, 3))
    assert not torch.allclose(model(ids, 1), model(ids, 3))
    model(ids, 1, 2).sum().backward()  # only the last recurrence has gradients
    some = model.layers[1].qkv.weight.grad.clone()
    model.zero_grad()
    model(ids, 3).sum().backward()
    assert not torch.allclose(some, model.layers[1].qkv.weight.grad)


def test_noise_starts_the_loop_in_training_alone():
    """The released code has noise in testing too, so greedy decoding changes from call to call."""
    model, ids = A.ArithmeticTransformer(tiny(state_init="noise")), A.encode("12+345=753")[None]
    assert not torch.equal(model(ids, offset=1), model(ids, offset=1))
    assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize("pos", ["abacus", "learned", "nope", "rope", "fire", "abacus+fire", "abacus+rope"])
def test_causal_and_padding_is_harmless(pos):
    model = A.ArithmeticTransformer(tiny(pos=pos)).eval()
    ids = A.make_batch("add", 6, 5, generator=g()).ids
    whole = model(ids)
    torch.testing.assert_close(model(ids[:, :9]), whole[:, :9])
    torch.testing.assert_close(model(torch.nn.functional.pad(ids, (0, 7)))[:, : ids.shape[1]], whole)
    shifted = model(ids, offset=3)
    assert torch.allclose(shifted, whole) == ("abacus" not in pos)
    swapped = model(ids[:, [1, 0, *range(2, ids.shape[1])]])[:, -1]
    assert torch.allclose(swapped, whole[:, -1], atol=1e-6) is False or pos == "nope"


def test_models_that_differ_in_positions_start_alike():
    a, b = (A.ArithmeticTransformer(tiny(pos=p)).state_dict() for p in ("abacus", "rope"))
    assert all(torch.equal(a[n], b[n]) for n in b) and set(a) - set(b) == {"abacus.table.weight"}


def test_log_scale_and_rope():
    c = tiny(pos="rope", logit_scale="log")
    layer = A.Layer(c).double()
    x = torch.randn(1, 6, 32, generator=g(), dtype=torch.float64)
    q, k, v = layer.qkv(x).reshape(6, 3, 2, 16).permute(1, 2, 0, 3)  # (H, T, D) each
    turn = torch.outer(
        torch.arange(6.0, dtype=torch.float64), 10000 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    )
    spin = lambda z: torch.view_as_real(
        torch.complex(z[..., :8], z[..., 8:]) * torch.polar(torch.ones_like(turn), turn)
    )
    flat = lambda z: torch.cat([spin(z)[..., 0], spin(z)[..., 1]], dim=-1)
    scale = torch.tensor([math.log(t + 2) / math.log(16) for t in range(6)], dtype=torch.float64)
    s = flat(q) @ flat(k).transpose(1, 2) / 4 * scale[:, None]
    y = s.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1) @ v
    want = layer.out(y.permute(1, 0, 2).reshape(1, 6, 32))
    torch.testing.assert_close(layer.attend(x), want, rtol=1e-5, atol=1e-6)  # angles are fp32


ROWS = torch.tensor([[1, 2, 0, 1], [4, 0, 5, 6], [3, 4, 0, 3], [5, 0, 6, 0], [0, 0, 0, 0], [1, 1, 1, 1], [9, 0, 9, 9]])


def test_foreign_digits_by_hand():
    """Examples 0 and 1 lie apart; 3..4 and 5..6 touch; 4 has no digits; 6 has nobody beside it."""
    beside, seen = A.foreign_digits(ROWS)
    assert beside.tolist() == [1, 0, 3, 2, 5, 4, 6] and seen.shape == (7, 4, 8)
    assert torch.equal(seen[:, :, :4], torch.ones(7, 4, 4, dtype=torch.bool).tril())
    assert seen[0, :, 4:].int().tolist() == [[1, 0, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 1, 1]]
    assert seen[1, :, 4:].int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 0, 1]]
    assert not seen[2:, :, 4:].any()


@pytest.mark.parametrize("pos", ["abacus", "abacus+fire", "abacus+rope"])
def test_foreign_digits_in_attention(pos):
    """Against a softmax over the visible keys, one query at a time."""
    layer = A.Layer(tiny(pos=pos)).double()
    x, both = torch.randn(7, 4, 32, generator=g(), dtype=torch.float64), A.foreign_digits(ROWS)
    got, alone = layer.attend(x, both), layer.attend(x)
    q, k, v = layer.qkv(x).reshape(7, 4, 3, 2, 16).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    if pos == "abacus+rope":
        angle = torch.outer(torch.arange(4), 10000 ** (-torch.arange(0, 16, 2) / 16))
        q, k = A.rotate(q, angle), A.rotate(k, angle)
    for b, beside in enumerate(both[0].tolist()):
        for t in range(4):
            keys, values = (torch.cat([y[b], y[beside]], dim=1)[:, both[1][b, t]] for y in (k, v))  # (H, n, D)
            score = torch.einsum("hd,hnd->hn", q[b, :, t], keys) / 4 * math.log(t + 2) / math.log(16)
            if pos == "abacus+fire":
                score = score + torch.cat([layer.fire(4)[0, :, t, : t + 1], torch.zeros(2, len(score[0]) - t - 1)], 1)
            y = torch.einsum("hn,hnd->hd", score.softmax(-1), values)
            torch.testing.assert_close(got[b, t], layer.out(y.flatten()), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[2:], alone[2:])
    assert not torch.allclose(got[:2], alone[:2])


def test_foreign_digits_in_training_alone():
    model, ids = A.ArithmeticTransformer(tiny()), A.encode("12+34=4")[None].repeat(2, 1)
    near, apart = torch.tensor([[1], [3]]), torch.tensor([[1], [4]])
    torch.testing.assert_close(model(ids, offset=near, foreign=True), model(ids, offset=near))
    there, without = model(ids, offset=apart, foreign=True), model(ids, offset=apart)
    changed = (there - without).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [True, True, True, True, True, True, True]  # "+" and "=" by what the digits saw
    assert torch.allclose(model.eval()(ids), model(ids, offset=1))


def test_progressive_loss():
    R, seen = 8, {A._depths(8, 1.0, g(s)) and tuple(A._depths(8, 1.0, g(s))[0]) for s in range(400)}
    assert {n for n, _, _ in seen} == set(range(R)) and {k for _, k, _ in seen} == set(range(1, 5))
    assert all(1 <= k <= min(R - n, 4) for n, k, _ in seen)
    model = A.ArithmeticTransformer(tiny(recurrences=4)).eval()
    b = A.make_batch("add", 8, 4, generator=g())
    ce = lambda before, R: torch.nn.functional.cross_entropy(
        model(b.ids[:, :-1], R, before).flatten(0, 1), b.targets.flatten()
    )
    ((n, k, _),) = A._depths(4, 1.0, g(5))
    torch.testing.assert_close(A.progressive_loss(model, b, 1.0, g(5)), ce(n, k))
    torch.testing.assert_close(A.progressive_loss(model, b, 0.0, g(5)), ce(2, 2))
    torch.testing.assert_close(A.progressive_loss(model, b, 0.25, g(5)), 0.25 * ce(n, k) + 0.75 * ce(2, 2))


# ---- exact match


@pytest.fixture(scope="module")
def half_trained():
    """A model that solves some 1- and 2-digit problems and fails others."""
    with cluster.world("cpu") as w:
        t = A.Trainer(tiny(d_model=64, ff=64, digits=2, steps=240, short=80, grow=80, max_offset=2, lr=5e-3), w)
        first = t.advance(log=True)["loss"]
        while t.step < t.cfg.steps - 1:
            t.advance(log=False)
        return t.model.eval(), first, t.advance(log=True)["loss"]


def test_one_pass_equals_decoding(half_trained):
    model, first, last = half_trained
    assert last < 0.6 * first
    mixed = 0
    for cell in ((1, 1), (1, 2), (2, 2), (2, 1), (3, 2)):
        b = A.problems("add", *cell, 100)
        prompt = b.ids[:, : sum(cell) + 2]
        said = A.generate(model, prompt, 6)
        want = [A.decode(r).split("=")[1] for r in b.ids]
        by_token = [A.decode(r) == w and A.EOS in r for r, w in zip(said, want, strict=True)]
        one_pass = A.score(model, b.ids, b.targets)
        assert one_pass[:, 0].tolist() == by_token
        assert torch.equal(one_pass[:, 0], one_pass[:, 1] & one_pass[:, 2])
        assert A.exact_match(model, *cell, 100, "add") == pytest.approx(sum(by_token) / 100)
        mixed += 5 < sum(by_token) < 95
    assert mixed >= 2  # else the test above says little
    one = A.generate(model, prompt[0], 6)
    assert one.ndim == 1 and A.decode(one) == A.decode(said[0])
    assert not model.training and A.exact_match(model.train(), 1, 1, 10) >= 0 and model.training
    model.eval()


def test_no_eos_or_more_after_it_is_wrong():
    class Says:  # a model that answers 21 to everything: right for 4+8
        training = False

        def __init__(self, eos):
            self.eos = eos

        def __call__(self, ids):
            at = (ids == A.EQUALS).cumsum(1).cumsum(1)  # 1 at "=", 2 at the next token
            say = torch.where(at == 1, A.CHARS["2"], torch.where(at == 2, A.CHARS["1"], self.eos))
            return torch.nn.functional.one_hot(say, 19).float()

    ids = torch.cat([A.encode("4+8=21"), torch.tensor([A.EOS, A.PAD])])[None]
    assert A.score(Says(A.EOS), ids, A.answer_targets(ids)).all()
    assert A.score(Says(A.CHARS["1"]), ids, A.answer_targets(ids)).tolist() == [[False, True, False]]


def test_grid(half_trained):
    model = half_trained[0]
    grid = A.evaluate_grid(model, (1, 2), (1, 2, 3), 50)
    want = [[A.exact_match(model, i, j, 50) for j in (1, 2, 3)] for i in (1, 2)]
    assert grid.tolist() == want and grid.std() > 0


# ---- training


def _steps(rank, size, out):
    torch.set_default_dtype(torch.float64)
    w = cluster.World(rank, size, torch.device("cpu"))
    for name, over in CASES.items():
        full = {"short": 0, "grow": 0, "max_offset": 9}  # lengths and offsets as after the curriculum
        t = A.Trainer(tiny(batch=24, buckets=3, recurrences=4, clip=0.1, **full, **over), w)
        seen = [A.foreign_digits(A.digit_positions(ids, A.DIGITS, o))[1] for ids, _, o in t.batches()]
        assert name != "foreign" or any(s[:, :, s.shape[1] :].any() for s in seen)  # there is something to see
        lines = [t.advance(log=True) for _ in range(3)]
        made = A.make_batch("add", 24, 8, generator=g())
        counts = [(made.targets[r::2] != -100).sum() for r in range(2)]
        assert counts[0] != counts[1]  # uneven counts on two ranks
        cells = A.evaluate_cells(t.model, [(1, 1), (1, 2), (5, 3)], 40)
        if rank == 0:
            torch.save({"model": t.model.state_dict(), "lines": lines, "cells": cells}, f"{out}/{name}{size}.pt")


CASES = {
    "plain": {},
    "fire": {"pos": "abacus+fire", "offset_per": "batch"},
    "prog": {"loss": "prog", "alpha": 0.5, "injection": "recurrence", "norm": "post"},
    "first": {"loss": "prog", "injection": "first", "state_init": "zero"},
    "foreign": {"foreign": 0, "pos": "abacus+fire", "digits": 3},
}


def test_two_ranks_match_one(tmp_path):
    for size in (1, 2):
        run_ranks(_steps, size, tmp_path, str(tmp_path))
        (tmp_path / "store").unlink(missing_ok=True)
    for name in CASES:
        one, two = (torch.load(tmp_path / f"{name}{size}.pt") for size in (1, 2))
        for a, b in zip(one["lines"], two["lines"], strict=True):
            assert a == pytest.approx(b, rel=1e-9)
        for n, p in one["model"].items():
            torch.testing.assert_close(p, two["model"][n], rtol=1e-6, atol=1e-8)  # Adam divides by tiny roots at first
        assert torch.equal(one["cells"], two["cells"])


SMALL = dict(
    d_model=32, n_head=2, ff=32, n_layer=1, digits=2, max_offset=3, batch=16, short=20, probe=(2, 3), probe_every=10,
    log_every=3, save_every=5, per_length=16, device="cpu",
)  # fmt: skip


def flags(**kw) -> list[str]:
    """The command line of these settings."""
    words = [(f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, tuple) else (v,))) for k, v in kw.items()]
    return ["train", *(w for word in words for w in word)]


def _metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]


def test_kill_and_resume(tmp_path, capsys):
    extra = dict(SMALL, steps=60, injection="recurrence", state_init="noise", loss="prog")  # all that draws at random
    A.train(A.Config("train", **extra, out=str(tmp_path / "whole")))
    assert "exact match, task add" in capsys.readouterr().out
    there, cut = tmp_path / "cut" / "seed0", dict(extra, out=str(tmp_path / "cut"))
    ranks = start_ranks(1, "abacus.py", *flags(**cut))
    until = time.monotonic() + 100
    while not (there / "checkpoint.pt.previous").exists() and time.monotonic() < until and ranks[0].poll() is None:
        time.sleep(0.02)
    kill(ranks, signal.SIGKILL)
    assert 10 <= cluster.load(there / "checkpoint.pt")["step"] < 60
    A.train(A.Config("train", **cut, resume=True))
    assert _metrics(there) == _metrics(tmp_path / "whole" / "seed0")
    a, b = (cluster.load(tmp_path / d / "seed0" / "checkpoint.pt") for d in ("whole", "cut"))
    assert all(torch.equal(p, b["model"][n]) for n, p in a["model"].items()) and a["best"] == b["best"]
    with pytest.raises(BadInput, match=r"--ff 32 \(now 64\), --lr 0.003 \(now 0.5\)\. Pass the same"):
        A.train(A.Config("train", **dict(cut, ff=64), lr=0.5, resume=True))
    best = there / "best.pt"  # tried by eval
    capsys.readouterr()
    c = A.Config("eval", model=str(best), lengths=(1, 2), per_length=16, grid=3, per_cell=4, out=str(tmp_path))
    A.main(replace(c, device="cpu"))
    said = capsys.readouterr().out
    assert "grid 1..3" in said and "=" in said.splitlines()[-1] and best.stat().st_size < 60_000


def test_sigterm_and_time_limit(tmp_path, capsys):
    long = dict(SMALL, save_every=1, steps=100_000, cooldown=0.0, out=str(tmp_path))
    ranks = start_ranks(2, "abacus.py", *flags(**long, seeds=2))
    until, path = time.monotonic() + 100, tmp_path / "seed0" / "checkpoint.pt"
    while not path.exists() and time.monotonic() < until and ranks[0].poll() is None:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    said = finish(ranks)
    assert "stopped after step" in said[0] and said[1] == "" and [p.returncode for p in ranks] == [0, 0]
    at = cluster.load(path)["step"]
    assert f"step {at} of 100000" in said[0] and not (tmp_path / "seed1").exists()
    A.train(
        A.Config("train", **dict(long, steps=at + 3), seeds=2, resume=True, minutes=1e-9)
    )  # on another number of ranks
    said = capsys.readouterr().out
    assert f"stopped after step {at + 1} of {at + 3}" in said and f"stopped after step 1 of {at + 3}" in said
    assert all(word in said for word in ("seed 0", "seed 1", "mean", "minimum", "best"))
    assert cluster.load(tmp_path / "seed1" / "checkpoint.pt")["step"] == 1
    best = tmp_path / "seed1" / "best.pt"
    cluster.save(best, {"of": "an earlier run"})
    A.train(A.Config("train", **dict(long, seed=1), minutes=1e-9))  # a fresh run, which ends before its first probe
    assert not best.exists() and Path(f"{best}.old").exists()


def test_steps_may_change_while_the_rate_is_flat():
    c = tiny(steps=100, cooldown=0.4)
    with cluster.world("cpu") as w:
        t = A.Trainer(c, w)
        t.step = 50
        A.check_resume(t.state(), replace(c, steps=90))
        with pytest.raises(BadInput, match=r"--steps 100 \(now 80\)"):
            A.check_resume(t.state(), replace(c, steps=80))


@pytest.mark.parametrize("task", ["sub", "mul", "or", "sort"])
def test_other_tasks_learn(task):
    with cluster.world("cpu") as w:
        t = A.Trainer(tiny(task=task, digits=2, short=0, steps=60, max_offset=3, lr=5e-3, cooldown=0.2, batch=32), w)
        first, last = t.advance(log=True)["loss"], 0
        while t.step < 60:
            last = t.advance(log=t.step > 57).get("loss")
        assert last < 0.8 * first
        assert 0 <= A.exact_match(t.model, 2, 2, 20, task) <= 1


# ---- bad input


ids = torch.zeros(2, 5, dtype=torch.long)
table = A.AbacusEmbedding(A.DIGITS, 4, 32, 100)
many = torch.full((1, 40), 7)
OVERFLOW = "digit span of 40 tokens with offset 16 needs row 55 but the table has 32 rows"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: table(many, offset=16), ValueError, OVERFLOW),
        (lambda: A.ArithmeticTransformer(A.Config(digits=39, max_offset=16, max_positions=32)), ValueError, OVERFLOW),
        (lambda: A.ArithmeticTransformer(A.Config(task="mul", digits=50)), ValueError, "digit span of 100 tokens"),
        (lambda: A.digit_positions(ids[0], A.DIGITS), ValueError, r"must have shape \(batch, time\), got \(5,\)"),
        (lambda: table(ids[0]), ValueError, r"ids must have shape \(batch, time\), got \(5,\)"),
        (lambda: A.ArithmeticTransformer(tiny())(ids[0]), ValueError, r"got \(5,\)"),
        (lambda: A.digit_positions(ids.float(), A.DIGITS), TypeError, "torch.float32"),
        (lambda: A.digit_positions(ids > 0, A.DIGITS), TypeError, "torch.bool"),
        (lambda: A.encode("12+ 3="), ValueError, "space at position 3: numbers must be written without spaces"),
        (lambda: A.encode("12+3=?"), ValueError, r"'\?' at position 5"),
        (lambda: A.digit_positions(ids, range(9)), ValueError, "digit_ids must be ten distinct token ids, got 9"),
        (lambda: A.AbacusEmbedding([4] * 10, 4), ValueError, "ten distinct token ids, got 1"),
        (lambda: table(ids, offset=0), ValueError, "offset must be in 1..100, got 0"),
        (lambda: table(ids, offset=torch.tensor([[3], [101]])), ValueError, "offset must be in 1..100, got 101"),
        (lambda: A.digit_positions(ids, A.DIGITS, 0), ValueError, "offset must be at least 1, got 0"),
        (lambda: table(ids, offset=ids + 1), ValueError, r"offset must be a scalar or \(batch, 1\)"),
        (lambda: table(ids, offset=ids[:, 0] + 1), ValueError, r"offset must be a scalar or \(batch, 1\)"),
        (lambda: A.answer_targets(torch.stack([*[A.encode("1+1=2")] * 3, A.encode("1+1+2")])), ValueError,
         "row 3 has 0 '=' tokens, expected 1"),
        (lambda: A.answer_targets(A.encode("1=1=2")[None]), ValueError, "row 0 has 2 '=' tokens, expected 1"),
        (lambda: A.format_example("+", -3, 5), ValueError, "'-3'"),
        (lambda: A.format_example("+", "five", 5), ValueError, "'five'"),
        (lambda: A.format_example("+", 5, "007"), ValueError, "'007'"),
        (lambda: A.format_example("+", 5, ""), ValueError, "''"),
        (lambda: A.format_example("*", 5, 5), ValueError, r"'\*' is not one of"),
        (lambda: A.ArithmeticTransformer(tiny())(ids, recurrences=0), ValueError, "must be at least 1, got 0"),
        (lambda: A.Config(recurrences=0), ValueError, "--recurrences must be at least 1, got 0"),
        (lambda: A.Config(n_head=3), ValueError, "--n-head 3 does not divide --d-model 128; 1, 2, 4, 8"),
        (lambda: A.Config(pos="abakus"), ValueError, "'abakus'.*abacus, learned, nope, rope, fire"),
        (lambda: A.Config(pos="nope+abacus"), ValueError, "joins none"),
        (lambda: A.Config(injection="once"), ValueError, "none, first, recurrence, layer"),
        (lambda: A.Config(pos="rope", d_model=18), ValueError, "rope turns pairs"),
        (lambda: A.Config(cooldown=2.0), ValueError, "between 0 and 1"),
        (lambda: A.Config(loss="half"), ValueError, "unknown loss 'half'; choose from full, prog"),
        (lambda: A.Config(grow=-1), ValueError, "--grow must be at least 0"),
        (lambda: A.Config(probe=(3, 0)), ValueError, "--probe must be at least 1"),
        (lambda: A.AbacusEmbedding(A.DIGITS, 4, offset_per="token"), ValueError, "batch or sample, got 'token'"),
        (lambda: A.make_batch("div", 3), ValueError, "'div'; choose from add, sub, mul, or, sort"),
        (lambda: A.make_batch("add", 3, 0), ValueError, "lengths must be"),
        (lambda: A.make_batch("add", 3, (4, 2)), ValueError, "lengths must be"),
        (lambda: A.make_batch("sort", 3, [(60, 2)]), BadInput, "60 elements need as many labels, there are 51"),
        (lambda: A.ArithmeticTransformer(tiny(pos="learned", max_positions=4))(ids), BadInput, "5 tokens exceed"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_check_costs_nothing_when_it_cannot_fail():
    assert table(many[:, :31], offset=1).shape == (1, 31, 4)  # row 31 is the last
    with pytest.raises(ValueError, match="needs row 32 but the table has 32 rows"):
        table(many[:, :32], offset=1)
    long = torch.full((1, 60), 14)
    assert table(long, offset=100).shape == (1, 60, 4)  # no digits: nothing overflows


def test_bad_command_lines(tmp_path):
    for over, message in (
        ({"resume": True}, "Train first"),
        ({"batch": 97}, "--batch 97 does not divide over 1 processes x --buckets 4"),
        ({"max_offset": 200}, "needs row 208 but the table has 128 rows"),
    ):
        with pytest.raises((BadInput, OSError), match=message):  # the kinds that cli.run prints as one line
            A.train(tiny(out=str(tmp_path), **over))
    done = run_script("abacus.py", "eval", "--model", str(tmp_path / "none.pt"), "--device", "cpu")
    assert done.returncode == 2 and "no checkpoint at" in done.stderr and "Traceback" not in done.stderr


# ---- the demo


@pytest.mark.drill
def test_demo_shortened(tmp_path, capsys):
    curriculum = {"digits": 2, "short": 100, "grow": 100, "max_offset": 4}
    c = A.Config(quick=True, d_model=64, ff=128, steps=300, lr=5e-3, batch=64, buckets=2, **curriculum)
    c = replace(c, lengths=(1, 2, 3), per_length=100, grid=3, per_cell=20, out=str(tmp_path), device="cpu")
    A.main(c)
    said, f = capsys.readouterr().out.splitlines(), _metrics(tmp_path)[-1]
    assert f["exact"]["1"] > 0.95 and f["exact"]["2"] > 0.1 and f["first"]["2"] > 0.9 and f["trained"] > 0.5, f
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert claim["holds"] is False and "1+1" in claim["here"]  # so short a run stays below the bars
    assert said[-1].startswith("claim: Abacus") and said[-1].endswith("DOES NOT HOLD")
    assert (tmp_path / "abacus.png").exists() or any("pip install" in line for line in said)


def test_tables_of_the_demo_do_not_mix(tmp_path, capsys):
    """Also where both train on as many digits, and with more rivals than --few-steps."""
    small = dict(digits=3, few=3, steps=2, few_steps=(3, 4), rivals=("nope", "rope"), workers=1, short=0, max_offset=3)
    A.main(tiny(**small, batch=8, lengths=(1, 2, 3), probe=(1,), grid=3, per_cell=2, per_length=4, out=str(tmp_path)))
    here, said = json.loads((tmp_path / "claim.json").read_text())["here"], capsys.readouterr().out
    assert "at 2+2 nope 0.00, rope 0.00; trained on <= 3 digits, at 5+5 abacus 0.00, nope 0.00, rope 0.00" in here
    steps = [line.split()[3] for line in said.splitlines() if ", seed 0  " in line]
    assert steps == ["2", "2", "2", "3", "4", "4"], said


@pytest.mark.drill
def test_demo_compares_and_says_when_a_seed_is_stuck(tmp_path):
    argv = "--d-model 16 --n-head 1 --ff 16 --steps 4 --few-steps 4 4 --batch 8 --grid 3 --per-cell 2 --rivals nope"
    done = run_script("abacus.py", *argv.split(), "--per-length", "4", "--out", str(tmp_path), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "no seed of abacus found the first digit" in done.stdout and "abacus, seed 1" in done.stdout
    assert "nope, seed 0" in done.stdout and "training on <= 3 digits" in done.stdout
    few = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]
    assert {"abacus, <= 3 digits, seed 0", "nope, <= 3 digits, seed 0"} <= {
        x["measured"] for x in few if "measured" in x
    }


@pytest.mark.gpu
def test_gpu_equals_cpu():
    w = cluster.World(0, 1, torch.device("cuda", 0))
    b = A.make_batch("add", 500, 20, generator=g())
    assert all(torch.equal(x, y.cpu()) for x, y in zip(b, A.make_batch("add", 500, 20, "cuda", g()), strict=True))
    for pos in ("abacus", "abacus+fire", "rope"):
        model = A.ArithmeticTransformer(A.Config(pos=pos, digits=20)).eval()
        want = model(b.ids)
        torch.testing.assert_close(model.to(w.device)(b.ids.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
    with cluster.world("cuda") as w:
        t = A.Trainer(A.Config(dtype="bfloat16", compile=True, steps=60, device="cuda"), w)
        first = t.advance(log=True)["loss"]
        while t.step < 60:
            last = t.advance(log=t.step == 59)
        assert last["loss"] < first
