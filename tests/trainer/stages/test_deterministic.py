"""With --deterministic a step uses no op that PyTorch documents to raise on CUDA."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What the documentation says, and the ops that it means.
RAISING = {
    "AvgPool3d": ["avg_pool3d_backward"],
    "AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "MaxPool3d": ["max_pool3d_with_indices_backward"],
    "AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "MaxUnpool1d": ["max_unpool2d"],
    "MaxUnpool2d": ["max_unpool2d"],
    "MaxUnpool3d": ["max_unpool3d"],
    "interpolate": [f"upsample_{kind}_backward" for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")],
    "ReflectionPad1d": ["reflection_pad1d_backward"],
    "ReflectionPad2d": ["reflection_pad2d_backward"],
    "ReflectionPad3d": ["reflection_pad3d_backward"],
    "ReplicationPad1d": ["replication_pad1d_backward"],
    "ReplicationPad2d": ["replication_pad2d_backward"],
    "ReplicationPad3d": ["replication_pad3d_backward"],
    "NLLLoss": ["nll_loss2d_forward", "nll_loss2d_backward"],
    "CTCLoss": ["_ctc_loss_backward"],
    "EmbeddingBag": ["_embedding_bag_backward"],
    "put_": ["put_"],
    "histc": ["histc"],
    "bincount": [],  # with weights: a step counts without
    "kthvalue": ["kthvalue"],
    "median": ["median.dim", "nanmedian.dim"],
    "grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "cumsum": ["cumsum"],  # of floating point
    "scatter_reduce": ["scatter_reduce"],
    "resize_": [],  # of quantised tensors
}  # fmt: skip
UNDOCUMENTED = ["max_pool2d_with_indices_backward"]  # raises on CUDA too


def documented() -> list[str]:
    """The names in PyTorch's list of ops that raise."""
    text = torch.use_deterministic_algorithms.__doc__
    listed = text[text.index("operations will throw a") :]
    listed = listed[: listed.index("In addition")] if "In addition" in listed else listed
    return re.findall(r"^\s*\* :(?:class|func):`torch\.(?:[\w.]*\.)?(\w+)`", listed, re.MULTILINE)


class Recorder(TorchDispatchMode):
    """The names of all ops, forward and backward, with the dtype of their first tensor."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, function, _types, arguments=(), keywords=None):
        floating = any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in arguments)
        self.seen.add((str(function).removeprefix("aten."), floating))
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def raising(seen: set[tuple[str, bool]]) -> set[str]:
    names = [*UNDOCUMENTED, *(name for names in RAISING.values() for name in names)]
    return {
        found
        for found, floating in seen
        for name in names
        if (found == name or found.startswith(f"{name}.")) and (floating or name != "cumsum")
    }


def test_the_list_covers_the_documentation():
    names = documented()
    assert len(names) > 15
    assert set(names) <= set(RAISING)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "supervised", "mean_teacher"])
def test_no_op_of_a_step_raises(make_stage, make_batch, deterministic, name):
    stage, batch = make_stage(name), make_batch()
    stage.step(batch, 0)
    with Recorder() as recorder:
        stage.step(batch, 1)
    assert {"convolution.default", "convolution_backward.default"} <= {n for n, _ in recorder.seen}
    assert not raising(recorder.seen)


def test_the_recorder_sees_what_raises():
    images = torch.randn(1, 2, 4, 4, requires_grad=True)
    with Recorder() as recorder:
        torch.nn.functional.max_pool2d(images, 2).sum().backward()
        torch.nn.functional.cross_entropy(images, torch.zeros(1, 4, 4, dtype=torch.int64))
        images.detach().cumsum(1)
    assert {name.split(".")[0] for name in raising(recorder.seen)} >= {
        "max_pool2d_with_indices_backward", "nll_loss2d_forward", "cumsum"
    }  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
def test_the_deterministic_pooling_is_max_pooling(deterministic, dims):
    from action_kernels.trainer.networks.layers import max_pooled

    features = torch.randn(2, 3, *[4, 6, 8][:dims], requires_grad=True)
    found = max_pooled(features)
    (gradient,) = torch.autograd.grad(found.square().sum(), features)
    torch.use_deterministic_algorithms(False)
    wanted = max_pooled(features)
    (expected,) = torch.autograd.grad(wanted.square().sum(), features)
    assert torch.equal(found, wanted)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("size", [(24, 16), (7, 12), (9, 10, 11)])
def test_average_pooling_is_adaptive_pooling(size):
    from action_kernels.trainer.method.distillation import average_pooled

    pooling = {
        2: torch.nn.functional.adaptive_avg_pool2d,
        3: torch.nn.functional.adaptive_avg_pool3d,
    }
    maps = torch.randn(2, 3, *size)
    whole = [[slice(0, length)] for length in size]
    torch.testing.assert_close(average_pooled(maps, whole, 4)[0], pooling[len(size)](maps, 4))
