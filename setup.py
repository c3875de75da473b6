"""Builds the one C extension there is, the data path (the rest of the project's facts are in pyproject.toml)."""

from setuptools import setup

setup(
    cffi_modules=["netbridge/datapath/build.py:ffibuilder"],
    # One build serves every CPython from 3.11 on: the generated module uses the limited API only.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
