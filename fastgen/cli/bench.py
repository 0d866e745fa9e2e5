"""Microbenchmarks of the checkout, each row with its fraction of the machine's limit."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = "measure: 'fastgen bench --help' lists the suites"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None here: the suites' own parser takes them all."""


def run(arguments: Sequence[str]) -> int:
    import fastgen

    root = Path(fastgen.__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        raise RuntimeError(
            "the benchmark suites are in the source checkout, not in the installed package: run it there"
        )
    sys.path.insert(0, str(root))
    return importlib.import_module("bench.__main__").main(list(arguments))
