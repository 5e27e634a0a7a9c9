"""Write model_cards/<name>.md from model_cards/models.json and the measurements in model_cards/results/: no number by hand.

python examples/write_model_cards.py            # or --check, which fails when a card is out of date
"""

import argparse
import json
from pathlib import Path

from huggingface_hub import ModelCardData

FOLDER = Path(__file__).parents[1] / "model_cards"
SOLVERS = Path(__file__).parents[1] / "diffusers_fastdiff" / "pretrained" / "solvers"

CARD = """---
{metadata}
---

# {name}

{description}

```python
{usage}
```

## How it was made

`{command}`

{made}

## Measured

{table}

{num_images} images of each of the seeds {seeds}, {steps} steps of {scheduler}; mean over the seeds with the
95 % interval of the bootstrap over images. Another training run of the same model would differ by more.

* *Read as intended*: share of images that the embedded classifier gives the class that was asked for.
* *Fréchet distance*: to the 1797 real digits in the 64 features of that classifier. A measure for this data only, not
  comparable with an FID; the spread between seeds is its resolution, and guidance trades it for recognisability.
* *Nearest digit*: mean distance to the nearest training image in grey levels 0 to 1; among real digits it is {real:.3f}.
* *Closer than real*: share of images closer to a training image than 99 % of the real digits are to each other; well above
  1 % would mean copies.

`{evaluation}`

{more}## Limits

{limits}

Licence: Apache-2.0. Data: the handwritten digits of scikit-learn (UCI, CC BY 4.0).
"""


def propagation(name: str) -> str:
    """What Faster Diffusion is worth on this model, if that was measured: the best setting as fast as each other way."""
    path = FOLDER / "results" / f"faster-diffusion-{name}.json"
    if not path.exists():
        return ""
    parts = ["## Faster Diffusion\n"]
    for title, part in json.loads(path.read_text()).items():
        if "verdict" not in part:
            continue
        parts += [f"{title.removeprefix('quality ')} steps, against the plain run:\n"]
        parts += ["| instead of | speed-up | its deviation | Faster Diffusion | deviation |", "|---|---|---|---|---|"]
        for row in part["verdict"]:
            ours = row["Faster Diffusion"] or "none as fast"
            deviation = row["its deviation"]
            deviation = f"{deviation:.4f}" if isinstance(deviation, float) else ""
            cells = [row["alternative"], f"{row['speed-up']:.2f}x", f"{row['deviation']:.4f}"]
            parts.append("| " + " | ".join([*cells, ours.removeprefix("Faster Diffusion, "), deviation]) + " |")
        parts.append(f"\n`{part['command']}` ({part['num_images']} images, guidance {part['guidance_scale']}).\n")
    return "\n".join(parts) + "\n"


def interval(value: float, low: float, high: float, digits: int) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def card(name: str, facts: dict) -> str:
    report = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    rows = ["| guidance | read as intended | Fréchet distance | nearest digit | closer than real |", "|---|---|---|---|---|"]
    for result in report["results"]:
        shown = {"accuracy": 4, "frechet_distance": 2, "nearest_distance": 3, "closer_than_real": 4}
        cells = [str(result["guidance_scale"])]
        cells += [interval(result[key]["value"], *result[key]["interval"], digits) for key, digits in shown.items()]
        rows.append("| " + " | ".join(cells) + " |")
    return CARD.format(
        metadata=ModelCardData(
            license="apache-2.0", library_name="diffusers", tags=["diffusers_fastdiff", *facts["tags"]]
        ).to_yaml(),
        name=name,
        description=facts["description"].format(parameters=report["parameters"]),
        usage=facts["usage"],
        command=facts["command"],
        made=facts["made"],
        table="\n".join(rows),
        num_images=report["num_images"],
        seeds=", ".join(map(str, report["seeds"])),
        steps=report["num_inference_steps"],
        scheduler=report["scheduler"],
        real=report["results"][0]["nearest_distance_real"]["value"],
        evaluation=report["command"],
        more=propagation(name),
        limits=facts["limits"],
    )


SOLVER_CARD = """---
{metadata}
---

# {name}

{description} For {evaluations} evaluations of `{model}` at guidance {guidance}; anything else is refused.

```python
from diffusers_fastdiff import load_pretrained

pipe = load_pretrained("{model}")
{attach}
images = pipe(class_labels=[0, 1, 2, 3], guidance_scale={guidance}, num_inference_steps={evaluations}).images
```

## How it was made

`{command}`

{steps} optimisation steps on one core, teacher {teacher}.

## Measured

| | error to the reference | Fréchet distance |
|---|---|---|
| **{name}** | {own} | {own_distance} |
| best training-free solver as it comes: {stock_name} | {stock} | {stock_distance} |
| best training-free solver with searched range and grid: {searched_name} | {searched} | {searched_distance} |

{note}

`{benchmark}`

## Limits

Learned for this model only; another number of evaluations, guidance or model needs another solver.

Licence: Apache-2.0.
"""

FAMILIES = {
    "lms": "A learned linear multistep solver: grid, time shifts and history weights, all constants.",
    "static": "An AMED plug-in for {student} with constant coefficients.",
    "attached": "An AMED plug-in for {student}: a predictor of 9 thousand parameters sets the coefficients for each sample.",
}


def solver_card(name: str) -> str:
    config = json.loads((SOLVERS / name / "scheduler_config.json").read_text())
    report, fitted = json.loads((SOLVERS / name / "report.json").read_text()), config["fitted_to"]
    guidance, evaluations = fitted["guidance_scale"], fitted["num_inference_steps"]
    results = json.loads((FOLDER / "results" / f"solvers-{fitted['model_id']}-g{guidance:g}.json").read_text())
    rows = [row for row in results["rows"] if row["evaluations"] == evaluations]
    best = lambda *families: min((r for r in rows if r["family"] in families), key=lambda r: r["error"])  # noqa: E731
    cells = {
        "own": next(row for row in rows if row["solver"] == name),
        "stock": best("stock", "ours"),
        "searched": best("searched"),
    }
    number = lambda row, key, digits: interval(row[key], row[f"{key} low"], row[f"{key} high"], digits)  # noqa: E731
    values = {key: number(row, "error", 4) for key, row in cells.items()}
    values |= {f"{key}_distance": number(row, "frechet_distance", 2) for key, row in cells.items()}
    family = "lms" if config["student"] == "lms" else config["mode"]
    attach = 'load_pretrained("{0}").attach(pipe)' if family == "attached" else 'pipe.scheduler = load_pretrained("{0}")'
    return SOLVER_CARD.format(
        metadata=ModelCardData(
            license="apache-2.0", library_name="diffusers", tags=["diffusers_fastdiff", "scheduler", config["student"]]
        ).to_yaml(),
        name=name, description=FAMILIES[family].format(student=config["student"]), model=fitted["model_id"], guidance=guidance,
        evaluations=evaluations, attach=attach.format(name), command=report["command"], steps=report["steps"],
        teacher=fitted["teacher"], stock_name=cells["stock"]["solver"], note=results["note"], benchmark=results["command"],
        searched_name=cells["searched"]["solver"].removeprefix("searched: "), **values,
    )  # fmt: skip


def cards() -> dict[str, str]:
    """Text of every card by name."""
    facts = json.loads((FOLDER / "models.json").read_text())
    texts = {name: card(name, facts[name]) for name in facts}
    return texts | {path.parent.name: solver_card(path.parent.name) for path in sorted(SOLVERS.glob("*/report.json"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a card differs from the measurements")
    args = parser.parse_args()
    for name, text in cards().items():
        path = FOLDER / f"{name}.md"
        if not args.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            raise SystemExit(f"error: {path} is out of date; run `python examples/write_model_cards.py`.")


if __name__ == "__main__":
    main()
