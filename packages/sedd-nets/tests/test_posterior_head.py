"""What RADD and MDLM hand to a loss that joins head and cross-entropy."""

from __future__ import annotations

import pytest
import torch
from sedd_nets import MDLM, RADD


@pytest.mark.parametrize("kind", [RADD, MDLM])
def test_the_posterior_is_the_softmax_of_a_linear_head_over_the_tokens(kind):
    torch.manual_seed(0)
    net = kind(6, width=16, depth=1, heads=2, length=4, dropout=0.0, mask_id=2).double().eval()
    for parameter in net.output_layer.linear.parameters():
        torch.nn.init.normal_(parameter)
    x, sigma = torch.randint(6, (2, 4)), torch.tensor([0.3, 1.0])
    head = net.posterior_head()
    assert head.bias is not None
    logits = net.hidden(x, sigma) @ head.weight.T + head.bias
    logits[..., 2] = -torch.inf
    torch.testing.assert_close(logits.log_softmax(-1), net.log_conditional(x, sigma))
