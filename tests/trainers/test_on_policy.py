"""GRPO, GDSO and OPD on what a tiny model that reasons really writes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.trainers import world_set
from zscore.checkpoint import read_checkpoint
from zscore.demo.student import untrained_student
from zscore.engines.generate import GenerateConfig, open_generator
from zscore.errors import ModelError, SampleError, UsageError
from zscore.reasoning import finder
from zscore.records import Failure, Status
from zscore_trainers.data import Order
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.gdso import Gdso, GdsoConfig
from zscore_trainers.grpo import Grpo, GrpoConfig
from zscore_trainers.opd import Opd, OpdConfig, check_teacher
from zscore_trainers.pair_rollouts import Sampled
from zscore_trainers.pairs import Pair, make_pairs
from zscore_trainers.reference import Reference
from zscore_trainers.rollouts import Rollouts, Sampling, rollout_seed
from zscore_trainers.sequences import collate, token_logprobs

RUBRIC = world_set.RUBRIC
LIMIT = 72
# Labels that the model doesn't know.
PAIR = Pair(1, 0, 1, (4.0, 2.5))


@pytest.fixture(scope="module")
def model(talker):
    return talker


@pytest.fixture(scope="module")
def sampling(model, tmp_path_factory):
    yield from drawn_for(model, tmp_path_factory.mktemp("world"), prompts=1)


@pytest.fixture(scope="module")
def two_prompts(model, tmp_path_factory):
    """The second isn't one that the model has learned to reason about."""
    yield from drawn_for(model, tmp_path_factory.mktemp("world"), prompts=2)


def drawn_for(model, world, prompts):
    collator = world_set.collator(world_set.world_set(world, prompts), world, model, "reasoning")
    builder = collator.builder
    generator = open_generator(
        "transformers", model, RUBRIC, builder, GenerateConfig(max_tokens=LIMIT, dtype="float32", batch_size=16)
    )
    rollouts = Rollouts(generator, finder(RUBRIC, builder.decode, builder.level_ids))
    yield Sampling(collator=collator, rollouts=rollouts, values=RUBRIC.values, seed=3)
    rollouts.close()


@pytest.fixture
def policy(model):
    return world_set.load(model)


class Replayed(Rollouts):
    """Writes once for each prompt, and the same ever after."""

    def __init__(self, rollouts):
        self._rollouts, self._drawn = rollouts, {}

    def follow(self, policy):
        if not self._drawn:
            self._rollouts.follow(policy)

    def draw(self, prompts, seeds):
        if not self._drawn:
            self._drawn = {self._key(one.prompt): one for one in self._rollouts.draw(prompts, seeds)}
        return [self._drawn[self._key(prompt)] for prompt in prompts]

    @staticmethod
    def _key(prompt):
        return prompt.token_ids, prompt.pixels.patches_NCPP.tobytes()


def gradients(policy) -> torch.Tensor:
    return torch.cat(
        [torch.zeros(one.numel()) if one.grad is None else one.grad.flatten() for one in policy.parameters()]
    )


def learned(algorithm, policy, step=0):
    policy.zero_grad()
    return algorithm.backward(policy, step), gradients(policy)


def gdso(sampling, pairs=(PAIR,), reference=None, **options):
    settings = {"batch_size": len(pairs), "group": 2, "beta": 0.0 if reference is None else 0.1} | options
    return Gdso(GdsoConfig(**settings), Order(len(pairs), len(pairs)), pairs, sampling, reference)


class TestPairs:
    class Sample:
        def __init__(self, group):
            self.group, self.prompt = group, "p"

    def test_every_two_that_differ(self):
        samples = [self.Sample(group) for group in "aaabb"]
        labels_ND = np.array([[1.0, 3], [2, 3], [1, np.nan], [5, 1], [4, 2]])
        pairs = make_pairs(samples, labels_ND, most=10, seed=0)
        assert pairs == [
            Pair(0, 1, 0, (2.0, 1.0)),
            Pair(0, 1, 2, (2.0, 1.0)),
            Pair(0, 3, 4, (5.0, 4.0)),
            Pair(1, 4, 3, (2.0, 1.0)),
        ]

    def test_no_more_than_most_and_the_same_every_time(self):
        samples = [self.Sample("a") for _ in range(9)]
        labels_ND = np.arange(9.0)[:, None]
        few, again = (make_pairs(samples, labels_ND, most=5, seed=1) for _ in range(2))
        assert few == again
        assert len(set(few)) == 5
        assert all(pair.labels[0] > pair.labels[1] for pair in few)

    def test_nothing_to_compare(self):
        with pytest.raises(ValueError, match="at least two candidates"):
            make_pairs([self.Sample("a"), self.Sample("b")], np.array([[1.0], [2.0]]), most=5, seed=0)


class TestRollouts:
    def test_seeds_are_their_own(self):
        seeds = {rollout_seed(*numbers) for numbers in itertools.product(range(3), repeat=4)}
        assert len(seeds) == 81
        assert rollout_seed(1, 23) != rollout_seed(12, 3)

    def test_what_is_written_follows_the_policy(self, sampling, policy):
        """After a step the generator's distributions are those of the new weights."""
        prompts = [found[1] for found in sampling.collator.prompts([0, 1])]
        sampling.rollouts.follow(policy)
        before = sampling.rollouts.draw(prompts, [1, 2])
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.mul_(0.9)
        sampling.rollouts.follow(policy)
        after = sampling.rollouts.draw(prompts, [1, 2])
        assert np.abs(after[0].probs_K - before[0].probs_K).max() > 1e-4
        batch = collate(sampling.collator.pad, [(one.prompt, one.written) for one in after])
        with torch.no_grad():
            mine_BK = policy(batch.policy).score_logits_BDK[:, 0].softmax(-1).numpy()
        np.testing.assert_allclose([one.probs_K for one in after], mine_BK, atol=1e-4)

    def test_the_trainer_reads_what_the_generator_sampled(self, sampling, policy):
        found, _ = learned(gdso(sampling), policy)
        assert found["drift"] < 1e-3
        assert found["score_drift"] < 1e-3
        assert 0.9 < found["mass"] <= 1 + 1e-5
        assert found["valid"] == 1
        assert 5 < found["output_tokens"] < LIMIT


class Refusing:
    """A generator that takes no prompt."""

    max_in_flight = 1

    def submit(self, tag, prompt, seed):
        self.tag = tag

    def step(self):
        return [(self.tag, Failure(Status.PROMPT_TOO_LONG, "9 tokens; the limit is 8"))]


def test_a_prompt_that_cant_be_continued_is_one_line():
    with pytest.raises(SampleError, match=r"^no rollout: 9 tokens; the limit is 8$"):
        Rollouts(Refusing(), None).draw(["prompt"], [0])


class TestGdso:
    def test_gradients_dont_depend_on_the_micro_batch(self, sampling, policy):
        wanted = learned(gdso(sampling, micro_batch=4), policy)[1]
        for size in (1, 3):
            found = learned(gdso(sampling, micro_batch=size), policy)[1]
            assert (found - wanted).norm() < 1e-4 * wanted.norm()

    def test_gradients_dont_depend_on_the_order_in_which_outputs_are_read(self, sampling, policy, monkeypatch):
        """Short ones come first, so that little padding is computed; each keeps its picture, label and reference."""
        reference = Reference(copy.deepcopy(policy), every=5)
        with torch.no_grad():
            reference.frozen.model.get_output_embeddings().weight.mul_(0.99)
        found, wanted = learned(gdso(sampling, reference=reference, micro_batch=1), policy, step=1)
        monkeypatch.setattr("zscore_trainers.pair_rollouts.by_length", lambda drawn: [2, 0, 3, 1])
        other, gradient = learned(gdso(sampling, reference=reference, micro_batch=3), policy, step=1)
        assert found == pytest.approx(other, rel=1e-3)
        assert found["kl"] > 0
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm()

    def test_what_the_direct_losses_add(self, sampling, policy):
        """Gradients are linear in the weights of eq. 14's terms."""
        none = learned(gdso(sampling, alpha_pt=0, alpha_pw=0), policy)[1]
        grpo = Grpo(GrpoConfig(batch_size=1, group=2, beta=0), Order(1, 1), [PAIR], sampling)
        assert (learned(grpo, policy)[1] - none).norm() <= 1e-5 * none.norm()
        point = learned(gdso(sampling, alpha_pt=1, alpha_pw=0), policy)[1] - none
        gap = learned(gdso(sampling, alpha_pt=0, alpha_pw=1), policy)[1] - none
        both = learned(gdso(sampling, alpha_pt=2, alpha_pw=3), policy)[1] - none
        assert (both - 2 * point - 3 * gap).norm() < 1e-3 * both.norm()

    def test_in_the_stable_preset_the_score_token_doesnt_count(self, sampling, policy):
        with torch.no_grad():  # so that outputs, and their rewards, differ
            policy.model.get_output_embeddings().weight.mul_(0.75)
        only_scores = {"alpha_pt": 0.0, "alpha_pw": 0.0}
        stable = learned(gdso(sampling, preset="stable", group=4, **only_scores), policy)[1]
        paper = learned(gdso(sampling, preset="paper", group=4, **only_scores), policy)[1]
        assert (stable - paper).norm() > 1e-3 * paper.norm()

    def test_rewards_from_text_are_levels(self, sampling, policy):
        found, _ = learned(gdso(sampling, reward_from="text", lambda_pw=0.0), policy)
        said = [sampling.collator.train.targets_NDK[side, 1] @ np.array(RUBRIC.values) for side in (0, 1)]
        apart = [abs(one - label) for one, label in zip(said, PAIR.labels, strict=True)]
        assert found["reward"] == pytest.approx(1 - np.mean(apart) / 4, abs=1e-6)

    @pytest.mark.parametrize("preset", ["stable", "paper"])
    def test_rewards_from_text_are_those_of_the_score_token(self, sampling, preset):
        """The gradient is that of the expected reward, which a sum over all nine levels gives, but for its scale."""
        levels = torch.tensor(RUBRIC.values)
        logits_K = torch.linspace(-0.5, 0.5, len(levels))
        outputs = len(levels)
        sampled = Sampled(  # a side with every level once, and one whose scores have no say
            label_PJ=torch.tensor([[4.0, 2.0]]),
            valid_N=torch.ones(2 * outputs, dtype=torch.bool),
            text_N=levels.repeat(2),
            sampled_NT=torch.full((2 * outputs, 1), -1.0),
            output_NT=torch.ones(2 * outputs, 1, dtype=torch.bool),
            score_NT=torch.ones(2 * outputs, 1, dtype=torch.bool),
            reference_NT=None,
            probs_NK=logits_K.softmax(-1).expand(2 * outputs, -1),
            mass_N=torch.ones(2 * outputs),
        )
        options = {"batch_size": 1, "group": outputs, "beta": 0.0, "reward_from": "text", "lambda_pw": 0.0}
        algorithm = Grpo(GrpoConfig(preset=preset, most=math.inf, **options), Order(1, 1), [PAIR], sampling)
        advantage_N = algorithm.advantages(sampled, logits_K.expand(2 * outputs, -1), {})
        advantage_N[outputs:] = 0
        leaf_K = logits_K.clone().requires_grad_()
        # Each level counts as often as it is drawn: by its probability, where it was drawn with the same.
        logprob_NT = leaf_K.log_softmax(-1).repeat(2)[:, None]
        chance_N = logits_K.softmax(-1).repeat(2)
        found = sampled._replace(sampled_NT=logprob_NT.detach())
        algorithm.loss(found, advantage_N * chance_N, logits_K.expand(2 * outputs, -1), logprob_NT, {}).backward()
        wanted_K = logits_K.clone().requires_grad_()
        (-(wanted_K.softmax(-1) * (1 - (levels - 4).abs() / 4)).sum()).backward()
        ratio_K = leaf_K.grad / wanted_K.grad
        torch.testing.assert_close(ratio_K, ratio_K.mean().expand_as(ratio_K))
        assert ratio_K.mean() > 0

    def test_an_output_without_a_score_gets_the_lowest_reward(self, sampling, policy, model):
        builder = sampling.collator.builder
        short = open_generator(
            "transformers", model, RUBRIC, builder, GenerateConfig(max_tokens=2, dtype="float32", batch_size=16)
        )
        cut = Sampling(
            collator=sampling.collator,
            rollouts=Rollouts(short, finder(RUBRIC, builder.decode, builder.level_ids)),
            values=RUBRIC.values,
        )
        found, gradient = learned(gdso(cut), policy)
        assert found["valid"] == found["pointwise"] == found["pairwise"] == 0
        assert found["reward"] == pytest.approx(-1)  # 0 of eq. 7, -1 of eq. 10
        assert gradient.abs().max() < 1e-5  # all alike: no advantage

    def test_pairs_are_learned_by_heart(self, two_prompts, policy, tmp_path):
        """Mean absolute error below 0.05 on eight pairs' labels, which the model doesn't know: two prompts on four
        dimensions, reasonings held fixed.

        (A model of two layers that knows its words by heart forgets them while its scores move; what is under test are
        the direct gradients through real outputs.)
        """
        wanted = ((4.0, 3.0), (3.5, 2.5), (5.0, 1.5), (4.5, 2.0), (2.5, 1.0), (5.0, 4.5), (3.0, 2.0), (4.0, 1.0))
        pairs = [Pair(at % 4, at // 4 * 2, at // 4 * 2 + 1, labels) for at, labels in enumerate(wanted)]
        algorithm = gdso(replace(two_prompts, rollouts=Replayed(two_prompts.rollouts)), pairs, micro_batch=32)
        Engine(policy, algorithm, EngineConfig(steps=60, learning_rate=1e-3, warmup=10), tmp_path).run()
        batch = algorithm.rollouts.sequences(algorithm.rollouts.draw(range(8), 0))
        with torch.no_grad():
            mu_N = policy(batch.policy).score_logits_BDK[:, 0].softmax(-1) @ torch.tensor(RUBRIC.values)
        label_N = torch.tensor([label for pair in pairs for label in pair.labels]).repeat_interleave(2)
        scored_N = batch.policy.probes_BD[:, 0] >= 0
        assert scored_N.view(8, 2, 2).any(-1).all()  # of each picture of each pair
        assert (mu_N - label_N)[scored_N].abs().mean() < 0.05


class Counted(Rollouts):
    """Notes the seeds of every batch that is drawn."""

    def __init__(self, rollouts):
        self._rollouts, self.drawn = rollouts, []

    def follow(self, policy):
        self._rollouts.follow(policy)

    def draw(self, prompts, seeds):
        self.drawn.append(list(seeds))
        return self._rollouts.draw(prompts, seeds)


class TestUpdates:
    """Algorithm 1's K_gdso: a batch of outputs for several steps."""

    def test_outputs_and_advantages_stay_and_the_policy_moves_on(self, sampling, policy):
        counted = replace(sampling, rollouts=Counted(sampling.rollouts))
        algorithm = gdso(counted, updates=2)
        with torch.no_grad():  # so that outputs, and their rewards, differ
            policy.model.get_output_embeddings().weight.mul_(0.75)
        first, gradient = learned(algorithm, policy, 0)
        again, same = learned(algorithm, policy, 1)
        assert (first, len(counted.rollouts.drawn)) == (pytest.approx(again), 1)
        assert (gradient - same).norm() < 1e-4 * gradient.norm()
        advantage_N = algorithm._outputs.advantage_N.clone()
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.mul_(0.9)
        moved, other = learned(algorithm, policy, 1)
        assert moved["drift"] > 10 * first["drift"]
        assert moved["reward"] == first["reward"]
        assert torch.equal(algorithm._outputs.advantage_N, advantage_N)
        assert (other - gradient).norm() > 1e-2 * gradient.norm()
        learned(algorithm, policy, 2)
        assert len(counted.rollouts.drawn) == 2
        plain = replace(sampling, rollouts=Counted(sampling.rollouts))
        learned(gdso(plain), policy, 1)  # the second batch has the seeds that it has without inner steps
        assert counted.rollouts.drawn[1] == plain.rollouts.drawn[0]

    def test_stopped_between_two_updates_it_goes_on_exactly(self, sampling, model, tmp_path):
        def run(out, on_step=None):
            policy = world_set.load(model)
            config = EngineConfig(steps=6, learning_rate=1e-3, warmup=2, save_every=1)
            algorithm = gdso(sampling, reference=Reference(copy.deepcopy(policy), 2), updates=2)
            engine = Engine(policy, algorithm, config, out)
            began = engine.step if engine.resume() else 0
            engine.run(on_step)
            return began, policy.state_dict()

        def stop(step, _):
            if step == 3:
                raise KeyboardInterrupt

        for name in ("whole", "cut"):
            (tmp_path / name).mkdir()
        _, whole = run(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", stop)
        (kept,) = (tmp_path / "cut" / "checkpoints").iterdir()
        assert kept.name == "step-00000002"  # not 3, whose outputs are lost
        _, resumed = run(tmp_path / "cut")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

    def test_there_is_at_least_one(self):
        with pytest.raises(UsageError, match="updates is 0: at least 1"):
            GdsoConfig(updates=0)


class TestLoss:
    """Which tokens count, and how much, on numbers made by hand: a pair, two outputs a side, three tokens each."""

    VALID = torch.tensor([True, True, True, False])
    OUTPUT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    SCORE = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    ADVANTAGE = torch.tensor([1.0, -1.0, 0.5, -0.5])

    def gradient(self, sampling, **options):
        torch.manual_seed(0)
        logprob_NT = (-torch.rand(4, 3)).requires_grad_()
        written_NT = logprob_NT.detach() - torch.tensor([[0.3, -0.2, 0.0], [2.0, 0.1, 0.0], [0, 0, 0], [0, 0, 5.0]])
        sampled = Sampled(
            label_PJ=torch.tensor([[4.0, 2.5]]),
            valid_N=self.VALID,
            text_N=torch.where(self.VALID, 3.0, torch.nan),
            sampled_NT=written_NT,
            output_NT=self.OUTPUT,
            score_NT=self.SCORE,
            reference_NT=None,
            probs_NK=torch.zeros(4, 9),
            mass_N=torch.ones(4),
        )
        config = GrpoConfig(batch_size=1, group=2, beta=0, **options)
        algorithm = Grpo(config, Order(1, 1), [PAIR], sampling)
        algorithm.loss(sampled, self.ADVANTAGE, torch.zeros(4, 9), logprob_NT, {}).backward()
        return logprob_NT.grad, (logprob_NT.detach() - written_NT).exp()

    def test_the_paper_s_preset_counts_every_token_alike(self, sampling):
        found, _ = self.gradient(sampling, preset="paper")
        torch.testing.assert_close(found, -self.ADVANTAGE[:, None] * self.OUTPUT / 4)

    def test_the_stable_one_leaves_scores_out_and_cuts_weights_off(self, sampling):
        found, ratio = self.gradient(sampling, preset="stable", most=1.5)
        assert (ratio > 1.5).sum() == 2
        counted = self.OUTPUT & ~self.SCORE
        torch.testing.assert_close(found, -self.ADVANTAGE[:, None] * ratio.clamp(max=1.5) * counted / 4)


class TestReference:
    def test_is_refreshed_every_m_steps(self, sampling, policy):
        reference = Reference(copy.deepcopy(policy), 2)
        algorithm = gdso(sampling, reference=reference)
        assert learned(algorithm, policy, 0)[0]["kl"] == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.mul_(0.7)
        assert learned(algorithm, policy, 1)[0]["kl"] > 1e-4
        assert learned(algorithm, policy, 2)[0]["kl"] == pytest.approx(0, abs=1e-6)

    def test_is_never_trained(self, sampling, policy):
        reference = Reference(copy.deepcopy(policy), 1)
        learned(gdso(sampling, reference=reference), policy)
        assert all(one.grad is None and not one.requires_grad for one in reference.frozen.parameters())

    def test_is_wanted_where_beta_is(self, sampling):
        with pytest.raises(ValueError, match=r"beta is 0\.1: a reference is wanted"):
            gdso(sampling, beta=0.1)


class Doubting(Rollouts):
    """Says of its tokens that they are less likely than they are."""

    def __init__(self, rollouts, apart):
        self._rollouts, self._apart = rollouts, apart

    def follow(self, policy):
        self._rollouts.follow(policy)

    def draw(self, prompts, seeds):
        return [replace(one, logprob_T=one.logprob_T - self._apart) for one in self._rollouts.draw(prompts, seeds)]


class TestOpd:
    def opd(self, sampling, teacher, **options):
        config = OpdConfig(**({"batch_size": 4} | options))
        return Opd(config, Order(8, config.batch_size), 4, sampling, teacher)

    @pytest.mark.parametrize("against", ["old", "live"])
    def test_a_student_that_is_its_teacher_has_nothing_to_learn(self, sampling, policy, model, against):
        found, gradient = learned(self.opd(sampling, world_set.load(model), against=against), policy)
        assert abs(found["reverse_kl"]) < 1e-4
        assert gradient.norm() < 1e-2
        assert found["valid"] == 1

    @pytest.mark.parametrize(("against", "apart"), [("old", 0.5), ("live", 0.0)])
    def test_whose_probabilities_the_teacher_s_are_compared_with(self, sampling, policy, model, against, apart):
        """A generator that finds each of its tokens less likely than the student does, by half a nat."""
        doubting = replace(sampling, rollouts=Doubting(sampling.rollouts, apart=0.5))
        found, _ = learned(self.opd(doubting, world_set.load(model), against=against), policy)
        assert found["reverse_kl"] == pytest.approx(-apart, abs=1e-3)

    def test_goes_towards_the_teacher(self, sampling, policy, model, tmp_path):
        """What the teacher writes becomes likelier to a student that was made unsure of it."""
        prompts = [found[dimension] for found in sampling.collator.prompts([0, 1]) for dimension in range(4)]
        sampling.rollouts.follow(policy)
        written = sampling.rollouts.draw(prompts, range(8))
        batch = collate(sampling.collator.pad, [(one.prompt, one.written) for one in written])
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.mul_(0.6)
        before = float(token_logprobs(policy, batch, LIMIT).mean())
        algorithm = self.opd(sampling, world_set.load(model), batch_size=8)
        Engine(policy, algorithm, EngineConfig(steps=30, learning_rate=5e-4), tmp_path).run()
        assert float(token_logprobs(policy, batch, LIMIT).mean()) > 0.8 * before

    def test_a_batch_that_ranks_cant_share(self, sampling, model):
        two = Sampling(collator=sampling.collator, rollouts=sampling.rollouts, values=RUBRIC.values, ranks=3)
        with pytest.raises(ValueError, match="a batch of 4 can't be shared by 3 ranks"):
            self.opd(two, world_set.load(model))


class TestTeacher:
    def other(self, tmp_path, file, change):
        """A copy of the student without its weights, with one of its files changed."""
        folder = tmp_path / "teacher"
        shutil.copytree(untrained_student(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found, indent=1))
        return read_checkpoint(str(folder))

    def check(self, teacher):
        check_teacher(teacher, read_checkpoint(str(untrained_student())), RUBRIC)

    @pytest.mark.parametrize("words", [["1", "2"], ["Ġs", "re"]])
    def test_whose_tokens_have_other_numbers(self, tmp_path, words):
        def swap(found):
            vocabulary = found["model"]["vocab"]
            one, two = words
            vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]

        with pytest.raises(ModelError, match=r"opd: token .* is \d+ to the student, \d+ to .*teacher: give --teacher"):
            self.check(self.other(tmp_path, "tokenizer.json", swap))

    def test_who_lacks_a_token(self, tmp_path):
        teacher = self.other(tmp_path, "tokenizer.json", lambda found: found["added_tokens"].pop())
        with pytest.raises(ModelError, match=r"opd: token '<.*>' is \d+ to the student, nothing to"):
            self.check(teacher)

    def test_who_cuts_texts_up_otherwise(self, tmp_path):
        teacher = self.other(tmp_path, "tokenizer.json", lambda found: found["model"].update(merges=[]))
        with pytest.raises(ModelError, match=r"opd: the text 'Naïve: .*' becomes \["):
            self.check(teacher)

    @pytest.mark.parametrize("change", [{"patch_size": 14}, {"image_mean": [0.4, 0.4, 0.4]}])
    def test_who_cuts_pictures_up_otherwise(self, tmp_path, change):
        teacher = self.other(tmp_path, "preprocessor_config.json", lambda found: found.update(change))
        with pytest.raises(ModelError, match="reads pictures with patch, merge, scaling"):
            self.check(teacher)

    def test_who_knows_more_tokens(self, tmp_path):
        def more(found):
            last = found["added_tokens"][-1]
            found["added_tokens"].append(last | {"content": "<|new|>", "id": last["id"] + 1})

        self.check(self.other(tmp_path, "tokenizer.json", more))
