"""shorts/density.py: the density, ranks and p by hand and by brute force, what a paraphrase is, the verdict."""

import itertools
import math

import pytest
import torch

from common import cli, cluster
from shorts import density as D


def test_log_density_is_the_log_of_the_mean_kernel_and_does_not_underflow():
    data, query = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [1e4, 0.0]])
    got = D.log_density(query, data, 0.5)
    assert got[0].item() == pytest.approx(math.log((1 + math.exp(-10)) / 2))  # distances 0 and 5, h 1/2
    assert -20_000 < got[1].item() < -19_900  # the nearer of 1e4 and 9997 over h, less log 2
    twice = D.log_density(query[:1], torch.cat([data, data[:1]]), 0.5)
    assert twice.item() == pytest.approx(math.log((2 + math.exp(-10)) / 3))  # one more copy, divided by the new N


def test_ranks_share_ties_and_the_permutation_p_is_that_of_all_pairings():
    assert D.ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    x, y = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 2.0, 3.0])
    r = lambda order: abs(D.correlation(x[list(order)], y))
    exact = sum(r(o) >= r(range(4)) - 1e-9 for o in itertools.permutations(range(4))) / 24
    assert abs(D.permutation_p(x, y, cluster.generator(0)) - exact) < 0.03
    assert D.correlation(torch.ones(4), y) == 0 and D.correlation(-2 * y, y) == pytest.approx(-1)


def test_a_paraphrase_keeps_person_relation_and_answer_and_changes_the_words():
    language, n, first = D.Language(7, cluster.generator(0)), D.WORDINGS, 7 + 2 * D.SYNONYMS
    text = language.tell(torch.full((n,), 3), torch.full((n,), 2), torch.arange(n))
    assert text.shape == (n, D.LENGTH + 1) and len(text[:, :-1].unique(dim=0)) == n
    assert ((text == 3).sum(1) == 1).all() and (text[:, -1] == text[0, -1]).all()
    assert (((text >= first) & (text < first + D.SYNONYMS)).sum(1) == 1).all()
    assert text[0, -1] == 7 + D.RELATIONS * D.SYNONYMS + 2 * D.ANSWERS + language.facts[3, 2]


def test_leaks_have_the_asked_number_are_distinct_and_never_the_question_itself():
    wording, support = torch.tensor([5, 0, 40, 7]), torch.tensor([0, 2, D.WORDINGS - 1, 1])
    row, other = D.paraphrases(wording, support, cluster.generator(1))
    assert row.bincount(minlength=4).tolist() == support.tolist()
    assert all(len(set(other[row == i].tolist()) | {wording[i].item()}) == support[i] + 1 for i in range(4))


def test_the_verdict_falls_with_random_vectors_for_the_encoder_or_without_a_leak():
    ours, flat = {"rank": 0.95, "gain": 0.4, "loss": 0.4}, {"rank": 0.0, "gain": 0.01, "loss": 0.0}
    found, gains, rises = {"paraphrase encoder": ours, "random vectors": flat}, [0.1, 1, 2], [0, 1, 2]
    verdict = lambda f=found, p=0.0005, gains=gains, rises=rises: D.judge(f, p, gains, rises)[0]
    assert verdict() and not verdict(found | {"random vectors": ours})
    assert not verdict(found | {"paraphrase encoder": flat})
    assert not any(verdict(found | {"paraphrase encoder": ours | {k: 0.1}}) for k in ours)
    assert not verdict(p=0.02) and not verdict(gains=[0.9, 1, 2]) and not verdict(rises=[1, 1, 2])
    for wrong in ({"support": (1, 2)}, {"epochs": 0}, {"bandwidth": 0.0}, {"questions": 4}):
        pytest.raises(cli.BadInput, D.Config, **wrong)
