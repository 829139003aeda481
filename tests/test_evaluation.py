import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalNormalizedDCG

from grank_kernels.data import Cases
from grank_kernels.evaluation import hit_and_ndcg, most_popular


@pytest.mark.parametrize("k", [1, 5, 10, 50, 200])
def test_metrics_agree_with_torchmetrics(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    B, N = 60, 200
    recommended = torch.rand(B, N, generator=generator).argsort(1)
    targets = torch.randint(N, (B,), generator=generator)
    index = torch.arange(B).repeat_interleave(N)
    scores = torch.arange(N, 0, -1).float().repeat(B) / N
    relevant = (recommended == targets.unsqueeze(1)).flatten()
    got = hit_and_ndcg(recommended, targets, k)
    assert got.hr == pytest.approx(RetrievalHitRate(top_k=k)(scores, relevant, indexes=index).item(), abs=1e-6)
    assert got.ndcg == pytest.approx(RetrievalNormalizedDCG(top_k=k)(scores, relevant, indexes=index).item(), abs=1e-6)


def test_metrics_by_hand() -> None:
    recommended = torch.tensor([[7, 1, 2], [1, 7, 2], [1, 2, 7], [-1, -1, -1]])
    got = hit_and_ndcg(recommended, torch.tensor([7, 7, 7, 7]), 2)
    assert got.hr == 0.5
    assert got.ndcg == pytest.approx((1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 4)
    assert hit_and_ndcg(recommended, torch.tensor([7, 7, 7, 7]), 100).hr == 0.75  # a list may be shorter than k


def test_most_popular_skips_what_was_seen() -> None:
    train_items = torch.tensor([2, 2, 2, 0, 0, 3, 3, 1])
    cases = Cases(torch.arange(2), torch.tensor([0, 1, 3]), torch.tensor([2, 0, 3]), torch.tensor([0, 0]))
    assert most_popular(cases, train_items, 5, 4).tolist() == [[0, 3, 1, 4], [2, 1, 4, -1]]
