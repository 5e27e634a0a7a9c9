"""Churn: how much noise is put back at a step (Karras et al., arXiv 2206.00364, algorithm 2)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Churn:
    """Stochasticity of a sampler; the default is none.

    Args:
        amount: S_churn, spread over the steps of the run.
        sigma_min, sigma_max: S_min and S_max, levels between which noise is added.
        noise_scale: S_noise, standard deviation of the added noise.
    """

    amount: float = 0.0
    sigma_min: float = 0.0
    sigma_max: float = float("inf")
    noise_scale: float = 1.0

    def __post_init__(self):
        if self.amount < 0 or self.noise_scale <= 0 or not 0 <= self.sigma_min <= self.sigma_max:
            raise ValueError(f"Churn needs amount >= 0, 0 <= sigma_min <= sigma_max and noise_scale > 0, got {self}.")

    def raised(self, sigma: float, num_steps: int) -> float:
        """The level that a state at `sigma` is raised to in a run of `num_steps` intervals."""
        if not self.sigma_min <= sigma <= self.sigma_max:
            return sigma
        return sigma * (1 + min(self.amount / num_steps, 2**0.5 - 1))
