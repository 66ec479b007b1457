"""Block diffusion (Arriola et al., ICLR 2025, arXiv 2503.09573): blocks from left to right, masks within a block.

The text is cut into blocks of S positions, p(x) = prod_b p(x^b | x^<b), and each factor is an absorbing diffusion whose
network sees the noised block x_t^b and the clean blocks before it. One pass computes all factors where a clean copy x0
of the text stands beside the noised one, (x_t, x0), both with the positions 0 .. L - 1, and a query sees

    noised block b:    noised block b, clean blocks before b
    clean block b:     clean blocks up to b

Where only one block holds masks and those before it are clean, the copy adds nothing: a query then sees its own block
and those before it in x itself. That is how text is sampled, a block at a time. What a finished block knows does not
change any more: its keys and values may be kept (`sedd_nets.caching`), and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_nets.attention import sdpa
from sedd_nets.caching import CachedAttention, KeyValueCache
from sedd_nets.checks import check_sizes, check_states, on_host, over_last_axis
from sedd_nets.config import boolean, integer, section
from sedd_nets.documents import Documents
from sedd_nets.families import ConditionalTransformer, mask_of
from sedd_nets.fast.dropout import check_seeds
from sedd_nets.pretrained import sizes_of

__all__ = ["BD3LM", "block_causal", "noised_beside_clean"]


class BD3LM(ConditionalTransformer):
    """MDLM's network of one block given those before it; its trunk does not see the noise level.

    A score model `(x, sigma)` for states of which one block at most holds masks: those before it are its context, those
    behind it are not seen. Sampling goes on block by block. With `clean`, the score of every block at once, for losses
    and bounds: `functools.partial(net, clean=x0)` is a score model for noised versions of x0.

    Args:
        num_states: N, the mask state included.
        width: D.
        depth: the number of blocks of the trunk.
        heads: the attention heads of each.
        block_size: S, the positions of a block of text.
        cond_dim: width of the embedding of sigma, which is always that of 0.
        dropout: on the output of attention and MLP, in training mode.
        length: the longest sequence accepted.
        mask_id: the mask state; the last one unless given.

    Raises:
        ValueError: a size is not positive, heads do not divide the width, dropout is no probability, or the mask is
            no state.
    """

    key_prefix: ClassVar[str] = "backbone."

    def __init__(
        self,
        num_states: int,
        *,
        width: int,
        depth: int,
        heads: int,
        block_size: int,
        cond_dim: int = 128,
        dropout: float = 0.1,
        length: int = 1024,
        mask_id: int | None = None,
    ) -> None:
        check_sizes(block_size=block_size)
        super().__init__(
            num_states,
            width=width,
            depth=depth,
            heads=heads,
            cond_dim=cond_dim,
            dropout=dropout,
            length=length,
            mask_id=mask_id,
        )
        self.block_size = block_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_states: int) -> BD3LM:
        """A network of the sizes in a nested config. Raises ValueError for a wrong value or another variant."""
        model = section(config, "model")
        for name, known in (("cross_attn", True), ("adaln", True), ("time_conditioning", False)):
            if boolean(model, name, default=known) is not known:
                raise ValueError(f"config.json: {name} is {not known}, and BD3LM is read with {name} {known} only")
        block_size = integer(model, "block_size")
        return cls(
            num_states, **sizes_of(config, "cond_dim"), block_size=block_size, mask_id=mask_of(config, num_states)
        )

    @classmethod
    def own_keys(cls, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As for the others, without the two noise levels between which upstream's training draws."""
        drawn_from = ("sampling_eps_min", "sampling_eps_max")
        return {key: value for key, value in super().own_keys(stored).items() if key not in drawn_from}

    def model_section(self) -> dict[str, Any]:
        """The sizes, named as in the published config.json."""
        return {
            "type": "bd3lm",
            "hidden_size": self.width,
            "cond_dim": self.cond_dim,
            "length": self.length,
            "n_blocks": self.depth,
            "n_heads": self.heads,
            "dropout": self.dropout,
            "block_size": self.block_size,
            "cross_attn": True,
            "adaln": True,
            "time_conditioning": False,
        }

    def hidden(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        clean: Tensor | None = None,
        condition: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seeds: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """What enters the head.

        Args:
            x: (B, L) int64 states.
            sigma: (B,) or (B, L) total noise.
            clean: (B, L) int64, the text of which x is a noised version; None: x has masks in one block at most.
            condition: as for the other networks.
            documents: None; a text is one row.
            dropout_seeds: as for the other networks.
            cache: keys and values of the finished blocks before x, to which x's are added: x begins with a block, and
                the answer is the same as about the whole text.

        Returns:
            (B, L, D), after the final norm.

        Raises:
            ValueError: as for the other networks; or clean is no (B, L) int64, masks stand in several blocks and there
                is no clean, documents are given, `attention` was replaced, or a cache is given with clean or ends
                within a block.
            IndexError: a state is out of range.
        """
        past = self.known(cache, documents)
        if past % self.block_size or (cache is not None and clean is not None):
            raise ValueError(
                f"a cache holds whole blocks of {self.block_size} positions, and no clean copy stands beside them; it "
                f"holds {past} positions"
            )
        check_states(x, past + x.shape[-1], self.length)
        if documents is not None or self.attention is not sdpa:
            raise ValueError("BD3LM attends by blocks of one text: it takes no documents and no other `attention`")
        if clean is not None and (clean.shape != x.shape or clean.dtype != torch.int64):
            raise ValueError(f"clean must be {tuple(x.shape)} int64, as x; got {clean.dtype} {tuple(clean.shape)}")
        if dropout_seeds is not None:
            check_seeds(dropout_seeds, x)
        if clean is None:
            self._check_one_block(x)
        over_last_axis(sigma, x)
        c = self.conditioning(x, torch.zeros(len(x), dtype=sigma.dtype, device=x.device), condition)
        cos, sin = (a[past:] for a in self.rotary_emb(past + x.shape[1]))
        if clean is None:
            tokens, mask = x, self.sees(past, x)
        else:
            tokens, mask = torch.cat([x, clean], 1), noised_beside_clean(x.shape[1], self.block_size, x.device)
            cos, sin = torch.cat([cos, cos]), torch.cat([sin, sin])
        attend = partial(_attend, mask=mask) if cache is None else CachedAttention(cache, mask)
        h = self.through_blocks(self.vocab_embed(tokens), c, cos, sin, attend, None, dropout_seeds)
        out: Tensor = self.output_layer(h[:, : x.shape[1]], c)
        return out

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        where: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        clean: Tensor | None = None,
        condition: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seeds: Tensor | None = None,
        cache: KeyValueCache | None = None,
        apart: bool = False,
    ) -> Tensor:
        """The log-score, as for the other networks; `clean` and `cache` as for `hidden`."""
        given = {"condition": condition, "documents": documents, "dropout_seeds": dropout_seeds}
        return self.scores(self.rows(x, sigma, where, positions, clean=clean, cache=cache, **given), apart)

    def sees(self, past: int, x: Tensor) -> Tensor:
        """Each position its block and those before it, (L, past + L) bool."""
        return block_causal(past + x.shape[1], self.block_size, x.device)[past:]

    def _check_one_block(self, x: Tensor) -> None:
        """Raise ValueError where masks stand in several blocks of a row (on an accelerator, the device's assertion)."""
        if torch.compiler.is_compiling() or x.is_meta or x.numel() == 0:
            return
        place = torch.arange(x.shape[1], device=x.device) // self.block_size
        masked = x == self.mask_id
        first = torch.where(masked, place, x.shape[1]).amin(1)
        last = torch.where(masked, place, -1).amax(1)
        told = (
            f"masks in several blocks of {self.block_size} positions: BD3LM knows a block given clean ones before it. "
            "Sample block by block, or give clean="
        )
        if not on_host(x):
            torch._assert_async((last <= first).all(), told)
        elif bool((last > first).any()):
            raise ValueError(told)


def block_causal(length: int, size: int, device: torch.device) -> Tensor:
    """Whether position l sees position m, (L, L) bool: m's block is l's or one before it."""
    block = torch.arange(length, device=device) // size
    return block[:, None] >= block


def noised_beside_clean(length: int, size: int, device: torch.device) -> Tensor:
    """The same for (x_t, x0), (2L, 2L) bool; see the module's table."""
    block = torch.arange(length, device=device) // size
    own, before, until = (block[:, None] == block), (block[:, None] > block), (block[:, None] >= block)
    return torch.cat([torch.cat([own, before], 1), torch.cat([torch.zeros_like(own), until], 1)])


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, *, mask: Tensor) -> Tensor:
    """Attention (B, L, H, d) under a mask (L, L)."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
