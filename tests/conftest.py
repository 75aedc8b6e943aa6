"""Settings every test shares."""

import os

import hypothesis
import torch

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
