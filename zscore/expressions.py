"""What users write about scores: `realism=3.5`, `alignment>=4:0.8`, `0.5*alignment + 0.5*realism`.

A score expression knows numbers, dimensions, `overall`, + - * /, min and max; it is parsed by `ast` and never
evaluated by Python. The same tree gives the score of a row, the score at a risk, and the distribution of the score.

Array legend: P rows, S support points of a distribution.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import polars as pl

from zscore.errors import UsageError
from zscore.tables import OVERALL, known

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]
    Bounds: TypeAlias = tuple[pl.Expr, pl.Expr]

# Longer ones nest deeper than anyone means to; Python's parser gives up with a crash instead of an error.
MAX_LENGTH = 500
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS = ("min", "max")
_PROBABILITY = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([^\s:]+)\s*:\s*(\S+)\s*")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class Probability:
    """`alignment>=4:0.8`: the share of a distribution on one side of a value must reach a minimum."""

    dimension: str
    comparison: str
    value: float
    minimum: float

    def levels(self, values: Sequence[float]) -> list[int]:
        """Positions of the levels that count."""
        return [k for k, value in enumerate(values) if _COMPARISONS[self.comparison](value, self.value)]

    def __str__(self) -> str:
        return f"{self.dimension}{self.comparison}{self.value:g}:{self.minimum:g}"


def parse_number(text: str, option: str) -> float:
    """A finite number.

    Raises:
        UsageError: it isn't one.
    """
    try:
        number = float(text)
    except ValueError:
        raise UsageError(f"{option}: '{text}' isn't a number") from None
    if not math.isfinite(number):
        raise UsageError(f"{option}: {text} isn't a finite number")
    return number


def parse_bounds(texts: Sequence[str], option: str) -> dict[str, float]:
    """`4.0` → {"overall": 4.0}, `realism=3.5` → {"realism": 3.5}; several at once.

    Raises:
        UsageError: not a number, or a name given twice.
    """
    bounds: dict[str, float] = {}
    for text in texts:
        name, sign, number = text.rpartition("=")
        name = name.strip() if sign else OVERALL
        if name in bounds:
            raise UsageError(f"{option} is given twice for {name}: {bounds[name]:g} and {number.strip()}")
        bounds[name] = parse_number(number.strip(), f"{option} {text}")
    return bounds


def parse_probability(text: str) -> Probability:
    """`alignment>=4:0.8`.

    Raises:
        UsageError: it doesn't read like that, or the probability isn't in (0, 1].
    """
    match = _PROBABILITY.fullmatch(text)
    if match is None:
        raise UsageError(f"--prob '{text}': write DIMENSION>=VALUE:PROBABILITY, like alignment>=4:0.8")
    name, comparison, value, minimum = match.groups()
    found = Probability(name, comparison, parse_number(value, "--prob"), parse_number(minimum, "--prob"))
    if not 0 < found.minimum <= 1:
        raise UsageError(f"--prob '{text}': the probability {minimum} must be above 0 and at most 1")
    if name == OVERALL:
        raise UsageError(f"--prob '{text}': {OVERALL} has no distribution of its own; name a dimension")
    return found


class ScoreExpression:
    """A parsed `--score`.

    Args:
        text: the expression.
        dimensions: names that it may use, besides `overall`, which is their mean.

    Raises:
        UsageError: anything but numbers, names, + - * /, min and max; an unknown name (with the nearest one).
    """

    def __init__(self, text: str, dimensions: Sequence[str], option: str = "--score") -> None:
        self.text = text
        self.dimensions = tuple(dimensions)
        self._option = f"{option} '{text}'"
        self._tree = self._parse()
        self._check(self._tree)
        self.names = tuple(
            dict.fromkeys(
                node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name) and node.id not in _FUNCTIONS
            )
        )
        if not self.names:
            raise UsageError(f"{self._option} names no dimension: it scores every picture alike")

    def _parse(self) -> ast.expr:
        if len(self.text) > MAX_LENGTH:
            raise UsageError(f"{self._option[:80]}…' has {len(self.text)} characters, at most {MAX_LENGTH} are read")
        try:
            with warnings.catch_warnings(action="ignore"):  # Python's advice on what isn't Python code
                return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            what = error.msg if isinstance(error, SyntaxError) else str(error)
            raise UsageError(f"{self._option} isn't an expression: {what}") from None

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                parse_number(str(value), self._option)
            case ast.Name(id=name):
                known(name, [OVERALL, *self.dimensions], self._option)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                self._check(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                self._check(left)
                self._check(right)
                if isinstance(op, ast.Div) and _is_constant(right) and _constant(right) == 0:
                    raise UsageError(f"{self._option} divides by zero")
            case ast.Call(func=ast.Name(id="min" | "max"), args=[_, _, *_] as args, keywords=[]):
                for argument in args:
                    self._check(argument)
            case _:
                shown = ast.unparse(node)
                raise UsageError(
                    f"{self._option}: '{shown}' isn't understood; there are numbers, dimensions, overall, + - * /,"
                    " min(a, b) and max(a, b)"
                )

    def columns(self, risk: float = 0.0) -> list[str]:
        """Columns that `expr` reads."""
        found = list(self.names)
        if risk:
            found += [f"{name}_std" for name in self.leaves()]
        return list(dict.fromkeys(found))

    def leaves(self) -> list[str]:
        """Dimensions as often as the expression reads them; `overall` reads all."""
        names = [node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name) and node.id not in _FUNCTIONS]
        return [leaf for name in names for leaf in (self.dimensions if name == OVERALL else (name,))]

    def expr(self, risk: float = 0.0) -> pl.Expr:
        """The score of a row as float32, computed in float64.

        With a risk r, every dimension is read as mean − r × std, or as mean + r × std where a larger value makes the
        score smaller. `overall` has the mean of its dimensions' std: the largest that it can have. So for a dimension
        and for `overall` this is mean − risk × std.

        Raises:
            UsageError: with a risk, a division by a dimension.
        """
        return self.exact(risk).cast(pl.Float32)

    def exact(self, risk: float = 0.0) -> pl.Expr:
        """The same as float64, which tells scores apart that are too large or too small for float32."""
        return self._bounds(self._tree, risk)[0]

    def _bounds(self, node: ast.expr, risk: float) -> Bounds:
        """Lower and upper end of a node's value when each dimension varies by risk × std (interval arithmetic)."""
        if _is_constant(node):
            return (pl.lit(_constant(node), pl.Float64),) * 2
        match node:
            case ast.Name(id=name):
                mean = pl.col(name).cast(pl.Float64)
                return (mean - risk * self._std(name), mean + risk * self._std(name)) if risk else (mean, mean)
            case ast.UnaryOp(op=op, operand=operand):
                low, high = self._bounds(operand, risk)
                return (-high, -low) if isinstance(op, ast.USub) else (low, high)
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary_bounds(left, op, right, risk)
            case ast.Call(func=ast.Name(id=function), args=args):
                ends = [self._bounds(argument, risk) for argument in args]
                return _picked(function, [low for low, _ in ends]), _picked(function, [high for _, high in ends])
        raise AssertionError(ast.dump(node))

    def _binary_bounds(self, left: ast.expr, op: ast.operator, right: ast.expr, risk: float) -> Bounds:
        apply = _OPERATORS[type(op)]
        a_low, a_high = self._bounds(left, risk)
        b_low, b_high = self._bounds(right, risk)
        if not risk or isinstance(op, ast.Add):
            return apply(a_low, b_low), apply(a_high, b_high)
        if isinstance(op, ast.Sub):
            return a_low - b_high, a_high - b_low
        factor = right if _is_constant(right) else left
        if not _is_constant(factor) or (isinstance(op, ast.Div) and factor is left):
            raise UsageError(f"{self._option}: with --risk, multiply and divide by numbers only")
        ends = apply(a_low, b_low), apply(a_high, b_high)
        return ends if _constant(factor) >= 0 else ends[::-1]

    def _std(self, name: str) -> pl.Expr:
        names = self.dimensions if name == OVERALL else (name,)
        return pl.mean_horizontal(pl.col(f"{leaf}_std").cast(pl.Float64) for leaf in names)

    def check_independent(self) -> None:
        """Refuse expressions whose distribution doesn't follow from those of the dimensions.

        Raises:
            UsageError: a dimension is read twice.
        """
        twice = [name for name, count in Counter(self.leaves()).items() if count > 1]
        if twice:
            raise UsageError(
                f"{self._option} reads '{twice[0]}' twice (overall reads all dimensions): its distribution, and so the"
                " probability of a pair, isn't known; write it with each dimension once"
            )

    def distribution(self, probs: Mapping[str, Floats], values: Sequence[float]) -> tuple[Floats, Floats]:
        """Distribution of the score, its dimensions taken as independent.

        Args:
            probs: (P, K) by dimension.
            values: of the levels, K of them.

        Returns:
            The support, ascending, shape (S,), and the probabilities, shape (P, S).
        """
        levels_K = np.asarray(values, dtype=np.float64)
        return self._distribution(self._tree, {name: (levels_K, probs_PK) for name, probs_PK in probs.items()})

    def _distribution(self, node: ast.expr, leaves: Mapping[str, tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        if _is_constant(node):
            return np.array([_constant(node)]), np.ones((1, 1))
        match node:
            case ast.Name(id=name) if name == OVERALL:
                total_S, probs_PS = reduce(lambda a, b: _combine(a, b, np.add), (leaves[d] for d in self.dimensions))
                return total_S / len(self.dimensions), probs_PS
            case ast.Name(id=name):
                return leaves[name]
            case ast.UnaryOp(op=op, operand=operand):
                support_S, probs_PS = self._distribution(operand, leaves)
                return (-support_S[::-1], probs_PS[:, ::-1]) if isinstance(op, ast.USub) else (support_S, probs_PS)
            case ast.BinOp(left=left, op=op, right=right):
                one, two = self._distribution(left, leaves), self._distribution(right, leaves)
                if isinstance(op, ast.Div) and (two[0] == 0).any():
                    raise UsageError(f"{self._option} divides by '{ast.unparse(right)}', which may be 0")
                return _combine(one, two, _OPERATORS[type(op)])
            case ast.Call(func=ast.Name(id=function), args=args):
                pick = np.minimum if function == "min" else np.maximum
                return reduce(lambda a, b: _combine(a, b, pick), [self._distribution(one, leaves) for one in args])
        raise AssertionError(ast.dump(node))


def _picked(function: str, arguments: Sequence[pl.Expr]) -> pl.Expr:
    """The least or the largest; NaN if one is NaN, which polars would pass over."""
    pick = pl.min_horizontal if function == "min" else pl.max_horizontal
    is_nan = pl.any_horizontal(argument.is_nan() for argument in arguments)
    return pl.when(is_nan).then(pl.lit(float("nan"))).otherwise(pick(arguments))


def _is_constant(node: ast.expr) -> bool:
    return not any(isinstance(child, ast.Name) and child.id not in _FUNCTIONS for child in ast.walk(node))


def _constant(node: ast.expr) -> float:
    """Value of a node that names no dimension."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=op, operand=operand):
            return -_constant(operand) if isinstance(op, ast.USub) else _constant(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return float(_OPERATORS[type(op)](_constant(left), _constant(right)))
        case ast.Call(func=ast.Name(id=function), args=args):
            return (min if function == "min" else max)(_constant(argument) for argument in args)
    raise AssertionError(ast.dump(node))


def _combine(
    left: tuple[Floats, Floats], right: tuple[Floats, Floats], apply: Callable[[Floats, Floats], Floats]
) -> tuple[Floats, Floats]:
    """Distribution of a function of two independent numbers."""
    (a_S, p_PS), (b_T, q_PT) = left, right
    # 1e-9: sums of level values that are equal on paper fall on one support point.
    found_ST = np.round(apply(a_S[:, None], b_T[None, :]), 9)
    support_U, of_ST = np.unique(found_ST, return_inverse=True)
    of_ST = of_ST.reshape(found_ST.shape)
    out_PU = np.zeros((max(len(p_PS), len(q_PT)), len(support_U)))
    one_hot_UU = np.eye(len(support_U))
    for s in range(len(a_S)):
        out_PU += (p_PS[:, s : s + 1] * q_PT) @ one_hot_UU[of_ST[s]]
    return support_U, out_PU


def preference(chosen_PS: Floats, rejected_PS: Floats) -> Floats:
    """P(chosen > rejected) + ½ P(chosen = rejected) for rows of independent distributions on one support."""
    chosen_PS = chosen_PS / chosen_PS.sum(axis=1, keepdims=True)
    rejected_PS = rejected_PS / rejected_PS.sum(axis=1, keepdims=True)
    below_PS = np.cumsum(rejected_PS, axis=1) - rejected_PS / 2
    return np.asarray(np.clip((chosen_PS * below_PS).sum(axis=1), 0.0, 1.0))
