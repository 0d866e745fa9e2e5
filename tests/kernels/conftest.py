"""Triton kernels run on the GPU where there is one, else in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastgen
from fastgen.ops.normal import _fma

pytest.importorskip("triton", reason="triton is not installed: pip install 'fastgen[triton]'")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with fastgen.backend("triton"):
        yield


@pytest.fixture(autouse=True, scope="session")
def _exact_interpreter() -> None:
    """NumPy has no fused multiplication and addition, and sums the rows of a float32 product in orders of their own, so
    that an image would depend on its batch; the interpreter multiplies bits of bfloat16 as integers and cuts bits off
    where it should round to it, and takes integers between 2^31 and 2^32 for int64 of four bytes.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fused(_: Any, x: Any, y: Any, z: Any) -> Any:
        arrays = np.broadcast_arrays(x.data, y.data, z.data)
        return TensorHandle(_fma(*(torch.tensor(array) for array in arrays)).numpy(), z.dtype.scalar)

    def dot(_: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        # In float64 the order of a sum is lost in the rounding to float32.
        sums = np.matmul(as_float(a).astype(np.float64), as_float(b).astype(np.float64))
        return TensorHandle(sums.astype(np.float32) + d.data, d.dtype.scalar)

    def as_float(handle: Any) -> np.ndarray:
        if str(handle.dtype.scalar) == "bf16":
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def rounded(self: Any, x: Any, dtype: Any) -> Any:
        if str(dtype.scalar) != "bf16":
            return self.cast_impl(x, dtype)
        bits = torch.tensor(x.data.astype(np.float32)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), dtype.scalar)

    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, int) and 2**31 <= value < 2**32:
            import triton.language as tl

            return tl.tensor(TensorHandle(np.array([value], dtype=np.int64), tl.int64), tl.int64)
        return convert(value)

    interpreter._implicit_cvt = converted
    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    InterpreterBuilder.create_fma = fused
    InterpreterBuilder.create_fp_trunc = rounded
    InterpreterBuilder.create_dot = dot
