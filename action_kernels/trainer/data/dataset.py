"""A data set: its task, its cases and who does what. The way in is `open_dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..configuration import PHANTOMS
from ..errors import TrainerError
from .acdc import RULES as ACDC_RULES
from .acdc import AcdcH5, AcdcNifti
from .atrium import atrium_cases
from .cache import cached
from .copies import copied_images, judge_copies
from .la import RULES as LA_RULES
from .la import LaH5, LaNifti, LaNrrd
from .layout import Findings, Layout, Options
from .listing import FOREIGN_SUFFIXES, Listing, list_folder
from .nnunet import NnUnet
from .pairs import Pairs
from .phantom import phantom_cases
from .problems import DataError, some
from .reading import Rules
from .splits import Split, split_patients, unlisted
from .task import PHANTOM, PHANTOM_3D, PHANTOM_ATRIUM, Task
from .volume import Case

# The first tier with a layout that fits decides; two that fit in one tier are an ambiguity to be told.
TIERS: tuple[tuple[Layout, ...], ...] = (
    (NnUnet(),),
    (AcdcH5(), AcdcNifti(), LaH5(), LaNrrd(), LaNifti()),
    (Pairs(),),
)


@dataclass(frozen=True)
class Plan:
    """What a network must know of images to segment them; kept with its weights.

    Attributes:
        task: classes, dimensions, unit.
        rules: how files become volumes.
        spacing: millimetres along a volume's axes to which images are resampled before the network sees them, 0 where
            an axis stays as it is; None: no resampling.
    """

    task: Task
    rules: Rules
    spacing: tuple[float, float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: object) -> Plan:
        """What `as_dict` gave, also after JSON; `where` it stands is named in errors.

        Raises:
            TrainerError: when it is something else.
        """
        try:
            rules = content["rules"]
            axes, values = rules["axes"], tuple((int(v), int(c)) for v, c in rules["values"])
            spacing = content["spacing"]
            return cls(
                Task(**content["task"]),
                Rules(**{**rules, "axes": axes and tuple(axes), "values": values}),
                spacing and tuple(float(s) for s in spacing),
            )
        except (KeyError, TypeError, ValueError, TrainerError) as error:
            raise TrainerError(
                f"{where} does not describe a task and its images ({type(error).__name__}: {error})"
            ) from None


@dataclass(frozen=True)
class Dataset:
    """What is trained on.

    Attributes:
        plan: the task, and how its images are read and resampled.
        cases: all cases, sorted by name; validation and test cases stay in memory once read, where there is enough.
        split: who is labelled, who validates, who tests.
        notes: what a user should be told before training starts.
        shape: the median one of the images on the axes of a volume, at the plan's spacing, where it was looked at.
    """

    plan: Plan
    cases: tuple[Case, ...]
    split: Split
    notes: tuple[str, ...] = ()
    shape: tuple[float, float, float] | None = None

    @property
    def task(self) -> Task:
        """The plan's task."""
        return self.plan.task

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """The plan's spacing."""
        return self.plan.spacing

    def for_network_of(self, plan: Plan) -> Dataset:
        """The same cases, resampled as a network was trained by `plan`.

        Raises:
            TrainerError: when they belong to another task, or are read another way.
        """
        for told, mine, its in (
            ("classes", self.task.classes, plan.task.classes),
            ("dimensions", self.task.spatial_dims, plan.task.spatial_dims),
            ("channels", self.task.channels, plan.task.channels),
            (
                "axes",
                (self.plan.rules.axes, self.plan.rules.slice_axis),
                (plan.rules.axes, plan.rules.slice_axis),
            ),
        ):
            if mine != its:
                raise TrainerError(
                    f"--data: its {told} are {mine}, the run was trained on {its}; give data of the run's task "
                    f"({plan.task.name})"
                )
        return replace(self, plan=plan)

    def at_spacing(self, spacing: tuple[float, ...] | None) -> Dataset:
        """The same cases, to be resampled to `spacing`, of the axes that the networks see; None: as they were."""
        if spacing is None:
            return self
        a, b, c = (0.0, *spacing) if self.task.spatial_dims == 2 else spacing
        shape = self.shape
        if shape is not None and self.spacing is not None:
            x, y, z = (
                n * have / wanted if have and wanted else n
                for n, have, wanted in zip(shape, self.spacing, (a, b, c), strict=True)
            )
            shape = x, y, z
        return replace(self, plan=replace(self.plan, spacing=(a, b, c)), shape=shape)

    def part(self, name: str) -> list[Case]:
        """The cases of 'labelled', 'unlabelled', 'val' or 'test'."""
        return self.split.cases(name, self.cases)


def open_dataset(
    data: str,
    labelled_patients: int,
    *,
    phantom_patients: int = 24,
    seed: int = 0,
    options: Options | None = None,
) -> Dataset:
    """Find the cases of a folder, or draw phantoms, and split them.

    Args:
        data: a folder in one of the known layouts, ``"phantom"`` or ``"phantom-atrium"``.
        labelled_patients: how many of the training patients' labels are used.
        phantom_patients: how many to draw when `data` is one of the phantoms; `seed` is theirs alone.
        options: what the layout does not say; phantoms are volumes when its `spatial_dims` is 3.

    Raises:
        TrainerError: in a sentence that names the file or the option, and what to do.
    """
    options = options or Options()
    if data in PHANTOMS:
        findings, root = _phantoms(data, phantom_patients, seed, options), None
    else:
        listing = list_folder(data)
        findings, root = find_cases(listing, options), listing.root
    if findings.problems:
        raise DataError(*findings.problems)
    check_options(findings.task, options)
    split = split_patients(findings, root, labelled_patients, allow_missing=options.allow_missing)
    faults, notes = judge_copies(copied_images(findings), findings.cases, split)
    if faults:
        raise DataError(*faults)
    return Dataset(
        Plan(findings.task, findings.rules, findings.spacing),
        _held_out_in_memory(findings.cases, split),
        split,
        (*notes_on(findings, split), *notes),
        findings.shape,
    )


def _phantoms(data: str, patients: int, seed: int, options: Options) -> Findings:
    if data == "phantom-atrium":
        return Findings(PHANTOM_ATRIUM, LA_RULES, atrium_cases(patients, seed))
    dims = options.spatial_dims or 2
    cases = phantom_cases(patients, seed, dims)
    if dims == 2:
        return Findings(PHANTOM, ACDC_RULES, cases)
    return Findings(PHANTOM_3D, replace(ACDC_RULES, axes=(0, 1, 2)), cases)


def find_cases(
    listing: Listing, options: Options, tiers: Sequence[Sequence[Layout]] = TIERS
) -> Findings:
    """What the layout that fits has found, the cases by name; the listing's problems are added to its own.

    Raises:
        DataError: when no layout fits, or more than one.
    """
    for layouts in tiers:
        found = [(layout, layout.find(listing, options)) for layout in layouts]
        fitting = [(layout, findings) for layout, findings in found if findings is not None]
        if len(fitting) > 1:
            names = " and ".join(layout.name for layout, _ in fitting)
            raise DataError(
                f"--data: {listing.root} holds {names}; give the folder of one of them, or move the other away"
            )
        if fitting:
            findings = fitting[0][1]
            return replace(
                findings,
                cases=tuple(sorted(findings.cases, key=lambda case: case.name)),
                problems=(*listing.problems, *findings.problems),
                notes=(*findings.notes, *_strangers(listing, findings), *_unread(listing)),
            )
    raise DataError(*listing.problems, _nothing_found(listing, tiers))


def check_options(task: Task, options: Options) -> None:
    """Whether what the user said is what the data has; where the layout says it, it cannot be changed.

    Raises:
        TrainerError: naming the option.
    """
    for option, given, its in (
        ("--spatial-dims", options.spatial_dims, task.spatial_dims),
        ("--classes", options.classes, task.classes),
    ):
        if given is not None and given != its:
            shown = [" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (given, its)]
            raise TrainerError(
                f"{option}: {shown[0]} was given, but {task.name} has {shown[1]}; leave the option out"
            )


def _held_out_in_memory(cases: Sequence[Case], split: Split) -> tuple[Case, ...]:
    """Training cases are read once, by whoever trains; those of validation and test again and again."""
    held_out = {case.name for part in ("val", "test") for case in split.cases(part, cases)}
    kept = {case.name: case for case in cached([case for case in cases if case.name in held_out])}
    return tuple(kept.get(case.name, case) for case in cases)


def notes_on(findings: Findings, split: Split) -> tuple[str, ...]:
    """The layout's notes, and who is in no list."""
    left_out = unlisted(split, findings.cases)
    more = [f"in no list, so not used: {some(left_out)}"] if left_out else []
    without = [c.name for c in split.cases("unlabelled", findings.cases) if not c.labelled]
    if without:
        more.append(f"without a label, so unlabelled data: {some(without)}")
    return (*findings.notes, *more)


def _strangers(listing: Listing, findings: Findings) -> list[str]:
    """Images that belong to no case; where there are faults they are told already."""
    known = {path for case in findings.cases for path in case.files} | set(findings.unused)
    strangers = [path for path in listing.images if path not in known]
    if not strangers or findings.problems:
        return []
    names = [str(path.relative_to(listing.root)) for path in strangers]
    return [f"of no case, so not used: {some(names)}"]


def _unread(listing: Listing) -> list[str]:
    """Images in formats that are not read: a label among them would be lost without a word."""
    foreign = [p for p in listing.others if p.suffix.lower() in FOREIGN_SUFFIXES]
    names = [str(path.relative_to(listing.root)) for path in foreign]
    return [f"not read, convert to .nii.gz what is needed: {some(names)}"] if names else []


def _nothing_found(listing: Listing, tiers: Sequence[Sequence[Layout]]) -> str:
    files = (*listing.images, *listing.others)
    found = sorted({path.relative_to(listing.root).parts[0] for path in files})
    accepted = "; ".join(layout.accepts for layouts in tiers for layout in layouts)
    foreign = sorted({path.suffix.lower() for path in listing.others} & set(FOREIGN_SUFFIXES))
    hint = f" ({', '.join(foreign)} is not read: convert to .nii.gz)" if foreign else ""
    return (
        f"--data: no data set was found in {listing.root}, which holds {some(found) or 'nothing'}{hint}. "
        f"Accepted are {accepted}"
    )
