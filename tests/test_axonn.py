"""axonn.py: every grid against one plain PyTorch process, overlap, volumes, planner, checkpoints, real weights, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

import axonn as A

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
