"""Package metadata. Imports nothing but setuptools: installing never builds, detects or downloads anything else."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "scfg_fast" / "_version.py").read_text(encoding="utf-8").split('"')[1]

TEST = [
    "pytest>=8.0",
    "pytest-benchmark>=4.0",
    "pytest-xdist>=3.5",
    "matplotlib>=3.8",
    "torchsde>=0.2.6",
    "peft>=0.17",
    "psutil>=5.9",
    "sentencepiece>=0.2",  # diffusers hides Kolors without it
    "triton>=3.6; platform_system == 'Linux'",  # compiles the kernels for the simulator of lab/ptxsim
]
XFORMERS = ["xformers>=0.0.29"]
BATCH = ["ray[data]>=2.30"]
DEV = [*TEST, "ruff>=0.6", "mypy>=1.10", "pre-commit>=3.5"]

setup(
    name="scfg_fast",
    version=VERSION,
    description="Semantic-aware classifier-free guidance (S-CFG) for diffusers pipelines, as a one-line drop-in",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(".", include=["scfg_fast", "scfg_fast.*"]),
        *find_packages("kernels", include=["scfg_kernels", "scfg_kernels.*"]),
    ],
    # kernels/ is a source root, like src/: it must never become an importable package itself (see docs/design.md).
    package_dir={"scfg_fast": "scfg_fast", "scfg_kernels": "kernels/scfg_kernels"},
    package_data={"scfg_fast.models": ["scenes256/*", "scenes256/*/*", "classifier/*"]},
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.38.0",
        "transformers>=5.0",
        "accelerate>=1.0",
        "huggingface_hub>=1.0",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pillow>=10.1",
        "tqdm>=4.64",
    ],
    extras_require={"xformers": XFORMERS, "batch": BATCH, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["scfg-fast = scfg_fast.cli:main"]},
)
