"""The contract of score_candidates, on every backend, dtype and kind of table."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_oracle import FLOATS, HEAD, Scoring, allowed, backends_of, largest, offsets_of, on, scoring

import grank_kernels as gk
from grank_kernels.backends import BACKENDS as BY_NAME
from grank_kernels.ops.requests import version_of

INF = math.inf
BACKENDS = backends_of("score_candidates")
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200]  # of histories
COUNTS = [1, 2, 5, 15, 16, 17, 63, 64, 65, 100, 257]  # of candidates
WIDTHS = [16, 32, 64, 128]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FLOATS, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def check(problem: Scoring, backend: str) -> torch.Tensor:
    """The scores, after they were compared with float64: at most twice what plain torch loses in that dtype."""
    got, exact = problem.scores(backend), problem.formula(torch.float64)
    assert got.dtype == torch.float32
    there = problem.candidate_ids >= 0
    assert torch.equal(got == -INF, ~there)
    plain = problem.formula(problem.keys.dtype)
    size, _ = problem.sizes()
    assert largest((got.double() - exact)[there]) <= allowed(plain[there], exact[there], problem.keys.dtype, size)
    return got


def same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def alike(got: torch.Tensor, want: torch.Tensor, backend: str) -> None:
    """Bit for bit, but for the reference: the order of its sums is torch's, which goes by shapes and strides."""
    if backend == "reference":
        torch.testing.assert_close(got, want)
    else:
        same_bits(got, want)


# ---- meaning ----


@pytest.mark.parametrize("i", range(24))
def test_loses_no_more_than_twice_what_torch_does(i: int, dtype: torch.dtype, backend: str) -> None:
    """Every length, count and width in some company, three users at a time, now and then one without history."""
    lengths = [LENGTHS[(5 * i + j) % len(LENGTHS)] for j in range(3)]
    d, h = WIDTHS[i % 4], WIDTHS[(i // 4) % 4]
    problem = scoring(lengths, COUNTS[i % len(COUNTS)], d, h, dtype=dtype, activation=list(HEAD)[i % 3])
    check(problem, backend)


@pytest.mark.parametrize(("d", "h"), [(1, 1), (3, 5), (24, 40), (130, 20), (20, 200), (300, 7)])
def test_other_widths(d: int, h: int, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([70, 0, 3], 66, d, h, dtype=dtype)
    reason = BY_NAME[backend].score_candidates_unsupported(problem.items, problem.keys, problem.values)
    if reason is None:
        check(problem, backend)
    else:  # only a GPU's kernels have fixed widths
        assert backend == "cuda"
        with pytest.raises(ValueError, match="width"):
            problem.scores(backend)


@pytest.mark.parametrize("table", [*FLOATS, torch.int8], ids=lambda dtype: str(dtype)[6:])
def test_tables_of_another_precision_than_the_rest(table: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    check(scoring([40, 0, 7], 70, 32, 64, dtype=dtype, table=table), backend)


@pytest.mark.parametrize("activation", HEAD)
def test_scale_and_bias(activation: str, backend: str) -> None:
    problem = scoring([30, 5], 40, activation=activation)
    base = check(problem, backend)
    assert not torch.equal(check(problem.but(softmax_scale=0.7), backend), base)
    there = problem.candidate_ids >= 0
    moved = check(problem.but(out_bias=-3), backend)
    torch.testing.assert_close(moved[there], base[there] - 3.25)


def test_default_backend(backend: str) -> None:
    problem = scoring([30, 5])
    torch.testing.assert_close(problem.scores(None), problem.scores(backend))


# ---- bits ----


def whole(*shape: int, most: int = 4) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape).float()


@pytest.mark.parametrize("length", [0, 1, 2, 32, 64, 256])
@pytest.mark.parametrize("C", [1, 17, 65])
def test_equal_logits_average_exactly(length: int, C: int, dtype: torch.dtype, backend: str) -> None:
    """Whole numbers, and 1 / L a power of two: every sum is exact in any order."""
    B, d, h = 2, 32, 16
    problem = Scoring(
        torch.randint(-1, 50, (B, C)),
        whole(50, d).to(dtype),
        torch.zeros(B * length, d).to(dtype),
        whole(B * length, h).to(dtype),
        offsets_of([length] * B),
        whole(B, h).to(dtype),
        whole(d, h, most=1).to(dtype),
        whole(h).to(dtype),
    )
    same_bits(problem.scores(backend), problem.formula(torch.float64).float())


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_logit_far_above_the_rest_takes_all(scale: float, dtype: torch.dtype, backend: str) -> None:
    """Row i of the table matches key i alone. A kernel may sum the weights more exactly than it multiplies them."""
    L, h = 64, 32
    problem = scoring([L, L], 65, L, h, N=L, dtype=dtype)
    problem = problem.but(
        items=(1000 * torch.eye(L)).to(dtype),
        keys=(torch.eye(L)).repeat(2, 1).to(dtype),
        values=whole(2 * L, h).to(dtype),
        user_hidden=whole(2, h).to(dtype),
        item_weight=torch.zeros(L, h).to(dtype),
        out_weight=whole(h).to(dtype),
        softmax_scale=scale,
    )
    ids, there = problem.candidate_ids, problem.candidate_ids >= 0
    users = torch.arange(2)[:, None]
    hidden = problem.values.float()[L * users + ids.clamp(min=0)] + problem.user_hidden.float()[:, None]
    out = problem.out_weight.float()
    error = (problem.scores(backend) - (hidden.relu() @ out + 0.25)).abs()
    assert (error <= 2 * torch.finfo(dtype).eps * (hidden.relu() @ out.abs()))[there].all()


def test_int8_table_is_its_rows_times_their_scale(dtype: torch.dtype, backend: str) -> None:
    """127 in every row, so that the scale is 1 and the table holds the whole numbers as they are."""
    rows = whole(80, 32, most=127)
    rows[:, 0] = 127
    problem = scoring([50, 0, 64], 65, 32, 16, N=80, dtype=dtype)
    problem = problem.but(keys=torch.zeros_like(problem.keys), values=torch.ones_like(problem.values))
    problem = problem.but(item_weight=whole(32, 16, most=1).to(dtype), out_weight=whole(16).to(dtype))
    problem = problem.but(user_hidden=whole(3, 16).to(dtype))
    table = gk.ItemTable.from_rows(rows, dtype=torch.int8)
    want = problem.but(items=rows).formula(torch.float64)
    got = problem.but(items=table).scores(backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)  # the average of 50 ones need not be 1


# ---- a score depends on its row and its user alone ----


@pytest.mark.parametrize("table", [torch.float32, torch.int8])
def test_candidates_do_not_see_each_other(table: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([70, 0, 3, 64], 130, 32, 16, dtype=dtype, table=table)
    got = problem.scores(backend)
    order = torch.randperm(130)
    for ids, want in (
        (problem.candidate_ids[:, order], got[:, order]),
        (problem.candidate_ids[:, 5:6], got[:, 5:6]),
        (problem.candidate_ids[:, :67], got[:, :67]),
        (problem.candidate_ids[:, [7] * 40], got[:, [7] * 40]),
    ):
        again = problem.but(candidate_ids=ids).scores(backend)
        alike(again, want, backend)
    for b in range(4):
        start, stop = problem.cu_seqlens[b : b + 2].tolist()
        alone = problem.but(
            candidate_ids=problem.candidate_ids[b : b + 1],
            keys=problem.keys[start:stop],
            values=problem.values[start:stop],
            cu_seqlens=torch.tensor([0, stop - start]),
            user_hidden=problem.user_hidden[b : b + 1],
        )
        same_bits(alone.scores(backend), got[b : b + 1])


def test_repeated_ids_score_alike(dtype: torch.dtype, backend: str) -> None:
    ids = torch.randint(0, 3, (2, 130))
    got = scoring([70, 3], 130, dtype=dtype).but(candidate_ids=ids).scores(backend)
    for b in range(2):
        for i in range(3):
            repeated = got[b, ids[b] == i]
            torch.testing.assert_close(repeated, repeated[:1].expand_as(repeated))


@pytest.mark.parametrize("b", [0, 1, 2, 3])
def test_nan_of_one_user_stays_there(b: int, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([65, 17, 130, 64], 70, 32, 16, dtype=dtype)
    want = problem.scores(backend)
    start, stop = problem.cu_seqlens[b : b + 2].tolist()
    for bad in (math.nan, INF):
        keys, values, hidden = (x.clone() for x in (problem.keys, problem.values, problem.user_hidden))
        keys[start:stop], values[start:stop], hidden[b] = bad, bad, bad
        got = problem.but(keys=keys, values=values, user_hidden=hidden).scores(backend)
        others = torch.arange(4) != b
        same_bits(got[others], want[others])
        there = problem.candidate_ids[b] >= 0
        assert got[b, there].isnan().all() or bad == INF
        assert (got[b, ~there] == -INF).all()


def test_rows_of_nobody_are_not_seen(dtype: torch.dtype, backend: str) -> None:
    """Before the first user, behind the last, and in the table."""
    problem = scoring([17, 0, 65], 70, 32, 16, dtype=dtype)
    want = problem.scores(backend)
    keys, values = (torch.cat([x[:3] * math.nan, x, x[:4] * math.nan]) for x in (problem.keys, problem.values))
    got = problem.but(keys=keys, values=values, cu_seqlens=problem.cu_seqlens + 3).scores(backend)
    same_bits(got, want)
    used = torch.isin(torch.arange(100), problem.candidate_ids)
    rows = problem.items.masked_fill(~used[:, None], math.nan)
    same_bits(problem.but(items=rows).scores(backend), want)
    nothing = problem.but(items=rows * math.nan, candidate_ids=torch.full((3, 70), -1))
    assert (nothing.scores(backend) == -INF).all()


def test_nan_row_scores_nan(backend: str) -> None:
    problem = scoring([17, 0], 70)
    want = problem.scores(backend)
    problem.items[7] = math.nan
    bad = problem.candidate_ids == 7
    assert bad.any()
    got = problem.scores(backend)
    assert got[bad].isnan().all()
    same_bits(got[~bad], want[~bad])


# ---- odd inputs ----


@pytest.mark.parametrize(
    ("B", "C", "N", "length"), [(0, 5, 9, 0), (2, 0, 9, 3), (2, 5, 9, 0), (2, 5, 0, 3), (0, 0, 0, 0)]
)
def test_degenerate(B: int, C: int, N: int, length: int, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([length] * B, C, N=max(N, 1), dtype=dtype)
    if N == 0:
        problem = problem.but(candidate_ids=torch.full((B, C), -1), items=problem.items[:0])
    check(problem, backend)


@pytest.mark.parametrize("id", [-1, -2, torch.iinfo(torch.int64).min])
def test_negative_ids_score_minus_infinity(id: int, backend: str) -> None:
    problem = scoring([30, 0], 40)
    problem.candidate_ids[:, ::3] = id
    check(problem, backend)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([65, 2], 70, 32, 16, dtype=dtype)
    problem.keys[:, 0] = size
    problem.items[:, 0] = 1
    assert check(problem.but(softmax_scale=1.0), backend)[problem.candidate_ids >= 0].isfinite().all()


def test_int32_ids_and_offsets(backend: str) -> None:
    problem = scoring([30, 0, 5], 40)
    narrow = problem.but(candidate_ids=problem.candidate_ids.int(), cu_seqlens=problem.cu_seqlens.int())
    same_bits(narrow.scores(backend), problem.scores(backend))


def test_tables_with_ids_of_their_own(dtype: torch.dtype, backend: str) -> None:
    problem = scoring([30, 0, 5], 40, dtype=dtype)
    ids = torch.randperm(10**6)[:100] * 10**12
    table = gk.ItemTable.from_rows(problem.items, ids=ids)
    external = ids[problem.candidate_ids.clamp(min=0)].where(problem.candidate_ids >= 0, -5)
    same_bits(problem.but(items=table, candidate_ids=external).scores(backend), problem.scores(backend))


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal tensors that lie otherwise in memory, with NaN (or the largest number) between."""
    poison = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = torch.full([2 * n + 1 for n in x.shape], poison, dtype=x.dtype)
    inner = wide[tuple(slice(1, 2 * n, 2) for n in x.shape)]
    inner.copy_(x)
    rows = torch.full([*x.shape[:-1], x.shape[-1] + 3], poison, dtype=x.dtype)
    rows[..., 1:-2] = x
    return {"every other": inner, "guarded": rows[..., 1:-2]} | (
        {"transposed": x.mT.contiguous().mT} if x.dim() > 1 else {}
    )


def test_layouts(dtype: torch.dtype, backend: str) -> None:
    problem = scoring([30, 0, 5], 40, 32, 16, dtype=dtype)
    want = problem.scores(backend)
    for name, x in vars(problem).items():
        if isinstance(x, torch.Tensor):
            for layout, same in strided(x).items():
                alike(problem.but(**{name: same}).scores(backend), want, backend)
                assert torch.equal(same, x), (name, layout)  # left alone
    for name in ("keys", "values", "user_hidden", "out_weight"):
        one = vars(problem)[name][:1]
        shape = vars(problem)[name].shape
        flat = problem.but(**{name: one.expand(shape)}).scores(backend)
        alike(flat, problem.but(**{name: one.expand(shape).contiguous()}).scores(backend), backend)


def test_signs_yet_to_be_applied(backend: str) -> None:
    problem = scoring([30, 5], 40)
    want = problem.scores(backend)
    for name in ("items", "keys", "values", "user_hidden", "item_weight", "out_weight"):
        x = vars(problem)[name]
        same_bits(problem.but(**{name: torch._neg_view(-x)}).scores(backend), want)


def test_whatever_the_process_has_set(backend: str) -> None:
    problem = scoring([30, 5], 40)
    want = problem.scores(backend)
    torch.set_default_dtype(torch.float64)
    try:
        same_bits(problem.scores(backend), want)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        same_bits(problem.scores(backend), want)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        same_bits(problem.scores(backend), want)


# ---- errors ----

GOOD: dict[str, Any] = {
    "candidate_ids": torch.tensor([[1, 2, -1]]),
    "items": torch.ones(20, 8),
    "keys": torch.ones(4, 8),
    "values": torch.ones(4, 6),
    "cu_seqlens": torch.tensor([0, 4]),
    "user_hidden": torch.ones(1, 6),
    "item_weight": torch.ones(8, 6),
    "out_weight": torch.ones(6),
}
TABLE = gk.ItemTable.from_rows(torch.ones(20, 8), ids=torch.arange(20) * 2)
ERRORS: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("ids list", TypeError, "candidate_ids must be a torch.Tensor or an array, got list", {"candidate_ids": [[1]]}),
    ("ids float", ValueError, "candidate_ids must be torch.int64 or torch.int32, got torch.float32",
     {"candidate_ids": torch.ones(1, 3)}),
    ("ids 1-d", ValueError, r"candidate_ids must have 2 dimensions, got \(3,\)",
     {"candidate_ids": torch.arange(3)}),
    ("id too large", ValueError, "candidate_ids must be below 20, negative for none, got 20",
     {"candidate_ids": torch.tensor([[1, 20]])}),
    ("id not in the table", ValueError, "candidate_ids must be in the table, got 7",
     {"candidate_ids": torch.tensor([[2, 7]]), "items": TABLE}),
    ("items list", TypeError, "items must be a torch.Tensor, an array or an ItemTable, got list",
     {"items": torch.ones(20, 8).tolist()}),
    ("items int8", ValueError, "items must be .*, got torch.int8", {"items": torch.ones(20, 8, dtype=torch.int8)}),
    ("items 1-d", ValueError, r"items must have 2 dimensions, got \(8,\)", {"items": torch.ones(8)}),
    ("items on another device", ValueError, "candidate_ids must be on meta, the device of items, got cpu",
     {"items": torch.ones(20, 8, device="meta")}),
    ("keys width", ValueError, r"keys must be \(T, d\) = \(4, 8\), got \(4, 9\)", {"keys": torch.ones(4, 9)}),
    ("keys rows", ValueError, r"keys must be \(T, d\) = \(4, 8\), got \(5, 8\)", {"keys": torch.ones(5, 8)}),
    ("keys dtype", ValueError, "keys must be torch.float32, got torch.float16", {"keys": torch.ones(4, 8).half()}),
    ("keys on another device", ValueError, "keys must be on cpu, the device of items, got meta",
     {"keys": torch.ones(4, 8, device="meta")}),
    ("values None", TypeError, "values must be a torch.Tensor or an array, got NoneType", {"values": None}),
    ("values int64", ValueError, "values must be torch.float32, torch.float16 or torch.bfloat16, got torch.int64",
     {"values": torch.ones(4, 6).long()}),
    ("values 3-d", ValueError, r"values must have 2 dimensions, got \(1, 4, 6\)",
     {"values": torch.ones(1, 4, 6)}),
    ("offsets length", ValueError, r"cu_seqlens must be \(B \+ 1,\) = \(2,\), got \(3,\)",
     {"cu_seqlens": torch.tensor([0, 2, 4])}),
    ("offsets float", ValueError, r"cu_seqlens must be .*, got torch.float32", {"cu_seqlens": torch.tensor([0.0, 4.0])}),
    ("offsets fall", ValueError, "cu_seqlens must not decrease", {"cu_seqlens": torch.tensor([4, 0])}),
    ("offsets past the end", ValueError, r"cu_seqlens must lie in \[0, 4\], got 0 to 5",
     {"cu_seqlens": torch.tensor([0, 5])}),
    ("offsets negative", ValueError, r"cu_seqlens must lie in .*, got -1 to 4", {"cu_seqlens": torch.tensor([-1, 4])}),
    ("user_hidden", ValueError, r"user_hidden must be \(B, h\) = \(1, 6\), got \(2, 6\)",
     {"user_hidden": torch.ones(2, 6)}),
    ("item_weight transposed", ValueError, r"item_weight must be \(d, h\) = \(8, 6\), got \(6, 8\)",
     {"item_weight": torch.ones(6, 8)}),
    ("item_weight dtype", ValueError, "item_weight must be torch.float32, got torch.bfloat16",
     {"item_weight": torch.ones(8, 6).bfloat16()}),
    ("out_weight", ValueError, r"out_weight must be \(h,\) = \(6,\), got \(5,\)", {"out_weight": torch.ones(5)}),
    ("out_bias", TypeError, "out_bias must be a float, got Tensor", {"out_bias": torch.ones(1)}),
    ("scale", TypeError, "softmax_scale must be a float, got str", {"softmax_scale": "1"}),
    ("activation", ValueError, "activation must be 'relu', 'silu' or 'gelu', got 'swish2'",
     {"activation": "swish2"}),
    ("backend", ValueError, "backend must be None, 'cpu', ", {"backend": "nope"}),
    ("gradient", ValueError, "keys must not require a gradient.*no_grad",
     {"keys": torch.ones(4, 8, requires_grad=True)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    gk.score_candidates(**GOOD)
    with pytest.raises(error, match=message):
        gk.score_candidates(**{**GOOD, **changes})


def test_a_backend_without_the_op() -> None:
    for name, module in BY_NAME.items():
        if not hasattr(module, "score_candidates"):
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run: it has no score_candidates"):
                gk.score_candidates(**GOOD, backend=name)


def test_no_gradient_is_wanted_under_no_grad(backend: str) -> None:
    problem = scoring([30, 5])
    want = problem.scores(backend)
    problem.item_weight.requires_grad_()
    with torch.no_grad():
        same_bits(problem.scores(backend), want)


# ---- torch.library, torch.compile, torch.export ----


def op_arguments(problem: Scoring, backend: str) -> tuple[Any, ...]:
    rows, row_scale, *_ = version_of(problem.items).operands()
    given = (
        problem.candidate_ids,
        rows,
        row_scale,
        *(vars(problem)[name] for name in ("keys", "values", "cu_seqlens")),
    )
    weights = (problem.user_hidden, problem.item_weight, problem.out_weight)
    return (*(on(backend, x) for x in given + weights), 0.5, None, problem.activation, backend)


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param({"lengths": [5, 0, 20]}, id="plain"),
        pytest.param({"lengths": [5, 0, 20], "dtype": torch.bfloat16, "table": torch.int8}, id="int8"),
        pytest.param({"lengths": [], "C": 0, "activation": "gelu"}, id="empty"),
    ],
)
def test_opcheck(problem: dict[str, Any], backend: str) -> None:
    torch.library.opcheck(torch.ops.grank.score_candidates.default, op_arguments(scoring(**problem), backend))


def test_meta_tensors() -> None:
    """Shapes and dtypes without a kernel, as for any torch op."""
    got = gk.score_candidates(**{name: x.to("meta") for name, x in GOOD.items()})
    assert (got.shape, got.dtype, got.device.type) == ((1, 3), torch.float32, "meta")


def compiled_agrees(compiler: str, backend: str) -> None:
    torch.compiler.reset()

    def best(scale: float, *operands: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return gk.score_candidates(*operands, **more, softmax_scale=scale, backend=backend).tanh().sum(1)

    compiled = torch.compile(best, fullgraph=True, dynamic=True, backend=compiler)
    for lengths, C in (([30, 0, 5], 40), ([7, 9, 1, 0], 50), ([3, 1], 12)):
        given = vars(scoring(lengths, C).but(candidate_ids=torch.randint(0, 100, (len(lengths), C))))
        given = {name: on(backend, x) for name, x in given.items() if isinstance(x, torch.Tensor)}
        for scale in (None, 0.3):
            torch.testing.assert_close(compiled(scale, **given), best(scale, **given))


def test_compile(backend: str) -> None:
    compiled_agrees("aot_eager", backend)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_compile_inductor(backend: str) -> None:
    compiled_agrees("inductor", backend)


@pytest.mark.parametrize("external", [False, True])
def test_compile_of_a_table(external: bool, backend: str) -> None:
    torch.compiler.reset()
    problem = scoring([30, 0, 5], 40)
    ids = torch.randperm(100) * (10**12 if external else 1)
    table = gk.ItemTable.from_rows(problem.items, ids=ids if external else None, dtype=torch.int8)
    candidates = ids[problem.candidate_ids.clamp(min=0)].where(problem.candidate_ids >= 0, -1)
    problem = problem.but(items=table, candidate_ids=candidates)
    compiled = torch.compile(gk.score_candidates, fullgraph=True, backend="aot_eager")
    given = {name: on(backend, x) for name, x in vars(problem).items()}
    same_bits(compiled(**given, backend=backend).cpu(), problem.scores(backend))


def test_compile_for_export(backend: str) -> None:
    class Reranker(torch.nn.Module):
        def forward(self, candidate_ids: torch.Tensor, operands: dict[str, torch.Tensor]) -> torch.Tensor:
            return gk.score_candidates(candidate_ids, **operands, backend=backend)

    given = {name: on(backend, x) for name, x in GOOD.items()}
    ids = given.pop("candidate_ids")
    C = torch.export.Dim("C", min=2)
    shapes = {"candidate_ids": {1: C}, "operands": dict.fromkeys(given)}
    program = torch.export.export(Reranker(), (ids, given), dynamic_shapes=shapes)
    more = on(backend, torch.randint(0, 20, (1, 9)))
    torch.testing.assert_close(program.module()(more, given), Reranker()(more, given))


# ---- properties ----


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_hypothesis_comes_up_with(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    widths = st.sampled_from(WIDTHS) if backend == "cuda" else st.integers(1, 140)
    dtype, table = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([*FLOATS, torch.int8]))
    problem = scoring(
        draw(st.lists(st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(0, 300)), max_size=5)),
        draw(st.one_of(st.integers(0, 20), st.integers(60, 140))),
        draw(widths),
        draw(widths),
        draw(st.integers(1, 300)),
        dtype=dtype,
        table=table,
        activation=draw(st.sampled_from(list(HEAD))),
        softmax_scale=draw(st.sampled_from([None, 0.0, -0.5, 1e-30, 30.0])),
        out_bias=draw(st.sampled_from([0, -1.5, 1e30])),
    )
    got, exact = problem.scores(backend), problem.formula(torch.float64)
    there = problem.candidate_ids >= 0
    assert torch.equal(got == -INF, ~there)
    assert ((got.double() - exact).abs()[there] <= problem.sizes()[1][there]).all()
