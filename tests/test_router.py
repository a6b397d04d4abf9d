import copy
import io

import pytest
import torch
from cases import GRID, check_routing, v3
from oracles import densify, tied_rows
from transformers import DeepseekV3Config, DeepseekV4Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from moesaic.config import MoEConfig
from moesaic.layer.moe import DeepseekV3MoE
from moesaic.layer.router import Router, jitter

EXACT = 5.000123  # bfloat16 would make it 5.0, float16 5.0
BIASES = {
    "zero": lambda n: torch.zeros(n),
    "small": lambda n: torch.randn(n) * 0.1,
    "all -2": lambda n: torch.full((n,), -2.0),
    "wide": lambda n: torch.empty(n).uniform_(-50, 50),
    "around 50": lambda n: 50 + torch.rand(n) * 1e-3,
}


def router_with_bias(config: MoEConfig | None = None) -> Router:
    router = Router(config or v3(16, 4, 2, 4))
    router.e_score_correction_bias.fill_(EXACT)
    return router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("experts", "groups", "kept", "k"), GRID)
def test_router_equals_transformers(experts, groups, kept, k, bias, dtype):
    config = v3(experts, groups, kept, k)
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**{**config.to_dict(), "vocab_size": 8})).to(dtype)
    torch.nn.init.normal_(theirs.weight, std=0.3)
    theirs.e_score_correction_bias = BIASES[bias](experts)
    ours = Router(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(300, 32, dtype=dtype)
    logits, weights, ids = theirs(x)
    routing = check_routing(ours(x), experts)
    assert torch.equal(routing.logits, logits)
    differ = (routing.expert_ids.sort(1).values != ids.sort(1).values).any(1)
    tied = tied_rows(logits.sigmoid() + theirs.e_score_correction_bias, k, groups, kept)
    assert not (differ & ~tied).any(), "a row differs where nothing ties"
    assert tied.float().mean() < 0.5, "the case is all ties and judges nothing"
    dense = densify(routing.expert_ids, routing.weights, experts)[~differ]
    torch.testing.assert_close(dense, densify(ids, weights, experts)[~differ], rtol=0, atol=5e-7)


def _through_pickle(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float16),
    "down and up": lambda m: m.bfloat16().float(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "deepcopy of bfloat16": lambda m: copy.deepcopy(m.bfloat16()),
    "share_memory": lambda m: m.share_memory(),
    "pickle": lambda m: _through_pickle(m.bfloat16()),
    "eval and requires_grad": lambda m: m.eval().requires_grad_(True),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in a model"])
def test_correction_bias_survives(cast, wrapped):
    router = router_with_bias()
    module = cast(torch.nn.Sequential(router) if wrapped else router)
    bias = (module[0] if wrapped else module).e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, torch.full((16,), EXACT))
    assert not bias.requires_grad


def test_correction_bias_is_a_buffer_that_optimizers_do_not_see():
    router = router_with_bias()
    assert "e_score_correction_bias" in dict(router.named_buffers())
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    router(torch.randn(8, 32)).weights[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert router.e_score_correction_bias.grad is None


@pytest.mark.parametrize("assign", [False, True])
def test_a_bfloat16_module_loads_a_float32_bias_unchanged(assign):
    saved = router_with_bias().bfloat16().state_dict()
    assert saved["e_score_correction_bias"].dtype == torch.float32
    loaded = Router(v3(16, 4, 2, 4)).bfloat16()
    loaded.load_state_dict(saved, assign=assign)
    assert torch.equal(loaded.e_score_correction_bias, torch.full((16,), EXACT))
    assert loaded.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
def test_a_bfloat16_checkpoint_gives_a_float32_bias(assign):
    saved = {name: value.bfloat16() for name, value in router_with_bias().state_dict().items()}
    loaded = Router(v3(16, 4, 2, 4))
    loaded.load_state_dict(saved, assign=assign)
    assert loaded.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(loaded.e_score_correction_bias, saved["e_score_correction_bias"].float())
    loaded.to(torch.bfloat16)
    assert loaded.e_score_correction_bias.dtype == torch.float32


def test_a_router_born_on_meta_gets_a_zero_bias_and_takes_a_checkpoint():
    with torch.device("meta"):
        router = Router(v3(16, 4, 2, 4))
    assert router.e_score_correction_bias.is_meta
    routing = router(torch.empty(3, 32, device="meta"))  # which has no autocast
    assert (routing.logits.shape, routing.weights.shape) == ((3, 16), (3, 4))
    router = router.to_empty(device="cpu")
    assert router.e_score_correction_bias.eq(0).all()
    router.load_state_dict(router_with_bias().state_dict(), assign=True)
    assert torch.equal(router.e_score_correction_bias, torch.full((16,), EXACT))


def test_a_layer_born_on_meta_that_takes_a_checkpoint_s_tensors_counts_and_moves():
    config = v3(16, 4, 2, 4)
    with torch.device("meta"):
        layer = DeepseekV3MoE(config)
    layer.load_state_dict(DeepseekV3MoE(config).state_dict(), assign=True)
    layer.to("cpu").train()(torch.randn(3, 32))
    assert layer.gate.load.sum() == 3 * 4


def test_state_dict_keys_are_those_of_transformers():
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=32))
    assert Router(v3(256, 8, 4, 8)).state_dict().keys() == theirs.state_dict().keys()
    assert Router(MoEConfig.preset("mixtral", hidden_size=32)).state_dict().keys() == {"weight"}


def test_float32_router_ignores_autocast():
    router, x = Router(v3(16, 4, 2, 4)), torch.randn(20, 32)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert torch.equal(plain.logits, cast.logits)
    assert torch.equal(plain.weights, cast.weights)


@pytest.mark.parametrize(
    ("preset", "logits", "weights"),
    [
        ("deepseek-v3", torch.float32, torch.float32),
        ("mixtral", torch.bfloat16, torch.float32),
        ("qwen3-moe", torch.bfloat16, torch.bfloat16),
        ("gpt-oss", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_of_a_bfloat16_model_are_the_family_s(preset, logits, weights):
    router = Router(MoEConfig.preset(preset, hidden_size=32)).bfloat16()
    routing = router(torch.randn(3, 32, dtype=torch.bfloat16))
    assert (routing.logits.dtype, routing.weights.dtype) == (logits, weights)


def test_replay_of_a_table_is_the_hash_routing_of_transformers():
    config = DeepseekV4Config(vocab_size=50, hidden_size=32, n_routed_experts=16, num_experts_per_tok=4)
    theirs, ours = DeepseekV4HashRouter(config), Router(MoEConfig.from_hf(config))
    torch.nn.init.normal_(theirs.weight)
    theirs.tid2eid = torch.stack([torch.randperm(16)[:4] for _ in range(50)])
    ours.weight = theirs.weight
    x, token_ids = torch.randn(2, 9, 32), torch.randint(50, (2, 9))
    found = ours(x, replay=theirs.tid2eid[token_ids.flatten()])
    for value, expected in zip(found, theirs(x, token_ids), strict=True):
        assert torch.equal(value, expected)


def test_jitter_moves_the_router_in_training_only_and_never_the_callers_tensor():
    router = Router(v3(16, 4, 2, 4, router_jitter_noise=0.1))
    x = torch.randn(10, 32)
    before = x.clone()
    assert not torch.equal(router(x).logits, router(x).logits)
    assert torch.equal(x, before)
    router.eval()
    assert torch.equal(router(x).logits, router(x).logits)
    ratio = jitter(x, 0.1) / x
    assert 0.9 <= ratio.min() < 0.95
    assert 1.05 < ratio.max() <= 1.1


@pytest.mark.parametrize("shape", [(32,), (1, 32), (5, 32), (0, 32), (2, 3, 32), (2, 3, 4, 32), (2, 0, 32)])
def test_any_leading_shape_is_flattened_batch_major(shape):
    router, x = Router(v3(16, 4, 2, 4)), torch.randn(shape)
    routing = check_routing(router(x), 16)
    assert torch.equal(routing.weights, router(x.reshape(-1, 32)).weights)


def test_non_contiguous_input_routes_as_its_copy():
    router, x = Router(v3(16, 4, 2, 4)), torch.randn(32, 7).T
    assert not x.is_contiguous()
    assert torch.equal(router(x).expert_ids, router(x.contiguous()).expert_ids)


def test_another_width_is_named_with_what_fits():
    router, layer = Router(v3(16, 4, 2, 4)), DeepseekV3MoE(v3(16, 4, 2, 4, moe_intermediate_size=24))
    said = r"x has width 31 and hidden_size=32: give \[\.\.\., 32\], or another hidden_size"
    for module in (router, layer):
        with pytest.raises(ValueError, match=said):
            module(torch.randn(2, 5, 31))


def test_repr_says_what_it_does():
    assert repr(Router(v3(16, 4, 2, 4))) == "Router(32 -> top 4 of 16, groups=4 (keep 2), sigmoid, noaux_tc)"
    unused = v3(16, 4, 2, 4, topk_method="greedy")
    assert repr(Router(unused)) == "Router(32 -> top 4 of 16, sigmoid, greedy)"


def test_load_counts_the_last_training_forward_and_is_not_saved():
    router = Router(v3(16, 4, 2, 4)).bfloat16()
    assert router.load.eq(0).all()
    x = torch.randn(5000, 32, dtype=torch.bfloat16)
    for _ in range(2):  # overwritten, not added up; counts above 256 are exact in a bfloat16 model
        routing = router(x)
        assert router.load.tolist() == torch.bincount(routing.expert_ids.flatten(), minlength=16).tolist()
    router.eval()(x[:7])
    assert router.load.sum() == 5000 * 4, "inference leaves it alone"
    assert "load" not in router.state_dict()


@pytest.mark.parametrize("reentrant", [False, True])
def test_load_is_right_under_activation_checkpointing(reentrant):
    router, x = Router(v3(16, 4, 2, 4)), torch.randn(50, 32, requires_grad=True)
    weights = torch.utils.checkpoint.checkpoint(lambda x: router(x).weights, x, use_reentrant=reentrant)
    weights.square().sum().backward()
    assert router.load.sum() == 50 * 4


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("preset", ["deepseek-v3", "mixtral", "gpt-oss"])
def test_router_compiles_into_one_graph(preset, dynamic):
    router, x = Router(MoEConfig.preset(preset, hidden_size=32)), torch.randn(40, 32)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ours, theirs in zip(compiled(x), router(x), strict=True):
        assert torch.equal(ours, theirs)
    compiled(x).weights[:, 0].sum().backward()
    assert router.weight.grad.isfinite().all()
    with pytest.raises(Exception, match="has width 31 and hidden_size=32"):
        compiled(torch.randn(40, 31))
