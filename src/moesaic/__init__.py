"""See, train and scale Mixture-of-Experts routing in PyTorch."""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module it lives in; nothing is imported before it is used (PEP 562)
_HOMES = {
    "BalanceLoss": "moesaic.train.balance_loss",
    "BiasBalance": "moesaic.train.bias_balance",
    "DeepseekV3MoE": "moesaic.layer.moe",
    "ExpertSpec": "moesaic.engine.spec",
    "ExpertWeights": "moesaic.types",
    "Experts": "moesaic.layer.experts",
    "LoadMonitor": "moesaic.train.monitor.load_monitor",
    "MoE": "moesaic.layer.moe",
    "MoEConfig": "moesaic.config",
    "MoEGate": "moesaic.article",
    "Router": "moesaic.layer.router",
    "Routing": "moesaic.types",
    "attach": "moesaic.hf.attach",
    "coselection": "moesaic.trace.statistics.coselection",
    "diff": "moesaic.trace.compare.diff",
    "domain_preference": "moesaic.trace.statistics.preference",
    "join": "moesaic.trace.join",
    "load": "moesaic.trace.file.reader",
    "record": "moesaic.trace.recording.record",
    "replay": "moesaic.trace.reroute.replay",
    "route": "moesaic.rules",
    "stability": "moesaic.trace.statistics.stability",
    "stats": "moesaic.trace.statistics.stats",
    "steps": "moesaic.trace.rule.steps",
    "upcycle": "moesaic.hf.upcycle",
    "what_if": "moesaic.trace.reroute.what_if",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOMES, *(name for name in globals() if name.startswith("__"))})
