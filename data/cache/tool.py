"""Command line `python -m data.cache`: list, show, verify and merge caches."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from data.cache import TokenCache, find_cache
from data.cache.catalogue import Entry, list_caches
from data.cache.merge import merge
from data.shards import DamagedCache
from data.text import one_line, print_text, printable, printable_lines, size, table

NAME = "python -m data.cache"
CACHE = "Folder, address, or beginning of the name or key of a cache"
Answer = tuple[Any, str, int]
"""Result of a command: JSON content for --json, text for people, exit code."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (--help lists the flags)", self.prog))


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command, print its result and exit: with code 1 if `verify` finds damage, with code 2 after a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        content, text, code = arguments.command(arguments)
    except (ValueError, OSError) as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        _fail("interrupted")
        sys.exit(130)
    print_text(json.dumps(content) if arguments.json else printable_lines(text))
    sys.exit(code)


def _fail(message: str, name: str = NAME) -> int:
    """Print an error in one line on stderr and return the exit code of a user's mistake."""
    print(f"{printable(name)}: error: {one_line(message)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=NAME, description="List, show, verify and merge token caches.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--caches", type=Path, default=Path("caches"), help="Folder of the caches (default: caches).")
        sub.add_argument("--json", action="store_true", help="Print one line of JSON instead of text.")
        sub.set_defaults(command=command)
        return sub

    sub = add("list", _list, "List all caches, newest first, with their origin, size and state.")
    sub = add("show", _show, "Show the settings of a cache, its counts, and the skipped videos with the reason.")
    sub.add_argument("cache", nargs="?", help=f"{CACHE} (default: the newest).")
    sub = add("verify", _verify, "Hash every shard and list each damaged sample.")
    sub.add_argument("cache", nargs="*", default=[None], help=f"{CACHE} (default: the newest).")
    sub = add("merge", _merge, "Merge caches with equal settings into one cache of all their videos.")
    sub.add_argument("cache", nargs="+", help=f"{CACHE}; at least two are needed.")
    sub.add_argument("--name", help="Name of the merged cache (default: the names of its parts, joined by +).")
    sub = add("export", _export, "Moved to python pipelines/export.py, which writes clips of a cache as mp4.")
    sub.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _export(arguments: argparse.Namespace) -> Answer:
    # Decoding codes needs a tokenizer, and the package data may not import one.
    raise ValueError("export has moved: use python pipelines/export.py")


def _list(arguments: argparse.Namespace) -> Answer:
    entries = list_caches(arguments.caches)
    if not entries:
        return [], f"no caches in {arguments.caches}; make one with pipelines/tokenize.py", 0
    head = ["cache", "state", "videos", "clips", "codes", "size", "clip", "made of", "tokenizer", "when"]
    return [asdict(entry) for entry in entries], table(head, [_row(entry) for entry in entries]), 0


def _row(entry: Entry) -> list[str]:
    clip = entry.clip
    cut = f"{clip['frames']}x{clip['size']}²{_times(clip)}, views: {clip['views']}" if clip else "?"
    skipped = f" ({entry.skipped} skipped)" if entry.skipped else ""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
    videos, *counts = ["?" if n is None else f"{n:,}" for n in (entry.videos, entry.clips, entry.codes)]
    names = [entry.made_of or "?", entry.tokenizer or "?"]
    origin = [name if len(name) <= 40 else f"…{name[-39:]}" for name in names]
    return [entry.name, entry.state, f"{videos}{skipped}", *counts, size(entry.bytes), cut, *origin, when]


def _times(clip: Mapping[str, Any]) -> str:
    """Describe the times of the frames of a clip."""
    if clip["span"]:
        return " over the video"
    if clip["seconds"]:
        return f" in {clip['seconds']:g} s"
    rate = f" at {clip['fps']:g} fps" if clip["fps"] else ""
    return f"{rate}, stride {clip['stride']}"


def _show(arguments: argparse.Namespace) -> Answer:
    cache = TokenCache.open(find_cache(arguments.caches, arguments.cache))
    manifest = cache.manifest
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    content: dict[str, Any] = {
        "cache": cache.address,
        "key": cache.key,
        "made_of": cache.made_with["videos"],
        "tokenizer": cache.made_with["tokenizer"],
        **{name: value for name, value in cache.spec.items() if name not in ("videos", "tokenizer")},
        "tokenizer_fingerprint": cache.spec["tokenizer"],
        "videos": len(cache.spec["videos"]),
        "used": len(cache),
        **{k: manifest[k] for k in ("skipped", "padded", "clips", "codes", "codes_used", "unigram_bits", "bf16")},
        "shards": len(manifest["shards"]),
        "bytes": stored,
        "bytes_per_code": round(stored / manifest["codes"], 3),
        "label": dict(Counter(video.label for video in cache.videos if video.label is not None)),
        "unlabelled": sum(video.label is None for video in cache.videos),
        "split": dict(Counter(video.split for video in cache.videos if video.split is not None)),
        "groups": len({video.group for video in cache.videos} - {None}),
    }
    lines = [[name.replace("_", " "), _formatted(value)] for name, value in content.items() if name != "skipped"]
    skipped = manifest["skipped"]
    lines.append(["skipped", str(len(skipped))])
    lines += [["", f"{entry['path']}: {entry['reason']}"] for entry in skipped[:20]]
    if len(skipped) > 20:
        lines.append(["", f"and {len(skipped) - 20} more (--json lists all)"])
    return content, table(None, lines), 0


def _verify(arguments: argparse.Namespace) -> Answer:
    damage: dict[str, list[str]] = {}
    lines = []
    for address in [find_cache(arguments.caches, name) for name in arguments.cache]:
        damage[address] = []
        try:
            cache = TokenCache.open(address)
            for shard in tqdm(cache.shards, desc="verify", unit="shard", disable=None):
                damage[address] += shard.damage()
            cache.codebook()
            summary = f"{len(cache)} videos in {len(cache.shards)} shards, no damage"
        except DamagedCache as error:
            damage[address].append(str(error))
        if damage[address]:
            summary = "delete the damaged shards and run tokenize again; it makes only the missing shards"
        lines += [*damage[address], f"{address}: {summary}"]
    return damage, "\n".join(lines), 1 if any(damage.values()) else 0


def _merge(arguments: argparse.Namespace) -> Answer:
    parts = [TokenCache.open(find_cache(arguments.caches, name)) for name in arguments.cache]
    name = arguments.name or "+".join(dict.fromkeys(part.name.rpartition("-")[0] or part.name for part in parts))
    with tqdm(total=sum(len(part.spec["videos"]) for part in parts), desc="merge", disable=None) as bar:
        folder = merge(parts, arguments.caches, name, bar.update)
    cache = TokenCache.open(folder)
    return {"cache": str(folder), "key": cache.key, "videos": len(cache)}, f"{folder}: {len(cache)} videos", 0


def _formatted(value: Any) -> str:
    if isinstance(value, dict) and not value:
        return "-"
    if isinstance(value, dict):
        shown = [f"{key}: {_formatted(part)}" for key, part in list(value.items())[:12]]
        return ", ".join(shown) + (f", and {len(value) - 12} more" if len(value) > 12 else "")
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str("-" if value is None else value)
