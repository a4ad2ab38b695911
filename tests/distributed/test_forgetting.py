"""Further data on two processes: measured as by one."""

import json

import pytest
from transformers import LlamaForCausalLM

from tests.distributed.forgetting_worker import measured
from tests.distributed.launch import torchrun
from tests.distributed.test_mae import NAMES
from tests.older import IS_VERSION_4
from tests.tiny_models import save_model

pytestmark = pytest.mark.distributed

CELLS = [pytest.param(n, marks=[] if n == "ddp" else [pytest.mark.slow]) for n in NAMES]


@pytest.mark.parametrize("back_end", CELLS)
def test_two_processes_measure_as_one(tmp_path, back_end):
    if IS_VERSION_4 and back_end == "fsdp2":
        pytest.skip("PyTorch 2.8 ends with SIGSEGV there, on CPUs")
    model = save_model("llama", tmp_path / "model")
    # Seven pieces, of which five are drawn: no process has as many as the other.
    (tmp_path / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 6)
    worker = ["-m", "tests.distributed.forgetting_worker", str(tmp_path), back_end]
    torchrun(worker, timeout=180)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first == second and first.pop("backend") == NAMES[back_end]
    one, _ = measured(tmp_path, LlamaForCausalLM.from_pretrained(model), {}, 4)
    prose, expected = (found["forgetting"].pop("prose") for found in (first, one))
    for when in ("before", "after"):
        for figure in ("loss", "stderr"):
            # A loss of 5.6 in float32, by weights that two steps have moved apart by roundings.
            assert prose[when][figure] == pytest.approx(expected[when][figure], abs=1e-5), when
    assert abs(expected["change"]) > 1e-2  # else nothing was compared
    assert prose["change"] == pytest.approx(expected["change"], abs=1e-5)
    assert first["also_test"] == one["also_test"]
    assert first["before"] == one["before"] and first["after"] == one["after"]
    # Four rows of as many tokens: the mean over batches is that over rows.
    assert first["validation"] == pytest.approx(one["validation"], abs=1e-5)
