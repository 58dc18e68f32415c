"""A task checks itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from action_kernels.trainer.data import ACDC, LA, Task
from action_kernels.trainer.data.task import palette
from action_kernels.trainer.errors import TrainerError


def test_the_published_tasks():
    assert (ACDC.num_classes, ACDC.foreground, ACDC.spatial_dims) == (4, ("RV", "Myo", "LV"), 2)
    assert (LA.num_classes, LA.foreground, LA.spatial_dims) == (2, ("atrium",), 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": " "}, "name ' ' was given, a name is accepted"),
        ({"classes": ("background",), "colours": palette(1)}, "2 to 256 names"),
        ({"classes": tuple(map(str, range(257))), "colours": palette(257)}, "2 to 256 names"),
        ({"classes": ("a", "b", "c", "b")}, "b is there twice"),
        ({"classes": ("a", "b", "c", "")}, "2 to 256 names"),
        ({"colours": palette(3)}, "4 colours"),
        ({"colours": ("red", "green", "blue", "white")}, "4 colours #rrggbb"),
        ({"spatial_dims": 4}, "spatial_dims 4 was given, 2 or 3"),
        ({"unit": "inch"}, "unit 'inch' was given, 'voxel' or 'mm'"),
        ({"channels": 0}, "channels 0 was given, at least 1"),
    ],
)
def test_it_refuses_what_contradicts_itself(change, says):
    with pytest.raises(TrainerError, match=says):
        replace(ACDC, **change)


def test_lists_become_tuples():
    task = Task("x", ["background", "a"], ["#000000", "#ffffff"], 2, "mm")
    assert task.classes == ("background", "a")
    assert hash(task)


def test_colours_differ():
    assert len(set(palette(13))) == 13
    assert len(palette(40)) == 40
