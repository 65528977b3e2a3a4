"""What was found out, as text for 100 columns: sections of lines, a name and a value with its unit each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import torch

from sde.devices import computes_in
from sde.doctoring.data import DataFacts
from sde.doctoring.machine import Machine
from sde.doctoring.model import ModelFacts
from sde.doctoring.noise import NoiseFacts
from sde.doctoring.speed import PICTURES, Speed

WIDTH = 100
_NAME = 17

Line = tuple[str, str]


def section(title: str, lines: Iterable[Line]) -> str:
    """A title, and its lines aligned below it."""
    indent = " " * (_NAME + 2)
    wrapped = [
        textwrap.fill(
            text, WIDTH, initial_indent=f"  {name:<{_NAME}}", subsequent_indent=indent, break_on_hyphens=False
        )
        for name, text in lines
    ]
    return "\n".join([title, *wrapped])


def numbered(title: str, sentences: Iterable[str]) -> str:
    """A title, and sentences with their numbers below it."""
    wrapped = [
        textwrap.fill(text, WIDTH, initial_indent=f"  {i:>2}. ", subsequent_indent=" " * 6, break_on_hyphens=False)
        for i, text in enumerate(sentences, 1)
    ]
    return "\n".join([title, *wrapped])


# Units


def size(n: float | None) -> str:
    """Bytes in a unit that leaves few digits."""
    if n is None:
        return "unknown"
    for unit, bytes_ in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if abs(n) >= 0.995 * bytes_:
            return f"{n / bytes_:.3g} {unit}" if n < 1000 * bytes_ else f"{n / bytes_:.0f} {unit}"
    return f"{n / 1024:.3g} KiB"


def duration(seconds: float) -> str:
    """Seconds in the units in which one would say it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    if seconds < 48 * 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    if seconds < 730 * 86400:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 86400 / 365.25:.3g} years"


def count(n: int, one: str, many: str | None = None) -> str:
    """A number of things: 1 example, 2,201 examples."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.3g} %" if share >= 1e-4 or share == 0 else "less than 0.01 %"


def operations(n: float) -> str:
    """Floating-point operations."""
    for unit, number in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if n >= 0.995 * number:
            return f"{n / number:.3g} {unit}"
    return f"{n / 1e6:.3g} MFLOP"


# Sections


def machine_lines(machine: Machine, device: str, precision: str) -> list[Line]:
    """What there is, and what of it training would use."""
    asked = f" (OMP_NUM_THREADS={machine.threads_asked})" if machine.threads_asked else ""
    load = "" if machine.load is None else f", load {machine.load:.3g}"
    lines = [
        ("system", f"{machine.system}; Python {machine.python}"),
        ("cpu", f"{machine.cpu}; {machine.cores:.3g} of {count(machine.cores_there, 'logical core')} usable{load}"),
        ("threads", f"{machine.threads}{asked}"),
        ("memory", f"{size(machine.memory_free)} free of {size(machine.memory)}"),
    ]
    for i, gpu in enumerate(machine.gpus):
        units = "bfloat16 and TF32" if gpu.bf16 else "neither bfloat16 nor TF32"
        capability = ".".join(map(str, gpu.capability))
        lines.append(
            (f"gpu {i}", f"{gpu.name}, {size(gpu.free)} free of {size(gpu.total)}; capability {capability}, {units}")
        )
    cuda = f"CUDA {machine.cuda}, cuDNN {machine.cudnn}" if machine.cuda else "no CUDA in this build of PyTorch"
    lines += [
        ("cuda", cuda if machine.gpus or not machine.cuda else f"{cuda}; no GPU is visible"),
        ("device", f"{device}, training.precision={precision} computes in {computed(device, precision)}"),
        ("optimizers", f"fused on {' and '.join(machine.fused)}" if machine.fused else "none are fused"),
        ("disk", f"{size(machine.disk_free)} free for {machine.disk}/"),
    ]
    if machine.shared_memory is not None:
        lines.append(("/dev/shm", size(machine.shared_memory)))
    if machine.processes > 1:
        lines.append(("torchrun", f"process {machine.rank} of {machine.processes}, {machine.processes_here} here"))
    lines.append(("packages", ", ".join(f"{name} {found}" for name, found in machine.packages.items())))
    if machine.missing:
        missing = ", ".join(f"{name} (pip install 'sde[{extra}]')" for name, extra in machine.missing.items())
        lines.append(("not installed", missing))
    return lines


def computed(device: str, precision: str) -> str:
    """What a device computes in when asked for a precision."""
    return computes_in(torch.device(device), precision)


def data_lines(data: DataFacts) -> list[Line]:
    """What the training data is like."""
    of = f"measured on {count(data.sample, 'example')}" if data.sample < data.train else "measured on all"
    shape = "x".join(map(str, data.shape))
    odd = [
        f"{percent(share)} {what}"
        for share, what in (
            (data.constant, "of one value throughout"),
            (data.repeated, "repeated byte for byte"),
            (data.not_finite, "with values that are not finite"),
        )
        if share
    ]
    classes = count(data.classes, "class", "classes") if data.classes else "no classes"
    everything = data.distance_examples == data.train
    distance = "of all pairs" if everything else f"of {count(data.distance_examples, 'example')}, a lower bound"
    sigma = "" if data.sigma_examples == data.train else f", on {count(data.sigma_examples, 'example')}"
    return [
        ("source", f"{data.name}: {count(data.train, 'training example')}, {data.test:,} for tests"),
        ("example", f"{data.kind} {shape}, {classes}"),
        ("range", f"{data.low:.4g} to {data.high:.4g}, mean {data.mean:.4g}, deviation {data.std:.4g} ({of})"),
        ("odd examples", ", ".join(odd) or f"none: no repetitions, none of one value throughout ({of})"),
        ("sigma_data", f"{data.sigma_data:.4g}{sigma}"),
        ("largest distance", f"{data.distance:.4g} ({distance})"),
    ]


def noise_lines(noise: NoiseFacts, data: DataFacts) -> list[Line]:
    """The ends of the process, beside the data."""
    if noise.keeps_scale:
        end = f"noise level {noise.largest:.4g}, {noise.to_distance:.3g} times the largest distance"
    else:
        end = f"the signal is {percent(noise.signal_left)} of the noise"
    if data.gray_level is None:
        start = f"{noise.smallest / data.sigma_data:.3g} of sigma_data" if data.sigma_data else "no scale to compare"
    else:
        start = f"{noise.smallest / data.gray_level:.3g} gray levels"
    return [
        ("process", f"{noise.name}: noise levels {noise.smallest_trained:.3g} to {noise.largest:.4g} in training"),
        ("at the noise end", f"{end}; KL to the prior {noise.prior_bits:.3g} bits per dimension"),
        ("at the data end", f"samplers stop at noise level {noise.smallest:.3g}, {start}"),
    ]


def model_lines(model: ModelFacts) -> list[Line]:
    """What the network costs."""
    examples = count(model.at_once, "example")
    memory = f"{size(model.memory)} for {examples} at a time, by estimate"
    if model.free is None:
        room = "unknown"
    else:
        verdict = "fits" if model.fits else "does not fit"
        most = count(model.largest or 0, "example")
        room = f"{size(model.free)} free: {verdict}; at most {most} at a time"
    return [
        ("network", f"{model.name}, {model.parameters / 1e6:.4g} M parameters"),
        ("an evaluation", f"{operations(model.flops)} an example"),
        ("activations", f"{size(model.activations)} an example in training"),
        ("memory", memory),
        ("room", room),
    ]


def speed_lines(speed: Speed | None, machine: Machine) -> list[Line]:
    """How long training takes."""
    if speed is None and machine.processes > 1:
        return [("not measured", f"this is one of {machine.processes} processes: leave torchrun out to measure one")]
    if speed is None:
        return [("not measured", "not even one example of a step fits into the memory, by estimate")]
    low, high = speed.timing.quartiles
    n = len(speed.timing.seconds)
    how = f"median of {n}, half of them within {duration(low)} to {duration(high)}" if n > 1 else "1 step measured"
    if speed.timed < speed.batch_size:
        how += f", scaled from steps of {count(speed.timed, 'example')}, of {duration(speed.timing.median)}"
    if not speed.timing.warm:
        how += ", the first, which is slower than those that follow"
    elif speed.timing.first > max(10 * speed.timing.median, 1.0):  # a network that was compiled
        how += f"; the first took {duration(speed.timing.first)}"
    parts = f" in {speed.accumulation} parts" if speed.accumulation > 1 else ""
    rate = f"{operations(speed.rate)}/s"
    if speed.peak:
        rate += f", {percent(speed.rate / speed.peak)} of the device's peak"
    previews, kept = speed.previews * speed.preview, speed.checkpoint * speed.checkpoints
    whose = "of the process" if speed.device == "cpu" else "of the device"
    after = f", and {duration(previews)} for {count(speed.previews, 'preview')}" if previews >= 1 else ""
    return [
        ("step", f"{duration(speed.step)} for {count(speed.batch_size, 'example')}{parts} ({how})"),
        ("pictures", f"{speed.pictures:.4g} a second"),
        ("operations", f"{rate} (a step counted as three evaluations)"),
        ("data", f"{duration(speed.loading)} of a step, {percent(speed.loading / speed.step)}"),
        ("optimizer", f"{duration(speed.optimizer)} of a step with averages, {percent(speed.optimizer / speed.step)}"),
        (
            "sampling",
            f"{PICTURES} examples take {duration(speed.sampling(20))} with 20 evaluations, "
            f"{duration(speed.sampling(200))} with 200",
        ),
        ("memory", f"{size(speed.memory)} at the peak, {whose}, with {count(speed.at_once, 'example')} at a time"),
        ("training", f"{duration(speed.training)} for {count(speed.steps, 'step')}{after}"),
        ("checkpoints", f"{size(speed.checkpoint)} each, {size(kept)} at the most; {size(machine.disk_free)} free"),
    ]
