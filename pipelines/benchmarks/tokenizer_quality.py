"""VQ3D compared with magvit2-pytorch: PSNR after equal training time, encoding speed, and code usage."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.clip_spec import ClipSpec
from data.loading import Batch
from data.source_clips import held_out_clips
from data.sources import Source, training_rows
from pipelines.benchmarks import Row, comparison
from pipelines.benchmarks.peer import BATCH, LR, Peer
from pipelines.benchmarks.synthetic import decoded_clips
from pipelines.engine.device import resolve_precision, wait
from pipelines.engine.step import SingleProcess, train_step
from pipelines.settings.train_tokenizer import TrainTokenizer
from tokenizer import VQ3D
from tokenizer.base import to_uint8
from tokenizer.loss_settings import Losses
from tokenizer.losses import Reconstruction
from tokenizer.measures import code_health, count_codes, psnr_of

_SECONDS = 150
_WARM_UP = 50
"""Steps of learning-rate warm-up."""
_MEMORY = 2**31
"""Maximum bytes of training clips in memory."""
KINDS = {"FSQ": ("vq3d-2x8x8-fsq1000", 0.9), "EMA-VQ": ("vq3d-2x8x8-emavq1024", 0.8)}
"""Name of VQ3D and target for the share of codes in use, by quantizer."""


@dataclass
class Trained:
    """A trained tokenizer, its PSNR on held-out clips in dB, and its code usage after each quarter of the training."""

    tokenizer: VQ3D
    psnr: float
    usage: list[float]


def measure(source: Source, clip: ClipSpec, device: torch.device, scale: float) -> Iterator[Row]:
    """Yield PSNR, encoding speed and code usage.

    Both tokenizers train in the same loop on the same clips for the same time, with AdamW, autocast and a cosine
    learning-rate schedule.

    Raises:
        ValueError: if magvit2-pytorch is not installed or the source has no usable video.
    """
    seconds = _SECONDS * scale
    torch.manual_seed(0)
    # Build the peer first, so that a missing package is reported before training.
    peer = Peer(clip.size).to(device)
    clips_NTHWC = training_clips(source, clip)
    held_out_BTHWC = held_out_clips(source, clip, 96, {})
    ours = {kind: train(name, clips_NTHWC, held_out_BTHWC, device, seconds) for kind, (name, _) in KINDS.items()}
    for _ in _fit(lambda batch: {"loss": peer(batch["pixels_BTHWC"])}, peer, clips_NTHWC, device, BATCH, LR, seconds):
        pass  # code usage is not measured for the peer
    peer_psnr = _psnr(peer.encode, lambda codes: to_uint8(peer.decode(codes)), held_out_BTHWC, device)
    shape = f"{clip.frames} frames of {clip.size}x{clip.size}"
    what = f"held-out PSNR after {seconds:.0f} s of training, {shape}, 2x8x8, 1,000 codes"
    psnr = ours["FSQ"].psnr
    yield Row(what, "dB", psnr, None, peer_psnr, "magvit2-pytorch", ratio=psnr - peer_psnr, reach="≥ 2 more")
    yield Row("the same with a learned codebook (EMA-VQ, 1,024 codes)", "dB", ours["EMA-VQ"].psnr)
    our_speed = frames_per_second(ours["FSQ"].tokenizer.encode, held_out_BTHWC, device)
    peer_speed = frames_per_second(peer.encode, held_out_BTHWC, device)
    yield comparison(f"encoding in fp32, {shape}", "frames/s", our_speed, peer_speed, "magvit2-pytorch", "≥ 3")
    for kind, (_, reach) in KINDS.items():
        quarters = ", ".join(f"{share:.3f}" for share in ours[kind].usage)
        what = f"share of the codes in use, {kind}, training clips, after each quarter: {quarters}"
        yield Row(what, "", ours[kind].usage[-1], reach=f"≥ {reach}, never falls")


def training_clips(source: Source, clip: ClipSpec) -> Tensor:
    """Read the clips of the training videos, uint8 (N, T, H, W, 3), up to 2 GiB.

    Raises:
        ValueError: if the source has no usable video.
    """
    videos = [source.videos[row] for row in training_rows(source.videos, source.name)[0]]
    clips = decoded_clips(source, videos, clip, _MEMORY // (clip.frames * clip.size**2 * 3))
    return torch.from_numpy(np.stack([decoded.pixels_THWC for decoded in clips]))


def train(name: str, clips_NTHWC: Tensor, held_out_BTHWC: Tensor, device: torch.device, seconds: float) -> Trained:
    """Train VQ3D with the default batch size and learning rate. Code usage is measured on the first 2,048 clips."""
    torch.manual_seed(0)
    tokenizer = VQ3D(name=name).to(device)
    module = Reconstruction(tokenizer, Losses())
    usage: list[float] = []
    for _ in _fit(module, tokenizer, clips_NTHWC, device, TrainTokenizer.batch_size, TrainTokenizer.lr, seconds):
        codes = [tokenizer.encode(part.to(device)).cpu() for part in clips_NTHWC[:2048].split(16)]
        usage.append(code_health(count_codes(torch.cat(codes), tokenizer.vocabularies))["code_usage"].item())
    return Trained(tokenizer, _psnr(tokenizer.encode, tokenizer.decode, held_out_BTHWC, device), usage)


def _fit(
    forward: Callable[[Batch], dict[str, Tensor]],
    model: nn.Module,
    clips_NTHWC: Tensor,
    device: torch.device,
    batch_size: int,
    lr: float,
    seconds: float,
) -> Iterator[None]:
    """Train for `seconds`, and yield after each quarter in evaluation mode. The caller's time does not count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    backend = SingleProcess(device, bf16=resolve_precision("auto") == "bf16")
    real_B = torch.ones(batch_size, dtype=torch.bool, device=device)
    spent, step = 0.0, 0
    for quarter in range(1, 5):
        model.train()
        while spent < seconds * quarter / 4:
            began = time.perf_counter()
            rows = torch.randint(len(clips_NTHWC), (batch_size,), generator=torch.Generator().manual_seed(step))
            cosine = 0.5 * (1 + math.cos(math.pi * min(1, spent / seconds)))
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / _WARM_UP) * (0.01 + 0.99 * cosine)
            batch = {"pixels_BTHWC": clips_NTHWC[rows].to(device), "real_B": real_B, "step": step}
            train_step(backend, forward, optimizer, [batch], clipped=[model], max_norm=1.0)
            wait(device)
            spent, step = spent + time.perf_counter() - began, step + 1
        model.eval()
        yield


def _psnr(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], pixels_BTHWC: Tensor, device: torch.device
) -> float:
    videos = [decode(encode(part.to(device))).cpu() for part in pixels_BTHWC.split(8)]
    return psnr_of(pixels_BTHWC, torch.cat(videos)).mean().item()


def frames_per_second(encode: Callable[[Tensor], Tensor], pixels_BTHWC: Tensor, device: torch.device) -> float:
    """Measure the throughput of encoding 8 clips, uint8 (B, T, H, W, 3), as the fastest call within two seconds.

    The precision is that of the caller's autocast context.
    """
    part_BTHWC = pixels_BTHWC[:8].to(device)
    encode(part_BTHWC)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < 2:
        wait(device)
        start = time.perf_counter()
        encode(part_BTHWC)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return part_BTHWC.shape[0] * part_BTHWC.shape[1] / best
