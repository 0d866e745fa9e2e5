"""Several `conv_transpose2d_bn_act` one after the other. For one image it is the calls that cost: here they are one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv_block import goes_straight
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_transpose2d_bn_act import conv_transpose2d_bn_act
from fastgen.ops.packed_weights import packed_weight, span_bytes

BLOCK_TENSORS = 6  # weight, bias, running_mean, running_var, bn_weight, bn_bias
_GEOMETRY = Options._fields[:5]
_MAX_KEPT = 256  # of one first weight and way, for inputs of other sizes; some 10 KB each

Blocks = tuple[tuple[Any, ...], ...]

# By the identity of the first weight, as long as it lives; by how it is computed; by shape and strides of the input.
_kept: dict[int, dict[tuple[Any, ...], dict[tuple[Any, ...], _Sequence]]] = {}


def conv_transpose2d_bn_act_sequence(
    input: Tensor, tensors: Sequence[Tensor | None], blocks: Blocks, contiguous: bool = False
) -> Tensor:
    """The last result of `conv_transpose2d_bn_act` applied in turn, each to the result of the one before.

    Args:
        input: [N, Cin, H, W].
        tensors: weight, bias, running_mean, running_var, bn_weight and bn_bias of the first block, then of the second,
            and so on.
        blocks: `Options` of each block, as a tuple.
        contiguous: whether the result is made contiguous.
    """
    result = _apply(input, tensors, blocks, contiguous)
    return result.contiguous() if contiguous else result


def _apply(input: Tensor, tensors: Sequence[Tensor | None], blocks: Blocks, contiguous: bool) -> Tensor:
    """The result, of any strides."""
    if torch.compiler.is_compiling() or not isinstance(input, Tensor):
        return _one_by_one(input, tensors, blocks)
    # What is kept is for tensors that went straight, and notices others, but not that they want gradients now.
    if not goes_straight((input, *tensors) if torch.is_grad_enabled() else (input,)):
        return _one_by_one(input, tensors, blocks)
    first, size = id(tensors[0]), (input.shape, input.stride())
    how = input.dtype, blocks, contiguous, torch.get_num_threads(), backends.native_cpu().isa()
    sizes = _kept.get(first, {}).get(how, {})
    if size in sizes:
        output = sizes[size](input, tensors)
        if output is not None:
            return output
        _kept[first].clear()  # the others would notice, too, and keep old packs until then
        sizes = {}
    if not goes_straight((input, *tensors)):
        return _one_by_one(input, tensors, blocks)
    if sizes and input.numel():
        known = next(iter(sizes.values()))
        if not known.seen.still(tensors):
            _kept[first].clear()
        elif (sequence := known.resized(input, tensors)) is not None:
            output = sequence(input, tensors)
            if output is not None:
                _keep(sequence, first, how, size)
                return output
    calls: list[cpu.Inference | None] = []
    output = _one_by_one(input, tensors, blocks, calls)
    dense = all(tensor is None or (tensor.is_contiguous() and not tensor.is_inference()) for tensor in tensors)
    if dense and all(call is not None and call.scratch for call in calls):
        if first not in _kept:
            weakref.finalize(tensors[0], _kept.pop, first, None).atexit = False
            _kept[first] = {}
        _keep(_Sequence(tensors, calls, contiguous), first, how, size)  # type: ignore[arg-type]
    return output


def _keep(sequence: _Sequence, first: int, how: tuple[Any, ...], size: tuple[Any, ...]) -> None:
    sizes = _kept[first].setdefault(how, {})
    if len(sizes) >= _MAX_KEPT:
        sizes.clear()
    sizes[size] = sequence


def _one_by_one(
    input: Tensor, tensors: Sequence[Tensor | None], blocks: Blocks, calls: list[cpu.Inference | None] | None = None
) -> Tensor:
    """`calls` gets what served the blocks."""
    for i, block in enumerate(blocks):
        weight, *channels = tensors[i * BLOCK_TENSORS : (i + 1) * BLOCK_TENSORS]
        assert weight is not None
        *geometry, _, eps, activation, parameter = block
        options: dict[str, Any] = dict(zip(_GEOMETRY, geometry, strict=True))
        options |= {"eps": eps, "activation": activation, "negative_slope": parameter, "alpha": parameter}
        output = conv_transpose2d_bn_act(input, weight, *channels, **options)
        if calls is not None:
            calls.append(cpu.served((input, weight, *channels), block))
        input = output
    return input


class _Sequence:
    """Of inputs that are alike, and blocks that were served one by one."""

    def __init__(self, tensors: Sequence[Tensor | None], calls: Sequence[cpu.Inference], contiguous: bool):
        dtype = str(tensors[0].dtype).removeprefix("torch.")  # type: ignore[union-attr]
        self.native = getattr(backends.native_cpu(), f"ConvSequence_{dtype}")(contiguous)
        self.packs = []  # that the native sequence reads
        for i, call in enumerate(calls):
            weight, *channels = tensors[i * BLOCK_TENSORS : (i + 1) * BLOCK_TENSORS]
            assert weight is not None
            packed = packed_weight(weight, call.plan, call.threads)
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in channels]
            memory = weight.data_ptr(), span_bytes(weight)
            self.native.add(call.plan, call.threads, packed.data_ptr(), addresses, *call.act, *memory)
            self.packs.append(packed)
        self.seen = backends.native_cpu().SeenTensors(tensors)
        self.format = torch.contiguous_format if contiguous else torch.channels_last
        self.batch, self.strides = calls[0].shape[0], calls[0].strides
        self.shape, self.sums = calls[-1].shape, calls[-1].sums
        self.scratch = self.native.scratch_size(self.batch, self.strides)

    def resized(self, input: Tensor, tensors: Sequence[Tensor | None]) -> _Sequence | None:
        """For inputs of another size and the same tensors; None if a block does not take what it would get."""
        if input.dim() != 4:
            return None
        batch, channels, *size = input.shape
        threads = torch.get_num_threads()
        found = self.native.resized(batch, channels, size, threads)
        if found is None:
            return None
        other = copy.copy(self)
        other.native, unpacked = found
        other.packs = list(self.packs)
        for i in unpacked:
            weight = tensors[i * BLOCK_TENSORS]
            assert weight is not None
            other.packs[i] = packed_weight(weight, other.native.plan(i), threads)
            other.native.set_packed(i, other.packs[i].data_ptr())
        other.batch, other.strides = batch, input.stride()
        other.shape = (batch, self.shape[1], *other.native.plan(len(self.packs) - 1).out_size)
        other.scratch = other.native.scratch_size(batch, other.strides)
        return other

    def __call__(self, input: Tensor, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """None if one of the tensors is not what it was."""
        if not self.seen.still(tensors):
            return None
        output = torch.empty(self.shape, dtype=input.dtype, device=cpu.CPU, memory_format=self.format)
        scratch = torch.empty(self.scratch, dtype=self.sums, device=cpu.CPU)
        addresses = output.data_ptr(), scratch.data_ptr()
        return output if self.native.run(self.batch, input.data_ptr(), self.strides, *addresses) else None
