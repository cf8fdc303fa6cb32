"""Where weights live: sizes, a device map of them, and the files and folders they are read from.

Arithmetic first: `sizes`, `memory` and `device_map` never touch a value and work on the meta device; `tensors`, `loading`
and `offload` move what the map says. The forward that fetches weights is the business of `accelerate.hooks`.
"""
