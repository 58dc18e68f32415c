"""The teacher: averaged parameters, copied statistics, and a forward pass that moves nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from action_kernels.trainer.method.teacher import make_teacher, ramped_momentum, update_teacher
from action_kernels.trainer.networks import UNet


@pytest.fixture(params=["batch", "instance"])
def student(request):
    torch.manual_seed(0)
    return UNet(2, 1, 3, (4, 8, 8), request.param, dropout=0.5).train()


def test_its_forward_moves_nothing_and_drops_nothing(student):
    teacher = make_teacher(student)
    before = copy.deepcopy(teacher.state_dict())
    images = torch.randn(4, 1, 16, 16)
    first, second = teacher(images)[0], teacher(images)[0]
    assert torch.equal(first, second)  # dropout of ½ would differ
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert before.keys() == student.state_dict().keys()


def test_it_normalises_as_the_student_does_in_training(student):
    """Without dropout both are the same function of a batch, whatever the running statistics hold."""
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    teacher = make_teacher(student)
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(7)
    images = torch.randn(4, 1, 16, 16)
    assert torch.equal(teacher(images)[0], student(images)[0])


def test_parameters_are_averaged_and_buffers_copied(student):
    teacher = make_teacher(student)
    before = copy.deepcopy(teacher.state_dict())
    parameters = {name for name, _ in student.named_parameters()}
    with torch.no_grad():
        for value in student.state_dict().values():
            value.add_(2)
    update_teacher(teacher, student, momentum=0.9)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[name] + (0.2 if name in parameters else 2))
    update_teacher(teacher, student, momentum=0.0)
    for value, other in zip(
        teacher.state_dict().values(), student.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_ramp():
    assert [ramped_momentum(0.99, i) for i in (0, 1, 3)] == [0.0, 0.5, 0.75]
    assert ramped_momentum(0.99, 1000) == 0.99
