"""Tables and plots, made from rows alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def seconds(value: float) -> str:
    """Three significant digits with a unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value * 1e9)} ns"


def count(value: float | None, unit: str) -> str:
    """Three significant digits with a decimal prefix; "-" for None."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{_three(value)} {unit}"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case, in the order of the file."""
    return [
        list(group) for _, group in itertools.groupby(rows, key=lambda row: (row["suite"], row["case"], row["threads"]))
    ]


def heading(row: Row) -> str:
    """What the case is and what bounds it."""
    sizes = ", ".join(
        f"{key} {'x'.join(map(str, v)) if isinstance(v, list) else v}" for key, v in row["shapes"].items()
    )
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    work = f"{count(row['flops'], 'FLOP')}, {count(row['bytes'], 'B')}"
    bound = f"limit {seconds(row['limit_s'])} ({row['limited_by']})"
    return f"{row['case']}: {sizes}; {threads}, {row['dtype']}; {work}; {bound}; others {row['others']:.0%}"


def case_table(group: Sequence[Row]) -> str:
    """The block of one case: heading, one line per provider, notes."""
    compared = {name for row in group for name in row["speedup"] or {}}
    baselines = [row["provider"] for row in group if row["provider"] in compared]
    header = [
        "provider",
        "best",
        "median",
        "p20",
        "p80",
        "FLOP/s",
        "of limit",
        "memory",
        *(f"x {name}" for name in baselines),
    ]
    lines = [header]
    for row in group:
        ratios = [row["speedup"].get(name) if row["speedup"] else None for name in baselines]
        lines.append(
            [
                row["provider"],
                *(seconds(row[key]) for key in ("best_s", "median_s", "p20_s", "p80_s")),
                count(row["flops"] / row["median_s"], "") if row["flops"] else "-",
                f"{row['fraction_of_limit']:.1%}",
                count(row["peak_memory_bytes"], "B"),
                *(
                    ""
                    if ratio is None
                    else f"{_three(ratio['median'])} ({_three(ratio['p20'])}-{_three(ratio['p80'])})"
                    for ratio in ratios
                ),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [heading(group[0])]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("  " + "  ".join(cells).rstrip())
    text += [f"  {row['provider']}: {row['note']}" for row in group if row["note"]]
    text += [f"  {row['provider']}: {_extra(row['extra'])}" for row in group if row["extra"]]
    return "\n".join(text)


def _extra(extra: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in extra.items()
    )


def provenance(rows: Sequence[Row]) -> str:
    """Machine, versions, commits and the command that reproduces the rows."""
    row = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    commits = ", ".join(sorted({row["commit"] + (" with changes" if row["dirty"] else "") for row in rows}))
    peaks = sorted({(r["threads"], r["dtype"], r["peak_flops"], r["peak_isa"], r["peak_bandwidth"]) for r in rows})
    return "\n".join(
        [
            f"machine: {row['machine']['cpu']}, {row['machine']['cores']} cores; {versions}; commit {commits}",
            *(
                f"ceilings: {n} threads, {dtype}: {count(flops, 'FLOP/s')} ({isa}), {count(bandwidth, 'B/s')}"
                for n, dtype, flops, isa, bandwidth in peaks
            ),
            *([] if row["tests"] == "passed" else [_about_tests(row["tests"])]),
            f"reproduce: {row['command']}",
        ]
    )


def _about_tests(tests: str) -> str:
    return "tests not run: no speed-ups" if tests == "not run" else f"not all tests passed: {tests}"


def table(rows: Sequence[Row]) -> str:
    """The whole report as text."""
    return "\n\n".join([*(case_table(group) for group in by_case(rows)), provenance(rows)])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Fraction of the machine's limit per case and provider, as a picture.

    Raises:
        RuntimeError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install 'fastgen[bench]'") from None
    groups = by_case(rows)
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.16 * len(rows) + 0.15 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    place, labels = 0.0, []
    for group in groups:
        labels.append((place + (len(group) - 1) / 2, group[0]["case"]))
        for row in group:
            share = 100 * row["fraction_of_limit"]
            axes.barh(place, share, color=f"C{names.index(row['provider'])}")
            axes.text(share, place, f" {seconds(row['median_s'])}", va="center", fontsize=7)
            place += 1
        place += 0.8
    for index, name in enumerate(names):
        axes.barh(0, 0, color=f"C{index}", label=name)
    axes.set_yticks([y for y, _ in labels], [text for _, text in labels], fontsize=7)
    axes.set_ylim(place, -1)  # the first case on top
    axes.set_xlim(0, 1.1 * max(100 * row["fraction_of_limit"] for row in rows))
    axes.set_xlabel("% of the machine's limit (beside each bar: median time)")
    axes.set_title(f"{rows[0]['suite']}: {rows[0]['machine']['cpu']}, commit {rows[0]['commit']}", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(names), fontsize=7)
    figure.savefig(path, dpi=120)
