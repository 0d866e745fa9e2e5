"""The plan executed by the C++ module (csrc/cpu/plan_executor.h): memory and threads."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable

import torch
from torch import Tensor

from fastgen import backends
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.parted import part_planes
from fastgen.sampling.executors.tables import PlanTables
from fastgen.sampling.plan import Plan

# How long groups are left to one thread each after a team could not keep together: the first time, and at most, when it
# fails again and again. A failure costs 10 to 50 ms.
ALONE_SECONDS, MOST_ALONE_SECONDS = 0.25, 4.0
# Calls per batch: between them the progress bar moves and Ctrl-C is heard. Short ones take longer to start threads.
CHUNKS, CHUNK_SECONDS = 8, 0.005
# Samples that a thread needs so that multiplying by the weights of the pixel stage takes longer than fetching them, by
# the bytes of these weights: a core's own cache keeps up with one, the shared cache and memory need more
# (2 * FLOP/s of a core / bytes/s to it).
SAMPLES_PER_THREAD = ((1 << 20, 1), (16 << 20, 4), (math.inf, 16))
# A team is worth its barriers where a step of a pixel, and what rows have for it, take one thread this long; estimated
# from the weights and these rates. What a barrier costs depends on where the threads are, 0.2 to 0.7 us on one machine
# within minutes: from a quarter of this time to twice as long both ways are timed.
TEAM_STEP_SECONDS = 2e-6
CORE_BYTES_PER_SECOND = 5e10
CORE_FLOPS = 1e11
TRIAL_SECONDS = 5.0  # so long the faster way is taken before both are timed again


def processors() -> int:
    """How many this process may use; more threads would wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Trials:
    """Which of two ways to do the same is faster: either is taken once and timed. One that failed takes forever."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Hashable, bool], float] = {}
        self._until: dict[Hashable, float] = {}

    def choose(self, what: Hashable, first: bool) -> bool:
        """The way to be taken now; `first` if neither has been."""
        if time.monotonic() >= self._until.get(what, math.inf):
            for way in (True, False):
                self._seconds.pop((what, way), None)
            self._until.pop(what, None)
        one, other = self._seconds.get((what, first)), self._seconds.get((what, not first))
        if one is None or other is None:
            return first if one is None else not first
        return first if one <= other else not first

    def took(self, what: Hashable, way: bool, seconds: float) -> None:
        self._seconds[what, way] = seconds
        if (what, not way) in self._seconds:
            self._until.setdefault(what, time.monotonic() + TRIAL_SECONDS)


class CpuExecutor:
    """Plans on the CPU in float32, with `torch.get_num_threads()` threads, but at most one for each processor."""

    def __init__(self, plan: Plan):
        self.plan = plan
        tables = PlanTables(part_planes(plan))
        self._tables = tables
        self._alone_until, self._alone_seconds = 0.0, ALONE_SECONDS
        self._teams = Trials()
        self._weights = tables.packed_weights()  # used in place; the constructor copies the rest
        if tables.plan is not plan:
            tables.plan.drop_weights()
        self._shared = tables.shared_planes()
        integers, floats = tables.integers(), tables.floats()
        self._native = backends.native_cpu().PlanExecutor(
            head=type(plan.head).__name__.lower(),
            tables={k: (t.data_ptr(), *t.shape) for k, t in integers.items()},
            floats={k: (t.data_ptr(), t.numel()) for k, t in floats.items()},
            sizes=tables.sizes(),
            weights=self._weights.data_ptr(),
            shared=self._shared.data_ptr(),
        )

    @property
    def flops(self) -> int:
        """Floating point operations of products and attention, per sample (two per multiply-add)."""
        return self._tables.flops

    @property
    def sample_bytes(self) -> int:
        """Bytes of the planes of a sample."""
        return 4 * self._tables.workspace

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self._weights.nbytes

    def sample(self, batch: Batch, params: Tensor | None = None) -> Tensor:
        """Levels [count, C, H, W]; `params`, float32 [count, parameters, H, W], takes what they are drawn from."""
        plan = self.plan
        levels = torch.zeros(batch.count, *plan.image_shape, dtype=torch.int32)
        threads = min(torch.get_num_threads(), processors())
        kind = batch.count, batch.streams, threads
        groups, team = self.split(*kind)
        kept_together, begin_seconds = True, time.perf_counter()
        spaces = [self._tables.fill(batch, first, count) for first, count in groups]
        scratch = torch.empty(len(groups) * team * self._native.scratch() + 64, dtype=torch.uint8)
        known = None if batch.known is None else batch.known.to(torch.int32).contiguous()
        mask = None if batch.mask is None else batch.mask.contiguous()
        height = plan.image_shape[1]
        chunks = max(1, min(CHUNKS, int(batch.rows * self.flops / CORE_FLOPS / CHUNK_SECONDS)))
        edges = [plan.first_row, *(height * i // chunks for i in range(1, chunks + 1))]
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            if begin == end:
                continue
            several = team > 1 and time.monotonic() >= self._alone_until
            together = self._native.run(
                groups=[(first, count, s.data_ptr()) for (first, count), s in zip(groups, spaces, strict=True)],
                team=team if several else 1,
                scratch=-(-scratch.data_ptr() // 64) * 64,
                seed=batch.seed,
                start=batch.start,
                temperature=batch.temperature,
                top_k=batch.truncation.top_k or 0,
                top_p=batch.truncation.top_p,
                streams=batch.streams,
                guidance=1.0 if batch.guidance is None else batch.guidance.scale,
                levels=levels.data_ptr(),
                known=0 if known is None else known.data_ptr(),
                mask=0 if mask is None else mask.data_ptr(),
                params=0 if params is None else params.data_ptr(),
                num_params=0 if params is None else params.shape[1],
                row_begin=begin,
                row_end=end,
            )
            kept_together &= several == (team > 1) and together
            if not together:
                self._alone_until = time.monotonic() + self._alone_seconds
                self._alone_seconds = min(2 * self._alone_seconds, MOST_ALONE_SECONDS)
            elif several:
                self._alone_seconds = max(self._alone_seconds / 2, ALONE_SECONDS)
            batch.on_rows(end - max(begin, 0))
        self._teams.took(kind, team > 1, time.perf_counter() - begin_seconds if kept_together else math.inf)
        return levels.to(plan.head.dtype)

    def split(self, count: int, streams: int, threads: int) -> tuple[list[tuple[int, int]], int]:
        """How the threads share the work: ((first sample, count) of each group of samples, threads per group).

        Groups are independent, without barriers, but each reads all weights.  Where there are too few samples for that,
        the threads of a group share the weights and meet at barriers, if the steps between are long enough, or if that
        was the faster way.  Changes no sample.
        """
        size = self._tables.pixel_weight_bytes
        needed = next(samples for limit, samples in SAMPLES_PER_THREAD if size <= limit)
        parts = max(1, min(threads, count, count * streams // needed))
        team = threads // parts
        seconds = max(
            size / CORE_BYTES_PER_SECOND, count * streams / parts * 2 * self._tables.pixel_weights / CORE_FLOPS
        )
        if count < threads:  # without a team some of them have nothing to do, in the row stage either
            pixels = math.prod(self.plan.image_shape[1:])
            seconds += count * streams * self._tables.row_flops / pixels / CORE_FLOPS
        if team > 1:
            step = seconds / self._tables.barriers
            together = step >= TEAM_STEP_SECONDS
            if TEAM_STEP_SECONDS / 4 <= step < 2 * TEAM_STEP_SECONDS:
                together = self._teams.choose((count, streams, threads), first=together)
            if not together:
                parts, team = min(threads, count), 1
        edges = [count * i // parts for i in range(parts + 1)]
        return [(a, b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)], team
