"""Measures after an epoch, by `examples.evaluation`: all processes take part, with their share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn

from examples.cc3m.settings import DTYPES, EvaluationSettings, Precision
from examples.common.files import UserError
from examples.common.parallel import Parallel
from examples.common.signals import StopRequest
from examples.evaluation.data import Captioned, Classification
from examples.evaluation.gap import alignment, modality_gap, uniformity
from examples.evaluation.models import Model, encode_pairs
from examples.evaluation.reading import Reading
from examples.evaluation.retrieval import retrieval
from examples.evaluation.zero_shot import zero_shot


@dataclass(eq=False)
class Evaluator:
    """Measure a model on data that it was not trained on.

    Args:
        settings: what is measured, on which data.
        transform: PIL RGB -> (3, H, W), without augmentation.
        tokenize: captions -> (B, L) int64.
        parallel: processes among which the data are divided.
        precision: that of the model, as in training.
        workers: processes that decode for each process.

    Raises:
        UserError: the data are not there.
    """

    settings: EvaluationSettings
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    parallel: Parallel
    precision: Precision = "fp32"
    workers: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self.pairs: Captioned | None = None
        self.classes: Classification | None = None
        if settings.pairs is not None:
            try:
                self.pairs = Captioned(settings.pairs, self.transform, self.tokenize)
            except UserError as error:
                raise UserError(f"--evaluation.pairs: {error}") from error
        if settings.images is not None:
            self.classes = Classification(settings.images, settings.classes, self.transform)

    def missing(self) -> list[str]:
        """Name what will not be measured, and the option that would change it."""
        told = []
        if self.pairs is None:
            told.append(
                "retrieval, modality gap, alignment, uniformity: there are no shards in a folder "
                "'<that of --data>-val', nor --evaluation.pairs"
            )
        if self.classes is None:
            told.append(
                "zero-shot classification: there is no 'imagenet/val' beside the folder of --data, "
                "nor --evaluation.images"
            )
        return told

    def __call__(self, towers: nn.Module, stop: StopRequest) -> dict[str, float]:
        """Return named measures of a model in evaluation mode; the same in every process.

        Raises:
            Stopped: some process was asked to stop meanwhile.
        """
        dtype = DTYPES.get(self.precision)
        model = Model("", towers, self.transform, self.tokenize, self.parallel.device, dtype)
        reading = Reading(
            self.settings.batch_size, self.parallel, self.workers, lambda: stop.wanted
        )
        measured: dict[str, float] = {}
        if self.pairs is not None:
            pairs = encode_pairs(model, self.pairs, reading)
            measured |= retrieval(pairs.images, pairs.texts, pairs.image_of_text)
            images, texts = pairs.images, pairs.first_texts()
            for measure in (modality_gap, alignment, uniformity):
                measured[measure.__name__] = measure(images, texts)
        if self.classes is not None:
            measured |= zero_shot(model, self.classes, reading)
        return measured
