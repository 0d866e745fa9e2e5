"""The command line: one file per command, with `HELP`, `add_arguments(parser)` and `run(options) -> exit status`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = ("demo", "train", "sample", "latent", "eval", "score", "info", "bench")
USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError)
DEBUG = "FASTGEN_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (a check failed), 2 (bad usage or input) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["bench"]:  # has a parser of its own
            return _command("bench").run(arguments[1:])
        options = _parser().parse_args(arguments)
        return options.run(options)
    except KeyboardInterrupt:
        print("fastgen: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if os.environ.get(DEBUG):
            raise
        print(f"fastgen: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _command(name: str):  # type: ignore[no-untyped-def]
    return importlib.import_module(f"fastgen.cli.{name}")


def _parser() -> argparse.ArgumentParser:
    from fastgen import __version__

    parser = argparse.ArgumentParser(
        prog="fastgen",
        description="Fast generation of images: training, sampling and measuring of generative models.",
        epilog=f"'fastgen COMMAND --help' says more. {DEBUG}=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"fastgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = _command(name)
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            epilog=getattr(command, "EXAMPLES", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser
