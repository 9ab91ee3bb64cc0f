"Pictures as people have them: colour profiles, odd EXIF data, JPEGs that never end. Every input is made here."

import struct
import time
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from conftest import BUNDLED
from PIL import Image, ImageCms
from pillow_heif import from_pillow

from facesr import images
from facesr.images import read_image, upright_rgb

# Colour profiles (ICC version 2, the form that cameras and printers write)


def fixed(*numbers):
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def xyz(*values):
    return b"XYZ \0\0\0\0" + fixed(*values)


def curve(*values):
    "One value is a power, in steps of 1/256; more are a table."
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *values)


def profile(space, connection, **tags):
    "An ICC profile with these tags."
    white = (0.9642, 1, 0.8249)
    parts = {"desc": b"desc\0\0\0\0\0\0\0\5test\0" + bytes(78), "cprt": b"text\0\0\0\0none\0", "wtpt": xyz(*white)}
    parts |= tags
    table, data, start = b"", b"", 132 + 12 * len(parts)
    for name, part in parts.items():
        table += name.encode() + struct.pack(">II", start + len(data), len(part))
        data += part + bytes(-len(part) % 4)
    size = start + len(data)
    head = struct.pack(">I4xI4s4s4s12x4s", size, 0x02100000, b"mntr", space, connection, b"acsp")
    return (head + bytes(28) + fixed(*white)).ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + data


def rgb_profile(primaries, response):
    columns = dict(zip(("rXYZ", "gXYZ", "bXYZ"), (xyz(*column) for column in primaries)))
    return profile(b"RGB ", b"XYZ ", **columns, **dict.fromkeys(("rTRC", "gTRC", "bTRC"), response))


# XYZ of red, green and blue, adapted to the white of profiles (D50)
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
OTHERS = {
    "Adobe RGB": ([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 563 / 256),
    "Display P3": ([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)], 2.2),
    "ProPhoto": ([(0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)], 461 / 256),
}


def linear(levels):
    "The light of sRGB levels in [0, 1]."
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def levels_of(light):
    "The 8-bit sRGB levels of light."
    light = np.clip(light, 0, 1)
    return np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


def in_srgb(levels, primaries, power):
    "Colour science by hand: levels to light, light to XYZ, XYZ to the light of sRGB, that to levels."
    return levels_of((levels / 255) ** power @ np.array(primaries) @ np.linalg.inv(SRGB))


def saved(image, format="PNG", **options):
    image.save(buffer := BytesIO(), format, **options)
    return buffer.getvalue()


def heic(image, **info):
    "A photograph as phones make them."
    photograph = from_pillow(image)
    photograph.info.update(info)
    photograph.save(buffer := BytesIO(), quality=-1, chroma=444)
    return buffer.getvalue()


def apart(image, levels):
    "The largest difference in levels."
    return np.abs(np.asarray(image).astype(int) - levels).max()


@pytest.fixture
def colours():
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(images, "_said", set(), raising=False)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_rgb_profiles_are_brought_to_srgb(colours, name, format):
    primaries, power = OTHERS[name]
    icc = rgb_profile(primaries, curve(round(power * 256)))
    expected = in_srgb(colours.astype(float), primaries, round(power * 256) / 256)
    content = saved(Image.fromarray(colours), format, icc_profile=icc, lossless=True)
    assert apart(read_image(content), expected) <= 1
    assert np.abs(expected - colours).max() > 20  # that is what was wrong
    clear = Image.fromarray(colours)
    clear.putalpha(51)
    content = saved(clear, format, icc_profile=icc, lossless=True)
    assert apart(read_image(content), 204 + expected / 5) <= 1


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("power", [1, 1.8, 2.2])
def test_grey_profiles_are_brought_to_srgb(format, power):
    grey = np.repeat(np.arange(0, 256, 8, dtype=np.uint8), 8)[None].repeat(8, 0)
    icc = profile(b"GRAY", b"XYZ ", kTRC=curve(round(power * 256)))
    expected = levels_of((grey[..., None] / 255) ** (round(power * 256) / 256))
    image = Image.fromarray(grey)
    assert apart(read_image(saved(image, format, icc_profile=icc, quality=100)), expected) <= 1
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert apart(read_image(saved(sixteen, icc_profile=icc)), expected) <= 1
    assert apart(read_image(saved(image.convert("LA"), icc_profile=icc)), expected) <= 1


def press():
    "A profile for CMYK of whose inks each has a lightness and a tint of its own; its table has the 16 corners."
    corners = []
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        lightness, a, b = 100 - 60 * k - 10 * (c + m + y), 30 * (m - c), 30 * y - 15 * (c + m)
        corners += [round(lightness * 2.55), a + 128, b + 128]
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * ramp + bytes(corners) + 3 * ramp
    return profile(b"CMYK", b"Lab ", A2B0=table)


def test_cmyk_profiles_are_brought_to_srgb():
    # of each ink alone: sRGB of the Lab colour that the profile names
    expected = {"c": (134, 243, 255), "m": (255, 205, 253), "y": (239, 226, 169), "k": (95, 94, 94)}
    for i, levels in enumerate(expected.values()):
        ink = [0, 0, 0, 0]
        ink[i] = 255
        image = Image.new("CMYK", (8, 8), tuple(ink))
        shown = read_image(saved(image, "JPEG", icc_profile=press(), quality=100)).getpixel((4, 4))
        assert np.abs(np.subtract(shown, levels)).max() <= 8, (shown, levels)
        assert np.abs(np.subtract(shown, image.convert("RGB").getpixel((4, 4)))).max() > 80


def test_profiles_that_mean_srgb_change_no_pixel(colours):
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table = curve(*(round(float(light) * 65535) for light in linear(np.arange(1024) / 1023)))
    for icc in (own, rgb_profile(SRGB, table)):
        assert apart(read_image(saved(Image.fromarray(colours), icc_profile=icc)), colours) == 0
        grey = Image.fromarray(colours[..., 0])
        assert apart(read_image(saved(grey, icc_profile=icc)), colours[..., :1]) == 0


def test_no_bundled_face_has_a_profile_or_exif_data():
    for path in BUNDLED.rglob("*.jpg"):
        head = path.read_bytes()[:2000]
        assert b"ICC_PROFILE" not in head and b"Exif" not in head, path


def test_pictures_are_brought_to_srgb_once(colours):
    primaries, power = OTHERS["Adobe RGB"]
    first = read_image(saved(Image.fromarray(colours), icc_profile=rgb_profile(primaries, curve(563))))
    assert apart(upright_rgb(first), np.asarray(first).astype(int)) == 0


def damaged_pictures(tmp_path):
    "Files whose profile cannot be used, and why."
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    red, ink = Image.new("RGB", (16, 16), "red"), Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    zipped = bytearray(saved(red, icc_profile=own))
    at = zipped.index(b"iCCP")
    end = at + 4 + int.from_bytes(zipped[at - 4 : at], "big")
    zipped[at + 30 : at + 50] = b"\xff" * 20
    zipped[end : end + 4] = zlib.crc32(zipped[at:end]).to_bytes(4, "big")
    bad = {
        "cut.png": saved(red, icc_profile=own[:200]),
        "junk.jpg": saved(red, "JPEG", icc_profile=b"junk", quality=100),
        "tables.webp": saved(red, "WEBP", icc_profile=own[:132] + b"\xff" * 400, lossless=True),
        "zipped.png": bytes(zipped),
        "lab.png": saved(red, icc_profile=lab),
        "press.png": saved(red, icc_profile=press()),
        "screen.jpg": saved(ink, "JPEG", icc_profile=own, quality=100),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in bad]


def test_a_broken_profile_falls_back_and_is_said_once(tmp_path):
    files = damaged_pictures(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in files * 2:
            assert apart(read_image(path), (255, 0, 0)) <= 2, path
    told = [str(warning.message) for warning in caught]
    reasons = ["is damaged", "is one for Lab and not for RGB", "is one for CMYK and not for RGB"]
    reasons.append("is one for RGB and not for CMYK")
    named = [files[0], tmp_path / "lab.png", tmp_path / "press.png", tmp_path / "screen.jpg"]
    starts = [f"{path}: its colour profile {reason}; its colours are" for path, reason in zip(named, reasons)]
    assert len(told) == 4 and all(line.startswith(start) for line, start in zip(told, starts)), told


# EXIF data


def exif(*entries, after=b""):
    "EXIF data of entries (number, type, count, value of four bytes)."
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + after


TURNED = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_unreadable_exif_entries_do_not_matter(format):
    generator = np.random.default_rng(0)
    image = Image.new("RGB", (40, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            numbers = [0x010F, 0x011A, 0x0128, 0x8769, 0x8825, 0x927C, *generator.integers(0x0113, 65536, 3)]
            odd = [
                (int(n), int(generator.integers(16)), int(generator.choice([0, 1, 3, 9, 2**32 - 1])), b"\x1a\0\0\xff")
                for n in generator.choice(numbers, 3)
            ]
            data = exif(TURNED, *odd, after=generator.bytes(40))
            assert read_image(saved(image, format, exif=data)).size == (20, 40), odd
    assert read_image(saved(image, format, exif=exif(TURNED)[:20])).size == (40, 20)  # lost: as it lies


def test_pictures_are_turned_once_in_all_eight_ways():
    lying = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)).convert("RGB")
    upright, enlarged = np.asarray(lying), np.asarray(lying.resize((48, 32), 0))
    ways = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.swapaxes(0, 1)]
    ways += [lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), np.rot90]
    for number, way in enumerate(ways, start=1):
        read = read_image(saved(lying, exif=exif((0x0112, 3, 1, bytes([number, 0, 0, 0])))))
        assert np.array_equal(read, way(upright)), number
        assert np.array_equal(upright_rgb(read), read), number
        tiff = saved(lying, "TIFF", compression="tiff_lzw", exif=exif((0x0112, 3, 1, bytes([number, 0, 0, 0])))[6:])
        assert np.array_equal(read_image(tiff), way(upright)), number
        turned = read_image(heic(lying.resize((48, 32), 0), exif=exif((0x0112, 3, 1, bytes([number, 0, 0, 0])))))
        assert turned.size == way(np.zeros((32, 48))).shape[::-1] and apart(turned, way(enlarged)) <= 2, number


# JPEGs with many scans


def with_scans(size, more):
    "A progressive JPEG whose last scan comes again and again."
    content = saved(Image.new("RGB", (size, size), "gray"), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + more * scan + content[-2:]


def test_a_jpeg_of_many_scans_is_refused_at_once():
    content = with_scans(2000, 10_000)
    assert len(content) < 400_000
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"gone over 10,010 times \(scans of a JPEG\); allowed are 100"):
        read_image(content)
    assert time.perf_counter() - start < 1
    assert read_image(with_scans(200, 90)).size == (200, 200)


def test_what_looks_like_scans_does_not_count():
    "A preview, filling bytes, restart markers, and a film behind the picture."
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8))
    content = saved(picture, "JPEG", progressive=True, comment=b"\xff\xda" * 500, restart_marker_blocks=1)
    assert read_image(content + b"\xff\xda\0\2" * 500).size == (99, 99)
    assert images._scans(content) == 10
    filled = saved(picture, "JPEG", progressive=True).replace(b"\xff\xda", b"\xff\xff\xff\xda")
    assert images._scans(filled) == 10 and read_image(filled).size == (99, 99)


# Photographs of phones, TIFF files


def test_heic_is_read_and_nothing_else_is_opened_for_it(colours):
    primaries, power = OTHERS["Display P3"]
    icc = rgb_profile(primaries, curve(round(power * 256)))
    expected = in_srgb(colours.astype(float), primaries, power)
    content = heic(Image.fromarray(colours), icc_profile=icc)
    assert np.abs(np.asarray(read_image(content)) - expected).mean() < 1  # it is lossy; without the profile 12
    assert "HEIF" not in Image.OPEN
    for damaged in (content[:20], content[:300], content[: len(content) // 2], content[:-5]):
        with pytest.raises(ValueError, match=r"^is damaged \(.*\); copy it again, or save it anew$"):
            read_image(damaged)


@pytest.mark.parametrize("brand", [b"avif", b"isom", b"qt  "])
def test_films_are_no_photographs(brand):
    content = heic(Image.new("RGB", (64, 64)))
    content = content[:8] + brand + content[12:]
    with pytest.raises(ValueError, match="no image that can be decoded; save it as JPEG, PNG, WebP, BMP, TIFF or HEIC"):
        read_image(content)


def test_a_heic_that_is_larger_than_it_says_is_refused():
    content = heic(Image.new("L", (640, 640)))
    small = content.replace(struct.pack(">II", 640, 640), struct.pack(">II", 64, 64))
    assert small != content
    with pytest.raises(ValueError, match="^is damaged .*Image size 640x640 exceeds"):
        read_image(small)


def tiff(tags, pixels):
    "A TIFF file with these tags, each a number of two bytes or several; the pixels are where tag 273 says."
    place = 8 + 2 + 12 * len(tags) + 4
    entries, after = b"", b""
    for tag, value in sorted(tags.items()):
        packed = struct.pack(f"<{len(value)}H", *value) if isinstance(value, tuple) else struct.pack("<HH", value, 0)
        count = len(value) if isinstance(value, tuple) else 1
        if len(packed) > 4:
            after, packed = after + packed, struct.pack("<I", place + len(after))
        entries += struct.pack("<HHI", tag, 3, count) + packed.ljust(4, b"\0")
    at = struct.pack("<HHII", 273, 3, 1, 0)
    entries = entries.replace(at, at[:8] + struct.pack("<I", place + len(after)))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + after + pixels


def one_pixel(bits, meaning, pixels):
    bits = bits if isinstance(bits, tuple) else (bits,)
    return tiff({256: 1, 257: 1, 258: bits, 259: 1, 262: meaning, 273: 0, 277: len(bits), 279: len(pixels)}, pixels)


@pytest.mark.parametrize(
    "bits, meaning, pixels, expected",
    [
        ((16, 16, 16), 2, struct.pack("<3H", 65535, 100 * 257, 0), (255, 100, 0)),
        (16, 1, struct.pack("<H", 100 * 257), (100, 100, 100)),
        (8, 0, b"\0", (255, 255, 255)),
        (16, 0, struct.pack("<H", 0), "holds grey of 16 bits whose white is not known; save it with 8 or 16 bit"),
        (12, 1, b"\xff\xf0", "holds grey of 12 bits whose white is not known; save it with 8 or 16 bit"),
        (32, 1, bytes(4), "holds 32-bit integers, whose range is not known; save it with 8 or 16 bit"),
        ((32, 32, 32), 2, bytes(12), "no image that can be decoded; save it as"),
    ],
)
def test_tiff_in_many_bits(bits, meaning, pixels, expected):
    content = one_pixel(bits, meaning, pixels)
    if isinstance(expected, tuple):
        assert read_image(content).getpixel((0, 0)) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            read_image(content)


def test_a_tiff_of_many_pages_is_refused_at_the_second():
    page = bytearray(one_pixel(8, 1, b"\0"))
    page += bytes(len(page) % 2)
    end = 8 + 2 + 12 * 8  # of the first page: where the next one is
    page[end : end + 4] = struct.pack("<I", len(page))
    start, many = len(page), 100_000
    for number in range(1, many + 1):
        page += struct.pack("<HHHIII", 1, 256, 3, 1, 1, start + 18 * number if number < many else 0)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="it is several pages; save the one that is meant"):
        read_image(bytes(page))
    assert time.perf_counter() - begun < 1


def test_a_picture_that_breaks_off_is_told_so_in_every_format():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8))
    whole = {format: saved(noise, format) for format in ("JPEG", "PNG", "BMP", "TIFF")}
    parts = [content[: len(content) * 2 // 3] for content in whole.values()] + [whole["PNG"][:22], whole["PNG"][:-30]]
    for content in parts:
        with pytest.raises(ValueError, match="^image file is truncated; copy it again from where it is whole$"):
            read_image(content)
