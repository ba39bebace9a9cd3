"""slimadam.py: released vectors and rules, SNR, names, the optimizer against AdamW, ranks, training, verdict, bad input."""

import copy
import io
import json
import math
import re
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import finish, kill, run_ranks, run_script, start_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import slimadam as S
from common import cli, cluster

DATA = Path(__file__).parent / "data" / "slimadam"  # reference vectors; see its README.md
SMALL = {"d_model": 16, "n_head": 2, "n_layer": 1, "block": 16, "chars": 200_000, "steps": 12, "batch": 4, "accum": 2,
         "log_every": 1, "save_every": 5, "device": "cpu"}  # fmt: skip
FLAGS = [word for name, value in SMALL.items() for word in cli.spell(name, value).split()]


def close(a, b, tol=0.0):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def gpt(**kw):
    return S.GPT(S.Config("train", d_model=16, n_head=2, block=8, n_layer=1, **kw))


def meta(**shapes):
    """(name, tensor without data) pairs; __ in a keyword is a dot."""
    return [(n.replace("__", "."), nn.Parameter(torch.empty(s, device="meta"))) for n, s in shapes.items()]


def steps(P, optimizer, n, first=0):
    """n steps with random gradients, the same for whole and for sharded tensors."""
    for t in range(first, first + n):
        g = torch.Generator().manual_seed(t)
        for p in P:
            x = torch.randn(p.shape, generator=g).to(p.dtype)
            p.grad = distribute_tensor(x, p.device_mesh, p.placements) if isinstance(p, DTensor) else x
        optimizer.step()


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()[1:]]


# ---- the method


@pytest.mark.parametrize("name, tol", [("opt_f64", 1e-12), ("opt_f32", 3e-6)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_released_optimizer(name, tol, compiled):
    d = np.load(DATA / f"{name}.npz")
    rules = {n: K and tuple(K) for n, K in json.loads(str(d["rules_json"])).items()}
    b1, b2, eps, wd, T = d["hyper"]
    family = lambda n: {"skip": "wide", "zero": "sq"}.get(n.split(".")[0], n.split(".")[0])
    P = {n: nn.Parameter(torch.tensor(d[f"p0/{family(n)}"])) for n in rules}
    assert len(P) == 30
    optimizer = S.SlimAdamW(P.items(), betas=(b1, b2), eps=eps, weight_decay=wd, rules=rules)
    if compiled:  # the path of torch.compile, without a compiler
        optimizer.update = lambda jobs: S.update_all(jobs)
    for t in range(int(T)):
        optimizer.param_groups[0]["lr"] = float(d["lrs"][t])
        for n, p in P.items():
            p.grad = torch.tensor(d[f"g/{family(n)}"][t]) * (n != "zero.d0")
            if n == "skip.d1" and d["skip"][t]:
                p.grad = None
        optimizer.step()
        for n, p in P.items() if t == 0 else ():
            close(p.detach(), torch.tensor(d[f"p1/{n}"]), tol)
    for n, p in P.items():
        close(p.detach(), torch.tensor(d[f"p{int(T)}/{n}"]), tol)
        close(optimizer.state[p]["exp_avg"], torch.tensor(d[f"m/{n}"]), tol)
        close(optimizer.state[p]["exp_avg_sq"], torch.tensor(d[f"v/{n}"]), tol)
        assert int(optimizer.state[p]["step"]) == int(d[f"step/{n}"])


def test_snr_of_the_released_code_and_its_properties():
    d = np.load(DATA / "snr.npz")
    keys = [key.split("/") for key in d.files if key.startswith("snr64/")]
    for kind, name, axes in keys:
        got = S.snr(torch.tensor(d[f"in/{name}"]), tuple(map(int, axes)))
        np.testing.assert_allclose(got, d[f"{kind}/{name}/{axes}"], rtol=1e-9)
    assert len(keys) == 50
    g = torch.Generator().manual_seed(0)
    assert abs(S.snr(torch.randn(200, 3000, generator=g).square(), (1,)) - 0.5) < 0.02  # chi-square: mean^2 / variance
    v = torch.rand(5, 6, generator=g)
    assert S.snr(v, (0, 1)) <= min(S.snr(v, (0,)), S.snr(v, (1,)))  # more axes never raise it
    assert S.snr(v * 1e-30, (0,)) == pytest.approx(S.snr(v, (0,)), rel=1e-6)
    for flat, K in ((torch.full((3, 4), 0.3), (1,)), (v[:1], (0,)), (v * 0, (1,)), (torch.zeros(0, 3), (0, 1))):
        assert math.isnan(S.snr(flat, K))


def released():
    """(mean SNR, named tensors, rules at cutoff 1, AdaLayer's rules) of the released log of GPT-2 small."""
    d, mean, shapes = np.load(DATA / "snr_gpt_small.npz"), {}, {}
    numbers = lambda text: tuple(map(int, re.findall(r"\d+", str(text))))
    for name, shape, K, values in zip(d["name"], d["shape"], d["dims"], d["snr"], strict=True):
        mean.setdefault(str(name), {})[numbers(K)] = float(np.nanmean(values.astype(np.float64)))
        shapes[str(name)] = numbers(shape)
    read = lambda key: {n: K and tuple(K) for n, K in json.loads(str(d[key])).items()}
    return mean, meta(**shapes), read("rules_C1.0"), read("rules_adalayer")


def test_the_released_rules():
    mean, named, want, layer = released()
    assert S.derive_rules(mean) == want and len(want) == 99
    pooled = S.averaged({n: {K: [x] for K, x in t.items()} for n, t in mean.items()}, S.starred)
    assert S.match_rules(S.derive_rules(pooled), named) == S.default_rules(named)
    assert S.adalayer_rules(named, keep=("embedding", "head", "norm")) == layer
    for rules, kept in (("default", 153472), (want, 749440), (layer, 38652745), ("adalayer", 99), ("adam", 124373760)):
        report = S.SlimAdamW(named, rules=rules).memory_report()
        assert (report["total"], report["kept"]) == (124373760, kept)
        assert report["bytes"] == 4 * (124373760 + kept) and report["bytes_adam"] == 8 * 124373760
        assert report["saved"] == 1 - kept / 124373760 == 4 * report["saved_training"] == 2 * report["saved_state"]
    with torch.device("meta"):
        small = S.GPT(S.Config("train", **S.PRESETS["small"]))
    assert sum(p.numel() for p in small.parameters()) == 124373760


def test_derive_rules():
    mean = {"w": {(0,): 3.0, (1,): 2.0, (0, 1): 1.5}, "x": {(0,): 0.2, (1,): 1.0, (0, 1): 0.1}, "b": {(0,): 9.0},
            "c": {(0,): 2.0, (1, 2): 2.5, (0, 1, 2): 1.2}, "tie": {(0,): 2.0, (1,): 2.0}, "n": {(0,): math.nan, (1,): 2.0},
            "nan": {(0,): math.nan, (1,): math.nan}}  # fmt: skip
    want = {"w": (0,), "x": None, "b": None, "c": (1, 2), "tie": (0,), "n": (1,), "nan": None}
    assert S.derive_rules(mean) == want and S.derive_rules(mean, 0.9)["x"] == (1,)
    assert S.candidates(4) == [(0,), (1, 2, 3), (0, 1, 2, 3)] and S.candidates(1) == [(0,)] and S.candidates(0) == []


# ---- rules by name and module


def test_layer_types():
    table = {
        "model.layers.3.self_attn.q_proj.weight": "query", "h.0.attn.c_proj.weight": "output",
        "h.0.mlp.c_proj.weight": "down", "attn.qkv.weight": "fused", "lm_head.weight": "head", "w1": "gate",
        "embeddings.LayerNorm.weight": "norm", "patch_embed.proj.weight": "patch", "pos_embed": "position",
        "layer1.0.conv1.weight": None, "conv1.weight": "patch", "model.embed_tokens.weight": "embedding",
        "module._orig_mod.wte.weight": "embedding", "_orig_mod.module.wte.weight": "embedding",
        "encoder.layer.0.attention.output.dense.weight": "output", "encoder.layer.0.output.dense.weight": "down",
        "blocks.0.norm1.weight": "norm", "q_norm.weight": "norm", "output.weight": "head", "x.output.weight": None,
        "v_proj.lora_A.default.weight": None, "v_proj.base_layer.weight": "value", "head.0.weight": None,
        "embed.proj.weight": None, "norm_mixer.v_proj.weight": "value", "Attn.Q_Proj.Weight": "query",
        "k_proj.parametrizations.weight.original": "key", "k_proj.parametrizations.weight.0.base": None, "weight": None,
    }  # fmt: skip
    assert {n: S.layer_type(n) for n in table} == table
    assert S.clean("module._orig_mod.h.0._checkpoint_wrapped_module.w") == "h.0.w" == S.clean("_orig_mod.module.h.0.w")


def test_default_rules_of_odd_models():
    with pytest.warns(UserWarning, match=r"2 tensors, 588 weights: layer1.0.conv1.weight, mlp.gate.weight"):
        rules = S.default_rules(meta(
            a__qkv__weight=(12, 4), a__qkv__bias=(12,), b__query_key_value__weight=(12, 4), pos_embed=(1, 9, 4),
            conv1__weight=(8, 3, 7, 7), layer1__0__conv1__weight=(8, 8, 3, 3), mlp__gate__weight=(3, 4),
            v_proj__weight=(4, 4), w1=(6, 4), head__weight=(9, 4),
        ))  # fmt: skip
    assert [*rules.values()] == [(1,), None, (1,), (2,), (1, 2, 3), None, None, (0,), (0,), (1,)]

    class Conv1D(nn.Module):  # as Hugging Face's GPT-2 stores weights, (in, out)
        def __init__(self, *shape):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape))

    odd = nn.ModuleDict({"c_attn": Conv1D(4, 12), "c_fc": Conv1D(4, 16), "x": nn.Embedding(9, 4), "y": nn.LayerNorm(4)})
    assert [*S.default_rules(odd).values()] == [(0,), (1,), (1,), None, None]
    with pytest.raises(cli.BadInput, match="Give the model"):
        S.default_rules(odd.named_parameters())
    model = gpt(tied=True)
    names = [n for n, _ in model.named_parameters()]
    for wrapped in (torch.compile(model, backend="eager"), nn.ModuleDict({"module": torch.compile(model, backend="eager")})):
        assert S.SlimAdamW(wrapped).rules == S.default_rules(model) and [*S.default_rules(wrapped)] == names
    assert S.default_rules(model)["wte.weight"] == (1,) and "lm_head.weight" not in names


def test_rules_files_and_stars(tmp_path):
    rules = {"b": (1,), "a": None, "module.c": (0, 1)}
    S.save_rules(rules, tmp_path / "r.json")
    assert S.load_rules(tmp_path / "r.json") == {"a": None, "b": (1,), "c": (0, 1)}
    model = gpt()
    S.save_rules({S.starred(n): K for n, K in S.default_rules(model).items()}, tmp_path / "s.json")
    assert S.SlimAdamW(model, rules=str(tmp_path / "s.json")).rules == S.default_rules(model)
    named = meta(h__0__mlp__0__w=(2, 2), h__12__mlp__0__w=(2, 2), h__1__mlp__2__w=(2, 2))
    some = S.match_rules({"h.*.mlp.0.w": (0,), "h.1.mlp.2.w": (1,), "h.12.mlp.0.w": None}, named)
    assert [*some.values()] == [(0,), None, (1,)]  # an exact name goes before a star, also beside a number that is meant


# ---- the optimizer


def test_v_is_the_mean_of_adams_v_and_adamw_loads():
    torch.manual_seed(0)
    model = gpt().double()
    slim_model = copy.deepcopy(model)
    for kw in ({}, {"fused": True}):
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), **kw)
        slim = S.SlimAdamW(slim_model)
        steps(model.parameters(), adam, 5)
        steps(slim_model.parameters(), slim, 5)
        fresh = S.SlimAdamW(slim_model)
        fresh.load_state_dict(adam.state_dict())
        both = S.SlimAdamW(slim_model, rules="adalayer")
        both.load_state_dict(slim.state_dict())  # coarser than the rules that it was saved by
        for (name, p), q in zip(model.named_parameters(), slim_model.parameters(), strict=True):
            K, v = slim.rules[name], adam.state[p]["exp_avg_sq"]
            close(slim.state[q]["exp_avg_sq"], v.mean(K, keepdim=True) if K else v, 1e-14)
            close(both.state[q]["exp_avg_sq"].squeeze(), v.mean(), 1e-14)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                close(fresh.state[q][key], slim.state[q][key], 1e-14)
    with pytest.raises(cli.BadInput, match="rules that it was saved by"):
        S.SlimAdamW(slim_model, rules="adam").load_state_dict(slim.state_dict())
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    steps(model.parameters(), sgd, 1)
    with pytest.raises(cli.BadInput, match="momentum_buffer"):
        fresh.load_state_dict(sgd.state_dict())
    state = slim.state_dict()
    state["param_groups"][0]["param_names"].reverse()
    with pytest.raises(cli.BadInput, match="same order"):
        S.SlimAdamW(slim_model).load_state_dict(state)


def test_adam_rules_equal_adamw():
    a = gpt()
    b, matrices = copy.deepcopy(a), [p for p in a.parameters() if p.ndim > 1]
    groups = [{"params": matrices}, {"params": [p for p in a.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    slim = S.SlimAdamW(b.named_parameters(), lr=torch.tensor(1e-2), rules="adam")
    steps(a.parameters(), adam, 10)
    steps(b.parameters(), slim, 10)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(p, q, 1e-6)


def test_pieces_equal_the_whole():
    for shape in ((300, 700), (70000, 3), (5, 60000), (40, 30, 90), (1, 200000)):
        g = torch.randn(shape, dtype=torch.float64)
        for K in S.candidates(len(shape)):
            close(S.partial_mean(g, K, shape), S.mean_square(g, K), 1e-14)
            half = g[: len(g) // 2], g[len(g) // 2 :]  # two ranks, of unequal rows or none
            if 0 in K:
                close(sum(S.partial_mean(x, K, shape) for x in half), S.mean_square(g, K), 1e-14)


@pytest.mark.slow
def test_compiled_equals_plain():
    a = gpt()
    b = copy.deepcopy(a)
    plain, compiled = S.SlimAdamW(a, lr=0.01), S.SlimAdamW(b, lr=0.01, compile=True)
    compiled.update = torch.compile(S.update_all, dynamic=False, backend="aot_eager")  # inductor needs a compiler
    graphs = torch._dynamo.utils.counters["stats"]
    for t in range(4):
        plain.param_groups[0]["lr"] = compiled.param_groups[0]["lr"] = 0.01 / (t + 1)
        steps(a.parameters(), plain, 1, t)
        steps(b.parameters(), compiled, 1, t)
        made = graphs["unique_graphs"] if t == 0 else made
    assert graphs["unique_graphs"] == made  # a new rate or step compiles nothing
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(p, q, 1e-6)


def test_checkpoints_and_copies_are_exact_in_their_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        a, b = gpt().to(dtype), gpt().to(dtype)
        full, part, file = S.SlimAdamW(a, lr=0.01), S.SlimAdamW(b, lr=0.5), io.BytesIO()
        steps(a.parameters(), full, 2)
        torch.save({"model": a.state_dict(), "optimizer": full.state_dict()}, file)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        b.load_state_dict(saved["model"])
        part.load_state_dict(saved["optimizer"])
        assert part.state[b.wte.weight]["exp_avg"].dtype == torch.float32 and part.param_groups[0]["lr"] == 0.01
        c, copied = copy.deepcopy((a, full))
        for model, optimizer in ((a, full), (b, part), (c, copied)):
            steps(model.parameters(), optimizer, 2, 2)
        for p, q, r in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(p, r) and not torch.equal(p, torch.zeros_like(p))
    adam = torch.optim.AdamW(a.parameters())  # whose state is bfloat16, as the weights
    steps(a.parameters(), adam, 1)
    full.load_state_dict(adam.state_dict())
    steps(a.parameters(), full, 1)
    assert full.state[a.wte.weight]["exp_avg_sq"].dtype == torch.float32


def test_it_is_a_torch_optimizer():
    model = gpt()
    optimizer = S.SlimAdamW(model.named_parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t])
    model(torch.zeros(1, 8, dtype=torch.long)).square().sum().backward()
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    extra = nn.Parameter(torch.ones(6, 4))
    optimizer.add_param_group({"params": [("extra.q_proj.weight", extra)], "lr": 1.0})
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert optimizer.state[extra]["exp_avg_sq"].shape == (6, 1)
    groups = [{"params": model.h.named_parameters(), "lr": 0.3}, {"params": model.wte.named_parameters("wte")}]
    assert [g["lr"] for g in S.SlimAdamW(groups, lr=0.2).param_groups] == [0.3, 0.2]
    model.wte.weight.requires_grad_(False)
    rules = {n: K for n, K in S.default_rules(model).items() if n != "wte.weight"}
    frozen = S.SlimAdamW(model, rules=rules)  # a frozen tensor needs no rule and gets no state
    assert frozen.memory_report()["total"] == sum(p.numel() for p in model.parameters()) - 256 * 16
    p, q, e = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 3))
    optimizer = S.SlimAdamW([("q_proj.weight", p), ("b", q), ("v_proj.weight", e)], lr=0.1, weight_decay=0.5)
    for x in (p, q, e):
        x.grad = torch.zeros_like(x)
    optimizer.step()
    close(p.detach(), torch.full((2, 3), 0.95))  # a gradient of zero: only decay moves a weight, and only a matrix
    close(q.detach(), torch.ones(3))
    half = nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))
    small = S.SlimAdamW([("q_proj.weight", half)], lr=0.1)
    half.grad = torch.full_like(half, 1e-4)  # whose square is 0 in float16
    small.step()
    assert small.state[half]["exp_avg_sq"].dtype == torch.float32 and (half < -0.09).all()
