"""MONAI in 3D: a segmentation loop with contrast between sampled voxels added.

python examples/monai_3d.py
"""

from __future__ import annotations

import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import DynUNet
from monai.transforms import (
    AsDiscrete,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    RandFlipd,
    RandGaussianNoised,
    RandSpatialCropd,
    ScaleIntensityd,
)

from action_kernels import FeatureTap, gather_pixels, sample_pixels, supcon_loss
from action_kernels.trainer.data.phantom import draw_patient

CLASSES, PATCH, WEIGHT = 4, (8, 48, 48), 0.1
KEYS = ["image", "label"]


def cases(first: int, last: int) -> list[dict]:
    """Generated hearts, (8, 64, 64): read your NIfTI files with LoadImaged instead."""
    frames = (draw_patient(0, number, size=64)[0] for number in range(first, last))
    return [{"image": image, "label": label.astype("int64")} for image, label in frames]


def main(epochs: int = 15) -> float:
    torch.manual_seed(0)
    prepare = [EnsureChannelFirstd(KEYS, channel_dim="no_channel"), ScaleIntensityd("image")]
    augment = [RandSpatialCropd(KEYS, PATCH), RandFlipd(KEYS, 0.5), RandGaussianNoised("image")]
    to_tensors = EnsureTyped(KEYS)
    training = Dataset(cases(0, 8), Compose([*prepare, *augment, to_tensors]))
    validation = Dataset(cases(8, 10), Compose([*prepare, to_tensors]))

    in_plane = (1, 2, 2)  # slices are thick
    network = DynUNet(
        3, 1, CLASSES, kernel_size=[3] * 4, strides=[1, in_plane, in_plane, 2],
        upsample_kernel_size=[in_plane, in_plane, 2], filters=[16, 16, 24, 32],
    )  # fmt: skip
    tap = FeatureTap(network.upsamples[-1])  # + the last decoder block, (B, 16, D, H, W)
    segmentation_loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)

    for epoch in range(epochs):
        network.train()
        for batch in DataLoader(training, batch_size=4, shuffle=True):
            image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
            logits = network(image)
            loss = segmentation_loss(logits, label)
            index, _ = sample_pixels(logits, label[:, 0], 128, num_classes=CLASSES)  # +
            rows, classes = gather_pixels(tap.take(), index)  # +
            contrast = supcon_loss(rows, classes, num_classes=CLASSES)  # +
            loss = loss + WEIGHT * contrast  # +
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1}: loss {loss:.3f}, of which contrast {WEIGHT * contrast:.3f}")

    network.eval()  # the tap keeps nothing now
    dice = DiceMetric(include_background=False)
    discrete = AsDiscrete(argmax=True, to_onehot=CLASSES), AsDiscrete(to_onehot=CLASSES)
    with torch.no_grad():
        for batch in DataLoader(validation, batch_size=1):
            logits = sliding_window_inference(batch["image"], PATCH, 4, network)
            pairs = zip(decollate_batch(logits), decollate_batch(batch["label"]), strict=True)
            for mine, true in pairs:
                dice(y_pred=[discrete[0](mine)], y=[discrete[1](true)])
    found = dice.aggregate().item()
    print(f"mean Dice of two validation cases: {found:.3f}")
    return found


if __name__ == "__main__":
    main()
