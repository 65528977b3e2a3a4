"""`python -m sde.evaluate`: how good the samples of a trained run are, in numbers that say how sure they are.

Samples are drawn (or taken from files), described by features, and held against the training data; held-out data in
place of samples give the floor, the number that perfect samples would have at that size. `sde.evaluation` and
`sde.metrics` do the work; here it is composed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde.cli import Interrupted, add_data_overrides, run_command, task_overrides
from sde.commands import (
    BAR,
    Model,
    check_settings,
    chosen_grid,
    class_labels,
    describe_way,
    open_model,
    run_dataset,
    was_dequantized,
    watched,
)
from sde.config import build
from sde.data import DataInfo, Order
from sde.density.likelihood import Likelihood, check_arithmetic
from sde.devices import autocast, pick_device
from sde.distributed import any_signal, is_main, on_main
from sde.errors import UserError, check_choice, check_number
from sde.evaluate_results import Against, Found, Task, describe, note, print_table, weights_hash, write_all
from sde.evaluation.diagnostics import Diagnostic
from sde.evaluation.extractors import EXTRACTORS, Extractor, chosen_for
from sde.evaluation.gaussian import ToGaussian
from sde.evaluation.likelihood import TrainAndTest, likelihood_of
from sde.evaluation.loader import load_samples
from sde.evaluation.model import Asked
from sde.evaluation.reference import (
    Reference,
    open_reference,
    read_statistics,
    reference,
    write_reference,
    write_statistics,
)
from sde.evaluation.samples import Described, Drawn, describe_file, forget_given_up
from sde.evaluation.scores import Floor, Scored, score
from sde.evaluation.torchscript import SUFFIXES
from sde.metrics import METRICS, Metric, Rows, Sets
from sde.progress import progress_bar
from sde.sampling import Plan, denoised_at_the_end, make_times
from sde.solvers import Solver
from sde.training.logging import Logger
from sde.training.stopping import StopRequest

ALIASES = {"fid": ("fd", "inception"), "fd_dinov2": ("fd", "dinov2")}
"""Names that published numbers go by: the metric, and the features that make it so."""
PICTURES = ("fd", "kid", "pr", "dc")
LABELED = ("is",)
MOST = 10**8  # samples; so many features are a terabyte
SAYS = ("checkpoint", "ema", "solver", "options", "grid", "steps", "nfe", "n", "seeds", "noise", "label", "precision")
POINTS = ("wasserstein", "grid_kl", "energy", "swd", "c2st")


def main() -> None:
    """Entry point of the command line."""
    add_data_overrides()
    add_features()
    run_command("evaluate", evaluate, several=True)


def add_features() -> None:
    """Let features=FILE and features.path=FILE choose the extractor that reads a file."""
    words = []
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        is_file = key == "features" and ("/" in value or Path(value).suffix in (".safetensors", ".pt2", *SUFFIXES))
        words += [f"features={reader_of(value)}", f"features.path={value}"] if is_file else [word]
    given = [word.partition("=")[2] for word in words if word.startswith("features.path=")]
    if given and not any(word.startswith("features=") for word in words):
        words.append(f"features={reader_of(given[-1])}")
    sys.argv[1:] = words


def reader_of(path: str) -> str:
    """The extractor that reads such a file."""
    return "torchscript" if Path(path).suffix in SUFFIXES else "module"


def evaluate(config: dict[str, Any]) -> None:
    """Evaluate as `config` says, and write what was found."""
    check_options(config)
    device = pick_device(config["device"])
    logger: Logger = build(config["logger"], "logger")
    task = make_task(config, device)
    folder = task.model.run.path / "evaluations" if config["out"] is None else Path(str(config["out"])).expanduser()
    on_main(lambda: forget_given_up(folder))
    against = references(task)
    drawn, sampling, sources = samples_of(task, folder, against)
    diagnostics, likelihood = diagnosed(task), likelihoods(task)
    if not is_main():
        return
    started = time.perf_counter()
    scores = all_scores(task, drawn, against)
    found = Found(drawn, sampling, scores, diagnostics, likelihood, time.perf_counter() - started)
    record = describe(task, against, found)
    written = write_all(task, record, found, folder)
    print_table(record)
    note(task, record, written[0], logger)
    for source in sources:
        source.forget()
    for path in written:
        print(path)


# Options


def check_options(config: Mapping[str, Any]) -> None:
    """Check what can be checked before anything is opened.

    Raises:
        UserError: for the first option that has no meaning.
    """
    check_settings({**config, "seed": 0})
    seeds = config["seeds"]
    if not isinstance(seeds, list) or not seeds or any(not isinstance(s, int) or isinstance(s, bool) for s in seeds):
        raise UserError(f"seeds={seeds!r} must be a list of whole numbers, such as [0] or [0,1,2]")
    for seed in seeds:
        check_settings({**config, "seed": seed})
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={seeds} draws the same samples twice: name each seed once")
    for option, least in (("examples", 2), ("groups", 2)):
        value = config[option]
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{option}={value!r} must be a whole number")
        check_number(option, value, at_least=least)
    check_choice("reference_split", config["reference_split"], ("train", "test"))
    check_number("n", config["n"], at_most=MOST)
    given = next((word for word in reversed(task_overrides()) if word.startswith("n=")), None)
    if config["samples"] is not None and given is not None:
        raise UserError(f"samples={config['samples']} is taken whole: leave {given} out")
    if config["samples"] is not None and len(seeds) > 1:
        raise UserError(f"samples={config['samples']} is one set: leave seeds={seeds} out")
    if config["reference"] is not None and config["reference_n"] is not None:
        raise UserError(f"reference={config['reference']} is all there is: leave reference_n out")
    if not isinstance(config["diagnostics"], list | str):
        raise UserError(f"diagnostics={config['diagnostics']!r} must be a list, such as [denoising,curl]")


def make_task(config: Mapping[str, Any], device: torch.device) -> Task:
    """Everything that the computation needs, checked.

    Raises:
        UserError: for options that do not go together, with the run or with its data.
    """
    names, features = wanted_metrics(config)
    nodes = {name: config[name] for name in config if isinstance(config[name], Mapping) and name in METRICS}
    metrics: dict[str, Metric] = {name: build(node, "metrics") for name, node in nodes.items()}
    options = config["diagnostics_options"]
    wanted = [config["diagnostics"]] if isinstance(config["diagnostics"], str) else config["diagnostics"]
    asked = Asked(tuple(dict.fromkeys(wanted)), **options, batch_size=config["batch_size"])
    model = open_model(dict(config), device)
    dataset = run_dataset(model, config["data"])
    extractor = chosen_extractor(config, model.info, features)
    if names is None:
        names = suitable_metrics(model.info, extractor)
    held_out = bool(len(dataset.split("test")))
    for name in names:
        check_suits(name, model.info, extractor, held_out)
    chosen = {name: metrics[name] if name in metrics else METRICS.get(name)() for name in names}  # plugins' as they are
    task = Task(config, model, dataset, extractor, chosen, asked, device)
    if asked.likelihood:
        check_arithmetic(config["precision"], config["compile"])
        compared(task)
    extractor.prepare(dataset, device)
    return task


def wanted_metrics(config: Mapping[str, Any]) -> tuple[list[str] | None, str | None]:
    """The metrics that were asked for, None for those that suit the data, and the features that their names imply.

    Raises:
        UserError: for a metric that there is not, or names that imply different features.
    """
    wanted = config["metric"]
    if wanted == "auto":
        return None, None
    given = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(given, list) or not given:
        raise UserError(f"metric={wanted!r} must be a metric, a list of them, or auto")
    for name in given:
        check_choice("metric", name, (*METRICS, *ALIASES))
    implied = {ALIASES[name][1]: name for name in given if name in ALIASES}
    if len(implied) > 1:
        raise UserError(
            f"metric={','.join(implied.values())} are of different features ({', '.join(implied)}): evaluate one after "
            "the other; samples that both are to see can be drawn once, with python -m sde.sample"
        )
    names = [ALIASES[name][0] if name in ALIASES else name for name in given]
    return list(dict.fromkeys(names)), next(iter(implied), None)


def chosen_extractor(config: Mapping[str, Any], info: DataInfo, implied: str | None) -> Extractor:
    """The extractor that was asked for, that a metric's name implies, or that suits the data.

    Raises:
        UserError: when what was asked for is not what the metric's name implies.
    """
    node = config["features"]
    if node.get("_target_") is None:
        return chosen_for(info) if implied is None else EXTRACTORS.get(implied)()
    extractor: Extractor = build(node, "features")
    if implied not in (None, extractor.name):
        alias = next(name for name, (_, features) in ALIASES.items() if features == implied)
        raise UserError(
            f"metric={alias} is the Fréchet distance of features={implied} and here are features={extractor.name}: "
            "leave features out, or take metric=fd"
        )
    return extractor


def suitable_metrics(info: DataInfo, extractor: Extractor) -> list[str]:
    """The metrics of metric=auto."""
    if info.kind == "vectors":
        return [name for name in POINTS if info.shape == (2,) or not METRICS.get(name).planar]
    return [*PICTURES, *(LABELED if extractor.classifies else ())]


def check_suits(name: str, info: DataInfo, extractor: Extractor, held_out: bool) -> None:
    """Raise `UserError` unless a metric suits the data and the features."""
    metric = METRICS.get(name)
    if metric.planar and info.shape != (2,):
        raise UserError(f"metric={name} is for points in the plane and the data have shape {tuple(info.shape)}")
    if metric.of == "probabilities" and not extractor.classifies:
        raise UserError(f"metric={name} needs class probabilities: take features=classifier or features=inception")
    if metric.needs_held_out and not held_out:
        raise UserError(f"metric={name} needs data that the model has not seen, and {info.name} has no test split")


# What samples are held against


def references(task: Task) -> Against:
    """Features of the data and of held-out data, or what a file holds in place of the first.

    Raises:
        UserError: a file does not fit the data, the features or the metrics.
    """
    config, split = task.config, task.config["reference_split"]
    other = "test" if split == "train" else "train"
    how = (task.extractor, task.device, config["batch_size"])
    own, statistics = None, None
    path = None if config["reference"] is None else Path(str(config["reference"])).expanduser()
    if path is not None and path.suffix == ".npz":
        check_alone(task, path)
        statistics = read_statistics(path, int(task.extractor.describe()["dimensions"]))
    elif path is not None:
        own = open_reference(path, task.extractor, task.dataset, split)
    else:
        own = reference(task.dataset, split, *how, config["reference_n"])
    held_out = reference(task.dataset, other, *how, None) if len(task.dataset.split(other)) else None
    if config["export"] is not None:
        export = Path(str(config["export"])).expanduser()
        on_main(lambda: export_reference(export, own))
    return Against(own, held_out, statistics)


def check_alone(task: Task, path: Path) -> None:
    """Raise `UserError` for metrics that a mean and a covariance are not enough for."""
    others = [name for name, metric in task.metrics.items() if name != "fd" and metric.of == "features"]
    if others or "fd" not in task.metrics:
        raise UserError(
            f"reference={path} holds a mean and a covariance, which are enough for fd and not for "
            f"{', '.join(others or task.metrics)}: take metric=fd, or leave reference out"
        )
    if getattr(task.metrics["fd"], "extrapolate", False):
        raise UserError(f"reference={path} cannot be divided into parts: take fd.extrapolate=false")


def export_reference(path: Path, own: Reference | None) -> None:
    """Write the reference: mean and covariance into an .npz, all features into a .safetensors.

    Raises:
        UserError: there is none, or the file is to be of another kind.
    """
    if own is None:
        raise UserError(f"export={path} writes the features of the data: leave reference out")
    if path.suffix == ".npz":
        write_statistics(path, own.features)
    elif path.suffix == ".safetensors":
        write_reference(path, own)
    else:
        raise UserError(f"export={path} is of no known kind: .npz for mu and sigma, .safetensors for all features")


# Samples


class _Stopped(Exception):
    """Leaves a solver between two steps."""


def samples_of(task: Task, folder: Path, against: Against) -> tuple[list[Described], dict[str, Any], list[Drawn]]:
    """The sets of samples, how they came to be, and what keeps the parts of those that were drawn.

    Raises:
        UserError: they are too few for a metric.
        Interrupted: when asked to stop; what has been drawn by then is kept.
    """
    config, model = task.config, task.model
    if config["samples"] is not None:
        samples = load_samples(Path(str(config["samples"])).expanduser(), model.info, config["batch_size"])
        check_sizes(task, against, len(samples))
        about, digest = on_main(lambda: (samples.about, samples.digest()))
        sampling = {"samples": str(samples.path), "file": about, "digest": digest}
        sampling |= drawn_by(samples.path, samples.info, model, config["ema"])
        return [describe_file(samples, task.extractor, config["batch_size"], config["examples"])], sampling, []
    check_sizes(task, against, config["n"])
    solver: Solver = build(config["solver"], "solver")
    grid = chosen_grid(dict(config))
    times = make_times(solver, model.denoiser, grid, config["steps"])
    solver = denoised_at_the_end(solver, model.denoiser, times) if config["denoise"] else solver
    labels = class_labels(config["label"], config["n"], model.denoiser, model.info)
    sampling = {
        **describe_way(solver, grid, list(times)),
        "denoise": config["denoise"],
        "noise": config["noise"],
        "label": label_policy(task, labels),
        **{key: config[key] for key in ("precision", "compile", "batch_size", "seeds")},
    }
    identity = {**sampling, "seeds": None, "times": list(times), "weights": weights_hash(model)}
    identity |= {"labels": None if labels is None else labels.tolist(), "device": task.device.type}
    sets, sources = [], []
    for seed in config["seeds"]:
        plan = Plan(solver, times, model.info.shape, seed, task.device, noise=config["noise"])
        drawn = Drawn(
            model.denoiser, plan, model.info, task.extractor, config["n"], config["batch_size"], labels,
            config["examples"], folder, identity,
        )  # fmt: skip
        draw(drawn, task)
        sets.append(drawn.collected())
        sources.append(drawn)
    return sets, without_infinities(sampling), sources


def check_sizes(task: Task, against: Against, n: int) -> None:
    """Raise `UserError` unless n samples and the data are enough for all metrics, before there are any samples."""
    config, dimensions = task.config, int(task.extractor.describe()["dimensions"])
    groups = config["groups"] if len(config["seeds"]) == 1 else 0
    given = "n" if config["samples"] is None else ""

    def check() -> None:
        # the one that needs most comes first: what it says is enough is enough for all
        for metric in sorted(task.metrics.values(), key=lambda metric: -metric.least(groups, dimensions)[0]):
            if metric.of != "examples":
                m = 0 if against.own is None else len(against.own)
                metric.check_size(n, m, groups, dimensions, given)
                continue
            most = config["examples"]
            sizes = {split: len(task.dataset.split(split)) for split in ("train", "test")}
            m = min(sizes.values()) if metric.needs_held_out else min(sizes[config["reference_split"]], most)
            metric.check_size(min(n, most), m, groups, option="examples" if most < n else given)

    on_main(check)


def drawn_by(path: Path, info: Mapping[str, Any] | None, model: Model, ema: bool | float | str) -> dict[str, Any]:
    """How python -m sde.sample drew the samples of a file, where it says so beside them; and whether of this model.

    Args:
        path: of the samples.
        info: what it says.
        model: that they may be of.
        ema: which of its weights.
    """
    if info is None:
        return {"of_the_model": False, "drawn": None}
    named, ours = Path(str(info.get("checkpoint", ""))), model.checkpoint.path
    inside = named.name == ours.name and path.resolve().is_relative_to(model.run.path.resolve())  # which may have moved
    drawn = {name: info[name] for name in SAYS if info.get(name) is not None}
    same = info.get("ema") == ema and (inside or named.resolve() == ours.resolve())
    return {"of_the_model": same, "drawn": without_infinities(drawn)}


def draw(drawn: Drawn, task: Task) -> None:
    """Draw a set with a progress bar.

    Raises:
        Interrupted: in all processes, when one of them was asked to stop.
    """
    name = f"samples of seed {drawn.plan.seed}"
    with (
        StopRequest().listening() as stop,
        progress_bar(drawn.n, unit="sample", desc=name, bar_format=BAR) as bar,
        autocast(task.device, task.config["precision"]),
        contextlib.suppress(_Stopped),
    ):

        def progress(share: float) -> None:
            if stop.signal is not None:
                raise _Stopped
            bar.update(share * drawn.n - bar.n)

        drawn.draw(progress)
    signal = any_signal(stop.signal)
    if signal is not None:
        kept = drawn.kept()
        raise Interrupted(
            f"interrupted: {kept} of {drawn.n} samples of seed {drawn.plan.seed} are kept, and the same command goes "
            "on from there",
            128 + signal,
        )


def label_policy(task: Task, labels: Tensor | None) -> str:
    """Which classes were asked for, in words."""
    if labels is None:
        return "none: the network is not told any"
    label = task.config["label"]
    return "each class in turn" if label in (None, "all") else f"{label}"


def without_infinities(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values, infinities as words, since JSON has none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        infinite = isinstance(value, float) and abs(value) == float("inf")
        found[key] = without_infinities(value) if isinstance(value, Mapping) else str(value) if infinite else value
    return found


def diagnosed(task: Task) -> list[Diagnostic]:
    """What was asked of the model itself."""
    if not task.asked.curves:
        return []
    with watched("diagnostics", task.asked.examples) as progress:
        return task.asked(task.model.denoiser, task.dataset, task.labeled, task.device, progress)


def compared(task: Task) -> tuple[Likelihood, TrainAndTest]:
    """How the likelihood is computed, and of what.

    Raises:
        UserError: the model or the data do not suit it.
    """
    asked = task.asked
    way = likelihood_of(task.model.denoiser, task.info, was_dequantized(task.model))
    return way, TrainAndTest(
        task.dataset, task.labeled, asked.examples, asked.seed, task.config["batch_size"], task.device
    )


def likelihoods(task: Task) -> dict[str, Any] | None:
    """The likelihood of training and of held-out examples, where it was asked for, in rank 0."""
    if not task.asked.likelihood:
        return None
    way, examples = compared(task)
    with watched("likelihood", examples.n) as progress:
        return examples(way, progress)


# Scores


def all_scores(task: Task, drawn: Sequence[Described], against: Against) -> list[Scored]:
    """All numbers of all metrics."""
    found: list[Scored] = []
    known: dict[str, tuple[list[Sets], Floor | None]] = {}
    with progress_bar(len(task.metrics), unit="metric", desc="metrics") as bar:
        for name, metric in task.metrics.items():
            bar.set_postfix_str(name)
            kind = "memorization" if metric.needs_held_out else "examples" if metric.of == "examples" else "features"
            if kind not in known:
                make = {"memorization": sets_beside_all, "examples": sets_of_examples, "features": sets_of_features}
                known[kind] = make[kind](task, drawn, against)
            if name == "fd" and against.statistics is not None:
                metric = ToGaussian.from_statistics(against.statistics, getattr(metric, "unbiased", True))
            sets, floor = known[kind]
            found += score(name, metric, sets, task.extractor.name, floor, task.config["groups"])
            bar.update()
    return found


def sets_of_features(task: Task, drawn: Sequence[Described], against: Against) -> tuple[list[Sets], Floor | None]:
    """Features of the samples beside those of the data."""
    data = drawn[0].features[:0] if against.own is None else against.own.features

    def sets(each: Described) -> Sets:
        return Sets(each.features, data, None, each.probabilities, strata=each.labels)

    held_out = against.held_out
    if held_out is None:
        return [sets(each) for each in drawn], None
    n = min(len(drawn[0]), len(held_out))
    rest = Described(held_out.features, held_out.probabilities, held_out.features[:0]).some(n)
    fewer = [sets(each.some(n)) for each in drawn] if n < len(drawn[0]) else None
    return [sets(each) for each in drawn], Floor(sets(rest), fewer)


def sets_of_examples(task: Task, drawn: Sequence[Described], against: Against) -> tuple[list[Sets], Floor | None]:
    """The samples themselves, as many as are kept, beside as many of the data."""
    split, most = task.config["reference_split"], task.config["examples"]
    data, rest = data_vectors(task, split, most), data_vectors(task, "test" if split == "train" else "train", most)

    def sets(each: Described, n: int | None = None) -> Sets:
        x = vectors(task.info, each.examples[:n])
        return Sets(x, data, strata=None if each.labels is None else each.labels[: len(x)])

    found = [sets(each) for each in drawn]
    n = min(len(found[0].generated), len(rest))
    if n == 0:
        return found, None
    fewer = [sets(each, n) for each in drawn] if n < len(found[0].generated) else None
    return found, Floor(Sets(rest[:n], data), fewer)


def sets_beside_all(task: Task, drawn: Sequence[Described], against: Against) -> tuple[list[Sets], Floor | None]:
    """The samples themselves beside all training examples, among which copies would be, and some that are held out."""
    some, rest = (data_vectors(task, split, task.config["examples"]) for split in ("train", "test"))
    train = Rows(task.dataset.split("train").values, lambda stored: vectors(task.info, stored))
    return [Sets(vectors(task.info, each.examples), some, rest, training=train) for each in drawn], None


def data_vectors(task: Task, split: str, most: int) -> Tensor:
    """Examples of a split as vectors, at most so many, chosen by seed 1."""
    values = task.dataset.split(split).values
    if not len(values):
        return torch.empty(0, 1)
    return vectors(task.info, values[Order(len(values), min(len(values), most), 1)(0)])


def vectors(info: DataInfo, stored: Tensor) -> Tensor:
    """Stored examples as vectors (n, D), as the network sees them."""
    return info.encode(stored).flatten(1)


if __name__ == "__main__":
    main()
