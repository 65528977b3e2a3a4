"""Networks: one file per architecture. Each is called as `network(x, noise, label)`; see `sde.models.base`."""

from sde.models.base import MODELS, register
from sde.models.ddpm import DDPM
from sde.models.ddpmpp import DDPMpp
from sde.models.mlp import MLP
from sde.models.ncsnpp import NCSNpp

__all__ = ["DDPM", "MLP", "MODELS", "DDPMpp", "NCSNpp", "register"]
