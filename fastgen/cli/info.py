"""What is installed, what was built, what is used, and why not the rest: the first thing to send with a bug report."""

from __future__ import annotations

import argparse
import json

HELP = "versions, processor, native modules, backends, environment variables"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    from fastgen import info

    found = info.collect()
    print(json.dumps(found, indent=1) if options.json else info.render(found))
    return 0
