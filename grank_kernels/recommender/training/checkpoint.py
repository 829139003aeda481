"""Checkpoint files: tensors and plain values in a safetensors file. Nothing is unpickled. Needs no trainer.

The tensors of a checkpoint are named by their path in it, such as `state_dict/model.items`. Its other values are JSON
in the metadata, beside a digest of the whole content (XXH3, 128 bits).
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grank_kernels.common.atomic_files import replace_file

_FORMAT = "grank_kernels.checkpoint"
_VERSION = "1"
_PLAIN = (bool, int, float, str, type(None))


def write_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; a kill at any moment leaves the old file or the new one.

    Args:
        path: file to create or replace.
        checkpoint: nested dictionaries, lists and tuples of tensors, numbers, strings and None.

    Raises:
        TypeError: the checkpoint holds a value of another type; the message names its path.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    state = json.dumps(_encoded(checkpoint, "", tensors))
    metadata = {"format": _FORMAT, "format_version": _VERSION, "state": state, "xxh3_128": _digest(state, tensors)}
    with replace_file(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file that `write_checkpoint` has written; the tensors are on the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no checkpoint or is damaged.
    """
    metadata, tensors = _read(Path(path))
    try:
        checkpoint = _decoded(json.loads(metadata["state"]), tensors)
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the state of a checkpoint, got {error!r}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: expected the state of a checkpoint, got a {type(checkpoint).__name__}")
    return checkpoint


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of the model in a checkpoint, by the names that the model gives them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no checkpoint or is damaged.
    """
    prefix = "state_dict/model."
    _, tensors = _read(Path(path))
    # Clones: the tensors are mapped from the file, which may change later.
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a checkpoint of this package (safetensors), got {error}") from None
    if metadata.get("format") != _FORMAT or metadata.get("format_version") != _VERSION:
        got = f"{metadata.get('format')} version {metadata.get('format_version')}"
        raise ValueError(f"{path}: expected {_FORMAT} version {_VERSION}, got {got}")
    if metadata.get("xxh3_128") != _digest(metadata.get("state", ""), tensors):
        raise ValueError(f"{path}: the checkpoint is damaged, its checksum differs")
    return metadata, tensors


def _digest(state: str, tensors: dict[str, Tensor]) -> str:
    hasher = xxhash.xxh3_128(state.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(name.encode())
        update_digest(hasher, tensor)
    return hasher.hexdigest()


def update_digest(hasher: Any, tensor: Tensor) -> None:
    """Feed dtype, shape and bytes of a tensor to a hasher of xxhash."""
    hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    hasher.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _encoded(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a value: dictionaries as lists of pairs, since their keys may be numbers; tensors go to `tensors`."""
    if isinstance(value, Tensor):
        stored = value.detach().cpu().contiguous()
        memory = stored.untyped_storage().data_ptr()
        shared = any(memory == other.untyped_storage().data_ptr() for other in tensors.values())
        tensors[path] = stored.clone() if shared else stored  # safetensors refuses tensors that share memory
        return {"tensor": path}
    if isinstance(value, dict):
        below = f"{path}/" if path else ""
        return {"dict": [[_encoded(k, path, {}), _encoded(v, f"{below}{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(entry, f"{path}/{i}", tensors) for i, entry in enumerate(value)]}
    if isinstance(value, list):
        return [_encoded(entry, f"{path}/{i}", tensors) for i, entry in enumerate(value)]
    if not isinstance(value, _PLAIN):
        raise TypeError(f"checkpoint must hold tensors and plain values, got {type(value).__name__} at {path}")
    return value


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_decoded(entry, tensors) for entry in inner)
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(entry, tensors) for key, entry in inner}
    raise ValueError(f"unknown kind {kind!r}")
