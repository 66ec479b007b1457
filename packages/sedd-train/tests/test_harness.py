"""EleutherAI's harness: the numbers of a tiny model are the likelihoods that enumeration gives, within their errors."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sedd_graphs import Absorbing, LogLinear, Uniform
from sedd_nets import RADD, SEDD
from sedd_train import Model, commands
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval", reason="the harness: pip install 'sedd-train[eval]'")
pytestmark = pytest.mark.filterwarnings("default")  # it warns

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from sedd_train.harness import SeddLM  # noqa: E402

TOKENS = 4  # a, b, c and the end of text
FIRST = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
NEXT = torch.tensor(
    [[0.1, 0.7, 0.1, 0.1], [0.3, 0.1, 0.5, 0.1], [0.6, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64
)


def log_p(tokens: Any) -> float:
    """Of a chain, which the networks below are exact models of."""
    total = FIRST[tokens[0]].log()
    for before, after in itertools.pairwise(tokens):
        total = total + NEXT[before, after].log()
    return float(total)


@functools.cache
def every(length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(TOKENS), repeat=length))


def log_conditional(_: Any, x: torch.Tensor, sigma: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Log p(x0_i = y | the unmasked tokens), by summing over all that may stand behind the masks."""
    states = torch.tensor(every(x.shape[1]))
    logs = torch.tensor([log_p(row) for row in states.tolist()])
    found = torch.zeros(*x.shape, TOKENS + 1)
    for b, row in enumerate(x):
        fits = ((states == row) | (row == TOKENS)).all(-1)
        weights = logs[fits].softmax(0)[:, None, None]
        found[b, :, :TOKENS] = (weights * torch.nn.functional.one_hot(states[fits], TOKENS)).sum(0)
    found = found.log()
    return found if where is None else found[where]


class Timeless(RADD):
    """The chain as a network that does not see the noise level."""

    log_conditional = log_conditional

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, where: torch.Tensor | None = None, **_: Any) -> Any:
        """Its score."""
        rate = sigma.expm1().log()[:, None, None].expand(*x.shape, 1)
        score = log_conditional(self, x, sigma) - rate
        score = torch.where(torch.arange(TOKENS + 1) == x[..., None], 0.0, score)
        return score if where is None else score[where]


class Timely(SEDD):
    """The same chain as a network of which that is not known."""

    forward = Timeless.forward


def letters() -> Any:
    coder = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, "a"))
    coder.pre_tokenizer = pre_tokenizers.Split(Regex("[abc]|<end>"), "isolated")
    coder.decoder = decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=coder, eos_token="<end>")


SIZES: dict[str, Any] = {"width": 8, "depth": 1, "heads": 1, "length": 5}


def chain(kind: str = "timeless") -> Model:
    net: Any = Timeless(5, **SIZES) if kind == "timeless" else Timely(5, **SIZES, cond_dim=4, scale_by_sigma=True)
    return Model(net, Absorbing(TOKENS), LogLinear(1e-7), letters())  # of which the end has no token left


def asked(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


QUESTIONS = [("ab", "c"), ("a", "bc"), ("abc", "ab"), ("", "abca"), ("cab", "b"), ("b", "aaa")]


def truth(context: str, rest: str) -> float:
    known = [letters().get_vocab()[letter] for letter in context] or [3]  # after an end of text
    tokens = [letters().get_vocab()[letter] for letter in rest]
    return log_p([*known, *tokens]) - log_p(known)


def test_few_tokens_are_summed_over_all_sets_of_masks():
    model = SeddLM(chain(), device="cpu")
    found = model.loglikelihood(asked(*QUESTIONS), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([truth(*pair) for pair in QUESTIONS], abs=1e-5)
    assert (model.measured[0].standard_error == 0).all()


@pytest.mark.parametrize("kind", ["timeless", "timely"])
def test_bounds_are_the_enumerated_likelihoods_within_their_errors(kind):
    """Six numbers at 4.5 standard errors: a false alarm in 10^4 seeds, and this seed is fixed."""
    model = SeddLM(chain(kind), exact=0, num_times=32, device="cpu")
    found = model.loglikelihood(asked(*QUESTIONS), disable_tqdm=True)
    [measured] = model.measured
    for (value, _), pair, error in zip(found, QUESTIONS, measured.standard_error.tolist(), strict=True):
        assert abs(value - truth(*pair)) <= 4.5 * error + 1e-5, pair
    assert measured.standard_error.max() < 0.5


def test_the_likeliest_tokens_one_after_another_are_greedy():
    """Checked against the chain: after ab comes c, after c comes a; of the others each breaks off somewhere."""
    pairs = [("ab", "c"), ("ab", "ca"), ("a", "bca"), ("ab", "a"), ("a", "bb"), ("a", "ca")]
    found = SeddLM(chain(), device="cpu", batch_size=2).loglikelihood(asked(*pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, True, True, False, False, False]


def test_a_text_is_measured_in_windows_that_follow_half_a_window():
    text = "abcabcacb"
    tokens = [letters().get_vocab()[letter] for letter in text]
    [found] = SeddLM(chain(), device="cpu").loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert found == pytest.approx(log_p(tokens), abs=1e-5)  # a chain needs one token of context
    assert SeddLM(chain(), device="cpu").loglikelihood_rolling(asked(("",)), disable_tqdm=True) == [0.0]


def test_what_is_generated_follows_the_context_and_stops():
    model = SeddLM(chain(), device="cpu")
    options: dict[str, Any] = {"until": ["c"], "max_gen_toks": 4}
    assert model.generate_until(asked(("a", options)), disable_tqdm=True) == ["b"]
    assert model.generate_until(asked(("a", options | {"until": []})), disable_tqdm=True) == ["bcab"]
    drawn = model.generate_until(
        asked(*[("ab", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 2})] * 20), disable_tqdm=True
    )
    assert len(set(drawn)) > 3
    [long] = model.generate_until(asked(("abcabcabc", {"max_gen_toks": 3})), disable_tqdm=True)
    assert long == "abc"  # half of the model's length is kept as context


def test_tokens_that_are_noised_are_measured_too_and_are_never_greedy():
    net = SEDD(4, **SIZES, cond_dim=4, scale_by_sigma=False).eval()
    model = SeddLM(Model(net, Uniform(4), LogLinear(), letters()), num_times=8, device="cpu")
    [(value, greedy)] = model.loglikelihood(asked(("ab", "c")), disable_tqdm=True)
    assert value < 0
    assert not greedy
    assert len(model.generate_until(asked(("ab", {"max_gen_toks": 2})), disable_tqdm=True)[0]) <= 2


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="num_time is none of sedd's options pretrained, num_times"):
        SeddLM(chain(), num_time=3)


def task(folder) -> None:
    """A task of multiple choice in files of its own, whose right answers are the likeliest but for one."""
    rows = [
        {"context": context, "choices": choices, "answer": answer}
        for context, choices, answer in [
            ("ab", ["a", "c", "b"], 1),
            ("a", ["bc", "cb"], 0),
            ("c", ["aa", "ab"], 1),
            ("b", ["cab", "bbb"], 1),  # the likeliest is wrong
        ]
    ]
    (folder / "chain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "chain.yaml").write_text(
        f"""task: chain
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "chain.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )


def logged(samples: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Each context with each continuation, and the log-likelihood that the harness wrote down for it."""
    found = {}
    for sample in samples:
        pairs = sample["arguments"]  # in a file these are {"gen_args_0": {"arg_0": ..., "arg_1": ...}, ...}
        if isinstance(pairs, dict):
            pairs = [tuple(pair.values()) for pair in pairs.values()]
        for pair, [[value, _]] in zip(pairs, sample["resps"], strict=True):
            found[pair] = float(value)
    return found


@pytest.mark.parametrize("exact", [6, 0])
def test_the_harness_finds_the_model_by_its_name_and_logs_enumerated_likelihoods(tmp_path, monkeypatch, exact):
    """`simple_evaluate(model="sedd")`, nothing of it replaced. Nine numbers at 4.5 standard errors, a fixed seed."""
    made: list[SeddLM] = []
    ready = SeddLM.__init__

    def kept(self, *args, **more):
        made.append(self)
        ready(self, *args, **more)

    monkeypatch.setattr("sedd_train.harness.load", lambda name: chain("timely" if exact == 0 else "timeless"))
    monkeypatch.setattr(SeddLM, "__init__", kept)
    task(tmp_path)
    found = simple_evaluate(
        model="sedd",
        model_args={"pretrained": "here", "exact": exact, "num_times": 32},
        tasks=["chain"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=3,
        log_samples=True,
        bootstrap_iters=0,
    )
    measured = logged(found["samples"]["chain"])
    assert len(measured) == 9
    [error] = [part.standard_error.max().item() for part in made[0].measured]
    assert error == 0 if exact else 0 < error < 0.5
    for pair, value in measured.items():
        assert abs(value - truth(*pair)) <= 4.5 * error + 1e-5, pair
    assert found["results"]["chain"]["acc,none"] == 0.75


def test_the_harness_own_command_measures_a_folder(tmp_path):
    """`lm_eval run --model sedd`, in a process, on a saved network whose law of a token is the same everywhere.

    Its likelihoods are sums over tokens, also when sampled: log p(continuation) is exact, the error it states is kept.
    """
    net = SEDD(5, **SIZES, cond_dim=4, scale_by_sigma=True)
    with torch.no_grad():  # log s(x)_y = log p(y) - log(e^sigma - 1)
        net.output_layer.linear.weight.zero_()
        net.output_layer.linear.bias[:TOKENS] = FIRST.log() + math.log(4)
    Model(net, Absorbing(TOKENS), LogLinear(1e-7), letters()).save_pretrained(tmp_path / "model")
    task(tmp_path)
    options = f"pretrained={tmp_path / 'model'},num_times=64"
    words = ["run", "--model", "sedd", "--model_args", options, "--tasks", "chain", "--include_path", str(tmp_path)]
    words += ["--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(
        [sys.executable, "-m", "sedd_train", "lm-eval", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "|chain" in done.stdout
    [stated] = re.findall(r"from noise: \S+ nats, (\S+) at most", done.stderr)
    [written] = (tmp_path / "out").rglob("samples_chain_*.jsonl")
    measured = logged([json.loads(line) for line in written.read_text().splitlines()])
    assert len(measured) == 9
    for (_, rest), value in measured.items():
        tokens = [letters().get_vocab()[letter] for letter in rest]
        assert abs(value - float(FIRST[tokens].log().sum())) <= 4.5 * float(stated) + 1e-5, rest


def test_newer_harnesses_look_for_the_model_by_an_entry_point():
    """Of the group that they search; the tree's own pyproject.toml, for the installed wheel is tested elsewhere."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["sedd"].partition(":")
    assert getattr(importlib.import_module(module), name) is SeddLM


def test_a_local_task_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sedd_train.harness.load", lambda name: chain())
    task(tmp_path)
    words = ["--checkpoint", "here", "--tasks", "chain", "--include-path", str(tmp_path), "--device", "cpu"]
    commands.main(["lm-eval", *words, "--output", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "chain" in printed
    assert "measurement error" in printed
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["results"]["chain"]["acc,none"] == 0.75
    with pytest.raises(SystemExit):
        commands.main(["lm-eval", "--checkpoint", "here", "--tasks", "nowhere"])
    assert "nowhere" in capsys.readouterr().err
