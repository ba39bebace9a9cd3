"""shorts/grokking.py: flow against autograd, its conserved product, step against the true curvature, the law."""

import pytest
import torch
import torch.nn.functional as F

from common import cli, cluster
from shorts import grokking as G

zx, lam = torch.randn(5, 4, generator=(g := cluster.generator(1))).double(), torch.tensor([0.1, 0.3]).double()
u, v = torch.rand(2, 2, 4, generator=g).double().requires_grad_()


def test_velocity_is_minus_the_gradient_of_net_and_of_kernel_machine():
    u0, v0 = torch.full_like(u, 0.5), torch.full_like(v, 0.7)
    w, at = G.model(u, v, u0, v0, torch.tensor([False, True]))  # one run of each kind
    torch.testing.assert_close(w, torch.stack([u[0] ** 2 - v[0] ** 2, 1.0 * u[1] - 1.4 * v[1]]))
    loss = F.softplus(-w @ zx.T).mean(1) + lam / 2 * ((u**2).sum(1) + (v**2).sum(1))
    torch.testing.assert_close(G.velocity(u, v, G.pull(w, zx), lam, at), torch.autograd.grad(-loss.sum(), (u, v)))


def test_start_has_norm_alpha_and_the_product_decays_as_the_theory_says():
    u, v = G.start(alpha := torch.tensor([2.0, 3.0]).double(), 4)
    torch.testing.assert_close((u**2 + v**2).sum(1).sqrt(), alpha)
    product = u * v
    for _ in range(2_000):  # steps of 5e-4, to time 1
        du, dv = G.velocity(u, v, G.pull(G.predictor(u, v), zx), lam, (u, v))
        u, v = u + 5e-4 * du, v + 5e-4 * dv
    torch.testing.assert_close(u * v, product * torch.exp(-2 * lam)[:, None], rtol=1e-3, atol=0)


def test_step_keeps_to_the_curvature_and_is_exact_for_one_row():
    for rows, least in ((zx, 0.2), (zx[:1], 1 - 1e-9)):
        w, top = G.predictor(u, v), torch.linalg.matrix_norm(rows, 2) ** 2 / len(rows)
        p = torch.sigmoid(w @ rows.T)
        J = torch.cat([2 * u[:, None] * rows, -2 * v[:, None] * rows], 2)  # (C, n, 2d)
        true = torch.linalg.eigvalsh(torch.einsum("cni,cn,cnj->cij", J, p * (1 - p) / len(rows), J))[:, -1]
        share = G.stable_step(w, rows, top, (u, v)) * true
        assert share.max() <= 1 + 1e-9 and share.min() > least


def test_fit_finds_the_constant_and_the_slope():
    a, k = torch.tensor([10.0, 100.0, 1000.0]).double(), torch.tensor([0.1, 0.01]).double()
    scale, ratio, slope = G.fit_scale(a, k, (a / 3).log()[:, None] / k)
    assert [scale, *ratio.flatten().tolist(), *slope.tolist()] == pytest.approx([3, *[1] * 8])
    assert G.fit_scale(a, k, 2 * a.log()[:, None] / k)[2].tolist() == pytest.approx([2, 2])


def test_verdict_holds_and_falls_with_kernel_machines_for_nets_or_a_time_off():
    cfg, two = (G.Config(alpha=(32.0, 128.0), lam=lam) for lam in ((0.01,), (0.01, 0.001)))
    holds = lambda found, cfg=cfg: all(r[-1] for r in G.judge(cfg, found)[0])
    with cluster.world("cpu") as w:
        found = G.experiment(cfg, w)
    assert holds(found), G.judge(cfg, found)
    assert not holds([r | {"t*": 1.3 * r["t*"]} if r["alpha"] == 128 else r for r in found])
    late = [x for r in found for x in ([r, r | {"t*": 10 * r["t*"] - 800}] if r["run"] == "net" else [r])]
    assert not holds(late, two)  # the second lambda has the right slope and another constant
    kernel = {k: r for r in found if r["run"] == "kernel" for k in r if k not in ("run", "alpha", "lambda")}
    assert not holds([r | {k: x[k] for k, x in kernel.items()} if r["run"] == "net" else r for r in found])
    pytest.raises(cli.BadInput, G.Config, alpha=(8.0,))
