"""The named recipes of conf/experiment compose, build, and hold what their headers and the originals say.

`python -m tests.test_experiments > docs/recipes.md` writes the table of recipes.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sde.config import build, conf_dir, plain
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError
from sde.models import MODELS
from sde.runs import build_denoiser
from sde.sampling import make_times
from tests.commands import command
from tests.small_models import SMALL

NAMES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml") if path.stem != "demo")
TABLE = Path(__file__).parent.parent / "docs" / "recipes.md"
KEYS = ("original", "published", "sample", "status", "differs")
CLASSES = {"cifar10": 10, "mnist": 10, "glyphs": 130}  # of pictures in a folder: 1000, as ImageNet
CHANNELS = {"cifar10": 3, "mnist": 1, "glyphs": 1}

# D / 2 or D, by which the original's sum over D dimensions is larger than a mean (reduce_mean=False; EDM)
SUMS = {"ve": 0.5, "edm": 1.0}
MEANS = {"ffhq1024_ve_ncsnpp"}  # reduce_mean=True
OWN = {"cifar10", "mnist", "glyphs", "mnist_cpu", "mnist_likelihood"}  # whose sizes are chosen here

# Largest noise levels of the originals, about the largest distance between two pictures (technique 1 of 2006.09011)
SIGMA_MAX = {
    "cifar10": 50,
    "celeba64": 90,
    "bedroom128": 190,
    "bedroom256": 378,
    "church256": 380,
    "celebahq256": 348,
    "ffhq256": 348,
    "celebahq1024": 1348,
    "ffhq1024": 1348,
}


def parameters_of_edm_adm() -> int:
    """Parameters of EDM's ADM for ImageNet at 64 pixels (arXiv 2206.00364, table 7: about 296 million), layer by layer.

    With a vector for "no label", which the original does not have.
    """
    embedding = 4 * 192

    def block(inputs: int, outputs: int, attention: bool = False) -> int:
        convolutions = (9 * inputs + 1 + 9 * outputs + 1) * outputs
        norms, modulation = 2 * inputs + 2 * outputs, (embedding + 1) * 2 * outputs
        shortcut = (inputs + 1) * outputs if inputs != outputs else 0
        heads = 2 * outputs + 4 * (outputs + 1) * outputs if attention else 0
        return convolutions + norms + modulation + shortcut + heads

    widths = [192, 384, 576, 768]  # at 64, 32, 16 and 8 pixels; attention at all but the first
    total = (192 + 1) * embedding + (embedding + 1) * embedding + (1000 + 1) * embedding + (27 + 1) * 192
    width, skips = 192, [192]
    for level, outputs in enumerate(widths):
        if level > 0:
            total, skips = total + block(width, width), [*skips, width]
        for _ in range(3):
            total, width, skips = total + block(width, outputs, level > 0), outputs, [*skips, outputs]
    total += block(width, width, True) + block(width, width)
    for level, outputs in reversed(list(enumerate(widths))):
        for _ in range(4):
            total, width = total + block(width + skips.pop(), outputs, level > 0), outputs
        total += block(width, width) if level > 0 else 0
    return total + 2 * 192 + 9 * 192 * 3 + 3


# Parameters of the original networks. Appendix C of arXiv 2509.15591 gives two networks of score_sde_pytorch, which
# rectified flows took over, the second with its 128 fixed frequencies; arXiv 2006.11239 gives 35.7 and 114 million with
# one attention block for every residual block on the way up, where score_sde_pytorch has one for a level.
PUBLISHED = {
    "edm_imagenet64": parameters_of_edm_adm(),
    "cifar10_vp_ddpmpp": 61_804_419,
    "celebahq256_ve_ncsnpp": 65_574_549 - 128,
    "cifar10_vp_ddpm_discrete": 35_746_307 - 2 * (4 * 256 * 257 + 2 * 256),
    "church256_vp_ddpm_discrete": 113_673_219 - 2 * (4 * 512 * 513 + 2 * 512),
}


@cache
def composed(config: str, *overrides: str) -> dict[str, Any]:
    """The configuration as the command line composes it, with hydra's choices under "choices"."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        whole = compose(config, overrides=list(overrides), return_hydra_config=True)
    choices = dict(whole.hydra.runtime.choices)
    kept = [str(key) for key in whole if key != "hydra"]
    node = OmegaConf.to_container(OmegaConf.masked_copy(whole, kept), resolve=True)
    assert isinstance(node, dict)
    return {**{str(key): value for key, value in node.items()}, "choices": choices}


def recipe(name: str, *overrides: str) -> dict[str, Any]:
    return composed("train", f"+experiment={name}", *overrides)


@pytest.mark.parametrize("name", ["edm_imagenet64", "ffhq256_ve_ncsnpp", "cifar10_ve_ncsnpp"])
def test_the_data_of_a_recipe_can_be_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the new data set has in common with the recipe's stays the recipe's."""

    def data(*overrides: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["train", *overrides])
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return plain(compose("train", overrides=[f"+experiment={name}", *overrides]))["data"]

    chosen, recipes = data("data=glyphs"), OmegaConf.load(conf_dir() / "experiment" / f"{name}.yaml").get("data") or {}
    assert set(chosen) == set(OmegaConf.load(conf_dir() / "data" / "glyphs.yaml"))
    assert all(chosen[key] == recipes[key] for key in ("size", "test_fraction") if key in recipes)
    build(chosen, "data")
    assert set(data("data=moons")) == set(OmegaConf.load(conf_dir() / "data" / "moons.yaml"))
    if "path" in recipes:
        with pytest.raises(OmegaConfBaseException, match=r"data\.path"):  # images need theirs as before
            data("data=images")
        with pytest.raises(UserError, match=r"data\.path is not an option of Glyphs"):
            build(data("data=glyphs", "data.path=pictures"), "data")


def header(name: str) -> dict[str, str]:
    """The comment at the top of a recipe: "what", "paper", and the KEYS that it has."""
    lines = (conf_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    comment = [line[2:] for line in lines[1 : next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    fields = {"what": comment[0], "paper": comment[1]}
    key = ""
    for line in comment[2:]:
        found = re.fullmatch(rf"({'|'.join(KEYS)}): (.*)", line)
        if found:
            key, text = found[1], found[2]
            fields[key] = text
        else:
            assert key, line
            assert line.startswith("  "), line
            fields[key] = fields[key].removesuffix("\\").rstrip() + " " + line.strip()
    return fields


def data_info(config: dict[str, Any]) -> DataInfo:
    """The facts about the data of a recipe, which are not asked of the data, since that may have to be downloaded."""
    name, data = config["choices"]["data"], config["data"]
    size = data.get("size", 32)
    return DataInfo(name, (data.get("channels", CHANNELS.get(name, 3)), size, size), CLASSES.get(name, 1000))


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """`sigma_data: auto`, which training measures, as a number."""
    changed = dict(config)
    for group in ("parameterization", "loss"):
        if config[group].get("sigma_data") == "auto":
            changed[group] = {**config[group], "sigma_data": 0.5}
    return changed


@cache
def network(model: str, info: DataInfo, conditional: bool) -> torch.nn.Module:
    """The network of full size, without memory for its weights; `model` is its node as JSON."""
    with torch.device("meta"):
        built = build(json.loads(model), "model", shape=info.shape, num_classes=info.num_classes if conditional else 0)
    assert isinstance(built, torch.nn.Module)
    return built


def network_of(name: str) -> torch.nn.Module:
    config = recipe(name)
    return network(json.dumps(config["model"]), data_info(config), config["conditional"])


def parameters(name: str) -> int:
    return sum(p.numel() for p in network_of(name).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_where_it_is_from_and_whether_it_was_run(name: str) -> None:
    fields = header(name)
    assert re.search(r", https://arxiv.org/abs/\d{4}\.\d{5}$", fields["paper"])
    assert fields["published"]
    assert fields["status"] == "not run here" or fields["status"].startswith("run: ")
    assert ("original" in fields) != (name in OWN)
    assert recipe(name)["sde"]["_target_"].startswith("sde.")
    discrete = name.endswith("discrete") or "ncsn_" in f"{name}_"
    assert ("time is continuous" in fields.get("differs", "")) == (discrete or "ncsnv2" in name)


@pytest.mark.parametrize("name", NAMES)
def test_everything_builds_at_full_size(name: str) -> None:
    config = without_auto(recipe(name))
    process, parameterization = build(config["sde"], "sde"), build(config["parameterization"], "parameterization")
    denoiser = Denoiser(network_of(name), process, parameterization)
    assert denoiser.network.shape == data_info(config).shape
    for group in ("loss", "training", "logger"):
        build(config[group], group)
    build(config["optimizer"], "optimizer", params=[torch.nn.Parameter(torch.zeros(1))])
    times = make_times(build(config["preview_solver"], "solver"), denoiser, None, config["preview_steps"])
    assert len(times) == config["preview_steps"] + 1
    path = {"path": "."} if config["choices"]["data"] == "images" else {}
    build({**config["data"], **path}, "data")


@pytest.mark.parametrize("name", NAMES)
def test_the_sampling_command_draws_as_the_previews_do(name: str) -> None:
    words = shlex.split(header(name)["sample"])
    assert words[:3] == ["python", "-m", "sde.sample"]
    sampled, trained = composed("sample", *words[3:]), recipe(name)
    assert sampled["choices"]["grid"] == "auto"
    assert sampled["solver"] == trained["preview_solver"]
    assert sampled["steps"] == trained["preview_steps"]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_has_the_loss_of_knowing_nothing(name: str) -> None:
    """A new network gives zero, whose loss is the variance of its target: 1 for every recipe, for data of 0.5.

    The weighting that bounds the likelihood does not divide by the mean weight: g^2 / sigma^2 = -d log SNR / dt.
    """
    config = without_auto(recipe(name))
    settings = dict(config["model"])
    model = next(key for key, cls in MODELS.items() if f"{cls.__module__}.{cls.__qualname__}" == settings["_target_"])
    settings |= {key: value for key, value in SMALL[model].items() if key in settings}
    settings |= {key: config["model"][key] for key in ("num_scales",) if key in settings}
    info = DataInfo("small", (3, 8, 8), 2)
    torch.manual_seed(0)
    denoiser = build_denoiser({**config, "model": settings, "conditional": False}, info)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.zero_()
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(64, *info.shape, generator=generator)
    loss, process = build(config["loss"], "loss"), denoiser.sde
    t_min, t_max = process.t_min, process.T
    range_of_levels = float(process.log_snr(t_min) - process.log_snr(t_max))
    expected = range_of_levels / (t_max - t_min) if loss.weighting == "likelihood" else 1.0
    losses = loss(denoiser, x0, generator)
    n = x0.numel()  # the mean of n squared normals has standard deviation sqrt(2 / n)
    assert losses.loss.mean().item() / expected == pytest.approx(1.0, abs=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("name", sorted(set(NAMES) - OWN))
def test_gradients_are_clipped_where_the_original_clips_them(name: str) -> None:
    """Of a loss k times as large as ours, the norm c of the gradient and Adam's eps are c / k and eps / k of ours."""
    config = recipe(name)
    k = SUMS.get(config["choices"]["sde"], 0) * math.prod(data_info(config).shape)
    k = 1.0 if k == 0 or name in MEANS else k
    clips = not name.startswith("edm") and "ncsn_" not in f"{name}_" and "ncsnv2" not in name
    assert config["training"]["clip"] == pytest.approx(1 / k if clips else 0.0, rel=1e-9)
    assert config["optimizer"]["eps"] == pytest.approx(1e-8 / k, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("edm")])
def test_edm_counts_pictures(name: str) -> None:
    """Steps, warm-up and the half-life of the average follow from 200, 10 and 0.5 million pictures and the batch."""
    training, ema = recipe(name)["training"], recipe(name)["ema"]
    million = 1_000_000 / training["batch_size"]
    length, half_life = (2500, 50) if "imagenet" in name else (200, 0.5)
    assert training["steps"] == pytest.approx(length * million, abs=1)
    assert training["warmup"] == pytest.approx(10 * million, abs=1)
    assert math.log(0.5) / math.log(ema["decay"]) == pytest.approx(half_life * million, rel=1e-3)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_networks_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameters(name) == count


@pytest.mark.parametrize("name", [name for name in NAMES if "the nearest of them" in header(name).get("differs", "")])
def test_a_network_that_looks_noise_levels_up_has_those_of_its_sde(name: str) -> None:
    config = recipe(name)
    assert config["choices"]["parameterization"] == "smld_chain"
    assert config["model"]["num_scales"] == config["parameterization"]["n"]
    for key in ("sigma_min", "sigma_max"):
        assert config["model"].get(key, config["sde"][key]) == config["sde"][key]


@pytest.mark.parametrize("name", [name for name in NAMES if re.search("^(?!edm).*[0-9]_(ve_|ncsn)", name)])
def test_noise_levels_of_data_between_0_and_1_are_doubled(name: str) -> None:
    """The originals' VE runs have data in [0, 1]; here it is in [-1, 1], twice as wide."""
    noise = recipe(name)["sde"]
    highest = 1 if re.search(r"_ncsn(_5)?$", name) else SIGMA_MAX[name.split("_")[0]]
    assert (noise["sigma_min"], noise["sigma_max"]) == (2 * 0.01, 2 * highest)


def test_the_table_of_recipes_is_up_to_date() -> None:
    assert TABLE.read_text() == table(NAMES), "write it with: python -m tests.test_experiments > docs/recipes.md"


def test_mistakes_with_recipes_are_answered_with_what_to_write(tmp_path: Path) -> None:
    answer = command("sde.train", "+experiment=cifar_10", folder=tmp_path)
    assert answer.code == 2
    assert answer.sentence.startswith("error: experiment=cifar_10 is not one of bedroom128_ncsnv2, ")
    assert answer.sentence.endswith("did you mean 'cifar10'?")
    answer = command("sde.train", "+experiment=ffhq256_ve_ncsnpp", folder=tmp_path)
    assert (answer.code, answer.sentence) == (2, "error: the option 'data.path' needs a value: write data.path=...")
    answer = command("sde.train", "experiment=cifar10", folder=tmp_path)
    assert answer.code == 2
    assert answer.sentence == "error: experiment=cifar10 has nothing to replace: write +experiment=cifar10"


def table(names: Sequence[str]) -> str:
    """docs/recipes.md."""
    lines = [
        "# Recipes",
        "",
        "`python -m sde.train +experiment=NAME` trains one of them. The header of `conf/experiment/NAME.yaml` has the",
        "command that samples as the paper does, and what differs from the original, if anything. Pictures in a folder",
        "need `data.path=FOLDER`. The published numbers are those of the papers: unless a recipe says otherwise, it",
        "has not been run here. Times of a batch are drawn stratified, where the originals draw them independently.",
        "",
        "| recipe | what | data | network | parameters | published | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        config, fields = recipe(name), header(name)
        channels, height, width = data_info(config).shape
        title, _, link = fields["paper"].rpartition(", ")
        row = (
            f"[{name}](../conf/experiment/{name}.yaml)",
            fields["what"],
            f"{config['choices']['data']}, {channels} x {height} x {width}",
            config["choices"]["model"],
            f"{parameters(name) / 1e6:.1f} M",
            fields["published"],
            f"[{link.rpartition('/')[2]}]({link})",
        )
        assert title
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(NAMES), end="")
