"""The Hugging Face hub's mixin for models where it is installed, else one that says how to get it.

`import rankloss` needs torch only; huggingface_hub and safetensors are the `hub` extra.
"""

from pathlib import Path
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


class SavesSettings(HubMixin):
    """A mixin for modules that are rebuilt from `settings`, their JSON-able arguments."""

    settings: dict[str, Any]

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
        """Write model.safetensors, config.json and a model card into a folder.

        Args:
            save_directory: folder, made if missing.
            options: arguments of huggingface_hub's PyTorchModelHubMixin, such as push_to_hub=True.

        Raises:
            ImportError: huggingface_hub is missing.
        """
        return super().save_pretrained(save_directory, **{"config": self.settings, **options})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, strict: bool = True, **options: Any
    ) -> Any:
        """Rebuild what `save_pretrained` wrote, from a folder or the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder, or a repository's name on the hub.
            strict: raise if weights are missing or unknown.
            options: arguments of huggingface_hub's PyTorchModelHubMixin (map_location, revision,
                ...), and arguments of the class that replace the saved ones. Parts that were given
                as modules must be given again.

        Returns:
            The model, in evaluation mode.

        Raises:
            ImportError: huggingface_hub is missing.
            ValueError: a part that was given as a module is not given again.
        """
        return super().from_pretrained(pretrained_model_name_or_path, strict=strict, **options)
