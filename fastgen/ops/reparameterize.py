"""Samples of a normal distribution as a differentiable function of its parameters, and its divergence from the prior.

D. P. Kingma, M. Welling, "Auto-Encoding Variational Bayes", ICLR 2014, section 2.4 and appendix B.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen._arguments import integer, signed
from fastgen.ops import philox
from fastgen.ops.conv_block import is_transformed, is_unobserved
from fastgen.ops.normal import normals_reference
from fastgen.ops.registration import define

_dispatch_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing

MAX_LOGVAR = 80.0  # larger ones count as this; csrc/cpu/reparameterize.cpp has it, too
_MIN_THREAD_ELEMENTS = 8192  # below, waking a thread costs more than it saves


def reparameterize(
    mu: Tensor, logvar: Tensor, *, seed: int | None = None, start: int = 0, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Samples of N(mu, exp(logvar)), and the Kullback-Leibler divergence from the standard normal distribution.

    ``z = mu + exp(logvar / 2) * eps``, and per sample ``kl = sum(mu^2 + exp(logvar) - 1 - logvar) / 2``.  The noise eps
    of draw s of sample i is a function of (seed, start + i, s) alone, whatever N, num_samples or the number of threads:
    draw 0 is ``ops.normal(N, shape, seed=seed, start=start)``.  It is computed again in the backward pass and never
    stored.

    Args:
        mu: means [N, ...].
        logvar: logarithms of the variances, of the shape and dtype of mu.  Above 80 they count as 80, and their
            gradient is zero: so all results are finite for finite logvar (beyond, exp overflows in float32).
        seed: 0..2^64-1; another one for each step of a training. None: one of PyTorch's default generator, that of the
            CPU; where a seed would be a constant, in what is compiled, traced, transformed or captured as a CUDA graph,
            the noise is that of ``torch.randn`` instead, in vmap with its rules of randomness.
        start: index of the first sample in the sequence of the seed, 0..2^62-1.
        num_samples: None, or the number of draws for each sample, at least 1.

    Returns:
        z: [N, ...], or [num_samples, N, ...].
        kl: [N], in nats.

        Both in the dtype of mu, float32 for lower precisions.

    float32 and float64 run natively on the CPU, float32 on the GPU (Triton), everything else through plain PyTorch.  So
    do second derivatives.

    Raises:
        TypeError: an argument is not a tensor, or not of the dtype above.
        ValueError: a shape or a number is not as above.
    """
    if seed is None:
        if _would_keep_a_seed(mu):
            integer("start", start, 0, 2**62 - 1)
            return _with_pytorchs_noise(mu, logvar, num_samples)
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    if not (type(seed) is int and 0 <= seed < 2**64 and type(start) is int and 0 <= start < 2**62):
        philox.check_seed(seed)
        start = integer("start", start, 0, 2**62 - 1)
    draws = 0 if num_samples is None else integer("num_samples", num_samples, 1, 2**32 - 1)
    key = signed(seed)
    compiling = torch.compiler.is_compiling()
    if not compiling and _goes_straight(mu, logvar):
        if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
            return _Reparameterize.apply(mu, logvar, key, start, draws)
        return _forward_cpu(mu, logvar, key, start, draws)
    if isinstance(mu, Tensor) and mu.dtype in (torch.float16, torch.bfloat16):
        mu, logvar = mu.float(), logvar.float() if isinstance(logvar, Tensor) else logvar
    args = (mu, logvar, key, start, draws)
    _check(*args)
    if is_transformed():
        return reparameterize_reference(*args)
    if compiling:
        return _Reparameterize.apply(*args)
    function = backends.select("reparameterize", *args)
    if function is _triton and is_unobserved((mu, logvar)):
        wants_grad = torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad)
        return _Reparameterize.apply(*args) if wants_grad else function(*args)
    return function(*args) if function is reparameterize_reference else _Reparameterize.apply(*args)


def _would_keep_a_seed(mu: Tensor) -> bool:
    """Whether this call is made into something that is run again, with the same seed."""
    if torch.compiler.is_compiling() or is_transformed() or not is_unobserved(()):
        return True
    return isinstance(mu, Tensor) and mu.is_cuda and torch.cuda.is_current_stream_capturing()


def _with_pytorchs_noise(mu: Tensor, logvar: Tensor, num_samples: int | None) -> tuple[Tensor, Tensor]:
    _check(mu, logvar, 0, 0, 0)
    draws = [] if num_samples is None else [integer("num_samples", num_samples, 1, 2**32 - 1)]
    if mu.dtype in (torch.float16, torch.bfloat16):
        mu, logvar = mu.float(), logvar.float()
    noise = torch.randn((*draws, *mu.shape), dtype=mu.dtype, device=mu.device)
    return _formulas(mu, logvar, noise)


def _goes_straight(mu: Tensor, logvar: Tensor) -> bool:
    """Whether the arguments are right, the native kernel serves them, and nobody watches.

    That is what the other way finds out, too, but for small tensors it takes longer than the kernel.
    """
    return (
        type(mu) in _PLAIN
        and type(logvar) in _PLAIN
        and not mu.is_neg()
        and not logvar.is_neg()
        and logvar.dtype is mu.dtype
        and logvar.is_cpu
        and logvar.layout is torch.strided
        and mu.dim() > 0
        and mu.shape == logvar.shape
        and _is_native(mu)
        and not is_transformed()
    )


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether none is of a subclass, or has its sign still to be changed."""
    if not {type(tensor) for tensor in tensors} <= _PLAIN:
        return False
    return not any(tensor is not None and tensor.is_neg() for tensor in tensors)


def _is_native(mu: Tensor) -> bool:
    """Whether `backends.select` would choose the native kernel, and nobody watches."""
    return (
        mu.is_cpu
        and mu.dtype in _DTYPES
        and mu.layout is torch.strided
        and backends.is_free("cpu")
        and _dispatch_modes() == 0
        and not _is_tracing()
    )


def _is_for_triton(name: str, args: tuple[Any, ...], function: Any) -> bool:
    """Whether the operator would call the Triton kernel, and nobody watches."""
    return is_unobserved(()) and backends.select(name, *args) is function


def reparameterize_reference(mu: Tensor, logvar: Tensor, seed: int, start: int, draws: int) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch; draws = 0 is one draw without a dimension of its own."""
    return _formulas(mu, logvar, _noise(mu, seed, start, draws))


def _formulas(mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = _rows_and_columns(mu)
    logvar = torch.where(logvar > MAX_LOGVAR, MAX_LOGVAR, logvar)  # at the limit clamp has no gradient since 2.14
    kl = 0.5 * (mu * mu + torch.expm1(logvar) - logvar).reshape(rows, columns).sum(1)
    return mu + torch.exp(0.5 * logvar) * noise, kl


def _noise(mu: Tensor, seed: int, start: int, draws: int) -> Tensor:
    """What the definition multiplies the standard deviations by: [N, ...], or [draws, N, ...]."""
    rows, columns = _rows_and_columns(mu)
    noise = [normals_reference(rows, columns, seed % 2**64, start, s, mu.device) for s in range(max(1, draws))]
    return torch.stack(noise).to(mu.dtype).reshape((*([draws] if draws else []), *mu.shape))


class _Reparameterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, seed: int, start: int, draws: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mu, logvar)
        ctx.options = (seed, start, draws)
        ctx.set_materialize_grads(False)
        args = (mu, logvar, seed, start, draws)
        if not torch.compiler.is_compiling() and _are_plain((mu, logvar)):
            if _is_native(mu):
                return _forward_cpu(*args)
            if _is_for_triton("reparameterize", args, _triton):
                return _triton(*args)
        return torch.ops.fastgen.reparameterize(*args)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_kl is None:
            return (None,) * 5
        tensors = (grad_z, grad_kl, *ctx.saved_tensors)
        args = (*tensors, *ctx.options)
        function: Any = torch.ops.fastgen.reparameterize_grad
        if torch.is_grad_enabled():  # for second derivatives
            function = _grad_reference
        elif not torch.compiler.is_compiling() and _are_plain(tensors):
            if _is_native(tensors[2]):
                function = _grad_cpu
            elif _is_for_triton("reparameterize_grad", args, _triton_grad):
                function = _triton_grad
        return (*function(*args), None, None, None)


# Checks, shared by the real and the fake implementations


def _check(mu: Tensor, logvar: Tensor, seed: int, start: int, draws: int) -> None:
    for name, value in (("mu", mu), ("logvar", logvar)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not mu.dtype.is_floating_point:
        raise TypeError(f"mu must be of a floating dtype, got {mu.dtype}")
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar must have the dtype of mu, {mu.dtype}, got {logvar.dtype}")
    if mu.dim() == 0:
        raise ValueError("mu must be [N, ...], got a tensor without dimensions")
    if logvar.shape != mu.shape:
        raise ValueError(f"logvar must have the shape of mu, {list(mu.shape)}, got {list(logvar.shape)}")
    if logvar.device != mu.device:
        raise ValueError(f"logvar must be on the device of mu, {mu.device}, got {logvar.device}")


def _check_grad(grad_z: Tensor | None, grad_kl: Tensor | None, mu: Tensor, *rest: Any) -> None:
    _check(mu, *rest)
    draws = rest[-1]
    expected = {"grad_z": (*([draws] if draws else []), *mu.shape), "grad_kl": mu.shape[:1]}
    for (name, shape), grad in zip(expected.items(), (grad_z, grad_kl), strict=True):
        if grad is not None and (grad.shape != shape or grad.dtype != mu.dtype):
            raise ValueError(f"{name} must be {list(shape)} {mu.dtype}, got {list(grad.shape)} {grad.dtype}")


# Implementations


def _rows_and_columns(mu: Tensor) -> tuple[int, int]:
    shape = mu.shape
    return shape[0], shape[1] if len(shape) == 2 else math.prod(shape[1:])


def _grad_reference(
    grad_z: Tensor | None, grad_kl: Tensor | None, mu: Tensor, logvar: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """Differentiable."""
    bounded = logvar.clamp(max=MAX_LOGVAR)
    grad_mu, grad_logvar = torch.zeros_like(mu), torch.zeros_like(logvar)
    if grad_z is not None:
        draws = options[-1]
        grads, noise = (grad_z, _noise(mu, *options)) if draws else (grad_z[None], _noise(mu, *options)[None])
        grad_mu = grad_mu + grads.sum(0)
        grad_logvar = grad_logvar + 0.5 * torch.exp(0.5 * bounded) * (grads * noise).sum(0)
    if grad_kl is not None:
        grad_kl = grad_kl.reshape((-1, *(1,) * (mu.dim() - 1)))
        grad_mu = grad_mu + grad_kl * mu
        grad_logvar = grad_logvar + 0.5 * grad_kl * torch.expm1(bounded)
    return grad_mu.contiguous(), torch.where(logvar > MAX_LOGVAR, 0.0, grad_logvar).contiguous()


def _dense_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows are dense, and the elements from one row to the next; halves of a batch need no copy."""
    strides, dense = tensor.stride(), 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(strides[1:]), strict=True):
        if stride != dense and size != 1:
            return tensor.contiguous(), math.prod(tensor.shape[1:])
        dense *= size
    return tensor, strides[0]


def _forward_cpu(mu: Tensor, logvar: Tensor, seed: int, start: int, draws: int) -> tuple[Tensor, Tensor]:
    rows, columns = _rows_and_columns(mu)
    z, kl = _results(mu, rows, draws)
    _run("reparameterize", mu, logvar, rows, columns, seed, start, draws, z.data_ptr(), kl.data_ptr())
    return z, kl


def _grad_cpu(
    grad_z: Tensor | None, grad_kl: Tensor | None, mu: Tensor, logvar: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    grad_mu, grad_logvar = _grad_empty(grad_z, grad_kl, mu)
    grad_z = None if grad_z is None else grad_z.contiguous()
    pointers = [0 if grad is None else grad.data_ptr() for grad in (grad_z, grad_kl)]
    grad_kl_row = 0 if grad_kl is None else grad_kl.stride(0)
    grads = (*pointers, grad_kl_row, grad_mu.data_ptr(), grad_logvar.data_ptr())
    _run("reparameterize_gradient", mu, logvar, *_rows_and_columns(mu), *options, *grads)
    return grad_mu, grad_logvar


def _run(
    function: str, mu: Tensor, logvar: Tensor, rows: int, columns: int, seed: int, start: int, draws: int, *args: int
) -> None:
    """Calls a function of csrc/cpu/reparameterize.h."""
    mu_row = logvar_row = columns
    if not mu.is_contiguous():
        mu, mu_row = _dense_rows(mu)
    if not logvar.is_contiguous():
        logvar, logvar_row = _dense_rows(logvar)
    draws = draws or 1
    threads, most = 1, rows * columns * draws // _MIN_THREAD_ELEMENTS
    if most > 1:
        threads = min(torch.get_num_threads(), rows, most)
    _kernel(function, mu.dtype)(
        rows, columns, draws, seed % 2**64, start, threads,
        mu.data_ptr(), mu_row, logvar.data_ptr(), logvar_row, *args,
    )  # fmt: skip


@functools.cache
def _kernel(function: str, dtype: torch.dtype) -> Any:
    return getattr(backends.native_cpu(), f"{function}_{_DTYPES[dtype]}")


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def _why_not_cpu(*args: Any) -> str | None:
    mu = args[-5]
    if mu.dtype not in _DTYPES:
        return f"it takes float32 and float64, got {mu.dtype}"
    if mu.layout is not torch.strided:
        return f"it takes strided tensors, got {mu.layout}"
    return None


_triton, _triton_grad = (backends.triton_kernel("reparameterize", name) for name in ("forward", "backward"))


# Registration

_DRAWS = "SymInt seed, SymInt start, int draws"  # symbolic: a step of training has a seed of its own, but no graph


def _forward_empty(mu: Tensor, logvar: Tensor, seed: int, start: int, draws: int) -> tuple[Tensor, Tensor]:
    return _results(mu, mu.shape[0], draws)


def _results(mu: Tensor, rows: int, draws: int) -> tuple[Tensor, Tensor]:
    if draws or not mu.is_contiguous():
        return mu.new_empty((*([draws] if draws else []), *mu.shape)), mu.new_empty(rows)
    return torch.empty_like(mu), mu.new_empty(rows)  # sooner


def _grad_empty(grad_z: Tensor | None, grad_kl: Tensor | None, mu: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if mu.is_contiguous():  # sooner
        return torch.empty_like(mu), torch.empty_like(mu)
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def _why_not_triton(*args: Any) -> str | None:
    return backends.why_not_triton(args[-5])


define(
    "reparameterize", f"(Tensor mu, Tensor logvar, {_DRAWS}) -> (Tensor, Tensor)", _check, _forward_empty,
    {
        "reference": (reparameterize_reference, None), "cpu": (_forward_cpu, _why_not_cpu),
        "triton": (_triton, _why_not_triton),
    },
)  # fmt: skip
define(
    "reparameterize_grad",
    f"(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, {_DRAWS}) -> (Tensor, Tensor)",
    _check_grad, _grad_empty,
    {"reference": (_grad_reference, None), "cpu": (_grad_cpu, _why_not_cpu), "triton": (_triton_grad, _why_not_triton)},
)  # fmt: skip
