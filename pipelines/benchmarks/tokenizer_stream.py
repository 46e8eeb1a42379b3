"""Child process of `tokenizer_length`: encode a stream of random frames and print the peak resident memory in bytes."""

import sys
from itertools import chain

import torch

from pipelines.engine.memory import Resident
from tokenizer import VQ3D

_FRAMES_OF_A_PIECE = 10


def main(frames: int) -> None:
    """Encode `frames` + 1 frames of 128x128, which arrive ten at a time; `frames` is a multiple of 20.

    A causal tokenizer of stride 4 encodes 4k + 1 frames.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = VQ3D(name="vq3d-causal-4x8x8-fsq4375").eval()
    shape = (1, _FRAMES_OF_A_PIECE, 128, 128, 3)
    pieces = (torch.randint(256, shape, dtype=torch.uint8) for _ in range(frames // _FRAMES_OF_A_PIECE))
    last = torch.zeros(1, 1, 128, 128, 3, dtype=torch.uint8)
    with Resident() as resident:
        for _ in tokenizer.encode_stream(chain(pieces, [last])):
            pass
    print(resident.most)


if __name__ == "__main__":
    main(int(sys.argv[1]))
