"""Facts are computed once; decisions are cheap, global, and have reasons."""

import json
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from curation.ingest import Ingest
from curation.metadata.build import EntryKnobs, build, write
from curation.pool import Facts, Pool, annotate_unit, ingest_file, settings
from curation.run import run
from pipeline.check import composed
from pipeline.config import build as build_component
from pipeline.data.tokenizer import train_bpe
from pipeline.shards import read_manifest, records
from pipeline.trainer.checkpoints import AtomicCheckpointIO


@pytest.fixture
def entries(tmp_path):
    captions = [f"thing number {n % 7} in a row of {n}" for n in range(40)]
    path = tmp_path / "entries.json"
    write(build(captions, EntryKnobs(lower_case=True)), path)
    return path


@pytest.fixture
def proxy(tmp_path):
    """A run directory of ours with random weights: what embed needs of a trained model."""
    folder = tmp_path / "proxy"
    train_bpe([f"thing number {n}" for n in range(40)], vocab_size=560, directory=folder / "bpe")
    cfg = composed(
        "train",
        [
            "recipe=emoji",
            "name=proxy",
            "data.shards=x",
            f"tokenizer.path={folder}/bpe",
            "model.text.vocab_size=560",
        ],
    )
    OmegaConf.save(
        OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), folder / "config.yaml"
    )
    torch.manual_seed(0)
    state = {f"model.{k}": v for k, v in build_component(cfg.model).state_dict().items()}
    path = folder / "checkpoints" / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": state}, path)
    return folder


def curate(pool, out, entries, proxy, *overrides):
    phrases = entries.with_name("phrases.json")
    phrases.write_text('["free download"]')
    return run(
        composed(
            "curate",
            [
                "dataset=emoji",
                "engine.workers=1",
                f"pool={pool}",
                f"out={out}",
                f"annotate.entries.entries={entries}",
                f"annotate.embed.run={proxy}",
                f"annotate.strip_boilerplate.phrases={phrases}",
                *overrides,
            ],
        )
    )


def facts(pool):
    cache = pool.with_name(pool.name + ".annotations")
    return {
        str(path.relative_to(cache)): path.stat().st_mtime_ns
        for path in cache.rglob("*.parquet")
        if not path.parent.name.startswith("select-") and "logs" not in path.parts
    }


def test_every_step_counts_and_a_changed_threshold_recomputes_no_fact(
    parquet_pool, tmp_path, entries, proxy
):
    pool = parquet_pool(40)
    first = curate(pool, tmp_path / "a", entries, proxy)
    steps = {step["name"]: step for step in first.steps}
    assert list(steps)[:2] == ["ingest", "unique_uid"]
    for step in first.steps:
        assert step["read"] == step["kept"] + sum(step["dropped"].values())
    for before, after in zip(first.steps, first.steps[1:], strict=False):
        assert before["kept"] == after["read"]
    assert steps["neighbours"]["dropped"] == {"neighbours": 10}
    was = facts(pool)
    assert len({name.split("-")[0] for name in was}) == 6  # ingest and four annotators

    second = curate(pool, tmp_path / "b", entries, proxy, "select.neighbours.fraction=0.5")
    assert facts(pool) == was
    assert second.fingerprint != first.fingerprint
    assert (
        read_manifest(tmp_path / "b")["num_samples"] < read_manifest(tmp_path / "a")["num_samples"]
    )


def test_kept_and_rejected_make_the_pool(parquet_pool, tmp_path, entries, proxy):
    pool = parquet_pool(40)
    curate(pool, tmp_path / "a", entries, proxy)
    kept = [record.uid for record in records(tmp_path / "a")]
    rejected = pq.read_table(tmp_path / "a" / "rejected.parquet")["uid"].to_pylist()
    assert len(kept) + len(rejected) == 40 == len({*kept, *rejected})


def test_facts_travel_into_the_shards(parquet_pool, tmp_path, entries, proxy):
    curate(parquet_pool(40), tmp_path / "a", entries, proxy)
    known = json.loads(entries.read_text())["entries"]
    for record in records(tmp_path / "a"):
        assert -1 <= record.info["stats"]["clip_score"] <= 1
        words = {known[entry] for entry in record.info["entries"]}
        assert "thing" in words and "number" in words


def test_the_pools_cut_into_files_does_not_change_a_decision(
    parquet_pool, tmp_path, entries, proxy
):
    kept = []
    for files in (1, 3):
        pool = parquet_pool(40, files=files, name=f"pool{files}")
        curate(pool, tmp_path / f"out{files}", entries, proxy)
        kept.append([record.uid for record in records(tmp_path / f"out{files}")])
    assert kept[0] == kept[1]


def test_a_changed_entry_list_recomputes_only_what_reads_it(parquet_pool, tmp_path, entries, proxy):
    pool = parquet_pool(40)
    curate(pool, tmp_path / "a", entries, proxy, "only=annotate")
    was = facts(pool)
    write(build(["thing number"] * 9, EntryKnobs(lower_case=True, wordnet=False)), entries)
    curate(pool, tmp_path / "a", entries, proxy, "only=annotate")
    new = set(facts(pool)) - set(was)
    assert {name.split("-")[0] for name in new} == {"entries"}
    assert {name: facts(pool)[name] for name in was} == was


def test_an_empty_selection_says_which_step_to_loosen(parquet_pool, tmp_path, entries, proxy):
    pool = parquet_pool(40)
    with pytest.raises(ValueError, match=r"(?s)keeps nothing.*loosen select\.clip_score") as caught:
        curate(
            pool,
            tmp_path / "a",
            entries,
            proxy,
            "order=[clip_score]",
            "select.clip_score.fraction=null",
            "select.clip_score.threshold=2.0",
        )
    assert "clip_score: read 40, kept 0" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_a_selector_without_its_annotator_names_the_column(parquet_pool, tmp_path, entries, proxy):
    with pytest.raises(ValueError, match=r"needs the column '(image_embed|clip_score)'"):
        curate(parquet_pool(8), tmp_path / "a", entries, proxy, "~annotate.embed")


def test_the_report_shows_every_step(parquet_pool, tmp_path, entries, proxy):
    curate(parquet_pool(40), tmp_path / "a", entries, proxy)
    page = (tmp_path / "a" / "report.html").read_text()
    for words in (
        "Step by step",
        "Metadata entries",
        "clip_score",
        "Thrown away by",
        "<svg",
        "Kept",
    ):
        assert words in page
    assert "src='http" not in page and "href='http" not in page  # nothing is fetched


def test_uid_order_of_pool_rows_does_not_matter(parquet_pool, tmp_path, entries, proxy):
    pool = parquet_pool(40, files=1)
    first = curate(pool, tmp_path / "a", entries, proxy)
    path = pool / "part-0.parquet"
    turned = pool.with_name("turned")
    turned.mkdir()
    table = pq.read_table(path)
    pq.write_table(table.take(pa.array(range(39, -1, -1))), turned / "part-0.parquet")
    second = curate(turned, tmp_path / "b", entries, proxy)
    assert first.plan(["uid"])["uid"].to_pylist() == second.plan(["uid"])["uid"].to_pylist()


def test_speed_is_no_part_of_a_fingerprint():
    class Served:
        inputs: ClassVar[dict[str, str]] = {"words": "list.json"}
        operational = ("server.url", "threads")

    config = {"server": {"url": "a", "name": "m"}, "threads": 2, "words": "list.json", "top_p": 1}
    assert settings(Served(), config) == {"server": {"name": "m"}, "top_p": 1}
    Served.operational = ()
    assert settings(Served(), config)["server"] == {"url": "a", "name": "m"}


class Expensive:
    """Two answers are paid for, then the power fails; the third time all goes well."""

    name, version = "expensive", 1
    needs_images, reads = False, ("caption",)
    inputs: ClassVar[dict[str, str]] = {}
    columns: ClassVar[dict[str, pa.DataType]] = {"length": pa.int64()}
    rows_per_unit, rows_per_save = 8, 2

    def __init__(self, patience):
        self.asked, self.patience = [], patience

    def annotate(self, batch):
        if len(self.asked) + len(batch) > self.patience:
            raise KeyboardInterrupt
        self.asked += [sample["uid"] for sample in batch]
        return [{"length": len(sample["caption"])} for sample in batch]


def test_costly_answers_survive_a_kill_within_their_unit(parquet_pool, tmp_path):
    pool = Pool(parquet_pool(8, files=1), tmp_path / "cache", Ingest(), {})
    for unit in pool.ingest_units():
        ingest_file(*unit.arguments)
    first = Expensive(patience=5)  # dies in the third pair of samples
    (unit,) = Facts(pool, first, {}).units()
    with pytest.raises(KeyboardInterrupt):
        annotate_unit(*unit.arguments)
    assert len(first.asked) == 4 and not unit.done
    (journal,) = unit.marker.parent.glob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-7])  # and the last line is torn
    second = Expensive(patience=100)
    (unit,) = Facts(pool, second, {}).units()
    annotate_unit(*unit.arguments)
    assert unit.done and not journal.exists()
    assert len(second.asked) == 5  # the four that were left and the torn one
    rows = pq.read_table(unit.marker).to_pylist()
    captions = pq.read_table(pool.place(pool.files[0]) / "rows.parquet")["caption"].to_pylist()
    assert [row["length"] for row in rows] == [len(caption) for caption in captions]
