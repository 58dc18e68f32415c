"""Losses over two and three processes equal one process on the joined batch: loss and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_cases import (
    CASES,
    CLASSES,
    SPLITS,
    TRAFFIC,
    TRAFFIC_DIM,
    TRAFFIC_ROWS,
    Model,
    joined_batch,
    result,
    run,
)

import action_kernels as ak

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory):
    """What each process found, by case."""
    size, folder = request.param, tmp_path_factory.mktemp("processes")
    mp.start_processes(run, args=(size, str(folder)), nprocs=size, start_method="spawn")
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name())
def test_equals_one_process_on_the_joined_batch(case, outcomes):
    alone = result(case, joined_batch(case.split), Model(case.dtype), None)
    found = [each[case.name()] for each in outcomes]
    size = len(found)
    assert_near(torch.stack([each["loss"] for each in found]).mean(), alone["loss"], case.dtype)
    for each in found:  # DDP left the same mean in all
        assert_near(each["embedding"], alone["embedding"], case.dtype)
        assert_near(each["temperature"], alone["temperature"], case.dtype)
    # of a process's own inputs: W times, as its loss is W times its share
    joined = torch.cat([each["inputs"] for each in found]) / size
    assert_near(joined, alone["inputs"], case.dtype)


# Bytes of each of the other processes' rows or pairs, r of the elements of one row: in the forward pass, in the backward pass,
# and how many row counts travel; then the same in a ring, where rows are never kept.
BYTES = {
    "supcon": (lambda r: (r, 8), (1, 0), lambda r: (r, r + 8), (1, 1)),
    "supcon, some rows left out": (lambda r: (r + 1, 8), (1, 0), lambda r: (r + 1, r + 1 + 8), (1, 1)),
    "multi_positive": (lambda r: (r + 8, 12), (1, 0), lambda r: (2 * (r + 8), 2 * (r + 8 + 8)), (2, 2)),
    "nt_xent": (lambda r: (2 * r, 16), (1, 0), lambda r: (2 * r, 2 * r + 16), (1, 1)),
    "clip": (lambda r: (2 * r, 16), (1, 0), lambda r: (2 * r, 2 * r + 16), (1, 1)),
    "info_nce": (lambda r: (r, r + 8), (1, 1), lambda r: (r, 2 * r + 8), (1, 2)),
    "info_nce, constant keys": (lambda r: (r, 0), (1, 0), lambda r: (r, r), (1, 1)),
    "siglip": (lambda r: (r, r + 4), (1, 1), lambda r: (r, 2 * r + 4), (1, 2)),
}  # fmt: skip
# float32 numbers that are added up over all processes: counts and sums of classes, and the gradient of the latter
SUMS = {
    "supcon": (CLASSES + CLASSES * TRAFFIC_DIM, CLASSES * TRAFFIC_DIM),
    "supcon, some rows left out": (CLASSES + CLASSES * TRAFFIC_DIM, CLASSES * TRAFFIC_DIM),
    "multi_positive": (CLASSES, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("loss", TRAFFIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_the_bytes_that_travel_are_those_of_the_documentation(outcomes, loss, dtype, ring):
    """Of rows, masks and numbers, and eight for each count of rows; beside them those of sums."""
    of_rows, counts = BYTES[loss][2 * ring :][:2]
    of_each = of_rows(TRAFFIC_DIM * dtype.itemsize)
    expected = [
        ((len(outcomes) - 1) * (TRAFFIC_ROWS * row + 8 * count), 4 * sums)
        for row, count, sums in zip(of_each, counts, SUMS.get(loss, (0, 0)), strict=True)
    ]
    for found in outcomes:
        assert found["traffic"][loss, dtype, ring] == expected


def test_classes_of_some_processes_alone():
    batch, sizes = joined_batch("classes apart"), SPLITS["classes apart"]
    of_each = [set(labels.tolist()) for labels in batch.labels.split(sizes)]
    assert of_each[0] != of_each[1] != of_each[2]
    assert set().union(*of_each) == {-1, *range(CLASSES)}


def test_there_are_processes_without_rows_and_without_valid_rows():
    assert any(0 in counts for counts in SPLITS.values())
    batch = joined_batch("all left out")
    first, second, _ = SPLITS["all left out"]
    assert not batch.mask[first : first + second].any()


def test_what_is_no_group_is_refused():
    rows, labels = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(TypeError, match=r"group must be a .* process group"):
        ak.supcon_loss(rows, labels, num_classes=4, group="world")


def test_a_group_of_one_process_changes_nothing(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        rows, labels = torch.randn(9, 3), torch.arange(9) % 3
        alone = ak.supcon_loss(rows, labels)
        assert torch.equal(alone, ak.supcon_loss(rows, labels, group=dist.group.WORLD))
    finally:
        dist.destroy_process_group()
