"""The model card of a saved tokenizer says what is true, and leaves nothing to fill in."""

from pathlib import Path

from huggingface_hub import ModelCard

from tokenizer import VQ3D


def test_card_of_a_tokenizer_is_filled_and_true(tmp_path: Path) -> None:
    tokenizer = VQ3D(name="vq3d-causal-2x8x8-fsq240", width=8, depth=1)
    tokenizer.save_pretrained(tmp_path, model_card_kwargs={"training": {"PSNR": "25.00 dB"}})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "arvideo"
    count = sum(parameter.numel() for parameter in tokenizer.parameters())
    for value in ("2x8x8", "240", "yes", f"{count:,}", "25.00 dB"):
        assert f" | {value} |" in card.text
    for untrue in ("pushed to the Hub", "More Information Needed", "[optional]"):
        assert untrue not in card.content
