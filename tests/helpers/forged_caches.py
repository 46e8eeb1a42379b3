"""Malicious caches for tests: their content is forged, but all checksums are valid."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.shards import sample_id


class Forgery:
    """The manifest of a cache, and the record and tar of its shard 0. A case changes them, and `seal` writes them back.

    `canary`: path of a file that must not appear, since only code from the cache would write it.
    """

    def __init__(self, folder: Path, canary: Path) -> None:
        self.folder, self.canary = folder, canary
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.record = json.loads((folder / "shards" / "000000.json").read_text())
        self.tar = bytearray((folder / "shards" / "000000.tar").read_bytes())

    def put(self, extension: str, content: bytes, header: tarfile.TarInfo | None = None) -> None:
        """Append a member to the tar, and record it as the member of the first sample with this extension."""
        header = header or tarfile.TarInfo(f"{sample_id(self.manifest['spec']['videos'][0][0])}.{extension}")
        header.size = len(content) if header.isreg() else 0
        head = header.tobuf(tarfile.PAX_FORMAT)
        end = len(self.tar.rstrip(b"\0")) + 511 & ~511
        self.tar[end:] = head + content + bytes(-len(content) % 512 + 1024)
        self.write_member(extension, end + len(head), content)

    def write_member(self, extension: str, offset: int, content: bytes) -> None:
        """Write a member of the first sample at an offset of the tar, and record it."""
        table = self.record["members"].setdefault(extension, {k: [0] for k in ("row", "offset", "size", "crc")})
        self.tar[offset : offset + len(content)] = content
        for column, value in (("offset", offset), ("size", len(content)), ("crc", zlib.crc32(content))):
            table[column][0] = value

    def set_column(self, member: str, column: str, value: Any) -> None:
        """Change an entry of the record about a member of the first sample."""
        self.record["members"][member][column][0] = value

    def codes(self, content: bytes) -> None:
        """Replace the codes of the first sample by content of the same size."""
        assert len(content) == self.record["members"]["codes.npy"]["size"][0]
        self.write_member("codes.npy", self.record["members"]["codes.npy"]["offset"][0], content)

    def empty(self, size: int) -> None:
        """Remove all samples of shard 0 from its record, and record this size of the tar."""
        self.record.update(bytes=size, members={}, samples={column: [] for column in self.record["samples"]})
        self.record.update({k: "" for k in self.record if k.startswith("clip_")})

    def seal(self) -> None:
        """Write everything back with valid sizes and checksums, except for those that a forgery has set."""
        shards = self.folder / "shards"
        (shards / "000000.tar").write_bytes(self.tar)
        for field, value in (("bytes", len(self.tar)), ("sha256", hashlib.sha256(self.tar).hexdigest())):
            if self.record[field] == self.manifest["shards"][0][field]:
                self.record[field] = value
        (shards / "000000.json").write_text(json.dumps(sealed(self.record)))
        for entry in self.manifest["shards"]:
            path = shards / f"{entry['file'][:6]}.json"
            if path.exists():
                entry["record"] = hashlib.sha256(path.read_bytes()).hexdigest()
                _update_entry(self.manifest, entry, json.loads(path.read_bytes()))
        seal(self.folder, self.manifest)


def _update_entry(manifest: dict[str, Any], entry: dict[str, Any], record: dict[str, Any]) -> None:
    """Copy a shard's record into its entry of the manifest, unless the record is malformed."""
    samples = record["samples"]
    try:
        manifest["samples"] += len(samples["video"]) - entry["samples"]
        entry.update(samples=len(samples["video"]), bytes=record["bytes"], sha256=record["sha256"])
        manifest["clips"] = manifest["samples"] * manifest["spec"]["clip"]["views"]
    except (KeyError, TypeError):
        pass


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its valid checksum."""
    content = {k: v for k, v in record.items() if k != "checksum"}
    return {**content, "checksum": _sha256(content)}


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with its valid key and checksum."""
    manifest.pop("checksum", None)
    manifest["key"] = _sha256(manifest.get("spec", {}))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "checksum": _sha256(manifest)}))


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _pickle(f: Forgery) -> bytes:
    return pickle.dumps(Payload(f.canary))


class Payload:
    """An object that runs `touch canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._command = f"touch {canary}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self._command,)


CASES: dict[str, tuple[Callable[[Forgery], object], str | None]] = {}
"""Name -> the forgery, and the first of `audited_process.OPERATIONS` that must refuse it, or None if all must succeed."""


def case(name: str, refused_at: str | None, forge: Callable[[Forgery], object]) -> None:
    """Add a case."""
    CASES[name] = (forge, refused_at)


def _header(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type = kind
    for field, value in fields.items():
        setattr(header, field, value)
    return header


# --- members that are dangerous when unpacked


case("untouched", None, lambda f: None)
case("a member of another folder", None, lambda f: f.put("txt", b"x", _header(f"../../{f.canary.name}")))
case("a member of an absolute path", None, lambda f: f.put("txt", b"x", _header(str(f.canary))))
case("a symbolic link", None, lambda f: f.put("lnk", b"", _header("a.lnk", tarfile.SYMTYPE, linkname="/etc/passwd")))
case("a hard link", None, lambda f: f.put("lnk", b"", _header("a.lnk", tarfile.LNKTYPE, linkname="/etc/passwd")))
case("a device", None, lambda f: f.put("dev", b"", _header("a.dev", tarfile.CHRTYPE, devmajor=1, devminor=8)))
case("a pipe", None, lambda f: f.put("pipe", b"", _header("a.pipe", tarfile.FIFOTYPE)))
case("a nested tar", None, lambda f: f.put("tar", bytes(f.tar)))
case("a gzip bomb", None, lambda f: f.put("json.gz", gzip.compress(bytes(2**27), 1)))
case("a script", None, lambda f: f.put("py", f"open({str(f.canary)!r}, 'w')".encode()))
case("a path file", None, lambda f: f.put("pth", f"import os; os.system('touch {f.canary}')".encode()))
for _extension in ("pkl", "pickle", "pyd", "pth", "pt", "cbor", "msg"):
    case(f"a pickle named {_extension}", None, lambda f, e=_extension: f.put(e, _pickle(f)))
for _name in ("e\u0301.txt", "\u202egpj.exe", "a\0b.txt", "\u2025/x", "\uff0e\uff0e/x", "x" * 3000, "\n.txt"):
    case(f"a member named {ascii(_name):.20}", None, lambda f, n=_name: f.put("txt", b"x", _header(n)))


def _sparse_member(f: Forgery) -> None:
    sizes = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**42)}
    f.put("txt", b"1\n0\n1\n" + bytes(506), _header("a.txt", pax_headers={**sizes, "GNU.sparse.name": "b.txt"}))


case("a sparse member", None, _sparse_member)


def _hundred_thousand_members(f: Forgery) -> None:
    f.tar[len(f.tar.rstrip(b"\0")) + 511 & ~511 :] = _header("a.txt").tobuf() * 100_000 + bytes(1024)
    for number in range(10_000):
        f.record["members"][f"{number}"] = {"row": [0], "offset": [0], "size": [0], "crc": [0]}


case("a hundred thousand members", None, _hundred_thousand_members)


def _tar_header_with_a_false_size(f: Forgery) -> None:
    f.tar[124:136] = b"77777777777\0"
    f.tar[148:156] = b" " * 8
    f.tar[148:156] = b"%06o\0 " % sum(f.tar[:512])


case("a tar header with a false size", None, _tar_header_with_a_false_size)
case("the same sample twice in the tar", None, lambda f: f.tar.extend(bytes(f.tar)))
case("a tar that is gzip", "codes", lambda f: setattr(f, "tar", bytearray(gzip.compress(f.tar, 0).ljust(2**15, b"\0"))))


# --- false records


for _value in (-1, -512, -(2**63), 2**40, 2**63 - 1, 2**63, 2**64, 1e308, 10**400, 0.5, "0", None, [0]):
    case(f"an offset of {_value!s:.20}", "open", lambda f, v=_value: f.set_column("codes.npy", "offset", v))
for _value in (-1, 0, 2**40, 2**63 - 1, 2**64):
    case(f"codes of {_value} bytes", "open", lambda f, v=_value: f.set_column("codes.npy", "size", v))
case("facts of 4 TB", "open", lambda f: f.set_column("json", "size", 2**42))
case("a member of a missing sample", "open", lambda f: f.set_column("json", "row", 99))
case("a record of a larger tar", "open", lambda f: f.record.update(bytes=2**40))
case("a tar of -1 bytes", "open", lambda f: f.record.update(bytes=-1))
case("the same video twice", "open", lambda f: f.record["samples"].update(video=[0, 0]))
case("a video of another shard", "open", lambda f: f.record["samples"].update(video=[0, 2]))
case("a video that is not listed", "open", lambda f: f.record["samples"].update(video=[0, 99]))
case("views that overflow", "open", lambda f: f.record["samples"].update(views=[2**62, 2]))
case("a video that is an object", "open", lambda f: f.manifest["spec"].update(videos=[dict.fromkeys("abcde", 1)] * 4))
case("the same shard twice", "open", lambda f: f.manifest["shards"].append(f.manifest["shards"][0]))
case("a grid of 4 TB", "open", lambda f: f.manifest["spec"].update(codes_shape=[2**10, 2**10, 2**11]))
case("infinity in the manifest", "open", lambda f: f.manifest.update(unigram_bits=float("inf")))
case("a number of 401 digits in the manifest", "open", lambda f: f.manifest.update(unigram_bits=10**400))
for _clip in (
    *({"size": 2**13}, {"frames": 2**22}, {"size": 2**40}, {"frames": 2**62, "size": 2**62}, {"stride": 2**21}),
    *({"views": 3}, {"views": 2**40}, {"size": 2**12, "scales": [1, 0.1]}),
):
    case(f"a clip of {_clip}", "open", lambda f, c=_clip: f.manifest["spec"]["clip"].update(c))
case("a codebook that is a pickle", "codebook", lambda f: _codebook(f, _pickle(f)))
case("a codebook of 4 TB", "codebook", lambda f: _codebook(f, (2**42).to_bytes(8, "little") + b"{}"))
case("an empty codebook", "codebook", lambda f: _codebook(f, (2).to_bytes(8, "little") + b"{}"))
case("a codebook that is a number", "open", lambda f: f.manifest.update(codebook=1))


def _codebook(f: Forgery, content: bytes) -> None:
    (f.folder / "codebook.safetensors").write_bytes(content)
    f.manifest["codebook"] = hashlib.sha256(content).hexdigest()


# --- false content


def _npy(descr: str, shape: tuple[int, ...], content: bytes, size: int) -> bytes:
    """A .npy file of a given size whose header declares any type and shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return (file.getvalue() + content).ljust(size, b"\0")[:size]


def _size(f: Forgery) -> int:
    return f.record["members"]["codes.npy"]["size"][0]


case("codes of 4 TB", "codes", lambda f: f.codes(_npy("<u2", (2**41,), b"", _size(f))))
case("codes of objects", "codes", lambda f: f.codes(_npy("|O", (1,), _pickle(f), _size(f))))
case("codes of another type", "codes", lambda f: f.codes(_npy("<f2", (2, 2, 3, 3), b"", _size(f))))
case("codes that are a pickle", "codes", lambda f: f.codes(_pickle(f).ljust(_size(f), b".")))
case("codes outside the vocabulary", "codes", lambda f: f.codes(_npy("<u2", (2, 2, 3, 3), b"\xff" * 72, _size(f))))
case("pixels of objects", "pixels", lambda f: f.put("view00.npy", _npy("|O", (1,), _pickle(f), 896)))
case("pixels of 4 TB", "pixels", lambda f: f.put("view00.npy", _npy("|u1", (2**42,), b"", 896)))
for _name, _facts in (
    ("a pickle", b"\x80\x04."),
    ("nested too deeply", b"[" * 100_000),
    ("null", b"null"),
    ("a list", b"[1]"),
    ("a long number", b"9" * 5000),
    ("not UTF-8", b'{"path": "\xff"}'),
    ("empty", b""),
):
    case(f"facts that are {_name}", "facts", lambda f, c=_facts: f.put("json", c))
case("no facts", "facts", lambda f: f.record["members"].pop("json"))
case("facts without views", "facts", lambda f: f.put("json", b'{"path": "0/000.mp4"}'))
_INVALID_VIEWS = b'{"frames":8,"start":[1],"real":["x"],"top":[0],"left":[0],"flip":[0],"stride":[],"crop":1}'
case("facts with invalid views", "facts", lambda f: f.put("json", _INVALID_VIEWS))


for _rate in (b"1e999", b"NaN", b"-5", b"0", b"1" * 401):
    case(f"facts of rate {_rate.decode()[:9]}", "facts", lambda f, r=_rate: f.put("json", _facts_with_rate(f, r)))


def _facts_with_rate(f: Forgery, rate: bytes) -> bytes:
    table = f.record["members"]["json"]
    start = table["offset"][0]
    facts = json.loads(f.tar[start : start + table["size"][0]])
    return json.dumps({**facts, "rate": "RATE"}).encode().replace(b'"RATE"', rate)


def _views_that_overflow_together(f: Forgery) -> None:
    header = len(_npy("<u2", (2**62, 2, 3, 3), b"", 999).rstrip(b"\0"))
    f.record["samples"] = {**{k: [0] * 4 for k in f.record["samples"]}, "video": [0, 1, 2, 3], "views": [2**62] * 4}
    f.record["members"] = {
        "codes.npy": {"row": [0, 1, 2, 3], "offset": [512] * 4, "size": [header] * 4, "crc": [0] * 4}
    }
    f.record.update({k: "" for k in f.record if k.startswith("clip_")})
    f.manifest["shards"].pop()


case("views that overflow together", "open", _views_that_overflow_together)


def _video_without_a_name_damaged(f: Forgery) -> None:
    f.manifest["spec"]["videos"][0][0] = None
    f.record["members"]["codes.npy"]["crc"][0] ^= 1


case("a video without a name, damaged", "open", _video_without_a_name_damaged)


def _jpeg_of_400_megapixels(f: Forgery) -> None:
    f.manifest["spec"]["keep_pixels"] = "jpeg"
    small = io.BytesIO()
    Image.new("L", (16, 16)).save(small, "JPEG")
    frame = bytearray(small.getvalue())
    # Position of height and width in the start-of-frame segment.
    size_at = frame.index(b"\xff\xc0") + 5
    frame[size_at : size_at + 4] = (20_000).to_bytes(2, "big") * 2
    f.put("view00.jpg", bytes(frame))


case("a JPEG of 400 megapixels", "pixels", _jpeg_of_400_megapixels)
