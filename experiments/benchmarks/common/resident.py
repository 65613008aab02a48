"""Resident memory of this process."""

import resource
import sys
from pathlib import Path
from typing import Literal

STATUS = Path("/proc/self/status")


def resident_bytes(which: Literal["now", "peak"]) -> int:
    """Resident memory of this process alone; without /proc, both are the peak, which may count a parent's, too."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    field = {"now": "VmRSS:", "peak": "VmHWM:"}[which]
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
