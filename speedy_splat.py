"""Speedy-Splat: Gaussian splatting with exact tiles and pruning, on a CPU or a GPU.

Paper    Hanson, Tu, Lin, Singla, Zwicker, Goldstein, "Speedy-Splat: Fast 3D Gaussian Splatting with Sparse Pixels and
         Sparse Primitives", CVPR 2025, arXiv:2412.00578v3, on Kerbl et al., "3D Gaussian Splatting", arXiv:2308.04079.

    python speedy_splat.py                                          # laptop
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import cli, cluster, loop, report
from common.cli import BadInput, opt
from common.kernels import splat as kernels, use_kernels

# %% the method: which tiles a Gaussian touches, what a pixel shows, which Gaussians to prune
#
# u, v     centre of a projected Gaussian, in pixels whose centres are integers       o  its opacity
# A, B, C  its conic: G = exp(-(A dx^2 + 2 B dx dy + C dy^2) / 2) at the distance dx, dy from the centre
# alpha    min(0.99, o G); below 1/255 it is not blended              (arXiv:2308.04079)
# t        the ellipse A dx^2 + 2 B dx dy + C dy^2 = t is where alpha = 1/255         (Section 4.1)


def snugbox(A, B, C, o):
    """t, half width and half height of the ellipse in which a Gaussian is seen: SnugBox. Tensors of one shape."""
    t = 2 * torch.log(255 * o)
    D = A * C - B * B
    return t, torch.sqrt(t * C / D), torch.sqrt(t * A / D)


def accutile(u, v, A, B, C, o, columns: int, rows: int, tile: int) -> Iterator[int]:
    """The tiles that one Gaussian's ellipse touches, row by row: AccuTile. Numbers as 0-d tensors.

    The right edge bulges: in a row of tiles it is furthest right at the height nearest to that of the ellipse's
    right-most point. The left edge is the same, turned by half a circle."""
    if o < 1 / 255:
        return
    t, ex, ey = snugbox(A, B, C, o)
    highest = -B / C * ex  # height of the right-most point
    for r in range(max(0, math.floor((v - ey) / tile)), min(rows - 1, math.floor((v + ey) / tile)) + 1):
        top, bottom = max(tile * r - v, -ey), min(tile * (r + 1) - v, ey)
        h = min(max(-highest, top), bottom)
        left = u - (torch.sqrt((t * A - (A * C - B * B) * h * h).clamp(min=0)) + B * h) / A
        h = min(max(highest, top), bottom)
        right = u + (torch.sqrt((t * A - (A * C - B * B) * h * h).clamp(min=0)) - B * h) / A
        for c in range(max(0, math.floor(left / tile)), min(columns - 1, math.floor(right / tile)) + 1):
            yield r * columns + c


def composite(G: Tensor, o: Tensor, color: Tensor) -> Tensor:
    """Blend front to back: G (..., P, K) of K Gaussians at P pixels, o (..., 1, K), color (..., K, 3) -> (..., P, 3).

    Colours are relative to the background. Eq. 3 of arXiv:2308.04079."""
    raw = o * G
    alpha = raw + (raw.clamp(max=0.99) - raw).detach()  # the clamp does not stop the gradient
    alpha = torch.where(alpha >= 1 / 255, alpha, 0.0)
    alpha = torch.where((1 - alpha.detach()).cumprod(dim=-1) >= 1e-4, alpha, 0.0)  # what would end a pixel is not drawn
    after = (1 - alpha).cumprod(dim=-1)  # light that is left behind each Gaussian
    before = F.pad(after[..., :-1], (1, 0), value=1.0)
    return (alpha * before) @ color


@torch.enable_grad()
def score(G: Tensor, o: Tensor, color: Tensor) -> Tensor:
    """The efficient pruning score, sum over pixels of (dI/dG)^2, where I adds up a pixel's colours: (..., K). Sec. 4.2.

    One derivative gives all of them, since a pixel depends on its own row of G alone."""
    G = G.detach().requires_grad_()
    (slope,) = torch.autograd.grad(composite(G, o.detach(), color.detach()).sum(), G)  # (..., P, K)
    return slope.square().sum(dim=-2)


def prune_mask(scores: Tensor, ratio: float) -> Tensor:
    """Which Gaussians stay, (N,) bool: those above the int(ratio (N - 1))-th lowest score. Ratio 0 keeps all."""
    if not 0 <= ratio < 1:
        raise BadInput(f"the pruning ratio must be in [0, 1), got {ratio}. 0 keeps every Gaussian.")
    scores = scores.nan_to_num(nan=-math.inf)
    keep = scores > scores.sort().values[int(ratio * (len(scores) - 1))] if ratio and len(scores) else scores == scores
    if len(scores) and not keep.any():
        raise BadInput(f"prune would remove all {len(scores)} Gaussians at ratio {ratio}: their scores tie.")
    return keep


# %% what makes it fast: all Gaussians' tiles at once


class Splats(NamedTuple):
    """N projected Gaussians."""

    mean2d: Tensor  # (N, 2) u, v
    depth: Tensor  # (N,)
    conic: Tensor  # (N, 3) A, B, C
    opacity: Tensor  # (N,)
    color: Tensor  # (N, 3)
    visible: Tensor  # (N,) bool: in front of the camera


def vanilla_tiles(u, v, A, B, C, o, tile):
    """3D-GS: the square of three standard deviations of the longer axis, whatever the opacity and the direction."""
    D = A * C - B * B
    middle = (A + C) / (2 * D)
    e = (3 * (middle + (middle**2 - 1 / D).clamp(min=0.1).sqrt()).sqrt()).ceil()
    span = lambda x: (((x - e) / tile).trunc(), ((x + e + tile - 1) / tile).trunc() - 1)
    return span(v), lambda g, r: [end[g] for end in span(u)]


def snugbox_tiles(u, v, A, B, C, o, tile):
    """The box of the ellipse. The opacity is raised a little, so that rounding can add a tile but never lose one."""
    _, ex, ey = snugbox(A, B, C, o * (1 + 1e-5))
    span = lambda x, e: (((x - e) / tile).floor(), ((x + e) / tile).floor())
    return span(v, ey), lambda g, r: [end[g] for end in span(u, ex)]


def accutile_tiles(u, v, A, B, C, o, tile):
    """The tiles that the ellipse touches: accutile() for many Gaussians."""
    t, ex, ey = snugbox(A, B, C, o * (1 + 1e-5))
    highest = -B / C * ex

    def columns(g, r):  # of row r of Gaussian g
        top, bottom = torch.maximum(tile * r - v[g], -ey[g]), torch.minimum(tile * (r + 1) - v[g], ey[g])
        half = lambda h: (t[g] * A[g] - (A * C - B * B)[g] * h * h).clamp(min=0).sqrt()
        low = torch.minimum(torch.maximum(-highest[g], top), bottom)
        high = torch.minimum(torch.maximum(highest[g], top), bottom)
        left, right = u[g] - (half(low) + B[g] * low) / A[g], u[g] + (half(high) - B[g] * high) / A[g]
        return (left / tile).floor(), torch.where(top <= bottom, (right / tile).floor(), -1)

    return (((v - ey) / tile).floor(), ((v + ey) / tile).floor()), columns


TILES = {"vanilla": vanilla_tiles, "snugbox": snugbox_tiles, "accutile": accutile_tiles}


@torch.no_grad()
def tile_pairs(splats: Splats, width: int, height: int, tile: int = 16, mode: str = "accutile") -> tuple[Tensor, Tensor]:
    """All pairs of a tile and a Gaussian that is listed in it, Gaussian by Gaussian: tile (P,), row-major, and row of
    `splats` (P,). Gaussians that are not visible, not finite or no ellipse are in no tile."""
    s, columns, rows = splats, -(-width // tile), -(-height // tile)
    (u, v), (A, B, C), o = s.mean2d.double().T, s.conic.double().T, s.opacity.double()  # double: a needle cancels
    whole = torch.isfinite(u + v + A + B + C + o + s.color.sum(dim=1))
    seen = s.visible & whole & (A > 0) & (C > 0) & (A * C > B * B) & ((o >= 1 / 255) | (mode == "vanilla"))
    seen = seen.nonzero().flatten()
    (first, last), columns_of = TILES[mode](*(x[seen] for x in (u, v, A, B, C, o)), tile)
    first, last = first.clamp(0, rows), last.clamp(-1, rows - 1)
    g, r = runs(first, last)  # (R,) Gaussian and row
    first, last = columns_of(g, r)
    at, c = runs(first.clamp(0, columns), last.clamp(-1, columns - 1))  # (P,)
    return (r[at] * columns + c).long(), seen[g[at]]


def runs(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """For ranges first .. last (n,), some of them empty, written one after another: each element's range and value."""
    lengths = (last - first + 1).clamp(min=0).long()
    run = torch.repeat_interleave(lengths)
    start = first - (lengths.cumsum(dim=0) - lengths)
    return run, start[run] + torch.arange(len(run), device=run.device)


def tile_lists(splats: Splats, width: int, height: int, tile: int, mode: str) -> tuple[Tensor, Tensor]:
    """The pairs sorted by tile, then near to far: Gaussians ids (P,), and where each tile's list starts (tiles + 1,).

    One sort of the depths and a stable one of the tiles, instead of one of long joint keys."""
    order = splats.depth.detach().argsort(stable=True)
    tiles, g = tile_pairs(Splats(*(x[order] for x in splats)), width, height, tile, mode)
    tiles, by = tiles.int().sort(stable=True)
    ends = torch.arange(-(-width // tile) * -(-height // tile) + 1, device=tiles.device, dtype=tiles.dtype)
    return order[g[by]], torch.searchsorted(tiles, ends)


# %% what makes it fast: tiles with lists of about one length are blended together


def gaussian(mean2d: Tensor, conic: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """G at the pixels of a grid: mean2d (..., K, 2), conic (..., K, 3), x (..., X), y (..., Y) -> (..., Y X, K)."""
    u, v = mean2d[..., None, None, :, :].unbind(dim=-1)  # (..., 1, 1, K)
    A, B, C = conic[..., None, None, :, :].unbind(dim=-1)
    dx, dy = u - x[..., None, :, None], v - y[..., :, None, None]  # (..., 1, X, K), (..., Y, 1, K)
    return (-A * dx * dx / 2 - C * dy * dy / 2 - B * dx * dy).exp().flatten(-3, -2)


GROUP, KEEP = 2**17, 2**26  # numbers that a group holds; more of an image than KEEP are computed again going backward


def groups(table: Tensor, ids: Tensor, starts: Tensor, columns: int, tile: int) -> Iterator[tuple]:
    """Tiles (t,), their entries in the table (t, K) and which of them count (t, 1, K), pixels x (t, X), y (t, Y)."""
    length, pixels = starts.diff(), torch.arange(tile, device=ids.device)
    order = length.argsort(descending=True)[: int((length > 0).sum())]
    longest, at, most = length[order].tolist(), 0, GROUP if ids.device.type == "cpu" else 2**24
    while at < len(order):
        tiles = order[at : at + max(1, most // (tile * tile * longest[at]))]
        k, n = torch.arange(longest[at], device=ids.device), length[tiles, None]
        entry = ids[starts[tiles, None] + torch.minimum(k, n - 1)]  # shorter lists repeat their last one, at opacity 0
        x, y = (tiles % columns * tile)[:, None] + pixels, (tiles // columns * tile)[:, None] + pixels
        yield tiles, entry, (k < n)[:, None], x.to(table), y.to(table)
        at += len(tiles)


def unpacked(table: Tensor, entry: Tensor, counts: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G (t, P, K), o (t, 1, K), color (t, K, 3) of a group."""
    rows = table.index_select(0, entry.flatten()).view(*entry.shape, 9)
    mean2d, conic, o, color = rows.split([2, 3, 1, 3], dim=-1)
    return gaussian(mean2d, conic, x, y), o.mT * counts, color


def blend(splats: Splats, ids: Tensor, starts: Tensor, camera: Camera, background: Tensor, tile: int) -> Tensor:
    """The image (H, W, 3): composite() tile by tile."""
    s, (columns, rows) = splats, (-(-size // tile) for size in camera.size)
    table = torch.cat([s.mean2d, s.conic, s.opacity[:, None], s.color - background], dim=1)  # (N, 9)
    paint = lambda *group: composite(*unpacked(table, *group))
    again = torch.is_grad_enabled() and len(ids) * tile * tile > KEEP
    where, parts = [ids[:0]], [table.new_zeros(0, tile * tile, 3)]
    for tiles, *group in groups(table, ids, starts, columns, tile):
        where.append(tiles)
        parts.append(checkpoint(paint, *group, use_reentrant=False) if again else paint(*group))
    image = table.new_zeros(rows * columns, tile * tile, 3).index_copy(0, torch.cat(where), torch.cat(parts))
    image = rearrange(image, "(r c) (y x) d -> (r y) (c x) d", c=columns, y=tile)
    return image[: camera.height, : camera.width] + background


class Frame(NamedTuple):
    image: Tensor  # (H, W, 3)
    mean2d: Tensor  # (N, 2); its .grad is there after a backward pass
    ids: Tensor  # (P,) the Gaussian of each pair with a tile


BLACK = (0.0, 0.0, 0.0)
on_gpu = lambda device: device.type == "cuda" and use_kernels(device)  # there the Triton kernels serve


def render(
    model: dict, camera: Camera, background=BLACK, mode: str = "accutile", tile: int = 16, sh_degree: int = 3,
) -> Frame:  # fmt: skip
    """The model as the camera sees it, differentiable in the model's tensors."""
    s = project(model, camera, sh_degree)
    background = torch.as_tensor(background).to(s.mean2d)
    if s.mean2d.requires_grad:
        s.mean2d.retain_grad()
    if on_gpu(s.mean2d.device):
        layer, ids = kernels.rasterize(s, camera, tile, mode)  # (H, W, 4): colour on black, and coverage
        image = layer[..., :3] + (1 - layer[..., 3:]) * background
    else:
        ids, starts = tile_lists(s, *camera.size, tile, mode)
        image = blend(s, ids, starts, camera, background, tile)
    return Frame(image, s.mean2d, ids)


def render_dense(model: dict, camera: Camera, background=BLACK, sh_degree: int = 3) -> Tensor:
    """The definition: every pixel meets every visible Gaussian. (H, W, 3), some rows of pixels at a time."""
    s = project(model, camera, sh_degree)
    order = s.depth.argsort(stable=True)
    order = order[s.visible[order]]
    background, x = torch.as_tensor(background).to(s.mean2d), torch.arange(camera.width).to(s.mean2d)
    rows = torch.arange(camera.height).to(s.mean2d).split(max(1, 2**23 // (camera.width * max(1, len(order)))))
    look = s.opacity[order][None], s.color[order] - background
    parts = [composite(gaussian(s.mean2d[order], s.conic[order], x, y), *look) for y in rows]
    return torch.cat(parts).view(camera.height, camera.width, 3) + background


@torch.no_grad()
def prune_scores(
    model: dict, cameras: Sequence[Camera], background=BLACK, tile: int = 16, sh_degree: int = 3
) -> Tensor:  # fmt: skip
    """The pruning score, summed over the cameras' views: (N,)."""
    total = torch.zeros_like(model["means"][:, 0])
    background = torch.as_tensor(background).to(total)
    for camera in cameras:
        s = project(model, camera, sh_degree)
        if on_gpu(total.device):
            g = torch.cat([torch.ones_like(background), -background.sum()[None]])  # dI/dlayer, the same at every pixel
            total += kernels.score(s, camera, tile, "accutile", g)
            continue
        ids, starts = tile_lists(s, *camera.size, tile, "accutile")
        table = torch.cat([s.mean2d, s.conic, s.opacity[:, None], s.color - background], dim=1)
        for _, entry, counts, x, y in groups(table, ids, starts, -(-camera.width // tile), tile):
            G, o, color = unpacked(table, entry, counts, x, y)
            inside = ((y < camera.height)[:, :, None] & (x < camera.width)[:, None]).flatten(1)  # (t, P)
            found = score(G * inside[..., None], o, color) * counts[:, 0]  # beyond the border no Gaussian shows
            total.index_add_(0, entry.flatten(), found.flatten())
    return total


# %% the model: Gaussians and their projection

NEAR, DILATION = 0.2, 0.3
RATES = {"means": 1.6e-4, "sh_dc": 2.5e-3, "sh_rest": 2.5e-3 / 20, "opacity": 5e-2, "scale": 5e-3, "quat": 1e-3}
SH_C0, SH_C1 = 0.28209479177387814, 0.4886025119029199
SH_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
SH_C3 = (-0.5900435899266435, 2.890611442640554, -0.4570457994644658, 0.3731763325901154, -0.4570457994644658,
         1.445305721320277, -0.5900435899266435)  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """viewmat (4, 4) world to camera, x right, y down, z forward; focal lengths and principal point in pixels."""

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

    def resized(self, width: int, height: int) -> Camera:
        """The same view on another number of pixels."""
        kx, ky = width / self.width, height / self.height
        return Camera(self.viewmat, self.fx * kx, self.fy * ky, self.cx * kx, self.cy * ky, width, height)


def points_to_gaussians(points: Tensor, rgb: Tensor, extent: float, sh_degree: int = 3, show=lambda x: x) -> dict:
    """One round Gaussian of opacity 0.1 per point (N, 3) of colour rgb (N, 3), as wide as its neighbours are far.

    A model is a dict of raw parameters: means (N, 3); sh_dc (N, 1, 3) and sh_rest (N, k, 3), the colour less 0.5;
    opacity (N, 1) before its sigmoid; scale (N, 3), a logarithm; quat (N, 4), w first, of any length."""
    n = len(points)
    if n == 0:
        raise BadInput("there are no points to start from.")
    side = nearest(points, show).clamp(min=1e-7).sqrt() if n > 1 else points.new_full((1,), 0.01 * extent)
    raw = {
        "means": points, "sh_dc": ((rgb - 0.5) / SH_C0)[:, None],
        "sh_rest": points.new_zeros(n, (sh_degree + 1) ** 2 - 1, 3), "opacity": points.new_full((n, 1), 0.1).logit(),
        "scale": side.log()[:, None].repeat(1, 3), "quat": points.new_tensor([1.0, 0, 0, 0]).repeat(n, 1),
    }  # fmt: skip
    return {name: nn.Parameter(x.float()) for name, x in raw.items()}


def nearest(points: Tensor, show=lambda x: x) -> Tensor:
    """Mean squared distance from each of (N, 3) points to its 3 nearest others, or to all if there are fewer: (N,)."""
    k, found = min(3, len(points) - 1) + 1, []
    for part in show(points.split(max(1, 2**24 // len(points)))):  # never N x N numbers at once
        distance = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distance.topk(k, largest=False).values[:, 1:].square().mean(dim=1))
    return torch.cat(found)


def rotation(quat: Tensor) -> Tensor:
    """Rotation matrices (N, 3, 3) of quaternions (N, 4)."""
    w, x, y, z = F.normalize(quat, dim=-1).unbind(dim=-1)
    entries = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
               2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
               2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]  # fmt: skip
    return rearrange(torch.stack(entries, dim=-1), "n (i j) -> n i j", i=3)


def sh_basis(d: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics of unit directions d (N, 3): (N, (degree + 1)^2)."""
    x, y, z = d.unbind(dim=-1)
    xx, yy, zz, c, e = x * x, y * y, z * z, SH_C2, SH_C3
    basis = [torch.full_like(x, SH_C0), -SH_C1 * y, SH_C1 * z, -SH_C1 * x]
    basis += [c[0] * x * y, c[1] * y * z, c[2] * (2 * zz - xx - yy), c[3] * x * z, c[4] * (xx - yy)]
    basis += [e[0] * y * (3 * xx - yy), e[1] * x * y * z, e[2] * y * (4 * zz - xx - yy)]
    basis += [e[3] * z * (2 * zz - 3 * xx - 3 * yy), e[4] * x * (4 * zz - xx - yy)]
    basis += [e[5] * z * (xx - yy), e[6] * x * (xx - 3 * yy)]
    return torch.stack(basis[: (degree + 1) ** 2], dim=-1)


def project(model: dict, camera: Camera, sh_degree: int = 3) -> Splats:
    """Every Gaussian on the camera's plane (EWA splatting, Eq. 5 of arXiv:2308.04079). Rows that are not visible hold
    harmless numbers."""
    viewmat, fx, fy = camera.viewmat.to(model["means"]), camera.fx, camera.fy
    p = model["means"] @ viewmat[:3, :3].T + viewmat[:3, 3]  # (N, 3)
    visible = p[:, 2].detach() > NEAR
    x, y, z = torch.where(visible[:, None], p, 1.0).unbind(dim=-1)
    mean2d = torch.stack([fx * x / z + camera.cx - 0.5, fy * y / z + camera.cy - 0.5], dim=-1)
    margin_x, margin_y = 0.15 * camera.width / fx, 0.15 * camera.height / fy  # 0.3 tan of half the angle of view
    tx = z * (x / z).clamp(-camera.cx / fx - margin_x, (camera.width - camera.cx) / fx + margin_x)
    ty = z * (y / z).clamp(-camera.cy / fy - margin_y, (camera.height - camera.cy) / fy + margin_y)
    J = torch.stack([fx / z, 0 * z, -fx * tx / z**2, 0 * z, fy / z, -fy * ty / z**2], dim=-1)
    T = rearrange(J, "n (i j) -> n i j", i=2) @ viewmat[:3, :3]  # (N, 2, 3)
    M = T @ rotation(model["quat"]) * model["scale"].exp()[:, None]  # T R diag(s)
    a, b, c = (M[:, 0] ** 2).sum(-1) + DILATION, (M[:, 0] * M[:, 1]).sum(-1), (M[:, 1] ** 2).sum(-1) + DILATION
    visible = visible & (a * c > b * b)
    conic = torch.stack([c, -b, a], dim=-1) / torch.where(visible, a * c - b * b, 1.0)[:, None]
    sh = torch.cat([model["sh_dc"], model["sh_rest"]], dim=1)
    degree = min(sh_degree, math.isqrt(sh.shape[1]) - 1)
    basis = sh_basis(F.normalize(model["means"] - camera.centre.to(p), dim=-1), degree)
    color = (torch.einsum("nk,nkc->nc", basis, sh[:, : (degree + 1) ** 2]) + 0.5).clamp(min=0)
    return Splats(mean2d, z, conic, model["opacity"].sigmoid().flatten(), color, visible)


# %% 3D-GS: loss, schedule, growth


def blur(x: Tensor) -> Tensor:
    """11 x 11 Gaussian window of standard deviation 1.5, zeros outside: x (B, H, W)."""

    def weights(n: int) -> Tensor:  # (n, n): a matrix product each way, no convolution's set-up
        distance = torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)
        window = torch.exp(-(torch.arange(-5, 6) ** 2) / (2 * 1.5**2)).sum()
        return (torch.exp(-(distance**2) / (2 * 1.5**2)) * (distance.abs() <= 5) / window).to(x)

    return weights(x.shape[1]) @ x @ weights(x.shape[2])


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of two images (H, W, 3): the mean over pixels and colours."""
    a, b = a.movedim(-1, 0), b.movedim(-1, 0)
    mu_a, mu_b, aa, bb, ab = blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    top = (2 * mu_a * mu_b + 0.01**2) * (2 * (ab - mu_a * mu_b) + 0.03**2)
    return (top / ((mu_a**2 + mu_b**2 + 0.01**2) * (aa - mu_a**2 + bb - mu_b**2 + 0.03**2))).mean()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """-10 log10 of the mean squared error of two images, in dB."""
    return -10 * torch.log10((a.clamp(0, 1) - b.clamp(0, 1)).square().mean())


def image_loss(image: Tensor, truth: Tensor) -> Tensor:
    """0.8 L1 + 0.2 (1 - SSIM), Eq. 7 of arXiv:2308.04079."""
    return 0.8 * (image - truth).abs().mean() + 0.2 * (1 - ssim(image, truth))


def position_lr(i: int, steps: int = 30_000) -> float:
    """Log-linear from 1.6e-4 to 1.6e-6 over the run, before the scene's extent comes in."""
    t = min(max(i / steps, 0), 1)
    return math.exp((1 - t) * math.log(1.6e-4) + t * math.log(1.6e-6))


class Schedule(NamedTuple):
    """When what happens, in steps counted from 1. At 30000 steps these are the paper's numbers; they scale with it."""

    grow: set
    reset: set
    soft: set
    hard: set
    large: int  # from here on Gaussians that are large in space are removed

    @classmethod
    def of(cls, steps: int) -> Schedule:
        at = lambda i: round(i * steps / 30_000)
        every, soft = max(25, at(100)), {at(i) for i in (6000, 9000, 12_000)}
        reset = {at(3000), *soft} if at(3000) >= 60 else set()  # recovery from a reset takes so many steps
        grow = {i for i in range(every, at(15_000), every) if i > at(500)} | soft
        return cls(grow, reset, soft, {at(i) for i in range(15_000, 30_000, 3000)}, at(3000))


def swap(model: dict, optimizer, name: str, new: Tensor, moments) -> None:
    """Put `new` in the place of a model's tensor, and moments(m) in the place of its Adam moments m."""
    old, model[name] = model[name], nn.Parameter(new)
    for group in optimizer.param_groups if optimizer else ():
        if group["params"][0] is old:
            state = optimizer.state.pop(old, {})
            optimizer.state[model[name]] = {k: m if k == "step" else moments(m) for k, m in state.items()}
            group["params"] = [model[name]]


def keep(model: dict, optimizer, mask: Tensor) -> None:
    """Drop the Gaussians where mask (N,) is False."""
    if len(mask) and not mask.any():
        raise BadInput("no Gaussian is left. Lower --lr-scale, and check the capture's scale: depths under "
                       f"{NEAR} units are not drawn.")  # fmt: skip
    for name, x in list(model.items()):
        swap(model, optimizer, name, x.detach()[mask], lambda m: m[mask])


def append(model: dict, optimizer, rows: dict) -> None:
    """Add Gaussians at the end; their Adam moments begin at zero."""
    for name, x in list(model.items()):
        fresh = torch.zeros_like(rows[name])
        swap(model, optimizer, name, torch.cat([x.detach(), rows[name]]), lambda m, fresh=fresh: torch.cat([m, fresh]))


def sane(model: dict) -> Tensor:
    """(N,) bool: finite, and with a direction."""
    whole = torch.isfinite(sum(x.detach().flatten(1).sum(dim=1) for x in model.values()))
    return whole & (model["quat"].detach().norm(dim=1) > 1e-12)


@torch.no_grad()
def densify(model: dict, optimizer, gradient: Tensor, extent: float, noise, room: float, drop_large: bool) -> tuple:
    """Clone small and split large Gaussians whose mean gradient (N,) is 2e-4 or more, then drop faint and broken ones.

    noise(N) gives (N, 2, 3) normal numbers, `room` is how many may be added. Returns (cloned, split, dropped)."""
    chosen, scale = gradient >= 2e-4, model["scale"].exp()
    if int(chosen.sum()) > room:  # the largest gradients first
        chosen = torch.zeros_like(chosen).index_fill(0, gradient.topk(max(0, int(room))).indices, True) & chosen
    small = scale.amax(dim=1) <= 0.01 * extent
    clone, split = chosen & small, chosen & ~small
    children = {name: x.detach()[split].repeat_interleave(2, dim=0) for name, x in model.items()}
    offset = noise(len(scale)).to(scale)[split].flatten(0, 1) * children["scale"].exp()  # (2 n, 3)
    children["means"] += (rotation(children["quat"]) @ offset[..., None])[..., 0]
    children["scale"] -= math.log(1.6)
    copies = {name: x.detach()[clone] for name, x in model.items()}
    append(model, optimizer, {name: torch.cat([copies[name], children[name]]) for name in model})
    stays = F.pad(~split, (0, len(model["means"]) - len(split)), value=True)
    keep(model, optimizer, stays)
    good = (model["opacity"].sigmoid().flatten() >= 0.005) & sane(model)
    if drop_large:
        good &= model["scale"].exp().amax(dim=1) <= 0.1 * extent
    keep(model, optimizer, good)
    return int(clone.sum()), int(split.sum()), int((~good).sum())


@torch.no_grad()
def reset_opacity(model: dict, optimizer) -> None:
    """Opacities fall to at most 0.01, and their Adam moments to 0."""
    swap(model, optimizer, "opacity", model["opacity"].detach().clamp(max=math.log(0.01 / 0.99)), torch.zeros_like)


# %% settings
