"""A tiny training run with a non-finite value: `python -m tests.helpers.non_finite_training FOLDER` runs one of two ranks.

Each rank prints JSON: the error that stopped the training, whether weights or files changed, and the error for tokenizers
that differ between the ranks.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.loading import Batch
from pipelines.commands.train_tokenizer import _equal_on_all_ranks
from pipelines.engine import training
from pipelines.engine.run import Run
from pipelines.engine.training import Fit, fit, make_accelerator
from pipelines.settings.training import Training
from tokenizer import VQ3D

STEPS, POISONED, SAVED = 8, 5, 4
"""Number of steps, index of the step with the non-finite value, and step of the last checkpoint before it."""


class Points(Dataset):
    """Map a step to three points, of rows 10 * step to 10 * step + 2."""

    def __getitem__(self, step: int) -> Batch:
        x = np.random.Generator(np.random.Philox(key=[0, step])).standard_normal((3, 4), np.float32)
        return {"x_B4": x, "row_B": np.arange(10 * step, 10 * step + 3)}


class Toy(nn.Module):
    """Two layers. In one step the loss, a gradient or the input becomes `value`. `snapshot` is the state before that step."""

    def __init__(self, poison: str, value: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.poison, self.value = poison, value
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
        self.snapshot: dict[str, Any] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.folder: Path | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x_B4, poison = batch["x_B4"], "none"
        if batch["step"] == POISONED:
            poison, self.snapshot = self.poison, self.snapshot or self.state()
        if poison == "input":
            x_B4 = x_B4.index_fill(1, torch.tensor([2]), self.value)
        y_B = self.layers(x_B4)
        if poison == "gradient":
            y_B.register_hook(lambda gradient: torch.full_like(gradient, self.value))
        loss = (y_B - x_B4.sum(1, keepdim=True)).square().mean()
        return {"loss": loss + self.value if poison == "loss" else loss}

    def state(self) -> dict[str, Any]:
        """Return weights, moments, and all files of the run folder."""
        assert self.optimizer is not None and self.folder is not None
        tensors = {f"weight {name}": value.clone() for name, value in self.state_dict().items()}
        for name, parameter in self.named_parameters():
            tensors |= {f"{key} of {name}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        files = {str(file): file.read_bytes() for file in sorted(self.folder.rglob("*")) if file.is_file()}
        return {**{name: value.numpy().tobytes() for name, value in tensors.items()}, **files}


def learn(toy: Toy, config: Training, settings: str) -> Fit:
    """Train, after giving the toy access to its optimizer and run folder."""
    run = Run("toy", config, settings)
    accelerator = make_accelerator(config, run)
    run.begin(accelerator)
    toy.folder = run.folder
    make_optimizer = training.make_optimizer

    def make_and_keep_optimizer(module: nn.Module, config: Training) -> torch.optim.AdamW:
        optimizer = make_optimizer(module, config)
        toy.optimizer = optimizer
        return optimizer

    training.make_optimizer = make_and_keep_optimizer
    try:
        return fit(run, accelerator, toy, Points(), config, lambda step: {"loss": 0.0})
    finally:
        training.make_optimizer = make_optimizer


def main(folder: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    toy = Toy("loss" if rank == 1 else "none", float("nan"))
    config = Training(steps=STEPS, batch_size=2, save_every=2, warmup=0, precision="fp32", out=folder)
    answer: dict[str, Any] = {"stopped": "", "unequal": ""}
    try:
        learn(toy, config, "{}")
    except FloatingPointError as error:
        answer["stopped"] = str(error)
    answer["learned"] = toy.state() != toy.snapshot
    torch.manual_seed(0)
    tokenizer = VQ3D(width=8, depth=0)
    answer["equal"] = _equal_on_all_ranks(tokenizer, 7)
    if rank == 1:
        next(tokenizer.parameters()).data[0] += 1e-6
    try:
        _equal_on_all_ranks(tokenizer, 8)
    except RuntimeError as error:
        answer["unequal"] = str(error)
    torch.distributed.destroy_process_group()
    return answer


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
