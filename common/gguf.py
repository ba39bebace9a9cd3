"""A GGUF file of architecture llama as common.weights.Weights: Hugging Face's names, row order and keys."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from common.cli import BadInput
from common.weights import Weights, package

NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _name(name: str) -> str:
    """Hugging Face's name: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    *block, part, kind = name.split(".")
    if name == "output.weight":
        return "lm_head.weight"
    if part not in NAMES or kind != "weight":
        raise BadInput(f"the GGUF file holds {name}, which we would ignore: the model would be another one.")
    return ".".join(["model", *(["layers", block[1]] if block else []), NAMES[part], kind])


def open_gguf(path: Path) -> Weights:
    """Dequantised to float32, rows of q and k in half-split rotary order. BadInput: not a plain, complete Llama."""
    lib = package("gguf")
    try:
        reader = lib.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as e:
        raise BadInput(f"{path} is not a complete GGUF file ({e}).") from e
    meta = lambda key, default=None: field.contents() if (field := reader.get_field(key)) else default
    scaling = meta("llama.rope.scaling.type", "none")
    if meta("general.architecture") != "llama" or scaling != "none":
        raise BadInput(f"{path}: {meta('general.architecture')!r} with rope scaling {scaling!r}: only plain llama.")
    tensors = {_name(t.name): t for t in reader.tensors}
    width, heads = meta("llama.embedding_length"), meta("llama.attention.head_count")
    config = {
        "model_type": "llama", "vocab_size": int(tensors["model.embed_tokens.weight"].shape[1]),
        "hidden_size": width, "intermediate_size": meta("llama.feed_forward_length"),
        "num_hidden_layers": meta("llama.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": meta("llama.attention.head_count_kv", heads),
        "head_dim": meta("llama.attention.key_length", width // heads),
        "max_position_embeddings": meta("llama.context_length"), "rope_theta": meta("llama.rope.freq_base", 1e4),
        "rms_norm_eps": meta("llama.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }  # fmt: skip
    if meta("llama.rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise BadInput(f"{path}: a part of each head does not rotate, which is not supported.")

    def read(name: str) -> Tensor:
        w = torch.from_numpy(lib.quants.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return rearrange(w, "(h d two) c -> (h two d) c", h=config[heads], two=2) if heads else w  # were interleaved

    def tokenizer():
        tk, kinds, tokens = package("tokenizers"), meta("tokenizer.ggml.token_type"), meta("tokenizer.ggml.tokens")
        if meta("tokenizer.ggml.pre") != "smollm":
            raise BadInput(f"tokenizer {meta('tokenizer.ggml.pre')!r} in GGUF is not supported, only 'smollm'.")
        merges = [tuple(merge.split(" ")) for merge in meta("tokenizer.ggml.merges")]
        out = tk.Tokenizer(tk.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        digits, letters = tk.pre_tokenizers.Digits(individual_digits=True), tk.pre_tokenizers.ByteLevel(False)
        out.pre_tokenizer, out.decoder = tk.pre_tokenizers.Sequence([digits, letters]), tk.decoders.ByteLevel()
        out.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])  # 3: control token
        return out

    return Weights(config, sorted(tensors), read, tokenizer)
