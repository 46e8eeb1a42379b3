"""Model card of a saved tokenizer, README.md on the Hugging Face hub."""

from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData

from tokenizer.base import VideoTokenizer

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

Video tokenizer of arvideo: it encodes a video clip to a grid of places with discrete codes, and decodes codes to pixels.

| | |
|---|---|
{% for fact, value in facts.items() -%}
| {{ fact }} | {{ value }} |
{% endfor %}
To load this folder, or its id on the hub:

```python
from tokenizer import load_tokenizer

tokenizer = load_tokenizer("FOLDER")
codes_Bthw = tokenizer.encode(pixels_BTHWC)  # uint8, RGB; with several codes per place, a last axis of codes
pixels_BTHWC = tokenizer.decode(codes_Bthw)
```
"""


def model_card(tokenizer: VideoTokenizer, training: Mapping[str, object]) -> ModelCard:
    """Return the card with facts of the model and of its training, by name."""
    t, h, w = tokenizer.stride
    facts = {
        "pixels per place (frames x height x width)": f"{t}x{h}x{w}",
        "codes per place": tokenizer.codes_per_place,
        "codes in the vocabulary": ", ".join(map(str, dict.fromkeys(tokenizer.vocabularies))),
        "causal": "yes" if tokenizer.causal else "no",
        "parameters": f"{sum(parameter.numel() for parameter in tokenizer.parameters()):,}",
        **training,
    }
    data = ModelCardData(library_name="arvideo", tags=["video-tokenizer"])
    return ModelCard.from_template(data, template_str=_TEMPLATE, name=tokenizer.name, facts=facts)
