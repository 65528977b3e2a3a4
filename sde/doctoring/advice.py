"""Advice: small rules, each with a condition and one sentence that says what to change. A rule that does not apply says
nothing.

Thresholds are generous: a rule speaks where something is wasted or unusual, not where tastes differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sde.doctoring.findings import Findings
from sde.doctoring.report import count, duration, percent, size

Rule = Callable[[Findings], str | None]

TOLERANCE = 0.1  # relative, of sigma_data
SIGMA_MAX = (0.3, 3.0)  # largest noise level, over the largest distance
SIGNAL_LEFT = 0.03  # of the noise at T; that of the schedules that arXiv 2305.08891 calls flawed is above it
GRAY_LEVELS = 5.0  # of noise where samplers stop
VECTOR_NOISE = 0.1  # the same for vectors, over sigma_data
VECTOR_SCALE = (0.05, 3.0)  # standard deviation of vectors
FEW_EPOCHS, MANY_EPOCHS = 2.0, 20_000.0
LOADING = 0.1  # of a step
PREVIEWS = 0.1  # of the time
CHECKPOINT_SECONDS = 3600.0
SUSPICIOUS = 0.01  # share of examples
SMALL_SHM = 2**30
BUSY = 0.5  # load, over the cores

# Learning rates of Adam that have been published for a kind of network, a factor of 5 or 10 wider on either side
LEARNING_RATES = {"EDM2": (1e-3, 1e-1), "DiT": (1e-5, 1e-3), "MLP": (2e-5, 2e-2)}
OTHER_RATES = (1e-5, 5e-3)


def advise(found: Findings) -> list[str]:
    """What to change, the most important first; empty when all is well."""
    return [sentence for rule in RULES if (sentence := rule(found)) is not None]


# The data


def bad_values(found: Findings) -> str | None:
    """Training on values that are not numbers fails."""
    share = found.data.not_finite
    if not share:
        return None
    return f"{percent(share)} of the examples have values that are not finite: clean data={found.data.name}."


def odd_pictures(found: Findings) -> str | None:
    """Repetitions and empty pictures are learned like any other."""
    data = found.data
    odd = [(data.repeated, "are repetitions of others"), (data.constant, "have the same value everywhere")]
    said = [f"{percent(share)} {what}" for share, what in odd if share > SUSPICIOUS]
    return f"{' and '.join(said)}, of the examples of data={data.name}: look at them." if said else None


def data_range(found: Findings) -> str | None:
    """Networks and default noise levels are made for data around 0 with a standard deviation of 0.5 or so."""
    data = found.data
    if data.kind == "pixels":
        if abs(data.low + data.high) > 0.5 * (data.high - data.low) and data.low >= 0:
            return (
                f"The network sees pixels from {data.low:.3g} to {data.high:.3g}, and expects them around 0: "
                "use a data set whose pixels become -1 to 1."
            )
        return None
    low, high = VECTOR_SCALE
    if not low <= data.std <= high and math.isfinite(data.std):
        return (
            f"The vectors have a standard deviation of {data.std:.3g}, and noise levels and networks are made for "
            "about 0.5: scale the data."
        )
    return None


def unused_labels(found: Findings) -> str | None:
    """Labels make the task easier."""
    if found.config["conditional"] or found.data.classes < 2:
        return None
    classes = count(found.data.classes, "class", "classes")
    return (
        f"The data has {classes} and the network is not told which: conditional=true makes samples of a wanted class, "
        "and usually better ones."
    )


def epochs(found: Findings) -> str | None:
    """How often each example is seen."""
    seen = found.options.steps * found.options.batch_size / found.data.train
    if seen < FEW_EPOCHS:
        return f"Each example is seen {seen:.2g} times in training.steps={found.options.steps}: train longer."
    if seen > MANY_EPOCHS:
        return (
            f"Each example is seen {seen:,.0f} times in training.steps={found.options.steps}, so the network may learn "
            "them by heart: take more data, or fewer steps."
        )
    return None


# Noise levels


def sigma_max(found: Findings) -> str | None:
    """arXiv 2006.09011, technique 1."""
    noise, (low, high) = found.noise, SIGMA_MAX
    if not noise.keeps_scale or low <= noise.to_distance <= high or not found.data.distance:
        return None
    what = "leaves the data visible in the noise" if noise.to_distance < low else "spends steps where there is no data"
    return (
        f"{noise.option}={noise.largest:.4g} is {noise.to_distance:.2g} times the largest distance of two examples, "
        f"and {what}: {noise.option}={round_number(found.data.distance):g} (arXiv 2006.09011, technique 1)."
    )


def signal_left(found: Findings) -> str | None:
    """Samples start from a prior that has nothing of the data."""
    noise = found.noise
    if noise.keeps_scale or not noise.signal_left > SIGNAL_LEFT:
        return None
    return (
        f"At T the data still has {percent(noise.signal_left)} of the noise's scale, and samples start without it: let "
        "the process go on to more noise (sde.beta_max, or sde.T)."
    )


def smallest_noise(found: Findings) -> str | None:
    """What is left when samplers stop hides details."""
    noise, data = found.noise, found.data
    unit = data.gray_level if data.gray_level is not None else data.sigma_data
    limit = GRAY_LEVELS if data.gray_level is not None else VECTOR_NOISE
    if not unit or not noise.smallest > limit * unit:
        return None
    name = "gray levels" if data.gray_level is not None else "of sigma_data"
    option = "sde.sigma_min" if noise.option == "sde.sigma_max" else "sde.t_min_sampling"
    return (
        f"Samplers stop at a noise level of {noise.smallest:.3g}, {noise.smallest / unit:.2g} {name}, so details are "
        f"lost: lower {option}."
    )


def sigma_data(found: Findings) -> str | None:
    """The scale that EDM's preconditioning and weighting assume."""
    measured = found.data.sigma_data
    groups = [("parameterization", True), ("loss", found.config["loss"].get("weighting") == "edm")]
    for group, used in groups:
        value = found.config[group].get("sigma_data")
        if used and isinstance(value, int | float) and measured and abs(value / measured - 1) > TOLERANCE:
            return (
                f"{group}.sigma_data={value:g}, and the data's is {measured:.4g}: {group}.sigma_data=auto takes what "
                "is measured."
            )
    return None


# The network on the device


def memory(found: Findings) -> str | None:
    """Whether a step fits."""
    model, options = found.model, found.options
    if model.fits or model.free is None:
        return None
    ways = []
    if model.fitting is not None:
        ways.append(f"training.accumulation={model.fitting}")
    if model.recompute is not None:
        ways.append(f"model.recompute_levels={model.recompute}")
    if model.largest:
        fitting = model.largest * options.parts(found.machine.processes)
        ways.append(f"training.batch_size={fitting}")
    advice = " or ".join(ways) or "take a smaller network, or a larger device"
    return (
        f"{count(model.at_once, 'example')} at a time need about {size(model.memory)} and {size(model.free)} are free: "
        f"{advice}."
    )


def idle_gpu(found: Findings) -> str | None:
    """A GPU that is not used."""
    if found.device != "cpu" or not found.machine.gpus:
        return None
    return f"There is a GPU ({found.machine.gpus[0].name}) and training.device=cpu: training.device=auto uses it."


def precision(found: Findings) -> str | None:
    """bfloat16 where the device has units for it."""
    gpus = found.machine.gpus
    units = found.machine.bf16 if found.device == "cpu" else bool(gpus) and gpus[0].bf16
    if found.options.precision != "fp32" or not units:
        return None
    return "The device has units for bfloat16: training.precision=bf16 is faster and takes less memory."


def compilation(found: Findings) -> str | None:
    """torch.compile pays on a GPU."""
    if found.device != "cuda" or found.options.compile is not False:
        return None
    return "training.compile=auto compiles the network, which pays on a GPU after the first minute or so."


def threads(found: Findings) -> str | None:
    """One thread for each core, shared among the processes here."""
    machine = found.machine
    fair = max(1, int(machine.cores / machine.processes_here))
    if found.device != "cpu" or machine.threads == fair:
        return None
    asked = machine.threads_asked is not None
    if machine.threads > fair:
        return f"{machine.threads} threads share {fair} usable cores and slow each other down: OMP_NUM_THREADS={fair}."
    if asked or machine.threads < fair / 2:
        why = f" (OMP_NUM_THREADS={machine.threads_asked})" if asked else ""
        return f"Training would use {machine.threads} of {fair} usable cores{why}: OMP_NUM_THREADS={fair}."
    return None


def busy(found: Findings) -> str | None:
    """Others at work make timings worse than they would be."""
    load, there = found.machine.load, found.machine.cores_there
    if load is None or load <= BUSY * there:
        return None
    return (
        f"The machine's load was {load:.2g} before this began, on {count(there, 'core')}: with less other work "
        "training may be faster than the times above."
    )


def loading(found: Findings) -> str | None:
    """Training that waits for its data."""
    speed = found.speed
    if speed is None or speed.loading <= LOADING * speed.step:
        return None
    return (
        f"Reading the data takes {duration(speed.loading)} of a step's {duration(speed.step)}: keep it on a faster "
        "disk or in memory, or take larger steps."
    )


# The plan


def average_length(found: Findings) -> str | None:
    """An average that is longer than the run."""
    decays, steps = found.ema.decays, found.options.steps
    if not decays or 1 / (1 - decays[0]) <= steps:
        return None
    decay, fitting = decays[0], 1 - 10 / max(steps, 20)
    if found.ema.warmup:
        effect = f"its warm-up, an average over about step / 9, rules all of training.steps={steps}"
    else:
        effect = f"{percent(decay**steps)} of it will be the weights of the beginning"
    return f"ema.decay={decay:g} averages over {1 / (1 - decay):,.0f} steps: {effect}; ema.decay={fitting:.4g} fits."


def warmup(found: Findings) -> str | None:
    """A learning rate that never gets there."""
    steps, rising = found.options.steps, found.options.warmup
    if rising < steps:
        return None
    return (
        f"training.warmup={rising} is not over when training ends at training.steps={steps}: "
        f"training.warmup={steps // 20}."
    )


def learning_rate(found: Findings) -> str | None:
    """Learning rates far from those published for such networks."""
    node = found.config["optimizer"]
    lr = node.get("lr")
    if not isinstance(lr, int | float) or "Adam" not in str(node.get("_target_")):
        return None
    low, high = LEARNING_RATES.get(found.model.name, OTHER_RATES)
    if low <= lr <= high:
        return None
    side = "low" if lr < low else "high"
    return f"optimizer.lr={lr:g} is unusually {side} for {found.model.name}: {low:g} to {high:g} is usual."


def shared_memory(found: Findings) -> str | None:
    """Worker processes hand batches over in shared memory, of which containers have 64 MiB unless told otherwise."""
    there, workers = found.machine.shared_memory, found.options.workers
    if there is None or there >= SMALL_SHM or not workers or (workers == "auto" and found.device == "cpu"):
        return None
    return (
        f"/dev/shm has {size(there)}, through which training.workers={workers} hand over batches: give the container "
        "more (docker run --shm-size=2g), or training.workers=0."
    )


def rare_checkpoints(found: Findings) -> str | None:
    """Work that an interruption would cost."""
    speed, every = found.speed, found.options.checkpoint_every
    if speed is None or every * speed.step <= CHECKPOINT_SECONDS or every == 1:
        return None
    apart = min(every, found.options.steps) * speed.step
    if apart <= CHECKPOINT_SECONDS:
        return None
    fitting = max(1, int(round_number(CHECKPOINT_SECONDS / 2 / speed.step)))
    return f"Checkpoints are {duration(apart)} apart: training.checkpoint_every={fitting} loses less when interrupted."


def costly_previews(found: Findings) -> str | None:
    """Pictures on the way that cost more than they are worth."""
    speed, every = found.speed, found.options.preview_every
    if speed is None or not every or not speed.previews:
        return None
    share = speed.previews * speed.preview / (speed.training + speed.previews * speed.preview)
    if share <= PREVIEWS:
        return None
    return (
        f"Previews take {duration(speed.preview)} each and {percent(share)} of the time: raise training.preview_every, "
        "or lower preview_steps or training.preview_samples."
    )


def disk(found: Findings) -> str | None:
    """Checkpoints that do not fit."""
    speed, free = found.speed, found.machine.disk_free
    if speed is None or speed.checkpoint * speed.checkpoints <= free:
        return None
    keep = max(1, free // speed.checkpoint - 1)
    return (
        f"{speed.checkpoints} checkpoints of {size(speed.checkpoint)} do not fit into the {size(free)} that are free: "
        f"training.keep={keep}, or another hydra.run.dir."
    )


def wandb_login(found: Findings) -> str | None:
    """Weights & Biases without an account."""
    node = found.config["logger"]
    if "WandB" not in str(node.get("_target_")) or found.machine.wandb_login or node.get("mode") == "offline":
        return None
    return "logger=wandb finds no API key and records offline: wandb login, or set WANDB_API_KEY."


RULES: tuple[Rule, ...] = (
    memory,
    bad_values,
    idle_gpu,
    disk,
    sigma_max,
    signal_left,
    smallest_noise,
    sigma_data,
    data_range,
    precision,
    compilation,
    threads,
    busy,
    loading,
    warmup,
    learning_rate,
    epochs,
    average_length,
    shared_memory,
    rare_checkpoints,
    costly_previews,
    odd_pictures,
    unused_labels,
    wandb_login,
)


def round_number(x: float) -> float:
    """`x` to two digits."""
    return float(f"{x:.2g}")
