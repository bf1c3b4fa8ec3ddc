"""The tokenizer: byte-level pieces of the words that occur in games, so that any text can be encoded."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments.secret_number.chat import CHAT_TEMPLATE, END, SPECIAL

__all__ = ["VOCABULARY", "build"]

VOCABULARY = 640
"""256 bytes, the special tokens, and pieces of words up to whole words and numbers."""


def build(texts: Iterable[str], *, context: int) -> PreTrainedTokenizerFast:
    """Learn the tokenizer from rendered conversations.

    Parameters
    ----------
    texts : iterable of str
    context : int
        Most tokens the model takes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=SPECIAL[0],
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return wrapped
