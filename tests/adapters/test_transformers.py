"""CLIPRankingModel and SiglipRankingModel under the installed transformers and its Trainer."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainingArguments,
)

from rankloss import HighOrderPLLoss
from rankloss.transformers import CLIPRankingModel, SiglipRankingModel
from tests.helpers.processes import ProcessGroup

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TEXT = {**TOWER, "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1}
VISION = {**TOWER, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
OPTIONS = {"order": 3, "transition_dim": 4}


def clip_config() -> Any:
    return CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)


def siglip_config() -> Any:
    return SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION)


KINDS = [
    (CLIPRankingModel, CLIPModel, clip_config),
    (SiglipRankingModel, SiglipModel, siglip_config),
]
BOTH = pytest.mark.parametrize(("ranking", "plain", "config"), KINDS, ids=["clip", "siglip"])


def pairs(n: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(2, 49, (n, 8), generator=generator)
    texts[:, -1] = 49
    images = torch.randn(n, 3, 16, 16, generator=generator)
    return [{"input_ids": t, "pixel_values": i} for t, i in zip(texts, images, strict=True)]


def batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def with_keys(model: Any) -> Any:
    """The model with keys that are not zero, so that order 3 differs from order 1."""
    with torch.no_grad():
        for name, p in model.rank_loss.named_parameters():
            p.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


@BOTH
def test_loss_is_the_ranking_loss(ranking: Any, plain: Any, config: Any) -> None:
    model = with_keys(ranking(config(), rank_loss=OPTIONS))
    output = model(**batch(pairs()))
    features = output.image_embeds, output.text_embeds
    expected = model.rank_loss(
        *features, model.logit_scale.exp(), getattr(model, "logit_bias", None)
    )
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(p.grad is not None for p in model.rank_loss.parameters())
    assert output.logits_per_image.shape == (8, 8)


@BOTH
def test_from_pretrained_of_a_plain_checkpoint_and_of_its_own(
    ranking: Any, plain: Any, config: Any, tmp_path: Path
) -> None:
    original = plain(config())
    original.save_pretrained(tmp_path / "plain")
    model = ranking.from_pretrained(tmp_path / "plain", rank_loss=OPTIONS)
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    fresh = ranking(config(), rank_loss=OPTIONS)
    for key, value in fresh.rank_loss.state_dict().items():
        assert torch.equal(model.rank_loss.state_dict()[key], value), key  # as if just built
    with_keys(model).save_pretrained(tmp_path / "own")
    again = ranking.from_pretrained(tmp_path / "own")
    assert again.config.rank_loss == OPTIONS
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    data = batch(pairs())
    assert torch.equal(model.train()(**data).loss, again.train()(**data).loss)
    back = plain.from_pretrained(tmp_path / "own")  # a CLIPModel for everybody else
    assert torch.equal(back(**data).logits_per_text, again.eval()(**data).logits_per_text)


def test_ramp_is_saved_with_the_model(tmp_path: Path) -> None:
    model: Any = CLIPRankingModel(clip_config(), rank_loss={"order": 1})
    model.rank_loss.set_progress(0.5)
    model.save_pretrained(tmp_path)
    again = CLIPRankingModel.from_pretrained(tmp_path)
    data = batch(pairs())
    torch.testing.assert_close(model.train()(**data).loss, again.train()(**data).loss)


def test_zero_shot_and_tuples() -> None:
    model: Any = CLIPRankingModel(clip_config(), rank_loss={"order": 1})
    model.eval()
    data = batch(pairs(4))
    data["pixel_values"] = data["pixel_values"][:1]
    assert model(**data).loss is None  # one image, four prompts
    assert model(**data, return_dict=False)[0].shape == (1, 4)
    with pytest.raises(ValueError, match="one row a pair"):
        model.train()(**data)


def training_arguments(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **{**settings, **options})


class Unshuffled(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        data: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(data)


def plain_sgd(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = CLIPRankingModel(clip_config(), rank_loss=OPTIONS)
    start = {key: value.clone() for key, value in whole.state_dict().items()}
    options = {"num_train_epochs": 2, "save_strategy": "epoch"}
    arguments = training_arguments(tmp_path / "run", **options)
    Trainer(whole, arguments, train_dataset=pairs(16), eval_dataset=pairs(6)).train()
    assert not torch.equal(
        whole.state_dict()["rank_loss.transition_heads.0.key_weight"],
        start["rank_loss.transition_heads.0.key_weight"],
    )
    resumed = CLIPRankingModel(clip_config(), rank_loss=OPTIONS)
    trainer = Trainer(resumed, arguments, train_dataset=pairs(16), eval_dataset=pairs(6))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert trainer.evaluate()["eval_loss"] > 0
    files = {path.name for path in (tmp_path / "run" / "checkpoint-8").iterdir()}
    assert {"config.json", "model.safetensors"} <= files  # what the hub shows


def step(folder: Path, steps: int, rows: int, **options: Any) -> dict[str, Tensor]:
    """Parameters after one SGD step of Trainer on `rows` pairs a micro-batch."""
    torch.manual_seed(0)
    model = with_keys(CLIPRankingModel(clip_config(), rank_loss=OPTIONS))
    arguments = training_arguments(
        folder,
        gradient_accumulation_steps=steps,
        per_device_train_batch_size=rows,
        max_steps=1,
        **options,
    )
    Unshuffled(model, arguments, train_dataset=pairs(8), optimizers=plain_sgd(model)).train()
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def by_hand(parts: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = with_keys(CLIPRankingModel(clip_config(), rank_loss=OPTIONS))
    optimizer, _ = plain_sgd(model)
    for part in parts:
        (model(**batch(part)).loss / len(parts)).backward()
    optimizer.step()
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=1e-4, atol=1e-6, msg=key)


def test_trainer_accumulates_the_mean(tmp_path: Path) -> None:
    rows = pairs(8)
    assert_close(step(tmp_path, steps=2, rows=4), by_hand([rows[:4], rows[4:]]))


def test_compute_loss_func_is_not_divided_by_accumulation_steps(tmp_path: Path) -> None:
    """The reason for a loss inside `forward`: Trainer takes this function's loss as it is."""
    rows = pairs(8)
    losses: list[float] = []
    loss = HighOrderPLLoss(order=1)

    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        assert not hasattr(outputs, "logit_scale")
        value: Tensor = loss(outputs.image_embeds, outputs.text_embeds, 10.0)
        losses.append(float(value))
        return value

    def moved(steps: int) -> Tensor:
        torch.manual_seed(0)
        model = CLIPModel(clip_config())
        before = model.visual_projection.weight.detach().clone()
        arguments = training_arguments(
            tmp_path, gradient_accumulation_steps=steps, max_steps=1, remove_unused_columns=False
        )
        data = [rows[i % 4] for i in range(4 * steps)]  # the same four pairs in every part
        Unshuffled(
            model,
            arguments,
            train_dataset=data,
            compute_loss_func=compute_loss,
            optimizers=plain_sgd(model),
        ).train()
        return model.visual_projection.weight.detach() - before

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once, thrice = moved(1), moved(3)
    assert len(losses) == 4
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-3, atol=1e-6)  # not the mean


def step_of_two(folder: Path) -> dict[str, Tensor]:
    """A step of Trainer in a process that finds itself started by torchrun."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": "29400"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": size, "ACCELERATE_USE_CPU": "1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return step(folder, steps=1, rows=4)


def test_two_processes_of_trainer_have_the_gradient_of_the_global_batch(
    tmp_path: Path, two: ProcessGroup
) -> None:
    """Under Trainer's own DistributedDataParallel settings."""
    first, second = two.run(step_of_two, tmp_path)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert_close(first, by_hand([pairs(8)]))
