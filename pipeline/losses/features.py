"""What every loss term is given: this rank's embeddings, and a way to those of the others.

Letters: B local pairs, G global pairs, D embedding width.
"""

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from pipeline.distributed import Peers


@dataclass(frozen=True, kw_only=True)
class PairFeatures:
    """image_embed, text_embed: (B, D) unit-norm, row i of both is one pair, rank-local.

    logit_scale: scalar, positive.  logit_bias: scalar added to every logit, None for models without
    one.  peers: the processes that hold the other pairs.
    The gathered features are made when a term first asks for them, once for all terms: a term that
    passes blocks around a ring instead never pays for them.
    """

    image_embed: Tensor
    text_embed: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    peers: Peers = field(default_factory=Peers)

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
