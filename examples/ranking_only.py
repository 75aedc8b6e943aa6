"""Learn to rank anything: `plackett_luce_nll` without images, texts or CLIP.

    python -m examples.ranking_only

The Plackett-Luce model reads a ranking from the top: the first item wins against all, the second
against all that are left, and so on. Item d wins with probability softmax(score)[d] among those
left, so the log-likelihood of a ranking is a sum of log-softmaxes. (To the learning-to-rank
literature its negative is ListMLE.) Here a linear scorer learns it from graded judgements of
documents, as a search engine would.
"""

import torch
from torch import Tensor

from rankloss import plackett_luce_nll, rankings

QUERIES, DOCUMENTS, FEATURES = 64, 30, 8


def judgements(weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Documents (Q, M, F) with relevances (Q, M): a linear score of their features, and noise."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randn(QUERIES, DOCUMENTS, FEATURES, generator=generator)
    noise = torch.randn(QUERIES, DOCUMENTS, generator=generator)
    return documents, documents @ weights + 0.3 * noise


def agreement(scores: Tensor, relevance: Tensor) -> float:
    """Share of pairs of documents in the right order (Kendall's tau is 2 x this - 1)."""
    ours = scores[:, :, None] > scores[:, None, :]
    theirs = relevance[:, :, None] > relevance[:, None, :]
    differ = relevance[:, :, None] != relevance[:, None, :]
    return float((ours == theirs)[differ].float().mean())


def main(steps: int = 60, top_k: int = 10) -> tuple[float, float]:
    """Train, and return the agreement on queries of its own before and after."""
    hidden = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0))
    documents, relevance = judgements(hidden, seed=1)
    new_documents, new_relevance = judgements(hidden, seed=2)

    # The first 10 places are learned; every document competes for each of them. Equally relevant
    # documents keep their order, so shuffle them first if you have many ties.
    target = rankings(relevance, top_k=top_k)  # (Q, 10) indices of documents, the best first

    scorer = torch.nn.Linear(FEATURES, 1)
    torch.nn.init.zeros_(scorer.weight)
    torch.nn.init.normal_(scorer.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=0.05)

    def measured() -> float:
        with torch.no_grad():
            return agreement(scorer(new_documents).squeeze(2), new_relevance)

    before = measured()
    for step in range(steps):
        scores = scorer(documents).squeeze(2)  # (Q, M)
        # discount="log" would weight place k by 1 / log(k + 1), as NDCG does;
        # reduction="none" would give the (Q,) losses of the queries
        loss = plackett_luce_nll(scores, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a place")
    after = measured()
    print(f"pairs of new documents in the right order: {before:.1%} before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    main()
