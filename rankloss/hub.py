"""The Hugging Face hub's mixin for models where it is installed, else one that says how to get it.

`import rankloss` needs torch only; huggingface_hub and safetensors are the `hub` extra.
"""

from typing import Any, NoReturn

try:
    from huggingface_hub import PyTorchModelHubMixin as HubMixin
except ImportError:

    class HubMixin:  # type: ignore[no-redef]
        """Stands in for PyTorchModelHubMixin; each of its methods raises ImportError."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
            raise ImportError(_REMEDY)

        def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
            raise ImportError(_REMEDY)

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
            raise ImportError(_REMEDY)


_REMEDY = (
    "saving and loading pretrained models needs huggingface_hub and safetensors; "
    "`pip install 'rankloss[hub]'` installs them"
)

__all__ = ["HubMixin"]
