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

from common.dist import World


def progress(steps: Iterable, what: str, w: World, total: int | None = None, first: int = 0) -> tqdm:
    """A progress bar over `steps`, on rank 0 of a terminal only, so that log files stay free of it."""
    look = {"disable": None if w.main else True, "leave": False, "dynamic_ncols": True}
    return tqdm(steps, desc=what, total=total, initial=first, **look)


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


class Run:
    """The folder of one run: metrics.jsonl (first line the settings, then one flat object per log call), claim.json.

    A fresh run keeps an earlier metrics file as metrics.old.jsonl. A resumed run (`step` > 0) appends, after dropping
    lines past `step`, which the killed run logged but its checkpoint does not hold. Only rank 0 touches files.
    """

    def __init__(self, out: str | Path, cfg, w: World, step: int = 0):
        self.out, self.w, self.start = Path(out), w, time.perf_counter()
        self.path = self.out / "metrics.jsonl"
        if not w.main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        lines = self._read() if step else []
        head = {"config": asdict(cfg), "world": w.size, "torch": torch.__version__, "revision": revision()}
        same = lines and lines[0].get("config", {}).get("mode") == head["config"].get("mode")
        kept = [x for x in lines[1:] if x.get("step", 0) <= step] if same else []
        if self.path.exists() and not same:
            os.replace(self.path, self.path.with_suffix(".old.jsonl"))
        tmp = self.path.with_suffix(".tmp")
        tmp.write_text("".join(json.dumps(x) + "\n" for x in [lines[0] if same else head, *kept]))
        os.replace(tmp, self.path)

    def _read(self) -> list[dict]:
        """The complete lines of metrics.jsonl; a killed run may have left half of one at its end."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def log(self, **values) -> None:
        """Append one object to metrics.jsonl. Tensors of one element become numbers."""
        if self.w.main:
            flat = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            with open(self.path, "a") as f:
                f.write(json.dumps(flat) + "\n")

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


# ---- speed and memory


def device_name(device: torch.device) -> str:
    """For the line above a measurement: the GPU's name, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(cases: dict[str, Callable], device: torch.device, repeats: int = 10, warmup: int = 2) -> dict[str, tuple]:
    """Seconds of each case as (median, spread), spread = half the interquartile range.

    Cases run interleaved, one call of each per round, so that a slow minute of the machine falls on all alike.
    """
    seconds = {name: [] for name in cases}
    for i in range(warmup + repeats):
        for name, fn in cases.items():
            synchronize(device)
            start = time.perf_counter()
            fn()
            synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    spread = lambda s: (statistics.quantiles(s, n=4)[2] - statistics.quantiles(s, n=4)[0]) / 2 if len(s) > 1 else 0.0
    return {name: (statistics.median(s), spread(s)) for name, s in seconds.items()}


def peak_bytes(fn: Callable, device: torch.device) -> int:
    """Most bytes of tensor memory that fn() held at once beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    stderr = os.dup(2)
    with open(os.devnull, "w") as silent:
        os.dup2(silent.fileno(), 2)  # the profiler writes its own log there
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            fn()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    held = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for e in sorted(events, key=lambda e: e.start_ns()):
        held += e.nbytes()
        peak = max(peak, held)
    return peak


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Measured (bytes per second of a large copy, reads plus writes; FLOP per second of a matrix product)."""
    x, size = torch.ones(2**26, device=device), 8192 if device.type == "cuda" else 1024
    y, a = torch.empty_like(x), torch.randn(size, size, device=device).to(dtype)
    t = timed({"copy": lambda: y.copy_(x), "matmul": lambda: a @ a}, device, repeats=7)
    return 2 * 4 * x.numel() / t["copy"][0], 2 * size**3 / t["matmul"][0]
