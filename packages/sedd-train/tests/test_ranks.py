"""Any launcher, any ZeRO stage, one rank, two or four: the same training run: the tiny recipe's own first steps.

With dropout, to see that this too is a sample's own, whichever rank runs it. AdamW divides a gradient by its size:
where that is a rounding error, so is the step's sign, and weights would part by whole steps. A larger epsilon keeps
such gradients small, so that weights can be compared as closely as losses.
"""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

TINY = (
    *("--recipe", "tiny", "--steps", "20", "--warmup", "4", "--log-every", "1", "--dropout", "0.1", "--eps", "1e-4"),
    *("--evaluate-blocks", "2", "--evaluate-times", "2"),
    *("--sample-steps", "2"),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return tmp_path_factory.mktemp("alone") / "run"


@pytest.fixture
def undisturbed(alone, train, losses):
    """The losses of one process under plain python."""
    if not alone.exists():
        train(alone, base=TINY)
    return losses(alone)


@pytest.mark.parametrize(
    ("launcher", "stage", "ranks"),
    [("deepspeed", 1, 2), ("deepspeed", 2, 2), ("deepspeed", 3, 2), ("torchrun", 1, 4)],
    ids=str,
)
def test_many_ranks_train_as_one_process_does(launcher, stage, ranks, undisturbed, alone, train, losses, tmp_path):
    printed = train(tmp_path / "run", "--zero-stage", stage, base=TINY, launcher=launcher, ranks=ranks)
    assert f"on {ranks} x cpu, ZeRO {stage}" in printed
    found = losses(tmp_path / "run")
    assert found.keys() == undisturbed.keys() == set(range(1, 21))
    for step, (loss, norm, lr) in undisturbed.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5), step
        assert found[step][1] == pytest.approx(norm, rel=1e-3), step
        assert found[step][2] == lr
    one, many = (safetensors.torch.load_file(run / "export" / "model.safetensors") for run in (alone, tmp_path / "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=0, atol=1e-5)
    assert one["output_layer.linear.weight"].abs().max() > 1e-3  # where it began at 0: they did train
