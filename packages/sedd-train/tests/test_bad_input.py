"""What is wrong is said before anything is trained: which value, what was expected, what to do; exit code 2."""

from __future__ import annotations

import shutil

import pytest
from sedd_train import load, tokenizers

pytestmark = pytest.mark.filterwarnings("default")  # scripts run in this process, and libraries warn


@pytest.fixture
def refused(script, small, text, cache, tmp_path):
    """refused(*options): what the training script says of them when it refuses a run of the small network."""

    def _refused(*options):
        corpus = [] if "--corpus" in options else ["--corpus", text]
        where = ["--output", tmp_path / "run", "--cache", cache]
        code, printed = script("train_owt.py", *small, *corpus, *where, *options)
        assert code == 2, printed
        assert "Traceback" not in printed
        folder = tmp_path / "run" / "checkpoints"
        assert not folder.exists() or not any(folder.iterdir())
        return printed

    return _refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--recipe", "tinny"],
            "unknown recipe 'tinny': the package has ",
        ),
        (["--heads", "3"], "width = 32: expected a multiple of heads = 3"),
        (["--learning-rate", "-1"], "learning_rate = -1.0: expected a positive number"),
        (["--batch-size", "9", "--micro-batch-size", "2"], "batch_size = 9 cannot be divided"),
        (["--tokenizer", "bpe:3"], "SIZE of at least 257"),
        (["--length", "100000"], "fewer than one block of 100000"),
        (["--corpus", "no/such/folder"], "no corpus 'no/such/folder'"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_options(options, message, refused):
    assert message in refused(*options)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_value_that_is_not_finite_is_refused(value, refused):
    assert f"clip = {value}: expected a finite number" in refused("--clip", value)


def test_empty_corpus(refused, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty: there is no text to train on" in refused("--corpus", tmp_path / "empty.txt")


def test_text_that_is_not_utf8(refused, tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin1"))
    assert "is not UTF-8 (byte 1 is 0xe9)" in refused("--corpus", tmp_path / "latin.txt")


def test_without_the_hub_the_paper_s_recipe_says_what_to_do(script, cache, tmp_path):
    code, printed = script("train_owt.py", "--output", tmp_path / "run", "--cache", cache)
    assert code == 2
    assert "could not be had from the Hugging Face hub" in printed
    assert "--recipe tiny" in printed
    assert "Traceback" not in printed


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("--output", tmp_path / "file" / "run")


def test_sampling_and_evaluating(trained, script):
    code, printed = script(
        *("sample.py", "--checkpoint", trained, "--text", "The ____ of the __.", "--steps", "4", "--num", "3")
    )
    assert code == 0, printed
    assert printed.count("\nThe") == 3
    code, printed = script(
        "sample.py", "--checkpoint", trained / "export", "--prefix", "We", "--suffix", "end.", "--steps", "4"
    )
    assert code == 0, printed
    assert printed.count("\nWe") == printed.count("end.\n") == 2
    code, printed = script(
        "evaluate.py", "--checkpoint", trained, "--corpus", "sotu", "--blocks", "2", "--num-times", "4"
    )
    assert code == 0, printed
    assert "± " in printed
    assert "unigram entropy" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sample.py", "--prefix", "a very long prompt " * 20], "no position is left to fill"),
        (["sample.py", "--text", "no blank"], "has no blank to fill"),
        (
            ["sample.py", "--text", "_" * 33],
            "the text has 33 tokens, blanks included; the model takes sequences of up to 32",
        ),
        (["sample.py", "--length", "64"], "longer than the 32 tokens"),
        (["evaluate.py", "--corpus", "nothing"], "no corpus 'nothing'"),
        (["evaluate.py", "--length", "64"], "takes 1 to 32 tokens"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_prompts_and_texts_that_do_not_fit(options, message, trained, script):
    code, printed = script(options[0], "--checkpoint", trained, *options[1:])
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_a_checkpoint_of_another_vocabulary(trained, script, tmp_path):
    copy = shutil.copytree(trained / "export", tmp_path / "copy")
    tokenizers.load_tokenizer("bpe:400", lambda: ["some other text"] * 9).save_pretrained(copy)
    with pytest.raises(ValueError, match="was trained on a vocabulary of 300 tokens, and the tokenizer has"):
        load(copy)
    code, printed = script("sample.py", "--checkpoint", copy)
    assert code == 2
    assert "it is another model's" in printed


def test_no_such_checkpoint(script, tmp_path):
    code, printed = script("sample.py", "--checkpoint", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in printed
