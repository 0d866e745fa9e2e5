"""Another revision of this repository, checked out and built beside it for a comparison."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.harness.environment import git


class Revision(NamedTuple):
    """A commit and the name it was asked for by; branches move on while a benchmark runs."""

    name: str
    commit: str

    @property
    def label(self) -> str:
        """How tables call it: its providers are named "PROVIDER @ LABEL"."""
        return f"{self.name} ({self.commit})"


def resolve(name: str) -> Revision:
    """The commit of a branch, tag or expression now.

    Raises:
        RuntimeError: there is no such revision.
    """
    return Revision(name, git("rev-parse", "--verify", "--short=12", f"{name}^{{commit}}"))


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A temporary git worktree of a commit with its C++ module built; removed at the end.

    Raises:
        RuntimeError: it does not build.
    """
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
