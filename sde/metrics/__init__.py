"""Metrics: how far generated examples are from data. One file per metric, or per family of them."""

from sde.metrics import classifier_test, memorization, planar, sliced  # noqa: F401 - for the registry
from sde.metrics.base import METRICS, Metric, Sets, register

__all__ = ["METRICS", "Metric", "Sets", "register"]
