import pytest
import torch
from scipy.sparse import random as random_sparse
from torch.nn.functional import cross_entropy

from bilevel_lightning import GradientDescent, hypergradient, tree
from bilevel_lightning.datamodules.selection import SparseRows
from bilevel_lightning.sparse import Sparse, matmul
from bilevel_lightning.tasks import PenaltySelection


@pytest.fixture
def rows():
    return SparseRows(random_sparse(12, 30, density=0.2, format="csr", random_state=0))


def dense(rows):
    return torch.from_numpy(rows.matrix.toarray())


def test_gathered_rows_are_those_of_the_matrix(rows):
    index = torch.tensor([7, 2, 2, 11])
    for key in (index, slice(1, 12, 3), slice(None)):
        found = rows[key]
        assert isinstance(found, Sparse)
        torch.testing.assert_close(found.rows.to_dense(), dense(rows)[key])
        torch.testing.assert_close(found.columns.to_dense(), dense(rows)[key].T)
    assert rows[:].rows is rows[:].rows
    assert rows.to("cpu") is rows


def test_three_derivatives_are_those_of_the_dense_product(rows):
    weight = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(12) % 3
    direction = weight.detach().cos()

    def derivatives(inputs):
        value = cross_entropy(matmul(inputs, weight), labels)
        found = [value]
        for _ in range(3):
            found.append(torch.autograd.grad(value, weight, create_graph=True)[0])
            value = (found[-1] * direction).sum()
        return found

    for sparse, expected in zip(derivatives(rows[:]), derivatives(dense(rows)), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(sparse, expected, rtol=1e-12, atol=1e-14)


def test_several_weights_side_by_side(rows):
    weights = torch.randn(4, 30, 3, dtype=torch.float64)
    for dim in range(3):
        found = torch.vmap(lambda w: matmul(rows[:], w), in_dims=dim)(weights.movedim(0, dim))
        torch.testing.assert_close(found, dense(rows) @ weights)


@pytest.mark.parametrize("method", ["AIDCG", "RHG", "ForwardHG", "F2SA"])
def test_hypergradients_are_those_of_dense_inputs(rows, method):
    labels = torch.arange(12) % 2
    task = PenaltySelection(30).double()
    found = []
    for inputs in (rows[:], dense(rows)):
        batch = {"lower": (inputs, labels), "upper": (inputs, 1 - labels)}
        settings = {"dynamics": GradientDescent(0.3), "lower_steps": 15}
        found.append(hypergradient(task, batch=batch, method=method, **settings))
    assert tree.norm(found[1]) > 1e-6
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)
