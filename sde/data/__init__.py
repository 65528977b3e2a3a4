"""Data sets: one file per source, what is shown to a network, and how it goes back to pixels."""

from sde.data import glyphs, mnist
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
    "glyphs",
    "measure_sigma_data",
    "mnist",
    "register",
]
