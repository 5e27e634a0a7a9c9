"""What is loaded cannot run code, nor read files outside its folder. The same from the Hub is in test_hub.py."""

import json

import pytest
from diffusers import AutoModel, DiffusionPipeline

from diffusers_fastdiff import AMEDScheduler, FDMEDMScheduler, GDDIMScheduler, IPNDMMultistepScheduler
from diffusers_fastdiff.cli import main
from diffusers_fastdiff.pretrained import open_pipeline
from tests.ecosystem.attacks import INDEX_ATTACKS, PICKLE, WEIGHT_ATTACKS, edit_json, plant_code
from tests.ecosystem.folders import MODELS, PIPELINES, attached_solver, dit_pipeline

REFUSAL = (OSError, ValueError, TypeError)


@pytest.fixture
def marker(tmp_path):
    """A file that exists after the test if code was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("name", set(MODELS) - {"autoencoder"})  # which has no weights
@pytest.mark.parametrize("attack", WEIGHT_ATTACKS, ids=lambda attack: attack.__name__)
def test_weights_of_models(attack, name, tmp_path, marker):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "model")
    attack(tmp_path / "model", marker)
    with pytest.raises(REFUSAL):
        type(model).from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("attack", WEIGHT_ATTACKS, ids=lambda attack: attack.__name__)
def test_weights_of_a_predictor(attack, tmp_path, marker):
    attached_solver().save_pretrained(tmp_path / "scheduler")
    attack(tmp_path / "scheduler" / "predictor", marker)
    with pytest.raises(REFUSAL):
        AMEDScheduler.from_pretrained(tmp_path / "scheduler")


def test_a_predictor_is_never_a_pickle(tmp_path):
    attached_solver().save_pretrained(tmp_path)
    (tmp_path / "predictor" / "diffusion_pytorch_model.safetensors").unlink()
    attached_solver().predictor.save_pretrained(tmp_path / "predictor", safe_serialization=False)
    assert (tmp_path / "predictor" / PICKLE).exists()
    with pytest.raises(OSError, match="safetensors"):
        AMEDScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("attack", WEIGHT_ATTACKS, ids=lambda attack: attack.__name__)
def test_weights_of_pipelines(attack, tmp_path, marker):
    dit_pipeline().save_pretrained(tmp_path / "pipe")
    attack(tmp_path / "pipe" / "transformer", marker)
    with pytest.raises(REFUSAL):
        DiffusionPipeline.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("attack", INDEX_ATTACKS)
def test_names_in_a_pipeline(attack, name, tmp_path, marker):
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    edit_json(tmp_path / "model_index.json", **INDEX_ATTACKS[attack])
    plant_code(tmp_path, marker)
    with pytest.raises(REFUSAL):
        type(pipe).from_pretrained(tmp_path)
    with pytest.raises(REFUSAL):
        open_pipeline(str(tmp_path))
    assert main(["info", str(tmp_path)]) == 0  # reads the names and follows none


@pytest.mark.parametrize("name", MODELS)
def test_class_names_in_the_config_of_a_model_are_not_followed(name, tmp_path, marker):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    plant_code(tmp_path, marker)
    remote = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    for class_name in ("os.system", "evil.Evil", ["subprocess", "Popen"], type(model).__name__):
        edit_json(tmp_path / "config.json", _class_name=class_name, auto_map=remote)
        for options in ({}, {"trust_remote_code": True}):
            assert type(type(model).from_pretrained(tmp_path, **options)) is type(model)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheduler_class", [AMEDScheduler, FDMEDMScheduler, GDDIMScheduler, IPNDMMultistepScheduler])
def test_class_names_in_the_config_of_a_scheduler_are_not_followed(scheduler_class, tmp_path, marker):
    scheduler_class().save_pretrained(tmp_path)
    plant_code(tmp_path, marker)
    for class_name in ("os.system", "evil.Evil", ["subprocess", "Popen"]):
        edit_json(tmp_path / "scheduler_config.json", _class_name=class_name, auto_map={"AutoScheduler": "evil.Evil"})
        assert type(scheduler_class.from_pretrained(tmp_path)) is scheduler_class


@pytest.mark.parametrize(
    "entry", [{"student": "os.system"}, {"fitted_to": {"model_class": "os.system"}, "linear_solver": {"x": 1}}]
)
def test_values_in_the_config_of_a_scheduler_are_checked(entry, tmp_path):
    AMEDScheduler().save_pretrained(tmp_path)
    edit_json(tmp_path / "scheduler_config.json", **entry)
    with pytest.raises(REFUSAL):
        AMEDScheduler.from_pretrained(tmp_path)


def test_huge_or_deep_json_is_an_error_and_not_a_crash(tmp_path):
    AMEDScheduler().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"sigmas": ' + "[" * 100_000)
    with pytest.raises((*REFUSAL, RecursionError)):
        AMEDScheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps([1, 2]))
    with pytest.raises((*REFUSAL, AttributeError)):
        AMEDScheduler.from_pretrained(tmp_path)
