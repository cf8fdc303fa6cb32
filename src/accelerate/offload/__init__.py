"""Offloading: sizes of weights, device maps, weight files, and the hooks that load weights for each forward.

`sizes`, `max_memory` and `device_map` never read a value and work on the meta device. `tensors`, `loading` and
`disk_weights` move weights as a device map assigns them. `hooks` runs the model.
"""
