"""shorts/reconstruction.py: the gradient, the training, what can and cannot be found, the best start, the verdict."""

import pytest
import torch

from common import cli
from shorts import reconstruction as R


def small(n, pixels=4):
    return torch.rand(n, pixels, generator=torch.manual_seed(0), dtype=torch.float64), torch.arange(n) % 3


def test_the_gradient_written_out_and_where_training_ends():
    x, y = small(5)
    theta = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (want,) = torch.autograd.grad(R.training_loss(theta, x, y, 0.1), theta)
    torch.testing.assert_close(R.training_gradient(theta.detach(), x, y, 0.1), want)
    one = R.training_gradient(torch.zeros(2, 2), torch.tensor([[3.0]]), torch.tensor([1]), 0.0)
    assert one.tolist() == [[1.5, 0.5], [-1.5, -0.5]]  # (1/2 - onehot) times (x, 1)
    other = theta.detach()
    for _ in range(300):
        other = other - 0.5 * R.training_gradient(other, x, y, 0.1)
    torch.testing.assert_close(R.train(x, y, 3, 0.1), other, atol=1e-4, rtol=0)  # one solution from any start


def test_fewer_images_than_classes_are_found_more_are_not_and_the_best_start_counts(monkeypatch):
    for n, found in ((2, True), (6, False)):
        x, y = small(n)
        theta = R.train(x, y, 3, 0.01)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        guess = R.reconstruct(theta, y, 0.01, noise[None], 600 if found else 100)
        assert (R.train(guess, y, 3, 0.01) - theta).norm() < 2e-2 * theta.norm()  # the same weights either way
        assert ((guess - x).norm(dim=1).max() < 0.1) == found
    monkeypatch.setattr(R, "minimise", lambda objective, start, steps: start)
    assert all(torch.equal(R.reconstruct(theta, y, 0.01, torch.stack(s), 1), x) for s in ([noise, x], [x, noise]))


def test_more_images_than_classes_can_be_moved_without_a_trace():
    x, y = small(6, pixels=8)
    theta = R.train(x, y, 3, 0.1)
    residual = R.affine(theta, x).softmax(-1) - torch.nn.functional.one_hot(y, 3)  # (6, 3), rank 2
    cancels = torch.linalg.svd(residual.T, full_matrices=True).Vh[2:]  # (4, 6): residual.T @ cancels.T = 0
    unseen = torch.linalg.svd(theta[:, :-1], full_matrices=True).Vh[2:]  # (6, 8): no logit changes along these
    moved = x + cancels.T @ torch.ones(4, 6, dtype=x.dtype) @ unseen
    assert (moved - x).norm(dim=1).min() > 0.1 and R.training_gradient(theta, moved, y, 0.1).abs().max() < 1e-6


def test_verdict_holds_and_falls_with_another_net_or_without_the_search(monkeypatch):
    a, b = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert R.nearest(a, b).tolist() == [1.0, 4.0, 1.0]
    cfg = R.Config(classes=3, images=(2, 6), side=4, starts=1, steps=60)
    few, many = (R.experiment(cfg, n)[0] for n in (2, 6))
    assert R.judge(few, many)[0]
    for name, change in (("noise", {"recovered": 0.0}), ("noise, other net", {"recovered": 0.5})):
        assert not R.judge(few | {name: few[name] | change}, many)[0]
    assert not any(R.judge(few, many | {"noise": n})[0] for n in (few["noise"], many["noise"] | {"weights off by": 1}))
    monkeypatch.setattr(R, "reconstruct", lambda theta, y, decay, starts, steps: starts[0])
    assert not R.judge(R.experiment(cfg, 2)[0], many)[0]
    pytest.raises(cli.BadInput, R.Config, images=(5, 40))
