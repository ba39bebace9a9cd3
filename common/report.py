"""What a run leaves behind: progress on the screen, metrics.jsonl, claim.json, tables, pictures, and fair timings."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import BadInput
from common.cluster import World


def progress(steps: Iterable, what: str, w: World, total: int | None = None, first: int = 0) -> tqdm:
    """A progress bar over `steps`, on rank 0 of a terminal only, so that log files stay free of it."""
    hidden = None if w.main else True  # None: hidden where the output is no terminal
    return tqdm(steps, desc=what, total=total, initial=first, disable=hidden, leave=False, dynamic_ncols=True)


def revision() -> str:
    """The git revision of the checkout, with + when files are changed; unknown outside git."""
    ask = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: str | Path, value) -> None:
    """Write JSON under a temporary name, then rename."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(f"{path}.tmp", path)


def lines(path: Path) -> list[dict]:
    """The complete lines of a metrics file; a killed run may have left half of one at its end."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


class Run:
    """The folder of one run: metrics.jsonl (first line the settings, then one flat object per log call), claim.json.

    metrics.jsonl is the newest run's; the one that stood there becomes metrics.MODE.jsonl. Only rank 0 touches files.
    """

    def __init__(self, out: str | Path, cfg, w: World):
        self.out, self.w, self.start, self.line = Path(out), w, time.perf_counter(), {}
        self.path, self.mode = self.out / "metrics.jsonl", asdict(cfg).get("mode", "demo")
        if w.main:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise BadInput(f"--out {out} cannot be made a folder ({e.strerror}). Pass another --out.") from e
            if len(old := lines(self.path)) > 1:  # a run that ended before its first line replaces nothing
                os.replace(self.path, self.path.with_suffix(f".{old[0].get('config', {}).get('mode', 'demo')}.jsonl"))
            head = {"config": asdict(cfg), "world": w.size, "torch": torch.__version__, "revision": revision()}
            self.path.write_text(json.dumps(head) + "\n")

    def go_on(self, step: int) -> None:
        """Take up the lines of the run that is resumed, up to that of `step`: what came after is done again."""
        before = self.path.with_suffix(f".{self.mode}.jsonl")
        if self.w.main and step and (old := lines(before)):
            last = max((i for i, x in enumerate(old) if x.get("step", step + 1) <= step), default=0)
            before.write_text("".join(json.dumps(x) + "\n" for x in lines(self.path)[:1] + old[1 : last + 1]))
            os.replace(before, self.path)

    def log(self, **values) -> None:
        """Append one object to metrics.jsonl. Tensors of one element become numbers."""
        if self.w.main:
            flat = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            try:
                with open(self.path, "a") as f:
                    f.write(json.dumps(flat) + "\n")
            except OSError as e:
                raise OSError(f"cannot write {self.path}: {e}. Free space or pass --out.") from e

    def claim(self, claim: str, paper: str, here: str, holds: bool, setting: str) -> bool:
        """Write claim.json and print the last line of a demo. Returns `holds`."""
        what = {"claim": claim, "paper": paper, "here": here, "holds": bool(holds), "setting": setting}
        if self.w.main:
            write_json(self.out / "claim.json", {**what, "seconds": round(time.perf_counter() - self.start, 1)})
        self.w.print(f"claim: {claim} | paper: {paper} | here: {here} | {'holds' if holds else 'DOES NOT HOLD'}")
        return holds


def table(header: list[str], rows: list[list]) -> str:
    """Rows as aligned text: numbers to the right, the first column to the left."""
    cells = [header, *[[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    line = lambda row: "  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])])
    return "\n".join([line(cells[0]), "  ".join("-" * n for n in width), *map(line, cells[1:])])


def picture(path: str | Path, draw: Callable, **subplots) -> str:
    """draw(figure, axes) on plt.subplots(**subplots), saved as PNG. Returns a line: where it is or what to install."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return f'no picture: matplotlib is not installed (pip install -e ".[plot]"), so {path} was not drawn'
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(**subplots)
    draw(figure, axes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.tmp", format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    os.replace(f"{path}.tmp", path)
    return f"picture: {path}"


# %% speed and memory


def device_name(device: torch.device) -> str:
    """For the line above a measurement: the GPU's name, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def timed(cases: dict[str, Callable], device: torch.device, repeats: int = 10, warmup: int = 2) -> dict[str, tuple]:
    """Seconds of each case as (median, spread), spread = half the interquartile range.

    Cases run interleaved, one call of each per round, so that a slow minute of the machine falls on all alike.
    """
    seconds = {name: [] for name in cases}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for i in range(warmup + repeats):
        for name, fn in cases.items():
            wait()
            start = time.perf_counter()
            fn()
            wait()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    spread = lambda s: (statistics.quantiles(s, n=4)[2] - statistics.quantiles(s, n=4)[0]) / 2 if len(s) > 1 else 0.0
    return {name: (statistics.median(s), spread(s)) for name, s in seconds.items()}


def peak_bytes(fn: Callable, device: torch.device) -> int:
    """Most bytes of GPU memory that fn() held at once beyond what was held before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Measured (bytes per second of a large copy, reads plus writes; FLOP per second of a matrix product)."""
    x, size = torch.ones(2**26, device=device), 8192 if device.type == "cuda" else 1024
    y, a = torch.empty_like(x), torch.randn(size, size, device=device).to(dtype)
    t = timed({"copy": lambda: y.copy_(x), "matmul": lambda: a @ a}, device, repeats=7)
    return 2 * 4 * x.numel() / t["copy"][0], 2 * size**3 / t["matmul"][0]
