"""Options carry their bounds; the JSON form is of a known format."""

from __future__ import annotations

import json
import math

import pytest

from action_kernels.trainer.configuration import (
    FORMAT,
    Configuration,
    converted,
    options,
    per_axis,
)
from action_kernels.trainer.data.task import LA
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.patch import VOXELS, chosen_patch, patch_by_rule
from action_kernels.trainer.presets import PRESETS, preset

NUMBERS = [
    option for option in options() if "int" in str(option.kind) or "float" in str(option.kind)
]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_iterations", 0, "--max-iterations: 0 was given, a whole number at least 1"),
        ("learning_rate", -1.0, "--learning-rate: -1.0 was given, a finite number greater than 0"),
        ("learning_rate", math.nan, "--learning-rate: nan was given"),
        ("seed", -1, "--seed: -1 was given, a whole number at least 0"),
        ("widths", (16, 0), "--widths: 0 was given, a whole number at least 1"),
        ("patch_size", 10**9, "--patch-size: 1000000000 was given, .* at most 4,096"),
        ("head", "round", "--head: round was given, one of sampled, dense"),
        (
            "temperature_high",
            0.05,
            "--temperature-high: 0.05 was given, at least --temperature-low",
        ),
        ("pretrain_temperature_high", 0.05, "--pretrain-temperature-high: 0.05 was given"),
        ("teacher_momentum", 1.0, "--teacher-momentum: 1.0 was given, .* at least 0 and below 1"),
        ("deterministic", "yes", "--deterministic: yes was given, true or false"),
        ("data", 3, "--data: 3 was given, text"),
        ("data", "", "--data: '' was given, text that is not empty is accepted"),
        ("init_from", "", "--init-from: '' was given, text that is not empty is accepted"),
    ],
)
def test_bad_values_name_the_option(key, value, message):
    with pytest.raises(TrainerError, match=message):
        preset("demo", **{key: value})


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.key)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -(10**30), 10**30, True, "1", [1.5], {}]
)
def test_no_number_takes_what_is_none(option, value):
    """Whatever is not finite, huge, or of another type is refused with the option's name, or in bounds."""
    if option.bounds["most"] is None and option.bounds["below"] is None and value == 10**30:
        return  # learning rates and weights have no upper bound: they ask for no memory
    if value == [1.5] and "tuple[float" in str(option.kind):
        value = [1.5, "1"]
    with pytest.raises(TrainerError, match=option.name):
        converted(option, value)


@pytest.mark.parametrize(("name", "labelled"), [("la-5", 4), ("la-10", 8)])
def test_the_papers_settings_on_la(name, labelled):
    config = preset(name)
    assert config.data.labelled_patients == labelled
    assert (config.data.labelled_batch, config.data.unlabelled_batch) == (2, 2)
    assert (config.data.fit, config.data.patch_size) == ("crop", (112, 112, 80))
    assert config.data.stride == (18, 18, 4)
    assert (config.network.network, config.network.widths) == ("vnet", (16, 32, 64, 128, 256))
    pretrain = config.pretrain
    assert (pretrain.iterations, config.finetune.max_iterations) == (5000, 15_000)
    assert (pretrain.window, pretrain.pooled, pretrain.global_dim) == ((20,), 4, 128)
    assert (pretrain.temperature_low, pretrain.teacher_temperature_low) == (0.1, 0.6)
    assert config.run.final_list == "val"  # the test list is read when asked for


@pytest.mark.parametrize(
    ("shape", "stride", "patch"),
    [
        ((190.5, 142, 88), 16, (128, 112, 64)),
        ((64, 64, 48), 16, (64, 64, 48)),
        ((50, 50, 7), 8, (48, 48, 8)),
        ((1000, 3, 3), 16, (992, 16, 16)),
        ((512, 512, 20), 16, (240, 256, 16)),
    ],
)
def test_patches_by_the_rule(shape, stride, patch):
    """Proportions of the image, multiples of the stride, no more voxels than the published crops."""
    found = patch_by_rule(shape, stride, VOXELS[3])
    assert all(length % stride == 0 for length in found)
    assert math.prod(found) <= VOXELS[3]
    assert found == patch


def test_a_patch_is_chosen_where_none_is_given():
    config = preset("volumes")
    assert config.data.patch_size is None
    assert chosen_patch(config, LA, (95.0, 71.0, 44.0)).data.patch_size == (96, 64, 48)
    assert chosen_patch(preset("la-5"), LA, None).data.patch_size == (112, 112, 80)
    with pytest.raises(TrainerError, match="--patch-size: none was given, and LA has no rule"):
        chosen_patch(config, LA, None)


def test_a_spacing_is_numbers_above_zero():
    assert preset("demo", spacing=1.25).data.spacing == (1.25,)
    assert preset("demo", spacing=[1, 1.5, 2]).data.spacing == (1, 1.5, 2)
    with pytest.raises(
        TrainerError,
        match="--spacing: 0 was given, a finite number at most 1,000 and greater than 0",
    ):
        preset("demo", spacing=(1.0, 0))
    with pytest.raises(
        TrainerError, match=r"--spacing: 1\.0 2\.0 was given, one number, or one for each"
    ):
        per_axis("--spacing", (1.0, 2.0), 3)


def test_round_trip(tmp_path):
    for name in PRESETS:
        config = preset(name, patch_size=(64, 32), init_from="somewhere")
        config.save(tmp_path / "configuration.json")
        assert Configuration.load(tmp_path / "configuration.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["configuration.json"]


def test_damaged_configurations(tmp_path):
    path = tmp_path / "configuration.json"
    values = preset("demo").as_dict()
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "does not hold a configuration but list"),
        ('{"max_iterations": 1}', "is of format 1, this version reads format 2"),
        (json.dumps({"format": FORMAT + 1}), "is of format 3"),
        (json.dumps({**values, "colour": {}}), "does not know: colour"),
        (json.dumps({**values, "run": {"colour": 1}}), "run names what .* does not know: colour"),
        (json.dumps({**values, "run": 3}), "run holds 3, a group"),
        (json.dumps({**values, "run": {"seed": "x"}}), "configuration.json: --seed: x was given"),
    ):
        path.write_text(content)
        with pytest.raises(TrainerError, match=message):
            Configuration.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainerError, match="is not JSON"):
        Configuration.load(path)


def test_one_number_serves_all_axes():
    assert per_axis("--patch-size", (7,), 3) == (7, 7, 7)
    assert per_axis("--patch-size", (7, 8), 2) == (7, 8)
    with pytest.raises(
        TrainerError, match="--patch-size: 7 8 was given, one number, or one for each of 3"
    ):
        per_axis("--patch-size", (7, 8), 3)
