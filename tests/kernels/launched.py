"""What a GPU that is not there would get at a first call, which Triton launches, and at a later one of `Tuned`.

Run by test_launch.py as a process of its own: launched.py FOLDER, which holds driver.c compiled as libcuda.so.1.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.compiler.compiler import CompiledKernel

from fastgen.kernels import tap_gemm
from fastgen.kernels.launch import Tuned
from tests.kernels.cases import CASES

MOST = 64  # kMost
BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}
Launch = tuple[tuple[Any, ...], tuple[bytes, ...]]  # kernel and grid, arguments


class Record(ctypes.Structure):
    """struct Launch"""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("count", ctypes.c_int),
        ("arguments", ctypes.c_char * 8 * MOST),
    )


class Driver(CudaDriver):
    """Triton's, without asking torch for a GPU."""

    def __init__(self, cuda: ctypes.CDLL):
        class Launcher(CudaLauncher):
            def __init__(self, src: Any, metadata: Any):
                super().__init__(src, metadata)
                types = [t for t in src.signature.values() if t != "constexpr"]
                self.bytes = [8 if t.startswith("*") else BYTES[t] for t in types]

            def __call__(self, *args: Any) -> None:
                cuda.expect(len(self.bytes), (ctypes.c_int * len(self.bytes))(*self.bytes))
                super().__call__(*args)

        self.utils, self.launcher_cls = CudaUtils(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def taken(cuda: ctypes.CDLL) -> list[Launch]:
    """What was launched since it was asked last."""
    records = [cuda.launch(i).contents for i in range(cuda.launched())]
    launches = [
        ((r.function, *r.grid, r.block, r.shared), tuple(bytes(r.arguments)[8 * i :][:8] for i in range(r.count)))
        for r in records
    ]
    cuda.forget()
    return launches


def assert_alike(first: list[Launch], later: list[Launch], given: set[bytes]) -> None:
    """The same but for the addresses of tensors that were not given, which are made anew."""
    assert len(first) == len(later)
    for (kernel, arguments), (other_kernel, other_arguments) in zip(first, later, strict=True):
        assert kernel == other_kernel and len(arguments) == len(other_arguments)
        for a, b in zip(arguments, other_arguments, strict=True):
            made = a[4:] != bytes(4) != b[4:] and a not in given and b not in given
            assert made or a == b, (kernel, arguments.index(a), a, b)


def main(folder: str) -> None:
    cuda = ctypes.CDLL(str(Path(folder, "libcuda.so.1")), mode=ctypes.RTLD_GLOBAL)
    cuda.launch.restype = ctypes.POINTER(Record)
    triton.runtime.driver.set_active(Driver(cuda))
    Tuned.choose = lambda self, grid, args, kwargs: next(iter(self.configs(*args, **kwargs))).all_kwargs()
    direct: list[str] = []
    indexed = CompiledKernel.__getitem__

    def watched(self: CompiledKernel, grid: Any) -> Any:
        direct.append(self.name)
        return indexed(self, grid)

    CompiledKernel.__getitem__ = watched
    modules = {name: importlib.import_module(f"fastgen.kernels.{name}") for name, _, _ in CASES.values()}
    values = [value for module in (tap_gemm, *modules.values()) for value in vars(module).values()]
    tuned = [value for value in values if isinstance(value, Tuned)]
    for name, (module, function, arguments) in CASES.items():
        if "tf32" in name:
            continue  # launched like float32
        for kernel in tuned:  # cases share some launches
            kernel.compiled.clear()
        launcher, given = getattr(modules[module], function), arguments()
        results = [launcher(*given)]  # kept, so that the next ones lie elsewhere
        first = taken(cuda)
        assert first and not direct, name
        results.append(launcher(*given))
        addresses = {struct.pack("q", x.data_ptr()) for x in given if isinstance(x, torch.Tensor)}
        assert_alike(first, taken(cuda), addresses)
        print(name, *direct)
        direct.clear()


if __name__ == "__main__":
    main(sys.argv[1])
