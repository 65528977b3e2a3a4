"""The arrows of the design: who may import whom, read from the source with `ast`.

    processes, grids, parameterizations <- denoiser, losses, reverse <- guidance, solvers, likelihood <- training
    <- command lines; models, data and metrics know nothing of the rest; hydra for the command lines, wandb for one.

An import inside a function counts: it is an arrow all the same.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sde
from sde.registry import Registry

ROOT = Path(sde.__file__).parent

FOUNDATION = {"errors", "registry", "broadcast"}
CURVES = FOUNDATION | {"processes"}
CORE = CURVES | {"grids", "parameterizations", "denoiser", "reverse", "losses", "randomness", "brownian"}
TOOLS = {"files", "devices", "distributed", "memory", "progress", "interrupting"}  # know no room

# What each room may import besides itself. A room that is not named is above all of these: none of them imports it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "broadcast": set(),
    "registry": {"errors"},
    **{tool: {"errors"} for tool in TOOLS},
    "devices": {"errors", "distributed"},
    "progress": {"distributed"},
    "randomness": {"errors"},
    "brownian": {"errors", "randomness"},
    "processes": FOUNDATION,
    "grids": CURVES,
    "parameterizations": CURVES,
    "denoiser": CURVES | {"parameterizations"},
    "reverse": CURVES | {"denoiser"},
    "losses": CURVES | {"denoiser"},
    "solvers": CORE - {"losses", "grids", "brownian"},
    "guidance": CORE - {"losses", "grids", "brownian"},
    "density": CORE | {"solvers", "data"},
    "models": FOUNDATION | TOOLS,
    "data": FOUNDATION | TOOLS,
    "metrics": FOUNDATION | TOOLS,
    "evaluation": CORE | TOOLS | {"density", "data", "models", "metrics", "training", "pictures", "sampling"},
    "training": CORE | TOOLS | {"solvers", "guidance", "density", "data", "models", "metrics"},
}

# Modules of the command lines; omegaconf comes with hydra.
COMMAND_LINES = {
    "sde.cli",
    "sde.config",
    "sde.evaluate",
    "sde.interop",
    "sde.runs",
    "sde.sample",
    "sde.train",
    "sde.train_folder",
}
OUTSIDERS = {"hydra": COMMAND_LINES, "omegaconf": COMMAND_LINES, "wandb": {"sde.training.logging"}}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("sde", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that `module` imports anywhere in its source: of the package, to the file, others by their name."""
    known, found = modules(), set()
    tree = ast.parse(known[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            # `from sde.data import glyphs` imports a module, `from sde.data import Split` a name
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return frozenset(found)


def room(module: str) -> str:
    """`data` of `sde.data.glyphs`, `` of `sde` itself."""
    return module.split(".")[1] if "." in module else ""


def test_the_reader_sees_imports() -> None:
    # were the parser blind, every test here would pass
    assert "sde.processes" in imports("sde.denoiser")
    assert "sde.solvers.base" in imports("sde.solvers.heun")
    assert "torch" in imports("sde.broadcast")
    assert len(modules()) > 30
    assert any("hydra" in imports(m) for m in modules())


@pytest.mark.parametrize("module", [m for m in modules() if room(m) in MAY_IMPORT])
def test_arrows_point_one_way(module: str) -> None:
    here = room(module)
    rooms = {room(other) for other in imports(module) if other.split(".")[0] == "sde"}
    forbidden = rooms - MAY_IMPORT[here] - {here}
    assert not forbidden, f"{module} must not import sde.{', sde.'.join(sorted(forbidden))}"


@pytest.mark.parametrize("outsider", OUTSIDERS)
def test_outsiders_have_their_door(outsider: str) -> None:
    doors = {m for m in modules() if any(other.split(".")[0] == outsider for other in imports(m))}
    allowed = OUTSIDERS[outsider]
    strangers = {m for m in doors if not any(m == door or m.startswith(f"{door}.") for door in allowed)}
    assert not strangers, f"{outsider} is imported by {', '.join(sorted(strangers))}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {m: {o for o in imports(m) if o in modules()} for m in modules()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_importing_the_library_is_light() -> None:
    loaded = loaded_by("import sde")
    assert {"sde", "torch"} <= loaded
    assert not loaded & {"hydra", "omegaconf", "wandb", "matplotlib", "datasets", "torchvision"}


def test_public_names_exist() -> None:
    assert sorted(sde.__all__) == list(dict.fromkeys(sorted(sde.__all__)))
    for name in sde.__all__:
        assert hasattr(sde, name), name


# Abstract or final


@cache
def everything_registered() -> tuple[tuple[str, type], ...]:
    """(kind.name, class) of every registry, all modules loaded."""
    for info in pkgutil.walk_packages([str(ROOT)], "sde."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    return tuple((f"{r.kind}.{name}", cls) for r in Registry.all for name, cls in r.items())


def test_leaves_are_not_subclassed() -> None:
    assert len(everything_registered()) > 20
    for name, cls in everything_registered():
        heirs = [heir for heir in cls.__subclasses__() if heir.__module__.split(".")[0] == "sde"]
        assert not heirs, f"{name} is a leaf, but {heirs[0].__qualname__} is derived from it"
        assert not inspect.isabstract(cls), name


def test_abstract_or_final() -> None:
    """A leaf stands on its kind, and at most on one family of that kind; what it stands on cannot be made itself."""
    for name, cls in everything_registered():
        above = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] == "sde"]
        assert len(above) <= 2, f"{name} stands on {[base.__qualname__ for base in above]}"
        if len(above) == 2:
            assert all(inspect.isabstract(base) for base in above), name


def asked_types(module: str) -> set[str]:
    """The names that `module` tests with isinstance."""
    names = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            names |= {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
    return names


CORE_KINDS = ("sde", "parameterization", "grid", "solver", "loss")


def test_nobody_asks_which_leaf_it_has() -> None:
    """No solver asks which SDE it has, nor anything else which leaf: what differs is a method of the leaf."""
    leaves = {cls.__name__ for name, cls in everything_registered() if name.split(".")[0] in CORE_KINDS}
    lower = [m for m in modules() if room(m) in MAY_IMPORT]
    assert "UserError" not in leaves
    for module in lower:
        assert not asked_types(module) & leaves, f"{module} asks for {asked_types(module) & leaves}"


def test_lower_rooms_name_no_leaf_of_another() -> None:
    """solvers see an SDE, not VP or VE; denoisers a Parameterization, not Eps."""
    leaves = {
        (cls.__module__, cls.__name__) for name, cls in everything_registered() if name.split(".")[0] in CORE_KINDS
    }
    for module, path in modules().items():
        if room(module) not in MAY_IMPORT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None and room(node.module) != room(module):
                named = {alias.name for alias in node.names if (node.module, alias.name) in leaves}
                # a loss is a class of one leaf, and training holds it
                assert not named or room(module) == "training", f"{module} imports {named}"
