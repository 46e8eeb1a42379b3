"""What every objective is to the rest of the house."""

import inspect
from pathlib import Path
from typing import Any, cast

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ar_model.inputs import CodeSpec


class Objective(nn.Module, PyTorchModelHubMixin):
    """A model and its loss. The training loop and the probes use these two methods and nothing else.

    A batch is a dictionary of tensors whose first axis is the sample: `codes_BTHW` (int64), `seed_B` (int64, the source
    of all randomness of the step) and whatever else the cache holds.
    """

    time_slices: int
    """Tokens along time: `features` are that many equal runs of tokens."""

    def __init_subclass__(cls, **kwargs: Any) -> None:  # the mixin does not hand these down by itself
        super().__init_subclass__(
            coders={CodeSpec: (CodeSpec.to_json, CodeSpec.from_json)}, library_name="arvideo", **kwargs
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` (scalar, with gradient) and numbers to log (scalars, without)."""
        raise NotImplementedError

    def features(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Representations of whole clips, one (B, L, D) per layer, tokens in raster order; no mask, nothing dropped."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write weights and configuration, for `load_objective`, `from_pretrained` and the hub."""
        self.save_pretrained(
            folder, config={"objective": type(self).__name__, **cast(dict[str, Any], self._hub_mixin_config)}
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Objective":
        """A new network of a saved configuration; lists of the JSON become the tuples of the signature."""
        known = {k: v for k, v in config.items() if k in inspect.signature(cls.__init__).parameters}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        return cls(**{**known, "codes": CodeSpec.from_json(config["codes"])})
