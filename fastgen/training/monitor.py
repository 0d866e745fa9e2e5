"""What surrounds the training loop: the log, the progress bar and signals."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen._files import atomic_path


class Log:
    """One JSON object per line; training figures are means over the steps since the last line.

    Args:
        path: the file, or None to write nothing.
        step: lines of later steps are dropped: they belong to steps that an interruption has lost.

    Attributes:
        kept_step: of the last line that was kept, 0 for none.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self._path = path
        self._sums: dict[str, float] = {}
        self._count = 0
        self.kept_step = 0
        if path is not None:
            kept = [line for line in _lines(path) if _step(line) <= step] if step else []
            with atomic_path(path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
            self.kept_step = int(_step(kept[-1])) if kept else 0

    def add(self, **figures: float) -> None:
        """Adds the figures of one step."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def write(self, **figures: Any) -> None:
        """Writes a line with these figures and the means of the added ones."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures | means) + "\n")
            except OSError as error:  # a full disk does not say which file it is
                error.filename = error.filename or str(self._path)
                raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines that a `Log` wrote; one that was cut short is left out."""
    return [json.loads(line) for line in _lines(path) if _step(line) < float("inf")]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # a line cut short when the run was killed


class ProgressBar:
    """Share of the budget, the step, and a text about running (exponential) means of the steps' figures."""

    def __init__(self, enabled: bool) -> None:
        from tqdm import tqdm

        bar_format = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=1.0, disable=not enabled, bar_format=bar_format)
        self._means: dict[str, float] = {}

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(
        self, used: float, step: int, figures: dict[str, float], text: Callable[[dict[str, float]], str]
    ) -> None:
        """``text`` is made of the means of the figures."""
        for name, value in figures.items():
            self._means[name] = 0.98 * self._means.get(name, value) + 0.02 * value
        self._bar.set_postfix_str(f"step {step}, {text(self._means)}", refresh=False)
        self._bar.update(min(1.0, used) - self._bar.n)


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list it gives; the first one is sent again when the block has ended.

    A second signal acts at once.  Outside the main thread, where Python allows no handlers, nothing is deferred.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        if received:
            restore()
            signal.raise_signal(number)
        received.append(number)

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
    if received:
        signal.raise_signal(received[0])
