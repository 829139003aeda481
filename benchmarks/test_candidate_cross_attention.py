"""`candidate_cross_attention` beside torch's attention, forward, and forward with gradient, on equal inputs.

The peers are SDPA, and on a GPU `varlen_attn` and flash-attn (if installed), eager and compiled. They get a copy of the
queries per user, which is not timed, and need no mask, since all histories have equal length. Results and gradients are
checked against float64 before they are timed.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

import grank_kernels as gk
from benchmarks.measure import TURNS, measure
from benchmarks.ranker import DEVICE, Run, check, extra_bytes

pytestmark = pytest.mark.filterwarnings("default")  # warnings of the compiler


class Shape(NamedTuple):
    B: int
    C: int
    L: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"B={self.B} C={self.C} L={self.L} H={self.H} D={self.D}"

    def id(self) -> str:
        """The case's id."""
        return f"B{self.B}-C{self.C}-L{self.L}-H{self.H}-D{self.D}"


SHAPES = [Shape(16, 300, 1000, 1, 128), Shape(32, 500, 200, 4, 32)]  # GRank's training batch, some of it; small heads
Attend = Callable[..., torch.Tensor]  # q (B, C, H, D), k, v (B, L, H, D) -> (B, C, H, D)


class Problem:
    """Inputs of one shape in one dtype; out and gradients in float64, and by eager SDPA in the dtype."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        torch.manual_seed(0)
        B, C, L, H, D = self.shape = shape
        self.inputs = [torch.randn(B, n, H, D).to(dtype).to(DEVICE).requires_grad_() for n in (C, L, L)]
        self.grad_out = torch.randn(B, C, H, D).to(dtype).to(DEVICE)
        self.plain = self.results(sdpa, self.inputs)
        # One user per call, since float64 SDPA stores the weights.
        users = [[x[b : b + 1].detach().double().requires_grad_() for x in self.inputs] for b in range(B)]
        exact = [self.results(sdpa, user, slice(b, b + 1)) for b, user in enumerate(users)]
        self.exact = [torch.cat(parts).cpu() for parts in zip(*exact, strict=True)]

    def results(self, attend: Attend, inputs: list[torch.Tensor], users: slice = slice(None)) -> list[torch.Tensor]:
        """`out`, and the gradients of q, k and v."""
        out = attend(*inputs)
        grads = torch.autograd.grad(out, inputs, self.grad_out[users].to(out.dtype))
        return [out.detach(), *grads]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = gk.candidate_cross_attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    return out


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def ragged(module: str, function: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    attention = getattr(pytest.importorskip(module), function)
    (B, C), L = q.shape[:2], k.shape[1]
    offsets = (torch.arange(B + 1, dtype=torch.int32, device=q.device) * n for n in (C, L))
    return attention(*(x.flatten(0, 1) for x in (q, k, v)), *offsets, C, L).unflatten(0, (B, C))


def compiled(attend: Attend) -> Attend:
    """Compiles on the first call, since importing the compiler takes seconds."""
    once = lru_cache(maxsize=None)(lambda: torch.compile(attend))
    return lambda *inputs: once()(*inputs)


def methods() -> dict[str, tuple[torch.dtype, Attend]]:
    found: dict[str, tuple[torch.dtype, Attend]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        attends: dict[str, Attend] = {"candidate_cross_attention": ours}
        if DEVICE == "cuda" or dtype != torch.float16:  # torch's float16 is slow on CPUs
            attends |= {"SDPA eager": sdpa, "SDPA compiled": compiled(sdpa)}
        if DEVICE == "cuda" and dtype != torch.float32:
            varlen = partial(ragged, "torch.nn.attention.varlen", "varlen_attn")
            flash = partial(ragged, "flash_attn", "flash_attn_varlen_func")
            attends |= {"varlen_attn eager": varlen, "varlen_attn compiled": compiled(varlen), "flash-attn": flash}
        name = str(dtype).removeprefix("torch.")
        found |= {f"{attend} {name}": (dtype, attends[attend]) for attend in attends}
    return found


METHODS = methods()


@pytest.fixture(scope="session")
def problems() -> Callable[[Shape, torch.dtype], Problem]:
    """The problems of one shape, one per dtype."""
    return lru_cache(maxsize=3)(Problem)


@pytest.mark.parametrize(
    ("shape", "gradient", "turn", "name"),
    [
        pytest.param(shape, gradient, turn, name, id=f"{shape.id()}-{gradient or 'forward'}-{name}-{turn}")
        for shape in SHAPES
        for gradient in ("", "gradient")
        for turn in TURNS
        for name in METHODS
    ],
)
def test_candidate_cross_attention(
    benchmark: Any,
    problems: Callable[[Shape, torch.dtype], Problem],
    shape: Shape,
    gradient: str,
    turn: int,
    name: str,
) -> None:
    dtype, attend = METHODS[name]
    problem = problems(shape, dtype)
    B, C, L, H, D = shape

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attend(*problem.inputs)

    def both() -> torch.Tensor:
        return problem.results(attend, problem.inputs)[-1]

    run: Run = both if gradient else forward
    got = problem.results(attend, problem.inputs) if gradient else [forward()]
    # A gradient is computed from a rounded lse of about 8: 8 more roundings.
    errors = [
        check(*x, dtype, roundings=1 if i == 0 else 9)
        for i, x in enumerate(zip(got, problem.exact, problem.plain, strict=False))
    ]
    numbers = B * H * D * (C + L)  # of q and out, or of k and v
    products = 2 if not gradient else 7  # S and out; again S, the gradients of S, v, q and k
    measure(
        benchmark,
        run,
        op="candidate_cross_attention",
        method=name,
        case=f"{shape} {'forward and backward' if gradient else 'forward'}",
        dtype=str(dtype).removeprefix("torch."),
        device=DEVICE,
        nbytes=2 * numbers * dtype.itemsize * (1 if not gradient else 3),
        operations=2 * B * H * C * L * D * products,
        error=max(errors),
        **{"extra bytes": extra_bytes(run)},
    )
