"""Convolutions, BatchNorm and activation of given tensors, ready to be called again: in one native call where they are
computed natively, as long as the tensors are what they were.

For one image of small layers it is the way to the kernel that costs. What it needs is kept here, for one block or for
several in turn, each of which takes the result of the one before.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen._memory import empty
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv_block import goes_straight
from fastgen.ops.conv_cpu import Options, is_native_better
from fastgen.ops.packed_weights import packed_weight, span_bytes

BLOCK_TENSORS = 6  # weight, bias, running_mean, running_var, bn_weight, bn_bias
_MAX_KEPT = 256  # of one first weight and way, for inputs of other sizes; some 10 KB each
_MAX_WAYS = 16  # of one first weight

Blocks = tuple[tuple[bool, tuple[Any, ...]], ...]  # whether the convolution is a transposed one, and its `Options`
Tensors = Sequence["Tensor | None"]  # BLOCK_TENSORS for each block
Call = Callable[..., Tensor]  # of the input and the tensors of a block

# By the identity of the first weight, as long as it lives; by how it is computed; by shape and strides of the input.
_kept: dict[int, dict[tuple[Any, ...], dict[tuple[Any, ...], _Known]]] = {}


def call_known(input: Tensor, tensors: Tensors, blocks: Blocks, contiguous: bool = False) -> Tensor | None:
    """The result, if what it needs is kept: of any strides, or contiguous if a native call can make it so."""
    first = id(tensors[0])
    ways = _kept.get(first)
    # What is kept is for tensors that went straight, and notices others, but not that they want gradients now.
    if not ways or not goes_straight((input, *tensors) if torch.is_grad_enabled() else (input,)):
        return None
    way, size = _way(input, tensors, blocks, contiguous), (input.shape, input.stride())
    sizes = ways.get(way, {})
    known = sizes.get(size)
    if known is not None:
        output = known(input, tensors)
        if output is None:
            ways.clear()  # the others would notice, too, and keep old packs until then
        return output
    alike = next(iter(list(sizes.values())), None)
    if alike is None or not input.numel() or not goes_straight((input, *tensors)):
        return None
    if not alike.seen.still(tensors):
        ways.clear()
        return None
    known = alike.resized(input, tensors, blocks)
    output = None if known is None else known(input, tensors)
    if known is not None and output is not None:
        _keep(known, first, way, size)
    return output


def serve(call: Call, tensors: Tensors, block: tuple[bool, tuple[Any, ...]]) -> Tensor:
    """The result of a call of one block that goes straight; `tensors` begin with the input. It is kept if it is a
    native one of a parameter: other weights may be computed anew for each call.
    """
    output = call(*tensors)
    if isinstance(call, cpu.Inference) and isinstance(tensors[1], torch.nn.Parameter):
        keep(tensors[0], tensors[1:], (block,), [call], output)  # type: ignore[arg-type]
    return output


def keep(
    input: Tensor, tensors: Tensors, blocks: Blocks, calls: Sequence[Call], output: Tensor, contiguous: bool = False
) -> None:
    """For later calls like this one, which went straight: `calls` served its blocks, the last with this output."""
    if not output.numel() or not _may_be_kept(tensors):
        return
    weight, first = tensors[0], id(tensors[0])
    if first not in _kept:
        weakref.finalize(weight, _kept.pop, first, None).atexit = False
        _kept[first] = {}
    way, ways = _way(input, tensors, blocks, contiguous), _kept[first]
    if len(ways) >= _MAX_WAYS or any(other[0] is not input.dtype for other in list(ways)):
        ways.clear()  # of tensors that have another dtype now, which are not asked for again
    _keep(_Known.of(tensors, calls, contiguous), first, way, (input.shape, input.stride()))


def _way(input: Tensor, tensors: Tensors, blocks: Blocks, contiguous: bool) -> tuple[Any, ...]:
    further = [id(weight) for weight in tensors[BLOCK_TENSORS::BLOCK_TENSORS]]  # two networks may begin alike
    return input.dtype, blocks, contiguous, torch.get_num_threads(), backends.native_cpu().isa(), *further


def _keep(known: _Known, first: int, way: tuple[Any, ...], size: tuple[Any, ...]) -> None:
    sizes = _kept[first].setdefault(way, {})
    if len(sizes) >= _MAX_KEPT:
        sizes.clear()
    sizes[size] = known


def _may_be_kept(tensors: Tensors) -> bool:
    """Native blocks read vectors of channels as they lie; tensors of inference mode have no version counter."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all((tensor.dim() == 4 or tensor.is_contiguous()) and not tensor.is_inference() for tensor in given)


def of_block(tensors: Tensors, block: int) -> Any:
    """Weight, bias, running_mean, running_var, bn_weight and bn_bias."""
    return tensors[block * BLOCK_TENSORS : (block + 1) * BLOCK_TENSORS]


class _Known:
    """Of inputs that are alike, and blocks that were served one by one."""

    def __init__(self, seen: Any, parts: Sequence[_Native | _Single]):
        self.seen, self.parts = seen, parts

    @classmethod
    def of(cls, tensors: Tensors, calls: Sequence[Call], contiguous: bool) -> _Known:
        parts: list[_Native | _Single] = []
        begin = 0
        while begin < len(calls):
            end = begin
            while end < len(calls) and isinstance(calls[end], cpu.Inference):
                end += 1
            if end > begin:
                parts.append(_Native(tensors, begin, calls[begin:end], contiguous and end == len(calls)))  # type: ignore[arg-type]
            else:
                end += 1
                parts.append(_Single(begin, calls[begin]))
            begin = end
        return cls(backends.native_cpu().SeenTensors(tensors), parts)

    def resized(self, input: Tensor, tensors: Tensors, blocks: Blocks) -> _Known | None:
        """For inputs of another size and the same tensors; None if a block does not take what it would get, or would
        not be computed natively.
        """
        part = self.parts[0]
        if input.dim() != 4 or len(self.parts) > 1 or isinstance(part, _Single):
            return None
        shape: Sequence[int] = input.shape
        for i, (transposed, block) in enumerate(blocks):
            sizes, options = (shape, of_block(tensors, i)[0].shape), Options(*block)
            if not transposed and not is_native_better(input.dtype, *sizes, options):
                return None
            shape = cpu.output_shape(transposed, *sizes, options)
            if min(shape[2:]) < 1:
                return None
        other = part.resized(input, tensors)
        return None if other is None else _Known(self.seen, [other])

    def __call__(self, input: Tensor, tensors: Tensors) -> Tensor | None:
        """None if one of the tensors is not what it was."""
        if not self.seen.still(tensors):
            return None
        for part in self.parts:
            result = part(input, tensors)
            if result is None:
                return None
            input = result
        return input


class _Single:
    """A block that is called by itself, as those are that PyTorch computes."""

    def __init__(self, block: int, call: Call):
        self.block, self.call = block, call

    def __call__(self, input: Tensor, tensors: Tensors) -> Tensor:
        return self.call(input, *of_block(tensors, self.block))


class _Native:
    """Blocks in one native call."""

    def __init__(self, tensors: Tensors, first: int, calls: Sequence[cpu.Inference], contiguous: bool):
        dtype = str(of_block(tensors, first)[0].dtype).removeprefix("torch.")
        self.native = getattr(backends.native_cpu(), f"ConvSequence_{dtype}")(contiguous)
        self.packs = []  # that the native sequence reads
        for i, call in enumerate(calls):
            weight, *channels = of_block(tensors, first + i)
            packed = packed_weight(weight, call.plan, call.threads, out_channels_first=not call.transposed)
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in channels]
            memory = weight.data_ptr(), span_bytes(weight)
            self.native.add(call.plan, call.threads, packed.data_ptr(), addresses, *call.act, *memory)
            self.packs.append(packed)
        self.transposed = [call.transposed for call in calls]
        self.format = torch.contiguous_format if contiguous else torch.channels_last
        self.batch, self.strides = calls[0].shape[0], calls[0].strides
        self.shape, self.sums = calls[-1].shape, calls[-1].sums
        self.scratch = self.native.scratch_size(self.batch, self.strides)

    def resized(self, input: Tensor, tensors: Tensors) -> _Native | None:
        batch, channels, *size = input.shape
        threads = torch.get_num_threads()
        found = self.native.resized(batch, channels, size, threads)
        if found is None:
            return None
        other = copy.copy(self)
        other.native, unpacked = found
        other.packs = list(self.packs)
        for i in unpacked:
            weight, plan = of_block(tensors, i)[0], other.native.plan(i)
            other.packs[i] = packed_weight(weight, plan, threads, out_channels_first=not self.transposed[i])
            other.native.set_packed(i, other.packs[i].data_ptr())
        other.batch, other.strides = batch, input.stride()
        other.shape = (batch, self.shape[1], *other.native.plan(len(self.packs) - 1).out_size)
        other.scratch = other.native.scratch_size(batch, other.strides)
        return other

    def __call__(self, input: Tensor, tensors: Tensors) -> Tensor | None:
        """None if a weight is not what it was."""
        output = empty(self.shape, input.dtype, self.format)
        scratch = torch.empty(self.scratch, dtype=self.sums, device=cpu.CPU)
        addresses = output.data_ptr(), scratch.data_ptr()
        return output if self.native.run(self.batch, input.data_ptr(), self.strides, *addresses) else None
