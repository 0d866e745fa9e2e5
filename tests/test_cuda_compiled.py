"""Every CUDA file, compiled for GPUs that are not there: it compiles, and spills no register."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90", "100")
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))

# What `nvcc -Xptxas=-v` says of each function; those that are called, not launched, have no line of registers.
FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(\n.*?Used (?P<registers>\d+) registers)?"
)


class Usage(NamedTuple):
    """What a function takes of a GPU; registers are None where its caller's count."""

    name: str
    registers: int | None
    stack: int
    spilled: int


def usages(report: str) -> list[Usage]:
    """Of every function that ptxas reports."""
    return [
        Usage(
            readable(found["name"]),
            int(found["registers"]) if found["registers"] else None,
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in FUNCTION.finditer(report)
    ]


def readable(name: str) -> str:
    """A mangled name without namespaces and arguments, where there is a c++filt."""
    if shutil.which("c++filt") is None:
        return name
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\b\w+::|\([^()]*\)$|^void ", "", full.replace("(anonymous namespace)::", ""))


class Compile:
    """Compiles a file for one GPU, to be waited for."""

    def __init__(self, setup, nvcc: str, source: Path, arch: str, folder: Path, *flags: str):
        target = folder / f"{source.stem}.{arch}.cubin"
        command = [nvcc, *setup.CUDA_FLAGS.split(), "-Xptxas=-v", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", *flags]
        self.process = subprocess.Popen(
            [*command, "-cubin", str(source), "-o", str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def usages(self) -> list[Usage]:
        report, _ = self.process.communicate()
        assert self.process.returncode == 0, report[-4000:]
        return usages(report)


@pytest.fixture
def nvcc(setup) -> str:
    found = setup.find_nvcc()
    if found is None or shutil.which(found) is None:
        pytest.skip("CUDA files are not compiled: no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(setup, nvcc, source, monkeypatch, tmp_path, tell: Callable[[str], None]):
    monkeypatch.delenv("FASTGEN_CUDA_ARCHS", raising=False)
    known = [arch for arch in ARCHS if arch in setup.find_archs(nvcc)]
    assert known, f"{nvcc} knows none of the architectures {', '.join(ARCHS)}"
    running = {arch: Compile(setup, nvcc, source, arch, tmp_path) for arch in known}
    spilled = []
    for arch, compiling in running.items():
        for found in compiling.usages():
            registers = "      -" if found.registers is None else f"{found.registers:7}"
            tell(f"sm_{arch:4}{registers} registers {found.stack:5} stack {found.spilled:5} spilled  {found.name}")
            if found.spilled:
                spilled.append((arch, found))
    assert not spilled


def test_a_spill_is_seen(setup, nvcc, tmp_path):
    """32 registers are not enough for 64 numbers that are all needed at the end."""
    numbers = range(64)
    load = "".join(f"  float v{i} = x[{i} * n];\n" for i in numbers)
    mixed = "".join(f"  v{i} = v{i} * v{(i + 1) % 64} + v{(7 * i) % 64};\n" for i in numbers)
    store = "".join(f"  x[{i} * n] = v{i};\n" for i in numbers)
    source = tmp_path / "spilling.cu"
    source.write_text(f"__global__ void spilling(float* x, int n) {{\n  x += threadIdx.x;\n{load}{mixed}{store}}}\n")
    arch = setup.find_archs(nvcc)[0]
    (found,) = Compile(setup, nvcc, source, arch, tmp_path, "-maxrregcount=32").usages()
    assert (found.name, found.registers) == ("spilling", 32)
    assert found.spilled > 0
    (found,) = Compile(setup, nvcc, source, arch, tmp_path).usages()
    assert found.spilled == 0


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
    assert kernel[1:] == (255, 16, 20)
    assert helper == ("helper", None, 0, 0)
