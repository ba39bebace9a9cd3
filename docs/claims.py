"""Run the demos, gather every claim.json, and rebuild the README's tables and the pictures in docs/.

    python docs/claims.py                      # all rows of the README's tables, in their order
    python docs/claims.py goldfish momentum    # these
    python docs/claims.py --quick              # every --quick, nothing is rewritten

A row changes only when its demo ends well: one that crashes, runs over --limit or is interrupted leaves it as it is.
Exit status 1 if a claim does not hold or a demo fails.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- rows of docs/claims.py -->", "<!-- end of rows -->"
ROW = re.compile(r"^\| `((?:shorts/)?(\w+)\.py)` \(\d+\) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", re.M)


def tables() -> tuple[str, str, str]:
    """The README before, between and after its marker lines."""
    before, _, rest = (ROOT / "README.md").read_text().partition(BEGIN)
    between, _, after = rest.partition(END)
    return before + BEGIN, between, END + after


def rows() -> dict[str, str]:
    """Name -> file of every script and short that the README's tables list."""
    return {m[2]: m[1] for m in ROW.finditer(tables()[1])}


def run(file: str, out: Path, limit: float, *argv: str) -> str:
    """One demo in a process group of its own, its output in OUT/demo.log. Returns what went wrong, or ""."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "demo.log", "w") as log:
        command, env = [sys.executable, str(ROOT / file), *argv], {"OMP_NUM_THREADS": "1", **os.environ}
        how = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        demo = subprocess.Popen(command, cwd=ROOT, env=env, **how)  # one thread, as all times on the pages
        try:
            code = demo.wait(limit)
        except subprocess.TimeoutExpired:
            return f"not ready after {limit:.0f} s; raise --limit"
        finally:  # also at Ctrl-C; a demo that is asked ends the ranks that it started, one that is killed does not
            if demo.poll() is None:
                os.killpg(demo.pid, signal.SIGTERM)
                try:
                    demo.wait(40)
                except subprocess.TimeoutExpired:
                    os.killpg(demo.pid, signal.SIGKILL)
                    demo.wait()
    last = (out / "demo.log").read_text().strip().splitlines()[-1:] or ["no output"]
    return f"exit status {code}: {last[0]}" if code else ""


def result(claim: dict) -> str:
    """What the README shows of a claim: the part of `here` before its first semicolon, at most 15 words."""
    words = claim["here"].split(";")[0].replace("|", "/").split()
    return " ".join(words[:15]) + (" ..." if len(words) > 15 else "")


def rewrite(name: str, claim: dict) -> None:
    """Refresh one row of the README: lines, result, holds. The idea and the page stay."""

    def row(m: re.Match) -> str:
        if m[2] != name:
            return m[0]
        lines = len((ROOT / m[1]).read_text().splitlines())
        return f"| `{m[1]}` ({lines}) | {m[3]} | {result(claim)} | {'yes' if claim['holds'] else '**no**'} | {m[6]} |"

    before, between, after = tables()
    (ROOT / "README.md.tmp").write_text(before + ROW.sub(row, between) + after)
    os.replace(ROOT / "README.md.tmp", ROOT / "README.md")


def main(argv: list[str] | None = None) -> int:
    """Run, print, rewrite. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the README's tables; all by default")
    parser.add_argument("--quick", action="store_true", help="run every --quick that there is, rewrite nothing")
    parser.add_argument("--limit", type=float, default=900, help="seconds that one demo may take (default: 900)")
    args = parser.parse_args(argv)
    known, status = rows(), 0
    if unknown := sorted(set(args.names) - set(known)):
        have = f"the README's tables have {', '.join(known)}"
        parser.error(f"no row for {', '.join(unknown)}; {have}. CONTRIBUTING.md says how a row is added.")
    for name in args.names or known:
        start, out = time.time(), ROOT / "results" / name
        if args.quick:
            if '"--quick' not in (text := (ROOT / known[name]).read_text()) and "quick:" not in text:
                continue
            with tempfile.TemporaryDirectory() as folder:
                wrong = run(known[name], Path(folder), args.limit, "--quick", "--out", folder)
            print(f"{name}: {wrong or 'ran'} in {time.time() - start:.0f} s", flush=True)
            status = status or bool(wrong)
            continue
        wrong = run(known[name], out, args.limit)
        file = out / "claim.json"
        if not wrong and not (file.exists() and file.stat().st_mtime >= start):
            wrong = f"it ended without a claim; see {out.relative_to(ROOT)}/demo.log"
        if wrong:
            print(f"{name}: {wrong}. Its row stays as it was.", flush=True)
            status = 1
            continue
        claim = json.loads(file.read_text())
        rewrite(name, claim)
        if (picture := out / f"{name}.png").exists():
            shutil.copyfile(picture, ROOT / "docs" / f"{'shorts_' if '/' in known[name] else ''}{name}.png")
        print(f"{name}: {'holds' if claim['holds'] else 'DOES NOT HOLD'}, {time.time() - start:.0f} s: {claim['here']}")
        status = status or not claim["holds"]
        promised = re.findall(r'^Expect +"(.+?)"', (ROOT / known[name]).read_text(), re.M)
        for words in (words for text in promised for words in text.split(" ... ")):
            if words not in (out / "demo.log").read_text():
                print(f"{name}: its header promises '{words}', which it did not print")
                status = 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
