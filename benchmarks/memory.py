"""Peak memory of a call above what the process held before, and the memory still free.

On Linux the kernel's own high-water mark is reset before the call and read after it, so no peak is
missed. Other systems have no such mark; a peak is not measured there.
"""

import contextlib
import ctypes
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import Call

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
SMALL = 1 << 16  # bytes


def can_measure() -> bool:
    """Say if this system has a high-water mark that can be reset."""
    try:
        CLEAR_REFS.write_text(RESET_HIGH_WATER)
    except OSError:
        return False
    return "VmHWM" in _kibibytes(STATUS)


def peak_extra_bytes(call: Call) -> int:
    """Highest resident size during the call minus the resident size before it, in bytes.

    The allocator first gives back what it kept of earlier calls; otherwise reused pages hide.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text(RESET_HIGH_WATER)
    before = _kibibytes(STATUS)["VmRSS"]
    call()
    return max(0, _kibibytes(STATUS)["VmHWM"] - before)


def peak_live_bytes(call: Call) -> int:
    """The same without what glibc keeps of freed blocks, whose fragments can exceed what is alive.

    Every larger block is mapped on its own, so that freeing it lowers the resident size, and the
    call runs in a new thread, whose heap holds no old blocks to reuse. This slows allocation for
    the rest of the process's life: time first. Without glibc it is `peak_extra_bytes`.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, SMALL)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(peak_extra_bytes, call).result()


def free_bytes() -> int | None:
    """Memory new allocations can have without swapping, or None where it cannot be told."""
    if sys.platform != "linux":
        return None
    known = [_kibibytes(Path("/proc/meminfo")).get("MemAvailable"), _left_by_cgroup()]
    return min((value for value in known if value is not None), default=None)


def _left_by_cgroup() -> int | None:
    """Bytes below a container's limit, where there is one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


def _kibibytes(file: Path) -> dict[str, int]:
    """'Name:   12 kB' lines to {name: bytes}."""
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1:] == ["kB"]}
