"""Checks of numbers in settings."""

import math


def check_least(settings: object, least: float, *names: str) -> None:
    """Check that these fields are finite and at least so much.

    Raises:
        ValueError: one is not; its name and value are told.
    """
    for name in names:
        value = getattr(settings, name)
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least:g}, got {value}")
