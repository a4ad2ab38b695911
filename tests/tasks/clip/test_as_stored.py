"""Captions, labels and images come out as they were stored, or are left out with a count."""

import io
import json
import tarfile
import warnings
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps

from nso_hf.tasks.clip.pairs import Fields
from nso_hf.tasks.clip.shards import Shards
from nso_hf.tasks.clip.sources import open_pairs
from nso_hf.tasks.clip.stream import usable
from nso_hf.tasks.images.reading import read_image
from tests.tasks.clip.test_pairs import png, write_shard


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def captions_of(folder, samples, fields=None):
    """Those that can be used, and the counts of what cannot."""
    write_shard(folder / "s.tar", {str(i): {"png": png(i), **s} for i, s in enumerate(samples)})
    pairs = Shards(str(folder / "s.tar"), fields or Fields())
    return [p.caption for p in pairs if usable(p, pairs)], pairs.skipped.counts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_of_shards_in_their_encodings(tmp_path, encoding):
    found, skipped = captions_of(tmp_path, [{"txt": "café 北京".encode(encoding)}])
    assert found == ["café 北京"] and skipped == {}


def test_captions_that_are_no_text_are_counted_apart_from_missing_ones(tmp_path):
    broken = [{"txt": "café".encode("latin-1")}, {"txt": "ab".encode("utf-16-le")}]
    found, skipped = captions_of(tmp_path, [*broken, {"txt": b"good"}, {"txt": b" "}])
    assert found == ["good"]
    assert skipped == {"unreadable captions": 2, "missing captions": 1}


@pytest.mark.parametrize(
    ("entry", "caption"),
    [
        ('["a", "b"]', None),
        ('{"en": "a"}', None),
        ('"\\ud83d"', None),
        ("5", "5"),
        ("0.50", "0.50"),
        ("12345678901234567890", "12345678901234567890"),
        ("true", "true"),
        ('"None"', "None"),
    ],
)
def test_captions_in_json_files_are_texts_or_as_they_are_written(tmp_path, entry, caption):
    files = {"json": b'{"caption": ' + entry.encode() + b"}"}
    found, skipped = captions_of(tmp_path, [files], Fields(caption="caption"))
    assert (found, skipped) == (([caption], {}) if caption else ([], {"unreadable captions": 1}))


@pytest.mark.parametrize("broken", [b"{", b'{"caption": "a', "é".encode("latin-1")])
def test_broken_json_files_of_shards(tmp_path, broken):
    found, skipped = captions_of(tmp_path, [{"json": broken}], Fields(caption="caption"))
    assert found == [] and skipped == {"unreadable captions": 1}


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["0.PNG", "0.TXT", "1.Png", "1.txt"], ["0", "1"]),
        (["./a/0.png", "./a/0.txt", "./b/0.png", "./b/0.txt"], ["./a/0", "./b/0"]),
        (["._0.png", "0.png", "._0.txt", "0.txt"], ["0"]),
    ],
)
def test_shards_as_archivers_name_their_files(tmp_path, names, keys):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in names:
            is_text = name.lower().endswith("txt")
            content = b"broken" if name.startswith("._") else b"a" if is_text else png(1)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pairs = Shards(str(tmp_path / "s.tar"), Fields())
    assert [p.key for p in pairs if usable(p, pairs)] == [f"s.tar/{key}" for key in keys]
    assert len(pairs) == len(keys) and pairs.skipped.counts == {}


WRITTEN = ["NA", "007", "1e5", "True", "12345678901234567890", "null", " a ", 'an 8" pizza, "b"']


def rows_of(kind, tmp_path):
    """A file of WRITTEN in which the label is the caption too."""
    import csv

    path = tmp_path / f"pairs.{kind}"
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerows([["", "image", "text", "label"]])
            writer.writerows([[i, f"{i}.png", t, t] for i, t in enumerate(WRITTEN)])
        return path
    rows = [{"image": f"{i}.png", "text": t, "label": t} for i, t in enumerate(WRITTEN)]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows)
        path.write_text(text, encoding="utf-16" if kind == "json" else "utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_tables_are_read_as_they_were_written(tmp_path, kind):
    pairs = open_pairs(str(rows_of(kind, tmp_path)), Fields("image", "text", "label"))
    assert [pair.caption for pair in pairs] == pairs.labels() == WRITTEN
    assert len(pairs) == len(WRITTEN)


def test_a_digest_is_of_captions_labels_and_images(tmp_path):
    path = rows_of("jsonl", tmp_path)
    fields = Fields("image", "text", "label")
    digest = open_pairs(str(path), fields).digest()
    assert open_pairs(str(path), fields).digest() == digest
    text = path.read_text(encoding="utf-8")
    for change in (text.replace("NA", "NB"), text.replace("0.png", "9.png"), text + "\n" + text):
        path.write_text(change, encoding="utf-8")
        assert open_pairs(str(path), fields).digest() != digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"filepath\ttitle\n1.png\ta\tb\n", "line 2 has 3 cells and the header 2"),
        ("a.tsv", b'filepath\ttitle\n1.png\t"a\n', "line 2 begins a row with a broken quote"),
        ("a.tsv", "filepath\ttitle\n1.png\té\n".encode("latin-1"), "line 2 is not utf-8"),
        ("a.tsv", b"", "it has no rows"),
        ("a.jsonl", b'{"image": "1.png", "text": "a"}\n{"image', "line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"image": "1", "text": "a"}\n{"image": "2", "text": []}',
            "row 2 of .* a list",
        ),
        ("a.parquet", b"PAR1", "not a whole parquet file"),
        ("a.xlsx", b"x", "a file of no known kind"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_pairs(str(tmp_path / name), Fields())
    assert name in str(error.value) and "\n" not in str(error.value)


def test_columns_of_lists_or_objects_are_refused(tmp_path):
    import datasets

    rows = {"image": ["1.png"], "text": [["a", "b"]], "object": [{"en": "a"}]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path))
    for column, holds in {"text": "lists", "object": "no texts"}.items():
        with pytest.raises(ValueError, match=rf"caption_column='{column}': holds {holds}"):
            open_pairs(str(tmp_path), Fields(caption=column))
        with pytest.raises(ValueError, match=rf"label_column='{column}': holds {holds}"):
            open_pairs(str(tmp_path), Fields(caption="image", label=column))


def ramp(dtype, white):
    """Three levels, as shares of white, and the greys of 8 bits they are."""
    shares = [Fraction(0), Fraction(1, 3), Fraction(1)]
    values = [share * white for share in shares]
    return np.array([[float(v) if dtype.kind == "f" else int(v) for v in values]], dtype), [
        0,
        85,
        255,
    ]


@pytest.mark.parametrize(
    ("dtype", "white", "kind"),
    [
        (np.uint16, 2**16 - 1, "PNG"),
        (np.uint16, 2**16 - 1, "TIFF"),
        (np.uint16, 2**16 - 1, "PPM"),
        (np.int32, 2**31 - 1, "TIFF"),
        (np.float32, 1.0, "TIFF"),
        (np.float32, 255.0, "TIFF"),
    ],
)
def test_deep_images_are_scaled_by_their_depth(dtype, white, kind):
    values, greys = ramp(np.dtype(dtype), white)
    stored = Image.fromarray(values)
    for image in (encoded(stored, kind), stored):
        read = read_image(image)
        assert read.mode == "RGB"
        assert [read.getpixel((x, 0)) for x in range(3)] == [(grey,) * 3 for grey in greys]


def test_unsigned_images_of_32_bits():
    values, greys = ramp(np.dtype(np.uint32), 2**32 - 1)
    file = encoded(Image.fromarray(values.view(np.int32)), "TIFF")
    signed, unsigned = (b"\x53\x01\x03\x00\x01\x00\x00\x00" + n for n in (b"\x02", b"\x01"))
    assert file.count(signed) == 1  # the entry of its sample format
    read = read_image(file.replace(signed, unsigned))
    assert [read.getpixel((x, 0))[0] for x in range(3)] == greys


def test_a_dark_deep_image_stays_dark():
    dark = Image.fromarray(np.full((2, 2), 300, np.uint16))
    assert read_image(encoded(dark)).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation):
    upright = Image.fromarray((np.arange(6, dtype=np.uint8) * 50).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = read_image(encoded(upright, exif=exif))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    undo |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # by Pillow, counter-clockwise
    if orientation > 1:
        upright = upright.transpose(Image.Transpose[undo[orientation]])
    assert np.array_equal(np.asarray(turned), np.asarray(upright.convert("RGB")))
    assert turned.size == ((3, 2) if orientation < 5 else (2, 3))


def test_what_is_transparent_is_white():
    red = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    palette = ImageOps.expand(Image.new("L", (1, 1), 7), 1).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(encoded(red)).getpixel((0, 0)) == (255, 255, 255)
        assert read_image(encoded(half)).getpixel((0, 0)) == (255, 127, 127)
        assert read_image(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255,) * 3
        seen = read_image(encoded(palette, transparency=bytes([0] * 7 + [255])))
    assert [seen.getpixel((x, 1)) for x in (0, 1)] == [(255,) * 3, (7,) * 3]
    deep = read_image(encoded(Image.fromarray(np.array([[0, 257]], np.uint16)), transparency=0))
    assert [deep.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (1,) * 3]
