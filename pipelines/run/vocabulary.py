"""Words that a model with a small vocabulary has never seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import shortened

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Tokenizers of real models hold tens of thousands of pieces, or single bytes, and know every word.
_LARGEST_LIST = 200
# Of a warning: the most unknown words, and the most letters of each.
_MOST_WORDS, _LONGEST_WORD = 10, 30


def warn_of_words(pipe: DiffusionPipeline, prompt: str, warn: Callable[[str], None]) -> None:
    """Warn of the words in the prompt that the model does not know, if there are any."""
    strange, known = unknown_words(pipe, prompt)
    if strange:
        shown = [shortened(word, _LONGEST_WORD) for word in strange[:_MOST_WORDS]]
        more = f" (and {len(strange) - len(shown)} more)" if len(strange) > len(shown) else ""
        warn(f"the model does not know {', '.join(shown)}{more}; its words are: {' '.join(known)}")


def unknown_words(pipe: DiffusionPipeline, prompt: str) -> tuple[list[str], list[str]]:
    """The words of the prompt that the tokenizer does not know, and all words that it knows.

    Both lists are empty for tokenizers that can spell any word.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None or len(tokenizer) > _LARGEST_LIST:
        return [], []
    words = list(dict.fromkeys(re.findall(r"\w+", prompt)))
    strange = [
        word for word in words if unknown in tokenizer(word, add_special_tokens=False).input_ids
    ]
    special = set(tokenizer.all_special_tokens)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return strange, [word for word, _ in vocabulary if word not in special]
