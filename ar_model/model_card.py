"""Model card of a saved objective, README.md on the Hugging Face hub."""

from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

Transformer of arvideo, pre-trained on video with the objective {{ name }}.

| | |
|---|---|
{% for fact, value in facts.items() -%}
| {{ fact }} | {{ value }} |
{% endfor %}
To load this folder and compute the features of a video:

```python
from pipelines.inference import load_model

features = load_model("FOLDER").features("video.mp4")
features.tokens  # (layers, tokens, width)
features.pooled  # (layers, width)
```
"""


def model_card(objective: nn.Module, facts: Mapping[str, object]) -> ModelCard:
    """Return the card with facts of the model and of its training, by name."""
    parameters = {"parameters": f"{sum(parameter.numel() for parameter in objective.parameters()):,}"}
    data = ModelCardData(library_name="arvideo", tags=["video"])
    return ModelCard.from_template(
        data, template_str=_TEMPLATE, name=type(objective).__name__, facts={**parameters, **facts}
    )
