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
To load this folder and compute the features of clips:

```python
from ar_model import load_objective

objective = load_objective("FOLDER")
layers = objective.features(batch)  # a (B, L, D) tensor for each block
```
"""


def model_card(objective: nn.Module, facts: Mapping[str, object]) -> ModelCard:
    """Return the card with facts of the model and of its training, by name."""
    parameters = {"parameters": f"{sum(parameter.numel() for parameter in objective.parameters()):,}"}
    data = ModelCardData(library_name="arvideo", tags=["video"])
    return ModelCard.from_template(
        data, template_str=_TEMPLATE, name=type(objective).__name__, facts={**parameters, **facts}
    )
