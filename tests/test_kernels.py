"""common/kernels: each kernel equals a plain torch form, refuses what it cannot do, and compiles for GPUs as it should.

    python tests/test_kernels.py        # the table of compiled kernels: registers, shared memory, matrix instructions

The numerics run on a GPU where there is one, and in Triton's interpreter elsewhere.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, needs_kernels

from common import report
from common.cli import BadInput
from common.kernels import cross_entropy, decode_attention, splat, use_kernels
from common.kernels.cross_entropy import masked_cross_entropy

TESTS = Path(__file__).parent
FULL, HALF, FP16 = torch.float32, torch.bfloat16, torch.float16
close = torch.testing.assert_close


def randn(*shape, seed=0, dtype=FULL):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def test_where_the_kernels_run(monkeypatch):
    for interpreter in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreter)
        assert use_kernels(torch.device("cpu")) == (interpreter == "1" and cross_entropy.triton is not None)
        assert use_kernels("cuda:1") == (cross_entropy.triton is not None)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not use_kernels("cuda")


# ---- cross-entropy


@needs_kernels
@pytest.mark.parametrize("dtype", (FULL, HALF, FP16))
@pytest.mark.parametrize("N,V", ((1, 1), (17, 33), (3, 8200)))
def test_cross_entropy(dtype, N, V):
    targets = torch.arange(N, device=DEVICE) * 7 % V
    keep = torch.arange(N, device=DEVICE) % 3 < 2
    logits = (3 * randn(N, V + 5, dtype=dtype))[:, :V]  # rows further apart than they are long
    logits[:, 1 : V // 2] = -math.inf  # a vocabulary of which only a part is in use
    logits[:, -1] = 14  # the maximum grows from block to block
    logits[keep, targets[keep]] = 1
    logits[~keep] = math.nan  # never read
    before = logits.clone()
    mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = masked_cross_entropy(mine * 1, targets, keep)
    want = F.cross_entropy(exact[keep], targets[keep], reduction="sum")
    assert got.dtype == FULL and got.shape == ()
    close(got.double(), want, rtol=1e-5, atol=1e-6)
    (got * 7).backward()  # the gradient that comes in is rarely 1
    (want * 7).backward()
    close(mine.grad, exact.grad.to(dtype), rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)
    assert not mine.grad[~keep].any() and mine.grad.dtype == dtype
    close(logits, before, rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_cross_entropy_of_odd_rows():
    logits, targets = randn(6, 9).requires_grad_(), torch.tensor([0, 8, -1, 9, -100, 3], device=DEVICE)
    keep = torch.tensor([1, 1, 1, 1, 0, 1], device=DEVICE, dtype=torch.bool)
    loss = masked_cross_entropy(logits, targets, keep)
    loss.backward()
    assert loss.isnan() and logits.grad.isnan().all(dim=1).tolist() == [False, False, True, True, False, False]
    good = keep & (targets >= 0) & (targets < 9)
    one = logits[:1].detach().expand(6, 9).requires_grad_()  # one row six times over
    close(masked_cross_entropy(one, targets, good), F.cross_entropy(one[good], targets[good], reduction="sum"))
    none = masked_cross_entropy(logits, targets, keep & False)
    assert none == 0 and not torch.autograd.grad(none, logits)[0].any()
    empty = logits[:0].detach().requires_grad_()
    masked_cross_entropy(empty, targets[:0], keep[:0]).backward()
    assert empty.grad.shape == (0, 9)
    flat = torch.full((1, 9), torch.finfo(FULL).min, device=DEVICE)  # the lowest number, as some masks use
    close(masked_cross_entropy(flat, targets[:1], keep[:1]).item(), math.log(9))


@needs_kernels
@pytest.mark.parametrize("change,message", (
    ({"logits": lambda x: x.double()}, "float64"), ({"logits": lambda x: x.T.contiguous().T}, "stride 4"),
    ({"logits": lambda x: x[None]}, r"\(N, V\)"), ({"logits": lambda x: x[:, :0]}, r"\(N, V\)"),
    ({"targets": lambda x: x.int()}, "torch.int64"), ({"targets": lambda x: x[1:]}, r"targets must be \(4,\)"),
    ({"keep": lambda x: x.long()}, "torch.bool"), ({"keep": lambda x: x[:, None]}, r"keep must be \(4,\)"),
))  # fmt: skip
def test_cross_entropy_refuses(change, message):
    inputs = {"logits": randn(4, 9), "targets": torch.zeros(4, dtype=torch.long, device=DEVICE)}
    inputs["keep"] = inputs["targets"] == 0
    with pytest.raises(BadInput, match=message):
        masked_cross_entropy(**{name: change.get(name, lambda x: x)(x) for name, x in inputs.items()})


# ---- decode attention


@needs_kernels
@pytest.mark.parametrize("q,k", ((FULL, FULL), (FULL, HALF), (HALF, HALF), (HALF, FULL), (FP16, FP16), (FP16, HALF)))
@pytest.mark.parametrize("Hk,R,n,D", ((2, 3, 333, 40), (1, 1, 1, 16), (1, 17, 130, 64), (1, 2, 3, 1)))
def test_scores(q, k, Hk, R, n, D, monkeypatch):
    monkeypatch.setattr(decode_attention, "PROGRAMS", 3)  # several blocks per program
    q = randn(Hk, R, D, dtype=q)
    k = randn(n, Hk, D, seed=1, dtype=k).transpose(0, 1)
    close(decode_attention.scores(q, k).double(), q.double() @ k.double().mT, rtol=1e-5, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("dtype", (FULL, HALF))
def test_scores_have_the_precision_of_fp32(dtype):
    x = 1 + 2.0**-9 + 2.0**-20  # one bf16 holds the 1, two hold 1 + 2^-9
    q, k = torch.tensor([[[x, 1.0]]], device=DEVICE), torch.tensor([[[1.0, -1.0]]], device=DEVICE)
    close(decode_attention.scores(q, k.to(dtype)).item(), x - 1, rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", (FULL, HALF, FP16))
@pytest.mark.filterwarnings("ignore:divide by zero")  # log of an empty sum is meant
@pytest.mark.parametrize("R,k,D", ((3, 200, 40), (1, 1, 16), (2, 130, 128), (2, 0, 16)))
def test_attend(dtype, R, k, D, monkeypatch):
    monkeypatch.setattr(decode_attention, "PROGRAMS", 8)  # several blocks per part, and several parts
    v = randn(250, 2, D, dtype=dtype).transpose(0, 1)  # (Hk, n, D)
    s, index = (x.flip(-1) for x in (4 * randn(2, R, 250, seed=1)).topk(k))  # the maximum grows from block to block
    s[..., 1:2] = -math.inf
    s[1, 0] = -math.inf  # a query without a row
    o, l = decode_attention.attend(s, index, v, 0.3)
    rows = torch.stack([x[i] for x, i in zip(v.double(), index, strict=True)])  # (Hk, R, k, D)
    want = ((0.3 * s.double()).softmax(dim=-1).nan_to_num()[..., None] * rows).sum(dim=2)
    close(o.double(), want, rtol=1e-5, atol=1e-6)
    close(l.double(), (0.3 * s.double()).logsumexp(dim=-1), rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("q,k,message", (
    (randn(2, 3, 16), randn(2, 16, 9).mT, "stride 9 in its last dimension"),
    (randn(2, 3, 16), randn(2, 9, 8), r"k \(2, 9, 8\) does not fit q \(2, 3, 16\)"),
    (randn(2, 3, 16).double(), randn(2, 9, 16), "q is torch.float64"),
    (randn(2, 3, 16), randn(2, 9, 16).double(), "k is torch.float64"),
    (randn(2, 3, 16, dtype=HALF), randn(2, 9, 16, dtype=FP16), "float16 keys need a float16 query"),
    (randn(2, 3, 200), randn(2, 9, 200), "head widths up to 128 in torch.float32"),
))  # fmt: skip
def test_scores_refuse(q, k, message):
    with pytest.raises(BadInput, match=message):
        decode_attention.scores(q, k)


@needs_kernels
def test_attend_refuses():
    s, v = randn(2, 3, 4), randn(2, 9, 16)
    index = torch.zeros(2, 3, 4, dtype=torch.long, device=DEVICE)
    for args, message in (((s, index.int(), v), "int64"), ((s.half(), index, v), "float32"),
                          ((s, index[:1], v), "do not fit"), ((s, index, v.mT), "stride")):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            decode_attention.attend(*args, 1.0)


# ---- splats


class Camera:
    def __init__(self, width, height):
        self.size = width, height


class Splats:
    """n Gaussians around an image, some opaque, some too faint to be listed, a few not visible."""

    def __init__(self, n, width, height):
        g = torch.Generator().manual_seed(n)
        rand = lambda *shape: torch.rand(shape, generator=g)
        size = torch.tensor([width, height])
        angle, (long, short) = 3.2 * rand(n), (1 + 6 * rand(2, n)) ** -2.0
        x, y = angle.cos(), angle.sin()
        conic = torch.stack([long * x**2 + short * y**2, (long - short) * x * y, long * y**2 + short * x**2], dim=1)
        opacity = (1.3 * rand(n)).clamp(max=1) * (torch.arange(n) % 7 > 0)
        self.mean2d, self.conic, self.opacity, self.color, self.depth = (
            x.to(DEVICE)
            for x in ((1.4 * rand(n, 2) - 0.2) * size, conic, opacity, rand(n, 3), rand(n).round(decimals=1))
        )
        self.visible = (torch.arange(n) % 11 > 0).to(DEVICE)


def blend(s, width, height):
    """By definition, in float64 and without tiles: layer (H, W, 4), and G (pixels, V) of the visible Gaussians."""
    order = s.visible.nonzero().flatten()
    order = order[s.depth[order].argsort(stable=True)]
    u, v, A, B, C, o, *_ = table = splat.table(s)[order].double().T
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    dx, dy = u - x.reshape(-1, 1).to(DEVICE), v - y.reshape(-1, 1).to(DEVICE)  # (P, V)
    G = (-(A * dx * dx + C * dy * dy) / 2 - B * dx * dy).exp()
    alpha = o * G
    alpha = alpha + (alpha.clamp(max=0.99) - alpha).detach()  # the clamp does not stop the gradient
    alpha = torch.where(alpha >= 1 / 255, alpha, 0.0)
    after = (1 - alpha).cumprod(dim=1)
    w = torch.where(after >= 1e-4, alpha * after / (1 - alpha), 0.0)
    color = torch.cat([table[6:].T, torch.ones_like(u)[:, None]], dim=1)
    return (w @ color).reshape(height, width, 4), G, order


@needs_kernels
@pytest.mark.parametrize("n,width,height,tile", ((40, 23, 13, 8), (40, 1, 18, 16), (1, 9, 9, 4), (30, 20, 17, 16)))
def test_blending_gradients_and_scores(n, width, height, tile):
    s, camera, weight = Splats(n, width, height), Camera(width, height), randn(height, width, 4)
    leaves = [x.requires_grad_() for x in (s.mean2d, s.conic, s.opacity, s.color)]
    want, G, order = blend(s, width, height)
    exact = torch.autograd.grad((want * weight).sum(), leaves, retain_graph=True)
    for mode in splat.MODES[1:]:  # vanilla misses pairs that contribute
        layer, ids = splat.rasterize(s, camera, tile, mode)
        close(layer.double(), want, rtol=0, atol=2e-5)
        for a, b in zip(torch.autograd.grad((layer * weight).sum(), leaves), exact, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    g = torch.tensor([0.3, -0.2, 0.9, 0.5], device=DEVICE)  # dL/dlayer, the same at every pixel
    (by_pixel,) = torch.autograd.grad((want * g).sum(), G)
    score = torch.zeros(n, device=DEVICE, dtype=torch.double).index_copy_(0, order, by_pixel.square().sum(dim=0))
    with torch.no_grad():
        close(splat.score(s, camera, tile, "accutile", g).double(), score, rtol=1e-4, atol=1e-6)


def unpacked(bits, n, tiles):
    return torch.from_numpy(np.unpackbits(bits, count=n * tiles).reshape(n, tiles).astype(bool))


@needs_kernels
@pytest.mark.parametrize("mode,key", [*zip(splat.MODES, ("vanilla", "snug", "accu"), strict=True)])
def test_tiles_equal_the_reference_vectors(mode, key):
    z = np.load(TESTS / "data/speedy_splat/tiles2d.npz")
    mean2d, conic, opacity = (torch.from_numpy(z[k]) for k in ("mean2d", "conic", "opacity"))
    pick = torch.tensor(sorted({*range(18), *range(0, len(mean2d), 5)}))  # the first 18 are made by hand
    table = torch.cat([mean2d, conic, opacity[:, None], torch.zeros(len(mean2d), 3)], dim=1)[pick].to(DEVICE)
    n, tiles, size = len(pick), 13 * 9, (int(z["width"]), int(z["height"]))
    depth = torch.arange(n, device=DEVICE).flip(0) / 7
    lists = splat.tile_lists(table, depth.float(), depth >= 0, *size, 16, mode)
    ids, tile = lists["ids"].cpu(), torch.repeat_interleave(lists["starts"].diff()).cpu()
    mine = torch.zeros(n, tiles, dtype=torch.bool)
    mine[ids, tile] = True
    assert int(mine.sum()) == len(ids) == lists["counts"].sum(), "a pair was listed twice"
    want, brute = (unpacked(z[f"tiles_{k}"], len(mean2d), tiles)[pick] for k in (key, "brute"))
    assert (mine != want).sum() <= 0.002 * want.sum()
    assert mode == "vanilla" or not (brute & ~mine).any()
    assert ((tile.diff() > 0) | (ids.diff() < 0)).all()  # by tile, then near to far, here the last first
    assert torch.equal(lists["counts"].cpu(), mine.sum(dim=1)[lists["order"].cpu()])


@needs_kernels
def test_speedy_splat_draws_and_scores_alike_with_and_without_them(monkeypatch):
    """The script's own path of a GPU: its cameras, its background, its call of the kernels."""
    import speedy_splat as S

    data = S.procedural_scene(views=9, size=21, points=60)
    start = S.points_to_gaussians(data.points, data.rgb, 3.0)
    model = {k: (x.detach().to(DEVICE) + 0.3 * randn(*x.shape)).requires_grad_() for k, x in start.items()}  # not round
    camera, weight, found = data.cameras[1], randn(21, 21, 3), []
    for on in (False, True):
        monkeypatch.setattr(S, "on_gpu", lambda _, on=on: on)
        image = S.render(model, camera, S.SKY, tile=8)
        grads = torch.autograd.grad((image * weight).sum(), list(model.values()))
        found.append((image.detach(), *grads, S.prune_scores(model, [camera], S.SKY, tile=8)))
    for plain, kernel in zip(*found, strict=True):
        close(kernel, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
    assert found[0][0].std() > 0.05 and (found[0][-1] > 0).any()


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, wherever it is. What is computed from it is an ordinary one."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@needs_kernels
def test_goldfish_and_topk_attention_take_the_kernels_on_a_gpu(monkeypatch):
    """kept_loss, key_scores and KVStore.attend as they are on a GPU, beside their plain forms on the same numbers."""
    import goldfish as G
    import topk_attention as T

    calls, gpu = [], lambda x: x.as_subclass(OnGpu)
    for module, name in (
        (cross_entropy, "masked_cross_entropy"),
        (decode_attention, "scores"),
        (decode_attention, "attend"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, f=real, name=name: calls.append(name) or f(*x))
    logits, keep = randn(2, 9, 33), randn(2, 9) > 0
    targets = torch.arange(18, device=DEVICE).view(2, 9)
    q, k, v, more = (randn(2, n, 16, seed=n) for n in (6, 200, 201, 5))
    store = T.KVStore(DEVICE)
    store.put(0, k, v[:, :200])

    def run(move):
        store.layers[0] = tuple(move(x) for x in store.layers[0])
        loss = G.kept_loss(move(logits), targets, keep)
        return loss, T.key_scores(q, move(k)), store.attend(0, q[:, :3].contiguous(), 8, more, -more)

    with monkeypatch.context() as plain:
        for script in (G, T):
            plain.setattr(script, "use_kernels", lambda _: False)
        want = run(lambda x: x)
    assert not calls
    for mine, other in zip(run(gpu), want, strict=True):
        close(mine, other, rtol=1e-5, atol=1e-6)
    assert {*calls} == {"masked_cross_entropy", "scores", "attend"}


@needs_kernels
@pytest.mark.parametrize("name", ("mean2d", "conic", "opacity", "color"))
def test_a_splat_that_is_not_finite_changes_no_other(name):
    camera, found = Camera(20, 20), []
    for broken in (False, True):
        s = Splats(12, 20, 20)  # its number 5 is in the image
        getattr(s, name)[5] = math.nan if broken else getattr(s, name)[5]
        s.visible[5] &= broken
        leaves = [x.requires_grad_() for x in (s.mean2d, s.conic, s.opacity, s.color)]
        layer, ids = splat.rasterize(s, camera, 8, "accutile")
        layer.sum().backward()
        with torch.no_grad():
            score = splat.score(s, camera, 8, "accutile", torch.ones(4, device=DEVICE))
        found.append((layer.detach(), ids, score, *(x.grad for x in leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@needs_kernels
def test_splats_that_are_nowhere():
    s, camera = Splats(9, 20, 20), Camera(20, 20)
    s.visible[:] = False
    leaf = s.color.requires_grad_()
    layer, ids = splat.rasterize(s, camera, 8, "accutile")
    layer.sum().backward()
    assert not layer.any() and not len(ids) and not leaf.grad.any()
    with torch.no_grad():
        assert not splat.score(s, camera, 8, "accutile", torch.ones(4, device=DEVICE)).any()


@needs_kernels
def test_splats_refuse(monkeypatch):
    s = Splats(20, 29, 21)
    for tile, mode, message in ((32, "snugbox", "4, 8 or 16 pixels, got 32"), (8, "oval", "unknown tiles 'oval'")):
        with pytest.raises(BadInput, match=message):
            splat.rasterize(s, Camera(29, 21), tile, mode)
    monkeypatch.setattr(splat, "MAX_PAIRS", 10)
    with pytest.raises(BadInput, match=r"20 Gaussians make \d+ pairs with tiles, over 10"):
        splat.rasterize(s, Camera(29, 21), 4, "accutile")
    s.color = s.color.double()
    with pytest.raises(BadInput, match="float64"):
        splat.rasterize(s, Camera(29, 21), 8, "accutile")


def test_all_refuse_a_device_without_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, index = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16, dtype=torch.long)
    calls = (
        lambda: masked_cross_entropy(x[0], index[0, :, 0], index[0, :, 0] == 0),
        lambda: decode_attention.scores(x, x),
        lambda: decode_attention.attend(x, index, x, 1.0),
        lambda: splat.tile_lists(x[0, :, :9], x[0, :, 0], x[0, :, 0] == 0, 9, 9, 8, "accutile"),
    )
    for call in calls:
        with pytest.raises(BadInput, match="needs? a GPU"):
            call()


# ---- compiled ahead of time


@functools.cache
def compiled() -> list[dict]:
    """What tests/aot.py finds, in a process of its own: in this one the interpreter may be on."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", TESTS / "aot.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(x: dict) -> str:
    """What is wrong with a compiled kernel; empty if nothing is."""
    if "error" in x:
        return x["error"]
    most = 64 if x["arch"].startswith("gfx") else 99  # KB that every GPU of the kind has
    wrong = {
        f"{x['registers']} registers": x["registers"] > 255,
        f"{x['spilled']} bytes of registers spilled": x["spilled"] > 0,
        f"{x['shared KB']:.0f} KB of shared memory": x["shared KB"] > most,
        "no matrix instructions": x["mma"] < x["dots"],
    }
    return ", ".join(what for what, found in wrong.items() if found)


def table() -> str:
    """All compiled kernels."""
    head = ["kernel", "arch", "registers", "spilled", "shared KB", "mma"]
    rows = [[*(x.get(key, "-") for key in head), x["setting"], faults(x)] for x in compiled()]
    return report.table([*head, "setting", "fault"], rows)


needs_triton = pytest.mark.skipif(cross_entropy.triton is None, reason="needs Triton")


@needs_triton
def test_every_kernel_compiles_without_spills():
    print("\n" + table())
    found = [x for x in compiled() if not x["kernel"].endswith("_mutant")]
    assert not [(x["kernel"], x["arch"], x["setting"], faults(x)) for x in found if faults(x)]
    for file in (cross_entropy, decode_attention, splat):
        for name in vars(file):
            archs = {x["arch"] for x in found if name == "_" + x["kernel"]}
            assert archs == {"sm_80", "sm_90", "gfx942"} or not name.endswith("_kernel"), f"{name} was not compiled"


@needs_triton
@pytest.mark.parametrize("mutant,fault", (("spilling", "bytes of registers spilled"), ("failing", "incompatible")))
def test_compiling_reports_what_is_wrong(mutant, fault):
    found = [faults(x) for x in compiled() if x["kernel"] == f"{mutant}_mutant"]
    assert len(found) == 3 and all(fault in x for x in found), found


if __name__ == "__main__":
    print(table())
