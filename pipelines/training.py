"""The training loop. It knows batches, losses and checkpoints; it cannot tell one objective from another.

All randomness of a step comes from (seed, step): the batch and its seeds are drawn so by data/loading.py, and the global
generator, which some quantizers use, is seeded anew for each step.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from data.loading import Batch, BatchPlan, batches
from pipelines import checkpoints
from pipelines.averaging import WeightAverage
from pipelines.run import Run, progress, say, start_accelerator
from pipelines.sharding import name_layers, whole

Precision = Literal["auto", "fp32", "bf16"]
_LOG_EVERY = 10
_KEEP = 2
"""Checkpoints of a run that are kept."""


@dataclass(kw_only=True)
class Training:
    """Settings of every training run.

    Raises:
        ValueError: for a number that makes no sense.
    """

    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 32
    """Samples of one step, of all processes together."""
    accumulate: int = 1
    """Parts that a step's batch is cut into, one after another, to save memory; the numbers stay the same, but for what a loss
    takes over a batch (FSQ's spread, LFQ's entropy, a discriminator's batch norm, VIMPAC's contrast): it is taken over a part."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 50
    """Steps until it is reached; then it falls along a cosine to a hundredth."""
    weight_decay: float = 0.05
    """Of AdamW, on matrices only."""
    clip_gradient: float = 1.0
    """Highest norm of the gradient."""
    precision: Precision = "auto"
    """fp32, bf16 (autocast), or auto: bf16 where the hardware multiplies in it."""
    seed: int = 0
    """Of initial weights, batches and everything drawn."""
    workers: int = 0
    """Processes that prepare batches; 0: the training process itself."""
    validate_every: int = 250
    """Steps between two validations; the last step always has one."""
    save_every: int = 250
    """Steps between two checkpoints; the last two are kept."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Where numbers go besides metrics.jsonl."""
    out: Path | None = None
    """Run folder; by default runs/<pipeline>-<hash of the settings>."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("warmup", "weight_decay", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be finite and not negative")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}, but must be finite and above 0")
        if not self.clip_gradient > 0:
            raise ValueError(f"clip_gradient is {self.clip_gradient}, but must be above 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to {2**31 - 1}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulate {self.accumulate} equal parts"
            )


def lr_at(step: int, config: Training) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to a hundredth. Nothing about it is ever saved."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_accelerator(config: Training, run: Run) -> Accelerator:
    """Process group, device and precision; made before any module, since quantizers ask for the group when they are built."""
    tracker = None if config.tracker == "none" else config.tracker
    precision = run.chosen("precision", resolve_precision(config.precision))
    return start_accelerator(precision, log_with=tracker, project_dir=run.folder)


def plan_parts(
    accelerator: Accelerator, config: Training, samples: int, blocks_N: np.ndarray | None = None
) -> BatchPlan:
    """The batches of this process, `config.accumulate` to a step; `blocks_N` as in BatchPlan."""
    return BatchPlan(
        samples=samples,
        batch_size=config.batch_size // config.accumulate,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        blocks_N=blocks_N,
    )


def resolve_precision(precision: Precision) -> Literal["fp32", "bf16"]:
    """bf16 where it is faster: on GPUs that have it and on CPUs with matrix instructions for it."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = [getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile")]
    return "bf16" if any(has) else "fp32"


def make_optimizer(module: nn.Module, config: Training) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (biases, norms) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


@dataclass
class Fit:
    """What a finished training knows."""

    losses: dict[str, float]
    """Last validation."""
    seconds: float
    samples_per_second: float


def fit(
    run: Run,
    accelerator: Accelerator,
    module: nn.Module,
    dataset: Dataset,
    config: Training,
    validate: Callable[[int], dict[str, float]],
    watch: Callable[[Batch], None] = lambda batch: None,
    average: WeightAverage | None = None,
) -> Fit:
    """Train from the newest checkpoint, or from the start, to `config.steps`.

    Args:
        module: batch, with its `step` -> {"loss": ..., numbers to log}; already on the device. If it has `networks`,
            modules that are trained against each other, the gradient of each is clipped by itself.
        dataset: part of a step -> batch; parts are numbered through, `config.accumulate` to a step.
        validate: step -> numbers; called by all processes with the module in evaluation mode.
        watch: sees every batch before it is used.
        average: of the weights of the module or of a part of it; kept in the checkpoints too.

    Raises:
        FloatingPointError: if a loss or gradient is not finite; nothing was learned from it, and no checkpoint has it.
        ValueError: if the processes find different checkpoints.
    """
    run.choose(accelerator, "precision", lambda: "bf16" if accelerator.mixed_precision == "bf16" else "fp32")
    networks = getattr(module, "networks", [module])
    beside = {} if average is None else {"average": average.state}
    name_layers(module)
    model, optimizer = accelerator.prepare(module, make_optimizer(module, config))  # FSDP cuts the module itself
    folder = run.folder / "checkpoints"
    tell = partial(say, accelerator)
    saved = checkpoints.load(folder, module, optimizer.optimizer, beside=beside, tell=tell)
    state = saved or {"step": 0, "seconds": 0.0}
    start = state["step"]
    _agreed(run, accelerator, start)
    if accelerator.is_main_process:
        run.rewind(start, config.steps)
        checkpoints.prune(folder, start, _KEEP)
    if start:
        say(accelerator, f"continuing {run.folder} from step {start}")
    if config.tracker != "none":
        accelerator.init_trackers(run.pipeline)

    parts = batches(dataset, range(start * config.accumulate, config.steps * config.accumulate), config.workers)
    bar = progress(accelerator, config.steps, run.pipeline, start)
    began = time.perf_counter() - state["seconds"]
    interrupted = _Interrupt(accelerator)

    def save(done: int) -> None:
        state, main = {"step": done, "seconds": time.perf_counter() - began}, accelerator.is_main_process
        checkpoints.save(folder, module, optimizer.optimizer, state, beside=beside, keep=_KEEP, write=main)
        accelerator.wait_for_everyone()

    for step in range(start, config.steps):
        torch.manual_seed(config.seed * 2**32 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        losses = _step(accelerator, model, optimizer, parts, config, watch, step, networks)
        if average is not None:
            average.update()
        done = step + 1
        bar.update()
        if done % _LOG_EVERY == 0 or done == config.steps:
            numbers = {k: accelerator.reduce(v, "mean").item() for k, v in losses.items()}
            bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()})
            seconds = round(time.perf_counter() - began, 3)
            run.log(accelerator, done, {**numbers, "lr": lr_at(step, config), "seconds": seconds})
        if done % config.validate_every == 0 and done < config.steps:
            _validated(run, accelerator, module, validate, done)
        if done % config.save_every == 0 or done == config.steps or interrupted.asked:
            save(done)
        if interrupted.asked:
            bar.close()
            raise KeyboardInterrupt
    interrupted.restore()
    bar.close()
    taken = time.perf_counter() - began
    final = _validated(run, accelerator, module, validate, config.steps)
    for tracker in accelerator.trackers:  # end_training would end the process group too
        tracker.finish()
    return Fit(final, taken, config.steps * config.batch_size / max(taken, 1e-9))


def _agreed(run: Run, accelerator: Accelerator, start: int) -> None:
    """Refuse to go on from different steps, as nodes would that do not share the run's folder."""
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise ValueError(
            f"--out {run.folder}: the processes find different checkpoints there (of steps {starts}); all nodes must "
            f"share this folder"
        )


class _Interrupt:
    """Ctrl-C ends the step that runs and saves before it ends the run; with several processes, or twice, it ends at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.asked = False
        self._before = signal.getsignal(signal.SIGINT)
        if accelerator.num_processes == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True
        self.restore()

    def restore(self) -> None:
        if signal.getsignal(signal.SIGINT) == self._ask:
            signal.signal(signal.SIGINT, self._before)


def _validated(
    run: Run, accelerator: Accelerator, module: nn.Module, validate: Callable[[int], dict[str, float]], step: int
) -> dict[str, float]:
    module.eval()
    with torch.no_grad(), accelerator.autocast():
        numbers = validate(step)
    module.train()
    run.log(accelerator, step, {f"val_{k}": v for k, v in numbers.items()})
    return numbers


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Iterator[Batch],
    config: Training,
    watch: Callable[[Batch], None],
    step: int,
    networks: Sequence[nn.Module],
) -> dict[str, torch.Tensor]:
    """One optimizer step; the mean over its parts of what the module returned."""
    total: dict[str, torch.Tensor] = {}
    seen: list[Any] = []
    model.train()
    for part in range(config.accumulate):
        batch = {**next(parts), "step": step}
        watch(batch)
        seen += batch["row_B"].tolist()
        batch = {k: v.to(accelerator.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        # Under FSDP each part is synchronised: no process is to hold a whole gradient.
        synchronise = part == config.accumulate - 1 or accelerator.is_fsdp2
        with nullcontext() if synchronise else accelerator.no_sync(model):
            with accelerator.autocast():
                losses = model(batch)
            poison = torch.where(losses["loss"].detach().isfinite(), 1.0, torch.nan)  # every process is to know of it
            accelerator.backward(losses["loss"] * poison / config.accumulate)
        for key, value in losses.items():
            total[key] = total.get(key, 0) + value.detach() / config.accumulate
    norms = [whole(accelerator.clip_grad_norm_(part.parameters(), config.clip_gradient)) for part in networks]
    if not torch.isfinite(torch.stack(norms)).all():
        raise FloatingPointError(
            f"step {step + 1}: the gradient is not finite (loss {total['loss'].item()}); nothing was learned from it, the "
            f"last checkpoint is untouched; samples of the step (rows of the list): {', '.join(map(str, seen))}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return total
