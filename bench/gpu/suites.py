"""Measures suites of `make gpu`: python -m bench.gpu.suites SUITE --results FILE.

Every row is written as soon as it is measured. What cannot run becomes a row with the reason. `ceilings` begins the
file; the other suites take their limits from its first row. `--compile` adds torch.compile's max-autotune, which takes
a minute; `--rehearse` is everything tiny and on the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import progress
from bench.gpu.cases import SUITES
from bench.gpu.place import Check, Place, Row, reason
from bench.harness import environment, gpu, measure, report, rows
from bench.harness.case import Case, Work
from bench.harness.ceilings import Ceilings

SECONDS = 2.0  # for all providers of a case, without warm-up
REHEARSAL_SECONDS = 0.05
SHARE = 64  # of the sizes of ceilings, in a rehearsal


def append(path: Path, row: Row) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_ceilings(path: Path, place: Place, revision: Row) -> None:
    """The first row of the file."""
    found = gpu.measure_ceilings(place.device, SHARE if place.tiny else 1)
    row = {
        "environment": {**gpu.machine(place.device), "torch": torch.__version__, **revision, "date": now()},
        "copy_gbs": found.bandwidth["copy", 1] / 1e9,
        "matrix_tflops": {kind: rate / 1e12 for (_, kind, _), rate in found.flops.items()},
    }
    print(json.dumps(row, indent=1))
    append(path, row)


def read_ceilings(path: Path) -> Ceilings | None:
    """From their row, the first of the file unless the build failed sooner; None where measuring them failed."""
    with open(path) as file:
        first = next((row for row in map(json.loads, file) if "copy_gbs" in row), None)
    if first is None:
        return None
    rates = {("matrix product", kind, 1): rate * 1e12 for kind, rate in first["matrix_tflops"].items()}
    return Ceilings(rates, {("copy", 1): first["copy_gbs"] * 1e9})


class Broken(Exception):
    """A provider that failed while it was measured; the error is the cause."""


def guarded(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        raise Broken(name) from error


def measure_all(work: Work, place: Place, clock: Callable[..., float]) -> tuple[Row, Row]:
    """Times and peaks by provider. One that fails is taken out, and the others are measured anew."""
    while True:
        turns = {name: partial(guarded, name, clock, provider.call) for name, provider in work.providers.items()}
        try:
            times = measure.interleave(turns, REHEARSAL_SECONDS if place.tiny else SECONDS)
            peaks = {name: guarded(name, gpu.peak_bytes, p.call, place.device) for name, p in work.providers.items()}
            return times, peaks
        except Broken as broken:
            name, error = str(broken), broken.__cause__
            traceback.print_exception(error)
            provider = work.providers.pop(name)
            (work.skipped if provider.baseline else work.failed)[name] = reason(error)


def measure_case(case: Case, place: Place, limits: Ceilings, common: Row, clock: Callable[..., float]) -> list[Row]:
    """The rows of a case, with those of the providers that could not run."""
    facts = {**common, "case": case.name, "shapes": case.shapes, "dtype": case.dtype, "threads": 1}
    facts |= {"load_average": environment.load_average(), "date": now()}
    work = case.build()
    watch = environment.Watch()
    times, peaks = measure_all(work, place, clock)
    facts["others"] = watch.others()
    providers = {
        name: {"baseline": p.baseline, "scale": p.scale, "note": p.note, "extra": p.extra}
        for name, p in work.providers.items()
    }
    found = rows.make(facts, {"providers": providers, "flops": work.flops, "bytes": work.bytes}, times, peaks, limits)
    for row in found:
        rates = {"share_of_copy_bandwidth": row["bytes"] / row["median_s"] / row["peak_bandwidth"]}
        if "batch" in case.shapes:
            rates["items_per_s"] = case.shapes["batch"] / row["median_s"]
        row["extra"] = {**row["extra"], **rates}
    print(report.case_table(found) if found else f"{case.name}: nothing could run", flush=True)
    suite = {"suite": common["suite"], "case": case.name}
    found += [{**suite, "provider": name, "unavailable": why} for name, why in work.skipped.items()]
    return found + [{**suite, "provider": name, "error": why} for name, why in work.failed.items()]


def check_alive(device: str) -> None:
    """End the process where it has lost the GPU: an error in a kernel, such as a wrong address, stays with it."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(reason(error), flush=True)
            raise SystemExit(progress.GPU_LOST) from error


def run(suite: str, place: Place, path: Path, common: Row, done: set[str]) -> bool:
    """Measure a suite but for the cases that are done, "SUITE: CASE"; rows are appended to the file. Whether nothing
    failed.

    Raises:
        SystemExit: the GPU was lost in a case, whose rows are written.
    """
    limits = read_ceilings(path) or gpu.measure_ceilings(place.device, SHARE if place.tiny else 1)
    clock, failed = gpu.seconds_of(place.device), False
    common = {"suite": suite, "machine": gpu.machine(place.device), "memory_method": gpu.MEMORY_METHOD, **common}
    common["versions"] = environment.versions()
    for case in SUITES[suite](place):
        if f"{suite}: {case.name}" in done:
            continue
        progress.begins(suite, case.name)
        start = {"suite": suite, "case": case.name}
        try:
            if isinstance(case, Check):
                found = [{**start, "check": case.run()}]
                failed |= not found[0]["check"]["ok"]
            else:
                found = measure_case(case, place, limits, common, clock)
        except Exception as error:  # one broken case must not cost the others
            traceback.print_exc()
            found = [{**start, "error": reason(error)}]
        failed |= any("error" in row for row in found)
        for row in found:
            append(path, row)
            if "median_s" not in row:
                print(json.dumps(row), flush=True)
        check_alive(place.device)
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.suites", description="What make gpu measures.")
    parser.add_argument("suites", nargs="+", choices=["ceilings", *SUITES])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="rows are appended to it")
    parser.add_argument("--commit", help="as `git describe --always --dirty` has it, where the checkout is no clone")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--tests", default="passed", help="which tests did not pass, for the rows")
    parser.add_argument("--no-tests", action="store_true", help="no test has passed: rows carry no speed-up")
    parser.add_argument("--done", action="append", default=[], metavar="SUITE: CASE", help="to be left out")
    parser.add_argument("--died", action="append", default=[], nargs=2, metavar=("CASE", "WHY"), help="one of them")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args(arguments)
    place = Place("cpu" if options.rehearse else "cuda", options.rehearse, options.compile)
    torch.backends.cudnn.benchmark = True  # the peers at their best
    if options.rehearse:
        torch.set_num_threads(1)
    revision = environment.revision()
    if options.commit:
        revision = {"commit": options.commit.removesuffix("-dirty"), "dirty": options.commit.endswith("-dirty")}
    tests = "not run" if options.no_tests else options.tests
    common = {"tests": tests, "command": " ".join(options.suites), **revision}
    for key, why in options.died:
        if key == options.done[-1]:  # of earlier ones the processes in between have written the rows
            suite, _, case = key.partition(": ")
            append(options.results, {"suite": suite, "case": case, "error": why})
    fine = True
    for suite in options.suites:
        if suite != "ceilings":
            fine &= run(suite, place, options.results, common, set(options.done))
        elif not options.done:  # else they were measured by the process before
            write_ceilings(options.results, place, revision)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
