"""Resize and crop a data set once and for all, into a ZIP archive that the training scripts read.

    python examples/prepare_images.py --source photos/ --dest photos-64.zip --resolution 64
    python examples/prepare_images.py --source cifar10 --dest cifar10-32.zip --resolution 32
    accelerate launch examples/train_fdm.py --train_data_dir photos-64.zip --resolution 64

The source is a folder (one subfolder for each class, if there are classes), a ZIP archive, or a data set on the Hub.
"""

import argparse

from tqdm.auto import tqdm

from diffusers_fastdiff.training.prepare import CROPS, read_images, write_archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder, ZIP archive or data set on the Hub")
    parser.add_argument("--dest", required=True, help="archive to write, .zip")
    parser.add_argument("--resolution", required=True, help="side in pixels, or WIDTHxHEIGHT")
    parser.add_argument("--crop", choices=CROPS, default="center", help="'wide' fills up to a square with black")
    parser.add_argument("--grayscale", action="store_true", help="one channel")
    parser.add_argument("--split", default="train", help="of a data set on the Hub")
    parser.add_argument("--image_column", help="of a data set on the Hub; by default the first one")
    parser.add_argument("--max_images", type=int, help="stop after so many")
    args = parser.parse_args()
    try:
        width, _, height = args.resolution.partition("x")
        width, height = int(width), int(height or width)
    except ValueError:
        raise ValueError(f"`--resolution` must be a number of pixels or WIDTHxHEIGHT, got {args.resolution!r}.") from None
    if min(width, height) < 1:
        raise ValueError(f"`--resolution` must be positive, got {args.resolution!r}.")
    images = read_images(args.source, args.split, args.image_column)
    if args.max_images is not None:
        images = (image for _, image in zip(range(args.max_images), images, strict=False))
    mode = "L" if args.grayscale else "RGB"
    written, skipped = write_archive(tqdm(images, desc="Images", unit=""), args.dest, width, height, args.crop, mode)
    print(f"{written} images of {width} x {height} pixels, {skipped} too small: {args.dest}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
