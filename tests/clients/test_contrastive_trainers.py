"""SupContrast's and SSL4MIS's ways to train, written out here, with our losses in place of theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from drop_in import TOLERANCE, assert_drop_in
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from action_kernels import class_centers, saacl_loss, supcon_loss

N, D, CLASSES, STEPS = 21, 16, 4, 4

pytestmark = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# SupContrast: (n, views, d) features, a mask of positives over all views, contrast_mode ----------------


def encoder(dtype):
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, D)).to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def two_views(dtype, step):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    things = labels[:, None] + torch.randn(N, 12, generator=generator)
    noise = torch.randn(2, N, 12, generator=generator)
    return (things + noise[0]).to(dtype), (things + noise[1]).to(dtype), labels


def supcontrast(features, labels, contrast_mode, temperature=0.1, base_temperature=0.1):
    """Its loss as it is defined: anchors of one or of all views against all views but themselves."""
    views = features.shape[1]
    contrast = torch.cat(torch.unbind(features, 1))
    anchors = features[:, 0] if contrast_mode == "one" else contrast
    logits = anchors @ contrast.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    mask = (labels[:, None] == labels).to(logits).repeat(len(anchors) // len(features), views)
    others = torch.ones_like(mask).scatter(1, torch.arange(len(anchors))[:, None], 0)
    log_probability = logits - (others * logits.exp()).sum(1, keepdim=True).log()
    mask = mask * others
    mean = (mask * log_probability).sum(1) / mask.sum(1)
    return -(temperature / base_temperature) * mean.mean()


def supcontrast_all_theirs(dtype):
    model, optimizer = encoder(dtype)
    for step in range(STEPS):
        first, second, labels = two_views(dtype, step)
        features = normalize(model(torch.cat([first, second])))
        f1, f2 = torch.split(features, [N, N])
        features = torch.stack([f1, f2], 1)
        loss = supcontrast(features, labels, "all")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def supcontrast_all_ours(dtype):
    model, optimizer = encoder(dtype)
    for step in range(STEPS):
        first, second, labels = two_views(dtype, step)
        features = normalize(model(torch.cat([first, second])))
        loss = supcon_loss(features, labels.repeat(2), temperature=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def supcontrast_one_theirs(dtype):
    model, optimizer = encoder(dtype)
    for step in range(STEPS):
        first, second, labels = two_views(dtype, step)
        features = normalize(model(torch.cat([first, second])))
        f1, f2 = torch.split(features, [N, N])
        features = torch.stack([f1, f2], 1)
        loss = supcontrast(features, labels, "one")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def supcontrast_one_ours(dtype):
    model, optimizer = encoder(dtype)
    for step in range(STEPS):
        first, second, labels = two_views(dtype, step)
        features = normalize(model(torch.cat([first, second])))
        loss = supcon_loss(
            features[:N], labels, temperature=0.1,
            keys=features, key_labels=labels.repeat(2), own_keys=torch.arange(N),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (supcontrast_all_theirs, supcontrast_all_ours),
        (supcontrast_one_theirs, supcontrast_one_ours),
    ],
    ids=["all", "one"],
)
def test_supcontrast(dtype, theirs, ours):
    assert_drop_in(theirs, ours, dtype)


# SSL4MIS: a mean teacher over labelled and unlabelled slices, consistency ramped up --------------------


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, D, 3, padding=1), nn.ReLU())
        self.logits = nn.Conv2d(D, CLASSES, 1)

    def forward(self, image):
        features = self.features(image)
        return self.logits(features), features


def slices(dtype, step):
    """Four slices, of which the first two are labelled, at 10 × 10."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (2, 10, 10), generator=generator)
    images = torch.randn(4, 1, 10, 10, generator=generator)
    images[:2, 0] += labels
    return images.to(dtype), labels


def eager_saacl(features, labels, centers, temperature=0.1, center_weight=0.2):
    """SAACL as its formula reads, for comparison: the pixels against each other and their centres."""
    rows = normalize(features.movedim(1, -1).flatten(0, -2))
    y = labels.flatten()
    itself = torch.eye(len(y), dtype=torch.bool)
    logits = rows @ rows.T / temperature
    lse = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    positive = (y[:, None] == y) & ~itself
    count = positive.sum(1)
    terms = count * lse - (logits * positive).sum(1)
    center = lse - (rows * centers[y]).sum(1) / temperature
    return ((terms + center_weight * center) / (count + 1)).mean()


def mean_teacher_eager(dtype):
    student, teacher = Segmenter().to(dtype), Segmenter().to(dtype)
    teacher.load_state_dict(copy.deepcopy(student.state_dict()))
    centers = class_centers(CLASSES, D, steps=20).to(dtype)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(STEPS):
        images, labels = slices(dtype, step)
        outputs, features = student(images)
        with torch.no_grad():
            ema_output, _ = teacher(images[2:] + 0.01)
        supervised = cross_entropy(outputs[:2], labels)
        contrast = eager_saacl(features[:2], labels, centers)
        consistency = (outputs[2:].softmax(1) - ema_output.softmax(1)).square().mean()
        loss = supervised + 0.1 * contrast + 0.1 * (step / STEPS) * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for ema, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            ema.data.mul_(0.99).add_(parameter.data, alpha=0.01)
    return loss, *student.parameters(), *teacher.parameters()


def mean_teacher_ours(dtype):
    student, teacher = Segmenter().to(dtype), Segmenter().to(dtype)
    teacher.load_state_dict(copy.deepcopy(student.state_dict()))
    centers = class_centers(CLASSES, D, steps=20).to(dtype)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(STEPS):
        images, labels = slices(dtype, step)
        outputs, features = student(images)
        with torch.no_grad():
            ema_output, _ = teacher(images[2:] + 0.01)
        supervised = cross_entropy(outputs[:2], labels)
        contrast = saacl_loss(features[:2], labels, centers)
        consistency = (outputs[2:].softmax(1) - ema_output.softmax(1)).square().mean()
        loss = supervised + 0.1 * contrast + 0.1 * (step / STEPS) * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for ema, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            ema.data.mul_(0.99).add_(parameter.data, alpha=0.01)
    return loss, *student.parameters(), *teacher.parameters()


def test_mean_teacher(dtype):
    assert_drop_in(mean_teacher_eager, mean_teacher_ours, dtype)
