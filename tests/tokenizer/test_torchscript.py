"""TorchScript tokenizers give the codes and pixels of the exported modules, check declarations, and need trust to load."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data.cache import TokenCache
from data.cache.layout import CodeLayout
from pipelines.engine.encoding import DecodedClip, Encoder
from tests.helpers.commands import last_line, start
from tokenizer import TorchScriptTokenizer, VideoTokenizer, load_tokenizer
from tokenizer.base import to_float, to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = (5, 3, 4)
STRIDE = (4, 8, 16)
CONFIG = {"stride": [4, 8, 16], "vocab_size": 60, "levels": [5, 3, 4], "causal": True}


class Program(nn.Module):
    def __init__(self, stride: tuple[int, int, int] = STRIDE, levels: tuple[int, ...] = LEVELS) -> None:
        super().__init__()
        self.t, self.h, self.w = stride
        self.register_buffer("levels", torch.tensor(levels))
        self.register_buffer("basis", torch.tensor([int(np.prod(levels[:n])) for n in range(len(levels))]))


class Digits(Program):
    """An encoder like that of Cosmos. It rounds the first frame, then boxes of the size of the stride, to digits of codes."""

    def __init__(self, stride: tuple[int, int, int] = STRIDE, levels: tuple[int, ...] = LEVELS) -> None:
        super().__init__(stride, levels)
        self.project = nn.Conv3d(3, len(levels), 1)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        video = torch.cat([video[:, :, :1].repeat(1, 1, self.t - 1, 1, 1), video], 2)
        boxes = F.avg_pool3d(video.float(), (self.t, self.h, self.w)).to(video.dtype)
        z = self.project(boxes).movedim(1, -1)
        digits = ((torch.tanh(z) + 1) / 2 * (self.levels - 1)).round()
        return (digits * self.basis).sum(-1).to(torch.int32), digits, digits.mean()


class Boxes(Program):
    """The decoder of `Digits`."""

    def __init__(self, stride: tuple[int, int, int] = STRIDE, levels: tuple[int, ...] = LEVELS) -> None:
        super().__init__(stride, levels)
        self.project = nn.Conv3d(len(levels), 3, 1)

    def forward(self, codes: Tensor) -> Tensor:
        digits = (codes.unsqueeze(-1) // self.basis % self.levels).movedim(-1, 1).to(self.project.weight.dtype)
        video = self.project(digits)
        video = video.repeat_interleave(self.t, 2).repeat_interleave(self.h, 3).repeat_interleave(self.w, 4)
        return video[:, :, self.t - 1 :]


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    encoder, decoder = Digits(), Boxes()
    # With smaller weights all digits would have their middle value.
    encoder.project.weight.data *= 4
    return encoder.to(dtype).eval().requires_grad_(False), decoder.to(dtype).eval().requires_grad_(False)


def write(folder: Path, encoder: nn.Module, decoder: nn.Module, config: Any = CONFIG, how: str = "script") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next((p.dtype for p in encoder.parameters()), torch.float32)
    examples = torch.zeros(1, 3, 9, 64, 96, dtype=dtype), torch.zeros(1, 3, 8, 6, dtype=torch.int32)
    for name, module, example in zip(("encoder", "decoder"), (encoder, decoder), examples, strict=True):
        exported = torch.jit.trace(module, example) if how == "trace" else torch.jit.script(module)
        torch.jit.save(torch.jit.freeze(exported) if how == "freeze" else exported, folder / f"{name}.jit")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "pair", *pair())


def refused(source: str | Path, trust: bool = True) -> str:
    """Return the one-line error of loading a folder."""
    with pytest.raises(ValueError) as error:
        load_tokenizer(f"torchscript:{source}", trust=trust)
    message = str(error.value)
    assert "\n" not in message and len(message) < 800
    assert message.startswith(str(source))
    return message


# --- parity with what was exported


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("script", torch.float32),
        ("script", torch.bfloat16),
        ("trace", torch.float32),
        ("trace", torch.bfloat16),
        # A frozen module has no parameters.
        ("freeze", torch.float32),
    ],
)
def test_an_exported_pair_gives_the_codes_and_pixels_of_the_modules(
    tmp_path: Path, long_photographs: Tensor, how: str, dtype: torch.dtype
) -> None:
    encoder, decoder = pair(dtype)
    tokenizer: Any = load_tokenizer(f"torchscript:{write(tmp_path / 'pair', encoder, decoder, how=how)}", trust=True)
    expected_Bthw = encoder(rearrange(to_float(long_photographs), "b t h w c -> b c t h w").to(dtype))[0]
    codes_Bthw = tokenizer.encode(long_photographs)
    assert codes_Bthw.dtype == torch.int64 and codes_Bthw.shape == (2, *tokenizer.codes_shape(9, 64, 96))
    assert torch.equal(codes_Bthw, expected_Bthw.long())
    # With few distinct codes, equality would prove little.
    assert len(codes_Bthw.unique()) > 10
    decoded: list[Tensor] = []
    # TorchScript modules do not support hooks.
    tokenizer.decoder = nn.Sequential(tokenizer.decoder)
    tokenizer.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
    pixels_BTHWC = tokenizer.decode(codes_Bthw)
    video_BCTHW = decoder(expected_Bthw)
    assert (decoded[0] - video_BCTHW).abs().max() <= 1e-5
    assert torch.equal(pixels_BTHWC, to_uint8(rearrange(decoded[0], "b c t h w -> b t h w c")))
    assert pixels_BTHWC.shape == long_photographs.shape
    # Several calls, since the executor of TorchScript profiles the first ones and may then fuse kernels.
    for _ in range(4):
        assert torch.equal(tokenizer.encode(long_photographs), codes_Bthw)


def test_codes_are_the_same_under_autocast(folder: Path, long_photographs: Tensor) -> None:
    tokenizer = load_tokenizer(f"torchscript:{folder}", trust=True)
    codes_Bthw = tokenizer.encode(long_photographs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(long_photographs), codes_Bthw)


@pytest.mark.parametrize("how", ["script", "freeze"])
def test_the_encoder_of_the_pipeline_works_with_it(tmp_path: Path, long_photographs: Tensor, how: str) -> None:
    """The encoder reads the device from the first parameter, but a frozen file has no parameters of its own."""
    tokenizer = load_tokenizer(f"torchscript:{write(tmp_path / 'pair', *pair(), how=how)}", trust=True)
    assert next(tokenizer.to("cpu").parameters()).device.type == "cpu"
    clips = [(None, iter([DecodedClip(clip.numpy(), {})])) for clip in long_photographs]
    videos = list(Encoder(tokenizer, batch=3, precision="bf16").videos(clips))  # type: ignore[arg-type]
    assert np.array_equal(np.concatenate([video.codes for video in videos]), tokenizer.encode(long_photographs))


def test_tokenize_works_with_it_and_trust(folder: Path, tmp_path: Path) -> None:
    flags = ["--videos", "builtin:moving-digits:4:4", "--clip.frames", "5", "--clip.size", "64"]
    answer = last_line(start(tmp_path, "tokenize", *flags, "--tokenizer", f"torchscript:{folder}", "--trust", "true"))
    cache = TokenCache.open(tmp_path / answer["cache"])
    assert cache.layout == CodeLayout((2, 8, 4), 60, 1, (LEVELS,))


def test_attributes_describe_the_codes_and_it_stays_in_evaluation_mode(folder: Path) -> None:
    tokenizer = load_tokenizer(f"torchscript:{folder}", trust=True)
    assert isinstance(tokenizer, TorchScriptTokenizer)
    assert (tokenizer.name, tokenizer.vocab_size) == ("torchscript-4x8x16-60", 60)
    assert (tokenizer.stride, tokenizer.levels, tokenizer.causal, tokenizer.context) == (STRIDE, (LEVELS,), True, None)
    assert tokenizer.codebook() is None
    nn.Sequential(tokenizer).train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(p.requires_grad for p in tokenizer.parameters())
    with pytest.raises(ValueError, match=r"frames must be 1 \+ a multiple of 4 \(5 or 9 would do\)"):
        tokenizer.encode(torch.zeros(1, 8, 64, 96, 3, dtype=torch.uint8))


def test_codes_without_levels_and_codebook_get_learned_embeddings(tmp_path: Path, make_cache: Any) -> None:
    """The pre-trained model then learns one row per code."""
    from ar_model.inputs import CodeTable
    from pipelines.engine.code_spec import code_spec

    folder = write(tmp_path / "pair", *pair(), config={**CONFIG, "levels": None})
    tokenizer = load_tokenizer(f"torchscript:{folder}", trust=True)
    assert (tokenizer.levels, tokenizer.codebook()) == (None, None)
    cache = TokenCache.open(make_cache(tmp_path, vocab_size=60, levels=None, codebook_VC=None))
    assert CodeTable(code_spec(cache), width=8).matrix().shape == (60, 8)


# --- declared properties


@pytest.mark.parametrize("name", ["DV4x8x8", "DV8x8x8", "DV8x16x16"])
@pytest.mark.parametrize("around", ["{}", "Cosmos-Tokenizer-{}", "Cosmos-Tokenize1-{}-720p"])
@pytest.mark.parametrize("config", [None, {"architectures": ["CosmosTokenizer"]}])
def test_folder_names_of_cosmos_declare_stride_and_levels(tmp_path: Path, name: str, around: str, config: Any) -> None:
    stride = tuple(map(int, name[2:].split("x")))
    levels = (8, 8, 8, 5, 5, 5)
    folder = tmp_path / around.format(name)
    write(folder, Digits(stride, levels), Boxes(stride, levels), config=config)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(f"torchscript:{folder}", trust=True)
    assert (tokenizer.stride, tokenizer.levels, tokenizer.vocab_size) == (stride, (levels,), 64000)
    assert tokenizer.causal


@pytest.mark.parametrize("name", ["pair", "CV8x8x8", "DV8x8", "DV8x16x160", "DI16x16"])
def test_a_folder_without_declaration_is_refused_with_the_fields_of_config_json(tmp_path: Path, name: str) -> None:
    assert "write a config.json with stride, vocab_size" in refused(write(tmp_path / name, *pair(), config=None))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stride": [4, 16, 8]}, "by its stride (4, 16, 8)"),
        ({"stride": [4, 8, 8]}, "by its stride (4, 8, 8)"),
        (
            {"stride": [2, 8, 16]},
            "for pixels of shape (1, 3, 64, 96, 3); expected (1, 2, 8, 6) by its stride (2, 8, 16)",
        ),
        (
            {"stride": [8, 8, 16]},
            "for pixels of shape (1, 9, 64, 96, 3); expected (1, 2, 8, 6) by its stride (8, 8, 16)",
        ),
        ({"causal": False}, "by its stride (4, 8, 16)"),
        ({"vocab_size": 15, "levels": [5, 3]}, "outside its vocabulary of 15"),
    ],
)
def test_a_wrong_declaration_is_found_on_loading(folder: Path, change: dict[str, Any], text: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    message = refused(folder)
    assert "does not work as declared" in message and text in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "exactly the fields stride, vocab_size, levels, causal"),
        ("[" * 100_000, ""),
        ("x" * 2**17, "larger than 65536 bytes"),
        (json.dumps({**CONFIG, "dtype": "bf16"}), "exactly the fields"),
        (json.dumps({"stride": [4, 8, 16], "vocab_size": 60, "causal": True}), "exactly the fields"),
        (json.dumps({**CONFIG, "stride": [4, 8]}), "stride must be three integers"),
        (json.dumps({**CONFIG, "stride": 8}), "stride must be three integers"),
        (json.dumps({**CONFIG, "stride": [4, 8, 0]}), "stride must be three integers"),
        (json.dumps({**CONFIG, "stride": [4, 8, True]}), "stride must be three integers"),
        (json.dumps({**CONFIG, "stride": [4, 8.0, 16]}), "stride must be three integers"),
        (json.dumps({**CONFIG, "vocab_size": "60"}), "vocab_size must be an integer"),
        (json.dumps({**CONFIG, "vocab_size": 10**300}), "vocab_size must be an integer"),
        (json.dumps({**CONFIG, "levels": [5, 3]}), "integers whose product is vocab_size, 60"),
        (json.dumps({**CONFIG, "levels": "534"}), "integers whose product is vocab_size, 60"),
        (json.dumps({**CONFIG, "causal": 1}), "causal must be true or false"),
    ],
    ids=range(16),
)
def test_a_wrong_config_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    message = refused(folder)
    assert message.startswith(f"{folder / 'config.json'}: ") and reason in message


def test_codes_outside_the_vocabulary_are_refused_also_after_loading(folder: Path) -> None:
    class Rare(Digits):
        def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            codes, digits, loss = super().forward(video)
            return torch.where(video.min() == 1.0, codes + 60, codes), digits, loss

    torch.jit.trace(Rare(), torch.rand(1, 3, 9, 64, 96)).save(folder / "encoder.jit")
    tokenizer = load_tokenizer(f"torchscript:{folder}", trust=True)
    with pytest.raises(ValueError, match="outside its vocabulary of 60"):
        tokenizer.encode(torch.full((1, 1, 64, 96, 3), 255, dtype=torch.uint8))


# --- the files


def test_without_trust_nothing_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self))
    assert refused(folder, trust=False) == (
        f"{folder}/encoder.jit contains code that runs when it is loaded; pass --trust if you trust its origin"
    )
    with pytest.raises(ValueError, match="encoder.jit contains code .* --trust"):
        load_tokenizer(f"torchscript:{folder}")
    assert opened == []


@pytest.mark.parametrize("name", ["encoder.jit", "decoder.jit"])
def test_a_missing_or_damaged_file_is_named(folder: Path, name: str) -> None:
    original = (folder / name).read_bytes()
    for data in (b"", b"PK\x03\x04", original[:-100], original[: len(original) // 2]):
        (folder / name).write_bytes(data)
        assert refused(folder).startswith(f"{folder / name}: does not load as TorchScript: ")
    (folder / name).unlink()
    assert refused(folder) == f"{folder / name}: no such file"


def test_files_that_were_swapped_are_refused(folder: Path) -> None:
    shutil.move(folder / "encoder.jit", folder / "x")
    shutil.move(folder / "decoder.jit", folder / "encoder.jit")
    shutil.move(folder / "x", folder / "decoder.jit")
    assert "does not work as declared" in refused(folder)


class Answer(nn.Module):
    """An encoder with a wrong kind of output, or an error."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, video: Tensor) -> Tensor:
        if self.kind == "continuous":
            return F.avg_pool3d(video, (1, 8, 16))
        if self.kind == "true or false":
            return video[:, 0, :, ::8, ::16] > 0
        raise RuntimeError("this program does not work\nat all")


class Words(nn.Module):
    def forward(self, video: Tensor) -> str:
        return "codes"


@pytest.mark.parametrize("kind", ["continuous", "true or false", "words", "broken"])
def test_an_encoder_without_integer_codes_is_refused(folder: Path, kind: str) -> None:
    torch.jit.script(Words() if kind == "words" else Answer(kind)).save(folder / "encoder.jit")
    message = refused(folder)
    assert ("returns torch.float32" in message) == (kind == "continuous")
    assert ("returns torch.bool" in message) == (kind == "true or false")
    assert ("returns str" in message) == (kind == "words")
    assert ("this program does not work" in message) == (kind == "broken")


def test_an_encoder_may_return_codes_without_a_tuple(folder: Path, long_photographs: Tensor) -> None:
    class Alone(Digits):
        def forward(self, video: Tensor) -> Tensor:
            return super().forward(video)[0]

    before: VideoTokenizer = load_tokenizer(f"torchscript:{folder}", trust=True)
    alone = Alone()
    alone.load_state_dict(pair()[0].state_dict())
    torch.jit.trace(alone, torch.rand(1, 3, 9, 64, 96)).save(folder / "encoder.jit")
    after = load_tokenizer(f"torchscript:{folder}", trust=True)
    assert torch.equal(after.encode(long_photographs), before.encode(long_photographs))


def test_the_trial_run_is_repeated_with_larger_frames(folder: Path) -> None:
    class Large(Digits):
        def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nothing = F.avg_pool2d(video[:, :, 0], 200).mean() * 0
            return super().forward(video + nothing)

    torch.jit.trace(Large(), torch.rand(1, 3, 9, 256, 384)).save(folder / "encoder.jit")
    assert load_tokenizer(f"torchscript:{folder}", trust=True).vocab_size == 60


def test_the_fingerprint_changes_with_both_files_and_the_declaration(folder: Path, tmp_path: Path) -> None:
    fingerprints = [load_tokenizer(f"torchscript:{folder}", trust=True).fingerprint()]
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_tokenizer(f"torchscript:{copy}", trust=True).fingerprint() == fingerprints[0]
    (copy / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items()))))
    assert load_tokenizer(f"torchscript:{copy}", trust=True).fingerprint() == fingerprints[0]
    (copy / "config.json").write_text(json.dumps({**CONFIG, "levels": [5, 3, 4][::-1]}))
    fingerprints.append(load_tokenizer(f"torchscript:{copy}", trust=True).fingerprint())
    for name, module in zip(("encoder", "decoder"), pair(), strict=True):
        module.project.bias.data += 1e-3  # type: ignore[union-attr]
        torch.jit.script(module).save(copy / f"{name}.jit")
        fingerprints.append(load_tokenizer(f"torchscript:{copy}", trust=True).fingerprint())
    assert len(set(fingerprints)) == 4 and all(len(text) == 64 for text in fingerprints)
