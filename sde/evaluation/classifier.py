r"""Features of a small classifier: trained on the labels of the data set, once, in about a minute on two CPU cores.

A network that tells the classes of a data set apart knows what matters in its pictures; one trained on photographs
(`inception`) need not. Features are the layer before the last, averaged over positions; probabilities are

    p(y | x) = softmax(W f(x) + b).

    pictures in [-1, 1] -> convolution -> two residual blocks (arXiv 1512.03385) -> average -> classes

Convolution and blocks halve the picture; those of more than 32 pixels are halved by further convolutions first.
Training: cross-entropy with smoothed labels (arXiv 1512.00567, section 7), AdamW, one cycle of the learning rate
(arXiv 1708.07120). The trained network lies in the cache, in a folder named by a hash of the labelled pictures and of
all options:

    classifier-<hash>/classifier.safetensors    weights; its header tells the architecture
                      classifier.json           options, accuracy, a hash of the weights

Such a .safetensors file can be given away and used by `module`. Neither file can run code. Exported programs (.pt2) are
not read at all: torch.export.load unpickles what it does not know. For TorchScript see `torchscript`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from sde.data import DataInfo, Dataset, Order, Split
from sde.data.base import check_whole
from sde.data.cache import cache_dir, locked, new_folder
from sde.distributed import on_main
from sde.errors import UserError, check_number
from sde.evaluation.digests import digest_of, digest_of_examples, digest_of_tensors
from sde.evaluation.extractors import Extractor, Features, exactly, in_unit_range, refuse_vectors, register
from sde.progress import progress_bar

VERSION = 1  # of network and training; part of the name of the folder
WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"
_SIDE = 32  # pixels that the blocks see; larger pictures are halved before
_SMOOTHING = 0.1
_AT_ONCE = 250  # pictures, when the accuracy is measured


# The network


class Block(nn.Module):
    """A residual block that halves the picture: (B, before, H, W) to (B, after, H/2, W/2)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        h = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(h + self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True)))


class ClassifierNetwork(nn.Module):
    """Pictures in [-1, 1] to features and logits.

    Args:
        shape: (C, H, W) of the pictures.
        num_classes: how many classes.
        width: channels of the first convolution; the features have four times as many dimensions.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        self.shape, self.num_classes, self.width = tuple(shape), num_classes, width
        layers: list[nn.Module] = []
        before, side = shape[0], max(shape[1:])
        while side > _SIDE:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before, side = width, (side + 1) // 2
        layers += [nn.Conv2d(before, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [Block(width, 2 * width), Block(2 * width, 4 * width)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(4 * width, num_classes)

    @property
    def dimensions(self) -> int:
        """Of the features."""
        return self.last.in_features

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to features (B, D) and logits (B, num_classes)."""
        features = self.layers(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return features, self.last(features)

    def architecture(self) -> dict[str, Any]:
        """What a file has to say to build the network again."""
        return {"shape": list(self.shape), "num_classes": self.num_classes, "width": self.width}


# The features


@register("classifier")
@dataclass(eq=False)
class Classifier(Extractor):
    """The penultimate layer of a network trained on the labels of the data set, and its probabilities.

    Another machine trains it to other weights, and so to other numbers, by rounding: to compare, give the file away.

    Args:
        width: channels of the first convolution; there are 4 width features.
        steps: optimizer steps at most.
        epochs: passes over the train split at most.
        batch_size: pictures of a step.
        lr: highest learning rate of the cycle.
        seed: of the first weights, the order of pictures and their flips.

    Raises:
        UserError: a value is not allowed.
    """

    width: int = 32
    steps: int = 700
    epochs: int = 25
    batch_size: int = 128
    lr: float = 5e-3
    seed: int = 0

    classifies = True

    def __post_init__(self) -> None:
        for name in ("width", "steps", "epochs"):
            check_whole(f"features.{name}", getattr(self, name), at_least=1)
        check_whole("features.batch_size", self.batch_size, at_least=2)  # of which BatchNorm takes the variance
        check_number("features.lr", self.lr, above=0)
        check_whole("features.seed", self.seed, at_least=0)

    def _check(self, info: DataInfo) -> None:
        refuse_vectors(self.name, info)
        if info.num_classes < 2:
            raise UserError(
                f"features=classifier learns labels, and {info.name} has none: use features=random, or a network that "
                "was trained on similar pictures: features=module features.path=FILE"
            )

    def _make(self, dataset: Dataset, device: torch.device) -> nn.Module:
        state, self._about = on_main(lambda: self._load_or_train(dataset, device))
        network = self._build(dataset.info)
        network.load_state_dict(state)
        return network

    def _build(self, info: DataInfo) -> ClassifierNetwork:
        return ClassifierNetwork(info.shape, info.num_classes, self.width)

    def _load_or_train(self, dataset: Dataset, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
        train, test = labelled(dataset, "train"), labelled(dataset, "test")
        data = [
            digest_of_examples(x)
            for split in (train, test)
            if split
            for x in (split.values, split.labels)
            if x is not None
        ]
        key = digest_of(VERSION, asdict(self), dataset.info.num_classes, dataset.random_flip, data)
        folder = cache_dir() / f"classifier-{key[:16]}"
        with locked(folder):
            found = read_trained(folder)
            if found is not None:
                return found
            if folder.exists():
                print(f"the classifier in {folder} is damaged: it is trained again", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
            assert train is not None
            network = train_classifier(self._build(dataset.info), self, train, dataset.random_flip, device)
            about = {
                "trained_on": f"{len(train)} examples of {dataset.info.name}",
                "steps": steps_for(self, len(train)),
                "train_accuracy": accuracy(network, train, device, 10_000),
                "test_accuracy": None if test is None else accuracy(network, test, device),
                "file": str(folder / WEIGHTS),
            }
            state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
            with new_folder(folder) as temporary:
                write_weights(temporary / WEIGHTS, network, state)
                text = json.dumps({**about, "options": asdict(self), "weights": digest_of_tensors(state)}, indent=2)
                (temporary / FACTS).write_text(text + "\n", encoding="utf-8")
            return state, about

    def _compute(self, values: Tensor) -> Features:
        assert self._network is not None
        features, logits = self._network(in_unit_range(values))
        return Features(features, logits.softmax(1))

    def _facts(self) -> dict[str, Any]:
        assert isinstance(self._network, ClassifierNetwork)
        return {"dimensions": self._network.dimensions, "range": [-1.0, 1.0], "resize": None, **self._about}


@register("module")
@dataclass(eq=False)
class Module(Extractor):
    """The features of a classifier that was trained before: on other pictures of the same kind, or longer.

    Args:
        path: a classifier.safetensors that features=classifier has written into the cache.
        resize: whether pictures of another size are scaled to that of the network (bicubic, antialiased, rounded to
            whole gray levels) instead of being refused.

    Raises:
        UserError: there is no such file, or it holds no classifier.
    """

    path: str
    resize: bool = False

    classifies = True

    def _check(self, info: DataInfo) -> None:
        refuse_vectors(self.name, info)

    def _make(self, dataset: Dataset, device: torch.device) -> nn.Module:
        network = read_network(Path(self.path).expanduser())
        shape, info = network.shape, dataset.info
        if shape != tuple(info.shape) and not (self.resize and shape[0] == info.shape[0]):
            fix = "set features.resize=true" if shape[0] == info.shape[0] else "give one for as many channels"
            raise UserError(
                f"features.path={self.path} is for pictures of shape {shape} and {info.name} has {tuple(info.shape)}: "
                f"{fix}"
            )
        return network

    def _compute(self, values: Tensor) -> Features:
        assert isinstance(self._network, ClassifierNetwork)
        features, logits = self._network(in_unit_range(resized(values, self._network.shape[1:])))
        return Features(features, logits.softmax(1))

    def _facts(self) -> dict[str, Any]:
        assert isinstance(self._network, ClassifierNetwork)
        size = list(self._network.shape[1:])
        how = None if size == list(self.info.shape[1:]) else f"bicubic, antialiased, to {size}, rounded"
        return {"dimensions": self._network.dimensions, "range": [-1.0, 1.0], "resize": how}

    def _numbers(self) -> list[Any]:
        return [list(self.info.shape)]  # where the file lies changes nothing


def resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """uint8 pictures (B, C, H, W) scaled as Pillow does it: bicubic, antialiased, rounded; as they are if they fit.

    Rows first, then columns: what overshoots is cut off in between, which shows at sharp edges. Halves are rounded up.
    """
    x = values
    for now in ((values.shape[2], size[1]), tuple(size)):
        if tuple(x.shape[2:]) != now:
            scaled = F.interpolate(x.float(), size=now, mode="bicubic", antialias=True)
            x = (scaled + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return x


# Training


def labelled(dataset: Dataset, name: str) -> Split | None:
    """A split with labels; None when there is none.

    Raises:
        UserError: there is no train split.
    """
    try:
        split = dataset.split(name)
    except UserError:
        if name == "train":
            raise
        return None
    return split if split.labels is not None and len(split) else None


def steps_for(options: Classifier, n: int) -> int:
    """Optimizer steps for n pictures."""
    return max(1, min(options.steps, options.epochs * n // options.batch_size))


def train_classifier(
    network: ClassifierNetwork, options: Classifier, split: Split, flip: bool, device: torch.device
) -> ClassifierNetwork:
    """Train `network` on a split with labels, and return it on `device`, in evaluation mode."""
    assert split.labels is not None
    steps, order = steps_for(options, len(split)), Order(len(split), options.batch_size, options.seed)
    draws = torch.Generator().manual_seed(options.seed)
    initialize(network, draws)
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.01)
    # of fewer steps than six the scheduler divides by the length of a warm-up that has none
    total = max(steps + 1, 6)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total, pct_start=0.2)
    with exactly(device), progress_bar(steps, unit="step", desc="training the classifier") as bar:
        for step in range(steps):
            indices = order(step)
            x, labels = in_unit_range(split.values[indices].to(device)), split.labels[indices].to(device)
            if flip:
                mirrored = torch.rand(len(x), generator=draws).to(device) < 0.5
                x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            loss = F.cross_entropy(network(x)[1], labels, label_smoothing=_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            bar.update()
    return network.eval()


def initialize(network: nn.Module, draws: torch.Generator) -> None:
    """Weights of variance 2 / fan_in (arXiv 1502.01852), drawn without the global generator."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=draws)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=draws)
            nn.init.zeros_(module.bias)


def accuracy(network: ClassifierNetwork, split: Split, device: torch.device, most: int | None = None) -> float:
    """The share of examples that get their label; of the first `most`."""
    assert split.labels is not None
    n = len(split) if most is None else min(len(split), most)
    right = 0
    with torch.inference_mode(), exactly(device):
        for start in range(0, n, _AT_ONCE):
            stop = min(n, start + _AT_ONCE)
            found = network(in_unit_range(split.values[start:stop].to(device)))[1].argmax(1).cpu()
            right += int((found == split.labels[start:stop].cpu()).sum())
    return right / n


# Files


def write_weights(path: Path, network: ClassifierNetwork, state: Mapping[str, Tensor]) -> None:
    """A .safetensors file that tells how to build the network."""
    header = {"classifier": json.dumps({"version": VERSION, **network.architecture()})}
    safetensors.torch.save_file(dict(state), path, metadata=header)


def read_trained(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and facts of a folder that is whole, otherwise None."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        state = safetensors.torch.load_file(folder / WEIGHTS)
        if digest_of_tensors(state) != facts.pop("weights"):
            return None
        del facts["options"]
        return state, {**facts, "file": str(folder / WEIGHTS)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def read_network(path: Path) -> ClassifierNetwork:
    """The classifier in a file that `write_weights` wrote.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    if not path.is_file():
        raise UserError(f"features.path={str(path)!r} does not exist: give a {WEIGHTS} that features=classifier wrote")
    if path.suffix != ".safetensors":
        raise UserError(
            f"features.path={str(path)!r} is not a .safetensors file, and others can run code: give a {WEIGHTS} "
            "that features=classifier wrote, a TorchScript archive (.pt) to features=torchscript, or register an "
            "extractor of yours with plugins="
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["classifier"])
        if header["version"] != VERSION:
            raise UserError(
                f"features.path={str(path)!r} has version {header['version']} and this package reads version "
                f"{VERSION}: train it again"
            )
        with torch.device("meta"):  # a header takes no more memory than the weights that follow it
            network = ClassifierNetwork(tuple(header["shape"]), header["num_classes"], header["width"])
        network.load_state_dict(safetensors.torch.load_file(path), assign=True)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"features.path={str(path)!r} is damaged or holds no classifier of this package: give a {WEIGHTS} that "
            "features=classifier wrote"
        ) from error
    return network
