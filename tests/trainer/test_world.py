"""Training over two processes equals training in one: losses, weights, what is left, and what `--resume` makes of it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from trainer.volumes import read_rows
from trainer.world_cases import STOP_AFTER, interrupted, run_all

from action_kernels.trainer.checkpoints import read_checkpoint
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.networks import synchronised
from action_kernels.trainer.run import check_shares, run_training
from action_kernels.trainer.shares import share_of
from action_kernels.trainer.world import World

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
STAGES = ("finetune", "pretrain", "supervised", "mean_teacher")
LOSSES = {"total", "supervised", "pseudo_label", "saacl", "anco", "consistency", "global", "local"}


@pytest.fixture(scope="module")
def configs(tiny_config):
    """Uneven shares, every loss with a weight that matters; no dropout, which each process draws for itself."""
    common = {
        "labelled_batch": 3, "unlabelled_batch": 3, "dropout": 0.0, "num_workers": 0, "saacl_weight": 0.2, "anco_weight": 0.2,
        "max_iterations": 5, "pretrain_iterations": 5, "phantom_patients": 6, "labelled_patients": 2, "validate_every": 5,
    }  # fmt: skip
    configs = {stage: tiny_config(stage=stage, **common) for stage in STAGES}
    configs["instance"] = tiny_config(stage="finetune", norm="instance", mix="classmix", **common)
    configs["apart"] = tiny_config(stage="supervised", sync_batch_norm=False, **common)
    return configs


@pytest.fixture(scope="module")
def runs(configs, tmp_path_factory):
    """The folders of the runs by one process, and of those by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("action_kernels.trainer.run.training_figure", lambda *_: None)
        for name in ("case_figure", "gallery_figure"):
            patch.setattr(f"action_kernels.trainer.reports.{name}", lambda *_: None)
        for name, config in configs.items():
            run_training(config, one / name)
        interrupted(configs["finetune"], one / "interrupted", 0, stopping_rank=0)
        arguments = (2, free_port(), configs, str(two), str(one / "interrupted"))
        mp.start_processes(run_all, args=arguments, nprocs=2, start_method="spawn")
        stopped = read_checkpoint(two / "interrupted" / "finetune" / "checkpoint.pt")
        assert stopped["iteration"] == STOP_AFTER
        run_training(configs["finetune"], two / "interrupted", resume=True)
    return one, two


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def assert_same_training(first, second, stage: str) -> None:
    """The same losses in every step, and weights nearer to each other than to where they began, by far."""
    for one, two in zip(
        *(read_rows(path / stage / "losses.csv") for path in (first, second)), strict=True
    ):
        for loss in LOSSES & one.keys():
            assert float(one[loss]) == pytest.approx(float(two[loss]), rel=2e-4, abs=1e-6), (
                loss,
                one["iteration"],
            )
    assert distance(first, second, stage) < 1e-3


def distance(first, second, stage: str) -> float:
    """Of the students' parameters, in units of how far they are from zero."""
    one, two = (
        read_checkpoint(path / stage / "checkpoint.pt")["modules"]["network"]
        for path in (first, second)
    )
    assert one.keys() == two.keys()
    keys = [key for key in one if one[key].is_floating_point()]
    apart = sum((one[key] - two[key]).square().sum() for key in keys)
    return float((apart / sum(one[key].square().sum() for key in keys)).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STAGES, "instance"])
def test_two_processes_equal_one(runs, name):
    one, two = runs
    stage = "finetune" if name == "instance" else name
    assert_same_training(one / name, two / name, stage)


@pytest.mark.slow
def test_state_beside_the_network_is_the_same(runs):
    """Queue, class means and momentum, not only what is compared of the network."""
    one, two = (read_checkpoint(path / "finetune" / "finetune" / "checkpoint.pt") for path in runs)
    for name in ("ring", "class_means.means"):
        key = next(key for key in one["modules"]["saacl"] if key.endswith(name))
        first, second = (each["modules"]["saacl"][key] for each in (one, two))
        assert first.abs().sum() > 0
        torch.testing.assert_close(first, second, rtol=0, atol=1e-3)
    assert torch.equal(one["random"]["torch"], two["random"]["torch"])


@pytest.mark.slow
def test_batch_statistics_of_each_process_differ(runs):
    """Without synchronisation the networks are others: what makes the tests above able to fail."""
    one, two = runs
    assert distance(one / "apart", two / "apart", "supervised") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["one then two", "two then one"])
def test_resuming_with_another_number_of_processes(runs, which):
    assert_same_training(runs[0] / "finetune", runs[which] / "interrupted", "finetune")


@pytest.mark.slow
def test_the_evaluation_is_the_same(runs):
    metrics = [json.loads((path / "instance" / "metrics.json").read_text()) for path in runs]
    assert list(metrics[0]["cases"]) == list(metrics[1]["cases"])
    assert len(metrics[0]["cases"]) > 1
    for case, scores in metrics[0]["cases"].items():
        for name, values in scores.items():
            assert values["dice"] == pytest.approx(
                metrics[1]["cases"][case][name]["dice"], abs=0.02
            )


@pytest.mark.slow
def test_torchrun_and_the_command_line(tmp_path, configs):
    """Both processes agree on a new folder; the first alone writes and tells."""
    options: list[Any] = [
        "--preset",
        "demo",
        "--stage",
        "supervised",
        "--max-iterations",
        2,
        "--patch-size",
        32,
    ]
    options += [
        "--phantom-patients",
        5,
        "--labelled-patients",
        1,
        "--widths",
        4,
        8,
        "--device",
        "cpu",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--no-python"]
    command = [*launcher, shutil.which("action-kernels"), "train", *options]
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"demo", "demo-2"}
    assert (tmp_path / "runs" / "demo-2" / "metrics.json").is_file()
    assert done.stdout.count("2 processes") == 1


def test_a_batch_smaller_than_the_number_of_processes_is_refused(tiny_config):
    with pytest.raises(TrainerError, match="--labelled-batch: 2 was given, at least 3 is accepted"):
        check_shares(tiny_config(labelled_batch=2, unlabelled_batch=4), World(0, 3))
    with pytest.raises(TrainerError, match="--unlabelled-batch: 1 was given"):
        check_shares(tiny_config(labelled_batch=3, unlabelled_batch=1), World(0, 2))
    check_shares(tiny_config(stage="supervised", labelled_batch=3, unlabelled_batch=1), World(0, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_all_images_once(size):
    shares = [share_of(5, 7, World(rank, size)) for rank in range(size)]
    assert sorted(number for share in shares for number in share.all) == list(range(12))
    for part in ("labelled", "unlabelled"):
        assert sum(getattr(share, part).factor for share in shares) == pytest.approx(size)


def test_pixels_of_other_processes_are_none():
    share = share_of(2, 4, World(1, 2))  # has the images 1, 4 and 5
    index = torch.tensor([[-1, 0, 9], [10, 19, 40], [41, 59, 39]])
    expected = [[-1, -1, -1], [0, 9, 10], [11, 29, -1]]
    assert share.local(index, 10).tolist() == expected


def test_synchronised_batch_normalisation_keeps_the_state_dict():
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sequential(nn.BatchNorm2d(3, momentum=None)))
    network(torch.randn(4, 1, 5, 5))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    after = synchronised(network).state_dict()
    assert isinstance(network[1][0], nn.SyncBatchNorm)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
