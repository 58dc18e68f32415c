"""Training batches: labelled and unlabelled images, reproducible from the seed and the iteration alone.

What a step sees is a function of (seed, stage, iteration): the images follow epochs permuted by the seed, and every
image is changed by a generator of its own. Neither the number of worker processes nor an interruption changes a batch.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..configuration import DataConfiguration
from ..errors import TrainerError
from .cache import read_ahead
from .resampling import Spacing, to_spacing
from .transforms import (
    crop,
    resize,
    rotate_and_flip,
    standardise,
    turn_and_flip,
    turning_plane,
)
from .volume import Case

_LABELLED_STREAM, _UNLABELLED_STREAM, _AUGMENTATION_STREAM = range(3)


@dataclass(frozen=True)
class Batch:
    """What a step sees: labelled images (L, C, *size), their labels (L, *size) int64, unlabelled images (U, C, *size)."""

    images: Tensor
    labels: Tensor
    unlabelled: Tensor

    def __len__(self) -> int:
        return len(self.images) + len(self.unlabelled)

    def to(self, device: torch.device) -> Batch:
        parts = (getattr(self, field.name) for field in fields(self))
        return Batch(*(part.to(device, non_blocking=True) for part in parts))

    def pin_memory(self) -> Batch:
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


Batches: TypeAlias = "Iterable[Batch]"
Item: TypeAlias = "tuple[Tensor, Tensor | None]"


@dataclass(frozen=True)
class Request:
    """One image of a batch: its index, and the number of the draw that seeds its augmentation."""

    index: int
    draw: int


class TrainingImages(Dataset[Item]):
    """The images of the training cases, labelled ones first; the labels of the others are not even kept.

    In two dimensions the slices of the volumes, in three the volumes, standardised, in memory. An item is an image
    (C, *patch) float32 and its label (*patch) int64, None where unlabelled.
    """

    def __init__(
        self,
        labelled: Sequence[Case],
        unlabelled: Sequence[Case],
        config: DataConfiguration,
        patch: Sequence[int],
        seed: int,
        spacing: Spacing | None = None,
    ) -> None:
        """`spacing`: millimetres to which the volumes are resampled; None: they are not."""
        self.config, self.patch, self.seed = config, tuple(patch), seed
        self.turning = turning_plane(self.patch, spacing) if len(self.patch) == 3 else ((0, 1), 1)
        self.images: list[np.ndarray] = []
        self.labels: list[np.ndarray | None] = []
        for case, volume in read_ahead(labelled):
            volume = to_spacing(volume, spacing)
            if volume.label is None:
                raise TrainerError(
                    f"--data: {case.name} is to be a labelled case, but has no label"
                )
            self.images.extend(self._parts(standardise(volume.image)))
            self.labels.extend(self._parts(volume.label[None], without_channel=True))
        self.labelled_count = len(self.images)
        for _, volume in read_ahead(unlabelled):
            volume = to_spacing(replace(volume, label=None), spacing)
            self.images.extend(self._parts(standardise(volume.image)))
        self.labels.extend([None] * (len(self.images) - self.labelled_count))

    def _parts(self, array: np.ndarray, without_channel: bool = False) -> list[np.ndarray]:
        """(C, *axes) as the images that the networks see: itself, or its slices along the first axis."""
        whole = array.ndim - 1 == len(self.patch)
        parts = [array] if whole else list(np.ascontiguousarray(np.moveaxis(array, 1, 0)))
        return [part[0] for part in parts] if without_channel else parts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, request: Request) -> Item:
        image, label = self.images[request.index], self.labels[request.index]
        rng = np.random.default_rng([self.seed, _AUGMENTATION_STREAM, request.draw])
        target = np.zeros(image.shape[1:], np.uint8) if label is None else label
        if self.config.fit == "crop":
            image, target = crop(image, target, self.patch, rng, self.config.foreground_share)
        image, target = self._turned(image, target, rng)
        image = resize(image, self.patch, self.config.interpolation)
        if label is None:
            return torch.from_numpy(image), None
        return torch.from_numpy(image), torch.from_numpy(
            resize(target, self.patch).astype(np.int64)
        )

    def _turned(
        self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slices rotated by any angle, volumes by right angles in one plane; a crop keeps its shape."""
        if target.ndim == 3:
            return turn_and_flip(image, target, rng, *self.turning)
        step = 2 if self.config.fit == "crop" and self.patch[0] != self.patch[1] else 1
        return rotate_and_flip(image, target, rng, self.config.interpolation, step)


def _collate(items: list[Item]) -> Batch:
    known = [(image, label) for image, label in items if label is not None]
    others = [image for image, label in items if label is None]
    images, labels = zip(*known, strict=True)
    unlabelled = torch.stack(others) if others else images[0].new_empty(0, *images[0].shape)
    return Batch(torch.stack(images), torch.stack(labels), unlabelled)


class IterationSampler(Sampler[list[Request]]):
    """The requests of the batches `start` … `stop` − 1: labelled images first, then unlabelled ones."""

    def __init__(
        self,
        counts: tuple[int, int],
        batch: tuple[int, int],
        seed: tuple[int, ...],
        start: int,
        stop: int,
        own: Sequence[int] | None = None,
    ) -> None:
        """`counts` of images and `batch` sizes are (labelled, unlabelled); `own`: of every batch these alone."""
        self.labelled = range(counts[0])
        self.unlabelled = range(counts[0], sum(counts))
        self.batch, self.seed, self.start, self.stop = batch, seed, start, stop
        self.own = range(sum(batch)) if own is None else own

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Request]]:
        size = sum(self.batch)
        labelled, unlabelled = (
            self._stream(indices, stream, self.start * count)
            for indices, stream, count in (
                (self.labelled, _LABELLED_STREAM, self.batch[0]),
                (self.unlabelled, _UNLABELLED_STREAM, self.batch[1]),
            )
        )
        for iteration in range(self.start, self.stop):
            indices = [next(labelled) for _ in range(self.batch[0])]
            indices += [next(unlabelled) for _ in range(self.batch[1])]
            yield [Request(indices[slot], iteration * size + slot) for slot in self.own]

    def _stream(self, indices: range, stream: int, position: int) -> Iterator[int]:
        """Endless epochs over `indices`, each a new permutation, from `position` on."""
        epoch, offset = divmod(position, len(indices))
        while True:
            generator = np.random.default_rng([*self.seed, stream, epoch])
            yield from (indices[i] for i in generator.permutation(len(indices))[offset:])
            epoch, offset = epoch + 1, 0


def training_batches(
    images: TrainingImages,
    unlabelled_batch: int,
    stream: int,
    start: int,
    stop: int,
    own: Sequence[int] | None = None,
) -> Batches:
    """The batches of the iterations `start` … `stop` − 1; stages with another `stream` see another order.

    `own`: numbers of the images of every batch that are wanted, labelled ones first; None: all.

    Raises:
        TrainerError: when there are no unlabelled images, but a batch is to hold some.
    """
    config, count = images.config, images.labelled_count
    if unlabelled_batch and len(images) == count:
        raise TrainerError(
            "--labelled-patients: all training patients are labelled, and this stage needs unlabelled ones too; "
            "give fewer, or --stage supervised"
        )
    sampler = IterationSampler(
        (count, len(images) - count),
        (config.labelled_batch, unlabelled_batch),
        (images.seed, stream),
        start,
        stop,
        own,
    )
    # A generator of its own: by default a loader draws a seed from torch's global generator, and a resumed run,
    # which starts a new loader, would go on with other random numbers than an uninterrupted one.
    return DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A terminal's Ctrl-C and a cluster's SIGTERM reach the whole group: the training process alone answers.

    Workers end when it has no more use for them, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
