"""PlackettLuceLoss: graded labels, padding, ties, weights; against all orders written out."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rankloss.reranking import PlaceWeights, PlackettLuceLoss, Ties

PAD = -100


def lists(m: int = 6, n: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    scores = scale * torch.randn(n, m, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (n, m), generator=generator)
    labels[1, -2:] = PAD
    labels[2, 0] = PAD
    return scores, labels


def spelled_out(scores: list[float], labels: list[int], w: list[float]) -> float:
    """The definition: groups by label, each the sum over its orders of products of softmaxes."""
    left = [i for i, label in enumerate(labels) if label != PAD]
    total = place = 0.0
    used = sum(w[: len(left)])
    for label in sorted({labels[i] for i in left}, reverse=True):
        group = [i for i in left if labels[i] == label]
        p = 0.0
        for order in itertools.permutations(group):
            rest, one = list(left), 1.0
            for i in order:
                one *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in rest)
                rest.remove(i)
            p += one
        places = w[int(place) : int(place) + len(group)]
        total -= sum(places) / len(places) * math.log(p)
        place += len(group)
        left = [i for i in left if i not in group]
    return total / used if used else 0.0


WEIGHTS: list[tuple[PlaceWeights, Callable[[int], float]]] = [
    ("none", lambda k: 1.0),
    ("log", lambda k: 1 / math.log(k + 1)),
    (torch.tensor([3.0, 1.0]), lambda k: [3.0, 1.0, 0, 0, 0, 0][k - 1]),
    (lambda k: 2.0**-k, lambda k: 2.0**-k),
]


@pytest.mark.parametrize(("place_weights", "w"), WEIGHTS, ids=["none", "log", "tensor", "function"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_exact_ties(
    place_weights: PlaceWeights, w: Callable[[int], float], top_k: int | None
) -> None:
    scores, labels = lists()
    loss = PlackettLuceLoss(place_weights=place_weights, top_k=top_k, reduction="none")
    weights = [w(k) * (top_k is None or k <= top_k) for k in range(1, 7)]
    expected = [
        spelled_out(*x, weights) for x in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    actual = loss(scores, labels)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.1, 30.0, 100.0])
@pytest.mark.parametrize("tie", [2, 7, 60])
def test_tie_of_equal_scores_is_a_known_product(dtype: torch.dtype, scale: float, tie: int) -> None:
    """g documents of score a before a rest of weight exp(b): sum of log((i + exp(b - a)) / i)."""
    for lead in (-scale, scale):
        scores = torch.zeros(1, tie + 1, dtype=dtype)
        scores[0, :tie] = lead
        labels = torch.ones(1, tie + 1)
        labels[0, tie] = 0
        exact = sum(math.log1p(math.exp(-lead) / i) for i in range(1, tie + 1)) / (tie + 1)
        value = PlackettLuceLoss()(scores, labels).item()
        eps = torch.finfo(dtype).eps
        assert abs(value - exact) <= 64 * eps * max(1.0, exact), (lead, value, exact)


@pytest.mark.parametrize("ties", ["exact", "random"])
def test_gradients(ties: Ties) -> None:
    scores, labels = lists()
    loss = PlackettLuceLoss(ties=ties, place_weights="log")

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        result: Tensor = loss(x, labels)
        return result

    assert torch.autograd.gradcheck(value, scores.requires_grad_())


def test_without_ties_both_are_list_mle() -> None:
    scores, _ = lists()
    labels = torch.rand(scores.shape).argsort(1)
    exact, drawn = (PlackettLuceLoss(ties=t)(scores, labels) for t in ("exact", "random"))
    ranked = scores.gather(1, labels.argsort(1, descending=True))
    plain = (ranked.flip(1).logcumsumexp(1).flip(1) - ranked).mean()
    torch.testing.assert_close(exact, plain)
    torch.testing.assert_close(drawn, plain)


def test_random_ties_are_new_orders_whose_likelihoods_add_up() -> None:
    scores, labels = torch.tensor([[0.3, -0.2, 0.1, 0.5]]), torch.tensor([[1, 1, 1, 0]])
    loss = PlackettLuceLoss(ties="random")
    values = {round(loss(scores, labels).item(), 6) for _ in range(100)}
    assert len(values) == 6
    total = sum(math.exp(-4 * x) for x in values)
    assert math.isclose(
        -math.log(total) / 4, PlackettLuceLoss()(scores, labels).item(), rel_tol=1e-4
    )


@pytest.mark.parametrize("ties", ["exact", "random"])
def test_padding_is_as_if_absent(ties: Ties) -> None:
    scores = torch.tensor([[1.0, 9e4, 2.0, 0.5]], requires_grad=True)
    labels = torch.tensor([[2, PAD, 1, 0]])
    short = PlackettLuceLoss(ties=ties)(scores[:, [0, 2, 3]], torch.tensor([[2, 1, 0]]))
    padded = PlackettLuceLoss(ties=ties)(scores, labels)
    masked = PlackettLuceLoss(ties=ties)(scores, labels.clamp(min=0), mask=labels != PAD)
    torch.testing.assert_close(padded, short)
    torch.testing.assert_close(masked, short)
    (gradient,) = torch.autograd.grad(padded, scores)
    assert gradient[0, 1] == 0
    assert gradient[0, 0] < 0 < gradient[0, 3]


@pytest.mark.parametrize("ties", ["exact", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_to_rank_is_zero(ties: Ties, dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 1], [1, PAD], [PAD, PAD]])  # all tied, one document, none
    value = PlackettLuceLoss(ties=ties, reduction="none")(scores, labels)
    assert value.isfinite().all()
    assert (value[1:] == 0).all()
    if ties == "exact":
        assert value[0] == 0
    value.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_list_weights() -> None:
    scores, labels = lists()
    each = PlackettLuceLoss(reduction="none")(scores, labels)
    w = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        PlackettLuceLoss()(scores, labels, list_weights=w), each @ w / w.sum()
    )
    total = PlackettLuceLoss(reduction="sum")(scores, labels, list_weights=w)
    torch.testing.assert_close(total, each @ w)


def test_chunks_of_lists_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = lists(n=7)
    whole = PlackettLuceLoss()(scores, labels)
    monkeypatch.setattr("rankloss.reranking.CHUNK", 1)
    torch.testing.assert_close(PlackettLuceLoss()(scores, labels), whole)


@pytest.mark.parametrize(
    ("scores", "labels", "keywords", "error", "message"),
    [
        (torch.ones(2, 3).long(), torch.ones(2, 3), {}, TypeError, "floating point"),
        (torch.ones(2, 3), torch.ones(2, 4), {}, ValueError, r"\(2, 3\) and \(2, 4\)"),
        (torch.ones(2, 3), torch.ones(2, 3), {"mask": torch.ones(2, 3)}, TypeError, "mask"),
        (torch.ones(2, 3), torch.ones(2, 3), {"list_weights": torch.ones(3)}, ValueError, "list_w"),
    ],
)
def test_errors(
    scores: Tensor,
    labels: Tensor,
    keywords: dict[str, Tensor],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        PlackettLuceLoss()(scores, labels, **keywords)


@pytest.mark.parametrize(
    "options", [{"ties": "first"}, {"place_weights": "linear"}, {"top_k": 0}, {"reduction": "max"}]
)
def test_unknown_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"choose|at least 1"):
        PlackettLuceLoss(**options)  # type: ignore[arg-type]
