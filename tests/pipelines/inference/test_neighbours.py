"""The nearest videos are those of the nearest windows by cosine similarity, in an index as without one."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.inference import feature_vectors, neighbours
from pipelines.inference.feature_vectors import FeatureVectors, Scaling
from pipelines.inference.neighbours import Approximate, Exact, nearest_videos, open_index
from tests.helpers.features import at_angles, window, write_features

UNSCALED = Scaling(np.zeros(1, np.float32), np.ones(1, np.float32))


def vectors_of(folder: Path, features_NF: np.ndarray, paths: list[str]) -> FeatureVectors:
    rows = [window(path) for path in paths]
    return FeatureVectors(write_features(folder, features_NF, rows, shard_size=3 if len(rows) < 100 else 100))


def test_only_the_best_window_of_each_video_is_listed_and_the_own_video_is_left_out(tmp_path: Path) -> None:
    vectors = vectors_of(tmp_path, at_angles(0, 5, 90, 20, 60, 10, 180), [*"aabbbcd"])
    vectors.scaling = UNSCALED
    query_F = at_angles(0)[0]
    found = nearest_videos(Exact(vectors), vectors, query_F, 10, own=0)
    assert [row for row, _ in found] == [5, 3, 6]
    assert [round(similarity, 4) for _, similarity in found] == [0.9848, 0.9397, -1.0]
    assert [row for row, _ in nearest_videos(Exact(vectors), vectors, query_F, 2, own=None)] == [0, 5]


def test_features_are_standardised_by_the_folder(tmp_path: Path) -> None:
    # The second feature is large and the third is constant: without standardisation, the order would be another.
    features_NF = np.array([[0, 1000, 7], [1, 1010, 7], [0, 1100, 7], [-1, 1020, 7]], np.float32)
    vectors = vectors_of(tmp_path, features_NF, [*"abcd"])
    z_NF = (features_NF - features_NF.mean(0)) / np.where(features_NF.std(0) > 0, features_NF.std(0), 1)
    z_NF /= np.linalg.norm(z_NF, axis=1, keepdims=True)
    assert np.allclose(vectors.take(range(4)), z_NF, atol=1e-5)
    assert np.array_equal(vectors.features(3), features_NF[3:])
    assert np.allclose(vectors.scaling.unit(features_NF[:1]), z_NF[:1], atol=1e-5)


def test_a_large_folder_is_read_shard_by_shard_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features_NF = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    small = vectors_of(tmp_path, features_NF, [str(number) for number in range(20)])
    expected_NF = small.take([2, 3, 11, 19])
    monkeypatch.setattr(feature_vectors, "SMALL", 5)
    monkeypatch.setattr(feature_vectors, "_BLOCK", 5)
    large = FeatureVectors(small.folder)
    assert np.allclose(large.take([2, 3, 11, 19]), expected_NF, atol=1e-6)
    assert [first for first, _ in large.blocks()] == [0, 6, 12, 18]


def test_a_query_with_many_windows_of_its_own_still_has_all_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "CANDIDATES", 64)
    features_NF = at_angles(*np.linspace(0, 1, 300), *np.linspace(20, 90, 8))
    vectors = vectors_of(tmp_path, features_NF, ["own"] * 300 + [*"abcdefgh"])
    vectors.scaling = UNSCALED

    class Few(Exact):
        def search(self, query_F: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
            rows, similarities = super().search(query_F, most)
            return rows[:most], similarities[:most]

    found = nearest_videos(Few(vectors), vectors, features_NF[0], 3, own=0)
    assert [row for row, _ in found] == [300, 301, 302]


def test_without_faiss_many_windows_are_compared_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(neighbours, "SMALL", 4)
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors = vectors_of(tmp_path, at_angles(0, 10, 20, 30, 40), [*"abcde"])
    said: list[str] = []
    index = open_index(vectors, "features", said.append)
    assert index.recall is None and [row for row, _ in nearest_videos(index, vectors, vectors.take([0])[0], 1, 0)]
    assert len(said) == 1 and "[search]" in said[0] and "5 windows" in said[0]


@pytest.fixture
def clustered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureVectors:
    """Folder of 600 windows of 50 features, in 60 clusters, which counts as large."""
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centres, noise = rng.standard_normal((60, 50)), rng.standard_normal((600, 50))
    features_NF = (centres.repeat(10, 0) + 0.3 * noise).astype(np.float32)
    rows = [window(f"{number:03d}") for number in range(600)]
    monkeypatch.setattr(neighbours, "SMALL", 100)
    monkeypatch.setattr(neighbours, "CANDIDATES", 64)
    return FeatureVectors(write_features(tmp_path, features_NF, rows, shard_size=100))


def test_an_index_finds_the_neighbours_and_states_its_recall(clustered: FeatureVectors) -> None:
    index = open_index(clustered, "features", lambda text: None)
    exact = Exact(clustered)
    shared = []
    for row in range(0, 600, 25):
        found, expected = (
            [near for near, _ in nearest_videos(one, clustered, clustered.take([row])[0], 9, row)]
            for one in (index, exact)
        )
        shared.append(len({*found} & {*expected}) / 9)
    assert isinstance(index, Approximate) and np.mean(shared) > 0.98
    assert index.recall is not None and 0.97 < index.recall <= 1


def test_an_index_is_built_once_and_again_for_other_features(
    clustered: FeatureVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = open_index(clustered, "features", said.append)
    reopened = FeatureVectors(clustered.folder)
    monkeypatch.setattr(FeatureVectors, "_features", None)
    again = open_index(reopened, "features", said.append)
    assert len(said) == 1 and again.recall == pytest.approx(first.recall, abs=1e-4)
    monkeypatch.undo()
    query_F = clustered.take([7])[0]
    for one, other in zip(first.search(query_F, 64), again.search(query_F, 64), strict=True):
        assert np.array_equal(one, other)
    monkeypatch.setattr(neighbours, "SMALL", 100)
    open_index(FeatureVectors(clustered.folder), "others", said.append)
    assert len(said) == 2


def test_a_damaged_index_is_named(clustered: FeatureVectors) -> None:
    open_index(clustered, "features", lambda text: None)
    file = clustered.folder.folder / "search" / "index.faiss"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"index\.faiss: has .* bytes, expected .*delete the folder"):
        open_index(clustered, "features", lambda text: None)
    file.write_bytes(bytes(64) + content[64:])
    with pytest.raises(ValueError, match=r"index\.faiss: .*delete the folder"):
        open_index(clustered, "features", lambda text: None)
