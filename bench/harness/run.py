"""Run a suite: gate, ceilings, then every case with its providers in turns."""

from __future__ import annotations

import datetime
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from bench.harness import ceilings, environment, gate, measure, revisions, rows
from bench.harness.case import Case
from bench.harness.session import RemoteSession, Session

QUICK_SECONDS = 0.2
QUICK_CEILING_ROUNDS = 3
PATIENCE_SECONDS = 600.0  # --quiet waits this long for the others, before each of so many attempts
ATTEMPTS = 4

AnySession = Session | RemoteSession
Result = tuple[list[dict[str, Any]], dict[str, str]]  # the rows of a case, reasons of skipped providers


def select_cases(suite: str, quick: bool, text: str) -> list[Case]:
    """The cases of a suite whose name contains `text`.

    Raises:
        ValueError: there is none.
    """
    cases = list(importlib.import_module(f"bench.{suite}").cases(quick))
    chosen = [case for case in cases if text in case.name]
    if not chosen:
        names = "\n  ".join(case.name for case in cases)
        raise ValueError(f"no case of {suite} has {text!r} in its name; there are\n  {names}")
    return chosen


@contextmanager
def open_sessions(suite: str, quick: bool, base: revisions.Revision | None) -> Iterator[dict[str, AnySession]]:
    """Sessions by label: "" for the checkout, and one for the base revision when there is one.

    Two revisions cannot be imported into one process, so with a base each gets its own, and they take turns.
    """
    if base is None:
        yield {"": Session(suite, quick)}
        return
    with ExitStack() as stack:
        root = stack.enter_context(revisions.worktree(base.commit))
        sessions: dict[str, AnySession] = {}
        for name, path in (("", environment.CHECKOUT), (base.label, root)):
            remote = sessions[name] = RemoteSession(suite, quick, path)
            stack.callback(remote.close)
        yield sessions


def merge(
    descriptions: Mapping[str, dict[str, Any]], base: revisions.Revision | None
) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """One description for all sessions, and for each of its providers the session and the name there.

    The base contributes fastgen's own providers, as baselines; what is not fastgen is the same in both.
    """
    merged = dict(descriptions[""])
    merged["providers"] = dict(merged["providers"])
    where = {name: ("", name) for name in merged["providers"]}
    if base is not None:
        commit = {"commit": base.commit, "dirty": False}
        for name, facts in descriptions[base.label]["providers"].items():
            if not facts["baseline"]:
                full = f"{name} @ {base.label}"
                merged["providers"][full] = {**facts, "baseline": True, "revision": commit}
                where[full] = (base.label, name)
    return merged, where


def run_case(
    case: Case,
    sessions: Mapping[str, AnySession],
    limits: ceilings.Ceilings,
    *,
    threads: int,
    seconds: float,
    base: revisions.Revision | None,
    common: Mapping[str, Any],
) -> Result:
    """Measure one case."""
    descriptions = {label: session.prepare(case.name, threads) for label, session in sessions.items()}
    try:
        merged, where = merge(descriptions, base)
        turns: dict[str, Callable[[int], float]] = {
            name: partial(sessions[label].turn, provider) for name, (label, provider) in where.items()
        }
        facts: dict[str, Any] = {"load_average": environment.load_average()}
        watch = environment.Watch(lambda: sum(session.cpu_seconds() for session in sessions.values()))
        times = measure.interleave(turns, seconds)
        facts["others"] = watch.others()
        peaks = {name: sessions[label].peak(provider) for name, (label, provider) in where.items()}
    finally:
        for session in sessions.values():
            session.release()
    facts |= {
        **common,
        "case": case.name,
        "shapes": case.shapes,
        "dtype": case.dtype,
        "threads": threads,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return rows.make(facts, merged, times, peaks, limits), merged["skipped"]


def quietest(measured: Callable[[], Result]) -> Result:
    """The attempt during which other processes took least; stops at the first that they left alone."""
    results = []
    for _ in range(ATTEMPTS):
        environment.wait_until_quiet(PATIENCE_SECONDS)
        results.append(measured())
        if results[-1][0][0]["others"] <= environment.QUIET:
            break
    return min(results, key=lambda result: result[0][0]["others"])


def run_suite(
    suite: str,
    *,
    text: str = "",
    quick: bool = False,
    threads: int | None = None,
    seconds: float = 10.0,
    base: str | None = None,
    tests: bool = True,
    quiet: bool = False,
    command: str = "",
    on_case: Callable[[list[dict[str, Any]], dict[str, str]], None] = lambda rows, skipped: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a suite.

    Args:
        suite: a module of `bench`.
        text: run the cases whose name contains it.
        quick: small cases, rough ceilings: does it work, not how fast is it.
        threads: of the cases that do not fix their own number; default torch's.
        seconds: per case, all providers together; a case runs at least `measure.MIN_ROUNDS` rounds.
        base: a git revision to compare with.
        tests: run the suite's tests first; without them rows carry no speed-up.
        quiet: before a case wait for the others on this machine, and repeat the case when they came back.
        command: recorded in the rows.
        on_case: called with the rows of each finished case and the reasons of skipped providers.

    Returns:
        All rows, and the names of the cases that failed.

    Raises:
        TestsFailed: the operation is not correct, so its speed means nothing.
        ValueError: no such case or suite.
    """
    import torch

    cases = select_cases(suite, quick, text)
    revision = None if base is None else revisions.resolve(base)
    if tests:
        gate.run_tests(importlib.import_module(f"bench.{suite}").TESTS, environment.CHECKOUT)
    default = threads or torch.get_num_threads()
    limits = ceilings.measure(
        sorted({case.threads or default for case in cases}), QUICK_CEILING_ROUNDS if quick else ceilings.ROUNDS
    )
    common = {"suite": suite, "tests": "passed" if tests else "not run", "command": command}
    common |= environment.revision()  # now, while what is imported is what is checked out
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    with open_sessions(suite, quick, revision) as sessions:
        for case in cases:
            budget = QUICK_SECONDS if quick else seconds
            measured = partial(
                run_case,
                case,
                sessions,
                limits,
                threads=case.threads or default,
                seconds=budget,
                base=revision,
                common=common,
            )
            try:
                new, skipped = quietest(measured) if quiet else measured()
            except Exception:  # one broken case must not cost the others their hour
                failed.append(case.name)
                print(f"case {case.name!r} failed:\n{traceback.format_exc(limit=-4)}", file=sys.stderr)
                continue
            done += new
            on_case(new, skipped)
    return done, failed
