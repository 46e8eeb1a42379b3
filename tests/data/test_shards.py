"""Shards have reproducible bytes, are written atomically, and are readable by webdataset. Every change to them is detected."""

import io
import os
import pickle
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data.cache.index import ShardIndex, open_shards
from data.cache.storage import Folder
from data.shards import DamagedCache, ShardWriter, from_npy, sample_id, to_npy
from tests.helpers.cache_contents import clip_checksums

Samples = list[tuple[str, dict[str, bytes]]]
PREIMAGE = {
    "videos": [[f"video {i}", 1, None, None, None] for i in range(5)],
    "codes_shape": [2, 3, 3],
    "vocab_size": 64,
    "levels": None,
}


def some_samples(count: int = 5) -> Samples:
    """Return samples whose members are not sorted and have sizes around that of a tar block. Sample i has i + 1 views."""
    rng, draw = np.random.default_rng(0), random.Random(0)
    return [
        (
            sample_id(f"video {i}"),
            {
                "json": b"{}",
                "codes.npy": to_npy(rng.integers(64, size=(i + 1, 2, 3, 3)).astype("<u2")),
                "a.bin": draw.randbytes([0, 1, 511, 512, 513][i]),
            },
        )
        for i in range(count)
    ]


def write(folder: Path, samples: Samples, number: int = 0) -> Path:
    """Write a shard with a record as in a cache; return its tar."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    codes_N = []
    with ShardWriter(folder / "shards", number, ("video", "views", "padded", "frames")) as shard:
        for i, (key, members) in enumerate(samples):
            shard.add(key, members, {"video": i, "views": i + 1, "padded": 0, "frames": 20})
            codes_N.append(np.load(io.BytesIO(members["codes.npy"])))
        shard.commit(skipped=[], **clip_checksums(codes_N))
    return shard.tar


def opened(tar: Path) -> ShardIndex:
    return open_shards(Folder(tar.parent.parent), [tar.name], PREIMAGE)[0]


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards"), some_samples())


def copied(tar: Path, folder: Path, content: bytes | bytearray) -> Path:
    """Write a copy of a shard with other content and the same record."""
    copy = folder / "shards" / tar.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(content)
    copy.with_suffix(".json").write_bytes(tar.with_suffix(".json").read_bytes())
    return copy


def test_same_samples_give_the_same_bytes(tar: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "elsewhere", some_samples())
    assert again.read_bytes() == tar.read_bytes()
    assert again.with_suffix(".json").read_bytes() == tar.with_suffix(".json").read_bytes()


def test_finished_shard_is_a_tar_and_a_record(tmp_path: Path) -> None:
    write(tmp_path, some_samples(), number=12)
    assert sorted(os.listdir(tmp_path / "shards")) == ["000012.json", "000012.tar"]


def test_members_are_read_by_offset(tar: Path) -> None:
    shard = opened(tar)
    samples = some_samples()
    for row in (3, 0, 4, 1, 2):
        key, members = samples[row]
        assert shard.key(row) == key
        assert shard.path(row) == f"video {row}"
        assert sorted(shard.extensions(row)) == sorted(members)
        for extension, content in members.items():
            assert shard.read(row, extension) == content
        assert np.array_equal(shard.codes(row), np.load(io.BytesIO(members["codes.npy"])))
    with pytest.raises(DamagedCache, match="none.npy"):
        shard.read(0, "none.npy")
    shard.verify()
    assert shard.damage() == []


def test_samples_may_have_different_members(tmp_path: Path) -> None:
    samples = some_samples()
    for row in (0, 2, 4):
        del samples[row][1]["a.bin"]
    shard = opened(write(tmp_path, samples))
    assert shard.read(3, "a.bin") == samples[3][1]["a.bin"]
    assert "a.bin" not in shard.extensions(2)
    for row in (0, 2, 4):
        with pytest.raises(DamagedCache, match="a.bin"):
            shard.read(row, "a.bin")


def test_webdataset_reads_the_same_samples(tar: Path) -> None:
    loaded = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    expected = some_samples()
    assert [sample["__key__"] for sample in loaded] == [key for key, _ in expected]
    for sample, (_, members) in zip(loaded, expected, strict=True):
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == members


def test_tar_headers_contain_no_user_host_or_time(tar: Path) -> None:
    with tarfile.open(tar) as archive:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in archive.getmembers()}
    assert facts == {(0, 0, 0, "bigdata", "bigdata", 0o444, True)}


def test_every_truncation_is_detected_when_the_shard_is_opened(tar: Path, tmp_path: Path) -> None:
    content = tar.read_bytes()
    for length in range(0, len(content), 64):
        with pytest.raises(DamagedCache, match=rf"{length} bytes.* {len(content)}"):
            opened(copied(tar, tmp_path, content[:length]))


def test_appended_bytes_are_detected(tar: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedCache, match=str(tar.stat().st_size)):
        opened(copied(tar, tmp_path, tar.read_bytes() + bytes(512)))


def test_every_flipped_bit_is_detected_by_verify(tar: Path, tmp_path: Path) -> None:
    content = tar.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        with pytest.raises(DamagedCache, match=r"000000\.tar: "):
            opened(copied(tar, tmp_path, changed)).verify()


def test_damage_outside_of_samples_is_reported_as_such(tar: Path, tmp_path: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[-1] ^= 1  # in the padding after the last member
    (line,) = opened(copied(tar, tmp_path, content)).damage()
    assert "000000.tar: " in line
    assert "outside" in line


def test_every_damaged_sample_is_reported(tar: Path, tmp_path: Path) -> None:
    content = bytearray(tar.read_bytes())
    for row in (4, 1):
        begin = content.index(some_samples()[row][1]["codes.npy"])
        content[begin + 100] ^= 1
    lines = opened(copied(tar, tmp_path, content)).damage()
    assert [re.findall(r"sample (\w+) \(video (\d)\), codes\.npy", line) for line in lines] == [
        [(sample_id(f"video {row}"), str(row))] for row in (1, 4)
    ]


def test_every_flipped_bit_of_a_member_is_detected_when_it_is_read(tar: Path, tmp_path: Path) -> None:
    content, samples = tar.read_bytes(), some_samples()
    draw = random.Random(0)
    for _ in range(200):
        row, extension = draw.randrange(1, 5), draw.choice(["json", "codes.npy", "a.bin"])
        begin = content.index(os.fsencode(f"{sample_id(f'video {row}')}.{extension}")) + 512
        changed = bytearray(content)
        changed[begin + draw.randrange(len(samples[row][1][extension]))] ^= 1 << draw.randrange(8)
        shard = opened(copied(tar, tmp_path, changed))
        with pytest.raises(DamagedCache, match=rf"sample {shard.key(row)} \(video {row}\), {extension}"):
            shard.read(row, extension)
        assert shard.read((row + 1) % 5, extension) == samples[(row + 1) % 5][1][extension]


@pytest.mark.parametrize("suffix", [".tar", ".json"])
def test_missing_tar_or_record_is_reported(tar: Path, tmp_path: Path, suffix: str) -> None:
    copy = copied(tar, tmp_path, tar.read_bytes())
    copy.with_suffix(suffix).unlink()
    with pytest.raises(DamagedCache, match=rf"000000\{suffix}: "):
        opened(copy)


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"null", b"3", b'{"samples": []}', b"\xff\xfe", b'{"bytes": 3}'])
def test_malformed_record_is_refused(tar: Path, tmp_path: Path, record: bytes) -> None:
    copy = copied(tar, tmp_path, tar.read_bytes())
    copy.with_suffix(".json").write_bytes(record)
    with pytest.raises(DamagedCache, match=r"000000\.json: "):
        opened(copy)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_in_the_with_block_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(tmp_path, 0, ()) as shard:
        for key, members in some_samples():
            shard.add(key, members, {})
        raise error
    assert os.listdir(tmp_path) == []


def test_shard_has_no_final_files_before_commit(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, ()) as shard:
        for key, members in some_samples():
            shard.add(key, members, {})
        assert not [name for name in os.listdir(tmp_path) if name.endswith((".tar", ".json"))]
        shard.commit(skipped=[])
    assert sorted(os.listdir(tmp_path)) == ["000000.json", "000000.tar"]


def test_shard_without_commit_leaves_no_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, ()) as shard:
        shard.add(*some_samples()[0], {})
    assert os.listdir(tmp_path) == []


def test_failed_second_writer_keeps_the_existing_shard(tar: Path, tmp_path: Path) -> None:
    again = write(tmp_path, some_samples())
    with pytest.raises(RuntimeError), ShardWriter(again.parent, 0, ()) as shard:
        shard.add("other", {"json": b"[]"}, {})
        raise RuntimeError
    assert sorted(os.listdir(again.parent)) == ["000000.json", "000000.tar"]
    assert again.read_bytes() == tar.read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/abs.mp4",
        "a.b.c.mp4",
        "clip.v1.mp4",
        "a b",
        "",
        "\n",
        "x" * 5000,
        "\U0001f3ac",
        "\udcff\udcfe",
    ],
)
def test_sample_id_of_any_path_is_hexadecimal(path: str) -> None:
    assert re.fullmatch("[0-9a-f]{16}", sample_id(path))


def test_sample_ids_of_similar_paths_differ() -> None:
    paths = ["clip.v1.mp4", "clip.v2.mp4", "a/b", "a_b", "A/b", "\u00e9", "e\u0301", "\udcff", "\udcfe", "", " "]
    assert len({sample_id(path) for path in paths}) == len(paths)


def test_used_shard_can_be_pickled(tar: Path) -> None:
    shard = opened(tar)
    shard.read(0, "json")
    again = pickle.loads(pickle.dumps(shard))
    assert again.read(1, "codes.npy") == some_samples()[1][1]["codes.npy"]


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "u1"])
def test_array_is_the_same_after_encoding_and_decoding(dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 250, (2, 3, 4, 5)).astype(dtype)
    content = to_npy(array.transpose(3, 2, 1, 0).transpose(3, 2, 1, 0))
    decoded = from_npy(content, np.dtype(dtype), array.shape)
    assert np.array_equal(decoded, array)
    assert decoded.dtype == array.dtype
    assert np.array_equal(np.load(io.BytesIO(content), allow_pickle=False), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        to_npy(np.zeros((2, 3), "<u2"))[:-1],
        to_npy(np.zeros((2, 3), "<u2")) + b"\0",
        to_npy(np.zeros((3, 2), "<u2")),
        to_npy(np.zeros((2, 3), "<i2")),
        to_npy(np.zeros((2, 3), ">u2")),
        to_npy(np.zeros((2, 3), "<u2")).replace(b"(2, 3)", b"(2,10)"),
        to_npy(np.zeros((2, 3), "<u2")).replace(b"'<u2'", b"'|O' "),
    ],
    ids=["empty", "short", "long", "shape", "sign", "byte order", "forged shape", "objects"],
)
def test_array_of_another_type_shape_or_length_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedCache, match=r"uint16 of shape \(2, 3\)"):
        from_npy(content, np.dtype("<u2"), (2, 3))
