"""Runs commands under time ceilings, and makes a row of each whatever becomes of it. Knows neither torch nor a GPU."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE_SECONDS = 5.0  # from Ctrl-C, on which pytest still reports, to the end of a part that is past its ceiling
LOOK_SECONDS = 0.05  # between two looks at what runs
TAIL = 3000  # characters of a failed part's output that its row keeps
FAILURES = 20  # tests that failed, at most, that a row names
NAMED = 3  # of each part, at most, that a measurement names
SUMMARY = re.compile(r"^(?:=+ )?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", re.MULTILINE)  # pytest's last line
PROGRESS = re.compile(r"^\S+\.py::.* (PASSED|FAILED|ERROR|SKIPPED) .*\[ *\d+%\]$", re.MULTILINE)  # of pytest -v
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.*)$", re.MULTILINE)  # after FAILURES_BEGIN: test - message
FAILURES_BEGIN = "short test summary info"

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: unique.
        command: the program and its arguments.
        ceiling: seconds that it may take.
        needs: names of parts, the tests of what it measures; `--tests` tells it which did not pass, `--no-tests` that
            none has.
        environment: what differs from this process's.
        lacks: what it needs and this machine has not; then it is not run.
        why_not: why its program could not do its work on this machine, by the output; "" where it could. Then it is not
            run either, whatever the exit status.
        rest: the arguments to be added to its command so that it does what is left, by the output and exit status of a
            process that failed; none where nothing is. Another process is begun with them, within the time of the part.
    """

    name: str
    command: Sequence[str]
    ceiling: float
    needs: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    lacks: str = ""
    why_not: Callable[[str], str] = lambda output: ""
    rest: Callable[[str, int], Sequence[str]] = lambda output, status: ()


def seconds_of(stages: Iterable[Sequence[Part]]) -> float:
    """What stages may take by their ceilings: parts of a stage run side by side."""
    return sum(max((part.ceiling for part in stage if not part.lacks), default=0.0) for stage in stages)


def run(
    stages: Sequence[Sequence[Part]],
    limit: float,
    root: Path,
    logs: Path,
    on_row: Callable[[Part, Row], object] = lambda part, row: None,
) -> list[Row]:
    """Run stages one after the other, the parts of each side by side; one that fails stops no other.

    Args:
        stages: of parts.
        limit: seconds for all. What is more than the ceilings of all stages that are to come may be taken by whoever
            needs it, up to its own ceiling once more; the last stage may take all that is left. A part is not run
            where nothing is.
        root: the folder in which commands run.
        logs: a folder for the output of parts, made if missing.
        on_row: called with every part that has come to its end.

    Returns:
        A row for each part: {"part", "status", "seconds", "ceiling_s", "command"}, the status one of "passed",
        "failed", "timed out", "not run"; with the "tests" that pytest counted, those that failed as "failures", and,
        where it did not pass, the end of the output as "error", or the reason if it was not run.
    """
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    done: list[Row] = []
    for number, stage in enumerate(stages):
        before = {row["part"]: row for row in done}
        running: list[Running] = []
        try:
            left = max(0.0, end - time.monotonic())
            spare = max(0.0, left - seconds_of(stages[number:]))
            for part in stage:
                ceiling = left if stage is stages[-1] else min(part.ceiling + min(spare, part.ceiling), left)
                running.append(Running(part, ceiling, before, root, logs))
            waiting = list(running)
            while waiting:
                for one in list(waiting):
                    row = one.row()
                    if row is not None:
                        waiting.remove(one)
                        done.append(row)
                        on_row(one.part, row)
                time.sleep(LOOK_SECONDS if waiting else 0)
        finally:
            for one in running:
                one.stop()
    return done


def about_tests(needs: Sequence[str], before: Mapping[str, Row]) -> list[str]:
    """The arguments that tell a measurement what became of its tests, none where all passed.

    A test that fails does not take the ratios of a whole suite with it: their rows name it.
    """
    if all(name in before and before[name]["status"] == "passed" for name in needs):
        return []
    rows = [before[name] for name in needs if name in before]
    if len(rows) < len(needs) or not any(row.get("tests", {}).get("passed") for row in rows):
        return ["--no-tests"]
    return ["--tests", "; ".join(told(row) for row in rows if row["status"] != "passed")]


def told(row: Row) -> str:
    """Which tests of a part did not pass."""
    counts = ", ".join(f"{number} {kind}" for kind, number in row.get("tests", {}).items())
    failures = [text.partition("::")[2].partition(" - ")[0] for text in row.get("failures", [])]
    names = ", ".join(failures[:NAMED]) + (", ..." if len(failures) > NAMED else "")
    return f"{row['part']}: {row['status']}" + (f", {counts}" if counts else "") + (f" ({names})" if names else "")


def counts_of(output: str) -> dict[str, int]:
    """What pytest counted, by its summary; by its progress where it came to no end."""
    summaries = SUMMARY.findall(output)
    if summaries:
        return {kind: int(number) for number, kind in (count.split() for count in summaries[-1].split(", "))}
    return dict(Counter(outcome.lower() for outcome in PROGRESS.findall(output)))


class Running:
    """A part that was begun, or could not be; `before` has the rows of earlier ones, by name."""

    def __init__(self, part: Part, ceiling: float, before: Mapping[str, Row], root: Path, logs: Path):
        self.part, self.ceiling = part, round(ceiling, 1)
        self.command = [*part.command, *about_tests(part.needs, before)]
        self.log = logs / f"{re.sub('[^a-z0-9_]+', '-', part.name)}.log"
        self.start = time.monotonic()
        self.late, self.root = False, root
        self.ended: list[int] = []  # exit statuses of processes that left the rest to another
        self.read = 0  # characters of what they printed
        self.process: subprocess.Popen[bytes] | None = None
        self.log.unlink(missing_ok=True)
        self.trouble = self._begin()

    def _begin(self) -> Row:
        """Start the command; what is wrong if that cannot be."""
        if self.part.lacks:
            return {"status": "not run", "error": self.part.lacks}
        if self.ceiling == 0:
            return {"status": "not run", "error": "no time was left"}
        try:
            with open(self.log, "ab") as output:
                self.process = subprocess.Popen(
                    self.command,
                    cwd=self.root,
                    env={**os.environ, **self.part.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group of its own, which can be ended with all that it started
                )
        except FileNotFoundError:
            return {"status": "not run", "error": f"there is no {self.command[0]}"}
        except OSError as error:
            return {"status": "failed", "error": str(error)}
        return {}

    def row(self) -> Row | None:
        """What became of it; None while it runs. Past its ceiling it is stopped: by Ctrl-C, then at once."""
        if self.process is None:
            return self._row(self.trouble)
        if self.process.poll() is None:
            late = time.monotonic() - self.start - self.ceiling
            if late <= 0:
                return None
            if not self.late:
                self.late = True
                os.killpg(self.process.pid, signal.SIGINT)
            if late <= GRACE_SECONDS:
                return None
            self.stop()
        status = None if self.late else self.process.returncode
        said = self.log.read_text(errors="replace")
        rest = self.part.rest(said[self.read :], status) if status else ()
        if rest:
            self.read = len(said)
            self.ended.append(self.process.returncode)
            self.command += rest
            self.trouble = self._begin()
            return None if not self.trouble else self._row(self.trouble)
        said, bad = said.strip(), bool(status or self.ended)
        outcome: Row = {"status": "timed out" if status is None else "failed" if bad else "passed"}
        tests, failures = counts_of(said), FAILURE.findall(said.rpartition(FAILURES_BEGIN)[2])
        if tests:
            outcome["tests"] = tests
        if failures:
            outcome["failures"] = failures[:FAILURES]
        reason = self.part.why_not(said)
        if reason:
            outcome |= {"status": "not run", "error": reason[:TAIL]}
        elif bad or status is None:
            ends = ", then ".join(map(str, [*self.ended, self.process.returncode]))
            outcome["error"] = f"{said[-TAIL:]}\nexit status {ends}".strip()
        return self._row(outcome)

    def _row(self, outcome: Row) -> Row:
        seconds = 0.0 if self.process is None else round(time.monotonic() - self.start, 1)
        row = {"part": self.part.name, "seconds": seconds, "ceiling_s": self.ceiling, "command": self.command}
        return row | outcome

    def stop(self) -> None:
        """End it at once, with all that it started, if it still runs."""
        if self.process is None or self.process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)  # a process that waits for a GPU that hangs cannot be ended
