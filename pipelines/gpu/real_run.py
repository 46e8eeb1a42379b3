"""Part 9: a real run in the time that is left: tokenize, pre-train a small ARVideo, probe it."""

from collections.abc import Iterator
from typing import Any

from pipelines.benchmarks import Row, comparison
from pipelines.gpu.commands import ROOT, start, summary
from pipelines.gpu.part import Setting, run
from pipelines.gpu.videos import videos_folder

NEEDED = 90.0
"""Seconds that the shortest run takes."""
RESERVED = 60.0
"""Seconds kept for the probe and for the start of the commands."""


def measure(setting: Setting) -> Iterator[Row]:
    """Yield the results of the commands tokenize, pretrain_ar and probe on the videos."""

    def command(name: str, *flags: object) -> dict[str, Any]:
        return summary(start(setting, name, *flags), setting)

    if setting.left() < NEEDED:
        yield Row("real run", "", f"not run: {setting.left():.0f} s are left, {NEEDED:.0f} s are needed")
        return
    # The built-in set has enough videos for a probe, and needs no decoding.
    videos = videos_folder(setting) if setting.videos else "builtin:moving-digits" + (":64:16" if setting.dry else "")
    quick = ["--steps", 4, "--batch_size", 4, "--model.width", 16, "--model.depth", 1] if setting.dry else []
    tokenizer = command("train_tokenizer", "--videos", videos, *quick, "--out", "tokenizer")
    yield Row(f"tokenizer after {tokenizer['step']:,} steps, held-out PSNR", "dB", tokenizer["psnr"])
    cache = command("tokenize", "--videos", videos, "--tokenizer", "tokenizer", "--caches", "real-run")
    yield Row("codes that the tokenizer uses", "", cache["codes_used"] / cache["vocab_size"])
    size = "tiny" if setting.dry else "small"
    flags = ["--config", ROOT / "pipelines" / "configs" / size / "arvideo.yaml", "--cache", cache["cache"]]
    flags += ["--batch_size", 8 if setting.dry else 64]
    short = command("pretrain_ar", *flags, "--steps", 2 if setting.dry else 100, "--out", "speed")
    yield Row(f"pre-training of {size}/arvideo", "clips/s", short["clips_per_second"])
    left = max(0.0, setting.left() - RESERVED)
    steps = 4 if setting.dry else max(100, int(0.8 * left * short["clips_per_second"] / 64))
    trained = command("pretrain_ar", *flags, "--steps", steps, "--out", "trained")
    yield comparison(
        f"held-out bits per code after {steps:,} steps",
        "bits",
        trained["bits_per_code"],
        trained["unigram_bits"],
        "unigram",
    )
    probe = command("probe", "--run", "trained", "--caches", "real-run", "--seeds", 1 if setting.dry else 3)
    accuracies = [name for name, value in probe.items() if isinstance(value, dict) and "mean" in value]
    for name in accuracies:
        yield Row(f"probe accuracy, {name}, {probe['n']} clips", "", probe[name]["mean"], probe[name]["stderr"])
    yield Row("probe accuracy, chance", "", probe["chance"])


if __name__ == "__main__":
    run(measure)
