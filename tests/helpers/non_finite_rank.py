"""pretrain_ar with a NaN loss in one step of rank 1, for `accelerate launch --module` with two processes."""

import os
from typing import Any

from torch import Tensor

from ar_model.objectives import ARVideo
from pipelines.commands.pretrain_ar import main
from pipelines.engine.launch import command
from pipelines.settings.pretrain_ar import Pretrain

POISONED = 12
"""Index of the step with the NaN loss."""
forward = ARVideo.forward


def poisoned(objective: ARVideo, batch: dict[str, Any]) -> dict[str, Tensor]:
    losses = forward(objective, batch)
    if batch.get("step") == POISONED and os.environ["RANK"] == "1":
        losses["loss"] = losses["loss"] * float("nan")
    return losses


if __name__ == "__main__":
    ARVideo.forward = poisoned  # type: ignore[method-assign]
    command(Pretrain, main)
