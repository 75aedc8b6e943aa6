"""Canaries: faults that pass unnoticed in the plain interpreter are caught by the sanitizer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.sanitizer import WHY_NOT, KernelFault, sanitize

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
errors = pytest.importorskip("triton.runtime.errors")

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# ---------------------------------------------------------------- kernels with one fault each


def _read_outside(a: Any, out: Any) -> None:
    tl.store(out, tl.load(a + 4))


def _read_before_a_view(a: Any, out: Any) -> None:
    tl.store(out, tl.load(a - 1))


def _write_outside(a: Any, out: Any) -> None:
    tl.store(out + tl.arange(0, 4), tl.load(a + tl.arange(0, 4)))


def _write_together(a: Any, out: Any) -> None:
    tl.store(out, tl.load(a))


def _read_what_another_wrote(a: Any, out: Any) -> None:
    p = tl.program_id(0)
    tl.store(out + p, tl.load(a) + tl.load(out + p - 1, mask=p > 0, other=0.0))


def _write_what_another_read(a: Any, out: Any) -> None:
    p = tl.program_id(0)
    value = tl.load(out + p + 1, mask=p < 3, other=0.0)
    tl.store(out + p, tl.load(a) + value)


def _write_one_element_from_two_lanes(a: Any, out: Any) -> None:
    tl.store(out + tl.arange(0, 4) // 2, tl.load(a + tl.arange(0, 4)))


def _overflow_int32(a: Any, out: Any) -> None:
    offset = (tl.program_id(0) + 70000) * 70000
    tl.store(out, tl.load(a + offset * 0))


def _subtract_infinities(a: Any, out: Any) -> None:
    x = tl.load(a + tl.arange(0, 4)) + float("-inf")
    tl.store(out + tl.arange(0, 4), x - tl.max(x, 0), mask=tl.arange(0, 4) < 0)


def _overflow_float(a: Any, out: Any) -> None:
    tl.store(out, tl.exp(tl.load(a) + 100.0))


def _overflow_half(a: Any, out: Any) -> None:
    tl.store(out, (tl.load(a) + 1e5).to(tl.float16).to(tl.float32))


def _log_of_zero(a: Any, out: Any) -> None:
    tl.store(out, tl.log2(tl.load(a) * 0.0))


def _multiply_bfloat16(a: Any, out: Any) -> None:
    x = tl.load(a).to(tl.bfloat16)
    tl.store(out, (x * x).to(tl.float32))


def _sum_bfloat16(a: Any, out: Any) -> None:
    x = tl.load(a + tl.arange(0, 4)).to(tl.bfloat16)
    tl.store(out, tl.sum(x, 0).to(tl.float32))


def _dot_of_eight(a: Any, out: Any) -> None:
    x = tl.load(a + tl.arange(0, 4)[None, :] + tl.zeros((16, 1), tl.int32))
    x = tl.reshape(x, (8, 8))
    tl.store(out, tl.sum(tl.dot(x, x)))


FAULTS = {
    "out of bounds: load": (_read_outside, 1),
    "out of bounds: store": (_write_outside, 1),
    "race: store of program 1 where another one wrote": (_write_together, 2),
    "race: load of program 1 where another one wrote": (_read_what_another_wrote, 4),
    "race: store of program 1 where another one read": (_write_what_another_read, 4),
    "race: two lanes": (_write_one_element_from_two_lanes, 1),
    "int32 overflow": (_overflow_int32, 1),
    "invalid value": (_subtract_infinities, 1),
    "overflow encountered in exp": (_overflow_float, 1),
    "overflow encountered in cast": (_overflow_half, 1),
    "divide by zero": (_log_of_zero, 1),
    "bfloat16: arithmetic (product)": (_multiply_bfloat16, 1),
    "bfloat16: arithmetic (sum)": (_sum_bfloat16, 1),
    "below 16": (_dot_of_eight, 1),
}


def launch(kernel: Callable[..., None], programs: int) -> Tensor:
    """Run on an argument of four ones and an output of three or four zeros, inside a buffer."""
    buffer = torch.ones(64)
    size = 3 if kernel is _write_outside else 4
    out = torch.zeros(64)[:size]
    triton.jit(kernel)[(programs,)](buffer[8:12], out)
    return out


@pytest.mark.parametrize("message", FAULTS)
def test_fault_is_caught_here_only(message: str) -> None:
    kernel, programs = FAULTS[message]
    with np.errstate(all="ignore"):
        launch(kernel, programs)  # nothing happens
    with sanitize(), pytest.raises((errors.InterpreterError, KernelFault)) as caught:
        launch(kernel, programs)
    assert message.partition(" (")[0] in str(caught.value)


def test_bounds_are_those_of_the_view_not_of_its_storage() -> None:
    launch(_read_before_a_view, 1)
    with sanitize(), pytest.raises((errors.InterpreterError, KernelFault)):
        launch(_read_before_a_view, 1)


# ---------------------------------------------------------------- changed behaviour


def _sum_without_other(a: Any, out: Any, count: Any) -> None:
    lane = tl.arange(0, 4)
    tl.store(out, tl.sum(tl.load(a + lane, mask=lane < count), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_lanes_without_other_hold_nan(dtype: torch.dtype) -> None:
    kernel, out = triton.jit(_sum_without_other), torch.zeros(1, dtype=dtype)
    a = torch.ones(4, dtype=dtype)
    kernel[(1,)](a, out, 3)
    assert out == 3
    with sanitize():
        kernel[(1,)](a, out, 3)
        assert out.isnan()
        kernel[(1,)](a, out, 4)
        assert out == 4


def _square(a: Any, out: Any) -> None:
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(a + at)
    tl.store(out + at, tl.dot(x, x, input_precision="ieee"))


def test_dot_of_bfloat16_is_that_of_tensor_cores() -> None:
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.zeros(16, 16)
    with sanitize() as report:
        triton.jit(_square)[(1,)](a, out)
    torch.testing.assert_close(out, a.float() @ a.float())
    assert report.dot_precisions == {"ieee"}


def _append(out: Any, position: Any) -> None:
    at = tl.atomic_add(position, 1)
    tl.store(out + at, tl.program_id(0))


@pytest.mark.parametrize("reverse", [False, True])
def test_order_of_programs(reverse: bool) -> None:
    out, position = torch.zeros(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with sanitize(reverse=reverse) as report:
        triton.jit(_append)[(5,)](out, position)
    expected = list(range(5))
    assert out.tolist() == (expected[::-1] if reverse else expected)
    assert report.programs == 5


def test_programs_numbered_as_the_last_of_a_large_grid() -> None:
    out, position = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with sanitize(first_program=10**9):
        triton.jit(_append)[(2,)](out, position)
    assert out.tolist() == [10**9, 10**9 + 1]


def test_everything_is_restored_after_a_fault() -> None:
    with pytest.raises((errors.InterpreterError, KernelFault)), sanitize():
        launch(_read_outside, 1)
    launch(_read_outside, 1)
    launch(_write_together, 2)
    assert np.geterr()["invalid"] != "raise"
