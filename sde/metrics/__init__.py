"""Metrics: how far generated examples are from data. One file per metric, or per family of them."""

from sde.metrics import (  # noqa: F401 - for the registry
    classifier_test,
    frechet,
    inception_score,
    kernel,
    memorization,
    planar,
    precision_recall,
    sliced,
)
from sde.metrics.base import METRICS, Metric, Sets, register
from sde.metrics.rows import Rows

__all__ = ["METRICS", "Metric", "Rows", "Sets", "register"]
