"""What a checkpoint's config.json says, in whichever published layout; every value is checked where it is read.

The layout that everything here reads is nested: `model` (the sizes, and the `type` of network), `graph`, `noise`,
`tokens`, and what else a writer wanted kept. Published are

    nested   louaaron/sedd-* (model.type ddit), JingyangOu/radd-* (ddit_wot, without `graph`)
    flat     kuleshov-group/mdlm-*, udlm-* and bd3lm-*, s-sahoo/duo*: a model_type, hidden_dim, model_length, ...
    nested   the trainers of MDLM, UDLM and Duo, which say by `algo` or `parameterization` what the network predicts

The mask, where there is one, stands in `graph`: {"type": "absorb", "mask_id": 103}; without `mask_id` it is the last
state. `tokens` counts the states that are no mask.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["boolean", "family_of", "integer", "number", "one_layout", "section", "text"]

MOST = 1 << 24  # of anything that is counted: states, positions, channels, classes
FLAT = {"mdlm": "mdlm", "udlm": "udlm", "duo": "udlm", "bd3lm": "bd3lm"}  # model_type -> model.type
RENAMED = {"hidden_dim": "hidden_size", "model_length": "length"}
TYPES = {"causal": "Causal", "ddit_wot": "RADD", "mdlm": "MDLM", "udlm": "UDLM", "bd3lm": "BD3LM"}
ALGORITHMS = {"duo": "udlm", "duo_base": "udlm", "distillation": "udlm", "mdlm": "mdlm", "sedd": "ddit"}
PARAMETERIZATIONS = {"subs": "mdlm", "sedd": "ddit"}
BERT_MASK = {30522: 103, 28996: 103}  # [MASK] in the vocabularies of BERT, uncased and cased


def one_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published config as the nested one, with `model.type`, `graph` and `noise` where the layout implies them.

    Raises:
        ValueError: it is none of the layouts above, or a value is of the wrong kind.
    """
    nested: dict[str, Any] = dict(copy.deepcopy(config))
    if "model" in config:
        _take_trainers_word(nested, section(nested, "model"))
        return nested
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind.lower() not in FLAT:
        told = kind or config.get("architectures") or sorted(config)
        raise ValueError(
            f"config.json describes {told!r:.200}: it has no `model` section, and its model_type is none of "
            + ", ".join(FLAT)
        )
    return _nested(nested, FLAT[kind.lower()])


def _nested(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The flat config that a Hugging Face class of MDLM, UDLM, Duo or BD3LM writes, nested."""
    if boolean(config, "causal", default=False):
        raise ValueError("config.json: causal is true: a left-to-right network, which this package does not read")
    model = {RENAMED.get(name, name): value for name, value in config.items() if name not in ("causal", "model_type")}
    states = integer(config, "vocab_size", default=0, least=0)
    graph: dict[str, Any] = {"type": "uniform"}
    if kind != "udlm":
        graph = {"type": "absorb"}
        if "mask_id" in config:
            graph["mask_id"] = integer(config, "mask_id", least=0)
        elif kind == "mdlm" and states in BERT_MASK:
            graph["mask_id"] = BERT_MASK[states]
    tokens = {"tokens": states - (kind != "udlm")} if states else {}
    kept = {name: model[name] for name in KEPT[kind] if name in model}
    return {"model": {"type": kind, **kept}, **tokens, "graph": graph, "noise": {"type": "loglinear"}}


_SIZES = ("hidden_size", "cond_dim", "length", "n_blocks", "n_heads", "dropout", "time_conditioning")
KEPT = {
    "mdlm": _SIZES,
    "udlm": (*_SIZES, "cfg", "cfg_num_classes"),
    "bd3lm": (*_SIZES, "block_size", "cross_attn", "adaln"),
}


def _take_trainers_word(config: dict[str, Any], model: dict[str, Any]) -> None:
    """Write into `model` and the sections what the trainers of MDLM, UDLM and Duo say elsewhere."""
    algorithm, parameterization = config.get("algo"), config.get("parameterization")
    if algorithm is not None:
        algorithm = section(config, "algo")
        name = text(algorithm, "name")
        if boolean(algorithm, "causal_attention", default=False) or name not in ALGORITHMS:
            raise ValueError(f"config.json: algo.name {name!r:.100} is none of {', '.join(ALGORITHMS)}")
        model["type"] = ALGORITHMS[name]
        if "time_conditioning" in algorithm:
            model["time_conditioning"] = algorithm["time_conditioning"]
        if section(config, "noise", default={}).get("type") == "cosine":
            raise ValueError(
                "config.json: noise.type 'cosine' of Duo's trainer, alpha = 1 - sin(pi t / 2), is not known"
            )
    elif parameterization is not None:
        uniform = parameterization == "d3pm" and config.get("diffusion") == "uniform"
        if not uniform and (not isinstance(parameterization, str) or parameterization not in PARAMETERIZATIONS):
            raise ValueError(
                f"config.json: parameterization {parameterization!r:.100} is none of {', '.join(PARAMETERIZATIONS)}, "
                "or d3pm with the uniform diffusion"
            )
        model["type"] = "udlm" if uniform else PARAMETERIZATIONS[parameterization]
        if "time_conditioning" in config:
            model["time_conditioning"] = config["time_conditioning"]
    else:
        return
    config.setdefault("graph", {"type": "uniform" if model["type"] == "udlm" else "absorb"})
    noise = section(config, "noise", default={"type": "loglinear"})
    config["noise"] = noise | ({"type": "loglinear"} if noise.get("type") == "log-linear" else {})


def family_of(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The class whose checkpoint this is: by `model.type`, and where that is ddit or missing by what else there is.

    `backbone.` before the weights' keys is MDLM; SEDD has a `cond_dim`, for it embeds sigma, and RADD none.

    Raises:
        ValueError: no such type.
    """
    model = section(config, "model")
    kind = model.get("type", "ddit")
    if kind != "ddit":
        if not isinstance(kind, str) or kind not in TYPES:
            raise ValueError(f"config.json: model.type {kind!r:.100} is none of ddit, {', '.join(TYPES)}")
        return TYPES[kind]
    if any(key.startswith("backbone.") for key in keys):
        return "MDLM"
    return "SEDD" if "cond_dim" in model else "RADD"


def section(config: Mapping[str, Any], name: str, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A part of the config that is an object. Raises ValueError where it is none, or missing without default."""
    found = config.get(name, default)
    if not isinstance(found, dict):
        raise ValueError(f"config.json: {name} must be an object; {_told(config, name)}")
    return found


def integer(
    values: Mapping[str, Any], name: str, *, default: int | None = None, least: int = 1, most: int = MOST
) -> int:
    """A whole number. Raises ValueError where it is none, out of range, or missing without default."""
    found = values.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise ValueError(f"config.json: {name} must be a whole number of {least} to {most}; {_told(values, name)}")
    return found


def number(
    values: Mapping[str, Any], name: str, *, default: float | None = None, least: float = 0.0, below: float = math.inf
) -> float:
    """A finite number of at least `least`. Raises ValueError where it is none, or missing without default."""
    found = values.get(name, default)
    whole = isinstance(found, int) and not isinstance(found, bool) and abs(found) <= 1 << 53
    if not (whole or isinstance(found, float)) or not least <= found < below:  # false for NaN, too
        range_ = f"of at least {least:g}" + (f" and below {below:g}" if below < math.inf else "")
        raise ValueError(f"config.json: {name} must be a finite number {range_}; {_told(values, name)}")
    return float(found)


def boolean(values: Mapping[str, Any], name: str, *, default: bool | None = None) -> bool:
    """True or false. Raises ValueError where it is neither, or missing without default."""
    found = values.get(name, default)
    if not isinstance(found, bool):
        raise ValueError(f"config.json: {name} must be true or false; {_told(values, name)}")
    return found


def text(values: Mapping[str, Any], name: str, *, default: str | None = None) -> str:
    """A string. Raises ValueError where it is none, or missing without default."""
    found = values.get(name, default)
    if not isinstance(found, str):
        raise ValueError(f"config.json: {name} must be a string; {_told(values, name)}")
    return found


def _told(values: Mapping[str, Any], name: str) -> str:
    return f"got {values[name]!r:.100}" if name in values else "there is none"
