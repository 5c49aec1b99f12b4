"""Introspective strided decoding for vLLM, as a plugin. Importing this package imports neither torch nor vllm."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-idlm")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0+unknown"
