"""shorts/neftune.py: the noise, ROUGE-L by brute force, what is predicted, where noise enters, the verdict."""

import itertools
import math

import pytest
import torch

from common import cli
from shorts import neftune as N


def test_the_noise_has_the_papers_bound_and_length_for_every_sequence():
    torch.manual_seed(0)
    x, length = torch.ones(3, 400, 64), torch.tensor([400, 100, 25])
    for row, n in zip(N.noisy(x, length, 6.0) - x, length.tolist(), strict=True):
        bound = 6 / math.sqrt(n * 64)
        assert row[:n].norm().item() == pytest.approx(6 / math.sqrt(3), abs=0.15)  # whatever the length
        assert row.abs().max() <= bound * 1.0001 and min(row.max(), -row.min()) > 0.99 * bound
        assert abs(row.mean()) < bound / 50


def test_rouge_l_is_the_longest_common_subsequence():
    subsets = lambda a: {c for n in range(len(a) + 1) for c in itertools.combinations(a, n)}
    for a, b in (("abcde", "badce"), ("aab", "aba"), ("xyz", "abc"), ("abc", "abc"), ("a", "baab"), ("", "")):
        common = max(map(len, subsets(a) & subsets(b)))
        assert N.rouge_l(list(a), list(b)) == pytest.approx(2 * common / max(1, len(a) + len(b)))


def test_a_docstring_becomes_one_pair_and_only_the_reply_is_predicted():
    source = 'def get_it(self, a=1):\n    """Return\n    it.\n\n    More."""\n\ndef got(b):\n    r"""Return it."""\n'
    assert N.find_pairs(source) == [("got (b)", "Return it.")] and N.find_pairs("def f(x):\n    return x\n") == []
    assert N.find_pairs(source[: source.index("def got")]) == [("get it (self, a=1)", "Return it.")]
    ids, length, weight = N.pack([([5, 6, 7], [8, 9]), ([5], [6])])
    assert ids.tolist() == [[5, 6, 7, 0, 8, 9, 0], [5, 0, 6, 0, 0, 0, 0]] and length.tolist() == [7, 4]
    assert ids[0, 1:][weight[0] == 1].tolist() == [8, 9, 0] and ids[1, 1:][weight[1] == 1].tolist() == [6, 0]


def test_noise_enters_at_the_embeddings_and_only_when_asked_and_replies_are_greedy(monkeypatch):
    torch.manual_seed(0)
    model, data, seen = N.LM(20, 8).eval(), N.pack([([5, 6], [8, 9]), ([5], [6, 7, 8])]), []
    monkeypatch.setattr(N, "noisy", lambda x, length, alpha: seen.append((x, length, alpha)) or x.flip(-1))
    clean = N.reply_loss(model, data)
    assert N.reply_loss(model, data) == clean and not seen and N.reply_loss(model, data, alpha=3.0) != clean
    x, length, alpha = seen[0]
    assert torch.equal(x, model.word(data[0][:, :5])) and length.tolist() == [6, 6] and alpha == 3.0
    for prompt, reply in zip(([5, 6], [7, 4, 3]), N.answer(model, [[5, 6], [7, 4, 3]]), strict=True):
        text = [*prompt, 0, *reply]
        best = model(torch.tensor([text]))[0].argmax(-1).tolist()
        assert best[len(prompt) :][: len(reply)] == reply and (len(reply) == N.REPLY or best[-1] == 0)


def test_the_verdict_falls_when_the_noise_is_left_out(monkeypatch):
    monkeypatch.setattr(N, "noisy", lambda x, length, alpha: x)  # plain fine-tuning in the method's place
    base, cfg, pairs = N.LM(20, 8), N.Config(pairs=32, epochs=1), 500 * [([5, 6], [8, 9])]
    found = [N.fine_tune(base, cfg, pairs, alpha, 0.0) for alpha in (0.0, 15.0)]
    plain, noise = (dict(zip(found[0], x, strict=False)) for x in ((2.2, 3.5, 0.3), (2.5, 3.4, 0.2)))
    assert N.judge(plain, noise) and not any(N.judge(plain, noise | {k: plain[k]}) for k in plain)
    assert found[0] == found[1] and not N.judge(*found)
    pytest.raises(cli.BadInput, N.Config, alpha=(0.0,))
