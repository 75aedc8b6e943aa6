"""Turns Triton's interpreter into a sanitizer: what goes wrong silently on a GPU raises here.

    with sanitize():
        kernel[grid](...)

Inside the block a launch raises when a program

- reads or writes outside the tensors it was given,
- touches an element that another program writes, or writes one element from two lanes,
- overflows a 32-bit integer, say in an offset that needs 64 bits,
- computes NaN from numbers (inf - inf, 0 * inf), overflows a float, or divides by zero,
- does arithmetic in bfloat16, which the interpreter would do on the bit patterns,
- multiplies matrices with a side below the 16 that GPUs need.

Masked-off lanes of a load without `other` hold NaN instead of the interpreter's zeros, and dot
products of bfloat16 matrices are computed as tensor cores do. Programs can run in reverse order,
or numbered as if they were the last of a huge grid.

All this replaces methods of private classes, so `test_sanitizer.py` shows on every Triton version
that each fault is still caught. Where the interpreter has other insides, or is not in use,
`sanitize` changes nothing and `WHY_NOT` says so.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

Addresses = npt.NDArray[np.uint64]

PATCHED = {
    "InterpreterBuilder": (
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "create_atomic_cas",
        "create_dot",
        "create_fma",
        "binary_op",
        "unary_op",
        "cast_impl",
        "set_grid_idx",
    ),
    "GridExecutor": ("_init_args_hst",),
    "ReduceScanOpInterface": ("apply",),
}
USED = ("interpreter_builder", "InterpreterOptions", "TensorHandle", "_get_np_dtype")


def _why_not() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 is not set"
    for owner, names in PATCHED.items():
        for name in names:
            if not hasattr(getattr(interpreter, owner, None), name):
                return f"this Triton's interpreter has no {owner}.{name}"
    missing = [name for name in USED if not hasattr(interpreter, name)]
    return f"this Triton's interpreter has no {missing[0]}" if missing else None


WHY_NOT = _why_not()
"""Reason why the sanitizer does nothing here, or None when it works."""


class KernelFault(AssertionError):
    """A kernel did something that is undefined, or wrong, on a GPU."""


@dataclass
class Report:
    """Record of the launches inside a `sanitize` block."""

    programs: int = 0
    dot_precisions: set[str] = field(default_factory=set)
    dot_flops: int = 0


@contextmanager
def sanitize(
    *, races: bool = True, reverse: bool = False, first_program: int = 0
) -> Iterator[Report]:
    """Check every launch inside the block.

    Args:
        races: watch which program touches which element; takes memory as large as the tensors.
        reverse: run programs from the last to the first.
        first_program: number added to program ids along axis 0, so that a small grid acts as the
            end of a large one.
    """
    report = Report()
    if WHY_NOT is not None:
        yield report
        return
    patches = _Checks(report, races, reverse, first_program).patches()
    owners = [getattr(interpreter, owner) for owner in PATCHED]
    before = [
        (owner, name, getattr(owner, name))
        for owner, names in zip(owners, PATCHED.values(), strict=True)
        for name in names
    ]
    builder = interpreter.interpreter_builder
    options = builder.options
    try:
        for owner, name, original in before:
            setattr(owner, name, patches[name](original))
        builder.options = interpreter.InterpreterOptions(debug=True)  # asserts 32-bit arithmetic
        with np.errstate(invalid="raise", over="raise", divide="raise"):
            yield report
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
        builder.options = options


# ---------------------------------------------------------------- memory

SEVERAL = -1  # read by more than one program


class _Region:
    """The elements of one tensor argument, and who wrote and read them: 0 nobody, else program."""

    def __init__(self, tensor: torch.Tensor, races: bool) -> None:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        elements = last + 1 if tensor.numel() else 0
        self.size = tensor.element_size()
        self.start = tensor.data_ptr()
        self.end = self.start + elements * self.size
        self.writers = np.zeros(elements if races else 0, np.int32)
        self.readers = np.zeros(elements if races else 0, np.int32)


class _Memory:
    """The memory that one launch may touch."""

    def __init__(self, arguments: list[Any], races: bool) -> None:
        self.races = races
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        self.regions = list(
            {(t.data_ptr(), t.numel()): _Region(t, races) for t in tensors}.values()
        )

    def check(self, addresses: Addresses, size: int, kind: str, program: int) -> None:
        """Raise unless `program` may load, store or update `size` bytes at every address."""
        remaining = addresses
        for region in self.regions:
            inside = (remaining >= region.start) & (remaining + np.uint64(size) <= region.end)
            if self.races and kind != "update" and inside.any():
                offsets = (remaining[inside] - np.uint64(region.start)).astype(np.int64)
                self._check_races(region, offsets // region.size, kind, program)
            remaining = remaining[~inside]
        if remaining.size:
            raise KernelFault(
                f"out of bounds: {kind} of program {program - 1} at {remaining.size} of "
                f"{addresses.size} addresses"
            )

    def _check_races(
        self, region: _Region, elements: npt.NDArray[np.int64], kind: str, program: int
    ) -> None:
        writers, readers = region.writers[elements], region.readers[elements]
        if ((writers != 0) & (writers != program)).any():
            raise KernelFault(f"race: {kind} of program {program - 1} where another one wrote")
        if kind == "load":
            alone = (readers == 0) | (readers == program)
            region.readers[elements] = np.where(alone, program, SEVERAL)
            return
        if ((readers != 0) & (readers != program)).any():
            raise KernelFault(f"race: store of program {program - 1} where another one read")
        if len(np.unique(elements)) < len(elements):
            raise KernelFault(f"race: two lanes of program {program - 1} store to one element")
        region.writers[elements] = program


# ---------------------------------------------------------------- checks

Patch = Callable[[Any], Callable[..., Any]]  # the original method to its replacement


class _Checks:
    """Replacements of the interpreter's methods; each checks, then calls the original."""

    def __init__(self, report: Report, races: bool, reverse: bool, first_program: int) -> None:
        self.report, self.races = report, races
        self.reverse, self.first_program = reverse, first_program
        self.memory = _Memory([], races)
        self.program = 0  # number of the running program, from 1

    def patches(self) -> dict[str, Patch]:
        """By name of the method each replaces."""
        arithmetic = ("create_fma", "binary_op", "unary_op")
        return {
            "create_masked_load": self._load,
            "create_masked_store": self._store,
            "create_atomic_rmw": self._atomic_rmw,
            "create_atomic_cas": self._atomic_cas,
            "create_dot": self._dot,
            "cast_impl": self._cast,
            "set_grid_idx": self._set_grid_idx,
            "_init_args_hst": self._init_args,
            "apply": self._reduce,
            **dict.fromkeys(arithmetic, self._arithmetic),
        }

    # launches

    def _init_args(self, original: Any) -> Callable[..., Any]:
        def replacement(executor: Any, args: Any, kwargs: Any) -> Any:
            on_host = original(executor, args, kwargs)
            self.memory = _Memory([*on_host[0], *on_host[1].values()], self.races)
            return on_host

        return replacement

    def _set_grid_idx(self, original: Any) -> Callable[..., Any]:
        def replacement(builder: Any, *index: int) -> None:
            if self.reverse:
                index = tuple(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True))
            x, y, z = index
            self.program = 1 + x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
            self.report.programs += 1
            builder.grid_idx = (x + self.first_program, y, z)

        return replacement

    # memory

    def _check(self, pointers: Any, mask: npt.NDArray[Any] | None, kind: str) -> None:
        addresses = pointers.data if mask is None else pointers.data[mask.astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.memory.check(np.ravel(addresses).astype(np.uint64), size, kind, self.program)

    def _load(self, original: Any) -> Callable[..., Any]:
        def replacement(
            builder: Any, pointers: Any, mask: Any, other: Any, *a: Any, **k: Any
        ) -> Any:
            self._check(pointers, mask.data, "load")
            element = pointers.get_element_ty()
            if other is None and element.is_floating() and not mask.data.all():
                other = _nans(pointers.data.shape, element)
            return original(builder, pointers, mask, other, *a, **k)

        return replacement

    def _store(self, original: Any) -> Callable[..., Any]:
        def replacement(builder: Any, pointers: Any, value: Any, mask: Any, *a: Any) -> Any:
            self._check(pointers, mask.data, "store")
            return original(builder, pointers, value, mask, *a)

        return replacement

    def _atomic_rmw(self, original: Any) -> Callable[..., Any]:
        def replacement(
            builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *a: Any
        ) -> Any:
            self._check(pointers, mask.data, "update")
            return original(builder, op, pointers, value, mask, *a)

        return replacement

    def _atomic_cas(self, original: Any) -> Callable[..., Any]:
        def replacement(builder: Any, pointers: Any, *a: Any) -> Any:
            self._check(pointers, None, "update")
            return original(builder, pointers, *a)

        return replacement

    # arithmetic

    def _arithmetic(self, original: Any) -> Callable[..., Any]:
        def replacement(builder: Any, *operands: Any) -> Any:
            _refuse_bfloat16(*(x for x in operands if hasattr(x, "dtype")))
            return original(builder, *operands)

        return replacement

    def _reduce(self, original: Any) -> Callable[..., Any]:
        def replacement(operation: Any, operand: Any) -> Any:
            tensors = operand if isinstance(operand, tuple) else (operand,)
            _refuse_bfloat16(*tensors)
            return original(operation, operand)

        return replacement

    def _cast(self, original: Any) -> Callable[..., Any]:
        def replacement(builder: Any, source: Any, to: Any) -> Any:
            types = {source.dtype.scalar, to.scalar}
            if tl.bfloat16 in types and not types <= {tl.bfloat16, tl.float32}:
                raise KernelFault(f"bfloat16: cast of {source.dtype} to {to} works on bit patterns")
            return original(builder, source, to)

        return replacement

    def _dot(self, original: Any) -> Callable[..., Any]:
        def replacement(builder: Any, a: Any, b: Any, c: Any, precision: Any, *rest: Any) -> Any:
            sides = (*a.data.shape[-2:], b.data.shape[-1])
            if min(sides) < 16:
                raise KernelFault(f"dot of {a.data.shape} and {b.data.shape}: a side is below 16")
            self.report.dot_flops += 2 * sides[0] * sides[1] * sides[2]
            self.report.dot_precisions.add(str(precision).rpartition(".")[2].lower())
            return original(builder, _widened(a), _widened(b), c, precision, *rest)

        return replacement


def _nans(shape: tuple[int, ...], element: Any) -> Any:
    """A handle whose every element is NaN."""
    bits = element == tl.bfloat16  # held as bit patterns
    fill = np.full(shape, 0x7FC0 if bits else np.nan, interpreter._get_np_dtype(element))
    return interpreter.TensorHandle(fill, element)


def _widened(handle: Any) -> Any:
    """bfloat16 as float32, exactly; anything else as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    widened = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return interpreter.TensorHandle(widened, tl.float32)


def _refuse_bfloat16(*operands: Any) -> None:
    if any(x.dtype.scalar == tl.bfloat16 for x in operands):
        raise KernelFault("bfloat16: arithmetic works on bit patterns; use .to(tl.float32) first")
