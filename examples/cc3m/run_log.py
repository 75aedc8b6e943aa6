"""What a run tells: lines on the terminal, TensorBoard, wandb, results.jsonl, and curves."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from examples.cc3m.files import UserError, write_atomically, write_text

SHARES = ("loading", "model", "loss", "optimizer", "communication")
GIB = 1 << 30


class RunLog:
    """Where the values of a run go; nothing is written by processes but the first.

    Args:
        folder: of the run.
        settings: of the run, for wandb.
        tensorboard, wandb: whether to write there.
        step: where the run goes on; what a lost part of it wrote after that is hidden.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        tensorboard: bool,
        wandb: bool,
        total_steps: int,
        step: int = 0,
    ) -> None:
        self.folder, self.total_steps = folder, total_steps
        self.writer = self.wandb = None
        if tensorboard:
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if wandb:
            self.wandb = import_wandb().init(project="rankloss", dir=str(folder), config=settings)

    def values(self, step: int, values: dict[str, float], faults: dict[str, int]) -> None:
        """An entry of the history, and what was wrong with samples so far."""
        tqdm.write(line(step, self.total_steps, values, faults))
        self._curves(step, {name: value for name, value in values.items() if name != "step"})

    def evaluation(self, entries: list[dict[str, Any]]) -> None:
        """All evaluations so far, of which the last is new."""
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_text(self.folder / "results.jsonl", text)
        last = {k: v for k, v in entries[-1].items() if k not in ("epoch", "step")}
        told = ", ".join(f"{name} {value:.4f}" for name, value in last.items())
        tqdm.write(f"after epoch {entries[-1]['epoch']}: {told}")
        self._curves(entries[-1]["step"], {f"evaluation/{k}": v for k, v in last.items()})

    def _curves(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def import_wandb() -> Any:
    """The module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        message = "--wandb needs wandb, which is not installed: pip install wandb"
        raise UserError(message) from error


def line(step: int, total: int, values: dict[str, float], faults: dict[str, int]) -> str:
    """For example "step 20/90: loss 5.013, 812 images/s, loading 2%, ..., memory 1.2 GiB"."""
    parts = [f"loss {values['loss']:.3f}", f"{values['images_per_second']:.0f} images/s"]
    parts += [f"{name} {values[f'{name}_share']:.0%}" for name in SHARES]
    parts.append(f"memory {values['peak_memory'] / GIB:.2f} GiB")
    if values["skipped"]:
        parts.append(f"{values['skipped']:.0f} steps skipped")
    if faults:
        parts.append("faults: " + ", ".join(f"{n} {kind}" for kind, n in sorted(faults.items())))
    return f"step {step}/{total}: " + ", ".join(parts)


def save_curves(
    path: Path, history: dict[str, list[float]], evaluations: list[dict[str, Any]]
) -> None:
    """Loss terms, where the time went, speed, and what was measured, as a picture."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    steps = history.get("step", [])
    terms = [name for name in history if name == "loss" or name.endswith("_loss")]
    _draw(axes[0, 0], "loss", steps, {name: history[name] for name in terms})
    shares = {name: history[f"{name}_share"] for name in SHARES if f"{name}_share" in history}
    _draw(axes[0, 1], "share of a step", steps, shares)
    rates = {k: history[k] for k in ("images_per_second",) if k in history}
    _draw(axes[1, 0], "speed", steps, rates)
    measured = [name for name in (evaluations[-1] if evaluations else {}) if name.find("@") > 0]
    measured += ["zeroshot-top1"] * any("zeroshot-top1" in each for each in evaluations)
    epochs = [each["step"] for each in evaluations]
    curves = {name: [each.get(name, float("nan")) for each in evaluations] for name in measured}
    _draw(axes[1, 1], "evaluation", epochs, curves, marker="o")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _draw(
    axes: Any, title: str, steps: list[float], curves: dict[str, list[float]], **style: Any
) -> None:
    for name, values in curves.items():
        axes.plot(steps, values, label=name, linewidth=1.2, **style)
    axes.set_title(title)
    axes.set_xlabel("step")
    if curves:
        axes.legend(fontsize="small")
