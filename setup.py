"""The optional C extension; all else stands in pyproject.toml. Without a compiler the rest installs all the same."""

import sysconfig

from setuptools import Extension, setup

# Sums of floats are the same on every machine; that no one looks at their exceptions lets loops with choices vectorise.
FLOATS = ["-ffp-contract=off", "-fno-trapping-math"]
FLAGS = ["-O3", "-std=gnu11", "-fwrapv", *FLOATS, "-fvisibility=hidden", "-Wno-psabi"]

SOURCES = ("attention", "decode", "module", "module_attention", "module_views", "output", "resample", "tables", "views")
HEADERS = (
    "attention", "digest", "jpeg", "lanes", "module_attention", "module_views", "output", "resample", "transform",
    "views",
)  # fmt: skip

# The stable interface of CPython, which free-threaded builds do not have.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "gigatome._native",
            sources=[f"src/native/{name}.c" for name in SOURCES],
            depends=[f"src/native/{name}.h" for name in HEADERS],
            extra_compile_args=FLAGS,
            libraries=["m", "pthread"],
            py_limited_api=STABLE,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
