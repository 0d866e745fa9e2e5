"""The nearest code of every vector: the vector quantisation of a VQ-VAE.

A. van den Oord, O. Vinyals, K. Kavukcuoglu, "Neural Discrete Representation Learning", NIPS 2017, equation 1.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.conv_block import check_same, is_jit_traced, is_transformed, is_unobserved
from fastgen.ops.feature_maps import native
from fastgen.ops.registration import define

_MAX_SCORES = 1 << 22  # that the reference has in memory at a time
_THREAD_POSITIONS = 16  # a panel of them at least
_THREAD_PRODUCTS = 1 << 19  # below, waking a thread costs more than it saves


def nearest_code(input: Tensor, codebook: Tensor) -> Tensor:
    """``argmin_k ||input[n, :, ...] - codebook[k]||`` for every position; of equally near codes the lowest index.

    Args:
        input: [N, D] or [N, D, *spatial], any strides; N or spatial dimensions may be 0.
        codebook: [K, D] of the same dtype, any strides.

    Returns:
        int64 [N, *spatial], contiguous. There is no gradient.

    What is compared is ``input . codebook[k] - ||codebook[k]||^2 / 2``, in float32 for lower precisions, and under
    autocast as well. A code with a NaN or an infinite value, or whose squared norm overflows, is never the nearest. A
    vector with a NaN or an infinite value is as far from all codes and gets index 0, and so does every vector where no
    code is finite.

    float32 and float64 run natively on the CPU, in one pass that keeps no distances; there, an index depends on its
    vector and the codebook only, to the bit, whatever the batch, the strides and the number of threads. float32,
    float16 and bfloat16 run in Triton on the GPU; everything else, torch.jit.trace and all within `torch.func` in plain
    PyTorch.

    Raises:
        TypeError: an argument is not a tensor, not of a floating dtype, or the dtypes differ.
        ValueError: a shape is not as above, or the devices differ.
    """
    _check(input, codebook)
    with torch.no_grad():
        if is_transformed():
            return nearest_code_reference(input, codebook)
        if torch.compiler.is_compiling():
            return torch.ops.fastgen.nearest_code(input, codebook)
        if is_jit_traced():
            return nearest_code_reference(input, codebook)
        function = backends.select("nearest_code", input, codebook)
        if function is nearest_code_reference or is_unobserved((input, codebook)):
            return function(input, codebook)
        return torch.ops.fastgen.nearest_code(input, codebook)


def nearest_code_reference(input: Tensor, codebook: Tensor) -> Tensor:
    """The definition, in plain PyTorch, for so many positions at a time."""
    dtype = torch.promote_types(torch.promote_types(input.dtype, codebook.dtype), torch.float32)
    rows = input.movedim(1, -1).reshape(-1, input.shape[1])
    # A recorded graph is for any number of positions: all at once.
    parts = [rows] if is_jit_traced() else rows.split(max(1, _MAX_SCORES // len(codebook)))
    kind = input.device.type
    autocasts = torch.amp.is_autocast_available(kind)  # the meta device does not
    with torch.autocast(kind, enabled=False) if autocasts else contextlib.nullcontext():
        codes = codebook.to(dtype)
        half_norms = codes.square().sum(1) / 2
        found = [_nearest(part.to(dtype), codes, half_norms) for part in parts]
    return torch.cat(found).reshape(_output_shape(input))


def _nearest(rows: Tensor, codes: Tensor, half_norms: Tensor) -> Tensor:
    distances = half_norms - rows @ codes.T  # half the squared ones, less what all codes share
    index = torch.where(distances.isnan(), torch.inf, distances).argmin(1)
    return torch.where(rows.isfinite().all(1), index, 0)


# Checks, shared by the real and the fake implementations


def _check(input: Tensor, codebook: Tensor) -> None:
    for name, value in (("input", input), ("codebook", codebook)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if input.dim() < 2 or input.shape[1] == 0:
        raise ValueError(f"input must be [N, D] or [N, D, *spatial] with D at least 1, got {list(input.shape)}")
    if codebook.dim() != 2 or codebook.shape[0] == 0 or codebook.shape[1] != input.shape[1]:
        raise ValueError(
            f"codebook must be [K, {input.shape[1]}], as the input has features, with K at least 1, "
            f"got {list(codebook.shape)}"
        )
    check_same(input, {"codebook": codebook})


def _output_shape(input: Tensor) -> tuple[int, ...]:
    return (input.shape[0], *input.shape[2:])


# Implementations


def _search(input: Tensor, codebook: Tensor) -> Tensor:
    output = _empty(input, codebook)
    positions, count = output.numel(), len(codebook)
    if positions == 0:
        return output
    vectors, sizes, strides = _vectors(input)
    codebook = codebook.contiguous()
    most = min(positions // _THREAD_POSITIONS, positions * codebook.numel() // _THREAD_PRODUCTS)
    threads = max(1, min(torch.get_num_threads(), most))
    scratch = input.new_empty(native("nearest_code_scratch", input.dtype)(sizes, count, threads))
    native("nearest_code", input.dtype)(
        sizes, count, threads, vectors.data_ptr(), strides,
        codebook.data_ptr(), output.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    return output


def _vectors(input: Tensor) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """The vectors, copied only where positions of an image have no common stride; sizes and strides of images, their
    positions and features: one image where that will do.
    """
    vectors = input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)
    images, depth, area = vectors.shape
    of_image, of_feature, of_position = vectors.stride()
    if area == 1:
        return vectors, (1, images, depth), (0, of_image, of_feature)
    if of_image == area * of_position:
        return vectors, (1, images * area, depth), (0, of_position, of_feature)
    return vectors, (images, area, depth), (of_image, of_position, of_feature)


def _why_not_cpu(input: Tensor, codebook: Tensor) -> str | None:
    if input.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {input.dtype}"
    return _why_not(input, codebook)


def _why_not_triton(input: Tensor, codebook: Tensor) -> str | None:
    return backends.why_not_triton(input) or _why_not(input, codebook)


def _why_not(input: Tensor, codebook: Tensor) -> str | None:
    if codebook.dtype != input.dtype:  # under autocast
        return f"it takes one dtype, got {input.dtype} and {codebook.dtype}"
    if any(x.layout is not torch.strided for x in (input, codebook)):
        return "it takes strided tensors"
    return None


# Registration


def _empty(input: Tensor, codebook: Tensor) -> Tensor:
    return input.new_empty(_output_shape(input), dtype=torch.int64)


define(
    "nearest_code", "(Tensor input, Tensor codebook) -> Tensor", _check, _empty,
    {
        "reference": (nearest_code_reference, None), "cpu": (_search, _why_not_cpu),
        "triton": (backends.triton_kernel("nearest_code", "nearest_code"), _why_not_triton),
    },
)  # fmt: skip
