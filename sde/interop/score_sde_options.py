"""The options of score_sde_pytorch's configurations that say what a network computes, with its own defaults.

Those that are not here say how to train, sample and evaluate. Those of ermongroup's projects have names of their own.
"""

from __future__ import annotations

from sde.interop.options import FLAG, REQUIRED, WORD, Option, number, several, whole

_CHANCE, _SIGMA, _COUNT, _NEEDED = number(at_least=0, below=1), number(above=0), whole(1), REQUIRED

DATA: dict[str, Option] = {
    "dataset": Option(WORD, "score_sde"),
    "image_size": Option(_COUNT, 32),
    "num_channels": Option(_COUNT, 3),
    "centered": Option(FLAG, False),
}
TRAINING: dict[str, Option] = {"sde": Option(WORD, ""), "continuous": Option(FLAG, True)}
MODEL: dict[str, Option] = {
    "name": Option(WORD, _NEEDED),
    "sigma_min": Option(_SIGMA, 0.01),
    "sigma_max": Option(_SIGMA, 50),
    "num_scales": Option(whole(2), 1000),
    "beta_min": Option(number(above=0), 0.1),
    "beta_max": Option(number(above=0), 20),
}
UNET: dict[str, Option] = MODEL | {
    "nf": Option(_COUNT, _NEEDED),
    "ch_mult": Option(several(_COUNT, at_least=1), _NEEDED),
    "num_res_blocks": Option(_COUNT, _NEEDED),
    "attn_resolutions": Option(several(_COUNT), (16,)),
    "resamp_with_conv": Option(FLAG, True),
    "conditional": Option(FLAG, True),
    "nonlinearity": Option(WORD, "swish"),
    "dropout": Option(_CHANCE, 0.1),
    "embedding_type": Option(WORD, "fourier"),
    "fourier_scale": Option(number(above=0), 16),
    "fir": Option(FLAG, _NEEDED),
    "fir_kernel": Option(several(number(), at_least=1), (1, 3, 3, 1)),
    "skip_rescale": Option(FLAG, True),
    "resblock_type": Option(WORD, "biggan"),
    "progressive": Option(WORD, "none"),
    "progressive_input": Option(WORD, _NEEDED),
    "progressive_combine": Option(WORD, "sum"),
    "init_scale": Option(number(at_least=0), 0.0),
    "scale_by_sigma": Option(FLAG, _NEEDED),  # as the SDE has it, where it is not given
}
REFINENET: dict[str, Option] = MODEL | {
    "nf": Option(_COUNT, _NEEDED),
    "nonlinearity": Option(WORD, _NEEDED),
    "normalization": Option(WORD, _NEEDED),
}
ERMONGROUP_DATA: dict[str, Option] = {
    "dataset": Option(WORD, ""),
    "image_size": Option(_COUNT, 32),
    "channels": Option(_COUNT, 3),
    "rescaled": Option(FLAG, False),
    "logit_transform": Option(FLAG, False),
}
ERMONGROUP_MODEL: dict[str, Option] = {
    "name": Option(WORD, _NEEDED),
    "ngf": Option(_COUNT, _NEEDED),
    "nonlinearity": Option(WORD, "elu"),
    "normalization": Option(WORD, "InstanceNorm++"),
    "num_classes": Option(whole(2), _NEEDED),
    "sigma_begin": Option(_SIGMA, _NEEDED),
    "sigma_end": Option(_SIGMA, _NEEDED),
    "sigma_dist": Option(WORD, "geometric"),
    "spec_norm": Option(FLAG, False),
}
