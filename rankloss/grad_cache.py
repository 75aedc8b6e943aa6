"""Exact gradients of a large batch in the memory of a small one, by caching features.

Contrastive losses compare every sample with every other, so the gradient of a large batch is not
the mean of the gradients of its parts. In parts: encode all of them without gradient; give the
loss all features, for a gradient to each; encode each part again, with gradient, and pass its
features' gradient on. Source: GradCache, Gao et al. 2021.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Outputs = dict[str, Any]
Value = Tensor | dict[str, Tensor]


class GradCache:
    """Backward pass of a loss over all parts of a batch, with one part's activations at a time.

    The gradient left in `.grad` is that of encoding all parts at once, up to rounding: for towers,
    logit scale and the loss's own parameters, with dropout (the second pass draws the same random
    numbers), and under DDP or FSDP2 (gradients cross processes once, in the last part's backward
    pass). It costs a second forward pass. Batch normalisation is the exception: its statistics are
    each part's, and are updated twice.

    Args:
        encode: maps a part to its outputs by name, e.g. {"image_features": (n, D),
            "text_features": (n, D), "logit_scale": ()}. Tensors are joined along their first
            dimension, lists end to end; 0-D tensors, the names in `shared`, and anything else are
            taken to be the same for all parts.
        loss: called with all joined outputs as keywords; returns a scalar, or a dict of scalars
            whose sum is the loss.
        modules: modules under DDP or FSDP2 that `encode` uses; None takes `encode` itself if it is
            a module. Parameters of the loss must belong to one of them, to be equal on all
            processes; under FSDP2 the loss must be a unit of its own, or be called through the
            forward of the module it belongs to.
        shared: names of outputs that are not one row a sample.
        autocast: makes the context that `encode` and `loss` run in, e.g.
            `partial(torch.autocast, "cuda", torch.bfloat16)`; the backward pass runs outside.
        scaler: multiplies the loss before the backward pass, for float16.

    >>> from rankloss import ClipLoss
    >>> towers = torch.nn.ModuleDict({"image": nn.Linear(5, 4), "text": nn.Linear(6, 4)})
    >>> def encode(part):
    ...     images, texts = (nn.functional.normalize(x, dim=1) for x in
    ...                      (towers["image"](part[0]), towers["text"](part[1])))
    ...     return {"image_features": images, "text_features": texts}
    >>> parts = [(torch.randn(2, 5), torch.randn(2, 6)) for _ in range(4)]
    >>> value = GradCache(encode, ClipLoss())(parts, logit_scale=10.0)
    >>> towers["image"].weight.grad.shape
    torch.Size([4, 5])
    """

    def __init__(
        self,
        encode: Callable[[Any], Mapping[str, Any]],
        loss: Callable[..., Value],
        *,
        modules: Sequence[nn.Module] | None = None,
        shared: Collection[str] = ("logit_scale", "logit_bias"),
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if modules is None:
            modules = [encode] if isinstance(encode, nn.Module) else []
        self.encode, self.loss, self.modules = encode, loss, list(modules)
        self.shared, self.autocast, self.scaler = frozenset(shared), autocast, scaler
        self._compared = False

    def __call__(self, parts: Sequence[Any], **loss_arguments: Any) -> Value:
        """Add the gradient of the loss of all parts to `.grad`.

        Args:
            parts: what `encode` takes, one after the other; their sizes may differ.
            loss_arguments: more keywords for the loss, e.g. `image_ids` of all parts.

        Returns:
            What the loss returned, detached.

        Raises:
            ValueError: there are no parts, or the loss has parameters in a DDP module with
                find_unused_parameters=True, which would take them for unused.
            RuntimeError: in the first call, a part's outputs differ the second time.
        """
        if not parts:
            raise ValueError("GradCache: there must be at least one part")
        if len(parts) == 1:
            outputs = self._encode(parts[0])
            value, total = self._evaluate({**outputs, **loss_arguments})
            total.backward()  # type: ignore[no-untyped-call]
            return value
        cached, states = self._cache(parts)
        leaves = {name: self._joined(name, cached) for name in cached[0]}
        with _without_sync(self._parallel()):  # the loss may be called through one of them
            value, total = self._evaluate({**leaves, **loss_arguments})
            own = self._parameters_to_announce(total)
            total.backward()  # type: ignore[no-untyped-call]
        gradients = self._gradients_by_part(leaves, cached)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else _without_sync(self.modules):
                with _replayed(states[i]):
                    outputs = self._encode(part)
                if not self._compared:
                    _compare(outputs, cached[i])
                _backward(outputs, gradients[i], own if last else [])
        self._compared = True
        return value

    def _encode(self, part: Any) -> Outputs:
        with self.autocast():
            return dict(self.encode(part))

    def _evaluate(self, keywords: Outputs) -> tuple[Value, Tensor]:
        """Value of the loss, detached, and what to call backward on."""
        with self.autocast():
            value = self.loss(**keywords)
        terms = value if isinstance(value, dict) else {"loss": value}
        total = torch.stack([x.reshape(()) for x in terms.values()]).sum()
        detached = {name: x.detach() for name, x in terms.items()}
        if self.scaler is not None:
            total = self.scaler.scale(total)
        return (detached if isinstance(value, dict) else detached["loss"]), total

    def _cache(self, parts: Sequence[Any]) -> tuple[list[Outputs], list["_RandomState"]]:
        """Outputs of every part, without gradient, and the random state that each began with."""
        outputs, states = [], []
        with torch.no_grad():
            for part in parts:
                states.append(_RandomState())
                outputs.append(self._encode(part))
        torch.clear_autocast_cache()  # weights cast without gradient are of no use from here on
        return outputs, states

    def _is_shared(self, name: str, value: object) -> bool:
        rows = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
        return name in self.shared or not rows

    def _joined(self, name: str, outputs: Sequence[Outputs]) -> Any:
        """One output of all parts, with a gradient of its own where it can have one."""
        values = [x[name] for x in outputs]
        joined = values[-1]
        if not self._is_shared(name, joined):
            if isinstance(joined, list):
                return [item for value in values for item in value]
            joined = torch.cat(values)
        if isinstance(joined, Tensor):
            joined = joined.detach().requires_grad_(joined.is_floating_point())
        return joined

    def _gradients_by_part(
        self, leaves: Outputs, outputs: Sequence[Outputs]
    ) -> list[dict[str, Tensor]]:
        """Each part's gradients of its outputs; those of shared outputs go to the last part."""
        parts: list[dict[str, Tensor]] = [{} for _ in outputs]
        for name, leaf in leaves.items():
            if not isinstance(leaf, Tensor) or leaf.grad is None:
                continue
            if self._is_shared(name, leaf):
                parts[-1][name] = leaf.grad
                continue
            rows = [len(x[name]) for x in outputs]
            for part, gradient in zip(parts, torch.split(leaf.grad, rows), strict=True):
                part[name] = gradient
        return parts

    def _parallel(self) -> list[DistributedDataParallel]:
        return [m for m in self.modules if isinstance(m, DistributedDataParallel)]

    def _parameters_to_announce(self, total: Tensor) -> list[Tensor]:
        """Parameters in DDP modules that the loss itself uses.

        DDP shares gradients in the last part's backward pass, once every parameter had its turn.
        """
        parallel = self._parallel()
        if not parallel:
            return []
        used = _leaves_of(total)
        announced: list[Tensor] = []
        for module in parallel:
            own = [p for p in module.parameters() if p in used]
            if own and module.find_unused_parameters:
                raise ValueError(
                    "GradCache: the loss has parameters in a DistributedDataParallel module with "
                    "find_unused_parameters=True, which would not share their gradients; wrap "
                    "the model with find_unused_parameters=False"
                )
            announced += own
        if len(parallel) == len(self.modules):
            self._warn_of_strays([p for p in used - set(announced) if isinstance(p, nn.Parameter)])
        return announced

    def _warn_of_strays(self, strays: Sequence[Tensor]) -> None:
        if strays and not self._compared:
            shapes = [tuple(p.shape) for p in strays]
            warnings.warn(
                f"GradCache: the loss uses parameters of shapes {shapes} that are in none of the "
                "DistributedDataParallel modules, so that every process trains its own copy; make "
                "the loss a submodule of the model before wrapping it (rankloss.attach)",
                stacklevel=4,
            )


def _backward(outputs: Outputs, gradients: dict[str, Tensor], own: Sequence[Tensor]) -> None:
    """Pass gradients of outputs on; `own` parameters, which have theirs, receive a zero."""
    names = [name for name in gradients if outputs[name].requires_grad]
    roots = [outputs[name] for name in names] + list(own)
    values = [gradients[name].to(outputs[name].dtype) for name in names]
    values += [torch.zeros_like(p) for p in own]
    if roots:
        torch.autograd.backward(roots, values)


def _leaves_of(total: Tensor) -> set[Tensor]:
    """Tensors that a backward pass of `total` leaves a gradient in."""
    leaves, seen, nodes = set(), set(), [total.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [parent for parent, _ in node.next_functions]
    return leaves


def _compare(outputs: Outputs, cached: Outputs) -> None:
    for name, before in cached.items():
        if not isinstance(before, Tensor) or not before.is_floating_point():
            continue
        x, y = outputs[name].detach().float(), before.float()
        if (x - y).norm() > 1e-2 * y.norm():
            raise RuntimeError(
                f"GradCache: {name} of a part differs when the part is encoded again, so that its "
                "gradient would be wrong; encode must depend on its part, on parameters and on "
                "torch's default generators alone (no numpy or Python randomness, no state that "
                "a forward pass changes)"
            )


@contextmanager
def _without_sync(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gradients add up in this process until a later backward pass shares them."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
                continue
            share: Any = getattr(module, "set_requires_gradient_sync", None)  # FSDP2's
            if share is not None:
                share(False)
                stack.callback(share, True)
        yield


class _RandomState:
    """State of torch's default generators: the CPU's, and the current GPU's if it is in use."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        gpu: Any = torch.cuda
        self.gpu = gpu.get_rng_state() if gpu.is_initialized() else None


@contextmanager
def _replayed(state: _RandomState) -> Iterator[None]:
    """Draw the random numbers that followed `state`; afterwards go on where things were."""
    devices = [] if state.gpu is None else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(state.cpu)
        if state.gpu is not None:
            torch.cuda.set_rng_state(state.gpu)
        yield
