"""What can go wrong with a virtio device. All are DeviceErrors with a complete message for the user."""

from __future__ import annotations

from netbridge.errors import DeviceError


class NotVirtioNet(DeviceError):
    """The function is not a modern virtio network device: something else, or a transitional one."""


class FeatureMissing(DeviceError):
    """The device does not offer a feature the driver cannot do without. `missing` are their names."""

    def __init__(self, message: str, missing: tuple[str, ...]) -> None:
        super().__init__(message)
        self.missing = missing


class FeaturesRefused(DeviceError):
    """The device took FEATURES_OK back: it does not work with the features it was given (virtio 1.3 §3.1.1 step 6)."""


class Misbehaved(DeviceError):
    """The device said something no device may say, such as a structure outside its BAR."""


class ConfigUnstable(Misbehaved):
    """The device's configuration changed during every attempt to read it (virtio 1.3 §2.5)."""


class QueueUnusable(Misbehaved):
    """A virtqueue that the driver needs is absent, or of a size the ring format does not allow."""


class VectorRefused(DeviceError):
    """The device did not take an interrupt vector (virtio 1.3 §4.1.5.1.2), or has too few."""


class ResetTimeout(DeviceError):
    """The device did not say within the deadline that it is reset (virtio 1.3 §4.1.4.3.2)."""


class NeedsReset(DeviceError):
    """The device is in a state it can leave only by a reset (virtio 1.3 §2.1.2)."""


class Gone(DeviceError):
    """The device does not answer any more: every read gives ones. It was unplugged or has lost power."""


class WrongState(DeviceError):
    """Something was asked of the device that its state does not allow; the message says why never."""


class NotOffered(DeviceError):
    """Something was asked of the device for which it lacks a feature, or for which the feature was turned off."""


class ControlRefused(DeviceError):
    """The device said no to a command on its control queue (virtio 1.3 §5.1.6.5). It goes on as before."""


class ControlTimeout(DeviceError):
    """The device did not answer a command in time. What became of it is not known: it must be reset."""
