"""What the pre-training benchmark compares: our model and a public VideoMAE, behind one training step.

The peer is `VideoMAEForPreTraining` of the transformers package (`pip install -e '.[peers]'`).
"""

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn

from ar_model.attention import set_backend
from ar_model.inputs import CodeSpec
from ar_model.objectives import ARVideo, Objective, VideoMAE
from ar_model.transformer import COMPILED_MEMORY, compile_blocks
from pipelines.engine.device import wait
from pipelines.engine.memory import Resident
from pipelines.engine.step import SingleProcess, train_step

Batch = dict[str, Tensor]
AS_FAST = 1.05
"""Steps whose times differ by less count as equally fast: two laps on a machine of two cores tell no more."""


@dataclass(frozen=True)
class Shape:
    """Sizes that both sides share: the clip, its tubelets, the encoder, the samples of a step."""

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
        t, h, w = self.tubelet
        return self.frames // t, self.side // h, self.side // w

    def codes(self) -> CodeSpec:
        return CodeSpec(
            shape=self.grid,
            vocab_size=prod(self.vocabulary),
            levels=self.vocabulary,
            clip=(self.frames, self.side, self.side),
        )


class Entrant:
    """A model in training: `step` is one optimizer step in bf16 autocast with fused AdamW, as everybody does it."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        loss: Callable[[nn.Module, Batch], Tensor],
        batch: Batch,
        budget: float = 1.0,
    ) -> None:
        """`budget`: share of what autograd would keep that compiled code may keep; 1.0 is PyTorch's own choice."""
        self.name, self.model, self.batch = name, model.train(), batch
        self._loss, self._budget = loss, budget
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95), fused=True
        )

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        # Blocks are compiled in their first step, and again after a reset: each side under its own budget.
        with functorch.patch(activation_memory_budget=self._budget):
            return {"loss": self._loss(self.model, batch)}

    def step(self, batch: Batch | None = None) -> None:
        backend = SingleProcess(self.device, bf16=True)
        train_step(backend, self._forward, self.optimizer, [self.batch if batch is None else batch])

    def seconds(self) -> float:
        """Of one step."""
        wait(self.device)
        began = time.perf_counter()
        self.step()
        wait(self.device)
        return time.perf_counter() - began

    def memory(self, steps: int = 1) -> float:
        """Most bytes of a step beyond what stays between steps, weights and the optimizer's moments: median over steps."""
        return statistics.median(self._peak() for _ in range(steps))

    def _peak(self) -> int:
        self.step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device) - before
        _give_back()
        with Resident() as resident:
            self.step()
        return resident.most - resident.before


def _give_back() -> None:
    """Let the C library return what it keeps of freed memory, so that it is not mistaken for memory in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def ours(
    shape: Shape,
    device: torch.device,
    *,
    attention: str,
    compiled: bool,
    objective: type[Objective] = ARVideo,
    **settings: Any,
) -> Entrant:
    """The ViT of a paper with our code: ARVideo's on cached codes, VideoMAE's on pixels, or as `settings` of it say."""
    torch.manual_seed(0)
    papers: dict[type[Objective], dict[str, Any]] = {
        ARVideo: {
            "clusters": shape.clusters,
            "keep": 0.2,
            "decoder_width": 512,
            "decoder_depth": 4,
            "decoder_heads": 8,
        },
        VideoMAE: {
            **{"decoder_width": shape.width // 2, "decoder_depth": 4, "decoder_heads": shape.heads // 2},
            **{"rope": False, "flat": True},
        },
    }
    sizes: dict[str, Any] = {"width": shape.width, "depth": shape.depth, "heads": shape.heads}
    with device:  # a traced module cannot be moved
        model = objective(shape.codes(), **{**sizes, **papers[objective], **settings})
    set_backend(model, attention)
    if compiled:
        compile_blocks(model)
    batch = {
        "codes_BTHW": torch.randint(shape.codes().vocab_size, (shape.batch, *shape.grid), device=device),
        "seed_B": torch.arange(shape.batch, device=device),
    }
    if model.needs_pixels:
        size = (shape.batch, shape.frames, shape.side, shape.side, 3)
        batch["pixels_BTHWC"] = torch.randint(256, size, dtype=torch.uint8, device=device)
    name = f"ours, {attention}{', compiled' if compiled else ''}"
    return Entrant(name, model, lambda model, batch: model(batch)["loss"], batch, COMPILED_MEMORY)


def videomae(shape: Shape, device: torch.device, *, attention: str, compiled: bool) -> Entrant:
    """VideoMAE as its paper has it (arXiv 2203.12602): 90 % of tubes masked, normalised pixels.

    Raises:
        ValueError: if transformers is not installed.
    """
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
    except ImportError as error:
        raise ValueError(f"the peer is not installed ({error}): pip install transformers") from None
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
        attn_implementation=attention,  # type: ignore[call-arg]  # its base class takes it
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
    """The same 90 % of places masked in all slices of a clip, boolean (B, L). Made once: a trace needs it to be there."""
    t, h, w = shape.grid
    masked = torch.rand(shape.batch, h * w).argsort(dim=1) < int(0.9 * h * w)
    return masked[:, None].expand(-1, t, -1).flatten(1)


def fastest(
    build: Callable[..., Entrant], choices: Sequence[dict[str, Any]], laps: int = 2
) -> tuple[Callable[[], Entrant], str]:
    """How to build the entrant whose settings give the shortest step, of those within 5 % of it the one that needs the
    least memory; and what all of them took. None of them is left when it returns."""
    taken: list[tuple[float, float, dict[str, Any]]] = []
    notes = []
    for choice in choices:
        entrant = build(**choice)
        try:
            entrant.step()
            seconds, memory = min(entrant.seconds() for _ in range(laps)), entrant.memory()
            taken.append((seconds, memory, choice))
            notes.append(f"{entrant.name}: {seconds:.3f} s, {memory / 2**20:,.0f} MiB")
        except Exception as error:  # a setting that does not work on this machine is no candidate, whatever the reason
            notes.append(f"{entrant.name}: does not run ({type(error).__name__})")
        finally:
            del entrant
            torch._dynamo.reset()
    if not taken:
        raise ValueError("; ".join(notes))
    limit = AS_FAST * min(seconds for seconds, _, _ in taken)
    best = min((found for found in taken if found[0] <= limit), key=lambda found: found[1])[2]
    return functools.partial(build, **best), "; ".join(notes)


def memory_alone(build: Callable[[], Entrant]) -> float:
    """`Entrant.memory`, median of five, in a process of its own: there nobody else has left holes in the memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_memory, build).result()


def _memory(build: Callable[[], Entrant]) -> float:
    return build().memory(5)
