"""`sample_pixels` in C++: the same pixels as the reference, on every instruction set and thread count."""

from __future__ import annotations

import ctypes

import pytest
import torch
from scipy import stats

import action_kernels
from action_kernels import draw_negatives, sample_pixels
from action_kernels.backends import cpu
from action_kernels.ops import registry

UNAVAILABLE = cpu.unavailable("cpu")
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

SHAPES = [
    (3,),  # three images without an axis
    (1, 1),
    (5, 7, 9),  # 63 pixels an image: pieces of 64 pixels end with the images
    (2, 9, 10, 11),  # volumes
    (2, 130, 101),  # several tasks of sixteen blocks, ragged at the end
]


def scene(shape, num_classes, dtype=torch.float32, label_dtype=torch.int64):
    """Logits, labels (also one below 0, where it can be, and one beyond the classes) and a mask."""
    generator = torch.Generator().manual_seed(sum(shape))
    lowest = 0 if label_dtype == torch.uint8 else -1
    labels = torch.randint(lowest, num_classes + 1, shape, generator=generator).to(label_dtype)
    logits = 3 * torch.randn(shape[0], num_classes, *shape[1:], generator=generator)
    return logits.to(dtype), labels, torch.rand(shape, generator=generator) > 0.3


def draw(backend, scores, labels, num_samples, seed=11, **options):
    generator = torch.Generator().manual_seed(seed)
    with action_kernels.use_backend(backend):
        return sample_pixels(scores, labels, num_samples, generator=generator, **options)


def assert_same_draws(scores, labels, num_samples, **options):
    index, counts = draw("cpu", scores, labels, num_samples, **options)
    expected_index, expected_counts = draw("reference", scores, labels, num_samples, **options)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(index, expected_index)
    return counts


def test_the_automatic_choice_is_this_backend():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8):
        assert registry.backend_of("sample_pixels", "cpu", dtype) == "cpu"
    assert registry.backend_of("sample_pixels", "cpu", torch.float64) == "reference"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", [1, 4, 30])
@pytest.mark.parametrize("num_samples", [1, 30, 1000])  # blocks from 1024 down to 64 pixels
def test_draws_are_the_references(instruction_set, shape, num_classes, num_samples):
    logits, labels, mask = scene(shape, num_classes)
    options = {"num_classes": num_classes}
    assert_same_draws(None, labels, num_samples, **options)
    assert_same_draws(None, labels, num_samples, mask=mask, **options)
    assert_same_draws(logits, labels, num_samples, threshold=0.4, **options)
    assert_same_draws(logits, labels, num_samples, threshold=0.4, mask=mask, **options)
    assert_same_draws(
        logits.softmax(1), labels, num_samples, threshold=0.4, from_logits=False, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "label_dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
)
def test_every_dtype(instruction_set, dtype, label_dtype):
    logits, labels, mask = scene((3, 40, 41), 5, dtype, label_dtype)
    for scores, from_logits in ((logits, True), (logits.float().softmax(1).to(dtype), False)):
        counts = assert_same_draws(
            scores, labels, 64, num_classes=5, threshold=0.45, mask=mask, from_logits=from_logits
        )
        assert (counts > 0).all()


def test_labels_of_large_numbers_are_not_cut_off():
    """2³² and 256 would be class 0 if only the low bits were looked at."""
    labels = torch.tensor([[0, 2**32, 256, -(2**32), 1, 0]])
    index, counts = draw("cpu", None, labels, 50, num_classes=2)
    assert counts.tolist() == [2, 1]
    assert set(index[0].tolist()) == {0, 5}


def test_views_are_read_as_they_are_indexed():
    logits, labels, mask = scene((4, 24, 30), 3)
    channels_last = logits.to(memory_format=torch.channels_last)
    assert_same_draws(channels_last, labels, 40, num_classes=3, threshold=0.5, mask=mask)
    options = {"num_classes": 3, "threshold": 0.5, "mask": mask[::2, :, 3:]}
    assert_same_draws(logits[::2, :, :, 3:], labels[::2, :, 3:], 40, **options)


@pytest.mark.parametrize("num_samples", [5, 2000])
def test_one_to_four_threads_draw_the_same(threads, num_samples):
    logits, labels, mask = scene((2, 130, 101), 6)
    options = {"num_classes": 6, "threshold": 0.5, "mask": mask}
    expected = draw("reference", logits, labels, num_samples, **options)
    for count in (1, 2, 3, 4):
        threads(count)
        index, counts = draw("cpu", logits, labels, num_samples, **options)
        assert torch.equal(counts, expected[1])
        assert torch.equal(index, expected[0])


def test_confidences_are_float32_accurate(instruction_set):
    """Who is hard differs from float64 only where the confidence is the threshold to rounding."""
    logits, _, _ = scene((2, 100, 100), 8)
    logits[:, :, :50] *= 20  # confidences near 1, and exponents far below those of float32
    labels = logits.argmax(1)
    exact = logits.double().softmax(1).gather(1, labels[:, None]).squeeze(1)
    for threshold in (0.5, 0.97, 0.9999):
        _, counts = draw("cpu", logits, labels, 1, num_classes=8, threshold=threshold)
        surely, maybe = (
            torch.bincount(labels[exact < bound], minlength=8)
            for bound in (threshold * (1 - 1e-6), threshold * (1 + 1e-6))
        )
        assert ((surely <= counts) & (counts <= maybe)).all()
        assert (maybe - surely).sum() < 10  # the bounds say something


def test_infinite_and_absent_numbers(instruction_set):
    infinity, nan = torch.inf, torch.nan
    pixels = torch.tensor(
        [
            [0.0, -infinity, -infinity],  # certain of its class
            [-infinity, 0.0, 1.0],  # hopeless: confidence 0
            [nan, 0.0, 0.0],
            [0.0, nan, 0.0],
            [infinity, 0.0, 0.0],  # ∞ − ∞
            [-infinity, -infinity, -infinity],
            [0.0, 0.0, 90.0],  # an exponent below all of float32
            [500.0, 500.0, 500.0],
        ]
    )
    logits = pixels.T[None].contiguous()
    labels = torch.zeros(1, len(pixels), dtype=torch.int64)
    index, counts = draw("cpu", logits, labels, 400, num_classes=3, threshold=0.99)
    assert counts.tolist() == [3, 0, 0]
    assert set(index[0].tolist()) == {1, 6, 7}
    assert (index[1:] == -1).all()


def test_no_pixels_and_no_draws():
    labels = torch.zeros(0, 4, 4, dtype=torch.int64)
    index, counts = draw("cpu", None, labels, 3, num_classes=2)
    assert index.tolist() == [[-1] * 3] * 2
    assert counts.tolist() == [0, 0]
    index, counts = draw("cpu", None, torch.ones(2, 5, dtype=torch.int64), 0, num_classes=2)
    assert index.shape == (2, 0)
    assert counts.tolist() == [0, 10]


def test_hard_pixels_are_drawn_uniformly():
    logits, labels, _ = scene((2, 30, 30), 3)
    index, counts = draw("cpu", logits, labels, 100_000, num_classes=3, threshold=0.5)
    confidence = logits.softmax(1)
    for c in range(3):
        hard = ((labels == c) & (confidence[:, c] < 0.5)).flatten()
        seen = torch.bincount(index[c], minlength=labels.numel())
        assert hard.sum() == counts[c] > 100
        assert seen[~hard].sum() == 0
        assert stats.chisquare(seen[hard].numpy()).pvalue > 1e-4


def test_negatives_are_the_same_on_every_backend():
    _, labels, _ = scene((2, 40, 40), 4)
    prototypes = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    negatives = []
    for backend in ("cpu", "reference"):
        with action_kernels.use_backend(backend):
            generator = torch.Generator().manual_seed(4)
            negatives.append(draw_negatives(prototypes, labels, 300, generator=generator))
    assert torch.equal(*negatives)


def test_bad_calls_return_a_status_with_a_message():
    library = cpu.load()
    labels = torch.zeros(4, dtype=torch.int64)
    index, counts = torch.empty(6, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    workspace = torch.empty(4096, dtype=torch.uint8)

    def call(size=4096, index=index, **change):
        fields = {"labels": labels.data_ptr(), "batch": 1, "pixels": 4, "classes": 2, "samples": 3}
        sampling = ctypes.byref(cpu.HEADER.structs["ak_sampling"](**(fields | change)))
        status = library.ak_cpu_sample_pixels(
            sampling, None if index is None else index.data_ptr(), counts.data_ptr(), 1,
            workspace.data_ptr(), size,
        )  # fmt: skip
        assert (
            size < 4096
            or index is None
            or status == -min(library.ak_cpu_sample_pixels_workspace(sampling), 0)
        )
        return library.ak_status_message(status).decode()

    assert call() == "success"
    assert "workspace" in call(size=10)
    assert "pointer" in call(labels=None)
    assert "pointer" in call(index=None)
    assert "labels no integer" in call(labels_dtype=7)
    assert "dtype" in call(scores=labels.data_ptr(), scores_dtype=3)
    for change in ({"classes": 0}, {"samples": -1}, {"pixels": -4}, {"batch": 2**31}):
        assert "count" in call(**change)
    assert "count" in call(samples=2**31 + 1)  # more draws than the generator has counters


def test_a_workspace_at_any_address_is_enough():
    _, labels, _ = scene((3, 50, 50), 4)
    sampling = cpu.HEADER.structs["ak_sampling"](
        labels=labels.data_ptr(), batch=3, pixels=2500, classes=4, samples=30, seed=5
    )
    index, counts = torch.empty(4, 30, dtype=torch.int64), torch.empty(4, dtype=torch.int64)
    size = cpu.load().ak_cpu_sample_pixels_workspace(ctypes.byref(sampling))
    found = []
    for shift in (0, 1, 63):
        memory = torch.full((size + 64 + 64,), 77, dtype=torch.uint8)
        start = memory.data_ptr() + shift
        status = cpu.load().ak_cpu_sample_pixels(
            ctypes.byref(sampling), index.data_ptr(), counts.data_ptr(), 2, start, size
        )
        assert status == 0
        assert (memory[:shift] == 77).all()
        assert (memory[shift + size :] == 77).all()
        found.append(index.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
