# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ListOps: nested operations on digits, generated with a seed as in the Long Range Arena (arXiv 2011.04006).

An expression is a string of tokens such as `[MAX 2 9 [MIN 4 7 X 0 X`, X for the closing bracket. Its class is its value, 0 to 9.
"""

from __future__ import annotations

import random

from ..errors import ConfigurationError


OPERATORS = ("MIN", "MAX", "MED", "SM")
VOCABULARY = {
    token: index
    for index, token in enumerate(("<pad>", "<unk>", "<eos>", *"0123456789", *(f"[{name}" for name in OPERATORS), "X"))
}
_PATIENCE = 1_000_000  # trees in a row that are refused before giving up


class _TooLong(Exception):
    pass


def generate(
    count: int,
    seed: int = 0,
    *,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
) -> list[tuple[str, int]]:
    """`count` distinct expressions with their values, in the order of drawing.

    A node at a depth below `max_depth` is an operator with probability 1/4, uniform among MIN, MAX, MED (the median, cut to an
    integer) and SM (the sum modulo 10), with 2 to `max_arguments` children; else a digit. An operator and its bracket count 2.
    About 8 % of trees have the default lengths.

    Args:
        count (`int`): expressions.
        seed (`int`): of Python's generator.
        min_length, max_length (`int`): a tree stays if its length in tokens lies strictly between them.
        max_depth, max_arguments (`int`): of the trees.

    Raises:
        ConfigurationError: no new tree of these lengths was found among a million.
    """
    draw = random.Random(seed)
    found: dict[str, int] = {}
    refused = 0
    while len(found) < count:
        tokens: list[str] = []
        try:
            _grow(draw, tokens, 1, max_depth, max_arguments, max_length)
        except _TooLong:  # the rest of the tree could only make it longer
            tokens = []
        text = " ".join(tokens)
        if len(tokens) <= min_length or text in found:
            refused += 1
            if refused > _PATIENCE:
                raise ConfigurationError(
                    f"found {len(found)} of {count} distinct expressions longer than {min_length} and shorter than "
                    f"{max_length} tokens; allow a wider range or ask for fewer"
                )
            continue
        refused = 0
        found[text] = value(text)
    return list(found.items())


def _grow(draw: random.Random, tokens: list[str], depth: int, max_depth: int, max_arguments: int, limit: int) -> None:
    if len(tokens) >= limit:
        raise _TooLong
    if depth >= max_depth or draw.random() > 0.25:
        tokens.append(str(draw.randrange(10)))
        return
    children = draw.randint(2, max_arguments)
    tokens.append(f"[{draw.choice(OPERATORS)}")
    for _ in range(children):
        _grow(draw, tokens, depth + 1, max_depth, max_arguments, limit)
    tokens.append("X")
    if len(tokens) >= limit:
        raise _TooLong


def normalise(text: str) -> str:
    """The tokens of an expression in the published notation, `( ( [MAX 2 ) 9 ) ]`: no parentheses, X for the bracket."""
    return " ".join("X" if token == "]" else token for token in text.split() if token not in "()")


def value(text: str) -> int:
    """Value of an expression in tokens, from left to right with a stack.

    Raises:
        ConfigurationError: the expression is not one.
    """
    stack: list[tuple[str, list[int]]] = [("", [])]
    for token in text.split():
        if token.startswith("["):
            if token[1:] not in OPERATORS:
                raise ConfigurationError(f"unknown operator {token[1:]!r}; allowed: {', '.join(OPERATORS)}")
            stack.append((token[1:], []))
        elif token == "X" and len(stack) > 1 and stack[-1][1]:
            name, numbers = stack.pop()
            stack[-1][1].append(_apply(name, numbers))
        elif len(token) == 1 and token.isdigit():
            stack[-1][1].append(int(token))
        else:
            raise ConfigurationError(f"token {token!r} has no place in the expression {text[:80]!r}")
    if len(stack) != 1 or len(stack[0][1]) != 1:
        raise ConfigurationError(f"no single, closed expression: {text[:80]!r}")
    return stack[0][1][0]


def _apply(name: str, numbers: list[int]) -> int:
    if name == "MED":
        ordered, middle = sorted(numbers), len(numbers) // 2
        return ordered[middle] if len(numbers) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return {"MIN": min, "MAX": max, "SM": lambda values: sum(values) % 10}[name](numbers)


def encode(text: str, max_length: int = 2048) -> list[int]:
    """Token ids with the end-of-sequence id appended, `max_length` at most; what is no token becomes `<unk>`."""
    ids = [VOCABULARY.get(token, VOCABULARY["<unk>"]) for token in text.split()]
    return [*ids[: max_length - 1], VOCABULARY["<eos>"]]
