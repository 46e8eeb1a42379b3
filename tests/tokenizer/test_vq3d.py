"""VQ3D turns uint8 clips into codes and back, each clip independently, and refuses other input. A code depends only on the
frames within its context. A code of a causal tokenizer does not depend on later frames."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from tests.helpers.small_tokenizers import QUANTIZERS, SIZES, build, one_rounding_apart, pixels
from tokenizer import VQ3D
from tokenizer.base import to_float, to_uint8

SHAPES = list(itertools.product(SIZES, ["", "-causal"], ["space", "haar"]))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("causal", ["", "-causal"])
def test_codes_and_clips_have_the_promised_shapes_and_types(quantizer: str, causal: str) -> None:
    tokenizer = build(f"vq3d{causal}-2x4x4-{quantizer}")
    frames = 5 if causal else 6
    codes = tokenizer.encode(pixels(4, frames))
    assert codes.dtype == torch.int64 and codes.shape == (4, 3, 2, 3)
    assert codes.shape[1:] == tokenizer.codes_shape(frames, 8, 12)
    clips = tokenizer.decode(codes)
    assert clips.dtype == torch.uint8 and clips.shape == (4, frames, 8, 12, 3)
    assert not codes.requires_grad and not clips.requires_grad


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_are_in_the_vocabulary_and_differ(quantizer: str) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}")
    codes = tokenizer.encode(pixels(16))
    assert codes.min() >= 0 and codes.max() < tokenizer.vocab_size
    assert len(codes.unique()) > 4


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.usefixtures("two_threads")
def test_codes_of_a_clip_do_not_depend_on_other_clips(quantizer: str) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}")
    one, other = pixels(6, seed=1), pixels(6, seed=2)
    mixed = torch.cat([one[:2], other[2:]])
    assert torch.equal(tokenizer.encode(one)[:2], tokenizer.encode(mixed)[:2])
    assert not torch.equal(tokenizer.encode(one)[2:], tokenizer.encode(mixed)[2:])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_reconstruction_of_forward_equals_its_decoded_codes(quantizer: str) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}")
    clips = pixels()
    out = tokenizer(clips)
    assert torch.equal(out["codes"], tokenizer.encode(clips))
    assert out["video"].shape == clips.shape and out["video"].is_floating_point()
    assert out["quantizer"].shape == ()
    assert one_rounding_apart(to_uint8(out["video"]), tokenizer.decode(out["codes"]))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_different_codes_decode_to_different_pixels(quantizer: str) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}")
    decoded = tokenizer.decode(torch.arange(tokenizer.vocab_size).view(-1, 1, 1, 1))
    assert len(decoded.flatten(1).unique(dim=0)) > tokenizer.vocab_size * 3 // 4


def test_every_grey_level_is_the_same_after_conversion_to_float_and_back() -> None:
    grey = torch.arange(256, dtype=torch.uint8)
    floats = to_float(grey)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), grey)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


# --- invalid input


@pytest.mark.parametrize("causal", ["", "-causal"])
@pytest.mark.parametrize(
    "wrong, reason",
    [
        (pixels(1, 5) / 255, "float32"),
        (pixels(1, 5).float(), "float32"),
        (torch.full((1, 5, 8, 12, 3), torch.nan), "float32"),
        (pixels(1, 5).double() / 127.5 - 1, "float64"),
        (pixels(1, 5).half(), "float16"),
        (pixels(1, 5).long(), "int64"),
        (pixels(1, 5).to(torch.int8), "int8"),
        (pixels(1, 5) > 100, "bool"),
        (pixels(1, 5)[0], "clips, frames, height, width, 3"),
        (pixels(1, 5)[None], "clips, frames, height, width, 3"),
        (pixels(1, 5).movedim(-1, 1), "clips, frames, height, width, 3"),
        (pixels(1, 5)[..., :1], "clips, frames, height, width, 3"),
    ],
)
def test_pixels_of_another_dtype_or_shape_are_refused(causal: str, wrong: Tensor, reason: str) -> None:
    tokenizer = build(f"vq3d{causal}-2x4x4-fsq240")
    with pytest.raises(ValueError, match=reason):
        tokenizer.encode(wrong)
    if wrong.ndim == 5 and wrong.shape[-1] == 3:
        with pytest.raises(ValueError):
            tokenizer(wrong)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda codes, v: codes - 1, "-1"),
        (lambda codes, v: codes.index_fill(2, torch.tensor(1), v), "{v}"),
        (lambda codes, v: codes + 2**40, str(2**40)),
        (lambda codes, v: codes.float(), "float32"),
        (lambda codes, v: codes.double() + 0.5, "float64"),
        (lambda codes, v: codes > 0, "bool"),
        (lambda codes, v: codes.to(torch.complex64), "complex64"),
        (lambda codes, v: codes[0], r"\(3, 2, 2\)"),
        (lambda codes, v: codes.flatten(1), r"\(1, 12\)"),
        (lambda codes, v: codes[:, :0], r"\(1, 0, 2, 2\)"),
        (lambda codes, v: codes[..., :0], r"\(1, 3, 2, 0\)"),
    ],
)
def test_invalid_codes_are_refused(quantizer: str, make: object, reason: str) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}")
    codes = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=reason.replace("{v}", str(tokenizer.vocab_size))):
        tokenizer.decode(make(codes, tokenizer.vocab_size))  # type: ignore[operator]


@pytest.mark.parametrize("quantizer", ["fsq1000", "emavq1000", "lfq1024", "simvq1000"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
def test_codes_of_any_integer_dtype_decode_to_the_same_pixels(quantizer: str, dtype: torch.dtype) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}")
    codes = torch.arange(100).view(4, 1, 5, 5)
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))


# --- sizes


@pytest.mark.parametrize("causal", ["", "-causal"])
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_frames_and_codes_agree_for_clips_of_any_length(causal: str, stride: int) -> None:
    tokenizer = VQ3D(name=f"vq3d{causal}-{stride}x8x8-fsq240", width=8, depth=0)
    lead = 1 if causal else 0
    for codes in range(1, 41):
        frames = tokenizer.frames_of(codes)
        assert frames == (1 + (codes - 1) * stride if causal else codes * stride)
        assert tokenizer.codes_shape(frames, 16, 8) == (codes, 2, 1)
    fit = [frames for frames in range(1, 60) if frames >= lead and (frames - lead) % stride == 0]
    for frames in range(1, 41):
        assert tokenizer.frames_that_fit(frames) == min(good for good in fit if good >= frames)
        if frames in fit:
            assert tokenizer.codes_shape(frames, 8, 8) == ((frames - lead) // stride + lead, 1, 1)
            continue
        with pytest.raises(ValueError) as refusal:
            tokenizer.codes_shape(frames, 8, 8)
        below = [good for good in fit if good < frames][-1:]
        above = [good for good in fit if good > frames][:1]
        named = re.findall(r"\d+", re.findall(r"\((.*) would do\)", str(refusal.value))[0])
        assert list(map(int, named)) == below + above


@pytest.mark.parametrize(
    "causal, clip, reason",
    [
        ("", (3, 8, 8), r"frames must be a multiple of 2 \(2 or 4 would do\)$"),
        ("", (0, 8, 8), r"frames must be a multiple of 2 \(2 would do\)$"),
        ("", (-2, 8, 8), r"frames must be a multiple of 2 \(2 would do\)$"),
        ("-causal", (4, 8, 8), r"frames must be 1 \+ a multiple of 2 \(3 or 5 would do\)$"),
        ("-causal", (0, 8, 8), r"frames must be 1 \+ a multiple of 2 \(1 or 3 would do\)$"),
        ("", (4, 6, 8), r"height must be a multiple of 4 \(4 or 8 would do\)$"),
        ("", (4, 8, 9), r"width must be a multiple of 8 \(8 or 16 would do\)$"),
        ("", (4, 0, 8), r"height must be a multiple of 4 \(4 would do\)$"),
        ("", (1, 9, 7), r"frames .*\(2 would do\); height .*\(8 or 12 would do\); width .*\(8 would do\)$"),
    ],
)
def test_the_error_for_a_clip_that_does_not_fit_names_the_nearest_sizes(
    causal: str, clip: tuple[int, int, int], reason: str
) -> None:
    tokenizer = VQ3D(name=f"vq3d{causal}-2x4x8-fsq240", width=8, depth=0)
    frames, height, width = clip
    message = f"{frames} frames of {height}x{width} does not fit {tokenizer.name}: {reason}"
    with pytest.raises(ValueError, match=message):
        tokenizer.codes_shape(*clip)
    if min(clip) >= 0:
        for call in (tokenizer.encode, tokenizer):
            with pytest.raises(ValueError, match=reason):
                call(torch.zeros(1, *clip, 3, dtype=torch.uint8))


# --- context of a code


@pytest.mark.parametrize("size, causal, stem", SHAPES)
def test_a_changed_frame_changes_only_codes_within_the_context(size: str, causal: str, stem: str) -> None:
    tokenizer = build(f"vq3d{size}{causal}-2x4x4-fsq240", stem=stem)
    left, right = tokenizer.context
    clip = pixels(6, tokenizer.frames_of(30))
    codes = tokenizer.encode(clip)
    beyond = set()
    for place in (0, 1, 14, 29):
        changed = clip.clone()
        changed[:, tokenizer.frames_of(place + 1) - 1] ^= 0xFF
        different = (tokenizer.encode(changed) != codes).any(0).flatten(1).any(1).nonzero().flatten()
        assert different.min() >= place - right and different.max() <= place + left
        beyond |= {int(other - place) for other in different}
    assert 0 in beyond and 1 in beyond
    assert (min(beyond) < 0) != bool(causal)


@pytest.mark.parametrize("size, causal, stem", SHAPES)
def test_a_changed_code_changes_only_frames_within_the_context(size: str, causal: str, stem: str) -> None:
    tokenizer = build(f"vq3d{size}{causal}-2x4x4-fsq240", stem=stem)
    left, right = tokenizer.context
    codes = torch.randint(240, (6, 30, 2, 3), generator=torch.Generator().manual_seed(0))
    video = tokenizer.decode(codes)
    beyond = set()
    for place in (0, 1, 14, 29):
        changed = codes.clone()
        changed[:, place] = (changed[:, place] + 101) % 240
        frames = (tokenizer.decode(changed) != video).flatten(2).any(2).any(0).nonzero().flatten()
        places = {tokenizer.codes_shape(tokenizer.frames_that_fit(int(frame) + 1), 4, 4)[0] - 1 for frame in frames}
        assert min(places) >= place - right and max(places) <= place + left
        beyond |= {other - place for other in places}
    assert 0 in beyond and 1 in beyond
    assert (min(beyond) < 0) != bool(causal)


@pytest.mark.parametrize("size, stem", itertools.product(SIZES, ["space", "haar"]))
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_first_frame_of_a_causal_video_has_the_codes_of_an_image(size: str, stem: str, stride: int) -> None:
    tokenizer = build(f"vq3d{size}-causal-{stride}x8x8-fsq240", stem=stem)
    video = pixels(5, tokenizer.frames_of(7), 16, 24)
    codes = tokenizer.encode(video)
    assert codes.shape[1] == 7
    assert torch.equal(codes[:, :1], tokenizer.encode(video[:, :1]))
    assert one_rounding_apart(tokenizer.decode(codes)[:, :1], tokenizer.decode(codes[:, :1]))
    assert len(codes[:, :1].unique()) > 4


@pytest.mark.parametrize("size, stem", itertools.product(SIZES, ["space", "haar"]))
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_of_a_causal_tokenizer_do_not_depend_on_later_frames(size: str, stem: str, quantizer: str) -> None:
    """They do not depend on the number of later frames either. In the same way, decoded frames do not depend on later codes."""
    tokenizer = build(f"vq3d{size}-causal-2x4x4-{quantizer}", stem=stem)
    video, other = pixels(4, 17, seed=1), pixels(4, 17, seed=2)
    codes = tokenizer.encode(video)
    decoded = tokenizer.decode(codes)
    for count in (1, 2, 5, 8):
        frames = tokenizer.frames_of(count)
        mixed = tokenizer.encode(torch.cat([video[:, :frames], other[:, frames:]], 1))
        assert torch.equal(mixed[:, :count], codes[:, :count])
        assert not torch.equal(mixed[:, count:], codes[:, count:])
        assert torch.equal(tokenizer.encode(video[:, :frames]), codes[:, :count])
        assert torch.equal(tokenizer.decode(mixed)[:, :frames], decoded[:, :frames])
        assert one_rounding_apart(tokenizer.decode(codes[:, :count]), decoded[:, :frames])


def test_codes_of_a_new_tokenizer_do_not_depend_on_other_times() -> None:
    """Convolutions in time are initialised to zero."""
    torch.manual_seed(0)
    tokenizer = VQ3D(name="vq3d-small-2x4x4-fsq1000", width=16).eval()
    clip = pixels(4, 8)
    alone = torch.cat([tokenizer.encode(piece) for piece in clip.split(2, 1)], 1)
    assert torch.equal(tokenizer.encode(clip), alone)


# --- training


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("causal, stem", [("", "space"), ("-causal", "haar")])
def test_gradients_of_the_reconstruction_reach_the_encoder(quantizer: str, causal: str, stem: str) -> None:
    tokenizer = build(f"vq3d{causal}-2x4x4-{quantizer}", stem=stem).train()
    clips = pixels(8, tokenizer.frames_of(2))
    (tokenizer(clips)["video"] - to_float(clips)).square().mean().backward()
    for name, p in tokenizer.encoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    assert tokenizer.last_layer.grad.abs().max() > 0


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("causal, stem", [("", "space"), ("-causal", "haar")])
def test_a_few_steps_of_training_reconstruct_better(quantizer: str, causal: str, stem: str) -> None:
    torch.manual_seed(0)
    tokenizer = VQ3D(name=f"vq3d{causal}-2x4x4-{quantizer}", stem=stem, width=16, depth=1).train()  # type: ignore[arg-type]
    clips = pixels(8, tokenizer.frames_of(2))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        out = tokenizer(clips)
        error = (out["video"] - to_float(clips)).square().mean()
        optimizer.zero_grad()
        (error + out["quantizer"]).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 2
