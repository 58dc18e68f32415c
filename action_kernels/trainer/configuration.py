"""The trainer's configuration: typed sections, and their command-line and JSON forms.

Every field is a command-line option of the same name (``max_iterations`` is ``--max-iterations``; those of the
pre-training begin with ``--pretrain-``). A field carries its bounds, so that one check serves all of them. The
configuration in use is written beside the results, with the number of its format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import TrainerError
from .files import replace_file

CONFIGURATION_FILE = "configuration.json"
FORMAT = 2  # of the configuration file and of checkpoints; 1 was one flat dataclass

StageName: TypeAlias = Literal["pretrain", "finetune", "supervised", "mean_teacher"]

PHANTOMS = ("phantom", "phantom-atrium")  # data that is drawn and not read
Number = TypeVar("Number", int, float)

_MILLION = 1_000_000


def _setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with its help and bounds: least ≤ value ≤ most, above < value < below (of each number of a tuple)."""
    bounds = {"least": least, "most": most, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True)
class DataConfiguration:
    """Where the images are and how they become batches."""

    data: str = _setting(
        "phantom",
        "a folder of images; or, to need none, 'phantom' (hearts) or 'phantom-atrium' (volumes)",
    )
    allow_missing: bool = _setting(
        False, "train without the patients of the lists that are not on disk"
    )
    spatial_dims: int | None = _setting(
        None, "2 or 3, where the data's layout does not say it", least=2, most=3
    )
    classes: tuple[str, ...] | None = _setting(
        None, "names of the classes, background first, where the data's layout does not say them"
    )
    labelled_patients: int = _setting(
        7, "patients of the training list whose labels are used", least=1, most=_MILLION
    )
    phantom_patients: int = _setting(
        24, "patients to generate when data is one of the phantoms", least=4, most=10_000
    )
    patch_size: tuple[int, ...] | None = _setting(
        (256,),
        "pixels a side of what the networks see; one number serves all axes (preset volumes: by a rule from the data)",
        least=8,
        most=4096,
    )
    spacing: tuple[float, ...] | None = _setting(
        None,
        "millimetres to which images are resampled, one number or one an axis of what the networks see "
        "(default: the median of the data's images; ACDC and LA stay as they are)",
        above=0,
        most=1000,
    )
    fit: Literal["resize", "crop"] = _setting(
        "resize",
        "how an image becomes a patch: resized to it, or a random crop and a sliding window",
    )
    stride: tuple[int, ...] | None = _setting(
        None,
        "pixels between sliding windows where fit is crop (default: half the patch)",
        least=1,
        most=4096,
    )
    blend: Literal["gaussian", "constant"] = _setting(
        "gaussian",
        "how sliding windows are summed: weighted towards their middle, or alike (as published for LA)",
    )
    largest_component: bool = _setting(
        False, "keep the largest connected component of every predicted class and drop the others"
    )
    foreground_share: float = _setting(
        0.0,
        "part of the crops of labelled images that are drawn around a voxel of a random class but the background",
        least=0,
        most=1,
    )
    interpolation: Literal["nearest", "linear"] = _setting(
        "nearest", "how images are resized and rotated"
    )
    labelled_batch: int = _setting(4, "labelled images a step", least=1, most=4096)
    unlabelled_batch: int = _setting(4, "unlabelled images a step", least=1, most=4096)
    num_workers: int = _setting(
        2,
        "processes that prepare batches; 0 prepares them in the training process",
        least=0,
        most=256,
    )


@dataclass(frozen=True)
class NetworkConfiguration:
    """The segmentation network and the representation head."""

    network: str = _setting("unet", "unet, vnet, basic-unet, or your own as package.module:factory")
    widths: tuple[int, ...] = _setting(
        (16, 32, 64, 128, 256),
        "channels of the network's levels, fine to coarse",
        least=1,
        most=8192,
    )
    norm: Literal["batch", "instance"] = _setting("batch", "normalisation layers of the network")
    sync_batch_norm: bool = _setting(
        True, "batch normalisation by the images of all processes, where torchrun started several"
    )
    dropout: float | None = _setting(
        None, "dropout ratio of the network (default: the network's own ratios)", least=0, below=1
    )
    head: Literal["sampled", "dense"] = _setting(
        "sampled", "representation head: evaluated at the pixels used, or as a map of every pixel"
    )
    embedding_dim: int = _setting(128, "dimensions of the pixel embeddings", least=1, most=8192)


@dataclass(frozen=True)
class PretrainConfiguration:
    """Relational distillation, global and local, before the fine-tuning (METHOD: eq. 1 of the paper)."""

    iterations: int = _setting(10_000, "steps of the pre-training", least=1, most=1000 * _MILLION)
    learning_rate: float | None = _setting(
        None, "learning rate of the pre-training at the start (default: --learning-rate)", above=0
    )
    nesterov: bool = _setting(False, "Nesterov momentum in the pre-training")
    global_dim: int = _setting(512, "numbers in the vector of a whole image", least=1, most=8192)
    window: tuple[int, ...] | None = _setting(
        None,
        "pixels a side of the local windows (default: a quarter of the patch)",
        least=2,
        most=4096,
    )
    pooled: int = _setting(8, "pixels a side to which a window is pooled", least=1, most=32)
    bank_size: int = _setting(
        36, "teacher vectors remembered, of whole images and of every window position",
        least=1, most=16_384,
    )  # fmt: skip
    temperature_low: float = _setting(0.1, "lowest temperature of the student (ATS)", above=0)
    teacher_temperature_low: float = _setting(
        0.01, "lowest temperature of the teacher (ATS)", above=0
    )
    temperature_high: float = _setting(1.0, "highest temperature of both (ATS)", above=0)
    temperature_schedule: Literal["cosine", "fixed", "step", "random", "oscillating"] = _setting(
        "cosine", "the shape of the temperature schedule"
    )
    temperature_period: float = _setting(
        1.0, "period of the schedule, in units of the stage's iterations", above=0
    )


@dataclass(frozen=True)
class FinetuneConfiguration:
    """The last stage, whichever it is (its length, its learning rate), and the losses of the fine-tuning."""

    max_iterations: int = _setting(
        20_000, "steps of finetune, supervised or mean_teacher; decay and temperature follow this length",
        least=1, most=1000 * _MILLION,
    )  # fmt: skip
    nesterov: bool = _setting(True, "Nesterov momentum")
    mix: Literal["cutmix", "classmix", "none"] = _setting(
        "cutmix", "how unlabelled images are mixed"
    )
    strong_augmentation: bool = _setting(True, "jitter and blur the mixed images of the student")
    pseudo_label_weighting: Literal["image", "pixel"] = _setting(
        "image",
        "weigh an image by its fraction of confident pixels, or count confident pixels alone",
    )
    strong_threshold: float = _setting(
        0.97, "confidence of a reliable pseudo-label, and of an easy pixel", least=0, most=1
    )
    weak_threshold: float = _setting(
        0.7, "pseudo-labels below this confidence take no part in AnCo", least=0, most=1
    )
    unsupervised_weight: float = _setting(1.0, "weight of the pseudo-label cross-entropy", least=0)
    saacl_weight: float = _setting(
        0.01, "weight of SAACL on labelled pixels; 0 leaves it out", least=0
    )
    anco_weight: float = _setting(
        0.01, "weight of anatomical contrast on all pixels; 0 leaves it out", least=0
    )
    center_weight: float = _setting(0.2, "weight of the centre term in SAACL (lambda_a)", least=0)
    positives: Literal["mean", "sum", "balanced"] = _setting(
        "mean",
        "SAACL: divide positive and centre terms by their number, do not, or divide the positive ones alone",
    )
    queries_per_class: int = _setting(
        256, "pixels per class in SAACL and AnCo", least=1, most=_MILLION
    )
    negatives_per_class: int = _setting(
        512, "negatives per class in AnCo, shared by the class's queries", least=1, most=_MILLION
    )
    queue_size: int = _setting(
        12288, "teacher embeddings kept as SAACL's keys", least=1, most=16 * _MILLION
    )
    temperature_low: float = _setting(0.1, "lowest temperature of the schedule (ATS)", above=0)
    temperature_high: float = _setting(1.0, "highest temperature of the schedule (ATS)", above=0)
    temperature_schedule: Literal["cosine", "fixed", "step", "random", "oscillating"] = _setting(
        "cosine", "the shape of the temperature schedule"
    )
    temperature_period: float = _setting(
        1.0, "period of the schedule, in units of max_iterations", above=0
    )
    consistency_weight: float = _setting(
        0.1, "mean_teacher: weight of the consistency, after its ramp", least=0
    )
    consistency_ramp: float = _setting(
        0.2, "mean_teacher: part of the stage over which the weight rises", least=0, most=1
    )


@dataclass(frozen=True)
class OptimiserConfiguration:
    """SGD with polynomial decay, and the teacher that follows the student."""

    learning_rate: float = _setting(0.01, "learning rate at the start", above=0)
    learning_rate_power: float = _setting(0.9, "exponent of the polynomial decay", least=0)
    momentum: float = _setting(0.9, "momentum of SGD", least=0, below=1)
    weight_decay: float = _setting(1e-4, "weight decay of SGD", least=0)
    teacher_momentum: float = _setting(
        0.99, "momentum of the teacher, a moving average of the student", least=0, below=1
    )


@dataclass(frozen=True)
class RunConfiguration:
    """Which stages run, where, and what is recorded."""

    stage: Literal["all", "pretrain", "finetune", "supervised", "mean_teacher"] = _setting(
        "all", "all: pretrain, then finetune; or one stage alone"
    )
    init_from: str | None = _setting(
        None, "a run, checkpoint or safetensors file whose student the first stage starts from"
    )
    seed: int = _setting(0, "seed of everything random", least=0, most=2**63 - 1)
    device: str = _setting("auto", "'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1', …")
    amp: Literal["auto", "off", "bf16", "fp16"] = _setting(
        "auto", "mixed precision of the networks; auto: bf16 where the hardware multiplies it"
    )
    deterministic: bool = _setting(False, "only deterministic operations, also on CUDA (slower)")
    log_every: int = _setting(
        20, "steps between two entries of the training record", least=1, most=1000 * _MILLION
    )
    validate_every: int = _setting(
        1000, "steps between two validations; 0 validates never", least=0, most=1000 * _MILLION
    )
    checkpoint_every: int = _setting(
        500, "steps between two checkpoints", least=1, most=1000 * _MILLION
    )
    snapshot_every: int = _setting(
        0,
        "steps between two snapshots of the student's weights, all of which are kept; 0 keeps none",
        least=0, most=1000 * _MILLION,
    )  # fmt: skip
    pictures: bool = _setting(
        True, "draw the curves of a training, and panels of its validations for TensorBoard"
    )
    final_list: Literal["val", "test"] = _setting(
        "val", "the patients on whom the finished run is evaluated"
    )


@dataclass(frozen=True)
class Configuration:
    """Everything that decides a run. The defaults are those of the paper for ACDC, 10 % labelled."""

    data: DataConfiguration = DataConfiguration()
    network: NetworkConfiguration = NetworkConfiguration()
    pretrain: PretrainConfiguration = PretrainConfiguration()
    finetune: FinetuneConfiguration = FinetuneConfiguration()
    optimiser: OptimiserConfiguration = OptimiserConfiguration()
    run: RunConfiguration = RunConfiguration()

    def __post_init__(self) -> None:
        for option in options():
            self._check(option)
        for section in (self.pretrain, self.finetune):
            low, high = section.temperature_low, section.temperature_high
            name = (
                "--pretrain-temperature-high" if section is self.pretrain else "--temperature-high"
            )
            _require(name, high, high >= low, f"at least {name.replace('high', 'low')} ({low})")
        _require(
            "--pretrain-temperature-high",
            self.pretrain.temperature_high,
            self.pretrain.temperature_high >= self.pretrain.teacher_temperature_low,
            "at least --pretrain-teacher-temperature-low",
        )

    def _check(self, option: Option) -> None:
        value = converted(option, self.value(option))
        object.__setattr__(getattr(self, option.section), option.field, value)

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages that run, in their order."""
        return ("pretrain", "finetune") if self.run.stage == "all" else (self.run.stage,)

    def iterations(self, stage: StageName) -> int:
        """The length of a stage."""
        return self.pretrain.iterations if stage == "pretrain" else self.finetune.max_iterations

    def value(self, option: Option) -> Any:
        """The value of an option."""
        return getattr(getattr(self, option.section), option.field)

    def with_values(self, values: dict[str, Any]) -> Configuration:
        """A copy with the given options, by their `Option.key`, replaced."""
        sections: dict[str, dict[str, Any]] = {}
        for option in options():
            if option.key in values:
                sections.setdefault(option.section, {})[option.field] = values[option.key]
        return dataclasses.replace(
            self,
            **{
                name: dataclasses.replace(getattr(self, name), **fields)
                for name, fields in sections.items()
            },
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: sections of fields, and the format's number."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def save(self, path: Path) -> None:
        """Write the configuration as JSON, whole or not at all."""
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        replace_file(path, lambda temporary: temporary.write_text(text))

    @classmethod
    def load(cls, path: Path) -> Configuration:
        """Read what `save` wrote.

        Raises:
            TrainerError: when the file is missing, is not JSON, or is not of this version's form.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TrainerError(f"{path.parent} holds no run: {path.name} is missing") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TrainerError(f"{path} is not JSON: {error}") from None
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Configuration:
        """The configuration of a JSON form; `source` is named in errors."""
        if not isinstance(values, dict):
            raise TrainerError(
                f"{source} does not hold a configuration but {type(values).__name__}"
            )
        if values.get("format") != FORMAT:
            raise TrainerError(
                f"{source} is of format {values.get('format', 1)}, this version reads format {FORMAT}; "
                f"go on with the version that wrote it, or start a new run"
            )
        types_by_section = get_type_hints(cls)
        sections = {name: value for name, value in values.items() if name != "format"}
        _refuse_unknown(source, sections, types_by_section)
        for name, fields in sections.items():
            if not isinstance(fields, dict):
                raise TrainerError(
                    f"{source}: {name} holds {fields!r}, a group of fields is accepted"
                )
            _refuse_unknown(f"{source}: {name}", fields, get_type_hints(types_by_section[name]))
        try:
            return cls(**{name: types_by_section[name](**f) for name, f in sections.items()})
        except TrainerError as error:
            raise TrainerError(f"{source}: {error}") from None


def _refuse_unknown(source: str, found: dict[str, Any], known: dict[str, Any]) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise TrainerError(f"{source} names what this version does not know: {', '.join(unknown)}")


# Options: the fields of all sections in one list


@dataclass(frozen=True)
class Option:
    """One field of one section, with its type, help and bounds."""

    section: str
    field: str
    kind: Any
    default: Any
    help: str
    bounds: dict[str, float | None]

    @property
    def key(self) -> str:
        """Its name among all options."""
        return f"pretrain_{self.field}" if self.section == "pretrain" else self.field

    @property
    def name(self) -> str:
        """Its command-line form."""
        return "--" + self.key.replace("_", "-")


def options() -> Iterator[Option]:
    """All options, in the order of the sections."""
    for section, kind in get_type_hints(Configuration).items():
        kinds = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield Option(
                section,
                field.name,
                kinds[field.name],
                field.default,
                field.metadata["help"],
                field.metadata["bounds"],
            )


def converted(option: Option, value: Any) -> Any:
    """`value` in the option's type (a list becomes a tuple, one number a tuple of one).

    Raises:
        TrainerError: when it is of another type, not finite, or out of bounds.
    """
    kind, optional = _without_none(option.kind)
    if value is None and optional:
        return None
    if get_origin(kind) is Literal:
        _require(option.name, value, value in get_args(kind), f"one of {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        noun = {str: "names", int: "whole numbers", float: "numbers"}[get_args(kind)[0]]
        _require(option.name, value, 0 < len(value) <= 256, f"one or several {noun}")
        for entry in value:
            if get_args(kind)[0] is str:
                _require(option.name, entry, isinstance(entry, str) and entry != "", "names")
            else:
                _check_number(option, entry, get_args(kind)[0])
        return value
    if kind in (int, float):
        _check_number(option, value, kind)
        return kind(value)
    accepted = "true or false" if kind is bool else "text that is not empty"
    _require(option.name, value, isinstance(value, kind) and value != "", accepted)
    return value


def _check_number(option: Option, value: Any, kind: type) -> None:
    accepted = _accepted(option.bounds, kind)
    right_type = not isinstance(value, bool) and isinstance(
        value, int if kind is int else (int, float)
    )
    _require(option.name, value, right_type and math.isfinite(value), accepted)
    least, most, above, below = (option.bounds[n] for n in ("least", "most", "above", "below"))
    holds = (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    _require(option.name, value, holds, accepted)


def _accepted(bounds: dict[str, float | None], kind: type) -> str:
    """The bounds in words."""
    words = {"least": "at least", "most": "at most", "above": "greater than", "below": "below"}
    parts = [f"{words[name]} {bound:,g}" if abs(bound) < 1e6 else f"{words[name]} {bound:,}"
             for name, bound in bounds.items() if bound is not None]  # fmt: skip
    noun = "a whole number" if kind is int else "a finite number"
    return " ".join([noun, " and ".join(parts)]).strip()


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The type without ``| None``, and whether that was there."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    (inner,) = (part for part in get_args(kind) if part is not type(None))
    return inner, True


def _require(name: str, value: Any, holds: bool, accepted: str) -> None:
    if not holds:
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        shown = "''" if shown == "" else shown
        raise TrainerError(f"{name}: {shown} was given, {accepted} is accepted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option. One that is not given leaves no attribute in the namespace."""
    groups: dict[str, Any] = {}
    for option in options():
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(
                f"{option.section} (defaults: those of the preset)"
            )
        groups[option.section].add_argument(option.name, dest=option.key, **argument(option))


def argument(option: Option) -> dict[str, Any]:
    """What argparse must know of it; nothing is set where it is not given."""
    kind, _ = _without_none(option.kind)
    wanted: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.help}
    if kind is bool:
        return {**wanted, "action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {**wanted, "choices": get_args(kind)}
    if get_origin(kind) is tuple:
        entry = get_args(kind)[0]
        return {**wanted, "type": entry, "nargs": "+", "metavar": "NAME" if entry is str else "N"}
    return {**wanted, "type": kind, "metavar": kind.__name__.upper()}


def not_empty(text: str) -> str:
    """A text argument; an empty one, such as a shell's unset variable leaves, would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError(
            "nothing was given; leave the option out, or name something"
        )
    return text


def path(text: str) -> Path:
    """A file or folder."""
    return Path(not_empty(text))


def given_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The options that the command line gave, by key."""
    keys = {option.key for option in options()}
    return {name: value for name, value in vars(namespace).items() if name in keys}


def per_axis(option: str, values: tuple[Number, ...] | None, dims: int) -> tuple[Number, ...]:
    """`values`, one for each of `dims` axes; a single one serves all of them.

    Raises:
        TrainerError: naming `option`, when there are neither one nor `dims`.
    """
    if values is None:
        raise TrainerError(f"{option}: none was given, and the data says none")
    if len(values) == 1:
        return values * dims
    _require(option, values, len(values) == dims, f"one number, or one for each of {dims} axes")
    return values


def absolute_paths(config: Configuration) -> Configuration:
    """The same with `data` and `init_from` as absolute paths, so that they mean the same from anywhere."""
    paths = {"data": config.data.data, "init_from": config.run.init_from}
    return config.with_values(
        {
            key: os.path.abspath(os.path.expanduser(path))
            for key, path in paths.items()
            if path is not None and path not in PHANTOMS
        }
    )
