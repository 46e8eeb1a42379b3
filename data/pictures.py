"""Decode packets strictly, but excuse pictures that no decoder can show, because the pictures they refer to were cut away.

Decoding can start at a key picture. In an open group of pictures, leading pictures follow it in the file, are displayed
before it, and refer to pictures before it. A video that was cut or joined without decoding lacks those pictures, so errors
of its leading pictures are no damage. The rest of a group that begins before the cut is no damage either.
"""

import errno
import re
from contextlib import suppress
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import cast

import av

from data.damage import overrun_decoder

# Codecs for which unused bits after a picture are errors too. With other codecs, intact videos have such bits.
_STRICTER = {"h264": "+aggressive"} | dict.fromkeys(("msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2"), "+buffer")
# First bytes of the headers in Ogg files that do not configure the decoder.
_OGG_HEADERS = {"theora": b"\x81", "vp8": b"OVP80"}
# Codecs with leading pictures. Only the first two report an error if such a picture refers to a picture of another video.
_JOINED = ("h264", "hevc")
_LEADING = (*_JOINED, "mpeg1video", "mpeg2video", "mpeg4", "vc1")
# Codecs whose decoders report no error if the first key picture is missing.
_SILENT = ("mpeg1video", "mpeg2video")
_MPEG2_PICTURE = b"\0\0\1\0"
# Codecs whose pictures never begin with so many bytes 0. Most of their decoders skip such pictures without an error.
_NEVER_BLANK = (*_LEADING, "av1", "libdav1d", "vp9")
_BLANK = bytes(16)
_H264_IDR, _H264_PARAMETERS = 5, 7
_HEVC_OPEN = (16, 17, 21)  # key pictures with leading pictures that may not be decodable
_HEVC_SKIPPED = (8, 9)  # such leading pictures
_KEPT = 1000
"""Packets before the first key picture that are remembered."""
_LOST = 8
"""Pictures that may be missing before the first key picture of a recording, because the first packets are incomplete."""


class Joined(Exception):
    """Signal of a place where videos were joined without decoding. A `JoinedDecoder` can read the file."""


class Decoder:
    """Decoder of the packets of a stream that raises FFmpegError or ValueError for damage. One thread."""

    is_strict = True
    """True if a frame that FFmpeg marks as corrupt is damage."""

    def __init__(self, stream: av.VideoStream, path: Path, codec: av.VideoCodecContext | None = None) -> None:
        self._path, self._index, self._format = path, stream.index, stream.container.format.name
        # In AVI files, times say nothing about the order of display.
        self._timed = self._format != "avi"
        self._rate = float(stream.average_rate or 0)
        self._codec = codec or stream.codec_context
        self._codec.thread_type = "NONE"
        self._codec.options = {"err_detect": "explode" + _STRICTER.get(self._codec.name, "")}
        self._overrun = overrun_decoder(self._codec)
        self._early: list[av.Packet] = []
        """Packets before the first key picture."""
        self._excused: Exception | None = None
        """First error among them."""
        self._key: av.Packet | None = None
        self._started = True
        """True if the decoder knows no picture before the last key picture."""
        self._clean = False
        """True if a packet after the last key picture has been decoded."""
        self._empty = True
        """True if no frame has been returned."""

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Return the frames that a packet, or the end of the packets (None), completes.

        Raises Joined if the file was joined from videos that were cut without decoding.
        """
        if packet is not None and memoryview(packet)[:16] == _BLANK and self._codec.name in _NEVER_BLANK:
            raise ValueError("the picture is overwritten with bytes 0")
        if packet is not None and packet.is_keyframe:
            self._begin(packet)
        elif packet is not None and self._key is None and len(self._early) < _KEPT:
            self._early.append(packet)
        try:
            frames = self._decoded(packet)
        except (av.error.FFmpegError, ValueError) as error:
            if packet is None or getattr(error, "errno", None) == errno.ENOMEM or not self._is_excused(packet, error):
                raise
            return []
        self._clean = packet is not self._key
        self._empty = self._empty and not frames
        return frames

    def _decoded(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        if self._overrun is not None:
            self._overrun.decode(packet)
        return self._codec.decode(packet)

    def _begin(self, key: av.Packet) -> None:
        """Note a key picture."""
        if self._key is None and self._empty and self._early:
            silent = self._codec.name in _SILENT and not all(map(self._is_inside_group, self._early))
            if silent or (self._excused is not None and self._is_gap_before(key)):
                raise self._excused or ValueError("the first key picture is missing")
        if self._codec.name in _SILENT and _MPEG2_PICTURE not in bytes(key):
            raise ValueError("a key picture has no header")
        self._started, self._key, self._clean = self._key is None, key, False

    def _is_excused(self, packet: av.Packet, error: Exception) -> bool:
        if _is_header(packet, self._codec):
            return True
        if self._key is None and self._first_key is not None:
            self._key = next(islice(self._early, self._first_key, None), None)
        if self._key is None:
            if not self._empty or (self._first_key is None and not self._is_inside_group(packet)):
                return False
            self._excused = self._excused or error
            return True
        is_leading = packet is not self._key and self._is_leading(packet, self._key)
        if self._started:
            return is_leading
        # Where another video begins, the key picture may repeat a number, and the next picture lacks pictures before it.
        # Damage rarely hits just that picture.
        if self._codec.name not in _JOINED or not (packet is self._key or (is_leading and not self._clean)):
            return False
        self._restart(self._key)
        return True

    def _restart(self, key: av.Packet) -> None:
        """Take the last key picture for the first picture of another video. Raises FFmpegError if it is damaged."""
        raise Joined

    def _is_leading(self, packet: av.Packet, key: av.Packet) -> bool:
        """Return whether a packet may hold a leading picture of the key picture, as far as the file tells."""
        name, units = self._codec.name, _units(key, self._codec)
        if name not in _LEADING or (name == "h264" and _H264_IDR in units):
            return False
        if name == "hevc" and not units.intersection(_HEVC_OPEN):
            return False
        if self._timed and packet.pts is not None and key.pts is not None:
            return packet.pts < key.pts
        if name == "hevc":
            return not _units(packet, self._codec).isdisjoint(_HEVC_SKIPPED)
        return not self._clean

    @cached_property
    def _first_key(self) -> int | None:
        """Number of the first packet of the stream that the container marks as a key picture, None if it marks none.

        FFmpeg's parsers remove the mark from packets that they do not understand.
        """
        raw = {"fflags": "+noparse+nofillin"}
        # Streams that are cut within a picture do not open without a parser. Their containers have no marks.
        with (
            suppress(av.error.FFmpegError, IndexError),
            av.open(f"file:{self._path}", metadata_errors="replace", options=raw, format=self._format) as container,
        ):
            packets = (packet for packet in container.demux(container.streams[self._index]) if packet.size)
            return next((number for number, packet in enumerate(packets) if packet.is_keyframe), None)
        return None

    def _is_inside_group(self, packet: av.Packet) -> bool:
        """Return whether a packet, in a container without marks, continues a group of pictures that began before the file."""
        codes = _start_codes(packet, self._codec.name)
        if codes is None:
            return self._format in ("mpeg", "mpegts")
        if codes.isdisjoint(("key", "picture")):
            return packet is self._early[0] and self._may_begin_with_a_rest()
        # The rest of a picture whose header is overwritten and the next picture are one packet.
        begins_with_rest = self._codec.name in _SILENT and not bytes(packet).lstrip(b"\0").startswith(b"\1")
        return "key" not in codes and (not begins_with_rest or self._may_begin_with_a_rest())

    def _may_begin_with_a_rest(self) -> bool:
        """Return whether the file may begin with the end of a picture."""
        if self._format != "mpeg":
            return self._format != "mpegts"
        with self._path.open("rb") as file:
            return b"\0\0\1\xbb" not in file.read(64)  # the system header, at the start of a program stream

    def _is_gap_before(self, key: av.Packet) -> bool:
        """Return whether more time passes before the first key picture than the pictures before it take."""
        times = [packet.dts for packet in (*self._early, key) if packet.dts is not None]
        seconds = (times[-1] - times[0]) * (key.time_base or Fraction(0)) if times else 0
        return float(seconds) * self._rate > 2 * len(self._early) + _LOST


class JoinedDecoder(Decoder):
    """Decoder of joined videos: it returns the frames that players show, and raises the errors of a strict decoder.

    The strict decoder starts anew where another video begins, so it finds damage in all pictures but leading ones.
    """

    is_strict = False

    def __init__(self, stream: av.VideoStream, path: Path) -> None:
        self._shown = stream.codec_context
        self._shown.thread_type = "NONE"
        codec = av.VideoCodecContext.create(self._shown.name, "r")
        codec.extradata = self._shown.extradata
        super().__init__(stream, path, cast(av.VideoCodecContext, codec))

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        super().decode(packet)
        try:
            return self._shown.decode(packet)
        except av.error.FFmpegError:
            return []

    def _restart(self, key: av.Packet) -> None:
        self._codec.flush_buffers()
        if self._overrun is not None:
            self._overrun.flush_buffers()
        self._decoded(key)
        self._started = True


def _is_header(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """Return True for a header inside joined Ogg files. FFmpeg gives it to the decoder, which refuses it."""
    return codec.name in _OGG_HEADERS and bytes(packet).startswith(_OGG_HEADERS[codec.name])


def _units(packet: av.Packet, codec: av.VideoCodecContext) -> set[int]:
    """Return the types of the units of an H.264 or HEVC packet (ITU-T H.264, 7.3.1; H.265, 7.3.1)."""
    if codec.name not in _JOINED:
        return set()
    data, header = bytes(packet), codec.extradata or b""
    firsts = []
    # A configuration record says that a length precedes each unit. Otherwise, start codes do.
    size_at = 4 if codec.name == "h264" else 21
    if header[:1] == b"\1" and len(header) > size_at:
        size, at = (header[size_at] & 3) + 1, 0
        while at + size < len(data):
            firsts.append(data[at + size])
            at += size + int.from_bytes(data[at : at + size], "big")
    else:
        firsts = [code[1][0] for code in re.finditer(rb"\x00\x00\x01(.)", data, re.DOTALL)]
    return {first & 31 if codec.name == "h264" else first >> 1 & 63 for first in firsts}


def _start_codes(packet: av.Packet, codec: str) -> set[str] | None:
    """Return "key" and "picture" as far as start codes of the packet announce them, or None for other codecs."""
    firsts = [(code[1][0], code[2]) for code in re.finditer(rb"\x00\x00\x01(.)(?=(.{0,2}))", bytes(packet), re.DOTALL)]
    kind_of = {
        "h264": _h264_kind,
        "hevc": _hevc_kind,
        "mpeg1video": _mpeg2_kind,
        "mpeg2video": _mpeg2_kind,
        "mpeg4": _mpeg4_kind,
    }.get(codec)
    return None if kind_of is None else {kind_of(first, rest) for first, rest in firsts}


def _h264_kind(first: int, rest: bytes) -> str:
    unit = first & 31
    return "key" if unit in (_H264_IDR, _H264_PARAMETERS) else "picture" if 1 <= unit < 5 else ""


def _hevc_kind(first: int, rest: bytes) -> str:
    unit = first >> 1 & 63
    return "key" if 16 <= unit < 24 or unit in (32, 33) else "picture" if unit < 16 else ""


def _mpeg2_kind(first: int, rest: bytes) -> str:
    if first:
        return "key" if first in (0xB3, 0xB8) else ""  # headers of a sequence and of a group
    return "key" if len(rest) == 2 and rest[1] >> 3 & 7 == 1 else "picture"


def _mpeg4_kind(first: int, rest: bytes) -> str:
    if first != 0xB6:
        return "key" if first == 0xB0 or 0x20 <= first < 0x30 else ""  # headers of a sequence and of a layer
    return "picture" if rest and rest[0] >> 6 else "key"
