r"""The likelihood of score_sde_pytorch, written from its description (arXiv 2011.13456, appendix D.2).

The batch, flat, and one log-density for each example are one system of ordinary differential equations,

    d/dt (x, l) = (h(x, t), v' J v),    h = f x - g^2 / 2 score,    J = d h / d x,

from t_min to T in NumPy, for SciPy's RK45. Every right-hand side goes to the device and back and asks the network
twice: once for h, once for the divergence, the gradient of v'h. What is reported as evaluations is SciPy's count of
right-hand sides, half of the calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sde.broadcast import expand
from sde.denoiser import AbstractDenoiser
from sde.density.flow import dtype_of


@dataclass(frozen=True)
class OriginalLogProb:
    """What the original computes for a batch of B examples.

    Attributes:
        log_prob: nats, (B,) float64.
        bits: per dimension, with the original's offset of 7 for data in [-1, 1], (B,).
        latent: x_T, (B, ...) float64.
        nfe: the evaluations it reports, SciPy's nfev.
    """

    log_prob: Tensor
    bits: Tensor
    latent: Tensor
    nfe: int


@torch.no_grad()
def original_log_prob(
    denoiser: AbstractDenoiser, x: Tensor, probes: Tensor, rtol: float = 1e-5, atol: float = 1e-5
) -> OriginalLogProb:
    """log p_{t_min}(x) as the original finds it.

    Args:
        denoiser: the model; states are given to it in the type of its weights.
        x: examples (B, ...).
        probes: v, (B, ...).
        rtol, atol: of SciPy's steps, for the whole batch at once.
    """
    sde, dtype, numel = denoiser.sde, dtype_of(denoiser), x[0].numel()
    probes = probes.to(x.device, dtype)

    def drift(state: Tensor, t: Tensor) -> Tensor:
        f, g = (expand(c.to(dtype), state) for c in (sde.f(t.double()), sde.g(t.double())))
        return f * state - 0.5 * g**2 * denoiser.score(state, t)

    def divergence(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            state.requires_grad_(True)
            total = torch.sum(drift(state, t) * probes)
            gradient = torch.autograd.grad(total, state)[0]
        state.requires_grad_(False)
        return torch.sum(gradient * probes, dim=tuple(range(1, state.ndim)))

    def right_hand_side(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y[: -len(x)].reshape(x.shape)).to(x.device).to(dtype)
        times = torch.ones(len(x), device=x.device, dtype=dtype) * t
        change = drift(state, times).cpu().numpy().reshape(-1)
        return np.concatenate([change, divergence(state, times).cpu().numpy()])

    start = np.concatenate([x.double().cpu().numpy().reshape(-1), np.zeros(len(x))])
    solution = solve_ivp(right_hand_side, (sde.t_min, sde.T), start, method="RK45", rtol=rtol, atol=atol)
    assert solution.success, solution.message
    end = torch.from_numpy(solution.y[:, -1].copy())
    latent = end[: -len(x)].reshape(x.shape)
    std = sde.prior_std
    prior = -0.5 * (latent.flatten(1) / std).square().sum(1) - 0.5 * numel * math.log(2 * math.pi * std**2)
    log_prob = prior + end[-len(x) :]
    bits = -log_prob / (numel * math.log(2)) + 7
    return OriginalLogProb(log_prob, bits, latent, solution.nfev)
