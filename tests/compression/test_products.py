"""Multiply-accumulates of functions, against loops that multiply two numbers at a time and count."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning.compression.costs.macs import count_macs


class Calls(nn.Module):
    """A network that is one function of its inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def counted(function, *inputs):
    return count_macs(Calls(function), inputs).dense


def contracted(equation, left, right):
    """A product of two tensors by loops over every index, and the number of multiplications."""
    (one, other), out = equation.split("->")[0].split(","), equation.split("->")[1]
    sizes = dict(zip(one + other, (*left.shape, *right.shape), strict=True))
    result, count = torch.zeros([sizes[letter] for letter in out]), 0
    for places in itertools.product(*(range(size) for size in sizes.values())):
        at = dict(zip(sizes, places, strict=True))
        factors = left[tuple(at[i] for i in one)], right[tuple(at[i] for i in other)]
        result[tuple(at[i] for i in out)] += factors[0] * factors[1]
        count += 1
    return result, count


PRODUCTS = {
    "linalg.matmul": (torch.linalg.matmul, "nk,km->nm", (3, 4), (4, 5)),
    "matmul by keywords": (lambda a, b: torch.matmul(input=a, other=b), "nk,km->nm", (3, 4), (4, 5)),
    "a batch": (torch.matmul, "bnk,bkm->bnm", (2, 3, 4), (2, 4, 5)),
    "a batch and a matrix": (torch.matmul, "bnk,km->bnm", (2, 3, 4), (4, 5)),
    "a matrix and a vector": (torch.matmul, "nk,k->n", (3, 4), (4,)),
    "two vectors": (torch.dot, "k,k->", (4,), (4,)),
    "@ from the right": (lambda a, b: Tensor.__rmatmul__(b, a), "nk,km->nm", (3, 4), (4, 5)),
    "inner": (torch.inner, "nk,mk->nm", (3, 4), (5, 4)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), "nij,ijm->nm", (2, 3, 4), (3, 4, 5)),
    "addmm_": (lambda a, b: torch.zeros(3, 5).addmm_(a, b), "nk,km->nm", (3, 4), (4, 5)),
    "addbmm": (lambda a, b: torch.addbmm(torch.zeros(3, 5), a, b), "bnk,bkm->nm", (2, 3, 4), (2, 4, 5)),
    "addmv": (lambda a, b: torch.addmv(torch.zeros(3), a, b), "nk,k->n", (3, 4), (4,)),
    "einsum with dots": (lambda a, b: torch.einsum("...nk,...mk->...nm", a, b), "bnk,bmk->bnm", (2, 3, 4), (2, 5, 4)),
    "linear": (F.linear, "nk,mk->nm", (3, 4), (5, 4)),
    "conv_tbc": (lambda a, b: F.conv_tbc(a, b, torch.zeros(5)), "tbi,kio->tbo", (6, 2, 3), (1, 3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_counts_as_in_the_loop_by_whatever_function_it_comes(name):
    function, equation, *shapes = PRODUCTS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    wanted, count = contracted(equation, *inputs)
    torch.testing.assert_close(function(*inputs), wanted)
    assert counted(function, *inputs) == count
    inferring = torch.inference_mode()(function)
    assert counted(inferring, *inputs) == count


def test_several_products_count_in_the_order_in_which_they_are_computed():
    torch.manual_seed(0)
    a, b, c = torch.randn(2, 9), torch.randn(9, 3), torch.randn(3, 8)
    first, before = contracted("nk,km->nm", a, b)
    wanted, after = contracted("nk,km->nm", first, c)
    torch.testing.assert_close(torch.linalg.multi_dot([a, b, c]), wanted)
    assert counted(lambda *given: torch.linalg.multi_dot(given), a, b, c) == before + after
    assert counted(lambda *given: torch.einsum("ij,jk,kl->il", *given), a, b, c) == before + after

    x, y, weight = torch.randn(4, 3), torch.randn(4, 5), torch.randn(2, 3, 5)
    first, before = contracted("ni,oij->noj", x, weight)
    wanted, after = contracted("noj,nj->no", first, y)
    torch.testing.assert_close(F.bilinear(x, y, weight), wanted)
    assert counted(F.bilinear, x, y, weight) == before + after
    assert count_macs(nn.Bilinear(3, 5, 2), (x, y)).dense == before + after


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 2)])
def test_a_transposed_convolution_counts_as_in_the_loop(stride, groups):
    torch.manual_seed(0)
    inputs, weight = torch.randn(2, 4, 5), torch.randn(4, 3, 3)
    wanted, count = torch.zeros(2, 3 * groups, 4 * stride + 3), 0
    for n, i, t, o, k in itertools.product(range(2), range(4), range(5), range(3), range(3)):
        wanted[n, i // (4 // groups) * 3 + o, t * stride + k] += inputs[n, i, t] * weight[i, o, k]
        count += 1
    options = {"stride": stride, "groups": groups}
    torch.testing.assert_close(F.conv_transpose1d(inputs, weight, **options), wanted)
    assert counted(lambda x, w: F.conv_transpose1d(x, w, **options), inputs, weight) == count
    flat = counted(lambda x, w: F.conv_transpose2d(x, w, **options), inputs[:, :, None], weight[:, :, None])
    assert flat == count


def test_products_beside_layers_are_not_missed():
    class Gram(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, inputs):
            hidden = self.layer(inputs)
            return torch.linalg.matmul(hidden, hidden.mT)

    assert count_macs(Gram(), torch.zeros(2, 9, 16)).dense == 2 * 9 * 16 * 16 + 2 * 9 * 9 * 16 == 7200


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_as_a_function_counts_like_the_layer(need_weights):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2)
    inputs = torch.randn(7, 3, 8)

    def attention(x):
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight,
            layer.out_proj.bias, training=False, need_weights=need_weights,
        )[0]  # fmt: skip

    assert (
        counted(attention, inputs) == count_macs(layer, (inputs, inputs, inputs)).dense == 21 * 4 * 64 + 2 * 3 * 49 * 8
    )


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_of_ones_own_counts_like_torchs(kind):
    class Own(kind):
        def forward(self, inputs):
            return super().forward(inputs)[0]

    inputs = torch.zeros(7, 3, 5)
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        assert count_macs(Own(5, 6, **options), inputs).dense == count_macs(kind(5, 6, **options), inputs).dense


def test_a_layer_of_a_class_below_torchs_counts_what_it_computes():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(6, 4)
            self.down, self.up = nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.ones(4, 2))

        def forward(self, inputs):
            return super().forward(inputs) + inputs @ self.down.T @ self.up.T

    class Twice(nn.Conv1d):
        def _conv_forward(self, inputs, weight, bias):
            return super()._conv_forward(inputs, weight, bias) + super()._conv_forward(inputs, weight, bias)

    adapted = count_macs(nn.Sequential(Adapted()), torch.zeros(3, 6))
    assert adapted.by_module == {"0": 3 * (6 * 4 + 6 * 2 + 2 * 4)}
    assert count_macs(Twice(2, 3, 4), torch.zeros(1, 2, 9)).dense == 2 * 6 * 24


class Functional(nn.Module):
    """A weight of which a quarter is left, used by functions only."""

    def __init__(self, how):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.ones(8, 4))
        self.weight.data[2:] = 0

    def forward(self, inputs):
        return self.how(inputs, self.weight)


@pytest.mark.parametrize(
    "how",
    [
        F.linear,
        lambda x, w: x @ w.T,
        lambda x, w: x.double() @ w.double().mT,
        lambda x, w: F.conv1d(x[..., None], w[..., None]),
        lambda x, w: torch.einsum("nk,mk->nm", x, w),
        lambda x, w: x @ torch.cat([w, w]).T.contiguous(),
        lambda x, w: x @ w[:4].T + x @ w[4:].T,
    ],
    ids=["linear", "transposed", "cast", "conv", "einsum", "joined", "cut"],
)
def test_zeros_of_a_weight_are_seen_through_views_and_copies(how):
    found = count_macs(Functional(how), torch.ones(3, 4))
    assert found.effective * 4 == found.dense > 0
