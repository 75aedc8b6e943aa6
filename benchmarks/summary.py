"""The CPU suite in one small table, from its JSON content: what the README shows."""

from typing import Any

from benchmarks.providers import OURS

PEERS = ("open_clip", "list_mle")
COLUMNS = ("case", "rankloss", "naive", "naive compiled", "peer", "memory", "naive's memory")
NOTE = (
    "Forward + backward, milliseconds: median of the rounds, in brackets the time over rankloss's "
    "in the same round (above 1: rankloss is faster). Memory: peak beyond the inputs, MB. Peer: "
    "open_clip's ClipLoss at order 0, exact ListMLE in plain PyTorch at order 1."
)


def summary(content: dict[str, Any]) -> str:
    """Markdown: one row a case, where it was measured, and the targets that were missed."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_row(case) for case in content["cases"])]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    machine = content["machine"]
    where = (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date']}."
    )
    return "\n\n".join([table, f"{NOTE} {where}", _verdict(content["targets"])]) + "\n"


def _row(case: dict[str, Any]) -> list[str]:
    found = {each["provider"]: each for each in case["providers"]}
    peer = next((found[name] for name in PEERS if name in found), None)
    naive = found.get("naive")
    return [
        case["name"],
        *(_time(each) for each in (found.get(OURS), naive, found.get("naive compiled"), peer)),
        _memory(found.get(OURS)),
        _memory(naive),
    ]


def _time(provider: dict[str, Any] | None) -> str:
    if provider is None or provider["forward_backward"] is None:
        return "-"
    median = provider["forward_backward"]["wall_ms"]["median"]
    ratio = provider["time_over_rankloss"]["median"]
    shown = f"{median:.0f}" if median >= 100 else f"{median:.3g}"
    return shown if provider["provider"] == OURS else f"{shown} ({ratio:.2f}x)"


def _memory(provider: dict[str, Any] | None) -> str:
    peak = provider and provider["peak_extra_mb"]
    return "-" if peak is None else f"{peak:.1f}"


def _verdict(targets: list[dict[str, Any]]) -> str:
    judged = [t for t in targets if t["met"] is not None]
    missed = [f"{t['name']}: {t['measured']} ({t['required']})" for t in judged if not t["met"]]
    met = f"{len(judged) - len(missed)} of {len(judged)} measured targets met."
    return " ".join([met, *(f"Missed: {each}." for each in missed)])
