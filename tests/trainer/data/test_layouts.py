"""Readers of every layout, and the phantoms."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from trainer.data import builders
from trainer.volumes import AFFINE, find_cases, h5py, small_volume, write_h5, write_nifti

from action_kernels.trainer.data import LA, Options, open_dataset
from action_kernels.trainer.data.phantom import draw_patient, phantom_cases
from action_kernels.trainer.data.splits import published_split
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


def test_real_layouts_agree(unpacked):
    nifti, h5 = find_cases(unpacked("acdc-nifti")), find_cases(unpacked("acdc-h5"))
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


def test_phantoms_as_volumes():
    flat, solid = (phantom_cases(2, 0, dims)[0].read() for dims in (2, 3))
    assert solid.shape == (64, 64, 24)  # x, y, z
    assert flat.shape == (8, 96, 96)
    shares = [(volume.label[..., None] == np.arange(4)).mean((0, 1, 2)) for volume in (flat, solid)]
    np.testing.assert_allclose(*shares, rtol=0.3)
    right = (solid.label == 1).any((0, 1))
    assert right[0]
    assert not right[-1]  # the right ventricle ends before the apex


# LA, nnU-Net, pairs


def opened(root, labelled=1, **options):
    return open_dataset(str(root), labelled, options=Options(**options))


def test_la_layouts_agree(tmp_path):
    datasets = {}
    for kind in ("h5", "nrrd", "nifti"):
        builders.la(tmp_path / kind, kind)
        datasets[kind] = opened(tmp_path / kind)
    for dataset in datasets.values():
        assert dataset.task == LA
        assert [case.name for case in dataset.cases] == builders.LA_SCANS
        split = dataset.split
        # the last tenth of the five training scans, at least one, validates
        assert (split.labelled, split.val, split.test) == (
            (builders.LA_SCANS[0],), (builders.LA_SCANS[4],), (builders.LA_SCANS[5],)
        )  # fmt: skip
        for number, case in enumerate(dataset.cases):
            image, label = builders.arrays(number, 2, (20, 24, 18))
            volume = case.read()
            np.testing.assert_array_equal(volume.image[0], image)
            np.testing.assert_array_equal(volume.label, label)
    spacings = {kind: dataset.cases[0].read().spacing for kind, dataset in datasets.items()}
    assert spacings == {"h5": None, "nrrd": (0.625,) * 3, "nifti": (0.625,) * 3}


def test_real_la(data_folder):
    dataset = opened(data_folder / "LA", 8)
    parts = {part: len(dataset.part(part)) for part in ("labelled", "unlabelled", "val", "test")}
    assert parts == {"labelled": 8, "unlabelled": 64, "val": 8, "test": 20}
    listed = (data_folder / "LA/train.list").read_text().split()
    assert list(dataset.split.labelled) == listed[:8]
    assert list(dataset.split.val) == listed[-8:]
    volume = dataset.part("labelled")[0].read()
    assert volume.spacing == (0.625, 0.625, 0.625)
    assert abs(float(volume.image.mean())) < 3
    assert 0.005 < volume.label.mean() < 0.3
    assert "cropped" in dataset.task.note


def test_real_la_layouts_agree(data_folder, unpacked):
    whole = {case.name: case for case in opened(data_folder / "LA").cases}
    h5, nrrd = (find_cases(unpacked(layout)) for layout in ("la-h5", "la-nrrd"))
    assert [case.name for case in h5] == [case.name for case in nrrd]
    for first, second in zip(h5, nrrd, strict=True):
        volumes = [case.read() for case in (whole[first.name], first, second)]
        # Intensities were normalised by different programs: to rounding.
        np.testing.assert_allclose(volumes[0].image, volumes[1].image, rtol=1e-6, atol=1e-6)
        for other in volumes[1:]:
            np.testing.assert_array_equal(volumes[0].label, other.label)


@pytest.mark.parametrize("name", ["acdc", "la"])
def test_the_published_split_without_lists(tmp_path, name):
    """Names alone decide: complete data gets the paper's split, whose labelled patients come first."""
    published = published_split(name)
    patients = {*published.train, *(published.val or ()), *published.test}
    assert len(patients) == 100
    for number, patient in enumerate(sorted(patients)):
        image, label = small_volume(number)
        if name == "acdc":
            for sign, frame in ((1, "01"), (-1, "13")):
                write_h5(tmp_path / f"{patient}_frame{frame}.h5", sign * image, label)
        else:
            write_h5(tmp_path / patient / "mri_norm2.h5", image, label.clip(0, 1))
    dataset = opened(tmp_path, 7)
    assert dataset.split.labelled == published.train[:7]
    assert dataset.split.source == f"the published split of {name.upper()}"
    assert sum(len(getattr(dataset.split, p)) for p in ("labelled", "unlabelled", "val", "test")) == 100  # fmt: skip
    gone = published.train[2]
    for path in list(tmp_path.rglob(f"*{gone}*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(TrainerError, match=f"99 of the 100 patients .* {gone} are missing; .*--allow-missing"):  # fmt: skip
        opened(tmp_path, 7)
    without = opened(tmp_path, 7, allow_missing=True)
    # nobody moves up: six labelled patients remain of the seven
    assert without.split.labelled == tuple(p for p in published.train[:7] if p != gone)
    assert without.split.unlabelled == dataset.split.unlabelled


def test_a_handful_of_acdc_is_permuted(tmp_path):
    for number in range(1, 6):
        write_h5(tmp_path / f"patient{number:03d}_frame01.h5", *small_volume(number))
    assert opened(tmp_path).split.source == "a fixed permutation, 70/10/20 %"


def test_allow_missing_keeps_the_labelled_where_they_are(tmp_path):
    builders.acdc_nifti(tmp_path)
    full = opened(tmp_path, 2).split
    shutil.rmtree(tmp_path / full.labelled[0])
    with pytest.raises(TrainerError, match=f"{full.labelled[0]} of train.list is not on disk"):
        opened(tmp_path, 2)
    split = opened(tmp_path, 2, allow_missing=True).split
    assert split.labelled == full.labelled[1:]
    assert (split.unlabelled, split.val, split.test) == (full.unlabelled, full.val, full.test)
    with pytest.raises(TrainerError, match="no patient of the labelled part is on disk"):
        opened(tmp_path, 1, allow_missing=True)


def test_patients_in_no_list_are_told(tmp_path):
    builders.acdc_nifti(tmp_path)
    write_nifti(tmp_path, "patient077_frame01", small_volume(3))
    dataset = opened(tmp_path)
    assert dataset.notes == ("in no list, so not used: patient077",)
    assert "patient077" not in {c.patient for p in ("labelled", "unlabelled", "val", "test") for c in dataset.part(p)}  # fmt: skip


def test_images_of_no_case_are_told(tmp_path):
    builders.acdc_nifti(tmp_path)
    builders.save(tmp_path / "atlas.nii.gz", small_volume(3)[0])
    assert opened(tmp_path).notes == ("of no case, so not used: atlas.nii.gz",)


def test_a_patient_with_one_labelled_frame(tmp_path):
    """The labelled frame is labelled data, the other one unlabelled data of the same patient."""
    builders.acdc_nifti(tmp_path)
    (tmp_path / "patient001/patient001_frame02_gt.nii.gz").unlink()
    dataset = opened(tmp_path)
    assert [case.name for case in dataset.part("labelled")] == ["patient001_frame01"]
    assert "patient001_frame02" in [case.name for case in dataset.part("unlabelled")]


def test_without_lists_unlabelled_patients_train(tmp_path):
    builders.BUILDERS["pairs-siblings"](tmp_path)
    for number in range(7, 12):
        builders.save(tmp_path / f"images/case_{number:02d}.nii.gz", builders.arrays(number, 3, (20, 24, 18))[0])  # fmt: skip
    split = opened(tmp_path).split
    assert set(split.unlabelled) >= {f"case_{n:02d}" for n in range(7, 12)}
    assert not set(split.val + split.test + split.labelled) & set(split.unlabelled)


@pytest.mark.parametrize("layout", ["pairs-folders", "pairs-siblings", "pairs-suffix"])
def test_pairs(tmp_path, layout):
    builders.BUILDERS[layout](tmp_path / "Spleen")
    dataset = opened(tmp_path / "Spleen")
    task = dataset.task
    assert (task.name, task.classes, task.spatial_dims, task.unit) == (
        "Spleen", ("background", "class 1", "class 2"), 3, "mm"
    )  # fmt: skip
    assert dataset.spacing == pytest.approx((1.5, 1.25, 8.0))
    for number, case in enumerate(dataset.cases):
        assert case.name == builders.OWN_CASES[number]
        image, label = builders.arrays(number, 3, (20, 24, 18))
        volume = case.read()
        # AFFINE runs from right to left: the canonical image is mirrored along its first axis
        np.testing.assert_array_equal(volume.image[0], image[::-1])
        np.testing.assert_array_equal(volume.label, label[::-1])
        assert volume.spacing == pytest.approx((1.5, 1.25, 8.0))


def test_pairs_as_slices(tmp_path):
    builders.BUILDERS["pairs-siblings"](tmp_path)
    dataset = opened(tmp_path, spatial_dims=2, classes=("background", "liver", "tumour"))
    assert (dataset.task.classes, dataset.task.spatial_dims) == (("background", "liver", "tumour"), 2)  # fmt: skip
    assert dataset.spacing == pytest.approx((0, 1.25, 1.5))  # never across slices
    volume = dataset.cases[0].read()
    assert volume.shape == (18, 24, 20)
    np.testing.assert_array_equal(volume.image[0], builders.arrays(0, 3, (20, 24, 18))[0][::-1].T)


def test_few_slices_are_segmented_in_2d(tmp_path):
    for number, case in enumerate(builders.OWN_CASES):
        image, label = builders.arrays(number, 2, (20, 9, 24))
        affine = np.diag([1.0, 6.0, 1.0, 1.0])  # coronal slices
        builders.save(tmp_path / f"{case}.nii.gz", image, affine)
        builders.save(tmp_path / f"{case}_seg.nii.gz", label, affine)
    dataset = opened(tmp_path)
    assert dataset.task.spatial_dims == 2
    assert dataset.cases[0].read().shape == (9, 24, 20)


def test_masks_of_255_are_one_class(tmp_path):
    builders.BUILDERS["pairs-suffix"](tmp_path)
    for path in tmp_path.glob("*_label.nii.gz"):
        builders.edit(path, lambda label: (label > 0).astype(np.uint8) * 255, np.uint8)
    dataset = opened(tmp_path)
    assert dataset.task.num_classes == 2
    assert set(np.unique(dataset.cases[0].read().label)) == {0, 1}


def test_pairs_with_unicode_and_spaces(tmp_path):
    for number in range(4):
        image, label = builders.arrays(number, 2, (20, 24, 18))
        builders.save(tmp_path / f"Fall {number} – Größe μ.nii.gz", image)
        builders.save(tmp_path / f"Fall {number} – Größe μ_label.nii.gz", label)
    names = [f"Fall {number} – Größe μ" for number in range(4)]
    (tmp_path / "train.list").write_text("\n".join(names[:3]), encoding="utf-8")
    (tmp_path / "test.list").write_text(names[3], encoding="utf-8")
    dataset = opened(tmp_path)
    assert [case.name for case in dataset.cases] == names
    assert dataset.split.test == (names[3],)


def test_a_label_in_another_orientation_lies_over_its_image(tmp_path):
    builders.BUILDERS["pairs-suffix"](tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").glob("*_label.nii.gz"):
        nibabel.save(nibabel.as_closest_canonical(nibabel.load(path)), path)
    for first, second in zip(opened(tmp_path / "a").cases, opened(tmp_path / "b").cases, strict=True):  # fmt: skip
        np.testing.assert_array_equal(first.read().label, second.read().label)


def test_nnunet(tmp_path):
    builders.nnunet(tmp_path)
    builders.describe(tmp_path, name="Brain")
    dataset = opened(tmp_path)
    task = dataset.task
    assert (task.name, task.classes, task.channels, task.unit) == (
        "Brain", ("background", "core", "rim"), 2, "mm"
    )  # fmt: skip
    image, label = builders.arrays(0, 3, (20, 24, 18))
    volume = dataset.cases[0].read()
    np.testing.assert_array_equal(
        volume.image, [image[::-1], image]
    )  # mirrored: AFFINE's first axis
    np.testing.assert_array_equal(volume.label, label[::-1])


def test_nnunet_test_images(tmp_path):
    builders.nnunet(tmp_path)
    for case in ("case_07", "case_08"):
        for channel in ("0000", "0001"):
            image = builders.arrays(int(case[-1] + channel[-1]), 3, (20, 24, 18))[0]
            builders.save(tmp_path / f"imagesTs/{case}_{channel}.nii.gz", image)
    dataset = opened(tmp_path)
    assert dataset.notes == ("imagesTs: 2 images without labels are not used",)
    assert len(dataset.cases) == 6
    shutil.copytree(tmp_path / "labelsTr", tmp_path / "labelsTs")
    for path in (tmp_path / "labelsTs").iterdir():
        path.unlink()
    shutil.copy(tmp_path / "labelsTr/case_01.nii.gz", tmp_path / "labelsTs/case_08.nii.gz")
    dataset = opened(tmp_path)
    assert dataset.split.test == ("case_08",)
    assert len(dataset.split.val) == 1
    assert set(dataset.split.labelled + dataset.split.unlabelled + dataset.split.val) == set(builders.OWN_CASES)  # fmt: skip


def test_nnunet_allow_missing(tmp_path):
    builders.nnunet(tmp_path)
    builders.describe(tmp_path, numTraining=9)
    assert len(opened(tmp_path, allow_missing=True).cases) == 6


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    builders.acdc_nifti(tmp_path)
    scan = os.scandir

    def locked(path):
        if str(path).endswith("patient003"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(TrainerError, match=r"patient003 cannot be listed .*mend its permissions"):
        opened(tmp_path)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    builders.acdc_nifti(tmp_path)
    dataset = opened(tmp_path)

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", locked)
    with pytest.raises(
        TrainerError, match=r"frame01\.nii\.gz must not be read by you; 'chmod u\+r'"
    ):
        dataset.cases[0].read()


def test_memory_that_is_not_there(tmp_path, monkeypatch):
    builders.acdc_nifti(tmp_path)
    dataset = opened(tmp_path)

    def too_much(path):
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", too_much)
    with pytest.raises(TrainerError, match=r"frame01\.nii\.gz does not fit into memory"):
        dataset.cases[0].read()


@pytest.mark.parametrize("data", ["", "  "])
def test_no_folder_given(data):
    with pytest.raises(TrainerError, match="--data: nothing was given"):
        opened(data)


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(TrainerError, match=r"a\.nii\.gz is a file; give the folder"):
        opened(tmp_path / "a.nii.gz")


def test_images_without_any_spacing_are_measured_in_voxels(tmp_path):
    for number, case in enumerate(builders.OWN_CASES):
        image, label = builders.arrays(number, 2, (20, 24, 18))
        builders.save_nrrd(tmp_path / f"{case}.nrrd", image, kinds=["domain"] * 3)
        builders.save_nrrd(tmp_path / f"{case}_seg.nrrd", label, kinds=["domain"] * 3)
    dataset = opened(tmp_path)
    assert (dataset.task.unit, dataset.spacing, dataset.cases[0].read().spacing) == (
        "voxel", None, None
    )  # fmt: skip
    builders.save_nrrd(tmp_path / "case_02.nrrd", builders.arrays(1, 2, (20, 24, 18))[0])
    with pytest.raises(
        TrainerError, match=r"case_01\.nrrd has no voxel spacing, other images have"
    ):
        opened(tmp_path)


def test_formats_that_are_not_read_are_told(tmp_path):
    builders.acdc_nifti(tmp_path)
    (tmp_path / "patient004" / "patient004_frame01_gt.mha").touch()
    assert opened(tmp_path).notes == (
        "not read, convert to .nii.gz what is needed: patient004/patient004_frame01_gt.mha",
    )


def test_held_out_cases_are_read_once_training_cases_are_not_kept(tmp_path):
    builders.acdc_nifti(tmp_path)
    dataset = opened(tmp_path)
    for part in ("val", "test"):
        for case in dataset.part(part):
            assert case.read() is case.read()
    for case in dataset.part("labelled"):
        assert case.read() is not case.read()


def test_copies_within_the_training_part_are_told(tmp_path):
    """The published ACDC has a few: they train, and are no fault of the user's."""
    builders.acdc_nifti(tmp_path)
    shutil.copy(
        tmp_path / "patient001/patient001_frame01.nii.gz",
        tmp_path / "patient002/patient002_frame01.nii.gz",
    )
    assert opened(tmp_path).notes == (
        "patient001_frame01 and patient002_frame01 are the same image",
    )


def test_frames_without_a_label_are_told(tmp_path):
    builders.acdc_nifti(tmp_path)
    (tmp_path / "patient003/patient003_frame02_gt.nii.gz").unlink()
    assert opened(tmp_path).notes == ("without a label, so unlabelled data: patient003_frame02",)


@pytest.mark.parametrize("layout", ["acdc-nifti", "la-h5", "nnunet", "phantom"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"spatial_dims": 2}, "--spatial-dims: 2 was given, but .* has 3; leave the option out"),
        ({"spatial_dims": 3}, "--spatial-dims: 3 was given, but .* has 2; leave the option out"),
        ({"classes": ("background", "heart")}, "--classes: background heart was given, but .* has"),
    ],
)
def test_what_the_layout_says_is_not_overruled_in_silence(tmp_path, layout, options, says):
    data = "phantom" if layout == "phantom" else builders.build(layout, tmp_path)
    fixed = {"acdc-nifti": 2, "la-h5": 3}.get(layout)
    wanted = options.get("spatial_dims")
    if wanted is not None and (wanted == fixed or fixed is None):  # said twice, or free to choose
        assert opened(data, **options).task.spatial_dims == wanted
        return
    with pytest.raises(TrainerError, match=says):
        opened(data, **options)


def test_volumes_of_a_users_own_get_spacing_and_patch_from_the_data(tmp_path):
    """The median spacing, or the one asked for; the patch by the rule follows it."""
    from action_kernels.trainer.presets import preset
    from action_kernels.trainer.run import prepare

    rng = np.random.default_rng(0)
    for number in range(4):
        folder = tmp_path / f"case{number}"
        folder.mkdir()
        label = np.zeros((40, 36, 24), np.uint8)
        label[10:20, 10:20, 8:16] = 1
        image = rng.normal(size=label.shape).astype(np.float32) + label
        for name, array in (("image", image), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), folder / f"{name}.nii.gz")  # fmt: skip
    given = {"data": str(tmp_path), "labelled_patients": 1, "widths": (4, 8), "spatial_dims": 3, "device": "cpu"}  # fmt: skip
    run = prepare(preset("volumes", **given), tmp_path / "run")
    assert run.dataset.spacing == (1, 1, 2)
    assert run.config.data.patch_size == (40, 36, 24)
    run = prepare(preset("volumes", spacing=2.0, **given), tmp_path / "run")
    assert run.dataset.spacing == (2, 2, 2)
    assert run.config.data.patch_size == (20, 18, 24)
