"""The token cache: codes made once, found again by what made them, read by every later experiment.

caches/<name>-<first 12 of key>/
  manifest.json           written last; without it the folder is unfinished work that the next run completes
  plan.json               the shard size; until there is a manifest also the preimage of the key
  made_with.json          where the videos and the tokenizer were, the last time they were looked at
  codebook.safetensors    the tokenizer's code vectors, if it has a learned codebook
  shards/                 data/shards.py; a <number>.claim link says which process is making a shard

spec.py       what decides the content, and its key
writer.py     filling a cache, by any number of processes
reader.py     TokenCache, the public door
index.py      where every clip's codes lie; gathering batches
storage.py    the files of a folder or behind an address
stream.py     a cache as a webdataset pipeline
catalogue.py  finding and listing caches
merge.py      joining caches
tool.py       python -m data.cache list | show | verify | merge | export
"""

from data.cache.catalogue import find_cache
from data.cache.reader import TokenCache
from data.cache.spec import CacheSpec, key_of
from data.cache.writer import CacheWriter
from data.shards import DamagedCache

__all__ = ["CacheSpec", "CacheWriter", "DamagedCache", "TokenCache", "find_cache", "key_of"]
