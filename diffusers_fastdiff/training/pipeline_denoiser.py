"""The denoiser inside a pipeline as solvers want it, `D(x, sigma)`, with the conditions a pipeline would give it."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..hooks.bottleneck import bottleneck_features, bottleneck_of
from ..models.class_labels import DIT_PIPELINE_NULL_LABEL
from ..numerics.gits import search_grid
from ..numerics.noise_levels import NoiseModel, Sigma
from ..numerics.sigma_grids import logsnr_grid
from ..numerics.solver_methods import like
from .randomness import BatchRandom, derive_seed

Conditions = dict[str, torch.Tensor]
"""Keyword arguments of the denoiser, a row for each sample."""


class PipelineDenoiser:
    """Draws conditions for a pipeline's denoiser and evaluates it, with guidance and gradients with respect to x and sigma.

    Args:
        pipe: a pipeline with a `transformer` or a `unet`: labels (DiT, EDM), prompts (Stable Diffusion) or nothing.
        noise_model: coordinates of the solver, from the `noise_model` of a scheduler of this package.
        guidance_scale: 1 for none.
        prompts: for text-to-image pipelines.
        negative_prompt: what guidance leads away from.

    Raises:
        ValueError: if the pipeline needs prompts and there are none, or cannot be guided.
    """

    def __init__(
        self,
        pipe: Any,
        noise_model: NoiseModel,
        guidance_scale: float = 1.0,
        prompts: list[str] | None = None,
        negative_prompt: str = "",
    ):
        self.network = getattr(pipe, "transformer", None) or pipe.unet
        self.network.requires_grad_(False).eval()
        self.noise_model, self.guidance_scale = noise_model, guidance_scale
        self._pipe, self._prompts, self._negative_prompt = pipe, prompts, negative_prompt
        self._takes_prompts = isinstance(self.network, UNet2DConditionModel)
        if self._takes_prompts and not prompts:
            raise ValueError("This pipeline is conditioned on text: give `prompts`.")
        self.num_classes, self._null_label = _labels_of(self.network)
        if guidance_scale != 1 and not self._takes_prompts and self._null_label is None:
            raise ValueError(f"`guidance_scale` must be 1 for {type(self.network).__name__} without a null label.")
        side = self.network.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.sample_shape = (self.network.config.in_channels, height, width)
        """(C, H, W) of what is sampled."""
        self._bottleneck: torch.Tensor | None = None

    def watch_bottleneck(self) -> None:
        """Keep the bottleneck features of every evaluation for `features`."""
        bottleneck_of(self.network).register_forward_hook(self._capture)

    def _capture(self, module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        del module, inputs
        self._bottleneck = bottleneck_features(output).detach()

    def features(self, batch_size: int) -> torch.Tensor:
        """(B, 8, 8), of the last evaluation, for the condition."""
        return self._bottleneck[-batch_size:] if self._takes_prompts else self._bottleneck[:batch_size]

    def draw(self, random: BatchRandom) -> torch.Tensor:
        """A random choice of condition for each sample of a slice, (B,) integers: classes or numbers of prompts."""
        return random.integers(len(self._prompts) if self._takes_prompts else self.num_classes or 1)

    @torch.no_grad()
    def conditions(self, choice: torch.Tensor) -> Conditions:
        """What the network is given for a choice of `draw`, and behind "null_" what guidance leads away from."""
        choice = choice.to(self.network.device)
        if self._takes_prompts:
            prompts = [self._prompts[index] for index in choice.tolist()]
            return self._of_prompts(prompts)
        if self.num_classes is None:
            return {}
        null = {} if self.guidance_scale == 1 else {"null_class_labels": torch.full_like(choice, self._null_label)}
        return {"class_labels": choice} | null

    def _of_prompts(self, prompts: list[str]) -> Conditions:
        is_guided = self.guidance_scale != 1
        negative = [self._negative_prompt] * len(prompts)
        embeddings, null = self._pipe.encode_prompt(
            prompts, self.network.device, 1, is_guided, negative_prompt=negative if is_guided else None
        )[:2]
        return {"encoder_hidden_states": embeddings} | ({"null_encoder_hidden_states": null} if is_guided else {})

    def bind(self, conditions: Conditions) -> Callable[[torch.Tensor, Sigma], torch.Tensor]:
        """`D(x, sigma)` for one batch: x (B, C, H, W), sigma a number or (B, 1, 1, 1)."""

        def denoise(x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
            return x - like(sigma, x) * self.slope(x, sigma, conditions)

        return denoise

    def start(self, noise: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """State of a solver at its first level, from standard normal noise, as in pipelines."""
        factor = self.noise_model.initial_scale(sigma) / self.noise_model.state_scale(sigma)
        return factor.to(noise) * noise

    def slope(self, x: torch.Tensor, sigma: Sigma, conditions: Conditions) -> torch.Tensor:
        """`dx / dsigma` at x, (B, C, H, W), when the network is told `sigma`."""
        output = self._guided(self.noise_model.input_scale(sigma).to(x) * x, sigma, conditions)
        return self.noise_model.slope(output, x, sigma)

    def _guided(self, scaled: torch.Tensor, sigma: Sigma, conditions: Conditions) -> torch.Tensor:
        return self.predict(scaled, torch.as_tensor(self.noise_model.timestep(sigma)), conditions)

    def predict(self, scaled: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The network's output, guided, for an input that is already scaled; in one call, as in pipelines.

        Args:
            scaled: (B, C, H, W).
            timestep: a number, or one for each sample in any shape.
            conditions: of `conditions`.
        """
        count, channels = scaled.shape[:2]
        inputs = scaled.to(self.network.dtype)
        times = timestep.to(scaled.device, torch.float32).reshape(-1).expand(count)
        given = {key: value for key, value in conditions.items() if not key.startswith("null_")}
        if self.guidance_scale == 1:
            return self.network(inputs, times, **given).sample[:, :channels].to(scaled.dtype)
        order = self._condition_last if self._takes_prompts else self._condition_first
        given = {key: torch.cat(order(value, conditions[f"null_{key}"])) for key, value in given.items()}
        output = self.network(torch.cat([inputs, inputs]), torch.cat([times, times]), **given).sample
        conditional, null = order(*output[:, :channels].to(scaled.dtype).chunk(2))
        return null + self.guidance_scale * (conditional - null)

    # Where pipelines put the condition in a batch doubled for guidance; each is its own inverse.

    @staticmethod
    def _condition_first(conditional: torch.Tensor, null: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return conditional, null

    @staticmethod
    def _condition_last(conditional: torch.Tensor, null: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return null, conditional


def search_pipeline_grid(
    denoiser: PipelineDenoiser,
    sigmas: list[float],
    num_points: int,
    num_images: int = 64,
    seed: int = 0,
    metric: str = "dev",
    discount: float = 1.15,
) -> list[float]:
    """GITS: the best levels for a pipeline between the ends of a grid, see `numerics.gits.search_grid`.

    Args:
        denoiser: of the pipeline.
        sigmas: only its ends count; the teacher has 61 levels between them, even in `log sigma`.
        num_points: levels to keep, both ends among them.
        num_images: warm-up samples.
        seed: of their noise and conditions.
        metric, discount: of the search.
    """
    random = BatchRandom(derive_seed(seed, "grid"), 0, num_images, 0, num_images, denoiser.network.device)
    choice, noise = denoiser.draw(random), random.normal(*denoiser.sample_shape)
    fine = logsnr_grid(61, min(sigmas[0], sigmas[-1]), max(sigmas[0], sigmas[-1])).tolist()
    with torch.no_grad():
        start, denoise = denoiser.start(noise, fine[0]), denoiser.bind(denoiser.conditions(choice))
        return search_grid(denoise, start, fine, num_points, metric=metric, discount=discount)


def _labels_of(network: torch.nn.Module) -> tuple[int | None, int | None]:
    """Number of classes and null label of a denoiser, where it has them."""
    config = network.config
    counts = (config.get(name) for name in ("num_classes", "num_embeds_ada_norm", "num_class_embeds"))
    num_classes = next((count for count in counts if count), None)
    null = getattr(network, "null_label", None)
    if null is None and "num_embeds_ada_norm" in config:
        null = DIT_PIPELINE_NULL_LABEL
    return num_classes, null if num_classes else None
