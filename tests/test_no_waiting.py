"""The losses and what feeds them do not wait for the device, as reading a number of a tensor would.

Tensors on the meta device have no numbers, so that such a read is an error there.
"""

from __future__ import annotations

import pytest
import torch

from action_kernels import (
    SAACL,
    MemoryQueue,
    RunningClassMeans,
    SampledHead,
    allocate_centers,
    anatomical_contrast_loss,
    clip_loss,
    draw_negatives,
    gather_pixels,
    info_nce_loss,
    multi_positive_nt_xent_loss,
    nt_xent_loss,
    relational_loss,
    resize_labels,
    saacl_loss,
    sample_pixels,
    siglip_loss,
    supcon_loss,
)

K, D, SIZE = 4, 8, (2, 6, 6)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="meta", requires_grad=True)


def labels(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device="meta")


def the_head(method: str) -> torch.Tensor:
    head, pyramid = SampledHead((5, 3), D, 2).to("meta"), (rows(2, 5, 3, 3), rows(2, 3, 6, 6))
    if method == "prototypes":
        return head.prototypes(pyramid, labels(*SIZE), num_classes=K)[0]
    return head(pyramid, labels(K, 3))


def the_class_means() -> torch.Tensor:
    means = RunningClassMeans(K, D).to("meta")
    means.update(rows(9, D).detach(), labels(9))
    return means.means


def the_queue() -> torch.Tensor:
    queue = MemoryQueue(7, D).to("meta")
    queue.enqueue(rows(5, D).detach(), labels(5))
    queue.enqueue(rows(5, D).detach(), labels(5))
    return queue.features


CALLS = {
    "all pixels of a class": lambda: sample_pixels(None, labels(*SIZE), 5, num_classes=K)[0],
    "hard pixels": lambda: sample_pixels(
        rows(2, K, 6, 6), labels(*SIZE), 5, num_classes=K, threshold=0.9
    )[0],
    "shared negatives": lambda: draw_negatives(rows(K, D), labels(*SIZE), 5),
    "negatives of their own": lambda: draw_negatives(rows(K, D), labels(*SIZE), 5, num_queries=3),
    "head at pixels": lambda: the_head("at"),
    "prototypes": lambda: the_head("prototypes"),
    "anatomical contrast": lambda: anatomical_contrast_loss(
        rows(K, 3, D), rows(K, D).detach(), rows(20, D).detach(), labels(K, 5)
    ),
    "relational": lambda: relational_loss(
        rows(3, D), rows(3, D).detach(), rows(9, D).detach(),
        student_temperature=0.1, teacher_temperature=0.1,
    ),
    "running class means": the_class_means,
    "allocation": lambda: allocate_centers(rows(8, D).detach(), rows(8, D).detach()),
    "queue": the_queue,
    "SAACL with its state": lambda: SAACL(K, D, queue_size=7).to("meta")(
        rows(9, D), labels(9), rows(9, D).detach()
    ),
    "SupCon of any labels": lambda: supcon_loss(rows(2, D, 3, 3), labels(2, 1, 3, 3)),
    "SupCon over keys": lambda: supcon_loss(
        rows(9, D), labels(9), keys=rows(5, D), key_labels=labels(5), mean_over="with_positives"
    ),
    "multi-positive NT-Xent": lambda: multi_positive_nt_xent_loss(rows(9, D), labels(9)),
    "InfoNCE with a bank": lambda: info_nce_loss(rows(9, D), rows(9, D), bank=rows(5, D)),
    "NT-Xent": lambda: nt_xent_loss(rows(9, D), rows(9, D)),
    "CLIP, a temperature that learns": lambda: clip_loss(
        rows(9, D), rows(9, D), temperature=rows()
    ),
    "SigLIP": lambda: siglip_loss(rows(9, D), rows(9, D), temperature=rows(), bias=rows()),
    "weights": lambda: saacl_loss(
        rows(9, D), labels(9), rows(K, D).detach(), weight=rows(K), sample_weight=rows(9)
    ),
    "gathered pixels": lambda: gather_pixels(rows(2, D, 6, 6), labels(K, 5))[0],
    "resized labels": lambda: resize_labels(labels(*SIZE), (3, 4)),
    "SAACL": lambda: saacl_loss(rows(9, D), labels(9), rows(K, D).detach(), temperature=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name):
    output = CALLS[name]()
    assert output.device.type == "meta"
    if output.requires_grad:
        output.sum().backward()


def test_waiting_would_be_seen():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool((rows(3) > 0).any())
