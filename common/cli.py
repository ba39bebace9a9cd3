"""A dataclass as a command line: one field is one flag, the script's docstring is the --help text."""

import argparse
import os
import sys
from dataclasses import field, fields


class BadInput(ValueError):
    """The user's input is at fault, and the message says what to type instead. run() prints it without a traceback."""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the docstring's line breaks and print every default."""


def opt(default, help: str, choices=None, positional: bool = False):
    """A Config field that is also a flag; the flag's type is the type of `default`. One field may be positional."""
    return field(default=default, metadata={"help": help, "choices": choices, "positional": positional})


def parse(config: type, argv: list[str] | None = None, presets: dict[str, dict] | None = None):
    """Build `config` from the command line: field `top_k` becomes flag `--top-k`.

    presets: name -> field values; the field `preset` picks one as defaults, and flags given beside it win over it.
    A ValueError of the config's own checks becomes the usual usage error (exit status 2).
    """
    doc = sys.modules[config.__module__].__doc__
    parser = argparse.ArgumentParser(usage="%(prog)s [mode] [--flag value ...]", description=doc, formatter_class=_Help)
    for f in fields(config):
        kind, default, help = type(f.default), f.default, f.metadata["help"].replace("%", "%%")
        flag = "--" + f.name.replace("_", "-")
        if f.metadata["positional"]:
            flag, how = f.name, {"nargs": "?", "choices": f.metadata["choices"]}
        elif kind is bool:
            how = {"action": argparse.BooleanOptionalAction}  # --causal, --no-causal
        elif kind is tuple:
            how = {"nargs": "+", "type": type(default[0])}  # --mesh 2 2
        else:
            how = {"type": kind, "choices": f.metadata["choices"]}
        parser.add_argument(flag, default=default, help=help, **how)
    if presets:
        name = parser.parse_known_args(argv)[0].preset
        parser.set_defaults(**presets.get(name, {}))
    values = vars(parser.parse_args(argv))
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
    except (BadInput, OSError, MemoryError, ModuleNotFoundError) as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
