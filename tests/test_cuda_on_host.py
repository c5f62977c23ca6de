"""radial_filter and radial_filter_backward of CUDA, run on the host (see on_host.py), against the reference."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from on_host import DTYPES, H200_SHARED, ROOT, arrange, check, compile_programs, draw, run_case
from torch import Tensor

sys.path.insert(0, str(ROOT))

from spanet_kernels import modes, reference


@pytest.fixture(scope="session")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one program per dtype."""
    return compile_programs("radial_filter", tmp_path_factory.mktemp("radial_filter_on_host"))


@dataclass
class Host:
    """The two operators with the schema's arguments, run by the programs."""

    runners: Path
    folder: Path
    shared_limit: int = H200_SHARED
    alignment_of_y: int = 0

    def __call__(self, x: Tensor, radius_squared: int, backward: bool, *others: Tensor) -> bytearray:
        header = [backward, *x.shape, modes.channels_last(x), radius_squared]
        header += [len(modes.shells(radius_squared)), self.shared_limit, self.alignment_of_y]
        return run_case(self.runners, self.folder, x.dtype, header, x, *others)

    def filter(self, x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> Tensor:
        out = torch.frombuffer(self(x, radius_squared, False, base, gain), dtype=x.dtype)
        batch, channels, height, width = x.shape
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2) if modes.channels_last(x) else out.view(x.shape)

    def backward(self, grad: Tensor, x: Tensor, radius_squared: int) -> tuple[Tensor, Tensor]:
        unused = torch.zeros(1, dtype=modes.profile_dtype(x.dtype))
        data = self(x, radius_squared, True, grad, unused)
        out = torch.frombuffer(data, dtype=modes.profile_dtype(x.dtype)).view(-1, x.shape[1])
        return out[0], out[1:]


@pytest.fixture
def host(runners: Path, tmp_path: Path) -> Host:
    return Host(runners, tmp_path)


def profile(channels: int, radius_squared: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = modes.profile_dtype(dtype)
    return draw(channels, dtype=wide, seed=1), draw(len(modes.shells(radius_squared)), channels, dtype=wide, seed=2)


def check_filter(host: Host, x: Tensor, base: Tensor, gain: Tensor, radius_squared: int) -> None:
    wide = x.to(base.dtype)
    same = reference.radial_filter(wide, base, gain, radius_squared).to(x.dtype)
    exact = reference.radial_filter(x.double(), base.double(), gain.double(), radius_squared)
    check(host.filter(x, base, gain, radius_squared), same, exact)


def check_backward(host: Host, grad: Tensor, x: Tensor, radius_squared: int) -> None:
    wide = modes.profile_dtype(x.dtype)
    same = reference.radial_filter_backward(grad.to(wide), x.to(wide), radius_squared)
    exact = reference.radial_filter_backward(grad.double(), x.double(), radius_squared)
    for ours, yardstick, truth in zip(host.backward(grad, x, radius_squared), same, exact, strict=True):
        check(ours, yardstick, truth, units=4)  # a handful of sums: a small sample of errors


SHAPES = [
    (2, 3, 1, 1), (1, 3, 1, 5), (1, 3, 5, 1), (3, 65, 7, 7), (2, 3, 8, 6), (2, 16, 14, 14), (1, 5, 25, 42), (2, 3, 17, 3), (1, 2, 28, 28),
    (1, 1, 3, 17),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(host: Host, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    radius_squared = 4 if sum(shape) % 2 else 1
    x = arrange(draw(*shape, dtype=dtype), layout)
    check_filter(host, x, *profile(shape[1], radius_squared, dtype), radius_squared)
    check_backward(host, arrange(draw(*shape, dtype=dtype, seed=3), layout), x, radius_squared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["sliced", "channel_slice", "odd", "expanded"])
def test_layouts(host: Host, layout: str, dtype: torch.dtype) -> None:
    x = arrange(draw(2, 16, 8, 12, dtype=dtype), layout)
    base, gain = profile(16, 4, dtype)
    check_filter(host, x, base[:1].expand(16), gain[:, :1].expand(-1, 16), 4)
    check_backward(host, draw(2, 16, 8, 12, dtype=dtype, seed=3), x, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_output(host: Host, dtype: torch.dtype) -> None:
    host.alignment_of_y = 1
    check_filter(host, draw(2, 3, 8, 8, dtype=dtype), *profile(3, 4, dtype), 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(150, 1, 7, 7), (9, 7, 14, 14), (1, 5, 56, 56)], ids=str)
def test_ragged_tiles(host: Host, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_filter(host, draw(*shape, dtype=dtype), *profile(shape[1], 4, dtype), 4)


def tile_of_one(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> int:
    """Bytes of the smallest tile of whole planes: with no more shared memory than that, planes are sliced."""
    sector = max(4, 32 // dtype.itemsize)
    planes = min(sector, -(-shape[1] // 4) * 4) if layout == "channels_last" else 1
    return planes * shape[2] * shape[3] * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"), [((1, 2, 44, 42), "contiguous"), ((1, 1, 61, 67), "contiguous"), ((1, 9, 24, 28), "channels_last")], ids=str
)
def test_planes_beyond_shared_memory(host: Host, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    host.shared_limit = tile_of_one(shape, layout, dtype)
    x = arrange(draw(*shape, dtype=dtype), layout)
    for radius_squared in (4, 9):
        check_filter(host, x, *profile(shape[1], radius_squared, dtype), radius_squared)
        check_backward(host, arrange(draw(*shape, dtype=dtype, seed=3), layout), x, radius_squared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "radius_squared"), [((2, 6, 70, 66), 4), ((1, 3, 67, 71), 2), ((1, 2, 4, 1100), 1), ((1, 2, 1100, 3), 4)], ids=str
)
def test_planes_in_two_passes(host: Host, shape: tuple[int, ...], radius_squared: int, layout: str, dtype: torch.dtype) -> None:
    host.shared_limit = 9 << 10
    x = arrange(draw(*shape, dtype=dtype), layout)
    check_filter(host, x, *profile(shape[1], radius_squared, dtype), radius_squared)


# the sizes with kernels of their own, the sizes about their limits, words of one and two elements, spare lanes and channels
SMALL_PLANES = [
    (1, 18, 56, 56), (2, 9, 28, 28), (3, 34, 14, 14), (5, 20, 7, 7), (1, 2, 57, 31), (1, 4, 55, 56), (1, 3, 29, 40), (2, 5, 27, 31),
    (1, 7, 15, 64), (1, 2, 64, 2), (2, 5, 2, 33), (3, 6, 8, 9), (2, 4, 1, 4), (1, 6, 4, 1),
    (3, 68, 7, 7), (2, 80, 14, 14), (1, 40, 56, 56), (2, 24, 40, 33),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SMALL_PLANES, ids=str)
def test_small_planes(host: Host, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x, grad = arrange(draw(*shape, dtype=dtype), layout), arrange(draw(*shape, dtype=dtype, seed=3), layout)
    for radius_squared in (4, sum(shape) % 4):
        check_filter(host, x, *profile(shape[1], radius_squared, dtype), radius_squared)
        check_backward(host, grad, x, radius_squared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_too_little_shared_memory_for_two_blocks(host: Host, dtype: torch.dtype) -> None:
    host.shared_limit = 100 << 10
    x = arrange(draw(1, 8, 56, 55, dtype=dtype), "channels_last")
    check_filter(host, x, *profile(8, 4, dtype), 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 3, 600), (1, 1, 600, 2)], ids=str)
def test_long_axes(host: Host, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    host.shared_limit = 48 << 10
    check_filter(host, draw(*shape, dtype=dtype), *profile(shape[1], 9, dtype), 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("radius_squared", [0, 9, 16, 30, None])
def test_radii(host: Host, radius_squared: int | None, layout: str, dtype: torch.dtype) -> None:
    height, width = 14, 17
    radius_squared = (height // 2) ** 2 + (width // 2) ** 2 if radius_squared is None else radius_squared
    x = arrange(draw(2, 3, height, width, dtype=dtype), layout)
    check_filter(host, x, *profile(3, radius_squared, dtype), radius_squared)
    check_backward(host, arrange(draw(2, 3, height, width, dtype=dtype, seed=3), layout), x, radius_squared)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_at_four_frequencies(host: Host, dtype: torch.dtype) -> None:
    for width in (12, 14):
        x = draw(2, 3, 14, width, dtype=dtype)
        check_filter(host, x, *profile(3, 20, dtype), 20)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_plane(host: Host, layout: str, dtype: torch.dtype) -> None:
    clean = arrange(draw(2, 6, 7, 6, dtype=dtype), layout)
    spoiled = clean.clone()
    spoiled[1, 2, 3, 4] = float("nan")
    base, gain = profile(6, 4, dtype)
    expected, actual = host.filter(clean, base, gain, 4), host.filter(spoiled, base, gain, 4)
    assert actual[1, 2].isnan().all()
    actual[1, 2] = expected[1, 2]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_size_changes_no_bit(host: Host, dtype: torch.dtype) -> None:
    x = draw(5, 3, 14, 14, dtype=dtype)
    base, gain = profile(3, 4, dtype)
    together = host.filter(x, base, gain, 4)
    for b in range(5):
        assert torch.equal(host.filter(x[b : b + 1].clone(), base, gain, 4), together[b : b + 1])


def test_batch_size_changes_no_bit_of_sliced_planes(host: Host) -> None:
    x = draw(3, 2, 44, 42, dtype=torch.float32)
    host.shared_limit = tile_of_one(x.shape, "contiguous", x.dtype)
    base, gain = profile(2, 4, torch.float32)
    assert torch.equal(host.filter(x[1:2].clone(), base, gain, 4), host.filter(x, base, gain, 4)[1:2])
