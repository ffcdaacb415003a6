"""Half widths of confidence intervals."""

import pytest
import torch

from bilevel_lightning.interval import Interval


def filled(*parts):
    metric = Interval()
    for part in parts:
        metric.update(torch.tensor(part, dtype=torch.float64))
    return metric


def test_known_values():
    assert float(filled([1.0, 2.0, 3.0, 4.0]).compute()) == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2, abs=1e-12)
    assert float(filled([0.0, 1.0]).compute()) == pytest.approx(1.96 * 0.5, abs=1e-12)


def test_parts_are_one_sample():
    assert float(filled([1.0], [2.0, 3.0], [[4.0]]).compute()) == float(filled([1.0, 2.0, 3.0, 4.0]).compute())


@pytest.mark.parametrize("value", [0.3, [0.3], [[0.3]]])
def test_a_single_value_has_no_width(value):
    assert float(filled(value).compute()) == 0


def test_equal_values_have_no_width():
    assert float(filled([0.25, 0.25], [0.25]).compute()) == 0


def test_forward_gives_the_batch_and_keeps_all():
    metric = Interval()
    assert float(metric(torch.tensor([1.0, 2.0]))) == pytest.approx(0.98, rel=1e-6)
    assert float(metric(torch.tensor([5.0]))) == 0
    assert float(metric.compute()) == pytest.approx(1.96 * (13 / 9) ** 0.5, rel=1e-6)
    metric.reset()
    metric.update(torch.tensor([7.0, 9.0]))
    assert float(metric.compute()) == pytest.approx(1.96, rel=1e-6)


def test_values_keep_no_graph():
    metric = Interval()
    metric.update(torch.ones(2, requires_grad=True))
    assert not metric.values[0].requires_grad
    assert metric.state_dict() == {}
