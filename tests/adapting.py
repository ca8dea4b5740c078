"""Adapters on the tiny model, really trained, for the tests of what becomes of them."""

import json
from pathlib import Path
from typing import Any

import torch


def logits(model: Any) -> torch.Tensor:
    """Logits (1, 16, V) on fixed token ids, by the plain forward."""
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.arange(3, 19)[None]).logits
    return result


def trained(model: Any, steps: int = 3) -> Any:
    """The model after a few real optimiser steps, so that its weights differ from the start."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(3, 19)[None]
    for _ in range(steps):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def edit_adapter(adapter: Path, **changes: Any) -> None:
    """Change keys of the adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
