"""Sources of images and what is wrong with them."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_fastdiff.evaluation.image_store import ImageStore
from diffusers_fastdiff.evaluation.images import open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


def same(images) -> bool:
    found = torch.stack([images[index] for index in range(len(images))])
    return torch.equal(found, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))


def test_folder_archive_and_array_hold_the_same(folder, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed")
    store = ImageStore(packed, [{"seed": k, "prompt": f"p{k}"} for k in range(5)], ["tar", "npz"], images_per_archive=2)
    store.start({})
    for index, pixels in enumerate(PIXELS):
        store.save(index, Image.fromarray(pixels))
    store.pack()
    assert sorted(path.suffix for path in packed.iterdir()) == [".json", ".jsonl", ".npz", ".tar", ".tar", ".tar"]

    with zipfile.ZipFile(tmp_path_factory.mktemp("zip") / "a.zip", "w") as archive:
        archive.writestr("dataset.json", "{}")
        for index in reversed(range(5)):
            archive.write(folder / f"{index}.png", f"00000/img{index}.png")

    loose, archives, array = open_images(folder), open_images(packed), open_images(packed / "images.npz")
    assert same(open_images(archive.filename))
    assert same(loose)
    assert same(archives)
    assert same(array)
    assert archives.prompts == ["p0", "p1", "p2", "p3", "p4"]
    np.testing.assert_array_equal(np.load(packed / "images.npz")["arr_0"], PIXELS)  # as ADM's program reads it


def test_fingerprint_follows_the_content(folder):
    before = open_images(folder).fingerprint
    assert open_images(folder).fingerprint == before
    changed = PIXELS[3].copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(folder / "3.png")
    assert open_images(folder).fingerprint != before


def test_grey_images_and_embedded_digits():
    digits = open_images("digits")
    assert (len(digits), digits.shape, digits[0].dtype) == (1797, (1, 8, 8), torch.uint8)
    assert {int(value) for value in digits[0].unique()} <= {round(k * 255 / 16) for k in range(17)}


def test_datasets_are_cut_to_squares(folder):
    images = open_images(f"hub:{folder}", resolution=4)
    assert (len(images), images.shape) == (5, (3, 4, 4))
    assert images.fingerprint != open_images(f"hub:{folder}", resolution=5).fingerprint


def test_empty_and_missing_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`resolution` must be given"):
        open_images("hub:someone/something")


def test_mixed_images_are_refused(folder):
    Image.new("RGB", (6, 9)).save(folder / "9.png")
    with pytest.raises(ValueError, match=r"0\.png is 6x8 colour, 9\.png is 6x9 colour"):
        open_images(folder)
    Image.new("L", (6, 8)).save(folder / "9.png")
    with pytest.raises(ValueError, match=r"9\.png is 6x8 grey"):
        open_images(folder)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_damaged_images_are_named(folder, damage):
    data = (folder / "2.png").read_bytes()
    middle = len(data) // 2
    damaged = {
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        "text": b"not an image",
    }
    (folder / "2.png").write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"2\.png is no intact image"):
        open_images(folder)


def test_damaged_archives_are_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"rubbish" * 1000)
    with pytest.raises(ValueError, match=r"a\.tar is no readable"):
        open_images(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("0.png")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"rubb"))
    with pytest.raises(ValueError, match=r"a\.tar/0\.png is no intact image"):
        open_images(tmp_path)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", b"rubb")
    with pytest.raises(ValueError, match=r"b\.zip is no readable.*0\.png is compressed"):
        open_images(tmp_path / "b.zip")


def test_wrong_arrays_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=PIXELS.astype(np.float32))
    with pytest.raises(ValueError, match="must hold uint8 images"):
        open_images(path)
    np.savez_compressed(path, arr_0=PIXELS)
    with pytest.raises(ValueError, match="compressed"):
        open_images(path)
    np.savez(path, other=PIXELS)
    with pytest.raises(ValueError, match=r"a\.npz holds no readable images"):
        open_images(path)
    np.savez(path, arr_0=PIXELS)
    data = bytearray(path.read_bytes())
    data[400] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz"):
        open_images(path)
    np.savez(path, arr_0=np.array([{"code": 1}], dtype=object))
    with pytest.raises(ValueError, match="must hold uint8 images"):
        open_images(path)
