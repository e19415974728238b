from setuptools import find_packages, setup

setup(
    name="tw_compile",
    version="0.2.0",
    license="BSD-3-Clause",
    description='torch.compile(model, backend="tokenweave"): overlap the all-reduces of tensor-parallel LLMs with compute',
    packages=find_packages(include=["tw_compile", "tw_compile.*"]),
    py_modules=["tokenweave"],  # what TORCH_LOGS="tokenweave" names
    package_data={"tw_compile": ["csrc/*.cu", "csrc/*.cuh", "csrc/*.c", "py.typed"]},
    python_requires=">=3.10",
    # cuda-bindings compiles and loads the kernels at run time (NVRTC), so that no CUDA toolkit is needed; CUDA builds
    # of torch bring NVRTC itself. It installs and imports without a GPU.
    # torch: those of docs/versions.md. The package needs names of it that are not public (compat.py).
    install_requires=["torch>=2.11,<2.15", "cuda-bindings>=13.0", "tqdm"],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "expecttest", "hypothesis", "numpy", "nvidia-cuda-nvrtc==13.0.*", "triton",
                 "transformers>=5.0", "accelerate", "matplotlib", "torchao>=0.18",
                 "setuptools>=70.1"],  # which builds wheels by itself
        "examples": ["numpy", "safetensors"],
        "lint": ["ruff==0.17.6", "mypy==2.4.1"],
        "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0"],
    },
    entry_points={
        "torch_dynamo_backends": ["tokenweave = tw_compile.backend:tokenweave"],
        "vllm.general_plugins": ["tokenweave = tw_compile.integrations.vllm.plugin:register"],
        "console_scripts": ["tw-compile = tw_compile.cli:main"],
    },
)
