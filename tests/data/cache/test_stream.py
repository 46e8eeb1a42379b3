"""A cache is a webdataset pipeline: it yields each sample once, split among workers and nodes, in the order of a seed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from data.cache import DamagedCache, TokenCache
from data.cache.stream import stream
from tests.helpers.cache_contents import damage_clip, expected_codes
from tests.helpers.caches import MakeCache

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> TokenCache:
    """Twenty videos in seven shards."""
    return TokenCache.open(make_cache(tmp_path_factory.mktemp("caches"), 20, shard_size=3))


def paths(samples: Any) -> list[str]:
    return [sample["json"]["path"] for sample in samples]


def by_workers(pipeline: webdataset.DataPipeline, workers: int, context: str = "fork") -> Iterator[dict[str, Any]]:
    yield from DataLoader(pipeline, batch_size=None, num_workers=workers, multiprocessing_context=context)


def test_samples_have_the_order_of_the_cache_and_its_codes_and_facts(many: TokenCache) -> None:
    samples = list(stream(many))
    assert paths(samples) == [video.path for video in many.videos]
    for i, sample in enumerate(samples):
        assert set(sample) == {"__key__", "__url__", "codes.npy", "json"}
        assert np.array_equal(sample["codes.npy"], expected_codes(many.videos[i].path))
        assert sample["codes.npy"].dtype == np.dtype("<u2")
        assert sample["json"] == many.facts(i)
    assert len({sample["__key__"] for sample in samples}) == 20
    assert samples[4]["__url__"] == f"{many.address}/shards/000001.tar"


@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.parametrize("seed", [None, 7])
def test_workers_split_the_samples(many: TokenCache, seed: int | None, context: str) -> None:
    samples = list(by_workers(stream(many, seed=seed), 2, context))
    assert len(samples) == 20
    assert sorted(paths(samples)) == sorted(video.path for video in many.videos)
    for sample in samples:
        assert np.array_equal(sample["codes.npy"], expected_codes(sample["json"]["path"]))


def test_more_workers_than_shards_give_every_sample_once(tmp_path: Path, make_cache: MakeCache) -> None:
    cache = TokenCache.open(make_cache(tmp_path, 5, shard_size=3))
    assert sorted(paths(by_workers(stream(cache), 4))) == sorted(video.path for video in cache.videos)


def test_seed_and_epoch_change_the_order_but_not_the_samples(many: TokenCache) -> None:
    reference = paths(stream(many))
    orders = {(seed, epoch): paths(stream(many, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == sorted(reference) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9, "two seeds or epochs have the same order"
    assert reference not in orders.values()


def test_same_seed_and_epoch_give_the_same_order(many: TokenCache) -> None:
    pipeline = stream(many, seed=2, epoch=1)
    reference = paths(pipeline)
    assert paths(pipeline) == paths(stream(many, seed=2, epoch=1)) == reference
    one, two = (paths(by_workers(pipeline, 2)) for _ in range(2))
    assert one == two
    assert sorted(one) == sorted(reference)


def test_nodes_split_the_samples(many: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        shares.append(paths(stream(many, seed=1)))
    assert all(shares)
    assert sorted(sum(shares, [])) == sorted(video.path for video in many.videos)


def test_stages_of_webdataset_can_be_appended(many: TokenCache) -> None:
    pipeline = stream(many).compose(
        webdataset.shuffle(10, seed=0), webdataset.to_tuple("codes.npy", "json"), webdataset.batched(6)
    )
    batches = list(pipeline)
    assert [len(codes) for codes, _ in batches] == [6, 6, 6, 2]
    assert sorted(facts["path"] for _, batch in batches for facts in batch) == sorted(v.path for v in many.videos)


def test_stream_ends_at_a_damaged_sample(copy: Path) -> None:
    damage_clip(copy, 5)
    samples = []
    with pytest.raises(DamagedCache, match=r"000001\.tar: sample \w+ \(1/005\.mp4\), codes\.npy"):
        for sample in stream(TokenCache.open(copy)):
            samples.append(sample)
    assert len(samples) == 5


def test_stream_starts_no_program_and_unpickles_nothing(many: TokenCache) -> None:
    """webdataset's own openers of files do both, so they must not be used."""
    code = (
        "import sys\n"
        "from data.cache import TokenCache\n"
        "from data.cache.stream import stream\n"
        "events = []\n"
        "sys.addaudithook(lambda event, _: events.append(event))\n"
        "assert len(list(stream(TokenCache.open(sys.argv[1]), seed=0))) == 20\n"
        "assert not {'subprocess.Popen', 'os.system', 'os.exec', 'pickle.find_class'} & set(events), events\n"
        "assert 'open' in events\n"
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-c", code, many.address], cwd=ROOT, env=environment, check=True, timeout=60)
