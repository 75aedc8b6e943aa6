"""The ops: they know tensors, not losses.

Dtype policy, the same for every op: scores, log-sum-exps and all accumulation are float32, or
float64 when any input is float64, whatever autocast says; gradients come back in the dtype of
their input. Every op has a plain twin in `reference.py`, with the same signature.

`impl` chooses how an op runs: "auto" takes the fastest one the tensor's own device can run,
any other name takes that one or raises an error saying why it cannot run here.
"""

from rankloss.kernels.dispatch import IMPLEMENTATIONS, check_impl, choose, why_not
from rankloss.kernels.gram_distance import gram_distance
from rankloss.kernels.plackett_luce import plackett_luce, values_and_gradients
from rankloss.kernels.signature import Lists

__all__ = [
    "IMPLEMENTATIONS",
    "Lists",
    "check_impl",
    "choose",
    "gram_distance",
    "plackett_luce",
    "values_and_gradients",
    "why_not",
]
