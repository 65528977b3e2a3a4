"""Evaluation: samples and data as features (`extractors`), and what is made of them."""

from sde.evaluation import extractors

__all__ = ["extractors"]
