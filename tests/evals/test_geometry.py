"""Identities of the geometry card's formulas, and clouds whose shape is planted."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, ndcg_score
from torch.nn.functional import normalize

from pipeline.evals.geometry.card import Geometry, geometry_metrics
from pipeline.evals.geometry.cka import cka, matched, unbiased_hsic
from pipeline.evals.geometry.gap import (
    alignment,
    conformity,
    conformity_of_mean,
    cross_uniformity,
    effective_rank,
    linear_separability,
    modality_gap,
    uniformity,
)
from pipeline.evals.geometry.ideal_words import ideal_words, projector_without, residual_share
from pipeline.evals.geometry.mixed import average_precision, ndcg, without_gap
from pipeline.evals.geometry.schur import schur_complement, spectral_entropy, without_text
from pipeline.evals.geometry.whitening import Whitening
from pipeline.evals.trained import TrainedClip
from pipeline.shards import Record, write_manifest, write_shard
from pipeline.trainer.checkpoints import Checkpoints


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return normalize(normal(*shape, seed=seed), dim=-1)


def rotation(width, seed=0):
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


def test_gap_and_alignment_by_hand():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert modality_gap(image, text) == pytest.approx(math.sqrt(0.5))  # (0.5, 0.5) and (0, 0)
    assert alignment(image, text) == pytest.approx(math.sqrt(2) / 2)
    assert alignment(image, image) == 0 == modality_gap(image, image)


def test_uniformity_of_antipodes_is_minus_8():
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(poles) == pytest.approx(-8, abs=1e-12)
    assert cross_uniformity(poles, poles) == pytest.approx(-8, abs=1e-12)
    assert uniformity(torch.ones(5, 3)) == 0
    x, y = unit(20, 4), unit(20, 4, seed=1)
    pairs = [(i, j) for i in range(20) for j in range(20)]
    inner = [math.exp(-2 * float((x[i] - x[j]).square().sum())) for i, j in pairs if i < j]
    assert uniformity(x) == pytest.approx(math.log(np.mean(inner)))
    cross = [math.exp(-2 * float((x[i] - y[j]).square().sum())) for i, j in pairs if i != j]
    assert cross_uniformity(x, y) == pytest.approx(math.log(np.mean(cross)))


def test_effective_rank_counts_equal_directions():
    # four directions of equal length, each with its opposite: centred, of equal spread
    corners = torch.cat([torch.eye(4, 7), -torch.eye(4, 7)])
    assert effective_rank(corners) == pytest.approx(4)
    line = torch.linspace(-1, 1, 9)[:, None] * torch.eye(1, 7) + 3
    assert effective_rank(line) == pytest.approx(1)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_conformity_of_the_mean_is_exact(shift):
    x = normal(50, 8) + shift
    rows = normalize(x, dim=1)
    brute = [np.mean([float(rows[i] @ rows[j]) for j in range(50) if j != i]) for i in range(50)]
    torch.testing.assert_close(conformity(x), torch.tensor(brute), atol=1e-12, rtol=0)
    torch.testing.assert_close(conformity_of_mean(x), conformity(x), atol=1e-12, rtol=0)


def test_two_shells_are_separated_by_a_plane_and_one_is_not():
    cloud, other = unit(400, 16), unit(400, 16, seed=1)
    shift = 3 * torch.eye(1, 16)
    assert linear_separability(cloud + shift, other - shift) == 1
    assert linear_separability(cloud, other) == pytest.approx(0.5, abs=0.08)
    few = unit(10, 64), unit(10, 64, seed=1)  # fewer rows than dimensions
    assert 0 <= linear_separability(*few) <= 1


def test_whitening_makes_the_covariance_the_identity():
    x = normal(500, 6) @ normal(6, 6, seed=1) + 5
    whitening = Whitening.of(x)
    y = whitening(x)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(6).double(), atol=1e-9, rtol=0)
    # mean of |y|^2 = D (n - 1) / n
    assert float(y.square().sum(1).mean()) == pytest.approx(6 * 499 / 500, rel=1e-12)
    torch.testing.assert_close(whitening.inverse(y), x, atol=1e-9, rtol=0)
    assert whitening.shrinkage == 0
    expected = scipy.stats.multivariate_normal(np.zeros(6), np.eye(6)).logpdf(y.numpy())
    np.testing.assert_allclose(whitening.log_likelihood(x).numpy(), expected, atol=1e-9)


def test_the_likelihood_ranks_as_the_planted_density():
    mixing, centre = normal(5, 5, seed=2), normal(5, seed=3)
    x = normal(2000, 5) @ mixing + centre
    truth = scipy.stats.multivariate_normal(centre.numpy(), (mixing.T @ mixing).numpy())
    # the very Gaussian: a set whose mean and covariance are exactly its own
    exact = Whitening(centre, torch.linalg.inv(mixing), 0.0)
    ranked = scipy.stats.spearmanr(exact.log_likelihood(x).numpy(), truth.logpdf(x.numpy()))
    assert ranked.statistic == pytest.approx(1, abs=1e-12)
    fitted = Whitening.of(x).log_likelihood(x)
    assert scipy.stats.spearmanr(fitted.numpy(), truth.logpdf(x.numpy())).statistic > 0.99


def test_fewer_rows_than_dimensions_are_shrunk_and_said_so():
    few = normal(5, 8)
    with pytest.raises(ValueError, match="5 rows of width 8 has no inverse"):
        Whitening.of(few, shrinkage=0.0)
    assert Whitening.of(few).shrinkage == 0.1
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        Whitening.of(few[:1])


def test_schur_splits_the_trace_and_is_positive():
    image, text = unit(200, 6), unit(200, 5, seed=1)
    left, explained = schur_complement(image, text)
    assert float(left.trace() + explained.trace()) == pytest.approx(1, abs=1e-12)
    whole = image.T @ image / 200
    torch.testing.assert_close(left + explained, whole, atol=1e-12, rtol=0)
    assert float(torch.linalg.eigvalsh(left)[0]) > -1e-12
    # the classical formula
    cross, other = image.T @ text / 200, text.T @ text / 200
    direct = whole - cross @ torch.linalg.inv(other + 1e-8 * torch.eye(5)) @ cross.T
    torch.testing.assert_close(left, direct, atol=1e-10, rtol=0)


def test_schur_of_texts_that_say_all_and_nothing():
    text = unit(300, 6)
    left, _ = schur_complement(text @ rotation(6), text)
    assert abs(spectral_entropy(left)) < 1e-4  # a linear map of the texts
    image = unit(4, 3)
    signed = torch.tensor([1.0, -1.0]).double()
    # every image once with each of two opposite texts: no correlation at all
    images, texts = image.repeat_interleave(2, 0), signed.repeat(4)[:, None] * torch.eye(1, 3)
    left, explained = schur_complement(images, texts)
    torch.testing.assert_close(left, images.T @ images / 8, atol=1e-12, rtol=0)
    assert float(explained.abs().max()) < 1e-12


def test_entropy_is_that_of_the_eigenvalues():
    assert spectral_entropy(torch.eye(4).double() / 4) == pytest.approx(math.log(4))
    assert spectral_entropy(torch.diag(torch.tensor([1.0, 0.0]).double())) == 0


def test_what_the_texts_explain_can_be_taken_out():
    text = unit(100, 5)
    image = normalize(text @ normal(5, 7, seed=2) + 0.3 * normal(100, 7, seed=3), dim=1)
    left = without_text(image, text)
    assert float((left.T @ text / 100).abs().max()) < 1e-7
    assert float((image.T @ text / 100).abs().max()) > 0.05


def test_cka_does_not_see_rotation_scale_and_shift():
    x = normal(100, 6)
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(x, 3 * x @ rotation(6) + 5) == pytest.approx(1, abs=1e-12)
    stretched = x @ torch.diag(torch.tensor([10.0, 1, 1, 1, 1, 1]).double())
    assert cka(x, stretched) < 0.9
    y = normal(100, 4, seed=1)
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    by_kernels = float((k * m).sum() / (k.norm() * m.norm()))
    assert cka(x, y) == pytest.approx(by_kernels, abs=1e-12)
    assert cka(x, torch.zeros(100, 2)) == 0


def test_the_unbiased_hsic_of_minibatches_is_that_of_all():
    """Over all subsets of 4 of 8 items, exactly: that is what unbiased means."""
    x, y = normal(8, 3), normal(8, 2, seed=1)
    subsets = torch.combinations(torch.arange(8), 4)
    mean = np.mean([unbiased_hsic(x[rows], y[rows]) for rows in subsets])
    assert mean == pytest.approx(unbiased_hsic(x, y), abs=1e-12)
    with pytest.raises(ValueError, match="3 items"):
        unbiased_hsic(x[:3], y[:3])


def test_a_planted_permutation_is_found_again():
    x = normal(30, 8)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    known = torch.stack([order[:8], torch.arange(8)], dim=1)
    found = matched(x, (x @ rotation(8))[order], known)
    assert torch.equal(order[found], torch.arange(30))


def test_ideal_words_are_the_least_squares_solution():
    x = normal(3, 4, 5)
    centre, attributes, objects = ideal_words(x)
    design = np.array(
        [[1, *np.eye(3)[a], *np.eye(4)[b]] for a in range(3) for b in range(4)], dtype=float
    )
    solution, *_ = np.linalg.lstsq(design, x.reshape(12, 5).numpy(), rcond=None)
    fitted = (centre + attributes[:, None] + objects[None, :]).reshape(12, 5)
    np.testing.assert_allclose(fitted.numpy(), design @ solution, atol=1e-8)
    assert float(attributes.sum(0).abs().max()) < 1e-12
    additive = normal(1, 1, 5, seed=1) + normal(3, 1, 5, seed=2) + normal(1, 4, 5, seed=3)
    assert residual_share(additive) < 1e-24
    assert residual_share(x) > 0.2


def test_a_direction_is_removed_once():
    directions = torch.stack([normal(6), 2 * normal(6), normal(6, seed=1)])
    projector = projector_without(directions)
    torch.testing.assert_close(projector @ projector, projector, atol=1e-12, rtol=0)
    assert float((projector @ directions.T).abs().max()) < 1e-12
    assert float(projector.trace()) == pytest.approx(4)  # two directions, one of them twice


def test_search_over_both_modalities():
    """A corpus of images and of texts with an offset of each: without the gap it is as one."""
    meaning, queries = unit(40, 16), unit(40, 16) + 0
    offset = torch.eye(2, 16) * 3
    image, text = meaning[:20] + offset[0], meaning[20:] + offset[1]
    corpus = normalize(torch.cat([image, text]), dim=1)
    asked = normalize(queries + offset[1], dim=1)  # queries are texts
    gain = torch.eye(40).double()
    with_gap = ndcg(asked @ corpus.T, gain).mean()
    freed = torch.cat(
        [
            without_gap(corpus[:20], corpus[:20].mean(0)),
            without_gap(corpus[20:], corpus[20:].mean(0)),
        ]
    )
    free = ndcg(without_gap(asked, asked.mean(0)) @ freed.T, gain).mean()
    oracle = ndcg(queries @ meaning.T, gain).mean()
    assert float(oracle) == 1
    assert with_gap < 0.8 < 0.95 < free


def test_ndcg_and_average_precision_are_scikit_learns():
    scores = normal(20, 15)
    gain = torch.randint(4, (20, 15), generator=torch.Generator().manual_seed(1)).double()
    for at in (3, 10, 99):
        theirs = [
            ndcg_score([g], [s], k=at) for g, s in zip(gain.numpy(), scores.numpy(), strict=True)
        ]
        np.testing.assert_allclose(ndcg(scores, gain, at=at).numpy(), theirs, atol=1e-12)
    # by hand: gains 3, 0, 2 in the order of the scores
    by_hand = (3 + 2 / math.log2(4)) / (3 + 2 / math.log2(3))
    found = ndcg(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[3.0, 0.0, 2.0]]))
    assert float(found) == pytest.approx(by_hand)
    relevant = gain > 1
    theirs = [
        average_precision_score(r, s) for r, s in zip(relevant.numpy(), scores.numpy(), strict=True)
    ]
    np.testing.assert_allclose(average_precision(scores, relevant).numpy(), theirs, atol=1e-12)
    # all equal: the worst order
    first = torch.tensor([[True, False, False, False]])
    assert float(average_precision(torch.zeros(1, 4), first)) == 0.25
    assert float(ndcg(torch.zeros(1, 4), first.double())) < 0.5


@pytest.fixture
def pairs(tmp_path, make_picture):
    made = [Record(f"{n:02}", make_picture(n), "png", f"thing {n}", {}) for n in range(40)]
    entry = write_shard(tmp_path / "shards", "shard-000000", made)
    write_manifest(tmp_path / "shards", {"num_samples": 40, "shards": [entry], "steps": []})
    return str(tmp_path / "shards")


def test_the_card_of_a_run(pairs, tiny_run, tmp_path):
    trained = TrainedClip.load(tiny_run, device="cpu")
    out = str(tmp_path / "a.safetensors")
    found = Geometry(data=pairs, out=out).run(trained)
    assert all(math.isfinite(value) for value in found.values())
    assert found["image_conformity"] == pytest.approx(found["image_conformity_of_mean"], abs=1e-9)
    assert found["image_whitening_shrinkage"] == 0
    again = Geometry(data=pairs, other=out, batch_size=7).run(trained)
    assert again.pop("image_cka") == pytest.approx(1) == again.pop("text_cka")
    assert again == pytest.approx(found, abs=1e-4)
    images = trained.image_projected([record.image for record in _records(pairs)])
    embeds = trained.image_embed([record.image for record in _records(pairs)])
    torch.testing.assert_close(normalize(images, dim=1), embeds, atol=1e-6, rtol=0)


def _records(folder):
    from pipeline.shards import records

    return list(records(folder))


def test_the_numbers_of_a_gap_that_is_planted():
    cloud = normal(300, 8)
    images, texts = cloud + 4 * torch.eye(1, 8), cloud - 4 * torch.eye(1, 8)
    apart, _ = geometry_metrics(images, texts)
    together, kept = geometry_metrics(cloud, cloud)
    assert apart["gap"] > 1.5 and apart["linear_separability"] > 0.98
    assert together["gap"] == 0 == together["alignment"]
    assert together["image_text_cka"] == pytest.approx(1)
    assert together["image_variance_given_text"] == pytest.approx(0, abs=1e-6)
    assert set(kept) == {
        *("image_embed", "text_embed", "image_mean", "text_mean"),
        *("image_whitening", "text_whitening"),
    }


def test_what_cannot_be_compared(pairs, tiny_run, tmp_path):
    trained = TrainedClip.load(tiny_run, device="cpu")
    with pytest.raises(ValueError, match="at least 4"):
        Geometry(data=pairs, max_pairs=3)
    Geometry(data=pairs, max_pairs=20, out=str(tmp_path / "a")).run(trained)
    with pytest.raises(ValueError, match="of 20 pairs, here are 40"):
        Geometry(data=pairs, other=str(tmp_path / "a")).run(trained)
    with pytest.raises(ValueError, match=r"not left by eval\.geometry\.out"):
        Geometry(data=pairs, other=str(tmp_path / "no")).run(trained)


def test_whitening_lies_beside_its_checkpoint_and_goes_with_it(pairs, tmp_path, run):
    trained = TrainedClip.load(run, device="cpu")
    Geometry(data=pairs, out="beside").run(trained)
    (file,) = (run / "checkpoints").glob("*.geometry.safetensors")
    assert file.name == "step-10.geometry.safetensors"
    assert load_file(file)["image_whitening"].shape == (12, 12)
    callback = Checkpoints(directory=run / "checkpoints", every_steps=1, keep=1)
    callback._forget_companions()
    assert file.exists()
    trained.checkpoint.unlink()
    callback._forget_companions()
    assert not file.exists()
