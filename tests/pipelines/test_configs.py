"""Every settings file in pipelines/configs parses and builds the network of the paper's table."""

import math
from pathlib import Path

import pytest
import torch

from ar_model.inputs import CodeSpec
from ar_model.objectives import VIMPAC, ARVideo, Objective
from pipelines.engine.config import parse
from pipelines.settings.pretrain_ar import Pretrain
from pipelines.settings.tokenize import Tokenize
from tests.helpers.commands import ROOT

CONFIGS = ROOT / "pipelines" / "configs"
PAPER = ["base/arvideo.yaml", "papers/arvideo.yaml"]
CODES = CodeSpec(shape=(8, 14, 14), vocab_size=1000, levels=((8, 5, 5, 5),), clip=(16, 224, 224))


def build(*names: str, codes: CodeSpec = CODES) -> ARVideo:
    flags = [flag for name in names for flag in ("--config", str(CONFIGS / name))]
    config, _ = parse(Pretrain, flags)
    with torch.device("meta"):
        model = config.objective(codes)
    assert isinstance(model, ARVideo)
    return model


@pytest.mark.parametrize(
    "path", [CONFIGS / "papers" / "arvideo.yaml", *sorted(CONFIGS.glob("papers/arvideo/*.yaml"))], ids=lambda p: p.stem
)
def test_a_file_of_arvideo_parses_alone_and_on_top_of_the_paper(path: Path) -> None:
    parse(Pretrain, ["--config", str(path)])
    build(*PAPER, str(path.relative_to(CONFIGS)))


def test_the_paper_has_300_visible_and_1470_predicted_tokens() -> None:
    model = build(*PAPER)
    assert (model.clusters.counts, model.kept, model.predicted, model.ranks) == ((4, 2, 2), 20, 98, 15)
    assert model.input.box == (2, 16, 16) and model.needs_pixels
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(85.1e6, rel=0.01)
    assert (len(model.decoder.blocks), model.query_D.numel()) == (4, 512)


@pytest.mark.parametrize(
    "name, clusters, kept",
    [
        ("token", 1568, 1.0),
        ("spatial_slice", 8, 0.204),
        ("spatial", 32, 0.204),
        ("temporal_column", 196, 0.25),
        ("temporal", 784, 0.5),
        ("spacetime_4x7x7", 8, 0.204),
        ("spacetime_2x7x7", 16, 0.204),
    ],
)
def test_clusters_and_kept_tokens_of_table_6(name: str, clusters: int, kept: float) -> None:
    model = build(*PAPER, f"papers/arvideo/table6_unit_{name}.yaml")
    assert math.prod(model.clusters.counts) == clusters
    # docs/pretraining.md has these shares: the paper's 20 %, rounded up to whole tokens.
    assert model.kept * clusters / 1568 == pytest.approx(kept, abs=5e-4)


@pytest.mark.parametrize("keep, kept", [("25", 25), ("20", 20), ("10", 10), ("05", 5)])
def test_kept_tokens_of_table_8(keep: str, kept: int) -> None:
    assert build(*PAPER, f"papers/arvideo/table8_keep_{keep}.yaml").kept == kept


def test_decoders_of_tables_9_and_10() -> None:
    assert build(*PAPER, "papers/arvideo/table9_self_and_cross.yaml").decoder.blocks[0].self_attention is not None
    assert build(*PAPER, "papers/arvideo/table9_cross_only.yaml").decoder.blocks[0].self_attention is None
    assert build(*PAPER, "papers/arvideo/table10_width_768.yaml").query_D.numel() == 768
    assert len(build(*PAPER, "papers/arvideo/table10_depth_8.yaml").decoder.blocks) == 8


def test_all_sizes_accept_the_default_caches_of_tokenize() -> None:
    codes = CodeSpec(shape=(8, 8, 8), vocab_size=1000, codes_per_place=4, levels=((8, 5, 5, 5),) * 4)
    names = ["papers/arvideo/vit_s.yaml", "base/arvideo.yaml", "papers/arvideo/vit_l.yaml"]
    models = [build(name, codes=codes) for name in names]
    millions = [sum(p.numel() for p in model.encoder.parameters()) / 1e6 for model in models]
    # Blocks of arXiv 2010.11929, table 1.
    assert millions == pytest.approx([21.3, 85.1, 302.3], rel=0.01)


@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
def test_control_and_causal_twin_predict_the_same_1170_tokens(training: bool) -> None:
    flags = [flag for name in PAPER for flag in ("--config", str(CONFIGS / name))]
    small = [f"--objective.{part}{name}={n}" for part in ("", "decoder_") for name, n in SIZES.items()]
    drawn = []
    for name in ("control_no_causal_mask", "control_dropped_only"):
        path = CONFIGS / "papers" / "arvideo" / f"{name}.yaml"
        model = parse(Pretrain, [*flags, "--config", str(path), *small])[0].objective(CODES)
        assert isinstance(model, ARVideo) and model.causal == (name == "control_dropped_only")
        model.train(training)
        drawn.append(model._draw(torch.arange(3), *model._counts()))
    (seen, predicted), (seen_causally, predicted_causally) = drawn
    assert torch.equal(seen, seen_causally) and torch.equal(predicted, predicted_causally)
    assert (seen.shape[1], predicted.shape[1]) == (300, 1170)
    assert all(not set(a) & set(b) for a, b in zip(seen.tolist(), predicted.tolist(), strict=True))


SIZES = {"width": 32, "depth": 1, "heads": 1}


# --- recipes


@pytest.mark.parametrize(
    "name, betas, floor, decay",
    [
        ("arvideo", (0.9, 0.95), 1 / 15, "cosine"),
        ("videomae", (0.9, 0.95), 1 / 15, "cosine"),
        ("mam2", (0.9, 0.95), 1 / 15, "cosine"),
        ("vimpac", (0.9, 0.98), 0, "linear"),
    ],
)
def test_optimizer_and_schedule_of_the_papers(name: str, betas: tuple[float, float], floor: float, decay: str) -> None:
    config, _ = parse(Pretrain, ["--config", str(CONFIGS / "papers" / f"{name}.yaml")])
    assert (config.betas, config.decay) == (betas, decay)
    assert config.lr_floor == pytest.approx(floor, rel=1e-5)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("papers/arvideo/table*.yaml")), ids=lambda p: p.stem)
def test_tables_of_arvideo_have_200_epochs_of_their_videos(path: Path) -> None:
    flags = [flag for name in (*PAPER, path) for flag in ("--config", str(CONFIGS / name))]
    config, _ = parse(Pretrain, flags)
    epoch = 168_913 / config.batch_size
    assert (config.steps / epoch, config.warmup / epoch) == pytest.approx((200, 40), rel=1e-3)


def test_arvideo_and_videomae_have_equal_positions_and_schedules() -> None:
    models = [any_objective(f"base/{name}.yaml", f"papers/{name}.yaml") for name in ("arvideo", "videomae")]
    assert [(model.positions.flat, model.positions.rope) for model in models] == [(True, False)] * 2
    first, second = (
        parse(Pretrain, ["--config", str(CONFIGS / "papers" / f"{name}.yaml")])[0] for name in ("arvideo", "videomae")
    )
    for setting in (
        "steps",
        "warmup",
        "batch_size",
        "lr",
        "lr_floor",
        "betas",
        "decay",
        "weight_decay",
        "clip_gradient",
    ):
        assert getattr(first, setting) == getattr(second, setting)


def test_clips_of_the_papers() -> None:
    clips = {
        name: parse(Tokenize, ["--videos", "v", "--config", str(CONFIGS / "papers" / "clips" / f"{name}.yaml")])[0].clip
        for name in ("videomae", "vimpac")
    }
    videomae, vimpac = clips["videomae"], clips["vimpac"]
    assert (videomae.frames, videomae.stride, videomae.size, videomae.flip) == (16, 4, 224, False)
    assert videomae.scales == (1, 0.875, 0.75, 0.66)
    assert (vimpac.frames, vimpac.fps, vimpac.size, vimpac.views, vimpac.flip) == (5, 2, 128, 12, True)
    # The short side has 128 or 160 pixels.
    assert vimpac.scales is not None and [round(128 / scale) for scale in vimpac.scales] == [128, 160]


# --- all objectives

OBJECTIVES = ["arvideo", "videomae", "vimpac", "mam2"]


def any_objective(*names: str, codes: CodeSpec = CODES) -> Objective:
    config, _ = parse(Pretrain, [flag for name in names for flag in ("--config", str(CONFIGS / name))])
    with torch.device("meta"):
        return config.objective(codes)


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_presets_of_a_size_have_the_same_trunk(size: str) -> None:
    codes = CodeSpec(shape=(8, 8, 8), vocab_size=1000, levels=((8, 5, 5, 5),), clip=(16, 64, 64))
    models = {path.stem: any_objective(f"{size}/{path.name}", codes=codes) for path in (CONFIGS / size).glob("*.yaml")}
    assert {name: type(model).__name__.lower() for name, model in models.items()} == {
        **{name: name for name in OBJECTIVES},
        "arvideo_pixels": "arvideo",
    }
    assert len({millions(model.encoder) for model in models.values()}) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_papers_recipe_works_on_top_of_the_base(name: str) -> None:
    model = any_objective(f"base/{name}.yaml", f"papers/{name}.yaml")
    assert type(model).__name__.lower() == name
    # Blocks of ViT-B, arXiv 2010.11929, table 1.
    assert millions(model.encoder) == pytest.approx(85.1, rel=0.01)


def test_videomae_base_has_the_public_models_parameters() -> None:
    assert millions(any_objective("base/videomae.yaml", "papers/videomae.yaml")) == pytest.approx(94.2, rel=0.005)


def test_vimpac_of_the_small_size_has_the_parameters_of_its_joint_attention() -> None:
    """The paper's ablation of layouts has 23.1 M parameters: 6 layers of width 512, 8,192 codes, no contrast head."""
    codes = CodeSpec(shape=(5, 16, 16), vocab_size=8192)
    with torch.device("meta"):
        model = VIMPAC(codes, width=512, depth=6, heads=8, contrast=0.0, code_input="rows", rope=False)
    assert millions(model) == pytest.approx(23.1, rel=0.03)


@pytest.mark.parametrize(
    ("name", "sees", "predicts"), [("pixels_to_codes", "pixels", "codes"), ("codes_to_pixels", "codes", "pixels")]
)
def test_contents_of_input_and_target(name: str, sees: str, predicts: str) -> None:
    codes = CodeSpec(shape=(8, 8, 8), vocab_size=1000, codes_per_place=4, levels=((8, 5, 5, 5),) * 4, clip=(16, 64, 64))
    model, tiny = build(f"contents/{name}.yaml", codes=codes), build("tiny/arvideo.yaml", codes=codes)
    assert (model.input.content, model.predicts.content, model.needs_pixels) == (sees, predicts, True)
    assert (model.width, len(model.encoder.blocks)) == (tiny.width, len(tiny.encoder.blocks))
