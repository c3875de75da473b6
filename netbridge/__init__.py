"""Net-Bridge: a user-space virtio-net driver on Linux VFIO."""
