"""python -m bench SUITE [...]: measure, print a table, write bench/results/NAME.jsonl."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import ceilings, environment, report, rows
from bench.harness.gate import TestsFailed
from bench.harness.run import run_suite

RESULTS = Path(__file__).resolve().parent / "results"


def suites() -> list[str]:
    """Names of the suites: the modules beside this one."""
    return sorted(path.stem for path in Path(__file__).resolve().parent.glob("[!_]*.py"))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description="Microbenchmarks. Every row carries the machine's limit, measured first (bench/README.md).",
    )
    result.add_argument("suite", choices=[*suites(), "ceilings"], help="what to measure; ceilings: the machine alone")
    result.add_argument("--case", default="", metavar="TEXT", help="only the cases whose name contains TEXT")
    result.add_argument(
        "--quick", action="store_true", help="small cases, seconds in all: does it run, not how fast is it"
    )
    result.add_argument(
        "--threads", type=int, metavar="N", help="for cases that fix no number of their own (default: torch's)"
    )
    result.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="time budget of a case (default: %(default)g)"
    )
    result.add_argument("--base", metavar="REV", help="compare with this git revision, built in a temporary worktree")
    result.add_argument(
        "--no-tests", dest="tests", action="store_false", help="skip the tests; rows then carry no speed-up"
    )
    result.add_argument("--quiet", action="store_true", help="wait for others on this machine; repeat disturbed cases")
    result.add_argument("--name", help="write NAME.jsonl (default: the suite; with --quick, SUITE-quick)")
    result.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where to (default: bench/results)"
    )
    result.add_argument("--plot", action="store_true", help="also draw NAME.png (needs matplotlib)")
    result.add_argument(
        "--report", action="store_true", help="table and plot of the file written earlier; measure nothing"
    )
    return result


def check(options: argparse.Namespace) -> None:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if not options.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {options.seconds:g}")


def print_ceilings(path: Path, threads: int | None) -> None:
    """Measure the machine alone; writes one row per ceiling."""
    facts = {"machine": environment.machine(), "load_average": environment.load_average()}
    found = ceilings.measure(sorted({1, threads or environment.machine()["cores"]})).rows()
    for row in found:
        what = f"{row['ceiling']} {row.get('isa', '')}".strip()
        rate = f"{row['gflops']} GFLOP/s" if "gflops" in row else f"{row['gbs']} GB/s"
        print(f"{what:35} {row['threads']:3} thread{'s' if row['threads'] > 1 else ' '}  {rate:>16}")
    rows.write(path, [{**row, **facts} for row in found])


def measure(options: argparse.Namespace, path: Path, command: str) -> int:
    """Run a suite; 1 when a case failed."""
    written: list[dict[str, Any]] = []

    def on_case(new: list[dict[str, Any]], skipped: dict[str, str]) -> None:
        written.extend(new)
        rows.write(path, written)  # after every case: what is measured stays measured
        print(report.case_table(new), flush=True)
        for name, reason in skipped.items():
            print(f"  {name} skipped: {reason}")
        print()

    _, failed = run_suite(
        options.suite,
        text=options.case,
        quick=options.quick,
        threads=options.threads,
        seconds=options.seconds,
        base=options.base,
        tests=options.tests,
        quiet=options.quiet,
        command=command,
        on_case=on_case,
    )
    if written:
        print(report.provenance(written))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when tests or a case failed, 2 for bad usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(arguments)
    path = options.results / f"{options.name or options.suite + ('-quick' if options.quick else '')}.jsonl"
    try:
        check(options)
        status = 0
        if options.report:
            found = rows.read(path)
            print(json.dumps(found, indent=1) if options.suite == "ceilings" else report.table(found))
        elif options.suite == "ceilings":
            print_ceilings(path, options.threads)
        else:
            status = measure(options, path, shlex.join(["python", "-m", "bench", *arguments]))
        if options.plot and options.suite != "ceilings":
            report.plot(rows.read(path), path.with_suffix(".png"))
        return status
    except TestsFailed as error:
        print(f"no benchmark: the tests of {options.suite} did not pass. {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
