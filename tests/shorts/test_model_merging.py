"""shorts/model_merging.py: the three merges by hand, groups, the ladder of Hyperband, the verdict."""

import pytest
import torch

from common import cli, cluster
from shorts import model_merging as M

BASE = torch.zeros(1, 4)
EXPERTS = torch.tensor([[[4.0, -1.0, 3.0, 0.5]], [[2.0, 2.0, -5.0, 0.1]]])


def test_merges_by_hand():
    near = torch.testing.assert_close
    near(M.linear(BASE, EXPERTS, torch.tensor([1.0, 3.0])), torch.tensor([[2.5, 1.25, -3.0, 0.2]]))
    near(M.task_arithmetic(BASE + 1, EXPERTS, torch.tensor([0.5])), 1 + 0.5 * (EXPERTS.sum(0) - 2))
    near(M.task_arithmetic(BASE + 1, EXPERTS, torch.tensor([0.5, 0.0])), 1 + 0.5 * (EXPERTS[0] - 1))
    # TIES keeps 3 of 4: [4 -1 3 0] and [2 2 -5 0]; signs of the sums + + - 0; means of who agrees 3, 2, -5, 0
    out = M.ties(BASE, EXPERTS, torch.tensor([0.25, 1.0]))
    near(out, torch.tensor([[3.0, 2.0, -5.0, 0.0]]))
    near(M.ties(BASE + 1, EXPERTS + 1, torch.tensor([0.25, 0.5])), 1 + out / 2)
    assert (M.ties(BASE, torch.ones(1, 1, 4), torch.tensor([0.5, 1.0])) != 0).sum() == 2  # of equal magnitudes too


def test_groups_of_layers():
    x = torch.zeros(2, 8)
    x[0, 0] = x[1, 1] = 1.0  # linear: the first expert below, the second above
    merged = M.merge([BASE] * 4, [torch.cat([EXPERTS, BASE[None]])] * 4, (torch.tensor([0, 0]), x))
    assert [bool((m == EXPERTS[1]).all()) for m in merged] == [False, False, True, True]


def test_hyperband_climbs_its_ladder_keeps_the_best_and_stays_in_its_budget():
    calls, cfg = [], M.Config(full=900, budget=40)

    def evaluate(recipe, n):
        calls.append((n, float(recipe[1].mean())))
        return calls[-1][1]

    curve = M.search(evaluate, 2, cfg, cluster.generator(0), [])
    assert sum(n for n, _ in calls) <= 36000 and [n for n, _ in calls[:13]] == [100] * 9 + [300] * 3 + [900]
    assert sorted(s for _, s in calls[9:12]) == sorted(s for _, s in calls[:9])[-3:]
    assert calls[12][1] == max(s for _, s in calls[:9]) and curve[0][:2] == (2700, calls[12][1])
    assert [score for _, score, _ in curve] == sorted(score for _, score, _ in curve)


def test_verdict_holds_and_falls_where_the_search_proposes_at_random(monkeypatch):
    cfg, goal = M.Config(budget=30), torch.tensor([[0.1], [0.1], [0.9], [0.9]])  # other layers need other coefficients

    def score(recipe, n=10**6):  # few examples add noise
        off = (recipe[1].expand(4, 8) - goal).abs()[:, :3].mean() + 0.1 * (recipe[0] != 0).float().mean()
        return 1 - off.item() + torch.randn((), generator=cluster.generator(2, n, int(1e6 * off))).item() / n**0.5 / 9

    def verdict():
        found = {name: sum(score(c[-1][2]) for c in curves) / 6 for name, curves in M.compare(score, 4, cfg).items()}
        return [M.judge(found | dict.fromkeys(M.ALIKE, alike) | {"by hand": 1.0})[0] for alike in (0.7, 0.75)]

    assert verdict() == [True, False]  # the second recipe alike for all layers is too good
    monkeypatch.setattr(M, "propose", lambda seen, groups, g, draw=M.propose: draw([], groups, g))
    assert verdict() == [False, False]
    pytest.raises(cli.BadInput, M.Config, budget=2)
