"""Re-create the demo images beside this file from public-domain photographs that ship inside the scikit-image wheel.

Run: `python datasets_demo/make.py` (needs only scikit-image, which brings Pillow).

The sources are read from the installed package, never from the network; ATTRIBUTION.md has their licences.
The captions (`<stem>.txt`) beside the images are written by hand and left as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import skimage.data
from PIL import Image

HERE = Path(__file__).resolve().parent
SOURCES = Path(skimage.data.__file__).resolve().parent
EXIF_ORIENTATION = 0x0112
ROTATE_ON_DISPLAY = 6  # EXIF: "turn the stored pixels 90 degrees clockwise to show them"
PALETTE_FIELDS, PALETTE_SIDE = 4, 96  # fields along a side of a palette, and its pixels
FADED_BLACK, FADED_WHITE = 52, 206  # grey levels that pure black and pure white become in a faded print


class Crop(NamedTuple):
    """One demo image: its name, the file it is cut from, the box there (left, top, right, bottom), its upright size."""

    name: str
    source: str
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    exif_rotated: bool = False


PHOTOS: tuple[Crop, ...] = (
    # astronaut.png: 512 x 512, colour
    Crop("astronaut_portrait", "astronaut.png", (60, 0, 396, 448), (384, 512), exif_rotated=True),
    Crop("astronaut_wide", "astronaut.png", (0, 0, 512, 288), (512, 288)),
    Crop("astronaut_flag", "astronaut.png", (0, 140, 180, 460), (288, 512)),
    Crop("astronaut_helmet", "astronaut.png", (254, 340, 512, 512), (384, 256)),
    Crop("shuttle_model", "astronaut.png", (346, 0, 510, 246), (256, 384)),
    Crop("closeups/astronaut_face", "astronaut.png", (138, 4, 318, 184), (272, 272)),
    Crop("closeups/astronaut_patch", "astronaut.png", (96, 322, 336, 502), (352, 264)),
    # chelsea.png: 451 x 300, colour
    Crop("cat_face", "chelsea.png", (0, 0, 450, 300), (450, 300)),
    Crop("cat_eyes", "chelsea.png", (96, 40, 384, 202), (480, 270)),
    Crop("cat_portrait", "chelsea.png", (130, 0, 355, 300), (288, 384)),
    Crop("cat_whiskers", "chelsea.png", (60, 126, 292, 300), (344, 258)),
    Crop("closeups/cat_nose", "chelsea.png", (186, 130, 350, 294), (256, 256)),
    # coffee.png: 600 x 400, colour
    Crop("coffee_table", "coffee.png", (0, 0, 600, 400), (510, 340)),
    Crop("coffee_cup", "coffee.png", (150, 5, 430, 285), (280, 280)),
    Crop("coffee_crema", "coffee.png", (176, 20, 424, 206), (344, 258)),
    Crop("coffee_spoon", "coffee.png", (288, 60, 484, 354), (256, 384)),
    Crop("coffee_handle", "coffee.png", (76, 120, 286, 400), (288, 384)),
    # rocket.jpg: 640 x 427, colour
    Crop("rocket_pad", "rocket.jpg", (0, 0, 640, 427), (512, 342)),
    Crop("rocket_tower", "rocket.jpg", (202, 0, 442, 427), (288, 512)),
    Crop("rocket_nose", "rocket.jpg", (238, 100, 408, 355), (256, 384)),
    Crop("rocket_lights", "rocket.jpg", (64, 259, 360, 426), (480, 270)),
    Crop("rocket_mast", "rocket.jpg", (0, 80, 240, 400), (288, 384)),
    # hubble_deep_field.jpg: 1000 x 872, colour
    Crop("galaxies_wide", "hubble_deep_field.jpg", (0, 0, 1000, 750), (512, 384)),
    Crop("galaxies_detail", "hubble_deep_field.jpg", (560, 360, 880, 680), (320, 320)),
    # camera.png, brick.png, gravel.png: 512 x 512, black and white
    Crop("cameraman_field", "camera.png", (0, 0, 512, 512), (400, 400)),
    Crop("cameraman_profile", "camera.png", (60, 40, 380, 280), (384, 288)),
    Crop("brick_rows", "brick.png", (0, 0, 384, 512), (312, 416)),
    Crop("gravel_stones", "gravel.png", (0, 64, 512, 352), (456, 256)),
)

# Of other photographs than all the rest, to see what a model does to pictures it was not trained on.
HELD_OUT: tuple[Crop, ...] = (
    # retina.jpg: 1411 x 1411, colour
    Crop("retina_disc", "retina.jpg", (60, 480, 660, 930), (352, 264)),
    Crop("retina_vessels", "retina.jpg", (520, 260, 1120, 860), (288, 288)),
    # grass.png: 512 x 512, black and white
    Crop("grass_blades", "grass.png", (0, 0, 384, 288), (352, 264)),
)

# The edit task "colorize": these are the targets; each reference is the same crop as a faded black-and-white print.
# Where there is a second reference it is a card of the target's colours.
EDITS: tuple[Crop, ...] = (
    Crop("astronaut", "astronaut.png", (0, 0, 512, 512), (400, 400)),
    Crop("astronaut_smile", "astronaut.png", (100, 0, 340, 320), (288, 384)),
    Crop("shuttle", "astronaut.png", (312, 0, 512, 300), (256, 384)),
    Crop("cat", "chelsea.png", (30, 0, 430, 300), (400, 300)),
    Crop("cat_gaze", "chelsea.png", (110, 20, 370, 280), (304, 304)),
    Crop("coffee", "coffee.png", (20, 0, 553, 400), (480, 360)),
    Crop("espresso", "coffee.png", (166, 10, 466, 379), (312, 384)),
    Crop("rocket", "rocket.jpg", (120, 60, 520, 427), (400, 367)),
    Crop("rocket_dusk", "rocket.jpg", (0, 67, 640, 427), (512, 288)),
    Crop("galaxies", "hubble_deep_field.jpg", (0, 400, 700, 872), (448, 302)),
)


def cut(crop: Crop) -> Image.Image:
    """The crop as an upright RGB image."""
    with Image.open(SOURCES / crop.source) as source:
        return source.convert("RGB").resize(crop.size, Image.Resampling.LANCZOS, box=crop.box)


def fade(image: Image.Image) -> Image.Image:
    """The image as a faded, low-contrast black-and-white print (still RGB, same size)."""
    span = FADED_WHITE - FADED_BLACK
    levels = [FADED_BLACK + round(level * span / 255) for level in range(256)]
    return image.convert("L").point(levels).convert("RGB")


def palette(image: Image.Image) -> Image.Image:
    """A small square card of the image's colours: the mean of each of its parts, as a field of its own."""
    fields = image.resize((PALETTE_FIELDS, PALETTE_FIELDS), Image.Resampling.BOX)
    return fields.resize((PALETTE_SIDE, PALETTE_SIDE), Image.Resampling.NEAREST)


def save(image: Image.Image, path: Path, *, exif_rotated: bool = False) -> None:
    """Write a JPEG; with `exif_rotated`, as a camera held on its side does: turned pixels and an EXIF tag saying so."""
    exif = Image.Exif()
    if exif_rotated:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[EXIF_ORIENTATION] = ROTATE_ON_DISPLAY
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92, subsampling="4:4:4", optimize=True, exif=exif)


def main() -> None:
    """Write the images of photos/, held_out/, edits/ and flux2_edits/ anew."""
    for crop in PHOTOS:
        save(cut(crop), HERE / "photos" / f"{crop.name}.jpg", exif_rotated=crop.exif_rotated)
    for crop in HELD_OUT:
        save(cut(crop), HERE / "held_out" / f"{crop.name}.jpg")
    for crop in EDITS:
        image = cut(crop)
        save(image, HERE / "edits" / "target" / f"{crop.name}.jpg")
        save(fade(image), HERE / "edits" / "reference" / f"{crop.name}.jpg")
        save(palette(image), HERE / "flux2_edits" / "palette" / f"{crop.name}.jpg")
    made = f"{len(PHOTOS)} photos, {len(HELD_OUT)} held out, {len(EDITS)} edit pairs with palettes"
    print(f"{made} written below {HERE.name}/")


if __name__ == "__main__":
    main()
