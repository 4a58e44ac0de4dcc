"""The optional C extension; all else stands in pyproject.toml. Without a compiler the rest installs all the same."""

import sysconfig

from setuptools import Extension, setup

FLAGS = ["-O3", "-std=gnu11", "-fwrapv", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]

# The stable interface of CPython, which free-threaded builds do not have.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "gigatome._native",
            sources=[f"src/native/{name}.c" for name in ("decode", "module", "output", "resample", "tables")],
            depends=[f"src/native/{name}.h" for name in ("digest", "jpeg", "lanes", "output", "resample", "transform")],
            extra_compile_args=FLAGS,
            py_limited_api=STABLE,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
