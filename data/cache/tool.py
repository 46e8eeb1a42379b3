"""python -m data.cache: What caches there are, whether they are whole, joining them, looking into them."""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from data.cache import TokenCache, find_cache
from data.cache.catalogue import Entry, list_caches
from data.cache.merge import merge
from data.shards import DamagedCache
from data.text import printable, size, table

NAME = "python -m data.cache"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (--help lists the flags)", self.prog))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, work, print; exit code 1 if `verify` finds damage, 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        answer, text, code = arguments.command(arguments)
    except (ValueError, OSError) as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        _fail("interrupted")
        sys.exit(130)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names hold anything
    print(json.dumps(answer) if arguments.json else "\n".join(map(printable, text.splitlines())))
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _fail(message: str, name: str = NAME) -> int:
    """One line on stderr; returns the exit code of a user's mistake."""
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=NAME, description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text}.")
        sub.add_argument("--caches", type=Path, default=Path("caches"), help="where caches live (default: caches)")
        sub.add_argument("--json", action="store_true", help="one line of JSON instead of text")
        sub.set_defaults(command=command)
        return sub

    which = "folder or address of a cache, or how its name or key begins (default: the newest)"
    add("list", _list, "All caches, newest first: what made them, how large they are, whether they are complete")
    add("show", _show, "Everything about one cache").add_argument("cache", nargs="?", help=which)
    add("verify", _verify, "Hash every shard and name each damaged sample").add_argument(
        "cache", nargs="*", default=[None], help=which
    )
    sub = add("merge", _merge, "Join caches of equal specification, as if all their videos had been tokenized at once")
    sub.add_argument("cache", nargs="+", help=which.partition(" (")[0])
    sub.add_argument("--name", help="name of the joined cache (default: those of the parts)")
    moved = add("export", _export, "Moved: python pipelines/export.py writes clips of a cache as mp4")
    moved.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _export(arguments: argparse.Namespace) -> tuple[Any, str, int]:
    raise ValueError("export needs a tokenizer, which this package does not know: use python pipelines/export.py")


def _opened(arguments: argparse.Namespace, wanted: str | None) -> TokenCache:
    return TokenCache.open(find_cache(arguments.caches, wanted))


def _list(arguments: argparse.Namespace) -> tuple[Any, str, int]:
    entries = list_caches(arguments.caches)
    if not entries:
        return [], f"no caches in {arguments.caches}; make one with pipelines/tokenize.py", 0
    head = ["cache", "state", "videos", "clips", "codes", "size", "clip", "made of", "tokenizer", "when"]
    return [asdict(entry) for entry in entries], table(head, [_row(entry) for entry in entries]), 0


def _row(entry: Entry) -> list[str]:
    clip = entry.clip
    cut = f"{clip['frames']}x{clip['size']}², stride {clip['stride']}, views: {clip['views']}" if clip else "?"
    skipped = f" ({entry.skipped} skipped)" if entry.skipped else ""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
    videos, *counts = ["?" if n is None else f"{n:,}" for n in (entry.videos, entry.clips, entry.codes)]
    made = [_shortened(entry.made_of), _shortened(entry.tokenizer)]
    return [entry.name, entry.state, f"{videos}{skipped}", *counts, size(entry.bytes), cut, *made, when]


def _show(arguments: argparse.Namespace) -> tuple[Any, str, int]:
    cache = _opened(arguments, arguments.cache)
    manifest = cache.manifest
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    made_with = cache.made_with
    answer = {
        "cache": cache.address,
        "key": cache.key,
        "made_of": made_with.get("videos"),
        "tokenizer": made_with.get("tokenizer"),
        **{k: v for k, v in cache.spec.items() if k != "videos" and k != "tokenizer"},
        "tokenizer_fingerprint": cache.spec["tokenizer"],
        "videos": len(cache.spec["videos"]),
        "used": len(cache),
        **{k: manifest[k] for k in ("skipped", "padded", "clips", "codes", "codes_used", "unigram_bits", "bf16")},
        "shards": len(manifest["shards"]),
        "bytes": stored,
        "bytes_per_code": round(stored / manifest["codes"], 3),
        **{k: dict(Counter(getattr(video, k) for video in cache.videos)) for k in ("label", "split")},
        "groups": len({video.group for video in cache.videos} - {None}),
    }
    shown = {k: v for k, v in answer.items() if k != "skipped"}
    lines = [[key.replace("_", " "), _said(value)] for key, value in shown.items()]
    lines += [["skipped", str(len(manifest["skipped"]))]]
    lines += [["", f"{entry['path']}: {entry['reason']}"] for entry in manifest["skipped"][:20]]
    if len(manifest["skipped"]) > 20:
        lines += [["", f"and {len(manifest['skipped']) - 20} more (--json lists all)"]]
    for counts in ("label", "split"):
        answer[counts] = {str(name): count for name, count in answer[counts].items()}
    return answer, table(None, lines), 0


def _verify(arguments: argparse.Namespace) -> tuple[Any, str, int]:
    damage: dict[str, list[str]] = {}
    lines = []
    for address in [find_cache(arguments.caches, wanted) for wanted in arguments.cache]:
        found, whole = _damage(address)
        damage[address] = found
        lines += found or [whole]
        if found:
            lines += [f"{address}: delete the damaged shards and make it again; only they are made anew"]
    return damage, "\n".join(lines), 1 if any(damage.values()) else 0


def _damage(address: str) -> tuple[list[str], str]:
    """All damage of a cache, a line for each, and what to say if there is none."""
    try:
        cache = TokenCache.open(address)
        found = []
        for shard in tqdm(cache.shards, desc="verify", unit="shard", disable=None):
            found += shard.damage()
        whole = f"{address}: {len(cache)} videos in {len(cache.shards)} shards, all as they were written"
        try:
            cache.codebook()
        except DamagedCache as error:
            found.append(str(error))
        return found, whole
    except DamagedCache as error:
        return [str(error)], ""


def _merge(arguments: argparse.Namespace) -> tuple[Any, str, int]:
    parts = [_opened(arguments, wanted) for wanted in arguments.cache]
    name = arguments.name or "+".join(dict.fromkeys(part.name.rpartition("-")[0] or part.name for part in parts))
    with tqdm(total=sum(len(part.spec["videos"]) for part in parts), desc="merge", disable=None) as bar:
        folder = merge(parts, arguments.caches, name, bar.update)
    cache = TokenCache.open(folder)
    return {"cache": str(folder), "key": cache.key, "videos": len(cache)}, f"{folder}: {len(cache)} videos", 0


def _said(value: Any) -> str:
    if isinstance(value, dict):
        shown = [f"{key}: {_said(part)}" for key, part in list(value.items())[:12]]
        return ", ".join(shown) + (f", and {len(value) - 12} more" if len(value) > 12 else "")
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str("-" if value is None else value)


def _shortened(text: str | None) -> str:
    if text is None:
        return "?"
    return text if len(text) <= 40 else f"…{text[-39:]}"
