"""Caches with several codes per place."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.cache import DamagedCache, TokenCache
from data.cache.layout import CodeLayout
from tests.helpers.cache_contents import SPEC, all_codes, damage_clip, written_by_hand

LAYOUT = CodeLayout((2, 3, 3), 40, 3, ((8, 5), (6,), (3, 4)))
WIDE = replace(SPEC, codes=LAYOUT)


def codes_of_two_videos(seed: int = 0) -> np.ndarray:
    """Codes (2, V, t, h, w, G), each with the first and the last of its vocabulary."""
    codes = np.random.default_rng(seed).integers(0, LAYOUT.vocabularies, (2, 2, 2, 3, 3, 3))
    codes[:, :, 0, 0, 0], codes[:, :, 1, 2, 2] = 0, np.array(LAYOUT.vocabularies) - 1
    return codes


def test_codes_are_read_as_written(tmp_path: Path) -> None:
    codes = codes_of_two_videos()
    writer = written_by_hand(tmp_path, WIDE, codes)
    writer.finish(None)
    cache = TokenCache.open(writer.folder)
    assert cache.layout == LAYOUT and LAYOUT.vocabularies == (40, 6, 12)
    assert np.array_equal(all_codes(cache), codes)
    gathered = cache.clips.gather(np.array([1, 0, 1]), np.array([0, 1, 1]))
    assert np.array_equal(gathered, codes[[1, 0, 1], [0, 1, 1]])
    cache.verify()


def test_manifest_counts_codes_of_all_vocabularies_and_averages_their_entropy(tmp_path: Path) -> None:
    codes = codes_of_two_videos()
    writer = written_by_hand(tmp_path, WIDE, codes)
    writer.finish(None)
    manifest = TokenCache.open(writer.folder).manifest
    entropies, used = [], 0
    for g in range(3):
        count = np.unique(codes[..., g], return_counts=True)[1]
        entropies.append(-(count / count.sum() * np.log2(count / count.sum())).sum())
        used += len(count)
    assert manifest["unigram_bits"] == pytest.approx(np.mean(entropies))
    assert (manifest["codes"], manifest["codes_used"]) == (codes.size, used)


@pytest.mark.parametrize("code", range(3))
def test_code_outside_its_own_vocabulary_is_refused(tmp_path: Path, code: int) -> None:
    codes = codes_of_two_videos()
    codes[1, 1, 1, 2, 1, code] = LAYOUT.vocabularies[code]
    with pytest.raises(ValueError, match=rf"0\.\.{LAYOUT.vocabularies[code] - 1}, got .*{LAYOUT.vocabularies[code]}"):
        written_by_hand(tmp_path, WIDE, codes)


def test_damaged_codes_are_found(tmp_path: Path) -> None:
    writer = written_by_hand(tmp_path, WIDE, codes_of_two_videos())
    writer.finish(None)
    damage_clip(writer.folder, 1, 1)
    cache = TokenCache.open(writer.folder)
    with pytest.raises(DamagedCache, match="view 1 of video 1 is damaged"):
        cache.clips.gather(np.array([1]), np.array([1]))


def test_learned_codebooks_follow_one_another(tmp_path: Path) -> None:
    writer = written_by_hand(tmp_path, replace(SPEC, codes=CodeLayout((2, 3, 3), 4, 2)), np.zeros((2, 2, 2, 3, 3, 2)))
    codebook_VC = np.arange(24, dtype=np.float32).reshape(8, 3)
    writer.finish(codebook_VC)
    stored = TokenCache.open(writer.folder).codebook()
    assert stored is not None and np.array_equal(stored, codebook_VC)


def test_numbered_codes_have_a_vocabulary_of_their_own_each() -> None:
    numbered = LAYOUT.numbered(codes_of_two_videos())
    assert [(numbered[..., g].min(), numbered[..., g].max()) for g in range(3)] == [(0, 39), (40, 45), (46, 57)]
    plain = np.array([[[3]]])
    assert np.array_equal(CodeLayout((1, 1, 1), 5).numbered(plain), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"codes_per_place": 0},
        {"codes_per_place": 2**25},
        {"codes_per_place": 2},
        {"levels": ((8, 5), (6,), (1, 12))},
        {"levels": ((8, 4), (6,), (3, 4))},
        {"levels": ((2,) * 33, (6,), (3, 4))},
        {"grid": (2, 0, 3)},
        {"vocab_size": 2**32},
    ],
)
def test_impossible_layouts_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"invalid codes_shape|levels"):
        replace(LAYOUT, **settings)


def test_json_of_one_code_is_that_of_older_caches() -> None:
    assert CodeLayout((2, 3, 3), 64, 1, ((8, 8),)).to_json() == {
        "codes_shape": (2, 3, 3),
        "vocab_size": 64,
        "levels": (8, 8),
    }
    for layout in (LAYOUT, CodeLayout((2, 3, 3), 64, 1, ((8, 8),)), CodeLayout((1, 1, 1), 7, 5)):
        assert CodeLayout.of(layout.to_json()) == layout
