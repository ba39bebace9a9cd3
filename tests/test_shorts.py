"""What holds for every short. A test that fails says in plain words what the file lacks and what to write."""

import ast
import json
import re
import signal
import sys
from dataclasses import fields
from importlib import import_module

import pytest
from ranks import ROOT

from common import cli

SHORTS = sorted(path.stem for path in ROOT.glob("shorts/*.py"))
LABELS = {
    "Paper": "the title, the authors and the arXiv number",
    "Idea": "the method in one to three sentences",
    "Here": "the claim that the experiment checks, and its control",
    "Differs": "every departure from the paper",
    "Expect": "a piece of the output that a reader will see with seed 0",
    "Writes": "the files that a run writes",
}
ALLOWED = {"torch", "numpy", "einops", "tqdm", "common"} | set(sys.stdlib_module_names)


def faults(name: str, text: str) -> list[str]:
    """What the source of shorts/NAME.py lacks, each with what to write; empty if nothing."""
    tree, found, total = ast.parse(text, f"shorts/{name}.py"), [], len(text.splitlines())
    doc = ast.get_docstring(tree, clean=False) or ""
    for label, what in LABELS.items():
        if not re.search(rf"^{label} {{2,}}\S", doc, re.M):
            found.append(f"the header has no line that begins with '{label}'. Write there: {what}.")
    if (lines := doc.count("\n") + 1) > 28:
        found.append(f"the header has {lines} lines. Shorten it to 28: say less in Here and Differs.")
    for command in (f"python shorts/{name}.py", f"python shorts/{name}.py --quick"):
        if not re.search(rf"^    {command} +#", doc, re.M):
            found.append(f"the header does not show the command. Write '    {command}    # how long it takes'.")
    if total > 250:
        found.append(f"the file has {total} lines. Cut it to 250: an arm that nobody judges goes first.")
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    for wrong in sorted(names - ALLOWED):
        found.append(f"it imports {wrong}. A short imports torch, numpy, einops, tqdm, the standard library and "
                     "common, and no other script or short. Copy the lines that you need.")  # fmt: skip
    marks = [m[0] for m in re.finditer(r"^# %% .*$", text, re.M)]
    if not marks or not marks[0].startswith("# %% the method"):
        found.append("the first section is not the method. Write '# %% the method' directly after the imports.")
    else:
        above = text[: text.index(marks[0])]
        if re.search(r"^(def|class) ", above, re.M):
            found.append("something is defined above the method. Move it below: a reader wants the idea first.")
    if "class Config" not in text:
        found.append("it has no settings. Write '@dataclass class Config' with fields made by cli.opt.")
    elif marks and text.index("class Config") < text.index(marks[-1 if len(marks) == 1 else 1]):
        found.append("the settings stand in the first section. Move class Config below the method.")
    return found


def report(name: str, found: list[str]) -> None:
    if found:
        pytest.fail(f"shorts/{name}.py:\n" + "\n".join(f"  - {line}" for line in found), pytrace=False)


@pytest.mark.parametrize("name", SHORTS)
def test_shape(name):
    report(name, faults(name, (ROOT / f"shorts/{name}.py").read_text()))


@pytest.mark.parametrize("name", SHORTS)
def test_settings_and_help(name, capsys):
    config, found = import_module(f"shorts.{name}").Config, []
    flags = {f.name: f for f in fields(config)}
    if len(flags) > 12:
        found.append(f"it has {len(flags)} settings. Keep at most 12: make constants of those that nobody changes.")
    for flag, default in (("quick", False), ("seed", 0), ("out", f"results/{name}")):
        if flag not in flags or flags[flag].default != default:
            found.append(f"the setting `{flag}` is missing or has another default. Write it with default {default!r}.")
    found += [f"the setting `{f}` has no help. Write one line that a student understands." for f in flags
              if not flags[f].metadata.get("help")]  # fmt: skip
    report(name, found)
    with pytest.raises(SystemExit) as stop:
        cli.parse(config, ["--help"])
    shown = capsys.readouterr().out
    if stop.value.code != 0 or "Paper " not in shown:
        report(name, ["--help does not print the header. Define Config in this file and start by cli.run."])


@pytest.mark.parametrize("name", SHORTS)
def test_it_has_a_test(name):
    path = ROOT / f"tests/shorts/test_{name}.py"
    lines = len(path.read_text().splitlines()) if path.exists() else 0
    if not lines:
        report(name, [f"it has no test. Write tests/shorts/test_{name}.py: the method by hand, and a false verdict."])
    if lines > 60:
        report(name, [f"tests/shorts/test_{name}.py has {lines} lines. Cut it to 60: keep what a mistake would break."])


@pytest.mark.parametrize("name", SHORTS)
def test_quick_runs_from_any_folder(name, quick_runs):
    (done, folder), found = quick_runs[name].result(), []
    if done.returncode == -signal.SIGKILL:
        report(name, ["--quick took over 30 processor seconds. Take fewer steps; 15 seconds are the limit."])
    if done.returncode:
        report(name, [f"--quick ended with status {done.returncode}:\n{done.stdout}{done.stderr}"])
    if not done.stdout:
        report(name, ["--quick prints nothing. End the file with if __name__ == '__main__': cli.run(main, Config)."])
    if done.stdout.splitlines()[-1:] != ["quick: no verdict"]:
        found.append("--quick does not end with 'quick: no verdict'. Write: if cfg.quick: return w.print(...).")
    written = {path.name for path in folder.glob("*")}
    if "metrics.jsonl" not in written:
        found.append("--quick writes no metrics.jsonl. Write run = report.Run(cfg.out, cfg, w), then run.log(...).")
    elif json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["config"].get("quick") is not True:
        found.append("metrics.jsonl does not say that the run was quick. Give report.Run the settings that ran.")
    if "claim.json" in written:
        found.append("--quick writes claim.json, which holds verdicts of full runs only. Return before run.claim.")
    report(name, found)


TEMPLATE = (ROOT / "shorts/TEMPLATE.py").read_text()


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("Differs  ", "Also     ", "no line that begins with 'Differs'. Write there: every departure"),
        ("Idea     ", "Idea\n" * 25 + "Idea     ", "the header has 4[0-9] lines. Shorten it to 28"),
        ("python shorts/TEMPLATE.py --quick", "python TEMPLATE.py", "does not show the command"),
        ("import torch\n", "import torch\nimport pandas\n", "it imports pandas"),
        ("import torch\n", "import torch\nfrom shorts import other\n", "it imports shorts"),
        ("import torch\n", "import torch\nimport goldfish\n", "no other script or short"),
        ("# %% the method\n", "", "the first section is not the method"),
        (
            "# %% the method\n",
            "class Helper:\n    pass\n\n\n# %% the method\n",
            "something is defined above the method",
        ),
        ("# %% settings\n", "", "the settings stand in the first section"),
        ("class Config", "class Settings", "it has no settings"),
        ("", "\n" * 200, "lines. Cut it to 250"),
    ],
)
def test_the_messages(old, new, says):
    assert faults("TEMPLATE", TEMPLATE) == []
    found = faults("TEMPLATE", TEMPLATE.replace(old, new, 1))
    assert any(re.search(says, line) for line in found), found
