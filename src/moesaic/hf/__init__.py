"""Hugging Face models: their MoE layers, loading, weights in and out, and the experts seam.

Importing this package makes "moesaic" an experts implementation of transformers:
`AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moesaic")`.

transformers is not imported for that: where it is not there yet, the entry is made in the moment that it is. Its
module of experts takes 2.7 s to import on top of torch (two cores, 2026-11), and whoever reads a trace needs nothing
of it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

# module of transformers -> the table in it that names experts implementations
_TABLES = {
    "transformers.integrations.moe": "ALL_EXPERTS_FUNCTIONS",
    "transformers.integrations.finegrained_fp8": "ALL_FP8_EXPERTS_FUNCTIONS",  # ours refuses FP8, with the reason
}


def _register(module: ModuleType) -> None:
    from moesaic.hf.experts import NAME, experts_forward

    getattr(module, _TABLES[module.__name__]).register(NAME, experts_forward)


class _RegisterOnImport(MetaPathFinder):
    """Leaves the import of a module with a table to the other finders, and registers when it is done."""

    def __init__(self) -> None:
        self._waiting = set(_TABLES) - sys.modules.keys()

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name not in self._waiting:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)
            self._waiting.discard(name)  # not before: a search may go without an import, and an import fail

        spec.loader.exec_module = execute_and_register
        return spec


for _name in _TABLES.keys() & sys.modules.keys():
    _register(sys.modules[_name])
sys.meta_path.insert(0, _RegisterOnImport())
