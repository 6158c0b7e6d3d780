"""Everything a web pool throws at ingest: each bad sample has a reason, its neighbours stay."""

import io
import json
import struct
import tarfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.ingest import Ingest, pool_files, read_images
from pipeline.shards import content_uid


def tar_of(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def pair(number, picture, caption=b"a good pair"):
    return [(f"{number:05d}.png", picture(number)), (f"{number:05d}.txt", caption)]


def bomb() -> bytes:
    """A PNG of 10,000 x 10,000 pixels in a few hundred bytes: the header alone says so."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def encoded(image, kind, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def run(path, **knobs):
    rows, rejected, counts = Ingest(**knobs).run(path)
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] == rows.num_rows and rejected.num_rows == counts["read"] - counts["kept"]
    return rows, counts


BAD = {
    "truncated_jpeg": ("truncated_image", lambda p: ("jpg", p(3, "JPEG", 64)[:-300], b"cut")),
    "zero_bytes": ("empty_image", lambda p: ("png", b"", b"nothing")),
    "bomb": ("too_many_pixels", lambda p: ("png", bomb(), b"huge")),
    "not_an_image": ("not_an_image", lambda p: ("png", b"<html>404</html>", b"page")),
    "gif": ("unsupported_format", lambda p: ("png", p(3, "GIF"), b"gif under a png name")),
    "missing_caption": ("missing_caption", lambda p: ("png", p(3), None)),
    "blank_caption": ("missing_caption", lambda p: ("png", p(3), b" \n")),
    "long_caption": ("caption_too_long", lambda p: ("png", p(3), b"x" * 100_000)),
    "not_utf8": ("caption_not_utf8", lambda p: ("png", p(3), b"caf\xe9")),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_counted_and_its_neighbours_stay(case, tmp_path, make_picture):
    reason, make = BAD[case]
    extension, image, caption = make(make_picture)
    middle = [(f"00001.{extension}", image)]
    if caption is not None:
        middle.append(("00001.txt", caption))
    path = tmp_path / "a.tar"
    tar_of(path, pair(0, make_picture) + middle + pair(2, make_picture))
    rows, counts = run(path)
    assert counts["dropped"] == {reason: 1}
    assert rows["key"].to_pylist() == ["00000", "00002"]


@pytest.mark.parametrize(
    ("note", "image", "kind"),
    [
        ("cmyk_converted", Image.new("CMYK", (9, 9), (0, 200, 0, 10)), "JPEG"),
        ("16_bit_converted", Image.new("I;16", (9, 9), 30_000), "PNG"),
        ("animated_first_frame_used", Image.new("RGB", (9, 9), "red"), "WEBP"),
    ],
)
def test_unusual_but_usable_images_are_kept_and_noted(note, image, kind, tmp_path, make_picture):
    options = {}
    if note.startswith("animated"):
        frames = [Image.new("RGB", (9, 9), colour) for colour in ("blue", "green")]
        options = {"save_all": True, "append_images": frames, "duration": 50}
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    path = tmp_path / "a.tar"
    data = encoded(image, kind, **options)
    tar_of(path, [(f"0.{extension}", data), ("0.txt", b"odd")] + pair(1, make_picture))
    rows, counts = run(path)
    assert counts["notes"] == {note: 1} and counts["kept"] == 2
    assert rows["extension"].to_pylist()[0] == extension


def test_duplicate_keys_keep_the_first_and_count_the_second(tmp_path, make_picture):
    path = tmp_path / "a.tar"
    again = [("00000.png", make_picture(9)), ("00000.txt", b"the same key again")]
    tar_of(path, pair(0, make_picture) + again + pair(1, make_picture) + again)
    rows, counts = run(path)
    assert counts == {"read": 4, "kept": 2, "dropped": {"duplicate_key": 2}, "notes": {}}
    assert rows["caption"].to_pylist() == ["a good pair"] * 2


@pytest.mark.parametrize("cut", ["inside a member", "inside a header", "between members"])
def test_a_tar_cut_in_half_keeps_what_is_whole(cut, tmp_path, make_picture):
    path = tmp_path / "a.tar"
    tar_of(path, [member for n in range(10) for member in pair(n, make_picture)])
    with tarfile.open(path) as archive:
        sixth = archive.getmember("00006.png")
    end = {
        "inside a member": sixth.offset_data + 100,
        "inside a header": sixth.offset + 100,
        "between members": sixth.offset,
    }[cut]
    path.write_bytes(path.read_bytes()[:end])
    rows, counts = run(path)
    assert rows["key"].to_pylist() == [f"{n:05d}" for n in range(6)]
    assert counts["dropped"] == {"truncated_archive": 1}


def test_a_pool_of_mostly_bad_samples_stops_the_run(tmp_path, make_picture):
    from curation.pool import Pool, ingest_file

    (tmp_path / "pool").mkdir()
    bad = [(f"9{n}.png", b"") for n in range(5)]
    tar_of(tmp_path / "pool" / "a.tar", pair(0, make_picture) + bad)
    pool = Pool(tmp_path / "pool", tmp_path / "cache", Ingest(max_bad_fraction=0.5), {})
    for unit in pool.ingest_units():
        ingest_file(*unit.arguments)
    with pytest.raises(ValueError, match="5 of 6 samples.*max_bad_fraction"):
        pool.counts()


def test_parquet_rows_that_are_bad_do_not_take_the_batch_with_them(tmp_path, make_picture):
    images = [{"bytes": make_picture(n), "path": None} for n in range(4)]
    images[1] = None
    captions = pa.array([b"one", b"two", b"caf\xe9", None]).cast(pa.binary()).view(pa.string())
    table = pa.table({"image": images, "caption": captions})
    pq.write_table(table, tmp_path / "a.parquet")
    rows, counts = run(tmp_path / "a.parquet")
    assert rows["caption"].to_pylist() == ["one"]
    assert counts["dropped"] == {"missing_image": 1, "caption_not_utf8": 1, "missing_caption": 1}


def test_a_parquet_file_without_the_caption_column_names_the_knob(tmp_path, make_picture):
    image = [{"bytes": make_picture(0), "path": None}]
    pq.write_table(pa.table({"image": image, "text": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'caption'.*ingest\.caption_column"):
        Ingest().run(tmp_path / "a.parquet")
    rows, _ = run(tmp_path / "a.parquet", caption_column="text")
    assert rows["caption"].to_pylist() == ["one"]


def test_identity_is_the_content_unless_the_pool_has_a_safe_uid(tmp_path, make_picture):
    image = make_picture(1)
    given = {"uid": "0" * 31 + "a", "caption": "from json"}
    evil = {"uid": "../../etc/passwd", "caption": "a path is no name"}
    tar_of(
        tmp_path / "a.tar",
        [
            ("a.png", image),
            ("a.json", json.dumps(given).encode()),
            ("b.png", image),
            ("b.json", json.dumps(evil).encode()),
        ],
    )
    rows, _ = run(tmp_path / "a.tar")
    assert rows["uid"].to_pylist() == [given["uid"], content_uid(image, evil["caption"])]


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_images_are_found_again(layout, tmp_path, make_picture):
    pictures = [make_picture(n) for n in range(600)]
    path = tmp_path / f"a.{layout}"
    if layout == "tar":
        tar_of(path, [m for n in range(600) for m in pair(n, make_picture)])
    else:
        images = [{"bytes": data, "path": None} for data in pictures]
        table = pa.table({"image": images, "caption": ["x"] * 600})
        pq.write_table(table, path, row_group_size=100)
    rows, _ = run(path)
    some = rows.take([0, 5, 255, 256, 599])
    found = list(read_images(path, some["row"].to_pylist(), some["num_bytes"].to_pylist()))
    assert found == [pictures[n] for n in (0, 5, 255, 256, 599)]


def test_a_folder_without_data_names_the_layouts(tmp_path):
    with pytest.raises(ValueError, match="Hugging Face Parquet, img2dataset"):
        pool_files(tmp_path)


def test_img2dataset_metadata_beside_a_tar_is_no_pool_file(tmp_path, make_picture):
    tar_of(tmp_path / "00000.tar", pair(0, make_picture))
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "00000.parquet")
    assert [file.name for file in pool_files(tmp_path)] == ["00000.tar"]
