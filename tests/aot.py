"""Compile the kernels of common/kernels ahead of time, without a GPU, with the settings that a run on a GPU uses.

    TRITON_INTERPRET=0 python tests/aot.py        # one line of JSON per kernel and architecture

The functions of common/kernels are called with meta tensors of production size (or small real ones, where data decide
what is launched), and each launch compiles instead. The second time, Triton's cache has the kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))
import common.kernels  # noqa: E402

common.kernels.use_kernels = lambda device: True
from common.kernels import cross_entropy, decode_attention, splat  # noqa: E402

TARGETS = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
FULL, HALF, INT, BOOL = torch.float32, torch.bfloat16, torch.int64, torch.bool
TYPES = {FULL: "*fp32", HALF: "*bf16", torch.float16: "*fp16", INT: "*i64", torch.int16: "*i16", BOOL: "*i1"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
done = set()


def launch(kernel, *args, grid, warmup=False, **given) -> None:
    """Stands in for JITFunction.run: compile for all targets with the types and constants that this launch has."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | given
    options = {k: values.pop(k) for k in given if k not in kernel.arg_names}
    types, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        x, number = values[p.name], type(values[p.name]) is int and not p.do_not_specialize
        if p.is_constexpr or x is None or (number and x == 1):
            types[p.name], constants[p.name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            types[p.name] = TYPES[x.dtype]
        else:
            types[p.name] = "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"
        if isinstance(x, torch.Tensor) or (number and p.name not in constants and x % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    name, pointers = kernel.__name__.strip("_"), dict.fromkeys(t[1:] for t in types.values() if t.startswith("*"))
    setting = " ".join([*pointers, *(f"{k}={v}" for k, v in constants.items())])
    for target in TARGETS if (name, setting) not in done else ():
        found = {"kernel": name, "setting": setting, "arch": f"sm_{target.arch}".replace("sm_gfx", "gfx")}
        try:
            source = ASTSource(kernel, types, constants, attributes)
            found |= measure(triton.compile(source, target=target, options=options))
        except Exception as e:  # whatever the compiler raises
            found["error"] = f"{type(e).__name__}: {str(e).strip().splitlines()[-1]}"
        print(json.dumps(found), flush=True)
    done.add((name, setting))


def measure(kernel) -> dict:
    """Registers, bytes of spilled ones, KB of shared memory, matrix products, and the instructions they became."""
    found = {"shared KB": kernel.metadata.shared / 1024, "dots": len(re.findall(r"tt\.dot ", kernel.asm["ttir"]))}
    if "amdgcn" in kernel.asm:
        number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"])[1])
        found |= {"registers": number("vgpr_count"), "spilled": number("private_segment_fixed_size")}
        return found | {"mma": len(re.findall("v_mfma", kernel.asm["amdgcn"]))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        Path(f.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return found | {
        "registers": registers,
        "spilled": stack,
        "mma": len(re.findall("mma.sync|wgmma", kernel.asm["ptx"])),
    }


def empty(*shape, dtype=FULL) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@triton.jit
def spilling_mutant(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """It holds more numbers than it has registers."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), x / tl.sum(x, axis=0))


@triton.jit
def failing_mutant(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Its shapes do not fit."""
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 2 * BLOCK)))


if __name__ == "__main__":
    JITFunction.run = launch
    N, K = 10**6 - 1, 19999  # keys, and how many of them are chosen: odd, as most lengths of a cache are not aligned
    for V, dtype in ((128256, HALF), (50257, FULL)):
        logits = empty(65536, V, dtype=dtype).requires_grad_()
        cross_entropy.masked_cross_entropy(logits, empty(65536, dtype=INT), empty(65536, dtype=BOOL)).backward()
    for D, q, k in ((64, HALF, HALF), (128, HALF, HALF), (256, HALF, HALF), (64, FULL, HALF), (128, FULL, HALF),
                    (256, FULL, HALF), (128, FULL, FULL)):  # fmt: skip
        decode_attention.scores(empty(8, 4, D, dtype=q), empty(8, N, D, dtype=k))
    for D, v in ((128, HALF), (256, HALF), (128, FULL)):
        decode_attention.attend(empty(8, 4, K), empty(8, 4, K, dtype=INT), empty(8, N, D, dtype=v), 0.1)
    camera, widths = SimpleNamespace(size=(1920, 1080)), {"mean2d": 2, "conic": 3, "opacity": 1, "color": 3}
    s = {name: torch.ones(4096, width, requires_grad=True).squeeze(1) for name, width in widths.items()}
    s = SimpleNamespace(**s, depth=torch.ones(4096), visible=torch.ones(4096, dtype=BOOL))
    for mode in ("vanilla", "accutile"):  # the others differ in a line or two
        splat.rasterize(s, camera, 16, mode)[0].sum().backward()
    splat.score(s, camera, 16, "accutile", torch.ones(4))
    spilling_mutant[(1,)](empty(2**17), empty(2**17), BLOCK=2**17, num_warps=16)
    failing_mutant[(1,)](empty(16), empty(16), BLOCK=16)
