"""A run that begins from a checkpoint: what it takes from there, what it trains, and how it goes on."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sedd_nets
import torch
from sedd_graphs import Absorbing, Dense, Hybrid, LogLinear, Masked, Ordinal, Uniform
from sedd_nets import MDLM, RADD, SEDD, UDLM, Causal
from sedd_train import Model, SetupError, finetuning, load, load_trained, plan, recipes, token_cache
from sedd_train import train as train_here
from sedd_train.loading import Batches
from sedd_train.objectives import ScoreEntropy
from sedd_train.sections import described, graph_section, in_a_word
from sedd_train.text8 import character_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("default")  # DeepSpeed warns

SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "length": 24, "dropout": 0.0}
STEPS: dict[str, Any] = {
    "batch_size": 4,
    "steps": 2,
    "evaluate_blocks": 4,
    "evaluate_times": 2,
    "sample_steps": 2,
    "learning_rate": 1e-3,
    "warmup": 1,
    "log_every": 1,
}
FAMILIES = {
    "sedd": (lambda: SEDD(28, **SIZES, cond_dim=8, scale_by_sigma=True), Absorbing(27)),
    "radd": (lambda: RADD(28, **SIZES), Absorbing(27)),
    "mdlm": (lambda: MDLM(28, **SIZES, cond_dim=8), Absorbing(27)),
    "udlm": (lambda: UDLM(27, **SIZES, cond_dim=8), Uniform(27)),
    "sedd-hybrid": (
        lambda: SEDD(28, **SIZES, cond_dim=8, scale_by_sigma=True),
        Hybrid(27, uniform_rate=0.5, mask_rate=1.0),
    ),
}


@pytest.fixture
def based(tmp_path: Path):
    """based(name): the folder of a checkpoint of that family, with weights that are not those of any seed's start."""

    def _based(name: str = "sedd") -> Path:
        make, graph = FAMILIES[name]
        torch.manual_seed(7)
        net: Any = make()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        Model(net, graph, LogLinear(), character_tokenizer()).save_pretrained(tmp_path / name)
        return tmp_path / name

    return _based


@pytest.fixture
def tuned(process, cache, letters, tmp_path: Path):
    """tuned(init, **values): the folder of a run that began there, in this process."""

    def _tuned(init: Path | str, name: str = "run", *, given: Any = None, **values: Any) -> Path:
        ours = {key: values.pop(key) for key in list(values) if key not in recipes.Recipe.__dataclass_fields__}
        resume = ours.get("resume", False)
        fresh = {} if resume else STEPS | {"init": str(init), "corpus": str(letters)}
        recipe = recipes.for_run(tmp_path / name, "finetune", fresh | values, resume=resume)
        train_here(recipe, output=tmp_path / name, cache=cache, tensorboard=False, tokenizer=given, **ours)
        return tmp_path / name

    return _tuned


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """A text in the 27 characters of text8."""
    path: Path = tmp_path_factory.mktemp("letters") / "text.txt"
    path.write_text("we the people of the united states in order to form a more perfect union " * 60)
    return path


def letters_and_more(size: int) -> Any:
    """So many tokens, of which text8's characters are the first."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(size - len(tokenizer))])
    return tokenizer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_trained(folder).net.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_where_the_checkpoint_is(family, based, tuned):
    """Steps too small to see leave the checkpoint as it was: weights, graph, schedule, tokenizer, length."""
    base = based(family)
    output = tuned(base, learning_rate=1e-30)
    before, after = load(base), load(output)
    assert type(after.net) is type(before.net)
    assert repr(after.graph) == repr(before.graph)
    assert repr(after.noise) == repr(before.noise)
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert after.net.length == before.net.length == recipes.read_recipe(output / "recipe.toml").length
    assert all(torch.equal(value, weights(output)[name]) for name, value in weights(base).items())
    assert after.net.sections["init"] == str(base)


@pytest.mark.parametrize(("eos", "ends"), [("", None), ("z", "z"), ("none", None)])
def test_a_tokenizer_by_its_name_ends_texts_with_the_token_that_the_recipe_names(based, tmp_path, eos, ends):
    recipe = dataclasses.replace(recipes.Recipe(), init=str(based()), tokenizer="characters", eos=eos)
    assert finetuning.begin(recipe, tmp_path / "run", resume=False).tokenizer.eos_token == ends


def test_an_informed_start_moves_the_head_s_bias_and_nothing_else(based, tuned):
    for family in FAMILIES:
        base = based(family)
        output = tuned(base, f"{family}-on", learning_rate=1e-30, informed_start=True)
        absorbs = isinstance(FAMILIES[family][1], Absorbing)
        assert recipes.read_recipe(output / "recipe.toml").informed_start == absorbs
        before, after = weights(base), weights(output)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == ({"output_layer.linear.bias"} if absorbs else set())
    base = based()
    frozen = tuned(base, "frozen", learning_rate=1e-30, informed_start=True, train_layers="blocks.1.*")
    assert all(torch.equal(value, weights(frozen)[name]) for name, value in weights(base).items())


@pytest.mark.parametrize("family", ["sedd", "radd", "mdlm"])
def test_proportional_fitting_ends_at_the_frequencies(family, letters, cache):
    """At once where the context says nothing: the head's weight is 0, and the prediction is its bias."""
    make, graph = FAMILIES[family]
    torch.manual_seed(7)
    net: Any = make()
    torch.nn.init.zeros_(net.output_layer.linear.weight)
    torch.nn.init.normal_(net.output_layer.linear.bias, std=0.3)
    text = token_cache.prepare(str(letters), character_tokenizer(), cache)
    recipe = dataclasses.replace(recipes.override(recipes.read_recipe("tiny"), STEPS), length=24)
    batches = Batches(text.train, recipe, ScoreEntropy(graph, LogLinear()), 1, 2, None)
    expected = net.output_layer.linear.bias.double()[:-1].softmax(-1)
    counts = text.train.counts(28).double()[:-1]
    different = (counts > 0).sum()
    assert 10 < different < 27
    expected = (counts + different * expected) / (counts.sum() + different)
    finetuning.fit_frequencies(net, batches.objective, batches)
    found = net.output_layer.linear.bias.double()[:-1].softmax(-1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=0)
    assert net.training


def test_a_published_checkpoint_without_a_tokenizer_is_given_one(tuned, tmp_path):
    golden = Path(sedd_nets.__file__).parents[2] / "tests" / "golden" / "radd-tiny"
    if not golden.is_dir():
        pytest.skip("the published layouts lie in the source tree alone")
    with pytest.raises(SetupError, match=r"has no tokenizer.json and 40 tokens"):
        tuned(golden)
    output = tuned(golden, given=letters_and_more(40), learning_rate=1e-30)
    before = load(golden, tokenizer=letters_and_more(40)).net.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in weights(output).items())


def test_a_causal_network_goes_on_left_to_right(tuned, tmp_path):
    base = tmp_path / "causal"
    net = Causal(28, **SIZES)
    sections = {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}, "objective": {"type": "autoregressive"}}
    net.save_pretrained(base, sections=sections)
    character_tokenizer().save_pretrained(base)
    output = tuned(base)
    assert type(load_trained(output).objective).__name__ == "Autoregressive"
    assert recipes.read_recipe(output / "recipe.toml").network == "causal"


def test_another_length(based, tuned):
    output = tuned(based(), length=40)
    assert load(output).net.length == 40
    assert '"length": 40' in (output / "export" / "config.json").read_text()


def test_only_what_the_pattern_fits_is_trained(based, tuned):
    base = based()
    output = tuned(base, train_layers="blocks.1.*, output_layer.linear.bias")
    before, after = weights(base), weights(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("blocks.1.") or name == "output_layer.linear.bias" for name in changed)
    stored = safetensors.torch.load_file(output / "checkpoints" / "step-00000002" / "training.safetensors")
    assert {name.split("/")[1] for name in stored if name.startswith("exp_avg/")} >= changed
    assert "exp_avg/blocks.0.attn_qkv.weight" not in stored


def test_lora_is_added_in_and_has_its_rank(based, tuned):
    pytest.importorskip("peft")
    base = based()
    output = tuned(base, lora=2, lora_alpha=6.0, learning_rate=1e-2, steps=6)
    before, after = weights(base), weights(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("attn_qkv", "attn_out", "mlp.0")
    assert changed == {f"blocks.{block}.{kind}.weight" for block in (0, 1) for kind in kinds}
    stored = safetensors.torch.load_file(output / "checkpoints" / "step-00000006" / "training.safetensors")
    for name in changed:
        thin = {part: stored[f"average/{name.removesuffix('weight')}lora_{part}.sedd.weight"].double() for part in "AB"}
        assert (after[name] - before[name]).double().allclose(3 * thin["B"] @ thin["A"], atol=1e-7)
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 2


@pytest.mark.parametrize("more", [{}, {"lora": 2}, {"train_layers": "blocks.0.*"}], ids=["all", "lora", "some"])
@pytest.mark.parametrize("family", ["sedd", "mdlm"])
def test_it_goes_on_digit_for_digit_without_what_it_began_from(family, more, based, tuned):
    if "lora" in more:
        pytest.importorskip("peft")
    base = based(family)
    begun = tuned(base, "begun", steps=2, decay_to=1.0, ema=0.5, **more)
    straight = tuned(base, "straight", steps=4, decay_to=1.0, ema=0.5, **more)
    shutil.rmtree(base)
    tuned(base, "begun", resume=True, steps=4)
    states = [
        safetensors.torch.load_file(folder / "checkpoints" / "step-00000004" / "training.safetensors")
        for folder in (straight, begun)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(value, weights(begun)[name]) for name, value in weights(straight).items())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"width": 32}, "with --init the checkpoint says what --width would"),
        ({"graph": "uniform", "noise": "cosine"}, "says what --graph, --noise would"),
        ({"tokenizer": "bpe:300"}, "trained on documents, and there are none here"),
        (
            {"train_layers": "block.1.*"},
            r"'block.1.\*' fits no weight; they begin with blocks.0, blocks.1",
        ),
        ({"train_layers": "blocks.*", "lora": 2}, "train_layers = .*: expected nothing beside lora"),
        ({"lora": -1}, "lora = -1: expected 0 or more"),
        ({"length": 10_000}, "fewer than one block of 10000"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_written(values, told, based, tuned, tmp_path):
    with pytest.raises(ValueError, match=told):
        tuned(based(), **values)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_another_tokenizer_than_the_checkpoint_s_is_refused(based, tuned):
    other = {f"w{i}": i for i in range(27)}
    with pytest.raises(SetupError, match="has a tokenizer of its own, and the one given is another"):
        tuned(based(), given=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(other, "w0"))))


def test_a_network_whose_blocks_need_a_clean_copy_is_refused(based, tuned, monkeypatch):
    monkeypatch.setattr(finetuning, "BD3LM", SEDD)
    with pytest.raises(SetupError, match="is a BD3LM, whose blocks are trained beside a clean copy"):
        tuned(based())


def test_without_peft_lora_says_what_to_install(based, tuned, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("sedd_train.adapters.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"needs the package peft: pip install 'sedd-train\[lora\]'"):
        tuned(based(), lora=2)


def test_a_plan_counts_what_is_trained(based, letters, cache):
    """A layer's weights alone: gradients, masters, moments and average are theirs, the weights are all."""
    values = STEPS | {"init": str(based()), "corpus": str(letters), "train_layers": "blocks.1.*"}
    told = plan.describe(recipes.override(recipes.read_recipe("finetune"), values), 1, cache)
    net = load(based()).net
    every, some = (sum(p.numel() for p in part.parameters()) for part in (net, net.blocks[1]))
    assert f"{every:,} parameters" in told
    assert f"{some:,} of them trained" in told
    held = plan.memory(every, 2, 2, trained=some)
    assert (held["weights"], held["gradients"], held["moments"]) == (4 * every, 2 * some, 4 * some)


def test_there_is_nothing_to_begin_from(tuned, tmp_path):
    with pytest.raises(ValueError, match="give it, --init NAME_OR_FOLDER"):
        recipes.for_run(tmp_path / "run", "finetune", {}, resume=False)
    with pytest.raises(ValueError, match=r"lora = 2: expected a checkpoint to begin from \(--init\), too"):
        recipes.for_run(tmp_path / "run", "tiny", {"lora": 2}, resume=False)
    with pytest.raises(SetupError, match="nowhere"):
        tuned("nowhere/at-all")


def test_from_python_the_checkpoint_and_the_length_are_given(process, cache, based, letters, tmp_path):
    recipe = recipes.override(recipes.read_recipe("finetune"), STEPS | {"length": 16})
    output = tmp_path / "run"
    train_here(recipe, output=output, corpus=str(letters), init=based(), cache=cache, tensorboard=False)
    assert load(tmp_path / "run").net.length == 16


# Graphs and schedules of any kind


@pytest.mark.parametrize(
    "graph",
    [
        *(Absorbing(10, mask_id=3), Uniform(11), Ordinal(11), Hybrid(10, uniform_rate=0.25, mask_rate=2.0)),
        Masked(Ordinal(10), rate=0.5, mask_rate=1.5, mask_id=2),
    ],
    ids=repr,
)
def test_a_graph_is_said_in_a_word(graph):
    assert described("graph", in_a_word(graph_section(graph))) == graph_section(graph)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"graph": "absorbing"}, "graph = 'absorbing': expected absorb, uniform, ordinal, hybrid, masked"),
        ({"graph": "hybrid:rate=1"}, "'rate' is no value of hybrid; it has uniform_rate, mask_rate, mask_id"),
        ({"noise": "cosine:epsilon=1"}, "'epsilon' is no value of cosine; it has eps"),
        ({"graph": "ordinal", "scale_by_sigma": True}, "scale_by_sigma = True: expected false for the graph ordinal"),
        ({"network": "udlm"}, "graph = 'absorb': expected uniform for udlm"),
    ],
)
def test_a_word_that_says_nothing(values, told):
    with pytest.raises(ValueError, match=told):
        recipes.override(recipes.Recipe(), values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"graph": "hybrid:mask_rate=1"}, "graph = 'hybrid:mask_rate=1': uniform_rate must be a finite number"),
        ({"graph": "absorb:mask_id=40"}, "mask_id must be a whole number of 0 to 27"),
        ({"noise": "polynomial:power=two"}, "noise = 'polynomial:power=two': power must be a finite number"),
    ],
)
def test_a_word_that_makes_no_graph_is_said_before_anything_is_written(values, told, here, letters, tmp_path):
    values |= {"tokenizer": "characters", "informed_start": False, "corpus": str(letters)}
    with pytest.raises(SetupError, match=told):
        here(tmp_path / "run", **values)
    assert not (tmp_path / "run" / "recipe.toml").exists()


@pytest.mark.parametrize(
    "graph", ["ordinal", "hybrid:uniform_rate=0.5,mask_rate=1.0", "masked:tokens=ordinal,rate=1.0,mask_rate=1.0"]
)
def test_any_graph_and_schedule_train_and_come_back(graph, here, tmp_path):
    here(tmp_path / "run", graph=graph, noise="polynomial:power=3.0", steps=2)
    again = load(tmp_path / "run")
    assert type(again.graph).__name__.lower() == graph.partition(":")[0]
    assert again.noise.power == 3
    assert recipes.read_recipe(tmp_path / "run" / "recipe.toml").scale_by_sigma == (again.graph.mask_id is not None)


def test_a_graph_of_one_s_own_is_given_and_given_again(process, cache, letters, tmp_path):
    values = {"tokenizer": "characters", "corpus": str(letters), "length": 16, "width": 16, "depth": 1, "heads": 2}
    recipe = recipes.override(recipes.read_recipe("tiny"), STEPS | values | {"cond_dim": 8})
    run: dict[str, Any] = {"output": tmp_path / "run", "cache": cache, "tensorboard": False}
    graph = Dense(torch.ones(27, 27) - 27 * torch.eye(27))
    train_here(recipe, **run, graph=graph, noise=LogLinear(1e-4))
    kept = recipes.read_recipe(tmp_path / "run" / "recipe.toml")
    assert (kept.graph, kept.noise, kept.scale_by_sigma) == (f"own:{graph!r}", "loglinear:eps=0.0001", False)
    assert load(tmp_path / "run", graph=graph).graph is graph
    with pytest.raises(SetupError, match=r"Dense.* cannot be made from a recipe: give it, train\(..., graph=...\)"):
        train_here(kept, **run, resume=True)
    train_here(dataclasses.replace(kept, steps=3), **run, graph=graph, resume=True)
    tenth = Dense(torch.ones(10, 10) - 10 * torch.eye(10))
    with pytest.raises(SetupError, match=r"has 10 states, and the tokenizer 27 tokens"):
        train_here(recipe, **run | {"output": tmp_path / "other"}, graph=tenth)


@pytest.mark.slow
def test_two_ranks_of_deepspeed_give_what_one_process_gives(based, train, letters, tmp_path):
    """LoRA, of which ZeRO 3 shares what is trained and what is not; and one rank goes on where two have left."""
    pytest.importorskip("peft")
    values = STEPS | {"init": str(based()), "lora": 2, "learning_rate": 1e-2, "corpus": str(letters), "steps": 3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    base = ["--recipe", "finetune", *options, "--no-tensorboard"]
    train(tmp_path / "two", "--zero-stage", 3, launcher="deepspeed", ranks=2, base=base)
    train(tmp_path / "one", base=base)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    changed = weights(tmp_path / "sedd")["blocks.0.attn_qkv.weight"] - one["blocks.0.attn_qkv.weight"]
    assert changed.abs().max() > 1e-4
    printed = train(tmp_path / "two", "--resume", "--steps", 4, "--zero-stage", 1, base=[])
    assert "continuing at step 3" in printed
