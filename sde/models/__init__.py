"""Networks: one file per architecture. Each is called as `network(x, noise, label)`; see `sde.models.base`."""

from sde.models.adm import ADM
from sde.models.base import MODELS, register
from sde.models.ddpm import DDPM
from sde.models.ddpmpp import DDPMpp
from sde.models.dit import DiT
from sde.models.edm2 import EDM2
from sde.models.mlp import MLP
from sde.models.ncsn import NCSN
from sde.models.ncsnpp import NCSNpp
from sde.models.ncsnv2 import NCSNv2
from sde.models.unet1d import UNet1d

__all__ = ["ADM", "DDPM", "EDM2", "MLP", "MODELS", "NCSN", "DDPMpp", "DiT", "NCSNpp", "NCSNv2", "UNet1d", "register"]
