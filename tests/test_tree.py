import pytest
import torch
from torch import nn

from bilevel_lightning import tree

A = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
B = {"b": torch.tensor([[10.0]]), "a": torch.tensor([4.0, 5.0])}


def test_arithmetic_goes_by_name():
    assert tree.dot(A, B) == 1 * 4 + 2 * 5 + 3 * 10
    assert tree.norm(A) == pytest.approx(14**0.5)
    for scale in (2.0, torch.tensor(2.0)):
        out = tree.axpy(scale, A, B)
        assert out["a"].tolist() == [6, 9]
        assert out["b"].tolist() == [[16]]
    assert tree.mean([A, B])["b"].tolist() == [[6.5]]
    assert tree.mean([A]) is A


def test_copies_and_leaves():
    module = nn.Linear(2, 1)
    values = tree.of(module)
    copy = tree.clone(values)
    assert tree.leaf(values)["weight"].data_ptr() == module.weight.data_ptr()
    tree.assign(module, {name: t + 1 for name, t in copy.items()})
    assert torch.equal(module.weight, copy["weight"] + 1)
    assert not copy["weight"].requires_grad
    assert tree.zeros_like(A)["a"].tolist() == [0, 0]


def test_gradients_of_what_is_not_used_are_zero():
    x, y = tree.leaf({"x": torch.ones(2)}), tree.leaf({"y": torch.ones(3)})
    g_x, g_y = tree.grad(3 * x["x"].sum(), x, y)
    assert g_x["x"].tolist() == [3, 3]
    assert g_y["y"].tolist() == [0, 0, 0]
    assert tree.grad(torch.ones(()), x)[0]["x"].tolist() == [0, 0]


def test_vjp():
    x = tree.leaf({"x": torch.tensor([1.0, 2.0])})
    outputs = [x["x"] ** 2, 5 * x["x"]]
    (product,) = tree.vjp(outputs, [torch.tensor([1.0, 10.0]), torch.ones(2)], x)
    assert product["x"].tolist() == [2 + 5, 40 + 5]
