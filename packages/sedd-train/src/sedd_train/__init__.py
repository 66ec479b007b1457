"""Training discrete diffusion language models by score entropy, with DeepSpeed ZeRO.

Modules, in the order of a run: `recipes` (its numbers), `launch` (its processes), `data` (text to blocks; by `alphabet`
and `detokenizers` as benchmarks have it), `randomness` (times and noise), `objectives` (the losses), `engine` (the
step), `ema`, `evaluation`, `checkpoint`, `report`; `pretrained` reads what came out, `prompts` says which tokens of a
sample are given.
"""

from importlib.metadata import version

from sedd_train.evaluation import Evaluation, evaluate
from sedd_train.pretrained import Model, Trained, load, load_trained

__all__ = ["Evaluation", "Model", "Trained", "evaluate", "load", "load_trained", "__version__"]
__version__ = version("sedd-train")
