"""The policy on the real architecture: the demo student's body in transformers."""

import math

import numpy as np
import pytest
import torch

from tests.engines.vllm_prompts import LEVEL_IDS, joint
from zscore.demo.student import untrained_student
from zscore_trainers.policy import PolicyBatch, ScorePolicy
from zscore_trainers.vocabulary import log_partition, token_logprobs


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(untrained_student(), dtype=torch.float32).eval()


def batch_of(prompts, *, longer=0):
    lengths = [len(prompt.token_ids) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths) + longer, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = torch.tensor(prompt.token_ids)
        mask[row, : lengths[row]] = 1
    patches = [torch.from_numpy(prompt.pixels.patches_NCPP).float() / 127.5 - 1 for prompt in prompts]
    pixels = torch.cat([one.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1) for one in patches])
    grid = torch.tensor([(1, *prompt.pixels.grid) for prompt in prompts])
    return PolicyBatch(
        tokens_BT=tokens,
        mask_BT=mask,
        pixels_NX=pixels,
        grid_B3=grid,
        probes_BD=torch.tensor(lengths).unsqueeze(-1) - 2,
    )


PROMPTS = [joint(seed, words=20 + 9 * seed) for seed in range(3)]


def dense(model, batch):
    """The plain way: all logits."""
    logits = model(
        input_ids=batch.tokens_BT,
        attention_mask=batch.mask_BT,
        mm_token_type_ids=(batch.tokens_BT == model.config.image_token_id).int(),
        pixel_values=batch.pixels_NX,
        image_grid_thw=batch.grid_B3,
        use_cache=False,
    ).logits
    logprob = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens_BT[:, 1:, None])[..., 0] * batch.mask_BT[:, 1:]
    rows = torch.arange(len(logits))
    return torch.nn.functional.pad(logprob, (1, 0)), logits[rows, batch.probes_BD[:, 0]][:, list(LEVEL_IDS)]


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_give_what_all_logits_give(model, chunk):
    batch = batch_of(PROMPTS)
    wanted_logprob, wanted_scores = dense(model, batch)
    (wanted_logprob.sum() + wanted_scores.square().sum()).backward()
    wanted_gradient = gradients(model)
    output = ScorePolicy(model, LEVEL_IDS, chunk=chunk)(batch)
    torch.testing.assert_close(output.logprob_BT, wanted_logprob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.score_logits_BDK[:, 0], wanted_scores, rtol=1e-4, atol=1e-4)
    (output.logprob_BT.sum() + output.score_logits_BDK[:, 0].square().sum()).backward()
    found = gradients(model)
    assert (found - wanted_gradient).norm() < 1e-4 * wanted_gradient.norm()


def test_padding_on_the_right_changes_nothing(model):
    policy = ScorePolicy(model, LEVEL_IDS)
    with torch.no_grad():
        alone = [policy(batch_of([prompt])) for prompt in PROMPTS]
        padded = policy(batch_of(PROMPTS, longer=13))
    for row, (one, prompt) in enumerate(zip(alone, PROMPTS, strict=True)):
        length = len(prompt.token_ids)
        torch.testing.assert_close(padded.logprob_BT[row, :length], one.logprob_BT[0], rtol=1e-4, atol=1e-4)
        assert padded.logprob_BT[row, length:].abs().sum() == 0
        torch.testing.assert_close(padded.score_logits_BDK[row], one.score_logits_BDK[0], rtol=1e-4, atol=1e-4)


def test_an_output_without_a_score_has_no_logits(model):
    batch = batch_of(PROMPTS)
    batch.probes_BD[1] = -1
    with torch.no_grad():
        found = ScorePolicy(model, LEVEL_IDS)(batch).score_logits_BDK
    assert found.isnan().all(-1).tolist() == [[False], [True], [False]]


def test_without_logprobs_nothing_of_the_vocabulary_s_size_is_made(model, monkeypatch):
    import zscore_trainers.policy as module

    monkeypatch.setattr(module, "token_logprobs", lambda *_: pytest.fail("logits over the vocabulary"))
    with torch.no_grad():
        output = ScorePolicy(model, LEVEL_IDS)(batch_of(PROMPTS), with_logprobs=False)
    assert output.logprob_BT is None
    assert output.score_logits_BDK.isfinite().all()


def changed(batch, **fields):
    names = ("tokens_BT", "mask_BT", "pixels_NX", "grid_B3", "probes_BD")
    return PolicyBatch(**{name: fields.get(name, getattr(batch, name)) for name in names})


def test_what_the_body_would_get_wrong_is_refused():
    batch = batch_of(PROMPTS)
    packed = batch.mask_BT.clone()
    packed[0, 30:40] = 2
    with pytest.raises(ValueError, match="packed input isn't exact"):
        changed(batch, mask_BT=packed)
    with pytest.raises(ValueError, match="padding must be on the right"):
        changed(batch, mask_BT=batch.mask_BT.flip(1))
    for outside in (-2, int(batch.mask_BT[0].sum())):
        probes = batch.probes_BD.clone()
        probes[0] = outside
        with pytest.raises(ValueError, match="a probe outside"):
            changed(batch, probes_BD=probes)


def test_token_logprobs_in_float64():
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    tokens = torch.randint(50, (11,))
    found = token_logprobs(hidden.requires_grad_(), weight, tokens, chunk=4).detach()
    for row, token in enumerate(tokens.tolist()):
        logits = (weight @ hidden[row].detach()).numpy()
        wanted = logits[token] - (logits.max() + math.log(np.exp(logits - logits.max()).sum()))
        assert float(found[row]) == pytest.approx(wanted, abs=1e-4)
    assert token_logprobs(hidden[:0], weight, tokens[:0]).shape == (0,)


@pytest.mark.parametrize("vocabulary", [3, 4096, 9001])
def test_log_partition_and_its_gradients_in_float64(vocabulary):
    torch.manual_seed(0)
    hidden = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 6, dtype=torch.float64, requires_grad=True)
    wanted = (hidden @ weight.T).logsumexp(-1)
    factor = torch.randn(5, dtype=torch.float64)
    wanted_gradients = torch.autograd.grad((wanted * factor).sum(), (hidden, weight))
    found = log_partition(hidden, weight)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    gradients_found = torch.autograd.grad((found * factor).sum(), (hidden, weight))
    torch.testing.assert_close(gradients_found, wanted_gradients, rtol=1e-5, atol=1e-6)


def test_log_partition_of_bfloat16_is_exact():
    """Rounded logits of 20 and more would be off by 0.06, and a mass of 1 would come out as 1.06."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(5000, 32).bfloat16()
    found = log_partition(hidden.requires_grad_(), weight.requires_grad_())
    exact = (hidden.double() @ weight.double().T).logsumexp(-1)
    assert exact.max() > 20
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    rounded = torch.autograd.grad(found.sum(), (hidden, weight))
    wanted = torch.autograd.grad(exact.sum(), (hidden, weight))
    for mine, right in zip(rounded, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=8e-3, atol=1e-5)  # one rounding, of the result


def test_distillation_and_mass_at_every_probe(model):
    """Against all logits: eq. 15 over the level tokens, and the share of them in the whole vocabulary."""
    prompts = [joint(seed, words=20 + 9 * seed) for seed in range(2)]
    batch = changed(batch_of(prompts), probes_BD=torch.tensor([list(prompt.probes) for prompt in prompts]))
    teacher = torch.rand(2, 4, 9).softmax(-1)
    with torch.no_grad():
        found = ScorePolicy(model, LEVEL_IDS)(batch, with_logprobs=False, teacher_BDK=teacher, with_mass=True)
        logits = model(
            input_ids=batch.tokens_BT,
            attention_mask=batch.mask_BT,
            mm_token_type_ids=(batch.tokens_BT == model.config.image_token_id).int(),
            pixel_values=batch.pixels_NX,
            image_grid_thw=batch.grid_B3,
            use_cache=False,
        ).logits
    at_probes = torch.stack([logits[row, list(prompt.probes)] for row, prompt in enumerate(prompts)])
    levels = at_probes[..., list(LEVEL_IDS)]
    torch.testing.assert_close(found.score_logits_BDK, levels, rtol=1e-4, atol=1e-4)
    divergence = (teacher * (teacher.log() - levels.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(found.divergence, divergence, rtol=1e-4, atol=1e-5)
    mass = at_probes.softmax(-1)[..., list(LEVEL_IDS)].sum(-1).log()
    torch.testing.assert_close(found.log_mass_BD, mass, rtol=1e-4, atol=1e-4)
