"""What every loss term is given: this rank's embeddings, and a way to those of the others.

Letters: B local pairs, G global pairs, D embedding width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from pipeline.distributed import Peers
from pipeline.metric import Cosine, Metric


@dataclass(frozen=True, kw_only=True)
class PairFeatures:
    """image_embed, text_embed: (B, D) as the metric places them, row i of both is one pair,
    rank-local.

    logit_scale: scalar, positive.  logit_bias: scalar added to every logit, None for models without
    one.  metric, curvature: how near two embeddings are, and the number it takes if it is curved.
    peers: the processes that hold the other pairs.  extra: what else a model gives of each
    pair, (B, ...) by name.
    The gathered features are made when a term first asks for them, once for all terms: a term that
    passes blocks around a ring instead never pays for them.
    """

    image_embed: Tensor
    text_embed: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    metric: Metric = field(default_factory=Cosine)
    curvature: Tensor | None = None
    peers: Peers = field(default_factory=Peers)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def logits(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(N, D), (M, D) -> (N, M): logit_scale times the similarity."""
        if self.metric.inner:  # scaled first: a pass over N x D numbers and not N x M
            return self.metric.similarity(self.logit_scale * queries, candidates)
        return self.logit_scale * self.metric.similarity(queries, candidates, self.curvature)

    def check_inner(self, loss: str) -> None:
        """Raises ValueError where the similarity is no inner product, which `loss` relies on."""
        if not self.metric.inner:
            raise ValueError(
                f"loss={loss} makes logits of inner products and model.metric is "
                f"{self.metric.name}: set loss={loss.removeprefix('tiled_')}"
            )

    def needed(self, name: str) -> Tensor:
        """One of `extra`. Raises ValueError if the model does not give it."""
        if name not in self.extra:
            raise ValueError(
                f"a loss term reads {name!r} of each pair, the model gives "
                f"{sorted(self.extra) or 'nothing beside image_embed and text_embed'}: take "
                "another model (model._target_) or another loss"
            )
        return self.extra[name]

    @property
    def offset(self) -> int:
        """Index of the first local row among the G."""
        return self.peers.rank * len(self.image_embed)

    @cached_property
    def all_image_embed(self) -> Tensor:
        """(G, D), rows in rank order, with gradient to the owning rank."""
        return self.peers.gather(self.image_embed)

    @cached_property
    def all_text_embed(self) -> Tensor:
        """(G, D), rows in rank order, with gradient to the owning rank."""
        return self.peers.gather(self.text_embed)
