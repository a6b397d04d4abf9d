"""Every trap has a gate that falls into it: it fails its probe and those it must, and its sound twin fails none."""

from typing import NamedTuple

import pytest
import torch
from broken_gates import (
    AcceptsTooMany,
    AddsUp,
    ArgmaxAgain,
    BatchMaximum,
    BiasedWeights,
    CappedBias,
    CastAndBack,
    CastBias,
    ClampedBias,
    CountsFromMinusOne,
    CountsFromOne,
    CountsGraphs,
    DecodeWithoutBias,
    DetachedRest,
    DetachedSum,
    FiniteFill,
    FollowsWeight,
    ForgottenBias,
    FrozenWeight,
    GroupMaximum,
    GroupSumKOverM,
    LastOfTiedGroups,
    LastOfTies,
    LastWhereAllTie,
    LastWhereSomeTie,
    LearnedBias,
    LimitForSigmoidAlone,
    LoadsAnyBias,
    MinusOneForNaN,
    NarrowLinear,
    NeverAllGroups,
    NeverNormalised,
    NeverScaled,
    NoisyTraining,
    NoisyWithoutGradient,
    NoLimitForSigmoid,
    NoLimitForSqrtsoftplus,
    OneGroupHalved,
    OwnNoise,
    PaddedIds,
    ParameterBias,
    PlaceInBatch,
    PlainDenominator,
    PrintsRange,
    ReadsMemory,
    RecoveredWeights,
    RefusesBoundary,
    RoundedBias,
    ScaledByHeart,
    ScaledTwice,
    SingleNotNormalised,
    SmallIds,
    SoftmaxAfterMask,
    StepsAlways,
    UnderAutocast,
    ViewsOnly,
    WeightsInModelDtype,
    WrongScores,
    ZeroFill,
)
from sound_gate import SoundGate

from moesaic.config import MoEConfig
from moesaic.conformance import PROBES, as_gate, assert_conforms, check

V3 = {
    "hidden_size": 40, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
V2 = {
    **V3, "routed_scaling_factor": 4.0, "scoring_func": "softmax", "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}  # fmt: skip
RULES = {"v3": V3, "v3 with K=6": {**V3, "num_experts_per_tok": 6}, "v2": V2}


class Broken(NamedTuple):
    """A broken gate, the probe it is made for, those it must fail too, and the rule it is judged by."""

    gate: type[SoundGate]
    trap: str
    others: str = ""
    rule: str = "v3"


# a wrong choice or weight differs from the definition wherever one asks for it
BROKEN = (
    Broken(WrongScores, "definition",
           "masked-groups group-score one-group all-groups exactly-enough biased-weight recovered-weight "
           "single-expert linear linear-cast autocast own-weights gradient"),
    Broken(ClampedBias, "bias-shift", "masked-groups biased-weight"),
    Broken(ArgmaxAgain, "distinct", "bias-shift exactly-enough biased-weight"),
    Broken(LastOfTies, "ties-experts"),
    Broken(LastOfTiedGroups, "ties-groups", "ties-experts"),
    Broken(MinusOneForNaN, "bad-rows"),
    Broken(BatchMaximum, "bad-neighbours", "scoring-functions", rule="v2"),
    Broken(PlaceInBatch, "permuted-tokens",
           "definition group-score one-group all-groups scoring-functions biased-weight single-expert "
           "one-token linear linear-cast autocast"),
    Broken(ZeroFill, "masked-groups", "bias-shift masked-underflow exactly-enough biased-weight"),
    Broken(FiniteFill, "masked-groups", "bias-shift"),
    Broken(GroupMaximum, "group-score",
           "definition masked-groups scoring-functions biased-weight recovered-weight single-expert linear "
           "linear-cast autocast own-weights"),
    Broken(GroupSumKOverM, "group-score",
           "definition masked-groups exactly-enough scoring-functions biased-weight single-expert linear "
           "linear-cast autocast own-weights", rule="v3 with K=6"),
    Broken(OneGroupHalved, "one-group"),
    Broken(NeverAllGroups, "all-groups"),
    Broken(RefusesBoundary, "exactly-enough"),
    Broken(AcceptsTooMany, "too-many"),
    Broken(LimitForSigmoidAlone, "scoring-functions"),
    Broken(BiasedWeights, "biased-weight",
           "definition bias-shift group-score one-group all-groups exactly-enough scoring-functions "
           "recovered-weight gradient bias-gradient"),
    Broken(RecoveredWeights, "recovered-weight", "scoring-functions"),
    Broken(SoftmaxAfterMask, "softmax-before-mask",
           "definition group-score all-groups exactly-enough scoring-functions weight-sum single-expert "
           "gradient", rule="v2"),
    Broken(ScaledTwice, "scaled-once",
           "definition group-score one-group all-groups exactly-enough scoring-functions biased-weight "
           "recovered-weight weight-sum single-expert underflow underflow-fp16 gradient"),
    Broken(NeverScaled, "scaled-once",
           "definition group-score one-group all-groups exactly-enough scoring-functions biased-weight "
           "recovered-weight weight-sum single-expert gradient"),
    Broken(NeverNormalised, "weight-sum",
           "definition group-score one-group all-groups exactly-enough scoring-functions biased-weight "
           "recovered-weight single-expert underflow gradient"),
    Broken(SingleNotNormalised, "single-expert"),
    Broken(PlainDenominator, "underflow"),
    Broken(WeightsInModelDtype, "underflow-fp16"),
    Broken(CountsFromOne, "shapes",
           "definition ties-experts ties-groups masked-groups group-score one-group all-groups exactly-enough "
           "scoring-functions biased-weight recovered-weight single-expert linear linear-cast autocast "
           "own-weights gradient"),
    Broken(SmallIds, "ids-int64"),
    Broken(ReadsMemory, "strides"),
    Broken(ViewsOnly, "strides-refused"),
    Broken(PrintsRange, "no-tokens"),
    Broken(DecodeWithoutBias, "one-token"),
    Broken(CastBias, "bias-cast"),
    Broken(CastAndBack, "bias-cast"),
    Broken(LoadsAnyBias, "bias-load"),
    Broken(RoundedBias, "own-weights", "bias-shift masked-groups linear linear-cast"),
    Broken(NarrowLinear, "linear", "linear-cast"),
    Broken(FollowsWeight, "linear-cast"),
    Broken(UnderAutocast, "autocast"),
    Broken(DetachedSum, "gradient"),
    Broken(FrozenWeight, "gradient"),
    Broken(LearnedBias, "bias-gradient"),
    Broken(ParameterBias, "bias-parameter"),
    Broken(NoisyTraining, "train-eval"),
    Broken(OwnNoise, "recompute-plan", "train-eval"),
    Broken(AddsUp, "recompute-counts"),
    Broken(StepsAlways, "bias-steady", "strides recompute-counts"),
    Broken(ZeroFill, "masked-underflow", rule="v2"),
    Broken(CappedBias, "bias-shift", "masked-groups recovered-weight"),
    Broken(PaddedIds, "distinct",
           "definition ties-experts ties-groups masked-groups group-score one-group all-groups exactly-enough "
           "scoring-functions biased-weight recovered-weight single-expert shapes linear linear-cast autocast "
           "own-weights gradient"),
    Broken(CountsFromMinusOne, "shapes",
           "definition ties-experts bad-rows masked-groups masked-underflow group-score one-group all-groups "
           "exactly-enough scoring-functions biased-weight recovered-weight single-expert linear linear-cast autocast "
           "own-weights gradient"),
    Broken(LastWhereAllTie, "ties-experts"),
    Broken(LastWhereSomeTie, "ties-experts"),
    Broken(NoLimitForSigmoid, "scoring-functions", rule="v2"),
    Broken(NoLimitForSqrtsoftplus, "scoring-functions"),
    Broken(ScaledByHeart, "scaled-once"),
    Broken(ForgottenBias, "bias-load"),
    Broken(DetachedRest, "gradient", "scoring-functions", rule="v2"),
    Broken(NoisyWithoutGradient, "recompute-plan", "train-eval"),
    Broken(CountsGraphs, "recompute-plan"),
)  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: f"{b.gate.__name__} by {b.rule}")
def test_a_broken_gate_fails_its_probe_and_those_it_must(broken):
    report = check(broken.gate, MoEConfig(**RULES[broken.rule]))
    failed = {result.probe.id for result in report.failed()}
    assert broken.trap in failed, f"{broken.gate.__name__} walks through its own probe"
    assert failed == {broken.trap, *broken.others.split()}


@pytest.mark.parametrize("rule", RULES)
def test_the_sound_twin_fails_none(rule):
    assert_conforms(SoundGate, MoEConfig(**RULES[rule]), level="fragile")


def test_every_probe_has_a_broken_gate():
    assert {broken.trap for broken in BROKEN} | {"bias-as-loaded"} == {probe.id for probe in PROBES}


def test_a_bias_that_was_rounded_before_the_check_is_reported():
    gate = CastBias(MoEConfig(**V3)).bfloat16()
    failed = {result.probe.id: result for result in check(gate, MoEConfig(**V3)).failed()}
    assert failed.keys() == {"bias-cast", "bias-as-loaded"}
    assert failed["bias-as-loaded"].says.en == "it is torch.bfloat16"
    assert failed["bias-as-loaded"].says.zh == "它是 torch.bfloat16"


def result_of(gate, probe, rule="v3"):
    return next(r for r in check(gate, MoEConfig(**RULES[rule])).results if r.probe.id == probe)


def test_a_failure_says_the_numbers_of_its_first_row():
    result = result_of(ZeroFill, "masked-groups")
    row = result.numbers
    assert row["row"] == 0
    assert len(row["kept"]) == 2
    assert row["outside"]
    assert all(e // 8 not in row["kept"] for e in row["outside"])
    assert f"experts, such as {row['outside'][0]}, lie outside the kept groups {row['kept']}" in result.says.en
    assert str(row["outside"][0]) in result.says.zh


def test_where_experts_are_wrong_a_failure_says_how_clear_the_choice_was():
    result = result_of(GroupMaximum, "definition")
    margin = result.numbers["margin"]
    assert margin > 0
    assert result.says.en.endswith(f" (decided by a gap of {margin:.2g})")
    assert result.says.zh.endswith(f"（差距 {margin:.2g}）")
    assert "margin" not in result_of(ScaledTwice, "definition").numbers  # its experts are right


@pytest.mark.parametrize(("gate", "times"), [(ScaledTwice, 2), (NeverScaled, 0)])
def test_a_scale_that_is_applied_another_number_of_times_is_counted(gate, times):
    assert result_of(gate, "scaled-once").says.en.startswith(f"the factor 2.5 is applied {times} times: ")


def test_a_recovered_weight_is_shown_beside_the_true_one():
    numbers = result_of(RecoveredWeights, "recovered-weight").numbers
    assert abs(numbers["got"] - numbers["expected"]) > 0.01 * numbers["expected"]


def test_a_bias_that_no_checkpoint_holds_is_told_as_that():
    assert result_of(ForgottenBias, "bias-load").says.en == "the bias is not in the state dict"


def test_a_gate_that_raises_fails_with_what_it_raised():
    result = result_of(PrintsRange, "no-tokens")
    assert result.outcome == "fail"
    assert result.says.en.startswith("the gate raised RuntimeError: min(): ")


def test_the_module_that_is_judged_stays_as_it_was():
    gate = SoundGate(MoEConfig(**V3)).train()
    before = {name: tensor.clone() for name, tensor in gate.state_dict().items()}
    check(gate, MoEConfig(**V3))
    assert gate.training
    assert all(torch.equal(before[name], tensor) for name, tensor in gate.state_dict().items())
    assert all(parameter.grad is None for parameter in gate.parameters())


def test_a_check_asks_the_same_whatever_ran_before():
    config = MoEConfig(**V3)
    first = [result.says for result in check(WrongScores, config).results]
    torch.randn(7)
    assert first == [result.says for result in check(WrongScores, config).results]


def test_without_the_class_other_settings_are_not_applicable():
    gate = as_gate(SoundGate(MoEConfig(**V3)), MoEConfig(**V3))
    asked = {r.probe.id: r for r in check(gate).results}
    assert asked["too-many"].outcome == "not applicable"
    assert asked["too-many"].says.en == "this gate cannot be built with other settings"
    assert not check(gate).failed()
