"""Reconstruction: training images rebuilt from trained weights, and how far such pictures can be trusted.

Paper    Runkel, Gandikota, Geiping, Schoenlieb, Moeller, "Training Data Reconstruction: Privacy due to Uncertainty?",
         arXiv:2412.08544.
Idea     Look for images x on which training would end in the given weights theta*: minimise the distance of theta(x) to
         theta*, where theta(x) solves the training problem on x (a bilevel problem). What comes out depends on where
         the search for x starts: many sets of images, not only the true one, train to the same weights.
Here     The claim we check, on an affine classifier of the ten digits, drawn here. With 9 training images, fewer than
         classes, a search from noise finds every one. Control: on a net that never saw them, it finds none. With 40
         images, searches from noise and from other digits end in sets that train to the same weights and hold no
         training image, so the weights alone single out no image. Each search has three starts, and keeps the end of
         lowest objective, which an attacker sees.
Differs  - Digits of 8 x 8 pixels drawn here, for natural images. Their labels are known to the search.
         - The affine network only. The paper's other case, one hidden layer, is less clean: there the searches from
           noise that we tried ended in local minima, so the objective tells something about the start.
         - Weight decay makes the training problem strictly convex. So theta(x) = theta* exactly where the training
           gradient at theta* is zero: that gradient is minimised, and training anew checks it.
         - The number of images as the dividing line is our reading (see training_gradient).

    python shorts/reconstruction.py                                     # laptop, a minute and a half
    python shorts/reconstruction.py --quick                             # one start and fewer steps, no verdict

Expect   "9 images: 100% found, many: 0% from noise" on CPU with seed 0.
Writes   results/reconstruction/: metrics.jsonl, claim.json, reconstruction.png
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common import cli, cluster, report
from common.cli import BadInput, opt

# %% the method: n images of D pixels, C classes; theta is (C, D + 1), the last column the bias


def affine(theta: Tensor, x: Tensor) -> Tensor:
    """Logits (n, C)."""
    return x @ theta[:, :-1].T + theta[:, -1]


def training_loss(theta: Tensor, x: Tensor, y: Tensor, decay: float) -> Tensor:
    """The lower level: cross-entropy of an affine classifier, plus decay / 2 |theta|^2. x (n, D), y (n) labels."""
    return F.cross_entropy(affine(theta, x), y) + decay / 2 * theta.square().sum()


def training_gradient(theta: Tensor, x: Tensor, y: Tensor, decay: float) -> Tensor:
    """d training_loss / d theta, (C, D + 1), written out: one term per image, (p - onehot(y)) times (x, 1).

    Each (p - onehot(y)) sums to 0, so they span at most C - 1 directions. With more images than that, many sets of
    images have the same sum, and the weights cannot tell them apart."""
    residual = (affine(theta, x).softmax(dim=-1) - F.one_hot(y, len(theta))) / len(x)  # (n, C)
    return residual.T @ F.pad(x, (0, 1), value=1.0) + decay * theta


def minimise(objective, start: Tensor, steps: int) -> Tensor:
    """The minimiser that L-BFGS reaches from `start`."""
    z = start.clone().requires_grad_()
    how = {"max_eval": 10 * steps, "tolerance_grad": 1e-12, "tolerance_change": 0.0, "history_size": 50}
    optimizer = torch.optim.LBFGS([z], max_iter=steps, line_search_fn="strong_wolfe", **how)

    def closure():
        optimizer.zero_grad()
        loss = objective(z)
        loss.backward()
        return loss

    optimizer.step(closure)
    return z.detach()


def train(x: Tensor, y: Tensor, classes: int, decay: float) -> Tensor:
    """theta(x): the one minimiser of the lower level, from zero."""
    start = x.new_zeros(classes, x.shape[1] + 1)
    return minimise(lambda theta: training_loss(theta, x, y, decay), start, 2000)


def reconstruct(theta: Tensor, y: Tensor, decay: float, starts: Tensor, steps: int) -> Tensor:
    """Images x (n, D) that make theta a solution of the lower level, pixels kept in [0, 1]. The search runs from each
    of the starts (R, n, D), and the end of lowest objective is returned."""
    scale = (decay * theta).square().sum()

    def upper_level(x):
        outside = (x - 1).relu().square().sum() + (-x).relu().square().sum()
        return training_gradient(theta, x, y, decay).square().sum() / scale + outside

    ends = [minimise(upper_level, start, steps) for start in starts]
    return min(ends, key=lambda x: upper_level(x).item())


# %% settings


@dataclass
class Config:
    images: tuple = opt((5, 9, 20, 40), "sizes of the training set, rising; one is classes - 1")
    classes: int = opt(10, "digits 0 to classes - 1")
    side: int = opt(8, "pixels along an image")
    decay: float = opt(0.01, "weight decay of the trained classifier")
    noise: float = opt(0.2, "noise on the training images for the start near the truth")
    starts: int = opt(3, "starts of each search, of which the one with the lowest objective counts")
    steps: int = opt(400, "L-BFGS steps from each start")
    quick: bool = opt(False, "one start, two sizes, a quarter of the steps, no verdict")
    seed: int = opt(0, "seed of the images and the starts")
    out: str = opt("results/reconstruction", "folder of what the run writes")

    def __post_init__(self):
        if not 2 <= self.classes <= 10 or min(self.starts, self.steps) < 1 or self.decay <= 0:
            raise BadInput("--classes must be 2 to 10, --starts and --steps 1 or more, and --decay positive")
        if self.classes - 1 not in self.images or self.images[-1] < 2 * self.classes:
            raise BadInput(f"--images needs {self.classes - 1} (classes - 1), and at the end 2 x --classes or more")
        if self.images[0] < 1 or list(self.images) != sorted(set(self.images)):
            raise BadInput("--images must rise, from 1 or more, each size once")


# %% the images: seven-segment digits, drawn by a shaky hand

STROKES = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")  # of each digit
LEFT, RIGHT, TOP, MIDDLE, BOTTOM = -0.2, 0.2, -0.35, 0.0, 0.35
ENDS = {
    "a": (LEFT, TOP, RIGHT, TOP),
    "b": (RIGHT, TOP, RIGHT, MIDDLE),
    "c": (RIGHT, MIDDLE, RIGHT, BOTTOM),
    "d": (LEFT, BOTTOM, RIGHT, BOTTOM),
    "e": (LEFT, MIDDLE, LEFT, BOTTOM),
    "f": (LEFT, TOP, LEFT, MIDDLE),
    "g": (LEFT, MIDDLE, RIGHT, MIDDLE),
}  # the two end points (x, y) of each stroke


def digit(label: int, side: int, g: torch.Generator) -> Tensor:
    """One image (side * side) in [0, 1], with its own slant, shift, size, thickness and crooked strokes."""
    u = torch.rand(5, generator=g, dtype=torch.float64)
    slant, shift, size, thick = u[0] / 2 - 0.25, u[1:3] / 5 - 0.1, 0.8 + 0.3 * u[3], 0.05 + 0.04 * u[4]
    line = torch.linspace(-0.5, 0.5, side + 1, dtype=torch.float64)[:-1] + 0.5 / side
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # (side, side, 2)
    image = torch.zeros(side, side, dtype=torch.float64)
    for stroke in STROKES[label]:
        x, y = torch.tensor(ENDS[stroke], dtype=torch.float64).view(2, 2).T
        ends = torch.stack([x - slant * y, y], dim=1) * size + shift
        a, b = ends + 0.06 * torch.rand(2, 2, generator=g, dtype=torch.float64) - 0.03
        along = ((pixels - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
        distance = (pixels - a - along[..., None] * (b - a)).norm(dim=-1)
        image = image.maximum(((thick - distance) / 0.02).sigmoid())
    return image.flatten()


def digits(cfg: Config, y: Tensor, stream: int) -> Tensor:
    """Images (n, D) of the labels y; another stream is another sample of the same distribution."""
    g = cluster.generator(cfg.seed, stream)
    return torch.stack([digit(int(label), cfg.side, g) for label in y])


# %% the experiment

COLUMNS = ("weights off by", "recovered", "distance to training", "to fresh digits")


def nearest(found: Tensor, known: Tensor) -> Tensor:
    """Distance of each found image to the nearest known one, (n)."""
    return torch.cdist(found, known).amin(dim=1)


def experiment(cfg: Config, n: int) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """With n training images: {search: its numbers} and {search: the images that it found}."""
    y, g = torch.arange(n) % cfg.classes, cluster.generator(cfg.seed, 4)
    x, fresh = digits(cfg, y, 1), digits(cfg, y, 3)
    others = torch.stack([digits(cfg, y, 2 if r == 0 else 10 + r) for r in range(cfg.starts)])  # (R, n, D)
    noise = torch.rand(others.shape, generator=g, dtype=x.dtype)
    near = (x + cfg.noise * torch.randn(others.shape, generator=g, dtype=x.dtype)).clamp(0, 1)
    theta, other_theta = (train(images, y, cfg.classes, cfg.decay) for images in (x, others[0]))
    searches = {"noise": (noise, theta), "other digits": (others, theta), "near the truth": (near, theta)}
    searches["noise, other net"] = (noise, other_theta)  # the control: a net that never saw x
    chance, numbers, shown = nearest(fresh, x).mean().item(), {}, {"truth": x}
    for name, (starts, given) in searches.items():
        found = reconstruct(given, y, cfg.decay, starts, cfg.steps)
        again = train(found, y, cfg.classes, cfg.decay)  # the upper level, with the training redone
        to_train, shown[name] = nearest(found, x), found
        off, recovered = (again - given).norm() / given.norm(), (nearest(x, found) < 0.1 * chance).double().mean()
        values = (off, recovered, to_train.mean(), nearest(found, fresh).mean())
        numbers[name] = {column: value.item() for column, value in zip(COLUMNS, values, strict=True)}
    return numbers | {"a fresh digit": {"distance to training": chance}}, shown


def judge(few: dict, many: dict) -> tuple[bool, str]:
    """(the claim holds, its numbers), for fewer images than classes and for many. Bars fixed before the runs."""
    hit, control = few["noise"]["recovered"], few["noise, other net"]["recovered"]
    blind = [many[name] for name in ("noise", "other digits")]
    off = max(b["weights off by"] for b in blind)
    here = f"{hit:.0%} found, many: {blind[0]['recovered']:.0%} from noise, {blind[1]['recovered']:.0%} from other "
    here += f"digits; weights off by {off:.0e}, from another net {control:.0%}"
    return hit >= 0.9 and control <= 0.05 and max(b["recovered"] for b in blind) <= 0.05 and off <= 1e-3, here


def main(cfg: Config) -> None:
    with cluster.world("cpu") as w:
        cluster.alone(w)
        few, many = cfg.classes - 1, cfg.images[-1]
        if cfg.quick:
            cfg = replace(cfg, starts=1, images=(few, many), steps=cfg.steps // 4 + 1)
        run, rows, result, shown = report.Run(cfg.out, cfg, w), [], {}, {}
        for n in report.progress(cfg.images, "sizes", w):
            result[n], shown[n] = experiment(cfg, n)
            for name, numbers in result[n].items():
                run.log(images=n, start=name, **numbers)
                off = f"{numbers['weights off by']:.1e}" if "weights off by" in numbers else ""
                rows.append([f"{n} images, {name}", off, *(numbers.get(key, "") for key in COLUMNS[1:])])
        w.print(report.table(["training set, start", *COLUMNS], rows) + "\n")

        def draw(figure, axes):
            for name in list(shown[few])[1:]:
                distances = [result[n][name]["distance to training"] for n in cfg.images]
                axes[0].plot(cfg.images, distances, "o-", label=name)
            axes[0].axvline(cfg.classes - 0.5, color="grey", lw=0.8)
            axes[0].set(xlabel="training images (grey line: classes)", ylabel="distance to the nearest training image")
            axes[0].legend(frameon=False)
            strips = [(few, "truth"), (few, "noise"), (many, "truth"), (many, "noise"), (many, "other digits")]
            rows = [torch.cat(list(shown[n][name][:few].view(-1, cfg.side, cfg.side)), dim=1) for n, name in strips]
            axes[1].imshow(torch.cat(rows), cmap="gray", vmin=0, vmax=1)
            labels = [f"{n} images: {'truth' if name == 'truth' else 'from ' + name}" for n, name in strips]
            axes[1].set_yticks([cfg.side * (i + 0.5) for i in range(len(strips))], labels)
            axes[1].set_xticks([])

        w.print(report.picture(f"{cfg.out}/reconstruction.png", draw, ncols=2, figsize=(12, 4), layout="constrained"))
        if cfg.quick:
            return w.print("quick: no verdict")
        holds, here = judge(result[few], result[many])
        run.claim(f"{few} images, fewer than classes: a search from noise finds them; {many} images: searches from "
                  "noise and from other digits find none, but the same weights",
                  "the start decides, nobody can tell who was in the training set", f"{few} images: {here}", holds,
                  f"{cfg.images} images, best of {cfg.starts} starts, seed {cfg.seed}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Config)
