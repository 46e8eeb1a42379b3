"""Two objectives have the same conditioning exactly if their losses predict the same codes from the same information."""

from typing import Any

import pytest

from ar_model.inputs import CodeSpec
from ar_model.objectives import MAM2, VIMPAC, ARVideo, VideoMAE

SMALL: dict[str, Any] = {"width": 12, "depth": 1, "heads": 1}


def conditioning(kind: type, **settings: Any) -> str:
    codes = CodeSpec(shape=(4, 4, 4), vocab_size=64, clip=(8, 32, 32))
    return kind(codes, **SMALL, **settings).conditioning


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ARVideo, {"targets": 0.5}),  # validation predicts all tokens
        (ARVideo, {"ranks": 0.5}),
        (ARVideo, {"decoder_depth": 1}),
        (ARVideo, {"rope": False}),
        (VIMPAC, {"contrast": 0.0}),
        (VideoMAE, {"decoder_depth": 1}),
    ],
)
def test_settings_that_change_only_the_model_keep_it(kind: type, settings: dict[str, Any]) -> None:
    assert conditioning(kind, **settings) == conditioning(kind)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ARVideo, {"keep": 0.5}),
        (ARVideo, {"clusters": (4, 2, 2)}),
        (ARVideo, {"order": "temporal-first"}),
        (ARVideo, {"causal": False}),
        (ARVideo, {"dropped_only": True}),
        (ARVideo, {"input": "pixels"}),
        (ARVideo, {"code_patch": (2, 1, 1), "clusters": (2, 4, 2)}),
        (VideoMAE, {"ratio": 0.5}),
        (VideoMAE, {"mask": "random"}),
        (VideoMAE, {"target": "codes"}),
        (MAM2, {"ratio": 0.5}),
        (VIMPAC, {"blocks": 3}),
        (VIMPAC, {"mask": "random"}),
    ],
)
def test_settings_that_change_what_is_seen_or_predicted_change_it(kind: type, settings: dict[str, Any]) -> None:
    assert conditioning(kind, **settings) != conditioning(kind)


def test_objectives_have_different_ones() -> None:
    assert len({conditioning(kind) for kind in (ARVideo, VideoMAE, MAM2, VIMPAC)}) == 4
    assert conditioning(VideoMAE, target="codes", ratio=0.75) == conditioning(MAM2, ratio=0.75)
