"""Preprocessing of a pre-trained model's input: clips and tokenizer. A run records it in the folder of its model."""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from data.cache import TokenCache
from data.cache.manifest import Clip
from data.cache.storage import is_address
from data.clip_spec import ClipSpec
from data.files import sha256_of, write_json
from data.recorded import locate, to_record
from data.schema import conform
from pipelines.engine.checkpoints import file_hash
from pipelines.engine.recorded_tokenizer import load_recorded_tokenizer, locate_tokenizer, recorded_tokenizer
from pipelines.engine.run_files import cache_of, read_json
from tokenizer import VQ3D, Linear, VideoTokenizer, load_tokenizer

FILE = "preprocessing.json"
_COPY = "tokenizer"
"""Folder with a copy of the tokenizer, in the folder of a model."""
_MAX_PIXELS = 2**28
"""Most pixels of a batch of the tokenizer that is read from a file."""


class _Content(TypedDict):
    """preprocessing.json."""

    clip: Clip
    tokenizer: str
    fingerprint: str
    precision: Literal["fp32", "bf16"]
    encode_batch: int
    cache: str
    key: str


@dataclass(frozen=True)
class Preprocessing:
    """Clips and tokenizer of the cache that a model was trained on.

    `tokenizer`: source of `load_tokenizer`; `fingerprint`: that of the tokenizer; `precision`, `encode_batch`: precision of the
    tokenizer and clips of a call, which change single codes; `cache`, `key`: folder or address of the cache, and its key.
    """

    clip: ClipSpec
    tokenizer: str
    fingerprint: str
    precision: Literal["fp32", "bf16"]
    encode_batch: int
    cache: str
    key: str

    @classmethod
    def of(cls, cache: TokenCache) -> "Preprocessing":
        """Return the preprocessing of a cache."""
        address = cache.address if cache.remote else to_record(cache.address)
        spec = cache.spec
        return cls(
            clip=cache.clip,
            tokenizer=recorded_tokenizer(cache),
            fingerprint=spec["tokenizer"],
            precision=spec["precision"],
            encode_batch=spec["encode_batch"],
            cache=address,
            key=cache.key,
        )

    @classmethod
    def read(cls, folder: Path) -> "Preprocessing":
        """Read the preprocessing from the folder of a model. Raises a ValueError if the file is malformed."""
        content: _Content = conform(read_json(folder / FILE), _Content, f"{folder}/{FILE}")
        try:
            clip = ClipSpec(**content["clip"])  # type: ignore[arg-type]  # a list becomes a tuple
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}/{FILE}: clip: {error}") from None
        # The file may be of somebody else, and a batch is in memory.
        most = max(1, _MAX_PIXELS // (clip.frames * clip.size**2))
        if not 1 <= content["encode_batch"] <= most:
            limits = f"expected a number from 1 to {most} for these clips"
            raise ValueError(f"{folder}/{FILE}: encode_batch is {content['encode_batch']}, {limits}")
        return cls(
            clip=clip,
            tokenizer=content["tokenizer"],
            fingerprint=content["fingerprint"],
            precision=content["precision"],
            encode_batch=content["encode_batch"],
            cache=content["cache"],
            key=content["key"],
        )

    def open_cache(self, folder: Path) -> TokenCache:
        """Open the cache, where it is now. Raises a ValueError if it is gone, or another cache is in its place.

        `folder`: folder of the model, near which the cache is looked for.
        """
        address = self.cache if is_address(self.cache) else locate(self.cache, folder)
        cache = TokenCache.open(address)
        if cache.key != self.key:
            raise ValueError(
                f"{address}: is not the cache of {folder}: its key is {cache.key[:12]}, expected {self.key[:12]}"
            )
        return cache

    def write(self, folder: Path) -> None:
        """Write the preprocessing into the folder of a model."""
        write_json(folder / FILE, {**asdict(self), "clip": self.clip.to_json()})


def model_folder(folder: str | Path) -> Path:
    """Return the folder of the model, for a run folder or the folder of a model."""
    model = Path(folder) / "model"
    return model if model.is_dir() else Path(folder)


def preprocessing_of(folder: Path) -> Preprocessing:
    """Read the preprocessing of a run or of the folder of a model.

    Raises:
        ValueError: if it is malformed, or the run is of an earlier version, which has recorded only its cache, and that is gone.
    """
    model = model_folder(folder)
    if (model / FILE).exists():
        return Preprocessing.read(model)
    if not (folder / "summary.json").exists():
        raise ValueError(f"{folder}: has no {FILE}, which tells how clips are cut and tokenized")
    return Preprocessing.of(TokenCache.open(cache_of(folder)))


def model_digest(folder: Path) -> str:
    """Return a hash of everything that determines what a model computes: weights, configuration and preprocessing."""
    model = model_folder(folder)
    return sha256_of(
        [file_hash(model / name) for name in ("config.json", "model.safetensors", FILE) if (model / name).exists()]
    )


def record_preprocessing(cache: TokenCache, folder: Path, *, copy_tokenizer: bool) -> None:
    """Write the preprocessing of a cache into the folder of a model.

    `copy_tokenizer`: copy the tokenizer, too, if it is one of this project, so that the folder can be used anywhere. A tokenizer
    that is not found, or is of another kind, is only recorded.
    """
    Preprocessing.of(cache).write(folder)
    if not copy_tokenizer:
        return
    try:
        tokenizer = load_recorded_tokenizer(cache, trust=False)
    except ValueError:
        return
    if isinstance(tokenizer, VQ3D | Linear):
        tokenizer.save_pretrained(folder / _COPY)


def published(folder: Path, upload: Path) -> list[str]:
    """Copy the preprocessing and the tokenizer of a model into a folder that is made public, without paths of this machine.

    Returns sentences about what the public folder lacks. The folder of a tokenizer has neither of the two.
    """
    if not (folder / FILE).exists():
        return []
    recorded = Preprocessing.read(folder)
    has_copy = (folder / _COPY).is_dir()
    if has_copy:
        shutil.copytree(folder / _COPY, upload / _COPY)
    name = _COPY if has_copy else Path(recorded.tokenizer).name
    replace(recorded, tokenizer=name, cache=Path(recorded.cache).name).write(upload)
    if has_copy:
        return []
    return [f"the upload has no tokenizer ({name}): if the model reads codes, its users must give one to load_model"]


def tokenizer_source(folder: Path, preprocessing: Preprocessing) -> str:
    """Return the source of the tokenizer of a model: the copy in the folder of the model, or the recorded place."""
    copy = folder / _COPY
    return str(copy) if copy.is_dir() else locate_tokenizer(preprocessing.tokenizer, folder)


def load_tokenizer_of(folder: Path, preprocessing: Preprocessing, source: str | None, *, trust: bool) -> VideoTokenizer:
    """Load the tokenizer of a model.

    Args:
        folder: folder of the model.
        source: where the tokenizer is; None takes the copy in the folder, or the recorded place.
        trust: allow a tokenizer that contains code.

    Raises:
        ValueError: if it is not found, cannot be read, or is not the tokenizer of the model.
    """
    source = tokenizer_source(folder, preprocessing) if source is None else source
    try:
        tokenizer = load_tokenizer(source, trust=trust, download=False)
    except ValueError as error:
        raise ValueError(f"the tokenizer of {folder} does not load (--tokenizer names its place): {error}") from None
    if tokenizer.fingerprint() != preprocessing.fingerprint:
        expected = preprocessing.fingerprint[:12]
        found = tokenizer.fingerprint()[:12]
        raise ValueError(f"{source}: is not the tokenizer of {folder}: its fingerprint is {found}, expected {expected}")
    return tokenizer
