"""Every family of blocks: causality, and the path of the candidates."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grank_kernels.recommender.models.blocks import BLOCKS, Backbone, HSTUBlock, SoftmaxAttention

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, C, D = 3, 9, 5, 16


@pytest.fixture(params=BLOCKS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    model = Backbone(request.param, dim=D, blocks=3, heads=2, dropout=0.1, length=12).double().eval()
    for parameter in model.parameters():  # some start too small to matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def test_rows_see_the_past_only(backbone: Backbone) -> None:
    x = rows(B, T)
    y = backbone(x)[0]
    changed = x.clone()
    changed[:, 5:] = rows(B, T - 5)
    z = backbone(changed)[0]
    assert torch.equal(z[:, :5], y[:, :5])
    assert (z[:, 5:] != y[:, 5:]).any(-1).all()
    torch.testing.assert_close(backbone(x[:, :5])[0], y[:, :5])  # later rows, padding included, change nothing


def test_order_matters(backbone: Backbone) -> None:
    x = rows(B, T)
    swapped = x[:, [1, 0, *range(2, T)]]
    assert not torch.allclose(backbone(x)[0][:, -1], backbone(swapped)[0][:, -1])


def test_history_does_not_notice_candidates(backbone: Backbone) -> None:
    x = rows(B, T)
    alone, caches = backbone(x)
    before = [part.clone() for cache in caches for part in cache]
    backbone.join(rows(B, C), torch.randint(0, T + 1, (B, C)), caches)
    assert torch.equal(alone, backbone(x)[0])
    assert all(torch.equal(a, part) for a, part in zip(before, (p for cache in caches for p in cache), strict=True))


def test_a_candidate_is_what_it_would_be_as_the_next_row(backbone: Backbone) -> None:
    """The decomposed attention against full attention: the candidate behind the rows that it sees, and nothing else."""
    x, candidates = rows(B, T), rows(B, C)
    visible = torch.randint(0, T + 1, (B, C))
    visible[0, 0], visible[1, 1] = 0, T
    got = backbone.join(candidates, visible, backbone(x)[1])
    for b in range(B):
        for c in range(C):
            row = torch.cat([x[b, : visible[b, c]], candidates[b, c : c + 1]]).unsqueeze(0)
            torch.testing.assert_close(got[b, c], backbone(row)[0][0, -1])


def test_permuting_candidates_permutes_outputs(backbone: Backbone) -> None:
    x, candidates, visible = rows(B, T), rows(B, C), torch.randint(0, T + 1, (B, C))
    order = torch.randperm(C)
    caches = backbone(x)[1]
    expected = backbone.join(candidates, visible, caches)[:, order]
    torch.testing.assert_close(backbone.join(candidates[:, order], visible[:, order], caches), expected)


def test_softmax_attention_is_masked_full_attention() -> None:
    """Over the concatenated tokens: history causal, candidates see what is visible and themselves."""
    attention = SoftmaxAttention(D, 2, rotary=False).double()
    x, candidates, visible = rows(B, T), rows(B, C), torch.randint(0, T + 1, (B, C))
    mask = torch.zeros(B, T + C, T + C, dtype=torch.bool)
    mask[:, :T, :T] = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, T:, :T] = torch.arange(T) < visible.unsqueeze(-1)
    mask[:, T:, T:] = torch.eye(C, dtype=torch.bool)
    both = torch.cat([x, candidates], 1)
    q, k, v = attention.qkv(both).view(B, T + C, 3, 2, -1).permute(2, 0, 3, 1, 4)
    full = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1)).transpose(1, 2).flatten(2)
    y, cache = attention(x)
    torch.testing.assert_close(torch.cat([y, attention.join(candidates, visible, cache)], 1), attention.out(full))


def test_hstu_by_its_equations() -> None:
    block = HSTUBlock(4, 2, 0.0, 6).double()
    torch.nn.init.normal_(block.uvqk.weight)
    torch.nn.init.normal_(block.distance)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    u, v, q, k = F.silu(F.linear(block.norm(x), block.uvqk.weight))[0].view(6, 4, 2, 2).unbind(1)
    attended = torch.zeros(6, 2, 2, dtype=torch.float64)
    for t in range(6):
        for s in range(t + 1):
            for h in range(2):
                weight = F.silu(q[t, h] @ k[s, h] + block.distance[h, t - s]) / 6
                attended[t, h] += weight * v[s, h]
    expected = x + block.out(block.attended_norm(attended.view(1, 6, 4)) * u.reshape(1, 6, 4))
    torch.testing.assert_close(block(x)[0], expected)


def test_rotary_logits_depend_on_distance_alone() -> None:
    attention = SoftmaxAttention(D, 2, rotary=True).double()
    x = rows(1, 1).expand(1, T, D)  # one vector everywhere: logits differ by distance only
    q, k, _ = attention._project(x, torch.arange(T)[None])
    logits = (q @ k.mT)[0]
    for distance in range(1, T):
        diagonal = logits.diagonal(-distance, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))
    assert not torch.allclose(logits[:, 0, 0], logits[:, 1, 0])


@pytest.mark.parametrize(
    ("kind", "dim", "message"),
    [
        ("transformer", 9, "dim must be a multiple of heads, got dim=9, heads=2"),
        ("hstu", 9, "dim must be a multiple of heads, got dim=9, heads=2"),
        ("llama", 6, "dim must be a multiple of 2 [*] heads, for rotary positions, got dim=6, heads=2"),
    ],
)
def test_widths_that_do_not_fit_are_refused(kind: str, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(kind, dim=dim, blocks=1, heads=2, dropout=0.0, length=4)
