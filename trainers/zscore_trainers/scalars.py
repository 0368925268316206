"""What log.jsonl says, for TensorBoard and for Weights & Biases too, one scalar a figure.

OUT/tensorboard    TensorBoard's event files
OUT/wandb          wandb's own files; OUT/wandb/run-id names the run, which a resumed one goes on with

Both are extras (`pip install zscore-reward[tensorboard]`, `[wandb]`); a run that asks for neither needs neither.
"""

from __future__ import annotations

import contextlib
import secrets
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from zscore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Write = Callable[[int, Mapping[str, float]], None]

HELD_OUT = ("plcc_", "hpa_", "held_out_")


def require(*, tensorboard: bool, project: str) -> None:
    """Refuse a run that asks for what isn't installed.

    Raises:
        UsageError: says how to install it.
    """
    asked = {"tensorboard": "tensorboard=true" if tensorboard else "", "wandb": f"wandb={project}" if project else ""}
    for package, setting in asked.items():
        if setting and find_spec(package) is None:
            raise UsageError(f"{setting} needs the package: pip install 'zscore-reward[{package}]'")


def log_in(project: str) -> None:
    """To wandb, where a project is named: before hours of work, not after.

    Raises:
        UsageError: there is no login.
    """
    if project:
        import wandb

        api: Any = wandb  # untyped
        with _explained(api, project):
            api.login()  # asks nobody but a terminal; offline it isn't wanted


@contextlib.contextmanager
def to_tensorboard(out: Path, step: int = 0) -> Iterator[Write]:
    """A function that writes the figures of a step.

    Args:
        out: folder of the run.
        step: steps that were done before; what an interrupted run wrote beyond them is hidden.
    """
    from torch.utils.tensorboard import SummaryWriter

    build: Any = SummaryWriter  # untyped
    with build(out / "tensorboard", purge_step=step + 1 if step else None) as writer:

        def write(step: int, found: Mapping[str, float]) -> None:
            for name, value in _named(found).items():
                writer.add_scalar(name, value, step)

        yield write


@contextlib.contextmanager
def to_wandb(out: Path, project: str, settings: Mapping[str, Any]) -> Iterator[Write]:
    """A function that logs the figures of a step to Weights & Biases; WANDB_MODE=offline keeps them in OUT.

    Args:
        out: folder of the run.
        project: name of wandb's project.
        settings: shown as the run's configuration.

    Raises:
        UsageError: wandb can't be reached or wants a login.
    """
    import wandb as package

    api: Any = package  # its annotations are not strict
    (out / "wandb").mkdir(parents=True, exist_ok=True)
    kept = out / "wandb" / "run-id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(4))
    with _explained(api, project):
        started = api.init(
            project=project,
            id=kept.read_text(),
            resume="allow",
            dir=out,
            config=dict(settings),
            settings=api.Settings(console="off"),
        )
    with started as run:
        run.define_metric("*", step_metric="step")  # its own count never goes back, a resumed run's steps do
        yield lambda step, found: run.log({"step": step, **_named(found)})


@contextlib.contextmanager
def _explained(api: Any, project: str) -> Iterator[None]:
    try:
        yield
    except api.Error as error:
        said = " ".join(str(error).split())
        raise UsageError(f"wandb={project}: {said}; or keep its files here: WANDB_MODE=offline") from error


def _named(found: Mapping[str, float]) -> dict[str, float]:
    return {f"{'held_out' if name.startswith(HELD_OUT) else 'training'}/{name}": one for name, one in found.items()}
