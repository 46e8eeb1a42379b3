"""Use a tokenizer of your own: write the class, then fill a cache with its codes.

    python examples/own_tokenizer.py VIDEOS

The tokenizer here has no weights. A code is the mean brightness of a block of 2x8x8 pixels, quantized to 64 levels. The class
shows what a tokenizer needs: `name`, `vocab_size`, `stride`, and four methods. Pre-training reads the cache like any other:
`python pipelines/pretrain_ar.py --cache brightness`.
"""

import sys

import torch
from einops import reduce, repeat
from torch import Tensor

from data import TokenCache, load_source
from pipelines.commands.tokenize import cache_writer, fill
from pipelines.engine.device import start_accelerator
from pipelines.settings.tokenize import Tokenize
from tokenizer import VideoTokenizer


class Brightness(VideoTokenizer):
    """Mean brightness of each block, quantized to 64 levels."""

    name = "brightness-2x8x8"
    vocab_size = 64
    stride = (2, 8, 8)  # pixels of one code along time, height, width
    levels = ((64,),)  # the code of a place is one digit of 64 values: similar codes mean similar brightness
    context = (0, 0)  # a code depends only on its own block, so long videos are encoded in pieces

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        """Encode uint8 clips (B, T, H, W, 3) to int64 codes (B, t, h, w)."""
        s, p, q = self.stride
        mean_Bthw = reduce(pixels_BTHWC.float(), "b (t s) (h p) (w q) c -> b t h w", "mean", s=s, p=p, q=q)
        return (mean_Bthw / 4).long()

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        """Decode codes (B, t, h, w) to grey blocks, uint8 (B, T, H, W, 3)."""
        s, p, q = self.stride
        return repeat(4 * codes_Bthw + 2, "b t h w -> b (t s) (h p) (w q) 3", s=s, p=p, q=q).to(torch.uint8)

    def codebook(self) -> None:
        """Return None, because the tokenizer has no learned codebook."""

    def fingerprint(self) -> str:
        """Return the identity of the codes for the cache key. Change it whenever the codes change."""
        return "brightness-2x8x8, 64 steps"


def main() -> None:
    config = Tokenize(videos=sys.argv[1] if len(sys.argv) > 1 else "builtin:moving-digits:40:16")
    source, tokenizer = load_source(config.videos), Brightness()
    writer = cache_writer(config, source, tokenizer)
    if not writer.finished:
        fill(start_accelerator(), writer, config, source, tokenizer)
        writer.finish(None)  # a learned codebook would be stored here, float32 (vocab_size, C)
    writer.note({"tokenizer": tokenizer.name, "videos": config.videos})
    cache = TokenCache.open(writer.folder)
    print(f"{len(cache)} videos, codes of shape {cache.codes(0).shape}: {cache.address}")
    codes_Bthw = torch.from_numpy(cache.codes(0).astype("int64"))
    print(f"decoded: {tuple(tokenizer.decode(codes_Bthw).shape)}")


if __name__ == "__main__":
    main()
