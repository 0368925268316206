"""What log.jsonl says, for TensorBoard too: OUT/tensorboard, one scalar a figure.

TensorBoard is an extra (`pip install zscore-reward[tensorboard]`); a run that doesn't ask for it needs nothing.
"""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from zscore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Write = Callable[[int, Mapping[str, float]], None]

HELD_OUT = ("plcc_", "hpa_")


def require() -> None:
    """Refuse a run that asks for what isn't installed.

    Raises:
        UsageError: says how to install it.
    """
    if find_spec("tensorboard") is None:
        raise UsageError("tensorboard=true needs the package: pip install 'zscore-reward[tensorboard]'")


@contextlib.contextmanager
def scalars(folder: Path | None, step: int = 0) -> Iterator[Write]:
    """A function that writes the figures of a step.

    Args:
        folder: of the event files; None writes nothing.
        step: steps that were done before; what an interrupted run wrote beyond them is hidden.
    """
    if folder is None:
        yield lambda _step, _found: None
        return
    from torch.utils.tensorboard import SummaryWriter

    build: Any = SummaryWriter  # untyped
    with build(folder, purge_step=step + 1 if step else None) as writer:

        def write(step: int, found: Mapping[str, float]) -> None:
            for name, value in found.items():
                group = "held_out" if name.startswith(HELD_OUT) else "training"
                writer.add_scalar(f"{group}/{name}", value, step)

        yield write
