"""Video tokenizers, which encode pixels to codes and decode codes to pixels. `load_tokenizer` loads every kind.

Public names are imported on first use, so that `tokenizer.loss_settings` can be imported without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.loading import VQ3D, Linear, TamingTokenizer, TorchScriptTokenizer, VideoTokenizer, load_tokenizer

__all__ = ["VQ3D", "Linear", "TamingTokenizer", "TorchScriptTokenizer", "VideoTokenizer", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
    from tokenizer import loading

    return getattr(loading, name)
