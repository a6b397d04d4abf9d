"""The folder of a training run: what lies in it, and when one may be written to or taken up again."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.train.checkpoints import drop_checkpoints, write_whole
from moesaic.train.sizes import SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "training.json"


def save_weights(model: "PreTrainedModel", folder: Path) -> None:
    """Save config.json and model.safetensors: parameters rounded to float16, buffers (the correction bias) as they are.

    Halves the file. float16 rather than bfloat16: the weights are far from its range, and it keeps 3 bits more.
    config.json says float32, so that `from_pretrained` computes in float32 unless it is told otherwise.
    """
    saved = set(model.state_dict())
    state = {name: value for name, value in model.named_buffers() if name in saved}
    state |= {name: value.detach().half() for name, value in model.named_parameters()}  # tied weights once
    use_cache, model.config.use_cache = model.config.use_cache, True  # the Trainer turns it off; users generate
    part = folder / "weights.part"
    model.save_pretrained(part, state_dict=state)
    model.config.use_cache = use_cache
    for file in sorted(part.iterdir()):  # one move each: an interruption leaves whole files
        file.replace(folder / file.name)
    part.rmdir()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write training.json in one move, so that an interruption leaves the old one or the new one."""
    write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")


@contextmanager
def naming_what_cannot_be_written(folder: Path) -> Generator[None]:
    """One ValueError for what a full disk raises: OSError, and errors of torch and Rust that say it in words only."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # without one: transformers, of what it reads
            reason = error.strerror
        elif "inline_container" in str(error):  # torch's writer of archives, which does not pass the reason on
            reason = "disk full?"
        elif "(os error " in str(error):  # safetensors and tokenizers
            reason = str(error)
        else:
            raise
        raise ValueError(
            f"{folder} cannot be written ({reason}): make room or give the right to write, then resume from there; "
            "what was whole is kept"
        ) from error


def fresh_folder(out: Path | str | None) -> Path:
    """Make the folder, or take one that is empty."""
    if out is None:
        raise ValueError("out=None: name a new folder to train into, or an interrupted run to resume")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: name a new folder")
    try:
        if out.is_dir() and any(path.name != f"{RECORD}.part" for path in out.iterdir()):  # of a kill at once
            raise ValueError(f"out={out} is not empty: name a new folder, or use --resume to continue a run")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}): name another folder") from None
    return out


def interrupted_run(folder: Path, *, fields: set[str]) -> dict[str, Any]:
    """The record of a run that can be taken up again: with a seed, a history, and a recipe of these `fields`."""
    if not folder.exists():
        raise FileNotFoundError(
            f"resume={folder} does not exist: give the folder of an interrupted `moesaic train` run"
        )
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        recipe = record["recipe"]
        is_run = isinstance(recipe, dict) and all(isinstance(line, dict) for line in record["history"])
        is_run = is_run and isinstance(record["seed"], int) and record["size"] in SIZES
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        is_run, record, recipe = False, {}, {}
    if not is_run:
        raise ValueError(
            f"resume={folder} is not a run of `moesaic train` (no readable {RECORD}): give the folder of one, or start "
            "anew with --out"
        )
    missing, unknown = sorted(fields - recipe.keys()), sorted(recipe.keys() - fields)
    if missing or unknown:  # defaults may not be what that version did, and other weights would come of it
        lacks = [f"lacks {', '.join(missing)}"] if missing else []
        has = [f"has {', '.join(map(repr, unknown))}, not known here"] if unknown else []
        raise ValueError(
            f"resume={folder} is a run of another version: its recipe {' and '.join(lacks + has)}: go on with the "
            "moesaic that began it, or start anew with --out"
        )
    if record.get("finished"):
        drop_checkpoints(folder)  # where a kill came between the finished record and their end
        raise ValueError(f"resume={folder} has finished after {record['recipe']['steps']} steps: nothing is left to do")
    return record
