"""Runs of `python -m rankloss.open_clip` for tests: tiny models, generated data."""

import io
import json
import logging
import os
import tarfile
import unittest.mock
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from rankloss import attachment

PAIRS = 16
VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
COCA = {
    **TINY,
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}
    | {"output_tokens": True},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
# the whole image at its own size: nothing random, so that a resumed run can be compared
SAME_IMAGE = ["scale=(1.0,1.0)", "ratio=(1.0,1.0)"]


def write_models(folder: Path) -> None:
    """Configurations of two models, and weights of one as a teacher."""
    import open_clip

    (folder / "models").mkdir()
    torch.save(open_clip.CLIP(**TINY).state_dict(), folder / "teacher.pt")
    (folder / "models" / "tiny.json").write_text(json.dumps(TINY))
    (folder / "models" / "coca_tiny.json").write_text(json.dumps(COCA))


def write_data(folder: Path) -> None:
    """`pairs.csv` with its images, and the same pairs as `shard-0.tar` and `shard-1.tar`."""
    generator = np.random.default_rng(0)
    rows = ["filepath\ttitle"]
    members: list[list[tuple[str, bytes]]] = [[], []]
    for i in range(PAIRS):
        path = folder / f"{i:03}.png"
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        caption = f"a picture of number {i}"
        rows.append(f"{path}\t{caption}")
        members[i % 2] += [(f"{i:03}.png", path.read_bytes()), (f"{i:03}.txt", caption.encode())]
    for i, files in enumerate(members):
        with tarfile.open(folder / f"shard-{i}.tar", "w") as shard:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")


def arguments(folder: Path, name: str, *more: str, data: str = "csv") -> list[str]:
    files = {"csv": "pairs.csv", "webdataset": "shard-{0..1}.tar"}[data]
    return [
        *("--train-data", str(folder / files), "--train-num-samples", str(PAIRS)),
        *("--dataset-type", data, "--model", "tiny", "--batch-size", "4", "--workers", "0"),
        *("--device", "cpu", "--precision", "fp32", "--lr", "1e-2", "--warmup", "0"),
        *("--lr-scheduler", "const", "--logs", str(folder / "logs"), "--name", name),
        *("--aug-cfg", *SAME_IMAGE, "--rank-transition-dim", "4", *more),
    ]


def launch(folder: Path, port: int, arguments: list[str]) -> dict[str, Any]:
    """Run the launcher as a process that torchrun started would -> the model it trained."""
    import open_clip

    import rankloss.open_clip as launcher

    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    open_clip.add_model_config(folder / "models")
    models: list[torch.nn.Module] = []
    original = attachment.attach

    def remember(model: torch.nn.Module, loss: torch.nn.Module) -> torch.nn.Module:
        models.append(model)
        decoder = getattr(model, "text_decoder", None)
        if decoder is not None:  # open_clip 3.3.0 leaves this one as the memory was
            torch.nn.init.normal_(decoder.text_projection, std=0.1)
        return original(model, loss)

    with warnings.catch_warnings(), unittest.mock.patch.object(launcher, "attach", remember):
        warnings.simplefilter("ignore")  # open_clip's own
        status = launcher.main(arguments)
    for handler in list(logging.getLogger().handlers):  # of the run's log file
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert status == 0
    return {key: value.clone() for key, value in models[0].state_dict().items()}
