"""What the score head must return, in float64 and by another road than the code under test: dense products, autograd.

Shape suffixes: B rows, H hidden size, K score classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Place = Callable[[Tensor], Tensor]


def head(hidden_BH: Tensor, weight_KH: Tensor, values_K: Tensor, bias_K: Tensor | None, temperature: float):
    z_BK = hidden_BH @ weight_KH.T
    return of_logits((z_BK if bias_K is None else z_BK + bias_K) / temperature, values_K)


def of_logits(z_BK: Tensor, values_K: Tensor) -> tuple[Tensor, ...]:
    probs_BK = z_BK.softmax(1)
    mean_B = probs_BK @ values_K
    var_B = probs_BK @ values_K.square() - mean_B.square()
    return probs_BK, mean_B, var_B, torch.special.entr(probs_BK).sum(1), z_BK


def kl(hidden_BH: Tensor, weight_KH: Tensor, target_BK: Tensor, bias_K: Tensor | None, temperature: float) -> Tensor:
    z_BK = hidden_BH @ weight_KH.T
    z_BK = (z_BK if bias_K is None else z_BK + bias_K) / temperature
    return torch.nn.functional.kl_div(z_BK.log_softmax(1), target_BK, reduction="none").sum(1)


def from_logits(logits_BV: Tensor, token_ids_K: Tensor, values_K: Tensor, temperature: float) -> tuple[Tensor, ...]:
    picked_BK = logits_BV[:, token_ids_K]
    log_mass_B = picked_BK.logsumexp(1) - logits_BV.logsumexp(1)
    return *of_logits(picked_BK / temperature, values_K), log_mass_B


def exact(tensor: Tensor | None) -> Tensor | None:
    """The same numbers in float64 on the CPU, ready for autograd."""
    return None if tensor is None else tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of the inputs for random, seeded gradients of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(output.shape, generator=generator).to(device=output.device, dtype=output.dtype)
        for output in outputs
    ]
    return list(torch.autograd.grad(list(outputs), list(inputs), upstream))


@dataclass(frozen=True)
class Case:
    """Random arguments of the head, reproducible."""

    rows: int = 3
    width: int = 70
    classes: int = 9
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    bias: bool = True
    temperature: float = 1.3
    scale: float = 1.0
    device: str = "cpu"

    def tensors(self, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """hidden_BH, weight_KH, values_K, bias_K."""
        generator = torch.Generator().manual_seed(self.rows + 31 * self.width + 997 * self.classes)

        def random(*shape: int, dtype: torch.dtype) -> Tensor:
            made = torch.randn(shape, generator=generator).to(self.device, dtype)
            return made.requires_grad_(grad)

        hidden_BH = random(self.rows, self.width, dtype=self.dtype)
        weight_KH = random(self.classes, self.width, dtype=self.weight_dtype)
        weight_KH = (weight_KH.detach() * (self.scale / self.width**0.5)).requires_grad_(grad)
        bias_K = random(self.classes, dtype=torch.float32) if self.bias else None
        values_K = torch.linspace(1, 5, self.classes, device=self.device)
        return hidden_BH, weight_KH, values_K, bias_K

    def target(self) -> Tensor:
        """Target probabilities, float32; the first class of every row has none."""
        generator = torch.Generator().manual_seed(self.rows)
        target_BK = torch.rand((self.rows, self.classes), generator=generator)
        target_BK[:, 0] = 0
        return (target_BK / target_BK.sum(1, keepdim=True)).to(self.device)


@dataclass(frozen=True)
class LogitsCase:
    """Random arguments of `score_from_logits`, reproducible."""

    rows: int
    width: int
    classes: int = 5
    dtype: torch.dtype = torch.float32
    temperature: float = 1.3
    mass: bool = False
    ids: tuple[int, ...] | None = None
    device: str = "cpu"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """logits_BV, token_ids_K, values_K."""
        generator = torch.Generator().manual_seed(self.rows + 31 * self.width)
        logits_BV = (torch.randn((self.rows, self.width), generator=generator) * 3).to(self.device, self.dtype)
        ids_K = torch.randperm(self.width, generator=torch.Generator().manual_seed(self.classes))[: self.classes]
        ids_K = ids_K if self.ids is None else torch.tensor(self.ids)
        values_K = torch.linspace(1, 5, ids_K.numel(), device=self.device)
        return logits_BV.requires_grad_(), ids_K.to(self.device), values_K


def close(name: str, found: Tensor, wanted: Tensor, steps: float = 32, dtype: torch.dtype | None = None) -> None:
    """Asserts that `found` is within `steps` roundings of its dtype, at the size of the largest wanted value."""
    assert torch.isfinite(found).all(), f"{name} isn't finite"
    step = torch.finfo(dtype or found.dtype).eps * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
    worst = (found.detach().cpu().double() - wanted).abs().max().item() if wanted.numel() else 0.0
    assert worst <= steps * step, f"{name} is off by {worst:.3g}, {worst / step:.0f} roundings (limit {steps})"


NAMES = ("probs", "mean", "var", "entropy", "logits", "log_mass")


def check(
    found: Sequence[Tensor], wanted: Sequence[Tensor], inputs: Sequence[Tensor | None], exacts: Sequence[Tensor | None]
) -> None:
    """Asserts that outputs and gradients agree with float64."""
    for name, got, want in zip(NAMES, found, wanted, strict=False):
        assert got.dtype == torch.float32
        close(name, got, want.detach())
    leaves = [leaf for leaf in inputs if leaf is not None and leaf.requires_grad]
    if not leaves:
        return
    exact_leaves = [leaf for leaf in exacts if leaf is not None and leaf.requires_grad]
    for name, got, want in zip(
        ("hidden", "weight", "bias"), gradients(found, leaves), gradients(wanted, exact_leaves), strict=False
    ):
        close(f"gradient of {name}", got, want)


def check_head(case: Case, run: Callable[..., Sequence[Tensor]], place: Place | None = None) -> None:
    """Asserts that `run(hidden, weight, values, bias, temperature)` agrees with float64, gradients included.

    `place` lays out each argument: strides, surroundings.
    """
    tensors = case.tensors()
    exacts = [exact(tensor) for tensor in tensors]
    inputs = _placed(tensors, place)
    check(
        run(*inputs, case.temperature), head(*exacts, case.temperature),
        (inputs[0], inputs[1], inputs[3]), (exacts[0], exacts[1], exacts[3]),
    )  # fmt: skip


def check_kl(case: Case, run: Callable[..., Tensor], place: Place | None = None) -> None:
    """Asserts that `run(hidden, weight, target, bias, temperature)` gives the loss of each row and its gradients."""
    hidden_BH, weight_KH, _, bias_K = case.tensors()
    tensors = (hidden_BH, weight_KH, case.target(), bias_K)
    exacts = [exact(tensor) for tensor in tensors]
    inputs = _placed(tensors, place)
    wanted = kl(*exacts, case.temperature)
    found = run(*inputs, case.temperature)
    check((found,), (wanted,), (inputs[0], inputs[1], inputs[3]), (exacts[0], exacts[1], exacts[3]))


def check_logits(case: LogitsCase, run: Callable[..., Sequence[Tensor]], place: Place | None = None) -> None:
    """Asserts that `run(logits, ids, values, temperature, with_mass=…)` agrees with float64, gradients included."""
    tensors = case.tensors()
    inputs = _placed(tensors, place)
    exact_logits_BV = exact(tensors[0])
    wanted = from_logits(exact_logits_BV, tensors[1].cpu(), tensors[2].cpu().double(), case.temperature)
    found = run(*inputs, case.temperature, with_mass=case.mass)
    assert len(found) == len(wanted if case.mass else wanted[:5])
    check(found, wanted if case.mass else wanted[:5], (inputs[0],), (exact_logits_BV,))


def _placed(tensors: Sequence[Tensor | None], place: Place | None) -> list[Tensor | None]:
    return [tensor if tensor is None or place is None else place(tensor) for tensor in tensors]
