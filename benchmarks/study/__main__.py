"""Run the study and write its report.

    python -m benchmarks.study                     # planted orders, orders 0, 1, 3, the injection
    python -m benchmarks.study --all               # every row, some hours
    python -m benchmarks.study --list              # rows, and the command that runs each one again
    python -m benchmarks.study --report            # the report from what is there already
    python -m benchmarks.study --only order-3 --seed 2 --again
    python -m benchmarks.study --photos FOLDER --captions FILE --grades FILE
    python -m benchmarks.study --scale cc3m --data 'cc3m/{00000..00331}.tar' [--launch | --report]

Further options of --scale cc3m go to the training script, such as --evaluation.pairs.

Each run is one file under <out>/rows; what is there is not run again, so a study that was stopped
goes on with the same command. Runs share nothing: --jobs of them run side by side, one thread each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

# Threads that wait should sleep, not spin: else another program on the same cores halves our speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tqdm import tqdm

from benchmarks.study import cc3m
from benchmarks.study.photos import PhotoFiles
from benchmarks.study.report import write_study
from benchmarks.study.rows import Row, all_rows, chosen, in_order
from benchmarks.study.settings import SCALES, Trained
from benchmarks.study.store import command, load, result_file, run_and_save
from examples.common.files import UserError

ROOT = Path(__file__).resolve().parents[2]
Work = tuple[Row, int, str, Path, PhotoFiles | None]
"""Arguments of `run_and_save`."""
RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    options = _parse(arguments)
    try:
        if options.scale == "cc3m":
            return _cc3m(options)
        return _study(options)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--all", action="store_true", help="every row, not only the default ones")
    add("--only", nargs="+", default=[], metavar="NAME", help="rows or stages by name")
    add("--seeds", type=int, default=5, help="runs of each row, of seeds 0, 1, ...")
    add("--seed", type=int, help="this seed alone")
    add("--again", action="store_true", help="run rows anew whose results are there")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs side by side")
    add("--scale", choices=[*SCALES, "cc3m"], default="cpu")
    add("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    add("--results", type=Path, help="JSON of all rows, which the report reads")
    add("--page", type=Path, help="the report; its pictures go beside it")
    add("--list", action="store_true", help="say what would be run, and how to run it again")
    add("--report", action="store_true", help="run nothing, report what is there")
    add("--no-report", action="store_true", help="run, and leave the report as it is")
    for name, text in (("photos", "folder"), ("captions", "file"), ("grades", "file")):
        add(f"--{name}", type=Path, metavar=text.upper(), help=f"Flickr8k's {name}")
    add("--data", help="CC3M's shards, for --scale cc3m")
    add("--features", type=Path, help="the teacher's features of them")
    add("--launch", action="store_true", help="run the commands of --scale cc3m in turn")
    options, passed_on = parser.parse_known_args(arguments)
    options.passed_on = passed_on
    if options.passed_on and options.scale != "cc3m":
        parser.error(f"there is no {options.passed_on[0]} but for --scale cc3m")
    stem = "study_cc3m" if options.scale == "cc3m" else "study"
    options.results = options.results or RESULTS / f"{stem}.json"
    options.page = options.page or PAGES / f"{stem}.md"
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    given = [options.photos, options.captions, options.grades]
    if any(given) and not all(given):
        parser.error("--photos, --captions and --grades go together")
    return options


def _cc3m(options: argparse.Namespace) -> int:
    """Print or run the training script's commands, or report what their runs measured."""
    if options.report:
        write_study(cc3m.results(options.out), None, options.results, options.page)
        return 0
    data, features, extra = options.data, options.features, options.passed_on
    return cc3m.main(data, features, options.out, extra, launch=options.launch)


def _study(options: argparse.Namespace) -> int:
    scale = SCALES[options.scale]
    photos = (
        PhotoFiles(options.photos, options.captions, options.grades) if options.photos else None
    )
    rows = chosen(all_rows(), options.only, everything=options.all)
    if photos is None and not options.only:
        rows = [row for row in rows if not _wants_photos(row)]
    seeds = list(range(options.seeds)) if options.seed is None else [options.seed]
    if not options.report:
        _run_rows(rows, seeds, options, photos)
    if not options.list and not options.no_report:
        everything = load(options.out, all_rows(), range(options.seeds), scale)
        write_study(everything, scale, options.results, options.page)
        print(f"{options.page}, {options.results}")
    return 0


def _wants_photos(row: Row) -> bool:
    return isinstance(row.settings, Trained) and row.settings.photos


def _run_rows(
    rows: list[Row], seeds: list[int], options: argparse.Namespace, photos: PhotoFiles | None
) -> None:
    """Run what is not there yet, some side by side; print each run's command when it is done."""
    scale = SCALES[options.scale]
    left: dict[Path, tuple[Row, int]] = {}
    for row, seed in in_order(rows, seeds):
        file = result_file(options.out, row, seed, scale)
        if options.again or not file.exists():
            left.setdefault(file, (row, seed))
    if options.list:
        for row, seed in left.values():
            print(command(row, seed, scale, photos))
        return
    work = [(row, seed, options.scale, options.out, photos) for row, seed in left.values()]
    bar = tqdm(_done(work, options.jobs), total=len(work), unit="run", desc="study")
    for row, seed, *_ in bar:
        bar.write(f"{row.name}, seed {seed}; again: {command(row, seed, scale, photos)}")


def _done(work: list[Work], jobs: int) -> Iterator[Work]:
    """Run all of the work, and yield each piece when it is done."""
    if jobs == 1:
        for each in work:
            run_and_save(*each)
            yield each
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        runs = {pool.submit(run_and_save, *each): each for each in work}
        try:
            for done in as_completed(runs):
                done.result()
                yield runs[done]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    sys.exit(main())
