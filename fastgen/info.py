"""What fastgen finds on this machine: `fastgen info`, and the first thing to paste into a bug report."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from fastgen import __version__, backends

# The environment variables that change what fastgen does. OpenMP's apply to PyTorch's operations as well.
ENVIRONMENT = {
    "FASTGEN_BACKEND": "backend of every operation: auto, reference, cpu, triton, cuda",
    "FASTGEN_ISA": "instruction set of the C++ kernels: baseline, avx2, avx512, avx512bf16",
    "FASTGEN_REUSE_MEMORY": "0: large results do not come in the memory of earlier ones",
    "FASTGEN_DEBUG": "1 shows the traceback of an error of the command line",
    "FASTGEN_CACHE": "folder of cached files (default: fastgen in XDG_CACHE_HOME or ~/.cache)",
    "FASTGEN_CUDA": "at build time: 0 leaves out the CUDA module, 1 insists on it, auto builds it where nvcc is found",
    "FASTGEN_CUDA_ARCHS": "at build time: GPU architectures, for instance 80;90a",
    "FASTGEN_SANITIZE": "at build time: sanitizers of the C++ module, for instance address,undefined",
    "OMP_NUM_THREADS": "threads of PyTorch and of the C++ kernels (torch.set_num_threads changes it)",
    "OMP_PROC_BIND": "whether OpenMP threads stay on their cores",
    "OMP_PLACES": "the cores that OpenMP threads may use",
    "OMP_WAIT_POLICY": "whether idle OpenMP threads spin (active) or sleep (passive)",
    "GOMP_SPINCOUNT": "how long idle threads of GCC's OpenMP spin",
    "TRITON_INTERPRET": "1 runs Triton kernels on the CPU, slowly, for tests",
}

_FEATURES = "sse2 avx avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512_vnni amx_bf16 asimd bf16 sve"


def collect() -> dict[str, Any]:
    """Versions, processor, native modules, GPUs, OpenMP runtimes, threads and environment; JSON-able, never raises."""
    return {
        "fastgen": {"version": __version__, "path": str(Path(__file__).parent)},
        "versions": _versions(),
        "processor": _processor(),
        "cpu": _cpu_module(),
        "cuda": _cuda_module(),
        "backends": _backends(),
        "sampler": _sampler(),
        "openmp": openmp_runtimes(),
        "threads": {"intra-op": torch.get_num_threads(), "inter-op": torch.get_num_interop_threads()},
        "environment": _environment(),
    }


def render(info: dict[str, Any] | None = None) -> str:
    """The facts of `collect` as text: a heading per group, and under it a line ``name  value`` per fact."""
    lines = []
    for group, values in (collect() if info is None else info).items():
        lines.append(group)
        if isinstance(values, list):
            values = {str(number): value for number, value in enumerate(values, 1)}
        width = max(map(len, values), default=0)
        lines += [f"  {name:<{width}}  {_text(value)}" for name, value in values.items()] or ["  none"]
    return "\n".join(lines)


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process (more than one compete for the cores); empty without /proc."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/.*/lib[gi]?omp[^/]*\.so.*", maps)))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value'] if value['value'] is not None else '-':<12}  {value['meaning']}"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "numpy", "safetensors", "scikit-learn", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _processor() -> dict[str, Any]:
    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = fields.get("flags", fields.get("Features", "")).split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "usable cores": usable,
        "features": [feature for feature in _FEATURES.split() if feature in flags],
    }


def _cpu_module() -> dict[str, Any]:
    reason = backends.import_error("_cpu")
    if reason is not None:
        return {"loaded": f"no: {reason}"}
    native = backends.native_cpu()
    facts = {"loaded": "yes", "compiler": native.compiler, "instruction sets": native.isas()}
    try:
        facts["chosen"] = native.isa()
    except RuntimeError as error:  # FASTGEN_ISA names one that this processor lacks
        facts["chosen"] = f"none: {error}"
    return {**facts, "sanitizers": native.sanitize or None}


def _cuda_module() -> dict[str, Any]:
    reason = backends.import_error("_cuda")
    if reason is not None:
        return {"loaded": f"no: {reason}"}
    native = backends.native_cuda()
    version = native.runtime_version()
    return {
        "loaded": "yes",
        "runtime": f"{version // 1000}.{version % 1000 // 10}",
        "compiled for": native.archs.split(";"),
        "devices": native.device_count(),
        "torch": torch.version.cuda or "built without CUDA",
        "GPUs": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _backends() -> dict[str, str]:
    """Each backend with the operations that it implements, or the reason why it cannot be used."""
    for module in ("ops", "sampling.sampler"):
        importlib.import_module(f"fastgen.{module}")  # registers them
    offers = backends.operations()
    return {
        name: backends.unavailable(name)
        or " ".join(op for op, names in offers.items() if name in names)
        or "no operation yet"
        for name in backends.BACKENDS
    }


def _sampler() -> dict[str, str]:
    """Whether each executor of a `Sampler` draws here without being asked for, or why not."""
    gpu = torch.cuda.is_available()
    reasons = backends.reasons("sample_plan", torch.empty(0, device="cuda" if gpu else "cpu"))
    reasons["cpu"] = backends.unavailable("cpu")  # takes models on a GPU, too
    if not gpu:
        reasons |= {name: backends.unavailable(name) or "torch sees no GPU" for name in ("triton", "cuda")}
    return {name: "yes" if reason is None else f"no: {reason}" for name, reason in reasons.items()}


def _environment() -> dict[str, dict[str, str | None]]:
    prefixes = ("FASTGEN_", "OMP_", "GOMP_", "KMP_")
    others = sorted(name for name in os.environ if name.startswith(prefixes) and name not in ENVIRONMENT)
    meanings = {**ENVIRONMENT, **dict.fromkeys(others, "not read by fastgen")}
    return {name: {"value": os.environ.get(name), "meaning": meaning} for name, meaning in meanings.items()}
