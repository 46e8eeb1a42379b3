"""What every objective is to the rest of the house, and the trunk that all have.

Legend: B batch, L tokens, M some of them, D width.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ar_model.attention import Mask
from ar_model.inputs import CodeInput, CodeSpec, Content, Grid, Patching, make_input, take
from ar_model.transformer import Encoder, Positions


class Objective(nn.Module, PyTorchModelHubMixin):
    """A model and its loss. The training loop and the probes use these two methods and nothing else.

    A batch is a dictionary of tensors whose first axis is the sample: `codes_BTHW` (int64), `seed_B` (int64, the source
    of all randomness of the step) and, for those that need them, `pixels_BTHWC`.
    """

    needs_pixels: bool = False
    """Whether batches must have `pixels_BTHWC` (uint8)."""
    needs_pairs: bool = False
    """Whether batches of the training must have `pair_BTHW`, the codes of another view of each video."""
    sees_pixels: bool = False
    """Whether those of `features` must."""

    def __init_subclass__(cls, **kwargs: Any) -> None:  # the mixin does not hand these down by itself
        super().__init_subclass__(
            coders={CodeSpec: (CodeSpec.to_json, CodeSpec.from_json)}, library_name="arvideo", **kwargs
        )
        trunk = inspect.signature(Objective.__init__).parameters.values()
        defaults = {
            setting.name: setting.default for setting in trunk if setting.default is not inspect.Parameter.empty
        }
        cls._hub_mixin_jsonable_default_values = defaults | cls._hub_mixin_jsonable_default_values

    def __init__(
        self,
        codes: CodeSpec,
        *,
        input: Content,  # noqa: A002
        target: Content,
        code_patch: Grid = (1, 1, 1),
        code_input: CodeInput = "geometry",
        rope: bool = True,
        flat: bool = False,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        """What all objectives have: how clips are cut into tokens (`input`, `predicts`, `grid`), and the trunk
        (`embedding`, `positions`, `encoder`), which `init_weights` of the objective gives its values.

        Args:
            codes: what the cache says of its codes.
            input: what the encoder gets; pixels need a cache that keeps them.
            target: what is predicted.
            code_patch: codes of one token along (t, h, w).
            code_input: embed codes by their geometry, or by one row per code.
            rope: turn queries and keys by their positions (axial rotary positions), besides adding sine-cosine
                positions to the tokens.
            flat: sine-cosine positions of a token's number (arXiv 2203.12602), instead of (t, h, w).
            width: width of the encoder.
            depth: blocks of the encoder.
            heads: attention heads of the encoder.

        Raises:
            ValueError: for settings that do not exist or do not fit the codes.
        """
        super().__init__()
        check_choices(
            {"input": Content, "target": Content, "code_input": CodeInput},
            input=input,
            target=target,
            code_input=code_input,
        )
        if min(width, depth) < 1:
            raise ValueError("objective.width and depth must be at least 1")
        patch = as_grid(code_patch=code_patch)
        self.input, self.predicts = Patching.of(input, codes, patch), Patching.of(target, codes, patch)
        self.needs_pixels, self.sees_pixels = "pixels" in (input, target), input == "pixels"
        self.width, self.heads = width, heads
        self.grid = Patching("codes", patch).grid(codes.shape)
        self.embedding = make_input(self.input, codes, width, code_input)
        self.encoder = Encoder(width, depth, heads)
        self.positions = Positions(self.grid, width, heads, rope, flat=flat)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` (scalar, with gradient) and numbers to log (scalars, without)."""
        raise NotImplementedError

    def encode(self, batch: dict[str, Tensor], tokens_BM: Tensor, mask: Mask = None) -> Tensor:
        """What the encoder makes of some tokens of each clip, (B, M, D)."""
        position_BMD, rotation = self.positions(tokens_BM)
        x_BMD = self.embedding(take(self.input.tokens(batch), tokens_BM)) + position_BMD
        return self.encoder.last(x_BMD, mask, rotation)

    def features(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Output of every encoder block for whole clips, (B, L, D) in raster order; no mask, nothing dropped.

        Clips may have another size than those of the training: their positions are laid over the trained grid.
        """
        grid = self._grid(batch)
        x_BLD = self.embedding(self.input.tokens(batch))
        position_1LD, rotation = self.positions.laid_over(grid)(torch.arange(x_BLD.shape[1], device=x_BLD.device)[None])
        return self.encoder(x_BLD + position_1LD, rotation=rotation)

    def time_slices(self, batch: dict[str, Tensor]) -> int:
        """Tokens along time of a batch's clips: its features are that many equal runs of tokens."""
        return self._grid(batch)[0]

    def _grid(self, batch: dict[str, Tensor]) -> Grid:
        """Tokens of a batch's clips along (t, h, w)."""
        return self.input.grid(self.input.clip(batch).shape[1:4])

    def save(self, folder: Path) -> None:
        """Write weights and configuration, for `load_objective`, `from_pretrained` and the hub."""
        self.save_pretrained(
            folder, config={"objective": type(self).__name__, **cast(dict[str, Any], self._hub_mixin_config)}
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Objective":
        """A new network of a saved configuration; lists of the JSON become the tuples of the signature."""
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(**{**settings, "codes": CodeSpec.from_json(config["codes"])})

    @classmethod
    def _from_pretrained(cls, *, objective: str, **settings: Any) -> Any:  # type: ignore[override]
        if objective != cls.__name__:
            raise ValueError(f"holds a {objective}, not a {cls.__name__}; load_objective loads either")
        return super()._from_pretrained(**settings)


def check_choices(choices: Mapping[str, Any], **settings: str) -> None:
    """Raise a ValueError for a setting that is none of its Literal's choices."""
    for name, value in settings.items():
        if value not in get_args(choices[name]):
            raise ValueError(f"objective.{name} is {value!r}, but must be one of {', '.join(get_args(choices[name]))}")


def check_shares(**settings: float) -> None:
    """Raise a ValueError for a share that is not in (0, 1]."""
    for name, share in settings.items():
        if not 0 < share <= 1:
            raise ValueError(f"objective.{name} is {share}, but must be a share in (0, 1]")


def as_grid(**setting: Sequence[int]) -> Grid:
    """The one setting given as a tuple, also of the list that a saved configuration holds; a ValueError if it is not three."""
    ((name, sides),) = setting.items()
    if len(sides) != 3:
        raise ValueError(f"objective.{name} is {list(sides)}, but must be three numbers: along t, h and w")
    return sides[0], sides[1], sides[2]
