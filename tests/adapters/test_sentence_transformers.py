"""RankingLoss and PlackettLuceLoss under the installed sentence-transformers and its trainers."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from PIL import Image
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from rankloss.reranking import PlackettLuceLoss as ListLoss
from rankloss.sentence_transformers import PlackettLuceLoss, RankingLoss, RankingTrainer
from tests.adapters.test_transformers import clip_config
from tests.helpers.processes import ProcessGroup

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40))]
KEYS = "rank_loss.transition_heads.0.key_weight"


def write_bert(folder: Path, kind: Any) -> str:
    """A tiny BERT with a vocabulary of w0 .. w39, as a checkpoint of transformers."""
    torch.manual_seed(0)
    config: Any = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 1
    kind(config).save_pretrained(folder)
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    word_tokenizer(**special).save_pretrained(folder)
    return str(folder)


def word_tokenizer(**options: Any) -> Any:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    options |= {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)


def encoder(folder: Path) -> Any:
    path = folder / "bert"
    words = Transformer(str(path) if path.exists() else write_bert(path, BertModel))
    return SentenceTransformer(modules=[words, Pooling(16)], device="cpu")


def pairs(n: int = 16) -> Any:
    return Dataset.from_dict(
        {
            "anchor": [f"w{i} w{i + 1}" for i in range(n)],
            "positive": [f"w{i} w{i + 2} w{i + 3}" for i in range(n)],
        }
    )


def settings(folder: Path, kind: Any = SentenceTransformerTrainingArguments, **options: Any) -> Any:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "epoch",
        "disable_tqdm": True,
    }
    return kind(str(folder), **{**defaults, **options})


def state(loss: RankingLoss) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in loss.state_dict().items()}


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = RankingLoss(encoder(tmp_path), order=2, transition_dim=4)
        start = state(loss)
        args = settings(tmp_path / "run")
        RankingTrainer(loss.model, args, train_dataset=pairs(), loss=loss).train()
        end = state(loss)
        assert end[KEYS].abs().max() > 0
        assert end["log_scale"] != start["log_scale"]
        assert "rank_loss" not in str(loss.model)  # the published model is a plain one
        again = RankingLoss(encoder(tmp_path), order=2, transition_dim=4)
        trainer = RankingTrainer(again.model, args, train_dataset=pairs(), loss=again)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for key, value in state(again).items():
        assert torch.equal(value, end[key]), key
    third = RankingLoss(encoder(tmp_path), order=2, transition_dim=4)
    third.load(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(third.state_dict()[KEYS], end[KEYS])


def write_clip(folder: Path) -> str:
    """A tiny CLIP with its processor, as a checkpoint of transformers."""
    CLIPModel(clip_config()).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessor(size=size, crop_size=size)
    words = word_tokenizer(model_max_length=8)
    CLIPProcessor(image_processor=pictures, tokenizer=words).save_pretrained(folder)
    return str(folder)


def test_images_and_texts(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    captions = [f"w{i} w{i + 1}" for i in range(8)]
    rows = Dataset.from_dict({"image": list(map(Image.fromarray, pixels)), "caption": captions})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = Transformer(write_clip(tmp_path / "clip"))
        model: Any = SentenceTransformer(modules=[clip], device="cpu")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        loss = RankingLoss(model, order=2, transition_dim=4)
        args = settings(tmp_path / "run", save_strategy="no")
        RankingTrainer(model, args, train_dataset=rows, loss=loss).train()
    assert state(loss)[KEYS].abs().max() > 0
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {f"0.model.{name}_projection.weight" for name in ("visual", "text")} < moved


def test_two_columns_are_needed(tmp_path: Path) -> None:
    loss = RankingLoss(encoder(tmp_path), order=1)
    tokens = loss.model.preprocess(["w1 w2"])
    with pytest.raises(ValueError, match="two columns, got 3"):
        loss([tokens] * 3)


def gradients(folder: Path, rank: int, world_size: int, backwards: int = 1) -> dict[str, Tensor]:
    """Gradients of this process's share of 8 pairs, the model in DistributedDataParallel."""
    loss = RankingLoss(encoder(folder), order=2, transition_dim=4)
    with torch.no_grad():
        for name, p in loss.rank_loss.named_parameters():
            p.normal_(generator=torch.Generator().manual_seed(len(name)))
    data, share = pairs(8), 8 // world_size
    rows = slice(rank * share, (rank + 1) * share)
    columns = [loss.model.preprocess(data[name][rows]) for name in ("anchor", "positive")]
    for name, p in loss.model.named_parameters():
        p.requires_grad_("pooler" not in name)  # BERT's, which mean pooling does not use
    if world_size > 1:
        loss.model = torch.nn.parallel.DistributedDataParallel(loss.model)
    loss.train()
    for _ in range(backwards):
        (sum(loss(columns).values()) / backwards).backward()
    found = loss.named_parameters()
    return {k.replace(".module.", "."): p.grad for k, p in found if p.grad is not None}


def gradients_of_two(folder: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gradients(folder, dist.get_rank(), dist.get_world_size(), backwards=2)


def test_two_processes_have_the_gradient_of_all_pairs(tmp_path: Path, two: ProcessGroup) -> None:
    """Heads and scale too, in two backward passes."""
    whole = gradients(tmp_path, 0, 1)
    first, second = two.run(gradients_of_two, tmp_path)
    assert {KEYS, "log_scale"} < whole.keys() == first.keys()
    for key, value in whole.items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-6, msg=key)
        assert torch.equal(first[key], second[key]), key


def lists() -> Any:
    return Dataset.from_dict(
        {
            "query": ["w1", "w2", "w3", "w4"],
            "documents": [["w5", "w6 w1", "w7"], ["w8", "w2"], ["w9", "w3", "w3 w10"], ["w4"]],
            "labels": [[0, 2, 0], [0, 1], [0, 1, 1], [1]],
        }
    )


def test_cross_encoder_learns_graded_labels(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bert = write_bert(tmp_path / "bert", BertForSequenceClassification)
        model = CrossEncoder(bert, device="cpu")
        loss = PlackettLuceLoss(model, mini_batch_size=3)
        rows = lists()
        labels = [torch.tensor(x) for x in rows["labels"]]
        batch = list(rows["query"]), list(rows["documents"])
        before = float(loss(batch, labels))
        args = settings(
            tmp_path / "run",
            CrossEncoderTrainingArguments,
            num_train_epochs=30,
            save_strategy="no",
            per_device_train_batch_size=4,
        )
        CrossEncoderTrainer(model, args, train_dataset=rows, loss=loss).train()
    assert float(loss(batch, labels)) < before / 2


def test_cross_encoder_loss_is_that_of_its_scores(tmp_path: Path) -> None:
    model = CrossEncoder(write_bert(tmp_path, BertForSequenceClassification), device="cpu")
    queries, documents = ["w1", "w2"], [["w3", "w4", "w5"], ["w6", "w7"]]
    labels = [torch.tensor([2, 1, 1]), torch.tensor([0, 1])]
    flat = [(q, d) for q, ds in zip(queries, documents, strict=True) for d in ds]
    scores = torch.as_tensor(model.predict(flat, activation_fn=torch.nn.Identity()))
    rows = torch.stack([scores[:3], torch.cat([scores[3:], torch.zeros(1)])])
    expected = ListLoss()(rows, torch.tensor([[2, 1, 1], [0, 1, -100]]))
    model.eval()
    actual = PlackettLuceLoss(model)((queries, documents), labels)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"\[3, 2\] documents but \[3\] labels"):
        PlackettLuceLoss(model)((queries, documents), labels[:1])
