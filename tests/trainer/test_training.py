"""Training as a whole: the loss falls, an interrupted run goes on bit for bit, and the parts do what they say."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from trainer.volumes import read_rows

from action_kernels.trainer import training
from action_kernels.trainer.checkpoints import (
    load_checkpoint,
    read_checkpoint,
    replace_file,
    save_checkpoint,
)
from action_kernels.trainer.configuration import PRESETS, Configuration
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.mixing import (
    PseudoLabelled,
    classmix_regions,
    cutmix_regions,
    mix_slices,
    paste,
)
from action_kernels.trainer.networks import (
    DenseEmbeddings,
    SampledEmbeddings,
    make_teacher,
    update_teacher,
)
from action_kernels.trainer.objectives import pseudo_label_loss, supervised_loss
from action_kernels.trainer.step import new_model, new_state, set_learning_rate, training_step
from action_kernels.trainer.theory import mirrored
from action_kernels.trainer.training import Interrupted, run_training

CPU = torch.device("cpu")


def trained_weights(folder):
    content = read_checkpoint(folder / "checkpoint.pt")
    return {
        key: content[key]
        for key in ("student", "teacher", "saacl", "optimizer", "iteration", "random")
    }


def assert_equal(first, second, where=""):
    """Bitwise equality of nested states."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


# The whole run


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """A run long enough to learn something, shared by the tests that look at it."""
    config = Configuration(
        **{
            **PRESETS["demo"],
            "patch_size": 48,
            "widths": (4, 8, 8, 16, 16),
            "embedding_dim": 16,
            "queue_size": 256,
        }
        | {
            "phantom_patients": 5,
            "labelled_patients": 2,
            "labelled_batch": 3,
            "unlabelled_batch": 3,
            "device": "cpu",
        }
        | {
            "queries_per_class": 32,
            "negatives_per_class": 32,
            "max_iterations": 60,
            "learning_rate": 0.1,
        }
        | {"log_every": 2, "validate_every": 30, "checkpoint_every": 25}
    )
    folder = tmp_path_factory.mktemp("run")
    return config, folder, run_training(config, folder)


def test_the_loss_falls(quick_run):
    _, folder, _ = quick_run
    rows = read_rows(folder / "losses.csv")
    supervised = [float(row["supervised"]) for row in rows]
    assert np.mean(supervised[-5:]) < 0.6 * np.mean(supervised[:5])
    assert all(
        np.isfinite(float(row[name]))
        for row in rows
        for name in ("saacl", "anco", "pseudo_label", "total")
    )


def test_it_segments_better_than_nothing(quick_run):
    _, _, summary = quick_run
    # The left ventricle comes first; untrained networks were seen to reach 0.003 on it.
    assert summary["classes"]["LV"]["dice"] > 0.2


def test_what_a_run_leaves(quick_run):
    config, folder, summary = quick_run
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "configuration.json", "checkpoint.pt", "metrics.json", "metrics.csv", "losses.csv", "validation.csv",
        "training.png", "predictions.png", "predictions", "figures", "tensorboard",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".")]  # no temporary file stays
    assert Configuration.load(folder / "configuration.json") == config
    assert json.loads((folder / "metrics.json").read_text())["mean_dice"] == summary["mean_dice"]
    assert len(summary["cases"]) == len(list((folder / "predictions").iterdir())) == 2
    assert [int(row["iteration"]) for row in read_rows(folder / "validation.csv")] == [
        30,
        60,
    ]
    assert any((folder / "tensorboard").iterdir())


def test_schedules_follow_the_length_of_the_run(quick_run):
    _, folder, _ = quick_run
    rows = read_rows(folder / "losses.csv")
    temperature = {int(row["iteration"]): float(row["temperature"]) for row in rows}
    rate = {int(row["iteration"]): float(row["learning_rate"]) for row in rows}
    assert temperature[1] == 1.0
    assert min(temperature, key=temperature.get) in (30, 32)
    assert min(temperature.values()) == pytest.approx(0.1, abs=0.01)
    assert rate[1] == 0.1
    assert rate[60] == pytest.approx(0.1 * (1 / 60) ** 0.9)


def test_evaluate_again_gives_the_same(quick_run, tmp_path):
    _, folder, summary = quick_run
    again = training.evaluate_run(folder, "test", tmp_path / "test")
    assert again["cases"] == summary["cases"]


def test_the_theory_is_measured(quick_run):
    _, _, summary = quick_run
    measured = summary["embeddings"]
    assert 0 < measured["alignment"] < 2
    assert -1 / 3 - 1e-6 <= measured["class_divergence"] <= 1
    assert set(measured["nearest_center_error"]) == {"background", "RV", "Myo", "LV", "mean"}
    # SAACL has drawn most classes towards their centres: chance is an error of ¾.
    assert measured["nearest_center_error"]["mean"] < 0.6


def test_mirrored_pixels_are_the_same_pixels():
    images = torch.randn(3, 1, 5, 7)
    index = torch.arange(3 * 5 * 7)
    assert torch.equal(images.flip(-1).flatten()[mirrored(index, images)], images.flatten()[index])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_goes_on_bit_for_bit(tiny_config, tmp_path, monkeypatch, workers):
    config = tiny_config(
        max_iterations=6, dropout=0.1, num_workers=workers
    )  # dropout: uses torch's generator
    run_training(config, tmp_path / "whole")

    real_step, calls = training.training_step, []

    def step_and_press_ctrl_c(*arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        return real_step(*arguments)

    monkeypatch.setattr(training, "training_step", step_and_press_ctrl_c)
    with pytest.raises(Interrupted, match="iteration 4 of 6"):
        run_training(config, tmp_path / "parts")
    torch.manual_seed(12345)  # another process would have other random numbers
    run_training(config, tmp_path / "parts", resume=True)
    assert_equal(trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "parts"))
    for name in ("losses.csv", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()


def test_the_seed_decides(tiny_config, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_training(tiny_config(max_iterations=2, seed=seed), tmp_path / name)
    a, b, c = (trained_weights(tmp_path / name) for name in "abc")
    assert_equal(a, b)
    assert not torch.equal(*(next(iter(w["student"].values())) for w in (a, c)))


def test_a_folder_with_a_run_is_not_overwritten(quick_run):
    config, folder, _ = quick_run
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainerError, match="already holds a run; --resume"):
        run_training(config, folder)
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("saacl_weight", [0.0, 0.01])
def test_a_run_that_diverges_says_so(tiny_config, tmp_path, saacl_weight):
    config = tiny_config(learning_rate=1e30, saacl_weight=saacl_weight, anco_weight=0.0)
    with pytest.raises(TrainerError, match=r"diverged by iteration .* lower --learning-rate"):
        run_training(config, tmp_path)


# Checkpoints


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_round_trip(tiny_config, tmp_path):
    config = tiny_config()
    state = new_state(config, CPU)
    images, labels = torch.randn(4, 1, 32, 32), torch.randint(0, 4, (4, 32, 32))
    training_step(state, images, labels)
    history = {"losses": [{"iteration": 1, "total": 0.5}], "validation": []}
    save_checkpoint(state, history, tmp_path)
    restored = new_state(tiny_config(seed=9), CPU)
    assert load_checkpoint(restored, tmp_path) == history
    assert restored.iteration == 1
    assert (restored.saacl.queue.labels >= 0).any()
    first, second = training_step(restored, images, labels), None
    load_checkpoint(state, tmp_path)
    second = training_step(state, images, labels)
    assert_equal(first, second)


def test_unreadable_checkpoint(tmp_path):
    with pytest.raises(TrainerError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(TrainerError, match="cannot be read"):
        read_checkpoint(tmp_path / "checkpoint.pt")


# One step


def test_leaving_out_the_contrastive_losses(tiny_config):
    images, labels = torch.randn(4, 1, 32, 32), torch.randint(0, 4, (4, 32, 32))
    names = {}
    for saacl in (0.0, 0.01):
        for anco in (0.0, 0.01):
            state = new_state(tiny_config(saacl_weight=saacl, anco_weight=anco), CPU)
            losses = training_step(state, images, labels)
            names[bool(saacl), bool(anco)] = set(losses) - {"supervised", "pseudo_label", "total"}
            weighted = losses["supervised"] + losses["pseudo_label"]
            weighted = weighted + saacl * losses.get("saacl", 0) + anco * losses.get("anco", 0)
            torch.testing.assert_close(losses["total"], weighted)
    assert names == {
        (False, False): set(), (False, True): {"anco"}, (True, False): {"saacl"}, (True, True): {"saacl", "anco"}
    }  # fmt: skip


def test_contrastive_losses_reach_head_and_network(tiny_config):
    images, labels = torch.randn(4, 1, 32, 32), torch.randint(0, 4, (4, 32, 32))
    for weights in (
        {"saacl_weight": 0.01, "anco_weight": 0.0},
        {"saacl_weight": 0.0, "anco_weight": 0.01},
    ):
        state = new_state(tiny_config(**weights), CPU)
        training_step(state, images, labels)
        assert state.student.head.neighbourhood.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in state.teacher.parameters())


def test_unlabelled_labels_are_never_read(tiny_config):
    """Whatever stands in the labels of unlabelled slices, the step is the same."""
    images, labels = torch.randn(4, 1, 32, 32), torch.randint(0, 4, (4, 32, 32))
    results = []
    for value in (-1, 2):
        labels[2:] = value
        state = new_state(tiny_config(), CPU)
        results.append(training_step(state, images, labels))
    assert_equal(*results)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("mix", ["cutmix", "classmix", "none"])
def test_variants_take_a_step(tiny_config, amp, norm, mix):
    state = new_state(tiny_config(amp=amp, norm=norm, mix=mix), CPU)
    losses = training_step(state, torch.randn(4, 1, 32, 32), torch.randint(0, 4, (4, 32, 32)))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_batch_without_a_class(tiny_config):
    state = new_state(tiny_config(), CPU)
    losses = training_step(
        state, torch.randn(4, 1, 32, 32), torch.zeros(4, 32, 32, dtype=torch.int64)
    )
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not (state.saacl.queue.labels > 0).any()


def test_polynomial_decay(tiny_config):
    state = new_state(tiny_config(max_iterations=100, learning_rate=0.2), CPU)
    state.iteration = 75
    set_learning_rate(state)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.25**0.9)


# Networks


def test_both_heads_are_the_same_function(tiny_config):
    torch.manual_seed(0)
    model = new_model(tiny_config()).double()
    _, pyramid = model(torch.randn(2, 1, 32, 32, dtype=torch.float64))
    assert [level.shape[1] for level in pyramid] == [8, 8, 8, 4, 4]
    labels = torch.randint(-1, 4, (2, 32, 32))
    index = torch.randint(0, labels.numel(), (4, 7))
    sampled, dense = (kind(model.head, pyramid, 4) for kind in (SampledEmbeddings, DenseEmbeddings))
    torch.testing.assert_close(sampled.at(index), dense.at(index))
    for first, second in zip(sampled.prototypes(labels), dense.prototypes(labels), strict=True):
        torch.testing.assert_close(first, second, check_dtype=False)


def test_the_network_is_monais(tiny_config):
    from monai.networks.nets.basic_unet import BasicUNet

    torch.manual_seed(0)
    network = new_model(tiny_config()).network
    image = torch.randn(2, 1, 32, 32)
    assert torch.equal(network(image)[0], BasicUNet.forward(network, image))


def test_teacher_is_a_moving_average(tiny_config):
    student = new_model(tiny_config(norm="batch"))
    teacher = make_teacher(student)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for value in student.state_dict().values():
            value.add_(2)
    update_teacher(teacher, student, momentum=0.9, iteration=1000)
    for name, value in teacher.state_dict().items():
        step = 0.2 if value.is_floating_point() else 2
        torch.testing.assert_close(value, before[name] + step)
    update_teacher(
        teacher, student, momentum=0.9, iteration=0
    )  # the ramp: at first the teacher is the student
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True)
    )


# Mixing and objectives


def pseudo_labelled(count=4, size=32):
    """Slice i holds i everywhere, in image, labels and confidence."""
    numbers = torch.arange(count).view(-1, 1, 1).expand(count, size, size)
    return PseudoLabelled(numbers[:, None].float(), numbers.clone(), numbers / 10)


@pytest.mark.parametrize("method", ["cutmix", "classmix", "none"])
def test_image_label_and_confidence_are_mixed_together(method):
    mixed = mix_slices(pseudo_labelled(), method)
    torch.testing.assert_close(mixed.images[:, 0], mixed.labels.float())
    torch.testing.assert_close(mixed.confidence, mixed.labels / 10)


def test_paste_takes_the_next_slice():
    region = torch.zeros(4, 32, 32, dtype=torch.bool)
    region[:, :16] = True
    labels = paste(pseudo_labelled(), region).labels
    assert [(int(s[0, 0]), int(s[31, 0])) for s in labels] == [(0, 1), (1, 2), (2, 3), (3, 0)]


def test_cutmix_regions_are_rectangles_of_half_the_area():
    regions = ~cutmix_regions(torch.Size((50, 64, 48)), CPU)
    for region in regions:
        rows, columns = region.any(1), region.any(0)
        assert torch.equal(region, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2
            assert line.any()
        assert float(region.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert len({tuple(region.flatten().tolist()) for region in regions}) > 40


def test_classmix_takes_half_of_the_classes():
    labels = torch.zeros(3, 8, 8, dtype=torch.int64)
    labels[0, :2], labels[0, 2:4], labels[0, 4:6] = 1, 2, 3
    labels[1, :4] = 3
    regions = classmix_regions(labels)
    for slice_labels, region, chosen in zip(labels, regions, (2, 1, 1), strict=True):
        kept = slice_labels[region].unique()
        assert len(kept) == chosen
        assert torch.equal(region, torch.isin(slice_labels, kept))  # whole classes


def test_supervised_loss_by_hand():
    """Two pixels of class 0, two of class 1, every probability ½: Dice 1 − 2·1/(1 + 2) each, cross-entropy log 2."""
    labels = torch.tensor([[[0, 0], [1, 1]]])
    loss = supervised_loss(torch.zeros(1, 2, 2, 2), labels)
    assert loss.item() == pytest.approx(0.5 * (1 / 3 + np.log(2)), abs=1e-5)
    perfect = 50.0 * torch.nn.functional.one_hot(labels, 2).movedim(-1, 1)
    assert supervised_loss(perfect, labels).item() == pytest.approx(0, abs=1e-6)


def test_pseudo_labels_count_by_the_images_confidence():
    logits, labels = torch.zeros(2, 4, 2, 2), torch.zeros(2, 2, 2, dtype=torch.int64)
    confidence = torch.tensor([[[0.99, 0.5], [0.5, 0.5]], [[0.97, 0.99], [0.99, 0.96]]])
    loss = pseudo_label_loss(logits, labels, confidence, threshold=0.97)
    assert loss.item() == pytest.approx((0.25 + 0.75) / 2 * np.log(4))
