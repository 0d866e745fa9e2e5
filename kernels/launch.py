"""How kernels are launched: on the device of their tensors, on its current stream, with tiles that were timed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself reads it, when a kernel is defined
_NOTHING = nullcontext()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one; Triton launches on that device's current stream."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


Configs = Callable[..., Sequence[triton.Config]]
_MAX_COMPILED = 1000  # calls of a kernel that are remembered
_COMPILERS = 16  # threads, at most
_TIMING = {"warmup": 5, "rep": 25}  # milliseconds of a configuration


@contextmanager
def compiling_side_by_side() -> Iterator[None]:
    """What is warmed up in this context is compiled by several threads where this Triton can; it takes seconds each.

    A compilation that fails raises at the launch of its kernel, where a tuner heeds it, not here.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        yield
        return
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _COMPILERS)) as pool, mode(pool) as active:
        try:
            yield
        finally:
            # The mode would raise before it ends, up to Triton 3.7, and stay for good: no other could begin.
            futures = getattr(active, "raw_futures", [])
            wait(futures)
            futures[:] = [future for future in futures if future.exception() is None]


def architecture() -> int:
    """Of the current device: 90 for compute capability 9.0."""
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Tuned:
    """A kernel whose tile is timed at the first call of a kind: make it before a CUDA graph is captured.

    A capture that nothing was timed for takes the first configuration, and leaves the choice to a later call.
    `triton.autotune` and Triton itself prepare every call anew, which takes longer than most kernels run; here a call
    like an earlier one launches what was compiled for that.
    """

    def __init__(
        self,
        kernel: Any,
        configs: Configs,
        kind: Callable[..., Any],
        zero: Sequence[str] = (),
        any_value: Sequence[str] = (),
    ):
        self.fn, self.configs, self.kind, self.zero = kernel, configs, kind, zero
        self.any_value = {kernel.arg_names.index(name) for name in any_value}
        self.chosen: dict[Any, dict[str, Any]] = {}
        self.compiled: dict[Any, tuple[Any, Any, list[Any]]] = {}

    def __getitem__(self, grid: Callable[[dict[str, Any]], tuple[int, ...]]) -> Callable[..., None]:
        return functools.partial(self.run, grid)

    def run(self, grid: Callable[[dict[str, Any]], tuple[int, ...]], *args: Any, **kwargs: Any) -> None:
        like = _likeness(args, kwargs, self.any_value)
        ready = self.compiled.get(like)
        if ready is not None:
            kernel, options, constants = ready
            kernel[(*grid(options), 1, 1)](*args, *constants)
            return
        kind = args[0].get_device(), self.kind(*args, **kwargs)
        timed = kind in self.chosen
        options = self.chosen[kind] if timed else self.choose(grid, args, kwargs)
        kernel = self.fn[grid](*args, **kwargs, **options)
        if not timed and _capturing():
            return  # the next call that is not captured finds out what is fastest
        self.chosen[kind] = options
        if not INTERPRETED:
            if len(self.compiled) >= _MAX_COMPILED:
                self.compiled.clear()
            given = kwargs | options
            self.compiled[like] = kernel, options, [given[name] for name in self.fn.arg_names[len(args) :]]

    def choose(self, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of the fastest configuration."""
        configs = list(self.configs(*args, **kwargs))
        if INTERPRETED:  # tiles are small, so that small tensors have several
            return dict.fromkeys(configs[0].kwargs, 16)
        if len(configs) == 1 or _capturing():
            return configs[0].all_kwargs()
        with compiling_side_by_side():
            for config in configs:
                self.fn.warmup(*args, grid=(1,), **kwargs, **config.all_kwargs())
        timed = functools.partial(triton.testing.do_bench, **_TIMING)
        tuner = triton.autotune(configs, [], pre_hook=self._clear, do_bench=timed)(self.fn)
        tuner[grid](*args, **kwargs)
        return tuner.best_config.all_kwargs()

    def _clear(self, args: dict[str, Any], reset_only: bool = False) -> None:
        for name in self.zero:
            if args[name] is not None:
                args[name].zero_()


def _likeness(args: tuple[Any, ...], kwargs: dict[str, Any], any_value: Set[int] = frozenset()) -> tuple[Any, ...]:
    """Everything that Triton compiles for: of tensors the dtype and whether addresses are multiples of 16, of integers
    the value, unless it counts as any.
    """
    of_args: list[Any] = []
    addresses = 0
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor):
            of_args.append(arg.dtype)
            addresses |= arg.data_ptr()
        else:
            of_args.append(arg if type(arg) is int and i not in any_value else type(arg))
    aligned = True if addresses % 16 == 0 else tuple(isinstance(a, Tensor) and a.data_ptr() % 16 == 0 for a in args)
    return (args[0].get_device(), aligned, *of_args, *kwargs.values())


def tuned(configs: Configs, kind: Callable[..., Any], zero: Sequence[str] = ()) -> Callable[[Any], Tuned]:
    """Makes a kernel a `Tuned` one.

    `configs` and `kind` get the arguments of the kernel.  A kernel's configurations must sum in the same order, so that
    the choice changes no bit of a result.  `zero` names results, which may be None, that not every configuration writes
    in full.
    """
    return lambda kernel: Tuned(kernel, configs, kind, zero)


def launched_directly(warps: int = 4, any_value: Sequence[str] = ()) -> Callable[[Any], Tuned]:
    """Makes a kernel a `Tuned` one with nothing to time, for the sake of its launches.

    `any_value` names integers that are not specialised.
    """
    configs = [triton.Config({}, num_warps=warps)]
    return lambda kernel: Tuned(kernel, lambda *_, **__: configs, lambda *_, **__: None, any_value=any_value)
