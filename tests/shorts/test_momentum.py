"""shorts/momentum.py: the step against torch, by hand, and as SGD elsewhere; runs side by side; orders; the verdict."""

import pytest
import torch

from common import cli, cluster
from shorts import momentum as M


def test_step_is_torch_sgd_at_gamma_and_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    theirs, x, m = torch.optim.SGD([p], lr=0.3 * (1 - 0.8), momentum=0.8), p.detach().clone(), torch.zeros(2)
    for _ in range(5):
        p.grad = p.detach() * torch.tensor([1.0, 3.0])
        theirs.step()
        x, m = M.sgdm_step(x, m, x * torch.tensor([1.0, 3.0]), 0.3, 0.8)
    torch.testing.assert_close(x, p.detach())
    x, m, seen = torch.zeros(1), torch.zeros(1), []
    for _ in range(3):  # a constant gradient of 1: m = 1, 1.5, 1.75, and half of it is taken
        x, m = M.sgdm_step(x, m, torch.ones(1), 1.0, 0.5)
        seen.append(x.item())
    assert seen == [-0.5, -1.25, -2.125]


def test_the_point_where_the_buffer_is_handed_out_moves_like_sgd():
    x, m = torch.randn(4, generator=torch.Generator().manual_seed(0)), torch.zeros(4)
    for k in range(6):
        z, g = x - 0.2 * 0.9 * m, torch.sin(x + k)
        x, m = M.sgdm_step(x, m, g, 0.2, 0.9)
        torch.testing.assert_close(x - 0.2 * 0.9 * m, z - 0.2 * g)


def test_runs_side_by_side_share_data_and_nothing_else():
    teacher, eta, beta = M.Teacher(M.Config()), torch.tensor([0.05, 1e6, 0.1]), torch.tensor([0.0, 0.0, 0.9])
    with cluster.world("cpu") as w:
        many = M.train(teacher, eta, beta, 2, 4, 30, True, ((1,), (2,)), w)
        alone = M.train(teacher, eta[2:], beta[2:], 2, 4, 30, True, ((1,), (2,)), w)
        other = M.train(teacher, eta[2:], beta[2:], 2, 4, 30, True, ((1,), (3,)), w)
        steady = M.train(teacher, eta[2:], beta[2:], 2, 4, 30, False, ((1,), (2,)), w)
    torch.testing.assert_close([q[2::3] for q in many], alone)
    assert 0.01 < M.distance(alone, other) < 10, "another run from the same start"
    first = M.start(2, 64, cluster.generator(1))
    assert M.distance(alone, first) < 0.8 * M.distance(steady, first), "a falling rate takes it less far"
    error = teacher.error(many).view(2, 3)
    assert (error[:, 1] == 1e9).all() and (error[:, [0, 2]] < 10).all()


def test_distance_and_order_by_hand():
    assert M.distance([torch.zeros(2, 1, 1)] * 2, [torch.full((2, 1, 1), x) for x in (3.0, 4.0)]) == pytest.approx(5)
    assert M.order([1.0, 0.5, 0.25], [8.0, 2.0, 0.5]) == pytest.approx(2)


def test_verdict_falls_without_the_method_or_when_either_half_fails():
    paths = [{"eta": e, "momentum": e, "other minibatches": e**0.5, "gamma = eta": 20 * e} for e in (0.04, 0.02, 0.01)]
    row = {"SGD": 0.1, "SGD at SGDM's eta": 1e9, "at eta, SGD": 0.25, "at eta, SGDM": 2.0}
    verdict = lambda small, large, p=paths: all(r[-1] for r in M.judge(p, [row | {"ratio": r} for r in (small, large)]))
    assert verdict(1.01, 0.8) and not verdict(0.9, 0.8) and not verdict(1.01, 0.98)
    assert not verdict(1.01, 0.8, [r | {"momentum": r["gamma = eta"]} for r in paths])  # the control in its place
    assert not verdict(1.01, 0.8, [r | {"momentum": 0.05 * r["eta"] ** 0.5} for r in paths])
    pytest.raises(cli.BadInput, M.Config, batches=(4, 32, 512))
