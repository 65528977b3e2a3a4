"""The command that puts solvers side by side: what it counts, what it measures, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sde.compare import Outcome, Trial, distance, row_of
from sde.denoiser import GaussianDenoiser
from sde.errors import UserError
from sde.grids import Uniform
from sde.pictures import _far_apart, _spread
from sde.processes import VP
from sde.runs import find_run, open_checkpoint, restore_denoiser
from sde.sampling import Plan, count_evaluations, draw, make_times, times_within
from sde.solvers import SOLVERS, Adams, EulerMaruyama, Heun, PredictorCorrector, SciPyODE
from tests.commands import command


def compared(folder: Path) -> dict[str, Any]:
    """What compare.json in `folder` says."""
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return found


# Budgets


@pytest.mark.parametrize("name", [n for n, cls in SOLVERS.items() if cls.default_steps is not None])
def test_a_budget_is_used_up_and_not_exceeded(name: str) -> None:
    """One step more would need more evaluations than there are."""
    solver = SOLVERS.get(name)()
    denoiser = GaussianDenoiser(VP(), torch.zeros(2), torch.tensor(0.25))
    least = count_evaluations(solver, denoiser.sde, make_times(solver, denoiser, None, 1))
    for budget in (max(20, least), max(33, 3 * least + 1)):
        times = times_within(solver, denoiser, None, budget)
        assert count_evaluations(solver, denoiser.sde, times) <= budget
        more = make_times(solver, denoiser, None, len(times))
        assert count_evaluations(solver, denoiser.sde, more) > budget


def test_evaluations_of_a_budget() -> None:
    denoiser = GaussianDenoiser(VP(), torch.zeros(2), torch.tensor(0.25))
    for solver, steps in ((Heun(), 10), (Adams(), 21), (PredictorCorrector(corrector_steps=2), 7)):
        assert len(times_within(solver, denoiser, Uniform(), 21)) - 1 == steps
    with pytest.raises(UserError, match="1 evaluation is not enough for Heun, whose first step takes 2"):
        times_within(Heun(), denoiser, None, 1)


# Errors


def test_the_error_is_a_root_mean_square_per_value() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert distance(x, torch.zeros(2, 2)) == pytest.approx(1.5, rel=1e-12)
    trial = Trial("heun", Heun(), (1.0, 0.1))
    exact = Outcome(trial, torch.zeros(2, 2), 1, 1.0)
    assert row_of(Outcome(trial, x, 2, 3.0), [exact, exact])["error"] == 1.5
    assert row_of(Outcome(trial, x, 2, 3.0), [exact, exact])["seconds_per_sample"] == 1.5
    noisy = Outcome(Trial("euler_maruyama", EulerMaruyama(), (1.0, 0.1)), x, 2, 3.0)
    assert row_of(noisy, [exact, exact])["error"] is None
    assert row_of(Outcome(trial, x, 2, 3.0), [])["error"] is None


def test_errors_are_those_of_the_end_points(point_run: Path) -> None:
    """What compare.json says, computed again from two sets of samples drawn one by one."""
    done = command(
        "sde.compare", "solvers=[heun,adams,pc,ode]", "steps=[4,8]", "n=5", "batch_size=2", "seed=3", "out=errors",
        "reference=ode", "reference_tolerance=1e-4", "tolerances=[1e-2]", "denoise=false", folder=point_run,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = compared(point_run / "errors")
    rows = {(row["solver"], row["nfe"]): row for row in found["rows"]}
    assert [row["solver"] for row in found["rows"]] == ["heun"] * 2 + ["adams"] * 2 + ["pc"] * 2 + ["ode"]
    assert [row["nfe"] for row in found["rows"][:6]] == [4, 8] * 3

    denoiser, info = restore_denoiser(open_checkpoint(find_run(str(point_run / "runs" / "p")), "latest"))

    def samples(solver: Any, steps: int | None) -> torch.Tensor:
        plan = Plan(solver, make_times(solver, denoiser, None, steps), info.shape, seed=3)
        return torch.cat([solution.x for solution in draw(denoiser, plan, 5, 5)])

    exact = samples(SciPyODE(rtol=1e-4, atol=1e-4), None)
    for key, solver, steps in ((("heun", 8), Heun(), 4), (("adams", 4), Adams(), 4)):
        # float32, in batches of another size
        assert rows[key]["error"] == pytest.approx(distance(samples(solver, steps), exact), rel=1e-3)
        assert rows[key]["steps"] == steps
    assert rows["pc", 8]["error"] is None
    assert rows["pc", 8]["stochastic"]
    last = found["rows"][-1]
    assert (last["tolerance"], last["steps"], last["options"]["rtol"]) == (1e-2, None, 1e-2)
    assert found["reference"]["tolerance"] == 1e-4
    assert 0 < found["reference"]["uncertainty"] < 0.1


# Files


def test_what_is_written_for_pictures(glyph_run: Path) -> None:
    arguments = ["sde.compare", "solvers=[heun,{adams: {order: 2}},pc]", "steps=[3,5]", "budget=steps", "n=3"]
    for _ in range(2):
        done = command(*arguments, "reference_steps=8", "label=[3,1]", folder=glyph_run)
        assert done.code == 0, done.err
    samples = glyph_run / "runs" / "g" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["compare-seed0", "compare-seed0-2"]
    folder = samples / "compare-seed0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "compare.json",
        "compare.md",
        "compare.png",
        "error_vs_nfe.png",
    ]
    found = compared(folder)
    assert [(row["solver"], row["steps"], row["nfe"]) for row in found["rows"]] == [
        ("heun", 3, 7),
        ("heun", 5, 11),
        ("adams order=2", 3, 4),
        ("adams order=2", 5, 6),
        ("pc", 3, 7),
        ("pc", 5, 11),
    ]
    assert found["rows"][2]["options"]["order"] == 2
    assert found["label"] == [3, 1]
    table = (folder / "compare.md").read_text()
    assert table in done.out or (samples / "compare-seed0-2" / "compare.md").read_text() in done.out
    assert "stochastic: has no end point" in table
    assert "adams (8 steps, 9 evaluations)" in table
    # the reference and 6 rows of 3 pictures of 8 pixels, 6 times as large, with a caption on the left
    with Image.open(folder / "compare.png") as image:
        picture = np.asarray(image.convert("L"))
    assert picture.shape[0] >= 7 * 6 * 8
    assert picture.shape[1] > 3 * 6 * 10
    assert (picture[:, :8] == 255).all()  # the margin before the captions


def test_what_is_written_for_points(point_run: Path) -> None:
    done = command("sde.compare", "steps=[4]", "n=50", "reference=null", "out=no-reference", folder=point_run)
    assert done.code == 0, done.err
    folder = point_run / "no-reference"
    assert sorted(path.name for path in folder.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    assert compared(folder)["reference"] is None
    assert [row["error"] for row in compared(folder)["rows"]] == [None, None]
    done = command("sde.compare", "steps=[4]", "n=20", "reference_steps=20", "out=panels", folder=point_run)
    assert done.code == 0, done.err
    with Image.open(point_run / "panels" / "compare.png") as image:
        assert image.size[0] >= 800  # three panels side by side


def test_a_sweep_of_samples_goes_to_the_run(point_run: Path) -> None:
    """One command, two sets of samples; only the record of the sweep is left where Hydra makes its folders."""
    done = command("sde.sample", "--multirun", "solver=heun,adams", "steps=2", "n=2", "seed=9", folder=point_run)
    assert done.code == 0, done.err
    found = {path.parent.name for path in (point_run / "runs" / "p" / "samples").glob("*-seed9/info.json")}
    assert found == {"heun-2-seed9", "adams-2-seed9"}
    left = [path for path in (point_run / "runs" / "multirun").rglob("*") if not path.is_dir()]
    assert [path.name for path in left] == ["multirun.yaml"]
    assert list(left[0].parent.iterdir()) == left


# Mistakes


MISTAKES = [
    (["solvers=[heum,adams]"], ["'heum'", "did you mean 'heun'"]),
    (["solvers=heun"], ["solvers='heun' is not a list", "[heun,adams]"]),
    (["solvers=[]"], ["solvers=[] leaves nothing to compare"]),
    (["solvers=[{adams: {ordr: 2}}]"], ["solver.ordr", "did you mean 'order'"]),
    (["solvers=[{adams: 2}]"], ["options", "adams", "{option: value}"]),
    (["solvers=[{adams: {order: 9}}]"], ["solver.order=9", "1 to 6"]),
    (["steps=[]"], ["steps=[] leaves nothing to compare"]),
    (["steps=[10,0]"], ["steps=[10, 0]", "at least 1"]),
    (["steps=[ten]"], ["'ten'", "whole numbers"]),
    (["solvers=[adams,heun]", "steps=[1]"], ["steps=1 for heun", "1 evaluation is not enough", "allow 2"]),
    (["budget=time"], ["budget='time'", "nfe, steps"]),
    (["tolerances=[2]"], ["tolerances=2", "below 1"]),
    (["reference=pc"], ["reference=pc is stochastic"]),
    (["reference=ADAMS"], ["'ADAMS'", "did you mean 'adams'"]),
    (["reference_steps=1"], ["reference_steps=1", "at least 2"]),
    (["n=0"], ["n=0", "at least 1"]),
    (["denoise=3"], ["denoise=3", "true or false"]),
    (["out=runs"], ["out=runs", "not empty"]),
    (["run=nope"], ["run=nope", "does not exist"]),
    (["solver=heun"], ["solver"]),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_gets_one_sentence(arguments: list[str], expected: list[str], point_run: Path) -> None:
    before = sorted(point_run.rglob("*"))
    done = command("sde.compare", *arguments, folder=point_run)
    assert done.code == 2, done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    for text in expected:
        assert text in done.err
    assert sorted(point_run.rglob("*")) == before


# Curves


def test_labels_move_no_further_than_they_must() -> None:
    assert _spread([0.0, 0.0, 1.0], 0.1) == pytest.approx([-0.05, 0.05, 1.0])
    assert _spread([0.0, 0.5], 0.1) == [0.0, 0.5]
    crowded = _spread([0.2, 0.21, 0.22, 0.25], 0.1)
    assert np.diff(crowded) == pytest.approx([0.1] * 3)
    assert np.mean(crowded) == pytest.approx(np.mean([0.2, 0.21, 0.22, 0.25]))


def test_ticks_do_not_touch() -> None:
    assert _far_apart([10, 48, 49, 50]) == [50, 10]
    assert _far_apart([7]) == [7]
