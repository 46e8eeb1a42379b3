"""Streams of pieces of any size give the codes of one pass over the video, in memory that does not grow with its length."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokenizer.base
from tests.helpers.small_tokenizers import SIZES, build, one_rounding_apart, pixels
from tokenizer import VQ3D

ROOT = Path(__file__).parent.parent.parent
SHAPES = list(itertools.product(SIZES, ["", "-causal"], ["space", "haar"]))

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the length of a piece to 5 codes, so that short clips are encoded in pieces."""
    monkeypatch.setattr(tokenizer.base, "PIECE", 5)
    return 5


def splits(tensor: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield splits along time: pieces of 1, 7, 33 and all frames or codes, then pieces of different lengths, some empty."""
    for length in (1, 7, 33, tensor.shape[1]):
        yield tensor.split(length, 1)
    lengths = [0, 3, 0, 0, 11, 1]
    yield tensor.split([*lengths, tensor.shape[1] - sum(lengths) - 2, 2, 0], 1)


@pytest.mark.parametrize("size, causal, stem", SHAPES)
@pytest.mark.parametrize("quantizer", ["fsq240", "emavq16"])
def test_pieces_of_any_length_give_the_codes_and_frames_of_one_pass(
    short_pieces: int, size: str, causal: str, stem: str, quantizer: str
) -> None:
    model = build(f"vq3d{size}{causal}-2x4x4-{quantizer}", stem=stem)
    video = pixels(2, model.frames_of(37))
    codes = model.encode_piece(video)
    frames = model.decode_piece(codes)
    assert codes.shape[1] == 37 and len(codes.unique()) > 8
    for pieces in splits(video):
        parts = list(model.encode_stream(pieces))
        assert torch.equal(torch.cat(parts, 1), codes)
        lengths = [part.shape[1] for part in parts]
        assert set(lengths[:-1]) == {5} and lengths[-1] < 5 + max(1, model.context[1])
    assert torch.equal(model.encode(video), codes)
    at_once = torch.cat(list(model.decode_stream([codes])), 1)
    assert one_rounding_apart(at_once, frames)
    for pieces in splits(codes):
        assert torch.equal(torch.cat(list(model.decode_stream(pieces)), 1), at_once)
    assert torch.equal(model.decode(codes), at_once)


@pytest.mark.parametrize("causal", ["", "-causal"])
@pytest.mark.parametrize("stride, depth", [(1, 1), (2, 0), (4, 3), (8, 1)])
def test_videos_of_every_length_have_the_codes_and_frames_of_one_pass(
    short_pieces: int, causal: str, stride: int, depth: int
) -> None:
    model = build(f"vq3d{causal}-{stride}x4x4-fsq240", depth=depth)
    for count in range(1, 24):
        video = pixels(1, model.frames_of(count), 4, 8, seed=count)
        codes = model.encode_piece(video)
        assert torch.equal(model.encode(video), codes)
        assert torch.equal(torch.cat(list(model.encode_stream(video.split(3, 1))), 1), codes)
        assert one_rounding_apart(model.decode(codes), model.decode_piece(codes))
        assert torch.equal(torch.cat(list(model.decode_stream(codes.split(2, 1))), 1), model.decode(codes))


def test_pieces_without_their_context_have_other_codes(short_pieces: int) -> None:
    """Control: the codes compared above do depend on their context."""
    for causal in ("", "-causal"):
        model = build(f"vq3d{causal}-2x4x4-fsq240")
        video = pixels(2, model.frames_of(37))
        alone = torch.cat([model.encode_piece(piece) for piece in video[:, :30].split(model.frames_of(5), 1)], 1)
        assert not torch.equal(alone, model.encode(video)[:, : alone.shape[1]])


@pytest.mark.parametrize(
    "frames, size",
    [(150, 16), pytest.param(1000, 64, marks=pytest.mark.soak), pytest.param(1003, 64, marks=pytest.mark.soak)],
)
@pytest.mark.parametrize("name", ["vq3d-2x8x8-fsq1000", "vq3d-base-causal-4x8x8-emavq64", "vq3d-small-4x8x8-fsq1000"])
def test_a_long_clip_is_encoded_and_decoded_as_in_one_pass(name: str, frames: int, size: int) -> None:
    model = build(name, depth=2)
    video = pixels(1, model.frames_that_fit(frames), size, size)
    codes = model.encode(video)
    assert codes.shape[1] > tokenizer.base.PIECE
    assert torch.equal(codes, model.encode_piece(video))
    assert torch.equal(torch.cat(list(model.encode_stream(video.split(29, 1))), 1), codes)
    assert one_rounding_apart(model.decode(codes), model.decode_piece(codes))
    assert torch.equal(torch.cat(list(model.decode_stream(codes.split(29, 1))), 1), model.decode(codes))


def test_an_empty_stream_gives_an_empty_stream() -> None:
    model = build()
    assert list(model.encode_stream([])) == []
    assert list(model.decode_stream([])) == []
    assert list(model.decode_stream([torch.zeros(1, 0, 2, 2, dtype=torch.long)])) == []
    with pytest.raises(ValueError, match=r"0 frames of 8x8.*\(2 would do\)"):
        list(model.encode_stream([torch.zeros(1, 0, 8, 8, 3, dtype=torch.uint8)]))


@pytest.mark.parametrize(
    "causal, frames, would_do", [("", 7, "6 or 8"), ("", 139, "138 or 140"), ("-causal", 140, "139 or 141")]
)
def test_a_total_number_of_frames_that_does_not_fit_is_refused_at_the_end(
    causal: str, frames: int, would_do: str
) -> None:
    model = build(f"vq3d{causal}-2x4x4-fsq240")
    stream = model.encode_stream(pixels(1, frames).split(9, 1))
    with pytest.raises(ValueError, match=rf"a clip of {frames} frames of 8x12 does not fit.*\({would_do} would do\)"):
        for _ in stream:
            pass


def test_a_stream_reads_its_input_lazily() -> None:
    model = build()
    numbers_read = []

    def pieces() -> Iterator[Tensor]:
        for number in range(100):
            numbers_read.append(number)
            yield pixels(1, 10)

    stream = model.encode_stream(pieces())
    assert numbers_read == []
    assert next(stream).shape[1] == tokenizer.base.PIECE
    assert len(numbers_read) * 10 < model.frames_of(tokenizer.base.PIECE + model.context[1]) + 10


@pytest.mark.parametrize("before", [0, 200])
@pytest.mark.parametrize(
    "invalid, reason",
    [
        (pixels(1, 4).float(), "float32"),
        (pixels(1, 4)[0], "clips, frames, height, width, 3"),
        (pixels(1, 4, 9, 12), "9x12|9, 12"),
        (pixels(2, 4, 8, 11), "8x11|8, 11"),
        (pixels(1, 200, 9, 12), "9x12|9, 12"),
    ],
)
def test_pieces_of_another_type_or_size_are_refused(before: int, invalid: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        list(build().encode_stream([pixels(1, before), invalid] if before else [invalid]))


@pytest.mark.parametrize(
    "invalid, reason",
    [
        (torch.zeros(1, 40, 2, 2), "float32"),
        (torch.full((1, 40, 2, 2), -1), "-1"),
        (torch.full((1, 40, 2, 2), 240), "240"),
        (torch.zeros(1, 40, 3, 2, dtype=torch.long), "parts of the same videos"),
        (torch.zeros(2, 40, 2, 2, dtype=torch.long), "parts of the same videos"),
    ],
)
def test_invalid_pieces_of_codes_are_refused(invalid: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        list(build().decode_stream([torch.zeros(1, 40, 2, 2, dtype=torch.long), invalid]))


class WholeClips(VQ3D):
    """A tokenizer of unknown context that records the number of frames of each pass."""

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        self.frames = pixels_BTHWC.shape[1]
        return super().encode_piece(pixels_BTHWC)


def test_a_tokenizer_of_unknown_context_encodes_in_one_pass_and_refuses_streams() -> None:
    model = WholeClips(width=8, depth=1).eval()
    model.context = None
    model.encode(pixels(1, 100, 8, 8))
    assert model.frames == 100
    for stream in (model.encode_stream([pixels(1, 4, 8, 8)]), model.decode_stream([torch.zeros(1, 1, 1, 1).long()])):
        with pytest.raises(ValueError, match="may depend on the whole clip") as refusal:
            next(stream)
        assert "\n" not in str(refusal.value)


MEMORY = """
import json, sys, torch
from tokenizer import VQ3D

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

def frames(count):
    while count > 0:
        yield torch.randint(0, 256, (1, min(count, 9), 64, 64, 3), dtype=torch.uint8)
        count -= 9

tokenizer = VQ3D(name=sys.argv[1], width=8, depth=1).eval()
peaks = {}
for count in (100, 1000, 5000):
    total = tokenizer.frames_that_fit(count)
    parts = tokenizer.encode_stream(frames(total))
    assert sum(part.shape[1] for part in tokenizer.decode_stream(parts)) == total
    peaks[f"{count} frames"] = peak()
tokenizer.encode_piece(torch.cat(list(frames(tokenizer.frames_that_fit(1000))), 1))
peaks["1000 in one pass"] = peak()
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc of Linux")
@pytest.mark.parametrize(
    "name", ["vq3d-causal-2x8x8-fsq1000", pytest.param("vq3d-2x8x8-fsq1000", marks=pytest.mark.soak)]
)
def test_memory_does_not_grow_with_the_length_of_a_stream(name: str) -> None:
    """The peak is VmHWM, because getrusage includes the parent's peak. The malloc settings make malloc return freed memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert peaks["1000 frames"] < 1.1 * peaks["100 frames"]
    # The pixels of 5,000 frames alone are 61 MB.
    assert peaks["5000 frames"] < 1.1 * peaks["100 frames"]
    assert peaks["1000 in one pass"] > 1.2 * peaks["100 frames"]
