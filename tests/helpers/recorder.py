"""A dispatch mode that remembers the largest tensor an implementation makes."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest storage any operation returned, in elements."""

    def __init__(self, *given: Tensor) -> None:
        """Ignore the storages of given tensors, of which views may be made."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.given = {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                if x.untyped_storage().data_ptr() in self.given:
                    continue
                size = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, size)
        return result
