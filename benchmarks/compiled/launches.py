"""Records what the ops launch, running nothing: tensors may be on the meta device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = {"num_warps": 4, "num_stages": 3}  # Triton's, of launches that name none


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name, constants and options apart."""

    kernel: Any  # a @triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).removesuffix("_kernel")

    def signature(self) -> dict[str, str]:
        """Types of the arguments as the compiler names them."""
        pointers = {n: f"*{TYPES[x.dtype]}" for n, x in self.arguments.items() if _is_tensor(x)}
        return {n: pointers.get(n, "i32") for n in self.arguments}

    def unspecialised(self) -> set[str]:
        """Arguments that the kernel is not specialised on, whatever their value."""
        if hasattr(self.kernel, "params"):
            return {p.name for p in self.kernel.params if p.do_not_specialize}
        return set(self.kernel.kwargs.get("do_not_specialize") or ())  # interpreted

    def multiples_of_16(self) -> list[str]:
        """Arguments that the kernel is specialised on as divisible by 16."""
        fixed = self.unspecialised()
        sizes = {n for n, x in self.arguments.items() if not _is_tensor(x) and x % 16 == 0}
        return [n for n, x in self.arguments.items() if _is_tensor(x) or n in sizes - fixed]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def lists(n: int, k: int, m: int, order: int, r: int, dtype: torch.dtype) -> Any:
    """Arguments of the ops for n anchors that rank k of m candidates, on the default device."""
    from rankloss.kernels.signature import Lists

    return Lists(
        torch.empty(n, m),
        torch.empty(n, k, dtype=torch.int64),
        torch.empty(n, dtype=torch.int64),
        torch.empty(k),
        torch.empty(order * (order - 1) // 2, m, r, dtype=dtype),
        torch.empty(order - 1, m, r, dtype=dtype),
    )


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.fn, self.kernel, self.launches = kernel.fn, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            chosen = {n: options.pop(n, default) for n, default in OPTIONS.items()}
            if "maxnreg" in options:
                chosen["maxnreg"] = options.pop("maxnreg")
            names = self.fn.__code__.co_varnames
            arguments = dict(zip(names, args, strict=False))
            self.launches.append(Launch(self.kernel, grid, arguments, options, chosen))

        return launch


@contextmanager
def recorded(*modules: ModuleType, architecture: str | None = None) -> Iterator[list[Launch]]:
    """Collect the launches of the modules' kernels, none of which runs.

    Args:
        architecture: whose launch configurations are taken; None is that of the tensors' device.
    """
    from rankloss.kernels import configurations

    launches: list[Launch] = []
    before: list[tuple[ModuleType, str, Any]] = []
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                before.append((module, name, value))
    if architecture is not None:
        before.append((configurations, "architecture", configurations.architecture))
    try:
        for module, name, value in before:
            stub = (lambda _: architecture) if name == "architecture" else None
            setattr(module, name, stub or _Recorder(value, launches))
        yield launches
    finally:
        for module, name, value in before:
            setattr(module, name, value)
