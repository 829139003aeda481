"""Fixtures of the tests of candidate_cross_attention."""

import pytest
import torch
from ranker_oracle import (
    FLOATS,
    backends_of,
)

BACKENDS = backends_of("candidate_cross_attention")
FORMS = [("dense", "ragged"), ("dense", "dense"), ("shared", "ragged"), ("shared", "dense"), ("ragged", "ragged"),
         ("ragged", "dense")]  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FLOATS, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["softmax", "silu"])
def activation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(form))
def form(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(zip(("queries", "history"), request.param, strict=True))
