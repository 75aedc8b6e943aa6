"""Settings and processes every test shares."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.helpers.processes import ProcessGroup

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # many small problems, and pytest-xdist has the other cores

hypothesis.settings.register_profile(
    "rankloss",
    derandomize=True,  # the same cases on every machine and in every run
    deadline=None,  # no test fails on a time
    max_examples=60,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("rankloss")


@pytest.fixture(scope="module")
def two() -> Iterator[ProcessGroup]:
    """Two processes of a module's own, which start when they are first used."""
    group = ProcessGroup(2)
    yield group
    group.close()
