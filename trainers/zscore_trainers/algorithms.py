"""The algorithms by name: what each learns from, in which layout, with which settings, and how it is put together.

direct       sft, risd            distributions at the probes of the serving layout
reasoning    rewarddance          given reasonings
grpo, gdso, opd      the policy's own reasonings (rollouts)
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from zscore.checkpoint import read_checkpoint
from zscore.engines.generate import GenerateConfig, open_generator
from zscore.errors import UsageError
from zscore.reasoning import finder
from zscore_trainers.data import Order
from zscore_trainers.gdso import Gdso, GdsoConfig
from zscore_trainers.grpo import Grpo, GrpoConfig
from zscore_trainers.opd import Opd, OpdConfig, check_teacher
from zscore_trainers.pairs import make_pairs
from zscore_trainers.reference import Reference
from zscore_trainers.rewarddance import RewardDance, RewardDanceConfig
from zscore_trainers.risd import Risd, RisdConfig
from zscore_trainers.rollouts import AT_A_TIME, Rollouts, Sampling
from zscore_trainers.sft import Sft
from zscore_trainers.told import ToldTable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zscore.rubrics.rubric import Rubric
    from zscore_trainers.data import Collator
    from zscore_trainers.engine import Algorithm
    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.targets import Kind, Targets

    AlgorithmConfig = RisdConfig | RewardDanceConfig | GrpoConfig | OpdConfig

PAIRS_A_PROMPT = 6
"""Most pairs of one prompt and dimension: all of four candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What an algorithm may be put together from."""

    config: Any
    """Of the algorithm's own class."""
    collator: Collator
    rubric: Rubric
    data: Targets | ToldTable
    model: Path
    """Checkpoint that the policy starts from."""
    load: Callable[[str | None], ScorePolicy]
    """Loads another policy: of this checkpoint, or the same once more."""
    teacher: str | None = None
    generator: str = "transformers"
    dtype: str = "float32"
    seed: int = 0
    rank: int = 0
    ranks: int = 1

    @property
    def share(self) -> dict[str, int]:
        """Which part of a batch is this process's."""
        return {"rank": self.rank, "ranks": self.ranks}

    def order(self, count: int) -> Order:
        """Over that many things."""
        return Order(count, self.config.batch_size, self.seed)

    def sampling(self) -> Sampling:
        """Rollouts of the policy: this process's share of each batch, by a generator of its own."""
        # vLLM chooses for itself what its kernels can do; transformers follows the trainer.
        dtype = self.dtype if self.generator == "transformers" else "auto"
        config = GenerateConfig(max_tokens=self.config.max_tokens, dtype=dtype, batch_size=AT_A_TIME)
        builder = self.collator.builder
        generator = open_generator(self.generator, self.model, self.rubric, builder, config)
        rollouts = Rollouts(generator, finder(self.rubric, builder.decode, builder.level_ids))
        values = self.rubric.values
        return Sampling(collator=self.collator, rollouts=rollouts, values=values, seed=self.seed, **self.share)


def _direct(make: type[Risd], setup: Setup) -> Algorithm:
    order = setup.order(len(setup.collator.train.samples))
    return make(setup.config, order, setup.collator, **setup.share)


def _rewarddance(setup: Setup) -> Algorithm:
    assert isinstance(setup.data, ToldTable)
    told = setup.data.outputs(setup.collator)
    return RewardDance(setup.config, setup.order(len(told)), setup.collator, told, **setup.share)


def _grpo(setup: Setup) -> Algorithm:
    train = setup.collator.train
    try:
        pairs = make_pairs(train.samples, train.targets_NDK @ setup.rubric.values, most=PAIRS_A_PROMPT, seed=setup.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    config = setup.config
    reference = Reference(setup.load(None), config.reference_every) if config.beta else None
    make = Gdso if isinstance(config, GdsoConfig) else Grpo
    return make(config, setup.order(len(pairs)), pairs, setup.sampling(), reference)


def _opd(setup: Setup) -> Algorithm:
    assert setup.teacher is not None
    check_teacher(read_checkpoint(setup.teacher), read_checkpoint(str(setup.model)), setup.rubric)
    dimensions = len(setup.rubric.names)
    order = setup.order(dimensions * len(setup.collator.train.samples))
    return Opd(setup.config, order, dimensions, setup.sampling(), setup.load(setup.teacher))


@dataclass(frozen=True, slots=True)
class Choice:
    """One algorithm."""

    config: type[AlgorithmConfig]
    make: Callable[[Setup], Algorithm]
    reasons: bool
    """Whether it learns in the reasoning layout; else in the serving layout of the recipe."""
    data: Kind | Literal["told"]
    """What --data is: a table of `zscore_trainers.targets`, or given reasonings (`zscore_trainers.told`)."""
    writes: bool = False
    """Whether it learns from rollouts."""


ALGORITHMS: dict[str, Choice] = {
    "sft": Choice(RisdConfig, partial(_direct, Sft), reasons=False, data="labels"),
    "risd": Choice(RisdConfig, partial(_direct, Risd), reasons=False, data="scores"),
    "rewarddance": Choice(RewardDanceConfig, _rewarddance, reasons=True, data="told"),
    "grpo": Choice(GrpoConfig, _grpo, reasons=True, data="labels", writes=True),
    "gdso": Choice(GdsoConfig, _grpo, reasons=True, data="labels", writes=True),
    "opd": Choice(OpdConfig, _opd, reasons=True, data="either", writes=True),
}


def chosen(name: str) -> Choice:
    """An algorithm by its name.

    Raises:
        UsageError: there is none; names all.
    """
    if name not in ALGORITHMS:
        near = get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(ALGORITHMS)}"
        raise UsageError(f"no algorithm is called '{name}': {hint}")
    return ALGORITHMS[name]
