"""Options that losses, likelihoods and their checks share."""

from typing import Literal

Discount = Literal["none", "log"]
Reduction = Literal["mean", "sum", "none"]
