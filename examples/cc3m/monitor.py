"""Shares of training's time, and a run's reports: terminal, TensorBoard, wandb, curves."""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from examples.common.files import UserError, write_text
from examples.common.reports import save_figure

LOG = logging.getLogger(__name__)
Stamp = float | torch.cuda.Event


class Clock:
    """Adds up named spans. On a GPU they are those of its stream, read when asked for.

    Args:
        device: whose time.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Stamp, Stamp]] = []
        self._waited = 0.0
        self._since = time.perf_counter()
        self.steps = 0
        """Steps since the last reading."""

    def stamp(self) -> Stamp:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, name: str, start: Stamp, end: Stamp) -> None:
        self._spans.append((name, start, end))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self.stamp()
        yield
        self.add(name, start, self.stamp())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait for data, during which a GPU has nothing to do."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Return seconds since the last reading, and of them in loading and in each named span."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        totals: defaultdict[str, float] = defaultdict(float, loading=self._waited)
        for name, start, end in self._spans:
            totals[name] += _seconds(start, end)
        elapsed, self._since, self._waited, self._spans = now - self._since, now, 0.0, []
        self.steps = 0
        return elapsed, dict(totals)


def _seconds(start: Stamp, end: Stamp) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    if isinstance(start, float) or isinstance(end, float):
        raise TypeError("a span begins and ends on the same device")
    return float(start.elapsed_time(end)) / 1000


def peak_memory(device: torch.device) -> int:
    """Return bytes: most ever allocated on the GPU, or the process's largest resident size.

    Without a GPU it is known on Linux only, and 0 elsewhere.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(r"VmHWM:\s*(\d+) kB", text)
    return 1024 * int(found.group(1)) if found else 0


class CollectiveTime:
    """Seconds that collectives themselves take, from torch's profiler, in a step that asks.

    They overlap with computation, so this is not time that the others lack.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def profiled(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            yield
        self.seconds = sum(_collective_microseconds(x) for x in profile.events() or []) / 1e6


def _collective_microseconds(event: torch.autograd.profiler_util.FunctionEvent) -> float:
    if "ncclDevKernel" in event.name:
        return float(event.device_time_total)
    return float(event.cpu_time_total) if event.name.startswith("gloo:") else 0.0


SHOWN = ("loading", "model", "loss", "optimizer", "communication")
GIB = 1 << 30


class RunLog:
    """Places where the values of a run go; only the first process has one.

    Args:
        folder: the run's; train.log there gets every line.
        settings: the run's, for wandb.
        tensorboard: whether to write there.
        wandb: name of the project there; None: not to write there.
        step: where the run goes on; what a lost part of it wrote after that is hidden.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        tensorboard: bool,
        wandb: str | None,
        total_steps: int,
        step: int = 0,
    ) -> None:
        self.folder, self.total_steps = folder, total_steps
        self.writer = self.wandb = None
        if tensorboard:  # imported here: the demo does without, and does not install it
            from torch.utils.tensorboard.writer import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if wandb is not None:
            name = f"{zlib.crc32(str(folder.resolve()).encode()):08x}"
            self.wandb = import_wandb().init(
                project=wandb, dir=str(folder), config=settings, id=name, resume="allow"
            )

    def tell(self, text: str) -> None:
        """Write a line on the terminal and into train.log."""
        tqdm.write(text)
        try:
            with (self.folder / "train.log").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            LOG.warning("train.log cannot be written: %s", error)

    def values(self, step: int, values: dict[str, float], faults: dict[str, int]) -> None:
        """Write an entry of the history, and what was wrong with samples so far."""
        self.tell(line(step, self.total_steps, values, faults))
        self._curves(step, {name: value for name, value in values.items() if name != "step"})

    def evaluation(self, entries: list[dict[str, Any]]) -> None:
        """Write all evaluations so far, of which the last is new."""
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_text(self.folder / "results.jsonl", text)
        last = {k: v for k, v in entries[-1].items() if k not in ("epoch", "step")}
        told = ", ".join(f"{name} {value:.4f}" for name, value in last.items())
        self.tell(f"after epoch {entries[-1]['epoch']}: {told}")
        self._curves(entries[-1]["step"], {f"evaluation/{k}": v for k, v in last.items()})

    def _curves(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            try:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
                self.writer.flush()
            except OSError as error:  # a full disk costs curves, not the run
                LOG.warning("TensorBoard cannot be written, and gets no more: %s", error)
                self.writer = None
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def import_wandb() -> Any:
    """Return the module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        message = "--wandb needs wandb, which is not installed: pip install wandb"
        raise UserError(message) from error


def line(step: int, total: int, values: dict[str, float], faults: dict[str, int]) -> str:
    """Return a line such as "step 20/90: loss 5.013, 812 images/s, loading 2%, ..."."""
    parts = [f"loss {values['loss']:.3f}", f"{values['images_per_second']:.0f} images/s"]
    parts += [f"{name} {values[f'{name}_share']:.0%}" for name in SHOWN]
    if values["peak_memory"]:
        parts.append(f"memory {values['peak_memory'] / GIB:.2f} GiB")
    if values["skipped"]:
        parts.append(f"{values['skipped']:.0f} steps skipped")
    if faults:
        parts.append("faults: " + ", ".join(f"{n} {kind}" for kind, n in sorted(faults.items())))
    return f"step {step}/{total}: " + ", ".join(parts)


def save_curves(
    path: Path, history: dict[str, list[float]], evaluations: list[dict[str, Any]]
) -> None:
    """Draw loss terms, shares of the time, speed, and what was measured."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    steps = history.get("step", [])
    terms = [name for name in history if name == "loss" or name.endswith("_loss")]
    _draw(axes[0, 0], "loss", steps, {name: history[name] for name in terms})
    shares = {name: history[f"{name}_share"] for name in SHOWN if f"{name}_share" in history}
    _draw(axes[0, 1], "share of a step", steps, shares)
    rates = {k: history[k] for k in ("images_per_second",) if k in history}
    _draw(axes[1, 0], "speed", steps, rates)
    measured = [name for name in (evaluations[-1] if evaluations else {}) if name.find("@") > 0]
    measured += ["zeroshot-top1"] * any("zeroshot-top1" in each for each in evaluations)
    epochs = [each["step"] for each in evaluations]
    curves = {name: [each.get(name, float("nan")) for each in evaluations] for name in measured}
    _draw(axes[1, 1], "evaluation", epochs, curves, marker="o")
    save_figure(path, figure, dpi=120)


def _draw(
    axes: Any, title: str, steps: list[float], curves: dict[str, list[float]], **style: Any
) -> None:
    for name, values in curves.items():
        axes.plot(steps, values, label=name, linewidth=1.2, **style)
    axes.set_title(title)
    axes.set_xlabel("step")
    if curves:
        axes.legend(fontsize="small")
