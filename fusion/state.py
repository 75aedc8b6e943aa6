"""The tensors that a module is made of, whatever its state_dict leaves out."""

from torch import Tensor, nn


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Name every parameter and persistent buffer, as state_dict does without hooks."""
    found: dict[str, Tensor] = {}
    for path, each in module.named_modules(remove_duplicate=False):
        here = {**each._parameters, **each._buffers}
        for name, value in here.items():
            if value is not None and name not in each._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = value
    return found
