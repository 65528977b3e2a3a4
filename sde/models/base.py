"""What a model is.

A model is an `nn.Module` made as `Model(shape, num_classes, **settings)`. `shape` (the shape of one example, (C, H, W)
or (D,)) and `num_classes` are facts of the data and come at run time; the settings are those of
`conf/model/<name>.yaml`. It is called as

    model(x, noise, label) -> tensor of the shape and type of x

with `x` (B, *shape), `noise` (B,) the noise label and `label` (B,) int64 class labels or None. What the output means
(noise, score, data, ...) is not the model's business. Its attribute `noise_label` names the number it wants as `noise`:

    "time"       999 t / T, for sinusoidal embeddings
    "sigma"      the noise level sigma(t) / alpha(t) > 0
    "log_sigma"  log(sigma(t) / alpha(t)) / 4
    "index"      index of a noise level of a discrete chain, 0 for the noisiest (`parameterization=smld_chain` gives it)

With `num_classes` > 0 the label `num_classes` means "no label", and so does `label=None`; dropping labels in training
teaches a model both (arXiv 2207.12598). A model that works for some noise labels only has a method `check_noise(noise)`
that refuses others, which is asked before training.

To add a model: a file in this folder with `@register("name")` on the class, its import in `sde/models/__init__.py`, and
`conf/model/name.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sde.errors import UserError, check_number
from sde.registry import Registry

MODELS: Registry[nn.Module] = Registry("model")
register = MODELS.register


def check_count(name: str, value: int, at_least: int = 1, at_most: float = math.inf) -> int:
    """`value`, or `UserError` unless it is a whole number from `at_least` to `at_most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name}={value!r} is not a whole number")
    check_number(name, value, at_least=at_least, at_most=at_most)
    return value


def check_counts(name: str, values: Iterable[int], at_least: int = 1) -> tuple[int, ...]:
    """`values` as a tuple, or `UserError` unless each is a whole number of at least `at_least`."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{name}={values!r} is not a list of whole numbers; write it as [1, 2, 2]")
    return tuple(check_count(f"{name}[{i}]", value, at_least) for i, value in enumerate(values))


def check_shape(model: str, shape: tuple[int, ...], axes: str) -> None:
    """Raise `UserError` unless `shape` has one positive size for each letter of `axes` ("CHW", "D")."""
    if len(shape) != len(axes) or any(size < 1 for size in shape):
        raise UserError(
            f"model={model} works on examples of shape ({', '.join(axes)}), not {tuple(shape)}; "
            f"choose a model that suits the data, such as model={'mlp' if len(shape) == 1 else 'ncsnpp'}"
        )


def check_labels(label: Tensor, num_classes: int) -> None:
    """Raise `UserError` unless class labels are 0 to `num_classes`, the last meaning "no label".

    Only labels on the CPU are looked at: elsewhere that would wait for the device, which has a check of its own.
    """
    if label.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    outside = label[(label < 0) | (label > num_classes)]
    if outside.numel():
        raise UserError(
            f"class label {int(outside[0])} is not one of the {num_classes} classes of the model: "
            f"give 0 to {num_classes - 1}, or {num_classes} for no label"
        )


def check_unlabeled(label: Tensor | None) -> None:
    """Raise `UserError` for class labels, which a model without classes cannot use."""
    if label is not None:
        raise UserError("class labels were given to a model without classes: use data with labels to train one")
