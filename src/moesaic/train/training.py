"""A model from nothing to a folder that plain transformers loads: `moesaic train`, as the shipped one was made."""

import importlib.util
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesaic.hf.load import quiet_transformers
from moesaic.train.data import DOMAINS, corpus
from moesaic.train.evaluate import WINDOW, HeldOut, Report
from moesaic.train.muon import Muon
from moesaic.train.packing import Mixture, token_stream
from moesaic.train.run_folder import fresh_folder, interrupted_run, naming_what_cannot_be_written, write_record
from moesaic.train.schedules import fading
from moesaic.train.sizes import SIZES
from moesaic.train.tokenizer import train_tokenizer
from moesaic.versions import versions

if TYPE_CHECKING:
    from transformers import TrainingArguments


LOGGED = 10  # steps between lines of the log that `moesaic watch` shows
# how a run may be balanced -> the callbacks that do it, from its recipe
BALANCES: dict[str, Callable[["Recipe"], list[Any]]] = {
    "none": lambda _recipe: [],
    "aux": lambda recipe: [_loss(recipe, "switch")],
    "seq": lambda recipe: [_loss(recipe, "sequence")],
    "bias": lambda recipe: [_bias(recipe, "sign")],
    "bias-centred": lambda recipe: [_bias(recipe, "centred")],
    "bias-proportional": lambda recipe: [_bias(recipe, "proportional")],
}


def _bias(recipe: "Recipe", rule: str) -> Any:
    from moesaic.train.bias_balance import BiasBalance

    return BiasBalance(fading(recipe.bias_speed), rule=rule)


def _loss(recipe: "Recipe", kind: str) -> Any:
    from moesaic.train.balance_loss import BalanceLoss

    return BalanceLoss(kind, recipe.loss_alpha)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast to train. A batch of 10 windows holds 3 + 3 + 1 + 3 of the four domains."""

    steps: int = 2600
    batch_size: int = 10
    learning_rate: float = 1.2e-2
    warmup_steps: int = 100
    balance: str = "bias"  # a name in BALANCES
    bias_speed: float = 1e-3
    loss_alpha: float = 1e-2
    evaluate_every: int = 200
    held_out_windows: int = 40  # of each domain, while training; the final report takes all

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "held_out_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} trains nothing: use 1 or more")
        for name in ("bias_speed", "loss_alpha", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not positive: {getattr(Recipe, name)} is the recipe's own"
                )
        if self.balance not in BALANCES:
            raise ValueError(f"balance={self.balance!r} is unknown: use {', '.join(BALANCES)}")
        if self.batch_size % 10:
            raise ValueError(
                f"batch_size={self.batch_size} does not hold whole windows of every domain: use a multiple of 10"
            )


def train(
    out: Path | str | None = None,
    *,
    size: str | None = None,
    seed: int = 0,
    resume: Path | str | None = None,
    recipe: Recipe | None = None,
    progress: bool = False,
) -> Report:
    """Train a model of this size (tiny unless given) and write it to the new folder `out`; returns how it does on all
    held-out text.

    `out` receives config.json, model.safetensors, tokenizer.json, tokenizer_config.json and training.json. Weights are
    those of the evaluation with the best worst-domain margin, stored as float16 and loaded as float32; the correction
    bias is float32 throughout. It runs on one thread: the same seed gives the same weights. `resume` names
    the folder of an interrupted run: it goes on there from its last checkpoint, with its own seed and recipe, whatever
    `out`, `seed` and `recipe` say. `progress` shows a bar on stderr.

    Raises ValueError for an `out` that is not empty, for a `resume` that is not a run, has finished or is of another
    size, for a folder that cannot be written, also later when its disk is full, and without accelerate;
    FileNotFoundError for a `resume` that is not there.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("training needs the package accelerate: pip install 'moesaic[train]'")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is no seed: use a number from 0 to {2**32 - 1}")
    if size is not None and size not in SIZES:
        raise ValueError(f"size={size!r} is nothing to train: use {' or '.join(SIZES)}")
    if resume is None:
        folder = fresh_folder(out)
        recipe = recipe or Recipe()
        record: dict[str, Any] = {
            "size": size or "tiny",
            "seed": seed,
            "recipe": asdict(recipe),
            "finished": False,
            "history": [],
        }
    else:
        folder, record = Path(resume), interrupted_run(Path(resume), fields=set(Recipe.__dataclass_fields__))
        if size not in (None, record["size"]):
            raise ValueError(f"resume={folder} is a run of size {record['size']}, not {size}: give its own size")
    with quiet_transformers(), _one_thread(), naming_what_cannot_be_written(folder):
        write_record(folder, record)  # from here on it can be resumed, whenever it ends; and the folder is tried
        return _run(folder, record, Recipe(**record["recipe"]), progress=progress)


@contextmanager
def _one_thread() -> Generator[None]:
    """Sums over several threads end in other bits: the weights would depend on the machine. Little speed is lost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, record: dict[str, Any], recipe: Recipe, *, progress: bool) -> Report:
    from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, Trainer, set_seed
    from transformers.trainer_callback import PrinterCallback

    from moesaic.train.checkpoints import Checkpoints, drop_checkpoints, last_checkpoint
    from moesaic.train.keeping import KeepBest, ProgressBar
    from moesaic.train.monitor.load_monitor import LoadMonitor
    from moesaic.train.monitor.run_log import log_path

    started, seed = time.monotonic(), record["seed"]
    set_seed(seed)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(out)
    streams = {domain: token_stream(tokenizer, corpus(domain, "train"), seed=seed) for domain in DOMAINS}
    mixture = Mixture(streams, num_batches=recipe.steps, batch_size=recipe.batch_size, length=WINDOW, seed=seed)
    last = last_checkpoint(out)
    # The Trainer (5.23) restores everything but experts: they lie one by one on disk, and it skips names it misses.
    model = (
        DeepseekV3ForCausalLM(SIZES[record["size"]]()) if last is None else DeepseekV3ForCausalLM.from_pretrained(last)
    )
    keep = KeepBest(HeldOut(tokenizer, max_windows=recipe.held_out_windows), out, record, every=recipe.evaluate_every)
    balances = BALANCES[recipe.balance](recipe)
    if last is None:  # killed before the first checkpoint: what it did is done again
        log_path(out).unlink(missing_ok=True)
    monitor = LoadMonitor(out, every=LOGGED, loads=True)
    checkpoints, bar = Checkpoints(out), ProgressBar(disable=not progress)
    trainer = Trainer(
        model=model,
        args=_arguments(out, seed, recipe),
        train_dataset=mixture,
        optimizers=(Muon(model, lr=recipe.learning_rate), None),
        callbacks=[*balances, monitor, keep, checkpoints, bar],
    )
    trainer.remove_callback(PrinterCallback)
    with bar.shown, checkpoints.saving_on_interrupt(), closing(*balances, monitor):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if checkpoints.interrupted and trainer.state.global_step < recipe.steps:
        raise KeyboardInterrupt(f"after step {trainer.state.global_step}")

    kept = "best_step" in record
    report = HeldOut(tokenizer).judge(AutoModelForCausalLM.from_pretrained(out)) if kept else None
    if report is None or not math.isfinite(report.worst_margin):  # too large for float16, in which they are kept
        raise ValueError(
            f"{out}: training diverged: no weights of it have a loss that is a number: start anew with a lower "
            "learning_rate, bias_speed or loss_alpha"
        )
    minutes = (time.monotonic() - started) / 60
    write_record(out, record | _results(report, record, recipe, minutes) | {"parameters": model.num_parameters()})
    drop_checkpoints(out)
    return report


@contextmanager
def closing(*watchers: Any) -> Generator[None]:
    """Detach them at the end: the Trainer tells no callback of an error."""
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.detach()


def _arguments(out: Path, seed: int, recipe: Recipe) -> "TrainingArguments":
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        train_sampling_strategy="sequential",  # the Mixture is in order already
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=1.0,
        save_steps=recipe.evaluate_every,
        seed=seed,
        use_cpu=True,
        report_to="none",
        logging_steps=LOGGED,
        disable_tqdm=True,
    )


def _results(report: Report, record: dict[str, Any], recipe: Recipe, minutes: float) -> dict[str, Any]:
    """What training.json says of a finished run; minutes are those since it was started or last resumed."""
    size, seed = record["size"], record["seed"]
    return {
        "finished": True,
        "command": f"moesaic train {size} --seed {seed} --steps {recipe.steps} --balance {recipe.balance} --out DIR",
        "versions": versions("transformers", "tokenizers", "accelerate"),
        "threads": torch.get_num_threads(),
        "minutes": round(minutes, 1),
        "tokens_seen": recipe.steps * recipe.batch_size * WINDOW,
        "held_out": {domain: result._asdict() | {"margin": result.margin} for domain, result in report.domains.items()},
        "loss": report.loss,
        "max_violation": report.max_violation,
        "unused": report.unused,
        "specialisation": report.specialisation,
    }
