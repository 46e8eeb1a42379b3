"""Types of the JSON files of a run that pages and later commands read, to check files that somebody else may have made.

A file may hold further fields.
"""

from typing import TypedDict

Plain = str | int | float | None


class Mean(TypedDict):
    """Mean with its standard error; None if the error is unknown."""

    mean: float
    stderr: float | None


class PixelLosses(TypedDict, total=False):
    """Losses that only some objectives have, on the validation clips."""

    motion: float
    pixel_baseline: float


class Pretraining(PixelLosses):
    """summary.json of pretrain_ar."""

    objective: str
    cache: str
    tokenizer: str
    step: int
    loss: float
    bits_per_code: float | None
    unigram_bits: float | None
    seconds: float
    clips_per_second: float


class TokenizerTraining(TypedDict):
    """summary.json of train_tokenizer."""

    step: int
    psnr: float
    code_usage: float
    perplexity: float
    seconds: float


class Gain(TypedDict):
    """Difference in accuracy from the untrained network."""

    mean: float
    sampling: float | None
    ahead: bool | None


class AttentiveTraining(TypedDict):
    """Length of the training of an attentive probe."""

    steps: int
    epochs: float


class ProbeFeatures(TypedDict, total=False):
    """Accuracies in the summary of a probe, of which some may be missing."""

    attentive: Mean
    knn: Mean
    untrained_attentive: Mean
    motion_energy: Mean
    one_frame: Mean
    layers: list[Mean]
    untrained_layers: list[Mean]
    attentive_layers: list[Mean]
    gain: dict[str, Gain]
    attentive_training: AttentiveTraining
    in_pretraining: int | None
    notes: list[str]


class Probing(ProbeFeatures):
    """summary.json of a probe."""

    cache: str
    linear: Mean
    untrained: Mean
    chance: float
    folds: int
    n: Plain
    seeds: Plain
    skipped: Plain
    unlabelled: Plain
    layer: Plain
    protocol: Plain


class OfACache(TypedDict, total=False):
    """summary.json of any command that reads or makes a cache."""

    cache: str


class Environment(TypedDict):
    """environment.json."""

    pipeline: str
    command: list[str]
    started: str
    device: str
    processes: int
    python: str
    versions: dict[str, str | None]
