"""text8's alphabet, and any text written in it.

text8 is Wikipedia reduced to the letters a to z and single spaces by the script at the end of M. Mahoney, "About the
Test Data" (2006): capitals are made small, each digit is spelt out as a word of its own, whatever else is not a letter
becomes a space, and several spaces become one. The script has no rule for letters with accents outside of Wikipedia's
mark-up. Here they lose them first (Unicode's decomposition NFKD without the combining marks), and the few Latin letters
that do not decompose are written as is usual in English.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

__all__ = ["CHARACTERS", "to_text8", "character_tokenizer"]

CHARACTERS = " abcdefghijklmnopqrstuvwxyz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPELT = {ord(digit): f" {word} " for digit, word in zip("0123456789", DIGITS, strict=True)}
LATIN = str.maketrans({"æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i", "ħ": "h"})


def to_text8(text: str) -> str:
    """The text in text8's 27 characters, without a space at either end."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    return re.sub("[^a-z]+", " ", plain.translate(LATIN).translate(SPELT)).strip()


def character_tokenizer(alphabet: str = CHARACTERS, end: str | None = None) -> Any:
    """One token for each character of an alphabet, text8's unless given, and one that ends a text, if it has a name.

    Raises:
        ValueError: there are no characters, or one twice.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not alphabet or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"alphabet {alphabet!r}: expected characters, each of them once")
    vocabulary = {character: i for i, character in enumerate(alphabet)} | ({end: len(alphabet)} if end else {})
    coder = Tokenizer(models.WordLevel(vocabulary, unk_token="none"))
    coder.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    coder.decoder = decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=coder, clean_up_tokenization_spaces=False, **({"eos_token": end} if end else {}))
