"""Every equation against loops over plain floats that were written from the paper, and against finite differences."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from zscore_trainers import losses

VALUES = torch.arange(1.0, 5.01, 0.5, dtype=torch.float64)
RANGE = 4.0
CLOSE = {"rtol": 0, "atol": 1e-10}


def sampled(seed, pairs, group, *, invalid=0.0):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(pairs, 2, group, len(VALUES), dtype=torch.float64)
    labels = VALUES[torch.randint(len(VALUES), (pairs, 2))]
    valid = torch.rand(pairs, 2, group) >= invalid
    logits[~valid] = float("nan")
    return logits, labels, valid


shapes = given(seed=st.integers(0, 10**6), pairs=st.integers(1, 4), group=st.integers(1, 5))
with_invalid = given(
    seed=st.integers(0, 10**6), pairs=st.integers(1, 4), group=st.integers(1, 5), invalid=st.floats(0, 1)
)


def softmax(row):
    most = max(row)
    powers = [math.exp(x - most) for x in row]
    return [power / sum(powers) for power in powers]


def mean_of(row):
    return sum(value * q for value, q in zip(VALUES.tolist(), softmax(row), strict=True))


@shapes
@settings(deadline=None, max_examples=25)
def test_distribution_and_expectation(seed, pairs, group):
    logits, _, _ = sampled(seed, pairs, group)
    torch.testing.assert_close(
        losses.score_distribution(logits).reshape(-1, 9),
        torch.tensor([softmax(row) for row in logits.reshape(-1, 9).tolist()], dtype=torch.float64),
        **CLOSE,
    )
    wanted = torch.tensor([mean_of(row) for row in logits.reshape(-1, 9).tolist()], dtype=torch.float64)
    torch.testing.assert_close(losses.expected_score(logits, VALUES).flatten(), wanted, **CLOSE)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
@settings(deadline=None)
def test_advantages(rewards):
    found = losses.group_advantages(torch.tensor([rewards], dtype=torch.float64), epsilon=1e-4)[0]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    for value, reward in zip(found.tolist(), rewards, strict=True):
        assert value == pytest.approx((reward - mean) / (std + 1e-4), abs=1e-9)


def test_equal_rewards_have_no_advantage():
    assert losses.group_advantages(torch.full((2, 8), 0.7)).abs().max() < 1e-3


def loops(logits, labels, valid):
    """Eqs. 7, 8, 10 and 11 for one pair, from nested lists."""
    mu = [
        [mean_of(row) if ok else None for row, ok in zip(side, oks, strict=True)]
        for side, oks in zip(logits, valid, strict=True)
    ]
    pointwise, pairwise, cross, gaps = [[], []], [[], []], [], []
    for j in (0, 1):
        gap = labels[j] - labels[1 - j]
        for i, ok in enumerate(valid[j]):
            if not ok:
                pointwise[j].append(0.0)
                pairwise[j].append(-1.0)
                continue
            pointwise[j].append(1 - abs(mu[j][i] - labels[j]) / RANGE)
            q = softmax(logits[j][i])
            cross.append(-math.log(q[VALUES.tolist().index(labels[j])]))
            errors = [abs(mu[j][i] - other - gap) for other in mu[1 - j] if other is not None]
            gaps += [error / RANGE for error in errors]
            pairwise[j].append(1 - sum(errors) / len(errors) / RANGE if errors else 1.0)
    return pointwise, pairwise, cross, gaps


@with_invalid
@settings(deadline=None, max_examples=50)
def test_rewards_and_direct_losses(seed, pairs, group, invalid):
    logits, labels, valid = sampled(seed, pairs, group, invalid=invalid)
    mu = losses.expected_score(logits, VALUES)
    found = [loops(*one) for one in zip(logits.tolist(), labels.tolist(), valid.tolist(), strict=True)]
    pointwise = losses.pointwise_reward(mu, labels, RANGE, valid)
    pairwise = losses.pairwise_reward(mu, labels, RANGE, valid)
    torch.testing.assert_close(pointwise, torch.tensor([one[0] for one in found], dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(pairwise, torch.tensor([one[1] for one in found], dtype=torch.float64), **CLOSE)
    targets = losses.label_targets(labels, VALUES)
    for value, lists in (
        (losses.pointwise_loss(logits, targets, valid), [one[2] for one in found if one[2]]),
        (losses.pairwise_loss(mu, labels, RANGE, valid), [one[3] for one in found if one[3]]),
    ):
        wanted = statistics.fmean(statistics.fmean(one) for one in lists) if lists else 0.0
        assert float(value) == pytest.approx(wanted, abs=1e-10)
    total = losses.gdso_reward(pointwise, pairwise, lambda_pt=0.3, lambda_pw=0.7)
    torch.testing.assert_close(total, 0.3 * pointwise + 0.7 * pairwise)


@shapes
@settings(deadline=None, max_examples=20)
def test_no_mask_is_a_mask_of_ones(seed, pairs, group):
    logits, labels, _ = sampled(seed, pairs, group)
    mu, ones = losses.expected_score(logits, VALUES), torch.ones(pairs, 2, group, dtype=torch.bool)
    targets = losses.label_targets(labels, VALUES)
    for function, arguments in (
        (losses.pointwise_reward, (mu, labels, RANGE)),
        (losses.pairwise_reward, (mu, labels, RANGE)),
        (losses.pointwise_loss, (logits, targets)),
        (losses.pairwise_loss, (mu, labels, RANGE)),
    ):
        torch.testing.assert_close(function(*arguments), function(*arguments, ones), **CLOSE)


def test_an_invalid_output_gets_the_lowest_reward_and_no_gradient():
    logits, labels, valid = sampled(0, 3, 4, invalid=0.5)
    assert 0 < valid.sum() < valid.numel()
    logits.requires_grad_()
    mu = losses.expected_score(logits, VALUES)
    pointwise, pairwise = (f(mu, labels, RANGE, valid) for f in (losses.pointwise_reward, losses.pairwise_reward))
    assert pointwise[~valid].max() <= pointwise[valid].min()
    assert pairwise[~valid].max() <= pairwise[valid].min()
    targets = losses.label_targets(labels, VALUES)
    safe = torch.where(valid.unsqueeze(-1), logits, 0)
    (
        losses.pointwise_loss(safe, targets, valid)
        + losses.pairwise_loss(losses.expected_score(safe, VALUES), labels, RANGE, valid)
    ).backward()
    assert logits.grad[~valid].nan_to_num(0).abs().max() == 0
    assert logits.grad[valid].abs().min() > 0


def test_direct_losses_by_finite_differences():
    logits, labels, _ = sampled(3, 2, 3)
    valid = torch.tensor([[[1, 1, 0], [1, 0, 1]], [[1, 1, 1], [0, 1, 1]]], dtype=torch.bool)
    targets = losses.label_targets(labels, VALUES)
    logits.requires_grad_()
    assert gradcheck(lambda z: losses.pointwise_loss(z, targets, valid), logits)
    assert gradcheck(lambda z: losses.pairwise_loss(losses.expected_score(z, VALUES), labels, RANGE, valid), logits)


def test_bradley_terry():
    winner, loser = torch.tensor([3.0, 1.0]).double(), torch.tensor([1.0, 4.0]).double()
    wanted = statistics.fmean(-math.log(1 / (1 + math.exp(-gap))) for gap in (2.0, -3.0))
    assert float(losses.bradley_terry_loss(winner, loser)) == pytest.approx(wanted, abs=1e-12)


@given(st.floats(1, 5))
@settings(deadline=None)
def test_targets_keep_the_label_as_their_mean(label):
    for values in (VALUES, torch.arange(1.0, 6.0, dtype=torch.float64)):
        target = losses.label_targets(torch.tensor([label], dtype=torch.float64), values)[0]
        assert float(target.sum()) == pytest.approx(1)
        assert float(target @ values) == pytest.approx(label)
        assert (target > 0).sum() <= 2
        assert target.min() >= 0


def test_targets_on_a_level_are_one_hot():
    assert torch.equal(losses.label_targets(VALUES, VALUES), torch.eye(9, dtype=torch.float64))


@pytest.mark.parametrize("label", [0.99, 5.01, float("nan")])
def test_labels_off_the_scale_are_refused(label):
    with pytest.raises(ValueError, match="outside 1 to 5"):
        losses.label_targets(torch.tensor([3.0, label]), VALUES)


def test_policy_gradient_and_its_masks():
    torch.manual_seed(0)
    logprob = -torch.rand(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    advantage, weight = torch.randn(3, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    rows = [sum(float(advantage[n] * weight[n, t] * logprob[n, t]) for t in range(5) if mask[n, t]) for n in range(3)]
    found = losses.policy_gradient_loss(logprob, advantage, mask, weight)
    assert float(found) == pytest.approx(-sum(rows) / 3, abs=1e-12)
    a_token = advantage.unsqueeze(-1).expand(3, 5)
    assert losses.policy_gradient_loss(logprob, a_token, mask, weight) == found
    logprob[~mask] = float("nan")  # what padding holds must not matter
    assert losses.policy_gradient_loss(logprob, advantage, mask, weight) == found


def test_importance_weights_are_cut_off_and_constant():
    live = torch.tensor([0.0, -1.0, -2.0], requires_grad=True)
    weight = losses.importance_weights(live, torch.tensor([-3.0, -1.0, -1.0]), most=2.0)
    torch.testing.assert_close(weight, torch.tensor([2.0, 1.0, math.exp(-1)]))
    assert not weight.requires_grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_by_enumeration(estimator):
    """The expectation over all tokens: k1 and k3 give the KL itself; k3 is never negative."""
    torch.manual_seed(1)
    policy, reference = (torch.randn(7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = float((policy.exp() * (policy - reference)).sum())
    mask = torch.ones(7, 1, dtype=torch.bool)
    singles = [
        losses.kl_penalty(policy[n : n + 1, None], reference[n : n + 1, None], mask[:1], estimator) for n in range(7)
    ]
    expected = float(sum(p * value for p, value in zip(policy.exp(), singles, strict=True)))
    if estimator == "k2":
        half_squares = float((policy.exp() * (policy - reference) ** 2 / 2).sum())
        assert expected == pytest.approx(half_squares, abs=1e-12)
    else:
        assert expected == pytest.approx(exact, abs=1e-12)
    if estimator == "k3":
        assert min(singles) >= 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_of_kl_estimators_by_enumeration(estimator):
    """Over the policy's own samples: none, that of KL(policy || reference), that of KL(reference || policy)."""
    torch.manual_seed(1)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    forward, backward = (policy.exp() * (policy - reference)).sum(), (reference.exp() * (reference - policy)).sum()
    exact = {"k1": 0 * forward, "k2": forward, "k3": backward}[estimator]
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    live, fixed, one = policy[:, None], reference[:, None], torch.ones(1, 1, dtype=torch.bool)
    singles = [losses.kl_penalty(live[n : n + 1], fixed[n : n + 1], one, estimator) for n in range(7)]
    surrogate = sum(p * single for p, single in zip(policy.detach().exp(), singles, strict=True))
    (found,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_policy_gradient_is_unbiased():
    """By enumeration: outputs of 3 tokens over 4 words; the mean of the surrogate's gradient over all outputs, by
    their probability, is the gradient of the expected reward."""
    torch.manual_seed(2)
    table = torch.randn(1 + 4 + 16, 4, dtype=torch.float64, requires_grad=True)  # a row of logits a prefix
    outputs = torch.cartesian_prod(*[torch.arange(4)] * 3)
    reward = torch.randn(64, dtype=torch.float64)
    prefix = torch.stack([torch.zeros(64).long(), 1 + outputs[:, 0], 5 + 4 * outputs[:, 0] + outputs[:, 1]], 1)
    logprob = table.log_softmax(-1)[prefix, outputs]
    probability = logprob.sum(-1).exp()
    (wanted,) = torch.autograd.grad((probability * reward).sum(), table, retain_graph=True)
    ones = torch.ones(1, 3, dtype=torch.bool)
    surrogate = sum(
        float(probability[n].detach()) * losses.policy_gradient_loss(logprob[n : n + 1], reward[n : n + 1], ones)
        for n in range(64)
    )
    (found,) = torch.autograd.grad(surrogate, table)
    torch.testing.assert_close(-found, wanted, **CLOSE)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_risd_is_the_kl_divergence(seed):
    torch.manual_seed(seed)
    teacher = (4 * torch.randn(5, 9, dtype=torch.float64)).softmax(-1)
    teacher[0] = torch.eye(9, dtype=torch.float64)[3]  # a teacher that is certain: 0 log 0 is 0
    logits = torch.randn(5, 9, dtype=torch.float64)
    wanted = statistics.fmean(
        sum(t * math.log(t / s) for t, s in zip(row, softmax(other), strict=True) if t)
        for row, other in zip(teacher.tolist(), logits.tolist(), strict=True)
    )
    assert float(losses.risd_loss(teacher, logits)) == pytest.approx(wanted, abs=1e-10)
    assert float(losses.risd_loss(logits.softmax(-1), logits)) == pytest.approx(0, abs=1e-12)


def test_risd_by_finite_differences_and_through_the_kernel():
    from zscore_kernels import score_head_kl

    torch.manual_seed(3)
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 9, dtype=torch.float64).softmax(-1)
    assert gradcheck(lambda z: losses.risd_loss(teacher, z), (hidden @ weight.T).detach().requires_grad_())
    wanted = losses.risd_loss(teacher, hidden @ weight.T)
    fused = score_head_kl(hidden.float(), weight.float(), teacher.float())
    assert float(fused.detach()) == pytest.approx(float(wanted.detach()), abs=1e-5)
    gradients = zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (wanted, fused)), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_opd():
    torch.manual_seed(4)
    teacher, old, live = (-torch.rand(2, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    advantage = losses.opd_advantages(teacher, old)
    rows = [
        sum(float((teacher[n, t] - old[n, t]) * live[n, t]) for t in range(length)) / length
        for n, length in enumerate((3, 4))
    ]
    live.requires_grad_()
    assert float(losses.opd_loss(live, advantage, mask).detach()) == pytest.approx(-sum(rows) / 2, abs=1e-12)
    on_policy = losses.opd_advantages(teacher, live)
    assert not on_policy.requires_grad
    losses.opd_loss(live, on_policy, mask).backward()
    wanted = -torch.where(mask, (teacher - live.detach()), 0) / mask.sum(-1, keepdim=True) / 2
    torch.testing.assert_close(live.grad, wanted, **CLOSE)


def test_mass_loss():
    assert float(losses.mass_loss(torch.tensor([0.5, 1.0]).log())) == pytest.approx(math.log(2) / 2)
