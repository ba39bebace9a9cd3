"""shorts/pfn_boost.py: boosting against plain loops, what the PFN may read, the choice, the verdict."""

import pytest
import torch

from common import cli, cluster
from shorts import pfn_boost as P

CFG = P.Config(depth=2, lr=0.3, ridge=1.5)


def best_cut(below, g, h, rows):
    """The two sides of the cut of best gain, or all rows and none."""
    found = []
    for c in range(below.shape[1]):
        sides = rows[below[rows, c] > 0], rows[below[rows, c] == 0]
        if min(h[side].sum() for side in sides) >= 1:
            found.append((sum(g[side].sum() ** 2 / (h[side].sum() + CFG.ridge) for side in sides), sides))
    return max(found, key=lambda cut: cut[0])[1] if found else (rows, rows[:0])


def test_boosting_equals_plain_loops_for_every_table_and_start():
    r = cluster.generator(0)
    below, y = (torch.rand(2, 60, 5, generator=r) < 0.5).float(), (torch.rand(2, 60, generator=r) < 0.4).float()
    start = torch.randn(2, 3, 60, generator=r)
    got = P.boost(below, y, start, (below[:, :9], start[..., :9]), (0, 4), CFG)
    for b, s in ((0, 0), (0, 2), (1, 0), (1, 1)):
        margin = start[b, s].clone()
        for _ in range(4):
            p, nodes = margin.sigmoid(), [torch.arange(60)]
            g, h = p - y[b], p * (1 - p)
            for _ in range(CFG.depth):
                nodes = [side for rows in nodes for side in best_cut(below[b], g, h, rows)]
            for rows in nodes:
                margin[rows] -= CFG.lr * g[rows].sum() / (h[rows].sum() + CFG.ridge)
        torch.testing.assert_close(got[1, b, s], margin[:9], atol=1e-5, rtol=0)


def test_pfn_reads_labelled_rows_only_and_never_a_row_s_own_label():
    torch.manual_seed(0)
    net, x, y = P.PFN(3, 16, 2).eval(), torch.randn(2, 9, 3), torch.randint(2, (2, 6)).float()
    other = net(torch.cat([x[:, :8], x[:, 8:] + 1], 1), y)
    torch.testing.assert_close(other[:, :2], net(x, y)[:, :2], atol=1e-6, rtol=0)
    ones, flipped = torch.ones(2, 9), 1 - torch.eye(9)[[4, 4]]
    change = (P.out_of_fold(net, x, flipped, 100, 3) - P.out_of_fold(net, x, ones, 100, 3)).abs()
    assert change[:, 4].max() < 1e-6 and change[:, 5].min() > 1e-6


def test_validation_rows_choose_and_the_verdict_falls_when_a_control_takes_the_fusion_s_place(monkeypatch):
    margin = torch.tensor([[[[1.0, 2.0]]], [[[3.0, -2.0]]]])  # two rounds: the second is better on the first row only
    folds = torch.cat([margin, margin, margin.flip(0), margin.flip(0)], 1)  # of two tables
    assert P.pick(folds, torch.ones(4, 2), 1, 2) == pytest.approx(2.126928, abs=1e-5)  # log(1 + e^2)
    good = dict.fromkeys(P.ROWS, {"GBDT": 0.5, "PFN": 0.5, "boost": 0.45, "average": 0.44, "sum": 0.46, "stack": 0.46})
    assert P.judge(good)[0] and not P.judge(good | {48: good[48] | {"PFN": 0.42}})[0]
    boost, (x, y) = P.boost, P.tables(2, P.ROWS[-1] + 20, 2.0, cluster.generator(1))
    blind = lambda below, y, start, held, *more: boost(below, y, 0 * start, (held[0], 0 * held[1]), *more) + held[1]
    monkeypatch.setattr(P, "boost", blind)  # trees that never saw the PFN
    found = P.compare(P.PFN(5), x, y, 48, P.Config())
    assert found["boost"] == pytest.approx(found["sum"]) and not P.judge(dict.fromkeys(P.ROWS, found))[0]
    pytest.raises(cli.BadInput, P.Config, context=4)
