"""shorts/retrieval_gap.py: the layers step by step, the limit by brute force, the tool, the verdict."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from common import cli, cluster
from shorts import retrieval_gap as R


def test_the_recurrence_equals_its_steps_and_both_layers_carry_their_memory_on():
    torch.manual_seed(0)
    layer, x, S = R.Recurrence(6, 4), torch.randn(2, 5, 6), torch.zeros(2, 4, 4)
    y, end = layer(x)
    for t in range(5):
        n = layer.norm(x[:, t])
        q, k = (F.normalize(f(n), dim=-1) for f in (layer.q, layer.k))
        S = layer.gate(n).sigmoid()[..., None] * S + k[:, :, None] * layer.v(n)[:, None, :]
        torch.testing.assert_close(y[:, t], x[:, t] + layer.o(torch.einsum("bi,bij->bj", 2.0 * q, S)))  # sqrt(d) = 2
    torch.testing.assert_close(end, S)
    for either in (layer, R.Attention(6, 4)):  # what comes later is never seen, and what came before is
        first, memory = either(x[:, :2])
        second, memory = either(x[:, 2:4], memory)
        torch.testing.assert_close(torch.cat([first, second, either(x[:, 4:], memory)[0]], 1), either(x)[0])


def test_the_limit_of_recall_by_hand_and_above_all_codes():
    assert R.recall_limit(50, 100, 2) == pytest.approx(0.88997, abs=1e-3)  # half a bit each: 1 - H2(p) = 1/2
    assert R.recall_limit(6432, 10_000, 4) == pytest.approx(0.7, abs=1e-3)  # 2 - H2(0.7) - 0.3 log2(3) bits each
    assert R.recall_limit(128, 32, 16) > 0.999 and R.recall_limit(0, 5, 16) == pytest.approx(1 / 16, abs=1e-3)
    words, best = list(itertools.product((0, 1), repeat=2)), 0.0  # all codes of one bit for two binary values
    for code in itertools.product((0, 1), repeat=4):
        sent = [[w for w, c in zip(words, code, strict=True) if c == m] for m in (0, 1)]
        best = max(best, sum(max(sum(w[i] == guess for w in s) for guess in (0, 1)) for s in sent for i in (0, 1)) / 8)
    assert best == 0.75 <= R.recall_limit(1, 2, 2) < 0.9


def test_a_rounded_state_has_two_to_the_bits_levels_and_an_unrounded_gradient():
    S = torch.linspace(-3, 3, 99, requires_grad=True)
    assert [len(R.round_state(S, bits).unique()) for bits in (1, 2, 3)] == [2, 4, 8]
    assert R.round_state(torch.tensor([-2.0, 0.1]), 1).tolist() == [-0.5, 0.5]
    torch.testing.assert_close(torch.autograd.grad(R.round_state(S, 1).sum(), S)[0], 1 - S.detach().tanh() ** 2)


def test_the_tool_finds_the_pair_and_the_verdict_falls_with_a_recurrent_layer_for_attention(monkeypatch):
    context = torch.tensor([[[3, 131], [0, 130]]])
    assert R.retrieve(context, torch.tensor([[0, 3, 7]]))[0, :, 0].tolist() == [[0, 130], [3, 131], [7, R.BLANK]]
    cfg, limits = R.Config(widths=(1, 2), pairs=(2, 4, 32), steps=40), {"small": [1, 1, 0.5], "large": [1, 1, 1]}
    curves = {"small": [0.95, 0.4, 0.1], "large": [1, 0.95, 0.3], "attention": [1, 1, 0.99], "search": [1, 1, 1]}
    assert R.judge(cfg, curves, limits)[0]
    for name, worse in {"small": [0.95, 0.4, 0.6], "large": [0.95, 0.4, 0.3], "search": [1, 1, 0.9]}.items():
        assert not R.judge(cfg, curves | {name: worse}, limits)[0]
    monkeypatch.setattr(R, "Attention", R.Recurrence)  # the control: a second recurrent layer of the same width
    net = R.train(cfg, 1, R.Attention, False, range(40))
    assert not R.judge(cfg, curves | {"attention": R.accuracy(cfg, net, False)}, limits)[0]
    context, asked, value = R.episodes(9, 32, cluster.generator(0))
    assert (R.retrieve(context, asked[:, :, 0, 0])[:, :, 0, 1] == value).all() and value.min() >= R.KEYS
    pytest.raises(cli.BadInput, R.Config, pairs=(2, 200))
