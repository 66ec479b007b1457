"""Score models out of models that predict something else, and back.

    posterior    p(x0 | x_t)               s(x)_y = sum_{x0} p(x0 | x) p(y | x0) / p(x | x0)
    logits       of p(x0 | x_t)            their softmax
    reverse      p(x_s | x_t), D3PM        the same sum with the law of a shorter step, sigma(t) - sigma(s)
    velocity     of a discrete flow        u(y, x) = (p(x0 = y | x) - delta_x(y)) / (1 - kappa), kappa = e^-sigma
    hub          a model and a tokenizer   graph, schedule and defaults with it: `from_hf`

All go through one pair of row kernels: `tweedie_score` (from the law of an earlier state to the score) and its inverse
`tweedie_probs`. `from_...` wraps a foreign model as a score model, `to_...` wraps a score model as the other kind; the
two undo each other. A wrapper offers `where` and `rows` (see `sedd_samplers.model_calls`), hands them on to a model
that has them too, and indexes the answer of one that has not. It works in float32 (in float64 for float64 answers).

Sources: posterior and Tweedie's theorem, equations 18 and 19; SUBS, Sahoo et al. 2024 (arXiv 2406.07524); reverse
model, Austin et al. 2021 (arXiv 2107.03006); velocity, Gat et al. 2024 (arXiv 2407.15595).
"""

from ..model_calls import per_sequence
from .conversions import (
    from_logits,
    from_masked_lm,
    from_posterior,
    from_reverse,
    from_velocity,
    to_posterior,
    to_reverse,
    to_velocity,
)
from .hub import Adapted, from_hf

__all__ = [
    "from_posterior",
    "to_posterior",
    "from_logits",
    "from_masked_lm",
    "from_hf",
    "Adapted",
    "from_reverse",
    "to_reverse",
    "from_velocity",
    "to_velocity",
    "per_sequence",
]
