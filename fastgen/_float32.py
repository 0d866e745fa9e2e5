"""The precision that PyTorch was asked for in products of float32 on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


def float32_products() -> str:
    """Of matrix products: "ieee", or "tf32" where that was asked for."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # once that was written, the older setting may not be read
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class _Entered:
    """Of `convolutions_like_products`, whose setting is that of all threads: how often, and what was there before."""

    lock = threading.Lock()
    count = 0
    before: Any = None


@contextlib.contextmanager
def convolutions_like_products() -> Iterator[None]:
    """cuDNN's convolutions have the precision of matrix products; left alone they take TF32, which nobody asked for."""
    products, cudnn = float32_products(), torch.backends.cudnn
    owner: Any = cudnn
    name: str = "allow_tf32"
    value: str | bool = products == "tf32"
    if hasattr(cudnn, "conv"):
        owner, name, value = cudnn.conv, "fp32_precision", products
    with _Entered.lock:
        if _Entered.count == 0:
            _Entered.before = getattr(owner, name)
        _Entered.count += 1
        setattr(owner, name, value)
    try:
        yield
    finally:
        with _Entered.lock:
            _Entered.count -= 1
            if _Entered.count == 0:
                setattr(owner, name, _Entered.before)
