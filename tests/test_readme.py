"""The README's Python examples run, and its times and those of bench/RESULTS.md are those of files in bench/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: f"{len(text.splitlines())} lines")
def test_example(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


TIME = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)(?:\*\*)? (ms|us|s)\b")
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def is_a_median(number: str, unit: str, medians: list[float]) -> bool:
    """Whether one of them rounds to this number, whose last zeros before the point may be rounded, too."""
    whole, _, fraction = number.replace(",", "").partition(".")
    last = 10.0 ** (-len(fraction) if fraction else len(whole) - len(whole.rstrip("0")))
    value, half = float(f"{whole}.{fraction}") * UNITS[unit], 0.501 * last * UNITS[unit]
    return any(abs(median - value) <= half for median in medians)


@pytest.mark.parametrize(
    ("file", "begin", "end"), [("README.md", "## Measured", "`make demo`: "), ("bench/RESULTS.md", "## Sampling", None)]
)
def test_times_are_medians_of_result_files(file: str, begin: str, end: str | None) -> None:
    """Not that they are those of the right row."""
    lines = [line for path in (ROOT / "bench/results").glob("*.jsonl") for line in path.read_text().splitlines()]
    medians = [row["median_s"] for row in map(json.loads, lines) if "median_s" in row]
    times = TIME.findall((ROOT / file).read_text().partition(begin)[2].partition(end or "\0")[0])
    assert len(times) > 50
    assert [" ".join(time) for time in times if not is_a_median(*time, medians)] == []
    assert not is_a_median("1.234567", "s", medians)
