"""Write model_cards/<name>.md from model_cards/models.json and the measurements in model_cards/results/: no number by hand.

python examples/write_model_cards.py            # or --check, which fails when a card is out of date
"""

import argparse
import json
from pathlib import Path

from huggingface_hub import ModelCardData

FOLDER = Path(__file__).parents[1] / "model_cards"

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

{num_images} images of each of the seeds {seeds}, {steps} steps of {scheduler}, mean ± standard deviation over the seeds.

* *Read as intended*: share of images that the embedded classifier gives the class that was asked for.
* *Fréchet distance*: to the 1797 real digits in the 64 features of that classifier. A measure for this data only, not
  comparable with an FID; the spread between seeds is its resolution, and guidance trades it for recognisability.
* *Nearest digit*: mean distance to the nearest training image in grey levels 0 to 1; among real digits it is {real:.3f}.
* *Closer than real*: share of images closer to a training image than 99 % of the real digits are to each other; well above
  1 % would mean copies.

`{evaluation}`

## Limits

{limits}

Licence: Apache-2.0. Data: the handwritten digits of scikit-learn (UCI, CC BY 4.0).
"""


def card(name: str, facts: dict) -> str:
    report = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    rows = ["| guidance | read as intended | Fréchet distance | nearest digit | closer than real |", "|---|---|---|---|---|"]
    for result in report["results"]:
        number = lambda key, digits, r=result: f"{r[key]['mean']:.{digits}f} ± {r[key]['std']:.{digits}f}"  # noqa: E731
        cells = [str(result["guidance_scale"]), number("accuracy", 4), number("frechet_distance", 2)]
        cells += [number("nearest_distance", 3), number("closer_than_real", 4)]
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
        real=report["results"][0]["nearest_distance_real"]["mean"],
        evaluation=report["command"],
        limits=facts["limits"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a card differs from the measurements")
    args = parser.parse_args()
    for name, facts in json.loads((FOLDER / "models.json").read_text()).items():
        path, text = FOLDER / f"{name}.md", card(name, facts)
        if not args.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            raise SystemExit(f"error: {path} is out of date; run `python examples/write_model_cards.py`.")


if __name__ == "__main__":
    main()
