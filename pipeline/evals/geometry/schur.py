"""How much of the images' diversity their texts do not explain (arXiv:2412.18645).

Letters: N pairs, D width. Kernel: the cosine, so a feature is its unit vector.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

RIDGE = 1e-8


def schur_complement(
    image_embed: Tensor, text_embed: Tensor, *, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """(C_I.T, explained), both (D, D) float64 with C_I = their sum, of trace 1.

    C_I.T = C_I - C_IT (C_T + ridge)^-1 C_TI: the images' covariance that is left when the texts are
    known; positive semi-definite. It is 0 where images are a linear map of texts, and C_I where
    texts say nothing of them.
    """
    images, texts = (normalize(x.double(), dim=1) for x in (image_embed, text_embed))
    count = len(images)
    own, cross, other = (
        a.T @ b / count for a, b in ((images, images), (images, texts), (texts,) * 2)
    )
    eye = torch.eye(len(other), dtype=torch.float64)
    explained = cross @ torch.linalg.solve(other + ridge * eye, cross.T)
    explained = (explained + explained.T) / 2
    return own - explained, explained


def spectral_entropy(matrix: Tensor) -> float:
    """-sum of l log l over the eigenvalues of a positive semi-definite matrix, 0 log 0 = 0. Its exp
    is the Vendi score where the trace is 1.
    """
    values = torch.linalg.eigvalsh(matrix)
    values = values[values > 1e-15]
    return float(-(values * values.log()).sum())


def without_text(image_embed: Tensor, text_embed: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """(N, D) float64: unit images minus what the texts explain of them linearly; no covariance with
    the texts is left.
    """
    images, texts = (normalize(x.double(), dim=1) for x in (image_embed, text_embed))
    other = texts.T @ texts / len(texts) + ridge * torch.eye(texts.shape[1], dtype=torch.float64)
    return images - texts @ torch.linalg.solve(other, texts.T @ images / len(texts))
