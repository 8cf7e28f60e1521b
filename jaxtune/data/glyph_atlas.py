"""Letters and digits of TrueType fonts as distance fields, ready to be warped.

A distance field instead of a picture: after any warp the stroke can still be made thicker, thinner or softer
by one addition and one division. Every glyph comes in two styles: "print", the outline as the font has it, and
"pen", its centre line alone, which with a width of its own looks like a stroke of a pen.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtune.errors import DataError

# Of the fonts that matplotlib brings, those with letters and digits in their own places. The others hold
# symbols there (cmex10, cmsy10), nothing at all (STIXSiz*), or one picture for a whole block (LastResort).
FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
    "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmti10.ttf", "cmmi10.ttf",
)  # fmt: skip

CELLS = 64  # of one field, each way
GLYPH_CELLS = 48  # of the glyph's longer side, in the middle of the field
POINTS = 160  # size at which glyphs are rendered before they are fitted

# No font draws these two; and a font that draws one of the others just like the character asked for draws
# the same picture for both.
_PROBES = ("\uffff", "\ue000", "A", "B", "0", "1")


@dataclass(frozen=True)
class Atlas:
    """The glyphs of some characters in some fonts.

    Attributes:
        fields: float32[num_entries, CELLS, CELLS]. Signed distance in cells, positive in the ink of a print
            entry, zero on the line and negative off it in a pen entry.
        is_pen: bool[num_entries].
        first, count: int64[num_classes]. Class c has entries first[c] … first[c] + count[c] - 1.
    """

    fields: np.ndarray
    is_pen: np.ndarray
    first: np.ndarray
    count: np.ndarray


@functools.lru_cache(maxsize=8)
def make_atlas(characters: Sequence[str], fonts: Sequence[str]) -> Atlas:
    """Renders every character in every font that has it; the result is kept in memory.

    Args:
        characters: One string of length one per class.
        fonts: Names of matplotlib's font files, or paths of other TrueType files.

    Raises:
        DataError: matplotlib is missing, a font cannot be read, or no font has one of the characters.
    """
    glyphs, first, count = [], [], []
    opened = [_open_font(font) for font in fonts]
    for character in characters:
        found = [glyph for font in opened if (glyph := _render(font, character)) is not None]
        if not found:
            raise DataError(
                f"glyphs: none of {len(fonts)} fonts has the character {character!r}. "
                "Leave it out of `classes`, or name a font that has it in `fonts`."
            )
        first.append(2 * len(glyphs))
        count.append(2 * len(found))
        glyphs.extend(found)
    ink = np.stack(glyphs)
    fields = np.empty((2 * len(glyphs), CELLS, CELLS), np.float32)
    for i, (glyph, line) in enumerate(zip(ink, thin(ink), strict=True)):
        # The outline runs between pixels, half a cell from the centres on either side.
        fields[2 * i] = np.where(glyph, _distance(~glyph) - 0.5, 0.5 - _distance(glyph))
        fields[2 * i + 1] = -_distance(line)
    is_pen = np.arange(len(fields)) % 2 == 1
    return Atlas(fields, is_pen, np.array(first), np.array(count))


def thin(masks: np.ndarray) -> np.ndarray:
    """Reduces shapes to lines one pixel wide that hang together as the shapes do.

    Shapes:
        masks: bool[N, H, W]; the outermost pixels must be False.
        return: bool[N, H, W].

    Reference:
        Zhang & Suen 1984, "A fast parallel algorithm for thinning digital patterns", CACM 27(3).
    """
    masks = masks.copy()
    is_changed = True
    while is_changed:
        is_changed = False
        for is_second in (False, True):
            doomed = masks & _is_removable(masks, is_second)
            is_changed |= bool(doomed.any())
            masks &= ~doomed
    return masks


def _is_removable(masks, is_second):
    """Pixels that one half-step of Zhang and Suen takes away."""
    # p2 … p9: the neighbours clockwise from the one above.
    steps = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
    around = [np.roll(masks, (-dy, -dx), axis=(1, 2)) for dy, dx in steps]
    north, _, east, _, south, _, west, _ = around
    num_neighbours = sum(p.astype(np.int8) for p in around)
    num_crossings = sum((~p & q).astype(np.int8) for p, q in zip(around, around[1:] + around[:1], strict=True))
    if is_second:
        is_side = ~(north & east & west) & ~(north & south & west)
    else:
        is_side = ~(north & east & south) & ~(east & south & west)
    return (num_neighbours >= 2) & (num_neighbours <= 6) & (num_crossings == 1) & is_side


def _distance(mask):
    """float32[H, W]: distance of every pixel to the nearest True one; zero on it."""
    from scipy import ndimage

    return ndimage.distance_transform_edt(~mask).astype(np.float32)


def _open_font(font):
    try:
        import matplotlib
        from PIL import ImageFont
    except ImportError as error:
        raise DataError(
            f"the data source 'glyphs' draws the fonts of matplotlib, which is not installed ({error}). "
            "Install it with: pip install 'jaxtune[report]'"
        ) from error
    path = Path(font)
    if path.name == font:
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    try:
        # Basic layout: the other engine is optional in Pillow and would place glyphs differently.
        return ImageFont.truetype(path, POINTS, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(
            f"glyphs: font {str(path)!r} cannot be read ({error}). "
            "A bare file name is looked up among matplotlib's fonts; anything else is a path to a .ttf file."
        ) from error


def _render(font, character):
    """bool[CELLS, CELLS]: the glyph, its box fitted into the middle; None where the font has none."""
    from PIL import Image

    picture = _draw(font, character)
    if picture is None:
        return None
    for probe in _PROBES:
        if probe != character:
            other = _draw(font, probe)
            if other is not None and other.size == picture.size and other.tobytes() == picture.tobytes():
                return None
    width, height = picture.size
    ratio = GLYPH_CELLS / max(width, height)
    width, height = max(1, round(width * ratio)), max(1, round(height * ratio))
    small = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    top, left = (CELLS - height) // 2, (CELLS - width) // 2
    field = np.zeros((CELLS, CELLS), bool)
    field[top : top + height, left : left + width] = small >= 96  # below one half: hairlines hold together
    return field


def _draw(font, character):
    """The character, bright on dark, cut to its box; None if nothing is drawn."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", (4 * POINTS, 4 * POINTS))
    ImageDraw.Draw(picture).text((POINTS, POINTS), character, font=font, fill=255)
    box = picture.getbbox()
    return picture.crop(box) if box else None
