"""A mean teacher as SSL4MIS trains one, and the eight lines (`# +`) that add SAACL.

python examples/mean_teacher.py
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch.nn.functional import cross_entropy, one_hot

from action_kernels import SAACL, FeatureTap, gather_pixels, sample_pixels  # +
from action_kernels.trainer.data.phantom import draw_patient

CLASSES, LABELLED, SIZE = 4, 4, 48  # of a batch of eight slices, four are labelled


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    probability, truth = logits.softmax(1), one_hot(labels, CLASSES).movedim(3, 1)
    both = (probability * truth).sum((0, 2, 3))
    return 1 - ((2 * both + 1e-5) / (probability**2 + truth).sum((0, 2, 3)).add(1e-5)).mean()


def sigmoid_rampup(step: int, length: int) -> float:
    return math.exp(-5 * (1 - min(step / length, 1)) ** 2)


def slices(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated hearts (N, 1, 48, 48) and their labels (N, 48, 48)."""
    frames = [draw_patient(0, number, SIZE)[0] for number in range(first, last)]
    images, labels = (np.concatenate(part) for part in zip(*frames, strict=True))
    return torch.as_tensor(images)[:, None], torch.as_tensor(labels).long()


def main(steps: int = 60) -> dict[str, float]:
    torch.manual_seed(0)
    labelled, labels = slices(0, 2)
    unlabelled, _ = slices(2, 8)
    model = BasicUNet(2, in_channels=1, out_channels=CLASSES, features=(16, 16, 24, 32, 32, 16))
    ema_model = copy.deepcopy(model).requires_grad_(False)
    student_tap, teacher_tap = FeatureTap(model.upcat_1), FeatureTap(ema_model.upcat_1)  # +
    saacl = SAACL(num_classes=CLASSES, dim=16, queue_size=2048)  # +
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    for step in range(steps):
        of_labelled = torch.randint(len(labelled), (LABELLED,))
        volume_batch = torch.cat(
            [labelled[of_labelled], unlabelled[torch.randint(len(unlabelled), (LABELLED,))]]
        )
        label_batch = labels[of_labelled]
        noise = (torch.randn_like(volume_batch) * 0.1).clamp(-0.2, 0.2)

        outputs = model(volume_batch)
        with torch.no_grad():
            ema_output = ema_model(volume_batch + noise)
        supervised = cross_entropy(outputs[:LABELLED], label_batch)
        supervised = 0.5 * (supervised + dice_loss(outputs[:LABELLED], label_batch))
        consistency = (outputs[LABELLED:].softmax(1) - ema_output[LABELLED:].softmax(1)).square()
        loss = supervised + 0.1 * sigmoid_rampup(step, steps) * consistency.mean()

        pixels, _ = sample_pixels(outputs[:LABELLED], label_batch, 128, num_classes=CLASSES)  # +
        rows, classes = gather_pixels(student_tap.take()[:LABELLED], pixels)  # +
        paired_keys, _ = gather_pixels(teacher_tap.take()[:LABELLED], pixels)  # +
        contrast = saacl(rows, classes, paired_keys)  # +
        loss = loss + 0.1 * contrast  # +

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha = min(1 - 1 / (step + 1), 0.99)
        for ema, parameter in zip(ema_model.parameters(), model.parameters(), strict=True):
            ema.mul_(alpha).add_(parameter.detach(), alpha=1 - alpha)
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: supervised {supervised:.3f}, all together {loss:.3f}")

    model.eval()
    images, truth = slices(8, 10)
    with torch.no_grad():
        dice = 1 - dice_loss(50 * model(images), truth)
    print(f"Dice of unseen patients, background included: {dice:.3f}")
    return {"supervised": supervised.item(), "loss": loss.item(), "dice": dice.item()}


if __name__ == "__main__":
    main()
