"""What the stand-ins of these tests share with a CLIP: the cosine."""

from pipeline.metric import Cosine


class OnSphere:
    """An Embedder's metric."""

    metric = Cosine()
    similarity, centre = staticmethod(metric.similarity), staticmethod(metric.centre)
