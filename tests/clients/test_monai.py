"""MONAI's ContrastiveLoss replaced, and a 3D segmentation loop of MetaTensors with a sliding window at its end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drop_in import TOLERANCE, assert_drop_in
from support import relative_error
from torch import nn

pytest.importorskip("monai", reason='MONAI comes with pip install "action_kernels[train]"')

from monai.data import DataLoader, Dataset, MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import ContrastiveLoss, DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, RandFlipd, ScaleIntensityd

from action_kernels import SAACL, NTXentLoss, class_centers, saacl_loss, supcon_loss

N, D, CLASSES, SIZE = 17, 16, 3, 16


def pretraining_theirs(dtype):
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, D)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    contrastive_loss = ContrastiveLoss(temperature=0.25)  # which it rounds to float32
    for _ in range(4):
        image = torch.randn(N, 12, dtype=dtype)
        outputs_v1, outputs_v2 = model(image), model(image + 0.5 * torch.randn_like(image))
        loss = contrastive_loss(outputs_v1, outputs_v2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


def pretraining_ours(dtype):
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, D)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    contrastive_loss = NTXentLoss(temperature=0.25)
    for _ in range(4):
        image = torch.randn(N, 12, dtype=dtype)
        outputs_v1, outputs_v2 = model(image), model(image + 0.5 * torch.randn_like(image))
        loss = contrastive_loss(outputs_v1, outputs_v2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss, *model.parameters()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_contrastive_loss(dtype):
    assert_drop_in(pretraining_theirs, pretraining_ours, dtype)


def volumes(count: int) -> list[dict[str, np.ndarray]]:
    """A ball and a box in noise."""
    generator = np.random.default_rng(0)
    z, y, x = np.mgrid[:SIZE, :SIZE, :SIZE]
    cases = []
    for _ in range(count):
        label = np.zeros((SIZE,) * 3, dtype=np.int64)
        label[2:7, 2:9, 3:10] = 1
        center = generator.integers(9, 12, 3)
        label[(z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < 16] = 2
        image = label + 0.3 * generator.standard_normal(label.shape)
        cases.append({"image": image.astype(np.float32), "label": label})
    return cases


class PixelFeatures(nn.Module):
    """A U-Net up to its last layer, and that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = UNet(3, 1, D, channels=(8, 16, 32), strides=(2, 2))
        self.head = nn.Conv3d(D, CLASSES, 1)

    def forward(self, image):
        features = self.trunk(image)
        return self.head(features), features


def train(contrast, steps: int, as_tensor: bool = False) -> tuple[list[float], PixelFeatures]:
    """Losses of the steps and the network, trained on whole batches of MetaTensors, or of their plain tensors."""
    torch.manual_seed(0)
    keys = ["image", "label"]
    transform = Compose(
        [
            EnsureChannelFirstd(keys, channel_dim="no_channel"),
            ScaleIntensityd("image"),
            RandFlipd(keys, prob=0.5, spatial_axis=0).set_random_state(0),
            EnsureTyped(keys),
        ]
    )
    loader = DataLoader(Dataset(volumes(2), transform), batch_size=2)
    network = PixelFeatures()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    segmentation_loss = DiceCELoss(to_onehot_y=True, softmax=True)
    losses = []
    for _ in range(steps):
        for batch in loader:
            image, label = batch["image"], batch["label"]
            assert isinstance(image, MetaTensor)
            assert isinstance(label, MetaTensor)
            if as_tensor:
                image, label = image.as_tensor(), label.as_tensor()
            logits, features = network(image)
            assert isinstance(features, MetaTensor) is not as_tensor
            loss = segmentation_loss(logits, label) + 0.1 * contrast(features, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, network


CENTERS = class_centers(CLASSES, D, steps=50)
CONTRASTS = {
    "saacl_loss": lambda features, label: saacl_loss(features, label, CENTERS),
    "supcon_loss": lambda features, label: supcon_loss(features, label, num_classes=CLASSES),
}


@pytest.mark.parametrize("name", CONTRASTS)
def test_metatensors_train_as_plain_tensors_do(name):
    meta, network = train(CONTRASTS[name], 2)
    plain, other = train(CONTRASTS[name], 2, as_tensor=True)
    assert meta == pytest.approx(plain, rel=1e-5)
    for mine, expected in zip(network.parameters(), other.parameters(), strict=True):
        assert type(mine.grad) is torch.Tensor
        assert relative_error(mine.grad, expected.grad) < 1e-3 or float(expected.grad.norm()) < 1e-6


def test_a_3d_loop_learns_and_infers_by_a_sliding_window():
    saacl = SAACL(num_classes=CLASSES, dim=D, queue_size=64)

    def contrast(features, label):
        picked = torch.randperm(label.numel(), generator=torch.Generator().manual_seed(0))[:512]
        rows = features.movedim(1, -1).flatten(0, -2)[picked]
        return saacl(rows, label.flatten()[picked], paired_keys=rows.detach(), temperature=0.1)

    losses, network = train(contrast, 20)
    assert losses[-1] < 0.6 * losses[0]
    case = volumes(1)[0]
    image = MetaTensor(torch.as_tensor(case["image"])[None, None])
    image = (image - image.min()) / (image.max() - image.min())
    with torch.no_grad():
        logits = sliding_window_inference(
            image, roi_size=(12, 12, 12), sw_batch_size=2, predictor=lambda x: network(x)[0]
        )
    assert logits.shape == (1, CLASSES, SIZE, SIZE, SIZE)
    prediction, label = logits.argmax(1)[0], torch.as_tensor(case["label"])
    for number in range(1, CLASSES):
        mine, true = prediction == number, label == number
        assert 2 * (mine & true).sum() / (mine.sum() + true.sum()) > 0.3
