"""Stage two: pre-train a transformer on cached codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ar_model.attention import set_backend
from ar_model.objectives import Objective
from ar_model.transformer import compile_blocks, recompute_activations
from data.cache import TokenCache, find_cache
from data.loading import TokenDataset, batches, blocks_of, evaluation_batches
from data.sources import hold_out
from pipelines.engine.attention_choice import choose_attention
from pipelines.engine.checkpoints import gathered
from pipelines.engine.code_spec import code_spec
from pipelines.engine.console import say
from pipelines.engine.device import check_compiler
from pipelines.engine.memory import peak_memory
from pipelines.engine.plan import Model, Validation, plan
from pipelines.engine.run import Run
from pipelines.engine.training import fit, make_accelerator, plan_parts
from pipelines.settings.pretrain_ar import Pretrain

VALIDATION_CLIPS = 512
VALIDATION_BATCH = 32


def main(config: Pretrain, settings: str) -> dict[str, Any]:
    cache = TokenCache.open(find_cache(config.caches, config.cache))
    run = Run("pretrain_ar", config, settings, about=cache.key)
    accelerator = make_accelerator(config, run)
    if config.plan:
        model = Model(lambda: config.objective(code_spec(cache)), config.attention, config.recompute, config.compile)
        return plan(accelerator, config, cache, model, Validation(VALIDATION_CLIPS, VALIDATION_BATCH))
    torch.manual_seed(config.seed)
    objective = config.objective(code_spec(cache))
    run.begin(accelerator)
    if run.finished:
        say(accelerator, f"{run.folder} is finished: nothing is left to do")
        return run.summary()
    rows, held_out = hold_out(cache.videos)
    parts = plan_parts(accelerator, config, len(rows), blocks_of(cache, rows))
    check_pairs(objective, config)
    dataset = TokenDataset(cache, rows, parts, pixels=objective.needs_pixels, pairs=objective.needs_pairs)
    backend = _make_ready(run, accelerator, objective, dataset, config)
    name, unigram = type(objective).__name__, cache.manifest["unigram_bits"]  # before FSDP, which changes the class
    say(
        accelerator,
        f"{name}, {sum(p.numel() for p in objective.parameters()) / 1e6:.1f} M parameters, "
        f"attention {backend}, {'bf16' if accelerator.mixed_precision == 'bf16' else 'fp32'} on {accelerator.device}; "
        f"cache {cache.name}: {len(rows)} videos to train on, {len(held_out)} held out; "
        f"codes by their frequencies cost {unigram:.2f} bits",
    )
    clips = (held_out or rows)[:VALIDATION_CLIPS]

    def look(step: int) -> dict[str, float]:
        if config.snapshots and step < config.steps:
            _write(accelerator, config, cache, objective, run.folder / "snapshots" / f"step_{step:06d}")
        return validate(accelerator, objective, cache, clips)

    result = fit(run, accelerator, objective, dataset, config, look)
    _write(accelerator, config, cache, objective, run.folder / "model")
    summary = {
        "run": str(run.folder),
        "objective": name,
        "cache": cache.address,
        "tokenizer": cache.spec["tokenizer"],
        "step": config.steps,
        "bits_per_code": None,
        **result.losses,
        "unigram_bits": round(unigram, 4) if "bits_per_code" in result.losses else None,
        "clips_per_second": round(result.samples_per_second, 2),
        "peak_memory": peak_memory(accelerator.device),
        "seconds": round(result.seconds, 1),
    }
    return run.finish(accelerator, summary)


def _write(accelerator: Accelerator, config: Pretrain, cache: TokenCache, objective: Objective, folder: Path) -> None:
    """The model as it is now, in a folder for `load_objective`."""
    weights = gathered(objective.state_dict(), keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        with torch.random.fork_rng(), torch.autocast(accelerator.device.type, enabled=False):
            trained = config.objective(
                code_spec(cache)
            )  # anew, since FSDP leaves its own module in place of the old one
        trained.load_state_dict(weights)
        trained.save(folder)


def check_pairs(objective: Objective, config: Pretrain) -> None:
    """Raise a ValueError where clips of a video would have no other video to be told from."""
    if objective.needs_pairs and config.batch_size // config.accumulate < 2:
        raise ValueError(
            f"{type(objective).__name__} tells clips of different videos apart: batch_size / accumulate must be at least 2"
        )


def _make_ready(
    run: Run, accelerator: Accelerator, objective: Objective, dataset: TokenDataset, config: Pretrain
) -> str:
    """Put the objective on its device, with the attention kernel, recomputation and compilation of the run; the kernel's name.

    Raises:
        ValueError: if the kernel or the compiler does not work here.
    """
    objective.to(accelerator.device)
    if config.compile:
        check_compiler(accelerator.device)
    backend = run.choose(accelerator, "attention", lambda: _attention(accelerator, objective, dataset, config))
    set_backend(objective, backend)
    if config.recompute:
        recompute_activations(objective)
    if config.compile:
        compile_blocks(objective)
    return backend


def _attention(accelerator: Accelerator, objective: Objective, dataset: TokenDataset, config: Pretrain) -> str:
    """The attention kernel for the shapes of the first batch; the main process decides for all."""
    chosen = [""]
    if accelerator.is_main_process:
        batch = _to(next(batches(dataset, range(1), workers=0)), accelerator.device)
        batch.pop("pair_BTHW", None)  # a contrast would wait for the other processes, which take no part
        chosen = [choose_attention(accelerator, objective, batch, config.attention)]
    return broadcast_object_list(chosen)[0]


def validate(
    accelerator: Accelerator, objective: Objective, cache: TokenCache, rows: Sequence[int]
) -> dict[str, float]:
    """Means over the canonical views of held-out videos, each counted once, whatever the number of processes."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    total: dict[str, Tensor] = {}
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64  # which has no wider one
    for first in range(0, len(rows[:: accelerator.num_processes]), VALIDATION_BATCH):
        part = mine[first : first + VALIDATION_BATCH]
        # Where it is empty a clip counts nothing: under FSDP all processes must go forward equally often.
        (batch,) = evaluation_batches(cache, part or rows[:1], VALIDATION_BATCH, pixels=objective.needs_pixels)
        for key, value in objective(_to(batch, accelerator.device)).items():
            total[key] = total.get(key, 0) + value.to(wide) * len(part)
    return {key: round(accelerator.reduce(value, "sum").item() / len(rows), 5) for key, value in total.items()}


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}
