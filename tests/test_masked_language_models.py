"""Every masked language model of transformers that can be built tiny: through `from_hf`, its own plain forward."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from sedd_graphs import LogLinear
from sedd_samplers import infill
from sedd_samplers.adapters import from_hf
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MODELS

PAD, CLS, SEP, MASK, WORDS = 0, 1, 2, 5, 40
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "d_model": 16, "dim": 16, "emb_dim": 16, "embedding_size": 16,
    "num_hidden_layers": 2, "encoder_layers": 1, "decoder_layers": 1, "n_layers": 2, "num_attention_heads": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_key_value_heads": 2, "n_heads": 2,
    "intermediate_size": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "hidden_dim": 32,
    "max_position_embeddings": 64, "d_latents": 16, "num_latents": 8, "attention_window": [4, 4],
    "pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP, "cls_token_id": CLS, "sep_token_id": SEP,
    "mask_token_id": MASK, "mask_index": MASK, "pad_index": PAD,
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {
    "reformer": {"axial_pos_embds_dim": [8, 8], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"],
                 "attention_head_size": 8, "is_decoder": False, "local_attn_chunk_length": 4},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 32, "n_head": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "flaubert": {"mask_index": MASK, "pad_index": PAD}, "xlm": {"mask_index": MASK, "pad_index": PAD},
}  # fmt: skip
LEFT_OUT = {  # of images as well as text, with networks for them that are not small by these sizes
    "modernvbert", "ultravbert",
}  # fmt: skip


class Tokenizer:
    """What `from_hf` asks of a tokenizer."""

    pad_token_id, cls_token_id, sep_token_id, mask_token_id = PAD, CLS, SEP, MASK
    eos_token_id = None
    all_special_ids = (PAD, CLS, SEP, MASK)

    def get_vocab(self) -> dict[str, int]:
        return {f"word {i}": i for i in range(WORDS)}


def tiny(kind: str) -> Any:
    """The model of that kind, with the sizes that its configuration knows set small."""
    cls = getattr(transformers, MODELS[kind])
    known = cls.config_class().to_dict()
    renamed = getattr(cls.config_class, "attribute_map", {})
    sizes = {name: value for name, value in SIZES.items() if name in known}
    sizes |= {renamed[name]: value for name, value in SIZES.items() if renamed.get(name) in known}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**sizes, **FURTHER.get(kind, {})})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(3)  # fresh ones say nearly the same of every token
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in LEFT_OUT])
def test_its_scores_are_those_of_its_plain_forward(kind: str) -> None:
    """At the masks alone, as the softmax over what may be drawn; and it infills, keeping what is given."""
    model = tiny(kind)
    length = 64 if kind in ("perceiver", "reformer") else 12  # these take one length
    x = torch.randint(6, WORDS, (2, length), generator=torch.Generator().manual_seed(0))
    x[:, 0], x[0, -3], x[0, -2:], x[1, -1] = CLS, SEP, PAD, SEP
    x[0, 3], x[1, 4:7] = MASK, MASK
    score, graph, _, options = from_hf(model, Tokenizer())
    assert graph.mask_id == MASK
    where, sigma = x == MASK, torch.tensor([0.5, 1.0])
    with torch.no_grad():
        takes = inspect.signature(model.forward).parameters
        mask = {"attention_mask": (x != PAD).long()} if "attention_mask" in takes else {}
        logits = model(input_ids=x, **mask).logits
        rows = score(x, sigma, where=where)
        logits[..., [PAD, CLS, SEP, MASK]] = -torch.inf
        expected = (logits.log_softmax(-1) - sigma.expm1().log()[:, None, None])[where]
        words = [i for i in range(WORDS) if i != MASK]
        torch.testing.assert_close(rows[:, words], expected[:, words], rtol=1e-4, atol=1e-4)
        assert float(expected[:, 6:].std()) > 1e-3  # it says something
        y = infill(score, graph, LogLinear(), x=x, given=~where, steps=4, seeds=[1, 2], **options)
    assert torch.equal(y[~where], x[~where])
    assert not torch.isin(y[where], torch.tensor([PAD, CLS, SEP, MASK])).any()
