"""Each stage's step: which losses, what they reach, what they must not see, in two and three dimensions."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from trainer.comparing_states import assert_equal

from action_kernels.trainer.data.sampling import Batch
from action_kernels.trainer.data.task import ACDC, Task
from action_kernels.trainer.errors import TrainerError

NAMES = ("pretrain", "finetune", "supervised", "mean_teacher")
SOLID = Task(
    "solid",
    ("background", "organ", "tumour"),
    ("#00000000", "#ff0000", "#00ff00"),
    3,
    "mm",
    channels=2,
)
LOSSES = {
    "pretrain": {"supervised", "global", "local"},
    "finetune": {"supervised", "pseudo_label", "saacl", "anco"},
    "supervised": {"supervised"},
    "mean_teacher": {"supervised", "consistency"},
}


@pytest.mark.parametrize("task", [ACDC, SOLID], ids=["2D", "3D"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_two_and_three_dimensions(make_stage, make_batch, name, task):
    network = "vnet" if task is SOLID else "unet"
    size = {"patch_size": 16, "network": network, "widths": (4, 6, 8)}
    stage = make_stage(name, task, **size)
    for iteration in range(2):
        losses = stage.step(make_batch(task, size=16), iteration)
    assert set(losses) == LOSSES[name] | {"total"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not any(loss.requires_grad for loss in losses.values())
    assert stage.schedules(0)["learning_rate"] == 0.05


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("mix", ["cutmix", "classmix", "none"])
def test_variants_take_a_step(make_stage, make_batch, amp, norm, mix):
    stage = make_stage("finetune", amp=amp, norm=norm, mix=mix, pseudo_label_weighting="pixel")
    losses = stage.step(make_batch(), 0)
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_curve_in_bf16_stays_with_float32s(make_stage, make_batch, name):
    curves, seeded = {}, functools.partial(make_batch, ACDC, 32, 2)
    for amp in ("off", "bf16"):
        stage = make_stage(name, amp=amp, dropout=0.0, max_iterations=20, pretrain_iterations=20)
        torch.manual_seed(0)
        batches = [replace(b, labels=(b.images[:, 0] > 0).long()) for b in map(seeded, range(3))]
        steps = [stage.step(batches[i % 3], i) for i in range(20)]
        curves[amp] = torch.stack([losses["supervised"] for losses in steps])
    fallen = curves["off"][:3].mean() - curves["off"][-3:].mean()
    assert fallen > 0.1
    assert (curves["bf16"] - curves["off"]).abs().max() < 0.2 * fallen


def test_leaving_out_the_contrastive_losses(make_stage, make_batch):
    names = {}
    for saacl in (0.0, 0.01):
        for anco in (0.0, 0.01):
            stage = make_stage("finetune", saacl_weight=saacl, anco_weight=anco)
            losses = stage.step(make_batch(), 0)
            names[bool(saacl), bool(anco)] = set(losses) - {"supervised", "pseudo_label", "total"}
            weighted = losses["supervised"] + losses["pseudo_label"]
            weighted = weighted + saacl * losses.get("saacl", 0) + anco * losses.get("anco", 0)
            torch.testing.assert_close(losses["total"], weighted)
    assert names == {
        (False, False): set(), (False, True): {"anco"}, (True, False): {"saacl"}, (True, True): {"saacl", "anco"}
    }  # fmt: skip


@pytest.mark.parametrize("weights", [(0.01, 0.0), (0.0, 0.01)])
def test_contrastive_losses_reach_head_and_network(make_stage, make_batch, weights):
    stage = make_stage("finetune", saacl_weight=weights[0], anco_weight=weights[1])
    stage.step(make_batch(), 0)
    assert stage.student.head.neighbourhood.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in stage.teacher.parameters())


def test_distillation_reaches_projections_predictors_and_network(make_stage, make_batch):
    stage = make_stage("pretrain")
    stage.step(make_batch(), 0)
    for module in (stage.projections, stage.predictors, stage.network):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in module.named_parameters() if "bias" not in n)  # fmt: skip
    for module in (stage.teacher, stage.teacher_projections):
        assert all(parameter.grad is None for parameter in module.parameters())


def test_the_teachers_heads_follow_the_students(make_stage, make_batch):
    """A published fault: teacher heads that stay random."""
    stage = make_stage("pretrain", trained=True)  # no ramp
    before = copy.deepcopy(stage.teacher_projections.state_dict())
    stage.step(make_batch(), 0)
    for name, value in stage.teacher_projections.state_dict().items():
        wanted = before[name].lerp(stage.projections.state_dict()[name], 0.01)
        torch.testing.assert_close(value, wanted)


def test_banks_hold_the_teachers_latest_vectors(make_stage, make_batch):
    stage = make_stage("pretrain", pretrain_bank_size=6)
    before = {name: bank.vectors.clone() for name, bank in stage.banks.items()}
    stage.step(make_batch(), 0)
    assert before["local"].shape[0] == 36  # a bank for every window position
    for name, bank in stage.banks.items():
        torch.testing.assert_close(bank.vectors[:, :2], before[name][:, 4:])  # 4 images were added
        torch.testing.assert_close(bank.vectors.norm(dim=-1), torch.ones(bank.vectors.shape[:2]))


def test_initialise_puts_the_student_into_student_and_teacher(make_stage, make_batch):
    source = make_stage("pretrain", seed=5)
    source.step(make_batch(), 0)
    for name in ("finetune", "mean_teacher", "pretrain"):
        stage = make_stage(name)
        stage.initialise({"network": source.network.state_dict()})
        for part in ("network", "teacher"):
            assert_equal(dict(stage.modules[part].state_dict()), dict(source.network.state_dict()))
    stage = make_stage("finetune", trained=True, teacher_momentum=0.9)
    stage.initialise({"network": source.network.state_dict()})
    before = {n: p.clone() for n, p in stage.teacher.named_parameters()}
    stage.step(make_batch(), 0)
    for name, parameter in stage.teacher.named_parameters():  # full momentum from the first step
        student = stage.student.get_parameter(name)
        torch.testing.assert_close(parameter, before[name].lerp(student, 0.1))


def test_labelled_and_unlabelled_images_do_not_share_batch_statistics(make_stage, make_batch):
    """What the unlabelled images hold does not change the labelled loss of the same step."""
    batch = make_batch()
    for name in ("pretrain", "finetune", "mean_teacher"):
        losses = []
        for factor in (1.0, 100.0):
            changed = Batch(batch.images, batch.labels, factor * batch.unlabelled)
            losses.append(make_stage(name, norm="batch").step(changed, 0)["supervised"])
        assert torch.equal(*losses), name


def test_the_teacher_sees_weak_images_and_the_student_strong_ones(
    make_stage, make_batch, monkeypatch
):
    seen = {"teacher": [], "student": []}
    stage, batch = make_stage("finetune", mix="none"), make_batch()
    for name, model in (("teacher", stage.teacher), ("student", stage.student)):
        model.register_forward_pre_hook(
            lambda _m, inputs, n=name: seen[n].append(inputs[0].clone())
        )
    torch.manual_seed(3)
    for iteration in range(4):
        stage.step(batch, iteration)
    assert all(any(torch.equal(image, weak) for weak in (batch.images, batch.unlabelled)) for image in seen["teacher"])  # fmt: skip
    strong = [image for image in seen["student"] if not torch.equal(image, batch.images)]
    assert any(not torch.equal(image, batch.unlabelled) for image in strong)


def test_the_relation_of_classes_follows_the_schedule(make_stage, make_batch, monkeypatch):
    from action_kernels.trainer.stages import finetune

    asked = []
    real = finetune.draw_negatives

    def draw(*arguments, temperature, **keywords):
        asked.append(temperature)
        return real(*arguments, temperature=temperature, **keywords)

    monkeypatch.setattr(finetune, "draw_negatives", draw)
    stage = make_stage("finetune", max_iterations=10)
    for iteration in (0, 5):
        stage.step(make_batch(), iteration)
    assert asked == [stage.temperature(0), stage.temperature(5)] == [1.0, pytest.approx(0.1)]


def test_optimisers_are_those_of_the_paper(make_stage):
    for name, nesterov in (("pretrain", False), ("finetune", True)):
        stage = make_stage(name, momentum=0.9, weight_decay=1e-4)
        (group,) = stage.optimisation.optimizer.param_groups
        assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (
            nesterov,
            0.9,
            1e-4,
        )
    stage = make_stage("finetune", max_iterations=100, learning_rate=0.2)
    assert stage.optimisation.rate(75) == pytest.approx(0.2 * 0.25**0.9)
    assert make_stage("pretrain", pretrain_learning_rate=0.3).optimisation.rate(0) == 0.3


def test_a_batch_without_a_class(make_stage, make_batch):
    batch = make_batch()
    stage = make_stage("finetune")
    losses = stage.step(Batch(batch.images, torch.zeros_like(batch.labels), batch.unlabelled), 0)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not (stage.saacl.queue.labels > 0).any()


def test_mean_teachers_ramp(make_stage):
    stage = make_stage(
        "mean_teacher", max_iterations=100, consistency_weight=2.0, consistency_ramp=0.5
    )
    assert stage.weight(0) == pytest.approx(2 * 2.718281828**-5)
    assert stage.weight(50) == stage.weight(99) == 2.0
    assert make_stage("mean_teacher", consistency_ramp=0.0).weight(0) == 0.1


def test_dropout_is_the_networks_own_by_default(make_stage):
    ratios = [m.p for m in make_stage("supervised").network.modules() if isinstance(m, nn.Dropout)]
    assert ratios == [0.05, 0.1, 0.2, 0.3, 0.5]
    off = make_stage("supervised", dropout=0.0).network
    assert not any(isinstance(m, nn.Dropout) and m.p for m in off.modules())


def test_patches_must_fit_the_network(make_stage):
    with pytest.raises(TrainerError, match=r"--patch-size: 40 40 was given, multiples of 16"):
        make_stage("supervised", patch_size=40)
    assert make_stage("supervised", patch_size=40, widths=(4, 4, 4, 4))
    with pytest.raises(TrainerError, match=r"--patch-size: 8 8 .* one pixel at the coarsest level"):
        make_stage("supervised", patch_size=8, widths=(4, 4, 4, 4))
    with pytest.raises(
        TrainerError, match=r"--pretrain-window: 64 64 .* at most the patch \(32 32\)"
    ):
        make_stage("pretrain", pretrain_window=64)


def test_a_users_own_network(make_stage, make_batch, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from monai.networks.nets import SegResNet\n"
        "from action_kernels.trainer.networks import adapt\n"
        "def network(*, spatial_dims, in_channels, num_classes):\n"
        "    model = SegResNet(spatial_dims, 8, in_channels, num_classes, blocks_down=(1, 1), blocks_up=(1,))\n"
        "    return adapt(model, ['down_layers.1', 'up_layers.0'])\n"
    )
    monkeypatch.chdir(tmp_path)
    task = replace(ACDC, channels=2)
    for name in NAMES:
        stage = make_stage(name, task, network="mine:network", patch_size=16)
        losses = stage.step(make_batch(task, size=16), 0)
        assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", [pytest.param("finetune", marks=pytest.mark.slow), "supervised"])
def test_the_loss_curve_of_bf16_stays_with_float32s(make_stage, make_batch, name):
    """Of 40 steps on four batches in turn: they learn, and apart they are by a fraction of what they learn."""
    batches = [make_batch(seed=seed) for seed in range(4)]
    for batch in batches:  # something to learn: labels that follow from the image
        batch.labels.copy_((batch.images[:, 0] > 0).long() + (batch.images[:, 0] > 1).long())
    curves = {}
    for amp in ("off", "bf16"):
        stage = make_stage(name, amp=amp, max_iterations=200, dropout=0.0, learning_rate=0.1)
        torch.manual_seed(3)
        curves[amp] = torch.stack(
            [stage.step(batches[step % 4], step)["supervised"] for step in range(40)]
        )
    learnt = curves["off"][:4].mean() - curves["off"][-4:].mean()
    assert learnt > 0.3 * curves["off"][:4].mean()
    assert (curves["bf16"] - curves["off"]).abs().mean() < 0.1 * learnt


def test_on_a_cpu_the_network_is_channels_last(make_stage, make_batch):
    stage = make_stage("finetune")
    _, pyramid = stage.student(make_batch().images)
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in pyramid)
    volumes = make_stage("supervised", SOLID, patch_size=16, network="vnet", widths=(4, 6, 8))
    _, pyramid = volumes.modules["network"](make_batch(SOLID, size=16).images)
    assert all(level.is_contiguous(memory_format=torch.channels_last_3d) for level in pyramid)
