"""A small captioner: our image tower's patch features -> a causal decoder with cross-attention.

It is the captioning half of CoCa (arXiv:2205.01917); the contrastive half is the proxy model whose
tower it starts from. The image is dropped for some pairs in training (a learned null feature takes
its place), so that one model is both the conditional and the unconditional one of guidance
(arXiv:2307.16686).
Letters: B pairs, N patches, L text positions, W decoder width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.attention import Attention, CrossAttention
from pipeline.models.decoding import choose, guided
from pipeline.models.mlp import Mlp
from pipeline.models.vit import VisionTransformer


def patch_features(tower: VisionTransformer, images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 1 + N, width): every token of the tower after `ln_post`, class first."""
    return tower.ln_post(tower.tokens(images))


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention, MLP; each adds to the stream behind a norm."""

    def __init__(self, *, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width=width, heads=heads, causal=True)
        self.cross = CrossAttention(width=width, heads=heads)
        self.mlp = Mlp(width=width, hidden=int(width * mlp_ratio), activation="gelu")

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        x = x + self.cross(self.norm_2(x), memory)
        return x + self.mlp(self.norm_3(x))


class CaptionDecoder(nn.Module):
    """(B, L) token ids and (B, M, W) image features -> (B, L, V) logits of the next token.

    The output matrix is the embedding's (tied). Attributes: width, context_length, vocab_size.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.width, self.context_length, self.vocab_size = width, context_length, vocab_size
        self.token_embed = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.blocks = nn.ModuleList(
            DecoderBlock(width=width, heads=heads, mlp_ratio=mlp_ratio) for _ in range(layers)
        )
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        # layers that write into the residual stream, as in transformer.py: three to a block here
        residual_std = width**-0.5 * (3 * layers) ** -0.5
        for block in self.blocks:
            for linear in (block.attention.out, block.cross.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=residual_std)
                nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, memory: Tensor, wanted: Tensor | None = None) -> Tensor:
        """wanted: (B, L) bool, n positions whose logits (n, V) are asked for; None: all of them."""
        x = self.token_embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, memory)
        x = x if wanted is None else x[wanted]
        return F.linear(self.ln_final(x), self.token_embed.weight)


class Captioner(nn.Module):
    """image: a VisionTransformer, usually a trained proxy's. train_image: false keeps it as it is
    and saves its backward.

    The tokenizer's last two ids are SOT and EOT (CLIP's layout).
    """

    def __init__(
        self, *, image: VisionTransformer, decoder: CaptionDecoder, train_image: bool = False
    ) -> None:
        super().__init__()
        self.image, self.decoder, self.train_image = image, decoder, train_image
        self.image.requires_grad_(train_image)
        self.projection = nn.Linear(image.width, decoder.width)
        self.null_image = nn.Parameter(torch.randn(1, decoder.width) * 0.02)
        self.sot, self.eot = decoder.vocab_size - 2, decoder.vocab_size - 1

    def memory(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, 1 + N, W): what the decoder looks at."""
        with torch.set_grad_enabled(self.train_image and torch.is_grad_enabled()):
            features = patch_features(self.image, images)
        return self.projection(features)

    def loss(self, images: Tensor, tokens: Tensor, dropped: Tensor) -> Tensor:
        """Cross-entropy of the next token, the mean over all tokens of the batch up to EOT.

        tokens: (B, L), SOT ... EOT and padding. dropped: (B,) bool, pairs that see no image.
        """
        memory = torch.where(dropped[:, None, None], self.null_image, self.memory(images))
        place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        wanted = place < tokens.argmax(dim=1, keepdim=True)  # EOT has the largest id
        logits = self.decoder(tokens[:, :-1], memory, wanted)
        return F.cross_entropy(logits, tokens[:, 1:][wanted])

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        *,
        uniforms: Tensor | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        guidance: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Captions as token ids (B, L), SOT ... EOT and zeros, and their scores (B,).

        uniforms: (B, L) in [0, 1), the randomness of temperature > 0. The score is the mean
        log-probability of a caption's tokens, EOT included, under the distribution they were chosen
        from before temperature and top_p.
        Price: no key-value cache: L forwards of the decoder over up to L positions, twice that with
        a guidance other than 0 and 1.
        """
        if temperature > 0 and uniforms is None:
            raise ValueError(f"temperature {temperature} needs uniforms to draw from")
        length, batch = self.decoder.context_length, len(images)
        memory = self.memory(images)
        null = self.null_image.expand(batch, 1, -1)
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=images.device)
        tokens[:, 0] = self.sot
        total = torch.zeros(batch, device=images.device)
        ended = torch.zeros(batch, dtype=torch.bool, device=images.device)
        for place in range(1, length):
            read = tokens[:, :place]
            conditional = None if guidance == 0 else self.decoder(read, memory)[:, -1]
            unconditional = None if guidance == 1 else self.decoder(read, null)[:, -1]
            log_probs = guided(
                conditional if conditional is not None else unconditional,
                unconditional if unconditional is not None else conditional,
                guidance,
            )
            log_probs[:, self.sot] = -torch.inf
            draws = uniforms[:, place] if uniforms is not None else total
            chosen = choose(log_probs, temperature=temperature, top_p=top_p, uniforms=draws)
            if place == length - 1:
                chosen = torch.full_like(chosen, self.eot)  # cut, and closed as the tokenizer does
            gained = log_probs.gather(1, chosen[:, None]).squeeze(1)
            total += gained.masked_fill(ended, 0.0)
            tokens[:, place] = chosen.masked_fill(ended, 0)
            ended |= chosen == self.eot
            if ended.all():
                break
        return tokens, total / tokens.argmax(dim=1)
