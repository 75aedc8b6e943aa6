"""Losses and trainers for sentence-transformers (6 and up).

loss = RankingLoss(model, order=3)                 # two columns: texts, or images and texts
RankingTrainer(model, args, train_dataset, loss=loss).train()

loss = PlackettLuceLoss(cross_encoder)             # query, documents, graded labels
CrossEncoderTrainer(cross_encoder, args, train_dataset, loss=loss).train()
"""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from torch.nn import functional as F

from rankloss.ranking import HighOrderPLLoss
from rankloss.reranking import PlackettLuceLoss as ListLoss

STATE_FILE = "rank_loss.safetensors"
LARGEST_SCALE = 100.0  # CLIP's


class RankingLoss(nn.Module):
    """`HighOrderPLLoss` of the two columns of a batch, with its own logit scale.

    Embeddings are normalised here. The loss owns the logit scale and the transition heads: the
    trainer of sentence-transformers optimises them with the model, but neither wraps them in
    DistributedDataParallel nor saves them; here their gradients are averaged over processes, and
    `RankingTrainer` saves and resumes them. Rows that repeat an item belong in different batches:
    `batch_sampler=BatchSamplers.NO_DUPLICATES`.

    Args:
        model: a SentenceTransformer.
        order: R, as in `HighOrderPLLoss`.
        logit_scale: initial scale, 20 as in MultipleNegativesRankingLoss.
        learn_scale: train the scale, up to 100.
        **options: other arguments of `HighOrderPLLoss`.
    """

    def __init__(
        self,
        model: Any,
        order: int = 3,
        *,
        logit_scale: float = 20.0,
        learn_scale: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.rank_loss = HighOrderPLLoss(model.get_embedding_dimension(), order, **options)
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)), learn_scale)
        for p in (self.log_scale, *self.rank_loss.parameters()):
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"contrastive_loss", "ranking_loss"}, which the trainer adds up and logs.

        In evaluation each process compares its own pairs alone.

        Args:
            sentence_features: two columns as the model tokenised them.
            labels: not used; the trainer passes them.

        Raises:
            ValueError: there are not two columns.
        """
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ValueError(
                f"RankingLoss: a batch must have two columns, got {len(columns)}; explicit "
                "negatives are other rows' second column"
            )
        embeddings = [self.model(column)["sentence_embedding"] for column in columns]
        pair = [F.normalize(x.float(), dim=1) for x in embeddings]
        scale = self.log_scale.exp().clamp(max=LARGEST_SCALE)
        local = not self.model.training
        terms: dict[str, Tensor] = self.rank_loss(*pair, scale, output_dict=True, local=local)
        return terms

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the loss's own parameters and ramp, without the model's, into `folder`."""
        save_file(self._own_state(), Path(folder, STATE_FILE))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the folder has no such file.
            RuntimeError: it is that of a loss of another order or width.
        """
        state = load_file(Path(folder, STATE_FILE))
        with torch.no_grad():
            self.log_scale.copy_(state.pop("log_scale"))
        self.rank_loss.load_state_dict({k.split(".", 1)[1]: v for k, v in state.items()})

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card says about the loss."""
        return {
            "order": self.rank_loss.order,
            "scale": round(float(self.log_scale.detach().exp()), 2),
        }

    def _own_state(self) -> dict[str, Tensor]:
        state = {f"rank_loss.{k}": v for k, v in self.rank_loss.state_dict().items()}
        state["log_scale"] = self.log_scale.detach()
        return {key: value.contiguous() for key, value in state.items()}


class RankingTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """SentenceTransformerTrainer that saves and resumes a `RankingLoss` with the model."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        for loss in self._ranking_losses():
            loss.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        super()._load_from_checkpoint(checkpoint_path)
        for loss in self._ranking_losses():
            loss.load(checkpoint_path)

    def _ranking_losses(self) -> list[RankingLoss]:
        losses = [x for x in self.loss.modules() if isinstance(x, RankingLoss)]
        if len(losses) > 1:
            raise NotImplementedError("RankingTrainer saves one RankingLoss; this run has more")
        return losses


class PlackettLuceLoss(nn.Module):
    """`rankloss.PlackettLuceLoss` of a CrossEncoder's scores for each query's documents.

    Args:
        model: a CrossEncoder with one output.
        activation: applied to the scores; None takes them as they are.
        mini_batch_size: pairs that are scored at once; None scores all.
        **options: arguments of `rankloss.PlackettLuceLoss`: ties, place_weights, top_k, ...

    Raises:
        ValueError: the model has more than one output.
    """

    def __init__(
        self,
        model: Any,
        *,
        activation: nn.Module | None = None,
        mini_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if model.num_labels != 1:
            raise ValueError(f"PlackettLuceLoss: model has {model.num_labels} outputs, not 1")
        self.model, self.activation = model, activation or nn.Identity()
        self.mini_batch_size = mini_batch_size
        self.list_loss = ListLoss(**options)

    def forward(
        self,
        inputs: Sequence[Any],
        labels: Sequence[Tensor],
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """Return the loss of a batch of queries.

        Args:
            inputs: queries (N,), and for each a list of documents; lists may differ in length.
            labels: for each query the grades of its documents.
            prompt, task: for the model's preprocessing.

        Raises:
            ValueError: numbers of documents and labels differ.
        """
        queries, documents = inputs
        lengths = [len(x) for x in documents]
        if lengths != [len(x) for x in labels]:
            raise ValueError(
                f"PlackettLuceLoss: {lengths} documents but {[len(x) for x in labels]} labels"
            )
        pairs = [(q, d) for q, ds in zip(queries, documents, strict=True) for d in ds]
        scores = self.activation(self._scores(pairs, prompt, task))
        pad = self.list_loss.ignore_index
        rows = nn.utils.rnn.pad_sequence(list(scores.split(lengths)), batch_first=True)
        grades = [x.to(scores.device) for x in labels]
        return self.list_loss(  # type: ignore[no-any-return]
            rows, nn.utils.rnn.pad_sequence(grades, batch_first=True, padding_value=pad)
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card says about the loss."""
        return {"ties": self.list_loss.ties, "top_k": self.list_loss.top_k}

    def _scores(self, pairs: list[tuple[str, str]], prompt: str | None, task: str | None) -> Tensor:
        """Scores of all pairs, (number of pairs,)."""
        size = self.mini_batch_size or len(pairs)
        parts = []
        for start in range(0, len(pairs), size):
            tokens = self.model.preprocess(pairs[start : start + size], prompt=prompt, task=task)
            tokens = {
                k: v.to(self.model.device) if isinstance(v, Tensor) else v
                for k, v in tokens.items()
            }
            parts.append(self.model(tokens)["scores"].reshape(-1))
        return torch.cat(parts)


@torch.no_grad()
def _average(p: Tensor) -> None:
    """Average the accumulated gradient over processes, as DistributedDataParallel would.

    Repeated backward passes add local gradients to an average and average again: the same as
    averaging once.
    """
    if p.grad is not None and dist.is_available() and dist.is_initialized():
        dist.all_reduce(p.grad)
        p.grad.div_(dist.get_world_size())
