"""Rebuild the claims: run the scripts' demos one after another, gather every claim.json, print one table.

    python -m common.claims                         # all scripts
    python -m common.claims goldfish slimadam       # these
    python -m common.claims --write                 # also docs/claims.md, the README's table, the pictures in docs/

Each demo is a process of its own, its output in results/<script>/demo.log. Exit status 1 if a claim does not hold or a
demo fails, 2 if the command line is wrong.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from common import report

ROOT = Path(__file__).parent.parent
MARKS = ("<!-- claims: python -m common.claims --write -->", "<!-- /claims -->")
HEADER = ["script", "paper", "claim we check", "paper", "ours", "setting", "command"]


def scripts() -> list[str]:
    """Names of the scripts: the Python files beside the README that have a `Paper` line in their docstring."""
    return sorted(p.stem for p in ROOT.glob("*.py") if "\nPaper    " in p.read_text())


def source(name: str) -> str:
    """The paper of a script as a Markdown link, from its docstring."""
    doc = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())) or ""
    paper = " ".join(doc[doc.index("Paper    ") :].split("\nIdea")[0].split())
    title, link = re.search(r'"(.+?)[.,]?"', paper), re.search(r"arXiv:(\d+\.\d+)", paper)
    if not title or not link:
        raise ValueError(f"{name}.py: the header's Paper line needs a quoted title and an arXiv id, got {paper!r}")
    return f"[{title[1]}](https://arxiv.org/abs/{link[1]})"


def run_demo(name: str, limit: float) -> dict:
    """One demo in a process group of its own: its claim, with "error" instead of a number if it did not make one."""
    out = ROOT / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "claim.json").unlink(missing_ok=True)
    start, error = time.perf_counter(), ""
    with open(out / "demo.log", "w") as log:
        demo = subprocess.Popen([sys.executable, f"{name}.py"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                start_new_session=True)  # fmt: skip
        bar = tqdm(total=round(limit), desc=f"{name}: seconds of its limit", leave=False, disable=None)
        try:
            while demo.poll() is None and time.perf_counter() - start < limit:
                time.sleep(0.2)
                bar.n = min(round(limit), round(time.perf_counter() - start))
                bar.refresh()
            if demo.poll() is None:
                error = f"no claim within {limit:.0f} s; raise --limit"
        finally:  # also at Ctrl-C: the demo and the processes that it started
            if demo.poll() is None:
                os.killpg(demo.pid, signal.SIGTERM)
                try:
                    demo.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(demo.pid, signal.SIGKILL)
                    demo.wait()
            bar.close()
    seconds = round(time.perf_counter() - start, 1)
    if demo.returncode and not error:
        last = (out / "demo.log").read_text().strip().splitlines()[-1:]
        error = f"exit status {demo.returncode}: {last[0] if last else 'no output'}"
    if not error and not (out / "claim.json").exists():
        error = f"{name}.py ended without a claim; see results/{name}/demo.log"
    if error:
        return {"claim": error, "paper": "-", "here": "-", "holds": False, "setting": "-", "seconds": seconds}
    return json.loads((out / "claim.json").read_text()) | {"seconds": seconds}


def row(name: str, found: dict) -> str:
    """One line of the README's table."""
    ours = found["here"] if found["holds"] else f"**does not hold**: {found['here']}"
    lines = len((ROOT / f"{name}.py").read_text().splitlines())
    cells = [f"`{name}.py` ({lines})", source(name), found["claim"], found["paper"], ours,
             f"{found['setting']}, {found['seconds']:.0f} s", f"`python {name}.py`"]  # fmt: skip
    return "| " + " | ".join(c.replace("|", "/") for c in cells) + " |"


def refresh(text: str, rows: dict[str, str]) -> str:
    """`text` with these scripts' rows replaced, or added, between the two marker lines. ValueError: no markers."""
    if any(text.count(m) != 1 for m in MARKS):
        raise ValueError(f"the table needs the two marker lines {MARKS[0]} and {MARKS[1]}, once each")
    before, rest = text.split(MARKS[0])
    inside, after = rest.split(MARKS[1])
    lines = inside.strip().splitlines() or ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for name, new in rows.items():
        at = [i for i, line in enumerate(lines) if line.startswith(f"| `{name}.py`")]
        if at:
            lines[at[0]] = new
        else:
            lines.append(new)
    return before + MARKS[0] + "\n" + "\n".join(lines) + "\n" + MARKS[1] + after


def write(found: dict[str, dict]) -> None:
    """Refresh docs/claims.md, the README's table and the pictures with what was just run."""
    rows, page = {name: row(name, x) for name, x in found.items()}, ROOT / "docs" / "claims.md"
    fresh = f"# The claims, as `python -m common.claims --write` last found them\n\n{MARKS[0]}\n{MARKS[1]}\n"
    for path, text in ((page, page.read_text() if page.exists() else fresh), (ROOT / "README.md", None)):
        path.with_suffix(".tmp").write_text(refresh(text or path.read_text(), rows))
        os.replace(path.with_suffix(".tmp"), path)
    for name in found:
        for picture in (ROOT / "results" / name).glob("*.png"):
            shutil.copyfile(picture, ROOT / "docs" / picture.name)


def main(argv: list[str] | None = None) -> int:
    """Run, print, and write if asked. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m common.claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="script", help=f"of {', '.join(scripts())}; all by default")
    parser.add_argument("--write", action="store_true", help="refresh docs/claims.md, README.md and docs/*.png")
    parser.add_argument("--limit", type=float, default=900, help="seconds that one demo may take (default: 900)")
    args = parser.parse_args(argv)
    names = [n.removesuffix(".py") for n in args.names] or scripts()
    if unknown := sorted(set(names) - set(scripts())):
        parser.error(f"no script {', '.join(unknown)}; choose from {', '.join(scripts())}")
    found = {}
    for name in names:
        found[name] = x = run_demo(name, args.limit)
        print(f"{name}: {'holds' if x['holds'] else 'DOES NOT HOLD'} after {x['seconds']:.0f} s", flush=True)
    short = lambda text: text if len(text) <= 36 else text[:33] + "..."  # whole in each script's claim.json
    cells = [[n, *(short(x[k]) for k in ("claim", "paper", "here")), "yes" if x["holds"] else "NO", short(x["setting"]),
              f"{x['seconds']:.0f}"] for n, x in found.items()]  # fmt: skip
    print("\n" + report.table(["script", "claim", "paper", "here", "holds", "setting", "seconds"], cells))
    print("whole claims: results/*/claim.json")
    if args.write:
        write(found)
        print("written: docs/claims.md, README.md, docs/*.png")
    return 0 if all(x["holds"] for x in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
