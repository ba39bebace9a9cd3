"""Speedy-Splat: Gaussian splatting with exact tiles and pruning, readable, on a CPU or a GPU and without a compiler.

Paper    Hanson, Tu, Lin, Singla, Zwicker, Goldstein, "Speedy-Splat: Fast 3D Gaussian Splatting with Sparse Pixels and
         Sparse Primitives", CVPR 2025, arXiv:2412.00578v3, on Kerbl et al., "3D Gaussian Splatting", arXiv:2308.04079.
Idea     A frame costs Gaussians x pixels per Gaussian, and both are wasteful. 3D-GS lists a Gaussian in every tile of a
         square around it; a pixel is blended only inside an ellipse that shrinks with the opacity. SnugBox is the tight
         box of that ellipse, AccuTile the exact tiles it touches: same image, fewer pairs. A score, the squared
         derivative of all images by the projected Gaussian, tells which Gaussians to prune, softly while the set grows
         and hard afterwards.
Here     The claim we check: on a ray-traced scene AccuTile draws the same image from under 0.75 of the pairs, and of
         3D-GS's Gaussians a third or fewer are left at a PSNR of 27.5 or more, where 3D-GS has 28 or more. 3D-GS is
         whole: SH to degree 3, densification, opacity resets, off-centre cameras; COLMAP, NeRF-synthetic, .ply files.
Differs  Demo: 96 x 96 pixels, 100 views, 1000 steps, SH degree 1, learning rates x 4, 60 %/20 % pruned instead of
         80 %/30 %, at most 4000 Gaussians, tiles of 8 pixels; all milestones scale with --steps, whatever the views per
         step. Each tile row is solved for itself instead of walking from line to line; the set is the same. Mode pixel
         is ours: it asks about pixel centres, not tile squares. A power that rounding lifts above 0 is blended instead
         of skipping the pixel. A zero pruning ratio keeps all. The Jacobian's clamp has its exact derivative; a
         principal point off the centre is honoured. The dead screen-size rule of the original's densification is left
         out; LPIPS is not computed.

    python speedy_splat.py                                          # laptop: both runs, the table, the claim, pictures
    python speedy_splat.py --quick                                  # the same in a minute, coarser
    python speedy_splat.py train --data DIR                         # a COLMAP or NeRF-synthetic folder -> model.ply
    python speedy_splat.py train --data DIR --preset paper          # the paper's settings; a GPU's work (not yet run)
    python speedy_splat.py render --model FILE.ply                  # a turntable as PNG frames; --view 3: one camera
    python speedy_splat.py eval --model FILE.ply --data DIR         # PSNR, SSIM, pairs on the test views
    python speedy_splat.py bench                                    # time and pairs per mode, against a dense renderer
    python speedy_splat.py bench --data FILE.npz                    # points and cameras of a real capture
    torchrun --nproc-per-node 2 speedy_splat.py train --device cpu --views-per-step 2      # replicas, one view each
    torchrun --nproc-per-node 8 speedy_splat.py train --preset gpu --parallel gaussians --views-per-step 8   # not run

Expect   "AccuTile needs 0.7x of vanilla's pairs, image equal to the dense one" and "holds" at the end, on CPU, seed 0.
Writes   results/speedy_splat/: metrics.jsonl, claim.json, *.png, *.ply; checkpoint.pt (train), frames/ (render),
         eval.json, bench.json.
"""

import contextlib
import json
import math
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.kernels import splat as kernels, use_kernels

TILES = ("vanilla", "snugbox", "accutile", "pixel")
CHANNELS = ("sum", "separate")
BACKENDS = ("auto", "torch", "triton")
BLACK, WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
COLORS = {"black": BLACK, "white": WHITE}


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "render", "eval", "bench"), positional=True)
    preset: str = opt("laptop", "defaults for a setting; flags win over it", choices=("laptop", "gpu", "paper"))
    quick: bool = opt(False, "demo: fewer steps and views, coarser numbers")
    # the scene
    data: str = opt("scene", "scene: the ray-traced one; a COLMAP or NeRF-synthetic folder; bench: an .npz file too")
    size: int = opt(96, "pixels along a side of the ray-traced views and of the turntable's frames")
    views: int = opt(100, "ray-traced views, every 8th held out")
    points: int = opt(2000, "first Gaussians where the scene brings no points; for the ray-traced scene always")
    init: str = opt("points", "start from the scene's points, or from random ones", choices=("points", "random"))
    background: str = opt("auto", "behind the scene", choices=("auto", "black", "white"))
    # training
    steps: int = opt(1000, "optimizer steps; the milestones of 3D-GS and of pruning scale with it")
    lr_scale: float = opt(4.0, "factor on all learning rates; 1 for long runs")
    sh_degree: int = opt(1, "highest degree of the colours' spherical harmonics", choices=(0, 1, 2, 3))
    sh_every: int = opt(250, "steps before the degree rises by one")
    max_gaussians: int = opt(4000, "densification stops at so many")
    soft_ratio: float = opt(0.6, "part pruned at each of 3 events while the set grows; 0: none")
    hard_ratio: float = opt(0.2, "part pruned at each of 5 events after that; 0: none")
    channels: str = opt("sum", "pruning score: square after or before the sum over colours", choices=CHANNELS)
    views_per_step: int = opt(1, "views in a step, over all processes")
    parallel: str = opt("cameras", "replicas, or the Gaussians split over ranks", choices=("cameras", "gaussians"))
    seed: int = opt(0, "seed of the points, the order of views and the splits")
    # the rasteriser
    tiles: str = opt("accutile", "which tiles a Gaussian is listed in", choices=TILES)
    tile: int = opt(8, "pixels along a tile's side: 8 suits a CPU, 16 a GPU")
    backend: str = opt("auto", "auto: Triton on a GPU, torch elsewhere", choices=BACKENDS)
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    threads: int = opt(1, "CPU threads per process; the pieces of work are small, so more gain little")
    # files
    out: str = opt("results/speedy_splat", "folder of what the run writes, and of the checkpoint to resume")
    resume: bool = opt(False, "train: go on from the checkpoint in --out")
    save_every: int = opt(500, "steps between checkpoints; 0 writes only the last")
    eval_every: int = opt(0, "steps between evaluations, beside those at every event; 0: a tenth of the run")
    model: str = opt("results/speedy_splat/model.ply", "render, eval: the .ply to use")
    frames: int = opt(24, "render: frames of the turntable")
    view: int = opt(-1, "render: only this camera of --data; -1: the turntable")

    def __post_init__(self):
        for name in ("size", "views", "points", "steps", "sh_every", "views_per_step", "tile", "frames", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("soft_ratio", "hard_ratio"):
            _check_ratio(getattr(self, name), "--" + name.replace("_", "-"))
        if self.lr_scale <= 0:
            raise ValueError(f"--lr-scale must be positive, got {self.lr_scale}")

    def look(self, background) -> dict:
        """The arguments of render that stay the same in a run."""
        return {"background": background, "tiles": self.tiles, "backend": self.backend, "tile": self.tile}


PRESETS = {
    "laptop": {},
    "gpu": {
        "size": 800, "views": 120, "points": 100_000, "steps": 7000, "lr_scale": 1.0, "sh_degree": 3, "sh_every": 1000,
        "max_gaussians": 2_000_000, "tile": 16,
    },
    "paper": {
        "points": 100_000, "steps": 30_000, "lr_scale": 1.0, "sh_degree": 3, "sh_every": 1000, "soft_ratio": 0.8,
        "hard_ratio": 0.3, "max_gaussians": 20_000_000, "tile": 16, "save_every": 5000,
    },
}  # fmt: skip


def _check_choice(what: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise BadInput(f"unknown {what} {given!r}; choose from {', '.join(choices)}")


def _check_ratio(ratio: float, what: str = "ratio") -> None:
    if not 0 <= ratio < 1:
        raise BadInput(f"{what} must be in [0, 1), got {ratio}. 0 keeps every Gaussian; all cannot be removed.")


# ---- the method: which tiles a Gaussian touches
#
# u, v                centre of the projected Gaussian, in pixels with their centres on integers;  o  its opacity
# a, b, c             its 2D covariance [a b; b c];  A, B, C the conic, the inverse of it
# alpha               min(0.99, o exp(-(A dx^2 + C dy^2) / 2 - B dx dy)), not blended below 1/255    (arXiv:2308.04079)
#
# t = 2 ln(255 o)                                     the ellipse A dx^2 + 2 B dx dy + C dy^2 = t is where alpha = 1/255
# ex = sqrt(t a), ey = sqrt(t c)                      its half extents: SnugBox
# ys = -(B / C) ex                                    height of its right-most point; the left-most is at -ys

ALPHA_MIN, ALPHA_MAX, T_STOP = 1 / 255, 0.99, 1e-4
MAX_PAIRS = 2**31 - 1
GUARD = 1e-5  # t grows by it, so that rounding can add a tile but never lose one


def tile_pairs(
    mean2d: Tensor, conic: Tensor, opacity: Tensor, width: int, height: int, tile: int = 16, mode: str = "accutile"
) -> tuple[Tensor, Tensor]:
    """All (tile, Gaussian) pairs, Gaussian by Gaussian: tile_id (P,), row-major in the grid, and gaussian_id (P,).

    vanilla: the square of 3 standard deviations. snugbox: the box of the ellipse. accutile: exactly the tiles whose
    square the ellipse meets, row by row. pixel: those where it meets the hull of the pixel centres.
    ValueError: unknown mode, or more than 2^31 - 1 pairs.
    """
    _check_choice("tiles", mode, TILES)
    u, v = mean2d.detach().double().unbind(-1)  # double: a needle's sums cancel in float
    A, B, C = conic.detach().double().unbind(-1)
    o, D = opacity.detach().double().flatten(), A * C - B * B
    kept = torch.isfinite(u + v + A + B + C + o) & (A > 0) & (C > 0) & (D > 0)
    columns, rows, reach = -(-width // tile), -(-height // tile), tile - 1 if mode == "pixel" else tile
    if mode == "vanilla":
        mid = (A + C) / (2 * D)
        ex = ey = (3 * (mid + (mid**2 - 1 / D).clamp(min=0.1).sqrt()).sqrt()).ceil()
        span = lambda x, e: (((x - e) / tile).trunc(), ((x + e + tile - 1) / tile).trunc() - 1)
    else:
        kept = kept & (o >= ALPHA_MIN)
        t = 2 * (255 * o).log().clamp(min=0) * (1 + GUARD) + GUARD
        ex, ey = (t * C / D).sqrt(), (t * A / D).sqrt()
        first = lambda x: ((x - reach) / tile).ceil() if mode == "pixel" else (x / tile).floor()
        span = lambda x, e: (first(x - e), ((x + e) / tile).floor())
    low, high = span(v, ey)
    low, high = low.clamp(0, rows), high.clamp(-1, rows - 1)
    n_rows = torch.where(kept, (high - low + 1).clamp(min=0), 0).long()  # (N,)
    g, within = _runs(n_rows)  # (R,) the Gaussian of each tile row
    r = low[g] + within
    if mode in ("vanilla", "snugbox"):
        left, right = (x[g] for x in span(u, ex))
    else:  # the ellipse's right edge is concave in height: its maximum in the row is at the clamped argmax
        u, v, A, B, C, D, t, ex, ey = (x[g] for x in (u, v, A, B, C, D, t, ex, ey))
        y0, y1 = torch.maximum(tile * r - v, -ey), torch.minimum(tile * r + reach - v, ey)
        ys = -B / C * ex
        edge = lambda h, sign: u + (sign * (t * A - D * h**2).clamp(min=0).sqrt() - B * h) / A
        right = (edge(torch.minimum(torch.maximum(ys, y0), y1), 1) / tile).floor()
        left = first(edge(torch.minimum(torch.maximum(-ys, y0), y1), -1))
        right = torch.where(y1 < y0, -1, right)
    left, right = left.clamp(0, columns), right.clamp(-1, columns - 1)
    n = (right - left + 1).clamp(min=0).long()  # (R,)
    total = int(n.sum())
    if total > MAX_PAIRS:
        most = int(torch.zeros_like(n_rows).index_add_(0, g, n).max())
        raise BadInput(f"{len(mean2d)} Gaussians make {total} pairs with tiles, over {MAX_PAIRS}; the largest touches "
                       f"{most} tiles. Prune, lower the image size, or use larger tiles.")  # fmt: skip
    row, within = _runs(n)  # (P,) the tile row of each pair
    return r[row].long() * columns + left[row].long() + within, g[row]


def _runs(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For runs of these lengths (n,), one after another: each element's run and its place in it."""
    run = torch.repeat_interleave(lengths)
    return run, torch.arange(len(run), device=run.device) - (lengths.cumsum(0) - lengths)[run]


# ---- the method: which Gaussians to prune
#
# score_i = sum over training views and pixels of (dI/dG_i)^2, where G_i = exp(-(A dx^2 + C dy^2) / 2 - B dx dy)


@torch.no_grad()
def prune_scores(
    model: "GaussianModel", cameras: Sequence["Camera"], background=BLACK, channels: str = "sum", *,
    sh_degree: int | None = None, tiles: str = "accutile", backend: str = "auto", tile: int = 16,
) -> Tensor:  # fmt: skip
    """The efficient pruning score, (N,): sum over views and pixels of (dI/dg)^2, g the projected Gaussian's value.

    channels: sum squares after adding the colours' derivatives, as the released program does; separate before it.
    """
    _check_choice("channels", channels, CHANNELS)
    score = torch.zeros_like(model.means[:, 0])
    background, eye = torch.as_tensor(background).to(score), torch.eye(3).to(score)
    fast = _fast(backend, score.device)
    for camera in cameras:
        s = project(model, camera, sh_degree)
        for pick in eye.sum(dim=0, keepdim=True) if channels == "sum" else eye:  # dL/dI, the same at every pixel
            g = torch.cat([pick, -(pick * background).sum()[None]])  # and dL/dcoverage
            score += (kernels.score if fast else _score)(s, camera, tile, tiles, g)
    return score


def _score(s: "Splats", camera: "Camera", tile: int, tiles: str, g: Tensor) -> Tensor:
    """One view's sum over pixels of (o dL/dalpha)^2, for the same dL/dlayer g (4,) at every pixel."""
    ids, starts = bin_pairs(s, camera, tile, tiles)
    table, (columns, rows) = _table(s), camera.grid(tile)
    inside = g.new_zeros(rows * tile, columns * tile, 1)
    inside[: camera.height, : camera.width] = 1  # pixels beyond the border do not count
    g = rearrange(inside, "(r y) (c x) d -> (r c) (y x) d", y=tile, x=tile) * g  # (tiles, P, 4)
    ahead = (Blend.apply(table, ids, starts, tile, columns) * g).sum(dim=-1, keepdim=True)
    score = table.new_zeros(len(table))
    for slab in _slabs(table, ids, starts, tile, columns):
        left = ahead[slab.tiles]
        h = _alpha_gradient(slab, table[slab.entry][..., 6:], g[slab.tiles], left)
        ahead[slab.tiles] = left
        q = (h / slab.alpha.clamp(min=ALPHA_MIN)).square().sum(dim=1) * table[slab.entry][..., 5].exp().square()
        score.index_add_(0, slab.entry.flatten(), q.flatten())
    return score[:-1]


def prune_mask(scores: Tensor, ratio: float) -> Tensor:
    """Which Gaussians stay, (N,) bool: those above the int(ratio (N - 1))-th lowest score. BadInput: none would."""
    _check_ratio(ratio)
    if ratio == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    n, scores = len(scores), scores.nan_to_num(nan=-math.inf)
    keep = scores > scores.sort().values[int(ratio * (n - 1))] if n else torch.zeros(0, dtype=torch.bool)
    if not keep.any():
        raise BadInput(f"prune would remove all {n} Gaussians at ratio {ratio}: their scores tie. Lower the ratio.")
    return keep


def prune(
    model: "GaussianModel", optimizer: torch.optim.Optimizer | None, scores: Tensor, ratio: float, first=0
) -> int:
    """Remove the lowest-scored part of the Gaussians, ties included, with their Adam moments. Returns how many went.

    scores (N,): where the Gaussians are split over ranks, all ranks' ones, of which the model holds those from `first`.
    """
    keep = prune_mask(scores, ratio)[first : first + len(model)]
    model.keep(keep, optimizer)
    return int((~keep).sum())


# ---- the model: Gaussians and their projection

NEAR, DILATION = 0.2, 0.3
RAW = ("means", "sh_dc", "sh_rest", "opacity", "scale", "quat")  # a model's tensors, before their activations
RATES = {"means": 1.6e-4, "sh_dc": 2.5e-3, "sh_rest": 2.5e-3 / 20, "opacity": 5e-2, "scale": 5e-3, "quat": 1e-3}
SH_C0, SH_C1 = 0.28209479177387814, 0.4886025119029199
SH_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
SH_C3 = (-0.5900435899266435, 2.890611442640554, -0.4570457994644658, 0.3731763325901154, -0.4570457994644658,
         1.445305721320277, -0.5900435899266435)  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """viewmat (4, 4) world-to-camera, x right, y down, z forward; focal lengths and principal point in pixels."""

    viewmat: Tensor
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    @property
    def centre(self) -> Tensor:
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def grid(self, tile: int) -> tuple[int, int]:
        """Columns and rows of tiles; the last ones may be cut by the border."""
        return -(-self.width // tile), -(-self.height // tile)

    def to(self, like: Tensor) -> "Camera":
        return replace(self, viewmat=self.viewmat.to(like))

    def resized(self, width: int, height: int) -> "Camera":
        """The same view on another number of pixels."""
        kx, ky = width / self.width, height / self.height
        scaled = {"fx": self.fx * kx, "cx": self.cx * kx, "fy": self.fy * ky, "cy": self.cy * ky}
        return replace(self, **scaled, width=width, height=height)


class GaussianModel:
    """N Gaussians as raw parameters: means (N, 3), sh_dc (N, 1, 3), sh_rest (N, k, 3), opacity (N, 1), scale (N, 3),
    quat (N, 4). Activations: sigmoid of opacity, exp of scale, quat normalised (w, x, y, z), colour = SH + 0.5."""

    def __init__(self, **raw: Tensor):
        for name in RAW:
            setattr(self, name, nn.Parameter(raw[name].detach().clone()))

    def __len__(self) -> int:
        return len(self.means)

    @property
    def raw(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in RAW}

    @property
    def degree(self) -> int:
        """SH degree that sh_rest holds: 0, 3, 8 or 15 coefficients beside the constant one."""
        return math.isqrt(self.sh_rest.shape[1] + 1) - 1

    def sane(self) -> Tensor:
        """(N,) bool: False for what a training step has broken, not finite or without a direction."""
        whole = torch.isfinite(torch.cat([x.detach().flatten(1) for x in self.raw.values()], dim=1).sum(dim=1))
        return whole & (self.quat.detach().norm(dim=1) > 1e-12)

    def to(self, *where) -> "GaussianModel":
        return GaussianModel(**{k: v.to(*where) for k, v in self.raw.items()})

    @classmethod
    def from_points(cls, points: Tensor, rgb: Tensor, extent: float, sh_degree: int = 3) -> "GaussianModel":
        """One round Gaussian of opacity 0.1 per point (N, 3) with colour rgb (N, 3), sized by its neighbours."""
        points, rgb = torch.as_tensor(points).float(), torch.as_tensor(rgb)
        rgb = rgb.float() / 255 if rgb.dtype == torch.uint8 else rgb.float()
        n = len(points)
        if n == 0:
            raise BadInput("no points to start from. Give points, or --init random.")
        side = knn_mean_sq_dist(points).clamp(min=1e-7).sqrt() if n > 1 else torch.full((1,), 0.01 * extent)
        return cls(
            means=points, sh_dc=((rgb - 0.5) / SH_C0)[:, None], sh_rest=torch.zeros(n, (sh_degree + 1) ** 2 - 1, 3),
            opacity=torch.full((n, 1), math.log(0.1 / 0.9)), scale=repeat(side.log(), "n -> n three", three=3),
            quat=torch.tensor([1.0, 0, 0, 0]).repeat(n, 1),
        )  # fmt: skip

    @classmethod
    def from_ply(cls, path: str | Path) -> "GaussianModel":
        """A 3DGS .ply. BadInput: not one, truncated, or a value that no Gaussian can have."""
        return cls(**raw_from_ply(Path(path)))

    def save_ply(self, path: str | Path) -> None:
        """The 62-float layout that viewers read: f_rest channel by channel, always of degree 3."""
        raw_to_ply(self.raw, Path(path))

    def change(self, fn: Callable[[str, Tensor, bool], Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        """Replace each raw tensor x by fn(name, x, False), and Adam's moments m by fn(name, m, True)."""
        for name in RAW:
            old = getattr(self, name)
            new = nn.Parameter(fn(name, old.detach(), False))
            setattr(self, name, new)
            for group in optimizer.param_groups if optimizer else ():
                if group["params"][0] is old:
                    state = optimizer.state.pop(old, {})
                    optimizer.state[new] = {k: fn(name, m, True) if k != "step" else m for k, m in state.items()}
                    group["params"][0] = new

    def keep(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Drop the Gaussians where mask (N,) is False."""
        self.change(lambda name, x, moment: x[mask], optimizer)


def knn_mean_sq_dist(points: Tensor, k: int = 3, chunk: int = 1024) -> Tensor:
    """Mean squared distance from each of (N, 3) points to its k nearest others, or to all others if fewer: (N,)."""
    k = min(k, len(points) - 1)
    near = [torch.cdist(p, points, compute_mode="donot_use_mm_for_euclid_dist") for p in points.split(chunk)]
    return torch.cat([d.topk(k + 1, largest=False).values[:, 1:].square().mean(dim=1) for d in near])


def rotation(quat: Tensor) -> Tensor:
    """Rotation matrices (N, 3, 3) of quaternions (N, 4), w first, of any length."""
    w, x, y, z = F.normalize(quat, dim=-1).unbind(-1)
    entries = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
               2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
               2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]  # fmt: skip
    return rearrange(torch.stack(entries, dim=-1), "n (i j) -> n i j", i=3)


def sh_basis(d: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics of unit directions d (N, 3): (N, (degree + 1)^2)."""
    x, y, z = d.unbind(-1)
    basis = [torch.full_like(x, SH_C0)]
    if degree > 0:
        basis += [-SH_C1 * y, SH_C1 * z, -SH_C1 * x]
    if degree > 1:
        xx, yy, zz, c = x * x, y * y, z * z, SH_C2
        basis += [c[0] * x * y, c[1] * y * z, c[2] * (2 * zz - xx - yy), c[3] * x * z, c[4] * (xx - yy)]
    if degree > 2:
        c = SH_C3
        basis += [c[0] * y * (3 * xx - yy), c[1] * x * y * z, c[2] * y * (4 * zz - xx - yy)]
        basis += [c[3] * z * (2 * zz - 3 * xx - 3 * yy), c[4] * x * (4 * zz - xx - yy)]
        basis += [c[5] * z * (xx - yy), c[6] * x * (xx - 3 * yy)]
    return torch.stack(basis, dim=-1)


class Splats(NamedTuple):
    mean2d: Tensor  # (N, 2) u, v
    depth: Tensor  # (N,)
    conic: Tensor  # (N, 3) A, B, C
    opacity: Tensor  # (N,)
    color: Tensor  # (N, 3)
    visible: Tensor  # (N,) bool: in front of the near plane, of a finite and positive shape

    def by_depth(self) -> Tensor:
        """Visible Gaussians (V,), near to far; equal depths in index order."""
        order = self.visible.nonzero().flatten()
        return order[torch.argsort(self.depth.detach()[order], stable=True)]


def project(model: GaussianModel, camera: Camera, sh_degree: int | None = None) -> Splats:
    """Project every Gaussian (EWA, Eq. 5 of arXiv:2308.04079). Rows that are not visible hold harmless values."""
    degree, camera = model.degree if sh_degree is None else min(sh_degree, model.degree), camera.to(model.means)
    fx, fy, cx, cy, Rc = camera.fx, camera.fy, camera.cx, camera.cy, camera.viewmat[:3, :3]
    sane = model.sane()
    all_sane = bool(sane.all())
    whole = lambda x, other: x if all_sane else torch.where(sane.view(-1, *[1] * (x.ndim - 1)), x, other)
    means = whole(model.means, 0.0)
    p = means @ Rc.T + camera.viewmat[:3, 3]  # (N, 3)
    visible = sane & (p[:, 2].detach() > NEAR)
    x, y, z = torch.where(visible[:, None], p, 1.0).unbind(-1)
    mean2d = torch.stack([fx * x / z + cx - 0.5, fy * y / z + cy - 0.5], dim=-1)
    margin_x, margin_y = 0.15 * camera.width / fx, 0.15 * camera.height / fy  # 0.3 tan of the half angle
    tx = z * (x / z).clamp(-cx / fx - margin_x, (camera.width - cx) / fx + margin_x)
    ty = z * (y / z).clamp(-cy / fy - margin_y, (camera.height - cy) / fy + margin_y)
    J = torch.stack([fx / z, 0 * z, -fx * tx / z**2, 0 * z, fy / z, -fy * ty / z**2], dim=-1)
    T = rearrange(J, "n (i j) -> n i j", i=2) @ Rc  # (N, 2, 3)
    unit = model.quat.new_tensor([1.0, 0, 0, 0])
    M = T @ rotation(whole(model.quat, unit)) * whole(model.scale, 0.0).exp()[:, None]  # (N, 2, 3), T R diag(s)
    a, c = (M[:, i].square().sum(-1) + DILATION for i in (0, 1))
    b = (M[:, 0] * M[:, 1]).sum(-1)
    det = a * c - b * b
    visible = visible & torch.isfinite(det.detach()) & (det.detach() > 0)
    good = lambda t, other: torch.where(visible, t, other)
    conic = torch.stack([good(c, 1.0), good(-b, 0.0), good(a, 1.0)], dim=-1) / good(det, 1.0)[:, None]
    sh = torch.cat([model.sh_dc, model.sh_rest[:, : (degree + 1) ** 2 - 1]], dim=1)  # (N, K, 3)
    basis = sh_basis(F.normalize(means - camera.centre, dim=-1), degree)
    color = (torch.einsum("nk,nkc->nc", basis, whole(sh, 0.0)) + 0.5).clamp(min=0)
    return Splats(mean2d, z, conic, torch.sigmoid(whole(model.opacity, 0.0)).flatten(), color, visible)


# ---- the model: blending
#
# Inside a tile the exponent is a quadratic in the pixel's offset (x, y) from the tile's centre, so it is a product of
# the basis 1, x, y, x^2, y^2, xy with six coefficients per pair, and all nine gradients are moments of one matrix h.

SLAB = 64  # list entries at a time
KEEP = 2**25  # elements that the forward pass keeps for the backward pass; above, it computes them again


def bin_pairs(s: Splats, camera: Camera, tile: int, mode: str) -> tuple[Tensor, Tensor]:
    """Pairs sorted by tile, then depth, then index: Gaussians ids (P,), and where each tile's list starts (tiles + 1,).

    One sort of the depths and one stable sort of the short tile ids, instead of one of long joint keys.
    """
    order = s.by_depth()
    tile_id, g = tile_pairs(s.mean2d[order], s.conic[order], s.opacity[order], *camera.size, tile, mode)
    tile_id, by = torch.sort(tile_id.int(), stable=True)
    edges = torch.arange(math.prod(camera.grid(tile)) + 1, device=order.device, dtype=tile_id.dtype)
    return order[g[by]], torch.searchsorted(tile_id, edges)


class Slab(NamedTuple):
    """A piece of some tiles' lists: t tiles, their P pixels, K entries from front to back."""

    tiles: Tensor  # (t,)
    entry: Tensor  # (t, K) row of the table; the last row is a Gaussian of opacity 0
    raw: Tensor  # (t, P, K) o G
    alpha: Tensor  # (t, P, K) clamped, and 0 below 1/255
    w: Tensor  # (t, P, K) alpha T, 0 behind the stop


def _below(x: float, dtype: torch.dtype) -> float:
    """The number before x, to turn > into >=."""
    return float(torch.nextafter(torch.tensor(x, dtype=dtype), torch.zeros((), dtype=dtype)))


def _offsets(tile: int, like: Tensor) -> Tensor:
    """The basis at the pixels of a tile, (P, 6)."""
    at = torch.arange(tile, device=like.device, dtype=like.dtype) - (tile - 1) / 2
    y, x = (q.flatten() for q in torch.meshgrid(at, at, indexing="ij"))
    return torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)


def _from_centre(table: Tensor, entry: Tensor, tiles: Tensor, tile: int, columns: int) -> tuple[Tensor, ...]:
    """dx, dy from the tiles' centres to the splats, and A, B, C, ln o: six of (t, K)."""
    u, v, *rest = table[entry][..., :6].unbind(-1)
    x, y = (at[:, None] * tile + (tile - 1) / 2 for at in (tiles % columns, tiles // columns))
    return u - x, v - y, *rest


def _slabs(table: Tensor, ids: Tensor, starts: Tensor, tile: int, columns: int):
    """Yield the Slabs of all tiles, similar lengths together, each tile's front to back until all its pixels stop."""
    basis, pixels = _offsets(tile, table), tile * tile
    lengths = starts.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    longest, at = lengths[order].tolist(), 0
    group = max(1, (2**16 if table.device.type == "cpu" else 2**24) // (pixels * SLAB))
    small, stop = _below(ALPHA_MIN, table.dtype), _below(T_STOP, table.dtype)
    while at < len(longest) and longest[at]:
        tiles, T = order[at : at + group], None
        for first in range(0, longest[at], SLAB):
            slot = starts[tiles, None] + torch.arange(first, min(first + SLAB, longest[at]), device=ids.device)
            entry = torch.where(slot < starts[tiles + 1, None], ids[slot.clamp(max=len(ids) - 1)], len(table) - 1)
            dx, dy, A, B, C, log_o = _from_centre(table, entry, tiles, tile, columns)
            middle = log_o - (A * dx * dx + C * dy * dy) / 2 - B * dx * dy
            parts = [middle, A * dx + B * dy, C * dy + B * dx, -A / 2, -C / 2, -B]
            power = (basis @ torch.stack(parts, dim=1)).clamp_(min=-20)  # (P, 6) @ (t, 6, K); exp's denormals are slow
            raw = power.exp_()
            alpha = F.threshold(raw.clamp(max=ALPHA_MAX), small, 0.0)
            rest = 1 - alpha
            after = rest.cumprod(dim=-1)
            if T is not None:
                after *= T
            yield Slab(tiles, entry, raw, alpha, alpha * F.threshold(after, stop, 0.0).div_(rest))
            T = after[..., -1:]
            if first + SLAB < longest[at] and float(T.max()) < T_STOP:  # no pixel of any of these tiles goes on
                break
        at += group


def _alpha_gradient(slab: Slab, color: Tensor, g: Tensor, ahead: Tensor) -> Tensor:
    """alpha dL/dalpha of a slab, (t, P, K), from dL/dlayer g (t, P, 4) and the colours (t, K, 4) of its entries.

    dL/dalpha_i = T_i g.c_i - (sum over j > i of w_j g.c_j) / (1 - alpha_i); `ahead` (t, P, 1) holds that sum over all j
    of this slab and behind, and is left at the sum over those behind it.
    """
    s = slab.w * (g @ color.mT)
    seen = s.cumsum(dim=-1)
    h = s - (ahead - seen) * (slab.alpha / (1 - slab.alpha))
    ahead -= seen[..., -1:]
    return h.mul_(slab.w.sign())  # nothing reaches what is not blended


class Blend(torch.autograd.Function):
    """Blend splats front to back into (tiles, P, 4): colour on black, and coverage 1 - T_final.

    The table (N + 1, 10) holds u, v, A, B, C, ln o, r, g, b, 1; its last row pads lists that are shorter than others.
    """

    @staticmethod
    def forward(ctx, table, ids, starts, tile, columns):
        """table (N + 1, 10), ids (P,), starts (tiles + 1,) -> (tiles, tile^2, 4)."""
        layer, kept = table.new_zeros(len(starts) - 1, tile * tile, 4), []
        keep = ctx.needs_input_grad[0] and len(ids) * tile * tile <= KEEP
        for slab in _slabs(table, ids, starts, tile, columns):
            layer[slab.tiles] += slab.w @ table[slab.entry][..., 6:]
            kept += [slab] if keep else []
        ctx.save_for_backward(table, ids, starts, layer)
        ctx.kept, ctx.grid = kept, (tile, columns)
        return layer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        """g (tiles, tile^2, 4) -> gradient of the table. The sum's order is fixed on a CPU, not on a GPU."""
        table, ids, starts, layer = ctx.saved_tensors
        basis, grad = _offsets(ctx.grid[0], table), torch.zeros_like(table)
        ahead = (g * layer).sum(dim=-1, keepdim=True)  # (tiles, P, 1)
        for slab in ctx.kept or _slabs(table, ids, starts, *ctx.grid):
            color, g_here, left = table[slab.entry][..., 6:], g[slab.tiles], ahead[slab.tiles]
            h = _alpha_gradient(slab, color, g_here, left)
            ahead[slab.tiles] = left
            h *= slab.raw.clamp(min=ALPHA_MAX).div_(ALPHA_MAX)  # straight through the clamp at 0.99
            m0, m1, m2, m3, m4, m5 = (basis.T @ h).unbind(1)  # (t, 6, K) moments
            dx, dy, A, B, C, _ = _from_centre(table, slab.entry, slab.tiles, *ctx.grid)
            parts = [
                A * (m1 - dx * m0) + B * (m2 - dy * m0), C * (m2 - dy * m0) + B * (m1 - dx * m0),
                dx * m1 - (dx * dx * m0 + m3) / 2, dy * m1 + dx * m2 - dx * dy * m0 - m5,
                dy * m2 - (dy * dy * m0 + m4) / 2, m0,
            ]  # fmt: skip
            rows = torch.cat([torch.stack(parts, dim=-1), slab.w.mT @ g_here], dim=-1)  # (t, K, 10)
            grad.index_add_(0, slab.entry.flatten(), rows.flatten(0, 1))
        return grad, None, None, None, None


def _table(s: Splats) -> Tensor:
    """(N + 1, 10), as Blend takes it. A transparent splat gets ln o = -1e4, so that its weight is 0 and not NaN."""
    log_o = torch.where(s.opacity > 1e-30, s.opacity, 1.0).log() - 1e4 * (s.opacity <= 1e-30)
    rows = torch.cat([s.mean2d, s.conic, log_o[:, None], s.color, torch.ones_like(s.color[:, :1])], dim=1)
    pad = rows.new_zeros(1, 10)
    pad[0, 5] = -1e4
    return torch.cat([rows, pad])


class Render(NamedTuple):
    image: Tensor  # (H, W, 3)
    final_T: Tensor  # (H, W)
    mean2d: Tensor  # (N, 2); its .grad is there after a backward pass
    n_tiles: Tensor  # (N,) tiles of each Gaussian; 0 for those culled
    pairs: int


def render(
    model: GaussianModel, camera: Camera, *, background=BLACK, tiles: str = "accutile", backend: str = "auto",
    sh_degree: int | None = None, tile: int = 16,
) -> Render:  # fmt: skip
    """The image of the model seen by the camera, differentiable in the model's raw parameters and the background.

    ValueError: unknown tiles or backend, or too many pairs.
    """
    _check_choice("tiles", tiles, TILES)
    s = project(model, camera, sh_degree)
    if s.mean2d.requires_grad:
        s.mean2d.retain_grad()
    return rasterize(s, camera, background=background, tiles=tiles, backend=backend, tile=tile)


def _fast(backend: str, device: torch.device) -> bool:
    """Whether to take the kernels: auto does on a GPU that has Triton."""
    _check_choice("backend", backend, BACKENDS)
    return backend == "triton" or (backend == "auto" and device.type == "cuda" and use_kernels(device))


def rasterize(s: Splats, camera: Camera, *, background, tiles: str, backend: str, tile: int) -> Render:
    """Tiles, order and blending of projected Gaussians."""
    if _fast(backend, s.mean2d.device):
        layer, ids = kernels.rasterize(s, camera, tile, tiles)
    else:
        ids, starts = bin_pairs(s, camera, tile, tiles)
        columns, _ = camera.grid(tile)
        layer = Blend.apply(_table(s), ids, starts, tile, columns)
        layer = rearrange(layer, "(r c) (y x) d -> (r y) (c x) d", c=columns, y=tile)[: camera.height, : camera.width]
    final_T = 1 - layer[..., 3]
    image = layer[..., :3] + final_T[..., None] * torch.as_tensor(background).to(layer)
    return Render(image, final_T, s.mean2d, torch.bincount(ids, minlength=len(s.mean2d)), len(ids))


DENSE = 2**23  # pixels x Gaussians at a time


def render_dense(model: GaussianModel, camera: Camera, background=BLACK, sh_degree: int | None = None) -> Tensor:
    """Every pixel against every Gaussian, without tiles: the definition, and the exact reference. (H, W, 3)."""
    s = project(model, camera, sh_degree)
    order, pieces = s.by_depth(), []
    (u, v), (A, B, C), opacity, color = s.mean2d[order].T, s.conic[order].T, s.opacity[order], s.color[order]
    i, j = torch.meshgrid(torch.arange(camera.height), torch.arange(camera.width), indexing="ij")
    at = torch.stack([j, i], dim=-1).reshape(-1, 1, 2).to(s.mean2d)  # (P, 1, 2)
    for x, y in (piece.unbind(-1) for piece in at.split(max(1, DENSE // max(1, len(order))))):
        dx, dy = u - x, v - y  # (p, N)
        raw = opacity * (-(A * dx * dx + C * dy * dy) / 2 - B * dx * dy).exp()
        alpha = raw + (raw.clamp(max=ALPHA_MAX) - raw).detach()
        alpha = torch.where(alpha >= ALPHA_MIN, alpha, 0.0)
        alpha = torch.where((1 - alpha).cumprod(dim=1) >= T_STOP, alpha, 0.0)
        after = (1 - alpha).cumprod(dim=1)
        w = alpha * torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
        pieces.append(w @ color + (1 - w.sum(dim=1, keepdim=True)) * torch.as_tensor(background).to(w))
    return torch.cat(pieces).reshape(camera.height, camera.width, 3)


# ---- the experiment: loss, densification and schedule of 3D-GS


def _blur(x: Tensor) -> Tensor:
    """11 x 11 Gaussian window, sigma 1.5, zeros outside: x (B, H, W)."""
    band = lambda n: torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)  # (n, n)
    weight = lambda d: torch.exp(-(d.to(x.dtype) ** 2) / (2 * 1.5**2)) * (d.abs() <= 5)
    total = weight(torch.arange(-5, 6)).sum()
    height, width = (weight(band(n)) / total.to(x.device) for n in x.shape[1:])
    return height @ x @ width  # a matrix product each way: small images, no convolution's set-up


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of two images (H, W, 3) or (3, H, W): the mean over pixels and channels."""
    a, b = (x.movedim(-1, 0) if x.shape[-1] == 3 else x for x in (a, b))
    mu_a, mu_b, aa, bb, ab = _blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mu_a * mu_b + c1) * (2 * (ab - mu_a * mu_b) + c2)
    return (top / ((mu_a**2 + mu_b**2 + c1) * (aa - mu_a**2 + bb - mu_b**2 + c2))).mean()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """-10 log10 of the mean squared error, images clamped to 0..1."""
    return -10 * torch.log10((a.clamp(0, 1) - b.clamp(0, 1)).square().mean())


def image_loss(image: Tensor, truth: Tensor) -> Tensor:
    """0.8 L1 + 0.2 (1 - SSIM), Eq. 7 of arXiv:2308.04079."""
    return 0.8 * (image - truth).abs().mean() + 0.2 * (1 - ssim(image, truth))


def position_lr(i: int, steps: int = 30_000) -> float:
    """Log-linear from 1.6e-4 to 1.6e-6 over the run, before the scene extent's factor."""
    t = min(max(i / steps, 0), 1)
    return math.exp((1 - t) * math.log(1.6e-4) + t * math.log(1.6e-6))


class Schedule(NamedTuple):
    """When what happens, in steps counted from 1. At 30000 steps these are the paper's numbers; they scale with it."""

    densify: set
    reset: set
    soft: set
    hard: set
    large: int  # from here on Gaussians that are large in space are removed

    @classmethod
    def of(cls, steps: int, white: bool = False) -> "Schedule":
        """The schedule of a run of `steps`; a white background adds one early opacity reset."""
        at = lambda i: round(i * steps / 30_000)
        every, soft = max(25, at(100)), {at(i) for i in (6000, 9000, 12_000)}
        reset = {at(3000), *soft} if at(3000) >= 60 else set()  # recovery from a reset takes so many steps
        if white and reset:
            reset.add(at(500))
        grow = {i for i in range(every, at(15_000), every) if i > at(500)} | soft
        hard = {at(i) for i in range(15_000, 30_000, 3000)}
        return cls(grow, reset, soft, hard, at(3000))


@torch.no_grad()
def densify(
    model: GaussianModel, optimizer, gradient: Tensor, extent: float, noise: Callable[[int], Tensor], room: int,
    drop_large: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """Clone small and split large Gaussians whose mean gradient (N,) is 2e-4 or more, then drop faint ones.

    noise(N) gives (N, 2, 3) normal numbers, `room` is how many may be added. Returns (cloned, split, dropped).
    """
    chosen = gradient >= 2e-4
    if int(chosen.sum()) > room:  # the largest gradients first
        chosen = torch.zeros_like(chosen).index_fill_(0, gradient.topk(max(0, room)).indices, True) & chosen
    s = model.scale.exp()
    small = s.amax(dim=1) <= 0.01 * extent
    clone, split = chosen & small, chosen & ~small
    spread = noise(len(model)).to(s)[split] * s[split, None]  # (n, 2, 3)
    shift = torch.einsum("nij,nkj->nki", rotation(model.quat[split]), spread)

    def grown(name: str, x: Tensor, moment: bool) -> Tensor:
        """x (N, ...) with the clones and, for each split one, its two children at the end; new moments are 0."""
        new = torch.cat([x[clone], x[split].repeat_interleave(2, dim=0)])
        if moment:
            new = torch.zeros_like(new)
        elif name == "means":
            new[len(new) - 2 * len(shift) :] += shift.flatten(0, 1)
        elif name == "scale":
            new[len(new) - 2 * len(shift) :] -= math.log(1.6)
        return torch.cat([x[~split], new])

    model.change(grown, optimizer)
    keep = (torch.sigmoid(model.opacity).flatten() >= 0.005) & model.sane()
    if drop_large:
        keep &= model.scale.exp().amax(dim=1) <= 0.1 * extent
    model.keep(keep, optimizer)
    return int(clone.sum()), int(split.sum()), int((~keep).sum())


@torch.no_grad()
def reset_opacity(model: GaussianModel, optimizer) -> None:
    """Opacities fall to at most 0.01, and their Adam moments to 0."""
    model.opacity.data.clamp_(max=math.log(0.01 / 0.99))
    model.opacity.grad = None
    for name, moment in optimizer.state.get(model.opacity, {}).items():
        if name != "step":
            moment.zero_()


# ---- the experiment: what a scene is, and the ray-traced one


@dataclass
class Dataset:
    """Views and points. `images[i]` is (H, W, 3) in 0..1, read when asked for. `test` are the held-out views."""

    cameras: list[Camera]
    images: Sequence
    points: Tensor  # (n, 3)
    rgb: Tensor  # (n, 3) in 0..1
    extent: float  # 1.1 x the largest distance of a training camera from their mean
    names: list[str]
    test: list[int] = field(default_factory=list)
    background: tuple = BLACK

    @property
    def train(self) -> list[int]:
        held = set(self.test)
        return [i for i in range(len(self.cameras)) if i not in held]


def scene_extent(cameras: Sequence[Camera]) -> float:
    """1.1 x the largest distance of a camera centre from their mean; 1 where all are at one place."""
    if not cameras:
        raise BadInput("no cameras: the scene's files name no views")
    centres = torch.stack([c.centre.double() for c in cameras])
    far = 1.1 * float((centres - centres.mean(dim=0)).norm(dim=1).max())
    return far if far > 0 else 1.0


def every_8th(views: int) -> list[int]:
    """The held-out views; a single view is not held out."""
    return list(range(0, views, 8)) if views > 1 else []


def _dataset(cameras, images, points, rgb, names, test, background) -> Dataset:
    train = [c for i, c in enumerate(cameras) if i not in set(test)] or cameras
    return Dataset(cameras, images, points, rgb, scene_extent(train), names, test, tuple(background))


SKY = (0.62, 0.74, 0.88)
SPHERES = (  # x, y, z, radius, r, g, b
    (0.45, 0.3, 0.5, 0.5, 0.85, 0.25, 0.2), (-0.65, 0.45, 0.35, 0.35, 0.2, 0.55, 0.85),
    (-0.25, -0.75, 0.3, 0.3, 0.95, 0.75, 0.2), (0.75, -0.6, 0.25, 0.25, 0.35, 0.75, 0.35),
)  # fmt: skip
BOXES = (  # two corners, r, g, b
    (-1.15, -0.45, 0.0, -0.75, -0.05, 0.55, 0.6, 0.35, 0.7),
    (0.05, -0.3, 0.0, 0.35, -0.02, 0.28, 0.95, 0.93, 0.88),
)
FLOOR, CHECKER = 1.7, 0.8
LIGHTS = ((0.5, -0.4, 0.9), (0.56, -0.34, 0.9), (0.46, -0.46, 0.9), (0.5, -0.38, 0.8))


def _trace(origin: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First hit of rays (R, 3) with the scene: distance (R,), inf for none; normal (R, 3); colour (R, 3)."""
    best, normal, color = torch.full_like(d[:, 0], math.inf), torch.zeros_like(d), torch.zeros_like(d)

    def hit(t: Tensor, n: Tensor, paint: Tensor) -> None:
        nonlocal best, normal, color
        nearer = (t > 1e-4) & (t < best)
        best = torch.where(nearer, t, best)
        normal, color = torch.where(nearer[:, None], n, normal), torch.where(nearer[:, None], paint, color)

    for *sphere, r, g, b in SPHERES:
        away = origin - d.new_tensor(sphere[:3])
        half, c = (away * d).sum(-1), (away * away).sum(-1) - sphere[3] ** 2
        t = torch.where(half**2 > c, -half - (half**2 - c).clamp(min=0).sqrt(), math.inf)
        hit(t, (away + t.nan_to_num(posinf=0.0)[:, None] * d) / sphere[3], d.new_tensor([r, g, b]))
    for *box, r, g, b in BOXES:
        near, far = ((d.new_tensor(box[k : k + 3]) - origin) / d for k in (0, 3))
        enter, leave = torch.minimum(near, far), torch.maximum(near, far).amin(dim=1)
        t, axis = enter.max(dim=1)
        t = torch.where((t < leave) & (t > 0), t, math.inf)
        hit(t, -d.sign() * F.one_hot(axis, 3).to(d), d.new_tensor([r, g, b]))
    t = -origin[:, 2] / d[:, 2]
    x, y = (origin + t[:, None] * d)[:, :2].unbind(-1)
    t = torch.where(x * x + y * y < FLOOR**2, t, math.inf)
    dark = ((x / CHECKER).floor() + (y / CHECKER).floor()).remainder(2)[:, None] > 0
    paint = torch.where(dark, d.new_tensor([0.35, 0.36, 0.4]), d.new_tensor([0.8, 0.78, 0.72]))
    hit(t, d.new_tensor([0.0, 0, 1]), paint)
    return best, normal, color


def look_at(eye: Tensor, target: Tensor, focal: float, size: int, up=(0.0, 0.0, 1.0)) -> Camera:
    """A square camera at `eye`, principal point in the centre."""
    forward = F.normalize(target - eye, dim=0)
    right = F.normalize(torch.linalg.cross(forward, torch.as_tensor(up)), dim=0)
    Rc = torch.stack([right, torch.linalg.cross(forward, right), forward])
    viewmat = torch.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = Rc, -Rc @ eye
    return Camera(viewmat, focal, focal, size / 2, size / 2, size, size)


def ray_trace(camera: Camera, samples: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The scene as the camera sees it: image (H, W, 3); first-hit points (n, 3) of the central rays, with colours."""
    offsets = ((torch.arange(samples) - (samples - 1) / 2) / samples).tolist()  # samples odd: one is 0
    y, x = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    total = 0
    for oy, ox in ((oy, ox) for oy in offsets for ox in offsets):
        ray = [(x + ox - camera.cx) / camera.fx, (y + oy - camera.cy) / camera.fy, torch.ones_like(x)]
        d = F.normalize(torch.stack(ray, dim=-1).reshape(-1, 3), dim=1) @ camera.viewmat[:3, :3]
        origin = camera.centre.expand_as(d)
        t, normal, paint = _trace(origin, d)
        color, on = torch.tensor(SKY).repeat(len(d), 1), torch.isfinite(t)
        point, n, d = (origin + t[:, None] * d)[on], normal[on], d[on]
        light, shine = torch.zeros(2, len(point), 1)  # Lambert and a highlight, with the soft shadow of four lights
        for sun in F.normalize(torch.tensor(LIGHTS), dim=1):
            lit = torch.isinf(_trace(point + 1e-3 * n, sun.expand_as(point))[0])[:, None]
            light += lit * (n @ sun).clamp(min=0)[:, None] / len(LIGHTS)
            half = F.normalize(sun - d, dim=1)  # between the light and the eye
            shine += lit * (n * half).sum(-1, keepdim=True).clamp(min=0) ** 40 / len(LIGHTS)
        color[on] = (paint[on] * (0.3 + 0.7 * light) + 0.15 * shine).clamp(0, 1)
        total = total + color
        if ox == oy == 0:
            points, rgb = point, color[on]
    return (total / samples**2).reshape(camera.height, camera.width, 3), points, rgb


def scene_camera(i: int, views: int, size: int) -> Camera:
    """View i of a golden-angle spiral around the scene, 18 to 60 degrees up, 3.6 away."""
    up, turn = math.radians(18 + 42 * (i + 0.5) / views), i * math.pi * (3 - math.sqrt(5))
    eye = 3.6 * torch.tensor([math.cos(up) * math.cos(turn), math.cos(up) * math.sin(turn), math.sin(up)])
    return look_at(eye, torch.tensor([0.0, 0, 0.25]), 1.15 * size, size)


def procedural_scene(views: int = 100, size: int = 64, points: int = 2000, seed: int = 0, show=lambda x: x) -> Dataset:
    """Four spheres and two boxes on a checkered disc, ray-traced; every 8th view is held out."""
    cameras = [scene_camera(i, views, size) for i in range(views)]
    images, hits, colors = zip(*(ray_trace(c) for c in show(cameras)), strict=True)
    test, g = every_8th(views), cluster.generator(seed, 1)
    where, rgb = (torch.cat([x[i] for i in range(views) if i not in test]) for x in (hits, colors))
    pick = torch.randperm(len(where), generator=g)[:points]
    start = where[pick] + 0.01 * torch.randn(len(pick), 3, generator=g)
    names = [f"view_{i:03d}.png" for i in range(views)]
    return _dataset(cameras, list(images), start, rgb[pick], names, test, SKY)


# ---- the experiment: scene files

WIDEST = 1600  # pixels of a picture; wider ones are reduced


class Bytes:
    """A binary file read front to back; running out of it names the file, the record and the byte."""

    def __init__(self, path: Path):
        self.path, self.data, self.at, self.record = path, path.read_bytes(), 0, "header"

    def where(self) -> str:
        return f"{self.path}: {self.record}, byte {self.at}"

    def take(self, fmt: str) -> tuple:
        """The next values, little-endian and unpadded, by struct's letters."""
        self.skip(struct.calcsize("<" + fmt))
        return struct.unpack_from("<" + fmt, self.data, self.at - struct.calcsize("<" + fmt))

    def skip(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise BadInput(f"{self.where()}: needs {size} more bytes, the file ends at {len(self.data)}: truncated. "
                           f"Copy it again.")  # fmt: skip
        self.at += size

    def text(self) -> str:
        """The next zero-terminated string."""
        end, start = self.data.find(b"\0", self.at), self.at
        self.skip((end if end >= 0 else len(self.data)) + 1 - start)
        return self.data[start:end].decode("utf-8", "replace")

    def records(self, kind: str):
        """Count the records that the file says it has, naming each for messages."""
        for i in range(self.take("Q")[0]):
            self.record = f"{kind} record {i}"
            yield i


MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE", "FULL_OPENCV", "FOV",
          "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE")  # fmt: skip  # COLMAP's cameras, by number


def _pinhole(where: str, model: str) -> int:
    """How many parameters a COLMAP camera has that we can take."""
    if model not in MODELS[:2]:
        fault = f"camera model {model} has distortion" if model in MODELS else f"unknown camera model {model}"
        raise BadInput(f"{where}: {fault}. Run colmap image_undistorter first.")
    return 3 if model == "SIMPLE_PINHOLE" else 4


def _colmap_binary(folder: Path) -> tuple[dict, list, list]:
    """cameras {id: (width, height, parameters)}, images (name, pose, camera id), points (x, y, z, r, g, b)."""
    cameras, images, points = {}, [], []
    f = Bytes(folder / "cameras.bin")
    for _ in f.records("camera"):
        key, model, width, height = f.take("iiQQ")
        count = _pinhole(f.where(), MODELS[model] if 0 <= model < len(MODELS) else str(model))
        cameras[key] = width, height, f.take(f"{count}d")
    f = Bytes(folder / "images.bin")
    for _ in f.records("image"):
        _, *pose, camera = f.take("i7di")
        images.append((f.text(), pose, camera))
        f.skip(24 * f.take("Q")[0])
    f = Bytes(folder / "points3D.bin")
    for _ in f.records("point"):
        _, *point, _, track = f.take("Q3d3BdQ")
        f.skip(8 * track)
        points.append(point)
    return cameras, images, points


def _colmap_text(folder: Path) -> tuple[dict, list, list]:
    """As _colmap_binary. A line that does not fit is named with its byte."""
    cameras, images, points, where = {}, [], [], folder

    def lines(name: str, blank: bool = False):
        """(place, text) of each line but comments, and but blank ones."""
        offset = 0
        for number, raw in enumerate((folder / name).read_bytes().splitlines(keepends=True), 1):
            if not raw.startswith(b"#") and (blank or raw.strip()):
                yield f"{folder / name}: line {number}, byte {offset}", raw.decode("utf-8", "replace").strip()
            offset += len(raw)

    try:
        for where, line in lines("cameras.txt"):
            key, model, width, height, *params = line.split()
            if len(params) != _pinhole(where, model):
                raise ValueError(f"{len(params)} parameters of a {model}")
            cameras[int(key)] = int(width), int(height), [float(p) for p in params]
        rows = lines("images.txt", blank=True)  # the line of points after a pose may be blank
        for where, line in rows:  # noqa: B007
            if line:
                _, *pose, camera, name = line.split(maxsplit=9)
                images.append((name, [float(p) for p in pose], int(camera)))
                if len(pose) != 7 or len(next(rows, ("", ""))[1].split()) % 3:
                    raise ValueError("the points of an image are triples")
        for where, line in lines("points3D.txt"):  # noqa: B007  # named below
            _, x, y, z, r, g, b, _ = line.split()[:8]
            points.append([float(x), float(y), float(z), *bytes([int(r), int(g), int(b)])])  # ValueError over 255
    except BadInput:
        raise
    except ValueError as e:
        raise BadInput(f"{where}: not what COLMAP writes ({e}): truncated or edited. Copy it again.") from e
    return cameras, images, points


def load_colmap(path: str | Path, background=BLACK, init="points", count: int = 100_000, seed: int = 0) -> Dataset:
    """A COLMAP folder: sparse/0, sparse or itself; binary first, else text; pictures in images/. Every 8th is held out.

    BadInput: truncated, distorted cameras, no points. FileNotFoundError: no model there.
    """
    root, cameras, files = Path(path), [], []
    folders = [root / "sparse" / "0", root / "sparse", root]
    found = [(d, kind) for d in folders for kind in ("bin", "txt") if (d / f"cameras.{kind}").exists()]
    if not found:
        raise FileNotFoundError(f"{root} has no cameras.bin or cameras.txt, nor sparse/0. Is it a COLMAP folder?")
    folder, kind = found[0]
    for name in ("images", "points3D"):
        if not (folder / f"{name}.{kind}").exists():
            raise FileNotFoundError(f"{folder / name}.{kind} is missing beside cameras.{kind}. Copy all three.")
    intrinsics, images, points = (_colmap_binary if kind == "bin" else _colmap_text)(folder)
    for name, pose, key in sorted(images):
        if key not in intrinsics:
            raise BadInput(f"{folder}/images.{kind}: image {name} names camera {key}, which cameras.{kind} lacks.")
        viewmat = torch.eye(4, dtype=torch.float64)
        viewmat[:3, :3] = rotation(torch.tensor([pose[:4]], dtype=torch.float64))[0]
        viewmat[:3, 3] = torch.tensor(pose[4:], dtype=torch.float64)
        *size, params = intrinsics[key]  # f, cx, cy or fx, fy, cx, cy
        files.append(root / "images" / name)
        cameras.append(_fit(Camera(viewmat, params[0], *params[-3:], *size), files[-1]))
    if init == "random":
        at, rgb = random_points(count, scene_extent(cameras), seed)
        at = (at + torch.stack([c.centre for c in cameras]).mean(dim=0)).float()
    elif points:
        at, rgb = torch.from_numpy(np.array(points, np.float64)).float().split(3, dim=1)
        rgb = rgb / 255
    else:
        raise BadInput(f"{folder}/points3D.{kind} has no points to start from. Try --init random.")
    names = [name for name, *_ in sorted(images)]
    return _dataset(cameras, Images(files, cameras, background), at, rgb, names, every_8th(len(names)), background)


def random_points(count: int, half: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points uniform in a cube of half side `half`, with colours near grey."""
    g = cluster.generator(seed, 2)
    return (2 * torch.rand(count, 3, generator=g) - 1) * half, 0.45 + 0.1 * torch.rand(count, 3, generator=g)


def load_blender(path: str | Path, background=WHITE, init="points", count: int = 100_000, seed: int = 0) -> Dataset:
    """A NeRF-synthetic folder: transforms_train.json, its pictures, and transforms_test.json as the held-out views."""
    root, cameras, files, names, test = Path(path), [], [], [], []
    parts = [root / f"transforms_{part}.json" for part in ("train", "test")]
    if not parts[0].exists():
        raise FileNotFoundError(f"{parts[0]} is missing. Is {root} a NeRF-synthetic folder?")
    for part in (p for p in parts if p.exists()):
        try:
            meta = json.loads(part.read_text(errors="replace"))
            frames = list(meta.get("frames", []))
        except json.JSONDecodeError as e:
            raise BadInput(f"{part}: record {e.lineno}, byte {e.pos}: not JSON ({e.msg}): truncated?") from e
        except (AttributeError, TypeError) as e:
            raise BadInput(f"{part}: needs an object with a list of frames") from e
        for i, frame in enumerate(frames):
            where = f"{part}: frame {i}"
            try:
                values, name = {**meta, **frame}, frame["file_path"]
                pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64).reshape(4, 4)
                pose[:3, 1:3] *= -1  # OpenGL's y up and z backward
                viewmat = torch.linalg.inv(pose)
            except (KeyError, TypeError, ValueError, RuntimeError) as e:
                raise BadInput(f"{where}: needs file_path and a 4 x 4 transform_matrix") from e
            file = root / name if Path(name).suffix else root / f"{name}.png"
            if not file.exists():
                raise BadInput(f"{where}: no picture {file}")
            with _opened(file) as image:
                width, height = (values.get(key, n) for key, n in zip("wh", image.size, strict=True))
            if "fl_x" in values:
                fx, fy = values["fl_x"], values.get("fl_y", values["fl_x"])
            elif "camera_angle_x" in values:
                fx = fy = width / (2 * math.tan(values["camera_angle_x"] / 2))
            else:
                raise BadInput(f"{where}: neither camera_angle_x nor fl_x gives a focal length")
            cx, cy = values.get("cx", width / 2), values.get("cy", height / 2)
            test += [len(cameras)] if part == parts[1] else []
            cameras.append(_fit(Camera(viewmat, fx, fy, cx, cy, int(width), int(height)), file))
            files.append(file)
            names.append(name)
    cloud = root / "points3d.ply"
    points, rgb = points_from_ply(cloud) if cloud.exists() and init == "points" else random_points(count, 1.3, seed)
    return _dataset(cameras, Images(files, cameras, background), points, rgb, names, test, background)


def load_npz(path: str | Path) -> tuple[Tensor, Tensor, list[Camera]]:
    """Points (n, 3), colours (n, 3), cameras of an .npz with means3d, colors, viewmats, Ks, width, height."""
    try:
        with np.load(path, allow_pickle=False) as z:
            z = {k: z[k] for k in ("means3d", "colors", "viewmats", "Ks", "width", "height")}
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise BadInput(f"{path}: not a complete .npz of points and cameras ({e})") from e
    look = zip(torch.from_numpy(z["viewmats"]), z["Ks"].tolist(), strict=True)
    size = int(z["width"]), int(z["height"])
    cameras = [Camera(v, K[0][0], K[1][1], K[0][2], K[1][2], *size) for v, K in look]
    return torch.from_numpy(z["means3d"]).float(), torch.from_numpy(z["colors"]).float() / 255, cameras


def _pillow():
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError('reading pictures needs Pillow. Install it: pip install -e ".[plot]"') from e
    return Image


@contextlib.contextmanager
def _opened(file: Path):
    """A picture, by Pillow. BadInput: damaged."""
    try:
        with _pillow().open(file) as image:
            yield image
    except BadInput:
        raise
    except (OSError, SyntaxError, ValueError) as e:
        raise BadInput(f"{file}: not a complete picture that Pillow can read ({e})") from e


def _fit(camera: Camera, file: Path) -> Camera:
    """The camera at its picture's own size, at most WIDEST. Without a picture it stays as it is."""
    if not file.exists():
        return camera
    with _opened(file) as image:
        width, height = image.size
    return camera.resized(*((width, height) if width <= WIDEST else (WIDEST, round(height * WIDEST / width))))


def read_image(file: Path, size: tuple[int, int], background=BLACK) -> np.ndarray:
    """(H, W, 3) uint8, on the background, at (width, height) = size. BadInput: damaged, or over 8 bits a channel."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing. The cameras are there, their pictures are not.")
    with _opened(file) as image:
        if image.mode.startswith("I") or image.mode == "F":
            raise BadInput(f"{file}: {image.mode} has more than 8 bits a channel. Convert it to 8-bit RGB.")
        rgba = image.convert("RGBA")
    color = tuple(round(255 * x) for x in background)
    flat = _pillow().alpha_composite(_pillow().new("RGBA", rgba.size, (*color, 255)), rgba).convert("RGB")
    return np.array(flat if flat.size == tuple(size) else flat.resize(size, _pillow().Resampling.LANCZOS))


class Images(Sequence):
    """Pictures read on first use and kept as bytes, each at its camera's size."""

    def __init__(self, files: list[Path], cameras: list[Camera], background):
        self.files, self.cameras, self.background, self.seen = files, cameras, background, {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        if i not in self.seen:
            self.seen[i] = torch.from_numpy(read_image(self.files[i], self.cameras[i].size, self.background))
        return self.seen[i].float() / 255


def write_png(path: str | Path, image: Tensor) -> None:
    """image (H, W, 3) in 0..1 as an 8-bit PNG, without any package."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().numpy()
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">2I5B", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
             "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
             "float32": "f4", "float64": "f8"}  # fmt: skip


def read_ply(path: Path) -> np.ndarray:
    """The element `vertex` of a binary little-endian .ply, as a structured array. BadInput: anything else."""
    data, mark = path.read_bytes(), b"end_header\n"
    end = data.find(mark)
    if not data.startswith(b"ply") or end < 0:
        raise BadInput(f"{path}: header, byte {len(data)}: no 'ply' ... 'end_header'. Not a .ply, or truncated.")
    head = data[:end].decode("ascii", "replace")
    layout = [*re.findall(r"^format (\S+)", head, re.M), "missing"][0]
    if layout != "binary_little_endian":
        raise BadInput(f"{path}: format {layout}; only binary_little_endian is read. Save it again as that.")
    vertex = re.search(r"^element (\w+) (\d+)\s((?:(?:property|comment).*\s)*)", head, re.M)
    if not vertex or vertex[1] != "vertex":
        raise BadInput(f"{path}: header: no element vertex that comes first")
    fields = [line.split()[1:] for line in vertex[3].splitlines() if line.startswith("property")]
    for words in fields:
        if len(words) != 2 or words[0] not in PLY_TYPES:
            raise BadInput(f"{path}: header: property {' '.join(words)} is no type and name (type list is not read)")
    record, count = np.dtype([(name, "<" + PLY_TYPES[kind]) for kind, name in fields]), int(vertex[2])
    if len(data) - end - len(mark) < count * record.itemsize:
        last = (len(data) - end - len(mark)) // max(1, record.itemsize)
        raise BadInput(f"{path}: vertex record {last} of {count}, byte {len(data)}: truncated. Copy it again.")
    return np.frombuffer(data, record, count, end + len(mark))


def _columns(path: Path, v: np.ndarray, names: list[str]) -> np.ndarray:
    """These properties of a .ply as (n, len(names)). BadInput: one is missing."""
    for name in names:
        if name not in v.dtype.names:
            raise BadInput(f"{path}: property {name} is missing")
    return np.stack([v[name] for name in names], axis=1) if names else np.zeros((len(v), 0), np.float32)


def points_from_ply(path: str | Path) -> tuple[Tensor, Tensor]:
    """A point cloud's (n, 3) positions and (n, 3) colours in 0..1."""
    v = read_ply(Path(path))
    points, rgb = _columns(path, v, ["x", "y", "z"]), _columns(path, v, ["red", "green", "blue"])
    rgb = rgb.astype(np.float32) / (255 if rgb.dtype == np.uint8 else 1)
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(rgb)


def _ply_names(rest: int) -> dict[str, list[str]]:
    """The properties that hold each raw tensor, in the order of the file; rest: how many f_rest."""
    numbered = lambda name, n: [f"{name}_{i}" for i in range(n)]
    return {"means": ["x", "y", "z"], "sh_dc": numbered("f_dc", 3), "sh_rest": numbered("f_rest", rest),
            "opacity": ["opacity"], "scale": numbered("scale", 3), "quat": numbered("rot", 4)}  # fmt: skip


def raw_from_ply(path: Path) -> dict[str, Tensor]:
    """A 3DGS .ply as a GaussianModel's raw tensors; the degree follows from the number of f_rest."""
    v, raw = read_ply(path), {}
    rest = sum(name.startswith("f_rest_") for name in v.dtype.names or ())
    if rest not in (0, 9, 24, 45):
        raise BadInput(f"{path}: {rest} properties f_rest_*; spherical harmonics have 0, 9, 24 or 45")
    for attribute, names in _ply_names(rest).items():
        raw[attribute] = x = torch.from_numpy(_columns(path, v, names).astype(np.float32))
        for fault, bad in (
            ("is not finite", ~torch.isfinite(x)),
            ("has length 0", x.norm(dim=1, keepdim=True) < 1e-12),
        ):
            if bad.any() and (fault == "is not finite" or attribute == "quat"):
                raise BadInput(f"{path}: {attribute} of Gaussian {int(bad.nonzero()[0, 0])} {fault}")
    raw["sh_dc"] = raw["sh_dc"][:, None]
    raw["sh_rest"] = rearrange(raw["sh_rest"], "n (c k) -> n k c", c=3)
    return raw


def raw_to_ply(raw: dict[str, Tensor], path: Path) -> None:
    """A GaussianModel's raw tensors as a 3DGS .ply of degree 3."""
    x = {name: t.detach().cpu().float() for name, t in raw.items()}
    x["sh_rest"] = rearrange(F.pad(x["sh_rest"], (0, 0, 0, 15 - x["sh_rest"].shape[1])), "n k c -> n (c k)")
    x["sh_dc"] = x["sh_dc"][:, 0]
    names, parts = _ply_names(45), [x[name] for name in RAW]
    names["means"] = [*names["means"], "nx", "ny", "nz"]  # normals: viewers expect them, at 0
    parts.insert(1, torch.zeros_like(x["means"]))
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(x['means'])}"]
    head += [f"property float {n}" for name in RAW for n in names[name]] + ["end_header", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(f"{path}.tmp")
    tmp.write_bytes("\n".join(head).encode() + torch.cat(parts, dim=1).numpy().astype("<f4").tobytes())
    tmp.replace(path)


def load(cfg: Config, w: cluster.World) -> Dataset:
    """The scene that --data names."""
    root, color = Path(cfg.data), COLORS.get(cfg.background)
    start = {"init": cfg.init, "count": cfg.points, "seed": cfg.seed}
    if cfg.data == "scene":
        show = lambda x: report.progress(x, "ray tracing", w)
        data = procedural_scene(cfg.views, cfg.size, cfg.points, cfg.seed, show)
        if cfg.init == "random":
            data.points, data.rgb = random_points(cfg.points, 1.3, cfg.seed)
        data.background = color or SKY
    elif not root.is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder. Give a COLMAP or NeRF-synthetic one, or 'scene'.")
    elif (root / "transforms_train.json").exists():
        data = load_blender(root, color or WHITE, **start)
    else:
        data = load_colmap(root, color or BLACK, **start)
    return data


# ---- the experiment: training, on one process or many


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, send[r] to rank r, and in the backward pass their gradients back. Collective both ways."""

    @staticmethod
    def forward(ctx, x, send, receive):
        ctx.back, out = (receive, send), x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx, g):
        return _Exchange.apply(g, *ctx.back), None, None


def render_sharded(
    model: GaussianModel, cameras: Sequence[Camera], w: cluster.World, *, background, tiles: str, tile: int,
    backend: str, sh_degree: int | None = None,
) -> tuple[Render, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """Each rank owns a part of the Gaussians and one of the w.size cameras; splats travel to the rank that blends them.

    Returns this rank's Render, and per camera (mean2d, n_tiles) of this rank's Gaussians. Collective, arXiv:2406.18533.
    """
    records, seen = [], []
    for camera in cameras:
        s = project(model, camera, sh_degree)
        if s.mean2d.requires_grad:
            s.mean2d.retain_grad()
        here = s.visible.nonzero().flatten()
        _, g = tile_pairs(s.mean2d[here], s.conic[here], s.opacity[here], *camera.size, tile, tiles)
        n_tiles = torch.bincount(here[g], minlength=len(model))
        records.append(torch.cat([kernels.table(s), s.depth[:, None]], dim=1)[n_tiles > 0])  # (n, 10)
        seen.append((s.mean2d, n_tiles))
    send = torch.tensor([len(r) for r in records], device=w.device)
    receive = _Exchange.apply(send, [1] * w.size, [1] * w.size)
    rows = _Exchange.apply(torch.cat(records), send.tolist(), receive.tolist())
    mean2d, conic, opacity, color, depth = rows.split([2, 3, 1, 3, 1], dim=1)
    s = Splats(mean2d, depth[:, 0], conic, opacity[:, 0], color, torch.ones_like(depth[:, 0], dtype=torch.bool))
    return rasterize(s, cameras[w.rank], background=background, tiles=tiles, backend=backend, tile=tile), seen


def gather_rows(x: Tensor, w: cluster.World) -> tuple[Tensor, int]:
    """All ranks' rows in rank order, and the number of this rank's first one. Collective."""
    one = [1] * w.size
    counts = _Exchange.apply(torch.full((w.size,), len(x), device=x.device), one, one).tolist()
    return _Exchange.apply(torch.cat([x] * w.size), [len(x)] * w.size, counts), sum(counts[: w.rank])


# settings that change the numbers of a run; a checkpoint goes on only under the same ones
FIXED = ("data", "size", "views", "points", "init", "background", "steps", "lr_scale", "sh_degree", "sh_every", "seed",
         "max_gaussians", "soft_ratio", "hard_ratio", "channels", "views_per_step", "parallel", "tiles",
         "tile")  # fmt: skip
HEAD = ["iteration", "N", *(f"pairs {m}" for m in TILES), "test PSNR", "events"]


class Trainer:
    """One run: the model, Adam with a group per attribute, and the schedule of growing and pruning."""

    def __init__(self, data: Dataset, cfg: Config, w: cluster.World, state: dict | None = None):
        self.cfg, self.w = cfg, w
        if not data.train:
            raise BadInput(f"{cfg.data}: no training views. Every 8th is held out, so give at least two.")
        if cfg.views_per_step % w.size:
            raise BadInput(f"--views-per-step {cfg.views_per_step} does not divide over {w.size} processes")
        self.sharded = cfg.parallel == "gaussians" and w.size > 1
        background = torch.tensor(data.background, dtype=torch.float32, device=w.device)
        self.data = data = replace(data, cameras=[c.to(background) for c in data.cameras])
        self.look, self.schedule = cfg.look(background), Schedule.of(cfg.steps, white=tuple(data.background) == WHITE)
        mine = (lambda x: x.tensor_split(w.size)[w.rank]) if self.sharded else (lambda x: x)
        if state:
            model = GaussianModel(**state["model"])
        else:
            model = GaussianModel.from_points(data.points, data.rgb, data.extent, cfg.sh_degree)
        self.model = GaussianModel(**{k: mine(x).to(w.device) for k, x in model.raw.items()})
        B = cfg.views_per_step
        self.factor = cfg.lr_scale * math.sqrt(B)  # of the rates for B views a step, arXiv:2406.18533
        groups = [{"params": [x], "lr": RATES[k] * self.factor, "name": k} for k, x in self.model.raw.items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9**B, 0.999**B), eps=1e-15, fused=True)
        self.step, self.seconds = 0, 0.0
        self.grown = torch.zeros(3, dtype=torch.long)  # cloned, split, dropped so far
        self._fresh()
        if state:
            for moments in state["optimizer"]["state"].values():
                moments.update({k: mine(m) for k, m in moments.items() if k != "step"})
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.grown = state["step"], state["seconds"], state["grown"]
            self.gradient, self.seen = mine(state["gradient"]).to(w.device), mine(state["seen"]).to(w.device)

    def _fresh(self) -> None:
        """Statistics for densification: sums over views of |dL/d mean2d| in NDC, and the views that saw a Gaussian."""
        self.gradient, self.seen = torch.zeros(2, len(self.model), device=self.w.device)

    def state(self) -> dict:
        """Everything to go on from, on every rank; with Gaussians split, all parts together. Collective then."""
        whole = (lambda x: gather_rows(x, self.w)[0]) if self.sharded else (lambda x: x)
        adam = self.optimizer.state_dict()
        for i, moments in adam["state"].items():
            adam["state"][i] = {k: m if k == "step" else whole(m) for k, m in moments.items()}
        return {
            "model": {k: whole(x.detach()) for k, x in self.model.raw.items()}, "optimizer": adam,
            "gradient": whole(self.gradient), "seen": whole(self.seen), "step": self.step, "seconds": self.seconds,
            "grown": self.grown, "setting": {name: getattr(self.cfg, name) for name in FIXED},
        }  # fmt: skip

    def whole(self) -> tuple[GaussianModel, int]:
        """The model of all ranks, and where this rank's part begins."""
        if not self.sharded:
            return self.model, 0
        parts = {k: gather_rows(x.detach(), self.w) for k, x in self.model.raw.items()}
        return GaussianModel(**{k: x for k, (x, _) in parts.items()}), parts["means"][1]

    def count(self) -> int:
        """Gaussians of the job."""
        n = torch.tensor([len(self.model)], device=self.w.device)
        return int(cluster.total(n)) if self.sharded else len(self.model)

    def views(self, step: int) -> list[int]:
        """The views of a step: drawn without replacement, reshuffled when used up; a function of seed and step."""
        B, train = self.cfg.views_per_step, self.data.train
        n = len(train)
        order = lambda epoch: torch.randperm(n, generator=cluster.generator(self.cfg.seed, 3, epoch))
        return [train[int(order(i // n)[i % n])] for i in range(step * B, (step + 1) * B)]

    def degree(self) -> int:
        return min(self.cfg.sh_degree, self.step // self.cfg.sh_every)

    def backward(self, views: list[int]) -> Tensor:
        """Gradients and statistics of these views; returns the mean loss."""
        w, B, look = self.w, len(views), self.look | {"sh_degree": self.degree()}
        gradient, seen = torch.zeros_like(self.gradient), torch.zeros_like(self.seen)
        loss = torch.zeros((), device=w.device)
        for first in range(0, B, w.size):
            cameras = [self.data.cameras[v] for v in views[first : first + w.size]]  # one per rank
            if self.sharded:
                r, looked = render_sharded(self.model, cameras, w, **look)
            else:
                cameras = [cameras[w.rank]]
                r = render(self.model, *cameras, **look)
                looked = [(r.mean2d, r.n_tiles)]
            part = image_loss(r.image, self.data.images[views[first + w.rank]].to(w.device)) / B
            part.backward()
            loss += part.detach()
            for camera, (mean2d, n_tiles) in zip(cameras, looked, strict=True):
                half = mean2d.new_tensor([camera.width / 2, camera.height / 2])  # the threshold is in NDC
                gradient += (B * mean2d.grad * half).norm(dim=1) * (n_tiles > 0)
                seen += n_tiles > 0
        if self.sharded:
            loss = cluster.total(loss)
        elif w.size > 1:  # replicas: one sum over ranks for all
            parts = [*(x.grad for x in self.model.raw.values()), gradient, seen, loss]
            flat = cluster.total(torch.cat([x.flatten() for x in parts]))
            for x, total in zip(parts, flat.split([x.numel() for x in parts]), strict=True):
                x.copy_(total.view_as(x))
        self.gradient += gradient
        self.seen += seen
        return loss

    def advance(self) -> tuple[Tensor, str]:
        """One step: returns its loss and, in words, what happened to the set of Gaussians."""
        cfg, plan, i = self.cfg, self.schedule, self.step + 1
        report.synchronize(self.w.device)
        start, events = time.perf_counter(), []
        self.optimizer.param_groups[0]["lr"] = position_lr(i, cfg.steps) * self.data.extent * self.factor
        self.step = i  # the SH degree of this step counts it
        loss = self.backward(self.views(i - 1))
        if i in plan.densify:
            self.densify()
        if i in plan.soft and cfg.soft_ratio:
            events.append(self.prune("soft", cfg.soft_ratio))
        if i in plan.reset:
            reset_opacity(self.model, self.optimizer)
            events.append("opacity reset")
        if i < cfg.steps:
            self.optimizer.step()
        if i in plan.hard and cfg.hard_ratio and i < cfg.steps:
            events.append(self.prune("hard", cfg.hard_ratio))
        self.optimizer.zero_grad(set_to_none=True)
        if i % 1000 == 0:
            self.check_replicas()
        report.synchronize(self.w.device)
        self.seconds += time.perf_counter() - start
        return loss, ", ".join(events)

    def densify(self) -> None:
        """Grow where the mean gradient is large, with the same random numbers however the Gaussians are split."""
        cfg, i, n = self.cfg, self.step, self.count()
        first = gather_rows(self.gradient, self.w)[1] if self.sharded else 0
        noise = lambda m: torch.randn(n, 2, 3, generator=cluster.generator(cfg.seed, 4, i))[first : first + m]
        room = (cfg.max_gaussians - n) // (self.w.size if self.sharded else 1)
        mean, large = self.gradient / self.seen.clamp(min=1), i > self.schedule.large
        grown = torch.tensor(densify(self.model, self.optimizer, mean, self.data.extent, noise, room, large))
        self.grown += cluster.total(grown.to(self.w.device)).cpu() if self.sharded else grown
        self._fresh()

    def prune(self, kind: str, ratio: float) -> str:
        """Score the Gaussians on all training views, drop the lowest part on every rank alike."""
        w, before, (model, first) = self.w, self.count(), self.whole()
        look = self.look | {"channels": self.cfg.channels, "sh_degree": self.degree()}
        scores = torch.zeros(len(model), dtype=torch.float64, device=w.device)  # any split of the views sums alike
        for v in self.data.train[w.rank :: w.size]:
            scores += prune_scores(model, [self.data.cameras[v]], **look)
        prune(self.model, self.optimizer, cluster.total(scores), ratio, first)
        self._fresh()
        return f"{kind} prune {before} -> {self.count()}"

    def check_replicas(self) -> None:
        """RuntimeError: the replicas differ in number or place."""
        if self.w.size == 1 or self.sharded:
            return
        mine = [len(self.model), self.model.means.detach().double().sum().item()]
        low, high = (torch.tensor(mine, dtype=torch.float64, device=self.w.device) for _ in range(2))
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise RuntimeError(f"replicas differ at step {self.step}: {low.tolist()} and {high.tolist()}")

    def evaluate(self) -> dict:
        """PSNR, SSIM and pairs in the four modes on the held-out views (the training views if none), all ranks'."""
        return evaluate(self.whole()[0], self.data, self.look, self.w, self.degree())

    def run(self, log: report.Run, what: str, path: str = "") -> list[list]:
        """Train to the end, with checkpoints in `path`; returns table rows under HEAD, one per evaluation or event."""
        cfg, plan, rows = self.cfg, self.schedule, []
        every = cfg.eval_every or max(1, cfg.steps // 10)
        row = lambda step, f, text: [step, f["gaussians"], *(f[f"pairs_{m}"] for m in TILES), f["psnr"], text]
        bar = report.progress(None, what, self.w, cfg.steps, self.step)
        listen = cluster.stop_signal() if path else contextlib.nullcontext(bool)  # bool() is False
        with listen as stopping, bar:
            while self.step < cfg.steps:
                i = self.step + 1
                due = (i % every == 0 or i in plan.soft | plan.hard | plan.reset) and i < cfg.steps
                found = self.evaluate() if due else None  # before the events of step i
                loss, events = self.advance()
                if found:
                    rows.append(row(i, found, events))
                    grown = dict(zip(("cloned", "split", "dropped"), self.grown.tolist(), strict=True))
                    log.log(run=what, step=i, loss=loss, **found, **grown, events=events)
                    bar.set_postfix_str(f"N {found['gaussians']} PSNR {found['psnr']:.2f}")
                bar.update()
                stop = stopping()
                if path and (stop or i == cfg.steps or (cfg.save_every and i % cfg.save_every == 0)):
                    state = self.state()
                    if self.w.main:
                        cluster.save(path, state)
                if stop:
                    self.w.print(f"stopped by SIGTERM after step {i}; go on with --resume")
                    raise SystemExit(0)
        self.check_replicas()
        found = self.evaluate()
        rows.append(row(cfg.steps, found, ""))
        log.log(run=what, step=cfg.steps, **found, events="end", seconds_training=self.seconds)
        return rows


@torch.no_grad()
def evaluate(model: GaussianModel, data: Dataset, look: dict, w: cluster.World, sh_degree: int | None = None) -> dict:
    """Means over the held-out views, divided over ranks: PSNR, SSIM; sums of pairs in the four modes."""
    views = data.test or data.train
    sums = torch.zeros(2 + len(TILES), dtype=torch.float64)
    for v in views[w.rank :: w.size]:
        truth, s = data.images[v].to(w.device), project(model, data.cameras[v], sh_degree)
        image = rasterize(s, data.cameras[v], **look).image
        pairs = count_pairs(s, data.cameras[v], look["tile"]).values()
        sums += torch.tensor([psnr(image, truth), ssim(image.clamp(0, 1), truth), *pairs], dtype=torch.float64)
    sums = cluster.total(sums.to(w.device)).tolist() if w.size > 1 else sums.tolist()
    pairs = {f"pairs_{m}": int(x) for m, x in zip(TILES, sums[2:], strict=True)}
    return {"gaussians": len(model), "psnr": sums[0] / len(views), "ssim": sums[1] / len(views), **pairs}


def count_pairs(s: Splats, camera: Camera, tile: int) -> dict[str, int]:
    """Pairs of one view in each mode."""
    here = s.visible
    return {m: len(tile_pairs(s.mean2d[here], s.conic[here], s.opacity[here], *camera.size, tile, m)[0]) for m in TILES}


def train(dataset: Dataset, config: Config, w: cluster.World | None = None) -> GaussianModel:
    """Train on a dataset; writes metrics.jsonl, checkpoint.pt and model.ply into config.out. Returns the model."""
    if w is None:
        with cluster.world(config.device) as w:
            return train(dataset, config, w)
    path = f"{config.out}/checkpoint.pt"
    state = cluster.load(path) if config.resume else None
    if state:
        for name in FIXED:
            was, now, flag = state["setting"][name], getattr(config, name), "--" + name.replace("_", "-")
            if was != now:
                raise BadInput(f"the checkpoint was trained with {flag} {was}, this run asks for {flag} {now}. Pass "
                               f"{flag} {was} to resume, or another --out to start anew.")  # fmt: skip
    elif w.main:
        cluster.set_aside(path)
    trainer = Trainer(dataset, config, w, state)
    log = report.Run(config.out, config, w, trainer.step)
    w.print(report.table(HEAD, trainer.run(log, "train", path)))
    model, _ = trainer.whole()
    if w.main:
        model.save_ply(f"{config.out}/model.ply")
    wall = time.perf_counter() - log.start
    w.print(f"model: {config.out}/model.ply, {len(model)} Gaussians; {trainer.seconds:.0f} s of training steps and "
            f"pruning, {wall:.0f} s in all")  # fmt: skip
    return model


# ---- demo: the claim


def exactness(model: GaussianModel, camera: Camera, background, tile: int) -> dict[str, float]:
    """Largest difference of an image, at most 96 pixels wide, from the dense one in each mode, in double precision."""
    if camera.width > 96:  # every pixel meets every Gaussian
        camera = camera.resized(96, max(1, round(96 * camera.height / camera.width)))
    model = model.to(torch.float64)
    with torch.no_grad():
        dense = render_dense(model, camera, background)
        images = {m: render(model, camera, background=background, tiles=m, tile=tile, backend="torch") for m in TILES}
    return {m: float((r.image - dense).abs().max()) for m, r in images.items()}


def demo(cfg: Config, w: cluster.World) -> None:
    """Train without and with pruning, print the tables, draw the pictures, state the claim."""
    if cfg.quick:
        low = {"size": 72, "views": 56, "points": 1500, "steps": 320}
        cfg = replace(cfg, **{name: min(n, getattr(cfg, name)) for name, n in low.items()})
    data, run, found, models = load(cfg, w), report.Run(cfg.out, cfg, w), {}, {}
    for name, c in {"3D-GS": replace(cfg, soft_ratio=0.0, hard_ratio=0.0), "Speedy-Splat": cfg}.items():
        start, trainer = time.perf_counter(), Trainer(data, c, w)
        rows = trainer.run(run, name)
        found[name], models[name] = trainer.evaluate(), trainer.whole()[0]
        wall = time.perf_counter() - start
        w.print(f"\n{name}: {cfg.steps} steps, {trainer.seconds:.0f} s of training, {wall:.0f} s in all")
        w.print(report.table(HEAD, rows))
    if not w.main:
        return
    plain, pruned = found.values()
    views, cameras, look = data.test or data.train, trainer.data.cameras, cfg.look(data.background)
    with torch.no_grad():  # shown: the held-out view of median PSNR
        quality = lambda v: psnr(render(models["Speedy-Splat"], cameras[v], **look).image.cpu(), data.images[v]).item()
        view = sorted(views, key=quality)[len(views) // 2]
    off = exactness(models["3D-GS"], cameras[view], data.background, cfg.tile)
    w.print("\nlargest difference from the dense image: " + ", ".join(f"{m} {x:.1e}" for m, x in off.items()))
    frames = frame_times(models, [cameras[v] for v in views[:5]], look, w)
    head = ["frame: projection to last pixel", "N", "pairs", "ms", "x faster"]
    w.print("\n" + report.table(head, frames) + "\n")
    for row in frames:
        run.log(**dict(zip(("frame", "gaussians", "pairs", "ms", "faster"), row, strict=True)))
    for name, model in models.items():
        model.save_ply(f"{cfg.out}/{name.lower()}.ply")
    w.print(draw_comparison(f"{cfg.out}/speedy_splat.png", data, view, cameras[view], models, found, look))
    w.print(draw_tiles(f"{cfg.out}/tiles.png"))
    share, before, after = plain["pairs_accutile"] / plain["pairs_vanilla"], *(len(m) for m in models.values())
    exact = max(off[m] for m in TILES if m != "vanilla") < 1e-9
    good = plain["psnr"] >= 28 and pruned["psnr"] >= 27.5 and before >= 3 * after
    scene = "ray-traced scene" if cfg.data == "scene" else cfg.data
    run.claim(
        "AccuTile gives the same image from fewer pairs, and most Gaussians can be pruned",
        "10.6 x fewer Gaussians, 6.5 x the frames per second, PSNR 27.55 -> 26.94 dB (Mip-NeRF 360)",
        f"AccuTile needs {share:.2f} of vanilla's pairs, image {'equal' if exact else 'NOT EQUAL'} to the dense one; "
        f"{before} -> {after} Gaussians ({before / after:.1f} x fewer), "
        f"{frames[-1][-1]:.1f} x the frames per second, PSNR {plain['psnr']:.2f} -> {pruned['psnr']:.2f} dB",
        good and share < 0.75 and exact,
        f"{scene}, {len(cameras)} views of {cameras[0].width} px, {cfg.steps} steps, seed {cfg.seed}, {w.device.type}",
    )


def _ms(t: tuple[float, float], n: int = 1) -> str:
    """Median and spread of n calls' seconds, in milliseconds of one."""
    return f"{1e3 * t[0] / n:.2f} ± {1e3 * t[1] / n:.2f}"


def frame_times(models: dict, cameras: list[Camera], look: dict, w: cluster.World) -> list[list]:
    """Rows, each idea on top of the one before: Gaussians, pairs, milliseconds of a frame (mean over cameras), gain."""
    plain, pruned = models.values()
    rows = {"3D-GS, vanilla tiles": (plain, "vanilla"), "+ SnugBox": (plain, "snugbox"),
            "+ AccuTile": (plain, "accutile"), "+ pixel (ours)": (plain, "pixel"),
            "AccuTile + soft and hard pruning": (pruned, "accutile")}  # fmt: skip

    @torch.no_grad()
    def frames(model, mode):
        return sum(render(model, c, **look | {"tiles": mode}).pairs for c in cameras)

    t, n = report.timed({k: partial(frames, *row) for k, row in rows.items()}, w.device, 5, warmup=1), len(cameras)
    base = t["3D-GS, vanilla tiles"][0]
    return [[k, len(m), frames(m, mode) // n, _ms(t[k], n), base / t[k][0]] for k, (m, mode) in rows.items()]


def draw_comparison(path: str, data: Dataset, view: int, camera: Camera, models: dict, found: dict, look: dict) -> str:
    """Truth, both renderings, error, pairs per tile: one held-out view in one row."""
    truth, tile = data.images[view], look["tile"]
    with torch.no_grad():
        shown = {k: render(m, camera, **look).image.cpu() for k, m in models.items()}
        s = project(models["3D-GS"], camera)
    lengths = {m: bin_pairs(s, camera, tile, m)[1].diff().cpu() for m in ("vanilla", "accutile")}
    images = {
        "ground truth": (truth, f"held-out view {view}, {camera.width} x {camera.height}"),
        **{k: (x, f"{len(models[k])} Gaussians\n{psnr(x, truth):.2f} dB here, {found[k]['psnr']:.2f} dB mean")
           for k, x in shown.items()},
        "error of Speedy-Splat x 4": (4 * (shown["Speedy-Splat"] - truth).abs(), ""),
    }  # fmt: skip

    def draw(figure, axes) -> None:
        """The images side by side, then the pairs per tile of both modes on one scale."""
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, (title, (x, below)) in zip(axes, images.items(), strict=False):
            ax.imshow(x.clamp(0, 1).numpy(), interpolation="bicubic")
            ax.set_title(title, fontsize=11)
            ax.set_xlabel(below, fontsize=10)
        top = float(max(n.max() for n in lengths.values()))
        for ax, (mode, n) in zip(axes[4:], lengths.items(), strict=True):
            drawn = ax.imshow(n.reshape(-1, camera.grid(tile)[0]).numpy(), cmap="magma", vmin=0, vmax=top)
            ax.set_title(f"pairs per tile, {mode}", fontsize=11)
            ax.set_xlabel(f"{int(n.sum())} pairs in this view", fontsize=10)
        bar = figure.colorbar(drawn, ax=list(axes[4:]), fraction=0.025, pad=0.02)
        bar.outline.set_visible(False)

    return report.picture(path, draw, ncols=6, figsize=(20, 3.9), layout="constrained")


def draw_tiles(path: str, tile: int = 16) -> str:
    """One needle Gaussian and the tiles that list it in the four modes."""
    n, u, v, o = 15, 118.0, 121.0, 0.25  # n x n tiles
    R = rotation(torch.tensor([[math.cos(0.3), 0, 0, math.sin(0.3)]], dtype=torch.float64))[0, :2, :2]
    cov = R @ torch.diag(torch.tensor([32.0, 4.2], dtype=torch.float64) ** 2) @ R.T
    (A, B), (_, C) = torch.linalg.inv(cov).tolist()
    y, x = torch.meshgrid(torch.arange(n * tile), torch.arange(n * tile), indexing="ij")
    alpha = o * torch.exp(-(A * (x - u) ** 2 + C * (y - v) ** 2) / 2 - B * (x - u) * (y - v))
    row = lambda *values: torch.tensor([values], dtype=torch.float64)
    splat = row(u, v), row(A, B, C), row(o)[0]
    cells = {m: tile_pairs(*splat, n * tile, n * tile, tile, m)[0].tolist() for m in TILES}

    def draw(figure, axes) -> None:
        """One panel per mode: the Gaussian, its edge, its tiles."""
        for ax, (mode, ids) in zip(axes, cells.items(), strict=True):
            ax.imshow(alpha.numpy(), cmap="Blues", vmin=0, vmax=o)
            for i in ids:
                left, top = i % n * tile - 0.5, i // n * tile - 0.5
                ax.fill_between([left, left + tile], top, top + tile, facecolor="#f28e2b", alpha=0.4, edgecolor="none")
            ax.contour(alpha.numpy(), [ALPHA_MIN], colors="#b5122b", linewidths=1.4)
            lines = [k * tile - 0.5 for k in range(n + 1)]
            ax.set_xticks(lines, [])
            ax.set_yticks(lines, [])
            ax.grid(color="0.8", lw=0.6)
            ax.tick_params(length=0)
            ax.set_title(f"{mode}: {len(ids)} tiles", fontsize=13)
        below = f"One Gaussian of opacity {o}. Red: where alpha falls to 1/255. Orange: the tiles that list it."
        figure.supxlabel(below, fontsize=11)

    return report.picture(path, draw, ncols=4, figsize=(15, 4.3), layout="constrained")


# ---- render, eval, bench


def turntable(cameras: Sequence[Camera], frames: int, size: int) -> list[Camera]:
    """A circle around the point that the cameras look at, at their mean distance and height."""
    float_ = lambda rows: torch.stack([r.float() for r in rows])
    eyes, ahead = float_([c.centre for c in cameras]), float_([c.viewmat[2, :3] for c in cameras])
    up = F.normalize(-float_([c.viewmat[1, :3] for c in cameras]).mean(dim=0), dim=0)
    off = torch.eye(3) - ahead[:, :, None] * ahead[:, None]  # (n, 3, 3) distance from each viewing axis
    target = torch.linalg.lstsq(off.flatten(0, 1), (off @ eyes[:, :, None]).flatten(0, 1)).solution[:, 0]
    away = eyes - target
    height, radius = (away @ up).mean(), (away - (away @ up)[:, None] * up).norm(dim=1).mean()
    side = F.normalize(away[0] - (away[0] @ up) * up, dim=0)
    other, wide = torch.linalg.cross(up, side), max(c.width / c.fx for c in cameras)
    eye = lambda t: target + height * up + radius * (math.cos(t) * side + math.sin(t) * other)
    return [look_at(eye(2 * math.pi * k / frames), target, size / wide, size, up.tolist()) for k in range(frames)]


@torch.no_grad()
def render_frames(cfg: Config, w: cluster.World) -> None:
    """--model as PNG frames: a turntable, or one camera of --data. Frames are divided over ranks."""
    model = GaussianModel.from_ply(cfg.model).to(w.device)
    if cfg.data == "scene":
        cameras = [scene_camera(i, cfg.views, cfg.size) for i in range(cfg.views)]
        background = COLORS.get(cfg.background, SKY)
    else:
        data = load(replace(cfg, init="random", points=1), w)
        cameras, background = data.cameras, data.background
    if not -1 <= cfg.view < len(cameras):
        raise BadInput(f"--view {cfg.view}: {cfg.data} has cameras 0 to {len(cameras) - 1}; -1 is the turntable")
    path = {cfg.view: cameras[cfg.view]} if cfg.view >= 0 else dict(enumerate(turntable(cameras, cfg.frames, cfg.size)))
    for i in report.progress(list(path)[w.rank :: w.size], "frames", w):
        write_png(f"{cfg.out}/frames/{i:04d}.png", render(model, path[i], **cfg.look(background)).image)
    w.print(f"{len(path)} frames of {len(model)} Gaussians: {cfg.out}/frames/")


def evaluate_ply(cfg: Config, w: cluster.World) -> None:
    """PSNR, SSIM and pairs of --model on the held-out views of --data."""
    model, data = GaussianModel.from_ply(cfg.model).to(w.device), load(cfg, w)
    found = evaluate(model, data, cfg.look(data.background), w)
    w.print(report.table(["measure", "value"], [[k, v] for k, v in found.items()]))
    if w.main:
        report.write_json(f"{cfg.out}/eval.json", found)


def random_gaussians(points: Tensor, rgb: Tensor, seed: int) -> GaussianModel:
    """Gaussians at points with log-normal sizes of median 0.01, random turns and opacities, like a capture's."""
    g, n = cluster.generator(seed, 5), len(points)
    opacity = torch.rand(n, 1, generator=g).clamp(1e-4, 1 - 1e-4)
    return GaussianModel(
        means=points, sh_dc=((rgb - 0.5) / SH_C0)[:, None], sh_rest=torch.zeros(n, 0, 3), opacity=opacity.logit(),
        scale=math.log(0.01) + torch.randn(n, 3, generator=g), quat=torch.randn(n, 4, generator=g),
    )  # fmt: skip


def bench(cfg: Config, w: cluster.World) -> None:
    """Pairs and times in the four modes, on a trained model or real points, and against a dense renderer."""
    w.print(report.device_name(w.device))
    cuda, npz = w.device.type == "cuda", cfg.data.endswith(".npz")
    if npz:
        points, rgb, cameras = load_npz(cfg.data)
        here = (points.abs() <= 2).all(dim=1)
        model = random_gaussians(points[here], rgb[here], cfg.seed).to(w.device)
        scenes = {"real points": cameras[0]}
    elif cfg.data != "scene":
        raise BadInput(f"bench measures the ray-traced scene or an .npz, not --data {cfg.data}. Use eval for a folder.")
    elif cuda:
        model = random_gaussians(*random_points(1_000_000, 1.3), cfg.seed).to(w.device)
        scenes = {"1M random": replace(scene_camera(40, 100, 1080), width=1920, cx=960.0)}
    else:
        c = replace(cfg, max_gaussians=cfg.points, steps=300, soft_ratio=0.0, hard_ratio=0.0)
        trainer = Trainer(load(c, w), c, w)
        for _ in report.progress(range(c.steps), "training a model to measure", w):
            trainer.advance()
        model, scenes = trainer.model, {f"{n} px": scene_camera(40, 100, n) for n in (64, 400)}
    found = {"device": report.device_name(w.device), "modes": [], "stages": [], "dense": []}
    for name, camera in scenes.items():
        modes, found["stages"] = bench_modes(name, model, camera, cfg, w)
        found["modes"] += modes
    w.print(f"{len(model)} Gaussians, float32, blending and tiles (projection apart)")
    w.print(report.table(list(found["modes"][0]), [list(r.values()) for r in found["modes"]]))
    w.print(f"\nstages of a frame in mode accutile, {camera.width}x{camera.height}")
    w.print(report.table(["stage", "ms", "floor ms (bytes moved)"], found["stages"]))
    if cuda:
        w.print(bench_gsplat(model, camera, w))
    elif not npz:
        found["dense"] = bench_dense(model, scenes["64 px"], cfg, w)
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", found)


def bench_modes(name: str, model: GaussianModel, camera: Camera, cfg: Config, w: cluster.World) -> tuple[list, list]:
    """Rows per mode: pairs, time to list them, forward, forward + backward of blending and tiles. And rows per stage of
    an AccuTile frame: time, and the time that the bytes which it must move take in a copy."""
    fast, cuda = _fast(cfg.backend, w.device), w.device.type == "cuda"
    tile = 16 if camera.width > 128 or cuda else cfg.tile
    target = torch.rand(camera.height, camera.width, 3, generator=cluster.generator(0)).to(w.device)
    look = torch.no_grad()(partial(project, model, camera))
    s, leaves = look(), ("mean2d", "conic", "opacity", "color")

    def lists(mode: str) -> None:
        """Tiles and order alone."""
        if fast:
            kernels.tile_lists(kernels.table(s), s.depth, s.visible, *camera.size, tile, mode)
        else:
            bin_pairs(s, camera, tile, mode)

    def draw(mode: str, gradients: bool) -> None:
        """Tiles, order and blending of the same splats, and back to them."""
        splats = s._replace(**{k: getattr(s, k).detach().requires_grad_(gradients) for k in leaves})
        image = rasterize(splats, camera, background=SKY, tiles=mode, backend=cfg.backend, tile=tile).image
        if gradients:
            (image * target).sum().backward()

    cases = {("accutile", "project"): look}
    for m in TILES:
        cases |= {(m, "tiles"): partial(lists, m), (m, "forward"): partial(draw, m, False)}
        cases[m, "forward + backward"] = partial(draw, m, True)
    t = report.timed(cases, w.device, 10 if len(model) < 10_000 or cuda else 3, warmup=1)
    pairs, rows = count_pairs(s, camera, tile), []
    for m in TILES:
        row = {"scene": f"{name}, {camera.width}x{camera.height}", "mode": m, "pairs": pairs[m]}
        row["of vanilla"] = pairs[m] / pairs["vanilla"]
        row |= {f"{part} ms": _ms(t[m, part]) for part in ("tiles", "forward", "forward + backward")}
        rows.append(row | {"speed-up": t["vanilla", "forward"][0] / t[m, "forward"][0]})
    project_, tiles, forward = (t["accutile", part][0] for part in ("project", "tiles", "forward"))
    raw, n, speed = sum(x[0].numel() for x in model.raw.values()), pairs["accutile"], report.ceilings(w.device)[0]
    stages = [["project", project_, 4 * (raw + 12) * len(model)], ["tiles, sort", tiles, 40 * n],
              ["blend", forward - tiles, 36 * n + 16 * math.prod(camera.size)]]  # fmt: skip
    return rows, [[stage, 1e3 * seconds, 1e3 * moved / speed] for stage, seconds, moved in stages]


def bench_dense(model: GaussianModel, camera: Camera, cfg: Config, w: cluster.World) -> list[list]:
    """The straightforward renderer, every pixel against every Gaussian with masks, beside ours; the same image."""
    ours = lambda: render(model, camera, **cfg.look(SKY)).image
    dense = lambda: render_dense(model, camera, SKY)

    def both(fn: Callable) -> None:
        """An image and its gradients."""
        for x in model.raw.values():
            x.grad = None
        fn().square().sum().backward()

    cases = {("forward", "dense"): torch.no_grad()(dense), ("forward", "ours"): torch.no_grad()(ours)}
    cases |= {("forward + backward", k): partial(both, f) for k, f in (("dense", dense), ("ours", ours))}
    t, rows = report.timed(cases, w.device, 9), []
    for part in ("forward", "forward + backward"):
        a, b = t[part, "dense"], t[part, "ours"]
        rows.append([f"{part}, projection included", _ms(a), _ms(b), a[0] / b[0]])
    w.print(f"\n{len(model)} Gaussians, {camera.width} px, against every pixel with every Gaussian")
    w.print(report.table(["", "dense ms", "ours ms", "x faster"], rows))
    return rows


def bench_gsplat(model: GaussianModel, camera: Camera, w: cluster.World) -> str:
    """gsplat's CUDA rasteriser on the same Gaussians, where it is installed and can be compiled."""
    try:
        import gsplat

        camera = camera.to(model.means)
        K = torch.tensor([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]], device=w.device)
        inputs = (model.means, model.quat, model.scale.exp().detach(), model.opacity.sigmoid().detach()[:, 0])
        sh = torch.cat([model.sh_dc, model.sh_rest], dim=1).detach()
        size = {"width": camera.width, "height": camera.height, "sh_degree": model.degree}
        same = {"eps2d": 0.3, "near_plane": 0.2, "packed": False, "tile_size": 16}
        theirs = lambda: gsplat.rasterization(*inputs, sh, camera.viewmat[None], K[None], **size, **same)[0]
        ours = lambda: render(model, camera, tile=16).image
        t = report.timed({k: torch.no_grad()(f) for k, f in (("theirs", theirs), ("ours", ours))}, w.device, 50)
        both = {"theirs": lambda: theirs().sum().backward(), "ours": lambda: ours().sum().backward()}
        back = report.timed(both, w.device, 20)
    except Exception as e:  # not installed, no nvcc, another version: each fails in its own way
        return f"gsplat: skipped ({type(e).__name__}: {str(e)[:100]})"
    rows = [[name, *(1e3 * x[k][0] for x in (t, back))] for k, name in (("theirs", "gsplat"), ("ours", "ours"))]
    return report.table([f"against gsplat {gsplat.__version__}", "forward ms", "forward + backward ms"], rows)


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    torch.empty(7_000_000)  # allocated and freed: from now on glibc keeps freed blocks of this size for the next one
    modes = {"demo": demo, "render": render_frames, "eval": evaluate_ply, "bench": bench}
    modes["train"] = lambda cfg, w: train(load(cfg, w), cfg, w)
    with cluster.world(cfg.device) as w:
        modes[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
