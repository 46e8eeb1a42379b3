"""Batches have every sample once per epoch, are the same for any number of ranks and workers, and resume from a step number."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data.loading
from data.cache import TokenCache
from data.clip_spec import ClipSpec
from data.clips import read_clips
from data.loading import Batch, BatchPlan, ClipDataset, Draw, TokenDataset, batches, evaluation_batches, pick_view
from data.sources import Source, load_source
from tests.helpers.caches import make_cache

CLIP = ClipSpec(frames=4, size=16, views=3)


def draws(plan: BatchPlan, steps: range) -> list[tuple[int, float, int]]:
    """Return (row, view, seed) of all samples of some steps, in order."""
    parts = [plan.draw(step) for step in steps]
    return [sample for d in parts for sample in zip(d.rows_B, d.view_B, d.seed_B, strict=True)]


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("caches"), 11, views=3))


@pytest.fixture
def damaged_source(video_folder: Path, tmp_path: Path) -> Source:
    """Source of six good and two damaged videos."""
    folder = shutil.copytree(video_folder, tmp_path / "videos")
    (folder / "left" / "empty.mp4").touch()
    (folder / "right" / "text.mp4").write_text("no video")
    return load_source(str(folder))


@pytest.mark.parametrize(("samples", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3), (11, 1), (64, 6)])
def test_every_sample_comes_once_per_epoch_across_epoch_borders(samples: int, batch_size: int) -> None:
    plan = BatchPlan(samples=samples, batch_size=batch_size, seed=3)
    epochs = 4
    rows = [row for row, _, _ in draws(plan, range(-(-epochs * samples // batch_size)))]
    for epoch in range(epochs):
        assert sorted(rows[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_order_differs_between_epochs_and_between_seeds() -> None:
    plan = BatchPlan(samples=50, batch_size=50, seed=0)
    other = BatchPlan(samples=50, batch_size=50, seed=1)
    orders = [tuple(p.draw(step).rows_B) for p in (plan, other) for step in range(3)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_concatenated_parts_of_all_ranks_are_the_batch_of_one_process(world: int) -> None:
    one = BatchPlan(samples=10, batch_size=8, seed=5)
    ranks = [BatchPlan(samples=10, batch_size=8, seed=5, rank=rank, world=world) for rank in range(world)]
    for step in range(12):
        parts = [draws(plan, range(step, step + 1)) for plan in ranks]
        assert {len(part) for part in parts} == {8 // world}
        assert list(itertools.chain(*parts)) == draws(one, range(step, step + 1))


def test_step_does_not_depend_on_the_steps_before() -> None:
    plan = BatchPlan(samples=10, batch_size=4, seed=2)
    forwards = [draws(plan, range(step, step + 1)) for step in range(30)]
    backwards = [draws(plan, range(step, step + 1)) for step in reversed(range(30))]
    assert forwards == backwards[::-1]


def test_seeds_differ_between_samples_epochs_and_plans() -> None:
    plans = [BatchPlan(samples=20, batch_size=10, seed=seed) for seed in (0, 1)]
    seeds = [seed for plan in plans for _, _, seed in draws(plan, range(8))]
    assert len(set(seeds)) == 2 * 8 * 10
    assert min(seeds) >= 0


def test_views_are_uniform_and_independent_between_epochs() -> None:
    plan = BatchPlan(samples=300, batch_size=300, seed=0)
    draws_of_epochs = [plan.draw(step) for step in range(4)]
    drawn = np.array([draw.view_B[np.argsort(draw.rows_B)] for draw in draws_of_epochs])  # (epoch, sample)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.bincount((drawn * 3).astype(int).ravel(), minlength=3)
    assert np.abs(counts - 400).max() < 80
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.25


def test_pick_view_covers_exactly_the_views() -> None:
    numbers = (0.0, 0.33, 0.34, 0.66, 0.67, np.nextafter(1, 0))
    assert [int(pick_view(np.arange(3), number)) for number in numbers] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"samples": 10, "batch_size": 6, "world": 4}, r"batch_size .*\(4\), got 6"),
        ({"samples": 10, "batch_size": 2, "world": 4}, r"batch_size .*\(4\), got 2"),
        ({"samples": 10, "batch_size": 0}, "batch_size .* got 0"),
        ({"samples": 0, "batch_size": 4}, "samples .* got 0"),
    ],
)
def test_invalid_plan_is_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(seed=0, **numbers)


def test_token_batches_hold_the_drawn_view_of_the_given_rows(cache: TokenCache) -> None:
    rows = [1, 3, 5, 7, 10]
    plan = BatchPlan(samples=len(rows), batch_size=4, seed=0)
    dataset = TokenDataset(cache, rows, plan)
    loaded_rows = []
    for step in range(5):
        batch, draw = dataset[step], plan.draw(step)
        assert batch["codes_BTHW"].dtype == np.uint16, "workers send codes in the dtype of the cache"
        assert batch["seed_B"].tolist() == draw.seed_B.tolist()
        assert batch["row_B"].tolist() == [rows[i] for i in draw.rows_B]
        for codes, row, view in zip(batch["codes_BTHW"], batch["row_B"].tolist(), draw.view_B, strict=True):
            assert np.array_equal(codes, cache.codes(row)[int(3 * view)])
        loaded_rows += batch["row_B"].tolist()
    assert sorted(loaded_rows) == sorted(rows * 4)


def test_batches_do_not_depend_on_workers_or_on_the_first_step(cache: TokenCache) -> None:
    dataset = TokenDataset(cache, range(11), BatchPlan(samples=11, batch_size=4, seed=1))
    uninterrupted = list(batches(dataset, range(8), workers=0))
    assert len(uninterrupted) == 8
    resumed = list(batches(dataset, range(3, 8), workers=0))
    by_workers = list(batches(dataset, range(3, 8), workers=2))
    assert len(resumed) == len(by_workers) == 5
    for expected, *others in zip(uninterrupted[3:], resumed, by_workers, strict=True):
        assert all(same(expected, other) for other in others)


def test_large_batches_from_workers_are_unchanged(tmp_path: Path) -> None:
    """Arrays of half a megabyte and more are sent in shared memory, in the dtype of the cache."""
    for vocab_size in (2**16, 2**18):
        cache = TokenCache.open(make_cache(tmp_path, 5, vocab_size=vocab_size, codes_shape=(16, 64, 64)))
        dataset = TokenDataset(cache, range(5), BatchPlan(samples=5, batch_size=6, seed=1), pairs=True)
        assert dataset[0]["codes_BTHW"].nbytes > 2**19
        expected, loaded = (list(batches(dataset, range(3), workers)) for workers in (0, 2))
        assert len(expected) == 3
        for expected_batch, batch in zip(expected, loaded, strict=True):
            assert same(expected_batch, batch)
            assert batch["codes_BTHW"].dtype == batch["pair_BTHW"].dtype == torch.int64


class NumbersOrNothing(torch.utils.data.Dataset):
    """Batches with a large tensor and a large array. A step below 0 ends the process that loads it."""

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            os._exit(7)
        return {"pixels_BTHWC": torch.full((2**20,), step % 256, dtype=torch.uint8), "row_B": np.full(2**17, step)}


@pytest.mark.parametrize("value", [np.arange(2**17), torch.arange(2**17)])
def test_without_room_in_shared_memory_large_values_are_sent_through_the_pipe(
    value: np.ndarray | torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = data.loading._for_sending({"row_B": value})["row_B"]
    assert isinstance(sent, torch.Tensor) and sent.is_shared() and torch.equal(sent, torch.as_tensor(value))

    def no_room(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    sent = data.loading._for_sending({"row_B": value})["row_B"]
    assert isinstance(sent, np.ndarray) and np.array_equal(sent, value)


def test_small_values_never_use_shared_memory() -> None:
    batch = data.loading._for_sending({"real_B": torch.ones(4, dtype=torch.bool), "skipped": [("a", "b")]})
    assert isinstance(batch["real_B"], np.ndarray) and batch["skipped"] == [("a", "b")]


@pytest.mark.soak
def test_workers_send_large_batches_with_a_small_dev_shm(tmp_path: Path) -> None:
    """A mount namespace with 256 KiB of /dev/shm, where a batch has 2 MiB."""
    program = (
        "from tests.data.test_loading import NumbersOrNothing\n"
        "from data.loading import batches\n"
        "loaded = list(batches(NumbersOrNothing(), range(5), workers=2))\n"
        "print([(int(b['row_B'][-1]), int(b['pixels_BTHWC'][-1])) for b in loaded])\n"
    )
    script = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", program]
    if not shutil.which("unshare") or subprocess.run([*command[:4], script, "sh", "true"]).returncode:
        pytest.skip("a mount namespace cannot be made here")
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{[(step, step) for step in range(5)]}\n", done.stderr


def test_a_worker_that_dies_is_reported_with_its_flag_and_the_likely_cause() -> None:
    loaded = batches(NumbersOrNothing(), range(1, -3, -1), workers=2)
    with pytest.raises(OSError, match=r"--workers 2: a loading process has died .*/dev/shm.*--workers 0"):
        list(loaded)


def test_workers_that_cannot_be_started_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    with pytest.raises(OSError, match=r"--workers 2: .*No space left on device.*/dev/shm"):
        batches(NumbersOrNothing(), range(3), workers=2)


def test_evaluation_reads_the_canonical_view_of_every_row_in_order(cache: TokenCache) -> None:
    rows = [9, 0, 4, 2, 7]
    loaded = list(evaluation_batches(cache, rows, 2))
    assert [len(batch["codes_BTHW"]) for batch in loaded] == [2, 2, 1]
    assert torch.cat([batch["row_B"] for batch in loaded]).tolist() == rows
    codes = torch.cat([batch["codes_BTHW"] for batch in loaded])
    assert np.array_equal(codes.numpy(), np.stack([cache.codes(row)[0] for row in rows]))


def test_evaluation_does_not_depend_on_the_batch_size(cache: TokenCache) -> None:
    rows = list(range(11))
    for key in ("codes_BTHW", "seed_B", "row_B"):
        one_batch, small_batches = (torch.cat([b[key] for b in evaluation_batches(cache, rows, n)]) for n in (11, 3))
        assert torch.equal(one_batch, small_batches)


def expected_clips(source: Source, draw: Draw, damaged: set[str]) -> list[np.ndarray]:
    """Return the drawn views of the videos that are not damaged."""
    videos = [source.videos[row] for row in draw.rows_B]
    return [
        pick_view(read_clips(source, video, CLIP).pixels_VTHWC, view)
        for video, view in zip(videos, draw.view_B, strict=True)
        if video.path not in damaged
    ]


def test_damaged_videos_are_black_reported_and_not_replaced(damaged_source: Source) -> None:
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
        assert dict(skipped)["right/text.mp4"]


def test_batch_of_damaged_videos_only_has_no_valid_clip(damaged_source: Source) -> None:
    rows = [i for i, video in enumerate(damaged_source.videos) if video.path == "left/empty.mp4"]
    dataset = ClipDataset(damaged_source, rows, CLIP, BatchPlan(samples=1, batch_size=2, seed=0))
    batch = dataset[0]
    assert not batch["real_B"].any()
    assert batch["skipped"] == [("left/empty.mp4", "empty file")] * 2
    assert batch["row_B"].tolist() == rows * 2


@pytest.mark.parametrize("memory", [0, 2 * 3 * 4 * 16 * 16 * 3, 2**30])
def test_decoded_clips_are_stored_up_to_the_memory_limit(
    video_folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
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


def test_with_pin_every_tensor_is_pinned_after_its_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory needs a GPU; here a mark on the tensor stands for it."""
    pinned: list[torch.Tensor] = []

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: any(x is y for y in pinned))
    monkeypatch.setattr(
        data.loading, "DataLoader", lambda dataset, **settings: (dataset[i] for i in settings["sampler"])
    )
    (batch,) = batches(Numbers(), range(1), workers=0, pin=True)
    assert set(batch) == {"codes_BTHW", "row_B", "name"} and batch["codes_BTHW"].dtype == torch.int64
    assert all(value.is_pinned() for value in (batch["codes_BTHW"], batch["row_B"]))


class Numbers(torch.utils.data.Dataset):
    """A batch with codes, an array and a text."""

    def __getitem__(self, step: int) -> dict[str, object]:
        return {"codes_BTHW": np.zeros((2, 1, 1, 1), np.uint16), "row_B": np.arange(2), "name": "x"}
