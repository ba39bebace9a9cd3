"""speedy_splat.py: projection, tiles, blending, scores against a float64 brute force; kernels, files, training, ranks.

data/speedy_splat holds reference vectors from an independent implementation; its README tells how they were made.
"""

import json
import math
import re
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import finish, kill, run_ranks, run_script, start_ranks

import speedy_splat as S
from common import cluster

DATA = Path(__file__).parent / "data" / "speedy_splat"
KEY = {"vanilla": "vanilla", "snugbox": "snug", "accutile": "accu", "pixel": "pix"}
LONE = cluster.World(0, 1, torch.device("cpu"))
T = torch.from_numpy


def vectors(name):
    return {k: v for k, v in np.load(DATA / f"{name}.npz").items()}


INPUTS = vectors("inputs")


def reference_model(dtype):
    x = {k: T(INPUTS[k]).to(dtype) for k in ("means", "quats", "scales", "opacities", "sh")}
    return S.GaussianModel(
        means=x["means"], sh_dc=x["sh"][:, :1], sh_rest=x["sh"][:, 1:], opacity=x["opacities"].logit()[:, None],
        scale=x["scales"].log(), quat=x["quats"],
    )  # fmt: skip


def reference_camera(i):
    w, h = int(INPUTS["width"]), int(INPUTS["height"])
    return S.Camera(T(INPUTS["viewmats"][i]), float(INPUTS["fx"]), float(INPUTS["fy"]), w / 2, h / 2, w, h)


def random_model(n, degree=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=dtype)
    return S.GaussianModel(
        means=0.6 * r(n, 3), sh_dc=r(n, 1, 3), sh_rest=0.2 * r(n, (degree + 1) ** 2 - 1, 3), opacity=2 * r(n, 1) + 1,
        scale=0.7 * r(n, 3) - 1.8, quat=r(n, 4),
    )  # fmt: skip


def small_camera(width=29, height=21):
    return replace(S.scene_camera(3, 10, height), width=width, cx=13.0)  # off-centre, ragged tiles


def grid_mask(tile_id, gaussian_id, n, tiles):
    mask = torch.zeros(n, tiles, dtype=torch.bool)
    mask[gaussian_id, tile_id] = True
    assert int(mask.sum()) == len(tile_id), "a pair was listed twice"
    return mask


def unpack(bits, n, tiles):
    return T(np.unpackbits(bits, count=n * tiles).reshape(n, tiles).astype(bool))


# ---- the reference vectors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("i", range(3))
def test_projection_images_gradients_and_scores_match_the_brute_force(i, dtype):
    want, model, camera = vectors(f"camera{i}"), reference_model(dtype), reference_camera(i)
    tight = dtype == torch.float64
    ok, background = T(want["ok"]), T(INPUTS["bg"])
    s = S.project(model, camera)
    assert torch.equal(s.visible, ok)
    for mine, name, tol in ((s.mean2d, "mean2d", 1e-3), (s.depth, "depth", 1e-3), (s.color, "color", 1e-4)):
        assert (mine - T(want[name]))[ok].abs().max() < (1e-10 if tight else tol), name
    conic = T(want["conic"])
    assert ((s.conic - conic).abs() / conic.abs().amax(dim=1, keepdim=True))[ok].max() < (1e-10 if tight else 1e-4)
    order = torch.argsort(s.depth.detach(), stable=True)
    assert torch.equal(order[ok[order]], T(want["order"]))
    for mode in ("snugbox", "accutile", "pixel"):
        r = S.render(model, camera, background=background, tiles=mode)
        off = (r.image - T(want["image"])).abs().amax(dim=-1)
        assert off.max() < (1e-6 if tight else 1 / 255) and (off > 2e-4).float().mean() < 0.005  # borderline alphas
        assert (r.final_T - T(want["final_T"])).abs().max() < (1e-6 if tight else 1 / 255)
    (r.image * T(INPUTS["loss_weights"][i]).to(dtype)).sum().backward()
    o, scale = T(INPUTS["opacities"]).to(dtype), T(INPUTS["scales"]).to(dtype)
    got = {
        "means": model.means.grad, "quats": model.quat.grad, "scales": model.scale.grad / scale,
        "opacities": model.opacity.grad[:, 0] / (o * (1 - o)), "mean2d": r.mean2d.grad,
        "sh": torch.cat([model.sh_dc.grad, model.sh_rest.grad], dim=1),
    }  # fmt: skip
    for name, g in got.items():
        reference = T(want[f"grad_{name}"])
        assert (g - reference).abs().max() < (1e-9 if tight else 1e-3) * reference.abs().max(), name
    for channels, name in (("sum", "score_sum_channels"), ("separate", "score_per_channel")):
        score, reference = S.prune_scores(model, [camera], background, channels), T(want[name])
        assert ((score - reference).abs() <= (1e-9 if tight else 1e-3) * reference + 1e-6 * reference.max()).all(), name


@pytest.mark.parametrize("mode", S.TILES)
def test_tile_sets_are_exact_and_miss_no_contributing_pair(mode):
    cases = [(*(T(vectors("tiles2d")[k]) for k in ("mean2d", "conic", "opacity")), vectors("tiles2d"))]
    for i in range(3):
        want = vectors(f"camera{i}")
        mean2d, conic = (T(want[k]).float() for k in ("mean2d", "conic"))
        cases.append((mean2d, torch.where(T(want["ok"])[:, None], conic, math.nan), T(INPUTS["opacities"]), want))
    for mean2d, conic, opacity, want in cases:
        width, height = (int(want.get(k, INPUTS[k])) for k in ("width", "height"))
        n, tiles = len(mean2d), -(-width // 16) * -(-height // 16)
        mine = grid_mask(*S.tile_pairs(mean2d, conic, opacity, width, height, 16, mode), n, tiles)
        reference, brute = (unpack(want[f"tiles_{k}"], n, tiles) for k in (KEY[mode], "brute"))
        assert abs(int(mine.sum()) - int(reference.sum())) <= 0.002 * int(reference.sum())
        if mode != "vanilla":
            assert not (brute & ~mine).any()
        if "count_accu" in want:
            assert ((mine.sum(dim=1) - T(want[f"count_{KEY[mode]}"].astype(np.int64))).abs() <= 1).all()


def test_vanilla_misses_pairs_that_contribute():
    """The square of three standard deviations cuts visible tails: the reason to compare with the brute force."""
    want = vectors("camera0")
    r = S.render(reference_model(torch.float64), reference_camera(0), background=T(INPUTS["bg"]), tiles="vanilla")
    assert (r.image - T(want["image"])).abs().max() > 1e-3


@pytest.mark.parametrize("mode", S.TILES)
@pytest.mark.parametrize("tile,width,height", [(8, 37, 61), (16, 1, 40), (5, 64, 9)])
def test_tiles_on_odd_grids_against_every_pixel(mode, tile, width, height):
    g = torch.Generator().manual_seed(1)
    n = 200
    mean2d = torch.rand(n, 2, generator=g, dtype=torch.float64) * torch.tensor([width * 1.6, height * 1.6]) - 10
    axes = torch.randn(n, 2, 2, generator=g, dtype=torch.float64) * torch.tensor([9.0, 1.5])
    cov = axes @ axes.mT + 0.3 * torch.eye(2, dtype=torch.float64)
    A, B, C = (torch.linalg.inv(cov)[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    opacity = torch.rand(n, generator=g, dtype=torch.float64)
    columns, rows = -(-width // tile), -(-height // tile)
    pairs = S.tile_pairs(mean2d, torch.stack([A, B, C], dim=1), opacity, width, height, tile, mode)
    mine = grid_mask(*pairs, n, columns * rows)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    dx, dy = mean2d[:, 0, None, None] - x, mean2d[:, 1, None, None] - y
    power = -(A[:, None, None] * dx**2 + C[:, None, None] * dy**2) / 2 - B[:, None, None] * dx * dy
    hit = opacity[:, None, None] * power.exp() >= 1 / 255
    tiles = (y // tile * columns + x // tile).expand(n, -1, -1)
    brute = torch.zeros(n, columns * rows).scatter_reduce_(1, tiles.flatten(1), hit.float().flatten(1), "amax").bool()
    if mode != "vanilla":
        assert not (brute & ~mine).any()
    if mode == "pixel":
        box = grid_mask(*S.tile_pairs(mean2d, torch.stack([A, B, C], 1), opacity, width, height, tile), n, len(mine[0]))
        assert not (mine & ~box).any() and int(mine.sum()) < int(box.sum())


def test_scalars_losses_rates_and_the_pruning_rule():
    z = vectors("scalars")
    a, b = T(z["ssim_a"]), T(z["ssim_b"])
    assert float(S.ssim(a, b)) == pytest.approx(float(z["ssim_value"]), abs=1e-5)
    assert float(S.ssim(a.movedim(0, -1), b.movedim(0, -1))) == pytest.approx(float(z["ssim_value"]), abs=1e-5)
    assert float(S.psnr(a, b)) == pytest.approx(float(z["psnr_value"]), abs=1e-4)
    loss = 0.8 * float(z["l1_value"]) + 0.2 * (1 - float(z["ssim_value"]))
    assert float(S.image_loss(a.movedim(0, -1), b.movedim(0, -1))) == pytest.approx(loss, abs=1e-5)
    assert [S.position_lr(int(i)) for i in z["lr_iters"]] == pytest.approx(list(z["lr_values"]))
    for ratio, name in ((0.3, "030"), (0.8, "080")):
        assert torch.equal(S.prune_mask(T(z["prune_scores"]), ratio), T(z[f"prune_keep_{name}"]))
    assert S.prune_mask(T(z["prune_scores"]), 0.0).all()


def test_schedule_is_the_papers_and_scales():
    paper = S.Schedule.of(30_000)
    assert min(paper.densify) == 600 and max(paper.densify) == 14_900 and len(paper.densify) == 144
    assert (paper.reset, paper.soft) == ({3000, 6000, 9000, 12_000}, {6000, 9000, 12_000})
    assert paper.hard == {15_000, 18_000, 21_000, 24_000, 27_000}
    assert 500 in S.Schedule.of(30_000, white=True).reset
    laptop = S.Schedule.of(1500)
    assert (laptop.soft, min(laptop.densify)) == ({300, 450, 600}, 50) and laptop.hard == {750, 900, 1050, 1200, 1350}
    assert not S.Schedule.of(500).reset, "60 steps to recover do not fit"


# ---- blending


def test_blend_gradients_by_gradcheck(monkeypatch):
    monkeypatch.setattr(S, "SLAB", 4)  # several slabs per tile
    model, camera = random_model(14, dtype=torch.float64), small_camera(13, 10)
    s = S.project(model, camera)
    ids, starts = S.bin_pairs(s, camera, 8, "accutile")
    assert int(starts.diff().max()) > 8
    leaves = [x.detach().requires_grad_() for x in (s.mean2d, s.conic, s.opacity, s.color)]

    def layer(mean2d, conic, opacity, color):
        table = S._table(s._replace(mean2d=mean2d, conic=conic, opacity=0.9 * opacity, color=color))
        return S.Blend.apply(table, ids, starts, 8, 2)

    assert torch.autograd.gradcheck(layer, leaves, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("keep", [2**25, 0])
def test_tiles_equal_the_dense_renderer_with_gradients(keep, monkeypatch):
    """With the forward pass's pieces kept or computed again, opaque splats included."""
    monkeypatch.setattr(S, "KEEP", keep)
    monkeypatch.setattr(S, "SLAB", 16)
    model, camera = random_model(150, dtype=torch.float64, degree=3), small_camera()
    model.opacity.data[::3] = 8.0
    weight = torch.randn(21, 29, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    background = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    found = []
    for draw in (
        lambda: S.render_dense(model, camera, background),
        lambda: S.render(model, camera, background=background, tile=8).image,
    ):
        for x in model.raw.values():
            x.grad = None
        image = draw()
        (image * weight).sum().backward()
        found.append((image.detach(), {k: x.grad for k, x in model.raw.items()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_the_dense_reference_fits_in_memory(monkeypatch):
    """In pieces it is the same image, and the demo's comparison stays small where its views are large."""
    model, camera, sizes = random_model(30, dtype=torch.float64), small_camera(), []
    whole, dense = S.render_dense(model, camera), S.render_dense
    monkeypatch.setattr(S, "DENSE", 100)
    torch.testing.assert_close(S.render_dense(model, camera), whole, rtol=0, atol=1e-14)
    monkeypatch.setattr(S, "DENSE", 2**23)
    monkeypatch.setattr(S, "render_dense", lambda m, c, *rest: sizes.append(c.size) or dense(m, c, *rest))
    off = S.exactness(model, S.scene_camera(3, 10, 800), S.SKY, 16)
    assert sizes == [(96, 96)] and off["accutile"] < 1e-12


def test_score_is_the_squared_derivative_by_finite_differences():
    model, camera, background = random_model(6, dtype=torch.float64), small_camera(11, 9), (0.3, 0.2, 0.1)
    model.opacity.data.clamp_(max=1.0)
    s = S.project(model, camera)
    table, (ids, starts) = S._table(s).detach(), S.bin_pairs(s, camera, 16, "accutile")

    def images(log_gain):  # a gain per pixel and splat is dI/dg by one pixel at a time; here all pixels of one splat
        t = table.clone()
        t[:-1, 5] += log_gain
        layer = S.Blend.apply(t, ids, starts, 16, 1)[0]
        return (layer[:, :3] + (1 - layer[:, 3:]) * torch.tensor(background).double()).reshape(16, 16, 3)[:9, :11]

    basis = S._offsets(16, table)
    for channels in S.CHANNELS:
        score = S.prune_scores(model, [camera], background, channels)
        for i in range(6):
            gain = torch.zeros(6, dtype=torch.float64)
            gain[i] = 1e-6
            slope = (images(gain) - images(-gain)) / 2e-6  # dI/dln g = g dI/dg
            row = [x[0, 0] for x in S._from_centre(table, torch.tensor([[i]]), torch.tensor([0]), 16, 1)]
            dx, dy, A, B, C, _ = row
            power = -(A * (dx - basis[:, 1]) ** 2 + C * (dy - basis[:, 2]) ** 2) / 2 - B * (dx - basis[:, 1]) * (
                dy - basis[:, 2]
            )
            g = power.exp().reshape(16, 16)[:9, :11]
            alpha_on = table[i, 5].exp() * g >= 1 / 255
            slope = torch.where(alpha_on[..., None], slope / g[..., None], 0.0)
            want = slope.sum(-1).square().sum() if channels == "sum" else slope.square().sum()
            assert float(score[i]) == pytest.approx(float(want), rel=1e-4, abs=1e-9)


def test_scores_leave_no_gradients_and_more_views_add_up():
    model, cameras = random_model(20), [small_camera(), S.scene_camera(5, 10, 24)]
    both = S.prune_scores(model, cameras)
    torch.testing.assert_close(both, sum(S.prune_scores(model, [c]) for c in cameras))
    assert all(x.grad is None for x in model.raw.values())


def test_prune_slices_adams_state_with_the_parameters():
    model = random_model(10)
    optimizer = torch.optim.Adam([{"params": [x]} for x in model.raw.values()], lr=1e-2)
    S.render(model, small_camera()).image.sum().backward()
    optimizer.step()
    before = {k: optimizer.state[x]["exp_avg"].clone() for k, x in model.raw.items()}
    scores = torch.arange(10.0)
    assert S.prune(model, optimizer, scores, 0.5) == 5 and len(model) == 5  # int(0.5 * 9) = 4: the 5 lowest
    for k, x in model.raw.items():
        assert torch.equal(optimizer.state[x]["exp_avg"], before[k][5:]) and optimizer.state[x]["step"] == 1
    assert {id(g["params"][0]) for g in optimizer.param_groups} == {id(x) for x in model.raw.values()}


def test_densify_clones_splits_drops_and_resets():
    model = random_model(6)
    model.scale.data[:] = torch.tensor([-6.0, -6, 0, 0, -6, 2])[:, None]
    model.opacity.data[:] = torch.tensor([1.0, 1, 1, 1, -9, 1])[:, None]
    optimizer = torch.optim.Adam([{"params": [x]} for x in model.raw.values()])
    S.render(model, small_camera()).image.sum().backward()
    optimizer.step()
    parent = {k: x.detach().clone() for k, x in model.raw.items()}
    noise = lambda n: torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(0))
    gradient = torch.tensor([1e-3, 0, 1e-3, 0, 0, 0])
    assert S.densify(model, optimizer, gradient, 3.0, noise, 100, False) == (1, 1, 1)
    assert len(model) == 6 + 1 + 1 - 1  # a clone, a child more than the parent, one too faint
    assert torch.equal(model.means[-3], parent["means"][0]) and torch.equal(
        model.scale[-1], parent["scale"][2] - math.log(1.6)
    )
    R, s = S.rotation(parent["quat"][2:3])[0], parent["scale"][2].exp()
    torch.testing.assert_close(model.means[-2].detach(), parent["means"][2] + R @ (s * noise(6)[2, 0]))
    assert not optimizer.state[model.means]["exp_avg"][-3:].any() and optimizer.state[model.means]["exp_avg"][:-3].any()
    assert (
        S.densify(model, optimizer, torch.zeros(7), 3.0, noise, 100, True)[2] == 4
    )  # larger than a tenth of the extent
    wide = random_model(8)
    wide.opacity.data[:] = 1
    assert S.densify(wide, None, torch.linspace(0, 1, 8), 3.0, noise, 2, False)[:2] in ((0, 2), (1, 1), (2, 0))
    S.reset_opacity(model, optimizer)
    assert model.opacity.sigmoid().max() <= 0.0100001 and not optimizer.state[model.opacity]["exp_avg"].any()


# ---- edge cases of the error table


def test_empty_views_and_degenerate_gaussians():
    camera, sky = small_camera(), (0.1, 0.2, 0.3)
    flat = torch.tensor(sky).expand(21, 29, 3)
    model = random_model(5)
    model.means.data += 100 * (camera.centre / camera.centre.norm())  # behind the camera
    r = S.render(model, camera, background=sky)
    r.image.sum().backward()
    assert r.pairs == 0 and not r.n_tiles.any() and torch.equal(r.image, flat) and (r.final_T == 1).all()
    assert all(not x.grad.any() for x in model.raw.values())
    assert not S.prune_scores(model, [camera], sky).any()
    none = S.GaussianModel(**{k: x[:0] for k, x in model.raw.items()})
    r = S.render(none, camera, background=sky)
    assert len(none) == 0 and r.pairs == 0 and torch.equal(r.image, flat)
    dot = random_model(1)
    dot.means.data[:] = 0
    dot.scale.data[:] = -200.0  # exp underflows: the dilation makes a dot
    assert S.render(dot, camera).pairs > 0
    assert S.render(random_model(9), small_camera(1, 7)).image.shape == (7, 1, 3)


def test_what_training_can_break_is_culled_and_dropped():
    model, camera = random_model(8), small_camera()
    clean = S.render(S.GaussianModel(**{k: x[2:] for k, x in model.raw.items()}), camera).image
    model.means.data[0, 1], model.quat.data[1] = math.nan, 0.0
    r = S.render(model, camera)
    r.image.sum().backward()
    torch.testing.assert_close(r.image, clean)
    assert not r.n_tiles[:2].any() and all(torch.isfinite(x.grad).all() for x in model.raw.values())
    model.opacity.data[:] = 1
    assert S.densify(model, None, torch.zeros(8), 1.0, lambda n: torch.zeros(n, 2, 3), 0, False)[2] == 2


def test_opacity_at_and_below_the_threshold():
    conic, at = torch.tensor([[0.1, 0.0, 0.1]]), torch.tensor([[20.0, 20.0]])
    pairs = lambda o: len(S.tile_pairs(at, conic, torch.tensor([o]), 64, 64)[0])
    assert pairs(float(np.float32(1 / 255))) == 1 and pairs(0.0039) == 0 and pairs(math.nan) == 0 and pairs(0.9) >= 1
    huge = torch.tensor([[1e-12, 0.0, 1e-12]])
    assert (
        len(S.tile_pairs(at, huge, torch.ones(1), 64, 64)[0]) == 16
    )  # extents are clamped before they become integers


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(S, "MAX_PAIRS", 10)
    with pytest.raises(S.BadInput, match=r"20 Gaussians make \d+ pairs with tiles, over 10; the largest touches \d+"):
        S.render(random_model(20), small_camera(), backend="torch", tile=4)


def test_unknown_choices_and_ratios():
    model, camera = random_model(4), small_camera()
    for what, call in {
        "tiles 'round'": lambda: S.render(model, camera, tiles="round"),
        "tiles 'oval'": lambda: S.tile_pairs(torch.zeros(1, 2), torch.ones(1, 3), torch.ones(1), 8, 8, mode="oval"),
        "backend 'cuda'": lambda: S.render(model, camera, backend="cuda"),
        "channels 'all'": lambda: S.prune_scores(model, [camera], channels="all"),
    }.items():
        with pytest.raises(ValueError, match=f"unknown {what}; choose from"):
            call()
    for ratio in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            S.prune(model, None, torch.rand(4), ratio)
    with pytest.raises(ValueError, match="prune would remove all 4 Gaussians"):
        S.prune(model, None, torch.ones(4), 0.5)
    assert S.prune(model, None, torch.ones(4), 0.0) == 0
    with pytest.raises(ValueError, match="hard-ratio"):
        S.Config(hard_ratio=1.5)


def test_first_gaussians_and_extent():
    one = S.GaussianModel.from_points(torch.zeros(1, 3), torch.full((1, 3), 255, dtype=torch.uint8), extent=2.0)
    assert one.scale.exp().flatten().tolist() == pytest.approx([0.02] * 3) and one.degree == 3
    assert one.opacity.sigmoid().item() == pytest.approx(0.1)
    two = S.GaussianModel.from_points(torch.tensor([[0.0, 0, 0], [3, 4, 0]]), torch.rand(2, 3), 1.0, sh_degree=0)
    assert two.scale.exp().flatten().tolist() == pytest.approx([5.0] * 6)
    with pytest.raises(ValueError, match="--init random"):
        S.GaussianModel.from_points(torch.zeros(0, 3), torch.zeros(0, 3), 1.0)
    lone = S.scene_extent([S.scene_camera(0, 1, 8)])
    assert lone == 1.0, "one camera has no extent, and a rate of 0 would not train"


# ---- files


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_colmap_matches_the_reference(kind):
    want = np.load(DATA / "colmap_expected.npz")
    data = S.load_colmap(DATA / f"colmap_{kind}")
    assert data.names == list(want["names"])
    torch.testing.assert_close(torch.stack([c.viewmat for c in data.cameras]), T(want["viewmats"]), rtol=0, atol=1e-12)
    got = [[c.fx, c.fy, c.cx, c.cy] for c in data.cameras]
    np.testing.assert_allclose(got, want["fx_fy_cx_cy"])
    assert [[c.width, c.height] for c in data.cameras] == want["wh"].tolist()
    np.testing.assert_allclose(data.points, want["points"], rtol=1e-6)
    np.testing.assert_array_equal((data.rgb * 255).round().byte(), want["rgb"])
    assert S.scene_extent(data.cameras) == pytest.approx(float(want["scene_extent_all_images"]))
    near = S.knn_mean_sq_dist(T(want["points"]))
    np.testing.assert_allclose(near, want["knn_mean_sq_dist"])
    with pytest.raises(FileNotFoundError, match="pictures are not"):
        data.images[0]


def test_every_truncation_of_the_binary_files_is_named(tmp_path):
    for name in ("cameras.bin", "images.bin", "points3D.bin"):
        whole = (DATA / "colmap_bin" / name).read_bytes()
        for other in ("cameras.bin", "images.bin", "points3D.bin"):
            (tmp_path / other).write_bytes((DATA / "colmap_bin" / other).read_bytes())
        for size in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match=rf"{re.escape(name)}: (header|\w+ record \d+), byte \d+: .*truncated"):
                S.load_colmap(tmp_path)
    whole, path = (DATA / "gaussians.ply").read_bytes(), tmp_path / "short.ply"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"short.ply: (header|vertex record \d+ of 5), byte \d+: .*truncated"):
            S.GaussianModel.from_ply(path)


def colmap(folder, cameras=None, images=None, points=None):
    folder.mkdir(exist_ok=True)
    for name, new in (("cameras", cameras), ("images", images), ("points3D", points)):
        text = new if new is not None else (DATA / "colmap_txt" / f"{name}.txt").read_text()
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_colmap_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cameras.bin"):
        S.load_colmap(tmp_path)
    for model in ("OPENCV 8 8 1 1 1 1 0 0 0 0", "WEIRD 8 8 1"):
        with pytest.raises(ValueError, match="image_undistorter"):
            S.load_colmap(colmap(tmp_path / "a", cameras=f"1 {model}\n"))
    with pytest.raises(ValueError, match="names camera 1, which"):
        S.load_colmap(colmap(tmp_path / "b", cameras="9 PINHOLE 8 8 1 1 4 4\n"))
    with pytest.raises(S.BadInput, match="no cameras"):
        S.load_colmap(colmap(tmp_path / "g", images="# none\n"))
    with pytest.raises(ValueError, match="no points.*--init random"):
        S.load_colmap(colmap(tmp_path / "c", points="# none\n"))
    assert len(S.load_colmap(tmp_path / "c", init="random", count=7).points) == 7
    with pytest.raises(ValueError, match=r"images.txt: line 1, byte 0: .*truncated"):
        S.load_colmap(colmap(tmp_path / "d", images="1 0 0 0\n\n"))
    with pytest.raises(ValueError, match=r"points3D.txt: line 2, byte 2"):
        S.load_colmap(colmap(tmp_path / "e", points="#\n1 0 0\n"))
    (tmp_path / "e" / "points3D.txt").unlink()
    with pytest.raises(FileNotFoundError, match="points3D.txt is missing"):
        S.load_colmap(tmp_path / "e")
    folder = tmp_path / "f"  # the binary reader: a distorted camera
    folder.mkdir()
    for name in ("images.bin", "points3D.bin"):
        (folder / name).write_bytes((DATA / "colmap_bin" / name).read_bytes())
    (folder / "cameras.bin").write_bytes(struct.pack("<QiiQQ8d", 1, 1, 4, 8, 8, *range(8)))
    with pytest.raises(ValueError, match="OPENCV has distortion. Run colmap image_undistorter"):
        S.load_colmap(folder)


def test_ply_matches_the_reference_and_survives_a_round_trip(tmp_path):
    want, model = np.load(DATA / "ply_expected.npz"), S.GaussianModel.from_ply(DATA / "gaussians.ply")
    sh = torch.cat([model.sh_dc, model.sh_rest], dim=1).detach()
    for got, name in ((model.means, "means"), (sh, "sh"), (model.scale, "log_scales"), (model.quat, "quats_wxyz")):
        assert torch.equal(got.detach(), T(want[name])), name
    assert torch.equal(model.opacity.detach()[:, 0], T(want["opacity_logit"]))
    model.save_ply(tmp_path / "again.ply")
    assert (tmp_path / "again.ply").read_bytes() == (DATA / "gaussians.ply").read_bytes()
    small = random_model(5, degree=1)
    small.save_ply(tmp_path / "small.ply")
    back = S.GaussianModel.from_ply(tmp_path / "small.ply")
    assert back.degree == 3 and torch.equal(back.sh_rest[:, :3], small.sh_rest) and not back.sh_rest[:, 3:].any()
    torch.testing.assert_close(S.render(back, small_camera()).image, S.render(small, small_camera()).image)


def test_ply_faults(tmp_path):
    whole, path = (DATA / "gaussians.ply").read_bytes(), tmp_path / "bad.ply"
    head, body = whole.split(b"end_header\n", 1)

    def says(match, data):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=match):
            S.GaussianModel.from_ply(path)

    says("format ascii", whole.replace(b"binary_little_endian", b"ascii"))
    says("format binary_big_endian", whole.replace(b"binary_little_endian", b"binary_big_endian"))
    says("property opacity is missing", whole.replace(b"float opacity", b"float opacite"))
    says(
        "43 properties f_rest",
        whole.replace(b"float f_rest_44", b"float other").replace(b"float f_rest_43", b"float o"),
    )
    says("type list", head + b"property list uchar int vertex_indices\nend_header\n" + body)
    start = b"ply\nformat binary_little_endian 1.0\n"
    says("format missing", b"ply\nformat\nend_header\n")
    for lines in (b"", b"element vertex\n", b"element vertex many\n", b"element face 3\nelement vertex 1\n"):
        says("no element vertex", start + lines + b"end_header\n")
    for lines in (b"property float\n", b"property\n", b"property float128 x\n"):
        says("header: property", start + b"element vertex 1\n" + lines + b"end_header\n")
    numbers = np.frombuffer(body, "<f4").reshape(5, 62).copy()
    for column, row, value, match in (
        (slice(0, 1), 3, math.nan, "means of Gaussian 3 is not finite"),
        (slice(54, 55), 2, math.inf, "opacity of Gaussian 2 is not finite"),
        (slice(58, 62), 4, 0, "quat of Gaussian 4 has length 0"),
    ):
        bad = numbers.copy()
        bad[row, column] = value
        says(match, head + b"end_header\n" + bad.tobytes())
    data = np.zeros(2, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")])
    data["red"], data["x"] = 255, [1, 2]
    kinds = "".join(f"property {'float' if k in 'xyz' else 'uchar'} {k}\n" for k in data.dtype.names)
    path.write_bytes(
        f"ply\nformat binary_little_endian 1.0\nelement vertex 2\n{kinds}end_header\n".encode() + data.tobytes()
    )
    points, rgb = S.points_from_ply(path)
    assert points[:, 0].tolist() == [1, 2] and rgb.tolist() == [[1, 0, 0]] * 2


@pytest.fixture(scope="module")
def scene():
    return S.procedural_scene(views=12, size=32, points=300)


def write_colmap(scene, root):
    """The scene as a user would bring it: binary COLMAP files and pictures."""
    sparse = root / "sparse" / "0"
    sparse.mkdir(parents=True)
    c = scene.cameras[0]
    (sparse / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 1, 1, c.width, c.height, c.fx, c.fy, c.cx, c.cy))
    out = struct.pack("<Q", len(scene.cameras))
    for i, (c, name, image) in enumerate(zip(scene.cameras, scene.names, scene.images, strict=True)):
        q = quaternion(c.viewmat[:3, :3].double().numpy())
        out += struct.pack("<i7di", i, *q, *c.viewmat[:3, 3].tolist(), 1) + name.encode() + b"\0" + struct.pack("<Q", 1)
        out += struct.pack("<ddq", 1.0, 2.0, -1)
        S.write_png(root / "images" / name, image)
    (sparse / "images.bin").write_bytes(out)
    rows = zip(scene.points.tolist(), (scene.rgb * 255).round().int().tolist(), strict=True)
    out = b"".join(struct.pack("<Q3d3BdQii", i, *p, *rgb, 0.5, 1, 0, 0) for i, (p, rgb) in enumerate(rows))
    (sparse / "points3D.bin").write_bytes(struct.pack("<Q", len(scene.points)) + out)
    return root


def quaternion(R):
    w = math.sqrt(max(1e-12, 1 + R[0, 0] + R[1, 1] + R[2, 2])) / 2
    if w > 1e-3:
        return w, (R[2, 1] - R[1, 2]) / (4 * w), (R[0, 2] - R[2, 0]) / (4 * w), (R[1, 0] - R[0, 1]) / (4 * w)
    values, axes = np.linalg.eigh((R + R.T) / 2)  # half a turn
    return 0.0, *axes[:, -1]


def write_blender(scene, root, alpha=True):
    """The scene as NeRF-synthetic transforms; with `alpha`, pictures whose background is see-through."""
    from PIL import Image

    for part in ("train", "test"):
        frames = []
        for i in scene.test if part == "test" else scene.train:
            pose = torch.linalg.inv(scene.cameras[i].viewmat.double())
            pose[:3, 1:3] *= -1
            frames.append({"file_path": f"./{part}/r_{i}", "transform_matrix": pose.tolist()})
            pixels = (scene.images[i] * 255).round().byte().numpy()
            sky = (scene.images[i] - torch.tensor(S.SKY)).abs().amax(dim=-1, keepdim=True) < 1e-3
            rgba = np.concatenate([pixels, np.where(sky.numpy(), 0, 255).astype(np.uint8)], axis=2)
            (root / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rgba if alpha else pixels).save(root / part / f"r_{i}.png")
        angle = 2 * math.atan(0.5 / 1.15)
        (root / f"transforms_{part}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    return root


def test_folders_written_from_the_scene_are_read_back(scene, tmp_path):
    pytest.importorskip("PIL")
    a, b = S.load_colmap(write_colmap(scene, tmp_path / "c")), S.load_blender(write_blender(scene, tmp_path / "b"))
    assert a.test == [0, 8] and len(b.test) == 2 and len(b.train) == 10 and b.background == (1.0, 1.0, 1.0)
    order = scene.train + scene.test
    for data, views in ((a, range(12)), (b, order)):
        for i, v in enumerate(views):
            torch.testing.assert_close(data.cameras[i].viewmat.float(), scene.cameras[v].viewmat, rtol=0, atol=1e-5)
            assert (data.cameras[i].fx, data.cameras[i].cx) == pytest.approx((scene.cameras[v].fx, 16.0))
    torch.testing.assert_close(a.images[3], scene.images[3], rtol=0, atol=0.51 / 255)
    sky = (scene.images[scene.train[0]] - torch.tensor(S.SKY)).abs().amax(dim=-1) < 1e-3
    assert sky.any() and (b.images[0][sky] == 1).all()
    torch.testing.assert_close(b.images[0][~sky], scene.images[scene.train[0]][~sky], rtol=0, atol=0.51 / 255)
    assert a.extent == pytest.approx(scene.extent, rel=1e-5)
    assert len(b.points) == 100_000 and b.points.abs().max() <= 1.3


def test_random_points_follow_init_and_seed_and_colours_their_background(scene, tmp_path):
    pytest.importorskip("PIL")
    folders = [str(write_colmap(scene, tmp_path / "c")), str(write_blender(scene, tmp_path / "b")), "scene"]
    for data in folders:
        read = lambda seed, data=data: S.load(short(tmp_path, data=data, init="random", points=9, seed=seed), LONE)
        a, b, again = read(0), read(1), read(0)
        assert len(a.points) == 9 and torch.equal(a.points, again.points) and not torch.equal(a.points, b.points)
        assert (a.rgb - 0.5).abs().max() <= 0.05
    for reader, folder in ((S.load_colmap, folders[0]), (S.load_blender, folders[1])):
        assert reader(folder, (0.2, 0.4, 0.6)).background == (0.2, 0.4, 0.6)


def test_pictures_of_other_sizes_and_faults(scene, tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    root = write_colmap(scene, tmp_path / "c")
    Image.fromarray(np.zeros((16, 8, 3), np.uint8)).save(root / "images" / scene.names[0])
    c = S.load_colmap(root).cameras[0]
    assert (c.width, c.height, c.cx, c.cy) == (8, 16, 4, 8) and c.fx == pytest.approx(scene.cameras[0].fx / 4)
    monkeypatch.setattr(S, "WIDEST", 4)
    data = S.load_colmap(root)
    assert data.images[0].shape == (8, 4, 3) and data.images[1].shape == (4, 4, 3)  # each camera has its own size
    file = tmp_path / "x.png"
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(file)
    with pytest.raises(ValueError, match="x.png.*more than 8 bits"):
        S.read_image(file, (4, 4))
    Image.fromarray(np.full((4, 4), 51, np.uint8)).save(file)  # grey becomes RGB
    assert (S.read_image(file, (4, 4)) == 51).all()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="x.png"):
        S.read_image(file, (4, 4))
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="Pillow.*pip install"):
        S.read_image(root / "images" / scene.names[0], (8, 16))


def test_blender_faults(scene, tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(FileNotFoundError, match="transforms_train.json is missing"):
        S.load_blender(tmp_path)
    root = write_blender(scene, tmp_path / "b")
    path = root / "transforms_train.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({"frames": meta["frames"]}))
    with pytest.raises(ValueError, match="transforms_train.json: frame 0: neither camera_angle_x nor fl_x"):
        S.load_blender(root)
    path.write_text(json.dumps({"fl_x": 36.8, "w": 32, "h": 32, "cx": 15.0, "frames": meta["frames"]}))
    c = S.load_blender(root).cameras[0]
    assert (c.fx, c.fy, c.cx, c.cy) == (36.8, 36.8, 15.0, 16.0)
    (root / "train" / "r_2.png").unlink()
    with pytest.raises(ValueError, match=r"transforms_train.json: frame 1: no picture .*r_2.png"):
        S.load_blender(root)
    path.write_text(json.dumps({"fl_x": 1.0, "frames": [{"file_path": "a", "transform_matrix": [[1, 2], [3]]}]}))
    with pytest.raises(ValueError, match="transforms_train.json: frame 0: needs file_path and a 4 x 4"):
        S.load_blender(root)
    for text in ("[]", '{"frames": 3}'):
        path.write_text(text)
        with pytest.raises(S.BadInput, match="transforms_train.json: needs an object with a list of frames"):
            S.load_blender(root)
    path.write_text('{"frames": [null]}')
    with pytest.raises(S.BadInput, match="transforms_train.json: frame 0: needs file_path"):
        S.load_blender(root)
    path.write_text(json.dumps(meta)[:20])
    with pytest.raises(ValueError, match="transforms_train.json: record 1, byte .*not JSON"):
        S.load_blender(root)


def test_npz_points_and_a_truncated_one(tmp_path):
    path = tmp_path / "scene.npz"
    K = np.array([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]])
    np.savez(path, means3d=np.random.default_rng(0).normal(size=(50, 3)), colors=np.full((50, 3), 128, np.uint8),
             viewmats=np.eye(4, dtype=np.float32)[None], Ks=K[None], width=16, height=12)  # fmt: skip
    points, rgb, cameras = S.load_npz(path)
    assert points.shape == (50, 3) and rgb[0, 0] == pytest.approx(128 / 255) and cameras[0].cy == 6
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="scene.npz"):
        S.load_npz(path)


# ---- training


def short(tmp_path, **changed):
    settings = {"views": 10, "size": 24, "points": 200, "steps": 120, "max_gaussians": 400, "out": str(tmp_path)}
    return S.Config(**settings | changed)


def test_training_improves_prunes_and_exports(scene, tmp_path):
    cfg = short(tmp_path, steps=200, eval_every=50, soft_ratio=0.3, hard_ratio=0.1)
    first = S.GaussianModel.from_points(scene.points, scene.rgb, scene.extent, 1)
    before = S.evaluate(first, scene, cfg.look(S.SKY), LONE, sh_degree=1)
    model = S.train(scene, cfg)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]
    assert rows[-1]["psnr"] > before["psnr"] + 4 and rows[-1]["gaussians"] == len(model) < 300
    assert {"step", "gaussians", "psnr", *(f"pairs_{m}" for m in S.TILES)} <= set(rows[-1])
    order = [rows[-1][f"pairs_{m}"] for m in S.TILES]
    assert order == sorted(order, reverse=True) and order[0] > order[2]
    assert len(S.GaussianModel.from_ply(tmp_path / "model.ply")) == len(model)


def test_every_event_has_its_row(scene, tmp_path):
    """Also where the milestones fall between the evaluations of --eval-every."""
    S.train(scene, short(tmp_path, steps=61, eval_every=50, soft_ratio=0.3, hard_ratio=0.1))
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]
    events = {r["step"]: r["events"].split(" prune")[0] for r in rows if "prune" in r["events"]}
    assert events == {12: "soft", 18: "soft", 24: "soft", 30: "hard", 37: "hard", 43: "hard", 49: "hard", 55: "hard"}


def test_no_training_views(scene, tmp_path):
    none = replace(scene, test=list(range(12)))
    with pytest.raises(ValueError, match="no training views"):
        S.Trainer(none, short(tmp_path), LONE)
    with pytest.raises(ValueError, match="does not divide over 2"):
        S.Trainer(scene, short(tmp_path, views_per_step=3), cluster.World(0, 2, torch.device("cpu")))


def test_modes_on_folders_by_command_line(scene, tmp_path):
    """train on a COLMAP and on a NeRF-synthetic folder, then render, eval and bench what came out."""
    pytest.importorskip("PIL")
    folders = [write_colmap(scene, tmp_path / "c"), write_blender(scene, tmp_path / "b")]
    for folder in folders:
        out = str(tmp_path / f"out_{folder.name}")
        common = {"data": str(folder), "out": out, "points": 300, "steps": 80, "max_gaussians": 300, "device": "cpu"}
        common |= {"soft_ratio": 0.2, "hard_ratio": 0.1}
        S.main(S.Config(mode="train", **common))
        common["model"] = f"{out}/model.ply"
        S.main(S.Config(mode="render", **common, frames=3, size=24))
        images = [S.read_image(Path(out) / "frames" / f"{i:04d}.png", (24, 24)) for i in range(3)]
        assert all(im.std() > 10 for im in images) and (images[0] != images[1]).any()
        S.main(S.Config(mode="eval", **common))
        found = json.loads((Path(out) / "eval.json").read_text())
        empty = S.psnr(torch.zeros(3) if folder.name == "c" else torch.ones(3), torch.stack(list(scene.images)))
        assert found["psnr"] > empty + 3 and found["pairs_vanilla"] > found["pairs_pixel"] > 0
    S.main(S.Config(mode="render", **common, view=2))
    assert S.read_image(Path(out) / "frames" / "0002.png", (32, 32)).std() > 10
    argv = ["--data", str(folders[0]), "--model", common["model"], "--out", out]
    done = run_script("speedy_splat.py", "render", *argv, "--view", "99")
    assert done.returncode == 2 and "cameras 0 to 11" in done.stderr and "Traceback" not in done.stderr


def test_bench_on_an_npz(tmp_path, capsys):
    path = tmp_path / "scene.npz"
    c = S.scene_camera(2, 10, 40)
    K = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]])
    np.savez(path, means3d=np.random.default_rng(0).normal(size=(300, 3)) * 0.4, colors=np.full((300, 3), 99, np.uint8),
             viewmats=c.viewmat.numpy()[None], Ks=K[None], width=40, height=40)  # fmt: skip
    S.bench(S.Config(mode="bench", data=str(path), out=str(tmp_path)), LONE)
    rows = json.loads((tmp_path / "bench.json").read_text())["modes"]
    assert [r["mode"] for r in rows] == list(S.TILES)
    pairs = [r["pairs"] for r in rows]
    assert pairs[0] > pairs[1] > pairs[2] > pairs[3] and "accutile" in capsys.readouterr().out
    with pytest.raises(ValueError, match="bench measures the ray-traced scene or an .npz, not --data"):
        S.bench(S.Config(mode="bench", data=str(tmp_path), out=str(tmp_path)), LONE)


def test_the_headers_command_shortened(tmp_path):
    """The last line names the share of pairs and holds; every row's numbers come from its own mode and run."""
    out = ["--out", str(tmp_path)]
    done = run_script(
        "speedy_splat.py", *"--views 16 --size 40 --steps 100 --points 500 --max-gaussians 800".split(), *out
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"AccuTile needs 0\.[67]\d of vanilla's pairs, image equal to the dense one", last), last
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert set(claim) == {"claim", "paper", "here", "holds", "setting", "seconds"}
    n, kept = map(int, re.search(r"(\d+) -> (\d+) Gaussians", last).groups())
    assert kept * 2.9 < n
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]
    events = [r["events"] for r in rows if r.get("run") == "Speedy-Splat"]
    assert sum("soft prune" in e for e in events) == 3 and sum("hard prune" in e for e in events) == 5
    assert not any("prune" in r["events"] for r in rows if r.get("run") == "3D-GS")


# ---- ranks


def _two_views(rank, size, out):
    """Steps with two views: gradients, growth, pruning, and the sharded rendering with its gradients."""
    w = cluster.World(rank, size, torch.device("cpu"))
    scene = S.procedural_scene(views=8, size=16, points=120)
    cfg = S.Config(steps=200, views_per_step=2, max_gaussians=200, size=16, views=8, points=120, out=out, sh_every=20)
    trainer = S.Trainer(scene, cfg, w)
    counts = []
    for _ in range(64):  # past growth at 25 and 50, soft pruning at 40 and 60
        trainer.advance()
        counts.append(len(trainer.model))
        trainer.check_replicas()
    assert len(set(counts)) > 3
    torch.save(
        {"counts": counts, "raw": {k: x.detach() for k, x in trainer.model.raw.items()}}, f"{out}/{size}_{rank}.pt"
    )
    if size == 1:
        return
    cameras, whole = [scene.cameras[i] for i in (1, 2)], random_model(30, dtype=torch.float64)
    weight = torch.randn(2, 16, 16, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = S.GaussianModel(**{k: x.tensor_split(2)[rank] for k, x in whole.raw.items()})
    look = {"background": S.SKY, "tiles": "accutile", "tile": 8, "backend": "torch"}
    r, seen = S.render_sharded(mine, cameras, w, **look)
    (r.image * weight[rank]).sum().backward()
    full = [S.render(whole, c, **look) for c in cameras]
    sum((f.image * x).sum() for f, x in zip(full, weight, strict=True)).backward()
    torch.testing.assert_close(r.image, full[rank].image, rtol=0, atol=1e-12)
    for k, x in mine.raw.items():
        torch.testing.assert_close(x.grad, whole.raw[k].grad.tensor_split(2)[rank], rtol=1e-9, atol=1e-12)
    for (_, n_tiles), f in zip(seen, full, strict=True):
        assert torch.equal(n_tiles, f.n_tiles.tensor_split(2)[rank])
    sharded = S.Trainer(scene, replace(cfg, parallel="gaussians"), w)
    for _ in range(64):
        sharded.advance()
    assert sharded.count() == sum(int(n) for n in S.gather_rows(torch.tensor([len(sharded.model)]), w)[0])
    assert sharded.evaluate()["psnr"] > 15
    whole, mine = cluster.total(sharded.grown), sharded.grown  # of the job, not of this rank
    assert torch.equal(whole, 2 * mine) and int(mine.sum()) > 0
    state = sharded.state()
    again = S.Trainer(scene, replace(cfg, parallel="gaussians"), w, state)
    assert again.count() == sharded.count() == len(state["model"]["means"]) and again.step == 64
    again.advance()


def test_two_ranks_equal_one_process_and_gaussians_can_be_sharded(tmp_path):
    with cluster.world("cpu"):
        _two_views(0, 1, str(tmp_path))
    run_ranks(_two_views, 2, tmp_path, str(tmp_path))
    one, *two = (torch.load(tmp_path / f"{n}_{r}.pt") for n, r in ((1, 0), (2, 0), (2, 1)))
    for run in two:
        assert run["counts"] == one["counts"]
        for k, x in run["raw"].items():
            torch.testing.assert_close(x, one["raw"][k], rtol=1e-4, atol=1e-5)


def _metrics(folder):
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in rows]


@pytest.mark.drill
def test_kill_both_ranks_and_resume(tmp_path):
    """kill -9 in mid-run, then --resume: the metrics of a run that was never stopped, exactly."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["train", "--device", "cpu", "--size", "16", "--views", "8", "--points", "100", "--steps", "90",
            "--views-per-step", "2", "--max-gaussians", "160", "--save-every", "20", "--eval-every", "10"]  # fmt: skip
    finish(start_ranks(2, "speedy_splat.py", *argv, "--out", str(whole)))
    ranks = start_ranks(2, "speedy_splat.py", *argv, "--out", str(killed))
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(ranks)
    assert cluster.load(killed / "checkpoint.pt")["step"] < 90, "the run ended before it was killed"
    out = finish(start_ranks(2, "speedy_splat.py", *argv, "--resume", "--out", str(killed)))
    assert "model.ply" in out[0], out
    assert _metrics(killed) == _metrics(whole)
    assert (killed / "model.ply").read_bytes() == (whole / "model.ply").read_bytes()
    setting = {"size": 16, "views": 8, "points": 100, "steps": 90, "views_per_step": 2, "max_gaussians": 160}
    with pytest.raises(ValueError, match="trained with --soft-ratio 0.6, this run asks for --soft-ratio 0.3"):
        S.train(None, S.Config(**setting, out=str(killed), resume=True, soft_ratio=0.3, device="cpu"))


@pytest.mark.drill
def test_demo_quick(tmp_path):
    """The header's quick command and its Expect line: both runs, the table, the claim, the pictures."""
    done = run_script("speedy_splat.py", "--quick", "--device", "cpu", "--out", str(tmp_path), timeout=400)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.search(r"AccuTile needs 0\.7\d of vanilla's pairs, image equal to the dense one", last), last
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert claim["holds"] is True and last.endswith("holds") and not last.endswith("NOT HOLD")
    before, after = (int(n) for n in re.search(r"(\d+) -> (\d+) Gaussians", claim["here"]).groups())
    assert before >= 3 * after > 0
    assert all((tmp_path / f).exists() for f in ("speedy_splat.png", "tiles.png")) or "pip install" in done.stdout
