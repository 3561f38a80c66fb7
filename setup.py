"""Package metadata. The pin of torch that CI uses stands in constraints.txt alone."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="megagpt",
    version="0.1.0",
    description="Pre-train GPT models, from a laptop to a multi-node SLURM cluster",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["megagpt", "megagpt.*"]), "megagpt.kernels", "megagpt.launch"],
    package_data={"megagpt": ["presets/*.toml"], "megagpt.kernels": ["tables/*.json"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",  # earlier ones compute wrong pipeline gradients; parallel/state.py knows this one
        "triton>=3.6; platform_system == 'Linux'",
        "webdataset>=1.0",
        "pyarrow>=16",
        "tokenizers>=0.20",
        "safetensors>=0.5",
        "xxhash>=3.4",
        "fsspec>=2025.2",
        "tyro>=1.0",
        "rich>=13",
        "numpy>=1.26",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        "hf": ["transformers>=4.51"],
        "tensorboard": ["tensorboard>=2.17"],
        "wandb": ["wandb>=0.17"],
        "s3": ["s3fs>=2025.2"],
        "gs": ["gcsfs>=2025.2"],
        "fast": ["gigatoken>=0.10"],
        "dev": [
            "gcp-storage-emulator>=2026.7",
            "gcsfs>=2025.2",
            "gigatoken>=0.10",
            "hypothesis>=6.100",
            "kubeflow-trainer-api>=2.3",
            "moto[s3,server]>=5",
            "pre-commit>=3.7",
            "pyright[nodejs]==1.1.414",
            "pytest>=8",
            "pyyaml>=6",
            "ruff==0.17.6",
            "s3fs>=2025.2",
            "tensorboard>=2.17",
            "transformers>=4.51",
            "trustme>=1.2",
        ],
    },
    entry_points={"console_scripts": ["megagpt = megagpt.cli:main"]},
)
