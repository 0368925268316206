"""The training loop: step, clip, schedule, log, checkpoint, resume. It knows nothing of any algorithm.

    algorithm.backward(policy, step) → gradients   (the only thing an algorithm does to the model)
    engine: average over ranks (FSDP2) → clip → AdamW (or Muon) → cosine schedule → log → checkpoint every N steps

A checkpoint holds model, optimizer and the number of the next step (`torch.distributed.checkpoint`); batches and seeds
follow from the step's number, so a run that was killed goes on as if it hadn't been. Over several ranks each writes its
share of it; the log and what is shown are the first rank's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from zscore.errors import EngineError, UsageError
from zscore.store import sync
from zscore_trainers import parallel
from zscore_trainers.checks import check_least, check_one_of, check_positive, check_share
from zscore_trainers.guard import Guard, HedgingError
from zscore_trainers.optimizers import OptimizerName, make_optimizers, set_rate
from zscore_trainers.run_files import mend_log, no_room, read_log, write_whole
from zscore_trainers.scalars import require, to_tensorboard, to_wandb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.scalars import Write

BEGUN = "settings.json"
"""Written first: what the run depends on, for a resume before there is a checkpoint."""
DONE = "done.json"
"""Written last: a folder without it is a checkpoint that was cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to optimise."""

    steps: int
    optimizer: OptimizerName = "adamw"
    """What updates the matrices; `muon` is for small bodies that learn from scratch."""
    learning_rate: float = 1e-5
    warmup: int = 0
    """Steps until the learning rate is reached."""
    final_share: float = 0.1
    """Of the learning rate, towards which a cosine falls; it would be reached one step after the last."""
    weight_decay: float = 0.01
    """Of matrices; vectors (norms, biases) don't decay."""
    clip: float = 1.0
    """Largest norm of the gradient; inf lets it be."""
    betas: tuple[float, float] = (0.9, 0.95)
    save_every: int = 500
    evaluate_every: int = 0
    """0 never evaluates."""
    patience: int = 4
    """Evaluations that agreement may fall for while training figures improve (`zscore_trainers.guard`); 0 is for ever.

    It stops a run and changes none, so a run may go on with another.
    """
    tensorboard: bool = False
    """Whether the figures are written for TensorBoard too, into OUT/tensorboard."""
    wandb: str = ""
    """Project of Weights & Biases that the figures are logged to as well; empty logs to none."""

    def __post_init__(self) -> None:
        """Refuse numbers that can't be meant.

        Raises:
            UsageError: names the setting.
        """
        check_one_of("optimizer", self.optimizer, get_args(OptimizerName))
        check_least(self, 1, "steps", "save_every")
        check_least(self, 0, "warmup", "weight_decay", "evaluate_every", "patience")
        check_positive(self, "learning_rate")
        check_share(self, "final_share")
        if self.clip != math.inf:
            check_positive(self, "clip")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas is {self.betas}: two numbers, at least 0 and below 1")

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (
            self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        )


class GradientError(EngineError, FloatingPointError):
    """A gradient that is no number: the weights would be lost with it."""


class Algorithm(Protocol):
    """What is learned, and from what.

    It may have a `period`: steps that share what it holds in memory, so that a run can't go on between them.
    """

    def backward(self, policy: ScorePolicy, step: int) -> Mapping[str, float]:
        """Add the gradients of one step to the policy's parameters; returns what is logged."""


class Engine:
    """One training run in one folder.

    Args:
        policy: on its device; its parameters are trained in place.
        algorithm: gives the gradients.
        config: how to optimise.
        out: folder of the checkpoints and the log.
        settings: everything else that the run depends on; a checkpoint made with others is refused.
    """

    def __init__(
        self,
        policy: ScorePolicy,
        algorithm: Algorithm,
        config: EngineConfig,
        out: Path,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._policy = policy
        self._algorithm = algorithm
        self._config = config
        self._out = out
        self._settings = json.loads(json.dumps({"engine": deciding(config), **(settings or {})}))
        self._optimizers = make_optimizers(
            policy, config.optimizer, betas=config.betas, weight_decay=config.weight_decay
        )
        self._guard = Guard(config.patience)
        if parallel.rank() == 0:
            require(tensorboard=config.tensorboard, project=config.wandb)
        self.step = 0
        """Of the next update."""

    def run(
        self,
        on_step: Callable[[int, Mapping[str, float]], None] | None = None,
        evaluate: Callable[[ScorePolicy], Mapping[str, float]] | None = None,
        until: int | None = None,
    ) -> None:
        """Train until the last step, from where the run stands.

        Args:
            on_step: called with the number of steps done and what was logged.
            evaluate: called every `evaluate_every` steps.
            until: an earlier step to stop after, with a checkpoint; the run can go on from there. Where steps belong
                together, those of the last are all taken.

        Raises:
            HedgingError: training figures improve while held-out agreement falls; the last checkpoint is kept.
            GradientError: a gradient isn't finite; the last checkpoint is kept.
        """
        config, first = self._config, parallel.rank() == 0
        last = min(config.steps, math.ceil((until or config.steps) / self._period) * self._period)
        if first:
            write_whole(self._out / BEGUN, self._settings)
            mend_log(self._out / "log.jsonl")
        self._policy.train()
        with (self._out / "log.jsonl" if first else Path(os.devnull)).open("a") as log, contextlib.ExitStack() as stack:
            others = [stack.enter_context(one) for one in self._others()] if first else []
            while self.step < last:
                began = time.perf_counter()
                found = dict(self._update())
                found["seconds"] = time.perf_counter() - began
                if evaluate is not None and config.evaluate_every and self.step % config.evaluate_every == 0:
                    self._policy.eval()
                    found |= evaluate(self._policy)
                    self._policy.train()
                log.write(json.dumps({"step": self.step, **found}) + "\n")
                log.flush()
                for write in others:
                    write(self.step, found)
                if first and on_step is not None:
                    on_step(self.step, found)
                if self._is_due() or self.step == last:
                    self.save()
                complaint = self._guard.see(self.step, found)
                if complaint is not None:
                    raise HedgingError(f"{complaint}; {self._kept()}")

    def _others(self) -> Iterator[contextlib.AbstractContextManager[Write]]:
        """What shows the log's figures beside it."""
        if self._config.tensorboard:
            yield to_tensorboard(self._out, self.step)
        if self._config.wandb:
            yield to_wandb(self._out, self._config.wandb, self._settings)

    def _is_due(self) -> bool:
        """Whether a checkpoint is: where steps belong together, at the end of those that `save_every` falls into."""
        return self.step % self._period == 0 and self.step % self._config.save_every < self._period

    @property
    def _period(self) -> int:
        """Steps that belong together: all that one batch of outputs serves."""
        return int(getattr(self._algorithm, "period", 1))

    def _update(self) -> Mapping[str, float]:
        """One step of the optimizer."""
        rate = self._config.rate(self.step)
        set_rate(self._optimizers, rate)
        found = parallel.averaged(self._algorithm.backward(self._policy, self.step))
        norm = _number(torch.nn.utils.clip_grad_norm_(self._policy.parameters(), self._config.clip))
        if not math.isfinite(norm):
            raise GradientError(
                f"the gradient's norm is {norm} at step {self.step}: lower learning_rate or clip, and start again;"
                f" {self._kept()}"
            )
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {**found, "gradient_norm": norm, "learning_rate": rate}

    def save(self) -> Path:
        """Write a checkpoint; the one before is deleted when this one is whole."""
        folder = self._out / "checkpoints" / f"step-{self.step:08d}"
        if parallel.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        parallel.wait()
        model, optimizer = get_state_dict(self._policy, self._optimizers)
        state = {"model": model, "optimizer": optimizer, **self._reference()}
        with no_room(folder, f"; {self._kept()}"), _unwarned():
            state_dict_saver.save(state, checkpoint_id=folder)
            if parallel.rank() == 0:  # save returns where all ranks have written
                write_whole(folder / DONE, {"step": self.step, "settings": self._settings})
                sync(folder.parent)
        if parallel.rank() == 0:
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        parallel.wait()
        return folder

    def resume(self) -> bool:
        """Load the latest whole checkpoint, if there is one.

        Raises:
            UsageError: it was made with other settings; names them.
        """
        folders = self._whole()
        if not folders:
            begun = self._out / BEGUN
            if begun.exists():
                _check_same(json.loads(begun.read_text()), self._settings, str(self._out))
            return False
        about = json.loads((folders[-1] / DONE).read_text())
        _check_same(about["settings"], self._settings, str(folders[-1]))
        model, optimizer = get_state_dict(self._policy, self._optimizers)
        state = {"model": model, "optimizer": optimizer, **self._reference()}
        with _unwarned():
            state_dict_loader.load(state, checkpoint_id=folders[-1])  # a reference's own tensors are filled in place
        set_state_dict(self._policy, self._optimizers, model_state_dict=model, optim_state_dict=optimizer)
        self.step = int(about["step"])
        for step, found in read_log(self._out / "log.jsonl", self.step).items():
            self._guard.see(step, found)
        return True

    def _reference(self) -> dict[str, Any]:
        """Weights that the algorithm holds on to besides the policy's."""
        reference = getattr(self._algorithm, "reference", None)
        return {} if reference is None else {"reference": reference.frozen.state_dict()}

    def _whole(self) -> list[Path]:
        return sorted(path.parent for path in (self._out / "checkpoints").glob(f"step-*/{DONE}"))

    def _kept(self) -> str:
        folders = self._whole()
        return f"the last checkpoint is {folders[-1].name}" if folders else "no checkpoint was written yet"


def deciding(config: EngineConfig) -> dict[str, Any]:
    """The settings that a run keeps to its end: its weights, its log or its checkpoints depend on them."""
    return {name: value for name, value in asdict(config).items() if name not in {"patience", "tensorboard", "wandb"}}


def _number(norm: Tensor) -> float:
    """A norm over all shares, where the parameters are shared out."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    """Refuse other settings, by the names that they are set by."""
    old, new = _flat(before), _flat(now)
    other = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if "algorithm" in other:
        other = ["algorithm"]  # it brings settings of its own
    if other:
        changes = "; ".join(f"{name} = {old.get(name, 'unset')}, now it is {new.get(name, 'unset')}" for name in other)
        raise UsageError(f"{folder} was made with {changes}: give the same settings, or another --out")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the parts that they stand in; no name stands in two with different values."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without the notice that there is one process, which is what was meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
