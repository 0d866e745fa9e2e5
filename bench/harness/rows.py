"""One row per (case, provider): the record that tables, plots and comparisons are made from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.harness import memory, stats
from bench.harness.ceilings import Ceilings
from bench.harness.measure import Timing

SCHEMA = 1

# Field -> type; a row has exactly these. bench/README.md says what they mean.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "suite": str,
    "case": str,
    "provider": str,
    "shapes": dict,
    "dtype": str,
    "threads": int,
    "rounds": int,
    "calls": int,
    "scale": float,
    "median_s": float,
    "p20_s": float,
    "p80_s": float,
    "best_s": float,
    "peak_memory_bytes": (int, type(None)),
    "memory_method": str,
    "flops": float,
    "bytes": float,
    "peak_flops": float,
    "peak_bandwidth": float,
    "peak_isa": str,
    "limit_s": float,
    "limited_by": str,
    "fraction_of_limit": float,
    "speedup": (dict, type(None)),
    "tests": str,
    "note": str,
    "extra": dict,
    "machine": dict,
    "versions": dict,
    "commit": str,
    "dirty": bool,
    "load_average": float,
    "others": float,
    "command": str,
    "date": str,
}


def check(row: Mapping[str, Any]) -> None:
    """Raises ValueError where a row does not have exactly the fields above with these types."""
    wrong = set(row) ^ set(FIELDS)
    if wrong:
        raise ValueError(f"row has missing or unknown fields: {sorted(wrong)}")
    for name, kind in FIELDS.items():
        if not isinstance(row[name], kind):
            raise ValueError(f"row field {name!r} must be {kind}, got {row[name]!r}")


def limit(flops: float, bytes: float, dtype: str, threads: int, ceilings: Ceilings) -> dict[str, Any]:
    """The least time the machine needs: the longer of the arithmetic at its peak and the traffic at full bandwidth."""
    isa, peak = ceilings.peak_flops(dtype, threads)
    bandwidth = ceilings.peak_bandwidth(threads)
    compute, traffic = flops / peak, bytes / bandwidth
    return {
        "peak_flops": peak,
        "peak_bandwidth": bandwidth,
        "peak_isa": isa,
        "limit_s": max(compute, traffic),
        "limited_by": "flops" if compute >= traffic else "bytes",
    }


def timing(times: Timing, scale: float) -> dict[str, Any]:
    """The statistics of one provider, in seconds of the whole job."""
    numbers = {f"{name}_s": value * scale for name, value in stats.summary(times.seconds).items()}
    return {
        "rounds": len(times.seconds),
        "calls": times.calls,
        "scale": float(scale),
        **numbers,
        "best_s": min(times.seconds) * scale,
    }


def speedups(name: str, times: Mapping[str, Timing], providers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Speed-up of a provider over every baseline: {baseline: {"median", "p20", "p80"}}; {} for a baseline itself."""
    if providers[name]["baseline"]:
        return {}
    own = [s * providers[name]["scale"] for s in times[name].seconds]
    return {
        other: stats.paired_speedup([s * facts["scale"] for s in times[other].seconds], own)
        for other, facts in providers.items()
        if facts["baseline"]
    }


def make(
    common: Mapping[str, Any],
    description: Mapping[str, Any],
    times: Mapping[str, Timing],
    peaks: Mapping[str, int | None],
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """The rows of one case.

    Args:
        common: the fields that all rows of the case share; rows carry no speed-up where "tests" is "not run".
        description: what `Session.prepare` returned.
        times, peaks: by provider.
    """
    providers = description["providers"]
    floor = limit(description["flops"], description["bytes"], common["dtype"], common["threads"], ceilings)
    result = []
    for name, facts in providers.items():
        numbers = timing(times[name], facts["scale"])
        row = {
            "schema": SCHEMA,
            "memory_method": memory.METHOD,
            **common,
            "provider": name,
            **numbers,
            "peak_memory_bytes": peaks[name],
            "flops": float(description["flops"]),
            "bytes": float(description["bytes"]),
            **floor,
            "fraction_of_limit": floor["limit_s"] / numbers["median_s"],
            "speedup": speedups(name, times, providers) if common["tests"] != "not run" else None,
            "note": facts["note"],
            "extra": facts["extra"],
            **facts.get("revision", {}),
        }
        check(row)
        result.append(row)
    return result


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
