"""Modules as plain data, {"class name": {arguments}}, so that JSON and YAML files can hold them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

Spec = Mapping[str, Mapping[str, Any] | None]
"""One class name and its keyword arguments; None for arguments that nobody knows any more."""


def build(what: str, given: nn.Module | Spec, classes: tuple[type[nn.Module], ...]) -> nn.Module:
    """Return `given` if it is a module already, else the module that it describes.

    Args:
        what: name of the argument, for errors.
        given: a module, or a `Spec`.
        classes: those whose names a spec may have.

    Raises:
        ValueError: the spec has another form, names another class, or lost its arguments.
        TypeError: the class does not take these arguments.
    """
    if isinstance(given, nn.Module):
        return given
    known = {each.__name__: each for each in classes}
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ValueError(
            f"{what} must be a module or one class name with its arguments, such as "
            f"{{{classes[0].__name__!r}: {{}}}}; got {given!r}"
        )
    ((name, arguments),) = given.items()
    if arguments is None:
        raise ValueError(
            f"{what} was given as a module ({name}) when it was saved, and its arguments were not "
            f"written: give it again, for example from_pretrained(folder, {what}=...), or build "
            f"the model with {what}={{{name!r}: {{...}}}}"
        )
    if name not in known:
        raise ValueError(f"{what}: there is no {name!r}; choose one of {', '.join(known)}")
    return known[name](**arguments)


def spec_of(given: nn.Module | Spec) -> Spec:
    """Describe what `build` was given: a spec as it is, a module by its class's name alone."""
    if isinstance(given, nn.Module):
        return {type(given).__name__: None}
    return given
