"""conf/ and the classes say the same: names, options, defaults; and only registered classes can be built.

A file of a group is either that of a registered class, with all of its options, or a preset: another file of the group,
named in `defaults`, with some options changed.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import sde.config
from sde.config import build, conf_dir, conform, find_class, path_of
from sde.errors import UserError
from sde.registry import Registry

RUNTIME = {"shape", "num_classes", "params"}  # facts of a run, never in a file
NAMED_SETTINGS = {("model", "ddpmpp"), ("model", "ddpm")}  # files that may differ from the defaults of their class
FILES = sorted(
    (registry.kind, name, cls)
    for registry in Registry.all
    for name, cls in registry.items()
    if cls.__module__.startswith("sde.")
)


def read(group: str, name: str) -> dict[str, Any]:
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def presets() -> list[tuple[str, str]]:
    """(group, name) of every file that is not that of a registered class."""
    registered = {(registry.kind, name) for registry in Registry.all for name in registry}
    groups = {kind for kind, _ in registered}
    files = {(kind, path.stem) for kind in groups for path in (conf_dir() / kind).glob("*.yaml")}
    return sorted(files - registered - {("grid", "auto"), ("divergence", "auto"), ("features", "auto")})


def options(group: str, name: str) -> dict[str, Any]:
    """What a file holds when the presets that it rests on are filled in."""
    node = read(group, name)
    base = node.pop("defaults", [None])[0]
    return node if base is None else options(group, base) | node


@pytest.mark.parametrize("kind", sorted({registry.kind for registry in Registry.all if len(registry)}))
def test_every_registered_name_has_a_file(kind: str) -> None:
    names = {name for group, name, _ in FILES if group == kind}  # those of plugins of other tests left out
    assert names <= {path.stem for path in (conf_dir() / kind).glob("*.yaml")}


@pytest.mark.parametrize(("kind", "name"), presets())
def test_a_preset_changes_options_of_another_file(kind: str, name: str) -> None:
    node = read(kind, name)
    base, *rest = node.pop("defaults")
    assert rest == ["_self_"]
    original = options(kind, base)
    assert node
    for key, value in node.items():
        assert value != original[key], key
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = OmegaConf.to_container(compose("train", overrides=[f"{kind}={name}"])[kind])
    assert composed == original | node
    lines = (conf_dir() / kind / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all("  # " in line for line in lines if line.split(":")[0] in node)


@pytest.mark.parametrize("name", [name for kind, name in presets() if kind == "model"])
def test_a_model_preset_can_be_built(name: str) -> None:
    node = options("model", name)
    side = max(32, 2 ** len(node.get("channel_multipliers", [])))
    with torch.device("meta"):
        assert build(node, "model", shape=(3, side, side)).shape == (3, side, side)


NUMBERED = {
    name: found
    for kind, name in presets()
    if kind == "model"
    and (
        found := re.search(
            r"([\d.]+) M parameters(?: for (\d+)x(\d+)x(\d+) and (\d+) classes)?",
            (conf_dir() / kind / f"{name}.yaml").read_text(),
        )
    )
}


@pytest.mark.parametrize("name", NUMBERED)
def test_a_model_preset_has_the_number_of_parameters_of_its_header(name: str) -> None:
    """To the digits given; for 3x32x32 without classes unless the header says otherwise."""
    millions, *sizes = NUMBERED[name].groups()
    *shape, classes = (int(size) for size in sizes) if sizes[0] else (3, 32, 32, 0)
    with torch.device("meta"):
        model = build(options("model", name), "model", shape=tuple(shape), num_classes=classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    digits = len(millions.partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == millions


@pytest.mark.parametrize(("kind", "name", "cls"), FILES, ids=[f"{kind}-{name}" for kind, name, _ in FILES])
def test_file_and_constructor_have_the_same_options_and_defaults(kind: str, name: str, cls: type) -> None:
    node = read(kind, name)
    assert node.pop("_target_") == path_of(cls)
    parameters = {k: v for k, v in inspect.signature(cls).parameters.items() if k not in RUNTIME}
    assert list(node) == list(parameters)
    hints = inspect.get_annotations(cls.__init__, eval_str=True)
    for key, parameter in parameters.items():
        value = conform(key, node[key], hints[key])
        if (kind, name) not in NAMED_SETTINGS and parameter.default is not parameter.empty:
            assert value == parameter.default, key


@pytest.mark.parametrize(("kind", "name", "cls"), FILES, ids=[f"{kind}-{name}" for kind, name, _ in FILES])
def test_every_file_says_what_each_option_means(kind: str, name: str, cls: type) -> None:
    lines = (conf_dir() / kind / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines[1:]:
        if line and not line.startswith(("#", "_target_", " ")):
            assert "#" in line, line


def test_the_configuration_folder_is_absolute() -> None:
    assert conf_dir().is_absolute()
    assert (conf_dir() / "train.yaml").is_file()


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "sde.processes.Vp", "torch.load", "subprocess.Popen", "sde.config.import_plugins"],
)
def test_a_target_that_is_not_registered_is_not_even_imported(target: str) -> None:
    with pytest.raises(UserError, match="is not a registered sde"):
        find_class(target, "sde")


def test_a_class_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="is not a registered solver"):
        build({"_target_": "sde.processes.VP"}, "solver")


def test_build_names_what_is_wrong() -> None:
    vp = "sde.processes.VP"
    assert build({"_target_": vp, "beta_max": 10}, "sde") == sde.VP(beta_max=10.0)
    with pytest.raises(UserError, match=r"beta_mix is not an option of VP.*did you mean 'beta_min'"):
        build({"_target_": vp, "beta_mix": 1}, "sde")
    with pytest.raises(UserError, match=r"sde.beta_min='a lot' must be a number"):
        build({"_target_": vp, "beta_min": "a lot"}, "sde")
    with pytest.raises(UserError, match=r"model.shape is missing"):
        build(read("model", "mlp"), "model")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        (3.0, int, 3),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        (None, int | None, None),
        ("a", str | list[str], "a"),
        (["a"], str | list[str], ["a"]),
        (4, str, "4"),
        (True, bool, True),
    ],
)
def test_conform(value: Any, hint: Any, expected: Any) -> None:
    result = conform("x", value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(1.5, int), (True, int), (True, float), ("x", float), (1, bool), ([1], tuple[int, int]), ("ab", tuple[str, ...])],
)
def test_conform_refuses(value: Any, hint: Any) -> None:
    with pytest.raises(UserError, match="x="):
        conform("x", value, hint)


def test_a_solver_of_ones_own_needs_a_module_and_a_file_of_its_own(tmp_path: Path) -> None:
    """What the README promises: registering a class in a plugin is enough to build it."""
    (tmp_path / "my_sdes.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from sde.processes import VP, register

            @register("constant_rate")
            @dataclass(frozen=True)
            class ConstantRate(VP):
                beta_min: float = 5.0
                beta_max: float = 5.1
            """
        )
    )
    program = (
        "import sde.config as c; c.import_plugins(['my_sdes']);"
        "print(c.build({'_target_': 'my_sdes.ConstantRate'}, 'sde').beta_min)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(sde.config.__file__).parent.parent,
    )
    assert done.stdout.strip() == "5.0"
