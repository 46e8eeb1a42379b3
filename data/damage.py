"""Damage that a decoder alone does not find: H.264, HEVC, VP8 and VP9 have a meaning for almost any bytes.

`container_damage` looks into a container's own books: checksums, sync bytes, an index. They are exact and cost one
reading of the file; MP4 and WebM keep none. `overrun_decoder` finds what small H.264 pictures hide.
"""

import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

_BLOCK = 1 << 20  # bytes read at once
# Matroska's names of elements.
_SEGMENT, _CLUSTER, _VOID, _CRC32 = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\xec", b"\xbf\x84"


def container_damage(path: Path, container_format: str) -> str | None:
    """Why the file is damaged, on one line; None if its books agree with it or it keeps none.

    `container_format` is FFmpeg's name of it. Raises OSError if the file cannot be read.
    """
    check = {"matroska,webm": _matroska_damage, "mpegts": _transport_damage, "avi": _avi_damage}.get(container_format)
    if check is None:
        return None
    with path.open("rb") as file:
        return check(file, path.stat().st_size)


def _matroska_damage(file: BinaryIO, file_size: int) -> str | None:
    """Each cluster of frames may begin with the CRC-32 of its rest."""
    while (name := _ebml_number(file)) and (length := _ebml_number(file)):
        if name == _SEGMENT:
            continue  # the clusters are in it
        if len(name) != 4 and name != _VOID:
            return None
        size = int.from_bytes(length, "big") & ((1 << 7 * len(length)) - 1)
        start = file.tell()
        if start + size > file_size:  # a live recording does not know the size of its parts
            return None
        if name == _CLUSTER and file.read(2) == _CRC32:
            declared, left, found = int.from_bytes(file.read(4), "little"), size - 6, 0
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                found, left = zlib.crc32(block, found), left - len(block)
            if found != declared:
                return f"the checksum of the frames at byte {start} is wrong"
        file.seek(start + size)
    return None


def _ebml_number(file: BinaryIO) -> bytes | None:
    """The next number with its marker bit; None at the end of the file, or if there is none."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    return first + file.read(8 - first[0].bit_length())


def _transport_damage(file: BinaryIO, file_size: int) -> str | None:
    """Each packet of 188 bytes begins with a sync byte; some recorders write 4 bytes before or 16 behind each."""
    head = file.read(5 * 204)
    grids = [(start, period) for period in (188, 192, 204) for start in range(period)]
    grid = next((grid for grid in grids if head[grid[0] :: grid[1]][:5] == b"G" * 5), None)
    if grid is None:
        return None
    start, period = grid
    synced = []
    for place in range(start, file_size, 4096 * period):
        file.seek(place)
        synced.append(np.frombuffer(file.read(4096 * period), np.uint8)[::period] == ord("G"))
    synced_N = np.concatenate(synced)
    lost = int(synced_N.argmin())
    if not synced_N[lost] and synced_N[lost:].any():  # behind the last sync byte may be padding
        return f"transport packet {lost} of {len(synced_N)} has no sync byte"
    return None


def _avi_damage(file: BinaryIO, file_size: int) -> str | None:
    """The index names kind, place and size of every chunk."""
    place, movi, index = 12, 0, b""
    while not index and place < file_size:
        file.seek(place)
        kind, size = file.read(4), int.from_bytes(file.read(4), "little")
        if not kind.strip().isalnum():
            return None
        if kind == b"LIST" and file.read(4) == b"movi":
            movi = place + 8
        elif kind == b"idx1":
            index = file.read(min(size, file_size))
        place += 8 + size + size % 2
    entries = struct.iter_unpack("<4sIII", index[: len(index) // 16 * 16])
    chunks = [
        (place, kind + struct.pack("<I", size)) for kind, _, place, size in entries if size and kind[:2].isdigit()
    ]
    # Places count from the list of chunks or from the start of the file; an index that fits neither way says nothing.
    for base in (movi, 0):
        missing = [base + place for place, head in chunks if not _is_at(file, base + place, head)]
        if len(missing) < len(chunks) / 2:
            return f"the index names a chunk at byte {missing[0]} that is not there" if missing else None
    return None


def _is_at(file: BinaryIO, place: int, content: bytes) -> bool:
    file.seek(place)
    return file.read(len(content)) == content


_EXTRA_ROWS = 16
_SMALL = (
    99 * 16 * 16
)  # pixels; in larger pictures damage leads to errors by itself, and this costs up to twice the time
_CHROMA_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # those that name a chroma format


def overrun_decoder(video: av.VideoCodecContext) -> av.VideoCodecContext | None:
    """A second decoder for the packets of small H.264 pictures: it raises FFmpegError where their data is damaged.

    A decoder stops at the last block of a picture, however much of its data is left. This one believes that pictures
    have more rows, so it goes on and runs into an error, unless the data says that the picture ends. Its frames are of
    no use; it skips what the bits do not depend on and adds about 40 % to the decoding of 64 x 64 pixels.

    None if the video is of another codec or size, is interlaced, or does not declare itself in its header alone.
    """
    if video.name != "h264" or video.width * video.height > _SMALL:
        return None
    header = video.extradata or b""
    if len(header) < 8 or header[0] != 1 or header[5] & 31 != 1:  # of another form, or of several kinds of pictures
        return None
    end = 8 + int.from_bytes(header[6:8], "big")
    try:
        taller = _with_more_rows(header[8:end])
    except (IndexError, ValueError):
        return None
    if taller is None:
        return None
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata = header[:6] + len(taller).to_bytes(2, "big") + taller + header[end:]
    decoder.thread_type = "NONE"
    decoder.options = {"err_detect": "explode", "ec": "0", "skip_loop_filter": "all", "skip_idct": "all"}
    return decoder


class _Bits:
    def __init__(self, content: bytes) -> None:
        self.text = "".join(f"{byte:08b}" for byte in content)
        self.at = 0

    def fixed(self, length: int) -> int:
        self.at += length
        return int(self.text[self.at - length : self.at], 2)

    def golomb(self) -> int:
        zeros = self.text.index("1", self.at) - self.at
        self.at += zeros
        return self.fixed(zeros + 1) - 1


def _with_more_rows(parameters: bytes) -> bytes | None:
    """An H.264 sequence parameter set whose pictures are taller; None if interlaced or of a rare form."""
    bits = _Bits(parameters.replace(b"\0\0\3", b"\0\0"))
    profile = bits.fixed(32) >> 16 & 255
    bits.golomb()  # its number
    if profile in _CHROMA_PROFILES:
        if bits.golomb() == 3:  # chroma format
            bits.fixed(1)
        bits.golomb(), bits.golomb()  # bit depths
        if bits.fixed(2) & 1:  # scaling lists
            return None
    bits.golomb()  # length of frame numbers
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        return None
    bits.golomb(), bits.fixed(1), bits.golomb()  # references, gaps, columns
    start = bits.at
    rows = f"{bits.golomb() + 1 + _EXTRA_ROWS:b}"
    if bits.text[bits.at] == "0":  # interlaced
        return None
    text = bits.text[:start] + "0" * (len(rows) - 1) + rows + bits.text[bits.at :].rstrip("0")
    text += "0" * (-len(text) % 8)
    return re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", int(text, 2).to_bytes(len(text) // 8, "big"))
