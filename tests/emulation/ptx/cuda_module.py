"""The interface of grank_kernels/_cuda.pyi over simulated PTX; takes tensors instead of addresses."""

import struct
from typing import Any

from .launch import Coverage, Run, launch
from .nvcc import ptx_of
from .parser import Kernel, parse
from .tensors import TensorMemory

ROWS = 64  # candidates per block
THREADS = 128
SCORE_CANDIDATES = "@PqqPPqqPPqPPPPPffiffP0P"
ATTENTION = "@qqPPqq?PPPPqqPfiPP0P"
GRADIENTS = "@PPPPPPP"


class PtxModule:
    """Runs the CUDA kernels in the simulator.

    Args:
        coverage: by name of a kernel; filled by the runs.
        plan: stages, and tiles per block, of score_candidates.
        seed: of a random order of warps; None runs them in a fixed order.
    """

    def __init__(self, coverage: dict[str, Coverage], plan: tuple[int, int] = (2, 1), seed: int | None = None) -> None:
        self.coverage, self.plan, self.seed = coverage, plan, seed
        self.memory = TensorMemory()
        self.runs: list[Run] = []

    def CandidateCrossAttention(self, *arguments: Any) -> tuple[Any, ...]:  # noqa: N802
        return arguments

    def score_candidates(self, *arguments: Any) -> None:
        *problem, bfloat, width, hidden, _ = arguments
        users, candidates = problem[1:3]
        stages, tiles_per_block = self.plan
        (kernel,) = self._kernels("score_candidates.cuh", [
            f"score_candidates_kernel<{element(bfloat)}, {width}, {hidden}>(ScoreCandidates, ScorePlan)"
        ])  # fmt: skip
        blocks = users * -(-candidates // (ROWS * tiles_per_block))
        shared = 2 * ROWS * width + stages * (2 * ROWS * (width + hidden) + 4 * ROWS)
        given = [self._packed(SCORE_CANDIDATES, problem), struct.pack("@ii", stages, tiles_per_block)]
        self._launch(kernel, blocks, given, shared)
        self.memory.download([problem[-1]])

    def candidate_cross_attention(self, problem: tuple[Any, ...], bfloat: bool, width: int, stream: Any) -> None:
        weights = ["OnlineSoftmax", "SiluWeights"][problem[15]]
        (kernel,) = self._kernels("candidate_cross_attention.cuh", [
            f"candidate_cross_attention_kernel<{element(bfloat)}, {width}, {weights}>(CandidateCrossAttention)"
        ])  # fmt: skip
        rows = 2 * ROWS * width
        self._launch(
            kernel, query_blocks(problem), [self._packed(ATTENTION, problem)], rows + 2 * (2 * rows + 4 * ROWS)
        )
        self.memory.download([*problem[16:18]])

    def candidate_cross_attention_backward(self, problem: tuple[Any, ...], *arguments: Any) -> None:
        *gradients, bfloat, width, _ = arguments
        softmax, heads = problem[15] == 0, problem[1]
        types = f"{element(bfloat)}, {width}"
        names = [
            f"candidate_cross_attention_backward_kernel<{types}, Owned::{owned}, {str(softmax).lower()}>"
            "(CandidateCrossAttention, CandidateCrossAttentionGradients)"
            for owned in ("kKeys", "kQueries")
        ]
        names += [
            f"candidate_cross_attention_delta_kernel<{types}>(const void*, const void*, const float*, float*, int64_t)"
        ]
        keys, queries, deltas = self._kernels("candidate_cross_attention_backward.cuh", names)
        streamed = 32 if width == 128 else 64
        shared = 4 * ROWS * width + 2 * (4 * streamed * width + 8 * streamed)
        both = [self._packed(ATTENTION, problem), self._packed(GRADIENTS, gradients)]
        if softmax:
            rows, named = problem[5] * heads, zip(("grad_out", "grad_lse", "delta"), gradients[:3], strict=True)
            given = [self.memory.upload(name, x) for name, x in (("out", problem[16]), *named)]
            self._launch(deltas, -(-rows * width // (8 * THREADS)), [*given, rows], 0)
        self._launch(keys, key_blocks(problem), both, shared)
        self._launch(queries, query_blocks(problem), both, shared)
        self.memory.download([x for x in gradients if x is not None])

    def _kernels(self, header: str, names: list[str]) -> list[Kernel]:
        """The parsed kernels `names`, parsed once each."""
        for name in names:
            if name not in self.coverage:
                self.coverage[name] = Coverage(parse(ptx_of(header, name)))
        return [self.coverage[name].kernel for name in names]

    def _packed(self, layout: str, values: list[Any] | tuple[Any, ...]) -> bytes:
        """The fields as a C struct, in bytes."""
        plain = [
            self.memory.upload(f"field {i}", x) if x is None or hasattr(x, "data_ptr") else x
            for i, x in enumerate(values)
        ]
        return struct.pack(layout, *plain)

    def _launch(self, kernel: Kernel, blocks: int, arguments: list[Any], shared_bytes: int) -> None:
        if blocks:
            run = launch(kernel, (blocks,), (THREADS,), arguments, self.memory, shared_bytes, self.seed)
            next(each for each in self.coverage.values() if each.kernel is kernel).add(run)
            self.runs.append(run)


def element(bfloat: bool) -> str:
    return "bfloat16" if bfloat else "float16"


def query_blocks(problem: tuple[Any, ...]) -> int:
    users, heads, _, offsets, per_user, total, *_ = problem
    return heads * tiles(users, offsets, per_user, total)


def key_blocks(problem: tuple[Any, ...]) -> int:
    users, heads, offsets, per_user, total = problem[0], problem[1], problem[9], problem[11], problem[12]
    return heads * tiles(users, offsets, per_user, total)


def tiles(users: int, offsets: Any, per_user: int, total: int) -> int:
    """RowGroups::tiles() of csrc/cuda/row_groups.cuh."""
    return total // ROWS + users if offsets is not None else users * -(-per_user // ROWS)
