"""The one kernel that a ceiling needs: exponentials, and nothing else, from registers."""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def exponentials_kernel(x, rounds, B: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * B + tl.arange(0, B)
    value = tl.load(x + i)
    for _ in range(rounds):
        value = tl.exp2(value - 1.0)  # stays between 0.5 and 1
    tl.store(x + i, value)


def exponentials(x: torch.Tensor, rounds: int) -> None:
    block = 1024
    exponentials_kernel[(x.numel() // block,)](x, rounds, B=block, num_warps=4)
