"""Training batches: labelled and unlabelled slices, reproducible from the seed and the iteration alone.

What a step sees is a function of (seed, iteration): the slices follow epochs permuted by the seed, and every slice is
augmented by a generator of its own. Neither the number of worker processes nor an interruption changes a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .augmentation import resize, rotate_and_flip, standardise
from .configuration import Configuration
from .data import Case
from .errors import TrainerError

UNLABELLED = -1
Batches: TypeAlias = "DataLoader[tuple[torch.Tensor, torch.Tensor]]"
_LABELLED_STREAM, _UNLABELLED_STREAM, _AUGMENTATION_STREAM = range(3)


@dataclass(frozen=True)
class Request:
    """One slice of a batch: its index, and the number of the draw that seeds its augmentation."""

    index: int
    draw: int


class SliceDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The slices of the training cases, labelled ones first; the labels of the others are not kept.

    An item is an image (1, patch, patch) float32 and a label (patch, patch) int64, all −1 where unlabelled.
    """

    def __init__(
        self, labelled: Sequence[Case], unlabelled: Sequence[Case], config: Configuration
    ) -> None:
        self.images: list[np.ndarray] = []
        self.labels: list[np.ndarray | None] = []
        self.config = config
        for case in labelled:
            volume = case.read()
            assert volume.label is not None  # a split's labelled cases have one
            self.images.extend(standardise(volume.image[0]))
            self.labels.extend(volume.label)
        self.labelled_count = len(self.images)
        for case in unlabelled:
            self.images.extend(standardise(case.read().image[0]))
        self.labels.extend([None] * (len(self.images) - self.labelled_count))
        if 0 in (self.labelled_count, len(self.images) - self.labelled_count):
            raise TrainerError(
                "--data: labelled and unlabelled training slices are both needed, one kind is missing"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        config, image, label = self.config, self.images[request.index], self.labels[request.index]
        rng = np.random.default_rng([config.seed, _AUGMENTATION_STREAM, request.draw])
        known = np.zeros(image.shape, np.uint8) if label is None else label
        image, known = rotate_and_flip(image, known, rng, config.interpolation)
        size = (config.patch_size, config.patch_size)
        image, known = resize(image, size, config.interpolation), resize(known, size)
        target = torch.full(size, UNLABELLED) if label is None else torch.from_numpy(known).long()
        return torch.from_numpy(image)[None], target


class IterationSampler(Sampler[list[Request]]):
    """The requests of the batches `start` … `stop` − 1: labelled slices first, then unlabelled ones."""

    def __init__(self, labelled_count: int, total: int, config: Configuration, start: int) -> None:
        self.labelled = range(labelled_count)
        self.unlabelled = range(labelled_count, total)
        self.config, self.start = config, start

    def __len__(self) -> int:
        return self.config.max_iterations - self.start

    def __iter__(self) -> Iterator[list[Request]]:
        config = self.config
        batch = config.labelled_batch + config.unlabelled_batch
        labelled = self._stream(self.labelled, _LABELLED_STREAM, self.start * config.labelled_batch)
        unlabelled = self._stream(
            self.unlabelled, _UNLABELLED_STREAM, self.start * config.unlabelled_batch
        )
        for iteration in range(self.start, config.max_iterations):
            indices = [next(labelled) for _ in range(config.labelled_batch)]
            indices += [next(unlabelled) for _ in range(config.unlabelled_batch)]
            yield [Request(index, iteration * batch + slot) for slot, index in enumerate(indices)]

    def _stream(self, indices: range, stream: int, position: int) -> Iterator[int]:
        """Endless epochs over `indices`, each a new permutation, from `position` on."""
        epoch, offset = divmod(position, len(indices))
        while True:
            order = np.random.default_rng([self.config.seed, stream, epoch]).permutation(
                len(indices)
            )
            yield from (indices[i] for i in order[offset:])
            epoch, offset = epoch + 1, 0


def training_batches(dataset: SliceDataset, config: Configuration, start: int = 0) -> Batches:
    """Batches (images (B, 1, H, W), labels (B, H, W)) from iteration `start` to the last."""
    # A generator of its own: by default a loader draws a seed from torch's global generator, and a resumed run,
    # which starts a new loader, would go on with other random numbers than an uninterrupted one.
    return DataLoader(
        dataset,
        batch_sampler=IterationSampler(dataset.labelled_count, len(dataset), config, start),
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
