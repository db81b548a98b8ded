"""Load an image safely: upright 8-bit RGB, or ValueError.

Pillow alone reads a 16-bit scan with 2 of its 256 levels, shows the colour under transparent pixels, ignores the EXIF
orientation, starts Ghostscript for EPS files, takes 800 MB for some files of 20 KB, and fills truncated files with
grey where a library of the process asked for that.
"""

import io
import os
import threading
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

# Formats with the image size in their header and a decoder in Pillow. Left out: EPS and WMF, which start another
# program, ICO and ICNS, which hold a second file with a header of its own.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def load_rgb(source, max_pixels=50_000_000):
    """
    Load an image as upright RGB with 8 bits per channel.

    The EXIF orientation is applied, transparency composited on white, grey of more bits scaled to 8, and the first of
    several frames taken (of a `PIL.Image` the current one).

    Args:
        source: a path, the bytes of a file, an open binary file, or a `PIL.Image` of any mode.
        max_pixels (`int`): limit on width x height, checked on the header before any memory is allocated for pixels.

    Returns:
        `PIL.Image.Image`: mode RGB, no memory shared with the source.

    Raises:
        ValueError: a source that cannot be opened, is not in one of `FORMATS`, is damaged or truncated, has no pixels
            or more than `max_pixels`, or holds NaN or infinity.
        TypeError: a source of another type.
    """
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels, "image")
    if isinstance(source, (str, os.PathLike)):
        name = f"image {os.fspath(source)}"
        if os.path.exists(source) and not os.path.isfile(source):  # opening a pipe would wait for somebody to write
            raise ValueError(f"{name} cannot be read: it is not a regular file")
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, source = "image", io.BytesIO(source)
    elif hasattr(source, "read"):
        name = f"image {getattr(source, 'name', '')}".rstrip()
    else:
        raise TypeError(f"an image is a path, bytes, an open file or a PIL image, found {type(source).__name__}")
    Image.init()
    with _refuse_truncated_files(), _raise_value_errors(name):
        image = Image.open(source, formats=[known for known in FORMATS if known in Image.OPEN])
    with image:
        return _decode(image, max_pixels, name)


_lock = threading.Lock()
_saved_flags = []  # one entry per thread that reads now: the value of the flag before the first of them


@contextmanager
def _refuse_truncated_files():
    """Switches off `ImageFile.LOAD_TRUNCATED_IMAGES`, a flag of the whole process that some libraries switch on."""
    with _lock:
        _saved_flags.append(_saved_flags[0] if _saved_flags else ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _lock:
            before = _saved_flags.pop()
            if not _saved_flags:
                ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _raise_value_errors(name):
    """Malformed files make Pillow's decoders raise anything, from SyntaxError to struct.error."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not an image in one of the formats {', '.join(FORMATS)}; convert it first"
        ) from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {str(error) or type(error).__name__}") from error


def _decode(image, max_pixels, name):
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: it is {width} x {height}")
    if width * height > max_pixels:
        raise ValueError(f"{name} has {width} x {height} pixels, the limit is {max_pixels}; shrink it first")
    with _refuse_truncated_files(), _raise_value_errors(name):
        image.load()
        rgb = _to_rgb(image)
    rgb.info.clear()  # or the next reader would apply the orientation again
    rgb.getexif()[ExifTags.Base.Orientation] = _orientation(image, name)
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _to_rgb(image):
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey_levels(image)).convert("RGB")
    if image.mode == "La":  # premultiplied grey converts to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_levels(image):
    """Grey values of more than 8 bits (modes I;16, I, F) as an (h, w) array of uint8.

    White is 65535 for I;16. For I and F it is not defined: the first of 1 (F only), 255 and 65535 that no value
    exceeds is taken; larger or negative values are scaled from the smallest to the largest, with a warning.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        levels = np.rint(np.arange(65536) / 257).astype(np.uint8)[values]
        levels[values == image.info.get("transparency", -1)] = 255
        return levels
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    low, high = float(values.min()), float(values.max())
    whites = [1, 255, 65535] if image.mode == "F" else [255, 65535]
    if image.format == "PPM" and image.mode == "I":  # Pillow scales more than 8 bits to 65535
        whites = [65535]
    black, white = 0, next((white for white in whites if high <= white), None)
    if low < 0 or white is None:
        warnings.warn(
            f"grey values from {low:g} to {high:g} have no known white; stretched to 0 ... 255", stacklevel=4
        )
        black, white = low, high if high > low else low + 1
    return np.rint((values.astype(np.float64) - black) * (255 / (white - black))).astype(np.uint8)


def _orientation(image, name):
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as in _raise_value_errors, but the pixels are intact
        warnings.warn(f"the EXIF data of {name} cannot be read, orientation ignored: {error}", stacklevel=4)
        return 1
