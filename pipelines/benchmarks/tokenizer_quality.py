"""Our tokenizer beside a peer's: what equal time on the same clips gives, how fast it encodes, and whether codes stay in use."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.clips import ClipSpec, read_clips
from data.decoding import DamagedVideo
from data.loading import Batch
from data.source_clips import held_out_clips
from data.sources import Source, hold_out
from pipelines.benchmarks import Row
from pipelines.benchmarks.peer import BATCH, LR, Peer
from pipelines.engine.device import resolve_precision
from pipelines.engine.step import SingleProcess, train_step
from pipelines.settings.train_tokenizer import TrainTokenizer
from tokenizer import VQ3D
from tokenizer.base import to_uint8
from tokenizer.loss_settings import Losses
from tokenizer.losses import Reconstruction
from tokenizer.measures import code_health, psnr_of

_SECONDS = 150
_WARM_UP = 50
_MEMORY = 2**31
"""Bytes of training clips that are held."""
KINDS = {"FSQ": ("vq3d-2x8x8-fsq1000", 0.9), "EMA-VQ": ("vq3d-2x8x8-emavq1024", 0.8)}
"""Ours, and the share of its codes that should be in use."""


@dataclass
class Trained:
    """A tokenizer, how well it does on held-out clips, and its code usage at each quarter of its training."""

    tokenizer: VQ3D
    psnr: float
    usage: list[float]


def measure(source: Source, clip: ClipSpec, device: torch.device, scale: float) -> Iterator[Row]:
    """Both train by the same loop on the same clips for equally long: AdamW, autocast, a cosine over the time."""
    seconds = _SECONDS * scale
    torch.manual_seed(0)
    peer = Peer(clip.size).to(device)  # first, for it may not be installed
    clips_NTHWC = training_clips(source, clip)
    held_out_BTHWC = held_out_clips(source, clip, 96, {})
    ours = {kind: train(name, clips_NTHWC, held_out_BTHWC, device, seconds) for kind, (name, _) in KINDS.items()}
    _fit(lambda pixels_BTHWC, _: peer(pixels_BTHWC), peer, clips_NTHWC, device, BATCH, LR, seconds, lambda: None)
    peer_psnr = _psnr(peer.encode, lambda codes: to_uint8(peer.decode(codes)), held_out_BTHWC, device)
    shape = f"{clip.frames} frames of {clip.size}x{clip.size}"
    yield Row(
        what=f"held-out PSNR after {seconds:.0f} s of training, {shape}, 2x8x8, 1,000 codes",
        unit="dB",
        ours=ours["FSQ"].psnr,
        peer=peer_psnr,
        alternative="magvit2-pytorch",
        ratio=ours["FSQ"].psnr - peer_psnr,
        reach="≥ 2 more",
    )
    yield Row(what="the same with a learned codebook (EMA-VQ, 1,024 codes)", unit="dB", ours=ours["EMA-VQ"].psnr)
    speeds = [frames_per_second(model.encode, held_out_BTHWC, device) for model in (ours["FSQ"].tokenizer, peer)]
    yield Row(
        what=f"encoding in fp32, {shape}",
        unit="frames/s",
        ours=speeds[0],
        peer=speeds[1],
        alternative="magvit2-pytorch",
        ratio=speeds[0] / speeds[1],
        reach="≥ 3",
    )
    for kind, (_, reach) in KINDS.items():
        quarters = ", ".join(f"{share:.3f}" for share in ours[kind].usage)
        yield Row(
            what=f"share of the codes in use, {kind}, training clips, after each quarter: {quarters}",
            unit="",
            ours=ours[kind].usage[-1],
            reach=f"≥ {reach}, never falls",
        )


def training_clips(source: Source, clip: ClipSpec) -> Tensor:
    """The clips of all that is not held out, uint8 (N, T, H, W, 3), as many as 2 GiB hold."""
    clips: list[np.ndarray] = []
    room = _MEMORY // (clip.frames * clip.size**2 * 3)
    for row in hold_out(source.videos)[0]:
        if len(clips) < room:
            with suppress(DamagedVideo):
                clips += list(read_clips(source, source.videos[row], clip).pixels_VTHWC)
    if not clips:
        raise ValueError(f"{source.name}: holds no video that can be used")
    return torch.from_numpy(np.stack(clips[:room]))


def train(
    name: str, clips_NTHWC: Tensor, held_out_BTHWC: Tensor, device: torch.device, seconds: float, views: int = 2048
) -> Trained:
    """Train ours with the batch size and learning rate that are its default; usage is of the first `views` clips."""
    torch.manual_seed(0)
    tokenizer = VQ3D(name=name).to(device)
    module = Reconstruction(tokenizer, Losses())
    usage: list[float] = []

    def look() -> None:
        codes = [tokenizer.encode(part.to(device)).cpu().flatten() for part in clips_NTHWC[:views].split(16)]
        counts_V = torch.bincount(torch.cat(codes), minlength=tokenizer.vocab_size)
        usage.append(code_health(counts_V)["code_usage"].item())

    def loss(pixels_BTHWC: Tensor, step: int) -> Tensor:
        real_B = torch.ones(len(pixels_BTHWC), dtype=torch.bool, device=device)
        return module({"pixels_BTHWC": pixels_BTHWC, "real_B": real_B, "step": step})["loss"]

    _fit(loss, tokenizer, clips_NTHWC, device, TrainTokenizer.batch_size, TrainTokenizer.lr, seconds, look)
    return Trained(tokenizer, _psnr(tokenizer.encode, tokenizer.decode, held_out_BTHWC, device), usage)


def _fit(
    loss: Callable[[Tensor, int], Tensor],
    model: nn.Module,
    clips_NTHWC: Tensor,
    device: torch.device,
    batch_size: int,
    lr: float,
    seconds: float,
    look: Callable[[], None],
) -> None:
    """Train for so many seconds; `look` after each quarter, which is not counted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    backend = SingleProcess(device, bf16=resolve_precision("auto") == "bf16")

    def forward(batch: Batch) -> dict[str, Tensor]:
        return {"loss": loss(batch["pixels_BTHWC"], batch["step"])}

    model.train()
    spent, step, quarter = 0.0, 0, 1
    while quarter <= 4:
        began = time.perf_counter()
        rows = torch.randint(len(clips_NTHWC), (batch_size,), generator=torch.Generator().manual_seed(step))
        rate = (
            lr * min(1, (step + 1) / _WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, spent / seconds))))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {"pixels_BTHWC": clips_NTHWC[rows].to(device), "step": step}
        train_step(backend, forward, optimizer, [batch], clipped=[model], max_norm=1.0)
        _wait(device)
        spent, step = spent + time.perf_counter() - began, step + 1
        if spent >= seconds * quarter / 4:
            model.eval()
            look()
            model.train()
            quarter += 1
    model.eval()


def _psnr(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], pixels_BTHWC: Tensor, device: torch.device
) -> float:
    videos = [decode(encode(part.to(device))).cpu() for part in pixels_BTHWC.split(8)]
    return psnr_of(pixels_BTHWC, torch.cat(videos)).mean().item()


def frames_per_second(encode: Callable[[Tensor], Tensor], pixels_BTHWC: Tensor, device: torch.device) -> float:
    """The fastest of rounds within two seconds, batches of 8 clips, in the precision of the caller."""
    part_BTHWC = pixels_BTHWC[:8].to(device)
    encode(part_BTHWC)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < 2:
        _wait(device)
        start = time.perf_counter()
        encode(part_BTHWC)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return part_BTHWC.shape[0] * part_BTHWC.shape[1] / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
