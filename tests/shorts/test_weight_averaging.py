"""shorts/weight_averaging.py: both averages by hand, training untouched by them, what counts as saved."""

import pytest
import torch

from common import cli, cluster
from shorts import weight_averaging as m

TRAIL = [[torch.tensor([float(x)])] for x in (1, 2, 4, 8, 16)]


def fill(average, trail=TRAIL):
    for params in trail:
        average.add(params)
    return average.average()[0].item()


def test_latest_average_by_hand():
    assert fill(m.LatestAverage(1)) == 16
    assert fill(m.LatestAverage(3)) == pytest.approx(28 / 3)
    assert fill(m.LatestAverage(9)) == pytest.approx(31 / 5)  # fewer than k so far: the mean of those


def test_moving_average_by_hand():
    assert fill(m.MovingAverage(0.5)) == pytest.approx((1 + 2 * 2 + 4 * 4 + 8 * 8 + 16 * 16) / (1 + 2 + 4 + 8 + 16))
    assert fill(m.MovingAverage(0.99), TRAIL[:1]) == pytest.approx(1.0)  # no pull towards zero or the start
    b = m.matched_beta(7)  # as old on average as the last seven
    assert sum(i * (1 - b) * b**i for i in range(999)) == pytest.approx(3, rel=1e-4) and m.matched_beta(1) == 0


def test_averages_are_copies():
    for a in (m.LatestAverage(2), m.MovingAverage(0.5)):
        params = [torch.ones(2, requires_grad=True)]
        a.add(params)
        params[0].detach().fill_(5)
        a.average()[0].zero_()
        assert a.average()[0].tolist() == [1, 1] and not a.average()[0].requires_grad
        assert params[0].tolist() == [5, 5]


def test_saved_steps_and_rates():
    assert m.saved([5, 4, 3, 2], [5, 2, 1, 1]) == pytest.approx(0.5)
    assert m.saved([5, 4, 2, 3], [5, 4, 4, 2]) == pytest.approx(1 - 4 / 3) and m.saved([5, 1], [5, 2]) == -1
    assert m.rate(50, 100, 0.1, floor=1) == 1 == pytest.approx(m.rate(10, 100, 0.1, floor=0))
    assert m.rate(0, 100, 0.1, floor=0) == pytest.approx(0.1) and m.rate(55, 100, 0.1, floor=0.2) == pytest.approx(0.6)


def test_averaging_does_not_change_training():
    cfg = [m.Config(k=k, checkpoints=4, steps=8, batch=4) for k in (1, 4)]
    rows = torch.randint(m.V, (50, m.CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    with cluster.world("cpu") as w:
        one, four = (m.train(c, w, 1e-2, 1.0, (rows, rows))[0] for c in cfg)
    assert one["raw"] == four["raw"] == pytest.approx(one["LAWA"]) and one["LAWA"] != four["LAWA"]


def test_verdict_falls_when_raw_weights_take_the_place_of_the_mean():
    losses = {"raw": [5, 4, 3, 2.5, 2], "LAWA": [5, 3, 1.9, 1.9, 1.9]}
    assert m.judge(losses)[0] and not m.judge(losses | {"LAWA": losses["raw"]})[0]
    assert m.judge(losses | {"LAWA": [3, 3, 3, 3, 3]}) == (False, "no sooner")
    pytest.raises(cli.BadInput, m.Config, warmup=1.0)
