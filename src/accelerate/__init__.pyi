"""The names that `__init__.py` looks up when they are used, for type checkers and editors."""

from accelerate import accelerator as accelerator
from accelerate import checkpointing as checkpointing
from accelerate import commands as commands
from accelerate import data_loader as data_loader
from accelerate import launchers as launchers
from accelerate import local_sgd as local_sgd
from accelerate import logging as logging
from accelerate import memory_utils as memory_utils
from accelerate import optimizer as optimizer
from accelerate import scheduler as scheduler
from accelerate import state as state
from accelerate import test_utils as test_utils
from accelerate import tracking as tracking
from accelerate import utils as utils
from accelerate.accelerator import Accelerator as Accelerator
from accelerate.data_loader import skip_first_batches as skip_first_batches
from accelerate.launchers import debug_launcher as debug_launcher
from accelerate.launchers import notebook_launcher as notebook_launcher
from accelerate.runtime.memory import find_executable_batch_size as find_executable_batch_size
from accelerate.runtime.probe import is_rich_available as is_rich_available
from accelerate.runtime.rng import synchronize_rng_states as synchronize_rng_states
from accelerate.settings.enums import DDPCommunicationHookType as DDPCommunicationHookType
from accelerate.settings.enums import DistributedType as DistributedType
from accelerate.settings.handlers import AutocastKwargs as AutocastKwargs
from accelerate.settings.handlers import DataLoaderConfiguration as DataLoaderConfiguration
from accelerate.settings.handlers import DistributedDataParallelKwargs as DistributedDataParallelKwargs
from accelerate.settings.handlers import GradScalerKwargs as GradScalerKwargs
from accelerate.settings.handlers import InitProcessGroupKwargs as InitProcessGroupKwargs
from accelerate.settings.handlers import ProfileKwargs as ProfileKwargs
from accelerate.state import PartialState as PartialState

__version__: str
