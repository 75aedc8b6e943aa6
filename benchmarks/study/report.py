"""The report: a page for readers, every number of which stands in the study's JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.study.figures import draw_figures
from benchmarks.study.intervals import Summary, summarise
from benchmarks.study.measures import Result
from benchmarks.study.questions import FEWEST, METRICS, QUESTIONS, Metric, Question
from benchmarks.study.rows import all_rows
from benchmarks.study.settings import Scale
from examples.common.files import read_json, write_text
from examples.common.reports import json_text, markdown_table

OPENING = """# The study: does it help, and where?

Small, controlled experiments that run on two CPU cores, on data whose truth is known (rankings
drawn from known processes, generated scenes with graded similarity) and on photographs that people
graded. They say which way an effect goes at this size, and nothing about its size at scale.
Everything below is written by `python -m benchmarks.study --report` from
`benchmarks/results/study.json`; questions, metrics and test were fixed in
`benchmarks/study/questions.py` before anything was run.

**Rows.** order-0 is CLIP, order-1 RankCLIP, order-2 and above add transition terms; injection is
order-3 with a distilled student injected into both towers."""


def write_study(
    results: dict[str, dict[int, Result]], scale: Scale | None, file: Path, page: Path
) -> None:
    """Write JSON, pictures and page of the results that are there."""
    write_text(file, json_text(summarise(results, all_rows(), scale), "rows", "questions"))
    told = read_json(file)
    folder = Path("pictures", page.stem)
    captions = draw_figures(told, page.parent / folder)
    write_text(page, report(told, captions, folder))


def report(told: Summary, captions: dict[str, str], folder: Path) -> str:
    """Return the page in Markdown.

    Args:
        told: the study's JSON.
        captions: those of the pictures that were drawn, by name.
        folder: pictures, as seen from the page.
    """
    by_key = {each["key"]: each["comparisons"] for each in told["questions"]}
    asked = [question for question in QUESTIONS if by_key[question.key]]
    parts = [OPENING, _setup(told), f"**Test.** {told['test']}", _count(by_key)]
    parts.append("## Answers")
    parts.append("\n".join(f"- {_answer(q, by_key[q.key])}" for q in asked))
    costed: set[str] = set()
    for question in asked:
        parts.append(f"## {question.key.replace('-', ' ').capitalize()}\n\n{question.text}")
        parts += _section(question, by_key[question.key], told, costed)
        if question.key in captions:
            caption, name = captions[question.key], (folder / f"{question.key}.svg").as_posix()
            parts.append(f"![{caption}]({name})\n\n*{caption}*")
    parts += _closing(told, asked)
    return "\n\n".join(parts) + "\n"


def _setup(told: Summary) -> str:
    """Return a paragraph about what all rows share."""
    if told["scale"] is None:
        return (
            "**Shared by all rows.** Runs of the training script on CC3M, whose settings stand in "
            "each run's folder."
        )
    scale, scenes = told["scale"], told["scale"]["scenes"]
    photos = [row for name, row in told["rows"].items() if name.startswith("photos-")]
    main = told["rows"].get("order-0")
    text = (
        f"**Shared by all rows.** {scenes['train']} training scenes without augmentation, "
        f"{scenes['heldout']} held-out scenes, each with a colour-shape pair never seen in "
        f"training, images of {scenes['image_size']} pixels; AdamW with a peak rate of "
        f"{scale['learning_rate']}, {scale['warmup']} steps of warm-up, then a cosine; the ranking "
        "terms ramp up as in RankCLIP. Rows of one seed have the same initial towers and see the "
        "same batches; the seed also draws transition heads and student."
    )
    if main:
        text += f" {main['cost']['steps']:.0f} steps of {main['batch']}, unless a table says "
        text += "otherwise."
    if photos:
        text += (
            f" Photographs: the {scale['model']['vision_cfg']['image_size']}-pixel centre "
            f"squares of Flickr8k, {photos[0]['cost']['steps']:.0f} steps of {photos[0]['batch']} "
            "random crops, half of them mirrored; all graded images are held out."
        )
    return text


def _count(by_key: dict[str, list[Summary]]) -> str:
    """Return a sentence about the number of comparisons."""
    every = [x for comparisons in by_key.values() for x in comparisons if x["base"]]
    found = sum(x["differs"] for x in every)
    return (
        f"**How many.** {len(every)} comparisons stand below, {found} of them called differences; "
        "nothing is corrected for their number, so about one in twenty of those without any effect "
        "would have an interval without 0. The first metric of each question decides it."
    )


def verdict(metric: Metric, found: Summary) -> str:
    """Return in words what an interval says."""
    if found["n"] < FEWEST:
        return "too few seeds"
    if not found["differs"]:
        return "no difference shown"
    up = found["mean"] > 0
    if found.get("base") == "":
        return "above 0" if up else "below 0"
    if metric.better == 0:
        return "higher" if up else "lower"
    return "better" if up == (metric.better > 0) else "worse"


def shown(metric: Metric, found: Summary, *, signed: bool = False, t: bool = False) -> str:
    """Return a mean with its bootstrap interval, or with `t` the t interval alone."""
    ends = ("t_low", "t_high") if t else ("low", "high")
    if ends[0] not in found:
        return "" if t else metric.show(found["mean"], signed=signed)
    text = ", ".join(metric.show(found[end], signed=signed) for end in ends)
    return f"[{text}]" if t else f"{metric.show(found['mean'], signed=signed)} [{text}]"


def _answer(question: Question, comparisons: list[Summary]) -> str:
    """Return the verdict on each contrast, by the metric that decides."""
    if question.key == "planted":
        return _planted_answer(comparisons)
    measured = {found["metric"] for found in comparisons}
    metric = METRICS[next(key for key in question.metrics if key in measured)]
    told = []
    for found in comparisons:
        if found["metric"] == metric.key:
            against = f"{found['ours']} minus {found['base']}" if found["base"] else found["ours"]
            seeds = f"{found['n']} seed{'s' * (found['n'] > 1)}"
            value = shown(metric, found, signed=True)
            told.append(f"{against}: {value}, {seeds}, **{verdict(metric, found)}**")
    return f"{question.key}, by {metric.label}: {'; '.join(told)}."


def _planted_answer(comparisons: list[Summary]) -> str:
    """Return a sentence: how often the planted order was found, for each number of lists."""
    lists: dict[str, list[float]] = {}
    for found in comparisons:
        if found["metric"] == "recovered":
            lists.setdefault(found["ours"].rsplit("-", 1)[1], []).append(found["mean"])
    metric = METRICS["recovered"]
    told = "; ".join(
        f"with {count} lists {', '.join(metric.show(x) for x in shares)} %"
        for count, shares in lists.items()
    )
    return (
        "planted: share of seeds in which the planted order has the best held-out likelihood, for "
        f"planted orders 1, 2 and 3: {told}."
    )


def _section(
    question: Question, comparisons: list[Summary], told: Summary, costed: set[str]
) -> Iterator[str]:
    """Yield the tables of one question, and where we looked if the answer is no gain.

    Args:
        question, comparisons, told: what there is to tell.
        costed: rows whose cost an earlier section told; those of this one are added.
    """
    rows = [name for name in question.rows() if name in told["rows"]]
    yield _means(question, rows, told)
    if any(told["rows"][name]["cost"] for name in set(rows) - costed):
        yield _costs(rows, told)
        costed.update(rows)
    if question.shown:
        yield _best(question, rows, told)
    if question.key == "transitions":
        yield from _by_place(rows, told)
    paired = [found for found in comparisons if found["base"]]
    if paired:
        yield _differences(paired)
        yield from _looked(question, paired)


def _best(question: Question, rows: Sequence[str], told: Summary) -> str:
    """Return a sentence about the best mean of each metric that has a better side."""
    best = []
    for metric in (METRICS[key] for key in question.metrics):
        means = {r: told["rows"][r]["means"].get(metric.key, {}).get("mean") for r in rows}
        known = {name: metric.better * mean for name, mean in means.items() if mean is not None}
        if metric.better and known:
            best.append(f"{metric.label}: {max(known, key=lambda name: known[name])}")
    return f"Best means, whatever their intervals: {'; '.join(best)}."


def _means(question: Question, rows: Sequence[str], told: Summary) -> str:
    metrics = [m for m in question.metrics if any(m in told["rows"][r]["means"] for r in rows)]
    header = ["row", "seeds", *(METRICS[m].label for m in metrics)]
    lines = []
    for name in rows:
        means = told["rows"][name]["means"]
        cells = [shown(METRICS[m], means[m]) if m in means else "" for m in metrics]
        lines.append([name, str(len(told["rows"][name]["seeds"])), *cells])
    return "Means over seeds, with bootstrap intervals.\n\n" + markdown_table(header, lines)


def _costs(rows: Sequence[str], told: Summary) -> str:
    header = [
        "row",
        "parameters (millions)",
        "GFLOP a step",
        "CPU seconds a step",
        "steps",
        "batch",
    ]
    lines = []
    for name in rows:
        row = told["rows"][name]
        cost = row["cost"]
        sizes = [f"{cost['parameters'] / 1e6:.3f}", f"{cost['flops'] / 1e9:.3f}"]
        run = [f"{cost['cpu_seconds']:.3f}", f"{cost['steps']:.0f}", str(row["batch"])]
        lines.append([name, *sizes, *run])
    return (
        "Cost, with what only training needs; CPU seconds depend on what else the machine does.\n\n"
        + markdown_table(header, lines)
    )


def _differences(comparisons: Sequence[Summary]) -> str:
    header = ["difference", "metric", "seeds", "mean [bootstrap]", "[paired t]", "verdict"]
    lines = []
    for found in comparisons:
        metric = METRICS[found["metric"]]
        cells = [shown(metric, found, signed=True), shown(metric, found, signed=True, t=True)]
        name = f"{found['ours']} minus {found['base']}"
        told = [name, metric.label, str(found["n"]), *cells, verdict(metric, found)]
        lines.append(told)
    return "Paired differences.\n\n" + markdown_table(header, lines)


def _by_place(rows: Sequence[str], told: Summary) -> Iterator[str]:
    """Yield a sentence about where in the list the transitions gain."""
    for name in rows:
        curve = told["rows"][name]["curves"]
        if "gain" in curve:
            starts = [1, *(int(end) + 1 for end in curve["places"][:-1])]
            places = zip(starts, curve["places"], curve["gain"], strict=True)
            by_place = "; ".join(f"{a} to {b:.0f}: {gain:+.4f}" for a, b, gain in places)
            yield (
                f"Gain in nats a place of {name}, first seed, by place: {by_place}. Nothing was "
                "taken before the first place, so transitions cannot help there: the best match "
                "can change only through the towers, and transitions serve the order of the rest."
            )


def _looked(question: Question, comparisons: Sequence[Summary]) -> Iterator[str]:
    """Yield, for each contrast without a gain in the first metric, all other metrics' verdicts."""
    first = METRICS[question.metrics[0]]
    for ours, base in question.contrasts:
        own = [x for x in comparisons if (x["ours"], x["base"]) == (ours, base)]
        told = {x["metric"]: verdict(METRICS[x["metric"]], x) for x in own}
        if not told or told.get(first.key) in (None, "better", "too few seeds"):
            continue
        groups: dict[str, list[str]] = {}
        for key, word in told.items():
            if key != first.key:
                groups.setdefault(word, []).append(METRICS[key].label)
        looked = "; ".join(f"{word}: {', '.join(labels)}" for word, labels in groups.items())
        yield (
            f"{ours} minus {base}, {first.label}: {told[first.key]}. We also looked at: {looked}."
        )


def _closing(told: Summary, asked: Sequence[Question]) -> Iterator[str]:
    """Yield how to run a row again, and what is not there."""
    yield (
        "## Run it again\n\nAny row at any seed, here order-3 at seed 2; `--list` prints the "
        "command of every run that is left to do:\n\n"
        "    python -m benchmarks.study --only order-3 --seed 2 --again\n\n"
        f"Rows: {', '.join(told['rows'])}."
    )
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    yield f"Made with {versions}."
    if told["stale"]:
        yield f"Run with settings that have changed since: {'; '.join(told['stale'])}."
    unasked = [question.key for question in QUESTIONS if question not in asked]
    if unasked:
        yield f"Questions without any run yet: {', '.join(unasked)}."
    if told["missing"]:
        yield f"Rows not run yet: {', '.join(told['missing'])}."
