"""What an evaluation leaves: a record, and a card that a person reads.

evaluations/NAME.json     everything: numbers, errors, floors, what made them
evaluations/NAME.md       the card
evaluations/NAME.png      the first samples; NAME-nearest.png their nearest training examples

`sde.evaluation.overview` puts those in a folder side by side.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sde.evaluation.likelihood import likelihood_rows
from sde.evaluation.model import by_level
from sde.evaluation.scores import table, with_error
from sde.files import write_json, write_text

COMPARABLE = ("n", "features", "reference", "data")  # sections that are the same where numbers can be compared
_IDENTITY = ("sampling", "metrics", "diagnostics_of", "likelihood_of")


def free_name(folder: Path, name: str, record: Mapping[str, Any]) -> str:
    """`name`, with a number behind it where another evaluation has it; one of the same settings is replaced."""
    for number in itertools.count(1):
        found = name if number == 1 else f"{name}-{number}"
        other = read_record(folder / f"{found}.json")
        if not (folder / f"{found}.json").exists() or (other is not None and identity(other) == identity(record)):
            return found
    raise AssertionError("there are more numbers")


def identity(record: Mapping[str, Any]) -> str:
    """Everything that the numbers of an evaluation depend on, as text."""
    model = {key: record["model"].get(key) for key in ("weights", "hash")}
    return json.dumps([model, comparable(record), *(record.get(key) for key in _IDENTITY)], sort_keys=True)


def comparable(record: Mapping[str, Any]) -> list[Any]:
    """What is the same where numbers can be compared; of features that is their hash, not where a network lies."""
    found = {key: record[key] for key in COMPARABLE}
    found["features"] = record["features"].get("identity", record["features"])
    found["reference"] = {key: value for key, value in record["reference"].items() if key != "features"}
    return [found[key] for key in COMPARABLE]


def write_card(folder: Path, name: str, record: Mapping[str, Any]) -> Path:
    """Write NAME.json and NAME.md; gives the card's path."""
    write_json(folder / f"{name}.json", record)
    path = folder / f"{name}.md"
    write_text(path, card(name, record))
    return path


def card(name: str, record: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    lines = [f"# {name}", "", *markdown(table(record["scores"])), "", f"Errors: {record['errors_of']}.", ""]
    lines += [*other_errors(record), *drawn_sentences(record), floor_sentence(record), ""]
    for picture, what in record["pictures"].items():
        lines += [f"![{what}]({picture})", "", f"*{what}*", ""]
    lines += ["## What the numbers depend on", "", *markdown(facts(record)), ""]
    lines += model_lines(record)
    lines += [
        "## Made by",
        "",
        f"    {record['command']}",
        "",
        f"Everything in numbers: [{name}.json]({name}.json)",
        "",
    ]
    return "\n".join(lines)


def other_errors(record: Mapping[str, Any]) -> list[str]:
    """Which errors are neither from the jackknife nor from the spread over sets."""
    known = {each["label"]: each.get("error_from", "") for each in record["scores"]}
    own = {label: words for label, words in known.items() if words and not words.startswith(("jackknife", "spread"))}
    return [line for label, words in own.items() for line in (f"Error of {label}: {words}.", "")]


def drawn_sentences(record: Mapping[str, Any]) -> list[str]:
    """Which numbers are of fewer examples than there are, by an option of their metric."""
    lines = []
    for name, options in record["metrics"].items():
        of = [each for each in record["scores"] if each["metric"] == name]
        option = next((key for key in ("examples", "points") if options.get(key) is not None), None)
        if of and option is not None and of[0].get("n") is not None:
            labels = ", ".join(each["label"] for each in of)
            counts = f"{of[0]['n']} samples and {of[0]['reference_n']} examples of the data"
            drawn = f"drawn by seed 0 where there are more ({name}.{option}={options[option]})"
            lines += [f"{labels}: of {counts}, {drawn}.", ""]
    return lines


def floor_sentence(record: Mapping[str, Any]) -> str:
    """What the column of the data is."""
    counts = sorted({each["floor_n"] for each in record["scores"] if each["floor_n"] is not None})
    if not counts:
        return "There is no column for the data themselves: too few are held out, or none."
    text = (
        "*Data themselves* is the same number for held-out data in place of samples: what perfect samples would have, "
        "at that number of them."
    )
    if any(each["value_at_floor_n"] is not None for each in record["scores"]):
        numbers = ", ".join(map(str, counts))
        text += (
            f" No more than {numbers} examples are held out, so *value at their n* is the number for as many of the "
            "samples, which can be compared with it; most numbers get smaller with n alone."
        )
    return text


def facts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every fact that the numbers depend on, in words."""
    model, rows = record["model"], samples_facts(record)
    of_it = record["sampling"].get("of_the_model", True)
    rows["model"] = "" if of_it else "its data are used; nothing says that the samples are its own: "
    rows["model"] += f"{model['sde']}, {model['network']} of {model['run']}, step {model['step']}, weights "
    rows["model"] += f"{model['weights']} (SHA-256 {model['hash'][:16]})"
    rows["cost"] = _pairs(record["cost"])
    data, features = dict(record["data"]), dict(record["features"])
    rows["data"] = f"{data['data']}, {data['kind']} of shape {short(data['shape'])}; {_pairs(data['options'])}"
    if data["kind"] == "pixels":
        rows["decoding"] = data["decoding"]
        rows["resizing"] = short(features.pop("resize", None) or "none")
    rows["features"] = f"{features.pop('features')}: {_pairs(features)}"
    rows["reference"] = _pairs(
        {key: x for key, x in record["reference"].items() if key not in ("features", "pipeline")}
    )
    rows |= {f"options of {name}": _pairs(options) for name, options in record["metrics"].items() if options}
    rows["versions"] = _pairs(record["versions"])
    return [{"": key, "of this evaluation": value.replace("|", "\\|")} for key, value in rows.items()]


def samples_facts(record: Mapping[str, Any]) -> dict[str, str]:
    """How the samples came to be."""
    sampling, pixels = record["sampling"], record["data"]["kind"] == "pixels"
    if "samples" in sampling:
        digest = f"SHA-256 {sampling['digest'][:16]}"
        rows = {"samples": f"{record['n']} in {sampling['samples']} ({digest}): {_pairs(sampling['file'])}"}
        rows |= {"drawn by": _pairs(sampling["drawn"])} if sampling["drawn"] else {}
        lossy = sampling["file"].get("compressed", 0)
        return rows | ({"compression": f"{lossy} of them are JPEG or WebP"} if pixels and lossy else {})
    seeds = sampling["seeds"]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"each of the {len(seeds)} seeds {short(seeds)}"
    rows = {"samples": f"{record['n']} of {which}; sample k of a seed is a function of both, whatever the batch size"}
    if pixels:
        rows["compression"] = "none: samples are compared as they are drawn"
    steps = (
        "its own steps" if sampling["steps"] is None else f"{sampling['steps']} steps of the grid {sampling['grid']}"
    )
    options = {key: value for key, value in sampling["options"].items() if key != "compile"}
    rows["solver"] = f"{sampling['solver']}, {steps}, from t = {sampling['T']:g} to {sampling['t_min']:g}; "
    rows["solver"] += _pairs(options)
    rows["noise"] = f"{sampling['noise']} draws" if sampling["noise"] == "independent" else "of one path per sample"
    rows["labels"] = sampling["label"]
    rows["arithmetic"] = _pairs({key: sampling[key] for key in ("precision", "compile", "batch_size")})
    return rows


def model_lines(record: Mapping[str, Any]) -> list[str]:
    """The part of the card about the model itself; nothing where nothing is known."""
    lines: list[str] = []
    if (likelihood := record.get("likelihood")) is not None:
        value = with_error(likelihood["bits_per_dim"], likelihood["standard_error"])
        where = f"[{likelihood['folder']}]({likelihood['link']})" if likelihood["link"] else likelihood["folder"]
        lines += [
            f"{value} bits/dim of this checkpoint ({likelihood['kind']}, {likelihood['n']:g} of split="
            f"{likelihood['split']}, ema={likelihood['ema']}), computed before: {where}",
            "",
        ]
    if (measured := record.get("likelihood_of_splits")) is not None:
        lines += [*markdown(likelihood_rows(measured)), ""]
        lines += [
            f"By {record['likelihood_of']}. Bits per dimension are: {measured['train']['meaning']}. Errors are "
            "standard errors over examples. A gap above 0 is overfitting: training examples are likelier than others.",
            "",
        ]
    if record.get("diagnostics"):
        lines += [*markdown(by_level(record["diagnostics"])), "", f"Of {record['diagnostics_of']}.", ""]
        for picture in record["diagnostic_pictures"]:
            lines += [f"![{Path(picture).stem}]({picture})", ""]
    return ["## The model itself", "", *lines] if lines else []


def _pairs(values: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in values.items() if value not in (None, {}, [])}
    return ", ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in shown.items())


def short(value: Any) -> str:
    """A value in words; hashes and long lists are cut off."""
    if isinstance(value, Mapping):
        return _pairs(value)
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value)) if len(value) <= 20 else f"{value[0]}, {value[1]}, ..., {value[-1]}"
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:16]  # a hash, whole in the .json
    return text if len(text) <= 200 else text[:200] + "..."


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table."""
    if not rows:
        return []
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]


def read_record(path: Path) -> dict[str, Any] | None:
    """An evaluation's record; None for a file that is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    needed = {"scores", "cost", "model", "sampling", "metrics", *COMPARABLE}
    return record if isinstance(record, dict) and needed <= record.keys() else None
