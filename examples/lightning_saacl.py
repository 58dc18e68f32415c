"""Lightning: SAACL as a submodule, so that its queue and centres move, are saved and loaded with the model.

python examples/lightning_saacl.py
"""

from __future__ import annotations

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from action_kernels import SAACL, gather_pixels, sample_pixels
from action_kernels.trainer.data.phantom import draw_patient

CLASSES, DIM = 4, 32


class Segmenter(lightning.LightningModule):
    def __init__(self, contrast_weight: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, DIM, 5, padding=2), nn.InstanceNorm2d(DIM), nn.ReLU(),
            nn.Conv2d(DIM, DIM, 5, padding=4, dilation=2), nn.InstanceNorm2d(DIM), nn.ReLU(),
            nn.Conv2d(DIM, DIM, 5, padding=8, dilation=4), nn.InstanceNorm2d(DIM), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Conv2d(DIM, CLASSES, 1)
        self.embed = nn.Conv2d(DIM, DIM, 1)  # +
        self.saacl = SAACL(num_classes=CLASSES, dim=DIM, queue_size=1024)  # +

    def training_step(self, batch, index):
        images, labels = batch
        features = self.trunk(images)
        logits = self.head(features)
        supervised = cross_entropy(logits, labels)
        pixels, _ = sample_pixels(logits, labels, 64, num_classes=CLASSES, threshold=0.97)  # +
        rows, classes = gather_pixels(self.embed(features), pixels)  # +
        contrast = self.saacl(rows, classes)  # +
        self.log_dict({"supervised": supervised, "contrast": contrast}, prog_bar=True)
        return supervised + self.hparams.contrast_weight * contrast  # +

    def validation_step(self, batch, index):
        """In evaluation mode: SAACL would not change its state either if it were called."""
        images, labels = batch
        right = self.head(self.trunk(images)).argmax(1) == labels
        self.log("accuracy", right[labels > 0].float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def slices(first: int, last: int) -> TensorDataset:
    """Generated hearts, slice by slice."""
    frames = [draw_patient(0, number, size=64)[0] for number in range(first, last)]
    images, labels = (torch.cat([torch.as_tensor(f[i]) for f in frames]) for i in (0, 1))
    return TensorDataset(images[:, None], labels.long())


def main(epochs: int = 10, precision: str = "bf16-mixed") -> lightning.Trainer:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=epochs, precision=precision, accelerator="auto", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    training = DataLoader(slices(0, 6), batch_size=4, shuffle=True)
    trainer.fit(Segmenter(), training, DataLoader(slices(6, 8), batch_size=16))
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
