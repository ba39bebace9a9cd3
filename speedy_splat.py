"""Speedy-Splat: Gaussian splatting with exact tiles and pruning, on a CPU or a GPU.

Paper    Hanson, Tu, Lin, Singla, Zwicker, Goldstein, "Speedy-Splat: Fast 3D Gaussian Splatting with Sparse Pixels and
         Sparse Primitives", CVPR 2025, arXiv:2412.00578v3, on Kerbl et al., "3D Gaussian Splatting", arXiv:2308.04079.

    python speedy_splat.py                                          # laptop
"""

from __future__ import annotations

import copy
import functools
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
    centre = -viewmat[:3, :3].T @ viewmat[:3, 3]
    basis = sh_basis(F.normalize(model["means"] - centre, dim=-1), degree)
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

TRAINS = ("demo", "train", "bench")
USER = ("train", "eval", "bench")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "eval", "bench"), positional=True)
    preset: str = opt("auto", "values of the settings that are -1; auto: paper with --data, demo without",
                      choices=("auto", "demo", "gpu", "paper"), modes=USER)  # fmt: skip
    quick: bool = opt(False, "fewer views and steps, coarser numbers, no verdict", modes=("demo",))
    data: str = opt("scene", "a COLMAP folder; scene: the ray-traced one", modes=USER)
    images: str = opt("images", "folder of the pictures below --data, such as images_4", modes=USER)
    model: str = opt("", "the .ply to use; eval: model.ply of --out; bench: trains a small one", modes=("eval", "bench"))
    size: int = opt(-1, "pixels along a side of the ray-traced views")
    views: int = opt(-1, "ray-traced views")
    points: int = opt(-1, "first Gaussians of the ray-traced scene", modes=TRAINS)
    test_every: int = opt(8, "every so many-th view is held out; 0: none")
    steps: int = opt(-1, "optimizer steps; the milestones of growth and pruning scale with it", modes=("demo", "train"))
    lr_scale: float = opt(-1.0, "factor on all learning rates; 1 is the paper's", modes=TRAINS)
    sh_degree: int = opt(-1, "highest degree of the colours' spherical harmonics, 0 to 3", modes=TRAINS)
    sh_every: int = opt(-1, "steps before the degree rises by one", modes=TRAINS)
    max_gaussians: int = opt(-1, "growth stops at so many; 0: never", modes=TRAINS)
    soft_ratio: float = opt(-1.0, "part pruned at each of 3 events of the growth; 0: none", modes=("demo", "train"))
    hard_ratio: float = opt(-1.0, "part pruned at each of 5 events after it; 0: none", modes=("demo", "train"))
    views_per_step: int = opt(0, "views in a step of the whole job; 0: one per process", modes=("train",))
    tile: int = opt(-1, "pixels along a tile's side: 8 suits small pictures, 16 large ones")
    seed: int = opt(0, "seed of the points, the order of views and the splits", modes=TRAINS)
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    out: str = opt("results/speedy_splat", "folder of what the run writes, and of the checkpoint to resume")
    resume: bool = opt(False, "go on from the checkpoint in --out, if there is one", modes=("train",))
    save_every: int = opt(500, "steps between checkpoints; 0 writes only the last", modes=("train",))
    log_every: int = opt(10, "steps between lines in metrics.jsonl", modes=("train",))
    eval_every: int = opt(0, "steps between evaluations; 0: a tenth of the run", modes=("demo", "train"))

    def __post_init__(self):
        if self.preset == "auto":
            self.preset = "demo" if self.data == "scene" else "paper"
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == -1:
                setattr(self, name, value)
        counts = ("size", "views", "points", "steps", "sh_every", "tile", "log_every")
        low = [n for n in counts if getattr(self, n) < 1]
        low += [n for n in ("test_every", "views_per_step", "max_gaussians", "save_every", "eval_every")
                if getattr(self, n) < 0]  # fmt: skip
        shares = {"--soft-ratio": self.soft_ratio, "--hard-ratio": self.hard_ratio}
        off = [f"{name} {x}" for name, x in shares.items() if not 0 <= x < 1]
        for wrong, message in (
            (low, f"{' '.join(cli.spell(n, getattr(self, n)) for n in low)}: give a positive number"),
            (off, f"{' '.join(off)}: give a share in [0, 1); 0 prunes nothing"),
            (not 0 < self.lr_scale < math.inf, f"--lr-scale {self.lr_scale}: give a number above 0"),
            (self.sh_degree not in range(4), f"--sh-degree {self.sh_degree}: give 0, 1, 2 or 3"),
            (self.mode == "bench" and self.data != "scene" and not self.model, "--data needs --model FILE.ply here"),
        ):
            if wrong:
                raise BadInput(message)


SCENE = {"size": 96, "views": 100, "points": 2000}
PRESETS = {
    "demo": SCENE | {
        "steps": 1000, "lr_scale": 4.0, "sh_degree": 1, "sh_every": 250, "max_gaussians": 4000, "soft_ratio": 0.6,
        "hard_ratio": 0.2, "tile": 8,
    },
    "gpu": {  # the ray-traced scene in large; not run here
        "size": 800, "views": 120, "points": 100_000, "steps": 7000, "lr_scale": 1.0, "sh_degree": 3, "sh_every": 1000,
        "max_gaussians": 2_000_000, "soft_ratio": 0.6, "hard_ratio": 0.2, "tile": 16,
    },
    "paper": SCENE | {
        "steps": 30_000, "lr_scale": 1.0, "sh_degree": 3, "sh_every": 1000, "max_gaussians": 0, "soft_ratio": 0.8,
        "hard_ratio": 0.3, "tile": 16,
    },
}  # fmt: skip


# %% the scene: views and points, ray-traced


@dataclass
class Dataset:
    """Views and points. images[i] is (H, W, 3) in 0..1; `test` are the held-out views."""

    cameras: list[Camera]
    images: Sequence
    points: Tensor  # (n, 3)
    rgb: Tensor  # (n, 3) in 0..1
    names: list[str]
    test: list[int] = field(default_factory=list)
    background: tuple = BLACK

    @property
    def train(self) -> list[int]:
        return sorted(set(range(len(self.cameras))) - set(self.test))

    @property
    def extent(self) -> float:
        """1.1 x the largest distance of a training camera from their mean; 1 where all are at one place."""
        centres = torch.stack([self.cameras[i].centre.double() for i in self.train])
        return 1.1 * float((centres - centres.mean(dim=0)).norm(dim=1).max()) or 1.0


def held_out(views: int, every: int = 8) -> list[int]:
    """Every so many-th view; a single view is not held out."""
    return list(range(0, views, every)) if views > 1 and every else []


SKY, LIGHT = (0.62, 0.74, 0.88), (0.5, -0.4, 0.9)
SPHERES = (  # x, y, z, radius, r, g, b
    (0.45, 0.3, 0.5, 0.5, 0.85, 0.25, 0.2), (-0.65, 0.45, 0.35, 0.35, 0.2, 0.55, 0.85),
    (-0.25, -0.75, 0.3, 0.3, 0.95, 0.75, 0.2), (0.75, -0.6, 0.25, 0.25, 0.35, 0.75, 0.35),
    (-0.95, -0.25, 0.22, 0.22, 0.6, 0.35, 0.7), (0.2, -0.15, 0.14, 0.14, 0.95, 0.93, 0.88),
)  # fmt: skip
FLOOR, CHECKER = 1.7, 0.8


def first_hit(origin: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rays (R, 3) with the scene: distance (R,), inf for none; normal (R, 3); colour (R, 3)."""
    t = -origin[:, 2] / d[:, 2]  # the floor, a checkered disc
    x, y = (origin + t[:, None] * d)[:, :2].unbind(dim=-1)
    best = torch.where((t > 1e-4) & (x * x + y * y < FLOOR**2), t, math.inf)
    dark = ((x / CHECKER).floor() + (y / CHECKER).floor()).remainder(2)[:, None] > 0
    color = torch.where(dark, d.new_tensor([0.35, 0.36, 0.4]), d.new_tensor([0.8, 0.78, 0.72]))
    normal = d.new_tensor([0.0, 0.0, 1.0]).expand_as(d)
    for x, y, z, radius, *rgb in SPHERES:
        away = origin - d.new_tensor([x, y, z])
        half, c = (away * d).sum(dim=-1), (away * away).sum(dim=-1) - radius**2
        t = -half - (half**2 - c).clamp(min=0).sqrt()
        nearer = (half**2 > c) & (t > 1e-4) & (t < best)
        best = torch.where(nearer, t, best)
        normal = torch.where(nearer[:, None], (away + t[:, None] * d) / radius, normal)
        color = torch.where(nearer[:, None], d.new_tensor(rgb), color)
    return best, normal, color


def look_at(eye: Tensor, target: Tensor, focal: float, size: int) -> Camera:
    """A square camera at `eye`, its principal point in the centre."""
    forward = F.normalize(target - eye, dim=0)
    right = F.normalize(torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0])), dim=0)
    viewmat = torch.eye(4)
    viewmat[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    viewmat[:3, 3] = -viewmat[:3, :3] @ eye
    return Camera(viewmat, focal, focal, size / 2, size / 2, size, size)


def scene_camera(i: int, views: int, size: int) -> Camera:
    """View i of a golden-angle spiral around the scene, 18 to 60 degrees up, 3.6 away."""
    up, turn = math.radians(18 + 42 * (i + 0.5) / views), i * math.pi * (3 - math.sqrt(5))
    eye = 3.6 * torch.tensor([math.cos(up) * math.cos(turn), math.cos(up) * math.sin(turn), math.sin(up)])
    return look_at(eye, torch.tensor([0.0, 0.0, 0.25]), 1.15 * size, size)


def ray_trace(camera: Camera, device="cpu", samples: int = 3) -> Tensor:
    """(H, W, 6): the scene's colour, the mean of samples^2 rays, and where the central ray hits it, inf for nowhere."""
    viewmat, offsets = camera.viewmat.to(device), [(i - (samples - 1) / 2) / samples for i in range(samples)]
    y, x = (torch.arange(n, device=device) + 0.5 for n in (camera.height, camera.width))
    origin, total = -viewmat[:3, :3].T @ viewmat[:3, 3], 0.0
    sun = F.normalize(torch.tensor(LIGHT, device=device), dim=0)
    for oy, ox in ((oy, ox) for oy in offsets for ox in offsets):
        gy, gx = torch.meshgrid((y + oy - camera.cy) / camera.fy, (x + ox - camera.cx) / camera.fx, indexing="ij")
        d = F.normalize(torch.stack([gx, gy, torch.ones_like(gx)], dim=-1).view(-1, 3), dim=1) @ viewmat[:3, :3]
        t, normal, paint = first_hit(origin.expand_as(d), d)
        point = origin + t.nan_to_num(posinf=0.0)[:, None] * d
        lit = first_hit(point + 1e-3 * normal, sun.expand_as(d))[0].isinf()[:, None]  # in no other thing's shadow
        light = lit * (normal @ sun).clamp(min=0)[:, None]
        shine = lit * (normal * F.normalize(sun - d, dim=1)).sum(dim=-1, keepdim=True).clamp(min=0) ** 40
        color = (paint * (0.3 + 0.7 * light) + 0.15 * shine).clamp(0, 1)
        total = total + torch.where(t.isinf()[:, None], d.new_tensor(SKY), color)
        if ox == oy == 0:
            hit = torch.where(t.isinf()[:, None], math.inf, point)
    return torch.cat([total / samples**2, hit], dim=1).view(camera.height, camera.width, 6)


def procedural_scene(
    views: int = 100, size: int = 64, points: int = 2000, seed: int = 0, device="cpu", every: int = 8,
    w: cluster.World | None = None, show=lambda x: x,
) -> Dataset:  # fmt: skip
    """Six spheres on a checkered disc, seen from all around. The ranks of `w` trace a share each. Points are drawn from
    what the training views hit."""
    cameras, found = [scene_camera(i, views, size) for i in range(views)], torch.zeros(views, size, size, 6)
    for i in show(range(w.rank if w else 0, views, w.size if w else 1)):
        found[i] = ray_trace(cameras[i], device).cpu()
    if w and w.size > 1:
        found = cluster.total(found.to(w.device)).cpu()
    test, g = held_out(views, every), cluster.generator(seed, 1)
    seen = found[[i for i in range(views) if i not in test]].view(-1, 6)
    seen = seen[torch.isfinite(seen[:, 3])]
    seen = seen[torch.randperm(len(seen), generator=g)[:points]]
    start = seen[:, 3:] + 0.01 * torch.randn(len(seen), 3, generator=g)
    names = [f"view_{i:03d}.png" for i in range(views)]
    return Dataset(cameras, list(found[..., :3].contiguous()), start, seen[:, :3].contiguous(), names, test, SKY)


# %% the scene: files

WIDEST = 1600  # pixels of a picture; wider ones are reduced


def unpacker(path: Path):
    """take(format) reads the next values of a little-endian file; take("s") a zero-terminated string."""
    data, at = path.read_bytes(), 0

    def take(fmt: str) -> tuple:
        nonlocal at
        try:
            if fmt == "s":
                start, at = at, data.index(b"\0", at) + 1
                return (data[start : at - 1].decode(errors="replace"),)
            values = struct.unpack_from("<" + fmt, data, at)
            at += struct.calcsize("<" + fmt)
            return values
        except (struct.error, ValueError) as e:
            raise BadInput(f"{path}: it ends at byte {len(data)}, before its contents do: truncated, or no binary "
                           "COLMAP file. Copy it again.") from e  # fmt: skip

    return take


def load_colmap(path: str | Path, images: str = "images", every: int = 8) -> Dataset:
    """A COLMAP folder with a binary model in sparse/0, sparse or itself, and pictures in the folder `images`.

    FileNotFoundError: no model there. BadInput: truncated, cameras with distortion, no views or points."""
    root = Path(path)
    where = [d for d in (root / "sparse" / "0", root / "sparse", root) if (d / "cameras.bin").exists()]
    if not where:
        text = [*root.glob("**/cameras.txt")]
        hint = f" {text[0].parent} holds text: colmap model_converter --output_type BIN" if text else ""
        raise FileNotFoundError(f"{root}: no cameras.bin here or in sparse/0. Is it a COLMAP folder?{hint}")
    take, lenses = unpacker(where[0] / "cameras.bin"), {}
    for _ in range(*take("Q")):
        key, kind, width, height = take("iiQQ")
        if kind not in (0, 1):
            raise BadInput(f"{where[0]}/cameras.bin: camera {key} has distortion (COLMAP's model {kind}). "
                           "Run colmap image_undistorter first.")  # fmt: skip
        f = take("3d" if kind == 0 else "4d")
        lenses[key] = (f[0], *f[-3:], width, height)  # fx, fy, cx, cy
    take, views, points = unpacker(where[0] / "images.bin"), [], []
    for _ in range(*take("Q")):
        _, *pose, key = take("i7di")
        views.append((*take("s"), pose, key))
        take(f"{24 * take('Q')[0]}x")
    take = unpacker(where[0] / "points3D.bin")
    for _ in range(*take("Q")):
        _, *point, _, track = take("Q3d3BdQ")
        take(f"{8 * track}x")
        points.append(point)
    if not views or not points:
        raise BadInput(f"{where[0]}: {len(views)} views and {len(points)} points. A capture needs both.")
    cameras, files = [], []
    for name, pose, key in sorted(views):
        if key not in lenses:
            raise BadInput(f"{where[0]}/images.bin: {name} names camera {key}, which cameras.bin lacks.")
        viewmat = torch.eye(4, dtype=torch.float64)
        viewmat[:3, :3], viewmat[:3, 3] = rotation(torch.tensor([pose[:4]]).double())[0], torch.tensor(pose[4:])
        files.append(root / images / name)
        cameras.append(fit(Camera(viewmat, *lenses[key]), files[-1]))
    points = torch.from_numpy(np.array(points)).float()
    names, test = [name for name, *_ in sorted(views)], held_out(len(views), every)
    return Dataset(cameras, Images(files, cameras), points[:, :3], points[:, 3:] / 255, names, test)


def opened(file: Path):
    """A picture, by Pillow. BadInput: damaged, or with more than 8 bits a channel."""
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("reading pictures needs Pillow. Install it: pip install pillow") from e
    try:
        image = Image.open(file)
    except (OSError, SyntaxError, ValueError) as e:
        raise BadInput(f"{file}: not a picture that Pillow can read ({e})") from e
    if image.mode.startswith("I") or image.mode == "F":
        raise BadInput(f"{file}: {image.mode} has more than 8 bits a channel. Convert it to 8-bit RGB.")
    return image


def fit(camera: Camera, file: Path) -> Camera:
    """The camera at its picture's own size, at most WIDEST. Without a picture it stays as it is."""
    if not file.exists():
        return camera
    width, height = opened(file).size
    return camera.resized(*((width, height) if width <= WIDEST else (WIDEST, round(height * WIDEST / width))))


class Images(Sequence):
    """Pictures read on first use, each at its camera's size, kept as bytes."""

    def __init__(self, files: list[Path], cameras: list[Camera]):
        self.files, self.cameras, self.seen = files, cameras, {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        if i not in self.seen:
            try:
                image = opened(self.files[i]).convert("RGB").resize(self.cameras[i].size, 1)  # 1: Lanczos
            except (OSError, SyntaxError) as e:
                raise BadInput(f"{self.files[i]}: a damaged picture ({e})") from e
            self.seen[i] = torch.from_numpy(np.array(image))
        return self.seen[i].float() / 255


def ply_names(rest: int) -> dict[str, list[str]]:
    """The properties that hold each tensor of a model, in the order of the file; rest: how many f_rest."""
    numbered = lambda name, n: [f"{name}_{i}" for i in range(n)]
    return {"means": ["x", "y", "z"], "normal": ["nx", "ny", "nz"], "sh_dc": numbered("f_dc", 3),
            "sh_rest": numbered("f_rest", rest), "opacity": ["opacity"], "scale": numbered("scale", 3),
            "quat": numbered("rot", 4)}  # fmt: skip


def read_ply(path: str | Path) -> dict:
    """A model from a 3D-GS .ply. Rows that no Gaussian can have are dropped, which a line says. BadInput: no such file."""
    data, mark = Path(path).read_bytes(), b"end_header\n"
    end = data.find(mark)
    head = data[: max(0, end)].decode("ascii", "replace")
    count = re.search(r"^element vertex (\d+)$", head, re.M)
    if not head.startswith("ply\nformat binary_little_endian") or not count:
        raise BadInput(f"{path}: its header is not that of a binary little-endian .ply with vertices.")
    body = head[count.end() :].split("\nelement ")[0]
    kinds = re.findall(r"^property (\S+) (.+)$", body, re.M)
    names, n = [name for _, name in kinds], int(count[1])
    if {kind for kind, _ in kinds} - {"float", "float32"} or len(set(names)) < len(names) or "\nelement " in head[: count.start()]:
        raise BadInput(f"{path}: vertices must come first and have properties of type float, each once.")
    rest = sum(name.startswith("f_rest_") for name in names)
    wanted = ply_names(rest)
    lost = [x for part in wanted for x in wanted[part] if x not in names and part != "normal"]
    if lost or rest not in (0, 9, 24, 45):
        raise BadInput(f"{path}: no 3D-GS file: {f'property {lost[0]} is missing' if lost else f'{rest} f_rest'}")
    if len(data) < end + len(mark) + 4 * n * len(names):
        raise BadInput(f"{path}: it ends at byte {len(data)}, before its {n} vertices do: truncated. Copy it again.")
    table = torch.from_numpy(np.frombuffer(data, "<f4", n * len(names), end + len(mark)).reshape(n, -1).copy())
    raw = {part: table[:, [names.index(x) for x in wanted[part]]] for part in RATES}
    raw["sh_dc"] = raw["sh_dc"][:, None]
    raw["sh_rest"] = rearrange(raw["sh_rest"], "n (c k) -> n k c", c=3)
    good = sane(raw)
    if not good.all():
        print(f"{path}: {int((~good).sum())} of {n} Gaussians dropped: not finite, or a rotation of length 0", flush=True)
    return {name: nn.Parameter(x[good]) for name, x in raw.items()}


def write_ply(path: str | Path, model: dict) -> None:
    """The 62-float layout that viewers read: f_rest colour by colour, always of degree 3."""
    x = {name: t.detach().cpu().float() for name, t in model.items()}
    x["sh_rest"] = rearrange(F.pad(x["sh_rest"], (0, 0, 0, 15 - x["sh_rest"].shape[1])), "n k c -> n (c k)")
    x |= {"sh_dc": x["sh_dc"][:, 0], "normal": torch.zeros_like(x["means"])}
    names = ply_names(45)
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(x['means'])}"]
    head += [f"property float {name}" for part in names.values() for name in part] + ["end_header", ""]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    body = torch.cat([x[part] for part in names], dim=1).numpy().astype("<f4").tobytes()
    Path(f"{path}.tmp").write_bytes("\n".join(head).encode() + body)
    Path(f"{path}.tmp").replace(path)


def load(cfg: Config, w: cluster.World, pictures: bool = True) -> Dataset:
    """The scene that --data names; its pictures are looked for now, not when they are drawn."""
    if cfg.data == "scene":
        show = lambda x: report.progress(x, "ray tracing", w)
        return procedural_scene(cfg.views, cfg.size, cfg.points, cfg.seed, w.device, cfg.test_every, w, show)
    if not Path(cfg.data).is_dir():
        raise FileNotFoundError(f"--data {cfg.data}: no such folder. Give a COLMAP folder, or scene.")
    data = load_colmap(cfg.data, cfg.images, cfg.test_every)
    lost = [file for file in data.images.files if pictures and not file.exists()]
    if lost:
        raise FileNotFoundError(f"{lost[0]} is missing, as are {len(lost) - 1} other pictures. Copy them, or name their "
                                "folder, such as --images images_4.")  # fmt: skip
    if not data.train:
        raise BadInput(f"{cfg.data}: no training views. Pass --test-every 0 to hold out none.")
    return data


# %% training: one process, or replicas that share the views


class Trainer:
    """One run: the model, Adam with a group per tensor, and the schedule of growing and pruning."""

    def __init__(self, data: Dataset, cfg: Config, w: cluster.World):
        self.data, self.cfg, self.w, self.step, self.plan = data, cfg, w, 0, Schedule.of(cfg.steps)
        B = cfg.views_per_step or w.size
        if B % w.size:
            raise BadInput(f"--views-per-step {B} does not divide over {w.size} processes. Pass a multiple of {w.size}, "
                           "or 0 for one view per process.")  # fmt: skip
        self.B, self.factor = B, cfg.lr_scale * math.sqrt(B)  # of the rates for B views a step, arXiv:2406.18533
        show = lambda x: report.progress(x, "first Gaussians", w)
        points, rgb = data.points.to(w.device), data.rgb.to(w.device)
        self.adopt(points_to_gaussians(points, rgb, data.extent, cfg.sh_degree, show))

    def adopt(self, model: dict) -> None:
        """Train this model from here on, with a fresh Adam."""
        self.model, self.capped = model, False
        groups = [{"params": [x], "lr": RATES[name] * self.factor} for name, x in model.items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9**self.B, 0.999**self.B), eps=1e-15, fused=True)
        self.forget()

    def forget(self) -> None:
        """Statistics for growth start anew: sums of |dL/d mean2d| in screen units, and of views that saw a Gaussian."""
        self.gradient, self.seen = torch.zeros(2, len(self.model["means"]), device=self.w.device)

    def state_dict(self) -> dict:
        model = {name: x.detach() for name, x in self.model.items()}
        return {"model": model, "optimizer": self.optimizer.state_dict(), "gradient": self.gradient, "seen": self.seen,
                "step": self.step}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.adopt({name: nn.Parameter(x.to(self.w.device, copy=True)) for name, x in state["model"].items()})
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.gradient, self.seen = (state[n].to(self.w.device, copy=True) for n in ("gradient", "seen"))
        self.step = state["step"]

    def views(self, step: int) -> list[int]:
        """The views of a step: without replacement, reshuffled when used up; a function of seed and step."""
        train, n = self.data.train, len(self.data.train)
        order = lambda epoch: torch.randperm(n, generator=cluster.generator(self.cfg.seed, 3, epoch))
        return [train[int(order(i // n)[i % n])] for i in range((step - 1) * self.B, step * self.B)]

    def look(self) -> dict:
        degree = min(self.cfg.sh_degree, self.step // self.cfg.sh_every)
        return {"background": self.data.background, "tile": self.cfg.tile, "sh_degree": degree}

    def backward(self, views: list[int]) -> Tensor:
        """Gradients and statistics of these views, of which each rank draws a part; returns the mean loss."""
        gradient, seen = torch.zeros_like(self.gradient), torch.zeros_like(self.seen)
        total = torch.zeros((), device=self.w.device)
        for v in views[self.w.rank :: self.w.size]:
            camera = self.data.cameras[v]
            frame = render(self.model, camera, **self.look())
            loss = image_loss(frame.image, self.data.images[v].to(self.w.device)) / self.B
            loss.backward()
            total += loss.detach()
            shown = torch.zeros_like(seen).index_fill(0, frame.ids, 1.0)
            half = frame.mean2d.new_tensor(camera.size) / 2  # the threshold of growth is for a screen 2 wide
            gradient += (self.B * frame.mean2d.grad * half).norm(dim=1) * shown
            seen += shown
        if self.w.size > 1:  # one sum over ranks for all
            parts = [*(x.grad for x in self.model.values()), gradient, seen, total]
            flat = cluster.total(torch.cat([x.flatten() for x in parts]))
            for x, summed in zip(parts, flat.split([x.numel() for x in parts]), strict=True):
                x.copy_(summed.view_as(x))
        self.gradient += gradient
        self.seen += seen
        return total

    def advance(self) -> tuple[Tensor, list[str]]:
        """One step: its loss, and what happened to the set of Gaussians."""
        self.step += 1
        cfg, plan, i = self.cfg, self.plan, self.step
        self.optimizer.param_groups[0]["lr"] = position_lr(i, cfg.steps) * self.data.extent * self.factor
        loss, events = self.backward(self.views(i)), []
        if i in plan.grow:
            events += self.grow()
        if i in plan.soft and cfg.soft_ratio:
            events.append(self.prune("soft", cfg.soft_ratio))
        if i in plan.reset:
            reset_opacity(self.model, self.optimizer)
            events.append("opacity reset")
        if i < cfg.steps:
            self.optimizer.step()
        if i in plan.hard and i < cfg.steps and cfg.hard_ratio:
            events.append(self.prune("hard", cfg.hard_ratio))
        self.optimizer.zero_grad(set_to_none=True)
        return loss, events

    def grow(self) -> list[str]:
        """Clone, split and drop, with the same random numbers on every rank."""
        cfg, n, i = self.cfg, len(self.model["means"]), self.step
        noise = lambda n: torch.randn(n, 2, 3, generator=cluster.generator(cfg.seed, 4, i))
        room, mean = cfg.max_gaussians - n if cfg.max_gaussians else math.inf, self.gradient / self.seen.clamp(min=1)
        wanted, late = int((mean >= 2e-4).sum()), i > self.plan.large
        densify(self.model, self.optimizer, mean, self.data.extent, noise, room, late)
        self.forget()
        if wanted <= room or self.capped:
            return []
        self.capped = True
        return [f"--max-gaussians {cfg.max_gaussians} holds back growth: {wanted} of {n} Gaussians were to multiply"]

    def prune(self, kind: str, ratio: float) -> str:
        """Score on all training views, drop the lowest part on every rank alike."""
        w, n = self.w, len(self.model["means"])
        scores = torch.zeros(n, dtype=torch.float64, device=w.device)  # however the views are split, the sum is one
        for v in self.data.train[w.rank :: w.size]:
            scores += prune_scores(self.model, [self.data.cameras[v]], **self.look())
        keep(self.model, self.optimizer, prune_mask(cluster.total(scores) if w.size > 1 else scores, ratio))
        self.forget()
        return f"{kind} prune {n} -> {len(self.model['means'])}"

    def evaluate(self) -> dict:
        return evaluate(self.model, self.data, self.w, **self.look())


@torch.no_grad()
def evaluate(model: dict, data: Dataset, w: cluster.World, **look) -> dict:
    """Number of Gaussians, and PSNR and SSIM as means over the held-out views (or all), shared by the ranks."""
    views, sums = data.test or data.train, torch.zeros(2, dtype=torch.float64, device=w.device)
    for v in views[w.rank :: w.size]:
        image, truth = render(model, data.cameras[v], **look).image, data.images[v].to(w.device)
        sums += torch.stack([psnr(image, truth), ssim(image.clamp(0, 1), truth)]).double()
    sums = (cluster.total(sums) if w.size > 1 else sums) / len(views)
    return {"gaussians": len(model["means"]), "psnr": sums[0].item(), "ssim": sums[1].item()}


def follow(trainer: Trainer, steps) -> Iterator[tuple]:
    """One step of training for each of `steps`: (loss, what the model was worth at each tenth or {}, events)."""
    every = trainer.cfg.eval_every or max(1, trainer.cfg.steps // 10)
    for _ in steps:
        found = trainer.evaluate() if (trainer.step + 1) % every == 0 else {}  # before the events of the step
        yield *trainer.advance(), found


def train(cfg: Config, w: cluster.World) -> None:
    """One run, with checkpoints; writes metrics.jsonl and model.ply."""
    run, data = report.Run(cfg.out, cfg, w), load(cfg, w)
    trainer = Trainer(data, cfg, w)
    same = {"scene": zlib.crc32(data.points.numpy().tobytes()), "number of views per step": trainer.B}
    w.print(f"{len(data.points)} points, {len(data.train)} training views, {len(data.test)} held out")
    steps = loop.steps(cfg, w, run, {"run": trainer}, cfg.steps, "train", f"{cfg.out}/checkpoint.pt", same)
    for loss, events, found in follow(trainer, steps):
        if found:
            run.log(run="evaluation", step=trainer.step, **found)
        for event in [f"{found['gaussians']} Gaussians, PSNR {found['psnr']:.2f} dB"] * bool(found) + events:
            w.print(f"step {trainer.step}: {event}")
        run.line = {"loss": loss / w.size, "gaussians": len(trainer.model["means"])}
    found = trainer.evaluate()
    if w.main:
        write_ply(f"{cfg.out}/model.ply", trainer.model)
    w.print(f"{cfg.out}/model.ply: {found['gaussians']} Gaussians, PSNR {found['psnr']:.2f} dB")


# %% demo: the claim


def pairs(model: dict, cameras: Sequence[Camera], tile: int) -> dict[str, int]:
    """Pairs of all these views, by mode."""
    splats = [(project(model, c), c) for c in cameras]
    return {mode: sum(len(tile_pairs(s, *c.size, tile, mode)[0]) for s, c in splats) for mode in TILES}


@torch.no_grad()
def measure(trainer: Trainer, rows: list) -> dict:
    """What is shown and judged of a run."""
    data, model = trainer.data, {name: x.detach().cpu() for name, x in trainer.model.items()}
    views = [data.cameras[v] for v in data.test]
    return trainer.evaluate() | {"model": model, "rows": rows, "pairs": pairs(model, views, trainer.cfg.tile)}


@torch.no_grad()
def probe(trainer: Trainer) -> dict:
    """Tests of the trained 3D-GS model: PSNR after half of it is pruned at once by each score, without any training
    after it; the share of AccuTile's pairs at 400 pixels; the largest difference from the dense image."""
    model, data, cfg, g = trainer.model, trainer.data, trainer.cfg, cluster.generator(trainer.cfg.seed, 5)
    scores = {
        "score": prune_scores(model, [data.cameras[v] for v in data.train], **trainer.look()),
        "opacity": model["opacity"].flatten(), "random": torch.rand(len(model["means"]), generator=g),
    }  # fmt: skip
    found = {}
    for name, s in scores.items():
        half = prune_mask(s.to(trainer.w.device), 0.5)
        found[name] = evaluate({k: x[half] for k, x in model.items()}, data, trainer.w, **trainer.look())["psnr"]
    large = pairs(model, [data.cameras[v].resized(400, 400) for v in data.test[:4]], 16)
    exact, camera = {k: x.double() for k, x in model.items()}, data.cameras[data.test[0]]
    dense = render_dense(exact, camera, data.background)
    off = {mode: float((render(exact, camera, data.background, mode, cfg.tile).image - dense).abs().max())
           for mode in TILES}  # fmt: skip
    return {"half": found, "share at 400": large["accutile"] / large["vanilla"], "off": off}


def judge(plain: dict, pruned: dict, capped: dict, probe: dict) -> tuple[bool, str]:
    """(the claim holds, its numbers): bars fixed before the runs."""
    share, half = plain["pairs"]["accutile"] / plain["pairs"]["vanilla"], probe["half"]
    cost = {name: plain["psnr"] - x for name, x in half.items()}
    left = pruned["pairs"]["accutile"] / plain["pairs"]["vanilla"]
    holds = (
        probe["off"]["accutile"] < 1e-9 and share <= 0.75 and probe["share at 400"] <= 0.6
        and cost["score"] < 0.5 and cost["opacity"] - cost["score"] >= 0.3 and cost["random"] - cost["score"] >= 3
        and plain["psnr"] - pruned["psnr"] <= 1.5 and pruned["psnr"] > capped["psnr"] and left <= 1 / 3
    )  # fmt: skip
    return holds, (
        f"same image from {share:.2f} of the pairs; half pruned at once costs {cost['score']:.2f} dB; by opacity "
        f"{cost['opacity']:.2f}, at random {cost['random']:.2f}; {probe['share at 400']:.2f} of the pairs at 400 px; "
        f"{plain['gaussians']} -> {pruned['gaussians']} Gaussians, PSNR {plain['psnr']:.2f} -> {pruned['psnr']:.2f} dB, "
        f"capped {capped['psnr']:.2f}; {left:.2f} of the pairs after both; largest difference {probe['off']['accutile']:.0e}"
    )


def demo(cfg: Config, w: cluster.World) -> None:
    """3D-GS, Speedy-Splat and 3D-GS capped at as many Gaussians: one process trains the first, another the rest.

    Up to the first pruning the first two are one run."""
    if cfg.quick:
        cfg = replace(cfg, size=72, views=56, points=1500, steps=320)
    run, data, lone, found = report.Run(cfg.out, cfg, w), load(cfg, w), cluster.World(0, 1, w.device), {}
    plain = replace(cfg, soft_ratio=0.0, hard_ratio=0.0)

    def fit(trainer: Trainer, name: str, last: int, before: list) -> list:
        steps = report.progress(range(trainer.step, last), name, w)
        rows = [found | {"step": trainer.step, "events": e} for _, e, found in follow(trainer, steps) if found or e]
        return before + rows

    trainer = Trainer(data, plain, lone)
    first = fit(trainer, "both", min(trainer.plan.soft) - 1, [])
    state = copy.deepcopy(trainer.state_dict())
    if w.rank == 0:
        found["3D-GS"] = measure(trainer, fit(trainer, "3D-GS", cfg.steps, first))
        found["probe"] = probe(trainer)
    if w.rank == w.size - 1:
        trainer = Trainer(data, cfg, lone)
        trainer.load_state_dict(state)
        found["Speedy-Splat"] = measure(trainer, fit(trainer, "Speedy-Splat", cfg.steps, first))
        n = found["Speedy-Splat"]["gaussians"]
        trainer = Trainer(replace(data, points=data.points[:n], rgb=data.rgb[:n]), replace(plain, max_gaussians=n), lone)
        found["capped"] = measure(trainer, fit(trainer, "3D-GS, capped", cfg.steps, []))
    parts = [None] * w.size
    dist.all_gather_object(parts, found)
    if not w.main:
        return
    found = {name: x for part in parts for name, x in part.items()}
    probed, runs = found.pop("probe"), found
    for name, f in runs.items():
        for row in f["rows"]:
            run.log(run=name, **row)
        run.log(measured=name, **{k: f[k] for k in ("gaussians", "psnr", "ssim", "pairs")})
    run.log(measured="probe", **probed)
    head = ["run", "Gaussians", "PSNR", "SSIM", *(f"pairs {m}" for m in TILES)]
    w.print("\n" + report.table(head, [[name, f["gaussians"], f["psnr"], f["ssim"], *f["pairs"].values()]
                                       for name, f in runs.items()]))  # fmt: skip
    w.print("\n" + report.table(["half of 3D-GS pruned at once, by", "PSNR"], [[k, x] for k, x in probed["half"].items()]))
    w.print("\nlargest difference from the dense image: " + ", ".join(f"{m} {x:.0e}" for m, x in probed["off"].items()))
    for name in ("3D-GS", "Speedy-Splat"):
        write_ply(f"{cfg.out}/{name.lower()}.ply", runs[name]["model"])
    w.print(draw(f"{cfg.out}/speedy_splat.png", data, runs, cfg.tile))
    if cfg.quick:
        return w.print("quick: no verdict")
    holds, here = judge(runs["3D-GS"], runs["Speedy-Splat"], runs["capped"], probed)
    run.claim("AccuTile draws the same image from fewer pairs, and the score tells which Gaussians can go",
              "6.5 x the frames per second, 10.6 x fewer Gaussians, PSNR 27.55 -> 26.94 dB (Mip-NeRF 360)", here, holds,
              f"{cfg.views} views of {cfg.size} px, {cfg.steps} steps, seed {cfg.seed}, {w.device.type}")  # fmt: skip


@torch.no_grad()
def draw(path: str, data: Dataset, runs: dict, tile: int) -> str:
    """One held-out view: truth, both models, error, pairs per tile."""
    v = data.test[len(data.test) // 2]
    camera, truth, background = data.cameras[v], data.images[v], data.background
    images = {"ground truth": (truth, f"held-out view {v}")}
    for name in ("3D-GS", "Speedy-Splat"):
        image = render(runs[name]["model"], camera, background, "accutile", tile).image
        images[name] = image, f"{runs[name]['gaussians']} Gaussians, {psnr(image, truth):.2f} dB here"
    images["error x 4"] = 4 * (image - truth).abs(), "of Speedy-Splat"
    s = {name: project(runs[name]["model"], camera) for name in ("3D-GS", "Speedy-Splat")}
    maps = {f"{mode}, {name}": tile_lists(s[name], *camera.size, tile, mode)[1].diff()
            for name, mode in (("3D-GS", "vanilla"), ("3D-GS", "accutile"), ("Speedy-Splat", "accutile"))}  # fmt: skip
    top = max(int(n.max()) for n in maps.values())

    def panels(figure, axes) -> None:
        for ax in axes:
            ax.set(xticks=[], yticks=[])
        for ax, (title, (image, below)) in zip(axes, images.items(), strict=False):
            ax.imshow(image.clamp(0, 1).numpy())
            ax.set(title=title, xlabel=below)
        for ax, (title, n) in zip(axes[4:], maps.items(), strict=True):
            shown = ax.imshow(n.view(-1, -(-camera.width // tile)).numpy(), cmap="magma", vmin=0, vmax=top)
            ax.set(title=title, xlabel=f"{int(n.sum())} pairs of a tile and a Gaussian")
        figure.colorbar(shown, ax=list(axes[4:]), fraction=0.02, pad=0.02, label="Gaussians in a tile")

    return report.picture(path, panels, ncols=7, figsize=(22, 3.6), layout="constrained")


# %% eval, bench


@torch.no_grad()
def evaluate_ply(cfg: Config, w: cluster.World) -> None:
    """PSNR, SSIM and pairs of a model on the held-out views, and its pictures of them."""
    model = {name: x.to(w.device) for name, x in read_ply(cfg.model or f"{cfg.out}/model.ply").items()}
    data = load(cfg, w)
    views, look = data.test or data.train, {"background": data.background, "tile": cfg.tile}
    found = evaluate(model, data, w, **look) | {"pairs": pairs(model, [data.cameras[v] for v in views], cfg.tile)}
    for v in views[w.rank :: w.size]:
        image = render(model, data.cameras[v], **look).image.clamp(0, 1).cpu().numpy()
        file = Path(cfg.out, "views", data.names[v]).with_suffix(".png")
        report.picture(file, lambda _, ax, image=image: ax.imshow(image), figsize=(6, 6))
    w.print(report.table(["measure", "value"], [[k, v] for k, v in found.items()]))
    if w.main:
        report.write_json(f"{cfg.out}/eval.json", found)


@torch.no_grad()
def bench(cfg: Config, w: cluster.World) -> None:
    """Whole frames by mode, projection to last pixel: of --model on the held-out views of --data, or of a small model
    of the ray-traced scene at 400 pixels."""
    cluster.alone(w)
    if cfg.model:
        model = {name: x.to(w.device) for name, x in read_ply(cfg.model).items()}
        data = load(cfg, w, pictures=False)
        cameras, tile, background = [data.cameras[v] for v in data.test or data.train], cfg.tile, data.background
    else:
        c = replace(cfg, steps=1000, max_gaussians=cfg.points)
        trainer = Trainer(load(c, w), c, w)
        with torch.enable_grad():
            for _ in follow(trainer, report.progress(range(150), "training a model to measure", w)):
                pass
        model, tile, background = trainer.model, 16, SKY
        cameras = [scene_camera(40, 100, 400)]
    frames = lambda mode: [render(model, c, background, mode, tile) for c in cameras]
    cases = {mode: functools.partial(frames, mode) for mode in TILES}
    if sum(c.width * c.height for c in cameras) * len(model["means"]) < 2**29:
        cases["dense"] = lambda: [render_dense(model, c, background) for c in cameras]
    cases |= gsplat_case(model, cameras, w)
    seconds = report.timed(cases, w.device, repeats=20 if w.device.type == "cuda" else 3, warmup=1)
    count, n = pairs(model, cameras, tile), len(cameras)
    rows = [[name, count.get(name, 0) // n or "-", count[name] / count["vanilla"] if name in count else "-",
             1e3 * t / n, 1e3 * spread / n, seconds["vanilla"][0] / t] for name, (t, spread) in seconds.items()]  # fmt: skip
    title = (f"{report.device_name(w.device)}, float32, {len(model['means'])} Gaussians, {n} views of "
             f"{cameras[0].width} x {cameras[0].height}, tiles of {tile}")  # fmt: skip
    head = ["frame", "pairs", "of vanilla", "ms", "+-", "x faster"]
    w.print(title + "\n" + report.table(head, rows))
    report.write_json(f"{cfg.out}/bench.json", {"title": title, "head": head, "rows": rows})


def gsplat_case(model: dict, cameras: list[Camera], w: cluster.World) -> dict:
    """gsplat's CUDA rasteriser on the same views, where it is installed."""
    try:
        import gsplat
    except ImportError:
        w.print("gsplat is not installed, so it has no row")
        return {}
    shape = (model["means"], model["quat"], model["scale"].exp(), model["opacity"].sigmoid()[:, 0])
    sh = torch.cat([model["sh_dc"], model["sh_rest"]], dim=1)
    look = {"sh_degree": math.isqrt(sh.shape[1]) - 1, "eps2d": DILATION, "near_plane": NEAR, "packed": False}

    def frames() -> None:
        for c in cameras:
            K = sh.new_tensor([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]])
            gsplat.rasterization(*shape, sh, c.viewmat.to(sh)[None], K[None], c.width, c.height, **look)

    return {f"gsplat {gsplat.__version__}": frames}


def main(cfg: Config) -> None:
    cluster.two_processes(cfg)
    torch.set_flush_denormal(True)  # far from its centre a Gaussian is nearly zero, and such numbers are slow
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "eval": evaluate_ply, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
