"""Export of features: the embeddings of every pair of a dataset."""

import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evals.feature_file import FeatureFile, described, vectors, write_features
from pipeline.evals.task import SHARED_BATCHES
from pipeline.evals.trained import TrainedClip
from pipeline.models.text import TextTransformer
from pipeline.shards import Dataset, Shard, whole_file

log = logging.getLogger(__name__)

FORMS = ("parquet", "npy", "faiss")
# metrics that an exact index orders alike: by inner product, by distance
ON_THE_SPHERE, STRAIGHT = ("cosine", "arc"), ("euclidean", "euclidean_squared")


class Features:
    """One Parquet file a shard, under the shard's name: `pipeline.evals.feature_file`.

    shards: a shards directory of ours.  batch_size: pairs per forward.
    form: "npy" adds image_embed.npy and text_embed.npy, (n, D) float32, and uids.txt beside them,
        in the order of the rows; "faiss" an exact index of each, image_embed.faiss and
        text_embed.faiss, whose ids are the same rows: of inner products, or of distances for a
        Euclidean metric.
    patch_tokens, text_tokens: also all tokens after the tower's last norm, projected as the pooled
        one is: (N D,) or (L D,) float16 a row, patches row-major. For dense tasks; no unit norm.
    A shard whose file is there, of the same weights and dataset, is not embedded again.
    Memory: 32 batches of images and embeddings.
    """

    def __init__(
        self,
        *,
        shards: str,
        form: Literal["parquet", "npy", "faiss"] = "parquet",
        patch_tokens: bool = False,
        text_tokens: bool = False,
        batch_size: int = 256,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"format.form={form!r}: one of {', '.join(FORMS)}")
        self.shards, self.form, self.batch_size = shards, form, batch_size
        self.patch_tokens, self.text_tokens = patch_tokens, text_tokens

    def write(self, trained: TrainedClip, out: Path) -> None:
        """Write `<out>/<shard>.parquet` for every shard. Raises ValueError for a broken image."""
        if self.text_tokens and not isinstance(trained.model.text, TextTransformer):
            kind = type(trained.model.text).__name__
            raise ValueError(
                f"format.text_tokens=true: no tokens of a {kind}; leave it out, or take a model "
                "with our text tower"
            )
        dataset = Dataset(self.shards, columns=["uid", "caption", "offset", "size"])
        self._check_index(trained)
        made_by = {
            **trained.made_by(),
            "normalised": trained.metric.name in ON_THE_SPHERE,
            "dataset": dataset_hash(dataset),
        }
        for number, name in enumerate(dataset.names):
            path = out / f"{name}.parquet"
            if self._finished(path, made_by):
                log.info("%s: written before, of the same weights", path)
                continue
            write_features(path, self._tables(trained, dataset.shard(number)), made_by)
        if self.form != "parquet":
            self._gather(out, trained.metric.name)

    def _finished(self, path: Path, made_by: dict[str, Any]) -> bool:
        if not path.exists() or described(path) != made_by:
            return False
        names = pq.read_schema(path).names
        wanted = {"patch_tokens": self.patch_tokens, "text_tokens": self.text_tokens}
        return all(name in names for name, asked in wanted.items() if asked)

    def _tables(self, trained: TrainedClip, shard: Shard) -> Iterator[pa.Table]:
        """A batch of every rank at a time; one empty table for an empty shard."""
        size = self.batch_size * SHARED_BATCHES
        for start in range(0, max(len(shard), 1), size):
            index = shard.index.slice(start, size)
            images = [shard.image(row) for row in range(start, start + len(index))]
            captions = index["caption"].to_pylist()
            asked = {
                "image_embed": trained.image_embed(images, batch_size=self.batch_size),
                "text_embed": trained.text_embed(captions, batch_size=self.batch_size),
            }
            if self.patch_tokens:
                asked["patch_tokens"] = trained.patch_tokens(images, batch_size=self.batch_size)
            if self.text_tokens:
                asked["text_tokens"] = trained.text_tokens(captions, batch_size=self.batch_size)
            columns = {name: vectors(values) for name, values in asked.items()}
            yield pa.table({"uid": index["uid"], **columns})

    def _check_index(self, trained: TrainedClip) -> None:
        name = trained.metric.name
        if self.form == "faiss" and name not in (*ON_THE_SPHERE, *STRAIGHT):
            raise ValueError(
                f"format.form=faiss: no index of model.metric = {name}; take form=npy, and "
                "TrainedClip.similarity over the rows"
            )

    def _gather(self, out: Path, metric: str) -> None:
        """All rows in one file, a column."""
        features = FeatureFile(out)
        for column in ("image_embed", "text_embed"):
            uids, embed = features.embeds(column)
            if self.form == "npy":
                with whole_file(out / f"{column}.npy") as file:
                    np.save(file, embed.numpy())
            else:
                import faiss  # only here: an export without an index does not need it

                make = faiss.IndexFlatIP if metric in ON_THE_SPHERE else faiss.IndexFlatL2
                index = make(embed.shape[1])
                index.add(embed.numpy())
                with whole_file(out / f"{column}.faiss") as file:
                    file.write(faiss.serialize_index(index).tobytes())
        with whole_file(out / "uids.txt") as file:
            file.write("".join(f"{uid}\n" for uid in uids).encode())


def dataset_hash(dataset: Dataset) -> str:
    """sha256 over its shards' names and contents, as the manifest has them."""
    entries = [[shard["name"], shard.get("sha256")] for shard in dataset.manifest["shards"]]
    return sha256(json.dumps(entries).encode()).hexdigest()
