"""Pairs from every kind of source, and the order and completeness of what is made of them."""

import csv
import io
import json
import random
import tarfile
from collections import Counter
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.shards import Shards
from nso_hf.tasks.clip.sources import open_pairs
from nso_hf.tasks.clip.stream import EvaluationStream, PairStream
from nso_hf.tasks.clip.table import Table
from nso_hf.tasks.images.reading import read_image
from tests.tasks.clip.reference import tokenize


def png(number: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    colour = (number % 256, number // 256, 77)
    Image.new("RGB", (size, size), colour).save(file, format="PNG")
    return file.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def shards(folder: Path, counts: list[int]) -> str:
    """Shards of so many good pairs each; the number of a pair is its image's colour."""
    number = 0
    for shard, count in enumerate(counts):
        samples = {}
        for _ in range(count):
            label = json.dumps({"kind": "even" if number % 2 == 0 else "odd"}).encode()
            files = {"png": png(number), "txt": f"pair {number}".encode(), "json": label}
            samples[f"{number:05d}"] = files
            number += 1
        write_shard(folder / f"s-{shard:03d}.tar", samples)
    return f"{folder}/s-{{000..{len(counts) - 1:03d}}}.tar"


def table(rows: int) -> Table:
    data = [{"image": png(n), "caption": f"pair {n}", "label": n % 3} for n in range(rows)]
    return Table("table", data, Fields("image", "caption", "label"), None)


def stream(pairs, **options):
    options = {"batch_size": 4, "seed": 5, **options}
    return PairStream(pairs, pil_to_tensor, tokenize, **options)


def flat(lists):
    return list(chain.from_iterable(lists))


def numbers(batch):
    """Of the pairs in a batch, from their colours."""
    pixels = batch["image"][:, :, 0, 0].long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def batches(pairs, epoch=0, workers=0, **options):
    made = stream(pairs, **options)
    made.set_epoch(epoch)
    return [numbers(b) for b in DataLoader(made, batch_size=4, num_workers=workers)]


def test_every_pair_of_a_table_once_an_epoch_in_another_order():
    first, again, second = (batches(table(20), epoch) for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(flat(first)) == list(range(20))
    assert batches(table(20), seed=6) != first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_table_gives_the_same_global_batches_to_any_number_of_readers(processes, workers):
    def read(workers, **share):
        size = 8 // share.get("processes", 1)
        made = stream(table(43), batch_size=size, **share)
        return [numbers(b) for b in DataLoader(made, batch_size=size, num_workers=workers)]

    whole = read(0)
    assert len(whole) == 5
    parts = [read(workers, process=p, processes=processes) for p in range(processes)]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("counts", "processes"), [([10] * 8, 1), ([10] * 8, 2), ([40, 40], 2)])
def test_shards_are_dealt_whole_and_read_once(tmp_path, counts, processes, workers):
    pairs = open_pairs(shards(tmp_path, counts), Fields())
    assert len(pairs) == 80
    options = [{"process": p, "processes": processes} for p in range(processes)]
    epochs = [flat(flat(batches(pairs, e, workers, **o) for o in options)) for e in (0, 1)]
    for seen in epochs:
        assert sorted(seen) == list(range(80))
    assert epochs[0] != epochs[1]
    again = flat(flat(batches(pairs, 0, workers, **o) for o in options))
    assert again == epochs[0]


@pytest.mark.parametrize(("counts", "readers"), [([48], 4), ([20, 20, 8], 2), ([16], 3)])
def test_few_shards_give_each_pair_once_however_many_readers(tmp_path, counts, readers):
    pairs = open_pairs(shards(tmp_path, counts), Fields())
    seen = flat(batches(pairs, workers=readers))
    assert sorted(seen) == list(range(sum(counts)))


@pytest.mark.parametrize("workers", [0, 2])
def test_fewer_shards_than_readers(tmp_path, workers):
    pairs = open_pairs(shards(tmp_path, [48]), Fields())
    seen = [batches(pairs, 0, workers, process=p, processes=2) for p in (0, 1)]
    assert [len(part) for part in seen] == [6, 6]
    assert sorted(flat(flat(seen))) == list(range(48))


def test_an_epoch_is_a_whole_number_of_optimizer_steps():
    assert len(stream(table(43), micro_batches=3)) == 36
    assert len(batches(table(43), micro_batches=3)) == 9


def test_augmentation_is_a_function_of_seed_epoch_and_pair():
    def noisy(image):
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])

    def augmented(epoch, workers=0, seed=5):
        made = PairStream(table(8), noisy, tokenize, batch_size=4, seed=seed)
        made.set_epoch(epoch)
        rows = [b["image"] for b in DataLoader(made, batch_size=4, num_workers=workers)]
        return torch.cat(rows)

    torch.manual_seed(1)
    first, state = augmented(0), torch.get_rng_state()
    assert torch.equal(first, augmented(0)) and torch.equal(first, augmented(0, workers=2))
    assert not torch.equal(first, augmented(1)) and not torch.equal(first, augmented(0, seed=6))
    assert len(first.flatten().unique()) == first.numel()
    torch.manual_seed(1)
    torch.rand(())  # DataLoader draws a seed for its workers; the stream draws nothing
    torch.manual_seed(1)
    list(DataLoader(stream(table(8)), batch_size=4))
    assert torch.equal(state, torch.get_rng_state())


BROKEN = {
    "bad image": {"png": b"not an image", "txt": b"a"},
    "cut image": {"png": png(3)[:45], "txt": b"b"},
    "no image": {"txt": b"c"},
    "no caption": {"png": png(5)},
    "empty caption": {"png": png(6), "txt": b"  \n"},
}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_used_is_skipped_and_counted(tmp_path, workers):
    urls = shards(tmp_path, [10, 10])
    write_shard(tmp_path / "s-002.tar", BROKEN)
    (tmp_path / "s-003.tar").write_bytes((tmp_path / "s-000.tar").read_bytes()[:9000])
    urls = urls.replace("001}", "003}")
    pairs = open_pairs(urls, Fields(), num_pairs=20)
    whole = (9000 - 512) // (3 * 1024)  # a header and one block for each file
    seen = Counter(flat(batches(pairs, workers=workers)))
    assert len(pairs) == 20 and sum(seen.values()) == 20 and set(seen) <= set(range(20))
    counts = Counter()
    pairs.skipped.reset()
    for pair in EvaluationStream(pairs, pil_to_tensor, tokenize, round_size=4):
        counts.update(numbers(pair) if pair["index"] else [])
    assert set(counts) == set(range(20))
    assert pairs.skipped.counts == {
        "unreadable images": 2,
        "missing images": 1,
        "missing captions": 2 + (1 if sum(counts.values()) == 20 + whole - 1 else 0),
        "broken shards": 1,
    }


def test_a_pass_without_one_usable_pair_ends_in_an_error(tmp_path):
    write_shard(tmp_path / "s.tar", BROKEN)
    pairs = open_pairs(str(tmp_path / "s.tar"), Fields())
    assert len(pairs) == 5
    message = r"data=.*nothing of it could be used \(skipped: .*2 missing captions"
    with pytest.raises(ValueError, match=message):
        batches(pairs)


def test_skipped_pairs_make_room_for_others():
    """Every process yields the same number, whatever it had to skip."""
    rows = [{"image": png(n) if n % 4 else b"", "caption": f"pair {n}"} for n in range(40)]
    pairs = Table("table", rows, Fields("image", "caption"), None)
    seen = [batches(pairs, process=p, processes=2) for p in (0, 1)]
    assert [len(part) for part in seen] == [5, 5]
    assert all(number % 4 for part in seen for batch in part for number in batch)
    assert pairs.skipped.counts["unreadable images"] >= 8


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_rounds_cover_everything_once_and_are_as_many_for_all(processes, workers):
    parts = []
    for process in range(processes):
        made = EvaluationStream(
            table(23),
            pil_to_tensor,
            None,
            round_size=4,
            process=process,
            processes=processes,
            needs="label",
        )
        parts.append(list(DataLoader(made, batch_size=None, num_workers=workers)))
    assert len({len(part) for part in parts}) == 1
    found = sorted(index for part in parts for batch in part for index in batch["index"])
    assert found == list(range(23))
    for part in parts:
        for batch in part:
            if batch["index"]:
                assert numbers(batch) == batch["index"]


def test_a_shard_cut_between_its_files_is_broken_too(tmp_path):
    urls = shards(tmp_path, [6])
    path = tmp_path / "s-000.tar"
    path.write_bytes(path.read_bytes()[: 3 * 3 * 1024])  # three pairs of three files
    pairs = open_pairs(urls, Fields())
    made = EvaluationStream(pairs, pil_to_tensor, tokenize, round_size=4)
    for workers in (0, 2):
        pairs.skipped.reset()
        found = [numbers(b) for b in DataLoader(made, batch_size=None, num_workers=workers)]
        assert found == [[0, 1, 2]]
        assert pairs.skipped.counts == {"broken shards": 1}


def test_sizes_beside_the_shards_are_believed(tmp_path):
    urls = shards(tmp_path, [3, 4])
    assert len(open_pairs(urls, Fields())) == 7
    (tmp_path / "__len__").write_text("70")
    assert len(open_pairs(urls, Fields())) == 70
    (tmp_path / "sizes.json").write_text(json.dumps({"s-000.tar": 30, "s-001.tar": 40, "x": 1}))
    assert len(open_pairs(str(tmp_path), Fields())) == 70
    assert len(open_pairs(urls, Fields(), num_pairs=5)) == 5


def test_labels_of_shards_come_from_their_json_files(tmp_path):
    pairs = open_pairs(shards(tmp_path, [3]), Fields(label="kind", caption="kind"))
    assert pairs.labels() == ["even", "odd", "even"]
    assert [pair.caption for pair in pairs] == ["even", "odd", "even"]
    assert isinstance(pairs, Shards)


def test_csv_files_as_open_clip_reads_them(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        writer.writerows([["0.png", "zero"], ["1.png", ""], [tmp_path / "2.png", "two"]])
        writer.writerow(["gone.png", "none"])
    pairs = open_pairs(str(tmp_path / "pairs.csv"), Fields())
    found = list(pairs)
    assert [pair.caption for pair in found] == ["zero", "", "two", "none"]
    assert found[0].image_key == str(tmp_path / "0.png")
    assert read_image(found[2].image).getpixel((0, 0)) == (2, 0, 77)
    made = EvaluationStream(pairs, pil_to_tensor, tokenize, round_size=9)
    assert [numbers(batch) for batch in made] == [[0, 2]]
    assert pairs.skipped.counts == {"missing captions": 1, "unreadable images": 1}
    literal = tmp_path / "literal.tsv"
    literal.write_text("filepath\ttitle\tkind\n0.png\tnull\t000\n2.png\t1.0\tNA\n")
    read = open_pairs(str(literal), Fields(label="kind"))
    assert [(pair.caption, pair.label) for pair in read] == [("null", "000"), ("1.0", "NA")]
    renamed = open_pairs(str(tmp_path / "pairs.csv"), Fields(caption="filepath", image="filepath"))
    assert next(iter(renamed)).caption == "0.png"
    with pytest.raises(ValueError, match=r"caption_column='nothing': not in .* has filepath, "):
        open_pairs(str(tmp_path / "pairs.csv"), Fields(caption="nothing"))


def test_folders_of_images(tmp_path):
    for n, kind in enumerate(["cat", "dog", "cat"]):
        (tmp_path / "kinds" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "kinds" / kind / f"{n}.png").write_bytes(png(n))
    labelled = open_pairs(str(tmp_path / "kinds"), Fields(label="label"), split="test")
    assert sorted(map(str, labelled.labels())) == ["cat", "cat", "dog"]
    assert all(pair.caption is None for pair in labelled)


def reads_metadata():
    """Before 4.6, datasets does not take texts for texts if pandas 3 has read them."""
    return Version(version("datasets")) >= Version("4.6") or version("pandas").startswith("2.")


@pytest.mark.skipif(not reads_metadata(), reason="datasets < 4.6 needs pandas < 3")
def test_folders_of_images_with_captions(tmp_path):
    captioned = tmp_path / "captioned" / "train"
    captioned.mkdir(parents=True)
    for n in range(3):
        (captioned / f"{n}.png").write_bytes(png(n))
    lines = "file_name,text\n" + "".join(f"{n}.png,pair {n}\n" for n in range(3))
    (captioned / "metadata.csv").write_text(lines)
    pairs = open_pairs(str(tmp_path / "captioned"), Fields())
    assert sorted(str(pair.caption) for pair in pairs) == ["pair 0", "pair 1", "pair 2"]


def test_saved_datasets(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["even", "odd"]),
        }
    )
    rows = [
        {"image": {"bytes": png(n), "path": None}, "text": f"pair {n}", "label": n % 2}
        for n in range(3)
    ]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    pairs = open_pairs(str(tmp_path / "saved"), Fields(label="label"))
    assert pairs.labels() == ["even", "odd", "even"]
    assert read_image(next(iter(pairs)).image).getpixel((0, 0)) == (0, 0, 77)


def test_what_does_not_exist_is_refused_when_it_is_opened(tmp_path):
    urls = shards(tmp_path, [2, 2]).replace("001}", "004}")
    with pytest.raises(ValueError, match=r"shard .*s-002.tar does not exist \(5 named\)"):
        open_pairs(urls, Fields())
    with pytest.raises(ValueError, match="data='/nowhere': no such file or folder"):
        open_pairs("/nowhere", Fields())
    with pytest.raises(ValueError, match=r"data='gone.csv': no such file"):
        open_pairs("gone.csv", Fields())
    with pytest.raises(ValueError, match="how many pairs remote shards hold is unknown"):
        stream(open_pairs("https://example.org/{00..10}.tar", Fields()))
    with pytest.raises(
        ValueError, match="has 3 pairs, fewer than the batch of an optimizer step, 4 x 1 x 1"
    ):
        stream(table(3))
