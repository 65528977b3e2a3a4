"""Models of score_sde_pytorch reproduce what the original computes: outputs, scores, trajectories, ODE endpoints.

The cases in ../shared/golden were computed by the original program; its README says how. Discretely trained networks
take the number of sampling steps for the number of noise levels there (both are `sde.N`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.original import ListNetwork
from benchmarks.original_likelihood import original_log_prob
from sde.denoiser import Denoiser
from sde.density import Hutchinson, Quantization, bits_per_dim, log_prob
from sde.errors import UserError
from sde.grids import GRIDS
from sde.interop.chains import DDPMChain, SMLDChain, chain_sigmas
from sde.interop.score_sde import load, parameterization_from_config, read_config, sde_from_config
from sde.interop.score_sde_weights import network_from_config
from sde.parameterizations import Eps, Score
from sde.processes import VE, VP, SubVP
from sde.randomness import RecordedNoise
from sde.reverse import ReverseProcess
from sde.solvers import SOLVERS, PredictorCorrector, SciPyODE
from tests.commands import command
from tests.conftest import SHARED

GOLDEN = SHARED / "golden"
CASES = ("vp_ncsnpp", "ve_ncsnpp", "subvp_ddpmpp", "ve_ffhq", "vp_ddpm")
TRAJECTORIES = [
    (case, name.removesuffix("/x"))
    for case in CASES
    if GOLDEN.is_dir()
    for name in sorted(np.load(GOLDEN / case / "sampling.npz").files)
    if name.endswith("/x") and name.split("/")[0] not in ("ode", "likelihood")
]
STEPS = 20


def distance(ours: Tensor, theirs: np.ndarray) -> float:
    reference = torch.from_numpy(theirs)
    return float((ours - reference).norm() / reference.norm())


def denoiser(case: str, ema: bool = True) -> Denoiser:
    return load(GOLDEN / case / "checkpoint.pth", GOLDEN / case / "config.json", ema=ema)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ema", [False, True], ids=["raw", "ema"])
def test_outputs_and_scores(case: str, ema: bool, shared: Path) -> None:
    recorded, suffix = np.load(GOLDEN / case / "io.npz"), "_ema" if ema else ""
    ours = denoiser(case, ema)
    x, t, label = (torch.from_numpy(recorded[name]) for name in ("x", "t", "label"))
    assert distance(ours.network(x, label), recorded[f"out{suffix}"]) < 1e-5
    assert distance(ours.raw(x, t), recorded[f"out{suffix}"]) < 1e-5
    assert distance(ours.score(x, t), recorded[f"score{suffix}"]) < 1e-5


@pytest.mark.parametrize(("case", "name"), TRAJECTORIES, ids=[f"{case}-{name}" for case, name in TRAJECTORIES])
def test_predictor_corrector_trajectories(case: str, name: str, shared: Path) -> None:
    recorded = np.load(GOLDEN / case / "sampling.npz")
    predictor, corrector = name.split("-")
    solver = PredictorCorrector(
        predictor={"ancestral_sampling": "ancestral"}.get(predictor, predictor),
        corrector=corrector,
        discretization="score_sde",
        final="mean",
    )
    ours = denoiser(case)
    if isinstance(ours.parameterization, DDPMChain):
        ours.parameterization = DDPMChain(n=STEPS)
    noise = RecordedNoise(torch.from_numpy(recorded[f"{name}/noise"])[:, None])
    x = noise() * ours.sde.prior_std
    process, times = ReverseProcess(ours), GRIDS.get("score_sde")()(ours.sde, STEPS)
    if np.isnan(recorded[f"{name}/x"]).any():  # sqrt(1 - beta) of the original is 0 at its first step
        with pytest.raises(UserError, match="steps are too long for the ancestral predictor"):
            solver.solve(process, x, times, noise)
        return
    solution = solver.solve(process, x, times, noise)
    assert distance(solution.x, recorded[f"{name}/x"]) < 1e-5
    assert solution.nfe == STEPS * (1 if corrector == "none" else 2)


@pytest.mark.parametrize("case", ["vp_ncsnpp", "ve_ncsnpp", "subvp_ddpmpp"])
def test_ode_endpoints(case: str, shared: Path) -> None:
    """Both solve to 1e-5; the two differ by rounding that the adaptive steps amplify, well below the tolerance."""
    recorded = np.load(GOLDEN / case / "sampling.npz")
    ours = denoiser(case)
    z = torch.from_numpy(recorded["ode/z"])
    process = ReverseProcess(ours)
    solution = SciPyODE(final="none").solve(process, z, [ours.sde.T, ours.sde.t_min_sampling])
    assert distance(solution.x, recorded["ode/x"]) < 1e-4
    assert solution.nfe == pytest.approx(int(recorded["ode/nfe"]), rel=0.1)


def recorded_likelihood(case: str) -> tuple[dict[str, np.ndarray], Tensor, Tensor, float]:
    """What the original computed; its data and probes; the width of a gray level in its data, (255 p + u) / 256."""
    recorded = dict(np.load(GOLDEN / case / "sampling.npz"))
    x, probes = (torch.from_numpy(recorded[f"likelihood/{name}"]) for name in ("x", "epsilon"))
    centered = read_config(GOLDEN / case / "config.json")["data"]["centered"]
    return recorded, x, probes, Quantization.score_sde(centered=centered).width


def test_the_method_of_the_original_finds_its_likelihood(shared: Path) -> None:
    """Its own system and steps, on our network: bits per dimension and latent codes."""
    recorded, x, probes, width = recorded_likelihood("subvp_ddpmpp")
    result = original_log_prob(denoiser("subvp_ddpmpp"), x, probes)
    bits = bits_per_dim(result.log_prob, x[0].numel(), width)
    np.testing.assert_allclose(bits.numpy(), recorded["likelihood/bpd"], rtol=0, atol=1e-3)
    assert distance(result.latent, recorded["likelihood/z"]) < 1e-3
    assert result.nfe == recorded["likelihood/nfe"]


@pytest.mark.parametrize("case", ["vp_ncsnpp", "ve_ncsnpp", "subvp_ddpmpp"])
def test_likelihoods(case: str, shared: Path) -> None:
    """Ours, with the recorded probes: the same bits per dimension.

    These random networks have flows that amplify: the recorded codes are 2e-3 from those of a solution to 1e-7 in
    float64, and the original's own method, at its own steps, misses them by 1e-3 through the rounding of a float32
    network. So ours, right to more digits, are held to 5e-3; a solver's tolerance of 1e-6
    changes that distance by 5e-5, and the bits by 4e-5.
    """
    recorded, x, probes, width = recorded_likelihood(case)
    solver = SOLVERS.get("adams_adaptive")(rtol=1e-5, atol=1e-5)
    result = log_prob(denoiser(case), x, solver=solver, divergence=Hutchinson(), probes=probes[:, None])
    bits = bits_per_dim(result.log_prob, x[0].numel(), width)
    np.testing.assert_allclose(bits.numpy(), recorded["likelihood/bpd"], rtol=0, atol=1e-3)
    assert distance(result.latent, recorded["likelihood/z"]) < 5e-3


def small_config(**changes: dict[str, object]) -> dict[str, dict[str, object]]:
    """An original configuration of a very small network; `changes` by section."""
    config: dict[str, dict[str, object]] = {
        "data": {"dataset": "CIFAR10", "image_size": 8, "num_channels": 1, "centered": True},
        "model": {
            "name": "ncsnpp",
            "nf": 8,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [4],
            "fir": False,
            "progressive_input": "none",
            "embedding_type": "positional",
            "fourier_scale": 16,
            "resblock_type": "biggan",
            "resamp_with_conv": True,
            "conditional": True,
            "nonlinearity": "swish",
            "skip_rescale": True,
            "progressive": "none",
            "scale_by_sigma": False,
            "init_scale": 0.0,
            "dropout": 0.0,
            "sigma_min": 0.01,
            "sigma_max": 50,
            "num_scales": 50,
        },
        "training": {"sde": "vpsde", "continuous": True},
    }
    for section, values in changes.items():
        config[section] |= values
    return config


@pytest.mark.parametrize(
    ("training", "sde", "parameterization"),
    [
        ({"sde": "vpsde", "continuous": True}, VP(), Eps(noise_label="time")),
        ({"sde": "vpsde", "continuous": False}, VP(), DDPMChain(n=50)),
        ({"sde": "subvpsde", "continuous": False}, SubVP(), Eps(noise_label="time")),
        ({"sde": "vesde", "continuous": True}, VE(), Score(noise_label="sigma")),
        ({"sde": "vesde", "continuous": False}, VE(), SMLDChain(n=50)),
    ],
    ids=["vp", "vp-discrete", "subvp", "ve", "ve-discrete"],
)
def test_what_a_configuration_means(training: dict, sde: object, parameterization: object) -> None:
    config = small_config(training=training)
    assert sde_from_config(config) == sde
    assert parameterization_from_config(config) == parameterization


def test_the_chain_of_ddpm_is_the_original_table() -> None:
    """sqrt(1 - cumprod(1 - beta_i)) with beta_i = linspace(beta_min / n, beta_max / n, n)."""
    n = 1000
    betas = np.linspace(0.1 / n, 20 / n, n)
    table = np.sqrt(1 - np.cumprod(1 - betas))
    np.testing.assert_allclose(chain_sigmas(VP(), n).numpy(), table, rtol=1e-10)
    sde, chain = VP(), DDPMChain(n=n)
    t = torch.tensor([0.0213, 0.4, 0.9312], dtype=torch.float64)
    f = torch.ones(3, 2, dtype=torch.float64)
    score = chain.row("score", sde, t).F[:, None] * f
    expected = -1 / table[(t.numpy() * (n - 1)).astype(int)]
    np.testing.assert_allclose(score[:, 0].numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(chain.c_noise(sde, t, "time").numpy(), t.numpy() * (n - 1), rtol=1e-14)


def test_labels_of_smld_count_from_the_noisiest() -> None:
    t = torch.tensor([1.0, 0.75, 0.0101, 1e-5], dtype=torch.float64)
    assert SMLDChain(n=1000).c_noise(VE(), t, "sigma").tolist() == [0, 250, 989, 999]


@pytest.mark.parametrize("continuous", [True, False])
def test_an_imported_run_samples_from_the_command_line(continuous: bool, tmp_path: Path) -> None:
    """A checkpoint in the original's layout, made here, becomes a run; its samples are those of `load`."""
    config = small_config(training={"sde": "vesde", "continuous": continuous}, model={"scale_by_sigma": not continuous})
    if continuous:
        config["model"]["embedding_type"] = "fourier"
    torch.save(ListNetwork(config).checkpoint(), tmp_path / "c.pth")
    (tmp_path / "c.json").write_text(json.dumps(config))
    done = command(
        "sde.interop.score_sde", "checkpoint=c.pth", "config=c.json", "hydra.run.dir=runs/i", folder=tmp_path
    )
    assert done.code == 0, done.err
    done = command("sde.sample", "solver=heun", "steps=3", "n=2", "out=s", folder=tmp_path)
    assert done.code == 0, done.err
    samples = np.load(tmp_path / "s" / "samples.npz")["samples"]
    assert samples.shape == (2, 8, 8, 1)
    again = command(
        "sde.interop.score_sde", "checkpoint=c.pth", "config=c.json", "hydra.run.dir=runs/i", folder=tmp_path
    )
    assert again.code == 2
    assert "holds a run already" in again.sentence


def test_files_that_are_no_checkpoint_or_configuration(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="is not a configuration"):
        read_config(tmp_path / "list.json")
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "none.pth", small_config())
    (tmp_path / "bad.pth").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "bad.pth", small_config())
    with pytest.raises(UserError, match=r"training.sde.*vpsde, subvpsde, vesde"):
        sde_from_config(small_config(training={"sde": "edm"}))
    network = network_from_config(small_config())
    torch.save({"model": network.state_dict(), "ema": {"shadow_params": []}}, tmp_path / "ours.pth")
    with pytest.raises(UserError):
        load(tmp_path / "ours.pth", small_config(), ema=False)
