"""Find the videos with the most similar features, and write a page with moving pictures."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from data.clips import ClipCuts, iter_clips, read_clip
from data.files import sha256_of
from data.recorded import locate
from data.schema import conform
from data.sources import Source, Video
from pipelines.engine.checkpoints import file_hash
from pipelines.engine.console import say
from pipelines.engine.device import start_accelerator
from pipelines.engine.preprocessing import model_digest, model_folder
from pipelines.engine.run import Run
from pipelines.engine.run_files import environment_of, find_run, summary_of
from pipelines.engine.summaries import Extraction
from pipelines.evaluation.retrieval import PROTOCOL, Retrieval, stored_retrieval
from pipelines.inference.feature_files import FeatureFolder, Row
from pipelines.inference.feature_vectors import FeatureVectors
from pipelines.inference.neighbours import nearest_videos, open_index
from pipelines.inference.video_model import load_model
from pipelines.inference.window_clips import WindowClips, recorded_clip
from pipelines.inference.windows import feature_computation, window_clip, windows_of_videos
from pipelines.reporting.search_page import Cut, write_search_page
from pipelines.settings.search import Search


@dataclass(frozen=True)
class _Query:
    """Window whose neighbours are searched.

    `number`: its row, None for a video file; `features_F`: features of the file, (1, F); `cut`: cuts the clip of the file.
    """

    row: Row
    number: int | None
    features_F: np.ndarray
    cut: Cut | None = None


def main(config: Search, settings: str) -> dict[str, Any]:
    """Search, write the page, and return the summary."""
    began = time.perf_counter()
    place = find_run(config.features, "extract_features", "--features")
    recorded = summary_of(place)
    extraction: Extraction = conform(recorded, Extraction, f"{place}/summary.json")
    if extraction["pool"] == "none":
        raise ValueError(f"--features {place}: holds all tokens (--pool none); a search needs --pool clip or slices")
    accelerator = start_accelerator(extraction["precision"])
    vectors = FeatureVectors(FeatureFolder(place))
    if len(vectors) != extraction["windows"]:
        expected = f"expected {extraction['windows']} as its summary says"
        raise ValueError(f"--features {place}: has {len(vectors)} windows, {expected}")
    number = _row_of(config.query, vectors, place)
    identity = sha256_of(recorded)
    about = sha256_of([identity, file_hash(Path(config.query)) if number is None else number])
    run = Run("search", config, settings, about=about)
    if not run.finished:
        if number is None:
            query = _query_of_file(config, extraction, place, accelerator)
        else:
            query = _Query(vectors.rows[number], number, vectors.features(number))
    if not run.begin_unless_finished(accelerator):
        return run.summary()
    # One process searches. The others end.
    if not accelerator.is_main_process:
        return {}
    summary = _search(accelerator, config, query, vectors, extraction, identity, run.folder)
    return run.finish_alone({**summary, "seconds": round(time.perf_counter() - began, 1)})


def _search(
    accelerator: Accelerator,
    config: Search,
    query: _Query,
    vectors: FeatureVectors,
    extraction: Extraction,
    identity: str,
    folder: Path,
) -> dict[str, Any]:
    """Search, write the page into a folder, and return the summary. `identity`: that of the features."""
    tell = partial(say, accelerator)
    place = vectors.folder.folder
    clips = _clips(place, extraction)
    own = _own_video(query, config, vectors, clips)
    if own is not None and len(vectors.videos) == 1:
        raise ValueError(f"--features {place}: has no other video than that of the query")
    index = open_index(vectors, identity, tell)
    nearest = nearest_videos(index, vectors, vectors.scaling.unit(query.features_F)[0], config.k, own)
    quality = stored_retrieval(vectors, identity, tell)
    notes = _notes(quality)
    page = folder / "search.html"
    summary = {
        "features": str(place),
        "query": {**_shown(query.row), "row": query.number},
        "page": str(page),
        "nearest": [{**_shown(vectors.rows[row]), "similarity": round(similarity, 4)} for row, similarity in nearest],
        **quality,
        "protocol": PROTOCOL,
        "notes": notes,
        "windows": len(vectors),
        "videos": len(vectors.videos),
        "index": {"kind": "exact" if index.recall is None else "faiss", "recall": index.recall},
    }
    for note in notes:
        tell(note)
    cuts = [query.cut or _cut(clips, query.row), *(_cut(clips, vectors.rows[row]) for row, _ in nearest)]
    write_search_page(page, summary, extraction, cuts)
    tell(f"open {page}")
    return summary


def _row_of(query: str, vectors: FeatureVectors, place: Path) -> int | None:
    """Return the row that a query names, or None for a video file. Raises a ValueError if it is neither."""
    for number, row in enumerate(vectors.rows):
        if row.path == query:
            return number
    is_number = query.isascii() and query.isdecimal()
    if is_number and int(query) < len(vectors):
        return int(query)
    if Path(query).is_file():
        return None
    if is_number:
        raise ValueError(f"--query {query}: must be a row of {place}, from 0 to {len(vectors) - 1}, or a video")
    raise ValueError(f"--query {query}: is neither a video in the index of {place}, nor a row, nor a file")


def _query_of_file(config: Search, extraction: Extraction, place: Path, accelerator: Accelerator) -> _Query:
    """Compute the features of a video file as those of the folder were computed.

    Raises:
        ValueError: if the model is gone or has changed, or the file cannot be used.
    """
    started_in = environment_of(place).get("folder")
    model_place = Path(locate(extraction["model"], place, *([started_in] if isinstance(started_in, str) else [])))
    weights = model_folder(model_place) / "model.safetensors"
    if not weights.exists():
        raise ValueError(f"--query {config.query}: the model of {place} is gone: {weights}; a row needs no model")
    if (found := model_digest(model_place)) != extraction["weights"]:
        change = f"the hash of its files was {extraction['weights'][:12]}, is now {found[:12]}"
        raise ValueError(f"--features {place}: are of another model than {model_place} now is: {change}")
    model = load_model(model_place, tokenizer=config.tokenizer, trust=config.trust).to(accelerator.device)
    layers = len(model.objective.encoder.blocks)
    if not 1 <= extraction["layer"] <= layers:
        raise ValueError(f"{place}/summary.json: layer must be from 1 to {layers}, got {extraction['layer']}")
    file = Path(config.query).absolute()
    video = Video(file.name, file.stat().st_size)
    source, clip = Source(file.stem, file.parent, (video,)), window_clip(recorded_clip(place, extraction), "middle")
    compute = feature_computation(accelerator, model, extraction["layer"], extraction["pool"])

    def cut(video: Video) -> Iterator[np.ndarray | ClipCuts]:
        return iter_clips(source, video, clip)

    (window,) = windows_of_videos(model, [video], cut, compute, workers=0, dense=False)
    if window.damage is not None:
        raise ValueError(f"--query {config.query}: {window.damage}")
    if list(window.results[0].shape) != extraction["shape"]:
        shapes = f"{list(window.results[0].shape)}, expected {extraction['shape']}"
        raise ValueError(f"--query {config.query}: has features of another shape than {place}: {shapes}")
    if not np.isfinite(window.results[0]).all():
        raise ValueError(f"--query {config.query}: its features are not finite")
    (row,) = window.rows
    shown = Row(config.query, None, None, None, row.view, row.start, row.end)
    return _Query(shown, None, window.results[0].reshape(1, -1), lambda: read_clip(source, video, clip, 0))


def _clips(place: Path, extraction: Extraction) -> WindowClips | str:
    """Return the clips of the windows, or why they cannot be cut again."""
    try:
        return WindowClips(place, extraction)
    except (OSError, ValueError) as error:
        return str(error)


def _cut(clips: WindowClips | str, row: Row) -> Cut:
    def cut() -> np.ndarray:
        if isinstance(clips, str):
            raise ValueError(clips)
        return clips.read(row)

    return cut


def _own_video(query: _Query, config: Search, vectors: FeatureVectors, clips: WindowClips | str) -> int | None:
    """Return the number of the video of the query, None if it is not in the folder."""
    if query.number is not None:
        return int(vectors.video_N[query.number])
    path = None if isinstance(clips, str) else clips.path_of(Path(config.query))
    return vectors.videos.index(path) if path in vectors.videos else None


def _notes(quality: Retrieval) -> list[str]:
    notes = []
    if quality["queries"] < quality["eligible"]:
        of = f"{quality['queries']:,} of {quality['eligible']:,}"
        notes.append(f"{of} windows of labelled videos are queries, spread evenly")
    if quality["groups"]:
        notes.append("the videos have groups: for recall and mean average precision, the group of a query is left out")
    if quality["single"]:
        beside = " outside their group" if quality["groups"] else ""
        notes.append(f"{quality['single']:,} labelled windows have no other video of their label{beside}: not queries")
    if quality["recall"] is None and not quality["single"]:
        notes.append("the videos have no labels, so there is no recall")
    return notes


def _shown(row: Row) -> dict[str, Any]:
    return {"path": row.path, "label": row.label, "start": row.start, "end": row.end}
