import torch

from grank_kernels.recommender.models.layers import prefix_means


def test_prefix_means() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    counts = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    visible = torch.tensor([[0, 1, 2, 5], [2, 3, 5, 4]])
    got = prefix_means(x, counts, visible)
    for b in range(2):
        for m in range(4):
            rows = x[b, : visible[b, m]][counts[b, : visible[b, m]]]
            torch.testing.assert_close(got[b, m], rows.mean(0) if len(rows) else torch.zeros(3).double())
