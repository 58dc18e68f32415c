"""The Triton backend, proven without a GPU: in the interpreter, by what it would launch, by compiling.

The kernels' own tests are in `triton_backend/`; with a GPU they run natively as well.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import action_kernels
from action_kernels.ops.pairwise_lse import PairwiseCall, is_bounded

pytest.importorskip("triton", reason="Triton is not installed")

import resources
from support import ELSEWHERE

from action_kernels.backends.triton import device, pairwise_lse, tuning
from action_kernels.backends.triton.device import SM_80, SM_90, SM_100, Launch, Target

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_OLD = resources.release_of("triton") < resources.CHOSEN_WITH
CONSUMER = Target(capability=86, shared_memory=99 << 10, processors=28)
CONSUMER_BLACKWELL = Target(capability=120, shared_memory=99 << 10, processors=170)
OTHER_MAKE = Target(capability=0, shared_memory=64 << 10, processors=64)
RULES = (tuning.forward_candidates, tuning.symmetric_candidates, tuning.backward_candidates)
TARGETS = [SM_80, SM_90, SM_100, CONSUMER, CONSUMER_BLACKWELL, OTHER_MAKE]


def why_not_interpreted() -> str | None:
    if INTERPRETED:
        return "this process is the interpreter's own"
    if resources.release_of("triton") < resources.OLDEST_TRITON:
        return "sums of int32 are int64 in this Triton's interpreter: it stores past the end"
    if resources.release_of("triton") < (3, 8) and resources.release_of("numpy") >= (2, 4):
        return "this Triton's interpreter has no loops with NumPy 2.4 and later"
    return None


@pytest.mark.slow
@pytest.mark.skipif(why_not_interpreted() is not None, reason=str(why_not_interpreted()))
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_backend"]
    result = subprocess.run(
        command,
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout[-1000:]
    assert int(passed[1]) >= 335


@pytest.mark.skipif(INTERPRETED, reason="the interpreter needs no driver anyway")
def test_importing_asks_for_no_driver() -> None:
    code = """
import torch
def refuse(*_): raise AssertionError("the driver was asked")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
import triton
type(triton.runtime.driver).active = property(refuse)
import action_kernels.backends.triton
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ELSEWHERE)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="here Triton can be used")
def test_says_how_to_use_it_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"'triton' cannot be used here: no .* is available"):
        action_kernels.use_backend("triton")
    assert "TRITON_INTERPRET=1" in (device.unavailable("cpu") or "")


def recorded(call: Callable[[], object], target: Target = SM_90) -> list[Launch]:
    with device.recording(target) as launches:
        call()
    return launches


def rows(n: int = 4096, d: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(n, d, dtype=dtype, device="meta")


def forward(
    scale: float,
    *,
    normalized: bool = True,
    keys: torch.Tensor | None = None,
    target: Target = SM_90,
) -> dict[str, object]:
    (launch,) = recorded(
        lambda: pairwise_lse.pairwise_lse_forward(
            PairwiseCall(rows(), keys, scale, bounded=normalized and is_bounded(scale)), False
        ),
        target,
    )
    return launch.constants


def test_the_fixed_shift_is_chosen_only_where_it_is_safe() -> None:
    assert forward(10.0)["FIXED"]
    assert forward(43.6)["FIXED"]  # 2 · log2(e) · scale = 125.8
    assert not forward(43.8)["FIXED"]  # 126.4
    assert not forward(10.0, normalized=False)["FIXED"]
    assert not is_bounded(torch.tensor(10.0))  # not known when the kernel is chosen


def test_tiles_serve_rows_and_columns_only_where_sums_may_come_in_any_order() -> None:
    assert forward(10.0)["SYMMETRIC"]
    assert not forward(10.0, keys=rows())["SYMMETRIC"]
    assert not forward(10.0, normalized=False)["SYMMETRIC"]
    assert not forward(10.0, target=SM_100)["SYMMETRIC"]  # sums down the columns cost more
    torch.use_deterministic_algorithms(True)
    try:
        assert not forward(10.0)["SYMMETRIC"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("n", [500, 2048, 4096, 20_000])
@pytest.mark.parametrize("kind", ["symmetric", "online", "keys apart"])
def test_the_forward_pass_splits_the_steps_that_it_takes(kind: str, n: int) -> None:
    a = rows(n)
    keys = rows(n) if kind == "keys apart" else None
    (launch,) = (
        launch
        for launch in recorded(
            lambda: pairwise_lse.pairwise_lse_forward(
                PairwiseCall(a, keys, 10.0, bounded=kind != "online"), False
            )
        )
        if launch.kernel is pairwise_lse._forward_kernel
    )
    tiles = -(-n // launch.constants["KEYS"])
    steps = tiles // 2 + 1 if kind == "symmetric" else tiles
    assert launch.grid == (tiles, tuning.splits(tiles, steps, SM_90.processors))


@pytest.mark.parametrize("form", ["batch", "queue"])
def test_a_mask_is_read_before_the_pairs_and_nobody_waits_for_its_count(form: str) -> None:
    """How many rows take part is loaded by the kernels: on the device "meta" no number can be read."""
    a, mask = rows(500), torch.empty(500, dtype=torch.bool, device="meta")
    masked = (a, None, 10.0, mask) if form == "batch" else (a, rows(300), 10.0, mask, mask[:300])
    row = torch.empty(500, device="meta")
    with device.recording(SM_90) as launches:
        pairwise_lse.pairwise_lse_forward(PairwiseCall(*masked, bounded=True), False)
        pairwise_lse.pairwise_lse_backward(
            PairwiseCall(*masked, bounded=True), row, row, True, True, a.dtype
        )
    kernels = (pairwise_lse._forward_kernel, pairwise_lse._backward_kernel)
    over_pairs = [launch for launch in launches if launch.kernel in kernels]
    assert len(over_pairs) == (2 if form == "batch" else 3)
    for launch in over_pairs:
        given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        assert torch.bool not in {t.dtype for t in given.values() if isinstance(t, torch.Tensor)}
        counts = [value for name, value in given.items() if name.endswith("_count")]
        assert [count.shape for count in counts] == [(1,), (1,)]


@pytest.mark.parametrize(
    ("need_anchors", "need_keys", "terms"),
    [
        (True, False, [(True, False)]),
        (False, True, [(False, True)]),
        (True, True, [(True, False), (False, True)]),
        (False, False, []),
    ],
)
def test_only_the_gradients_asked_for_are_computed(
    need_anchors: bool, need_keys: bool, terms: list[tuple[bool, bool]]
) -> None:
    a, row = rows(), torch.empty(4096, device="meta")
    launches = recorded(
        lambda: pairwise_lse.pairwise_lse_backward(
            PairwiseCall(a, a, 10.0, bounded=True),
            row,
            row,
            need_anchors,
            need_keys,
            a.dtype,
        )
    )
    weighing = [x.constants for x in launches if x.kernel is pairwise_lse._backward_kernel]
    assert [(c["OWN_TERM"], c["OTHER_TERM"]) for c in weighing] == terms


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm_{target.capability}")
@pytest.mark.parametrize("dim", [1, 16, 100, 128, 256, 496, 512])
def test_every_rule_has_tiles_that_fit(target: Target, dim: int) -> None:
    for itemsize, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32"), (4, "tf32x3")):
        if dim > tuning.largest_dim(itemsize, precision) or (
            target.capability < 80 and precision.startswith("tf32")
        ):
            continue
        for rule in RULES:
            for tiles in rule(target, dim, itemsize, precision):
                assert tiles.shared_memory(dim, itemsize) <= target.shared_memory
                assert tiles.rows % tiles.keys == 0  # the diagonal is a whole number of tiles
            assert rule(target, dim, itemsize, precision)
        for tiles in tuning.forward_candidates(target, dim, itemsize, precision):
            assert tiles.rows == tiles.keys
        for queries_per_run in (1, 16, 256):
            assert tuning.gather_tiles(target, dim, itemsize, queries_per_run)


@pytest.mark.parametrize(
    ("blocks", "steps", "most", "expected"),
    [
        (128, 128, 99, 1),  # 97 % of 132 processors
        (157, 157, 99, 3),  # 1.19 waves, of which one in three is used; 3.57 of 4 are
        (157, 157, 1, 1),  # ... but the memory for parts is limited
        (1, 500, 999, 113),  # few anchors, many keys
        (1, 7, 999, 7),  # no more parts than steps
        (4096, 4096, 99, 1),
    ],
)
def test_loops_are_split_until_whole_waves_are_filled(
    blocks: int, steps: int, most: int, expected: int
) -> None:
    assert tuning.splits(blocks, steps, 132, most) == expected


def test_autotuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = {"a": 3.0, "b": 1.0, "c": 2.0}
    timed = []

    def do_bench(call: Callable[[], object]) -> float:
        timed.append(call())
        return durations[timed[-1]]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    candidates = list(durations)
    assert tuning.choose("key", candidates, str) == "a"
    assert not timed
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "1")
    assert tuning.choose("key", candidates, str) == "b"
    assert tuning.choose("key", candidates, str) == "b"
    assert timed == candidates  # once
    tuning._fastest.clear()


def test_float32_precision_follows_the_users_settings() -> None:
    single = torch.empty(1, device="meta")
    previous = torch.get_float32_matmul_precision()
    try:
        with device.recording(SM_90):
            torch.set_float32_matmul_precision("highest")
            assert device.product_precision(single) == "tf32x3"
            torch.backends.cuda.matmul.allow_tf32 = True
            assert device.product_precision(single) == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.set_float32_matmul_precision("high")
            assert device.product_precision(single) == "tf32"
        with device.recording(OTHER_MAKE):
            assert device.product_precision(single) == "ieee"
    finally:
        torch.set_float32_matmul_precision(previous)


def test_float64_is_left_to_the_reference() -> None:
    assert action_kernels.ops.registry.backend_of("pairwise_lse_forward", "cpu", torch.float64) == (
        "reference"
    )
    assert torch.float64 not in pairwise_lse.DTYPES


Compiled = tuple[int, str, bool, tuning.Tiles, int]


def compiled_configurations() -> set[Compiled]:
    """Of each `pairwise_lse` launch that `bench.resources` compiles: for what, its tiles and padding."""
    found = set()
    for target in resources.TARGETS:
        for case in resources.cases():
            for launch in resources.launches(case, target):
                c, options = launch.constants, launch.options
                if ("SELF" in c or "OWN_TERM" in c) and "SAME" not in c:
                    backward = "OWN_TERM" in c
                    tiles = tuning.Tiles(
                        c["ROWS"], c["KEYS"], options["num_warps"], options["num_stages"],
                        c.get("PARTS", 1),
                    )  # fmt: skip
                    found.add((target.capability, c["PRECISION"], backward, tiles, c["DIM"]))
    return found


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's own")
def test_every_configuration_that_the_rules_pick_is_compiled() -> None:
    """In half precision at every padding, in float32 every tile: where a rule changes, this asks."""
    compiled = compiled_configurations()
    tiles_compiled = {key[:4] for key in compiled}
    for target in resources.TARGETS:
        for itemsize, precision in ((2, "ieee"), (4, "tf32"), (4, "tf32x3")):
            for dim in range(1, tuning.largest_dim(itemsize, precision) + 1):
                for rule in RULES:
                    tiles = rule(target, dim, itemsize, precision)[0]
                    backward = rule is tuning.backward_candidates
                    key = target.capability, precision, backward, tiles
                    if itemsize == 2:
                        assert (*key, tuning.padded(dim)) in compiled
                    else:
                        assert key in tiles_compiled


@pytest.fixture(scope="module")
def usages() -> list[resources.Usage]:
    if INTERPRETED:
        pytest.skip("kernels of the interpreter cannot be compiled")
    if IS_OLD:
        pytest.skip(
            "tiles are chosen with a newer Triton: this compiler may keep fewer numbers in registers"
        )
    return resources.measure()


@pytest.mark.skipif(INTERPRETED, reason="kernels of the interpreter cannot be compiled")
@pytest.mark.skipif(
    not IS_OLD,
    reason="test_compiles_for_every_architecture_without_faults compiles them, and more",
)
def test_old_compilers_take_every_kernel() -> None:
    assert resources.compile_all(quick=True) > 100


@pytest.mark.slow
def test_compiles_for_every_architecture_without_faults(usages: list[resources.Usage]) -> None:
    assert {usage.capability for usage in usages} == {80, 90, 100}
    assert len(usages) > 150
    assert [fault for usage in usages for fault in usage.faults()] == []


@pytest.mark.slow
def test_no_hot_loop_waits_for_its_scheduler(usages: list[resources.Usage]) -> None:
    """Tensor cores or special functions are the limit, not the issue of instructions.

    Not held to this are gathered rows: few queries share one, and its bytes are read again for each run.
    """
    hot = [
        usage
        for usage in usages
        if usage.kernel in ("forward_kernel", "backward_kernel")
        and "float16" in usage.case
        and not usage.case.startswith("indexed")
    ]
    assert {usage.capability for usage in hot} == {80, 90, 100}
    assert len(hot) > 150
    assert [u for u in hot if u.issue_share is None] == []
    above = {(u.case, u.capability): u.issue_share for u in hot if not u.issue_share < 1}
    assert above == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "instruction"), [(80, "mma"), (90, "wgmma"), (100, "tcgen05")]
)
def test_hot_kernels_use_the_newest_matrix_units(
    usages: list[resources.Usage], capability: int, instruction: str
) -> None:
    hot = [
        usage
        for usage in usages
        if usage.capability == capability
        and "float16" in usage.case
        and usage.kernel in ("forward_kernel", "backward_kernel")
    ]
    assert len(hot) > 30
    assert {usage.matrix for usage in hot} == {instruction}


def test_faults_are_named() -> None:
    usage = resources.Usage(
        "case", "kernel", 90, "", 255, 24, 0, 300_000, SM_90.shared_memory, 600, "mma", None
    )
    spilled, shared, tensor = usage.faults()
    assert "24 bytes spilled" in spilled
    assert "300000 bytes of shared memory" in shared
    assert "600 columns" in tensor
