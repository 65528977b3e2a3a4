"""The benchmarks measure what they say: distances against closed forms, end points, loops written out, and they run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from benchmarks import likelihood, likelihood_weighting, overhead, solvers
from benchmarks.measures import energy_distance, projections, sliced_wasserstein
from benchmarks.original_likelihood import original_log_prob
from benchmarks.peers import Peer, chain, peers
from benchmarks.report import markdown_table, replace_section
from benchmarks.targets import TARGETS, end_points, ring, sixteen, unequal
from sde.data import Split
from sde.denoiser import AbstractDenoiser, GaussianMixtureDenoiser
from sde.density.divergence import Hutchinson
from sde.density.flow import log_prob
from sde.errors import UserError
from sde.losses import DenoisingScoreMatching
from sde.metrics.sliced import directions, kappa, pair_sum
from sde.processes import EDM, SDE, VE, VP, RectifiedFlow, SubVP
from sde.reverse import ReverseProcess
from sde.sampling import make_times
from sde.solvers import SOLVERS
from sde.solvers.dopri5 import Dopri5
from sde.solvers.linear import LinearSolver
from tests.commands import command
from tests.problems import F64, gaussian, gaussian_flow, generator, marginal_of_gaussian, normal

# Distances


def sorted_rows(*values: np.ndarray) -> list[np.ndarray]:
    return [np.sort(v)[None].astype(np.float64) for v in values]


def quantiles(mean: float, n: int = 20_000) -> np.ndarray:
    """A set that stands for N(mean, 1): the quantiles in the middle of n equal shares."""
    return scipy.stats.norm.ppf((np.arange(n) + 0.5) / n) + mean


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0, 3.0])
def test_distances_of_shifted_gaussians(shift: float) -> None:
    """W_1 of N(0, 1) and N(m, 1) is m; E|X - Y| is the mean of a folded normal with variance 2."""
    a, b = sorted_rows(quantiles(0.0), quantiles(shift))
    assert sliced_wasserstein(a, b) == pytest.approx(shift, abs=1e-12)

    def mean_distance(m: float) -> float:
        return 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)

    exact = 2 * mean_distance(shift) - 2 * mean_distance(0.0)
    # a set of quantiles lacks what lies beyond the last, 2e-5 in the mean of |X - Y|, nearly alike in all three terms
    assert energy_distance(a, b, 1) ** 2 == pytest.approx(exact, abs=1e-5)


def test_distances_on_the_line_are_scipys() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 500))
    rows = sorted_rows(a, 0.3 + 1.2 * b)
    assert sliced_wasserstein(*rows) == pytest.approx(scipy.stats.wasserstein_distance(*(r[0] for r in rows)), rel=1e-9)
    assert energy_distance(*rows, 1) == pytest.approx(scipy.stats.energy_distance(*(r[0] for r in rows)), rel=1e-9)


def test_the_sum_over_pairs() -> None:
    z = np.array([[-1.0, 0.5, 0.5, 3.0]])
    assert pair_sum(z).tolist() == [sum(abs(a - b) for i, a in enumerate(z[0]) for b in z[0][:i])]


@pytest.mark.parametrize("d", [1, 2, 3, 16])
def test_the_mean_projection(d: int) -> None:
    """kappa_d against the known values and against a million directions."""
    assert kappa(d) == pytest.approx({1: 1.0, 2: 2 / math.pi, 3: 0.5}.get(d, kappa(d)), rel=1e-12)
    w = torch.randn(200_000, d, generator=generator(d), dtype=F64)
    first = (w[:, 0] / w.norm(dim=1)).abs()
    assert kappa(d) == pytest.approx(float(first.mean()), abs=5 * float(first.std()) / 200_000**0.5 + 1e-12)


def test_the_energy_distance_of_the_plane_and_beyond() -> None:
    """From projections, against all pairs of points."""
    for d, tolerance in ((2, 2e-3), (16, 0.1)):  # (pi / 32)^2 / 12 of each mean; 32 random directions in 16 dimensions
        x, y = normal(400, d, seed=1).float(), normal(400, d, seed=2).float() * 1.3 + 0.2

        def mean_distance(a: Tensor, b: Tensor) -> float:
            return float(torch.cdist(a.double(), b.double()).mean())

        exact = math.sqrt(2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y))
        assert energy_distance(projections(x), projections(y), d) == pytest.approx(exact, rel=tolerance)


def test_sliced_distance_of_a_shift_in_the_plane() -> None:
    """A shift by v moves every projection by <w, v>: the mean of |<w, v>| is 2/pi |v|."""
    x = normal(300, 2, seed=3).float()
    found = sliced_wasserstein(projections(x), projections(x + torch.tensor([0.3, -0.4])))
    assert found == pytest.approx(0.5 * 2 / math.pi, rel=2e-3)
    assert directions(2, 32).norm(dim=1).sub(1).abs().max() < 1e-6


# Targets


@pytest.mark.parametrize("sde", [VP(), VE(), EDM(), RectifiedFlow()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("name", ["denoised", "eps", "score", "v"])
def test_the_fast_mixture_is_the_general_one(name: str, sde: SDE) -> None:
    fast = ring(sde)
    exact = GaussianMixtureDenoiser(sde, fast.weights, fast.means, torch.tensor(0.0025, dtype=F64))  # type: ignore[arg-type]
    for share in (1.0, 0.3, 0.01):
        t = sde.t_min_sampling + share * (sde.T - sde.t_min_sampling)
        x = sde.perturb(exact.sample(20, generator(5)), torch.tensor(t, dtype=F64), normal(20, 2, seed=6))
        truth = exact.output(name, x, t)
        # eps cancels to sigma^2 / V of its parts: rounding relative to x / sigma
        tolerance = 1e-13 * float(x.abs().max()) * max(1.0, 1 / float(sde.sigma(t)) ** 2)
        for found in (
            fast.output(name, x, t),
            fast.evaluations(name, [t], x)[0](x),
            fast.output(name, x, torch.full((20,), t, dtype=F64)),
        ):
            torch.testing.assert_close(found, truth, rtol=1e-11, atol=tolerance)


def test_targets_have_the_spread_of_pictures() -> None:
    for name, target in TARGETS.items():
        x = target(VP()).sample(50_000, generator(0))  # type: ignore[operator]
        assert 0.4 < float(x.std()) < 0.55, name


def test_end_points_of_a_gaussian() -> None:
    """Where the flow is known in closed form."""
    sde = VP()
    x = normal(5, 1, seed=1)
    exact = gaussian_flow(sde, x, sde.T, sde.t_min_sampling, mean=0.7, std=0.5)
    torch.testing.assert_close(end_points(gaussian(sde), x), exact, rtol=1e-9, atol=1e-9)


# What is run


def test_a_solver_at_its_end_point_has_no_error() -> None:
    settings = solvers.Settings(starts={"ring": 20, "sixteen": 10})
    rows = [solvers.measure_error(solvers.Job("sixteen", "rectified_flow", "adams", settings), n) for n in (10, 1000)]
    assert rows[0]["nfe"] == 10
    assert rows[1]["error"] < 1e-5 < rows[0]["error"]
    # the measure itself, without a solver
    end, data = solvers.references("ring", "vp", 20)
    assert solvers.root_mean_square(end, end) == 0
    assert solvers.root_mean_square(end + 0.3, end) == pytest.approx(0.3 * math.sqrt(2), rel=1e-12)
    denoiser = ring(VP())
    assert torch.equal(data, denoiser.denoised(end, 1e-3))


def test_the_floor_is_what_exact_sets_are_apart() -> None:
    settings = solvers.Settings(samples=2_000)
    floor = solvers.floors("ring", "vp", settings)
    # as 1 / sqrt(n): at 20,000 samples it is 5.1e-3
    assert floor["sw1"] == pytest.approx(5.1e-3 * math.sqrt(10), rel=0.3)
    assert floor["sw1"] < floor["sw1_95"]
    row = solvers.measure_law(solvers.Job("ring", "vp", "ddim", settings), 100)
    assert row["sw1"] < 2 * floor["sw1_95"]


def test_a_budget_that_is_too_small_has_no_row() -> None:
    settings = solvers.Settings(budgets=(1, 4), law_budgets=(1,), starts={"ring": 5, "sixteen": 5}, samples=50, seeds=1)
    rows = solvers.work(solvers.Job("ring", "vp", "heun", settings))
    assert [(row["budget"], row["nfe"]) for row in rows] == [(4, 4)]


def test_peers_count_their_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(denoiser: AbstractDenoiser, x: Tensor, nfe: int) -> Tensor:
        for _ in range(nfe):
            x = x - 0 * denoiser.eps(x, 0.5)
        return x

    monkeypatch.setattr(solvers, "_peers", lambda: [Peer("other", draw, needs=2, spared=1, ends_in_data=True)])
    assert solvers.run_once("other", ring(VP()), normal(3, 2), 7)[1] == 7
    assert solvers._peers()[0].steps(7) == 4
    with pytest.raises(UserError, match="0 evaluations are not enough for other"):
        solvers.run_once("other", ring(VP()), normal(3, 2), 0)
    assert "other" in solvers.entries("vp")


def test_the_chain_of_the_peers() -> None:
    """Its cumulative products are the process at the chain's times."""
    sde = VP()
    kept = np.cumprod(1 - chain(sde))
    t = torch.arange(1, 1001, dtype=F64) / 1000
    np.testing.assert_allclose(kept, sde.alpha(t).square().numpy(), rtol=1e-10)


def test_diffusers_follows_the_same_flow() -> None:
    """DDIM of both, on 100 trailing steps of the chain: the same formula on the same levels."""
    pytest.importorskip("diffusers")
    ddim = next(peer for peer in peers() if peer.name == "diffusers DDIM")
    sde = VP()
    denoiser, x = ring(sde), normal(50, 2, seed=3)
    found = ddim.draw(denoiser, x, 100)
    times = [*((k / 100) for k in range(100, 0, -1))]
    solver = SOLVERS.get("ddim")(final="tweedie")
    ours = solver.solve(ReverseProcess(denoiser), x, times).x
    # its alphas are float32: relative errors of 6e-8, which 100 steps at the separatrices enlarge
    torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-3)


# Bare loops


@pytest.mark.parametrize("name", [n for n, cls in SOLVERS.items() if issubclass(cls, LinearSolver) and n != "torchsde"])
def test_a_loop_written_out_is_the_solver(name: str) -> None:
    """The same arithmetic: with a fixed answer, and for stochastic solvers with the same draws."""
    sde = VP()
    answer, x = torch.randn(7, 2, generator=generator(1)), torch.randn(7, 2, generator=generator(2))
    solver, fixed = SOLVERS.get(name)(), overhead.Fixed(sde, answer)
    assert isinstance(solver, LinearSolver)
    times = make_times(solver, fixed, None, 9)
    loop = overhead.written_out(solver, sde, times)
    torch.manual_seed(4)
    found = loop(lambda y: answer, x)
    torch.manual_seed(4)
    ours = solver.solve(ReverseProcess(fixed), x, times, lambda t=None, s=None: torch.randn_like(x)).x
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-6)


# Reports and commands


def test_tables_and_their_places(tmp_path: Path) -> None:
    table = markdown_table(["", "a", "b"], [["x", "1", "22"]])
    assert table.splitlines() == ["|   | a |  b |", "|---|--:|---:|", "| x | 1 | 22 |"]
    file = tmp_path / "doc.md"
    with pytest.raises(UserError, match="has no place for results"):
        replace_section(file, "part", "x")
    file.write_text("before\n<!-- part -->\nold\n<!-- end of part -->\nafter\n")
    replace_section(file, "part", "a \\1 b")
    assert file.read_text() == "before\n<!-- part -->\na \\1 b\n<!-- end of part -->\nafter\n"


def test_numbers_in_tables() -> None:
    assert solvers.number(0.01234, "error") == "1.2e-02"
    assert solvers.number(0.01234, "sw1") == "12.3"
    assert {solvers.number(value, "error") for value in (math.nan, math.inf, 11.0)} == {"div."}


def test_every_solver_is_described() -> None:
    text = solvers.overview()
    for name, cls in SOLVERS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert str(cls().order) in line
    assert "| `heun` |" in text
    assert "[2206.00364](https://arxiv.org/abs/2206.00364)" in text


def test_the_page_on_solvers_names_them_all() -> None:
    page = (Path(__file__).parent.parent / "docs" / "solvers.md").read_text(encoding="utf-8")
    missing = [name for name in SOLVERS if f"\n| `{name}` |" not in page]
    assert not missing, f"run `python -m benchmarks.solvers --docs docs/solvers.md`: {missing}"


def test_the_benchmark_of_solvers_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = tmp_path / "docs.md"
    places = ("solvers", "solvers on exact scores")
    docs.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in places))
    solvers.main(
        ["--quick", "--solvers", "adams", "heun", "ancestral", "dopri5", "--samples", "200", "--processes", "1",
         "--out", str(tmp_path / "out"), "--docs", str(docs)]
    )  # fmt: skip
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "solvers.json").read_text())
    assert not [row for row in found["rows"] if "failed" in row]
    errors = {(r["target"], r["solver"], r["budget"]): r["error"] for r in found["rows"] if "error" in r}
    assert errors["ring", "adams", 50] < errors["ring", "adams", 10] < errors["ring", "heun", 10]
    assert {r["solver"] for r in found["rows"] if "sw1" in r} == {"adams", "heun", "ancestral"}
    assert "8 modes on a ring, vp: root-mean-square error of the end point" in printed
    assert "solvers that choose their own steps" in printed
    assert docs.read_text().count("| `adams`") >= 4  # what it is, and three tables
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "solvers_error_sixteen_rectified_flow.png",
        "solvers_error_vp.png",
        "solvers_sw1_vp.png",
    ]
    again = ["--quick", "--processes", "1", "--samples", "200", "--earlier", str(tmp_path / "out" / "solvers.json")]
    solvers.main([*again, "--solvers", "heun", "--out", str(tmp_path / "again")])
    repeated = json.loads((tmp_path / "again" / "solvers.json").read_text())["rows"]
    timeless = [sorted((k, str(v)) for k, v in row.items() if k != "seconds") for row in (*found["rows"], *repeated)]
    assert sorted(timeless[: len(repeated)]) == sorted(timeless[len(repeated) :])
    capsys.readouterr()
    for mistake in (["--solvers", "adms"], ["--samples", "0"], ["--earlier", "nothing.json"]):
        with pytest.raises(SystemExit) as end:
            solvers.main(["--quick", "--processes", "1", "--out", str(tmp_path / "out"), *mistake])
        assert end.value.code == 2
    sentences = capsys.readouterr().err
    assert "'adms' is neither a solver nor a peer" in sentences
    assert "nothing.json is no solvers.json" in sentences


def test_the_benchmark_of_overhead_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "CASES", {"few": (16, 2)})
    monkeypatch.setattr(overhead, "schedulers", lambda *_: [])
    for network in ([], ["--network"]):
        overhead.main(["--steps", "5", "--quick", "--solvers", "adams", "euler_maruyama", "pc", *network])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("|")[1].strip() for line in lines if line.startswith("| `")] == [
            "`adams`",
            "`euler_maruyama`",
            "`pc`",
        ]
        ratios = [float(line.split("|")[3]) for line in lines if line.startswith("| `")]
        assert all(0.1 < ratio < 1000 for ratio in ratios)  # a number came out; what it is is the machine's
    with pytest.raises(SystemExit):
        overhead.main(["--solvers", "adms"])
    assert "there is no solver 'adms'" in capsys.readouterr().err


# Weightings


@pytest.mark.parametrize("objective", likelihood_weighting.OBJECTIVES)
def test_gradients_are_clipped_at_the_mean_weight(objective: str) -> None:
    """Against the weights of the loss, integrated over t = t_min + e^s."""
    weighting, time = likelihood_weighting.OBJECTIVES[objective]
    sde, loss = SubVP(), DenoisingScoreMatching(weighting=weighting, time=time)
    s = torch.linspace(math.log(1e-12), math.log(sde.T - sde.t_min), 20_001, dtype=F64)
    weights = loss.weight(sde, sde.t_min + torch.exp(s)) * torch.exp(s)
    mean = float(torch.trapezoid(weights, s)) / (sde.T - sde.t_min)
    assert likelihood_weighting.mean_weight(objective) == pytest.approx(mean, rel=1e-6)


def test_digits_of_14_pixels_are_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Digits:
        def __init__(self, root: str | None, size: int) -> None:
            assert (root, size) == ("somewhere", 28)

        def split(self, name: str) -> Split:
            values = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
            values[1] = 200
            values[2, 0, 2:4, 4:6] = torch.tensor([[255, 3], [0, 100]])  # 89.5
            return Split(values)

    monkeypatch.setattr(likelihood_weighting, "MNIST", Digits)
    likelihood_weighting.write_digits(tmp_path / "digits.npz", "somewhere")
    x, quantization = likelihood_weighting.held_out(tmp_path / "digits.npz", 3)
    pixels = quantization.index(x)
    assert x.shape == (3, 1, 14, 14)
    assert sorted(pixels.flatten(1).sum(1).tolist()) == [0, 90, 200 * 14 * 14]
    assert pixels[:, 0, 1, 2].max() == 200
    assert 90 in pixels[:, 0, 1, 2]
    assert torch.equal(x, likelihood_weighting.held_out(tmp_path / "digits.npz", 3)[0])


def test_differences_of_weightings_are_paired() -> None:
    """The spread of pictures, which both objectives see, is not in the error of the difference."""
    bits = {"likelihood": [1.0, 5.0], "sigma2": [1.5, 5.7]}
    trials = likelihood_weighting.Trial
    results = {
        trials(name, 1e-3, seed): likelihood_weighting.Measured(
            {m: [b + (seed if name == "sigma2" else 0) for b in values] for m in likelihood_weighting.MEASURES},
            [seed + (0.25 if name == "sigma2" else 0.0)] * likelihood_weighting.STRATA,
        )
        for seed in (0, 1)
        for name, values in bits.items()
    }
    lines = likelihood_weighting.table_of_differences(results).splitlines()[2:]
    assert [line.split("|")[3].strip() for line in lines] == ["+0.600 ± 0.100", "+1.600 ± 0.100", "+1.100 ± 0.500"]
    assert "3.000 ± 2.000" in likelihood_weighting.table_of_runs(results)
    levels = [line.split("|") for line in likelihood_weighting.table_of_levels(results).splitlines()[2:]]
    assert len(levels) == likelihood_weighting.STRATA
    assert {tuple(float(cell) for cell in line[3:6]) for line in levels} == {(0.75, 0.5, 0.25)}
    assert levels[0][2].split()[0] == f"{SubVP().noise_level(SubVP().t_min):.2g}"


def test_the_benchmark_of_weightings_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Objectives differ in their loss and where gradients are clipped alone; finished runs are not trained again."""
    trained = []

    def run(words: list[str], check: bool) -> SimpleNamespace:
        assert words[1:3] == ["-m", "sde.train"]
        trained.append({word.partition("=")[0]: word.partition("=")[2] for word in words[3:]})
        return SimpleNamespace(returncode=command("sde.train", *words[3:], folder=tmp_path).code)

    monkeypatch.setattr(likelihood_weighting, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(likelihood_weighting, "SOLVER_STEPS", 8)
    pixels = torch.randint(256, (24, 10, 10), generator=generator(0)).byte().numpy()
    np.savez(tmp_path / "pictures.npz", x_train=pixels[:16], x_test=pixels[16:])
    arguments = ["--data", str(tmp_path / "pictures.npz"), "--out", str(tmp_path / "out"), "--examples", "4"]
    arguments += ["--steps", "2", "--batch-size", "4", "--seeds", "1", "--set", "model.channels=4"]
    likelihood_weighting.main(arguments)
    first = capsys.readouterr().out
    assert len(trained) == 2
    assert {key for key in trained[0] if trained[0][key] != trained[1][key]} == {
        "loss.weighting",
        "loss.time",
        "training.clip",
        "hydra.run.dir",
    }
    rows = json.loads((tmp_path / "out" / "likelihood_weighting.json").read_text())
    assert [(row["objective"], row["seed"]) for row in rows] == [("likelihood", 0), ("sigma2", 0)]
    for row in rows:
        assert all(math.isfinite(bits) for m in likelihood_weighting.MEASURES for bits in row["bits"][m])
        assert len(row["levels"]) == likelihood_weighting.STRATA
    likelihood_weighting.main(arguments)
    assert len(trained) == 2
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == [
        line for line in first.splitlines() if line.startswith("|")
    ]
    with pytest.raises(SystemExit):
        likelihood_weighting.main([*arguments, "--seeds", "0"])
    assert "--seeds=0" in capsys.readouterr().err


# Likelihoods


def gaussian_log_prob(sde: SDE, x: Tensor, mean: float, std: float) -> Tensor:
    """log p of the flow of N(mean, std^2) from the prior, (B,): a little off that Gaussian, since the prior is."""
    latent = gaussian_flow(sde, x, sde.t_min, sde.T, mean, std)
    (_, first), (_, last) = (marginal_of_gaussian(sde, t, mean, std) for t in (sde.t_min, sde.T))
    return sde.prior_log_prob(latent) + 0.5 * x[0].numel() * math.log(last / first)


@pytest.mark.parametrize("sde", [VP(), VE()])
def test_the_originals_likelihood_is_exact_and_ours(sde: SDE) -> None:
    """In float64: against the density of a Gaussian, where one probe is exact, and against ours on a mixture."""
    denoiser, x = gaussian(sde), normal(4, 5, seed=7)
    probes = Hutchinson().draw(0, range(4), x)
    found = original_log_prob(denoiser, x, probes[:, 0], 1e-9, 1e-9)
    exact = gaussian_log_prob(sde, x, 0.7, 0.5)
    # 1e-9 of numbers up to 50 sqrt(5), at each of some hundred steps
    torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.bits, -found.log_prob / (5 * math.log(2)) + 7, rtol=1e-12, atol=0)
    mixture = unequal(sde, 5)
    x = mixture.sample(4, generator(1))
    found = original_log_prob(mixture, x, probes[:, 0], 1e-9, 1e-9)
    solver = Dopri5(rtol=1e-9, atol=1e-9)
    ours = log_prob(mixture, x, solver=solver, divergence=Hutchinson(), probes=probes)
    # modes 0.03 wide magnify an error in x by 30
    torch.testing.assert_close(found.log_prob, ours.log_prob, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.latent, ours.latent, rtol=0, atol=1e-5)


def test_passes_are_counted_by_the_network() -> None:
    case = likelihood.gaussian_case(VP(), 0.25, 3, shape=(2, 3))
    compared = likelihood.methods([1e-3], [7], ["adams", "heun"])
    results = {m.name: r for m, r in zip(compared, likelihood.measure(case, compared, 1), strict=True)}
    torch.testing.assert_close(case.reference, gaussian_log_prob(VP(), case.x, 0.0, 0.25), rtol=0, atol=1e-6)
    nfe = original_log_prob(case.denoiser, case.x, case.probes[:, 0], 1e-3, 1e-3).nfe
    assert (results["original"].forward, results["original"].backward) == (2 * nfe, nfe)
    ours = log_prob(
        case.denoiser, case.x, solver=Dopri5(rtol=1e-3, atol=1e-3), divergence=Hutchinson(), probes=case.probes
    )
    assert (results["dopri5"].forward, results["dopri5"].backward) == (ours.nfe, ours.nfe)
    assert (results["adams"].forward, results["adams"].backward) == (7, 7)
    assert (results["heun"].forward, results["heun"].backward) == (14, 14)
    assert results["heun"].error.max() > results["dopri5"].error.max()
    assert all(len(result.seconds) == 1 for result in results.values())


def test_the_benchmark_of_likelihoods_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def run(words: list[str], check: bool) -> SimpleNamespace:
        trained.append(words[3])
        small = ["model.channels=8", "data.size=8", "training.batch_size=4", "training.validation_examples=4"]
        return SimpleNamespace(returncode=command("sde.train", *words[3:], *small, folder=tmp_path).code)

    monkeypatch.setattr(likelihood, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(likelihood, "TIGHT", {"trained": 1e-2})
    arguments = ["--targets", "network", "--sdes", "vp", "--batch", "2", "--rounds", "1", "--out", str(tmp_path)]
    arguments += ["--tolerances", "1e-1", "--steps", "5", "--training-steps", "2"]
    likelihood.main([*arguments, "--run", str(tmp_path / "vp")])
    likelihood.train("vp", tmp_path / "vp", steps=2)
    assert trained == ["sde=vp"]
    printed = capsys.readouterr().out
    assert "\nnetwork, VP, 2 x 1 x 8 x 8\n" in printed
    assert "\nrun, VP, 2 x 1 x 8 x 8\n" in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    adams = [row for row in rows if row[0] == "adams"]
    assert len(adams) == 2
    assert all(row[1:4] == ["5 steps", "5", "5"] for row in adams)
    assert all(float(row[4]) == 1 for row in rows if row[0] == "original")
    with pytest.raises(SystemExit):
        likelihood.main(["--targets", "run"])
    assert "give --run" in capsys.readouterr().err


def test_sixteen_dimensions_are_as_described() -> None:
    denoiser = sixteen(VP())
    assert isinstance(denoiser, GaussianMixtureDenoiser)
    widths = denoiser.variances.sqrt()
    torch.testing.assert_close(widths.min(1).values, torch.full((5,), 0.03, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(widths.max(1).values, torch.full((5,), 0.55, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(denoiser.weights, torch.arange(1, 6, dtype=F64) / 15)
