"""A condition as text, for reports."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any


def text_of(condition: Callable[..., Any]) -> str:
    """The body of a lambda, or the name of a function."""
    name = getattr(condition, "__name__", type(condition).__name__)
    if name != "<lambda>":
        return name
    try:
        source = inspect.getsource(condition)
    except (OSError, TypeError):
        return "a lambda"
    text = source[source.find("lambda") :]
    for end in range(len(text), 0, -1):  # what follows the lambda belongs to the call that it is an argument of
        try:
            tree = ast.parse(text[:end].strip(), mode="eval").body
        except SyntaxError:
            continue
        if isinstance(tree, ast.Lambda):
            return ast.unparse(tree.body)
    return "a lambda"
