"""`labelled_lse` and `pairwise_softplus` by the C++ kernels, on every instruction set."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from labelled import PATTERNS, Scene, compare, step
from peak_memory import peak_memory
from support import multiplies_bfloat16, relative_error, unit_rows

import action_kernels
from action_kernels.backends import cpu
from action_kernels.ops import pairwise_softplus
from action_kernels.ops.relation import LabelledPairs

UNAVAILABLE = cpu.unavailable("cpu")
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

RELATIONS = ("same", "different")
# The tile is 192 rows; panels of keys are 8 to 48 wide, blocks of scores 4 or 8 high.
SHAPES = [
    (1, None, 8),  # a single row
    (2, 3, 1),  # one dimension
    (25, 47, 7),  # a panel, one more; fewer columns than a vector
    (193, None, 64),  # a tile, one more
    (191, 193, 40),
    (400, None, 17),  # several tiles
    (400, 50, 129),  # one column more than eight slices
    (30, 700, 96),  # far more keys than anchors
]


@pytest.fixture(autouse=True)
def cpu_backend():
    with action_kernels.use_backend("cpu"):
        yield


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_against_float64(instruction_set, n, m, d, relation, pattern):
    for scale in (10.0, 200.0):  # without and with a running maximum
        compare(Scene.make(n, m, d, pattern, relation, scale), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [None, 61])
def test_half_precision(instruction_set, dtype, m):
    """Sums in float32: as exact as float32 on the rounded rows; only gradients of rows are rounded."""
    for relation in RELATIONS:
        scene = Scene.make(100, m, 40, "few, some left out", relation).to(dtype)
        for ours, exact in (
            (scene.lse(), scene.to(torch.float64).lse()),
            (scene.softplus(), scene.to(torch.float64).softplus()),
        ):
            assert ours[0].dtype == torch.float32
            assert relative_error(ours[0], exact[0]) < 1e-6
            in_pairs = dtype == torch.bfloat16 and multiplies_bfloat16()
            for found, expected in zip(ours[1:], exact[1:], strict=True):
                rounding = relative_error(expected.to(found.dtype), expected)
                # Products of bfloat16 round the weights once more.
                allowed = (1.6 if in_pairs else 1.2) * rounding + 1e-6
                assert relative_error(found, expected) < allowed


@pytest.mark.skipif(
    UNAVAILABLE is None and "avx512bf16" not in cpu.supported_instruction_sets(),
    reason="this processor has no products of bfloat16",
)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_float32_rows_as_bfloat16(n, m, d, pattern):
    torch.set_float32_matmul_precision("medium")
    try:
        for relation in RELATIONS:
            # rows that bfloat16 holds: only the weights are rounded
            rows = Scene.make(n, m, d, pattern, relation).to(torch.bfloat16).to(torch.float32)
            for ours, exact in (
                (rows.lse(), rows.to(torch.float64).lse()),
                (rows.softplus(), rows.to(torch.float64).softplus()),
            ):
                finite = exact[0].isfinite()
                assert torch.equal(ours[0][~finite].double(), exact[0][~finite])
                bound = 2e-6 * exact[0][finite].norm()
                assert (ours[0] - exact[0])[finite].norm() <= bound
                for found, expected in zip(ours[1:], exact[1:], strict=True):
                    assert (found - expected).norm() <= 2**-8 * expected.norm() + 1e-12
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("offset", [-80.0, -10.0, 0.0, 30.0])
def test_products_of_many_factors(instruction_set, relation, offset):
    """A tile's columns multiply up to 192 factors of 2 and all tiles of a row thousands."""
    one = unit_rows(1, 8).expand(700, 8)
    labels = torch.zeros(700, dtype=torch.int64) if relation == "same" else torch.arange(700)
    scene = Scene(one, None, labels, None, torch.full((700,), offset).double(), 1e-3, relation).to(
        torch.float32
    )
    value, *gradients = scene.softplus()
    with action_kernels.use_backend("reference"):
        expected, *expected_gradients = scene.to(torch.float64).softplus()
    assert relative_error(value, expected) < 1e-5
    for found, right in zip(gradients, expected_gradients, strict=True):
        assert relative_error(found, right) < 2e-5


def test_whole_tiles_of_factors(instruction_set):
    """Tiles grow to 192 × 192 from 3072 rows on: a column's product would leave float32 in one piece."""
    n = 3100
    rows, labels = unit_rows(1, 8, dtype=torch.float32).expand(n, 8), torch.zeros(n).long()
    for offset in (0.0, 2.0):
        offsets = torch.full((n,), offset, requires_grad=True)
        values = pairwise_softplus(
            rows, labels=labels, offsets=offsets, scale=1e-3, relation="same"
        )
        values.sum().backward()
        x = torch.tensor(offset - 1e-3, dtype=torch.float64)
        expected = (n - 1) * torch.nn.functional.softplus(x)
        # equal numbers round the same way each time: up to 192 in a column of a tile
        assert relative_error(values, expected.expand(n)) < 6e-6
        assert relative_error(offsets.grad, ((n - 1) * x.sigmoid()).expand(n)) < 6e-6


@pytest.mark.parametrize("norm", [1e-3, 30.0, 1e4])
def test_rows_need_not_be_normalised(instruction_set, norm):
    for relation in RELATIONS:
        scene = Scene.make(130, None, 40, "few, some left out", relation, scale=1.0)
        scene = replace(scene, anchors=norm * scene.anchors).to(torch.float32)
        for ours, exact in (
            (scene.lse(), scene.to(torch.float64).lse()),
            (scene.softplus(), scene.to(torch.float64).softplus()),
        ):
            for found, right in zip(ours, exact, strict=True):
                finite = right.isfinite()
                error = (found - right)[finite].norm() / (right[finite].norm() + 1e-30)
                assert error < 2**-22 * norm**2 + 1e-5


# ------------------------------------------------------------------------------- threads and memory


@pytest.mark.parametrize("scale", [10.0, 200.0])
@pytest.mark.parametrize("m", [None, 300])
def test_repeatable_and_the_same_for_one_to_four_threads(threads, scale, m):
    for relation in RELATIONS:
        scene = Scene.make(500, m, 24, "few, some left out", relation, scale).to(torch.float32)
        results = []
        for count in (1, 2, 2, 3, 4):
            threads(count)
            results.append([*scene.lse(), *scene.softplus()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_threads_agree_to_rounding(threads):
    scene = Scene.make(500, None, 24, "few, some left out", "different").to(torch.float32)
    expected = [*scene.lse(), *scene.softplus()]
    threads(11)
    for found, right in zip([*scene.lse(), *scene.softplus()], expected, strict=True):
        finite = right.isfinite()
        assert relative_error(found[finite], right[finite]) < 1e-5


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc")
def test_memory_grows_with_the_rows_alone():
    """An n × n matrix of floats would take 1 GiB here, one of bytes 256 MiB."""
    n, dim = 1 << 14, 32
    assert peak_memory(step, n, dim) < 12 * n * dim * 4 + (16 << 20)


def test_bad_calls_return_a_status_with_a_message():
    scene = Scene.make(10, None, 4, "two classes", "same").to(torch.float32)
    sides = cpu._LabelledSides(LabelledPairs(scene.anchors, None, scene.labels, None, "same", 10.0))
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    offsets, values = torch.zeros(10), torch.empty(10)

    def call(relation=1, scale=1.0, size=1 << 20, place=offsets.data_ptr(), rows=sides.anchors):  # noqa: B008
        status = cpu.load().ak_cpu_pairwise_softplus_forward(
            rows, None, 4, scale, relation, 0, place, values.data_ptr(), 1, memory.data_ptr(), size
        )
        return cpu.load().ak_status_message(status).decode()

    assert call() == "success"
    assert "relation" in call(relation=0)
    assert "relation" in call(relation=3)
    assert "scale" in call(scale=float("inf"))
    assert "workspace" in call(size=10)
    assert "pointer" in call(place=None)
    unlabelled = cpu._describe(scene.anchors, None)
    assert "labels" in call(rows=cpu.ctypes.byref(unlabelled))
