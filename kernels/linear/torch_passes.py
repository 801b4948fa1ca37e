"""The passes of linear attention in matrix products, on every device."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class TorchPasses:
    """The passes over tokens in matrix products, a chunk of tokens at a time.

    `x` are queries or keys, and F = f(x) are their features. `y` is multiplied with the features.
    Both are `(batch, tokens, heads, head_dim)`. `x_factor` and `y_factor` are factors per token,
    `(batch, tokens, heads)`, or None. Tokens where `mask` is false are left out. R is the rotation
    of `ops`.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def collect(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        rotation: torch.Tensor | None,
        mask: torch.Tensor | None,
        y_factor: torch.Tensor | None = None,
        x_factor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums over tokens of R F (y_factor y)^T and of x_factor F."""
        batch, _, heads, dim = x.shape
        dtype = wide(x.dtype)
        state = x.new_zeros(batch, heads, dim, dim, dtype=dtype)
        total = x.new_zeros(batch, heads, dim, dtype=dtype)
        for part in self._parts(x):
            features = _features(_unrotated(x[:, part], rotation, part))
            right = y[:, part].to(dtype)
            if y_factor is not None:
                right = right * y_factor[:, part, :, None]
            if mask is not None:
                hidden = ~mask[:, part, None, None]
                features, right = features.masked_fill(hidden, 0), right.masked_fill(hidden, 0)
            weighted = features if x_factor is None else features * x_factor[:, part, :, None]
            total += weighted.sum(1)
            rotated = _rotated(features, rotation, part)
            state += torch.einsum("bthd,bthe->bhde", rotated, right)
        return state, total

    def apply(
        self,
        x: torch.Tensor,
        state: torch.Tensor,
        mean: torch.Tensor | None,
        eps: float,
        rotation: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """R F times the state, in the dtype of x, divided by F . mean + eps if there is a mean.

        Returns:
            The product, and one over the denominator, `(batch, tokens, heads)`.
        """
        out = x.new_empty(x.shape)
        inverse = None if mean is None else x.new_empty(x.shape[:3], dtype=state.dtype)
        for part in self._parts(x):
            features = _features(_unrotated(x[:, part], rotation, part))
            if mask is not None:
                features = features.masked_fill(~mask[:, part, None, None], 0)
            rotated = _rotated(features, rotation, part)
            product = torch.einsum("bthd,bhde->bthe", rotated, state)
            if mean is not None and inverse is not None:
                denominator = torch.einsum("bthd,bhd->bth", features, mean) + eps
                inverse[:, part] = 1 / denominator
                product = product / denominator[..., None]
            out[:, part] = product
        return out, inverse

    def pull_back(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        state: torch.Tensor,
        mean: torch.Tensor,
        rotation: torch.Tensor | None,
        mask: torch.Tensor | None,
        y_factor: torch.Tensor | None = None,
        x_factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of x, like x, from gradients of its features.

        The gradient of R F is state (y_factor y). In addition, F has the gradient x_factor mean.
        """
        out = x.new_empty(x.shape)
        for part in self._parts(x):
            plain = _unrotated(x[:, part], rotation, part)
            right = y[:, part].to(state.dtype)
            if y_factor is not None:
                right = right * y_factor[:, part, :, None]
            grad = torch.einsum("bhde,bthe->bthd", state, right)
            direct = mean[:, None]
            if x_factor is not None:
                direct = direct * x_factor[:, part, :, None]
            grad = (_unrotated(grad, rotation, part) + direct) * _slope(plain)
            grad = _rotated(grad, rotation, part)
            if mask is not None:
                grad = grad.masked_fill(~mask[:, part, None, None], 0)
            out[:, part] = grad
        return out

    def denominator_gradient(
        self, grad_out: torch.Tensor, out: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the denominator, `(batch, tokens, heads)`."""
        gradient = torch.empty_like(inverse)
        for part in self._parts(out):
            product = grad_out[:, part] * out[:, part].to(inverse.dtype)
            gradient[:, part] = -product.sum(-1) * inverse[:, part]
        return gradient

    def collect_tangent(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        x_tangent: torch.Tensor,
        y_tangent: torch.Tensor,
        rotation: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tangents of the sums over tokens of R F y^T and of F."""
        batch, _, heads, dim = x.shape
        dtype = wide(x.dtype)
        state = x.new_zeros(batch, heads, dim, dim, dtype=dtype)
        total = x.new_zeros(batch, heads, dim, dtype=dtype)
        for part in self._parts(x):
            features, moved = _moving_features(x, x_tangent, rotation, part)
            right, right_moved = y[:, part].to(dtype), y_tangent[:, part].to(dtype)
            if mask is not None:
                hidden = ~mask[:, part, None, None]
                features, moved, right, right_moved = (
                    t.masked_fill(hidden, 0) for t in (features, moved, right, right_moved)
                )
            total += moved.sum(1)
            for f, r in ((moved, right), (features, right_moved)):
                state += torch.einsum("bthd,bthe->bhde", _rotated(f, rotation, part), r)
        return state, total

    def apply_tangent(
        self,
        x: torch.Tensor,
        state: torch.Tensor,
        mean: torch.Tensor,
        out: torch.Tensor,
        inverse: torch.Tensor,
        x_tangent: torch.Tensor,
        state_tangent: torch.Tensor,
        mean_tangent: torch.Tensor,
        rotation: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tangents of `out` and `inverse`, which `apply` returned for the other arguments."""
        out_tangent, inverse_tangent = torch.empty_like(out), torch.empty_like(inverse)
        for part in self._parts(x):
            features, moved = _moving_features(x, x_tangent, rotation, part)
            rotated, rotated_moved = (_rotated(f, rotation, part) for f in (features, moved))
            product = torch.einsum("bthd,bhde->bthe", rotated_moved, state)
            product += torch.einsum("bthd,bhde->bthe", rotated, state_tangent)
            denominator = torch.einsum("bthd,bhd->bth", moved, mean)
            denominator += torch.einsum("bthd,bhd->bth", features, mean_tangent)
            one_over = inverse[:, part]
            wide_out = out[:, part].to(inverse.dtype)
            product -= wide_out * denominator[..., None]
            out_tangent[:, part] = product * one_over[..., None]
            inverse_tangent[:, part] = -denominator * one_over.square()
        return out_tangent, inverse_tangent

    def _parts(self, x: torch.Tensor) -> Iterator[slice]:
        for start in range(0, x.shape[1], self.chunk):
            yield slice(start, min(start + self.chunk, x.shape[1]))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of features and state."""
    return torch.promote_types(dtype, torch.float32)


def _features(x: torch.Tensor) -> torch.Tensor:
    # elu(x) + 1 would round away exp(x) for very negative x. One of the two terms is 0 or 1; a
    # `where` takes longer than both.
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def _slope(x: torch.Tensor) -> torch.Tensor:
    """The derivative of `_features`."""
    return x.clamp(max=0).exp()


def _rotated(x: torch.Tensor, rotation: torch.Tensor | None, part: slice) -> torch.Tensor:
    """Some tokens of a sequence, rotated; `x` is wide."""
    if rotation is None:
        return x
    cos, sin = rotation[:, part, None].to(x.dtype)
    return _turn(x, cos, sin)


def _unrotated(x: torch.Tensor, rotation: torch.Tensor | None, part: slice) -> torch.Tensor:
    """The inverse of `_rotated`, in the wide dtype."""
    x = x.to(wide(x.dtype))
    if rotation is None:
        return x
    cos, sin = rotation[:, part, None].to(x.dtype)
    return _turn(x, cos, -sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _moving_features(
    x: torch.Tensor, x_tangent: torch.Tensor, rotation: torch.Tensor | None, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of some tokens before the rotation, and the tangents of the features."""
    plain = _unrotated(x[:, part], rotation, part)
    return _features(plain), _slope(plain) * _unrotated(x_tangent[:, part], rotation, part)
