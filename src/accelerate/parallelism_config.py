"""`ParallelismConfig`: sizes of the device mesh, which multiply to the number of processes.

The innermost dimension, of adjacent ranks, is tensor parallelism (``tp``), then sequence and context parallelism (``sp``,
``cp``), the shards of one replica (``dp_shard``), and the replicas (``dp_replicate``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .settings import env
from .settings.env_defaults import resolve
from .settings.parallel import (
    DeepSpeedSequenceParallelConfig,
    TorchContextParallelConfig,
    TorchTensorParallelConfig,
    logger,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .settings.parallel import TorchTensorParallelPlugin

# Outermost first: ranks along the last dimension are adjacent, on one machine if possible.
MESH_DIMS = ("dp_replicate", "dp_shard", "cp", "sp", "tp")
# Name of a flattened dimension -> its dimensions.
_FLATTENED_DIMS = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
}
_HANDLERS = {"tp": TorchTensorParallelConfig, "cp": TorchContextParallelConfig, "sp": DeepSpeedSequenceParallelConfig}


@dataclass(repr=False)
class ParallelismConfig:
    """Sizes of the device mesh. A size of None is read from the launcher's ``PARALLELISM_CONFIG_*`` variables, else 1.

    Raises:
        ValueError: for sizes below 1, unknown backends, or dimensions that exclude each other.

    Example:
        >>> config = ParallelismConfig(dp_shard_size=2, tp_size=2)
        >>> config.total_size, config.active_mesh_dims
        (4, ['dp_shard', 'tp'])
    """

    dp_replicate_size: int | None = None
    """Replicas of the model, whose gradients are averaged."""
    dp_shard_size: int | None = None
    """Ranks that each hold a shard of one replica."""
    tp_size: int | None = None
    """Ranks over which each layer's tensors are sharded (tensor parallelism)."""
    cp_size: int | None = None
    """Ranks over which sequences are sharded, exchanging keys and values (context parallelism)."""
    cp_backend: Literal["torch"] | None = None
    """Backend of context parallelism: ``torch``."""
    sp_size: int | None = None
    """Ranks over which sequences are sharded, exchanging heads (Ulysses)."""
    sp_backend: Literal["deepspeed"] | None = None
    """Backend of sequence parallelism: ``deepspeed``. DeepSpeed itself is not needed."""
    tp_handler: TorchTensorParallelConfig | None = None
    """Details; None: the defaults, where `tp_size` is above 1."""
    cp_handler: TorchContextParallelConfig | None = None
    """Details; None: the defaults, where `cp_size` is above 1."""
    sp_handler: DeepSpeedSequenceParallelConfig | None = None
    """Details; None: the defaults, where `sp_size` is above 1."""

    device_mesh: ClassVar[DeviceMesh | None] = None  # an instance's own once it has been built

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name.endswith(("_size", "_backend")):
                given = getattr(self, field.name)
                setattr(self, field.name, resolve(given, field.name, f"parallelism_config_{field.name}"))
        for name, kind in _HANDLERS.items():
            handler = getattr(self, f"{name}_handler")
            if handler is not None and not isinstance(handler, kind):
                raise ValueError(f"{name}_handler={handler!r}: expected an instance of {kind.__name__}.")
            if handler is None and self._enabled(name):
                setattr(self, f"{name}_handler", kind())
            elif handler is not None and not self._enabled(name):
                logger.warning("%s_handler has no effect: %s_size is 1.", name, name)
        if self.cp_enabled and self.sp_enabled:
            raise ValueError(
                f"cp_size={self.cp_size} and sp_size={self.sp_size} would both shard the sequence: set one of them to 1."
            )

    def __repr__(self) -> str:
        shown = (*_REPR_FIELDS, "total_size", "tp_handler", "cp_handler")
        values = {name: f"\t{name}={getattr(self, name)}" for name in shown}
        sizes = ",\n".join(values[name] for name in (*_REPR_FIELDS, "total_size"))
        return f"ParallelismConfig(\n {sizes}\n{values['tp_handler']},\n{values['cp_handler']})\n"

    # Sizes -----------------------------------------------------------------------------------------------------------

    def _size(self, dimension: str) -> int:
        size: int = getattr(self, f"{dimension}_size")
        return size

    def _enabled(self, dimension: str) -> bool:
        return self._size(dimension) > 1

    def _enabled_dims(self, *dimensions: str) -> list[str]:
        return [name for name in dimensions if self._enabled(name)]

    @property
    def total_size(self) -> int:
        """Number of processes of the mesh."""
        return self.data_parallel_size * self.non_data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Product of the data-parallel sizes."""
        return self._size("dp_replicate") * self._size("dp_shard")

    @property
    def non_data_parallel_size(self) -> int:
        """Number of ranks that work on the same data."""
        return self._size("tp") * self._size("cp") * self._size("sp")

    @property
    def dp_replicate_enabled(self) -> bool:
        """Whether the model is replicated."""
        return self._enabled("dp_replicate")

    @property
    def dp_shard_enabled(self) -> bool:
        """Whether a replica is sharded."""
        return self._enabled("dp_shard")

    @property
    def tp_enabled(self) -> bool:
        """Whether tensors are sharded."""
        return self._enabled("tp")

    @property
    def cp_enabled(self) -> bool:
        """Whether context parallelism is enabled."""
        return self._enabled("cp")

    @property
    def sp_enabled(self) -> bool:
        """Whether sequence parallelism is enabled."""
        return self._enabled("sp")

    # Dimensions ------------------------------------------------------------------------------------------------------

    @property
    def active_mesh_dims(self) -> list[str]:
        """Dimensions of more than one rank, outermost first."""
        return self._enabled_dims(*MESH_DIMS)

    @property
    def dp_dim_names(self) -> list[str]:
        """Enabled data-parallel dimensions."""
        return self._enabled_dims(*_FLATTENED_DIMS["dp"])

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Enabled dimensions whose ranks work on the same data."""
        return self._enabled_dims("tp", "cp", "sp")

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Enabled dimensions over which parameters are sharded, flattened in the mesh to ``dp_shard_cp``."""
        return self._enabled_dims(*_FLATTENED_DIMS["dp_shard_cp"])

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Enabled dimensions over which a loss is averaged, flattened in the mesh to ``dp_cp``."""
        return self._enabled_dims(*_FLATTENED_DIMS["dp_cp"])

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Dimensions for `fully_shard`: replicas, if there are several, and shards."""
        return [*self._enabled_dims("dp_replicate"), *(["dp_shard_cp"] if self.dp_shard_cp_dim_names else [])]

    # Mesh ------------------------------------------------------------------------------------------------------------

    def _get_mesh(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Returns names and sizes of the enabled dimensions."""
        names = tuple(self.active_mesh_dims)
        return names, tuple(map(self._size, names))

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Builds the mesh over the ranks of the default process group. Collective.

        Args:
            device_type: Device type, such as ``"cuda"`` or ``"cpu"``.

        Returns:
            The mesh, with flattened dimensions ``dp``, ``dp_shard_cp`` and ``dp_cp`` where enabled; None for one process.

        Raises:
            ValueError: if the sizes do not multiply to the number of processes.
        """
        from torch.distributed.device_mesh import init_device_mesh

        self.check_world_size(_world_size())
        names, sizes = self._get_mesh()
        if not names:
            return None
        return self._flatten_mesh(init_device_mesh(device_type, sizes, mesh_dim_names=names))

    def _flatten_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        for common, parts in _FLATTENED_DIMS.items():
            if active := tuple(self._enabled_dims(*parts)):
                mesh[active]._flatten(common)
        return mesh

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None:
        """Returns the mesh, which the first call with a device type builds.

        Raises:
            ValueError: if it is not built and `device_type` is None, or it was built for another device type.
        """
        if self.device_mesh is None:
            if device_type is None:
                raise ValueError("the device mesh is not built yet: pass a device type, get_device_mesh('cuda').")
            self.__dict__["device_mesh"] = self.build_device_mesh(device_type)
        mesh = self.device_mesh
        if mesh is not None and device_type not in (None, mesh.device_type):
            raise ValueError(f"the device mesh is one of {mesh.device_type!r} devices, not of {device_type!r}.")
        return mesh

    def check_world_size(self, processes: int) -> None:
        """Compares the sizes with the number of processes.

        Raises:
            ValueError: if they differ; shows the arithmetic.
        """
        if self.total_size != processes:
            product = " x ".join(f"{name}_size {self._size(name)}" for name in self.active_mesh_dims) or "every size 1"
            raise ValueError(
                f"the device mesh has {product} = {self.total_size} ranks, but {processes} processes take part: make the "
                "sizes multiply to the number of processes (accelerate launch --num_processes)."
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values, without the mesh; styles of a plan by their repr."""
        values = dataclasses.asdict(self)
        plan = self.tp_handler.plan if self.tp_handler is not None else None
        if plan is not None:
            values["tp_handler"]["plan"] = {
                name: style if isinstance(style, str) else repr(style) for name, style in plan.items()
            }
        return values


def resolve_parallelism_config(
    given: ParallelismConfig | None = None, plugin: TorchTensorParallelPlugin | None = None
) -> ParallelismConfig | None:
    """Returns the given configuration, else that of the launcher's variables or of the deprecated plugin.

    Raises:
        TypeError: if `given` is not a ParallelismConfig.
        ValueError: if `given` and `plugin` contradict each other.
    """
    if given is not None and not isinstance(given, ParallelismConfig):
        raise TypeError(f"parallelism_config must be an instance of ParallelismConfig, found {given!r}.")
    if given is None and env.flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        given = ParallelismConfig()
    if plugin is None or plugin.tp_size == 1:
        return given
    if given is not None and given.tp_size != plugin.tp_size:
        raise ValueError(
            f"torch_tp_plugin has tp_size={plugin.tp_size}, but parallelism_config has tp_size={given.tp_size}: leave "
            "torch_tp_plugin out."
        )
    if given is None:
        return (
            ParallelismConfig(tp_size=plugin.tp_size) if plugin.torch_device_mesh is None else _config_from_mesh(plugin)
        )
    return given


def _config_from_mesh(plugin: TorchTensorParallelPlugin) -> ParallelismConfig:
    """Builds the configuration of a plugin's own mesh."""
    mesh = plugin.torch_device_mesh
    assert mesh is not None
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=True)) if mesh.mesh_dim_names else {}
    if not sizes.keys() <= set(MESH_DIMS) or sizes.get("tp") != plugin.tp_size:
        raise ValueError(
            f"torch_tp_plugin has tp_size={plugin.tp_size} and torch_device_mesh={mesh}: it needs a dimension 'tp' of that "
            f"size, and others from {', '.join(MESH_DIMS)} only. Leave torch_device_mesh out to have one made."
        )
    given: dict[str, Any] = {f"{name}_size": size for name, size in sizes.items()}
    config = ParallelismConfig(**given)
    config.__dict__["device_mesh"] = config._flatten_mesh(mesh)
    return config


_REPR_FIELDS = tuple(
    field.name for field in dataclasses.fields(ParallelismConfig) if not field.name.endswith("_handler")
)


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
