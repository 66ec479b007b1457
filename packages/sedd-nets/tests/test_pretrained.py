import inspect
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors
import pytest
import sedd_nets.files
import sedd_nets.pretrained
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sedd_nets import BD3LM, MDLM, RADD, SEDD, UDLM, Causal, from_pretrained, read_config
from sedd_nets.config import one_layout
from sedd_nets.files import HubOptions

SECTIONS = {"tokens": 10, "graph": {"type": "absorb"}, "noise": {"type": "loglinear", "eps": 1e-3}}


def test_round_trip_keeps_weights_and_sections(make_sedd, batch, tmp_path):
    x, sigma = batch
    net = make_sedd().eval()
    net.save_pretrained(tmp_path / "new" / "folder", sections=SECTIONS)
    again = SEDD.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(again(x, sigma), net(x, sigma))
    assert again.sections == SECTIONS
    assert not again.training
    assert read_config(tmp_path / "new" / "folder")["model"]["hidden_size"] == 16
    again.save_pretrained(tmp_path / "third")
    assert read_config(tmp_path / "third") == read_config(tmp_path / "new" / "folder")


@pytest.mark.parametrize("name", ["sedd-tiny-absorb", "sedd-tiny-uniform"])
def test_published_files_survive_a_round_trip(golden, tmp_path, name):
    folder, _ = golden(name)
    SEDD.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config, written = read_config(folder), read_config(tmp_path)
    config["model"].pop("name")
    assert written == config


@pytest.mark.parametrize("name", ["sedd-tiny-absorb", "sedd-tiny-uniform"])
def test_a_config_that_does_not_say_whether_to_scale_means_what_its_graph_needs(golden, tmp_path, name):
    folder, expected = golden(name)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = read_config(folder)
    del config["model"]["scale_by_sigma"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    log_score = SEDD.from_pretrained(tmp_path)(expected["xt"], expected["sigma"])
    torch.testing.assert_close(log_score, expected["log_score"], atol=1e-5, rtol=0)


def test_a_config_that_says_nothing_of_dropout_has_none(golden, tmp_path):
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = read_config(folder)
    del config["model"]["dropout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SEDD.from_pretrained(tmp_path).dropout == 0


def test_what_a_checkpoint_says_of_its_noise_is_kept(golden, tmp_path):
    """The network has no use for it, whoever builds the schedule has: values other than the usual ones, too."""
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = read_config(folder) | {"noise": {"type": "loglinear", "eps": 0.0123}, "anything": [1, {"a": 2}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    net = from_pretrained(tmp_path)
    assert net.sections == {key: value for key, value in config.items() if key != "model"}


def test_what_is_saved_may_be_read_by_whom_the_folder_s_files_may(make_sedd, tmp_path):
    make_sedd().save_pretrained(tmp_path)
    (tmp_path / "a-file").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_saving_given_weights(make_sedd, tmp_path):
    net = make_sedd()
    average = {key: value + 1 for key, value in net.state_dict().items()}
    net.save_pretrained(tmp_path, state_dict=average)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["vocab_embed.embedding"], net.vocab_embed.embedding + 1
    )
    del average["vocab_embed.embedding"]
    with pytest.raises(ValueError, match=r"vocab_embed\.embedding"):
        net.save_pretrained(tmp_path, state_dict=average)
    with pytest.raises(ValueError, match="model"):
        net.save_pretrained(tmp_path, sections={"model": {}})


def test_strict_loading_names_what_differs(golden, tmp_path):
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")

    def refuse(state, named):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=named):
            SEDD.from_pretrained(tmp_path)

    refuse(
        {k: v for k, v in weights.items() if k != "blocks.1.norm2.weight"}, r"missing keys: blocks\.1\.norm2\.weight"
    )
    refuse(weights | {"stranger": torch.zeros(1)}, "extra keys: stranger")
    refuse(weights | {"blocks.0.norm1.weight": torch.zeros(3)}, r"norm1\.weight \(3,\) instead of \(64,\)")
    refuse({"transformer.wte": torch.zeros(3)}, r"no vocab_embed\.embedding.*transformer\.wte")


def test_config_of_another_architecture(golden, tmp_path):
    folder, _ = golden("radd-tiny")
    with pytest.raises(ValueError, match=r"not SEDD's.*are RADD's"):
        SEDD.from_pretrained(folder)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 12}))
    with pytest.raises(ValueError, match=r"describes 'gpt2'"):
        SEDD.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="list"):
        SEDD.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        SEDD.from_pretrained(tmp_path)


def test_damaged_and_missing_files(golden, tmp_path):
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        SEDD.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        SEDD.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a name"):
        SEDD.from_pretrained(tmp_path / "nowhere")


def test_older_weight_file(golden, tmp_path):
    folder, expected = golden("sedd-tiny-absorb")
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    net = SEDD.from_pretrained(tmp_path)
    torch.testing.assert_close(net(expected["xt"], expected["sigma"]), expected["log_score"], atol=1e-5, rtol=0)


@pytest.fixture
def hub(monkeypatch):
    """hub(folder) makes the hub hold the folder's files, and returns the list of what it is asked for."""

    def hold(folder):
        asked = []

        def download(name, file, *, revision, token, cache_dir, local_files_only):
            asked.append((name, file, revision, token, cache_dir, local_files_only))
            if not (folder / file).is_file():
                raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
            return str(folder / file)

        monkeypatch.setattr(sedd_nets.files, "hf_hub_download", download)
        return asked

    return hold


def test_names_go_to_the_hub(golden, hub):
    folder, expected = golden("sedd-tiny-absorb")
    asked = hub(folder)
    options: HubOptions = {"revision": "v1", "token": "secret", "cache_dir": "there", "local_files_only": True}
    files = [
        ("someone/sedd-small", file, "v1", "secret", "there", True) for file in ("config.json", "model.safetensors")
    ]
    for read in (SEDD.from_pretrained, from_pretrained):
        asked.clear()
        net = read("someone/sedd-small", **options)
        torch.testing.assert_close(net(expected["xt"], expected["sigma"]), expected["log_score"], atol=1e-5, rtol=0)
        assert asked == files
    asked.clear()
    assert read_config("someone/sedd-small", **options)["tokens"] == 40
    read_config("someone/sedd-small")
    assert asked == [files[0], ("someone/sedd-small", "config.json", None, None, None, False)]
    with pytest.raises(TypeError, match="revison"):
        SEDD.from_pretrained("someone/sedd-small", revison="v1")  # type: ignore[call-arg]


def test_all_files_are_of_one_commit(golden, hub, tmp_path):
    """The config is of the branch as it is then; the weights are asked for at the commit that it came from."""
    snapshot = tmp_path / "models--someone--sedd-small" / "snapshots" / "0f1e2d"
    shutil.copytree(golden("sedd-tiny-absorb")[0], snapshot)
    asked = hub(snapshot)
    from_pretrained("someone/sedd-small")
    assert [(file, revision) for _, file, revision, *_ in asked] == [
        ("config.json", None),
        ("model.safetensors", "0f1e2d"),
    ]


def test_hub_out_of_reach(hub, tmp_path):
    hub(tmp_path)
    with pytest.raises(ConnectionError, match=r"'someone/sedd-small' is no folder.*hf download someone/sedd-small"):
        SEDD.from_pretrained("someone/sedd-small")


def test_the_config_is_moved_into_place_last(make_sedd, tmp_path, monkeypatch):
    """Both are on the disk by then, and who waits for a checkpoint's config finds its weights."""
    done: list[str] = []
    synchronise, replace = sedd_nets.files.synchronise, Path.replace

    def noted_synchronise(path):
        done.append("synchronised")
        synchronise(path)

    def noted_replace(path, target):
        done.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(sedd_nets.files, "synchronise", noted_synchronise)
    monkeypatch.setattr(Path, "replace", noted_replace)
    make_sedd().save_pretrained(tmp_path)
    assert done == ["synchronised"] * 2 + ["model.safetensors", "config.json"]


def test_the_disk_is_waited_for(make_sedd, tmp_path, monkeypatch):
    """Of the very files that are moved into place: a rename keeps their inodes."""
    waited, fsync = [], os.fsync

    def noted(descriptor):
        waited.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    make_sedd().save_pretrained(tmp_path)
    assert waited == [(tmp_path / name).stat().st_ino for name in ("model.safetensors", "config.json")]


def test_weights_laid_out_otherwise_are_written(make_sedd, tmp_path):
    net = make_sedd()
    state = {key: value.mT.contiguous().mT if value.ndim == 2 else value for key, value in net.state_dict().items()}
    assert not state["vocab_embed.embedding"].is_contiguous()
    net.save_pretrained(tmp_path, state_dict=state)
    assert all(torch.equal(value, state[key]) for key, value in load_file(tmp_path / "model.safetensors").items())


def test_failed_save_leaves_the_last_checkpoint(make_sedd, tmp_path, monkeypatch):
    first = make_sedd(seed=1)
    first.save_pretrained(tmp_path, sections=SECTIONS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sedd_nets.files, "synchronise", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_sedd(seed=2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Other forms of the weights


def cut(folder, into, shards):
    """The folder's checkpoint with its weights in several files and their index, as transformers writes them."""
    shutil.copy(folder / "config.json", into)
    weights = load_file(folder / "model.safetensors")
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    where = {key: names[n % shards] for n, key in enumerate(sorted(weights))}
    for name in names:
        save_file({key: weights[key] for key in weights if where[key] == name}, into / name, metadata={"format": "pt"})
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (into / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_read_together(golden, tmp_path):
    folder, expected = golden("sedd-tiny-absorb")
    index = cut(folder, tmp_path, 3)
    net = from_pretrained(tmp_path)
    torch.testing.assert_close(net(expected["xt"], expected["sigma"]), expected["log_score"], atol=1e-5, rtol=0)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model-00002-of-00003\.safetensors"):
        from_pretrained(tmp_path)
    index["weight_map"].pop("vocab_embed.embedding")
    cut(folder, tmp_path, 3)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"hold different tensors: vocab_embed\.embedding"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "x.bin", 3, None, ""])
def test_no_shard_is_outside_the_folder(golden, tmp_path, name):
    folder, _ = golden("sedd-tiny-absorb")
    index = cut(folder, tmp_path, 2)
    index["weight_map"]["vocab_embed.embedding"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names the shard"):
        from_pretrained(tmp_path)


class Runs:
    def __reduce__(self):
        return (Path.touch, (Path("it-ran"),))


def test_a_pickle_is_data_only(golden, tmp_path, monkeypatch):
    folder, _ = golden("sedd-tiny-absorb")
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors") | {"code": Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="damaged or holds other things than tensors"):
        from_pretrained(tmp_path)
    assert not (tmp_path / "it-ran").exists()
    claimed = load_file(folder / "model.safetensors")
    claimed["vocab_embed.embedding"] = torch.zeros(1).expand(41, 64)
    torch.save(claimed, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"vocab_embed\.embedding claims shape \(41, 64\), and the file holds less"):
        from_pretrained(tmp_path)
    claimed["vocab_embed.embedding"] = torch.zeros(2000).as_strided((41, 64), (48, 1))  # rows that share numbers
    torch.save(claimed, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"vocab_embed\.embedding claims shape \(41, 64\), and the file holds less"):
        from_pretrained(tmp_path)
    for content in (b"", b"not a pickle", b"\x80\x04K\x01.", pickle.dumps([1])):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            from_pretrained(tmp_path)


def test_values_that_are_no_weights(golden, tmp_path):
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copy(folder / "config.json", tmp_path)
    weights, key = load_file(folder / "model.safetensors"), "blocks.1.mlp.0.weight"
    for wrong, told in [
        (weights[key].clone().fill_(float("nan")), r"not all numbers are finite in blocks\.1\.mlp\.0\.weight"),
        (weights[key].clone().index_fill_(0, torch.tensor([7]), float("inf")), "not all numbers are finite"),
        (weights[key].to(torch.int8), r"no floating point: blocks\.1\.mlp\.0\.weight \(torch\.int8\)"),
        (weights[key].to(torch.float8_e4m3fn), r"no floating point: .*float8"),
    ]:
        save_file(weights | {key: wrong}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=told):
            from_pretrained(tmp_path)
    halves = {key: weight.bfloat16() for key, weight in weights.items()}
    save_file(halves, tmp_path / "model.safetensors")
    net = from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(net.state_dict()[key], halves[key].float())


# Values of config.json


def change(config, path, value):
    *sections, last = path.split(".")
    for name in sections:
        config = config[name]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("model.hidden_size", 4_000_000, r"vocab_embed\.embedding \(41, 64\) instead of \(41, 4000000\)"),
        ("model.hidden_size", 10**15, "hidden_size must be a whole number of 1 to 16777216; got 1000000000000000"),
        ("model.hidden_size", "64", "hidden_size must be a whole number .*; got '64'"),
        ("model.hidden_size", 64.0, "hidden_size must be a whole number .*; got 64.0"),
        ("model.n_blocks", 10**7, "config.json says n_blocks 10000000, and the weights hold 2 blocks"),
        ("model.n_blocks", 1, "extra keys: blocks.1"),
        ("model.n_blocks", 3, "config.json says n_blocks 3, and the weights hold 2 blocks"),
        ("model.n_blocks", -3, "n_blocks must be a whole number .*; got -3"),
        ("model.n_heads", True, "n_heads must be a whole number .*; got True"),
        ("model.n_heads", 7, "width 64 over 7 heads"),
        ("model.n_heads", 2, r"inv_freq \(8,\) instead of \(16,\)"),
        ("model.length", 10**15, "length must be a whole number .*; got 1000000000000000"),
        ("model.length", None, "length must be a whole number .*; got None"),
        ("model.cond_dim", [32], r"cond_dim must be a whole number .*; got \[32\]"),
        ("model.dropout", 1.0, "dropout must be a finite number of at least 0 and below 1; got 1.0"),
        ("model.dropout", float("nan"), "dropout must be a finite number .*; got nan"),
        ("model.dropout", "0.1", "dropout must be a finite number .*; got '0.1'"),
        ("model.scale_by_sigma", "false", "scale_by_sigma must be true or false; got 'false'"),
        ("model.scale_by_sigma", 1, "scale_by_sigma must be true or false; got 1"),
        ("model.type", ["ddit"], r"model.type \['ddit'\] is none of"),
        ("model.condition", "label", "condition must be an object; got 'label'"),
        ("model.condition", {"type": "label", "classes": -1}, "classes must be a whole number .*; got -1"),
        ("model.condition", {"type": "prompt"}, "prompt_dim must be a whole number .*; there is none"),
        ("model", 3, "model must be an object; got 3"),
        ("graph", "absorb", "graph must be an object; got 'absorb'"),
        ("graph.mask_id", 41, "mask_id must be a whole number of 0 to 40; got 41"),
        ("noise", ["loglinear"], r"noise must be an object; got \['loglinear'\]"),
        ("tokens", 50257, "says 50257 tokens and the absorb graph, which make 50258 states, and the weights have 41"),
        ("tokens", "40", "tokens must be a whole number .*; got '40'"),
    ],
)
def test_values_are_named_before_anything_is_made(golden, tmp_path, path, value, told):
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = read_config(folder)
    change(config, path, value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        from_pretrained(tmp_path)


def test_json_that_python_cannot_take(golden, tmp_path):
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for content in (b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}", b"\xff\xfe{}", b"", b'{"a": 1}{'):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match="is not JSON"):
            from_pretrained(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: no disk is used
    with pytest.raises(ValueError, match="has 1099511627776 bytes"):
        from_pretrained(tmp_path)


# What goes along with the network


def test_it_is_said_that_graph_and_schedule_are_forgotten(tmp_path):
    net = SEDD(11, width=16, depth=1, heads=2, cond_dim=8, length=12, scale_by_sigma=True)
    with pytest.warns(UserWarning, match=r"will not say which graph and noise .*give sections=\{'graph': \{...\}"):
        net.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="will not say which noise the network"):
        net.save_pretrained(tmp_path, sections={"graph": {"type": "uniform"}})
    with pytest.raises(ValueError, match=r"nobody could use me/net: .* would not say which graph and noise"):
        net.push_to_hub("me/net")
    net.save_pretrained(tmp_path, sections={"objective": {"type": "d3pm"}})  # no score, and needs neither
    with pytest.warns(UserWarning, match="will not say which graph and noise"):
        net.save_pretrained(tmp_path, sections={"objective": {"type": "score-entropy"}})


def test_the_mask_stands_in_one_place(tmp_path):
    net = RADD(11, width=16, depth=1, heads=2, length=12, mask_id=4)
    net.save_pretrained(tmp_path, sections={"graph": {"type": "absorb", "file": "data"}})
    assert read_config(tmp_path)["graph"] == {"type": "absorb", "file": "data", "mask_id": 4}
    assert "mask_id" not in read_config(tmp_path)["model"]
    for graph in ({"type": "absorb", "mask_id": 5}, {"type": "uniform"}):
        with pytest.raises(ValueError, match=r"sections say that the graph is .* and this RADD has .*'mask_id': 4"):
            net.save_pretrained(tmp_path, sections={"graph": graph})
    RADD(11, width=16, depth=1, heads=2).save_pretrained(
        tmp_path, sections={"graph": {"type": "absorb", "mask_id": 10}}
    )
    assert from_pretrained(tmp_path).mask_id == 10


def test_what_is_pushed_is_what_load_needs(make_sedd, batch, monkeypatch):
    x, sigma = batch
    net = make_sedd().eval()
    done: list[Any] = []

    class Words:
        def save_pretrained(self, folder):
            Path(folder, "tokenizer.json").write_text("{}")

    def upload(*, repo_id, folder_path, commit_message):
        again = SEDD.from_pretrained(folder_path)
        assert torch.equal(again(x, sigma), net(x, sigma))
        done.append(
            (repo_id, commit_message, again.sections, sorted(path.name for path in Path(folder_path).iterdir()))
        )
        done.append(Path(folder_path, "README.md").read_text())
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def create(name, *, private, exist_ok):
        done.append((name, private, exist_ok))

    def api(*, token):
        assert token == "secret"
        return SimpleNamespace(create_repo=create, upload_folder=upload)

    monkeypatch.setattr(sedd_nets.pretrained, "HfApi", api)
    how: dict[str, Any] = {"private": True, "token": "secret", "message": "First"}
    address = net.push_to_hub("me/net", tokenizer=Words(), sections={"tokens": 10}, **how)
    assert address == "https://hub/commit/1"
    created, uploaded, card = done
    assert created == ("me/net", True, True)
    sections = {"graph": {"type": "absorb"}, "noise": {"type": "loglinear"}, "tokens": 10}
    files = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert uploaded == ("me/net", "First", sections, files)
    for part in (
        "library_name: sedd-nets",
        "# me/net",
        'load("me/net")',
        '{"type": "absorb"}',
        '{"type": "loglinear"}',
    ):
        assert part in card


# What is said where nothing is told, and to whom it belongs


@pytest.mark.parametrize(
    ("family", "told"),
    [
        (SEDD, {"cond_dim": 128, "dropout": 0.1, "length": 1024}),
        (RADD, {"dropout": 0.02, "length": 1024, "mask_id": None}),
        (MDLM, {"cond_dim": 128, "dropout": 0.1, "length": 1024, "mask_id": None, "time_conditioning": False}),
        (UDLM, {"cond_dim": 128, "dropout": 0.1, "length": 1024, "time_conditioning": True, "classes": 0}),
        (BD3LM, {"cond_dim": 128, "dropout": 0.1, "length": 1024, "mask_id": None}),
        (Causal, {"dropout": 0.1, "length": 1024}),
    ],
)
def test_sizes_unless_told_otherwise(family, told):
    """The published networks' own: a checkpoint that does not say must not come out as another network."""
    given = inspect.signature(family).parameters.values()
    assert {each.name: each.default for each in given if each.default is not inspect.Parameter.empty} == told
    need = {"scale_by_sigma": True} if family is SEDD else {"block_size": 4} if family is BD3LM else {}
    net = family(11, width=16, depth=3, heads=2, **need)
    assert (net.width, net.depth, net.heads, net.num_states) == (16, 3, 2, 11)
    assert {name: getattr(net, name) for name in told if name not in ("mask_id", "classes")} == {
        name: value for name, value in told.items() if name not in ("mask_id", "classes")
    }
    section = net.model_section()
    sizes = [section[name] for name in ("hidden_size", "n_blocks", "n_heads", "length", "dropout")]
    assert sizes == [16, 3, 2, 1024, told["dropout"]]
    assert section.get("cond_dim") == told.get("cond_dim")
    assert net.training
    assert not net.checkpoint_activations


@pytest.mark.parametrize("wrong", [16.0, "16", None])
def test_sizes_are_whole_numbers(wrong):
    with pytest.raises(ValueError, match="depth must be a positive integer"):
        RADD(11, width=16, depth=wrong, heads=2)


def test_dropout_is_a_probability_below_one():
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"dropout is a probability below 1; got {wrong}"):
            RADD(11, width=16, depth=1, heads=2, dropout=wrong)
    assert RADD(11, width=16, depth=1, heads=2, dropout=0.0).dropout == 0


def test_a_network_shares_nothing_with_what_it_was_read_from(golden):
    """Neither weights nor sections: changing either later changes no network, and no network changes them."""
    folder, _ = golden("sedd-tiny-absorb")
    config, stored = one_layout(read_config(folder)), load_file(folder / "model.safetensors")
    net, other = (SEDD.from_checkpoint(config, stored, source="there") for _ in range(2))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    for value in stored.values():
        value.zero_()
    for value in net.state_dict().values():
        value.fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    net.sections["graph"]["type"] = "another"
    assert (config["graph"]["type"], other.sections["graph"]["type"]) == ("absorb", "absorb")
    written = other.config_json()
    written["graph"]["type"] = "another"
    assert other.sections["graph"]["type"] == "absorb"


def test_weights_say_that_they_are_pytorchs(make_sedd, tmp_path):
    """transformers asks for it."""
    make_sedd().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_newer_form_of_the_weights_is_read_where_there_are_two(golden, tmp_path):
    folder, expected = golden("sedd-tiny-absorb")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be read")
    (tmp_path / "model.safetensors.index.json").write_text("nor this")
    net = SEDD.from_pretrained(tmp_path)
    torch.testing.assert_close(net(expected["xt"], expected["sigma"]), expected["log_score"], atol=1e-5, rtol=0)


ABSENT = getattr(  # what a missing file is called in newer versions
    huggingface_hub.errors, "RemoteEntryNotFoundError", huggingface_hub.errors.EntryNotFoundError
)


def hub_says(kind):
    """An error of the hub, as its client raises it."""
    return kind("said the hub", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (huggingface_hub.errors.HFValidationError("no"), FileNotFoundError, "'a/b' is neither a folder nor a name on"),
        (hub_says(ABSENT), FileNotFoundError, "has no config.json"),
        (hub_says(huggingface_hub.errors.RevisionNotFoundError), FileNotFoundError, "a/b .* has no revision 'v1'"),
        (hub_says(huggingface_hub.errors.RepositoryNotFoundError), FileNotFoundError, "nor a public repository"),
        (huggingface_hub.errors.LocalEntryNotFoundError("no"), ConnectionError, r"reached \(LocalEntryNotFoundError\)"),
        (hub_says(huggingface_hub.errors.HfHubHTTPError), ConnectionError, r"cannot be reached \(HfHubHTTPError\)"),
        (OSError("cable"), ConnectionError, r"cannot be reached \(OSError\).*hf download a/b --local-dir"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_says_is_told_as_it_is(monkeypatch, error, kind, told):
    def fail(*_given, **_hub):
        raise error

    monkeypatch.setattr(sedd_nets.files, "hf_hub_download", fail)
    with pytest.raises(kind, match=told):
        read_config("a/b", revision="v1")


def test_a_push_without_a_tokenizer(make_sedd, monkeypatch):
    done: list[Any] = []

    def upload(*, repo_id, folder_path, commit_message):
        done.append((repo_id, sorted(os.listdir(folder_path)), commit_message))
        return SimpleNamespace(commit_url=1)

    def api(*, token):
        done.append(token)
        return SimpleNamespace(create_repo=lambda name, **how: done.append((name, how)), upload_folder=upload)

    monkeypatch.setattr(sedd_nets.pretrained, "HfApi", api)
    assert make_sedd().push_to_hub("me/net") == "1"
    assert done == [
        None,
        ("me/net", {"private": None, "exist_ok": True}),
        ("me/net", ["README.md", "config.json", "model.safetensors"], "Upload the network"),
    ]


def test_a_model_card_tells_sizes(make_sedd):
    net = make_sedd()
    card = net.model_card("me/net", {"noise": {"type": "cosine"}})
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert f"A discrete diffusion model: SEDD of {parameters:,} parameters over 11 states." in card
    assert '| noise | `{"type": "cosine"}` |' in card
    assert f"| network | `{json.dumps(net.model_section())}` |" in card
    assert "tags: [discrete-diffusion, score-entropy, sedd]" in card


def test_json_may_be_as_large_as_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sedd_nets.files, "LARGEST_JSON", 10)
    (tmp_path / "config.json").write_text('{"a": 123}')
    assert read_config(tmp_path) == {"a": 123}
    (tmp_path / "config.json").write_text('{"a": 1234}')
    with pytest.raises(ValueError, match="has 11 bytes, and a checkpoint's JSON files have 10 at most"):
        read_config(tmp_path)
