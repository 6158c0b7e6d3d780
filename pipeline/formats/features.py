"""Export of features: the embeddings of every pair of a dataset, as Parquet."""

from pathlib import Path

import pyarrow as pa
from torch import Tensor

from pipeline.evals.trained import TrainedClip
from pipeline.shards import Dataset, write_table


class Features:
    """One Parquet file a shard, under the shard's name: uid, image_embed, text_embed.

    shards: a shards directory of ours.  batch_size: pairs per forward.
    Embeddings are fixed-size lists of D float32, unit norm; rows are in the order of the shard.
    Memory: one shard's images and embeddings.
    """

    def __init__(self, *, shards: str, batch_size: int = 256) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def write(self, trained: TrainedClip, out: Path) -> None:
        """Write `<out>/<shard>.parquet` for every shard. Raises ValueError for a broken image."""
        dataset = Dataset(self.shards, columns=["uid", "caption", "offset", "size"])
        for number, name in enumerate(dataset.names):
            shard = dataset.shard(number)
            images = [shard.image(row) for row in range(len(shard))]
            captions = shard.index["caption"].to_pylist()
            image_embed = trained.image_embed(images, batch_size=self.batch_size)
            text_embed = trained.text_embed(captions, batch_size=self.batch_size)
            columns = {
                "uid": shard.index["uid"],
                "image_embed": _column(image_embed),
                "text_embed": _column(text_embed),
            }
            write_table(out / f"{name}.parquet", pa.table(columns))


def _column(embed: Tensor) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(embed.flatten().numpy()), embed.shape[1])
