"""Features computed once: what they say of themselves, and when they are used again."""

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.evals.blind_pairs import BlindPairs, blind_pairs
from pipeline.evals.feature_file import FeatureFile, write_features
from pipeline.evals.trained import TrainedClip, weights_hash
from pipeline.formats.features import Features
from pipeline.shards import Record, write_manifest, write_shard


@pytest.fixture
def shards(tmp_path, make_picture):
    made = [Record(f"{n:02}", make_picture(n), "png", f"thing {n}", {}) for n in range(7)]
    parts = [("shard-000000", made[:5]), ("shard-000001", made[5:])]
    entries = [write_shard(tmp_path / "shards", name, part) for name, part in parts]
    write_manifest(tmp_path / "shards", {"num_samples": 7, "shards": entries, "steps": []})
    return str(tmp_path / "shards")


@pytest.fixture(scope="module")
def trained(tiny_run):
    return TrainedClip.load(tiny_run, device="cpu")


def test_they_say_who_made_them(shards, trained, tmp_path):
    Features(shards=shards, batch_size=2).write(trained, tmp_path / "out")
    found = FeatureFile(tmp_path / "out")
    assert found.made_by["model"] == weights_hash(trained.model)
    assert (found.made_by["metric"], found.made_by["normalised"]) == ("cosine", True)
    assert found.made_by["checkpoint"] == "step-10.ckpt"
    uids, embed = found.embeds("text_embed")
    assert uids == [f"{n:02}" for n in range(7)]
    expected = trained.text_embed([f"thing {n}" for n in range(7)])
    torch.testing.assert_close(embed, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="has no patch_tokens; it has"):
        next(found.batches("patch_tokens"))


def test_they_are_written_once(shards, trained, tmp_path):
    out = tmp_path / "out"
    Features(shards=shards).write(trained, out)
    first = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "shard-000001.parquet").unlink()  # as if killed there
    Features(shards=shards).write(trained, out)
    second = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert second.keys() == first.keys()
    assert second["shard-000000.parquet"] == first["shard-000000.parquet"]
    # other weights: written anew
    other = TrainedClip(
        model=trained.model, tokenizer=trained.tokenizer, transform=trained.transform
    )
    with torch.no_grad():
        trained.model.text_projection.weight += 1
    try:
        Features(shards=shards).write(other, out)
        made = FeatureFile(out).made_by["model"]
    finally:
        with torch.no_grad():
            trained.model.text_projection.weight -= 1
    assert made != weights_hash(trained.model)


def test_two_models_in_a_folder_are_refused(shards, trained, tmp_path):
    out = tmp_path / "out"
    Features(shards=shards).write(trained, out)
    table = pq.read_table(out / "shard-000001.parquet")
    write_features(out / "shard-000001.parquet", [table], {"model": "f" * 64, "checkpoint": "b"})
    with pytest.raises(
        ValueError, match=r"shard-000001\.parquet is of b \(ffffffffffff\), shard-0"
    ):
        FeatureFile(out)


@pytest.mark.parametrize("content", [None, b"PAR1 no", "plain"])
def test_what_is_no_feature_file(content, tmp_path):
    if content == "plain":
        pq.write_table(pa.table({"uid": ["a"]}), tmp_path / "a.parquet")
    elif content:
        (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(
        ValueError, match="no features; write them" if not content else "does not say"
    ):
        FeatureFile(tmp_path)


def test_arrays_and_an_index_beside_them(shards, trained, tmp_path):
    for form in ("npy", "faiss"):
        Features(shards=shards, form=form).write(trained, tmp_path / form)
    uids, embed = FeatureFile(tmp_path / "npy").embeds("image_embed")
    assert np.array_equal(np.load(tmp_path / "npy" / "image_embed.npy"), embed.numpy())
    assert (tmp_path / "npy" / "uids.txt").read_text().split() == uids
    index = faiss.read_index(str(tmp_path / "faiss" / "image_embed.faiss"))
    cosine, row = index.search(embed[3:4].numpy(), 2)
    assert row[0, 0] == 3 and cosine[0, 0] == pytest.approx(1, abs=1e-5)
    assert cosine[0, 1] == pytest.approx(float((embed[3] @ embed.T).topk(2).values[1]), abs=1e-5)
    with pytest.raises(ValueError, match="form='csv': one of parquet, npy, faiss"):
        Features(shards=shards, form="csv")


def test_tokens_pool_to_the_embeddings(shards, trained, tmp_path):
    Features(shards=shards, patch_tokens=True, text_tokens=True).write(trained, tmp_path / "out")
    (batch, _) = FeatureFile(tmp_path / "out").batches(
        "image_embed", "patch_tokens", "text_embed", "text_tokens"
    )
    width = trained.model.embed_dim
    assert batch["patch_tokens"].unflatten(1, (-1, width)).shape == (5, 4, width)
    tokens = batch["text_tokens"].unflatten(1, (-1, width))
    ends = trained.tokenizer([f"thing {n}" for n in range(5)]).argmax(1)
    pooled = torch.nn.functional.normalize(tokens[torch.arange(5), ends], dim=-1)
    torch.testing.assert_close(pooled, batch["text_embed"], atol=2e-3, rtol=0)
    # asked for later: the file without them is not taken for finished
    Features(shards=shards).write(trained, tmp_path / "later")
    Features(shards=shards, patch_tokens=True).write(trained, tmp_path / "later")
    assert len(next(FeatureFile(tmp_path / "later").batches("patch_tokens"))["patch_tokens"]) == 5


def unit(rows, width, seed):
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=-1)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blind_pairs_are_those_of_a_brute_force(block, monkeypatch):
    monkeypatch.setattr("pipeline.evals.blind_pairs.BLOCK", block)
    ours, theirs = unit(60, 3, 0), unit(60, 4, 1)
    near, far = ours @ ours.T, theirs @ theirs.T
    expected = [
        (i, j) for i in range(60) for j in range(i + 1, 60) if near[i, j] > 0.8 and far[i, j] < 0.1
    ]
    found, cosines = blind_pairs(ours, theirs, near=0.8, far=0.1)
    assert sorted(map(tuple, found.tolist())) == expected and len(expected) > 20
    for (i, j), (a, b) in zip(found.tolist(), cosines.tolist(), strict=True):
        assert (a, b) == pytest.approx((float(near[i, j]), float(far[i, j])), abs=1e-6)


def test_the_thresholds_are_strict():
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    half = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
    assert len(blind_pairs(same, half, near=1.0, far=0.6)[0]) == 0
    assert len(blind_pairs(same, half, near=0.95, far=0.5)[0]) == 0
    assert len(blind_pairs(same, half, near=0.95, far=0.6)[0]) == 1


def test_the_task_finds_rows_by_uid(shards, trained, tmp_path):
    """The other model's features lie in another order; to it, all images differ."""
    uids = [f"{n:02}" for n in range(7)][::-1]
    other = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(7, dtype=np.float32).ravel()), 7)
    columns = {"uid": uids, "image_embed": other}
    write_features(tmp_path / "other" / "a.parquet", [pa.table(columns)], {"model": "x"})
    knobs = {"data": shards, "other": str(tmp_path / "other"), "out": str(tmp_path / "p.parquet")}
    found = BlindPairs(**knobs, near=-1.1).run(trained)
    assert found == {"pairs": 21.0, "images": 7.0, "share": 1.0}
    listed = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["near"] for row in listed] == sorted((r["near"] for r in listed), reverse=True)
    assert BlindPairs(**knobs, near=1.1).run(trained)["pairs"] == 0
    write_features(tmp_path / "other" / "a.parquet", [pa.table(columns).slice(1)], {"model": "x"})
    with pytest.raises(ValueError, match="no features of 1 pairs"):
        BlindPairs(**knobs).run(trained)
