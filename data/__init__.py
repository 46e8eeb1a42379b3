"""Videos, clips, the token cache, and batches from the cache. Importing the public names does not import torch."""

from data.cache import DamagedCache, TokenCache
from data.clip_spec import ClipSpec
from data.clips import read_clip
from data.decoding import DamagedVideo
from data.sources import load_source

__all__ = ["ClipSpec", "DamagedCache", "DamagedVideo", "TokenCache", "load_source", "read_clip"]
