"""shorts/model_similarity.py: CAPA and the others by hand, its fixed points, what a model reads, the verdict."""

import pytest
import torch
import torch.nn.functional as F

from common import cli, cluster
from shorts import model_similarity as M


def hot(answers, K):
    return F.one_hot(torch.as_tensor(answers), K).float()


def test_capa_by_hand_and_its_fixed_points():
    p1 = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    p2 = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    c_obs, c_exp = (0.425 + 0.32) / 2, 0.5 * 0.55 + 0.5 * 0.45 / 2  # the right options have 0.5 and 0.55 on average
    assert M.capa(p1, p2, torch.tensor([0, 2])).item() == pytest.approx((c_obs - c_exp) / (1 - c_exp), abs=1e-6)
    y, a, soft = torch.arange(4), hot([0, 1, 3, 2], 4), torch.full((4, 4), 0.25)
    assert M.capa(a, a, y).item() == pytest.approx(1) and M.capa(soft, soft, y).item() == pytest.approx(0)
    assert M.capa(hot([0, 1, 3, 0], 4), hot([1, 2, 2, 3], 4), y).item() == pytest.approx(-0.5)  # expected: 1/3


def test_cohen_and_error_consistency_by_hand():
    a, b = hot([0, 0, 0, 1], 3), hot([0, 0, 1, 1], 3)
    assert M.cohen(a, b, torch.zeros(4).long()).item() == pytest.approx((0.75 - 0.5) / 0.5)
    a, b, y = hot([0, 0, 1, 2], 3), hot([0, 0, 2, 1], 3), torch.zeros(4).long()  # wrong together, in other ways
    assert M.error_consistency(a, b, y).item() == pytest.approx(1)
    assert M.error_consistency(a, hot([0, 1, 0, 1], 3), y).item() == pytest.approx(0)
    assert M.capa(a, b, y).item() == pytest.approx((0.5 - 0.375) / (1 - 0.375))


def test_models_read_their_features_only_and_thirds_are_the_outer_ones():
    cfg, g = M.Config(), cluster.generator(0)
    bank, x = M.fresh([torch.arange(3), torch.arange(12, 18)], cfg, g), torch.randn(5, M.FEATURES, generator=g)
    change = (M.answer(bank, x + F.pad(torch.ones(3), (0, M.FEATURES - 3))) - M.answer(bank, x)).abs()
    assert change[0].min() > 0 and change[1].max() == 0
    by, v = torch.tensor([3.0, 1, 2, 9, 8, 7, 5, 5, 5]), torch.tensor([1.0, 2, 3, 10, 20, 30, 0, 0, 0])
    assert M.outer_thirds(v, by) == pytest.approx(2 - 20)
    known = [torch.randn(50, generator=g), torch.randn(50, generator=g)]
    assert M.apart_from(known, 3 + known[0] - 2 * known[1]).abs().max() < 1e-4


def test_verdict_holds_and_falls_with_agreement_for_capa_or_with_the_mistakes_moved(monkeypatch):
    cfg = M.Config(repeats=3, steps=120, questions=1500)

    def run():
        g = cluster.generator(1)
        means = torch.randn(cfg.options, M.FEATURES, generator=g)
        x, y = (t[0] for t in M.ask(means, 1, cfg.questions, g))
        return M.first_experiment(means, x, y, cfg, g), M.second_experiment(means, x, y, cfg, g)

    pairs, found = run()
    assert M.judge(pairs, found)[0], M.judge(pairs, found)[1]
    assert not M.judge(pairs, found | {"gain": found["gain, moved"]})[0]
    assert not M.judge({k: [r | {"CAPA": r["agreement"]} for r in rows] for k, rows in pairs.items()}, found)[0]
    assert not M.judge(pairs, found | {"gain, moved": found["gain"]})[0]
    assert not M.judge(pairs | {"independent": [r | {"Cohen": 0.5} for r in pairs["independent"]]}, found)[0]
    pytest.raises(cli.BadInput, M.Config, options=3)
