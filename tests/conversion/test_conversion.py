"""Reading original checkpoints: what is accepted, what is refused, and that nothing is executed."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_fastdiff.cli import main
from diffusers_fastdiff.conversion import convert_dit, convert_fpdm
from diffusers_fastdiff.models.transformer_fixed_point_dit import FixedPointDiTTransformer2DModel
from tests.golden.recordings import recordings
from tests.models.tiny import dit_inputs


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """Weights of a published fixed-point DiT in their original names."""
    return recordings("fpdm_forward_b")[0].values[0].group("state.")


SETTINGS = {"num_attention_heads": 4, "num_iterations": 3, "pre_post_timestep_conditioning": False}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_weights(first, second) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["mapping", "safetensors", "pt", "training checkpoint"])
def test_every_form_of_checkpoint_gives_the_same_model(original, kind, tmp_path):
    expected = weights_of(convert_fpdm(original, **SETTINGS))
    checkpoint = original
    if kind == "safetensors":
        save_file(original, checkpoint := tmp_path / "model.safetensors")
    elif kind == "pt":
        torch.save(original, checkpoint := tmp_path / "model.pt")
    elif kind == "training checkpoint":
        noise = {name: torch.zeros_like(value) for name, value in original.items()} | {"pos_embed": original["pos_embed"]}
        arguments = argparse.Namespace(fixed_point_pre_post_timestep_conditioning=False)
        content = {"ema": original, "model": noise, "opt": {"state": {}}, "args": arguments}
        torch.save(content, checkpoint := tmp_path / "model.pt")
    settings = SETTINGS | ({"pre_post_timestep_conditioning": None} if kind == "training checkpoint" else {})
    assert_equal_weights(weights_of(convert_fpdm(checkpoint, **settings)), expected)
    if kind == "training checkpoint":
        assert convert_fpdm(checkpoint, **settings, weights="model").proj_out_2.weight.abs().max() == 0


def test_converted_model_survives_saving(original, tmp_path):
    model = convert_fpdm(original, **SETTINGS)
    model.save_pretrained(tmp_path)
    loaded = FixedPointDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**dit_inputs()).sample, model(**dit_inputs()).sample)


def test_flow_checkpoints_get_the_sign_of_diffusers(original):
    plain, flow = convert_fpdm(original, **SETTINGS), convert_fpdm(original, **SETTINGS, flow=True)
    assert torch.equal(flow(**dit_inputs()).sample, -plain(**dit_inputs()).sample)


def test_continuous_conditioning_is_recognised(original):
    original = dict(original)
    dim = original.pop("y_embedder.embedding_table.weight").shape[1]
    original |= {"y_embedder.embedding_projection.weight": torch.randn(dim, 7)}
    original |= {"y_embedder.embedding_projection.bias": torch.randn(dim)}
    config = convert_fpdm(original, **SETTINGS).config
    assert (config.num_classes, config.conditioning_dim) == (None, 7)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_damaged_files_are_refused(original, name, tmp_path):
    path = tmp_path / name
    torch.save(original, path) if name.endswith("pt") else save_file(original, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        convert_fpdm(path, **SETTINGS)


@pytest.mark.parametrize("where", ["top", "args", "tensor place"])
def test_code_in_a_checkpoint_is_not_executed(original, where, tmp_path):
    path, trace = tmp_path / "model.pt", tmp_path / "executed"
    content = {"top": Payload(trace), "args": {"model": original, "args": Payload(trace)},
               "tensor place": original | {"extra": Payload(trace)}}[where]  # fmt: skip
    torch.save(content, path)
    with pytest.raises(ValueError, match="cannot be read"):
        convert_fpdm(path, **SETTINGS)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="cannot be read"):
        convert_dit(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop("pos_embed"), "pos_embed"),
        (lambda state: state.update(pos_embed=state["pos_embed"] + 1), "pos_embed"),
        (lambda state: state.update({"blocks.0.extra": torch.zeros(1)}), "blocks.0.extra"),
        (lambda state: state.update({"note": "text"}), "note"),
        (lambda state: state.clear(), "empty"),
    ],
)
def test_other_contents_are_refused(original, change, word):
    state = dict(original)
    change(state)
    with pytest.raises(ValueError, match=word):
        convert_fpdm(state, **SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_weights_do_not_tell_must_be_given(original, setting):
    with pytest.raises(ValueError, match=setting):
        convert_fpdm(original, **(SETTINGS | {setting: None}))


def test_a_missing_file_is_refused():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_dit("nowhere.pt")


def test_command_line(original, tmp_path, capsys):
    save_file(original, tmp_path / "model.safetensors")
    arguments = ["convert", "fpdm", str(tmp_path / "model.safetensors"), str(tmp_path / "out"), "--num_attention_heads=4"]
    assert main([*arguments, "--num_iterations=3"]) == 2
    assert "pre_post_timestep_conditioning" in capsys.readouterr().err
    assert main([*arguments, "--num_iterations=3", "--no-pre_post_timestep_conditioning"]) == 0
    assert "FixedPointDiTTransformer2DModel" in capsys.readouterr().out
    loaded = FixedPointDiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert_equal_weights(weights_of(loaded), weights_of(convert_fpdm(original, **SETTINGS)))
