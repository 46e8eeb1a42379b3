"""Videos, clips, the token cache, and batches of it. `TokenCache` is the public name; importing it needs no torch."""

from data.cache import TokenCache

__all__ = ["TokenCache"]
