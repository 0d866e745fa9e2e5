"""Which Python runs on the GPU: the checkout's environment, or the one that came with the machine's torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDED = ("torch", "triton", "numpy", "safetensors", "tqdm", "PIL", "sklearn", "pytest", "setuptools", "pybind11")

PROBE = f"""
import importlib.util, json, sys
missing = [name for name in {NEEDED!r} if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("it has no " + ", ".join(missing))
import torch
try:
    torch.cuda.init()
except (AssertionError, RuntimeError) as error:  # no GPU, a driver that is too old, torch without CUDA
    sys.exit(f"torch {{torch.__version__}} sees no GPU: " + " ".join(str(error).split()))
name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(json.dumps({{"gpu": name, "arch": "".join(map(str, capability)), "torch": torch.__version__}}))
"""

Facts = dict[str, Any]


def probe(python: Path) -> Facts | str:
    """{"gpu", "arch", "torch"} of an interpreter that can do the work, else the reason why it cannot."""
    try:
        done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode != 0:
        return (done.stderr.strip() or f"it ends with status {done.returncode}").splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def choose(root: Path, ask: Callable[[Path], Facts | str] = probe) -> tuple[Path, Facts]:
    """The first interpreter that has everything and sees the GPU: that of a complete .venv, then the running one.

    Raises:
        RuntimeError: there is none; the text says why, for each.
    """
    environment = root / ".venv/bin/python"
    complete = (root / ".venv/test.stamp").exists()
    reasons = [] if complete else [".venv: not complete (make test completes it)"]
    for python in [environment] * complete + [Path(sys.executable)]:
        found = ask(python)
        if not isinstance(found, str):
            return python, found
        reasons.append(f"{'.venv' if python == environment else python}: {found}")
    raise RuntimeError("no Python here can run on a GPU:\n  " + "\n  ".join(reasons))
