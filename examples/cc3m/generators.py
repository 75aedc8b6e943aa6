"""States of the random generators of a process, as tensors of fixed sizes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Python's, numpy's and torch's."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def generator_states() -> dict[str, Tensor]:
    """Of Python, numpy and torch; the same shapes in every process."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()  # noqa: NPY002
    _, keys, place, has_gauss, cached = numpy
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """What `generator_states` returned; a GPU's state is left out where there is no GPU."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    has_one, gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_one else None))
    *keys, place, has_gauss = states["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss)
    np.random.set_state((*state, float(states["numpy_gauss"])))  # noqa: NPY002
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
