"""load_rgb: every picture a person may bring comes out as a viewer shows it, everything else is a ValueError."""

import io
import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from modeling_granulon.image_io import FORMATS, load_rgb

WIDTH, HEIGHT = 24, 16
# EXIF orientation -> how an upright picture is stored.
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
GREY = (np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 255 // (WIDTH * HEIGHT - 1)).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source):
    image = load_rgb(source)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def picture(mode):
    """The grey ramp in any of Pillow's modes."""
    grey = Image.fromarray(GREY)
    if mode.startswith("I;16"):
        order = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(mode, grey.size, (GREY.astype(np.uint16) * 257).astype(order).tobytes())
    between = {"P": "L", "La": "LA", "PA": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
    return grey.convert(between).convert(mode)


# ----- what comes out


@pytest.mark.parametrize(
    "mode",
    "L P PA LA La RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16L I;16B I;16N".split(),
)
def test_every_mode_shows_the_same_picture(mode):
    assert np.abs(pixels(picture(mode)) - GREY[..., None]).max() <= 2


def test_bilevel_is_black_and_white():
    assert set(pixels(picture("1")).ravel()) == {0, 255}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_all_256_levels(format):
    deep = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    levels = pixels(encoded(deep, format))[..., 0]
    assert np.array_equal(levels, np.rint(np.arange(65536) / 257).reshape(256, 256))


def test_a_dark_16_bit_picture_stays_dark():
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))
    for format in ("PNG", "TIFF", "PPM"):
        assert pixels(encoded(dark, format)).max() == 1


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_grey_finds_its_white(white):
    ramp = Image.fromarray((GREY / 255 * white).astype(np.float32))
    assert np.abs(pixels(ramp) - GREY[..., None]).max() <= 1
    assert np.abs(pixels(encoded(ramp, "TIFF")) - GREY[..., None]).max() <= 1


@pytest.mark.parametrize("low, high", [(-1000, 3000), (0, 2.0e9), (-3.0e38, 3.0e38)])
def test_grey_without_a_known_white_is_stretched_and_says_so(low, high):
    ramp = Image.fromarray((low + GREY / 255.0 * high - GREY / 255.0 * low).astype(np.float32))
    with pytest.warns(UserWarning, match="stretched"):
        assert np.abs(pixels(ramp) - GREY[..., None]).max() <= 1


def test_constant_grey_does_not_divide_by_zero():
    with pytest.warns(UserWarning, match="stretched"):
        assert pixels(Image.new("I", (3, 3), -5)).max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(ValueError, match="NaN or infinity"):
        load_rgb(Image.new("F", (3, 3), value))


def transparent_pictures():
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    yield "RGBA", encoded(red, "PNG")
    yield "WebP", encoded(red, "WEBP", lossless=True, exact=True)
    yield "RGBa", red.convert("RGBa")
    yield "LA", encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")
    yield "La", Image.new("LA", (4, 4), (0, 0)).convert("La")
    yield "PA", Image.new("PA", (4, 4), (3, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    yield "P, one index", encoded(palette, "PNG", transparency=1)
    yield "P, alpha per index", encoded(palette, "PNG", transparency=bytes([255, 0]))
    yield "P in a GIF", encoded(palette, "GIF", transparency=1)
    yield "RGB with a key", encoded(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", transparency=(255, 0, 0))
    yield "L with a key", encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)
    yield "1 with a key", encoded(Image.new("1", (4, 4), 0), "PNG", transparency=0)
    yield "I;16 with a key", encoded(Image.new("I;16", (4, 4), 700), "PNG", transparency=700)


@pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in transparent_pictures()])
def test_transparent_pixels_are_white(source):
    assert pixels(source).min() == 255


def test_half_transparent_is_half_white():
    assert pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 51)))[0, 0].tolist() == [204] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied_once(format, orientation):
    seen = Image.fromarray(COLOUR).resize((96, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(seen if orientation == 1 else seen.transpose(STORED_AS[orientation]), format, exif=exif)
    assert np.abs(pixels(data) - np.asarray(seen)).mean() < 6
    assert load_rgb(load_rgb(data)).size == seen.size


def test_orientation_of_an_opened_image_is_applied_without_changing_it():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(io.BytesIO(encoded(Image.fromarray(COLOUR), "PNG", exif=exif)))
    assert load_rgb(image).size == (HEIGHT, WIDTH)
    assert image.size == (WIDTH, HEIGHT)


def test_broken_exif_leaves_the_picture_and_warns():
    data = encoded(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1" + b"\xff" * 3)
    with pytest.warns(UserWarning, match="EXIF"):
        assert pixels(data).shape == COLOUR.shape


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "lime")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data)[4, 4] - [0, 0, 255]).max() <= 8


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    data = encoded(Image.fromarray(COLOUR), "PNG")
    path = tmp_path / "picture"  # no suffix: the content decides
    path.write_bytes(data)
    with open(path, "rb") as file:
        for source in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file):
            assert np.array_equal(pixels(source), COLOUR)


def test_the_result_shares_nothing_with_the_source():
    source = Image.fromarray(COLOUR)
    load_rgb(source).paste((0, 0, 0), (0, 0, WIDTH, HEIGHT))
    assert np.array_equal(np.asarray(source), COLOUR)


# ----- what is refused


@pytest.mark.parametrize(
    "source", [b"", b"not an image" * 50, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"]
)
def test_other_files_than_images_are_refused(source):
    with pytest.raises(ValueError, match="is not an image in one of the formats AVIF, .* convert it"):
        load_rgb(source)


def test_formats_that_start_another_program_are_refused():
    with pytest.raises(ValueError, match="is not an image"):
        load_rgb(encoded(Image.fromarray(COLOUR), "EPS"))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(ValueError, match=path.name):
            load_rgb(path)


@pytest.mark.parametrize("source", [None, 7, np.zeros((4, 4, 3), np.uint8)])
def test_other_types_are_a_type_error(source):
    with pytest.raises(TypeError, match="found"):
        load_rgb(source)


def cut(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    return data[: len(data) // 2]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "where a library of the process shows them"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_a_truncated_file_is_refused(format, elsewhere, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", elsewhere)
    with pytest.raises(ValueError, match="cannot be read|is not an image"):
        load_rgb(cut(format))
    assert ImageFile.LOAD_TRUNCATED_IMAGES == elsewhere


def test_a_truncated_file_is_refused_in_every_thread_that_reads(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    def refused(data):
        try:
            load_rgb(data)
        except ValueError:
            return True
        return False

    files = [cut("JPEG"), cut("BMP"), encoded(Image.fromarray(COLOUR), "PNG")] * 500
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(refused, files)) == [True, True, False] * 500
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_an_empty_picture_is_refused():
    with pytest.raises(ValueError, match="0 x 5"):
        load_rgb(Image.new("RGB", (0, 5)))


def test_the_limit_is_a_limit_on_pixels():
    image = Image.new("RGB", (20, 10))
    assert load_rgb(image, max_pixels=200).size == (20, 10)
    with pytest.raises(ValueError, match="20 x 10 pixels, the limit is 199"):
        load_rgb(image, max_pixels=199)


def blank_png(width, height):
    """A black 8-bit grey PNG, compressed as well as PNG can."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(bytes((width + 1) * height), 9)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def forged(format, width=16_000, height=16_000):
    """A small file of a format whose header claims a picture of width x height."""
    data = bytearray(
        encoded(Image.new("RGB", (64, 48), "red"), format, **({"lossless": True} if format == "WEBP" else {}))
    )
    if format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif format == "WEBP":
        data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    elif format == "TGA":
        data[12:16] = struct.pack("<HH", width, height)
    elif format == "PPM":
        data = bytearray(bytes(data).replace(b"64 48", f"{width} {height}".encode()))
    elif format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    elif format == "JPEG2000":
        start = data.index(b"ihdr") + 4
        data[start : start + 8] = struct.pack(">II", height, width)
    elif format == "AVIF":
        start = data.index(b"ispe") + 8
        data[start : start + 8] = struct.pack(">II", width, height)
    elif format == "TIFF":
        for tag, value in ((256, width), (257, height)):
            start = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
            data[start : start + 4] = struct.pack("<I", value)
    return bytes(data)


MEASURE = """
import resource, sys
from modeling_granulon.image_io import load_rgb
load_rgb(open(sys.argv[1], "rb").read())                     # the decoder and its library are now in memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_rgb(open(sys.argv[2], "rb").read())
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "TGA", "PPM", "JPEG", "JPEG2000", "AVIF", "TIFF"])
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_a_huge_picture_in_a_small_file_is_refused_before_memory_is_taken(format, tmp_path):
    huge = blank_png(13_000, 13_000) if format == "PNG" else forged(format)
    (tmp_path / "huge").write_bytes(huge)
    (tmp_path / "small").write_bytes(encoded(Image.new("RGB", (64, 48), "red"), format))
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, tmp_path / "small", tmp_path / "huge"]
    root = Path(__file__).parents[2]
    grown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert len(huge) < 200_000
    assert int(grown) < 20_000, f"{grown} kB for a file of {len(huge)} bytes"


# ----- mutated files


def seeds():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "camera"
    frames = [Image.fromarray(COLOUR[::-1])]
    for format in FORMATS:
        for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"):
            try:
                yield encoded(picture(mode), format)
            except (OSError, ValueError):  # the format has no such mode
                continue
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        yield encoded(Image.fromarray(COLOUR), format, exif=exif)
    for format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        yield encoded(Image.fromarray(COLOUR), format, save_all=True, append_images=frames)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        yield encoded(picture("1" if compression == "group4" else "RGB"), "TIFF", compression=compression)
    yield encoded(Image.fromarray(COLOUR), "JPEG", progressive=True, quality=90)
    yield encoded(picture("P"), "PNG", transparency=bytes(range(200)))


def mutated(data, rng):
    """One to eight wounds: flipped bits, extreme numbers, cuts, repeats; most of them in the header."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        reach = len(data) if rng.random() < 0.4 else min(len(data), 120)
        at = rng.randrange(max(reach, 1))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = rng.randbytes(1)
        elif kind == 2:
            data[at : at + 4] = rng.choice(
                [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
            )
        elif kind == 3:
            del data[at : at + rng.randint(1, 16)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 16)]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_20_000_mutated_files_give_a_picture_or_a_value_error():
    rng = random.Random(0)
    corpus = list(seeds())
    count, read = 20_000, 0
    for index in range(count):
        data = mutated(corpus[index % len(corpus)], rng)
        try:
            image = load_rgb(data, max_pixels=1_000_000)
        except ValueError:
            continue
        assert image.mode == "RGB" and min(image.size) > 0
        read += 1
    assert count * 0.1 < read < count * 0.9, "the mutations are too weak or too strong to test anything"
