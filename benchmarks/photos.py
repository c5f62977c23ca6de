"""Real photographs through spectral_pool: every result against the fp64 reference, and one figure to look at.

The photographs are those that the wheel of scikit-image carries; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import skimage.data
import torch
from torch import Tensor

from spanet.images import save_picture
from spanet_kernels import reference, spectral_pool

from .ops import check
from .section import DTYPES, Options

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
LAMS = (1.0, 0.0, 0.7, 0.8, 0.9)
RADII = (2, 8, 16)
SHOWN = (("astronaut", 8), ("coffee", 8), ("chelsea", 16), ("rocket", 16))


def photo(name: str) -> Tensor:
    """(1, 3, H, W) fp64 values in 0..1."""
    return torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None].double() / 255


@dataclass(frozen=True)
class Row:
    """One photograph through one filter."""

    photo: str
    radius: float
    lam: float
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.photo}, r={self.radius:g} lam={self.lam:g} {self.dtype}"


def rows(options: Options) -> list[Row]:
    return [Row(name, radius, lam, dtype) for name in PHOTOS for radius in RADII for lam in LAMS for dtype in options.dtypes]


def run(chosen: list[Row], options: Options, advance: Callable[[str], None], result: dict[str, Any]) -> Iterator[None]:
    """Filter and check the chosen rows, then draw some. The reference gets the same rounded input."""
    for row in chosen:
        advance(row.name)
        x = photo(row.photo).to(options.device, DTYPES[row.dtype])
        y = spectral_pool(x, row.lam, row.radius)
        error, bound = check((y,), (reference.spectral_pool(x.double(), row.lam, row.radius),))
        found = asdict(row) | {"name": row.name, "shape": list(x.shape), "error": error, "bound": bound}
        result["rows"].append(found | {"right": error <= bound})
        yield
    advance("figure")
    figure(options.device, options.out / "photos.jpg")
    yield


def wrong(result: dict[str, Any]) -> list[str]:
    return [f"{row['name']}: error {row['error']:.1e}, {row['bound']:.1e} allowed" for row in result["rows"] if not row["right"]]


def figure(device: torch.device, path: Path) -> None:
    """Rows: photographs; columns: input, low-pass, high-pass around mid-grey, three balances."""
    import matplotlib.pyplot as plt

    titles = ("input", "low-pass, lam = 1", "high-pass, lam = 0", *(f"balanced, lam = {lam:g}" for lam in LAMS[2:]))
    heights = [photo(name).shape[2] / photo(name).shape[3] for name, _ in SHOWN]
    fig, axes = plt.subplots(len(SHOWN), 6, figsize=(14, 14 / 6 * sum(heights) + 0.4), height_ratios=heights, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for row, (name, radius) in zip(axes, SHOWN, strict=True):
        x = photo(name).to(device, torch.float32)
        low, high, *balanced = (spectral_pool(x, lam, radius) for lam in LAMS)
        for ax, image in zip(row, (x, low, high + 0.5, *balanced), strict=True):
            ax.imshow(image[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy())
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name}\n{x.shape[2]} x {x.shape[3]}, r = {radius}", fontsize=10)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(fig, path, pil_kwargs={"quality": 80})
    plt.close(fig)
