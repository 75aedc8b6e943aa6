"""Checks of what users give: errors name the operation, what was given, and the remedy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from rankloss.kernels.dispatch import check_impl
from rankloss.options import Discount
from rankloss.transitions import Transitions

# ---------------------------------------------------------------- likelihoods


def check_option(name: str, value: object, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"unknown {name} {value!r}; choose one of {list(get_args(choices))}")


def check_scores(operation: str, scores: Tensor) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"{operation}: scores must be floating point, got {scores.dtype}")
    if scores.dim() != 2:
        raise ValueError(f"{operation}: scores must be (N, M), got {tuple(scores.shape)}")


def check_inputs(
    scores: Tensor, ranking: Tensor, transitions: Transitions | None, mask: Tensor | None
) -> None:
    check_scores("plackett_luce_nll", scores)
    n, m = scores.shape
    if ranking.is_floating_point() or ranking.is_complex() or ranking.dtype == torch.bool:
        raise TypeError(f"plackett_luce_nll: ranking must hold integer ids, got {ranking.dtype}")
    if ranking.dim() != 2 or ranking.shape[0] != n or not 1 <= ranking.shape[1] <= m:
        raise ValueError(
            f"plackett_luce_nll: ranking must be (N={n}, K) with 1 <= K <= M={m} for scores "
            f"{tuple(scores.shape)}, got {tuple(ranking.shape)}"
        )
    if ranking.device != scores.device:
        raise ValueError(
            f"plackett_luce_nll: scores are on {scores.device} but ranking on {ranking.device}; "
            "move them to one device"
        )
    if transitions is not None:
        check_transitions(scores, transitions)
    if mask is not None:
        shapes = {f"(N, M) = {tuple(scores.shape)}": scores.shape, "(M,)": scores.shape[1:]}
        check_mask("plackett_luce_nll", mask, shapes, ("scores", scores))


def check_transitions(scores: Tensor, transitions: Transitions) -> None:
    m = scores.shape[1]
    predecessors, keys = transitions
    terms = keys.shape[0] if keys.dim() == 3 else 0
    r = keys.shape[-1]
    if keys.dim() != 3 or keys.shape[1] != m or terms < 1 or r < 1:
        raise ValueError(
            f"plackett_luce_nll: transitions.keys must be (R-1, M={m}, r) with R >= 2, got "
            f"{tuple(keys.shape)}; pass transitions=None for order 1"
        )
    pairs = terms * (terms + 1) // 2
    if predecessors.shape != (pairs, m, r):
        raise ValueError(
            f"plackett_luce_nll: transitions.predecessors must be (R(R-1)/2, M, r) = "
            f"{(pairs, m, r)} for keys {tuple(keys.shape)}, got {tuple(predecessors.shape)}"
        )
    for name, table in transitions._asdict().items():
        if not table.is_floating_point():
            raise TypeError(
                f"plackett_luce_nll: transitions.{name} must be floating point, got {table.dtype}"
            )
        if table.device != scores.device:
            raise ValueError(
                f"plackett_luce_nll: scores are on {scores.device} but transitions.{name} on "
                f"{table.device}; move them to one device"
            )


def check_mask(
    operation: str,
    mask: Tensor,
    shapes: Mapping[str, torch.Size],
    like: tuple[str, Tensor],
    name: str = "mask",
) -> None:
    """Check a mask: one of these shapes, by what each is called, where that tensor is."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{operation}: {name} must be bool (True keeps), got {mask.dtype}")
    if mask.shape not in shapes.values():
        raise ValueError(
            f"{operation}: {name} must be {' or '.join(shapes)}, got {tuple(mask.shape)}"
        )
    if mask.device != like[1].device:
        raise ValueError(
            f"{operation}: {like[0]} are on {like[1].device} but {name} on {mask.device}; "
            "move them to one device"
        )


def should_check_ranking(scores: Tensor, validate: bool | None) -> bool:
    if validate is not None:
        return validate
    return scores.device.type == "cpu" and not torch.compiler.is_compiling()


def hunts_anomalies() -> bool:
    return not torch.compiler.is_compiling() and torch.is_anomaly_enabled()


def check_ranking_values(ranking: Tensor, m: int) -> None:
    ranking = ranking.long()  # M may not fit the given dtype
    outside = (ranking < 0) | (ranking >= m)
    if outside.any():
        raise ValueError(
            f"plackett_luce_nll: ranking holds id {int(ranking[outside][0])}, outside [0, M={m})"
        )
    seen = ranking.new_zeros(ranking.shape[0], m).scatter_add_(1, ranking, torch.ones_like(ranking))
    repeated = (seen > 1).nonzero()
    if len(repeated):
        row, candidate = repeated[0].tolist()
        raise ValueError(
            f"plackett_luce_nll: row {row} of ranking holds candidate {candidate} more than once; "
            "a ranking takes each candidate at most once"
        )


def check_score_values(scores: Tensor, mask: Tensor | None) -> None:
    bad = ~scores.isfinite() if mask is None else ~scores.isfinite() & mask
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"plackett_luce_nll: scores[{row}, {column}] is {scores[row, column].item()}; remove "
            "candidates with mask=, not with infinite scores, and clamp the logit scale"
        )


# ---------------------------------------------------------------- losses


def check_settings(
    order: int,
    embed_dim: int | None,
    top_k: int | None,
    discount: Discount,
    impl: str,
) -> None:
    if order < 0:
        raise ValueError(f"order must be 0 or more, got {order}")
    if order >= 2 and embed_dim is None:
        raise ValueError(f"order {order} needs embed_dim, the width of the features")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; None ranks everything")
    if order >= 2 and top_k == 1:
        raise ValueError(
            f"order {order} with top_k=1 has no transitions, the first place has no predecessor; "
            "use top_k >= 2, or order=1"
        )
    if discount not in ("none", "log"):
        raise ValueError(f"unknown discount {discount!r}; choose 'none' or 'log'")
    check_impl(impl)


def check_weights(order: int, contrastive: float, cross_modal: float, in_modal: float) -> None:
    weights = {
        "contrastive_weight": contrastive,
        "cross_modal_weight": cross_modal,
        "in_modal_weight": in_modal,
    }
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if order >= 2 and cross_modal == in_modal == 0:
        raise ValueError(f"order {order} with both ranking weights 0 ranks nothing; use order=0")
    if contrastive == 0 and (order == 0 or cross_modal == in_modal == 0):
        raise ValueError(f"every weight that counts at order {order} is 0, so the loss would be 0")


def check_option_names(name: str, options: Mapping[str, Any], allowed: type) -> None:
    """Raise the TypeError that Python raises for an argument a function does not have."""
    unknown = options.keys() - get_type_hints(allowed).keys()
    if unknown:
        raise TypeError(f"{name} got an unexpected keyword argument {sorted(unknown)[0]!r}")


def check_features(image: Tensor, text: Tensor, embed_dim: int | None) -> None:
    given = f"image_features {tuple(image.shape)} and text_features {tuple(text.shape)}"
    if not (image.is_floating_point() and text.is_floating_point()):
        raise TypeError(f"features must be floating point, got {image.dtype} and {text.dtype}")
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(f"features must both be (n, D), one row a pair; got {given}")
    if embed_dim is not None and image.shape[1] != embed_dim:
        raise ValueError(f"loss was built with embed_dim={embed_dim}, got {given}")
    if image.device != text.device:
        raise ValueError(
            f"image_features are on {image.device} but text_features on {text.device}; "
            "move them to one device"
        )


def check_further(
    name: str,
    images: Tensor,
    given: Mapping[str, Tensor | None],
    needed: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Check that a loss's further features are all there, (n, D) as `images`, and no others."""
    unknown = set(given) - {*needed, *optional}
    if unknown:
        raise TypeError(f"{name}.forward got an unexpected keyword argument {min(unknown)!r}")
    missing = [key for key in needed if given.get(key) is None]
    if missing:
        raise TypeError(f"{name}.forward needs {missing[0]}= too: (n, D) unit-norm")
    found = {key: x for key, x in given.items() if x is not None}
    for x in found.values():
        check_features(images, x, None)
    return found


def check_ids(ids: Tensor | None, name: str, features: Tensor) -> Tensor | None:
    if ids is None:
        return None
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.shape != features.shape[:1] or ids.device != features.device:
        raise ValueError(
            f"{name} must be ({features.shape[0]},) on {features.device}, got "
            f"{tuple(ids.shape)} on {ids.device}"
        )
    return ids


def as_scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """Return a 0-D tensor on the features' device."""
    if not isinstance(value, Tensor):
        dtype = torch.promote_types(features.dtype, torch.float32)
        return torch.full((), value, dtype=dtype, device=features.device)
    if value.numel() != 1 or value.device != features.device:
        raise ValueError(
            f"{name} must be 0-D or (1,) on {features.device}, got {tuple(value.shape)} on "
            f"{value.device}"
        )
    return value.reshape(())
