"""The data path: virtqueues, ledger, port rings and the pump, in C (`core/`), seen from Python as `_core`.

`core/api.h` says what there is; `lib` and `ffi` are cffi's. The callers are few: `netbridge.virtio` makes virtqueues,
`netbridge.session` the ledgers and the pump, `netbridge.client` the client's end.
"""
