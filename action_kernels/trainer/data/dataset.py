"""A data set: its task, its cases and who does what. The way in is `open_dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .acdc import AcdcH5, AcdcNifti
from .layout import Findings, Layout, Options
from .listing import Listing, list_folder
from .phantom import phantom_cases
from .problems import DataError, some
from .splits import Split, split_patients, unlisted
from .task import PHANTOM, Task
from .volume import Case

LAYOUTS: tuple[Layout, ...] = (AcdcH5(), AcdcNifti())


@dataclass(frozen=True)
class Dataset:
    """What is trained on.

    Attributes:
        task: classes, dimensions, unit.
        cases: all cases, sorted by name.
        split: who is labelled, who validates, who tests.
        spacing: millimetres to which images are resampled before they are segmented; None: they are not.
        notes: what a user should be told before training starts.
    """

    task: Task
    cases: tuple[Case, ...]
    split: Split
    spacing: tuple[float, float, float] | None = None
    notes: tuple[str, ...] = ()

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
        data: a folder in one of the known layouts, or ``"phantom"``.
        labelled_patients: how many of the training patients' labels are used.
        phantom_patients: how many to draw when `data` is ``"phantom"``; `seed` is theirs alone.
        options: what the layout does not say.

    Raises:
        TrainerError: in a sentence that names the file or the option, and what to do.
    """
    options = options or Options()
    if data == "phantom":
        findings = Findings(PHANTOM, phantom_cases(phantom_patients, seed))
        return Dataset(
            findings.task, findings.cases, split_patients(findings, None, labelled_patients)
        )
    listing = list_folder(data)
    findings = find_cases(listing, options)
    if findings.problems:
        raise DataError(*findings.problems)
    cases = tuple(sorted(findings.cases, key=lambda case: case.name))
    split = split_patients(
        findings, listing.root, labelled_patients, allow_missing=options.allow_missing
    )
    notes = list(findings.notes)
    left_out = unlisted(split, cases)
    if left_out:
        notes.append(f"in no list, so not used: {some(left_out)}")
    return Dataset(findings.task, cases, split, None, tuple(notes))


def find_cases(listing: Listing, options: Options, layouts: Sequence[Layout] = LAYOUTS) -> Findings:
    """What the one layout that fits has found; the problems of the listing are added to its own.

    Raises:
        DataError: when no layout fits, or more than one.
    """
    found = [(layout, layout.find(listing, options)) for layout in layouts]
    fitting = [(layout, findings) for layout, findings in found if findings is not None]
    if not fitting:
        raise DataError(*listing.problems, _nothing_found(listing, layouts))
    if len(fitting) > 1:
        names = " and ".join(layout.name for layout, _ in fitting)
        raise DataError(
            f"--data: {listing.root} holds {names}; give the folder of one of them, or move the other away"
        )
    findings = fitting[0][1]
    return Findings(
        findings.task,
        findings.cases,
        (*listing.problems, *findings.problems),
        findings.notes,
        findings.published,
        findings.test,
        findings.slices,
    )


def _nothing_found(listing: Listing, layouts: Sequence[Layout]) -> str:
    found = sorted({path.name for path in listing.root.iterdir()})
    accepted = "; ".join(layout.accepts for layout in layouts)
    return f"--data: no data set was found in {listing.root} (it holds {some(found) or 'nothing'}). Accepted are {accepted}"
