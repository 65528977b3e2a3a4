"""From a configuration to all that is trained, and what to say when it does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sde.config import build
from sde.data import Dataset, measure_sigma_data
from sde.data.base import SPLITS
from sde.devices import compute_repeatably
from sde.distributed import (
    is_sharded,
    least,
    on_main,
    part_of,
    world,
)
from sde.errors import Fault, UserError, check_flag
from sde.runs import build_denoiser, ema_options
from sde.training.batch_size import largest_batch
from sde.training.batches import Batches
from sde.training.ema import Averages
from sde.training.loop import Trainer
from sde.training.options import TrainingOptions
from sde.training.parallel import shard


def prepared(config: Mapping[str, Any]) -> Dataset:
    """The data set, the files that it needs made by rank 0 before other processes look for them."""
    made: list[Dataset] = []

    def make() -> None:
        dataset: Dataset = build(config["data"], "data")
        for name in SPLITS:
            dataset.split(name)
        made.append(dataset)

    on_main(make)
    if not made:
        make()
    return made[0]


def make_trainer(config: dict[str, Any], dataset: Dataset, device: torch.device) -> Trainer:
    """All that is trained, as `config` says, which gets the numbers that "auto" stands for.

    Raises:
        UserError: a value that cannot be, or parts that do not fit together.
    """
    check_flag("conditional", config["conditional"])
    measure_auto(config, dataset)
    automatic = config["training"]["batch_size"] == "auto"
    if automatic:
        config["training"] = {**config["training"], "batch_size": config["training"].get("accumulation", 1)}
    options: TrainingOptions = build(config["training"], "training")
    if options.precision == "fp16" and options.parallel == "fsdp" and world().size > 1:
        raise UserError("training.precision=fp16 scales a loss, which training.parallel=fsdp cannot do: take bf16")
    compute_repeatably(options.deterministic)
    averages = ema_options(config["ema"])
    loss = build(config["loss"], "loss")
    torch.manual_seed(options.seed)
    in_parts = options.parallel == "fsdp" and world().size > 1
    if automatic and in_parts:
        raise UserError("training.batch_size=auto cannot tell what fits with training.parallel=fsdp: give a number")
    denoiser = build_denoiser(config, dataset.info)
    denoiser.to("cpu" if in_parts else device, options.dtype)  # parts go to the device one after the other
    if automatic:
        options = with_largest_batch(config, options, denoiser, loss, dataset, device, len(averages.names))
    network = denoiser.network
    if len(dataset.info.shape) == 3 and not in_parts:  # FSDP2 takes contiguous weights alone
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kept = Averages(network, averages)
    if in_parts:
        for each in (network, *kept.networks.values()):
            shard(each, device)
    parts = options.parts(world().size)
    own = part_of(parts, world().rank, world().size)
    rows = range(
        part_of(options.batch_size, own.start, parts).start, part_of(options.batch_size, own.stop - 1, parts).stop
    )
    return Trainer(
        denoiser=denoiser,
        averages=kept,
        loss=loss,
        optimizer=make_optimizer(config["optimizer"], network),
        options=options,
        batches=Batches(
            dataset,
            options.batch_size,
            options.seed,
            device,
            config["conditional"],
            options.dequantize,
            options.dtype,
            rows,
            options.workers,
        ),
        schedule=build(config["schedule"], "schedule"),
    )


def make_optimizer(node: Mapping[str, Any], network: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a network's weights.

    Raises:
        UserError: for options that PyTorch refuses, or an optimizer that does not go with this training.
    """
    try:
        optimizer: torch.optim.Optimizer = build(node, "optimizer", params=network.parameters())
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"optimizer._target_={node['_target_']}: {reason}: change its options, or take adam") from error
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        needs = "the loss again within a step" if isinstance(optimizer, torch.optim.LBFGS) else "sparse gradients"
        raise UserError(f"optimizer._target_={node['_target_']} needs {needs}, which there is not: take adam")
    if isinstance(optimizer, torch.optim.Adafactor) and is_sharded(network):
        raise UserError("optimizer._target_=torch.optim.Adafactor cannot work on training.parallel=fsdp: take adam")
    return optimizer


def with_largest_batch(
    config: dict[str, Any],
    options: TrainingOptions,
    denoiser: Any,
    loss: Any,
    dataset: Dataset,
    device: torch.device,
    averages: int,
) -> TrainingOptions:
    """The options with the largest batch that fits, which `config` gets too."""
    examples = len(dataset.split("train"))
    found = least(largest_batch(denoiser, loss, dataset.info, device, options.precision, examples, averages))
    size = max(1, min(found * world().size, examples // options.accumulation)) * options.accumulation
    config["training"] = {**config["training"], "batch_size": size}
    return build(config["training"], "training")


def measure_auto(config: dict[str, Any], dataset: Dataset) -> None:
    """Replace `sigma_data: auto` by the standard deviation of the training data."""
    for group in ("parameterization", "loss"):
        if config[group].get("sigma_data") == "auto":
            config[group]["sigma_data"] = round(measure_sigma_data(dataset.split("train"), dataset.info), 4)


@contextlib.contextmanager
def memory_explained(config: Mapping[str, Any]) -> Iterator[None]:
    """Turn a lack of memory into a sentence that says what to try.

    Raises:
        Fault: in place of what PyTorch raises.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Fault(out_of_memory(config)) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise Fault(out_of_memory(config)) from error


def out_of_memory(config: Mapping[str, Any]) -> str:
    """What to say when memory runs out."""
    options = config["training"]
    size, parts = options["batch_size"], options.get("accumulation", 1)
    return (
        f"out of memory with training.batch_size={size} and training.accumulation={parts}: try "
        f"training.accumulation={2 * parts}, which is the same training in less memory, model.recompute_levels=1 where "
        "the model has it, training.precision=bf16, a smaller batch (auto is the largest that fits), or more processes"
    )
