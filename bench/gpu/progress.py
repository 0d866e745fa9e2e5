"""How far a measuring process has come, by what it prints, so that another one can do the rest. Needs no torch."""

from __future__ import annotations

import re
import time

GPU_LOST = 75  # exit status of a process that can measure no more, with the rows of all cases that it began
BEGUN = re.compile(r"^\d\d:\d\d:\d\d begins (.+)$", re.MULTILINE)


def begins(suite: str, case: str) -> None:
    """Say so."""
    print(f"{time.strftime('%X')} begins {suite}: {case}", flush=True)


def rest(output: str, status: int) -> list[str]:
    """The arguments with which another process does what is left, where one was ended (`status` < 0: by a signal) or
    has lost the GPU; none where it came to its own end, or began nothing.
    """
    begun = BEGUN.findall(output)
    if not begun or (status >= 0 and status != GPU_LOST):
        return []
    words = [word for case in begun for word in ("--done", case)]
    return words if status == GPU_LOST else [*words, "--died", begun[-1], f"its process was ended by signal {-status}"]
