"""What one call of a model says about its tokens: rows of the batch, padding, token ids, prefill or decoding."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moesaic.hf.modules import MoELayer, parameters_of

TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds")
OTHER_TEXT = "decoder_input_ids"  # who takes it too calls an encoder and a decoder, each with tokens of its own
BESIDE_TOKENS = ("mask", "position_ids")  # how the names of arguments end that look like token ids and are none
CACHES = ("cache", "past_key_values", "cache_params")  # the key-value cache since transformers 5.24, and before


class Forward(NamedTuple):
    """One call of a model, batch-major, padding still in.

    rows: int64 [n], the row of the batch a token is in. keep: bool [n], False is padding; None where all are kept.
    input_ids: [n] or None. continues: a step whose rows go on with sequences that a cache holds. decoding: it has one
    token a row. cache: id of that cache, 0 for none. known: False where the call itself was not seen.
    """

    rows: Tensor
    keep: Tensor | None = None
    input_ids: Tensor | None = None
    continues: bool = False
    decoding: bool = False
    cache: int = 0
    known: bool = True
    of_tokens: bool = True

    def kept(self, tensor: Tensor) -> Tensor:
        return tensor if self.keep is None else tensor[self.keep.to(tensor.device)]


def takes_tokens(module: nn.Module) -> bool:
    """True for a model that is called with token ids or their embeddings, of one text."""
    names = parameters_of(module)
    return OTHER_TEXT not in names and any(name in TOKEN_ARGUMENTS for name in names)


def models_in(model: nn.Module, *, nested: bool = False) -> list[nn.Module]:
    """The outermost modules whose calls describe tokens; `model` itself where there are none.

    A wrapper that passes everything on says nothing of its own: what it wraps does. `nested` gives those inside of
    others too, for whoever must know of a call of the model without its head.
    """
    return _find(model, takes_tokens, nested=nested)


def models_with(model: nn.Module, layers: Sequence[MoELayer], *, nested: bool = False) -> list[nn.Module]:
    """Those of `models_in` that hold any of `layers`: the others may read another text, as an encoder does."""
    wanted = {part for layer in layers for part in (layer.router, layer.experts)}
    return [part for part in models_in(model, nested=nested) if not wanted.isdisjoint(part.modules())]


def outermost_in(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that are given tokens, of one text or of two; `model` itself where there are none.

    Only they know the loss, and whether a forward came to its end.
    """
    return _find(model, lambda module: takes_tokens(module) or OTHER_TEXT in parameters_of(module))


def parts_in(model: nn.Module, layers: Sequence[MoELayer]) -> list[nn.Module]:
    """Those that hold any of `layers` and run inside of another call, on a text of their own: encoders and decoders."""
    outermost = outermost_in(model)
    return [part for part in models_with(model, layers) if part not in outermost]


def _find(model: nn.Module, wanted: Callable[[nn.Module], bool], *, nested: bool = False) -> list[nn.Module]:
    found, inside = [], set()
    for module in model.modules():
        if (nested or module not in inside) and wanted(module):
            found.append(module)
            inside |= set(module.modules())
    return found or [model]


def check_one_text(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """ValueError where layers lie in an encoder and in its decoder."""
    for module in model.modules():
        if OTHER_TEXT in parameters_of(module) and len(models_with(module, layers)) > 1:
            raise ValueError(
                f"{type(module).__name__} has MoE layers in its encoder and in its decoder, which read two texts, "
                "and a record holds one: record each by itself (get_encoder(), get_decoder())"
            )


def bodies_in(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """What takes tokens inside of the outermost models and holds all of `layers` that those do: a model without its
    head, which may be called by itself."""
    found, wanted = [], set(layers)
    for outer in models_in(model):
        if held := wanted.intersection(outer.modules()):
            inner = (part for part in models_in(outer, nested=True) if part is not outer)
            found += [part for part in inner if held.issubset(part.modules())]
    return found


class Arguments(NamedTuple):
    """What of a model's arguments describes its tokens."""

    tokens: Tensor  # token ids [rows, length], embeddings [rows, length, D], or hidden states [..., D]
    mask: Tensor | None  # a 2-D attention mask, 1 where there is a token
    cache: Any
    positions: Tensor | None  # [rows or 1, length], where each token is in its sequence


def read_arguments(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Arguments | None:
    """None where the arguments do not say which tokens there are."""
    names = parameters_of(model)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = given.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        tokens = given.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            if takes_tokens(model):
                return None
            rest = {name: value for name, value in given.items() if not name.endswith(BESIDE_TOKENS)}
            in_order = [*(rest[name] for name in names if name in rest), *rest.values(), *args[len(names) :]]
            tokens = next((value for value in in_order if isinstance(value, Tensor)), None)
            if tokens is None or not (_are_states(tokens) or _are_ids(tokens)):
                return None
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        positions = None
    return Arguments(tokens, mask, cache_in(given), positions)


def _are_states(tokens: Tensor) -> bool:
    return tokens.dim() >= 2 and tokens.is_floating_point()


def _are_ids(tokens: Tensor) -> bool:
    return tokens.dim() == 2 and tokens.dtype in (torch.int32, torch.int64)


def rows_and_length(tokens: Tensor) -> tuple[int, int]:
    """Of token ids [rows, length], or of [..., length, D]; a plain [T, D] is one sequence."""
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    return shape[:-1].numel(), shape[-1]


def token_mask(tokens: Tensor, mask: Tensor | None) -> Bool[Tensor, " T"] | None:
    """A 2-D attention mask as one flag a token of this call; None where it does not fit, so that all are tokens.

    With a cache it covers the past too, of which no token is here.
    """
    n_rows, length = rows_and_length(tokens)
    if mask is None or len(mask) != n_rows or mask.shape[1] < length:
        return None
    return mask[:, mask.shape[1] - length :].detach().bool().flatten()


def forward_of(
    tokens: Tensor, mask: Tensor | None, *, cached: bool = False, cache: int = 0, of_tokens: bool = True
) -> Forward:
    """The description of a call with these tokens; a mask that does not fit them is not a padding mask."""
    n_rows, length = rows_and_length(tokens)
    ids = None if tokens.is_floating_point() else tokens
    keep = token_mask(tokens, mask)
    keep = None if keep is None else keep.cpu()
    return Forward(
        rows=torch.arange(n_rows, device="cpu").repeat_interleave(length),
        keep=None if keep is None or keep.all() else keep,
        input_ids=None if ids is None else ids.detach().flatten().to("cpu", torch.int64),
        continues=cached,
        decoding=cached and length == 1,
        cache=cache,
        of_tokens=of_tokens,
    )


def describe_forward(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Forward | None:
    """Rows, padding and token ids of one call of `model`; None where its inputs do not say."""
    found = read_arguments(model, args, kwargs)
    if found is None:
        return None
    return forward_of(
        found.tokens,
        found.mask,
        cached=tokens_in(found.cache) > 0,
        cache=0 if found.cache is None else id(found.cache),
        of_tokens=takes_tokens(model) or not found.tokens.is_floating_point(),
    )


def cache_of(output: Any) -> Any:
    """The key-value cache in what a model returned; None where there is none."""
    return cache_in(output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in CACHES})


def cache_in(given: Mapping[str, Any]) -> Any:
    """The first that is one: a model may call something else `cache`. Outputs of transformers 5.24 warn where they are
    asked for a name of before, so they are asked for none."""
    named = (value for name, value in given.items() if name in CACHES)
    return next((value for value in named if hasattr(value, "get_seq_length")), None)


def tokens_in(cache: Any) -> int:
    """How many tokens a key-value cache holds; 0 for no cache and for one that does not say."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # only layers of linear attention, which count nothing
        return int(bool(getattr(cache, "has_previous_state", lambda: False)()))


def unseen(n_tokens: int) -> Forward:
    """An inner module was called alone: its tokens are taken for one sequence."""
    return Forward(torch.zeros(n_tokens, dtype=torch.int64, device="cpu"), known=False)


class SequenceNumbers:
    """Sequences numbered through all forwards.

    A forward that continues goes on with the numbers of the last one with its cache, or of the one before it.
    """

    def __init__(self) -> None:
        self._start = self._end = self._last_rows = 0
        self._starts: dict[int, int] = {}  # cache -> number of its first row

    @property
    def count(self) -> int:
        """How many sequences there are so far."""
        return self._end

    def of(self, forward: Forward) -> Tensor:
        """int64, one number per kept token of the next forward."""
        n_rows = int(forward.rows[-1]) + 1 if len(forward.rows) else 0
        if forward.continues and forward.cache in self._starts:
            self._start = self._starts[forward.cache]
        elif not (forward.continues and n_rows == self._last_rows):
            self._start = self._end
        if forward.cache:
            self._starts[forward.cache] = self._start
        self._end, self._last_rows = max(self._end, self._start + n_rows), n_rows
        return forward.kept(self._start + forward.rows)
