"""Base class of all objectives, with the encoder that they share.

Legend: B batch, T H W the grid of codes, L tokens, M some of them, D width, A rotary angles.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from ar_model.attention import Rotation
from ar_model.attention_mask import Mask
from ar_model.inputs import CodeInput, CodeSpec, Content, Grid, Patching, make_input, take
from ar_model.model_card import objective_card
from ar_model.transformer import Encoder, Positions

_LARGEST = 2**14
"""Largest width, and largest other count, of a model."""


class EmbeddedTokens(NamedTuple):
    """Tokens of whole clips with their positions added, and their rotary angles, None without rotary positions."""

    x_BLD: Tensor
    angle_LA: Tensor | None

    def rotation(self, tokens_BM: Tensor | None = None) -> Rotation | None:
        """Return the rotary positions of all tokens, or of some tokens of each clip."""
        if self.angle_LA is None:
            return None
        return Rotation.from_angles(self.angle_LA[None] if tokens_BM is None else self.angle_LA[tokens_BM])


class Objective(nn.Module, PyTorchModelHubMixin):
    """Base class of all objectives: a model with its loss (`forward`) and its features (`features`).

    A batch is a dictionary of tensors whose first axis is the sample:

    - `codes_BTHW`: (B, T, H, W) int64. Codes in 0..vocab_size - 1.
    - `pixels_BTHWC`: (B, frames, height, width, 3) uint8. RGB; the loss needs it if `needs_pixels`, features if `sees_pixels`.
    - `seed_B`: (B,) int64. Seeds of all randomness in the loss; features do not need them.
    - `pair_BTHW`: like `codes_BTHW`. Another view of each video; the loss needs it in training if `needs_pairs`.
    - `slices_B`, `pair_slices_B`: (B,) int64. Number of valid time slices of codes; optional, used by VIMPAC.
    - `row_B`: (B,) int64. Index of the video in the cache; optional, used by VIMPAC's contrastive loss.
    """

    needs_pixels: bool = False
    needs_pairs: bool = False
    sees_pixels: bool = False
    feature_parts: tuple[str, ...] = ("embedding", "positions", "encoder")
    """Modules and parameters that `features` uses."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # The mixin does not pass its options or the defaults of `Objective.__init__` on to subclasses, so they are set here.
        coders = {CodeSpec: (CodeSpec.to_json, CodeSpec.from_json)}
        super().__init_subclass__(coders=coders, library_name="arvideo", **kwargs)
        defaults = Objective.__init__.__kwdefaults__ or {}
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
        """Build the shared parts: the patchings `input` and `predicts`, `grid`, `embedding`, `positions` and `encoder`.

        Subclasses initialise the weights with `init_weights`.

        Args:
            codes: description of the cache's codes.
            input: input of the encoder; pixels need a cache made with --keep_pixels.
            target: what is predicted.
            code_patch: codes of one token along (t, h, w).
            code_input: `geometry` embeds a code by its digits or codebook vector; `rows` learns a separate vector for each code.
            rope: use rotary positions of (t, h, w) in attention, in addition to the sine-cosine encodings of tokens.
            flat: use sine-cosine encodings of a token's index (arXiv 2203.12602) instead of (t, h, w).
            width: width of the encoder.
            depth: blocks of the encoder.
            heads: attention heads of the encoder.

        Raises a ValueError for settings that are invalid or do not fit the codes.
        """
        super().__init__()
        check_choices(input=(input, Content), target=(target, Content), code_input=(code_input, CodeInput))
        check_positive(width=width, depth=depth)
        patch = as_grid("code_patch", code_patch)
        self.input, self.predicts = Patching.of(input, codes, patch), Patching.of(target, codes, patch)
        self.needs_pixels, self.sees_pixels = "pixels" in (input, target), input == "pixels"
        self.width, self.heads = width, heads
        self.grid = Patching("codes", patch).grid(codes.shape)
        self.embedding = make_input(self.input, codes, width, code_input)
        self.encoder = Encoder(width, depth, heads)
        self.positions = Positions(self.grid, width, heads, rope, flat=flat)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `loss` (a scalar with gradient) and further numbers to log (scalars without gradient)."""
        raise NotImplementedError

    @property
    def conditioning(self) -> str:
        """Description of what the loss predicts and from what. Losses of two models are comparable only if it is equal."""
        return f"{self.predicts.content} from {self.input.content}, {self._hidden_in_words()}, tokens of {self.predicts.box}"

    def _hidden_in_words(self) -> str:
        """Describe which tokens are visible and which are predicted, in validation."""
        raise NotImplementedError

    def encode(self, batch: dict[str, Tensor], tokens_BM: Tensor, mask: Mask = None) -> Tensor:
        """Return the encoder's normalised output for some tokens of each clip, (B, M, D)."""
        position_BMD, rotation = self.positions(tokens_BM)
        x_BMD = self.embedding(take(self.input.tokens(batch), tokens_BM)) + position_BMD
        return self.encoder.last(x_BMD, mask, rotation)

    def features(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the features of whole clips: no token is masked or dropped, and nothing is random.

        The batch needs `codes_BTHW`, or `pixels_BTHWC` if `sees_pixels`, on the model's device. VIMPAC also reads `slices_B`.
        If clips have another size than in training, positions are interpolated.

        Returns the output of every encoder block, first to last, without the encoder's final norm. Each is (B, L, D), in fp32
        even under autocast. The last t * h * w tokens are those of the clip in raster order, with (t, h, w) = `grid_of(batch)`.
        Tokens before them are the objective's own; only VIMPAC has one, its clip token.

        Raises a KeyError if the batch lacks the input, and a ValueError if the size of the clips is not a multiple of
        the size of a token.
        """
        tokens = self.embed(batch)
        return self.encoder(tokens.x_BLD, rotation=tokens.rotation())

    def embed(self, batch: dict[str, Tensor]) -> "EmbeddedTokens":
        """Return the input of the encoder for whole clips. Raises the same errors as `features`."""
        positions = self.positions.resized(self.grid_of(batch))
        x_BLD = self.embedding(self.input.tokens(batch))
        return EmbeddedTokens(x_BLD + positions.encoding_LD, positions.angle_LA if self.positions.rope else None)

    def drop_loss(self) -> None:
        """Delete all modules and parameters that only the loss uses, such as a decoder. `features` and `embed` stay."""
        for part in [*self._modules, *self._parameters, *self._buffers]:
            if part not in self.feature_parts:
                delattr(self, part)
        # Features are the output of the blocks, before this norm.
        self.encoder.drop_norm()

    def grid_of(self, batch: dict[str, Tensor]) -> Grid:
        """Return the number of tokens of the batch's clips along (t, h, w)."""
        return self.input.grid(self.input.clip(batch).shape[1:4])

    def config(self) -> dict[str, Any]:
        """Return the settings of the model as JSON content, which `from_config` reads."""
        return cast(dict[str, Any], self._hub_mixin_config)

    def save(self, folder: Path, training: Mapping[str, object] | None = None) -> None:
        """Write `model.safetensors` and `config.json`, for `load_objective`, `from_pretrained` and the Hugging Face hub.

        `training`: facts of the training by name, for the model card README.md.
        """
        config = {"objective": type(self).__name__, **self.config()}
        self.save_pretrained(folder, config=config, model_card_kwargs={"training": training})

    def generate_model_card(self, training: Mapping[str, object] | None = None) -> ModelCard:  # type: ignore[override]
        """Return the model card, which `save` writes as README.md."""
        return objective_card(self, {**self.sizes(), **(training or {})})

    def sizes(self) -> dict[str, str]:
        """Return the sizes of the encoder and of its input, for a model card."""
        encoder = f"{len(self.encoder.blocks)} blocks of width {self.width}, {self.heads} heads"
        return {"encoder": encoder, "tokens of a clip": "x".join(map(str, self.grid))}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Objective":
        """Build a newly initialised model from a saved configuration. Lists of the JSON become tuples."""
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(**{**settings, "codes": CodeSpec.from_json(config["codes"])})

    @classmethod
    def _from_pretrained(cls, *, objective: str, **settings: Any) -> Any:  # type: ignore[override]
        if objective != cls.__name__:
            raise ValueError(f"the folder holds {objective}, not {cls.__name__}: use load_objective for any objective")
        return super()._from_pretrained(**settings)


def check_choices(**settings: tuple[str, Any]) -> None:
    """Raise a ValueError if a setting, given as name=(value, Literal), is not among the choices of its Literal."""
    for name, (value, literal) in settings.items():
        if value not in get_args(literal):
            raise ValueError(f"objective.{name} must be one of {', '.join(get_args(literal))}, got {value!r}")


def check_positive(**settings: float) -> None:
    """Raise a ValueError if a count is below 1, or larger than in any model."""
    for name, count in settings.items():
        if not 1 <= count <= _LARGEST:
            raise ValueError(f"objective.{name} must be from 1 to {_LARGEST}, got {count}")


def check_shares(**settings: float) -> None:
    """Raise a ValueError if a share is not in (0, 1]."""
    for name, share in settings.items():
        if not 0 < share <= 1:
            raise ValueError(f"objective.{name} must be in (0, 1], got {share}")


def as_grid(name: str, sides: Sequence[int]) -> Grid:
    """Return a setting along (t, h, w) as a tuple (JSON has lists). Raises a ValueError if it does not have three numbers."""
    if len(sides) != 3:
        raise ValueError(f"objective.{name} must be three numbers along t, h and w, got {list(sides)}")
    return sides[0], sides[1], sides[2]
