"""Labels as conditions: read from a column, learnt, dropped now and then, and what samples and bounds make of them.

The trained case is enumerable: rows of eight letters, a or b, of which two labels have unlike shares. The entropies
H(x | c) and H(x) are sums over 2^8 rows, and no bound of a network is below them.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import SEDD, UDLM, LabelCondition
from sedd_train import Model, SetupError, files, labels, load, pipeline, recipes, rows, token_cache, train
from sedd_train.commands import evaluate, sample
from sedd_train.corpora import Texts, load_texts
from sedd_train.hub import DataSet
from sedd_train.pipelines import Canvas
from sedd_train.text8 import character_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed warns

LENGTH = 8
SHARES = {"calm": 0.9, "wild": 0.1}  # of the letter a

# What a column of labels says


def pairs(path: Path, label_column: str = "kind", **options: Any) -> list[tuple[str, str]]:
    file = files.recognise(path)
    assert not isinstance(file, str)
    return list(rows.labelled(file, "", label_column, **options))


def test_labels_are_read_beside_the_text_in_every_format_with_columns(tmp_path):
    table = {"text": ["one", "two", None, "four"], "kind": ["x", "", "y", "z"]}
    told = [("one", "x"), ("two", ""), ("four", "z")]
    lines = [{"text": text, "kind": kind} for text, kind in zip(*table.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a.json").write_text(json.dumps(lines))
    (tmp_path / "a.csv").write_text("kind,text\nx,one\n,two\ny,\nz,four\n")
    made = datasets.Dataset.from_dict(table)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (*(tmp_path / f"a.{kind}" for kind in ("jsonl", "json", "csv", "parquet")), arrow):
        assert pairs(path) == told, path
        assert pairs(path, "") == [(text, "") for text, _ in told]
        with pytest.raises(ValueError, match=r"has no column 'genre': its columns are"):
            pairs(path, "genre")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="has no columns, and none of labels"):
        pairs(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("value", "label"), [(3, "3"), (3.0, "3"), (math.nan, ""), (None, ""), (" a b ", "a b"), (True, "True")]
)
def test_a_label_is_a_word_or_a_whole_number(value, label):
    assert rows.label_of(value, "kind", "it") == label


@pytest.mark.parametrize("value", [0.5, ["a"], {"a": 1}, "\udc80"])
def test_anything_else_is_none(value):
    with pytest.raises(ValueError, match="it: a label is a word or a whole number, and the column 'kind' has"):
        rows.label_of(value, "kind", "it")


@pytest.fixture
def folder(tmp_path):
    """Thirty documents of three labels and of none, and a file of what is watched."""
    place = tmp_path / "texts"
    place.mkdir()
    kinds = ["red", "green", None, "blue"]
    lines = [json.dumps({"text": f"text of number {i}", "kind": kinds[i % 4]}) for i in range(30)]
    (place / "train.jsonl").write_text("\n".join(lines))
    (place / "test.csv").write_text("text,kind\nsome words,blue\nother words,\n")
    return place


def test_the_cache_keeps_the_labels_of_each_document(folder, tmp_path):
    made = token_cache.prepare(str(folder), "bytes", tmp_path / "cache", label_column="kind")
    assert made.labels == ("red", "green", "blue")
    assert made.train.labels is not None
    assert made.train.labels.tolist() == [(0, 1, -1, 2)[i % 4] for i in range(30)]
    assert made.valid.labels is not None
    assert made.valid.labels.tolist() == [2, -1]
    assert (made.folder / "valid.bin.labels").exists()
    assert not (made.folder / "test.bin.labels").exists()  # it is valid
    plain = token_cache.prepare(str(folder), "bytes", tmp_path / "cache")
    assert (plain.labels, plain.train.labels) == ((), None)
    assert plain.folder != made.folder
    assert plain.fingerprint != made.fingerprint
    (made.folder / "train.bin.labels").write_bytes(b"\0" * 120)  # as many, and others
    again = token_cache.prepare(str(folder), "bytes", tmp_path / "cache", label_column="kind")
    assert again.train.labels is not None
    assert again.train.labels.tolist() == [(0, 1, -1, 2)[i % 4] for i in range(30)]


def test_held_out_documents_keep_their_labels(tmp_path):
    """And of a long document that is cut both parts have it; what is watched has its own."""
    lines = [json.dumps({"text": f"w{i} " * (400 if i == 7 else 1), "kind": f"k{i}"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts = load_texts(str(tmp_path / "a.jsonl"), label_column="kind")
    assert texts.labels is not None
    seen = []
    for split in ("train", "valid"):
        documents, told = list(texts.documents(split)), list(texts.labels(split))
        assert [f"k{text.split()[0][1:]}" for text in documents] == told
        seen += told
    assert sorted(seen) == sorted([f"k{i}" for i in range(60)] + ["k7"])
    (tmp_path / "b.csv").write_text("text,kind\nwatched,seen\n")
    watching = load_texts(str(tmp_path / "a.jsonl"), label_column="kind", valid=str(tmp_path / "b.csv"))
    assert watching.labels is not None
    assert list(watching.labels("valid")) == ["seen"]
    assert len(list(watching.labels("train"))) == 60


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_a_data_set_of_the_hub_have_the_names_that_it_says(streaming, monkeypatch):
    kinds = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "kind": kinds})
    numbers = [i % 3 - 1 for i in range(40)]
    made: Any = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(40)], "kind": numbers}, features=features)
    there = datasets.DatasetDict({"train": made.to_iterable_dataset() if streaming else made})
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: there)
    data = DataSet("a/b", "", "", "", streaming, "", False, 0.05, 100, label_column="kind")
    found = [*data.labelled("train"), *data.labelled("validation")]
    assert found == [(f"t{i}", {-1: "", 0: "bad", 1: "good"}[number]) for i, number in enumerate(numbers)]
    with pytest.raises(ValueError, match="has no column 'genre'"):
        next(DataSet("a/b", "", "", "", streaming, "", False, 0.05, 100, label_column="genre").labelled("train"))


def test_what_is_no_label_is_said(tmp_path):
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps({"text": "a", "kind": i}) for i in range(10_600)))
    with pytest.raises(ValueError, match=r"10,\d+ different labels, such as 0, .* of labels there may be 10,000"):
        token_cache.prepare(str(many), "bytes", tmp_path / "cache", label_column="kind")
    none = tmp_path / "none.csv"
    none.write_text("text,kind\n" + "a,\n" * 40)
    with pytest.raises(ValueError, match="no document has a label"):
        token_cache.prepare(str(none), "bytes", tmp_path / "cache", label_column="kind")
    with pytest.raises(ValueError, match="corpus 'sotu' has no labels"):
        load_texts("sotu", label_column="kind")
    short = Texts("own", lambda: ["a", "b"], lambda: ["c"], lambda: ["c"], labels=lambda split: ["x"])
    with pytest.raises(ValueError, match="2 documents of train have 1 labels"):
        token_cache.prepare(short, "bytes", tmp_path / "cache")


def test_labels_are_dropped_at_their_share_by_the_sample_alone():
    told = torch.arange(4000) % 3
    found = labels.dropped(told, 0.3, 5, 2, range(4000))
    gone = found == -1
    assert torch.equal(found[~gone], told[~gone])
    assert abs(gone.double().mean() - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 4000)  # false alarm 7e-6
    assert torch.equal(labels.dropped(told[7:9], 0.3, 5, 2, [7, 8]), found[7:9])
    assert not torch.equal(labels.dropped(told, 0.3, 5, 3, range(4000)), found)
    assert torch.equal(labels.dropped(told, 0.0, 5, 2, range(4000)), told)


# What is learnt from them


def draw(random: np.random.Generator, kind: str) -> str:
    return "".join("a" if random.random() < SHARES[kind] else "b" for _ in range(LENGTH + 1))


def entropies() -> tuple[float, float]:
    """H(x | c) and H(x), nats a row, both labels being equally likely."""
    ones = np.array([number.bit_count() for number in range(2**LENGTH)])
    laws = [share**ones * (1 - share) ** (LENGTH - ones) for share in SHARES.values()]
    given, without = (float(np.mean([-(p * np.log(p)).sum() for p in some])) for some in (laws, [sum(laws) / 2]))
    return given, without


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Documents of nine letters, of which a row holds eight; an eleventh of them without their label."""
    random, place = np.random.default_rng(0), tmp_path_factory.mktemp("letters")
    for name, count in (("train", 3000), ("valid", 240)):
        lines = []
        for i in range(count):
            kind = list(SHARES)[i % 2]
            told = None if name == "train" and i % 11 == 10 else kind
            lines.append(json.dumps({"text": draw(random, kind), "kind": told}))
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    return place


VALUES: dict[str, Any] = {
    **{"tokenizer": "characters:ab", "length": LENGTH, "packing": False, "label_column": "kind", "drop_labels": 0.4},
    **{"width": 32, "depth": 2, "heads": 2, "cond_dim": 16, "dropout": 0.0, "batch_size": 24, "steps": 300},
    **{"optimizer": "muon", "learning_rate": 4e-3, "warmup": 10, "decay_to": 0.05, "ema": 0.95},
    **{"log_every": 100, "evaluate_every": 10_000, "checkpoint_every": 200},
    **{"evaluate_blocks": 40, "evaluate_times": 8, "sample_steps": 4},
}


@pytest.fixture(scope="module")
def learnt(letters, cache, world, tmp_path_factory):
    """A run on them: its folder, and what it measured at its end."""
    output = tmp_path_factory.mktemp("learnt") / "run"
    recipe = recipes.override(recipes.read_recipe("tiny"), VALUES | {"corpus": str(letters)})
    with pytest.MonkeyPatch.context() as patch:
        world(patch)
        return output, train(recipe, output=output, cache=cache, tensorboard=False)


def test_a_label_is_worth_its_information(learnt, capsys):
    """The bound under labels is near H(x | c), without them near H(x), and below neither."""
    output, result = learnt
    given, without = entropies()
    assert without - given > 0.6  # nearly log 2: eight letters tell
    net = load(output).net
    assert isinstance(net.condition_embed, LabelCondition)
    assert labels.names_of(net) == ["calm", "wild"]
    evaluate.main(["--checkpoint", str(output), "--num-times", "32", "--batch-size", "240", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: each["documents"] for name, each in found["labels"].items()} == {"calm": 120, "wild": 120}
    under, none = (LENGTH * found["all"][name] for name in ("nats_per_token", "nats_per_token_without"))
    error = LENGTH * found["all"]["standard_error"]
    assert given - 4.5 * error < under < 1.06 * given + 4.5 * error
    assert without - 4.5 * error < none < 1.06 * without + 4.5 * error
    assert LENGTH * found["all"]["gain"] > 0.8 * (without - given)
    evaluate.main(["--checkpoint", str(output), "--num-times", "8", "--blocks", "40", "--json"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.measured.nats_per_token == pytest.approx(again["all"]["nats_per_token"], rel=1e-5)  # under labels
    evaluate.main(["--checkpoint", str(output), "--num-times", "2", "--blocks", "20"])
    assert capsys.readouterr().out.count("calm  ") == 1


def letters_of(texts: list[str]) -> list[str]:
    return [text.replace("<|endoftext|>", "") for text in texts]


def share_of_a(texts: list[str]) -> float:
    letters = "".join(letters_of(texts))
    return letters.count("a") / len(letters)


def test_samples_are_of_their_label_and_more_so_when_guided(learnt, capsys):
    output, _ = learnt
    write = pipeline(output)
    found = {}
    for kind in SHARES:
        for weight in (1.0, 3.0):
            texts = write(num=200, label=kind, guidance=weight, steps=16)
            found[kind, weight] = share_of_a(texts)
        assert abs(found[kind, 1.0] - SHARES[kind]) < 0.05, found
    assert found["calm", 3.0] > found["calm", 1.0] + 0.03
    assert found["wild", 3.0] < found["wild", 1.0] - 0.03
    counts = np.array([text.count("a") for text in letters_of(write(num=200, steps=16))])
    assert min((counts >= 6).mean(), (counts <= 2).mean()) > 0.2  # of both; .48 in the text, .14 of letters at random
    options = ["--checkpoint", str(output), "--label", "wild", "--guidance", "2", "--num", "3", "--steps", "8"]
    assert sample.main(options).shape == (3, LENGTH)
    for words, told in ((["--label", "tame"], "this model knows calm, wild"), (["--guidance", "2"], "give --label")):
        with pytest.raises(SystemExit):
            sample.main(["--checkpoint", str(output), *words])
        assert told in capsys.readouterr().err


@pytest.fixture
def labelled(cache, process, letters, tmp_path):
    """labelled(name, recipe=, **values): the folder of a short run on the letters, or on other text."""

    def _labelled(name: str, recipe: str = "tiny", **values: Any) -> Path:
        resume = values.pop("resume", False)
        fresh = {} if resume else {"corpus": str(letters), "log_every": 1, "evaluate_blocks": 2}
        made = recipes.for_run(tmp_path / name, recipe, fresh | values, resume=resume)
        return train(made, output=tmp_path / name, cache=cache, tensorboard=False, resume=resume).output

    return _labelled


def test_it_goes_on_digit_for_digit_and_at_other_labels_it_stops(labelled, letters, losses, tmp_path):
    short = VALUES | {"checkpoint_every": 3, "log_every": 1, "evaluate_blocks": 2, "decay_to": 1.0, "batch_size": 8}
    whole = labelled("whole", **short | {"steps": 6})
    parts = labelled("parts", **short | {"steps": 3})
    labelled("parts", steps=6, resume=True)
    assert losses(parts) == losses(whole)
    other = tmp_path / "other"
    shutil.copytree(letters, other)
    text = (other / "train.jsonl").read_text()
    labelled("renamed", **short | {"steps": 1, "corpus": str(other)})
    (other / "train.jsonl").write_text(text.replace('"kind": null', '"kind": "new"'))
    with pytest.raises(SetupError, match=r"trained on other text.*train.jsonl has changed"):
        labelled("renamed", steps=2, resume=True)
    with pytest.raises(SetupError, match="the text has the label 'new', and the network has learnt calm, wild"):
        labelled("tuned", "finetune", **TUNED | {"init": str(whole), "corpus": str(other)})


TUNED: dict[str, Any] = {
    "packing": False,
    "label_column": "kind",
    "steps": 3,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "warmup": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"lora": 2}, {"train_layers": "blocks.1.*"}, {}], ids=["LoRA", "layers", "all"])
def test_fine_tuning_learns_labels_whatever_else_is_trained(how, labelled, letters, tmp_path):
    """Of a network that had none; and of one that had, where the text has them in another order."""
    if "lora" in how:
        pytest.importorskip("peft")
    base = labelled("base", **{name: value for name, value in VALUES.items() if "label" not in name} | {"steps": 2})
    first = labelled("first", "finetune", **TUNED | how | {"init": str(base)})
    net = load(first).net
    assert isinstance(net.condition_embed, LabelCondition)
    assert bool((net.condition_embed.weight != 0).any(1).all())
    assert labels.names_of(net) == ["calm", "wild"]
    turned = tmp_path / "turned"
    turned.mkdir()
    for name in ("train", "valid"):
        lines = (letters / f"{name}.jsonl").read_text().splitlines()[::-1]
        (turned / f"{name}.jsonl").write_text("\n".join(lines[1:]))
    second = labelled("second", "finetune", **TUNED | how | {"init": str(first), "corpus": str(turned)})
    again = load(second).net
    assert labels.names_of(again) == ["calm", "wild"]
    assert isinstance(again.condition_embed, LabelCondition)
    assert not torch.equal(again.condition_embed.weight, net.condition_embed.weight)
    config = json.loads((second / "export" / "config.json").read_text())
    assert config["model"]["condition"] == {"type": "label", "classes": 2}
    read = (turned / "train.jsonl").read_text()
    assert [sum(law) for law in config["lengths_of_labels"]] == [read.count(f'"{kind}"') for kind in SHARES]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"packing": True}, "label_column = 'kind': expected rows of one document, --no-packing, too"),
        ({"network": "radd"}, "label_column = 'kind': expected none for radd, which takes none"),
        ({"drop_labels": 1.0}, r"drop_labels = 1.0: expected a number in \[0, 1\)"),
    ],
)
def test_a_recipe_of_labels_that_makes_no_sense(values, told):
    with pytest.raises(ValueError, match=told):
        recipes.override(recipes.read_recipe("tiny"), {"label_column": "kind", "packing": False} | values)


def test_a_corpus_of_one_s_own_has_labels_or_not(process, cache, tmp_path):
    def train_on(corpus: Texts, **values: Any) -> Any:
        made = recipes.override(recipes.read_recipe("tiny"), {**VALUES, "label_column": "", "steps": 1, **values})
        return train(made, output=tmp_path / "run", corpus=corpus, cache=cache, tensorboard=False)

    lines = ["abab", "bbba"] * 40
    split = {"train": lines, "valid": lines[:4], "test": lines[:4]}
    documents: list[Any] = [lambda: lines, lambda: lines[:4], lambda: lines[:4]]
    plain = Texts("a b without", *documents)
    named = Texts("a b", *documents, labels=lambda which: ["one", "two"] * (len(split[which]) // 2))
    with pytest.raises(SetupError, match="label_column = 'kind': the corpus that was given has no labels"):
        train_on(plain, label_column="kind")
    with pytest.raises(SetupError, match="a block of several documents has no one label"):
        train_on(named, packing=True)
    assert labels.names_of(load(train_on(named).output).net) == ["one", "two"]


# What guidance makes of a law: exactly, for one position


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_one_token_is_drawn_by_the_guided_law(weight):
    """p(x)^(1 - w) p(x | c)^w, of a network whose two laws are read off it."""
    torch.manual_seed(3)
    net = SEDD(28, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=1, scale_by_sigma=True).eval()
    net.condition_embed = LabelCondition(2, 8)
    net.sections["labels"] = ["a", "b"]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5)
        net.condition_embed.weight.normal_(0, 5.0)
        start, sigma, count = torch.full((1, 1), 27), LogLinear()(torch.ones(1))[0], 5000
        scores = [net(start, sigma, condition=torch.tensor([number]))[0, 0, :27].double() for number in (-1, 1)]
    plain, told = (score.softmax(-1) for score in scores)
    assert float((plain - told).abs().sum()) > 0.5
    law = plain ** (1 - weight) * told**weight
    write = pipeline(Model(net, Absorbing(27), LogLinear(), character_tokenizer()), device="cpu")
    canvas = Canvas(torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, 1, dtype=torch.bool), [1] * count)
    with torch.inference_mode():
        *_, last = write.states(canvas, label="b", guidance=weight, steps=1)
    expected = (count * law / law.sum()).numpy()
    seen, few = np.bincount(last.x[:, 0].numpy(), minlength=27), expected < 5
    assert seen.sum() == count
    ours, theirs = (np.append(numbers[~few], max(numbers[few].sum(), 1e-9)) for numbers in (seen, expected))
    assert chisquare(ours, theirs * ours.sum() / theirs.sum()).pvalue > 1e-6  # the false alarm


def test_a_published_network_s_labels_are_numbers_and_none_is_one_of_its_vectors():
    """UDLM's: what is drawn under no label is what is drawn by guidance of weight 0, and not under a label."""
    torch.manual_seed(0)
    net = UDLM(27, width=16, depth=1, heads=2, cond_dim=8, dropout=0.0, length=6, classes=3).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write = pipeline(Model(net, Uniform(27), LogLinear(), character_tokenizer()), device="cpu")
    assert labels.names_of(net) == ["0", "1", "2"]
    plain = write(num=4, steps=4)
    assert write(num=4, steps=4, label="1", guidance=0.0) == plain
    assert write(num=4, steps=4, label="1") != plain
    with pytest.raises(ValueError, match="label 'one': this model knows 0, 1, 2"):
        write(label="one")
    net.cond_map = None
    with pytest.raises(ValueError, match="label '1': this model was trained without labels"):
        write(label="1")
    with pytest.raises(ValueError, match="guidance = 2 is the weight of a label"):
        write(guidance=2)


@pytest.mark.parametrize("told", ["a", ["a"], ["a", "a"], ["a", 1], None, {}])
def test_names_that_are_not_the_network_s(told):
    net = SEDD(28, width=16, depth=1, heads=2, cond_dim=8, length=6, scale_by_sigma=True)
    net.condition_embed, net.sections["labels"] = LabelCondition(2, 8), told
    with pytest.raises(ValueError, match="labels must be the names of the network's 2"):
        labels.names_of(net)
