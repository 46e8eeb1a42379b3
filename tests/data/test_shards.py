"""Shards: the same bytes every time, at once or not at all, readable by webdataset, and no change to them goes unnoticed."""

import io
import json
import os
import pickle
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data.shards import DamagedCache, ShardReader, ShardWriter, from_npy, sample_id, to_npy, write_json

Samples = list[tuple[str, dict[str, bytes]]]


def some_samples(count: int = 5) -> Samples:
    """Members of awkward sizes, in an order that is not the alphabet's."""
    draw = random.Random(0)
    return [
        (
            sample_id(f"video {i}"),
            {
                "json": b"{}",
                "codes.npy": draw.randbytes(300 + 137 * i),
                "a.bin": draw.randbytes([0, 1, 511, 512, 513][i]),
            },
        )
        for i in range(count)
    ]


def write(folder: Path, samples: Samples, number: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, number) as shard:
        for i, (key, members) in enumerate(samples):
            shard.add(key, members, {"path": f"video {i}"})
        shard.commit(skipped=[])
    return shard.tar


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards"), some_samples())


def copied(tar: Path, folder: Path, content: bytes) -> Path:
    """Another content under the record of a shard."""
    (folder / tar.name).write_bytes(content)
    (folder / tar.name).with_suffix(".json").write_bytes(tar.with_suffix(".json").read_bytes())
    return folder / tar.name


def test_written_twice_is_the_same_byte_for_byte(tar: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "elsewhere", some_samples())
    assert again.read_bytes() == tar.read_bytes()
    assert again.with_suffix(".json").read_bytes() == tar.with_suffix(".json").read_bytes()


def test_finished_shard_is_two_files_named_by_number(tmp_path: Path) -> None:
    write(tmp_path, some_samples(), number=12)
    assert sorted(os.listdir(tmp_path)) == ["000012.json", "000012.tar"]


def test_offsets_lead_to_the_right_content(tar: Path) -> None:
    reader = ShardReader(tar)
    samples = some_samples()
    for row in (3, 0, 4, 1, 2):
        key, members = samples[row]
        assert reader.samples[row]["id"] == key
        assert reader.samples[row]["path"] == f"video {row}"
        for extension, content in members.items():
            assert reader.read(row, extension) == content
    with pytest.raises(KeyError):
        reader.read(0, "none.npy")
    reader.verify()


def test_plain_webdataset_reads_the_same_samples(tar: Path) -> None:
    found = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    expected = some_samples()
    assert [sample["__key__"] for sample in found] == [key for key, _ in expected]
    for sample, (_, members) in zip(found, expected, strict=True):
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == members


def test_shard_names_no_person_host_or_time(tar: Path) -> None:
    with tarfile.open(tar) as archive:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in archive.getmembers()}
    assert facts == {(0, 0, 0, "bigdata", "bigdata", 0o444, True)}


def test_every_truncation_is_found_when_the_shard_is_opened(tar: Path, tmp_path: Path) -> None:
    content = tar.read_bytes()
    for length in range(0, len(content), 512):
        with pytest.raises(DamagedCache, match=rf"has {length} bytes, its record says {len(content)}"):
            ShardReader(copied(tar, tmp_path, content[:length]))


def test_bytes_behind_the_end_are_found(tar: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedCache, match="its record says"):
        ShardReader(copied(tar, tmp_path, tar.read_bytes() + bytes(512)))


def test_every_flipped_bit_is_found_by_verify(tar: Path, tmp_path: Path) -> None:
    content = tar.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        with pytest.raises(DamagedCache, match="changed since it was written"):
            ShardReader(copied(tar, tmp_path, changed)).verify()


def test_every_flipped_bit_of_a_member_is_found_when_it_is_read(tar: Path, tmp_path: Path) -> None:
    content = tar.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        row, extension = draw.randrange(5), draw.choice(["json", "codes.npy"])
        offset, size, _ = ShardReader(tar).samples[row]["members"][extension]
        changed = bytearray(content)
        changed[offset + draw.randrange(size)] ^= 1 << draw.randrange(8)
        reader = ShardReader(copied(tar, tmp_path, changed))
        with pytest.raises(DamagedCache, match=rf"{reader.samples[row]['id']}\.{extension} is damaged"):
            reader.read(row, extension)
        assert reader.read((row + 1) % 5, extension) == some_samples()[(row + 1) % 5][1][extension]


@pytest.mark.parametrize("suffix", [".tar", ".json"])
def test_missing_half_of_a_shard_is_named(tar: Path, tmp_path: Path, suffix: str) -> None:
    copy = copied(tar, tmp_path, tar.read_bytes())
    copy.with_suffix(suffix).unlink()
    with pytest.raises(DamagedCache, match=rf"000000\{suffix}: missing"):
        ShardReader(copy)


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"null", b"3", b'{"samples": []}', b"\xff\xfe", b'{"bytes": 3}'])
def test_record_that_is_none_is_refused(tar: Path, tmp_path: Path, record: bytes) -> None:
    copy = copied(tar, tmp_path, tar.read_bytes())
    copy.with_suffix(".json").write_bytes(record)
    with pytest.raises(DamagedCache, match="is not a shard record"):
        ShardReader(copy)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_inside_with_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(tmp_path, 0) as shard:
        for key, members in some_samples():
            shard.add(key, members, {})
        raise error
    assert os.listdir(tmp_path) == []


def test_a_shard_is_invisible_until_it_is_committed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0) as shard:
        for key, members in some_samples():
            shard.add(key, members, {})
        assert not [name for name in os.listdir(tmp_path) if name.endswith((".tar", ".json"))]
        shard.commit(skipped=[])
    assert sorted(os.listdir(tmp_path)) == ["000000.json", "000000.tar"]


def test_a_shard_left_without_commit_leaves_no_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0) as shard:
        shard.add(*some_samples()[0], {})
    assert os.listdir(tmp_path) == []


def test_failing_again_keeps_the_shard_that_is_there(tar: Path, tmp_path: Path) -> None:
    write(tmp_path, some_samples())
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0) as shard:
        shard.add("other", {"json": b"[]"}, {})
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["000000.json", "000000.tar"]
    assert (tmp_path / "000000.tar").read_bytes() == tar.read_bytes()


def test_full_disk_is_reported_as_such_and_leaves_no_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # files may not grow past 1 MiB
    try:
        with pytest.raises(OSError, match="File too large"), ShardWriter(tmp_path, 0) as shard:
            for i in range(40):
                shard.add(sample_id(str(i)), {"codes.npy": bytes(100_000)}, {})
            shard.commit(skipped=[])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_json_is_written_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [2]})
    assert json.loads(path.read_text()) == {"a": [2], "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads(path.read_text()) == {"a": [2], "b": 1}


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
def test_id_of_any_path_is_a_plain_name(path: str) -> None:
    assert re.fullmatch("[0-9a-f]{16}", sample_id(path))


def test_ids_of_like_paths_differ() -> None:
    paths = ["clip.v1.mp4", "clip.v2.mp4", "a/b", "a_b", "A/b", "\u00e9", "e\u0301", "\udcff", "\udcfe", "", " "]
    assert len({sample_id(path) for path in paths}) == len(paths)


def test_reader_survives_pickling_after_it_was_used(tar: Path) -> None:
    reader = ShardReader(tar)
    reader.read(0, "json")
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(1, "codes.npy") == some_samples()[1][1]["codes.npy"]


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "u1"])
def test_array_round_trip(dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 250, (2, 3, 4, 5)).astype(dtype)
    content = to_npy(array.transpose(3, 2, 1, 0).transpose(3, 2, 1, 0))
    found = from_npy(content, np.dtype(dtype), array.shape)
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype
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
    ids=["empty", "short", "long", "shape", "sign", "byte order", "lying shape", "objects"],
)
def test_array_of_any_other_kind_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedCache, match="is not uint16 of shape"):
        from_npy(content, np.dtype("<u2"), (2, 3))
