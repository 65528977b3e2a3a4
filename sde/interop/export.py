"""`python -m sde.interop.export`: a run's averaged weights as a folder to give away, and such folders as denoisers.

    python -m sde.interop.export run=runs/... to=my-model
    python -m sde.sample run=my-model
    denoiser, info = load_pretrained("my-model")

The folder holds model.safetensors, config.json (`sde.interop.folders`) and README.md, a model card.
`python -m sde.interop.hub push folder=my-model repo=user/name` puts it on the Hugging Face hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sde.cli import run_command
from sde.data import DataInfo
from sde.denoiser import Denoiser
from sde.errors import UserError
from sde.files import write_text
from sde.interop.folders import read_folder, write_folder
from sde.runs import find_run, open_checkpoint, restore_denoiser
from sde.training.checkpoint import Checkpoint


def load_pretrained(folder: str | Path) -> tuple[Denoiser, DataInfo]:
    """The denoiser of an exported folder, in evaluation mode on the CPU, and the facts about its data.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    return restore_denoiser(read_folder(Path(folder).expanduser()))


def export(checkpoint: Checkpoint, folder: Path, ema: bool | float | str = True) -> None:
    """Write the averaged weights of a checkpoint, its configuration and a model card.

    Args:
        checkpoint: an opened checkpoint.
        folder: new or empty.
        ema: which average: True for the first, or its name.

    Raises:
        UserError: there is something in the folder, there is no such average, or the checkpoint does not fit its own
            configuration.
    """
    if ema is False:
        raise UserError("ema=false: averaged weights are what is exported; leave it out, or name an average")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"to={folder} exists and is not empty: choose a new folder")
    denoiser, info = restore_denoiser(checkpoint, ema=ema)
    content = checkpoint.content
    write_text(folder / "README.md", model_card(denoiser, info, checkpoint.step, folder.name))
    write_folder(folder, content["config"], content["data"], denoiser.network.state_dict(), checkpoint.step)


def model_card(denoiser: Denoiser, info: DataInfo, step: int, name: str) -> str:
    """README.md: what the model is, and how to sample from it; the header is the hub's."""
    parameters = sum(parameter.numel() for parameter in denoiser.network.parameters())
    told = f"{info.num_classes} classes" if getattr(denoiser.network, "num_classes", 0) else "no classes"
    facts = {
        "network": f"{type(denoiser.network).__name__}, {parameters:,} parameters",
        "forward process": str(denoiser.sde),
        "predicts": str(denoiser.parameterization),
        "data": f"{info.name}, shape {tuple(info.shape)}, {told}",
        "training": f"{step:,} steps; the weights are averages" if step else "the weights are averages",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    header = "---\nlibrary_name: sde\ntags:\n  - diffusion\n  - score-based-generative-modeling\n---\n\n"
    return (
        f"{header}# {name}\n\nA score-based generative model.\n\n| | |\n|---|---|\n{rows}\n\n"
        "Draw samples:\n\n"
        f"    python -m sde.sample run={name} n=64\n\n"
        "Or in Python:\n\n"
        "    from sde.interop.export import load_pretrained\n\n"
        f'    denoiser, info = load_pretrained("{name}")\n'
    )


def export_run(config: dict[str, Any]) -> None:
    """Export `checkpoint` of `run` to the folder `to`."""
    run = find_run(config["run"], Path(str(config["runs"])))
    checkpoint = open_checkpoint(run, str(config["checkpoint"]))
    folder = Path(str(config["to"])).expanduser()
    export(checkpoint, folder, config["ema"])
    for file in sorted(folder.iterdir()):
        print(file)
    print(f"draw samples with: python -m sde.sample run={folder}")


def main() -> None:
    """Entry point of the command line."""
    run_command("export", export_run)


if __name__ == "__main__":
    main()
