"""Opening image files: only formats whose decoders are safe, and sizes that fit into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphprune.calibration.sources.contents import File
from graphprune.errors import LoadError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""What Pillow may open, whatever a file is called. Of its others some run programs (EPS), and most
are rarely used and rarely tested."""

PIXELS = 1 << 26
"""Pixels of an image, as it is stored and as it is scaled: 67 million, of four bytes at most."""


def decoded(file: File, mode: str) -> Image:
    """An image, upright; of several in a file the first.

    Args:
        file: an open image file.
        mode: what Pillow calls its channels: L, RGB or RGBA.

    Raises:
        LoadError: it is missing, damaged, of another format, or has more than `PIXELS` pixels,
            which its header says.
    """
    from PIL import Image as images
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with images.open(file.opened(), formats=FORMATS) as image:
            check_pixels(image.width, image.height, file.name)
            return ImageOps.exif_transpose(image).convert(mode)
    except FileNotFoundError:
        raise LoadError("the image does not exist", where=file.name) from None
    except images.DecompressionBombError as error:
        raise _too_large(str(error), file.name) from None
    except UnidentifiedImageError:
        raise LoadError(
            "the image can't be read",
            where=file.name,
            why=f"it is none of {', '.join(FORMATS)}, or damaged",
            hint="save it as PNG",
        ) from None
    except LoadError:
        raise
    except Exception as error:  # every decoder of Pillow raises errors of its own
        raise LoadError(
            "the image can't be read",
            where=file.name,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from error


def check_pixels(width: int, height: int, name: str, scaled: str = "", most: int = PIXELS) -> None:
    """Refuse an image of too many pixels.

    Args:
        width: of the image, as it is or will be.
        height: of the image, as it is or will be.
        name: of the file.
        scaled: how it came by this size.
        most: pixels.

    Raises:
        LoadError: it has more.
    """
    if width * height > most:
        raise _too_large(f"{width} x {height} pixels{scaled}, and {most:,} are the limit", name)


def _too_large(why: str, name: str) -> LoadError:
    return LoadError(
        "the image is too large",
        where=name,
        why=why,
        hint="scale it down, or crop it to about the shape of the model's input",
    )
