"""The networks: what METHOD asks of their parts, the pyramid protocol in 2D and 3D, and a user's own network."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from action_kernels import SampledHead
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.networks import (
    DenseEmbeddings,
    EmbeddingsInTurn,
    SampledEmbeddings,
    SegmentationModel,
    adapt,
    build_network,
    load_network,
)
from action_kernels.trainer.networks.layers import InstanceNorm

SIZE = {2: (32, 48), 3: (32, 16, 16)}
NAMES = ["unet", "vnet", "basic-unet"]


def make(name, dims=2, **changes):
    torch.manual_seed(0)
    arguments = {"in_channels": 1, "num_classes": 3, "widths": (4, 6, 8, 10, 12), "norm": "batch"}
    return build_network(name, spatial_dims=dims, **{**arguments, **changes})


def images_for(dims, channels=1):
    return torch.randn(2, channels, *SIZE[dims], generator=torch.Generator().manual_seed(1))


def parameters_of(network):
    return sum(p.numel() for p in network.parameters())


# The protocol


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_pyramid(name, dims, norm):
    network = make(name, dims, norm=norm, in_channels=2)
    logits, pyramid = network(images_for(dims, channels=2))
    assert logits.shape == (2, 3, *SIZE[dims])
    assert len(pyramid) == len(network.channels)
    assert [level.shape[1] for level in pyramid] == list(network.channels)
    halvings = {"vnet": [8, 4, 2, 1, 1]}.get(name, [16, 8, 4, 2, 1])
    for level, factor in zip(pyramid, halvings, strict=True):
        assert level.shape[2:] == tuple(length // factor for length in SIZE[dims])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_sampled_head_reads_the_pyramid_and_gradients_reach_every_parameter(name, dims):
    model = SegmentationModel(make(name, dims), dims, num_classes=3, embedding_dim=5)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0  # of so few channels it may drop all
    logits, pyramid = model(images_for(dims))
    index = torch.tensor([0, 7, logits[:, 0].numel() - 1])
    dense = model.head.dense(pyramid).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(model.embeddings(pyramid).at(index), dense[index])
    (logits.square().mean() + model.embeddings(pyramid).at(index).square().mean()).backward()
    without = [key for key, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert not without
    assert not [
        key for key, p in model.named_parameters() if not p.grad.any() and "bias" not in key
    ]


@pytest.mark.parametrize("name", ["unet", "vnet"])
@pytest.mark.parametrize("levels", [2, 3, 6])
def test_any_number_of_levels(name, levels):
    network = make(name, widths=tuple(range(3, 3 + levels)))
    assert network.stride == 2 ** (levels - 1)
    logits, pyramid = network(torch.randn(1, 1, 2 * network.stride, network.stride))
    assert logits.shape[2:] == pyramid[-1].shape[2:] == (2 * network.stride, network.stride)
    assert [level.shape[1] for level in pyramid] == list(network.channels)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_a_network_of_its_own(name, dims):
    student = SegmentationModel(make(name, dims), dims, num_classes=3, embedding_dim=5).eval()
    teacher = copy.deepcopy(student).requires_grad_(False)
    images = images_for(dims)
    assert torch.equal(student(images)[0], teacher(images)[0])
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert not torch.equal(student(images)[0], teacher(images)[0])


# The published architectures


def test_the_unet_is_the_published_one():
    network = build_network(
        "unet",
        spatial_dims=2,
        in_channels=1,
        num_classes=4,
        widths=(16, 32, 64, 128, 256),
        norm="batch",
    )
    blocks = [*network.encoder, *network.decoder]
    assert [block.conv_2.out_channels for block in blocks] == [
        16,
        32,
        64,
        128,
        256,
        128,
        64,
        32,
        16,
    ]
    ratios = [block.dropout.p for block in network.encoder]
    assert ratios == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert not any(isinstance(m, nn.Dropout) for block in network.decoder for m in block.modules())
    assert {block.activation.negative_slope for block in blocks} == {0.01}
    assert all(up.kernel_size == up.stride == (2, 2) for up in network.upsampling)
    assert network.output.kernel_size == (3, 3)
    # Counted by hand: 9 Σ c·c' of the convolutions, 4 Σ c·c' + c' of the transposed ones, 4 c of a level's two
    # normalisations, and the output's weights and biases.
    encoder = 9 * (1 * 16 + 16 * 16 + sum(w * (w // 2) + w * w for w in (32, 64, 128, 256)))
    decoder = sum(9 * (2 * w * w + w * w) + 4 * 2 * w * w + w for w in (16, 32, 64, 128))
    norms = 4 * (16 + 32 + 64 + 128 + 256) + 4 * (16 + 32 + 64 + 128)
    assert parameters_of(network) == encoder + decoder + norms + 9 * 16 * 4 + 4


def test_the_vnet_is_the_published_one():
    network = build_network(
        "vnet",
        spatial_dims=3,
        in_channels=1,
        num_classes=2,
        widths=(16, 32, 64, 128, 256),
        norm="batch",
    )
    assert network.channels == (128, 64, 32, 16, 16)
    assert [len(level) for level in network.encoder] == [1, 2, 3, 3, 3]
    assert [len(level) for level in network.decoder] == [3, 3, 2, 1]
    assert network.dropout.p == 0.5
    assert isinstance(network.dropout, nn.Dropout3d)
    assert network.output.kernel_size == (1, 1, 1)
    assert parameters_of(network) == pytest.approx(9.4e6, rel=0.01)


def test_dropout_is_in_the_encoder_of_the_unet_alone():
    network = make("unet", dropout=0.9).train()
    for module in network.modules():  # statistics would differ with what was dropped
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = images_for(2)
    first, second = network(images)[0], network(images)[0]
    assert not torch.equal(first, second)
    for block in network.encoder:
        block.dropout.eval()
    assert torch.equal(network(images)[0], network(images)[0])


def test_the_vnet_drops_whole_channels_at_the_bottleneck_and_before_the_output():
    network = make("vnet", 3).train()
    seen = []
    network.dropout.register_forward_hook(
        lambda _module, inputs, output: seen.append((*inputs, output))
    )
    network(images_for(3))
    assert [tuple(output.shape[1:2]) for _, output in seen] == [(12,), (4,)]
    for before, after in seen:
        dropped = (after == 0).flatten(2).all(2)
        assert dropped.any()
        kept = ~dropped[:, :, None, None, None] & torch.ones_like(after, dtype=torch.bool)
        torch.testing.assert_close(after[kept], 2 * before[kept])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_instance_normalisation_is_pytorchs(dims, channels_last):
    ours, theirs = InstanceNorm(5), (nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2](5, affine=True)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.uniform_(-1, 1)
    theirs.load_state_dict(ours.state_dict())
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    features = 3 + torch.randn(3, 5, *SIZE[dims])
    if channels_last:
        features = features.contiguous(memory_format=layout)
    found = []
    for norm in (ours, theirs):
        leaf = features.clone(memory_format=torch.preserve_format).requires_grad_()
        out = norm(leaf)
        out.square().sum().backward()
        found.append((out, leaf.grad, norm.weight.grad, norm.bias.grad))
    assert found[0][0].is_contiguous(memory_format=layout) == channels_last
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-4)


def test_names_in_a_state_dict_stay():
    unet, vnet = make("unet", widths=(2, 4)), make("vnet", 3, widths=(2, 4))
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = ["conv_1.weight", *(f"norm_1.{n}" for n in norm), "conv_2.weight", *(f"norm_2.{n}" for n in norm)]  # fmt: skip
    assert list(unet.state_dict()) == [
        *(f"encoder.{level}.{key}" for level in range(2) for key in block),
        "upsampling.0.weight", "upsampling.0.bias",
        *(f"decoder.0.{key}" for key in block),
        "output.weight", "output.bias",
    ]  # fmt: skip
    unit = ["0.weight", *(f"1.{n}" for n in norm)]
    assert list(vnet.state_dict()) == [
        *(f"encoder.0.0.{key}" for key in unit),
        *(f"encoder.1.{depth}.{key}" for depth in range(2) for key in unit),
        *(f"downsampling.0.{key}" for key in unit),
        *(f"upsampling.0.{key}" for key in unit),
        *(f"decoder.0.0.{key}" for key in unit),
        "output.weight", "output.bias",
    ]  # fmt: skip


# Errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 40, 32), r"size \(40, 32\) do not fit .* multiple of 16"),
        ((1, 1, 0, 32), r"size \(0, 32\) do not fit"),
        ((1, 2, 32, 32), r"shape \(batch, 1, \*size\) with 2 axes in size, got \(1, 2, 32, 32\)"),
        ((1, 1, 32, 32, 32), r"with 2 axes in size, got \(1, 1, 32, 32, 32\)"),
    ],
)
def test_images_that_do_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        make(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 1}, "spatial_dims must be 2 or 3, got 1"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"num_classes": 1}, "num_classes must be at least 2, background included, got 1"),
        ({"widths": (4,)}, r"widths must be .* got \(4,\)"),
        ({"widths": (4, 0, 4, 4, 4)}, r"widths must be .* got \(4, 0, 4, 4, 4\)"),
        ({"norm": "layer"}, "norm must be 'batch' or 'instance', got 'layer'"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_errors_name_the_argument(name, change, message):
    with pytest.raises(TrainerError, match=message):
        make(name, **change)


def test_other_errors_of_building():
    with pytest.raises(TrainerError, match="'resnet' was given, one of basic-unet, unet, vnet or"):
        make("resnet")
    with pytest.raises(TrainerError, match="five channel counts"):
        make("basic-unet", widths=(4, 4))
    with pytest.raises(TypeError, match=r"network must have channels, .* got Linear"):
        SegmentationModel(nn.Linear(2, 2), 2, 2, 2)


# A user's own network

MONAI_LEVELS = ["upsamples.0", "upsamples.1", "upsamples.2"]


def monai_network(dims=2):
    from monai.networks.nets import DynUNet

    torch.manual_seed(0)
    return DynUNet(
        dims,
        1,
        3,
        [3, 3, 3, 3],
        [1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[4, 6, 8, 10],
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_of_monai_is_adapted(dims):
    theirs = monai_network(dims)
    images = images_for(dims)
    expected = theirs(images)
    network = adapt(theirs, levels=MONAI_LEVELS)
    assert network.channels == (8, 6, 4)
    logits, pyramid = network(images)
    assert torch.equal(logits, expected)
    assert [level.shape[1] for level in pyramid] == [8, 6, 4]
    assert pyramid[-1].shape[2:] == images.shape[2:]
    model = SegmentationModel(network, dims, num_classes=3, embedding_dim=5)
    embeddings = model.embeddings(model(images)[1]).at(torch.arange(9))
    embeddings.square().sum().backward()
    assert theirs.upsamples[0].conv_block.conv1.conv.weight.grad.any()


def test_an_adapted_network_is_copied_saved_and_left_as_it_was():
    theirs = monai_network().train()
    hooks = len(theirs.upsamples[0]._forward_hooks)
    network = adapt(theirs, levels=MONAI_LEVELS)
    assert all(module.training for module in theirs.modules())
    assert list(network.state_dict()) == [f"model.{key}" for key in theirs.state_dict()]
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    images = images_for(2)
    assert all(level.abs().sum() > 0 for level in twin(images)[1])  # the copy's own maps
    assert all(level.abs().sum() == 0 for level in network(images)[1])
    assert len(theirs.upsamples[0]._forward_hooks) == hooks
    pickle.loads(pickle.dumps(network))


class Coarse(nn.Module):
    """Logits at full size from features at half of it."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 4, 4, stride=4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.out = nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.twice = nn.Identity()

    def forward(self, images):
        return self.out(self.twice(self.up(self.twice(self.down(images)))))


def test_a_finest_level_coarser_than_the_logits_is_upsampled():
    network = adapt(Coarse(), levels=["down", "up"])
    _, pyramid = network(images_for(2))
    assert [tuple(level.shape[1:]) for level in pyramid] == [(4, 8, 12), (6, *SIZE[2])]
    half = network.model.up(pyramid[0])
    expected = nn.functional.interpolate(half, SIZE[2], mode="bilinear", align_corners=True)
    torch.testing.assert_close(pyramid[1], expected)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "levels must be names"),
        ("down", "levels must be names"),
        (["down", "upp"], "no submodule 'upp'; it has up"),
        (["down", "down"], "levels must differ"),
        (["up", "down"], "levels must run from coarse to fine"),
        (["down", "twice"], "'twice' was called 2 times"),
    ],
)
def test_levels_that_do_not_fit(levels, message):
    with pytest.raises(ValueError, match=message):
        adapt(Coarse(), levels)


def test_other_errors_of_adapting():
    class Two(Coarse):
        def forward(self, images):
            return (super().forward(images),) * 2

    with pytest.raises(TypeError, match="logits as one tensor, got tuple"):
        adapt(Two(), ["down", "up"])
    with pytest.raises(ValueError, match="channels must be 2 counts, one a level, got 1"):
        adapt(Coarse(), ["down", "up"], channels=[4])
    with pytest.raises(ValueError, match="no 2D or 3D convolution"):
        adapt(nn.Sequential(nn.Linear(2, 2)), ["0"])
    with pytest.raises(ValueError, match=r"'1' returns \(1, 262144\), wanted is a map"):
        adapt(
            nn.Sequential(nn.Conv2d(1, 64, 1), nn.Flatten(), nn.Unflatten(1, (64, 64, 64))), ["1"]
        )


FACTORY = """
from torch import nn

class Net(nn.Conv2d):
    channels = (3,)
    def forward(self, images):
        logits = super().forward(images)
        return logits, (logits,)

def make(spatial_dims, in_channels, num_classes):
    return Net(in_channels, num_classes, spatial_dims + 1, padding=1)

def bare(**_):
    return nn.Conv2d(1, 1, 1)

number = 3
"""


def test_a_users_factory_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_networks_of_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    network = make("my_networks_of_test:make", in_channels=2)
    assert network(torch.zeros(1, 2, 8, 8))[0].shape == (1, 3, 8, 8)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks_of_test:", "package.module:factory or a network's name is accepted"),
        (":make", "package.module:factory or a network's name is accepted"),
        ("no_such_module_here:make", "No module named 'no_such_module_here'"),
        ("my_networks_of_test:missing", "has no attribute 'missing'"),
        ("my_networks_of_test:number", "is no function or class, but 3"),
        ("my_networks_of_test:bare", "made a Conv2d; wanted is a torch module with channels"),
    ],
)
def test_factories_that_do_not_fit(tmp_path, monkeypatch, name, message):
    (tmp_path / "my_networks_of_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainerError, match=message):
        load_network(name, spatial_dims=2, in_channels=1, num_classes=2)


def test_a_factory_of_a_package():
    code = (
        "from action_kernels.trainer.networks import load_network as l;"
        "n = l('action_kernels.trainer.networks:UNet', spatial_dims=2, in_channels=1, num_classes=2);"
        "print(type(n).__name__, n.channels)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "UNet (256, 128, 64, 32, 16)"


@pytest.mark.parametrize("kind", [SampledEmbeddings, DenseEmbeddings])
def test_embeddings_in_turn_are_those_of_the_pyramids_put_together(kind):
    """At pixels of both passes, absent ones too, with gradients; and the means of the classes, one in the first alone."""
    generator = torch.Generator().manual_seed(0)
    head = SampledHead((4, 3), 5, 2).double()
    pyramids = [
        [torch.randn(images, channels, side, side, generator=generator).double().requires_grad_()
         for channels, side in ((4, 4), (3, 7))]
        for images in (2, 1)
    ]  # fmt: skip
    first, second = (kind(head, tuple(pyramid), 3) for pyramid in pyramids)
    together = kind(head, tuple(torch.cat(levels) for levels in zip(*pyramids, strict=True)), 3)
    index = torch.randint(0, 3 * 49, (2, 40), generator=generator)
    index[0, :5] = -1
    labels = torch.randint(-1, 2, (3, 7, 7), generator=generator)
    labels[0, 0, :3] = 2
    turn = EmbeddingsInTurn(first, second, 2, 49)
    weights = torch.randn(2, 40, 5, generator=generator).double()
    leaves = [level for pyramid in pyramids for level in pyramid]
    found, wanted = turn.at(index), together.at(index)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
    )
    torch.testing.assert_close(turn.prototypes(labels), together.prototypes(labels))
