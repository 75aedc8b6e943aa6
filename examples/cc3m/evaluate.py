"""What a run measures after every epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from examples.cc3m.evaluation import alignment, modality_gap, retrieval, uniformity
from examples.cc3m.files import UserError
from examples.cc3m.loader import ShardLoader
from examples.cc3m.run_settings import EvaluationSettings
from examples.cc3m.shards import expand_shards
from examples.cc3m.towers import Towers
from examples.cc3m.zero_shot import Classification, zero_shot

Stopping = Callable[[], bool]


class Judge:
    """Measures towers of their own, so that what is trained stays as it is.

    Args:
        settings: what is measured, on which data.
        transform: PIL RGB -> (3, H, W), without augmentation.
        tokenize: captions -> (B, L) int64.
        device: where it computes.

    Raises:
        UserError: the data are not there.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        device: torch.device,
    ) -> None:
        self.settings, self.device, self.tokenize = settings, device, tokenize
        self.pairs: ShardLoader | None = None
        self.classification: Classification | None = None
        if settings.pairs is not None:
            try:
                shards = expand_shards(settings.pairs)
            except ValueError as error:
                raise UserError(f"--evaluation.pairs: {error}") from error
            self.pairs = ShardLoader(
                shards, transform, tokenize, settings.batch_size, max_broken=1.0
            )
        if settings.images is not None:
            self.classification = Classification(settings.images, settings.classes, transform)

    @torch.no_grad()
    def __call__(
        self, build: Callable[[], Towers], state: dict[str, Tensor], stopping: Stopping
    ) -> dict[str, float] | None:
        """Named measures of a state of the towers; None if `stopping` became true meanwhile."""
        with torch.random.fork_rng():  # building draws weights, training must not notice
            towers = build()
        there = towers.state_dict()
        towers.load_state_dict({k: v.reshape(there[k].shape) for k, v in state.items()})
        towers.eval()
        measured: dict[str, float] = {}
        if self.pairs is not None:
            found = self._pairs(towers, self.pairs, stopping)
            if found is None:
                return None
            measured |= found
        if self.classification is not None:
            size = self.settings.batch_size
            hits = zero_shot(
                towers, self.classification, self.tokenize, size, self.device, stopping
            )
            if hits is None:
                return None
            measured |= hits
        return measured

    def _pairs(
        self, towers: Towers, loader: ShardLoader, stopping: Stopping
    ) -> dict[str, float] | None:
        images, texts = [], []
        for batch in loader.epoch():
            if stopping():
                return None
            moved = batch.to(self.device)
            images.append(towers.encode_image(moved.images).float().cpu())
            texts.append(towers.encode_text(moved.texts).float().cpu())
        v, t = torch.cat(images), torch.cat(texts)
        return {
            **retrieval(v, t),
            "modality_gap": modality_gap(v, t),
            "alignment": alignment(v, t),
            "uniformity": uniformity(v, t),
        }
