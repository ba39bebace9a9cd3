"""SlimAdam: measure which of Adam's second moments are redundant, and keep one number in place of a whole line.

Paper    Kalra, Kirchenbauer, Barkeshli, Goldstein, "When Can You Get Away with Low Memory Adam?", arXiv:2503.01843.
Idea     Adam keeps v, a running mean of g^2, for every weight. In most layers its entries along one axis are nearly
         equal, so one number per row or column is enough. How equal they are is measured by a signal-to-noise ratio,
         squared mean over variance along the axis, on Adam's own path. Above 1 its entries differ from their mean by
         less than that mean, in root mean square, and the axis is averaged.
Here     The claim we check: the SNR tells how far averaging moves Adam's update. With 97 % of v or more removed,
         SlimAdam is nearer to Adam than to AdaLayer at every rate up to Adam's best, and at that rate the other axes
         cost at least twice as much.
Differs  - 135 k weights, untied head, Python's sources as bytes, 400 steps of 1024 tokens, for GPT-2 small, a tied
           head, FineWeb and 5000 steps of 1.31 M tokens. AdaLayer is one number per tensor everywhere.
         - Rules come from 41 measurements at the sweep's lowest rate. SNR is in float64. 1-D tensors keep their v.
         - Names match by whole components that end at the tensor's own module, not by substrings.
         - Fused weights keep one number per row. Convolutions choose among {0}, the other axes, and all.

    python slimadam.py                                             # laptop: SNR, rules, sweep, claim, picture
    python slimadam.py --quick                                     # fewer and shorter runs, no verdict
    torchrun --nproc-per-node 2 slimadam.py --device cpu           # what the first line starts: runs shared by two
    python slimadam.py derive --out results/rules                  # measure, write rules.json
    python slimadam.py train --rules results/rules/rules.json      # one run with those rules; see --resume
    torchrun --nproc-per-node 2 slimadam.py train --parallel fsdp --device cpu
    torchrun --nproc-per-node 8 slimadam.py train --preset small --parallel fsdp      # GPT-2 small; never run
    python slimadam.py bench                                       # the step alone, against torch's AdamW

Expect   "derived +0.023 (other axes +0.108), static +0.017 (other axes +0.088)" on CPU with seed 0, Python 3.11.7.
Writes   results/slimadam/: metrics.jsonl, claim.json, slimadam.png; rules*.json; checkpoint.pt (train), bench.json.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from common import cli, cluster, loop, report
from common.cli import BadInput, opt
from common.text import Tokenizer, checksum, corpus

# %% the method: one second moment per line, where Adam has one per weight
#
# K     axes that are averaged: (1,) leaves one number per row, (0,) one per column, () one per weight, as in Adam
# line  what is averaged into one number: a row for K = (1,), a column for K = (0,)
# m, v  running means of the gradient g and of g^2; v has length 1 along K        q  this step's mean of g^2 along K
# c1    1 - beta1^t, c2 = 1 - beta2^t: what corrects the start at zero in step t = 1, 2, ...


def mean_square(g: Tensor, K: tuple) -> Tensor:
    """q of a gradient g (any shape): of the same shape, but of length 1 along K."""
    return (g * g).mean(K, keepdim=True) if K else g * g


def slim_update(p, g, m, v, q, c1, c2, lr, beta1, beta2, eps, wd) -> None:
    """One step of one tensor p, in place: AdamW, except that v and q are shared along K.
    A mean of running means is a running mean of means: v is exactly the mean along K of Adam's v."""
    m.lerp_(g, 1 - beta1)
    v.lerp_(q, 1 - beta2)
    rate = lr / c1 / ((v / c2).sqrt() + eps)  # of v's shape: the step size of each line
    p.mul_(1 - lr * wd).addcmul_(m, rate, value=-1)


def snr(v: Tensor, K: tuple) -> float:
    """SNR_K(v) of Adam's own v: mean over the lines of mean^2 / variance, in float64. NaN: no line has a variance.
    It does not depend on the scale of v. A DTensor is gathered first, so that is collective."""
    v = (v.full_tensor() if isinstance(v, DTensor) else v).detach().double()
    ratio = v.mean(K).square() / v.var(K, unbiased=False)
    ratio = ratio[ratio.isfinite() & (ratio < 1e27)]  # above: a constant line, whose variance is rounding
    return ratio.mean().item() if ratio.numel() else math.nan


def derive_rules(mean_snr: dict, cutoff: float = 1.0) -> dict:
    """{name: {K: SNR, averaged over steps}} -> {name: K or None}: the axes of highest SNR if above the cutoff, else
    all of v stays. Ties go to the first. A tensor with one axis keeps its v."""
    best = {n: max(t, key=lambda K: -math.inf if math.isnan(t[K]) else t[K]) for n, t in mean_snr.items()}
    return {n: K if len(mean_snr[n]) > 1 and mean_snr[n][K] > cutoff else None for n, K in best.items()}


def candidates(ndim: int) -> list[tuple]:
    """The K that a rule chooses from: the outputs, the inputs, and both."""
    return [(0,), tuple(range(1, ndim)), tuple(range(ndim))] if ndim > 1 else [(0,)] * ndim


# %% rules: which axes each tensor is averaged over, by name and module

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TYPES = {  # whole components at the end of a module's path; the longest match wins
    "query": "q_proj query q wq to_q q_lin", "key": "k_proj key k wk to_k k_lin",
    "value": "v_proj value v wv to_v v_lin",
    "output": "o_proj output_proj out_proj wo to_out to_out.0 attn.c_proj attention.output.dense",
    "up": "mlp_up c_fc fc1 linear1 up_proj w3 intermediate.dense", "gate": "gate_proj w1",
    "down": "mlp_proj mlp_down c_proj fc2 linear2 down_proj w2 output.dense",
    "fused": "qkv c_attn in_proj_weight wqkv qkv_proj query_key_value gate_up_proj gate_up",
    "embedding": "wte embed embedding token_embedding embed_tokens tok_embeddings word_embeddings",
    "position": "wpe pos_embed position_embedding position_embeddings embed_positions",
    "head": "lm_head output_layer classifier embed_out head", "patch": "patch_embed patch_embed.proj first_conv",
}  # fmt: skip
KIND = {run: kind for kind, runs in TYPES.items() for run in runs.split()}
AXIS = {kind: int(kind not in ("value", "output", "up", "gate", "down")) for kind in TYPES}  # the static table
NORM = re.compile(r"ln(\d*|_.*|f)|.*norm\d*(_.*)?")


def clean(name: str) -> str:
    """A parameter's name without what DDP, FSDP, torch.compile and checkpointing wrap around it, in any order."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def starred(name: str) -> str:
    """The name with * for every number: the same at all depths."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def layer_type(name: str) -> str | None:
    """What a parameter is, by its name: a key of TYPES, "norm", or None when nothing matches.
    The match must end at the module that holds the tensor, so LoRA's pairs below v_proj are not a value."""
    parts = clean(name).lower().removesuffix(".parametrizations.weight.original").split(".")
    while len(parts) > 1 and parts[-1] in ("weight", "bias", "base_layer"):
        parts.pop()
    if NORM.fullmatch(parts[-1]):
        return "norm"
    runs = (".".join(parts[i:]) for i in range(len(parts)))  # the longest first
    alone = {"conv1": "patch", "output": "head"}.get(".".join(parts))
    return alone or next((KIND[run] for run in runs if run in KIND), None)


def described(source) -> list[tuple]:
    """(clean name, tensor, layer type, True if it is stored as (in, out)) of a module or of its named_parameters().
    Modules tell more than names: embeddings and norms under any name, and the Conv1D of Hugging Face's GPT-2."""
    owner, found = {}, []
    if isinstance(source, nn.Module):
        owner = {id(p): m for m in reversed(list(source.modules())) for p in m._parameters.values()}
        source = source.named_parameters()
    for name, p in source:
        kind, module = layer_type(name), owner.get(id(p))
        if isinstance(module, nn.Embedding) and kind != "position":
            kind = "embedding"
        elif "Norm" in type(module).__name__:
            kind = "norm"
        elif "c_attn" in name and module is None and p.ndim == 2 and p.shape[1] == 3 * p.shape[0]:
            raise BadInput(f"{name} {tuple(p.shape)} is stored as (in, out). Give the model, not its named_parameters.")
        found.append((clean(name), p, kind, type(module).__name__ == "Conv1D"))
    return found


def default_rules(source) -> dict:
    """The static table: {name: K or None} by layer type, for a module or its named_parameters().
    Tensors with one axis and norms keep all of v. So do unknown ones and experts (three axes), with a warning."""
    rules, unknown = {}, {}
    for name, p, kind, swapped in described(source):
        axis, rules[name] = AXIS.get(kind) if p.ndim == 2 or kind in ("position", "patch") else None, None
        if p.ndim > 1 and axis is not None:
            fan = (0,) if axis == swapped else tuple(range(1, p.ndim))
            rules[name] = (p.ndim - 1,) if kind == "position" else fan
        elif p.ndim > 1 and kind != "norm":
            unknown[name] = p.numel()
    if unknown:
        what = f"{len(unknown)} tensors, {sum(unknown.values())} weights: {', '.join([*unknown][:8])}"
        warnings.warn(f"no rule, so all of v is kept, for {what}. Measure rules, or give a dict.", stacklevel=3)
    return rules


def adalayer_rules(source, keep: tuple = ()) -> dict:
    """AdaLayer, the rival: one number per tensor, except for the layer types in `keep`, which stay as in Adam."""
    return {n: None if kind in keep else tuple(range(p.ndim)) or None for n, p, kind, _ in described(source)}


def match_rules(rules: dict, named: list[tuple], complete: bool = True) -> dict:
    """{name: K or None} for (name, tensor) pairs; "*" in a rule's name stands for any number. Frozen tensors need none.
    BadInput: a tensor without a rule, or (if complete) a rule without a tensor."""
    rules, pairs = {clean(name): K for name, K in rules.items()}, [(clean(name), p) for name, p in named]
    patterns = {k: re.compile(re.escape(k).replace(r"\*", r"\d+")) for k in rules if "*" in k.split(".")}
    fits = lambda name: next((k for k, pattern in patterns.items() if pattern.fullmatch(name)), None)
    keys = {name: name if name in rules else fits(name) for name, _ in pairs}
    lost = [name for name, p in pairs if keys[name] is None and p.requires_grad]
    extra = [key for key in rules if complete and key not in keys.values()]
    if lost or extra:
        raise BadInput(f"rules and model differ: no rule for {lost[:5]}, no tensor for {extra[:5]}. Mend the names.")
    return {name: rules.get(key) for name, key in keys.items()}


def save_rules(rules: dict, path) -> None:
    """Write {name: K or None} as JSON."""
    report.write_json(path, {clean(name): rules[name] and list(rules[name]) for name in sorted(rules)})


def load_rules(path) -> dict:
    """The rules that save_rules wrote. BadInput: not JSON, or not names with axes."""
    try:
        return {name: None if K is None else tuple(K) for name, K in json.loads(Path(path).read_text()).items()}
    except (ValueError, TypeError, AttributeError) as e:
        raise BadInput(f"rules {path}: not a JSON object of names and lists of axes ({e}). Write it by derive.") from e


# %% the optimizer: state as AdamW's, but for the shape of v; DDP and FSDP2


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def kept_shape(shape, K) -> tuple:
    """Shape of v: 1 along the axes that are averaged."""
    return tuple(1 if d in (K or ()) else n for d, n in enumerate(shape))


def split_along(p: Tensor, K: tuple) -> tuple:
    """Process groups whose ranks hold different parts of one line along K."""
    where = enumerate(p.placements if isinstance(p, DTensor) else ())
    return tuple(p.device_mesh.get_group(i) for i, s in where if isinstance(s, Shard) and s.dim in K)


def partial_mean(g: Tensor, K: tuple, shape) -> Tensor:
    """This rank's share of mean_square over lines of a tensor of this shape, in pieces that stay in a CPU's cache."""
    if g.numel() == 0:  # this rank holds no row
        return g.new_zeros(kept_shape(g.shape, K))
    pieces = g.split(max(1, 2**16 * len(g) // g.numel())) if g.ndim > 1 and not g.is_cuda else [g]
    parts = [mean_square(x, K) * math.prod(x.shape[d] / shape[d] for d in K) for x in pieces]
    return sum(parts[1:], parts[0]) if 0 in K else torch.cat(parts)


def update_all(jobs: list[tuple]) -> None:
    """slim_update of every tensor. q is None where it is still to be computed: then torch.compile fuses it too."""
    for p, g, m, v, q, K, *numbers in jobs:
        w = p.to(m.dtype)  # p itself if it is float32
        slim_update(w, g, m, v, mean_square(g, K) if q is None else q, *numbers)
        if w is not p:
            p.copy_(w)


class SlimAdamW(torch.optim.Optimizer):
    """AdamW whose second moments are averaged over the axes K of each tensor's rule.

    named: model.named_parameters(), groups of such pairs, or the model (then rules follow module types too). rules:
    "default" (by layer type), "adam", "adalayer", {name: K or None}, or a rules file. compile: one graph for all.
    State is torch.optim.AdamW's (step, exp_avg, exp_avg_sq), float32 or better, DTensors for DTensors. Decay reaches
    tensors with two axes or more. load_state_dict takes AdamW's checkpoints. Clip with nn.utils.clip_grad_norm_.
    BadInput (a ValueError): impossible numbers, rules that do not fit, unknown layouts. RuntimeError: flattened."""

    def __init__(self, named, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, rules="default", compile=False):
        if not all(0 <= x < math.inf for x in (lr, eps, weight_decay)) or not all(0 <= b < 1 for b in betas):
            raise BadInput(f"lr {lr}, eps {eps}, weight_decay {weight_decay} must be >= 0, and betas {betas} in [0, 1)")
        groups = list(named.named_parameters() if isinstance(named, nn.Module) else named)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        groups = [{**group, "params": list(group["params"])} for group in groups]
        pairs = [pair for group in groups for pair in group["params"]]
        if not pairs or not all(isinstance(pair, tuple) for pair in pairs):
            raise BadInput("rules need names, and at least one tensor: pass model.named_parameters()")
        self.given, self.update = rules, torch.compile(update_all, dynamic=False) if compile else update_all
        self.rules = self._rules_for(named if isinstance(named, nn.Module) else pairs, pairs)
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def _rules_for(self, source, pairs: list, complete: bool = True) -> dict:
        if self.given in ("default", "adalayer"):
            return default_rules(source) if self.given == "default" else adalayer_rules(source)
        if self.given == "adam":
            return {clean(name): None for name, _ in pairs}
        return match_rules(self.given if isinstance(self.given, dict) else load_rules(self.given), pairs, complete)

    def add_param_group(self, group: dict) -> None:
        pairs, held = list(group["params"]), [(name, p) for _, name, p, _ in self.named()]
        if new := [pair for pair in pairs if clean(pair[0]) not in self.rules]:
            self.rules |= self._rules_for(new, new, complete=False)
        for name, p in pairs:
            if twice := [n for n, q in held if q is p or n == clean(name)]:
                raise BadInput(f"{name} is given twice, or is {twice[0]} under another name")
            self._check(name, p)
            held.append((clean(name), p))
        super().add_param_group({**group, "params": pairs})

    def _check(self, name: str, p: Tensor) -> None:
        """BadInput: the tensor cannot be trained, has lost its axes, or does not fit its rule."""
        K, what = self.rules[clean(name)], f"{name} {tuple(p.shape)}"
        flat = getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)
        if not p.is_floating_point():
            raise BadInput(f"{what} is {p.dtype}: train floating tensors, complex ones as torch.view_as_real")
        if flat or (name.endswith("weight") and p.ndim == 1 and layer_type(name) in AXIS):
            raise RuntimeError(f"{what} is a piece of a flattened matrix (FSDP1? ZeRO?). Use fully_shard, not that.")
        if K is not None and (not all(type(d) is int and 0 <= d < p.ndim for d in K) or len(set(K)) < len(K)):
            raise BadInput(f"{what} cannot be averaged over {K}: give distinct axes out of 0..{p.ndim - 1}")
        if isinstance(p, DTensor) and not all(type(s) in (Shard, Replicate) for s in p.placements):
            raise BadInput(f"{what}: unknown layout {p.placements} (FSDP2 over tensor parallel?). Use Shard, Replicate")

    def named(self) -> list[tuple]:
        """(group, clean name, tensor, K) of every tensor."""
        pairs = ((g, pair) for g in self.param_groups for pair in zip(g["param_names"], g["params"], strict=True))
        return [(group, clean(name), p, self.rules[clean(name)] or ()) for group, (name, p) in pairs]

    def _place(self, x: Tensor, p: Tensor, K: tuple = ()) -> Tensor:
        """x laid out beside p: split like it, but whole along K."""
        if not isinstance(p, DTensor):
            return x.to(p.device)
        where = [Replicate() if isinstance(s, Shard) and s.dim in K else s for s in p.placements]
        spread = functools.partial(distribute_tensor, device_mesh=p.device_mesh, src_data_rank=None)
        return x.redistribute(placements=where) if isinstance(x, DTensor) else spread(x, placements=where)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; a tensor without gradient stays as it is. Returns the closure's loss. Collective on DTensors."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        jobs, parts, compiled = [], {}, self.update is not update_all
        for group, name, p, K in self.named():
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"SlimAdamW does not support sparse gradients ({name}): use sparse=False")
            s, dtype, across = self.state[p], torch.promote_types(p.dtype, torch.float32), split_along(p, K)
            if not s:
                s["step"], s["exp_avg"] = torch.zeros(()), torch.zeros_like(p, dtype=dtype)
                s["exp_avg_sq"] = self._place(torch.zeros(kept_shape(p.shape, K), dtype=dtype), p, K)
            s["step"] += 1
            grad = p.grad.redistribute(placements=p.placements) if isinstance(p, DTensor) else p.grad
            g, t, (beta1, beta2) = local(grad).to(dtype), float(s["step"]), group["betas"]
            number = functools.partial(torch.tensor, dtype=dtype, device=g.device) if compiled else float
            numbers = [number(float(x)) for x in (1 - beta1**t, 1 - beta2**t, group["lr"])]  # or it compiles anew
            q = None if not K or (compiled and not across) else partial_mean(g, K, p.shape)
            if across:  # other ranks hold more of the same lines
                parts.setdefault((across, dtype, g.device), []).append((len(jobs), q))
            numbers += [beta1, beta2, group["eps"], group["weight_decay"] if p.ndim > 1 else 0.0]
            jobs.append([local(p), g, local(s["exp_avg"]), local(s["exp_avg_sq"]), q, K, *numbers])
        for (across, *_), sums in parts.items():  # one all-reduce of all that must be added
            flat = torch.cat([q.flatten() for _, q in sums])
            for mesh_axis in across:
                dist.all_reduce(flat, group=mesh_axis)
            for (i, q), total in zip(sums, flat.split([q.numel() for _, q in sums]), strict=True):
                jobs[i][4] = total.view(q.shape)
        self.update(jobs)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Also of torch.optim.AdamW or of finer rules: their v is averaged, which is exact. BadInput: coarser rules."""
        groups, old = [], [i for group in state_dict["param_groups"] for i in group["params"]]
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            names, others = mine["param_names"], saved.get("param_names", mine["param_names"])
            if list(map(clean, names)) != list(map(clean, others)):
                raise BadInput(f"the checkpoint's tensors are {others[:9]}, ours {names[:9]}. Give the same order.")
            groups.append({**saved, "param_names": names})
        super().load_state_dict({**state_dict, "param_groups": groups, "state": {}})  # torch would cast to p's dtype
        for i, (_, name, p, K) in zip(old, self.named(), strict=True):
            if (s := state_dict["state"].get(i)) is None:
                continue
            want = kept_shape(p.shape, K)
            have = tuple(s["exp_avg_sq"].shape) if set(s) == {"step", "exp_avg", "exp_avg_sq"} else ()
            if len(have) != p.ndim or any(a not in (b, c) for a, b, c in zip(have, want, p.shape, strict=True)):
                raise BadInput(f"{name}: {sorted(s)} with v {have} cannot become v {want}. Load AdamW's state, or use "
                               f"the rules that it was saved by.")  # fmt: skip
            m, v = (s[k].to(torch.promote_types(p.dtype, torch.float32), copy=True) for k in ("exp_avg", "exp_avg_sq"))
            m, v = self._place(m, p), self._place(v.mean(K, keepdim=True) if K else v, p, K)
            self.state[p] = {"step": s["step"].cpu().clone(), "exp_avg": m, "exp_avg_sq": v}

    def __getstate__(self) -> dict:  # torch copies and pickles an optimizer by this, without our attributes
        return {**super().__getstate__(), "given": self.given, "rules": self.rules, "update": self.update}

    def memory_report(self) -> dict:
        """Weights that are trained, the numbers kept in v, three shares saved, and bytes of state, over all ranks."""
        sizes = [(p.numel(), math.prod(kept_shape(p.shape, K)), max(4, p.element_size()))
                 for _, _, p, K in self.named() if p.requires_grad]  # fmt: skip
        total, kept = sum(n for n, _, _ in sizes), sum(k for _, k, _ in sizes)
        saved = 1 - kept / max(1, total)
        size, adam = sum(b * (n + k) for n, k, b in sizes), sum(2 * b * n for n, _, b in sizes)
        shares = {"saved": saved, "saved_state": saved / 2, "saved_training": saved / 4}
        return {"total": total, "kept": kept, **shares, "bytes": size, "bytes_adam": adam}


# %% measuring along a run of Adam


@torch.no_grad()
def measure(optimizer: SlimAdamW, seen: dict) -> None:
    """Append the SNR of every v to seen, {name: {K: [SNR, ...]}}. RuntimeError: a v is averaged already."""
    for _, name, p, K in optimizer.named():
        if K:
            raise RuntimeError(f"{name}: the SNR of a v averaged over {K} is undefined. Measure with rules='adam'.")
        for axes in candidates(p.ndim) if p in optimizer.state else ():
            seen.setdefault(name, {}).setdefault(axes, []).append(snr(optimizer.state[p]["exp_avg_sq"], axes))


def averaged(seen: dict, key=str) -> dict:
    """{key(name): {K: mean SNR}} over the run and over all names of one key, leaving out NaN."""
    lines = {}
    for name, table in seen.items():
        for K, values in table.items():
            lines.setdefault(key(name), {}).setdefault(K, []).extend(values)
    return {n: {K: torch.tensor(x).double().nanmean().item() for K, x in t.items()} for n, t in lines.items()}


@torch.no_grad()
def fidelity(optimizer: SlimAdamW) -> dict:
    """{name: {K: (SNR, relative error of the update if this v were averaged over K)}} of Adam's matrices."""
    found = {}
    for group, name, p, _ in optimizer.named():
        s, t = optimizer.state[p], float(optimizer.state[p]["step"])
        m, v = (s[k] / (1 - beta**t) for k, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True))
        update = m / (v.sqrt() + group["eps"])
        for K in candidates(p.ndim) if p.ndim > 1 else ():
            moved = m / (v.mean(K, keepdim=True).sqrt() + group["eps"])
            found.setdefault(name, {})[K] = snr(v, K), ((moved - update).norm() / update.norm()).item()
    return found


def mechanism(table: dict) -> tuple[float, int, int]:
    """(Spearman of SNR and error over all tensors and K, tensors whose axis of higher SNR is better, tensors)."""
    pairs = torch.tensor([list(t.values()) for t in table.values()])  # (tensors, 3 K, SNR and error)
    pairs = pairs[pairs.isfinite().flatten(1).all(dim=1)]  # a v without variance has no SNR
    ranks = pairs.flatten(0, 1).argsort(dim=0).argsort(dim=0).double()
    higher = pairs[:, 0] > pairs[:, 1]  # {0} against {1}: in SNR, in error
    return torch.corrcoef(ranks.T)[0, 1].item(), (higher[:, 0] != higher[:, 1]).sum().item(), len(pairs)


# %% the model


class Block(nn.Module):
    """Pre-norm attention and a GELU MLP, without biases. (B, T, C) -> (B, T, C)."""

    def __init__(self, C: int, H: int):
        super().__init__()
        self.H, self.ln_1, self.ln_2 = H, nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        linear = functools.partial(nn.Linear, bias=False)
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
        self.wte, self.wpe = nn.Embedding(cfg.vocab, cfg.d_model), nn.Embedding(cfg.block, cfg.d_model)
        self.h = nn.ModuleList(Block(cfg.d_model, cfg.n_head) for _ in range(cfg.n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(cfg.d_model, bias=False), nn.Linear(cfg.d_model, cfg.vocab, bias=False)
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


# %% settings

RUNS, MODELS = ("train", "derive"), ("demo", "train", "derive")


@dataclass
class Config:
    mode: str = opt("demo", "what to do", choices=("demo", "train", "derive", "bench"), positional=True)
    preset: str = opt("demo", "settings: for your text, the paper's", ("demo", "laptop", "small"), modes=RUNS)
    rules: str = opt("default", "default (by layer type), adam, adalayer, or a file of rules", modes=("train",))
    lr: float = opt(6e-3, "peak learning rate to train with; derive measures at a tenth of it", modes=RUNS)
    warmup: float = opt(0.4, "share of the steps in which the rate rises; a cosine to a tenth follows", modes=RUNS)
    cutoff: float = opt(1.0, "average where the SNR is above this", modes=("demo", "derive"))
    data: tuple = opt(("sources",), "text files, one .npy of token ids, or Python's own docs or sources", modes=MODELS)
    chars: int = opt(6_000_000, "characters of the text, or ids of a .npy, that are used; 0 is all", modes=MODELS)
    vocab: int = opt(256, "token ids: 256 bytes and the most frequent pieces", modes=RUNS)
    block: int = opt(64, "tokens per row that are predicted", modes=RUNS)
    d_model: int = opt(64, "width", modes=RUNS)
    n_layer: int = opt(2, "blocks", modes=RUNS)
    n_head: int = opt(4, "attention heads", modes=RUNS)
    tied: bool = opt(False, "one matrix for token embedding and head", modes=RUNS)
    steps: int = opt(400, "optimizer steps", modes=MODELS)
    batch: int = opt(16, "rows per step, over all processes and micro-steps", modes=MODELS)
    accum: int = opt(1, "micro-steps per step", modes=RUNS)
    seed: int = opt(0, "seed of the weights and the data order")
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = opt("float32", "of the matrix products", choices=("float32", "bfloat16"), modes=RUNS)
    compile: bool = opt(False, "torch.compile the model and the optimizer's update", modes=RUNS)
    parallel: str = opt("ddp", "whole replicas, or sharded rows (FSDP2)", choices=("ddp", "fsdp"), modes=RUNS)
    quick: bool = opt(False, "fewer and shorter runs, no verdict", modes=("demo",))
    out: str = opt("results/slimadam", "folder of what the run writes, and of the run to resume")
    resume: bool = opt(False, "go on from the checkpoint in --out, if there is one", modes=("train",))
    save_every: int = opt(100, "steps between checkpoints; 0 writes only the last", modes=("train",))
    log_every: int = opt(10, "steps between lines in metrics.jsonl", modes=RUNS)

    def __post_init__(self):
        sizes = (self.block, self.d_model, self.n_layer, self.n_head, self.batch, self.accum, self.steps)
        for wrong, message in (
            (min(*sizes, self.log_every, self.chars + 1, self.save_every + 1) < 1,
             "sizes, steps and counts must be at least 1, --chars and --save-every 0"),
            (self.d_model % self.n_head, f"--d-model {self.d_model} is not a multiple of --n-head {self.n_head}"),
            (self.vocab < 256, f"--vocab {self.vocab} is too small for text as bytes: give 256 or more"),
            (not 0 < self.lr < math.inf, f"--lr {self.lr}: give a number above 0"),
            (not 0 <= self.warmup <= 1, f"--warmup {self.warmup} is a share of the steps: give 0 to 1"),
            (self.mode in RUNS and self.preset == "demo" and self.data != ("sources",),
             "your text needs --preset laptop (the demo's settings) or small (the paper's)"),
        ):  # fmt: skip
            if wrong:
                raise BadInput(message)


PRESETS = {"demo": {}, "laptop": {}, "small": {  # GPT-2 small, 124,373,760 parameters, the paper's recipe; not run here
    "vocab": 50304, "block": 1024, "d_model": 768, "n_layer": 12, "n_head": 12, "tied": True, "batch": 1280, "accum": 5,
    "chars": 0, "steps": 5000, "lr": 3e-3, "dtype": "bfloat16", "compile": True,
}}  # fmt: skip

# %% text and training


class Text:
    """The corpus as rows of block + 1 tokens, encoded once. Of 20 spans of 32 rows one is held out for validation."""

    def __init__(self, cfg: Config):
        text, width, self.vocab = corpus(cfg.data)[: cfg.chars or None], cfg.block + 1, cfg.vocab
        if isinstance(text, np.ndarray):
            ids = text
        elif cfg.vocab > 256:
            ids = Tokenizer(text, cfg.vocab).encode(text).numpy()
        else:
            ids = np.frombuffer(text.encode("utf-8", errors="surrogatepass"), np.uint8)
        n = len(ids) // width
        self.table, held = ids[: n * width].reshape(n, width), np.arange(n) // 32 % 20 == 19
        self.train, self.validation = np.flatnonzero(~held), np.flatnonzero(held)
        self.validation = self.validation[:: max(1, len(self.validation) // 256)][:256]
        self.crc = checksum(ids)
        if len(self.validation) == 0 or len(self.train) < cfg.batch:
            raise BadInput(f"the text is too small: {n} rows of {width} tokens. Give 609 or more, and --batch of them.")

    def rows(self, index: np.ndarray) -> Tensor:
        """Token ids of these rows, (len(index), block + 1), int64."""
        found = torch.from_numpy(self.table[index].astype(np.int64))
        if not 0 <= found.min() <= found.max() < self.vocab:
            raise BadInput(f"the text has token ids {found.min()} to {found.max()}, the model 0 to {self.vocab - 1}.")
        return found

    def batch(self, cfg: Config, step: int) -> Tensor:
        """The rows of a step, (batch, block + 1): a function of seed and step alone."""
        pick = torch.randint(len(self.train), (cfg.batch,), generator=cluster.generator(cfg.seed, 1, step))
        return self.rows(self.train[pick.numpy()])


def lr_at(cfg: Config, peak: float, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth, as in the released code."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / (cfg.steps - rise)))


def loss_of(model, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model, text: Text, device) -> float:
    rows = text.rows(text.validation).to(device)
    return sum(loss_of(model, r).item() * len(r) for r in rows.split(32)) / len(rows)


def train(cfg: Config, w: cluster.World, rules=None, seen: dict | None = None) -> SlimAdamW:
    """One run over all ranks -> its optimizer, with --rules and checkpoints. derive gives rules, and seen for SNR."""
    shards, sharded = w.size * cfg.accum, cfg.parallel == "fsdp"
    if cfg.batch % shards:
        raise BadInput(f"--batch {cfg.batch} does not divide over {w.size} processes x --accum {cfg.accum}")
    text, model, run = Text(cfg), GPT(cfg).to(w.device), report.Run(cfg.out, cfg, w)
    for block in model.h if sharded else ():
        fully_shard(block)
    ddp = fully_shard(model) if sharded else nn.parallel.DistributedDataParallel(model)
    net, path = torch.compile(ddp) if cfg.compile else ddp, f"{cfg.out}/checkpoint" + ("" if sharded else ".pt")
    optimizer = SlimAdamW(model, rules=rules or cfg.rules, compile=cfg.compile)
    w.print("{total} weights, {kept} second moments: saved {saved:.2%} of v".format(**optimizer.memory_report()))
    parts = {"model": model, "optimizer": optimizer}
    if sharded:
        both, names = (model, optimizer), ("model_state_dict", "optim_state_dict")
        save = lambda: dict(zip(names, get_state_dict(*both), strict=True))
        parts = {"both": SimpleNamespace(state_dict=save, load_state_dict=lambda state: set_state_dict(*both, **state))}
    same = {"text": text.crc, "set of rules": {n: K and list(K) for n, K in sorted(optimizer.rules.items())}}
    for step in loop.steps(
        replace(cfg, accum=1), w, run, parts, cfg.steps, cfg.mode, path if cfg.mode == "train" else "", same
    ):
        rows, loss = text.batch(cfg, step), 0.0
        for i in range(cfg.accum):
            last, mine = i == cfg.accum - 1, rows[w.rank + i * w.size :: shards].to(w.device)
            model.set_requires_gradient_sync(last) if sharded else setattr(ddp, "require_backward_grad_sync", last)
            with torch.autocast(w.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                part = loss_of(net, mine) / cfg.accum
            part.backward()
            loss = loss + part.detach()
        run.line = {"loss": loss / w.size, "lr": advance(cfg, model, optimizer, cfg.lr, step, seen)}
        model.zero_grad(set_to_none=True)
    run.log(measured=cfg.mode, val_loss=(found := validate(net, text, w.device)))
    w.print(f"validation loss {found:.4f} after {cfg.steps} steps")
    return optimizer


def advance(cfg: Config, model, optimizer: SlimAdamW, peak: float, step: int, seen: dict | None) -> float:
    """Clip, set the rate, step, and measure SNR (41 times in 400 steps). Returns the rate."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr = lr_at(cfg, peak, step)
    optimizer.step()
    if seen is not None and (step == 0 or (step + 1) % max(1, cfg.steps // 40) == 0):
        measure(optimizer, seen)
    return lr


# %% demo: the claim

LRS = (1e-3, 3e-3, 6e-3, 1e-2)  # the sweep; rules come from Adam at the first, well below its best rate
NAMES = {"adam": "Adam", "derived": "SlimAdam, derived", "static": "SlimAdam, static", "adalayer": "AdaLayer",
         "static swapped": "static, other axes", "derived swapped": "derived, other axes"}  # fmt: skip


def swapped(shape, K: tuple | None) -> tuple[tuple, tuple | None]:
    """(shape to view a matrix in, axes): the control. As many numbers are kept, each for entries along the other axis.
    Where the other axis alone would keep more, neighbouring lines share a number; where fewer, a line has several."""
    if K is None or len(shape) != 2 or len(K) != 1:
        return tuple(shape), K
    kept, lines = shape[1 - K[0]], shape[K[0]]  # numbers now; lines along the other axis
    near, parts = max(1, lines // kept), max(1, kept // lines)  # lines that share a number; numbers per line
    view = (lines // near, near, parts, kept // parts)  # lines first
    return (view, (1, 3)) if K == (0,) else ((*view[2:], *view[:2]), (1, 3))


def run_one(cfg: Config, text: Text, device, lr: float, rules: dict, swap: bool = False, look: bool = False) -> dict:
    """One run of the sweep: validation loss, numbers kept; and of Adam (look) the SNR and how it tells the error."""
    model = GPT(cfg).to(device)
    named = dict(model.named_parameters())
    views = {n: swapped(p.shape, rules[n]) if swap else (p.shape, rules[n]) for n, p in named.items()}
    held = {n: nn.Parameter(p.detach().view(views[n][0])) for n, p in named.items()}  # the same memory
    optimizer, seen, errors = SlimAdamW(held.items(), rules={n: K for n, (_, K) in views.items()}), {}, {}
    for n, p in named.items():  # what backward leaves in p, clipped in place, is held's gradient
        p.grad = torch.zeros_like(p)
        held[n].grad = p.grad.view(views[n][0])
    for step in range(cfg.steps):
        loss_of(model, text.batch(cfg, step).to(device)).backward()
        advance(cfg, model, optimizer, lr, step, seen if look else None)
        model.zero_grad(set_to_none=False)
        if look and (step + 1) % max(1, cfg.steps // 4) == 0:
            errors[step + 1] = fidelity(optimizer)
    return {"val_loss": validate(model, text, device), **optimizer.memory_report(), "seen": seen, "errors": errors}


def share(jobs: dict, cfg: Config, text: Text, w: cluster.World, what: str) -> dict:
    """{key: run_one of these arguments}, the runs dealt out to the ranks."""
    mine, every = {}, [None] * w.size
    for key in report.progress(list(jobs)[w.rank :: w.size], what, w):
        mine[key] = run_one(cfg, text, w.device, *jobs[key])
    dist.all_gather_object(every, mine)
    return {key: part[key] for key in jobs for part in every if key in part}


def judge(found: dict, looks: dict) -> tuple[bool, str]:
    """(the claim holds, its numbers); bars fixed before the runs.
    found: {(name, lr): run_one's}; looks: {lr: {step: mechanism}} of Adam at the lowest and at its best rate."""
    loss = {key: run["val_loss"] for key, run in found.items()}
    lrs = sorted(lr for name, lr in found if name == "adam")
    best = min(lrs, key=lambda lr: loss["adam", lr])
    worst = max(x[0] for look in looks.values() for x in look.values())
    right, tensors = (sum(look[max(look)][i] for look in looks.values()) for i in (1, 2))  # at the end
    gap = {name: loss[name, best] - loss["adam", best] for name in NAMES}
    near, cost, saved = True, True, min(found[name, best]["saved"] for name in ("derived", "static"))
    for name in ("derived", "static"):
        other = f"{name} swapped"
        for lr in lrs[: lrs.index(best) + 1]:
            near &= abs(loss[name, lr] - loss["adam", lr]) < abs(loss[name, lr] - loss["adalayer", lr])
        cost &= found[name, best]["kept"] == found[other, best]["kept"] and gap[other] >= max(2 * gap[name], 1e-9)
    pair = lambda name: f"{gap[name]:+.3f} (other axes {gap[name + ' swapped']:+.3f})"
    return worst <= -0.85 and right >= 0.9 * tensors and near and cost and saved >= 0.97, (
        f"{saved:.1%} of v removed, validation loss {gap['static']:+.3f} (static), {gap['derived']:+.3f} (derived) "
        f"over Adam's; Spearman {worst:.2f}, better axis {right} of {tensors}; at Adam's best rate {best:g}: derived "
        f"{pair('derived')}, static {pair('static')}, AdaLayer {gap['adalayer']:+.3f}; "
        f"nearer to Adam: {'yes' if near else 'no'}, other axes twice the cost: {'yes' if cost else 'no'}"
    )


def snr_table(w: cluster.World, seen: dict, rules: dict) -> None:
    """Print the mean SNR by layer type, and which axes its tensors got."""
    kind, axes = lambda name: layer_type(name) or starred(name), {}
    for name in seen:
        axes.setdefault(kind(name), []).append(str(rules[name]).replace(" ", ""))
    rows = [[k, *[*t.values(), "-", "-"][:3], " ".join(axes[k][:6])] for k, t in averaged(seen, kind).items()]
    w.print("\n" + report.table(["layer type", "SNR (0,)", "SNR (1,)", "SNR both", "averaged over, by depth"], rows))


def demo(cfg: Config, w: cluster.World) -> None:
    """The sweep, the tables, the picture and the claim."""
    run, lrs = report.Run(cfg.out, cfg, w), LRS[::2] if cfg.quick else LRS
    cfg = replace(cfg, steps=max(1, cfg.steps // 2)) if cfg.quick else cfg
    text, static, layer = Text(cfg), default_rules(GPT(cfg)), adalayer_rules(GPT(cfg))
    rules = {"adam": dict.fromkeys(static), "static": static, "adalayer": layer, "static swapped": static}
    jobs = {(name, lr): (lr, rules[name], "swapped" in name, name == "adam") for name in rules for lr in lrs}
    found = share(jobs, cfg, text, w, "Adam, static rules, AdaLayer, other axes")
    best, seen = min(lrs, key=lambda lr: found["adam", lr]["val_loss"]), found["adam", lrs[0]]["seen"]
    derived = derive_rules(averaged(seen), cfg.cutoff)
    jobs = {("derived", lr): (lr, derived) for lr in lrs} | {("derived swapped", best): (best, derived, True)}
    found |= share(jobs, cfg, text, w, "derived rules")
    snr_table(w, seen, derived)
    looks = {lr: {step: mechanism(x) for step, x in found["adam", lr]["errors"].items()} for lr in lrs}
    rows = [[f"{lr:g}, step {step}", x[0], f"{x[1]} of {x[2]}"] for lr in lrs for step, x in looks[lr].items()]
    w.print("\n" + report.table(["Adam's v at rate", "Spearman of SNR and error", "axis of higher SNR better"], rows))
    rows = []
    for name, title in NAMES.items():
        runs = {lr: found[name, lr] for lr in lrs if (name, lr) in found}
        gaps = {lr: r["val_loss"] - found["adam", lr]["val_loss"] for lr, r in runs.items()}
        cells = [f"{runs[lr]['val_loss']:.3f} ({gaps[lr]:+.3f})" if lr in runs else "-" for lr in lrs]
        rows.append([title, *cells, runs[best]["kept"], f"{runs[best]['saved']:.2%}"])
        for lr, r in runs.items():
            run.log(optimizer=name, lr=lr, val_loss=r["val_loss"], kept=r["kept"], saved=r["saved"])
    head = ["validation loss (minus Adam's)", *(f"rate {lr:g}" for lr in lrs), "numbers in v", "removed"]
    w.print("\n" + report.table(head, rows) + "\n")
    if w.main:
        save_rules(derived, f"{cfg.out}/rules.json")
        w.print(report.picture(f"{cfg.out}/slimadam.png", lambda _, axis: draw(lrs, found, axis), figsize=(7, 4.4)))
    if cfg.quick:
        return w.print("quick: no verdict")
    holds, here = judge(found, {lr: looks[lr] for lr in {lrs[0], best}})
    run.claim("SNR tells how far averaging v moves Adam's update; with 97 % of v or more removed SlimAdam is nearer to "
              "Adam than to AdaLayer at every rate up to Adam's best, where the other axes cost at least twice as much",
              "0.003 nats behind Adam, 99.9 % of v removed (GPT-2 small)", here, holds, f"{cfg.n_layer} blocks of "
              f"{cfg.d_model}, {cfg.steps} steps, seed {cfg.seed}, {w.device.type}")  # fmt: skip


def draw(lrs, found: dict, axis) -> None:
    """Loss against the learning rate."""
    for name, style in zip(NAMES, ("o-", "s--", "v--", "^-.", "x:", "+"), strict=True):
        points = [(lr, found[name, lr]["val_loss"]) for lr in lrs if (name, lr) in found]
        axis.plot(*zip(*points, strict=True), style, label=NAMES[name])
    axis.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    axis.legend(frameon=False)


# %% derive, bench


def derive(cfg: Config, w: cluster.World) -> None:
    """Train with Adam at a tenth of --lr, measure SNR, print the table, write the rules."""
    optimizer = train(replace(cfg, lr=cfg.lr / 10), w, "adam", seen := {})
    rules = derive_rules(averaged(seen), cfg.cutoff)
    snr_table(w, seen, rules)
    saved = SlimAdamW([(name, p) for _, name, p, _ in optimizer.named()], rules=rules).memory_report()["saved"]
    w.print(f"{cfg.out}/rules.json removes {saved:.2%} of v; rules_by_depth.json has one rule for all depths")
    if w.main:
        save_rules(rules, f"{cfg.out}/rules.json")
        save_rules(derive_rules(averaged(seen, starred), cfg.cutoff), f"{cfg.out}/rules_by_depth.json")


def bench(cfg: Config, w: cluster.World) -> None:
    """The optimizer's step alone at GPT-2 small's shapes (on a CPU, its embeddings and four blocks)."""
    cuda, g = w.device.type == "cuda", cluster.generator(cfg.seed)
    with torch.device("meta"):
        model = GPT(Config("train", **PRESETS["small"] | {"n_layer": 12 if cuda else 4}))
    made = lambda shape: (torch.randn(shape, generator=g) * 0.02).to(w.device)
    named = [(n, nn.Parameter(made(p.shape))) for n, p in model.named_parameters()]
    for _, p in named:
        p.grad = made(p.shape)
    adam = functools.partial(torch.optim.AdamW, [p for _, p in named])
    optimizers = {"AdamW(fused=True)": adam(fused=True), "AdamW(foreach=True)": adam(foreach=True),
                  "SlimAdamW": SlimAdamW(named), "SlimAdamW(compile=True)": SlimAdamW(named, compile=True)}  # fmt: skip
    seconds = report.timed({name: o.step for name, o in optimizers.items()}, w.device, repeats=50 if cuda else 9)
    rows, base = [], [t for t, _ in seconds.values()][:2]
    for name, optimizer in optimizers.items():
        state = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())
        rows.append([name, *(x * 1e3 for x in seconds[name]), *(seconds[name][0] / x for x in base), state / 1e6])
    total, head = sum(p.numel() for _, p in named), ["step", "ms", "+-", "x fused", "x foreach", "state MB"]
    title = f"{report.device_name(w.device)}, float32, {total} weights in {len(named)} tensors"
    w.print(title + "\n" + report.table(head, rows))
    if w.main:
        report.write_json(f"{cfg.out}/bench.json", {"title": title, "head": head, "rows": rows})


def main(cfg: Config) -> None:
    cluster.two_processes(cfg)
    with cluster.world(cfg.device) as w:
        {"demo": demo, "train": train, "derive": derive, "bench": bench}[cfg.mode](cfg, w)


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
