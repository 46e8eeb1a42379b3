"""Names of VQ3D tokenizers, their fingerprints, and saving and loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.small_tokenizers import build, pixels
from tokenizer import VQ3D, VideoTokenizer, load_tokenizer, loading

SAVED: list[tuple[str, dict[str, Any]]] = [
    ("vq3d-2x4x4-fsq240", {}),
    ("vq3d-causal-4x8x8-fsq1000", {"stem": "haar"}),
    ("vq3d-small-2x8x4-fsq15", {"options": {"levels": (5, 3), "spread": 0.1}}),
    ("vq3d-2x4x4-fsq240", {"options": {"preserve_symmetry": True, "noise_dropout": 0.5}, "depth": 2}),
    ("vq3d-base-causal-1x8x8-emavq16", {"options": {"decay": 0.5, "cosine": True, "channels": 3}}),
    ("vq3d-small-2x8x8-emavq16", {"stem": "haar", "width": 16, "depth": 0}),
    ("vq3d-2x8x8-lfq16", {"stem": "haar", "options": {"spherical": True}}),
    ("vq3d-2x8x8-simvq16", {"options": {"channels": 5, "rotation_trick": False}}),
]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vq3d-2x8x8-fsq1000", ((2, 8, 8), False, 1000, (8, 5, 5, 5), (2, 2))),
        ("vq3d-tiny-causal-2x8x8-fsq1000", ((2, 8, 8), True, 1000, (8, 5, 5, 5), (4, 0))),
        ("vq3d-small-1x2x32-fsq240", ((1, 2, 32), False, 240, (8, 6, 5), (4, 4))),
        ("vq3d-base-4x16x16-fsq64000", ((4, 16, 16), False, 64000, (8, 8, 8, 5, 5, 5), (6, 6))),
        ("vq3d-base-causal-32x4x8-lfq1024", ((32, 4, 8), True, 1024, (2,) * 10, (12, 0))),
        ("vq3d-small-causal-4x16x16-emavq1024", ((4, 16, 16), True, 1024, None, (8, 0))),
        ("vq3d-1x1x1-simvq7", ((1, 1, 1), False, 7, None, (2, 2))),
    ],
)
def test_a_name_defines_the_attributes(name: str, expected: tuple[Any, ...]) -> None:
    vq3d = VQ3D(name=name, width=8)
    assert vq3d.name == name.replace("-tiny", "")
    assert (vq3d.stride, vq3d.causal, vq3d.vocab_size, *(vq3d.levels or [None]), vq3d.context) == expected


def test_sizes_grow_from_tiny_to_base_and_tiny_is_the_default() -> None:
    count = {
        size: sum(p.numel() for p in VQ3D(name=f"vq3d{size}-2x8x8-fsq1000").parameters())
        for size in ("", "-tiny", "-small", "-base")
    }
    assert count[""] == count["-tiny"] < count["-small"] / 2 < count["-base"] / 4
    torch.manual_seed(0)
    default = VQ3D()
    assert default.name == "vq3d-2x8x8-fsq1000"
    torch.manual_seed(0)
    tiny = VQ3D(name="vq3d-tiny-2x8x8-fsq1000")
    assert tiny.fingerprint() == default.fingerprint()


WRONG_NAMES = [
    *("", "vq3d", "vq3d-2x8x8", "vq3d-fsq1000", "vq3d-2x8-fsq1000", "vq3d-2x8x8x8-fsq1000", "-2x8x8-fsq1000"),
    *("vq3d-2x8x8-fsq", "vq3d-2x8x8-1000", "vq3d-2x8x8-fsq1000-", "vq3d-2x8x8-fsq1000-causal"),
    # Separators.
    *("vq3d-2x8x8-fsq-1000", "vq3d-2x8x8fsq1000", "vq3d2x8x8-fsq1000", "vq3d--2x8x8-fsq1000", "vq3d_2x8x8_fsq1000"),
    *(" vq3d-2x8x8-fsq1000", "vq3d-2x8x8-fsq1000\n", "vq3d-2x8x8-fsq 1000"),
    # Sizes, order and upper case.
    *("vq3d-large-2x8x8-fsq1000", "vq3d-small-base-2x8x8-fsq1000", "vq3d-causal-small-2x8x8-fsq1000"),
    *("vq3d-causal-causal-2x8x8-fsq1000", "VQ3D-2x8x8-fsq1000", "vq3d-2X8X8-fsq1000", "vq3d-2x8x8-FSQ1000"),
    # Forms of numbers.
    *("vq3d-02x8x8-fsq1000", "vq3d-2x8x8-fsq01000", "vq3d-\u0662x8x8-fsq1000", "vq3d-2x8x8-fsq100\u0660"),
    *("vq3d-2x8x8-fsq1e3", "vq3d-2.0x8x8-fsq1000", "vq3d--2x8x-8-fsq1000"),
    # Strides.
    *("vq3d-0x8x8-fsq1000", "vq3d-2x8x0-fsq1000", "vq3d-3x8x8-fsq1000", "vq3d-2x12x8-fsq1000", "vq3d-2x8x64-fsq1000"),
    *("vq3d-128x8x8-fsq1000", "vq3d-small-2x1x8-fsq1000", "vq3d-base-2x8x2-fsq1000"),
    # Vocabularies.
    *("vq3d-2x8x8-fsq1001", "vq3d-2x8x8-fsq1", "vq3d-2x8x8-lfq1000", "vq3d-2x8x8-lfq1", "vq3d-2x8x8-emavq1"),
    *("vq3d-2x8x8-simvq1", "vq3d-2x8x8-emavq0", "vq3d-2x8x8-vq1000", "vq3d-2x8x8-emavq1048577"),
    *("vq3d-2x8x8-emavq99999999", pytest.param("vq3d-2x8x8-emavq" + 5000 * "9", id="5000 digits")),
]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_invalid_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError) as refusal:
        VQ3D(name=name, width=8)
    message = str(refusal.value)
    assert "\n" not in message and len(message) > 20
    assert name.strip() in message or name.split("-")[-1] in message


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"width": 12}, "12 is not a multiple of 8"),
        ({"width": 0}, "width 0"),
        ({"width": -8}, "width -8"),
        ({"depth": -1}, "depth -1"),
        ({"stem": "wavelet"}, "'wavelet'.*space or haar"),
        ({"options": {"decay": 0.9}}, "fsq has no option 'decay'"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        VQ3D(**{"width": 8, **settings})


@pytest.mark.parametrize("name, settings", SAVED, ids=[name for name, _ in SAVED])
def test_a_saved_tokenizer_loads_with_equal_fingerprint_and_codes(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    tokenizer = build(name, **settings)
    tokenizer.save_pretrained(tmp_path / "model")
    clips = pixels(4, tokenizer.frames_of(3), 16, 24)
    codes = tokenizer.encode(clips)
    assert len(codes.unique()) > 3
    for loaded in [
        VQ3D.from_pretrained(tmp_path / "model", strict=True).eval(),
        load_tokenizer(str(tmp_path / "model")),
        # The run folder.
        load_tokenizer(str(tmp_path)),
    ]:
        assert isinstance(loaded, VideoTokenizer)
        assert torch.equal(loaded.encode(clips), codes)
        assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
        assert loaded.fingerprint() == tokenizer.fingerprint()
        for fact in ("name", "stride", "causal", "levels", "vocab_size", "context"):
            assert getattr(loaded, fact) == getattr(tokenizer, fact), fact


def test_load_tokenizer_freezes_and_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build().train().save_pretrained(tmp_path)
    capsys.readouterr()
    loaded = load_tokenizer(str(tmp_path))
    assert not any(module.training for module in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert capsys.readouterr().out == ""


def test_a_hub_id_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = []
    build().save_pretrained(tmp_path / "snapshot")

    def snapshot_download(source: str, **_: Any) -> str:
        sources.append(source)
        return str(tmp_path / "snapshot")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    assert not load_tokenizer("someone/tokenizer").training
    assert sources == ["someone/tokenizer"]


@pytest.mark.parametrize("quantizer", ["fsq240", "emavq16", "lfq16", "simvq16"])
def test_the_fingerprint_changes_with_any_weight(quantizer: str) -> None:
    tokenizer = build(f"vq3d-2x4x4-{quantizer}")
    fingerprints = {tokenizer.fingerprint()}
    assert tokenizer.fingerprint() in fingerprints
    for count, value in enumerate(tokenizer.state_dict().values(), start=2):
        last = (-1,) * value.ndim
        before = value[last].clone()
        value[last] = ~before if value.dtype == torch.bool else before + (1 if value.dtype == torch.int64 else 1e-3)
        fingerprints.add(tokenizer.fingerprint())
        assert len(fingerprints) == count
        value[last] = before
    assert tokenizer.fingerprint() in fingerprints and len(fingerprints) == len(tokenizer.state_dict()) + 1


def test_the_fingerprint_changes_with_name_stem_and_options_even_at_equal_weights() -> None:
    """All tokenizers have weights of the same names, shapes and values."""
    names = ["vq3d-2x4x4-fsq240", "vq3d-4x2x4-fsq240", "vq3d-2x2x8-fsq240", "vq3d-causal-2x4x4-fsq240"]
    options = [{"levels": (6, 8, 5)}, {"levels": (5, 6, 8)}, {"preserve_symmetry": True}]
    tokenizers = [build(name) for name in names] + [build(options=settings) for settings in options]
    tokenizers.append(build(stem="haar"))
    weights = tokenizers[0].state_dict()
    for tokenizer in tokenizers:
        assert all(torch.equal(weights[k], v) for k, v in tokenizer.state_dict().items())
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers}) == 8
    assert build(depth=2).fingerprint() != build().fingerprint() != build(width=16).fingerprint()


def test_the_fingerprint_does_not_depend_on_mode_memory_format_or_lists_for_tuples() -> None:
    tokenizer = build(options={"levels": (8, 6, 5)})
    again = build(options={"levels": [8, 6, 5]}).train().requires_grad_(False)
    assert tokenizer.fingerprint() == again.fingerprint()
    assert len(tokenizer.fingerprint()) == 64
    tokenizer.to(memory_format=torch.contiguous_format)
    assert tokenizer.fingerprint() == again.fingerprint()


CONFIGS: dict[str, dict[str, Any]] = {
    "foreign config": {"architectures": ["ViTModel"], "hidden_size": 768},
    "other width": {"width": 16},
    "other name": {"name": "vq3d-2x4x4-fsq1000"},
    "no name": {"name": "vq3d"},
    "unknown option": {"options": {"sread": 0.1}},
    "odd option": {"options": {"spread": "0.1"}},
}


def refused(source: Path) -> None:
    """Assert that loading fails with one line that names the source."""
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(source))
    message = str(error.value)
    assert message.startswith(str(source)) and "\n" not in message
    assert len(str(source)) + 10 < len(message) < len(str(source)) + 400


@pytest.mark.parametrize("damage", ["cut config", "no weights", "cut weights", *CONFIGS])
def test_a_damaged_tokenizer_is_refused_in_one_line_with_its_name(tmp_path: Path, damage: str) -> None:
    build().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if damage == "foreign config":
        config.write_text(json.dumps(CONFIGS[damage]))
    elif damage in CONFIGS:
        config.write_text(json.dumps({**json.loads(config.read_text()), **CONFIGS[damage]}))
    elif damage == "cut config":
        config.write_text(config.read_text()[:20])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    refused(tmp_path)


def test_a_source_without_a_tokenizer_is_refused_in_one_line_with_its_name(tmp_path: Path) -> None:
    refused(tmp_path / "missing")
    refused(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin")
    (tmp_path / "model").mkdir()
    refused(tmp_path)
