"""The tiny model's tokenizer: a byte-level BPE, so that any text comes back exactly as it went in."""

from typing import TYPE_CHECKING

from moesaic.train.data import DOMAINS, corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
# Characters a domain gives to the training of the tokenizer: all of Chinese verse (3 bytes a character) and the manual,
# a part of the others, or else English would take nearly all merges.
SAMPLE = 1_000_000


def train_tokenizer() -> "PreTrainedTokenizerFast":
    """Learn the merges on the train split. No randomness: the same corpus gives the same tokenizer.

    The one special token ends every document (id 0); nothing is added to a text that is encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["\n".join(text for _, text in corpus(domain, "train"))[:SAMPLE] for domain in DOMAINS]
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
