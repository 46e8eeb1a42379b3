"""Every shipped setting parses against the real signatures and builds the network that the paper's table describes."""

import math
from pathlib import Path

import pytest
import torch

from ar_model.inputs import CodeSpec
from ar_model.objectives import ARVideo
from pipelines.config import parse
from pipelines.pretrain_ar import Pretrain

from .conftest import ROOT

CONFIGS = ROOT / "pipelines" / "configs"
PAPER = ["vit_b.yaml", "paper.yaml"]
CODES = CodeSpec(shape=(8, 14, 14), vocab_size=1000, levels=(8, 5, 5, 5), clip=(16, 224, 224))


def build(*names: str, codes: CodeSpec = CODES) -> ARVideo:
    flags = [flag for name in names for flag in ("--config", str(CONFIGS / name))]
    config, _ = parse(Pretrain, flags)
    with torch.device("meta"):
        model = config.objective(codes)
    assert isinstance(model, ARVideo)
    return model


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*.yaml")) + sorted(CONFIGS.glob("paper/*.yaml")), ids=lambda p: p.stem
)
def test_a_shipped_setting_parses_alone_and_over_the_paper(path: Path) -> None:
    parse(Pretrain, ["--config", str(path)])
    build(*PAPER, str(path.relative_to(CONFIGS)))


def test_the_paper_has_300_tokens_to_see_and_1470_to_predict() -> None:
    model = build(*PAPER)
    assert (model.clusters.counts, model.kept, model.predicted, model.ranks) == ((4, 2, 2), 20, 98, 15)
    assert model.input.box == (2, 16, 16) and model.needs_pixels
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(85.1e6, rel=0.01)
    assert (len(model.decoder.blocks), model.query_D.numel()) == (4, 512)


@pytest.mark.parametrize(
    "name, clusters",
    [
        ("token", 1568),
        ("spatial_slice", 8),
        ("spatial", 32),
        ("temporal_column", 196),
        ("temporal", 784),
        ("spacetime_4x7x7", 8),
        ("spacetime_2x7x7", 16),
    ],
)
def test_units_of_table_6(name: str, clusters: int) -> None:
    model = build(*PAPER, f"paper/table6_unit_{name}.yaml")
    assert math.prod(model.clusters.counts) == clusters


@pytest.mark.parametrize("keep, kept", [("25", 25), ("20", 20), ("10", 10), ("05", 5)])
def test_dropping_of_table_8(keep: str, kept: int) -> None:
    assert build(*PAPER, f"paper/table8_keep_{keep}.yaml").kept == kept


def test_decoders_of_tables_9_and_10() -> None:
    assert build(*PAPER, "paper/table9_self_and_cross.yaml").decoder.blocks[0].self_attention is not None
    assert build(*PAPER, "paper/table9_cross_only.yaml").decoder.blocks[0].self_attention is None
    assert build(*PAPER, "paper/table10_width_768.yaml").query_D.numel() == 768
    assert len(build(*PAPER, "paper/table10_depth_8.yaml").decoder.blocks) == 8


def test_sizes_fit_the_caches_that_tokenize_makes_by_default() -> None:
    codes = CodeSpec(shape=(8, 8, 8), vocab_size=1000, levels=(8, 5, 5, 5))
    models = [build(f"vit_{size}.yaml", codes=codes) for size in "sbl"]
    millions = [sum(p.numel() for p in model.encoder.parameters()) / 1e6 for model in models]
    assert millions == pytest.approx([21.3, 85.1, 302.3], rel=0.01)  # blocks of arXiv 2010.11929, table 1


def test_the_control_sees_everything() -> None:
    assert not build(*PAPER, "paper/control_no_causal_mask.yaml").causal
