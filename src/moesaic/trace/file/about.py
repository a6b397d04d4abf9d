"""What is no tensor in a trace file: a trace as JSON, and untrusted JSON as fields of Trace (docs: trace-format)."""

from collections.abc import Mapping
from typing import Any

from moesaic.config import MoEConfig, digest_of
from moesaic.strict_json import is_count
from moesaic.trace.file.limits import MOST_EXPERTS, MOST_PER_TOKEN, MOST_TEXT, check_seed
from moesaic.trace.store import ORIGINS, Trace

DTYPES = ("float64", "float32", "float16", "bfloat16")
FIELDS = {"layers", "configs", "missing", "labels", "pieces", "dtypes", "model", "seed", "versions"}


def about(trace: Trace) -> dict[str, Any]:
    """All that is not a tensor, as the JSON of the header. Equal configs are written once."""
    distinct = list(dict.fromkeys(trace.configs))
    layers = zip(trace.layers, trace.configs, trace.origins, strict=True)
    fields = [config.to_dict() for config in distinct]
    return {
        "layers": [{"name": name, "config": distinct.index(c), "origin": origin} for name, c, origin in layers],
        "configs": [{"hash": digest_of(each), "fields": each} for each in fields],
        "missing": trace.missing,
        "labels": trace.labels,
        "pieces": None if trace.pieces is None else {str(number): text for number, text in trace.pieces.items()},
        "dtypes": dict(trace.dtypes),
        "model": trace.model,
        "seed": trace.seed,
        "versions": dict(trace.versions),
    }


def fields_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Trace that are no tensors."""
    if about.keys() != FIELDS:
        odd = min(about.keys() ^ FIELDS)
        raise ValueError(f"about {'lacks' if odd in FIELDS else 'has an unknown'} {odd[:40]!r}")
    configs = [_config(entry) for entry in _listed(about["configs"], "configs")]
    names, per_layer, origins = [], [], []
    for entry in _listed(about["layers"], "layers"):
        if not isinstance(entry, dict) or entry.keys() != {"name", "config", "origin"}:
            raise ValueError("a layer is not described by name, config and origin")
        if not is_count(entry["config"]) or entry["config"] >= len(configs):
            raise ValueError(f"a layer names config {str(entry['config'])[:20]!r}: there are {len(configs)}")
        if entry["origin"] not in ORIGINS:
            raise ValueError(f"a layer has the origin {str(entry['origin'])[:20]!r}: use one of {', '.join(ORIGINS)}")
        names.append(_text(entry["name"], "the name of a layer"))
        per_layer.append(configs[entry["config"]])
        origins.append(entry["origin"])
    if not names:
        raise ValueError("there is no layer in it")
    if len(set(names)) < len(names):
        raise ValueError("two layers have the same name")
    sizes = {(config.n_routed_experts, config.num_experts_per_tok) for config in per_layer}
    if len(sizes) > 1:
        raise ValueError("its layers differ in experts or experts per token")
    (n_experts, k), *_ = sizes
    if n_experts > MOST_EXPERTS or k > MOST_PER_TOKEN:
        raise ValueError(f"{k} of {n_experts} experts a token: at most {MOST_PER_TOKEN} of {MOST_EXPERTS} are read")
    check_seed(about["seed"])
    labels = about["labels"]
    return {
        "layers": tuple(names),
        "configs": tuple(per_layer),
        "origins": tuple(origins),
        "missing": tuple(_text(name, "a missing layer") for name in _listed(about["missing"], "missing")),
        "labels": None if labels is None else tuple(_text(label, "a label") for label in _listed(labels, "labels")),
        "pieces": _pieces(about["pieces"]),
        "dtypes": _dtypes(about["dtypes"]),
        "model": _text(about["model"], "model"),
        "seed": about["seed"],
        "versions": {_text(k, "versions"): _text(v, "versions") for k, v in _object(about["versions"], "versions")},
    }


def _config(entry: object) -> MoEConfig:
    """A config as it was written; a field that was added since has its default."""
    if not isinstance(entry, dict) or entry.keys() != {"hash", "fields"} or not isinstance(entry["fields"], dict):
        raise ValueError("a config is not described by hash and fields")
    try:
        config = MoEConfig(**entry["fields"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"a config is not lawful ({str(error)[:200]})") from None
    if entry["hash"] != (due := digest_of(entry["fields"])):
        raise ValueError(f"a config has the hash {str(entry['hash'])[:20]!r}, its fields give {due!r}")
    return config


def _pieces(given: object) -> dict[int, str] | None:
    if given is None:
        return None
    found = {}
    for number, text in _object(given, "pieces"):
        if not (number.isascii() and number.isdigit()) or len(number) > 18 or str(int(number)) != number:
            raise ValueError(f"pieces are by vocabulary id, not by {number[:40]!r}")
        found[int(number)] = _text(text, "a piece")
    return found


def _dtypes(given: object) -> dict[str, str]:
    found = dict(_object(given, "dtypes"))
    if found.keys() != {"logits", "weights"} or not set(map(str, found.values())) <= set(DTYPES):
        raise ValueError(f"dtypes must name logits and weights, each one of {', '.join(DTYPES)}")
    return found


def _listed(given: object, what: str) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(f"{what} is not a list")
    return given


def _object(given: object, what: str) -> list[tuple[str, Any]]:
    if not isinstance(given, dict):
        raise ValueError(f"{what} is not a JSON object")
    return list(given.items())


def _text(given: object, what: str) -> str:
    if not isinstance(given, str) or len(given) > MOST_TEXT:
        raise ValueError(f"{what} is not a text of at most {MOST_TEXT} characters")
    return given
