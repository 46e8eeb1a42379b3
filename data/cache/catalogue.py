"""Find caches in a folder, and summarise each from its manifest or plan."""

import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.cache.manifest import MALFORMED, MadeWith, Manifest, Plan
from data.cache.spec import FORMAT
from data.cache.storage import Folder, is_address, read_json
from data.clip_spec import ClipSpec
from data.schema import conform, short
from data.shards import DamagedCache
from data.text import one_line


def find_cache(caches: Path, name: str | None) -> str:
    """Return the folder or address of a cache, by default the newest cache in the folder `caches`.

    `name`: a folder or an address, or the beginning of the name or key of a cache in `caches`. Raises ValueError if `name` does
    not match exactly one cache, or there is no finished cache.
    """
    if name and (is_address(name) or any(Path(name, file).exists() for file in ("manifest.json", "plan.json"))):
        return name
    finished = [path.parent for path in caches.glob("*/manifest.json")]
    if name:
        finished = [path for path in finished if path.name.startswith(name) or _key_in(path).startswith(name)]
    if not finished:
        subject = f"no cache {name!r}" if name else "no finished cache"
        hint = f" ({name} is a folder without a cache)" if name and Path(name).is_dir() else ""
        raise ValueError(f"{subject} in {caches}{hint}; make one with pipelines/tokenize.py")
    if name and len(finished) > 1:
        matches = ", ".join(sorted(path.name for path in finished))
        raise ValueError(f"{name!r} matches {len(finished)} caches in {caches}: {matches}")
    return str(max(finished, key=last_used))


def last_used(folder: Path) -> float:
    """Return the time when tokenize last made or reused a cache, in seconds since 1970."""
    statuses = [_status(folder / name) for name in ("manifest.json", "made_with.json", "plan.json")]
    return max((status.st_mtime for status in statuses if status), default=0.0)


def _key_in(folder: Path) -> str:
    try:
        key = read_json(Folder(folder), "manifest.json").get("key")
    except (DamagedCache, OSError):
        # A damaged cache must not prevent finding others.
        return ""
    return key if isinstance(key, str) else ""


@dataclass(frozen=True)
class Entry:
    """One row of the table of caches. None means that a value is unknown.

    `state`: `complete`, `3 of 8 shards`, or the damage; `changed`: seconds since 1970; `clip`: fields of the ClipSpec;
    `made_of`, `tokenizer`: arguments of tokenize.
    """

    name: str
    state: str
    bytes: int
    changed: float
    videos: int | None = None
    skipped: int | None = None
    clips: int | None = None
    codes: int | None = None
    clip: dict[str, Any] | None = None
    made_of: str | None = None
    tokenizer: str | None = None


def list_caches(caches: Path) -> list[Entry]:
    """List all caches in a folder, newest first. Only manifests and plans are read."""
    folders = {path.parent for name in ("manifest.json", "plan.json") for path in caches.glob(f"*/{name}")}
    return sorted((_entry(folder) for folder in folders), key=lambda entry: -entry.changed)


def _entry(folder: Path) -> Entry:
    statuses = [_status(path) for path in folder.rglob("*")]
    size = sum(status.st_size for status in statuses if status and stat.S_ISREG(status.st_mode))
    try:
        fields = _described(Folder(folder), folder)
    except (*MALFORMED, OSError, ZeroDivisionError) as error:
        fields = {"state": f"damaged: {one_line(error)}"}
    return Entry(name=folder.name, bytes=size, changed=last_used(folder), **fields)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        # Another process may delete or rename the file during the scan.
        return None


def _described(files: Folder, folder: Path) -> dict[str, Any]:
    """Return fields of an Entry, read from the manifest or the plan."""
    made_with = read_json(files, "made_with.json") if (folder / "made_with.json").exists() else {}
    conform(made_with, MadeWith, "made_with.json")
    origin = {"made_of": made_with.get("videos"), "tokenizer": made_with.get("tokenizer")}
    if not (folder / "manifest.json").exists():
        plan = conform(read_json(files, "plan.json"), Plan, "plan.json")
        if "spec" not in plan:
            return {"state": "manifest.json is missing; run tokenize again", **origin}
        videos, done = len(plan["spec"]["videos"]), len(list(folder.glob("shards/*.tar")))
        state = f"{done} of {-(-videos // plan['shard_size'])} shards"
        return {"state": state, "videos": videos, "clip": asdict(ClipSpec(**plan["spec"]["clip"])), **origin}
    manifest = read_json(files, "manifest.json")
    if manifest.get("format") != FORMAT:
        return {"state": f"format {short(manifest.get('format'))}, expected {FORMAT!r}", **origin}
    conform(manifest, Manifest, "manifest.json")
    shards = [(_status(folder / "shards" / entry["file"]), entry["bytes"]) for entry in manifest["shards"]]
    intact = sum(status is not None and status.st_size == size for status, size in shards)
    state = "complete" if intact == len(shards) else f"{intact} of {len(shards)} shards; run tokenize again"
    return {
        "state": state,
        "videos": len(manifest["spec"]["videos"]),
        "skipped": len(manifest["skipped"]),
        "clips": manifest["clips"],
        "codes": manifest["codes"],
        "clip": asdict(ClipSpec(**manifest["spec"]["clip"])),
        **origin,
    }
