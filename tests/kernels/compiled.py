"""Compiles what the launchers would launch on a GPU that is not there, and prints what became of it, JSON lines.

Run by test_compiled.py as a process of its own, because there the kernels are not interpreted: compiled.py ARCH.
The launchers run as they are, on tensors of the CPU; a driver that only knows its target takes the place of CUDA's, and
kernels are compiled where they would be launched, in every configuration that would be timed.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastgen.kernels.launch import Tuned
from tests.kernels.cases import CASES, PLANS


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack; a kernel has a stack only for what it spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", listing))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def main(arch: int) -> None:
    seen = set()
    case = ""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        if kernel.hash in seen:
            return
        seen.add(kernel.hash)
        meta = kernel.metadata
        row = {"case": case, "kernel": kernel.name, "warps": meta.num_warps, "stages": meta.num_stages}
        tiles = {key: value for key, value in kwargs.items() if key in ("ROWS", "COLUMNS", "CHANNELS")}
        hides = re.findall(r"(?:min|max)\.f32", kernel.asm["ptx"])  # a NaN behind the other number
        row |= {"shared": meta.shared, "hides_nan": len(hides)}
        print(json.dumps({**row, **tiles, **resources(kernel.asm["cubin"])}), flush=True)

    def each_configuration(self: Tuned, grid: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs(*args, **kwargs):
            self.fn[grid](*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Tuned.run = compile_only, each_configuration
    triton.runtime.driver.set_active(Driver(arch))
    for name, (module, function, arguments) in CASES.items():
        case = name
        torch.set_float32_matmul_precision("high" if name.endswith("tf32") else "highest")
        getattr(importlib.import_module(f"fastgen.kernels.{module}"), function)(*arguments())
    torch.set_float32_matmul_precision("highest")
    for name, launch in PLANS.items():
        case = name
        launch()


if __name__ == "__main__":
    main(int(sys.argv[1]))
