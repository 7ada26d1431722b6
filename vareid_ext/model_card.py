"""The model card of a model that is shared: what it is, how it is used, what it was trained on and what it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vareid_ext.methods import METHODS
from vareid_ext.metrics.exclusion import exclusion_note

_METRICS = ("mAP", "rank1", "rank5", "rank10", "mINP")
_ROWS = {"trained": "as trained", "reranked": "k-reciprocal re-ranking"}
_UNKNOWN = "unknown"


def model_card(description: Mapping[str, Any], *, name: str, parameters: int) -> str:
    """README.md of a model's folder, in the Hugging Face Hub's format.

    Args:
        description: what config.json holds.
        name: of the model.
        parameters: their number.
    """
    config, how = description["config"], description["preprocessing"]
    about, data = METHODS[config["method"]["name"]].about, description["training_data"]
    measured = {row: description["metrics"][row] for row in _ROWS if row in description["metrics"]}
    results = [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="person re-identification",
            dataset_type=data["name"],
            dataset_name=data["name"],
            metric_type=metric,
            metric_name=f"{metric}, % ({_ROWS[row]})",
            metric_value=_percent(values[metric]),
        )
        for row, values in measured.items()
        for metric in _METRICS
        if metric in values
    ]
    header = ModelCardData(
        library_name="vareid_ext",
        license=description["license"] or _UNKNOWN,
        pipeline_tag="image-feature-extraction",
        tags=["person-re-identification", config["method"]["name"]],
        model_name=name if results else None,
        eval_results=results or None,
    )
    note = exclusion_note(config["evaluation"].get("exclude"))
    facts = {
        "method": f"{about.title} ({about.paper}); {about.claim}",
        "network": f"{config['model']['backbone']}, {parameters / 1e6:.2f} M parameters with the training heads",
        "images": f"{how['height']} x {how['width']} pixels (height x width), RGB; mean {how['mean']}, "
        f"standard deviation {how['std']} of values in [0, 1]",
        "feature": f"{description['feature_dim']} numbers, brought to length 1: {how['normalize']}"
        + ("; the mirrored image's feature is added" if how["flip"] else ""),
        "needs at test": ", ".join(METHODS[config["method"]["name"]].test_inputs) or "images only",
        **({"evaluation": note} if note else {}),
        "training data": f"{data['name']}, {len(description['identity_names']):,} identities, "
        f"{description['num_viewpoints']} viewpoints",
        "licence of the training data": data["license"] or _UNKNOWN,
        "licence of the weights": description["license"] or _UNKNOWN,
        "training": f"{description['progress']['step']:,} steps; every setting is in config.json",
    }
    return f"""---
{header.to_yaml()}
---

# {name}

A person re-identification model: it turns the image of a person into a feature, and features of one person are close
to each other. Made with vareid_ext {description["version"]}.

```python
import vareid_ext

model = vareid_ext.load("{name}")  # this folder, or hf://owner/name
feature = model.embed(["a.jpg", "b.jpg"])  # float32 [2, {description["feature_dim"]}]
```

{_table(["", ""], [[key, value] for key, value in facts.items()])}

## Results

{_results(measured, data["name"])}
"""


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _results(measured: Mapping[str, Mapping[str, float]], data: str) -> str:
    if not measured:
        return "These weights were not measured."
    rows = [
        [_ROWS[row], *(f"{_percent(values[m]):.2f}" if m in values else "" for m in _METRICS)]
        for row, values in measured.items()
    ]
    return f"On the test images of {data}, in percent:\n\n{_table(['', *_METRICS], rows)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)
