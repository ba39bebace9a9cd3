"""Retrieval gap: a recurrent net forgets what exceeds its state; one attention layer, or a search tool, mends it.

Paper    Wen, Dang, Lyu, "RNNs are not Transformers (Yet): The Key Bottleneck on In-context Retrieval",
         arXiv:2402.18510.
Idea     A recurrent net sees the past through a state of b bits only. When the question comes last, no training and no
         chain of thought brings back what the state has lost. An attention layer looks at the context itself, and so
         does a search tool that the net can call.
Here     Associative recall: n pairs of key and value, then a key; which value? The claim we check: the pairs that a
         recurrent net recalls grow with its state, and end. The smallest net alone fails. It recalls all pairs, above
         the limit of its state, once its upper layer is attention or once it may search. The limit is a theorem for any
         training. The curves are the practice, and lie far below the limit.
Differs  - Associative recall, for the paper's IsTree (is this graph a tree?). A pair is one step: nothing to bind.
         - The state is a d x d matrix with a forget gate, for Mamba's, and is rounded when the question comes.
         - The tool looks up a key, for a regular expression. No chain of thought is trained: the limit covers it.

    python shorts/retrieval_gap.py                                      # laptop, a minute
    python shorts/retrieval_gap.py --quick                              # a tenth of the steps, no verdict

Expect   "[2, 8, 16] pairs at 90%" on CPU with seed 0.
Writes   results/retrieval_gap/: metrics.jsonl, claim.json, retrieval_gap.png
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cli, cluster, report
from common.cli import BadInput, opt

# %% the method: B episodes, T steps, d state width; the state S is a matrix (d, d)


class Layer(nn.Module):
    """What both kinds of layer have. At first a key finds itself (W_q = W_k), and the output is small."""

    def __init__(self, width: int, d: int):
        super().__init__()
        self.norm, self.d = nn.RMSNorm(width), d
        self.q, self.k, self.v = (nn.Linear(width, d, bias=False) for _ in range(3))
        self.o = nn.Linear(d, width, bias=False)
        self.q.weight.data.copy_(self.k.weight.data)
        self.o.weight.data.mul_(0.4)


class Recurrence(Layer):
    """S_t = a_t S_{t-1} + k_t v_t^T, read as q_t S_t: whatever the layer keeps of the past is in S. All steps at once:
    o_t = (a_1..a_t) q_t S_0 + sum over s <= t of (a_{s+1}..a_t) (q_t . k_s) v_s."""

    def __init__(self, width: int, d: int):
        super().__init__(width, d)
        self.gate = nn.Linear(width, 1)
        nn.init.constant_(self.gate.bias, 4.0)  # a_t = sigmoid(gate): forget little at first

    def forward(self, x: Tensor, S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n = self.norm(x)
        q = F.normalize(self.q(n), dim=-1) * self.d**0.5
        k, v = F.normalize(self.k(n), dim=-1), self.v(n)
        log_a = F.logsigmoid(self.gate(n)).squeeze(-1).cumsum(dim=-1)  # (B, T): log of a_1..a_t
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        decay = (log_a[:, :, None] - log_a[:, None, :]).masked_fill(future, -math.inf).exp()  # (B, T, T)
        S = x.new_zeros(1, self.d, self.d) if S is None else S
        o = (q @ k.mT * decay) @ v + log_a.exp()[..., None] * (q @ S)
        S = (k * decay[:, -1, :, None]).mT @ v + log_a[:, -1, None, None].exp() * S  # (B, d, d)
        return x + self.o(o), S


class Attention(Layer):
    """The same matrices, but each step reads the context itself: the memory is all keys and values so far."""

    def __init__(self, width: int, d: int):
        super().__init__(width, d)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n = self.norm(x)
        new = torch.stack([F.normalize(self.k(n), dim=-1), self.v(n)], dim=2)  # (B, T, 2, d)
        memory = new if memory is None else torch.cat([memory, new], dim=1)
        q, (k, v) = F.normalize(self.q(n), dim=-1), memory.unbind(2)
        seen = torch.ones(x.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - x.shape[1])
        o = F.scaled_dot_product_attention(q * self.log_scale.exp(), k, v, attn_mask=seen, scale=1.0)
        return x + self.o(o), memory


def round_state(S: Tensor, bits: int) -> Tensor:
    """S squashed to (-1, 1) and rounded to 2^bits levels. Gradients pass as if it were not rounded."""
    x, half = S.tanh(), 2**bits / 2
    level = ((x * half).floor().clamp(-half, half - 1) + 0.5) / half
    return x + (level - x).detach()


def recall_limit(bits: int, pairs: int, values: int) -> float:
    """The best accuracy, for any net, at recalling one of `pairs` independent uniform values from `bits` bits. Fano:
    right with probability p takes log2(values) - H2(p) - (1 - p) log2(values - 1) bits about each value."""
    low, high = 1 / values, 1.0
    for _ in range(50):
        p = (low + high) / 2
        carried = math.log2(values) + p * math.log2(p) + (1 - p) * math.log2((1 - p) / (values - 1))
        low, high = (p, high) if carried * pairs < bits else (low, p)
    return high


# %% settings, the task and the net. Tokens: keys, values, and one blank

KEYS, VALUES, BLANK, WIDTH, BATCH = 128, 16, 144, 64, 32  # different keys and values, the id of none, width, episodes


@dataclass
class Config:
    widths: tuple = opt((8, 16, 32), "d of the recurrent nets, rising; a layer's state is d x d numbers")
    bits: int = opt(1, "bits per number of the state when the question comes")
    pairs: tuple = opt((2, 4, 8, 16, 32, 64), "pairs per episode, in training and in the test, rising")
    steps: int = opt(400, "optimizer steps of each net")
    lr: tuple = opt((1e-2, 3e-3), "peak lr of AdamW, recurrent and with attention, chosen among 3e-3, 1e-2, 3e-2")
    quick: bool = opt(False, "a tenth of the steps, no verdict")
    seed: int = opt(0, "seed of the weights and the episodes")
    out: str = opt("results/retrieval_gap", "folder of what the run writes")

    def __post_init__(self):
        rising = all(list(sizes) == sorted(set(sizes)) for sizes in (self.widths, self.pairs))
        if not rising or max(self.pairs) > KEYS or min(self.bits, *self.pairs, *self.widths) < 1 or len(self.lr) != 2:
            raise BadInput(f"--pairs (1 to {KEYS}) and --widths (from 1) must rise, --bits 1 or more, --lr two rates")


def episodes(count: int, pairs: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """context (count, pairs, 2), keys distinct; questions (count, 8, 1, 2), a key and a blank; answers (count, 8)."""
    keys = torch.rand(count, KEYS, generator=g).argsort(dim=1)[:, :pairs]
    values = torch.randint(VALUES, (count, pairs), generator=g) + KEYS
    picked = torch.randint(pairs, (count, 8), generator=g)
    key, blank = keys.gather(1, picked), torch.full_like(picked, BLANK)
    return torch.stack([keys, values], dim=2), torch.stack([key, blank], dim=-1)[:, :, None], values.gather(1, picked)


class Net(nn.Module):
    """A recurrent layer, then a second one or attention."""

    def __init__(self, cfg: Config, d: int, upper: type):
        super().__init__()
        self.bits, C = cfg.bits, WIDTH
        self.embed = nn.Embedding(BLANK + 1, C // 2)
        self.layers = nn.ModuleList([Recurrence(C, d), upper(C, d)])
        self.head = nn.Sequential(nn.RMSNorm(C), nn.Linear(C, 2 * C), nn.ReLU(), nn.Linear(2 * C, BLANK))

    def forward(self, context: Tensor, asked: Tensor) -> Tensor:
        """context (B, n, 2), asked (B, m, L, 2): m questions of L steps each -> logits (B, m, L, keys + values)."""
        m = asked.shape[1]
        x, y = self.embed(context).flatten(-2), self.embed(asked.flatten(0, 1)).flatten(-2)
        for layer in self.layers:
            x, memory = layer(x)
            if isinstance(layer, Recurrence):
                memory = round_state(memory, self.bits)  # all that a question gets to see
            y, _ = layer(y, memory.repeat_interleave(m, dim=0))
        return self.head(y).unflatten(0, (-1, m))


def retrieve(context: Tensor, key: Tensor) -> Tensor:
    """The search tool: the pair of the context that has this key, or (key, blank): (B, m) -> (B, m, 1, 2)."""
    hit = context[:, None, :, 0] == key[..., None]  # (B, m, n)
    value = torch.where(hit, context[:, None, :, 1], -1).amax(dim=-1)
    return torch.stack([key, torch.where(value < 0, BLANK, value)], dim=-1)[:, :, None]


# %% the experiment


def train(cfg: Config, d: int, upper: type, search: bool, bar) -> Net:
    """A net trained on episodes of every length in cfg.pairs."""
    torch.manual_seed(cfg.seed)
    g, net = cluster.generator(cfg.seed, 1), Net(cfg, d, upper)
    optimizer, lr = torch.optim.AdamW(net.parameters()), cfg.lr[upper is Attention]
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        n = cfg.pairs[int(torch.randint(len(cfg.pairs), (), generator=g))]
        context, asked, value = episodes(BATCH, n, g)
        key, target = asked[:, :, 0, 0], value[..., None]
        if search:  # name the key, then read the pair that the tool finds
            asked = torch.cat([asked, retrieve(context, key)], dim=2)
            target = torch.stack([key, value], dim=-1)
        loss = F.cross_entropy(net(context, asked).flatten(0, 2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def accuracy(cfg: Config, net: Net, search: bool) -> list[float]:
    """The share of 2048 questions answered rightly, for each number of pairs."""
    right = []
    for n in cfg.pairs:
        context, asked, value = episodes(256, n, cluster.generator(cfg.seed, 2, n))
        if search:  # the net names a key, and reads what the tool finds
            wanted = net(context, asked)[:, :, -1].argmax(dim=-1)
            asked = torch.cat([asked, retrieve(context, wanted)], dim=2)
        right.append((net(context, asked)[:, :, -1].argmax(dim=-1) == value).float().mean().item())
    return right


def judge(cfg: Config, curves: dict[str, list], limits: dict[str, list]) -> tuple[bool, str]:
    """(the claim holds, its numbers). limits: of the recurrent nets, smallest first. Bars fixed before the runs."""
    recurrent, limit = [curves[name] for name in limits], list(limits.values())[0][-1]
    attention, search = (curves[name][-1] for name in ("attention", "search"))
    recalled = [max((n for n, a in zip(cfg.pairs, c, strict=True) if a >= 0.9), default=0) for c in recurrent]
    ends = recalled == sorted(set(recalled)) and recurrent[-1][-1] < 0.9
    below = all(a <= b + 0.02 for name in limits for a, b in zip(curves[name], limits[name], strict=True))
    here = f"{cfg.pairs[-1]} pairs: recurrent {recurrent[0][-1]:.2f} (limit {limit:.2f}), attention {attention:.3f}, "
    here += f"search {search:.3f}; {recalled} pairs at 90% for d = {list(cfg.widths)}"
    return ends and below and min(attention, search) >= 0.95 and min(attention, search) > limit, here


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        if cfg.quick:
            cfg = replace(cfg, steps=cfg.steps // 10 + 1)
        run, curves, limits, rows = report.Run(cfg.out, cfg, w), {}, {}, []
        nets = {f"recurrent, d = {d}": (d, Recurrence, False) for d in cfg.widths}
        nets |= {"attention": (cfg.widths[0], Attention, False), "search": (cfg.widths[0], Recurrence, True)}
        for name, (d, upper, search) in nets.items():
            net = train(cfg, d, upper, search, report.progress(range(cfg.steps), name, w))
            bits, size = cfg.bits * d * d * (1 + (upper is Recurrence)), sum(p.numel() for p in net.parameters())
            curves[name] = accuracy(cfg, net, search)
            rows.append([name, size, bits, *curves[name]])
            if name.startswith("recurrent"):
                limits[name] = [recall_limit(bits, n, VALUES) for n in cfg.pairs]
                rows.append(["  its limit", "", "", *limits[name]])
            run.log(net=name, parameters=size, state_bits=bits, accuracy=curves[name], limit=limits.get(name))
        w.print(report.table(["accuracy at pairs", "parameters", "state bits", *map(str, cfg.pairs)], rows) + "\n")

        def draw(figure, axis):
            for name, curve in curves.items():
                (line,) = axis.plot(cfg.pairs, curve, "o-" if name in limits else "s--", label=name)
                axis.plot(cfg.pairs, limits.get(name, curve), ":", color=line.get_color())
            axis.set(xlabel="pairs in the context", ylabel="accuracy (dotted: the limit for any training)")
            axis.semilogx(base=2)
            axis.legend(frameon=False)

        w.print(report.picture(f"{cfg.out}/retrieval_gap.png", draw, figsize=(6.5, 4.2)))
        if cfg.quick:
            return w.print("quick: no verdict")
        holds, here = judge(cfg, curves, limits)
        run.claim("recall ends with the state of a recurrent net; attention, or search, at the smallest state mends it",
                  "proved for o(n) bits; one Transformer layer, or retrieval, is enough", here, holds,
                  f"{cfg.bits} bit, {VALUES} values, {cfg.steps} steps, seed {cfg.seed}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config)
