"""shorts/TEMPLATE.py: the running mean by hand, the control, and a verdict that can fail."""

import pytest
import torch

from common import cli, cluster
from shorts import TEMPLATE as T


def test_running_mean_is_the_mean():
    x = torch.randn(7, 3, 2, generator=cluster.generator(0))
    mean = torch.zeros(3, 2)
    for n, row in enumerate(x, start=1):
        mean = T.running_mean(mean, row, n)
        torch.testing.assert_close(mean, x[:n].mean(dim=0))


def verdict():
    cfg = T.Config(steps=1000)
    with cluster.world("cpu") as w:
        noisy, clean = (T.train(cfg, w, noise) for noise in (1.0, 0.0))
    return T.judge(*noisy[-1].tolist(), *clean[-1].tolist()), noisy


def test_verdict_holds_and_falls_without_the_method(monkeypatch):
    holds, noisy = verdict()
    assert holds and torch.equal(noisy[:500, 0], noisy[:500, 1]), "until half of the run the mean is the iterate"
    monkeypatch.setattr(T, "running_mean", lambda mean, x, n: x)  # the control: the last iterate
    assert not verdict()[0]


@pytest.mark.parametrize("noisy, clean", [((1.0, 0.3), (0.0, 0.1)), ((1.0, 0.1), (0.1, 0.0))])
def test_verdict_needs_a_fifth_and_no_gain_without_noise(noisy, clean):
    assert not T.judge(*noisy, *clean)
    with pytest.raises(cli.BadInput, match="10 or more"):
        T.Config(steps=5, quick=True)
