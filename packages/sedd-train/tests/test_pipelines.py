"""Text in, text out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import SEDD
from sedd_samplers import Unmasking
from sedd_train import Model, pipeline
from sedd_train.text8 import character_tokenizer

SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "cond_dim": 8, "dropout": 0.0, "length": 20}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = SEDD(28, **SIZES, scale_by_sigma=True)
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.1)
    return Model(net, Absorbing(27), LogLinear(), character_tokenizer())


def test_a_beginning_goes_on_to_the_length(model, tmp_path):
    model.save_pretrained(tmp_path)
    write = pipeline(tmp_path, device="cpu")
    texts = write("we the people", num=3, steps=4)
    assert [text[:13] for text in texts] == ["we the people"] * 3
    assert [len(text) for text in texts] == [20] * 3
    assert len(set(texts)) == 3
    assert [len(text) for text in write(length=5, steps=2)] == [5]


def test_blanks_are_filled_and_the_rest_stays(model):
    write = pipeline(model, device="cpu")
    [text] = write("we ___ people", steps=4)
    assert (text[:2], text[-6:]) == ("we", "people")
    assert "_" not in text


def test_a_sample_is_its_seed_s_whatever_else_is_drawn(model):
    write = pipeline(model, device="cpu")
    how: dict[str, Any] = {"steps": 4, "method": Unmasking(), "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert write("we", num=3, seed=4, **how)[1:] == write("we", num=2, seed=5, **how)


def test_the_likeliest_of_a_law_is_all_there_is_with_top_k_1(model):
    write = pipeline(model, device="cpu")
    assert len(set(write("we", num=4, steps=30, top_k=1, length=3))) == 1


@pytest.mark.parametrize(
    ("text", "drawing", "told"),
    [
        ("we _", {"length": 5}, "a text with blanks is as long as it is"),
        ("we", {"length": 21}, "length must be 1 to 20"),
        ("we", {"num": 0}, "num must be at least 1"),
        ("we", {"steps": -1}, "steps must be at least 1"),
        ("a" * 21, {}, "no position is left to fill"),
    ],
)
def test_what_makes_no_sense_is_said(model, text, drawing, told):
    with pytest.raises(ValueError, match=told):
        pipeline(model, device="cpu")(text, **drawing)


def test_controls_need_masks():
    net = SEDD(27, **SIZES, scale_by_sigma=False)
    write = pipeline(Model(net, Uniform(27), LogLinear(), character_tokenizer()), device="cpu")
    with pytest.raises(ValueError, match="temperature, top-k and top-p need a model that masks"):
        write("we", top_k=2)
    assert len(write("we", steps=2)) == 1


def test_a_model_of_rows_of_many_lengths_writes_texts_of_their_lengths(model):
    """By the law that it carries, unless a length is said; each as it is alone."""
    law = [0] * 20
    law[4], law[8] = 1, 1  # rows of 5 and of 9 tokens
    net = SEDD(28, **SIZES, scale_by_sigma=True)
    net.load_state_dict(model.net.state_dict())
    net.sections["lengths"] = law
    write = pipeline(Model(net, *model[1:]), device="cpu")
    texts = write("we", num=8, steps=3)
    assert {len(text) for text in texts} == {5, 9}
    assert [write("we", seed=seed, steps=3)[0] for seed in range(8)] == texts
    assert [len(text) for text in write("we", num=2, length=7, steps=2)] == [7, 7]
    with pytest.raises(ValueError, match="no text that this model was trained on is longer"):
        write("we the people", steps=2)
