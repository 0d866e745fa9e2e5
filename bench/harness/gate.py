"""No speed without correctness: the tests of an operation run before its benchmark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class TestsFailed(RuntimeError):
    """The correctness tests of a suite did not pass."""

    __test__ = False  # not a test class, whatever pytest makes of its name


def run_tests(paths: Sequence[str], checkout: Path) -> None:
    """Run the pytest files (or folders) that prove a suite's operation correct.

    Raises:
        TestsFailed: a path is missing, a test failed or none ran; the text holds the end of pytest's output.
    """
    missing = [path for path in paths if not (checkout / path).exists()]
    if missing or not paths:
        raise TestsFailed(f"no such tests: {', '.join(missing) or 'the suite names none'}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *paths]
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise TestsFailed(f"{' '.join(paths)}: pytest ended with status {done.returncode}\n{tail}")
