"""Settings from plain values: what is accepted, and how an error reads."""

from dataclasses import dataclass
from typing import Any

import pytest

from grank_kernels.recommender.settings import Settings, takes


@dataclass(frozen=True)
class Example(Settings):
    """One field of each kind."""

    epochs: int = takes(20, least=1)
    rate: float = takes(1e-3, above=0)
    kind: str = takes("adam", choices=("adam", "sgd"))
    patience: int | None = takes(None, least=0)
    shuffle: bool = True


def test_missing_keys_take_their_defaults() -> None:
    assert Example.from_dict({}, "training") == Example()
    assert Example.from_dict({"patience": 3, "shuffle": False}, "training") == Example(patience=3, shuffle=False)


@pytest.mark.parametrize("value", [2, "2", 2.0, "2e0"])
def test_what_reads_as_a_float_becomes_one(value: Any) -> None:
    rate = Example.from_dict({"rate": value}, "training").rate
    assert isinstance(rate, float)
    assert rate == 2.0


def test_to_dict_is_read_back() -> None:
    example = Example(epochs=3, rate=0.5, kind="sgd", patience=0)
    assert Example.from_dict(example.to_dict(), "training") == example


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"epoch": 3},
            "training.epoch is unknown, did you mean training.epochs? "
            "Keys of training: epochs, rate, kind, patience, shuffle",
        ),
        ({"zzz": 3}, "training.zzz is unknown. Keys of training: epochs, rate, kind, patience, shuffle"),
        ({7: 3}, "training.7 is unknown. Keys of training: epochs, rate, kind, patience, shuffle"),
        ({"epochs": "many"}, "training.epochs must be int, got 'many'"),
        ({"epochs": 1.5}, "training.epochs must be int, got 1.5"),
        ({"epochs": True}, "training.epochs must be int, got True"),
        ({"epochs": 0}, "training.epochs must be 1 or more, got 0"),
        ({"rate": "fast"}, "training.rate must be float, got 'fast'"),
        ({"rate": "nan"}, "training.rate must be finite, got nan"),
        ({"rate": False}, "training.rate must be float, got False"),
        ({"rate": 10**400}, f"training.rate must be finite, got {10**400}"),
        ({"kind": "lion"}, "training.kind must be one of adam, sgd, got 'lion'"),
        ({"shuffle": "yes"}, "training.shuffle must be bool, got 'yes'"),
        ({"patience": "3"}, "training.patience must be int | None, got '3'"),
        (["epochs"], "training must be a mapping of keys to values, got ['epochs']"),
    ],
)
def test_an_error_names_section_and_key(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Example.from_dict(values, "training")
    assert str(raised.value) == message
