"""What a suite describes: cases, and the providers that compete in each.

A suite is a module of `bench` with

    TESTS: tuple[str, ...]                    # pytest paths that prove the operation correct
    def cases(quick: bool) -> list[Case]: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work.

    Attributes:
        call: does the work once; what it returns is dropped.
        baseline: whether others report their speed-up over this one.
        scale: seconds of the whole job per second of `call`, for a job too long to run whole; `note` says so.
        note: what a reader must know about this number.
        extra: further figures for the row (JSON values), such as compile seconds.
    """

    call: Callable[[], object]
    baseline: bool = False
    scale: float = 1.0
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """A case made ready to run: its providers by name, and what any of them must at least do.

    Attributes:
        providers: by name, in the order of the report.
        flops: useful floating-point operations of the job; what a mask or padding makes zero is not counted.
        bytes: compulsory memory traffic of the job: every input read once, every output written once.
        skipped: providers that cannot run here, with the reason.
        failed: providers that should run here and do not, with the error; of suites for a GPU.
    """

    providers: dict[str, Provider]
    flops: float
    bytes: float
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: unique in the suite; `--case TEXT` selects the cases whose name contains the text.
        shapes: the sizes that matter, as JSON values.
        build: makes inputs and providers; called once, with `threads` already set.
        threads: threads that torch and fastgen use; None takes the run's `--threads`.
        dtype: which arithmetic the limit is taken from ("float32", "float64").
    """

    name: str
    shapes: dict[str, Any]
    build: Callable[[], Work]
    threads: int | None = None
    dtype: str = "float32"
