"""evaluate_tokenizer gives the numbers of an independent calculation, for any tokenizer, and refuses mistakes."""

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.clip_spec import ClipSpec
from data.files import write_json
from data.source_clips import held_out_clips
from data.sources import load_source
from pipelines.evaluation.tokenizer_memory import memory_of
from tests.helpers.commands import TINIEST, Call
from tests.pipelines.commands.test_commands_bad_input import write_video
from tests.tokenizer.test_torchscript import pair, write
from tokenizer import VQ3D, VideoTokenizer, load_tokenizer
from tokenizer.lpips import load_lpips
from tokenizer.measures import frechet_distance

VIDEOS = "builtin:moving-digits:8:3"
CLIP = ["--videos", VIDEOS, "--clip.frames", "6", "--clip.size", "32"]
NAMES = ["vq3d-2x8x8-fsq240", "vq3d-causal-4x8x8-lfq64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained tokenizers: `plain`, `causal`, and `huge`, which has a hundred times as many weights."""
    path = tmp_path_factory.mktemp("tokenizers")
    for file, name, settings in (
        ("plain", NAMES[0], {"width": 8}),
        ("causal", NAMES[1], {"width": 8}),
        ("huge", NAMES[0], {}),
    ):
        torch.manual_seed(0)
        tokenizer = VQ3D(name=name, depth=1, **{"width": 256, **settings})
        with torch.no_grad():
            for parameter in tokenizer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        tokenizer.save_pretrained(path / file)
    return path


@pytest.fixture
def evaluate(call: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call` in an empty folder, with short speed measurements, and without memory measurements, which start a process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.evaluation.tokenizer_metrics._SECONDS", 0.001)
    monkeypatch.setattr("pipelines.commands.evaluate_tokenizer.memory_of", lambda *_: 3 * 2**20)
    return call


def by_hand(tokenizer: VideoTokenizer, pixels_BTHWC: Tensor) -> dict[str, Any]:
    """Expected numbers of a tokenizer, computed with NumPy."""
    frames, (t, h, w) = pixels_BTHWC.shape[1], tokenizer.stride
    padded_frames = 9 if tokenizer.causal else frames
    padded = torch.cat([pixels_BTHWC] + [pixels_BTHWC[:, -1:]] * (padded_frames - frames), 1)
    codes = torch.stack([tokenizer.encode(clip[None])[0] for clip in padded])
    decoded = tokenizer.decode(codes)[:, :frames].numpy().astype(float)
    pixels = pixels_BTHWC.numpy().astype(float)
    psnr = [10 * math.log10(255**2 / np.square(a - b).mean()) for a, b in zip(pixels, decoded, strict=True)]
    flicker = [np.abs(np.diff(a, axis=0) - np.diff(b, axis=0)).mean() for a, b in zip(pixels, decoded, strict=True)]
    counts = np.unique(codes.numpy(), return_counts=True)[1]
    share = counts / counts.sum()
    codes_per_clip = math.ceil(padded_frames / t) * (32 // h) * (32 // w)
    return {
        "psnr": {"mean": np.mean(psnr), "stderr": np.std(psnr, ddof=1) / len(psnr) ** 0.5},
        "flicker": {"mean": np.mean(flicker), "stderr": np.std(flicker, ddof=1) / len(flicker) ** 0.5},
        "code_usage": len(counts) / tokenizer.vocab_size,
        "dead_codes": tokenizer.vocab_size - len(counts),
        "perplexity": math.exp(-(share * np.log(share)).sum()),
        "bits_per_pixel": codes_per_clip * math.log2(tokenizer.vocab_size) / (frames * 32 * 32),
        "frames": padded_frames,
    }


def numbers(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows without the numbers that differ from run to run."""
    measured = ("encode", "decode", "memory_mib")
    return [{k: v for k, v in row.items() if k not in measured} for row in summary["tokenizers"]]


def test_numbers_equal_an_independent_calculation(evaluate: Call, folder: Path) -> None:
    sources = [str(folder / "plain"), str(folder / "causal")]
    summary = evaluate("evaluate_tokenizer", "--tokenizers", *sources, *CLIP, "--batch_size", "2")
    pixels_BTHWC = held_out_clips(load_source(VIDEOS), ClipSpec(frames=6, size=32), 96, {})
    assert summary["clips"] == len(pixels_BTHWC) == 3
    for source, name, row in zip(sources, NAMES, summary["tokenizers"], strict=True):
        tokenizer = load_tokenizer(source)
        assert (row["source"], row["name"], row["fingerprint"]) == (source, name, tokenizer.fingerprint())
        expected = by_hand(tokenizer, pixels_BTHWC)
        assert 3 < expected["perplexity"] < tokenizer.vocab_size
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
        assert -1 < row["ssim"]["mean"] < 1 and row["ssim"]["stderr"] > 0
        assert (row["lpips"], row["rfvd"], row["memory_mib"]) == (None, None, 3)
        assert row["encode"] > 0 and row["decode"] > 0


def test_it_prints_a_table_and_json_and_writes_pictures_and_a_movie(evaluate: Call, folder: Path) -> None:
    flags = ["--tokenizers", str(folder / "plain"), str(folder / "causal"), *CLIP]
    summary = evaluate("evaluate_tokenizer", *flags)
    head, plain, causal, last = evaluate.out.splitlines()
    assert head.split()[:3] == ["tokenizer", "PSNR", "dB"] and "SSIM" in head and "LPIPS" not in head
    for line, row in zip((plain, causal), summary["tokenizers"], strict=True):
        assert line.split()[:2] == [row["number"], row["name"]] and line.endswith(row["source"])
        assert f"{row['psnr']['mean']:.4g} ± {row['psnr']['stderr']:.2g}" in line
    assert json.loads(last) == summary == json.loads(Path(summary["run"], "summary.json").read_text())
    samples = Path(summary["run"], "samples")
    pictures = [f"{number:02d}-{name}.png" for number, name in enumerate(NAMES)]
    assert sorted(path.name for path in samples.iterdir()) == [*pictures, "all.mp4"]
    pixels_BTHWC = held_out_clips(load_source(VIDEOS), ClipSpec(frames=6, size=32), 96, {}).numpy()
    for picture in pictures:
        grid = np.asarray(Image.open(samples / picture))
        assert grid.shape == (3 * 3 * 32, 8 * 32, 3)
        assert np.array_equal(grid[:32, :32], pixels_BTHWC[0, 0])
    with av.open(str(samples / "all.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (3 * 6, 8 * 32, 8 * 3 * 32, 3), "the clips and both reconstructions side by side"
    assert np.abs(frames[:, 4::8, 4 : 8 * 32 : 8].astype(int) - pixels_BTHWC.reshape(-1, 32, 32, 3)).mean() < 4

    printed = evaluate.out
    assert evaluate("evaluate_tokenizer", *flags) == summary
    assert evaluate.out == printed and "nothing is left to do" in evaluate.err
    hostile = [{**summary["tokenizers"][0], "perplexity": 10**400}]
    file = Path(summary["run"], "summary.json")
    write_json(file, {**summary, "tokenizers": hostile})
    assert f"{file}: tokenizers[0].perplexity" in evaluate("evaluate_tokenizer", *flags)
    write_json(file, summary)
    config = str(Path(summary["run"], "config.yaml"))
    again = evaluate("evaluate_tokenizer", "--config", config, "--out", "again")
    assert numbers(again) == numbers(summary)


def test_a_run_folder_of_train_tokenizer_is_a_tokenizer(evaluate: Call) -> None:
    trained = evaluate("train_tokenizer", *TINIEST, "--model.name", "vq3d-2x8x8-emavq16", "--out", "run")
    flags = TINIEST[TINIEST.index("--videos") :]
    (row,) = evaluate("evaluate_tokenizer", "--tokenizers", "run", *flags)["tokenizers"]
    assert row["psnr"]["mean"] == pytest.approx(trained["psnr"], abs=1e-4), "the same as in its validation"
    assert row["dead_codes"] == trained["dead_codes"]


def test_one_clip_has_no_standard_error(evaluate: Call, folder: Path) -> None:
    summary = evaluate("evaluate_tokenizer", "--tokenizers", str(folder / "plain"), *CLIP, "--clips", "1")
    assert summary["clips"] == 1
    assert summary["tokenizers"][0]["psnr"]["stderr"] is None
    assert "±" not in evaluate.out


def test_bf16_is_close_to_fp32(evaluate: Call, folder: Path) -> None:
    flags = ["--tokenizers", str(folder / "plain"), *CLIP]
    (fp32,) = evaluate("evaluate_tokenizer", *flags)["tokenizers"]
    (bf16,) = evaluate("evaluate_tokenizer", *flags, "--precision", "bf16")["tokenizers"]
    assert bf16["psnr"]["mean"] == pytest.approx(fp32["psnr"]["mean"], abs=0.5)


# --- metrics that need weight files


def test_lpips_uses_the_weights_in_the_folder(evaluate: Call, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    places, channels = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, 128, 128, 256, 256, 256, *[512] * 6)
    vgg = {}
    for place, before, after in zip(places, (3, *channels), channels, strict=False):
        vgg[f"features.{place}.weight"] = torch.randn(after, before, 3, 3) * (2 / (9 * before)) ** 0.5
        vgg[f"features.{place}.bias"] = torch.zeros(after)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    flags = ["--tokenizers", str(folder / "plain"), *CLIP, "--clip.frames", "2", "--lpips", str(tmp_path)]
    (row,) = evaluate("evaluate_tokenizer", *flags)["tokenizers"]
    tokenizer, lpips = load_tokenizer(str(folder / "plain")), load_lpips(tmp_path)
    pixels_BTHWC = held_out_clips(load_source(VIDEOS), ClipSpec(frames=2, size=32), 96, {})
    pairs = zip(pixels_BTHWC, tokenizer.decode(tokenizer.encode(pixels_BTHWC)), strict=True)
    expected = [lpips(*(x.permute(0, 3, 1, 2) / 127.5 - 1 for x in pair)).mean().item() for pair in pairs]
    assert min(expected) > 0
    assert row["lpips"]["mean"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert row["lpips"]["stderr"] == pytest.approx(np.std(expected, ddof=1) / 3**0.5, rel=1e-3)
    assert "LPIPS" in evaluate.out.splitlines()[0]


class Colours(nn.Module):
    """A detector whose features are the mean of each colour and its mean squared change."""

    def forward(self, video: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return torch.cat([video.mean((2, 3, 4)), video.diff(dim=2).square().mean((2, 3, 4))], 1)


def test_the_detector_runs_only_if_it_is_trusted(evaluate: Call, folder: Path, tmp_path: Path) -> None:
    torch.jit.script(Colours()).save(str(tmp_path / "i3d.pt"))
    flags = ["--tokenizers", str(folder / "plain"), *CLIP, "--clip.frames", "10", "--detector", "i3d.pt"]
    line = evaluate("evaluate_tokenizer", *flags)
    assert "i3d.pt" in line and "--trust" in line
    assert not Path("runs").exists()
    (row,) = evaluate("evaluate_tokenizer", *flags, "--trust")["tokenizers"]
    tokenizer = load_tokenizer(str(folder / "plain"))
    pixels = held_out_clips(load_source(VIDEOS), ClipSpec(frames=10, size=32), 96, {})
    both = [x.permute(0, 4, 1, 2, 3) / 127.5 - 1 for x in (pixels, tokenizer.decode(tokenizer.encode(pixels)))]
    expected = frechet_distance(*(Colours()(x, False, True, True) for x in both))
    assert expected > 0.01
    assert row["rfvd"] == pytest.approx(expected, rel=1e-4)
    assert "rFVD" in evaluate.out.splitlines()[0]


# --- memory


def test_memory_grows_with_the_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring process must not import modules from the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("json", "tokenize", "tokenizer", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')")
    cpu = torch.device("cpu")
    plain, huge = (memory_of(str(folder / name), False, (2, 6, 32, 32, 3), cpu, False) for name in ("plain", "huge"))
    weights = sum(p.nbytes for p in load_tokenizer(str(folder / "huge")).parameters())
    assert 0 < plain < huge
    assert weights > 2**22 and huge > weights


def test_memory_that_cannot_be_measured_is_one_line() -> None:
    """The error is the last line that the measuring process printed."""
    with pytest.raises(ValueError, match=r"^nowhere: .* ValueError: nowhere[^\n]*$"):
        memory_of("nowhere", False, (1, 2, 8, 8, 3), torch.device("cpu"), False)


def test_a_program_is_evaluated_by_its_relative_path(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that measures memory gets the same relative path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.evaluation.tokenizer_metrics._SECONDS", 0.001)
    write(tmp_path / "pair", *pair())
    flags = ["--tokenizers", "torchscript:pair", *CLIP]
    line = call("evaluate_tokenizer", *flags)
    assert "encoder.jit" in line and "--trust" in line
    assert not Path("runs").exists()
    summary = call("evaluate_tokenizer", *flags, "--trust")
    (row,) = summary["tokenizers"]
    assert (row["name"], row["frames"]) == ("torchscript-4x8x16-60", 9)
    assert row["memory_mib"] > 0
    pixels_BTHWC = held_out_clips(load_source(VIDEOS), ClipSpec(frames=6, size=32), 96, {})
    expected = by_hand(load_tokenizer("torchscript:pair", trust=True), pixels_BTHWC)
    assert row["psnr"]["mean"] == pytest.approx(expected["psnr"]["mean"], rel=1e-5)
    assert call("evaluate_tokenizer", *flags, "--trust") == summary, "--trust does not change the run folder"


# --- mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "tokenizers"),
        (["--tokenizers"], "tokenizers at least one"),
        (["--tokenizers", "nowhere"], "nowhere"),
        (["--tokenizers", "PLAIN", "nowhere"], "nowhere"),
        (["--tokenizers", "gan:here"], "'gan'"),
        (["--tokenizers", "taming:nowhere"], "nowhere"),
        (["--tokenizers", "PLAIN", "--clips", "0"], "clips 0"),
        (["--tokenizers", "PLAIN", "--batch_size", "0"], "batch_size 0"),
        (["--tokenizers", "PLAIN", "--clip.views", "dense"], "clip.views dense"),
        (["--tokenizers", "PLAIN", "--clip.fps", "8", "--videos", "builtin:moving-digits:9:2"], "clip.fps builtin: 8"),
        (["--tokenizers", "PLAIN", "--clip.size", "36"], "36x36 vq3d-2x8x8-fsq240 height multiple"),
        (["--tokenizers", "PLAIN", "--videos", "nowhere"], "nowhere"),
        (["--tokenizers", "PLAIN", "--lpips", "nowhere"], "nowhere LPIPS"),
        (["--tokenizers", "PLAIN", "--detector", "nowhere.pt", "--trust"], "nowhere.pt"),
        (["--tokenizers", "PLAIN", "--tokeniser", "x"], "tokeniser"),
        (["--tokenizers", "linear-2x8x8-99x99", *CLIP], "linear-2x8x8-99x99 64"),
        (["--tokenizers", "PLAIN", "--pretrain", "-1"], "pretrain -1"),
        (["--tokenizers", "PLAIN", "--pretrain", "1", "--videos", "one"], "pretrain two labels, got 0: one"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_folder(evaluate: Call, folder: Path, flags: list[str], words: str) -> None:
    write_video(Path("one", "video.mp4"))
    line = evaluate("evaluate_tokenizer", *[str(folder / "plain") if flag == "PLAIN" else flag for flag in flags])
    assert line.startswith("evaluate_tokenizer: error: ")
    assert [word for word in words.split() if word not in line] == []
    assert not Path("runs").exists()


def test_a_damaged_video_is_skipped_and_named(evaluate: Call, folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_video(tmp_path / "videos" / "train" / f"{number}.mp4", value=number)
    for number in range(3):
        write_video(tmp_path / "videos" / "val" / f"{number}.mp4", frames=8, value=9 * number)
    (tmp_path / "videos" / "val" / "1.mp4").write_bytes(b"no video")
    flags = ["--tokenizers", str(folder / "plain"), "--videos", "videos", *CLIP[2:]]
    summary = evaluate("evaluate_tokenizer", *flags)
    assert (summary["clips"], summary["skipped"]) == (2, 1)
    (line,) = [line for line in evaluate.err.splitlines() if line.startswith("skipped ")]
    assert line.startswith("skipped val/1.mp4: ") and len(line) > len("skipped val/1.mp4: ")


def test_only_damaged_videos_is_one_line(evaluate: Call, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "only.mp4").touch()
    line = evaluate("evaluate_tokenizer", "--tokenizers", str(folder / "plain"), "--videos", "videos", *CLIP[2:])
    assert "only.mp4" in line
