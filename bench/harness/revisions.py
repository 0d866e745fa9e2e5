"""Another revision of this repository, checked out and built beside it for a comparison."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.harness.environment import CHECKOUT, git


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary git worktree of `revision` with its native modules built; removed at the end.

    Raises:
        RuntimeError: there is no such revision, or it does not build.
    """
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="fastgen-base-") as folder:
        root = Path(folder, "checkout")
        git("worktree", "add", "--detach", str(root), commit)
        try:
            build(root)
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def build(root: Path) -> None:
    """Compile the C++ module of a checkout in place, with the Python that runs this."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "FASTGEN_CUDA": "0"}  # no suite measures it yet
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"the base revision did not build:\n{done.stdout[-3000:]}")


def label(revision: str) -> str:
    """How rows call the revision: providers of it are named "PROVIDER @ LABEL"."""
    return f"{revision} ({git('rev-parse', '--short=12', revision, cwd=CHECKOUT)})"
