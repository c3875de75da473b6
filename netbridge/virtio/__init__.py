"""The virtio network device: how it is reached, what is agreed with it, and how it is brought into service."""
