"""`python -m sde.summary`: what a network costs, before it is trained."""

from __future__ import annotations

from typing import Any

from sde.cli import run_command
from sde.config import build
from sde.errors import UserError
from sde.models.base import check_count, check_counts
from sde.models.summary import summarize


def summary(config: dict[str, Any]) -> None:
    """Print parameters, operations and memory of the network that `config` describes."""
    shape = check_counts("shape", config["shape"])
    num_classes = check_count("num_classes", config["num_classes"], at_least=0)
    batch_size = check_count("batch_size", config["batch_size"])
    if config["model"].get("_target_") is None:
        raise UserError("model= names no network: choose one, such as model=ncsnpp")
    network = build(config["model"], "model", shape=shape, num_classes=num_classes)
    costs = summarize(network)
    print(f"{type(network).__name__} for examples of shape {shape}: {costs}")
    print(f"{'batch':>8} {'training, GiB':>14}   float32, Adam and averaged weights included")
    for size in dict.fromkeys((1, 8, batch_size, 4 * batch_size)):
        print(f"{size:8} {costs.training_memory(size) / 2**30:14.2f}")


def main() -> None:
    """Entry point of the command line."""
    run_command("summary", summary)


if __name__ == "__main__":
    main()
