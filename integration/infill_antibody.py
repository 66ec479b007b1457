"""Design the CDR3 loop of an antibody with somebody else's masked language model: AntiBERTy, a BERT for antibodies.

    pip install --no-deps antiberty==0.1.3
    python integration/infill_antibody.py

The model (Ruffolo, Gray and Sulam 2021, arXiv 2112.07782) was trained to fill masks, not to sample. `from_masked_lm`
makes it a score model, `infill` draws the 13 residues of the loop given the rest of the heavy chain of trastuzumab.
Designs are judged by their pseudo-log-likelihood, the sum over the loop of log p(residue | all the others), beside the
chain's own loop, and beside loops of the same length drawn residue by residue.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_samplers import Unmasking, infill
from sedd_samplers.adapters import from_masked_lm
from sedd_samplers.controls import temperature
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

CHAIN = (  # heavy chain variable domain of trastuzumab; the loop between the anchors C and W
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC",
    "SRWGGDGFYAMDY",
    "WGQGTLVTVSS",
)


def load() -> tuple[BertForMaskedLM, list[str]]:
    """The network of the installed package, read without running its code, and its 25 tokens."""
    spec = find_spec("antiberty")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this example needs the model: pip install --no-deps antiberty==0.1.3")
    folder = Path(spec.submodule_search_locations[0]) / "trained_models"
    weights = folder / "AntiBERTy_md_smooth"
    stored = torch.load(weights / "pytorch_model.bin", map_location="cpu", weights_only=True)
    unused = ("bert.pooler.", "bert.embeddings.position_ids", "cls.species.", "cls.chain.", "cls.graft.")
    model = BertForMaskedLM(BertConfig(**json.loads((weights / "config.json").read_text())))
    model.load_state_dict({k: v for k, v in stored.items() if not k.startswith(unused)})
    model.train(mode=False)
    return model, (folder / "vocab.txt").read_text().split()


@torch.no_grad()
def pseudo_log_likelihood(model: BertForMaskedLM, x: Tensor, positions: Tensor, mask_id: int) -> Tensor:
    """Sum over positions (K,) of log p(x_i | all the others), in nats, for each sequence of x (B, L): (B,)."""
    total = torch.zeros(len(x))
    for i in positions.tolist():
        hidden = x.clone()
        hidden[:, i] = mask_id
        total += model(input_ids=hidden).logits[:, i].log_softmax(-1).gather(1, x[:, i, None])[:, 0]
    return total


def main(num: int, heat: float, seed: int) -> dict[str, Tensor]:
    """Draw loops and judge them; returns the pseudo-log-likelihoods a residue, in nats, by kind."""
    model, vocab = load()
    state = {token: i for i, token in enumerate(vocab)}
    special = [state[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    before, loop, after = CHAIN
    chain = torch.tensor([state["[CLS]"], *(state[residue] for residue in before + loop + after), state["[SEP]"]])
    positions = torch.arange(len(before) + 1, len(before) + len(loop) + 1)

    # the masked language model becomes a sampler
    graph = Absorbing(len(vocab) - 1, mask_id=state["[MASK]"])
    score = from_masked_lm(model, graph, banned=special, controls=[temperature(heat)])

    x = chain.expand(num, -1)
    given = torch.ones_like(x, dtype=torch.bool)
    given[:, positions] = False
    seeds = range(seed, seed + num)
    designs = infill(score, graph, LogLinear(), x=x, given=given, steps=128, method=Unmasking(), seeds=seeds)

    rng = torch.Generator().manual_seed(seed)
    residues = torch.cat([chain[1 : positions[0]], chain[positions[-1] + 1 : -1]])
    replaced = x.clone()
    replaced[:, positions] = residues[torch.randint(len(residues), (num, len(loop)), generator=rng)]
    uniform = x.clone()
    uniform[:, positions] = torch.randint(len(special), len(vocab), (num, len(loop)), generator=rng)

    judged = {
        "the chain's own loop": chain[None],
        "designs": designs,
        "residues at the chain's frequencies": replaced,
        "residues at random": uniform,
    }
    scores = {name: pseudo_log_likelihood(model, y, positions, graph.mask_id) / len(loop) for name, y in judged.items()}
    for name, y in judged.items():
        likelihood = scores[name]
        spread = f"{likelihood.mean():6.2f} +- {likelihood.std():.2f}" if len(y) > 1 else f"{float(likelihood):6.2f}"
        best = "".join(vocab[residue] for residue in y[likelihood.argmax(), positions])
        print(f"{name:36} {spread:>15} nats a residue; the best: {best}")
    distinct = len({tuple(loop) for loop in designs[:, positions].tolist()})
    print(f"{distinct} of {num} designs are distinct")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=64, help="how many loops to draw (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of each residue's law (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same loops (default: %(default)s)")
    args = parser.parse_args()
    main(args.num, args.temperature, args.seed)
