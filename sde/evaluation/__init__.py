"""Evaluation: samples and data as features, and what is told about the numbers that are made of them.

`extractors` says what features are; those of networks register themselves in
`classifier`, `pretrained` and `torchscript`.
`reference` keeps the features of data, `loader` reads samples from files, `samples` draws them.
"""

from sde.evaluation import classifier, extractors, pretrained, torchscript

__all__ = ["classifier", "extractors", "pretrained", "torchscript"]
