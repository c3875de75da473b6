"""Loads the harness's pytest plugin for every test below: its options, its fixtures, and tests that run in a guest."""

pytest_plugins = ["qemu.pytest_plugin"]
