"""Automated model merging: search for the recipe that merges fine-tuned nets, one method per group of layers.

Paper    Su and Geiping, "Fine, I'll Merge It Myself: A Multi-Fidelity Framework for Automated Model Merging",
         arXiv:2502.04030v2 (layer-wise fusion).
Idea     A recipe names a merging method and its coefficients for every group of layers. A search proposes recipes like
         the best ones so far. Most are judged on few examples, and only the best of them on many (Hyperband).
Here     One expert reads turned digits, one gives the wanted answers, one does neither. Target: turned digits with the
         wanted answers, which no expert has seen. The claim we check: the search beats the best of 64 recipes of each
         of four kinds that treat all layers alike. At equal evaluation examples it beats random search and one group,
         and full evaluations are no better. Whoever knows that experts see below and answer above beats it by hand.
Differs  - Small nets on drawn digits, for 13B language models. One objective. No SLERP, and no stacking of layers.
         - Task arithmetic has a scale for each expert, in place of one. Attention and MLP are not told apart.
         - Proposals recombine the best quarter of all recipes, at most 15, and add noise, for SMAC's random forest.
         - Experts learn their answers in the upper half only. Trained in all layers, they left layers nothing to gain.

    python shorts/model_merging.py                                      # laptop, 40 s
    python shorts/model_merging.py --quick                              # one short search of each kind, no verdict

Expect   "search 0.316, best alike for all layers 0.309, by hand 0.503" on CPU with seed 0: the claim does not hold.
Writes   results/model_merging/: metrics.jsonl, claim.json, model_merging.png
"""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common import cli, cluster, report
from common.cli import BadInput, opt

# %% the method: three ways to merge a matrix. base (I, O), experts (M, I, O), task vectors are experts - base


def linear(base: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("m,mio->io", weights / weights.sum().clamp(min=1e-6), experts)


def task_arithmetic(base: Tensor, experts: Tensor, scale: Tensor) -> Tensor:
    return base + torch.einsum("m,mio->io", scale.expand(len(experts)), experts - base)  # one scale, or one each


def ties(base: Tensor, experts: Tensor, drop_scale: Tensor) -> Tensor:
    """Trim the share `drop` of smallest entries of each task vector, elect a sign per entry, average who agrees."""
    drop, scale = drop_scale
    tau = (experts - base).flatten(1)
    keep = tau.abs().topk(max(1, round((1 - drop.item()) * tau.shape[1]))).indices
    trimmed = torch.zeros_like(tau).scatter(1, keep, tau.gather(1, keep))
    agree = (trimmed.sign() == trimmed.sum(dim=0).sign()) & (trimmed != 0)
    return base + scale * ((trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)).view_as(base)


METHODS = (linear, task_arithmetic, ties)
NUMBERS = (slice(0, 3), slice(3, 6), slice(6, 8))  # where each method's coefficients stand in a row of 8


def merge(base: list[Tensor], experts: list[Tensor], recipe: tuple[Tensor, Tensor]) -> list[Tensor]:
    """recipe: methods (G,) and coefficients in [0, 1] (G, 8). Consecutive layers share one of the G groups."""
    method, x = recipe[0].tolist(), recipe[1]
    groups = [layer * len(method) // len(base) for layer in range(len(base))]
    return [METHODS[method[k]](b, e, x[k, NUMBERS[method[k]]]) for b, e, k in zip(base, experts, groups, strict=True)]


# %% the search: good recipes are recombined, and Hyperband decides how many examples a recipe deserves


def propose(seen: list, groups: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """seen: [score, recipe] pairs. Each group comes from one of the best recipes, moved a little, or is drawn anew."""
    any_method, any_x = torch.randint(3, (groups,), generator=g), torch.rand(groups, 8, generator=g)
    if len(seen) < 10 or torch.rand((), generator=g) < 0.2:
        return any_method, any_x
    best = sorted(seen, key=lambda trial: -trial[0])[: min(max(4, len(seen) // 4), 15)]
    methods, x = (torch.stack(part) for part in zip(*(recipe for _, recipe in best), strict=True))  # (n, G), (n, G, 8)
    source, group = torch.randint(len(best), (groups,), generator=g), torch.arange(groups)
    x = (x[source, group] + 0.2 * torch.randn(groups, 8, generator=g)).clamp(0, 1)
    anew = torch.rand(groups, generator=g) < 0.1
    return torch.where(anew, any_method, methods[source, group]), torch.where(anew[:, None], any_x, x)


# Hyperband with a factor of 3: in each bracket, rung by rung, how many recipes see one out of how many examples
BRACKETS = [[(9, 9), (3, 3), (1, 1)], [(5, 3), (1, 1)], [(3, 1)]]


def search(evaluate, groups: int, cfg: "Config", g: torch.Generator, first: list, model=True, cheap=True) -> list:
    """Spends at most budget x full examples, `first` recipes first. [(spent, best full score, its recipe)], rising."""
    seen, curve, spent, first = [], [], 0, list(first)
    for bracket in itertools.cycle(BRACKETS if cheap else [[(1, 1)]]):
        known = seen if model else []  # random search is told no score
        trials = [[0.0, first.pop(0) if first else propose(known, groups, g)] for _ in range(bracket[0][0])]
        seen = seen + trials
        for count, divisor in bracket:
            trials = sorted(trials, key=lambda trial: -trial[0])[:count]
            for trial in trials:
                spent += cfg.full // divisor
                if spent > cfg.budget * cfg.full:
                    return curve
                trial[0] = evaluate(trial[1], cfg.full // divisor)
                if divisor == 1 and (not curve or trial[0] > curve[-1][1]):
                    curve.append((spent, *trial))


# %% settings


@dataclass
class Config:
    groups: int = opt(4, "groups of layers with a recipe of their own, at most 8")
    full: int = opt(1000, "examples of a full evaluation")
    budget: int = opt(60, "what one search may spend, in full evaluations")
    searches: int = opt(6, "repetitions of each search; their mean is judged")
    quick: bool = opt(False, "one search of each kind, --budget 20 and --full 300 at most, no verdict")
    seed: int = opt(0, "seed of nets, data and searches")
    out: str = opt("results/model_merging", "folder of what the run writes")

    def __post_init__(self):
        if not 1 <= self.groups <= 8 or min(self.full, self.budget) < 9 or self.searches < 1:
            raise BadInput("--groups must be 1 to 8, --full and --budget 9 or more, --searches 1 or more")


# %% digits of seven segments, and small nets that read them

ENDS = torch.tensor([int(c) for c in "0222222121200020010002010121"]).view(7, 2, 2)  # of segments a to g: x and y
LIT = "abcdef bc abdeg abcdg bcfg acdfg acdefg abc abcdefg abcdfg".split()
ANSWERS = [torch.arange(10), *(torch.randperm(10, generator=cluster.generator(7, k)) for k in (1, 2, 3))]


def digits(n: int, look: str, answers: int, g: torch.Generator, side: int = 12) -> tuple[Tensor, Tensor]:
    """Pictures (n, side²) of digits that are up, turn(ed by 70 degrees) or dark, and ANSWERS[answers] to them (n,)."""
    y = torch.randint(10, (n,), generator=g)
    a = torch.deg2rad(70.0 * (look == "turn") + 10 * torch.randn(n, generator=g))
    turn = torch.stack([a.cos(), a.sin(), -a.sin(), a.cos()], dim=-1).view(n, 2, 2)
    zoom, shift = 1 + 0.15 * torch.randn(n, 1, 1, generator=g), 0.2 * torch.randn(n, 1, 2, generator=g)
    r = torch.linspace(-1.6, 1.6, side)
    at = torch.stack(torch.meshgrid(r, -r, indexing="xy"), dim=-1).reshape(1, -1, 2)
    at = (at - shift) @ turn.mT * zoom  # each pixel in the digit's own frame, (n, side², 2)
    ink = torch.zeros(n, side * side)
    for (u, v), name in zip((ENDS - 1) * torch.tensor([0.5, 1.0]), "abcdefg", strict=True):
        t = ((at - u) @ (v - u) / (v - u).square().sum()).clamp(0, 1)
        distance = (at - u - t[..., None] * (v - u)).square().sum(dim=-1)
        lit = torch.tensor([name in segments for segments in LIT])[y]
        ink = torch.maximum(ink, lit[:, None] * torch.exp(-distance / 0.25**2))
    x = ink + 0.15 * torch.randn(n, side * side, generator=g)
    return 1 - x if look == "dark" else x, ANSWERS[answers][y]


def net(weights: list[Tensor], x: Tensor) -> Tensor:
    """Residual layers between a first and a last matrix. Returns logits (B, 10)."""
    h = x @ weights[0]
    for weight in weights[1:-1]:
        h = h + F.relu(F.layer_norm(h, h.shape[-1:])) @ weight
    return F.layer_norm(h, h.shape[-1:]) @ weights[-1]


def train(weights, look: str, answers: int, steps: int, lr: float, g: torch.Generator, upper: int = 8) -> list[Tensor]:
    """Adam on the last `upper` matrices, with a learning rate that falls to zero."""
    weights = [weight.clone().requires_grad_() for weight in weights]
    optimizer = torch.optim.Adam(weights[-upper:], lr)
    x, y = digits(8000, look, answers, g)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(y), (128,), generator=g)
        loss = F.cross_entropy(net(weights, x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [weight.detach() for weight in weights]


def family(seed: int) -> tuple[list, list]:
    """The base reads upright digits. Experts 1 to 3 learn to see turned, upright, dark ones, then their answers."""
    g, experts = cluster.generator(seed, 0), []
    sizes = [(144, 64, 1), *[(64, 64, 1)] * 6, (64, 10, 0.1)]  # inputs, outputs, scale of the eight matrices
    start = [torch.randn(i, o, generator=g) / i**0.5 * scale for i, o, scale in sizes]
    base = train(start, "up", 0, 300, 3e-3, cluster.generator(seed, 1))
    for k, look in enumerate(("turn", "up", "dark"), 1):
        sees = base if look == "up" else train(base, look, 0, 300, 1e-3, cluster.generator(seed, 2, k))
        experts.append(train(sees, look, k, 200, 2e-3, cluster.generator(seed, 3, k), upper=4))
    return base, experts


# %% the experiment

ALIKE = {"linear": (linear, 3), "one scale": (task_arithmetic, 1), "a scale each": (task_arithmetic, 3),
         "TIES": (ties, 2)}  # recipes that treat all layers alike: a method, and how many coefficients  # fmt: skip


def compare(evaluate, groups: int, cfg: Config) -> dict[str, list]:
    """{kind of search: its curves}, all with the same budget, and with the three experts alone as first recipes."""
    curves, kinds = {}, {"search": (groups, True, True), "one group": (1, True, True),
                         "all full": (groups, True, False), "random": (groups, False, False)}  # fmt: skip
    for name, (n, model, cheap) in kinds.items():
        alone = [(torch.zeros(n, dtype=torch.long), F.pad(row, (0, 5)).expand(n, 8)) for row in torch.eye(3)]
        draws = [cluster.generator(cfg.seed, 6, k) for k in range(cfg.searches)]
        curves[name] = [search(evaluate, n, cfg, g, alone, model, cheap) for g in draws]
    return curves


def judge(found: dict[str, float]) -> tuple[bool, str]:
    """(the claim holds, its numbers), from held-out accuracies. The bars were fixed before the runs."""
    ours, alike = found["search"], max(found[name] for name in ALIKE)
    shown = ("all full", "one group", "random", *ALIKE)
    beats_searches = ours >= max(found["random"], found["one group"]) + 0.03 and ours >= found["all full"]
    here = f"search {ours:.3f}, best alike for all layers {alike:.3f}, by hand {found['by hand']:.3f}; "
    return beats_searches and ours >= alike + 0.05, here + ", ".join(f"{name} {found[name]:.3f}" for name in shown)


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        if cfg.quick:
            cfg = replace(cfg, searches=1, budget=min(20, cfg.budget), full=min(300, cfg.full))
        run = report.Run(cfg.out, cfg, w)
        base, experts = family(cfg.seed)
        test, valid = (digits(n, "turn", 2, cluster.generator(cfg.seed, k)) for n, k in ((6000, 4), (cfg.full, 5)))
        accuracy = lambda weights, x, y: (net(weights, x).argmax(dim=-1) == y).float().mean().item()
        layers = [torch.stack(layer) for layer in zip(*experts, strict=True)]
        uniform = lambda method, c: [method(b, e, torch.tensor(c)) for b, e in zip(base, layers, strict=True)]
        merged = {"expert 1": experts[0], "expert 2": experts[1], "by hand": experts[0][:4] + experts[1][4:]}
        for name, (method, n) in ALIKE.items():  # 64 recipes each, about as many as a search can evaluate in full
            grid = itertools.product(torch.linspace(0, 1, round(64 ** (1 / n))).tolist(), repeat=n)
            merged[name] = max((uniform(method, c) for c in grid), key=lambda weights: accuracy(weights, *valid))
        found = {name: accuracy(weights, *test) for name, weights in merged.items()}
        evaluate = lambda recipe, n: accuracy(merge(base, layers, recipe), valid[0][:n], valid[1][:n])
        curves = compare(evaluate, cfg.groups, cfg)
        for name, runs in curves.items():
            found[name] = sum(accuracy(merge(base, layers, curve[-1][2]), *test) for curve in runs) / len(runs)
        run.log(**found)
        w.print(report.table(["merge", "held-out accuracy"], list(map(list, found.items()))) + "\n")

        def draw(figure, axis):
            spent = [cfg.full * b for b in range(3, cfg.budget + 1)]
            for name, runs in curves.items():
                best = [[max(score for at, score, _ in curve if at <= n) for curve in runs] for n in spent]
                axis.plot(spent, torch.tensor(best).mean(dim=1), label=name)
            axis.axhline(max(found[k] for k in ALIKE), ls="--", c="gray", label="best alike for all layers (held out)")
            axis.set(xlabel="evaluation examples spent", ylabel="best validation accuracy so far")
            axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

        w.print(report.picture(f"{cfg.out}/model_merging.png", draw))
        if cfg.quick:
            return w.print("quick: no verdict")
        holds, here = judge(found)
        run.claim("a cheap search of merges per layer group beats merges alike for all layers and random search; full "
                  "evaluations are no better", "better than the source models in fewer than 500 steps", here, holds,
                  f"{cfg.groups} groups, {cfg.searches} searches, seed {cfg.seed}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config)
