"""recurrent_depth.py: the release's vectors, cache, exits, generation, real weights, the claims, ranks, resume."""

import functools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import finish, kill, run_ranks, start_ranks

import goldfish
import recurrent_depth as R
from common import cli, cluster
from common.cli import BadInput

DATA = Path(__file__).parent / "data" / "recurrent_depth"
V = {k: torch.from_numpy(np.array(v)) for k, v in np.load(DATA / "expected.npz").items()}
IDS, S0 = V["input_ids"], V["s0"]
SMALL = R.Config(block=8, batch=8, steps=4, r_bar=3, log_every=1, mode="train")
FLAGS = "train --block 8 --batch 8 --r-bar 3 --log-every 1 --steps 60 --save-every 7 --r 1 4".split()
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NEW = {"rope_theta": None, "rope_parameters": ROPE | {"rope_theta": 5e5, "original_max_position_embeddings": 16}}
pytest.importorskip("safetensors", reason='needs safetensors: pip install -e ".[models]"')


@pytest.fixture(scope="module")
def model():
    return R.load_weights(DATA)


def tiny(seed=0, **changes):
    return R.RecurrentDepthLM(replace(R.SHAPES["bytes"], **changes), seed).eval()


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@torch.no_grad()
def test_states_and_logits_equal_the_released_code(model):
    at = model.place(12)
    e = model.embed(IDS, at)
    close(e, V["prelude_out"], 1e-5)
    s = S0
    for i in range(4):
        s = model.iterate(e, s, at)
        close(s, V[f"state_{i + 1}"], 1e-5)
    close(model.between(s), V["latent_r4"], 1e-5)
    for r in (0, 1, 2, 4, 8, 16, 32):
        close(model(IDS, r // 2, r - r // 2, S0)[0], V[f"logits_r{r}"], 1e-4 if r > 8 else 1e-5)
    close(model(IDS, 32, 0, V["s0_b"])[0], V["logits_r32_b"], 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_truncated_gradients_equal_the_released_code(model, checkpointing):
    labels, model.checkpointing = F.pad(IDS[:, 1:], (0, 1), value=-100), checkpointing
    model.zero_grad()
    loss = F.cross_entropy(model(IDS, 3, 2, S0)[0].flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    model.checkpointing = False
    close(loss, V["trunc_loss_n3k2"], 1e-5)
    seen = {name: p.grad.double() for name, p in model.named_parameters() if f"trunc_grad_norm/{name}" in V}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()) and len(seen) == 5
    for name, grad in seen.items():
        close(grad.norm(), V[f"trunc_grad_norm/{name}"].double(), 1e-5)
        close(grad.sum(), V[f"trunc_grad_sum/{name}"].double(), 1e-4)


def test_sizes_and_initialisation():
    with torch.device("meta"):
        m = R.RecurrentDepthLM(R.SHAPES["huginn-3.5b"])
    assert sum(p.numel() for p in m.parameters()) == 3_564_976_800
    m = tiny(0, n_embd=256, num_attention_heads=4, head_dim=64, num_key_value_heads=4, tie_embeddings=False)
    groups = [g for opt in R.optimizers_of(m, SMALL).values() for g in opt.param_groups]
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, p in m.named_parameters():
        apart = p.ndim != 2 or name in ("transformer.wte.weight", "lm_head.weight")
        assert rates[id(p)] == (1.5e-3 if apart else 0.02, 0.0)  # Muon's rate, or that of AdamW beside it
        std = 0.9866 * math.sqrt(2 / (5 * 256)) / (math.sqrt(2 * 10) if name.endswith("proj.weight") else 1)
        assert p.std().item() == pytest.approx(std, rel=0.03) if p.ndim == 2 else (p == ("bias" not in name)).all()
    decayed = R.optimizers_of(m, replace(SMALL, optimizer="atan"))["optimizer"].param_groups[1]["params"]
    assert {id(p) for p in decayed} == {id(p) for p in m.parameters() if p.ndim == 2}  # no norms, no qk_bias
    assert torch.equal(tiny().to(torch.bfloat16).place(900).cos, tiny().place(900).cos)  # angles stay float32
    s = R.initial_state(4, 64, m.shape, cluster.generator(0))
    assert s.std().item() == pytest.approx(0.9866 * math.sqrt(0.4), rel=0.02) and s.abs().max() <= 3 * math.sqrt(0.4)


def test_depth_and_ramp():
    want = [(21, 8), (21, 8), (25, 8), (44, 8), (32, 8), (8, 8), (27, 8), (21, 8), (9, 8), (9, 8)]  # the release's
    assert [R.sample_depth(i, 32, 8) for i in range(1, 11)] == want
    assert all(1 <= R.sample_depth(i, 1, 100)[1] < 50 for i in range(50))  # k is at most the draw, never 0
    assert [R.ramped_mean(t, 100, 8, "linear") for t in (0, 1, 12, 25, 99)] == [1, 1, 4, 8, 8]
    assert [R.ramped_mean(t, 100, 32, "1-sqrt") for t in (0, 50, 75)] == [1, math.ceil(32 * (1 - 3**-0.5)), 32]
    depth = functools.partial(R.depth_of, R.Config(r_bar=8))
    ks = [depth("linear", 8, 100, t)[1] for t in range(100)]
    assert ks[:4] == [1] * 4 and max(ks[25:]) == 8 and depth("fixed", 6, 100, 3) == (3, 6)
    assert depth("none", 6, 100, 3) == R.sample_depth(4, 8, 6) and depth("once", 6, 100, 3) == (0, 1)


@torch.no_grad()
def decode(model, row, steps, budget=0):
    cache, at = R.Cache(model, 12, max(steps), budget), [(0, 8), (8, 9), (9, 10), (10, 11), (11, 12)]
    feeds = [(IDS[row : row + 1, a:b], r, S0[row : row + 1, a:b]) for (a, b), r in zip(at, steps, strict=True)]
    return torch.cat([R.feed(model, cache, ids, r, s)[0] for ids, r, s in feeds], dim=1)


@pytest.mark.parametrize("row", [0, 1])
def test_cached_decoding_equals_the_released_code(model, row):
    one = slice(row, row + 1)
    close(decode(model, row, [4] * 5), V["cached_r4"][one], 1e-5)
    close(decode(model, row, [6] * 5), V["full_r6"][one], 1e-5)
    for budget in (1, 2, 4):
        close(decode(model, row, [6] * 5, budget), want := V[f"shared_compress-s{4 * budget}"][one], 1e-5)  # in layers
        assert (want[:, 8:] - V["full_r6"][one, 8:]).abs().max() > 1e-3  # sharing changes later tokens
    close(decode(model, row, V["varsteps"].tolist()), V["varsteps_latest-m4"][one], 1e-5)
    close(decode(model, row, V["varsteps"].tolist(), 1), V["varsteps_latest-m4-compress-s4"][one], 1e-5)


@torch.no_grad()
def test_exit_is_the_first_small_change(model):
    ran = lambda ids, s0, limit, **kw: R.feed(model, R.Cache(model, ids.shape[1], 24), ids, 24, s0, limit, **kw)
    log_p = torch.stack([model(IDS[:1], i, 0, S0[:1])[0][0].log_softmax(-1) for i in range(1, 25)])  # (24, T, V)
    before = torch.cat([torch.full_like(log_p[:1], -math.log(64)), log_p[:-1]])
    values = (before.exp() * (before - log_p)).sum(-1)  # (24, T)
    close(values[:, -1].double(), V["exit_values/kl"][:24], 1e-5)
    for limit in (0.23, 0.06):  # at 0.23 KL(p_i || p_{i-1}) would stop at once
        logits, _, n = ran(IDS[:1], S0[:1], limit)
        assert n == int((values.amax(dim=1) < limit).nonzero()[0]) + 1 < 24  # at all positions
        close(logits, model(IDS[:1], n, 0, S0[:1])[0], 1e-5)
    assert ran(IDS[:1], S0[:1], 0.2, max_entropy=0.1)[2] == ran(IDS[:1], S0[:1], 0.0)[2] == 24  # it is never so sure


def test_generation_equals_the_released_code(model):
    prompt = IDS[:1, :6]
    tokens = lambda *a, **kw: [t for t, _ in R.generate(model, prompt, 16, *a, **kw)]
    assert tokens(6) == V["gen_greedy_r6"][0, 6:].tolist()
    assert tokens(6, warm=True) == V["gen_cont_r6"][0, 6:].tolist()
    assert torch.equal(R.speculate(model, prompt, 16, 6, 2, 3), V["gen_spec_d2_l3_r6"][:, :22])
    for draft, ahead in ((1, 4), (3, 2), (6, 8)):
        assert R.speculate(model, prompt, 16, 6, draft, ahead)[0, 6:].tolist() == tokens(6)
    made = list(R.generate(model, prompt, 16, 24, exit_kl=0.05))
    assert made[0][1] == 24 and 1 < min(r for _, r in made) < 24  # the prompt runs all iterations
    assert tokens(6, stop=(tokens(6)[3],)) == tokens(6)[: tokens(6).index(tokens(6)[3]) + 1]
    for ids, new, steps, why in ((IDS, 4, 4, "one row, got 2"), (prompt, 60, 4, "at most 64"), (prompt, 4, 0, "0 it")):
        with pytest.raises(BadInput, match=why):
            next(R.generate(model, ids, new, steps))


def llama(tied=False, **more):
    c = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4, "rope_theta": 1e4,
        "num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, **more,
    }  # fmt: skip
    g, parts = cluster.generator(0), {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
        "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(7) for name, shape in parts.items()}
    shapes |= {"model.embed_tokens.weight": (50, 32), "model.norm.weight": (32,), "lm_head.weight": (50, 32)}
    sd = {n: torch.randn(x, generator=g) / math.sqrt(x[-1]) + (len(x) == 1) for n, x in shapes.items()}
    return c, {n: x for n, x in sd.items() if not tied or n != "lm_head.weight"}


def run_llama(c, sd, ids, layers):
    """The logits of goldfish's Llama, with the given layers of sd only."""
    other, tied = goldfish.GPT(c | {"num_hidden_layers": len(layers)}), sd["model.embed_tokens.weight"]
    old = lambda name: re.sub(r"layers\.(\d+)", lambda found: f"layers.{layers[int(found[1])]}", name)
    other.load_state_dict({name: sd.get(old(name), tied) for name in other.state_dict()})
    return other(ids)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"tied": True}, NEW])  # NEW: as transformers 5 writes it
def test_retrofit_is_the_source_without_the_dropped_layers(more, tmp_path):
    c, sd = llama(**more)
    m = R.retrofit(sd, c, (2, 2, 1)).eval()
    assert m.shape.rope_theta == (5e5 if more is NEW else 1e4)
    ids = torch.randint(50, (2, 11), generator=cluster.generator(5))
    assert 1 / 16 < m.transformer.adapter.weight.std() < m.transformer.adapter.weight.abs().max() <= 1 / 8
    R.save_weights(m, tmp_path)
    again, s0 = R.load_weights(tmp_path), R.initial_state(2, 11, m.shape, cluster.generator(0))
    assert s0.std().item() == pytest.approx(0.9866 * math.sqrt(0.4 / 32), rel=0.1)
    assert again.shape == m.shape and torch.equal(again(ids, 0, 3, s0)[0], m(ids, 0, 3, s0)[0])
    m.transformer.adapter.weight.copy_(torch.eye(32, 64).roll(32, 1))  # of [state, e] it keeps e
    logits = run_llama(c, sd, ids, [0, 1, 4, 5, 6])
    close(m(ids, 1, 0)[0], logits, 1e-5)
    assert next(R.generate(m, ids[:1], 1, 1))[0] == logits[0, -1].argmax()


def test_retrofit_refuses():
    c, sd = llama()
    extra = {"model.layers.5.self_attn.q_proj.bias": torch.zeros(32)}  # as Qwen has
    less = {k: v for k, v in sd.items() if k != "model.layers.1.mlp.up_proj.weight"}
    for tensors, config, split, message in (
        (sd, c, (2, 4, 2), "needs 8 layers, each part at least 1; the model has 7"), (less, c, (2, 2, 1), "up_proj"),
        (sd, {**c, "rope_theta": None}, (2, 2, 1), "rope_theta"),
        (sd, {**c, "vocab_size": None}, (2, 2, 1), "vocab_size"), (sd | extra, c, (2, 2, 1), "5.self_attn.q_proj.bias"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            R.retrofit(tensors, config, split)


def test_weights_round_trip_and_refusals(model, tmp_path):
    for i, m in enumerate((model, tiny(n_out=2, tie_embeddings=False), tiny().to(torch.bfloat16))):
        R.save_weights(m, tmp_path / str(i))
        again = R.load_weights(tmp_path / str(i))
        same = zip(m.state_dict().values(), again.state_dict().values(), strict=True)
        assert again.shape == m.shape and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in same)
    config = json.loads((DATA / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((DATA / "model.safetensors").read_bytes())
    for changes, message in (
        ({"injection_type": "add"}, "none of these papers' models"), ({"rope_base": None}, "rope_theta"),
        ({"n_embd": 41}, "no such model"), ({"num_attention_heads": 0, "n_heads": 0}, "no such model"),
        ({"intermediate_size": 98}, "does not fit its config.*fc"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(BadInput, match=message):
            R.load_weights(tmp_path)


def test_atan_adam_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    opt = R.AtanAdam([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    x, m, v = [1.0, -2.0], None, None
    for t, (lr, g) in enumerate([(0.01, [0.5, -0.2]), (0.005, [3.0, 0.0])], 1):
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        m = [0.9 * a + 0.1 * b for a, b in zip(g if m is None else m, g, strict=True)]
        v = [0.95 * a + 0.05 * b * b for a, b in zip([b * b for b in g] if v is None else v, g, strict=True)]
        rho = math.sqrt(sum(b * b / max(a, 1e-12) for a, b in zip(v, g, strict=True)) / 2)
        scale = max(1, rho) * (1 - 0.9**t)
        move = [math.atan2(b, math.sqrt(c / (1 - 0.95**t))) / scale for b, c in zip(m, v, strict=True)]
        x = [a * (1 - lr / 0.01 * 0.1) - lr * d for a, d in zip(x, move, strict=True)]
        close(p.detach(), torch.tensor(x, dtype=torch.float64), 1e-12)


def train(cfg, w, model, **more):
    """What a run on parity logs."""
    lines = []
    run = type("Run", (), {"line": {}, "log": lambda self, **values: lines.append(values)})()
    R.train_model(cfg, w, run, model, R.Parity(0), **more)
    return lines


def test_bfloat16_and_a_run_that_diverges(tmp_path):
    with cluster.world("cpu") as w:
        for model in (tiny(), R.retrofit(llama()[1], llama()[0], (2, 2, 1))):
            lines = train(replace(SMALL, dtype="bfloat16"), w, model)
            assert len(lines) == 4 and all(0 < x["residual"] < 2 and math.isfinite(x["loss"]) for x in lines)
            assert torch.autocast("cpu", torch.bfloat16)(model.forward)(IDS % 50, 0, 1)[1].dtype == torch.float32
        model.transformer.wte.weight.data[0] = math.nan
        with pytest.raises(BadInput, match="no finite gradient at step 2: .* another --out"):
            train(replace(SMALL, save_every=2, log_every=3), w, model, path=f"{tmp_path}/checkpoint.pt")
    assert not list(tmp_path.iterdir())


def _train(rank, size, out):
    w, lines = cluster.World(rank, size, torch.device("cpu")), []
    for cfg in (SMALL, replace(SMALL, accum=2, ramp="linear", optimizer="atan")):
        model = R.start(cfg)[0].double()
        lines += [*train(cfg, w, model), {name: p.detach() for name, p in model.named_parameters()}]
    if rank == 0:
        torch.save(lines, f"{out}/{size}.pt")


def test_ranks_match_one_process(tmp_path):
    for size in (1, 2, 4):
        (tmp_path / f"store{size}").mkdir()
        run_ranks(_train, size, tmp_path / f"store{size}", str(tmp_path))
    for a, *others in zip(*(torch.load(tmp_path / f"{n}.pt") for n in (1, 2, 4)), strict=True):
        for b in others:
            assert all(torch.allclose(torch.as_tensor(a[k]), torch.as_tensor(b[k]), 0, 1e-9) for k in a if k != "run")


def test_kill_and_resume(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (whole / "model").mkdir(parents=True)
    (whole / "model" / "tokenizer.json").write_text("of an earlier run")
    finish(start_ranks(1, "recurrent_depth.py", *FLAGS, "--out", str(whole)), 300)
    ranks, deadline = start_ranks(1, "recurrent_depth.py", *FLAGS, "--out", str(cut)), time.monotonic() + 300
    while not (cut / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(ranks)
    assert cluster.load(cut / "checkpoint.pt")["facts"]["step"] < 60, "the run ended before it was killed"
    finish(start_ranks(1, "recurrent_depth.py", *FLAGS, "--resume", "--out", str(cut)), 300)
    metrics = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()[1:]] for f in (whole, cut)]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 60
    look = lambda *more: R.main(cli.parse(R.Config, ["eval", "--out", str(whole), *more], R.PRESETS))
    assert look() is None and "parity, --block 8 --seed 0\nr   " in capsys.readouterr().out
    assert R.load_weights(whole / "model").shape.n_out == 2 and not (whole / "model" / "tokenizer.json").exists()
    pytest.raises(BadInput, look, "--prompt", "a").match("needs a model of bytes")


def test_alarms_and_rows():
    same, s = torch.randn(1, 1, 8).expand(2, 5, 8), torch.tensor([[[3.0, 4.0]]])
    assert R.alarms(same, same)[1].item() == pytest.approx(1, abs=1e-5)
    assert R.alarms(torch.eye(5)[None], torch.eye(5)[None])[1].item() == pytest.approx(0, abs=1e-6)
    assert R.alarms(s - torch.tensor([0.0, 1.0]), s)[0].item() == pytest.approx(1 / 5)
    data = R.Text(replace(SMALL, preset="bytes", block=16), 256)
    ids, labels = data.draw(4, 16, 3, 5)
    assert torch.equal(ids[:, 1:], labels[:, :-1]) and torch.equal(data.draw(4, 16, 3, 5)[0], ids)
    for one_step in (False, True):
        x, y = (z[0].tolist() for z in R.Parity(0, one_step).draw(1, 6, 1))
        want = [x[t] ^ (x[t - 1] if t > 1 else 0) if one_step else sum(x[1 : t + 1]) % 2 for t in range(1, 7)]
        assert x[0] == 2 and y == [-100, *want]


def test_no_control_passes_the_verdict():
    all_at = functools.partial(dict.fromkeys, R.DEPTHS)
    rising = all_at(1.0) | {1: 0.6, 2: 0.7, 4: 0.8}
    ours = {"accuracy": rising, "loss": all_at(0.1), "longer": all_at(0.95)}
    marks = dict(zip(R.RUNS, (0, 1, 0.8, 1, 0.7, 1, 0.9), strict=True))
    found = {name: {"accuracy": all_at(x), "loss": all_at(0.5)} for name, x in marks.items()} | {"drawn depth": ours}
    assert R.judge(found)[0]
    for name, other in (
        ("drawn depth", {"longer": all_at(0.8)}), ("drawn depth", {"accuracy": rising | {12: 0.97}}),
        ("drawn depth", {"accuracy": rising | {1: 0.75}}), ("drawn depth", {"accuracy": rising | {4: 0.95}}),
        ("fixed depth", {"accuracy": all_at(1.0), "loss": all_at(0.05)}), ("r = 1", {"accuracy": all_at(0.95)}),
        ("made recurrent", found["r = 1"]), ("itself continued", ours), ("random weights", ours),
        ("made recurrent", {"accuracy": all_at(0.985)}), ("drawn depth", {"accuracy": all_at(1.0)}),
    ):  # fmt: skip
        assert not R.judge(found | {name: found[name] | other})[0], name


@pytest.mark.parametrize("argv,message", [
    (["train", "--batch", "7", "--accum", "2"], "--batch 7 must be a multiple"), (["eval"], "Train first"),
    (["train", "--tokenizer", "x.json"], "x.json: no such file"), (["train", "--block", "1024"], "at most 1024 tokens"),
    (["eval", "--model", "/nowhere"], "no such folder or file"), (["train", "--steps", "0"], "are at least 1"),
    (["train", "--data", "x.txt"], "need --preset bytes"), (["train", "--split", "1", "1"], "three numbers"),
    (["demo", "--model", "x"], "does not read --model"), (["train", "--lr", "0"], "above 0"),
])  # fmt: skip
def test_bad_flags(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recurrent_depth.py", *argv, "--device", "cpu", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as e:
        R.cli.run(R.main, R.Config, R.PRESETS)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_quick_demo(tmp_path):
    argv = ["--quick", "--steps", "20", "--batch", "4", "--device", "cpu", "--out", str(tmp_path)]
    said = finish(start_ranks(2, "recurrent_depth.py", *argv), 300)[0]
    assert all(part in said for part in ("claim 1", "claim 2", "rows stop", "picture:", "quick: no verdict"))
