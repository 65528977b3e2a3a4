"""Samplers of other libraries on the denoisers of this one; those that are not installed are left out.

    diffusers  https://github.com/huggingface/diffusers   schedulers on VP, whose 1000-step chain they are given
    azula      https://github.com/probabilists/azula      samplers on any SDE, in its own time or in log-SNR

A diffusers scheduler ends with a step from its last noise level to data, an azula sampler at t_min, as asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde.denoiser import AbstractDenoiser
from sde.processes import SDE

Draw = Callable[[AbstractDenoiser, Tensor, int], Tensor]

_CHAIN = 1000


@dataclass(frozen=True)
class Peer:
    """A sampler of another library.

    Args:
        name: library and sampler.
        draw: called with (denoiser, x_T, number of evaluations), gives samples.
        stochastic: whether it draws noise (from PyTorch's global generator).
        ends_in_data: whether it takes its last step to t = 0 instead of ending at t_min.
        needs: evaluations come in multiples of this, less `spared`.
        spared: evaluations that the last step does without.
        processes: names of the SDEs it runs on; empty for all.
    """

    name: str
    draw: Draw
    stochastic: bool = False
    ends_in_data: bool = False
    needs: int = 1
    spared: int = 0
    processes: tuple[str, ...] = ()

    def steps(self, nfe: int) -> int:
        """The number of steps of its own for at most `nfe` evaluations."""
        return (nfe + self.spared) // self.needs


def peers() -> list[Peer]:
    """All that are installed."""
    return [*_diffusers(), *_azula()]


# diffusers


def _diffusers() -> list[Peer]:
    try:
        import diffusers
    except ImportError:
        return []
    diffusers.utils.logging.set_verbosity_error()
    karras = {"use_karras_sigmas": True}
    sde = {"algorithm_type": "sde-dpmsolver++"}
    rows: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("DDIM", "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
        ("Euler", "EulerDiscreteScheduler", {}, {}),
        ("Euler Karras", "EulerDiscreteScheduler", karras, {}),
        ("Heun", "HeunDiscreteScheduler", {}, {"needs": 2, "spared": 1}),
        ("Heun Karras", "HeunDiscreteScheduler", karras, {"needs": 2, "spared": 1}),
        ("LMS", "LMSDiscreteScheduler", {}, {}),
        ("LMS Karras", "LMSDiscreteScheduler", karras, {}),
        ("DPM++ 2M", "DPMSolverMultistepScheduler", {}, {}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", karras, {}),
        ("DPM++ 3M", "DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
        ("DPM++ 3M Karras", "DPMSolverMultistepScheduler", {"solver_order": 3} | karras, {}),
        ("DPM++ 2S", "DPMSolverSinglestepScheduler", {}, {}),
        ("DPM++ 2S Karras", "DPMSolverSinglestepScheduler", karras, {}),
        ("UniPC", "UniPCMultistepScheduler", {}, {}),
        ("UniPC Karras", "UniPCMultistepScheduler", karras, {}),
        ("DEIS", "DEISMultistepScheduler", {}, {}),
        ("DEIS Karras", "DEISMultistepScheduler", karras, {}),
        ("PNDM", "PNDMScheduler", {"skip_prk_steps": True}, {"spared": -1}),
        ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", sde, {"stochastic": True}),
        ("DPM++ 2M SDE Karras", "DPMSolverMultistepScheduler", sde | karras, {"stochastic": True}),
        ("Euler ancestral", "EulerAncestralDiscreteScheduler", {}, {"stochastic": True}),
        ("DDPM", "DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {"stochastic": True}),
    ]
    found = []
    for name, cls, options, facts in rows:
        peer = Peer(f"diffusers {name}", _no_draw, ends_in_data=True, processes=("vp",), **facts)
        draw = partial(_with_scheduler, getattr(diffusers, cls), options, peer.steps)
        found.append(Peer(**{**vars(peer), "draw": draw}))
    return found


def _no_draw(denoiser: AbstractDenoiser, x: Tensor, nfe: int) -> Tensor:
    raise AssertionError("a peer without a sampler")


@cache
def chain(sde: SDE) -> np.ndarray:
    """The betas (1000,) of the chain whose i-th state, counted from 0, is the process at t = (i + 1) / 1000 of T."""
    t = sde.T * torch.arange(1, _CHAIN + 1, dtype=torch.float64) / _CHAIN
    kept = sde.alpha(t).square().numpy()
    return 1 - kept / np.concatenate([[1.0], kept[:-1]])


@torch.no_grad()
def _with_scheduler(
    cls: Any, options: dict[str, Any], steps: Callable[[int], int], denoiser: AbstractDenoiser, x: Tensor, nfe: int
) -> Tensor:
    """Samples by a scheduler; the denoiser is asked at the noise level that the scheduler believes in."""
    sde = denoiser.sde
    scheduler = cls(num_train_timesteps=_CHAIN, trained_betas=chain(sde), prediction_type="epsilon", **options)
    scheduler.set_timesteps(steps(nfe))
    x = x * float(scheduler.init_noise_sigma)
    sigmas = getattr(scheduler, "sigmas", None)
    for i, t in enumerate(scheduler.timesteps):
        at = sde.T * (float(t) + 1) / _CHAIN if sigmas is None else float(sde.t_of_noise_level(float(sigmas[i])))
        eps = denoiser.eps(scheduler.scale_model_input(x, t), min(at, sde.T))
        x = scheduler.step(eps, t, x).prev_sample
    return x


# azula


def _azula() -> list[Peer]:
    try:
        from azula import sample  # type: ignore[import-not-found]
    except ImportError:
        return []
    rows: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
        ("DDIM", sample.DDIMSampler, {}, {}),
        ("Heun", sample.HeunSampler, {}, {"needs": 2}),
        ("zAB-3", sample.zABSampler, {"order": 3}, {}),
        ("zEAB-3", sample.zEABSampler, {"order": 3}, {}),
        ("xEAB-3", sample.xEABSampler, {"order": 3}, {}),
        ("REAB-2", sample.REABSampler, {"order": 2}, {}),
        ("DDPM", sample.DDPMSampler, {}, {"stochastic": True}),
    ]
    found = []
    for log_snr in (False, True):
        for name, cls, options, facts in rows:
            # VE is even in both
            processes = ("vp", "edm", "rectified_flow") if log_snr else ()
            peer = Peer(f"azula {name}{' log-SNR' if log_snr else ''}", _no_draw, processes=processes, **facts)
            draw = partial(_with_azula, cls, options, peer.steps, log_snr)
            found.append(Peer(**{**vars(peer), "draw": draw}))
    return found


@torch.no_grad()
def _with_azula(
    cls: Any,
    options: dict[str, Any],
    steps: Callable[[int], int],
    log_snr: bool,
    denoiser: AbstractDenoiser,
    x: Tensor,
    nfe: int,
) -> Tensor:
    """Samples by a sampler whose unit time runs from t_min to T evenly in t, or in the log signal-to-noise ratio."""
    from azula.denoise import Denoiser, DiracPosterior  # type: ignore[import-not-found]

    sde = denoiser.sde
    low, high = (float(sde.log_snr(t)) for t in (sde.t_min_sampling, sde.T))

    def time(share: Tensor) -> Tensor:
        share = share.double()
        if log_snr:
            return sde.t_of_log_snr(low + (high - low) * share)
        return sde.t_min_sampling + (sde.T - sde.t_min_sampling) * share

    class Wrapped(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            return DiracPosterior(denoiser.denoised(x_t, float(time(t))).to(x_t))

    wrapped = Wrapped()
    wrapped.schedule = lambda t: (sde.alpha(time(t)), sde.sigma(time(t)))
    sampler = cls(wrapped, start=1.0, stop=0.0, steps=steps(nfe), silent=True, dtype=torch.float64, **options)
    return sampler(x).to(x.dtype)
