"""Estimated cost of a pre-training run before it starts: table and numbers of `pretrain_ar --plan`."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from ar_model.attention import set_backend
from ar_model.attention_trial import reason
from ar_model.backends import BACKENDS
from ar_model.costs import Cost, cost_of
from ar_model.objectives import Objective
from ar_model.transformer import recompute_activations
from data.cache import TokenCache
from data.loading import Batch, blocks_of
from data.sources import training_rows
from data.text import size, table
from pipelines.engine.code_spec import code_spec
from pipelines.engine.console import say
from pipelines.engine.device import check_compiler, device_name, matrix_peak
from pipelines.engine.step import SingleProcess, train_step
from pipelines.engine.training import make_optimizer, plan_parts
from pipelines.settings.pretrain_ar import Pretrain

UTILISATION = 0.5
"""Assumed share of the measured peak matmul throughput; determines the estimated wall time."""
_TRACED_KERNELS = ("plain", "sdpa", "reference")
"""Attention kernels of plain PyTorch operations, which can be traced. All other kernels are fused and are traced as sdpa."""
_TRACED_PARTS = 2
"""Maximum number of gradient-accumulation parts that are traced. Each further part costs the same as the second."""
TRACED_CLIPS = 256
"""Maximum number of clips in a traced part. The time of a trace grows with them, because some kernels work in tiles."""


def plan(
    accelerator: Accelerator, config: Pretrain, cache: TokenCache, *, validation_clips: int, validation_batch: int
) -> dict[str, Any]:
    """Trace one step and one validation batch, print a table of costs and return the numbers. Bytes are per process.

    Raises:
        ValueError: if the run would fail with the same error.
    """
    world, bf16, sharded = accelerator.num_processes, accelerator.mixed_precision == "bf16", accelerator.is_fsdp2
    train, held_out = training_rows(cache.videos, cache.address)
    share = plan_parts(accelerator, config, len(train), blocks_of(cache, train)).batch_size // world
    kernel = _kernel(config.attention, accelerator.device, bf16)
    if config.compile:
        check_compiler(accelerator.device)

    def make() -> Objective:
        objective = config.objective(code_spec(cache))
        set_backend(objective, kernel if kernel in _TRACED_KERNELS else "sdpa")
        if config.recompute:
            recompute_activations(objective)
        return objective

    facts: dict[str, Any] = {}
    backend = SingleProcess(torch.device("cpu"), bf16)
    step = _of_any_size(
        lambda clips: cost_of(lambda: _training(make().train(), config, cache, clips, backend, facts)), share
    )
    flop_per_step = step.flop * config.accumulate // min(config.accumulate, _TRACED_PARTS) * world
    clips = min(len(held_out or train), validation_clips)
    batch_size = min(validation_batch, -(-clips // world))
    validating = cost_of(lambda: _validation(make().eval(), cache, batch_size, backend))
    validations = (config.steps - 1) // config.validate_every + 1
    flop = config.steps * flop_per_step + validations * validating.flop * clips // batch_size
    libraries = psutil.Process().memory_info().rss if accelerator.device.type == "cpu" else None
    peak = matrix_peak(accelerator.device, torch.bfloat16 if bf16 else torch.float32) * world

    numbers = {
        "plan": True,
        **facts,
        "cache": cache.address,
        "device": device_name(accelerator.device),
        "processes": world,
        "sharded": sharded,
        "precision": "bf16" if bf16 else "fp32",
        "attention": kernel,
        "flop_per_step": flop_per_step,
        "extrapolated": share > TRACED_CLIPS,
        "memory": _memory(step, validating, world, sharded),
        "libraries": libraries,
        "memory_here": _memory_here(accelerator.device, world),
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
        print(table(None, _rows(numbers, config)))
    needed = max(numbers["memory"]["peak"], numbers["memory"]["validation"]) + (libraries or 0)
    if needed > numbers["memory_here"]:
        remedy = "lower --batch_size, or raise --accumulate, or set --recompute true"
        say(accelerator, f"does not fit: needs {size(needed)} of {size(numbers['memory_here'])}; {remedy}")
    accelerator.wait_for_everyone()
    return numbers


def _of_any_size(trace: Callable[[int], Cost], clips: int) -> Cost:
    """Return the cost of a part of any number of clips, extrapolated from smaller ones if it is too large to be traced.

    FLOPs are quadratic in the clips, because contrastive losses compare all pairs. Memory is continued as a line.
    """
    if clips <= TRACED_CLIPS:
        return trace(clips)
    sizes = (TRACED_CLIPS // 4, TRACED_CLIPS // 2, TRACED_CLIPS)
    costs = [trace(size) for size in sizes]
    memory = {
        field.name: round(_through(sizes[1:], [getattr(cost, field.name) for cost in costs[1:]], clips))
        for field in fields(Cost)
    }
    return replace(Cost(**memory), flop=round(_through(sizes, [cost.flop for cost in costs], clips)))


def _through(xs: Sequence[int], ys: Sequence[int], x: int) -> Fraction:
    """Return the value at x of the polynomial through some points (Lagrange's form), without rounding."""
    weights = [prod(Fraction(x - other, own - other) for other in xs if other != own) for own in xs]
    return Fraction(sum(weight * y for weight, y in zip(weights, ys, strict=True)))


def _kernel(requested: str, device: torch.device, bf16: bool) -> str:
    """Return the attention kernel of the plan. Raises ValueError if a kernel requested by name does not run on this device."""
    if requested == "auto":
        return "plain" if device.type == "cpu" else "sdpa"
    q = torch.zeros(1, 1, 16, 32, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    try:
        BACKENDS[requested](q, q, q, None)
    # The libraries of kernels raise many types of errors.
    except Exception as error:
        raise ValueError(f"--attention {requested} does not run here: {reason(error)}") from None
    return requested


def example_batch(cache: TokenCache, clips: int, *, pixels: bool, pairs: bool) -> Batch:
    """Return a batch of zeros with the keys, shapes and dtypes of `TokenDataset`; all slices are valid."""
    numbers_B = torch.zeros(clips, dtype=torch.int64)
    codes_BTHW = torch.zeros(clips, *cache.layout.shape, dtype=torch.int64)
    slices_B = torch.full_like(numbers_B, cache.layout.grid[0])
    batch = {"codes_BTHW": codes_BTHW, "slices_B": slices_B, "seed_B": numbers_B, "row_B": numbers_B.clone()}
    if pairs:
        batch |= {"pair_BTHW": codes_BTHW.clone(), "pair_slices_B": slices_B.clone()}
    if pixels:
        clip = cache.clip
        batch["pixels_BTHWC"] = torch.zeros(clips, clip.frames, clip.size, clip.size, 3, dtype=torch.uint8)
    return batch


def _training(
    objective: Objective, config: Pretrain, cache: TokenCache, clips: int, backend: SingleProcess, facts: dict[str, Any]
) -> tuple[nn.Module, Callable[[], object]]:
    """Return the objective and a function that runs a step of at most `_TRACED_PARTS` parts; add model facts to `facts`."""
    _collect_facts(objective, facts)
    optimizer = make_optimizer(objective, config)
    batch = partial(example_batch, cache, clips, pixels=objective.needs_pixels, pairs=objective.needs_pairs)
    parts, max_norm = config.accumulate, config.clip_gradient

    def step() -> None:
        batches = (batch() for _ in range(min(parts, _TRACED_PARTS)))
        train_step(backend, objective, optimizer, batches, accumulate=parts, clipped=[objective], max_norm=max_norm)

    return objective, step


def _validation(
    objective: Objective, cache: TokenCache, clips: int, backend: SingleProcess
) -> tuple[nn.Module, Callable[[], object]]:
    """Return the objective and a function that runs the forward pass of one validation batch."""

    def step() -> None:
        with torch.no_grad(), backend.autocast():
            objective(example_batch(cache, clips, pixels=objective.needs_pixels, pairs=False))

    return objective, step


def _memory_here(device: torch.device, world: int) -> int:
    """Return the bytes of memory that a process may use: of its GPU, or its share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // world


def _collect_facts(objective: Objective, facts: dict[str, Any]) -> None:
    """Add class name and parameter counts to `facts`, and register hooks that add the tokens per clip of a forward pass."""
    parameters = {"total": sum(p.numel() for p in objective.parameters())}
    for name in ("encoder", "decoder"):
        parameters[name] = sum(p.numel() for p in getattr(objective, name, nn.Module()).parameters())
    parameters["rest"] = parameters["total"] - parameters["encoder"] - parameters["decoder"]
    tokens: dict[str, int] = {}
    facts |= {"objective": type(objective).__name__, "parameters": parameters, "tokens": tokens}

    def record_length(name: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens[name] = inputs[0].shape[1]

    for part, name in (("encoder", "seen"), ("target", "predicted")):
        getattr(objective, part, nn.Module()).register_forward_pre_hook(partial(record_length, name))


def _memory(step: Cost, validating: Cost, world: int, sharded: bool) -> dict[str, int]:
    """Return the memory of a process in bytes, by use.

    FSDP divides weights, gradients and moments among the ranks. DistributedDataParallel keeps a copy of the gradients
    in its buckets.
    """
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


def _rows(numbers: dict[str, Any], config: Pretrain) -> list[list[str]]:
    """Format the numbers as rows of a table: name, value, note."""
    memory, parameters, precision = numbers["memory"], numbers["parameters"], numbers["precision"]
    kernel, videos = numbers["attention"], numbers["videos"]
    processes = f" on {numbers['processes']} processes" if numbers["processes"] > 1 else ""
    batch = f"{config.batch_size} clips{processes}"
    if config.accumulate > 1:
        batch += f", accumulated over {config.accumulate} parts"
    passes = "forward and backward" + (", including recomputation" if config.recompute else "")
    counted = "" if kernel in _TRACED_KERNELS else ", counted as sdpa"
    uncompiled = "; traced without --compile, so the run may differ" if config.compile else ""
    extrapolated = f"; extrapolated from parts of {TRACED_CLIPS} clips" if numbers["extrapolated"] else ""
    counted_work = f"{batch}, {passes}; attention {kernel}{counted}{uncompiled}{extrapolated}"
    peak = f"{precision}, peak" + (" per process" if processes else "") + (" with FSDP" if numbers["sharded"] else "")
    data = f"{numbers['steps']:,} steps on {videos['train']:,} videos; {videos['held_out']:,} are held out"
    measured_with = f"measured with {precision} matrices{processes}"
    rows = [["parameters", _short(parameters["total"]), numbers["objective"]]]
    rows += [[f"  {name}", _short(parameters[name]), ""] for name in ("encoder", "decoder", "rest")]
    rows += [[f"tokens {name}", f"{count:,}", "per clip in a step"] for name, count in numbers["tokens"].items()]
    rows += [
        ["FLOPs of a step", f"{_short(numbers['flop_per_step'])}FLOP", counted_work],
        ["memory of a step", size(memory["peak"]), f"{peak}; gradients are allocated while activations are freed"],
        ["  weights", size(memory["weights"]), ""],
        ["  gradients", size(memory["gradients"]), ""],
        ["  buckets", size(memory["buckets"]), "copies of the gradients for the all-reduce"],
        ["  optimizer", size(memory["optimizer"]), ""],
        ["  others", size(memory["others"]), f"activations and temporaries, at their peak{uncompiled}"],
        ["  libraries", size(numbers["libraries"] or 0), "Python and its libraries, measured now in this process"],
        ["memory here", size(numbers["memory_here"]), "per process"],
        ["memory of a validation", size(memory["validation"]), f"{numbers['validations']} validations in the run"],
        ["passes over the data", f"{numbers['epochs']:,.1f}", data],
        ["cache", size(numbers["cache_bytes"]), numbers["cache"]],
        ["FLOPs of the run", f"{_short(numbers['flop'])}FLOP", "including validations"],
        ["peak matmul throughput", f"{_short(numbers['matrix_peak'])}FLOP/s", f"{measured_with}: {numbers['device']}"],
        ["time of the run", _duration(numbers["seconds"]), f"at {100 * UTILISATION:.0f} % of the peak throughput"],
    ]
    optional = {"  buckets": memory["buckets"], "  libraries": numbers["libraries"]}
    return [row for row in rows if optional.get(row[0], True)]


def _short(count: float) -> str:
    """Format a number with three digits and a prefix: 1,234,567 is `1.23 M`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        # From 999.5 on, three digits would round to 1000.
        if count < 999.5:
            return f"{count:.3g} {prefix}"
        count /= 1000
    return f"{count:.3g} E"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
