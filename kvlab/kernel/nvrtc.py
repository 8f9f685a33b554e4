"""CUDA C++ compiled and launched at run time, through NVIDIA's own bindings.

torch for CUDA 13 brings both packages along, `cuda-bindings` and NVRTC; where one is missing,
`usable` says no and the callers' other kernels compute the same.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from kvlab.core import KvlabError

try:
    from cuda.bindings import driver, nvrtc
except ImportError:  # torch without CUDA, or for an older one
    driver = nvrtc = None

HERE = Path(__file__).parent


@lru_cache(maxsize=16)
def usable(device: torch.device) -> bool:
    """Whether kernels for Hopper compile and run on `device`."""
    if driver is None or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        nvrtc.nvrtcVersion()
    except (RuntimeError, OSError):  # bindings without their library
        return False
    return True


def source(name: str) -> str:
    """The program in file `name`, with the files that it includes: NVRTC looks for none."""
    lines = (HERE / name).read_text().splitlines()
    start = '#include "'
    return "\n".join(
        source(line[len(start) : -1]) if line.startswith(start) else line for line in lines
    )


def compiled(name: str, macros: dict[str, int]) -> bytes:
    """Machine code for Hopper. Raises `KvlabError` with the compiler's words."""
    _, program = nvrtc.nvrtcCreateProgram(source(name).encode(), name.encode(), 0, [], [])
    options = [b"-arch=sm_90a", b"--std=c++17", b"--use_fast_math",
               *(f"-D{key}={value}".encode() for key, value in macros.items())]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KvlabError(f"{name} does not compile: {log.decode()}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * size
    nvrtc.nvrtcGetCUBIN(program, code)
    return code


def _checked(answer: tuple):
    error, *rest = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise KvlabError(f"the CUDA driver says {error.name}")
    return rest[0] if rest else None


def function(name: str, kernel: str, macros: dict[str, int], shared: int):
    """A kernel loaded into the current context; shared: bytes of shared memory of a block."""
    module = _checked(driver.cuModuleLoadData(compiled(name, macros)))
    found = _checked(driver.cuModuleGetFunction(module, kernel.encode()))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(found, most, shared))
    return found


def _clusters(blocks: int) -> list:
    if blocks == 1:
        return []
    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = blocks, 1, 1
    attribute.value = value
    return [attribute]


def resident_clusters(kernel, blocks: int, threads: int, shared: int) -> int:
    """How many clusters of so many blocks run at a time on the current device."""
    if blocks == 1:
        return torch.cuda.get_device_properties().multi_processor_count
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    config.attrs = _clusters(blocks)
    config.numAttrs = len(config.attrs)
    return _checked(driver.cuOccupancyMaxActiveClusters(kernel, config))


def launch(
    kernel, args: ctypes.Structure, *, grid: int, threads: int, shared: int, device: torch.device,
    cluster: int = 1,
) -> None:
    """On torch's current stream; may begin while the kernel before it ends, where both allow it.

    cluster: blocks that see each other's shared memory.
    """
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    early, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value.programmaticStreamSerializationAllowed = 1
    early.value = value
    config.attrs = [early, *_clusters(cluster)]
    config.numAttrs = len(config.attrs)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
    _checked(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(pointers), 0))
