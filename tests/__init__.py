"""Tests: unit/ without a virtual machine, guest/ inside a guest, e2e/ from the host against a guest, faults/, bench/."""
