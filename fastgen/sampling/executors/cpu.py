"""The plan executed by the C++ module."""

from __future__ import annotations


class CpuExecutor:
    pass
