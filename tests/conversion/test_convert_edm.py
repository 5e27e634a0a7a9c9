"""Networks of EDM, FDM, ADM and consistency models: read as data, whatever the file tries."""

import functools
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_fastdiff import AMEDScheduler, EDMUNet2DModel, FDMEDMScheduler, FDMVEScheduler, FDMVPScheduler
from diffusers_fastdiff.conversion import convert_amed, convert_edm
from diffusers_fastdiff.conversion.adm_unet import adm_unet_state_dict
from diffusers_fastdiff.conversion.edm import read_snapshot
from diffusers_fastdiff.conversion.edm_unet import edm_unet_state_dict
from diffusers_fastdiff.conversion.restricted_pickle import read_pickle
from diffusers_fastdiff.models.unet_edm import ADM
from tests.golden.recordings import recordings

SOURCE = "import pathlib\npathlib.Path({path!r}).touch()\n"


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """Weights of a small published U-Net under their original names."""
    return recordings("fdm_unet_ncsnpp_cond")[0].values[0].group("unet.state.")


class EasyDict(dict):
    pass


def _reconstruct_persistent_obj(meta):
    raise AssertionError("must never be called")


class Persistent:
    """Pickles as an object with embedded source, as EDM's persistence does."""

    def __init__(self, class_name: str, source: str = "", **state):
        self.class_name, self.source, self.state = class_name, source, state

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (EasyDict(meta),)


@pytest.fixture
def as_edm(monkeypatch):
    """Names in pickles are those of EDM's own modules while a test writes them."""
    for name, item in (("torch_utils.persistence", _reconstruct_persistent_obj), ("dnnlib.util", EasyDict)):
        package, _, _ = name.partition(".")
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        module = types.ModuleType(name)
        setattr(module, item.__name__, item)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(item, "__module__", name)


def module(name: str, tensors: dict[str, torch.Tensor], source: str = "", **attributes) -> Persistent:
    """A stored module tree with the given state dict; buffers and containers are stored the way PyTorch does."""
    own = {key: value for key, value in tensors.items() if "." not in key}
    buffers = {key: own.pop(key) for key in list(own) if key in ("resample_filter", "freqs")}
    children = {}
    for child in sorted({key.partition(".")[0] for key in tensors if "." in key}):
        inside = {key.partition(".")[2]: value for key, value in tensors.items() if key.partition(".")[0] == child}
        children[child] = module("UNetBlock", inside, source, skip_scale=np.sqrt(0.5))
    if name == "UNetBlock" and children and not own:
        container = torch.nn.ModuleDict()
        container.__dict__["_modules"] = children
        return container
    parameters = {key: torch.nn.Parameter(value) for key, value in own.items()}
    shared = {"training": False, "_non_persistent_buffers_set": set(), **attributes}
    return Persistent(name, source, _parameters=parameters, _buffers=buffers, _modules=children, **shared)


def snapshot(path: Path, original, name: str, source: str = "", **attributes) -> Path:
    network = module(name, {f"model.{key}": value for key, value in original.items()}, source, **attributes)
    content = {"ema": network, "loss_fn": Persistent("EDMLoss", source, P_mean=-1.2), "augment_pipe": None}
    content["dataset_kwargs"] = EasyDict(resolution=16)
    path.write_bytes(pickle.dumps(content))
    return path


def same(model: EDMUNet2DModel, original) -> bool:
    ours = edm_unet_state_dict(model)
    return ours.keys() == original.keys() and all(torch.equal(ours[key], value) for key, value in original.items())


@pytest.mark.parametrize(
    ("name", "attributes", "scheduler", "expected"),
    [
        ("EDMPrecond", {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}, FDMEDMScheduler, None),
        ("FDM_EDMPrecond", {"sigma_min": 0.002, "sigma_max": 80.0, "fdm_multiplier": 2.0}, FDMEDMScheduler, 2.0),
        ("FDM_VPPrecond", {"fdm_multiplier": 1.5, "beta_d": 19.9, "M": 1000}, FDMVPScheduler, 1.5),
        ("FDM_VEPrecond", {"fdm_multiplier": 2.0}, FDMVEScheduler, 1.0),  # the published program ignores it in VE
        ("VPPrecond", {"beta_d": 19.9, "beta_min": np.float64(0.1), "M": 1000}, FDMVPScheduler, None),
    ],
)
def test_snapshots(original, as_edm, tmp_path, name, attributes, scheduler, expected):
    trap = tmp_path / "trap"
    path = snapshot(tmp_path / "network-snapshot.pkl", original, name, SOURCE.format(path=str(trap)), **attributes)
    converted = convert_edm(path)
    assert same(converted.unet, original)
    assert not trap.exists()
    assert converted.preconditioning.momentum == expected
    sampler = scheduler.from_config(converted.scheduler_config)
    assert sampler.preconditioning == converted.preconditioning
    learned = AMEDScheduler.from_config(converted.scheduler_config)
    assert learned.noise_model.preconditioning == converted.preconditioning
    assert not any(tensor.requires_grad and tensor.grad is not None for tensor in converted.unet.parameters())


def test_source_is_kept_as_text(original, as_edm, tmp_path):
    path = snapshot(tmp_path / "x.pkl", original, "EDMPrecond", "print('hello')")
    content = read_pickle(path)
    assert content["ema"].source == "print('hello')"
    assert content["loss_fn"].state == {"P_mean": -1.2}


def test_momentum_without_a_number_must_be_given(original, as_edm, tmp_path):
    path = snapshot(tmp_path / "x.pkl", original, "FDM_EDMPrecond")
    with pytest.raises(ValueError, match="multiplier"):
        convert_edm(path)
    assert convert_edm(path, multiplier=2.0).preconditioning.momentum == 2.0
    with pytest.raises(ValueError, match="kind"):
        convert_edm(path, kind="vp", multiplier=2.0)


def test_predictors_of_amed_are_snapshots_as_well(as_edm, tmp_path):
    weights = {f"{new}.{kind}": value for (new, kind), value in _predictor_weights().items()}
    layers = {name: torch.nn.Linear(1, 1) for name in {key.partition(".")[0] for key in weights}}
    for name, layer in layers.items():
        for kind in ("weight", "bias"):
            setattr(layer, kind, torch.nn.Parameter(weights[f"{name}.{kind}"]))
    predictor = Persistent("AMED_predictor", "raise SystemExit", _parameters={}, _buffers={}, _modules=layers, num_steps=4)
    path = tmp_path / "predictor.pkl"
    path.write_bytes(pickle.dumps({"model": predictor, "loss_fn": Persistent("AMED_loss")}))
    snapshot = read_snapshot(path, "model")
    assert snapshot.network.state["num_steps"] == 4
    converted = convert_amed(snapshot.state_dict, scale_dir=0.01, scale_time=0.0)
    assert torch.equal(converted.feature_layer_1.weight, weights["enc_layer0.weight"])


def _predictor_weights() -> dict[tuple[str, str], torch.Tensor]:
    shapes = {"map_layer0": (8, 8), "enc_layer0": (128, 64), "enc_layer1": (4, 128), "fc_r": (1, 20), "fc_scale_dir": (1, 20)}
    kinds = {name: {"weight": torch.randn(shape), "bias": torch.randn(shape[0])} for name, shape in shapes.items()}
    return {(name, kind): value for name, tensors in kinds.items() for kind, value in tensors.items()}


@pytest.mark.parametrize("old_format", [False, True])
def test_state_dicts(original, tmp_path, old_format):
    path = tmp_path / "weights.pt"
    torch.save({f"model.{key}": value for key, value in original.items()}, path, _use_new_zipfile_serialization=not old_format)
    converted = convert_edm(path)
    assert same(converted.unet, original)
    assert same(convert_edm(original, kind="vp").unet, original)
    with pytest.raises(ValueError, match="kind"):
        _ = converted.scheduler_config


# -- hostile files --------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Stranger:
    pass


def test_hostile_pickles_are_refused_with_the_reason(as_edm, tmp_path):
    trap = tmp_path / "trap"
    touch = Call(Path.touch, trap)
    system = Call(os.system, f"touch {trap}")
    hostile = {
        "pathlib.PosixPath": {"ema": touch},
        "posix.system": {"ema": Persistent("EDMPrecond", _modules={"model": system})},
        "builtins.eval": [Call(eval, f"open({str(trap)!r}, 'w')")],
        "test_convert_edm.Stranger": {"ema": Stranger()},
        "unknown type": Call(_reconstruct_persistent_obj, EasyDict(type="function", state={})),
        "functools.partial": {"ema": Call(functools.partial, print)},
    }
    for reason, content in hostile.items():
        path = tmp_path / "hostile.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=reason):
            convert_edm(path)
        assert not trap.exists(), reason


@pytest.mark.parametrize(
    ("opcodes", "reason"),
    [
        (b"cposix\nsystem\n(S'touch /tmp/x'\ntR.", "posix.system"),
        (b"(S'touch /tmp/x'\niposix\nsystem\n.", "no network needs"),
        (b"(cposix\nsystem\nS'touch /tmp/x'\no.", "no network needs"),
        (b"ccollections\nOrderedDict\n}S'x'\nI1\nsb.", "state of a Name"),
        (b"\x80\x02\x82\x01.", "extension"),
        (b"Pinner\n.", "outside"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "no network needs"),  # a byte array of a terabyte
        (b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(I1\nI0\n(I9\nt(I1\nttR.", "refused or damaged"),
        (b"", "middle"),
        (b"\x80\x04N", "middle"),
        (b"not a pickle at all", "refused or damaged"),
    ],
)
def test_hostile_opcodes(tmp_path, opcodes, reason):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(opcodes)
    with pytest.raises(ValueError, match=reason):
        convert_edm(path)


def test_truncated_snapshot_is_refused(original, as_edm, tmp_path):
    content = snapshot(tmp_path / "x.pkl", original, "EDMPrecond").read_bytes()
    for share in (0.1, 0.5, 0.999):
        path = tmp_path / "short.pkl"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"refused or damaged|is damaged"):
            convert_edm(path)


def test_damaged_snapshots_never_end_otherwise(original, as_edm, tmp_path):
    """Bytes changed at random: another number or name is read, or the file is refused."""
    small = {key: value for key, value in original.items() if key.startswith("map_")}
    content = snapshot(tmp_path / "x.pkl", small, "EDMPrecond", sigma_data=0.5).read_bytes()
    generator, reasons = np.random.default_rng(0), []
    for _ in range(300):
        damaged = bytearray(content)
        for place in generator.integers(len(content), size=3):
            damaged[place] = generator.integers(256)
        path = tmp_path / "damaged.pkl"
        path.write_bytes(damaged)
        try:
            read_pickle(path)
        except ValueError as error:
            reasons.append(str(error))
    assert len(reasons) > 20
    assert all("refused" in reason or "is damaged" in reason for reason in reasons)


def stored_tensor(size: tuple[int, ...], stride: tuple[int, ...], count: int = 4) -> Call:
    data = io.BytesIO()
    torch.save(torch.zeros(count).storage(), data, _use_new_zipfile_serialization=False)
    storage = Call(torch.storage._load_from_bytes, data.getvalue())
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_do_not_grow(tmp_path):
    path = tmp_path / "x.pkl"
    for size, stride in (((10**6, 10**6), (0, 0)), ((5,), (1,)), ((2,), (-1,)), ((2, 2), (1,))):
        path.write_bytes(pickle.dumps(stored_tensor(size, stride)))
        with pytest.raises(ValueError, match="tensor"):
            read_pickle(path)
    path.write_bytes(pickle.dumps(stored_tensor((2, 2), (1, 2))))
    assert read_pickle(path).shape == (2, 2)


def test_objects_that_hold_themselves_are_refused(as_edm, tmp_path):
    path = tmp_path / "x.pkl"
    loop = torch.nn.ModuleDict()
    loop.__dict__["_modules"] = {"again": loop}
    path.write_bytes(pickle.dumps({"ema": loop}))
    with pytest.raises(ValueError, match="holds itself"):
        convert_edm(path)


def test_inflated_archives_are_refused(original, tmp_path):
    torch.save(original, tmp_path / "plain.pt")
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
        bomb.writestr("archive/data/999", b"\0" * 10**7)
    with pytest.raises(ValueError, match="claim to hold"):
        convert_edm(path)


def test_snapshot_without_the_wanted_weights(as_edm, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"loss_fn": Persistent("EDMLoss")}))
    with pytest.raises(ValueError, match="weights"):
        convert_edm(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_edm(tmp_path / "nowhere.pkl")


# -- ADM ------------------------------------------------------------------------------------------------------------------


def adm(**overrides) -> EDMUNet2DModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "model_channels": 32, "channel_mult": (1, 2), "layers_per_block": 1, "dropout": 0.0}
    return EDMUNet2DModel(**(ADM | sizes | {"attention_head_dim": 16, "attention_resolutions": (8,)} | overrides)).eval()


@pytest.mark.parametrize("family", ["adm", "consistency"])
@pytest.mark.parametrize("overrides", [{"num_classes": 5, "out_channels": 6}, {"adaptive_scale": False, "layers_per_block": 2}])
def test_adm_networks_return_unchanged(family, overrides):
    model = adm(**overrides)
    state = adm_unet_state_dict(model, family)
    settings = {"sample_size": 16, "attention_head_dim": 16}
    converted = convert_edm(state, family=family, **settings)
    x = torch.randn(2, 3, 16, 16)
    labels = None if model.null_label is None else torch.tensor([0, 4])
    assert torch.equal(converted.unet(x, 0.3, labels).sample, model(x, 0.3, labels).sample)
    other = convert_edm(state, family={"adm": "consistency", "consistency": "adm"}[family], **settings)
    assert not torch.allclose(other.unet(x, 0.3, labels).sample, model(x, 0.3, labels).sample)
    assert (converted.preconditioning is None) == (family == "adm")


def test_adm_refuses_what_it_cannot_tell():
    state = adm_unet_state_dict(adm(), "adm")
    with pytest.raises(ValueError, match="family"):
        convert_edm(state, sample_size=16)
    with pytest.raises(ValueError, match="sample_size"):
        convert_edm(state, family="adm")
    with pytest.raises(ValueError, match="stranger"):
        convert_edm(state | {"stranger": torch.zeros(1)}, family="adm", sample_size=16, attention_head_dim=16)
    with pytest.raises(ValueError, match="resblock_updown"):
        convert_edm(state | {"input_blocks.2.0.op.weight": torch.zeros(1)}, family="adm", sample_size=16)
