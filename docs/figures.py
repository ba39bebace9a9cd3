"""Diagrams of the methods, one function per script.

python docs/figures.py abacus        # writes docs/abacus_method.png
python docs/figures.py               # all of them
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


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
    note = "within a row, equal colour is the same learned vector, so units meet units;\ngrey: all other tokens share place 0"
    axis.text(3.9, -0.65, note, ha="center", va="top", fontsize=10)
    axis.set(xlim=(-3.6, 8.1), ylim=(-1.3, 3.1))


FIGURES = {"abacus": (abacus, (9, 3.4))}  # name -> what draws it, inches


def main(names: list[str]) -> None:
    """Draw the figures of these scripts, or all."""
    for name in names or FIGURES:
        if name not in FIGURES:
            sys.exit(f"no figure {name}; there are {', '.join(FIGURES)}")
        draw, size = FIGURES[name]
        figure, axis = plt.subplots(figsize=size)
        axis.axis("off")
        draw(axis)
        path = Path(__file__).parent / f"{name}_method.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        print(f"written: {path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
