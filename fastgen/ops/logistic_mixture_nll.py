"""Negative log-likelihood of a mixture of discretised logistic distributions.

T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
Likelihood and Other Modifications", ICLR 2017, sections 2.1 and 2.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import backends
from fastgen.ops.conv_block import is_transformed, is_unobserved, unwrapped
from fastgen.ops.registration import define

MIN_LOG_SCALE = -7.0  # smaller ones count as this
_MIN_THREAD_PIXELS = 256  # below, waking a thread costs more than it saves


def logistic_mixture_nll(params: Tensor, images: Tensor, *, levels: int = 256) -> Tensor:
    """Negative log-likelihood of each pixel, in nats.

    A pixel's colours are independent given the mixture component, but for the means: that of green depends linearly on
    red, that of blue on red and green.  With ``x = 2 * level / (levels - 1) - 1`` a level's probability in a component
    is the mass that a logistic distribution has within ``1 / (levels - 1)`` of x; the lowest and the highest level take
    the tails as well.

    Args:
        params: [N, P, H, W], any strides. For K components: K mixture logits; then for each colour K means, K log
            scales (below -7 they count as -7) and, of three channels, K coefficients: red in green, red in blue, green
            in blue, each through tanh. P is 10*K for three channels, 3*K for one.
        images: uint8 levels [N, C, H, W] in 0..levels-1, C is 1 or 3.
        levels: 2..256.

    Returns:
        [N, H, W] in the dtype of params, float32 for lower precisions. It is finite for all finite params, and so are
        the gradients.

    float32 and float64 run natively on the CPU; float32, float16 and bfloat16 on the GPU (Triton); others, and all
    within `torch.func` or forward-mode differentiation, through plain PyTorch.  For the backward pass the native ways
    keep their inputs and, on the GPU, the gradient: the forward pass makes it for the gradient of the result that the
    last backward pass saw, and the backward pass only what differs.  One that is itself to be differentiated
    (``create_graph=True``) runs in plain PyTorch.

    Raises:
        TypeError: an argument is not a tensor or not of the dtype above.
        ValueError: a shape, a level or levels is not as above.  On a GPU nobody waits to look at the levels: there the
            result is NaN for a pixel with one out of range.
    """
    if isinstance(params, Tensor) and not params.is_cuda:
        params = params.to(_result_dtype(params))
    _check(params, images, levels)
    if is_transformed():
        _check_levels(images, levels)
        return logistic_mixture_nll_reference(params, images, levels)
    if torch.compiler.is_compiling():
        return _LogisticMixtureNll.apply(params, images, levels)
    function = backends.select("logistic_mixture_nll", params, images, levels)
    if function is logistic_mixture_nll_reference:
        _check_levels(images, levels)
        return logistic_mixture_nll_reference(params, images, levels)
    if function is _triton and is_unobserved((params, images)):
        _check_levels(images, levels)
        if not (torch.is_grad_enabled() and params.requires_grad):
            return _triton(params, images, levels)
        return _TritonLogisticMixtureNll.apply(params, images, levels)
    return _LogisticMixtureNll.apply(params, images, levels)


def logistic_mixture_nll_reference(params: Tensor, images: Tensor, levels: int) -> Tensor:
    """The definition, in plain PyTorch."""
    params = params.to(_result_dtype(params))
    logits, means, log_scales, coefficients = split_params(params, images.shape[1])
    level = images.unsqueeze(2)  # [N, C, 1, H, W]
    x = level.to(params.dtype) * (2 / (levels - 1)) - 1
    if images.shape[1] == 3:
        red, green = x[:, 0], x[:, 1]
        in_blue = coefficients[:, 1] * red + coefficients[:, 2] * green
        means = means + torch.stack([torch.zeros_like(logits), coefficients[:, 0] * red, in_blue], dim=1)
    half, inverse = 1 / (levels - 1), torch.exp(-log_scales)
    far = torch.finfo(params.dtype).max / 16  # sums of six such numbers are finite
    upper = ((x - means + half) * inverse).clamp(-far, far)
    lower = ((x - means - half) * inverse).clamp(-far, far)
    below_upper, above_lower = F.logsigmoid(upper), F.logsigmoid(-lower)
    inner = below_upper + above_lower + _log_one_minus_exp(log_scales.clamp(max=far), 2 * half)
    log_probs = torch.where(level == 0, below_upper, torch.where(level == levels - 1, above_lower, inner))
    return -torch.logsumexp(torch.log_softmax(logits, dim=1) + log_probs.sum(1), dim=1)


def split_params(params: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[N, P, ...] -> mixture logits [N, K, ...]; means, log scales and coefficients [N, C, K, ...].

    The latter two as they act: log scales not below `MIN_LOG_SCALE`, coefficients in [-1, 1].

    Of three channels, coefficient 0 is that of red in green, 1 and 2 are those of red and green in blue; of one
    channel, the coefficients are empty.
    """
    components, kinds = params.shape[1] // _multiple(channels), _kinds(channels)
    logits, rest = params[:, :components], params[:, components:]
    means, log_scales, *coefficients = rest.unflatten(1, (channels, kinds, components)).unbind(2)
    acting = torch.tanh(coefficients[0]) if coefficients else means[:, :0]
    # clamp has no gradient at the limit since PyTorch 2.14
    log_scales = torch.where(log_scales < MIN_LOG_SCALE, MIN_LOG_SCALE, log_scales)
    return logits, means, log_scales, acting


def _kinds(channels: int) -> int:
    """Kinds of parameters that a channel has: means, log scales, and of three channels coefficients."""
    return 3 if channels == 3 else 2


def _multiple(channels: int) -> int:
    """Parameters of a component."""
    return 1 + channels * _kinds(channels)


def _log_one_minus_exp(log_scales: Tensor, bin_width: float) -> Tensor:
    """log(1 - exp(-width)), width = bin_width * exp(-log_scale); for small ones by its series."""
    width = bin_width * torch.exp(-log_scales)
    small = width < 1e-3
    series = math.log(bin_width) - log_scales - width / 2 + width * width / 24
    return torch.where(small, series, torch.log(-torch.expm1(-torch.where(small, 1.0, width))))


def _result_dtype(params: Tensor) -> torch.dtype:
    """Lower precisions than float32 do not tell neighbouring levels apart."""
    return torch.float32 if params.dtype in (torch.float16, torch.bfloat16) else params.dtype


class _LogisticMixtureNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, params: Tensor, images: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(params, images)
        ctx.levels = levels
        return torch.ops.fastgen.logistic_mixture_nll(params, images, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        params, images = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return _differentiable_grad(grad, params, images, ctx.levels), None, None
        return torch.ops.fastgen.logistic_mixture_nll_grad(grad, params, images, ctx.levels), None, None


class _TritonLogisticMixtureNll(torch.autograd.Function):
    """Without operators, and the gradient is nearly always made along with the result."""

    @staticmethod
    def forward(ctx: Any, params: Tensor, images: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(params, images)
        ctx.levels = levels
        nll, *ctx.early = _triton_training(params, images, levels)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        params, images = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_grad(grad, params, images, ctx.levels), None, None
        early, ctx.early = ctx.early, ()  # given away once: another backward pass makes its own
        return _triton_grad(grad.resolve_neg(), params, images, ctx.levels, *early), None, None


def _differentiable_grad(grad: Tensor, params: Tensor, images: Tensor, levels: int) -> Tensor:
    """As a function of `grad` and `params`, from a second forward pass."""
    nll = logistic_mixture_nll_reference(params, images, levels)
    return torch.autograd.grad(nll, params, grad, create_graph=True)[0]


# Checks, shared by the real and the fake implementations


def _check(params: Tensor, images: Tensor, levels: int) -> None:
    for name, value in (("params", params), ("images", images)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not params.dtype.is_floating_point:
        raise TypeError(f"params must be of a floating dtype, got {params.dtype}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be of dtype torch.uint8, got {images.dtype}")
    if images.dim() != 4 or (images.shape[1] != 1 and images.shape[1] != 3):
        raise ValueError(f"images must be [N, C, H, W] with C 1 or 3, got {list(images.shape)}")
    batch, channels, height, width = images.shape
    multiple = _multiple(channels)
    count = params.shape[1] if params.dim() == 4 else 0
    if count == 0 or count % multiple or params.shape != (batch, count, height, width):
        raise ValueError(
            f"params must be [{batch}, P, {height}, {width}] with P a multiple of {multiple}, got {list(params.shape)}"
        )
    if images.device != params.device:
        raise ValueError(f"images must be on the device of params, {params.device}, got {images.device}")
    if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
        raise ValueError(f"levels must be an integer in 2..256, got {levels!r}")


def _check_grad(grad: Tensor, params: Tensor, images: Tensor, levels: int) -> None:
    _check(params, images, levels)
    expected = (images.shape[0], *images.shape[2:])
    dtype = _result_dtype(params)
    if grad.shape != expected or grad.dtype != dtype:
        raise ValueError(f"grad must be {list(expected)} {dtype}, got {list(grad.shape)} {grad.dtype}")


def _check_levels(images: Tensor, levels: int) -> None:
    if levels == 256 or images.is_cuda or not images.numel() or torch.compiler.is_compiling():
        return
    highest = int(unwrapped(images).max())
    if highest >= levels:
        raise ValueError(f"images must hold levels in 0..{levels - 1}, got {highest}")


# Implementations


def _grad_reference(grad: Tensor, params: Tensor, images: Tensor, levels: int) -> Tensor:
    with torch.enable_grad():
        leaf = params.detach().requires_grad_()
        (result,) = torch.autograd.grad(logistic_mixture_nll_reference(leaf, images, levels), leaf, grad)
    return torch.empty_like(params).copy_(result)


def _run(function: str, params: Tensor, images: Tensor, levels: int, *args: Any) -> None:
    """Calls a function of csrc/cpu/logistic_mixture_nll.h."""
    native = backends.native_cpu()
    batch, channels, height, width = images.shape
    components = params.shape[1] // _multiple(channels)
    threads = max(1, min(torch.get_num_threads(), batch * height * width // _MIN_THREAD_PIXELS))
    job = native.LogisticMixtureNll(batch, height, width, channels, components, levels, threads)
    dtype = str(params.dtype).removeprefix("torch.")
    scratch = params.new_empty(getattr(native, f"logistic_mixture_nll_scratch_{dtype}")(job))
    tensors = (params.data_ptr(), params.stride(), images.data_ptr(), images.stride())
    getattr(native, f"{function}_{dtype}")(job, *tensors, *args, scratch.data_ptr())


def _forward_cpu(params: Tensor, images: Tensor, levels: int) -> Tensor:
    nll = _forward_empty(params, images, levels)
    _run("logistic_mixture_nll", params, images, levels, nll.data_ptr())
    return nll


def _grad_cpu(grad: Tensor, params: Tensor, images: Tensor, levels: int) -> Tensor:
    gradient = torch.empty_like(params)
    pointers = (grad.data_ptr(), grad.stride(), gradient.data_ptr(), gradient.stride())
    _run("logistic_mixture_nll_gradient", params, images, levels, *pointers)
    return gradient


def _why_not_cpu(*args: Any) -> str | None:
    params = args[-3]
    if params.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {params.dtype}"
    if params.layout is not torch.strided:
        return f"it takes strided tensors, got {params.layout}"
    return None


_triton, _triton_training, _triton_grad = (
    backends.triton_kernel("logistic_mixture_nll", name) for name in ("forward", "training_forward", "backward")
)


# Registration


def _forward_empty(params: Tensor, images: Tensor, levels: int) -> Tensor:
    return params.new_empty((params.shape[0], *params.shape[2:]), dtype=_result_dtype(params))


def _grad_empty(grad: Tensor, params: Tensor, images: Tensor, levels: int) -> Tensor:
    return torch.empty_like(params)


def _check_values(*args: Any) -> None:
    _check_levels(*args[-2:])


def _why_not_triton(*args: Any) -> str | None:
    return backends.why_not_triton(args[-3])


define(
    "logistic_mixture_nll", "(Tensor params, Tensor images, int levels) -> Tensor", _check, _forward_empty,
    {
        "reference": (logistic_mixture_nll_reference, None), "cpu": (_forward_cpu, _why_not_cpu),
        "triton": (_triton, _why_not_triton),
    },
    check_values=_check_values,
)  # fmt: skip
define(
    "logistic_mixture_nll_grad", "(Tensor grad, Tensor params, Tensor images, int levels) -> Tensor",
    _check_grad, _grad_empty,
    {"reference": (_grad_reference, None), "cpu": (_grad_cpu, _why_not_cpu), "triton": (_triton_grad, _why_not_triton)},
    check_values=_check_values,
)  # fmt: skip
