"""Models of the pre-training benchmark with one interface for a training step: those of this project, and a public VideoMAE.

The public model is `VideoMAEForPreTraining` of the transformers package (`pip install -e '.[peers]'`).
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

from ar_model.attention import set_backend
from ar_model.inputs import CodeSpec
from ar_model.objectives import ARVideo, Objective
from ar_model.transformer import COMPILED_MEMORY, compile_blocks
from pipelines.engine.device import wait
from pipelines.engine.memory import peak_of
from pipelines.engine.step import SingleProcess, train_step

Batch = dict[str, Tensor]
AS_FAST = 1.05
"""Ratio of step times up to which settings count as equally fast, because timings on two cores are not more precise."""
HIDDEN = 0.9
"""Fraction of tubes that VideoMAE masks."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the clip, its tubelets (t, h, w), the encoder and the batch (in clips), which all models share.

    `vocabulary` (FSQ levels) and `clusters` (t, h, w, in tokens) are settings of ARVideo.
    """

    frames: int = 16
    side: int = 224
    tubelet: tuple[int, int, int] = (2, 16, 16)
    width: int = 768
    depth: int = 12
    heads: int = 12
    batch: int = 8
    vocabulary: tuple[int, ...] = (8, 5, 5, 5)
    clusters: tuple[int, int, int] = (2, 7, 7)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Size (t, h, w) of the grid of tokens."""
        t, h, w = self.tubelet
        return self.frames // t, self.side // h, self.side // w

    def codes(self) -> CodeSpec:
        """Return the specification of the codes of these clips."""
        clip = (self.frames, self.side, self.side)
        return CodeSpec(shape=self.grid, vocab_size=prod(self.vocabulary), levels=(self.vocabulary,), clip=clip)


class Entrant:
    """A model with its optimizer and one batch. A step runs in bf16 autocast and updates the weights with fused AdamW."""

    def __init__(
        self, name: str, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch, budget: float = 1.0
    ) -> None:
        """Create the optimizer. `budget` is PyTorch's `activation_memory_budget` for compiled code (default: 1.0)."""
        self.name, self.model, self.batch = name, model.train(), batch
        self._loss, self._budget = loss, budget
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95), fused=True
        )

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        # The compiler reads the budget in the first step and after each reset, so set it for every step.
        with functorch.patch(activation_memory_budget=self._budget):
            return {"loss": self._loss(self.model, batch)}

    def step(self, batch: Batch | None = None) -> Tensor:
        """Run a training step and return its loss."""
        backend = SingleProcess(self.device, bf16=True)
        losses = train_step(backend, self._forward, self.optimizer, [self.batch if batch is None else batch])
        return losses["loss"]

    def seconds(self) -> float:
        """Time one step."""
        wait(self.device)
        began = time.perf_counter()
        self.step()
        wait(self.device)
        return time.perf_counter() - began

    def memory(self, steps: int = 1) -> float:
        """Return the peak memory of a step in bytes, excluding weights and optimizer state, as the median over `steps`."""
        return statistics.median(self._peak() for _ in range(steps))

    def _peak(self) -> int:
        self.step()
        return peak_of(self.step, self.device)


def ours(
    shape: Shape,
    device: torch.device,
    *,
    attention: str,
    compiled: bool,
    objective: type[Objective] = ARVideo,
    **settings: Any,
) -> Entrant:
    """Build ARVideo on codes or VideoMAE on pixels with the settings of its paper, which `settings` override."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"width": shape.width, "depth": shape.depth, "heads": shape.heads, "decoder_depth": 4}
    if objective is ARVideo:
        arguments |= {"clusters": shape.clusters, "keep": 0.2, "decoder_width": 512, "decoder_heads": 8}
    else:
        arguments |= {"decoder_width": shape.width // 2, "decoder_heads": shape.heads // 2, "rope": False, "flat": True}
    # Create the model on its device, because a module created during tracing cannot be moved.
    with device:
        model = objective(shape.codes(), **(arguments | settings))
    set_backend(model, attention)
    batch = {
        "codes_BTHW": torch.randint(shape.codes().vocab_size, (shape.batch, *shape.grid), device=device),
        "seed_B": torch.arange(shape.batch, device=device),
    }
    if model.needs_pixels:
        size = (shape.batch, shape.frames, shape.side, shape.side, 3)
        batch["pixels_BTHWC"] = torch.randint(256, size, dtype=torch.uint8, device=device)
    if compiled:
        if attention == "flex":
            # Make its masks, as a run does when it tries the kernels; a graph would make them anew in every block.
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                model(batch)
        compile_blocks(model)
    name = f"arvideo, {attention}{', compiled' if compiled else ''}"
    return Entrant(name, model, lambda model, batch: model(batch)["loss"], batch, COMPILED_MEMORY)


def videomae(shape: Shape, device: torch.device, *, attention: str, compiled: bool) -> Entrant:
    """Build the VideoMAE of transformers with the settings of its paper (arXiv 2203.12602): 90 % masked tubes, normalised pixels.

    Raises:
        ValueError: if transformers is not installed.
    """
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
    except ImportError as error:
        raise ValueError(
            f"the benchmark needs VideoMAE of transformers, which is not installed ({error}): pip install transformers"
        ) from None
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=shape.side,
        patch_size=shape.tubelet[1],
        tubelet_size=shape.tubelet[0],
        num_frames=shape.frames,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        decoder_hidden_size=shape.width // 2,
        decoder_num_attention_heads=shape.heads // 2,
        decoder_intermediate_size=2 * shape.width,
        decoder_num_hidden_layers=4,
        norm_pix_loss=True,
        # The base class accepts this argument.
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    with device:
        model: nn.Module = VideoMAEForPreTraining(config)
    if compiled:
        model.compile()
    pixels_BTCHW = torch.randn(shape.batch, shape.frames, 3, shape.side, shape.side, device=device)
    batch = {"pixel_values": pixels_BTCHW, "bool_masked_pos": tube_mask(shape).to(device)}
    name = f"VideoMAE, {attention}{', compiled' if compiled else ''}"
    return Entrant(name, model, lambda model, batch: model(**batch).loss, batch)


@functools.cache
def tube_mask(shape: Shape) -> Tensor:
    """Draw a mask of tubes, boolean (B, L): the same 90 % of positions in all time slices of a clip.

    The mask is cached, because a tensor created while `cost_of` traces a step would be a FakeTensor.
    """
    t, h, w = shape.grid
    masked = torch.rand(shape.batch, h * w).argsort(dim=1) < int(HIDDEN * h * w)
    return masked[:, None].expand(-1, t, -1).flatten(1)


def fastest(
    build: Callable[..., Entrant], choices: Sequence[dict[str, Any]], laps: int = 2
) -> tuple[Callable[[], Entrant], str]:
    """Among the settings within 5 % of the fastest step time, choose the one with the least memory.

    Returns:
        A function that builds the chosen entrant, and a text with the time and memory of all settings.

    Raises:
        ValueError: if no setting runs on this machine.
    """
    results: list[tuple[float, float, dict[str, Any]]] = []
    notes = []
    for choice in choices:
        entrant = build(**choice)
        try:
            entrant.step()
            seconds, memory = min(entrant.seconds() for _ in range(laps)), entrant.memory()
            results.append((seconds, memory, choice))
            notes.append(f"{entrant.name}: {seconds:.3f} s, {memory / 2**20:,.0f} MiB")
        except Exception as error:
            # Kernels and compilers raise many types of errors; a setting that fails is not a candidate.
            notes.append(f"{entrant.name}: does not run ({type(error).__name__})")
        finally:
            del entrant
            torch._dynamo.reset()
    if not results:
        raise ValueError(f"no setting runs on this machine: {'; '.join(notes)}")
    limit = AS_FAST * min(seconds for seconds, _, _ in results)
    fast_enough = [result for result in results if result[0] <= limit]
    _, _, choice = min(fast_enough, key=lambda result: result[1])
    return functools.partial(build, **choice), "; ".join(notes)


def memory_of(build: Callable[[], Entrant]) -> float:
    """Build an entrant and return its `memory` over five steps. Call this function with `in_new_process`."""
    return build().memory(5)
