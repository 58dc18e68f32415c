"""The trainer's configuration: one typed dataclass, presets, and its command-line form.

Every field is a command-line option of the same name (``max_iterations`` is ``--max-iterations``), and the
configuration in use is written beside the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import TrainerError

CONFIGURATION_FILE = "configuration.json"


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Configuration:
    """ACTION++ fine-tuning of a 2D U-Net. The defaults are those of the paper for ACDC, 10 % labelled."""

    # Data
    data: str = _setting("phantom", "a folder with ACDC (h5 or NIfTI layout), or 'phantom'")
    labelled_patients: int = _setting(7, "patients of the training list whose labels are used")
    phantom_patients: int = _setting(24, "patients to generate when data is 'phantom'")
    allow_missing: bool = _setting(
        False, "go on without patients that the data's lists name but that are not on disk"
    )
    patch_size: int = _setting(
        256, "slices are resized to this many pixels a side, a multiple of 16"
    )
    interpolation: Literal["nearest", "linear"] = _setting(
        "nearest", "how images are resized and rotated"
    )
    labelled_batch: int = _setting(4, "labelled slices a step")
    unlabelled_batch: int = _setting(4, "unlabelled slices a step")
    num_workers: int = _setting(
        2, "processes that prepare batches; 0 prepares them in the training process"
    )

    # Networks
    widths: tuple[int, ...] = _setting(
        (16, 32, 64, 128, 256), "channels of the U-Net, fine to coarse"
    )
    norm: Literal["instance", "batch"] = _setting("instance", "normalisation layers of the U-Net")
    dropout: float = _setting(0.0, "dropout ratio of the U-Net")
    head: Literal["sampled", "dense"] = _setting(
        "sampled", "representation head: evaluated at the pixels used, or as a map of every pixel"
    )
    embedding_dim: int = _setting(128, "dimensions of the pixel embeddings")
    teacher_momentum: float = _setting(
        0.99, "momentum of the teacher, a moving average of the student"
    )

    # Pseudo-labels
    mix: Literal["cutmix", "classmix", "none"] = _setting(
        "cutmix", "how unlabelled slices are mixed"
    )
    strong_threshold: float = _setting(
        0.97, "confidence of a reliable pseudo-label, and of an easy pixel"
    )
    weak_threshold: float = _setting(
        0.7, "pseudo-labels below this confidence take no part in AnCo"
    )
    unsupervised_weight: float = _setting(1.0, "weight of the pseudo-label cross-entropy")

    # Contrastive losses
    saacl_weight: float = _setting(0.01, "weight of SAACL on labelled pixels; 0 leaves it out")
    anco_weight: float = _setting(
        0.01, "weight of anatomical contrast on all pixels; 0 leaves it out"
    )
    center_weight: float = _setting(0.2, "weight of the centre term in SAACL (lambda_a)")
    queries_per_class: int = _setting(256, "pixels per class in SAACL and AnCo")
    negatives_per_class: int = _setting(
        512, "negatives per class in AnCo, shared by the class's queries"
    )
    queue_size: int = _setting(12288, "teacher embeddings kept as SAACL's keys")
    relation_temperature: float = _setting(0.5, "temperature of AnCo's draw of negative classes")
    temperature_low: float = _setting(0.1, "lowest temperature of the schedule (ATS)")
    temperature_high: float = _setting(1.0, "highest temperature of the schedule (ATS)")
    temperature_schedule: Literal["cosine", "fixed", "step", "random", "oscillating"] = _setting(
        "cosine", "the shape of the temperature schedule"
    )
    temperature_period: float = _setting(1.0, "period of the schedule, in units of max_iterations")

    # Optimisation
    max_iterations: int = _setting(
        20_000, "training steps; decay and temperature follow this length"
    )
    learning_rate: float = _setting(0.01, "learning rate at the start")
    learning_rate_power: float = _setting(0.9, "exponent of the polynomial decay")
    momentum: float = _setting(0.9, "momentum of SGD")
    weight_decay: float = _setting(1e-4, "weight decay of SGD")
    seed: int = _setting(0, "seed of everything random")
    device: str = _setting("auto", "'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1', …")
    amp: Literal["off", "bf16", "fp16"] = _setting("off", "mixed precision of the networks")
    deterministic: bool = _setting(False, "only deterministic operations, also on CUDA (slower)")

    # Records
    log_every: int = _setting(20, "steps between two entries of the training record")
    validate_every: int = _setting(1000, "steps between two validations; 0 validates never")
    checkpoint_every: int = _setting(500, "steps between two checkpoints")
    final_list: Literal["val", "test"] = _setting(
        "val", "the patients on whom the finished run is evaluated"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        for name in (
            "labelled_patients",
            "labelled_batch",
            "unlabelled_batch",
            "embedding_dim",
            "max_iterations",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "queries_per_class",
            "negatives_per_class",
            "queue_size",
            "log_every",
            "checkpoint_every",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "num_workers",
            "validate_every",
            "saacl_weight",
            "anco_weight",
            "unsupervised_weight",
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in (
            "learning_rate",
            "temperature_low",
            "temperature_period",
            "relation_temperature",
        ):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        for name in ("teacher_momentum", "momentum", "dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("strong_threshold", "weak_threshold"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._require(
            "temperature_high",
            self.temperature_high >= self.temperature_low,
            "at least temperature_low",
        )
        self._require("widths", len(self.widths) == 5, "five channel counts, fine to coarse")
        self._require(
            "patch_size",
            self.patch_size >= 32 and self.patch_size % 16 == 0,
            "a multiple of 16, at least 32",
        )
        self._require(
            "phantom_patients", self.phantom_patients >= 4, "at least 4 (train 2, val 1, test 1)"
        )
        for field, kind in _field_types().items():
            if get_origin(kind) is Literal:
                self._require(
                    field,
                    getattr(self, field) in get_args(kind),
                    f"one of {', '.join(get_args(kind))}",
                )

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise TrainerError(
                f"{option_name(name)}: {getattr(self, name)} was given, {accepted} is accepted"
            )

    def save(self, path: Path) -> None:
        """Write the configuration as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Configuration:
        """Read what `save` wrote.

        Raises:
            TrainerError: when the file is missing, is not JSON, or names a field that does not exist.
        """
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise TrainerError(f"{path.parent} holds no run: {path.name} is missing") from None
        except json.JSONDecodeError as error:
            raise TrainerError(f"{path} is not JSON: {error}") from None
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise TrainerError(
                f"{path} names fields this version does not know: {', '.join(unknown)}"
            )
        return cls(**values)


PRESETS: dict[str, dict[str, Any]] = {
    "acdc-5": {"labelled_patients": 3},
    "acdc-10": {"labelled_patients": 7},
    "demo": {
        "data": "phantom",
        "labelled_patients": 4,
        "patch_size": 96,
        "num_workers": 0,
        "widths": (8, 16, 32, 64, 128),
        "queries_per_class": 128,
        "negatives_per_class": 256,
        "queue_size": 2048,
        "max_iterations": 400,
        "learning_rate": 0.05,
        "log_every": 5,
        "validate_every": 100,
        "checkpoint_every": 200,
        "final_list": "test",
    },
}


def preset(name: str, **overrides: Any) -> Configuration:
    """The configuration of a preset, with the given fields replaced."""
    if name not in PRESETS:
        raise TrainerError(
            f"--preset: {name!r} was given, one of {', '.join(sorted(PRESETS))} is accepted"
        )
    return Configuration(**{**PRESETS[name], **overrides})


def option_name(field: str) -> str:
    """The command-line option of a field."""
    return "--" + field.replace("_", "-")


def _field_types() -> dict[str, Any]:
    return get_type_hints(Configuration)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for each field. An option that is not given leaves no attribute in the namespace."""
    group = parser.add_argument_group("configuration (defaults: those of the preset)")
    types_by_field = _field_types()
    for field in dataclasses.fields(Configuration):
        kind = types_by_field[field.name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            options.update(type=int, nargs="+", metavar="N")
        else:
            options.update(type=kind, metavar=kind.__name__.upper())
        group.add_argument(option_name(field.name), **options)


def given_fields(namespace: argparse.Namespace) -> dict[str, Any]:
    """The configuration fields that the command line gave."""
    names = {field.name for field in dataclasses.fields(Configuration)}
    return {name: value for name, value in vars(namespace).items() if name in names}
