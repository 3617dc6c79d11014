"""Two small tokenizers, made here so that no test needs a download."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from evaluation import ruler_prompts
from evaluation.ruler_data import haystack_sentences, vocabulary


@cache
def word_pieces(vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the shipped haystack, words and prompts; a text begins with <s>."""
    adjectives, nouns = vocabulary()
    texts = [*haystack_sentences(), " ".join(adjectives + nouns)]
    texts += [value for value in vars(ruler_prompts).values() if isinstance(value, str)] * 20
    return _tokenizer(vocab_size, texts)


@cache
def bytes_alone() -> PreTrainedTokenizerFast:
    """A token for every byte: nothing is learnt, so its counts are the same with every version of the libraries."""
    return _tokenizer(259, [])


def _tokenizer(vocab_size: int, texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
