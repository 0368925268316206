"""One run in several processes: who is first, what all of them agree on, and how the weights are shared out.

    torchrun --nproc-per-node 8 -m zscore train …

Every rank holds its share of each parameter, gradient and moment (FSDP2: a block's weights are whole only while the
block computes) and works on its share of each batch; the average of their gradients is the gradient of the batch. The
first rank alone copies pictures, writes the log and exports. Checkpoints are written by all, and may be read by another
number of ranks. All ranks need the same `--out`, so over several machines it lies on a shared disk.

Weights that are trained are float32 between steps, whatever the arithmetic is: at a learning rate of 1e-5 a step moves
a weight by less than bfloat16's spacing, and would be rounded away. So is the sum of the ranks' gradients.
"""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from zscore.errors import UsageError, ZscoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from zscore_trainers.policy import ScorePolicy

Result = TypeVar("Result")

PATIENCE = timedelta(hours=12)
"""How long ranks wait for what the first does alone: copying the pictures of a large set takes hours."""


def is_started() -> bool:
    """Whether this process is one of a group (which may have one member)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0; also before the group is there and after it."""
    return dist.get_rank() if is_started() else int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if is_started() else 1


@contextlib.contextmanager
def started(dtype: torch.dtype) -> Iterator[torch.device]:
    """Join the group that torchrun describes in the environment; gives the device of this process.

    A process on its own gets a group of one where the arithmetic isn't float32 (FSDP2 then keeps the float32 weights),
    and none where it is. A group that is there already is used and kept.
    """
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    device = _device(int(os.environ.get("LOCAL_RANK", "0")) if launched else None)
    if is_started() or not (launched or dtype != torch.float32):
        yield device
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if launched:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield device
    finally:
        if is_started():  # a vLLM that was stopped has taken it along
            dist.destroy_process_group()


def _device(local: int | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local is not None:
        torch.cuda.set_device(local)
    return torch.device("cuda", torch.cuda.current_device())


def from_first(work: Callable[[], Result]) -> Result:
    """What `work` gives on the first rank, on all of them; the others wait for it.

    Raises:
        ZscoreError: the first rank's. The others leave without a word, since it has said why.
    """
    if ranks() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = work()
        except ZscoreError as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0, group=group)
    if found[1] is not None:
        if rank():
            raise SystemExit(found[1].exit_code)
        raise found[1]
    result: Result = found[0]
    return result


def wait() -> None:
    """Until all ranks are here."""
    if ranks() > 1:
        dist.barrier()


def averaged(figures: Mapping[str, float]) -> dict[str, float]:
    """The ranks' mean of each figure; all must have the same names."""
    if ranks() == 1:
        return dict(figures)
    values = torch.tensor(list(figures.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(figures, (values / ranks()).tolist(), strict=True))


def summed(tensor: Tensor) -> Tensor:
    """The ranks' sum of a tensor on the CPU."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """The ranks' largest."""
    found = torch.tensor(number)
    if ranks() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gathered(tensor: Tensor) -> Tensor:
    """All ranks' tensors, one behind the other in the first dimension; their shapes are the same."""
    if ranks() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(ranks())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def group() -> dist.ProcessGroup | None:
    """All ranks, where there are several."""
    return dist.group.WORLD if ranks() > 1 else None


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are whole only while they compute: layers of the language model and of the vision tower.

    Raises:
        UsageError: the architecture doesn't say what its blocks are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise UsageError(f"{type(model).__name__} doesn't name its blocks (_no_split_modules): train it in one process")
    return found


def share_out(policy: ScorePolicy, dtype: torch.dtype, device: torch.device) -> None:
    """Keep only this rank's share of the weights, in place; everything is moved to the device on the way.

    Embeddings, the output projection and what else lies outside the blocks are one part, which stays whole from a
    forward pass to the end of its backward pass: the score head reads the projection's weight itself.

    Args:
        policy: the same weights on all ranks.
        dtype: of the arithmetic.
        device: this rank's.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs keep their dtype: pixels come in the right one, and a teacher's distributions must stay float32.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (ranks(),))
    for block in blocks(policy.model):
        _widen(block)
        fully_shard(block, mesh=mesh, mp_policy=precision)
    _widen(policy)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def _widen(module: nn.Module) -> None:
    """What is trained becomes float32; what is frozen stays as it was stored."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def whole_state(policy: ScorePolicy) -> dict[str, Tensor]:
    """All weights of the model, by their names in its checkpoint; empty on every rank but the first.

    Each comes to the first rank's CPU memory, one after the other: bfloat16, but for adapters, which are to be merged
    first. Call it on all ranks.
    """
    found = {}
    for name, value in policy.model.state_dict().items():
        whole = value if ".lora_" in name else value.to(torch.bfloat16)
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        if rank() == 0:
            found[name] = whole.cpu()
    return found
