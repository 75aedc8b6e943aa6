"""Bad input: the kind of error and what it tells the user."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss import (
    ClipLoss,
    HighOrderPLLoss,
    RankCLIPLoss,
    TransitionHeads,
    Transitions,
    plackett_luce_nll,
    rankings,
)
from tests.helpers.features import features
from tests.helpers.problems import each_implementation

SCORES = torch.randn(2, 4)
RANKING = torch.tensor([[0, 1, 2], [3, 2, 1]])
TABLES = Transitions(torch.randn(1, 4, 5), torch.randn(1, 4, 5))
NAN, INF = SCORES.clone(), SCORES.clone()
NAN[1, 2], INF[0, 3] = torch.nan, -torch.inf


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def each(table: dict[type[Exception], dict[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    """Parametrise over what is told, the kind of error, and the arguments that are bad."""
    rows = [(text, error, bad) for error, rows in table.items() for text, bad in rows.items()]
    return pytest.mark.parametrize(("text", "error", "bad"), rows, ids=[row[0] for row in rows])


LIKELIHOOD: dict[type[Exception], dict[str, dict[str, Any]]] = {
    TypeError: {
        "scores must be floating point, got": {"scores": SCORES.long()},
        "must hold integer ids, got": {"ranking": RANKING.float()},
        "integer ids, got torch.bool": {"ranking": RANKING.bool()},
        "integer ids": {"ranking": RANKING.to(torch.cfloat)},
        "transitions.keys must be floating point, got torch.int64": {
            "transitions": Transitions(TABLES[0], TABLES[1].long())
        },
        "mask must be bool (True keeps)": {"mask": torch.ones(2, 4)},
    },
    ValueError: {
        "scores must be (N, M), got (4,)": {"scores": SCORES[0], "ranking": RANKING[0]},
        "scores must be (N, M), got (1, 2": {"scores": SCORES[None]},
        "ranking must be (N=2, K) with 1": {"ranking": RANKING[0]},
        "ranking must be (N=2, K)": {"ranking": RANKING[:1]},
        "1 <= K <= M=4 for scores (2, 4), got (2, 5)": {
            "ranking": ids([0, 1, 2, 3, 0], [0, 1, 2, 3, 0])
        },
        "1 <= K <= M=4": {"ranking": RANKING[:, :0]},
        "holds id 4, outside [0, M=4)": {"ranking": ids([0, 1], [2, 4])},
        "holds id -1, outside [0, M=4)": {"ranking": ids([0, -1], [2, 3])},
        "row 1 of ranking holds candidate 2 more than once": {"ranking": ids([0, 1], [2, 2])},
        "scores are on cpu but ranking on meta; move them to one device": {
            "ranking": RANKING.to("meta")
        },
        "transitions.keys must be (R-1, M=4, r) with R >= 2, got (4, 5)": {
            "transitions": Transitions(TABLES[0], TABLES[1][0])
        },
        "transitions.keys must be (R-1, M=4, r)": {
            "transitions": Transitions(TABLES[0][:, :3], TABLES[1][:, :3])
        },
        "pass transitions=None for order 1": {
            "transitions": Transitions(TABLES[0][:0], TABLES[1][:0])
        },
        "transitions.predecessors must be (R(R-1)/2, M, r) = (3, 4, 5) for keys (2, 4, 5), got": {
            "transitions": Transitions(TABLES[0].expand(2, 4, 5), TABLES[1].expand(2, 4, 5))
        },
        "= (1, 4, 5) for keys (1, 4, 5), got (1, 4, 4)": {
            "transitions": Transitions(TABLES[0][..., :4], TABLES[1])
        },
        "got (1, 3, 5)": {"transitions": Transitions(TABLES[0][:, :3], TABLES[1])},
        "scores are on cpu but transitions.predecessors on meta": {
            "transitions": Transitions(TABLES[0].to("meta"), TABLES[1])
        },
        "mask must be (N, M) = (2, 4) or (M,), got (2, 3)": {
            "mask": torch.ones(2, 3, dtype=torch.bool)
        },
        "or (M,), got (2,)": {"mask": torch.ones(2, dtype=torch.bool)},
        "scores are on cpu but mask on meta": {
            "mask": torch.ones(4, dtype=torch.bool, device="meta")
        },
        "unknown discount 'dcg'; choose one of ['none', 'log']": {"discount": "dcg"},
        "unknown reduction 'max'; choose one of ['mean', 'sum', 'none']": {"reduction": "max"},
        "unknown impl 'cuda'; choose 'auto' or one of": {"impl": "cuda"},
        "scores[1, 2] is nan": {"scores": NAN, "validate": True},
        "scores[0, 3] is -inf": {"scores": INF, "validate": True},
    },
}


@each(LIKELIHOOD)
def test_likelihood(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    good: dict[str, Any] = {"scores": SCORES, "ranking": RANKING}
    plackett_luce_nll(**good)
    with pytest.raises(error, match=re.escape(text)) as raised:
        plackett_luce_nll(**(good | bad))
    assert "impl" in text or "unknown" in text or "plackett_luce_nll: " in str(raised.value)


@pytest.mark.parametrize("bad", [NAN, INF], ids=["NaN", "infinite"])
def test_scores_are_checked_when_asked_or_when_hunting_anomalies(bad: Tensor) -> None:
    plackett_luce_nll(bad, RANKING)
    with torch.autograd.set_detect_anomaly(True):
        with pytest.raises(ValueError, match=r"scores\[\d, \d\] is"):
            plackett_luce_nll(bad, RANKING)
        plackett_luce_nll(bad, RANKING, validate=False)
    kept = bad.isfinite()
    assert plackett_luce_nll(bad, RANKING, mask=kept, validate=True).isfinite()


def test_ranking_is_not_checked_when_asked_not_to_be() -> None:
    """A repeated id costs nothing but a wrong value; the check is what it says."""
    repeated = ids([0, 0], [2, 2])
    plackett_luce_nll(SCORES, repeated, validate=False)
    with pytest.raises(ValueError, match="more than once"):
        plackett_luce_nll(SCORES, repeated)


@each_implementation
def test_one_bad_row_does_not_spoil_the_others(impl: str) -> None:
    rows = plackett_luce_nll(NAN, RANKING, reduction="none", impl=impl)
    assert rows[0].isfinite()
    assert rows[1].isnan()


@pytest.mark.parametrize(
    ("scores", "top_k", "error", "text"),
    [
        (
            SCORES.long(),
            None,
            TypeError,
            "rankings: scores must be floating point, got torch.int64",
        ),
        (SCORES[0], None, ValueError, "rankings: scores must be (N, M), got (4,)"),
        (SCORES, 0, ValueError, "rankings: top_k must be at least 1, got 0; None ranks everything"),
        (SCORES, -1, ValueError, "rankings: top_k must be at least 1, got -1"),
    ],
    ids=["integer scores", "rank 1", "top_k 0", "negative top_k"],
)
def test_rankings(scores: Tensor, top_k: int | None, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        rankings(scores, top_k)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"order": -1}, "order must be 0 or more, got -1"),
        ({"order": 2}, "order 2 needs embed_dim, the width of the features"),
        (
            {"order": 2, "embed_dim": 8, "cross_modal_weight": 0, "in_modal_weight": 0},
            "order 2 with both ranking weights 0 ranks nothing; use order=0",
        ),
        ({"order": 1, "top_k": 0}, "top_k must be at least 1, got 0; None ranks everything"),
        ({"order": 1, "top_k": -3}, "top_k must be at least 1, got -3"),
        ({"order": 1, "discount": "dcg"}, "unknown discount 'dcg'"),
        ({"order": 1, "impl": "cuda"}, "unknown impl 'cuda'; choose 'auto' or one of ["),
        ({"order": 2, "embed_dim": 8, "top_k": 1}, "top_k=1 has no transitions"),
        ({"order": 1, "in_modal_weight": -1}, "in_modal_weight must be finite and not negative"),
        ({"order": 1, "cross_modal_weight": math.nan}, "cross_modal_weight must be finite"),
        ({"order": 0, "contrastive_weight": math.inf}, "contrastive_weight must be finite"),
        ({"order": 0, "contrastive_weight": 0}, "every weight that counts at order 0 is 0"),
        (
            {
                "order": 1,
                "contrastive_weight": 0,
                "cross_modal_weight": 0,
                "in_modal_weight": 0,
            },
            "every weight that counts at order 1 is 0",
        ),
        ({"order": 2, "embed_dim": 0}, "embed_dim and transition_dim must be positive, got 0 and"),
        ({"order": 2, "embed_dim": 8, "transition_dim": 0}, "must be positive, got 8 and 0"),
        ({"order": 2, "embed_dim": 8, "transition_dim": 1}, "transition_dim 1 leaves nothing to"),
    ],
    ids=lambda x: ", ".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        HighOrderPLLoss(**settings)


def test_named_members_take_what_concerns_them() -> None:
    """And hand it on; an option that would do nothing is refused as Python refuses it."""
    loss = RankCLIPLoss(top_k=2, in_modal_weight=0.5, impl="reference", local_loss=False)
    assert (loss.order, loss.top_k, loss.in_modal_weight) == (1, 2, 0.5)
    assert (loss.impl, loss.local_loss) == ("reference", False)
    assert not ClipLoss(contrastive_weight=2.0, keep_stats=False).keep_stats
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        RankCLIPLoss(impl="cuda")
    members: list[tuple[Any, str]] = [
        (RankCLIPLoss, "transition_dim"),
        (ClipLoss, "top_k"),
        (ClipLoss, "order"),
    ]
    for make, option in members:
        text = f"{make.__name__} got an unexpected keyword argument '{option}'"
        with pytest.raises(TypeError, match=text):
            make(**{option: 1})


def test_transition_heads() -> None:
    with pytest.raises(ValueError, match="order 1 has no transitions; use order >= 2"):
        TransitionHeads(8, 1)
    heads = TransitionHeads(8, 2)
    for shape in ((5, 7), (8,), (1, 5, 8)):
        with pytest.raises(ValueError, match=re.escape(f"{shape}, expected (M, embed_dim=8)")):
            heads(torch.randn(shape))


def test_a_loss_left_on_another_device() -> None:
    pair = [x.to("meta") for x in features(3, dtype=torch.float32)]
    for progress in (0.0, 1.0):
        loss = HighOrderPLLoss(8, 2)
        loss.set_progress(progress)
        with pytest.raises(ValueError, match=r"features are on meta but .* loss on cpu") as raised:
            loss(*pair, torch.tensor(10.0, device="meta"))
        assert "loss.to('meta')" in str(raised.value)
        loss.to("meta")(*pair, torch.tensor(10.0, device="meta"))


IMAGE, TEXT = features(3, grad=False)
FEATURES: dict[type[Exception], dict[str, dict[str, Any]]] = {
    TypeError: {
        "features must be floating point, got torch.int64 and torch.float64": {
            "image_features": IMAGE.long()
        },
        "image_ids must be integers, got torch.float32": {"image_ids": torch.ones(3)},
        "text_ids must be integers, got torch.bool": {"text_ids": torch.ones(3, dtype=torch.bool)},
    },
    ValueError: {
        "features must both be (n, D)": {"image_features": IMAGE[0]},
        "features must both be (n, D), one row a pair; got image_features (1, 3, 8)": {
            "image_features": IMAGE[None],
            "text_features": TEXT[None],
        },
        "got image_features (3, 8) and text_features (2, 8)": {"text_features": TEXT[:2]},
        "and text_features (3, 7)": {"text_features": TEXT[:, :7]},
        "loss was built with embed_dim=8, got image_features (3, 7)": {
            "image_features": IMAGE[:, :7],
            "text_features": TEXT[:, :7],
        },
        "image_features are on cpu but text_features on meta; move them to one device": {
            "text_features": TEXT.to("meta")
        },
        "logit_scale must be 0-D or (1,) on cpu, got (2,) on cpu": {"logit_scale": torch.ones(2)},
        "logit_scale must be 0-D or (1,) on cpu, got () on meta": {
            "logit_scale": torch.ones((), device="meta")
        },
        "logit_bias must be 0-D or (1,)": {"logit_bias": torch.ones(2)},
        "text_ids must be (3,) on cpu, got (2,) on cpu": {"text_ids": torch.arange(2)},
        "image_ids must be (3,) on cpu, got (3,) on meta": {
            "image_ids": torch.arange(3, device="meta")
        },
    },
}


@each(FEATURES)
def test_features(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    good: dict[str, Any] = {"image_features": IMAGE, "text_features": TEXT, "logit_scale": 10.0}
    loss = HighOrderPLLoss(8, 2).double()
    loss(**good)
    with pytest.raises(error, match=re.escape(text)):
        loss(**(good | bad))


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress(progress: float) -> None:
    with pytest.raises(ValueError, match=r"set_progress: progress must be in \[0, 1\], got"):
        RankCLIPLoss().set_progress(progress)
