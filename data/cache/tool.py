"""python -m data.cache: What caches there are, whether they are whole, joining them, looking into them."""

import argparse
import importlib
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
from data.shards import DamagedCache, sample_id

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
    print(json.dumps(answer) if arguments.json else "\n".join(map(_printable, text.splitlines())))
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
    sub = add("export", _export, "Write the pixels of chosen samples beside what their codes decode to, as mp4")
    sub.add_argument("cache", nargs="?", help=which)
    sub.add_argument("--sample", nargs="+", default=[], help="paths, ids or rows of videos (default: four of them)")
    sub.add_argument("--tokenizer", help="default: the one that made the cache")
    sub.add_argument("--out", type=Path, default=Path("export"), help="folder of the mp4s (default: export)")
    sub.add_argument("--trust", action="store_true", help="run the tokenizer if it is a program, as TorchScript is")
    return parser


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


def _export(arguments: argparse.Namespace) -> tuple[Any, str, int]:
    # Pictures of codes need a tokenizer, which this package does not know: the pipeline is called by its name.
    export_clips = importlib.import_module("pipelines.export").export_clips
    cache = _opened(arguments, arguments.cache)
    rows = [row_of(cache, wanted) for wanted in arguments.sample]
    rows = rows or sorted({i * (len(cache) - 1) // 3 for i in range(4)})
    files = export_clips(
        cache, rows, arguments.tokenizer or cache.made_with["tokenizer"], arguments.out, trust=arguments.trust
    )
    return [str(file) for file in files], "\n".join(map(str, files)), 0


def row_of(cache: TokenCache, wanted: str) -> int:
    """The row of a video named by its path, its sample's id, or the row itself.

    Raises:
        ValueError: if there is none.
    """
    for row, video in enumerate(cache.videos):
        if wanted in (video.path, sample_id(video.path)):
            return row
    if wanted.isdigit() and int(wanted) < len(cache):
        return int(wanted)
    skipped = [entry["reason"] for entry in cache.manifest["skipped"] if entry["path"] == wanted]
    raise ValueError(
        f"{wanted}: " + (f"was skipped: {skipped[0]}" if skipped else f"no such sample in {cache.address}")
    )


def table(head: list[str] | None, rows: list[list[str]]) -> str:
    """Columns of text; numbers to the right."""
    lines = [[_printable(cell) for cell in row] for row in ([head] if head else []) + rows]
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    right = [head is not None and all(line[c][:1].isdigit() for line in lines[1:]) for c in range(len(widths))]
    texts = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        for line in lines
    ]
    return "\n".join(text.rstrip() for text in texts)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


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


def _printable(text: str) -> str:
    """Names hold anything; a line of a table must not."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
