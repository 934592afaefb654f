"""One image to another size."""

import numpy as np
from jaxtyping import UInt8


def resize(pixels: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "size size c"]:
    """The centre square, resized to `size` (bilinear with antialiasing, by Pillow)."""
    height, width, channels = pixels.shape
    if (height, width) == (size, size):
        return pixels
    from PIL import Image

    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    image = Image.fromarray(square[..., 0] if channels == 1 else square)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, channels)
