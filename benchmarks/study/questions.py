"""Questions of the study, each with its rows, metrics and test, fixed before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TEST = (
    "Every comparison is paired by seed: two rows share initial towers, data and order of batches, "
    "and their difference is taken seed by seed. The interval is the 95 % percentile bootstrap of "
    "the mean difference over seeds (10,000 resamples). With five seeds this interval is too "
    "narrow, so the 95 % paired t interval stands beside it, and a difference is called one only "
    "if both intervals exclude 0, and only from five seeds on."
)
FEWEST = 5
"""Seeds from which on a difference may be called one."""


@dataclass(frozen=True)
class Metric:
    """A number measured of a row.

    Args:
        key: its name in JSON.
        label: its name in tables.
        better: 1 if more is better, -1 if less is, 0 if it is neither.
        percent: show a share as percent.
    """

    key: str
    label: str
    better: int = 1
    percent: bool = False

    def show(self, value: float, *, signed: bool = False) -> str:
        """Format a value, or with `signed` a difference."""
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.2f}" if self.percent else f"{value:{sign}.4f}"


FAMILIES = ("shape", "colour", "size", "texture", "relation")
"""Attributes that linear probes are asked for."""
PLANTED_ORDERS, FITTED_ORDERS = (1, 2, 3), (1, 2, 3, 4)
METRICS = {
    metric.key: metric
    for metric in (
        Metric("correlation", "graded agreement (Spearman)"),
        *(
            Metric(f"{way}_r{k}", f"{label} R@{k} (%)", percent=True)
            for k in (1, 5, 10)
            for way, label in (("i2t", "image to text"), ("t2i", "text to image"))
        ),
        Metric("zs_mean", "zero-shot mean (%)", percent=True),
        Metric("zs_unseen", "zero-shot, unseen pairs (%)", percent=True),
        *(Metric(f"probe_{x}", f"probe: {x} (%)", percent=True) for x in FAMILIES),
        Metric("probe_mean", "probe: mean of five (%)", percent=True),
        Metric("modality_gap", "modality gap", better=0),
        Metric("alignment", "alignment (0 best)", better=-1),
        Metric("uniformity", "uniformity (-8 best)", better=-1),
        Metric("image_cone", "cone of images", better=0),
        Metric("text_cone", "cone of texts", better=0),
        Metric("paired_margin", "margin of matches"),
        Metric("separability", "separability of modalities (%)", better=0, percent=True),
        Metric("ranking_nll", "ranking loss, nats a place", better=-1),
        Metric("ranking_gain", "gain by transitions, nats a place"),
        Metric(
            "beta_offset", "beta: share that no predecessor changes (%)", better=0, percent=True
        ),
        Metric("gamma_offset", "gamma: the same (%)", better=0, percent=True),
        Metric("offset_gain", "gain by the mean predecessor, nats a place"),
        Metric("gate_difference", "text gate, full minus bare (above 0: closes on bare)", better=0),
        Metric("gate_full", "text gate, full captions", better=0),
        Metric("gate_bare", "text gate, bare captions", better=0),
        Metric("tau_c", "Kendall tau-c with people"),
        Metric("tau_b", "Kendall tau-b with people"),
        *(Metric(f"nll_{order}", f"fitted order {order}", better=-1) for order in FITTED_ORDERS),
        Metric("nll_true", "the process itself", better=-1),
        Metric("recovered", "seeds in which it is the planted order (%)", percent=True),
        Metric("excess_below", "one order less than planted: excess loss", better=0),
        Metric("excess_above", "one order more than planted: excess loss", better=0),
    )
}


@dataclass(frozen=True)
class Question:
    """One question, asked before its rows are run.

    Args:
        key: short name.
        text: the question.
        contrasts: rows compared, (ours, base) each; ("name", "") tests a row's metric against 0.
        metrics: keys of `METRICS`; the first one decides, the others are told beside it.
        shown: rows whose means are tabulated; those of the contrasts if empty.
    """

    key: str
    text: str
    contrasts: tuple[tuple[str, str], ...]
    metrics: tuple[str, ...]
    shown: tuple[str, ...] = ()

    def rows(self) -> list[str]:
        """Names of all rows in the table, each once, baselines first."""
        listed = self.shown or [x for ours, base in self.contrasts for x in (base, ours)]
        return list(dict.fromkeys(name for name in listed if name))


METRIC_OF = {
    f"{way}_R@{k}": f"{short}_r{k}"
    for way, short in (("image_to_text", "i2t"), ("text_to_image", "t2i"))
    for k in (1, 5, 10)
}
"""Retrieval by open_clip's names, as `examples.evaluation` has them -> metrics."""
LISTS = (64, 256, 1024, 4096)
ORDERS = tuple(f"order-{i}" for i in range(6))
RETRIEVAL = ("i2t_r1", "t2i_r1")
MAIN = ("correlation", *RETRIEVAL, "zs_mean", "modality_gap", "ranking_nll")
PROBES = ("probe_mean", *(f"probe_{x}" for x in FAMILIES))
GAP = (
    "modality_gap",
    "alignment",
    "uniformity",
    "image_cone",
    "text_cone",
    "paired_margin",
    "separability",
)
STAGES = ("order-0", "order-1", "order-3", "injection")
VARIANTS = ("pyramid", "pyramid-attention", "plain-residual", "image-only")
BASELINES = ("siglip", "cyclip", "clip-two-captions", "alip", "clip-two-views", "ito")


def against(base: str, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pair each name with one base."""
    return tuple((name, base) for name in names if name != base)


def _robust(case: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{case}-order-{r}", f"{case}-order-0") for r in (1, 3))


BATCHES = (128, 256, 512, 1024)
QUESTIONS = (
    Question(
        "planted",
        "Rankings are drawn from processes of known order. Does the fitted order with the best "
        "held-out likelihood equal the planted one, and how many lists does that take?",
        tuple((f"planted-{p}-{n}", "") for p in PLANTED_ORDERS for n in LISTS),
        (
            "excess_below",
            "excess_above",
            *(f"nll_{r}" for r in FITTED_ORDERS),
            "nll_true",
            "recovered",
        ),
    ),
    Question(
        "agreement",
        "Do the ranking losses change graded agreement on held-out scenes, and does order 3 do "
        "more than order 1?",
        (("order-1", "order-0"), ("order-3", "order-0"), ("order-3", "order-1")),
        MAIN,
    ),
    Question(
        "injection",
        "Does the injected student help, and is it the teacher that helps? The controls are the "
        "same student without a teacher, and with a teacher of random weights.",
        (
            ("injection", "order-3"),
            ("injection-no-teacher", "order-3"),
            ("injection", "injection-no-teacher"),
            ("injection", "injection-random-teacher"),
        ),
        (*MAIN[:-1], "zs_unseen"),
    ),
    Question(
        "probe",
        "Do image features tell attributes better? A linear probe on five families, on "
        "colour-shape pairs that neither model nor probe has seen.",
        (
            *against("order-0", STAGES),
            ("injection", "order-3"),
            ("injection", "injection-no-teacher"),
        ),
        PROBES,
    ),
    Question(
        "gap",
        "How do the paper's four stages change the modality gap?",
        (("order-1", "order-0"), ("order-3", "order-1"), ("injection", "order-3")),
        GAP,
    ),
    Question(
        "transitions",
        "What do the transitions of a trained third-order model give: how much held-out ranking "
        "likelihood do they gain over the same model's scores alone, and does it matter what was "
        "taken before? If transitions are mere offsets of candidates, no predecessor changes them, "
        "and the mean predecessor gains as much. (The shares and the mean predecessor were added "
        "after the first seed's picture was seen.)",
        (("order-3", ""),),
        ("ranking_gain", "offset_gain", "beta_offset", "gamma_offset", "ranking_nll"),
    ),
    Question(
        "gate",
        "Does the text gate close on captions without local descriptors, as the paper reports? "
        "Bare captions name the things of the same scene without their attributes.",
        (("injection", ""), ("injection-no-teacher", "")),
        ("gate_difference", "gate_full", "gate_bare"),
    ),
    Question(
        "photographs",
        "On photographs (Flickr8k's files), do ranking losses agree better with people's grades, "
        "and at what price?",
        (
            ("photos-order-1", "photos-order-0"),
            ("photos-order-3", "photos-order-0"),
            ("photos-order-3", "photos-order-1"),
            ("photos-order-1-weight-4", "photos-order-0"),
            ("photos-order-1-weight-4", "photos-order-1"),
        ),
        ("tau_c", "tau_b", *RETRIEVAL, "i2t_r10", "t2i_r10", "modality_gap", "ranking_nll"),
    ),
    Question(
        "orders",
        "Which order from 0 to 5 is best on scenes? Is it 3?",
        against("order-1", ORDERS),
        MAIN,
        shown=ORDERS,
    ),
    Question(
        "baselines",
        "Other losses at the floating-point operations of CLIP's run: which is best? ALIP sees a "
        "second caption of each scene and ITO a second view, so CLIP with the same stands beside.",
        (
            *against("order-0", BASELINES),
            ("alip", "clip-two-captions"),
            ("ito", "clip-two-views"),
        ),
        MAIN[:-1],
        shown=("order-0", "order-1", "order-3", *BASELINES),
    ),
    Question(
        "fusion",
        "Which of the six variants of the injection is worth its cost?",
        against("order-3", (*(f"fusion-{x}" for x in VARIANTS), "injection")),
        (*MAIN[:-1], "zs_unseen"),
    ),
    Question(
        "noise",
        "Is a ranking loss more robust where 40 % of the captions are shuffled?",
        _robust("noise-40"),
        MAIN[:-1],
    ),
    Question(
        "repeated",
        "Is a ranking loss more robust where most attributes are left out, so that captions "
        "repeat; and does telling the loss which captions are equal help?",
        (
            *_robust("bare"),
            *((f"bare-ids-order-{r}", f"bare-order-{r}") for r in (0, 1, 3)),
        ),
        MAIN[:-1],
    ),
    Question(
        "small-batches",
        "Is a ranking loss more robust in batches of 16, at the same number of samples?",
        _robust("batch-16"),
        MAIN[:-1],
    ),
    Question(
        "settings",
        "Do transition width, weight of the ranking terms, top_k or discount change the answer?",
        (
            ("order-3-width-8", "order-3"),
            ("order-3-width-128", "order-3"),
            ("order-1-weight-4", "order-1"),
            ("order-3-weight-4", "order-3"),
            ("order-3-weight-4", "order-1-weight-4"),
            ("order-1-top-8", "order-1"),
            ("order-3-top-8", "order-3"),
            ("order-1-log", "order-1"),
            ("order-3-log", "order-3"),
        ),
        MAIN,
    ),
    Question(
        "batches",
        "Does the answer change with the batch, at a fixed number of steps?",
        tuple(pair for b in BATCHES for pair in _robust(f"batch-{b}")),
        MAIN[:-1],
    ),
)
