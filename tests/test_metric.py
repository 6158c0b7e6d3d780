"""The metric of a space: its identities, and that it travels with the checkpoint into everything.

Against the papers' repositories: tests/parity, losses:euclip and losses:meru.
"""

import math

import pytest
import torch

from pipeline.evals.feature_file import FeatureFile, described
from pipeline.evals.retrieval import Retrieval
from pipeline.evals.trained import TrainedClip
from pipeline.formats.features import Features
from pipeline.formats.open_clip import OpenClip
from pipeline.formats.transformers import Transformers
from pipeline.losses.entailment import EntailmentLoss
from pipeline.losses.features import PairFeatures
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss
from pipeline.metric import Arc, Cosine, Euclidean, Lorentz, unit_norm
from pipeline.shards import records
from pipeline.tracking.metrics import read_metrics

ONE = torch.tensor(1.0)
METRICS = [
    Cosine(),
    Arc(),
    Euclidean(),
    Euclidean(squared=False),
    *(Lorentz(kind=kind) for kind in ("distance", "inner", "squared")),
]
NAMES = [metric.name for metric in METRICS]
CHOICES = {
    "arc": "metric=arc",
    "euclidean_squared": "metric=euclidean",
    "lorentz_distance": "metric=lorentz",
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(metric, image, text, scale=1.0):
    return PairFeatures(
        image_embed=image,
        text_embed=text,
        logit_scale=torch.tensor(scale, dtype=image.dtype),
        metric=metric,
        curvature=ONE,
    )


def test_squared_distances_on_the_sphere_are_cosines_at_twice_the_scale():
    image, text = unit_norm(normal(9, 6)), unit_norm(normal(9, 6, seed=1))
    one = SoftmaxLoss()(features(Euclidean(), image, text, scale=7.0))
    other = SoftmaxLoss()(features(Cosine(), image, text, scale=14.0))
    torch.testing.assert_close(one, other, atol=1e-14, rtol=0)


def test_a_flat_hyperboloid_is_euclidean():
    x, y = normal(5, 4), normal(7, 4, seed=1)
    small = torch.tensor(1e-7, dtype=torch.float64)
    for kind, squared in (("distance", False), ("squared", True)):
        curved = Lorentz(kind=kind).similarity(x, y, small)
        torch.testing.assert_close(
            curved, Euclidean(squared=squared).similarity(x, y), rtol=1e-5, atol=0
        )


def test_distances_are_a_metrics():
    """Symmetric, nothing to oneself, and no detour is shorter."""
    x = normal(12, 5)
    for metric in (Euclidean(squared=False), Lorentz(), Arc()):
        placed = unit_norm(x) if isinstance(metric, Arc) else x
        distance = -metric.similarity(placed, placed, ONE)
        torch.testing.assert_close(distance, distance.T)
        assert distance.diagonal().abs().max() < 2e-4  # MERU's guard of acosh at 1
        detour = distance[:, :, None] + distance[None, :, :]
        assert (distance[:, None, :] <= detour + 1e-9).all()


def test_lifted_points_are_on_the_hyperboloid():
    c = torch.tensor(2.5, dtype=torch.float64)
    x, time = Lorentz().lift(normal(20, 6), c)
    torch.testing.assert_close(x.square().sum(-1) - time.square(), (-1 / c).expand(20))
    # the distance to the root is the norm of the tangent vector
    root, u = torch.zeros(1, 6, dtype=torch.float64), normal(20, 6)
    found = -Lorentz().similarity(u, root, c).flatten()
    torch.testing.assert_close(found, u.norm(dim=1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("metric", METRICS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_where_embeddings_are_equal_or_zero(metric, dtype):
    raw = normal(6, 8, dtype=torch.float32)
    raw[2:4] = raw[0]
    raw[5] = 0 if metric.name not in ("cosine", "arc") else raw[5]
    image = raw.to(dtype).requires_grad_()
    scale, curvature = (torch.tensor(2.0, requires_grad=True) for _ in range(2))
    given = PairFeatures(
        image_embed=metric.place(image),
        text_embed=metric.place(image),
        logit_scale=scale,
        metric=metric,
        curvature=curvature,
    )
    loss = SoftmaxLoss()(given)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.isfinite() and image.grad.isfinite().all() and scale.grad.isfinite()
    assert metric.curved == (curvature.grad is not None and bool(curvature.grad.isfinite()))


@pytest.mark.parametrize("metric", METRICS, ids=NAMES)
def test_far_apart_is_finite(metric):
    x = (1e3 * normal(4, 8, dtype=torch.float32)).requires_grad_()
    found = metric.similarity(metric.place(x), metric.place(-x), ONE)
    found.sum().backward()
    assert found.isfinite().all() and x.grad.isfinite().all()


def test_the_penalty_is_nothing_exactly_inside_the_cone():
    for metric in (Euclidean(), Lorentz()):
        text = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.05, 0.0]], dtype=torch.float64)
        # straight behind the apex; to its side; anywhere, of an apex within the radius
        image = torch.tensor([[2.0, 0.0], [0.5, 1.0], [0.2, 0.1]], dtype=torch.float64)
        angle, aperture = metric.cone(text, image, ONE, 0.1, 1e-8)
        assert angle[0] < 1e-3 < aperture[0] < angle[1]
        assert aperture[2] == pytest.approx(math.pi / 2, abs=1e-3)
        term = EntailmentLoss()
        assert term(features(metric, image[:1], text[:1])) == 0
        expected = (angle[1] - aperture[1]) / 3
        torch.testing.assert_close(term(features(metric, image, text)), expected)
    with pytest.raises(ValueError, match="cones and model.metric is cosine: set metric=euclidean"):
        EntailmentLoss()(features(Cosine(), image, text))
    with pytest.raises(ValueError, match=r"min_radius=0"):
        EntailmentLoss(min_radius=0)


@pytest.mark.parametrize("term", [TiledSoftmaxLoss(), TiledSigmoidLoss()])
def test_tiled_losses_refuse_what_is_no_inner_product(term):
    with pytest.raises(ValueError, match=r"loss=tiled_(\w+) .* lorentz_distance: set loss=\1$"):
        term(features(Lorentz(), normal(4, 3), normal(4, 3)))


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"model\.metric\.kind=x"):
        Lorentz(kind="x")
    with pytest.raises(ValueError, match=r"init_curvature=20: in \[0\.1, 10\.0\]"):
        Lorentz(init_curvature=20)


@pytest.fixture(
    scope="module",
    params=[pytest.param("arc", marks=pytest.mark.slow), "euclidean_squared", "lorentz_distance"],
)
def run(request, data, tmp_path_factory, train):
    """(name of the metric, a run trained with it)."""
    folder = tmp_path_factory.mktemp("runs")
    loss = (
        []
        if request.param == "arc"
        else ["loss=[softmax,entailment]", "+loss_weights.entailment=0.2"]
    )
    train(data, folder, "n", CHOICES[request.param], *loss)
    return request.param, folder / "n"


def test_it_is_trained_logged_and_bounded(run):
    name, folder = run
    rows = read_metrics(folder)
    assert rows[-1]["train/softmax"] < rows[0]["train/softmax"]
    assert ("train/curvature" in rows[-1]) == name.startswith("lorentz")
    if name.startswith("lorentz"):
        assert 0.1 <= rows[-1]["train/curvature"] <= 10 and rows[-1]["train/curvature"] != 1
        weights = TrainedClip.load(folder, device="cpu").model
        start = -0.5 * math.log(weights.embed_dim)
        for factor in (weights.log_image_factor, weights.log_text_factor):
            assert factor.item() != start and factor.item() <= 0


def test_evaluation_and_feature_files_use_it(run, data, tmp_path):
    name, folder = run
    trained = TrainedClip.load(folder, device="cpu")
    pairs = list(records(data / "shards"))
    images = trained.image_embed([pair.image for pair in pairs])
    texts = trained.text_embed([pair.caption for pair in pairs])
    assert torch.allclose(images.norm(dim=1), torch.ones(len(images))) == (name == "arc")
    near = trained.similarity(images, texts)
    curvature = trained.model.curvature
    expected = trained.metric.similarity(images, texts, curvature)
    torch.testing.assert_close(near, expected.detach())
    found = Retrieval(data=str(data / "shards")).run(trained)
    place = (near > near.diagonal()[:, None]).sum(1)
    assert found["image_to_text_r_at_5"] == pytest.approx(
        float((place < 5).double().mean()), abs=0.02
    )
    if name != "arc":  # which orders as the cosine does
        trained.similarity = lambda a, b: unit_norm(a) @ unit_norm(b).T
        assert Retrieval(data=str(data / "shards")).run(trained) != found
        trained = TrainedClip.load(folder, device="cpu")
    Features(shards=str(data / "shards")).write(trained, tmp_path / "f")
    made_by = described(FeatureFile(tmp_path / "f").files[0])
    assert made_by["metric"] == name and made_by["normalised"] == (name == "arc")
    assert ("curvature" in made_by) == name.startswith("lorentz")


def test_an_index_orders_as_the_metric_does_or_is_refused(run, data, tmp_path):
    faiss = pytest.importorskip("faiss")
    name, folder = run
    trained = TrainedClip.load(folder, device="cpu")
    export = Features(shards=str(data / "shards"), form="faiss")
    if name.startswith("lorentz"):
        with pytest.raises(ValueError, match=r"no index of model\.metric = lorentz_distance"):
            export.write(trained, tmp_path / "f")
        return
    export.write(trained, tmp_path / "f")
    index = faiss.read_index(str(tmp_path / "f" / "image_embed.faiss"))
    _, embed = FeatureFile(tmp_path / "f").embeds("image_embed")
    _, text = FeatureFile(tmp_path / "f").embeds("text_embed")
    _, found = index.search(text.numpy(), 3)
    expected = trained.similarity(text, embed).topk(3).indices
    assert (torch.from_numpy(found) == expected).double().mean() > 0.95  # ties


def test_what_loads_elsewhere_compares_by_cosine_so_it_is_refused(run, tmp_path):
    name, folder = run
    trained = TrainedClip.load(folder, device="cpu")
    for kind in (OpenClip, Transformers):
        with pytest.raises(ValueError, match=rf"model\.metric = {name}.*format=features"):
            kind().write(trained, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_as_one(data, tmp_path, train):
    words = [
        "metric=lorentz",
        "loss=[softmax,entailment]",
        "micro_batch_size=5",
    ]
    train(data, tmp_path, "one", *words)
    train(data, tmp_path, "two", *words, "trainer.devices=2", "trainer.strategy=ddp")
    for one, two in zip(*(read_metrics(tmp_path / n) for n in ("one", "two")), strict=True):
        for key in ("train/loss", "train/curvature", "train/grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-4)
