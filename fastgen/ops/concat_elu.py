"""ELU of features and of their negatives, with dropout: the activation of PixelCNN++.

W. Shang, K. Sohn, D. Almeida, H. Lee, "Understanding and Improving Convolutional Neural Networks via Concatenated
Rectified Linear Units", ICML 2016, section 2.1; with ELU (D.-A. Clevert, T. Unterthiner, S. Hochreiter, "Fast and
Accurate Deep Network Learning by Exponential Linear Units", ICLR 2016) in T. Salimans, A. Karpathy, X. Chen, D. P.
Kingma, "PixelCNN++", ICLR 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen._layouts import arranged, empty, planar
from fastgen.ops import philox
from fastgen.ops.conv_block import check_same, is_jit_traced, is_transformed, is_unobserved, wants_grad
from fastgen.ops.feature_maps import native
from fastgen.ops.registration import define

_THREAD_ELEMENTS = 1 << 14  # inputs: below, waking a thread costs more than it saves
_MAX_DROPOUT = 8192  # of csrc/cpu/concat_elu.h
_HALVES = 1 << 16


def concat_elu(*inputs: Tensor, negate: bool = True, dropout: float = 0.0, seed: int | None = None) -> Tensor:
    """``dropout(elu(cat([*inputs, *(-input for input in inputs)], dim=1)))`` in one pass, and one back.

    Args:
        inputs: one or more [N, Ci, H, W] of one dtype, any strides.
        negate: whether there are the negatives; without them it is ``dropout(elu(cat(inputs, dim=1)))``.
        dropout: share of the outputs that is set to zero, whatever they were, 0 <= dropout < 1, rounded to a multiple
            of 2^-16 (by `F.dropout`, where that serves a call without a seed, not); the others are divided by one minus
            it.
        seed: 0..2^63-1; which outputs are dropped is a function of the seed, the index in the batch, the position and
            the channel (`philox` says which), the same one on every device, and is found anew in the backward pass.
            None: PyTorch's default generator decides; where a kernel serves the call, that of the CPU gives the seed,
            but for a CUDA graph that is captured, in which `F.dropout` draws anew at each replay.

    Returns:
        [N, 2 * sum of Ci, H, W] (without negate, half of that); where a kernel computed it contiguous in memory if the
        inputs are and nothing is dropped, or else channels-last.

    float32 and float64 run natively on the CPU, float32, bfloat16 and float16 in Triton on a GPU; other dtypes and
    devices, autocast, torch.compile and all within `torch.func` or forward-mode differentiation run in plain PyTorch;
    so does a backward pass that is itself to be differentiated.

    Raises:
        TypeError: an argument is not a tensor or the dtypes differ.
        ValueError: a shape, dropout or seed is not as above.
    """
    _check(inputs, negate, dropout, seed or 0)
    function = _reference
    if not (is_transformed() or torch.compiler.is_compiling() or is_jit_traced()):  # compilers fuse it themselves
        function = backends.select("concat_elu", inputs, negate, dropout, seed)
    if seed is None and dropout:
        # To a tracer and to a CUDA graph the seed would be a constant.
        if function is _reference or not is_unobserved(inputs) or _is_captured(inputs[0]):
            return F.dropout(concat_elu(*inputs, negate=negate), dropout)
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    args = (negate, float(dropout), seed or 0)
    if function is _reference:
        return concat_elu_reference(inputs, *args)
    if not wants_grad(inputs) and is_unobserved(inputs):
        return function(inputs, *args)
    return _ConcatElu.apply(*args, *inputs)


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def concat_elu_reference(inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> Tensor:
    """The definition, in plain PyTorch."""
    y = F.elu(_both(inputs, negate))
    return _dropout(y, dropout, seed) if dropout else y


def _both(inputs: Sequence[Tensor], negate: bool) -> Tensor:
    return torch.cat([*inputs, *(-x for x in inputs)] if negate else list(inputs), dim=1)


def _dropout(y: Tensor, dropout: float, seed: int) -> Tensor:
    """Of [N, F, H, W]; what is dropped is zero, NaN and infinity too."""
    n, features, height, width = y.shape
    blocks = 8 * math.ceil(features / 64)
    sample, pixel, block = (torch.arange(size, device=y.device) for size in (n, height * width, blocks))
    words = philox.uint32(seed, block, pixel[:, None], sample[:, None, None])  # [N, HW, blocks, 4]
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=4).unflatten(3, (2, 2))
    halves = halves.movedim(3, 2).flatten(2)[..., :features]  # numbers 0 and 1 of all blocks come before 2 and 3
    dropped = _dropped(dropout)
    kept = (halves >= dropped).transpose(1, 2).view(y.shape)
    return torch.where(kept, y * _scale(dropped), 0.0)


def _dropped(dropout: float) -> int:
    """Of 65536 equal values of 16 bits, those with which an output is dropped."""
    return round(dropout * _HALVES)


def _scale(dropped: int) -> float:
    return _HALVES / (_HALVES - dropped)


class _ConcatElu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, negate: bool, dropout: float, seed: int, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.options = (negate, dropout, seed)
        return torch.ops.fastgen.concat_elu(inputs, negate, dropout, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grads = _backward_reference(grad, inputs, *ctx.options)
        else:
            grads = torch.ops.fastgen.concat_elu_grad(grad, inputs, *ctx.options)
        return None, None, None, *grads


# Checks, shared by the real and the fake implementations


def _check(inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> None:
    if not inputs:
        raise ValueError("inputs: expected at least one tensor, got none")
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise ValueError(f"inputs[{i}] must be [N, C, H, W] without empty dimensions but N, got {list(x.shape)}")
        if (x.shape[0], *x.shape[2:]) != (inputs[0].shape[0], *inputs[0].shape[2:]):
            first, shape = list(inputs[0].shape), list(x.shape)
            raise ValueError(f"inputs must agree in all but their channels, got {first} and {shape}")
    check_same(inputs[0], {f"inputs[{i}]": x for i, x in enumerate(inputs)})
    if not 0 <= dropout < 1 or _dropped(dropout) == _HALVES:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")


def _check_grad(grad: Tensor, inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> None:
    _check(inputs, negate, dropout, seed)
    shape = _output_shape(inputs, negate)
    if tuple(grad.shape) != shape:
        raise ValueError(f"grad must be {list(shape)}, got {list(grad.shape)}")
    check_same(inputs[0], {"grad": grad})


def _output_shape(inputs: Sequence[Tensor], negate: bool) -> tuple[int, ...]:
    channels = sum(x.shape[1] for x in inputs) * (2 if negate else 1)
    return (inputs[0].shape[0], channels, *inputs[0].shape[2:])


# Implementations


def _planar(inputs: Sequence[Tensor], dropout: float) -> bool:
    """With dropout all is channels-last, as random numbers are drawn."""
    return not dropout and planar(*inputs)


def _job(inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> tuple[Any, ...]:
    """The native arguments in front of the outputs. All planes of a sample together are as the channels of a pixel."""
    n, _, height, width = inputs[0].shape
    planes = _planar(inputs, dropout)
    pixels, area = (1, height * width) if planes else (height * width, 1)
    dropped = _dropped(dropout)
    work = sum(x.numel() for x in inputs)
    threads = max(1, min(torch.get_num_threads(), work // _THREAD_ELEMENTS))
    pointers, channels = [x.data_ptr() for x in inputs], [x.shape[1] * area for x in inputs]
    return n, pixels, pointers, channels, negate, dropped, _scale(dropped), seed, threads


def _forward(inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> Tensor:
    planes = _planar(inputs, dropout)
    inputs = [arranged(x, planes) for x in inputs]
    output = empty(inputs[0], _output_shape(inputs, negate), planes)
    native("concat_elu", output.dtype)(*_job(inputs, negate, dropout, seed), output.data_ptr())
    return output


def _backward(grad: Tensor, inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> list[Tensor]:
    planes = _planar(inputs, dropout)
    inputs, grad = [arranged(x, planes) for x in inputs], arranged(grad, planes)
    grads = [empty(x, x.shape, planes) for x in inputs]
    job = _job(inputs, negate, dropout, seed)
    native("concat_elu_gradient", grad.dtype)(*job, grad.data_ptr(), [x.data_ptr() for x in grads])
    return grads


def _reference(inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> Tensor:
    return arranged(concat_elu_reference(inputs, negate, dropout, seed), _planar(inputs, dropout))


def _backward_reference(
    grad: Tensor, inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int
) -> list[Tensor]:
    both = _both(inputs, negate)
    grad = torch.where(both > 0, grad, grad * both.clamp(max=0).exp())
    if dropout:
        grad = _dropout(grad, dropout, seed)
    if negate:
        of_inputs, of_negatives = grad.chunk(2, dim=1)
        grad = of_inputs - of_negatives
    planes = _planar(inputs, dropout)
    return [arranged(x, planes) for x in grad.split([x.shape[1] for x in inputs], dim=1)]


_triton, _triton_grad = (backends.triton_kernel("concat_elu", name) for name in ("forward", "backward"))


def _why_not(*args: Any) -> str | None:
    """Of the arguments of either operator."""
    *_, inputs, negate, dropout, _ = args
    if inputs[0].dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {inputs[0].dtype}"
    if dropout and _output_shape(inputs, negate)[1] > _MAX_DROPOUT:
        return f"with dropout it takes at most {_MAX_DROPOUT} output channels"
    return _why_plain(inputs)


def _why_not_triton(*args: Any) -> str | None:
    """Of the arguments of either operator."""
    inputs = args[-4]
    return backends.why_not_triton(inputs[0]) or _why_plain(inputs)


def _why_plain(inputs: Sequence[Tensor]) -> str | None:
    """What no kernel takes."""
    if backends.is_autocast(inputs[0]):
        return "autocast is on"
    if any(x.layout is not torch.strided for x in inputs):
        return "it takes strided tensors"
    return None


# Registration

_OPTIONS = "bool negate, float dropout, int seed"


def _forward_empty(inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> Tensor:
    return empty(inputs[0], _output_shape(inputs, negate), _planar(inputs, dropout))


def _grad_empty(grad: Tensor, inputs: Sequence[Tensor], negate: bool, dropout: float, seed: int) -> list[Tensor]:
    planes = _planar(inputs, dropout)
    return [empty(x, x.shape, planes) for x in inputs]


define(
    "concat_elu", f"(Tensor[] inputs, {_OPTIONS}) -> Tensor", _check, _forward_empty,
    {"reference": (_reference, None), "cpu": (_forward, _why_not), "triton": (_triton, _why_not_triton)},
)  # fmt: skip
define(
    "concat_elu_grad", f"(Tensor grad, Tensor[] inputs, {_OPTIONS}) -> Tensor[]", _check_grad, _grad_empty,
    {"reference": (_backward_reference, None), "cpu": (_backward, _why_not), "triton": (_triton_grad, _why_not_triton)},
)  # fmt: skip
