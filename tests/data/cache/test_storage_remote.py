"""A remote cache equals the local one. Its shards are fetched whole, checked before use, and refused if they changed."""

import http.client
import pickle
import re
import shutil
import sys
import time
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
from data.cache import DamagedCache, TokenCache, fetch, find_cache, storage
from data.cache.stream import stream
from data.loading import BatchPlan, TokenDataset, batches, blocks_of
from tests.helpers.cache_contents import all_codes, files_of
from tests.helpers.caches import MakeCache
from tests.helpers.web_server import Handler, Server, failing, serving


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_cache: MakeCache) -> Path:
    """24 videos in 12 shards of equal size, with raw pixels and a codebook."""
    codebook_VC = np.arange(128, dtype=np.float32).reshape(64, 2)
    caches = tmp_path_factory.mktemp("caches")
    return make_cache(caches, 24, shard_size=2, keep_pixels="raw", codebook_VC=codebook_VC)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / original.name)


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
    """Collects the seconds between attempts, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(fetch, "time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    return waits


# --- equal to the local cache


def test_remote_cache_equals_local_cache(address: str, folder: Path) -> None:
    local, remote = TokenCache.open(folder), TokenCache.open(address)
    assert (local.remote, remote.remote) == (False, True)
    assert (remote.name, remote.address, remote.key, len(remote)) == (local.name, address, local.key, 24)
    assert remote.videos == local.videos
    assert np.array_equal(all_codes(remote), all_codes(local))
    rows_B, views_B = np.array([17, 3, 3, 22, 0]), np.array([0, 1, 0, 1, 1])
    assert np.array_equal(remote.clips.gather(rows_B, views_B), local.clips.gather(rows_B, views_B))
    for i in range(len(local)):
        assert remote.facts(i) == local.facts(i)
        assert remote.views(i) == local.views(i)
        assert remote.members(i) == local.members(i)
        assert np.array_equal(remote.pixels(i, 1), local.pixels(i, 1))
    assert np.array_equal(remote.codebook(), local.codebook())  # type: ignore[arg-type]
    remote.verify()


def test_trailing_slash_is_ignored(address: str) -> None:
    assert TokenCache.open(address + "/").address == address


def test_find_cache_returns_an_address_unchanged(address: str, tmp_path: Path) -> None:
    assert find_cache(tmp_path, address) == address


def test_remote_stream_equals_local_stream(address: str, folder: Path) -> None:
    local, remote = (list(stream(TokenCache.open(place))) for place in (folder, address))
    assert [sample["__key__"] for sample in remote] == [sample["__key__"] for sample in local]
    assert all(np.array_equal(a["codes.npy"], b["codes.npy"]) for a, b in zip(local, remote, strict=True))


# --- how much is fetched


def test_opening_fetches_no_shard_and_reading_fetches_each_once(server: Server, address: str) -> None:
    cache = TokenCache.open(address)
    assert server.requested(".tar") == []
    for i in (5, 4, 23, 5, 22):
        cache.codes(i)
        cache.clips.gather(np.array([i]), np.array([0]))
        cache.facts(i)
    assert server.requested(".tar") == ["000002.tar", "000011.tar"]


def test_pickled_cache_can_be_read_and_contains_no_shards(server: Server, address: str) -> None:
    cache = TokenCache.open(address)
    codes = cache.codes(7)
    copy = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(copy.codes(7), codes)
    assert len(pickle.dumps(cache)) < 2 * len(pickle.dumps(TokenCache.open(address))), "the pickle contains shards"


def count_fetches(server: Server, cache: TokenCache, local: TokenCache, blocked: bool, workers: int) -> Counter[str]:
    """Count the requests for each shard in three epochs; check that the batches equal those of the local cache."""
    blocks_N = blocks_of(cache, range(24)) if blocked else None
    plan = BatchPlan(samples=24, batch_size=5, seed=3, blocks_N=blocks_N)
    remote, expected = (TokenDataset(c, range(24), plan) for c in (cache, local))
    steps = range(3 * 24 // 5)
    rows = []
    for step, batch in zip(steps, batches(remote, steps, workers), strict=True):
        assert torch.equal(batch["codes_BTHW"], torch.from_numpy(expected[step]["codes_BTHW"]).long())
        rows += batch["row_B"].tolist()
    assert [sorted(rows[24 * epoch : 24 * epoch + 24]) for epoch in range(2)] == [list(range(24))] * 2
    return Counter(server.requested(".tar"))


def test_each_shard_is_fetched_once_per_epoch_with_memory_for_three(
    server: Server, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, size = TokenCache.open(folder), (folder / "shards" / "000000.tar").stat().st_size
    for module in (storage, data.loading):
        monkeypatch.setattr(module, "MEMORY", 3 * size)
    fetched = count_fetches(server, TokenCache.open(address), local, blocked=True, workers=0)
    assert len(fetched) == 12
    assert max(fetched.values()) <= 3
    assert fetched.total() > 2 * (12 - 3), "all shards fit into memory, so the test is void"
    server.requests.clear()
    unblocked = count_fetches(server, TokenCache.open(address), local, blocked=False, workers=0)
    assert unblocked.total() > 1.4 * fetched.total(), "reading in blocks saves no requests"


def test_worker_process_fetches_each_shard_once(server: Server, address: str, folder: Path) -> None:
    fetched = count_fetches(server, TokenCache.open(address), TokenCache.open(folder), blocked=True, workers=1)
    assert len(fetched) == fetched.total() == 12


@pytest.mark.parametrize(("memory", "fetched"), [(0, 6), (2, 4), (100, 3)])
def test_least_recently_used_shard_is_dropped_from_memory(
    server: Server, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int, fetched: int
) -> None:
    monkeypatch.setattr(storage, "MEMORY", memory * (folder / "shards" / "000000.tar").stat().st_size)
    local, remote = TokenCache.open(folder), TokenCache.open(address)
    for i in (0, 2, 1, 4, 0, 3):
        assert np.array_equal(remote.codes(i), local.codes(i))
    assert len(server.requested(".tar")) == fetched


# --- changed and missing files


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "shorter": lambda content: content[:-512],
    "cut to nothing": lambda content: b"",
    "flipped": lambda content: content[:600] + bytes([content[600] ^ 1]) + content[601:],
    "longer": lambda content: content + bytes(512),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_shard_is_refused_before_use(address: str, folder: Path, change: str) -> None:
    tar = folder / "shards" / "000001.tar"
    tar.write_bytes(CHANGES[change](tar.read_bytes()))
    cache = TokenCache.open(address)
    cache.codes(0)
    reads: list[Callable[[], Any]] = [lambda: cache.codes(3), lambda: cache.facts(2), cache.verify]
    for read in [*reads, lambda: cache.clips.gather(np.array([0, 3]), np.array([0, 0]))]:
        with pytest.raises(DamagedCache, match=r"shards/000001\.tar: (.*bytes|.*changed)"):
            read()
    assert cache.shards[0].damage() == []
    assert len(cache.shards[1].damage()) == 1


@pytest.mark.parametrize("file", ["manifest.json", "shards/000001.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_manifest_or_record_is_refused(address: str, folder: Path, file: str, change: str) -> None:
    (folder / file).write_bytes(CHANGES[change]((folder / file).read_bytes()))
    with pytest.raises(DamagedCache, match=file.replace(".", r"\.")):
        TokenCache.open(address)


@pytest.mark.parametrize("file", ["manifest.json", "shards/000001.json", "shards/000001.tar", "codebook.safetensors"])
def test_missing_file_is_named_without_retries(address: str, folder: Path, waits: list[float], file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(DamagedCache, match=rf"{address}/{file}: missing"):
        TokenCache.open(address).verify()
    assert waits == []


# --- failing servers


def unavailable(handler: Handler) -> bool:
    return handler.send(b"later", 503, Content_Length="5")


def close_connection(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def not_http(handler: Handler) -> bool:
    handler.wfile.write(b"good morning\r\n\r\n")
    return True


def end_early(handler: Handler) -> bool:
    return handler.send(b"{", Content_Length="1000")


def end_within_chunk(handler: Handler) -> bool:
    handler.protocol_version = "HTTP/1.1"
    return handler.send(b"3e8\r\n{", Transfer_Encoding="chunked", Connection="close")


FAILURES = {
    respond.__name__: respond for respond in (unavailable, close_connection, not_http, end_early, end_within_chunk)
}


@pytest.mark.parametrize("file", ["manifest.json", "000001.json", "000001.tar"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failed_request_is_retried(
    server: Server, address: str, folder: Path, waits: list[float], file: str, failure: str
) -> None:
    server.respond = failing(2, file, FAILURES[failure])
    assert np.array_equal(TokenCache.open(address).codes(2), TokenCache.open(folder).codes(2))
    assert len(waits) == 2
    assert waits[0] < waits[1]


@pytest.mark.parametrize("failure", FAILURES)
def test_server_that_always_fails_is_one_error(server: Server, address: str, waits: list[float], failure: str) -> None:
    server.respond = FAILURES[failure]
    with pytest.raises(OSError, match=f"{address}/manifest.json: ") as caught:
        TokenCache.open(address)
    assert not isinstance(caught.value, http.client.HTTPException)
    assert len(str(caught.value).splitlines()) == 1
    assert len(server.requests) == len(waits) + 1 < 6


def test_missing_server_is_one_error(address: str, server: Server, waits: list[float]) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=f"{address}/manifest.json: "):
        TokenCache.open(address)


@pytest.mark.parametrize("status", [401, 403])
def test_forbidden_file_is_not_requested_again(server: Server, address: str, waits: list[float], status: int) -> None:
    server.respond = lambda handler: handler.send(b"", status, Content_Length="0")
    with pytest.raises(OSError, match=f"{address}/manifest.json: .*{status}"):
        TokenCache.open(address)
    assert (len(server.requests), waits) == (1, [])


# --- other addresses


@pytest.mark.parametrize("scheme", ["ftp", "file", "pipe", "data", "memory", "zip", "FILE", "https+x", ""])
def test_other_scheme_is_refused_in_one_line(scheme: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(scheme.lower())) + ".*https, http, s3, gs, hf") as caught:
        TokenCache.open(f"{scheme}://host/cache")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("end", [":abc", "/a b", "/a\nb", "/\u00fc"])
def test_invalid_address_is_one_error(end: str, waits: list[float]) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        TokenCache.open(f"http://127.0.0.1{end}")
    assert "is not JSON" not in str(caught.value)


def test_scheme_may_have_capital_letters(address: str, folder: Path) -> None:
    cache = TokenCache.open(address.replace("http", "HTTP"))
    assert cache.address == address
    assert np.array_equal(cache.codes(3), TokenCache.open(folder).codes(3))


INVALID = {
    f"http://{'a' * 64}.example/x": "a{64}",
    "http://a..example/x": "a..example",
    "http://127.0.0.1:99999/x": "0-65535",
    "http://127.0.0.1:0/x": "0-65535",
    "http://127.0.0.1:8o/x": "8o",
    "https://[::1/x": "IPv6",
    "https:///x": "no valid host",
    "https://": "no valid host",
    "https://:80/x": "no valid host",
    "http://a b/x": "no valid host",
    "http://a\tb/x": "no valid host",
    "http://a\nb/x": "no valid host",
    "http://a\x1bb/x": "no valid host",
    "http://a\udcffb/x": "host",
    "http://host/x#y": "#",
    "https://me:secret@host/x": "password",
    "https://me:se@cret@host/x": "password",
}


@pytest.mark.parametrize("text", INVALID, ids=ascii)
def test_address_without_valid_host_is_refused_before_any_request(text: str) -> None:
    with pytest.raises(ValueError, match=INVALID[text]) as caught:
        TokenCache.open(text)
    message = str(caught.value)
    assert "/x" in message or text == "https://"
    assert "secret" not in message
    assert "cret" not in message


@pytest.mark.parametrize("path", ["a b", "\u00fc", "a\nb", "a@b", "100%"], ids=ascii)
def test_path_of_an_address_may_have_any_characters(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / path).symlink_to(original)
    with serving(tmp_path) as server:
        assert len(TokenCache.open(f"{server.address}/{path}")) == 24


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:99999/", f"http://{'a' * 64}.x/", "http://[::1/", "http://me:secret@127.0.0.1/"]
)
def test_redirect_to_an_invalid_address_is_one_error(
    server: Server, address: str, waits: list[float], target: str
) -> None:
    server.respond = lambda handler: handler.send(b"", 302, Location=target)
    with pytest.raises(OSError, match=f"{address}/manifest.json: "):
        TokenCache.open(address)
    assert len(server.requests) == 1


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    """An object store that contains the cache, and replaces the backends of s3, gs and hf."""
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
    local, remote = TokenCache.open(folder), TokenCache.open(f"{scheme}://bucket/toy")
    assert np.array_equal(all_codes(remote), all_codes(local))
    remote.verify()
    with pytest.raises(DamagedCache, match=f"{scheme}://bucket/other/manifest.json: missing"):
        TokenCache.open(f"{scheme}://bucket/other")


@pytest.mark.parametrize("change", CHANGES)
def test_changed_shard_in_a_store_is_refused(store: MemoryFileSystem, change: str) -> None:
    name = "s3://bucket/toy/shards/000001.tar"
    store.pipe_file(name, CHANGES[change](store.cat_file(name)))
    with pytest.raises(DamagedCache, match=r"shards/000001\.tar: (.*bytes|.*changed)"):
        TokenCache.open("s3://bucket/toy").codes(2)


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match="^s3://bucket/toy.*(s3fs|fsspec)") as caught:
        TokenCache.open("s3://bucket/toy")
    assert "is not JSON" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_exceptions_of_a_store_become_os_errors(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    class NoCredentials(Exception):
        """An exception that is not an OSError, like those of botocore and httpx."""

    def refuse(*args: object) -> None:
        raise NoCredentials("unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "open", refuse)
    with pytest.raises(OSError, match="s3://bucket/toy/manifest.json: .*unable to locate credentials"):
        TokenCache.open("s3://bucket/toy")
