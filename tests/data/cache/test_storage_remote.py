"""A cache behind an address is the same cache: fetched shard by shard, checked before it is used, and refused if it changed."""

import http.client
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import data.loading
from data.cache import DamagedCache, TokenCache, find_cache, storage
from data.cache.stream import stream
from data.loading import BatchPlan, TokenDataset, batches, blocks_of
from tests.helpers.cache_contents import all_codes, files_of
from tests.helpers.caches import MakeCache
from tests.helpers.web_server import Handler, Server, serving

Spoil = Callable[[Handler], bool]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    """24 videos in 12 shards of equal size, with raw pixels and a codebook."""
    codebook_VC = np.arange(128, dtype=np.float32).reshape(64, 2)
    caches = tmp_path_factory.mktemp("caches")
    return make_cache(caches, 24, shard_size=2, keep_pixels="raw", codebook_VC=codebook_VC)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / whole.name)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(folder.parent) as server:
        yield server


@pytest.fixture
def address(server: Server, folder: Path) -> str:
    return f"{server.address}/{folder.name}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited between tries."""
    waits: list[float] = []
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=waits.append))
    return waits


# --- the same


def test_a_cache_behind_an_address_is_the_same_as_in_a_folder(address: str, folder: Path) -> None:
    near, far = TokenCache.open(folder), TokenCache.open(address)
    assert (near.remote, far.remote) == (False, True)
    assert (far.name, far.address, far.key, len(far)) == (near.name, address, near.key, 24)
    assert far.videos == near.videos
    assert np.array_equal(all_codes(far), all_codes(near))
    rows_B, views_B = np.array([17, 3, 3, 22, 0]), np.array([0, 1, 0, 1, 1])
    assert np.array_equal(far.clips.gather(rows_B, views_B), near.clips.gather(rows_B, views_B))
    for i in range(len(near)):
        assert far.facts(i) == near.facts(i)
        assert far.views(i) == near.views(i)
        assert far.members(i) == near.members(i)
        assert np.array_equal(far.pixels(i, 1), near.pixels(i, 1))
    assert np.array_equal(far.codebook(), near.codebook())  # type: ignore[arg-type]
    far.verify()


def test_a_slash_at_the_end_changes_nothing(address: str) -> None:
    assert TokenCache.open(address + "/").address == address


def test_an_address_is_found_as_it_is_given(address: str, tmp_path: Path) -> None:
    assert find_cache(tmp_path, address) == address


def test_a_stream_from_an_address_is_that_from_a_folder(address: str, folder: Path) -> None:
    near, far = (list(stream(TokenCache.open(where))) for where in (folder, address))
    assert [sample["__key__"] for sample in far] == [sample["__key__"] for sample in near]
    assert all(np.array_equal(a["codes.npy"], b["codes.npy"]) for a, b in zip(near, far, strict=True))


# --- how much is fetched


def test_opening_fetches_no_shard_and_reading_each_shard_once(server: Server, address: str) -> None:
    cache = TokenCache.open(address)
    assert server.asked_for(".tar") == []
    for i in (5, 4, 23, 5, 22):
        cache.codes(i)
        cache.clips.gather(np.array([i]), np.array([0]))
        cache.facts(i)
    assert server.asked_for(".tar") == ["000002.tar", "000011.tar"]


def test_a_copy_sent_to_another_process_reads_on(server: Server, address: str) -> None:
    cache = TokenCache.open(address)
    codes = cache.codes(7)
    sent = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(sent.codes(7), codes)
    assert len(pickle.dumps(cache)) < 2 * len(pickle.dumps(TokenCache.open(address))), "shards stay here"


def blocks_fetched(server: Server, cache: TokenCache, near: TokenCache, blocked: bool, workers: int) -> Counter[str]:
    """How often each shard is fetched in three epochs, whose batches are those of the folder."""
    blocks_N = blocks_of(cache, range(24)) if blocked else None
    plan = BatchPlan(samples=24, batch_size=5, seed=3, blocks_N=blocks_N)
    far, expected = (TokenDataset(c, range(24), plan) for c in (cache, near))
    steps = range(3 * 24 // 5)
    rows = []
    for step, batch in zip(steps, batches(far, steps, workers), strict=True):
        assert torch.equal(batch["codes_BTHW"], torch.from_numpy(expected[step]["codes_BTHW"]).long())
        rows += batch["row_B"].tolist()
    assert [sorted(rows[24 * epoch : 24 * epoch + 24]) for epoch in range(2)] == [list(range(24))] * 2
    return Counter(server.asked_for(".tar"))


def test_each_shard_is_fetched_once_per_epoch_with_memory_for_a_few(
    server: Server, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, size = TokenCache.open(folder), (folder / "shards" / "000000.tar").stat().st_size
    for module in (storage, data.loading):
        monkeypatch.setattr(module, "MEMORY", 3 * size)
    fetched = blocks_fetched(server, TokenCache.open(address), near, blocked=True, workers=0)
    assert len(fetched) == 12
    assert max(fetched.values()) <= 3
    assert fetched.total() > 2 * (12 - 3), "what was fetched does not all fit"
    server.requests.clear()
    anywhere = blocks_fetched(server, TokenCache.open(address), near, blocked=False, workers=0)
    assert anywhere.total() > 1.4 * fetched.total(), "for that the samples are read in blocks"


def test_a_worker_process_fetches_each_shard_once(server: Server, address: str, folder: Path) -> None:
    fetched = blocks_fetched(server, TokenCache.open(address), TokenCache.open(folder), blocked=True, workers=1)
    assert len(fetched) == fetched.total() == 12


@pytest.mark.parametrize(("memory", "fetched"), [(0, 6), (2, 4), (100, 3)])
def test_with_little_memory_what_was_not_used_for_longest_is_fetched_again(
    server: Server, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int, fetched: int
) -> None:
    monkeypatch.setattr(storage, "MEMORY", memory * (folder / "shards" / "000000.tar").stat().st_size)
    near, far = TokenCache.open(folder), TokenCache.open(address)
    for i in (0, 2, 1, 4, 0, 3):
        assert np.array_equal(far.codes(i), near.codes(i))
    assert len(server.asked_for(".tar")) == fetched


# --- changed and missing


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "shorter": lambda content: content[:-512],
    "cut to nothing": lambda content: b"",
    "flipped": lambda content: content[:600] + bytes([content[600] ^ 1]) + content[601:],
    "longer": lambda content: content + bytes(512),
    "another": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_shard_is_refused_before_a_byte_of_it_is_used(address: str, folder: Path, change: str) -> None:
    tar = folder / "shards" / "000001.tar"
    tar.write_bytes(CHANGES[change](tar.read_bytes()))
    cache = TokenCache.open(address)
    cache.codes(0)
    works: list[Callable[[], Any]] = [lambda: cache.codes(3), lambda: cache.facts(2), cache.verify]
    for work in [*works, lambda: cache.clips.gather(np.array([0, 3]), np.array([0, 0]))]:
        with pytest.raises(DamagedCache, match=r"shards/000001\.tar: (has not the|content has changed)"):
            work()
    assert cache.shards[0].damage() == []
    assert len(cache.shards[1].damage()) == 1


@pytest.mark.parametrize("file", ["manifest.json", "shards/000001.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_or_record_is_refused(address: str, folder: Path, file: str, change: str) -> None:
    (folder / file).write_bytes(CHANGES[change]((folder / file).read_bytes()))
    with pytest.raises(DamagedCache, match=file.replace(".", r"\.")):
        TokenCache.open(address)


@pytest.mark.parametrize("file", ["manifest.json", "shards/000001.json", "shards/000001.tar", "codebook.safetensors"])
def test_a_missing_file_is_named_at_once(address: str, folder: Path, waits: list[float], file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(DamagedCache, match=rf"{address}/{file}: missing"):
        TokenCache.open(address).verify()
    assert waits == []


# --- failing


def failing(times: int, of: str, how: Spoil) -> Spoil:
    """Spoil the first answers for one file."""
    left = [times]

    def spoil(handler: Handler) -> bool:
        if not handler.path.endswith(of) or left[0] == 0:
            return False
        left[0] -= 1
        return how(handler)

    return spoil


def unavailable(handler: Handler) -> bool:
    return handler.send(b"later", 503, Content_Length="5")


def hang_up(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def nonsense(handler: Handler) -> bool:
    handler.wfile.write(b"good morning\r\n\r\n")
    return True


def end_early(handler: Handler) -> bool:
    return handler.send(b"{", Content_Length="1000")


def tear_a_chunk(handler: Handler) -> bool:
    handler.protocol_version = "HTTP/1.1"
    return handler.send(b"3e8\r\n{", Transfer_Encoding="chunked", Connection="close")


FAILURES = {spoil.__name__: spoil for spoil in (unavailable, hang_up, nonsense, end_early, tear_a_chunk)}


@pytest.mark.parametrize("file", ["manifest.json", "000001.json", "000001.tar"])
@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_twice_is_tried_again(
    server: Server, address: str, folder: Path, waits: list[float], file: str, failure: str
) -> None:
    server.spoil = failing(2, file, FAILURES[failure])
    assert np.array_equal(TokenCache.open(address).codes(2), TokenCache.open(folder).codes(2))
    assert len(waits) == 2
    assert waits[0] < waits[1]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_never_answers_properly_ends_in_one_error(
    server: Server, address: str, waits: list[float], failure: str
) -> None:
    server.spoil = FAILURES[failure]
    with pytest.raises(OSError, match=f"{address}/manifest.json: cannot be read: ") as caught:
        TokenCache.open(address)
    assert not isinstance(caught.value, http.client.HTTPException)
    assert len(str(caught.value).splitlines()) == 1
    assert len(server.requests) == len(waits) + 1 < 6


def test_nobody_there_is_one_error(address: str, server: Server, waits: list[float]) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=f"{address}/manifest.json: cannot be read: "):
        TokenCache.open(address)


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_forbidden_is_not_asked_for_again(
    server: Server, address: str, waits: list[float], status: int
) -> None:
    server.spoil = lambda handler: handler.send(b"", status, Content_Length="0")
    with pytest.raises(OSError, match=f"{address}/manifest.json: cannot be read: {status}"):
        TokenCache.open(address)
    assert (len(server.requests), waits) == (1, [])


# --- other addresses


@pytest.mark.parametrize("scheme", ["ftp", "file", "pipe", "data", "memory", "zip", "FILE", "https+x", ""])
def test_another_scheme_is_refused_in_one_line(scheme: str) -> None:
    with pytest.raises(ValueError, match="is no scheme that caches are read from") as caught:
        TokenCache.open(f"{scheme}://host/cache")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("end", [":abc", "/a b", "/a\nb", "/\u00fc"])
def test_an_address_that_is_none_is_one_error(end: str, waits: list[float]) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        TokenCache.open(f"http://127.0.0.1{end}")
    assert "is not JSON" not in str(caught.value)


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    """A store of objects that s3, gs and hf lead to, with the cache in it."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    store = MemoryFileSystem()
    for scheme in ("s3", "gs", "hf"):
        for name, content in files_of(folder).items():
            store.pipe_file(f"{scheme}://bucket/toy/{name}", content)
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: store)
    return store


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_stores_are_read_through_fsspec(store: MemoryFileSystem, folder: Path, scheme: str) -> None:
    near, far = TokenCache.open(folder), TokenCache.open(f"{scheme}://bucket/toy")
    assert np.array_equal(all_codes(far), all_codes(near))
    far.verify()
    with pytest.raises(DamagedCache, match=f"{scheme}://bucket/other/manifest.json: missing"):
        TokenCache.open(f"{scheme}://bucket/other")


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_shard_of_a_store_is_refused(store: MemoryFileSystem, change: str) -> None:
    name = "s3://bucket/toy/shards/000001.tar"
    store.pipe_file(name, CHANGES[change](store.cat_file(name)))
    with pytest.raises(DamagedCache, match=r"shards/000001\.tar: (has not the|content has changed)"):
        TokenCache.open("s3://bucket/toy").codes(2)


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ValueError, match="^s3://bucket/toy.*: s3 addresses need another package: .*(s3fs|fsspec)"
    ) as caught:
        TokenCache.open("s3://bucket/toy")
    assert "is not JSON" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_error_of_a_store_of_its_own_kind_is_an_os_error(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    class NoCredentials(Exception):
        """As botocore and httpx have them: of no common kind."""

    def refuse(*args: object) -> None:
        raise NoCredentials("unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "open", refuse)
    with pytest.raises(OSError, match="s3://bucket/toy/manifest.json: cannot be read: .*unable to locate credentials"):
        TokenCache.open("s3://bucket/toy")
