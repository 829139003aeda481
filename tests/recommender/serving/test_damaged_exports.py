"""Exports with damaged and hostile files: an error that names the file, or an answer; never a crash or an execution."""

import json
import random
from pathlib import Path

import pytest
import yaml
from oracle import run_python
from test_retriever import experiment_of, retriever_of

from grank_kernels.recommender.serving.retriever import Retriever

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("model.safetensors", "table.safetensors", "items.parquet", "experiment.yaml")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, a piece cut out, doubled or moved, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data = data or bytearray(1)
        start = rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 64)), max(0, len(data) - 40)])
        stop = min(len(data), start + rng.choice([1, 1, 4, 8, 100]))
        match rng.randrange(5):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start:stop] = rng.choice([b"\0", b"\xff", b"\x7f", b"9"]) * (stop - start)
            case 2:
                del data[start:stop]
            case 3:
                data[start:start] = data[start:stop]
            case _:
                data = data[: max(1, start)]
    return bytes(data)


LOAD = """
import resource, sys
sys.path.insert(0, {here!r})
import random
from pathlib import Path
import torch
from test_damaged_exports import damaged
from grank_kernels.recommender.serving.retriever import Retriever
torch.set_num_threads(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)  # a file of 10 KB must not ask for more
folder, file, rng = Path({folder!r}), {file!r}, random.Random({seed})
good = (folder / file).read_bytes()
refused = 0
for number in range({rounds}):
    (folder / file).write_bytes(damaged(good, rng))
    try:
        Retriever.load(folder, mmap=number % 2 == 0).retrieve([["film-03"], []], 5, 5)
    except ValueError as error:
        refused += 1
        named = (file, "catalogue has", "queries") + ("model.safetensors",) * (file == "experiment.yaml")
        assert any(name in str(error) for name in named), error
print(refused)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_refused_by_name(file: str, seed: int, tmp_path: Path) -> None:
    retriever_of("sasrec", experiment=experiment_of("sasrec")).save(tmp_path)
    here, rounds = str(Path(__file__).parent), 400
    done = run_python(LOAD.format(here=here, folder=str(tmp_path), file=file, seed=seed, rounds=rounds))
    assert done.returncode == 0, done.stderr
    assert rounds / 4 < int(done.stdout) <= rounds


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("settings", "dim", 1 << 40),
        ("settings", "history", 1 << 40),
        ("settings", "heads", 3),
        ("settings", "blocks", 3),
        ("settings", "blocks", 1 << 40),
    ],
)
def test_settings_that_do_not_fit_the_weights_allocate_nothing(
    section: str, key: str, value: int, tmp_path: Path
) -> None:
    retriever_of("sasrec", experiment=experiment_of("sasrec")).save(tmp_path)
    path = tmp_path / "experiment.yaml"
    settings = yaml.safe_load(path.read_text())
    settings[section][key] = value
    path.write_text(json.dumps(settings))  # JSON is YAML
    with pytest.raises(ValueError, match=r"model\.safetensors|experiment\.yaml"):
        Retriever.load(tmp_path)
