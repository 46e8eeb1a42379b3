"""The built-in set: reproducible, balanced, with disjoint splits. A single frame does not reveal the class."""

import numpy as np
import pytest
from PIL import Image

from data import moving_digits
from data.moving_digits import CLASSES, FRAMES, SIZE, render, trajectory
from data.sources import load_source

PERIOD = np.array([SIZE, SIZE, 2 * np.pi, 1.0])
AXIS_AND_SIGN = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (1, -1),
    "down": (1, 1),
    "clockwise": (2, 1),
    "anticlockwise": (2, -1),
    "growing": (3, 1),
    "shrinking": (3, -1),
}


def indices_of(label: str, count: int) -> range:
    """Indices of the first `count` clips of a class."""
    return range(CLASSES.index(label), count * len(CLASSES), len(CLASSES))


def steps_of(states: np.ndarray) -> np.ndarray:
    """Return the differences of consecutive states, the shorter way around the torus."""
    return (np.diff(states, axis=0) + PERIOD / 2) % PERIOD - PERIOD / 2


def ink_of(video: np.ndarray) -> np.ndarray:
    """Return the brightness above that of any background, (T, H, W)."""
    return np.clip(video.astype(np.float64).mean(-1) - 0.55 * 255, 0, None)


def test_clip_is_a_function_of_seed_split_and_index() -> None:
    clip = render(3, "train", 5)
    render(4, "test", 2)
    assert clip.shape == (FRAMES, SIZE, SIZE, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, render(3, "train", 5))
    assert np.array_equal(trajectory(3, "train", 5), trajectory(3, "train", 5))
    for other in ((4, "train", 5), (3, "test", 5), (3, "train", 13)):
        assert not np.array_equal(clip, render(*other))
        assert not np.array_equal(trajectory(3, "train", 5), trajectory(*other))


def test_some_frames_are_rendered_alone() -> None:
    video = render(0, "train", 5)
    for numbers in ([0], [31, 3], range(8, 24), [9, 9, 10]):
        assert np.array_equal(render(0, "train", 5, numbers), video[list(numbers)])


def test_the_state_that_is_drawn_is_that_of_frame_8() -> None:
    """Videos once began with this frame. The 16 frames from here on are still the canonical clip."""
    for split, index in (("train", 3), ("test", 6)):
        drawn = np.random.default_rng([0, list(moving_digits.SPLITS).index(split), index, 0]).uniform(0, PERIOD, 4)
        assert np.array_equal(trajectory(0, split, index)[8], drawn)


def test_classes_are_balanced_in_both_splits() -> None:
    source = load_source("builtin:moving-digits")
    for split, clips in (("train", 1600), ("test", 600)):
        labels = [video.label for video in source.videos if video.split == split]
        assert {labels.count(name) for name in CLASSES} == {clips // 8}


def test_label_of_a_listed_clip_fits_its_trajectory() -> None:
    for video in load_source("builtin:moving-digits:16:8").videos:
        split, index = video.path.split("/")
        axis, sign = AXIS_AND_SIGN[str(video.label)]
        assert np.all(sign * steps_of(trajectory(0, split, int(index)))[:, axis] > 0)


def test_splits_use_different_handwritten_samples() -> None:
    train, test = (moving_digits._glyphs(split) for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    assert len(test) > 400
    assert not {glyph.numpy().tobytes() for glyph in train} & {glyph.numpy().tobytes() for glyph in test}


def test_every_single_frame_has_the_same_distribution_in_all_classes() -> None:
    clips = 400
    for label in CLASSES:
        states = np.stack([trajectory(0, "train", i) for i in indices_of(label, clips)]) / PERIOD
        assert states.min() >= 0
        assert states.max() <= 1
        for t in (0, 7, FRAMES - 1):
            for axis in range(4):
                ordered = np.sort(states[:, t, axis])
                steps = np.arange(clips + 1) / clips
                distance = max(np.abs(ordered - steps[1:]).max(), np.abs(ordered - steps[:-1]).max())
                # Kolmogorov-Smirnov test of uniformity at p = 1e-4. A start in the middle would give 0.3 or more.
                assert distance < 2.23 / np.sqrt(clips), (label, t, axis)


@pytest.mark.parametrize("label", CLASSES)
def test_only_the_axis_of_the_class_moves_and_in_its_direction(label: str) -> None:
    axis, sign = AXIS_AND_SIGN[label]
    for index in indices_of(label, 20):
        steps = steps_of(trajectory(1, "test", index))
        others = np.delete(steps, axis, axis=1)
        assert np.abs(others).max() < 1e-9
        assert np.all(sign * steps[:, axis] > 0)
        assert np.ptp(steps[:, axis]) < 1e-9, "the speed is constant"


@pytest.mark.parametrize("label", ["left", "right", "up", "down"])
def test_rendered_digit_shifts_with_its_trajectory(label: str) -> None:
    axis, sign = AXIS_AND_SIGN[label]
    wave = np.exp(2j * np.pi * np.arange(SIZE) / SIZE)
    for index in indices_of(label, 4):
        profile = ink_of(render(0, "train", index)).sum(axis=1 if axis == 0 else 2)
        phase = np.angle(profile @ wave) * SIZE / (2 * np.pi)
        shift = (np.diff(phase) + SIZE / 2) % SIZE - SIZE / 2
        assert np.all(sign * shift > 0)
        speed = steps_of(trajectory(0, "train", index))[0, axis]
        assert np.abs(np.median(shift) - speed) < 0.2
        assert np.abs(shift - speed).max() < 1


@pytest.mark.parametrize("label", ["clockwise", "anticlockwise"])
def test_rendered_digit_turns_in_the_direction_of_its_class(label: str) -> None:
    _, sign = AXIS_AND_SIGN[label]
    for index in indices_of(label, 4):
        states = trajectory(0, "train", index)
        degrees = np.degrees(4 * abs(steps_of(states)[0, 2]))
        ink = ink_of(render(0, "train", index))
        centre = np.round(SIZE / 2 - states[0, [1, 0]]).astype(int)
        ink = np.roll(ink, centre, axis=(1, 2))
        fits = {}
        for turn in (1, -1):  # Pillow rotates anticlockwise
            turned = [np.asarray(Image.fromarray(frame).rotate(-turn * degrees)) for frame in ink[:-4]]
            fits[turn] = np.corrcoef(np.ravel(turned), ink[4:].ravel())[0, 1]
        assert fits[sign] > 0.8
        assert fits[sign] > fits[-sign] + 0.05


@pytest.mark.parametrize("label", ["growing", "shrinking"])
def test_rendered_digit_grows_or_shrinks_except_where_its_scale_wraps(label: str) -> None:
    _, sign = AXIS_AND_SIGN[label]
    for index in indices_of(label, 4):
        scale = trajectory(0, "train", index)[:, 3]
        change = np.diff(ink_of(render(0, "train", index)).sum(axis=(1, 2)))
        wraps = np.sign(np.diff(scale)) != sign
        assert wraps.sum() <= 3
        assert np.all(np.sign(change)[~wraps] == sign)
        assert np.all(np.sign(change)[wraps] == -sign)


def test_digit_that_leaves_on_one_side_returns_on_the_opposite_side() -> None:
    ink = ink_of(render(0, "train", CLASSES.index("right"))).sum(axis=(1, 2))
    states = trajectory(0, "train", CLASSES.index("right"))[:, 0]
    assert np.ptp(ink) < 0.15 * ink.mean(), states
