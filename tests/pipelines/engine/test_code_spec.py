"""Settings that depend on the codes of a cache are recorded as what they mean, as earlier versions recorded them."""

from pathlib import Path

import yaml

from data.cache import TokenCache
from pipelines.engine.code_spec import with_likelihood
from pipelines.engine.config import parse
from pipelines.settings.pretrain_ar import Pretrain
from tests.helpers.caches import MakeCache


def test_likelihood_auto_is_recorded_as_what_it_means(tmp_path: Path, make_cache: MakeCache) -> None:
    layouts = {"one": {"levels": ((8, 8),)}, "two": {"codes_per_place": 2, "levels": ((8, 8), (64,))}}
    recorded = {}
    for name, layout in layouts.items():
        cache = TokenCache.open(make_cache(tmp_path, 4, name=name, **layout))
        recorded[name] = with_likelihood(parse(Pretrain, [])[1], cache)
        explicit = parse(Pretrain, ["--objective.likelihood", "digits"])[1]
        assert with_likelihood(explicit, cache) == explicit
    for name, likelihood in (("one", "joint"), ("two", "digits")):
        explicit = parse(Pretrain, [f"--objective.likelihood={likelihood}"])[1]
        assert yaml.safe_load(recorded[name]) == yaml.safe_load(explicit)
