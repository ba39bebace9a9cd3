"""Draw the diagram of a method for its page: python docs/figures.py goldfish writes docs/goldfish_method.png.

One function per script. It gets an empty axis, and draws what the method's few lines do. The thumbnail in the README,
docs/strip/goldfish.png, is made anew from docs/goldfish.png, the picture that the demo drew.
"""

import math
import sys
from pathlib import Path

import matplotlib
from PIL import Image  # matplotlib brings it

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def box(axis, x: float, y: float, text: str, color: str = "white", width: float = 1.0) -> None:
    """A box of height 0.8 with its lower left corner at (x, y)."""
    axis.add_patch(plt.Rectangle((x, y), width, 0.8, facecolor=color, edgecolor="0.4"))
    axis.text(x + width / 2, y + 0.4, text, ha="center", va="center")


def goldfish(axis) -> None:
    """A row of targets: the product of the last h tokens is looked up in a table, and decides which have a loss."""
    words = "the goldfish forgets what it has read and so it".split()
    dropped = {5, 9}
    for i, word in enumerate(words):
        box(axis, 1.25 * i, 3, word, "0.85" if i in dropped else "white", 1.2)
        box(axis, 1.25 * i, 0, "no loss" if i in dropped else "loss", "0.85" if i in dropped else "#bfe3bf", 1.2)
    axis.text(-0.2, 3.4, "targets", ha="right", va="center")
    axis.text(-0.2, 0.4, "G", ha="right", va="center", style="italic")
    left, right = 1.25 * 2, 1.25 * 5 + 1.2
    axis.annotate("", (right, 2.85), (left, 2.85), arrowprops={"arrowstyle": "-", "lw": 3, "color": "tab:orange"})
    axis.text((left + right) / 2, 2.45, "h tokens (here 4): their product", ha="center", color="tab:orange")
    axis.annotate("", (5 * 1.25 + 0.6, 0.85), (5 * 1.25 + 0.6, 1.35), arrowprops={"arrowstyle": "->"})
    box(axis, 3.6, 1.4, "table[product mod 1 000 003] < 1/k ?", "#fff2cc", 5.4)
    axis.annotate("", (5 * 1.25 + 0.6, 2.2), (5 * 1.25 + 0.6, 2.4), arrowprops={"arrowstyle": "-"})
    axis.set(xlim=(-1.2, 12.6), ylim=(-0.2, 4.0))


def abacus(axis) -> None:
    """97 + 8 = 105 as the model reads it: one row of boxes a quantity, equal colours are equal vectors."""
    text, shades = "79+8=501", plt.get_cmap("Set2").colors
    places = [1, 2, 0, 1, 0, 1, 2, 3]
    rows = (("token", list(text), False), ("place (testing)", places, True),
            ("place + 29 (one training example)", [p + 29 if p else 0 for p in places], True))  # fmt: skip
    for y, (name, cells, coloured) in zip((2, 1, 0), rows, strict=True):
        axis.text(-0.2, y, name, ha="right", va="center", fontsize=11)
        for x, cell in enumerate(cells):
            color = shades[places[x]] if coloured and places[x] else "0.93"
            axis.add_patch(plt.Rectangle((x, y - 0.4), 0.9, 0.8, facecolor=color, edgecolor="0.4"))
            axis.text(x + 0.45, y, str(cell), ha="center", va="center", fontsize=13, family="monospace")
    for x, width, name in ((0, 1.9, "97"), (3, 0.9, "8"), (5, 2.9, "105")):
        axis.annotate("", (x, 2.6), (x + width, 2.6), arrowprops={"arrowstyle": "<->", "color": "0.4"})
        axis.text(x + width / 2, 2.68, f"{name}, units first", ha="center", va="bottom", fontsize=10)
    note = "within a row, equal colour is the same learned vector, so units meet units;\n"
    note += "grey: all other tokens share place 0"
    axis.text(3.9, -0.65, note, ha="center", va="top", fontsize=10)
    axis.set(xlim=(-3.6, 8.1), ylim=(-1.3, 3.1))


def slimadam(axis) -> None:
    """v of a matrix as Adam keeps it, and with one number for a row whose entries hardly differ."""
    rows = ((2, 2, 3, 2, 3), (7, 8, 7, 7, 8), (4, 4, 5, 4, 4), (1, 1, 1, 2, 1))
    shades = plt.get_cmap("YlOrBr")
    for y, row in enumerate(rows):
        for x, value in enumerate((*row, None, sum(row) / len(row))):
            if value is not None:
                box(axis, x * 1.05 + (x > 5) * 3.2, 2.55 - 0.85 * y, f"{value:g}", shades(value / 14))
    axis.text(2.6, 3.6, "Adam's v: one number per weight", ha="center", va="bottom")
    axis.text(10.1, 3.6, "SlimAdam's v: one per row", ha="center", va="bottom")
    axis.annotate("", (9.3, 1.6), (5.5, 1.6), arrowprops={"arrowstyle": "->"})
    axis.text(7.4, 1.75, "mean along K = (1,)\nif SNR = mean² / variance\nis above 1", ha="center", va="bottom")
    note = "along a row the entries are nearly equal: high SNR;\nalong a column they are not: low SNR"
    axis.text(2.6, -0.2, note, ha="center", va="top")
    axis.set(xlim=(-0.2, 12.5), ylim=(-1.2, 4.2))


def recurrent_depth(axis) -> None:
    """Prelude, core and coda: the core is applied again and again, and reads the prelude's output each time."""
    cores = [(x, "core R", "#fff2cc") for x in (5.2, 7.7, 10.2)]
    ends = [(0, "ids", "white"), (2.2, "prelude P", "#cfe2f3"), (13.2, "coda C", "#cfe2f3"), (15.6, "token", "white")]
    for x, text, color in cores + ends:
        box(axis, x, 1, text, color, 1.8)
    arrow = lambda a, b, style="->": axis.annotate("", b, a, arrowprops={"arrowstyle": style, "color": "0.3"})
    for x, y in ((1.8, 2.2), (7.0, 7.7), (9.5, 10.2), (12.0, 13.2), (15.0, 15.6)):
        arrow((x, 1.4), (y, 1.4))
    for x, name in ((7.35, "$s_1$"), (9.85, "$s_2$"), (12.6, "$s_r$")):
        axis.text(x, 1.55, name, ha="center")
    arrow((3.1, 1.8), (3.1, 2.9), "-")
    arrow((3.1, 2.9), (11.1, 2.9), "-")
    for x in (6.1, 8.6, 11.1):
        arrow((x, 2.9), (x, 1.85))
    axis.text(4.5, 3.0, "e, read again in every iteration", ha="left", va="bottom")
    axis.text(6.1, 0.1, "$s_0$: noise", ha="center", va="top")
    arrow((6.1, 0.15), (6.1, 0.95))
    axis.text(10.4, 0.6, "the same weights, r times: as many as asked", ha="center", va="top")
    axis.set(xlim=(-0.3, 17.8), ylim=(-0.5, 3.6))


def topk_attention(axis) -> None:
    """One query: every key is scored, the best rows move, and they share one softmax with the rows after the prefix."""
    best = {2, 7}
    for i in range(10):
        box(axis, i, 3, f"k{i + 1}", "#fff2cc" if i in best else "white", 0.9)
        box(axis, i, 2.1, f"v{i + 1}", "#fff2cc" if i in best else "white", 0.9)
    for i, name in enumerate(("new", "q")):
        box(axis, 11 + i, 2.5, name, "#dae8fc", 0.9)
    axis.text(4.9, 4.0, "the prefix: all keys and values stay in host memory", ha="center", va="bottom")
    axis.text(11.9, 3.5, "the suffix: tokens since", ha="center", va="bottom")
    note = "every key is scored,\nthe k best rows are handed over"
    axis.text(4.0, 0.5, note, ha="right", va="center", color="tab:orange")
    for i in sorted(best):
        axis.annotate("", (5.6 + i / 5, 0.95), (i + 0.45, 2), arrowprops={"arrowstyle": "->", "color": "tab:orange"})
    axis.annotate("", (9.2, 0.95), (11.9, 2.4), arrowprops={"arrowstyle": "->", "color": "tab:blue"})
    box(axis, 4.7, 0.1, "one softmax over both, one sum of values", "#bfe3bf", 6.2)
    axis.set(xlim=(-0.3, 13.8), ylim=(-0.1, 4.6))


def axonn(axis) -> None:
    """One product on a grid: what of I, W and O lies on one rank, and what travels along which axis."""
    sizes = (("I", 0, "m / Gz", "k / Gy"), ("W", 4.4, "n / Gx", "k / Gy"), ("O", 8.8, "m / Gz", "n / Gx"))
    for name, x, rows, cols in sizes:
        for i in range(2):
            for j in range(2):
                color = "#bfe3bf" if (i, j) == (0, 0) else "white"
                box(axis, x + 1.3 * j, 1.7 - 0.85 * i, name if (i, j) == (0, 0) else "", color, 1.25)
        axis.text(x + 1.3, 2.7, f"{name}: rows {rows}, columns {cols}", ha="center")
    axis.text(3.5, 1.65, "times", ha="center")
    axis.text(7.9, 1.65, "gives", ha="center")
    notes = ((1.3, "backward: its gradient is\nall-reduced over X"),
             (5.7, "forward: rows gathered over Z,\nbackward: gradient scattered"),
             (10.1, "forward: all-reduced over Y;\nnext layer: X and Y swapped"))  # fmt: skip
    for x, note in notes:
        axis.text(x, 0.55, note, ha="center", va="top", color="tab:orange")
    axis.set(xlim=(-0.6, 12.2), ylim=(-0.6, 3.2))


def speedy_splat(axis) -> None:
    """One Gaussian of low opacity, and the tiles that list it: 3D-GS's square, SnugBox, AccuTile."""
    opacity, long, short, turn, u, v = 0.25, 1.5, 0.28, 0.5, 6.3, 5.1  # standard deviations and centre, in tiles
    seen = math.sqrt(2 * math.log(255 * opacity))  # how many standard deviations away it is seen
    cos, sin, circle = math.cos(turn), math.sin(turn), [2 * math.pi * i / 400 for i in range(401)]

    def at(t: float, r: float) -> tuple[float, float]:
        x, y = r * seen * long * math.cos(t), r * seen * short * math.sin(t)
        return u + x * cos - y * sin, v + x * sin + y * cos

    reach = lambda x0, x1, y0, y1: {(x, y) for x in range(x0, x1 + 1) for y in range(y0, y1 + 1)}
    touched = {(int(x), int(y)) for r in range(81) for x, y in (at(t, r / 80) for t in circle)}
    xs, ys = zip(*touched, strict=True)
    square = reach(int(u - 3 * long), int(u + 3 * long), int(v - 3 * long), int(v + 3 * long))
    listed = {"3D-GS": square, "SnugBox": reach(min(xs), max(xs), min(ys), max(ys)), "AccuTile": touched}
    for i, (name, tiles) in enumerate(listed.items()):
        for x, y in sorted(reach(0, 12, 0, 9)):
            color = "#fff2cc" if (x, y) in tiles else "white"
            axis.add_patch(plt.Rectangle((14 * i + x, y), 1, 1, facecolor=color, edgecolor="0.8", lw=0.6))
        edge = [at(t, 1) for t in circle]
        axis.fill([14 * i + x for x, _ in edge], [y for _, y in edge], color="tab:blue", alpha=0.45)
        axis.text(14 * i + 6.5, 10.4, f"{name}: {len(tiles)} tiles", ha="center", fontsize=11)
    note = "blue: where the Gaussian's alpha is 1/255 or more; yellow: the tiles that list it"
    axis.text(20.5, -1.1, note, ha="center")
    axis.set(xlim=(-0.2, 41.2), ylim=(-1.6, 11.6), aspect="equal")


DRAW = {f.__name__: f for f in (goldfish, abacus, slimadam, recurrent_depth, topk_attention, axonn, speedy_splat)}


def thumbnail(name: str) -> None:
    """docs/strip/NAME.png: the picture of the script's demo, 200 pixels high."""
    source = Path(__file__).parent / f"{name}.png"
    target = source.parent / "strip" / source.name
    target.parent.mkdir(exist_ok=True)
    picture = Image.open(source)
    picture.resize((200 * picture.width // picture.height, 200)).quantize(128).save(target)


def main(names: list[str]) -> None:
    for name in names or DRAW:
        if name not in DRAW:
            raise SystemExit(f"no diagram of {name}; there are {', '.join(DRAW)}")
        figure, axis = plt.subplots(figsize=(9, 3.3))
        axis.axis("off")
        DRAW[name](axis)
        path = Path(__file__).parent / f"{name}_method.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        print(f"picture: {path.name}")
        thumbnail(name)


if __name__ == "__main__":
    main(sys.argv[1:])
