"""Training density: how many paraphrases of a question a model has seen shows in a kernel density, and in its loss.

Paper    Kirchenbauer, Honke, Somepalli, Geiping, Ippolito, Lee, Goldstein, Andre, "LMD3: Language Model Data Density
         Dependence", arXiv:2405.06331.
Idea     Embed the training texts and a test question, and estimate the training density at the question with a kernel.
         Nobody needs to know which texts are paraphrases of it. They lie near it, and the more, the better the answer.
Here     A small language model learns facts about people. It is fine-tuned twice on equally many texts: once on known
         facts only, once with 0 to 8 paraphrases of each test question in place of some of them. The claim we check:
         the leak raises the density at its question, and the rise predicts the gain in loss. Controls: questions
         without a leak, permuted pairings, random vectors. For comparison: shared words, the true count of paraphrases.
Differs  - A made-up language. A paraphrase changes the frame and the relation's word. No pre-training data's density.
         - The encoder is a mean of word vectors. It was made for this: trained on paraphrases of other facts.
         - Exact kernel sums. The bandwidth was chosen on seeds 100 to 102. The answer's loss stands for accuracy.

    python shorts/density.py                                            # laptop, half a minute
    python shorts/density.py --quick                                    # fewer questions and steps, no verdict

Expect   "rank correlation with support 0.93; density explains 0.42 of the variance of gain" on CPU with seed 0.
Writes   results/density/: metrics.jsonl, claim.json, density.png
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cli, cluster, report
from common.cli import BadInput, opt

# %% the method


def log_density(query: Tensor, data: Tensor, h: float) -> Tensor:
    """log of 1/N sum_i exp(-|q - x_i| / h), (Q,): the kernel density of data (N, C) at query (Q, C), without the
    kernel's own constant. It is summed in the log, or questions far from all data would get minus infinity."""
    distance = torch.cdist(query, data, compute_mode="donot_use_mm_for_euclid_dist")  # (Q, N)
    return (-distance / h).logsumexp(dim=1) - math.log(len(data))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, 0 where one does not vary. Its square, R2: the share of y's variance that a line in x explains."""
    return torch.corrcoef(torch.stack([x, y]).double())[0, 1].nan_to_num().item()


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1. Ties share their mean rank."""
    _, where, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(dim=0) - (count - 1) / 2)[where]


def permutation_p(x: Tensor, y: Tensor, g: torch.Generator, draws: int = 2000) -> float:
    """How often a random pairing of x and y is correlated as much as the given one, itself counted once."""
    x, y = ((z - z.mean()).double() for z in (x, y))
    shuffled = torch.stack([torch.randperm(len(x), generator=g) for _ in range(draws)])
    return (1 + ((x[shuffled] @ y).abs() >= (x @ y).abs()).sum().item()) / (1 + draws)


# %% settings


@dataclass
class Config:
    support: tuple = opt((0, 1, 2, 4, 8), "paraphrases leaked of a question; questions take the levels in turn")
    bandwidth: float = opt(0.15, "h of the density; embeddings have length one")
    questions: int = opt(200, "test questions, one a person")
    replay: int = opt(3000, "texts of known facts in either fine-tuning set")
    pretrain: int = opt(400, "pre-training steps of 96 texts")
    epochs: int = opt(4, "epochs of fine-tuning")
    quick: bool = opt(False, "fixed small sizes (fewer questions and steps), no verdict")
    seed: int = opt(0, "seed of language, leaks and training")
    out: str = opt("results/density", "folder of what the run writes")

    def __post_init__(self):
        rising = sorted({0, *self.support}) == list(self.support) and 0 < self.support[-1] < WORDINGS
        if not rising or self.questions < len(self.support) or self.epochs < 1 or self.bandwidth <= 0:
            raise BadInput(f"--support: from 0 up, below {WORDINGS}; --questions: one each; --epochs, --bandwidth > 0")


# %% the language: a person and a word for a relation in a frame of fillers, and the answer at the end

RELATIONS, SYNONYMS, FRAMES, ANSWERS, FILLERS, LENGTH, WIDTH = 4, 6, 8, 16, 40, 9, 64
WORDINGS = SYNONYMS * FRAMES


class Language:
    def __init__(self, people: int, g: torch.Generator):
        self.relation, self.value = people, people + RELATIONS * SYNONYMS  # the first word of each kind
        self.vocab = self.value + RELATIONS * ANSWERS + FILLERS
        self.frames = self.vocab - 1 - torch.randint(0, FILLERS, (FRAMES, LENGTH), generator=g)
        self.slots = torch.stack([torch.randperm(LENGTH, generator=g)[:2] for _ in range(FRAMES)])
        self.facts = torch.randint(0, ANSWERS, (people, RELATIONS), generator=g)

    def tell(self, person: Tensor, relation: Tensor, wording: Tensor) -> Tensor:
        """Texts (n, LENGTH + 1): a question and, last, its answer. wording (n,) in 0..47 is a frame and a synonym."""
        frame, synonym, row = wording // SYNONYMS, wording % SYNONYMS, torch.arange(len(person))
        text = self.frames[frame].clone()
        text[row, self.slots[frame, 0]] = person
        text[row, self.slots[frame, 1]] = self.relation + relation * SYNONYMS + synonym
        answer = self.value + relation * ANSWERS + self.facts[person, relation]
        return torch.cat([text, answer[:, None]], dim=1)


def paraphrases(wording: Tensor, support: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """For question i asked in wording[i]: support[i] other wordings, no two alike -> (questions, wordings), flat."""
    order = torch.rand(len(wording), WORDINGS, generator=g).scatter(1, wording[:, None], 2).argsort(1)  # its own last
    row = torch.arange(len(wording)).repeat_interleave(support)
    return row, order[row, torch.cat([torch.arange(s) for s in support.tolist()])]


# %% encoder and model


def embed(table: Tensor, text: Tensor) -> Tensor:
    """The mean of the words' vectors, at length one."""
    return F.normalize(table[text].mean(dim=1), dim=1)


class LM(nn.Module):
    def __init__(self, vocab: int):
        super().__init__()
        self.word, self.place = nn.Embedding(vocab, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        nn.init.normal_(self.word.weight, std=0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.out, self.mask = nn.Linear(WIDTH, vocab), nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def forward(self, text: Tensor) -> Tensor:
        return self.out(self.blocks(self.word(text) + self.place, self.mask, is_causal=True))


def descend(parameters, batches: Tensor, loss_of, lr: float) -> None:
    """AdamW with warm-up and linear decay. loss_of(rows) is the loss of one batch."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    for k, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * min(1, (k + 1) / 20) * (1 - k / len(batches))
        optimizer.zero_grad()
        loss_of(rows).backward()
        optimizer.step()


def fit(model: LM, texts: Tensor, epochs: int, lr: float, g: torch.Generator) -> LM:
    """Train the language model on all words of the texts (n, LENGTH + 1), 96 at a time."""
    order = torch.cat([torch.randperm(len(texts), generator=g)[: len(texts) // 96 * 96] for _ in range(epochs)])
    word_loss = lambda x: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    descend(model.parameters(), order.view(-1, 96), lambda rows: word_loss(texts[rows]), lr)
    return model


# %% the experiment


def experiment(cfg: Config, w: cluster.World) -> tuple[Tensor, dict, dict]:
    """Support (Q,), {arm: losses (Q,)}, {encoder: [{arm: log densities (Q,)} per bandwidth]}; arms control and leak."""
    torch.manual_seed(cfg.seed)
    g, people = cluster.generator(cfg.seed), cfg.questions * 3 // 2  # the first ones have a test question each
    draw = lambda n, high: torch.randint(0, high, (n,), generator=g)
    language = Language(people, g)
    asked = draw(people, RELATIONS)  # what a person is asked about: only a leak tells it
    known = torch.cartesian_prod(torch.arange(people), torch.arange(RELATIONS))
    known = known[known[:, 1] != asked[known[:, 0]]]
    texts = lambda facts: language.tell(*facts.T, draw(len(facts), WORDINGS))  # in wordings drawn anew each time
    support, wording = torch.tensor(cfg.support).repeat(cfg.questions)[: cfg.questions], draw(cfg.questions, WORDINGS)
    question = language.tell(torch.arange(cfg.questions), asked[: cfg.questions], wording)
    row, other = paraphrases(wording, support, g)
    strangers = known[known[:, 0] >= cfg.questions]  # in place of the leak, facts about nobody who is asked about
    replay, filler = texts(known[draw(cfg.replay, len(known))]), texts(strangers[draw(len(row), len(strangers))])
    sets = {"control": torch.cat([replay, filler]), "leak": torch.cat([replay, language.tell(row, asked[row], other)])}
    table, losses, densities = nn.Parameter(torch.randn(language.vocab, WIDTH)), {}, {}
    read = lambda facts: embed(table, texts(facts)[:, :-1])  # the encoder reads questions, never answers
    pairs = known[draw(300 * 256, len(known))].view(300, 256, 2)  # a text has to find its paraphrase among 256
    find = lambda facts: F.cross_entropy(read(facts) @ read(facts).T / 0.1, torch.arange(256))
    descend([table], report.progress(pairs, "encoder", w), find, 0.02)
    base = fit(LM(language.vocab), texts(known[draw(96 * cfg.pretrain, len(known))]), 1, 3e-3, g)
    for arm, data in report.progress(sets.items(), "fine-tune", w):
        model = fit(copy.deepcopy(base), data, cfg.epochs, 1e-3, cluster.generator(cfg.seed, 1))
        losses[arm] = F.cross_entropy(model(question[:, :-1])[:, -1], question[:, -1], reduction="none").detach()
    bag = lambda x: F.one_hot(x, language.vocab).amax(1).float()
    rarity = -bag(sets["control"]).mean(0).clamp_min(1e-3).log()
    encoders = {"paraphrase encoder": lambda x: embed(table.detach(), x),
                "shared words": lambda x: F.normalize(bag(x) * rarity, dim=1),
                "random vectors": lambda x: F.normalize(torch.randn(len(x), WIDTH, generator=g), dim=1)}  # fmt: skip
    for name, encode in encoders.items():
        point, cloud = encode(question[:, :-1]), {arm: encode(data[:, :-1]) for arm, data in sets.items()}
        scales = (1,) if name == "paraphrase encoder" else (0.5, 1, 2, 4, 8)  # the others may pick their bandwidth
        densities[name] = [{arm: log_density(point, x, f * cfg.bandwidth) for arm, x in cloud.items()} for f in scales]
    densities["true count"] = [{"control": 0 * support, "leak": (1.0 + support).log()}]
    return support, losses, densities


def assess(densities: list[dict], losses: dict, support: Tensor) -> dict:
    """Rank correlation of the rise with support, R2 of gain and rise, of loss and level, each at its best bandwidth."""
    rises = [d["leak"] - d["control"] for d in densities]
    rank = max(correlation(ranks(x), ranks(support)) for x in rises)
    gain = max(correlation(x, losses["control"] - losses["leak"]) ** 2 for x in rises)
    return {"rank": rank, "gain": gain, "loss": max(correlation(d["leak"], losses["leak"]) ** 2 for d in densities)}


def judge(found: dict, p: float, gains: list[float], rises: list[float]) -> tuple[bool, str]:
    """(the claim holds, its numbers). gains, rises: means of each level of support. Bars fixed before the runs."""
    ours, random = found["paraphrase encoder"], found["random vectors"]
    others = "; ".join(f"{name} {r['gain']:.2f}, {r['loss']:.2f}" for name, r in found.items() if r is not ours)
    here = f"rank correlation with support {ours['rank']:.2f}; density explains {ours['gain']:.2f} of the variance of "
    here += f"gain and {ours['loss']:.2f} of the loss, p {p:.4f} ({others}); mean gain without leak {gains[0]:.2f}, "
    here += f"with {gains[1]:.2f} to {gains[-1]:.2f}"
    rise = ours["rank"] >= 0.9 and abs(rises[0]) <= 0.1 and rises == sorted(rises)
    controls = all(random[k] <= ours[k] / 2 for k in ("gain", "loss")) and abs(gains[0]) <= gains[1] / 2
    return rise and controls and p <= 0.001 and min(ours["gain"], ours["loss"]) >= 0.2, here


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        if cfg.quick:
            cfg = replace(cfg, questions=100, replay=1000, pretrain=150, epochs=2)
        run, g = report.Run(cfg.out, cfg, w), cluster.generator(cfg.seed, 2)
        support, losses, densities = experiment(cfg, w)
        found = {name: assess(d, losses, support) for name, d in densities.items()}
        before, level = densities["paraphrase encoder"][0].values()  # log densities, of control and leak
        loss, rise, gain = losses["leak"], level - before, losses["control"] - losses["leak"]
        p = max(permutation_p(rise, gain, g), permutation_p(level, loss, g))
        p = p if correlation(rise, gain) > 0 > correlation(level, loss) else 1.0  # related, but the wrong way round
        means = [[x[support == k].mean().item() for k in cfg.support] for x in (losses["control"], loss, gain, rise)]
        rows = [[str(k), *row] for k, *row in zip(cfg.support, *means, strict=True)]
        w.print(report.table(["paraphrases", "loss, control", "loss, leak", "gain", "rise of density"], rows) + "\n")
        rows = [[name, *r.values()] for name, r in found.items()]
        w.print(report.table(["density of", "rank with support", "R2 of gain", "R2 of loss"], rows) + "\n")
        run.log(p=p, gains=means[2], rises=means[3], found=found)

        def draw(figure, axes):
            for axis, x, y in zip(axes, (rise, level), (gain, loss), strict=True):
                for k in cfg.support:
                    axis.plot(x[support == k], y[support == k], ".", label=f"{k} paraphrases")
            axes[0].set(xlabel="rise of the log density by the leak", ylabel="gain: fall of the answer's loss (nats)")
            axes[1].set(xlabel="log density after the leak", ylabel="loss of the answer (nats)", yscale="log")
            axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

        w.print(report.picture(f"{cfg.out}/density.png", draw, ncols=2, figsize=(11, 4)))
        if cfg.quick:
            return w.print("quick: no verdict")
        holds, here = judge(found, p, *means[2:])
        run.claim("leaked paraphrases raise the training density at a question, and the rise predicts the gain in loss",
                  "a measurable increase in density, a significant predictor of the performance increase", here, holds,
                  f"support {cfg.support}, {cfg.questions} questions, h {cfg.bandwidth}, seed {cfg.seed}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config)
