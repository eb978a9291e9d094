"""Losses against numbers worked out by hand, and against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from graphprune.training.core.losses import (
    cross_entropy,
    divergence,
    relative_error,
    square_head,
    summed,
)

STUDENT = torch.tensor([[1.0, 2.0, 0.0]])
TEACHER = torch.tensor([[2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("temperature", "wanted"),
    # Of T = 1: p = (e², e, 1)/(e² + e + 1), and the logits differ by (1, -1, 0) with equal
    # normalisers, so that it is p0 - p1 = (e² - e)/(e² + e + 1).
    [(1.0, (math.e**2 - math.e) / (math.e**2 + math.e + 1)), (2.0, 0.398569)],
)
def test_divergence(temperature, wanted):
    assert float(divergence(STUDENT, TEACHER, temperature)) == pytest.approx(wanted, abs=1e-5)


def test_divergence_over_a_kept_vocabulary():
    """The teacher's distribution over what is kept adds up to one: tanh(1/2)."""
    found = divergence(torch.tensor([[1.0, 2.0]]), TEACHER[:, torch.tensor([0, 1])])
    assert float(found) == pytest.approx(math.tanh(0.5), abs=1e-6)


def test_divergence_does_not_shrink_with_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 49152, generator=generator) for _ in range(2))
    p = teacher.double().softmax(-1)
    wanted = (p * (teacher.double().log_softmax(-1) - student.double().log_softmax(-1))).sum()
    assert float(divergence(student, teacher)) == pytest.approx(float(wanted), rel=1e-4)


def test_cross_entropy_without_labels_is_zero():
    found = cross_entropy(torch.randn(3, 5), torch.full((3,), -100))
    assert float(found) == 0.0


def test_square_head_gives_each_token_its_own_scale():
    """1/2 and 5/4; the mean of squares over the mean of squares would be .9948."""
    student = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    teacher = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert float(square_head(student, teacher)) / 2 == pytest.approx(0.875, abs=1e-6)


def test_relative_error():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2, 2)
    # means of squares 2.5 and .5, in units of 2
    assert float(relative_error(student, teacher, 2.0)) == pytest.approx(1.5)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("head", [True, False])
def test_sums_in_parts_have_the_gradients_of_the_whole(size, head):
    generator = torch.Generator().manual_seed(1)
    rows, weight, bias = (
        torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_()
        for s in ((10, 4), (6, 4), (6,))
    )
    labels = torch.randint(0, 4, (10,), generator=generator)
    labels[2] = -100
    leaves = (rows, weight, bias) if head else (rows,)

    def part(logits, place):
        return F.cross_entropy(logits, labels[place], reduction="sum", ignore_index=-100)

    found = summed(rows, weight if head else None, bias if head else None, part, size)
    wanted = part(F.linear(rows, weight, bias) if head else rows, slice(None))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * wanted, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_sums_of_no_rows():
    rows = torch.randn(0, 4, requires_grad=True)
    found = summed(rows, None, None, lambda logits, place: logits.sum(), 8)
    found.backward()
    assert float(found) == 0.0
    assert rows.grad.shape == (0, 4)
