"""Whole patients, the community's lists, and the rule without lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trainer.volumes import find_cases

from action_kernels.trainer.data.acdc import RULES
from action_kernels.trainer.data.layout import Findings
from action_kernels.trainer.data.splits import split_patients
from action_kernels.trainer.data.task import ACDC
from action_kernels.trainer.data.volume import Case
from action_kernels.trainer.errors import TrainerError


def cases_of(patients):
    cases = [Case(f"{p}_frame{f}", p, lambda: None, True) for p in patients for f in ("01", "12")]
    return Findings(ACDC, RULES, tuple(cases))


PATIENTS = [f"patient{n:03d}" for n in range(1, 21)]


def write_lists(folder, **lists):
    for name, lines in lists.items():
        (folder / f"{name}.list").write_text("\n".join(lines) + "\n")


def test_without_lists_every_patient_has_one_part():
    split = split_patients(cases_of(PATIENTS), None, 3)
    parts = [split.labelled, split.unlabelled, split.val, split.test]
    assert [len(part) for part in parts] == [3, 11, 2, 4]
    assert sorted(sum(parts, ())) == PATIENTS
    assert split == split_patients(cases_of(PATIENTS[::-1]), None, 3)
    more = split_patients(cases_of(PATIENTS), None, 5)
    assert more.labelled[:3] == split.labelled
    assert more.test == split.test


@pytest.mark.parametrize("count", [4, 5, 7, 10, 100])
def test_no_part_is_empty(count):
    split = split_patients(cases_of([f"p{n}" for n in range(count)]), None, 1)
    assert split.unlabelled
    assert split.val
    assert split.test


def test_lists_decide_and_order_the_labelled(tmp_path):
    write_lists(
        tmp_path,
        train=[
            "patient003_frame01",
            "patient003_frame02",
            "patient001_frame01",
            "patient005_frame01",
        ],
        val=["patient002_frame01"],
        test=["patient004_frame01", "patient004_frame02"],
    )
    split = split_patients(cases_of(PATIENTS[:6]), tmp_path, 2)
    assert split.labelled == ("patient003", "patient001")
    assert (split.unlabelled, split.val, split.test) == (
        ("patient005",),
        ("patient002",),
        ("patient004",),
    )
    write_lists(
        tmp_path,
        train_slices=[
            "patient005_frame01_slice_3",
            "patient001_frame02_slice_1",
            "patient003_frame01_slice_9",
        ],
    )
    assert split_patients(cases_of(PATIENTS[:6]), tmp_path, 2).labelled == (
        "patient005",
        "patient001",
    )


def test_cases_of_a_part():
    findings = cases_of(PATIENTS)
    split = split_patients(findings, None, 3)
    assert [case.patient for case in split.cases("val", findings.cases)] == sorted(split.val * 2)


def test_patient_in_two_lists(tmp_path):
    write_lists(
        tmp_path,
        train=["patient001_frame01", "patient002_frame01"],
        val=["patient003_frame01"],
        test=["patient001_frame02"],
    )
    with pytest.raises(TrainerError, match=r"patient001 stands in train\.list and in test\.list"):
        split_patients(cases_of(PATIENTS[:3]), tmp_path, 1)


def test_incomplete_lists(tmp_path):
    write_lists(tmp_path, train=["patient001_frame01"], test=["patient002_frame01"])
    findings = replace(cases_of(PATIENTS), published="acdc")
    with pytest.raises(TrainerError, match=r"val\.list is missing"):
        split_patients(findings, tmp_path, 1)


@pytest.mark.parametrize("labelled", [0, 15, 99])
def test_too_many_labelled(labelled):
    with pytest.raises(TrainerError, match=f"{labelled} was given, 1 … 14 is accepted"):
        split_patients(cases_of(PATIENTS), None, labelled)


def test_too_few_patients():
    with pytest.raises(TrainerError, match="3 patients with labels were found, at least 4"):
        split_patients(cases_of(PATIENTS[:3]), None, 1)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(3, "038 050 099"), (7, "021 038 049 050 058 099 100")],
)
def test_the_papers_labelled_patients(data_folder, count, expected):
    cases = find_cases(data_folder / "ACDC")
    findings = Findings(ACDC, RULES, tuple(cases), published="acdc")
    split = split_patients(findings, data_folder / "ACDC", count)
    published = split_patients(findings, None, count)
    for part in ("labelled", "unlabelled", "val", "test"):
        assert getattr(published, part) == getattr(split, part)
    assert sorted(p.removeprefix("patient") for p in split.labelled) == expected.split()
    assert [len(split.cases(part, cases)) for part in ("labelled", "unlabelled", "val", "test")] == [
        2 * count, 140 - 2 * count, 20, 40
    ]  # fmt: skip
    slices = sum(case.read().shape[0] for case in split.cases("labelled", cases))
    assert slices == {3: 68, 7: 136}[count]
