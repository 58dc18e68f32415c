"""What each table and figure is made of: rows, each a method, to be run in one or more settings.

The baselines take as many steps as pre-training and fine-tuning together, so that no row has had more training than
another. The fine-tuning rows of an ablation begin from one pre-training, that of the whole method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..configuration import StageName
from ..errors import TrainerError
from . import paper
from .paper import Reported

Positives = Literal["mean", "balanced"]
POSITIVES: tuple[Positives, ...] = ("mean", "balanced")


@dataclass(frozen=True)
class Setting:
    """A data set and a share of labels: a preset of the trainer."""

    preset: str
    data: Literal["ACDC", "LA"]
    share: str

    @property
    def title(self) -> str:
        return f"{self.data}, {self.share} labelled"


SETTINGS = {
    setting.preset: setting
    for setting in (
        Setting("acdc-5", "ACDC", "5 %"),
        Setting("acdc-10", "ACDC", "10 %"),
        Setting("la-5", "LA", "5 %"),
        Setting("la-10", "LA", "10 %"),
    )
}


@dataclass(frozen=True)
class Method:
    """A way of training: its last stage, and the options in which it differs from the preset.

    Attributes:
        pretraining: the options of the pre-training that it begins from; None: random weights.
        all_labelled: every training patient's labels are used.
    """

    stage: StageName
    options: Mapping[str, Any] = field(default_factory=dict)
    pretraining: Mapping[str, Any] | None = None
    all_labelled: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        key: its name among the rows of its table.
        reported: the paper's number for it, by setting, where there is one.
        part: of the table (the parts of table 6); rows of a part share an axis, and `value` lies on it.
    """

    key: str
    label: str
    method: Method
    reported: Mapping[str, Reported] = field(default_factory=dict)
    part: str = ""
    value: float | str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a title, and the settings that the paper has them for."""

    name: str
    title: str
    rows: tuple[Row, ...]
    settings: tuple[str, ...]
    ablation: bool = False


NO_ATS = {"temperature_schedule": "fixed"}
NO_SAACL = {"saacl_weight": 0.0}
PRETRAINED: dict[str, Any] = {}  # as the preset has it, with ATS
PRETRAINED_WITHOUT_ATS = {"pretrain_temperature_schedule": "fixed"}

WHOLE = Method("finetune", {}, PRETRAINED)
METHODS = {
    "labelled": ("labelled only", Method("supervised")),
    "full": ("full supervision", Method("supervised", all_labelled=True)),
    "mean-teacher": ("mean teacher", Method("mean_teacher")),
    "action": (
        "ACTION (no SAACL, no ATS)",
        Method("finetune", {**NO_ATS, **NO_SAACL}, PRETRAINED_WITHOUT_ATS),
    ),
    "action++": ("ACTION++", WHOLE),
}


def _methods() -> Iterator[Row]:
    for key, (label, method) in METHODS.items():
        reported = {
            setting: numbers[key] for setting, numbers in paper.METHODS.items() if key in numbers
        }
        yield Row(key, label, method, reported)


def _ablated(key: str, label: str, method: Method) -> Row:
    return Row(key, label, method, {paper.ABLATION_SETTING: paper.TABLE_5[key]})


def _components() -> tuple[Row, ...]:
    def finetuned(**options: Any) -> Method:
        return Method("finetune", options, PRETRAINED)

    return (
        _ablated(
            "pretrain-without-ats",
            "pre-training without ATS",
            Method("pretrain", PRETRAINED_WITHOUT_ATS),
        ),
        _ablated("pretrain-with-ats", "pre-training with ATS", Method("pretrain", PRETRAINED)),
        _ablated("none", "fine-tuning: neither", finetuned(**NO_ATS, **NO_SAACL)),
        _ablated("ats", "fine-tuning: ATS", finetuned(**NO_SAACL)),
        _ablated("saacl", "fine-tuning: SAACL", finetuned(**NO_ATS)),
        _ablated("both", "fine-tuning: ATS and SAACL", finetuned()),
    )


def _parameters() -> Iterator[Row]:
    parts: tuple[tuple[str, str, str, dict[Any, float]], ...] = (
        ("period", "T / total", "temperature_period", paper.PERIODS),
        ("schedule", "schedule", "temperature_schedule", paper.SCHEDULES),
        ("center-weight", "λ_a", "center_weight", paper.CENTER_WEIGHTS),
    )
    for positives in POSITIVES:
        for key, symbol, option, numbers in parts:
            for value, dsc in numbers.items():
                shown = value if isinstance(value, str) else f"{value:g}"
                yield Row(
                    f"{positives}-{key}-{shown}",
                    f"{symbol} = {shown}",
                    Method("finetune", {option: value, "positives": positives}, PRETRAINED),
                    {paper.ABLATION_SETTING: Reported(dsc)},
                    f"{symbol}, positives: {positives}",
                    value,
                )


_METHODS = tuple(_methods())
TABLES = {
    table.name: table
    for table in (
        Table("table1", "Table 1: methods on ACDC", _METHODS, ("acdc-5", "acdc-10")),
        Table("table2", "Table 2: methods on LA", _METHODS, ("la-5", "la-10")),
        Table(
            "table5",
            "Table 5: what ATS and SAACL contribute",
            _components(),
            (paper.ABLATION_SETTING,),
            ablation=True,
        ),
        Table(
            "table6",
            "Table 6: temperature schedule and λ_a",
            tuple(_parameters()),
            (paper.ABLATION_SETTING,),
            ablation=True,
        ),
        Table("figure3", "Figure 3: segmentations, ACDC", _METHODS, ("acdc-5", "acdc-10")),
        Table("figure4", "Figure 4: segmentations, LA", _METHODS, ("la-5", "la-10")),
        Table(
            "theory",
            "Theory: alignment, divergence and nearest-centre error over training",
            (Row("action++", "ACTION++", WHOLE),),
            (paper.ABLATION_SETTING,),
            ablation=True,
        ),
    )
}


def settings_of(
    table: Table, chosen: tuple[str, ...], available: tuple[str, ...]
) -> tuple[str, ...]:
    """The settings to run a table in: those chosen that fit, else its own.

    An ablation may be run in any setting; by default in the paper's, or, where its data is not given, in the one of the
    same share on the other data set.

    Args:
        chosen: by the user; none: the default.
        available: those whose data is given.
    """
    if chosen:
        wanted = tuple(s for s in chosen if table.ablation or s in table.settings)
        return tuple(s for s in wanted if s in available)
    own = tuple(s for s in table.settings if s in available)
    if own or not table.ablation:
        return own
    return tuple(s for s in ("acdc-10",) if s in available)


def chosen_tables(names: tuple[str, ...]) -> tuple[Table, ...]:
    """The tables named, ``"all"`` being each of them, in their order and once."""
    unknown = [name for name in names if name not in (*TABLES, "all")]
    if unknown or not names:
        raise TrainerError(
            f"what to reproduce: {' '.join(unknown) or 'nothing'} was given, "
            f"one or more of {', '.join(TABLES)}, all is accepted"
        )
    wanted = set(TABLES) if "all" in names else set(names)
    return tuple(table for name, table in TABLES.items() if name in wanted)
