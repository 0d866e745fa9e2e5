"""What masked_conv2d and shifted_conv2d share: autograd, checks of tensors, native calls, registration.

An operator ``X(input, weight, bias, *options)`` of this kind has stride 1, keeps the size of the image, and comes with
``X_input_grad(grad, weight, *options)`` and ``X_weight_grad(grad, input, kernel, *options)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.conv_block import check_same, check_tensors, is_jit_traced, is_transformed, is_unobserved, wants_grad
from fastgen.ops.feature_maps import address, channels_last, dense, native, to_channels_last
from fastgen.ops.registration import Implementation, define

_MIN_THREAD_WORK = 1_000_000  # multiply-adds: below, waking a thread costs more than it saves
_FUNCTIONS = ("forward", "input_gradient", "weight_gradient")  # in the order of their scratch sizes

_operators: dict[str, Operator] = {}
_functions: dict[str, Callable[..., Tensor]] = {}  # references, as they are registered


class Operator(NamedTuple):
    """How an operator differs from the others of its kind.

    Attributes:
        name: of the operator and its public function.
        options: their declarations in its schema.
        check: of the shape of a weight and the options; raises ValueError.
        reference: the operator in plain PyTorch.
        input_grad, weight_grad: its derivatives in plain PyTorch, weight_grad of the bias as well.
        native: from the native module, sizes of the input, output channels, kernel, threads and the options, what
            `csrc/cpu/masked_conv2d.h` takes.
        why_not_native: of the kernel's sizes and the options; None where it takes them.
        triton: names of the launchers of all three in a module of `fastgen.kernels`, or none.
    """

    name: str
    options: str
    check: Callable[..., None]
    reference: Callable[..., Tensor]
    input_grad: Callable[..., Tensor]
    weight_grad: Callable[..., tuple[Tensor, Tensor]]
    native: Callable[..., Any]
    why_not_native: Callable[..., str | None]
    triton: tuple[str, ...] = ()

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        _check(self, input, weight, bias, *options)
        args = (input, weight, bias, *options)
        if is_transformed():
            return self.reference(*args)
        if torch.compiler.is_compiling():
            kernel = input.device.type == "cpu" or self.triton  # an operator that is plain PyTorch would only be opaque
            plain = not kernel or backends.is_autocast(input)
            return self.reference(*args) if plain else _CausalConv2d.apply(self.name, *args)
        function = backends.select(self.name, *args)
        if function is _functions[self.name] or is_jit_traced():
            return self.reference(*args)
        tensors = (input, weight, bias)
        if not wants_grad(tensors) and is_unobserved(tensors):
            return function(*args)
        return _CausalConv2d.apply(self.name, *args)


class _CausalConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.name, ctx.options = name, options
        return getattr(torch.ops.fastgen, name)(input, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        for_input, for_weight, for_bias = ctx.needs_input_grad[1:4]
        grad_input = grad_weight = grad_bias = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            input_grad: Any = _operators[ctx.name].input_grad
            weight_grad: Any = _operators[ctx.name].weight_grad
        else:
            input_grad = getattr(torch.ops.fastgen, f"{ctx.name}_input_grad")
            weight_grad = getattr(torch.ops.fastgen, f"{ctx.name}_weight_grad")
        if for_input:
            grad_input = input_grad(grad, weight, *ctx.options)
        if for_weight:
            grad_weight, grad_bias = weight_grad(grad, input, weight.shape[2:], *ctx.options)
        elif for_bias:
            grad_bias = grad.sum((0, 2, 3))
        return None, grad_input, grad_weight, grad_bias if for_bias else None, *(None for _ in ctx.options)


# Checks, shared by the real and the fake implementations


def _check(operator: Operator, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> None:
    check_tensors(input, weight, {"bias": bias})
    operator.check(weight.shape, *options)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input must be [N, Cin, H, W] without empty dimensions but N, got {list(input.shape)}")
    if input.shape[1] != weight.shape[1]:
        raise ValueError(f"input must have {weight.shape[1]} channels as the weight has, got {input.shape[1]}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    check_same(input, {"weight": weight, "bias": bias})


def _check_input_grad(operator: Operator, grad: Tensor, weight: Tensor, *options: Any) -> None:
    operator.check(weight.shape, *options)
    if grad.dim() != 4 or grad.shape[1] != weight.shape[0] or 0 in grad.shape[1:]:
        raise ValueError(f"grad must be [N, {weight.shape[0]}, H, W], got {list(grad.shape)}")
    check_same(grad, {"weight": weight})


def _check_weight_grad(operator: Operator, grad: Tensor, input: Tensor, kernel: Sequence[int], *options: Any) -> None:
    if grad.dim() != 4 or input.dim() != 4 or input.shape[0] != grad.shape[0] or input.shape[2:] != grad.shape[2:]:
        raise ValueError(f"grad and input must be [N, C, H, W], got {list(grad.shape)} and {list(input.shape)}")
    operator.check((grad.shape[1], input.shape[1], *kernel), *options)
    check_same(grad, {"input": input})


def check_weight(shape: Sequence[int]) -> None:
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"weight must be [Cout, Cin, kh, kw] without empty dimensions, got {list(shape)}")


# Native implementations


def _run(
    operator: Operator, function: str, image: Tensor, weight_shape: Sequence[int], options: Sequence[Any], *args: Any
) -> None:
    """Calls a function of csrc/cpu/masked_conv2d.h; `image` is a tensor of the batch's size and dtype."""
    out_channels, in_channels, *kernel = weight_shape
    batch, _, height, width = image.shape
    work = batch * height * width * out_channels * in_channels * kernel[0] * kernel[1] // 2
    threads = max(1, min(torch.get_num_threads(), work // _MIN_THREAD_WORK))
    conv = operator.native(
        backends.native_cpu(), (batch, in_channels, height, width), out_channels, kernel, threads, *options
    )
    sizes = native("masked_conv2d_scratch", image.dtype)(conv)
    scratch = image.new_empty(sizes[_FUNCTIONS.index(function)])
    native(f"masked_conv2d_{function}", image.dtype)(conv, *args, scratch.data_ptr())


def _forward_cpu(operator: Operator, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    weight, bias = weight.contiguous(), dense(bias)
    output = _forward_empty(input, weight)
    pointers = (weight.data_ptr(), address(bias), output.data_ptr())
    _run(operator, "forward", input, weight.shape, options, input.data_ptr(), input.stride(), *pointers)
    return output


def _input_grad_cpu(operator: Operator, grad: Tensor, weight: Tensor, *options: Any) -> Tensor:
    weight = weight.contiguous()
    result = _input_grad_empty(grad, weight)
    pointers = (weight.data_ptr(), result.data_ptr())
    _run(operator, "input_gradient", grad, weight.shape, options, grad.data_ptr(), grad.stride(), *pointers)
    return result


def _weight_grad_cpu(
    operator: Operator, grad: Tensor, input: Tensor, kernel: Sequence[int], *options: Any
) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[1], input.shape[1], *kernel)
    if grad.numel() == 0:
        return grad.new_zeros(shape), grad.new_zeros(shape[0])
    weight, bias = grad.new_empty(shape), grad.new_empty(shape[0])
    images = (input.data_ptr(), input.stride(), grad.data_ptr(), grad.stride())
    _run(operator, "weight_gradient", grad, shape, options, *images, weight.data_ptr(), bias.data_ptr())
    return weight, bias


def _why_not_cpu(operator: Operator, *args: Any) -> str | None:
    """Of the arguments of any of the three."""
    first, second, third = args[:3]
    kernel = third if isinstance(third, (list, tuple)) else second.shape[2:]  # only weight_grad has no weight
    options = args[-operator.options.count(",") - 1 :]
    if first.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {first.dtype}"
    if backends.is_autocast(first):
        return "autocast is on"
    if first.layout is not torch.strided:
        return f"it takes strided tensors, got {first.layout}"
    return operator.why_not_native(kernel, *options)


# Registration

_SCHEMAS = {
    "": "(Tensor input, Tensor weight, Tensor? bias, {}) -> Tensor",
    "_input_grad": "(Tensor grad, Tensor weight, {}) -> Tensor",
    "_weight_grad": "(Tensor grad, Tensor input, SymInt[2] kernel, {}) -> (Tensor, Tensor)",
}


def _forward_empty(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return channels_last(input, (input.shape[0], weight.shape[0], *input.shape[2:]))


def _input_grad_empty(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return channels_last(grad, (grad.shape[0], weight.shape[1], *grad.shape[2:]))


def _weight_grad_empty(grad: Tensor, input: Tensor, kernel: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty((grad.shape[1], input.shape[1], *kernel)), grad.new_empty(grad.shape[1])


def register(operator: Operator) -> None:
    """Defines the operator and its two derivatives, with all their implementations."""
    _operators[operator.name] = operator
    _functions[operator.name] = lambda *args: to_channels_last(operator.reference(*args))
    reference = _functions[operator.name]
    calls = (
        (_check, reference, _forward_cpu, _forward_empty),
        (
            _check_input_grad,
            lambda *args: to_channels_last(operator.input_grad(*args)),
            _input_grad_cpu,
            _input_grad_empty,
        ),
        (_check_weight_grad, operator.weight_grad, _weight_grad_cpu, _weight_grad_empty),
    )
    for index, (suffix, schema) in enumerate(_SCHEMAS.items()):
        check, plain, cpu, empty = calls[index]
        found: dict[str, Implementation] = {
            "reference": (plain, None),
            "cpu": (functools.partial(cpu, operator), functools.partial(_why_not_cpu, operator)),
        }
        if operator.triton:
            found["triton"] = (backends.triton_kernel(operator.name, operator.triton[index]), _why_not_triton)
        name, schema = operator.name + suffix, schema.format(operator.options)
        define(name, schema, functools.partial(check, operator), empty, found)


def _why_not_triton(*args: Any) -> str | None:
    autocast = backends.is_autocast(args[0])
    return "autocast is on" if autocast else backends.why_not_triton(args[0])
