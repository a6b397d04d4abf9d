"""A whole model that generates under every experts implementation in turn: prefill and decoding as a user waits for
them, attention and head included."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.bench.timing import Entrant, Spread, interleave, spread
from moesaic.hf.attach import attach
from moesaic.hf.experts import NAME
from moesaic.hf.load import HERE, first_line, quietly

REFERENCE = "eager"  # transformers' definition
# of |logits - eager's| / |eager's|: in 16 bits a token near a tie reaches other experts than under eager, in everybody
ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class Generating(NamedTuple):
    """What one implementation took, in seconds; None where it is wrong or failed, as `note` says.

    step: of decoding, one token of every row.  difference: of its logits from eager's, relative, in the 2-norm.
    """

    name: str
    prefill: Spread | None = None
    step: Spread | None = None
    difference: float | None = None
    note: str = ""


class Script:
    """Hears every step of `generate`, its time and its logits, and lets everybody write the same `tokens` [B, N]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.at: list[float] = []
        self.logits: list[Tensor] = []
        self.begun = time.perf_counter()

    def __call__(self, _ids: Tensor, logits: Tensor) -> Tensor:
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.at.append(time.perf_counter())
        self.logits.append(logits)
        return torch.full_like(logits, -torch.inf).scatter_(1, self.tokens[:, len(self.at) - 1, None], 0.0)

    @property
    def prefill(self) -> float:
        return self.at[0] - self.begun

    @property
    def step(self) -> float:
        return (self.at[-1] - self.at[0]) / (len(self.at) - 1)


def compare_generating(
    model: Any,
    tokens: Tensor,
    new: int,
    peers: Sequence[str],
    rounds: int = 5,
    done: Callable[[int, str], None] = lambda _runs, _name: None,
) -> list[Generating]:
    """Let `model` read `tokens` [B, T] but for the last `new`, and write those, under "moesaic" and each peer in turn.

    The model's own `generate` runs, with its cache, and writes what is given: everybody does the same work. The logits
    of all steps are compared with eager's first; who differs by more than rounding, or fails, has no speed. The model
    is left under the implementation that it came with. Returned are ours, then the peers. `done` hears of every run,
    (rounds + 1) for each and one of eager.

    Raises ValueError where ours cannot serve the model or tokens are too few.
    """
    if not 2 <= new < tokens.shape[1]:
        raise ValueError(f"{new} of {tokens.shape[1]} tokens to write: 2 or more are needed, and one to read before")
    settings, before = model.generation_config, getattr(model.config, "_experts_implementation", None)
    ends, settings.eos_token_id = settings.eos_token_id, None

    def write(name: str) -> Script:
        model.set_experts_implementation(name)
        read, script = tokens[:, :-new], Script(tokens[:, -new:])
        mask = torch.ones_like(read)
        model.generate(read, attention_mask=mask, logits_processor=[script], max_new_tokens=new, do_sample=False)
        done(1, name)
        return script

    try:
        attach(model)
        return _in_turn(write, list(dict.fromkeys([NAME, *peers])), rounds, ALLOWED[model.dtype])
    finally:
        settings.eos_token_id = ends
        model.set_experts_implementation(before)


def _in_turn(write: Callable[[str], Script], names: Sequence[str], rounds: int, allowed: float) -> list[Generating]:
    truth = write(REFERENCE)
    found = {name: _first(write, name, truth, allowed) for name in names}
    runs: dict[str, list[Script]] = {name: [] for name in names if not found[name].note}
    entrants = [Entrant(name, _nothing, lambda name=name: runs[name].append(write(name))) for name in runs]
    interleave(entrants, dict.fromkeys(runs, rounds))
    for name, scripts in runs.items():
        prefill, step = spread([run.prefill for run in scripts]), spread([run.step for run in scripts])
        found[name] = found[name]._replace(prefill=prefill, step=step)
    return list(found.values())


def _first(write: Callable[[str], Script], name: str, truth: Script, allowed: float) -> Generating:
    """The first run of somebody is not timed but judged."""
    try:
        script = write(name)
    except Exception as error:  # an implementation may raise anything
        return Generating(name, note=f"failed: {first_line(error)}")
    logits, wanted = torch.stack(script.logits), torch.stack(truth.logits)
    difference = float((logits - wanted).norm() / wanted.norm())
    wrong = f"wrong: logits differ from eager's by {difference:.1e}, allowed is {allowed:.0e}"
    return Generating(name, difference=difference, note="" if difference <= allowed else wrong)


def _nothing() -> None:
    """To switch the implementation is no part of a run: the clock of a Script begins after it."""


def random_model(folder: Path, layers: int | None, dtype: torch.dtype | None = None) -> Any:
    """The model of a config.json with random weights, and with its first `layers` only where that is given.

    ValueError where the config cannot be read or made into a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with quietly():
        try:
            config = AutoConfig.from_pretrained(folder, **HERE)
            text = config.get_text_config()
            whole = text.num_hidden_layers
            for name, value in list(vars(text).items()) if layers is not None else ():
                if isinstance(value, list) and len(value) == whole:
                    setattr(text, name, value[:layers])  # a kind for each layer
            text.num_hidden_layers = whole if layers is None else min(layers, whole)
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        except Exception as error:  # transformers raises many kinds
            raise ValueError(f"{folder}: no model can be made of its config.json ({first_line(error)})") from None
