"""BalanceLoss: the gradient of `loss + alpha * sum(losses)` to the last bit, and nothing else changes."""

import pytest
import torch
from balanced import ALPHA, OPTIONS, assert_same, attached, batch_of, explicit, gradients, hooked, model_of, part
from hf_every_family import families, tiny_of, token_ids
from hf_models import tiny
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

import moesaic as ms
from moesaic.hf.modules import moe_layers
from moesaic.hf.outputs import read_router
from moesaic.layer.balance import expert_load
from moesaic.layer.losses import LOSSES, switch_loss
from moesaic.train.balance_loss import BalanceLoss
from moesaic.train.bias_balance import BiasBalance
from moesaic.types import Routing

FAMILIES = ["deepseek_v3", "glm4_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v2", "qwen2_moe"]
LINEAR = ["sequence", "z"]  # means over sequences or tokens: parts of a batch add up
# their rules are none of ours, so neither are their scores
REFUSED = {"deepseek_v4", "diffusion_gemma", "gemma4", "inkling", "phimoe", "zaya"}


# a kind picks a function, a family how its routers are read
@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, family) for kind in LOSSES for family in ("deepseek_v3", "gpt_oss")),
     *(("sequence", family) for family in FAMILIES if family not in ("deepseek_v3", "gpt_oss"))],
)  # fmt: skip
def test_the_gradient_is_that_of_an_explicit_sum_and_no_forward_value_changes(kind, family):
    model, batch = model_of(family), batch_of()
    plain = gradients(model, lambda: model(**batch).loss.backward())
    outputs = []

    def by_hand():
        output, loss = explicit(model, batch, kind)
        outputs.append(output)
        loss.backward()

    def injected():
        outputs.append(model(**batch))
        outputs[-1].loss.backward()

    expected = gradients(model, by_hand)
    balance = attached(kind, model)
    assert_same(gradients(model, injected), expected)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert any(
        not torch.equal(plain[name], expected[name])
        for name in plain
        if name.endswith(("gate.weight", "router.weight"))
    )
    balance.detach()
    assert_same(gradients(model, lambda: model(**batch).loss.backward()), plain)
    assert not hooked(model)


class OwnLayers(nn.Module):
    """Two of our layers with a residual, in float64."""

    def __init__(self, **fields):
        super().__init__()
        config = ms.MoEConfig(
            hidden_size=8, moe_intermediate_size=6, n_routed_experts=8, num_experts_per_tok=2, **fields
        )
        self.layers = nn.ModuleList([ms.DeepseekV3MoE(config, engine="reference") for _ in range(2)])
        self.double()
        for layer in self.layers:
            nn.init.normal_(layer.gate.weight, std=0.5)

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        return hidden_states


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("fields", [{}, {"scoring_func": "softmax", "score_after_topk": True}], ids=["v3", "classic"])
def test_our_own_layers_are_balanced_by_a_loss_outside_of_the_model(kind, fields):
    torch.manual_seed(0)
    model = OwnLayers(**fields)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    routings = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ms.Router):
            layer.register_forward_hook(lambda _module, _args, output, name=name: routings.update({name: output}))

    def by_hand():
        y, total = model(x), 0.0
        for name, routing in routings.items():
            config = model.get_submodule(name).config
            own = {
                "sequence": {"sequences": torch.arange(15) // 5},
                "global_batch": {"load": expert_load(routing.expert_ids, 8)},
            }.get(kind, {})
            total = total + LOSSES[kind](routing, config, **own, **OPTIONS.get(kind, {}))
        (y.square().mean() + ALPHA * total).backward()

    expected = gradients(model, by_hand)
    balance = attached(kind, model)
    assert_same(gradients(model, lambda: balance(model(x).square().mean()).backward()), expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_checkpointing_of_both_kinds_gives_the_same_gradient(kind):
    """Also for two forwards in one backward, and with the loss outside of the model."""
    batch = batch_of()

    def two(model):
        return sum(model(**part(batch, rows)).loss for rows in (slice(0, 1), slice(1, 4)))

    def outside(model, balance):
        """Two forwards of as many tokens, of which other ones are padding, in one loss."""
        halves = [part(batch, rows) for rows in (slice(0, 2), slice(2, 4))]
        labels = [half.pop("labels") for half in halves]
        logits = [model(**half).logits for half in halves]
        return balance(sum(ForCausalLMLoss(*pair, 64) for pair in zip(logits, labels, strict=True)))

    def found(reentrant=None):
        model = model_of("deepseek_v3")
        if reentrant is not None:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        for run in (lambda m, _: m(**batch).loss, lambda m, _: two(m), outside):
            balance = attached(kind, model)
            yield gradients(model, lambda run=run, m=model, b=balance: run(m, b).backward())
            balance.step()
            yield balance.values
            balance.detach()

    plain = list(found())
    for reentrant in (False, True):
        for one, other in zip(found(reentrant), plain, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_scaled_loss_scales_the_balancing_alike(kind):
    model, batch = model_of(), batch_of()
    attached(kind, model)
    once = gradients(model, lambda: model(**batch).loss.backward())
    assert_same(once, gradients(model, lambda: (model(**batch).loss * 1024).backward()), factor=1024)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_same(once, gradients(model, lambda: scaler.scale(model(**batch).loss).backward()), factor=1024)


@pytest.mark.parametrize("kind", LOSSES)
def test_accumulation_adds_up_exactly_where_a_loss_is_a_mean(kind):
    """sequence and z: 1 x 2B is 2 x B. The others multiply means over tokens, which do not add up; global_batch knows
    the load of what came before, so the last micro-batch is exact and the first knows only itself."""
    torch.manual_seed(0)
    model, x = OwnLayers(), torch.randn(4, 5, 8, dtype=torch.float64)
    balance = attached(kind, model)

    def whole():
        balance(model(x).square().mean()).backward()

    def halves():
        for half in x.split(2):
            (balance(model(half).square().mean()) / 2).backward()

    one = gradients(model, whole)
    balance.step()
    two = gradients(model, halves)
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst < 1e-13 if kind in LINEAR else worst > 1e-4


def test_the_global_batch_loss_sees_every_micro_batch_before_it_and_forgets_them_at_the_step():
    torch.manual_seed(0)
    model, x = OwnLayers(), torch.randn(4, 5, 8, dtype=torch.float64)
    balance = attached("global_batch", model)
    routings = []
    model.layers[0].gate.register_forward_hook(lambda _module, _args, output: routings.append(output))
    for _ in range(2):
        routings.clear()
        for half in x.split(2):
            balance(model(half).square().mean()).backward()
        loads = [expert_load(routing.expert_ids, 8) for routing in routings]
        config = model.layers[0].gate.config
        expected = [
            LOSSES["global_batch"](routings[0], config, load=loads[0]),
            LOSSES["global_batch"](routings[1], config, load=loads[0] + loads[1]),
        ]
        balance.step()
        assert balance.values["layers.0"].item() == pytest.approx(sum(expected).item() / 2, abs=1e-13)


def test_losses_of_several_forwards_in_one_backward_keep_their_own_scales():
    model, batch = model_of(), batch_of()
    attached("switch", model)

    def apart():
        model(**part(batch, slice(0, 2))).loss.backward()
        (model(**part(batch, slice(2, 4))).loss * 3).backward()

    def together():
        first, second = (model(**part(batch, rows)).loss for rows in (slice(0, 2), slice(2, 4)))
        (first + 3 * second).backward()

    one, two = gradients(model, apart), gradients(model, together)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=0, atol=1e-7)  # the model's loss is float32


def test_a_second_backward_of_the_same_graph_is_scaled_by_its_own_loss():
    model, batch = model_of(), batch_of()
    attached("switch", model)
    once = gradients(model, lambda: model(**batch).loss.backward())

    def twice():
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        model.zero_grad()
        (loss * 4).backward()

    assert_same(once, gradients(model, twice), factor=4)


def test_the_loss_that_is_named_decides_and_not_the_one_that_the_model_returns():
    model, batch = model_of(), batch_of()

    def by_hand():
        output, loss = explicit(model, batch, "switch")
        (2 * output.loss + loss).backward()  # three times the task, once the balancing

    expected = gradients(model, by_hand)
    plain = gradients(model, lambda: model(**batch).loss.backward())
    balance = attached("switch", model)
    assert_same(gradients(model, lambda: balance(3 * model(**batch).loss).backward()), expected)
    assert_same(gradients(model, lambda: balance(model(**batch).loss, share=0.0).backward()), plain)


def test_a_loss_of_the_model_counts_where_the_backward_reaches_no_named_one():
    """Two losses of two forwards, of which one is named; of both over one forward the named one counts."""
    model, batch = model_of(), batch_of()
    halves = [part(batch, rows) for rows in (slice(0, 2), slice(2, 4))]
    balance = attached("switch", model)

    def apart():
        model(**halves[0]).loss.backward()
        balance(model(**halves[1]).loss * 3).backward()

    def across():
        own = model(**halves[0]).loss
        named = balance(model(**halves[1]).loss * 3)
        own.backward()
        named.backward()

    assert_same(gradients(model, apart), gradients(model, across))

    def named_alone():
        loss = model(**batch).loss
        (balance(3 * loss) + loss.detach()).backward()

    def both(turned):
        loss = model(**batch).loss
        losses = [balance(3 * loss), loss * 0]
        sum(losses[::-1] if turned else losses).backward()

    expected = gradients(model, named_alone)
    for turned in (False, True):
        assert_same(gradients(model, lambda turned=turned: both(turned)), expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_backward_without_a_loss_that_is_known_is_an_error(reentrant):
    model, batch = model_of(), batch_of()
    if reentrant is not None:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    attached("switch", model)
    model(**batch).loss.backward()  # a scale that is over
    with pytest.raises(ValueError, match=r"does not know the scale of this backward.*loss = balance_loss\(loss\)"):
        model(**batch).logits.square().mean().backward()
    model(**batch).loss.backward()


def test_the_scale_of_one_backward_does_not_serve_the_next():
    model, batch = model_of(), batch_of()
    attached("switch", model)
    output = model(**batch)
    output.loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="does not know the scale of this backward"):
        output.logits.square().mean().backward()


def test_forwards_that_do_not_train_take_no_part():
    model, batch = model_of(), batch_of()
    plain = gradients(model, lambda: model.eval()(**batch).loss.backward())
    balance = attached("global_batch", model)
    assert_same(plain, gradients(model, lambda: model(**batch).loss.backward()))
    model.train()
    with torch.no_grad():
        model(**batch)
    with pytest.warns(UserWarning, match="BalanceLoss saw no router in this step"):
        balance.step()
    assert not balance.values
    model(**batch).loss.backward()
    balance.step()
    assert set(balance.values) == {f"model.layers.{i}.mlp" for i in range(3)}
    assert all(not value.requires_grad for value in balance.values.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_models_in_lower_precision_keep_their_values_and_get_a_finite_gradient(dtype):
    model, batch = model_of().to(dtype), batch_of()
    plain = model(**batch)
    expected = gradients(model, lambda: explicit(model, batch, "switch")[1].backward())
    attached("switch", model)
    assert torch.equal(model(**batch).logits, plain.logits)
    found = gradients(model, lambda: model(**batch).loss.backward())
    for name, gradient in expected.items():
        assert gradient.dtype == dtype
        torch.testing.assert_close(found[name], gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_tuple_and_several_kinds_at_once_are_served():
    model, batch = model_of("deepseek_v3"), batch_of()
    separate = [gradients(model, lambda: model(**batch).loss.backward())]
    for kind in ("sequence", "z"):
        balance = attached(kind, model)
        separate.append(gradients(model, lambda: model(**batch).loss.backward()))
        balance.detach()
    attached("sequence", model)
    attached("z", model)
    both = gradients(model, lambda: model(**batch, return_dict=False)[0].backward())
    plain, sequence, z = separate
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, sequence[name] + z[name] - plain[name], rtol=1e-6, atol=1e-6)


def test_a_model_that_returns_a_plain_dict_is_served():
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, labels):
            return dict(self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels))

    batch, model = batch_of(), model_of()
    expected = gradients(model, lambda: explicit(model, batch, "switch")[1].backward())
    wrapped = Wrapped(model)
    attached("switch", wrapped)
    assert_same(gradients(model, lambda: wrapped(**batch)["loss"].backward()), expected)


def test_alpha_may_be_set_anew():
    model, batch = model_of(), batch_of()
    balance = attached("switch", model)
    balance.alpha = 0.7
    found = gradients(model, lambda: model(**batch).loss.backward())
    balance.detach()
    other = BalanceLoss("switch", 0.7).attach(model)
    assert_same(found, gradients(model, lambda: model(**batch).loss.backward()))
    other.detach()


def test_wrong_use_is_one_clear_error():
    model = model_of()
    for alpha in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha={alpha} does not balance"):
            BalanceLoss("switch", alpha)
    with pytest.raises(ValueError, match="kind='aux' is no balancing loss known here: use switch, sequence"):
        BalanceLoss("aux", 0.1)
    with pytest.raises(ValueError, match="n_devices=2 does not matter to kind='switch'"):
        BalanceLoss("switch", 0.1, n_devices=2)
    for reach in (0, 5):
        with pytest.raises(ValueError, match=f"max_devices={reach} of 4 devices cannot be: use 1 to 4, or leave it"):
            BalanceLoss("communication", 0.1, n_devices=4, max_devices=reach).attach(model)
    with pytest.raises(ValueError, match="Linear has no module with a gate and fused experts"):
        BalanceLoss("switch", 0.1).attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="all experts are on one device, which is always balanced: use n_devices=2"):
        BalanceLoss("device", 0.1).attach(model)
    with pytest.raises(ValueError, match="n_devices=3 does not divide n_routed_experts=8"):
        BalanceLoss("device", 0.1, n_devices=3).attach(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: how PhimoeTopKRouter scores is not known here"):
        BalanceLoss("switch", 0.1).attach(tiny("phimoe"))
    balance = attached("switch", model)
    with pytest.raises(ValueError, match="has a BalanceLoss of kind 'switch' already"):
        attached("switch", model)
    with pytest.raises(ValueError, match=r"the loss has shape \(3,\): give one number"):
        balance(torch.ones(3))
    balance.attach(model).detach()
    for use in (balance.step, lambda: balance(torch.ones(()))):
        with pytest.raises(ValueError, match="this BalanceLoss is attached to no model"):
            use()
    assert not hooked(model)


def test_a_router_of_ours_with_a_forward_of_its_own_is_not_taken_for_what_its_config_says():
    class Router(ms.Router):
        def forward(self, x):
            logits = x @ self.weight.T
            weights, ids = logits.div(2).softmax(-1).topk(2)
            return Routing(logits, weights, ids)

    model = OwnLayers()
    model.layers[1].gate = Router(model.layers[1].config).double()
    with pytest.raises(ValueError, match=r"layers\.1: how Router scores is not known here, .*moesaic\.layer\.losses"):
        BalanceLoss("switch", 0.1).attach(model)
    assert not hooked(model)


def test_a_bias_that_is_added_afterwards_would_swallow_the_gradient_and_is_an_error():
    model, batch = model_of(), batch_of()
    balance = attached("switch", model)
    bias = BiasBalance(add_bias=True).attach(model)
    with pytest.raises(ValueError, match="a bias was added after BalanceLoss was attached: attach it after the bias"):
        model(**batch)
    balance.attach(model)
    assert any(layer.bias is not None for layer in moe_layers(model))
    found = gradients(model, lambda: model(**batch).loss.backward())
    balance.detach()
    assert_same(found, gradients(model, lambda: explicit(model, batch, "switch")[1].backward()))
    bias.detach()


def test_a_sequence_that_cannot_be_told_is_an_error():
    model = model_of("deepseek_v3")
    balance = attached("sequence", model)
    layer = model.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: which of its 10 tokens are of one sequence"):
        layer(torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True))
    balance.detach()
    balance = attached("switch", model)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # each a forward of its own
        balance(layer(x).sum()).backward()
    balance.step()
    assert list(balance.values) == ["model.layers.1.mlp"]


@pytest.fixture
def in_training(family):
    """The model of a family, which other tests of this process share, in training mode while this one runs."""
    found = tiny_of(family)
    if found.model is None:
        pytest.skip(f"{family} was not built: {found.reasons[0][:150]}")
    yield found.model.train()
    found.model.eval()


@pytest.mark.parametrize("family", families())
def test_every_family_is_served_to_the_last_bit_or_refused(family, in_training):
    model, layers, routings = in_training, moe_layers(in_training), {}
    balance = BalanceLoss("switch", ALPHA)
    if family in REFUSED:
        with pytest.raises(ValueError, match="scores is not known here"):
            balance.attach(model)
        return
    if any(type(layer.router) is nn.Linear for layer in layers):  # jamba before transformers 5.23
        balance.attach(model)
        with pytest.raises(ValueError, match="Linear returns no expert ids"):
            model(input_ids=token_ids(), use_cache=False)
        return

    def task():
        torch.manual_seed(0)  # dropout
        output = model(input_ids=token_ids(), use_cache=False)
        return (output.logits if "logits" in output else output.last_hidden_state).float().square().mean()

    balance.attach(model)
    injected = gradients(model, lambda: balance(task()).backward())
    balance.step()
    balance.detach()
    assert list(balance.values) == [layer.name for layer in layers]
    for layer in layers:
        layer.router.register_forward_hook(
            lambda router, _args, output, name=layer.name: routings.update({name: read_router(router, output)})
        )

    def by_hand():
        loss = task()
        for layer in layers:
            logits, weights, ids, _ = (x if i == 3 else x.flatten(0, -2) for i, x in enumerate(routings[layer.name]))
            loss = loss + ALPHA * switch_loss(Routing(logits, weights, ids), layer.config)
        loss.backward()

    expected = gradients(model, by_hand)
    for layer in layers:
        layer.router._forward_hooks.clear()
    assert_same(injected, expected)


def test_replicas_of_data_parallel_are_an_error():
    """torch makes them only of models on several GPUs, so one is made by hand, as torch.nn.parallel.replicate does."""
    model = model_of()
    attached("switch", model)
    router = model.model.layers[0].mlp.gate
    replica = router._replicate_for_data_parallel()
    for name, parameter in router.named_parameters():
        setattr(replica, name, parameter)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: it runs in a replica of nn.DataParallel.*torchrun"):
        replica(torch.randn(5, 32, dtype=torch.float64))
