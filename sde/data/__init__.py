"""Data sets: one file per source, what is shown to a network, and how it goes back to pixels.

`base` says what a data set is; the sources register themselves there under the names that `conf/data` uses.
"""

from sde.data import cifar10, glyphs, hf, images, mnist, npz, toy2d
from sde.data.base import DATASETS, DataInfo, Dataset, Split, register
from sde.data.order import Order, batch_indices
from sde.data.statistics import measure_sigma_data

__all__ = [
    "DATASETS",
    "DataInfo",
    "Dataset",
    "Order",
    "Split",
    "batch_indices",
    "cifar10",
    "glyphs",
    "hf",
    "images",
    "measure_sigma_data",
    "mnist",
    "npz",
    "register",
    "toy2d",
]
