"""What a foreign record is read against: sizes that it does not hold itself, from a config, a preset or a number."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.config import MoEConfig
from moesaic.families import ALIASES, PRESETS, rule_of
from moesaic.hf_config import read_config_json, text_part
from moesaic.trace.file.limits import MOST_EXPERTS

MOST_LAYERS = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model behind a record.

    config: of its MoE layers; None where only the number of experts is known. layers: numbers of the decoder layers
    that have experts, n_layers: how many there are with the dense ones; None where nothing says so.
    """

    n_experts: int
    config: MoEConfig | None = None
    layers: tuple[int, ...] | None = None
    n_layers: int | None = None
    model: str = ""

    @property
    def top_k(self) -> int | None:
        return None if self.config is None else self.config.num_experts_per_tok

    def config_of(self, top_k: int) -> MoEConfig:
        """The config of a layer whose tokens hold `top_k` ids: the given one, or one that knows sizes only."""
        if self.config is not None:
            return self.config
        return MoEConfig.of_sizes(1, self.n_experts, top_k)


def read_target(config: str | None = None, experts: int | None = None) -> Target:
    """From `config` (a preset's name, a config.json, or the folder of a Hugging Face model) or `experts` alone.

    A family whose rule is not known here gives its sizes only.
    """
    if (config is None) == (experts is None):
        raise ValueError(
            "the largest id in a record is not the number of experts: give --config (a preset, a config.json or a "
            "model folder) or --experts, one of them"
        )
    if experts is not None:
        _check_experts(experts)
        return Target(n_experts=experts)
    assert config is not None
    path = Path(config)
    if config in PRESETS and not path.exists():
        found = MoEConfig.preset(config)
        return Target(n_experts=found.n_routed_experts, config=found, model=config)
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(
            f"--config {config}: neither a file, nor a folder with a config.json, nor a preset ({', '.join(PRESETS)})"
        )
    return _of_dict(read_config_json(file), file)


def _of_dict(given: dict[str, Any], file: Path) -> Target:
    try:
        config = MoEConfig.of_sizes(*_sizes(given)) if _names_no_rule(given) else MoEConfig.from_hf(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    _check_experts(config.n_routed_experts)
    model = given.get("_name_or_path") or file.resolve().parent.name
    return Target(
        n_experts=config.n_routed_experts,
        config=config,
        layers=moe_layer_numbers(text_part(given)),
        n_layers=_number_of_layers(text_part(given)),
        model=Path(model).name if isinstance(model, str) else "",
    )


def moe_layer_numbers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Numbers of the decoder layers that have experts, as a Hugging Face config says it; None where it does not.

    Source: the decoder layers of transformers 5.23 (first_k_dense_replace and moe_layer_freq of DeepSeek,
    decoder_sparse_step and mlp_only_layers of Qwen, num_dense_layers of LFM2, mlp_layer_types of the newer ones).
    """
    count = _number_of_layers(config)
    if count is None:
        return None
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and len(kinds) == count:
        return tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
    first = config.get("first_k_dense_replace", config.get("num_dense_layers", 0))
    every = config.get("moe_layer_freq", 1)
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if isinstance(every, list) and len(every) == count:
        return tuple(i for i, has_experts in enumerate(every) if has_experts)
    if not all(type(number) is int and number >= 0 for number in (first, every, step)) or not isinstance(dense, list):
        return None
    every, step = max(every, 1), max(step, 1)
    return tuple(i for i in range(first, count) if i % every == 0 and (i + 1) % step == 0 and i not in dense)


def _number_of_layers(config: Mapping[str, Any]) -> int | None:
    count = config.get("num_hidden_layers")
    return count if type(count) is int and 0 < count <= MOST_LAYERS else None


def _names_no_rule(given: dict[str, Any]) -> bool:
    """Whether `from_hf` would refuse the family because nothing says how it routes."""
    inner = text_part(given)
    return bool(inner.get("model_type")) and (
        rule_of(inner["model_type"]) is None and not {"scoring_func", "topk_method"} <= inner.keys()
    )


def _sizes(given: dict[str, Any]) -> tuple[int, int, int]:
    """(hidden size, experts, experts per token) by any of their names."""
    inner, found = text_part(given), []
    for field in ("n_routed_experts", "num_experts_per_tok"):
        name = next((alias for alias in ALIASES[field] if inner.get(alias) is not None), None)
        if name is None:
            raise ValueError(f"no {', '.join(ALIASES[field])} there: not the config of an MoE model; give --experts")
        found.append(inner[name])
    return inner.get("hidden_size", 1), found[0], found[1]


def _check_experts(experts: int) -> None:
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(f"{experts} experts: use 1 to {MOST_EXPERTS}")
