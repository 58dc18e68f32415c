"""`labelled_lse` and `pairwise_softplus` on Triton against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from labelled import PATTERNS, Scene, compare, labels_of
from support import relative_error

from action_kernels.backends.triton import labelled_pairs, tuning
from action_kernels.backends.triton.classes import ByClass, relate
from action_kernels.ops import labelled_lse, pairwise_softplus
from action_kernels.ops.relation import LabelledPairs

RELATIONS = ("same", "different")
# In the interpreter tiles are 16×16 forward and 32×16 backward; on a GPU up to 128.
SHAPES = [
    (1, None, 16),  # no pair at all
    (33, None, 48),  # one above the backward's rows, padded columns
    (40, 21, 16),  # ragged both ways
    (3, 70, 20),  # few anchors: their keys are split among processors
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_against_float64(device, n, m, d, relation, pattern):
    compare(Scene.make(n, m, d, pattern, relation), torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [None, 30])
def test_half_precision(device, dtype, m):
    for relation in RELATIONS:
        compare(Scene.make(36, m, 16, "few, some left out", relation), dtype, device)


@pytest.mark.parametrize("scale", [0.1, 200.0])
def test_small_and_large_scales(device, scale):
    for relation in RELATIONS:
        compare(Scene.make(35, None, 16, "two classes", relation, scale), torch.float32, device)


def test_unit_rows_by_a_fixed_shift(device):
    scene = Scene.make(50, None, 16, "few, some left out", "different")

    def promised(*rows, **options):
        return labelled_lse(*rows, normalized=True, **options)

    ours, exact = scene.to(torch.float32, device).lse(promised), scene.to(torch.float64).lse()
    for found, expected in zip(ours, exact, strict=True):
        assert relative_error(found.cpu(), expected) < 1e-6
    half = scene.to(torch.float16)  # whose weights would leave float16
    ours, exact = half.to(torch.float16, device).lse(promised), half.to(torch.float64).lse()
    for found, expected in zip(ours, exact, strict=True):
        assert relative_error(found.cpu(), expected) < 2e-3


@pytest.mark.parametrize("m", [None, 30])
def test_a_scale_that_is_a_tensor_on_the_device(device, m):
    """Read by the kernels; in the interpreter, where it lies on the CPU, by the op."""
    for relation in RELATIONS:
        plain = Scene.make(40, m, 16, "two classes", relation)
        rows = plain.to(torch.float32, device)
        scale = torch.tensor(10.0, device=device)
        pairs = LabelledPairs(
            rows.anchors, rows.keys, rows.labels, rows.key_labels, relation, 1.0, scale
        )
        number = pairs._replace(scale=10.0, scale_tensor=None)
        grad = torch.rand(40, device=device)
        needs = True, m is not None
        lse = labelled_pairs.labelled_lse_forward(number, False)
        for found, expected in zip(
            (
                labelled_pairs.labelled_lse_forward(pairs, False),
                labelled_pairs.pairwise_softplus_forward(pairs, rows.offsets),
                *labelled_pairs.labelled_lse_backward(
                    pairs, False, grad, lse, *needs, torch.float32
                ),
                *labelled_pairs.pairwise_softplus_backward(
                    pairs, rows.offsets, grad, *needs, True, torch.float32
                ),
            ),
            (
                lse,
                labelled_pairs.pairwise_softplus_forward(number, rows.offsets),
                *labelled_pairs.labelled_lse_backward(
                    number, False, grad, lse, *needs, torch.float32
                ),
                *labelled_pairs.pairwise_softplus_backward(
                    number, rows.offsets, grad, *needs, True, torch.float32
                ),
            ),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("m", [None, 30])
def test_gradients_shared_out_between_programs(device, monkeypatch, parts, m):
    """As on a Hopper for rows of more than 256: each program half of the columns, the sums once."""
    monkeypatch.setattr(
        tuning, "backward_candidates", lambda *_: [tuning.Tiles(32, 16, 4, 1, parts=parts)]
    )
    for relation in RELATIONS:
        compare(Scene.make(40, m, 32, "two classes", relation), torch.float32, device)


@pytest.mark.parametrize("relation", RELATIONS)
def test_rows_left_out_may_hold_nan(device, relation):
    scene = Scene.make(40, 30, 16, "few, some left out", relation).to(torch.float32, device)
    dirty = replace(
        scene,
        anchors=scene.anchors.where((scene.labels >= 0)[:, None], torch.nan),
        keys=scene.keys.where((scene.key_labels >= 0)[:, None], torch.inf),
        offsets=scene.offsets.where(scene.labels >= 0, torch.nan),
    )
    for clean, found in ((scene.lse(), dirty.lse()), (scene.softplus(), dirty.softplus())):
        for ours, expected in zip(found, clean, strict=True):
            assert torch.equal(ours, expected)


def test_nan_and_infinite_offsets(device):
    """A row of NaN reaches those it is paired with; −inf is the log-sum-exp of no negative."""
    scene = Scene.make(40, None, 16, "few, some left out", "same").to(torch.float32, device)
    bad = int((scene.labels == 2).nonzero()[1])
    anchors = scene.anchors.clone()
    anchors[bad] = torch.nan
    expected = (scene.labels == 2).cpu()
    for values in (
        labelled_lse(anchors, **scene.options),
        pairwise_softplus(anchors, offsets=scene.offsets, **scene.options),
    ):
        assert torch.equal(values.isnan().cpu(), expected)
    nothing = replace(scene, offsets=torch.full_like(scene.offsets, -torch.inf)).softplus()
    assert all(not found.any() for found in nothing)
    offsets = torch.full_like(scene.offsets, torch.inf)
    values = pairwise_softplus(scene.anchors, offsets=offsets, **scene.options)
    assert torch.equal((values == torch.inf).cpu(), (scene.labels >= 0).cpu())
    assert not values.isnan().any()


def test_no_rows_and_no_keys(device):
    rows, nothing = torch.randn(5, 16, device=device), torch.zeros(0, 16, device=device)
    labels = torch.arange(5, device=device)
    for relation in RELATIONS:
        options = {"scale": 1.0, "relation": relation}
        assert labelled_lse(nothing, labels=labels[:0], **options).shape == (0,)
        lse = labelled_lse(rows, nothing, labels=labels, key_labels=labels[:0], **options)
        assert lse.tolist() == [-torch.inf] * 5


def test_products_of_more_factors_than_one_logarithm_serves(device, monkeypatch):
    """Σ log(1 + e^x), of which the products are 2^m at most, at x = 0, and 1 + e^−40 at the least."""
    monkeypatch.setattr(tuning, "splits", lambda *_: 1)
    m = 16 * (labelled_pairs.FACTORS.value + 2) + 3
    anchors, keys = torch.zeros(17, 16, device=device), torch.zeros(m, 16, device=device)
    labels = torch.zeros(17, dtype=torch.int64, device=device)
    of_keys = torch.ones(m, dtype=torch.int64, device=device)
    offsets = torch.linspace(-40, 40, 17, device=device)
    pairs = LabelledPairs(anchors, keys, labels, of_keys, "different", 1.0)
    sums = labelled_pairs.pairwise_softplus_forward(pairs, offsets).double()
    expected = m * torch.nn.functional.softplus(offsets.double(), threshold=100)
    # an exponent is rounded once, to a power of two
    assert ((sums / expected - 1).abs() <= (4 + offsets.abs()) * 2**-23).all()


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "m"), [(50, 90), (16, 16), (3, 200)])
def test_tiles_that_are_visited(device, n, m, pattern, same):
    """All in which a pair counts, and of those whose pairs all or none count none that need not be."""
    rows, others = (ByClass.of(labels_of(pattern, size, seed=size).to(device)) for size in (n, m))
    check_visits(rows, others, same)
    check_visits(rows, rows, same)


def check_visits(rows, others, same):
    relation = relate(rows, others, same, tuning.Tiles(16, 16, 4, 1))
    y, k = rows.labels.cpu(), others.labels.cpu()
    equal = (y[:, None] == k) & (y >= 0)[:, None]
    counts = equal if same else ~equal & (y >= 0)[:, None] & (k >= 0)
    if others is rows:
        counts &= ~torch.eye(len(y), dtype=torch.bool)
    tiles = range(-(-len(k) // 16))
    for block, visit in enumerate(relation.visits.tolist()):
        begin, whole, whole_end, gap, gap_end, rest, rest_end, end = ends = visit[:8]
        assert ends == sorted(ends)
        met = {*range(begin, gap), *range(gap_end, end)}
        without_a_look = {*range(whole, whole_end), *range(rest, rest_end)}
        of_block = counts[16 * block : 16 * block + 16]
        that_take_part = of_block[y[16 * block : 16 * block + 16] >= 0]
        needed = {tile for tile in tiles if of_block[:, 16 * tile : 16 * tile + 16].any()}
        full = {
            tile
            for tile in tiles
            if 16 * tile + 16 <= len(k) and that_take_part[:, 16 * tile : 16 * tile + 16].all()
        }
        assert needed <= met <= set(tiles)
        assert without_a_look <= (met & full)
        if len(set(y[16 * block : 16 * block + 16].tolist())) == 1:  # one class
            assert len(met) <= len(needed) + 1
            assert without_a_look == met & full
