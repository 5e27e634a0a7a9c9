"""What `push_to_hub` sends: the requests of the client library itself, answered by a stand-in for the network."""

import base64
import json
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch

from diffusers_fastdiff import AMEDScheduler
from diffusers_fastdiff.training.model_card import push_folder, write_model_card
from tests.ecosystem.folders import MODELS, PIPELINES, attached_solver
from tests.ecosystem.hub_client import draw

httpx = pytest.importorskip("httpx2")
TOKEN = "hf_not_a_real_token"


class Hub:
    """Takes commits and keeps their files."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()

    def __call__(self, request):
        path, body = request.url.path, request.read()
        self.tokens.add(request.headers.get("authorization"))
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = "/".join(filter(None, (self.created[-1].get("organization"), self.created[-1]["name"])))
            return httpx.Response(200, json={"url": f"https://huggingface.co/{name}", "name": name, "id": name})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            answers = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return httpx.Response(200, json={"files": answers})
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = "https://huggingface.co/org/name/commit/" + "0" * 40
            return httpx.Response(200, json={"commitUrl": url, "commitOid": "0" * 40, "hookOutput": "", "success": True})
        if path == "/api/models/org/name":
            return httpx.Response(200, json={"id": "org/name", "sha": "0" * 40, "siblings": []})
        if path == "/api/validate-yaml":
            return httpx.Response(200, json={"errors": [], "warnings": []})
        return httpx.Response(404, headers={"X-Error-Code": "EntryNotFound"}, json={"error": path})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(server)))
    yield server
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def fetched(hub: Hub) -> Path:
    """The repository as a folder."""
    folder = Path(tempfile.mkdtemp())
    for name, content in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_models(hub, name):
    model = MODELS[name]()
    model.push_to_hub("org/name", token=TOKEN)
    assert hub.created[0]["name"] == "name"
    assert f"Bearer {TOKEN}" in hub.tokens
    assert set(hub.files) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    loaded = type(model).from_pretrained(fetched(hub))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_scheduler_takes_its_predictor_along(hub):
    scheduler = attached_solver()
    scheduler.push_to_hub("org/name", token=TOKEN)
    assert "predictor/diffusion_pytorch_model.safetensors" in hub.files
    loaded = AMEDScheduler.from_pretrained(fetched(hub))
    for key, value in scheduler.predictor.state_dict().items():
        assert torch.equal(loaded.predictor.state_dict()[key], value), key


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(hub, name):
    pipe = PIPELINES[name]()
    pipe.push_to_hub("org/name", token=TOKEN)
    assert not [path for path in hub.files if path.endswith((".bin", ".py", ".pkl"))]
    assert torch.equal(draw(type(pipe).from_pretrained(fetched(hub))), draw(pipe))


def test_trained_folders_go_without_checkpoints(hub, tmp_path):
    attached_solver().save_pretrained(tmp_path)
    write_model_card(tmp_path, "name", "A solver.", "pass", {"steps": 1}, tags=["amed"])
    for name in ("checkpoint-1/optimizer.bin", "logs/events", "samples/a.png", "log.jsonl", ".incomplete-1/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert push_folder(tmp_path, "org/name", TOKEN, private=True).endswith("org/name")
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert set(hub.files) == {
        "README.md", "scheduler_config.json", "predictor/config.json", "predictor/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert b"diffusers_fastdiff" in hub.files["README.md"]
