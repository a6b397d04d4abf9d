"""What a training run keeps and shows: the best weights so far, its record, and a progress bar."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from moesaic.hf.modules import moe_layers
from moesaic.trace.shown import finite
from moesaic.train.evaluate import HeldOut
from moesaic.train.run_folder import save_weights, write_record


class KeepBest(TrainerCallback):
    """Judge the model every `every` steps and at the end; write its weights to `folder` at a new best worst margin.

    `record` gets a line of history each time and is written beside the weights, so a run can be taken up again.
    """

    def __init__(self, held_out: HeldOut, folder: Path, record: dict[str, Any], *, every: int) -> None:
        self.held_out = held_out
        self.folder = folder
        self.record = record
        self.every = every

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002 (the Trainer's signature)
        # What came after the checkpoint that training goes on from will come again.
        self.record["history"] = [line for line in self.record["history"] if line["step"] <= state.global_step]
        write_record(self.folder, self.record)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        report = self.held_out.judge(kwargs["model"])
        margins = [line["worst_margin"] for line in self.record["history"] if line["worst_margin"] is not None]
        self.record["history"].append(
            {
                "step": state.global_step,
                "worst_margin": finite(report.worst_margin),
                "loss": {domain: finite(result.loss) for domain, result in report.domains.items()},
                "max_violation": list(report.max_violation.values()),
                "loads": report.loads,
                "bias": biases_of(kwargs["model"]),
            }
        )
        if report.worst_margin > max(margins, default=float("-inf")):
            save_weights(kwargs["model"], self.folder)
            self.record["best_step"] = state.global_step
        write_record(self.folder, self.record)


def biases_of(model: Any) -> dict[str, list[float]]:
    """The selection biases by layer, for the paths that `moesaic compare` draws."""
    biases = {layer.name: layer.bias for layer in moe_layers(model)}
    return {name: [round(b, 6) for b in bias.tolist()] for name, bias in biases.items() if bias is not None}


class ProgressBar(TrainerCallback):
    """Steps done and time left, on stderr, inside `with bar.shown`: that gives the cursor back after Ctrl-C too."""

    def __init__(self, *, disable: bool) -> None:
        remaining = TimeRemainingColumn()
        remaining.max_refresh = None  # else it keeps for half a second what it showed before there was a total: nothing
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            remaining,
        )
        self.shown = Progress(*columns, console=Console(stderr=True), disable=disable)
        self._task = self.shown.add_task("training", total=None)

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        self.shown.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        self.shown.update(self._task, completed=state.global_step)
