"""Reconstruction of held-out clips while a tokenizer is made.

Legend: B clips, T H W C frames, height, width, channels.
"""

import torch
from torch import Tensor

from tokenizer import VideoTokenizer
from tokenizer.measures import code_health, count_codes, psnr_of

VALIDATION_CLIPS = 96
"""Maximum number of clips in a validation."""
_BATCH = 16


def reconstruct(
    tokenizer: VideoTokenizer, pixels_BTHWC: Tensor, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Reconstruct held-out clips.

    Returns:
        Numbers rounded to four digits (mean PSNR over clips and the statistics of `code_health`), and the reconstructions
        (B, T, H, W, C), uint8.
    """
    codes, videos = [], []
    for part in pixels_BTHWC.split(_BATCH):
        codes.append(tokenizer.encode(part.to(device)))
        videos.append(tokenizer.decode(codes[-1]).cpu())
    video_BTHWC = torch.cat(videos)
    health = code_health(count_codes(torch.cat(codes), tokenizer.vocabularies))
    numbers = {"psnr": psnr_of(pixels_BTHWC, video_BTHWC).mean(), **health}
    return {key: round(value.item(), 4) for key, value in numbers.items()}, video_BTHWC
