"""Positions of another grid are interpolated. They cover the same extent as the trained grid, with another step size."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ar_model.transformer import Grid, Positions, flat_positions, positions_of, rotary_angles, sincos_positions

GRIDS: list[Grid] = [(2, 4, 4), (8, 7, 5), (1, 1, 1), (1, 6, 3)]


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_of_a_grid_are_its_indices_in_raster_order(grid: Grid) -> None:
    expected = [list(position) for position in itertools.product(*(range(n) for n in grid))]
    assert positions_of(grid).tolist() == expected
    assert positions_of(grid, trained=grid).tolist() == expected


@pytest.mark.parametrize("grid", GRIDS)
def test_the_trained_grid_itself_gives_identical_encodings_and_angles(grid: Grid) -> None:
    assert torch.equal(sincos_positions(grid, 26), sincos_positions(grid, 26, grid))
    assert torch.equal(rotary_angles(grid, 14), rotary_angles(grid, 14, grid))
    positions = Positions(grid, 24, 2, rope=True)
    assert positions.resized(grid) is positions


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factors", [(2, 1, 1), (1, 3, 2), (2, 2, 2), (4, 5, 1)])
def test_a_finer_grid_covers_the_same_extent(grid: Grid, factors: Grid) -> None:
    """The parts of a split token are spread evenly around its position."""
    finer = tuple(n * f for n, f in zip(grid, factors, strict=True))
    (t, h, w), (ft, fh, fw) = grid, factors
    split = positions_of(finer, grid).view(t, ft, h, fh, w, fw, 3)
    assert torch.allclose(split.mean(dim=(1, 3, 5)).view(-1, 3), positions_of(grid), atol=1e-5)
    for axis, (n, factor) in enumerate(zip(grid, factors, strict=True)):
        ids = positions_of(finer, grid)[:, axis].unique()
        assert ids.min() == pytest.approx(-0.5 + 0.5 / factor) and ids.max() == pytest.approx(n - 0.5 - 0.5 / factor)
        assert torch.allclose(ids.diff(), torch.tensor(1 / factor), atol=1e-5)


def test_a_coarser_grid_lies_between_the_trained_positions() -> None:
    assert positions_of((2, 1, 3), trained=(4, 1, 6)).tolist() == [
        [t, 0, w] for t, w in itertools.product([0.5, 2.5], [0.5, 2.5, 4.5])
    ]


def test_angles_are_linear_in_positions() -> None:
    angles = rotary_angles((4, 8, 8), 12, trained=(2, 4, 4)).view(2, 2, 4, 2, 4, 2, 6)
    assert torch.allclose(angles.mean(dim=(1, 3, 5)).view(-1, 6), rotary_angles((2, 4, 4), 12), atol=1e-5)


def test_encodings_are_sines_and_cosines_of_the_positions() -> None:
    """Time has 6 of 14 channels, rows and columns have 4 each. Wavelengths range from 2 pi to 200 pi."""
    encodings = sincos_positions((4, 2, 2), 14, trained=(2, 2, 2))
    for token, (t, h, w) in enumerate(itertools.product([-0.25, 0.25, 0.75, 1.25], [0, 1], [0, 1])):
        expected = []
        for position, pairs in ((t, 3), (h, 2), (w, 2)):
            angles = [position * 100 ** (-i / pairs) for i in range(pairs)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert encodings[token].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rope", [True, False])
def test_resized_positions_are_interpolated_with_the_same_settings(rope: bool) -> None:
    positions = Positions((2, 4, 4), 24, 2, rope)
    other = positions.resized((2, 8, 2))
    tokens = torch.tensor([[0, 5, 31], [7, 7, 1]])
    encodings, rotation = other(tokens)
    assert torch.equal(encodings, sincos_positions((2, 8, 2), 24, (2, 4, 4))[tokens])
    assert (rotation is not None) == rope
    if rotation is not None:
        assert torch.equal(rotation.cos[:, 0], rotary_angles((2, 8, 2), 12, (2, 4, 4))[tokens].cos())
        assert torch.equal(rotation.sin[:, 0], rotary_angles((2, 8, 2), 12, (2, 4, 4))[tokens].sin())
    assert not positions.state_dict()  # computed, not saved


@pytest.mark.parametrize("grid", GRIDS)
def test_flat_encodings_are_those_of_the_index(grid: Grid) -> None:
    """The formula is that of VideoMAE: channel c turns by 10000 ** (-2 * (c // 2) / width) per index."""
    encodings = flat_positions(grid, 12)
    assert torch.equal(encodings, flat_positions(grid, 12, grid))
    for index in (0, math.prod(grid) // 2, math.prod(grid) - 1):
        angles = [index / 10000 ** (2 * i / 12) for i in range(6)]
        expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
        assert encodings[index].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("grid", [(8, 42, 42), (24, 14, 14), (8, 14, 70)])
def test_a_place_of_the_trained_grid_keeps_its_flat_encoding(grid: Grid) -> None:
    trained = (8, 14, 14)
    middles = tuple(slice(n // m // 2, None, n // m) for n, m in zip(grid, trained, strict=True))
    encodings = flat_positions(grid, 96, trained).view(*grid, 96)[middles]
    assert torch.allclose(encodings, flat_positions(trained, 96).view(*trained, 96), atol=1e-4)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("grid", [(8, 28, 28), (16, 28, 28), (8, 16, 16), (8, 20, 26)])
def test_encodings_on_a_finer_grid_are_those_of_the_nearest_trained_place(grid: Grid, flat: bool) -> None:
    """No place of the finer grid is further from a trained place than from the next but one."""
    trained = (8, 14, 14)
    positions = Positions(trained, 768, 12, rope=False, flat=flat)
    t, h, w = positions_of(grid, trained).round().clamp_min(0).long().T
    nearest = positions.encoding_LD.view(*trained, 768)[t, h, w]
    similarity = F.cosine_similarity(positions.resized(grid).encoding_LD, nearest)
    distance = (positions_of(grid, trained) - torch.stack([t, h, w], 1)).abs().amax(1)
    assert similarity[distance <= 0.25].min() > 0.99
    assert similarity.min() > 0.96


def test_flat_encodings_on_another_grid_are_all_different() -> None:
    encodings = flat_positions((16, 28, 28), 768, trained=(8, 14, 14)).view(16, 28, 28, 768)
    for axis in range(3):
        assert encodings.diff(dim=axis).norm(dim=-1).min() > 0.5
