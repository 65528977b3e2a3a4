"""Labels of pictures in files: from `dataset.json` beside them, or from the folders that they lie in.

`dataset.json` is what the data sets of EDM carry (Karras et al. 2022, arXiv:2206.00364):

    {"labels": [["00000/img00000000.png", 6], ...], "classes": ["airplane", ...]}

with file names relative to it. Here `labels` may also be a dictionary, or null for data without labels; a label may be
the number or the name of a class; `classes` may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from sde.data.files import Files
from sde.errors import UserError

INDEX = "dataset.json"
MODES = ("auto", "json", "folders", "none")


@dataclass(frozen=True)
class Labels:
    """The labels of some pictures.

    Args:
        values: int64 (N,), in 0 .. num_classes - 1.
        num_classes: number of classes.
        class_names: a name for each, or empty.
    """

    values: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]


def number(labels: Sequence[object], classes: Sequence[str] | None, where: str) -> Labels:
    """Labels from class numbers or class names.

    Args:
        labels: whole numbers from 0, or strings; not both.
        classes: the names, or None: strings are then numbered in alphabetical order, and numbers have no names.
        where: what to call the source in messages.

    Raises:
        UserError: a label is neither, or is not a class.
    """
    if labels and all(isinstance(label, str) for label in labels):
        names = list(classes) if classes else sorted({str(label) for label in labels})
        position = {name: i for i, name in enumerate(names)}
        unknown = next((label for label in labels if label not in position), None)
        if unknown is not None:
            raise UserError(f"{where} has the label {unknown!r}, which is not among its classes")
        values = np.array([position[str(label)] for label in labels], dtype=np.int64)
        return Labels(values, len(names), tuple(names))
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
            raise UserError(f"{where} has the label {label!r}: labels are whole numbers from 0, or names of classes")
    values = np.array(labels, dtype=np.int64)
    count = len(classes) if classes else int(values.max(initial=-1)) + 1
    if len(values) and values.max() >= count:
        raise UserError(f"{where} has the label {values.max()} and only {count} classes: add the missing names")
    return Labels(values, count, tuple(classes or ()))


def find_labels(mode: str, files: Files, pictures: Sequence[str], folders: Sequence[str | None]) -> Labels | None:
    """The labels of `pictures`, None for data without.

    Args:
        mode: "json"; "folders"; "none"; or "auto", which is `dataset.json` when there is one and otherwise the
            folders, when every picture lies in one and there are at least two.
        files: all files of the source.
        pictures: the names of the pictures.
        folders: the class folder of each, None for those in none.

    Raises:
        UserError: there are no such labels, or a picture has none.
    """
    if mode == "none":
        return None
    index = min((name for name in files.names if PurePosixPath(name).name == INDEX), key=len, default=None)
    if mode == "json" or (mode == "auto" and index is not None):
        if index is None:
            raise UserError(f"labels=json, and there is no {INDEX} beside the pictures: add one, or set labels to none")
        labels = _from_json(files, index, pictures)
        if labels is None and mode == "json":
            raise UserError(f"{files.describe(index)} holds no labels: add them, or set labels to none")
        return labels
    outside = next((name for name, folder in zip(pictures, folders, strict=True) if folder is None), None)
    if mode == "folders" and outside is not None:
        raise UserError(f"labels=folders, and {files.describe(outside)} is in no class folder: move it, or set labels")
    if mode == "auto" and (outside is not None or len(set(folders)) < 2):
        return None
    return number([str(folder) for folder in folders], None, "the folder")


def _from_json(files: Files, index: str, pictures: Sequence[str]) -> Labels | None:
    where = files.describe(index)
    try:
        content = json.loads(files.read(index))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not JSON ({error}): write it as {{'labels': [[file, class], ...]}}") from error
    labels = content.get("labels") if isinstance(content, dict) else content
    classes = content.get("classes") if isinstance(content, dict) else None
    if labels is None:
        return None
    try:
        known = dict(labels)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: labels must be a list of [file, class], or a dictionary, or null") from error
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise UserError(f"{where}: classes must be a list of names, not {classes!r}")
    parent = PurePosixPath(index).parent
    names = [PurePosixPath(name) for name in pictures]
    keys = [str(name.relative_to(parent)) if name.is_relative_to(parent) else str(name) for name in names]
    missing = [key for key in keys if key not in known]
    if missing:
        raise UserError(f"{where} has no label for {len(missing)} pictures, such as {missing[0]!r}: add them")
    return number([known[key] for key in keys], classes, where)
