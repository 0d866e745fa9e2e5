"""What every test gets: poisoned uninitialised memory, one thread, fixed seeds; and what the run says about itself."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

# Triton reads it when a kernel is defined: without a GPU its kernels run in the interpreter, on tensors of the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastgen import __version__, backends


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills uninitialised memory with what no result may hold: NaN, the largest integer, True."""
    if tensor.is_floating_point() or tensor.is_complex():
        value = float("nan")
    else:
        value = True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max
    with torch.no_grad():
        return tensor.fill_(value)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poison(allocate(*args, **kwargs))

    return wrapper


# For the whole session, so that fixtures of any scope and code that keeps a reference are covered as well.
for namespace, names in {
    torch: ("empty", "empty_like", "empty_strided", "empty_permuted"),
    torch.Tensor: ("new_empty", "new_empty_strided"),
}.items():
    for name in names:
        setattr(namespace, name, poisoned(getattr(namespace, name)))


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (what third-party code draws from)
    random.seed(0)


@pytest.fixture(autouse=True)
def _fixed_start() -> None:
    torch.set_num_threads(1)
    seed()


def pytest_collectstart() -> None:
    seed()  # parameters of tests may be networks, which are made when their file is imported


@pytest.fixture
def setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastgen_setup", Path(__file__).resolve().parents[1] / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond two kilobytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the table of CUDA kernels at the end of the run; what passing tests print is not shown."""
    return lambda line: request.node.user_properties.append(("CUDA kernel", line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    told = [line for report in reports for name, line in report.user_properties if name == "CUDA kernel"]
    if told:
        terminalreporter.section("CUDA kernels")
        terminalreporter.write_line("\n".join(told))


def share(text: str) -> tuple[int, int]:
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError
    return number, count


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=share, default=(1, 1), metavar="I/N", help="the I-th of N parts of the tests")
    parser.addoption("--require-gpu", action="store_true", help="fail, rather than skip, where there is no GPU")


def pytest_configure() -> None:
    # A shell that starts a command in the background has it ignore Ctrl-C; tests of interrupted runs need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = os.environ.get("FASTGEN_SANITIZE")
    if asked and backends.native_cpu().sanitize != asked:
        found = backends.native_cpu().__file__
        raise pytest.UsageError(f"FASTGEN_SANITIZE={asked}, but {found} was built without: see make asan")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = config.getoption("--share")
    first, last = len(items) * (number - 1) // count, len(items) * number // count
    config.hook.pytest_deselected(items=items[:first] + items[last:])
    items[:] = items[first:last]
    reason = _why_no_gpu()
    if reason and config.getoption("--require-gpu"):
        raise pytest.UsageError(reason)
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header() -> str:
    reason = backends.import_error("_cpu")
    if reason:
        return f"fastgen {__version__}: {reason}"
    native = backends.native_cpu()
    return f"fastgen {__version__}: {native.__file__}, {native.isa()}, sanitizers: {native.sanitize or 'none'}"


def _why_no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no GPU: torch sees none"
