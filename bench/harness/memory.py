"""Peak memory of a call, from the high-water mark of the process's resident set."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

METHOD = (
    "peak resident set of one call above what was resident before it (VmHWM after reset, Linux); "
    "inputs and weights prepared before the call are not in it"
)


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Bytes that `call` needs at its peak beyond what is resident now, or None where the system cannot tell.

    Freed memory that the allocator or fastgen's pool still holds is given back first, else the call could use it
    unseen.
    """
    import fastgen  # now: tables of results are made without it

    getattr(fastgen, "empty_cache", lambda: None)()  # earlier revisions have no pool
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")  # resets VmHWM, proc(5)
    except (OSError, AttributeError):
        return None
    call()
    return max(0, _resident("VmHWM") - before)
