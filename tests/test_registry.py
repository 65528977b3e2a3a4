"""Names for classes, and the errors that users see."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest

from sde.config import closest_key
from sde.errors import UserError, check_choice, check_number, closest, suggest
from sde.grids import GRIDS
from sde.losses import LOSSES
from sde.parameterizations import PARAMETERIZATIONS
from sde.processes import SDES
from sde.registry import Registry
from sde.solvers import SOLVERS

CORE = [SDES, PARAMETERIZATIONS, GRIDS, SOLVERS, LOSSES]


@pytest.fixture
def things(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of two classes that leaves no trace in `Registry.all`."""
    monkeypatch.setattr(Registry, "all", list(Registry.all))
    registry: Registry = Registry("thing")
    assert Registry.all[-1] is registry
    registry.register("pear")(type("Pear", (), {}))
    registry.register("apple")(type("Apple", (), {}))
    return registry


def test_a_registry_is_a_sorted_dictionary(things: Registry) -> None:
    assert list(things) == ["apple", "pear"]
    assert len(things) == 2
    assert "pear" in things
    assert "plum" not in things
    assert [name for name, _ in things.items()] == ["apple", "pear"]
    assert things.get("pear").__name__ == "Pear"
    assert things.name_of(things.get("apple")) == "apple"


def test_registering_returns_the_class(things: Registry) -> None:
    cls = type("Plum", (), {})
    assert things.register("plum")(cls) is cls
    assert things.get("plum") is cls


def test_a_name_is_taken_once(things: Registry) -> None:
    with pytest.raises(ValueError, match=r"the thing name 'pear' is taken by Pear"):
        things.register("pear")(type("Quince", (), {}))
    assert things.get("pear").__name__ == "Pear"
    # the module of a class may be loaded again, in a notebook
    again = type("Pear", (), {})
    things.register("pear")(again)
    assert things.get("pear") is again


def test_an_unknown_name_is_answered_with_the_known(things: Registry) -> None:
    with pytest.raises(UserError) as error:
        things.get("aple")
    assert str(error.value) == "there is no thing 'aple': it is one of apple, pear; did you mean 'apple'?"
    with pytest.raises(UserError) as error:
        things.get("zzz")
    assert str(error.value) == "there is no thing 'zzz': it is one of apple, pear"


@pytest.mark.parametrize("registry", CORE, ids=lambda r: r.kind)
def test_registered_classes(registry: Registry) -> None:
    assert registry in Registry.all
    assert len({r.kind for r in Registry.all}) == len(Registry.all)
    for name, cls in registry.items():
        assert name == name.lower()
        assert name.isidentifier()
        assert registry.name_of(cls) == name
        assert not inspect.isabstract(cls), name
        assert inspect.getdoc(cls), name
        # small frozen values: equal when their fields are, usable as keys of a table
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen, name
        if name != "explicit":
            assert cls() == cls()
            assert hash(cls()) == hash(cls())


def test_the_kinds_of_the_core() -> None:
    assert [r.kind for r in CORE] == ["sde", "parameterization", "grid", "solver", "loss"]
    assert {"vp", "ve", "subvp"} <= set(SDES)
    assert {"eps", "score", "x0", "v", "edm"} <= set(PARAMETERIZATIONS)
    assert {"pc", "ode", "heun", "euler_maruyama"} <= set(SOLVERS)
    for solver in SOLVERS.items():
        assert solver[1].default_grid in GRIDS
        assert solver[1]().grid_name in GRIDS


# Errors


def test_user_errors_are_value_errors() -> None:
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("langevn", "; did you mean 'langevin'?"),
        ("LANGEVIN", "; did you mean 'langevin'?"),
        ("rk45", "; did you mean 'RK45'?"),
        ("quite else", ""),
        (7, ""),
        (None, ""),
    ],
)
def test_suggestions(value: object, said: str) -> None:
    assert suggest(value, iter(["langevin", "ald", "RK45"])) == said


def test_options_of_one_section_are_not_alike_for_its_sake() -> None:
    """What they share is not what was misspelt."""
    config = {
        "training": {"clip": 1, "steps": 2, "lr_scale": 3},
        "optimizer": {"lr": 1},
        "loss": {"time": 0},
        "time": 0,
    }
    assert closest_key("training.lerning", config) == (["clip", "steps", "lr_scale"], None)
    assert closest_key("training.stepz", config)[1] == "training.steps"
    assert closest_key("trainin.stesp", config)[1] == "training.steps"
    assert closest_key("training.lr", config)[1] == "optimizer.lr"  # the one of this name
    assert closest_key("training.time", config)[1] is None  # there are two
    assert closest("torch.optim.Lion", ["torch.optim.Adam", "torch.optim.SGD"]) is None
    assert closest("torch.optim.Adamm", ["torch.optim.Adam", "torch.optim.SGD"]) == "torch.optim.Adam"
    assert closest("std0.15", ["0.9", "std0.05", "std0.1"]) == "std0.1"  # no section


def test_choices() -> None:
    check_choice("color", "red", iter(["red", "green"]))
    with pytest.raises(UserError) as error:
        check_choice("color", "gren", iter(["red", "green"]))
    assert str(error.value) == "color='gren' is not one of red, green; did you mean 'green'?"
    with pytest.raises(UserError, match="color=None"):
        check_choice("color", None, ["red"])


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0, {"above": 0}, "x=0 is out of range: it must be above 0"),
        (-0.5, {"at_least": 0, "below": 1}, "x=-0.5 is out of range: it must be at least 0 and below 1"),
        (1, {"below": 1}, "x=1 is out of range: it must be below 1"),
        (2.5, {"at_most": 2}, "x=2.5 is out of range: it must be at most 2"),
        (math.nan, {}, "x=nan is out of range: it must be finite"),
        (math.inf, {"above": 0}, "x=inf is out of range: it must be above 0"),
        (True, {}, "x=True is not a number"),
        ("1", {}, "x='1' is not a number"),
        (None, {"above": 0}, "x=None is not a number"),
    ],
)
def test_numbers_out_of_range(value: object, bounds: dict[str, float], said: str) -> None:
    with pytest.raises(UserError) as error:
        check_number("x", value, **bounds)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(0, {"at_least": 0}), (1, {"at_most": 1}), (0.5, {"above": 0, "below": 1}), (-1e300, {}), (3, {"above": 2})],
)
def test_numbers_in_range(value: float, bounds: dict[str, float]) -> None:
    check_number("x", value, **bounds)
