"""What is refused, before any launch, and how it says so: value, limit, fix."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from zscore_kernels import backend_calls, checks, launch, score_from_logits, score_head, score_head_kl

HIDDEN = torch.zeros(2, 8)
WEIGHT = torch.zeros(3, 8)
VALUES = torch.arange(3.0)
TARGET = torch.full((2, 3), 1 / 3)
LEARNT = torch.ones(3, requires_grad=True)
LOGITS = torch.zeros(2, 20)
IDS = torch.tensor([1, 2, 3])
NORMAL = "must be from 1e-12 to 3.4028234663852886e+38"
META = torch.empty(2, 8, device="meta")

HEAD = [
    (ValueError, "backend='cuda' is unknown; take 'auto', 'triton' or 'reference'", {"backend": "cuda"}),
    (ValueError, f"temperature=nan {NORMAL}; 1.0 leaves the logits as they are", {"temperature": float("nan")}),
    (ValueError, f"temperature=inf {NORMAL}", {"temperature": float("inf")}),
    (ValueError, f"temperature=0 {NORMAL}", {"temperature": 0}),
    (ValueError, f"temperature=-1.5 {NORMAL}", {"temperature": -1.5}),
    (ValueError, f"temperature=1e-46 {NORMAL}", {"temperature": 1e-46}),  # 0 in float32
    (ValueError, f"temperature=1e-40 {NORMAL}", {"temperature": 1e-40}),  # subnormal: some targets flush it to 0
    (ValueError, f"temperature=1.2e-38 {NORMAL}", {"temperature": 1.2e-38}),  # logits of 5 become infinite
    (ValueError, f"temperature=9.9e-13 {NORMAL}", {"temperature": 9.9e-13}),
    (ValueError, f"temperature=1e+39 {NORMAL}", {"temperature": 1e39}),  # infinity in float32
    (ValueError, f"temperature=inf {NORMAL}", {"temperature": 10**400}),  # no float64 either
    (ValueError, f"temperature=-inf {NORMAL}", {"temperature": -(10**5000)}),  # nor printable
    (TypeError, "temperature is a Tensor; pass a float", {"temperature": torch.tensor(1.0)}),
    (TypeError, "temperature is a bool; pass a float", {"temperature": True}),
    (TypeError, "hidden_BH is a list; pass a tensor", {"hidden_BH": [[1.0]]}),
    (ValueError, "hidden_BH has shape (2, 4, 8); it must have 2 dimensions", {"hidden_BH": torch.zeros(2, 4, 8)}),
    (TypeError, "hidden_BH is torch.float64; cast it to float32, bfloat16 or float16", {"hidden_BH": HIDDEN.double()}),
    (TypeError, "hidden_BH is torch.int64; cast it", {"hidden_BH": HIDDEN.long()}),
    (ValueError, "weight_KH has 7 columns and hidden_BH 8; both must be", {"weight_KH": WEIGHT[:, 1:]}),
    (ValueError, "hidden_BH has 0 columns", {"hidden_BH": HIDDEN[:, :0], "weight_KH": WEIGHT[:, :0]}),
    (ValueError, "hidden_BH has 33553921 columns; H must be at most 33553920",
     {"hidden_BH": HIDDEN[:, :1].expand(2, 33553921), "weight_KH": WEIGHT[:, :1].expand(3, 33553921)}),
    (ValueError, "weight_KH has 1 rows (score classes); K must be from 2 to 64", {"weight_KH": WEIGHT[:1]}),
    (ValueError, "weight_KH has 65 rows (score classes); K must be from 2 to 64", {"weight_KH": torch.zeros(65, 8)}),
    (TypeError, "weight_KH is torch.int8; cast it", {"weight_KH": WEIGHT.to(torch.int8)}),
    (ValueError, "values_K has shape (2,); it must be (K,) = (3,)", {"values_K": VALUES[:2]}),
    (ValueError, "values_K has shape (3, 1); it must be (K,) = (3,)", {"values_K": VALUES[:, None]}),
    (TypeError, "values_K is a list; pass a tensor of shape (3,)", {"values_K": [1, 2, 3]}),
    (TypeError, "values_K is torch.bool; pass the levels' values as float32", {"values_K": VALUES.bool()}),
    (ValueError, "values_K requires grad; the levels' values are constants", {"values_K": LEARNT}),
    (ValueError, "bias_K has shape (2,); it must be (K,) = (3,)", {"bias_K": VALUES[:2]}),
    (TypeError, "bias_K is torch.int64; cast it", {"bias_K": VALUES.long()}),
    (ValueError, "weight_KH is on meta and the input on cpu; move weight_KH there", {"weight_KH": WEIGHT.to("meta")}),
    (ValueError, "values_K is on meta and the input on cpu", {"values_K": VALUES.to("meta")}),
    (ValueError, "bias_K is on meta and the input on cpu", {"bias_K": VALUES.to("meta")}),
]  # fmt: skip
KL = [
    (ValueError, "reduction='batchmean' is unknown; take 'mean', 'sum' or 'none'", {"reduction": "batchmean"}),
    (ValueError, "target_probs_BK has shape (2, 2); it must be (B, K) = (2, 3)", {"target_probs_BK": TARGET[:, 1:]}),
    (TypeError, "target_probs_BK is torch.int64; cast it", {"target_probs_BK": TARGET.long()}),
    (ValueError, "target_probs_BK requires grad; the target is a constant", {"target_probs_BK": TARGET * LEARNT}),
    (ValueError, "target_probs_BK is on meta and the input on cpu", {"target_probs_BK": TARGET.to("meta")}),
    (ValueError, f"temperature=0.0 {NORMAL}", {"temperature": 0.0}),
    (ValueError, f"temperature=1e-46 {NORMAL}", {"temperature": 1e-46}),
]  # fmt: skip
FROM_LOGITS = [
    (TypeError, "token_ids_K is a list; pass an int64 tensor", {"token_ids_K": [1, 2, 3]}),
    (TypeError, "token_ids_K is torch.float32; pass int64", {"token_ids_K": VALUES}),
    (ValueError, "token_ids_K has shape (1, 3); it must be (K,)", {"token_ids_K": IDS[None]}),
    (ValueError, "token_ids_K has 1 rows (score classes)", {"token_ids_K": IDS[:1]}),
    (ValueError, "token_ids_K holds 20; ids must be from 0 to 19 (V = 20)", {"token_ids_K": torch.tensor([1, 20, 3])}),
    (ValueError, "token_ids_K holds -1; ids must be from 0 to 19 (V = 20)", {"token_ids_K": torch.tensor([-1, 2, 3])}),
    (ValueError, "logits_BV has shape (20,); it must have 2 dimensions", {"logits_BV": LOGITS[0]}),
    (ValueError, "values_K has shape (2,); it must be (K,) = (3,)", {"values_K": VALUES[:2]}),
    (ValueError, f"temperature=1e+39 {NORMAL}", {"temperature": 1e39}),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("kind", "text", "wrong"), HEAD)
def test_score_head(kind, text, wrong, backend):
    refuse(
        score_head,
        kind,
        text,
        {"hidden_BH": HIDDEN, "weight_KH": WEIGHT, "values_K": VALUES, "backend": backend} | wrong,
    )


@pytest.mark.parametrize(("kind", "text", "wrong"), KL)
def test_score_head_kl(kind, text, wrong):
    refuse(score_head_kl, kind, text, {"hidden_BH": HIDDEN, "weight_KH": WEIGHT, "target_probs_BK": TARGET} | wrong)


@pytest.mark.parametrize(("kind", "text", "wrong"), FROM_LOGITS)
def test_score_from_logits(kind, text, wrong):
    refuse(score_from_logits, kind, text, {"logits_BV": LOGITS, "token_ids_K": IDS, "values_K": VALUES} | wrong)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("temperature", "wanted"), [(1e-12, 2.0), (3.4028234663852886e38, 1.0), (2, 2.0), (10**38, 1.0)]
)
def test_the_limits_that_the_error_names_are_accepted(temperature, wanted, backend):
    """Logits of ±10⁴, whose softmax is that of their largest or, at huge temperatures, of nothing."""
    hidden_BH, weight_KH = torch.ones(2, 8, requires_grad=True), torch.tensor([-1250.0, 0.0, 1250.0])[:, None]
    weight_KH = weight_KH.repeat(1, 8).requires_grad_()
    head = score_head(hidden_BH, weight_KH, VALUES, temperature=temperature, backend=backend)
    loss = score_head_kl(hidden_BH, weight_KH, TARGET, temperature=temperature, backend=backend)
    assert head.mean_B.tolist() == pytest.approx([wanted] * 2)
    outputs = [*head, loss]
    assert all(output.isfinite().all() for output in outputs)
    gradients = torch.autograd.grad([output.sum() for output in outputs], [hidden_BH, weight_KH])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_widest_weight_fits_the_grid_and_its_elements_an_int32():
    assert checks.MAX_WIDTH == 65_535 * launch.COLS
    assert checks.MAX_CLASSES * checks.MAX_WIDTH < 2**31


def refuse(operation, kind, text, arguments):
    before = backend_calls.copy()
    with pytest.raises(kind, match=re.escape(text)) as caught:
        operation(**arguments)
    assert "\n" not in str(caught.value)
    assert backend_calls == before, "it was refused after a launch"


def test_the_kernels_need_cuda_or_a_cpu():
    weight = WEIGHT.to("meta")
    with pytest.raises(ValueError, match="score_head: backend='triton' can't run on meta"):
        score_head(META, weight, VALUES.to("meta"), backend="triton")


def test_without_triton_a_cpu_works_and_the_kernels_say_what_is_missing(monkeypatch):
    """The package scores; only whoever asks for the kernels hears of triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    launch._compiled.cache_clear()
    launch._interpreted.cache_clear()
    assert score_head(HIDDEN, WEIGHT, VALUES).mean_B.tolist() == [1.0, 1.0]
    text = r"the score head's kernels need triton, which can't be imported \(.*triton.*\); install triton"
    for operation, rest in ((score_head, VALUES), (score_head_kl, TARGET)):
        with pytest.raises(RuntimeError, match=text):
            operation(HIDDEN, WEIGHT, rest, backend="triton")
