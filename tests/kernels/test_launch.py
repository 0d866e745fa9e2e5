"""Calls like earlier ones launch what was compiled for them; calls that Triton would compile anew do not."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime import _async_compile

from fastgen.kernels import launch

ROOT = Path(__file__).resolve().parents[2]


class Kernel:
    """In the place of a `triton.jit` function: remembers what was launched how."""

    arg_names = ("x", "y", "size", "SCALE", "ROWS")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.compiled.append((args, kwargs))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.launched.append((grid[:3], args))


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> launch.Tuned:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    configs = [triton.Config({"ROWS": 64}, num_warps=8)]
    return launch.tuned(lambda *_, **__: configs, lambda *args, **_: args[2])(Kernel())


def call(tuned: launch.Tuned, x: torch.Tensor, size: Any = 100, scale: int = 3) -> None:
    tuned[lambda options: (-(-size // options["ROWS"]),)](x, x, size, SCALE=scale)


def test_the_second_call_gives_all_arguments_in_their_order(tuned: launch.Tuned) -> None:
    x, other = torch.zeros(8), torch.ones(8)
    call(tuned, x)
    assert not tuned.fn.launched and len(tuned.fn.compiled) == 1
    call(tuned, other)
    [(grid, args)] = tuned.fn.launched
    assert grid == (2, 1, 1)
    assert args[0] is other and args[1] is other and args[2:] == (100, 3, 64)
    assert len(tuned.fn.compiled) == 1


@pytest.mark.parametrize(
    "change",
    [{"x": torch.zeros(8, dtype=torch.bfloat16)}, {"x": torch.zeros(8)[1:]}, {"size": 1}, {"size": 2.0}, {"scale": 4}],
    ids=["dtype", "alignment", "size", "type", "constant"],
)
def test_what_triton_compiles_anew_is_not_launched_at_once(tuned: launch.Tuned, change: dict[str, Any]) -> None:
    call(tuned, torch.zeros(8))
    call(tuned, **{"x": torch.zeros(8), **change})
    assert not tuned.fn.launched and len(tuned.fn.compiled) == 2


def test_integers_that_are_not_specialised_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    kernel = launch.launched_directly(any_value=("size",))(Kernel())
    x = torch.zeros(8)
    for size in (3, 4):
        kernel[lambda _: (1,)](x, x, size, SCALE=3, ROWS=16)
    assert len(kernel.fn.compiled) == 1
    assert kernel.fn.launched == [((1, 1, 1), (x, x, 4, 3, 16))]


def test_what_a_capture_takes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing is left to the next call outside of one."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    configs = [triton.Config({"ROWS": rows}, num_warps=8) for rows in (64, 32)]
    several = launch.tuned(lambda *_, **__: configs, lambda *args, **_: args[2])(Kernel())
    x = torch.zeros(8)
    monkeypatch.setattr(launch, "_capturing", lambda: True)
    call(several, x)
    assert several.fn.compiled[-1][1]["ROWS"] == 64 and not several.chosen and not several.compiled
    monkeypatch.setattr(launch, "_capturing", lambda: False)
    monkeypatch.setattr(several, "choose", lambda *_: configs[1].all_kwargs())
    call(several, x)
    monkeypatch.setattr(launch, "_capturing", lambda: True)
    call(several, x, 100, 4)  # compiled anew, with what was timed
    call(several, x, 100, 4)
    assert [given["ROWS"] for _, given in several.fn.compiled] == [64, 32, 32] and len(several.fn.launched) == 1


def test_a_compilation_that_fails_ends_neither_the_others_nor_the_mode() -> None:
    """It raises where its kernel is launched; and again in the next context, which could not begin."""
    finished: list[str] = []
    for _ in range(2):
        with launch.compiling_side_by_side():
            mode = _async_compile.active_mode.get()
            further = [lambda *_: None] * (len(inspect.signature(mode.submit).parameters) - 3)
            failing = mode.submit("failing", lambda: 1 / 0, finished.append, *further)
            mode.submit("fine", lambda: "fine", finished.append, *further)
        assert _async_compile.active_mode.get() is None
        with pytest.raises(ZeroDivisionError):
            failing.result()
    assert finished == ["fine"] * 2


def test_triton_itself_would_launch_the_same(tmp_path: Path) -> None:
    """Every launcher through Triton's runtime, on a driver that remembers what it gets."""
    library = tmp_path / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    compiler = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wall", "-Werror", f"-I{headers}"]
    source = Path(__file__).with_name("driver.c")
    subprocess.run([*compiler, source, "-o", library, f"-Wl,-soname,{library.name}"], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["TRITON_LIBCUDA_PATH"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.launched", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    launched = {word for line in done.stdout.splitlines() for word in line.split()}
    assert launched >= {
        "_tap_gemm", "_weight_gradient", "_pack", "_nll", "_complete", "_forward", "_backward", "_nearest",
    }  # fmt: skip
