"""Draws of sample_negatives: their distribution, and that (seed, row, item) alone decides them."""

from itertools import permutations
from typing import Any

import pytest
import torch
from ranker_oracle import FLOATS

import grank_kernels as gk
from grank_kernels.backends import BACKENDS, noise

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = [name for name, module in BACKENDS.items() if hasattr(module, "sample_negatives") and name != "reference"]
CPU = torch.device("cpu")


def operands(R: int = 6, N: int = 200, d: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return {
        "users": torch.randn(R, d, generator=g).to(dtype),
        "items": torch.randn(N, d, generator=g).to(dtype),
    }


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """In units of its standard deviation above its mean."""
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("backend", FAST)
def test_the_first_draw_follows_the_softmax(scale: float, backend: str) -> None:
    given = operands(1, 40)
    draws = 40_000
    users = given["users"].expand(draws, -1)
    ids, log_q = gk.sample_negatives(users, given["items"], 1, scale=scale, seed=11, backend=backend)
    p = (scale * given["users"].double() @ given["items"].double().T).softmax(1)[0]
    torch.testing.assert_close(log_q.double(), p.log()[ids], rtol=1e-5, atol=1e-5)
    often = p * draws > 5
    counts = torch.bincount(ids.flatten(), minlength=40).double()
    counts, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, p * draws))
    assert chi_square(counts[expected > 0], expected[expected > 0]) < 5


@pytest.mark.parametrize("backend", FAST)
def test_draws_without_repetition_have_their_order_and_inclusion_probabilities(backend: str) -> None:
    """All ordered pairs of five items: p_i p_j / (1 - p_i); an item's inclusion is the sum of its pairs."""
    logits = torch.tensor([1.0, 0.0, -0.5, 0.7, -1.0])
    draws = 40_000
    ids, _ = gk.sample_negatives(torch.ones(draws, 1), logits[:, None], 2, seed=5, backend=backend)
    p = logits.double().softmax(0)
    pairs = list(permutations(range(5), 2))
    expected = draws * torch.stack([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    counts = torch.tensor([int(((ids[:, 0] == i) & (ids[:, 1] == j)).sum()) for i, j in pairs]).double()
    assert chi_square(counts, expected) < 5
    for i in range(5):
        inclusion = sum(float(e) for e, pair in zip(expected, pairs, strict=True) if i in pair)
        spread = (inclusion * (1 - inclusion / draws)) ** 0.5
        assert abs(int((ids == i).sum()) - inclusion) < 5 * spread


def test_successive_seeds_are_independent() -> None:
    """Pairs of draws by seeds s and s + 1 for the same row: a contingency table of two by two halves."""
    items = torch.zeros(2, 1)
    pairs = torch.zeros(2, 2)
    for seed in range(400):
        first, second = (gk.sample_negatives(torch.ones(50, 1), items, 1, seed=s)[0] for s in (seed, seed + 1))
        pairs += torch.bincount((2 * first + second).flatten(), minlength=4).reshape(2, 2)
    assert chi_square(pairs.flatten().double(), torch.full((4,), 400 * 50 / 4).double()) < 5


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", FAST)
def test_the_same_ids_as_the_reference(dtype: torch.dtype, backend: str) -> None:
    given = operands(dtype=dtype)
    ids, log_q = gk.sample_negatives(**given, m=30, seed=3, backend=backend)
    want_ids, want = gk.sample_negatives(**given, m=30, seed=3, backend="reference")
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(log_q, want, rtol=1e-5, atol=1e-5)


def test_a_draw_depends_on_seed_row_and_item_alone(backend: str) -> None:
    """Not on the other rows, nor on m, nor on items behind those drawn."""
    given = operands()
    ids, _ = gk.sample_negatives(**given, m=30, seed=3, backend=backend)
    fewer, _ = gk.sample_negatives(given["users"][:4], given["items"], 10, seed=3, backend=backend)
    assert torch.equal(fewer, ids[:4, :10])
    shorter, _ = gk.sample_negatives(given["users"], given["items"][:150], 200, seed=3, backend=backend)
    for r in range(6):
        among = ids[r][ids[r] < 150]
        assert torch.equal(shorter[r, : len(among)], among)
    other, _ = gk.sample_negatives(**given, m=30, seed=4, backend=backend)
    assert (other != ids).any()


@pytest.mark.parametrize("form", ["padded", "pair", "windows"])
def test_excluded_items_are_not_drawn(form: str, backend: str) -> None:
    given = operands(R=3, N=20)
    lists = torch.tensor([[1, 5, -1], [0, 0, 19], [7, 8, 9]])
    exclude: Any = {
        "padded": lists,
        "pair": (torch.tensor([0, 3, 6, 9]), lists.flatten()),
        "windows": (torch.tensor([0, 3, 6, 9]), lists.flatten(), torch.tensor([0, 1, 2])),
    }[form]
    ids, log_q = gk.sample_negatives(**given, m=20, exclude=exclude, seed=1, backend=backend)
    for r in range(3):
        eligible = sorted(set(range(20)) - set(lists[r].tolist()))
        n = len(eligible)
        assert sorted(ids[r, :n].tolist()) == eligible
        assert (ids[r, n:] == -1).all()
        assert (log_q[r, n:] == -torch.inf).all()
        torch.testing.assert_close(log_q[r, :n].exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize(("R", "N"), [(0, 5), (2, 0), (3, 1)])
def test_few_rows_and_items(R: int, N: int, backend: str) -> None:
    ids, log_q = gk.sample_negatives(**operands(R, N), m=2, seed=0, backend=backend)
    assert ids.shape == log_q.shape == (R, 2)
    assert (ids[:, :N] == 0).all()
    assert (ids[:, N:] == -1).all()


def test_an_item_of_nan_is_not_drawn(backend: str) -> None:
    given = operands(R=2, N=10)
    given["items"][4] = torch.nan
    ids, _ = gk.sample_negatives(**given, m=10, seed=0, backend=backend)
    assert sorted(ids[0].tolist()) == [-1, *sorted(set(range(10)) - {4})]


def test_noise_is_gumbel() -> None:
    """The distribution function at 64 quantiles, its bits fixed, and noise that is rarer than float32 can tell."""
    keys = noise.row_keys(9, 400, CPU)[:, None], noise.item_keys(500, CPU)
    found = noise.gumbel(*keys)
    uniform = (-(-found).exp()).exp()
    counts = torch.histc(uniform.float(), 64, 0, 1).double()
    assert chi_square(counts, torch.full((64,), found.numel() / 64).double()) < 5
    assert found.unique().numel() == found.numel()


@pytest.mark.parametrize(("seed", "row", "item"), [(0, 0, 0), (1, 2, 3), ((1 << 63) - 1, 99, 12345)])
def test_noise_is_pinned_down(seed: int, row: int, item: int) -> None:
    """By Python's integers, which do not overflow."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    golden, odd = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
    row_key = mix(mix(seed + golden & mask) + (row + 1) * odd & mask)
    item_key = mix((item + 1) * golden & mask)
    uniform = ((mix(row_key + item_key & mask) >> 11) + 0.5) * 2.0**-53
    got = noise.gumbel(noise.row_keys(seed, row + 1, CPU)[row], noise.item_keys(item + 1, CPU)[item])
    want = -torch.log(-torch.log1p(-torch.tensor(uniform, dtype=torch.float64)))
    torch.testing.assert_close(got, want, rtol=1e-15, atol=1e-15)
