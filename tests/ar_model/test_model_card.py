"""The model card of a saved objective says what is true, and leaves nothing to fill in."""

from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ar_model.objectives import ARVideo, Objective
from tests.helpers.small_objectives import CODES, MODELS, SIZE


@pytest.mark.parametrize("name", ["ARVideo", "VideoMAE", "VIMPAC", "MAM2"])
def test_card_of_an_objective_is_filled_and_true(tmp_path: Path, name: str) -> None:
    arvideo = partial(ARVideo, CODES, **SIZE, clusters=(2, 2, 2), decoder_width=24, decoder_depth=1, decoder_heads=2)
    objective: Objective = {**MODELS, "ARVideo": arvideo}[name]()
    objective.save(tmp_path, {"training steps": "6 of 4 clips"})
    card = ModelCard.load(tmp_path / "README.md")
    count = sum(parameter.numel() for parameter in objective.parameters())
    assert card.data.library_name == "arvideo"
    assert f"# {name}" in card.text
    for fact in (f"| parameters | {count:,} |", "| tokens of a clip |", "| training steps | 6 of 4 clips |"):
        assert fact in card.text
    for untrue in ("pushed to the Hub", "More Information Needed", "[optional]"):
        assert untrue not in card.content
