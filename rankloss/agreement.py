"""A small message that processes exchange before their batches, so that none waits for ever.

Collectives of sizes or numbers that differ hang or abort the processes. The message tells what
each process is about to exchange; where they differ, every process raises the same ValueError.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # numbered from 1
REMEDY = "every process must hold the same number of pairs; use drop_last=True in the loader"


class Message(NamedTuple):
    """A process's account of its batch, as integers; all zero where it refused its own input.

    Attributes:
        valid: 1, or 0 where this process raises an error of its own.
        rows, width: n and D of the features.
        dtypes: number of each feature tensor's dtype, a decimal digit each.
        ids: which of image_ids (1) and text_ids (2) are given.
        gradients: which feature tensors will send gradients to other processes, a bit each.
    """

    valid: int
    rows: int
    width: int
    dtypes: int
    ids: int
    gradients: int

    @classmethod
    def about(
        cls,
        features: Sequence[Tensor],
        ids: Sequence[Tensor | None] = (),
        *,
        gather_with_grad: bool,
    ) -> "Message":
        """Describe (n, ...) features, all of one shape, and the ids that go with them."""
        first = features[0]
        dtypes = gradients = present = 0
        sends = gather_with_grad and torch.is_grad_enabled()
        for bit, x in enumerate(features):
            dtypes = 10 * dtypes + (DTYPES.index(x.dtype) + 1 if x.dtype in DTYPES else 0)
            gradients += (sends and x.requires_grad) << bit
        for bit, y in enumerate(ids):
            present += (y is not None) << bit
        width = 1
        for size in first.shape[1:]:
            width = width * size
        return cls(1, first.shape[0], width, dtypes, present, gradients)

    def __str__(self) -> str:
        if not self.valid:
            return "refused its input, and says why in an error of its own"
        digits = [int(digit) for digit in str(self.dtypes)]
        dtypes = [str(DTYPES[i - 1]) if i else "another dtype" for i in digits]
        ids = ("none", "image_ids", "text_ids", "image_ids and text_ids")[self.ids]
        gradients = [bool(self.gradients >> bit & 1) for bit in range(len(digits))]
        return (
            f"n={self.rows}, D={self.width}, {', '.join(dtypes)}, ids: {ids}, "
            f"gradients: {gradients}"
        )


REFUSED = Message(0, 0, 0, 0, 0, 0)
_confirmed: set[tuple[str, Message]] = set()  # read and found right, by name of the group


def agree(message: Message, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare messages, one collective of a few bytes; raise on every process if they differ.

    Messages of CPU tensors are always read. On a GPU reading waits for it, so a message is read
    the first time that this process sends it (each batch size once), and from then on compared on
    the device, where a difference fails a device-side assertion before anything hangs. With
    TORCH_DISTRIBUTED_DEBUG set to INFO or DETAIL every message is read. Under torch.compile none
    is, and the CPU's assertion raises RuntimeError.

    Raises:
        ValueError: the messages differ.
    """
    own = torch.stack([torch.full((), x, dtype=torch.int64, device=device) for x in message])
    table = own.new_empty(dist.get_world_size(group) * len(message))
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(table, own, group=group)
    table = table.view(-1, len(message))
    if torch.compiler.is_compiling() or not _reads(message, group, device):
        text = f"processes disagree about what to gather: {REMEDY}, the same D, dtypes and ids"
        torch._assert_async((table == own).all(), text)
        return
    messages = [Message(*row) for row in table.tolist()]
    if any(x != message for x in messages):
        raise ValueError(_difference(messages))
    _confirmed.add((group.group_name, message))


def _reads(message: Message, group: dist.ProcessGroup, device: torch.device) -> bool:
    if device.type == "cpu" or (group.group_name, message) not in _confirmed:
        return True
    level: Any = dist  # its stubs leave these two names out
    return bool(level.get_debug_level() != level.DebugLevel.OFF)


def _difference(messages: list[Message]) -> str:
    rows = [x.rows for x in messages]
    if all(x.valid for x in messages) and len(set(rows)) > 1:
        return f"uneven local batches {rows}: {REMEDY}"
    each = "; ".join(f"process {rank}: {x}" for rank, x in enumerate(messages))
    return (
        "processes disagree about what to gather, and would wait for each other for ever "
        f"({each}); give every process features of one width and dtype, with gradient on all or "
        "none, and the same ids, or evaluate on one process with local=True"
    )
