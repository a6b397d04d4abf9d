"""The conformance suite: its definition, what it takes, and what it says of our gate."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken_gates import ZeroFill
from cases import v3
from hypothesis import given
from hypothesis import strategies as st
from oracles import route_one
from sound_gate import SoundGate
from torch import nn

import moesaic as ms
from moesaic.config import MoEConfig
from moesaic.conformance import PROBES, as_gate, assert_conforms, check
from moesaic.conformance.asking import CLEAR, clear_logits
from moesaic.conformance.definition import decide
from moesaic.conformance.verdict import NotApplicable
from moesaic.families import PRESETS
from moesaic.layer.router import Router
from moesaic.rules import route

SMALL = MoEConfig(
    hidden_size=40, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
)


def router_of(preset: str) -> Router:
    n_experts = MoEConfig.preset(preset).n_routed_experts
    return Router(MoEConfig.preset(preset, hidden_size=n_experts + 8))


@pytest.mark.parametrize("preset", PRESETS)
def test_our_router_passes_both_levels_for_every_preset(preset):
    report = check(router_of(preset))
    assert [str(result) for result in report.failed()] == []
    asked = [result for result in report.results if result.outcome == "pass"]
    assert len(asked) >= 24
    assert ("too-many" in {result.probe.id for result in asked}) == (report.gate.config.n_group > 1)
    assert report.conforms


def test_our_router_passes_in_training_mode_bfloat16_and_with_biases_as_released():
    router = Router(SMALL).train()
    with torch.no_grad():
        router.e_score_correction_bias.uniform_(2.0, 12.0)
    assert_conforms(router.bfloat16(), level="fragile")


def test_our_function_passes_too():
    assert_conforms(route_as_function, SMALL, level="fragile")


def route_as_function(logits, bias, config):
    _, weights, ids = route(logits, bias, config)
    return ids, weights


def test_the_old_bug_that_a_convention_keeps_is_found():
    failed = {result.probe.id for result in check(Router(SMALL.with_convention("deepseek-v3-remote"))).failed("wrong")}
    assert "masked-groups" in failed


@given(data=st.data(), n_group=st.sampled_from([1, 2, 4]), k=st.integers(1, 6))
def test_the_definition_agrees_with_the_other_oracle(data, n_group, k):
    numbers = st.floats(-8, 8, allow_nan=False)
    logits, bias = (data.draw(st.lists(numbers, min_size=16, max_size=16)) for _ in range(2))
    kept = max(data.draw(st.integers(1, n_group)), math.ceil(k / (16 // n_group)))
    config = MoEConfig(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=k, n_group=n_group, topk_group=kept, norm_eps=0.0,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    decision = decide(logits, bias, config)
    scores = [1 / (1 + math.exp(-z)) for z in logits]
    expected = route_one(scores, bias, k=k, n_group=n_group, topk_group=kept, counted=2, scale=2.5, norm=True)
    assert decision.experts == list(expected)
    assert decision.weights == pytest.approx(expected, rel=1e-12)


def test_the_margin_says_how_far_the_choice_is_from_another_one():
    config = MoEConfig(hidden_size=4, n_routed_experts=4, num_experts_per_tok=1, n_group=2, topk_group=1)
    near_groups = decide([0.0, -5.0, 0.1, -5.0], None, dataclasses.replace(config, group_score="max"))
    assert near_groups.experts == [2]
    assert near_groups.margin == pytest.approx(1 / (1 + math.exp(-0.1)) - 0.5)
    near_experts = decide([-5.0, -5.0, 0.1, 0.0], None, dataclasses.replace(config, group_score="max"))
    assert near_experts.margin == pytest.approx(near_groups.margin)
    assert decide([1.0, 1.0, 1.0, 1.0], None, config).margin == 0.0
    everything = dataclasses.replace(config, n_group=1, topk_group=1, num_experts_per_tok=4)
    assert decide([1.0, 2.0, 3.0, 4.0], None, everything).margin == math.inf


def test_rows_that_rounding_could_decide_are_not_asked():
    close = [decide(row.tolist(), None, SMALL) for row in clear_logits(SMALL, rows=12, spread=1e-4)]
    assert len(close) == 12
    assert min(decision.margin / max(decision.ranked_by) for decision in close) > CLEAR
    with pytest.raises(NotApplicable, match="no row that would tell"):
        clear_logits(SMALL, spread=0.0)


def test_masked_experts_cannot_be_chosen_whatever_group_mask_says():
    config = MoEConfig(
        hidden_size=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, group_mask="zero"
    )
    assert decide([-1.0, -1.0, -2.0, -2.0], [-3.0] * 4, config).experts == [0, 1]


def gates():
    layer = ms.DeepseekV3MoE(dataclasses.replace(SMALL, moe_intermediate_size=8, n_shared_experts=1))
    classic = ms.MoE.classic(16, 8, 4, num_experts=8, k=2)
    return [
        pytest.param(Router(SMALL), None, id="a router"),
        pytest.param(layer, None, id="a layer"),
        pytest.param(nn.Sequential(nn.Identity(), layer), None, id="a model"),
        pytest.param(classic, None, id="a classic layer"),
        pytest.param(SoundGate(SMALL), SMALL, id="a module and its rule"),
        pytest.param(SoundGate, SMALL, id="a class and its rule"),
        pytest.param(ms.DeepseekV3MoE, dataclasses.replace(SMALL, moe_intermediate_size=8), id="a class of layers"),
        pytest.param(ms.MoEGate, SMALL, id="the article's class"),
        pytest.param(route_as_function, SMALL, id="a function"),
        pytest.param(as_gate(SoundGate, SMALL), None, id="a gate"),
    ]


@pytest.mark.parametrize(("target", "config"), gates())
def test_a_gate_is_taken_as(target, config):
    assert check(target, config, level="wrong").conforms


class Keywords(SoundGate):
    """Built from keyword arguments, [D, E] weight, [B, S, D] alone, older tuple, dense weights."""

    def __init__(self, hidden_size, num_experts, top_k, n_group, topk_group, routed_scaling_factor=1.0):
        config = dataclasses.replace(
            SMALL, hidden_size=hidden_size, n_routed_experts=num_experts, num_experts_per_tok=top_k, n_group=n_group,
            topk_group=topk_group, routed_scaling_factor=routed_scaling_factor,
        )  # fmt: skip
        super().__init__(config)
        self.weight = nn.Parameter(self.weight.data.T.contiguous())

    def logits(self, x):
        with torch.autocast("cpu", enabled=False):
            return x.float() @ self.weight.float()

    def forward(self, x):
        _batch, _sequence, _width = x.shape
        ids, weights = super().forward(x)
        return torch.zeros(len(ids), self.config.n_routed_experts).scatter(1, ids, weights), ids


def test_other_constructors_layouts_and_tuples_are_understood():
    assert_conforms(Keywords, SMALL)


class LogitsAlone(SoundGate):
    def forward(self, x):
        return self.logits(x)


class NeedsIds(SoundGate):
    def forward(self, x, input_ids):  # noqa: ARG002
        return super().forward(x)


class Tempered(SoundGate):
    def forward(self, x):
        ids, weights = super().forward(x)
        return 0.5 * self.logits(x), weights, ids


NOTHING_TO_JUDGE = [
    (nn.Linear(8, 8), None, "not an MoE model"),
    (SoundGate, None, "config=None: a class or a function does not say its rule"),
    (3.0, SMALL, "a float is no gate: give a module, a class or a function"),
    (nn.Linear(8, 8), SMALL, r"Linear holds 0 weights of \[32, 40\]"),
    (nn.Linear(40, 32, bias=False), SMALL, "Linear has no correction bias, a tensor of .32. with 'bias' in its name"),
    (nn.Linear(40, 32), dataclasses.replace(SMALL, topk_method="greedy"), "Linear is no gate: a Tensor came"),
    (LogitsAlone, SMALL, "LogitsAlone is no gate: a Tensor came back"),
    (NeedsIds, SMALL, "NeedsIds needs input_ids beside the hidden states"),
    (Tempered, SMALL, "its logits are not its weight times the hidden states .2 came out as 1"),
    (Router(dataclasses.replace(SMALL, topk_method="balanced")), None, "Router deals tokens out in turn"),
    (SoundGate, dataclasses.replace(SMALL, hidden_size=8), "hidden_size=8 is below n_routed_experts=32"),
]


@pytest.mark.parametrize(("target", "config", "message"), NOTHING_TO_JUDGE)
def test_what_is_no_gate_is_refused_in_one_line(target, config, message):
    with pytest.raises(ValueError, match=message) as error:
        check(target, config)
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="level='bad' is unknown: use one of wrong, fragile"):
        check(SoundGate, SMALL, level="bad")
    with pytest.raises(ValueError, match="allowed='nope' is no probe"):
        assert_conforms(SoundGate, SMALL, allowed=["nope"])


def test_a_gate_whose_rule_is_not_known_is_asked_what_needs_none():
    config = MoEConfig(hidden_size=40, n_routed_experts=32, num_experts_per_tok=4, topk_method="unknown")
    report = check(SoundGate(SMALL), config)
    assert not report.failed()
    asked = {result.probe.id for result in report.results if result.outcome == "pass"}
    assert {"distinct", "shapes", "bad-neighbours", "one-token"} <= asked
    assert not asked & {"definition", "masked-groups", "weight-sum"}
    skipped = next(result for result in report.results if result.probe.id == "definition")
    assert skipped.says.en == "the rule of this gate is not known"
    assert report.conforms is None
    with pytest.raises(
        ValueError, match=r"SoundGate cannot be judged \(the rule of this gate is not known\): give the"
    ):
        assert_conforms(SoundGate(SMALL), config)


def test_a_failure_is_a_verdict_on_a_gate_whose_rule_is_not_known_too():
    unknown = dataclasses.replace(SMALL, topk_method="unknown", n_group=1, topk_group=1)

    def same_four(logits, _bias, _config):
        return torch.zeros(len(logits), 4, dtype=torch.int64), torch.ones(len(logits), 4)

    assert check(same_four, unknown).conforms is False
    with pytest.raises(AssertionError, match="distinct"):
        assert_conforms(same_four, unknown)


def test_a_function_may_work_in_place():
    def gate(logits, bias, config):
        scores = logits.sigmoid_()
        bias -= bias.mean()  # only ranks count
        ids = (scores + bias).topk(config.num_experts_per_tok).indices
        weights = scores.gather(-1, ids)
        return ids, config.routed_scaling_factor * weights / weights.sum(-1, keepdim=True)

    report = check(gate, dataclasses.replace(SMALL, n_group=1, topk_group=1))
    assert [str(result) for result in report.failed("wrong")] == []
    asked = {result.probe.id for result in report.results if result.outcome == "pass"}
    assert {"definition", "gradient", "strides", "bias-gradient"} <= asked


def function_with(spoiled):
    """A gate of logits that is right but for rows that `spoiled` says."""

    def gate(logits, bias, config):
        ids, weights = route_as_function(logits, bias, config)
        bad = spoiled(logits)[:, None]
        return ids.masked_fill(bad, 3), weights

    return gate


@pytest.mark.parametrize(
    ("kind", "spoiled"),
    [
        ("all NaN", lambda z: z.isnan().all(-1)),
        ("one NaN", lambda z: z.isnan().sum(-1) == 1),
        ("+inf", lambda z: z.isposinf().any(-1)),
        ("all -inf", lambda z: z.isneginf().all(-1)),
    ],
)
def test_a_function_is_asked_every_kind_of_bad_row(kind, spoiled):
    failed = {result.probe.id: result for result in check(function_with(spoiled), SMALL).failed()}
    assert failed.keys() == {"bad-rows"}
    assert failed["bad-rows"].says.en == f"{kind}: row 2: expert 3 was chosen 4 times in [3, 3, 3, 3]"


def spread_of(logits):
    return (logits.amax(-1) - logits.amin(-1))[:, None]


def around(level):
    """Rows whose mean lies near a level."""
    return lambda logits, _bias, _config: (logits.mean(-1, keepdim=True) - level).abs() < 5


def biased_around(shift, scale):
    """Every row, where the biases lie around a value and spread as wide as this."""

    def spoiled(logits, bias, _config):
        near = abs(bias.mean().item() - shift) < 1 and scale / 2 < bias.std().item() < 2 * scale
        return torch.full((len(logits), 1), near)

    return spoiled


ASKED = [  # probe, what is spoiled, in which of the probe's cases alone
    ("distinct", "first", lambda z, _bias, _config: (spread_of(z) > 1) & (spread_of(z) < 50)),
    ("distinct", "first", lambda z, _bias, _config: (z == 0).all(-1, keepdim=True)),
    ("distinct", "first", lambda z, _bias, _config: spread_of(z) > 100),
    ("distinct", "first", lambda z, _bias, _config: (z == -60).all(-1, keepdim=True)),
    ("distinct", "first", lambda z, _bias, _config: (z == 60).all(-1, keepdim=True)),
    ("masked-groups", "outside", biased_around(-2.0, 0.05)),
    ("masked-groups", "outside", biased_around(-50.0, 0.05)),
    ("masked-groups", "outside", biased_around(0.0, 0.05)),
    ("masked-groups", "outside", biased_around(50.0, 0.05)),
    ("biased-weight", "weights", biased_around(0.0, 1.0)),
    ("biased-weight", "weights", biased_around(2.0, 1.0)),
    ("biased-weight", "weights", biased_around(-2.0, 1.0)),
    ("underflow", "nan", around(-150.0)),
    ("underflow", "nan", around(-90.0)),
    ("underflow", "nan", around(90.0)),
    ("scaled-once", "outside", lambda z, _b, config: torch.full((len(z), 1), config.routed_scaling_factor == 4.0)),
    ("bad-neighbours", "swapped", lambda z, _b, _c: z.isnan().any().expand(len(z), 1)),
    ("bad-neighbours", "weights", lambda z, _b, _c: z.isnan().any().expand(len(z), 1)),
    ("definition", "weights", lambda z, _b, _c: z.std(-1, keepdim=True) > 4),
    ("definition", "weights", lambda z, _b, _c: z.std(-1, keepdim=True) < 4),
]
SPOILED = {
    "first": lambda ids, weights: (ids[:, :1].expand_as(ids), weights),
    "outside": lambda ids, weights: ((ids + 8 * torch.arange(ids.shape[1])) % 32, weights),
    "swapped": lambda ids, weights: (ids.flip(-1), weights),
    "weights": lambda ids, weights: (ids, 1.1 * weights),
    "nan": lambda ids, weights: (ids, weights * torch.nan),
}


@pytest.mark.parametrize(("probe", "what", "where"), ASKED, ids=[f"{a[0]}-{n}" for n, a in enumerate(ASKED)])
def test_a_probe_asks_each_of_its_cases(probe, what, where):
    """A gate that is right but for one case alone fails the probe."""

    def gate(logits, bias, config):
        ids, weights = route_as_function(logits, bias, config)
        bad = where(logits, bias, config)
        return tuple(torch.where(bad, b, a) for a, b in zip((ids, weights), SPOILED[what](ids, weights), strict=True))

    asked = next(p for p in PROBES if p.id == probe)
    assert asked.judge(as_gate(gate, SMALL)).outcome == "fail"
    assert asked.judge(as_gate(route_as_function, SMALL)).outcome == "pass"


def test_negative_weights_do_not_upset_the_count_of_scales():
    def gate(logits, bias, config):
        ids, weights = route_as_function(logits, bias, config)
        return ids, -weights

    report = check(gate, SMALL)
    assert {"definition", "weight-sum", "underflow"} <= {result.probe.id for result in report.failed()}


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_gates_of_very_few_experts_are_judged_too(experts):
    report = check(ms.Router(MoEConfig(hidden_size=16, n_routed_experts=experts, num_experts_per_tok=1)))
    assert not report.failed("wrong")
    assert report.conforms


def test_a_gate_that_refuses_bad_rows_passes():
    def gate(logits, bias, config):
        if not logits.isfinite().all():
            raise ValueError("not finite")
        return route_as_function(logits, bias, config)

    assert_conforms(gate, SMALL, level="fragile")


def test_asserting_names_every_failure_with_its_numbers_and_lets_the_allowed_pass():
    with pytest.raises(AssertionError) as error:
        assert_conforms(ZeroFill, SMALL)
    lines = str(error.value).splitlines()
    assert lines[0] == "ZeroFill does not conform:"
    assert [line.split()[0] for line in lines[1:]] == ["bias-shift", "masked-groups", "exactly-enough", "biased-weight"]
    assert all("row " in line for line in lines[1:])
    assert_conforms(ZeroFill, SMALL, allowed=["bias-shift", "masked-groups", "exactly-enough", "biased-weight"])


@pytest.mark.parametrize("probe", PROBES, ids=str)
def test_a_probe_says_what_it_is_in_both_languages(probe):
    for texts in (probe.name, probe.story, probe.advice):
        assert texts.en
        assert texts.zh != texts.en
        assert "\n" not in texts.en + texts.zh
    assert probe.level in ("wrong", "fragile")
    assert probe.judge(as_gate(SoundGate, SMALL)).outcome in ("pass", "not applicable")


FILLS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30)


class Garbage(SoundGate):
    """Any shapes and values; the same for the same input."""

    mood = 0

    def forward(self, x):
        numbers = torch.Generator().manual_seed(self.mood)
        ids, weights = super().forward(x)
        if self.mood % 3 == 0:
            ids = torch.randint(-2, 36, ids.shape, generator=numbers)
        if self.mood % 2 == 0:
            weights = torch.full_like(weights, FILLS[self.mood // 2 % len(FILLS)])
        elif self.mood % 5 == 0:
            weights = weights[:, : 1 + self.mood % 4]
        return ids[: self.mood % 7 + 4], weights


@pytest.mark.parametrize("mood", range(12))
def test_whatever_a_gate_returns_is_judged_and_written_as_strict_json(mood):
    class Moody(Garbage):
        pass

    Moody.mood = mood
    report = check(Moody, SMALL)
    assert not report.conforms
    json.loads(json.dumps([r.numbers for r in report.results], allow_nan=False))


def test_a_wrong_shape_is_what_every_probe_says():
    def narrow(logits, bias, config):
        ids, weights = route_as_function(logits, bias, config)
        return ids, weights[:, :1].contiguous()

    failed = check(narrow, SMALL).failed()
    assert {"shapes", "definition", "one-token"} <= {result.probe.id for result in failed}
    shapes = next(result for result in failed if result.probe.id == "shapes")
    assert shapes.says.en == "weights have shape (8, 1), not [T, K] = (8, 4)"


def test_a_bad_row_may_not_leave_the_group_limit():
    def gate(logits, bias, config):
        ids, weights = route_as_function(logits, bias, config)
        spread = torch.arange(ids.shape[1]) * 8 % 31  # another group each
        return torch.where(logits.isnan().any(-1, keepdim=True), spread, ids), weights

    (failed,) = check(gate, SMALL).failed()
    assert failed.probe.id == "bad-rows"
    assert failed.says.en == "all NaN: the bad row reaches 4 groups, 2 are allowed"


class DropsWeight(SoundGate):
    def forward(self, x):
        answer = super().forward(x)
        del self.weight
        return answer


class DropsBias(SoundGate):
    def forward(self, x):
        answer = super().forward(x)
        del self._buffers["e_score_correction_bias"]
        return answer


class SpoilsGraph(SoundGate):
    def normalise(self, weights, x):
        answer = super().normalise(weights, x)
        weights.zero_()  # backward needs them
        return answer


class RefusesTraining(SoundGate):
    def train(self, mode=True):
        if mode:
            raise RuntimeError("made for serving")
        return super().train(mode)


class RefusesCasts(SoundGate):
    def half(self):
        raise RuntimeError("no float16")


class RefusesLoading(SoundGate):
    @staticmethod
    def before_loading(*_):
        raise SystemExit(0)


class RoutesAtRandomSize(SoundGate):
    """The recompute saves other tensors than the first forward."""

    asked = 0

    def normalise(self, weights, x):
        RoutesAtRandomSize.asked += 1
        for _ in range(self.training * RoutesAtRandomSize.asked):
            weights = weights.square().sqrt()  # saves tensors
        return super().normalise(weights, x)


MISBEHAVED = [
    (DropsWeight, "gradient", "it has lost its weight"),
    (DropsBias, "bias-steady", "it has lost its e_score_correction_bias"),
    (SpoilsGraph, "gradient", "the gate raised RuntimeError: one of the variables needed for gradient computation"),
    (RefusesTraining, "train-eval", "the gate raised RuntimeError: made for serving"),
    (RefusesCasts, "underflow-fp16", "the gate raised RuntimeError: no float16"),
    (RefusesCasts, "bias-cast", "the gate raised RuntimeError: no float16"),
    (RefusesLoading, "bias-load", "the gate raised SystemExit: 0"),
    (RoutesAtRandomSize, "recompute-counts", "the gate raised CheckpointError: "),
]


@pytest.mark.parametrize(("gate", "probe", "said"), MISBEHAVED, ids=lambda one: getattr(one, "__name__", None))
def test_whatever_a_gate_does_to_itself_is_a_finding_and_no_mistake_of_the_suite(gate, probe, said):
    result = next(r for r in check(gate, SMALL).results if r.probe.id == probe)
    assert result.outcome == "fail"
    assert result.says.en.startswith(said)


class NeverCopied(SoundGate):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle '_thread.lock' object")


class NoNumbers(SoundGate):
    def forward(self, x):
        return tuple(tensor.to("meta") for tensor in super().forward(x))


class Mask(SoundGate):
    def forward(self, x):
        ids, weights = super().forward(x)
        return ids.bool(), weights


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (NeverCopied, "NeverCopied cannot be asked: on plain logits it raised TypeError: cannot pickle"),
        (
            NoNumbers,
            "NoNumbers cannot be asked: on plain logits it raised NotImplementedError: Cannot copy out of meta",
        ),
        (Mask, "0 tensors of integers and 1 of floats came back: ids and weights unclear"),
        (dict, "dict is no torch.nn.Module: give one, or a function .logits, bias, config."),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(gate, said):
    with pytest.raises(ValueError, match=said):
        check(gate, SMALL)


AMBIENT = {
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("gate", [SoundGate, ZeroFill])
def test_what_the_caller_has_set_in_torch_is_no_finding(ambient, gate):
    expected = [str(result) for result in check(gate, SMALL).results]
    with AMBIENT[ambient]():
        got = [str(result) for result in check(gate, SMALL).results]
        one_by_one = [str(probe.judge(as_gate(gate, SMALL))) for probe in PROBES]
    assert got == one_by_one == expected


def test_a_gate_that_does_not_conform_raises_without_assert_statements_too():
    code = (
        "from broken_gates import ZeroFill; from test_conformance import SMALL\n"
        "from moesaic.conformance import assert_conforms; assert_conforms(ZeroFill, SMALL)"
    )
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=here, check=False)
    assert run.returncode == 1
    assert "AssertionError: ZeroFill does not conform:" in run.stderr


def test_every_probe_is_announced_before_it_is_asked():
    told = []
    check(SoundGate, SMALL, before=told.append, level="wrong")
    assert told == [probe for probe in PROBES if probe.level == "wrong"]


def test_a_rule_that_ignores_its_groups_allows_a_bad_row_all_of_them():
    rule = dataclasses.replace(SMALL, topk_method="greedy")

    def gate(logits, bias, config):
        ids, weights = route_as_function(logits, bias, config)
        spread = torch.arange(ids.shape[1]) * 8 % 31  # another group each
        return torch.where(logits.isnan().any(-1, keepdim=True), spread, ids), weights

    assert not check(gate, rule).failed()


def test_a_gate_that_ends_the_program_has_failed_and_not_passed():
    def leaves(_logits, _bias, _config):
        raise SystemExit(0)

    with pytest.raises(ValueError, match="cannot be asked: on plain logits it raised SystemExit: 0"):
        check(leaves, v3(16, 4, 2, 4))
