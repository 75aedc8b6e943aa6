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
from rankloss.both_ways import info_nce_both_ways
from rankloss.clip import info_nce_and_gradient, positive_mask, sigmoid_and_gradient
from rankloss.kernels.derivatives import MadeAhead, Refusing, applied, link_to, products
from rankloss.kernels.launch import loop_over_batch, outside_autocast
from rankloss.pair_terms import Pairs, RankedLists, Rows, Terms, list_masks
from rankloss.plain import plain_loss
from rankloss.scores import exact_product
from rankloss.transitions import Transitions

CHUNK = 20 << 20  # bytes alive at a time for some anchors' scores, rankings and gradients
LARGEST = 192 << 20  # the same for many anchors: three floats a score, for fewer launches
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
    if terms.only_contrastive and x.only_pairs:
        return info_nce_both_ways(x.images, x.texts, x.scale, terms.contrastive)
    leaves = tuple(x)[:LEAVES]
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)):
        value: Tensor = applied(_Value, *x, *terms)
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

    def add(self, rows: slice, gradient: Tensor, weight: float = 1.0) -> None:
        """Add `weight` times the gradient of some rows; it may be overwritten from now on."""
        if self.gradient is None and gradient.shape == self.scores.shape:
            self.gradient = gradient if weight == 1 else gradient.mul_(weight)
            return
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.scores)
        self.gradient[rows].add_(gradient, alpha=weight)


def anchors_at_a_time(n: int, entries: int) -> int:
    """Number of n anchors, each with so many entries of a block, whose scores exist together."""
    bytes_ = max(CHUNK, min(LARGEST, 3 * 4 * n * entries // 2))
    most = max(1, min(n, bytes_ // (ENTRY * entries)))
    return -(-n // -(-n // most)) if n else 1  # chunks of one size


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
        self.value = x.images.new_zeros(())  # no view: FSDP2 warns of results that are
        self.d_bias = None if x.bias is None else x.images.new_zeros(())
        if wanted:
            self.d_anchors = [torch.empty_like(t) for t in x.anchors()]
            self.d_images, self.d_texts = _Sum.like(x.images), _Sum.like(x.texts)

    def run(self) -> tuple[Tensor, ...]:
        """Value, and gradients in the order of `Pairs`; empty where none is wanted."""
        n, halves = len(self.x.labels), self.terms.across + self.terms.within
        if halves:
            every = n if self.shares_scores else 0
            step = max(1, every or anchors_at_a_time(n, halves * max(1, len(self.x.texts))))
            for start in range(0, n, step):
                self._add(slice(start, min(start + step, n)))
        if self.wanted:
            for d in self.d_anchors:  # which are all candidates where none are given apart
                d[n if halves else 0 :].zero_()
        leaves = self.given[:LEAVES]
        found = self._gradients() if self.wanted else [None] * LEAVES
        none = self.x.images.new_empty
        pairs = zip(leaves, found, strict=True)
        gradients = (none(0) if g is None or t is None else g for t, g in pairs)
        return self.value, *gradients

    @property
    def shares_scores(self) -> bool:
        """Say if one block's scores are the other's, transposed, and all of them fit at once."""
        x, n = self.given, len(self.x.labels)
        fits = ENTRY // 2 * n * n <= WHOLE
        return x.alone and self.terms.two_sided and not self.terms.within and fits

    def _add(self, at: slice) -> None:
        """Add some anchors' terms to the value and to the gradients."""
        x, terms, labels = self.x, self.terms, self.x.labels[at]
        rows = Rows.of(terms, len(labels))
        images, texts = self.image_anchors[at], self.text_anchors[at]
        anchors = rows.stacked(images, texts)
        blocks = [_Block.of(anchors[0], x.texts, x.scale)]
        if self.shares_scores:
            blocks.append(blocks[0].transposed())
        elif terms.two_sided:
            blocks.append(_Block.of(anchors[1], x.images, x.scale))
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
            if self.shares_scores and blocks[1].gradient is not None:
                blocks[0].add(slice(None), blocks[1].gradient.T)
                blocks[1].gradient = None
            sums = [_Sum(d[at]) for d in self.d_anchors]
            _contract(blocks[0], rows, sums, self.d_texts)
            if terms.two_sided:
                _contract(blocks[1], rows, sums[::-1], self.d_images)
            for total in sums:
                total.total()

    def _gradients(self) -> list[Tensor | None]:
        """Gradients of the leaves, with the scale."""
        pairs = zip(self.d_anchors, self.x.anchors(), strict=True)
        (a, d_a), (b, d_b) = ((x.flatten(), d.flatten()) for d, x in pairs)
        d_scale = d_a.dot(a).view(1).addmv_(d_b[None], b)[0]
        candidates = [self.d_images.total(), self.d_texts.total()]
        features: list[Tensor | None] = [*self.d_anchors, *candidates]
        given = self.given.image_anchors, self.given.text_anchors
        for i, (own, anchor, d) in enumerate(zip(given, self.d_anchors, candidates, strict=True)):
            if own is None:
                d += anchor
                features[i] = None
        for x in features:
            if x is not None:
                x.mul_(self.x.scale)
        tables = []
        for table in (self.image_tables, self.text_tables):  # without anchors, nothing was added
            tables += table.gradients or [torch.zeros_like(t, dtype=d.dtype) for t in table.values]
        return [*features, d_scale, self.d_bias, *tables]

    # ------------------------------------------------------------ terms

    def _add_contrastive(
        self, blocks: list[_Block], rows: slice, labels: Tensor, positives: Tensor | None
    ) -> None:
        weight = self.terms.contrastive / 2 / len(self.x.labels)
        for block in blocks:
            total, gradient = info_nce_and_gradient(block.scores[rows], labels, positives)
            self.value.add_(total, alpha=weight)
            if self.wanted:
                block.add(rows, gradient, weight)

    def _add_sigmoid(
        self, block: _Block, rows: slice, labels: Tensor, positives: Tensor | None
    ) -> None:
        weight, logits = self.terms.sigmoid / len(self.x.labels), block.scores[rows]
        if self.x.bias is not None:
            logits = logits + self.x.bias
        total, gradient = sigmoid_and_gradient(logits, labels, positives)
        self.value.add_(total, alpha=weight)
        if self.wanted:
            block.add(rows, gradient.mul_(weight))
            if self.d_bias is not None:
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
                self.value.add_(difference.square().sum(), alpha=weight)
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
        lists_of = RankedLists(self.x, self.terms, len(labels), by_text.scores.shape[1])
        masks = list_masks(self.x, self.terms, labels, positives)
        sides = (by_text, by_image, self.text_tables), (by_image, by_text, self.image_tables)
        for (block, other, tables), mask in zip(sides, masks, strict=True):
            given = block.scores[rows], other.scores[rows], mask, tables.values
            lists, weights = lists_of.make(*given)
            found = kernels.values_and_gradients(
                lists, weights, self.terms.impl, wanted=self.wanted
            )
            self.value.view(1).addmv_(found[0][None], weights)
            if self.wanted:
                kept = found[1] if mask is None else found[1].masked_fill_(~mask, 0.0)
                block.add(rows, kept)
                tables.add(found[2:])


class _Sum:
    """A sum of products, the first of which writes it: it starts as uninitialised memory."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._started = memory, False

    @classmethod
    def like(cls, x: Tensor) -> "_Sum":
        return cls(torch.empty_like(x, memory_format=torch.contiguous_format))

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b."""
        self._memory.addmm_(a, b, beta=int(self._started))
        self._started = True

    def total(self) -> Tensor:
        """Return the sum, 0 of none."""
        return self._memory if self._started else self._memory.zero_()


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


def _contract(block: _Block, rows: Rows, anchors: Sequence[_Sum], candidates: _Sum) -> None:
    """Add a block's gradient to those of both modalities' anchors, and of its candidates."""
    gradient = block.gradient
    if gradient is None:
        return
    candidates.add(gradient.T, block.anchors)
    for half, anchor in zip((rows.across, rows.within), anchors, strict=True):
        if half.stop > half.start:
            anchor.add(gradient[half], block.candidates)


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


class _Value(Refusing):
    """The sum of the terms alone; a function, so that tangents are refused and not dropped."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        found: tuple[Tensor, ...] = pair_loss(*args, False)
        return found[0]


class _Streamed(MadeAhead):
    """The sum of the terms, and its gradients; arguments are `Pairs`, `Terms` and links."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        fields = len(Pairs._fields)
        found: tuple[Tensor, ...] = pair_loss(*args[:fields], *args[fields], True)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        return *products(ctx, grad), *(None,) * (len(Pairs._fields) + 1)  # terms, links too
