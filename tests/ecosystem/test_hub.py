"""Everything public comes from the Hub in a process that only imports the package, and nothing comes along that runs code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ecosystem import hub_client
from tests.ecosystem.attacks import INDEX_ATTACKS, WEIGHT_ATTACKS, edit_json, plant_code
from tests.ecosystem.folders import MODELS, PIPELINES, attached_solver, dit_pipeline
from tests.local_hub_server import find_repository, serve

ROOT = Path(__file__).parents[2]
STOCK = ("DiTPipeline", "DiffusionPipeline", "open_pipeline")
KINDS = {"dit": STOCK, "solver": STOCK, "edm": ("EDMPipeline",), "gddim": ("GDDIMPipeline",)}
"""What each pipeline is loaded with."""


def client(folder: Path, name: str, tasks: list[dict], **environment: str) -> dict:
    (folder / f"{name}.json").write_text(json.dumps(tasks))
    command = [sys.executable, "-m", "tests.ecosystem.hub_client", str(folder / f"{name}.json"), str(folder / name)]
    variables = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"} | environment
    result = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / name, weights_only=True)


def task(name: str, class_name: str, repo: str, **options) -> dict:
    return {"name": name, "class": class_name, "repo": f"org/{repo}", "options": options}


def other_solver(scale: float):
    """The same solver with other weights."""
    scheduler = attached_solver()
    for parameter in scheduler.predictor.parameters():
        parameter.mul_(scale)
    return scheduler


def fill(hub: Path, marker: Path) -> list[dict]:
    """Write repositories and say what to load from them."""
    tasks = []
    for name, make in PIPELINES.items():
        make().save_pretrained(hub / "org" / name)
        tasks += [task(f"{kind} {name}", kind, name) for kind in KINDS[name]]
    for name, make in MODELS.items():
        if name != "autoencoder":
            make().save_pretrained(hub / "org" / f"model-{name}")
            tasks.append(task(f"model {name}", type(make()).__name__, f"model-{name}"))
    attached_solver().save_pretrained(hub / "org" / "scheduler")
    other_solver(2.0).save_pretrained(hub / "org" / "scheduler@v2")
    sha = find_repository(hub, "org", "scheduler", "v2").sha
    tasks += [
        task("scheduler alone", "AMEDScheduler", "scheduler"),
        task("scheduler of a pipeline", "AMEDScheduler", "solver", subfolder="scheduler"),
        task("scheduler of a branch", "AMEDScheduler", "scheduler", revision="v2"),
        task("scheduler of a commit", "AMEDScheduler", "scheduler", revision=sha),
        task("no such branch", "AMEDScheduler", "scheduler", revision="v3"),
        task("no such repository", "DiTPipeline", "nothing"),
    ]
    for attack, entry in INDEX_ATTACKS.items():
        folder = hub / "org" / f"index-{attack.replace(' ', '-')}"
        dit_pipeline().save_pretrained(folder)
        edit_json(folder / "model_index.json", **entry)
        plant_code(folder, marker)
        tasks += [task(f"attack {attack} {kind}", kind, folder.name) for kind in ("DiTPipeline", "open_pipeline")]
    for attack in WEIGHT_ATTACKS:
        folder = hub / "org" / f"weights-{attack.__name__}"
        PIPELINES["solver"]().save_pretrained(folder)
        attack(folder / "scheduler" / "predictor", marker)
        tasks.append(task(f"attack predictor {attack.__name__}", "DiTPipeline", folder.name))
        folder = hub / "org" / f"model-weights-{attack.__name__}"
        MODELS["fixed_point"]().save_pretrained(folder)
        attack(folder, marker)
        tasks.append(task(f"attack model {attack.__name__}", "FixedPointDiTTransformer2DModel", folder.name))
    return tasks


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Outputs and errors of a process with the network and of one without, after the first."""
    folder = tmp_path_factory.mktemp("hub")
    marker = folder / "executed"
    tasks = fill(folder / "repositories", marker)
    endpoint, server = serve(folder / "repositories")
    try:
        online = client(folder, "online", tasks, HF_ENDPOINT=endpoint)
    finally:
        server.shutdown()
    good = [task for task in tasks if isinstance(online[task["name"]], torch.Tensor)]
    offline_tasks = [*good, task("never fetched", "DiTPipeline", "index-unpickler-2")]
    offline = client(folder, "offline", offline_tasks, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    return online, offline, marker


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(loaded, name):
    expected = hub_client.draw(PIPELINES[name]())
    for kind in KINDS[name]:
        result = loaded[0][f"{kind} {name}"]
        assert isinstance(result, torch.Tensor), result
        assert torch.equal(result, expected), kind


@pytest.mark.parametrize("name", set(MODELS) - {"autoencoder"})
def test_models(loaded, name):
    expected = torch.cat([value.flatten() for value in MODELS[name]().state_dict().values()])
    result = loaded[0][f"model {name}"]
    assert isinstance(result, torch.Tensor), result
    if name != "predictor":  # whose weights are drawn anew each time
        assert torch.equal(result, expected)


def test_predictors_and_revisions(loaded):
    plain, doubled = (
        torch.cat([value.flatten() for value in scheduler.predictor.state_dict().values()])
        for scheduler in (attached_solver(), other_solver(2.0))
    )
    for name, expected in {
        "scheduler alone": plain, "scheduler of a pipeline": plain,
        "scheduler of a branch": doubled, "scheduler of a commit": doubled,
    }.items():  # fmt: skip
        assert isinstance(loaded[0][name], torch.Tensor), loaded[0][name]
        assert torch.equal(loaded[0][name], expected), name


def test_missing_things_are_errors(loaded):
    for name in ("no such branch", "no such repository"):
        assert isinstance(loaded[0][name], str)


def test_offline_is_the_same_once_fetched(loaded):
    online, offline, _ = loaded
    assert isinstance(offline.pop("never fetched"), str)
    assert len(offline) > 12
    for name, result in offline.items():
        assert isinstance(result, torch.Tensor), f"{name}: {result}"
        assert torch.equal(result, online[name]), name


def test_attacks_are_refused_and_execute_nothing(loaded):
    online, _, marker = loaded
    attacks = {name: result for name, result in online.items() if name.startswith("attack")}
    assert len(attacks) == 2 * len(INDEX_ATTACKS) + 2 * len(WEIGHT_ATTACKS)
    for name, result in attacks.items():
        assert isinstance(result, str), name
        assert result.split(":")[0] in ("OSError", "FileNotFoundError", "ValueError", "TypeError"), f"{name}: {result}"
    assert not marker.exists()
