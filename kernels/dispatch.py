"""Choice of the implementation that an op uses, decided by the tensor's own device."""

import os
import warnings

import torch

IMPLEMENTATIONS = ("triton", "blocked", "reference")
"""triton: fused kernels; blocked: streaming PyTorch;
reference: plain PyTorch, materialised, differentiable twice."""

OLDEST_TRITON = (3, 3)  # 3.2 ends the process with a failed assertion when it compiles for sm_90


_said: set[str] = set()  # why "auto" was not triton on a GPU, said once each


def check_impl(impl: str) -> None:
    """Raise a ValueError unless `impl` is "auto" or the name of an implementation."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; choose 'auto' or one of {list(IMPLEMENTATIONS)}")


def choose(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The name of the implementation to run on `device` for scores of `dtype`.

    "auto" is triton on a GPU that can run it, blocked anywhere else; on a GPU that cannot, a
    warning says once which implementation runs, and why.

    Raises:
        ValueError: `impl` is unknown, or cannot run here.
    """
    if impl == "auto":
        if device.type != "cuda":
            return "blocked"
        reason = why_not("triton", device, dtype)
        if reason is None:
            return "triton"
        _say_once(f"impl='auto' runs 'blocked' on {device}, slower than 'triton': {reason}")
        return "blocked"
    reason = why_not(impl, device, dtype)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run on {device}: {reason}")
    return impl


def _say_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


def why_not(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Reason why `impl` cannot run on `device` for scores of `dtype`, or None when it can.

    Raises:
        ValueError: `impl` is unknown.
    """
    check_impl(impl)
    return _why_not_triton(device, dtype) if impl == "triton" else None


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    unusable = _unusable_triton()
    if unusable is not None:
        return unusable
    if dtype == torch.float64:
        return "its kernels compute in float32; use 'blocked' or 'reference' for float64"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and interpreted:
        return None
    if device.type not in ("cuda", "meta"):
        return (
            "its kernels run on CUDA and ROCm GPUs (set TRITON_INTERPRET=1 before the first "
            "import to run them, slowly, on the CPU)"
        )
    too_old = device.type == "cuda" and torch.version.hip is None
    if too_old and torch.cuda.get_device_capability(device) < (8, 0):
        return "its matrix products need compute capability 8.0 or newer"
    return None


def _unusable_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return f"its kernels need triton {wanted} or newer, this is {triton.__version__}"
    return None
