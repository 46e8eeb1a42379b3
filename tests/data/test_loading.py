"""Batches: every sample once per epoch, the same for any number of processes and workers, resumed by one integer."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import TokenCache
from data.clips import ClipSpec, read_clips
from data.loading import Batch, BatchPlan, ClipDataset, Draw, TokenDataset, batches, evaluation_batches, pick_view
from data.sources import Source, load_source
from tests.helpers.caches import MakeCache

CLIP = ClipSpec(frames=4, size=16, views=3)


def draws(plan: BatchPlan, steps: range) -> list[tuple[int, float, int]]:
    """All draws of some steps in a row."""
    parts = [plan.draw(step) for step in steps]
    return [triple for d in parts for triple in zip(d.rows_B, d.view_B, d.seed_B, strict=True)]


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> TokenCache:
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("caches"), 11, views=3))


@pytest.fixture
def damaged_source(video_folder: Path, tmp_path: Path) -> Source:
    """Six good videos and two damaged ones."""
    folder = shutil.copytree(video_folder, tmp_path / "videos")
    (folder / "left" / "empty.mp4").touch()
    (folder / "right" / "text.mp4").write_text("no video")
    return load_source(str(folder))


@pytest.mark.parametrize(("samples", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3), (11, 1), (64, 6)])
def test_every_sample_comes_once_per_epoch_across_borders_of_epochs(samples: int, batch_size: int) -> None:
    plan = BatchPlan(samples=samples, batch_size=batch_size, seed=3)
    epochs = 4
    rows = [row for row, _, _ in draws(plan, range(-(-epochs * samples // batch_size)))]
    for epoch in range(epochs):
        assert sorted(rows[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_epochs_have_different_orders_and_so_do_seeds() -> None:
    plan = BatchPlan(samples=50, batch_size=50, seed=0)
    other = BatchPlan(samples=50, batch_size=50, seed=1)
    orders = [tuple(p.draw(step).rows_B) for p in (plan, other) for step in range(3)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parts_of_all_ranks_in_a_row_are_the_batch_of_one_process(world: int) -> None:
    one = BatchPlan(samples=10, batch_size=8, seed=5)
    ranks = [BatchPlan(samples=10, batch_size=8, seed=5, rank=rank, world=world) for rank in range(world)]
    for step in range(12):
        parts = [draws(plan, range(step, step + 1)) for plan in ranks]
        assert {len(part) for part in parts} == {8 // world}
        assert list(itertools.chain(*parts)) == draws(one, range(step, step + 1))


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    plan = BatchPlan(samples=10, batch_size=4, seed=2)
    forwards = [draws(plan, range(step, step + 1)) for step in range(30)]
    backwards = [draws(plan, range(step, step + 1)) for step in reversed(range(30))]
    assert forwards == backwards[::-1]


def test_seeds_differ_between_samples_epochs_and_plans() -> None:
    plans = [BatchPlan(samples=20, batch_size=10, seed=seed) for seed in (0, 1)]
    seeds = [seed for plan in plans for _, _, seed in draws(plan, range(8))]
    assert len(set(seeds)) == 2 * 8 * 10
    assert min(seeds) >= 0


def test_views_are_drawn_evenly_and_anew_in_every_epoch() -> None:
    plan = BatchPlan(samples=300, batch_size=300, seed=0)
    views = np.array([np.argsort(plan.draw(step).rows_B) for step in range(4)])
    drawn = np.array([plan.draw(step).view_B[order] for step, order in enumerate(views)])  # by sample
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.bincount((drawn * 3).astype(int).ravel(), minlength=3)
    assert np.abs(counts - 400).max() < 80
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.25


def test_pick_view_reaches_every_view_and_none_beyond() -> None:
    views = np.arange(3)
    assert [int(pick_view(views, draw)) for draw in (0.0, 0.33, 0.34, 0.66, 0.67, np.nextafter(1, 0))] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"samples": 10, "batch_size": 6, "world": 4}, r"batch_size .*\(4\), got 6"),
        ({"samples": 10, "batch_size": 2, "world": 4}, r"batch_size .*\(4\), got 2"),
        ({"samples": 10, "batch_size": 0}, "batch_size .* got 0"),
        ({"samples": 0, "batch_size": 4}, "samples .* got 0"),
    ],
)
def test_plan_that_cannot_be_is_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(seed=0, **numbers)


def test_token_batches_hold_the_drawn_view_of_the_given_rows(cache: TokenCache) -> None:
    rows = [1, 3, 5, 7, 10]
    plan = BatchPlan(samples=len(rows), batch_size=4, seed=0)
    dataset = TokenDataset(cache, rows, plan)
    seen = []
    for step in range(5):
        batch, draw = dataset[step], plan.draw(step)
        assert batch["codes_BTHW"].dtype == np.uint16, "the cache's own type, until it has left a worker"
        assert batch["seed_B"].tolist() == draw.seed_B.tolist()
        assert batch["row_B"].tolist() == [rows[i] for i in draw.rows_B]
        for codes, row, view in zip(batch["codes_BTHW"], batch["row_B"].tolist(), draw.view_B, strict=True):
            assert np.array_equal(codes, cache.codes(row)[int(3 * view)])
        seen += batch["row_B"].tolist()
    assert sorted(seen) == sorted(rows * 4)


def test_workers_change_nothing_and_a_resumed_run_goes_on_the_same(cache: TokenCache) -> None:
    dataset = TokenDataset(cache, range(11), BatchPlan(samples=11, batch_size=4, seed=1))
    straight = list(batches(dataset, range(8), workers=0))
    assert len(straight) == 8
    resumed = list(batches(dataset, range(3, 8), workers=0))
    by_workers = list(batches(dataset, range(3, 8), workers=2))
    assert len(resumed) == len(by_workers) == 5
    for expected, again, worked in zip(straight[3:], resumed, by_workers, strict=True):
        assert same(expected, again)
        assert same(expected, worked)


def test_batches_of_half_a_megabyte_leave_workers_unchanged(tmp_path: Path, make_cache: MakeCache) -> None:
    """They travel in shared memory, in the type of the cache."""
    for vocab_size in (2**16, 2**18):
        cache = TokenCache.open(make_cache(tmp_path, 5, vocab_size=vocab_size, codes_shape=(16, 64, 64)))
        dataset = TokenDataset(cache, range(5), BatchPlan(samples=5, batch_size=6, seed=1), pairs=True)
        assert dataset[0]["codes_BTHW"].nbytes > 2**19
        alone, worked = (list(batches(dataset, range(3), workers)) for workers in (0, 2))
        assert len(alone) == 3
        for one, two in zip(alone, worked, strict=True):
            assert same(one, two)
            assert two["codes_BTHW"].dtype == two["pair_BTHW"].dtype == torch.int64


def test_evaluation_takes_the_canonical_view_of_every_row_once_in_order(cache: TokenCache) -> None:
    rows = [9, 0, 4, 2, 7]
    found = list(evaluation_batches(cache, rows, 2))
    assert [len(batch["codes_BTHW"]) for batch in found] == [2, 2, 1]
    assert torch.cat([batch["row_B"] for batch in found]).tolist() == rows
    codes = torch.cat([batch["codes_BTHW"] for batch in found])
    assert np.array_equal(codes.numpy(), np.stack([cache.codes(row)[0] for row in rows]))


def test_evaluation_does_not_depend_on_the_batch_size(cache: TokenCache) -> None:
    rows = list(range(11))
    for key in ("codes_BTHW", "seed_B", "row_B"):
        whole, parts = (torch.cat([b[key] for b in evaluation_batches(cache, rows, n)]) for n in (11, 3))
        assert torch.equal(whole, parts)


def expected_clips(source: Source, draw: Draw, damaged: set[str]) -> list[np.ndarray]:
    videos = [source.videos[row] for row in draw.rows_B]
    return [
        pick_view(read_clips(source, video, CLIP).pixels_VTHWC, view)
        for video, view in zip(videos, draw.view_B, strict=True)
        if video.path not in damaged
    ]


def test_damaged_videos_are_reported_and_never_replaced(damaged_source: Source) -> None:
    damaged = {"left/empty.mp4", "right/text.mp4"}
    plan = BatchPlan(samples=8, batch_size=4, seed=0)
    dataset = ClipDataset(damaged_source, range(8), CLIP, plan)
    for epoch in range(2):
        used, skipped = 0, []
        for step in (2 * epoch, 2 * epoch + 1):
            batch = dataset[step]
            expected = expected_clips(damaged_source, plan.draw(step), damaged)
            assert np.array_equal(batch["pixels_BTHWC"][batch["real_B"]].numpy(), np.stack(expected))
            assert not batch["pixels_BTHWC"][~batch["real_B"]].any()
            assert len(batch["pixels_BTHWC"]) == 4
            assert batch["row_B"].tolist() == plan.draw(step).rows_B.tolist()
            assert len(batch["skipped"]) == (~batch["real_B"]).sum()
            used += len(expected)
            skipped += batch["skipped"]
        assert used == 6
        assert {path for path, _ in skipped} == damaged
        assert dict(skipped)["left/empty.mp4"] == "empty file"
        assert "does not open as a video" in dict(skipped)["right/text.mp4"]


def test_batch_of_damaged_videos_only_counts_for_nothing(damaged_source: Source) -> None:
    rows = [i for i, video in enumerate(damaged_source.videos) if video.path == "left/empty.mp4"]
    dataset = ClipDataset(damaged_source, rows, CLIP, BatchPlan(samples=1, batch_size=2, seed=0))
    batch = dataset[0]
    assert not batch["real_B"].any()
    assert batch["skipped"] == [("left/empty.mp4", "empty file")] * 2
    assert batch["row_B"].tolist() == rows * 2


@pytest.mark.parametrize("memory", [0, 2 * 3 * 4 * 16 * 16 * 3, 2**30])
def test_what_was_decoded_once_is_kept_as_far_as_memory_allows(
    video_folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    import data.loading

    source = load_source(str(video_folder))
    decoded: list[str] = []

    def counting(*args: object) -> object:
        decoded.append(args[1].path)  # type: ignore[attr-defined]
        return read_clips(*args)  # type: ignore[arg-type]

    plan = BatchPlan(samples=6, batch_size=6, seed=0)
    monkeypatch.setattr(data.loading, "read_clips", counting)
    dataset = ClipDataset(source, range(6), CLIP, plan, memory=memory)
    for step in range(2):
        expected = np.stack(expected_clips(source, plan.draw(step), set()))
        assert np.array_equal(dataset[step]["pixels_BTHWC"].numpy(), expected)
    assert len(decoded) == {0: 12, 2**30: 6}.get(memory, 10)


def test_built_in_clips_are_loaded_like_videos() -> None:
    source = load_source("builtin:moving-digits:8:0")
    dataset = ClipDataset(source, range(8), CLIP, BatchPlan(samples=8, batch_size=4, seed=0))
    batch = dataset[1]
    assert batch["pixels_BTHWC"].shape == (4, 4, 16, 16, 3)
    assert batch["pixels_BTHWC"].dtype == torch.uint8
    assert batch["skipped"] == []
