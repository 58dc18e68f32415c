"""What the paper reports (You et al., MICCAI 2023, arXiv 2304.02689): DSC in %, ASD in voxels, last checkpoint.

Numbers of the other methods are those that the paper quotes, but for `LATER`, which are of later papers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A published result. `classes` holds those of the classes where they are reported."""

    dsc: float
    asd: float | None = None
    classes: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class Later:
    """A published result of another method; `protocol` says how its checkpoint was chosen."""

    method: str
    protocol: str
    dsc: float
    asd: float | None = None


LAST, ON_TEST = "last checkpoint", "checkpoint chosen on the test list"

METHODS: dict[str, dict[str, Reported]] = {
    "acdc-5": {
        "labelled": Reported(51.7, 13.1),
        "full": Reported(91.5, 0.996),
        "action": Reported(87.5, 1.12),
        "action++": Reported(
            88.5, 0.723, (("RV", 86.9, 0.662), ("Myo", 86.8, 0.689), ("LV", 91.9, 0.818))
        ),
    },
    "acdc-10": {
        "labelled": Reported(79.5, 2.73),
        "full": Reported(91.5, 0.996),
        "action": Reported(89.7, 0.736),
        "action++": Reported(
            90.4, 0.592, (("RV", 90.5, 0.448), ("Myo", 87.5, 0.628), ("LV", 93.1, 0.700))
        ),
    },
    "la-5": {
        "labelled": Reported(52.6, 9.87),
        "full": Reported(91.5, 1.51),
        "action": Reported(86.6, 2.24),
        "action++": Reported(87.8, 2.09),
    },
    "la-10": {
        "labelled": Reported(82.7, 3.26),
        "full": Reported(91.5, 1.51),
        "action": Reported(88.7, 2.10),
        "action++": Reported(89.9, 1.74),
    },
}

LATER: dict[str, tuple[Later, ...]] = {
    "acdc-5": (Later("TraCoCo", LAST, 89.5, 0.71), Later("UniMatch", ON_TEST, 88.9)),
    "acdc-10": (Later("TraCoCo", LAST, 90.4, 0.42), Later("UniMatch", ON_TEST, 89.9)),
    "la-5": (Later("AD-MT", LAST, 89.3), Later("AD-MT", ON_TEST, 89.6)),
    "la-10": (Later("AD-MT", LAST, 90.1), Later("CrossMatch", ON_TEST, 91.3, 1.53)),
}

# The ablations are of one setting alone; beside runs of another they are shown, and said to be of this one.
ABLATION_SETTING = "la-10"

TABLE_5: dict[str, Reported] = {
    "pretrain-without-ats": Reported(86.2, 2.69),
    "pretrain-with-ats": Reported(88.1, 2.44),
    "none": Reported(89.0, 2.06),
    "ats": Reported(89.3, 1.98),
    "saacl": Reported(89.5, 1.96),
    "both": Reported(89.9, 1.74),
}

PERIODS = {0.1: 89.8, 0.2: 89.1, 0.5: 89.2, 1.0: 89.9, 2.0: 89.7}
SCHEDULES = {"fixed": 89.5, "step": 89.4, "random": 88.9, "oscillating": 89.2, "cosine": 89.9}
CENTER_WEIGHTS = {0.05: 88.5, 0.1: 89.3, 0.2: 89.9, 0.5: 89.7, 1.0: 89.1, 10.0: 87.9}
