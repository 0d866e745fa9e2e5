"""Which implementation of an operation runs, and why not the others.

Every operation has a `reference` implementation in plain PyTorch; `cpu` (C++), `triton` and `cuda` (CUDA C++) may stand
beside it. `select` takes the first of cuda, triton, cpu, reference that is made for the device and can serve the call,
and logs once why a better one could not. ``FASTGEN_BACKEND=name`` or ``with fastgen.backend("name"):`` forces one;
forced and impossible is a RuntimeError with the reason.

`select` is for eager code: torch.compile cannot trace it (it reads a context variable), so an operation either calls it
inside its registered torch.library implementation, or takes that opaque way when ``torch.compiler.is_compiling()``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

OLDEST_TRITON = (3, 5)  # older ones compile no tuples, or have no `constexpr_function`
# In order of preference, with the device that the backend is made for (None: any).
BACKENDS: dict[str, str | None] = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "reference": None}

_log = logging.getLogger("fastgen")
_logged: set[tuple[str, str, str]] = set()
_forced: ContextVar[str | None] = ContextVar("fastgen.backend", default=None)

WhyNot = Callable[..., "str | None"]


class _Entry(NamedTuple):
    function: Callable[..., Any]
    why_not: WhyNot | None


_registry: dict[str, dict[str, _Entry]] = {}  # op -> backend -> entry, backends in order of preference


def register(op: str, backend: str, function: Callable[..., Any], *, why_not: WhyNot | None = None) -> None:
    """Makes `function` the implementation of `op` by `backend`.

    `why_not` is called with the arguments of the operation and returns None when the implementation can serve the call,
    else the reason in words. That the backend is installed and that the first tensor is on its device is known by then.
    Reasons name kinds (a dtype, a layout), not sizes: each new one is logged.
    """
    entries = {**_registry.get(op, {}), _check_name(backend): _Entry(function, why_not)}
    _registry[op] = {name: entries[name] for name in BACKENDS if name in entries}


def select(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The implementation that serves `op` called with these arguments.

    Raises:
        RuntimeError: the forced backend cannot serve the call, or no backend can.
    """
    entries = _entries(op)
    device = _device_type(args, kwargs)
    forced = asked()
    if forced != "auto":
        reason = _reason(op, forced, device, args, kwargs)
        if reason is not None:
            raise RuntimeError(f"{op}: the backend {forced!r} was asked for, but cannot be used: {reason}")
        return entries[forced].function
    for name, entry in entries.items():
        if BACKENDS[name] not in (None, device):
            continue
        reason = _reason(op, name, device, args, kwargs)
        if reason is None:
            return entry.function
        log_once(op, name, reason)
    raise RuntimeError(f"{op}: no backend can be used: {reasons(op, *args, **kwargs)}")


def asked() -> str:
    """The backend that is forced here; "auto" where none is."""
    return _forced.get() or _environment()


def is_free(name: str) -> bool:
    """Whether no backend is forced, and this one can run in this process."""
    return _forced.get() in (None, "auto") and _environment() == "auto" and unavailable(name) is None


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; there is none for meta tensors."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def reasons(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Why each backend could not serve `op` called with these arguments; None for those that could."""
    _entries(op)
    device = _device_type(args, kwargs)
    return {name: _reason(op, name, device, args, kwargs) for name in BACKENDS}


def operations() -> dict[str, list[str]]:
    """The backends that implement each operation imported so far, in order of preference."""
    return {op: list(entries) for op, entries in sorted(_registry.items())}


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why a backend cannot run in this process, whatever the call; None if it can."""
    if backend == "triton":
        return _why_no_triton()
    return None if backend == "reference" else import_error(f"_{backend}")


def _why_no_triton() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "triton is not installed: pip install 'fastgen[triton]'"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {version} is too old: it takes {oldest} or newer, which torch 2.9 comes with"
    return None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend within a ``with`` block, for this thread and context only; "auto" returns to the free choice.

    A backward pass on a GPU runs on a thread of autograd's, which chooses freely; ``FASTGEN_BACKEND`` forces it, too.

    Raises:
        ValueError: `name` is none of auto, reference, cpu, triton, cuda.
    """
    token = _forced.set(_check_name(name, "auto"))
    try:
        yield
    finally:
        _forced.reset(token)


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """`function` of `fastgen.kernels.module`, which is imported when it is called: not everybody has Triton."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastgen.kernels.{module}"), function)(*args)

    return call


def why_not_triton(tensor: torch.Tensor) -> str | None:
    """What all Triton kernels ask of a call, given its first tensor."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, got {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"it takes strided tensors, got {tensor.layout}"
    if tensor.is_cuda and _capability(tensor.device) < (8, 0):
        return "it takes GPUs of compute capability 8.0 and newer"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; PyTorch takes a while to say."""
    return torch.cuda.get_device_capability(device)


def native_cpu() -> ModuleType:
    """The module `fastgen._cpu`; a RuntimeError that says what to do where it cannot be imported."""
    return _native("_cpu")


def native_cuda() -> ModuleType:
    """The module `fastgen._cuda`; a RuntimeError that says what to do where it cannot be imported."""
    return _native("_cuda")


@functools.cache
def import_error(module: str) -> str | None:
    """Why `_cpu` or `_cuda` cannot be imported, and what to do; None if it can."""
    import fastgen

    try:
        native = importlib.import_module(f"fastgen.{module}")
    except ModuleNotFoundError as error:
        if error.name == f"fastgen.{module}":
            return _not_built(module, Path(fastgen.__file__).parent)
        return f"fastgen.{module} does not import: {error}"
    except ImportError as error:
        return f"fastgen.{module} does not import: {error}"
    if native.version != fastgen.__version__:
        return f"fastgen.{module} was built for version {native.version}, this is {fastgen.__version__}: install again"
    return None


def _not_built(module: str, package: Path) -> str:
    if module == "_cuda" and import_error("_cpu") is None:
        return (
            f"fastgen._cuda was {native_cpu().cuda_build}; it needs nvcc, and FASTGEN_CUDA=1 when fastgen is installed"
        )
    return f"fastgen.{module} is not in {package}: run 'python -m pip install -e .' in the checkout"


@functools.cache
def _native(module: str) -> ModuleType:
    reason = import_error(module)
    if reason is not None:
        raise RuntimeError(reason)
    return importlib.import_module(f"fastgen.{module}")


def _device_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Device type of the first tensor, which may be in a list; cpu where there is none."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, torch.Tensor):
            return first.device.type
    return "cpu"


def _reason(op: str, backend: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    entry = _registry[op].get(backend)
    if entry is None:
        return f"{op} has no {backend} implementation"
    reason = unavailable(backend)
    if reason is not None:
        return reason
    wanted = BACKENDS[backend]
    if wanted not in (None, device) and not (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it takes {wanted} tensors, got one on {device}"
    return entry.why_not(*args, **kwargs) if entry.why_not else None


def _entries(op: str) -> dict[str, _Entry]:
    if op not in _registry:
        raise ValueError(f"op must be one of {', '.join(sorted(_registry))}; got {op!r}")
    return _registry[op]


def _check_name(name: str, *more: str) -> str:
    if name not in (*BACKENDS, *more):
        raise ValueError(f"backend must be one of {', '.join((*more, *BACKENDS))}; got {name!r}")
    return name


@functools.cache
def _environment() -> str:
    """FASTGEN_BACKEND, read once."""
    name = os.environ.get("FASTGEN_BACKEND") or "auto"
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"FASTGEN_BACKEND must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


def log_once(op: str, backend: str, reason: str) -> None:
    """Says why an automatic choice does without a backend."""
    if (op, backend, reason) not in _logged:
        _logged.add((op, backend, reason))
        _log.warning("%s does without the %s backend: %s", op, backend, reason)
