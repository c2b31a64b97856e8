# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A matrix times a batch from the left: the same numbers, not copied, and only inside the modules that were named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optimum_ssm.calibration.left_product import uncopied_left_products


class Product(nn.Module):
    """What Mamba does: `weight @ x.transpose(1, 2)`, with x a slice of a wider tensor."""

    def __init__(self, inner: int = 6, outer: int = 10) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner))

    def forward(self, wide: Tensor) -> Tensor:
        return self.weight @ wide[..., : self.weight.shape[1]].transpose(1, 2)


@pytest.fixture
def wide() -> Tensor:
    return torch.randn(3, 7, 9)


def test_it_is_the_same_product_in_another_layout(wide: Tensor) -> None:
    module = Product()
    with torch.no_grad():
        expected = module(wide)
        with uncopied_left_products([module]):
            found = module(wide)
    assert expected.is_contiguous() and found.mT.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_are_torchs(wide: Tensor) -> None:
    module = Product()
    with uncopied_left_products([module]):
        found = module(wide)
        found.square().sum().backward()
    gradient, module.weight.grad = module.weight.grad, None
    module(wide).square().sum().backward()
    assert found.is_contiguous()
    torch.testing.assert_close(gradient, module.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "product",
    [
        lambda w: w[0] @ w[0].T,
        lambda w: w @ w[0].T,
        lambda w: w[0].T @ w,  # its inner elements are not side by side
        lambda w: w[0] @ torch.ones(9),
        lambda w: w @ w.mT,
        lambda w: torch.matmul(w[0], w.mT),
        lambda w: w[0].matmul(other=w.mT),
    ],
)
def test_other_products_are_torchs(product: Callable[[Tensor], Tensor], wide: Tensor) -> None:
    module = nn.Identity()
    module.forward = product
    with torch.no_grad(), uncopied_left_products([module]):
        torch.testing.assert_close(module(wide), product(wide), rtol=0, atol=0)


def test_it_ends_with_the_forward_also_when_that_fails(wide: Tensor) -> None:
    module, other = Product(), Product()
    with torch.no_grad(), uncopied_left_products([module]):
        with pytest.raises(RuntimeError):
            module(wide[..., :3])
        assert other(wide).is_contiguous()  # the mode is gone
        hook = module.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
        with pytest.raises(ZeroDivisionError):  # before it began
            module(wide)
        hook.remove()
        assert module(wide).mT.is_contiguous()
    with torch.no_grad():
        assert module(wide).is_contiguous()


def test_it_ends_when_a_forward_is_interrupted(wide: Tensor) -> None:
    """torch calls no hooks then, not even those that it always calls."""

    class Interrupted(Product):
        def forward(self, wide: Tensor) -> Tensor:
            raise KeyboardInterrupt

    module = Interrupted()
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt), uncopied_left_products([module]):
            module(wide)
        assert Product()(wide).is_contiguous()
    assert not module._forward_hooks and not module._forward_pre_hooks
