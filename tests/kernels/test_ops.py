"""The kernels as torch operators: schemas, shapes without data, torch.compile, second gradients, autocast."""

from __future__ import annotations

import os
import subprocess
import sys
import typing

import jaxtyping
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zscore_kernels
from tests.kernels.oracle import Case
from zscore_kernels import reference, score_from_logits, score_head, score_head_kl

pytest.importorskip("triton")

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
IDS = torch.tensor([1, 7, 4])


def samples():
    from zscore_kernels import ops

    hidden_BH, weight_KH, values_K, bias_K = Case(rows=2, width=8, classes=3).tensors()
    target_BK = Case(rows=2, classes=3).target()
    grad_BK, grad_3B, mass_3B = torch.ones(2, 3), torch.ones(3, 2), torch.zeros(3, 2)
    return [
        (ops.head, (hidden_BH, weight_KH, values_K, bias_K, 1.0), {}),
        (ops.head_kl, (hidden_BH, weight_KH, target_BK, None, 1.0), {}),
        (ops.from_logits, (hidden_BH, IDS, values_K, 1.0), {"with_mass": True}),
        (ops.from_logits, (hidden_BH, IDS, values_K, 1.0), {"with_mass": False}),
        (ops.score_gradient, (grad_BK, values_K, grad_BK, grad_3B, None), {"temperature": 1.0}),
        (ops.loss_gradient, (grad_BK[:, 0], grad_BK, hidden_BH.detach(), weight_KH.detach(), None), {}),
        (ops.hidden_gradient, (grad_BK, weight_KH.detach(), torch.bfloat16), {}),
        (ops.weight_gradient, (grad_BK, hidden_BH.detach(), torch.float32), {}),
        (ops.from_logits_gradient, (hidden_BH.detach(), IDS, grad_BK, mass_3B, grad_3B[0]), {}),
    ]


@pytest.mark.parametrize("index", range(9))
def test_operators_keep_torch_s_rules(index):
    operator, arguments, options = samples()[index]
    torch.library.opcheck(operator, arguments, options, test_utils=CHECKS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break():
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=2, width=8, classes=3).tensors()
    target_BK = Case(rows=2, classes=3).target()

    def step(hidden_BH, weight_KH, bias_K):
        head = score_head(hidden_BH * 2, weight_KH, values_K, bias_K, backend="triton")
        loss = score_head_kl(hidden_BH, weight_KH, target_BK, bias_K, backend="triton")
        return head.mean_B.sum() + head.entropy_B.sum() + loss

    wanted = step(hidden_BH, weight_KH, bias_K)
    gradients = torch.autograd.grad(wanted, [hidden_BH, weight_KH, bias_K])
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden_BH, weight_KH, bias_K)
    assert torch.equal(found, wanted)
    for one, other in zip(torch.autograd.grad(found, [hidden_BH, weight_KH, bias_K]), gradients, strict=True):
        torch.testing.assert_close(one, other)


class Calls(TorchDispatchMode):
    """Names of the operators that ran, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if not operator.is_view and operator is not torch.ops.aten.detach.default:
            self.names.append(operator.name().split("::")[1].partition(".")[0])
        return operator(*arguments, **(options or {}))


def test_the_backward_of_the_loss_launches_nothing_needless():
    """What kernels/README.md says of it; `weight_gradient` is two kernels."""
    hidden_BH, weight_KH, _, bias_K = Case(rows=2, width=8, classes=3).tensors()
    loss = score_head_kl(hidden_BH, weight_KH, Case(rows=2, classes=3).target(), bias_K, backend="triton")
    with Calls() as calls:
        torch.autograd.grad(loss, [hidden_BH, weight_KH, bias_K])
    assert calls.names == ["ones_like", "div", "loss_gradient", "hidden_gradient", "weight_gradient", "sum"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("operation", ["head", "kl"])
def test_second_gradients_are_refused(operation, leaf, frozen):
    """Beside a first derivative too, as in a gradient penalty; `frozen`: the other two arguments learn nothing."""
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=2, width=8, classes=3).tensors()
    leaves = {"hidden": hidden_BH, "weight": weight_KH, "bias": bias_K}
    for name, tensor in leaves.items():
        tensor.requires_grad_(name == leaf or not frozen)
    if operation == "head":
        output = score_head(hidden_BH, weight_KH, values_K, bias_K, backend="triton").mean_B.sum()
    else:
        output = score_head_kl(hidden_BH, weight_KH, Case(rows=2, classes=3).target(), bias_K, backend="triton")
    (gradient,) = torch.autograd.grad(output, leaves[leaf], create_graph=True)
    with pytest.raises(NotImplementedError, match="the score head has no second derivative"):
        (output + gradient.square().sum()).backward()


@pytest.mark.parametrize("used", ["mean_B", "log_mass_B"])
def test_second_gradients_of_logits_are_refused(used):
    logits_BV, _, values_K, _ = Case(rows=2, width=8, classes=3).tensors()
    head = score_from_logits(logits_BV, IDS, values_K, with_mass=True, backend="triton")
    output = getattr(head, used).sum()
    (gradient,) = torch.autograd.grad(output, logits_BV, create_graph=True)
    with pytest.raises(NotImplementedError, match="the score head has no second derivative"):
        (output + gradient.square().sum()).backward()


def test_reference_refuses_second_gradients_too():
    hidden_BH, weight_KH, values_K, _ = Case().tensors()
    output = score_head(hidden_BH, weight_KH, values_K, backend="reference").mean_B.sum()
    (gradient,) = torch.autograd.grad(output, hidden_BH, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_changes_nothing(backend):
    tensors = Case(rows=2).tensors(grad=False)
    wanted = score_head(*tensors, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = score_head(*tensors, backend=backend)
    assert all(torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(found, wanted, strict=True))


def test_inference_mode():
    with torch.inference_mode():
        tensors = Case(rows=2).tensors(grad=False)
        assert score_head(*tensors, backend="triton").mean_B.shape == (2,)


@pytest.mark.parametrize("module", [zscore_kernels, reference])
def test_annotated_shapes_are_those_of_the_tensors(module):
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=2, width=8, classes=3).tensors(grad=False)
    target_BK = Case(rows=2, classes=3).target()
    calls = [
        (module.score_head, (hidden_BH, weight_KH, values_K, bias_K), {}),
        (module.score_head_kl, (hidden_BH, weight_KH, target_BK, bias_K), {"reduction": "none"}),
        (module.score_from_logits, (hidden_BH, IDS, values_K), {"with_mass": True}),
    ]
    for function, arguments, options in calls:
        names = vars(jaxtyping) | {"Tensor": torch.Tensor, "Reduction": str, "Backend": str}
        hints = typing.get_type_hints(function, localns=names)
        result = function(*arguments, **options)
        pairs = list(zip(arguments, hints.values(), strict=False))
        if isinstance(result, tuple):
            pairs += zip(result, typing.get_type_hints(type(result), localns=names).values(), strict=True)
        else:
            pairs.append((result, hints["return"]))
        with jaxtyping.jaxtyped("context"):  # one size a letter
            assert [isinstance(tensor, hint) for tensor, hint in pairs] == [True] * len(pairs), function.__name__


def test_importing_loads_no_triton_and_its_own_switch_works_too():
    """With TRITON_INTERPRET=1 triton.jit itself interprets; everywhere else in these tests the launcher does."""
    script = (
        "import sys, torch, zscore_kernels as z\n"
        "assert not {'triton', 'jaxtyping'} & set(sys.modules)\n"
        "head = z.score_head(torch.ones(1, 4), torch.zeros(2, 4), torch.tensor([1.0, 3.0]), backend='triton')\n"
        "assert head.mean_B.tolist() == [2.0], head\n"
        "assert z.backend_calls == {('interpreter', 'head_kernel'): 1}, z.backend_calls\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
