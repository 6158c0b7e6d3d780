"""Calibration of known probabilities."""

import math

import pytest
import torch

from pipeline.evals.calibration import (
    Calibration,
    calibration_metrics,
    expected_calibration_error,
    temperature,
)
from tests.evals.test_zero_shot import Known, write_set


def two_classes(confidence):
    """Logits of two classes; the first has this probability."""
    return torch.stack([torch.logit(confidence), torch.zeros_like(confidence)], dim=1)


def brute_force(logits, labels, bins):
    total = 0.0
    probabilities = logits.softmax(1)
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        rows = [
            i
            for i, row in enumerate(probabilities)
            if low < row.max() <= high or row.max() == low == 0
        ]
        if rows:
            hit = sum(float(probabilities[i].argmax() == labels[i]) for i in rows) / len(rows)
            sure = sum(float(probabilities[i].max()) for i in rows) / len(rows)
            total += len(rows) / len(labels) * abs(hit - sure)
    return total


def test_always_right_at_half_confidence_is_half():
    logits = torch.zeros(10, 2, dtype=torch.float64)
    found = logits.argmax(1)
    assert expected_calibration_error(logits, found) == 0.5


def test_it_is_the_sum_over_bins():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(5, (500,), generator=generator)
    for bins in (1, 7, 15):
        ours = expected_calibration_error(logits, labels, bins=bins)
        assert ours == pytest.approx(brute_force(logits, labels, bins), abs=1e-12)


def test_a_calibrated_simulator_has_none_and_needs_no_temperature():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(200_000, generator=generator, dtype=torch.float64)
    right = torch.rand(200_000, generator=generator, dtype=torch.float64) < confidence
    found = calibration_metrics(two_classes(confidence), (~right).long())
    assert found["ece"] < 0.005
    assert found["temperature"] == pytest.approx(1, abs=0.03)
    assert found["confidence"] == pytest.approx(found["top1"], abs=0.005)
    # three times as sure as it may be: the temperature takes it back
    sure = calibration_metrics(3 * two_classes(confidence), (~right).long())
    assert sure["temperature"] == pytest.approx(3, rel=0.03)
    assert sure["ece"] > 0.1 > 0.01 > sure["scaled_ece"]
    assert sure["top1"] == found["top1"]
    assert sure["scaled_nll"] < sure["nll"] < sure["nll"].high


def test_a_temperature_never_raises_the_loss_it_is_fitted_on():
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1.0, 1e4):
        logits = torch.randn(50, 4, generator=generator, dtype=torch.float64) * scale
        labels = torch.randint(4, (50,), generator=generator)
        losses = [
            torch.nn.functional.cross_entropy(logits / t, labels)
            for t in (1.0, temperature(logits, labels))
        ]
        assert losses[1] <= losses[0]


def test_the_task_scales_cosines(tmp_path):
    trained = Known(sees={3: 0})
    trained.logit_scale = 2.0
    found = Calibration(data=str(write_set(tmp_path))).run(trained)
    # of two odd images the first is right; each is sure with e^2 / (e^2 + 2)
    assert found["top1"] == 0.5
    assert found["confidence"] == pytest.approx(math.exp(2) / (math.exp(2) + 2))


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(ValueError, match="bins=0"):
        Calibration(data=str(tmp_path), bins=0)
    with pytest.raises(ValueError, match="1 image"):
        calibration_metrics(torch.zeros(1, 2), torch.zeros(1).long())
