"""The texts of language-modelling benchmarks, with the traces of their old tokenizers taken out.

The Penn Treebank, WikiText and One Billion Words come split into words: `the dog 's tail , he said .`. A tokenizer
trained on ordinary text finds that unlikely, so evaluations put most of it together again first, each with rules of its
own. What the rules do changes a perplexity by several per cent. These are the ones of the published code of SEDD
(Lou et al., 2023, its data.py), which MDLM's dataloader has too; those of WikiText go back to Megatron-LM's zero-shot
evaluation of GPT-2. They are kept with their oddities, to the byte, because published numbers were measured with them;
each oddity has a remark.

The rules are regular expressions and replacements, applied one after another, each to the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = ["ptb", "lambada", "wikitext", "lm1b", "of_corpus"]

PTB = (
    (r" 's", r"'s"),
    (r"s ' ", r"s' "),
    (r" n't", r"n't"),
    (r" \n ", "\n"),
    (r"\\/", r"/"),
    (r"(?<= )N(?= )", r"1"),  # every number of the corpus is an N
    (r"\$ 1", r"$1"),
    (r"# 1", r"#1"),
    (r"<unk>", r"?"),
)

WIKITEXT = (
    (r"s '", r"s'"),  # an opening quote after an s goes to the s too
    (r"/' [0-9]/", r"/'[0-9]/"),  # meant for '90s, but matches only between slashes and writes the pattern itself
    *((rf" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    *(
        (rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}", rf"{left}\1{right}")
        for left, right in (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
    ),
    *((" ".join("=" * level), "=" * level) for level in (4, 3, 2)),  # headings
    (r" ° ", r"°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", r" 1 "),  # of the Penn Treebank: WikiText's N is a letter
    (r" 's", r"'s"),
)

LM1B = (
    (r"http : / / ", r"http://"),
    (r"https : / / ", r"https://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),  # a full stop stays apart after a word that stands first, or after a bracket
    (r" (\w+) \.$", r" \1."),
    (r" \? ", r"? "),
    (r" \?$", r"?"),
    (r" ! ", r"! "),
    (r" !$", r"!"),
    (r" , ", r", "),
    (r" : ", r": "),
    (r" ; ", r"; "),
    (r" / ", r"/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"\$ ", r"$"),
    (r"£ ", r"£"),
)


def ptb(text: str) -> str:
    """A sentence of the Penn Treebank; its unknown words become question marks, its numbers 1."""
    return _replaced(text, PTB)


def wikitext(text: str) -> str:
    """A line of WikiText-2 or WikiText-103, in the raw version."""
    return _replaced(text, WIKITEXT)


def lm1b(text: str) -> str:
    """A sentence of One Billion Words."""
    return _replaced(text, LM1B)


def lambada(text: str) -> str:
    """A passage of LAMBADA: straight quotes, and a line break before it in place of what surrounds it."""
    return "\n" + re.sub("[“”]", '"', text).strip()


def of_corpus(name: str) -> Callable[[str], str] | None:
    """The detokenizer that published numbers on the corpus of this short name were measured with, if any."""
    known = {"ptb": ptb, "lambada": lambada, "wikitext2": wikitext, "wikitext103": wikitext, "lm1b": lm1b}
    return known.get(name)


def _replaced(text: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
