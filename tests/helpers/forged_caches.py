"""Caches of somebody who means harm: whatever lies in them, every checksum fits."""

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
    """A cache that is taken apart, changed and sealed again. Of shard 0: `record`, `tar`."""

    def __init__(self, folder: Path, canary: Path) -> None:
        self.folder, self.canary = folder, canary
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.record = json.loads((folder / "shards" / "000000.json").read_text())
        self.tar = bytearray((folder / "shards" / "000000.tar").read_bytes())

    def put(self, extension: str, content: bytes, header: tarfile.TarInfo | None = None) -> None:
        """Append a member, which the record says belongs to the first sample, whatever it had of that name before."""
        header = header or tarfile.TarInfo(f"{sample_id(self.manifest['spec']['videos'][0][0])}.{extension}")
        header.size = len(content) if header.isreg() else 0
        head = header.tobuf(tarfile.PAX_FORMAT)
        end = len(self.tar.rstrip(b"\0")) + 511 & ~511
        self.tar[end:] = head + content + bytes(-len(content) % 512 + 1024)
        self.place(extension, end + len(head), content)

    def place(self, extension: str, offset: int, content: bytes) -> None:
        """Let the record say that a member of the first sample is somewhere."""
        table = self.record["members"].setdefault(extension, {k: [0] for k in ("row", "offset", "size", "crc")})
        self.tar[offset : offset + len(content)] = content
        for column, value in (("offset", offset), ("size", len(content)), ("crc", zlib.crc32(content))):
            table[column][0] = value

    def codes(self, content: bytes) -> None:
        """Other bytes in the place of the first sample's codes."""
        assert len(content) == self.record["members"]["codes.npy"]["size"][0]
        self.place("codes.npy", self.record["members"]["codes.npy"]["offset"][0], content)

    def empty(self, size: int) -> None:
        """Leave shard 0 without a sample, and let its record say that the tar has so many bytes."""
        self.record.update(bytes=size, members={}, samples={column: [] for column in self.record["samples"]})
        self.record.update({k: "" for k in self.record if k.startswith("clip_")})

    def seal(self) -> None:
        """Write everything back so that sizes and checksums fit, except those that were set already."""
        shards = self.folder / "shards"
        (shards / "000000.tar").write_bytes(self.tar)
        whole = {"bytes": len(self.tar), "sha256": hashlib.sha256(self.tar).hexdigest()}
        self.record = {
            **self.record,
            **{k: v for k, v in whole.items() if self.record[k] == self.manifest["shards"][0][k]},
        }
        (shards / "000000.json").write_text(json.dumps(sealed(self.record)))
        for entry in self.manifest["shards"]:
            path = shards / f"{entry['file'][:6]}.json"
            if path.exists():
                entry["record"] = hashlib.sha256(path.read_bytes()).hexdigest()
                agree(self.manifest, entry, json.loads(path.read_bytes()))
        seal(self.folder, self.manifest)


def agree(manifest: dict[str, Any], entry: dict[str, Any], record: dict[str, Any]) -> None:
    """Let the manifest say of a shard what its record says, as far as that makes sense."""
    samples = record["samples"]
    try:
        manifest["samples"] += len(samples["video"]) - entry["samples"]
        entry.update(samples=len(samples["video"]), bytes=record["bytes"], sha256=record["sha256"])
        manifest["clips"] = manifest["samples"] * manifest["spec"]["clip"]["views"]
    except (KeyError, TypeError):
        pass


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the checksum that it should have."""
    content = {k: v for k, v in record.items() if k != "checksum"}
    return {**content, "checksum": _sha256(content)}


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the key and the checksum that it should have."""
    manifest.pop("checksum", None)
    manifest["key"] = _sha256(manifest.get("spec", {}))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "checksum": _sha256(manifest)}))


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Payload:
    """Unpickled, it runs a program."""

    def __init__(self, canary: Path) -> None:
        self._command = f"touch {canary}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self._command,)


CASES: dict[str, tuple[Callable[[Forgery], object], str | None]] = {}
"""Name -> how it is made, and what of `watched.EVERYTHING` refuses it first: None where all can be read."""


def case(name: str, refused_at: str | None) -> Callable[[Callable[[Forgery], object]], Callable[[Forgery], object]]:
    def register(make: Callable[[Forgery], object]) -> Callable[[Forgery], object]:
        CASES[name] = (make, refused_at)
        return make

    return register


def _header(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type = kind
    for field, value in fields.items():
        setattr(header, field, value)
    return header


# --- members that a careless reader would unpack


case("untouched", None)(lambda f: None)
case("a member of another folder", None)(lambda f: f.put("txt", b"x", _header(f"../../{f.canary.name}")))
case("a member of an absolute path", None)(lambda f: f.put("txt", b"x", _header(str(f.canary))))
case("a symbolic link", None)(lambda f: f.put("lnk", b"", _header("a.lnk", tarfile.SYMTYPE, linkname="/etc/passwd")))
case("a hard link", None)(lambda f: f.put("lnk", b"", _header("a.lnk", tarfile.LNKTYPE, linkname="/etc/passwd")))
case("a device", None)(lambda f: f.put("dev", b"", _header("a.dev", tarfile.CHRTYPE, devmajor=1, devminor=8)))
case("a pipe", None)(lambda f: f.put("pipe", b"", _header("a.pipe", tarfile.FIFOTYPE)))
case("a nested tar", None)(lambda f: f.put("tar", bytes(f.tar)))
case("a gzip bomb", None)(lambda f: f.put("json.gz", gzip.compress(bytes(2**27), 1)))
case("a script", None)(lambda f: f.put("py", f"open({str(f.canary)!r}, 'w')".encode()))
case("a path file", None)(lambda f: f.put("pth", f"import os; os.system('touch {f.canary}')".encode()))
for _extension in ("pkl", "pickle", "pyd", "pth", "pt", "cbor", "msg"):
    case(f"a pickle named {_extension}", None)(lambda f, e=_extension: f.put(e, pickle.dumps(Payload(f.canary))))
for _name in ("e\u0301.txt", "\u202egpj.exe", "a\0b.txt", "\u2025/x", "\uff0e\uff0e/x", "x" * 3000, "\n.txt"):
    case(f"a member named {ascii(_name):.20}", None)(lambda f, n=_name: f.put("txt", b"x", _header(n)))


@case("a sparse member", None)
def _(f: Forgery) -> None:
    sizes = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**42)}
    f.put("txt", b"1\n0\n1\n" + bytes(506), _header("a.txt", pax_headers={**sizes, "GNU.sparse.name": "b.txt"}))


@case("a hundred thousand members", None)
def _(f: Forgery) -> None:
    f.tar[len(f.tar.rstrip(b"\0")) + 511 & ~511 :] = _header("a.txt").tobuf() * 100_000 + bytes(1024)
    for number in range(10_000):
        f.record["members"][f"{number}"] = {"row": [0], "offset": [0], "size": [0], "crc": [0]}


@case("a tar header that lies about the size", None)
def _(f: Forgery) -> None:
    f.tar[124:136] = b"77777777777\0"
    f.tar[148:156] = b" " * 8
    f.tar[148:156] = b"%06o\0 " % sum(f.tar[:512])


case("the same sample twice in the tar", None)(lambda f: f.tar.extend(bytes(f.tar)))
case("a tar that is gzip", "codes")(
    lambda f: f.tar.__setitem__(slice(None), gzip.compress(f.tar, 0).ljust(2**15, b"\0"))
)


# --- records that lie


def _record(name: str, member: str, column: str, value: Any) -> None:
    case(name, "open")(lambda f: f.record["members"][member][column].__setitem__(0, value))


for _value in (-1, -512, -(2**63), 2**40, 2**63 - 1, 2**63, 2**64, 1e308, 10**400, 0.5, "0", None, [0]):
    _record(f"an offset of {_value!s:.20}", "codes.npy", "offset", _value)
for _value in (-1, 0, 2**40, 2**63 - 1, 2**64):
    _record(f"codes of {_value} bytes", "codes.npy", "size", _value)
_record("facts of 4 TB", "json", "size", 2**42)
_record("a member of no sample", "json", "row", 99)
case("a tar of more bytes than there are", "open")(lambda f: f.record.update(bytes=2**40))
case("a tar of -1 bytes", "open")(lambda f: f.record.update(bytes=-1))
case("the same video twice", "open")(lambda f: f.record["samples"].update(video=[0, 0]))
case("a video of another shard", "open")(lambda f: f.record["samples"].update(video=[0, 2]))
case("a video that is not listed", "open")(lambda f: f.record["samples"].update(video=[0, 99]))
case("views that overflow", "open")(lambda f: f.record["samples"].update(views=[2**62, 2]))
case("a video that is a table", "open")(
    lambda f: f.manifest["spec"]["videos"].__setitem__(0, dict.fromkeys("abcde", 1))
)
case("the same shard twice", "open")(lambda f: f.manifest["shards"].append(f.manifest["shards"][0]))
case("a grid of 4 TB", "open")(lambda f: f.manifest["spec"].update(codes_shape=[2**10, 2**10, 2**11]))
case("infinity in the manifest", "open")(lambda f: f.manifest.update(unigram_bits=float("inf")))
case("a codebook that is a pickle", "codebook")(lambda f: _codebook(f, pickle.dumps(Payload(f.canary))))
case("a codebook of 4 TB", "codebook")(lambda f: _codebook(f, (2**42).to_bytes(8, "little") + b"{}"))
case("a codebook of nothing", "codebook")(lambda f: _codebook(f, (2).to_bytes(8, "little") + b"{}"))
case("a codebook that is a number", "codebook")(lambda f: f.manifest.update(codebook=1))


def _codebook(f: Forgery, content: bytes) -> None:
    (f.folder / "codebook.safetensors").write_bytes(content)
    f.manifest["codebook"] = hashlib.sha256(content).hexdigest()


# --- contents that lie


def _npy(descr: str, shape: tuple[int, ...], content: bytes, size: int) -> bytes:
    """An array file of a certain size, which claims another type or shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return (file.getvalue() + content).ljust(size, b"\0")[:size]


def _size(f: Forgery) -> int:
    return f.record["members"]["codes.npy"]["size"][0]


case("codes of 4 TB", "codes")(lambda f: f.codes(_npy("<u2", (2**41,), b"", _size(f))))
case("codes of objects", "codes")(lambda f: f.codes(_npy("|O", (1,), pickle.dumps(Payload(f.canary)), _size(f))))
case("codes of another type", "codes")(lambda f: f.codes(_npy("<f2", (2, 2, 3, 3), b"", _size(f))))
case("codes that are a pickle", "codes")(lambda f: f.codes(pickle.dumps(Payload(f.canary)).ljust(_size(f), b".")))
case("codes beyond the vocabulary", "codes")(lambda f: f.codes(_npy("<u2", (2, 2, 3, 3), b"\xff" * 72, _size(f))))
case("pixels of objects", "pixels")(
    lambda f: f.put("view00.npy", _npy("|O", (1,), pickle.dumps(Payload(f.canary)), 896))
)
case("pixels of 4 TB", "pixels")(lambda f: f.put("view00.npy", _npy("|u1", (2**42,), b"", 896)))
for _name, _facts in (
    ("a pickle", b"\x80\x04."),
    ("as deep as the sea", b"[" * 100_000),
    ("null", b"null"),
    ("no object", b"[1]"),
    ("a long number", b"9" * 5000),
    ("no text", b'{"path": "\xff"}'),
    ("empty", b""),
):
    case(f"facts that are {_name}", "facts")(lambda f, c=_facts: f.put("json", c))
case("facts without views", "facts")(lambda f: f.put("json", b'{"path": "0/000.mp4"}'))
case("facts of views that are none", "facts")(
    lambda f: f.put(
        "json", b'{"frames":8,"start":[1],"real":["x"],"top":[0],"left":[0],"flip":[0],"stride":[],"crop":1}'
    )
)


@case("views that overflow together", "open")
def _(f: Forgery) -> None:
    header = len(_npy("<u2", (2**62, 2, 3, 3), b"", 999).rstrip(b"\0"))
    f.record["samples"] = {**{k: [0] * 4 for k in f.record["samples"]}, "video": [0, 1, 2, 3], "views": [2**62] * 4}
    f.record["members"] = {
        "codes.npy": {"row": [0, 1, 2, 3], "offset": [512] * 4, "size": [header] * 4, "crc": [0] * 4}
    }
    f.record.update({k: "" for k in f.record if k.startswith("clip_")})
    f.manifest["shards"].pop()


@case("no facts", "facts")
def _(f: Forgery) -> None:
    del f.record["members"]["json"]


@case("a video without a name, damaged", "open")
def _(f: Forgery) -> None:
    f.manifest["spec"]["videos"][0][0] = None
    f.record["members"]["codes.npy"]["crc"][0] ^= 1


@case("a JPEG of 400 megapixels", "pixels")
def _(f: Forgery) -> None:
    f.manifest["spec"]["keep_pixels"] = "jpeg"
    small = io.BytesIO()
    Image.new("L", (16, 16)).save(small, "JPEG")
    frame = bytearray(small.getvalue())
    place = frame.index(b"\xff\xc0") + 5
    frame[place : place + 4] = (20_000).to_bytes(2, "big") * 2
    f.put("view00.jpg", bytes(frame))
