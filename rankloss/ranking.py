"""The ranking losses as modules: HighOrderPLLoss, and its members of order 1 and 0."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from rankloss.advice import Adviser
from rankloss.checks import check_option_names, check_settings, check_weights
from rankloss.diagnostics import Snapshot, summarize, take_snapshot
from rankloss.distributed import GlobalBatch, scale_gradient
from rankloss.global_batch import GatherOptions, Inputs
from rankloss.options import Discount
from rankloss.pair_loss import PairLoss
from rankloss.pair_terms import Pairs, Terms
from rankloss.ramp import START, RampedLoss
from rankloss.streaming import loss_of_pairs
from rankloss.transitions import TransitionHeads, Transitions

SEEDS = (2605, 2606)  # of the transition heads: shared or of images, of texts
COPIED = 4 << 20  # bytes of a modality's candidates up to which one product makes all tables


class HighOrderPLLoss(PairLoss, RampedLoss):
    """CLIP's contrastive loss plus order-R Plackett-Luce ranking consistency.

        L = w_clip L_CLIP + lambda_cross L_cross + lambda_in L_in
        L_cross = 1/2 [NLL(S_it; ranking of S_ti) + NLL(S_ti; ranking of S_it)]
        L_in    = 1/2 [NLL(S_ii; ranking of S_tt) + NLL(S_tt; ranking of S_ii)]

    Order 0 is CLIP, order 1 with the default weights is RankCLIP's published code at rank weight
    1 (without its epsilon inside the logarithm, which is wrong at large logit scales), order R adds
    transition terms that depend on the R-1 candidates taken before. Sources: CLIP; RankCLIP;
    DINORANKCLIP (arXiv 2605.06592), its transition terms in this project's definition.

    From order 2 on the loss has parameters. Make it a submodule of the model *before* wrapping
    it in DDP and building the optimizer, so that they are synchronised, trained and saved; exclude
    `no_weight_decay()` from decay. They start identical on every process (`TransitionHeads`).
    Weights of a lower order load: the new terms are at their start.

    With ids, pairs that share one are positives of the contrastive term, and out of each other's
    cross-modal lists; in-modal lists leave out repetitions of the anchor in their own modality.

    Args:
        embed_dim: D, width of the features; needed from order 2 on, unused before.
        order: R >= 0.
        transition_dim: r, width of a transition term.
        top_k: places of each ranking that count, against all remaining candidates; None, or more
            than there are, means all.
        contrastive_weight, cross_modal_weight, in_modal_weight: w_clip, lambda_cross, lambda_in;
            the ranking weights have no effect at order 0.
        discount: weight of place k: "none" (1) or "log" (1/ln(k+1)).
        exclude_self: leave the anchor itself out of the in-modal lists, where it is always first.
        share_transitions: one set of heads for both candidate modalities, else one each.
        local_loss, gather_with_grad, accum_freq, process_group, rank, world_size: see
            `rankloss.global_batch.GlobalBatchLoss`; the default is exact at any world size.
        impl: implementation of the loss, see `rankloss.plackett_luce_nll`: "reference" holds all
            scores and is differentiable twice, the others stream a chunk of anchors at a time.
        keep_stats: keep the features of the last forward (detached, with the transition tables of
            its texts) so that `last_stats` can be read; False holds nothing between steps.
        generator: draws the initial weights of the transition heads instead of a fixed seed; a
            distributed run must give every process one in the same state.

    Raises:
        ValueError: order < 0; order >= 2 without embed_dim, without any ranking weight, with
            transition_dim < 2 or with top_k=1 (no transition can act); top_k < 1; weights that are
            negative, not finite or all 0; an unknown discount or impl.

    >>> loss = HighOrderPLLoss(embed_dim=16, order=3)
    >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
    >>> parts = loss(image, text, logit_scale=14.3, output_dict=True)
    >>> list(parts)
    ['contrastive_loss', 'ranking_loss']
    >>> bool(sum(parts.values()) == loss(image, text, logit_scale=14.3))
    True
    """

    def __init__(
        self,
        embed_dim: int | None = None,
        order: int = 3,
        *,
        transition_dim: int = 32,
        top_k: int | None = None,
        contrastive_weight: float = 1.0,
        cross_modal_weight: float = 1 / 16,
        in_modal_weight: float = 1 / 16,
        discount: Discount = "none",
        exclude_self: bool = False,
        share_transitions: bool = True,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        accum_freq: int = 1,
        process_group: dist.ProcessGroup | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        impl: str = "auto",
        keep_stats: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            accum_freq=accum_freq,
            process_group=process_group,
            rank=rank,
            world_size=world_size,
        )
        check_settings(order, embed_dim, top_k, discount, impl)
        check_weights(order, contrastive_weight, cross_modal_weight, in_modal_weight)
        self.embed_dim, self.order, self.top_k = embed_dim, order, top_k
        self.contrastive_weight = contrastive_weight
        self.cross_modal_weight, self.in_modal_weight = cross_modal_weight, in_modal_weight
        self.discount: Discount = discount
        self.exclude_self = exclude_self
        self.impl = impl
        self.transition_heads = nn.ModuleList()
        if order >= 2 and embed_dim is not None:
            for seed in SEEDS[: 1 if share_transitions else 2]:
                heads = TransitionHeads(
                    embed_dim, order, transition_dim, generator=generator, seed=seed
                )
                self.transition_heads.append(heads)
        self.keep_stats = keep_stats
        self._forget()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Put the whole loss at its start: transition heads, drawn by `generator` if given, the
        ramp, what `last_stats` reads, and the warnings given once."""
        for heads in self._heads:
            heads.reset_parameters(generator)
        self._set_factor(START)
        self._restore_ramp()
        self._forget()

    def _forget(self) -> None:
        self._snapshot: Snapshot | None = None
        self._adviser = Adviser()

    @property
    def _feature_width(self) -> int | None:
        return self.embed_dim if self.order > 1 else None

    def terms(self, images: Tensor, texts: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """Compute "contrastive_loss" and "ranking_loss"."""
        self._adviser.look(images, texts, inputs.scale, self._watched_keys)
        return self._parts(self._pairs(images, texts, inputs))

    def total(self, images: Tensor, texts: Tensor, inputs: Inputs) -> Tensor:
        """Compute their sum, whose gradients are one set."""
        self._adviser.look(images, texts, inputs.scale, self._watched_keys)
        pairs, ranking = self._pairs(images, texts, inputs), self._ranking_terms()
        if ranking is None:
            alone = loss_of_pairs(pairs, self._contrastive_terms)
            return alone + self._no_ranking(pairs) if self._heads else alone
        return loss_of_pairs(pairs, ranking._replace(contrastive=self.contrastive_weight))

    @property
    def _watched_keys(self) -> list[nn.Parameter]:
        return [] if self._ranking_off else [x.key_weight for x in self._heads]

    def _parts(self, pairs: Pairs) -> dict[str, Tensor]:
        contrastive, ranking = self._contrastive_terms, self._ranking_terms()
        ranked = self._no_ranking(pairs) if ranking is None else loss_of_pairs(pairs, ranking)
        value = loss_of_pairs(pairs.without_transitions(), contrastive)
        return {"contrastive_loss": value, "ranking_loss": ranked}

    @property
    def _contrastive_terms(self) -> Terms:
        return Terms(contrastive=self.contrastive_weight, impl=self.impl)

    def _ranking_terms(self) -> Terms | None:
        """Ranking terms, or None while there are none: at order 0, and while the ramp is 0."""
        if self.order == 0 or self._ranking_off:
            return None
        return Terms(
            cross_modal=self.cross_modal_weight,
            in_modal=self.in_modal_weight,
            exclude_self=self.exclude_self,
            top_k=self.top_k,
            discount=self.discount,
            impl=self.impl,
        )

    def _pairs(self, images: Tensor, texts: Tensor, inputs: Inputs) -> Pairs:
        """Gather the global batch."""
        batch = self.gathered(images, texts, inputs)
        transitions = self._transitions(batch)
        self._snapshot = None
        if self.keep_stats:
            self._snapshot = take_snapshot(batch, inputs.scale, transitions)
        # a copy: DDP rewrites buffers in every forward, and two may precede a backward
        ramp = self.ranking_ramp.clone()
        ids = inputs.image_ids, inputs.text_ids
        return Pairs.of(batch, inputs.scale, inputs.bias, transitions, ids, ramp)

    @property
    def _heads(self) -> list[TransitionHeads]:
        return cast(list[TransitionHeads], list(self.transition_heads))

    def _transitions(self, batch: GlobalBatch) -> dict[str, Transitions]:
        """Tables by candidate modality; none while the ramp is 0."""
        if not self.transition_heads or self._ranking_off:
            return {}
        first, last = self.transition_heads[0], self.transition_heads[-1]
        if first is last and batch.images.numel() * batch.images.element_size() <= COPIED:
            both = self._tables(first, torch.stack([batch.images, batch.texts]))
            image, text = (Transitions(*x) for x in zip(*(t.unbind() for t in both), strict=True))
            return {"image": image, "text": text}
        return {"image": self._tables(first, batch.images), "text": self._tables(last, batch.texts)}

    def _tables(self, heads: nn.Module, candidates: Tensor) -> Transitions:
        """Tables of candidates; of `accum_freq` calls, each has a part of the weights' gradient."""
        if self.accum_freq == 1:
            tables: Transitions = heads(candidates)
            return tables
        weights = {n: scale_gradient(p, 1 / self.accum_freq) for n, p in heads.named_parameters()}
        return torch.func.functional_call(heads, weights, (candidates,))  # type: ignore[no-any-return]

    def _no_ranking(self, pairs: Pairs) -> Tensor:
        """Return a zero that the heads' parameters take part in: DDP expects all of them to."""
        total = pairs.scale.new_zeros((), dtype=pairs.dtype)
        for heads in self._heads:
            predecessors, keys = heads(pairs.texts[:0])
            total = total + predecessors.sum() + keys.sum()
        return total

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load; a state of order 0 or 1, which has no heads, leaves them as they are."""
        ours = prefix + "ranking_ramp" in state_dict  # not the state of something else
        if ours and not any(name.startswith(prefix + "transition_heads.") for name in state_dict):
            for number, heads in enumerate(self._heads):
                start = heads.initial_values()
                for name, x in heads.named_parameters():
                    value = start[name] if x.is_meta else x.detach()
                    state_dict[f"{prefix}transition_heads.{number}.{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def last_stats(self) -> dict[str, Tensor]:
        """Detached 0-D statistics of the last forward, computed when read, in chunks of anchors.

        {} before the first, after a forward inside vmap, and with keep_stats=False. See
        `rankloss.diagnostics.summarize` for what they are.
        """
        return {} if self._snapshot is None else summarize(self._snapshot)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters a weight decay should leave alone: all the loss has."""
        return {name for name, _ in self.named_parameters()}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last step's features behind."""
        return {**super().__getstate__(), "_snapshot": None, "_adviser": Adviser()}

    def extra_repr(self) -> str:
        return (
            f"order={self.order}, top_k={self.top_k}, "
            f"contrastive_weight={self.contrastive_weight:g}, "
            f"cross_modal_weight={self.cross_modal_weight:g}, "
            f"in_modal_weight={self.in_modal_weight:g}, impl={self.impl!r}"
        )


class ClipOptions(GatherOptions, total=False):
    """Arguments of `HighOrderPLLoss` that mean something without ranking terms."""

    contrastive_weight: float
    impl: str
    keep_stats: bool


class RankCLIPOptions(ClipOptions, total=False):
    """Arguments of `HighOrderPLLoss` that mean something without transitions."""

    top_k: int | None
    cross_modal_weight: float
    in_modal_weight: float
    discount: Discount
    exclude_self: bool


class RankCLIPLoss(HighOrderPLLoss):
    """RankCLIP: the order-1 member, ListMLE consistency between the four lists.

    Takes `HighOrderPLLoss`'s arguments but those of transitions. RankCLIP's schedule of the
    ranking weight is `set_progress((e - 1) / (E - 1))` at the start of each epoch e of E.

    >>> loss = RankCLIPLoss(top_k=4)
    >>> loss.set_progress(0.5)
    >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
    >>> loss(image, text, logit_scale=14.3).shape
    torch.Size([])
    """

    def __init__(self, **options: Unpack[RankCLIPOptions]) -> None:
        check_option_names("RankCLIPLoss", options, RankCLIPOptions)
        super().__init__(order=1, **options)


class ClipLoss(HighOrderPLLoss):
    """CLIP: the order-0 member, symmetric InfoNCE; its "ranking_loss" is 0.

    Takes `HighOrderPLLoss`'s arguments but those of ranking.

    >>> loss = ClipLoss(keep_stats=False)
    >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
    >>> logits, labels = 14.3 * image @ text.T, torch.arange(8)
    >>> cross_entropy = torch.nn.functional.cross_entropy
    >>> by_hand = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    >>> torch.testing.assert_close(loss(image, text, logit_scale=14.3), by_hand)
    """

    def __init__(self, **options: Unpack[ClipOptions]) -> None:
        check_option_names("ClipLoss", options, ClipOptions)
        super().__init__(order=0, **options)
