"""Modules of ours as one program, for a Python that has none of them.

What runs in a sandbox is sent there, so that an image needs nothing but `/usr/bin/python3`. Such
modules import the standard library and each other, nothing else; a test holds them to it.
"""

from collections.abc import Sequence
from pathlib import Path

_SOURCES = Path(__file__).parents[2]
_PROGRAM = """\
import sys, types
def load(name, text):
    module = sys.modules[name] = types.ModuleType(name)
    if text is None:
        module.__path__ = []
    else:
        exec(compile(text, name, 'exec'), module.__dict__)
    parent, _, last = name.rpartition('.')
    if parent:
        setattr(sys.modules[parent], last, module)
    return module
for name, text in {modules!r}:
    last = load(name, text)
last.main(*{arguments!r})
"""


def program(names: Sequence[str], *arguments: str) -> str:
    """The source of a program that loads modules and calls `main` of the last one.

    Args:
        names: Full names, in an order in which each imports only those before it.
        arguments: What `main` gets.
    """
    parts = (name.split(".") for name in names)
    packages = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
    modules = [
        *((name, None) for name in sorted(packages)),
        *((name, text(name)) for name in names),
    ]
    return _PROGRAM.format(modules=modules, arguments=arguments)


def text(name: str) -> str:
    """The source of one module of ours, by its full name."""
    return (_SOURCES / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
