"""Primitives of the CUDA kernels: nvcc's PTX in the simulator gives the same bits as the CUDA emulator."""

from pathlib import Path

import numpy as np
import pytest
import torch
from emulation.cuda import Emulator, Output
from emulation.ptx import GlobalMemory, launch, nvcc, parse

pytestmark = pytest.mark.skipif(nvcc.MISSING is not None, reason=str(nvcc.MISSING))

PROBE = Path(__file__).parent / "cuda" / "primitives_probe.cu"
ELEMENTS = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("primitives_probe", PROBE, checked=False)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def assert_same_bits(
    emulator: Emulator,
    entry: str,
    kernel: str,
    inputs: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    number: int | None = None,
    threads: int = 32,
    shared_bytes: int = 0,
) -> None:
    """`outputs`: their content before the launch. `number`: the last argument."""
    numbers = {} if number is None else {"number": number}
    memory = GlobalMemory()
    arguments = [memory.put(name, array) for name, array in {**inputs, **outputs}.items()]
    ptx = parse(nvcc.compile_ptx(PROBE.read_text(), nvcc.HEADERS), kernel)
    launch(ptx, (1,), (threads,), [*arguments, *numbers.values()], memory, shared_bytes)
    emulated = {name: Output(torch.from_numpy(array.copy()), initialised=True) for name, array in outputs.items()}
    emulator.run(entry, **{name: torch.from_numpy(array) for name, array in inputs.items()}, **emulated, **numbers)
    for name, output in emulated.items():
        np.testing.assert_array_equal(memory.get(name).view(np.uint8), output.tensor.numpy().view(np.uint8))


def mangled(kernel: str, element: str) -> str:
    return f"{kernel}INS0_{len(element)}{element}"


@pytest.mark.parametrize("element", ELEMENTS)
def test_mma(emulator: Emulator, rng: np.random.Generator, element: str) -> None:
    def fragments(count: int) -> np.ndarray:
        integers = torch.from_numpy(rng.integers(-8, 9, (32, count)))
        return integers.to(getattr(torch, element)).view(torch.int16).numpy().view(np.uint32)

    d = rng.integers(-8, 9, (32, 4)).astype(np.float32)
    inputs = {"a": fragments(8), "b": fragments(4)}
    assert_same_bits(emulator, f"probe_mma_{element}", mangled("probe_mma", element), inputs, {"d": d})


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(emulator: Emulator, rng: np.random.Generator, transposed: int) -> None:
    x, rows = rng.integers(0, 2**31, 128).astype(np.uint32), rng.permutation(32).astype(np.int32)
    out = np.zeros((32, 4), np.uint32)
    assert_same_bits(
        emulator,
        "probe_ldmatrix_x4",
        "probe_ldmatrix",
        {"x": x, "rows": rows},
        {"out": out},
        transposed,
        shared_bytes=512,
    )


def test_shuffles_and_votes(emulator: Emulator, rng: np.random.Generator) -> None:
    inputs = {"x": rng.integers(0, 99, 32).astype(np.int32), "source": rng.integers(0, 32, 32).astype(np.int32)}
    outputs = {"others": np.zeros((2, 32), np.int64), "votes": np.zeros((3, 32), np.uint32)}
    assert_same_bits(emulator, "probe_warp_operations", "probe_warp", inputs, outputs, 5)


@pytest.mark.parametrize("element", ELEMENTS)
def test_conversions(emulator: Emulator, rng: np.random.Generator, element: str) -> None:
    halves = np.arange(-(2**15), 2**15, 7).astype(np.int16).view(np.float16).astype(np.float32)
    halfway = (halves.view(np.uint32) + (1 << 12)).view(np.float32)
    random = rng.integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halves, halfway, random])
    x = x[~np.isnan(x)]
    x = x[: len(x) // 2 * 2]
    outputs = {
        "singles": np.zeros(len(x), np.int16),
        "pairs": np.zeros(len(x), np.int16),
        "back": np.zeros((2, len(x)), np.float32),
    }
    kernel = mangled("probe_conversions", element)
    assert_same_bits(emulator, f"probe_conversions_{element}", kernel, {"x": x}, outputs, len(x), threads=256)


@pytest.mark.parametrize("element", ELEMENTS)
def test_unpack_int8(emulator: Emulator, element: str) -> None:
    x, out = np.arange(256, dtype=np.uint8), np.zeros(256, np.int16)
    kernel = mangled("probe_unpack_int8", element)
    assert_same_bits(emulator, f"probe_unpack_int8_{element}", kernel, {"x": x}, {"out": out}, threads=64)
