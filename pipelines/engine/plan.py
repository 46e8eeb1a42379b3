"""What a pre-training run would cost, said before it is started: the table and the numbers of `pretrain_ar --plan`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ar_model.attention import set_backend
from ar_model.attention_trial import CANNOT_RUN, reason
from ar_model.backends import BACKENDS
from ar_model.costs import Build, Cost, cost_of
from ar_model.objectives import Objective
from ar_model.transformer import recompute_activations
from data.cache import TokenCache
from data.loading import blocks_of
from data.sources import hold_out
from data.text import size, table
from pipelines.engine.device import check_compiler, device_name, matrix_peak
from pipelines.engine.training import make_optimizer, plan_parts
from pipelines.settings.training import Training

UTILISATION = 0.5
"""Share of the matrix-product peak at which the time is told."""
_TRACED = ("plain", "sdpa", "reference")
"""Kernels that are plain PyTorch; the others are as fused as sdpa, and counted as it."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    make: Callable[[], Objective]
    attention: str
    """Kernel, or `auto`."""
    recompute: bool
    compiled: bool
    """The trace is never compiled."""


@dataclass(frozen=True)
class Validation:
    """What is validated at a time: clips at the most, and how many of them in a batch."""

    most: int
    batch: int


@dataclass
class _Facts:
    """What is known of the model when it has been traced."""

    objective: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


def plan(
    accelerator: Accelerator, config: Training, cache: TokenCache, model: Model, validation: Validation
) -> dict[str, Any]:
    """Trace a step and a validation of the run, print the table, return the numbers. Bytes are of each process.

    Raises:
        ValueError: for what the run itself would refuse.
    """
    world, bf16, sharded = accelerator.num_processes, accelerator.mixed_precision == "bf16", accelerator.is_fsdp2
    train, held_out = hold_out(cache.videos)
    share = plan_parts(accelerator, config, len(train), blocks_of(cache, train)).batch_size // world
    kernel = _kernel(model.attention, accelerator.device, bf16)
    if model.compiled:
        check_compiler(accelerator.device)

    def make() -> Objective:
        objective = model.make()
        set_backend(objective, kernel if kernel in _TRACED else "sdpa")
        if model.recompute:
            recompute_activations(objective)
        return objective

    facts = _Facts()
    step, parts = cost_of(_training(make, config, cache, share, bf16, facts)), min(config.accumulate, 2)
    flop_per_step = step.flop * config.accumulate // parts * world
    clips = min(len(held_out or train), validation.most)
    batch = min(validation.batch, -(-clips // world))
    validating = cost_of(_validation(make, cache, batch, bf16))
    validations = (config.steps - 1) // config.validate_every + 1
    flop = config.steps * flop_per_step + validations * validating.flop * clips // batch
    libraries = psutil.Process().memory_info().rss if accelerator.device.type == "cpu" else None
    peak = matrix_peak(accelerator.device, torch.bfloat16 if bf16 else torch.float32) * world

    numbers = {
        "plan": True,
        "objective": facts.objective,
        "cache": cache.address,
        "device": device_name(accelerator.device),
        "processes": world,
        "sharded": sharded,
        "precision": "bf16" if bf16 else "fp32",
        "attention": kernel,
        "parameters": facts.parameters,
        "tokens": facts.tokens,
        "flop_per_step": flop_per_step,
        "memory": _memory(step, validating, world, sharded),
        "libraries": libraries,
        "videos": {"train": len(train), "held_out": len(held_out)},
        "validations": validations,
        "steps": config.steps,
        "epochs": round(config.steps * config.batch_size / len(train), 3),
        "cache_bytes": sum(shard.bytes for shard in cache.shards),
        "flop": flop,
        "matrix_peak": round(peak),
        "utilisation": UTILISATION,
        "seconds": round(flop / peak / UTILISATION, 1),
    }
    if accelerator.is_main_process:
        print(table(None, _rows(numbers, config, model)))
    accelerator.wait_for_everyone()
    return numbers


def _kernel(wanted: str, device: torch.device, bf16: bool) -> str:
    """The attention kernel that is planned with; a wanted one must run here."""
    if wanted == "auto":
        return "plain" if device.type == "cpu" else "sdpa"
    q = torch.zeros(1, 1, 16, 32, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    try:
        BACKENDS[wanted](q, q, q, None)
    except CANNOT_RUN as error:
        raise ValueError(f"--attention {wanted} does not run here: {reason(error)}") from None
    return wanted


def _training(
    make: Callable[[], Objective], config: Training, cache: TokenCache, clips: int, bf16: bool, facts: _Facts
) -> Build:
    """A step as pipelines/training.py does it, of at most two of its parts: further ones cost the same again."""

    def build() -> tuple[nn.Module, Callable[[], None]]:
        objective = make().train()
        _look(objective, facts)
        optimizer = make_optimizer(objective, config)

        def step() -> None:
            for _ in range(min(config.accumulate, 2)):
                loss = _forward(objective, cache, clips, bf16)
                (loss / config.accumulate).backward()
            nn.utils.clip_grad_norm_(objective.parameters(), config.clip_gradient)
            optimizer.step()
            optimizer.zero_grad()

        return objective, step

    return build


def _validation(make: Callable[[], Objective], cache: TokenCache, clips: int, bf16: bool) -> Build:
    def build() -> tuple[nn.Module, Callable[[], None]]:
        objective = make().eval()

        def step() -> None:
            with torch.no_grad():
                _forward(objective, cache, clips, bf16)

        return objective, step

    return build


def _forward(objective: Objective, cache: TokenCache, clips: int, bf16: bool) -> Tensor:
    """The loss of a batch of the shapes and types that TokenDataset gives."""
    codes_BTHW = torch.zeros(clips, *cache.codes_shape, dtype=torch.long)
    batch = {"codes_BTHW": codes_BTHW, "seed_B": torch.zeros(clips, dtype=torch.long)}
    if objective.needs_pixels:
        side = cache.clip.size
        batch["pixels_BTHWC"] = torch.zeros(clips, cache.clip.frames, side, side, 3, dtype=torch.uint8)
    if objective.needs_pairs and objective.training:
        batch["pair_BTHW"] = torch.zeros_like(codes_BTHW)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return objective(batch)["loss"]


def _look(objective: Objective, facts: _Facts) -> None:
    """Note the parameters, and how many tokens of a clip the encoder sees and the target predicts when it is run."""
    facts.objective = type(objective).__name__
    for name in ("encoder", "decoder"):
        facts.parameters[name] = sum(p.numel() for p in getattr(objective, name, nn.Module()).parameters())
    total = sum(p.numel() for p in objective.parameters())
    facts.parameters |= {"rest": total - sum(facts.parameters.values()), "total": total}

    def watch(part: nn.Module, name: str) -> None:
        part.register_forward_pre_hook(lambda _, inputs: facts.tokens.update({name: inputs[0].shape[1]}))

    watch(getattr(objective, "encoder", nn.Module()), "seen")
    watch(getattr(objective, "target", nn.Module()), "predicted")


def _memory(step: Cost, validating: Cost, world: int, sharded: bool) -> dict[str, int]:
    """FSDP gives each process its share of what lasts; DistributedDataParallel has a copy of the gradients."""
    shares = world if sharded else 1
    buckets = step.gradients if world > 1 and not sharded else 0
    return {
        "weights": step.weights // shares,
        "gradients": step.gradients // shares,
        "buckets": buckets,
        "optimizer": step.state // shares,
        "others": step.others,
        "peak": step.others + (step.peak - step.others) // shares + buckets,
        "validation": validating.others + (step.weights + step.state) // shares + buckets,
    }


def _rows(numbers: dict[str, Any], config: Training, model: Model) -> list[list[str]]:
    """The table for people."""
    memory, parameters, precision = numbers["memory"], numbers["parameters"], numbers["precision"]
    videos, steps = numbers["videos"], numbers["steps"]
    processes = f" by {numbers['processes']} processes" if numbers["processes"] > 1 else ""
    split = f", in {config.accumulate} parts one after another" if config.accumulate > 1 else ""
    kernel = numbers["attention"] if numbers["attention"] in _TRACED else f"{numbers['attention']}, counted as sdpa"
    notes = "; without --compile, which changes it" if model.compiled else ""
    each = " of each process" if processes else ""
    each += " under FSDP" if numbers["sharded"] else ""
    rows = [
        ["parameters", _short(parameters["total"]), numbers["objective"]],
        *([f"  {name}", _short(parameters[name]), ""] for name in ("encoder", "decoder", "rest")),
        *([f"tokens {name}", f"{count:,}", "of a clip, in a step"] for name, count in numbers["tokens"].items()),
        [
            "arithmetic of a step",
            f"{_short(numbers['flop_per_step'])}FLOP",
            f"{config.batch_size} clips{processes}{split}, forward and backward"
            f"{', with what is recomputed' if model.recompute else ''}; attention {kernel}{notes}",
        ],
        ["memory of a step", size(memory["peak"]), f"{precision}, at the peak{each}; gradients come as activations go"],
        ["  weights", size(memory["weights"]), ""],
        ["  gradients", size(memory["gradients"]), ""],
        ["  buckets", size(memory["buckets"]), "in which gradients travel between processes"],
        ["  optimizer", size(memory["optimizer"]), ""],
        ["  all else", size(memory["others"]), f"activations, temporaries; at their peak{notes}"],
        ["  besides", size(numbers["libraries"] or 0), "Python and its libraries, as they are in this process"],
        ["memory of a validation", size(memory["validation"]), f"{numbers['validations']} times in the run"],
        [
            "passes over the data",
            f"{numbers['epochs']:,.1f}",
            f"{steps:,} steps on {videos['train']:,} videos; {videos['held_out']:,} are held out",
        ],
        ["cache", size(numbers["cache_bytes"]), numbers["cache"]],
        ["arithmetic of the run", f"{_short(numbers['flop'])}FLOP", "with validations"],
        [
            "fastest product",
            f"{_short(numbers['matrix_peak'])}FLOP/s",
            f"of {precision} matrices, measured{processes}: {numbers['device']}",
        ],
        ["time of the run", _span(numbers["seconds"]), f"at {100 * UTILISATION:.0f} % of that"],
    ]
    absent = {"  buckets": not memory["buckets"], "  besides": numbers["libraries"] is None}
    return [row for row in rows if not absent.get(row[0])]


def _short(count: float) -> str:
    """1,234,567 is `1.23 M`."""
    units = iter(("", "k", "M", "G", "T", "P", "E"))
    while count >= 999.5:
        count /= 1000
        next(units)
    return f"{count:.3g} {next(units)}"


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
