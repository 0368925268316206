"""Exact gradients of losses that couple samples of different micro-batches.

GDSO compares every output of one side with every output of the other (eqs. 10 and 11), and all of these don't fit in
memory with their graphs at once. But the loss sees a sample only through a few numbers (its score logits, its tokens'
log-probabilities), so the chain rule splits there:

    1. without a graph:  z_m = forward(m) for every micro-batch m        (all z fit easily)
    2. on z alone:       L(z), g = dL/dz
    3. with a graph:     backward of sum(g_m * forward(m)) for one micro-batch m at a time

which gives dL/dtheta to the last rounding, whatever the micro-batches are, and wherever the two halves of a pair lie.
Forward has to give the same numbers twice: no dropout. The last micro-batches of the first pass may keep their graphs
for the third: one costs no memory, as its graph is gone before another is made, and saves a forward pass.

Over several ranks the outputs of all are gathered for the second step, so that pairs may also lie on different ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

Batch = TypeVar("Batch")


def two_pass(
    forward: Callable[[Batch], tuple[Tensor, ...]],
    micro_batches: Sequence[Batch],
    loss: Callable[..., Tensor],
    *,
    order: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    kept: int = 1,
) -> Tensor:
    """Add the gradient of `loss` over all micro-batches to the parameters' `.grad`.

    Args:
        forward: one micro-batch → tensors whose first dimension is the sample; the other dimensions agree between
            micro-batches (and ranks).
        micro_batches: this rank's samples, in `order`. Every rank has as many micro-batches.
        loss: the tensors of all samples, in order (ranks first), → a scalar.
        order: which sample comes first in the micro-batches, second …; else they come in order. Sequences of like
            length in one micro-batch leave little padding to compute.
        group: the ranks to gather over; none where there is one process. Gradients are expected to be averaged over
            the ranks afterwards, as FSDP and DDP do.
        kept: micro-batches whose graphs are held at once, from the first pass on; every one saves a forward pass.

    Returns:
        The loss, without a graph.

    Raises:
        ValueError: nothing to do, or `forward` gives other numbers the second time.
    """
    if not micro_batches:
        raise ValueError("no micro-batches: there is nothing to differentiate")
    again = max(0, len(micro_batches) - kept)
    with torch.no_grad():
        first = [forward(batch) for batch in micro_batches[:again]]
    live = [forward(batch) for batch in micro_batches[again:]]
    with torch.no_grad():
        mine = tuple(torch.cat(parts) for parts in zip(*first, *live, strict=True))
    samples = torch.arange(len(mine[0])) if order is None else torch.tensor(order)
    back = torch.argsort(samples)
    mine = tuple(tensor[back] for tensor in mine)
    gathered = [_gather(tensor, group) for tensor in mine]
    leaves = tuple(tensor.detach().requires_grad_() for tensor, _ in gathered)
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    ranks = 1 if group is None else dist.get_world_size(group)
    own = []
    for gradient, leaf, (_, start), tensor in zip(gradients, leaves, gathered, mine, strict=True):
        whole = torch.zeros_like(leaf) if gradient is None else gradient
        own.append(whole[start : start + len(tensor)][samples] * ranks)  # undone by the average over ranks
    counts = [len(outputs[0]) for outputs in (*first, *live)]
    parts = list(zip(*(torch.split(gradient, counts) for gradient in own), strict=True))
    while live:  # first, so that their graphs make room
        _backward(live.pop(), parts.pop())
    for batch, before, part in zip(micro_batches[:again], first, parts, strict=True):
        outputs = forward(batch)
        _check_same(before, outputs)
        _backward(outputs, part)
    return value.detach()


def _backward(outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    live = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
    torch.autograd.backward([output for output, _ in live], [gradient for _, gradient in live])


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """All ranks' samples, in the order of the ranks, and where this rank's begin."""
    if group is None:
        return tensor, 0
    ranks = dist.get_world_size(group)
    count = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count, group=group)
    lengths = [int(one) for one in counts]
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    whole = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return whole, sum(lengths[: dist.get_rank(group)])


def _check_same(before: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> None:
    for one, two in zip(before, now, strict=True):
        # Two runs of one graph may round differently on a GPU; dropout moves far more.
        if not torch.allclose(one, two.detach(), rtol=1e-2, atol=1e-2, equal_nan=True):
            apart = float((one - two.detach()).abs().max())
            raise ValueError(f"forward gives other numbers the second time (up to {apart:.3g}): switch dropout off")
