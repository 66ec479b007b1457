"""A program for two ranks: what goes wrong on both, on one, or on each is an error of both. Rank 0 prints JSON."""

from __future__ import annotations

import json
import sys

from sedd_train import SetupError, distributed, recipes, train

source, folder, cache = [given for given in sys.argv[1:] if not given.startswith("--")]
recipe = recipes.read_recipe(source)
rank, _ = distributed.place()
said = []
for values in (
    {"batch_size": 7},
    {"corpus": "no/such/folder"} if rank == 1 else {},
    {"corpus": "no/such/folder"} if rank == 1 else {"tokenizer": "bpe:3"},
):
    try:
        train(recipes.override(recipe, values), output=f"{folder}/run", cache=cache, tensorboard=False)
        said.append("nothing")
    except SetupError as error:
        said.append(str(error))
if rank == 0:
    print(json.dumps(said))
distributed.finish()
