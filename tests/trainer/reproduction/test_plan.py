"""What is run: rows to runs, each once, the rules of a scale, and the commands for a scheduler."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter

import pytest

from action_kernels.trainer.configuration import options
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.presets import preset
from action_kernels.trainer.reproduction import paper
from action_kernels.trainer.reproduction.arguments import add_arguments
from action_kernels.trainer.reproduction.command import command, commands, prepare_job
from action_kernels.trainer.reproduction.data import find_sources
from action_kernels.trainer.reproduction.plan import Planner, distinct
from action_kernels.trainer.reproduction.scale import Scale
from action_kernels.trainer.reproduction.tables import TABLES, settings_of


@pytest.fixture(scope="module")
def sources():
    return find_sources(["phantom"])


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def planned(sources, table, *settings, seeds=(0,), scale=1.0, **given):
    return list(Planner(sources, Scale(scale), seeds, given).entries(TABLES[table], settings))


def runs_of(*entries):
    return distinct(run for entry in entries for run in entry.runs.values())


def by_key(entries):
    return {entry.row.key: entry.runs[0] for entry in entries}


def test_table_1_is_the_method_and_its_baselines(sources):
    runs = by_key(planned(sources, "table1", "acdc-10"))
    assert list(runs) == ["labelled", "full", "mean-teacher", "action", "action++"]
    stages = [(run.config.stages[-1], run.parent is not None) for run in runs.values()]
    assert Counter(stages) == {
        ("supervised", False): 2,
        ("mean_teacher", False): 1,
        ("finetune", True): 2,
    }
    whole, before = runs["action++"].config, runs["action"].config
    assert whole.finetune == preset("acdc-10").finetune
    assert (before.finetune.saacl_weight, before.finetune.temperature_schedule) == (0.0, "fixed")
    assert runs["action"].parent.config.pretrain.temperature_schedule == "fixed"
    assert runs["action++"].parent.config.pretrain == preset("acdc-10").pretrain
    assert runs["labelled"].config.data.labelled_patients == 7
    assert runs["full"].config.data.labelled_patients == sources["ACDC"].patients


def test_no_row_of_a_table_is_trained_for_longer_than_another(sources):
    for name in ("acdc-5", "acdc-10"):
        runs = by_key(planned(sources, "table1", name)).values()
        assert {run.steps + (run.parent.steps if run.parent else 0) for run in runs} == {30_000}


def test_table_5_has_the_six_rows_of_the_paper(sources):
    entries = planned(sources, "table5", "acdc-10")
    assert [entry.row.key for entry in entries] == list(paper.TABLE_5)
    runs = by_key(entries)
    fine = {
        key: (run.config.finetune.saacl_weight > 0, run.config.finetune.temperature_schedule)
        for key, run in runs.items()
        if run.parent is not None
    }
    assert fine == {
        "none": (False, "fixed"),
        "ats": (False, "cosine"),
        "saacl": (True, "fixed"),
        "both": (True, "cosine"),
    }
    assert {run.parent for run in runs.values() if run.parent} == {runs["pretrain-with-ats"]}
    assert len(runs_of(*entries)) == 6


def test_table_6_varies_one_thing_at_a_time(sources):
    entries = planned(sources, "table6", "acdc-10")
    assert len(entries) == 2 * (5 + 5 + 6)
    whole = by_key(planned(sources, "table5", "acdc-10"))["both"].config
    for entry in entries:
        run = entry.runs[0]
        changed = {o.key for o in options() if run.config.value(o) != whole.value(o)}
        assert changed - {"positives"} <= {
            "temperature_period", "temperature_schedule", "center_weight"
        }  # fmt: skip
        assert len(changed - {"positives"}) <= 1
        assert run.config.finetune.positives == entry.row.part.rpartition(" ")[2]
    # the whole method stands in three parts for each way to divide, and is one run
    assert len({run.digest for run in runs_of(*entries)}) == 2 * (5 + 5 + 6 - 2) + 1


def test_tables_share_their_runs(sources):
    one = planned(sources, "table1", "acdc-10")
    more = [*planned(sources, "table5", "acdc-10"), *planned(sources, "table6", "acdc-10")]
    both = {run.digest for run in runs_of(*one)} & {run.digest for run in runs_of(*more)}
    assert both == {
        run.digest
        for run in (
            by_key(one)["action++"],
            by_key(one)["action++"].parent,
            by_key(one)["action"].parent,
        )
    }


def test_a_run_is_named_by_what_decides_its_result(sources):
    def digest(**given):
        return by_key(planned(sources, "table5", "acdc-10", **given))["both"].digest

    same = digest()
    assert digest(device="cpu", num_workers=5) == same
    assert digest(scale=0.5) != same
    others = {
        "another seed": planned(sources, "table5", "acdc-10", seeds=(1,))[-1].runs[1].digest,
        "other labels": by_key(planned(sources, "table5", "acdc-5"))["both"].digest,
    }
    assert len({same, *others.values()}) == 3
    elsewhere = {"ACDC": sources["ACDC"].__class__(**{**vars(sources["ACDC"]), "identity": "x"})}
    assert by_key(planned(elsewhere, "table5", "acdc-10"))["both"].digest != same


def test_runs_come_after_what_they_begin_from(sources):
    runs = runs_of(*planned(sources, "table6", "acdc-10"), *planned(sources, "table1", "acdc-5"))
    seen = set()
    for run in runs:
        assert run.parent is None or run.parent.digest in seen
        seen.add(run.digest)
    assert len(seen) == len(runs)


def test_settings():
    both, acdc = ("acdc-5", "acdc-10", "la-5", "la-10"), ("acdc-5", "acdc-10")
    assert settings_of(TABLES["table1"], (), both) == ("acdc-5", "acdc-10")
    assert settings_of(TABLES["table2"], (), acdc) == ()
    assert settings_of(TABLES["table5"], (), both) == ("la-10",)
    assert settings_of(TABLES["table5"], (), acdc) == ("acdc-10",)
    assert settings_of(TABLES["table5"], ("acdc-5", "la-5"), both) == ("acdc-5", "la-5")
    assert settings_of(TABLES["table1"], ("acdc-5", "la-5"), both) == ("acdc-5",)


# Scale


def test_scale_1_is_the_preset():
    whole = preset("acdc-10")
    scaled = Scale(1.0).apply(whole)
    kept = [o.key for o in options() if scaled.value(o) != whole.value(o)]
    assert set(kept) <= {"validate_every", "snapshot_every", "checkpoint_every"}
    assert Scale(1.0).suffix == ""


def test_scale_follows_its_rules():
    config = Scale(0.05).apply(preset("acdc-10"))
    assert (config.finetune.max_iterations, config.pretrain.iterations) == (1000, 500)
    assert config.data.patch_size == (96,)  # 256 · 0.05^(1/3) = 94
    assert config.network.widths == (4, 12, 24, 48, 96)
    assert config.optimiser.learning_rate == pytest.approx(0.01 * 0.05**-0.5)
    assert config.finetune.queue_size == round(12288 * (96 / 256) ** 2)
    assert config.finetune.queries_per_class == round(256 * (96 / 256) ** 2)
    assert config.run.validate_every == 1000 // 7
    assert (config.data.labelled_batch, config.finetune.center_weight) == (4, 0.2)
    assert Scale(0.05).suffix == "-scale-0.05"
    shortest = Scale(1e-5).apply(preset("acdc-10"))
    assert (shortest.finetune.max_iterations, shortest.data.patch_size) == (4, (32,))
    assert shortest.optimiser.learning_rate == pytest.approx(0.05)


def test_smaller_scales_are_never_larger_in_anything():
    keys = ("max_iterations", "pretrain_iterations", "patch_size", "widths", "embedding_dim",
            "queries_per_class", "negatives_per_class", "queue_size")  # fmt: skip
    wanted = [option for option in options() if option.key in keys]
    before = None
    for factor in (1.0, 0.9, 0.5, 0.1, 0.03, 0.01, 0.002, 1e-5):
        config = Scale(factor).apply(preset("acdc-10"))
        values = [config.value(option) for option in wanted]
        if before is not None:
            assert all(now <= was for now, was in zip(values, before, strict=True)), factor
        before = values


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5, float("nan")])
def test_scales_that_are_none(factor):
    with pytest.raises(TrainerError, match=r"--scale: .* a number above 0 and at most 1"):
        Scale(factor)


# Commands


def test_commands_for_a_scheduler(tmp_path, monkeypatch):
    """A line for every run; it means the same run wherever it is executed."""
    monkeypatch.chdir(tmp_path)
    words = "table5 --data phantom --on acdc-10 --seeds 3 1 --scale 0.01 --best-on-test".split()
    job = prepare_job(parse(*words))
    lines = commands(job, "all")
    assert len(lines) == 12
    assert commands(job, "first") + commands(job, "then") == lines
    assert len(commands(job, "first")) == 4
    monkeypatch.chdir("/")
    digests = set()
    for line in lines:
        program, name, *rest = shlex.split(line, comments=True)
        assert (program, name) == ("action-kernels", "reproduce")
        arguments = parse(*rest)
        digests.add(arguments.digest)
        assert (arguments.seeds, arguments.scale, arguments.best_on_test) == ([3, 1], 0.01, True)
        assert arguments.output == tmp_path / "runs" / "reproduce"
    assert digests == {run.digest for run in job.runs}
    again = prepare_job(parse(*shlex.split(command(job.arguments))[2:]))
    assert [run.digest for run in again.runs] == [run.digest for run in job.runs]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("table1 --data phantom --seeds 1 1", "--seeds: 1 1 was given, different whole numbers"),
        ("table1 --data phantom --seeds -1", "--seeds: -1 was given"),
        ("table1 --data phantom --on la-5", "table1 is left out: it needs ACDC"),
        ("table5 --data phantom --rows nobody", "table5 is left out: it has no row named nobody"),
        ("table5 --data /nowhere", "/nowhere"),
        ("table5 --data phantom --scale 2", "--scale: 2 was given"),
    ],
)
def test_what_is_not_accepted_is_told(words, message):
    with pytest.raises(TrainerError, match=message):
        prepare_job(parse(*words.split()))


def test_another_data_set_is_refused(tmp_path):
    from trainer.data import builders

    builders.build("nnunet", tmp_path)
    with pytest.raises(TrainerError, match=r"--data: .* ACDC and LA \(or phantom\) are accepted"):
        find_sources([str(tmp_path)])
