"""`python -m rankloss`: versions, devices, which implementation runs where, and a self-check."""

import importlib.metadata
import itertools
import platform
import sys
import time
from collections.abc import Callable

import torch

import rankloss
from rankloss import HighOrderPLLoss, TransitionHeads, Transitions, plackett_luce_nll
from rankloss.kernels import IMPLEMENTATIONS, choose, why_not

SELF_CHECK_SECONDS = 10.0


def main() -> int:
    print_versions()
    print_implementations()
    return 0 if self_check() else 1


def print_versions() -> None:
    print(f"rankloss {rankloss.__version__}")
    print(f"  python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "numpy", "einops"):
        print(f"  {name} {_version(name)}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    """The CPU, and every accelerator torch can use."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def print_implementations() -> None:
    print("implementations of plackett_luce")
    for device in devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(f"  {device} ({name}): auto takes {choose('auto', device)!r}")
        for impl in IMPLEMENTATIONS:
            print(f"    {impl}: {why_not(impl, device) or 'can run'}")


def self_check() -> bool:
    """Random problems on every device against float64, until about ten seconds have passed."""
    print(f"self-check ({SELF_CHECK_SECONDS:.0f} s)")
    checks: list[tuple[str, Callable[[int], float], float]] = [
        ("probabilities of all rankings sum to 1", _total_probability_error, 1e-9),
    ]
    for device in devices():
        for impl in IMPLEMENTATIONS:
            if why_not(impl, device) is None:
                checks.append(_against_reference(device, impl, _check_dtype(device, impl)))
    budget = SELF_CHECK_SECONDS / len(checks)
    passed = [_run(name, check, limit, budget) for name, check, limit in checks]
    return all(passed)


def _check_dtype(device: torch.device, impl: str) -> torch.dtype:
    """The most exact one this implementation has on this device."""
    single = device.type == "mps" or why_not(impl, device, torch.float64) is not None
    return torch.float32 if single else torch.float64


def _run(name: str, check: Callable[[int], float], limit: float, seconds: float) -> bool:
    worst, cases, end = 0.0, 0, time.monotonic() + seconds
    while cases == 0 or time.monotonic() < end:
        error = check(cases)
        worst, cases = max(worst, error if error == error else float("inf")), cases + 1
    passed = worst <= limit
    print(f"  {'ok' if passed else 'FAILED'}: {name}; {cases} cases, largest error {worst:.1e}")
    return passed


def _total_probability_error(seed: int) -> float:
    m, order = 4, 1 + seed % 4
    generator = torch.Generator().manual_seed(seed)
    transitions = _random_transitions(m, order, generator)
    scores = torch.randn(1, m, generator=generator, dtype=torch.float64).expand(24, m)
    every = torch.tensor(list(itertools.permutations(range(m))))
    nll = plackett_luce_nll(scores, every, transitions, reduction="none")
    return abs((-nll * m).exp().sum().item() - 1)


def _random_transitions(m: int, order: int, generator: torch.Generator) -> Transitions | None:
    if order < 2:
        return None
    shapes = (order * (order - 1) // 2, m, 8), (order - 1, m, 8)
    return Transitions(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes))


def _against_reference(
    device: torch.device, impl: str, dtype: torch.dtype
) -> tuple[str, Callable[[int], float], float]:
    limit = 1e-9 if dtype == torch.float64 else 1e-3
    return (
        f"{impl} on {device} in {str(dtype).removeprefix('torch.')}",
        lambda seed: _loss_error(seed, device, impl, dtype),
        limit,
    )


def _loss_error(seed: int, device: torch.device, impl: str, dtype: torch.dtype) -> float:
    """Largest difference of loss and feature gradients from the float64 reference on the CPU."""
    order, top_k = seed % 5, (None, 3)[seed % 2]
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 12, 16, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.normalize(features, dim=2)
    results = []
    for where, kind, how in (("cpu", torch.float64, "reference"), (device, dtype, impl)):
        loss = HighOrderPLLoss(16, order, transition_dim=8, top_k=top_k, impl=how)
        for head in (x for x in loss.modules() if isinstance(x, TransitionHeads)):
            head.reset_parameters(generator.manual_seed(seed))
            torch.nn.init.normal_(head.key_weight, generator=generator)
        pair = features.to(where, kind).requires_grad_()
        value = loss.to(where, kind)(pair[0], pair[1], 20.0)
        (gradient,) = torch.autograd.grad(value, pair)
        results.append(torch.cat([value.detach().reshape(1), gradient.flatten()]).cpu().double())
    return float((results[0] - results[1]).abs().max())


if __name__ == "__main__":
    sys.exit(main())
