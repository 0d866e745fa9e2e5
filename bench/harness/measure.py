"""Time providers in turns, one after the other, so that the load of a shared machine hits all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.harness import stats

MIN_TURN_SECONDS = 0.01  # a turn shorter than this repeats its call: timer and wake-up noise stay below 1 %
MIN_ROUNDS = 3
MAX_ROUNDS = 400
LONG_CALL_SECONDS = 1.0  # a first call this long is warm-up and calibration in one
ENOUGH = 0.005  # stop when every median is known to this relative error


@dataclass
class Timing:
    """Seconds per call, one value per round; `calls` back-to-back calls made one value."""

    calls: int
    seconds: list[float] = field(default_factory=list)


def seconds_of(call: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call of `calls` back-to-back calls."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def interleave(
    turns: Mapping[str, Callable[[int], float]],
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run the providers in rounds until every median is known well enough or the budget is spent.

    Args:
        turns: by name; called with a number of calls, returns seconds per call.
        budget: seconds for all providers together, without warm-up; MIN_ROUNDS rounds run whatever they take.

    Returns:
        One `Timing` per provider, all with the same number of rounds.
    """
    timings = {}
    for name, turn in turns.items():
        once = turn(1)  # warm-up: caches, thread teams, lazy initialisation
        if once < LONG_CALL_SECONDS:
            once = turn(1)
        timings[name] = Timing(calls=max(1, math.ceil(MIN_TURN_SECONDS / max(once, 1e-9))))
    start = clock()
    names = list(turns)
    for done in range(1, MAX_ROUNDS + 1):
        for name in names:
            timings[name].seconds.append(turns[name](timings[name].calls))
        names.reverse()  # whoever follows the heaviest provider is not always the same one
        if done < MIN_ROUNDS:
            continue
        if clock() - start >= budget:
            break
        if all(stats.median_error(t.seconds) <= ENOUGH for t in timings.values()):
            break
    return timings
