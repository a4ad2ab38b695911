"""Weights between the first and the last on two processes, however they hold them."""

import pytest
import torch

from tests.distributed.launch import torchrun
from tests.distributed.test_mae import NAMES
from tests.older import IS_VERSION_4
from tests.tasks.clip.reference import image_rows, tiny_clip

pytestmark = pytest.mark.distributed

CELLS = [pytest.param(n, marks=[] if n == "ddp" else [pytest.mark.slow]) for n in NAMES]


@pytest.mark.parametrize("back_end", CELLS)
def test_weights_between_on_two_processes(tmp_path, back_end):
    if IS_VERSION_4 and back_end == "fsdp2":
        pytest.skip("PyTorch 2.8 ends with SIGSEGV there, on CPUs")
    torchrun(["-m", "tests.distributed.wise_ft_worker", str(tmp_path), back_end], timeout=180)
    found, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert found["backend"] == NAMES[back_end]
    clip = tiny_clip()
    start = {name: p.detach().clone() for name, p in clip.model.named_parameters()}
    end = found["end"]
    assert any(not torch.equal(start[name], end[name]) for name in end)
    images = torch.stack([clip.eval_transform(row["image"]) for row in image_rows(11)])
    for alpha, (weights, features) in found["between"].items():
        for name, parameter in clip.model.named_parameters():
            expected = torch.lerp(start[name], end[name], alpha)
            assert torch.equal(weights[name], expected), (alpha, name)
            parameter.data.copy_(expected)
        assert torch.equal(features, second["between"][alpha][1])
        with torch.no_grad():
            expected = clip.model.eval().encode_image(images, normalize=True)
        # Of length 1, in float32, from other batches; a step moves them by more than 1e-3.
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    ends = [found["between"][alpha][1] for alpha in (0.0, 1.0)]
    assert (ends[0] - ends[1]).abs().max() > 1e-3
    assert all(torch.equal(found["afterwards"][name], end[name]) for name in end)
    assert torch.equal(found["features"], ends[1])
