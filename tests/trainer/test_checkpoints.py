"""Checkpoints: whole or not at all, damage seen, and tied to their configuration."""

from __future__ import annotations

import json
import random
import zipfile

import pytest
import torch
from trainer.comparing_states import assert_equal

from action_kernels.trainer.checkpoints import Checkpoints, Progress, load_weights, read_checkpoint
from action_kernels.trainer.errors import TrainerError
from action_kernels.trainer.files import replace_file
from action_kernels.trainer.run import resolved

HISTORY = {"losses": [{"iteration": 1, "total": 0.5}], "validation": []}
NAMES = ("pretrain", "finetune", "supervised", "mean_teacher")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(make_stage, make_batch, tiny_config, tmp_path, name):
    """Everything that a step changes is in the checkpoint: the next step is the same, bit for bit."""
    stage, batch = make_stage(name), make_batch()
    stage.step(batch, 0)
    checkpoints = Checkpoints(tmp_path, resolved(tiny_config()), name)
    checkpoints.save(stage, Progress(1, HISTORY))
    following = stage.step(batch, 1)
    restored = make_stage(name, seed=9)
    assert checkpoints.load(restored) == Progress(1, HISTORY)
    assert_equal(restored.step(batch, 1), following)
    for module, other in zip(stage.modules.values(), restored.modules.values(), strict=True):
        assert_equal(dict(module.state_dict()), dict(other.state_dict()))


@pytest.fixture
def saved(make_stage, tiny_config, tmp_path):
    stage = make_stage("supervised")
    checkpoints = Checkpoints(tmp_path, resolved(tiny_config()), "supervised")
    checkpoints.save(stage, Progress(1, HISTORY))
    return stage, checkpoints, tmp_path / "checkpoint.pt"


def test_every_kind_of_damage_is_a_sentence(saved):
    """Flipped bits and cuts anywhere: refused, or without any effect on what is read."""
    _, _, path = saved
    whole, content = path.read_bytes(), read_checkpoint(path)
    rng, refused = random.Random(0), 0
    damaged = [b"", b"half a file", whole[: len(whole) // 2], whole[:-1], b"x" + whole]
    for _ in range(60):
        position, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        flipped = bytes([whole[position] ^ bit])
        damaged.append(whole[:position] + flipped + whole[position + 1 :])
    for data in damaged:
        path.write_bytes(data)
        try:
            found = read_checkpoint(path)
        except TrainerError:
            refused += 1
        else:
            assert_equal(found, content)
    assert refused > 40
    path.unlink()
    with pytest.raises(TrainerError, match="there is no checkpoint"):
        read_checkpoint(path)


def test_every_bit_of_the_weights_is_guarded(saved):
    _, _, path = saved
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        with archive.open(largest) as file:
            position = whole.index(file.read(64))
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(TrainerError, match=r"is damaged: .* has a wrong checksum"):
        read_checkpoint(path)


def test_what_is_no_checkpoint_of_ours(saved):
    _, _, path = saved
    for content, message in (
        ([1], "of format 1"),
        ({"student": {}}, "of format 1, this version reads format 2"),
        ({"format": 2, "kind": "last"}, "is not complete: stage is missing"),
    ):
        torch.save(content, path)
        with pytest.raises(TrainerError, match=message):
            read_checkpoint(path)


def test_tied_to_stage_and_configuration(saved, tiny_config, make_stage, tmp_path):
    stage, _, _ = saved
    with pytest.raises(
        TrainerError, match="is the checkpoint of stage 'supervised', and 'finetune'"
    ):
        Checkpoints(tmp_path, resolved(tiny_config()), "finetune").load(stage)
    other = resolved(tiny_config(learning_rate=0.5))
    with pytest.raises(TrainerError, match=r"written with --learning-rate 0\.05, but .* says 0\.5"):
        Checkpoints(tmp_path, other, "supervised").load(stage)
    moved = resolved(tiny_config(data="/elsewhere", max_iterations=100, num_workers=1))
    assert Checkpoints(tmp_path, moved, "supervised").load(stage).iteration == 1
    with pytest.raises(TrainerError, match="does not fit this version's supervised"):
        Checkpoints(tmp_path, moved, "supervised").load(make_stage("supervised", widths=(4, 8)))


def test_damaged_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(json.dumps({"a": 1}).encode())
    with pytest.raises(TrainerError, match=r"weights .*safetensors cannot be read"):
        load_weights(path)
    with pytest.raises(TrainerError, match="cannot be read"):
        load_weights(tmp_path / "none.safetensors")
