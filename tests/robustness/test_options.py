"""`--robustness` on every back end: refused before training where processes share the weights."""

import json

import pytest
from accelerate.utils import DistributedType
from torch import nn

from nso_hf.backends import select
from nso_hf.robustness.options import RobustnessOptions
from tests.distributed.back_ends import fsdp2
from tests.distributed.launch import torchrun
from tests.older import IS_VERSION_4
from tests.recipes.test_images_recipe import flags
from tests.refusals import accelerator

SHARDED = {
    "FSDP2": accelerator(DistributedType.FSDP),
    "DeepSpeed ZeRO-3": accelerator(DistributedType.DEEPSPEED, deepspeed={"stage": 3}),
}
WHOLE = {
    "DistributedDataParallel": accelerator(DistributedType.MULTI_CPU),
    "DeepSpeed ZeRO-2": accelerator(DistributedType.DEEPSPEED),
}


@pytest.mark.parametrize("name", SHARDED | WHOLE)
def test_a_back_end_that_shards_the_weights_is_refused(name):
    backend = select((SHARDED | WHOLE)[name], nn.Linear(2, 2))
    assert backend.name == name
    RobustnessOptions().check(backend)
    asked = RobustnessOptions(robustness=True)
    if name in WHOLE:
        asked.check(backend)
        return
    message = f"robustness=True: {name} shards the weights. Leave it out, and measure the trained"
    with pytest.raises(ValueError, match=message):
        asked.check(backend)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(IS_VERSION_4, reason="PyTorch 2.8 ends with SIGSEGV there, on CPUs")
def test_a_recipe_refuses_it_before_training(tmp_path):
    config = tmp_path / "fsdp.json"
    settings = fsdp2(transformer_layer_cls_to_wrap=["ViTLayer"])["fsdp_config"]
    config.write_text(json.dumps(settings))
    options = {"fsdp": "auto_wrap", "fsdp_config": config, "robustness": "true", "max_steps": 1}
    with pytest.raises(AssertionError, match="robustness=True: FSDP2 shards the weights"):
        torchrun(["-m", "tests.distributed.images_worker", *flags(tmp_path, **options)])
    assert not (tmp_path / "results.json").exists()
