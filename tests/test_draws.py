"""Drawing pixels and negatives: who is a candidate, uniformity, seeds, the random numbers themselves."""

from __future__ import annotations

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
    means, errors = [], []
    for per_query in (None, 6):
        losses = torch.stack(
            [
                anatomical_contrast_loss(
                    queries, prototypes, bank,
                    draw_negatives(
                        prototypes, labels, 8, num_queries=per_query, generator=generator
                    ),
                )
                for _ in range(300)
            ]
        )  # fmt: skip
        means.append(losses.mean())
        errors.append(losses.std() / 300**0.5)
    assert abs(means[0] - means[1]) < 4 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    assert errors[0] < 0.02 * means[0]  # the bound above can fail
