"""Runs compiled kernels without a GPU: a small PTX machine in numpy.

Triton's interpreter checks what the source says. What a GPU runs is the compiler's work besides: layouts, vector loads,
masks, shuffles and conversions through shared memory, and it is there that an order of additions could come to depend
on the tile. This machine executes that code, one block of threads at a time, all threads in step.

It checks every access to global memory against the buffers that were passed in. It does not model what needs a real
machine: timing, missing barriers, and the last bit of the approximate functions (here they are rounded properly).

Only the instructions that these kernels compile to (sm_80) are known; any other one is an error.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
_TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "pred": np.dtype(bool),
}
_SHARED_BYTES = 1 << 18
_WARP = 32


@dataclass
class Memory:
    """Global memory: buffers with unmapped space between them."""

    data: Array = field(default_factory=lambda: np.zeros(1 << 16, np.uint8))
    mapped: Array = field(default_factory=lambda: np.zeros(1 << 16, bool))
    end: int = 4096

    def add(self, buffer: Array, offset: int = 0) -> int:
        """Maps a copy of the buffer `offset` bytes past a 256-byte boundary; returns its address."""
        start = -(-self.end // 256) * 256 + offset
        self.end = start + buffer.nbytes + 4096
        if self.end > self.data.size:
            grow = self.end * 2 - self.data.size
            self.data = np.concatenate((self.data, np.zeros(grow, np.uint8)))
            self.mapped = np.concatenate((self.mapped, np.zeros(grow, bool)))
        self.data[start : start + buffer.nbytes] = buffer.reshape(-1).view(np.uint8)
        self.mapped[start : start + buffer.nbytes] = True
        return start

    def read(self, address: int, like: Array) -> Array:
        """The buffer at an address, in the type and shape of `like`."""
        return self.data[address : address + like.nbytes].view(like.dtype).reshape(like.shape).copy()


@dataclass(frozen=True)
class _Instruction:
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    label: int | None = None


class Program:
    """One kernel's PTX, parsed."""

    def __init__(self, ptx: str) -> None:
        head, body = ptx.split(".entry", 1)[1].split("{", 1)
        self.parameters = re.findall(r"\.param\s+\.(\w+)[^,)]*?(\w+_param_\d+)", head)
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
        self.code: list[_Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body.partition("\n}")[0].splitlines():  # debug sections follow
            self._parse(line.split("//")[0].strip())

    def _parse(self, line: str) -> None:
        if not line or line.startswith((".", "}")):
            return
        if line.endswith(":"):
            self.labels[line[:-1]] = len(self.code)
            return
        match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*?);", line)
        assert match, f"can't read {line!r}"
        operands = tuple(part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[3]))
        self.code.append(_Instruction(tuple(match[2].replace("::", "_").split(".")), operands, match[1]))

    def run(self, memory: Memory, grid: tuple[int, ...], arguments: Sequence[float]) -> None:
        """Executes every block of the grid; `arguments` in the order of the kernel's parameters."""
        values = list(arguments) + [0] * (len(self.parameters) - len(arguments))
        bound = {name: (kind, value) for (kind, name), value in zip(self.parameters, values, strict=True)}
        x, y, z = (*grid, 1, 1)[:3]
        for block in np.ndindex(x, y, z):
            _Block(self, memory, bound, block).run()


class _Block:
    """The threads of one block, in step; those past a forward branch wait at its label."""

    def __init__(self, program: Program, memory: Memory, bound: dict[str, tuple[str, float]], block) -> None:
        self.program, self.memory, self.bound, self.block = program, memory, bound, block
        self.registers: dict[str, Array] = {}
        self.shared = np.zeros(_SHARED_BYTES, np.uint8)
        self.active = np.ones(program.threads, bool)
        self.waiting: dict[int, Array] = {}

    def run(self) -> None:
        at = 0
        code = self.program.code
        while at < len(code):
            if at in self.waiting:
                self.active = self.active | self.waiting.pop(at)
            step = code[at]
            mask = self.active
            if step.guard is not None:
                wanted = self.registers[step.guard.lstrip("!")]
                mask = mask & (~wanted if step.guard.startswith("!") else wanted)
            if step.opcode[0] == "ret":
                return
            if step.opcode[0] == "bra":
                at = self._branch(at, self.program.labels[step.operands[0]], mask)
                continue
            self._execute(step, mask)
            at += 1

    def _branch(self, at: int, target: int, mask: Array) -> int:
        if np.array_equal(mask, self.active):
            return target if mask.any() else at + 1
        if not mask.any():
            return at + 1
        assert target > at, "threads diverge at the end of a loop"
        self.waiting[target] = self.waiting.get(target, np.zeros_like(mask)) | mask
        self.active = self.active & ~mask
        return at + 1

    def _execute(self, step: _Instruction, mask: Array) -> None:
        name, *modifiers = step.opcode
        if name in ("bar", "createpolicy"):
            return
        handler: Callable[[list[str], tuple[str, ...], Array], None] | None = getattr(self, f"_{name}", None)
        if handler is not None:
            handler(modifiers, step.operands, mask)
            return
        kind = modifiers[-1]
        compute = _ARITHMETIC.get(name)
        assert compute is not None, f"unknown instruction {'.'.join(step.opcode)}"
        with np.errstate(all="ignore"):
            result = compute(modifiers, *(self.value(operand, kind) for operand in step.operands[1:]))
        self.write(step.operands[0], result, mask)

    # Operands

    def value(self, operand: str, kind: str) -> Array:
        dtype = _TYPES[kind]
        if operand in self.registers:
            return self.registers[operand].view(dtype)
        if operand in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z"):
            special = np.arange(self.program.threads) if operand[1] == "t" else self.block["xyz".index(operand[-1])]
            return self._spread(np.asarray(special), dtype)
        if operand == "global_smem":
            return self._spread(np.asarray(0), dtype)
        assert not operand.startswith("%"), f"{operand} is read before it is written"
        if operand.startswith("0f"):
            return self._spread(np.asarray(int(operand.replace("f", "x", 1), 0)), np.dtype(np.uint32)).view(dtype)
        number = int(operand.rstrip("U"), 0)
        if dtype == np.bool_:
            return self._spread(np.asarray(number != 0), dtype)
        return self._spread(
            np.asarray(number & ((1 << dtype.itemsize * 8) - 1), f"u{dtype.itemsize}").view(dtype), dtype
        )

    def _spread(self, value: Array, dtype: np.dtype) -> Array:
        return np.broadcast_to(value.astype(dtype), (self.program.threads,)).copy()

    def write(self, register: str, value: Array, mask: Array) -> None:
        width = re.match(r"%([a-z]+)", register)[1]
        dtype = {"p": np.dtype(bool), "rs": _TYPES["b16"], "r": _TYPES["b32"], "rd": _TYPES["b64"]}[width]
        if value.dtype.itemsize != dtype.itemsize:  # a narrow load or multiply into a wide register
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
        bits = value.view(dtype)
        if not mask.all():
            old = self.registers.get(register, np.zeros(mask.size, dtype))
            bits = np.where(mask, bits, old)
        self.registers[register] = bits

    def _address(self, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        width = "b64" if base.startswith("%rd") else "b32"
        return self.value(base, width).astype(np.int64) + int(offset or 0)

    # Instructions that are more than arithmetic

    def _ld(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        kind = modifiers[-1]
        if modifiers[0] == "param":
            declared, value = self.bound[operands[1].strip("[]")]
            typed = np.asarray(value, _TYPES[declared.replace("b", "u")]).view(_TYPES[kind])
            self.write(operands[0], self._spread(typed, _TYPES[kind]), mask)
            return
        targets = [part.strip() for part in operands[0].strip("{} ").split(",")]
        for register, where in zip(targets, self._where(modifiers, operands[1], kind, len(targets), mask), strict=True):
            source = self.shared if modifiers[0].startswith("shared") else self.memory.data
            loaded = source[where].reshape(mask.size, -1).copy().view(_TYPES[kind]).reshape(-1)
            self.write(register, loaded, mask)

    def _st(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        kind = modifiers[-1]
        sources = [part.strip() for part in operands[1].strip("{} ").split(",")]
        for register, where in zip(sources, self._where(modifiers, operands[0], kind, len(sources), mask), strict=True):
            value = self.value(register, kind).reshape(-1, 1).view(np.uint8)
            target = self.shared if modifiers[0].startswith("shared") else self.memory.data
            target[where[mask]] = value[mask]

    def _where(self, modifiers: list[str], operand: str, kind: str, count: int, mask: Array) -> list[Array]:
        """Byte indices of each element of a vector access; every thread under the mask must be in bounds, aligned."""
        size = _TYPES[kind].itemsize
        address = np.where(mask, self._address(operand), 0)
        assert (address % (size * count) == 0).all(), f"unaligned access: {operand}"
        wheres = [address[:, None] + index * size + np.arange(size) for index in range(count)]
        if modifiers[0] == "global":
            assert all(self.memory.mapped[where[mask]].all() for where in wheres), f"out of bounds: {operand}"
        return wheres

    def _mov(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        target, source = operands
        if target.startswith("{"):
            halves = self.value(source, modifiers[-1]).reshape(-1, 1).view(np.uint16)
            for index, register in enumerate(part.strip() for part in target.strip("{} ").split(",")):
                if register != "_":
                    self.write(register, halves[:, index].copy(), mask)
        elif source.startswith("{"):
            parts = [self.value(part.strip(), "b16") for part in source.strip("{} ").split(",")]
            self.write(target, np.stack(parts, 1).copy().view(_TYPES[modifiers[-1]]).reshape(-1), mask)
        else:
            self.write(target, self.value(source, modifiers[-1]), mask)

    def _shfl(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        assert mask.all(), "a shuffle with threads missing"
        threads = np.arange(mask.size)
        by = self.value(operands[2], "b32").astype(np.int64)
        source = {"bfly": threads ^ by, "idx": threads // _WARP * _WARP + by % _WARP}[modifiers[1]]
        self.write(operands[0].split("|")[0], self.value(operands[1], "b32")[source], mask)

    def _ldmatrix(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        """8×8 matrices of 16-bit elements: lanes 8i to 8i + 7 point at the rows of matrix i, each gets a pair of it."""
        assert mask.all(), "a matrix load with threads missing"
        lane = np.arange(mask.size) % _WARP
        warp = np.arange(mask.size) - lane
        address = self._address(operands[1])
        for index, register in enumerate(operands[0].strip("{} ").split(",")):
            pair = np.stack((2 * (lane % 4), 2 * (lane % 4) + 1), 1)
            rows, columns = (pair, lane[:, None] // 4) if "trans" in modifiers else (lane[:, None] // 4, pair)
            start = address[warp[:, None] + 8 * index + rows] + 2 * columns
            loaded = self.shared[start[:, :, None] + np.arange(2)].reshape(mask.size, 4).copy()
            self.write(register.strip(), loaded.view(np.uint32).reshape(-1), mask)

    def _setp(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        left, right = (self.value(operand, modifiers[-1]) for operand in operands[1:3])
        self.write(operands[0], _COMPARE[modifiers[0]](left, right), mask)

    def _selp(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        yes, no = (self.value(operand, modifiers[-1]) for operand in operands[1:3])
        self.write(operands[0], np.where(self.value(operands[3], "pred"), yes, no), mask)

    def _cvt(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        to, source = modifiers[-2:]
        if to in ("bf16x2", "f16x2"):
            narrow = _to_bf16 if to == "bf16x2" else lambda value: value.astype(np.float16).view(np.uint16)
            high, low = (narrow(self.value(operand, source)) for operand in operands[1:])
            result = high.astype(np.uint32) << 16 | low
        elif to == "bf16":
            result = _to_bf16(self.value(operands[1], source))
        elif source == "bf16":
            result = (self.value(operands[1], "b16").astype(np.uint32) << 16).view(np.float32)
        else:
            result = self.value(operands[1], source).astype(_TYPES[to])
        self.write(operands[0], result, mask)

    def _mad(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        kind = modifiers[-1]
        wide = modifiers[0] == "wide"
        out = f"{kind[0]}{int(kind[1:]) * 2}" if wide else kind
        left, right = (self.value(operand, kind).astype(_TYPES[out]) for operand in operands[1:3])
        self.write(operands[0], left * right + self.value(operands[3], out), mask)

    def _mul(self, modifiers: list[str], operands: tuple[str, ...], mask: Array) -> None:
        kind = modifiers[-1]
        out = f"{kind[0]}{int(kind[1:]) * 2}" if modifiers[0] == "wide" else kind
        left, right = (self.value(operand, kind).astype(_TYPES[out]) for operand in operands[1:3])
        with np.errstate(all="ignore"):
            self.write(operands[0], left * right, mask)


def _to_bf16(value: Array) -> Array:
    bits = value.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _fma(modifiers: list[str], left: Array, right: Array, add: Array) -> Array:
    del modifiers  # a product of two float32 is exact in float64
    return (left.astype(np.float64) * right + add).astype(np.float32)


def _shift_left(modifiers: list[str], value: Array, by: Array) -> Array:
    del modifiers
    return np.where(by < value.dtype.itemsize * 8, value << by.astype(value.dtype), 0).astype(value.dtype)


def _permute(modifiers: list[str], low: Array, high: Array, pick: Array) -> Array:
    del modifiers
    data = low.view(np.uint32).astype(np.uint64) | high.view(np.uint32).astype(np.uint64) << np.uint64(32)
    result = np.zeros(low.size, np.uint64)
    for index in range(4):
        chosen = (pick.astype(np.uint64) >> np.uint64(4 * index)) & np.uint64(7)
        result |= (data >> (chosen * np.uint64(8)) & np.uint64(0xFF)) << np.uint64(8 * index)
    return result.astype(np.uint32)


def _unordered(left: Array, right: Array) -> Array:
    return (left != left) | (right != right)  # noqa: PLR0124 (NaN is what differs from itself)


_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda _, a, b: a + b,
    "sub": lambda _, a, b: a - b,
    "div": lambda _, a, b: a / b,
    "fma": _fma,
    "neg": lambda _, a: -a,
    "abs": lambda _, a: np.abs(a),
    "min": lambda _, a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda _, a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "and": lambda _, a, b: a & b,
    "or": lambda _, a, b: a | b,
    "xor": lambda _, a, b: a ^ b,
    "not": lambda _, a: ~a,
    "shl": _shift_left,
    "shr": lambda _, a, b: a >> np.minimum(b.astype(np.int64), a.dtype.itemsize * 8 - 1).astype(a.dtype),
    "bfe": lambda _, a, start, size: a >> start & ((np.uint32(1) << size) - np.uint32(1)),
    "prmt": _permute,
    "ex2": lambda _, a: np.exp2(a.astype(np.float64)).astype(np.float32),
    "lg2": lambda _, a: np.log2(a.astype(np.float64)).astype(np.float32),
    "rcp": lambda _, a: (1.0 / a).astype(np.float32),
}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": np.not_equal,
    "ltu": lambda a, b: (a < b) | _unordered(a, b),
    "leu": lambda a, b: (a <= b) | _unordered(a, b),
    "gtu": lambda a, b: (a > b) | _unordered(a, b),
    "geu": lambda a, b: (a >= b) | _unordered(a, b),
    "nan": _unordered,
}
