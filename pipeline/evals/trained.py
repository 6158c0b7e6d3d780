"""A run directory -> a model that embeds image bytes and captions."""

import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from pipeline.config import build
from pipeline.distributed import peers, rank, world_size
from pipeline.evals.task import in_batches
from pipeline.metric import Metric
from pipeline.phases import phase_of
from pipeline.targets import read_config

T = TypeVar("T")
WEIGHTS = ("trained", "ema")
MODEL_PREFIX = "model."  # the Lightning module holds the model under this name


class Transform(Protocol):
    """Image bytes -> uint8 tensor; a uint8 batch -> normalised floats."""

    def evaluate(self, data: bytes) -> Tensor: ...

    def normalise(self, images: Tensor) -> Tensor: ...


class TrainedClip:
    """A model in evaluation mode with the tokenizer and the image transform it was trained with.

    All tokens are seen: token policies belong to training and are not part of the model.
    In a process group every rank embeds its share and has all embeddings, the same bits for any
    number of ranks.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        tokenizer: Callable[[Sequence[str]], Tensor],
        transform: Transform,
        device: str | torch.device = "cpu",
        checkpoint: Path | None = None,
    ) -> None:
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.transform = transform
        self.device = torch.device(device)
        self.checkpoint = checkpoint  # where the weights came from

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        checkpoint: str | Path | None = None,
        weights: str = "trained",
        device: str | torch.device | None = None,
        allow_foreign_targets: bool = False,
    ) -> "TrainedClip":
        """The model of a run directory.

        checkpoint: a file of Lightning's; None for the newest in <run>/checkpoints.
        weights: "trained", or "ema" for the run's moving average.
        device: None for the GPU if there is one.
        allow_foreign_targets: whether its config may name classes that are not ours.
        Raises ValueError if the run, its checkpoint or a weight is missing.
        """
        config = run_config(run, checkpoint, allow_foreign_targets=allow_foreign_targets)
        path = Path(checkpoint) if checkpoint is not None else newest_checkpoint(run)
        model = build(config.model)
        try:
            model.load_state_dict(read_weights(path, weights=weights))
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit the model of {run}/config.yaml: {error}"
            ) from error
        return cls(
            model=model,
            tokenizer=build(config.tokenizer, **shortened(config)),
            transform=build(config.transform),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            checkpoint=path,
        )

    @property
    def logit_scale(self) -> float:
        """What a similarity is multiplied by before the softmax."""
        return float(self.model.logit_scale.detach())

    @property
    def metric(self) -> Metric:
        """How its embeddings compare."""
        return self.model.metric

    def similarity(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(..., N, D), (..., M, D) embeddings -> (..., N, M) by the model's metric."""
        return self.model.similarity(queries, candidates)

    def centre(self, embeds: Tensor) -> Tensor:
        """(..., n, D) -> (..., D): one embedding in the place of several."""
        return self.metric.centre(embeds)

    def made_by(self) -> dict[str, Any]:
        """What a feature file says of the embeddings."""
        curvature = self.model.curvature
        return {
            "metric": self.metric.name,
            **({} if curvature is None else {"curvature": float(curvature.detach())}),
            "model": weights_hash(self.model),
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
        }

    def image_embed(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        """(n, D) float32 on the CPU. Raises ValueError for bytes that are no image."""
        return self._shared(images, batch_size, self._embed_images, self.model.embed_dim)

    def text_embed(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """(n, D) float32 on the CPU."""
        return self._shared(captions, batch_size, self._embed_captions, self.model.embed_dim)

    def image_features(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        """(n, width) float32 on the CPU: the tower's output, before the projection."""
        return self._shared(images, batch_size, self._features, self.model.image.width)

    def image_projected(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        """(n, D) float32 on the CPU: `image_embed` before the metric places it."""

        def project(batch: Sequence[bytes]) -> Tensor:
            return self.model.image_projection(self._features(batch)).float()

        return self._shared(images, batch_size, project, self.model.embed_dim)

    def text_projected(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """(n, D) float32 on the CPU: `text_embed` before the metric places it."""

        def project(batch: Sequence[str]) -> Tensor:
            tokens = self.tokenizer(batch).to(self.device)
            return self.model.text_projection(self.model.text(tokens)).float()

        return self._shared(captions, batch_size, project, self.model.embed_dim)

    def patch_tokens(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        """(n, N D) float16 on the CPU: every patch after the last norm, projected, row-major."""
        width = self.model.image.num_tokens * self.model.embed_dim
        return self._shared(images, batch_size, self._patch_tokens, width).half()

    def text_tokens(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """(n, L D) float16 on the CPU: every position after the last norm, projected."""
        width = self.tokenizer([""]).shape[1] * self.model.embed_dim
        return self._shared(captions, batch_size, self._text_tokens, width).half()

    @torch.inference_mode()
    def _shared(
        self,
        items: Sequence[T],
        batch_size: int,
        embed: Callable[[Sequence[T]], Tensor],
        width: int,
    ) -> Tensor:
        """Embeddings of all items on every rank, each having computed its share.

        Whole batches are dealt out in turn, so a batch is the same whatever the number of ranks and
        so are its bits. Every rank runs as many forwards (the last batch again where it has none
        left), so that a model kept in pieces cannot wait for a rank that is done.
        """
        batches = list(in_batches(items, batch_size))
        embeds = [torch.empty(0, width)]
        for start in range(0, len(batches), world_size()):
            own = embed(batches[min(start + rank(), len(batches) - 1)])
            rows = own.new_zeros(batch_size, own.shape[1])
            rows[: len(own)] = own
            everyone = peers().gather(rows).cpu().unflatten(0, (-1, batch_size))
            here = zip(batches[start : start + world_size()], everyone, strict=False)
            embeds += [part[: len(batch)] for batch, part in here]
        return torch.cat(embeds)

    def _embed_images(self, images: Sequence[bytes]) -> Tensor:
        return self.model.encode_image(self._input(images)).float()

    def _features(self, images: Sequence[bytes]) -> Tensor:
        return self.model.image(self._input(images)).float()

    def _patch_tokens(self, images: Sequence[bytes]) -> Tensor:
        tower = self.model.image
        tokens = tower.ln_post(tower.tokens(self._input(images)))[:, tower.num_prefix :]
        return self.model.image_projection(tokens).float().flatten(1)

    def _text_tokens(self, captions: Sequence[str]) -> Tensor:
        tokens = self.model.text.tokens(self.tokenizer(captions).to(self.device))
        return self.model.text_projection(tokens).float().flatten(1)

    def _input(self, images: Sequence[bytes]) -> Tensor:
        pixels = torch.stack([self._pixels(data) for data in images]).to(self.device)
        return self.transform.normalise(pixels)

    def _embed_captions(self, captions: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(captions).to(self.device)).float()

    def _pixels(self, image: bytes) -> Tensor:
        try:
            return self.transform.evaluate(image)
        except ValueError as error:
            raise ValueError(
                f"the image with sha256 {sha256(image).hexdigest()} ({len(image)} bytes) cannot be "
                f"embedded: {error}"
            ) from error


def weights_hash(model: nn.Module) -> str:
    """sha256 of a model's weights by name: what a feature is a function of, with its transform."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def shortened(config: DictConfig) -> dict[str, int]:
    """The context length of a tokenizer that in training is longer than the tower, because a text
    policy shortens captions there: evaluation truncates.
    """
    length = OmegaConf.select(config, "model.text.context_length")
    ours = OmegaConf.select(config, "tokenizer.context_length")
    return {"context_length": length} if length and ours and length < ours else {}


def run_config(
    run: str | Path,
    checkpoint: str | Path | None = None,
    *,
    allow_foreign_targets: bool = False,
) -> DictConfig:
    """The resolved training config that `pipeline.train` left in the run directory, as it stood in
    the phase of the checkpoint (None: the newest). Raises ValueError for one that is not ours.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: {run} is no run directory; train one with `python -m "
            "pipeline.train recipe=... name=N` and give run=runs/N"
        )
    config = read_config(path, allow_foreign_targets=allow_foreign_targets)
    if config.get("phases"):
        found = Path(checkpoint) if checkpoint is not None else newest_checkpoint(run)
        config = phase_of(config, read_checkpoint(found).get("phase", ""))
    missing = [key for key in ("model", "tokenizer", "transform") if key not in config]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: not written by pipeline.train")
    return config


def newest_checkpoint(run: str | Path) -> Path:
    """last.ckpt, else the one with the largest step (the last number) in its name."""
    folder = Path(run) / "checkpoints"
    found = [path for path in folder.glob("*.ckpt") if path.is_file()]
    if not found:
        raise ValueError(
            f"no *.ckpt in {folder}: the run has not reached its first checkpoint; start it again "
            "under the same name, or give checkpoint=FILE"
        )

    def age(path: Path) -> tuple[bool, int, str]:
        numbers = re.findall(r"\d+", path.stem)
        return path.stem == "last", int(numbers[-1]) if numbers else -1, path.name

    return max(found, key=age)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint; nothing in the file is executed."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path} is missing or a folder: give a .ckpt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive raises whatever its broken part leads to
        raise ValueError(f"{path} is not a readable checkpoint: {error!r}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: not one of our checkpoints")
    return content


def read_weights(path: Path, *, weights: str = "trained") -> dict[str, Tensor]:
    """The model's state_dict out of a checkpoint.

    weights: "trained", or "ema" for the moving average where there is one of a parameter.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights}: one of {', '.join(WEIGHTS)}")
    content = read_checkpoint(path)
    found = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in content.get("state_dict", {}).items()
        if name.startswith(MODEL_PREFIX)
    }
    if not found:
        raise ValueError(
            f"{path} holds no weights named {MODEL_PREFIX}*: not one of our checkpoints"
        )
    if weights == "ema":
        average = content.get("callbacks", {}).get("Ema", {}).get("weights")
        if not average:
            raise ValueError(
                f"{path} holds no moving average: train with ema=constant or ema=cosine, or "
                "give weights=trained"
            )
        found |= average
    return found
