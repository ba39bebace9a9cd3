"""shorts/shallow_alignment.py: the two remedies by hand and against autograd, the KL, who is held, the verdict."""

import copy
import math

import pytest
import torch

from common import cli, cluster
from shorts import shallow_alignment as S


def test_recovery_replies_start_as_answers_and_hide_them_from_the_loss():
    answer, refusal = torch.arange(6).expand(3, -1), torch.arange(10, 16).expand(3, -1)
    reply, use = S.recover(answer, refusal, torch.tensor([0, 2, 5]))
    assert reply.tolist() == [[10, 11, 12, 13, 14, 15], [0, 1, 10, 11, 12, 13], [0, 1, 2, 3, 4, 10]]
    assert use.sum(1).tolist() == [6, 4, 1] and not use[1, :2].any()
    for deep in (False, True):
        _, reply, use = S.align_batch(cluster.generator(0), 5, deep)
        assert (use[16:, 0] == (reply[16:, 0] == ord("I"))).all() and use[16:, 0].all() != deep


def test_constrained_loss_is_cross_entropy_weighted_by_how_far_the_token_has_moved():
    logp, old, beta = torch.tensor([[-1.0, -1.0, -3.0], [-1.0, -4.0, -1.0], [0.5, 2.0, 2.0]]).requires_grad_()
    slope = torch.autograd.grad(S.constrained_loss(logp, old, beta).sum(), logp)[0]
    torch.testing.assert_close(slope, torch.tensor([-1.0, -2 / (1 + math.exp(6)), -2 / (1 + math.exp(-4))]))
    (small,) = torch.autograd.grad(S.constrained_loss(logp, old, beta * 1e-4).sum(), logp)
    torch.testing.assert_close(small, -torch.ones(3), atol=1e-3, rtol=0)


def test_kl_token_by_token_by_hand():
    new, old = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log(), torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    torch.testing.assert_close(S.token_kl(new, old), torch.tensor([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0]))


def test_training_counts_tokens_to_the_full_stop_and_the_constraint_holds_the_first():
    torch.manual_seed(0)
    net, g = S.Net(), cluster.generator(1)
    prompt, digits = S.requests("A", 8, g)
    reply = S.answers(digits, 1)
    before, ends = copy.deepcopy(net.state_dict()), reply.where(torch.arange(S.REPLY) < 11, 0)  # past the full stop
    free = S.train(net, lambda _: (prompt, reply, S.EVERY), g, 8, 3e-3)
    same = S.train(net, lambda _: (prompt, ends, S.EVERY), g, 8, 3e-3)
    held = S.train(net, lambda _: (prompt, reply, S.EVERY), g, 8, 3e-3, beta=torch.tensor(5 * [8.0] + 10 * [0.1]))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    gain = [S.logprobs(n, prompt, reply)[:, 0, reply[0, 0]].mean().item() for n in (net, free, same, held)]
    assert abs(gain[1] - gain[2]) < 1e-4 and gain[3] - gain[0] < 0.7 * (gain[1] - gain[0])


def test_verdict_falls_when_a_control_takes_a_remedy_s_place():
    kl = {"shallow": torch.tensor([3.0] + 9 * [0.01]), "deep": torch.ones(10)}
    table = {"shallow": [1.0, 0.0, *8 * [0.99]], "deep": [0.98, 0.0, *8 * [0.0]]}
    kinds = {"plain": 1.0, "paper's beta": 1.0, "held": 0.5, "held everywhere": 0.2}
    tuned = {(data, kind): [0.0, share] for kind, share in kinds.items() for data in ("benign", "harmful")}
    verdict = lambda k=kl, t=table, u=tuned: S.judge(k, t, u)[0]
    assert verdict() and not verdict(t=table | {"deep": table["shallow"]})
    assert not verdict(k=dict.fromkeys(kl, kl["shallow"])) and not verdict(t=table | {"deep": 10 * [0.0]})
    assert not verdict(u=tuned | {("harmful", "held"): tuned["harmful", "plain"]})
    assert not verdict(u=tuned | {("benign", "held everywhere"): [0.9, 0.0]})
    pytest.raises(cli.BadInput, S.Config, depth=7)
