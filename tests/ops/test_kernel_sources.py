"""What kernels' sources must not have, as some Triton that they are for does not take it."""

import ast

import pytest

from ops.test_devices import SOURCES, decorators


def builtin_extremes(source: str) -> list[int]:
    """Lines of jitted functions that call Python's own `min` or `max`."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and "triton.jit" in decorators(function):
            calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
            found += [x.lineno for x in calls if isinstance(x.func, ast.Name) and x.func.id in ("min", "max")]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_constants_are_compared_by_conditions(path):
    """Triton 3.5 makes operations of `min` and `max`, whose results are no constants."""
    assert not builtin_extremes(path.read_text(encoding="utf-8"))


def test_what_calls_them_is_found():
    kernel = "@triton.jit\ndef f(x):\n    return x\n\n\n@triton.jit\ndef g(x, D: tl.constexpr):\n    C = min(D, 64)\n"
    assert builtin_extremes(kernel) == [8]
