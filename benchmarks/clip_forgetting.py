"""What fine-tuning forgets, and what weights between keep of it: the picture in docs/clip.md.

    python -m benchmarks.clip_forgetting FOLDER

A tiny CLIP learns the digits 0 to 4 of scikit-learn's with captions, then 5 to 9, plainly, by the
recipe of CLIP and options that anyone can give it (printed). FOLDER/new/wise_ft.png is the picture;
FOLDER/new/results.json has the figures. Two minutes on a core.
"""

import argparse
import json
import shlex
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from recipes.clip_pretraining import main as pretrain

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OLD, NEW = range(5), range(5, 10)
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
OPTIONS = {
    "sigma": 0,
    "learning_rate": 1e-3,
    "warmup_steps": 10,
    "per_device_train_batch_size": 64,
    "templates": "name",
    "report_to": "none",
    "save_strategy": "no",
    "seed": 0,
}


def write_data(folder: Path) -> None:
    """Of each digit two images of four to train on, one to choose options by and one to test on; as
    folder/old-train.jsonl."""
    digits, counts = load_digits(), dict.fromkeys(range(10), 0)
    lines: dict[str, list[str]] = {}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = f"images/{number}.png"
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(folder / file)
        counts[digit] += 1
        part = ("test", "validation", "train", "train")[counts[digit] % 4]
        row = {"image": file, "text": NAMES[digit], "label": NAMES[digit]}
        name = f"{'old' if digit in OLD else 'new'}-{part}.jsonl"
        lines.setdefault(name, []).append(json.dumps(row))
    for name, rows in lines.items():
        (folder / name).write_text("\n".join(rows) + "\n")
    (folder / "tiny.json").write_text(json.dumps(MODEL))


def run(*words: object, **options: object) -> None:
    flags = [w for name, value in (OPTIONS | options).items() for w in (f"--{name}", value)]
    command = [str(word) for word in (*flags, *words)]
    print("nso clip", shlex.join(command), flush=True)
    pretrain(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the data and the two runs")
    parser.add_argument("--epochs", type=int, nargs=2, default=[20, 6], help="of the two")
    given = parser.parse_args()
    folder, (first, second) = given.folder, given.epochs
    write_data(folder)
    run(
        model=folder / "tiny.json",
        train_data=folder / "old-train.jsonl",
        zero_shot_data=folder / "old-test.jsonl",
        num_train_epochs=first,
        output_dir=folder / "old",
    )
    run(
        *("--eval_also", f"0 to 4={folder}/old-test.jsonl"),
        *("--wise_ft", *(alpha / 10 for alpha in range(11))),
        model=f"local-dir:{folder}/old",
        train_data=folder / "new-train.jsonl",
        zero_shot_data=folder / "new-test.jsonl",
        num_train_epochs=second,
        output_dir=folder / "new",
    )


if __name__ == "__main__":
    main()
