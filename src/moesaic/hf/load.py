"""Loading a local Hugging Face model without network, noise or surprises."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesaic.hf.added_bias import restore_bias
from moesaic.hf.modules import moe_layers
from moesaic.hf_config import names_experts, read_config_json, text_part

TINY = Path(__file__).parents[1] / "assets" / "tiny"  # the trained model that is shipped
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

# `from_pretrained` then tells which weights are missing, and which are of other sizes, which it else only logs
TELLING: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_model(folder: str | Path = TINY) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that `save_pretrained` wrote, in eval mode; the shipped model unless one is named.

    Offline; runs no code of the folder. A selection bias that moesaic had added is read back with it.

    Raises ValueError, in one line, for a folder that is missing, holds no model, no MoE model, no tokenizer, or weights
    that are damaged, incomplete or of other sizes than its config says.
    """
    folder = Path(folder)
    model = load_moe(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder}: no tokenizer there: add its tokenizer.json and tokenizer_config.json")
    from transformers import AutoTokenizer

    with quietly():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **HERE)
        except Exception as error:  # as in load_network
            raise ValueError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from None
    return model.eval(), tokenizer


def load_moe(folder: Path) -> Any:
    """The MoE model of a folder, without its tokenizer. ValueError as of `load_model`."""
    check_is_moe(folder)
    model = load_network(folder)
    try:
        moe_layers(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    restore_bias(model)
    return model


def load_network(folder: Path, **options: Any) -> Any:
    """The model of a folder, dense or not, with all of its weights. Offline; runs no code of the folder. ValueError
    where they are damaged, incomplete or of other sizes than its config says."""
    from transformers import AutoConfig

    with quietly():
        try:
            auto = auto_class(AutoConfig.from_pretrained(folder, **HERE))
            model, found = auto.from_pretrained(folder, **TELLING, **HERE, **options)
        except Exception as error:  # transformers, safetensors and torch each raise their own kinds
            raise ValueError(f"{folder}: the model cannot be loaded ({first_line(error)})") from None
    _check_weights(folder, found)
    return model


def auto_class(config: Any) -> Any:
    """transformers' class that makes the model of a config: of text alone, or where there is none one that sees too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _check_weights(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the config of their folder or are not all there."""
    if misfits := sorted(found["mismatched_keys"]):
        name, in_file, by_config = misfits[0]
        raise ValueError(
            f"{folder}: {name} is {list(in_file)} in the weights and {list(by_config)} by config.json"
            f"{', and others differ too' if misfits[1:] else ''}: give the config.json of these weights"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder}: weights are incomplete, {len(missing)} are missing, such as {missing[0]}")


def check_is_moe(folder: Path) -> None:
    """Refuse from config.json alone what is no MoE model: a dense one may take minutes to load."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}: give the folder of a Hugging Face model{_how_to_get(folder)}")
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: not a model folder: it has no config.json: give the folder of a Hugging Face model"
        )
    given = text_part(read_config_json(folder))
    if not names_experts(given):
        kind = given.get("model_type", "unknown")
        raise ValueError(f"{folder}: not an MoE model: the config of this {kind!r} model names no experts")


def _how_to_get(folder: Path) -> str:
    looks_like_hub = len(folder.parts) == 2 and not folder.parent.exists()  # owner/name
    return f"; nothing is downloaded here: hf download {folder} --local-dir FOLDER" if looks_like_hub else ""


@contextmanager
def quietly() -> Iterator[None]:
    """`quiet_transformers`, and no warnings either."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines below errors; put back as they were afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
