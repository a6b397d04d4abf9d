"""Every family of the installed transformers with experts on its interface: what is recorded is what they were given.

The truth is taken by a spy in the place of each experts module's own forward: no hook, and no code of ours.
"""

import copy
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from hf_every_family import families, run, tiny_of, token_ids
from hf_models import tiny
from packaging.version import Version
from torch import nn
from traces import check_layer

from moesaic.families import FAMILIES, ROUTING
from moesaic.hf.added_bias import add_bias
from moesaic.hf.experts import is_on_seam
from moesaic.hf.modules import moe_layers
from moesaic.trace.recording.record import record

# what is said below by name is of this transformers; others have other families, and other reasons
NAMED = Version(transformers.__version__).release[:2] == (5, 24)
NOT_BUILT = {"ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "hy_v4_vl", "mimo_v2_flash", "qwen4_exp"}  # 61 of 67 are
NOT_GENERATING = {"granitemoehybrid", "inkling2", "inkling2_loop", "jamba"}  # no layer of attention, or a short table
ROOT = Path(__file__).parents[1]
NO_LOGITS = {"zaya"}  # its router scores one class more than there are experts: "skip them all"
# rules that are none of ours, each for its reason: hashed ids, a scale per expert, one sum with the shared experts,
# a sampling of its own, a class for "none"
NOT_OURS = {"deepseek_v4", "diffusion_gemma", "gemma4", "inkling", "phimoe", "zaya"}
NO_BIAS_ADDED = NOT_OURS - {"inkling"}  # which has one of its own


def built(family):
    found = tiny_of(family)
    if found.model is None:
        pytest.skip(f"{family} was not built: {found.reasons[0][:150]}")
    return found.model


def spied(model, call):
    """({module name: (ids, weights)}, result of `call`): what experts were given in it."""
    seen, undo = {}, []
    for name, module in model.named_modules():
        if is_on_seam(module):

            def forward(tokens, ids, weights, name=name, module=module):
                old = seen.get(name)
                new = (ids, weights) if old is None else map(torch.cat, zip(old, (ids, weights), strict=True))
                seen[name] = tuple(tensor.clone() for tensor in new)
                return type(module).forward(module, tokens, ids, weights)

            module.forward = forward
            undo.append(module)
    result = call()
    for module in undo:
        del module.forward
    return seen, result


def assert_equal_to_truth(trace, truth):
    assert trace.n_layers == len(truth)
    for layer, (ids, weights) in enumerate(truth.values()):
        assert torch.equal(trace.picks[layer].long(), ids)
        assert trace.weights is None or torch.equal(trace.weights[layer], weights.float())


def test_all_families_but_those_named_were_built():
    missing = {family for family in families() if tiny_of(family).model is None}
    assert missing == NOT_BUILT if NAMED else len(families()) - len(missing) >= 35


@pytest.mark.parametrize("family", families())
def test_picks_are_the_truth_and_the_result_keeps_every_bit(family):
    model, ids = built(family), token_ids()
    truth, plain = spied(model, lambda: run(model, ids))
    for detail in ("ids", "picks"):
        with record(model, detail) as rec:
            assert torch.equal(run(model, ids), plain)
        assert_equal_to_truth(rec.trace, truth)
        assert rec.trace.detail == detail
    assert torch.equal(rec.trace.input_ids, ids.flatten())
    assert set(rec.trace.origins) == {"experts"}


@pytest.mark.parametrize("family", families())
def test_under_another_implementation_too_and_its_name_stays(family):
    model, ids = built(family), token_ids()
    before = model.get_experts_implementation()
    other = "batched_mm" if set(before.values()) != {"batched_mm"} else "grouped_mm"
    try:
        model.set_experts_implementation(other)
        truth, plain = spied(model, lambda: run(model, ids))
        with record(model) as rec:
            names = model.get_experts_implementation()
            assert torch.equal(run(model, ids), plain)
        assert_equal_to_truth(rec.trace, truth)
        assert other in names.values()
    finally:
        model.set_experts_implementation(before)


@pytest.mark.parametrize("family", families())
def test_generation_is_recorded_step_by_step(family):
    model, ids = built(family), token_ids()
    if not model.can_generate():
        pytest.skip(f"{type(model).__name__} has no generate()")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # generation configs of untrained models
        try:
            truth, plain = spied(model, lambda: model.generate(ids, **options))
        except Exception as error:
            assert family in NOT_GENERATING or not NAMED
            pytest.skip(f"{type(model).__name__} does not generate: {str(error).splitlines()[0][:120]}")
        with record(model) as rec:
            assert torch.equal(model.generate(ids, **options), plain)
    assert_equal_to_truth(rec.trace, truth)
    n_new = rec.trace.picks.shape[1] - ids.numel()
    assert rec.trace.phases.tolist() == [0] * ids.numel() + [1] * n_new
    assert rec.trace.sequences.tolist() == [0] * ids.shape[1] + [1] * ids.shape[1] + [0, 1] * (n_new // 2)


@pytest.mark.parametrize("family", families())
def test_scores_lead_to_the_picks_by_a_rule_of_ours_or_none_is_claimed(family):
    model, ids = built(family), token_ids(6, 11)
    if any(type(layer.router) is nn.Linear for layer in moe_layers(model)):  # jamba before transformers 5.23
        with pytest.raises(ValueError, match="Linear returns no expert ids"), record(model, "scores"):
            run(model, ids)
        return
    with record(model, "scores") as rec:
        run(model, ids)
    if family in NO_LOGITS:
        with pytest.raises(ValueError, match=r"gave no logits per token: use detail='picks'"):
            _ = rec.trace
        return
    trace = rec.trace
    assert not ((trace.logits >= 0).all(-1) & ((trace.logits.sum(-1) - 1).abs() < 1e-3)).all(-1).any(), "probabilities"
    known = {config.rule_is_known for config in trace.configs}
    assert known == {family not in NOT_OURS}
    for layer in range(trace.n_layers) if known == {True} else ():
        check = check_layer(trace, layer)
        assert check.experts.all(), layer
        assert check.weights.all(), layer
        assert len(trace.picks[layer].unique()) > 2  # or the rule has not been put to the test
        if trace.configs[layer].has_correction_bias:
            assert trace.bias[layer].abs().max() > 0.01


@cache
def with_added_biases(family):
    """A copy of a family's model to whose routers biases were added; None where it has its own, or is refused one."""
    model = copy.deepcopy(built(family))
    is_linear = any(type(layer.router) is nn.Linear for layer in moe_layers(model))  # jamba before transformers 5.23
    if family in NO_BIAS_ADDED or is_linear:
        with pytest.raises(ValueError, match=r"is not known here, so no bias can be added|cannot be asked by itself"):
            add_bias(model)
        return None
    return model if add_bias(model) else None


@pytest.mark.parametrize("family", families())
def test_a_bias_of_zeros_leaves_the_output_and_its_rule_derives_what_is_recorded(family):
    model, ids = with_added_biases(family), token_ids(6, 11)
    if model is None:  # nothing was to be added, or the refusal was seen
        return
    torch.testing.assert_close(run(model, ids), run(built(family), ids))
    for layer in moe_layers(model):
        layer.bias.normal_(std=0.03)
    with record(model, "scores") as rec:
        run(model, ids)
    for layer in range(rec.trace.n_layers):
        check = check_layer(rec.trace, layer)
        assert check.experts.all()
        assert check.weights.all()


@pytest.mark.skipif(not NAMED, reason="the pages count the families of transformers 5.24")
@pytest.mark.parametrize("page", ["README.md", "docs/en/balance-a-model.md", "docs/zh/balance-a-model.md"])
def test_the_pages_count_the_families_to_which_a_bias_can_be_added(page):
    names = [name for name in families() if name not in NOT_BUILT and with_added_biases(name) is not None]
    text = (ROOT / page).read_text("utf-8")
    said = re.search(r"(?:gives one to|it works for|适用于) (\d+) (?:families|个系列)", text)
    assert int(said[1]) == len(names)


@pytest.mark.parametrize("family", ["deepseek_v4", "beam", "lfm2_moe", "nemotron_h"])
def test_rules_of_hand_made_models_too(family):
    """deepseek_v4 without hashed layers, and groups that limit the choice."""
    model = tiny(family)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias") and tensor.dim() == 1 and tensor.is_floating_point():
                tensor.normal_(0, 0.1)
    with record(model, "scores") as rec:
        run(model, token_ids(6, 11))
    assert all(config.rule_is_known for config in rec.trace.configs)
    for layer in range(rec.trace.n_layers):
        check = check_layer(rec.trace, layer)
        assert check.experts.all()
        assert check.weights.all()


def test_every_family_whose_routing_is_claimed_is_put_to_the_test():
    built_types = {
        tiny_of(family).model.config.model_type for family in families() if tiny_of(family).model is not None
    }
    untested = set(ROUTING) - {"deepseek_v4"} - built_types  # deepseek_v4 above, by hand
    assert not [name for name in untested if name.removesuffix("_text") in families()], "transformers has them"
    assert not set(ROUTING) & set(FAMILIES)
