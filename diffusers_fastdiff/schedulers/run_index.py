"""Which evaluation of a run comes next: the index bookkeeping that schedulers of diffusers share."""

import torch


class RunIndex:
    """Position in a list of timesteps."""

    def __init__(self):
        self.begin: int | None = None
        """First evaluation, when a pipeline starts in the middle (img2img)."""
        self.current: int | None = None
        """Evaluation that `step` is called for next, None before the first."""

    def reset(self) -> None:
        self.begin = self.current = None

    def locate(self, timestep: float | torch.Tensor, timesteps: torch.Tensor) -> int:
        """Set `current` if this is the first call of a run; a timestep that occurs twice means its second place, as in
        diffusers, unless the run begins there.

        Raises:
            ValueError: if the timestep is not in the list.
        """
        if self.current is None:
            self.current = self.find(timestep, timesteps) if self.begin is None else self.begin
        return self.current

    @staticmethod
    def find(timestep: float | torch.Tensor, timesteps: torch.Tensor) -> int:
        """Place of a timestep in the list. One inside the last interval or behind it, such as 0, means the last evaluation, as
        in the multistep schedulers of diffusers.

        Raises:
            ValueError: if the timestep is not in the list, but before its end.
        """
        value = torch.as_tensor(timestep, dtype=timesteps.dtype, device=timesteps.device)
        places = (timesteps == value).nonzero().flatten()
        if len(places) > 0:
            return int(places[1 if len(places) > 1 else 0])
        if float(value) < float(timesteps[-2:][0]):
            return len(timesteps) - 1
        raise ValueError(
            f"`timestep` {float(value):.6g} is not among those of this run, {timesteps.tolist()}. Pass elements of "
            "`scheduler.timesteps`."
        )
