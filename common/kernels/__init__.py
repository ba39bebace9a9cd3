"""Triton kernels, one file per topic, each with a plain torch twin in a script."""

import importlib.util
import os


def use_kernels(device) -> bool:
    """True where these kernels run: on a GPU with Triton, or anywhere in its interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
