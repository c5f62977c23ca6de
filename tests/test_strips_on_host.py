"""mode_coefficients, axial_conv and its gradients of CUDA, run on the host (see on_host.py), against the reference."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from on_host import DTYPES, H200_SHARED, ROOT, arrange, check, compile_programs, draw, run_case
from torch import Tensor

sys.path.insert(0, str(ROOT))

from spanet_kernels import modes, reference

OPERATORS = ("mode_coefficients", "axial_conv", "axial_conv_backward")
ALL = sys.maxsize  # radius_squared of every frequency


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one program per dtype."""
    return compile_programs("strips", tmp_path_factory.mktemp("strips_on_host"))


@dataclass
class Host:
    """The three operators with the schema's arguments, run by the programs."""

    programs: Path
    folder: Path
    shared_limit: int = H200_SHARED
    alignment: int = 0  # of the result, in elements beyond a word

    def __call__(self, op: str, like: Tensor, radius_squared: int, size: int, *inputs: Tensor) -> bytearray:
        header = [OPERATORS.index(op), *like.shape, modes.channels_last(like), radius_squared, self.shared_limit, self.alignment, size]
        return run_case(self.programs, self.folder, like.dtype, [*header, len(inputs)], *inputs)

    def mode_coefficients(self, x: Tensor, radius_squared: int) -> Tensor:
        return self._modes(self("mode_coefficients", x, radius_squared, 0, x), x, radius_squared)

    def axial_conv(self, x: Tensor, row: Tensor, row_bias: Tensor, column: Tensor, column_bias: Tensor, radius_squared: int):
        data = self("axial_conv", x, radius_squared, row.shape[1], x, row, row_bias, column, column_bias)
        split = x.numel() * x.element_size()
        return self._planes(data[:split], x), self._modes(data[split:], x, radius_squared)

    def axial_conv_backward(self, grad: Tensor, x: Tensor, row: Tensor, row_bias: Tensor, column: Tensor) -> tuple[Tensor, ...]:
        data = self("axial_conv_backward", x, -1, row.shape[1], grad, x, row, row_bias, column)
        split, taps, channels = x.numel() * x.element_size(), row.numel(), x.shape[1]
        parts = torch.frombuffer(data[split:], dtype=row.dtype).split([taps, channels, taps, channels])
        return self._planes(data[:split], x), parts[0].view_as(row), parts[1], parts[2].view_as(row), parts[3]

    def _planes(self, data: bytearray, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        out = torch.frombuffer(data, dtype=x.dtype) if data else x.new_empty(0)
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2) if modes.channels_last(x) else out.view(x.shape)

    def _modes(self, data: bytearray, x: Tensor, radius_squared: int) -> Tensor:
        wide = modes.profile_dtype(x.dtype)
        sizes = [min(n, modes.functions(n, min(radius_squared, n * n))) for n in x.shape[2:]]
        return (torch.frombuffer(data, dtype=wide) if data else torch.empty(0, dtype=wide)).view(*x.shape[:2], *sizes)


@pytest.fixture
def host(programs: Path, tmp_path: Path) -> Host:
    return Host(programs, tmp_path)


def parameters(channels: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """row_weight, row_bias, column_weight, column_bias."""
    wide = modes.profile_dtype(dtype)
    shapes = ((channels, size), (channels,), (channels, size), (channels,))
    return [(draw(*shape, seed=seed) / size**0.5).to(wide) for seed, shape in enumerate(shapes)]


def widened(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of the accumulators' dtype, or of the given one."""
    return [t.to(dtype or modes.profile_dtype(t.dtype)) for t in tensors]


def check_conv(host: Host, x: Tensor, size: int, radius_squared: int) -> None:
    z, coefficients = host.axial_conv(x, *parameters(x.shape[1], size, x.dtype), radius_squared)
    inputs = [x, *parameters(x.shape[1], size, x.dtype)]
    check(z, reference.axial_conv(*inputs, -1)[0], reference.axial_conv(*widened(inputs, torch.float64), -1)[0])
    assert coefficients.numel() == 0 or radius_squared >= 0
    check_coefficients(coefficients, z, radius_squared)  # of z as stored


def check_coefficients(actual: Tensor, x: Tensor, radius_squared: int) -> None:
    radius_squared = min(radius_squared, max(x.shape[2:]) ** 2)
    check(actual, reference.mode_coefficients(x, radius_squared), reference.mode_coefficients(x.double(), radius_squared), units=2)


def check_conv_backward(host: Host, grad: Tensor, x: Tensor, size: int) -> None:
    inputs = [grad, x, *parameters(x.shape[1], size, x.dtype)[:3]]
    same = reference.axial_conv_backward(*inputs)
    wide = reference.axial_conv_backward(*widened(inputs))
    exact = reference.axial_conv_backward(*widened(inputs, torch.float64))
    actual = host.axial_conv_backward(*inputs)
    check(actual[0], same[0], exact[0])
    for ours, yardstick, truth in zip(actual[1:], wide[1:], exact[1:], strict=True):
        check(ours, yardstick, truth, units=4)  # a handful of sums: a small sample of errors


SHAPES = [
    (2, 3, 1, 1), (1, 3, 1, 5), (1, 3, 5, 1), (3, 65, 7, 7), (2, 3, 8, 6), (2, 16, 14, 14), (1, 5, 25, 42), (2, 3, 17, 3), (1, 2, 28, 28),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(host: Host, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    radius_squared, size = (4, 7) if sum(shape) % 2 else (1, (3, 7, 11)[shape[1] % 3])
    x, other = arrange(draw(*shape, dtype=dtype), layout), arrange(draw(*shape, dtype=dtype, seed=3), layout)
    check_conv(host, x, size, radius_squared)
    check_conv_backward(host, other, x, size)
    check_coefficients(host.mode_coefficients(x, radius_squared), x, radius_squared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [(1, 18, 56, 56), (2, 9, 28, 28), (3, 34, 14, 14), (5, 20, 7, 7), (1, 2, 64, 31), (2, 5, 2, 33), (1, 4, 55, 64), (2, 6, 4, 1)],
    ids=str,
)
def test_coefficients_of_small_planes(host: Host, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = arrange(draw(*shape, dtype=dtype), layout)
    for radius_squared in (0, 1, 4, 8):
        check_coefficients(host.mode_coefficients(x, radius_squared), x, radius_squared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 11, 31])
def test_kernel_sizes(host: Host, size: int, dtype: torch.dtype) -> None:
    for layout, shape in (("contiguous", (1, 2, 16, 12)), ("channels_last", (1, 4, 9, 13))):
        x, grad = arrange(draw(*shape, dtype=dtype), layout), arrange(draw(*shape, dtype=dtype, seed=3), layout)
        check_conv(host, x, size, -1)
        check_conv_backward(host, grad, x, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["sliced", "channel_slice", "odd", "expanded"])
def test_layouts(host: Host, layout: str, dtype: torch.dtype) -> None:
    x = arrange(draw(2, 16, 8, 12, dtype=dtype), layout)
    grad = draw(2, 16, 8, 12, dtype=dtype, seed=3)
    check_conv(host, x, 7, 4)
    check_conv_backward(host, grad, x, 7)
    check_conv_backward(host, x, grad, 7)
    check_coefficients(host.mode_coefficients(x, 4), x, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"), [((1, 2, 45, 44), "contiguous"), ((1, 2, 30, 37), "contiguous"), ((1, 9, 23, 30), "channels_last")]
)
def test_planes_in_several_blocks(host: Host, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    host.shared_limit = 24 << 10
    x, grad = arrange(draw(*shape, dtype=dtype), layout), arrange(draw(*shape, dtype=dtype, seed=3), layout)
    check_conv(host, x, 7, 4)
    check_conv_backward(host, grad, x, 7)
    check_coefficients(host.mode_coefficients(x, 9), x, 9)
    check_conv(host, x, 11, 1)  # more taps than are taken at a time
    check_conv_backward(host, grad, x, 11)


WALKS = [
    ("channels_last", (2, 64, 9, 10)), ("channels_last", (1, 40, 7, 7)), ("channels_last", (2, 33, 8, 5)), ("channels_last", (1, 8, 70, 6)),
    ("channels_last", (1, 16, 5, 67)), ("channels_last", (5, 24, 2, 3)), ("channels_last", (1, 2, 12, 130)),
    ("channels_last", (1, 32, 66, 56)),
    ("contiguous", (3, 5, 9, 12)), ("contiguous", (2, 9, 14, 14)), ("contiguous", (3, 20, 7, 7)), ("contiguous", (1, 2, 5, 600)),
    ("contiguous", (1, 3, 4, 262)), ("contiguous", (1, 2, 3, 131)), ("contiguous", (1, 3, 130, 8)), ("contiguous", (2, 2, 71, 5)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("layout", "shape"), WALKS, ids=str)
def test_walks_down_the_rows(host: Host, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """7 taps: words and elements, whole and broken chunks of channels, several slices of a plane, several planes of a block."""
    x, grad = arrange(draw(*shape, dtype=dtype), layout), arrange(draw(*shape, dtype=dtype, seed=3), layout)
    check_conv(host, x, 7, -1)
    check_conv_backward(host, grad, x, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_of_many_columns_round_little(host: Host, layout: str, dtype: torch.dtype) -> None:
    """A GPU's own sums are trees: those of weights and biases have to be as accurate without the help of a sequential yardstick."""
    x, grad = (arrange(draw(1, 2, 64, 61, dtype=dtype, seed=seed) + 1, layout) for seed in (0, 3))
    inputs = [grad, x, *parameters(2, 7, dtype)[:3]]
    exact = reference.axial_conv_backward(*widened(inputs, torch.float64))
    for ours, truth in zip(host.axial_conv_backward(*inputs)[1:], exact[1:], strict=True):
        unit = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_wide_planes(host: Host, layout: str, dtype: torch.dtype) -> None:
    x = arrange(draw(1, 2, 3, 1100, dtype=dtype), layout)
    check_conv(host, x, 7, 4)
    check_conv_backward(host, arrange(draw(1, 2, 3, 1100, dtype=dtype, seed=3), layout), x, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("radius_squared", [-1, 0, 8, 9, 30, ALL])
def test_radii(host: Host, radius_squared: int, dtype: torch.dtype) -> None:
    for layout, shape in (("contiguous", (2, 3, 14, 17)), ("channels_last", (2, 3, 12, 20))):
        x = arrange(draw(*shape, dtype=dtype), layout)
        check_conv(host, x, 3, radius_squared)
        check_coefficients(host.mode_coefficients(x, radius_squared), x, radius_squared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_result(host: Host, dtype: torch.dtype) -> None:
    host.alignment = 1
    x = draw(2, 3, 8, 8, dtype=dtype)
    check_conv(host, x, 7, 4)
    check_conv_backward(host, draw(2, 3, 8, 8, dtype=dtype, seed=3), x, 7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_plane(host: Host, layout: str, dtype: torch.dtype) -> None:
    clean = arrange(draw(2, 6, 9, 8, dtype=dtype), layout)
    spoiled = clean.clone()
    spoiled[1, 2, 0, 7] = float("nan")
    weights = parameters(6, 7, dtype)
    expected, actual = host.axial_conv(clean, *weights, 4), host.axial_conv(spoiled, *weights, 4)
    assert actual[0][1, 2, :4, 4:].isnan().all()
    assert not actual[0][1, 2, 4:].isnan().any()
    assert not actual[0][1, 2, :, :4].isnan().any()
    for a, b in zip(actual, expected, strict=True):
        a[1, 2] = b[1, 2]
        assert torch.equal(a, b)
    expected, actual = (host.axial_conv_backward(spoiled if spoil else clean, clean, *weights[:3]) for spoil in (False, True))
    for a, b in zip(actual, expected, strict=True):
        assert a.isnan().any()
        a[(1, 2) if a.dim() == 4 else 2] = b[(1, 2) if a.dim() == 4 else 2]
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_size_changes_no_bit(host: Host, dtype: torch.dtype) -> None:
    x = draw(5, 3, 14, 14, dtype=dtype)
    weights = parameters(3, 7, dtype)
    together = host.axial_conv(x, *weights, 4)
    together_backward = host.axial_conv_backward(x, x, *weights[:3])[0]
    for b in range(5):
        one = x[b : b + 1].clone()
        for alone, all_of_them in zip(host.axial_conv(one, *weights, 4), together, strict=True):
            assert torch.equal(alone, all_of_them[b : b + 1])
        assert torch.equal(host.axial_conv_backward(one, one, *weights[:3])[0], together_backward[b : b + 1])


def test_weights_of_any_strides(host: Host) -> None:
    x = draw(2, 4, 9, 8, dtype=torch.float32)
    row, row_bias, column, column_bias = parameters(4, 7, torch.float32)
    strided = row.T.contiguous().T, row_bias[:1].expand(4), column[:1].expand(4, 7), column_bias.repeat_interleave(2)[::2]
    dense = [t.contiguous() for t in strided]
    for a, b in zip(host.axial_conv(x, *strided, 1), host.axial_conv(x, *dense, 1), strict=True):
        assert torch.equal(a, b)
