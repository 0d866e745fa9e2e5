"""Which implementation of an operation runs, and why not the others.

Every operation has a `reference` implementation in plain PyTorch; `cpu` (C++), `triton` and `cuda` (CUDA C++) may stand beside it.
`select` takes the first of cuda, triton, cpu, reference that can serve the call, and logs once why a better one could not.
``FASTGEN_BACKEND=name`` or ``with fastgen.backend("name"):`` forces one; forced and impossible is a RuntimeError with the reason.
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
from types import ModuleType
from typing import Any, NamedTuple

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")  # in order of preference

_log = logging.getLogger("fastgen")
_logged: set[tuple[str, str]] = set()
_forced: ContextVar[str | None] = ContextVar("fastgen.backend", default=None)

WhyNot = Callable[..., "str | None"]


class _Entry(NamedTuple):
    function: Callable[..., Any]
    why_not: WhyNot | None


_registry: dict[str, dict[str, _Entry]] = {}


def register(op: str, backend: str, function: Callable[..., Any], *, why_not: WhyNot | None = None) -> None:
    """Makes `function` the implementation of `op` by `backend`.

    `why_not` is called with the arguments of the operation and returns None when the implementation can serve the call,
    else the reason in words. Whether the native module or Triton is there, and the device of the first tensor, are checked
    beforehand. Reasons name kinds (a dtype, a layout), not sizes: each new one is logged.
    """
    _check_name(backend)
    _registry.setdefault(op, {})[backend] = _Entry(function, why_not)


def select(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The implementation that serves `op` called with these arguments.

    Raises:
        RuntimeError: the forced backend cannot serve the call, or no backend can.
    """
    entries = _entries(op)
    forced = _forced.get() or _environment()
    if forced != "auto":
        reason = _reason(op, forced, args, kwargs)
        if reason is not None:
            raise RuntimeError(f"{op}: the backend {forced!r} was asked for, but cannot be used: {reason}")
        return entries[forced].function
    skipped = []
    for backend in BACKENDS:
        if backend not in entries:
            continue
        reason = _reason(op, backend, args, kwargs)
        if reason is None:
            for other, why in skipped:
                _log_once(op, backend, other, why)
            return entries[backend].function
        skipped.append((backend, reason))
    raise RuntimeError(f"{op}: no backend can be used: " + "; ".join(f"{name}: {why}" for name, why in skipped))


def reasons(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Why each backend could not serve `op` called with these arguments; None for those that could."""
    _entries(op)
    return {backend: _reason(op, backend, args, kwargs) for backend in BACKENDS}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend within a ``with`` block, for this thread and context only; "auto" returns to the free choice.

    Raises:
        ValueError: `name` is none of auto, reference, cpu, triton, cuda.
    """
    token = _forced.set(_check_name(name, "auto"))
    try:
        yield
    finally:
        _forced.reset(token)


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
        if error.name != f"fastgen.{module}":
            return f"fastgen.{module} does not import: {error}"
        if module == "_cuda" and import_error("_cpu") is None:
            built = native_cpu().cuda_build
            return f"fastgen._cuda was {built}; install the CUDA toolkit and fastgen again with FASTGEN_CUDA=1"
        return f"fastgen.{module} is not in {os.path.dirname(fastgen.__file__)}; in the checkout: python -m pip install -e ."
    except ImportError as error:
        return f"fastgen.{module} does not import: {error}"
    if native.version != fastgen.__version__:
        return f"fastgen.{module} was built for version {native.version}, this is {fastgen.__version__}; install again"
    return None


def _native(module: str) -> ModuleType:
    reason = import_error(module)
    if reason is not None:
        raise RuntimeError(reason)
    return importlib.import_module(f"fastgen.{module}")


@functools.cache
def _triton_error() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed; pip install 'fastgen[triton]'"


def _unavailable(backend: str) -> str | None:
    """Why the backend cannot run in this process, whatever the call."""
    if backend == "cpu":
        return import_error("_cpu")
    if backend == "cuda":
        return import_error("_cuda")
    if backend == "triton":
        return _triton_error()
    return None


def _wrong_device(backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if backend == "reference" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    wanted = "cpu" if backend == "cpu" else "cuda"
    device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    return None if device is None or device.type == wanted else f"it takes {wanted} tensors, this one is on {device}"


def _reason(op: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    entry = _registry[op].get(backend)
    if entry is None:
        return f"{op} has no {backend} implementation"
    reason = _wrong_device(backend, args, kwargs) or _unavailable(backend)
    if reason is None and entry.why_not is not None:
        reason = entry.why_not(*args, **kwargs)
    return reason


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
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"FASTGEN_BACKEND must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


def _log_once(op: str, chosen: str, backend: str, reason: str) -> None:
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        _log.warning("%s: %s instead of %s: %s", op, chosen, backend, reason)
