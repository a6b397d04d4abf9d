"""LoadMonitor writes down what every expert got, for any loop and for the Trainer, and never disturbs training."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train_bias_balance import rows, run, small_model, without_bias
from torch import nn

import moesaic as ms
from moesaic.hf.modules import moe_layers
from moesaic.train.monitor.run_log import read_log

E, K, T = 6, 2, 40


class Experts(nn.Module):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        del top_k_index, top_k_weights
        return hidden_states


class Block(nn.Module):
    """A stand-in MoE layer that hands the ids it is given to its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Module(), Experts()
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(E))

    def forward(self, ids):
        return self.experts(torch.zeros(len(ids), 1), ids, torch.ones(ids.shape))


class Model(nn.Module):
    """Two of them, the second with ids turned by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, ids):
        self.a(ids)
        return self.b((ids + 1) % E)


def draw(count: int = T) -> torch.Tensor:
    return torch.rand(count, E).argsort(dim=1)[:, :K]


def counted(ids: torch.Tensor) -> list[int]:
    return torch.bincount(ids.flatten(), minlength=E).tolist()


def test_a_line_holds_what_the_ids_of_its_steps_say(tmp_path):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path, every=3, loads=True, total_steps=6).attach(model)
    given = [draw() for _ in range(7)]
    for number, ids in enumerate(given):
        model(ids)
        model.a.gate.e_score_correction_bias[2] += 0.5
        monitor.step(torch.tensor(float(number)))
    monitor.detach()
    log = read_log(tmp_path)
    assert [(line["step"], line["steps"], line["loss"]) for line in log.steps] == [(3, 3, 1.0), (6, 3, 4.0)]
    assert log.end["step"] == 7
    assert [layer["name"] for layer in log.layers] == ["a", "b"]
    assert log.header["total_steps"] == 6
    for line, ids in zip(log.steps, (torch.cat(given[:3]), torch.cat(given[3:6])), strict=True):
        loads = np.array([counted(ids), counted((ids + 1) % E)])
        relative = np.sort(loads / loads.mean(1, keepdims=True), axis=1)
        assert line["load"] == loads.tolist()
        assert line["tokens"] == [3 * T] * 2  # K was seen, not read in a config, of which there is none
        assert line["max_vio"] == pytest.approx(relative[:, -1] - 1, abs=1e-4)
        places = np.array([0, 25, 50, 75, 90, 95, 100]) / 100 * (E - 1)
        for found, row in zip(line["percentiles"], relative, strict=True):
            assert found == pytest.approx(np.interp(places, range(E), row), abs=1e-4)
        assert line["hottest"] == loads.argmax(1).tolist()
        assert line["coldest"] == loads.argmin(1).tolist()
        assert line["dead"] == (loads == 0).sum(1).tolist()
        assert all(low <= high for low, high in line["chance"])
    biases = [line["bias"] for line in log.steps]
    assert biases == [[[0.0, 1.5, 0.25], [0.0, 0.0, 0.0]], [[0.0, 3.0, 0.5], [0.0, 0.0, 0.0]]]


def test_the_last_step_has_a_line_whatever_every_says(tmp_path):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path, every=10, loads=True, total_steps=25).attach(model)
    given = [draw() for _ in range(25)]
    for ids in given:
        model(ids)
        monitor.step()
    monitor.detach()
    log = read_log(tmp_path)
    assert [(line["step"], line["steps"]) for line in log.steps] == [(10, 10), (20, 10), (25, 5)]
    assert log.steps[-1]["load"][0] == counted(torch.cat(given[20:]))
    assert log.finished


@pytest.mark.parametrize("stopped_at", [None, 4])
def test_a_trainers_last_step_has_a_line_also_where_it_stops_early(tmp_path, stopped_at):
    class Stop(ms.BiasBalance.__base__):
        def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002 (the Trainer's signature)
            control.should_training_stop |= state.global_step == stopped_at

    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, max_steps=5, per_device_train_batch_size=2,
    )  # fmt: skip
    callbacks = [ms.LoadMonitor(tmp_path / "run", every=3), Stop()]
    Trainer(model=small_model(), args=args, train_dataset=rows(64), callbacks=callbacks).train()
    log, last = read_log(tmp_path / "run"), stopped_at or 5
    assert [(line["step"], line["steps"]) for line in log.steps] == [(3, 3), (last, last - 3)]
    assert (log.end["step"], log.finished) == (last, stopped_at is None)


def test_biases_of_the_best_checkpoint_are_not_taken_for_the_last_steps(tmp_path):
    class Stop(ms.BiasBalance.__base__):
        def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002 (the Trainer's signature)
            control.should_training_stop |= state.global_step == 4

    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="steps", save_steps=1, logging_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, disable_tqdm=True, max_steps=5,
        dataloader_pin_memory=False, per_device_train_batch_size=2,
    )  # fmt: skip
    callbacks = [ms.BiasBalance(0.5), ms.LoadMonitor(tmp_path / "run", every=3), Stop()]
    trainer = Trainer(model=small_model(), args=args, train_dataset=rows(64), eval_dataset=rows(4), callbacks=callbacks)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    before, last = read_log(tmp_path / "run").steps
    assert (before["step"], last["step"]) == (3, 4)
    assert all(bias is not None for bias in before["bias"])
    assert all(bias is None for bias in last["bias"])
    assert all(tokens is not None for tokens in last["tokens"])


def test_layers_without_tokens_have_no_numbers_rather_than_healthy_ones(tmp_path):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path).attach(model)
    model.a(draw())
    model.eval()
    model(draw())  # evaluation
    model.train()
    monitor.step()
    line = read_log(tmp_path).steps[0]
    assert line["loss"] is None
    for name in ("tokens", "percentiles", "max_vio", "chance", "dead", "hottest", "coldest"):
        assert line[name][0] is not None
        assert line[name][1] is None
    model(draw())
    monitor.step()
    assert read_log(tmp_path).steps[1]["tokens"] == [T, T]  # K of the second layer is known by now
    monitor.detach()


def test_in_the_trainer_lines_hold_the_load_and_bias_of_bias_balance_and_the_logged_loss(tmp_path):
    class Kept(ms.BiasBalance):
        def on_optimizer_step(self, args, state, control, **kwargs):
            super().on_optimizer_step(args, state, control, **kwargs)
            routers = [layer.router for layer in moe_layers(kwargs["model"])]
            seen.append(
                ([x.tolist() for x in self.load.values()], [r.e_score_correction_bias.clone() for r in routers])
            )

    seen, losses = [], {}

    class Losses(ms.BiasBalance.__base__):
        def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
            losses.update({state.global_step: logs["loss"]} if "loss" in logs else {})

    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="no", logging_steps=2, disable_tqdm=True,
        dataloader_pin_memory=False, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    data = rows(64)
    callbacks = [ms.LoadMonitor(tmp_path / "run", loads=True), Kept(0.01), Losses()]
    Trainer(model=small_model(), args=args, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks).train()
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log.steps] == [1, 2, 3, 4, 5]
    assert [line["load"] for line in log.steps] == [load for load, _ in seen]
    for line, (_, biases) in zip(log.steps, seen, strict=True):
        expected = [[float(b.min()), float(b.max()), float(b.mean())] for b in biases]
        assert line["bias"] == [pytest.approx(each, abs=1e-6) for each in expected]
    assert {line["step"]: line["loss"] for line in log.steps if line["loss"] is not None} == losses
    assert set(losses) == {2, 4}
    assert log.end["step"] == log.header["total_steps"] == 5
    assert log.header["model"] == "DeepseekV3ForCausalLM"


def test_training_is_the_same_bit_for_bit_with_and_without_it(tmp_path):
    plain, watched = small_model(), small_model()
    run(plain, ms.BiasBalance(0.01), tmp_path / "a")
    run(watched, ms.BiasBalance(0.01), tmp_path / "c")
    watched = small_model()
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path / "b"), use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-3, per_device_train_batch_size=2, max_steps=3,
    )  # fmt: skip
    callbacks = [ms.BiasBalance(0.01), ms.LoadMonitor(tmp_path / "run", trackers=[Fake()])]
    Trainer(model=watched, args=args, train_dataset=rows(64), callbacks=callbacks).train()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert len(read_log(tmp_path / "run").steps) == 3


def test_a_trainer_that_resumes_goes_on_in_the_log_where_its_checkpoint_is(tmp_path):
    def training(steps: int, **options):
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5} | options
        monitor = ms.LoadMonitor(tmp_path / "run", loads=True)
        from transformers import Trainer, TrainingArguments

        args = TrainingArguments(
            str(tmp_path / "out"), use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True,
            dataloader_pin_memory=False, max_steps=steps, per_device_train_batch_size=2, **options,
        )  # fmt: skip
        return Trainer(model=small_model(), args=args, train_dataset=rows(64), callbacks=[monitor])

    training(5).train()
    first = read_log(tmp_path / "run").steps
    training(6).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    text = (tmp_path / "run" / "load.jsonl").read_text()
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log.steps] == [1, 2, 3, 4, 5, 6]
    assert (log.header["total_steps"], log.total) == (5, 6)  # it may be to be longer now
    assert log.steps[:4] == first[:4]
    assert text.count('"kind":"resume","step":4') == 1
    with pytest.raises(ValueError, match=r"holds 6 steps of an earlier run: name another folder, or use resume=True"):
        training(5).train()
    assert (tmp_path / "run" / "load.jsonl").read_text() == text


def test_a_trainer_that_finds_its_batch_size_begins_its_log_again(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Small(Trainer):
        def training_step(self, *args, **kwargs):
            if self._train_batch_size == 8 and self.state.global_step == 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().training_step(*args, **kwargs)

    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", max_steps=4,
        disable_tqdm=True, dataloader_pin_memory=False, per_device_train_batch_size=8, auto_find_batch_size=True,
    )  # fmt: skip
    balance, monitor = ms.BiasBalance(0.01), ms.LoadMonitor(tmp_path, loads=True)
    trainer = Small(model=small_model(), args=args, train_dataset=rows(64), callbacks=[balance, monitor])
    trainer.train()
    steps = read_log(tmp_path).steps
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    n_tokens = trainer._train_batch_size * len(rows(1)[0]["input_ids"])
    assert trainer._train_batch_size < 8
    assert {sum(load) for line in steps for load in line["load"]} == {n_tokens * 4}
    assert {int(load.sum()) for load in balance.load.values()} == {n_tokens * 4}
    with pytest.raises(ValueError, match="holds 4 steps of an earlier run"):
        trainer.train()


def test_a_trainer_that_failed_does_not_begin_its_log_again(tmp_path):
    """Only a smaller batch tells that it ran out of memory."""
    from transformers import Trainer, TrainingArguments

    class Failing(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise RuntimeError("a sample is broken")
            return super().training_step(*args, **kwargs)

    args = TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", max_steps=4,
        disable_tqdm=True, dataloader_pin_memory=False, per_device_train_batch_size=2, auto_find_batch_size=True,
    )  # fmt: skip
    monitor = ms.LoadMonitor(tmp_path)
    trainer = Failing(model=small_model(), args=args, train_dataset=rows(8), callbacks=[monitor])
    with pytest.raises(RuntimeError, match="a sample is broken"):
        trainer.train()
    with pytest.raises(ValueError, match="holds 2 steps of an earlier run"):
        trainer.train()
    assert [line["step"] for line in read_log(tmp_path).steps] == [1, 2]


def test_a_log_that_could_not_be_begun_again_is_not_resumed_later(tmp_path):
    monitor, args = ms.LoadMonitor(tmp_path), SimpleNamespace(auto_find_batch_size=True)
    for batch_size, model in ((8, Model()), (4, torch.nn.Linear(2, 2))):
        state = SimpleNamespace(max_steps=4, global_step=0, train_batch_size=batch_size)
        with contextlib.suppress(ValueError):  # of the second: not an MoE model
            monitor.on_train_begin(args, state, None, model=model)
    assert not monitor.resume


def test_a_run_of_ones_own_goes_on_after_a_step(tmp_path):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path).attach(model)
    for _ in range(4):
        model(draw())
        monitor.step()
    monitor._release()  # as a kill does
    monitor = ms.LoadMonitor(tmp_path).attach(model, step=2)
    model(draw())
    monitor.step()
    monitor.detach()
    assert [line["step"] for line in read_log(tmp_path).steps] == [1, 2, 3]
    with pytest.raises(ValueError, match="is the log of another model"):
        ms.LoadMonitor(tmp_path).attach(small_model(), step=2)


@pytest.mark.parametrize(("ended", "after"), [(True, 7), (False, 6)])
def test_resume_without_a_step_goes_on_after_all_that_the_log_has(tmp_path, ended, after):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path, every=3).attach(model)
    for _ in range(7):
        model(draw())
        monitor.step()
    monitor.detach() if ended else monitor._release()  # as a kill does
    before = (tmp_path / "load.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"holds {after} steps of an earlier run: .* use resume=True to go on after"):
        ms.LoadMonitor(tmp_path, every=3).attach(model)
    monitor = ms.LoadMonitor(tmp_path, every=3, resume=True).attach(model)
    for _ in range(2):
        model(draw())
        monitor.step()
    monitor.detach()
    assert (tmp_path / "load.jsonl").read_bytes().startswith(before)
    log = read_log(tmp_path)
    assert (log.resumed["step"], log.end["step"]) == (after, after + 2)
    assert [(line["step"], line["steps"]) for line in log.steps] == [(3, 3), (6, 3), *[(9, 2)] * ended]
    ms.LoadMonitor(tmp_path / "new", resume=True).attach(model).detach()
    assert (read_log(tmp_path / "new").done, read_log(tmp_path / "new").resumed) == (0, None)


def test_a_run_that_goes_on_before_its_first_line_says_so_too(tmp_path):
    ms.LoadMonitor(tmp_path, every=10).attach(Model())._release()  # as a kill does
    monitor = ms.LoadMonitor(tmp_path, every=10, total_steps=30).attach(Model(), step=5)
    monitor.detach()
    log = read_log(tmp_path)
    assert (log.resumed["step"], log.resumed["total_steps"], log.steps) == (5, 30, [])


def test_a_loss_that_the_trainer_does_not_log_after_all_costs_no_line(tmp_path):
    class State:
        global_step, max_steps, train_batch_size = 0, 3, 1

    class Control:
        should_log = True

    model, state = Model(), State()
    monitor = ms.LoadMonitor(tmp_path)
    monitor.on_train_begin(None, state, Control(), model=model)
    for state.global_step in (1, 2, 3):
        model(draw())
        monitor.on_step_end(None, state, Control())
    monitor.on_train_end(None, state, Control())
    assert [line["step"] for line in read_log(tmp_path).steps] == [1, 2, 3]


def collapse(model, monitor, steps: int) -> None:
    for _ in range(steps):
        model(torch.tensor([[0, 1]]).expand(T, K))
        monitor.step()


def test_alerts_go_to_the_log_and_to_stderr_once_also_over_a_resumption(tmp_path, capsys):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path).attach(model)
    collapse(model, monitor, 45)
    monitor.step(float("nan"))
    monitor._release()  # as a kill does
    monitor = ms.LoadMonitor(tmp_path).attach(model, step=46)
    collapse(model, monitor, 25)
    monitor.step(1.0)
    monitor.detach()
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "moesaic: step 20: a collapsed: 2 of 6 experts carry 99 % of the load of 20 steps",
        "moesaic: step 20: b collapsed: 2 of 6 experts carry 99 % of the load of 20 steps",
        "moesaic: step 46: the loss is not finite",
        "moesaic: step 72: the loss is finite again",
    ]
    log = read_log(tmp_path)
    assert [f"moesaic: step {line['step']}: {line['message']}" for line in log.alerts] == told
    assert set(log.active) == {("collapsed", "a"), ("collapsed", "b")}
    assert log.steps[45]["loss"] == "nan"
    assert math.isnan(float(log.steps[45]["loss"]))


def test_who_is_told_can_be_chosen(tmp_path, capsys):
    told = []
    model = Model()
    monitor = ms.LoadMonitor(tmp_path, on_alert=told.append).attach(model)
    collapse(model, monitor, 20)
    monitor.detach()
    assert [(alert.kind, alert.layer) for alert in told] == [("collapsed", "a"), ("collapsed", "b")]
    assert capsys.readouterr().err == ""


def test_the_trainers_filter_of_losses_does_not_hide_gradients_that_are_not_finite(tmp_path):
    class State:
        global_step = 1

    model = Model()
    monitor = ms.LoadMonitor(tmp_path, on_alert=lambda _alert: None).attach(model)
    for _ in range(3):
        monitor.on_log(None, State(), None, logs={"loss": 1.0, "grad_norm": float("nan")})
    monitor.detach()
    assert list(read_log(tmp_path).active) == [("gradient", None)]


class Fake:
    """As trackio, wandb, or a run of theirs."""

    def __init__(self) -> None:
        self.seen = []

    def log(self, data, step=None):
        self.seen.append((step, data))


class Writer:
    """As TensorBoard's SummaryWriter."""

    def __init__(self) -> None:
        self.seen = {}

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.seen[tag, global_step] = scalar_value

    def log(self, *_):
        raise AssertionError("add_scalar comes first")


def test_trackers_of_both_kinds_get_every_line_as_curves(tmp_path):
    fake, writer, model = Fake(), Writer(), Model()
    monitor = ms.LoadMonitor(tmp_path, every=2, trackers=[fake, writer]).attach(model)
    for loss in (4.0, 2.0, 1.0, float("inf")):
        model.a(draw())
        model.a.gate.e_score_correction_bias[0] += 0.25
        monitor.step(loss)
    monitor.detach()
    lines = read_log(tmp_path).steps
    assert [step for step, _ in fake.seen] == [2, 4]
    for (step, numbers), line in zip(fake.seen, lines, strict=True):
        assert numbers.pop("moe/loss") == float(line["loss"])
        assert numbers == {
            "moe/a/max_vio": line["max_vio"][0], "moe/a/dead": line["dead"][0],
            "moe/a/bias_mean": line["bias"][0][2], "moe/a/bias_range": line["bias"][0][1],
            "moe/b/bias_mean": 0.0, "moe/b/bias_range": 0.0,
            "moe/max_vio": line["max_vio"][0], "moe/dead": line["dead"][0],
        }  # fmt: skip
        assert {name: writer.seen[name, step] for name in numbers} == numbers


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tmp_path, capsys):
    class Broken:
        def log(self, *_args, **_kwargs):
            raise ConnectionError("no network")

    fake, model = Fake(), Model()
    monitor = ms.LoadMonitor(tmp_path, trackers=[Broken(), fake]).attach(model)
    for _ in range(2):
        model(draw())
        monitor.step()
    monitor.detach()
    assert capsys.readouterr().err == (
        "moesaic: a tracker failed and gets no more numbers: ConnectionError('no network')\n"
    )
    assert len(fake.seen) == len(read_log(tmp_path).steps) == 2


def test_a_disk_that_fills_up_ends_the_log_and_not_the_training(tmp_path, capsys, monkeypatch):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path).attach(model)
    model(draw())
    monitor.step()

    def full(_line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor._log, "write", full)
    for _ in range(3):
        model(draw())
        monitor.step()
    monitor.detach()
    assert capsys.readouterr().err.count("cannot be written any more (No space left on device), the log ends") == 1
    assert len(read_log(tmp_path).steps) == 1


def test_a_bias_that_is_added_after_the_log_began_is_in_it_and_the_log_goes_on_with_it(tmp_path):
    model = without_bias().train()
    monitor = ms.LoadMonitor(tmp_path).attach(model)
    balance = ms.BiasBalance(0.01, add_bias=True).attach(model)
    ids = torch.randint(0, 64, (2, 12))
    for watching in (monitor, ms.LoadMonitor(tmp_path, resume=True)):
        if watching is not monitor:
            watching.attach(model)
        model(input_ids=ids)
        balance.step()
        watching.step()
        watching.detach()
    biases = [json.loads(line).get("bias") for line in (tmp_path / "load.jsonl").read_text().splitlines()]
    steps = [bias for bias in biases if bias]
    assert [[least, most] for least, most, _ in steps[0]] == [[-0.01, 0.01]] * len(moe_layers(model))
    assert len(steps) == 2
    balance.detach()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0 writes nothing: use 1 or more steps a line"),
        ({"total_steps": 0}, "total_steps=0 is no length of training: use 1 or more"),
        ({"trackers": ["tensorboard"]}, r"trackers: a str has neither add_scalar\(tag, value, step\) nor log"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ms.LoadMonitor(tmp_path, **arguments)


def test_what_cannot_work_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(.+\): name another file or folder"):
        ms.LoadMonitor(tmp_path / "file" / "run")
    monitor = ms.LoadMonitor(tmp_path / "run")
    with pytest.raises(ValueError, match="attached to no model: call attach"):
        monitor.step()
    with pytest.raises(ValueError, match="not an MoE model"):
        monitor.attach(nn.Linear(2, 2))
    assert not (tmp_path / "run" / "load.jsonl").exists()


def test_nothing_is_left_on_a_model_that_is_detached(tmp_path):
    model = Model()
    monitor = ms.LoadMonitor(tmp_path).attach(model)
    balance = ms.BiasBalance(0.01).attach(model)
    monitor.detach()
    model(draw())
    balance.step()
    assert all(load.sum() == T * K for load in balance.load.values())  # the other goes on counting
    balance.detach()
    monitor.detach()
    assert not model._forward_pre_hooks
    assert not model.a.experts._forward_pre_hooks
    assert len((tmp_path / "load.jsonl").read_text().splitlines()) == 2  # begin and end


def test_a_bias_that_is_not_finite_is_written_as_strict_json(tmp_path):
    model = Model()
    model.a.gate.e_score_correction_bias[1] = float("nan")
    monitor = ms.LoadMonitor(tmp_path, on_alert=lambda _alert: None).attach(model)
    model(draw())
    monitor.step()
    monitor.detach()
    assert json.loads((tmp_path / "load.jsonl").read_text().splitlines()[1])["bias"][0] == [None, None, None]
