"""The fusion block is small beside the trunk it sits on."""

import pytest

pytest.importorskip("open_clip")

from benchmarks.fusion import markdown, measure


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_block_is_under_five_percent_of_the_trunk() -> None:
    block, trunk = measure(batch=1, rounds=1)
    assert 0 < block.parameters < 0.05 * trunk.parameters
    assert 0 < block.flops < 0.05 * trunk.flops
    assert trunk.parameters == pytest.approx(86e6, rel=0.01)
    assert "| parameters |" in markdown(block, trunk)
