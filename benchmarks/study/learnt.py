"""Transitions and gates of a trained model, looked at on held-out scenes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.planted import transition_terms
from examples.demo.captions import caption
from examples.demo.scenes import ATTRIBUTES, Scene
from rankloss import DinoRankCLIP, TransitionHeads, plackett_luce_nll, rankings

PLACES = (1, 2, 4, 8, 16, 32, 64)
"""Ends of the ranges of places between which the gain of likelihood is told."""
SLICE_AFTER = "red"
"""Candidate taken before the last one, in the picture of gamma."""


@torch.no_grad()
def likelihood(
    images: Tensor, texts: Tensor, scale: float, heads: Sequence[TransitionHeads], batch: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Measure the cross-modal ranking loss of (N, D) unit-norm pairs, in batches as in training.

    Returns:
        "ranking_nll", in nats a place, of the model with its transitions, and from order 2 on
        "ranking_gain", by how much it is less than with the scores alone, and "offset_gain", the
        same with the mean over candidates in the place of every predecessor. Then the curve:
        "places", and "gain", that of the places after the end before, up to this one.
    """
    size = min(batch, len(images))
    ends = sorted({min(k, size) for k in (*PLACES, size)})
    totals = torch.zeros(3, len(ends), dtype=torch.float64)
    count = 0
    for start in range(0, len(images) - size + 1, size):
        pair = images[start : start + size], texts[start : start + size]
        totals += _cumulative(*pair, scale, heads, ends)
        count += 2 * size
    with_transitions, alone, offset = totals / count
    numbers = {"ranking_nll": float(with_transitions[-1]) / size}
    if not heads:
        return numbers, {}
    gain = alone - with_transitions
    numbers["ranking_gain"] = float(gain[-1]) / size
    numbers["offset_gain"] = float(alone[-1] - offset[-1]) / size
    lengths = torch.tensor(ends).diff(prepend=torch.zeros(1, dtype=torch.long))
    by_place = gain.diff(prepend=torch.zeros(1, dtype=torch.float64)) / lengths
    return numbers, {"places": [float(k) for k in ends], "gain": by_place.tolist()}


def _cumulative(
    images: Tensor, texts: Tensor, scale: float, heads: Sequence[TransitionHeads], ends: list[int]
) -> Tensor:
    """Sum over anchors the loss of the first k places, (3, ends): with transitions, without, and
    with the mean predecessor; without heads these are equal."""
    scores = scale * images @ texts.T
    totals = torch.zeros(3, len(ends), dtype=torch.float64)
    sides = ((scores, scores.T, texts, -1), (scores.T.contiguous(), scores, images, 0))
    for own, target, candidates, which in sides:
        tables = mean = None
        if heads:
            tables = heads[which](candidates)
            average = tables.predecessors.mean(1, keepdim=True)
            mean = tables._replace(predecessors=average.expand_as(tables.predecessors).contiguous())
        ranking = rankings(target)
        for column, k in enumerate(ends):
            for row, used in enumerate((tables, None, mean)):
                nll = plackett_luce_nll(own, ranking[:, :k], used, reduction="sum")
                totals[row, column] += k * nll.double()
    return totals


@torch.no_grad()
def slices(classes: dict[str, Tensor], heads: TransitionHeads) -> dict[str, Any]:
    """Tabulate beta and a slice of gamma over words, from zero-shot class embeddings (C, D).

    Returns:
        "words"; "beta": row a, just taken, column d; "gamma": the same with `SLICE_AFTER` taken
        before a; entries in logits.
    """
    words = [word for name in ATTRIBUTES for word in ATTRIBUTES[name]]
    embeddings = torch.cat([classes[f"classes_{name}"] for name in ATTRIBUTES])
    terms = transition_terms(heads(embeddings))
    found: dict[str, Any] = {"words": words, "beta": _rounded(terms[0])}
    if len(terms) > 1:
        found["gamma"] = _rounded(terms[1][:, words.index(SLICE_AFTER)])
    return found


def offset_share(table: list[list[float]]) -> float:
    """Return the share of a transition table's variance that is an offset of each candidate.

    Rows (what was taken) are centred first, for a constant changes no likelihood: 1 says that what
    was taken does not matter, 0 that candidates have no offset in common.
    """
    rows = torch.tensor(table, dtype=torch.float64)
    rows = rows - rows.mean(1, keepdim=True)
    whole = rows.square().mean()
    return float(rows.mean(0).square().mean() / whole) if whole else 1.0


def _rounded(table: Tensor) -> list[list[float]]:
    return [[round(x, 4) for x in row] for row in table.tolist()]


@torch.no_grad()
def gates(
    towers: DinoRankCLIP, scenes: Sequence[Scene], tokenize: Callable[[list[str]], Tensor]
) -> dict[str, float]:
    """Measure the mean text gate on full captions of scenes and on bare ones, and the difference.

    Returns:
        "gate_full", "gate_bare" and "gate_difference"; nothing for models without a text gate.
    """
    block = None if towers.injection is None else towers.injection.text
    if block is None or block.gate is None:
        return {}
    means = {}
    for name, omit in (("full", 0.0), ("bare", 1.0)):
        captions = [caption(s, random.Random(f"gate/{i}"), omit) for i, s in enumerate(scenes)]
        means[name] = float(_text_gate(towers, tokenize(captions)).mean())
    difference = means["full"] - means["bare"]
    return {
        **{f"gate_{name}": value for name, value in means.items()},
        "gate_difference": difference,
    }


def _text_gate(towers: DinoRankCLIP, texts: Tensor) -> Tensor:
    """Return the gate (N, D) of tokens (N, L)."""
    model: Any = towers.model
    student: Any = towers.student
    injection: Any = towers.injection
    values = []
    for part in torch.split(texts, 256):
        embedding = F.normalize(model.encode_text(part), dim=1)
        tokens = student(None, part)
        fused = injection.text(embedding, tokens.text, mask=tokens.text_mask)
        values.append(fused.gate)
    return torch.cat(values)
