"""Where a row was measured: processor, versions, commit, load. No host names and no absolute paths."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
QUIET = 0.03  # share of the processors' time that others may take of a measurement called quiet


def cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@cache
def machine() -> dict[str, Any]:
    """Processor model, number of processors this process may use, instruction sets of the kernels it can run."""
    from fastgen import backends

    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "isas": backends.native_cpu().ceilings.isas(),
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:  # virtual machines shorten the name
        name += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return name


@cache
def versions() -> dict[str, str]:
    import torch

    import fastgen

    return {"python": platform.python_version(), "torch": torch.__version__, "fastgen": fastgen.__version__}


def git(*arguments: str, cwd: Path = CHECKOUT) -> str:
    """Output of a git command.

    Raises:
        RuntimeError: git is missing or the command fails.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("git is not installed") from None
    if done.returncode != 0:
        raise RuntimeError(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def revision(cwd: Path = CHECKOUT) -> dict[str, Any]:
    """{"commit", "dirty"}; tests, documents and results of earlier runs do not make a checkout dirty."""
    try:
        commit = git("rev-parse", "--short=12", "HEAD", cwd=cwd)
        changes = git("status", "--porcelain", "--", ".", ":!bench/results", ":!*.md", ":!tests", cwd=cwd)
    except RuntimeError:
        return {"commit": "unknown", "dirty": True}  # not a clone, or no git
    return {"commit": commit, "dirty": bool(changes)}


class Watch:
    """What other processes take of the processors from now on.

    Args:
        own: CPU seconds that the benchmark itself has used so far.
    """

    def __init__(self, own: Callable[[], float] = time.process_time) -> None:
        self._own = own
        self._start = (*_processor_seconds(), own())

    def others(self) -> float:
        """Share of the processors' time, 0 to 1, that others, the hypervisor too, have used; 0 where it is not told."""
        used, total, own = (
            now - then for now, then in zip((*_processor_seconds(), self._own()), self._start, strict=True)
        )
        return round(max(0.0, used - own) / total, 3) if total > 0 else 0.0


def _processor_seconds() -> tuple[float, float]:
    """Seconds since the machine started, of all processors: (not idle, all); see proc(5)."""
    try:
        with open("/proc/stat") as stat:
            ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in stat.readline().split()[1:9]]
    except OSError:
        return 0.0, 0.0
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def wait_until_quiet(patience: float) -> None:
    """Return when others have left the processors alone for a few seconds, or after `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        watch = Watch()
        time.sleep(3.0)
        if watch.others() <= QUIET:
            return


def load_average() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)
