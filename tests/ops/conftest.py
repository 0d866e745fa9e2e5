"""Fixtures of several operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.instruction_sets import ISAS, chosen


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """All kernels by one instruction set."""
    with chosen(request.param):
        yield request.param
