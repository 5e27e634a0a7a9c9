"""Package metadata. Lower bounds only, so that users keep their own torch; constraints.txt pins the tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithScript(build_py):
    """Puts the script behind `fastdiff train-solver` into the wheel; an editable installation finds it in the source tree."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "diffusers_fastdiff" / "examples"
            self.mkpath(str(folder))
            self.copy_file(str(ROOT / "examples" / "train_amed.py"), str(folder))


EXTRAS = {
    "train": ["accelerate>=1.1", "datasets>=3.0", "peft>=0.17", "scikit-learn>=1.3", "tensorboard>=2.15"],
    "eval": [
        "accelerate>=1.1", "datasets>=3.0", "matplotlib>=3.8", "scikit-learn>=1.3", "scipy>=1.11",
        "transformers>=4.50",
    ],
    "ode": ["torchdiffeq>=0.2.4"],
}  # fmt: skip
EXTRAS["test"] = [
    *EXTRAS["train"],
    *EXTRAS["eval"],
    *EXTRAS["ode"],
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "pytest>=8.0",
    "torchmetrics>=1.4",
]
EXTRAS["dev"] = [*EXTRAS["test"], "build>=1.0", "mypy>=1.11", "ruff>=0.8"]

setup(
    name="diffusers_fastdiff",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "diffusers_fastdiff" / "__init__.py").read_text())[1],
    description="Diffusion models that are fast to sample and to train, as components of diffusers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["diffusers_fastdiff*"]),
    package_data={
        "diffusers_fastdiff": [
            "py.typed",
            "pretrained/*/*.json",
            "pretrained/*/*/*",
            "pretrained/*/*/*/*",
            "evaluation/*.safetensors",
        ]
    },
    install_requires=[
        "diffusers>=0.38",
        "huggingface_hub>=0.34",
        "numpy>=1.26",
        "pillow>=10.0",
        "safetensors>=0.4.5",
        "torch>=2.6",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildWithScript},
    entry_points={"console_scripts": ["fastdiff = diffusers_fastdiff.cli:main"]},
)
