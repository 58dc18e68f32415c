"""Lightning with our loss in a training step: float32 and bf16-mixed, eager and compiled."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision_operators  # noqa: F401
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from action_kernels import class_centers, saacl_loss, supcon_loss

lightning = pytest.importorskip(
    "lightning", reason='Lightning comes with pip install "action_kernels[clients]"'
)

N, D, CLASSES, STEPS = 64, 16, 4, 6
CENTERS = class_centers(CLASSES, D, steps=50)
LOSSES = {
    "supcon_loss": lambda features, y: supcon_loss(features, y, num_classes=CLASSES),
    "saacl_loss": lambda features, y: saacl_loss(features, y, CENTERS),
}


class Contrast(lightning.LightningModule):
    """As its user writes it: the loss is called in `training_step`, under whatever precision there is."""

    def __init__(self, loss) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, D))
        self.loss = loss
        self.losses: list[float] = []

    def training_step(self, batch):
        x, y = batch
        features = self.encoder(x)
        return self.loss(features, y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["loss"].dtype == torch.float32
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(loss, precision: str, *, compiled: bool = False) -> tuple[list[float], Contrast]:
    torch.manual_seed(0)
    labels = torch.arange(N * STEPS) % CLASSES
    images = torch.randn(N * STEPS, 12)
    images[:, :CLASSES] += 2 * nn.functional.one_hot(labels, CLASSES)
    loader = DataLoader(TensorDataset(images, labels), batch_size=N)
    module = Contrast(loss)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers
        trainer.fit(torch.compile(module) if compiled else module, loader)
    return module.losses, module


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_precision_trains_like_float32(name):
    losses, _ = fit(LOSSES[name], "32-true")
    mixed, module = fit(LOSSES[name], "bf16-mixed")
    assert len(mixed) == len(losses) == 2 * STEPS
    assert losses[-1] < losses[0]
    assert mixed == pytest.approx(losses, rel=2**-6)  # features rounded to bfloat16, by 2⁻⁹ each
    assert mixed != losses
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_module_trains_like_an_eager_one(precision):
    for name, loss in LOSSES.items():
        losses, _ = fit(loss, precision)
        torch._dynamo.reset()
        counters.clear()
        compiled, _ = fit(loss, precision, compiled=True)
        assert counters["stats"]["unique_graphs"] > 0
        tolerance = 1e-5 if precision == "32-true" else 2**-6
        assert compiled == pytest.approx(losses, rel=tolerance), name
