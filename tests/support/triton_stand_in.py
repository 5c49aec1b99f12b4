"""Makes vLLM take Triton for present on a machine without a GPU: import it before vLLM.

vLLM counts Triton as absent where no driver is active. A stand-in backend named "cpu" makes it hand out the real one.
"""

from triton.backends import backends


class _ActiveDriver:
    @staticmethod
    def is_active() -> bool:
        return True


class _NoCompiler:
    driver = _ActiveDriver
    compiler = None


backends["cpu"] = _NoCompiler
