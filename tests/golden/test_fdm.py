"""U-Nets, preconditioning and losses against the published program: 1e-5 relative in float32, 1e-10 in float64."""

import re

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_fastdiff.conversion.edm_unet import convert_edm_unet, edm_unet_state_dict
from diffusers_fastdiff.numerics.momentum import momentum_scale, warmup_clamp
from diffusers_fastdiff.numerics.preconditioning import Coefficients, Preconditioning
from diffusers_fastdiff.training.edm_loss import denoise, edm_loss
from tests.golden.recordings import Recording, assert_relative, recordings

TOLERANCE = 1e-5
EXACT = 1e-10

unets = pytest.mark.parametrize("recording", recordings("fdm_unet*"))
coefficients = pytest.mark.parametrize("recording", recordings("fdm_precond_coeffs"))
losses = pytest.mark.parametrize("recording", recordings("fdm_losses"))


def kind_of(name: str) -> str:
    """ "FDM_VPPrecond" or "VPLoss" -> "vp"."""
    return re.match(r"(?:FDM_)?(VP|VE|EDM)", name)[1].lower()


def momentum_of(name: str, multiplier: float) -> float | None:
    """Deliberate difference: the program ignores the multiplier of VE, ours takes it; so 1 there."""
    if not name.startswith("FDM_"):
        return None
    return 1.0 if kind_of(name) == "ve" else multiplier


def model_of(recording: Recording, *prefixes: str):
    """The network with the weights under the first of the prefixes that the recording has."""
    state = next(state for state in map(recording.group, prefixes) if state)
    return convert_edm_unet(state, dropout=recording.info["settings"]["dropout"])


def conditions_of(recording: Recording, model) -> dict:
    conditions = {}
    if "class_labels" in recording.tensors:
        one_hot = recording.tensors["class_labels"]
        conditions["class_labels"] = one_hot.argmax(1).where(one_hot.any(1), model.null_label)
    if "augment_labels" in recording.tensors:
        conditions["augment_labels"] = recording.tensors["augment_labels"]
    return conditions


def without_label(recording: Recording, model) -> dict:
    return {} if model.null_label is None else {"class_labels": torch.full((len(recording.tensors["x"]),), model.null_label)}


@unets
def test_weights_tell_the_config(recording):
    settings, config = recording.info["settings"], model_of(recording, "unet.state.").config
    sizes = [config.sample_size >> level for level in range(len(config.channel_mult))]
    ours = {
        "img_resolution": config.sample_size,
        "label_dim": config.num_classes or 0,
        "channel_mult_noise": config.noise_channel_mult,
        "channel_mult_emb": config.temb_channel_mult,
        "num_blocks": config.layers_per_block,
        "channel_mult": list(config.channel_mult),
        "resample_filter": list(config.resample_filter),
    }
    same = ("in_channels", "out_channels", "augment_dim", "model_channels", "dropout", "embedding_type", "encoder_type")
    ours |= {name: config[name] for name in (*same, "decoder_type")}
    assert ours | settings == settings | ours
    assert len(ours.keys() & settings.keys()) > 5
    assert set(config.attention_resolutions) == set(settings["attn_resolutions"]) & set(sizes)
    model = model_of(recording, "unet.state.")
    assert sum(parameter.numel() for parameter in model.parameters()) == settings["n_params"]


@unets
def test_weights_return_unchanged(recording):
    state = recording.group("unet.state.")
    returned = edm_unet_state_dict(model_of(recording, "unet.state."))
    assert returned.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(returned[key], value), key


@unets
@torch.no_grad()
def test_raw_network(recording):
    model, inputs = model_of(recording, "unet.state."), (recording.tensors["x"], recording.tensors["noise_labels"])
    conditions, expected = conditions_of(recording, model), recording.group("unet.")
    features = []
    model.bottleneck.register_forward_hook(lambda _, __, output: features.append(output))
    assert_relative(model(*inputs, **conditions).sample, expected["out"], TOLERANCE)
    if "out_noaug" in expected:
        conditions.pop("augment_labels")
        features.clear()  # recorded in this call
        assert_relative(model(*inputs, **conditions).sample, expected["out_noaug"], TOLERANCE)
    (last,) = recording.group("unet.enc_last.").values()
    assert_relative(features[-1], last, TOLERANCE)


@unets
@torch.no_grad()
def test_raw_network_in_float64(recording):
    model = model_of(recording, "unet.state.").double()
    conditions = conditions_of(recording, model)
    output = model(recording.tensors["x"].double(), recording.tensors["noise_labels"].double(), **conditions).sample
    assert output.dtype == torch.float64
    assert_relative(output, recording.tensors["unet.out.f64"], 1e-6)  # the program's attention is float32 in any case


class Published(Preconditioning):
    """As the program computes it: `c_noise` of VP from `log(1 + sigma^2)` in float32, 2e-4 beside the exact value at small
    noise levels, and an input scale of 1 for a multiplier of 0, which here is the plain formulation."""

    def at(self, sigma: torch.Tensor) -> Coefficients:
        coefficients = super().at(sigma)
        if self.kind == "vp":
            exponent = (1 + sigma.float() ** 2).log()
            time = ((self.beta_min**2 + 2 * self.beta_d * exponent).sqrt() - self.beta_min) / self.beta_d
            coefficients = coefficients._replace(c_noise=(self.num_timesteps - 1) * time)
        return coefficients._replace(c_in=torch.ones_like(sigma)) if self.momentum == 0 else coefficients


@unets
@torch.no_grad()
def test_preconditioned_networks(recording):
    sigma, noisy = recording.tensors["sigma"], recording.tensors["x_noisy"]
    names = sorted({key.partition(".")[0] for key in recording.tensors if re.match(r"\w+Precond\.out", key)})
    assert names
    for name in names:
        kind, expected = kind_of(name), recording.group(f"{name}.")
        model = model_of(recording, f"{name}.state.", f"FDM_{kind.upper()}Precond.state.", "unet.state.")
        multiplier = recording.info["settings"]["fdm_multiplier"]
        momentum, conditions = momentum_of(name, multiplier), conditions_of(recording, model)
        preconditioning = Published(kind, momentum)
        # Fourier features turn one unit in the last place of VP's `c_noise`, up to 999, into a phase of 1e-2.
        tolerance = 1e-4 if kind == "vp" and model.config.embedding_type == "fourier" else TOLERANCE
        if momentum != 0:
            exact = denoise(model, noisy, sigma, Preconditioning(kind, momentum), **conditions)
            assert_relative(exact, expected["out"], 10 * tolerance if kind == "vp" else TOLERANCE)
        assert_relative(denoise(model, noisy, sigma, preconditioning, **conditions), expected["out"], tolerance)
        scalar = denoise(model, noisy, sigma[1], preconditioning, **conditions)
        assert_relative(scalar, expected["out_scalar_sigma"], tolerance)
        if "out_nolabel" in expected:
            output = denoise(model, noisy, sigma, preconditioning, **without_label(recording, model))
            assert_relative(output, expected["out_nolabel"], tolerance)


@coefficients
def test_coefficients(recording):
    sigma = recording.tensors["sigma"]
    seen = set()
    for key, expected in recording.tensors.items():
        match = re.fullmatch(r"(\w+Precond)(?:\.m([\d.]+))?\.(c_skip|c_out|c_in|c_noise)", key)
        if match is None:
            continue
        name, multiplier, coefficient = match.groups()
        momentum = momentum_of(name, float(multiplier or 0))
        preconditioning = (
            Published(kind_of(name), momentum) if coefficient == "c_in" else Preconditioning(kind_of(name), momentum)
        )
        actual = getattr(preconditioning.at(sigma), coefficient)
        assert_relative(actual, expected.double(), TOLERANCE)
        seen.add(coefficient)
    assert len(seen) == 4


@coefficients
def test_momentum_scale(recording):
    keys = [key for key in recording.tensors if key.endswith(".s.f64")]
    assert keys
    for key in keys:
        name, multiplier = re.fullmatch(r"(\w+Precond)\.m([\d.]+)\.s\.f64", key).groups()
        # The range of the program, which has computed that of VP in float32.
        momentum, sigma_range = momentum_of(name, float(multiplier)), recording.info["sigma_min_max"][name]
        actual = momentum_scale(recording.tensors["sigma"], *sigma_range, momentum)
        assert_relative(actual, recording.tensors[key], EXACT)
        linear_time = recording.tensors[key.replace(".s.", ".t.")]
        assert_relative(momentum_scale(linear_time, 0, 1, momentum), recording.tensors[key], EXACT)
        if momentum:
            low, high = sigma_range
            preconditioning = Preconditioning(kind_of(name), momentum, sigma_min=low, sigma_max=high)
            assert_relative(preconditioning.at(recording.tensors["sigma"]).c_in, recording.tensors[key], EXACT)
            torch.testing.assert_close(Preconditioning(kind_of(name)).sigma_range, (low, high), rtol=0.05, atol=0)


@losses
def test_noise_levels_and_weights(recording):
    for key in recording.info["info"]:
        expected, preconditioning = recording.group(f"{key}."), Preconditioning(kind_of(key))
        sigma = preconditioning.training_sigma(expected["draw"].double())
        # exp(...) - 1 of the program in float32
        tolerance = TOLERANCE + (2**-21 / sigma**2 if kind_of(key) == "vp" else 0)
        assert ((expected["sigma"] - sigma).abs() <= tolerance * sigma).all()
        assert (
            (expected["weight_raw"] * sigma**2 - preconditioning.loss_weight(sigma) * sigma**2).abs() <= 3 * tolerance
        ).all()
        weight = preconditioning.loss_weight(expected["sigma"].double())
        torch.testing.assert_close(weight, expected["weight_raw"].double(), rtol=TOLERANCE, atol=0)


@losses
def test_warmup(recording):
    for key, info in recording.info["info"].items():
        expected, length = recording.group(f"{key}."), info["warmup_ite"] or 0
        for step, is_clamped in enumerate(info["clamp_applied_call"]):
            clamp = warmup_clamp(step, info["warmup_ite"])
            assert (clamp is not None) == (step < length)
            if clamp is not None:
                assert clamp == pytest.approx(float(expected["clamp_cur"][step]), rel=EXACT)
            # For some lengths the program's running product ends just below 500 and clamps once more.
            bound = 500.0 if is_clamped and step == length else clamp
            assert is_clamped == (bound is not None)
            weight = expected["weight_raw"][step]
            weight = weight if bound is None else weight.clamp_max(bound)
            torch.testing.assert_close(weight, expected["weight"][step], rtol=TOLERANCE, atol=0)


@losses
def test_length_of_the_warmup(recording):
    for length, info in recording.info["rounding_of_stop"].items():
        clamped = [warmup_clamp(step, int(length)) is not None for step in range(int(length) + 3)]
        assert clamped == [True] * int(length) + [False] * 3
        assert info["calls_with_clamp"] - int(length) in (0, 1)


class MixtureNetwork:
    """The raw network whose preconditioned denoiser is the ideal one of a mixture of Gaussians (see the .json)."""

    def __init__(self, means: torch.Tensor, std: float, sigma: torch.Tensor, preconditioning: Preconditioning):
        self.means, self.variance, self.sigma = means, std**2, sigma[:, None, None, None]
        self.coefficients = [value[:, None, None, None] for value in preconditioning.at(sigma)]

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor) -> UNet2DOutput:
        c_skip, c_out, c_in, c_noise = self.coefficients
        assert torch.equal(timestep, c_noise.flatten())
        noisy = sample / c_in
        total = self.variance + self.sigma**2
        distance = (noisy[:, None] - self.means).square().sum((2, 3, 4))
        mean = torch.einsum("bk,kchw->bchw", (-0.5 * distance / total.flatten()[:, None]).softmax(1), self.means)
        denoised = (self.variance * noisy + self.sigma**2 * mean) / total
        return UNet2DOutput(sample=(denoised - c_skip * noisy) / c_out)


def std_of(recording: Recording) -> float:
    """Standard deviation of the mixture, which the recording does not tell: the twentieth that fits its first numbers best."""
    key = next(iter(recording.info["info"]))
    draws = (f"{key}.sigma", f"noise.{key.partition('.')[2]}", f"{key}.unclamped_denoiser_loss_mean")
    sigma, noise, expected = (recording.tensors[name][0].double() for name in draws)
    clean, preconditioning = recording.tensors["images"].double(), Preconditioning(kind_of(key))

    def misfit(std: float) -> float:
        network = MixtureNetwork(recording.tensors["mu"], std, sigma, preconditioning)
        return float((edm_loss(network, clean, sigma, noise, preconditioning).total / expected).log().abs().max())

    return min((number / 20 for number in range(1, 41)), key=misfit)


@losses
@pytest.mark.parametrize("momentum", [None, 1.0])
def test_losses(recording, momentum):
    clean, means = recording.tensors["images"].double(), recording.tensors["mu"]
    std = std_of(recording)
    for key, info in recording.info["info"].items():
        expected, noises = recording.group(f"{key}."), recording.tensors[f"noise.{key.partition('.')[2]}"].double()
        preconditioning = Preconditioning(kind_of(key), momentum)
        for step, (sigma, noise) in enumerate(zip(expected["sigma"].double(), noises, strict=True)):
            network = MixtureNetwork(means, std, sigma, preconditioning)
            terms = edm_loss(network, clean, sigma, noise, preconditioning, warmup_clamp(step, info["warmup_ite"]))
            unclamped = expected["unclamped_denoiser_loss_mean"][step].double()
            torch.testing.assert_close(terms.mse * expected["weight_raw"][step], unclamped, rtol=1e-4, atol=0)
            if step != info["warmup_ite"]:
                ratio = expected["weight"][step] / expected["weight_raw"][step]
                torch.testing.assert_close(terms.total, unclamped * ratio, rtol=1e-4, atol=0)
