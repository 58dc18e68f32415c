"""What is segmented: the classes, their colours, whether images are 2D or 3D, and the unit of distances."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import TrainerError

MAX_CLASSES = 256  # labels are kept as uint8
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}([0-9a-fA-F]{2})?")
_PALETTE = (
    "#3b8bea", "#f2b134", "#e4405f", "#46b17b", "#9b6bd3", "#e8743b",
    "#2fb7c4", "#c98b5a", "#d96fb0", "#7f8c3a", "#5a6b8c", "#b0413e",
)  # fmt: skip


def palette(count: int) -> tuple[str, ...]:
    """Colours of `count` classes: background transparent, then twelve hues that repeat."""
    return ("#00000000", *(_PALETTE[i % len(_PALETTE)] for i in range(count - 1)))


@dataclass(frozen=True)
class Task:
    """A segmentation task.

    Attributes:
        name: shown in records and figures.
        classes: names in the order of their label values, background first.
        colours: of each class, ``#rrggbb`` or ``#rrggbbaa``.
        spatial_dims: 2, networks see slices (the first axis of a volume); 3, networks see volumes.
        unit: of distances: ``"mm"`` where the voxel spacing is known and meant, else ``"voxel"``.
        channels: of an image.
        note: what must be said wherever numbers of this task are shown.

    Raises:
        TrainerError: when the fields contradict each other.
    """

    name: str
    classes: tuple[str, ...]
    colours: tuple[str, ...]
    spatial_dims: Literal[2, 3]
    unit: Literal["voxel", "mm"]
    channels: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "colours", tuple(self.colours))
        self._require("name", bool(self.name.strip()), "a name")
        self._require(
            "classes",
            2 <= len(self.classes) <= MAX_CLASSES and all(str(c).strip() for c in self.classes),
            f"2 to {MAX_CLASSES} names, background first",
        )
        twice = sorted({c for c in self.classes if self.classes.count(c) > 1})
        self._require(
            "classes", not twice, f"names that differ ({', '.join(twice)} is there twice)"
        )
        self._require(
            "colours",
            len(self.colours) == len(self.classes)
            and all(_COLOUR.fullmatch(colour) for colour in self.colours),
            f"{len(self.classes)} colours #rrggbb, one a class",
        )
        self._require("spatial_dims", self.spatial_dims in (2, 3), "2 or 3")
        self._require("unit", self.unit in ("voxel", "mm"), "'voxel' or 'mm'")
        self._require("channels", self.channels >= 1, "at least 1")

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise TrainerError(
                f"task: {name} {getattr(self, name)!r} was given, {accepted} is accepted"
            )

    @property
    def num_classes(self) -> int:
        """Background included."""
        return len(self.classes)

    @property
    def foreground(self) -> tuple[str, ...]:
        """The names of the classes without background."""
        return self.classes[1:]


ACDC = Task(
    name="ACDC",
    classes=("background", "RV", "Myo", "LV"),
    colours=("#00000000", "#3b8bea", "#f2b134", "#e4405f"),
    spatial_dims=2,
    unit="voxel",
)

LA = Task(
    name="LA",
    classes=("background", "atrium"),
    colours=("#00000000", "#e4405f"),
    spatial_dims=3,
    unit="voxel",
    note="the published LA scans were cropped around the ground truth",
)

PHANTOM = Task(
    name="phantom",
    classes=ACDC.classes,
    colours=ACDC.colours,
    spatial_dims=2,
    unit="voxel",
)

PHANTOM_3D = replace(PHANTOM, spatial_dims=3)
PHANTOM_ATRIUM = replace(LA, name="phantom atrium", note="")
