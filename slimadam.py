"""SlimAdam: measure which of Adam's second moments are redundant, average them, and train as before on half the state.

Paper    Kalra, Kirchenbauer, Barkeshli, Goldstein, "When Can You Get Away with Low Memory Adam?", arXiv:2503.01843.
Idea     Adam keeps v, a running mean of g^2, for every weight. In most layers its entries along one axis are nearly
         equal, so one number per row or column is enough. How equal is measured by a signal-to-noise ratio, squared
         mean over variance along the axis, on Adam's own path: above 1, average; below, keep every entry. The axis
         depends on the layer: inputs for query and key, outputs for value, projections and MLP, never over tokens.
Here     The claim we check: at Adam's best learning rate a small GPT trains to within 0.02 of Adam's loss with at least
         97 % of v removed. It does not come out: on 400 steps of a 135 k model, mean of three seeds, derived rules end
         0.045 behind and static rules 0.012 (seeds differ by 0.08); at a third of that rate both are level with Adam.
         SlimAdamW is a torch.optim.Optimizer for any model: rules by name and module type, AdamW checkpoints loaded
         exactly, DDP and FSDP2, bf16 weights with stochastic rounding, one Triton step (GPU speed not yet measured).
Differs  Text is Python's own library at byte level, for FineWeb. Names are matched by whole path components, where the
         released code matches substrings (attn.qkv.weight is then a "value"); fused QKV gets one rule per block;
         convolutions choose among fan_in, fan_out and all, not among all subsets of axes; SNR is taken in float64;
         tensors with one axis keep all of v. Ours alone: max_saving, sampled SNR, clipping inside the step.

    python slimadam.py                                                # laptop: SNR, rules, the sweep, the claim
    python slimadam.py derive --lr 3e-4 --out results/rules           # measure on your text, write rules.json
    python slimadam.py derive --model smollm2                         # the same on a real 135M model's fine-tuning
    python slimadam.py train --rules results/rules/rules.json         # one run with those rules; --resume goes on
    torchrun --nproc-per-node 2 slimadam.py                                           # the same; ranks share the runs
    torchrun --nproc-per-node 2 slimadam.py train --parallel fsdp --device cpu
    torchrun --nproc-per-node 8 slimadam.py train --preset small --parallel fsdp      # GPT-2 small (not yet run)
    python slimadam.py bench                                          # the step alone on GPT-2 small's tensors

Expect   "derived rules +0.045, static +0.012, 98.2% of v removed" on CPU with seed 0, for any number of workers.
Writes   results/slimadam/: metrics.jsonl, claim.json, slimadam.png; rules.json, snr.json (derive); checkpoint (train).
"""

import contextlib
import functools
import json
import math
import multiprocessing
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from common import cli, cluster, report
from common.cli import BadInput, opt
from common.kernels import optimizer as kernels, use_kernels
from common.text import Tokenizer, corpus
from common.weights import open_weights, rope_frequencies, rotate


@contextmanager
def workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of n fresh processes, for runs that share nothing. Ctrl-C, SIGTERM or an error here ends them at once."""
    heed = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # a terminal's Ctrl-C reaches them too; we decide
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), *heed) as pool:
            try:
                yield pool
            except BaseException:  # else the pool would first finish what it was given
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "derive", "bench"), positional=True)
    preset: str = opt("laptop", "defaults for a setting; flags win over it", choices=("laptop", "small"))
    # the optimizer
    rules: str = opt("default", "default, adam, adalayer, or a JSON file of rules")
    static: bool = opt(False, "insist on the table by layer type: an error beside a --rules file")
    lr: float = opt(3e-3, "peak learning rate; cosine to a tenth. derive: about a tenth of the one to train with")
    warmup: int = opt(40, "steps of linear warm-up")
    weight_decay: float = opt(0.1, "of tensors with two or more axes")
    clip: float = opt(1.0, "largest gradient norm; 0 is off")
    nonfinite: str = opt("propagate", "what Inf or NaN gradients do", choices=("propagate", "skip", "raise"))
    weights: str = opt(
        "float32", "dtype of the weights; bfloat16: stochastic rounding", choices=("float32", "bfloat16")
    )
    # measuring
    lrs: tuple = opt((3e-4, 1e-3, 3e-3, 1e-2), "demo: the sweep; SNR is measured on Adam at the first")
    every: int = opt(10, "steps between SNR measurements")
    cutoff: float = opt(1.0, "average where the SNR is above this")
    burn_in: float = opt(0.2, "part of the measurements dropped at the start")
    select: str = opt("max_snr", "among axes above the cutoff", choices=("max_snr", "max_saving"))
    depth_average: bool = opt(False, "derive one rule for a layer type at all depths")
    lines: int = opt(0, "derive: rows and columns sampled per tensor; 0 measures all of v")
    # the text and the model
    data: tuple = opt(("sources",), "text files, or docs or sources: Python's own")
    chars: int = opt(6_000_000, "characters of the text that are used; 0 is all")
    vocab: int = opt(256, "token ids: 256 bytes and the most frequent pieces")
    block: int = opt(64, "tokens per row that are predicted")
    d_model: int = opt(64, "width")
    n_layer: int = opt(2, "blocks")
    n_head: int = opt(4, "attention heads")
    tied: bool = opt(False, "one matrix for token embedding and head")
    model: str = opt("none", "derive, train: fine-tune smollm2, a Hugging Face folder or a GGUF file instead")
    # the run
    steps: int = opt(400, "optimizer steps")
    batch: int = opt(16, "rows per step, over all processes and micro-steps")
    accum: int = opt(1, "micro-steps per step")
    seed: int = opt(0, "seed of the weights and the data order")
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "of the matrix products", choices=("float32", "bfloat16"))
    compile: bool = opt(False, "train: torch.compile the model")
    parallel: str = opt("ddp", "train: whole replicas, or sharded rows (FSDP2)", choices=("ddp", "fsdp"))
    seeds: int = opt(3, "demo: seeds that the claim is averaged over, at Adam's best learning rate")
    workers: int = opt(2, "demo: processes that share the sweep, one thread each")
    out: str = opt("results/slimadam", "folder of what the run writes, and of the run to resume")
    resume: bool = opt(False, "train: go on from the checkpoint in --out")
    save_every: int = opt(100, "steps between checkpoints; 0 writes only the last")
    log_every: int = opt(10, "steps between lines in metrics.jsonl")

    def __post_init__(self):
        if self.static and self.rules != "default":
            raise ValueError(f"--static asks for the table by layer type, --rules {self.rules} for another. Drop one.")
        for name in "block d_model n_layer n_head batch accum steps every seeds workers log_every".split():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.lines < 0 or (self.lines and self.parallel == "fsdp"):
            raise ValueError(f"--lines {self.lines} samples whole gradients: give 0 or more, and --parallel ddp")
        if self.d_model % self.n_head:
            raise ValueError(f"--d-model {self.d_model} is not a multiple of --n-head {self.n_head}")
        if not 0 <= self.burn_in < 1:
            raise ValueError(f"--burn-in is a part of the measurements, in [0, 1), got {self.burn_in}")


PRESETS = {
    "laptop": {},
    "small": {  # GPT-2 small's shape; the paper's recipe at a batch that fits a few minutes
        "vocab": 50304, "block": 1024, "d_model": 768, "n_layer": 12, "n_head": 12, "tied": True, "batch": 512,
        "accum": 16, "chars": 0, "steps": 120, "warmup": 20, "dtype": "bfloat16", "compile": True,
    },
}  # fmt: skip


# ---- the method: the step and the measure
#
# K         axes that v is averaged over; v then has length 1 along them
# m, v      running means of g and of g^2            t    steps so far, counted from 1
# beta1, beta2, eps, lr, wd    as in AdamW


def slim_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, K: tuple, lr, beta1, beta2, eps, wd) -> None:
    """One step of one tensor, in place: AdamW, but for the mean over K. What every faster path must equal.

    EMA and mean commute, so v is always the mean over K of the v that Adam would hold for the same gradients.
    """
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).add_((g * g).mean(K, keepdim=True) if K else g * g, alpha=1 - beta2)
    p.mul_(1 - lr * wd)
    p.sub_(lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps))


def snr(v: Tensor, dims) -> float:
    """SNR_K(v) = mean over the lines along K of mean^2 / variance, in float64; lines of zero variance are left out.

    v: any shape, also a DTensor (then collective). NaN when no line is left. Scale-free, as v is divided by its peak.
    """
    K = legal_rule(dims if isinstance(dims, tuple) else (dims,), "v", v.shape)
    shards = _shards(v) if isinstance(v, DTensor) else []
    inside, across = (tuple(g for g, d in shards if (d in K) is along) for along in (True, False))
    x, n = _local(v.detach()).double(), math.prod(v.shape[d] for d in K)
    peak = x.max() if x.numel() else x.new_zeros(())
    for group in (*inside, *across):
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    x = x / peak if peak > 0 else x
    mean = _all_reduce(x.sum(K, keepdim=True), inside) / n
    var = _all_reduce((x - mean).square().sum(K, keepdim=True), inside) / n
    ratio = mean.square() / var
    fine = ratio.isfinite() & (ratio < 1e27)  # above: a constant line, whose variance is rounding
    total = torch.stack([ratio[fine].sum(), fine.sum().double()])
    total, lines = _all_reduce(total, across).tolist()
    return total / lines if lines else math.nan


def snr_table(v: Tensor) -> dict[tuple, float]:
    """snr(v, K) for every non-empty set of axes K."""
    return {K: snr(v, K) for n in range(1, v.ndim + 1) for K in combinations(range(v.ndim), n)}


def derive_rules(
    mean_snr: dict, cutoff: float = 1.0, select: str = "max_snr", candidates: str = "fans", depth_average: bool = False,
    shapes: dict | None = None,
) -> dict:  # fmt: skip
    """{name: {K: SNR}} -> {name: K or None}: the axes to average over, those with an SNR strictly above the cutoff.

    select         max_snr takes the highest SNR, as the released code does; as SNR never grows with K, that is never
                   both axes of a matrix. max_saving takes the fewest kept numbers (from `shapes`; without, most axes).
    candidates     fans: {0}, the other axes, and all; all_subsets: the released search. Ties go to the first.
    depth_average  average over tensors whose names differ only in numbers, and give all of them one rule.
    ValueError: an unknown word.
    """
    if select not in ("max_snr", "max_saving") or candidates not in ("fans", "all_subsets"):
        raise ValueError(f"select {select!r}, candidates {candidates!r}: know max_snr, max_saving; fans, all_subsets")
    key = _star if depth_average else str
    pooled: dict = {}
    for name, table in mean_snr.items():
        for K, value in table.items():
            pooled.setdefault(key(name), {}).setdefault(tuple(K), []).append(value)

    def choose(table: dict, shape) -> tuple | None:
        ndim = len(shape) if shape else 1 + max((d for K in table for d in K), default=-1)
        fans = [(0,), tuple(range(1, ndim)), tuple(range(ndim))]
        order = sorted(table, key=lambda K: (len(K), K)) if candidates == "all_subsets" else fans
        kept = lambda K: math.prod(kept_shape(shape, K)) if shape else -len(K)
        rank = (lambda K: -table[K]) if select == "max_snr" else (lambda K: (kept(K), -table[K]))
        return min((K for K in order if ndim > 1 and table.get(K, math.nan) > cutoff), key=rank, default=None)

    means = {k: {K: _nanmean(values) for K, values in table.items()} for k, table in pooled.items()}
    return {name: choose(means.get(key(name), {}), shapes and shapes[name]) for name in mean_snr}


def _nanmean(values: list) -> float:
    kept = [x for x in values if not math.isnan(x)]
    return sum(kept) / len(kept) if kept else math.nan


def _all_reduce(x: Tensor, groups: tuple) -> Tensor:
    for group in groups:
        dist.all_reduce(x, group=group)
    return x


def _shards(x: DTensor) -> list[tuple]:
    """(process group, tensor axis) of every mesh axis that splits x."""
    mesh = x.device_mesh
    return [(mesh.get_group(i), s.dim) for i, s in enumerate(x.placements) if s.is_shard() and mesh.size(i) > 1]


# ---- rules: which axes each tensor is averaged over
#
# A rule is None (every entry keeps its v, as in Adam), a tuple of axes, or blocks of rows ((rows, axes), ...) for fused
# weights. Words are resolved by what a module computes: nn.Linear stores (out, in), nn.Embedding and Conv1D (in, out).

WORDS = ("none", "fan_in", "fan_out", "both")
SETS = ("default", "adam", "adalayer")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TYPES = {  # runs of whole path components; the longest run wins, then the one nearest the end
    "qkv": "qkv c_attn in_proj_weight wqkv qkv_proj", "mixed_qkv": "query_key_value", "gate_up": "gate_up_proj gate_up",
    "query": "q_proj query q wq to_q q_lin", "key": "k_proj key k wk to_k k_lin",
    "value": "v_proj value v wv to_v v_lin",
    "output": "o_proj output_proj out_proj wo to_out attn.c_proj attention.output.dense",
    "up": "mlp_up c_fc fc1 up_proj w3 intermediate.dense", "gate": "gate_proj mlp.gate w1",
    "down": "mlp_proj mlp_down c_proj fc2 down_proj w2 output.dense",
    "embedding": "wte embed embedding token_embedding embed_tokens tok_embeddings word_embeddings",
    "position": "wpe pos_embed position_embedding position_embeddings embed_positions",
    "head": "lm_head output_layer classifier embed_out head", "patch": "patch_embed first_conv",
}  # fmt: skip
RUNS = [(kind, run.split(".")) for kind, runs in TYPES.items() for run in runs.split()]
STATIC = {"query": "in", "key": "in", "head": "in", "patch": "in", "mixed_qkv": "in", "value": "out", "output": "out",
          "up": "out", "gate": "out", "down": "out", "embedding": "last", "position": "last"}  # fmt: skip
NORM = re.compile(r"ln(\d*|_.*|f)|.*norm\d*(_.*)?")


def clean(name: str) -> str:
    """A parameter's name without what DDP, FSDP, torch.compile and checkpointing wrap around it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _star(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def layer_type(name: str) -> str | None:
    """What a parameter is, by its name: a key of TYPES, 'norm', or None when nothing matches."""
    parts = clean(name).lower().split(".")
    if any(NORM.fullmatch(part) for part in parts):
        return "norm"
    if parts[0] == "conv1":
        return "patch"
    if parts == ["output", "weight"]:
        return "head"
    found = [(len(run), i, k) for k, run in RUNS for i in range(len(parts)) if parts[i : i + len(run)] == run]
    return max(found)[2] if found else None


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """The module that holds each parameter, by the parameter's clean name."""
    held = {id(p): m for m in reversed(list(model.modules())) for p in m._parameters.values() if p is not None}
    return {clean(name): held[id(p)] for name, p in model.named_parameters()}


def describe(source, owners: dict | None = None) -> list[tuple]:
    """(clean name, tensor, layer type, True if it stores (in, out)) for a module or its named_parameters().

    The type of the owning module, where it is known, goes before the name.
    """
    if isinstance(source, nn.Module):
        source, owners = source.named_parameters(), owners_of(source)
    pairs, out = [(clean(name), p) for name, p in source], []
    # GPT-2 as Hugging Face stores it, (in, out), is seen by its fused c_attn
    gpt2 = any("c_attn" in n.split(".") and p.ndim == 2 and p.shape[1] == 3 * p.shape[0] for n, p in pairs)
    for name, p in pairs:
        kind, owner = layer_type(name), (owners or {}).get(name)
        table, module = isinstance(owner, nn.Embedding), type(owner).__name__
        if table and kind != "position":
            kind = "embedding"
        elif "Norm" in module:
            kind = "norm"
        swapped = table or "Conv1D" in module or "ConvTranspose" in module or (owner is None and kind == "embedding")
        swapped |= gpt2 and not {"c_attn", "c_proj", "c_fc"}.isdisjoint(name.split("."))
        out.append((name, p, kind, swapped))
    return out


def _fan(swapped: bool, ndim: int, which: str) -> tuple:
    return (int(swapped),) if which == "out" else tuple(d for d in range(ndim) if d != int(swapped))


def default_rules(source, owners: dict | None = None) -> dict:
    """The static table: {name: rule} by layer type, for a module or its named_parameters().

    Fused [Q; K; V] gets blocks when its rows are 3 x its columns, else one value per output, which never mixes the
    three. Tensors with fewer than two axes and norms: None. Unknown names: None, with one warning that lists them.
    """
    rules, unknown, total = {}, {}, 0
    for name, p, kind, swapped in describe(source, owners):
        ndim, rules[name] = p.ndim, None
        total += p.numel()
        if ndim < 2 or kind == "norm":
            continue
        n = p.shape[0]
        router = kind == "gate" and name.endswith(".gate.weight") and n < p.shape[1]  # over experts, not of the MLP
        if (ndim > 2 and kind not in ("position", "patch")) or router:
            kind = None
        if kind == "qkv":
            thirds = n == 3 * p.shape[1] and not swapped
            rules[name] = ((n // 3, (1,)), (n // 3, (1,)), (n // 3, (0,))) if thirds else _fan(swapped, ndim, "in")
        elif kind == "gate_up" and n % 2 == 0:
            rules[name] = ((n // 2, (0,)), (n // 2, (0,)))
        elif kind in STATIC:
            rules[name] = (ndim - 1,) if STATIC[kind] == "last" else _fan(swapped, ndim, STATIC[kind])
        else:
            unknown[name] = p.numel()
    if unknown:
        names = ", ".join([*unknown][:8]) + (", ..." if len(unknown) > 8 else "")
        share = sum(unknown.values()) / max(1, total)
        warnings.warn(
            f"no rule for {len(unknown)} unknown names, {share:.1%} of the weights, which keep all of v: {names}. "
            f"Measure rules with `derive`, or pass a dict.",
            stacklevel=2,
        )
    return rules


def adalayer_rules(source, keep: tuple = ("embedding", "head", "norm"), owners: dict | None = None) -> dict:
    """AdaLayer: one scalar per tensor, but for the layer types in `keep`, which stay Adam."""
    return {n: None if kind in keep else tuple(range(p.ndim)) or None for n, p, kind, _ in describe(source, owners)}


def adam_mini_rules(source, head_dim: int) -> dict:
    """Adam-mini: one scalar per attention head for query and key, one number per row elsewhere, biases full."""
    rules = {}
    for name, p, kind, _ in describe(source):
        if kind in ("query", "key") and p.ndim == 2 and p.shape[0] % head_dim == 0:
            rules[name] = ((head_dim, (0, 1)),) * (p.shape[0] // head_dim)
        elif kind in ("embedding", "head", "value", "output", "up", "gate", "down") and p.ndim == 2:
            rules[name] = (1,)
        else:
            rules[name] = None if name.endswith("bias") else tuple(range(p.ndim)) or None
    return rules


def legal_rule(rule, name: str, shape, swapped: bool = False):
    """Bring a rule to its one form: None, a sorted tuple of axes, or blocks. ValueError: it does not fit the shape."""
    shape, ndim = tuple(shape), len(shape)
    if isinstance(rule, str) and rule in WORDS:
        fan = {"none": (), "both": tuple(range(ndim))}
        rule = fan[rule] if rule in fan else _fan(swapped, ndim, rule[4:])
    if rule is None:
        return None
    rule = (rule,) if type(rule) is int else rule
    whole = isinstance(rule, (list, tuple))
    if whole and rule and all(isinstance(b, (list, tuple)) and len(b) == 2 for b in rule):
        sizes = [rows for rows, _ in rule]
        if ndim and all(type(n) is int and n > 0 for n in sizes) and sum(sizes) == shape[0]:
            return tuple((n, legal_rule(K, name, (n, *shape[1:]), swapped)) for n, K in rule)
    elif whole and all(type(d) is int and 0 <= d < ndim for d in rule) and len(set(rule)) == len(rule):
        return tuple(sorted(rule)) or None
    raise BadInput(
        f"{name} of shape {shape} cannot take the rule {rule!r}. Legal: None, distinct axes out of 0..{ndim - 1}, "
        f"one of {', '.join(WORDS)}, or blocks [[rows, axes], ...] whose rows sum to axis 0."
    )


def _in_blocks(rule) -> bool:
    return bool(rule) and isinstance(rule[0], tuple)


def kept_shape(shape, rule) -> tuple:
    """Shape of v under a rule; the numbers of blocks lie one after the other."""
    if _in_blocks(rule):
        return (sum(math.prod(kept_shape((n, *shape[1:]), K)) for n, K in rule),)
    return tuple(1 if d in (rule or ()) else n for d, n in enumerate(shape))


def _average(v: Tensor, old, new) -> Tensor:
    """v under `old`, brought to the coarser `new`. ValueError: new is not coarser."""
    if old == new:
        return v.clone()
    if old is not None and (_in_blocks(old) or _in_blocks(new) or not set(old) <= set(new or ())):
        raise ValueError(f"v averaged over {old} cannot become {new}: only coarser axes keep it exact")
    if not _in_blocks(new):
        return v.mean(new, keepdim=True)
    v = v.full_tensor() if isinstance(v, DTensor) else v
    parts = v.split([n for n, _ in new])
    return torch.cat([(x.mean(K, keepdim=True) if K else x).flatten() for x, (_, K) in zip(parts, new, strict=True)])


def match_rules(rules: dict, names: list[str], strict: bool, complete: bool = True) -> list:
    """The given rule for each name, exact ones before '*' patterns. ValueError: names that do not meet.

    complete=False allows rules for tensors that are not there (a group added later).
    """
    known, keys = {clean(k): r for k, r in rules.items()}, []
    stars = {k: re.compile(re.escape(k).replace(r"\*", r"\d+")) for k in known if "*" in k.split(".")}
    for name in names:
        fits = (k for k, pattern in stars.items() if pattern.fullmatch(name))
        keys.append(name if name in known else next(fits, None))
    extra = [k for k in known if k not in keys] if complete else []
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    for lost, others, text in (
        (extra, names, "rules name {} tensors not in the model: "),
        (missing, list(known), "no rule for {} tensors of the model: "),
    ):
        near = [(n, get_close_matches(n, others, 1, 0)) for n in lost[:5]]
        message = text.format(len(lost)) + "; ".join(n + (f" (closest: {c[0]})" if c else "") for n, c in near)
        if lost and strict:
            raise BadInput(f"{message}. Mend the names, or pass strict=False to keep all of v where none fits.")
        if lost:
            warnings.warn(message, stacklevel=4)
    return [known.get(key) for key in keys]


def save_rules(rules: dict, path) -> None:
    """Write {name: rule} as JSON, names sorted, lists for tuples."""
    report.write_json(path, {clean(k): rules[k] for k in sorted(rules)})


def _tuples(rule):
    return tuple(_tuples(x) for x in rule) if isinstance(rule, (list, tuple)) else rule


def load_rules(path) -> dict:
    """Read save_rules() or a released file. ValueError: unreadable, or not one JSON object."""
    try:
        rules = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BadInput(f"cannot read rules from {path}: {e}. Give default, adam, adalayer or a JSON file.") from e
    if not isinstance(rules, dict):
        raise BadInput(f"{path} holds a {type(rules).__name__}, not an object of name -> axes")
    return {name: _tuples(rule) for name, rule in rules.items()}


# ---- the optimizer

CHUNK = 2**19  # elements of a large tensor that are moved together, so that they stay in cache between operations
TRITON_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_GOLDEN, _TICK = 0x9E3779B97F4A7C15 - 2**64, 0xD1B54A32D192ED03 - 2**64


def _mix(z):
    """splitmix64 of an int64 tensor, wrapping."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _key(seed: int, index: int) -> Tensor:
    return _mix(torch.tensor(seed) * _GOLDEN + index)


def stochastic_round(x: Tensor, where: Tensor, seed: int, t: int, index: int) -> Tensor:
    """x float32 -> bfloat16, up or down with the probability that keeps the mean. Inf and NaN stay.

    The random bits depend on (seed, step t, parameter index, where), `where` being each entry's place in the whole
    tensor: replicas agree, and shards round as the whole would.
    """
    key = _mix(_key(seed, index) + torch.tensor(t) * _TICK)
    noise = _mix(where * _GOLDEN + key.to(x.device)) & 0xFFFF
    bits = x.contiguous().view(torch.int32)
    up = ((bits + noise.int()) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), up, x).to(torch.bfloat16)


@dataclass(eq=False)
class Piece:
    """A tensor, or one row block of it, as this rank holds it."""

    index: int  # of the parameter, over all groups
    name: str
    group: dict
    state: dict
    param: Tensor
    p: Tensor  # local
    m: Tensor
    v: Tensor  # of the whole piece where it is summed over ranks, else as local as p
    K: tuple
    count: int  # numbers averaged, over all ranks
    groups: tuple  # process groups to add the sums of squares over
    shards: tuple  # process groups among which p is split
    rows: slice  # of the local gradient
    part: tuple  # slices of v that belong to this rank's rows and columns
    shape: tuple  # of the whole tensor
    offset: tuple  # of p's first element in it
    first: bool  # the piece that advances the tensor's step
    decays: bool  # weight decay applies
    g: Tensor | None = None
    triton: bool = False  # moved by the Triton step

    def __post_init__(self):
        self.mode, self.rows_cols = _matrix(tuple(self.p.shape), self.K)

    def fits_triton(self) -> bool:
        """False if only the torch path can move it. The same on every rank."""
        whole = all(t.is_contiguous() for t in (self.p, self.m, self.v)) and self.v.dtype == torch.float32
        summed = not self.groups or self.mode in (kernels.COL, kernels.SCALAR)
        return self.mode >= 0 and whole and summed and {self.p.dtype, self.m.dtype} <= TRITON_DTYPES

    def where(self, rows: slice, device) -> Tensor:
        """Places of p[rows]'s entries in the whole tensor."""
        out, stride = 0, math.prod(self.shape)
        for d, n in enumerate(self.p.shape):
            stride //= self.shape[d]
            i = torch.arange(n, device=device)[rows if d == 0 else slice(None)] + self.offset[d]
            out = out + (i * stride).reshape([-1 if e == d else 1 for e in range(self.p.ndim)])
        return out


def _matrix(shape: tuple, K: tuple) -> tuple[int, tuple[int, int]]:
    """(mode, (rows, cols)) of the Triton step for a tensor averaged over K; mode -1 when K is not at one end."""
    ndim, k = len(shape), len(K)
    if k in (0, ndim):
        return (kernels.SCALAR if K else kernels.FULL), (1, math.prod(shape))
    if K == tuple(range(ndim - k, ndim)):
        return kernels.ROW, (math.prod(shape[:-k]), math.prod(shape[-k:]))
    return (kernels.COL if K == tuple(range(k)) else -1), (math.prod(shape[:k]), math.prod(shape[k:]))


class SlimAdamW(torch.optim.Optimizer):
    """AdamW whose second moments are averaged over the axes that `rules` name.

    params  model.named_parameters(), the model itself, or groups whose "params" are (name, tensor) pairs. Plain tensors
            only with rules="adam".
    rules   "default" (by layer type), "adam", "adalayer", a JSON file, or {name: rule}: None, axes such as (1,), a word
            of none, fan_in, fan_out, both, or row blocks ((rows, axes), ...). "*" in a name stands for any number.
    decay_1d              weight decay also on tensors with fewer than two axes
    strict                a name in the rules and not in the model, or the reverse, is an error and no warning
    fused                 None: Triton on CUDA tensors, torch elsewhere. False: torch. True: Triton or an error
    state_dtype           least precision of m; v has float32 or better
    stochastic_rounding   of bfloat16 weights, the same on any number of ranks
    max_grad_norm         clip by the global norm inside the step; grad_norm then holds the last norm
    nonfinite             Inf or NaN in a gradient: "propagate" as AdamW, "skip" the step, "raise". One NaN reaches all
                          weights that share its v. On a GPU the torch path waits for the flag and the clip factor, and
                          raise always does.

    State per tensor: step (float32), exp_avg, exp_avg_sq (length 1 along K; blocks one after the other), DTensors for
    DTensors. With sharded tensors a step makes one all-reduce of one flat buffer; every rank must have the same
    gradients present. Errors as in the checks below, each with what to type instead.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1, *, rules="default",
        decay_1d: bool = False, strict: bool = True, maximize: bool = False, fused: bool | None = None,
        state_dtype: torch.dtype = torch.float32, stochastic_rounding: bool = False, seed: int = 0,
        max_grad_norm: float | None = None, nonfinite: str = "propagate",
    ):  # fmt: skip
        if nonfinite not in ("propagate", "skip", "raise"):
            raise ValueError(f"nonfinite {nonfinite!r}: choose propagate, skip or raise")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise BadInput(f"max_grad_norm must be above 0 or None, got {max_grad_norm}")
        if not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype must be a floating type, got {state_dtype}")
        rules = _read_rules(rules)
        self._slim = {
            "rules": rules, "decay_1d": decay_1d, "strict": strict, "fused": fused, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "max_grad_norm": max_grad_norm, "nonfinite": nonfinite,
            "seed": seed,
        }  # fmt: skip
        self._ready, self._owners = False, {}
        if isinstance(params, nn.Module):
            params, self._owners = params.named_parameters(), owners_of(params)
        params = [{**x, "params": _listed(x["params"])} if isinstance(x, dict) else x for x in params]
        if not any(x["params"] if isinstance(x, dict) else True for x in params):
            raise ValueError("empty parameter list: give model.named_parameters(), which had nothing left to give here")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize))
        self._take(self.param_groups, self._resolve(self.param_groups, rules))
        self._ready = True

    # -- construction and rules

    def add_param_group(self, group: dict) -> None:
        """As in torch, with names; the tensors take the rules given at construction."""
        group, seen = {**group, "params": _listed(group["params"])}, set()
        for i, item in enumerate(group["params"]):
            name, p = item if isinstance(item, tuple) else (f"tensor {i}", item)
            if isinstance(p, Tensor):
                _check_tensor(name, p)
                if id(p) in seen:
                    raise ValueError(f"{name} is given twice. Give each tensor once; tied weights share one name.")
                seen.add(id(p))
        _check_numbers({**self.defaults, **group})
        super().add_param_group(group)
        if self._ready:
            new = self.param_groups[-1:]
            self._take(new, self._resolve(new, self._slim["rules"], complete=False))

    def _resolve(self, groups: list[dict], rules, complete: bool = True) -> list:
        """The legal rule of every tensor of these groups."""
        if rules != "adam" and not all("param_names" in group for group in groups):
            raise ValueError("rules need names: pass model.named_parameters() and not model.parameters()")
        named = [pair for group in groups for pair in zip(_names(group), group["params"], strict=True)]
        names = [clean(n) for n, _ in named]
        if rules == "adam":
            found = [None] * len(names)
        elif isinstance(rules, str):
            made = {"default": default_rules, "adalayer": adalayer_rules}[rules](named, owners=self._owners)
            found = [made[n] for n in names]
        else:
            found = match_rules(rules, names, self._slim["strict"], complete)
        legal = []
        for (name, p, _, swapped), rule in zip(describe(named, self._owners), found, strict=True):
            legal.append(legal_rule(rule, name, p.shape, swapped))
            if self._slim["fused"] and not (use_kernels(p.device) and p.dtype in TRITON_DTYPES):
                raise ValueError(
                    f"fused=True needs Triton, a GPU, and weights below float64; {name} is {p.dtype} on {p.device}. "
                    f"Pass fused=None."
                )
        return legal

    def _take(self, groups: list[dict], rules: list) -> None:
        """Give every group its part of the rules."""
        for group in groups:
            group["rules"], rules = rules[: len(group["params"])], rules[len(group["params"]) :]
        self._plan = None

    def _named(self) -> list[tuple]:
        """(group, name, tensor, rule) of every tensor."""
        return [(g, *x) for g in self.param_groups for x in zip(_names(g), g["params"], g["rules"], strict=True)]

    def rules(self) -> dict:
        """{name: rule} as used, with axes as integers."""
        return {clean(name): rule for _, name, _, rule in self._named()}

    @torch.no_grad()
    def compress_(self, rules) -> None:
        """Change to coarser rules in mid-run; exact, as v becomes the mean of what it was. ValueError: not coarser."""
        rules, new = _read_rules(rules), []
        legal = self._resolve(self.param_groups, rules)
        for (_, _, p, old), rule in zip(self._named(), legal, strict=True):
            if "exp_avg_sq" in self.state.get(p, {}):
                new.append((p, self._place(_average(self.state[p]["exp_avg_sq"], old, rule), p, rule)))
        for p, v in new:
            self.state[p]["exp_avg_sq"] = v
        self._take(self.param_groups, legal)
        self._slim["rules"] = rules

    def memory_report(self) -> dict:
        """Numbers in v and what the rules save, from shapes alone. bytes: m and v together, over all ranks.

        saved: part of v. saved_state: of m and v. saved_training: of weights, gradients, m and v (no activations).
        """
        total = kept = size = full = training = 0
        for _, _, p, rule in self._named():
            if p.requires_grad:
                n, left = p.numel(), math.prod(kept_shape(p.shape, rule))
                m, v = (t.itemsize for t in self._dtypes(p))
                total, kept, size, full = total + n, kept + left, size + n * m + left * v, full + n * (m + v)
                training += n * (m + v + 2 * p.element_size())
        part = lambda x, whole: x / whole if whole else 0.0
        return {
            "total": total, "kept": kept, "saved": 1 - part(kept, total) if total else 0.0, "bytes": size,
            "bytes_adam": full, "saved_state": part(full - size, full), "saved_training": part(full - size, training),
        }  # fmt: skip

    # -- state

    def _dtypes(self, p: Tensor) -> tuple[torch.dtype, torch.dtype]:
        m = torch.promote_types(p.dtype, self._slim["state_dtype"])
        return m, torch.promote_types(m, torch.float32)

    @staticmethod
    def _placements(p: DTensor, rule) -> list:
        """Of v: sharded like p, but whole along the axes averaged over, and for blocks."""
        whole = lambda s: not s.is_shard() or _in_blocks(rule) or s.dim in (rule or ())
        return [Replicate() if whole(s) else s for s in p.placements]

    def _place(self, v: Tensor, p: Tensor, rule) -> Tensor:
        """v as a DTensor if p is one."""
        if not isinstance(p, DTensor):
            return v
        mesh, placements = p.device_mesh, self._placements(p, rule)
        if isinstance(v, DTensor):
            return v.redistribute(mesh, placements)
        return distribute_tensor(v, mesh, placements, src_data_rank=None)

    def _init_state(self, p: Tensor, rule) -> None:
        (m, v), shape = self._dtypes(p), kept_shape(p.shape, rule)
        if isinstance(p, DTensor):
            place = {"device_mesh": p.device_mesh, "placements": self._placements(p, rule)}
            second = torch.distributed.tensor.zeros(shape, dtype=v, **place)
        else:
            second = torch.zeros(shape, dtype=v, device=p.device)
        self.state[p] |= {
            "step": torch.zeros((), device=p.device if self._wants_triton(p) else "cpu"),
            "exp_avg": torch.zeros_like(p, dtype=m, memory_format=torch.preserve_format),
            "exp_avg_sq": second,
        }

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_slim": self._slim}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._plan, self._ready = None, True
        self.__dict__.setdefault("_owners", {})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load a checkpoint of this class or of torch.optim.AdamW, whose v is averaged. Rules and dtypes stay ours.

        ValueError: names that differ, or a v that is neither equal to nor finer than what the rules ask for.
        """
        own, saved, groups, ready = self.param_groups, state_dict["param_groups"], [], {}
        if [len(g["params"]) for g in own] == [len(g["params"]) for g in saved]:  # torch reports it otherwise
            unknown = lambda g: ["unknown"] * len(g["params"])
            old = [x for g in saved for x in zip(g["params"], _names(g), g.get("rules", unknown(g)), strict=True)]
            for (_, name, p, rule), (k, was, old_rule) in zip(self._named(), old, strict=True):
                unnamed = name.startswith("tensor ") or was.startswith("tensor ")
                if not unnamed and clean(was) != clean(name):
                    raise ValueError(f"the checkpoint has {was} where this optimizer has {name}. Give the same order.")
                if k in state_dict["state"]:
                    ready[p] = self._converted(state_dict["state"][k], name, p, rule, _tuples(old_rule))
            for g, s in zip(own, saved, strict=True):
                mine = {k: v for k, v in g.items() if k in ("rules", "param_names")}
                groups.append({**{k: v for k, v in g.items() if k != "params"}, **s, **mine})
        # without the state, which torch would round to the dtype of the weights
        super().load_state_dict({**state_dict, "param_groups": groups or saved, "state": {}})
        self.state.update(ready)
        self._plan = None

    def _converted(self, saved: dict, name: str, p: Tensor, rule, old) -> dict:
        """One tensor's saved state on p's device, in our dtypes, with v brought to our rule."""
        m, v, want = saved["exp_avg"].detach(), saved["exp_avg_sq"].detach(), kept_shape(p.shape, rule)
        if old == "unknown" or v.shape != kept_shape(p.shape, old):  # AdamW's, or rules kept elsewhere: see its shape
            ones = v.ndim == p.ndim and all(a in (1, b) for a, b in zip(v.shape, p.shape, strict=True))
            axes = tuple(d for d in range(p.ndim) if ones and v.shape[d] < p.shape[d]) or None
            old = rule if v.shape == want else axes if ones else "unknown"
        try:
            v = _average(v, old, rule)
        except ValueError as e:
            raise ValueError(
                f"{name}: the checkpoint's exp_avg_sq has shape {tuple(v.shape)} (rule {old}); "
                f"rule {rule} needs {want}, which is not coarser. Load with the checkpoint's rules."
            ) from e
        m_type, v_type = self._dtypes(p)
        device = _local(p).device
        if isinstance(p, DTensor) and not isinstance(m, DTensor):
            m = distribute_tensor(m, p.device_mesh, p.placements, src_data_rank=None)
        step = torch.as_tensor(saved["step"], dtype=torch.float32).detach()
        return {
            "step": step.to(device if self._wants_triton(p) else "cpu", copy=True),
            "exp_avg": m.to(device=device, dtype=m_type, copy=True),
            "exp_avg_sq": self._place(v.to(device=device, dtype=v_type, copy=True), p, rule),
        }

    # -- the step

    def _wants_triton(self, p: Tensor) -> bool:
        fused = self._slim["fused"]
        return fused if fused is not None else p.is_cuda and use_kernels(p.device) and p.dtype != torch.float64

    def _pieces_of(self, group: dict, name: str, index: int, p: Tensor, rule) -> list[Piece]:
        state, shape, offset, shards = self.state[p], tuple(p.shape), (0,) * p.ndim, []
        p_, m_, v_ = (_local(x.detach()) for x in (p, state["exp_avg"], state["exp_avg_sq"]))
        if isinstance(p, DTensor):
            offset, shards = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1], _shards(p)
        if p.ndim == 0:  # as a vector of one
            p_, m_, v_, shape, offset = p_.view(1), m_.view(1), v_.view(1), (1,), (0,)
        blocks, top, at, pieces = _in_blocks(rule), 0, 0, []
        for n, K in rule if blocks else ((shape[0], rule),):
            K, rows, part, v, start, block = K or (), slice(None), (), v_, offset, (n, *shape[1:])
            if blocks:
                size = math.prod(kept_shape(block, K))
                v, at = v_[at : at + size].view(kept_shape(block, K)), at + size
                low = min(max(top - offset[0], 0), len(p_))  # rows of ours in this block
                rows = slice(low, min(max(top + n - offset[0], low), len(p_)))
                start = (offset[0] + low, *offset[1:])
                inside = zip((start[0] - top, *offset[1:]), p_[rows].shape, strict=True)
                part = tuple(slice(None) if d in K else slice(o, o + held) for d, (o, held) in enumerate(inside))
            pieces.append(Piece(
                index, name, group, state, p, p_[rows], m_[rows], v, K, count=math.prod(block[d] for d in K),
                groups=tuple(g for g, d in shards if blocks or d in K), shards=tuple(g for g, _ in shards), rows=rows,
                part=part, shape=shape, offset=tuple(start), first=top == 0,
                decays=p.ndim > 1 or self._slim["decay_1d"],
            ))  # fmt: skip
            top += n
        by_rows = all(d == 0 for _, d in shards)  # else a shard is not one run of places
        if self._wants_triton(p) and by_rows and all(x.fits_triton() for x in pieces):
            for x in pieces:  # all of a tensor's, as they share its step
                x.triton = True
        return pieces

    def _collect(self) -> list[Piece]:
        """The pieces to move, with their gradients; rebuilt only when tensors come, go or move."""
        present = []
        for index, (group, name, p, rule) in enumerate(self._named()):
            sharded = isinstance(p, DTensor) and bool(_shards(p))
            if p.grad is None and not (sharded and p.numel()):
                continue
            if "exp_avg" not in self.state[p]:
                self._init_state(p, rule)
            if p.numel():
                present.append((group, name, index, p, rule))
            else:  # nothing to move or to average
                self.state[p]["step"] += 1
        signature = [(_local(p).data_ptr(), id(self.state[p]["exp_avg_sq"])) for *_, p, _ in present]
        if self._plan is None or self._plan[0] != signature:
            self._plan = signature, [x for entry in present for x in self._pieces_of(*entry)], {}
        seen = None
        for x in self._plan[1]:
            if x.param is not seen:
                seen, grad = x.param, _gradient(x.name, x.param)
            x.g = None if grad is None else grad[x.rows] if x.rows != slice(None) else grad
        return self._plan[1]

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every tensor that has a gradient. closure re-evaluates the loss, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = self._collect()
        if not pieces:
            return loss
        slim, device = self._slim, pieces[0].p.device
        clips, watch = slim["max_grad_norm"] is not None, slim["nonfinite"] != "propagate"
        engines, plain = self._engines(pieces)
        parts, norms = [], []  # [(what to add over ranks, groups)]
        for e in engines:
            sums, norm, bad = e.multi.sums([x.g for x in e.pieces], clips or watch)
            parts.append((sums, e.pieces[0].groups))
            if clips or watch:
                norms.append((torch.stack([norm, bad]), e.pieces[0].shards))
        for x in plain:
            if x.groups:
                total = torch.zeros_like(x.v)
                if x.g is not None:
                    total[x.part] = _sum_squares(x.g, x.K, x.v.dtype)
                parts.append((total, x.groups))
            if clips or watch:
                zero = torch.zeros(2, dtype=x.v.dtype, device=x.p.device)
                norms.append((zero if x.g is None else _norm_and_bad(x.g, x.v.dtype), x.shards))
        summed = _exchange(parts + norms)
        clip, skip = self.last_clip, self.last_skip = self._judge([t.to(device) for t in summed[len(parts) :]], device)
        for e, sums in zip(engines, summed, strict=False):
            e.apply(sums, skip, clip, slim)
        of = {id(x): s for x, s in zip((x for x in plain if x.groups), summed[len(engines) :], strict=False)}
        if plain and not (watch and bool(skip)):
            self._move_plain([x for x in plain if x.g is not None], of, clip if clips and float(clip) != 1 else None)
        return loss

    def _judge(self, totals: list[Tensor], device) -> tuple[Tensor, Tensor]:
        """(clip factor, skip flag), float32 scalars on the device. RuntimeError: nonfinite="raise" and one is."""
        clip, skip = torch.ones((), device=device), torch.zeros((), device=device)
        if not totals:
            return clip, skip
        squared, bad = torch.stack([t.double() for t in totals]).sum(0)
        self.grad_norm = squared.sqrt().float()
        if self._slim["max_grad_norm"] is not None:
            clip = (self._slim["max_grad_norm"] / (self.grad_norm + 1e-6)).clamp(max=1.0)
        if self._slim["nonfinite"] == "skip":
            skip = (bad > 0).float()
        elif self._slim["nonfinite"] == "raise" and bool(bad > 0):
            here = [x.name for x in self._plan[1] if x.g is not None and not x.g.isfinite().all()]
            raise RuntimeError(f"gradients with Inf or NaN: {', '.join(here[:5]) or 'on another rank'}. Nothing moved.")
        return clip, skip

    def _engines(self, pieces: list[Piece]) -> tuple[list, list[Piece]]:
        """Pieces for Triton by what one launch takes, empty shards too, so that ranks agree; and the rest."""
        buckets, plain, made = {}, [], self._plan[2]
        for x in pieces:
            if not x.triton or x.g is None or not x.g.is_contiguous() or x.g.dtype not in TRITON_DTYPES:
                plain.append(x)
            else:
                key = (id(x.group), x.p.dtype, x.m.dtype, x.g.dtype, x.p.device, x.groups, x.shards)
                buckets.setdefault(key, []).append(x)
        for key, mine in buckets.items():
            if key not in made or [id(x) for x in made[key].pieces] != [id(x) for x in mine]:
                made[key] = _Engine(mine, self._slim["seed"])
        return [made[key] for key in buckets], plain

    def _move_plain(self, pieces: list[Piece], sums: dict, clip: Tensor | None) -> None:
        """The torch path: small pieces together by foreach, large ones in chunks that stay in cache."""
        torch._foreach_add_([x.state["step"] for x in pieces if x.first], 1.0)
        together: dict = {}
        for x in pieces:
            t = int(x.state["step"])
            if x.p.numel() > CHUNK or id(x) in sums or self._slim["stochastic_rounding"]:
                self._move_one(x, t, sums.get(id(x)), clip)
            else:
                key = (id(x.group), t, x.p.dtype, x.m.dtype, x.g.dtype, x.p.device, x.decays)
                together.setdefault(key, []).append(x)
        for (_, t, *_), mine in together.items():
            q = [_sum_squares(x.g, x.K, x.v.dtype) for x in mine]
            torch._foreach_div_(q, [float(x.count) for x in mine])
            root = _second([x.v for x in mine], q, mine[0].group, t, clip)
            _first([x.p for x in mine], [x.g for x in mine], [x.m for x in mine], root, mine[0], t, clip)

    def _move_one(self, x: Piece, t: int, total: Tensor | None, clip: Tensor | None) -> None:
        """One piece in chunks of rows; total: its sums of squares, where they had to be added over ranks."""
        rows = max(1, CHUNK // max(1, x.p[:1].numel()))
        chunks = [slice(i, i + rows) for i in range(0, len(x.p), rows)]
        if total is None and 0 in x.K:
            total = sum(_sum_squares(x.g[c], x.K, x.v.dtype) for c in chunks)
        if total is not None:
            root = _second([x.v], [total / x.count], x.group, t, clip)[0][x.part]
        for c in chunks:
            if total is None:
                r = _second([x.v[c]], [_sum_squares(x.g[c], x.K, x.v.dtype) / x.count], x.group, t, clip)[0]
            else:
                r = root if 0 in x.K else root[c]
            rounding = None
            if self._slim["stochastic_rounding"] and x.p.dtype == torch.bfloat16:
                where = x.where(c, x.p.device)
                rounding = lambda y, where=where: stochastic_round(y.float(), where, self._slim["seed"], t, x.index)
            _first([x.p[c]], [x.g[c]], [x.m[c]], [r], x, t, clip, rounding)


def _sum_squares(g: Tensor, K: tuple, dtype: torch.dtype) -> Tensor:
    """Sum of g * g over K, kept as length 1, never squared below float32."""
    g = g.to(dtype)
    if K and 0 not in K and g.ndim == 2:
        return torch.linalg.vector_norm(g, dim=K, keepdim=True).square_()  # one pass, no g * g in memory
    return (g * g).sum(K, keepdim=True) if K else g * g


def _norm_and_bad(g: Tensor, dtype: torch.dtype) -> Tensor:
    """(squared norm, 1 if an entry is not finite)."""
    norm = torch.linalg.vector_norm(g, dtype=dtype).square()
    bad = torch.zeros_like(norm) if g.is_cpu and bool(norm.isfinite()) else (~g.isfinite()).any().to(dtype)
    return torch.stack([norm, bad])


def _exchange(parts: list[tuple[Tensor, tuple]]) -> list[Tensor]:
    """Add each tensor over its groups: one flat all-reduce per set of groups."""
    out, flat = [x for x, _ in parts], {}
    for i, (x, groups) in enumerate(parts):
        if groups and x.numel():
            flat.setdefault((groups, x.dtype), []).append(i)
    for (groups, _), where in flat.items():
        buffer = _all_reduce(torch.cat([out[i].flatten() for i in where]), groups)
        for i, x in zip(where, buffer.split([out[i].numel() for i in where]), strict=True):
            out[i] = x.view(out[i].shape)
    return out


def _second(v: list, q: list, group: dict, t: int, clip: Tensor | None) -> tuple[Tensor, ...]:
    """Move v towards q, the new mean squares, and return sqrt(v / bias correction) + eps."""
    beta2 = float(group["betas"][1])
    if clip is not None:
        q = torch._foreach_mul(q, float(clip.square()))
    torch._foreach_mul_(v, beta2)
    torch._foreach_add_(v, q, alpha=1 - beta2)
    root = torch._foreach_sqrt(v)
    torch._foreach_div_(root, math.sqrt(1 - beta2**t))
    torch._foreach_add_(root, float(group["eps"]))
    return root


def _first(p: list, g: list, m: list, root, x: Piece, t: int, clip: Tensor | None, rounding=None) -> None:
    """Move m and p, in the dtype of v; p and m of lower precision are widened and rounded back."""
    group, acc = x.group, x.v.dtype
    lr, beta1 = float(group["lr"]), float(group["betas"][0])
    G, M, P = ([y.to(acc) for y in ys] for ys in (g, m, p))  # no copy when it is that dtype already
    sign = (-1.0 if group["maximize"] else 1.0) * (1.0 if clip is None else float(clip))
    torch._foreach_mul_(M, beta1)
    torch._foreach_add_(M, G, alpha=(1 - beta1) * sign)
    if x.decays and group["weight_decay"]:
        torch._foreach_mul_(P, 1 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(P, M, root, value=-lr / (1 - beta1**t))
    for y, Y in zip(m + p, M + P, strict=True):
        if y is not Y:
            y.copy_(rounding(Y) if rounding and Y is P[0] else Y)


class _Engine:
    """A bucket of pieces and the Triton step over them."""

    def __init__(self, pieces: list[Piece], seed: int):
        base = lambda x: x.offset[0] * math.prod(x.shape[1:])
        entries = [
            kernels.Entry(
                x.p, x.m, x.v, x.state["step"], *x.rows_cols, x.mode, float(x.count), x.decays, base(x), x.first
            )
            for x in pieces
        ]
        self.pieces, self.multi, self.numbers = pieces, kernels.MultiTensor(entries, pieces[0].g.dtype), None
        self.keys = torch.stack([_key(seed, x.index) for x in pieces]).to(pieces[0].p.device)

    def apply(self, sums: Tensor, skip: Tensor, clip: Tensor, slim: dict) -> None:
        """Move all pieces, given their sums of squares over ranks; 0-d `skip` leaves them, `clip` scales gradients."""
        x, group = self.pieces[0], self.pieces[0].group
        lr, (b1, b2) = group["lr"], group["betas"]
        late = isinstance(lr, Tensor) and lr.is_cuda  # a device scalar stays one: no synchronisation
        numbers = (0.0 if late else float(lr), float(b1), float(b2), float(group["eps"]), float(group["weight_decay"]),
                   -1.0 if group["maximize"] else 1.0)  # fmt: skip
        if numbers != self.numbers:
            self.numbers, self.hyper = numbers, kernels._table(list(numbers), x.p.device, torch.float64)
        if late:
            self.hyper[0].copy_(lr)
        keys = self.keys if slim["stochastic_rounding"] and x.p.dtype == torch.bfloat16 else None
        self.multi.apply([y.g for y in self.pieces], sums, self.hyper, skip, clip, keys)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _listed(params) -> list:
    return [params] if isinstance(params, Tensor) else list(params)


def _names(group: dict) -> list[str]:
    return group.get("param_names") or [f"tensor {i}" for i in range(len(group["params"]))]


def _read_rules(rules):
    """Rules, read if they are the name of a file."""
    return load_rules(rules) if isinstance(rules, (str, Path)) and rules not in SETS else rules


def _check_numbers(group: dict) -> None:
    """BadInput: a hyperparameter outside its range, or NaN."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise BadInput(f"{name} must be >= 0 and finite, got {group[name]}")
    if len(tuple(group["betas"])) != 2 or not all(0 <= float(b) < 1 for b in group["betas"]):
        raise BadInput(f"betas must be two numbers in [0, 1), got {group['betas']}")


def _check_tensor(name: str, p: Tensor) -> None:
    if type(p).__name__ == "FlatParameter" or getattr(p, "_is_flat_param", False) or name.endswith("_flat_param"):
        raise RuntimeError(f"{name} is an FSDP1 flat parameter, without rows or columns. Shard with fully_shard, or "
                           f"pass use_orig_params=True.")  # fmt: skip
    if p.is_complex():
        raise RuntimeError(f"{name} is complex; give its real view: torch.view_as_real")
    if not p.is_floating_point():
        raise ValueError(f"{name} is {p.dtype}; only floating tensors can be trained")


def _gradient(name: str, p: Tensor) -> Tensor | None:
    """p's local gradient, as a vector for a scalar. RuntimeError: sparse, or unlike p in dtype, shape or device."""
    g = p.grad
    if g is None:
        return None
    if g.layout != torch.strided:
        raise RuntimeError(f"SlimAdamW does not support sparse gradients ({name}); use sparse=False in the embedding")
    if isinstance(p, DTensor) and isinstance(g, DTensor) and g.placements != p.placements:
        g = g.redistribute(p.device_mesh, p.placements)
    p, g = _local(p), _local(g)
    if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
        raise RuntimeError(
            f"{name}: gradient {tuple(g.shape)} {g.dtype} on {g.device}, but weight {tuple(p.shape)} {p.dtype} on "
            f"{p.device}. Cast or move it."
        )
    return g.view(1) if g.ndim == 0 else g


# ---- measuring SNR along a run


class SNRTracker:
    """SNR of every tensor along a run: SNRTracker(optimizer); measure(step) if should_measure(step); mean().

    Measures at step `start`, every `early_every` steps below `early_until`, then every `late_every`. Needs full Adam
    state (rules="adam"), or `lines`: then it keeps its own v for that many random rows and columns of each matrix, from
    the gradients of every step, and works beside any rules (tensors of more axes count as (axis 0, the rest)).
    """

    def __init__(
        self, optimizer, start: int = 1, early_every: int = 100, early_until: int = 1000, late_every: int = 1000,
        lines: int | None = None, seed: int = 0,
    ):  # fmt: skip
        if min(early_every, late_every) < 1 or (lines is not None and lines < 1):
            raise ValueError(f"early_every {early_every}, late_every {late_every} and lines {lines} must be at least 1")
        self.optimizer, self.start, self.lines, self.seed = optimizer, start, lines, seed
        self.early_every, self.early_until, self.late_every = early_every, early_until, late_every
        self.steps, self.values, self.sample = [], {}, {}  # values: {name: {K: one SNR per measurement}}
        if lines:
            optimizer.register_step_post_hook(lambda *_: self._observe())  # after a closure, and with the clip factor

    def should_measure(self, step: int) -> bool:
        every = self.early_every if step < self.early_until else self.late_every
        return step == self.start or (step > self.start and step % every == 0)

    @torch.no_grad()
    def _observe(self) -> None:
        """Advance the sampled v by the gradients just used, as the step clipped or skipped them."""
        if self.optimizer._slim["nonfinite"] == "skip" and bool(self.optimizer.last_skip):
            return
        for index, (group, name, p, _) in enumerate(self.optimizer._named()):
            if p.grad is None or p.ndim < 2:
                continue
            if isinstance(p, DTensor):
                raise RuntimeError(f"{name} is sharded: sampled SNR needs whole gradients. Measure with lines=None.")
            g = p.grad.flatten(1).float() * self.optimizer.last_clip.to(p.device)  # (n, rest)
            if name not in self.sample:
                pick = cluster.generator(self.seed, index)
                rows, cols = (torch.randperm(n, generator=pick)[: self.lines].to(g.device) for n in g.shape)
                self.sample[name] = rows, cols, torch.zeros_like(g[rows]), torch.zeros_like(g[:, cols])
            rows, cols, v_rows, v_cols = self.sample[name]
            beta2 = float(group["betas"][1])
            v_rows.mul_(beta2).add_(g[rows].square(), alpha=1 - beta2)
            v_cols.mul_(beta2).add_(g[:, cols].square(), alpha=1 - beta2)

    @torch.no_grad()
    def measure(self, step: int) -> dict:
        """Measure now, after `step` updates: {name: {K: SNR}}. RuntimeError: before a first step, or v is averaged."""
        found = {}
        for _, name, p, rule in self.optimizer._named():
            v = self.optimizer.state.get(p, {}).get("exp_avg_sq")
            if self.lines and name in self.sample:
                _, _, v_rows, v_cols = self.sample[name]
                rest = tuple(range(1, p.ndim))
                table = {(0,): snr(v_cols, (0,)), rest: snr(v_rows, (1,)), (0, *rest): snr(v_rows, (0, 1))}
            elif self.lines or (v is None and p.grad is None):
                continue
            elif rule is not None:
                raise RuntimeError(
                    f"{name} holds a v averaged over {rule}, whose SNR is undefined. Measure with rules='adam', "
                    f"or with lines=16, which keeps a sample of its own."
                )
            elif v is None:
                continue
            else:
                table = snr_table(v)
            found[clean(name)] = table
        if not found:
            raise RuntimeError("no second moments yet: take a step before measuring SNR")
        self.steps.append(step)
        for name, table in found.items():
            for K, value in table.items():
                line = self.values.setdefault(name, {}).setdefault(K, [])
                line += [math.nan] * (len(self.steps) - 1 - len(line)) + [value]
        return found

    def mean(self, burn_in: float = 0) -> dict:
        """{name: {K: mean SNR}}, leaving out NaN and the first part `burn_in` of the measurements."""
        first = int(burn_in * len(self.steps))
        return {n: {K: _nanmean(x[first:]) for K, x in table.items()} for n, table in self.values.items()}

    def save(self, path) -> None:
        """Write the measurements as JSON, NaN as null."""
        plain = lambda x: None if math.isnan(x) else x
        rows = {n: {",".join(map(str, K)): [plain(v) for v in x] for K, x in t.items()} for n, t in self.values.items()}
        report.write_json(path, {"steps": self.steps, "snr": rows})

    def load(self, path) -> "SNRTracker":
        """Replace the measurements by those that save() wrote."""
        saved = json.loads(Path(path).read_text())
        number = lambda x: math.nan if x is None else x
        key = lambda K: tuple(int(d) for d in K.split(","))
        self.steps = saved["steps"]
        self.values = {n: {key(K): [number(v) for v in x] for K, x in t.items()} for n, t in saved["snr"].items()}
        return self


# ---- the models


class Block(nn.Module):
    """Pre-norm attention and a GELU MLP, without biases. (B, T, C) -> (B, T, C)."""

    def __init__(self, C: int, H: int):
        super().__init__()
        self.H, linear = H, functools.partial(nn.Linear, bias=False)
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.attn = nn.ModuleDict({n: linear(C, C) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"up_proj": linear(C, 4 * C), "down_proj": linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        q, k, v = (rearrange(self.attn[n](y), "b t (h d) -> b h t d", h=self.H) for n in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.attn.o_proj(rearrange(y, "b h t d -> b t (h d)"))
        return x + self.mlp.down_proj(F.gelu(self.mlp.up_proj(self.ln_2(x))))


class GPT(nn.Module):
    """GPT-2 with separate query, key and value. ids (B, T) -> logits (B, T, V)."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, V = cfg.d_model, cfg.vocab
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(cfg.block, C)
        self.h = nn.ModuleList(Block(C, cfg.n_head) for _ in range(cfg.n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(C, bias=False), nn.Linear(C, V, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.wte.weight
        g = cluster.generator(cfg.seed, 0)
        for name, p in self.named_parameters():
            if p.ndim > 1 and not p.is_meta:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))  # they add to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if last else 0.02, generator=g)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Llama(nn.Module):
    """Real weights under Hugging Face's names, head tied or not. ids (B, T) -> logits (B, T, V)."""

    def __init__(self, c: dict):
        super().__init__()
        C, M, self.H, self.Hk = (c[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                "num_key_value_heads"))  # fmt: skip
        D, eps, linear = c.get("head_dim") or C // self.H, c["rms_norm_eps"], functools.partial(nn.Linear, bias=False)
        self.model = nn.Module()
        self.model.embed_tokens, self.model.norm = nn.Embedding(c["vocab_size"], C), nn.RMSNorm(C, eps)
        self.model.layers = nn.ModuleList()
        for _ in range(c["num_hidden_layers"]):
            layer = nn.Module()
            heads = {"q_proj": self.H, "k_proj": self.Hk, "v_proj": self.Hk}
            layer.self_attn = nn.ModuleDict({n: linear(C, h * D) for n, h in heads.items()})
            layer.self_attn["o_proj"] = linear(self.H * D, C)
            layer.mlp = nn.ModuleDict({"gate_proj": linear(C, M), "up_proj": linear(C, M), "down_proj": linear(M, C)})
            layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(C, eps), nn.RMSNorm(C, eps)
            self.model.layers.append(layer)
        self.lm_head = nn.Linear(C, c["vocab_size"], bias=False)
        if c.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.embed_tokens.weight
        self.freq = rope_frequencies(c)  # no buffer: bfloat16 weights leave it float32

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        angle = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), self.freq.to(ids.device))  # (T, D/2)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            attn, mlp, y = layer.self_attn, layer.mlp, layer.input_layernorm(x)
            q = rotate(rearrange(attn.q_proj(y), "b t (h d) -> b h t d", h=self.H), angle)
            k = rotate(rearrange(attn.k_proj(y), "b t (h d) -> b h t d", h=self.Hk), angle)
            v = rearrange(attn.v_proj(y), "b t (h d) -> b h t d", h=self.Hk)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.Hk)
            x = x + attn.o_proj(rearrange(y, "b h t d -> b t (h d)"))
            y = layer.post_attention_layernorm(x)
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
        return self.lm_head(self.model.norm(x))


# ---- the experiment

SPAN, HELD = 32, 20  # of each HELD spans of SPAN rows, one is held out for validation
VALIDATION = 256  # rows


class Text:
    """The corpus as rows of block + 1 tokens: training rows, and held-out spans spread over it."""

    def __init__(self, cfg: Config, encode=None):
        text = corpus(cfg.data)[: cfg.chars or None]
        if encode is None and cfg.vocab < 256:
            raise BadInput(f"--vocab {cfg.vocab} is too small for text as bytes: give 256 or more")
        if encode is None and cfg.vocab > 256:
            encode = Tokenizer(text, cfg.vocab).encode
        raw = text.encode("utf-8", errors="surrogatepass")
        ids = torch.tensor(list(raw)) if encode is None else torch.as_tensor(encode(text))
        width = cfg.block + 1
        rows = ids[: len(ids) // width * width].reshape(-1, width)  # (rows, block + 1)
        held = torch.arange(len(rows)) // SPAN % HELD == HELD - 1
        self.train, self.validation = rows[~held], rows[held][:: max(1, int(held.sum()) // VALIDATION)][:VALIDATION]
        if len(self.validation) == 0 or len(self.train) < cfg.batch:
            raise BadInput(f"the text is too small: {len(rows)} rows of {width} tokens, and --batch {cfg.batch} with "
                           f"validation needs {max(SPAN * HELD, cfg.batch)}. Add text or lower --block.")  # fmt: skip

    def batch(self, cfg: Config, step: int) -> Tensor:
        """The rows of a step, a function of seed and step alone."""
        return self.train[torch.randint(len(self.train), (cfg.batch,), generator=cluster.generator(cfg.seed, 1, step))]


def lr_at(cfg: Config, step: int) -> float:
    """Linear warm-up, then cosine to a tenth."""
    return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup)) * (0.55 + 0.45 * math.cos(math.pi * step / cfg.steps))


def loss_of(model, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model, text: Text, device) -> float:
    return torch.stack([loss_of(model, r.to(device)) for r in text.validation.split(32)]).mean().item()


@torch.no_grad()
def fidelity(optimizer: SlimAdamW, rules: dict) -> tuple[float, float]:
    """(relative error, cosine) of the update if v of this Adam state were averaged by `rules`, all tensors together."""
    a, b = [], []
    for group, name, p, _ in optimizer._named():
        s, rule = optimizer.state[p], rules[clean(name)]
        t, (b1, b2) = int(s["step"]), group["betas"]
        m = s["exp_avg"] / (1 - b1**t)
        for out, v in ((a, s["exp_avg_sq"]), (b, _average(s["exp_avg_sq"], None, rule))):
            out.append((m / ((v / (1 - b2**t)).sqrt() + group["eps"])).flatten())
    u, w = torch.cat(a), torch.cat(b)
    return ((w - u).norm() / u.norm()).item(), F.cosine_similarity(u, w, dim=0).item()


def run_one(cfg: Config, rules, measure: bool = False, compare: dict | None = None) -> dict:
    """One run of the sweep, on one thread: losses, validation loss, and on request SNR or the fidelity of rules."""
    torch.set_num_threads(1)
    text, model = Text(cfg), GPT(cfg)
    optimizer = SlimAdamW(model, cfg.lr, weight_decay=cfg.weight_decay, rules=rules, max_grad_norm=cfg.clip or None)
    tracker = SNRTracker(optimizer, 1, cfg.every, 10**9) if measure else None
    losses, found = [], {}
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = lr_at(cfg, step)
        loss = loss_of(model, text.batch(cfg, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if tracker and tracker.should_measure(step + 1):
            tracker.measure(step + 1)
        if compare and step + 1 == cfg.steps // 2:
            found["fidelity"] = {name: fidelity(optimizer, r) for name, r in compare.items()}
    if tracker:
        found |= {"snr": (tracker.steps, tracker.values), "mean": tracker.mean(cfg.burn_in)}
    last = losses[-50:]
    found |= {"losses": losses, "train_loss": sum(last) / len(last), "val_loss": validate(model, text, "cpu")}
    return found | {"memory": optimizer.memory_report()}


# ---- demo: the claim

NAMES = {"adam": "Adam", "derived": "SlimAdam, derived", "static": "SlimAdam, static", "adalayer": "AdaLayer"}


def share(jobs: dict, w: cluster.World, pool, what: str) -> dict:
    """{key: run_one(*job)}, shared by the pool's worker processes, or by the ranks where there is no pool."""
    if pool is None:
        mine, every = {}, [None] * w.size
        for k in report.progress(list(jobs)[w.rank :: w.size], what, w):
            mine[k] = run_one(*jobs[k])
        dist.all_gather_object(every, mine)
        return {k: found for part in every for k, found in part.items()}
    futures = {k: pool.submit(run_one, *job) for k, job in jobs.items()}
    return {k: futures[k].result() for k in report.progress(list(jobs), what, w)}


def sweep(cfg: Config, w: cluster.World, pool) -> tuple[dict, dict, float]:
    """({(optimizer, lr, seed): found}, the derived rules, Adam's best lr); further seeds at that lr alone."""
    model = GPT(cfg)
    rules = {"adam": "adam", "static": default_rules(model), "adalayer": adalayer_rules(model, keep=())}
    runs = lambda names, lrs, seeds=(cfg.seed,), *more: {
        (n, lr, s): (replace(cfg, lr=lr, seed=s), rules[n], *more) for s in seeds for lr in lrs for n in names
    }
    first, rest = cfg.lrs[:1], cfg.lrs[1:]
    jobs = runs(["adam"], first, (cfg.seed,), True) | runs(["static", "adalayer"], cfg.lrs)
    found = share(jobs, w, pool, "Adam with SNR, static, AdaLayer")
    shapes, mean = {n: p.shape for n, p in model.named_parameters()}, found["adam", cfg.lrs[0], cfg.seed]["mean"]
    rules["derived"] = derive_rules(mean, cfg.cutoff, cfg.select, depth_average=cfg.depth_average, shapes=shapes)
    compare = {n: rules[n] for n in ("derived", "static", "adalayer")}
    jobs = runs(["adam"], rest, (cfg.seed,), False, compare) | runs(["derived"], cfg.lrs)
    found |= share(jobs, w, pool, "Adam, derived")
    best = min(cfg.lrs, key=lambda lr: found["adam", lr, cfg.seed]["val_loss"])
    jobs = runs(["adam", "derived", "static"], [best], range(cfg.seed + 1, cfg.seed + cfg.seeds))
    return found | share(jobs, w, pool, "further seeds"), rules["derived"], best


def type_of(name: str) -> str:
    return layer_type(name) or _star(name)


def by_type(mean: dict) -> dict:
    """{layer type: {"{0}", "{1}", "all axes": SNR averaged over its tensors}}, in the model's order."""
    rows: dict = {}
    for name, table in mean.items():
        n = 1 + max(d for K in table for d in K)
        for K, label in (((0,), "{0}"), (tuple(range(1, n)), "{1}"), (tuple(range(n)) if n > 1 else (), "all axes")):
            if K in table:
                rows.setdefault(type_of(name), {}).setdefault(label, []).append(table[K])
    return {kind: {label: _nanmean(x) for label, x in t.items()} for kind, t in rows.items()}


def print_snr(w: cluster.World, mean: dict, rules: dict) -> None:
    """SNR by layer type, and which axes its tensors got."""
    rows, axes = [], ("{0}", "{1}", "all axes")
    for kind, table in by_type(mean).items():
        got = [rules[n] for n in mean if type_of(n) == kind]
        text = ", ".join("none" if r is None else "{" + ",".join(map(str, r)) + "}" for r in got[:4])
        cells = (f"{table[a]:.2f}" if a in table else "-" for a in axes)
        rows.append([kind, *cells, text + (", ..." if got[4:] else "")])
    w.print("\n" + report.table(["layer type", *(f"SNR {a}" for a in axes), "averaged over, by depth"], rows))


def demo(cfg: Config, w: cluster.World) -> None:
    """SNR, rules, the learning-rate sweep, the three savings, the fidelity of the update, the picture, the claim."""
    run = report.Run(cfg.out, cfg, w)
    with workers(cfg.workers) if w.size == 1 else contextlib.nullcontext() as pool:
        found, derived, best = sweep(cfg, w, pool)
    for (name, lr, seed), f in found.items():
        shown = {k: f[k] for k in ("train_loss", "val_loss", "losses")}
        run.log(run=name, lr=lr, seed=seed, **shown, **f.get("fidelity", {}))
    at = lambda n, lr, seed=cfg.seed: found[n, lr, seed]
    print_snr(w, at("adam", cfg.lrs[0])["mean"], derived)
    heads, slim = [f"lr {lr:g}" for lr in cfg.lrs], [n for n in NAMES if n != "adam"]
    grid = lambda head, cell, names, columns=heads, lrs=cfg.lrs: w.print(
        report.table([head, *columns], [[NAMES[n], *(cell(n, lr) for lr in lrs)] for n in names])
    )
    w.print(f"\nvalidation loss (train loss of the last 50 steps) after {cfg.steps} steps")
    grid("optimizer", lambda n, lr: "{val_loss:.3f} ({train_loss:.3f})".format(**at(n, lr)), NAMES)
    w.print("\nmean distance from Adam's loss curve")
    apart = lambda n, lr: [abs(a - b) for a, b in zip(at(n, lr)["losses"], at("adam", lr)["losses"], strict=True)]
    grid("optimizer", lambda n, lr: f"{_nanmean(apart(n, lr)):.3f}", slim)
    w.print("\nwhat the rules save")
    kinds = {"saved": "of v", "saved_state": "of m and v", "saved_training": "of weights, gradients, m and v"}
    grid("optimizer", lambda n, k: f"{at(n, best)['memory'][k]:.2%}", NAMES, kinds.values(), kinds)
    lrs = [lr for lr in cfg.lrs if "fidelity" in at("adam", lr)]
    w.print(f"\nrelative error (cosine) of the update if v of Adam's state at step {cfg.steps // 2} were averaged")
    pair = lambda n, lr: "{:.2f} ({:.2f})".format(*at("adam", lr)["fidelity"][n])
    grid("rules", pair, slim, [f"lr {lr:g}" for lr in lrs], lrs)
    if w.main:
        save_rules(derived, f"{cfg.out}/rules.json")
        picture = functools.partial(draw, cfg, found)
        w.print("\n" + report.picture(f"{cfg.out}/slimadam.png", picture, ncols=2, figsize=(13, 4.6)))
    seeds, gap = range(cfg.seed, cfg.seed + cfg.seeds), {}
    for n in ("derived", "static"):
        gaps = [at(n, best, s)["val_loss"] - at("adam", best, s)["val_loss"] for s in seeds]
        w.print(f"{NAMES[n]}, minus Adam at lr {best:g}, by seed: " + ", ".join(f"{x:+.3f}" for x in gaps))
        gap[n] = _nanmean(gaps)
    saved = min(at(n, best)["memory"]["saved"] for n in gap)
    run.claim(
        "SlimAdam ends within 0.02 of Adam at Adam's best learning rate, with at least 97 % of v removed",
        "loss 3.027 against 3.024 with 99.9 % of v removed (GPT-2 small, static rules, released log)",
        f"lr {best:g}, mean of {cfg.seeds} seeds: derived rules {gap['derived']:+.3f}, static {gap['static']:+.3f}, "
        f"{saved:.1%} of v removed",
        max(gap.values()) <= 0.02 and saved >= 0.97,
        f"{cfg.n_layer} layers of width {cfg.d_model}, {cfg.steps} steps, seeds {[*seeds]}, CPU",
    )


def draw(cfg: Config, found: dict, figure, axes) -> None:
    """Left: SNR over training by layer type, its best axis. Right: loss against learning rate."""
    left, right = axes
    steps, values = found["adam", cfg.lrs[0], cfg.seed]["snr"]
    mean = by_type(found["adam", cfg.lrs[0], cfg.seed]["mean"])
    for i, (kind, table) in enumerate((k, t) for k, t in mean.items() if k != "norm"):
        axis = max(("{0}", "{1}"), key=lambda a: table.get(a, -1))
        K = (0,) if axis == "{0}" else (1,)
        lines = [t[K] for n, t in values.items() if layer_type(n) == kind]
        mean_line = [_nanmean(x) for x in zip(*lines, strict=True)]
        left.plot(steps, mean_line, color=f"C{i}", label=f"{kind} {axis}")
    left.axhline(cfg.cutoff, color="0.3", ls=":")
    left.text(steps[-1], cfg.cutoff * 1.05, "cutoff", ha="right", va="bottom", color="0.3")
    left.set(yscale="log", xlabel="step", ylabel="SNR of v along its better axis")
    left.set_title(f"How equal are Adam's second moments? (lr {cfg.lrs[0]:g})")
    left.legend(frameon=False, ncol=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for n, marker in zip(NAMES, "osv^", strict=True):
        saved = found[n, cfg.lrs[-1], cfg.seed]["memory"]["saved"]
        look = {"marker": marker, "ls": "-" if n == "adam" else "--", "label": f"{NAMES[n]} ({saved:.1%} of v saved)"}
        right.plot(cfg.lrs, [found[n, lr, cfg.seed]["val_loss"] for lr in cfg.lrs], **look)
    right.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    right.set_title(f"Loss after {cfg.steps} steps")
    right.legend(frameon=False)
    figure.tight_layout()


# ---- train, derive, bench


def make_model(cfg: Config, w: cluster.World) -> tuple[nn.Module, Text]:
    """The GPT of the settings, or a real one, with its text."""
    if cfg.model == "none":
        model, text = GPT(cfg), Text(cfg)
    else:
        weights = open_weights(cfg.model)
        tokenizer, model = weights.tokenizer(), Llama(weights.config)
        state = weights.state_dict()
        if weights.config.get("tie_word_embeddings"):
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        text = Text(cfg, lambda s: tokenizer.encode(s).ids)
    return model.to(w.device, getattr(torch, cfg.weights)), text


class Trainer:
    """Model, optimizer and step over all ranks; whole replicas or sharded rows."""

    def __init__(self, cfg: Config, w: cluster.World, rules):
        self.cfg, self.w, self.step = cfg, w, 0
        if cfg.batch % (w.size * cfg.accum):
            raise BadInput(f"--batch {cfg.batch} does not divide over {w.size} processes x --accum {cfg.accum}")
        self.model, self.text = make_model(cfg, w)
        self.sharded = cfg.parallel == "fsdp"
        if self.sharded:
            for block in self.model.h if cfg.model == "none" else self.model.model.layers:
                fully_shard(block)
            self.net = fully_shard(self.model)
        self.optimizer = SlimAdamW(
            self.model, cfg.lr, weight_decay=cfg.weight_decay, rules=rules, max_grad_norm=cfg.clip or None,
            nonfinite=cfg.nonfinite, stochastic_rounding=cfg.weights == "bfloat16", seed=cfg.seed,
        )  # fmt: skip
        if not self.sharded:
            self.net = DistributedDataParallel(self.model)
        self.net = torch.compile(self.net) if cfg.compile else self.net

    def advance(self) -> Tensor:
        """One optimizer step; its loss on this rank."""
        cfg, w = self.cfg, self.w
        rows = self.text.batch(cfg, self.step)[w.rank :: w.size].to(w.device)
        total = torch.zeros((), device=w.device)
        for i, micro in enumerate(rows.chunk(cfg.accum)):
            if self.sharded:
                self.model.set_requires_gradient_sync(i == cfg.accum - 1)
            else:
                getattr(self.net, "_orig_mod", self.net).require_backward_grad_sync = i == cfg.accum - 1
            with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                loss = loss_of(self.net, micro) / cfg.accum
            loss.backward()
            total += loss.detach()
        self.optimizer.param_groups[0]["lr"] = lr_at(cfg, self.step)
        self.optimizer.step()
        self.step += 1
        return total

    def state(self) -> dict:
        if not self.sharded:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step)}

    def save(self, path: str) -> None:
        if self.sharded:
            cluster.save_sharded(path, self.state())
        elif self.w.main:
            cluster.save(path, self.state())

    def load(self, path: str) -> None:
        """Go on from save(), on any number of processes. FileNotFoundError: no checkpoint. BadInput: only damaged."""
        if not self.sharded:
            state = cluster.load(path)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            state = cluster.load_sharded(path, self.state())
            both = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
            set_state_dict(self.model, self.optimizer, **both)
        self.step = int(state["step"])

    def run(self, log: report.Run, path: str = "", tracker: SNRTracker | None = None) -> None:
        """Train to the end; checkpoints go to `path` if given, also when SIGTERM asks to stop."""
        cfg, w, saved = self.cfg, self.w, -1
        bar = report.progress(None, cfg.mode, w, cfg.steps, self.step)
        listen = cluster.stop_signal() if path else contextlib.nullcontext(bool)  # bool() is False
        with listen as stopping, bar:
            while self.step < cfg.steps:
                loss = self.advance()
                if tracker and tracker.should_measure(self.step):
                    tracker.measure(self.step)
                self.optimizer.zero_grad(set_to_none=True)
                if self.step % cfg.log_every == 0 or self.step == cfg.steps:
                    mean = float(cluster.total(loss)) / w.size
                    log.log(run=cfg.mode, step=self.step, loss=mean, lr=self.optimizer.param_groups[0]["lr"])
                    bar.set_postfix_str(f"loss {mean:.3f}")
                bar.update()
                stop = stopping()
                if path and (stop or (cfg.save_every and self.step % cfg.save_every == 0)):
                    saved = self.step
                    self.save(path)
                if stop:
                    w.print(f"stopped by SIGTERM after step {self.step}; go on with --resume")
                    raise SystemExit(0)
        if path and saved != self.step:
            self.save(path)


# settings that change the numbers of a run; a checkpoint goes on only under the same ones
FIXED = (
    "rules lr warmup weight_decay clip weights data chars vocab block d_model n_layer n_head tied model steps batch "
    "seed dtype"
).split()


def check_resume(cfg: Config) -> None:
    """BadInput: the run in --out, by the head of its metrics.jsonl, had other settings."""
    head = Path(cfg.out, "metrics.jsonl")
    was = json.loads(head.read_text().splitlines()[0])["config"] if head.exists() else {}
    for name in FIXED:
        now = getattr(cfg, name)
        now = list(now) if isinstance(now, tuple) else now
        if was.get(name, now) != now:
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"the checkpoint was trained with {flag} {was[name]}, this run asks for {flag} {now}. Pass "
                           f"the same to resume, or another --out to start anew.")  # fmt: skip


def train(cfg: Config, w: cluster.World) -> None:
    """One run with --rules; prints what they save and the validation loss."""
    trainer, path = Trainer(cfg, w, cfg.rules), f"{cfg.out}/checkpoint" + ("" if cfg.parallel == "fsdp" else ".pt")
    if cfg.resume:
        check_resume(cfg)
        trainer.load(path)
    elif w.main:
        cluster.set_aside(path)
    log, memory = report.Run(cfg.out, cfg, w, trainer.step), trainer.optimizer.memory_report()
    share = [f"{memory[k]:.2%}" for k in ("saved", "saved_state", "saved_training")]
    w.print(f"{memory['total']} weights, {memory['kept']} second moments: saved {share[0]} of v, {share[1]} of state, "
            f"{share[2]} of weights, gradients, m and v")  # fmt: skip
    trainer.run(log, path)
    loss = validate(trainer.net, trainer.text, w.device)
    log.log(run="train", step=trainer.step, val_loss=loss)
    w.print(f"step {trainer.step} validation loss {loss:.4f}")


def derive(cfg: Config, w: cluster.World) -> None:
    """Train with Adam, measure SNR, print the table, write rules.json and snr.json."""
    trainer = Trainer(cfg, w, "adam")
    tracker = SNRTracker(trainer.optimizer, 1, cfg.every, 10**9, lines=cfg.lines or None, seed=cfg.seed)
    trainer.run(report.Run(cfg.out, cfg, w), tracker=tracker)
    mean, shapes = tracker.mean(cfg.burn_in), {clean(n): tuple(p.shape) for _, n, p, _ in trainer.optimizer._named()}
    rules = dict.fromkeys(shapes)
    rules |= derive_rules(mean, cfg.cutoff, cfg.select, depth_average=cfg.depth_average, shapes=shapes)
    print_snr(w, mean, rules)
    kept, total = (sum(math.prod(kept_shape(s, r.get(n))) for n, s in shapes.items()) for r in (rules, {}))
    w.print(f"\nthese rules save {1 - kept / total:.2%} of v")
    if w.main:
        starred = {_star(n): r for n, r in rules.items()} if cfg.depth_average else rules
        save_rules(starred, f"{cfg.out}/rules.json")
        tracker.save(f"{cfg.out}/snr.json")
        w.print(f"rules: {cfg.out}/rules.json")


def bench(cfg: Config, w: cluster.World) -> None:
    """The optimizer step alone on the tensors of GPT-2 small, against torch's own, with and without clipping."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in GPT(Config(**PRESETS["small"])).named_parameters()}
    g = cluster.generator(cfg.seed)
    make = lambda s: (torch.randn(s, generator=g) * 0.02).to(w.device)
    named = [(n, nn.Parameter(make(s))) for n, s in shapes.items()]
    for _, p in named:
        p.grad = make(p.shape)
    params, n = [p for _, p in named], sum(p.numel() for _, p in named)
    speed = report.ceilings(w.device)[0]
    adam = lambda **kw: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), **kw)
    fused, foreach, ours = adam(fused=True), adam(foreach=True), SlimAdamW(named, 1e-4)
    folded = SlimAdamW(named, 1e-4, max_grad_norm=1.0)

    def clipped():
        nn.utils.clip_grad_norm_(params, 1.0)
        fused.step()

    # p, g, m and v, read and written; row means need one pass over g, column means two
    ideal = sum(p.numel() * {None: 28, (1,): 20, (0,): 24}[rule] for _, _, p, rule in ours._named()) / n
    plain, clip = "AdamW(fused=True)", "clip_grad_norm_ + AdamW(fused=True)"
    cases = {  # what is timed, its optimizer, bytes per weight that must be moved, what it is compared with
        plain: (fused.step, fused, 28, plain), "AdamW(foreach=True)": (foreach.step, foreach, 28, plain),
        "SlimAdamW": (ours.step, ours, ideal, plain),
        clip: (clipped, fused, 40, clip), "SlimAdamW(max_grad_norm=1)": (folded.step, folded, 24, clip),
    }  # fmt: skip
    device = report.device_name(w.device)
    w.print(f"{device}, float32, GPT-2 small: {n} weights in {len(named)} tensors; copy {speed / 1e9:.1f} GB/s")
    seconds = report.timed({k: case[0] for k, case in cases.items()}, w.device, 50 if w.device.type == "cuda" else 7)
    rows, found = [], {}
    for name, (_, optimizer, size, base) in cases.items():
        (t, spread), floor = seconds[name], n * size / speed
        state = sum(y.numel() * y.element_size() for s in optimizer.state.values() for y in s.values())
        x = t / seconds[base][0]
        found[name] = {"seconds": t, "spread": spread, "x": x, "seconds_at_copy_speed": floor, "state_bytes": state}
        cells = f"{t * 1e3:.1f} ± {spread * 1e3:.1f}", f"{x:.2f}", f"{size:.1f}", f"{floor * 1e3:.1f}"
        rows.append([name, *cells, f"{state / 1e6:.0f}"])
    w.print(report.table(["step", "ms", "x fused", "bytes per weight", "ms at copy speed", "state MB"], rows))
    w.print("x fused: with clipping against clip_grad_norm_ and the fused step. Bytes: what must be moved.")
    if w.main:
        about = {"device": device, "weights": n, "copy_bytes_per_s": speed, "cases": found}
        report.write_json(f"{cfg.out}/bench.json", about)


def main(cfg: Config) -> None:
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "derive": derive, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
