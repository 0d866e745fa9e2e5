"""Pass 2 for operators that work element by element: they become `Pointwise` nodes over the primitives of
`fastgen.sampling.plan.PRIMITIVES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen.sampling.graph import LayoutError
from fastgen.sampling.planes import pointwise
from fastgen.sampling.rules import OVER_POSITIONS, find, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


def _emit(tracer: Tracer, shape: Sequence[int]) -> Callable[..., Tensor]:
    return lambda op, *operands: pointwise(tracer, op, operands, shape)


def _operand(tracer: Tracer, value: Any) -> Tensor | float:
    """Codes of a tensor operand; a parameter with one element, or a number, as a number."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() == 1 and not tracer.varies(value):
        return float(value)
    return tracer.codes(value)


def named_arguments(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call of an ATen operator by their names in its schema."""
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


Formula = Callable[..., "Tensor | float"]


def elementwise(*names: str) -> Callable[[Formula], Formula]:
    """Register formula(emit, *operands, **rest) for ATen operators; operands are the arguments `self` and `other`."""

    def add(formula: Formula) -> Formula:
        def apply(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
            emit = _emit(tracer, outputs[0].shape)
            named = named_arguments(func, args, kwargs)
            tensors = [_operand(tracer, v) for k, v in named.items() if k in ("self", "other")]
            rest = {
                k: _operand(tracer, v) if isinstance(v, Tensor) else v
                for k, v in named.items()
                if k not in ("self", "other")
            }
            result = formula(emit, *tensors, **rest)
            assert isinstance(result, Tensor)
            tracer.set_codes(outputs[0], result)

        rule(*names)(apply)
        return formula

    return add


for _name in ("tanh", "sigmoid", "relu", "exp", "expm1", "abs", "neg", "sqrt", "log", "erf"):
    elementwise(_name)(lambda emit, x, op=_name: emit(op, x))
for _name, _op in (("maximum", "max"), ("minimum", "min")):
    elementwise(_name)(lambda emit, x, y, op=_op: emit(op, x, y))


@elementwise("add")
def _add(emit: Formula, x: Any, y: Any, alpha: float = 1) -> Any:
    return emit("add", x, y if alpha == 1 else emit("mul", y, alpha) if isinstance(y, Tensor) else y * alpha)


@elementwise("sub")
def _sub(emit: Formula, x: Any, y: Any, alpha: float = 1) -> Any:
    return emit("sub", x, y if alpha == 1 else emit("mul", y, alpha) if isinstance(y, Tensor) else y * alpha)


@elementwise("rsub")
def _rsub(emit: Formula, x: Any, y: Any, alpha: float = 1) -> Any:
    return emit("sub", y, x if alpha == 1 else emit("mul", x, alpha))


@elementwise("mul")
def _mul(emit: Formula, x: Any, y: Any) -> Any:
    return emit("mul", x, y)


_mul_real = find(torch.ops.aten.mul.Tensor)


@rule("mul")
def _mul_any(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """Complex numbers turn queries and keys; their parts lie beside each other."""
    if not outputs[0].is_complex():
        masked = _masked_windows(tracer, args, outputs[0].shape)
        if masked is not None:
            return tracer.set_codes(outputs[0], masked)
        assert _mul_real is not None
        return _mul_real(tracer, func, args, kwargs, outputs)
    if not all(isinstance(a, Tensor) and a.is_complex() and not a.is_conj() for a in args):
        raise LayoutError("on complex numbers and others")
    (a, b), (c, d) = (tracer.codes(torch.view_as_real(v)).unbind(-1) for v in args)
    emit = _emit(tracer, outputs[0].shape)
    real = emit("sub", emit("mul", a, c), emit("mul", b, d))
    imaginary = emit("add", emit("mul", a, d), emit("mul", b, c))
    tracer.set_codes(torch.view_as_real(outputs[0]), torch.stack([real, imaginary], -1))


def _masked_windows(tracer: Tracer, args: tuple, shape: torch.Size) -> Tensor | None:
    """Codes of what F.unfold gives, [..., kernel, positions], times zeros and ones for each of these, else None.

    Windows that are left out as a whole are not seen at all, and where the others lose only what lies outside of the
    image, there is nothing to compute.
    """
    mask = next((a for a in args if isinstance(a, Tensor) and not tracer.varies(a)), None)
    x = next((a for a in args if isinstance(a, Tensor) and tracer.depends(a)), None)
    if mask is None or x is None or len(shape) != 3 or x.shape != shape or mask.shape[-2:] != shape[-2:]:
        return None
    keep = mask.detach().cpu()
    if not ((keep == 0) | (keep == 1)).all():
        return None
    keep = keep.bool().expand(shape)
    codes = torch.where(keep.any(2, keepdim=True), tracer.codes(x), 0)
    if not ((codes != 0) & ~keep).any():
        return torch.where(keep, codes, 0)
    return pointwise(tracer, "mul", [codes, tracer.codes(mask)], shape) if shape[0] > tracer.graph.batch else None


@elementwise("div")
def _div(emit: Formula, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise LayoutError(f"with rounding mode {rounding_mode!r}")
    return emit("div", x, y)


@elementwise("reciprocal")
def _reciprocal(emit: Formula, x: Any) -> Any:
    return emit("div", 1.0, x)


@elementwise("elu")
def _elu(emit: Formula, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """scale * (max(0, x) + alpha * (exp(min(0, input_scale * x)) - 1))."""
    if alpha == scale == input_scale == 1:
        return emit("elu", x)
    scaled = x if input_scale == 1 else emit("mul", x, input_scale)
    low = emit("expm1", emit("min", scaled, 0.0))
    out = emit("add", emit("relu", x), low if alpha == 1 else emit("mul", low, alpha))
    return out if scale == 1 else emit("mul", out, scale)


@elementwise("leaky_relu")
def _leaky_relu(emit: Formula, x: Any, negative_slope: float = 0.01) -> Any:
    return emit("add", emit("relu", x), emit("mul", emit("min", x, 0.0), negative_slope))


@elementwise("celu")
def _celu(emit: Formula, x: Any, alpha: float = 1) -> Any:
    """max(0, x) + alpha * (exp(min(0, x / alpha)) - 1)."""
    return _elu(emit, x, alpha, 1, 1 / alpha)


@elementwise("selu")
def _selu(emit: Formula, x: Any) -> Any:
    """Klambauer et al. 2017, "Self-Normalizing Neural Networks", equation 2."""
    return _elu(emit, x, 1.6732632423543772, 1.0507009873554805, 1)


@elementwise("gelu")
def _gelu(emit: Formula, x: Any, approximate: str = "none") -> Any:
    """Hendrycks and Gimpel 2016: x times the normal distribution function, or its approximation by tanh."""
    if approximate == "tanh":
        cubic = emit("mul", emit("mul", emit("mul", x, x), x), 0.044715)
        inner = emit("tanh", emit("mul", emit("add", x, cubic), math.sqrt(2 / math.pi)))
    else:
        inner = emit("erf", emit("mul", x, math.sqrt(0.5)))
    return emit("mul", emit("mul", x, 0.5), emit("add", inner, 1.0))


@elementwise("softplus")
def _softplus(emit: Formula, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    """log(1 + exp(beta * x)) / beta; beyond the threshold the identity, which from 17 on it is to float32 rounding."""
    if threshold < 17:
        raise LayoutError(f"with threshold {threshold}")
    scaled = x if beta == 1 else emit("mul", x, beta)
    tail = emit("log", emit("add", emit("exp", emit("neg", emit("abs", scaled))), 1.0))
    out = emit("add", emit("relu", scaled), tail)
    return out if beta == 1 else emit("div", out, beta)


@elementwise("log_sigmoid", "log_sigmoid_forward")
def _log_sigmoid(emit: Formula, x: Any) -> Any:
    return emit("neg", _softplus(emit, emit("neg", x)))


@elementwise("mish")
def _mish(emit: Formula, x: Any) -> Any:
    return emit("mul", x, emit("tanh", _softplus(emit, x)))


@elementwise("hardsigmoid")
def _hardsigmoid(emit: Formula, x: Any) -> Any:
    return emit("div", emit("min", emit("max", emit("add", x, 3.0), 0.0), 6.0), 6.0)


@elementwise("hardswish")
def _hardswish(emit: Formula, x: Any) -> Any:
    return emit("mul", x, _hardsigmoid(emit, x))


@elementwise("rsqrt")
def _rsqrt(emit: Formula, x: Any) -> Any:
    return emit("div", 1.0, emit("sqrt", x))


@elementwise("lerp")
def _lerp(emit: Formula, x: Any, end: Any, weight: Any) -> Any:
    return emit("add", x, emit("mul", weight, emit("sub", end, x)))


@elementwise("addcmul")
def _addcmul(emit: Formula, x: Any, tensor1: Any, tensor2: Any, value: float = 1) -> Any:
    for factor in (tensor2, value):
        both = isinstance(tensor1, float) and isinstance(factor, int | float)
        tensor1 = tensor1 * factor if both else emit("mul", tensor1, factor)
    return emit("add", x, tensor1)


@rule("_prelu_kernel")
def _prelu(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    emit = _emit(tracer, outputs[0].shape)
    x, slope = (tracer.codes(a) for a in args)
    tracer.set_codes(outputs[0], emit("add", emit("relu", x), emit("mul", emit("min", x, 0.0), slope)))


@elementwise("silu")
def _silu(emit: Formula, x: Any) -> Any:
    return emit("mul", x, emit("sigmoid", x))


@rule("glu")
def _glu(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The first half of a dimension times the sigmoid of the second."""
    value, gate = tracer.codes(args[0]).chunk(2, dim=args[1] if len(args) > 1 else -1)
    emit = _emit(tracer, outputs[0].shape)
    tracer.set_codes(outputs[0], emit("mul", value, emit("sigmoid", gate)))


@elementwise("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(emit: Formula, x: Any, min: float | None = None, max: float | None = None, **bounds: float) -> Any:
    low, high = bounds.get("min_val", min), bounds.get("max_val", max)
    out = x if low is None else emit("max", x, low)
    return out if high is None else emit("min", out, high)


_MOST_FACTORS = 8  # of a power


@elementwise("pow")
def _pow(emit: Formula, x: Any, exponent: Tensor | float) -> Any:
    if isinstance(exponent, Tensor) or abs(exponent) not in (0.5, *range(1, _MOST_FACTORS + 1)):
        raise LayoutError(f"with an exponent other than 0.5, 1, ..., {_MOST_FACTORS} and their negatives")
    result = emit("sqrt", x) if abs(exponent) == 0.5 else x
    for _ in range(abs(int(exponent)) - 1):
        result = emit("mul", result, x)
    return result if exponent > 0 else emit("div", 1.0, result)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
def _batch_norm(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """(x - mean) / sqrt(var + eps) * weight + bias with running statistics: one scale and one shift per channel."""
    named = named_arguments(func, args, kwargs)
    if named.get("training"):
        raise tracer.unsupported(f"a norm by statistics of the batch or an image, {OVER_POSITIONS},")
    scale = torch.rsqrt(named["running_var"].double() + named["eps"])
    scale = scale * named["weight"].double() if named["weight"] is not None else scale
    shift = -named["running_mean"].double() * scale
    shift = shift + named["bias"].double() if named["bias"] is not None else shift
    emit = _emit(tracer, outputs[0].shape)
    scale, shift = (tracer.codes(v.float().view(1, -1, 1, 1)) for v in (scale, shift))
    tracer.set_codes(outputs[0], emit("add", emit("mul", tracer.codes(args[0]), scale), shift))
