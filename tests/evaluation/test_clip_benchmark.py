"""Retrieval and zero-shot numbers that CLIP_benchmark 1.6.2 gives too, on tables of features."""

import importlib.util
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.evaluation.models import Model, encode_pairs
from examples.evaluation.reading import Reading, Shared
from examples.evaluation.retrieval import retrieval
from examples.evaluation.zero_shot import zero_shot

IMAGES, CAPTIONS, WORDS = 40, 5, 4999
RETRIEVAL = {
    "text_retrieval_recall@1": 0.175,
    "text_retrieval_recall@5": 0.8,
    "text_retrieval_recall@10": 0.9,
    "image_retrieval_recall@1": 0.215,
    "image_retrieval_recall@5": 0.555,
    "image_retrieval_recall@10": 0.745,
}
CLASSIFICATION = {"acc1": 0.15, "acc5": 0.75, "mean_per_class_recall": 0.17794117647}
"""Classes as CLIP_benchmark gives them."""
CLASSES = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark", "ray"]


class Tables:
    """A model that looks features up: image i by its brightness, a text by its only token.

    Tokens below 200 are captions, each near its image; others are random.
    """

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.image = torch.randn(IMAGES, 12, generator=g)
        captions = self.image.repeat_interleave(CAPTIONS, 0)
        captions = captions + 2.5 * torch.randn(IMAGES * CAPTIONS, 12, generator=g)
        self.text = torch.cat([captions, torch.randn(WORDS, 12, generator=g)])

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        found = self.image[images[:, 0].long()]
        return F.normalize(found, dim=1) if normalize else found

    def encode_text(self, texts: Tensor, normalize: bool = False) -> Tensor:
        found = self.text[texts[:, 0]]
        return F.normalize(found, dim=1) if normalize else found


def tokenize(texts: list[str]) -> Tensor:
    first = IMAGES * CAPTIONS
    return torch.tensor(
        [[int(x) if x.isdigit() else first + zlib.crc32(x.encode()) % WORDS] for x in texts]
    )


def captions_of(image: int) -> list[str]:
    return [str(CAPTIONS * image + i) for i in range(CAPTIONS)]


class Labelled:
    """Images in batches of 16, of classes of different sizes, as CLIP_benchmark wants them."""

    def __init__(self) -> None:
        self.names, self.dataset = CLASSES, SimpleNamespace(classes=CLASSES)
        self.labels = torch.tensor([int(6 * (i / IMAGES) ** 2) for i in range(IMAGES)])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        images = torch.arange(float(IMAGES))[:, None].expand(IMAGES, 3)
        yield from zip(torch.split(images, size), torch.split(self.labels, size), strict=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches(16)


class Rows(Shared):
    """Rows of the tables, as a data set for our measures."""

    def __init__(self, second: list[Tensor]) -> None:
        self.names, self.second = CLASSES, second

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i, second in self.mine(list(enumerate(self.second))):
            yield torch.full((3,), float(i)), second


MODEL = Model("", Tables(), lambda image: torch.zeros(3), tokenize, torch.device("cpu"))


def test_clip_benchmark_gives_the_same_recalls() -> None:
    samples = Rows([tokenize(captions_of(i)) for i in range(IMAGES)])
    pairs = encode_pairs(MODEL, samples, Reading(16))
    ours = retrieval(pairs.images, pairs.texts, pairs.image_of_text)
    ways = {"text": "image_to_text", "image": "text_to_image"}
    renamed = {
        f"{theirs}_retrieval_recall@{k}": ours[f"{way}_R@{k}"]
        for (theirs, way), k in itertools.product(ways.items(), (1, 5, 10))
    }
    assert renamed == pytest.approx(RETRIEVAL, abs=1e-6)


def test_clip_benchmark_gives_the_same_accuracies() -> None:
    """With the templates that both have, of the same eighty sentences."""
    data: Any = Rows(list(Labelled().labels))
    ours = zero_shot(MODEL, data, Reading(16))
    names = ("zeroshot-top1", "zeroshot-top5", "zeroshot-mean-class-recall")
    assert [ours[name] for name in names] == pytest.approx(list(CLASSIFICATION.values()), abs=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("clip_benchmark") is None, reason="CLIP_benchmark is not installed"
)
def test_the_recorded_numbers_are_clip_benchmarks() -> None:
    import clip_benchmark
    from clip_benchmark.metrics import zeroshot_classification as theirs
    from clip_benchmark.metrics import zeroshot_retrieval

    data, model = Labelled(), Tables()
    loader = [(x, [captions_of(int(i)) for i in x[:, 0]]) for x, _ in data.batches(16)]
    recalls = zeroshot_retrieval.evaluate(
        model, loader, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    assert recalls == pytest.approx(RETRIEVAL, abs=1e-6)
    file = (
        Path(clip_benchmark.__file__).parent / "datasets/en_zeroshot_classification_templates.json"
    )
    templates = json.loads(file.read_text())["imagenet1k"]
    classifier = theirs.zero_shot_classifier(model, tokenize, CLASSES, templates, "cpu", amp=False)
    logits, labels = theirs.run_classification(model, classifier, data, "cpu", amp=False)
    hits = logits.topk(5).indices == labels[:, None]  # its own count fails with NumPy 2.4
    measured = {
        "acc1": float(hits[:, 0].double().mean()),
        "acc5": float(hits.any(1).double().mean()),
        "mean_per_class_recall": theirs.balanced_accuracy_score(labels, logits.argmax(1)),
    }
    assert measured == pytest.approx(CLASSIFICATION, abs=1e-6)
