"""shorts/scaling_laws.py: a planted law, the optimum by brute force, the hull by hand, the tables, the verdict."""

import math

import pytest
import torch

from common import cli, cluster
from shorts import scaling_laws as s
from shorts.scaling_laws import Law, fit, hull, objective, read

DATA = [s.Path(s.__file__).parent / "data" / name for name in ("scaling_laws.csv", "scaling_laws_1.csv")]


def test_fit_finds_a_planted_law_and_does_not_follow_an_outlier():
    true = Law(math.log(40.0), math.log(300.0), math.log(1.2), 0.34, 0.47)
    N = torch.logspace(3.5, 5.5, 9, dtype=torch.float64).repeat_interleave(8)
    D = torch.logspace(4.5, 6, 8, dtype=torch.float64).repeat(9)
    L = true.loss(N, D)
    L[10] *= 1.3
    law = fit(N, D, L)
    assert (law.alpha, law.beta, math.exp(law.logE)) == pytest.approx((0.34, 0.47, 1.2), rel=3e-2)
    assert (law.loss(N, D) / true.loss(N, D) - 1).abs().max() < 3e-3
    n, d = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])
    two = [math.log(3), math.log(math.exp(-0.5) + math.exp(-0.5) + 1)]  # theta: logs 0, alpha 1/2, beta 1/4
    value = objective(torch.tensor([0.0, 0.0, 0.0, 0.5, 0.25]), n, d, torch.zeros(2), 0.1)
    assert value.item() == pytest.approx(0.1 * (two[0] - 0.05 + two[1] - 0.05))  # a sum, both in the linear part


def test_optimum_is_the_least_loss_on_the_budget():
    law = Law(6.0, 7.0, 0.5, 0.34, 0.28)
    N = torch.logspace(6, 12, 60001, dtype=torch.float64)
    assert law.optimum(1e21)[0] == pytest.approx(N[law.loss(N, 1e21 / 6 / N).argmin()].item(), rel=5e-4)
    assert math.prod(law.optimum(1e21)) * 6 == pytest.approx(1e21)


def test_hull_drops_what_lies_above_and_stops_where_loss_rises():
    C = torch.tensor([math.e**k for k in (0, 1, 2, 3, 1, 4)], dtype=torch.float64)
    L = torch.tensor([math.e**k for k in (4, 2, 1.5, 0.5, 3, 0.9)], dtype=torch.float64)
    assert hull(C, L) == [0, 1, 3]  # 2 lies above the chord 1-3, 4 above 1, 5 after the minimum


def test_tables_are_of_the_grid_and_a_blank_cell_is_left_out(tmp_path):
    sizes = [sum(p.numel() for p in s.Model(*shape, cluster.generator(0)).parameters()) for shape in s.GRID]
    for runs in map(read, DATA):
        assert runs.shape == (5, 8 * 18) and [tuple(x) for x in runs[:2].T[::8].int().tolist()] == list(s.GRID)
        assert runs[2, ::8].tolist() == sizes and max(sizes) == sizes[-1]
    (tmp_path / "a.csv").write_text("width,depth,params,10,20\n4,2,8,3.0,\n4,1,4,3.5,3.25\n")
    assert read(tmp_path / "a.csv")[2:].T.tolist() == [[8, 10, 3], [4, 10, 3.5], [4, 20, 3.25]]
    for text in ("params,10\n8,3.0\n", "width,depth,params,10\n4,2,8,many\n", "width,depth,params,ten\n4,2,8,3.0\n"):
        (tmp_path / "b.csv").write_text(text)
        pytest.raises(cli.BadInput, read, tmp_path / "b.csv")
    pytest.raises(cli.BadInput, s.choices, s.Config(sets=1), runs)


def test_verdict_needs_both_tables_and_falls_when_the_hull_is_replaced_by_the_law():
    law, near = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([5.0, 6.0, 7.0])
    good, same = torch.stack([law, near], dim=1), torch.stack([law, law], dim=1)
    assert s.judge({"a": good, "b": good})[0] and not s.judge({"a": good, "b": same})[0]
    assert not s.judge({"a": torch.stack([near, near**0.1], dim=1)})[0], "a law that hardly spreads is no claim"
