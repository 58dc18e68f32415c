"""FeatureTap: features of somebody else's network in training, nothing in validation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from action_kernels import SAACL, FeatureTap, supcon_loss


class Network(nn.Module):
    """Logits from features, or a list of logits, finest first."""

    def __init__(self, deep_supervision: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 2, 1)
        self.deep_supervision = deep_supervision

    def forward(self, images):
        logits = self.head(self.features(images))
        return [logits, logits[..., ::2, ::2]] if self.deep_supervision else logits


IMAGES = torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(2, (2, 6, 5), generator=torch.Generator().manual_seed(1))


def expected_gradients(network):
    """Of supcon_loss over the features, without a tap."""
    network = copy.deepcopy(network)
    supcon_loss(network.features(IMAGES), LABELS, num_classes=2).backward()
    return [parameter.grad for parameter in network.features.parameters()]


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_features_and_their_gradient(compiled, deep_supervision):
    torch.manual_seed(0)
    network = Network(deep_supervision)
    expected = expected_gradients(network)
    plain = network(IMAGES)
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(network, backend="aot_eager") if compiled else network
    with FeatureTap(run.features) as tap:
        for _ in range(3):
            network.zero_grad()
            output = run(IMAGES)
            torch.testing.assert_close(output, plain)
            supcon_loss(tap.take(), LABELS, num_classes=2).backward()
            for parameter, gradient in zip(network.features.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
    if compiled:
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True])
def test_validation_updates_no_state(compiled):
    """A loss that the validation calls as well, as nnU-Net does: SAACL's queue and means stay."""
    network, saacl = Network(), SAACL(num_classes=2, dim=8, queue_size=64)
    torch._dynamo.reset()
    run = torch.compile(network, backend="aot_eager") if compiled else network
    tap = FeatureTap(run.features)

    def loss(logits):
        features = tap.take()
        total = nn.functional.cross_entropy(logits, LABELS)
        return total if features is None else total + saacl(features, LABELS)

    run.train()
    in_training = loss(run(IMAGES))
    state = copy.deepcopy(saacl.state_dict())
    run.eval()
    logits = run(IMAGES)
    assert torch.equal(loss(logits), nn.functional.cross_entropy(logits, LABELS))
    for name, value in saacl.state_dict().items():
        assert torch.equal(value, state[name]), name
    run.train()
    again = loss(run(IMAGES))
    assert in_training > 0
    assert not torch.equal(saacl.state_dict()["queue.oldest"], state["queue.oldest"])
    again.backward()


def test_autocast_gives_half_precision():
    network = Network()
    tap = FeatureTap(network.features[0])
    with torch.autocast("cpu", torch.bfloat16):
        network(IMAGES)
        features = tap.take()
    assert features.dtype == torch.bfloat16
    supcon_loss(features, LABELS, num_classes=2).backward()
    assert network.features[0].weight.grad.norm() > 0


def test_the_first_of_several_outputs():
    network = Network(deep_supervision=True)
    tap = FeatureTap(network)
    logits = network(IMAGES)
    assert tap.take() is logits[0]


def test_under_ddp(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        network = nn.parallel.DistributedDataParallel(Network())
        tap = FeatureTap(network.module.features)
        logits = network(IMAGES)
        (supcon_loss(tap.take(), LABELS, num_classes=2) + logits.sum()).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_is_not_tapped():
    """A teacher made by deepcopy, and a network that was saved whole."""
    student = Network()
    tap = FeatureTap(student.features)
    teacher, loaded = copy.deepcopy(student), pickle.loads(pickle.dumps(student))
    student(IMAGES)
    teacher(IMAGES + 1)
    loaded(IMAGES + 1)
    features = tap.take()
    student.eval()
    torch.testing.assert_close(features, _as_trained(student))
    own = FeatureTap(teacher.features)
    teacher(IMAGES)
    assert own.take().shape == features.shape


def _as_trained(network):
    other = copy.deepcopy(network).train()
    return other.features(IMAGES)


def test_without_a_pass_it_says_why():
    network = Network()
    tap = FeatureTap(network.features)
    with pytest.raises(RuntimeError, match="has not run"):
        tap.take()
    network(IMAGES)
    tap.take()
    with pytest.raises(RuntimeError, match="taken already"):
        tap.take()
    with tap:
        network(IMAGES)
    with pytest.raises(RuntimeError, match="closed"):
        tap.take()
    tap.close()
    assert not network.features._forward_hooks


def test_a_network_compiled_before_it_was_tapped_is_told():
    """Its hooks are not looked for again; silence would leave the contrast out."""
    torch._dynamo.reset()
    network = torch.compile(Network(), backend="aot_eager")
    network(IMAGES)
    tap = FeatureTap(network.features)
    network(IMAGES)
    with pytest.raises(RuntimeError, match="before its first pass"):
        tap.take()


@pytest.mark.parametrize("module", ["features", None, torch.zeros(1)])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match="module must be a submodule"):
        FeatureTap(module)


def test_what_returns_no_tensor_is_told():
    class Odd(nn.Module):
        def forward(self, images):
            return {"features": images}

    odd = Odd()
    tap = FeatureTap(odd)
    odd(IMAGES)
    with pytest.raises(TypeError, match=r"must return a tensor.*dict"):
        tap.take()
