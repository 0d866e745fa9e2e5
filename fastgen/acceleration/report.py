"""What `fastgen.accelerate` did to a module, and what it left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Entry(NamedTuple):
    """A place in the module: the path of its first member, what is there, and how it was fused or why it was not."""

    path: str
    what: str
    reason: str


@dataclass
class Report:
    """`fused` and `skipped`, in the order of execution; printed, it is a table."""

    fused: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("", "where", "what", "how, or why not")]
        rows += [("fused", *entry) for entry in self.fused]
        rows += [("skipped", *entry) for entry in self.skipped]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
        return "\n".join(lines) if len(rows) > 1 else "nothing found that could be fused"

    def paths(self) -> set[str]:
        return {entry.path for entry in (*self.fused, *self.skipped)}

    def merge(self, other: Report) -> None:
        """Adds what another, closer look says about places that are not in this report."""
        known = self.paths()
        self.fused += [entry for entry in other.fused if entry.path not in known]
        self.skipped += [entry for entry in other.skipped if entry.path not in known]
