"""A tokenizer turns uint8 clips into codes and back, each clip on its own; the same weights give the same codes and the same
fingerprint wherever they are loaded; learned codebooks change in training only."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenizer import VQ3D, VideoTokenizer, load_tokenizer
from tokenizer.base import to_float, to_uint8
from tokenizer.blocks import depth_to_space, space_to_depth

QUANTIZERS = ["fsq", "ema-vq"]


def pixels(clips: int = 3, frames: int = 4, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    """Random clips in blocks of one colour, uint8 (B, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (clips, frames // 2, height // 4, width // 4, 3), generator=generator)
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (fine + torch.randint(0, 20, fine.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def build(quantizer: str = "fsq", *, fitted: bool = True, **changes: Any) -> VQ3D:
    """A tiny tokenizer in evaluation mode whose codes differ between clips; a learned codebook has seen two batches."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "stride": (2, 4, 4),
        "width": 8,
        "depth": 1,
        "levels": (5, 3),
        "codebook_size": 16,
        "codebook_channels": 4,
    }
    tokenizer = VQ3D(quantizer=quantizer, **{**small, **changes})  # type: ignore[arg-type]
    with torch.no_grad():
        for p in tokenizer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        tokenizer.encoder[-1].weight.mul_(4)
    if quantizer == "ema-vq" and fitted:
        for seed in (10, 11):
            tokenizer.train()(to_float(pixels(8, seed=seed)))
    return tokenizer.eval()


def state(tokenizer: VQ3D) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tokenizer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_and_clips_have_the_promised_shapes_and_types(quantizer: str) -> None:
    tokenizer = build(quantizer)
    codes = tokenizer.encode(pixels())
    assert codes.dtype == torch.int64 and codes.shape == (3, 2, 2, 3)
    assert codes.shape[1:] == tokenizer.codes_shape(4, 8, 12)
    clips = tokenizer.decode(codes)
    assert clips.dtype == torch.uint8 and clips.shape == (3, 4, 8, 12, 3)
    assert not codes.requires_grad and not clips.requires_grad


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_are_within_the_vocabulary_and_say_something(quantizer: str) -> None:
    tokenizer = build(quantizer)
    assert tokenizer.vocab_size == {"fsq": 15, "ema-vq": 16}[quantizer]
    codes = tokenizer.encode(pixels(16))
    assert codes.min() >= 0 and codes.max() < tokenizer.vocab_size
    assert len(codes.unique()) > 4


@pytest.mark.parametrize("quantizer, levels, codebook", [("fsq", (5, 3), None), ("ema-vq", None, (16, 4))])
def test_a_tokenizer_tells_the_geometry_of_its_codes(
    quantizer: str, levels: tuple[int, ...] | None, codebook: tuple[int, int] | None
) -> None:
    tokenizer = build(quantizer)
    assert tokenizer.levels == levels
    vectors = tokenizer.codebook()
    assert (None if vectors is None else tuple(vectors.shape)) == codebook


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8])
def test_pixels_that_are_not_uint8_are_refused_by_type(quantizer: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        build(quantizer).encode(pixels().to(dtype))


def test_every_grey_level_survives_the_way_to_float_and_back() -> None:
    grey = torch.arange(256, dtype=torch.uint8)
    floats = to_float(grey)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), grey)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_of_a_clip_do_not_depend_on_its_neighbours(quantizer: str) -> None:
    tokenizer = build(quantizer)
    one, other = pixels(6, seed=1), pixels(6, seed=2)
    mixed = torch.cat([one[:2], other[2:]])
    assert torch.equal(tokenizer.encode(one)[:2], tokenizer.encode(mixed)[:2])
    assert not torch.equal(tokenizer.encode(one)[2:], tokenizer.encode(mixed)[2:])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_encoding_draws_nothing(quantizer: str) -> None:
    tokenizer = build(quantizer)
    clips = pixels(4)
    before, generator = state(tokenizer), torch.get_rng_state()
    first = tokenizer.encode(clips)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)
    assert torch.equal(tokenizer.encode(clips), first)
    assert same(state(tokenizer), before)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_was_decoded_can_be_encoded(quantizer: str) -> None:
    tokenizer = build(quantizer)
    decoded = tokenizer.decode(torch.randint(0, tokenizer.vocab_size, (4, 2, 2, 3)))
    assert len(decoded.unique()) > 16
    again = tokenizer.encode(decoded)
    assert again.shape == (4, 2, 2, 3)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_reconstruction_of_forward_is_what_its_codes_decode_to(quantizer: str) -> None:
    tokenizer = build(quantizer)
    clips = pixels()
    out = tokenizer(to_float(clips))
    assert torch.equal(out["codes"], tokenizer.encode(clips))
    assert out["video"].shape == clips.shape
    assert out["quantizer"].shape == ()
    difference = to_uint8(out["video"]).int() - tokenizer.decode(out["codes"]).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.01


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_code_decodes_to_something_else(quantizer: str) -> None:
    tokenizer = build(quantizer)
    codes = torch.arange(tokenizer.vocab_size).view(-1, 1, 1, 1)
    vectors = tokenizer.quantizer.vectors(codes.flatten())
    expected = tokenizer.vocab_size if quantizer == "fsq" else len(tokenizer.quantizer.codebook().unique(dim=0))
    assert len(vectors.unique(dim=0)) == expected
    assert len(tokenizer.decode(codes).flatten(1).unique(dim=0)) > expected // 2


def test_the_digits_of_fsq_codes_are_those_of_its_levels() -> None:
    tokenizer = build(levels=(5, 3))
    vectors = tokenizer.quantizer.vectors(torch.arange(15)).view(3, 5, 2)
    assert torch.allclose(vectors[:, :, 0], torch.linspace(-1, 1, 5).expand(3, 5))
    assert torch.allclose(vectors[:, :, 1], torch.linspace(-1, 1, 3)[:, None].expand(3, 5))


@pytest.mark.parametrize("stride", [(2, 4, 4), (1, 2, 3), (4, 1, 1), (1, 1, 1)])
def test_space_to_depth_and_back_is_the_identity(stride: tuple[int, int, int]) -> None:
    clip = torch.randn(2, 4, 8, 12, 3)
    packed = space_to_depth(clip, stride)
    t, h, w = stride
    assert packed.shape == (2, 3 * t * h * w, 4 // t, 8 // h, 12 // w)
    assert torch.equal(depth_to_space(packed, stride), clip)
    block = clip[1, -t:, -h:, :w]
    assert torch.equal(packed[1, :, -1, -1, 0].sort().values, block.flatten().sort().values)


@pytest.mark.parametrize("clip, codes", [((4, 8, 12), (2, 2, 3)), ((2, 4, 4), (1, 1, 1))])
def test_the_grid_of_codes_is_the_clip_divided_by_the_stride(
    clip: tuple[int, int, int], codes: tuple[int, int, int]
) -> None:
    assert build().codes_shape(*clip) == codes


@pytest.mark.parametrize("clip", [(3, 8, 8), (4, 6, 8), (4, 8, 9), (0, 8, 8), (-2, 8, 8)])
def test_a_clip_that_the_stride_does_not_divide_is_refused_with_its_numbers(clip: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{clip[0]} frames of {clip[1]}x{clip[2]}.*2, 4, 4"):
        build().codes_shape(*clip)


def test_a_width_that_is_not_a_multiple_of_eight_is_refused() -> None:
    with pytest.raises(ValueError, match="12"):
        VQ3D(width=12)


@pytest.mark.parametrize("changes", [{"quantizer": "lfq"}, {"levels": (2, 2, 2)}])
def test_a_quantizer_that_does_not_exist_or_levels_that_it_cannot_take_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        VQ3D(**{"width": 8, **changes})


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_saved_tokenizer_loads_with_equal_fingerprint_and_codes(tmp_path: Path, quantizer: str) -> None:
    tokenizer = build(quantizer)
    tokenizer.save_pretrained(tmp_path / "model")
    clips = pixels()
    for loaded in [
        VQ3D.from_pretrained(tmp_path / "model", strict=True).eval(),
        load_tokenizer(str(tmp_path / "model")),
        load_tokenizer(str(tmp_path)),  # the run folder
    ]:
        assert isinstance(loaded, VideoTokenizer)
        assert torch.equal(loaded.encode(clips), tokenizer.encode(clips))
        assert torch.equal(loaded.decode(loaded.encode(clips)), tokenizer.decode(tokenizer.encode(clips)))
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert (loaded.stride, loaded.levels, loaded.vocab_size) == (
            tokenizer.stride,
            tokenizer.levels,
            tokenizer.vocab_size,
        )


def test_load_tokenizer_gives_a_frozen_one_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build().train().save_pretrained(tmp_path)
    capsys.readouterr()
    loaded = load_tokenizer(str(tmp_path))
    assert not any(module.training for module in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert capsys.readouterr().out == ""


def test_an_id_on_the_hub_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(source: str, **_: Any) -> VQ3D:
        asked.append(source)
        return build()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VQ3D, "from_pretrained", fetch)
    assert not load_tokenizer("someone/tokenizer").training
    assert asked == ["someone/tokenizer"]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_fingerprint_changes_with_any_weight(quantizer: str) -> None:
    tokenizer = build(quantizer)
    seen = {tokenizer.fingerprint()}
    assert tokenizer.fingerprint() in seen
    for count, value in enumerate(tokenizer.state_dict().values(), start=2):
        last = (-1,) * value.ndim
        before = value[last].clone()
        value[last] = ~before if value.dtype == torch.bool else before + 1e-3
        seen.add(tokenizer.fingerprint())
        assert len(seen) == count
        value[last] = before
    assert tokenizer.fingerprint() in seen and len(seen) == len(tokenizer.state_dict()) + 1


def test_the_fingerprint_changes_with_architecture_even_at_equal_weights() -> None:
    found = {
        build(**changes).fingerprint() for changes in [{}, {"stride": (4, 2, 4)}, {"levels": (3, 5)}, {"depth": 2}]
    }
    assert len(found) == 4


def test_the_fingerprint_is_the_same_in_every_process_and_mode() -> None:
    tokenizer = build()
    assert tokenizer.fingerprint() == build().train().requires_grad_(False).fingerprint()
    assert len(tokenizer.fingerprint()) == 64


def test_evaluation_never_changes_a_learned_codebook() -> None:
    tokenizer = build("ema-vq")
    before = state(tokenizer)
    tokenizer.encode(pixels(8, seed=3))
    tokenizer(to_float(pixels(8, seed=4)))
    tokenizer.decode(torch.zeros(1, 2, 2, 3, dtype=torch.long))
    assert same(state(tokenizer), before)


def test_evaluation_does_not_invent_a_codebook_that_was_never_trained() -> None:
    """Else the codes would depend on what happens to be encoded first. Refusing is fine too."""
    tokenizer = build("ema-vq", fitted=False)
    before = state(tokenizer)
    with contextlib.suppress(ValueError):
        tokenizer.encode(pixels(8))
    assert same(state(tokenizer), before)


def test_training_starts_a_learned_codebook_and_keeps_moving_it() -> None:
    tokenizer = build("ema-vq", fitted=False).train()
    assert not tokenizer.codebook().any()
    for seed in range(3):
        before = tokenizer.codebook().clone()
        tokenizer(to_float(pixels(16, seed=seed)))
        assert not torch.equal(tokenizer.codebook(), before)
    assert len(tokenizer.codebook().unique(dim=0)) > 8


def test_a_reloaded_codebook_is_not_started_again(tmp_path: Path) -> None:
    tokenizer = build("ema-vq")
    tokenizer.save_pretrained(tmp_path)
    loaded = VQ3D.from_pretrained(tmp_path, strict=True)
    clips = to_float(pixels(8, seed=7))
    for model in (tokenizer, loaded):
        torch.manual_seed(3)
        model.train()(clips)
    assert same(state(loaded), state(tokenizer))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_gradients_of_the_reconstruction_reach_the_encoder(quantizer: str) -> None:
    tokenizer = build(quantizer).train()
    clips = to_float(pixels(8))
    (tokenizer(clips)["video"] - clips).square().mean().backward()
    for name, p in tokenizer.encoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_few_steps_of_training_reconstruct_better(quantizer: str) -> None:
    tokenizer = build(quantizer, fitted=False, width=16).train()
    clips = to_float(pixels(8))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        out = tokenizer(clips)
        error = (out["video"] - clips).square().mean()
        optimizer.zero_grad()
        (error + out["quantizer"]).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 2


def damaged(folder: Path, how: str) -> Path:
    """A folder that holds no tokenizer."""
    if how == "missing":
        return folder / "missing"
    if how == "empty":
        return folder
    if how == "empty run":
        (folder / "model").mkdir()
        return folder
    if how == "a file":
        (folder / "weights.bin").write_bytes(b"x")
        return folder / "weights.bin"
    build().save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    known = json.loads(config.read_text())
    if how == "foreign config":
        config.write_text(json.dumps({"architectures": ["ViTModel"], "hidden_size": 768}))
    elif how == "other width":
        config.write_text(json.dumps({**known, "width": 16}))
    elif how == "cut config":
        config.write_text(config.read_text()[:20])
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "empty",
        "empty run",
        "a file",
        "foreign config",
        "other width",
        "cut config",
        "no weights",
        "cut weights",
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line_with_its_name(tmp_path: Path, how: str) -> None:
    source = str(damaged(tmp_path, how))
    with pytest.raises(ValueError) as error:
        load_tokenizer(source)
    message = str(error.value)
    assert message.startswith(source) and len(message) > len(source) + 10
    assert "\n" not in message and len(message) < len(source) + 400
