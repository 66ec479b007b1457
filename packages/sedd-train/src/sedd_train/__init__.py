"""Training discrete diffusion language models by score entropy, with DeepSpeed ZeRO.

Modules: `training` is the loop, from top to bottom. In the order of a run: `recipes` (its numbers), `launchers` and
`distributed` (its processes), `storage` (its files), `corpora` (documents; by `text8` and `detokenizers` as benchmarks
have them), `tokenizers`, `tokens`, `token_cache`, `starting`, `finetuning` and `adapters` (what it begins with),
`loading` (the order), `randomness` (times and noise), `objectives` (the losses), `engine` (the step), `settling`,
`zero_shards` and `ema`, `nonfinite`, `evaluation`, `checkpoint`, `progress`, `loggers`, `plotting`, `report`; `plan`
and `flops` say what a run costs, `pretrained` reads what came out, `pipelines` writes with it and `prompts` says which
tokens are given; `conditional` and `harness` measure what follows a text.
"""

from importlib.metadata import version

from sedd_train.evaluation import Evaluation, evaluate
from sedd_train.pipelines import Pipeline, pipeline
from sedd_train.pretrained import Model, Trained, load, load_trained
from sedd_train.settling import TrainingError
from sedd_train.training import Result, SetupError, train

__all__ = [
    "train",
    "Result",
    "SetupError",
    "TrainingError",
    "pipeline",
    "Pipeline",
    "load",
    "Model",
    "load_trained",
    "Trained",
    "evaluate",
    "Evaluation",
    "__version__",
]
__version__ = version("sedd-train")
