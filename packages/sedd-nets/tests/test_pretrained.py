import json
import shutil
from pathlib import Path

import huggingface_hub.errors
import pytest
import sedd_nets.pretrained
import torch
from safetensors.torch import load_file, save_file
from sedd_nets import SEDD, from_pretrained, read_config

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


def test_what_a_checkpoint_says_of_its_noise_is_kept(golden, tmp_path):
    """The network has no use for it, whoever builds the schedule has: values other than the usual ones, too."""
    folder, _ = golden("sedd-tiny-absorb")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = read_config(folder) | {"noise": {"type": "loglinear", "eps": 0.0123}, "anything": [1, {"a": 2}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    net = from_pretrained(tmp_path)
    assert net.sections == {key: value for key, value in config.items() if key != "model"}


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
    with pytest.raises(ValueError, match=r"not SEDD's.*cond_dim"):
        SEDD.from_pretrained(folder)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 12}))
    with pytest.raises(ValueError, match=r"not SEDD's.*gpt2"):
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


def test_names_go_to_the_hub(golden, monkeypatch):
    folder, expected = golden("sedd-tiny-absorb")
    asked = []

    def download(name, file, *, revision):
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(sedd_nets.pretrained, "hf_hub_download", download)
    net = SEDD.from_pretrained("someone/sedd-small", revision="v1")
    torch.testing.assert_close(net(expected["xt"], expected["sigma"]), expected["log_score"], atol=1e-5, rtol=0)
    assert asked == [("someone/sedd-small", file, "v1") for file in ("config.json", "model.safetensors")]


def test_hub_out_of_reach(monkeypatch):
    def download(*_given, **_options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(sedd_nets.pretrained, "hf_hub_download", download)
    with pytest.raises(ConnectionError, match=r"'someone/sedd-small' is no folder.*hf download someone/sedd-small"):
        SEDD.from_pretrained("someone/sedd-small")


def test_the_config_is_moved_into_place_last(make_sedd, tmp_path, monkeypatch):
    """Both are on the disk by then, and who waits for a checkpoint's config finds its weights."""
    done: list[str] = []
    synchronise, replace = sedd_nets.pretrained.synchronise, Path.replace

    def noted_synchronise(path):
        done.append("synchronised")
        synchronise(path)

    def noted_replace(path, target):
        done.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(sedd_nets.pretrained, "synchronise", noted_synchronise)
    monkeypatch.setattr(Path, "replace", noted_replace)
    make_sedd().save_pretrained(tmp_path)
    assert done == ["synchronised"] * 2 + ["model.safetensors", "config.json"]


def test_failed_save_leaves_the_last_checkpoint(make_sedd, tmp_path, monkeypatch):
    first = make_sedd(seed=1)
    first.save_pretrained(tmp_path, sections=SECTIONS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sedd_nets.pretrained, "synchronise", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_sedd(seed=2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
