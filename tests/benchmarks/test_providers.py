"""Every provider computes the loss it is timed for."""

from dataclasses import replace

import pytest
import torch

from benchmarks import check, targets
from benchmarks.cases import AnyCase, Case, GramCase, cases, square_case, wide_case
from benchmarks.check import Outcome, errors, outcome, truth
from benchmarks.providers import BY_REQUEST, PROVIDERS, Provider, Unavailable

SMALL: list[AnyCase] = [
    Case(0, 9, 1, 9),
    Case(1, 12, 12, 12),
    Case(1, 5, 3, 11),
    Case(2, 6, 9, 9, r=4),
    Case(3, 12, 12, 12, r=8),
    Case(3, 5, 3, 11, r=4),
    Case(4, 4, 7, 9, r=4),
    Case(3, 4, 1, 6, r=4),  # a single place has no predecessor
    GramCase(3, 10, 4, 6),
]
UNCOMPILED = [p for p in (*PROVIDERS, *BY_REQUEST) if not p.compiles]
PAIRS = [
    pytest.param(provider, case, id=f"{provider.name}, {case.name}")
    for provider in UNCOMPILED
    for case in SMALL
    if provider.takes(case)
]


def answer(provider: Provider, case: AnyCase) -> Outcome:
    inputs = case.inputs()
    try:
        loss = provider.build(case, inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    return outcome(loss(), inputs.leaves)


@pytest.mark.parametrize(("provider", "case"), PAIRS)
def test_value_and_gradients_agree_with_the_definition(provider: Provider, case: AnyCase) -> None:
    found = errors(answer(provider, case), truth(case))
    assert found.value < 1e-5
    assert found.gradient < 1e-5


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_truth_does_not_depend_on_its_chunks(
    case: AnyCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = truth(case)
    monkeypatch.setattr(check, "CHUNK_SCORES", 2 * case.scores // case.n)
    found = errors(truth(case), whole)
    assert found.value < 1e-13
    assert found.gradient < 1e-13


@pytest.mark.parametrize("spoiled", [1.001, float("nan"), float("inf")])
def test_a_wrong_value_or_gradient_is_unacceptable(spoiled: float) -> None:
    expected = truth(square_case(3, 8))
    assert errors(expected, expected).acceptable()
    assert not errors(replace(expected, value=expected.value * spoiled), expected).acceptable()
    for name, exact in expected.gradients.items():
        gradients = expected.gradients | {name: exact * spoiled}
        assert not errors(replace(expected, gradients=gradients), expected).acceptable()


def test_inputs_are_seeded_and_fewer_anchors_are_the_first_ones() -> None:
    case = square_case(3, 16, seed=3)
    whole, again, fewer = (c.inputs() for c in (case, case, case.with_at_most(4 * 16 * 16)))
    for name, leaf in whole.leaves.items():
        assert torch.equal(leaf, again.leaves[name])
    assert torch.equal(fewer.leaves["scores"], whole.leaves["scores"][:4])
    assert torch.equal(fewer.leaves["keys"], whole.leaves["keys"])
    assert whole.leaves["predecessors"].shape == (3, 16, 32)
    other = square_case(3, 16, seed=4).inputs()
    assert not torch.equal(whole.leaves["scores"], other.leaves["scores"])


def test_the_default_cases_are_the_promised_ones() -> None:
    chosen = cases([0, 1, 3], [128, 256, 512, 1024], wide=True)
    assert len(chosen) == len({case.name for case in chosen}) == 15
    assert (wide_case(3).k, wide_case(3).m) == (64, 4096)
    assert square_case(3, 512).scores == 512**3
    assert GramCase().name == targets.GRAM
