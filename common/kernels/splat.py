"""Triton: list projected Gaussians in tiles, blend them front to back, and go back through the blending.

Pairs of a Gaussian and a tile are emitted in depth order, so one stable sort of short tile ids completes the lists. The
backward kernel stores its numbers per pair, where the pair was emitted. There the pairs of one Gaussian are adjacent,
and they are summed in a fixed order: gradients are the same in every run. The torch twins are in speedy_splat.py.
"""

import torch
from torch import Tensor

from common.kernels import need, use_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel
    triton = None

MODES = "vanilla", "snugbox", "accutile"
MAX_PAIRS = 2**31 - 1


if triton is not None:

    @triton.jit
    def _tiles_kernel(
        table_ptr, order_ptr, count_ptr, offset_ptr, tile_ptr, n, columns, rows,
        TILE: tl.constexpr, MODE: tl.constexpr, EMIT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program counts, or with EMIT writes, the tiles of BLOCK Gaussians in depth order. MODE: index into MODES.

        The two builds may round differently: EMIT never leaves the counted slots, and a slot left over is in no list.
        """
        k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = k < n
        i = tl.load(order_ptr + k, mask=here, other=0)
        row = table_ptr + 9 * i
        u, v = tl.load(row, mask=here, other=0.0), tl.load(row + 1, mask=here, other=0.0)
        A, B = tl.load(row + 2, mask=here, other=1.0), tl.load(row + 3, mask=here, other=0.0)
        C, o = tl.load(row + 4, mask=here, other=1.0), tl.load(row + 5, mask=here, other=0.0)
        D = A * C - B * B
        here &= (A > 0) & (C > 0) & (D > 0)
        D = tl.where(here, D, 1.0)
        if MODE == 0:
            mid = (A + C) / (2 * D)
            ex = tl.ceil(3 * tl.sqrt(mid + tl.sqrt(tl.maximum(mid * mid - 1 / D, 0.1))))
            ey = ex
            t = ex * 0
        else:
            here &= o >= 1 / 255
            t = 2 * tl.log(tl.maximum(255 * o, 1.0)) * (1 + 1e-5) + 1e-5
            ex, ey = tl.sqrt(t * C / D), tl.sqrt(t * A / D)
        top, bottom = (v - ey) / TILE, (v + ey) / TILE
        left, right = (u - ex) / TILE, (u + ex) / TILE
        if MODE == 0:  # exclusive ends, truncated towards 0
            bottom = tl.floor(tl.maximum((v + ey + TILE - 1) / TILE, 0.0)) - 1
            right = tl.floor(tl.maximum((u + ex + TILE - 1) / TILE, 0.0)) - 1
        low = tl.minimum(tl.maximum(tl.floor(top), 0.0), rows).to(tl.int32)  # clamped before it becomes an integer
        high = tl.minimum(tl.maximum(tl.floor(bottom), -1.0), rows - 1.0).to(tl.int32)
        low, high = tl.where(here, low, 0), tl.where(here, high, -1)
        ys = -B / C * ex
        count = tl.zeros([BLOCK], tl.int64)
        base, counted = count, count
        if EMIT:
            base = tl.load(offset_ptr + k, mask=here, other=0)
            counted = tl.load(count_ptr + k, mask=here, other=0)
        r = tl.min(low, axis=0)
        last = tl.max(high, axis=0)
        while r <= last:
            first, final = left, right
            on = here & (r >= low) & (r <= high)
            if MODE == 2:
                y0 = tl.maximum(TILE * r - v, -ey)
                y1 = tl.minimum(TILE * (r + 1) - v, ey)
                h = tl.minimum(tl.maximum(ys, y0), y1)
                final = (u + (tl.sqrt(tl.maximum(t * A - D * h * h, 0.0)) - B * h) / A) / TILE
                h = tl.minimum(tl.maximum(-ys, y0), y1)
                first = (u - (tl.sqrt(tl.maximum(t * A - D * h * h, 0.0)) + B * h) / A) / TILE
                on &= y1 >= y0
            c0 = tl.minimum(tl.maximum(tl.floor(first), 0.0), columns).to(tl.int32)
            c1 = tl.minimum(tl.maximum(tl.floor(final), -1.0), columns - 1.0).to(tl.int32)
            width = tl.where(on, tl.maximum(c1 - c0 + 1, 0), 0)
            if EMIT:
                c = 0
                widest = tl.max(width, axis=0)
                while c < widest:
                    fits = (c < width) & (count + c < counted)
                    tl.store(tile_ptr + base + count + c, r * columns + c0 + c, mask=fits)
                    c += 1
            count += width
            r += 1
        if not EMIT:
            tl.store(count_ptr + k, count, mask=k < n)

    @triton.jit
    def _entries(table_ptr, i, inside, x, y, T):
        """K list entries at P pixels: the splats' numbers (1, K); dx, dy, o G, alpha, weight (P, K); T behind them."""
        row = table_ptr + 9 * i
        u, v = tl.load(row, mask=inside, other=0.0), tl.load(row + 1, mask=inside, other=0.0)
        A = tl.load(row + 2, mask=inside, other=0.0)[None, :]
        B = tl.load(row + 3, mask=inside, other=0.0)[None, :]
        C = tl.load(row + 4, mask=inside, other=0.0)[None, :]
        o = tl.load(row + 5, mask=inside, other=0.0)[None, :]
        red = tl.load(row + 6, mask=inside, other=0.0)[None, :]
        green = tl.load(row + 7, mask=inside, other=0.0)[None, :]
        blue = tl.load(row + 8, mask=inside, other=0.0)[None, :]
        dx, dy = u[None, :] - x[:, None], v[None, :] - y[:, None]
        raw = o * tl.exp(tl.minimum(-(A * dx * dx + C * dy * dy) / 2 - B * dx * dy, 0.0))
        alpha = tl.minimum(raw, 0.99)
        alpha = tl.where(alpha >= 1 / 255, alpha, 0.0)
        after = tl.cumprod(1 - alpha, axis=1) * T[:, None]
        w = tl.where(after >= 1e-4, alpha * after / (1 - alpha), 0.0)
        return A, B, C, o, red, green, blue, dx, dy, raw, alpha, w, tl.min(after, axis=1)

    @triton.jit
    def _blend_kernel(
        table_ptr, id_ptr, start_ptr, layer_ptr, width, height, columns, TILE: tl.constexpr, K: tl.constexpr
    ):
        """One program blends one tile, K entries at a time, until the list ends or all its pixels stop."""
        tile = tl.program_id(0)
        p, k = tl.arange(0, TILE * TILE), tl.arange(0, K)
        x, y = tile % columns * TILE + p % TILE, tile // columns * TILE + p // TILE
        at, last = tl.load(start_ptr + tile), tl.load(start_ptr + tile + 1)
        T = tl.full([TILE * TILE], 1.0, tl.float32)
        r = tl.zeros([TILE * TILE], tl.float32)
        g, b, cover = r, r, r
        while (at < last) & (tl.max(T, axis=0) >= 1e-4):
            inside = at + k < last
            i = tl.load(id_ptr + at + k, mask=inside, other=0)
            A, B, C, o, red, green, blue, dx, dy, raw, alpha, w, T = _entries(
                table_ptr, i, inside, x.to(tl.float32), y.to(tl.float32), T
            )
            r += tl.sum(w * red, axis=1)
            g += tl.sum(w * green, axis=1)
            b += tl.sum(w * blue, axis=1)
            cover += tl.sum(w, axis=1)
            at += K
        out, inside = layer_ptr + 4 * (y * width + x), (x < width) & (y < height)
        tl.store(out, r, mask=inside)
        tl.store(out + 1, g, mask=inside)
        tl.store(out + 2, b, mask=inside)
        tl.store(out + 3, cover, mask=inside)

    @triton.jit
    def _back_kernel(
        table_ptr, id_ptr, slot_ptr, start_ptr, grad_ptr, layer_ptr, out_ptr, width, height, columns,
        TILE: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr,
    ):  # fmt: skip
        """One program walks one tile's list again. Per pair: nine gradients, or with SCORE sum of (o dL/dalpha)^2."""
        tile = tl.program_id(0)
        p, k = tl.arange(0, TILE * TILE), tl.arange(0, K)
        x, y = tile % columns * TILE + p % TILE, tile // columns * TILE + p // TILE
        on, pixel = (x < width) & (y < height), 4 * (y * width + x)
        gr = tl.load(grad_ptr + pixel, mask=on, other=0.0)
        gg = tl.load(grad_ptr + pixel + 1, mask=on, other=0.0)
        gb = tl.load(grad_ptr + pixel + 2, mask=on, other=0.0)
        gc = tl.load(grad_ptr + pixel + 3, mask=on, other=0.0)
        ahead = gc * tl.load(layer_ptr + pixel + 3, mask=on, other=0.0)  # sum of w g.c from this entry on
        for c in tl.static_range(3):
            g = tl.load(grad_ptr + pixel + c, mask=on, other=0.0)
            ahead += g * tl.load(layer_ptr + pixel + c, mask=on, other=0.0)
        at, last = tl.load(start_ptr + tile), tl.load(start_ptr + tile + 1)
        T = tl.full([TILE * TILE], 1.0, tl.float32)
        while (at < last) & (tl.max(T, axis=0) >= 1e-4):
            inside = at + k < last
            i = tl.load(id_ptr + at + k, mask=inside, other=0)
            out = out_ptr + tl.load(slot_ptr + at + k, mask=inside, other=0) * (1 if SCORE else 9)
            A, B, C, o, red, green, blue, dx, dy, raw, alpha, w, T = _entries(
                table_ptr, i, inside, x.to(tl.float32), y.to(tl.float32), T
            )
            s = w * (gr[:, None] * red + gg[:, None] * green + gb[:, None] * blue + gc[:, None])
            h = s - (ahead[:, None] - tl.cumsum(s, axis=1)) * (alpha / (1 - alpha))  # alpha dL/dalpha
            h = tl.where(w > 0, h, 0.0)
            ahead -= tl.sum(s, axis=1)
            if SCORE:
                q = h / tl.maximum(alpha, 1 / 255) * o
                tl.store(out, tl.sum(q * q, axis=0), mask=inside)
            else:
                h *= tl.maximum(raw, 0.99) / 0.99  # straight through the clamp at 0.99
                tl.store(out, -tl.sum(h * (A * dx + B * dy), axis=0), mask=inside)
                tl.store(out + 1, -tl.sum(h * (C * dy + B * dx), axis=0), mask=inside)
                tl.store(out + 2, -tl.sum(h * dx * dx, axis=0) / 2, mask=inside)
                tl.store(out + 3, -tl.sum(h * dx * dy, axis=0), mask=inside)
                tl.store(out + 4, -tl.sum(h * dy * dy, axis=0) / 2, mask=inside)
                tl.store(out + 5, tl.sum(h, axis=0) / tl.maximum(tl.sum(o, axis=0), 1e-30), mask=inside)
                tl.store(out + 6, tl.sum(w * gr[:, None], axis=0), mask=inside)
                tl.store(out + 7, tl.sum(w * gg[:, None], axis=0), mask=inside)
                tl.store(out + 8, tl.sum(w * gb[:, None], axis=0), mask=inside)
            at += K


def table(s) -> Tensor:
    """What the kernels take of projected Gaussians: (N, 9), namely u, v, A, B, C, o, r, g, b."""
    return torch.cat([s.mean2d, s.conic, s.opacity[:, None], s.color], dim=1)


def tile_lists(
    table: Tensor, depth: Tensor, visible: Tensor, width: int, height: int, tile: int, mode: str
) -> dict[str, Tensor]:
    """The lists of an image's tiles, from table (N, 9), depth (N,), visible (N,) bool.

    ids (P,) sorted by tile, depth, index; starts (tiles + 1,); slot (P,) where each was emitted; order (V,) the visible
    and finite Gaussians by depth and counts (V,) their pairs. BadInput: mode, tile, dtype, no GPU, or 2^31 pairs.
    """
    need(use_kernels(table.device), f"these kernels need a GPU and the package triton; here is {table.device}")
    need(mode in MODES, f"unknown tiles {mode!r}; choose from {', '.join(MODES)}")
    need(tile in (4, 8, 16), f"tiles on a GPU have 4, 8 or 16 pixels, got {tile}: pass --tile 16")
    need(table.dtype == torch.float32, f"splats on a GPU are float32, got {table.dtype}: convert the model")
    table, columns, rows, device = table.contiguous(), -(-width // tile), -(-height // tile), table.device
    order = (visible & table.isfinite().all(dim=1)).nonzero().flatten()
    order = order[torch.argsort(depth[order], stable=True)]
    n, grid = len(order), (triton.cdiv(len(order), 32),)
    how = {"TILE": tile, "MODE": MODES.index(mode), "BLOCK": 32, "num_warps": 1}
    counts = torch.zeros(n, dtype=torch.int64, device=device)
    _tiles_kernel[grid](table, order, counts, counts, counts, n, columns, rows, EMIT=False, **how)
    total = int(counts.sum())  # the one synchronisation
    need(total <= MAX_PAIRS, f"{len(table)} Gaussians make {total} pairs with tiles, over {MAX_PAIRS}: prune some")
    kind = torch.int16 if columns * rows < 2**15 else torch.int32  # fewer bytes to sort
    tile_id = torch.full((total,), columns * rows, dtype=kind, device=device)  # beyond the last tile
    offsets = counts.cumsum(0) - counts
    _tiles_kernel[grid](table, order, counts, offsets, tile_id, n, columns, rows, EMIT=True, **how)
    ids = torch.repeat_interleave(order, counts, output_size=total)
    tile_id, slot = torch.sort(tile_id, stable=True)
    starts = torch.searchsorted(tile_id, torch.arange(columns * rows + 1, device=device, dtype=kind))
    return {"ids": ids[slot], "starts": starts, "slot": slot, "order": order, "counts": counts}


def _back(table: Tensor, lists: dict, g: Tensor, layer: Tensor, tile: int, score: bool) -> Tensor:
    """Sums per Gaussian, (N, 9) gradients or (N, 1) scores, from dL/dlayer g (H, W, 4)."""
    height, width, _ = layer.shape
    per_pair = table.new_zeros(len(lists["ids"]), 1 if score else 9)  # (P, f) in emission order
    _back_kernel[(len(lists["starts"]) - 1,)](
        table, lists["ids"], lists["slot"], lists["starts"], g.contiguous(), layer, per_pair, width, height,
        -(-width // tile), TILE=tile, K=8, SCORE=score, num_warps=8,
    )  # fmt: skip
    sums = torch.segment_reduce(per_pair, "sum", lengths=lists["counts"], axis=0, unsafe=True)
    return table.new_zeros(len(table), sums.shape[1]).index_copy_(0, lists["order"], sums)


class Blend(torch.autograd.Function):
    """table (N, 9) and its lists -> layer (H, W, 4): colour on black, and coverage 1 - T_final."""

    @staticmethod
    def forward(ctx, table, lists, width, height, tile):
        layer = table.new_zeros(height, width, 4)
        _blend_kernel[(len(lists["starts"]) - 1,)](
            table, lists["ids"], lists["starts"], layer, width, height, -(-width // tile),
            TILE=tile, K=16, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(table, layer)
        ctx.lists, ctx.tile = lists, tile
        return layer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        table, layer = ctx.saved_tensors
        return _back(table, ctx.lists, g, layer, ctx.tile, False), None, None, None, None


def rasterize(s, camera, tile: int, mode: str) -> tuple[Tensor, Tensor]:
    """Splats -> layer (H, W, 4), differentiable in mean2d, conic, opacity and color, and ids (P,) of all pairs."""
    rows = table(s)
    lists = tile_lists(rows.detach(), s.depth.detach(), s.visible, *camera.size, tile, mode)
    return Blend.apply(rows, lists, *camera.size, tile), lists["ids"]


def score(s, camera, tile: int, mode: str, g: Tensor) -> Tensor:
    """Sum over pixels of (o dL/dalpha)^2 per Gaussian, (N,), for one dL/dlayer g (4,) at every pixel."""
    rows = table(s)
    lists = tile_lists(rows, s.depth, s.visible, *camera.size, tile, mode)
    layer = Blend.apply(rows, lists, *camera.size, tile)
    return _back(rows, lists, g.expand_as(layer), layer, tile, True)[:, 0]
