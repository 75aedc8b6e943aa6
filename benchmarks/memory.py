"""Peak memory of a call above what the process held before, and the memory still free.

On Linux the kernel's own high-water mark is reset before the call and read after it, so no peak
is missed. Elsewhere a thread samples the resident size every millisecond, which needs psutil and
may miss a short peak.
"""

import contextlib
import ctypes
import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import Call

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
SMALL = 1 << 16  # bytes


def peak_extra_bytes(call: Call) -> int:
    """Highest resident size during the call minus the resident size before it, in bytes.

    The allocator first gives back what it kept of earlier calls; otherwise reused pages hide.
    """
    release_free_memory()
    if _high_water_can_be_reset():
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    return _sampled_peak(call)


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


def release_free_memory() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes() -> int | None:
    """Memory new allocations can have without swapping, or None where it cannot be told."""
    return _least(_available_by_meminfo(), _available_by_cgroup())


def _high_water_can_be_reset() -> bool:
    try:
        CLEAR_REFS.write_text(RESET_HIGH_WATER)
        return _status_bytes("VmHWM") > 0
    except (OSError, KeyError):
        return False


def _status_bytes(field: str) -> int:
    return _kibibytes(STATUS.read_text())[field]


def _kibibytes(text: str) -> dict[str, int]:
    """'Name:   12 kB' lines to {name: bytes}."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1:] == ["kB"]}


def _sampled_peak(call: Call) -> int:
    import psutil  # type: ignore[import-untyped, unused-ignore]

    process = psutil.Process()
    before: int = process.memory_info().rss
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    last: int = process.memory_info().rss
    return max(peak, last) - before


def _available_by_meminfo() -> int | None:
    if sys.platform == "linux":
        return _kibibytes(Path("/proc/meminfo").read_text()).get("MemAvailable")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all of it: an upper bound
    return None


def _available_by_cgroup() -> int | None:
    """What a container's limit leaves, when there is one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


def _least(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return min(known, default=None)
