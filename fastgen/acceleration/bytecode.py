"""What the function that asks a symbol does with the answer, by its bytecode."""

from __future__ import annotations

import bisect
import dis
import functools
import operator
from types import CodeType
from typing import Any


def following(frame: Any) -> list[dis.Instruction]:
    """The instructions of a function from the present one on."""
    steps = _instructions(frame.f_code)
    return steps[bisect.bisect_left(steps, frame.f_lasti, key=operator.attrgetter("offset")) :]


@functools.lru_cache(maxsize=1024)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def truth_without_raising(steps: list[dis.Instruction]) -> bool | None:
    """The truth value that skips a block which does nothing but raise, where that is what it decides."""
    jump = next((step for step in steps[:2] if step.opname.startswith("POP_JUMP")), None)
    if jump is None or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    behind = [step for step in steps if step.offset > jump.offset]
    if jump.argval > jump.offset:
        behind = [step for step in behind if step.offset < jump.argval]
    left = next((step for step in behind if _leaves(step.opname)), None)
    raises = left is not None and left.opname == "RAISE_VARARGS"
    if jump.argval > jump.offset:  # back to the head of a loop otherwise
        raises = raises and left is behind[-1]
    if raises:
        return jump.opname.endswith("IF_TRUE")
    target = [step for step in steps if step.offset >= jump.argval] if jump.argval > jump.offset else []
    leads_to = next((step for step in target if _leaves(step.opname)), None)  # as of ``assert a and b``
    return jump.opname.endswith("IF_FALSE") if leads_to is not None and leads_to.opname == "RAISE_VARARGS" else None


def _leaves(name: str) -> bool:
    return "JUMP" in name or name.startswith(("RETURN", "YIELD", "FOR_", "SEND", "RAISE"))
