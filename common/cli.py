"""A dataclass as a command line: one field is one flag, the script's docstring is the --help text."""

import argparse
import difflib
import os
import re
import shlex
import sys
from dataclasses import field, fields


class BadInput(ValueError):
    """The user's input is at fault, and the message says what to type instead. run() prints it without a traceback."""


def opt(default, help: str, choices=None, positional: bool = False, modes: tuple = ()):
    """A Config field that is also a flag, of the type of `default`. modes: the modes that read it, all if empty."""
    return field(default=default, metadata={"help": help, "choices": choices, "positional": positional, "modes": modes})


def spell(name: str, value) -> str:
    """A setting as one would type it: --top-k 4, --mesh 2 2, --no-causal."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.join(map(str, value if isinstance(value, (tuple, list)) else [value]))}"


def parse(config: type, argv: list[str] | None = None, presets: dict[str, dict] | None = None):
    """Build `config` from the command line: field `top_k` becomes flag `--top-k`.

    presets: name -> field values; the field `preset` picks one as defaults, and flags given beside it win over it.
    A ValueError of the config's own checks becomes the usual usage error (exit status 2).
    """
    doc, argv = sys.modules[config.__module__].__doc__, sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(usage="%(prog)s [mode] [--flag value ...]", description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    owners = {}  # flag -> the modes that read it
    for f in fields(config):
        kind, default = type(f.default), f.default
        shown, modes = " ".join(map(str, default)) if kind is tuple else str(default), ", ".join(f.metadata["modes"])
        help = f.metadata["help"] + f" [{modes}]" * bool(modes) + f" (default: {shown})" * bool(shown)
        flag = "--" + f.name.replace("_", "-")
        if f.metadata["positional"]:
            flag, how = f.name, {"nargs": "?", "choices": f.metadata["choices"]}
        elif kind is bool:
            how = {"action": argparse.BooleanOptionalAction}  # --causal, --no-causal
        elif kind is tuple:
            how = {"nargs": "+", "type": type(default[0])}  # --mesh 2 2
        else:
            how = {"type": kind, "choices": f.metadata["choices"]}
        action = parser.add_argument(flag, default=default, help=help.replace("%", "%%"), **how)
        owners |= dict.fromkeys(action.option_strings, f.metadata["modes"])
    given = [word.split("=")[0] for word in argv if re.match("--?[a-z]", word) and word not in ("-h", "--help")]
    for flag in given:
        if flag not in owners:
            near = difflib.get_close_matches(flag, owners, n=1) or ["--help"]
            parser.error(f"unknown flag {flag}; did you mean {near[0]}?")
    if presets:
        name = parser.parse_known_args(argv)[0].preset
        parser.set_defaults(**presets.get(name, {}))
    values = vars(parser.parse_args(argv))
    for flag in given:
        if owners[flag] and values["mode"] not in owners[flag]:
            parser.error(f"mode {values['mode']} does not read {flag}; it belongs to {', '.join(owners[flag])}")
    try:
        return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ValueError as e:
        parser.error(str(e))


def run(main, config: type, presets: dict[str, dict] | None = None) -> None:
    """Parse, call main(cfg), and turn what the user can mend into one line and exit status 2 instead of a traceback."""
    try:
        main(parse(config, presets=presets))
    except KeyboardInterrupt:
        os._exit(130)  # at once: peers blocked in a collective are torchrun's to stop
    except (BadInput, OSError, MemoryError, ModuleNotFoundError, RuntimeError) as e:
        if sys.flags.dev_mode:  # python -X dev: all errors as tracebacks
            raise
        if isinstance(e, RuntimeError):
            if "gloo/transport" not in str(e) and type(e).__module__ != "torch.distributed":
                raise
            e = f"lost contact with another rank ({str(e).splitlines()[0]}). Start again; --resume uses a checkpoint."
        where = f"rank {os.environ['RANK']}: " if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1" else ""
        print(f"{os.path.basename(sys.argv[0])}: error: {where}{e}", file=sys.stderr, flush=True)  # whichever rank
        sys.exit(2)
