"""The instruction sets that the C++ kernels are compiled for and this processor has."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

from fastgen import backends

ISAS: list[str] = backends.native_cpu().isas() if backends.import_error("_cpu") is None else []
# Those with a multiply-add, which give the same bits.
FUSED = [isa for isa in ISAS if isa != "baseline" or platform.machine() in ("aarch64", "arm64")]


@contextlib.contextmanager
def chosen(isa: str) -> Iterator[None]:
    """All kernels by this one; "" is the best."""
    backends.native_cpu().set_isa(isa)
    try:
        yield
    finally:
        backends.native_cpu().set_isa("")
