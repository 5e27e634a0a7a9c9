"""Feature extractors."""

import pytest
import torch
from safetensors.torch import save_file

from diffusers_fastdiff.evaluation.digits import load_digits_classifier
from diffusers_fastdiff.evaluation.extractors import DigitsExtractor, InceptionExtractor, load_extractor
from diffusers_fastdiff.evaluation.images import open_images
from diffusers_fastdiff.evaluation.inception import Block, InceptionV3, resize_like_tensorflow


def test_digits_extractor_is_the_classifier():
    images = torch.stack([open_images("digits")[index] for index in range(40)])
    features = DigitsExtractor()(images)
    classifier = load_digits_classifier()
    torch.testing.assert_close(features.pooled, classifier.features(images / 127.5 - 1))
    torch.testing.assert_close(features.logits, classifier(images / 127.5 - 1))
    assert features.spatial.shape == (40, 112)
    assert features.spatial.std() > 0
    torch.testing.assert_close(DigitsExtractor()(images.expand(-1, 3, -1, -1)).pooled, features.pooled)


def test_identity_follows_the_weights():
    one, two = DigitsExtractor(), DigitsExtractor()
    assert one.identity == DigitsExtractor().identity
    assert one.identity.startswith("digits-classifier@")
    with torch.no_grad():
        two.classifier.output.bias[0] += 1e-3
    assert two.identity != one.identity


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match=r"for images of 1x8x8, but folder has 3x16x16.*--extractor"):
        DigitsExtractor().check((3, 16, 16), "folder")


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_inception_has_the_published_sizes():
    with torch.device("meta"):
        networks = {tensorflow: InceptionV3(tensorflow) for tensorflow in (False, True)}
        # The later network has 27,161,264 parameters with its auxiliary classifier, which has 3,326,696.
        assert count(networks[False]) == 27_161_264 - 3_326_696
        assert count(networks[True]) == count(networks[False]) + 8 * 2049
        for network in networks.values():
            pooled, spatial = network(torch.empty(2, 3, 299, 299))
            assert pooled.shape == (2, 2048)
            assert spatial.shape == (2, 7, 17, 17)
        keys = networks[True].state_dict()
    assert keys["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert keys["Mixed_7b.branch3x3_2a.conv.weight"].shape == (384, 384, 1, 3)
    assert keys["Mixed_7b.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert keys["Mixed_7a.branch7x7x3_4.bn.running_mean"].shape == (192,)


def test_poolings_of_the_two_networks():
    x = torch.ones(1, 2, 5, 5)
    x[0, 0, 2, 2] = 10

    def pooled(**options):
        block = Block("A", 2, 32, **options)
        block.chains["pool"] = []
        return block.branch("pool", x)[0]

    left_out, counted, largest = pooled(), pooled(count_include_pad=True), pooled(pooling="max")
    assert left_out[1, 0, 0] == 1  # an average over what is there
    assert float(counted[1, 0, 0]) == pytest.approx(4 / 9)
    assert float(left_out[0, 2, 2]) == pytest.approx(2)
    assert largest[0, 1, 1] == 10
    network = InceptionV3(tensorflow=True)
    assert (network.Mixed_7b.pooling, network.Mixed_7c.pooling) == ("average", "max")
    assert InceptionV3(tensorflow=False).Mixed_7c.pooling == "average"


def test_resize_is_that_of_tensorflow_1():
    x = torch.arange(4.0).expand(1, 1, 2, 4)
    expected = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3])  # pixel k at k / 2, the border repeated
    torch.testing.assert_close(resize_like_tensorflow(x, 8), expected.expand(1, 1, 8, 8))
    torch.testing.assert_close(resize_like_tensorflow(x, 2), torch.tensor([0.0, 2.0]).expand(1, 1, 2, 2))


def test_inception_from_a_file(tmp_path):
    torch.manual_seed(0)
    network = InceptionV3(tensorflow=True).eval()
    with torch.no_grad():
        network.fc.bias.fill_(3)
    path = tmp_path / "inception.safetensors"
    save_file({key: value for key, value in network.state_dict().items() if "num_batches" not in key}, path)
    extractor = load_extractor("inception-2015", path)
    grey = torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = extractor(grey)
    x = (resize_like_tensorflow(grey.float().expand(-1, 3, -1, -1), 299) - 128) / 128
    with torch.no_grad():
        pooled, _ = network(x)
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(features.logits, network.fc(pooled) - 3)  # without the bias
    assert features.spatial.shape == (1, 2023)
    with pytest.raises(ValueError, match=r"does not fit 'inception-torchvision'.*fc\.bias"):
        InceptionExtractor("inception-torchvision", path)


def test_files_that_could_run_code_are_not_opened(tmp_path):
    path = tmp_path / "inception.pt"
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="can run code and are not opened"):
        load_extractor("inception-2015", path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_extractor("inception-2015", tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="must be given for 'inception-2015'"):
        load_extractor("inception-2015")
    with pytest.raises(ValueError, match="must be left out"):
        load_extractor("digits-classifier", path)
    with pytest.raises(ValueError, match="must be one of"):
        load_extractor("vgg")
