"""Settings of pretrain_ar."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.settings import class_setting
from pipelines.settings.training import Training

if TYPE_CHECKING:
    from ar_model.inputs import CodeSpec
    from ar_model.objectives import Objective
else:
    CodeSpec = Objective = Any


def _objective() -> tuple[Any, type]:
    from ar_model.inputs import CodeSpec
    from ar_model.objectives import ARVideo, Objective

    return Callable[[CodeSpec], Objective], ARVideo


@dataclass(kw_only=True)
class Pretrain(Training):
    """Stage two: pre-train a transformer on cached codes."""

    lr: float = 1e-3
    """Peak learning rate."""
    cache: str | None = None
    """Folder or https, s3, gs or hf address of a token cache, or a prefix of its name or key; by default the newest in
    --caches."""
    caches: Path = Path("caches")
    """Folder of all token caches."""
    objective: Callable[[CodeSpec], Objective] = class_setting(_objective)
    """Training objective: ARVideo (the default), VideoMAE, VIMPAC or MAM2. --objective.help ARVideo lists its settings."""
    init: Path | None = None
    """Run folder of pretrain_ar whose weights training starts from, with a new schedule, also on other videos; by default weights
    are random. Objective, its sizes and the tokenizer must be the same."""
    attention: Literal["auto", "plain", "sdpa", "xformers", "flex", "reference"] = "auto"
    """Kernel of all attention layers; auto measures all kernels on the shapes of this run and uses the fastest."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile: steps are faster after about a minute of compilation. On a CPU this
    needs a C++ compiler."""
    recompute: bool = False
    """Use activation checkpointing: less memory, about 20 % more compute, identical results."""
    plan: bool = False
    """Print the cost of the run (parameters, tokens, FLOPs, memory, time) and exit. Nothing is trained or written."""
    snapshots: bool = False
    """Save the model at every validation under snapshots/ of the run folder, so that it can be probed."""
    steps: int = 1000
