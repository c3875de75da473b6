"""Tests: unit/ without a virtual machine, guest/ inside a guest, e2e/ from the host to a guest, faults/, bench/."""
