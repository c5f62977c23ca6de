"""Matrix products over the channels of every position: ours for pairs of them, on a CPU oneDNN's, elsewhere PyTorch's.

oneDNN adds the bias and applies the GELU where it writes the product; PyTorch's `linear` on a CPU writes the bias first and adds to it.
PyTorch gives products of float32 on a CPU to MKL, which is at home on Intel's processors; on others they are oneDNN's here, too. Sums of
outer products, the gradients of weights, are our own, which add up the gradients of biases in passing (`outer_sum`).
x86 without AMX and Intel's AVX512_BF16 multiply bf16 at half the speed of float32: there a product of bf16 is one of float32, and the
MLP, whose hidden channels are many, is float32 from its first product to its last (`multiplied_in`, `place`).
Of a pair (`pointwise_pair`) what stands between the two products stays in the cache: it would be as large as everything else together.
Nothing here is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import modes
from ._native import cpu_capability, cpu_is_intel

_DTYPES = {torch.float32} if torch.backends.mkldnn.is_available() else set()
if _DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _DTYPES.add(torch.bfloat16)

WHOLE = slice(None)  # the part that is all images; to take it of a tensor would take time
PAIR_CHANNELS = 32  # every number of channels is a multiple of it where `pointwise_pair` serves
PAIR_POSITIONS = 96  # of a thread at least: `pointwise_pair` shares out positions, oneDNN channels too
_WIDENED = {torch.bfloat16} if cpu_capability() in ("avx2", "avx512") else set()
# MKL multiplies float32 at less than half of oneDNN's speed on other processors than Intel's (EPYC of Zen 5: 200 and 450 GFLOP/s)
_MKL_IS_SLOW = torch.backends.mkl.is_available() and not cpu_is_intel()
_PAIR_DTYPES = {torch.float32, torch.bfloat16} if cpu_capability() != "plain" else set()
_SUM_DTYPES = _PAIR_DTYPES - ({torch.bfloat16} if cpu_capability() == "amx" else set())  # `outer_sum` has no instructions of AMX


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """rows W^T + b, (..., C) to (..., D), and its exact GELU if asked for, in the dtype of the rows."""
    if widens(rows):
        return linear(rows.float(), weight, bias, gelu).to(rows.dtype)
    weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    if onednn_serves(rows) and rows.is_contiguous():
        return _onednn(rows, weight, bias, "gelu" if gelu else "none")
    y = functional.linear(rows, weight, bias)
    return functional.gelu(y) if gelu else y


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, then, [], "none")
    return y


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows x matrix, in the dtype of the rows."""
    if widens(rows):
        return product(rows.float(), matrix).to(rows.dtype)
    matrix = matrix.to(rows.dtype)
    return _onednn(rows.contiguous(), matrix.mT) if _prefers_onednn(rows, matrix) else rows @ matrix


def outer(left: Tensor, right: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """left^T right, or left^T gelu(right), of rows (N, D) and (N, C), and the sums of the left ones over the rows, in their dtype or
    float32: the gradients of a weight and a bias."""
    right = right.to(left.dtype)
    if outer_sum_serves(left):
        left, right = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (left, right))
        found: tuple[Tensor, Tensor] = torch.ops.spanet_kernels.outer_sum.default(left, None, right, None, gelu)
        return found
    return left.mT @ (functional.gelu(right) if gelu else right), column_sums(left)


def outer_sum_serves(x: Tensor) -> bool:
    """Whether `outer_sum` is the way to the gradients of weights; it widens bf16 itself where that is faster."""
    return x.is_cpu and x.dtype in _SUM_DTYPES


def _prefers_onednn(*operands: Tensor) -> bool:
    return _MKL_IS_SLOW and all(operand.dtype == torch.float32 and onednn_serves(operand) for operand in operands)


def cast(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Any]:
    """Each of the tensors in its dtype; on a GPU all that change in one launch."""
    results, given, written, eager = list(tensors), [], [], not torch.compiler.is_compiling()
    for index, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if tensor is None or tensor.dtype == dtype:
            continue
        if eager and tensor.is_cuda:
            results[index] = into = torch.empty_like(tensor, dtype=dtype)
            given.append(tensor)
            written.append(into)
        else:
            results[index] = tensor.to(dtype)
    if given:
        torch._foreach_copy_(written, given)
    return results


def widens(x: Tensor) -> bool:
    """Whether products of it are faster in float32, conversions included."""
    return x.is_cpu and x.dtype in _WIDENED


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype to multiply x in."""
    return torch.float32 if widens(x) else x.dtype


def place(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to write y in the dtype: itself, or memory that `settle` rounds to it."""
    return y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)


def settle(y: Tensor, written: Tensor) -> None:
    """y, of what was written in its place."""
    if y.dtype != written.dtype:
        y.copy_(written)


def onednn_serves(x: Tensor) -> bool:
    return bool(x.is_cpu and x.dtype in _DTYPES and x.numel() > 0 and torch.backends.mkldnn.enabled)


class DropPath(NamedTuple):
    """Stochastic depth: f of the images that are not kept is 0, that of the others is multiplied by a factor."""

    kept: Tensor  # (B,), 1 for those that are
    factor: float

    def factors(self, f: Tensor) -> Tensor:
        """(B, 1, 1, 1), of every image, in the dtype of f."""
        return (self.kept.to(f.dtype) * self.factor)[:, None, None, None]


class Branch(NamedTuple):
    """What stands around the products f of a residual branch, scale o residual + drop_path(f(norm(x))); None for nothing."""

    norm_weight: Tensor | None = None  # (C,) of a GroupNorm with one group; there is none without it
    norm_bias: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None  # of the shape of the result
    scale: Tensor | None = None  # (E,)
    drop_path: DropPath | None = None

    @property
    def is_there(self) -> bool:
        return self.norm_weight is not None or self.residual is not None

    def normalised(self, x: Tensor) -> Tensor:
        """norm(x), by PyTorch, in the layout of x."""
        if self.norm_weight is None:
            return x
        return modes.like(functional.group_norm(x, 1, self.norm_weight, self.norm_bias, self.eps), x)

    def added(self, y: Tensor) -> Tensor:
        """scale o residual + drop_path(y), by PyTorch, in the layout of y."""
        residual, scale = self.residual, None if self.scale is None else self.scale[:, None, None]
        if self.drop_path is not None:
            factors = self.drop_path.factors(y)
            if residual is None:
                return y * factors
            residual = modes.like(residual, y)
            return torch.addcmul(residual if scale is None else residual * scale, y, factors)
        if residual is None:
            return y
        if scale is None:
            return y + residual
        return torch.addcmul(y, residual, scale) if y.is_cuda else y + residual * scale  # one pass of a GPU less

    def of(self, part: slice) -> Branch:
        """That of some images."""
        return self if self.residual is None or part is WHOLE else self._replace(residual=self.residual[part])

    def norm_alone(self) -> Branch:
        return Branch(self.norm_weight, self.norm_bias, self.eps)

    def residual_alone(self) -> Branch:
        return Branch(residual=self.residual, scale=self.scale)

    def has(self, dtype: torch.dtype) -> bool:
        """Whether every tensor has the dtype."""
        return all(tensor.dtype == dtype for tensor in self if isinstance(tensor, Tensor))


def rows(x: Tensor) -> Tensor:
    """(B H W, C), a view of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])


def image(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows as the channels of the positions of a (B, C, H, W), channels_last."""
    return rows.view(shape[0], shape[2], shape[3], rows.shape[1]).permute(0, 3, 1, 2)


def write(y: Tensor, rows_: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """y (B, D, H, W), in any layout, = rows W^T + b, all but the weights of one dtype."""
    if _prefers_onednn(y) and weight.is_contiguous() and pair_serves(x := image(rows_, y.shape), None, weight):
        pair(y, x, None, None, weight, bias)
    elif not modes.channels_last(y) or widens(y) or _prefers_onednn(y):
        y.copy_(image(product(rows_, weight.mT) if bias is None else linear(rows_, weight, bias), y.shape))
    elif bias is None:
        torch.mm(rows_, weight.mT.to(y.dtype), out=rows(y))
    else:
        torch.addmm(bias, rows_, weight.mT.to(y.dtype), out=rows(y))


def column_sums(rows: Tensor) -> Tensor:
    """(C,) sums over the rows."""
    sums: Tensor = torch.ops.spanet_kernels.column_sums.default(rows) if rows.is_cuda else rows.sum(0)
    return sums


def parts(x: Tensor, size: int) -> list[slice]:
    """The images to take at a time: on a CPU parts of equal numbers of images, each of at most `size` bytes, as they are multiplied, or one
    image.

    All at once in a graph, which serves any number of images.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return [WHOLE]
    images = x.shape[0]
    count = min(images, -(-x.numel() * multiplied_in(x).itemsize // size))
    if count <= 1:
        return [WHOLE]
    step = -(-images // count)
    return [slice(start, start + step) for start in range(0, images, step)]


def some(x: Tensor, part: slice) -> Tensor:
    """The images of a part."""
    return x if part is WHOLE else x[part]


def summed(sums: list[Tensor], more: list[Tensor], last: bool) -> list[Tensor]:
    """Sums over parts, in float32 at least; those of a first part that is the last are what it gives."""
    if sums:
        return [total.add_(value) for total, value in zip(sums, more, strict=True)]
    return more if last else [value.to(modes.profile_dtype(value.dtype)) for value in more]


def pair_serves(x: Tensor, weight_in: Tensor | None, weight_out: Tensor) -> bool:
    """Whether `pointwise_pair` takes these: on a CPU with positions enough for every thread, or any number in a graph; on a GPU in 16
    bits and channels_last."""
    weights = (weight_out,) if weight_in is None else (weight_in, weight_out)
    for weight in weights:
        if weight.dtype != x.dtype:
            return False
    return pair_fits(x, *weights)


def pair_fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether `pointwise_pair` takes these once the weights have the dtype of x."""
    for weight in weights:
        rows, columns, *_ = weight.shape
        if rows % PAIR_CHANNELS or columns % PAIR_CHANNELS or not (rows and columns):
            return False
    images, channels, height, width = x.shape
    if channels % PAIR_CHANNELS:
        return False
    if x.is_cuda:
        return x.element_size() == 2 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    positions = images * height * width
    enough = torch.compiler.is_compiling() or positions >= PAIR_POSITIONS * torch.get_num_threads()
    return x.device.type == "cpu" and x.dtype in _PAIR_DTYPES and enough


def pair(
    y: Tensor,
    x: Tensor,
    weight_in: Tensor | None,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    factor: Tensor | None = None,
    branch: Branch = Branch(),  # noqa: B008  an immutable value
    before: Tensor | None = None,
) -> Tensor:
    """y, as `reference.pointwise_pair` writes it, of x, factor and branch in any layout; only where `pair_serves`, with before on
    a CPU."""
    x = modes.like(x, x)
    moments = None if branch.norm_weight is None else torch.ops.spanet_kernels.image_moments.default(x, branch.eps)
    factor = None if factor is None else modes.like(factor, x)
    residual = None if branch.residual is None else modes.like(branch.residual, y)
    weight_in = None if weight_in is None else weight_in.contiguous()
    torch.ops.spanet_kernels.pointwise_pair.default(
        y,
        x,
        moments,
        branch.norm_weight,
        branch.norm_bias,
        factor,
        residual,
        branch.scale,
        weight_in,
        bias_in,
        weight_out.contiguous(),
        bias_out,
        before,
    )
    return y
