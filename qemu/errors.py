"""The errors of the harness.

They are trouble with the tools, the image or the guest itself, as opposed to a test that failed: a caller that
catches HarnessError can tell the two apart. Each carries one complete message that names what was wrong, what
was expected and what to do next, fit to be shown to a user as it is.
"""


class HarnessError(Exception):
    """Base of every error the harness raises on purpose."""


class ToolMissing(HarnessError):
    """A program or file of the host that the harness needs is not there; the message says which package brings it."""


class RecipeError(HarnessError):
    """A recipe or specification file is wrong; the message names file, key and what was expected."""


class ImageBuildFailed(HarnessError):
    """An image, sysroot, extension or code disk could not be built; the message ends with the tool's last output."""


class AcceleratorUnavailable(HarnessError):
    """The accelerator that was demanded cannot run a guest here; the message says how that was found out."""


class GuestNeverCameUp(HarnessError):
    """A guest did not report ready within its deadline; the message ends with the end of its console."""


class GuestPanicked(HarnessError):
    """The guest's kernel panicked or its init gave up; the message ends with the end of its console."""


class GuestLost(HarnessError):
    """A guest that was up has gone: QEMU exited, or the guest stopped answering."""


class AgentError(HarnessError):
    """The agent in the guest refused or could not do what it was asked, such as reading a file that is not there."""


class NotOnMetal(HarnessError):
    """A test asked a machine of metal for what only a guest of QEMU's has; it is skipped for that reason."""
