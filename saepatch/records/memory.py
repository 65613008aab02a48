"""Memory that a step takes, checked before it starts: a process that takes more than there is may be killed unheard."""

import os
import re
from pathlib import Path

from saepatch.errors import UserError

GB = 1e9
SMALL = 2**28  # bytes that are not worth asking the system for


def free_memory() -> int | None:
    """Bytes that this process can still take (on Linux), or those that the machine has; None: not known."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii")
        free = 1024 * sum(map(int, re.findall(r"^(?:MemAvailable|SwapFree):\s+(\d+) kB$", lines, re.MULTILINE)))
    except (OSError, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    try:  # of a container or a job
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except (OSError, ValueError):
        return free
    return min(free, int(limit)) if limit.isdigit() else free


def check_memory(size: int, what: str, remedy: str) -> None:
    """Raises UserError where something that takes `size` bytes at least does not fit in the free memory."""
    if size < SMALL:
        return
    free = free_memory()
    if free is not None and size > free:
        raise UserError(f"{what} take {size / GB:,.1f} GB at least, and {free / GB:,.1f} GB are free: {remedy}")
