"""Label maps come back on the grid of their image: shape, axes, units, qform, sform; and never over another file."""

from __future__ import annotations

import itertools
import os
import shutil
from functools import partial
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
from trainer.data import builders as b

from action_kernels.trainer.data import ACDC, LA, DataError, Plan, Task, Volume
from action_kernels.trainer.data.acdc import RULES as ACDC_RULES
from action_kernels.trainer.data.la import RULES as LA_RULES
from action_kernels.trainer.data.output import write_labels
from action_kernels.trainer.data.prediction import find_inputs, predict_files, read_input
from action_kernels.trainer.data.reading import Rules
from action_kernels.trainer.data.resampling import segment_at
from action_kernels.trainer.data.task import palette
from action_kernels.trainer.errors import TrainerError

OWN_3D = Task("own", ("background", "a", "b", "c"), palette(4), 3, "mm")
OWN_2D = Task("own", ("background", "a", "b", "c"), palette(4), 2, "mm")
PLANS = {
    "acdc": Plan(ACDC, ACDC_RULES),
    "la": Plan(LA, LA_RULES),
    "3d": Plan(OWN_3D, Rules(None)),
    "2d": Plan(OWN_2D, Rules(None, 2)),
    "2d sagittal": Plan(OWN_2D, Rules(None, 0)),
}


def brightness(volume: Volume) -> np.ndarray:
    """A segmentation that any voxel can be recognised by: the image's value, modulo 4."""
    return (volume.image[0].astype(np.int64) % 4).astype(np.uint8)


def predict(plan, source, output, **options):
    return predict_files(brightness, plan, Path(source), Path(output), workers=0, **options)


def an_image(shape=(9, 11, 6)):
    return np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(np.int16)


def assert_lies_over(result: Path, image: Path, expected: np.ndarray) -> None:
    first, second = nibabel.load(image), nibabel.load(result)
    assert second.shape == first.shape
    assert second.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(second.dataobj), expected)
    for name in ("qform_code", "sform_code", "xyzt_units", "pixdim", "qoffset_x", "quatern_b",
                 "quatern_c", "quatern_d", "srow_x", "srow_y", "srow_z", "dim"):  # fmt: skip
        np.testing.assert_array_equal(second.header[name], first.header[name], err_msg=name)


ORIENTATIONS = [
    (axes, flips)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_orientation_comes_back(tmp_path, plan):
    """48 ways to order and mirror axes: the label map has the voxels of the image, whatever the network saw."""
    image = an_image()
    for number, (axes, flips) in enumerate(ORIENTATIONS):
        affine = np.eye(4)
        affine[:3, :3] = np.diag([1.5, 2.0, 3.0])[:, axes] * flips
        affine[:3, 3] = (5, -7, 11)
        b.save(tmp_path / "images" / f"case_{number:02d}.nii.gz", image, affine)
    written = predict(PLANS[plan], tmp_path / "images", tmp_path / "out")
    assert len(written) == len(ORIENTATIONS)
    for path in written:
        assert_lies_over(path, tmp_path / "images" / path.name, image % 4)


def test_what_the_network_sees_is_canonical(tmp_path):
    """One anatomy in 48 orientations is one volume; its spacing goes with its axes."""
    anatomy = an_image().astype(np.float32)
    ras = nibabel.Nifti1Image(anatomy, np.diag([1.5, 2.0, 3.0, 1.0]))
    for number, (axes, flips) in enumerate(ORIENTATIONS):
        turn = np.array(list(zip(axes, flips, strict=True)), float)
        nibabel.save(ras.as_reoriented(turn), tmp_path / f"c{number}.nii.gz")
    for plan, spacing, seen in (
        (PLANS["3d"], (1.5, 2.0, 3.0), anatomy),
        (PLANS["2d"], (3.0, 2.0, 1.5), anatomy.transpose(2, 1, 0)),
        (PLANS["2d sagittal"], (1.5, 3.0, 2.0), anatomy.transpose(0, 2, 1)),
    ):
        inputs, _ = find_inputs(tmp_path, plan)
        for one in inputs:
            volume = read_input(one, plan)
            assert volume.spacing == pytest.approx(spacing)
            np.testing.assert_array_equal(volume.image[0], seen)


def oblique() -> np.ndarray:
    turn = nibabel.eulerangles.euler2mat(0.3, -0.2, 0.5)
    return nibabel.affines.from_matvec(turn @ np.diag([1.25, 1.25, 8.0]), (-100, 20, 5))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 2), (1, 1), (2, 4), (0, 0)])
@pytest.mark.parametrize("units", ["mm", "micron", "meter", "unknown"])
def test_headers_are_kept(tmp_path, kind, qform, sform, units):
    image = kind(an_image(), oblique())
    image.set_qform(oblique(), qform)
    image.set_sform(oblique() * 1.0001 if sform else None, sform)
    image.header.set_xyzt_units(units, "sec")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    for name in ("3d", "acdc"):
        (written,) = predict(PLANS[name], tmp_path / "scan.nii.gz", tmp_path / name)
        assert_lies_over(written, tmp_path / "scan.nii.gz", an_image() % 4)
        assert isinstance(nibabel.load(written), kind)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nii.bz2", ".NII.GZ"])
@pytest.mark.parametrize(
    "shape", [(9, 11, 6), (9, 11), (9, 11, 6, 1), (9, 11, 1), (9, 11, 1, 1, 1)]
)
def test_shapes_and_suffixes(tmp_path, suffix, shape):
    path = b.save(tmp_path / "scan.nii.gz", an_image(shape))
    kind = {".nii": "none", ".nii.bz2": "bz2"}.get(suffix, "gz")
    path = b.recompress(path, f"scan{suffix}", kind)
    (written,) = predict(PLANS["acdc"], path, tmp_path / "out")
    assert written == tmp_path / "out/scan.nii.gz"
    saved = nibabel.load(written)
    assert saved.shape == shape
    np.testing.assert_array_equal(np.asarray(saved.dataobj), an_image(shape) % 4)


def test_scaled_intensities_do_not_scale_labels(tmp_path):
    image = nibabel.Nifti1Image(an_image(), b.AFFINE)
    image.header.set_slope_inter(4.0, 1024.0)
    image.header["cal_max"] = 1000
    nibabel.save(image, tmp_path / "scan.nii.gz")
    (written,) = predict(PLANS["3d"], tmp_path / "scan.nii.gz", tmp_path / "out")
    raw = np.asarray(nibabel.load(tmp_path / "scan.nii.gz").dataobj)
    np.testing.assert_array_equal(np.asarray(nibabel.load(written).dataobj), raw.astype(int) % 4)
    assert nibabel.load(written).header["cal_max"] == 0


def test_nrrd_and_h5_give_their_affine(tmp_path):
    image = an_image().astype(np.float32)
    directions = np.array([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    header = {"space": "left-posterior-superior", "space directions": directions, "space origin": [10, 20, 30]}  # fmt: skip
    nrrd.write(str(tmp_path / "a.nrrd"), image, header)
    b.save_h5(tmp_path / "b.h5", image=image)
    b.save_h5(tmp_path / "scan07" / "mri_norm2.h5", image=image)
    written = predict(PLANS["3d"], tmp_path, tmp_path / "out")
    assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz", "scan07.nii.gz"]
    for path in written:
        np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), image % 4)
    # the voxel (1, 0, 0) of the NRRD lies 1.5 mm further posterior: −y in NIfTI's RAS
    np.testing.assert_allclose(
        nibabel.load(written[0]).affine,
        [[0, 2, 0, -10], [-1.5, 0, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]],
    )
    np.testing.assert_array_equal(nibabel.load(written[1]).affine, np.eye(4))


def test_resampling_and_back_keeps_a_ball(tmp_path):
    """At 3 mm a ball of 1.5 mm voxels loses its surface's detail, nothing else: centre and size stay."""
    grid = np.indices((40, 44, 20)) * np.array([1.5, 1.5, 3.0])[:, None, None, None]
    ball = np.linalg.norm(grid - np.array([30, 33, 30])[:, None, None, None], axis=0) < 16
    affine = np.diag([-1.5, 1.5, 3.0, 1.0])
    b.save(tmp_path / "scan.nii.gz", ball.astype(np.float32) * 100, affine)
    plan = Plan(OWN_3D, Rules(None), (3.0, 3.0, 3.0))
    seen = []

    def segment(image: np.ndarray) -> np.ndarray:
        seen.append(image.shape)
        return (image[0] > 50).astype(np.uint8)

    (written,) = predict_files(
        lambda volume: segment_at(volume, plan.spacing, segment), plan,
        tmp_path / "scan.nii.gz", tmp_path / "out", workers=0,
    )  # fmt: skip
    assert seen == [(1, 20, 22, 20)]
    result = np.asarray(nibabel.load(written).dataobj).astype(bool)
    assert 2 * (result & ball).sum() / (result.sum() + ball.sum()) > 0.93
    centres = [np.argwhere(mask).mean(0) for mask in (result, ball)]
    np.testing.assert_allclose(*centres, atol=0.15)


def test_channels_belong_together(tmp_path):
    b.nnunet(tmp_path / "data")
    plan = Plan(Task("own", ("background", "a"), palette(2), 3, "mm", 2), Rules(None))
    inputs, problems = find_inputs(tmp_path / "data/imagesTr", plan)
    assert problems.sentences == []
    assert [one.name for one in inputs] == b.OWN_CASES
    volume = read_input(inputs[0], plan)
    assert volume.image.shape == (2, 20, 24, 18)
    (tmp_path / "data/imagesTr/case_03_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="lacks case_03_0001"):
        predict_files(brightness, plan, tmp_path / "data/imagesTr", tmp_path / "out", workers=0)
    assert len(list((tmp_path / "out").iterdir())) == 5  # the others are done


def test_labels_among_the_images_are_left_alone(tmp_path):
    b.acdc_nifti(tmp_path / "acdc")
    b.la(tmp_path / "la", "nrrd")
    b.pairs(tmp_path / "pairs", "images/{}.nii.gz", "labels/{}.nii.gz")
    names = [f"{patient}_frame0{frame}" for patient in b.ACDC_PATIENTS for frame in (1, 2)]
    for folder, plan, expected in (
        ("acdc", "acdc", names), ("la", "la", b.LA_SCANS), ("pairs", "3d", b.OWN_CASES)
    ):  # fmt: skip
        inputs, _ = find_inputs(tmp_path / folder, PLANS[plan])
        assert [one.name for one in inputs] == expected


def test_single_channel_files_of_nnunet(tmp_path):
    for case in b.OWN_CASES:
        b.save(tmp_path / f"{case}_0000.nii.gz", an_image())
    inputs, _ = find_inputs(tmp_path, PLANS["3d"])
    assert [one.name for one in inputs] == b.OWN_CASES


def test_unicode_and_spaces(tmp_path):
    source = tmp_path / "Bilder für μ" / "Größe 1 α.nii.gz"
    b.save(source, an_image())
    (written,) = predict(PLANS["3d"], source.parent, tmp_path / "aus gabe")
    assert written == tmp_path / "aus gabe" / "Größe 1 α.nii.gz"


def test_nothing_is_overwritten(tmp_path):
    b.save(tmp_path / "a.nii.gz", an_image())
    b.save(tmp_path / "b.nii.gz", an_image() + 1)
    before = (tmp_path / "a.nii.gz").read_bytes()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(TrainerError, match="are the images themselves; give another folder"):
            predict(PLANS["3d"], tmp_path, tmp_path, **options)
    assert (tmp_path / "a.nii.gz").read_bytes() == before
    predict(PLANS["3d"], tmp_path / "a.nii.gz", tmp_path / "out")
    first = (tmp_path / "out/a.nii.gz").read_bytes()
    shutil.move(tmp_path / "b.nii.gz", tmp_path / "a.nii.gz")
    with pytest.raises(TrainerError, match=r"a\.nii\.gz exist already; .* --overwrite"):
        predict(PLANS["3d"], tmp_path / "a.nii.gz", tmp_path / "out")
    assert (tmp_path / "out/a.nii.gz").read_bytes() == first
    predict(PLANS["3d"], tmp_path / "a.nii.gz", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/a.nii.gz").read_bytes() != first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", r"-i: there is no .*nowhere; give an image, or a folder"),
        ("empty", r"-i: .*empty holds no images; \.nii, \.nii\.gz"),
        ("text.txt", r"-i: .*text\.txt is no image; \.nii"),
    ],
)
def test_nothing_to_segment(tmp_path, source, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(TrainerError, match=says):
        predict(PLANS["3d"], tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path):
    b.save(tmp_path / "a.nii.gz", an_image())
    (tmp_path / "out").write_text("x")
    with pytest.raises(TrainerError, match=r"-o: .*out is a file; give a folder"):
        predict(PLANS["3d"], tmp_path / "a.nii.gz", tmp_path / "out")


def test_two_images_of_one_name(tmp_path):
    for folder in ("one", "two"):
        b.save(tmp_path / "in" / folder / "scan.nii.gz", an_image())
    with pytest.raises(DataError, match="are both scan; rename one of them"):
        predict(PLANS["3d"], tmp_path / "in", tmp_path / "out")


def test_bad_images_are_named_and_the_others_segmented(tmp_path):
    for name in "abcd":
        b.save(tmp_path / "in" / f"{name}.nii.gz", an_image())
    b.cut(tmp_path / "in/b.nii.gz")
    b.edit(tmp_path / "in/c.nii.gz", b.poke(np.nan))
    with pytest.raises(DataError) as caught:
        predict(PLANS["3d"], tmp_path / "in", tmp_path / "out")
    assert [any(f"/{n}.nii.gz" in p for p in caught.value.problems) for n in "abcd"] == [
        False, True, True, False,
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "d.nii.gz"]


def test_other_processes_do_the_same(tmp_path):
    for name in "abcde":
        b.save(tmp_path / "in" / f"{name}.nii.gz", an_image())
    b.cut(tmp_path / "in/c.nii.gz")
    contents = []
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            predict_files(brightness, PLANS["3d"], tmp_path / "in", tmp_path / str(workers), workers=workers)  # fmt: skip
        assert len(caught.value.problems) == 1
        paths = sorted((tmp_path / str(workers)).iterdir())
        contents.append({path.name: path.read_bytes() for path in paths})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    b.save(tmp_path / "a.nii.gz", an_image())

    def full(*_):
        raise OSError(28, "No space left on device", "a.nii.gz")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        predict(PLANS["3d"], tmp_path / "a.nii.gz", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_written_labels_are_the_same_bytes(tmp_path):
    b.save(tmp_path / "a.nii.gz", an_image())
    volume = read_input(find_inputs(tmp_path, PLANS["3d"])[0][0], PLANS["3d"])
    write = partial(write_labels, brightness(volume), volume.grid)
    write(tmp_path / "x.nii.gz")
    write(tmp_path / "y.nii.gz")
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_survives_json(plan):
    import json

    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict())), "plan.json") == plan


@pytest.mark.parametrize("content", [{}, {"task": {}}, {"task": 1, "rules": 2, "spacing": 3}])
def test_a_damaged_plan(content):
    with pytest.raises(TrainerError, match=r"plan\.json does not describe a task"):
        Plan.from_dict(content, "plan.json")
