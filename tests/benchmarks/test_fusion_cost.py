"""The fusion block is small beside the trunk it sits on."""

import pytest

pytest.importorskip("open_clip")

from benchmarks.fusion import markdown, measure


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_block_is_under_five_percent_of_the_trunk() -> None:
    result = measure(batch=1, rounds=1)
    for key in ("parameters", "flops_per_image"):
        assert 0 < result["block"][key] < 0.05 * result["trunk"][key]
    assert result["trunk"]["parameters"] == pytest.approx(86e6, rel=0.01)
    assert "| parameters |" in markdown(result)
