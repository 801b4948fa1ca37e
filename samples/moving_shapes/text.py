"""Word-level tokenizer and the small UMT5 encoder of the moving-shapes pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .captions import vocabulary

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"

# Width of the text embeddings.
TEXT_DIM = 64

# T5's buckets of relative positions: the first half looks back, the second half ahead.
_PREVIOUS_WORD, _NEXT_WORD = 1, 17
_NEIGHBOUR_BIAS = 5.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: lower-cased words, one id each, an end mark behind every sentence."""
    words = [PAD, END, UNKNOWN, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=512,
    )


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Build an untrained one-layer encoder, without dropout: the captions are few and clean.

    The attention is set by hand and frozen: head 0 looks at the next word, head 1 at the previous
    word. The grammar needs no more. Trained attention locked on to single words within a few
    hundred steps, and the encoder stayed a bag of words: it knew both colours of a caption, but not
    which colour is that of the background.
    """
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder = UMT5EncoderModel(config)
    attention: Any = encoder.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight
    with torch.no_grad():
        attention.q.weight.zero_()
        bias.zero_()
        bias[_NEXT_WORD, 0] = _NEIGHBOUR_BIAS
        bias[_PREVIOUS_WORD, 1] = _NEIGHBOUR_BIAS
    for frozen in (attention.q.weight, attention.k.weight, bias):
        frozen.requires_grad_(False)
    return encoder


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (captions, longest caption), padded on the right."""
    batch = tokenizer(list(captions), padding=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask
