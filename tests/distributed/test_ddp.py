"""What DistributedDataParallel alone has: static graphs, and a sign for each process."""

import pytest
from transformers import TrainingArguments

from tests.distributed.back_ends import assert_is
from tests.distributed.launch import launch
from tests.distributed.test_sharding import NSO, SIGMA, assert_equal

pytestmark = pytest.mark.distributed

ONE = {"per_device_train_batch_size": 4, "max_grad_norm": 0.5, "sigma": SIGMA}
CASES = {
    "static graph": {**NSO, **ONE, "ddp_static_graph": True},
    "static graph, sharpness": {**ONE, "ddp_static_graph": True, "log_sharpness": True},
    "counts": {**NSO, **ONE, "counts": True},
    "counts, plain": {**ONE, "plain": True, "counts": True},
    "alternate": {**ONE, "sign": "alternate"},
}


static_graphs = pytest.mark.skipif(
    "ddp_static_graph" not in TrainingArguments.__dataclass_fields__, reason="not an option yet"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(CASES, tmp_path_factory.mktemp("ddp"))


@static_graphs
def test_a_static_graph_is_reduced_in_each_pass(ranks):
    """It is recorded in its first backward pass, and has to be the same in each."""
    for rank in ranks:
        assert_is("ddp", rank["static graph"], processes=2)
        step, calls, _ = rank["static graph"]["counted"][-1]
        assert step == 2 and calls["allreduce"] == 5
    assert_equal(ranks, "static graph")


@static_graphs
def test_a_forward_pass_without_a_backward_pass_leaves_a_static_graph_as_it_is(ranks):
    for rank in ranks:
        assert_is("ddp", rank["static graph, sharpness"], processes=2)
    assert_equal(ranks, "static graph, sharpness", k=1, lam=0)


def test_buffers_are_those_of_the_first_process_in_every_step(ranks):
    """They are sent before the first pass of a step, not in it, or they would be put back."""
    assert [rank["counts, plain"]["counter"] for rank in ranks] == [3, 2 + 2]
    assert [rank["counts"]["counter"] for rank in ranks] == [3, 2 + 2]


def test_two_processes_take_the_two_signs(ranks):
    for rank in ranks:
        assert_is("ddp", rank["alternate"], processes=2)
    assert_equal(ranks, "alternate", k=1, lam=0, alternate_micro_batches=2)


def test_one_process_is_not_taken_for_two(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process: the worker would say so."""
    (result,) = launch({"one": {**NSO, **ONE, "max_steps": 1}}, tmp_path, processes=1)
    assert result["one"]["world_size"] == 1
