r"""Features of any network that somebody has saved as TorchScript, told how it wants its pictures.

    python -m sde.evaluate run=RUN metric=fd features=network.pt features.trusted=true features.range=zero_one

A TorchScript archive is a program. It reaches nothing but operations of torch, of which two touch files, `save` and
`from_file`; so its code is read before it is loaded, and refused if it calls these, or operations of any other library.
Interpreters have flaws nevertheless: it is loaded only with `trusted`, by somebody who knows where it comes from.
"""

from __future__ import annotations

import ast
import hashlib
import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde.data import DataInfo, Dataset
from sde.data.base import check_whole
from sde.errors import UserError, check_choice, check_flag
from sde.evaluation.classifier import resized
from sde.evaluation.extractors import Extractor, Features, exactly, register

RANGES = {"unit": (1 / 127.5, -1.0), "zero_one": (1 / 255, 0.0), "bytes": (1.0, 0.0)}
"""Factor and shift that take 0 .. 255 to [-1, 1], [0, 1], and [0, 255]."""
SUFFIXES = (".pt", ".pth", ".ts", ".jit", ".torchscript")
FILES = ("save", "from_file")  # the operations of TorchScript that write or read files
LIBRARIES = ("prim", "aten")  # torch's own
_MOST_CODE = 1 << 26  # bytes


@register("torchscript")
@dataclass(eq=False)
class TorchScript(Extractor):
    """What a TorchScript module makes of examples.

    It is called with float32 (B, C, H, W), or with vectors as they are, and returns features (B, D); or (B, D, h, w),
    which are averaged over positions; or a tuple that begins with them, and with `logits` goes on with these.

    Args:
        path: the archive that `torch.jit.save` wrote.
        trusted: that you know where the file comes from; it is a program.
        range: of the pixels that it wants: unit for [-1, 1], zero_one for [0, 1], bytes for [0, 255].
        mean: of each channel, taken away after that; None for 0.
        std: of each channel, divided by after that; None for 1.
        size: side in pixels that pictures are scaled to (bicubic, antialiased, rounded to whole gray levels); None
            for as they are.
        color: repeat gray pictures to three channels.
        logits: whether the second of what it returns are logits of classes, which the Inception Score needs.
        arguments: of the call besides the pictures, such as {return_features: true}; None for nothing.

    Raises:
        UserError: a value is not allowed.
    """

    path: str
    trusted: bool = False
    range: str = "unit"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None
    color: bool = False
    logits: bool = False
    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("trusted", "color", "logits"):
            check_flag(f"features.{name}", getattr(self, name))
        check_choice("features.range", self.range, RANGES)
        if self.size is not None:
            check_whole("features.size", self.size, at_least=1)
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = isinstance(values, Sequence) and all(isinstance(x, int | float) for x in values)
            if values is not None and not (numbers and values and (name == "mean" or min(values) > 0)):
                kind = "numbers" if name == "mean" else "numbers above 0"
                raise UserError(f"features.{name}={values!r} must be a list of {kind}, one for each channel, or null")
        if not (self.arguments is None or isinstance(self.arguments, Mapping)):
            raise UserError(
                f"features.arguments={self.arguments!r} must be names and values, as {{return_features: true}}"
            )
        self.any_size = self.size is not None
        self.classifies = self.logits

    def _check(self, info: DataInfo) -> None:
        if info.kind != "pixels" and (self.size is not None or self.color or self.mean or self.std):
            raise UserError(
                f"{info.name} holds vectors, which features=torchscript gives to the module as they are: leave "
                "features.size, color, mean and std out"
            )
        channels = 3 if self.color and info.shape[0] == 1 else info.shape[0]
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, channels):
                raise UserError(f"features.{name} has {len(values)} numbers and pictures have {channels} channels")

    def _make(self, dataset: Dataset, device: torch.device) -> nn.Module:
        content = checked_archive(Path(self.path).expanduser(), self.trusted)
        self._digest = hashlib.sha256(content).hexdigest()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                network = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        except (RuntimeError, ValueError, OSError, torch.jit.Error) as error:
            raise UserError(f"features.path={self.path} is damaged: torch.jit.load says {_last_line(error)}") from error
        found = self._tried(network, dataset, device)
        self._dimensions = found.features.shape[1]
        return network

    def _tried(self, network: nn.Module, dataset: Dataset, device: torch.device) -> Features:
        """What two examples give: whatever is wrong with the call is seen before samples are drawn."""
        examples = dataset.split("train").values[:2].to(device)
        try:
            with torch.inference_mode(), exactly(device):
                return self._called(network, examples)
        except (RuntimeError, TypeError, torch.jit.Error) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in (self.arguments or {}).items())
            raise UserError(
                f"features.path={self.path} cannot be called with {tuple(self._pixels(examples).shape)} in "
                f"{self.range}{' and ' + given if given else ''} ({_last_line(error)}): see features.color, size and "
                "arguments"
            ) from error

    def _compute(self, values: Tensor) -> Features:
        assert self._network is not None
        return self._called(self._network, values)

    def _called(self, network: nn.Module, values: Tensor) -> Features:
        found = network(self._pixels(values), **(self.arguments or {}))
        parts = list(found) if isinstance(found, tuple | list) else [found]
        wanted = [(2, 4), (2,)] if self.logits else [(2, 4)]
        for part, dimensions in zip_longest(parts[: len(wanted)], wanted):
            if not (isinstance(part, Tensor) and part.ndim in dimensions and len(part) == len(values)):
                kinds = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts]
                right = "(B, D) or (B, D, h, w)" + (" and logits (B, classes)" if self.logits else "")
                raise UserError(f"features.path={self.path} returns {kinds} of B = {len(values)}: it must be {right}")
        features = parts[0].mean((2, 3)) if parts[0].ndim == 4 else parts[0]
        return Features(features, parts[1].float().softmax(1) if self.logits else None)

    def _pixels(self, values: Tensor) -> Tensor:
        """What the module sees of stored examples."""
        if values.dtype != torch.uint8:
            return values.float()
        if self.size is not None:
            values = resized(values, (self.size, self.size))
        if self.color and values.shape[1] == 1:
            values = values.expand(-1, 3, -1, -1)
        factor, shift = RANGES[self.range]
        x = values.float() * factor + shift
        mean, std = (None if v is None else x.new_tensor(v).reshape(-1, 1, 1) for v in (self.mean, self.std))
        x = x if mean is None else x - mean
        return (x if std is None else x / std).contiguous()

    def _facts(self) -> dict[str, Any]:
        resize = None if self.size is None else f"bicubic, antialiased, to {self.size} x {self.size}, rounded"
        return {"dimensions": self._dimensions, "resize": resize, "sha256": self._digest}

    def _numbers(self) -> list[Any]:
        pictures = [self.range, self.mean and list(self.mean), self.std and list(self.std), self.size, self.color]
        call = [self.logits, dict(self.arguments or {})]
        return [self._digest, *pictures, *call, list(self.info.shape), self.info.kind]  # where it lies changes nothing


def checked_archive(path: Path, trusted: bool) -> bytes:
    """The content of a TorchScript archive, read once, and looked into without loading it.

    Args:
        path: of the file.
        trusted: that it may be loaded.

    Raises:
        UserError: there is none, it is of another kind, it is not trusted, or it would touch files.
    """
    if not path.is_file():
        raise UserError(f"features.path={str(path)!r} does not exist: give a TorchScript archive")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name.lower() for name in archive.namelist()]  # torch finds a name in any case
            if len({*names}) < len(names):
                raise ValueError("two files of one name")  # another reader might take the other one
            programs = [info for info in archive.infolist() if info.filename.lower().endswith(".py")]
            if programs and not trusted:
                raise UserError(
                    f"features.path={str(path)!r} is TorchScript, which is a program: with features.trusted=true it is "
                    "loaded, if you know where it comes from"
                )
            if sum(info.file_size for info in programs) > _MOST_CODE:
                raise ValueError("more code than any network has")
            code = {info.filename: archive.read(info).decode() for info in programs}
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError) as error:
        raise UserError(
            f"features.path={str(path)!r} is damaged or no TorchScript archive: save one with torch.jit.save"
        ) from error
    if not code:
        raise UserError(
            f"features.path={str(path)!r} holds weights without a network (a pickle, which is not read): give what "
            "torch.jit.save wrote"
        )
    for name, text in code.items():
        for call in forbidden_calls(text):
            raise UserError(
                f"features.path={str(path)!r} calls {call} in {name}, which is more than a network has to: it is not "
                "loaded"
            )
    return content


def forbidden_calls(code: str) -> Iterator[str]:
    """What TorchScript code does besides computing: operations on files, or of other libraries than torch."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield "something that cannot be read"
        return
    nodes = list(ast.walk(tree))
    roots = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    fetches = {id(node.func): node.args for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            library = isinstance(node.value, ast.Name) and node.value.id == "ops"
            wrong = node.attr in FILES or (library and node.attr not in LIBRARIES)
        elif isinstance(node, ast.Name) and node.id in ("ops", "torch"):
            wrong = id(node) not in roots  # under another name what it gives could not be told
        elif isinstance(node, ast.Name) and node.id == "getattr":
            name = fetches.get(id(node), [])[1:]
            wrong = [isinstance(x, ast.Constant) and x.value not in FILES for x in name] != [True]
        else:
            wrong = isinstance(node, ast.Import | ast.ImportFrom)
        if wrong:
            yield ast.unparse(node)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
