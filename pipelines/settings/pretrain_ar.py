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

    MakeObjective = Callable[[CodeSpec], Objective]
else:
    MakeObjective = Any


def _objective() -> tuple[Any, type]:
    from ar_model.inputs import CodeSpec
    from ar_model.objectives import ARVideo, Objective

    return Callable[[CodeSpec], Objective], ARVideo


@dataclass(kw_only=True)
class Pretrain(Training):
    """Stage two: pre-train a transformer on cached codes."""

    cache: str | None = None
    """Folder or https, s3, gs or hf address of a cache, or how its name or key begins; by default the newest in --caches."""
    caches: Path = Path("caches")
    """Where caches live."""
    objective: MakeObjective = class_setting(
        _objective,
        "Objective: ARVideo, VideoMAE, VIMPAC or MAM2; --objective.help ARVideo lists the settings of one.",
    )
    attention: Literal["auto", "plain", "sdpa", "xformers", "flex", "reference"] = "auto"
    """Kernel of all attention layers; auto: the fastest on the shapes of this run."""
    compile: bool = False
    """Compile the transformer's blocks: faster steps after a minute or so; needs a C++ compiler on CPUs."""
    recompute: bool = False
    """Keep only the inputs of each block for the backward pass: less memory, a fifth more arithmetic, the same numbers."""
    plan: bool = False
    """Only say what the run would cost: parameters, tokens, arithmetic, memory, time. Nothing is trained or written."""
    snapshots: bool = False
    """Keep the weights of every validation under snapshots/ of the run's folder: models like the last one, to be probed too."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Clips of one step, of all processes together."""
    lr: float = 3e-3
    """Highest learning rate."""
