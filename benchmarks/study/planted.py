"""Planted orders: rankings drawn from a process of known order, and models of all orders fitted."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.questions import FITTED_ORDERS
from benchmarks.study.settings import Planted
from rankloss import TransitionHeads, Transitions, plackett_luce_nll
from rankloss.distributions import PlackettLuce

LEARNING_RATE = 0.03
EVERY = 5
"""Steps between two looks at the lists that choose when to stop."""


class RankingModel(nn.Module):
    """Scores w^T h_d of the candidates, and from order 2 on transition terms.

    Args:
        dim, order, width: D, R and r of `rankloss.TransitionHeads`.
        generator: draws the heads.
    """

    def __init__(self, dim: int, order: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.heads: nn.Module | None = None
        if order > 1:
            self.heads = TransitionHeads(dim, order, width, generator=generator)

    def forward(self, candidates: Tensor) -> tuple[Tensor, Transitions | None]:
        """Return scores (M,) and tables of candidates (M, D)."""
        tables = None if self.heads is None else self.heads(candidates)
        return candidates @ self.weight, tables

    def nll(self, candidates: Tensor, ranking: Tensor) -> Tensor:
        """Return the mean loss of rankings (N, K), in nats a place."""
        scores, tables = self(candidates)
        return plackett_luce_nll(scores.expand(len(ranking), -1), ranking, tables)


def measure_planted(settings: Planted, seed: int) -> dict[str, float]:
    """Draw lists from a planted process, fit every order, and measure on held-out lists."""
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.candidates, settings.dim)
    candidates = F.normalize(torch.randn(shape, generator=generator), dim=1)
    truth = planted_model(settings, candidates, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = draw(truth, candidates, settings.lists + settings.held_out, settings.places)
    choosing = max(1, settings.lists // 5)
    sizes = [choosing, settings.lists - choosing, settings.held_out]
    stopping, training, held_out = torch.split(drawn, sizes)
    losses = {}
    for order in FITTED_ORDERS:
        model = RankingModel(settings.dim, order, settings.width, generator)
        fit(model, candidates, training, stopping, settings.steps)
        with torch.no_grad():
            losses[order] = float(model.nll(candidates, held_out))
    return {**_summary(losses, settings.order), **_references(truth, candidates, held_out)}


def planted_model(
    settings: Planted, candidates: Tensor, generator: torch.Generator
) -> RankingModel:
    """Return a process whose scores and each transition term have root mean square `strength`."""
    model = RankingModel(settings.dim, settings.order, settings.width, generator)
    model.requires_grad_(False)
    model.weight.copy_(torch.randn(settings.dim, generator=generator))
    model.weight.mul_(settings.strength / (candidates @ model.weight).square().mean().sqrt())
    if model.heads is not None:
        keys = model.heads.get_parameter("key_weight")
        keys.copy_(torch.randn(keys.shape, generator=generator))
        for m, term in enumerate(transition_terms(model.heads(candidates)), start=1):
            keys[m - 1].mul_(settings.strength / term.square().mean().sqrt())
    return model


def transition_terms(tables: Transitions) -> list[Tensor]:
    """Return tau_m(a_1, ..., a_m; d) of all candidates for each m: (M,) * m + (M,), a_1 first."""
    terms = []
    for m, keys in enumerate(tables.keys, start=1):
        first = m * (m - 1) // 2
        product = tables.predecessors[first]  # (M, r)
        for j in range(1, m):
            product = product.unsqueeze(-2) * tables.predecessors[first + j]
        terms.append(product @ keys.T)
    return terms


def draw(model: RankingModel, candidates: Tensor, count: int, places: int) -> Tensor:
    """Draw rankings, (count, places), with torch's global generator."""
    with torch.no_grad():
        scores, tables = model(candidates)
        return PlackettLuce(scores, tables, top_k=places).sample(count)


def fit(
    model: RankingModel, candidates: Tensor, training: Tensor, stopping: Tensor, steps: int
) -> None:
    """Minimise the loss of `training`; keep the weights with the least loss of `stopping`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    least, kept = float("inf"), copy.deepcopy(model.state_dict())
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                loss = float(model.nll(candidates, stopping))
            if loss < least:
                least, kept = loss, copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        torch.autograd.backward(model.nll(candidates, training))
        optimizer.step()
    model.load_state_dict(kept)


def _summary(losses: dict[int, float], planted: int) -> dict[str, float]:
    found: dict[str, float] = {f"nll_{order}": loss for order, loss in losses.items()}
    found["recovered"] = float(planted == min(losses, key=lambda order: losses[order]))
    for name, order in (("excess_below", planted - 1), ("excess_above", planted + 1)):
        if order in losses:
            found[name] = losses[order] - losses[planted]
    return found


def _references(truth: RankingModel, candidates: Tensor, held_out: Tensor) -> dict[str, float]:
    """Return the losses of the planted process itself, and of rankings at random."""
    uniform = plackett_luce_nll(torch.zeros(len(held_out), len(candidates)), held_out)
    return {"nll_true": float(truth.nll(candidates, held_out)), "nll_uniform": float(uniform)}
