"""Data on disk as tasks, cases and volumes: `open_dataset` is the way in.

A layout (`layout.Layout`) finds the cases under a folder; reading one gives a checked `Volume`; `splits` says who
trains and who tests. Nothing here knows of networks.
"""

from .dataset import Dataset, Plan, open_dataset
from .layout import Options
from .problems import DataError
from .splits import Split
from .task import ACDC, LA, PHANTOM, Task
from .volume import Case, Grid, Volume

__all__ = [
    "ACDC",
    "LA",
    "PHANTOM",
    "Case",
    "DataError",
    "Dataset",
    "Grid",
    "Options",
    "Plan",
    "Split",
    "Task",
    "Volume",
    "open_dataset",
]
