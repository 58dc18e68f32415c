"""What tables show: statistics over seeds, the paper's numbers of the right setting, and what must be said beside them."""

from __future__ import annotations

import csv
import json
import math

import pytest
from trainer.reproduction.test_plan import parse

from action_kernels.trainer.reproduction.collect import Statistic, center_share
from action_kernels.trainer.reproduction.command import make_report, prepare_job
from action_kernels.trainer.reproduction.measure import FILES, missing
from action_kernels.trainer.reproduction.pictures import smallest_structure
from action_kernels.trainer.reproduction.render import (
    as_csv,
    escaped,
    latex,
    markdown,
    write_report,
)

MEASURES = ("paper_dice", "paper_asd", "dice", "assd", "assd_pooled", "hd95")


def job_of(tmp_path, *words):
    return prepare_job(parse(*words, "--data", "phantom", "--output", str(tmp_path)))


def finish(run, root, dice, *, snapshots=()):
    """The files of a finished run, with `dice` by checkpoint and class RV, Myo, LV."""
    folder = run.folder(root)
    for name, numbers in dice.items():
        classes = {
            c: dict.fromkeys(MEASURES, d) for c, d in zip(("RV", "Myo", "LV"), numbers, strict=True)
        }
        mean = dict.fromkeys(MEASURES, sum(numbers) / 3)
        (folder / name).mkdir(parents=True)
        content = {"classes": classes, "mean": mean, "failures": [{}], "cases": {}}
        (folder / name / "metrics.json").write_text(json.dumps(content))
    (folder / "trained.json").write_text("{}")
    if snapshots:
        entries = [{"iteration": i, **dict.fromkeys(MEASURES, d)} for i, d in enumerate(snapshots)]
        (folder / "test-snapshots.json").write_text(json.dumps({"snapshots": entries}))


@pytest.fixture
def table_1(tmp_path):
    """Two seeds of the whole method on phantoms in ACDC's place, and nothing else."""
    words = "table1 --on acdc-5 --seeds 0 1 --best-on-test".split()
    job = job_of(tmp_path, *words)
    ((table, entries),) = job.tables
    whole = next(entry for entry in entries if entry.row.key == "action++")
    for seed, shift in ((0, 0.0), (1, 0.1)):
        numbers = {"test": (0.5 + shift, 0.6, 0.7 + shift), "test-best": (0.8, 0.8, 0.8)}
        finish(whole.runs[seed], tmp_path, numbers, snapshots=(0.2, 0.9, 0.4))
    return make_report(job, table, entries)


def cells(text, label):
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_spread_the_papers_number_and_the_difference(table_1):
    row = cells(markdown(table_1), "ACTION++")
    mean, spread = 60 + 10 / 3, (20 / 3) / math.sqrt(2)
    assert row[1:4] == [f"{mean:.1f} ± {spread:.1f}", "88.5", f"{mean - 88.5:+.1f}"]
    assert row[7] == "80.0 ± 0.0"  # best on validation
    assert row[9] == "90.0 ± 0.0"  # best on the test list
    assert row[-2:] == ["2", "2 of 2"]
    nothing = cells(markdown(table_1), "mean teacher")
    assert nothing[1] == "—"
    assert nothing[-1] == "0 of 2"


def test_classes_have_their_own_numbers(table_1):
    lines = markdown(table_1).splitlines()
    part = "\n".join(lines[lines.index("### RV") :])
    row = cells(part, "ACTION++")
    assert row[1:4] == [f"55.0 ± {10 / math.sqrt(2):.1f}", "86.9", f"{55 - 86.9:+.1f}"]


def test_best_on_test_says_what_it_is_or_is_not_there(table_1, tmp_path):
    text = markdown(table_1)
    assert "BEST ON TEST (chosen on it)" in text
    assert "not comparable with the last checkpoint" in text
    assert "UniMatch 88.9" in text
    job = job_of(tmp_path, *"table1 --on acdc-5 --seeds 0 1".split())
    ((table, entries),) = job.tables
    for form in (markdown, as_csv, latex):
        text = form(make_report(job, table, entries))
        assert "best_on_test" not in text
        assert "BEST ON TEST" not in text
    assert "UniMatch" not in markdown(make_report(job, table, entries))
    assert "TraCoCo 89.5" in markdown(make_report(job, table, entries))


def test_one_seed_has_no_spread():
    assert Statistic.of([3.0]) == Statistic(3.0, None, 1)
    assert Statistic.of([]) is None
    assert Statistic.of([1.0, 3.0]) == Statistic(2.0, math.sqrt(2), 2)


@pytest.mark.parametrize("scale", ["1", "0.02"])
def test_a_scaled_run_says_so_everywhere(tmp_path, scale):
    job = job_of(tmp_path, *f"table5 --on acdc-10 --seeds 0 --scale {scale}".split())
    ((table, entries),) = job.tables
    report = make_report(job, table, entries)
    scaled = scale != "1"
    names = {path.name for path in write_report(report, tmp_path)}
    suffix = "-scale-0.02" if scaled else ""
    assert names == {f"table5-phantom{suffix}.{kind}" for kind in ("md", "csv", "tex", "json")}
    for path in tmp_path.glob("table5*"):
        if path.suffix != ".csv":  # no result yet, so no line
            assert ("SCALED RUN, --scale 0.02" in path.read_text()) == scaled
            assert "on phantoms" in path.read_text()
    assert ("cannot" in markdown(report) or "not with the paper" in markdown(report)) == scaled


def test_ablations_elsewhere_name_the_papers_setting(tmp_path):
    job = job_of(tmp_path, *"table5 --on acdc-10 --seeds 0".split())
    ((table, entries),) = job.tables
    finish(entries[-1].runs[0], tmp_path, {"test": (0.5, 0.5, 0.5), "test-best": (0.5, 0.5, 0.5)})
    report = make_report(job, table, entries)
    assert "The paper has this table for LA, 10 % labelled alone" in markdown(report)
    rows = list(csv.DictReader(as_csv(report).splitlines()))
    row = next(r for r in rows if (r["class"], r["measure"]) == ("mean", "paper_dice"))
    assert (row["row"], row["setting"], row["paper_setting"]) == (
        "fine-tuning: ATS and SAACL", "acdc-10", "la-10",
    )  # fmt: skip
    assert (float(row["mean"]), float(row["paper"])) == (50.0, 89.9)
    assert float(row["difference"]) == pytest.approx(50 - 89.9)


def test_the_share_of_the_centre_term(tmp_path):
    """λ_a over the number of positives as published, λ_a itself when balanced."""
    job = job_of(tmp_path, *"table6 --on acdc-10 --seeds 0".split())
    ((_, entries),) = job.tables
    runs = {entry.row.key: entry.runs[0] for entry in entries}
    queue_of_a_class, paired, center = 12288 / 4, 1, 1
    assert center_share(runs["mean-center-weight-0.2"]) == pytest.approx(
        0.2 / (queue_of_a_class + paired + center)
    )
    assert center_share(runs["balanced-center-weight-10"]) == 10
    assert center_share(runs["balanced-center-weight-10"].parent) is None


def test_what_is_missing(tmp_path):
    assert missing(tmp_path, FILES) == list(FILES)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "metrics.json").touch()
    (tmp_path / "trained.json").touch()
    assert missing(tmp_path, ["trained", "test"]) == ["test"]  # the best checkpoint's is not there


def test_latex_shows_what_it_must():
    assert escaped("5 % λ_a ± 1 & {x}") == r"5 \% $\lambda$\_a $\pm$ 1 \& \{x\}"


def test_the_smallest_structure_is_chosen_by_the_truth():
    import numpy as np

    from action_kernels.trainer.data.task import ACDC

    truth = np.zeros((4, 60, 60), np.uint8)
    truth[:, 10:40, 10:40] = 2
    truth[1, 20:26, 20:26] = 1
    truth[2, 30:33, 40:43] = 1  # the smallest that can be seen
    truth[3, 5, 5] = 1
    name, number, (rows, columns) = smallest_structure(truth, ACDC)
    assert (name, number) == ("RV", 2)
    assert rows.start < 30
    assert rows.stop > 33
    assert columns.start < 40
    assert columns.stop > 43
    assert smallest_structure(np.zeros((3, 8, 8), np.uint8), ACDC)[0] == "nothing"
