"""Registers with Transformers when Transformers loads its models, so that `import gptoss_kernels` costs nothing.

Transformers' attention registry lives in `transformers.modeling_utils`, which takes seconds to import and imports
Triton on its way; Triton must not be imported before a notebook's first cell has chosen interpreter or GPU.
"""

import importlib.abc
import sys
from collections.abc import Callable


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the other finders find `name`, and calls `action` once its code has run."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader) -> None:
        run = loader.exec_module

        def exec_module(module):
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.action()

        loader.exec_module = exec_module


def after_import(name: str, action: Callable[[], None]) -> None:
    """Calls `action()` now if the module `name` is imported already, otherwise right after its first import."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))
