"""Runs the launcher's kernels as compiled code on a CPU: triton.compile for sm_80, then the PTX machine.

A drop-in for `launch._launch`, so that whole operations, gradients included, run on what the compiler made of them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from tests.kernels.ptx import Memory, Program
from zscore_kernels import launch

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def compile_kernel(name: str, arguments: tuple[object, ...], constants: dict[str, Any]) -> dict[str, Any]:
    """The stages of a kernel, compiled as a GPU launch with these arguments would compile it."""
    kernel = launch._compiled()[name]
    signature: dict[str, str] = {}
    aligned = []
    values = iter(arguments)
    for index, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        value = next(values)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                aligned.append(index)
        else:
            assert parameter.do_not_specialize or isinstance(value, float), f"{parameter.name} compiles anew by value"
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
    return _compile(name, tuple(signature.items()), tuple(aligned), tuple(sorted(constants.items())))


@cache
def _compile(
    name: str, signature: tuple[tuple[str, str], ...], aligned: tuple[int, ...], constants: tuple[tuple[str, Any], ...]
) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=launch._compiled()[name],
        signature=dict(signature),
        constexprs=dict(constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=dict(launch._OPTIONS)).asm


@cache
def _program(ptx: str) -> Program:
    return Program(ptx)


def run_compiled(name: str, grid: tuple[int, ...], *arguments: object, beside: Tensor, **constants: Any) -> None:
    """Stands in for `launch._launch`: executes the compiled kernel and leaves its results in the tensors."""
    del beside
    program = _program(compile_kernel(name, arguments, constants)["ptx"])
    memory = Memory()
    mapped: dict[int, tuple[Tensor, int]] = {}
    values: list[float] = []
    for argument in arguments:
        if not isinstance(argument, torch.Tensor):
            values.append(argument)
            continue
        storage = argument.untyped_storage()
        if storage.data_ptr() not in mapped:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage)
            mapped[storage.data_ptr()] = raw, memory.add(raw.numpy(), storage.data_ptr() % 256)
        values.append(mapped[storage.data_ptr()][1] + argument.storage_offset() * argument.element_size())
    program.run(memory, grid, values)
    for raw, address in mapped.values():
        raw.copy_(torch.from_numpy(memory.read(address, raw.numpy())))
