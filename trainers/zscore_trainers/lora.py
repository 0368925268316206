"""Low-rank adapters (peft) instead of all weights: W + (alpha / rank) B A, where A and B alone are trained.

Qwen3.5 has two kinds of attention, and adapters on the usual q/k/v/o leave three layers of four alone: so the delta
net's projections are named too, and a name that matches nothing is refused. No dropout: gradients over several passes
need the same numbers twice. What is exported has the adapters merged in, and is served as any other checkpoint.

peft is an extra (`pip install zscore-reward[lora]`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zscore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

MODULES = (
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""Of the gated delta net, of full attention, of the MLP."""


def add_adapters(model: nn.Module, rank: int, alpha: float, modules: Sequence[str] = MODULES) -> None:
    """Put adapters beside every linear layer of these names, in place, and freeze all else.

    B starts at 0, so the model is still the same; A is drawn from torch's generator.

    Raises:
        UsageError: peft isn't there, or a name matches no linear layer.
    """
    if find_spec("peft") is None:
        raise UsageError("lora_rank needs the package peft: pip install 'zscore-reward[lora]'")
    there = {name.rsplit(".", 1)[-1] for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    missing = [name for name in modules if name not in there]
    if missing or not modules:
        raise UsageError(
            f"lora_modules names '{', '.join(missing)}', and the model has no such linear layer: it has"
            f" {', '.join(sorted(there))}"
        )
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, model)


def whole_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """The state dict of a model, which may have adapters, as that of one without."""
    adapted: list[Any] = [one for one in model.modules() if hasattr(one, "lora_A")]
    state = model.state_dict()
    return merged(state, float(adapted[0].scaling["default"])) if adapted else state


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with its adapters multiplied out (in float32), under the names of the model without them.

    Args:
        state: of a model with adapters.
        scale: alpha / rank.
    """
    found = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        base, marked, rest = name.partition(".base_layer.")
        if not marked:
            found[name] = value
            continue
        whole = value
        if rest == "weight":
            down, up = (state[f"{base}.lora_{part}.default.weight"].float() for part in ("A", "B"))
            whole = torch.addmm(value.float(), up, down, alpha=scale).to(value.dtype)
        found[f"{base}.{rest}"] = whole
    return found
