"""The GITS search against the published program: costs to 1e-10, the same steps."""

import json
import re

import pytest
import torch

from diffusers_fastdiff.numerics.gits import cheapest_steps, jump_costs, teacher_trajectory
from diffusers_fastdiff.numerics.solver_methods import Solver
from tests.analytic import mixture_denoiser
from tests.golden.recordings import assert_relative, recordings


def check_dynamic_programme(costs: torch.Tensor, name: str, expected: list[int]) -> None:
    match = re.search(r"steps(\d+)\.coeff([\d.]+)$", name)
    assert cheapest_steps(costs, int(match[1]), float(match[2])) == expected, name


@pytest.mark.parametrize("recording", recordings("gits"))
def test_costs_and_search(recording):
    info, tensors = recording.info, recording.tensors
    settings = info["settings"]
    if "s0" not in settings:  # recorded with the solvers of the same set
        settings = json.loads(recording.path.with_name("amed_solvers.json").read_text())["settings"] | settings
    denoiser = mixture_denoiser(tensors["mu"], settings["s0"])
    sigmas = tensors["t_teacher"].tolist()
    for key, result in info["results"].items():
        match = re.fullmatch(r"(dev|l1|l2)\.afs(\d)\.tea_(\w+)", key)
        if not match:
            continue
        metric, afs, name = match.groups()
        costs = []
        for latents in recording.group("latents").values() if "latents" not in tensors else tensors["latents"]:
            solver = Solver(name, settings["max_order"] if name == "ipndm" else 1)
            # The program's teacher takes the analytical first step when the student does; ours never would.
            states, slopes = teacher_trajectory(denoiser, latents * sigmas[0], sigmas, solver, afs == "1")
            costs.append(jump_costs(states, slopes, sigmas, metric))
        assert_relative(sum(costs) / len(costs), tensors[f"{key}.cost"], 1e-10)
        steps = cheapest_steps(tensors[f"{key}.cost"], settings["num_steps"], settings["coeff"])
        assert steps == result["phi_before_afs_insertion"]
    for name, expected in info["results"].get("dp_only", {}).items():
        check_dynamic_programme(tensors[name.partition(".steps")[0] + ".cost"], name, expected)


@pytest.mark.parametrize("recording", recordings("gits_dp"))
def test_dynamic_programme(recording):
    sections = [section for section in recording.info.values() if isinstance(section, dict) and "small_example" in section]
    assert sections
    for section in sections:
        example = section["small_example"]
        for name, expected in example["results"].items():
            check_dynamic_programme(torch.tensor(example["cost"], dtype=torch.float64), name, expected)
