"""Model cards of trained pipelines, and their upload."""

import shlex
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

_TEMPLATE = """---
{metadata}
---

# {title}

{description}

## Use

```python
{usage}
```

## Training

| | |
|---|---|
{table}

```bash
{command}
```
"""


def launch_command() -> str:
    """How this script was started, as its reader would start it."""
    script, *flags = sys.argv
    return shlex.join(["accelerate", "launch", f"examples/{Path(script).name}", *flags])


def write_model_card(
    folder: str | Path, title: str, description: str, usage: str, facts: dict[str, Any], tags: list[str]
) -> None:
    """Write README.md with Hub metadata and the command that made the model.

    Args:
        folder: of the saved pipeline.
        title, description, usage: heading, a sentence or two, and code.
        facts: rows of the table: steps, images seen, seed and so on.
        tags: for search on the Hub.
    """
    data = ModelCardData(license="apache-2.0", library_name="diffusers", tags=["diffusers_fastdiff", *tags])
    card = _TEMPLATE.format(
        metadata=data.to_yaml(),
        title=title,
        description=description,
        usage=usage,
        table="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        command=launch_command(),
    )
    ModelCard(card).save(Path(folder) / "README.md")


def push_folder(folder: str | Path, repo_id: str | None, token: str | None, private: bool) -> str:
    """Upload a saved pipeline without its checkpoints and logs; returns the address of the repository."""
    folder = Path(folder)
    repo = create_repo(repo_id or folder.name, token=token, private=private, exist_ok=True)
    upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        token=token,
        commit_message="Upload trained pipeline",
        ignore_patterns=["checkpoint-*", ".incomplete-*", "logs/*", "samples/*", "log.jsonl"],
    )
    return str(repo)
