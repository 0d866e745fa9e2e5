"""`conv2d_bn_act` and `conv_transpose2d_bn_act`, one or several in turn, at the price of one native call.

For one image of small layers it is the calls that cost. What a call of given tensors needs is kept here, and served as
long as they are what they were.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv2d_bn_act import conv2d_bn_act, is_native_better
from fastgen.ops.conv2d_bn_act import served as served_ordinary
from fastgen.ops.conv_block import goes_straight
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_transpose2d_bn_act import conv_transpose2d_bn_act
from fastgen.ops.packed_weights import packed_weight, span_bytes

BLOCK_TENSORS = 6  # weight, bias, running_mean, running_var, bn_weight, bn_bias
_MAX_KEPT = 256  # of one first weight and way, for inputs of other sizes; some 10 KB each

Blocks = tuple[tuple[bool, tuple[Any, ...]], ...]
Tensors = Sequence["Tensor | None"]

# By the identity of the first weight, as long as it lives; by how it is computed; by shape and strides of the input.
_kept: dict[int, dict[tuple[Any, ...], dict[tuple[Any, ...], _Sequence]]] = {}


def conv_bn_act_sequence(input: Tensor, tensors: Tensors, blocks: Blocks, contiguous: bool = False) -> Tensor:
    """The last result of `conv2d_bn_act` and `conv_transpose2d_bn_act` in turn, each of the result of the one before.

    Args:
        input: [N, Cin, H, W].
        tensors: weight, bias, running_mean, running_var, bn_weight and bn_bias of the first block, then of the second,
            and so on.
        blocks: of each whether its convolution is a transposed one, and its `Options` as a tuple.
        contiguous: whether the result is made contiguous.
    """
    result = _apply(input, tensors, blocks, contiguous)
    return result.contiguous() if contiguous else result


def _apply(input: Tensor, tensors: Tensors, blocks: Blocks, contiguous: bool) -> Tensor:
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
        elif (sequence := known.resized(input, tensors, blocks)) is not None:
            output = sequence(input, tensors)
            if output is not None:
                _keep(sequence, first, how, size)
                return output
    calls: list[Callable[..., Tensor] | None] = []
    output = _one_by_one(input, tensors, blocks, calls)
    if output.numel() and None not in calls and _may_be_kept(tensors):
        if first not in _kept:
            weakref.finalize(tensors[0], _kept.pop, first, None).atexit = False
            _kept[first] = {}
        _keep(_Sequence.of(tensors, calls, contiguous), first, how, size)  # type: ignore[arg-type]
    return output


def _keep(sequence: _Sequence, first: int, how: tuple[Any, ...], size: tuple[Any, ...]) -> None:
    sizes = _kept[first].setdefault(how, {})
    if len(sizes) >= _MAX_KEPT:
        sizes.clear()
    sizes[size] = sequence


def _may_be_kept(tensors: Tensors) -> bool:
    """Native blocks read vectors of channels as they lie; tensors of inference mode have no version counter."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all((tensor.dim() == 4 or tensor.is_contiguous()) and not tensor.is_inference() for tensor in given)


def _one_by_one(
    input: Tensor, tensors: Tensors, blocks: Blocks, calls: list[Callable[..., Tensor] | None] | None = None
) -> Tensor:
    """`calls` gets what served the blocks."""
    for i, (transposed, block) in enumerate(blocks):
        weight, *channels = _of_block(tensors, i)
        options = Options(*block)
        given = {name: getattr(options, name) for name in ("stride", "padding", "groups", "dilation", "eps")}
        given |= {"activation": options.activation, "negative_slope": options.parameter, "alpha": options.parameter}
        if transposed:
            output = conv_transpose2d_bn_act(input, weight, *channels, output_padding=options.output_padding, **given)
        else:
            output = conv2d_bn_act(input, weight, *channels, **given)
        if calls is not None:
            served = cpu.served if transposed else served_ordinary
            calls.append(served((input, weight, *channels), options))
        input = output
    return input


def _of_block(tensors: Tensors, block: int) -> Any:
    """Weight, bias, running_mean, running_var, bn_weight and bn_bias."""
    return tensors[block * BLOCK_TENSORS : (block + 1) * BLOCK_TENSORS]


class _Sequence:
    """Of inputs that are alike, and blocks that were served one by one."""

    def __init__(self, seen: Any, parts: Sequence[_Native | _PyTorch]):
        self.seen, self.parts = seen, parts

    @classmethod
    def of(cls, tensors: Tensors, calls: Sequence[Callable[..., Tensor]], contiguous: bool) -> _Sequence:
        parts: list[_Native | _PyTorch] = []
        begin = 0
        while begin < len(calls):
            end = begin
            while end < len(calls) and isinstance(calls[end], cpu.Inference):
                end += 1
            if end > begin:
                parts.append(_Native(tensors, begin, calls[begin:end], contiguous and end == len(calls)))  # type: ignore[arg-type]
            else:
                end += 1
                parts.append(_PyTorch(begin, calls[begin]))
            begin = end
        return cls(backends.native_cpu().SeenTensors(tensors), parts)

    def resized(self, input: Tensor, tensors: Tensors, blocks: Blocks) -> _Sequence | None:
        """For inputs of another size and the same tensors; None if a block does not take what it would get, or would
        not be computed natively.
        """
        part = self.parts[0]
        if input.dim() != 4 or len(self.parts) > 1 or isinstance(part, _PyTorch):
            return None
        other = part.resized(input, tensors)
        if other is None:
            return None
        shape: Sequence[int] = input.shape
        for i, (transposed, block) in enumerate(blocks):
            sizes, options = (shape, _of_block(tensors, i)[0].shape), Options(*block)
            if not transposed and not is_native_better(input.dtype, *sizes, options):
                return None
            shape = cpu.output_shape(transposed, *sizes, options)
        return _Sequence(self.seen, [other])

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


class _PyTorch:
    """A block that PyTorch computes."""

    def __init__(self, block: int, call: Callable[..., Tensor]):
        self.block, self.call = block, call

    def __call__(self, input: Tensor, tensors: Tensors) -> Tensor:
        return self.call(input, *_of_block(tensors, self.block))


class _Native:
    """Blocks in one native call."""

    def __init__(self, tensors: Tensors, first: int, calls: Sequence[cpu.Inference], contiguous: bool):
        dtype = str(_of_block(tensors, first)[0].dtype).removeprefix("torch.")
        self.native = getattr(backends.native_cpu(), f"ConvSequence_{dtype}")(contiguous)
        self.packs = []  # that the native sequence reads
        for i, call in enumerate(calls):
            weight, *channels = _of_block(tensors, first + i)
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
            weight, plan = _of_block(tensors, i)[0], other.native.plan(i)
            other.packs[i] = packed_weight(weight, plan, threads, out_channels_first=not self.transposed[i])
            other.native.set_packed(i, other.packs[i].data_ptr())
        other.batch, other.strides = batch, input.stride()
        other.shape = (batch, self.shape[1], *other.native.plan(len(self.packs) - 1).out_size)
        other.scratch = other.native.scratch_size(batch, other.strides)
        return other

    def __call__(self, input: Tensor, tensors: Tensors) -> Tensor | None:
        """None if a weight is not what it was."""
        output = torch.empty(self.shape, dtype=input.dtype, device=cpu.CPU, memory_format=self.format)
        scratch = torch.empty(self.scratch, dtype=self.sums, device=cpu.CPU)
        addresses = output.data_ptr(), scratch.data_ptr()
        return output if self.native.run(self.batch, input.data_ptr(), self.strides, *addresses) else None
