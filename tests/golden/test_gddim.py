"""gDDIM against the published program and against exact numbers recorded beside it.

`true/*` and `exact_*` are the published algorithm with accurate integrals: ours to 1e-9. What the program itself computed
differs from them by its quadrature, by no more than the .json states.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from diffusers_fastdiff.numerics.blur import BlurProcess, dct2, idct2
from diffusers_fastdiff.numerics.exponential_integrator import step_coefficients
from diffusers_fastdiff.numerics.linear_sde import add_noise, apply, combine
from diffusers_fastdiff.numerics.phase_space import CLDProcess, mixed_score_offset
from diffusers_fastdiff.numerics.reverse_steps import (
    denoising_step,
    euler_maruyama_step,
    reverse_drift,
    sscs_free_step,
    sscs_middle,
    sscs_score_step,
)
from diffusers_fastdiff.numerics.time_grids import hybrid_grid, power_grid
from diffusers_fastdiff.numerics.variance_preserving import VPProcess
from tests.golden.recordings import Recording, recordings

EXACT = 1e-9
NAMES = {"m_inv": "inverse_mass", "beta_0": "beta_0", "beta_1": "beta_1", "vv_gamma": "gamma", "numerical_eps": "epsilon"}
GRID = re.compile(r"nfe(\d+)_tso([\d.]+)_(den|noden)$")


@dataclass(frozen=True)
class Case:
    """One set of parameters of a recording: its process and its tensors."""

    name: str
    process: CLDProcess
    tensors: dict[str, torch.Tensor]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def cases(recording: Recording) -> Iterator[Case]:
    """Tensors of a case are under its name, or under no name if it is the only one; those without any path belong to all."""
    settings = recording.info["settings"]
    settings = {"default": settings} if "m_inv" in settings else settings
    shared = {key: value for key, value in recording.tensors.items() if "/" not in key}
    named = tuple(f"{name}/" for name in settings)
    unnamed = {key: value for key, value in recording.tensors.items() if not key.startswith(named)}
    for name, values in settings.items():
        tensors = recording.group(f"{name}/") or (unnamed if name == next(iter(settings)) else {})
        if any("/" in key for key in tensors):
            yield Case(name, CLDProcess(**{ours: values[theirs] for theirs, ours in NAMES.items()}), shared | tensors)


def find(tree: dict, *path: str) -> dict:
    """The first dictionary of a tree, at any depth, in which `path` leads somewhere."""
    node = tree
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    if node is not None:
        return node
    branches = (find(branch, *path) for branch in tree.values() if isinstance(branch, dict))
    return next((branch for branch in branches if branch), {})


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT, relative: bool = False) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp_min(1) if relative else 1
    error = ((actual - expected).abs().max() / scale).item()
    assert error <= tolerance, f"error {error:.2e}"


def pack(u: torch.Tensor) -> torch.Tensor:
    """(B, ..., C, 2) -> (B, 2C, ...): all positions, then all velocities."""
    return u.movedim((-1, -2), (1, 2)).flatten(1, 2)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-1, 1)


# ---- CLD: matrices and coefficients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", recordings("cld_coefs"))
def test_cld_matrices(recording):
    for case in cases(recording):
        process, t, true = case.process, case.tensors["t"], case.group("true/")
        assert_close(process.factor(t), true["R"])
        assert_close(process.covariance(t), true["Sigma"], 1e-11)
        assert_close(process.cholesky(t), true["L"])
        stated = find(recording.info["discrepancies"], case.name)
        if "rk4_dt1e-6" in stated:
            theirs = case.tensors["ref/rk4_dt1e-6/R"]
            assert_close(process.factor(t), theirs, stated["rk4_dt1e-6"]["max|R-true_R|"] + EXACT)
        expected = {
            "psi_0_to_t": process.transition(t, 0.0),
            "psi_t_to_0": process.transition(0.0, t),
            "F": process.drift(t),
            "G": process.diffusion(t).sqrt(),
            "beta_int": process.beta_integral(t),
        }
        for name, theirs in case.group("ref/").items():
            if name in expected:
                assert_close(expected[name], theirs, 1e-12, relative=True)


def grids(case: Case) -> Iterator[tuple[str, float, dict[str, torch.Tensor]]]:
    names = sorted({key.split("/")[0] for key in case.tensors if GRID.match(key.split("/")[0])})
    assert names
    for name in names:
        yield name, float(GRID.match(name)[2]), case.group(f"{name}/")


@pytest.mark.parametrize("recording", recordings("cld_deis_coefs"))
def test_cld_coefficients(recording):
    table = next(value for key, value in recording.info.items() if key.startswith("errors_of_reference"))
    for case in cases(recording):
        for grid, exponent, tensors in grids(case):
            times, stated = tensors["rev_ts"], find(table, case.name, grid)
            assert_close(power_grid(times[0].item(), times[-1].item(), len(times) - 1, exponent), times, 1e-13)
            for key, true in tensors.items():
                if not (match := re.fullmatch(r"true/(l?)deis(\d)_eps", key)):
                    continue
                letter, order = match[1], int(match[2])
                ours = step_coefficients(case.process, times, order, parametrization="L" if letter else "R")
                assert_close(ours.predictor, true, relative=True)
                theirs = tensors[f"{letter}deis{order}/eps"][:, :-1]
                assert_close(ours.predictor, theirs, stated[f"{letter}deis{order} eps"] + EXACT)
                assert_close(ours.transition, tensors[f"{letter}deis{order}/x"])
            ours = step_coefficients(case.process, times, 0)
            assert_close(ours.predictor[:, 0], tensors["true/order0_eps_closed_form"])
            if "order0/eps" in tensors:
                name = next(name for name in stated if name.startswith("prepare_order0"))
                assert_close(ours.predictor[:, 0], tensors["order0/eps"], stated[name] + EXACT)


@pytest.mark.parametrize("recording", recordings("cld_deis_coefs"))
def test_stochastic_coefficients(recording):
    """Their covariance lacks a transpose; ours is the true one, and that of the last step is left out on request only."""
    table = next(value for key, value in recording.info.items() if key.startswith("errors_of_reference"))
    for case in cases(recording):
        for grid, _, tensors in grids(case):
            times, stated = tensors["rev_ts"], find(table, case.name, grid)
            for strength in sorted({m[1] for key in tensors if (m := re.match(r"true/sdeis_lam([\d.]+)_cov", key))}):
                true = {name: tensors[f"true/sdeis_lam{strength}_{name}"] for name in ("psi_hat", "eps", "cov")}
                ours = step_coefficients(case.process, times, 0, stochasticity=float(strength), noiseless_last=False)
                R = case.process.factor(times)
                assert_close(R[1:] @ ours.carry @ torch.linalg.inv(R[:-1]), true["psi_hat"], relative=True)
                assert_close(ours.predictor[:, 0], true["eps"])
                assert_close(ours.noise @ ours.noise.mT, true["cov"])
                theirs = case.tensors[f"{grid}/sdeis_lam{strength}/eps"]
                assert_close(ours.predictor[:, 0], theirs, stated[f"sdeis lam{strength} eps"] + EXACT)
                quiet = step_coefficients(case.process, times, 0, stochasticity=float(strength))
                assert not quiet.noise[-1].any()
                assert_close(quiet.noise[:-1], ours.noise[:-1], 0)


@pytest.mark.parametrize("recording", recordings("cld_deis_coefs"))
def test_our_hybrid_grid_never_runs_back(recording):
    for case in cases(recording):
        for key in [key for key in case.tensors if re.fullmatch(r"hyb_.*/rev_ts", key)]:
            theirs = case.tensors[key]
            assert (theirs.diff() > 0).any()
            ours = hybrid_grid(theirs[0].item(), theirs[-1].item(), len(theirs) - 1)
            assert (ours.diff() < 0).all()


# ---- CLD: sampling from an exact mixture ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """`x ~ sum_k w_k N(mean_k, std^2)`, diffused by CLD; the exact network output."""

    process: CLDProcess
    means: torch.Tensor
    weights: torch.Tensor
    std: float

    def eps(self, u: torch.Tensor, t: float, parametrization: str = "R") -> torch.Tensor:
        pairs = torch.stack(u.chunk(2, dim=1), dim=-1)  # (B, D, 2)
        signal = self.process.signal(t)[:, 0]
        precision = torch.linalg.inv(self.process.covariance(t) + self.std**2 * signal[:, None] * signal)
        gaps = pairs[:, None] - self.means[:, :, None] * signal
        pulls = gaps @ precision
        share = (self.weights.log() - (pulls * gaps).sum((2, 3)) / 2).softmax(dim=1)
        score = -(share[..., None, None] * pulls).sum(1)
        return pack(-score @ self.process.noise_factor(t, parametrization))

    def sample(self, u, times, order, *, denoise=False, parametrization="R", stochasticity=0.0, noise=None):
        """All states of a run; `noise`: increments (N, B, 2D) that replace the drawn ones."""
        run = step_coefficients(self.process, times, order, parametrization=parametrization, stochasticity=stochasticity)
        history, states = [], [u]
        for i, t in enumerate(run.times[:-1]):
            history = [self.eps(u, t, parametrization), *history][: order + 1]
            u = combine(self.process, [run.transition[i], *run.predictor[i, : len(history)]], [u, *history])
            u = u if noise is None else u + noise[i]
            states.append(u)
        if denoise:
            u = denoising_step(self.process, u, self.eps(u, run.times[-1], parametrization), run.times[-1], parametrization)
        return u, states


def mixture_of(case: Case) -> Mixture:
    mix = case.group("mix/")
    return Mixture(case.process, mix["means"], mix["weights"], mix["std"].item())


def grid_of(recording: Recording, num_evaluations: int, denoise: bool) -> torch.Tensor:
    text = recording.info["procedure"]
    start, end = (float(re.search(rf"\b{name}=([\d.e-]*\d)", text)[1]) for name in ("T", "t_end"))
    return power_grid(start, end, num_evaluations - denoise, float(re.search(r"ts_order ([\d.]*\d)", text)[1]))


def runs(case: Case, pattern: str) -> Iterator[tuple[str, int, int, bool]]:
    """Keys like `exact_deis2/nfe10_den`: key, order, evaluations, whether with the denoising step."""
    found = [(key, re.fullmatch(rf"{pattern}(\d?)/nfe(\d+)_(den|noden)", key)) for key in sorted(case.tensors)]
    found = [(key, int(m[1] or 0), int(m[2]), m[3] == "den") for key, m in found if m]
    assert found, pattern
    yield from found


def truth_of(case: Case, denoise: bool) -> torch.Tensor:
    return pack(case.tensors["truth/dop853_u_den" if denoise else "truth/dop853_u"])


def rms_error(case: Case, u: torch.Tensor, denoise: bool) -> float:
    """Over positions."""
    return case.process.project(u - truth_of(case, denoise)).square().mean().sqrt().item()


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_mixture_network(recording):
    for case in cases(recording):
        mixture, check = mixture_of(case), case.group("eps_check/")
        for i, t in enumerate(check["t"].tolist() if check else ()):
            assert_close(mixture.eps(pack(check["u"][i]), t), pack(check["eps_exactR"][i]), relative=True)


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
@pytest.mark.parametrize(("letter", "parametrization"), [("", "R"), ("l", "L")])
def test_sampling_with_exact_coefficients(recording, letter, parametrization):
    for case in cases(recording):
        mixture, stated = mixture_of(case), find(recording.info["results"]["error_tables"], case.name)
        for key, order, count, denoise in runs(case, f"exact_{letter}deis"):
            times = grid_of(recording, count, denoise)
            arguments = {"denoise": denoise, "parametrization": parametrization}
            u, states = mixture.sample(pack(case.tensors["u_T"]), times, order, **arguments)
            assert_close(u, pack(case.tensors[key]), relative=True)
            for expected, actual in zip(case.tensors.get(f"{key}_traj_u", []), states, strict=False):
                assert_close(actual, pack(expected), relative=True)
            name = key.split("/")[1]
            recorded = stated[key.split("/")[0]][name]["rms_x"]
            assert rms_error(case, u, denoise) <= recorded * (1 + 1e-6)
            # The program's own run is as far from ours as its quadrature makes it.
            if key.removeprefix("exact_") in case.tensors and not letter:
                stated_difference = stated[key.split("/")[0]][name]["max_abs_diff_to_reference_run"]
                assert_close(u, pack(case.tensors[key.removeprefix("exact_")]), stated_difference * 1.01 + 1e-6)


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_cholesky_is_the_worse_parametrization(recording):
    for case in cases(recording):
        mixture = mixture_of(case)
        for _, order, count, denoise in runs(case, "exact_ldeis"):
            times, start = grid_of(recording, count, denoise), pack(case.tensors["u_T"])
            good, bad = (mixture.sample(start, times, order, parametrization=p, denoise=denoise)[0] for p in ("R", "L"))
            assert rms_error(case, bad, denoise) > 1.5 * rms_error(case, good, denoise)


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_hybrid_grid_is_more_accurate(recording):
    """Than the published grid, for the parameters for which its defaults were chosen."""
    for case in cases(recording):
        if case.process != CLDProcess():
            continue
        mixture = mixture_of(case)
        errors = []
        for _, order, count, denoise in runs(case, "exact_deis"):
            times, start = grid_of(recording, count, denoise), pack(case.tensors["u_T"])
            hybrid = hybrid_grid(times[0].item(), times[-1].item(), len(times) - 1)
            errors.append(
                [rms_error(case, mixture.sample(start, g, order, denoise=denoise)[0], denoise) for g in (hybrid, times)]
            )
        ratios = torch.tensor(errors).log().diff(dim=1)
        assert ratios.mean() > 0.2


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_euler_maruyama(recording):
    """Theirs for lambda 0 and 1, with the recorded noise; for others they weigh the score by (1 + lambda) / 2."""
    for case in cases(recording):
        mixture = mixture_of(case)
        for key, strength, count, denoise in runs(case, "em_lambda"):
            times, u = grid_of(recording, count, denoise).tolist(), pack(case.tensors["u_T"])
            increments = case.tensors.get(f"{key}_noise")
            for i, (t, t_next) in enumerate(itertools.pairwise(times)):
                u = euler_maruyama_step(case.process, u, mixture.eps(u, t), None, t, t_next, stochasticity=strength)
                u = u if increments is None else u + pack(increments[i])
            if denoise:
                u = denoising_step(case.process, u, mixture.eps(u, times[-1]), times[-1])
            assert_close(u, pack(case.tensors[key]), 1e-6, relative=True)


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_stochastic_sampling_with_recorded_noise(recording):
    for case in cases(recording):
        mixture = mixture_of(case)
        for key, expected in case.group("exact_sdeis_lam").items():
            strength, count = re.fullmatch(r"([\d.]+)/nfe(\d+)_noden_with_recorded_noise", key).groups()
            noise = case.tensors[f"sdeis_lam{strength}/nfe{count}_noden_noise"]
            times = grid_of(recording, int(count), False)
            increments = torch.stack([pack(n) for n in noise])
            u, _ = mixture.sample(pack(case.tensors["u_T"]), times, 0, stochasticity=float(strength), noise=increments)
            assert_close(u, pack(expected))


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_sscs_with_recorded_noise(recording):
    """Theirs evaluates beta at the mirrored time, so that only a constant one can be compared."""
    for case in cases(recording):
        process, mixture, tensors = case.process, mixture_of(case), case.group("sscs/")
        for key in [key for key in tensors if re.fullmatch(r"nfe\d+_noden", key)]:
            if process.beta_1:
                continue
            times, u = grid_of(recording, int(key[3:-6]), False).tolist(), pack(case.tensors["u_T"])
            still, increments = torch.zeros_like(u), [pack(n) for n in tensors[f"{key}_noise"]]
            for i, (t, t_next) in enumerate(itertools.pairwise(times)):
                middle = sscs_middle(process, t, t_next)
                u = sscs_free_step(process, u, still, t, middle) + increments[2 * i]
                u = sscs_score_step(process, u, mixture.eps(u, t), t, t_next)
                u = sscs_free_step(process, u, still, middle, t_next) + increments[2 * i + 1]
                for j, (a, b) in enumerate(((t, middle), (middle, t_next))):
                    factor = sscs_noise_factor(process, a, b)
                    assert_close(factor @ factor.mT, tensors[f"{key}_ou_cov_true"][2 * i + j])
            assert_close(u, pack(tensors[key]), 1e-6, relative=True)


def sscs_noise_factor(process: CLDProcess, t: float, t_next: float) -> torch.Tensor:
    """What `sscs_free_step` multiplies the two units of noise by."""
    zero, unit = torch.zeros(2, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    return sscs_free_step(process, zero, unit, t, t_next).T


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_marginals_of_gaussian_data(recording):
    """Covariance of (x, v) at the end, when every step is a linear map."""
    for case in cases(recording):
        expected = case.group("gauss_marginal/")
        for count in sorted({int(key.split("nfe")[1]) for key in expected}):
            times = grid_of(recording, count, False)
            exact = expected[f"exact/nfe{count}"]
            signal, sigma = case.process.signal(times)[..., 0], case.process.covariance(times)
            variance = (exact - sigma[-1])[0, 0] / signal[-1, 0] ** 2
            true = sigma + variance * signal[:, :, None] * signal[:, None]
            assert_close(true[-1], exact)
            for key, covariance in expected.items():
                name, number = key.split("/nfe")
                found = re.fullmatch(r"(deis0|sdeis|em)_(?:lam([\d.]+)_)?\(?(?:true_coef\)|correct)(.*)", name)
                if int(number) != count or not found:
                    continue
                quiet = "last_zeroed" in found[3]
                actual = propagate(case.process, times, true, found[1], float(found[2] or 0), quiet)
                assert_close(actual, covariance, relative=True)


def propagate(process, times, true, sampler: str, stochasticity: float, noiseless_last: bool) -> torch.Tensor:
    """Covariance after a run in which `eps = K^T true^-1 u`."""
    run = step_coefficients(process, times, 0, stochasticity=stochasticity, noiseless_last=noiseless_last)
    covariance, one = true[0], torch.eye(2, dtype=torch.float64)
    for i, (t, t_next) in enumerate(itertools.pairwise(run.times)):
        gain = process.factor(t).mT @ torch.linalg.inv(true[i])
        if sampler == "em":
            drift = process.drift(t) + (1 + stochasticity**2) / 2 * process.noise_drift(t) @ gain
            step, noise = one + (t_next - t) * drift, stochasticity**2 * (t - t_next) * process.diffusion(t)
        else:
            step, noise = run.transition[i] + run.predictor[i, 0] @ gain, run.noise[i] @ run.noise[i].mT
        covariance = step @ covariance @ step.mT + noise
    return covariance


@pytest.mark.parametrize("recording", recordings("cld_trajectories"))
def test_probability_flow(recording):
    integrate = pytest.importorskip("scipy.integrate")
    for case in cases(recording):
        mixture, start = mixture_of(case), pack(case.tensors["u_T"])
        times = grid_of(recording, 1, False)

        def slope(t, u, mixture=mixture, shape=start.shape):
            state = torch.from_numpy(u).reshape(shape)
            return reverse_drift(mixture.process, state, mixture.eps(state, t), t).flatten().numpy()

        solution = integrate.solve_ivp(slope, times.tolist(), start.flatten().numpy(), rtol=1e-9, atol=1e-9)
        u = torch.from_numpy(solution.y[:, -1]).reshape(start.shape)
        assert_close(u, truth_of(case, False), 1e-7)
        if "ode_rk45/noden" in case.tensors:
            assert_close(u, pack(case.tensors["ode_rk45/noden"]), 1e-7)
        u = denoising_step(case.process, u, mixture.eps(u, times[-1].item()), times[-1].item())
        assert_close(u, truth_of(case, True), 1e-7)


# ---- training, VP and blur -----------------------------------------------------------------------------------------------


def toy_network(text: str):
    """`a h + b sin(labels / c)` with the numbers of the text."""
    a, b, c = (float(x) for x in re.search(r"([\d.]+)\*\w+\s*\+\s*([\d.]+)\*sin\((?:labels|999t)/([\d.]+)\)", text).groups())
    return lambda h, labels: a * h + (b * (labels / c).sin()).reshape(-1, *[1] * (h.ndim - 1))


@pytest.mark.parametrize("recording", recordings("cld_training"))
def test_training(recording):
    for case in cases(recording):
        for kind in ("vec", "img"):
            part, process = case.group(f"{kind}/"), case.process
            net, t, noise = toy_network(recording.info["procedure"]), part["t"], pack(part["z"])
            clean = channels_first(part["x0"])
            assert_close(process.factor(t), part["true_R"])
            noisy = add_noise(process, clean, noise, t)
            assert_close(apply(process, process.signal(t), process.lift(clean)), pack(part["mean"]))
            assert_close(noisy, pack(part["u_t"]), 1e-5)  # their table of R is interpolated
            assert_close(noisy, channels_first(part["net_in"]), 1e-5)
            score = -apply(process, torch.linalg.inv(process.factor(t)).mT, noise)
            assert_close(score, pack(part["score_from_z"]), 1e-3, relative=True)
            for mixed in (False, True):
                eps = net(noisy, part["labels"]) + (mixed_score_offset(process, noisy, t) if mixed else 0)
                assert_close(eps, pack(part[f"eps_mixed{mixed:d}"]), 1e-4, relative=True)
                assert_close((eps - noise).square().mean().reshape(1), part[f"loss_mixed{mixed:d}_mean"], 1e-4, relative=True)


@pytest.mark.parametrize("recording", recordings("vp_ddim"))
def test_vp_is_ddim(recording):
    settings, tensors = recording.info["settings"], recording.tensors
    process, t = VPProcess(settings["beta_min"], settings["beta_max"]), tensors["t"]
    alpha_bar = process.signal(t).flatten() ** 2
    assert_close(alpha_bar, tensors["alpha_bar"])
    for strength in settings["lambdas"]:
        expected = recording.group(f"lam{strength}/")
        run = step_coefficients(process, t, 0, stochasticity=strength, noiseless_last=False)
        variance = run.noise.flatten() ** 2
        assert_close(run.transition.flatten(), expected["x_coef"])
        assert_close(run.predictor.flatten(), expected["eps_coef"])
        assert_close(variance, expected["cov"])
        assert_close(variance.sqrt(), expected["ddim_sigma"])
        before, after = alpha_bar[:-1], alpha_bar[1:]
        eta_1 = (1 - after) / (1 - before) * (1 - before / after)
        assert_close((variance / eta_1).sqrt(), expected["eta_equivalent"])


@pytest.mark.parametrize("recording", recordings("blur"))
def test_blur_process(recording):
    tensors = recording.tensors
    dct = {key: channels_first(value) for key, value in recording.group("dct/").items()}
    assert_close(dct2(dct["image"]), dct["dct"])
    assert_close(idct2(dct["image"]), dct["idct_of_image"])
    if "image8" in dct:
        assert_close(dct2(dct["image8"]), dct["dct8"])
    for process, part in blur_cases(recording):
        t, size = tensors["t"], process.image_size
        assert_close(process.signal(t)[:, 0, 0, 0, 0] ** 2, tensors["alpha"])
        assert_close(process.factor(t)[:, 0, 0, 0, 0], tensors["std"])
        times = [process.time_of(rho) for rho in tensors["rho"].tolist()]
        assert_close(torch.tensor(times, dtype=torch.float64), tensors["rho2t"])
        assert_close(process.noise_to_signal(tensors["rho2t"]), tensors["rho"])
        assert process.start_time == pytest.approx(tensors["sampling_T"].item(), abs=EXACT)
        assert_close(process.eigenvalues(), tensors["labda"])
        assert_close(process.scale(tensors["t_sub"]), part["freq_scaling"])
        assert_close(process.signal(tensors["t_sub"])[..., 0, 0], part["y_mean_coef"])
        image, noise = dct["image"], channels_first(part["perturb/eps"])
        noisy = add_noise(process, image, noise, part["perturb/t"])
        assert_close(noisy, channels_first(part["perturb/x_t"]))
        mean = add_noise(process, image, 0 * noise, part["perturb/t"])
        assert_close(mean, channels_first(part["perturb/mean"]))
        assert tuple(image.shape[-2:]) == size


@pytest.mark.parametrize("recording", recordings("blur"))
def test_blur_training(recording):
    loss, image = recording.group("loss/"), channels_first(recording.tensors["dct/image"])
    if not loss:
        pytest.skip("the recording has no loss")
    settings = recording.info["settings"]
    net, noise = toy_network(recording.info["tensors"]["loss/value"]["meaning"]), channels_first(loss["eps"])
    process = BlurProcess(tuple(image.shape[-2:]), sigma_max=settings["sig"][1], min_scale=settings["ms"])
    noisy = add_noise(process, image, noise, loss["t"])
    assert_close(noisy, channels_first(loss["x_t"]))
    assert_close((net(noisy, 999 * loss["t"]) - noise).square().mean().reshape(1), loss["value"])


def blur_cases(recording: Recording) -> Iterator[tuple[BlurProcess, dict[str, torch.Tensor]]]:
    settings = recording.info["settings"]
    for sigma_max in settings["sig"]:
        size = tuple(recording.tensors["labda"].shape)
        part = recording.group(f"sigma{sigma_max:g}/")
        if part:
            yield BlurProcess(size, sigma_max=sigma_max, min_scale=settings["ms"]), part


@pytest.mark.parametrize("recording", recordings("blur"))
def test_blur_sampling(recording):
    settings = recording.info["settings"]
    for process, part in blur_cases(recording):
        mu, std, start = channels_first(part["mu"][None]), part["s0"].item(), channels_first(part["y_T"])
        for count in settings["nfes"]:
            run = {key: value for key, value in part.items() if key.startswith(f"nfe{count}/")}
            if not run:
                continue
            times = run[f"nfe{count}/rev_ts"]
            assert_close(power_grid(process.start_time, settings["t0"], count), times)
            coefficients, y, states = step_coefficients(process, times, 0), start, []
            for i, t in enumerate(coefficients.times[:-1]):
                states.append(y[:1])
                signal, sigma = process.signal(t)[..., 0, 0], process.factor(t)[..., 0, 0]
                eps = sigma * (y - signal * mu) / (signal**2 * std**2 + sigma**2)
                y = combine(process, [coefficients.transition[i], coefficients.predictor[i, 0]], [y, eps])
            image = process.inverse_transform(y)
            assert_close(image, channels_first(run[f"nfe{count}/x0"]))
            trajectory = run.get(f"nfe{count}/traj_y")
            assert trajectory is None or not assert_close(torch.stack(states), trajectory.movedim(-1, 2))
            error = (image - channels_first(run[f"nfe{count}/exact_ode_x"])).square().mean().sqrt().item()
            assert error <= recording.info["stats"][f"sigma{process.sigma_max:g} nfe{count} rms(x - exact ODE)"] + EXACT
