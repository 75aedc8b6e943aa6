"""Every one-page example runs, learns something, and is listed where readers look for it."""

from pathlib import Path

import pytest

import examples

FOLDER = Path(examples.__file__).parent
PAGES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "toy"))
CHANCE = 1 / 216


def test_a_clip_of_ones_own() -> None:
    from examples.clip_with_rankloss import main

    assert main(order=3, steps=40) > 0.5
    assert main(order=0, steps=0) < 0.1, "nothing had to be learned"


def test_ranking_without_clip() -> None:
    from examples.ranking_only import main

    before, after = main(steps=20)
    assert after > before + 0.1
    assert after > 0.85


def test_cached_features_give_the_large_batchs_gradient_and_averaged_parts_do_not() -> None:
    from examples.large_batches import main

    found = main(steps=4)
    assert found["cached"] < 1e-4
    assert found["averaged"] > 0.05
    assert found["recall"] > 0.5


def test_the_whole_method_survives_saving() -> None:
    from examples.distil_and_inject import main

    pytest.importorskip("open_clip")
    before, after = main(steps=15)
    assert before == after > 5 * CHANCE


def test_open_clip_loads_what_is_published() -> None:
    pytest.importorskip("open_clip")
    from examples.inside_open_clip import main

    before, published = main(steps=20)
    assert before == published > 5 * CHANCE


def test_transformers_saves_and_loads_model_and_loss() -> None:
    pytest.importorskip("transformers")
    from examples.inside_transformers import main

    before, after = main(steps=20)
    assert before == after > 5 * CHANCE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_is_one_page_listed_and_run_here(page: Path) -> None:
    assert 40 <= len(page.read_text().splitlines()) <= 120
    assert f"`{page.name}`" in (FOLDER / "README.md").read_text()
    assert f"examples.{page.stem} import main" in Path(__file__).read_text()
