"""CAPA: how alike are the mistakes of two models, once the agreement that their accuracies explain is taken off?

Paper    Goel, Strueber, Auzina, Chandra, Kumaraguru, Kiela, Prabhu, Bethge, Geiping, "Great Models Think Alike and this
         Undermines AI Oversight", arXiv:2502.04313.
Idea     Two accurate models agree because both are right. CAPA takes off the agreement of independent models with the
         same two accuracies. It looks at which wrong option each model picks, and it uses their probabilities.
Here     Two claims that we check. (1) Nets with independent mistakes have a CAPA near 0 at every accuracy, where
         agreement and Cohen's kappa climb; nets with opposed mistakes have less than 0. (2) At equal accuracies, a
         student gains more from a less similar supervisor's labels. Control: the supervisor's mistakes, moved to random
         questions. In (2) plain agreement predicts the gain as well as CAPA does.
Differs  - Perceptrons on made ten-way questions. The features that two models read decide how alike they are.
         - A student trained for a short while learns hard labels, without confidence loss. No judges, no trend in size.

    python shorts/model_similarity.py                                   # laptop, 20 s
    python shorts/model_similarity.py --quick                           # fewer pairs and steps, no verdict

Expect   "off by 0.007, r of gain -0.66, with agreement -0.67" on CPU with seed 0.
Writes   results/model_similarity/: metrics.jsonl, claim.json, model_similarity.png
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common import cli, cluster, report
from common.cli import BadInput, opt

# %% the method: p1, p2 (..., N, K) are two models' probabilities of K options on N questions, y (N,) the right options


def capa(p1: Tensor, p2: Tensor, y: Tensor) -> Tensor:
    """kappa_p (...): 0 for independent mistakes, below 0 for opposed ones, 1 only for equal one-hot predictions."""
    K, question = p1.shape[-1], torch.arange(len(y))
    a1 = p1[..., question, y].mean(dim=-1)  # mean probability of the right option: accuracy, if p1 is one-hot
    a2 = p2[..., question, y].mean(dim=-1)
    observed = (p1 * p2).sum(dim=-1).mean(dim=-1)  # the chance that answers drawn from both agree
    expected = a1 * a2 + (1 - a1) * (1 - a2) / (K - 1)  # both right, or both wrong and by chance with the same option
    return (observed - expected) / (1 - expected)  # NaN where neither makes a mistake


# %% what else is in use


def accuracy(p: Tensor, y: Tensor) -> Tensor:
    return (p.argmax(dim=-1) == y).float().mean(dim=-1)


def agreement(p1: Tensor, p2: Tensor, y: Tensor) -> Tensor:
    """The share of questions with the same answer."""
    return accuracy(p1, p2.argmax(dim=-1))


def cohen(p1: Tensor, p2: Tensor, y: Tensor) -> Tensor:
    """Cohen's kappa. Chance: both pick an option as often as they do over all questions, whether right or wrong."""
    share1, share2 = (F.one_hot(p.argmax(dim=-1), p.shape[-1]).float().mean(dim=-2) for p in (p1, p2))
    expected = (share1 * share2).sum(dim=-1)
    return (agreement(p1, p2, y) - expected) / (1 - expected)


def error_consistency(p1: Tensor, p2: Tensor, y: Tensor) -> Tensor:
    """Geirhos et al., arXiv:2006.16736: kappa of right and wrong. Two different wrong answers count as agreement."""
    a1, a2 = accuracy(p1, y), accuracy(p2, y)
    expected = a1 * a2 + (1 - a1) * (1 - a2)
    observed = ((p1.argmax(dim=-1) == y) == (p2.argmax(dim=-1) == y)).float().mean(dim=-1)
    return (observed - expected) / (1 - expected)


METRICS = {"agreement": agreement, "Cohen": cohen, "error consistency": error_consistency, "CAPA": capa}


# %% settings

SIZES = (1, 2, 3, 4, 6, 8, 12)  # features that a model of the first experiment reads
FEATURES, HIDDEN, BATCH = 24, 32, 64  # of a question, given the right option independent; of a model; questions a step


@dataclass
class Config:
    options: int = opt(10, "options K of a question")
    questions: int = opt(4000, "held-out questions on which all is measured")
    steps: int = opt(300, "training steps of a model")
    base_steps: int = opt(20, "training steps of the student before it meets the supervisor")
    lr: float = opt(1e-2, "learning rate of AdamW, falling linearly to zero")
    repeats: int = opt(8, "pairs of models per setting")
    quick: bool = opt(False, "a quarter of the pairs, a third of the steps, no verdict")
    seed: int = opt(0, "seed of all draws")
    out: str = opt("results/model_similarity", "folder of what the run writes")

    def __post_init__(self):
        if self.options < 4 or min(self.repeats, self.steps) < 1:
            raise BadInput("--options must be 4 or more, --repeats and --steps 1 or more")


# %% questions, and a bank of M small models trained side by side: [mask (M, D), W1 (M, D, H), b1, W2 (M, H, K), b2]


def ask(means: Tensor, M: int, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """n questions for each of M models: features (M, n, D) = mean of the right option + noise, right options (M, n)."""
    y = torch.randint(len(means), (M, n), generator=g)
    return means[y] + torch.randn(M, n, means.shape[1], generator=g), y


def fresh(sets: list[Tensor], cfg: Config, g: torch.Generator) -> list[Tensor]:
    """A bank of untrained models; sets[m] holds the indices of the features that model m reads."""
    M, H, K = len(sets), HIDDEN, cfg.options
    mask = torch.stack([torch.zeros(FEATURES).index_fill(0, s, 1.0) for s in sets])
    w1 = torch.randn(M, FEATURES, H, generator=g) / mask.sum(dim=1).sqrt()[:, None, None]
    return [mask, w1, torch.zeros(M, H), torch.randn(M, H, K, generator=g) / H**0.5, torch.zeros(M, K)]


def logits(bank: list[Tensor], x: Tensor) -> Tensor:
    """x (M or 1, n, D) -> (M, n, K)."""
    mask, w1, b1, w2, b2 = bank
    return F.relu((x * mask[:, None]) @ w1 + b1[:, None]) @ w2 + b2[:, None]


def answer(bank: list[Tensor], x: Tensor) -> Tensor:
    """Probabilities of all models on the same questions: x (n, D) -> (M, n, K)."""
    return logits(bank, x[None]).softmax(dim=-1)


def train(bank: list[Tensor], means: Tensor, steps: int, cfg: Config, g: torch.Generator, label=None) -> list[Tensor]:
    """The trained bank. label(x, y) -> (M, n) gives the labels; without it they are the right options."""
    weights = [t.clone().requires_grad_() for t in bank[1:]]
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / steps)
        x, y = ask(means, len(bank[0]), BATCH, g)
        target = label(x, y) if label else y
        loss = F.cross_entropy(logits([bank[0], *weights], x).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        (loss * len(bank[0])).backward()  # a sum over models, so that none feels how many others there are
        optimizer.step()
    return [bank[0], *(t.detach() for t in weights)]


# %% the experiments


def measure(p1: Tensor, p2: Tensor, y: Tensor, sizes: tuple = SIZES) -> list[dict]:
    """All measures of pairs (M, N, K), as means over the pairs of each size."""
    values = {"accuracy": accuracy(p1, y)} | {name: metric(p1, p2, y) for name, metric in METRICS.items()}
    mean = {name: v.view(len(sizes), -1).mean(dim=1).tolist() for name, v in values.items()}
    return [{"features": k} | {name: v[i] for name, v in mean.items()} for i, k in enumerate(sizes)]


def first_experiment(means: Tensor, x: Tensor, y: Tensor, cfg: Config, g: torch.Generator) -> dict[str, list[dict]]:
    """{kind of pair: its measures for each size}. Models that read disjoint features make independent mistakes."""
    orders = [torch.randperm(FEATURES, generator=g) for _ in range(cfg.repeats)]
    near = [order[:k] for k in SIZES for order in orders]
    far = [order[12 : 12 + k] for k in SIZES for order in orders]
    model, twin, stranger = answer(train(fresh(near + near + far, cfg, g), means, cfg.steps, cfg, g), x).chunk(3)
    half, school = cfg.options // 2, torch.arange(2 * cfg.repeats)[:, None] // cfg.repeats
    one_half = lambda x, y: y % half + half * school  # each school answers with options of its own half, and no other
    schools = train(fresh(near[-cfg.repeats :] * 2, cfg, g), means, cfg.steps, cfg, g, one_half)
    return {
        "independent": measure(model, stranger, y),
        "same features": measure(model, twin, y),
        "opposite halves": measure(*answer(schools, x).chunk(2), y, SIZES[-1:]),
    }


def second_experiment(means: Tensor, x: Tensor, y: Tensor, cfg: Config, g: torch.Generator) -> dict[str, Tensor]:
    """Pairs of a supervisor that reads 6 features and a student that reads 12, with 0 to 6 of them in common."""
    orders = [torch.randperm(FEATURES, generator=g) for _ in range(cfg.repeats)]
    weak_sets = [torch.cat([order[:shared], order[12 : 18 - shared]]) for shared in range(7) for order in orders]
    weak = train(fresh(weak_sets, cfg, g), means, cfg.steps, cfg, g)
    base = train(fresh([order[:12] for order in orders] * 7, cfg, g), means, cfg.base_steps, cfg, g)
    supervisor = lambda x, y: logits(weak, x).argmax(dim=-1)

    def moved(x, y):  # the control: as many mistakes, but on random questions and with random options
        wrong = torch.rand(y.shape, generator=g) < (supervisor(x, y) != y).float().mean(dim=1, keepdim=True)
        return torch.where(wrong, (y + torch.randint(1, cfg.options, y.shape, generator=g)) % cfg.options, y)

    banks = {"supervisor": weak, "student before": base}
    for name, label in {"taught": supervisor, "moved": moved, "ceiling": None}.items():
        banks[name] = train(base, means, cfg.steps, cfg, g, label)
    found = {name: accuracy(answer(bank, x), y) for name, bank in banks.items()}
    found |= {"gain": found["taught"] - found["supervisor"], "gain, moved": found["moved"] - found["supervisor"]}
    return {name: metric(answer(weak, x), answer(base, x), y) for name, metric in METRICS.items()} | found


def apart_from(given: list[Tensor], v: Tensor) -> Tensor:
    """What a linear fit of `given` leaves of v: its values at equal accuracies, around 0."""
    X = torch.stack([torch.ones_like(v), *given], dim=1)
    return v - X @ torch.linalg.lstsq(X, v[:, None]).solution[:, 0]


def outer_thirds(v: Tensor, by: Tensor) -> float:
    """Mean of v in the third with the lowest `by`, minus that in the third with the highest."""
    order, third = by.argsort(), len(v) // 3
    return (v[order[:third]].mean() - v[order[-third:]].mean()).item()


def judge(pairs: dict[str, list[dict]], found: dict[str, Tensor]) -> tuple[bool, str]:
    """(both claims hold, their numbers). The bars were fixed before the runs."""
    apart, opposed = pairs["independent"], pairs["opposite halves"][0]["CAPA"]
    off = max(abs(row["CAPA"]) for row in apart)
    rise, kappa = (max(row[k] for row in apart) - min(row[k] for row in apart) for k in ("agreement", "Cohen"))
    equal = {k: apart_from([found["supervisor"], found["student before"]], v) for k, v in found.items()}
    r = {name: F.cosine_similarity(equal[name], equal["gain"], dim=0).item() for name in METRICS}  # partial correlation
    drop, control = (outer_thirds(equal[gain], equal["CAPA"]) for gain in ("gain", "gain, moved"))
    here = f"CAPA off by {off:.3f}, r of gain {r['CAPA']:.2f}, with agreement {r['agreement']:.2f}; "
    here += f"(1) rise {rise:.2f} and {kappa:.2f}, opposed {opposed:.2f}; (2) r of gain with "
    here += ", ".join(f"{k} {v:.2f}" for k, v in r.items()) + f", thirds {drop:+.3f}, mistakes moved {control:+.3f}"
    first = off <= 0.05 and min(rise, kappa) >= 0.3 and opposed < 0
    return first and r["CAPA"] <= -0.5 and drop >= 0.05 and abs(control) <= drop / 3, here


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        if cfg.quick:
            cfg = replace(cfg, repeats=max(1, cfg.repeats // 4), steps=max(1, cfg.steps // 3))
        run, g = report.Run(cfg.out, cfg, w), cluster.generator(cfg.seed)
        means = torch.randn(cfg.options, FEATURES, generator=g)
        x, y = (t[0] for t in ask(means, 1, cfg.questions, g))
        pairs = first_experiment(means, x, y, cfg, g)
        apart, rows = pairs["independent"], [[kind, *row.values()] for kind in pairs for row in pairs[kind]]
        w.print(report.table(["pair", *apart[0]], rows) + "\n")
        found = second_experiment(means, x, y, cfg, g)
        columns = ["CAPA", *list(found)[len(METRICS) :]]
        mean = {name: found[name].view(7, cfg.repeats).mean(dim=1).tolist() for name in columns}
        rows = [[str(shared), *(mean[name][shared] for name in columns)] for shared in range(7)]
        w.print(report.table(["features in common", *columns], rows) + "\n")
        run.log(pairs=pairs, by_features_in_common=mean)

        def draw(figure, axes):
            for name in METRICS:
                axes[0].plot([row["accuracy"] for row in apart], [row[name] for row in apart], "o-", label=name)
            axes[0].set(xlabel="accuracy of both models", ylabel="similarity", title="models with independent mistakes")
            axes[1].plot(found["CAPA"], found["gain"], "o", label="the supervisor's labels")
            axes[1].plot(found["CAPA"], found["gain, moved"], "x", color="grey", label="mistakes moved")
            axes[1].set(xlabel="CAPA of supervisor and student before", ylabel="student's gain over the supervisor")
            axes[0].legend(frameon=False)
            axes[1].legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

        w.print(report.picture(f"{cfg.out}/model_similarity.png", draw, ncols=2, figsize=(10, 4)))
        if cfg.quick:
            return w.print("quick: no verdict")
        holds, here = judge(pairs, found)
        run.claim("(1) CAPA is 0 for independent mistakes at any accuracy; (2) a less similar supervisor teaches more",
                  "CAPA adjusts for accuracy; more different, more gain", here, holds,
                  f"{7 * cfg.repeats} pairs, {cfg.questions} questions, seed {cfg.seed}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config)
