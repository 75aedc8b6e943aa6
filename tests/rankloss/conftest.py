"""Processes that all tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.helpers.processes import ProcessGroup


@pytest.fixture(scope="session")
def groups() -> Iterator[dict[int, ProcessGroup]]:
    """Process groups by world size; each starts when it is first used."""
    made = {world: ProcessGroup(world) for world in (1, 2, 4)}
    yield made
    for group in made.values():
        group.close()
