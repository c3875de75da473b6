"""Reference services: programs on the client's side of the port. They import nothing of the driver."""
