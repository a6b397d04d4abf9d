"""Watching what every expert gets while a model trains: a line a step in a log, with chance bands and alerts."""

import hashlib
import shlex
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import moesaic
from moesaic.config import MoEConfig, digest_of
from moesaic.hf.modules import MoELayer, moe_layers, unwrapped, with_sizes
from moesaic.train.counting import LoadCounter
from moesaic.train.monitor.alerts import Alert, Judge
from moesaic.train.monitor.lines import FORMAT, VERSION
from moesaic.train.monitor.numbers import load_numbers, read_biases
from moesaic.train.monitor.run_log import LogWriter, check_writable, log_path, open_log
from moesaic.train.monitor.trackers import Send, scalars, sender
from moesaic.train.ranks import is_first_rank, shared
from moesaic.versions import versions


def tell(alert: Alert) -> None:
    """One line on stderr."""
    sys.stderr.write(f"moesaic: step {alert.step}: {alert.message}\n")


class LoadMonitor(TrainerCallback):
    """Logs step by step how the load spreads over experts, for `moesaic watch` to show, and gives alerts.

        Trainer(..., callbacks=[ms.LoadMonitor("runs/mine")])   # of transformers

        monitor = ms.LoadMonitor("runs/mine").attach(model)     # a loop of your own
        for batch in batches:
            ...
            optimizer.step()
            balance.step()                                      # where there is one, before it
            monitor.step(loss)
        monitor.detach()

    Counted is what `BiasBalance` counts: training forwards, without padding and recomputation, over all micro-batches
    and ranks; steps that a GradScaler skipped count here too. Only rank 0 writes. The log is JSON lines
    (docs/en/monitoring.md), each written out at once, so that a kill costs the last one at most.

    path: a folder, or a file that ends in .jsonl.
    every: steps a line; its load is the sum of theirs. The last step has a line too: that of total_steps, and under the
        Trainer wherever it stops; of a loop that is left before, `end` says at which step.
    loads: also write every expert's load as integers (for strips of experts over time).
    resume: go on with a log that holds steps. Without it that is refused, but for training that goes on after a step
        N > 0, which needs no word. The log goes on after the step that training does, and later lines are cut off: that
        of a checkpoint under the Trainer, `attach(model, step=N)` in a loop of your own, else the log's last.
    trackers: TensorBoard writers, and modules or runs with `log(numbers, step=)` (trackio, W&B), which get curves.
    on_alert: who is told of alerts, beside the log; stderr unless given.
    total_steps: what `moesaic watch` reckons the end by, in a loop of your own; the Trainer knows.
    group: the data-parallel process group; all ranks unless given.

    Raises ValueError for a path that cannot be written, for the log of another model, and for a model without MoE. What
    goes wrong later (a full disk, a tracker that fails) is told on stderr once, and training goes on without it.
    """

    def __init__(
        self,
        path: Path | str,
        every: int = 1,
        *,
        loads: bool = False,
        resume: bool = False,
        trackers: Sequence[Any] = (),
        on_alert: Callable[[Alert], None] = tell,
        total_steps: int | None = None,
        group: Any = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} writes nothing: use 1 or more steps a line")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps} is no length of training: use 1 or more")
        self.path, self.every, self.loads, self.resume = log_path(path), every, loads, resume
        self.on_alert, self.total_steps, self.group = on_alert, total_steps, group
        self._senders: list[Send] = [sender(tracker) for tracker in trackers]
        if is_first_rank():
            check_writable(self.path)
        self.steps = 0
        self._counter: LoadCounter | None = None
        self._layers: list[MoELayer] = []
        self._rules: list[MoEConfig] = []
        self._chosen: dict[str, int] | None = None  # how many experts a token was given when the rules were made
        self._log: LogWriter | None = None
        self._judge: Judge | None = None
        self._batch_size = 0  # the Trainer's, when it began last
        self._written = 0  # the step of the last line
        self._losses: list[Any] = []  # since then
        self._pending: tuple[int, int, list[np.ndarray], list[Any]] | None = None

    # a loop of your own

    def attach(self, model: nn.Module, *, step: int | None = None) -> "LoadMonitor":
        """Count the model's training forwards from now on.

        step: how many were done before, in a run that goes on. Unless given, 0, with resume=True all that the log has.
        """
        self._release()
        self._layers = moe_layers(model)
        header = self._header(model, step or 0)
        after = shared(self._open(header, step) if is_first_rank() else None)
        if isinstance(after, str):
            raise ValueError(after)
        self._counter = LoadCounter(model, self._layers, training=True)
        self._uncount = weakref.finalize(self, self._counter.remove)  # hooks keep the model alive
        self.steps = self._written = after
        self._losses, self._pending, self._chosen = [], None, None
        return self

    def step(self, loss: float | Tensor | None = None) -> None:
        """An optimizer step is done. Call it after each, on every rank; with a BiasBalance, after its step.

        loss: of this step. A tensor is not waited for before a line is written.
        """
        if self._counter is None:
            raise ValueError("this LoadMonitor is attached to no model: call attach(model) before the first forward")
        self.steps += 1
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if self._line_is_due():
            self._take()
        self._write()

    def detach(self) -> None:
        """The run has come to its end: say so in the log, close it, and take the counting off the model."""
        if self._counter is not None:
            self._write()
            self._put({"kind": "end", "step": self.steps, "time": round(time.time(), 3)})
        self._release()

    # transformers' Trainer

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002 (the Trainer's signature)
        self.total_steps = state.max_steps if state.max_steps > 0 else self.total_steps
        # out of memory: it begins again with a smaller batch, so the lines that its own log has are none of another run
        again = self._counter is not None and args.auto_find_batch_size and state.train_batch_size < self._batch_size
        given, self.resume, self._batch_size = self.resume, self.resume or again, state.train_batch_size
        try:
            self.attach(kwargs["model"], step=state.global_step)
        finally:
            self.resume = given

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        self._write()
        self.steps = state.global_step
        if self._line_is_due():
            self._take()
        if not control.should_log:  # else its loss comes next
            self._write()

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        if self._counter is None or not logs:
            return
        if "loss" in logs:
            self._losses.append(float(logs["loss"]))
        if self._judge is not None and "grad_norm" in logs:
            self._say(self._judge.add_gradient(state.global_step, float(logs["grad_norm"])))
        self._write()

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if self._counter is not None and self.steps > self._written:
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            # the biases are that checkpoint's by now; all ranks come here, which nobody knows of a loop that failed
            self._take(with_biases=not best)
        self.detach()

    # inside

    def _line_is_due(self) -> bool:
        return self.steps % self.every == 0 or self.steps == self.total_steps

    def _take(self, *, with_biases: bool = True) -> None:
        """What was counted and where the biases are, on every rank, since both may be shared."""
        assert self._counter is not None
        parts = list(self._counter.take(self.group).values())
        flat = torch.cat(parts).cpu().numpy()  # one transfer
        ends = [0, *accumulate(len(part) for part in parts)]
        loads = [flat[start:end] for start, end in pairwise(ends)]
        biases = read_biases([layer.home if with_biases else None for layer in self._layers])
        self._pending = (self.steps, self.steps - self._written, loads, biases)
        self._written = self.steps

    def _write(self) -> None:
        """Write the line that waits, judge, and tell."""
        if self._pending is None or self._counter is None:
            return
        (step, steps, loads, biases), self._pending = self._pending, None
        losses, self._losses = self._losses, []
        if self._judge is None:  # not the rank that writes
            return
        loss = float(np.mean([float(each) for each in losses])) if losses else None
        rules = self._rules_now(self._counter.chosen)
        line = {"kind": "step", "step": step, "steps": steps, "time": round(time.time(), 3), "loss": _as_json(loss)}
        line |= load_numbers(loads, rules) | {"bias": biases}
        if self.loads:
            line["load"] = [load.astype(np.int64).tolist() for load in loads]
        self._put(line)
        self._send(line, loss)
        if loss is not None:
            self._say(self._judge.add_loss(step, loss))
        verdict, alerts = self._judge.add(step, steps, loads, rules, biases)
        if verdict:
            self._put(verdict)
        self._say(alerts)

    def _rules_now(self, chosen: Mapping[str, int]) -> list[MoEConfig]:
        """The rule of each layer, with the K that it really chose, which not every config says."""
        if chosen != self._chosen:
            given = [(layer.config, chosen.get(layer.name)) for layer in self._layers]
            rules = [config if k is None else with_sizes(config, k) for config, k in given]
            alike = dict(zip(rules, rules, strict=True))  # one object for equal rules: they are asked for every step
            self._rules, self._chosen = [alike[rule] for rule in rules], dict(chosen)
        return self._rules

    def _say(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            self._put(alert.line())
            self.on_alert(alert)

    def _put(self, line: Mapping[str, Any]) -> None:
        if self._log is None:
            return
        try:
            self._log.write(line)
        except OSError as error:
            why = f"cannot be written any more ({error.strerror}), the log ends"
            sys.stderr.write(f"moesaic: {self.path}: {why}\n")
            with suppress(OSError):  # it tries to write what is left
                self._log.close()
            self._log = None

    def _send(self, line: Mapping[str, Any], loss: float | None) -> None:
        if not self._senders:
            return
        numbers = scalars(line, [layer.name for layer in self._layers])
        numbers |= {} if loss is None else {"moe/loss": loss}
        for send in tuple(self._senders):
            try:
                send(numbers, line["step"])
            except Exception as error:  # of a stranger's code, over a network maybe: no reason to stop training
                sys.stderr.write(f"moesaic: a tracker failed and gets no more numbers: {error!r}\n")
                self._senders.remove(send)

    def _open(self, header: dict[str, Any], step: int | None) -> int | str:
        """Open the log and take up what it says: the step that it goes on after, or the reason where that cannot be."""
        try:
            self._log, before = open_log(self.path, header, step=step, resume=self.resume)
        except (ValueError, OSError) as error:
            return str(error)
        step = before.done if step is None else step
        if before.steps or step:
            resumed = {"kind": "resume", "step": step, "time": header["time"]}
            self._put(resumed | {name: header[name] for name in ("total_steps", "command", "versions")})
        begun = before.header["layers"]
        self._judge = Judge({layer["name"]: layer["bias"] for layer in begun}, list(before.active))
        return step

    def _header(self, model: nn.Module, step: int) -> dict[str, Any]:
        rows = zip(self._layers, read_biases([layer.home for layer in self._layers]), strict=True)
        layers = [
            {"name": x.name, "experts": x.config.n_routed_experts, "config": _digest(x.config), "bias": bias}
            for x, bias in rows
        ]
        configs = " ".join(f"{layer['name']}={layer['config']}" for layer in layers)
        return {
            "kind": "run", "format": FORMAT, "version": VERSION, "time": round(time.time(), 3),
            "model": type(unwrapped(model)).__name__, "config": hashlib.sha256(configs.encode()).hexdigest()[:12],
            "after": step, "total_steps": self.total_steps, "every": self.every,
            "command": shlex.join([_program(sys.argv[0]), *sys.argv[1:]]),
            "versions": versions("transformers"),
            "layers": layers,
        }  # fmt: skip

    def _release(self) -> None:
        if self._counter is not None:
            self._uncount()
        if self._log is not None:
            self._log.close()
        self._counter = self._log = self._judge = self._pending = None


def _digest(config: MoEConfig) -> str:
    """Of what stays the same where a layer is given a selection bias: that is no other model."""
    changed = ("topk_method", "group_score", "n_group", "topk_group")
    return digest_of({name: value for name, value in config.to_dict().items() if name not in changed})


def _program(path: str) -> str:
    """How it was called: ours by its name, wherever it is installed; another script as it was given."""
    return "moesaic" if Path(path).parent == Path(moesaic.__file__).parent or Path(path).name == "moesaic" else path


def _as_json(loss: float | None) -> float | str | None:
    """Strict JSON has no NaN; Python's float() reads these words again."""
    return loss if loss is None or np.isfinite(loss) else str(loss)
