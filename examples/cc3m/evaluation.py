"""Measures after an epoch: retrieval, zero-shot classification, and how the features lie.

All processes take part, each with its share of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from examples.cc3m.loader import ShardLoader
from examples.cc3m.settings import DTYPES, EvaluationSettings, Precision
from examples.common.files import UserError
from examples.common.images import CentreCrop
from examples.common.parallel import Parallel
from examples.common.shards import expand_shards
from examples.common.signals import StopRequest
from examples.evaluation.gap import alignment, modality_gap, uniformity
from examples.evaluation.retrieval import retrieval
from examples.evaluation.zero_shot import Classification, in_step, zero_shot

Item = TypeVar("Item")
Tokenize = Callable[[list[str]], Tensor]


class Evaluator:
    """Measure a model on data that it was not trained on.

    Args:
        settings: what is measured, on which data.
        transform: shows images without augmentation.
        tokenize: captions -> (B, L) int64.
        parallel: processes among which the data are divided.
        precision: that of the model, as in training.
        workers: processes that decode for each process.

    Raises:
        UserError: the data are not there.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        transform: CentreCrop,
        tokenize: Tokenize,
        parallel: Parallel,
        precision: Precision = "fp32",
        workers: int = 0,
    ) -> None:
        self.settings, self.parallel, self.tokenize = settings, parallel, tokenize
        self.precision = precision
        self.shards: list[str] | None = None
        self.classification: Classification | None = None
        if settings.pairs is not None:
            try:
                self.shards = expand_shards(settings.pairs)
            except ValueError as error:
                raise UserError(f"--evaluation.pairs: {error}") from error
        if settings.images is not None:
            self.classification = Classification(settings.images, settings.classes, transform)
        self.transform, self.workers = transform, workers

    def missing(self) -> list[str]:
        """Name what will not be measured, and the option that would change it."""
        told = []
        if self.shards is None:
            told.append("no retrieval, modality gap, alignment, uniformity (--evaluation.pairs)")
        if self.classification is None:
            told.append("no zero-shot classification (--evaluation.images)")
        return told

    @torch.no_grad()
    def __call__(self, towers: nn.Module, stop: StopRequest) -> dict[str, float]:
        """Return named measures of a model in evaluation mode; the same in every process.

        Raises:
            Stopped: some process was asked to stop meanwhile.
        """
        measured: dict[str, float] = {}
        with self._autocast():
            if self.shards is not None:
                measured |= self._pairs(towers, self.shards, stop)
            if self.classification is not None:
                measured |= zero_shot(
                    towers,
                    self.classification,
                    self.tokenize,
                    self.settings.batch_size,
                    self.parallel.device,
                    lambda: stop.wanted,
                    self.parallel,
                    self.workers,
                )
        return measured

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = DTYPES.get(self.precision)
        kind = self.parallel.device.type
        return nullcontext() if dtype is None else torch.autocast(kind, dtype)

    def _pairs(self, towers: Any, shards: list[str], stop: StopRequest) -> dict[str, float]:
        mine = shards[self.parallel.rank :: self.parallel.world_size]
        batches: Iterator[Any] = iter(())
        if mine:
            batches = ShardLoader(
                mine,
                self.transform,
                self.tokenize,
                self.settings.batch_size,
                workers=min(self.workers, len(mine)),
                max_broken=1.0,
            ).epoch()
        images, texts = [], []
        for batch in in_step(batches, lambda: stop.wanted, self.parallel):
            moved = batch.to(self.parallel.device)
            images.append(towers.encode_image(moved.images).float().cpu())
            texts.append(towers.encode_text(moved.texts).float().cpu())
        everyones = self.parallel.gather((images, texts))
        v, t = (torch.cat([x for each in everyones for x in each[k]]) for k in (0, 1))
        return {
            **retrieval(v, t),
            "modality_gap": modality_gap(v, t),
            "alignment": alignment(v, t),
            "uniformity": uniformity(v, t),
        }
