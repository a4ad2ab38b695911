"""`nso sigma` on checkpoints of tiny models."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GPT2LMHeadModel

from nso_hf.curvature import find_sigma, hessian_trace
from nso_hf.curvature.data_options import data_of
from nso_hf.curvature.suggest import main, parser
from tests.reference import DEVICE
from tests.tiny_models import save_model


@pytest.fixture
def checkpoints(tmp_path):
    """A GPT-2 that has learned some sums, and the same with larger weights."""
    first = save_model("gpt2", tmp_path / "first")
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [str(first), str(tmp_path / "second")]
    model = GPT2LMHeadModel.from_pretrained(first)
    options = parser().parse_args([paths[0], "--data", str(tmp_path / "rows.jsonl")])
    batches = data_of(options, paths[0], num_batches=2).sample(model).batches
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(paths[0])
    for parameter in model.transformer.h.parameters():
        parameter.data *= 1.1
    model.save_pretrained(paths[1])
    AutoTokenizer.from_pretrained(first).save_pretrained(paths[1])
    return paths, str(tmp_path / "rows.jsonl"), batches


@pytest.mark.parametrize("sigma_scale", ["absolute", "relative"])
def test_a_suggestion_for_each_checkpoint(checkpoints, tmp_path, capsys, sigma_scale):
    paths, data, batches = checkpoints
    out = tmp_path / "out"
    flags = ["--num_samples", "6", "--num_batches", "2", "--trace_samples", "4"]
    flags += ["--sigma_scale", sigma_scale, "--rise", "0.2"]
    main([*paths, "--data", data, "--output", str(out), *flags])
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["checkpoints"]
    assert list(results) == paths
    assert Image.open(out / "sigma.png").size > (300, 200)
    for path, figures in results.items():
        model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).to(DEVICE)
        on_device = [{k: v.to(DEVICE) for k, v in batch.items()} for batch in batches]
        shared = {"sigma_scale": sigma_scale}
        found = find_sigma(model, on_device, rise=0.2, num_samples=6, **shared)
        assert figures["sigma"] == pytest.approx(found.sigma, rel=1e-4)
        trace = hessian_trace(model, on_device, num_samples=4, **shared)
        assert figures["trace"]["estimate"] == pytest.approx(trace.estimate, rel=1e-3)
        sigmas = [point["sigma"] for point in figures["curve"]]
        assert sigmas == sorted(sigmas) and sigmas[0] == pytest.approx(found.sigma / 8, rel=1e-4)
        scale = f', sigma_scale="{sigma_scale}"' if sigma_scale == "relative" else ""
        assert f"{path}: NSOConfig(..., sigma={found.sigma:.2g}{scale})" in printed


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["--rise", "0"], "rise=0.0: must be a finite number, at least 1e-05"),
        (["--num_samples", "0"], "num_samples=0: must be an integer, at least 1"),
        (["--trace_samples", "-1"], "trace_samples=-1: must be an integer, at least 0"),
    ],
)
def test_refusals_come_first(checkpoints, tmp_path, flags, refused):
    paths, data, _ = checkpoints
    with pytest.raises(ValueError, match=refused):
        main([paths[0], "--data", data, "--output", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
