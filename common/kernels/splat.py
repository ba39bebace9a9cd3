"""Triton: project Gaussians, list them in tiles, blend front to back, and go back through the blending.

Launches of one image: project, count, emit, one stable sort of short tile ids (pairs are emitted in depth order, so
they end up ordered by tile, then depth), blend. The backward kernel walks the lists front to back once more; it stores
nine numbers per pair in the slot where the pair was emitted, and slots of one Gaussian are adjacent, so sums over them
are taken in a fixed order: gradients are the same in every run. Atomic adds are a switch. The torch twins are project,
tile_pairs, Blend and prune_scores in speedy_splat.py. Tested through Triton's interpreter, not yet run on a GPU.
"""

import os

import torch
from torch import Tensor

from common.cli import BadInput

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel
    triton = None

MODES, BACKENDS = ("vanilla", "snugbox", "accutile", "pixel"), ("auto", "torch", "triton")
MAX_PAIRS = 2**31 - 1
FIELDS = 9  # u, v, A, B, C, o, r, g, b of a row of the table


def chosen(backend: str, device: torch.device) -> bool:
    """Whether to take the kernels: auto does on a GPU that has Triton. BadInput: unknown backend, or no Triton here."""
    can = triton is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if backend not in BACKENDS:
        raise BadInput(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    if backend == "triton" and not can:
        raise BadInput(f"backend triton needs a GPU and the package triton; here is {device}. Use backend torch.")
    return backend == "triton" or (backend == "auto" and device.type == "cuda" and can)


if triton is not None:

    @triton.jit
    def _basis_sum(sh_ptr, i, seen, x, y, z, DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, CHANNEL: tl.constexpr):
        """One colour channel: spherical harmonics at (x, y, z) plus 1/2, at least 0. The basis is that of sh_basis."""
        base = sh_ptr + i * COEFFICIENTS * 3 + CHANNEL
        c = 0.28209479177387814 * tl.load(base, mask=seen, other=0.0) + 0.5
        if DEGREE > 0:
            c += -0.4886025119029199 * y * tl.load(base + 3, mask=seen, other=0.0)
            c += 0.4886025119029199 * z * tl.load(base + 6, mask=seen, other=0.0)
            c += -0.4886025119029199 * x * tl.load(base + 9, mask=seen, other=0.0)
        if DEGREE > 1:
            xx, yy, zz = x * x, y * y, z * z
            c += 1.0925484305920792 * x * y * tl.load(base + 12, mask=seen, other=0.0)
            c += -1.0925484305920792 * y * z * tl.load(base + 15, mask=seen, other=0.0)
            c += 0.31539156525252005 * (2 * zz - xx - yy) * tl.load(base + 18, mask=seen, other=0.0)
            c += -1.0925484305920792 * x * z * tl.load(base + 21, mask=seen, other=0.0)
            c += 0.5462742152960396 * (xx - yy) * tl.load(base + 24, mask=seen, other=0.0)
            if DEGREE > 2:
                c += -0.5900435899266435 * y * (3 * xx - yy) * tl.load(base + 27, mask=seen, other=0.0)
                c += 2.890611442640554 * x * y * z * tl.load(base + 30, mask=seen, other=0.0)
                c += -0.4570457994644658 * y * (4 * zz - xx - yy) * tl.load(base + 33, mask=seen, other=0.0)
                c += 0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy) * tl.load(base + 36, mask=seen, other=0.0)
                c += -0.4570457994644658 * x * (4 * zz - xx - yy) * tl.load(base + 39, mask=seen, other=0.0)
                c += 1.445305721320277 * z * (xx - yy) * tl.load(base + 42, mask=seen, other=0.0)
                c += -0.5900435899266435 * x * (xx - 3 * yy) * tl.load(base + 45, mask=seen, other=0.0)
        return tl.maximum(c, 0.0)

    @triton.jit
    def _project_kernel(
        mean_ptr, quat_ptr, scale_ptr, opacity_ptr, sh_ptr, camera_ptr, table_ptr, depth_ptr, visible_ptr, n, fx, fy,
        cx, cy, low_x, high_x, low_y, high_y, DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program projects BLOCK Gaussians. camera: rotation by rows (9), translation (3), centre (3)."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = i < n
        i = i.to(tl.int64)
        r00, r01, r02 = tl.load(camera_ptr), tl.load(camera_ptr + 1), tl.load(camera_ptr + 2)
        r10, r11, r12 = tl.load(camera_ptr + 3), tl.load(camera_ptr + 4), tl.load(camera_ptr + 5)
        r20, r21, r22 = tl.load(camera_ptr + 6), tl.load(camera_ptr + 7), tl.load(camera_ptr + 8)
        mx = tl.load(mean_ptr + 3 * i, mask=here, other=0.0)
        my = tl.load(mean_ptr + 3 * i + 1, mask=here, other=0.0)
        mz = tl.load(mean_ptr + 3 * i + 2, mask=here, other=0.0)
        z = r20 * mx + r21 * my + r22 * mz + tl.load(camera_ptr + 11)
        seen = here & (z > 0.2)
        z = tl.where(seen, z, 1.0)
        x = (r00 * mx + r01 * my + r02 * mz + tl.load(camera_ptr + 9)) / z
        y = (r10 * mx + r11 * my + r12 * mz + tl.load(camera_ptr + 10)) / z
        tx = tl.minimum(tl.maximum(x, low_x), high_x)
        ty = tl.minimum(tl.maximum(y, low_y), high_y)
        jx, jy = fx / z, fy / z  # rows of T = J Rc: j (row 0 or 1 - t row 2)
        t00, t01, t02 = jx * (r00 - tx * r20), jx * (r01 - tx * r21), jx * (r02 - tx * r22)
        t10, t11, t12 = jy * (r10 - ty * r20), jy * (r11 - ty * r21), jy * (r12 - ty * r22)
        qw = tl.load(quat_ptr + 4 * i, mask=seen, other=1.0)
        qx = tl.load(quat_ptr + 4 * i + 1, mask=seen, other=0.0)
        qy = tl.load(quat_ptr + 4 * i + 2, mask=seen, other=0.0)
        qz = tl.load(quat_ptr + 4 * i + 3, mask=seen, other=0.0)
        length = tl.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
        seen &= length > 1e-12
        qw, qx, qy, qz = qw / length, qx / length, qy / length, qz / length
        s0 = tl.exp(tl.load(scale_ptr + 3 * i, mask=seen, other=0.0))
        s1 = tl.exp(tl.load(scale_ptr + 3 * i + 1, mask=seen, other=0.0))
        s2 = tl.exp(tl.load(scale_ptr + 3 * i + 2, mask=seen, other=0.0))
        # columns of the rotation, scaled: the Gaussian's axes; a row of T times each
        a0, a1, a2 = 1 - 2 * (qy * qy + qz * qz), 2 * (qx * qy + qw * qz), 2 * (qx * qz - qw * qy)
        b0, b1, b2 = 2 * (qx * qy - qw * qz), 1 - 2 * (qx * qx + qz * qz), 2 * (qy * qz + qw * qx)
        c0, c1, c2 = 2 * (qx * qz + qw * qy), 2 * (qy * qz - qw * qx), 1 - 2 * (qx * qx + qy * qy)
        m00, m10 = s0 * (t00 * a0 + t01 * a1 + t02 * a2), s0 * (t10 * a0 + t11 * a1 + t12 * a2)
        m01, m11 = s1 * (t00 * b0 + t01 * b1 + t02 * b2), s1 * (t10 * b0 + t11 * b1 + t12 * b2)
        m02, m12 = s2 * (t00 * c0 + t01 * c1 + t02 * c2), s2 * (t10 * c0 + t11 * c1 + t12 * c2)
        a = m00 * m00 + m01 * m01 + m02 * m02 + 0.3
        b = m00 * m10 + m01 * m11 + m02 * m12
        c = m10 * m10 + m11 * m11 + m12 * m12 + 0.3
        det = a * c - b * b
        seen &= (det > 0) & (det < float("inf"))  # false for NaN
        dx, dy, dz = mx - tl.load(camera_ptr + 12), my - tl.load(camera_ptr + 13), mz - tl.load(camera_ptr + 14)
        far = tl.sqrt(dx * dx + dy * dy + dz * dz) + 1e-20
        dx, dy, dz = dx / far, dy / far, dz / far
        row = table_ptr + 9 * i
        tl.store(row, fx * x + cx - 0.5, mask=here)
        tl.store(row + 1, fy * y + cy - 0.5, mask=here)
        tl.store(row + 2, c / det, mask=here)
        tl.store(row + 3, -b / det, mask=here)
        tl.store(row + 4, a / det, mask=here)
        tl.store(row + 5, 1 / (1 + tl.exp(-tl.load(opacity_ptr + i, mask=here, other=0.0))), mask=here)
        red = _basis_sum(sh_ptr, i, seen, dx, dy, dz, DEGREE, COEFFICIENTS, 0)
        green = _basis_sum(sh_ptr, i, seen, dx, dy, dz, DEGREE, COEFFICIENTS, 1)
        blue = _basis_sum(sh_ptr, i, seen, dx, dy, dz, DEGREE, COEFFICIENTS, 2)
        seen &= red + green + blue < float("inf")
        tl.store(row + 6, red, mask=here)
        tl.store(row + 7, green, mask=here)
        tl.store(row + 8, blue, mask=here)
        tl.store(depth_ptr + i, z, mask=here)
        tl.store(visible_ptr + i, seen.to(tl.int8), mask=here)

    @triton.jit
    def _tiles_kernel(
        table_ptr, order_ptr, count_ptr, offset_ptr, tile_ptr, id_ptr, n, columns, rows,
        TILE: tl.constexpr, MODE: tl.constexpr, EMIT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program lists the tiles of BLOCK Gaussians, in depth order. EMIT off: counts; on: writes into its slots.

        MODE: index into MODES. The two builds may round differently: emitting never leaves the counted slots, and a
        slot left over keeps its tile beyond the grid, where no list reaches.
        """
        k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = k < n
        i = tl.load(order_ptr + k, mask=here, other=0)
        row = table_ptr + 9 * i
        u, v = tl.load(row, mask=here, other=0.0), tl.load(row + 1, mask=here, other=0.0)
        A, B = tl.load(row + 2, mask=here, other=1.0), tl.load(row + 3, mask=here, other=0.0)
        C, o = tl.load(row + 4, mask=here, other=1.0), tl.load(row + 5, mask=here, other=0.0)
        D = A * C - B * B
        here &= (A > 0) & (C > 0) & (D > 0) & (tl.abs(u + v + A + C + o) < float("inf"))
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
        REACH: tl.constexpr = TILE - 1 if MODE == 3 else TILE
        if MODE == 0:  # exclusive ends, truncated towards 0
            bottom = tl.floor(tl.maximum((v + ey + TILE - 1) / TILE, 0.0)) - 1
            right = tl.floor(tl.maximum((u + ex + TILE - 1) / TILE, 0.0)) - 1
        if MODE == 3:
            top, left = tl.ceil((v - ey - REACH) / TILE), tl.ceil((u - ex - REACH) / TILE)
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
            if MODE > 1:
                y0 = tl.maximum(TILE * r - v, -ey)
                y1 = tl.minimum(TILE * r + REACH - v, ey)
                h = tl.minimum(tl.maximum(ys, y0), y1)
                final = (u + (tl.sqrt(tl.maximum(t * A - D * h * h, 0.0)) - B * h) / A) / TILE
                h = tl.minimum(tl.maximum(-ys, y0), y1)
                edge = u - (tl.sqrt(tl.maximum(t * A - D * h * h, 0.0)) + B * h) / A
                first = edge / TILE
                if MODE == 3:
                    first = tl.ceil((edge - REACH) / TILE)
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
                    tl.store(id_ptr + base + count + c, i, mask=fits)
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
    def _give(out_ptr, i, slot, inside, value, j: tl.constexpr, FIELDS: tl.constexpr, ATOMIC: tl.constexpr):
        """Number j of K pairs: into their slots, or added to their Gaussians."""
        if ATOMIC:
            tl.atomic_add(out_ptr + i * FIELDS + j, value, mask=inside)
        else:
            tl.store(out_ptr + slot * FIELDS + j, value, mask=inside)

    @triton.jit
    def _back_kernel(
        table_ptr, id_ptr, slot_ptr, start_ptr, grad_ptr, layer_ptr, out_ptr, width, height, columns,
        TILE: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, ATOMIC: tl.constexpr,
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
        ahead = gr * tl.load(layer_ptr + pixel, mask=on, other=0.0)  # sum of w g.c over this entry and all behind it
        ahead += gg * tl.load(layer_ptr + pixel + 1, mask=on, other=0.0)
        ahead += gb * tl.load(layer_ptr + pixel + 2, mask=on, other=0.0)
        ahead += gc * tl.load(layer_ptr + pixel + 3, mask=on, other=0.0)
        at, last = tl.load(start_ptr + tile), tl.load(start_ptr + tile + 1)
        T = tl.full([TILE * TILE], 1.0, tl.float32)
        while (at < last) & (tl.max(T, axis=0) >= 1e-4):
            inside = at + k < last
            i = tl.load(id_ptr + at + k, mask=inside, other=0)
            slot = tl.load(slot_ptr + at + k, mask=inside, other=0)
            A, B, C, o, red, green, blue, dx, dy, raw, alpha, w, T = _entries(
                table_ptr, i, inside, x.to(tl.float32), y.to(tl.float32), T
            )
            s = w * (gr[:, None] * red + gg[:, None] * green + gb[:, None] * blue + gc[:, None])
            h = s - (ahead[:, None] - tl.cumsum(s, axis=1)) * (alpha / (1 - alpha))  # alpha dL/dalpha
            h = tl.where(w > 0, h, 0.0)
            ahead -= tl.sum(s, axis=1)
            if SCORE:
                q = h / tl.maximum(alpha, 1 / 255) * o
                _give(out_ptr, i, slot, inside, tl.sum(q * q, axis=0), 0, 1, ATOMIC)
            else:
                h *= tl.maximum(raw, 0.99) / 0.99  # straight through the clamp at 0.99
                one = tl.sum(o, axis=0)  # (K,)
                _give(out_ptr, i, slot, inside, -tl.sum(h * (A * dx + B * dy), axis=0), 0, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, -tl.sum(h * (C * dy + B * dx), axis=0), 1, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, -tl.sum(h * dx * dx, axis=0) / 2, 2, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, -tl.sum(h * dx * dy, axis=0), 3, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, -tl.sum(h * dy * dy, axis=0) / 2, 4, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, tl.sum(h, axis=0) / tl.maximum(one, 1e-30), 5, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, tl.sum(w * gr[:, None], axis=0), 6, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, tl.sum(w * gg[:, None], axis=0), 7, 9, ATOMIC)
                _give(out_ptr, i, slot, inside, tl.sum(w * gb[:, None], axis=0), 8, 9, ATOMIC)
            at += K


def project_triton(model, camera, sh_degree: int | None = None) -> tuple[Tensor, ...]:
    """The fields of project's Splats, mean2d, depth, conic, opacity, color, visible. Forward only.

    ValueError: a raw tensor is not contiguous float32, or tracks gradients (the torch twin does that).
    """
    sh, degree = torch.cat([model.sh_dc, model.sh_rest], dim=1), model.degree
    inputs, n, device = (model.means, model.quat, model.scale, model.opacity, sh), len(model.means), model.means.device
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError("project_triton has no backward pass. Call it under torch.no_grad(), or use project to train.")
    if any(x.dtype != torch.float32 or not x.is_contiguous() for x in inputs):
        raise BadInput(f"project_triton needs contiguous float32 tensors, got {[str(x.dtype) for x in inputs]}")
    out = torch.empty(n, FIELDS, device=device)
    depth, visible = torch.empty(n, device=device), torch.empty(n, dtype=torch.int8, device=device)
    R, t = camera.viewmat[:3, :3].float(), camera.viewmat[:3, 3].float()
    pose = torch.cat([R.flatten(), t, -R.T @ t]).contiguous().to(device)
    fx, fy, cx, cy = camera.fx, camera.fy, camera.cx, camera.cy
    (width, height), more_x, more_y = camera.size, 0.15 * camera.width / fx, 0.15 * camera.height / fy
    limits = -cx / fx - more_x, (width - cx) / fx + more_x, -cy / fy - more_y, (height - cy) / fy + more_y
    if n:
        _project_kernel[(triton.cdiv(n, 256),)](
            *inputs, pose, out, depth, visible, n, fx, fy, cx, cy, *limits,
            DEGREE=degree if sh_degree is None else min(sh_degree, degree), COEFFICIENTS=sh.shape[1], BLOCK=256,
        )  # fmt: skip
    return out[:, :2], depth, out[:, 2:5], out[:, 5], out[:, 6:], visible.bool()


def table(s) -> Tensor:
    """What the other kernels take of Splats: (N, 9)."""
    return torch.cat([s.mean2d, s.conic, s.opacity[:, None], s.color], dim=1)


def _check(table: Tensor, tile: int, mode: str) -> None:
    if mode not in MODES:
        raise BadInput(f"unknown tiles {mode!r}; choose from {', '.join(MODES)}")
    if tile not in (4, 8, 16, 32):
        raise BadInput(f"the Triton backend takes tiles of 4, 8, 16 or 32 pixels, got {tile}. Use backend torch.")
    if table.dtype != torch.float32:
        raise BadInput(f"the Triton backend computes in float32, got {table.dtype}. Use backend torch.")


def tile_lists_triton(
    table: Tensor, depth: Tensor, visible: Tensor, width: int, height: int, tile: int, mode: str
) -> dict[str, Tensor]:
    """Lists of an image: ids (P,) sorted by tile, depth, index; starts (tiles + 1,); slot (P,) where each was emitted;
    order (V,) the visible Gaussians by depth and counts (V,) their pairs. ValueError: 2^31 pairs or more."""
    _check(table, tile, mode)
    columns, rows, device = -(-width // tile), -(-height // tile), table.device
    order = visible.nonzero().flatten()
    order = order[torch.argsort(depth[order], stable=True)]
    n, block = len(order), 32
    grid = (triton.cdiv(n, block),)
    args = {"TILE": tile, "MODE": MODES.index(mode), "BLOCK": block, "num_warps": 1}
    counts = torch.zeros(n, dtype=torch.int64, device=device)
    if n:
        _tiles_kernel[grid](table, order, counts, counts, counts, counts, n, columns, rows, EMIT=False, **args)
    total = int(counts.sum())  # the one synchronisation
    if total > MAX_PAIRS:
        raise BadInput(
            f"{len(table)} Gaussians make {total} pairs with tiles, over {MAX_PAIRS}; the largest touches "
            f"{int(counts.max())} tiles. Prune, lower the image size, or use larger tiles."
        )
    kind = torch.int16 if columns * rows < 2**15 else torch.int32  # fewer bytes to sort
    tile_id = torch.full((total,), columns * rows, dtype=kind, device=device)
    ids = torch.zeros(total, dtype=torch.int64, device=device)
    if total:
        offsets = counts.cumsum(0) - counts
        _tiles_kernel[grid](table, order, counts, offsets, tile_id, ids, n, columns, rows, EMIT=True, **args)
    tile_id, slot = torch.sort(tile_id, stable=True)
    starts = torch.searchsorted(tile_id, torch.arange(columns * rows + 1, device=device, dtype=kind))
    return {"ids": ids[slot], "starts": starts, "slot": slot, "order": order, "counts": counts}


def _per_gaussian(per_pair: Tensor, lists: dict[str, Tensor], n: int) -> Tensor:
    """(P, f) in emission order -> sums (N, f), added in a fixed order."""
    sums = torch.segment_reduce(per_pair, "sum", lengths=lists["counts"], axis=0, unsafe=True)
    return per_pair.new_zeros(n, per_pair.shape[1]).index_copy_(0, lists["order"], sums)


def _back(table, lists, g, layer, size, tile: int, score: bool, atomics: bool) -> Tensor:
    """Launch _back_kernel: sums per Gaussian, (N, 9) gradients or (N, 1) scores."""
    width, height = size
    fields, columns = 1 if score else FIELDS, -(-width // tile)
    out = table.new_zeros(len(table) if atomics else len(lists["ids"]), fields)
    if not len(lists["ids"]):
        return table.new_zeros(len(table), fields)
    _back_kernel[(len(lists["starts"]) - 1,)](
        table, lists["ids"], lists["slot"], lists["starts"], g.contiguous(), layer, out, width, height, columns,
        TILE=tile, K=16, SCORE=score, ATOMIC=atomics, num_warps=4,
    )  # fmt: skip
    return out if atomics else _per_gaussian(out, lists, len(table))


class BlendTriton(torch.autograd.Function):
    """table (N, 9) and its lists -> layer (H, W, 4): colour on black, and coverage 1 - T_final."""

    @staticmethod
    def forward(ctx, table, lists, width, height, tile, atomics):
        table = table.contiguous()
        layer = table.new_zeros(height, width, 4)
        if len(lists["ids"]):
            _blend_kernel[(len(lists["starts"]) - 1,)](
                table, lists["ids"], lists["starts"], layer, width, height, -(-width // tile), TILE=tile, K=16,
                num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(table, layer)
        ctx.lists, ctx.setting = lists, (width, height, tile, atomics)
        return layer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        table, layer = ctx.saved_tensors
        width, height, tile, atomics = ctx.setting
        grad = _back(table, ctx.lists, g, layer, (width, height), tile, False, atomics)
        return grad, None, None, None, None, None


def rasterize_triton(s, camera, tile: int, mode: str, atomics: bool = False) -> tuple[Tensor, Tensor, int]:
    """Splats -> layer (H, W, 4), tiles per Gaussian (N,), pairs; differentiable in mean2d, conic, opacity, color.

    atomics: sum gradients with atomic adds, whose last bits change from run to run. BadInput: tile, dtype or mode.
    """
    rows = table(s)
    lists = tile_lists_triton(rows.detach(), s.depth.detach(), s.visible, *camera.size, tile, mode)
    layer = BlendTriton.apply(rows, lists, *camera.size, tile, atomics)
    n_tiles = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return layer, n_tiles.index_copy_(0, lists["order"], lists["counts"]), len(lists["ids"])


def score_triton(s, camera, tile: int, mode: str, g: Tensor, atomics: bool = False) -> Tensor:
    """Sum over pixels of (o dL/dalpha)^2 per Gaussian, (N,), for one dL/dlayer g (4,) at every pixel."""
    rows = table(s)
    lists = tile_lists_triton(rows, s.depth, s.visible, *camera.size, tile, mode)
    layer = BlendTriton.apply(rows, lists, *camera.size, tile, atomics)
    return _back(rows, lists, g.expand_as(layer), layer, camera.size, tile, True, atomics)[:, 0]
