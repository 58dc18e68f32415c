"""Readers of every layout, and the phantoms."""

from __future__ import annotations

import numpy as np
import pytest
from trainer.volumes import AFFINE, find_cases, h5py, small_volume, write_h5, write_nifti

from action_kernels.trainer.data.phantom import draw_patient, phantom_cases
from action_kernels.trainer.errors import TrainerError


def assert_reads(case, number, affine):
    image, label = small_volume(number)
    volume = case.read()
    np.testing.assert_array_equal(volume.image, image[None])
    np.testing.assert_array_equal(volume.label, label)
    np.testing.assert_array_equal(volume.affine, affine)
    assert volume.image.dtype == np.float32
    assert volume.label.dtype == np.uint8


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nii.bz2"])
@pytest.mark.parametrize("flat", [True, False])
def test_nifti(tmp_path, suffix, flat):
    names = ["patient002_frame01", "patient001_frame12", "patient001_frame01"]
    for number, name in enumerate(names):
        write_nifti(
            tmp_path if flat else tmp_path / "training" / name[:10],
            name,
            small_volume(number),
            suffix,
        )
    (
        tmp_path / "patient001_4d.nii.gz"
    ).touch()  # the challenge has these too; they have no ground truth
    cases = find_cases(tmp_path)
    assert [case.name for case in cases] == sorted(names)
    assert [case.patient for case in cases] == ["patient001", "patient001", "patient002"]
    for case in cases:
        assert_reads(case, names.index(case.name), AFFINE)


def test_h5_volumes_win_over_their_slices(tmp_path):
    image, label = small_volume(1)
    write_h5(tmp_path / "data" / "patient001_frame01.h5", image, label)
    for index in range(3):
        write_h5(
            tmp_path / "data/slices" / f"patient001_frame01_slice_{index + 1}.h5",
            -image[index],
            label[index],
        )
    (case,) = find_cases(tmp_path)
    assert_reads(case, 1, np.eye(4))


def test_h5_slices_alone_are_stacked_in_numerical_order(tmp_path):
    image, label = small_volume(3, slices=11)  # slice_10 sorts before slice_2 as text
    for index in range(11):
        write_h5(
            tmp_path / "data/slices" / f"patient007_frame02_slice_{index + 1}.h5",
            image[index],
            label[index],
        )
    (case,) = find_cases(tmp_path)
    assert (case.name, case.patient) == ("patient007_frame02", "patient007")
    np.testing.assert_array_equal(case.read().image, image[None])
    np.testing.assert_array_equal(case.read().label, label)


def test_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(TrainerError, match=r"there is no folder .*nowhere.*'phantom'"):
        find_cases(tmp_path / "nowhere")


def test_unknown_layout_lists_what_is_there_and_what_is_accepted(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(TrainerError, match=r"holiday\.jpg.*SSL4MIS.*challenge"):
        find_cases(tmp_path)


def test_label_without_image(tmp_path):
    write_nifti(tmp_path, "patient001_frame01", small_volume(0))
    (tmp_path / "patient001_frame01.nii.gz").unlink()
    with pytest.raises(TrainerError, match="has no image patient001_frame01"):
        find_cases(tmp_path)


def test_damaged_files_name_themselves(tmp_path):
    write_nifti(tmp_path, "patient001_frame01", small_volume(0))
    (tmp_path / "patient001_frame01.nii.gz").write_bytes(b"not an image")
    with pytest.raises(TrainerError, match=r"patient001_frame01\.nii\.gz is no NIfTI file"):
        find_cases(tmp_path)[0].read()
    write_h5(tmp_path / "h5" / "patient001_frame01.h5", *small_volume(0))
    (tmp_path / "h5" / "patient001_frame01.h5").write_bytes(b"not h5")
    with pytest.raises(TrainerError, match=r"patient001_frame01\.h5 cannot be read"):
        find_cases(tmp_path / "h5")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image, label: (image[:2], label), "must lie on one grid"),
        (lambda image, label: (image, label * 9), "label holds 27"),
        (lambda image, label: (np.where(image == 5, np.nan, image), label), "NaN"),
    ],
)
def test_bad_content(tmp_path, spoil, message):
    write_h5(tmp_path / "patient001_frame01.h5", *spoil(*small_volume(0)))
    with pytest.raises(TrainerError, match=message):
        find_cases(tmp_path)[0].read()


def test_images_without_labels_are_unlabelled(tmp_path):
    write_nifti(tmp_path / "nifti", "patient001_frame01", small_volume(0))
    (tmp_path / "nifti" / "patient001_frame01_gt.nii.gz").unlink()
    (tmp_path / "h5").mkdir()
    with h5py.File(tmp_path / "h5" / "patient001_frame01.h5", "w") as file:
        file["image"] = small_volume(0)[0]
    for folder in ("nifti", "h5"):
        (case,) = find_cases(tmp_path / folder)
        volume = case.read()
        assert not case.labelled
        assert volume.label is None
        np.testing.assert_array_equal(volume.image[0], small_volume(0)[0])


def test_real_layouts_agree(unpacked_acdc):
    nifti, h5 = find_cases(unpacked_acdc("acdc-nifti")), find_cases(unpacked_acdc("acdc-h5"))
    assert [case.name for case in nifti] == [case.name for case in h5]
    assert len(nifti) == 4
    for first, second in zip(nifti, h5, strict=True):
        one, other = first.read(), second.read()
        assert set(np.unique(one.label)) == {0, 1, 2, 3}
        assert one.image.min() > -1e-6
        assert 0.5 < one.image.max() < 1 + 1e-6
        np.testing.assert_array_equal(one.label, other.label)
        np.testing.assert_allclose(one.image, other.image, atol=1e-6)


def test_real_compact_files(data_folder):
    cases = find_cases(data_folder / "ACDC")
    assert len(cases) == 200
    assert len({case.patient for case in cases}) == 100
    assert cases[0].read().image.ndim == 4


def test_phantoms_are_cardiac_like():
    cases = phantom_cases(12, seed=0)
    assert len(cases) == 24
    labels = np.stack([case.read().label for case in cases])
    share = np.bincount(labels.ravel(), minlength=4) / labels.size
    assert share[0] > 0.88
    assert all(0.01 < s < 0.05 for s in share[1:])
    present = [(labels == number).any((2, 3)).mean() for number in range(4)]
    assert (
        present[1] < 0.95 < present[3]
    )  # the right ventricle is missing in apical slices, the left nowhere
    left = (labels == 3).sum((1, 2, 3))
    diastole, systole = left[0::2], left[1::2]
    assert (systole < diastole).all()
    assert diastole.max() > 2 * diastole.min()  # sizes spread over patients


def test_phantom_left_ventricle_is_enclosed_and_brighter_than_its_wall():
    from scipy import ndimage

    for image, label in draw_patient(seed=3, number=5):
        inside = label == 3
        rim = ndimage.binary_dilation(inside, np.ones((1, 3, 3))) & ~inside
        assert set(np.unique(label[rim])) == {2}
        assert image[inside].mean() > 1.5 * image[label == 2].mean()


def test_phantoms_are_reproducible_and_different():
    (first, _), (again, _), (other, _) = (draw_patient(*who)[0] for who in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 0.02
