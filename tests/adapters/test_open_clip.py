"""`python -m rankloss.open_clip` against the installed open_clip trainer."""

import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankloss import HighOrderPLLoss, attach, export
from tests.adapters.open_clip_runs import TINY, arguments, launch, write_data, write_models
from tests.helpers.processes import ProcessGroup

Run = dict[str, Tensor]
KEYS = "rank_loss.transition_heads.0.key_weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    write_models(folder)
    write_data(folder)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(two: ProcessGroup, folder: Path, name: str, *more: str, data: str = "csv") -> list[Run]:
    line = arguments(folder, name, *more, data=data)
    return two.run(launch, folder, free_port(), line)


def checkpoint(folder: Path, name: str, epoch: int) -> dict[str, Any]:
    path = folder / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt"
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def assert_equal(a: Run, b: Run) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def test_two_processes_train_save_resume_and_export(folder: Path, two: ProcessGroup) -> None:
    first, second = run(two, folder, "whole", "--rank-order", "3", "--epochs", "2")
    assert_equal(first, second)
    assert first[KEYS].abs().max() > 0  # keys start at zero: the optimizer moved them
    saved = checkpoint(folder, "whole", 2)["state_dict"]
    assert_equal({key.removeprefix("module."): value for key, value in saved.items()}, first)

    run(two, folder, "part", "--rank-order", "3", "--epochs", "1")
    resume = str(folder / "logs/part/checkpoints/epoch_1.pt")
    resumed = run(two, folder, "rest", "--rank-order", "3", "--epochs", "2", "--resume", resume)
    assert_equal(resumed[0], first)

    import open_clip

    target = folder / "bare.pt"
    weights = export(folder / "logs/whole/checkpoints/epoch_2.pt", target)
    open_clip.add_model_config(folder / "models")
    model = open_clip.create_model("tiny", pretrained=str(target))
    assert_equal(dict(model.state_dict()), weights)


@pytest.mark.parametrize(
    ("data", "more", "moved"),
    [
        ("webdataset", ("--accum-freq", "2"), KEYS),
        ("csv", ("--siglip",), "rank_loss.ranking.transition_heads.0.key_weight"),
        ("csv", ("--model", "coca_tiny"), "text_decoder.text_projection"),
        ("csv", ("--rank-order", "1", "--rank-ramp"), "logit_scale"),
        ("csv", ("--distill-model", "tiny", "--distill-pretrained", "teacher.pt"), KEYS),
    ],
    ids=["webdataset", "siglip", "coca", "rankclip", "distilled"],
)
def test_kinds_of_runs(
    folder: Path, two: ProcessGroup, data: str, more: tuple[str, ...], moved: str
) -> None:
    """Every process ends with the same, trained, finite parameters."""
    name = f"{data}{''.join(more)}"
    paths = [str(folder / x) if x.endswith(".pt") else x for x in more]
    options = "--epochs", "1", "--rank-order", "2", *paths
    first, second = run(two, folder, name, *options, data=data)
    assert_equal(first, second)
    assert all(x.isfinite().all() for x in first.values() if x.is_floating_point())
    log = (folder / "logs" / name / "out.log").read_text()
    assert "Ranking_loss" in log
    assert ("Caption_loss" in log) == ("coca_tiny" in more)
    assert ("Distill_loss" in log) == ("--distill-model" in more)
    assert first[moved].abs().max() > 0


class Batches:
    """As much as `train_one_epoch` asks of open_clip's data."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.dataloader = batches, self
        self.num_batches, self.num_samples = len(batches), sum(len(x) for x, _ in batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        pass


def gradients_of_a_step(accum_freq: int, siglip: bool) -> Run:
    """Gradients that open_clip's trainer hands its optimizer, of 8 pairs in `accum_freq` parts."""
    import open_clip
    from open_clip_train.train import train_one_epoch

    from rankloss.open_clip import OpenClipLoss, build_loss

    torch.manual_seed(0)
    bias = {"init_logit_bias": -10.0} if siglip else {}
    model = open_clip.CLIP(**TINY, output_dict=True, **bias)
    args = Namespace(
        model="tiny", siglip=siglip, accum_freq=accum_freq, device="cpu", precision="fp32"
    )
    loss = attach(model, build_loss(16, parsed("--rank-transition-dim", "4"), args))
    with torch.no_grad():  # at zero keys, predecessors have no gradient
        for name, p in loss.named_parameters():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    images, texts = torch.randn(8, 3, 32, 32), torch.randint(1, 1000, (8, 16))
    part = 8 // accum_freq
    batches = [(images[i : i + part], texts[i : i + part]) for i in range(0, 8, part)]
    found: Run = {}

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found[name] = p.grad.clone()

    vars(args).update(
        distill=False, skip_scheduler=True, horovod=False, grad_clip_norm=None, wandb=False,
        rank=0, local_rank=0, world_size=1, log_every_n_steps=1, batch_size=part,
    )  # fmt: skip
    optimizer = Optimizer(model.parameters(), lr=0.0)
    data = {"train": Batches(batches)}
    train_one_epoch(model, data, OpenClipLoss(loss), 0, optimizer, None, None, None, args)
    return found


@pytest.mark.parametrize("siglip", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(siglip: bool) -> None:
    """Heads, scale and bias too: open_clip's own losses give `accum_freq` times as much."""
    whole, parts = gradients_of_a_step(1, siglip), gradients_of_a_step(4, siglip)
    assert whole.keys() == parts.keys()
    assert {"logit_scale", *(("logit_bias",) if siglip else ())} < whole.keys()
    for key, value in whole.items():
        atol = 1e-5 * float(value.abs().max())
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=atol)


def parsed(*line: str) -> Namespace:
    from rankloss.open_clip import _parser

    return _parser().parse_args(list(line))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--horovod"], "use torchrun"),
        (["--torchscript"], "cannot hold the loss"),
        (["--distill-model", "tiny", "--accum-freq", "2"], "distils neither with --accum-freq"),
    ],
)
def test_what_cannot_be_combined_is_said_at_once(
    folder: Path, flags: list[str], message: str
) -> None:
    from rankloss.open_clip import main

    with pytest.raises(ValueError, match=message):
        main(arguments(folder, "refused", *flags))


def test_trainer_is_left_as_it_was(folder: Path) -> None:
    import open_clip_train.data
    import open_clip_train.main as trainer

    from rankloss.open_clip import main

    parallel = torch.nn.parallel
    before = {**vars(trainer)}, {**vars(open_clip_train.data)}, {**vars(parallel)}
    with pytest.raises(ValueError, match="use torchrun"):
        main(arguments(folder, "refused", "--horovod"))
    after = vars(trainer), vars(open_clip_train.data), vars(parallel)
    assert before == after


def test_outputs_nobody_takes_are_named() -> None:
    from rankloss.open_clip import OpenClipLoss

    features = torch.eye(4)
    with pytest.raises(TypeError, match=r"also returned \['logits'\].*auxiliary="):
        OpenClipLoss(HighOrderPLLoss(order=1))(
            image_features=features, text_features=features, logit_scale=10.0, logits=features
        )


def test_keywords_of_open_clips_loss() -> None:
    from rankloss.open_clip import translate_keywords

    given: dict[str, Any] = {"local_loss": True, "gather_with_grad": True, "cache_labels": True}
    given |= {"rank": 0, "world_size": 1, "use_horovod": False}
    loss = HighOrderPLLoss(16, order=2, **translate_keywords(**given))
    assert (loss.local_loss, loss.world_size) == (True, 1)


def test_help_has_both_kinds_of_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    from rankloss.open_clip import main

    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "--rank-order" in text
    assert "--accum-freq" in text


def test_task_of_the_main_branch() -> None:
    """Against a checkout of open_clip's main branch where one is installed; else its absence."""
    import open_clip

    from rankloss.open_clip import ranking_task

    model: Any = open_clip.CLIP(**TINY, output_dict=True)
    loss = HighOrderPLLoss(16, order=2)
    if not hasattr(open_clip, "create_task"):  # a release
        with pytest.raises(ImportError, match="with a release run"):
            ranking_task(model, loss)
        return
    task: Any = ranking_task(model, loss)
    batch = {"image": torch.randn(4, 3, 32, 32), "text": torch.randint(1, 99, (4, 16))}
    losses, _ = task.training_forward(batch)
    assert losses["loss"] == losses["contrastive_loss"] + losses["ranking_loss"]
    losses["loss"].backward()
    trained = dict(task.trainable_module.named_parameters())
    assert trained["rank_loss.transition_heads.0.key_weight"].grad.abs().max() > 0
    assert "rank_loss.transition_heads.0.key_weight" in task.state_dict()["state_dict"]
