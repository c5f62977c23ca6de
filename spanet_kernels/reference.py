"""The specification: every operator in a few lines of plain PyTorch. Start reading here.

First the filter as the paper states it, `torch.fft.fft2 -> mask -> ifft2`; then the two chains of other
hands that the benchmarks run against; last the same function by Fourier modes, which serves every device
without a kernel of its own. Correctness, not speed, is the purpose; fp64 through `radial_filter` is the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import modes


def fft2(x: Tensor) -> Tensor:
    """The orthonormal transform of planes that are contiguous: along long strided axes MKL's writes beyond its memory (torch 2.14.1)."""
    return torch.fft.fft2(x.contiguous(), norm="ortho")


def ifft2(spectrum: Tensor) -> Tensor:
    """The inverse of `fft2`."""
    return torch.fft.ifft2(spectrum.contiguous(), norm="ortho")


def squared_frequencies(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(H, W) integer squared distance d^2 of every bin of `torch.fft.fft2` from the constant mode."""
    u = torch.fft.fftfreq(height, 1 / height, device=device).round().long()
    v = torch.fft.fftfreq(width, 1 / width, device=device).round().long()
    return u[:, None] ** 2 + v**2


def shell_index(height: int, width: int, radius_squared: int, device: torch.device | None = None) -> Tensor:
    """(H, W) index of each bin's shell; S, one past the last shell, outside the disc."""
    squared = squared_frequencies(height, width, device)
    return torch.searchsorted(torch.tensor(modes.shells(radius_squared), device=device), squared)


def radial_mask(base: Tensor, gain: Tensor, height: int, width: int, radius_squared: int) -> Tensor:
    """(C, H, W) mask M over the bins of `torch.fft.fft2`: base_c + gain_{s,c} on shell s, base_c outside the disc."""
    index = shell_index(height, width, radius_squared, base.device)
    return base[:, None, None] + torch.cat([gain, gain.new_zeros(1, gain.shape[1])])[index].permute(2, 0, 1)


def radial_filter(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """Re ifft2(M o fft2(x)) with the radial mask M of base and gain (arXiv 2308.11568, eqs. 5-18)."""
    mask = radial_mask(base, gain, x.shape[2], x.shape[3], radius_squared)
    return ifft2(mask * fft2(x)).real.to(x.dtype)


def radial_filter_backward(grad: Tensor, x: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    """Gradients of <grad, radial_filter(x, base, gain)>: to base_c, sum <grad, x>; to gain_{s,c}, the part of it on shell s."""
    product = (fft2(grad).conj() * fft2(x)).real.sum(0)
    index = shell_index(x.shape[2], x.shape[3], radius_squared, x.device).flatten()
    shells = product.new_zeros(len(modes.shells(radius_squared)) + 1, x.shape[1])
    shells.index_add_(0, index, product.flatten(1).T)
    return product.sum((1, 2)), shells[:-1]


def spectral_mask(lam: float, radius: float, boundary: float | None, height: int, width: int) -> Tensor:
    """(H, W) fp64 mask of the spectral pooling filter over the bins of `torch.fft.fft2`."""
    squared, limit = squared_frequencies(height, width), modes.squared_radius(radius)
    mask = torch.full((height, width), 1 - lam, dtype=torch.float64)
    mask[squared <= limit] = lam
    if modes.on_circle(radius):
        mask[squared == limit] = 1 - lam if boundary is None else boundary
    return mask


def spectral_pool(x: Tensor, lam: float, radius: float, boundary: float | None = None) -> Tensor:
    """The paper literally: fft2, mask, ifft2."""
    mask = spectral_mask(lam, radius, boundary, x.shape[2], x.shape[3]).to(x)
    return ifft2(mask * fft2(x)).real


def published_chain(x: Tensor, centred_mask: Tensor) -> Tensor:
    """The chain of the published code, with its full complex transform and its shifts over all four axes (a baseline)."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x, dim=(2, 3), norm="ortho"))
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * centred_mask), dim=(2, 3), norm="ortho").real


def rfft2_chain(x: Tensor, half_mask: Tensor) -> Tensor:
    """The best effort with FFTs, real transforms and half a mask (..., H, W // 2 + 1), in fp32 for 16-bit input."""
    wide = x.to(modes.profile_dtype(x.dtype))
    return torch.fft.irfft2(torch.fft.rfft2(wide).mul_(half_mask), s=x.shape[2:]).to(x.dtype)


def radial_filter_modes(x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """`radial_filter` as a scaled copy plus Fourier modes: base x + Phi_H^T (G o (Phi_H x Phi_W^T)) Phi_W."""
    height, width = x.shape[2:]
    phi_h = modes.basis(height, radius_squared, base.dtype, x.device)
    phi_w = modes.basis(width, radius_squared, base.dtype, x.device)
    shell = modes.shell_map(height, width, radius_squared, x.device)
    gains = torch.cat([gain, gain.new_zeros(1, gain.shape[1])])[shell].permute(2, 0, 1)
    wide = x.to(base.dtype)
    modes_out = gains * (phi_h @ wide @ phi_w.T)
    y = base[:, None, None] * wide + phi_h.T @ modes_out @ phi_w
    return modes.like(y.to(x.dtype), x)


def radial_filter_modes_backward(grad: Tensor, x: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
    """`radial_filter_backward` by Fourier modes."""
    height, width = x.shape[2:]
    dtype = modes.profile_dtype(x.dtype)
    phi_h = modes.basis(height, radius_squared, dtype, x.device)
    phi_w = modes.basis(width, radius_squared, dtype, x.device)
    shell = modes.shell_map(height, width, radius_squared, x.device)
    grad, x = grad.to(dtype), x.to(dtype)
    product = ((phi_h @ grad @ phi_w.T) * (phi_h @ x @ phi_w.T)).sum(0)
    shells = product.new_zeros(len(modes.shells(radius_squared)) + 1, x.shape[1])
    shells.index_add_(0, shell.flatten(), product.flatten(1).T)
    return (grad * x).sum((0, 2, 3)), shells[:-1]


def mode_coefficients(x: Tensor, radius_squared: int) -> Tensor:
    """(B, C, A_H, A_W) coefficients <x, phi_k> of the real Fourier modes, Phi_H x Phi_W^T; an empty disc (-1) has none."""
    dtype = modes.profile_dtype(x.dtype)
    phi_h = modes.basis(x.shape[2], radius_squared, dtype, x.device)
    phi_w = modes.basis(x.shape[3], radius_squared, dtype, x.device)
    return phi_h @ x.to(dtype) @ phi_w.T


def axial_conv(
    x: Tensor, row_weight: Tensor, row_bias: Tensor, column_weight: Tensor, column_bias: Tensor, radius_squared: int
) -> tuple[Tensor, Tensor]:
    """Depthwise 1 x k, then k x 1, zero padding, with biases; and the coefficients of its result. Weights (C, k), biases (C,)."""
    channels, size = row_weight.shape
    wide = x.to(row_weight.dtype)
    hidden = functional.conv2d(wide, row_weight[:, None, None], row_bias, padding=(0, size // 2), groups=channels)
    z = functional.conv2d(hidden, column_weight[:, None, :, None], column_bias, padding=(size // 2, 0), groups=channels)
    z = modes.like(z.to(x.dtype), x)
    return z, mode_coefficients(z, radius_squared)


def axial_conv_backward(
    grad: Tensor, x: Tensor, row_weight: Tensor, row_bias: Tensor, column_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <grad, axial_conv(x, ...)>: to x, row_weight, row_bias, column_weight, column_bias."""
    channels, size = row_weight.shape
    wide, pad = x.to(row_weight.dtype), size // 2

    def gradients(grad: Tensor, x: Tensor, weight: Tensor, padding: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        convolution = [1, 1], padding, [1, 1], False, [0, 0], channels
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(grad, x, weight, [channels], *convolution, [True] * 3)
        return found

    hidden = functional.conv2d(wide, row_weight[:, None, None], row_bias, padding=(0, pad), groups=channels)
    hidden_grad, column_grad, column_bias_grad = gradients(grad.to(wide.dtype), hidden, column_weight[:, None, :, None], [pad, 0])
    x_grad, row_grad, row_bias_grad = gradients(hidden_grad, wide, row_weight[:, None, None], [0, pad])
    return modes.like(x_grad.to(x.dtype), x), row_grad.flatten(1), row_bias_grad, column_grad.flatten(1), column_bias_grad


def spectral_gate(
    z: Tensor, coefficients: Tensor | None, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int
) -> Tensor:
    """z o (W F(z) + b), F the radial filter of base and gain, W (C, C) a 1x1 convolution; coefficients are those of z, if at hand."""
    return modes.like(z * spectral_context(z, weight, bias, base, gain, radius_squared), z)


def spectral_context(z: Tensor, weight: Tensor, bias: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
    """W F(z) + b."""
    filtered = radial_filter(z.to(base.dtype), base, gain, radius_squared).to(z.dtype)  # FFTs refuse most 16-bit sizes
    return torch.einsum("oc,bchw->bohw", weight, filtered) + bias[:, None, None]


def spectral_gate_backward(
    grad: Tensor,
    z: Tensor,
    coefficients: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    radius_squared: int,
    profile_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <grad, spectral_gate(z, ...)>: to z, weight, bias, and base and gain, which may be empty if they do not learn."""
    with torch.enable_grad():
        z, weight, bias, base, gain = inputs = [a.detach().requires_grad_() for a in (z, weight, bias, base, gain)]
        y = spectral_gate(z, coefficients, weight, bias, base, gain, radius_squared)
    z_grad, weight_grad, bias_grad, base_grad, gain_grad = torch.autograd.grad(y, inputs, grad)
    return modes.like(z_grad, z), weight_grad, bias_grad, base_grad, gain_grad


def spectral_mixer(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    column_weight: Tensor,
    column_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    base: Tensor,
    gain: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    radius_squared: int,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """proj_out(gate(axial_conv(proj_in(x)))), proj_in and proj_out being 1x1 convolutions; and what its gradients need, or nothing:
    t = proj_in(x), on GPUs z = axial_conv(t), elsewhere W F(z) + b, and the coefficients of z.

    The weights, of any dtype, are computed with in that of x, those of the axial convolution in that of base.
    """
    row_weight, row_bias, column_weight, column_bias = (
        value.to(base.dtype) for value in (row_weight, row_bias, column_weight, column_bias)
    )
    in_weight, in_bias, weight, bias, out_weight, out_bias = (
        value.to(x.dtype) for value in (in_weight, in_bias, weight, bias, out_weight, out_bias)
    )
    t = torch.einsum("oc,bchw->bohw", in_weight, x) + in_bias[:, None, None]
    z, coefficients = axial_conv(t, row_weight, row_bias, column_weight, column_bias, radius_squared)
    y = spectral_gate(z, coefficients, weight, bias, base, gain, radius_squared)
    out = modes.like(torch.einsum("oc,bchw->bohw", out_weight, y) + out_bias[:, None, None], x)
    if not keep:
        return out, x.new_empty(0), x.new_empty(0), base.new_empty(0)
    return out, t, z if x.is_cuda else spectral_context(z, weight, bias, base, gain, radius_squared), coefficients


def mixer_branch(
    y: Tensor,
    t: Tensor | None,
    context: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    *args: Any,
    mixer: Callable[..., tuple[Tensor, ...]] = spectral_mixer,
) -> Tensor:
    """y = residual_scale o residual + spectral_mixer(norm(x), ...), its t and its context, by a mixer; what is None is left out.

    norm is a GroupNorm with one group; the last of the other arguments, those of `spectral_mixer`, is radius_squared. Weights and biases of
    the axial convolution may be those of convolutions, (C, 1, 1, k) and (C, 1, k, 1), and in the dtype of x.

    Returns, where t is wanted and modes are few, what F adds of each mode, gain_k <z, phi_k> / |phi_k|^2 with phi_k not normalised,
    (B K, C), for the gradients to take; or nothing, as here.
    """
    args = *args[:2], *((taps.flatten(1) if taps.dim() > 2 else taps).to(args[8].dtype) for taps in args[2:6]), *args[6:]
    n = x if norm_weight is None else functional.group_norm(x, 1, norm_weight, norm_bias, eps)
    found, *kept = mixer(n, *args, True)
    if residual is not None:
        found = (residual if residual_scale is None else residual_scale[:, None, None] * residual) + found
    y.copy_(found)
    for to, value in zip((t, context), kept, strict=False):
        if to is not None:
            to.copy_(value)
    return args[8].new_empty(0, 0)


def spectral_mixer_backward(grad: Tensor, x: Tensor, t: Tensor, z: Tensor, coefficients: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of <grad, spectral_mixer(x, ...)>: to x, then in its order to all weights, biases, base and gain, each in its dtype."""
    in_weight, row_weight, row_bias, column_weight, column_bias, weight, bias, base, gain, out_weight, radius_squared, _ = args
    zero = torch.zeros_like
    convs, gate = (row_weight, row_bias, column_weight, column_bias), (weight, bias, base, gain)
    args = in_weight, zero(in_weight[0]), *convs, *gate, out_weight, zero(out_weight[0])
    with torch.enable_grad():
        given = [a.detach().requires_grad_() for a in (x, *args)]
        inputs = [value.to(base.dtype if 3 <= i <= 6 or 9 <= i <= 10 else x.dtype) for i, value in enumerate(given)]
        # t depends on a bias that the gradients do not: take it as it was
        hidden = torch.einsum("oc,bchw->bohw", inputs[1], inputs[0]) + inputs[2][:, None, None]
        hidden = hidden + (t - hidden).detach()
        moved, _ = axial_conv(hidden, inputs[3], inputs[4], inputs[5], inputs[6], -1)
        y = spectral_gate(moved, coefficients, inputs[7], inputs[8], inputs[9], inputs[10], radius_squared)
        out = torch.einsum("oc,bchw->bohw", inputs[11], y) + inputs[12][:, None, None]
    return torch.autograd.grad(out, given, grad)


def mixer_branch_backward(
    x_grad: Tensor,
    grad: Tensor,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    added: Tensor,
    *args: Any,
    gradients: Callable[..., tuple[Tensor, ...]] = spectral_mixer_backward,
) -> tuple[Tensor, ...]:
    """The gradients of `spectral_mixer` by a function like `spectral_mixer_backward`, that to x written, the others in fp32 at least, from
    what `spectral_mixer` keeps on a CPU: t and the context; added, what `mixer_branch` returned, is not looked at here."""
    wide = args[-5].dtype
    found = gradients(grad, x, t, context, x.new_empty(0), *args)
    x_grad.copy_(found[0])
    return tuple(value.to(wide) if value.numel() else value.new_empty(0, dtype=wide) for value in found[1:])


def gelu(x: Tensor, bias: Tensor | None, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """gelu(x + bias) of an (N, D); with a grad, that becomes grad o gelu'(x + bias), and its sums over the rows (D,) come too."""
    h, wide = x if bias is None else x + bias, modes.profile_dtype(x.dtype)
    if grad is None:
        return functional.gelu(h), x.new_empty(0, dtype=wide)
    grad.copy_(torch.ops.aten.gelu_backward(grad, h))
    return functional.gelu(h), grad.sum(0, dtype=wide)


def branch_norm(n: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor) -> None:
    """n = weight o (x - mean) / deviation + bias, of the dtype of n; mean and 1 / deviation being `image_moments`."""
    n.copy_(_normalised(x, moments) * weight[:, None, None] + bias[:, None, None])


def branch_norm_backward(
    x_grad: Tensor, n_grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor, sum_grad: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <n_grad, `branch_norm`> + <sum_grad, scale o x>: x_grad, and those to weight, bias and scale, empty without one."""
    x_grad_, weight_grad, bias_grad = image_norm_backward(n_grad, x.to(moments.dtype), moments, weight)
    scale_grad = weight.new_empty(0)
    if sum_grad is not None:
        x_grad_ = x_grad_ + (sum_grad if scale is None else sum_grad * scale[:, None, None])
    if sum_grad is not None and scale is not None:
        scale_grad = (sum_grad.to(scale.dtype) * x).sum((0, 2, 3))
    x_grad.copy_(x_grad_)
    return weight_grad, bias_grad, scale_grad


def branch_sum(y: Tensor, f: Tensor, x: Tensor, scale: Tensor | None) -> None:
    """y = scale o x + f, in the dtype of x."""
    y.copy_((x if scale is None else x * scale[:, None, None]) + f)


def image_moments(x: Tensor, eps: float) -> Tensor:
    """(B, 2): mean and 1 / sqrt(variance + eps) of every image, in fp32; what a GroupNorm with one group needs to know."""
    variance, mean = torch.var_mean(x.to(modes.profile_dtype(x.dtype)), (1, 2, 3), correction=0)
    return torch.stack([mean, (variance + eps).rsqrt()], 1).float()


def pointwise_pair(
    y: Tensor,
    x: Tensor,
    moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    factor: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    weight_in: Tensor | None,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    before: Tensor | None = None,
) -> None:
    """y = residual_scale o residual + W_out h + b_out; what is None is left out.

    n = norm_weight o (x - mean) / deviation + norm_bias, mean and 1 / deviation being `image_moments`; n = x without them.
    h = gelu(g), g = W_in n + b_in, or h = factor o g, or h = n without W_in. x is (B, C, H, W), y (B, E, H, W); before becomes g.
    """
    h = x
    if moments is not None:
        mean, scale = moments.to(modes.profile_dtype(x.dtype))[:, :, None, None, None].unbind(1)
        h = (x - mean) * scale
        h = h if norm_weight is None else h * norm_weight[:, None, None]
        h = (h if norm_bias is None else h + norm_bias[:, None, None]).to(x.dtype)
    if weight_in is not None:
        h = functional.conv2d(h, weight_in[:, :, None, None], bias_in)
        if before is not None:
            before.copy_(h)
        h = functional.gelu(h) if factor is None else factor * h
    product = functional.conv2d(h, weight_out[:, :, None, None], bias_out)
    if residual is not None:
        product = (residual if residual_scale is None else residual_scale[:, None, None] * residual) + product
    y.copy_(product)


def outer_sum(left: Tensor, left_factor: Tensor | None, right: Tensor, right_factor: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    """left^T right, (D, C) of rows (N, D) and (N, C), and the sums of the left rows (D,), in fp32 at least: the gradients of a 1x1
    convolution to its weight and bias. A side with a factor is left o left_factor or right o right_factor, with a GELU gelu(right)."""
    left = left if left_factor is None else left * left_factor
    right = functional.gelu(right) if gelu else right if right_factor is None else right * right_factor
    left, right = (side.to(modes.profile_dtype(side.dtype)) for side in (left, right))
    return left.mT @ right, left.sum(0)


def pointwise_mlp_backward(x_grad: Tensor, h_grad: Tensor, grad: Tensor, h: Tensor, weight_in: Tensor, weight_out: Tensor) -> None:
    """h_grad = gelu'(h) o W_out^T grad and x_grad = W_in^T h_grad, the gradients of an MLP of weights (D, C) and (E, D)."""
    through = torch.einsum("ed,behw->bdhw", weight_out, grad)
    h_grad.copy_(torch.ops.aten.gelu_backward(through, h))
    x_grad.copy_(torch.einsum("dc,bdhw->bchw", weight_in, h_grad))


def column_sums(x: Tensor) -> Tensor:
    """(C,) sums over the rows of an (N, C), in fp32 at least."""
    return x.sum(0, dtype=modes.profile_dtype(x.dtype))


def image_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A GroupNorm with one group, weight o (x - mean) / deviation + bias, in the dtype of x; and (B, 2): mean and 1 / deviation."""
    wide = modes.profile_dtype(x.dtype)
    variance, mean = torch.var_mean(x.to(wide), (1, 2, 3), correction=0)
    moments = torch.stack([mean, (variance + eps).rsqrt()], 1)
    y = _normalised(x, moments) * weight.to(wide)[:, None, None] + bias.to(wide)[:, None, None]
    return modes.like(y.to(x.dtype), x), moments


def image_norm_backward(grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <grad, image_norm(x, ...)>: to x, weight and bias."""
    wide = moments.dtype
    normalised, slope = _normalised(x, moments), grad.to(wide) * weight.to(wide)[:, None, None]
    alone, with_n = (value.mean((1, 2, 3), keepdim=True) for value in (slope, slope * normalised))
    x_grad = (slope - alone - normalised * with_n) * moments[:, 1, None, None, None]
    sums = (grad.to(wide) * normalised).sum((0, 2, 3)), grad.to(wide).sum((0, 2, 3))
    return modes.like(x_grad.to(x.dtype), x), sums[0].to(weight.dtype), sums[1].to(weight.dtype)


def _normalised(x: Tensor, moments: Tensor) -> Tensor:
    mean, scale = moments[:, :, None, None, None].unbind(1)
    return (x.to(moments.dtype) - mean) * scale
