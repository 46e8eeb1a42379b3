"""Finding caches, and what is to be said of each at a glance."""

import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.cache.index import MALFORMED
from data.cache.spec import FORMAT
from data.cache.storage import Folder, is_address, read_json
from data.clips import ClipSpec
from data.shards import DamagedCache


def find_cache(caches: Path, wanted: str | None) -> str:
    """A cache: a folder or address given as such, the only one whose name or key begins with `wanted`, or the newest.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if wanted and (is_address(wanted) or any(Path(wanted, name).exists() for name in ("manifest.json", "plan.json"))):
        return wanted
    finished = [path.parent for path in caches.glob("*/manifest.json")]
    if wanted:
        finished = [path for path in finished if path.name.startswith(wanted) or _key_in(path).startswith(wanted)]
    if not finished:
        what = f"no cache {wanted!r}" if wanted else "no finished cache"
        there = f" ({wanted} is a folder, but holds no cache)" if wanted and Path(wanted).is_dir() else ""
        raise ValueError(f"{what} in {caches}{there}; make one with pipelines/tokenize.py")
    if wanted and len(finished) > 1:
        raise ValueError(
            f"{wanted!r} fits {len(finished)} caches in {caches}: {', '.join(sorted(p.name for p in finished))}"
        )
    return str(max(finished, key=last_used))


def last_used(folder: Path) -> float:
    """When a cache was made, or found again by tokenize, in seconds since 1970; the newest is what commands take."""
    status = [_status(folder / name) for name in ("manifest.json", "made_with.json", "plan.json")]
    return max((found.st_mtime for found in status if found), default=0.0)


def _key_in(folder: Path) -> str:
    try:
        return str(read_json(Folder(folder), "manifest.json").get("key"))
    except (DamagedCache, OSError):  # damage of one cache hinders nobody who looks for another
        return ""


@dataclass(frozen=True)
class Entry:
    """One line of the table of caches."""

    name: str
    state: str
    """complete, `3 of 8 shards`, or what is wrong."""
    bytes: int
    changed: float
    """Seconds since 1970."""
    videos: int | None = None
    """None, as all that follows, where it is not known, or not yet."""
    skipped: int | None = None
    clips: int | None = None
    codes: int | None = None
    clip: dict[str, Any] | None = None
    made_of: str | None = None
    """Videos and tokenizer, as they were named."""
    tokenizer: str | None = None


def list_caches(caches: Path) -> list[Entry]:
    """All caches below a folder, newest first; nothing but manifests and plans is read."""
    folders = {path.parent for name in ("manifest.json", "plan.json") for path in caches.glob(f"*/{name}")}
    return sorted((_entry(folder) for folder in folders), key=lambda entry: -entry.changed)


def _entry(folder: Path) -> Entry:
    sizes = [status for path in folder.rglob("*") if (status := _status(path)) and stat.S_ISREG(status.st_mode)]
    whole: dict[str, Any] = {
        "bytes": sum(size.st_size for size in sizes),
        "changed": last_used(folder),
    }
    try:
        return Entry(name=folder.name, **_said_of(Folder(folder), folder), **whole)
    except (*MALFORMED, OSError, ZeroDivisionError) as error:
        state = f"damaged: {' '.join(str(error).split())}"
        return Entry(name=folder.name, state=state, **whole)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # somebody is at work there
        return None


def _said_of(files: Folder, folder: Path) -> dict[str, Any]:
    """What manifest or plan tell."""
    made_with = read_json(files, "made_with.json") if (folder / "made_with.json").exists() else {}
    made = {"made_of": made_with.get("videos"), "tokenizer": made_with.get("tokenizer")}
    if not (folder / "manifest.json").exists():
        plan = read_json(files, "plan.json")
        if "spec" not in plan:
            return {"state": "has lost its manifest; run tokenize again", **made}
        videos, done = len(plan["spec"]["videos"]), len(list(folder.glob("shards/*.tar")))
        state = f"{done} of {-(-videos // plan['shard_size'])} shards"
        return {"state": state, "videos": videos, "clip": asdict(ClipSpec(**plan["spec"]["clip"])), **made}
    manifest = read_json(files, "manifest.json")
    entries = [(folder / "shards" / entry["file"], entry["bytes"]) for entry in manifest["shards"]]
    whole = sum((status := _status(tar)) is not None and status.st_size == size for tar, size in entries)
    state = "complete" if whole == len(entries) else f"{whole} of {len(entries)} shards; run tokenize again"
    return {
        "state": state if manifest["format"] == FORMAT else f"of format {manifest['format']}",
        "videos": len(manifest["spec"]["videos"]),
        "skipped": len(manifest["skipped"]),
        "clips": int(manifest["clips"]),
        "codes": int(manifest["codes"]),
        "clip": asdict(ClipSpec(**manifest["spec"]["clip"])),
        **made,
    }
