"""shorts/local_sgd.py: the rule by hand, data parallel as H = 1, one average a round, equal bits on two processes."""

import pytest
import torch
from ranks import run_ranks

from common import cli, cluster
from shorts import local_sgd as m

NOISE = torch.randn(12, 8, 3, generator=torch.Generator().manual_seed(0))  # of step, worker
slope = lambda p: p + p**2 / 2  # a curved gradient, on which averaged momentum would show


def test_rule_by_hand():
    eta = torch.tensor([0.5] * 4 + [0.25] * 6 + [0.125] * 6)
    assert m.rounds(eta, alpha=0.5, power=2) == [1, 1, 1, 1, 4, 4, 4]  # the second 4 begins under 0.25, the last is cut
    assert m.rounds(eta, alpha=0.5, power=1, H_base=2) == [2, 2, 2, 2, 2, 4, 2]
    assert m.rounds(eta, alpha=0.5, power=2, warmup=6) == [1] * 6 + [4, 6]
    assert m.rounds(torch.full((7,), 0.3), alpha=0.5) == [2, 2, 2, 1]  # (5 / 3)^2 = 2.8, rounded down
    assert m.spread(3, 8) == [2, 3, 3] and m.learning_rates(m.Config(), 0.5).min() > 0


def two_rounds(rank=0, size=1, expected=None):
    mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
    params = [torch.ones(8 // size, 3)]
    assert m.local_sgd(params, lambda p, t: [slope(p[0]) + NOISE[t, mine]], [5, 7], torch.full((12,), 0.1), K=8) == 2
    assert expected is None or torch.equal(params[0], expected[mine])
    return params[0]


def test_every_round_is_one_average_of_the_workers_on_one_process_or_two(tmp_path):
    with cluster.world("cpu"):
        found = two_rounds()
    p, b = torch.ones(8, 3), torch.zeros(8, 3)
    for t in range(12):
        b = 0.9 * b + slope(p) + NOISE[t]
        p = (p - 0.1 * b).mean(dim=0).expand(8, 3) if t in (4, 11) else p - 0.1 * b
    torch.testing.assert_close(found, p)
    run_ranks(two_rounds, 2, tmp_path, found)


def test_rounds_of_one_step_are_data_parallel_sgd():
    params, eta, one = [torch.ones(8, 3)], torch.linspace(0.2, 0.01, 12), torch.ones(3, requires_grad=True)
    with cluster.world("cpu"):
        m.local_sgd(params, lambda p, t: [slope(p[0]) + NOISE[t]], [1] * 12, eta, K=8, decay=0.01)
    sgd = torch.optim.SGD([one], lr=1.0, momentum=0.9, weight_decay=0.01)
    for t in range(12):
        sgd.param_groups[0]["lr"] = eta[t].item()
        one.grad = slope(one).detach() + NOISE[t].mean(dim=0)
        sgd.step()
    torch.testing.assert_close(params[0], one.detach().expand(8, 3))


def test_verdict_falls_when_the_control_takes_the_rules_place():
    row = lambda n, loss: {"all-reduces": n, "test loss": loss}
    rest = {"data parallel": row(2000, 1.82), "data parallel, rate 1": row(2000, 1.83)}
    verdict = lambda ours, constant: m.judge(m.Config(), rest | {"QSR": ours, "constant H": constant})[0]
    assert verdict(row(429, 1.82), row(429, 1.9)) and not verdict(row(429, 1.84), row(429, 1.9))
    assert not verdict(row(501, 1.82), row(501, 1.9)) and not verdict(row(429, 1.82), row(429, 1.82))
    pytest.raises(cli.BadInput, m.Config, h_base=0)
