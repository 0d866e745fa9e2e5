"""Every CUDA kernel, as the build compiled it for GPUs that need not be there: it spills no register."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fastgen import backends

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))

# What `nvcc -Xptxas=-v` says of each function; those that are called, not launched, have no line of registers.
FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(\n.*?Used (?P<registers>\d+) registers)?"
)
ARCH = re.compile(r"Compiling entry function \S+ for '(sm_\w+)'")


class Usage(NamedTuple):
    """What a function takes of a GPU; registers are None where its caller's count."""

    arch: str
    name: str
    registers: int | None
    stack: int
    spilled: int


def usages(report: str) -> Iterator[Usage]:
    """Of every function that ptxas reports, for every architecture."""
    _, *parts = ARCH.split(report)
    for arch, text in zip(parts[::2], parts[1::2], strict=True):
        for found in FUNCTION.finditer(text):
            registers = int(found["registers"]) if found["registers"] else None
            spilled = int(found["stores"]) + int(found["loads"])
            yield Usage(arch, readable(found["name"]), registers, int(found["stack"]), spilled)


def readable(name: str) -> str:
    """A mangled name without namespaces and arguments, where there is a c++filt."""
    if shutil.which("c++filt") is None:
        return name
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\b\w+::|\([^()]*\)$|^void ", "", full.replace("(anonymous namespace)::", ""))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(setup, source, tell: Callable[[str], None]):
    """Compiling is what takes long, so the log of the build is read, which is compiled again when the file changes."""
    reason = backends.import_error("_cuda")
    if reason:
        pytest.skip(reason)
    log = ROOT / setup.build_folder() / f"{source.stem}.cu.o.log"
    if not log.exists():
        pytest.skip(f"fastgen._cuda was not built in this checkout: there is no {log.name}")
    found = list(usages(log.read_text()))
    for usage in found:
        registers = "      -" if usage.registers is None else f"{usage.registers:7}"
        tell(f"{usage.arch:7}{registers} registers {usage.stack:5} stack {usage.spilled:5} spilled  {usage.name}")
    assert not [usage for usage in found if usage.spilled]
    if "__global__" in source.read_text():
        assert {usage.arch.removeprefix("sm_") for usage in found} == set(backends.native_cuda().archs.split(";"))


def test_a_spill_is_seen(setup, tmp_path):
    """32 registers are not enough for 64 numbers that are all needed at the end."""
    nvcc = setup.find_nvcc()
    if nvcc is None or shutil.which(nvcc) is None:
        pytest.skip("no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda")
    numbers = range(64)
    load = "".join(f"  float v{i} = x[{i} * n];\n" for i in numbers)
    mixed = "".join(f"  v{i} = v{i} * v{(i + 1) % 64} + v{(7 * i) % 64};\n" for i in numbers)
    store = "".join(f"  x[{i} * n] = v{i};\n" for i in numbers)
    source = tmp_path / "spilling.cu"
    source.write_text(f"__global__ void spilling(float* x, int n) {{\n  x += threadIdx.x;\n{load}{mixed}{store}}}\n")
    flags = [*setup.CUDA_FLAGS.split(), f"-arch=sm_{setup.find_archs(nvcc)[0]}", "-maxrregcount=32"]
    command = [nvcc, *flags, "-cubin", str(source), "-o", str(tmp_path / "cubin")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    (found,) = usages(done.stdout)
    assert (found.name, found.registers) == ("spilling", 32)
    assert found.spilled > 0


def test_the_report_is_read():
    """A kernel, and a function that it calls, as nvcc 13.0 reports them."""
    report = """\
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z6kernelPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compile time = 11.654 ms
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    kernel, helper = usages(report)
    assert kernel[0] == "sm_90"
    assert kernel[2:] == (255, 16, 20)
    assert helper == ("sm_90", "helper", None, 0, 0)
