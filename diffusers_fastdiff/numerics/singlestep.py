"""DPM-Solver++ in its singlestep form: up to three evaluations inside every interval, no memory between intervals.

Source: Lu et al., arXiv 2206.00927 (singlestep orders and grid, appendix D.3) and 2211.01095 (data prediction), for
`alpha = 1` and `lambda = -log sigma`.
"""

import math

import torch


def singlestep_orders(num_evaluations: int) -> list[int]:
    """Orders of the intervals for a number of evaluations: as many of order 3 as possible, the last ones lower."""
    if num_evaluations < 1:
        raise ValueError(f"`num_evaluations` must be at least 1, got {num_evaluations}.")
    thirds, rest = divmod(num_evaluations, 3)
    if rest == 0:
        return [3] * (thirds - 1) + [2, 1]
    return [3] * thirds + [rest]


def singlestep_grid(num_evaluations: int, sigma_min: float, sigma_max: float) -> list[float]:
    """Ends of the intervals, even in `log sigma`, one more than `singlestep_orders` has entries."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"`sigma_min` and `sigma_max` must satisfy 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}.")
    count = len(singlestep_orders(num_evaluations))
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), count + 1, dtype=torch.float64).exp().tolist()


class SinglestepRun:
    """State of one trajectory; driven like `solvers.SolverRun`.

    Args:
        sigmas: ends of the intervals, all > 0.
        orders: evaluations in each interval, 1 to 3.
    """

    def __init__(self, sigmas: list[float], orders: list[int]):
        if len(orders) != len(sigmas) - 1 or not all(order in (1, 2, 3) for order in orders):
            raise ValueError(f"`orders` must hold 1, 2 or 3 for each of the {len(sigmas) - 1} intervals, got {orders}.")
        self.sigmas, self.orders = sigmas, orders
        self.interval = 0
        self.sigma = sigmas[0]
        """Noise level of the state that is to be evaluated next."""
        self._start: torch.Tensor | None = None
        self._denoised: list[torch.Tensor] = []  # of this interval, oldest first

    @property
    def is_done(self) -> bool:
        return self.interval == len(self.orders)

    @property
    def network_sigma(self) -> float:
        return self.sigma

    def raise_noise(self, x: torch.Tensor, sigma: float, noise: torch.Tensor) -> torch.Tensor:
        """See `solvers.SolverRun.raise_noise`; only at the beginning of an interval."""
        added = (sigma**2 - self.sigma**2) ** 0.5
        self.sigma = sigma
        return x + added * noise

    def advance(self, x: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Take the evaluation at `sigma` and return the state of the next one."""
        if not self._denoised:
            self._start, self._first_sigma = x, self.sigma
        self._denoised.append(denoised)
        order, done = self.orders[self.interval], len(self._denoised)
        h = math.log(self._first_sigma / self.sigmas[self.interval + 1])
        if done < order:
            fractions = [1 / 2] if order == 2 else [1 / 3, 2 / 3]
            x = self._node(fractions[done - 1], h, fractions)
            self.sigma = self._first_sigma * math.exp(-fractions[done - 1] * h)
            return x
        x = self._end(h)
        self.interval += 1
        self.sigma, self._denoised = self.sigmas[self.interval], []
        return x

    def _node(self, fraction: float, h: float, fractions: list[float]) -> torch.Tensor:
        first, phi = self._denoised[0], math.expm1(-fraction * h)
        x = math.exp(-fraction * h) * self._start - phi * first
        if len(self._denoised) == 1:
            return x
        correction = fraction / fractions[0] * (phi / (fraction * h) + 1)
        return x + correction * (self._denoised[1] - first)

    def _end(self, h: float) -> torch.Tensor:
        first, phi = self._denoised[0], math.expm1(-h)
        x = math.exp(-h) * self._start - phi * first
        match len(self._denoised):
            case 2:
                return x - phi * (self._denoised[1] - first)  # phi / (2 r_1) with r_1 = 1/2
            case 3:
                return x + 1.5 * (phi / h + 1) * (self._denoised[2] - first)  # 1 / r_2 with r_2 = 2/3
        return x
