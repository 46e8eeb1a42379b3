"""Videos, clips, the token cache, and batches from it. Importing this package does not import torch."""

from data.cache import DamagedCache, TokenCache

__all__ = ["DamagedCache", "TokenCache"]
