"""A suite made ready in this process, or in another one that imports another revision of fastgen."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import measure, memory
from bench.harness.case import Case, Work

CHECKOUT = Path(__file__).resolve().parents[2]


class Session:
    """The cases of one suite in this process; one case is prepared at a time.

    Everything that goes in or comes out is JSON, so that `RemoteSession` can stand in its place.
    """

    def __init__(self, suite: str, quick: bool) -> None:
        module = importlib.import_module(f"bench.{suite}")
        self.cases: dict[str, Case] = {case.name: case for case in module.cases(quick)}
        self.work: Work | None = None

    def prepare(self, name: str, threads: int) -> dict[str, Any]:
        """Build the case; returns the description of its `Work`, providers without their calls.

        The garbage collector is off until `release`, so that no turn pays for it.
        """
        import torch

        torch.set_num_threads(threads)
        work = self.work = self.cases[name].build()
        providers = {
            key: {"baseline": p.baseline, "scale": p.scale, "note": p.note, "extra": p.extra}
            for key, p in work.providers.items()
        }
        gc.collect()
        gc.disable()
        return {"providers": providers, "flops": work.flops, "bytes": work.bytes, "skipped": work.skipped}

    def turn(self, provider: str, calls: int) -> float:
        """Seconds per call, calls back to back."""
        return measure.seconds_of(self._call(provider), calls)

    def peak(self, provider: str) -> int | None:
        """Peak bytes of one call, see `memory.METHOD`."""
        return memory.peak_bytes(self._call(provider))

    def cpu_seconds(self) -> float:
        """CPU time that this process has used."""
        return time.process_time()

    def release(self) -> None:
        """Drop the inputs and weights of the prepared case."""
        self.work = None
        gc.enable()

    def _call(self, provider: str) -> Callable[[], object]:
        if self.work is None:
            raise RuntimeError(f"provider {provider!r} asked for before a case was prepared")
        return self.work.providers[provider].call


class RemoteSession:
    """A `Session` in a child process, whose `fastgen` is imported from `root`."""

    def __init__(self, suite: str, quick: bool, root: Path) -> None:
        command = [sys.executable, "-m", "bench.harness.session", suite, str(int(quick)), str(root)]
        self._child = subprocess.Popen(
            command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def _ask(self, method: str, *args: object) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps([method, args]) + "\n")
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the measuring process ended with status {self._child.wait()} during {method}{args}")
        answer = json.loads(answer)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def prepare(self, name: str, threads: int) -> dict[str, Any]:
        return self._ask("prepare", name, threads)

    def turn(self, provider: str, calls: int) -> float:
        return self._ask("turn", provider, calls)

    def peak(self, provider: str) -> int | None:
        return self._ask("peak", provider)

    def cpu_seconds(self) -> float:
        return self._ask("cpu_seconds")

    def release(self) -> None:
        self._ask("release")

    def close(self) -> None:
        """End the child process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(timeout=60)


def _serve(suite: str, quick: str, root: str) -> None:
    """The child process: one JSON request per line in, one JSON answer per line out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    sys.path.insert(0, root)  # `bench` is already imported from the checkout; `fastgen` now comes from `root`
    import fastgen

    if not Path(fastgen.__file__).is_relative_to(Path(root).resolve()):
        raise RuntimeError(f"fastgen was imported from {fastgen.__file__}, expected it below {root}")
    session = Session(suite, bool(int(quick)))
    for line in sys.stdin:
        method, args = json.loads(line)
        try:
            answer = {"result": getattr(session, method)(*args)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
