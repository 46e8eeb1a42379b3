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
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from data.loading import Batch, BatchPlan, batches
from pipelines.engine import checkpoints
from pipelines.engine.averaging import WeightAverage
from pipelines.engine.console import progress, say
from pipelines.engine.device import resolve_precision, start_accelerator
from pipelines.engine.run import Run
from pipelines.engine.sharding import name_layers, whole
from pipelines.settings.training import Training

Precision = Literal["auto", "fp32", "bf16"]
_LOG_EVERY = 10
_KEEP = 2
"""Checkpoints of a run that are kept."""


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
    extra_modules = {} if average is None else {"average": average.state}
    name_layers(module)
    model, optimizer = accelerator.prepare(module, make_optimizer(module, config))  # FSDP cuts the module itself
    folder = run.folder / "checkpoints"
    tell = partial(say, accelerator)
    saved = checkpoints.load(folder, module, optimizer.optimizer, extra_modules=extra_modules, tell=tell)
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
        checkpoints.save(
            folder, module, optimizer.optimizer, state, extra_modules=extra_modules, keep=_KEEP, write=main
        )
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
