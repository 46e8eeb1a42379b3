"""Model cards of saved models, README.md on the Hugging Face hub."""

from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ about }}

| | |
|---|---|
{% for fact, value in facts.items() -%}
| {{ fact }} | {{ value }} |
{% endfor %}
{{ purpose }}:

```python
from pipelines.inference import load_model

{{ usage }}
```
"""
_FEATURES = """features = load_model("FOLDER").features("video.mp4")
features.tokens  # (layers, tokens, width)
features.pooled  # (layers, width)"""
_CLASSES = """load_model("FOLDER").predict("video.mp4")  # {class: probability}"""


def objective_card(objective: nn.Module, facts: Mapping[str, object]) -> ModelCard:
    """Return the card of an objective with facts of the model and of its training, by name."""
    name = type(objective).__name__
    about = f"Transformer of arvideo, pre-trained on video with the objective {name}."
    purpose = "To load this folder and compute the features of a video"
    return _card(objective, facts, name=name, about=about, purpose=purpose, usage=_FEATURES)


def classifier_card(classifier: nn.Module, facts: Mapping[str, object]) -> ModelCard:
    """Return the card of a classifier with facts of the model and of its training, by name."""
    about = "Video classifier of arvideo."
    purpose = "To load this folder and classify a video"
    return _card(classifier, facts, name="Classifier", about=about, purpose=purpose, usage=_CLASSES)


def _card(model: nn.Module, facts: Mapping[str, object], **texts: str) -> ModelCard:
    parameters = {"parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}"}
    data = ModelCardData(library_name="arvideo", tags=["video"])
    # Names of classes may have any characters. A line break or a bar would end a cell of the table.
    cells = {name: " ".join(str(fact).split()).replace("|", "\\|") for name, fact in {**parameters, **facts}.items()}
    return ModelCard.from_template(data, template_str=_TEMPLATE, facts=cells, **texts)
