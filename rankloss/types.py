"""Types that losses, likelihoods and their checks share."""

from typing import Literal, NamedTuple

from torch import Tensor

Discount = Literal["none", "log"]
Reduction = Literal["mean", "sum", "none"]


class Transitions(NamedTuple):
    """Tables that make the utility of candidate d depend on the m candidates taken before it.

        tau_m(a_1, ..., a_m; d) = sum_c C_m[d, c] * prod_j P_mj[a_j, c]      (a_1 taken last)

    Attributes:
        predecessors: (R(R-1)/2, M, r); row m(m-1)/2 + (j-1) is P_mj.
        keys: (R-1, M, r); row m-1 is C_m, any 1/sqrt(r) already inside.
    """

    predecessors: Tensor
    keys: Tensor
