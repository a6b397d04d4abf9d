"""BalanceLoss: the gradient of `loss + alpha * sum(losses)` to the last bit, and nothing else changes."""

import pytest
import torch
from hf_models import tiny, token_ids
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

import moesaic as ms
from moesaic.hf.added_bias import RULE
from moesaic.hf.modules import moe_layers
from moesaic.hf.outputs import read_router
from moesaic.layer.balance import expert_load
from moesaic.layer.losses import LOSSES
from moesaic.train.balance_loss import BalanceLoss
from moesaic.train.bias_balance import BiasBalance
from moesaic.types import Routing

FAMILIES = ["deepseek_v3", "glm4_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v2", "qwen2_moe"]
ALPHA = 0.3
OPTIONS = {"device": {"n_devices": 4}, "communication": {"n_devices": 4, "max_devices": 2}}
LINEAR = ["sequence", "z"]  # means over sequences or tokens: parts of a batch add up


def model_of(family="mixtral", **fields):
    torch.manual_seed(0)
    model = tiny(family, **fields).double().train()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def batch_of(rows=4, length=8, *, padded=True):
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3], mask[rows - 1, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def part(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def attached(kind, model, **options):
    return BalanceLoss(kind, ALPHA, **OPTIONS.get(kind, {}), **options).attach(model)


def gradients(model, run):
    """What `run` leaves in the model's parameters."""
    model.zero_grad()
    run()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def explicit(model, batch, kind):
    """The output and `loss + ALPHA * sum(losses)`, made of what plain hooks see."""
    seen = {}

    def see(layer):
        def hook(router, _args, output):
            found = read_router(router, output)
            seen[layer.name] = layer, Routing(found.logits.flatten(0, -2), found.weights, found.ids.flatten(0, -2))

        return layer.router.register_forward_hook(hook)

    handles = [see(layer) for layer in moe_layers(model)]
    output = model(**batch)
    for handle in handles:
        handle.remove()
    mask, length = batch["attention_mask"].bool().flatten(), batch["input_ids"].shape[1]
    total = 0.0
    for layer, routing in seen.values():
        own = {
            "sequence": {"sequences": torch.arange(len(mask)) // length},
            "global_batch": {"load": expert_load(routing.expert_ids[mask], layer.config.n_routed_experts)},
        }.get(kind, {})
        config = vars(layer.router).get(RULE, layer.config)
        total = total + LOSSES[kind](routing, config, mask=mask, **own, **OPTIONS.get(kind, {}))
    return output, output.loss + ALPHA * total


def assert_same(one, other, *, factor=1.0):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.equal(gradient * factor, other[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_is_that_of_an_explicit_sum_and_no_forward_value_changes(family, kind):
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


def hooked(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks or any("_moesaic" in key for key in vars(module))
    ]


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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_checkpointing_of_both_kinds_gives_the_same_gradient(kind, reentrant):
    """Also for two forwards in one backward, and with the loss outside of the model."""
    batch = batch_of()

    def two(model):
        return sum(model(**part(batch, rows)).loss for rows in (slice(0, 1), slice(1, 4)))

    def outside(model, balance):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return balance(ForCausalLMLoss(model(**inputs).logits, batch["labels"], 64))

    found = []
    for checkpointed in (False, True):
        model = model_of("deepseek_v3")
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        for run in (lambda m, _: m(**batch).loss, lambda m, _: two(m), outside):
            balance = attached(kind, model)
            found.append(gradients(model, lambda run=run, m=model, b=balance: run(m, b).backward()))
            balance.step()
            found.append(balance.values)
            balance.detach()
    for one, other in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
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
    with pytest.raises(ValueError, match="max_devices=0 is no number of devices"):
        BalanceLoss("communication", 0.1, max_devices=0)
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
    balance(layer(x).sum()).backward()
    balance.step()
    assert list(balance.values) == ["model.layers.1.mlp"]


# compiled


@pytest.fixture
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_by_layer(model):
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager")
    return model


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_graphs")
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("whole", "global_batch"), ("attached after compiling", "switch"), ("by layer", "sequence"),
        ("reentrant", "switch"), ("not reentrant", "z"),
    ],
)  # fmt: skip
def test_a_compiled_model_gets_the_same_gradient(way, kind):
    batch = batch_of()
    eager = model_of("deepseek_v3", num_hidden_layers=2)
    attached(kind, eager)
    expected = gradients(eager, lambda: eager(**batch).loss.backward())
    model = model_of("deepseek_v3", num_hidden_layers=2)
    if "reentrant" in way:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": way == "reentrant"})
    run = layer_by_layer(model) if way == "by layer" else torch.compile(model, backend="aot_eager")
    plain = None
    if way == "attached after compiling":
        plain = gradients(model, lambda: run(**batch).loss.backward())
    balance = attached(kind, model)
    assert_same(gradients(model, lambda: run(**batch).loss.backward()), expected)
    once = gradients(model, lambda: (run(**batch).loss * 2).backward())  # the same graph, another scale
    assert_same(expected, once, factor=2)
    balance.step()
    assert list(balance.values) == ["model.layers.1.mlp"]
    balance.detach()
    if plain is not None:
        assert_same(gradients(model, lambda: run(**batch).loss.backward()), plain)


# transformers' Trainer


def run_trainer(model, folder, data, balance=None, **arguments):
    arguments = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.1} | arguments
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data[:2], callbacks=[balance] if balance else []
    )
    trainer.train()
    return model


def rows_of(count, length=8):
    ids = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("kind", LINEAR)
def test_the_trainer_accumulates_to_the_same_step_as_one_large_batch(tmp_path, kind):
    """It divides by the tokens of the whole batch, not by the number of micro-batches: 1, 2 and 4 rows at a time."""
    plain = run_trainer(model_of(), tmp_path, rows_of(4), per_device_train_batch_size=4)
    moved = []
    for size in (4, 2, 1):
        balance = BalanceLoss(kind, ALPHA, **OPTIONS.get(kind, {}))
        model = run_trainer(
            model_of(), tmp_path, rows_of(4), balance,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        assert not hooked(model)
        moved.append(dict(model.named_parameters()))
    gate = "model.layers.1.mlp.gate.weight"
    assert (moved[0][gate] - dict(plain.named_parameters())[gate]).abs().max() > 1e-4
    for name, parameter in moved[0].items():
        for other in moved[1:]:
            torch.testing.assert_close(parameter, other[name], rtol=0, atol=1e-7)  # its loss is float32


def test_micro_batches_weigh_by_their_labels(tmp_path):
    """Under the Trainer a micro-batch with a third of the labels counts a third, for the task and for balance."""
    data = rows_of(2)
    data[0]["labels"] = data[0]["labels"].clone()
    data[0]["labels"][:4] = -100  # the loss counts 4 labels of row 0 and 7 of row 1
    balance = BalanceLoss("z", ALPHA)
    found = run_trainer(
        model_of(), tmp_path, data, balance, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    model = model_of()
    for row, share in zip(data, (4 / 11, 7 / 11), strict=True):
        batch = {name: value[None] for name, value in row.items()} | {"attention_mask": torch.ones(1, 8)}
        (explicit(model, batch, "z")[1] * share).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    for (name, one), other in zip(found.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7, msg=name)


def test_a_call_that_hides_its_labels_is_an_error():
    model, batch = model_of(), batch_of()
    attached("switch", model)
    loss = model(**batch, num_items_in_batch=torch.tensor(60)).loss
    loss.backward()
    del batch["attention_mask"]

    class Hiding(nn.Module):
        def forward(self, input_ids, **_kwargs):
            return model(input_ids, labels=input_ids)

    hiding = Hiding()
    hiding.model = model
    balance = BalanceLoss("z", 0.1).attach(hiding)
    with pytest.raises(ValueError, match="num_items_in_batch and without labels, so its part of the batch"):
        hiding(batch["input_ids"], num_items_in_batch=60)
    balance.detach()


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_moe"])
def test_the_trainer_brings_max_vio_down(tmp_path, family):
    def violation(model):
        """Of the worst layer."""
        with ms.record(model) as rec, torch.no_grad():
            model.eval()(ids)
        loads = [
            torch.bincount(torch.as_tensor(x).flatten(), minlength=n_experts) for x in rec.trace.to_arrays()["picks"]
        ]
        return max((load.max() / load.double().mean() - 1).item() for load in loads)

    fields = {"n_group": 1, "topk_group": 1} if family != "qwen3_moe" else {}
    model, ids = tiny(family, **fields), token_ids(16, 16)
    n_experts = moe_layers(model)[0].config.n_routed_experts
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.02  # what all tokens share makes some experts liked by nature
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("gate.weight"))
    before = violation(model)
    balance = BalanceLoss("switch", 3.0)
    run_trainer(model.train(), tmp_path, rows_of(80, 16), balance, max_steps=40, per_device_train_batch_size=8)
    assert violation(model) < 0.5 * before
    assert set(balance.values) == {layer.name for layer in moe_layers(model)}
