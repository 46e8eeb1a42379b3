"""The token cache: the codes of a set of videos, written once and read by every later experiment (docs/cache.md).

caches/<name>-<first 12 hex digits of the key>/
  manifest.json           description of the finished cache, written last; the next tokenize run completes a folder without it
  plan.json               shard size; until the manifest exists also the specification that is hashed into the key
  made_with.json          where the videos and the tokenizer were found the last time tokenize ran
  codebook.safetensors    code vectors of the tokenizer, if its codebook is learned
  shards/                 tars and their records (data/shards.py); <number>.claim links name the process at work on a shard
"""

from data.cache.catalogue import find_cache
from data.cache.reader import TokenCache
from data.cache.spec import CacheSpec, key_of
from data.cache.writer import CacheWriter
from data.shards import DamagedCache

__all__ = ["CacheSpec", "CacheWriter", "DamagedCache", "TokenCache", "find_cache", "key_of"]
