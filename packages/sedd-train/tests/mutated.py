"""Loads checkpoints whose files of text have been changed at random, and reports what came of it, as JSON.

    python mutated.py FOLDER SEED COUNT

In a process of its own, for what is looked at is the process's: the memory it took, and through the interpreter's audit
events whether anything ran that a checkpoint brought along, or was written outside FOLDER.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from sedd_graphs import Absorbing, Geometric, Hybrid, LogLinear, Uniform
from sedd_nets import BD3LM, MDLM, RADD, SEDD, UDLM
from sedd_train import Model, checkpoint, load_trained
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZES: dict[str, Any] = {"width": 8, "depth": 1, "heads": 2, "length": 12, "dropout": 0.0}
EVIL = "__import__('os').system('touch it-ran')"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, -3, 3.5, -0.0, 1e308, float("nan"), float("inf"), 10**15, 10**400, 4_000_000),
    *("", "64", "false", "nan", "../../..", "/etc/passwd", "/dev/zero", "\u0000", "\U0001f600", "x" * 10_000, EVIL),
    *([], {}, [[]], [1, 2], {"type": "absorb"}, {"type": "label", "classes": 10**9}, ["evil.Evil", None], {"": ""}),
    *(
        "absorb",
        "uniform",
        "hybrid",
        "masked",
        "ddit",
        "ddit_wot",
        "mdlm",
        "udlm",
        "bd3lm",
        "causal",
        "geometric",
        "d3pm",
    ),
)
KEYS = ("type", "mask_id", "model", "graph", "noise", "tokens", "objective", "condition", "auto_map", "model_type")


def words(size: int, mask: int | None = None) -> Any:
    vocabulary = {"[MASK]" if i == mask else f"w{i}": i for i in range(size)}
    coder = Tokenizer(models.WordLevel(vocabulary, "w0"))
    coder.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=coder, eos_token="w1", **({} if mask is None else {"mask_token": "[MASK]"}))


def originals(root: Path) -> list[Path]:
    """A whole checkpoint of each layout."""
    torch.manual_seed(0)
    nets: dict[str, tuple[Any, Any, Any, Any]] = {
        "sedd": (SEDD(11, **SIZES, cond_dim=4, scale_by_sigma=True), Absorbing(10), LogLinear(), words(10)),
        "radd": (RADD(11, **SIZES, mask_id=4), Absorbing(10, mask_id=4), LogLinear(), words(11, mask=4)),
        "hybrid": (
            SEDD(11, **SIZES, cond_dim=4, scale_by_sigma=True),
            Hybrid(10, uniform_rate=1.0, mask_rate=0.5),
            Geometric(),
            words(10),
        ),
        "bd3lm": (BD3LM(11, **SIZES, cond_dim=4, block_size=4), Absorbing(10), LogLinear(), words(10)),
        "udlm": (UDLM(11, **SIZES, cond_dim=4, classes=3), Uniform(11), LogLinear(), words(11)),
        "mdlm": (MDLM(11, **SIZES, cond_dim=4), Absorbing(10), LogLinear(), words(10)),
    }
    for name, parts in nets.items():
        Model(*parts).save_pretrained(root / name)
    sizes = {"model_length": 12, "hidden_dim": 8, "cond_dim": 4, "n_blocks": 1, "n_heads": 2, "dropout": 0.1}
    layouts: dict[str, dict[str, Any]] = {
        "mdlm": {"time_conditioning": False},
        "udlm": {"cfg": True, "cfg_num_classes": 3},
    }
    for name, more in layouts.items():
        flat = {"model_type": name, "vocab_size": 11, **sizes, **more, "auto_map": {"AutoModel": "evil.Evil"}}
        (root / name / "config.json").write_text(json.dumps(flat))
    shards = safetensors.torch.load_file(root / "hybrid" / "model.safetensors")
    (root / "hybrid" / "model.safetensors").unlink()
    safetensors.torch.save_file(shards, root / "hybrid" / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(shards, "model-00001-of-00001.safetensors")}
    (root / "hybrid" / "model.safetensors.index.json").write_text(json.dumps(index))
    step = root / "run" / "checkpoints" / "step-00000004"
    shutil.copytree(root / "sedd", step)
    safetensors.torch.save_file({"weights/a": torch.zeros(2)}, step / "training.safetensors")
    sums = {path.name: checkpoint._sha256(path) for path in sorted(step.iterdir())}
    counts = {"step": 4, "adam_steps": 4, "ema_updates": 4, "bound": 2.5, "fingerprint": "abc"}
    (step / "manifest.json").write_text(json.dumps(counts | {"files": sums}))
    (step.parent / "latest").write_text(step.name)
    for folder in [root / name for name in nets] + [step]:
        (folder / "evil.py").write_text("open('it-ran', 'w').close()\nclass Evil: pass\n")
    return [*(root / name for name in nets), root / "run"]


def text_files(folder: Path) -> list[Path]:
    """config.json, the manifest, `latest`, the index, the tokenizer's two."""
    return sorted(path for path in folder.rglob("*") if path.suffix == ".json" or path.name == "latest")


def mutate(path: Path, draw: random.Random) -> None:
    """One change: of a value, a key, or of bytes."""
    content = path.read_bytes()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, dict) and draw.random() < 0.8:
        change_tree(tree, draw)
        path.write_text(json.dumps(tree))
        return
    at, kind = draw.randrange(len(content) + 1), draw.randrange(5)
    if kind == 0:
        content = content[:at]
    elif kind == 1:
        content = content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at + 1 :]
    elif kind == 2:
        content = content[:at] + content[at + draw.randrange(1, 40) :]
    elif kind == 3:
        content = draw.choice(
            [b"", b"null", b"[]", b"{}", b"[" * 5000, b"../..", b"step-1", b'{"a":' * 2000, b"\xff\xfe"]
        )
    else:
        content = content[:at] + content
    path.write_bytes(content)


def change_tree(tree: Any, draw: random.Random) -> None:
    """A random place of the tree gets another value, is taken away or renamed, or gains a neighbour."""
    places: list[tuple[Any, Any]] = []
    stack: list[Any] = [tree]
    while stack:
        node = stack.pop()
        inside = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        places += [(node, key) for key, _ in inside]
        stack += [value for _, value in inside if isinstance(value, dict | list)]
    if not places:
        return
    node, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind < 3:
        node[key] = draw.choice(VALUES)
    elif kind == 3:
        del node[key]
    elif kind == 4 and isinstance(node, dict):
        node[draw.choice([*KEYS, str(key) + "x", "../" + str(key)])] = node.pop(key)
    else:
        other, from_there = draw.choice(places)
        if from_there in other if isinstance(other, dict) else from_there < len(other):
            node[key] = json.loads(json.dumps(other[from_there]))


class Watch:
    """What the interpreter is asked to do while `folder` is set."""

    def __init__(self, root: Path) -> None:
        self.root, self.on = str(root), False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "subprocess.Popen",
            "pty.spawn",
            "pickle.find_class",
        ):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "exec":
            name = str(getattr(arguments[0], "co_filename", ""))
            if name.startswith(self.root) or name == "<string>":
                self.seen.append(f"exec of {name}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = os.fsdecode(arguments[0]), arguments[2]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.abspath(path).startswith((self.root, "/dev/", "/proc/")):
                self.seen.append(f"open for writing: {path:.200}")


def read(folder: Path) -> None:
    """As `load` and `--resume` do."""
    if (folder / "checkpoints").is_dir():
        checkpoint.best(folder / "checkpoints")
        found = checkpoint.find(folder / "checkpoints")
        if found is not None:
            checkpoint.read(found)
    load_trained(folder)


def main(root: Path, seed: int, count: int) -> dict[str, Any]:
    """Mutate and read so often."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    draw = random.Random(seed)
    whole = originals(root / "whole")
    for folder in whole:
        read(folder)
    watch, came_of_it, faults = Watch(root), collections.Counter[str](), []
    watch.on = True
    exec(compile("1", str(root / "evil.py"), "exec"))
    os.system("true")
    watch.on = False
    assert len(watch.seen) == 2, "the watch is deaf"
    watch.seen.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        folder = root / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(draw.choice(whole), folder)
        for _ in range(draw.choice([1, 1, 2, 3])):
            mutate(draw.choice(text_files(folder)), draw)
        watch.on = True
        try:
            read(folder)
            came_of_it["loaded"] += 1
        except ValueError:
            came_of_it["ValueError"] += 1
        except FileNotFoundError:
            came_of_it["FileNotFoundError"] += 1
        except BaseException as error:
            came_of_it[type(error).__name__] += 1
            kept = root / f"fault-{number}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            faults.append(f"{kept}: " + "".join(traceback.format_exception(error))[-1500:])
        watch.on = False
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ran = [str(path) for path in root.rglob("it-ran")]
    return {"came_of_it": came_of_it, "faults": faults, "seen": watch.seen, "ran": ran, "grown_kb": after - before}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
