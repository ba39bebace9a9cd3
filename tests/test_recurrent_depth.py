"""recurrent_depth.py: the released layout's vectors, cache, exits, generation, retrofit, ranks, resume, bad input."""

import json
import math
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import finish, kill, run_ranks, run_script, start_ranks

import recurrent_depth as R
from common import cluster
from common.cli import BadInput
from common.weights import open_weights, rope_frequencies, rotate

DATA = Path(__file__).parent / "data" / "recurrent_depth"
V = {k: torch.from_numpy(np.array(v)) for k, v in np.load(DATA / "expected.npz").items()}
IDS, S0 = V["input_ids"], V["s0"]
st = pytest.importorskip("safetensors.torch", reason='needs safetensors: pip install -e ".[models]"')


@pytest.fixture(scope="module")
def model():
    return R.load_weights(DATA)


def tiny(seed=0, **changes):
    return R.RecurrentDepthLM(R.RecurrentConfig.preset("tiny", **changes), seed).eval()


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- the model against the released code's outputs


@torch.no_grad()
def test_states_and_logits_equal_the_released_code(model):
    e = model.embed(IDS)
    close(e, V["prelude_out"], 1e-5)
    s = S0
    for i in range(4):
        s = model.iterate(s, e)
        close(s, V[f"state_{i + 1}"], 1e-5)
    close(model.between(s), V["latent_r4"], 1e-5)
    for r in (0, 1, 2, 4, 8):
        close(model(IDS, r, S0).logits, V[f"logits_r{r}"], 1e-5)
    for r in (16, 32):
        close(model(IDS, r, S0).logits, V[f"logits_r{r}"], 1e-4)
    close(model(IDS, 32, V["s0_b"]).logits, V["logits_r32_b"], 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_truncated_gradients_equal_the_released_code(model, checkpointing):
    labels = F.pad(IDS[:, 1:], (0, 1), value=-100)
    close(model(IDS, 4, S0, labels).loss, V["loss_r4"], 1e-5)
    model.checkpointing = checkpointing
    model.zero_grad()
    out = model(IDS, (3, 2), S0, labels)
    out.loss.backward()
    model.checkpointing = False
    close(out.loss, V["trunc_loss_n3k2"], 1e-5)
    assert out.steps == 5
    seen = 0
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
        if f"trunc_grad_norm/{name}" in V:
            close(p.grad.double().norm(), V[f"trunc_grad_norm/{name}"].double(), 1e-5)
            close(p.grad.double().sum(), V[f"trunc_grad_sum/{name}"].double(), 1e-4)
            seen += 1
    assert seen == sum(k.startswith("trunc_grad_norm") for k in V) > 0


def test_truncation_is_a_detach():
    """(n, k) gives the gradients of n iterations, a detach, and k more; float64."""
    m = tiny().double()
    ids = torch.arange(12).view(2, 6)
    s0 = m.init_state(m.embed(ids), generator=cluster.generator(1)).detach()
    m(ids, (3, 2), s0, ids).loss.backward()
    got = {n: p.grad.clone() for n, p in m.named_parameters()}
    m.zero_grad()
    e = m.embed(ids)
    s = s0
    for i in range(5):
        s = m.iterate(s, e).detach() if i < 3 else m.iterate(s, e)
    F.cross_entropy(m.decode(s).flatten(0, 1), ids.flatten()).backward()
    # iterations 0..2 have no graph at all, so e gets its gradient through the last two only
    for n, p in m.named_parameters():
        close(got[n], p.grad, 1e-12)


def test_sizes_and_presets():
    with torch.device("meta"):
        m = R.RecurrentDepthLM(R.RecurrentConfig.preset("huginn-3.5b"))
    assert sum(p.numel() for p in m.parameters()) == 3_564_976_800
    assert m.cfg.depth == 132
    shapes = {n: tuple(p.shape) for n, p in m.named_parameters()}
    assert shapes["transformer.core_block.3.attn.Wqkv.weight"] == (15840, 5280)
    assert shapes["transformer.core_block.3.attn.qk_bias"] == (2, 1, 55, 96)
    assert shapes["transformer.adapter.weight"] == (5280, 10560)
    assert R.RecurrentConfig.preset("small").head_dim == 32
    assert 400_000 < sum(p.numel() for p in tiny().parameters()) < 500_000


def test_initialisation():
    m = tiny(n_embd=256, num_attention_heads=4, intermediate_size=512)
    std, L = math.sqrt(2 / (5 * 256)), 1 + 1 + 2 * 4
    for name, p in m.named_parameters():
        if p.ndim == 2:
            want = std / math.sqrt(2 * L) if name.endswith("proj.weight") else std
            assert p.std().item() == pytest.approx(0.9866 * want, rel=0.03), name  # cut at 3 std
            assert p.abs().max() <= 3 * want
        else:
            assert (p == (0 if "bias" in name else 1)).all()
    s = m.init_state(torch.empty(4, 64, 256), generator=cluster.generator(0))
    assert s.std().item() == pytest.approx(0.9866 * math.sqrt(0.4), rel=0.02) and s.abs().max() <= 3 * math.sqrt(0.4)
    assert (m.init_state(torch.empty(1, 2, 256), 0) == 0).all()


def test_sampler():
    """The ten draws of the specification, the distribution, and no dependence on anything but the step."""
    want = [(21, 8), (21, 8), (25, 8), (44, 8), (32, 8), (8, 8), (27, 8), (21, 8), (9, 8), (9, 8)]
    torch.manual_seed(123)
    assert [R.sample_steps(i, 32, 8) for i in range(1, 11)] == want
    p = torch.tensor([sum(R.sample_steps(i, 8, 4)) for i in range(4000)]).float()
    assert p.mean().item() == pytest.approx(9.0, abs=0.3) and p.std().item() == pytest.approx(5.1, abs=0.4)
    assert all(1 <= R.sample_steps(i, 1, 100)[1] for i in range(50))  # k is clamped to the draw, never 0
    for bad in ((0.5, 4), (8, 0), (float("nan"), 1)):
        with pytest.raises(ValueError, match="mean recurrence"):
            R.sample_steps(1, *bad)
    assert [R.mean_schedule(t, 100, 8, 0.25) for t in (0, 1, 12, 25, 99)] == [1, 1, 4, 8, 8]
    assert R.mean_schedule(50, 100, 32, 1.0, "1-sqrt") == math.ceil(32 * (1 - math.sqrt(0.5)))
    with pytest.raises(ValueError, match="unknown shape"):
        R.mean_schedule(0, 1, 8, 0.5, "cosine")


def test_bf16_keeps_norms_and_logits_in_float32(model):
    half = R.load_weights(DATA).to(torch.bfloat16)
    out = half(IDS, 4, S0)
    assert out.logits.dtype == torch.float32 and out.state.dtype == torch.bfloat16
    close(out.logits, V["logits_r4"], 0.3)
    x = torch.randn(3, 40).bfloat16() * 100
    norm = half.transformer.ln_f
    want = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm.weight
    assert torch.equal(norm(x), want)


# ---- weights in and out


def test_load_with_and_without_the_copies_and_with_an_index(model, tmp_path):
    tensors = st.load_file(DATA / "model.safetensors")
    assert {"lm_head.weight", "freqs_cis"} <= set(tensors)
    bare = {n: t for n, t in tensors.items() if n not in ("lm_head.weight", "freqs_cis")}
    (tmp_path / "config.json").write_text((DATA / "config.json").read_text())
    names = sorted(bare)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        st.save_file({n: bare[n] for n in part}, tmp_path / file)
    weight_map = {n: f for f, part in parts.items() for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, str(tmp_path), DATA / "model.safetensors"):
        other = R.load_weights(path)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="index names it"):
        R.load_weights(tmp_path)
    R.save_weights(model, tmp_path)  # over the index
    assert torch.equal(R.load_weights(tmp_path)(IDS, 2, S0).logits, model(IDS, 2, S0).logits)


def test_a_model_does_not_inherit_a_tokenizer(tmp_path):
    old = tmp_path / "model" / "tokenizer.json"
    old.parent.mkdir()
    old.write_text("of the model that stood here before")
    R.keep(replace(SMALL, out=str(tmp_path)), cluster.World(0, 1, torch.device("cpu")), tiny(), R.Parity(SMALL))
    assert not old.exists() and R.load_weights(old.parent).cfg == tiny().cfg


def test_save_and_load_is_exact(model, tmp_path):
    untied = tiny(vocab_size=3, n_out=2, tie_embeddings=False)
    for i, m in enumerate((model, untied, tiny().to(torch.bfloat16))):
        R.save_weights(m, tmp_path / str(i))
        again = R.load_weights(str(tmp_path / str(i)))
        assert again.cfg == m.cfg
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(m.parameters(), again.parameters(), strict=True)
        )
        ids = torch.ones(1, 5, dtype=torch.long)
        assert torch.equal(
            m(ids, 2, m.init_state(m.embed(ids), 0)).logits, again(ids, 2, m.init_state(m.embed(ids), 0)).logits
        )


def test_one_error_names_every_wrong_tensor(tmp_path):
    tensors = st.load_file(DATA / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    tensors["stranger"] = torch.zeros(2)
    tensors["transformer.wte.weight"] = torch.zeros(3, 40)
    st.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((DATA / "config.json").read_text())
    with pytest.raises(ValueError) as e:
        R.load_weights(tmp_path)
    for part in (
        "missing transformer.ln_f.weight (40,)",
        "extra stranger (2,)",
        "transformer.wte.weight is (3, 40), needs (64, 40)",
    ):
        assert part in str(e.value)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(BadInput, match="incomplete or damaged"):
        R.load_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        R.load_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        R.load_weights(tmp_path / "nowhere")


# ---- the cache


@torch.no_grad()
def decode(model, steps, budget=None, lookup="exact"):
    cache = R.RecurrentCache(budget, lookup)
    out = [model(IDS[:, :8], steps[0], S0[:, :8], cache=cache).logits]
    out += [
        model(IDS[:, t : t + 1], r, S0[:, t : t + 1], cache=cache).logits
        for t, r in zip(range(8, 12), steps[1:], strict=True)
    ]
    assert cache.length == 12
    return torch.cat(out, dim=1)


def test_cached_decoding_equals_the_released_code(model):
    close(decode(model, [4] * 5), V["cached_r4"], 1e-5)
    close(decode(model, [4] * 5), V["logits_r4"], 1e-5)
    close(decode(model, [6] * 5), V["full_r6"], 1e-5)
    for n in (4, 8, 16):
        want = V[f"shared_compress-s{n}"]
        close(decode(model, [6] * 5, f"compress-s{n}"), want, 1e-5)
        close(decode(model, [6] * 5, n // 4), want, 1e-5)
        close(want[:, :8], V["full_r6"][:, :8], 1e-5)  # sharing changes later tokens only
        assert (want[:, 8:] - V["full_r6"][:, 8:]).abs().max() > 1e-3
    steps = V["varsteps"].tolist()
    close(decode(model, steps, None, "latest"), V["varsteps_latest-m4"], 1e-5)
    close(decode(model, steps, 1, "latest"), V["varsteps_latest-m4-compress-s4"], 1e-5)


@torch.no_grad()
def test_cache_grows_truncates_and_counts_bytes():
    m = tiny().double()
    ids = torch.randint(256, (2, 40), generator=cluster.generator(0))
    s0 = m.init_state(m.embed(ids), generator=cluster.generator(1))
    want = m(ids, 5, s0).logits
    cache = R.RecurrentCache()
    got = [m(ids[:, a:b], 5, s0[:, a:b], cache=cache).logits for a, b in ((0, 3), (3, 4), (4, 20), (20, 21), (21, 40))]
    close(torch.cat(got, dim=1), want, 1e-12)
    cache.truncate(10)
    close(m(ids[:, 10:30], 5, s0[:, 10:30], cache=cache).logits, want[:, 10:30], 1e-12)
    assert cache.bytes() == cache.store.numel() * 8 == 2 * (1 + 1 + 5 * 2) * 2 * 3 * 40 * 32 * 8
    small = R.RecurrentCache(1)
    m(ids, 5, s0, cache=small)
    assert small.store.shape[1] == 1 + 1 + 2


@torch.no_grad()
def test_cache_refuses(model):
    cache = R.RecurrentCache()
    model(IDS, 2, S0, cache=cache)
    with pytest.raises(ValueError, match="holds 2 rows, the call has 1"):
        model(IDS[:1, :1], 2, cache=cache)
    with pytest.raises(ValueError, match="different model"):
        tiny()(IDS[:, :1], 2, cache=cache)
    with pytest.raises(ValueError, match="has run 2 iterations and this call runs 3"):
        model(IDS[:, :1], 3, cache=cache)
    with pytest.raises(ValueError, match="60 new tokens exceed block_size 64"):
        model(torch.zeros(2, 60, dtype=torch.long), 2, cache=cache)
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(13)
    for bad in (0, -1, 1.5, True, "s4", "compress-s"):
        with pytest.raises(ValueError, match="budget counts whole iterations"):
            R.RecurrentCache(bad)
    for bad in ("compress-s6", "compress-s0"):
        with pytest.raises(ValueError, match="budget counts whole iterations"):
            model(IDS, 2, cache=R.RecurrentCache(bad))
    with pytest.raises(ValueError, match="unknown lookup"):
        R.RecurrentCache(lookup="first")


# ---- exits


@torch.no_grad()
@pytest.mark.parametrize("name", R.EXITS)
def test_exit_values_equal_the_released_code(model, name):
    rule, e, s = R.EXITS[name](), model.embed(IDS[:1]), S0[:1]
    rule.start(s)
    want = V["exit_values/" + {"argmax": "argmax-stability"}.get(name, name)]
    for i in range(24):
        s = model.iterate(s, e)
        value = rule.values(s, model.decode(s)).double()
        close(value.mean() if rule.over == "mean" else value[0, -1], want[i], 1e-5)


@torch.no_grad()
def test_exit_steps(model):
    first = lambda rule, **kw: model(IDS[:1], 24, S0[:1], exit=rule, **kw).steps.item()
    for name, rule in {
        "kl": R.KLExit(1e-3),
        "entropy-diff": R.EntropyDiffExit(),
        "argmax-stability": R.ArgmaxStableExit(),
    }.items():
        assert first(rule) == V[f"exit_step/{name}"]
    assert first(R.LatentDiffExit()) == 24 and V["exit_step/latent-diff"] == 0  # never
    kl = V["exit_values/kl"]
    assert first(R.KLExit(1e-3, min_steps=14)) == 14 and kl[13] < 1e-3
    assert first(R.KLExit(1e-3, max_entropy=0.1)) == 24  # this model is never so sure
    assert first(R.KLExit(1e9, every=4)) == 4 and first(R.KLExit(1e9, every=4, min_steps=5)) == 8
    stable = first(R.ArgmaxStableExit())  # a later min_steps does not make the count begin anew
    assert first(R.ArgmaxStableExit(min_steps=stable + 1)) == stable + 1
    out = model(IDS[:1], 24, S0[:1], exit=R.KLExit(1e-3))  # the logits are those of the iterate it left at
    close(out.logits, model(IDS[:1], out.steps.item(), S0[:1]).logits, 1e-6)
    assert R.LatentDiffExit(max_entropy=1.0).reads_logits and not R.LatentDiffExit().reads_logits


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("rule", [R.LatentDiffExit(0.5), R.KLExit(0.01, min_steps=2)], ids=["latent", "kl"])
def test_rows_exit_for_themselves(model, rule, budget):
    """A batch gives each row what it would get alone: iterations, tokens, and the keys that later tokens read."""
    prompt = torch.cat([IDS[:, :6], IDS[:, 6:]])
    cache = lambda: R.RecurrentCache(budget, "latest")
    out, stats = R.generate(model, prompt, 12, 8, exit=rule, cache=cache(), exit_prompt=True)
    assert len({tuple(r) for r in stats["iterations"]}) > 1, "rows must differ for this test to mean anything"
    for i in range(4):
        alone, own = R.generate(model, prompt[i : i + 1], 12, 8, exit=rule, cache=cache(), exit_prompt=True)
        assert torch.equal(out[i : i + 1], alone) and stats["iterations"][i] == own["iterations"]


@pytest.mark.parametrize("kind", [*R.EXITS.values()])
def test_exit_rules_refuse(kind):
    for bad in (0, -1, float("nan"), -1e-9):
        with pytest.raises(ValueError, match="threshold must be positive"):
            kind(bad)
    for kw in ({"min_steps": 0}, {"every": 0}, {"max_entropy": 0}, {"max_entropy": float("nan")}):
        with pytest.raises(ValueError, match="must be positive"):
            kind(**kw)
    with pytest.raises(ValueError, match="is not last, mean or max"):
        kind(over="some")
    assert R.KLExit().threshold == 5e-4


# ---- generation


def test_generation_equals_the_released_code(model):
    prompt = IDS[:1, :6]
    run = lambda *a, **kw: R.generate(model, prompt, 16, *a, init_scale=0, **kw)
    out, stats = run(6)
    assert torch.equal(out, V["gen_greedy_r6"]) and stats["iterations"] == [6] * 16 and stats["cache_bytes"] > 0
    assert torch.equal(run(6, warm_start=True)[0], V["gen_cont_r6"])
    out, stats = run(24, exit=R.KLExit(), exit_prompt=True)
    assert torch.equal(out, V["gen_adaptive_kl_max24"]) and min(stats["iterations"]) < 24
    assert run(24, exit=R.KLExit())[1]["iterations"][0] == 24  # the prompt does not exit by itself
    out, stats = run(6, draft_steps=2, lookahead=3)
    assert (
        torch.equal(out, V["gen_spec_d2_l3_r6"][:, :22]) and sum(stats["accepted"]) + len(stats["accepted"]) + 1 == 16
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draft,lookahead", [(1, 4), (3, 2), (6, 8)])
def test_speculation_equals_greedy(seed, draft, lookahead):
    m = tiny(seed).double()
    with torch.no_grad():
        m.transformer.wte.weight *= 3  # sharper logits
    prompt = torch.randint(256, (1, 5), generator=cluster.generator(seed))
    for scale in (0.0, 1.0):  # noise depends on the position, so it agrees as well
        g = lambda: cluster.generator(seed)
        want, _ = R.generate(m, prompt, 21, 6, init_scale=scale, generator=g())
        got, stats = R.generate(
            m, prompt, 21, 6, init_scale=scale, generator=g(), draft_steps=draft, lookahead=lookahead
        )
        assert torch.equal(got, want) and got.shape[1] == 26
        assert len(stats["iterations"]) == 21 and all(0 <= a <= lookahead for a in stats["accepted"])


def test_generation_without_a_cache_agrees_and_options():
    m = tiny(1).double()
    prompt = torch.randint(256, (2, 7), generator=cluster.generator(3))
    want = prompt
    for _ in range(6):
        e = m.embed(want)
        want = torch.cat([want, m(want, 5, m.init_state(e, 0)).logits[:, -1:].argmax(-1)], dim=1)
    got, _ = R.generate(m, prompt, 6, 5, init_scale=0)
    assert torch.equal(got, want)
    cache = R.RecurrentCache()  # go on with a cache that holds all but the last token
    half, _ = R.generate(m, prompt, 3, 5, init_scale=0, cache=cache)
    assert torch.equal(R.generate(m, half, 3, 5, init_scale=0, cache=cache)[0], want)
    seen = []
    draw = lambda s: R.generate(m, prompt, 6, 5, temperature=2.0, generator=cluster.generator(s), stream=seen.append)[0]
    a, b = draw(1), draw(1)
    assert torch.equal(a, b) and not torch.equal(a, draw(2))
    assert torch.equal(torch.stack(seen[:6], dim=1), a[:, 7:])
    assert torch.equal(R.generate(m, prompt, 0, 5)[0], prompt)


def test_generate_refuses(model):
    p = IDS[:1, :4]
    for kw in ({"temperature": 1.0}, {"warm_start": True}, {"exit": R.KLExit()}, {"lookahead": 0}):
        with pytest.raises(ValueError, match="draft_steps >= 1 needs greedy"):
            R.generate(model, p, 4, 4, draft_steps=2, **kw)
    with pytest.raises(ValueError, match="draft_steps >= 1 needs greedy"):
        R.generate(model, IDS[:, :4], 4, 4, draft_steps=2)
    with pytest.raises(ValueError, match="would change the output"):
        R.generate(model, p, 4, 4, draft_steps=2, cache=R.RecurrentCache(1))
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        R.generate(model, p, 4, 4, temperature=-1)
    with pytest.raises(ValueError, match="4 tokens and 61 new ones exceed block_size 64"):
        R.generate(model, p, 61, 4)
    cache = R.RecurrentCache()
    model(p, 4, cache=cache)
    with pytest.raises(ValueError, match="at least the last must be new"):
        R.generate(model, p, 4, 4, cache=cache)
    for sample in (R.generate, R.diffusion_forcing):
        for ids, message in ((p + 64, "is outside the vocabulary"), (p.float(), "must be int64"), (p[:, :0], "empty")):
            with pytest.raises(ValueError, match=message):
                sample(model, ids, 4, 4)


def test_diffusion_forcing_equals_greedy_where_the_core_converges():
    """With a weak state path, four iterations reach the fixed point, and waves give plain decoding's tokens."""
    m = tiny(2)
    with torch.no_grad():
        m.transformer.adapter.weight[:, :96] *= 0.1
        m.transformer.wte.weight *= 2
    prompt = torch.randint(256, (1, 9), generator=cluster.generator(0))
    want, _ = R.generate(m, prompt, 20, 32)
    for wave in (128, 3):
        got, stats = R.diffusion_forcing(m, prompt, 20, wave=wave, momentum=0.0, threshold=0.01)
        assert torch.equal(got, want) and stats["unfrozen"] == 0 and stats["serial"] == 4 * stats["calls"]
    few, stats = R.diffusion_forcing(m, prompt, 20, max_calls=3)
    assert stats["calls"] == 3 and stats["unfrozen"] > 0
    with pytest.raises(ValueError, match="one row"):
        R.diffusion_forcing(m, prompt.expand(2, -1), 4)


# ---- retrofit


def llama(seed=0, layers=7, tied=False, **scaling):
    c = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 64, "tie_word_embeddings": tied, **scaling,
    }  # fmt: skip
    g, sd = cluster.generator(seed), {}
    draw = lambda *s: torch.randn(s, generator=g) / math.sqrt(s[-1])
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
        }.items():  # fmt: skip
            sd[f"model.layers.{i}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            sd[f"model.layers.{i}.{name}.weight"] = 1 + 0.1 * draw(32)
    sd |= {"model.embed_tokens.weight": draw(50, 32), "model.norm.weight": 1 + 0.1 * draw(32)}
    return c, sd if tied else sd | {"lm_head.weight": draw(50, 32)}


def run_llama(c, sd, ids, layers):
    """A Llama's hidden states, from the given layers only; written apart from the script."""
    norm = lambda x, w: F.rms_norm(x, w.shape, w, c["rms_norm_eps"])
    H, Hk = c["num_attention_heads"], c["num_key_value_heads"]
    angle = torch.outer(torch.arange(ids.shape[1]).float(), rope_frequencies(c))
    x = F.embedding(ids, sd["model.embed_tokens.weight"])
    for i in layers:
        w = lambda name, i=i: sd[f"model.layers.{i}.{name}.weight"]
        y = norm(x, w("input_layernorm"))
        qkv = F.linear(y, torch.cat([w("self_attn.q_proj"), w("self_attn.k_proj"), w("self_attn.v_proj")]))
        q, k, v = qkv.unflatten(-1, (H + 2 * Hk, -1)).transpose(1, 2).split([H, Hk, Hk], dim=1)
        a = F.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v, is_causal=True, enable_gqa=True)
        x = x + F.linear(a.transpose(1, 2).flatten(2), w("self_attn.o_proj"))
        y = norm(x, w("post_attention_layernorm"))
        gate, up = F.linear(y, torch.cat([w("mlp.gate_proj"), w("mlp.up_proj")])).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, w("mlp.down_proj"))
    return x, F.linear(norm(x, sd["model.norm.weight"]), sd.get("lm_head.weight", sd["model.embed_tokens.weight"]))


class ReturnE(torch.nn.Module):
    """The adapter of the identity test: of [state, e] it keeps e."""

    def forward(self, x):
        return x.chunk(2, dim=-1)[1]


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}])  # fmt: skip
def test_retrofit_is_the_source_without_the_dropped_layers(tied, scaling, tmp_path):
    c, sd = llama(tied=tied, **scaling)
    m = R.retrofit(sd, c, (2, 2, 1)).eval()
    ids = torch.randint(50, (2, 11), generator=cluster.generator(5))
    bound = 1 / math.sqrt(64)
    assert m.transformer.adapter.weight.abs().max() <= bound and m.transformer.adapter.weight.std() > 0.5 * bound
    R.save_weights(m, tmp_path)
    again = R.load_weights(tmp_path)
    s0 = m.init_state(m.embed(ids), generator=cluster.generator(0))
    assert s0.std().item() == pytest.approx(0.9866 * math.sqrt(0.4 / 32), rel=0.1)
    assert torch.equal(again(ids, 3, s0).logits, m(ids, 3, s0).logits)
    m.transformer.adapter = ReturnE()
    want, logits = run_llama(c, sd, ids, [0, 1, 4, 5])
    assert torch.equal(m(ids, 1).state, want)  # bit for bit
    want, logits = run_llama(c, sd, ids, [0, 1, 4, 5, 6])
    assert torch.equal(m(ids, 1).logits, logits)
    greedy, _ = R.generate(m, ids[:1], 8, 1)
    for t in range(11, 19):
        assert greedy[0, t] == run_llama(c, sd, greedy[:, :t], [0, 1, 4, 5, 6])[1][0, -1].argmax()


def test_retrofit_keeps_the_type():
    c, sd = llama()
    m = R.retrofit({name: w.bfloat16() for name, w in sd.items()}, c, (2, 2, 1))
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert m(torch.arange(8)[None], 2).logits.isfinite().all()


def test_retrofit_refuses():
    c, sd = llama()
    with pytest.raises(ValueError, match="needs 8 layers, each part at least 1; the model has 7"):
        R.retrofit(sd, c, (2, 4, 2))
    with pytest.raises(ValueError, match="each part at least 1"):
        R.retrofit(sd, c, (0, 2, 2))
    for name in ("self_attn.q_proj.bias", "self_attn.q_norm.weight"):  # Qwen, OLMo-2
        assert R.retrofit(sd | {f"model.layers.3.{name}": torch.zeros(32)}, c, (2, 2, 1))  # of a dropped layer
        with pytest.raises(ValueError, match=rf"have no model\.layers\.5\.{re.escape(name)}"):
            R.retrofit(sd | {f"model.layers.5.{name}": torch.zeros(32)}, c, (2, 2, 1))
    del sd["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        R.retrofit(sd, c, (2, 2, 1))


@torch.no_grad()
@pytest.mark.weights
def test_retrofit_of_a_real_model():
    weights = open_weights("smollm2")
    sd, c = weights.state_dict(), weights.config
    m = R.retrofit(sd, c, (6, 12, 6)).eval()
    ids = torch.tensor([weights.tokenizer().encode("The capital of France is").ids])
    keep = [*range(6), *range(12, 30)]
    out, stats = R.generate(m, ids, 3, 4, exit=R.LatentDiffExit(0.3))
    assert out.shape == (1, 8) and len(stats["iterations"]) == 3
    m.transformer.adapter = ReturnE()
    got = m(ids, 1)
    want, logits = run_llama(c, sd, ids, keep)
    assert torch.equal(got.state, run_llama(c, sd, ids, keep[:-6])[0])
    close(got.logits, logits, 0)


# ---- the optimizer


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
        size = lr / max(1, rho) / (1 - 0.9**t)
        x = [
            a * (1 - lr / 0.01 * 0.1) - size * math.atan2(b, math.sqrt(c / (1 - 0.95**t)))
            for a, b, c in zip(x, m, v, strict=True)
        ]
        close(p.detach(), torch.tensor(x, dtype=torch.float64), 1e-12)
    q = torch.nn.Parameter(torch.zeros(3))
    q.grad = torch.tensor([1e-12, 1.0, -1e6])
    R.AtanAdam([q], lr=1.0, weight_decay=0.0).step()
    close(q.detach().abs(), torch.full((3,), 10 * math.atan(1 / math.sqrt(20))), 1e-4)  # 2.20 lr whatever the scale
    loss = lambda: (opt.zero_grad(), y := p.square().sum(), y.backward())[1]
    assert opt.step(loss).item() == pytest.approx(sum(a * a for a in x)) and p.tolist() != x
    for kw in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="must be >= 0"):
            R.AtanAdam([q], **kw)


# ---- ranks, resume

SMALL = R.Config(block=8, batch=8, steps=6, d_model=16, ff=24, r_bar=3, k=2, warmup=1, settle=9.0, log_every=1)


def _gradients(rank, size, out):
    w = cluster.World(rank, size, torch.device("cpu"))
    cfg, data = replace(SMALL, accum=2), R.Parity(SMALL)
    t = R.Trainer(cfg, data, w, model=R.RecurrentDepthLM(R.shape_of(cfg, data)).double())
    loss = t.micro_loss(3).loss  # DDP averages over the ranks
    loss.backward()
    mean = cluster.total(loss.detach()) / size
    g = torch.cat([p.grad.flatten() for p in t.model.parameters()])
    t.optimizer.zero_grad()
    lines = [t.advance(True) for _ in range(4)]
    if rank == 0:
        moved = torch.cat([p.detach().flatten() for p in t.model.parameters()])
        torch.save({"grad": g, "loss": mean, "lines": [x["loss"] for x in lines], "p": moved}, f"{out}/{size}.pt")
    depths = [None] * size
    torch.distributed.all_gather_object(depths, [t.depth(i) for i in range(20)])
    assert all(d == depths[0] for d in depths) and len(set(depths[0])) > 3
    if size > 1:  # ranks that draw differently are found at once
        t.depth = lambda micro: (rank, 1)
        with pytest.raises(RuntimeError, match="ranks draw different depths"):
            t._same_depths()


@pytest.mark.slow
def test_two_ranks_match_one(tmp_path):
    for size in (1, 2):
        (tmp_path / f"store{size}").mkdir()
        run_ranks(_gradients, size, tmp_path / f"store{size}", str(tmp_path))
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    close(two["grad"], one["grad"], 1e-12)
    close(two["loss"], one["loss"], 1e-12)
    assert two["lines"] == pytest.approx(one["lines"], abs=1e-9)
    close(two["p"], one["p"], 1e-6)


FLAGS = "--block 8 --settle 0.69 --batch 8 --d-model 16 --ff 24 --r-bar 3 --k 2 --log-every 1 --rows 32".split()


def _metrics(folder) -> list[dict]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()[1:]]


@pytest.mark.drill
def test_kill_and_resume(tmp_path):
    """kill -9 in mid-run, then --resume: the metrics of a run that was never stopped, exactly; then the other modes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["train", "--steps", "120", "--save-every", "7", *FLAGS]
    finish(start_ranks(1, "recurrent_depth.py", *argv, "--out", str(whole)))
    ranks = start_ranks(2, "recurrent_depth.py", *argv, "--out", str(tmp_path / "two"))  # same run on two ranks
    other = start_ranks(1, "recurrent_depth.py", *argv, "--out", str(killed))
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(other, signal.SIGKILL)
    assert cluster.load(killed / "checkpoint.pt")["counts"][0] < 120, "the run ended before it was killed"
    out = finish(start_ranks(1, "recurrent_depth.py", *argv, "--resume", "--out", str(killed)))
    assert "accuracy" in out[0] and "weights:" in out[0]
    assert _metrics(killed) == _metrics(whole) and len(_metrics(whole)) == 121
    finish(ranks)
    same = [(a["loss"], b["loss"]) for a, b in zip(_metrics(whole)[:40], _metrics(tmp_path / "two")[:40], strict=True)]
    assert max(abs(a - b) for a, b in same) < 1e-3
    for flag, value, was in (("--k", "3", "2"), ("--seed", "9", "0")):
        done = run_script("recurrent_depth.py", *argv, "--resume", "--out", str(killed), flag, value)
        assert done.returncode == 2 and f"{flag} {was}" in done.stderr and f"{flag} {value}" in done.stderr
        assert "Traceback" not in done.stderr

    at = ["--model", str(whole / "model"), *FLAGS, "--out", str(tmp_path / "x")]
    assert "loss in nats" in run_script("recurrent_depth.py", "eval", *at, "--num-steps", "0", "1", "4").stdout
    assert "token correlation" in run_script("recurrent_depth.py", "inspect", *at, "--num-steps", "1", "4").stdout
    done = run_script("recurrent_depth.py", "generate", *at, "--prompt", "0110", "--new", "5", "--exit", "kl")
    assert "iterations per token" in done.stdout and "tokens/s" in done.stdout, done.stderr


@pytest.mark.drill
def test_sigterm_writes_a_checkpoint_and_exits_0(tmp_path):
    ranks = start_ranks(
        2, "recurrent_depth.py", "train", "--steps", "100000", "--save-every", "0", *FLAGS, "--out", str(tmp_path)
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(_metrics(tmp_path)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    out = finish(ranks)
    assert [p.returncode for p in ranks] == [0, 0] and "go on with --resume" in out[0]
    assert cluster.load(tmp_path / "checkpoint.pt")["counts"][0] == _metrics(tmp_path)[-1]["step"]


def test_non_finite_loss_is_skipped_then_ends_the_run():
    with cluster.world("cpu") as w:
        t = R.Trainer(SMALL, R.Parity(SMALL), w)
        t.advance(False)
        before = [p.detach().clone() for p in t.model.parameters()]
        good = t.micro_loss
        t.micro_loss = lambda micro: (y := good(micro))._replace(loss=y.loss * math.nan)
        line = t.advance(True)
        assert t.skipped == line["skipped"] == 1 and t.step == 2
        assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))
        t.micro_loss = good
        t.advance(False)
        assert t.in_a_row == 0 and not torch.equal(before[0], next(t.model.parameters()))
        t.micro_loss = lambda micro: (y := good(micro))._replace(loss=y.loss * math.inf)
        with pytest.raises(BadInput, match="not finite in 20 steps in a row, up to step 23"):
            for _ in range(20):
                t.advance(False)


def test_ramp_raises_depth_and_gradient_together():
    cfg = replace(SMALL, steps=100, r_bar=8, k=8, ramp=0.5)
    with cluster.world("cpu") as w:
        depth = R.Trainer(cfg, R.Parity(cfg), w).depth
    assert all(k == 1 for _, k in map(depth, range(6)))  # r_bar is 1 there
    assert all(k <= 4 for _, k in map(depth, range(25))) and max(k for _, k in map(depth, range(50, 100))) == 8


def test_resume_compares_the_settings():
    with cluster.world("cpu") as w:
        resume = lambda cfg, state=None: R.Trainer(cfg, R.Parity(cfg), w, state)
        state = resume(SMALL).state()
        assert resume(SMALL, state).step == 0
        with pytest.raises(BadInput, match=r"trained with --split \(6, 12, 6\), this run asks for --split \(5, 5, 5\)"):
            resume(replace(SMALL, split=(5, 5, 5)), state)


def test_alarms():
    same = torch.randn(1, 1, 8).expand(2, 5, 8)
    assert R.correlation(same).item() == pytest.approx(1, abs=1e-5)
    assert R.correlation(torch.eye(5)[None]).item() == pytest.approx(0, abs=1e-6)
    m = tiny()
    out = m(IDS, 3, m.init_state(m.embed(IDS), 0))
    want = ((out.state - out.before).norm(dim=-1) / out.state.norm(dim=-1)).mean().item()
    assert R.change(out.state, out.before).mean().item() == pytest.approx(want)
    with torch.no_grad():
        m.transformer.adapter.weight[:, :96] = 0  # a core that ignores its state has collapsed
    out = m(IDS, 3)
    assert (R.change(out.state, out.before) == 0).all()


def test_text_rows():
    cfg = replace(SMALL, task="text", data=("docs",), block=16)
    data = R.Text(cfg)
    ids, labels = data.draw(4, 16, 5)
    assert ids.shape == labels.shape == (4, 16) and torch.equal(ids[:, 1:], labels[:, :-1])
    assert torch.equal(data.draw(4, 16, 5)[0], ids) and not torch.equal(data.draw(4, 16, 6)[0], ids)
    x, y = R.Parity.label(torch.tensor([[1, 0, 1, 1]]))
    assert x.tolist() == [[2, 1, 0, 1, 1]] and y.tolist() == [[-100, 1, 1, 0, 1]]


# ---- bad input

MODEL_CALLS = [
    *[(lambda m, x=x: m(IDS, x), "num_steps must be an int >= 0 or a pair (no_grad, grad)")
      for x in (-1, 2.0, True, torch.tensor(3), (1, 2, 3), (1, -1), (1.0, 2), "4")],
    (lambda m: m(IDS, (4, 0), labels=IDS), "at least one iteration must carry gradient"),
    (lambda m: m(IDS[:, :0], 2), "ids are empty"),
    (lambda m: m(IDS - 10, 2), "id -8 is outside the vocabulary [0, 64)"),
    (lambda m: m(IDS + 10, 2), "id 68 is outside the vocabulary [0, 64)"),
    (lambda m: m(IDS.float(), 2), "ids must be int64"),
    (lambda m: m(IDS[0], 2), "ids must be int64 (B, T)"),
    (lambda m: m(torch.zeros(1, 65, dtype=torch.long), 2), "0 cached + 65 new tokens exceed block_size 64"),
    (lambda m: m(IDS, 2, S0[:, :3]), "s0 must be floating point of shape (2, 12, 40)"),
    (lambda m: m(IDS, 2, S0.long()), "s0 must be floating point"),
    (lambda m: m(IDS, 2, labels=IDS[:, 1:]), "do not match ids"),
    (lambda m: m(IDS, 2, positions=torch.arange(3)), "positions must have shape (12,)"),
]  # fmt: skip


@pytest.mark.parametrize("call,message", MODEL_CALLS)
def test_bad_calls(model, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(model)


def test_what_is_allowed(model):
    with torch.no_grad():
        assert model(IDS, (4, 0), labels=IDS).loss.isfinite()  # no gradient is wanted
        assert model(IDS, 0, S0).steps == 0 and model(IDS, 200, S0).logits.isfinite().all()  # no cap
        assert model(IDS).steps == 6  # the mean recurrence
        shifted = model(IDS, 2, S0, positions=torch.arange(12) + 5).logits
        close(shifted, V["logits_r2"], 1e-4)  # rotary attention sees distances only


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"injection_type": "add"}, "injection_type 'add' is unsupported, only 'linear'"),
        ({"block_class_name": "PreNorm"}, "'PreNorm' is unsupported, only"),
        ({"n_embd": 97}, "n_embd 97 is not a multiple of num_attention_heads 3"),
        ({"n_embd": 99}, "head size 33 is odd"),
        ({"mean_recurrence": 0}, "must be >= 1"),
        ({"n_out": 2}, "needs tie_embeddings=False"),
        ({"n_layers_in_recurrent_block": 0}, "the core has 0 layers"),
        ({"num_key_value_heads": 1}, "cannot share 1 key/value heads"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        R.RecurrentConfig.preset("tiny", **changes)
    with pytest.raises(ValueError, match="unknown preset"):
        R.RecurrentConfig.preset("large")


@pytest.mark.parametrize(
    "argv,message",
    [
        (["train", "--batch", "7", "--accum", "2"], "--batch 7 does not divide"),
        (["eval", "--model", "/nowhere"], "no such folder or file"),
        (["eval"], "there is no model in"),
        (["demo", "--num-steps", "1", "2"], "needs the depths"),
        (["demo", "--task", "text"], "--preset bytes"),
        (["train", "--steps", "0"], "--steps must be at least 1"),
        (["train", "--layers", "1", "1"], "three numbers"),
        (["train", "--d-model", "65"], "65 is not a multiple of"),
        (["train", "--layers", "1", "0", "1"], "the core has 0 layers"),
        (["demo", "--block", "3"], "--block 3 must be at least 4"),
        (["generate", "--model", "tiny", "--temperature", "-1"], "temperature must be >= 0"),
        (["generate", "--model", "tiny", "--budget", "-1"], "budget counts whole iterations"),
        (["generate", "--model", "tiny", "--draft", "2", "--warm-start"], "needs greedy decoding"),
        (["generate", "--model", "tiny", "--new", "999"], "999 new ones exceed block_size"),
        (["generate", "--model", "tiny", "--exit", "kl", "--max-entropy", "-1"], "must be positive"),
        (["eval", "--model", "cut"], "is not JSON"),
        (["eval", "--model", "misfit"], "missing transformer.wte.weight"),
    ],
)
def test_bad_flags(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    R.save_weights(tiny(), "tiny")
    for name, config in {
        "cut": '{"model_type": "huginn_raven",',
        "misfit": Path("tiny/config.json").read_text(),
    }.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(config)
        st.save_file({}, Path(name, "model.safetensors"))
    monkeypatch.setattr("sys.argv", ["recurrent_depth.py", *argv, "--device", "cpu"])
    with pytest.raises(SystemExit) as e:
        R.cli.run(R.main, R.Config, R.PRESETS)
    assert e.value.code == 2 and message in capsys.readouterr().err


# ---- the demo


def test_each_seed_of_the_demo_has_its_own_rows(tmp_path, monkeypatch, capsys):
    seen = []

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(R.Trainer, "run", lambda self, *_: seen.append((self.cfg.seed, self.data.seed)) or self)
    monkeypatch.setattr(R, "exit_table", stop)
    cfg = replace(SMALL, seeds=(0, 3), num_steps=(64, 12, 1, 4, 4), rows=4, out=str(tmp_path))
    with pytest.raises(InterruptedError), cluster.world("cpu") as w:
        R.demo(cfg, w)
    assert seen == [(0, 0), (3, 3), (0, 0)]  # the last is the control
    assert re.search(r"^r = +1 +4 +12 +64$", capsys.readouterr().out, re.M)  # as the columns below it


@pytest.mark.drill
def test_demo_shortened(tmp_path):
    """The whole path of the demo; accuracy rises with depth on rows half as long, in a tenth of the time."""
    argv = "--block 12 --steps 240 --seeds 0 --rows 64 --log-every 20".split()
    done = run_script("recurrent_depth.py", "demo", *argv, "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for part in ("control:", "rows longer", "exit,", "path independence", "speculative", "claim:"):
        assert part in done.stdout, part
    agree = dict(re.findall(r"^(no cache|cache|speculative, drafts of 4) +([01]\.\d+)", done.stdout, re.M))
    assert agree == {"no cache": "1.000", "cache": "1.000", "speculative, drafts of 4": "1.000"}
    lines = _metrics(tmp_path)
    loss = [x["loss"] for x in lines if x.get("run") == "seed 0"]
    assert loss == [] or loss[-1] < loss[0]
    assert {"acc_1", "acc_64", "passed"} <= set(next(x for x in lines if "passed" in x))
    assert R.load_weights(tmp_path / "model").cfg.n_out == 2
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert set(claim) == {"claim", "paper", "here", "holds", "setting", "seconds"}
