"""The training loop, independent of the objective: batches, losses, validation, checkpoints.

All randomness of a step is a function of (seed, step). data/loading.py derives the batch and its seeds from them. The global
generator, which some quantizers use, is seeded before each step.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from torch.utils.data import Dataset

from data.loading import Batch, BatchPlan, batches
from pipelines.engine import checkpoints
from pipelines.engine.averaging import WeightAverage
from pipelines.engine.console import progress, say
from pipelines.engine.device import resolve_precision, start_accelerator
from pipelines.engine.learning_rate import lr_at
from pipelines.engine.non_finite import NonFiniteGuard
from pipelines.engine.run import Run
from pipelines.engine.run_files import metrics_of
from pipelines.engine.sharding import name_layers
from pipelines.engine.signals import no_deadline
from pipelines.engine.step import Losses, train_step
from pipelines.engine.stop_request import StopRequest
from pipelines.settings.training import Training

_LOG_EVERY = 10
"""Steps between two log lines."""
_KEEP = 2
"""Number of checkpoints kept per run."""
_MAX_THREADS = 1024


def make_accelerator(config: Training, run: Run) -> Accelerator:
    """Start the process group with the precision of the run. Call this before building quantizers, which check for a group."""
    tracker = None if config.tracker == "none" else config.tracker
    precision = run.chosen("precision", resolve_precision(config.precision))
    accelerator = start_accelerator(precision, log_with=tracker, project_dir=run.folder)
    if accelerator.device.type == "cpu":
        _set_threads(accelerator, run)
    return accelerator


def _set_threads(accelerator: Accelerator, run: Run) -> None:
    """Use the threads per process with which the run began: sums over other parts have other last bits.

    Raises:
        ValueError: if the run has recorded anything but a number of threads.
    """
    own, name = torch.get_num_threads(), _threads(accelerator)
    recorded = run.chosen(name, str(own))
    if recorded not in map(str, range(1, _MAX_THREADS + 1)):
        raise ValueError(f"{run.folder / 'choices.json'}: {name} must be 1 to {_MAX_THREADS}, got {recorded!r}")
    if int(recorded) != own and not run.finished:
        say(
            accelerator,
            f"{run.folder} began with {recorded} threads, and continues with them; this machine has cores for {own}",
        )
        torch.set_num_threads(int(recorded))


def _threads(accelerator: Accelerator) -> str:
    """Return the name under which a run records its threads. With another number of processes, the bits differ anyway."""
    return f"threads of {accelerator.num_processes} processes"


def plan_parts(
    accelerator: Accelerator, config: Training, samples: int, blocks_N: np.ndarray | None = None
) -> BatchPlan:
    """Plan the batches of this process, `config.accumulate` per step. See BatchPlan for `blocks_N`."""
    return BatchPlan(
        samples=samples,
        batch_size=config.batch_size // config.accumulate,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        blocks_N=blocks_N,
    )


def make_optimizer(module: nn.Module, config: Training) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices, not on vectors (biases, norms).

    Optional attributes of the module: `own_betas` maps parts of it to their betas, and the other parts have those of `config`;
    `lr_scales` maps parameters to factors of the learning rate, and the others have 1.
    """
    own_betas: dict[nn.Module, tuple[float, float]] = getattr(module, "own_betas", {})
    lr_scales: dict[nn.Parameter, float] = getattr(module, "lr_scales", {})
    rest = dict.fromkeys(p for p in module.parameters() if p.requires_grad)
    groups: list[dict[str, Any]] = []
    for part, betas in [*own_betas.items(), (module, config.betas)]:
        trained = [p for p in part.parameters() if p in rest]
        for parameter in trained:
            del rest[parameter]
        scale_of = {p: lr_scales.get(p, 1.0) for p in trained}
        for scale in sorted(set(scale_of.values())) or [1.0]:
            for decay, is_matrix in ((config.weight_decay, True), (0.0, False)):
                chosen = [p for p in trained if scale_of[p] == scale and (p.ndim >= 2) == is_matrix]
                groups.append({"params": chosen, "betas": betas, "weight_decay": decay, "lr_scale": scale})
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


@dataclass
class Fit:
    """Result of a finished training run."""

    losses: dict[str, float]
    """Numbers of the last validation."""
    seconds: float
    """Wall time of all steps, including those before an interruption."""
    samples_per_second: float


def fit(
    run: Run,
    accelerator: Accelerator,
    module: nn.Module,
    dataset: Dataset,
    config: Training,
    validate: Callable[[int], dict[str, float]],
    watch: Callable[[Batch], None] = lambda batch: None,
    before_save: Callable[[], None] = lambda: None,
    average: WeightAverage | None = None,
) -> Fit:
    """Train until `config.steps` steps are done, starting from the newest checkpoint if there is one.

    Args:
        module: maps a batch, which contains its `step`, to losses. It is already on the device. Its optional attribute
            `networks` lists adversarial modules; the gradient of each is clipped by its own norm.
        dataset: maps the number of a part to its batch; each step uses `config.accumulate` consecutive parts.
        validate: maps a step to numbers to log; called on all ranks with the module in evaluation mode.
        watch: called with every batch before the batch is used.
        before_save: called on all ranks before a checkpoint is written.
        average: moving average of the weights of the module or of a part of it; saved in checkpoints.

    Raises:
        FloatingPointError: if a loss or gradient is not finite. The step is not applied, and no checkpoint contains it.
        ValueError: if the ranks find different checkpoints.
        KeyboardInterrupt, Stopped: after a checkpoint, if a signal asked for the end of the run.
    """
    run.choose(accelerator, "precision", lambda: "bf16" if accelerator.mixed_precision == "bf16" else "fp32")
    if accelerator.device.type == "cpu":
        run.choose(accelerator, _threads(accelerator), lambda: str(torch.get_num_threads()))
    networks = getattr(module, "networks", [module])
    extra = {} if average is None else {"average": average.state}
    name_layers(module)
    # FSDP shards the module in place.
    model, optimizer = accelerator.prepare(module, make_optimizer(module, config))
    folder = run.folder / "checkpoints"
    saved = checkpoints.load(folder, module, optimizer.optimizer, extra_modules=extra, warn=partial(say, accelerator))
    start, earlier_seconds = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    _check_same_start(run, accelerator, start)
    validation_is_due = _validation_is_due(run, accelerator, start, config)
    if accelerator.is_main_process:
        run.rewind(start, config.steps)
        checkpoints.prune(folder, start, _KEEP)
    if start:
        say(accelerator, f"resuming {run.folder} from step {start}")
    if config.tracker != "none":
        accelerator.init_trackers(run.pipeline)

    # Copies to a GPU overlap with its work only from pinned memory.
    pin = accelerator.device.type == "cuda"
    parts = batches(dataset, range(start * config.accumulate, config.steps * config.accumulate), config.workers, pin)
    bar = progress(accelerator, config.steps, run.pipeline, start)
    began = time.perf_counter() - earlier_seconds
    guard = NonFiniteGuard(optimizer.optimizer, accelerator.device)

    with StopRequest(accelerator) as stop:
        if validation_is_due:
            _validate_and_log(run, accelerator, module, validate, start)
        for step in range(start, config.steps):
            torch.manual_seed(config.seed * 2**32 + step)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, config) * group["lr_scale"]
            # A step that takes longer than the patience is not lost.
            with no_deadline():
                losses = _step(accelerator, model, optimizer, parts, config, watch, step, networks, guard)
                if average is not None:
                    average.update()
            done = step + 1
            bar.update()
            log = done % _LOG_EVERY == 0 or done == config.steps
            validate_now = _validated(done, config)
            if log or validate_now:
                guard.check()
            if log:
                numbers = {k: accelerator.reduce(v, "mean").item() for k, v in losses.items()}
                bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()})
                seconds = round(time.perf_counter() - began, 3)
                run.log(accelerator, done, {**numbers, "lr": lr_at(step, config), "seconds": seconds})
            number = stop.after_step()
            # Saved before a validation, which may take longer than the patience after a signal.
            if number or validate_now or done % config.save_every == 0 or done == config.steps:
                guard.check()
                before_save()
                state = {"step": done, "seconds": time.perf_counter() - began}
                write = accelerator.is_main_process
                with no_deadline():
                    checkpoints.save(
                        folder, module, optimizer.optimizer, state, extra_modules=extra, keep=_KEEP, write=write
                    )
                    accelerator.wait_for_everyone()
            if number:
                bar.close()
                stop.stop(number)
            if validate_now:
                _validate_and_log(run, accelerator, module, validate, done)
    bar.close()
    seconds = time.perf_counter() - began
    final = _validate_and_log(run, accelerator, module, validate, config.steps)
    # Accelerator.end_training would also destroy the process group, which is still needed.
    for tracker in accelerator.trackers:
        tracker.finish()
    return Fit(final, seconds, config.steps * config.batch_size / max(seconds, 1e-9))


def _check_same_start(run: Run, accelerator: Accelerator, start: int) -> None:
    """Raise a ValueError if ranks would resume from different steps, which happens if nodes do not share the run folder."""
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise ValueError(
            f"--out {run.folder}: the ranks found different checkpoints, of steps {starts}; all nodes must share this folder"
        )


def _validated(step: int, config: Training) -> bool:
    """Return whether a validation follows the checkpoint of a step. The one after the last step is not part of the loop."""
    return 0 < step < config.steps and step % config.validate_every == 0


def _validation_is_due(run: Run, accelerator: Accelerator, start: int, config: Training) -> bool:
    """Return whether the run was stopped between the checkpoint of its first step and the end of the validation that follows."""
    logged = any(
        line["step"] == start and any(key.startswith("val_") for key in line) for line in metrics_of(run.folder)
    )
    # The main process decides for all processes, which may see another state of the file.
    return broadcast_object_list([_validated(start, config) and not logged])[0]


def _validate_and_log(
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
    guard: NonFiniteGuard,
) -> Losses:
    """Run an optimizer step on the next `config.accumulate` parts; return the mean losses. Raises FloatingPointError as `fit`."""
    rows: list[int] = []

    def device_batches() -> Iterator[Batch]:
        for part in itertools.islice(parts, config.accumulate):
            batch = {**part, "step": step}
            watch(batch)
            rows.extend(batch["row_B"].tolist())
            yield send_to_device(batch, accelerator.device, non_blocking=True)

    def check_gradient(norms: torch.Tensor, losses: Losses) -> None:
        guard.before_update(
            norms,
            lambda: (
                f"step {step + 1}: the gradient is not finite (loss {losses['loss'].item()}); the step was not applied, the "
                f"last checkpoint is unchanged; samples of the step (rows in the list of videos): {', '.join(map(str, rows))}"
            ),
        )

    model.train()
    return train_step(
        accelerator,
        model,
        optimizer,
        device_batches(),
        accumulate=config.accumulate,
        clipped=networks,
        max_norm=config.clip_gradient,
        check_gradient=check_gradient,
    )
