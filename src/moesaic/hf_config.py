"""The config.json of a Hugging Face model: read from its file, and its fields by our names."""

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from moesaic.families import ALIASES, FAMILIES, FIXED, GATE_SIZES, ROUTING
from moesaic.strict_json import parsed

MOST_BYTES = 64 << 20  # the largest published ones hold some 100 KiB


def read_config_json(path: Path) -> dict[str, Any]:
    """What the config.json of a model folder, or such a file by itself, says. Every reader of one comes here.

    Raises ValueError, in one line that begins with the path, where there is none, or where it is no JSON object or
    gives a key twice. NaN and Infinity are let through: transformers writes them.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file}: more than {MOST_BYTES >> 20} MiB: not the config.json of a model")
        text = file.read_bytes()
    except FileNotFoundError:
        what = "not a model folder: it has no config.json" if path.is_dir() else "no such file or folder"
        raise ValueError(f"{path}: {what}: give a model folder or a config.json") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    given = parsed(text, str(file), constants=True)
    if not isinstance(given, dict):
        raise ValueError(f"{file}: not a JSON object: give the config.json of a model")
    return given


def read_family(source: Any, known: set[str]) -> dict[str, Any]:
    """The fields in `known` that a Hugging Face config, or a plain object or dict like one, sets."""
    given = {name: value for name, value in text_part(source).items() if value is not None}
    model_type = given.get("model_type", "")
    if not names_experts(given):
        raise ValueError(
            f"model_type={model_type!r} has no experts (no {', '.join(ALIASES['n_routed_experts'])}): not an MoE model"
        )
    if model_type in ROUTING:
        rules, read = ROUTING[model_type]
    elif model_type and model_type not in FAMILIES and not {"scoring_func", "topk_method"} <= given.keys():
        raise ValueError(
            f"model_type={model_type!r} is not a family known here and its config has no scoring_func and topk_method: "
            f"build MoEConfig(...) by hand, or use one of {', '.join(FAMILIES)}"
        )
    else:
        rules, read = FAMILIES.get(model_type, {}), known - set(FIXED.get(model_type, ()))
    fields = {**rules, **_given(given, {*read, *GATE_SIZES})}
    if missing := {"hidden_size", "num_experts_per_tok"} - set(fields):
        raise ValueError(f"{min(missing)} is missing from the config: add it")
    if rules.get("routed_scaling_factor") == "1/K":
        k = fields["num_experts_per_tok"]
        fields["routed_scaling_factor"] = 1 / k if isinstance(k, Integral) and k else 1.0  # MoEConfig refuses another K
    return fields


def text_part(source: Any) -> dict[str, Any]:
    """What a Hugging Face config says of its text model: its `text_config`, unless it names experts beside that."""
    given = _as_dict(source)
    inner = given.get("text_config")
    has_parts = isinstance(inner, Mapping) or hasattr(inner, "to_dict")
    return _as_dict(inner) if has_parts and not names_experts(given) else given


def names_experts(given: Mapping[str, Any]) -> bool:
    """Whether a config says, by any of its names, that there are experts."""
    return any(given.get(name) for name in ALIASES["n_routed_experts"])


def _given(given: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """What a config sets of these fields, whatever it calls them."""
    found = {name: next((a for a in ALIASES.get(name, (name,)) if a in given), None) for name in names}
    return {name: given[alias] for name, alias in found.items() if alias is not None}


def _as_dict(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if hasattr(source, "to_dict"):
        return source.to_dict()
    return {name: getattr(source, name) for name in dir(source) if not name.startswith("_")}
