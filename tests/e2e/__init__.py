"""End to end: scapy on the host, the driver and a service in a guest, and the demo made of the same parts."""
