"""Records and counts of models that are not called as those of transformers are with one text."""

import pytest
import torch
from torch import nn

from moesaic.hf.modules import moe_layers
from moesaic.layer.moe import MoE
from moesaic.trace.recording.record import record
from moesaic.trace.reroute.replay import replay
from moesaic.train.balance_loss import BalanceLoss
from moesaic.train.counting import LoadCounter

IDS = torch.arange(3, 35).view(4, 8)
MASK = torch.ones_like(IDS)
MASK[:, :3] = 0


class GPT(nn.Module):
    """A model of one's own, which passes `loops` times through its layers."""

    def __init__(self, loops=1):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.loops = nn.Embedding(64, 8), loops
        self.layers = nn.ModuleList(MoE.classic(8, 8, 8, 4, 2) for _ in range(2))

    def forward(self, input_ids, targets=None, attention_mask=None):  # noqa: ARG002 (what a model is called with)
        x = self.embed(input_ids)
        for layer in [*self.layers] * self.loops:
            x = x + layer(x)
        return x


class NanoGPT(GPT):
    def forward(self, idx, targets=None, attention_mask=None):
        return super().forward(idx, targets, attention_mask)


def recorded(model, **kwargs):
    with record(model) as rec, torch.no_grad():
        model(**kwargs)
    return rec.trace


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of its own
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_whatever_a_model_of_ones_own_calls_its_ids_its_rows_and_its_padding_are_known(compiled):
    found = []
    for model, name in ((GPT(), "input_ids"), (NanoGPT(), "idx")):
        run = torch.compile(model, backend="aot_eager") if compiled else model
        counter = LoadCounter(model, moe_layers(model), training=True)
        with record(model) as rec:
            run(targets=IDS + 1, attention_mask=MASK, **{name: IDS})
        found.append((rec.trace.to_arrays(), counter.take()))
        counter.remove()
    (arrays, loads), (own_arrays, own_loads) = found
    assert arrays["input_ids"].tolist() == IDS[:, 3:].flatten().tolist()
    assert arrays.keys() == own_arrays.keys()
    assert all((own_arrays[name] == array).all() for name, array in arrays.items())
    assert all(torch.equal(own_loads[name], load) and load.sum() == 2 * 4 * 5 for name, load in loads.items())


def test_padding_and_rows_are_known_to_its_balance_loss():
    values = []
    for model, name in ((GPT(), "input_ids"), (NanoGPT(), "idx")):
        balance = BalanceLoss("sequence", 0.1).attach(model.train())
        balance(model(attention_mask=MASK, **{name: IDS}).sum()).backward()
        balance.step()
        values.append({name: value.item() for name, value in balance.values.items()})
    assert values[0] == values[1]


def test_one_that_loops_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match=r"'layers\.0' runs several times in one call"):
        recorded(NanoGPT(loops=2), idx=IDS)


def test_numbers_that_are_no_row_of_ids_are_not_taken_for_one():
    for other in (IDS.bool(), IDS[None].expand(2, 2, -1, -1), IDS.flatten()):
        rec = recorded(Numbers(), numbers=other)
        assert rec.input_ids is None
        assert rec.sequences.unique().tolist() == [0]
    for named in ({"attention_mask": MASK}, {"position_ids": MASK.cumsum(1)}):
        rec = recorded(MaskFirst(), **named, idx=IDS)
        kept = IDS[:, 3:] if "attention_mask" in named else IDS
        assert rec.input_ids.tolist() == kept.flatten().tolist()


class Numbers(GPT):
    def forward(self, numbers):
        return super().forward(numbers.long().reshape(-1, 8))


class MaskFirst(GPT):
    def forward(self, attention_mask=None, position_ids=None, idx=None):  # noqa: ARG002
        return super().forward(idx)


def switch():
    import transformers as hf

    config = hf.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1, num_heads=2,
        num_experts=4, expert_capacity=64, num_decoder_layers=2, num_sparse_decoder_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.SwitchTransformersForConditionalGeneration(config)


def test_an_encoder_and_its_decoder_are_two_records_and_padding_of_one_is_not_that_of_the_other():
    model, batch = switch().eval(), {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS + 20}
    with pytest.raises(ValueError, match=r"in its encoder and in its decoder, .*: record each by itself"):
        recorded(model)
    with record(model.get_encoder()) as encoder, record(model.get_decoder()) as decoder, torch.no_grad():
        model(**batch)
    assert encoder.trace.input_ids.tolist() == IDS[:, 3:].flatten().tolist()
    assert decoder.trace.input_ids.tolist() == (IDS + 20).flatten().tolist()
    counter = LoadCounter(model, layers := moe_layers(model), training=False)
    model(**batch)
    loads = counter.take()
    counter.remove()
    assert [int(loads[layer.name].sum()) for layer in layers] == [4 * 5, 4 * 8]


def test_where_only_the_decoder_has_experts_the_record_is_of_its_text():
    model = switch().eval()
    del model.encoder.block[1]
    trace = recorded(model, input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS + 20)
    assert trace.input_ids.tolist() == (IDS + 20).flatten().tolist()


class Part(nn.Module):
    """An encoder or a decoder, with experts or without."""

    def __init__(self, *, moe=True):
        super().__init__()
        self.embed, self.moe = nn.Embedding(64, 8), MoE.classic(8, 8, 8, 4, 2) if moe else nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):  # noqa: ARG002
        x = self.embed(input_ids)
        return x + self.moe(x)


class Embedding(nn.Embedding):
    """Is called with token ids by that name, as NLLB's is, and describes nothing."""

    def forward(self, input_ids):
        return super().forward(input_ids)


class Both(nn.Module):
    """An encoder and a decoder of one's own, with the loss."""

    def __init__(self, *, moe=True, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = Embedding(64, 8) if shared else None
        self.encoder, self.decoder = Part(moe=moe), Part()
        if shared:
            self.encoder.embed = self.decoder.embed = self.embed

    def forward(self, input_ids, decoder_input_ids, attention_mask=None):
        states = self.encoder(input_ids, attention_mask).mean(1, keepdim=True)
        return {"loss": (self.decoder(decoder_input_ids) + states).square().mean()}


TEXTS = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5] + 20}
OTHERS = {"input_ids": IDS + 9, "decoder_input_ids": IDS[:, :6] + 7}


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of its own
@pytest.mark.parametrize("kind", ["switch", "sequence"])
@pytest.mark.parametrize("compiled", ["", *(pytest.param(x, marks=pytest.mark.compile) for x in ("whole", "encoder"))])
def test_the_loss_of_an_encoder_and_its_decoder_scales_the_balancing_of_both(kind, compiled):
    """Each as by its own forward and a loss that is named: of two forwards in one backward, each by its own loss."""
    found = []
    for named in (False, True):
        model = Both().train()
        balance = BalanceLoss(kind, 0.1).attach(model)
        if compiled and not named:
            (model if compiled == "whole" else model.encoder).compile(backend="aot_eager")
        if named:
            for batch, weight in ((TEXTS, 1), (OTHERS, 3)):
                (balance(model(**batch)["loss"]) * weight).backward()
        else:
            (model(**TEXTS)["loss"] + 3 * model(**OTHERS)["loss"]).backward()
        balance.step()
        found.append(({n: p.grad for n, p in model.named_parameters()}, balance.values))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][1].keys() == {"encoder.moe", "decoder.moe"}


@pytest.mark.parametrize("shared", [False, True])
def test_the_balancing_of_an_encoder_and_of_its_decoder_each_leaves_out_its_own_padding(shared):
    padded, cut = (
        {**TEXTS, "input_ids": ids, "attention_mask": mask} for ids, mask in ((IDS, MASK), (IDS[:, 3:], None))
    )
    values = []
    for batch in (padded, cut):
        model = Both(shared=shared).train()
        balance, counter = (
            BalanceLoss("switch", 0.1).attach(model),
            LoadCounter(model, moe_layers(model), training=True),
        )
        model(**batch)["loss"].backward()
        balance.step()
        values.append((balance.values, counter.take()))
    torch.testing.assert_close(*values)


def test_an_encoder_whose_decoder_failed_is_in_no_load_and_in_no_value():
    model, again = Both().train(), Both().train()
    counters = [LoadCounter(one, moe_layers(one), training=True) for one in (model, again)]
    balances = [BalanceLoss("global_batch", 0.1).attach(one) for one in (model, again)]
    with pytest.raises(IndexError):
        again(IDS[:2], IDS + 64)
    for one, balance in zip((model, again), balances, strict=True):
        one(**TEXTS)["loss"].backward()
        balance.step()
    loads = [counter.take() for counter in counters]
    assert [int(load.sum()) for load in loads[0].values()] == [2 * 4 * 5, 2 * 4 * 5]
    torch.testing.assert_close(*loads)
    torch.testing.assert_close(*(balance.values for balance in balances))


def test_a_record_of_a_decoder_beside_an_encoder_without_experts_is_replayed():
    model = Both(moe=False).eval()
    trace = recorded(model, **TEXTS)
    with torch.no_grad():
        expected = model(**TEXTS)["loss"]
        for layer in moe_layers(model):
            layer.router.weight.neg_()
        assert not torch.equal(model(**TEXTS)["loss"], expected)
    with replay(model, trace, weights="recorded") as replayer, torch.no_grad():
        assert torch.equal(model(**TEXTS)["loss"], expected)
    assert replayer.tokens == 4 * 5


@pytest.mark.filterwarnings("ignore", "error:.*began in a compiled graph")
@pytest.mark.compile
def test_nobody_waits_for_an_encoder_without_experts_in_a_compiled_model():
    model = Both(moe=False).eval()
    with record(model) as rec, torch.no_grad():
        torch.compile(model, backend="eager")(**TEXTS)
    assert rec.trace.input_ids.tolist() == TEXTS["decoder_input_ids"].flatten().tolist()
