"""Package metadata. Imports nothing but setuptools: installing never builds, detects or downloads anything else."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
URL = "https://github.com/scfg-fast/scfg_fast"
VERSION = (ROOT / "scfg_fast" / "_version.py").read_text(encoding="utf-8").split('"')[1]


def readme() -> str:
    """README.md with absolute links: relative ones lead nowhere on PyPI. Pictures link to the files themselves."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    raw = URL.replace("github.com", "raw.githubusercontent.com")
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\1{raw}/v{VERSION}/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!\w+:|#)", rf"\1{URL}/blob/v{VERSION}/", text)


TEST = [
    "pytest>=8.0",
    "pytest-benchmark>=4.0",
    "pytest-xdist>=3.5",
    "matplotlib>=3.8",
    "torchsde>=0.2.6",
    "peft>=0.17",
    "psutil>=5.9",
    "setuptools>=68",
    "pyyaml>=6.0",
    "mypy>=1.10",
    "sentencepiece>=0.2",  # diffusers hides Kolors without it
    "triton>=3.6; platform_system == 'Linux'",  # compiles the kernels for the simulator of lab/ptxsim
]
XFORMERS = ["xformers>=0.0.29"]
BATCH = ["ray[data]>=2.60"]  # whose checkpoints commit the images; more than one worker
TEST += BATCH
DEV = [*TEST, "ruff>=0.6", "pre-commit>=3.5", "build>=1.0", "twine>=5.0"]

setup(
    name="scfg_fast",
    version=VERSION,
    description="Semantic-aware classifier-free guidance (S-CFG) for diffusers pipelines, as a one-line drop-in",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The scfg_fast authors",
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
        "Paper": "https://arxiv.org/abs/2404.05384",
    },
    keywords="diffusion, diffusers, stable-diffusion, sdxl, text-to-image, classifier-free-guidance, s-cfg, triton",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(".", include=["scfg_fast", "scfg_fast.*"]),
        *find_packages("kernels", include=["scfg_kernels", "scfg_kernels.*"]),
    ],
    # kernels/ is a source root, like src/: it must never become an importable package itself (see docs/design.md).
    package_dir={"scfg_fast": "scfg_fast", "scfg_kernels": "kernels/scfg_kernels"},
    # Two packages on purpose: scfg_kernels knows tensors, scfg_fast knows models; other programs use the first alone.
    package_data={
        "scfg_fast": ["py.typed"],
        "scfg_kernels": ["py.typed"],
        "scfg_fast.models": ["scenes256/*", "scenes256/*/*", "classifier/*"],
    },
    include_package_data=False,  # what MANIFEST.in adds is for the source distribution
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.32",
        "transformers>=4.48",
        "accelerate>=1.0",
        "huggingface_hub>=0.29",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyarrow>=16.1",  # batch jobs on one machine: their files are Parquet on any file system
    ],
    extras_require={"xformers": XFORMERS, "batch": BATCH, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["scfg-fast = scfg_fast.cli:main"]},
)
