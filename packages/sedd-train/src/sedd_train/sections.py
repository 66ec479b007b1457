"""Graphs and schedules as config.json names them, and back; every value is checked where it is read.

    {"type": "absorb", "mask_id": 103}                                  the mask is the last state unless said
    {"type": "uniform"}    {"type": "ordinal"}
    {"type": "hybrid", "uniform_rate": 1.0, "mask_rate": 1.0}           with a mask_id, too
    {"type": "masked", "tokens": {"type": "ordinal"}, "rate": 1.0, "mask_rate": 1.0}
    {"type": "loglinear", "eps": 0.001}    cosine    polynomial         each with its eps
    {"type": "geometric", "sigma_min": 0.0001, "sigma_max": 20}    linear

Of others a checkpoint keeps the name alone, {"type": "Dense", "is": "Dense(Q of 4 states)"}: whoever loads it brings
the graph or the schedule itself.

A recipe says the same in a word: `absorb`, `absorb:mask_id=103`, `hybrid:uniform_rate=1,mask_rate=0.5`,
`masked:tokens=ordinal,rate=1,mask_rate=1`, `cosine`, `polynomial:power=3,eps=1e-4`; `own:...` is an object that was
given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sedd_graphs import (
    Absorbing,
    Cosine,
    Geometric,
    Hybrid,
    Linear,
    LogLinear,
    Masked,
    Ordinal,
    Polynomial,
    Uniform,
)
from sedd_nets.config import integer, number, section, text

__all__ = ["described", "graph_section", "in_a_word", "make_noise", "noise_section", "read_graph"]

OWN = "own:"

NOISES: dict[str, tuple[Any, dict[str, float | None]]] = {
    "loglinear": (LogLinear, {"eps": 1e-3}),
    "cosine": (Cosine, {"eps": 1e-3}),
    "polynomial": (Polynomial, {"power": 2.0, "eps": 1e-3}),
    "geometric": (Geometric, {"sigma_min": None, "sigma_max": None}),
    "linear": (Linear, {"sigma_max": None, "sigma_min": 0.0}),
}
GRAPHS: dict[str, Any] = {
    "absorb": Absorbing,
    "uniform": Uniform,
    "ordinal": Ordinal,
    "hybrid": Hybrid,
    "masked": Masked,
}
VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "graph": {
        "absorb": ("mask_id",),
        "uniform": (),
        "ordinal": (),
        "hybrid": ("uniform_rate", "mask_rate", "mask_id"),
        "masked": ("tokens", "rate", "mask_rate", "mask_id"),
    },
    "noise": {kind: tuple(values) for kind, (_, values) in NOISES.items()},
}
MASKING = ("absorb", "hybrid", "masked")


def read_graph(described: Mapping[str, Any], num_states: int) -> Any:
    """The graph over so many states that a `graph` section describes.

    Raises:
        ValueError: another type, or a value that makes no such graph.
    """
    kind = text(described, "type")
    if kind == "uniform":
        return Uniform(num_states)
    if kind == "ordinal":
        return Ordinal(num_states)
    if kind not in GRAPHS:
        raise ValueError(_unknown("graph", described, GRAPHS))
    mask_id = integer(described, "mask_id", default=num_states - 1, least=0, most=num_states - 1)
    if kind == "absorb":
        return Absorbing(num_states - 1, mask_id)
    mask_rate = number(described, "mask_rate")
    if kind == "hybrid":
        uniform_rate = number(described, "uniform_rate")
        return Hybrid(num_states - 1, uniform_rate=uniform_rate, mask_rate=mask_rate, mask_id=mask_id)
    of_tokens = section(described, "tokens")
    if text(of_tokens, "type") not in ("uniform", "ordinal"):
        raise ValueError(f"config.json: the tokens of a masked graph are uniform or ordinal; got {of_tokens!r:.100}")
    tokens = read_graph(of_tokens, num_states - 1)
    return Masked(tokens, rate=number(described, "rate"), mask_rate=mask_rate, mask_id=mask_id)


def make_noise(described: Mapping[str, Any]) -> Any:
    """The schedule that a `noise` section describes.

    Raises:
        ValueError: another type, or a value that makes no such schedule.
    """
    kind = text(described, "type")
    if kind not in NOISES:
        raise ValueError(_unknown("noise", described, NOISES))
    schedule, values = NOISES[kind]
    return schedule(**{name: number(described, name, default=default) for name, default in values.items()})


def graph_section(graph: Any) -> dict[str, Any]:
    """The `graph` section of a graph: as the table above, or by its name alone."""
    kind = next((kind for kind, known in GRAPHS.items() if type(graph) is known), None)
    if kind is None:
        return {"type": type(graph).__name__, "is": repr(graph)}
    found: dict[str, Any] = {"type": kind}
    if kind == "masked":
        found |= {"tokens": graph_section(graph.tokens), "rate": graph.rate, "mask_rate": graph.mask_rate}
        if found["tokens"]["type"] not in ("uniform", "ordinal"):
            return {"type": "Masked", "is": repr(graph)}
    if kind == "hybrid":
        found |= {"uniform_rate": graph.rate, "mask_rate": graph.mask_rate}
    if graph.mask_id is not None:
        found["mask_id"] = graph.mask_id
    return found


def noise_section(noise: Any) -> dict[str, Any]:
    """The `noise` section of a schedule: as the table above, or by its name alone."""
    for kind, (schedule, values) in NOISES.items():
        if type(noise) is schedule:
            return {"type": kind} | {name: getattr(noise, name) for name in values}
    return {"type": type(noise).__name__, "is": repr(noise)}


def described(what: str, word: str) -> dict[str, Any]:
    """The section that a recipe's word stands for.

    Args:
        what: graph or noise.
        word: `TYPE` or `TYPE:NAME=VALUE,NAME=VALUE`, see above.

    Raises:
        ValueError: another type, or a value that it does not have; what the values may be is checked by who reads them.
    """
    if word.startswith(OWN):
        return {"type": "own", "is": word.removeprefix(OWN)}
    kind, _, values = word.partition(":")
    if kind not in VALUES[what]:
        raise ValueError(f"{what} = {word!r}: expected {', '.join(VALUES[what])}")
    found: dict[str, Any] = {"type": kind}
    for pair in values.split(",") if values else []:
        name, _, value = pair.partition("=")
        if name not in VALUES[what][kind]:
            known = ", ".join(VALUES[what][kind]) or "none"
            raise ValueError(f"{what} = {word!r}: {name!r} is no value of {kind}; it has {known}")
        found[name] = {"type": value} if name == "tokens" else _number(value)
    return found


def in_a_word(section: Mapping[str, Any]) -> str:
    """A recipe's word for a section; the reverse of `described`."""
    kind = section["type"]
    if "is" in section:
        return OWN + str(section["is"])
    known = (*VALUES["graph"].get(kind, ()), *VALUES["noise"].get(kind, ()))
    told = {name: section[name] for name in known if name in section}
    values = ",".join(f"{name}={value['type'] if name == 'tokens' else value}" for name, value in told.items())
    return f"{kind}:{values}" if values else str(kind)


def _number(value: str) -> int | float | str:
    """What a value says, or the value itself, which whoever reads it refuses by its name."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _unknown(what: str, described: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    told = described.get("is", described["type"])
    return (
        f"config.json: {what}.type {described['type']!r:.100} is none of {', '.join(known)}. If the checkpoint was "
        f"made with a {what} of one's own ({told!r:.200}), give it: load(..., {what}=...)"
    )
