"""Optimizers besides those of `torch.optim`, which need no entry here.

    from sde.training.optimizers import OPTIMIZERS

    @OPTIMIZERS.register("mine")
    class Mine(torch.optim.Optimizer): ...

in a module that `plugins=[...]` names, makes `optimizer._target_=my_module.Mine` known.
"""

from __future__ import annotations

import torch

from sde.registry import Registry

OPTIMIZERS: Registry[torch.optim.Optimizer] = Registry("optimizer")
