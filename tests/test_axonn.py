"""axonn.py: every grid against one plain PyTorch process, overlap, bytes, state, ranking, verdict, ranks, bad input."""

import copy
import json
import math
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import finish, run_ranks, start_ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import axonn as A
from common import cli, cluster
from common.weights import open_weights

GPT = A.GPTConfig(2, 32, 8, vocab=64, seq=12, dtype="float64", init_std=0.2)
LLAMA = replace(GPT, llama=True, tied=True, d_ff=40)
TIGHT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture(autouse=True)
def no_group_stays_behind():
    """A Grid without torchrun makes a group of one process; other tests expect none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def whole(model) -> dict:
    """{name: whole tensor} of a model on a grid of one."""
    held = [(parts, p.detach().split([b.box[0].stop for b in parts])) for p, parts in A.stored(model).items()]
    return {part.name: t for parts, tensors in held for part, t in zip(parts, tensors, strict=True)}


def plain(c, sd, ids, base=1e4):
    """The same model in plain PyTorch from a state dict: ids (B, T) -> logits (B, T, V)."""
    linear = lambda x, name: F.linear(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"))
    rms = lambda x, name: F.rms_norm(x, (c.d_model,), sd[f"{name}.weight"], c.eps)
    layer = lambda x, name: F.layer_norm(x, (c.d_model,), sd[f"{name}.weight"], sd[f"{name}.bias"], c.eps)
    norm = rms if c.llama else layer
    x, T = sd["model.embed_tokens.weight"][ids], ids.shape[1]
    pos = torch.outer(torch.arange(T).to(x), (base ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)).to(x))
    turn = lambda t: torch.view_as_real(torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(pos), pos))
    for i in range(c.n_layer):
        p = f"model.layers.{i}."
        y = norm(x, p + "input_layernorm")
        q, k, v = (linear(y, f"{p}self_attn.{n}_proj").unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for n in "qkv")
        q, k = (turn(t).movedim(-1, -2).flatten(-2) for t in (q, k))
        k, v = (t.repeat_interleave(c.n_head // c.kv_head, dim=1) for t in (k, v))
        score = (q @ k.transpose(-1, -2) / math.sqrt(c.head_dim)).masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf)
        x = x + linear((score.softmax(-1) @ v).transpose(1, 2).flatten(2), p + "self_attn.o_proj")
        y = norm(x, p + "post_attention_layernorm")
        up = linear(y, p + "mlp.up_proj")
        x = x + linear(F.silu(linear(y, p + "mlp.gate_proj")) * up if c.llama else F.gelu(up), p + "mlp.down_proj")
    return F.linear(norm(x, "model.norm"), sd["model.embed_tokens.weight" if c.tied else "lm_head.weight"])


def unequal(rows):
    """Targets: whole rows and parts of rows are masked, differently on every shard, by what the rows hold."""
    return rows[:, 1:].masked_fill((rows[:, :1] % 3 == 0) | (rows[:, 1:] % 5 == 0), -100)


def batch(c, seed=1):
    return torch.randint(0, c.vocab, (16, c.seq + 1), generator=torch.Generator().manual_seed(seed))


def serial(c):
    """Loss, {name: gradient} and norm of one plain process."""
    sd = {n: t.clone().requires_grad_() for n, t in whole(A.GPT3D(c, A.Grid())).items()}
    loss = F.cross_entropy(plain(c, sd, batch(c)[:, :-1]).flatten(0, 1), unequal(batch(c)).flatten())
    loss.backward()
    return loss.item(), {n: t.grad for n, t in sd.items()}, torch.cat([t.grad.flatten() for t in sd.values()]).norm()


def grads_match(model, grads):
    for p, parts in A.stored(model).items():
        torch.testing.assert_close(p.grad, torch.cat([grads[c.name][c.box] for c in parts]), **TIGHT)


def volume(c, rows, dims) -> dict:
    """Wire elements of one step by hand: {(collective, axis): elements}; the oracle of what CommLog counts."""
    n = dict(zip("xyzd", dims, strict=True))
    m, h, V = rows * c.seq // (n["z"] * n["d"]), c.d_model // n["y"], c.vocab // n["x"]
    stats, chunk, out = 1 if c.llama else 2, h * V // n["z"], Counter()
    again = 2 if c.checkpoint else 1
    biases = 0 if c.llama else sum(o // n["y" if turned else "x"] for _, o, turned in c.products())
    vectors = c.n_layer * biases + stats * h * (2 * c.n_layer + 1)
    for kind, axis, numel, calls in (
        *((kind, axis, numel, c.n_layer * {"ag_z": 1 + again, "ar_fwd": again}.get(term, 1))
          for term, kind, axis, numel in A.ring_terms(c, dims, m)),
        ("all_reduce", "d", chunk, 1 if c.tied else 2),  # embedding and head
        ("all_gather", "z", chunk, 3),  # the embedding's forward, the head's forward and backward
        ("reduce_scatter", "z", n["z"] * chunk, 2),
        ("all_reduce", "x", m * h, 2),  # the embedding forward, the head backward
        ("all_reduce", "y", m * V, 1),  # the head forward
        ("all_reduce", "y", m, stats * (2 * c.n_layer * (again + 1) + 2)),  # norms forward and backward
        ("all_reduce", "x", m, 3),  # cross-entropy: the largest logit, both sums
        *(("all_reduce", axis, vectors + 1, 1) for axis in "zd"),  # vectors, the count of targets
    ):  # fmt: skip
        out[kind, axis] += calls * numel * A.WIRE[kind](n[axis])
    return +out


def _all_grids(rank):
    """Loss, every gradient, the norm and the bytes: GPT on all 35 grids, Llama on some; masks differ by shard."""
    for c, every in ((replace(GPT, n_layer=1), 1), (replace(LLAMA, n_layer=1, checkpoint=True), 5)):
        loss, grads, norm = serial(c)
        for dims in [d for size in (1, 2, 4, 8) for d in A.grids(size)][::every]:
            grid = A.Grid(*dims)
            model, rows = A.GPT3D(c, grid), grid.mine(batch(c))
            with A.CommLog() as log:
                share = A.backward(model, rows, False, unequal(rows))
            assert abs(grid.total(share).item() - loss) < 1e-12, dims
            assert abs(A.clip_grad_norm_(model, 0) - norm) < 1e-12 * norm, dims
            grads_match(model, grads)
            assert {k: b / 8 for k, b in log.bytes.items()} == volume(c, 16, dims), dims


def _variants(rank):
    """Overlap in parts, two backward passes, frozen weights: the same gradients, and the same bits as without."""
    names, every = ("oar", "ors", "oag"), {"oar", "ors", "oag"}
    for c, dims in ((GPT, (2, 1, 2, 2)), (replace(LLAMA, checkpoint=True), (1, 2, 4, 1))):
        grid, (_, grads, _) = A.Grid(*dims), serial(c)
        model, rows, bits = A.GPT3D(c, grid), grid.mine(batch(c)), {}
        count = grid.total((unequal(rows) != -100).sum())
        for passes, hidden in ((1, {}), (1, every), *((1, {name}) for name in names), (1, every), (2, {}), (2, every)):
            model.zero_grad()
            with A.overlap(model, **{name: name in hidden for name in names}):
                for part in rows.chunk(passes):
                    logits = model(part[:, :-1])
                    (A.vocab_parallel_cross_entropy(logits, unequal(part), grid) / count).backward()
            grads_match(model, grads)
            same = bits.setdefault(passes, [p.grad for p in model.parameters()])
            if passes == 1 or not c.tied:  # a tied weight has two gradients a pass, and the order of four is free
                assert all(map(torch.equal, same, [p.grad for p in model.parameters()]))
        for p in (frozen := [model.embed.weight, model.blocks[1].down.weight, model.norm.weight]):
            p.requires_grad_(False)
        model.zero_grad()
        A.backward(model, rows, True, unequal(rows))
        assert all(p.grad is None for p in frozen)
        grads_match(model.blocks[0], grads)


def _operators(rank):
    """linear3d, the first section's, equals FastLinear; torch.autograd.grad works and pollutes nothing."""
    for dims, turned in (((2, 2, 2, 1), False), ((2, 2, 2, 1), True), ((1, 2, 4, 1), True), ((4, 1, 1, 2), False)):
        grid = A.Grid(*dims)
        layer = A.Linear3D(grid, 16, 24, bias=False, transposed=turned, name="l", dtype=torch.float64)
        g = cluster.generator(grid.at[layer.down], grid.data_shard)
        x = torch.randn(3, 16 // grid.n[layer.down], dtype=torch.float64, generator=g).requires_grad_()
        y, slow = layer(x), A.linear3d(x, layer.weight, grid, layer.down, layer.across)
        torch.testing.assert_close(y, slow, **TIGHT)
        dy = torch.ones_like(y) * (1 + grid.at[layer.across])
        for a, b in zip(*(torch.autograd.grad(o, (x, layer.weight), dy) for o in (y, slow)), strict=True):
            torch.testing.assert_close(a, b, **TIGHT)
        assert layer.weight.grad is None and not A.incomplete(layer)


def _decisions(rank):
    """Steps and clips out of turn are refused, also of a deep copy and after torch's own clipping; NaN stops all."""
    grid = A.Grid(2, 1, 2, 0)  # 0: all ranks, 2
    rows = grid.mine(batch(GPT))
    for model in (first := A.GPT3D(GPT, grid), copy.deepcopy(first)):
        optimizer = A.adamw(model, 1e-2)
        A.vocab_parallel_cross_entropy(model(rows[:, :-1]), rows[:, 1:], grid).backward()
        for call in (optimizer.step, lambda m=model: A.clip_grad_norm_(m, 1.0)):
            with pytest.raises(RuntimeError, match="not complete"):
                call()
        A.finish(model)
        A.finish(model)  # again: nothing
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # the norm of this rank's part alone
        with pytest.raises(RuntimeError, match="not complete"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="changed after"):
            A.finish(model)
        optimizer.zero_grad()
    A.backward(model, rows, True)
    norm = A.clip_grad_norm_(model, 0)  # 0 is off, and the norm is that before clipping
    assert A.clip_grad_norm_(model, 0.5) == norm > 0.6 and A.clip_grad_norm_(model, 0) == pytest.approx(0.5, abs=1e-5)
    model.zero_grad()
    with A.overlap(model), pytest.raises(RuntimeError, match="in flight"):
        A.finish(model)
    before = [p.detach().clone() for p in model.parameters()]
    A.vocab_parallel_cross_entropy(model(rows[:, :-1]), rows[:, 1:], grid).backward()
    if rank == 5:
        model.blocks[0].up.weight.grad[0] = math.nan
    A.finish(model)
    assert not math.isfinite(A.update(model, optimizer, 1e-2, 1.0))
    assert all(map(torch.equal, before, model.parameters()))
    for bad, message in (
        (lambda: A.Grid(3, 1, 1, 1), "grid 3x1x1x1 needs 3 ranks, but world size is 8"),
        (lambda: A.GPT3D(replace(LLAMA, kv_head=1), grid), "Gx must divide 1 key/value heads.*that fit: 1x1x1x8"),
        (lambda: A.Linear3D(grid, 6, 10, name="up"), "up.weight: grid 2x1x2x2 does not divide 10 by Gx Gz = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    for wrong in (64, -1):
        with pytest.raises(IndexError, match=f"targets .*{wrong}.*; give 0 to 63, or -100"):
            A.vocab_parallel_cross_entropy(torch.zeros(2, 32), torch.tensor([3, wrong]), grid)
        with pytest.raises(IndexError, match=f"token ids {wrong} to {wrong}; the embedding has 0 to 63"):
            model(torch.full((1, 4), wrong))


def _hidden(rank):
    """Collectives with a product between launch and wait, on two ranks (four copies); none without overlap."""
    for grid in (A.Grid(1, 1, 2, 1), A.Grid(2, 1, 1, 1)):
        (_, _, off), (_, _, on) = (A.curve(grid, 0, hide) for hide in (False, True))
        assert not sum(off.hidden.values()) and A.wire(grid)
        want = {key: n for key, n in A.HIDES.items() if grid.n[key[1]] == 2}
        assert want == {key: (on.hidden[key], on.calls[key]) for key in want}


def _state(rank, folder):
    """Saved on 2x2x2x1, loaded on 1x2x1x4: weights and moments are the same whole tensors. A file opens on a grid."""
    models = [A.GPT3D(replace(GPT, seed=s), A.Grid(*dims)) for s, dims in enumerate(((2, 2, 2, 1), (1, 2, 1, 4)))]
    (old, first), (new, second) = ((model, A.adamw(model, 1e-2)) for model in models)
    for s in range(3):
        A.backward(old, old.grid.mine(batch(GPT, s)), True)
        A.update(old, first, 1e-2, 0.5)
    state = A.sharded_state(old, first)
    cluster.save_sharded(folder / "state", {"tensors": state, "facts": {"step": 3}})
    assert cluster.load_sharded(folder / "state", {"tensors": A.sharded_state(new, second)})["facts"]["step"] == 3
    found, step = A.sharded_state(new, second), state.pop("step")
    assert found.pop("step") == step == 3 and found.keys() == state.keys() and "v.lm_head.weight" in state
    assert all(torch.equal(t.full_tensor(), found[name].full_tensor()) for name, t in state.items())
    want = whole(A.GPT3D(LLAMA, A.Grid()))
    config = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8,
              "vocab_size": 64, "intermediate_size": 40, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}  # fmt: skip
    A.open_weights = lambda name: SimpleNamespace(config=config, read=want.get, tokenizer=None)
    opened = A.sharded_state(A.open_model("given", old.grid, dtype="float64")[0])
    assert opened.keys() == want.keys() and all(torch.equal(want[n], t.full_tensor()) for n, t in opened.items())


def _everything(rank, size, folder):
    for part in (_operators, _all_grids, _variants, _decisions, _hidden):
        part(rank)
    _state(rank, folder)


@pytest.mark.slow
def test_eight_ranks(tmp_path):
    run_ranks(_everything, 8, tmp_path, tmp_path)
    dcp_to_torch_save(tmp_path / "state", tmp_path / "one.pt")
    assert torch.load(tmp_path / "one.pt", weights_only=True)["tensors"]["lm_head.weight"].shape == (64, 32)


def test_sums_over_tokens_are_wide():
    """bfloat16: gradients of a norm's and a layer's bias, and of an embedding of one id, over thousands of tokens."""
    x, dy = (torch.randn(8192, 64, generator=torch.Generator().manual_seed(s)).bfloat16() + s for s in (0, 1))
    for module in (A.LayerNorm3D(A.Grid(), 64), A.Linear3D(A.Grid(), 64, 64)):
        module(x).backward(dy)
        assert (module.bias.grad.double() - dy.double().sum(0)).norm() < 0.01 * dy.double().sum(0).norm()
    normed = A.LayerNorm3D(A.Grid(), 64)(x + 8).double()
    torch.testing.assert_close(normed, F.layer_norm((x + 8).double(), (64,)), rtol=2**-8, atol=2**-8)
    table = A.Embedding3D(A.Grid(), 4, 8, out_dtype=torch.bfloat16)
    table(torch.ones(4096, dtype=torch.long)).backward(torch.ones(4096, 8).bfloat16())
    assert (table.weight.grad[1] == 4096).all()


def test_worked_example_of_the_ranking():
    """The model of communication by hand: 20B, 64 rows of 2048, Perlmutter, grid (2,2,4,2)."""
    c, m = A.MODELS["20B"], A.MACHINES["perlmutter"]
    assert [m.bandwidth(i, (2, 2, 4, 2)) / 1e9 for i in range(4)] == [76, 76, 20, 20]
    t = A.predict_comm_time(c, 64 * 2048, (2, 2, 4, 2), m, c_ag=1)
    want = {"ag_z": 0.36993761, "rs_z": 0.36993761, "ar_fwd": 0.44503773, "ar_bwd": 0.34614046, "ar_data": 0.12331254}
    assert t == pytest.approx({**want, "total": 1.65436595}, abs=1e-8)
    ranked = A.rank_configs(c, 32, 64, m, min_tp=16, top_k=100, c_ag=1)
    assert len(ranked) == 32 and ranked[0][0] == (1, 1, 32, 1) and ranked[0][1] == pytest.approx(0.9557, abs=1e-4)
    slow = A.predict_comm_time(c, 64 * 2048, (2, 2, 4, 2), m._replace(latency=9e-6), c_ag=1)
    assert slow["ar_data"] - t["ar_data"] == pytest.approx(32 * 4 * 9e-6)
    for name, flop in (("5B", 7.24e17), ("20B", 2.811e18), ("320B", 4.245e19), ("640B", 8.482e19)):
        assert A.flops_per_iteration(A.MODELS[name], 8192 * 2048) == pytest.approx(flop, rel=1e-3)


def test_verdict():
    """It holds at the bars, and each part alone can make it fail: also a control that recites nothing."""
    dims = A.grids(4)
    good = [{d: (1e-13, True, True) for d in dims}, dict(A.HIDES), 0, {d: (i, i) for i, d in enumerate(dims)},
            {"ordinary": 0.9, "goldfish": 0.05, "random half": 0.5}]  # fmt: skip
    holds, here = A.judge(*good)
    assert holds and "10 of 10 grids" in here and "number 1 predicted, Spearman 1.00" in here
    last = {d: (-i if i else 0.5, i + 1) for i, d in enumerate(dims)}
    for i, change in (
        (0, good[0] | {dims[3]: (1e-11, True, True)}), (0, good[0] | {dims[3]: (0.0, False, True)}),
        (0, good[0] | {dims[3]: (0.0, True, False)}), (1, good[1] | {("all_gather", "z"): (0, 19)}), (2, 1), (3, last),
        (3, good[3] | {dims[0]: (100, 0)}),
        *((4, good[4] | bad) for bad in ({"ordinary": 0.8}, {"goldfish": 0.5}, {"random half": 0.0})),
    ):  # fmt: skip
        assert not A.judge(*good[:i], change, *good[i + 1 :])[0], (i, change)


def test_goldfish_mask_is_that_of_goldfish():
    import goldfish

    targets = torch.randint(1, 64, (50, 47), generator=torch.Generator().manual_seed(0))
    assert torch.equal(A.goldfish_mask(targets), goldfish.goldfish_mask(targets, 2, 13))
    assert A.memorise("ordinary", 0, width=32, epochs=1) == 0


def test_killed_and_resumed_on_another_grid(tmp_path, capsys):
    """kill -9 of one of two ranks, then --resume on one: within rounding the losses of a run never stopped."""
    argv = "train --vocab 304 --block 16 --batch 4 --device cpu --steps 30 --save-every 7".split()
    train = lambda out, *more: A.main(cli.parse(A.Config, [*argv, "--out", str(out), *more]))
    steps = lambda out: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    train(unbroken)
    ranks = start_ranks(2, "axonn.py", *argv, "--grid", "1", "1", "2", "1", "--out", str(killed))
    while not (killed / "checkpoint.previous").exists() and ranks[0].poll() is None:
        time.sleep(0.02)
    ranks[1].kill()
    finish(ranks)
    assert steps(killed)[-1]["step"] < 30
    train(killed, "--resume", "--grid", "1", "1", "1", "1")
    assert "going on" in capsys.readouterr().out
    pairs = list(zip(steps(killed), steps(unbroken), strict=True))
    assert len(pairs) == 30 and all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in pairs)
    (killed / "metrics.jsonl").write_text('{"config": {"mo')  # settings come from the checkpoint, not from the log
    with pytest.raises(cli.BadInput, match="--lr 0.001, this run asks for --lr 0.0005"):
        train(killed, "--resume", "--lr", "5e-4")


def test_bad_input(tmp_path, capsys):
    for argv, message in (
        ("train --grid 2 1 1 1", "grid 2x1x1x1 needs 2 ranks, but world size is 1"),
        ("train --grid 2 0 1 1", "the last may be 0"),
        ("train --lr -1", "--lr -1.0: give a number above 0"),
        ("train --block 9999999", "rows of --block 9999999 need more"),
        ("bench --model smollm2", "bench knows tiny, 5B"),
    ):
        with pytest.raises((SystemExit, cli.BadInput)) as stopped:
            A.main(cli.parse(A.Config, [*argv.split(), "--out", str(tmp_path)]))
        assert message in str(stopped.value) + capsys.readouterr().err and not any(tmp_path.iterdir()), argv


@pytest.mark.weights
@pytest.mark.slow
def test_real_weights():
    """One layer of the real model, two families of names: plain PyTorch from the file's tensors gives its logits."""
    weights, ids = open_weights("smollm2"), torch.arange(8)[None] * 1000
    model, _ = A.open_model("smollm2", A.Grid(), n_layer=1, dtype="float64")
    with torch.no_grad():
        sd = {name: weights.read(name).double() for name in whole(model)}
        want = plain(model.cfg, sd, ids, weights.config["rope_theta"])
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-4)
