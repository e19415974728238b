from setuptools import find_packages, setup

setup(
    name="tw_compile",
    version="0.1.0",
    description='torch.compile(model, backend="tokenweave"): overlap the all-reduces of tensor-parallel LLMs with compute',
    packages=find_packages(include=["tw_compile", "tw_compile.*"]),
    py_modules=["tokenweave"],  # what TORCH_LOGS="tokenweave" names
    package_data={"tw_compile": ["csrc/*.cu", "csrc/*.cuh", "csrc/*.c"]},
    python_requires=">=3.10",
    # cuda-bindings compiles and loads the kernels at run time (NVRTC), so that no CUDA toolkit is needed; CUDA builds
    # of torch bring NVRTC itself. It installs and imports without a GPU.
    # torch: those of docs/versions.md. The package needs names of it that are not public (compat.py).
    install_requires=["torch>=2.11,<2.15", "cuda-bindings>=13.0", "tqdm"],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "expecttest", "hypothesis", "numpy", "nvidia-cuda-nvrtc==13.0.*", "triton",
                 "transformers>=5.0", "accelerate"],
        "examples": ["numpy", "safetensors"],
    },
    entry_points={
        "torch_dynamo_backends": ["tokenweave = tw_compile.backend:tokenweave"],
        "console_scripts": ["tw-compile = tw_compile.cli:main"],
    },
)
