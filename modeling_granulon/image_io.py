"""The one door for untrusted images: whatever is given becomes an upright 8-bit RGB picture, or a ValueError.

Left to itself Pillow reads a 16-bit scan with 2 of its 256 levels, shows transparent pixels in whatever colour lies
under them, ignores the orientation a camera writes, starts Ghostscript for some files and takes 800 MB for others
that have 20 KB. And where any library of the process asked it to, it shows the missing half of a cut file as grey.
"""

import io
import os
import threading
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

# Formats whose header tells the size of the picture and whose decoder is part of Pillow. Not here: EPS and WMF, which
# start another program, ICO and ICNS, which hold a second file with a header of its own.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# EXIF orientation as stored -> what makes it upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_rgb(source, max_pixels=50_000_000):
    """
    Read an image from anywhere into an upright RGB picture with 8 bits per channel.

    The orientation is applied, transparency laid on white, a deeper grey scale brought to 8 bits, and of several
    frames the first is taken (of a `PIL.Image` the one it stands at).

    Args:
        source: a path, the bytes of a file, an open binary file, or a `PIL.Image` of any mode.
        max_pixels (`int`): the limit on width x height, checked on the header, before memory is taken for pixels.

    Returns:
        `PIL.Image.Image`: mode RGB, sharing nothing with the source.

    Raises:
        ValueError: if the source cannot be opened, is no image in one of `FORMATS`, is damaged or truncated, has no
            pixels or more than `max_pixels`, or holds NaN or infinity.
        TypeError: if the source is none of the above.
    """
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels, "image")
    if isinstance(source, (str, os.PathLike)):
        name = f"image {os.fspath(source)}"
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, source = "image", io.BytesIO(source)
    elif hasattr(source, "read"):
        name = f"image {getattr(source, 'name', '')}".rstrip()
    else:
        raise TypeError(f"an image is a path, bytes, an open file or a PIL image, found {type(source).__name__}")
    Image.init()
    with _whole_files_only(), _damage_is_a_value_error(name):
        image = Image.open(source, formats=[known for known in FORMATS if known in Image.OPEN])
    with image:
        return _decode(image, max_pixels, name)


_switch = threading.Lock()
_reading = []  # for each thread that reads now, how the switch stood before the first of them


@contextmanager
def _whole_files_only():
    """Turns off `ImageFile.LOAD_TRUNCATED_IMAGES`, a switch of the whole process that some libraries turn on."""
    with _switch:
        _reading.append(_reading[0] if _reading else ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _switch:
            before = _reading.pop()
            if not _reading:
                ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextmanager
def _damage_is_a_value_error(name):
    """Pillow raises whatever a malformed file leads its decoders into, from SyntaxError to struct.error."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image in one of the formats {', '.join(FORMATS)}; convert it first") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {str(error) or type(error).__name__}") from error


def _decode(image, max_pixels, name):
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: it is {width} x {height}")
    if width * height > max_pixels:
        raise ValueError(f"{name} has {width} x {height} pixels, the limit is {max_pixels}; shrink it first")
    with _whole_files_only(), _damage_is_a_value_error(name):
        image.load()
        rgb = _to_rgb(image)
    rgb.info.clear()  # or the orientation would be applied again by the next reader
    return _upright(rgb, image, name)


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

    I;16 has a known white, 65535. I and F do not say theirs: it is the first of 1 (F only), 255 and 65535 that no
    value exceeds; values beyond these are stretched from the darkest to the brightest, with a warning.
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
    if image.format == "PPM" and image.mode == "I":  # Pillow brings more than 8 bits to 65535
        whites = [65535]
    black, white = 0, next((white for white in whites if high <= white), None)
    if low < 0 or white is None:
        warnings.warn(
            f"grey values from {low:g} to {high:g} have no known white; stretched to 0 ... 255", stacklevel=4
        )
        black, white = low, high if high > low else low + 1
    return np.rint((values.astype(np.float64) - black) * (255 / (white - black))).astype(np.uint8)


def _upright(rgb, image, name):
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # as in _damage_is_a_value_error, but the pixels are whole
        warnings.warn(f"the EXIF data of {name} cannot be read, shown as stored: {error}", stacklevel=4)
        orientation = None
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
