"""shorts/refusal_tokens.py: the choice of a token by hand, the data, the rows, the summed chance, the verdict."""

import itertools

import pytest
import torch

from common import cli, cluster
from shorts import refusal_tokens as R


def probabilities(**named):
    p, ids = torch.zeros(1, 128), {"respond": R.RESPOND, "r0": R.REFUSE, "r1": R.REFUSE + 1, "other": 65}
    for token, value in named.items():
        p[0, ids[token]] = value
    return p


def test_choices_by_hand():
    p = torch.cat([probabilities(respond=1 - v, r0=v) for v in (0.1, 0.3, 0.5)])
    assert R.choose(p, 0.3).tolist() == [R.RESPOND, R.REFUSE, R.REFUSE]
    assert R.choose(p, 0.0).tolist() == [R.REFUSE] * 3 and R.choose(p, 0.51).tolist() == [R.RESPOND] * 3
    p = torch.cat([probabilities(respond=0.7, r0=0.2, r1=0.1),  # steered
                   probabilities(respond=0.4, r0=0.2, r1=0.4),  # of another category: the model's own choice
                   probabilities(respond=0.3, r0=0.1, r1=0.6), probabilities(respond=0.2, r0=0.8)])  # fmt: skip
    assert R.choose_category(p, 0, 0.15).tolist() == [R.REFUSE, R.RESPOND, R.REFUSE + 1, R.REFUSE]
    assert R.choose_category(p, 0, 0.9).tolist() == [R.RESPOND, R.RESPOND, R.REFUSE + 1, R.RESPOND]
    assert R.choose_category(p, 1, 0.5).tolist() == [R.RESPOND, R.RESPOND, R.REFUSE + 1, R.REFUSE]


def test_f1_by_hand():
    refused, truth = torch.tensor([1, 1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    assert R.f1(refused, truth) == pytest.approx(4 / 7)  # precision 1/2, recall 2/3


def test_rows_place_the_token_and_openers_tell_nothing():
    data = R.prompts(3000, cluster.generator(1))
    plain, single, category, classifier = (R.rows(data, k) for k in ("plain", "single", "category", "classifier"))
    assert (single[:, R.PROMPT] == torch.where(data["refused"], R.REFUSE, R.RESPOND)).all()
    assert (single[:, : R.PROMPT] == data["prompt"]).all() and (single[:, R.PROMPT + 1 :] == data["reply"]).all()
    assert (classifier == single[:, : R.PROMPT + 1]).all() and (plain == single[:, [0, 1, 2, 3, 5, 6, 7]]).all()
    assert (category[:, R.PROMPT] == torch.where(data["refused"], R.REFUSE + data["category"], R.RESPOND)).all()
    rate = [data["refused"][data["reply"][:, 0] == ord(c)].float().mean() for c in R.OPENERS]
    texts = ["".join(map(chr, reply)) for reply in data["reply"].tolist()]
    assert max(rate) - min(rate) < 0.1 and (R.refusal(texts) == data["refused"]).all()
    assert 0.25 < (data["truth"] & ~data["refused"]).sum() / data["truth"].sum() < 0.45


def test_summed_chance_is_that_of_all_refusals_and_the_verdict_falls_with_the_threshold_left_alone():
    torch.manual_seed(0)
    net, prompt, want = R.Net(8), torch.tensor([[116, 97, 54, 49]]), 0.0
    for text in itertools.product("INS", "n", "o"):
        ids = torch.cat([prompt, torch.tensor([list("".join(text).encode())])], dim=1)
        p = net(ids)[0].softmax(dim=-1)
        want += torch.stack([p[3 + i, ids[0, 4 + i]] for i in range(3)]).prod().item()
    assert R.spelled_out(net, prompt).item() == pytest.approx(want, rel=1e-4)
    good = {"before": 0.85, "after": 0.92, "follows": 1.0, "own": 0.2, "others": 0.0}
    assert R.judge(good) and not R.judge(good | {"after": good["before"]})  # the control: no token, no threshold
    assert not any(R.judge(good | change) for change in ({"follows": 0.9}, {"own": 0.05}, {"others": 0.1}))
    pytest.raises(cli.BadInput, R.Config, width=6)
