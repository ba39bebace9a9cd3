"""NEFTune: noise on the embeddings during fine-tuning makes a model overfit a small instruction set less.

Paper    Jain, Chiang, Wen, Kirchenbauer, Chu, Somepalli, Bartoldson, Kailkhura, Schwarzschild, Saha, Goldblum, Geiping,
         Goldstein, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", ICLR 2024, arXiv:2310.05914.
Idea     While fine-tuning, and only then, add uniform noise to the embeddings of the input. Its length is about
         alpha / sqrt(3), whatever the length of the sequence and the width of the model. Nothing else changes.
Here     A small model is pre-trained on Python's documentation, then fine-tuned on 128 instructions: a function's
         signature, and as the reply the first paragraph of its docstring. The claim we check: after a fixed number of
         epochs, noise has made the training loss higher, the test loss lower, and replies to training prompts less like
         the training replies. Control: plain fine-tuning. For comparison: dropout, and every arm stopped early.
Differs  - A model of 0.2 M parameters for 7 B, tiny data, and a long training at a rate where the plain arm overfits.
         - L is the length of a sequence without its padding. The released code takes the padded length.
         - ROUGE-L compares tokens, most of them single characters.
         - Nobody judges the replies, so the paper's headline, the gain in AlpacaEval, is not checked.

    python shorts/neftune.py                                            # laptop, about a minute
    python shorts/neftune.py --quick                                    # less training, no verdict

Expect   In the table, alpha 15 has a lower "test loss" than plain and a higher "training loss", on CPU with seed 0.
Writes   results/neftune/: metrics.jsonl, claim.json, neftune.png
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cli, cluster, report, text
from common.cli import BadInput, opt

# %% the method


def noisy(x: Tensor, length: Tensor, alpha: float) -> Tensor:
    """Embeddings x (B, T, d) plus uniform noise on (-1, 1) times alpha / sqrt(L d).

    L is the length (B,) of each sequence without its padding. The noise on L tokens has L d numbers of variance 1/3, so
    the expected square of its length is alpha^2 / 3.
    """
    noise = 2 * torch.rand_like(x) - 1
    scale = alpha / (length * x.shape[-1]).sqrt()  # (B,)
    return x + scale[:, None, None] * noise


def rouge_l(reply: list, reference: list) -> float:
    """Twice the length of the longest common subsequence, over the sum of both lengths: 1 for a copy."""
    row = [0] * (len(reference) + 1)  # row[j]: longest for the tokens of reply so far and the first j of reference
    for token in reply:
        before, row = row, [0]
        for j, other in enumerate(reference):
            row.append(before[j] + 1 if token == other else max(before[j + 1], row[j]))
    return 2 * row[-1] / max(1, len(reply) + len(reference))


# %% settings


@dataclass
class Config:
    alpha: tuple = opt((5.0, 15.0), "strengths of the noise; the largest is judged")
    dropout: float = opt(0.1, "dropout of the comparison")
    pairs: int = opt(128, "instructions to fine-tune on")
    epochs: int = opt(16, "epochs of fine-tuning")
    lr: float = opt(3e-3, "learning rate of pre-training and fine-tuning")
    pretrain: int = opt(250, "pre-training steps of 32 windows")
    quick: bool = opt(False, "fixed small sizes (less training, one alpha), no verdict")
    seed: int = opt(0, "seed of the split, the start, the batches and the noise")
    out: str = opt("results/neftune", "folder of what the run writes")

    def __post_init__(self):
        if self.pairs < 32 or self.epochs < 1 or min(self.alpha) <= 0 or not 0 <= self.dropout < 1:
            raise BadInput("--pairs must be 32 or more, --epochs 1 or more, --alpha positive, --dropout in [0, 1)")


# %% data: (signature, first paragraph of the docstring) of the functions of Python's own library

PAIR = re.compile(r'def (\w+)\(([^()]*)\)[^\n]*:\n\s+r?"""([^"]+?)(?:\n\s*\n|""")')
PROMPT, REPLY, HELD = 20, 32, 150  # most tokens of a prompt and of a reply; pairs for validation; twice as many test
LENGTH = PROMPT + REPLY + 2


def find_pairs(sources: str) -> list[tuple[str, str]]:
    """(prompt, reply), each reply once, white space joined."""
    join = lambda words: " ".join(words.replace("_", " ").split())
    found = PAIR.findall(sources)
    prompts = {" ".join(doc.split()): f"{join(name)} ({join(arguments)})" for name, arguments, doc in found}
    return [(prompt, reply) for reply, prompt in prompts.items()]


def pack(pairs: list[tuple[list, list]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows "prompt 0 reply 0" -> ids (n, T), length (n,), weight (n, T - 1): 1 where the reply or its end is next."""
    rows = [torch.tensor([*prompt, 0, *reply, 0]) for prompt, reply in pairs]
    weights = [torch.tensor([0.0] * len(prompt) + [1.0] * (len(reply) + 1)) for prompt, reply in pairs]
    length, pad = torch.tensor([len(row) for row in rows]), nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), length, pad(weights, batch_first=True)


def load(cfg: Config) -> tuple[Tensor, int, list[tuple[list, list]]]:
    """Token ids of the text to pre-train on, the vocabulary's size, and tokenized (prompt, reply) pairs.

    Half of the pairs go into the text, one after another: the model learns their style there, and not the task."""
    found = find_pairs(text.corpus("sources"))
    order = torch.randperm(len(found), generator=cluster.generator(cfg.seed)).tolist()
    style, task = ([found[i] for i in half] for half in (order[: len(found) // 2], order[len(found) // 2 :]))
    plain = text.corpus("docs") + "\n".join(f"{prompt} {reply}" for prompt, reply in style)
    tokens = text.Tokenizer(plain, 1024)
    pairs = [tuple(tokens.encode(part).tolist() for part in pair) for pair in task]
    pairs = [(prompt, reply) for prompt, reply in pairs if len(prompt) <= PROMPT and 4 <= len(reply) <= REPLY]
    if len(pairs) < cfg.pairs + 3 * HELD:
        raise BadInput(f"--pairs {cfg.pairs} is too many: this Python's library allows {len(pairs) - 3 * HELD}")
    return tokens.encode(plain), len(tokens.pieces), pairs


# %% model and training


class LM(nn.Module):
    def __init__(self, vocab: int, width: int = 64):
        super().__init__()
        self.word, self.place = nn.Embedding(vocab, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        nn.init.normal_(self.word.weight, std=0.3)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out, self.mask = nn.Linear(width, vocab), nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def forward(self, ids: Tensor, length: Tensor | None = None, alpha: float = 0.0) -> Tensor:  # (B, T) -> (B, T, V)
        x, T = self.word(ids), ids.shape[1]
        x = noisy(x, length, alpha) if alpha else x
        return self.out(self.blocks(x + self.place[:T], self.mask[:T, :T], is_causal=True))


def reply_loss(model: LM, data: tuple, rows: Tensor | slice = slice(None), alpha: float = 0.0) -> Tensor:
    """Mean -log p over the tokens of the replies and their ends."""
    ids, length, weight = (x[rows] for x in data)
    logits = model(ids[:, :-1], length, alpha)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weight)
    return (loss * weight).sum() / weight.sum()


def descend(model: LM, batches: Tensor, loss_of: Callable, lr: float) -> Iterator[int]:
    """AdamW without weight decay, warm-up, linear decay of the rate. Yields the number of steps taken, after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    for k, batch in enumerate(batches, 1):
        optimizer.param_groups[0]["lr"] = lr * min(1, k / 10) * (1 - (k - 1) / len(batches))
        model.train()
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
        yield k


@torch.no_grad()
def answer(model: LM, prompts: list[list]) -> list[list]:
    """Greedy replies, up to their end or REPLY tokens. Padding follows the text, so a causal model never reads it."""
    ids = torch.tensor([prompt + [0] * (LENGTH - len(prompt)) for prompt in prompts])
    row = torch.arange(len(prompts))
    last = torch.tensor([len(prompt) for prompt in prompts])  # the place of the newest token: the 0 after the prompt
    for _ in range(REPLY):
        token = model(ids[:, : last.max() + 1])[row, last].argmax(dim=-1)
        last = last + 1
        ids[row, last] = token
    said = [ids[i, len(prompt) + 1 : len(prompt) + 1 + REPLY].tolist() for i, prompt in enumerate(prompts)]
    return [reply[: reply.index(0)] if 0 in reply else reply for reply in said]


# %% the experiment


def fine_tune(base: LM, cfg: Config, pairs: list, alpha: float, dropout: float) -> dict:
    """Train a copy of base. Losses are without noise; "stopped" is the epoch of the lowest validation loss."""
    n, steps = cfg.pairs, cfg.pairs // 32  # steps an epoch
    train, validation, test = pack(pairs[:n]), pack(pairs[n : n + HELD]), pack(pairs[n + HELD : n + 3 * HELD])
    model, curve, g = copy.deepcopy(base), [], cluster.generator(cfg.seed, 2)  # every arm has the same batches
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    torch.manual_seed(cfg.seed)  # of noise and dropout
    order = torch.cat([torch.randperm(n, generator=g)[: steps * 32].view(steps, 32) for _ in range(cfg.epochs)])
    for k in descend(model, order, lambda rows: reply_loss(model, train, rows, alpha), cfg.lr):
        if k % (4 * steps) == 0 or k == len(order):
            model.eval()
            with torch.no_grad():
                curve.append((k // steps, *(reply_loss(model, data).item() for data in (train, validation, test))))
    replies = answer(model, [prompt for prompt, _ in pairs[:n]])
    shared = [rouge_l(said, reply) for said, (_, reply) in zip(replies, pairs, strict=False)]
    early = min(curve, key=lambda point: point[2])
    return {"training loss": curve[-1][1], "test loss": curve[-1][3], "ROUGE-L": sum(shared) / n,
            "tokens a reply": sum(map(len, replies)) / n, "stopped": early[0], "test loss there": early[3],
            "curve": curve}  # fmt: skip


def experiment(cfg: Config, w: cluster.World) -> dict[str, dict]:
    """Pre-train once, then fine-tune every arm from there: arm -> result of fine_tune."""
    stream, vocab, pairs = load(cfg)
    torch.manual_seed(cfg.seed)
    base, g = LM(vocab), cluster.generator(cfg.seed, 1)
    windows = torch.randint(0, len(stream) - LENGTH, (cfg.pretrain, 32, 1), generator=g) + torch.arange(LENGTH)
    token_loss = lambda x: F.cross_entropy(base(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    list(report.progress(descend(base, windows, lambda at: token_loss(stream[at]), cfg.lr), "pre-train", w))
    arms = {"plain": (0.0, 0.0)} | {f"alpha {a:g}": (a, 0.0) for a in cfg.alpha} | {"dropout": (0.0, cfg.dropout)}
    return {arm: fine_tune(base, cfg, pairs, *how) for arm, how in report.progress(arms.items(), "fine-tune", w)}


def judge(plain: dict, noise: dict) -> bool:
    """At the last epoch: training loss higher by 0.1, test loss lower by 0.02, less of the training replies copied."""
    higher = noise["training loss"] >= plain["training loss"] + 0.1
    return higher and noise["test loss"] <= plain["test loss"] - 0.02 and noise["ROUGE-L"] < plain["ROUGE-L"]


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        if cfg.quick:
            cfg = replace(cfg, pretrain=40, epochs=8, pairs=32, alpha=(max(cfg.alpha),))
        run = report.Run(cfg.out, cfg, w)
        results = experiment(cfg, w)
        for arm, r in results.items():
            run.log(arm=arm, **r)
        plain, noise = results["plain"], results[f"alpha {max(cfg.alpha):g}"]
        rows = [[arm, *list(r.values())[:-1]] for arm, r in results.items()]  # all but the curve
        w.print(report.table(["fine-tuning", *list(plain)[:-1]], rows) + "\n")

        def draw(figure, axes):
            for axis, column, name in zip(axes, (1, 3), ("training", "test"), strict=True):
                for arm, r in results.items():
                    axis.plot([c[0] for c in r["curve"]], [c[column] for c in r["curve"]], "o-", label=arm)
                axis.set(xlabel="epoch of fine-tuning", ylabel=f"{name} loss of a reply's token (nats, noise off)")
            axes[0].legend(frameon=False)

        w.print(report.picture(f"{cfg.out}/neftune.png", draw, ncols=2, figsize=(11, 4)))
        if cfg.quick:
            return w.print("quick: no verdict")
        run.claim(
            "in a fixed, long fine-tuning, noise on the embeddings: training loss higher by 0.1 or more, test loss "
            "lower by 0.02 or more, ROUGE-L to training replies lower",
            "training loss higher, test loss slightly lower, ROUGE-L and BLEU to training replies lower",
            f"test loss {noise['test loss']:.3f}, plain {plain['test loss']:.3f}, plain stopped early "
            + f"{plain['test loss there']:.3f}; "
            + "; ".join(f"{k} {noise[k]:.3f}, {plain[k]:.3f}" for k in ("training loss", "ROUGE-L")),
            judge(plain, noise),
            f"alpha {max(cfg.alpha):g}, {cfg.pairs} pairs, {cfg.epochs} epochs, lr {cfg.lr}, seed {cfg.seed}, CPU",
        )


if __name__ == "__main__":
    cli.run(main, Config)
