"""Smoke test of an installed wheel, run by `make wheel` and cibuildwheel from a folder without the sources."""

import torch

import grank_kernels as gk

queries, items = torch.randn(4, 64), torch.randn(1000, 64)
top = gk.mips_topk(queries, items, 10, backend="cpu")
torch.testing.assert_close(top.values, torch.topk(queries @ items.T, 10).values)
print(f"{gk.__file__} searches\n{gk.show_config()}")
