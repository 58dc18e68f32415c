"""Drawing pixels and negatives: who is a candidate, uniformity, seeds, the random numbers themselves."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from action_kernels import anatomical_contrast_loss, class_relation, draw_negatives, sample_pixels

K = 3


def scene(shape=(2, 9, 8)):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, K, shape, generator=generator)
    logits = torch.randn(shape[0], K, *shape[1:], generator=generator)
    return logits, labels


def philox(key: int, counter: int) -> int:
    """First word of Philox 4x32-10 (Salmon et al. 2011) for a 64-bit key and a counter below 2³²."""
    m0, m1, w0, w1, low = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF
    c = [counter, 0, 0, 0]
    k0, k1 = key & low, key >> 32
    for _ in range(10):
        p0, p1 = m0 * c[0], m1 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + w0) & low, (k1 + w1) & low
    return c[0]


def test_the_generator_passes_the_papers_known_answer():
    """Known-answer vector of the Random123 distribution: zero key, zero counter."""
    assert philox(0, 0) == 0x6627E8D5


@pytest.mark.parametrize("shape", [(2, 9, 8), (1, 4, 5, 6)])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_draws_are_candidates_by_rank(shape, threshold):
    logits, labels = scene(shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.2
    seed = torch.Generator().manual_seed(7)
    index, counts = sample_pixels(
        logits, labels, 50, num_classes=K, threshold=threshold, mask=mask, generator=seed
    )
    key = _drawn_seed(7)
    confidence = logits.softmax(1)
    for c in range(K):
        candidate = (labels == c) & mask
        if threshold is not None:
            candidate &= confidence[:, c] < threshold
        places = candidate.flatten().nonzero().flatten()
        assert counts[c] == len(places) > 0
        expected = [places[philox(key, c * 50 + q) * len(places) >> 32].item() for q in range(50)]
        assert index[c].tolist() == expected


def _drawn_seed(manual_seed: int) -> int:
    from action_kernels.ops.sample_pixels import _draw_seed

    drawn = _draw_seed(torch.device("cpu"), torch.Generator().manual_seed(manual_seed))
    return int(drawn.item()) % 2**64


def test_probabilities_and_logits_agree():
    logits, labels = scene()
    draws = [
        sample_pixels(
            scores, labels, 20, num_classes=K, threshold=0.5, from_logits=from_logits,
            generator=torch.Generator().manual_seed(2),
        )
        for scores, from_logits in ((logits, True), (logits.softmax(1), False))
    ]  # fmt: skip
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])


def test_draws_are_uniform():
    _, labels = scene()
    index, counts = sample_pixels(
        None, labels, 40_000, num_classes=K, generator=torch.Generator().manual_seed(3)
    )
    for c in range(K):
        seen = torch.bincount(index[c], minlength=labels.numel())
        assert (seen[labels.flatten() != c] == 0).all()
        test = stats.chisquare(seen[labels.flatten() == c].numpy())
        assert test.pvalue > 1e-4
        assert (seen > 0).sum() == counts[c]


def test_classes_without_a_candidate_are_marked():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    index, counts = sample_pixels(None, labels, 5, num_classes=2)
    assert counts.tolist() == [16, 0]
    assert index[1].tolist() == [-1] * 5
    assert (index[0] >= 0).all()
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 20  # every pixel is easy
    index, counts = sample_pixels(logits, labels, 5, num_classes=2, threshold=0.9)
    assert counts.tolist() == [0, 0]
    assert (index == -1).all()


def test_seeds_decide():
    _, labels = scene()

    def draw(seed):
        return sample_pixels(
            None, labels, 30, num_classes=K, generator=torch.Generator().manual_seed(seed)
        )[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_negatives_follow_the_relation_of_classes():
    _, labels = scene()
    prototypes = torch.randn(K, 5, generator=torch.Generator().manual_seed(5))
    negatives = draw_negatives(
        prototypes, labels, 30_000, temperature=0.5, generator=torch.Generator().manual_seed(6)
    )
    relation = class_relation(prototypes, temperature=0.5)
    classes = labels.flatten()[negatives]
    for c in range(K):
        seen = torch.bincount(classes[c], minlength=K).double()
        assert seen[c] == 0
        others = [k for k in range(K) if k != c]
        expected = relation[c, others].double() * 30_000
        expected *= seen[others].sum() / expected.sum()
        assert stats.chisquare(seen[others].numpy(), expected.numpy()).pvalue > 1e-4


def test_shared_draws_leave_the_expected_loss_unchanged():
    """The mean over many draws agrees, within its standard error, with draws for every query."""
    _, labels = scene()
    generator = torch.Generator().manual_seed(8)
    bank = torch.randn(labels.numel(), 5, generator=generator)
    prototypes = torch.stack([bank[labels.flatten() == c].mean(0) for c in range(K)])
    queries = torch.randn(K, 6, 5, generator=generator)

    def losses(draws: int, copies: int, num_queries: int | None) -> torch.Tensor:
        """Of `draws` draws, each looked at by so many copies of the queries."""
        same = queries.repeat(1, copies, 1)
        index = (
            draw_negatives(prototypes, labels, 8, num_queries=num_queries, generator=generator)
            for _ in range(draws)
        )
        return torch.stack([anatomical_contrast_loss(same, prototypes, bank, i) for i in index])

    shared, own = losses(150, 1, None), losses(15, 10, 60)
    error = (shared.var() / len(shared) + own.var() / len(own)) ** 0.5
    assert abs(shared.mean() - own.mean()) < 4 * error
    assert error < 0.02 * own.mean()  # the bound above can fail


def test_a_pixel_without_a_number_is_no_candidate():
    logits, labels = scene()
    image, row, column = (labels == 0).nonzero()[0]
    logits[image, 1, row, column] = torch.nan
    _, all_of_them = sample_pixels(None, labels, 1, num_classes=K)
    _, counts = sample_pixels(logits, labels, 1, num_classes=K, threshold=1.0)
    assert (all_of_them - counts).tolist() == [1, 0, 0]


def test_opcheck():
    logits, labels = scene()
    op, seed = torch.ops.action_kernels.sample_pixels, torch.tensor([5])
    torch.library.opcheck(op, (logits, labels, labels > 0, seed, 4, K, 0.5, True))
    torch.library.opcheck(op, (None, labels, None, seed, 4, K, 0.0, True))


def test_compiles_whole():
    """What is drawn under the compiler are candidates; its random seed is its own."""
    logits, labels = scene()
    compiled = torch.compile(
        lambda x: sample_pixels(x, labels, 9, num_classes=K, threshold=0.5),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    index, counts = compiled(logits)
    assert torch.equal(counts, sample_pixels(logits, labels, 9, num_classes=K, threshold=0.5)[1])
    own = logits.softmax(1).movedim(1, -1).reshape(-1, K)
    for c in range(K):
        assert (labels.flatten()[index[c]] == c).all()
        assert (own[index[c], c] < 0.5).all()


def test_the_only_class_has_no_negatives():
    labels = torch.zeros(1, 3, 3, dtype=torch.int64)
    negatives = draw_negatives(torch.randn(2, 4), labels, 6, num_queries=5)
    assert negatives.shape == (2, 5, 6)
    assert (negatives[0] == -1).all()  # class 0 is alone
    assert (negatives[1] >= 0).all()  # the absent class 1 could be told from it


def test_the_relation_of_classes_is_its_formula():
    prototypes = torch.randn(4, 5, dtype=torch.float64)
    relation = class_relation(prototypes, torch.tensor([True, True, False, True]), temperature=0.3)
    for c in (0, 1, 3):
        others = [k for k in (0, 1, 3) if k != c]
        logits = torch.cosine_similarity(prototypes[c][None], prototypes[others]) / 0.3
        torch.testing.assert_close(relation[c, others], logits.softmax(0))
        assert relation[c].sum() == pytest.approx(1)
    assert (relation[:, 2] == 0).all()  # nothing is drawn from the absent class


@pytest.mark.parametrize("size", [1e-9, 1e200])
def test_the_relation_does_not_depend_on_the_size_of_prototypes(size):
    prototypes = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(class_relation(prototypes * size), class_relation(prototypes))


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 1, 4, 5, 5)])
def test_labels_and_masks_may_have_a_channel(shape):
    labels = torch.arange(math.prod(shape)).view(shape) % 3
    mask, scores = labels.roll(1, -1) > 0, torch.randn(2, 3, *shape[2:])
    found = [
        sample_pixels(
            scores, y, 6, num_classes=3, threshold=0.5, mask=m, generator=torch.Generator().manual_seed(0)
        )
        for y, m in ((labels, mask), (labels[:, 0], mask[:, 0]))
    ]  # fmt: skip
    assert (found[0][1] > 0).any()
    torch.testing.assert_close(*found, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 3)}, "labels must hold integers"),
        ({"num_samples": -1}, "num_samples must be ≥ 0, got -1"),
        ({"num_classes": 0}, "num_classes must be ≥ 1, got 0"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\], got 1.5"),
        ({"threshold": 0.5}, "threshold needs scores"),
        ({"threshold": 0.5, "scores": torch.zeros(2, 5, 3)}, r"scores must have shape \(2, 2, 3\)"),
        ({"mask": torch.zeros(2, 3)}, "mask must be a bool tensor"),
    ],
)
def test_errors_of_sample_pixels_name_the_argument(change, message):
    labels = torch.zeros(2, 3, dtype=torch.int64)
    call = {"scores": None, "labels": labels, "num_samples": 4, "num_classes": 2, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        sample_pixels(call.pop("scores"), call.pop("labels"), call.pop("num_samples"), **call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_negatives": -1}, "num_negatives must be ≥ 0, got -1"),
        ({"prototypes": torch.zeros(3)}, "prototypes must have shape"),
        ({"temperature": 0.0}, "temperature must be"),
    ],
)
def test_errors_of_draw_negatives_name_the_argument(change, message):
    labels = torch.zeros(2, 3, dtype=torch.int64)
    call = {"prototypes": torch.zeros(3, 4), "labels": labels, "num_negatives": 4, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        draw_negatives(
            call.pop("prototypes"), call.pop("labels"), call.pop("num_negatives"), **call
        )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_every_integer_dtype_draw_the_same_pixels(dtype):
    labels = torch.arange(24).view(2, 3, 4) % 2
    draws = [
        sample_pixels(None, given, 5, num_classes=2, generator=torch.Generator().manual_seed(3))
        for given in (labels, labels.to(dtype))
    ]
    for first, second in zip(*draws, strict=True):
        assert torch.equal(first, second)


def test_a_label_beyond_int64_is_no_class():
    labels = torch.tensor([[0, 2**64 - 1, 1]], dtype=torch.uint64)
    _, counts = sample_pixels(None, labels, 2, num_classes=2)
    assert counts.tolist() == [1, 1]
