"""Offsets past 2³¹ elements, in the interpreter, on files of which only a few pages exist.

Tensors lie in the middle of a file: an offset that was computed in 32 bits wraps to a page of zeros
before them, which gives a wrong result rather than a fault.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error, unit_rows
from torch import Tensor

from action_kernels.backends.triton import device as launches
from action_kernels.backends.triton import indexed_lse as triton_indexed_lse
from action_kernels.backends.triton import pairwise_lse, tiles
from action_kernels.ops import indexed_lse, prepare_rows, sample_pixels, sampled_features
from action_kernels.ops.pairwise_lse import PairwiseCall

LIMIT = 1 << 31  # elements
D = 512
COUNT = LIMIT // D + 64


@pytest.fixture
def storage(device: torch.device, tmp_path: Path) -> Tensor:
    """float16 zeros: 2³¹ elements before, 2³¹ and some more behind the place to use."""
    if device.type != "cpu":
        pytest.skip("test_on_gpu.py allocates what these only map")
    path, size = tmp_path / "sparse", 2 * LIMIT + (1 << 25)
    with path.open("wb") as file:
        file.truncate(2 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)[LIMIT:]


def test_the_files_are_sparse(storage: Tensor, tmp_path: Path) -> None:
    storage[LIMIT] = 1.0
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 1 << 20


def run_last_program(
    monkeypatch: pytest.MonkeyPatch, launch: launches.Launch, **replaced: Any
) -> None:
    """Run the program of a launch that takes the last rows and, alone, the last step of the loop."""
    from triton.runtime.interpreter import interpreter_builder

    last = tuple(programs - 1 for programs in launch.grid)
    monkeypatch.setattr(interpreter_builder, "create_get_program_id", _of_axis(last))
    monkeypatch.setattr(interpreter_builder, "create_get_num_programs", _of_axis(launch.grid))
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    launch.kernel[(1,) * len(launch.grid)](**{**given, **replaced}, **launch.constants)


def _of_axis(numbers: tuple[int, ...]) -> Any:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    return lambda axis: TensorHandle(np.array([numbers[axis]], dtype=np.int32), tl.int32)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(call: Any) -> launches.Launch:
    with launches.recording(launches.INTERPRETER) as found:
        call()
    return found[-1]


def in_one_step_each(launch: launches.Launch, other_count: int) -> launches.Launch:
    """The launch with its loops cut into single steps."""
    import dataclasses

    steps = -(-other_count // launch.constants["KEYS"])
    return dataclasses.replace(launch, grid=(launch.grid[0], steps, *launch.grid[2:]))


def test_pairwise_lse_forward(storage: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = storage[: COUNT * D].view(COUNT, D)
    keys[-16:] = unit_rows(16, D, dtype=torch.float16)
    anchors = unit_rows(16, D, dtype=torch.float16, seed=1)
    half = torch.float16
    launch = recorded(
        lambda: pairwise_lse.pairwise_lse_forward(
            PairwiseCall(meta(16, D, dtype=half), meta(COUNT, D, dtype=half), 5.0), False
        )
    )
    launch = in_one_step_each(launch, COUNT)
    result = torch.full((launch.grid[1], 16), torch.nan)
    run_last_program(monkeypatch, launch, anchors=anchors, keys=keys, result=result)
    expected = (anchors.double() @ keys[-16:].double().T * 5.0).logsumexp(1)
    assert relative_error(result[-1], expected) < 1e-6


def test_pairwise_lse_backward(storage: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last own rows read, and their gradients written, beyond 2³¹ elements."""
    own = storage[: COUNT * D].view(COUNT, D)
    own[-32:] = unit_rows(32, D, dtype=torch.float16)
    keys = unit_rows(16, D, dtype=torch.float16, seed=1)
    half = torch.float16
    row = meta(COUNT)
    launch = recorded(
        lambda: pairwise_lse.pairwise_lse_backward(
            PairwiseCall(meta(COUNT, D, dtype=half), meta(16, D, dtype=half), 5.0),
            row,
            row,
            True,
            False,
            half,
        )
    )
    launch = in_one_step_each(launch, 16)
    lse = torch.zeros(COUNT)
    lse[-32:] = (own[-32:].float() @ keys.float().T * 5.0).logsumexp(1)
    softmax = (own[-32:].double() @ keys.double().T * 5.0).softmax(1)
    expected = 5.0 * softmax @ keys.double()
    parts = launch.grid[2]
    run_last_program(
        monkeypatch, launch, own=own, other=keys, own_lse=lse, peak=torch.ones(1),
        own_weight=torch.full((COUNT,), 16384.0), gradient=own,
    )  # fmt: skip
    columns = slice(D - D // parts, None)
    assert relative_error(own[-32:, columns], expected[:, columns]) < 2e-3


def test_rows_copied_into_whole_tiles(storage: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place: a row read elsewhere would be zero, one written elsewhere would stay."""
    rows = storage[: COUNT * D].view(COUNT, D)
    rows[-8:] = unit_rows(8, D, dtype=torch.float16)
    mask = torch.ones(COUNT, dtype=torch.bool)
    mask[-7::2] = False
    expected = torch.cat((rows[-8:][mask[-8:]], torch.zeros(4, D, dtype=torch.float16)))
    launch = recorded(
        lambda: tiles.whole_tiles(meta(COUNT, D, dtype=torch.float16), meta(COUNT) > 0, 16)
    )
    places = torch.full((COUNT,), -1, dtype=torch.int32)
    run_last_program(
        monkeypatch, launch, rows=rows, taken=mask.cumsum(0, dtype=torch.int32), values=rows,
        places=places,
    )  # fmt: skip
    assert torch.equal(rows[-8:], expected)
    assert sorted(places[-8:].tolist()) == list(range(COUNT - 8, COUNT))


def test_indexed_lse(storage: Tensor) -> None:
    bank = storage[: COUNT * D].view(COUNT, D)
    bank[-8:] = unit_rows(8, D, dtype=torch.float16)
    queries = unit_rows(2, D, dtype=torch.float16, seed=1)
    lse = indexed_lse(queries, bank, torch.arange(COUNT - 8, COUNT)[None], scale=5.0)
    expected = (queries.double() @ bank[-8:].double().T * 5.0).logsumexp(1)
    assert relative_error(lse, expected) < 1e-6


def test_queries_of_indexed_lse(storage: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = storage[: COUNT * D].view(COUNT, D)
    queries[-4:] = unit_rows(4, D, dtype=torch.float16)
    bank = unit_rows(8, D, dtype=torch.float16, seed=1)
    half, runs = torch.float16, COUNT // 4
    launch = recorded(
        lambda: triton_indexed_lse.indexed_lse(
            meta(COUNT, D, dtype=half), meta(8, D, dtype=half),
            meta(runs, 8, dtype=torch.int64), 5.0, False,
        )
    )  # fmt: skip
    lse = torch.full((COUNT,), torch.nan)
    run_last_program(
        monkeypatch, launch, queries=queries, bank=bank, lse_out=lse, mean_out=torch.empty(0),
        index=torch.arange(8).expand(runs, 8).contiguous(),
    )  # fmt: skip
    expected = (queries[-4:].double() @ bank.double().T * 5.0).logsumexp(1)
    assert relative_error(lse[-4:], expected) < 1e-6


@pytest.mark.parametrize(
    "strides",
    [
        (LIMIT // 2 + 8, 16, 2, 1),
        (16, LIMIT // 4 + 8, 2, 1),
        (16, 1, 2 * (LIMIT // 5 + 8), LIMIT // 5 + 8),
    ],
    ids=["images", "channels", "pixels"],
)
class TestFarApart:
    """Maps (3, 5, 3, 2) whose last elements lie beyond 2³¹ by a stride that itself fits 32 bits."""

    @pytest.fixture
    def far(self, storage: Tensor, strides: tuple[int, ...]) -> Tensor:
        far = storage.as_strided((3, 5, 3, 2), strides, storage.storage_offset())
        reach = sum((n - 1) * stride for n, stride in zip(far.shape, strides, strict=True))
        assert LIMIT <= reach < storage.numel()
        return far.copy_(torch.randn(far.shape))

    def test_prepare_rows(self, far: Tensor) -> None:
        x = far.detach().requires_grad_()
        near = far.float().contiguous().requires_grad_()
        upstream = torch.randn(18, 5)
        rows = prepare_rows(x, dtype=torch.float32)
        expected = torch.nn.functional.normalize(near.flatten(2).transpose(1, 2).reshape(18, 5))
        (gradient,) = torch.autograd.grad(rows, x, upstream)
        (expected_gradient,) = torch.autograd.grad(expected, near, upstream)
        assert relative_error(rows, expected) < 1e-6
        assert relative_error(gradient, expected_gradient) < 1e-3

    def test_sampled_features(self, far: Tensor) -> None:
        index = torch.arange(4, 3 * 6 * 5, 9)
        near = sampled_features(far.contiguous(), index, (6, 5))
        assert torch.equal(sampled_features(far, index, (6, 5)), near)
        assert near.any()

    def test_sample_pixels(self, far: Tensor) -> None:
        labels = torch.randint(0, 5, (3, 3, 2))
        drawn = [
            sample_pixels(
                scores, labels, 8, num_classes=5, threshold=0.3,
                generator=torch.Generator().manual_seed(1),
            )
            for scores in (far, far.contiguous())
        ]  # fmt: skip
        for from_far, from_near in zip(*drawn, strict=True):
            assert torch.equal(from_far, from_near)
        assert drawn[1][1].any()
