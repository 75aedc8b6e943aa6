"""Losses of pairs a chunk of anchors at a time: value and gradients together, nothing n x M kept.

For some anchors, scores, rankings, likelihoods and gradients of the scores exist together, and are
contracted to gradients of features, scale and tables before the next anchors' turn. What is left
between a forward and a backward pass is as large as the features; the backward pass multiplies it
by what comes from above, in new tensors.

All of that is one opaque op inside an `autograd.Function`, so that `torch.compile`, autocast and
functorch see one node. Nothing in it waits for the device.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankloss import kernels
from rankloss.clip import info_nce_and_gradient, positive_mask, sigmoid_and_gradient
from rankloss.kernels.derivatives import Scaled, applied, link_to
from rankloss.kernels.launch import loop_over_batch, outside_autocast
from rankloss.pair_terms import Pairs, Rows, Terms, anchor_shares, list_masks, ranked_lists
from rankloss.plain import plain_loss
from rankloss.scores import exact_product
from rankloss.transitions import Transitions

CHUNK = 20 << 20  # bytes alive at a time for some anchors' scores, rankings and gradients
ENTRY = 40  # of them a row and candidate, of both blocks
WHOLE = 80 << 20  # bytes for the scores of all anchors, where both blocks can share them

LEAVES = Pairs._fields.index("labels")  # the tensors before it receive gradient


def loss_of_pairs(x: Pairs, terms: Terms) -> Tensor:
    """Return the sum of the terms, a scalar in `x.dtype`; see `rankloss.pair_terms`.

    Raises:
        ValueError: `terms.impl` cannot run here.
    """
    if terms.impl == "reference":
        return plain_loss(x, terms)
    kernels.choose(terms.impl, x.images.device, x.dtype)
    leaves = x[:LEAVES]
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)):
        value: Tensor = pair_loss(*x, *terms, False)[0]
        return value
    links = [None if t is None else link_to(t) for t in leaves]
    found: tuple[Tensor, ...] = applied(_Streamed, *x, terms, *links)
    return found[0]


# ---------------------------------------------------------------- one pass over the anchors


class _Block:
    """Some rows' scores of all candidates, and what becomes of their gradient."""

    def __init__(self, anchors: Tensor, candidates: Tensor, scores: Tensor) -> None:
        self.anchors, self.candidates, self.scores = anchors, candidates, scores
        self.gradient: Tensor | None = None

    @classmethod
    def of(cls, anchors: Tensor, candidates: Tensor, scale: Tensor) -> "_Block":
        """Score the candidates."""
        return cls(anchors, candidates, exact_product(anchors, candidates.T).mul_(scale))

    def transposed(self) -> "_Block":
        """Let the candidates score the anchors."""
        return _Block(self.candidates, self.anchors, self.scores.T)

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Add the gradient of some rows; it may be overwritten from now on."""
        if self.gradient is None and gradient.shape == self.scores.shape:
            self.gradient = gradient
            return
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.scores)
        self.gradient[rows] += gradient


class Stream:
    """One pass over all anchors: what their chunks read, and what they add to.

    Gradients of features are those of cosines, without the scale, until all are there.
    """

    def __init__(self, x: Pairs, terms: Terms, wanted: bool) -> None:
        self.given, self.terms, self.wanted = x, terms, wanted
        self.x = x = x.widened()
        self.image_anchors, self.text_anchors = x.anchors()
        self.image_tables = _Tables(x.images, x.image_predecessors, x.image_keys)
        self.text_tables = _Tables(x.texts, x.text_predecessors, x.text_keys)
        self.contrastive, self.ranking, self.d_bias = x.images.new_zeros(3).unbind()
        if wanted:
            self.d_anchors = [torch.zeros_like(t) for t in x.anchors()]
            self.d_images, self.d_texts = torch.zeros_like(x.images), torch.zeros_like(x.texts)

    def run(self) -> tuple[Tensor, ...]:
        """Value, and gradients in the order of `Pairs`; empty where none is wanted."""
        n, halves = len(self.x.labels), self.terms.across + self.terms.within
        if halves:
            anchor = ENTRY * halves * max(1, len(self.x.texts))
            step = max(1, n if self.shares_scores else CHUNK // anchor)
            for start in range(0, n, step):
                self._add(slice(start, min(start + step, n)))
        leaves = self.given[:LEAVES]
        found = self._gradients() if self.wanted else [None] * LEAVES
        none = self.x.images.new_empty
        pairs = zip(leaves, found, strict=True)
        gradients = (none(0) if g is None or t is None else g for t, g in pairs)
        return self.contrastive + self.ranking, *gradients

    @property
    def shares_scores(self) -> bool:
        """Say if one block's scores are the other's, transposed, and all of them fit at once."""
        x, n = self.given, len(self.x.labels)
        alone = x.image_anchors is None and x.text_anchors is None
        fits = ENTRY // 2 * n * n <= WHOLE
        return alone and self.terms.two_sided and not self.terms.within and fits

    def _add(self, at: slice) -> None:
        """Add some anchors' terms to the value and to the gradients."""
        x, terms, labels = self.x, self.terms, self.x.labels[at]
        rows = Rows.of(terms, len(labels))
        images, texts = self.image_anchors[at], self.text_anchors[at]
        blocks = [_Block.of(rows.stacked(images, texts), x.texts, x.scale)]
        if self.shares_scores:
            blocks.append(blocks[0].transposed())
        elif terms.two_sided:
            blocks.append(_Block.of(rows.stacked(texts, images), x.images, x.scale))
        positives = positive_mask(x.ids, labels)
        if terms.ranks:
            self._add_rankings(blocks, rows.ranked, labels, positives)
        if terms.contrastive:
            self._add_contrastive(blocks, rows.across, labels, positives)
        if terms.sigmoid:
            self._add_sigmoid(blocks[0], rows.across, labels, positives)
        if terms.cyclic_across or terms.cyclic_within:
            self._add_cyclic(blocks, rows)
        if self.wanted:
            anchors = [d[at] for d in self.d_anchors]
            if self.shares_scores and blocks[1].gradient is not None:
                blocks[0].add(slice(None), blocks[1].gradient.T)
                blocks[1].gradient = None
            _contract(blocks[0], rows, anchors, self.d_texts)
            if terms.two_sided:
                _contract(blocks[1], rows, anchors[::-1], self.d_images)

    def _gradients(self) -> list[Tensor]:
        """Gradients of the leaves, with the scale."""
        pairs = zip(self.d_anchors, self.x.anchors(), strict=True)
        d_scale = torch.stack([d.flatten().dot(a.flatten()) for d, a in pairs]).sum()
        if self.given.image_anchors is None:
            self.d_images += self.d_anchors[0]
        if self.given.text_anchors is None:
            self.d_texts += self.d_anchors[1]
        features = [*self.d_anchors, self.d_images, self.d_texts]
        for d in features:
            d.mul_(self.x.scale)
        tables = []
        for table in (self.image_tables, self.text_tables):  # without anchors, nothing was added
            zeros = [torch.zeros_like(t, dtype=d_scale.dtype) for t in table.values]
            tables += table.gradients or zeros
        return [*features, d_scale, self.d_bias.clone(), *tables]

    # ------------------------------------------------------------ terms

    def _add_contrastive(
        self, blocks: list[_Block], rows: slice, labels: Tensor, positives: Tensor | None
    ) -> None:
        weight = self.terms.contrastive / 2 / len(self.x.labels)
        for block in blocks:
            total, gradient = info_nce_and_gradient(block.scores[rows], labels, positives)
            self.contrastive.add_(total, alpha=weight)
            if self.wanted:
                block.add(rows, gradient.mul_(weight))

    def _add_sigmoid(
        self, block: _Block, rows: slice, labels: Tensor, positives: Tensor | None
    ) -> None:
        weight, logits = self.terms.sigmoid / len(self.x.labels), block.scores[rows]
        if self.x.bias is not None:
            logits = logits + self.x.bias
        total, gradient = sigmoid_and_gradient(logits, labels, positives)
        self.contrastive.add_(total, alpha=weight)
        if self.wanted:
            block.add(rows, gradient.mul_(weight))
            self.d_bias += gradient.sum()

    def _add_cyclic(self, blocks: list[_Block], rows: Rows) -> None:
        by_text, by_image = blocks
        for half, weight in (
            (rows.across, self.terms.cyclic_across),
            (rows.within, self.terms.cyclic_within),
        ):
            if weight:
                weight /= len(self.x.labels)
                difference = by_text.scores[half] - by_image.scores[half]
                self.contrastive.add_(difference.square().sum(), alpha=weight)
                if self.wanted:
                    by_text.add(half, difference.mul_(2 * weight))
                    by_image.add(half, -difference)

    def _add_rankings(
        self,
        blocks: list[_Block],
        rows: slice,
        labels: Tensor,
        positives: Tensor | None,
    ) -> None:
        """Each block's rows are to rank as the other block's do."""
        by_text, by_image = blocks
        shares = anchor_shares(self.x, self.terms, len(labels), self.x.scale.dtype)
        masks = list_masks(self.x, self.terms, labels, positives)
        sides = (by_text, by_image, self.text_tables), (by_image, by_text, self.image_tables)
        for (block, other, tables), mask in zip(sides, masks, strict=True):
            found = self._likelihood(block.scores[rows], other.scores[rows], mask, tables, shares)
            self.ranking += found[0]
            if self.wanted:
                block.add(rows, found[1])
                tables.add(found[2:])

    def _likelihood(
        self,
        scores: Tensor,
        target: Tensor,
        mask: Tensor | None,
        tables: "_Tables",
        shares: Tensor,
    ) -> tuple[Tensor, ...]:
        """Weighted sum of the rows' likelihoods, and gradients of scores and tables."""
        lists, weights = ranked_lists(scores, target, mask, tables.values, shares, self.terms)
        found = kernels.total_and_gradients(lists, weights, self.terms.impl, wanted=self.wanted)
        if mask is not None and self.wanted:
            found[1].masked_fill_(~mask, 0.0)
        return found


class _Tables:
    """Transition tables of one modality's candidates, and their gradients; empty at order 1."""

    def __init__(self, candidates: Tensor, *tables: Tensor | None) -> None:
        m = len(candidates)
        given = (candidates.new_empty(0, m, 0) if t is None else t for t in tables)
        self.values = Transitions(*given)
        self.gradients: list[Tensor] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add gradients, which may be overwritten from now on."""
        if not self.gradients:
            self.gradients = list(gradients)
            return
        for total, gradient in zip(self.gradients, gradients, strict=True):
            total += gradient


def _contract(block: _Block, rows: Rows, anchors: Sequence[Tensor], candidates: Tensor) -> None:
    """Add a block's gradient to those of both modalities' anchors, and of its candidates."""
    gradient = block.gradient
    if gradient is None:
        return
    candidates.addmm_(gradient.T, block.anchors)
    for half, anchor in zip((rows.across, rows.within), anchors, strict=True):
        if half.stop > half.start:
            anchor.addmm_(gradient[half], block.candidates)


# ---------------------------------------------------------------- registration


def run(*args: Any) -> tuple[Tensor, ...]:
    """Implementation of the op: value, and gradients of the leaves."""
    x, terms, wanted = Pairs(*args[: len(Pairs._fields)]), args[len(Pairs._fields) : -1], args[-1]
    with outside_autocast(x.images):
        return Stream(x, Terms(*terms), wanted).run()


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, wanted = Pairs(*args[: len(Pairs._fields)]), args[-1]
    new = functools.partial(x.images.new_empty, dtype=x.dtype)
    leaves = [None if not wanted else t for t in x[:LEAVES]]
    return new(()), *(new(0) if t is None else new(t.shape) for t in leaves)


SCHEMA = (
    "(Tensor? image_anchors, Tensor? text_anchors, Tensor images, Tensor texts, Tensor scale, "
    "Tensor? bias, Tensor? image_predecessors, Tensor? image_keys, Tensor? text_predecessors, "
    "Tensor? text_keys, Tensor labels, Tensor? image_ids, Tensor? text_ids, Tensor? ramp, "
    "float contrastive, float sigmoid, float cyclic_across, float cyclic_within, "
    "float cross_modal, float in_modal, bool exclude_self, int? top_k, str discount, str impl, "
    f"bool wanted) -> ({', '.join(['Tensor'] * (1 + LEAVES))})"
)
pair_loss = torch.library.custom_op("rankloss::pair_loss", run, mutates_args=(), schema=SCHEMA)
pair_loss.register_fake(_fake)
loop_over_batch(pair_loss)


class _Streamed(torch.autograd.Function):
    """The value, and its gradients, which the backward pass only scales."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        image_anchors: Tensor | None,
        text_anchors: Tensor | None,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_predecessors: Tensor | None,
        image_keys: Tensor | None,
        text_predecessors: Tensor | None,
        text_keys: Tensor | None,
        labels: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        ramp: Tensor | None,
        terms: Terms,
        *links: Tensor | None,
    ) -> tuple[Tensor, ...]:
        anchors = image_anchors, text_anchors
        tables = image_predecessors, image_keys, text_predecessors, text_keys
        rest = labels, image_ids, text_ids, ramp
        x = *anchors, images, texts, scale, bias, *tables, *rest
        found: tuple[Tensor, ...] = pair_loss(*x, *terms, True)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros of the gradients' size for them
        ctx.save_for_backward(*output[1:], *inputs[len(Pairs._fields) + 1 :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        others = (None,) * (len(Pairs._fields) + 1)  # terms and links among them
        if grad is None:
            return *(None,) * LEAVES, *others
        gradients, links = ctx.saved_tensors[:LEAVES], ctx.saved_tensors[LEAVES:]
        needed = zip(gradients, links, ctx.needs_input_grad, strict=False)
        scaled = [applied(Scaled, grad, g, link) if need else None for g, link, need in needed]
        return *scaled, *others
