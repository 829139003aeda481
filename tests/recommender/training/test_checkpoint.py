"""Checkpoint files: tensors and plain values are read as written, all else is refused, nothing is executed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash

from grank_kernels.recommender.training.checkpoint import read_checkpoint, read_weights, write_checkpoint

WEIGHTS = {"model.items": torch.randn(5, 3), "model.bias": torch.randn(3, dtype=torch.bfloat16)}
STATE: dict[str, Any] = {
    "epoch": 3,
    "state_dict": WEIGHTS,
    "optimizer_states": [
        {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(0, 3)}}, "betas": (0.9, 0.98)}
    ],
    "callbacks": {"best": -float("inf"), "name": "ä", "none": None, "yes": True, 5: [1, [2, ()]]},
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", STATE)
    assert equal(read_checkpoint(tmp_path / "a.ckpt"), STATE)
    weights = read_weights(tmp_path / "a.ckpt")
    assert equal(dict(sorted(weights.items())), {"bias": WEIGHTS["model.bias"], "items": WEIGHTS["model.items"]})
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    table = torch.randn(6, 2)
    write_checkpoint(tmp_path / "a.ckpt", {"all": table, "some": table[2:4], "column": table[:, 1], "again": table})
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert equal(found, {"all": table, "some": table[2:4], "column": table[:, 1].clone(), "again": table})


def test_other_values_are_refused_by_their_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got PosixPath at callbacks/0/folder"):
        write_checkpoint(tmp_path / "a.ckpt", {"callbacks": [{"folder": tmp_path}]})
    assert not (tmp_path / "a.ckpt").exists()


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": _Hostile(tmp_path / "zip")}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(_Hostile(tmp_path / "plain")))
    for name in ("zip", "plain"):
        for read in (read_checkpoint, read_weights):
            with pytest.raises(ValueError, match=rf"{name}\.ckpt: expected a checkpoint"):
                read(tmp_path / f"{name}.ckpt")
        assert not (tmp_path / name).exists()
    pickle.loads((tmp_path / "plain.ckpt").read_bytes())
    assert (tmp_path / "plain").exists()  # so the file was hostile


def crafted(path: Path, state: str, **tensors: torch.Tensor) -> Path:
    """A file whose checksum is right, as whoever writes a file can make it."""
    hasher = xxhash.xxh3_128(state.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name}{tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.numpy())
    metadata = {"format": "grank_kernels.checkpoint", "format_version": "1", "state": state}
    path.write_bytes(safetensors.torch.save(tensors, metadata | {"xxh3_128": hasher.hexdigest()}))
    return path


def test_a_crafted_file_is_read(tmp_path: Path) -> None:
    path = crafted(tmp_path / "a.ckpt", '{"dict": [["x", {"tensor": "y"}]]}', y=torch.ones(2))
    assert equal(read_checkpoint(path), {"x": torch.ones(2)})


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "3",
        '{"object": "os.system"}',
        '{"dict": [["x", {"tensor": "missing"}]]}',
        '{"dict": [[[], 1]]}',
        '{"dict": [[{"dict": []}, 1]]}',
        '{"dict": 5}',
        '{"dict": [1]}',
        '{"dict": [], "list": []}',
        '{"tuple": 5}',
        "{}",
        "[" * 100_000,
        '{"tuple": [' * 5_000 + "]}" * 5_000,
    ],
    ids=lambda state: state[:30],
)
def test_a_crafted_state_is_refused(state: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.ckpt: expected the state of a checkpoint"):
        read_checkpoint(crafted(tmp_path / "a.ckpt", state))


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.ckpt"):
        read_checkpoint(tmp_path / "a.ckpt")
    path = tmp_path / "a.ckpt"
    path.write_bytes(safetensors.torch.save({"x": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"a\.ckpt: expected grank_kernels\.checkpoint version 1, got None"):
        read_checkpoint(path)


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"a\.ckpt: the checkpoint is damaged"):
        read_checkpoint(path)


def read_or_refused(path: Path) -> dict[str, Any] | None:
    try:
        return read_checkpoint(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return None


@pytest.mark.slow
def test_no_damaged_file_is_read(tmp_path: Path) -> None:
    """A fuzz target: any change of a byte is noticed, and no error but ours is raised."""
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, STATE)
    whole, random = path.read_bytes(), Random(1)
    length = int.from_bytes(whole[:8], "little")
    for trial in range(4000):
        data = bytearray(whole)
        action = trial % 4
        at = random.randrange(8 + length if action < 2 else len(data))  # the header is where a reader can go wrong
        if action == 0:
            data[at] = random.randrange(256)
        elif action == 1:
            data[at:at] = random.choice([b"[", b"{", b'"', b"9" * 20, b"-1", b"null", b"\xff"])
            data[:8] = (length + len(data) - len(whole)).to_bytes(8, "little")
        elif action == 2:
            del data[at:]
        else:
            data[:8] = random.randrange(1 << random.randrange(1, 64)).to_bytes(8, "little")
        if data == whole:
            continue
        path.write_bytes(data)
        found = read_or_refused(path)
        assert found is None or equal(found, STATE), trial  # equal: white space in the header
    assert json.loads(whole[8 : 8 + length])["__metadata__"]["format"] == "grank_kernels.checkpoint"
