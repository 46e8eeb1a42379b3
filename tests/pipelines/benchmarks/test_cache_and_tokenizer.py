"""The benchmarks of the cache, of tokenizers and of a search: child processes, detection of damage, and a missing package."""

import sys
from pathlib import Path

import pytest

from pipelines.benchmarks import cache_damage, cache_memory, search_speed, tokenizer_length
from pipelines.benchmarks.peer import Peer


def test_the_child_process_of_the_length_benchmark_prints_its_peak_memory() -> None:
    assert tokenizer_length._peak_memory(20) > 2**25


def test_the_child_process_of_the_memory_benchmark_reads_the_whole_cache(tmp_path: Path) -> None:
    (row,) = cache_memory.measure(tmp_path, 0.01)
    assert abs(row.ours) < 64 and row.reach == "flat"


def test_damage_is_detected_by_the_cache_and_not_by_webdataset(tmp_path: Path) -> None:
    cuts, flips, code_flips = cache_damage.measure(tmp_path, 0.01)
    assert cuts.ours == flips.ours == code_flips.ours == 0
    assert cuts.peer and flips.peer and code_flips.peer == 100


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "magvit2_pytorch", None)
    with pytest.raises(ValueError, match="magvit2-pytorch cannot be imported"):
        Peer(32)


def test_the_search_benchmark_needs_the_index_and_times_both_ways(tmp_path: Path) -> None:
    search_speed._write(tmp_path, 70, clusters=4)
    with pytest.raises(ValueError, match="extra search"):
        search_speed._build(tmp_path)
    assert all(value > 0 for value in search_speed._search(tmp_path))
