"""Each rule of the detokenizers on a case of its own; the results are worked out by hand from the published rules."""

from __future__ import annotations

import pytest
from sedd_train import detokenizers

PTB = [
    ("the dog 's tail", "the dog's tail"),
    ("the dogs ' tails", "the dogs' tails"),
    ("it does n't", "it doesn't"),
    ("one \n two", "one\ntwo"),
    (r"a 1\/2 share", "a 1/2 share"),
    ("N N and N cents", "N 1 and 1 cents"),  # one at the start of a line has no space before it, and stays
    (" N N N ", " 1 1 1 "),
    ("about $ N or # N now", "about $1 or #1 now"),
    ("$ N", "$ N"),
    ("the <unk> group", "the ? group"),
    ("he said , yes .", "he said , yes ."),  # marks stay apart
]

WIKITEXT = [
    ("the dogs ' tails", "the dogs' tails"),
    ("is 'so", "is'so"),
    ("a/' 5/b", "a/'[0-9]/b"),
    ("well @-@ known", "well-known"),
    ("1 @,@ 500", "1,500"),
    ("3 @.@ 5", "3.5"),
    ("one : two ; three . four ! five ? six , seven", "one: two; three. four! five? six, seven"),
    ("at the end .", "at the end ."),  # a mark needs a space behind it
    ("at the end . \n", "at the end.\n"),
    ("a ( b c ) d", "a (b c) d"),
    ("a [ b c ] d", "a [b c] d"),
    ("a { b c } d", "a {b c} d"),
    ('say " b c " d', 'say "b c" d'),
    ("a ' b c ' d", "a 'b c' d"),
    ("a ( b ( c ) d )", "a (b ( c) d )"),  # brackets within brackets are not understood
    (" = Title = \n", " = Title =\n"),
    (" = = Section = = \n", " == Section ==\n"),
    (" = = = Part = = = \n", " === Part ===\n"),
    (" = = = = Point = = = = \n", " ==== Point ====\n"),
    ("20 ° C", "20°C"),
    ("one\n two", "one\ntwo"),
    ("route N is", "route 1 is"),
    ("the dog 's tail", "the dog's tail"),
]

LM1B = [
    ("see http : / / a.org", "see http://a.org"),
    ("see https : / / a.org", "see https://a.org"),
    ("the dog 's tail", "the dog's tail"),
    ("it ends . And so on", "it ends. And so on"),
    ("Ends . And so on", "Ends . And so on"),  # the word before must have a space before it
    ("it ends .", "it ends."),
    ("is it ? yes", "is it? yes"),
    ("is it ?", "is it?"),
    ("it is ! yes", "it is! yes"),
    ("it is !", "it is!"),
    ("one , two : three ; four", "one, two: three; four"),
    ("and / or", "and/or"),
    ('say " b c " d', 'say "b c" d'),
    ("a ' b c ' d", "a 'b c' d"),
    ("a ( b c ) d", "a (b c) d"),
    ("a [ b c ] d", "a [b c] d"),
    ("for $ 5 or £ 4", "for $5 or £4"),
    ("do n't", "do n't"),
]

LAMBADA = [
    ("“ no , ” he said", '\n" no , " he said'),
    ("  \n a passage \n", "\na passage"),
]


@pytest.mark.parametrize(
    ("name", "split", "whole"),
    [(name, *case) for name in ("ptb", "wikitext", "lm1b", "lambada") for case in globals()[name.upper()]],
)
def test_each_rule(name, split, whole):
    assert getattr(detokenizers, name)(split) == whole


@pytest.mark.parametrize(
    ("corpus", "detokenizer"),
    [
        ("ptb", detokenizers.ptb),
        ("lambada", detokenizers.lambada),
        ("wikitext2", detokenizers.wikitext),
        ("wikitext103", detokenizers.wikitext),
        ("lm1b", detokenizers.lm1b),
        ("openwebtext", None),
        ("text8", None),
    ],
)
def test_which_corpora_have_one(corpus, detokenizer):
    assert detokenizers.of_corpus(corpus) is detokenizer
