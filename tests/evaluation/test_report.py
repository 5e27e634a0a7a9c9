"""From images to the result of `fastdiff evaluate`."""

import argparse
import errno
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_fastdiff.evaluation.clip_score import clip_scores
from diffusers_fastdiff.evaluation.command import add_evaluate
from diffusers_fastdiff.evaluation.digits import load_digits_classifier
from diffusers_fastdiff.evaluation.extractors import DigitsExtractor
from diffusers_fastdiff.evaluation.feature_file import FeatureFile
from diffusers_fastdiff.evaluation.feature_table import FeatureTable, extract_features
from diffusers_fastdiff.evaluation.images import open_images
from diffusers_fastdiff.evaluation.metrics import frechet_distance, moments
from diffusers_fastdiff.evaluation.reference import Reference, statistics_of
from diffusers_fastdiff.evaluation.report import EvaluationConfig, evaluate
from diffusers_fastdiff.evaluation.statistics_file import Statistics, load_statistics, save_statistics
from diffusers_fastdiff.training.data import DigitsDataset


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """200 digits with noise, as PNG files."""
    folder = tmp_path_factory.mktemp("noisy")
    digits, generator = open_images("digits"), torch.Generator().manual_seed(0)
    for index in range(200):
        pixels = digits[index * 7][0].float() + 30 * torch.randn(8, 8, generator=generator)
        Image.fromarray(pixels.round().clamp(0, 255).byte().numpy()).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def evaluated(cache, tmp_path):
    """Run the command and return its result."""

    def evaluated(images, *flags):
        parser = argparse.ArgumentParser()
        add_evaluate(parser.add_subparsers())
        output = tmp_path / "result.json"
        args = ["evaluate", str(images), f"--cache_dir={cache}", f"--output={output}", "--kid_subsets=20", *flags]
        args = parser.parse_args(args)
        args.run(args)
        return json.loads(output.read_text())

    return evaluated


def test_result_says_everything(evaluated, noisy, capsys):
    result = evaluated(noisy)
    assert list(result["metrics"]) == ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
    for numbers in result["metrics"].values():
        assert numbers["interval"][0] < numbers["value"] < numbers["interval"][1]
    assert result["num_images"] == 200
    assert result["extractor"] == DigitsExtractor().identity
    assert (result["reference"]["source"], result["reference"]["num_images"]) == ("digits", 1797)
    assert result["settings"]["seed"] == 0
    assert result["versions"]["torch"] == torch.__version__
    assert "clip_model" in result["left_out"]["clip_score"]
    assert result["noise_floor"]["num_images"] == 898
    assert result["noise_floor"]["fid"] < result["metrics"]["fid"]["value"]
    assert "noise floor (two halves of the reference" in capsys.readouterr().out

    digits, classifier = DigitsDataset(), load_digits_classifier()
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(noisy.glob("*.png"))])
    with torch.no_grad():
        features = classifier.features(images[:, None] / 127.5 - 1)
        expected = frechet_distance(features, classifier.features(((digits.images + 1) * 127.5).round() / 127.5 - 1))
    assert result["metrics"]["fid"]["value"] == pytest.approx(expected, rel=1e-5)


def test_result_is_the_same_again(evaluated, noisy):
    first, second = evaluated(noisy), evaluated(noisy)
    assert first == second
    other = evaluated(noisy, "--seed=1")
    assert other["metrics"]["kid"]["value"] != first["metrics"]["kid"]["value"]
    assert other["metrics"]["fid"]["value"] == first["metrics"]["fid"]["value"]


def test_features_are_cached_and_a_killed_extraction_is_not(cache, noisy, tmp_path, monkeypatch):
    table = extract_features(open_images(noisy), DigitsExtractor(), tmp_path, batch_size=16)
    monkeypatch.setattr(DigitsExtractor, "forward", lambda *_: pytest.fail("was computed again"))
    again = extract_features(open_images(noisy), DigitsExtractor(), tmp_path, batch_size=16)
    assert torch.equal(again.pooled[:], table.pooled[:])
    monkeypatch.undo()

    def fail(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(DigitsExtractor, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        extract_features(open_images(noisy), DigitsExtractor(), tmp_path, batch_size=50)
    monkeypatch.undo()
    redone = extract_features(open_images(noisy), DigitsExtractor(), tmp_path, batch_size=50)
    torch.testing.assert_close(redone.pooled[:], table.pooled[:])
    assert redone.pooled[:].abs().sum(dim=1).min() > 0


def test_two_processes_extract_what_one_does(noisy, tmp_path):
    images = open_images(noisy)
    expected = extract_features(images, DigitsExtractor(), tmp_path / "one", batch_size=24)
    barrier, tables = threading.Barrier(2, timeout=60), {}

    def work(rank: int) -> None:
        state = SimpleNamespace(
            is_main_process=rank == 0,
            process_index=rank,
            num_processes=2,
            device="cpu",
            wait_for_everyone=barrier.wait,
        )
        tables[rank] = extract_features(images, DigitsExtractor(), tmp_path / "two", batch_size=24, state=state)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for table in tables.values():
        for part in ("pooled", "spatial", "logits"):
            assert torch.equal(getattr(table, part)[:], getattr(expected, part)[:])


def test_standard_error_is_the_spread_of_other_samples(tmp_path):
    """Of the Frechet distance, over samples of a known distribution."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2000, 6, generator=generator)

    def table(folder, values) -> FeatureTable:
        folder.mkdir()
        for part in ("pooled", "spatial", "logits"):
            FeatureFile.create(folder / f"{part}.npy", *values.shape).write(0, values)
        info = {"source": folder.name, "fingerprint": "", "image_shape": [1, 8, 8], "extractor": "x"}
        (folder / "info.json").write_text(json.dumps(info))
        return FeatureTable(folder)

    data = table(tmp_path / "data", reference)
    against = Reference(statistics_of(data), data)
    config = EvaluationConfig(metrics=("fid", "precision", "kid"), bootstrap=20, kid_subsets=20, kid_subset_size=100)
    results = []
    for number in range(12):
        sample = 1.3 * torch.randn(500, 6, generator=generator) + 0.2
        results.append(evaluate(table(tmp_path / str(number), sample), against, config)["metrics"])
    for name in ("fid", "precision", "kid"):
        values = torch.tensor([result[name]["value"] for result in results])
        errors = torch.tensor([result[name]["standard_error"] for result in results])
        assert 0.5 < float(errors.mean() / values.std()) < 2, name


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_statistics_of_edm(evaluated, noisy, tmp_path):
    digits = open_images("digits")
    features = DigitsExtractor()(torch.stack([digits[k] for k in range(len(digits))])).pooled
    mean, covariance = (value.numpy() for value in moments(features))
    path = saved(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    with pytest.raises(ValueError, match=r"edm\.npz does not say which extractor.*--reference_extractor digits-classifier"):
        evaluated(noisy, f"--reference={path}")
    with pytest.raises(ValueError, match=r"edm\.npz was made by the extractor 'inception-2015', but this one is 'digits"):
        evaluated(noisy, f"--reference={path}", "--reference_extractor=inception-2015")
    result = evaluated(noisy, f"--reference={path}", "--reference_extractor=digits-classifier")
    assert list(result["metrics"]) == ["fid", "inception_score"]
    assert result["metrics"]["fid"]["value"] == pytest.approx(evaluated(noisy)["metrics"]["fid"]["value"], rel=1e-3)
    assert "holds statistics only" in result["left_out"]["kid"]
    assert result["reference"]["extractor"] == "not recorded in the file"
    with pytest.raises(ValueError, match="'kid' cannot be computed"):
        evaluated(noisy, f"--reference={path}", "--reference_extractor=digits-classifier", "--metrics", "fid", "kid")


def test_statistics_of_adm(evaluated, noisy, tmp_path):
    ours = tmp_path / "ours.npz"
    plain = evaluated(noisy, f"--save_statistics={ours}")
    digits = open_images("digits")
    images = torch.stack([digits[k] for k in range(len(digits))]).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    with np.load(ours) as file:
        parts = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    path = saved(tmp_path / "adm.npz", arr_0=images, **parts)
    result = evaluated(noisy, f"--reference={path}", "--reference_extractor=digits-classifier")
    assert {name: value["value"] for name, value in result["metrics"].items()} == pytest.approx(
        {name: value["value"] for name, value in plain["metrics"].items()}, rel=1e-4
    )


def test_statistics_come_back(tmp_path):
    values = moments(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    statistics = Statistics("a", values, values, "digits-classifier@1", (1, 8, 8), 30)
    save_statistics(tmp_path / "a.npz", statistics)
    loaded = load_statistics(tmp_path / "a.npz")
    assert (loaded.extractor, loaded.image_shape, loaded.num_images) == ("digits-classifier@1", (1, 8, 8), 30)
    assert torch.equal(loaded.spatial.covariance, values.covariance)


def test_statistics_of_something_else_are_refused(evaluated, noisy, tmp_path):
    path = tmp_path / "ours.npz"
    evaluated(noisy, f"--save_statistics={path}")
    with np.load(path) as file:
        parts = dict(file)
    for change, message in (
        ({"extractor": "digits-classifier@ffff"}, "was made by the extractor 'digits-classifier@ffff'"),
        ({"image_shape": (1, 16, 16)}, "is of images of 16x16 pixels, but the images at hand have 8x8"),
        ({"mu": parts["mu"][:9], "sigma": parts["sigma"][:9, :9]}, r"has features of sizes \(9, 112\)"),
        ({"mu": parts["mu"][:9]}, "holds no readable statistics"),
        ({"sigma": np.full_like(parts["sigma"], np.nan)}, "not finite"),
        ({"mu": np.array([{"code": 1}], dtype=object)}, "holds no readable statistics"),
    ):
        other = saved(tmp_path / "other.npz", **(parts | change))
        with pytest.raises(ValueError, match=message):
            evaluated(noisy, f"--reference={other}")
    (tmp_path / "other.npz").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"other\.npz holds no readable"):
        evaluated(noisy, f"--reference={tmp_path / 'other.npz'}")


def test_images_of_another_size_are_refused(evaluated, noisy, tmp_path):
    for index in range(3):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match=r"is for images of 1x8x8, but .* has 3x16x16"):
        evaluated(tmp_path)


def test_fewer_images_than_features_are_refused(evaluated, noisy, tmp_path):
    for path in sorted(noisy.glob("*.png"))[:64]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"has 64 images, and there are 64 features.*Take more images, or choose `--metrics`"):
        evaluated(tmp_path, "--metrics", "fid")
    assert list(evaluated(tmp_path, "--metrics", "kid")["metrics"]) == ["kid"]


def test_full_disk_is_said_and_leaves_nothing_half_done(noisy, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FeatureFile, "create", full)
    with pytest.raises(OSError, match=r"need 0 MiB in .*No space left.*--cache_dir"):
        extract_features(open_images(noisy), DigitsExtractor(), tmp_path, batch_size=50)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bootstrap=1"], "`bootstrap` must be 0, or at least 2"),
        (["--batch_size=0"], "`--batch_size` must be at least 1"),
        (["--neighbours=0"], "`neighbours` must be at least 1"),
        (["--clip_model=somewhere"], "`--clip_model` needs prompts"),
        (["--metrics", "clip_score"], "'clip_score' cannot be computed: needs prompts"),
    ],
)
def test_wrong_settings_are_refused(evaluated, noisy, flags, message):
    with pytest.raises(ValueError, match=message):
        evaluated(noisy, *flags)


def test_clip_score_is_the_cosine_of_image_and_prompt(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

    from tests.hooks.tiny_pipelines import text_encoder, tokenizer

    folder = tmp_path / "clip"
    folder.mkdir()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = CLIPTextConfig.from_dict(text_encoder().config.to_dict())
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(processor, tokenizer(folder))
    processor.save_pretrained(folder)

    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    images = open_images(saved(tmp_path / "images.npz", arr_0=pixels))
    prompts = ["a b", "c", "d e f", "a", "b", "x y z"]
    ours = clip_scores(images, prompts, str(folder), batch_size=4)
    model = CLIPModel.from_pretrained(folder)
    for k, prompt in enumerate(prompts):  # one at a time, so without padding, from the parts of the model
        inputs = processor(text=[prompt], images=[images[k].permute(1, 2, 0).numpy()], return_tensors="pt")
        with torch.no_grad():
            image = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
            text = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)
        expected = 100 * float(torch.nn.functional.cosine_similarity(image, text))
        assert float(ours[k]) == pytest.approx(max(expected, 0), rel=1e-4)
    assert ours.max() > 1
    assert ours.std() > 0
    with pytest.raises(ValueError, match="6 images, 5 prompts"):
        clip_scores(images, prompts[:5], str(folder))
