"""shorts/distillspec.py: speculative sampling keeps the target's law, divergences by hand, own text, the verdict."""

import math

import pytest
import torch

from common import cli, cluster
from shorts import distillspec as D


def test_blocks_follow_the_target_and_nothing_is_kept_behind_a_rejection():
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.6, 0.2, 0.1])
    kept = q * D.accept(p, q)
    assert kept.tolist() == pytest.approx([0.1, 0.3, 0.2, 0.0]) and kept.sum().item() == pytest.approx(0.6)  # 1 - TV
    assert (kept + 0.4 * D.residual(p, q)).tolist() == pytest.approx(p.tolist())
    g, B = cluster.generator(0), 40000
    p0, p1 = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([[0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.6, 0.2, 0.2]])
    q0 = torch.tensor([0.2, 0.5, 0.3])
    first = torch.multinomial(q0, B, True, generator=g)
    kept, token = D.verify(torch.stack([p0.expand(B, 3), p1[first]], 1), q0.expand(B, 1, 3), first[:, None], g)
    one = torch.where(kept > 0, first, token)
    assert (torch.bincount(one, minlength=3) / B).tolist() == pytest.approx(p0.tolist(), abs=0.01)
    for a in range(3):  # the token after a full block comes from the target
        bonus = token[(kept == 1) & (first == a)]
        assert (torch.bincount(bonus, minlength=3) / len(bonus)).tolist() == pytest.approx(p1[a].tolist(), abs=0.03)
    p, q = torch.eye(2)[None, [0, 1, 0, 1]], torch.full((1, 3, 2), 0.5)  # the target forbids the second token
    assert [x.item() for x in D.verify(p, q, torch.tensor([[0, 0, 0]]), g)] == [1, 1]


def test_divergences_by_hand_and_own_text():
    p, q = torch.tensor([0.5, 0.5]).log() + 3, torch.tensor([0.25, 0.75]).log() - 1
    assert D.divergence("fkl", p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert D.divergence("tvd", p, q).item() == pytest.approx(0.25, abs=1e-6)
    torch.manual_seed(0)
    net, seen = D.Net(4, 8, 4), []
    net.register_forward_hook(lambda _, given, out: seen.append(given[0]) if given[0].shape[1] > 4 else None)
    for source, own in (("own", True), ("data", False)):
        D.train(net, torch.full((999,), 65), 1, D.Config(), 1, D.Net(4, 8, 4), "tvd", source)
        assert bool((seen[-1][:, 4:] != 65).any()) is own


def test_verdict_holds_and_falls_with_the_careless_redraw(monkeypatch):
    torch.manual_seed(1)
    target, draft, cfg = D.Net(5, 16, 8, 9), D.Net(3, 16, 8, 9), D.Config(gamma=2)
    for net in (target, draft):
        net.head.weight.data.mul_(6)
    prompts = torch.randint(9, (3, D.P), generator=cluster.generator(0))
    exact, wrong = (D.deviation(target, draft, prompts, cfg, check) for check in (D.verify, D.careless))
    found = {way: {"per pass": 3.0} for way in D.WAYS} | {"tvd on own text": {"per pass": 3.2}}
    assert D.judge(found, exact, wrong)[0] and not D.judge(found, wrong, wrong)[0]
    for rival, n in {"next token": 3.1, "next token, 4 x steps": 3.12, "fkl on data": 3.3, "tvd on data": 3.3}.items():
        assert not D.judge(found | {rival: {"per pass": n}}, exact, wrong)[0]
    x, end = D.speculate(target, target, prompts, 4, 2, cluster.generator(0), greedy=True)
    assert (end == D.P + 4 * 3).all() and (x[:, D.P] == target(prompts[:, -5:])[:, 0].argmax(-1)).all()
    target.head.weight.data.zero_()
    drawn = torch.cat([torch.full((round(1800 * p),), i) for i, p in enumerate(target.head.bias.softmax(0).tolist())])
    monkeypatch.setattr(D, "speculate", lambda *given: (drawn[:, None].expand(-1, D.P + 2), None))
    assert D.deviation(target, draft, prompts[:1], cfg, B=1800) == pytest.approx(-8 / 4, abs=0.02)
    pytest.raises(cli.BadInput, D.Config, steps=0)
