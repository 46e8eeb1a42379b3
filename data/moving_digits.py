"""Moving digits: real handwritten digits in eight motions, rendered on demand. A single frame does not reveal the motion.

The state of a video is a point (x, y, angle, log-scale) on a 4-dimensional torus: a digit that leaves on one side
returns on the opposite side, and a digit that has grown to full size starts again small. The point is drawn uniformly.
The class determines only the coordinate along which the point moves, and the direction. A translation of a torus keeps
the uniform distribution, so every single frame has the same distribution in all eight classes. Only the difference
between frames carries the label. A video is twice as long as a clip of 16 frames, so that views of a video differ.

Everything is a pure function of (seed, split, index). Training and held-out split use different handwritten samples.
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

VERSION = "digits-2"
"""Version of the pixels and the length of the videos. A new version gives new names of runs and new keys of caches."""
SIZE = 64
FRAMES = 32
CLASSES = ("left", "right", "up", "down", "clockwise", "anticlockwise", "growing", "shrinking")
SPLITS: Mapping[str, int] = MappingProxyType({"train": 1600, "test": 600})  # videos per split

# Axis of the torus and direction of each class. Image rows count downwards, and angles clockwise as displayed.
_MOTION = ((0, -1), (0, 1), (1, -1), (1, 1), (2, 1), (2, -1), (3, 1), (3, -1))
# Slowest and fastest motion along each axis per frame, in pixels, pixels, radians and shares of the scale range.
_SPEED = ((2.0, 4.0), (2.0, 4.0), (0.15, 0.35), (0.04, 0.08))
_PERIOD = (SIZE, SIZE, 2 * np.pi, 1.0)
_HEIGHT = (22.0, 44.0)  # smallest and largest digit, in pixels
# Frame at which the drawn state is reached. Videos once had the 16 frames from here on, and these frames are still the canonical
# clip, so that results of one view stay valid.
_ORIGIN = 8


@functools.cache
def _glyphs(split: str) -> torch.Tensor:
    """Return the handwritten digits of one split, (N, 1, 32, 32) in 0..1, smoothed from scikit-learn's 8x8 scans."""
    from sklearn.datasets import load_digits  # takes a second to import

    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    held_out = torch.arange(len(images)) % 4 == 0
    images = images[held_out if split == "test" else ~held_out]
    return F.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)


def _texture(rng: np.random.Generator) -> torch.Tensor:
    """Draw a dark background of smooth noise in one tint, (3, SIZE, SIZE) in 0..0.5."""
    noise = torch.from_numpy(rng.uniform(0, 1, (1, 1, 5, 5))).float()
    noise = F.interpolate(noise, size=(SIZE, SIZE), mode="bicubic", align_corners=False)[0]
    tint = torch.from_numpy(rng.uniform(0.1, 0.35, (3, 1, 1))).float()
    return (tint * (0.25 + noise)).clamp(0, 0.5)


def trajectory(seed: int, split: str, index: int) -> np.ndarray:
    """Return the states of a video, (FRAMES, 4): x and y of the centre in pixels, angle in radians, log-scale in 0..1."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index, 0])
    axis, sign = _MOTION[index % len(CLASSES)]
    state = np.tile(rng.uniform(0, _PERIOD, 4), (FRAMES, 1))
    low, high = _SPEED[axis]
    speed = low + (high - low) * rng.uniform()
    state[:, axis] += sign * speed * (np.arange(FRAMES) - _ORIGIN)
    return state % _PERIOD


def render(seed: int, split: str, index: int, numbers: Sequence[int] = range(FRAMES)) -> np.ndarray:
    """Render the numbered frames of video `index` of a split, uint8 (T, SIZE, SIZE, 3). Its class is `CLASSES[index % 8]`."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index, 1])
    glyphs = _glyphs(split)
    glyph = glyphs[int(rng.integers(len(glyphs)))]
    background = _texture(rng)
    ink = torch.from_numpy(rng.uniform(0.8, 1.0, 3)).float()

    x, y, angle, scale = torch.from_numpy(trajectory(seed, split, index)[numbers]).float().T[:, :, None, None]
    height = _HEIGHT[0] * (_HEIGHT[1] / _HEIGHT[0]) ** scale
    pixel = torch.arange(SIZE, dtype=torch.float32) + 0.5
    dx = (pixel[None, None, :] - x + SIZE / 2) % SIZE - SIZE / 2  # the shorter way around the torus
    dy = (pixel[None, :, None] - y + SIZE / 2) % SIZE - SIZE / 2
    cos, sin = torch.cos(angle), torch.sin(angle)
    grid_THW2 = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], dim=-1) * (2 / height[..., None])
    alpha = F.grid_sample(glyph.expand(len(numbers), -1, -1, -1), grid_THW2, align_corners=False)
    video_TCHW = background + alpha * (ink[:, None, None] - background)
    return rearrange((video_TCHW * 255).round().to(torch.uint8), "t c h w -> t h w c").contiguous().numpy()
