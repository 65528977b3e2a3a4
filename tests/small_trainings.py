"""Trainings of some steps, built as `python -m sde.train` builds them, on examples that are drawn in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor

from sde.config import conf_dir, plain
from sde.data import DataInfo, Dataset, Split
from sde.train_setup import make_trainer
from sde.training.checkpoint import save_checkpoint
from sde.training.loop import Trainer
from tests.small_models import SMALL, shape_of

GROUPS = {"averages": "ema"}  # the sections of a configuration that are not called as their folder

TINY = (
    "training.device=cpu",
    "training.steps=6",
    "training.batch_size=4",
    "training.log_every=1",
    "training.warmup=3",
    "optimizer.lr=1e-2",
    "ema.decay=0.9",
)
"""Where the learning rate is another one in each step, and all weights move."""


class Examples(Dataset):
    """Random examples with labels: pictures of three bands, or normal vectors.

    Args:
        shape: of one example; pictures if it has three axes.
        count: how many.
        flip: mirror pictures at random.
        bad: numbers of vectors that are infinite.
    """

    def __init__(self, shape: tuple[int, ...], count: int = 24, flip: bool = False, bad: tuple[int, ...] = ()) -> None:
        pictures = len(shape) == 3
        self.info = DataInfo("examples", shape, num_classes=3, kind="pixels" if pictures else "vectors")
        self.random_flip = flip
        generator = torch.Generator().manual_seed(7)
        values = torch.randn((count, *shape), generator=generator)
        values[list(bad)] = torch.inf
        self._values = (values * 40 + 128).clamp(0, 255).to(torch.uint8) if pictures else values
        self._labels = torch.arange(count) % 3

    info: DataInfo = None  # type: ignore[assignment]

    def split(self, name: str) -> Split:
        """The same examples under either name."""
        return Split(self._values, self._labels)


@lru_cache(maxsize=1)
def _defaults() -> str:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_yaml(OmegaConf.create(plain(compose("train"))))


def configuration(*words: str, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of `python -m sde.train words`, in a hundredth of the time; `sections` replace whole ones."""
    config = OmegaConf.create(_defaults())
    chosen = [
        word for word in words if "." not in word.partition("=")[0] and (conf_dir() / word.split("=")[0]).is_dir()
    ]
    for word in chosen:
        group, _, name = word.partition("=")
        config[GROUPS.get(group, group)] = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    for name, section in sections.items():
        config[name] = OmegaConf.create(dict(section))
    for word in words:
        if word not in chosen:
            key, _, value = word.partition("=")
            OmegaConf.update(config, key, OmegaConf.from_dotlist([f"v={value}"])["v"])
    return plain(config)


def model_words(name: str) -> list[str]:
    """The options of the small model `name`, with dropout where it has some, and an SDE and labels that it can take."""
    settings = dict(SMALL[name])
    file = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
    if "dropout" in file:
        settings["dropout"] = 0.3
    fitting = {
        "ncsn": ["sde=ve", "parameterization=smld_chain", "parameterization.n=1300"],
        "ncsnv2": ["sde=ve", "parameterization=score"],
        "ncsnpp": ["sde=ve", "parameterization=score"],
    }
    listed = [f"model.{key}={value}".replace(" ", "") for key, value in settings.items()]
    return [f"model={name}", *listed, *fitting.get(name, [])]


def examples_for(name: str, **settings: Any) -> Examples:
    """Examples of the shape of the small model `name`."""
    return Examples(shape_of(name), **settings)


def build(config: Mapping[str, Any], dataset: Dataset) -> Trainer:
    """A trainer as `python -m sde.train` makes it, in training mode."""
    trainer = make_trainer(dict(config), dataset, torch.device("cpu"))
    trainer.denoiser.network.train()
    return trainer


def save(trainer: Trainer, config: Mapping[str, Any], folder: Path) -> Path:
    """A checkpoint of the trainer."""
    about = {"config": dict(config), "data": trainer.batches.info.to_dict()}
    return save_checkpoint(folder, {**about, **trainer.state()})


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary, the names joined."""
    if isinstance(value, Mapping):
        items = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), child) for i, child in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for part, child in items for key, leaf in flat(child, f"{name}.{part}").items()}


def differing(a: Any, b: Any) -> list[str]:
    """The names under which two states do not hold the same bits."""
    one, two = flat(a), flat(b)
    assert one.keys() == two.keys()
    return [name for name in one if not same_bits(one[name], two[name])]


def same_bits(a: Any, b: Any) -> bool:
    """Whether two leaves of a state are the same: type, shape and bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
