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


LIKELIHOOD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer scores": ({"scores": SCORES.long()}, TypeError, "scores must be floating point, got"),
    "scores of rank 1": (
        {"scores": SCORES[0], "ranking": RANKING[0]},
        ValueError,
        "scores must be (N, M), got (4,)",
    ),
    "scores of rank 3": ({"scores": SCORES[None]}, ValueError, "scores must be (N, M), got (1, 2"),
    "ranking of rank 1": ({"ranking": RANKING[0]}, ValueError, "ranking must be (N=2, K) with 1"),
    "other N": ({"ranking": RANKING[:1]}, ValueError, "ranking must be (N=2, K)"),
    "K > M": (
        {"ranking": ids([0, 1, 2, 3, 0], [0, 1, 2, 3, 0])},
        ValueError,
        "1 <= K <= M=4 for scores (2, 4), got (2, 5)",
    ),
    "K = 0": ({"ranking": RANKING[:, :0]}, ValueError, "1 <= K <= M=4"),
    "floating ranking": ({"ranking": RANKING.float()}, TypeError, "must hold integer ids, got"),
    "bool ranking": ({"ranking": RANKING.bool()}, TypeError, "integer ids, got torch.bool"),
    "complex ranking": ({"ranking": RANKING.to(torch.cfloat)}, TypeError, "integer ids"),
    "id too large": ({"ranking": ids([0, 1], [2, 4])}, ValueError, "holds id 4, outside [0, M=4)"),
    "negative id": ({"ranking": ids([0, -1], [2, 3])}, ValueError, "holds id -1, outside [0, M=4)"),
    "repeated id": (
        {"ranking": ids([0, 1], [2, 2])},
        ValueError,
        "row 1 of ranking holds candidate 2 more than once",
    ),
    "ranking elsewhere": (
        {"ranking": RANKING.to("meta")},
        ValueError,
        "scores are on cpu but ranking on meta; move them to one device",
    ),
    "keys of rank 2": (
        {"transitions": Transitions(TABLES[0], TABLES[1][0])},
        ValueError,
        "transitions.keys must be (R-1, M=4, r) with R >= 2, got (4, 5)",
    ),
    "keys for other M": (
        {"transitions": Transitions(TABLES[0][:, :3], TABLES[1][:, :3])},
        ValueError,
        "transitions.keys must be (R-1, M=4, r)",
    ),
    "no keys": (
        {"transitions": Transitions(TABLES[0][:0], TABLES[1][:0])},
        ValueError,
        "pass transitions=None for order 1",
    ),
    "too few predecessors": (
        {"transitions": Transitions(TABLES[0].expand(2, 4, 5), TABLES[1].expand(2, 4, 5))},
        ValueError,
        "transitions.predecessors must be (R(R-1)/2, M, r) = (3, 4, 5) for keys (2, 4, 5), got (2",
    ),
    "predecessors of other width": (
        {"transitions": Transitions(TABLES[0][..., :4], TABLES[1])},
        ValueError,
        "= (1, 4, 5) for keys (1, 4, 5), got (1, 4, 4)",
    ),
    "predecessors for other M": (
        {"transitions": Transitions(TABLES[0][:, :3], TABLES[1])},
        ValueError,
        "got (1, 3, 5)",
    ),
    "integer tables": (
        {"transitions": Transitions(TABLES[0], TABLES[1].long())},
        TypeError,
        "transitions.keys must be floating point, got torch.int64",
    ),
    "tables elsewhere": (
        {"transitions": Transitions(TABLES[0].to("meta"), TABLES[1])},
        ValueError,
        "scores are on cpu but transitions.predecessors on meta",
    ),
    "mask of numbers": ({"mask": torch.ones(2, 4)}, TypeError, "mask must be bool (True keeps)"),
    "mask of other shape": (
        {"mask": torch.ones(2, 3, dtype=torch.bool)},
        ValueError,
        "mask must be (N, M) = (2, 4) or (M,), got (2, 3)",
    ),
    "mask of anchors": ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "or (M,), got (2,)"),
    "mask elsewhere": (
        {"mask": torch.ones(4, dtype=torch.bool, device="meta")},
        ValueError,
        "scores are on cpu but mask on meta",
    ),
    "unknown discount": (
        {"discount": "dcg"},
        ValueError,
        "unknown discount 'dcg'; choose one of ['none', 'log']",
    ),
    "unknown reduction": (
        {"reduction": "max"},
        ValueError,
        "unknown reduction 'max'; choose one of ['mean', 'sum', 'none']",
    ),
    "unknown impl": ({"impl": "cuda"}, ValueError, "unknown impl 'cuda'; choose 'auto' or one of"),
    "NaN score": ({"scores": NAN, "validate": True}, ValueError, "scores[1, 2] is nan"),
    "infinite score": ({"scores": INF, "validate": True}, ValueError, "scores[0, 3] is -inf"),
}


@pytest.mark.parametrize(("bad", "error", "text"), LIKELIHOOD.values(), ids=LIKELIHOOD.keys())
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
FEATURES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer features": (
        {"image_features": IMAGE.long()},
        TypeError,
        "features must be floating point, got torch.int64 and torch.float64",
    ),
    "rank 1": ({"image_features": IMAGE[0]}, ValueError, "features must both be (n, D)"),
    "rank 3": (
        {"image_features": IMAGE[None], "text_features": TEXT[None]},
        ValueError,
        "features must both be (n, D), one row a pair; got image_features (1, 3, 8)",
    ),
    "other n": (
        {"text_features": TEXT[:2]},
        ValueError,
        "got image_features (3, 8) and text_features (2, 8)",
    ),
    "other D": ({"text_features": TEXT[:, :7]}, ValueError, "and text_features (3, 7)"),
    "D of another loss": (
        {"image_features": IMAGE[:, :7], "text_features": TEXT[:, :7]},
        ValueError,
        "loss was built with embed_dim=8, got image_features (3, 7)",
    ),
    "text elsewhere": (
        {"text_features": TEXT.to("meta")},
        ValueError,
        "image_features are on cpu but text_features on meta; move them to one device",
    ),
    "scale of two": (
        {"logit_scale": torch.ones(2)},
        ValueError,
        "logit_scale must be 0-D or (1,) on cpu, got (2,) on cpu",
    ),
    "scale elsewhere": (
        {"logit_scale": torch.ones((), device="meta")},
        ValueError,
        "logit_scale must be 0-D or (1,) on cpu, got () on meta",
    ),
    "bias of two": ({"logit_bias": torch.ones(2)}, ValueError, "logit_bias must be 0-D or (1,)"),
    "floating ids": (
        {"image_ids": torch.ones(3)},
        TypeError,
        "image_ids must be integers, got torch.float32",
    ),
    "bool ids": (
        {"text_ids": torch.ones(3, dtype=torch.bool)},
        TypeError,
        "text_ids must be integers, got torch.bool",
    ),
    "too few ids": (
        {"text_ids": torch.arange(2)},
        ValueError,
        "text_ids must be (3,) on cpu, got (2,) on cpu",
    ),
    "ids elsewhere": (
        {"image_ids": torch.arange(3, device="meta")},
        ValueError,
        "image_ids must be (3,) on cpu, got (3,) on meta",
    ),
}


@pytest.mark.parametrize(("bad", "error", "text"), FEATURES.values(), ids=FEATURES.keys())
def test_features(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    good: dict[str, Any] = {"image_features": IMAGE, "text_features": TEXT, "logit_scale": 10.0}
    loss = HighOrderPLLoss(8, 2).double()
    loss(**good)
    with pytest.raises(error, match=re.escape(text)):
        loss(**(good | bad))


@pytest.mark.parametrize("given", [{"world_size": 2}, {"rank": 1}, {"rank": 0, "world_size": 4}])
def test_world_that_is_not_there(given: dict[str, Any]) -> None:
    text = "there is no process group, so rank=0, world_size=1; leave both at None, or call"
    with pytest.raises(ValueError, match=re.escape(text)):
        ClipLoss(**given)(IMAGE, TEXT, 10.0)
    ClipLoss(rank=0, world_size=1)(IMAGE, TEXT, 10.0)


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress(progress: float) -> None:
    with pytest.raises(ValueError, match=r"set_progress: progress must be in \[0, 1\], got"):
        RankCLIPLoss().set_progress(progress)
