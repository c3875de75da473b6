"""The V-Node: what the manifest says, and what it allows.

`manifest` loads one, `capabilities` is what it grants, `check` is the command that explains one. The names are imported
from those modules, not from here, so that the driver process can have the capabilities without a YAML reader in memory.
"""
