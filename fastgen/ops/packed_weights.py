"""Convolution weights in the layout of the native kernels, packed once and kept as long as the weight lives; and other
tensors that are computed from weights.

A pack is served only while it is known to be that of the weight: same tensor object, memory, strides and version
counter (which every in-place operation of PyTorch advances: optimiser steps, `load_state_dict`, initialisers), and the
same fingerprint, a hash of 64 runs of 512 bytes spread evenly over the weights (all of them below 32 KiB). The
fingerprint is for writes past the version counter, as through ``weight.data`` or a NumPy view: it sees those that touch
the whole tensor, and may miss one that changes a few elements of a large one; follow such a write by
``torch.autograd.graph.increment_version(weight)``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastgen import backends
from fastgen._memory import empty_in_large_pages

_MAX_COMPUTED = 4  # kept of one weight, which may be followed by different norms
_MAX_LAYOUTS = 16  # kept of one weight; layouts differ between forward, backward, and very small and other images


class _Pack:
    """`kept`: somebody may have it for longer than a call; `borrowers`: calls that read it now."""

    def __init__(self, memory: Tensor):
        self.memory, self.kept, self.borrowers = memory, False, 0


class _Entry(NamedTuple):
    state: tuple[Any, ...]
    packs: dict[tuple[int, bytes], _Pack]
    spare: dict[tuple[int, bytes], Tensor]  # of what the weight was before: memory that nobody reads any more


_entries = WeakTensorKeyDictionary()
_computed = WeakTensorKeyDictionary()
_lock = threading.Lock()  # of all entries and what is in them


def packed_weight(weight: Tensor, plan: Any, threads: int, *, out_channels_first: bool = False) -> Tensor:
    """`weight` packed for a plan: [Cin, Cout / groups, kh, kw] of a transposed convolution, or `out_channels_first`
    [Cout, Cin / groups, kh, kw] of an ordinary one (the gradient of the input of either is the other).
    """
    if weight.is_inference():  # has no version counter
        return _pack(weight, plan, threads, out_channels_first)
    pack = _find(weight, plan, threads, out_channels_first)
    pack.kept = True
    return pack.memory


@contextmanager
def borrowed_weight(weight: Tensor, plan: Any, threads: int, *, out_channels_first: bool = False) -> Iterator[Tensor]:
    """The same for one call, whose memory the pack of a changed weight may take afterwards: in training, where touching
    new memory takes three times as long as packing.
    """
    if weight.is_inference():
        yield _pack(weight, plan, threads, out_channels_first)
        return
    pack = _find(weight, plan, threads, out_channels_first)
    try:
        yield pack.memory
    finally:
        with _lock:
            pack.borrowers -= 1


def _find(weight: Tensor, plan: Any, threads: int, out_channels_first: bool) -> _Pack:
    """With one borrower more, so that no other thread takes its memory."""
    state, key = tensor_state(weight), (backends.native_cpu().isa(), plan.layout)
    with _lock:
        entry = _entries.get(weight)
        if entry is None or entry.state != state:
            old = {} if entry is None else entry.packs
            spare = {k: pack.memory for k, pack in old.items() if not (pack.kept or pack.borrowers)}
            entry = _entries[weight] = _Entry(state, {}, spare)
        pack = entry.packs.get(key)
        if pack is not None:
            pack.borrowers += 1
            return pack
        memory = entry.spare.pop(key, None)
    pack = _Pack(_pack(weight, plan, threads, out_channels_first, memory))
    pack.borrowers = 1
    with _lock:
        if len(entry.packs) >= _MAX_LAYOUTS:
            entry.packs.clear()
        entry.packs[key] = pack
    return pack


def kept(tensors: Sequence[Tensor | None], option: Any, compute: Callable[[], Any]) -> Any:
    """The result of `compute`, or what it was before if none of the tensors (the first is no None) has changed since.

    `option` distinguishes what else is computed from the same tensors.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.is_inference() for tensor in given):  # has no version counter
        return compute()
    state = [tensor_state(tensor) for tensor in given]
    entries = _computed.setdefault(given[0], {})
    key = (option, *(id(tensor) for tensor in tensors[1:]))
    entry = entries.get(key)
    if entry is None or entry[0] != state:
        if len(entries) >= _MAX_COMPUTED:
            entries.clear()
        # So that the result has a version counter, too; and no graph, which would keep its sources for good:
        # leaving inference mode turns gradients on.
        with torch.inference_mode(False), torch.no_grad():
            entry = entries[key] = (state, compute())
    return entry[1]


def tensor_state(tensor: Tensor) -> tuple[Any, ...]:
    """What differs once a tensor (not one of inference mode) was written to; the fingerprint, on the CPU alone."""
    pointer, strides = tensor.data_ptr(), tensor.stride()
    fingerprint = _fingerprint()
    if fingerprint is None or tensor.device.type != "cpu":
        return pointer, strides, tensor._version
    return pointer, strides, tensor._version, fingerprint(pointer, span_bytes(tensor))


def span_bytes(tensor: Tensor) -> int:
    """From the first to the last element."""
    span = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return span * tensor.element_size()


@functools.cache
def _fingerprint() -> Any:
    return None if backends.import_error("_cpu") else backends.native_cpu().fingerprint


def _pack(weight: Tensor, plan: Any, threads: int, out_channels_first: bool, memory: Tensor | None = None) -> Tensor:
    native, dtype = backends.native_cpu(), str(weight.dtype).removeprefix("torch.")
    packed, size = memory, getattr(native, f"conv_packed_size_{dtype}")(plan)
    if packed is None or packed.dtype != weight.dtype or packed.numel() != size:  # as after `module.double()`
        packed = empty_in_large_pages(size, weight.dtype)
    first, second, y, x = weight.stride()
    channels = (second, first) if out_channels_first else (first, second)
    strides = (weight.shape[0] // plan.groups * first, *channels, y, x)
    getattr(native, f"conv_pack_{dtype}")(plan, weight.data_ptr(), strides, packed.data_ptr(), threads)
    return packed
