"""`conv2d_bn_act` and `conv_transpose2d_bn_act` by csrc/cpu: what of the arguments becomes which native call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import backends
from fastgen._memory import empty
from fastgen.ops.conv_block import signature
from fastgen.ops.feature_maps import address, dense, dense_strides
from fastgen.ops.packed_weights import borrowed_weight, packed_weight

CPU = torch.device("cpu")  # whatever the default device is
_SLACK = 64  # bytes behind a gradient that the kernels may read

# Where PyTorch's convolution (oneDNN's) is faster than the kernels here, see bench/LOG.md. Elsewhere, too, it may be
# a few per cent faster for channels-last data, but its error is then two to five times that for contiguous data.
FEW_INPUTS = 8
FEW_OUTPUTS = 8  # which oneDNN does not fill vectors with
_SMALL_GROUP = 16
_MOST_FEW = 1 << 21  # multiply-adds of few inputs: below, it is the calls that cost, of which PyTorch needs more
_MOST_ONE = 1 << 25  # and of kernels of one element, no activation behind, several threads, unless results are large:
_LARGE = 12 << 20  # bytes, where new memory costs PyTorch as much as the products

Tensors = Sequence["Tensor | None"]  # bias, running_mean, running_var, bn_weight, bn_bias


class Options(NamedTuple):
    """The arguments of the operators after the tensors; of an ordinary convolution the output padding is 0."""

    stride: Sequence[int]
    padding: Sequence[int]
    output_padding: Sequence[int]
    groups: int
    dilation: Sequence[int]
    training: bool
    eps: float
    activation: str
    parameter: float  # the slope of leaky_relu or the alpha of elu


def output_shape(
    transposed: bool, input: Sequence[int], weight: Sequence[int], options: Options
) -> tuple[int, int, int, int]:
    if not transposed:
        height, width = (
            (input[2 + i] + 2 * options.padding[i] - options.dilation[i] * (weight[2 + i] - 1) - 1) // options.stride[i]
            + 1
            for i in range(2)
        )
        return input[0], weight[0], height, width
    height, width = (
        (input[2 + i] - 1) * options.stride[i]
        - 2 * options.padding[i]
        + options.dilation[i] * (weight[2 + i] - 1)
        + options.output_padding[i]
        + 1
        for i in range(2)
    )
    return input[0], weight[1] * options.groups, height, width


def is_native_better(dtype: torch.dtype, input: Sequence[int], weight: Sequence[int], options: Options) -> bool:
    """For inference by an ordinary convolution, of an input and a weight of these shapes."""
    out_channels, in_channels, *kernel = weight
    if is_slow_bfloat16(dtype):
        return in_channels % 2 == 0 or options.groups == 1
    if dtype not in (torch.float32, torch.float64, torch.bfloat16) or (dtype is torch.bfloat16 and in_channels % 2):
        return False
    if is_depthwise(weight, options.groups):
        return dtype is not torch.bfloat16  # a channel by itself
    if options.groups > 1:
        return in_channels > _SMALL_GROUP and math.prod(kernel) > 1
    size = math.prod(output_shape(False, input, weight, options))
    work = size * math.prod(weight[1:])
    if math.prod(kernel) == 1:
        # By one thread PyTorch computes these as products of matrices, on Zen 5 in twice the time of oneDNN's and ours.
        alone = torch.get_num_threads() == 1 and dtype is torch.float32 and tuple(options.stride) == (1, 1)
        return alone or work < _MOST_ONE or options.activation != "none" or size * dtype.itemsize >= _LARGE
    return in_channels >= FEW_INPUTS or out_channels <= FEW_OUTPUTS or work < _MOST_FEW


def is_depthwise(weight: Sequence[int], groups: int) -> bool:
    """Of an ordinary convolution: one channel of the output for each of the input, as native kernels take it."""
    return groups > 1 and tuple(weight[:2]) == (groups, 1)


def is_slow_bfloat16(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16 and not has_fast_bfloat16()


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether oneDNN computes convolutions in it here; where not, PyTorch mostly takes 4 to 60 times as long."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def why_not(*args: Any) -> str | None:
    """Of inference; `why_not_training` is for the other two."""
    input, weight, groups = args[0], args[1], args[10]
    if input.dtype is torch.bfloat16 and weight.shape[0] // groups % 2 == 0:
        return _why_not_here(input)
    return why_not_training(*args)


def why_not_training(*args: Any) -> str | None:
    if args[0].dtype is torch.bfloat16:
        return "in bfloat16 it takes inference alone, with an even number of input channels in each group"
    if args[0].dtype not in (torch.float32, torch.float64):
        return f"it takes float32, float64 and bfloat16, got {args[0].dtype}"
    return _why_not_here(args[0])


def _why_not_here(first: Tensor) -> str | None:
    if backends.is_autocast(first):
        return "autocast is on"
    if first.layout is not torch.strided:
        return f"it takes strided tensors, got {first.layout}"
    return None


def forward(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    tensors = (input, weight, *rest[:5])
    options = Options(*[tuple(option) if isinstance(option, list) else option for option in rest[5:]])  # type: ignore[arg-type]
    call = served(True, tensors, options)
    if call is None:
        sizes = input.shape, input.stride(), input.dtype
        call = Inference(True, *sizes, weight, tensors[3] is not None, options)
        serve_later(True, tensors, options, call)
    return call(*tensors)


class Inference:
    """Of a call whose arguments were checked all that does not depend on values, for later calls that are like it."""

    def __init__(
        self,
        transposed: bool,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        weight: Tensor,
        batch_norm: bool,
        options: Options,
    ):
        native = backends.native_cpu()
        block = Block.of(transposed, shape, dtype, weight, options)
        self.transposed, self.shape, self.threads = transposed, block.output, block.threads
        self.plan = block.forward_plan(batch_norm)
        self.function = getattr(native, f"conv_bn_act_{block.type}")
        self.act = (options.eps, getattr(native.Activation, options.activation), options.parameter)
        self.strides = strides
        self.scratch = block.scratch_size(self.plan, self.strides) if math.prod(block.output) else 0
        self.sums = _sum_dtype(block.dtype)

    def __call__(self, input: Tensor, weight: Tensor, *tensors: Tensor | None) -> Tensor:
        output = empty(self.shape, input.dtype, torch.channels_last)
        if not self.scratch:
            return output
        packed = packed_weight(weight, self.plan, self.threads, out_channels_first=not self.transposed)
        tensors = tuple(dense(tensor) for tensor in tensors)
        addresses = [address(tensor) for tensor in tensors]
        scratch = torch.empty(self.scratch, dtype=self.sums, device=CPU)
        self.function(
            self.plan, self.shape[0], self.threads, input.data_ptr(), self.strides, packed.data_ptr(), addresses,
            *self.act, output.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        return output


_MAX_SERVED = 4096
_served: dict[tuple[Any, ...], Callable[..., Tensor]] = {}


def served(transposed: bool, tensors: Tensors, options: tuple[Any, ...]) -> Callable[..., Tensor] | None:
    """What serves a call of these tensors, the input first, and options, if one like it was checked before."""
    return _served.get((transposed, *signature(tensors, options)))


def serve_later(transposed: bool, tensors: Tensors, options: tuple[Any, ...], call: Callable[..., Tensor]) -> None:
    """Calls like this one, which was checked."""
    if len(_served) >= _MAX_SERVED:
        _served.clear()
    key = (transposed, *signature(tensors, options))
    _served[key] = call


def follows_from_output(transposed: bool, options: Options, statistics: bool) -> bool:
    """Whether the gradient of the activation is known from its result, and no more is kept for it: nobody may write to
    the result then, as behind PyTorch's ReLU.
    """
    return options.activation == "relu" and not (transposed or statistics)


def saving(transposed: bool, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, running_mean, running_var, *norm = rest[:5]
    options = Options(*rest[5:])
    block = Block.of(transposed, input.shape, input.dtype, weight, options)
    conv = empty(block.output, input.dtype, torch.channels_last)
    statistics = options.training or running_mean is not None
    at_once = follows_from_output(transposed, options, statistics)
    if conv.numel():
        act = (options.eps, options.activation, options.parameter) if at_once else ()
        block.convolve(input, weight, (bias, None, None, None, None), conv, *act)
    if at_once or (not statistics and options.activation == "none"):
        return conv, input.new_empty(0), input.new_empty(0), input.new_empty(0)
    mean, var = (input.new_zeros(conv.shape[1] if statistics else 0) for _ in range(2))
    output = empty(conv.shape, conv.dtype, torch.channels_last)
    if options.training and conv.numel():
        scratch = block.channel_scratch()
        size = block.positions, conv.shape[1]
        block.call("channel_statistics", size, block.threads, conv, mean, var, scratch)
    elif statistics and not options.training:
        mean.copy_(running_mean)
        var.copy_(running_var)
    if conv.numel():
        block.pass_over("channel_forward", conv, (), (mean, var, *norm), options, output)
    return output, conv, mean, var


def backward(
    transposed: bool,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    conv: Tensor,
    mean: Tensor,
    var: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options, (for_input, for_weight) = Options(*rest[:-1]), rest[-1]
    block = Block.of(transposed, input.shape, input.dtype, weight, options)
    channels = grad.shape[1]
    grad_input = empty(input.shape, input.dtype, torch.channels_last) if for_input else input.new_empty(0)
    grad_weight = input.new_zeros(weight.shape) if for_weight else input.new_empty(0)
    sums = [input.new_zeros(channels) for _ in range(2)]
    if grad.numel():
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_conv = input.new_empty(grad.numel() + _SLACK // grad.element_size())
        # Where there was neither BatchNorm nor activation, nothing was kept; a hook may have changed what was.
        conv = conv.contiguous(memory_format=torch.channels_last) if conv.numel() else grad
        norm = (mean, var, bn_weight, bn_bias)
        block.pass_over("channel_backward", conv, (grad,), norm, options, options.training, grad_conv, *sums)
        if for_weight:
            block.weight_gradient(input, grad_conv, grad_weight)
        if for_input:
            block.input_gradient(weight, grad_conv, grad_input)
    grad_bias = sums[0]
    if options.training:
        grad_bias = torch.zeros_like(sums[0])  # a bias ahead of batch statistics changes nothing
    elif mean.numel():
        scale = (var + options.eps).rsqrt()
        grad_bias = sums[0] * (scale if bn_weight is None else scale * bn_weight)
    return grad_input, grad_weight, grad_bias, sums[1], sums[0].clone()


class Block:
    """The sizes of one call and its native functions."""

    def __init__(
        self, transposed: bool, output: tuple[int, ...], geometry: tuple[Any, ...], dtype: torch.dtype, threads: int
    ):
        self.transposed, self.output, self.dtype, self.threads = transposed, output, dtype, threads
        self.geometry = geometry  # groups, channels, in_size, out_size, kernel, stride, padding, dilation
        self.positions = output[0] * output[2] * output[3]
        self.type = str(dtype).removeprefix("torch.")

    @classmethod
    def of(cls, transposed: bool, input: Sequence[int], dtype: torch.dtype, weight: Tensor, options: Options) -> Block:
        """For an input [N, Cin, H, W] of this size."""
        steps = (options.stride, options.padding, options.output_padding, options.dilation)
        sizes = (tuple(input), tuple(weight.shape), options.groups, *(tuple(step) for step in steps))
        return _block(transposed, *sizes, dtype, torch.get_num_threads())

    def call(self, name: str, *args: Any) -> Any:
        """Tensors go as addresses; one that is missing or empty as 0."""
        function = getattr(backends.native_cpu(), f"{name}_{self.type}")
        return function(*(address(arg) if arg is None or isinstance(arg, Tensor) else arg for arg in args))

    def forward_plan(self, batch_norm: bool) -> Any:
        # Minimal filtering rounds the transformed inputs and weights, too. In bfloat16 its error is 2.3 times that of
        # PyTorch where PyTorch rounds once, 1.5 times where it does twice, for a BatchNorm.
        minimal = self.dtype is not torch.bfloat16 or batch_norm
        return conv_plan(self.transposed, *self.geometry, self.dtype, minimal=minimal)

    def scratch_size(self, plan: Any, strides: Sequence[int]) -> int:
        function = getattr(backends.native_cpu(), f"conv_scratch_size_{self.type}")
        return function(plan, self.output[0], self.threads, strides)

    def convolve(self, input: Tensor, weight: Tensor, tensors: Tensors, output: Tensor, *act: Any) -> None:
        plan = self.forward_plan(batch_norm=tensors[2] is not None)
        with borrowed_weight(weight, plan, self.threads, out_channels_first=not self.transposed) as packed:
            self.run(plan, input, input.stride(), packed, tensors, output, *act)

    def input_gradient(self, weight: Tensor, grad: Tensor, output: Tensor) -> None:
        """The other kind of convolution of the gradient, with the roles of the channels exchanged."""
        plan = conv_plan(not self.transposed, *self._exchanged(), self.dtype)
        with borrowed_weight(weight, plan, self.threads, out_channels_first=self.transposed) as packed:
            self.run(plan, grad, dense_strides(self.output), packed, (None,) * 5, output)

    def run(
        self, plan: Any, image: Tensor, strides: Sequence[int], packed: Tensor, tensors: Tensors, output: Tensor,
        eps: float = 0.0, activation: str = "none", parameter: float = 0.0,
    ) -> None:  # fmt: skip
        native, size = backends.native_cpu(), (self.output[0], self.threads)
        scratch = torch.empty(self.scratch_size(plan, strides), dtype=_sum_dtype(self.dtype), device=CPU)
        tensors = [dense(tensor) for tensor in tensors]
        addresses = [address(tensor) for tensor in tensors]
        act = (eps, getattr(native.Activation, activation), parameter)
        self.call("conv_bn_act", plan, *size, image, strides, packed, addresses, *act, output, scratch)

    def channel_scratch(self) -> Tensor:
        size = self.call("channel_scratch_size", self.positions, self.output[1])
        return torch.empty(size, dtype=self.dtype, device=CPU)

    def pass_over(
        self, name: str, conv: Tensor, more: Sequence[Tensor], norm: Tensors, options: Options, *results: Any
    ) -> None:
        """`norm`: mean, var, bn_weight, bn_bias."""
        norm = [dense(tensor) for tensor in norm]
        addresses = [0, *(address(tensor) for tensor in norm)]
        kind = getattr(backends.native_cpu().Activation, options.activation)
        size, scratch = (self.positions, self.output[1]), self.channel_scratch()
        act = (options.eps, kind, options.parameter)
        self.call(name, size, self.threads, conv, *more, addresses, *act, *results, scratch)

    def _exchanged(self) -> tuple[Any, ...]:
        """The geometry from the output to the input."""
        groups, channels, in_size, out_size, *steps = self.geometry
        return groups, channels[::-1], out_size, in_size, *steps

    def weight_shape(self) -> Any:
        """What the gradient of the weights is computed from."""
        geometry = self.geometry if self.transposed else self._exchanged()
        return backends.native_cpu().WeightGradientShape(self.output[0], self.threads, *geometry)

    def weight_gradient(self, input: Tensor, grad: Tensor, result: Tensor) -> None:
        """`grad`: with readable memory behind it."""
        shape = self.weight_shape()
        size, input = input.shape, input.contiguous(memory_format=torch.channels_last)
        images = [(input, dense_strides(size)), (grad, dense_strides(self.output))]
        if not self.transposed:
            lines = size[1] // self.geometry[0] * input.element_size() % _SLACK == 0
            images = [images[1], (input if lines or shape.minimal else _with_slack(input), dense_strides(size))]
        scratch = input.new_empty(self.call("conv_weight_gradient_scratch_size", shape))
        self.call("conv_weight_gradient", shape, *images[0], *images[1], result, scratch)


def _with_slack(image: Tensor) -> Tensor:
    """The elements of a dense channels-last image in memory of which more may be read behind them."""
    copy = image.new_empty(image.numel() + _SLACK // image.element_size())
    copy[: image.numel()] = image.permute(0, 2, 3, 1).reshape(-1)
    return copy


@functools.lru_cache(maxsize=1024)
def _block(
    transposed: bool,
    input: tuple[int, ...],
    weight: tuple[int, ...],
    groups: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    threads: int,
) -> Block:
    options = Options(stride, padding, output_padding, groups, dilation, False, 0.0, "none", 0.0)
    output = output_shape(transposed, input, weight, options)
    geometry = (groups, (input[1], output[1]), input[2:], output[2:], weight[2:], stride, padding, dilation)
    positions = input if transposed else output  # that meet all weights
    work = positions[0] * math.prod(positions[2:]), math.prod(weight)
    return Block(transposed, output, geometry, dtype, backends.native_cpu().worthwhile_threads(*work, threads))


@functools.lru_cache(maxsize=1024)
def conv_plan(transposed: bool, *args: Any, minimal: bool = True) -> Any:
    """`minimal`: whether it may choose minimal filtering."""
    *geometry, dtype = args
    return backends.native_cpu().ConvPlan(transposed, *geometry, minimal, str(dtype).removeprefix("torch."))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype is torch.bfloat16 else dtype
