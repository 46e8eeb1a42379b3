"""Types of the JSON files of a run that pages and later commands read, to check files that somebody else may have made.

A file may hold further fields.
"""

from typing import Any, Literal, TypedDict

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


class TrainedInSteps(TypedDict, total=False):
    """Part of the summary of a tokenizer that was trained, and not fitted in closed form."""

    step: int


class TokenizerTraining(TrainedInSteps):
    """summary.json of train_tokenizer and fit_tokenizer."""

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
    per_class: dict[str, dict[str, float]]


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


class LearnedFeatures(TypedDict, total=False):
    """Part of the row of a tokenizer if it was pre-trained on; means are over seeds."""

    untrained_linear: Mean
    linear: Mean
    untrained_attentive: Mean
    attentive: Mean
    bytes_per_clip: int


class TokenizerScore(LearnedFeatures):
    """Row of a tokenizer in the summary of evaluate_tokenizer; other means are over clips."""

    number: str
    name: str
    source: str
    psnr: Mean
    ssim: Mean
    lpips: Mean | None
    rfvd: float | None
    flicker: Mean
    code_usage: float
    perplexity: float
    bits_per_pixel: float
    encode: float
    decode: float
    memory_mib: float


class PixelBaselines(TypedDict, total=False):
    """Accuracies without a network, beside those of pre-trained networks."""

    one_frame: Mean
    motion_energy: Mean
    chance: float
    n: int
    page: str


class TokenizerEvaluation(PixelBaselines):
    """summary.json of evaluate_tokenizer."""

    tokenizers: list[TokenizerScore]


class ComparedRun(TypedDict):
    """summary.json of a training run of a comparison, as far as its row shows it."""

    objective: str
    seconds: float
    bits_per_code: float | None
    clips_per_second: float
    peak_memory: int


class CurvePoint(Mean):
    """Accuracy of the linear probe during training."""

    step: int
    seconds: float


class GainOverSeeds(TypedDict):
    """Difference in accuracy from the untrained network."""

    mean: float
    ahead: bool | None


class Lead(GainOverSeeds):
    """Difference in accuracy of the two best entries."""

    best: str
    second: str
    stderr: float | None
    sampling: float | None
    tied: bool


class ComparedGains(TypedDict):
    """Gains of an entry by the probes that rank."""

    attentive: GainOverSeeds
    linear: GainOverSeeds


class ComparedLayers(TypedDict):
    """Accuracies of each layer."""

    attentive: list[Mean]
    linear: list[Mean]


class ComparedEntry(TypedDict):
    """Row of an entry in the table of a comparison."""

    entry: str
    conditioning: str
    steps: int
    clips: int
    warmup: int
    peak_memory: int
    bits_per_code: float | None
    seconds: Mean
    clips_per_second: Mean
    attentive: Mean
    linear: Mean
    knn: Mean
    untrained_attentive: Mean
    untrained_linear: Mean
    gain: ComparedGains
    layers: ComparedLayers
    curve: list[CurvePoint]


class ComparedLeads(TypedDict):
    """Leads by the probes that rank; None for a single entry."""

    attentive: Lead | None
    linear: Lead | None


class ComparisonDoubts(TypedDict, total=False):
    """Parts of the summary of a comparison that earlier versions did not write."""

    notes: dict[str, list[str]]
    in_pretraining: int | None


class Comparison(ComparisonDoubts):
    """summary.json of compare."""

    table: list[ComparedEntry]
    leads: ComparedLeads
    budget: str
    seeds: int
    folds: int
    chance: float
    one_frame: Mean
    motion_energy: Mean


class Extraction(TypedDict):
    """summary.json of extract_features. Windows are cut with `clip` from the videos in `source`, or come from `cache`."""

    model: str
    weights: str
    source: str | None
    cache: str | None
    clip: dict[str, Any]
    windows: int
    shape: list[int]
    layer: int
    pool: Literal["clip", "slices", "none"]
    precision: Literal["fp32", "bf16"]


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
