"""Triton kernels, one file per topic. Each has its plain torch twin in a script."""

import importlib.util
import os

from common.cli import BadInput


def use_kernels(device) -> bool:
    """True where the kernels run: Triton is installed, and the device is a GPU or the interpreter is on."""
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    return importlib.util.find_spec("triton") is not None and (interpreter or str(device).startswith("cuda"))


def need(ok: bool, message: str) -> None:
    """BadInput unless ok: what a kernel cannot do is refused before its launch."""
    if not ok:
        raise BadInput(message)
